"""What an engine is built with besides its model: the reference set, and images for INT8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from eamdeploy.artifacts.files import digest_file, is_file
from eamdeploy.artifacts.onnx_files import digest_model
from eamdeploy.artifacts.records import printable
from eamdeploy.engines.manifest import ReferenceFile
from eamdeploy.errors import ConfigError
from eamdeploy.parity.reference_set import ReferenceSet, reference_path

if TYPE_CHECKING:
    from eamdeploy.convert.ranges import Calibration


def with_cache(calibration: Calibration | None, output: Path) -> Calibration | None:
    """The same with a file for the ranges, beside the engine if it names none."""
    if calibration is None or calibration.cache is not None:
        return calibration
    return replace(calibration, cache=output.with_name(f"{output.name}.ranges.json"))


def read_reference(model: Path, reference: Path | None, *, verify: bool) -> ReferenceSet:
    """The reference set that an engine of this model is checked with.

    Args:
        reference: its file; None for the file beside the model.
        verify: the set must be as it was written, and the model the one that it was written with.

    Raises:
        ConfigError: there is no such file.
        CheckpointError: the file is damaged, was altered, or belongs to another model.
    """
    path = reference_path(model) if reference is None else reference
    if not is_file(path):
        raise ConfigError(
            f"no reference set at {path}, so the engine can't be checked",
            hint="Copy it together with the model (export writes both), name it with --reference, or use --no-check.",
        )
    loaded = ReferenceSet.load(path, verify=verify)
    if verify:
        loaded.require_model(model, digest_model(model))
    return loaded


def reference_file(path: Path) -> ReferenceFile:
    """What a manifest says of the reference set at `path`, so that the engine can be proved anew.

    Raises:
        ConfigError: the file can't be read.
    """
    name = printable(path.name).replace("\\", "_")  # of a name that is no text, one that is never found again
    return ReferenceFile(name=name, digest=digest_file(path))
