from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_files import write_foreign
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.errors import ConfigError
from eamdeploy.images.preprocess import ImageFolder, iter_batches, normalize, open_folder, preprocess

timm_data = pytest.importorskip("timm.data", reason="timm is what the preprocessing is compared with")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def how_to(size: tuple[int, int] = (32, 32), **changes: object) -> Preprocessing:
    return Preprocessing.model_validate({"size": size, "mean": MEAN, "std": STD, **changes})


def timm_transform(how: Preprocessing) -> Any:
    return timm_data.create_transform(
        input_size=(3, *how.size),
        is_training=False,
        interpolation=how.interpolation,
        mean=how.mean,
        std=how.std,
        crop_pct=how.crop_pct,
        crop_mode=how.crop_mode,
    )


def timm_pixels(image: Image.Image, how: Preprocessing) -> np.ndarray:
    """What timm's data set and transform make of the image before they turn it into a tensor."""
    steps = timm_transform(how).transforms
    assert [type(step).__name__ for step in steps[2:]] == ["MaybeToTensor", "Normalize"]
    rgb = image.convert("RGB")
    for step in steps[:2]:
        rgb = step(rgb)
    return np.asarray(rgb)


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smoothed noise, so that neither edges nor flat areas hide a shift by one pixel."""
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "CMYK": 4}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(2) if channels == 1 else values, mode)


SIZES = {
    "landscape": (500, 375),
    "portrait": (333, 501),
    "wide": (401, 90),
    "tall": (61, 300),
    "tiny": (17, 11),
    "one pixel": (1, 1),
    "as big as the resized": (256, 256),
    "as big as the input": (224, 224),
    "odd square": (229, 229),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize(
    "how",
    [
        how_to((224, 224)),
        how_to((224, 224), crop_pct=0.9, interpolation="bilinear"),
        how_to((224, 224), crop_pct=1.0),
        how_to((112, 112), crop_pct=0.95, crop_mode="squash"),
        how_to((96, 160)),
        how_to((160, 95), crop_pct=0.9),
        how_to((96, 161), crop_pct=0.9, crop_mode="squash"),
    ],
    ids=lambda how: f"{how.size[0]}x{how.size[1]}-{how.crop_pct}-{how.crop_mode}",
)
def test_pixels_are_timms_bit_for_bit(size: tuple[int, int], how: Preprocessing) -> None:
    image = noise(*size)
    pixels = preprocess(image, how)
    assert pixels.shape == (*how.size, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, timm_pixels(image, how))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
def test_every_filter_is_timms_and_differs_from_the_others(interpolation: str) -> None:
    image, how = noise(101, 87), how_to((48, 48), interpolation=interpolation)
    pixels = preprocess(image, how)
    np.testing.assert_array_equal(pixels, timm_pixels(image, how))
    other = "bilinear" if interpolation != "bilinear" else "bicubic"
    assert (pixels != preprocess(image, how_to((48, 48), interpolation=other))).any()


def indexed() -> Image.Image:
    return noise(70, 50).quantize(16)


def indexed_transparent() -> Image.Image:
    stream = io.BytesIO()
    indexed().save(stream, "PNG", transparency=3)
    return Image.open(stream)


@pytest.mark.parametrize(
    "image",
    [
        noise(70, 50, "L"),
        noise(70, 50, "RGBA"),
        noise(70, 50, "CMYK"),
        noise(70, 50).convert("1"),
        indexed(),
        indexed_transparent(),
    ],
    ids=["grey", "RGBA", "CMYK", "bilevel", "palette", "transparent palette"],
)
def test_every_ordinary_colour_mode_is_read_as_timm_reads_it(image: Image.Image) -> None:
    np.testing.assert_array_equal(preprocess(image, how_to()), timm_pixels(image, how_to()))


# modes: the right values are computed here, without Pillow


def unchanged(image: Image.Image) -> Preprocessing:
    """Preprocessing that neither resizes nor crops that image."""
    return how_to((image.height, image.width), crop_pct=1.0)


def in_mode(mode: str, *pixels: tuple[int, ...] | int, kind: str = "u1") -> Image.Image:
    """One row of pixels, whose bytes are given."""
    return Image.frombytes(mode, (len(pixels), 1), np.array(pixels).astype(kind).tobytes())


def in_palette(mode: str, *pixels: tuple[int, ...] | int) -> Image.Image:
    image = in_mode(mode, *pixels)
    image.putpalette([10, 20, 30, 40, 50, 60])
    return image


DEEP = [0, 255, 256, 511, 32767, 32768, 65535]
DEEP_RGB = [(v, v, v) for v in (0, 0, 1, 1, 127, 128, 255)]


def from_cmyk(*ink: int) -> list[float]:
    return [255 * (1 - each / 255) * (1 - ink[3] / 255) for each in ink[:3]]


def from_ycbcr(y: int, cb: int, cr: int) -> list[float]:
    """JFIF's."""
    return [
        y + 1.402 * (cr - 128),
        y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128),
        y + 1.772 * (cb - 128),
    ]


