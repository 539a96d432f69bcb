"""Records as the stages write them, made up, for tests of the report: nothing here was measured.

`write_rich_set` writes one of everything: a model with two frozen variants and their unfrozen twin, measured on two
machines, a TensorRT engine with timed layers, and everything that a report must warn of.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eamdeploy.artifacts.card import Freezing, ModelCard, Preprocessing
from eamdeploy.artifacts.records import Record
from eamdeploy.devices.base import DeviceState
from eamdeploy.devices.machine import Machine
from eamdeploy.eam.analysis import Analysis
from eamdeploy.eam.records import AttentionShape, Calibration
from eamdeploy.engines.manifest import DeviceBuild, EngineLayers, EngineSize, FrozenMapLayer, Manifest
from eamdeploy.engines.runner import LatencySplit
from eamdeploy.parity.gate import ParityReport
from eamdeploy.profiling.fresh_process import ColdStart, Memory
from eamdeploy.profiling.power import Power
from eamdeploy.profiling.streams import Throughput
from eamdeploy.profiling.timing import Latency, SpeedUp
from eamdeploy.records.evaluation import EvaluatedImages, EvaluationReport
from eamdeploy.records.export import Export, ExportedModel
from eamdeploy.records.gain import Gain
from eamdeploy.records.profile import EngineProfile, Profile, summarize_card
from eamdeploy.remote.profile import RemoteFailure, RemoteProfiles

MODEL = "deit_made_up_patch16_224"
DEPTH, HEADS = 12, 6
SETTINGS = {"graph_optimization_level": "all"}
DRIFT = "power was 4000 mW in the first pass and 4780 mW in the second (over 5 % apart): made up"
UNSTEADY = "run times vary by 9.7 % (over 5 %): made up"
PARITY = ParityReport(
    passed=True,
    tolerance="f32-engine",
    n=16,
    max_abs=1.5e-6,
    max_rel=2.5e-7,
    where=(3, 1),
    top1_agreement=100.0,
    reason=None,
)


def digest(name: str) -> str:
    """A digest that stands for the file of that name."""
    return f"sha256:{name.encode().hex():0<64.64}"


def freezing(share: float = 0.2, **changes: Any) -> Freezing:
    """The heads with the lowest of made-up scores, as many as the share allows."""
    scores = {
        f"blocks.{layer}.attn": [1e-4 * (1 + (7 * layer + 5 * head) % 23) ** 2 for head in range(HEADS)]
        for layer in range(DEPTH)
    }
    ranked = sorted((value, path, head) for path, values in scores.items() for head, value in enumerate(values))
    taken = ranked[: int(share * DEPTH * HEADS)]
    heads = {path: sorted(head for _, its, head in taken if its == path) for path in scores}
    made = Freezing(
        bits=4,
        quantizer="squared",
        score="sensitivity",
        scores=scores,
        sparsity_asked=share,
        sparsity=len(taken) / (DEPTH * HEADS),
        heads={path: chosen for path, chosen in heads.items() if chosen},
    )
    return made.model_copy(update=changes)


def card(frozen: Freezing | None = None, checkpoint: str = "model.eam.safetensors", **changes: Any) -> ModelCard:
    made = ModelCard(
        timm_model=MODEL,
        weights="weights.safetensors",
        num_classes=10,
        preprocessing=Preprocessing(size=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        freezing=frozen,
        checkpoint_digest=digest(checkpoint),
        rewrites=["scale_into_query", "freeze_heads"],
        exporter="dynamo",
        versions={"torch": "2.9.0"},
    )
    return made.model_copy(update=changes)


def manifest(name: str, made_of: ModelCard | None, **changes: Any) -> Manifest:
    """The manifest of the engine of that name."""
    made = Manifest(
        backend="ort",
        engine=name,
        engine_digest=digest(name),
        engine_bytes=21_500_000 + 137_000 * len(name),
        model_digest=digest(name.replace(".ort.onnx", ".onnx").replace(".plan", ".onnx")),
        card=made_of,
        batch=1,
        settings=SETTINGS,
        threads=4,
        parity=PARITY,
        versions={"python": "3.11.7", "onnxruntime": "1.23.0"},
        machine="Made-up CPU, 4 cores, x86_64, Linux",
        created="2026-01-02T03:04:05+00:00",
    )
    return made.model_copy(update=changes)


def device_build(**changes: Any) -> DeviceBuild:
    """What a TensorRT engine's manifest says, with 40 timed layers of which the names tell the order."""
    made = DeviceBuild(
        runtime="10.3.0",
        gpu="Orin",
        compute_capability="8.7",
        version_compatible=False,
        hardware_compatible=False,
        precision="fp16",
        int8=False,
        model_changes=["frozen maps as INT8", "LayerNorm in FP32"],
        device_memory_bytes=9_437_184,
        engine_layers=EngineLayers(
            layers=40,
            fused_attention=["_gemm_mha_v2_myl0_7"],
            frozen_maps=[
                FrozenMapLayer(frozen_map="blocks.1.attn.map", layer="__myl_DequMul_myl0_12", type="Int8"),
                FrozenMapLayer(frozen_map="blocks.3.attn.map", layer=None, type=None),
            ],
        ),
        layer_ms={f"/blocks/{n}/a rather long name of a fused layer/MatMul + Add": 0.01 + 0.003 * n for n in range(40)},
        baseline=EngineSize(engine="base.plan", layers=44, engine_bytes=24_100_000),
        log="model.plan.log",
    )
    return made.model_copy(update=changes)


