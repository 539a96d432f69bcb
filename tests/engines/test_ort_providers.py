"""Execution providers. What is not installed is a fake, `FakeRuntime`; the last tests need onnxruntime-openvino."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np
import onnx
import onnxruntime
import pytest
from engine_models import build, make_frozen_model
from rich.console import Console

from eamdeploy import profile
from eamdeploy.artifacts.seal import SEAL
from eamdeploy.cli import build as cli
from eamdeploy.cli import show_profile
from eamdeploy.devices.base import Device
from eamdeploy.devices.registry import find_device
from eamdeploy.engines.manifest import Manifest, manifest_path
from eamdeploy.engines.ort.providers import (
    CPU,
    PROVIDERS,
    chosen_options,
    installed_providers,
    require_placed,
    require_provider,
)
from eamdeploy.engines.ort.runner import OrtRunner
from eamdeploy.engines.registry import open_runner, runs_on_gpu
from eamdeploy.errors import DeviceError, EamDeployError, EngineError, MissingDependency
from eamdeploy.profiling.timing import Schedule
from eamdeploy.reporting.records.measurements import runtime_name
from eamdeploy.stages.profile import Extras
from eamdeploy.vocabulary import ProviderName

FROZEN = make_frozen_model()
IMAGES = np.random.default_rng(0).uniform(-2, 2, (2, 3, 8, 8)).astype(np.float32)
OTHERS: list[ProviderName] = [name for name in PROVIDERS if name != "cpu"]
COMPUTING = {"Conv", "MatMul"}  # operators of the model that compute with images
CUDA, OPENVINO, XNNPACK = (PROVIDERS[name].ort_name for name in ("cuda", "openvino", "xnnpack"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "eam.onnx"
    onnx.save(FROZEN.to_onnx(), path)
    return path


class FakeRuntime:
    """An ONNX Runtime that claims to have every provider, and computes on the CPU.

    Attributes:
        starts: whether a provider is there after its session was made.
        place: which provider runs an operator, given the one that was asked for.
        asked: providers, options and `enable_fallback` of every session.
    """

    def __init__(self) -> None:
        self.starts = True
        self.place: Callable[[str, str], str] = lambda wanted, operator: wanted
        self.tells = True
        self.asked: list[SimpleNamespace] = []
        self.make = onnxruntime.InferenceSession

    def __call__(self, source: Any, options: Any, providers: Any, enable_fallback: int) -> FakeSession:
        self.asked.append(SimpleNamespace(providers=providers, options=options, enable_fallback=enable_fallback))
        names = [each if isinstance(each, str) else each[0] for each in providers]
        session = self.make(source, options, providers=[CPU])
        return (TellingSession if self.tells else FakeSession)(self, session, names)


class FakeSession:
    """A session on the CPU that names other providers, in its profile too."""

    def __init__(self, runtime: FakeRuntime, session: Any, names: list[str]) -> None:
        self.runtime, self.session, self.names = runtime, session, names
        self.run, self.get_inputs, self.get_outputs = session.run, session.get_inputs, session.get_outputs
        self.get_modelmeta = session.get_modelmeta

    def get_providers(self) -> list[str]:
        return [*self.names, CPU] if self.runtime.starts else [CPU]

    def end_profiling(self) -> str:
        file = Path(self.session.end_profiling())
        events = json.loads(file.read_text())
        for event in events:
            if event["cat"] == "Node":
                event["args"]["provider"] = self.runtime.place(self.names[0], event["args"]["op_name"])
        file.write_text(json.dumps(events))
        return str(file)


class TellingSession(FakeSession):
    """One of ONNX Runtime from 1.24, which tells what runs where."""

    def get_provider_graph_assignment_info(self) -> list[Any]:
        operators = [node.op_type for node in FROZEN.to_onnx().graph.node]
        return [
            SimpleNamespace(
                ep_name=self.runtime.place(self.names[0], operator),
                get_nodes=lambda operator=operator: [SimpleNamespace(op_type=operator)],
            )
            for operator in operators
        ]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    runtime = FakeRuntime()
    monkeypatch.setattr(onnxruntime, "InferenceSession", runtime)
    names = [provider.ort_name for provider in PROVIDERS.values()]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    return runtime


def load(model: Path, provider: ProviderName, settings: dict[str, str] | None = None, threads: int = 2) -> OrtRunner:
    chosen = dict(PROVIDERS[provider].settings) if settings is None else settings
    return OrtRunner(model, threads=threads, settings=chosen, provider=provider)


# --- the table -------------------------------------------------------------------------------------------------------


def test_every_name_of_the_command_line_is_in_the_table() -> None:
    assert get_type_hints(cli.build_ort)["provider"] == ProviderName | None
    assert set(get_args(ProviderName)) == PROVIDERS.keys()
    assert len({provider.ort_name for provider in PROVIDERS.values()}) == len(PROVIDERS)


@pytest.mark.parametrize("name", PROVIDERS)
def test_onnx_runtime_knows_the_provider_and_its_settings(name: ProviderName) -> None:
    provider = PROVIDERS[name]
    assert provider.ort_name in onnxruntime.get_all_providers() or name == "acl", "1.32 does not know ACL any more"
    assert set(provider.beside) <= set(onnxruntime.get_all_providers())
    assert provider.settings["graph_optimization_level"] in ("disable", "basic", "all")


@pytest.mark.parametrize("name", OTHERS)
def test_a_provider_that_is_not_installed_is_refused_and_how_to_get_it_is_said(
    name: ProviderName, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["AzureExecutionProvider", CPU])
    assert installed_providers() == ["cpu"] and require_provider("cpu") is PROVIDERS["cpu"]
    with pytest.raises(MissingDependency, match=f"has no provider {name}.*got cpu") as refused:
        load(model, name)
    assert PROVIDERS[name].get in str(refused.value)
    assert "uninstall onnxruntime" in str(refused.value) or f"with --use_{name}" in str(refused.value)


def test_openvinos_engine_computes_fp32_in_the_threads_that_were_asked_for() -> None:
    provider = PROVIDERS["openvino"]
    options = provider.with_threads(provider.options, 3)
    assert options["device_type"] == "CPU" and provider.own_threads
    assert json.loads(options["load_config"])["CPU"] == {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "NUM_STREAMS": "1",
        "ENABLE_CPU_PINNING": "NO",
        "INFERENCE_NUM_THREADS": "3",
    }


# --- sessions, of a fake ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tells", [True, False], ids=["1.24", "older"])
@pytest.mark.parametrize("name", OTHERS)
def test_the_provider_gets_its_options_and_threads_and_nothing_falls_back(
    name: ProviderName, tells: bool, model: Path, fake: FakeRuntime
) -> None:
    fake.tells = tells
    provider = PROVIDERS[name]
    if provider.takes == "all":
        with pytest.raises(EngineError, match="disabled fallback to the CPU EP"):
            load(model, name)  # the fake computes on the CPU, and ONNX Runtime itself refuses that
        assert fake.asked[0].options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    else:
        with load(model, name) as runner:
            np.testing.assert_allclose(runner.infer(IMAGES), FROZEN.forward(IMAGES), atol=1e-5)
            shown = {key: value for key, value in runner.settings.items() if key.startswith("provider.")}
        assert shown == {f"provider.{key}": value for key, value in provider.options.items()}
    asked = fake.asked[0]
    assert asked.providers == [(provider.ort_name, provider.with_threads(provider.options, 2)), *provider.beside]
    assert asked.enable_fallback == 0
    assert asked.options.intra_op_num_threads == (1 if provider.own_threads else 2)
    for key, value in provider.settings.items():
        if key != "graph_optimization_level":
            assert asked.options.get_session_config_entry(key) == value


@pytest.mark.parametrize("name", OTHERS)
def test_a_provider_that_did_not_start_is_refused(
    name: ProviderName, model: Path, fake: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eamdeploy.engines.ort.runner.PROOF", {takes: {} for takes in ("all", "arithmetic", "some")})
    fake.starts = False
    kind = DeviceError if PROVIDERS[name].on_gpu else EngineError
    with pytest.raises(EamDeployError, match=rf"{name} did not start for \S*eam\.onnx.*got {CPU}") as refused:
        load(model, name)
    assert type(refused.value) is kind


@pytest.mark.parametrize("tells", [True, False], ids=["1.24", "older"])
def test_what_computes_must_run_on_a_gpus_provider_and_shapes_need_not(
    tells: bool, model: Path, fake: FakeRuntime
) -> None:
    fake.tells = tells
    fake.place = lambda wanted, operator: wanted if operator in COMPUTING else CPU
    load(model, "cuda").close()
    fake.place = lambda wanted, operator: CPU if operator == "MatMul" else wanted
    with pytest.raises(EngineError, match=rf"cuda does not run \S*eam\.onnx; expected all that .*got MatMul on {CPU}"):
        load(model, "cuda")
    fake.place = lambda wanted, operator: CUDA if operator == "MatMul" else wanted
    with pytest.raises(EngineError, match=f"tensorrt does not run .*got MatMul on {CUDA}"):
        load(model, "tensorrt")


@pytest.mark.parametrize("tells", [True, False], ids=["1.24", "older"])
@pytest.mark.parametrize("name", ["xnnpack", "acl"])
def test_a_provider_for_the_processor_may_leave_something_to_it_but_not_everything(
    name: ProviderName, tells: bool, model: Path, fake: FakeRuntime
) -> None:
    fake.tells = tells
    fake.place = lambda wanted, operator: wanted if operator == "Conv" else CPU
    load(model, name).close()
    fake.place = lambda wanted, operator: CPU
    with pytest.raises(EngineError, match=f"{name} does not run .*expected something on .*Conv on {CPU}, MatMul on"):
        load(model, name)


def test_a_graph_that_became_one_node_counts_as_taken() -> None:
    require_placed("tensorrt", [(PROVIDERS["tensorrt"].ort_name, "TRTKernel_graph_main_1")], "x")
    with pytest.raises(EngineError, match="got nothing"):
        require_placed("tensorrt", [(CPU, "Shape")], "x")


def test_the_time_of_a_node_on_a_gpu_is_not_told(model: Path, fake: FakeRuntime) -> None:
    with load(model, "cuda") as runner, pytest.raises(EngineError, match="only queues them"):
        runner.layer_times(IMAGES, 1)
    with load(model, "xnnpack") as runner:
        assert all(ms >= 0 for ms in runner.layer_times(IMAGES, 1).values())


# --- manifests -------------------------------------------------------------------------------------------------------


def test_an_engine_is_opened_on_the_provider_that_it_was_built_for(model: Path, fake: FakeRuntime) -> None:
    engine = model.with_name("eam.ort.onnx")
    manifest = build(model, engine, threads=2, reference=FROZEN.reference(n=5), provider="xnnpack")
    assert manifest.provider == "xnnpack" and manifest.settings["session.intra_op.allow_spinning"] == "0"
    assert manifest.parity is not None and manifest.parity.tolerance == "f32-engine"
    assert Manifest.read(manifest_path(engine)) == manifest
    with open_runner(engine, threads=3) as runner:
        assert dict(runner.settings) == manifest.settings
    assert fake.asked[-1].providers == [(XNNPACK, {"intra_op_num_threads": "3"})]
    assert not runs_on_gpu(engine) and not runs_on_gpu(model)
    build(model, engine, threads=2, reference=None, provider="cuda")
    assert runs_on_gpu(engine) and runs_on_gpu(Path("x.plan"))


def test_a_manifest_without_a_provider_is_an_older_one_for_the_cpu(model: Path) -> None:
    engine = model.with_name("eam.ort.onnx")
    build(model, engine, threads=1, reference=None)
    path = manifest_path(engine)
    newer = ("provider", SEAL)
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in newer}))
    assert Manifest.read(path).provider == "cpu"
    with open_runner(engine) as runner:
        assert runner.infer(IMAGES).shape == (2, 5)


def test_a_manifest_gives_known_options_other_values_and_no_others(model: Path, fake: FakeRuntime) -> None:
    load(model, "cuda", {"provider.use_tf32": "1"}).close()
    assert fake.asked[-1].providers == [(CUDA, {"use_tf32": "1"})]
    refused: tuple[tuple[ProviderName, str], ...] = (("tensorrt", "trt_extra_plugin_lib_paths"), ("cpu", "anything"))
    for name, wrong in refused:
        with pytest.raises(EngineError, match=f"engine x has options .* provider {name}; .*got {wrong}"):
            chosen_options(name, {f"provider.{wrong}": "evil.so", "session.x": "1"}, "x")


@pytest.mark.parametrize(("name", "times"), [("cuda", 1), ("tensorrt", 1), ("cpu", 0), ("xnnpack", 0)])
def test_libraries_beside_onnx_runtime_are_loaded_for_a_gpu_alone_and_nothing_is_printed(
    name: ProviderName,
    times: int,
    model: Path,
    fake: FakeRuntime,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before: list[int] = []

    def preload() -> None:
        before.append(len(fake.asked))
        print("Failed to load libcublas.so")  # noqa: T201

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload, raising=False)
    load(model, name).close()
    assert before == [0] * times  # before any session was made
    assert capsys.readouterr().out == ""
    monkeypatch.delattr(onnxruntime, "preload_dlls")
    load(model, name).close()  # as before 1.21


@pytest.mark.parametrize(("name", "on_gpu"), [("xnnpack", False), ("cuda", True)])
def test_profile_says_what_an_engine_ran_on_and_looks_for_a_gpu_only_where_one_needs_it(
    name: ProviderName, on_gpu: bool, model: Path, fake: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    device = find_device(gpu=False)

    def find(*, gpu: bool) -> Device:
        asked.append(gpu)
        return device

    monkeypatch.setattr("eamdeploy.stages.profile.find_device", find)
    engine = model.with_name("eam.ort.onnx")
    build(model, engine, threads=1, reference=None, provider=name)
    schedule = Schedule(warmup_ms=0, min_seconds=0, min_runs=2, sittings=1)
    result = profile([engine], threads=1, batch=1, schedule=schedule, extras=Extras(fresh=False, power=False))
    assert asked == [on_gpu]
    assert result.engines[0].provider == name
    console = Console(width=200, color_system=None)
    with console.capture() as shown:
        console.print(show_profile.profile(result))
    assert f"eam.ort.onnx ({name}) " in shown.get()
    assert runtime_name("ort", name) == f"ONNX Runtime ({name})" and runtime_name("ort", "cpu") == "ONNX Runtime"


# --- OpenVINO itself -------------------------------------------------------------------------------------------------

needs_openvino = pytest.mark.skipif(
    OPENVINO not in onnxruntime.get_available_providers(),
    reason="the installed ONNX Runtime has no OpenVINO: pip uninstall onnxruntime && pip install onnxruntime-openvino",
)


@needs_openvino
@pytest.mark.parametrize("batch", ["batch", 2])
def test_openvino_runs_every_node_at_fp32s_noise(model: Path, batch: int | str) -> None:
    onnx.save(FROZEN.to_onnx(batch), model)
    engine = model.with_name("eam.ov.onnx")
    build(model, engine, threads=1, reference=FROZEN.reference(n=5), provider="openvino")
    with open_runner(engine) as runner:
        np.testing.assert_allclose(runner.infer(IMAGES), FROZEN.forward(IMAGES), atol=1e-5)
        (layer,) = runner.layer_times(IMAGES, 2)
    assert OPENVINO in layer


@needs_openvino
def test_openvino_that_does_not_start_is_refused_though_onnx_runtime_goes_on(model: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    silent = onnxruntime.InferenceSession(str(model), options, providers=[(OPENVINO, {"device_type": "NPU"})])
    if OPENVINO in silent.get_providers():
        pytest.skip("this machine has an NPU")
    assert silent.get_providers() == [CPU], "ONNX Runtime runs it on the CPU without a word"
    with pytest.raises(EngineError, match=r"explicitly disabled.*build with --provider cpu\."):
        load(model, "openvino", {"provider.device_type": "NPU"})