def from_lab(lightness: int, a: int, b: int) -> list[float]:
    """sRGB of CIE L*a*b* (D50), adapted to D65; `a` and `b` as signed bytes, as Pillow stores them."""
    y = (lightness / 255 * 100 + 16) / 116
    cube = np.array([y + (a - 256 * (a > 127)) / 500, y, y - (b - 256 * (b > 127)) / 200])
    xyz = np.where(cube > 6 / 29, cube**3, 3 * (6 / 29) ** 2 * (cube - 4 / 29)) * [0.9642, 1.0, 0.8249]
    to_linear = [[3.1339, -1.6169, -0.4906], [-0.9788, 1.9161, 0.0335], [0.0719, -0.2290, 1.4052]]
    linear = np.clip(np.array(to_linear) @ xyz, 0, 1)
    srgb: NDArray[np.float64] = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return [float(255 * each) for each in srgb]


MODES: dict[str, tuple[Image.Image, list[Any], float]] = {  # with how much rounding may add
    "1": (Image.frombytes("1", (3, 1), bytes([0b10100000])), [(255,) * 3, (0,) * 3, (255,) * 3], 0),
    "L": (in_mode("L", 0, 7, 255), [(0,) * 3, (7,) * 3, (255,) * 3], 0),
    "LA": (in_mode("LA", (7, 0), (200, 128)), [(7,) * 3, (200,) * 3], 0),
    "La": (in_mode("La", (7, 14), (100, 128), (0, 0)), [(127.5,) * 3, (199.2,) * 3, (0,) * 3], 1),
    "P": (in_palette("P", 0, 1), [(10, 20, 30), (40, 50, 60)], 0),
    "PA": (in_palette("PA", (0, 255), (1, 0)), [(10, 20, 30), (40, 50, 60)], 0),
    "RGB": (in_mode("RGB", (1, 2, 3), (255, 0, 9)), [(1, 2, 3), (255, 0, 9)], 0),
    "RGBX": (in_mode("RGBX", (1, 2, 3, 0), (255, 0, 9, 77)), [(1, 2, 3), (255, 0, 9)], 0),
    "RGBA": (in_mode("RGBA", (1, 2, 3, 0), (255, 0, 9, 77)), [(1, 2, 3), (255, 0, 9)], 0),
    "RGBa": (in_mode("RGBa", (50, 25, 10, 100), (9, 8, 7, 255)), [(127.5, 63.75, 25.5), (9, 8, 7)], 1),
    "CMYK": (in_mode("CMYK", (10, 100, 200, 50), (0, 0, 0, 0)), [from_cmyk(10, 100, 200, 50), (255,) * 3], 1),
    "YCbCr": (in_mode("YCbCr", (100, 90, 200), (16, 128, 128)), [from_ycbcr(100, 90, 200), (16,) * 3], 1),
    "HSV": (in_mode("HSV", (0, 255, 200), (85, 255, 90), (9, 0, 33)), [(200, 0, 0), (0, 90, 0), (33,) * 3], 1),
    "LAB": (in_mode("LAB", (136, 20, 226), (200, 0, 0)), [from_lab(136, 20, 226), from_lab(200, 0, 0)], 2),
    "I;16": (in_mode("I;16", *DEEP, kind="<u2"), DEEP_RGB, 0),
    "I;16L": (in_mode("I;16L", *DEEP, kind="<u2"), DEEP_RGB, 0),
    "I;16B": (in_mode("I;16B", *DEEP, kind=">u2"), DEEP_RGB, 0),
    "I;16N": (in_mode("I;16N", *DEEP, kind="=u2"), DEEP_RGB, 0),
}
UNKNOWN = {"I": in_mode("I", 0, 1, 65535, kind="<i4"), "F": in_mode("F", 0, 1, 255, kind="<f4")}