def latency(p50_ms: float, *, warning: str | None = None) -> Latency:
    """Times around `p50_ms`, with a tail to the right."""
    return Latency(
        runs=1234,
        batch=1,
        min_ms=0.94 * p50_ms,
        mean_ms=1.02 * p50_ms,
        p5_ms=0.95 * p50_ms,
        p25_ms=0.98 * p50_ms,
        p50_ms=p50_ms,
        p75_ms=1.04 * p50_ms,
        p90_ms=1.08 * p50_ms,
        p95_ms=1.15 * p50_ms,
        p99_ms=1.31 * p50_ms,
        throughput_images_per_s=1e3 / (1.02 * p50_ms),
        variation_percent=9.7 if warning else 2.1,
        warning=warning,
    )


def speed_up(median: float, half: float = 0.01, sittings: int = 5) -> SpeedUp:
    """A speed-up whose 95 % interval reaches `half` to both sides, and its rounds much further."""
    return SpeedUp(
        rounds=1234,
        sittings=sittings,
        median=median,
        low=median - half,
        high=median + half,
        p5=median - 9 * half,
        p25=median - 3 * half,
        p75=median + 3 * half,
        p95=median + 9 * half,
    )


def memory(engine_bytes: int, own: int, **changes: Any) -> Memory:
    made = Memory(
        engine_bytes=engine_bytes,
        baseline_rss_bytes=86_000_000,
        peak_rss_bytes=86_000_000 + own,
        engine_peak_rss_bytes=own,
        rss_bytes=80_000_000 + own,
        pss_bytes=70_000_000 + own,
        device_memory_bytes=None,
        available_drop_bytes=None,
        nvmap_bytes=None,
    )
    return made.model_copy(update=changes)


def power(mean_mw: float, p50_ms: float, **changes: Any) -> Power:
    """What an engine drew that draws `mean_mw` and takes `p50_ms` for an image, on a board that idles at 4.4 W."""
    made = Power(
        source="tegrastats",
        rails_mw={"VDD_IN": mean_mw, "VDD_CPU_GPU_CV": 0.52 * mean_mw, "VDD_SOC": 0.21 * mean_mw},
        total_rails=["VDD_IN"],
        idle_mw=4400.0,
        mean_mw=mean_mw,
        energy_mj_per_image=mean_mw * p50_ms / 1e3,
        energy_above_idle_mj_per_image=(mean_mw - 4400.0) * p50_ms / 1e3,
        samples=97,
        skipped=2,
        seconds=10.03,
        images=round(10_030 / p50_ms),
        images_per_s=1e3 / p50_ms,
        memory_peak_bytes={"ram": 3_912_000_000, "nvmap": 612_000_000},
        warnings=[],
    )
    return made.model_copy(update=changes)


def engine(name: str, made_of: ModelCard | None, p50_ms: float, ratio: float | None = None, **changes: Any) -> Any:
    """The profile of the engine of that name."""
    made = EngineProfile(
        engine=name,
        backend="trt" if name.endswith(".plan") else "ort",
        digest=digest(name.rpartition("/")[2]),
        model=None if made_of is None else summarize_card(made_of),
        settings=SETTINGS,
        parity=PARITY,
        latency=latency(p50_ms),
        memory=memory(21_500_000 + 137_000 * len(name), 41_000_000),
        cold_start=ColdStart(import_ms=312.0, load_ms=11.9 * p50_ms, first_inference_ms=1.9 * p50_ms),
        split=None,
        throughput=None,
        layer_ms=None,
        power=None,
        speed_up=None if ratio is None else speed_up(ratio),
    )
    return made.model_copy(update=changes)


