"""INT8 on ONNX Runtime's CPU kernels, on processors with VNNI and without it: accuracy and time of kinds of weights.

    python benchmarks/int8_processors.py x.onnx --twin base.onnx --data ODD --calib-data EVEN --threads 2 -o int8.json

`x.onnx` is exported, and so is its unfrozen twin. Other kinds of processors are this one with instruction sets hidden
(`tests/processors.py`), at full speed. On each kind, all engines take turns in one process, in a random order and its
mirror image. Agreement and KL divergence are those with the FP32 model itself, `twin` with its unfrozen twin; `as here`
is how far logits are from those on this machine, where floats too are rounded otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from processors import EMULATED, Kind, emulation

from eamdeploy.artifacts.files import require_output, write_json
from eamdeploy.artifacts.onnx_files import read_model
from eamdeploy.convert.ort import convert
from eamdeploy.convert.ort_form import OrtForm
from eamdeploy.convert.ranges import CALIBRATION_IMAGES, Calibration
from eamdeploy.devices.machine import describe_machine
from eamdeploy.engines.ort.runner import EXACT_PRODUCTS
from eamdeploy.engines.registry import open_runner
from eamdeploy.images.preprocess import network_input
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT
from eamdeploy.parity.accuracy import mean_kl, same_top1, top_k_hits

Weights = tuple[NDArray[Any], NDArray[np.float64]]
DYNAMIC = "dynamic, fused attention"
WARMUP = 5


def main() -> None:
    """Print a table for every kind of processor."""
    arguments = _parse()
    if arguments.worker is not None:
        work(arguments.worker)
        return
    if arguments.output is not None:
        require_output(arguments.output)
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(arguments, Path(scratch))
    if arguments.output is not None:
        write_json(arguments.output, {"machine": describe_machine().model_dump(), "rows": rows})
    Console(width=200).print(table(rows))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="exported ONNX model")
    parser.add_argument("--twin", type=Path, help="its unfrozen twin")
    parser.add_argument("--data", type=Path, help="images to measure on, with labels or without")
    parser.add_argument("--split", choices=("all", "even", "odd"), default="all")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--calib-data", type=Path, help="images to calibrate with: static INT8 too")
    parser.add_argument("--calib-split", choices=("all", "even", "odd"), default="all")
    parser.add_argument("--kinds", nargs="+", default=["this machine", *EMULATED])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("-o", "--output", type=Path, help="also write the figures as JSON")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for every engine on every kind of processor that can be had here."""
    engines = make_engines(arguments, folder)
    with open_runner(arguments.model, 1) as runner:
        assert runner.card is not None and not runner.io.takes_pixels
        how, classes, names = runner.card.preprocessing, runner.card.num_classes, runner.card.class_names
    source = ImageSource(arguments.data, arguments.split, arguments.images)
    labelled = source.open_labelled(classes, names)
    batches = list(source.batches(labelled, how, 32, SILENT))
    images = network_input(np.concatenate([batch.pixels for batch in batches]), how, takes_pixels=False)
    labels = None if batches[0].labels is None else np.concatenate([batch.labels for batch in batches])
    np.save(folder / "images.npy", images)
    rows: list[dict[str, object]] = []
    here: dict[str, NDArray[np.float32]] = {}
    for kind in arguments.kinds:
        if (missing := emulation(kind).missing) is not None:
            sys.stderr.write(f"not on {kind}: {missing}\n")
            continue
        logits, times = run_as(kind, engines, arguments, folder)
        here = here or logits
        first = next(iter(times))
        for name in engines:
            fp32, twin = logits["FP32"], logits.get("FP32 twin")
            rows.append(
                {
                    "kind": kind,
                    "engine": name,
                    "p50_ms": float(np.median(times[name])),
                    "time_to_fp32": float(np.median(times[name] / times[first])),
                    "agreement": 100 * float(same_top1(fp32, logits[name]).mean()),
                    "kl": mean_kl(fp32, logits[name]),
                    "agreement_with_twin": None if twin is None else 100 * float(same_top1(twin, logits[name]).mean()),
                    "top1": None if labels is None else 100 * float(top_k_hits(logits[name], labels, 1).mean()),
                    "from_here": float(np.abs(logits[name] - here[name]).max()),
                }
            )
    return rows


