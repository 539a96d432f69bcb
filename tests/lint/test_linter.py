"""One planted violation for every rule and every clause of it, and versions that the rule does not apply to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import RunCli, only_error
from lint_models import KEYS, ROWS, attention, found, frozen_map, model, packed_int4
from onnx import TensorProto, helper

from eamdeploy.engines.trt.versions import TrtVersion, capabilities
from eamdeploy.errors import CheckpointError, ConfigError
from eamdeploy.lint.base import Rule
from eamdeploy.lint.linter import RULES, LintReport, lint_file

VERSIONS = ("8.5", "8.6", "10.3", "11.4")


@dataclass(frozen=True)
class Planted:
    """A model that breaks one rule at one node.

    Attributes:
        says: a part of the message.
        versions: which find it; all others take the model, or find something else.
    """

    rule: str
    made: onnx.ModelProto
    node: str
    says: str
    versions: tuple[str, ...] = VERSIONS


BEFORE_10 = ("8.5", "8.6")
ROW_SCALES = np.full(ROWS, 0.5, np.float32)
ONE_SCALE: dict[str, Any] = {"scale": np.array(0.5, np.float32), "zero": np.array(0, np.int8)}
INTEGERS: dict[str, Any] = {"codes": np.ones((ROWS, KEYS), np.int8)}
BAD_SCALES = {"zero": 0.0, "negative": -1.0, "NaN": np.nan, "infinite": np.inf}


def identity(inputs: str, outputs: str = "float[B,4,6] y", body: str = "y = Identity (x)") -> onnx.ModelProto:
    return model(body, inputs=inputs, outputs=outputs)


def without_rank() -> onnx.ModelProto:
    made = model("y = Relu (x)")
    for value in (*made.graph.input, *made.graph.output):
        value.type.tensor_type.ClearField("shape")
    return made


def half(values: np.ndarray, data_type: int) -> onnx.TensorProto:
    return helper.make_tensor("half", data_type, values.shape, values.reshape(-1).tolist())


TOKEN: dict[str, Any] = {"token": np.ones((1, 1, KEYS), np.float32), "one": np.array([1]), "size": np.array([KEYS])}
LAYER_NORM = model("y = LayerNormalization (x, gain)", gain=np.ones(KEYS, np.float32))

PLANTED: dict[str, Planted] = {
    "opset": Planted("opset", model("y = Relu (x)", opset=18), "model", "at most 17, got 18", BEFORE_10),
    "opset of 10.x": Planted(
        "opset", model("y = Relu (x)", opset=21), "model", ", got 21", ("10.0", "10.3", "10.13", *BEFORE_10)
    ),
    "opset of 11.x": Planted("opset", model("y = Relu (x)", opset=25), "model", ", got 25", (*VERSIONS, "10.15")),
    "foreign domain": Planted(
        "operator-domain", model("y = com.microsoft.Gelu (x)"), "the Gelu", "domain com.microsoft"
    ),
    "integer product": Planted(
        "operator-known",
        model(
            "y = MatMulInteger (x, w)",
            inputs="int8[B,4,6] x",
            outputs="int32[B,4,6] y",
        ),
        "the MatMulInteger",
        "does not import",
    ),
    "no such operator": Planted("operator-known", model("y = Made_Up (x)"), "the Made_Up", "no operator Made_Up"),
    "layer norm": Planted("layer-normalization", LAYER_NORM, "the LayerNormalization", "does not know", ("8.5",)),
    "gelu": Planted("gelu", model("y = Gelu (x)", opset=17), "the Gelu", "does not know Gelu", BEFORE_10),
    "attention operator": Planted(
        "attention-operator",
        model("y = Attention <q_num_heads = 2, kv_num_heads = 2> (x, x, x)", opset=20),
        "the Attention",
        "does not know Attention",
        ("10.3", "10.13", *BEFORE_10),
    ),
    "float64 input": Planted(
        "float64",
        identity("double[B,4,6] x", body="y = Cast <to = 1> (x)"),
        "x",
        "input or output is float64",
    ),
    "float64 node": Planted(
        "float64", model("d = Cast <to = 11> (x) y = Cast <to = 1> (d)"), "the Cast", "computes in float64"
    ),
    "int64 values": Planted(
        "int64-arithmetic",
        model("i = Cast <to = 7> (x) j = Add (i, i) y = Cast <to = 1> (j)"),
        "the Add",
        "in int64",
        BEFORE_10,
    ),
    "uint8 without a cast": Planted(
        "narrow-integers",
        identity("uint8[B,4,6] x", "uint8[B,6,4] y", "y = Transpose <perm = [0, 2, 1]> (x)"),
        "the Transpose",
        "expected a UINT8 input or output",
    ),
    "uint8 in the middle": Planted(
        "narrow-integers", model("u = Cast <to = 2> (x) y = Cast <to = 1> (u)"), "the Cast", "UINT8 tensor u"
    ),
    "uint16 input": Planted(
        "narrow-integers", identity("uint16[B,4,6] x", body="y = Cast <to = 1> (x)"), "the Cast", "UINT16 tensor x"
    ),
    "dynamic height": Planted(
        "dynamic-axes", identity("float[B,H,6] x", "float[B,H,6] y"), "x", "axes [1] are dynamic"
    ),
    "token for as many as the image has": Planted(
        "expanded-tokens",
        model(
            "n = Shape <start = 0, end = 1> (x) s = Concat <axis = 0> (n, one, size) e = Expand (token, s) "
            "p = Relu (x) y = Concat <axis = 1> (e, p)",
            **TOKEN,
            outputs="float[B,5,6] y",
        ),
        "the Concat",
        "joins e, which is repeated as x says",
        BEFORE_10,
    ),
    "no rank": Planted("dynamic-axes", without_rank(), "x", "rank is not stated"),
    "uint8 map": Planted(
        "quantized-type",
        frozen_map(np.ones((ROWS, KEYS), np.uint8), zero_points=np.zeros(ROWS, np.uint8)),
        "the DequantizeLinear",
        "UINT8, expected INT8",
    ),
    "uint8 activation": Planted(
        "quantized-type",
        model(
            "q = QuantizeLinear (x, scale, zero) y = DequantizeLinear (q, scale, zero)",
            scale=np.array(0.5, np.float32),
            zero=np.array(0, np.uint8),
        ),
        "the QuantizeLinear",
        "QuantizeLinear of UINT8",
    ),
    "uint8 by default": Planted(
        "quantized-type",
        model("q = QuantizeLinear (x, scale) y = Cast <to = 1> (q)", scale=np.array(0.5, np.float32), opset=19),
        "the QuantizeLinear",
        "QuantizeLinear of UINT8",
    ),
    "int8 reshaped first": Planted(
        "int8-constant-use",
        model(
            "r = Reshape (codes, shape) f = DequantizeLinear (r, scale, zero) y = Add (x, f)",
            **INTEGERS,
            **ONE_SCALE,
            shape=np.array([ROWS, KEYS]),
        ),
        "the Reshape",
        "expected DequantizeLinear",
    ),
    "int8 constant": Planted(
        "int8-constant-version", frozen_map(), "the DequantizeLinear", "from TensorRT 8.5.3", ("8.5.0", "8.5.2.2")
    ),
    "two inputs": Planted(
        "dequantize-inputs",
        model("f = DequantizeLinear <axis = 0> (codes, scales) y = Add (x, f)", **INTEGERS, scales=ROW_SCALES),
        "the DequantizeLinear",
        "got 2",
        BEFORE_10,
    ),
    "empty zero point": Planted(
        "dequantize-inputs",
        model('f = DequantizeLinear <axis = 0> (codes, scales, "") y = Add (x, f)', **INTEGERS, scales=ROW_SCALES),
        "the DequantizeLinear",
        "got 2",
        BEFORE_10,
    ),
    "half scales": Planted(
        "scale-type", frozen_map(scales=ROW_SCALES.astype(np.float16)), "the DequantizeLinear", "expected FLOAT, got"
    ),
    "half scales, opset 19": Planted(
        "scale-type",
        frozen_map(scales=half(ROW_SCALES, TensorProto.BFLOAT16), opset=19),
        "the DequantizeLinear",
        "expected FLOAT, got BFLOAT16",
        BEFORE_10,
    ),
    **{
        f"{name} scale": Planted(
            "scale-positive",
            frozen_map(scales=np.array([0.5, value, 0.5, 0.5], np.float32)),
            "the DequantizeLinear",
            "1 of 4, the first at 1",
        )
        for name, value in BAD_SCALES.items()
    },
    "zero point 1": Planted(
        "zero-point",
        frozen_map(zero_points=np.array([0, 0, 0, 1], np.int8)),
        "the DequantizeLinear",
        "expected 0 throughout",
    ),
    "one zero point": Planted(
        "zero-point", frozen_map(zero_points=np.zeros(1, np.int8)), "the DequantizeLinear", "expected 4 values"
    ),
    "scales of an activation": Planted(
        "per-axis",
        model(
            "q = QuantizeLinear <axis = 1> (x, scales, zeros) y = DequantizeLinear <axis = 1> (q, scales, zeros)",
            scales=ROW_SCALES,
            zeros=np.zeros(ROWS, np.int8),
        ),
        "the QuantizeLinear",
        "which is no constant",
    ),
    "scales of another axis": Planted(
        "per-axis", frozen_map(attributes="<axis = 1>"), "the DequantizeLinear", "on axis 1, got 4"
    ),
    "blocks": Planted(
        "blocks",
        frozen_map(
            scales=np.full((ROWS, 2), 0.5, np.float32),
            zero_points=np.zeros((ROWS, 2), np.int8),
            attributes="<axis = 1, block_size = 3>",
            opset=17,
        ),
        "the DequantizeLinear",
        "expected INT4 or FP8 data, got INT8",
    ),
    "int4": Planted(
        "int4",
        model(
            opset=21,
            body="f = DequantizeLinear <axis = 0> (codes, scales, zeros) y = Add (x, f)",
            codes=packed_int4((ROWS, KEYS)),
            scales=ROW_SCALES,
            zeros=helper.make_tensor("z", TensorProto.INT4, (ROWS,), [0] * ROWS),
        ),
        "the DequantizeLinear",
        "has no INT4",
        BEFORE_10,
    ),
    "float8": Planted(
        "float8",
        model(
            "f = DequantizeLinear (codes, scale, zero) y = Add (x, f)",
            opset=19,
            codes=helper.make_tensor("f8", TensorProto.FLOAT8E4M3FN, (ROWS, KEYS), [1.0] * (ROWS * KEYS)),
            scale=np.array(0.5, np.float32),
            zero=helper.make_tensor("z8", TensorProto.FLOAT8E4M3FN, (), [0.0]),
        ),
        "the DequantizeLinear",
        "FP8 needs",
    ),
    "one-sided product": Planted(
        "int8-product",
        attention(
            context="i = QuantizeLinear (v, step, zero) w = DequantizeLinear (i, step, zero) c = MatMul (a, w)",
        ),
        "the MatMul",
        "the left operand",
    ),
    "scaled scores": Planted("attention-scale", attention("s = Mul (p, factor)"), "the Mul", "after the product"),
    "divided scores": Planted(
        "attention-scale", attention("d = Div (p, factor) s = Add (d, bias)"), "the Div", "after the product"
    ),
    "two readers": Planted(
        "attention-readers",
        attention(context="d = MatMul (a, v) e = MatMul (a, v) c = Add (d, e)"),
        "the Softmax",
        "2 readers",
    ),
    "frozen entries": Planted(
        "attention-mixed",
        attention(context="m = Where (mask, map, a) c = MatMul (m, v)"),
        "the Where",
        "share one product",
    ),
    "frozen heads appended": Planted(
        "attention-mixed",
        attention(context="r = Identity (a) m = Mul (r, map) c = MatMul (m, v)"),
        "the Mul",
        "share one product",
    ),
    "small heads": Planted("attention-head-size", attention(head_size=8), "the MatMul", "got 8"),
    "odd heads": Planted("attention-head-size", attention(head_size=20), "the MatMul", "got 20"),
}


def broken(made: onnx.ModelProto, version: str, rule: str) -> list[str]:
    return [finding.node for finding in found(made, version) if finding.rule == rule]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_found_by_the_versions_it_applies_to(name: str) -> None:
    planted = PLANTED[name]
    rule = next(rule for rule in RULES if rule.id == planted.rule)
    for version in {*VERSIONS, *planted.versions}:
        findings = [finding for finding in found(planted.made, version) if finding.rule == planted.rule]
        if version not in planted.versions:
            assert findings == [], version
            continue
        first = findings[0]
        assert (first.node, first.severity) == (planted.node, rule.severity)
        assert planted.says in first.message
        assert first.remedy == rule.remedy.replace("VERSION", version)


def test_every_rule_has_a_planted_violation() -> None:
    ids = [rule.id for rule in RULES]
    assert len(ids) == len(set(ids)) >= 12
    assert {planted.rule for planted in PLANTED.values()} == set(ids)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_rule_says_where_it_applies_and_what_to_do(rule: Rule) -> None:
    assert rule.applies and rule.remedy.endswith(".")


def test_the_documentation_lists_every_rule() -> None:
    text = (Path(__file__).parents[2] / "docs" / "guides" / "tensorrt.md").read_text()
    rows = [f"| `{rule.id}` | {rule.applies} | {rule.severity} |" for rule in RULES]
    assert "\n".join(rows) in text


CLEAN: dict[str, tuple[onnx.ModelProto, tuple[str, ...]]] = {
    "frozen map": (frozen_map(), VERSIONS),
    "one scale": (
        model("f = DequantizeLinear (codes, scale, zero) y = Add (x, f)", **INTEGERS, **ONE_SCALE),
        VERSIONS,
    ),
    "layer norm": (LAYER_NORM, VERSIONS[1:]),
    "no zero point": (
        model("f = DequantizeLinear <axis = 0> (codes, scales) y = Add (x, f)", **INTEGERS, scales=ROW_SCALES),
        ("10.3", "11.4"),
    ),
    "half scales": (frozen_map(scales=half(ROW_SCALES, TensorProto.BFLOAT16), opset=19), ("10.3", "11.4")),
    "negative axis": (frozen_map(attributes="<axis = -2>"), VERSIONS),
    "weights by channel": (
        model(
            "q = QuantizeLinear <axis = 0> (w, scales, zeros) f = DequantizeLinear <axis = 0> (q, scales, zeros) "
            "y = Add (x, f)",
            w=np.ones((ROWS, KEYS), np.float32),
            scales=ROW_SCALES,
            zeros=np.zeros(ROWS, np.int8),
        ),
        VERSIONS,
    ),
    "int4 in blocks": (
        model(
            "f = DequantizeLinear <axis = 1, block_size = 3> (codes, scales) y = Add (x, f)",
            opset=21,
            codes=packed_int4((ROWS, KEYS)),
            scales=np.full((ROWS, 2), 0.5, np.float32),
        ),
        ("11.4",),
    ),
    "token for as many as the patches are": (
        model(
            "p = Relu (x) n = Shape <start = 0, end = 1> (p) s = Concat <axis = 0> (n, one, size) "
            "e = Expand (token, s) y = Concat <axis = 1> (e, p)",
            **TOKEN,
            outputs="float[B,5,6] y",
        ),
        VERSIONS,
    ),
    "token for a fixed batch": (
        model(
            "n = Shape <start = 0, end = 1> (x) s = Concat <axis = 0> (n, one, size) e = Expand (token, s) "
            "p = Relu (x) y = Concat <axis = 1> (e, p)",
            **TOKEN,
            inputs="float[2,4,6] x",
            outputs="float[2,5,6] y",
        ),
        VERSIONS,
    ),
    "uint8 image": (identity("uint8[B,4,6] x", body="y = Cast <to = 1> (x)"), VERSIONS),
    "attention": (attention(), VERSIONS),
    "biased and masked": (attention("b = Add (p, bias) s = Where (mask, b, bias)"), VERSIONS),
    "linear layer with softmax": (
        model("z = MatMul (x, w) y = Softmax (z)", w=np.ones((KEYS, KEYS), np.float32)),
        VERSIONS,
    ),
    "shape arithmetic": (
        model("s = Shape (x) t = Mul (s, one) y = Reshape (x, t)", one=np.array(1)),
        VERSIONS,
    ),
}


@pytest.mark.parametrize("name", CLEAN)
def test_what_tensorrt_takes_has_no_findings(name: str) -> None:
    made, versions = CLEAN[name]
    for version in versions:
        assert found(made, version) == [], version


def test_int4_where_tensorrt_has_it() -> None:
    def planted(shape: tuple[int, ...], opset: int) -> onnx.ModelProto:
        rows = np.full(shape[0], 0.5, np.float32)
        body = "f = DequantizeLinear <axis = 0> (codes, scales) y = Add (x, f)"
        return model(body, opset=opset, codes=packed_int4(shape), scales=rows)

    def messages(made: onnx.ModelProto, version: str) -> str:
        return "; ".join(finding.message for finding in found(made, version) if finding.rule == "int4")

    assert "operator set 21" in messages(planted((ROWS, KEYS), 20), "10.3")
    assert "expected two axes, got 3" in messages(planted((1, ROWS, KEYS), 21), "10.3")
    assert messages(planted((1, ROWS, KEYS), 21), "11.4") == ""
    activation = model(
        "q = QuantizeLinear <output_dtype = 22> (x, scale) y = DequantizeLinear (q, scale)",
        opset=21,
        scale=np.array(0.5, np.float32),
    )
    assert "constants only, got QuantizeLinear" in messages(activation, "11.4")


def test_errors_come_first_and_subgraphs_are_looked_at() -> None:
    branch = (
        "y = If (yes) <then_branch = g1 () => (float[B,4,6] a) { a = LayerNormalization (x, gain) }, "
        "else_branch = g2 () => (float[B,4,6] b) { b = Identity (x) }>"
    )
    made = model(branch, yes=np.array(True), gain=np.ones(KEYS, np.float32))
    assert [(finding.rule, finding.node) for finding in found(made, "8.5")] == [("layer-normalization", "a")]
    both = attention("s = Mul (p, factor)")
    both.opset_import[0].version = 30
    assert [finding.rule for finding in found(both, "11.4")] == ["opset", "attention-scale"]


def test_a_model_that_inference_refuses_is_still_checked() -> None:
    made = model("z = MatMul (x, w) y = LayerNormalization (z, gain)", w=np.ones((5, 5)), gain=np.ones(5, np.float32))
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.shape_inference.infer_shapes(made, strict_mode=True)
    assert broken(made, "8.5", "layer-normalization") == ["the LayerNormalization"]


def test_too_old_a_version_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"TensorRT 8\.2 is not supported"):
        found(frozen_map(), "8.2")
    assert capabilities(TrtVersion.parse("8.5")).max_opset == 17


# --- the file and the command ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "error"), [(b"", CheckpointError), (b"not a model", CheckpointError), (None, ConfigError)]
)
def test_what_is_no_model_is_refused(data: bytes | None, error: type[Exception], tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(error, match=r"x\.onnx"):
        lint_file(path, TrtVersion.parse("8.6"))


def test_the_command_exits_3_after_errors_only(run_cli: RunCli, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    onnx.save(LAYER_NORM, path)
    clean = run_cli("lint", path, "--trt", "8.6")
    assert clean.code == 0 and f"{path} for TensorRT 8.6: 0 errors, 0 warnings" in clean.out
    wrong = run_cli("lint", path, "--trt", "8.5")
    assert wrong.code == 3 and "error layer-normalization: " in wrong.out and "the LayerNormalization: " in wrong.out
    onnx.save(attention("s = Mul (p, factor)"), path)
    warned = run_cli("lint", path, "--trt", "8.6", "--json")
    report = LintReport.model_validate_json(warned.out)
    assert warned.code == 0 and (report.errors, len(report.findings)) == (0, 1)
    assert json.loads(warned.out)["findings"][0]["rule"] == "attention-scale"


def test_the_command_refuses_what_is_no_version(run_cli: RunCli, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    onnx.save(LAYER_NORM, path)
    assert "expected numbers like 8.6" in only_error(run_cli("lint", path, "--trt", "eight"), 2)