def on_jetson(name: str, made_of: ModelCard | None, p50_ms: float, mean_mw: float, ratio: float | None = None) -> Any:
    """The profile of a TensorRT engine with everything that only a Jetson tells."""
    n_bytes = 11_200_000 + 137_000 * len(name)
    return engine(
        name,
        made_of,
        p50_ms,
        ratio,
        memory=memory(
            n_bytes,
            512_000_000,
            device_memory_bytes=9_437_184,
            available_drop_bytes=-3_100_000 if ratio is None else 641_000_000,
            nvmap_bytes=402_000_000,
        ),
        split=LatencySplit(
            runs=100,
            batch=1,
            copy_in_ms=0.0 if ratio is None else 0.061,
            compute_ms=p50_ms - 0.11,
            copy_out_ms=0.0 if ratio is None else 0.0071,
            enqueue_ms=0.213,
            cuda_graph=ratio is None,
        ),
        throughput=Throughput(
            streams=2,
            images=4321,
            seconds=3.004,
            images_per_s=1690 / p50_ms,
            latency_p50_ms=1.18 * p50_ms,
            latency_p99_ms=1.57 * p50_ms,
        ),
        layer_ms={f"/blocks/{n}/attn/MatMul timed by profile": 0.01 + 0.004 * n for n in range(20)},
        power=power(mean_mw, p50_ms),
    )


def device(**changes: Any) -> DeviceState:
    """A processor that tells nothing of itself but its name."""
    made = DeviceState(kind="cpu", name="Made-up CPU")
    return made.model_copy(update=changes)


def jetson(*, hot: bool, name: str = "NVIDIA Jetson Orin Nano (made up)") -> DeviceState:
    """A board before or after work; afterwards it is hot and slows down."""
    return DeviceState(
        kind="jetson",
        name=name,
        software={"JetPack": "6.2", "L4T": "36.4.3"},
        power_mode="15W",
        power_mode_id=0,
        clocks_locked=False,
        clocks_mhz={**{f"CPU{core}": 1510.0 if hot or core else 729.0 for core in range(6)}, "GPU": 612.0},
        temperatures_c={"cpu-thermal": 71.25 if hot else 48.5, "gpu-thermal": 73.0 if hot else 47.25},
        throttling=["cpu-throttle-alert is at 1 of 1"] if hot else [],
        warnings=["clocks are not locked, so that times vary with the load before. Lock them with: sudo jetson_clocks"],
    )


def machine(**changes: Any) -> Machine:
    made = Machine(
        cpu="Made-up CPU",
        architecture="x86_64",
        cores=8,
        usable_cores=4,
        memory_bytes=16_000_000_000,
        system="Linux 6.1",
        frequency_mhz=2995.2,
        max_frequency_mhz=3600.0,
        governor="performance",
        load_1min=0.31,
        versions={"python": "3.11.7", "onnxruntime": "1.23.0"},
        measured_at="2026-01-02T03:14:15+00:00",
    )
    return made.model_copy(update=changes)


def profile(engines: list[Any], baseline: Any = None, **changes: Any) -> Profile:
    made = Profile(
        machine=machine(),
        device_before=device(),
        device_after=device(),
        threads=4,
        batch=1,
        warmup_ms=200.0,
        min_seconds=3.0,
        min_runs=50,
        sittings=5,
        baseline=baseline,
        engines=engines,
    )
    return made.model_copy(update=changes)


PHOTOS = EvaluatedImages(folder="photos", split="odd", limit=500, exif_transpose=False)


def evaluation(
    name: str,
    reference: str | None,
    top1: float | None = 71.9,
    used: EvaluatedImages = PHOTOS,
    **changes: Any,
) -> EvaluationReport:
    made = EvaluationReport(
        n_images=500,
        n_skipped=0,
        skipped=[],
        num_classes=10,
        top1=top1,
        top5=None if top1 is None else 90.6,
        reference_top1=None if top1 is None or reference is None else 72.2,
        reference_top5=None if top1 is None or reference is None else 91.1,
        agreement=None if reference is None else 93.84,
        kl=None if reference is None else 0.0321,
        max_abs_logit_diff=None if reference is None else 1.27,
        model=name,
        model_digest=digest(name.rpartition("/")[2]),
        weights="weights.safetensors",
        reference=reference,
        reference_digest=None if reference is None else digest(reference),
        images=used.in_words,
        image_source=used,
        reference_is_live=False,
    )
    return made.model_copy(update=changes)


def analysis(**changes: Any) -> Analysis:
    scores = freezing().scores
    made = Analysis(
        timm_model=MODEL,
        weights="weights.safetensors",
        preprocessing=card().preprocessing,
        attention={path: AttentionShape(heads=HEADS, tokens=197) for path in scores},
        calibration=Calibration(n_images=256, digest=digest("photos"), source="photos"),
        granularity="row",
        window_maps=None,
        bins=16,
        spacing="uniform",
        score="entropy",
        scores={
            name: {path: [n * v for v in its] for path, its in scores.items()}
            for n, name in ((3, "entropy"), (9, "variance"))
        },
        sparsity_asked=0.3,
        sparsity=0.298,
        frozen={"blocks.2.attn": [0, 4], "blocks.7.attn": [5]},
        shares={"blocks.2.attn": [0.25, 1.0], "blocks.7.attn": [0.75]},
        versions={"torch": "2.9.0"},
    )
    return made.model_copy(update=changes)


