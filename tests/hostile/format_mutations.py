"""Ways to hurt a file by what its format says: headers, directories and records that contradict the rest.

A mutation of a format keeps that format's own checksums right, or nothing behind them would be reached.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from random import Random
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from PIL import Image

from eamdeploy.artifacts.seal import SEAL, seal_of
from hostile.byte_mutations import BYTE_MUTATIONS, Mutation
from hostile.text_mutations import ODD_TEXTS, hurt_document, odd_value, spelled

# --- safetensors -----------------------------------------------------------------------------------------------------


def hurt_safetensors_header(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    """Names, dtypes, shapes, offsets or metadata are others; the header's length fits again."""
    header, body = _split_safetensors(data)
    if rng.random() < 0.5:
        header = hurt_document(header, rng)
    else:
        name = rng.choice([key for key in header if key != "__metadata__"])
        entry = header[name]
        entry[rng.choice(list(entry))] = rng.choice(
            (
                *([0, 0], [0], [-1, 4], [0, 2**62], [4, 0], [2**63, 2**63], [], [1], [2**32, 2**32], [0] * 70),
                *("F32", "I8", "U64", "BF16", "F8_E4M3", "F64", "BOOL", "", odd_value(rng)),
            )
        )
    return _join_safetensors(spelled(header, rng).encode(errors="surrogatepass"), body)


