"""The stage that turns an ONNX model into an engine, under the parity gate."""

from __future__ import annotations

from pathlib import Path

from eamdeploy.engines.base import Manifest
from eamdeploy.engines.provenance import usable_cores
from eamdeploy.engines.registry import load_backend
from eamdeploy.errors import ConfigError
from eamdeploy.parity import ReferenceSet, reference_path


def build_ort(
    model: Path, output: Path, *, threads: int | None = None, reference: Path | None = None, check: bool = True
) -> Manifest:
    """`output` is an ONNX Runtime engine that gives the model's reference logits; its manifest lies beside it.

    Args:
        threads: the engine's default number of threads; every usable core if None.
        reference: the reference set; the one that `export` left beside the model if None.
        check: run the parity gate; without it the manifest says that the engine was not checked.

    Raises:
        ConfigError: a file can't be read or written, or there is no reference set.
        EngineError: ONNX Runtime can't load or run the model.
        ParityError: the engine's logits are not the reference's; what was at `output` stays.
        MissingDependency: ONNX Runtime is not installed here.
    """
    load_backend("ort")
    from eamdeploy.engines import ort

    references = _reference(model, reference) if check else None
    return ort.build(model, output, threads=threads or usable_cores(), reference=references)


def _reference(model: Path, reference: Path | None) -> ReferenceSet:
    path = reference_path(model) if reference is None else reference
    if not path.is_file():
        raise ConfigError(
            f"no reference set at {path}, so the engine can't be checked",
            hint="Copy it together with the model (export writes both), name it with --reference, or use --no-check.",
        )
    return ReferenceSet.load(path)
