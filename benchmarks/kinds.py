"""What each kind of frozen head costs and gains: whole maps, ranks 1 to 8, and auto.

Even images calibrate and recover, odd images measure. Each kind is frozen at one sparsity, alone
and with each recovery that is asked for. Accuracy is against the unfrozen model. For the times, all
engines and torch's own export are loaded together on ONNX Runtime CPU in FP32, and take turns in
mirrored sittings.

    B="python benchmarks/kinds.py --weights W.safetensors --data IMAGES --work build/kinds"
    $B -o kinds.json
    $B --recover none --no-times
    $B --forms

With `--forms`, each model also takes turns in the form that `build-ort --tune` finds to be the
fastest, INT8 included; its accuracy is then the engine's own. Without weights they are random,
which does for times alone.

Each step is kept in the folder `--work`: a run that was killed goes on, and a run without times
gives its checkpoints to one with times.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from kinds_show import Kinds, Row, table
from kinds_steps import PLAIN, RANKS, UNFROZEN, Plan, Steps, Variant, form_of
from passes import take_turns
from rich.console import Console
from study import Settings, Study, versions

from eamdeploy.artifacts.card import Freezing
from eamdeploy.artifacts.files import require_output
from eamdeploy.devices.machine import describe_machine
from eamdeploy.devices.provenance import usable_cores
from eamdeploy.host.model import RANDOM, ModelSpec
from eamdeploy.host.scoring import HEAD_IMAGES
from eamdeploy.profiling.timing import Schedule, Sittings, runs_of, speed_up, summarize
from eamdeploy.vocabulary import BITS, RECOVERY_METHODS

STOCK = "stock"


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    arguments = _parse()
    if arguments.output:
        require_output(arguments.output)
    settings = Settings(
        arguments.data,
        arguments.work,
        crop_pct=arguments.crop_pct,
        calibration_images=arguments.calibration_images,
        score_images=arguments.score_images,
        images=arguments.images,
    )
    weights = str(arguments.weights) if arguments.weights else RANDOM
    measured = measure(
        Study(ModelSpec(arguments.model, weights, arguments.model_kwargs), settings),
        Plan(
            arguments.sparsity,
            arguments.bits,
            arguments.batch if arguments.fixed_batch else None,
            arguments.threads,
        ),
        [
            Variant(kind, None if method == "none" else method)
            for kind in arguments.kinds
            for method in arguments.recover
        ],
        forms=arguments.forms,
        batch=arguments.batch,
        schedule=None if arguments.no_times else Schedule(min_seconds=arguments.seconds, sittings=arguments.sittings),
        note=lambda text: print(text, file=sys.stderr, flush=True),
    )
    Console(width=200).print(table(measured))
    if arguments.output:
        measured.write(arguments.output)


def measure(
    study: Study,
    plan: Plan,
    variants: Sequence[Variant],
    *,
    forms: bool,
    batch: int,
    schedule: Schedule | None,
    note: Callable[[str], None],
) -> Kinds:
    """A row for torch's export, one for the model with nothing frozen, and one for each variant;
    with `forms` all but the first twice.

    Args:
        batch: images of one inference.
        schedule: how long to measure; None leaves the times out.
        note: is told what is being done.

    Raises:
        EamDeployError: a step fails; those that were done before stay.
    """
    steps = Steps(study, plan, note)
    every = [
        (variant, tuned)
        for variant in dict.fromkeys([UNFROZEN, *variants])
        for tuned in ((False, True) if forms else (False,))
    ]
    rows = [Row(kind=STOCK, form="torch's export"), *(_row(steps, variant, tuned) for variant, tuned in every)]
    if schedule is not None:
        engines = [steps.stock, *(steps.engine(variant, tuned=tuned) for variant, tuned in every)]
        note(f"{study.spec.name}: {len(engines)} engines take turns")
        places = {each: number for number, each in enumerate(every, 1)}
        baselines = [None, *(places.get((Variant(PLAIN), tuned)) for _, tuned in every)]
        rows = _timed(rows, take_turns(engines, plan.threads, batch, schedule), baselines, batch)
    return Kinds(
        machine=describe_machine(),
        versions=versions(),
        model=study.spec.name,
        weights=study.spec.source,
        sparsity_asked=plan.sparsity,
        bits=plan.bits,
        calibration_images=len(study.settings.even.open().files),
        images=len(study.settings.odd.open().files),
        multiply_adds=steps.multiply_adds,
        timed=schedule is not None,
        threads=plan.threads,
        batch=batch,
        fixed_batch=plan.batch is not None,
        min_seconds=schedule.min_seconds if schedule else 0.0,
        sittings=schedule.sittings if schedule else 0,
        rows=rows,
    )


def _row(steps: Steps, variant: Variant, tuned: bool) -> Row:
    """Everything but the times."""
    freezing, found = steps.freezing(variant), steps.accuracy(variant, tuned=tuned)
    return Row(
        kind=variant.name,
        recovery=variant.recovery,
        form=form_of(steps.engine(variant, tuned=True)) if tuned else "as exported",
        heads=_heads(freezing),
        sparsity=freezing.sparsity,
        saved_percent=100 * steps.saved(freezing) / steps.multiply_adds,
        agreement=found.agreement,
        kl=found.kl,
        top1=found.top1,
    )


def _heads(freezing: Freezing) -> dict[str, int]:
    """How many heads are frozen to what, whole maps first."""
    ranks = [freezing.rank_of(path, head) for path, heads in freezing.heads.items() for head in heads]
    counts = sorted(Counter(rank or 0 for rank in ranks).items())
    return {f"rank {rank}" if rank else "whole": count for rank, count in counts}


def _timed(rows: Sequence[Row], times: Sittings, plain: Sequence[int | None], batch: int) -> list[Row]:
    """The rows with their times.

    Args:
        plain: for every row the number of the plain engine that it is set against; None for none.
    """

    def against(baseline: int | None, index: int) -> object:
        return None if baseline in (None, index) else speed_up(times, baseline, index)

    return [
        row.model_copy(
            update={
                "latency": summarize(runs_of(times, index), batch),
                "against_plain": against(plain[index], index),
                "against_stock": against(0, index),
            }
        )
        for index, row in enumerate(rows)
    ]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm name of a ViT, DeiT or Swin")
    parser.add_argument("--model-kwargs", type=json.loads, default={}, help="timm's arguments as JSON")
    parser.add_argument("--weights", type=Path, help="the model's weights; random ones by default")
    parser.add_argument("--data", type=Path, required=True, help="images; with labels there is a top-1 too")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps every step")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--bits", type=int, choices=BITS, default=4)
    parser.add_argument("--kinds", nargs="+", choices=RANKS, default=list(RANKS), help="whole maps, ranks, or auto")
    parser.add_argument("--recover", nargs="+", choices=("none", *RECOVERY_METHODS), default=["none", "solve"])
    parser.add_argument("--forms", action="store_true", help="also every model's fastest form (--tune)")
    parser.add_argument("--no-times", action="store_true", help="accuracy alone")
    parser.add_argument("--crop-pct", type=float, default=0.875, help="share that the centre crop keeps")
    parser.add_argument("--calibration-images", type=int, default=500, help="at most so many even images")
    parser.add_argument("--score-images", type=int, default=HEAD_IMAGES, help="of these, how many score the heads")
    parser.add_argument("--images", type=int, help="at most so many odd images; all by default")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of an engine")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--fixed-batch", action="store_true", help="export for this batch size alone")
    parser.add_argument("--seconds", type=float, default=10.0, help="time every engine for at least this long")
    parser.add_argument("--sittings", type=int, default=6, help="how often engines are loaded anew to time them")
    parser.add_argument("-o", "--output", type=Path, help="also write the measurements as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
