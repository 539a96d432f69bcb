"""A model, and engines built of it by a fake TensorRT, for tests of everything around the builder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import fake_tensorrt
import onnx
import pytest
from engine_models import make_frozen_model
from onnx import helper

from eamdeploy.engines.manifest import Manifest
from eamdeploy.engines.trt.request import TrtOptions
from eamdeploy.parity.reference_set import reference_path
from eamdeploy.stages.build_trt import build_trt

FROZEN = make_frozen_model()


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with a name for every node, as exporters write them."""
    for node in model.graph.node:
        node.name = f"/{node.op_type}_{hashlib.sha256(node.output[0].encode()).hexdigest()[:4]}/{node.output[0]}"
    return model


def with_softmax(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with LayerNorm (decomposed) and softmax after its logits, so that precision has something to keep."""
    graph = model.graph
    graph.node[-1].output[0] = "raw"
    constants = {"two": 2.0, "epsilon": 1e-5}
    for name, value in constants.items():
        graph.initializer.append(helper.make_tensor(name, onnx.TensorProto.FLOAT, [], [value]))
    nodes: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("ReduceMean", ["raw"], "mean", {"axes": [-1]}),
        ("Sub", ["raw", "mean"], "centred", {}),
        ("Pow", ["centred", "two"], "square", {}),
        ("ReduceMean", ["square"], "variance", {"axes": [-1]}),
        ("Add", ["variance", "epsilon"], "shifted", {}),
        ("Sqrt", ["shifted"], "deviation", {}),
        ("Div", ["centred", "deviation"], "normal", {}),
        ("Softmax", ["normal"], "logits", {"axis": -1}),
    ]
    graph.node.extend(helper.make_node(op, inputs, [output], **more) for op, inputs, output, more in nodes)
    onnx.checker.check_model(model, full_check=True)
    return model


def with_int8_activations(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with Q/DQ in front of its last product."""
    graph = model.graph
    graph.initializer.extend(
        [
            helper.make_tensor("q_scale", onnx.TensorProto.FLOAT, [], [0.5]),
            helper.make_tensor("q_zero", onnx.TensorProto.INT8, [], [0]),
        ]
    )
    graph.node[-1].input[0] = "restored"
    last = len(graph.node) - 1
    graph.node.insert(last, helper.make_node("QuantizeLinear", ["pooled", "q_scale", "q_zero"], ["q"]))
    graph.node.insert(last + 1, helper.make_node("DequantizeLinear", ["q", "q_scale", "q_zero"], ["restored"]))
    return model


class Workshop:
    """A folder with a model and its reference set, on a machine with a fake TensorRT."""

    def __init__(self, folder: Path, machine: fake_tensorrt.Machine) -> None:
        self.machine = machine
        self.model, self.engine = folder / "eam.onnx", folder / "eam.plan"
        self.notes: list[str] = []
        self.save(named(FROZEN.to_onnx()))
        FROZEN.reference().save(reference_path(self.model))

    def save(self, model: onnx.ModelProto) -> None:
        onnx.save(model, self.model)

    def build(self, options: TrtOptions = TrtOptions(), **more: Any) -> Manifest:  # noqa: B008
        return build_trt(self.model, self.engine, options, observer=self, **more)

    def asked(self) -> dict[str, Any]:
        """What the builder of the engine was asked."""
        return fake_tensorrt.read_plan(self.engine.read_bytes())[0]

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, what: str, done: int, total: int) -> None:
        raise AssertionError(f"no progress to tell: {what} {done} {total}")


def make_workshop(folder: Path, monkeypatch: pytest.MonkeyPatch, generation: str = "10.3", **machine: Any) -> Workshop:
    """A workshop; this process runs on its machine until the test ends."""
    made = fake_tensorrt.make_machine(generation, **machine)
    fake_tensorrt.install(made, monkeypatch)
    return Workshop(folder, made)
