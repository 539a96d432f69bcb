from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from made_checkpoints import WindowMaps, make
from report_records import engine, machine, profile, remote_profiles
from safetensors.numpy import load_file
from tiny_models import KWARGS, NAME

from eamdeploy import evaluate, inspect
from eamdeploy.artifacts.files import digest_file
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.engines.manifest import DeviceBuild, EngineLayers, FrozenMapLayer, Manifest, manifest_path
from eamdeploy.errors import CheckpointError, ConfigError, EngineError
from eamdeploy.host.model import ModelSpec
from eamdeploy.images.source import ImageSource
from eamdeploy.parity.reference_set import reference_path
from eamdeploy.records.diagnosis import Capability, Diagnosis, Finding
from eamdeploy.stages.analyze import analyze
from eamdeploy.stages.inspect import Inspection
from eamdeploy.vocabulary import Granularity

HEADS = ["blocks.0.attn: [1]", "blocks.1.attn: [0, 1]"]


def details_of(file: Path, kind: str) -> dict[str, Any]:
    found = inspect(file)
    assert (found.file, found.kind) == (str(file), kind)
    assert (found.bytes, found.digest) == (file.stat().st_size, digest_file(file))
    assert Inspection.parse(found.model_dump_json(), "inspection") == found
    return dict(found.details)


