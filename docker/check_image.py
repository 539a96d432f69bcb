"""Builds the image really and checks what runs in it; one line for each check.

    python docker/check_image.py amd64|arm64 [--suite bookworm|jammy|noble] [--extras trt jetson]

Exit codes: 0 every check passed; 1 the image does not build, or a check failed; 4 nothing can be built or run here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from image_builder import REPOSITORY, SUITES, BuildFailed, Outcome, Podman, Unavailable

SHARE: Final = "/usr/share/eamdeploy"
MODELS: Final = ("digits_deit_baseline", "digits_deit")
FOLDER: Final = REPOSITORY / "build/image"
USER: Final = 1000
MIN_TOP1: Final = 95.0  # percent; the frozen model has 96.3 in torch
MIN_AGREEMENT: Final = 99.0  # percent
HOST_PACKAGES: Final = ("torch", "timm", "onnx", "onnxscript", "safetensors", "matplotlib", "sympy")
EXTRA_PACKAGES: Final = ("onnx",)  # EXTRAS=trt installs those
LEFT_OUT: Final = ("sympy", "coloredlogs")  # docker/requirements.txt says why
COMPILERS: Final = ("gcc", "cc", "g++", "clang", "make")

_PRESENT: Final = """
import importlib.util, pathlib, shutil, sys
found = [name for name in {packages!r} if importlib.util.find_spec(name)]
found += [name for name in {programs!r} if shutil.which(name)]
found += [str(path) for path in pathlib.Path(sys.prefix).glob("lib/*/site-packages/pip*")]
print(sys.prefix, *found)
"""
_UNMET: Final = """
import sysconfig
from importlib import metadata
from packaging.requirements import Requirement
installed = list(metadata.distributions(path=[sysconfig.get_path("purelib")]))
print(len(installed))
for package in installed:
    for line in package.requires or []:
        need = Requirement(line)
        if need.marker and not need.marker.evaluate({{"extra": ""}}) or need.name in {left_out!r}:
            continue
        try:
            met = need.specifier.contains(metadata.version(need.name), prereleases=True)
        except metadata.PackageNotFoundError:
            met = False
        if not met:
            print(package.name + ":" + line.replace(" ", ""))
"""
_WRITABLE: Final = """
import os
places = ("/opt/eamdeploy", "/opt/eamdeploy/bin/eamdeploy", "/usr/share/eamdeploy", "/etc/passwd", "/")
print(" ".join(place for place in places if os.access(place, os.W_OK)))
"""
_RUN_MAPS: Final = """
import hashlib, onnxruntime
session = onnxruntime.InferenceSession("maps.onnx", providers=["CPUExecutionProvider"])
for value in session.run(None, {}):
    print(hashlib.sha256(value.tobytes()).hexdigest())
