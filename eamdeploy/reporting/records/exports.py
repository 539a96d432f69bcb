"""What `export` recorded, as the plain figures that a report shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from eamdeploy.profiling.timing import SpeedUp
from eamdeploy.reporting import numbers
from eamdeploy.reporting.records.sources import Sources

if TYPE_CHECKING:
    from eamdeploy.records.export import Export, ExportedModel


@dataclass(frozen=True)
class Exported:
    """A frozen model in ONNX and, where it was written, its unfrozen twin.

    Attributes:
        digest: SHA-256 of the frozen model.
        bytes, twin_bytes: of the files.
        graph: what became of the graph, in words; `twin_graph` likewise.
        gain: against the twin, timed at export on `gain_place`.
    """

    file: str
    model: str
    digest: str
    bytes: int
    graph: str
    twin: str | None
    twin_bytes: int | None
    twin_graph: str | None
    gain: SpeedUp | None
    gain_place: str | None


def exported(sources: Sources) -> list[Exported]:
    """One for each record of `export`."""
    from eamdeploy.records.export import Export

    return [_exported(item.file, item.record) for item in sources.of(Export)]


def _exported(file: str, record: Export) -> Exported:
    frozen, twin, gain = record.frozen, record.baseline, record.gain
    return Exported(
        file=file,
        model=frozen.file,
        digest=frozen.digest,
        bytes=frozen.bytes,
        graph=_graph(frozen),
        twin=None if twin is None else twin.file,
        twin_bytes=None if twin is None else twin.bytes,
        twin_graph=None if twin is None else _graph(twin),
        gain=None if gain is None else gain.speed_up,
        gain_place=None if gain is None else f"{gain.machine}; ONNX Runtime, {numbers.plural(gain.threads, 'thread')}",
    )


def _graph(model: ExportedModel) -> str:
    worst = "not finite" if model.parity.max_abs is None else numbers.scientific(model.parity.max_abs)
    return (
        f"{model.nodes_stock} nodes by torch's {model.exporter} exporter, {model.nodes} after "
        f"{', '.join(model.rewrites)}; max |Δ logit| {worst} to torch on {model.parity.n} images"
    )
