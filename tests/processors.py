"""Other kinds of x86 processors than this machine's: programs run as if instruction sets were missing.

`cpuid` faults on Intel's processors if it is asked to, and `without_vnni.c` then answers in its place: everything runs
at full speed. Where that is not possible, qemu's user-mode emulator does it, slowly. A machine without VNNI is such a
kind itself, and needs no emulation for it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import eamdeploy
from eamdeploy.devices.instructions import instruction_sets, products_saturate

Kind = Literal["this machine", "avx512", "avx2", "sse"]
EMULATED: tuple[Kind, ...] = ("avx512", "avx2", "sse")
SATURATING: tuple[Kind, ...] = ("avx512", "avx2")
"""Kinds without VNNI on which ONNX Runtime's products of unsigned and signed bytes are cut to 16 bits."""

HERE = instruction_sets()
SATURATES_HERE = products_saturate(HERE) and "avx2" in HERE  # ONNX Runtime's kernels for SSE are exact on Linux

_SOURCE = Path(__file__).with_name("without_vnni.c")
_LIBRARY = "without_vnni.so"
_QEMU = {"avx2": "Haswell", "sse": "Nehalem"}  # its emulator knows no AVX-512
_INSTRUCTIONS = {"avx512": "avx512", "avx2": "avx2", "sse": "sse4.1"}

_RUN = """
import json, sys
from pathlib import Path
import numpy as np
from eamdeploy.engines.ort.runner import OrtRunner
from eamdeploy.engines.registry import open_runner
import onnxruntime

plan = json.load(sys.stdin)
given = dict(np.load(plan["inputs"]))
results = {}
for name, job in plan["jobs"].items():
    if job["settings"] is None:
        with open_runner(Path(job["model"]), 1) as runner:
            results[name] = runner.infer(given[job["input"]])
        continue
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in job["settings"].items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
    results[name] = session.run(None, {session.get_inputs()[0].name: given[job["input"]]})[0]
np.savez(plan["output"], **results)
"""


@dataclass(frozen=True)
class Job:
    """A model to run.

    Attributes:
        input: which of the arrays it gets.
        settings: of a bare session of ONNX Runtime, by its names; None to open it as an engine, with its manifest.
    """

    model: Path
    input: str
    settings: dict[str, str] | None = None


@dataclass(frozen=True)
class Emulation:
    """How a program is run as if on another processor; `missing` says why it can't be."""

    command: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None


@cache
def emulation(kind: Kind) -> Emulation:
    """How to run as `kind` here."""
    if kind == "this machine":
        return Emulation()
    if not HERE.startswith("x86_64"):
        return Emulation(missing=f"this machine is no x86: {HERE}")
    if _INSTRUCTIONS[kind] not in HERE:
        return Emulation(missing=f"this machine's processor can do less than {kind} already: {HERE}")
    folder = _compiled()
    if folder is not None:
        environment = {"LD_PRELOAD": str(Path(folder.name) / _LIBRARY), "PROCESSOR_KIND": kind}
        probe = subprocess.run([sys.executable, "-c", ""], env={**os.environ, **environment}, check=False)
        if probe.returncode == 0:
            return Emulation(environment=environment)
    qemu = shutil.which("qemu-x86_64")
    if qemu is not None and kind in _QEMU:
        return Emulation(command=(qemu, "-cpu", _QEMU[kind]))
    return Emulation(missing="needs a processor whose cpuid can fault and a C compiler, or for avx2 and sse qemu-user")


@cache
def _compiled() -> tempfile.TemporaryDirectory[str] | None:
    """A folder with `without_vnni.c` as a library, which stays until Python ends; None without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    folder = tempfile.TemporaryDirectory()
    library = Path(folder.name) / _LIBRARY
    options = ["-O2", "-shared", "-fPIC", "-o", str(library), str(_SOURCE)]
    done = subprocess.run([compiler, *options], capture_output=True, check=False)
    return folder if done.returncode == 0 else None


def run_on(kind: Kind, jobs: dict[str, Job], inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What every job gives on that kind of processor, with one thread; in one process."""
    how = emulation(kind)
    assert how.missing is None, how.missing
    with tempfile.TemporaryDirectory() as scratch:
        given, output = Path(scratch) / "given.npz", Path(scratch) / "results.npz"
        np.savez(given, **inputs)  # type: ignore[arg-type]
        plan = {
            "inputs": str(given),
            "output": str(output),
            "jobs": {
                name: {"model": str(job.model), "input": job.input, "settings": job.settings}
                for name, job in jobs.items()
            },
        }
        path = os.pathsep.join([str(Path(eamdeploy.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [*how.command, sys.executable, "-c", _RUN],
            input=json.dumps(plan),
            env={**os.environ, **how.environment, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return dict(np.load(output))
