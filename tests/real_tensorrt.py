"""The real modules of TensorRT, to look at their attributes on a machine without a GPU.

    python tests/real_tensorrt.py FOLDER

fetches NVIDIA's wheels from the package index (8.6.0 whole, of newer versions the bindings alone), unpacks them there
and makes stand-ins for the libraries that they are linked against: every function in those returns 0, so modules can
be imported, and nothing in them can be used. Needs CPython 3.10 (the only one that 8.6.0 is made for), gcc and nm.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Release:
    """A wheel: what pip calls it, its module, and the generation of our fakes that it belongs to."""

    generation: str
    requirement: str
    module: str


RELEASES = (
    Release("8.6", "tensorrt==8.6.0", "tensorrt"),
    Release("10.3", "tensorrt_cu12_bindings==10.3.0", "tensorrt_bindings"),
    Release("11.4", "tensorrt_cu13_bindings==11.4.0.106", "tensorrt_bindings"),
)

_DUMP = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1])
attributes = {
    name: [each for each in dir(value) if not each.startswith("_")]
    for name, value in vars(trt).items() if isinstance(value, type)
}
json.dump({"version": trt.__version__, "attributes": attributes}, sys.stdout)
"""


def find_python310() -> Path | None:
    """A CPython 3.10 that runs: $PY310, pyenv's, or the one on the path."""
    known = [os.environ.get("PY310"), *sorted(Path.home().glob(".pyenv/versions/3.10.*/bin/python3.10"))]
    for candidate in (*known, shutil.which("python3.10")):
        if candidate:
            done = subprocess.run([candidate, "-c", ""], capture_output=True, check=False)
            if done.returncode == 0:
                return Path(candidate)
    return None


def folder_of(folder: Path, release: Release) -> Path:
    return folder / release.generation


def prepare(folder: Path, release: Release, python: Path) -> None:
    """The wheel is unpacked, with its stand-ins, below `folder`; does nothing if it is there already."""
    target = folder_of(folder, release)
    if (target / "done").exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    fetch: list[str | Path] = [
        python,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        target,
        release.requirement,
    ]
    subprocess.run(fetch, check=True)
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        # the library of kernels is most of it, and only building needs it
        archive.extractall(target, [name for name in archive.namelist() if "builder_resource" not in name])
    wheel.unlink()
    for library, symbols in _missing(target / release.module).items():
        _make_library(target / "stand-ins" / library, symbols)
    (target / "done").touch()


def attributes(folder: Path, release: Release, python: Path) -> dict[str, list[str]]:
    """The public attributes of every class of the real module."""
    place = folder_of(folder, release)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))},
        "LD_LIBRARY_PATH": str(place / "stand-ins"),
        "PYTHONPATH": str(place),
    }
    done = subprocess.run(
        [python, "-c", _DUMP, release.module], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{release.requirement} can't be imported: {done.stderr[-500:]}")
    found: dict[str, list[str]] = json.loads(done.stdout)["attributes"]
    return found


def _missing(package: Path) -> dict[str, set[str]]:
    """Functions by library that the package's libraries want and that neither it nor the system has."""
    own = {path.name for path in package.rglob("*.so*")}
    missing: dict[str, set[str]] = {}
    for path in package.rglob("*.so*"):
        needed = _output("readelf", "-d", path)
        wanted = [name for name in re.findall(r"NEEDED.*\[(lib(?:cublas|cudnn|nv)[^]]*)\]", needed) if name not in own]
        missing.update({name: missing.get(name, set()) for name in wanted})
        for name, library in re.findall(r" U (\w+)(?:@+(\S+))?", _output("nm", "-D", path)):
            if library in missing:
                missing[library].add(name)
            elif (
                not library
                and wanted
                and re.search(r"INTERNAL$|PluginRegistry$|NvInferPlugins$|^getNv|^getInfer", name)
            ):
                for each in wanted:  # the linker does not say which has it
                    missing[each].add(name)
    return missing


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _make_library(path: Path, symbols: set[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    source, versions = path.with_suffix(".c"), path.with_suffix(".map")
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in sorted(symbols)) or "int none;\n")
    versions.write_text(f"{path.name} {{ global: *; }};\n")
    options = ["-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{path.name}", f"-Wl,--version-script={versions}"]
    subprocess.run(["gcc", *options, "-o", path, source], check=True)


def main(folder: Path) -> int:
    python = find_python310()
    if python is None:
        sys.stderr.write("no CPython 3.10 found: set PY310\n")
        return 4
    for release in RELEASES:
        prepare(folder, release, python)
        sys.stdout.write(f"{release.requirement}: {len(attributes(folder, release, python))} classes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
