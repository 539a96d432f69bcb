from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import onnxruntime
import pytest
from command_line import RunCli
from rich.console import Console

import eamdeploy
from eamdeploy import doctor
from eamdeploy.cli import show
from eamdeploy.devices.base import DeviceState
from eamdeploy.engines.trt.device import Gpu
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.errors import DeviceError, MissingDependency
from eamdeploy.records.diagnosis import Diagnosis, Finding

MODULE = "eamdeploy.stages.doctor"
DESK = DeviceState(kind="cpu", name="a desk's processor")
JETSON = DeviceState(
    kind="jetson",
    name="NVIDIA Jetson Orin Nano",
    software={"JetPack": "6.2"},
    power_mode="15W",
    clocks_locked=False,
    clocks_mhz={"GPU": 918.0},
    temperatures_c={"tj": 50.2},
    throttling=["over-current"],
    warnings=["Clocks are not locked: sudo jetson_clocks."],
)


def lacking(found: Diagnosis) -> dict[str, list[str]]:
    """What is missing for what."""
    return {item.name: item.missing for item in found.capabilities}


def shown(found: Diagnosis) -> str:
    """The table as text."""
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(show.doctor(found))
    return capture.get()


def broken(error: BaseException) -> Callable[..., DeviceState]:
    """What raises `error`, whatever it is asked."""

    def ask(*_: object) -> DeviceState:
        raise error

    return ask


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine with the host's packages, but no GPU, TensorRT or cuda-python."""
    monkeypatch.setattr(f"{MODULE}.find_spec", lambda module: object())
    monkeypatch.setattr(f"{MODULE}.require_gpu", broken(DeviceError("no NVIDIA GPU", hint="Buy one.")))
    monkeypatch.setattr(f"{MODULE}.installed_version", broken(MissingDependency("no TensorRT", hint="pip install it")))
    monkeypatch.setattr(f"{MODULE}.import_cuda", broken(MissingDependency("no cuda-python", hint="pip install that")))
    monkeypatch.setattr(f"{MODULE}.find_jetpack", lambda: None)
    put_device(monkeypatch, lambda: DESK)
    yield monkeypatch


def put_device(monkeypatch: pytest.MonkeyPatch, state: Callable[[], DeviceState]) -> None:
    monkeypatch.setattr(f"{MODULE}.find_device", lambda: SimpleNamespace(state=state))


