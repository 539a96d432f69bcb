"""Builds engines for ONNX Runtime: a model is opened as it will run, checked, and described."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eamdeploy.artifacts.files import digest_bytes, is_there
from eamdeploy.artifacts.onnx_files import ModelData, digest_model, model_bytes, read_model
from eamdeploy.artifacts.onnx_output import require_model_output
from eamdeploy.devices.clock import utc_now
from eamdeploy.devices.instructions import instruction_sets
from eamdeploy.devices.provenance import machine_summary, package_versions
from eamdeploy.engines.gate import check_against_reference
from eamdeploy.engines.manifest import Manifest
from eamdeploy.engines.ort.runner import ENGINE_SETTINGS, OrtRunner
from eamdeploy.errors import ConfigError
from eamdeploy.parity.gate import TOLERANCES, Tolerance
from eamdeploy.parity.reference_set import ReferenceSet
from eamdeploy.vocabulary import ProviderName


@dataclass(frozen=True)
class Checked:
    """An engine that was run and checked, not yet in place.

    Attributes:
        source: its bytes, or where its two files are staged.
    """

    source: bytes | Path
    manifest: Manifest


def read_source(model: Path, output: Path) -> ModelData:
    """The model, once it is sure that `output` can be the name of an engine of it.

    Raises:
        ConfigError: the model can't be read, or `output` is no `.onnx` or the model itself.
        CheckpointError: a file with its data is too short, or not in its folder.
    """
    if output.suffix != ".onnx":
        raise ConfigError(f"the engine can't be named {output}", expected="a name that ends in .onnx")
    if is_there(output) and is_there(model) and output.samefile(model):
        raise ConfigError(f"the engine would replace its model {model}", hint="Give -o another file name.")
    require_model_output(output, model)
    return read_model(model)


def check(
    engine: bytes | Path,
    name: str,
    output: Path,
    *,
    model_digest: str,
    threads: int,
    reference: ReferenceSet | None,
    tolerance: Tolerance = TOLERANCES["f32-engine"],
    settings: Mapping[str, str] = ENGINE_SETTINGS,
    provider: ProviderName = "cpu",
) -> Checked:
    """The engine was opened with its final settings and gives the reference's logits; nothing is written.

    Args:
        engine: its bytes, or where its two files are staged.
        name: what messages call it.
        output: where it is going to lie.
        model_digest: of what it was made of.
        threads: the engine's default number of threads, and those of the check.
        reference: images and logits of the model; None leaves the engine unchecked, and its manifest says so.
        tolerance: what the engine is held to.
        settings, provider: as for `OrtRunner`.

    Raises:
        EngineError, MissingDependency, DeviceError: the provider can't load or run it, or is not here.
        ParityError: its logits are not the reference's.
    """
    # from memory, where it is one file: nothing is on the disk before the gate
    with OrtRunner(engine, threads=threads, settings=settings, name=name, provider=provider) as runner:
        runner.infer(np.zeros((runner.io.batch or 1, *runner.io.input_shape[1:]), runner.io.dtype))
        parity = None if reference is None else check_against_reference(runner, reference, tolerance)
        return Checked(
            engine,
            Manifest(
                backend="ort",
                engine=output.name,
                engine_digest=digest_bytes(engine) if isinstance(engine, bytes) else digest_model(engine),
                engine_bytes=len(engine) if isinstance(engine, bytes) else model_bytes(engine),
                model_digest=model_digest,
                card=runner.card,
                batch=runner.io.batch,
                settings=dict(runner.settings),
                threads=threads,
                provider=provider,
                parity=parity,
                versions=package_versions(),
                machine=machine_summary(),
                created=utc_now(),
                instructions=instruction_sets(),
            ),
        )
