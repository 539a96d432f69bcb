"""Models that ONNX Runtime refuses, real ones, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from engine_models import make_frozen_model
from foreign_files import FOREIGN, assert_plain, write_foreign
from onnx import numpy_helper
from onnx.helper import make_opsetid

from eamdeploy.engines.ort.reasons import explain, plain
from eamdeploy.engines.ort.runner import OrtRunner
from eamdeploy.errors import EngineError

VERSION = onnxruntime.__version__
Change = Callable[[onnx.ModelProto], object]


def changed(change: Change) -> onnx.ModelProto:
    model = make_frozen_model().to_onnx()
    change(model)
    return model


def said_of(source: Path | bytes) -> str:
    """What is said of a model that is refused."""
    with pytest.raises(EngineError) as caught:
        OrtRunner(source, threads=1, settings={})
    return str(caught.value)


def add_weights(model: onnx.ModelProto, array: object) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), "other"))
    next(node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")).input[1] = "other"


def set_opset(model: onnx.ModelProto, domain: str) -> None:
    if domain:
        model.opset_import.append(make_opsetid(domain, 99))
    else:
        model.opset_import[0].version = 99


def set_operator(model: onnx.ModelProto, op: str, domain: str = "", imported: bool = False) -> None:
    model.graph.node[0].op_type, model.graph.node[0].domain = op, domain
    if imported:
        model.opset_import.append(make_opsetid(domain, 1))


REFUSED: dict[str, tuple[Change, list[str]]] = {
    "ir version": (
        lambda model: setattr(model, "ir_version", 99),
        ["its IR version is 99", f"ONNX Runtime {VERSION} reads up to ", "Update ONNX Runtime", "or lower"],
    ),
    "operator set": (
        lambda model: set_opset(model, ""),
        ["its operator set is ai.onnx 99", f"ONNX Runtime {VERSION} reads up to ", "export the model again"],
    ),
    "operator set of ML": (
        lambda model: set_opset(model, "ai.onnx.ml"),
        ["its operator set is ai.onnx.ml 99", f"ONNX Runtime {VERSION} reads up to "],
    ),
    "operator set of Microsoft": (
        lambda model: set_opset(model, "com.microsoft"),
        ["its operator set is com.microsoft 99", "reads up to 1"],
    ),
    "operator": (
        lambda model: set_operator(model, "NoSuchOp"),
        ["the operator NoSuchOp", f"ONNX Runtime {VERSION} does not have in operator set 17", "without this operator"],
    ),
    "operator of Microsoft": (
        lambda model: set_operator(model, "NoSuchFused", "com.microsoft", imported=True),
        ["the operator com.microsoft:NoSuchFused", f"ONNX Runtime {VERSION} does not have"],
    ),
    "operator of a foreign domain": (
        lambda model: set_operator(model, "Conv", "my.domain", imported=True),
        ["the operator my.domain:Conv", "operators from a library of their own are not loaded"],
    ),
    "domain": (
        lambda model: set_operator(model, "Conv", "my.domain"),
        ["an operator of the domain 'my.domain', whose version it does not name", "opset_import"],
    ),
    "types": (lambda model: add_weights(model, np.ones((2, 2))), ["tensor(float) and tensor(double)", "MatMul"]),
    "shapes": (lambda model: add_weights(model, np.ones((3, 3), np.float32)), ["Incompatible dimensions", "MatMul"]),
    "initializer": (
        lambda model: model.graph.initializer.pop(0),
        ["a node reads 'patch', which nothing in it gives", "export it again"],
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("form", ["file", "bytes"])
def test_refused_model_has_the_fact_and_a_remedy(tmp_path: Path, what: str, form: str) -> None:
    change, facts = REFUSED[what]
    folder = tmp_path / ("a_long_name_" * 15)
    folder.mkdir()
    path = folder / "model.onnx"
    path.write_bytes(changed(change).SerializeToString())
    message = said_of(path if form == "file" else path.read_bytes())
    assert_plain(message.replace(str(folder), ""), *facts)


def test_the_supported_numbers_are_those_of_onnxruntime() -> None:
    """A model with the number that is said to be the highest loads, one more does not."""
    for name in ("IR version", "operator set"):
        message = said_of(numbered(name, 99))
        highest = int(message.partition("reads up to ")[2].partition(".")[0])
        assert f"with {name} {highest} or lower" in message
        assert f"reads up to {highest}." in said_of(numbered(name, highest + 1))
        try:
            OrtRunner(numbered(name, highest), threads=1, settings={}).close()
        except EngineError as err:  # the newest operators may want other attributes
            assert "reads up to" not in str(err)


def numbered(name: str, number: int) -> bytes:
    model = make_frozen_model().to_onnx()
    if name == "IR version":
        model.ir_version = number
    else:
        model.opset_import[0].version = number
    return model.SerializeToString()


@pytest.mark.parametrize("kind", [kind for kind in FOREIGN if kind not in ("onnx", "text cut in a character")])
@pytest.mark.parametrize("form", ["file", "bytes"])
def test_file_of_another_kind_is_named(tmp_path: Path, kind: str, form: str) -> None:
    path, words = write_foreign(tmp_path, kind, "x.onnx")
    message = said_of(path if form == "file" else path.read_bytes())
    assert_plain(message, "ONNX Runtime can't load", "expected an ONNX model", f"got {words}")
    assert message.rstrip(".").count(". ") >= 1, "there is a remedy"


@pytest.mark.parametrize("form", ["file", "bytes"])
def test_onnxruntimes_own_format_is_no_engine(tmp_path: Path, form: str) -> None:
    """ONNX Runtime takes it from memory, but not from a file of that name."""
    onnx.save(make_frozen_model().to_onnx(), tmp_path / "x.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "x.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(tmp_path / "x.onnx", options, providers=["CPUExecutionProvider"])
    (tmp_path / "x.ort").replace(tmp_path / "x.onnx")
    message = said_of(tmp_path / "x.onnx" if form == "file" else (tmp_path / "x.onnx").read_bytes())
    assert_plain(message, "expected an ONNX model", "got a model in ONNX Runtime's own format (.ort)")


@pytest.mark.parametrize("length", [3, 100, -200, -1])
def test_cut_model_is_damaged(tmp_path: Path, length: int) -> None:
    data = make_frozen_model().to_onnx().SerializeToString()[:length]
    (tmp_path / "x.onnx").write_bytes(data)
    for source in (tmp_path / "x.onnx", data):
        assert_plain(said_of(source), "it is damaged or no ONNX model", "copy or export it again")


def test_model_without_a_graph() -> None:
    message = said_of(onnx.ModelProto(ir_version=8, opset_import=[make_opsetid("", 17)]).SerializeToString())
    assert_plain(message, "copy or export it again")


def test_missing_second_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    onnx.save(make_frozen_model().to_onnx(), path, save_as_external_data=True, location="x.data", size_threshold=0)
    (tmp_path / "x.data").unlink()
    assert_plain(said_of(path), "it keeps data in a second file, which is not there", "Copy that file beside the model")


@pytest.mark.parametrize("name", ["absent.onnx", "folder.onnx"])
def test_what_is_no_file_is_refused_plainly(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.onnx").mkdir()
    assert_plain(said_of(tmp_path / name), name)


SIGNATURE = (
    "/onnxruntime_src/onnxruntime/core/graph/model.cc:256 onnxruntime::Model::Model(onnx::ModelProto&&, const "
    "onnxruntime::PathString&, const std::function<void(int)>&) "
)


FAIL = "[ONNXRuntimeError] : 1 : FAIL : "
WINDOWS = "D:\\a\\_work\\1\\s\\onnxruntime\\core\\graph.cc:9 onnxruntime::Graph::Run(int) const [with T = float] "
NODE = "Non-zero status code returned while running Conv node. Name:'c' fact"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (f"{FAIL}Load model from /a b/c.onnx failed:{SIGNATURE}the fact 14\n", "the fact 14"),
        (f"{FAIL}Exception during initialization: {SIGNATURE}x > 0 was false. fact",
         "Exception during initialization: x > 0 was false. fact"),
        (f"{WINDOWS}fact", "fact"),
        ("first line\nsecond line with the fact\n", "first line second line with the fact"),
        ("the fact\nStacktrace:\n/opt/a.cc:7 f()\n", "the fact"),
        ("", "it does not say why"),
        (f"{NODE}.", NODE),
    ],
)  # fmt: skip
def test_what_tells_nothing_is_dropped(message: str, expected: str) -> None:
    assert plain(message) == expected
    assert explain(message, "1.0").hint is None


def test_long_messages_keep_their_beginning_and_their_end() -> None:
    said = plain(f"the beginning {'word ' * 500} the end 28.")
    assert said.startswith("the beginning") and said.endswith("the end 28") and " … " in said and len(said) <= 400
