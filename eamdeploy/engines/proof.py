"""Engines that were proved on another kind of processor are proved anew before they are used on this one.

FP32 differs by rounding between kinds of processors, INT8 by more where products saturate: so an engine in FP32 may run
without a second proof, one in fewer bits may not, unless the user says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from eamdeploy.artifacts.files import digest_file, is_file
from eamdeploy.devices.instructions import instruction_sets, products_saturate
from eamdeploy.engines.gate import check_against_reference
from eamdeploy.engines.manifest import Manifest, read_manifest
from eamdeploy.engines.ort.providers import PROVIDERS
from eamdeploy.engines.registry import open_runner
from eamdeploy.errors import ParityError
from eamdeploy.parity.gate import TOLERANCES, ParityReport, tolerance_of
from eamdeploy.parity.reference_set import ReferenceSet

_TO_ROUNDING = TOLERANCES["f32-engine"].name


def prove_here(
    engine: Path, threads: int | None = None, *, check: bool = True, note: Callable[[str], None]
) -> ParityReport | None:
    """What is known of the engine's parity on this kind of processor; None where that was not checked.

    An engine that was proved on another kind runs its reference set, if that lies beside it. Nothing is run for an
    engine that was proved on this kind, never was checked, computes on a GPU, or has no manifest.

    Args:
        threads: as for `open_runner`.
        check: whether to prove anew what was proved elsewhere.
        note: gets a line about what was done, or could not be.

    Raises:
        ParityError: the engine computes something else here; or it is in fewer bits than FP32, products may saturate
            here, and there is no reference set to prove that they don't.
        ConfigError, CheckpointError, EngineError, MissingDependency, DeviceError: as for `open_runner`.
    """
    manifest = read_manifest(engine)
    if manifest is None:
        return None
    here = instruction_sets()
    parity = manifest.parity
    if parity is None or _holds_here(manifest, parity, here):
        return parity
    to_rounding = parity.tolerance == _TO_ROUNDING
    elsewhere = f"{engine} was proved on {manifest.instructions or 'an unknown processor'}, this one is {here}"
    reference, reason = _reference_beside(engine, manifest) if check else (None, "the check was left out")
    if reference is not None:
        tolerance, loaded = tolerance_of(parity, str(engine)), ReferenceSet.load(reference)
        with open_runner(engine, threads) as runner:
            report = check_against_reference(
                runner, loaded, tolerance, f"{elsewhere}: build it again here with this version of eamdeploy, or "
            )
        note(f"{elsewhere}: proved here too, with {reference.name}")
        return report
    if to_rounding:
        note(f"{elsewhere}, and it was not proved here: {reason}. FP32 differs by rounding")
        return parity
    if check and products_saturate(here):
        raise ParityError(
            f"{elsewhere}, where products of INT8 may saturate, and it can't be proved here",
            expected="its reference set beside it",
            got=reason,
            hint="Copy the set there, build the engine again with this version of eamdeploy, or use --no-check.",
        )
    note(f"{elsewhere}, and it was not proved here: {reason}")
    return None


def _holds_here(manifest: Manifest, parity: ParityReport, here: str) -> bool:
    """Whether what was found where it was built holds on this machine, or says nothing about processors."""
    if manifest.backend == "trt" or PROVIDERS[manifest.provider].on_gpu:
        return True
    if manifest.instructions is None:  # an older manifest: only where its INT8 could be another function here
        return parity.tolerance == _TO_ROUNDING or not products_saturate(here)
    return manifest.instructions == here


def _reference_beside(engine: Path, manifest: Manifest) -> tuple[Path | None, str]:
    """The reference set that the engine was proved with, or why there is none."""
    if manifest.reference is None:  # an older manifest does not name it
        found = [path for path in _likely_references(engine) if is_file(path)]
        return (found[0], "") if found else (None, f"there is no {_likely_references(engine)[-1].name}")
    path = engine.with_name(manifest.reference.name)
    if not is_file(path):
        return None, f"there is no {path.name}"
    if digest_file(path) != manifest.reference.digest:
        return None, f"{path.name} is another set than it was proved with"
    return path, ""


def _likely_references(engine: Path) -> list[Path]:
    """For `x.int8.ort.onnx`: `x.int8.ort.reference.npz`, `x.int8.reference.npz`, `x.reference.npz`."""
    parts = engine.name.split(".")[:-1]
    return [engine.with_name(".".join([*parts[:count], "reference.npz"])) for count in range(len(parts), 0, -1)]
