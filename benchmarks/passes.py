"""What each exact rewrite of an export is worth by itself, on ONNX Runtime CPU.

The model is exported with all passes, once more without each of them, without any, and as torch writes it. Every file
but the last is proved against the reference forward before it is timed, so that no pass leans on another to be exact.
All engines take turns in mirrored sittings.

    python benchmarks/passes.py --weights W.safetensors --data IMAGES -o passes.json
    python benchmarks/passes.py --model swin_tiny_patch4_window7_224 --markdown passes.md
    python benchmarks/passes.py --exporter torchscript --only static_shapes add_position

A pass that others depend on is left out with these, and set against the model without these alone, which has it: that
is its own worth. fold_preprocess takes pixels: what normalizing them outside takes is not in the other side's time.
Without weights and images they are random, which does for latency.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from pass_variants import ALL, Pair, Subject, Variant, make_variants, pairs
from passes_show import Passes, PassRow, Side, markdown, table
from rich.console import Console

from eamdeploy.artifacts.files import require_output, write_bytes
from eamdeploy.devices.machine import describe_machine
from eamdeploy.devices.provenance import package_versions, usable_cores
from eamdeploy.engines.registry import open_runner
from eamdeploy.host.model import RANDOM, ModelSpec
from eamdeploy.passes.order import SWITCHABLE
from eamdeploy.profiling.timing import (
    Schedule,
    Sittings,
    runs_of,
    speed_up,
    summarize,
    time_sittings,
)
from eamdeploy.profiling.turns import taking_turns


def main() -> None:
    """Print the table, and write it as JSON and Markdown where asked."""
    arguments = _parse()
    for file in (arguments.output, arguments.markdown):
        if file is not None:
            require_output(file)
    subject = Subject(
        spec=ModelSpec(arguments.model, str(arguments.weights) if arguments.weights else RANDOM),
        data=arguments.data,
        sparsity=arguments.sparsity,
        exporter=arguments.exporter,
        opset=arguments.opset,
        batch=arguments.batch if arguments.fixed_batch else None,
    )
    schedule = Schedule(min_seconds=arguments.seconds, sittings=arguments.sittings)
    measured = measure(
        subject,
        arguments.only,
        arguments.threads,
        arguments.batch,
        schedule,
        note=lambda text: print(text, file=sys.stderr),
    )
    Console(width=160).print(table(measured))
    if arguments.output:
        measured.write(arguments.output)
    if arguments.markdown:
        write_bytes(arguments.markdown, markdown(measured).encode())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm name of a ViT, DeiT or Swin")
    parser.add_argument("--weights", type=Path, help="the model's weights; random ones by default")
    parser.add_argument("--data", type=Path, help="folder of calibration images; noise by default")
    parser.add_argument("--sparsity", type=float, default=0.0, help="share of attention that is frozen")
    parser.add_argument("--only", nargs="+", choices=SWITCHABLE, default=list(SWITCHABLE), help="these passes alone")
    parser.add_argument("--exporter", choices=("auto", "dynamo", "torchscript"), default="auto")
    parser.add_argument("--opset", type=int, default=18, help="18 is the first that both of torch's exporters write")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--fixed-batch", action="store_true", help="export for this batch size alone")
    parser.add_argument("--seconds", type=float, default=10.0, help="time every engine for at least this long")
    parser.add_argument("--sittings", type=int, default=6, help="how often engines are loaded anew to time them")
    parser.add_argument("-o", "--output", type=Path, help="also write the measurements as JSON")
    parser.add_argument("--markdown", type=Path, help="also write the table as Markdown")
    return parser.parse_args()


def measure(
    subject: Subject, passes: Sequence[str], threads: int, batch: int, schedule: Schedule, note: Callable[[str], None]
) -> Passes:
    """A row for each of `passes` and for all together.

    Args:
        note: is told what is being done.

    Raises:
        EamDeployError: an engine can't be made, or does not compute what the model does.
    """
    rows = pairs(passes)
    with tempfile.TemporaryDirectory() as folder:
        setups = [setup for pair in rows for setup in (pair.before, pair.after)]
        variants = make_variants(subject, setups, threads, Path(folder), note)
        engines = list(dict.fromkeys(variant.engine for variant in variants.values()))
        note(f"{subject.spec.name}: {len(engines)} engines take turns")
        times = take_turns(engines, threads, batch, schedule)

    def side(variant: Variant) -> Side:
        latency = summarize(runs_of(times, engines.index(variant.engine)), batch)
        return Side(nodes=variant.nodes, multiply_adds=variant.multiply_adds, latency=latency)

    def row(pair: Pair) -> PassRow:
        before, after = variants[pair.before], variants[pair.after]
        numbers = (engines.index(before.engine), engines.index(after.engine))
        worth = None if before.graph == after.graph else speed_up(times, *numbers)
        return PassRow(name=pair.name, absent=pair.absent, before=side(before), after=side(after), worth=worth)

    return Passes(
        machine=describe_machine(),
        versions=package_versions(),
        model=subject.spec.name,
        weights=subject.spec.source,
        sparsity=subject.sparsity,
        exporter=variants[ALL].exporter,
        opset=subject.opset,
        fixed_batch=subject.batch is not None,
        threads=threads,
        batch=batch,
        min_seconds=schedule.min_seconds,
        sittings=schedule.sittings,
        rows=[row(pair) for pair in rows],
    )


def take_turns(engines: Sequence[Path], threads: int, batch: int, schedule: Schedule) -> Sittings:
    """The times of all engines in turns; the stage `profile` measures likewise, against one baseline alone."""
    opening = [partial(open_runner, engine, threads) for engine in engines]
    return time_sittings(taking_turns(opening, batch), len(engines), schedule)


if __name__ == "__main__":
    main()