def hurt_checkpoint_header(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    """The JSON under the metadata key `eam` is another."""
    header, body = _split_safetensors(data)
    metadata = header.get("__metadata__")
    if not metadata or "eam" not in metadata:
        return hurt_safetensors_header(data, rng, _)
    metadata["eam"] = spelled(hurt_document(json.loads(metadata["eam"]), rng), rng)
    return _join_safetensors(json.dumps(header).encode(), body)


def hurt_and_seal_checkpoint(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    """Header or tensors are others, and the seal is that of what the file then holds."""
    from safetensors.numpy import load, save

    header, _body = _split_safetensors(data)
    document = json.loads(header["__metadata__"]["eam"])
    tensors = load(data)
    if rng.random() < 0.6:
        document = hurt_document(document, rng)
    else:
        name = rng.choice(sorted(tensors))
        tensors[name] = _hurt_array(tensors[name], rng)
    try:
        if isinstance(document, dict):
            document[SEAL] = seal_of(document, tensors)
        return save(tensors, {"eam": spelled(document, rng)})
    except (TypeError, ValueError, RecursionError, OverflowError):  # what can't be written at all
        return data


def _split_safetensors(data: bytes) -> tuple[Any, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join_safetensors(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def _hurt_array(array: Any, rng: Random) -> Any:
    """Other values, another dtype or another shape."""
    kind = rng.randrange(6)
    if kind == 0 and array.dtype.kind == "f":
        other = array.copy()
        other.reshape(-1)[rng.randrange(array.size)] = rng.choice((np.nan, np.inf, -1, 0, 6e4))
        return other
    if kind == 1:
        return array.astype(rng.choice((np.int8, np.float16, np.float64, np.uint64, np.bool_)))
    if kind == 2:
        return array.reshape(-1)[: rng.randint(0, array.size)].copy()
    if kind == 3:
        return array.reshape(1, *array.shape)
    if kind == 4:
        return np.zeros((0, *array.shape), array.dtype)
    return np.roll(array, 1)


# --- zip: .npz and .pth ----------------------------------------------------------------------------------------------


def hurt_member(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
    """The contents of a member are hurt, and its checksum is that of the hurt contents."""
    members = _members(data)
    at = rng.randrange(len(members))
    name, content = members[at]
    members[at] = name, BYTE_MUTATIONS[rng.choice(list(BYTE_MUTATIONS))](content, rng, others)
    return _zipped(members, rng)


def hurt_npy_header(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    """An array's header claims another type, order or shape."""
    members = _members(data)
    at = rng.randrange(len(members))
    name, content = members[at]
    if content[:6] != b"\x93NUMPY":
        return hurt_member(data, rng, _)
    length = int.from_bytes(content[8:10], "little")
    header, body = content[10 : 10 + length].decode("latin1"), content[10 + length :]
    shapes = ("()", "(0,)", "(-1,)", "(1000000000000,)", "(99999, 99999, 99999)", "(1,)" * 5, "(2**62,)", "([],)", "7")
    types = ("'|O'", "'<f8'", "'>f4'", "'<U1'", "'|V0'", "'|S0'", "'<M8[s]'", "[('a', '<f4')]", "'|u1'", "''", "None")
    header = rng.choice(
        (
            re.sub(r"'shape': \([^)]*\)", f"'shape': {rng.choice(shapes)}", header),
            re.sub(r"'descr': '[^']*'", f"'descr': {rng.choice(types)}", header),
            header.replace("False", "True"),
            header.replace("'shape'", rng.choice(("'shap'", "__import__('os')", "'shape', 'shape'"))),
            "{" * rng.choice((1, 100, 5000)) + header,
        )
    )
    encoded = header.encode("latin1")
    members[at] = name, content[:8] + (len(encoded) % 65536).to_bytes(2, "little") + encoded + body
    return _zipped(members, rng)


def hurt_members(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
    """Members are missing, doubled, renamed, exchanged, or too many."""
    members = _members(data)
    at, kind = rng.randrange(len(members)), rng.randrange(6)
    name, content = members[at]
    if kind == 0:
        del members[at]
    elif kind == 1:
        members.append((name, rng.choice(others) if others else b""))
    elif kind == 2:
        members[at] = (
            rng.choice(("", "../x.npy", "/etc/x.npy", "é.npy", "x", "a" * 3000 + ".npy", name.upper())),
            content,
        )
    elif kind == 3:
        other, its = rng.choice(members)
        members[at] = name, its
        members[members.index((other, its))] = other, content
    elif kind == 4:
        members += [(f"{index}.npy", content[:200]) for index in range(2000)]
    else:
        members[at] = name, bytes(rng.choice((1 << 16, 1 << 24)))
    return _zipped(members, rng)


def hurt_directory(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    """A number in the entry of a member, or in that of the whole archive, is another: sizes, places, methods, flags."""
    entries = [match.start() for match in re.finditer(rb"PK\x01\x02|PK\x03\x04|PK\x05\x06", data)]
    if not entries:
        return data
    at = rng.choice(entries) + rng.choice((6, 8, 10, 14, 16, 18, 20, 22, 24, 26, 28, 30, 42))
    number = rng.choice((0, 1, 8, 12, 99, 0x7FFF, 0xFFFF, 0xFFFFFFFF, 0x80000000, rng.getrandbits(32)))
    width = rng.choice((2, 4))
    return data[:at] + (number % (1 << 8 * width)).to_bytes(width, "little") + data[at + width :]


def _members(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def _zipped(members: Sequence[tuple[str, bytes]], rng: Random) -> bytes:
    import warnings

    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as archive:
        warnings.simplefilter("ignore")  # a name twice
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


# --- ONNX ------------------------------------------------------------------------------------------------------------


def hurt_onnx(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    """Something in the model is another: a node, a tensor, an input, a version, the card."""
    model = onnx.load_model_from_string(data)
    for _unused in range(rng.choice((1, 1, 2))):
        _ONNX_KINDS[rng.choice(list(_ONNX_KINDS))](model, rng)
    return model.SerializeToString()


def rename_in_onnx(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    """A name is another wherever it stands, and is as long as it was."""
    model = onnx.load_model_from_string(data)
    names = {name for node in model.graph.node for name in (*node.input, *node.output, node.op_type, node.name)}
    names |= {item.name for item in (*model.graph.input, *model.graph.output, *model.graph.initializer)}
    name = rng.choice(sorted(names - {""})).encode()
    other = rng.choice((b"\xff" * len(name), b"\0" * len(name), b"\n" * len(name), b"\xc3" * len(name), name[::-1]))
    return data.replace(name, other)


def _tensor(model: onnx.ModelProto, rng: Random) -> None:
    if not model.graph.initializer:
        return
    tensor = rng.choice(model.graph.initializer)
    kind = rng.randrange(9)
    if kind == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice((-1, 0, 1, 3, 2**31, 2**62))
    elif kind == 1:
        tensor.dims.extend([rng.choice((1, 2, 2**40))])
    elif kind == 2:
        tensor.data_type = rng.choice((0, 1, 2, 3, 7, 8, 10, 11, 16, 17, 22, 99, -1))
    elif kind == 3:
        tensor.raw_data = tensor.raw_data[: rng.randint(0, len(tensor.raw_data))]
    elif kind == 4:
        tensor.raw_data += rng.randbytes(rng.randint(1, 64))
    elif kind == 5:
        tensor.name = rng.choice((*ODD_TEXTS[:2], "image", "logits"))
    elif kind == 6:
        tensor.data_location = TensorProto.EXTERNAL
        place = rng.choice(
            ("../../etc/passwd", "/dev/zero", "/dev/urandom", "x" * 5000, "", ".", "alone.onnx", "no.bin")
        )
        tensor.external_data.add(key="location", value=place)
        tensor.external_data.add(key="offset", value=rng.choice(("0", "-1", "x", str(2**63), "4096")))
        if rng.random() < 0.7:
            tensor.external_data.add(key="length", value=rng.choice(("0", "-1", str(2**40), "1e3", "64")))
        if rng.random() < 0.7:
            tensor.ClearField("raw_data")
    elif kind == 7:
        tensor.float_data.extend([1.0, float("nan")])
    else:
        tensor.CopyFrom(rng.choice(model.graph.initializer))


def _node(model: onnx.ModelProto, rng: Random) -> None:
    node, graph = rng.choice(model.graph.node), model.graph
    tensors = [name for each in graph.node for name in (*each.input, *each.output)] + ["", "nosuch"]
    kind = rng.randrange(10)
    if kind == 0 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(tensors)  # perhaps a circle
    elif kind == 1 and node.output:
        node.output[rng.randrange(len(node.output))] = rng.choice(tensors)
    elif kind == 2:
        node.op_type = rng.choice(
            ("Loop", "If", "Scan", "NoSuch", "", "Identity", "MatMul", "Softmax", "Gather", "NonZero")
        )
    elif kind == 3:
        node.domain = rng.choice(("com.microsoft", "ai.onnx.ml", "nosuch", "ai.onnx", "\n"))
    elif kind == 4:
        graph.node.remove(node)
    elif kind == 5:
        graph.node.add().CopyFrom(node)
    elif kind == 6:
        del node.input[rng.randint(0, len(node.input)) :]
    elif kind == 7:
        node.input.extend(rng.choice(tensors) for _ in range(rng.choice((1, 3, 500))))
    elif kind == 8 and node.attribute:
        attribute = rng.choice(node.attribute)
        name = attribute.name
        attribute.CopyFrom(
            helper.make_attribute(
                name, rng.choice((-1, 0, 2**62, 1.5, float("nan"), "x", [0, 0, 0], [2**40] * 2, [-5], [1.0], b"\xff"))
            )
        )
    else:
        node.attribute.append(
            helper.make_attribute(rng.choice(("axis", "perm", "to", "nosuch")), rng.choice((7, [3, 3])))
        )


def _interface(model: onnx.ModelProto, rng: Random) -> None:
    graph, kind = model.graph, rng.randrange(8)
    shape = graph.input[0].type.tensor_type.shape if graph.input else None
    if kind == 0 and shape is not None and shape.dim:
        shape.dim[rng.randrange(len(shape.dim))].dim_value = rng.choice((0, -1, 1, 2**31, 2**62, 5))
    elif kind == 1 and shape is not None and shape.dim:
        shape.dim[rng.randrange(len(shape.dim))].dim_param = rng.choice(("N", "", "\n", "x" * 5000))
    elif kind == 2 and graph.input:
        graph.input[0].type.tensor_type.elem_type = rng.choice((0, 1, 2, 7, 8, 10, 99))
    elif kind == 3:
        graph.input.add().CopyFrom(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    elif kind == 4:
        graph.output.add().CopyFrom(
            helper.make_tensor_value_info(rng.choice(("more", "patch")), TensorProto.FLOAT, [1])
        )
    elif kind == 5 and graph.input:
        del graph.input[:]
    elif kind == 6 and graph.output:
        graph.output[0].name = rng.choice(("image", "nosuch", ""))
    elif graph.output:
        graph.output[0].type.tensor_type.shape.Clear()


def _versions(model: onnx.ModelProto, rng: Random) -> None:
    number = rng.choice((0, -1, 1, 6, 11, 16, 23, 99, 2**31 - 1))
    kind = rng.randrange(5)
    if kind == 0:
        model.ir_version = number
    elif kind == 1 and model.opset_import:
        model.opset_import[0].version = number
    elif kind == 2:
        del model.opset_import[:]
    elif kind == 3:
        model.opset_import.append(helper.make_opsetid(rng.choice(("", "com.microsoft", "nosuch")), number))
    else:
        model.graph.Clear()


def _card(model: onnx.ModelProto, rng: Random) -> None:
    if not model.metadata_props:
        model.metadata_props.add(key="eamdeploy", value=rng.choice(("", "{", "[]")))
        return
    entry = rng.choice(model.metadata_props)
    kind = rng.randrange(4)
    if kind == 0:
        model.metadata_props.add().CopyFrom(entry)
    elif kind == 1:
        entry.key = rng.choice(("", "eamdeploy", "\n"))
    else:
        try:
            entry.value = spelled(hurt_document(json.loads(entry.value), rng), rng)
        except (ValueError, RecursionError):  # hurt before, or a text that protobuf does not take
            entry.value = "{"


def _nest(model: onnx.ModelProto, rng: Random) -> None:
    """Graphs in graphs."""
    inner = onnx.GraphProto(name="inner")
    for _ in range(rng.choice((1, 30, 90))):
        outer = onnx.GraphProto(name="outer")
        node = outer.node.add(op_type="If", input=["nosuch"], output=["x"])
        node.attribute.append(onnx.AttributeProto(name="then_branch", type=onnx.AttributeProto.GRAPH, g=inner))
        inner = outer
    node = model.graph.node.add(op_type="If", input=["nosuch"], output=["y"])
    node.attribute.append(onnx.AttributeProto(name="then_branch", type=onnx.AttributeProto.GRAPH, g=inner))


_ONNX_KINDS = {
    "tensor": _tensor,
    "node": _node,
    "interface": _interface,
    "versions": _versions,
    "card": _card,
    "nest": _nest,
}


# --- images ----------------------------------------------------------------------------------------------------------


def hurt_size(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    """The picture says that it is of another size; checksums are right."""
    sizes = (0, 1, 3, 100, 12_000, 14_000, 40_000, 65_500, 2**31 - 1, 2**32 - 1)
    width, height = rng.choice(sizes), rng.choice(sizes)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        header = struct.pack(">II", width % 2**32, height % 2**32) + data[24:29]
        if rng.random() < 0.3:  # bits per channel, colour type, interlacing
            header = header[:8] + bytes(rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255)) for _ in range(5))
        return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]
    if data[:2] == b"\xff\xd8" and (at := data.find(b"\xff\xc0")) > 0:
        return data[: at + 5] + struct.pack(">HH", height % 2**16, width % 2**16) + data[at + 9 :]
    if data[:2] == b"BM":
        return data[:18] + struct.pack("<ii", min(width, 2**31 - 1), min(height, 2**31 - 1)) + data[26:]
    if data[:2] == b"P6":
        return b"P6\n%d %d\n%d\n" % (width, height, rng.choice((255, 65535, 1, 0))) + data[15:]
    return data[:24] + struct.pack("<HH", width % 2**14, height % 2**14) + data[28:]


def other_image(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    """A sound picture of an unusual kind: another mode, size or format, an animation, or much of nothing."""
    file = io.BytesIO()
    kind = rng.randrange(8)
    mode = rng.choice(("1", "L", "LA", "P", "RGBA", "CMYK", "I", "I;16", "YCbCr"))
    size = rng.choice(((1, 1), (1, 3000), (9000, 1), (3, 3), (200, 30)))
    picture = Image.new(mode if kind != 1 else "CMYK", size, 0)
    if kind == 0:
        frames = [Image.new("P", (20, 20), index) for index in range(3)]
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    elif kind == 1:
        picture.save(file, "JPEG")
    elif kind == 2:
        picture.convert("L").save(file, "TIFF")
    elif kind == 3:  # 90 to 179 million pixels: a picture that only warns of a decompression bomb
        side, (colours, channels) = rng.choice((9_500, 10_800, 13_000)), rng.choice(((0, 1), (2, 3), (6, 4)))
        return _png(side, side // 64 * 64, 8, colours, _compressed_zeros((side * channels + 1) * 64, side // 64))
    elif kind == 4:
        picture.convert("RGB").save(file, "PNG", icc_profile=rng.randbytes(300))
    elif kind == 5:
        picture.convert("RGB").save(file, "JPEG", exif=b"Exif\0\0" + rng.randbytes(100))
    elif kind == 6:
        return _png(65_500, 1, 16, 6, zlib.compress(bytes(65_500 * 8 + 1)))
    else:
        picture.convert(rng.choice(("1", "L", "P", "RGBA", "LA", "I;16"))).save(file, "PNG")
    return file.getvalue()


def _compressed_zeros(length: int, times: int) -> bytes:
    """Many zeros as zlib has them, without compressing them all: a block, repeated, and the checksum of the whole."""
    block = zlib.compressobj(9, wbits=-15)
    repeated = (block.compress(bytes(length)) + block.flush(zlib.Z_FULL_FLUSH)) * times
    return b"\x78\xda" + repeated + b"\x03\x00" + struct.pack(">HH", length * times % 65521, 1)


def _png(width: int, height: int, bits: int, colours: int, body: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _table(*mutations: Mutation) -> Mapping[str, Mutation]:
    return MappingProxyType({mutation.__name__: mutation for mutation in mutations})


SAFETENSORS_MUTATIONS = _table(hurt_safetensors_header)
CHECKPOINT_MUTATIONS = _table(hurt_safetensors_header, hurt_checkpoint_header)
SEALED_AGAIN = _table(hurt_and_seal_checkpoint)
NPZ_MUTATIONS = _table(hurt_member, hurt_npy_header, hurt_members, hurt_directory)
ZIP_MUTATIONS = _table(hurt_member, hurt_members, hurt_directory)
ONNX_MUTATIONS = _table(hurt_onnx, rename_in_onnx)
IMAGE_MUTATIONS = _table(hurt_size, other_image)