def export() -> Export:
    def written(name: str) -> ExportedModel:
        return ExportedModel(
            file=name,
            digest=digest(name),
            bytes=21_300_000,
            nodes_stock=1234,
            nodes=432,
            rewrites=["freeze_heads"],
            exporter="dynamo",
            parity=PARITY,
            reference=name.replace(".onnx", ".reference.npz"),
        )

    gain = Gain(speed_up=speed_up(1.07, sittings=4), threads=4, machine="Made-up CPU, 4 cores")
    return Export(frozen=written("model.onnx"), baseline=written("base.onnx"), gain=gain)


def write_all(folder: Path, records: Mapping[str, Record]) -> list[Path]:
    """The records as files of these names in `folder`; folders are made."""
    for name, record in records.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        record.write(folder / name)
    return [folder / name for name in records]


def board_profile(engines: list[Any], baseline: Any, name: str = "NVIDIA Jetson Orin Nano (made up)") -> Profile:
    """Measured on a Jetson of that name."""
    board = machine(
        cpu="ARMv8 Processor rev 1 (made up)",
        architecture="aarch64",
        usable_cores=6,
        cores=6,
        frequency_mhz=None,
        max_frequency_mhz=None,
        governor=None,
        load_1min=None,
        versions={"python": "3.10.12", "tensorrt": "10.3.0"},
    )
    return profile(
        engines,
        baseline,
        machine=board,
        device_before=jetson(hot=False, name=name),
        device_after=jetson(hot=True, name=name),
        threads=1,
    )


def remote_profiles() -> RemoteProfiles:
    """Two boards that measured the same engines, and one that could not be reached."""
    fifth, twin = card(freezing()), card()
    boards = {
        "ssh://nvidia@orin.lan": ("NVIDIA Jetson Orin Nano (made up)", 1.0),
        "ssh://agx.lan:2222": ("NVIDIA Jetson AGX Orin (made up)", 0.4),
    }
    return RemoteProfiles(
        profiles={
            target: board_profile(
                [on_jetson("out/model.plan", fifth, 2.31 * share, 8100, 1.18)],
                on_jetson("out/base.plan", twin, 2.73 * share, 8600),
                name,
            )
            for target, (name, share) in boards.items()
        },
        failures={"ssh://pi5": RemoteFailure(message="ssh://pi5 can't be reached: no route to host", exit_code=4)},
    )


def rich_records() -> dict[str, Record]:
    """One of everything by file name; the profiles are of a PC and of a board."""
    fifth, half = card(freezing()), card(freezing(0.5), "half.eam.safetensors")
    twin = card()
    on_pc = [
        engine("out/model.ort.onnx", fifth, 13.7, 1.071),
        engine("out/half.ort.onnx", half, 12.9, 1.004, parity=None, latency=latency(12.9, warning=UNSTEADY)),
    ]
    on_board = [
        on_jetson("model.plan", fifth, 2.31, 8100, 1.18),
        on_jetson("half.plan", half, 2.9, 7900, 0.94).model_copy(
            update={"power": power(4390, 2.9, warnings=[DRIFT], idle_mw=4400.0)}
        ),
    ]
    return {
        "analysis.json": analysis(),
        "export.json": export(),
        "base.ort.onnx.json": manifest("base.ort.onnx", twin),
        "model.ort.onnx.json": manifest("model.ort.onnx", fifth),
        "half.ort.onnx.json": manifest("half.ort.onnx", half, parity=None),
        "model.plan.json": manifest(
            "model.plan", fifth, backend="trt", threads=1, settings={"cuda_graph": "True"}, device=device_build()
        ),
        "evaluation.json": evaluation("out/model.ort.onnx", "base.ort.onnx"),
        "half.evaluation.json": evaluation(
            "out/half.ort.onnx", "base.ort.onnx", 68.4, n_skipped=2, skipped=["a/broken.png", "b/<b>worse</b>.png"]
        ),
        "plan.evaluation.json": evaluation("model.plan", "base.ort.onnx", None, weights="random"),
        "pc.json": profile(on_pc, engine("out/base.ort.onnx", twin, 14.7)),
        "board.json": board_profile(on_board, on_jetson("base.plan", twin, 2.73, 8600)),
    }