"""


class CheckFailed(Exception):
    """The image is not what it must be."""


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise CheckFailed(message)


def finished(outcome: Outcome) -> str:
    """What a command that must succeed wrote to stdout."""
    expect(outcome.code == 0, f"exit code {outcome.code}: {outcome.err.strip()[-800:]}")
    return outcome.out


def python(podman: Podman, code: str, *options: str, read_only: bool = True) -> list[str]:
    """The words that Python code prints in the image."""
    entry = ["--entrypoint", "python3"]
    return finished(podman.run(["-c", code], options=[*entry, *options], read_only=read_only)).split()


def base(podman: Podman) -> str:
    """The tools and a base image are there, and a container runs."""
    podman.require()
    return f"{podman.suite}, {podman.inspect(podman.base)['Size'] / 1e6:.0f} MB"


def build(podman: Podman) -> str:
    """The Dockerfile builds on that base."""
    podman.build()
    added = podman.inspect(podman.image)["Size"] - podman.inspect(podman.base)["Size"]
    return f"{added / 1e6:.0f} MB on top of the base"


def default_alone(podman: Podman) -> str:
    """No arguments, no options: everything is inside."""
    if podman.emulated:
        return "left out under emulation, where it takes minutes; the next check does the same"
    out = finished(podman.run([], read_only=False))
    expect("p50" in out, f"no table of latencies in: {out[-400:]}")
    return "builds, evaluates and profiles both models"


def default_locked_down(podman: Podman) -> str:
    """With a read-only root and a mounted working folder, which gets the engines and the JSON."""
    with TemporaryDirectory(dir=podman.folder) as name:
        folder = Path(name)
        folder.chmod(0o777)
        finished(podman.run([], options=["-v", f"{folder}:/data"]))
        parity = [read(folder / f"{model}.ort.onnx.json")["parity"] for model in MODELS]
        evaluation, profile = read(folder / "evaluation.json"), read(folder / "profile.json")
    expect(all(report["passed"] for report in parity), f"parity gate: {parity}")
    top1, agreement = evaluation["top1"], evaluation["agreement"]
    expect(top1 >= MIN_TOP1 and agreement >= MIN_AGREEMENT, f"top-1 {top1}, agreement {agreement}")
    profiled = [Path(engine["engine"]).name for engine in (profile["baseline"], *profile["engines"])]
    expect(profiled == [f"{model}.ort.onnx" for model in MODELS], f"profiled {profiled}")
    worst = max(report["max_abs"] for report in parity)
    accuracy = f"top-1 {top1:.2f} % (twin {evaluation['reference_top1']:.2f} %), agreement {agreement:.2f} %"
    return f"{accuracy}; logits within {worst:.1e} of the reference that export made"


def health(podman: Podman) -> str:
    """The command that the image's health check names, run by itself: podman would start it through systemd."""
    kind, *command = podman.inspect(podman.image)["Healthcheck"]["Test"]
    expect(kind == "CMD" and command[0] == "eamdeploy", f"health check is {kind} {command}")
    json.loads(finished(podman.run(command[1:])))
    return f"{' '.join(command)} exits with 0 and writes JSON"


def version(podman: Podman) -> str:
    """Any command of eamdeploy can be given; this one says which code is inside."""
    stated = re.search(r'^version = "(.+)"$', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    said = finished(podman.run(["--version"])).strip()
    expect(stated is not None and said == stated[1], f"eamdeploy --version says {said}")
    return said


def inspection(podman: Podman) -> str:
    """The embedded model says what is frozen in it."""
    found = json.loads(finished(podman.run(["inspect", f"{SHARE}/digits_deit.onnx", "--json"])))
    heads = found["details"]["frozen heads"]
    expect(bool(heads), "no frozen heads in the embedded model")
    return f"{found['kind']}, frozen heads {', '.join(heads)}"


def wrong_use(podman: Podman) -> str:
    """eamdeploy's exit code is the container's."""
    outcome = podman.run(["profile", "missing.onnx"])
    expect(outcome.code == 2 and outcome.err.startswith("error: "), f"exit code {outcome.code}: {outcome.err}")
    return "exit code 2, one line"


def tensorrt_request(podman: Podman) -> str:
    """With EXTRAS=trt a model can be prepared for TensorRT; without, the command says which package it wants."""
    arguments = ["build-trt", f"{SHARE}/digits_deit.onnx", "--fp16", "--dry-run", "--trt", "10.3"]
    outcome = podman.run(arguments)
    if "trt" in podman.extras:
        finished(outcome)
        return "build-trt --dry-run prepares the model"
    expect(outcome.code == 4 and "onnx" in outcome.err, f"exit code {outcome.code}: {outcome.err}")
    return "without EXTRAS=trt, exit code 4 and the package's name"


def not_root(podman: Podman) -> str:
    """Even with a writable root, the container's user can change nothing that it runs."""
    uid, *writable = python(podman, f"import os; print(os.getuid()){_WRITABLE}", read_only=False)
    expect(uid == str(USER), f"runs as user {uid}")
    expect(not writable, f"can write {writable}")
    return f"user {uid}, can write neither programs nor models"


def nothing_needless(podman: Podman) -> str:
    """Neither the host's packages nor what built the image are in it."""
    packages = [name for name in HOST_PACKAGES if name not in EXTRA_PACKAGES or "trt" not in podman.extras]
    prefix, *found = python(podman, _PRESENT.format(packages=packages, programs=COMPILERS))
    expect(prefix == "/opt/eamdeploy" and not found, f"in {prefix}: {' '.join(found)}")
    return f"none of {', '.join((*packages, *COMPILERS))}, no pip beside eamdeploy"


def dependencies(podman: Podman) -> str:
    """What `pip check` would say, had the image pip."""
    count, *unmet = python(podman, _UNMET.format(left_out=LEFT_OUT))
    expect(int(count) > 0 and not unmet, f"of {count} packages, not met: {' '.join(unmet)}")
    return f"each of {count} packages has what it declares, but for {' and '.join(LEFT_OUT)}"


def no_network(podman: Podman) -> str:
    """The other checks mean what they say about the network."""
    interfaces = python(podman, "import os; print(*os.listdir('/sys/class/net'))")
    expect(interfaces == ["lo"], f"interfaces {interfaces}")
    return "all of the above ran with the loopback interface alone"


def integers(podman: Podman) -> str:
    """The frozen maps as ONNX Runtime dequantizes them in the image are, bit for bit, numpy's scale · integer here."""
    import onnx
    from onnx import helper, numpy_helper

    graph = onnx.load(str(REPOSITORY / "models/digits_deit.onnx")).graph
    constants = {item.name: item for item in graph.initializer}
    maps = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    expected = []
    for node in maps:
        codes, scales = (numpy_helper.to_array(constants[name]) for name in node.input[:2])
        expected.append(hashlib.sha256((codes.astype("float32") * scales[:, None]).tobytes()).hexdigest())
    outputs = [helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None) for node in maps]
    kept = [constants[name] for node in maps for name in node.input]
    small = helper.make_model(
        helper.make_graph(maps, "maps", [], outputs, kept), opset_imports=[helper.make_opsetid("", 17)], ir_version=10
    )
    with TemporaryDirectory(dir=podman.folder) as name:
        Path(name).chmod(0o755)
        onnx.save(small, f"{name}/maps.onnx")
        got = python(podman, _RUN_MAPS, "-v", f"{name}:/data:ro")
    expect(bool(expected) and got == expected, f"digests {got}, expected {expected}")
    return f"{len(maps)} constants of frozen maps dequantize to the same bits as here"


