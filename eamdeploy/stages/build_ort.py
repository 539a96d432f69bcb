"""The stage that builds an ONNX Runtime engine, under the parity gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eamdeploy.convert.ort_form import AS_EXPORTED, OrtForm
from eamdeploy.devices.provenance import usable_cores
from eamdeploy.engines.manifest import Manifest
from eamdeploy.engines.ort.providers import require_provider
from eamdeploy.engines.registry import load_backend
from eamdeploy.errors import ConfigError
from eamdeploy.observer import SILENT, Observer
from eamdeploy.parity.gate import reduced_tolerance
from eamdeploy.parity.reference_set import reference_path

if TYPE_CHECKING:
    from eamdeploy.convert.ranges import Calibration

from eamdeploy.stages.engine_inputs import read_reference, reference_file, with_cache


def build_ort(
    model: Path,
    output: Path,
    *,
    threads: int | None = None,
    forms: Sequence[OrtForm] = (AS_EXPORTED,),
    calibration: Calibration | None = None,
    reference: Path | None = None,
    check: bool = True,
    verify: bool = True,
    min_agreement: float | None = None,
    observer: Observer = SILENT,
) -> Manifest:
    """`output` is an ONNX Runtime engine that gives the model's reference logits; its manifest lies beside it.

    Args:
        threads: the engine's default number of threads; every usable core if None.
        forms: how the model is specialised, and which execution provider runs it, here and wherever the manifest goes
            along. Of several (see `candidates`) the fastest on this machine that passes the gate is kept, and the times
            of all in the manifest. A fused or an INT8 one needs the packages onnx and onnx-graphsurgeon here.
        calibration: images for static INT8; its ranges are kept beside the engine unless it names a cache.
        reference: the reference set; the one that `export` left beside the model if None.
        check: run the parity gate; without it the manifest says that the engine was not checked.
        verify: model and reference set must be the files that were exported together; False for one that was changed
            on purpose.
        min_agreement: with INT8, percent of the reference images that need the reference's first class; None for that
            of tolerance `reduced-engine`.

    Raises:
        ConfigError: a file can't be read or written, an option is of no use, or there is no reference set.
        CheckpointError: model or reference set was altered after the export, or they don't belong together.
        UnsupportedGraph: the model has nothing that a form would change.
        EngineError: ONNX Runtime can't load or run the model, or not on that provider.
        ParityError: the engine's logits are not the reference's; what was at `output` stays.
        MissingDependency: ONNX Runtime is not installed here, or has no such provider, or a package for the conversion.
        DeviceError: the provider's GPU can't be used.
    """
    load_backend("ort")
    from eamdeploy.stages import ort_forms

    if not forms:
        raise ConfigError("there is nothing to build", expected="at least one form", got="none")
    for form in forms:
        require_provider(form.provider)
    any_int8 = any(form.int8 for form in forms)
    if min_agreement is not None and not any_int8:
        raise ConfigError("an FP32 engine is held to FP32's noise", hint="Leave --min-agreement out, or use --int8.")
    if calibration is not None and not any_int8:
        raise ConfigError("calibration images are of use for INT8 alone", hint="Give --int8 too.")
    references = read_reference(model, reference, verify=verify) if check else None
    request = ort_forms.Request(
        model=model,
        output=output,
        threads=threads or usable_cores(),
        calibration=with_cache(calibration, output),
        reference=references,
        reduced=reduced_tolerance(min_agreement),
        reference_file=reference_file(reference or reference_path(model)) if check else None,
    )
    return ort_forms.build(request, forms, observer)
