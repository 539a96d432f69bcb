from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest
from fake_nvml import FakeGpu

from eamdeploy.devices.cuda import CudaDevice
from eamdeploy.errors import DeviceError, ExitCode, MissingDependency


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = FakeGpu()
    monkeypatch.setitem(sys.modules, "pynvml", gpu.module())
    for variable in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(variable, raising=False)
    return gpu


def test_state_of_a_gpu(gpu: FakeGpu) -> None:
    device = CudaDevice()
    state = device.state()
    assert (device.kind, state.kind, state.name) == ("cuda", "cuda", "NVIDIA L4")
    assert state.software == {"driver": "550.54.15", "CUDA": "12.4"}
    assert (state.power_mode, state.power_mode_id, state.clocks_locked) == ("72 W", None, None)
    assert state.clocks_mhz == {"GPU": 2040, "memory": 6251}
    assert state.temperatures_c == {"GPU": 43}
    assert state.throttling == state.warnings == []
    assert gpu.opened == 0


@pytest.mark.parametrize(
    ("bits", "reasons"),
    [
        (0, []),
        (0x1, []),
        (0x4, ["power cap"]),
        (0x1 | 0x20 | 0x40, ["temperature, slowed down by the driver", "temperature, slowed down by the hardware"]),
        (0x400, ["reason 0x400"]),
    ],
)
@pytest.mark.parametrize("old_driver", [False, True])
def test_throttling_names_every_reason_but_idleness(
    gpu: FakeGpu, bits: int, reasons: list[str], old_driver: bool
) -> None:
    gpu.answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = bits
    gpu.answers["nvmlDeviceGetCurrentClocksEventReasons"] = "NVMLError_FunctionNotFound" if old_driver else bits
    assert CudaDevice().state().throttling == reasons


@pytest.mark.parametrize("error", ["NVMLError_NotSupported", "NVMLError_FunctionNotFound", "NVMLError_NoPermission"])
def test_what_a_gpu_does_not_tell_is_left_out(gpu: FakeGpu, error: str) -> None:
    for name in gpu.answers:
        gpu.answers[name] = error
    gpu.answers["nvmlDeviceGetCount"] = 1
    state = CudaDevice().state()
    assert (state.name, state.power_mode, state.software) == ("NVIDIA GPU", None, {})
    assert state.clocks_mhz == state.temperatures_c == {} and state.throttling == []
    assert CudaDevice().sensor(0.1) is None


def test_power_is_the_energy_counters(gpu: FakeGpu) -> None:
    start = time.monotonic()
    gpu.answers["nvmlDeviceGetTotalEnergyConsumption"] = lambda: 5_000_000 + round((time.monotonic() - start) * 40_000)
    sensor = CudaDevice().sensor(0.05)
    assert sensor is not None and (sensor.source, sensor.total_rails) == ("NVML", ("GPU",))
    with sensor:
        assert gpu.opened == 1
        time.sleep(0.3)
        readings = sensor.readings()
    assert gpu.opened == 0
    assert readings[0].power_mw == {}, "a counter tells no power at the first look"
    assert len(readings) >= 3
    for reading in readings[1:]:
        assert reading.power_mw["GPU"] == pytest.approx(40_000, rel=0.2)
        assert reading.memory_bytes == {"gpu": 2 << 30}


def test_without_a_counter_power_is_what_nvml_tells(gpu: FakeGpu) -> None:
    gpu.answers["nvmlDeviceGetTotalEnergyConsumption"] = "NVMLError_NotSupported"
    gpu.answers["nvmlDeviceGetMemoryInfo"] = "NVMLError_NotSupported"
    sensor = CudaDevice().sensor(0.01)
    assert sensor is not None
    with sensor:
        first = sensor.readings()[0]
    assert (first.power_mw, first.memory_bytes) == ({"GPU": 31000}, {})


def test_gpu_that_tells_memory_alone_has_no_total(gpu: FakeGpu) -> None:
    for name in ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"):
        gpu.answers[name] = "NVMLError_NotSupported"
    sensor = CudaDevice().sensor(0.01)
    assert sensor is not None and sensor.total_rails == ()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


def test_gpu_that_is_lost_meanwhile_is_noted_and_the_readings_before_are_kept(gpu: FakeGpu) -> None:
    device = CudaDevice()
    sensor = device.sensor(0.01)
    assert sensor is not None
    with sensor:
        kept = len(sensor.readings())
        for name in gpu.answers:
            gpu.answers[name] = "NVMLError_GpuIsLost"
        wait_for(lambda: sensor.skipped >= 3)
        assert len(sensor.readings()) >= kept >= 1
    assert sensor.notes.skipped_example == "nvmlDeviceGetTotalEnergyConsumption: GPU is lost"
    assert gpu.opened == 0


def test_gpu_that_is_lost_has_a_state_that_says_so(gpu: FakeGpu) -> None:
    device = CudaDevice()
    for name in gpu.answers:
        gpu.answers[name] = "NVMLError_GpuIsLost"
    gpu.answers["nvmlDeviceGetCount"] = 1
    state = device.state()
    assert (state.name, state.power_mode, state.clocks_mhz) == ("NVIDIA GPU", None, {})
    (warning,) = state.warnings
    assert warning.startswith("the NVIDIA driver did not answer: nvmlDeviceGetEnforcedPowerLimit: GPU is lost; nvml")
    with pytest.raises(DeviceError, match=r"does not answer any more: nvml.*GPU is lost"):
        device.sensor(0.1)
    assert gpu.opened == 0


