from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import fake_tensorrt
import pytest

from eamdeploy.devices.provenance import machine_summary, package_versions
from eamdeploy.engines.registry import backend_of, load_backend, open_runner
from eamdeploy.errors import ConfigError, ExitCode, MissingDependency


@pytest.mark.parametrize(
    ("name", "backend"), [("x.onnx", "ort"), ("x.ort.onnx", "ort"), ("X.ONNX", "ort"), ("x.plan", "trt")]
)
def test_backend_follows_the_name(name: str, backend: str) -> None:
    assert backend_of(Path(name)) == backend


@pytest.mark.parametrize("name", ["x.safetensors", "x", "x.onnx.json"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"\.onnx"):
        backend_of(Path(name))


def test_tensorrt_engine_without_tensorrt_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    (tmp_path / "x.plan").write_bytes(b"plan")
    with pytest.raises(MissingDependency, match=r"TensorRT is not installed.*pip install tensorrt") as caught:
        open_runner(tmp_path / "x.plan", threads=1)
    assert caught.value.exit_code == ExitCode.UNAVAILABLE


def test_tensorrt_without_cuda_python_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt.install(fake_tensorrt.make_machine(), monkeypatch)
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=r"cuda-python.*pip install"):
        load_backend("trt")


@pytest.mark.parametrize(("instructions", "exact"), [("x86_64: avx2", True), ("x86_64: avx512_vnni", False)])
def test_models_of_others_get_exact_products_where_they_would_saturate(
    instructions: str, exact: bool, eam_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine of ours keeps what its manifest says."""
    monkeypatch.setattr("eamdeploy.engines.registry.instruction_sets", lambda: instructions)
    shutil.copy(eam_engine, tmp_path / "x.onnx")
    with open_runner(tmp_path / "x.onnx", 1) as foreign, open_runner(eam_engine, 1) as ours:
        assert ("session.x64quantprecision" in foreign.settings) is exact
        assert "session.x64quantprecision" not in ours.settings


def test_missing_onnxruntime_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency, match="onnxruntime"):
        load_backend("ort")


def test_no_runtime_is_imported_before_an_engine_is_opened() -> None:
    code = (
        "import sys, eamdeploy.engines.registry, eamdeploy.stages.profile, eamdeploy.parity.gate\n"
        "sys.exit(','.join({'onnxruntime', 'onnx', 'torch', 'timm', 'tensorrt'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_versions_hold_what_is_installed_and_nothing_else() -> None:
    versions = package_versions()
    assert versions["python"].startswith("3.")
    assert {"numpy", "onnxruntime"} <= versions.keys()
    assert all(versions.values())
    assert "\n" not in machine_summary()