def make_engines(arguments: argparse.Namespace, folder: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """File and settings of every engine, FP32 first."""
    model = read_model(arguments.model)
    data = model.model
    made: dict[str, tuple[bytes, dict[str, str]]] = {"FP32": (data, dict(OrtForm().settings))}
    if arguments.twin is not None:
        made["FP32 twin"] = (arguments.twin.read_bytes(), dict(OrtForm().settings))
    form = OrtForm(fused_attention=True, int8="dynamic")
    ours = convert(model, form, "the model").model
    made[f"{DYNAMIC}: neighbours fit (ours)"] = (ours, dict(form.settings))
    for name, quantize in {"8 full bits": full, "7 bits": seven, "unsigned": unsigned}.items():
        made[f"{DYNAMIC}: {name}"] = (with_weights(ours, data, quantize), dict(form.settings))
    made[f"{DYNAMIC}: 8 full bits, x64quantprecision"] = (
        made[f"{DYNAMIC}: 8 full bits"][0],
        {**form.settings, **EXACT_PRODUCTS},
    )
    if arguments.calib_data is not None:
        images = ImageSource(arguments.calib_data, arguments.calib_split, CALIBRATION_IMAGES)
        calibration = Calibration(images, cache=folder / "ranges.json")
        for fused in (False, True):
            static = OrtForm(fused_attention=fused, int8="static")
            engine = convert(model, static, "the model", calibration).model
            made[f"{static.name} (ours)"] = (engine, dict(static.settings))
    files = {}
    for index, (name, (engine, settings)) in enumerate(made.items()):
        (folder / f"{index}.onnx").write_bytes(engine)
        files[name] = (str(folder / f"{index}.onnx"), settings)
    return files


def with_weights(engine: bytes, model: bytes, quantize: Callable[[NDArray[np.float64]], Weights]) -> bytes:
    """The dynamic engine with the weights of `model` quantized in another way."""
    made = onnx.load_from_string(engine)
    floats = {item.name: numpy_helper.to_array(item) for item in onnx.load_from_string(model).graph.initializer}
    stored = {item.name: item for item in made.graph.initializer}
    for name in {node.input[1] for node in made.graph.node if node.op_type == "MatMulInteger"}:
        stem = name.removesuffix("_quantized")
        integers, scales = quantize(floats[stem].astype(np.float64))
        zero = np.full(len(scales), 128 if integers.dtype == np.uint8 else 0, integers.dtype)
        for part, values in (("quantized", integers), ("scale", scales.astype(np.float32)), ("zero_point", zero)):
            stored[f"{stem}_{part}"].CopyFrom(numpy_helper.from_array(values, f"{stem}_{part}"))
    return bytes(made.SerializeToString())


def full(weight: NDArray[np.float64], largest: int = 127) -> Weights:
    """8 bits by the largest of each column."""
    scales = np.abs(weight).max(axis=0) / largest
    return np.rint(weight / scales).astype(np.int8), scales


def seven(weight: NDArray[np.float64]) -> Weights:
    """7 bits, as ONNX Runtime's `reduce_range`."""
    return full(weight, 64)


def unsigned(weight: NDArray[np.float64]) -> Weights:
    """The same numbers as `full`, with a zero point of 128."""
    integers, scales = full(weight)
    return (integers.astype(np.int16) + 128).astype(np.uint8), scales


def run_as(
    kind: Kind, engines: dict[str, tuple[str, dict[str, str]]], arguments: argparse.Namespace, folder: Path
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float64]]]:
    """Logits and milliseconds of every engine on that kind of processor."""
    plan, how = folder / "plan.json", emulation(kind)
    job = {"engines": engines, "threads": arguments.threads, "rounds": arguments.rounds}
    plan.write_text(json.dumps(job))
    command = [*how.command, sys.executable, __file__, "--worker", str(plan)]
    subprocess.run(command, env={**os.environ, **how.environment}, check=True)
    logits, times = (dict(np.load(folder / f"{what}.npz")) for what in ("logits", "times"))
    return {name: logits[name] for name in engines}, {name: times[name] for name in engines}


def work(plan: Path) -> None:
    """What `run_as` asks for, in this process; results lie beside the plan."""
    job = json.loads(plan.read_text())
    images = np.load(plan.with_name("images.npy"))
    calls = {name: _session(file, settings, job["threads"]) for name, (file, settings) in job["engines"].items()}
    logits: dict[str, Any] = {
        name: np.concatenate([call(images[index : index + 1]) for index in range(len(images))])
        for name, call in calls.items()
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, draw = list(calls), random.Random(0)
    for turn in range(-WARMUP, job["rounds"]):
        draw.shuffle(order)
        for name in [*order, *reversed(order)]:
            start = time.perf_counter()
            calls[name](images[:1])
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    np.savez(plan.with_name("logits.npz"), **logits)
    paired = {name: np.array(values).reshape(-1, 2).mean(axis=1) for name, values in times.items()}
    np.savez(plan.with_name("times.npz"), **paired)


def _session(file: str, settings: dict[str, str], threads: int) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for key, value in settings.items():
        if key != "graph_optimization_level":  # all, which is the default
            options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: np.asarray(session.run(None, {name: images})[0])


def table(rows: list[dict[str, object]]) -> Table:
    """As people read it."""
    shown = Table(box=None, padding=(0, 2, 0, 0))
    columns = list(rows[0]) if rows else []
    for name in columns:
        shown.add_column(name, justify="left" if name in ("kind", "engine") else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value or "") for value in row.values()))
    return shown


if __name__ == "__main__":
    main()