@pytest.mark.parametrize(
    ("function", "missing"),
    [
        ("nvmlDeviceGetTemperature", "temperatures_c"),
        ("nvmlDeviceGetClockInfo", "clocks_mhz"),
        ("nvmlDeviceGetEnforcedPowerLimit", "power_mode"),
        ("nvmlSystemGetDriverVersion", "software"),
    ],
)
def test_question_that_fails_takes_no_other_answer_away(gpu: FakeGpu, function: str, missing: str) -> None:
    whole = CudaDevice().state().model_dump()
    gpu.answers[function] = "NVMLError_InvalidArgument"
    state = CudaDevice().state().model_dump()
    assert {key for key in whole if whole[key] != state[key]} == {missing, "warnings"}
    assert state["warnings"][0].startswith(f"the NVIDIA driver did not answer: {function}: Invalid Argument")


def test_counter_that_fails_meanwhile_leaves_power_out_and_keeps_the_memory(gpu: FakeGpu) -> None:
    """And the power that NVML tells directly, which is another quantity, does not take its place."""
    start = time.monotonic()
    counter = lambda: 5_000_000 + round((time.monotonic() - start) * 40_000)  # noqa: E731
    gpu.answers["nvmlDeviceGetTotalEnergyConsumption"] = counter
    sensor = CudaDevice().sensor(0.02)
    assert sensor is not None
    with sensor:
        wait_for(lambda: "GPU" in sensor.readings()[-1].power_mw)
        gpu.answers["nvmlDeviceGetTotalEnergyConsumption"] = "NVMLError_InvalidArgument"
        wait_for(lambda: sensor.notes.left_out >= 2)
        assert sensor.readings()[-1].power_mw == {}
        assert sensor.readings()[-1].memory_bytes == {"gpu": 2 << 30}
        gpu.answers["nvmlDeviceGetTotalEnergyConsumption"] = counter
        failed = len(sensor.readings())
        wait_for(lambda: "GPU" in sensor.readings()[-1].power_mw)
        powers = [reading.power_mw.get("GPU") for reading in sensor.readings()[failed:]]
    assert sensor.notes.left_out_example == "nvmlDeviceGetTotalEnergyConsumption: Invalid Argument"
    assert sensor.total_rails == ("GPU",) and sensor.notes.failure is None
    assert powers[-1] == pytest.approx(40_000, rel=0.5), "of the time after the gap alone"


def test_memory_that_fails_keeps_the_power(gpu: FakeGpu) -> None:
    gpu.answers["nvmlDeviceGetTotalEnergyConsumption"] = "NVMLError_NotSupported"
    gpu.answers["nvmlDeviceGetMemoryInfo"] = "NVMLError_InvalidArgument"
    sensor = CudaDevice().sensor(0.01)
    assert sensor is not None
    with sensor:
        first = sensor.readings()[0]
    assert (first.power_mw, first.memory_bytes) == ({"GPU": 31000}, {})
    assert sensor.notes.left_out_example == "nvmlDeviceGetMemoryInfo: Invalid Argument"


def test_driver_that_can_not_be_closed_takes_nothing_away(gpu: FakeGpu) -> None:
    device = CudaDevice()
    sensor = device.sensor(0.01)
    assert sensor is not None
    with sensor:
        gpu.opened = 0  # what nvmlShutdown then answers with an error
        wait_for(lambda: sensor.skipped >= 1)
    assert sensor.notes.failure is None and sensor.readings()


@pytest.mark.parametrize("error", ["NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded"])
def test_no_driver_is_a_device_error(gpu: FakeGpu, error: str) -> None:
    gpu.init_error = error
    with pytest.raises(
        DeviceError, match=r"no NVIDIA GPU.*(Library Not Found|Driver Not Loaded).*nvidia-smi"
    ) as caught:
        CudaDevice()
    assert caught.value.exit_code == ExitCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("visible", "reason"),
    [("3", "Invalid Argument"), ("", "hides all"), ("-1", "hides all"), ("NoDevFiles", "hides all"), ("GPU-7", "Not")],
)
def test_no_visible_gpu_is_a_device_error(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, visible: str, reason: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(DeviceError, match=f"no NVIDIA GPU.*{reason}"):
        CudaDevice()
    assert gpu.opened == 0


@pytest.mark.parametrize(
    ("visible", "order", "warns"),
    [(None, None, True), ("1", None, True), ("1,0", "PCI_BUS_ID", False), ("GPU-4b1", None, False)],
)
def test_which_of_several_gpus(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, visible: str | None, order: str | None, warns: bool
) -> None:
    gpu.answers["nvmlDeviceGetCount"] = 2
    gpu.uuids = {"GPU-4b1": 1}
    for variable, value in {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": order}.items():
        if value is not None:
            monkeypatch.setenv(variable, value)
    warnings = CudaDevice().state().warnings
    assert bool(warnings) is warns
    assert not warns or "there are 2 GPUs" in warnings[0]


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MissingDependency, match=r"nvidia-ml-py.*eamdeploy\[cuda\]"):
        CudaDevice()


def test_the_fake_has_nothing_that_the_real_module_lacks() -> None:
    real = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    fake = FakeGpu().module()
    names = [name for name in vars(fake) if name.lower().startswith("nvml")]
    assert names and [name for name in names if not hasattr(real, name)] == []
    for name in ("NVML_TEMPERATURE_GPU", "NVML_CLOCK_SM", "NVML_CLOCK_MEM"):
        assert getattr(real, name) == getattr(fake, name)
    for name in names:
        error = getattr(fake, name)
        if isinstance(error, type) and error is not fake.NVMLError:
            theirs, ours = getattr(real, name)(), error()
            assert isinstance(theirs, real.NVMLError) and (theirs.value, str(theirs)) == (ours.value, str(ours))