def test_every_mode_of_pillow_is_looked_at() -> None:
    assert set(Image.MODES) <= MODES.keys() | UNKNOWN.keys()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_colours_that_it_means(mode: str) -> None:
    image, colours, rounding = MODES[mode]
    assert image.mode == mode
    pixels = preprocess(image, unchanged(image)).astype(float)[0]
    assert np.abs(pixels - np.array(colours)).max() <= rounding


@pytest.mark.parametrize("mode", UNKNOWN)
def test_numbers_of_unknown_range_are_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match=rf"range of its numbers is not known \(mode {mode}\); expected 8 bits"):
        preprocess(UNKNOWN[mode], how_to())


def png(colour: int, bits: int, rows: bytes, width: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of one row whose samples are packed already."""
    header = struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)
    all_chunks = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in all_chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def packed(bits: int, samples: list[int]) -> bytes:
    text = "".join(f"{sample:0{bits}b}" for sample in samples)
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")


def opened(file: Path, content: bytes) -> Image.Image:
    file.write_bytes(content)
    return Image.open(file)


@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_png_of_any_depth_spans_black_to_white(tmp_path: Path, bits: int, transparent: bool) -> None:
    top = (1 << bits) - 1
    samples = sorted({0, 1, top // 3, top // 2, top - 1, top})
    see_through = [(b"tRNS", struct.pack(">H", samples[1]))] if transparent else []
    image = opened(tmp_path / "a.png", png(0, bits, packed(bits, samples), len(samples), *see_through))
    wanted = [sample >> 8 if bits == 16 else round(255 * sample / top) for sample in samples]
    pixels = preprocess(image, unchanged(image))[0]
    assert pixels.tolist() == [[value] * 3 for value in wanted]
    [batch] = iter_batches(open_folder(tmp_path, 2), unchanged(image), 1)
    np.testing.assert_array_equal(batch.pixels[0, 0], pixels)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["L", "RGB", "LA", "RGBA"])
def test_png_of_16_bits_keeps_the_upper_8_whether_grey_or_colour(tmp_path: Path, colour: int, channels: int) -> None:
    samples = [value for value in DEEP for _ in range(channels)]
    image = opened(tmp_path / "a.png", png(colour, 16, packed(16, samples), len(DEEP)))
    assert [tuple(each) for each in preprocess(image, unchanged(image))[0].tolist()] == DEEP_RGB


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("alphas", [None, b"\x00", b"\x80\xff"], ids=["opaque", "one clear", "half"])
def test_palette_colours_stay_under_their_transparency(tmp_path: Path, bits: int, alphas: bytes | None) -> None:
    see_through = [] if alphas is None else [(b"tRNS", alphas)]
    content = png(3, bits, packed(bits, [0, 1]), 2, (b"PLTE", bytes([10, 20, 30, 40, 50, 60])), *see_through)
    image = opened(tmp_path / "a.png", content)
    assert preprocess(image, unchanged(image))[0].tolist() == [[10, 20, 30], [40, 50, 60]]


@pytest.mark.parametrize("most", [1, 100, 255, 256, 1023, 4095, 65535])
@pytest.mark.parametrize("magic", ["P2", "P3", "P5", "P6"])
def test_portable_maps_span_black_to_white_whatever_their_largest_number(tmp_path: Path, magic: str, most: int) -> None:
    channels = 3 if magic in ("P3", "P6") else 1
    samples = sorted({0, most // 3, most // 2, most})
    flat = [value for value in samples for _ in range(channels)]
    body = " ".join(map(str, flat)).encode() if magic in ("P2", "P3") else packed(8 if most < 256 else 16, flat)
    image = opened(tmp_path / "a.ppm", f"{magic}\n{len(samples)} 1\n{most}\n".encode() + body)
    pixels = preprocess(image, unchanged(image))[0].astype(float)
    exact = np.array([[255 * value / most] * 3 for value in samples])
    assert np.abs(pixels - exact).max() <= 1
    assert (pixels[0] == 0).all() and (pixels[-1] == 255).all()


def write_tiff_of_12_bits(file: Path) -> None:
    """Black, the half, white (4095)."""
    tags = [(256, 3), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 5)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    data = packed(12, [0, 2048, 4095]).ljust(6, b"\0")
    file.write_bytes(b"II*\0" + struct.pack("<I", 14) + data + struct.pack("<H", len(tags)) + entries + bytes(4))


def as_tiff(kind: str) -> Callable[[Path], object]:
    return lambda file: Image.fromarray(np.array([[0, 1, 200]], kind)).save(file, "TIFF")


@pytest.mark.parametrize(
    ("write", "mode"),
    [
        (write_tiff_of_12_bits, "I;16"),
        (as_tiff("u2"), "I;16"),
        (as_tiff("i4"), "I"),
        (as_tiff("f4"), "F"),
    ],
    ids=["TIFF of 12 bits", "TIFF of 16", "TIFF of 32", "TIFF of floats"],
)
def test_files_of_numbers_of_unknown_range_are_bad_files(
    tmp_path: Path, write: Callable[[Path], object], mode: str
) -> None:
    folder = open_folder(put_images(tmp_path, 2), 20)
    write(tmp_path / "0.png")
    with Image.open(tmp_path / "0.png") as image:
        assert image.mode == mode
    with pytest.raises(ConfigError, match=rf"cannot use image .*0\.png: the range of .* \(mode {mode}, .*--skip-bad"):
        list(iter_batches(folder, HOW8, 2))
    reasons: list[str] = []
    [batch] = iter_batches(folder, HOW8, 2, True, lambda _, why: reasons.append(why))
    assert [file.name for file in batch.files] == ["1.png"] and len(reasons) == 1


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "GIF"])
def test_the_first_picture_of_an_animation_is_the_image(tmp_path: Path, kind: str) -> None:
    first, *more = (Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    first.save(tmp_path / "a.png", kind, save_all=True, append_images=more, **options)
    [batch] = iter_batches(open_folder(tmp_path, None), HOW8, 1)
    assert (batch.pixels == [255, 0, 0]).all()


# EXIF

TURNS: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {  # where the first row and column are to be seen
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGB"), ("PNG", "I;16"), ("PNG", "P"), ("WEBP", "RGB"), ("JPEG", "RGB")]
)
def test_images_are_turned_as_exif_says_only_when_asked(tmp_path: Path, orientation: int, kind: str, mode: str) -> None:
    rows = np.add.outer(np.arange(24) * 4, np.arange(16) * 9).astype(np.uint8)
    stored = np.repeat(rows[:, :, None], 3, axis=2)
    image = Image.fromarray(rows.astype(np.uint16) << 8) if mode == "I;16" else Image.fromarray(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = image.quantize(256) if mode == "P" else image
    options: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}
    image.save(tmp_path / "a.png", kind, exif=exif, **options.get(kind, {}))
    for turned, wanted in ((False, stored), (True, TURNS[orientation](stored))):
        how = how_to(wanted.shape[:2], crop_pct=1.0)
        [batch] = iter_batches(open_folder(tmp_path, None, exif_transpose=turned), how, 1)
        assert np.abs(batch.pixels[0].astype(int) - wanted).max() <= (4 if kind == "JPEG" else 0)


def test_without_an_orientation_nothing_is_turned(tmp_path: Path) -> None:
    noise(60, 40).save(tmp_path / "a.png")
    plain, asked = (
        next(iter_batches(open_folder(tmp_path, None, exif_transpose=turned), how_to(), 1)) for turned in (False, True)
    )
    np.testing.assert_array_equal(plain.pixels, asked.pixels)


def test_damaged_exif_is_a_bad_file_where_it_counts(tmp_path: Path) -> None:
    noise(60, 40).save(tmp_path / "a.png", exif=b"Exif\0\0no such thing")
    next(iter_batches(open_folder(tmp_path, None), how_to(), 1))
    with pytest.raises(ConfigError, match=r"cannot use image .*a\.png"):
        next(iter_batches(open_folder(tmp_path, None, exif_transpose=True), how_to(), 1))


# sizes


@settings(max_examples=150, deadline=None)
@given(
    source=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    target=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    crop_pct=st.floats(0.3, 1.0),
    crop_mode=st.sampled_from(["center", "squash"]),
)
def test_any_sizes_are_rounded_as_timm_rounds_them(
    source: tuple[int, int], target: tuple[int, int], crop_pct: float, crop_mode: str
) -> None:
    how = how_to(target, crop_pct=crop_pct, crop_mode=crop_mode, interpolation="nearest")
    np.testing.assert_array_equal(preprocess(noise(*source), how), timm_pixels(noise(*source), how))


def test_an_exif_orientation_is_ignored_as_timms_data_set_does(tmp_path: Path) -> None:
    upright, turned = noise(60, 40), tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90°
    upright.save(turned, exif=exif)
    [batch] = iter_batches(open_folder(tmp_path, 2), how_to(), 1)
    dataset = timm_data.ImageDataset(str(tmp_path), class_map={"": 0, tmp_path.name: 0})
    np.testing.assert_array_equal(batch.pixels[0], timm_pixels(dataset[0][0], how_to()))
    np.testing.assert_array_equal(batch.pixels[0], preprocess(upright, how_to()))


def test_an_image_that_would_grow_beyond_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 × 40000 pixels is too elongated"):
        preprocess(Image.new("RGB", (1, 40000)), how_to((224, 224)))


def test_real_photographs_reach_the_model_as_through_timm(shared_data: Path) -> None:
    how = how_to((224, 224))
    folder = open_folder(shared_data / "imagenet_sample", 1000, limit=6)
    [batch] = iter_batches(folder, how, 6)
    images = normalize(batch.pixels, how)
    for file, image in zip(folder.files, images, strict=True):
        expected = timm_transform(how)(Image.open(file).convert("RGB"))
        np.testing.assert_array_equal(image, expected.numpy())


# normalize


def test_normalize_is_torchvisions_bit_for_bit_for_every_value() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    how = how_to(mean=(0.485, 0.5, 0.123456), std=(0.229, 1.0, 0.3081))
    pixels = np.stack([np.roll(np.arange(256, dtype=np.uint8), shift).reshape(16, 16) for shift in (0, 7, 99)], axis=-1)
    two = np.stack([pixels, pixels[::-1]])
    expected = transforms.Compose([transforms.ToTensor(), transforms.Normalize(how.mean, how.std)])
    images = normalize(two, how)
    assert images.dtype == np.float32
    assert images.shape == (2, 3, 16, 16)
    assert images.flags.c_contiguous
    for image, source in zip(images, two, strict=True):
        np.testing.assert_array_equal(image, expected(source.copy()).numpy())


def test_normalize_by_hand() -> None:
    how = how_to(mean=(0.0, 0.5, 1.0), std=(1.0, 0.25, 0.5))
    pixels = np.array([[[[255, 255, 0]]]], np.uint8)
    np.testing.assert_array_equal(normalize(pixels, how), np.array([[[[1.0]], [[2.0]], [[-2.0]]]], np.float32))


# iter_batches


def put_images(root: Path, count: int) -> Path:
    """`count` 8 × 8 images, number i filled with the value i; their labels are 10 + i."""
    root.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (i, i, i)).save(root / f"{i}.png")
    (root / "labels.csv").write_text("file,label\n" + "".join(f"{i}.png,{10 + i}\n" for i in range(count)))
    return root


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])


HOW8 = how_to((8, 8), crop_pct=1.0)


def test_batches_keep_the_order_and_the_last_is_smaller(tmp_path: Path) -> None:
    batches = list(iter_batches(open_folder(put_images(tmp_path, 5), 20), HOW8, 2))
    assert [batch.pixels.shape for batch in batches] == [(2, 8, 8, 3), (2, 8, 8, 3), (1, 8, 8, 3)]
    for batch in batches:
        assert batch.labels is not None
        assert batch.labels.dtype == np.int64
        numbers = [int(file.stem) for file in batch.files]
        assert batch.labels.tolist() == [10 + number for number in numbers]
        assert batch.pixels[:, 0, 0, 0].tolist() == numbers
    assert [int(file.stem) for batch in batches for file in batch.files] == [0, 1, 2, 3, 4]


def test_unlabelled_batches_have_no_labels(tmp_path: Path) -> None:
    (put_images(tmp_path, 1) / "labels.csv").unlink()
    [batch] = iter_batches(open_folder(tmp_path, 20), HOW8, 4)
    assert batch.labels is None


def test_files_are_decoded_only_when_their_batch_is_due(tmp_path: Path) -> None:
    batches = iter_batches(open_folder(put_images(tmp_path, 4), 20), HOW8, 2)
    next(batches)
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "2.png")
    assert next(batches).pixels[0, 0, 0, 0] == 200


def test_a_bad_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    truncate(put_images(tmp_path, 3) / "1.png")
    with pytest.raises(ConfigError, match=r"cannot use image .*1\.png: .*--skip-bad"):
        list(iter_batches(open_folder(tmp_path, 20), HOW8, 2))


def test_skipped_files_are_reported_and_the_batch_is_filled_up(tmp_path: Path) -> None:
    folder = open_folder(put_images(tmp_path, 5), 20)
    truncate(tmp_path / "1.png")
    skipped: list[tuple[str, str]] = []
    batches = list(iter_batches(folder, HOW8, 2, True, lambda file, reason: skipped.append((file.name, reason))))
    assert [[file.name for file in batch.files] for batch in batches] == [["0.png", "2.png"], ["3.png", "4.png"]]
    assert [batch.labels.tolist() for batch in batches if batch.labels is not None] == [[10, 12], [13, 14]]
    assert [name for name, _ in skipped] == ["1.png"]
    assert skipped[0][1]


def write_jpeg_cut_short(file: Path) -> None:
    stream = io.BytesIO()
    noise(64, 64).save(stream, "JPEG")
    file.write_bytes(stream.getvalue()[:-600])


def write_bomb(file: Path) -> None:
    noise(8, 8).save(file, "PNG")
    content = bytearray(file.read_bytes())
    content[16:24] = struct.pack(">II", 20000, 20000)  # the header now promises 400 megapixels
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    file.write_bytes(content)


def write_broken_png(file: Path) -> None:
    noise(64, 64).save(file, "PNG")
    content = bytearray(file.read_bytes())
    content[100:140] = bytes(40)
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (write_jpeg_cut_short, "truncated"),
        (write_broken_png, ""),
        (write_bomb, "decompression bomb"),
        (lambda file: file.write_bytes(b""), "not an image"),
        (lambda file: file.write_text("<html>404</html>"), "not an image"),
        (lambda file: file.unlink(), "No such file"),
        (lambda file: Image.new("1", (1, 2_000_000)).save(file, "PNG"), "too elongated"),
    ],
    ids=["cut JPEG", "broken PNG", "bomb", "empty", "HTML", "deleted", "elongated"],
)
def test_every_kind_of_bad_file_is_skipped_with_its_reason(
    tmp_path: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    folder = open_folder(put_images(tmp_path, 2), 20)
    spoil(tmp_path / "0.png")
    reasons: list[str] = []
    [batch] = iter_batches(folder, HOW8, 4, True, lambda _, why: reasons.append(why))
    assert [file.name for file in batch.files] == ["1.png"]
    assert len(reasons) == 1
    assert reason in reasons[0]
    assert str(tmp_path) not in reasons[0]


def test_nothing_but_bad_files_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    folder = open_folder(put_images(tmp_path, 2), 20)
    for file in folder.files:
        file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no image of .* can be used; .* got 2 bad files"):
        list(iter_batches(folder, HOW8, 1, skip_bad=True))


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_below_one_is_refused(tmp_path: Path, batch_size: int) -> None:
    with pytest.raises(ConfigError, match=f"at least 1; got {batch_size}"):
        next(iter_batches(ImageFolder(tmp_path, (), None), HOW8, batch_size))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("git-lfs", "not an image that Pillow can read, but a Git LFS pointer"),
        ("html", "not an image that Pillow can read, but a web page (HTML)"),
        ("empty", "not an image that Pillow can read, but an empty file"),
        ("zip", "not an image that Pillow can read, but a ZIP archive of other files"),
        ("text", "not an image that Pillow can read. Leave"),
    ],
)
def test_file_of_another_kind_in_place_of_an_image_is_named(tmp_path: Path, kind: str, said: str) -> None:
    write_foreign(tmp_path, kind, "x.png")
    how = Preprocessing(
        size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear", crop_pct=1.0, crop_mode="center"
    )
    with pytest.raises(ConfigError) as caught:
        list(iter_batches(open_folder(tmp_path, None), how, 1))
    assert said in str(caught.value)
