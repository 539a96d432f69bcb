"""Deploys vision transformers with frozen attention maps (EAM): checkpoint → ONNX → engine → measurements.

Every stage of the command line is a function here, imported when it is first used, so that a board without torch can
build, evaluate and profile:

    from eamdeploy import freeze, export, build_ort, evaluate, profile
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eamdeploy.pipeline.run import run as run
    from eamdeploy.stages.analyze import analyze as analyze
    from eamdeploy.stages.build_ort import build_ort as build_ort
    from eamdeploy.stages.build_trt import build_trt as build_trt
    from eamdeploy.stages.doctor import doctor as doctor
    from eamdeploy.stages.evaluate import evaluate as evaluate
    from eamdeploy.stages.export import export as export
    from eamdeploy.stages.freeze import freeze as freeze
    from eamdeploy.stages.inspect import inspect as inspect
    from eamdeploy.stages.pack import pack as pack
    from eamdeploy.stages.profile import profile as profile
    from eamdeploy.stages.recover import recover as recover
    from eamdeploy.stages.report import report as report

try:
    __version__ = metadata.version("eamdeploy")
except metadata.PackageNotFoundError:  # a copy of the source on the path of a machine that can't install
    __version__ = "not installed"

_STAGES = {
    "analyze": "eamdeploy.stages.analyze",
    "freeze": "eamdeploy.stages.freeze",
    "pack": "eamdeploy.stages.pack",
    "recover": "eamdeploy.stages.recover",
    "export": "eamdeploy.stages.export",
    "build_ort": "eamdeploy.stages.build_ort",
    "build_trt": "eamdeploy.stages.build_trt",
    "evaluate": "eamdeploy.stages.evaluate",
    "profile": "eamdeploy.stages.profile",
    "report": "eamdeploy.stages.report",
    "run": "eamdeploy.pipeline.run",
    "inspect": "eamdeploy.stages.inspect",
    "doctor": "eamdeploy.stages.doctor",
}

__all__ = [*_STAGES, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _STAGES:
        raise AttributeError(f"module 'eamdeploy' has no attribute {name!r}")
    return getattr(import_module(_STAGES[name]), name)