def test_a_machine_without_a_gpu(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(shutil, "which", lambda program: None)
    found = doctor()
    assert found.machine.versions["eamdeploy"] == eamdeploy.__version__
    assert 0 < found.memory_free_bytes < found.machine.memory_bytes
    assert found.onnxruntime == Finding(found=onnxruntime.__version__)
    assert found.providers == onnxruntime.get_available_providers()
    assert found.tensorrt == Finding(missing="no TensorRT. pip install it")
    assert found.gpu == Finding(missing="no NVIDIA GPU. Buy one.")
    assert (found.device, found.device_missing) == (DESK, None)
    lacks = lacking(found)
    assert lacks["analyze, freeze, pack, export"] == lacks["build-ort"] == lacks["report"] == []
    assert lacks["evaluate and profile ONNX engines"] == lacks["evaluate checkpoints"] == []
    assert lacks["build-trt"][:2] == ["no TensorRT. pip install it", "no NVIDIA GPU. Buy one."]
    assert "no cuda-python" in lacks["build-trt"][2] and "--no-check" in lacks["build-trt"][2]
    assert len(lacks["evaluate and profile TensorRT plans"]) == 3
    assert "no Jetson" in lacks["profile --device jetson"][0]
    assert lacks["profile --device cuda"][0] == "no NVIDIA GPU. Buy one."
    assert "openssh-client" in lacks["profile on other machines"][0]
    text = shown(found)
    assert "cpu (CPUExecutionProvider)" in text, "by the name that build-ort --provider has for it"
    assert "no TensorRT (see above)" in text and "openssh-client" in text


def test_a_jetson_with_everything(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(f"{MODULE}.require_gpu", lambda: Gpu("Orin", "8.7", "12.6"))
    bare.setattr(f"{MODULE}.installed_version", lambda: TrtVersion.parse("10.3.0"))
    bare.setattr(f"{MODULE}.import_cuda", lambda: SimpleNamespace(__name__="cuda.cudart"))
    bare.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")
    put_device(bare, lambda: JETSON)
    found = doctor()
    assert found.device == JETSON and found.tensorrt.found == "10.3.0"
    assert set(map(tuple, lacking(found).values())) == {()}
    text = shown(found)
    for words in (
        "10.3.0",
        "Orin (compute capability 8.7)",
        "JetPack 6.2",
        "15W",
        "GPU 918 MHz, not locked",
        "tj 50 °C",
    ):
        assert words in text
    assert "over-current" in text and "sudo jetson_clocks" in text
    assert Diagnosis.parse(found.model_dump_json(), "doctor") == found


def test_without_the_host_packages(bare: pytest.MonkeyPatch) -> None:
    def spec(module: str) -> object:
        if module == "timm":
            raise ModuleNotFoundError(module)
        return None if module in ("torch", "onnx") else object()

    bare.setattr(f"{MODULE}.find_spec", spec)
    lacks = lacking(doctor())
    expected = ["Not installed: torch, timm, onnx. Get it with: pip install 'eamdeploy[host]'"]
    assert lacks["analyze, freeze, pack, export"] == lacks["evaluate checkpoints"] == expected
    assert lacks["build-trt"][0] == "Not installed: onnx. Get it with: pip install onnx onnx-graphsurgeon"
    assert lacks["report"] == lacks["build-ort"] == []


def test_whatever_is_broken_is_a_part_of_the_answer(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(f"{MODULE}.load_backend", broken(MissingDependency("ONNX Runtime can't be imported: no libgomp")))
    bare.setattr(f"{MODULE}.installed_version", broken(AttributeError("module has no Logger")))
    bare.setattr(f"{MODULE}.require_gpu", broken(SystemExit(3)))
    put_device(bare, broken(DeviceError("nvpmodel failed")))
    found = doctor()
    assert found.onnxruntime.missing == "ONNX Runtime can't be imported: no libgomp" and found.providers == []
    assert found.tensorrt.missing == "AttributeError: module has no Logger"
    assert found.gpu.missing == "SystemExit: 3"
    assert (found.device, found.device_missing) == (None, "nvpmodel failed")
    assert lacking(found)["build-ort"] == [found.onnxruntime.missing]
    assert "nvpmodel failed" in shown(found)


def test_too_old_a_tensorrt_is_missing(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(f"{MODULE}.installed_version", lambda: TrtVersion.parse("8.2.1"))
    assert "8.5" in str(doctor().tensorrt.missing)


def test_what_hangs_holds_up_nothing_else(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(f"{MODULE}.require_gpu", lambda: time.sleep(60))
    bare.setattr(f"{MODULE}.installed_version", lambda: time.sleep(60))
    start_s = time.monotonic()
    found = doctor(patience_s=2.0)
    assert time.monotonic() - start_s < 20
    assert "does not answer" in str(found.gpu.missing) and "does not answer" in str(found.tensorrt.missing)
    assert found.onnxruntime.found and found.cuda_python.missing == "no cuda-python. pip install that"


@pytest.mark.parametrize(("instructions", "saturates"), [("x86_64: avx2", True), ("x86_64: avx2 avx_vnni", False)])
def test_it_names_the_instruction_sets_and_what_they_mean_for_int8(
    instructions: str, saturates: bool, bare: pytest.MonkeyPatch
) -> None:
    bare.setattr("eamdeploy.devices.machine.instruction_sets", lambda: instructions)
    found = doctor()
    assert found.machine.instructions == instructions and found.int8_saturates is saturates
    text = shown(found)
    assert instructions in text and ("products of INT8 saturate here" in text) is saturates


def test_the_command_prints_a_table_or_json_and_never_fails(run_cli: RunCli, bare: pytest.MonkeyPatch) -> None:
    table = run_cli("doctor")
    assert table.code == 0 and table.err == "" and "What can be done here" in table.out
    document = run_cli("doctor", "--json")
    assert document.code == 0 and "What can be done here" in document.err
    assert Diagnosis.parse(document.out, "stdout").gpu.missing == "no NVIDIA GPU. Buy one."