def test_checkpoint(eam_checkpoint: Path, tiny_weights: Path) -> None:
    details = details_of(eam_checkpoint, "EAM checkpoint")
    assert (details["model"], details["weights"], details["classes"]) == (NAME, "tiny.safetensors", 10)
    assert (details["image size"], details["attention modules"]) == ([32, 32], 2)
    assert (details["sparsity"], details["bits"], details["quantizer"]) == (0.5, 4, "squared")
    assert details["frozen heads"] == HEADS
    assert details["calibration"] == "24 images of pictures"
    assert details["frozen map bytes"] == -(-17 * 17 * 4 // 8) + -(-2 * 17 * 17 * 4 // 8)
    assert details["weight tensors"] == 32
    assert details["granularity"] == "head" and not {"windows", "window maps", "mask bytes"} & set(details)
    assert 0 < details["weight bytes"] < tiny_weights.stat().st_size


@pytest.mark.parametrize(("granularity", "pieces"), [("row", "rows"), ("entry", "entries")])
@pytest.mark.parametrize("window_maps", [None, "class"])
def test_checkpoint_of_rows_or_entries(
    eam_checkpoint: Path, tmp_path: Path, granularity: Granularity, pieces: str, window_maps: WindowMaps | None
) -> None:
    made = make(checkpoints.load(eam_checkpoint), granularity, window_maps)
    checkpoints.save(made, tmp_path / "x.eam.safetensors")
    details = details_of(tmp_path / "x.eam.safetensors", "EAM checkpoint")
    maps = made.frozen["blocks.1.attn"]
    assert maps.mask is not None
    count, total = maps.mask.sum(), 3 * maps.mask[0].size
    label = f"frozen {pieces}" if window_maps is None else f"frozen {pieces} of every window"
    assert details[label] == [f"blocks.1.attn: {count} of {total} ({count / total:.1%})"]
    assert details[f"heads with frozen {pieces}"] == ["blocks.1.attn: [0, 2]"]
    assert "frozen heads" not in details
    assert details["granularity"] == granularity
    tensors = load_file(tmp_path / "x.eam.safetensors")
    assert details["frozen map bytes"] == tensors["eam.blocks.1.attn.codes"].nbytes
    assert details["mask bytes"] == tensors["eam.blocks.1.attn.mask"].nbytes
    assert details["sparsity"] == made.header.freezing.sparsity


@pytest.mark.parametrize(("window_maps", "n_maps"), [("shared", 1), ("class", 3), ("window", 4)])
def test_checkpoint_of_a_model_with_windows(
    eam_checkpoint: Path, tmp_path: Path, window_maps: WindowMaps, n_maps: int
) -> None:
    made = make(checkpoints.load(eam_checkpoint), "head", window_maps)
    checkpoints.save(made, tmp_path / "x.eam.safetensors")
    details = details_of(tmp_path / "x.eam.safetensors", "EAM checkpoint")
    assert details["window maps"] == window_maps
    assert details["windows"] == [f"blocks.{i}.attn: 4 of 5 tokens, window maps: {n_maps}" for i in range(2)]
    assert details["frozen heads"] == ["blocks.1.attn: [0, 2]"]
    assert details["frozen map bytes"] == -(-2 * n_maps * 25 * 3 // 8)
    assert "mask bytes" not in details


def test_exported_model(eam_model: Path, eam_checkpoint: Path) -> None:
    details = details_of(eam_model, "exported ONNX model")
    assert (details["input"], details["output"], details["classes"]) == ("image ['batch', 3, 32, 32]", "logits", 10)
    assert details["checkpoint"] == digest_file(eam_checkpoint)
    assert details["frozen heads"] == HEADS
    assert (details["opset"], details["nodes"]) == (17, len(onnx.load(eam_model).graph.node))
    assert "2 Softmax" in details["operators"]
    assert (details["integer map constants"], details["integer map bytes"]) == (2, 17 * 17 + 2 * 17)
    twin = details_of(eam_model.with_name("base.onnx"), "exported ONNX model")
    assert "frozen heads" not in twin
    assert (twin["integer map constants"], twin["integer map bytes"]) == (0, 0)


def test_engine_with_its_manifest(eam_engine: Path) -> None:
    details = details_of(eam_engine, "ONNX Runtime engine")
    assert details["threads"] == 1
    assert details["parity"].startswith("max |Δ logit| ")
    assert "session.disable_quant_qdq=1" in details["settings"]


def test_model_of_somebody_else(eam_model: Path, tmp_path: Path) -> None:
    model = onnx.load(eam_model)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    details = details_of(tmp_path / "foreign.onnx", "ONNX model")
    assert "model" not in details and details["classes"] == 10


def test_engine_on_a_board_without_the_package_onnx(eam_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_onnx(name: str, *arguments: Any) -> Any:
        if name == "onnx":
            raise ModuleNotFoundError("No module named 'onnx'", name="onnx")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_onnx)
    details = details_of(eam_engine, "ONNX Runtime engine")
    assert "nodes" not in details and details["frozen heads"] == HEADS


def test_reference_set(eam_model: Path) -> None:
    details = details_of(reference_path(eam_model), "reference set")
    assert details == {
        "images": [16, 32, 32, 3],
        "logits": [16, 10],
        "source": "16 images of pictures",
        "model": digest_file(eam_model),
    }


def test_every_document_is_told_apart(eam_engine: Path, pictures: Path, tiny_weights: Path, tmp_path: Path) -> None:
    assert details_of(manifest_path(eam_engine), "engine manifest")["engine"] == "tiny.ort.onnx"
    evaluate(eam_engine, ImageSource(pictures), threads=1).write(tmp_path / "e.json")
    assert details_of(tmp_path / "e.json", "evaluation")["n_images"] == 24
    spec = ModelSpec(NAME, str(tiny_weights), KWARGS)
    analyze(spec, ImageSource(pictures, limit=2), FreezeOptions(score="entropy")).write(tmp_path / "a.json")
    assert details_of(tmp_path / "a.json", "analysis")["bins"] == 16
    for name, document, kind in (
        ("run.json", {"format": 1, "stages": {}}, "run"),
        ("other.json", {"a": 1}, "JSON document"),
    ):
        (tmp_path / name).write_text(json.dumps(document))
        details_of(tmp_path / name, kind)


def test_profiles_say_how_fast_engines_are(tmp_path: Path) -> None:
    profile([engine("x.onnx", None, 2.0, 1.18)], engine("b.onnx", None, 2.36)).write(tmp_path / "p.json")
    details = details_of(tmp_path / "p.json", "profile")
    assert details["engines"] == [
        "b.onnx: p50 2.36 ms, the baseline",
        "x.onnx: p50 2.00 ms, 1.180× (1.170–1.190) faster",
    ]
    assert (details["machine"], details["threads"], details["batch"]) == ("Made-up CPU, Linux 6.1", 4, 1)


def test_profiles_of_machines_are_told_machine_by_machine(tmp_path: Path) -> None:
    remote_profiles().write(tmp_path / "p.json")
    details = details_of(tmp_path / "p.json", "profiles of machines")
    assert details["ssh://agx.lan:2222 machine"] == "NVIDIA Jetson AGX Orin (made up), Linux 6.1"
    assert details["ssh://nvidia@orin.lan engines"][0] == "out/base.plan: p50 2.73 ms, the baseline"
    assert details["ssh://pi5 failed"] == "ssh://pi5 can't be reached: no route to host"


def test_a_diagnosis_says_what_can_be_done_and_what_lacks(tmp_path: Path) -> None:
    nothing = Finding(missing="not here")
    Diagnosis(
        machine=machine(),
        memory_free_bytes=1,
        onnxruntime=Finding(found="1.23.0"),
        providers=["CPUExecutionProvider"],
        tensorrt=nothing,
        gpu=nothing,
        cuda_python=nothing,
        device=None,
        device_missing=None,
        capabilities=[Capability(name="run ONNX", missing=[]), Capability(name="build-trt", missing=["a GPU"])],
    ).write(tmp_path / "d.json")
    details = details_of(tmp_path / "d.json", "diagnosis")
    assert (details["can"], details["lacks for build-trt"]) == (["run ONNX"], ["a GPU"])


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("x.json", None, ConfigError, r"cannot read \S*x\.json"),
        ("x.json", b"{", CheckpointError, r"x\.json is no JSON"),
        ("x.json", b'{"engines": []}', CheckpointError, r"x\.json is not a valid Profile: machine"),
        ("x.json", b"\xff", CheckpointError, r"x\.json is no JSON"),
        ("x.json", b"[1]", CheckpointError, r"x\.json is none of our documents; expected a JSON object"),
        (
            "x.npz",
            b"version https://git-lfs.github.com/spec/v1",
            CheckpointError,
            r"x\.npz is damaged .*a Git LFS pointer",
        ),
        (
            "x.json",
            b"version https://git-lfs.github.com/spec/v1",
            CheckpointError,
            r"x\.json is no JSON: it is a Git LFS",
        ),
        ("x.safetensors", b"<!DOCTYPE html>", CheckpointError, r"x\.safetensors is damaged .*got a web page"),
        ("x.npz", b"PK", CheckpointError, r"x\.npz is damaged or no reference set"),
        ("x.onnx", b"\x08", EngineError, r"can't load \S*x\.onnx"),
        ("x.safetensors", b"\x08", CheckpointError, r"x\.safetensors is damaged or no safetensors"),
        (
            "x.txt",
            b"",
            ConfigError,
            r"cannot tell what \S*x\.txt is; expected a file that ends in \.safetensors.*\.txt",
        ),
    ],
)
def test_damaged_and_unknown_files_are_named(
    tmp_path: Path, name: str, content: bytes | None, kind: type[Exception], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=message):
        inspect(tmp_path / name)


