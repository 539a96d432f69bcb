"""Everything that a report says, in the order in which it says it; the page and the Markdown are two forms of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from eamdeploy.eam.analysis import Analysis
from eamdeploy.engines.manifest import Manifest
from eamdeploy.records.evaluation import EvaluationReport
from eamdeploy.reporting.prose.caveats import caveats
from eamdeploy.reporting.prose.command_line import Command
from eamdeploy.reporting.prose.reproduce import commands
from eamdeploy.reporting.records import heat_map
from eamdeploy.reporting.records.answers import Answers, answers
from eamdeploy.reporting.records.builds import Build, builds
from eamdeploy.reporting.records.engine_names import engine_names
from eamdeploy.reporting.records.exports import exported
from eamdeploy.reporting.records.heat_map import HeatMap
from eamdeploy.reporting.records.layers import LayerTimes
from eamdeploy.reporting.records.measurements import Measurement, measurements
from eamdeploy.reporting.records.reported_models import reported_models
from eamdeploy.reporting.records.sources import Sources
from eamdeploy.reporting.write import tables
from eamdeploy.reporting.write.tables import Table

_MOST_NAMES = 3  # of models in a title


@dataclass(frozen=True)
class Content:
    """A report.

    Attributes:
        accuracy, exports: None where the records have nothing of it.
        files: what it was made of, and what that is in words.
    """

    title: str
    answers: tuple[Answers, ...]
    caveats: tuple[str, ...]
    heat_maps: tuple[HeatMap, ...]
    accuracy: Table | None
    measurements: tuple[Measurement, ...]
    layers: tuple[LayerTimes, ...]
    builds: tuple[Build, ...]
    exports: Table | None
    versions: Table
    commands: tuple[Command, ...]
    files: tuple[tuple[str, str], ...]


def gather(sources: Sources, title: str | None = None) -> Content:
    """What the records say.

    Args:
        title: the models' names if None.
    """
    names = engine_names(sources)
    measured, written, built = measurements(sources, names), exported(sources), builds(sources)
    models = reported_models(sources, measured, written, names)
    evaluations = [item.record for item in sources.of(EvaluationReport)]
    return Content(
        title=_title([model.model for model in models]) if title is None else title,
        answers=tuple(answers(model, names) for model in models),
        caveats=tuple(caveats(sources, names)),
        heat_maps=(
            *(model.heat for model in models if model.heat is not None),
            *(drawn for item in sources.of(Analysis) for drawn in heat_map.of_analysis(item.record)),
        ),
        accuracy=tables.accuracy(evaluations, names) if evaluations else None,
        measurements=tuple(measured),
        layers=tuple(dict.fromkeys(_layers(built, measured))),
        builds=tuple(built),
        exports=tables.exports(written) if written else None,
        versions=tables.versions(_versions(sources)),
        commands=tuple(commands(sources)),
        files=tuple((item.file, item.kind) for item in sources.items),
    )


def _title(models: Sequence[str]) -> str:
    names = list(dict.fromkeys(models))
    if not names:
        return "eamdeploy"
    return ", ".join(names) if len(names) <= _MOST_NAMES else f"{len(names)} models"


def _layers(built: Sequence[Build], measured: Sequence[Measurement]) -> Iterator[LayerTimes]:
    """Those of an engine's manifest and then those of its profiles; at the end those of engines without a manifest."""
    profiled = [engine.layers for each in measured for engine in each.engines if engine.layers is not None]
    for build in built:
        if build.layers is not None:
            yield build.layers
        yield from (times for times in profiled if times.digest == build.digest)
    yield from profiled  # a second time counts as one


def _versions(sources: Sources) -> dict[str, dict[str, str]]:
    """Versions by the file that records them."""
    return {
        **{item.file: item.record.versions for item in sources.checkpoints},
        **{item.file: item.record.versions for item in sources.of(Analysis)},
        **{item.file: item.record.versions for item in sources.of(Manifest)},
        **{item.label: item.record.machine.versions for item in sources.profiles},
    }