CHECKS: Final[dict[str, Callable[[Podman], str]]] = {
    "docker run IMAGE": default_alone,
    "read-only root, mounted folder": default_locked_down,
    "health check": health,
    "eamdeploy --version": version,
    "eamdeploy inspect": inspection,
    "wrong use": wrong_use,
    "frozen maps": integers,
    "TensorRT": tensorrt_request,
    "not root": not_root,
    "nothing needless": nothing_needless,
    "dependencies": dependencies,
    "no network": no_network,
}


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def passes(name: str, step: Callable[[Podman], str], podman: Podman) -> bool:
    """Whether `step` ended well; one line says so."""
    start = time.monotonic()
    try:
        said, passed = step(podman), True
    except (CheckFailed, BuildFailed) as err:
        said, passed = str(err), False
    except (OSError, ValueError, LookupError, ImportError) as err:  # what a check reads or needs is not there
        said, passed = f"{type(err).__name__}: {err}", False
    print(f"{'ok  ' if passed else 'FAIL'}  {name} ({time.monotonic() - start:.1f} s): {said}", flush=True)
    return passed


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch", choices=("amd64", "arm64"))
    parser.add_argument("--suite", choices=SUITES, default="bookworm", help="Debian or Ubuntu release of the base")
    parser.add_argument("--extras", nargs="*", default=[], choices=("trt", "jetson"), help="the Dockerfile's EXTRAS")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where bases and images are kept")
    options = parser.parse_args(arguments)
    podman = Podman(options.folder.resolve(), options.arch, options.suite, tuple(options.extras))
    try:
        passes("base", base, podman)
    except Unavailable as err:
        print(f"NOT CHECKED: the image can't be built or run on this machine: {err}")
        return 4
    if not passes("build", build, podman):
        return 1
    results = [passes(name, check, podman) for name, check in CHECKS.items()]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