def test_plain_weights_are_told_what_to_do_with(tiny_weights: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no EAM checkpoint.*eamdeploy freeze"):
        inspect(tiny_weights)


def test_damaged_manifest_is_an_error_and_not_a_model_without_one(eam_engine: Path, tmp_path: Path) -> None:
    shutil.copy(eam_engine, tmp_path / "x.ort.onnx")
    manifest_path(tmp_path / "x.ort.onnx").write_text("{}")
    with pytest.raises(CheckpointError, match=r"x\.ort\.onnx\.json is not a valid Manifest"):
        inspect(tmp_path / "x.ort.onnx")


def test_plan_is_told_from_its_manifest_without_a_gpu(tmp_path: Path) -> None:
    plan = tmp_path / "x.plan"
    plan.write_bytes(b"only TensorRT can read this")
    assert inspect(plan).kind == "TensorRT engine without a manifest"
    layers = EngineLayers(
        layers=7,
        fused_attention=["_gemm_mha_v2_3"],
        frozen_maps=[FrozenMapLayer(frozen_map="a/map", layer="l", type="Half")],
    )
    device = DeviceBuild(
        runtime="10.3.0",
        gpu="Orin",
        compute_capability="8.7",
        version_compatible=False,
        hardware_compatible=False,
        precision="fp16",
        int8=False,
        model_changes=["frozen maps as INT8"],
        device_memory_bytes=8192,
        engine_layers=layers,
        log="x.plan.log",
    )
    manifest = Manifest(
        backend="trt",
        engine=plan.name,
        engine_digest=digest_file(plan),
        engine_bytes=plan.stat().st_size,
        model_digest="sha256:0",
        card=None,
        batch=None,
        settings={},
        threads=1,
        parity=None,
        versions={},
        machine="board",
        created="2026-11-22T00:00:00+00:00",
        device=device,
    )
    manifest.write(manifest_path(plan))
    found = inspect(plan)
    assert found.kind == "TensorRT engine"
    assert found.details["runtime"] == "10.3.0" and found.details["batch"] == "dynamic"
    assert found.details["fused attention"] == ["_gemm_mha_v2_3"]
    assert found.details["frozen maps"] == ["a/map: Half in l"]
    plan.write_bytes(b"another engine")
    with pytest.raises(EngineError, match="describes another engine"):
        inspect(plan)
