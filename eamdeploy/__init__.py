"""Deploys vision transformers with frozen attention maps (EAM): checkpoint → ONNX → engine → measurements.

Every stage of the command line is a function here, imported when it is first used, so that a board without torch can
build, evaluate and profile:

    from eamdeploy import freeze, export, build_ort, evaluate, profile
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eamdeploy.build import build_ort as build_ort
    from eamdeploy.build import build_trt as build_trt
    from eamdeploy.diagnosis import doctor as doctor
    from eamdeploy.evaluation import evaluate as evaluate
    from eamdeploy.host.exporting import export as export
    from eamdeploy.host.freezing import analyze as analyze
    from eamdeploy.host.freezing import freeze as freeze
    from eamdeploy.host.freezing import pack as pack
    from eamdeploy.inspection import inspect as inspect
    from eamdeploy.pipeline import run as run
    from eamdeploy.profiling.profile import profile as profile
    from eamdeploy.reporting.report import report as report

try:
    __version__ = metadata.version("eamdeploy")
except metadata.PackageNotFoundError:  # a copy of the source on the path of a machine that can't install
    __version__ = "not installed"

_STAGES = {
    "analyze": "eamdeploy.host.freezing",
    "freeze": "eamdeploy.host.freezing",
    "pack": "eamdeploy.host.freezing",
    "export": "eamdeploy.host.exporting",
    "build_ort": "eamdeploy.build",
    "build_trt": "eamdeploy.build",
    "evaluate": "eamdeploy.evaluation",
    "profile": "eamdeploy.profiling.profile",
    "report": "eamdeploy.reporting.report",
    "run": "eamdeploy.pipeline",
    "inspect": "eamdeploy.inspection",
    "doctor": "eamdeploy.diagnosis",
}

__all__ = [*_STAGES, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _STAGES:
        raise AttributeError(f"module 'eamdeploy' has no attribute {name!r}")
    return getattr(import_module(_STAGES[name]), name)
