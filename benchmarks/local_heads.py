"""Would frozen heads that look at few neighbours be faster as convolutions than as products?

Two questions, each with its table. How much faster or slower is a K × K convolution over the patches than the product
with the N × N map, in FP32 on ONNX Runtime CPU, with all that each needs around it (see `local_graphs`)? And how near
would such a convolution come to the frozen maps of a checkpoint?

    python benchmarks/local_heads.py -o local.json
    python benchmarks/local_heads.py --checkpoint x.eam.safetensors --no-times

The first table: several layers in one run, all forms in turns in mirrored sittings; before they
are timed, each is compared with its map. `scaled` says whether each patch's result is multiplied
with a factor of its own, without which the rows of patches at the border would not sum to 1.

The second table: of what patches give to patches, the share that lies in the best K² offsets, and
in the best box of K × K offsets; and the error ‖F − G‖ ÷ ‖F‖ over the rows of patches. In the maps
G, what tokens without a place get is exact, and every patch has its own weights in that box, or all
have the same kernel.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from local_graphs import FORMS, Form, LocalHeads, conv_graph, drawn, map_graph
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from eamdeploy.artifacts.files import require_output
from eamdeploy.artifacts.records import Record
from eamdeploy.devices.machine import Machine, describe_machine
from eamdeploy.devices.provenance import package_versions, usable_cores
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.errors import ConfigError, ParityError
from eamdeploy.host.reference import load_reference
from eamdeploy.parity.gate import TOLERANCES
from eamdeploy.profiling.timing import Call, Schedule, SpeedUp, runs_of, speed_up, time_sittings

LAYERS = 8  # in one run, so that starting a run costs little beside them
_STEPS = 20


class Timed(Record):
    """A convolution in place of a product with a map.

    Attributes:
        tokens, heads, kernel: N, F and K.
        scaled: whether rows at the border are scaled too.
        map_ms, conv_ms: medians of one layer.
        speed_up: the product's time ÷ the convolution's.
    """

    tokens: int
    heads: int
    kernel: int
    form: Form
    scaled: bool
    map_ms: float
    conv_ms: float
    speed_up: SpeedUp


class Head(Record):
    """How local a frozen map is, for one K.

    Attributes:
        to_patches: share of what the patches' rows hold that goes to patches.
        offsets, box: of that, the shares of the best K² offsets and of the best box of K × K.
        own_error, kernel_error: ‖F − G‖ ÷ ‖F‖ with weights of each patch's own, and with one kernel.
    """

    path: str
    head: int
    kernel: int
    to_patches: float
    offsets: float
    box: float
    own_error: float
    kernel_error: float


class Local(Record):
    """All that was measured, and how.

    Attributes:
        checkpoint: the model's timm name; None where none was given.
        timed: empty where times were left out.
        heads: of the checkpoint; empty without one.
    """

    machine: Machine
    versions: dict[str, str]
    threads: int
    head_dim: int
    layers: int
    min_seconds: float
    sittings: int
    checkpoint: str | None
    timed: list[Timed]
    heads: list[Head]


def main() -> None:
    """Print the tables, and write them as JSON where asked."""
    arguments = _parse()
    if arguments.output:
        require_output(arguments.output)
    model, heads = (None, []) if arguments.checkpoint is None else look(arguments.checkpoint, arguments.kernels)
    schedule = Schedule(min_seconds=arguments.seconds, sittings=arguments.sittings)
    timed: list[Timed] = []
    if not arguments.no_times:
        for grid in arguments.grids:
            for count in arguments.heads:
                timed += measure(grid, count, arguments.head_dim, arguments.kernels, arguments.threads, schedule)
    found = Local(
        machine=describe_machine(),
        versions=package_versions(),
        threads=arguments.threads,
        head_dim=arguments.head_dim,
        layers=LAYERS,
        min_seconds=schedule.min_seconds,
        sittings=schedule.sittings,
        checkpoint=model,
        timed=timed,
        heads=heads,
    )
    console = Console(width=140)
    for shown in tables(found):
        console.print(shown)
    if arguments.output:
        found.write(arguments.output)


def measure(
    grid: int, heads: int, head_dim: int, kernels: Sequence[int], threads: int, schedule: Schedule
) -> list[Timed]:
    """Each form of so many heads over `grid` × `grid` patches and a class token, against the map.

    Raises:
        ParityError: a form does not compute what its map does.
    """
    rng = np.random.default_rng(0)
    tokens = 1 + grid**2
    values = [rng.standard_normal((1, tokens, heads * head_dim)).astype(np.float32) for _ in range(LAYERS)]
    plans: list[tuple[int, Form, bool]] = []
    graphs: list[onnx.ModelProto] = []
    for kernel in kernels:
        for scaled in (False, True):
            layers = [drawn(rng, heads, grid, kernel, scaled=scaled) for _ in range(LAYERS)]
            if not graphs:  # a product takes as long whatever the map holds
                graphs.append(map_graph(layers, head_dim))
                _check(graphs[0], layers, values, threads, "the product")
            for form in FORMS:
                graphs.append(conv_graph(layers, head_dim, form))
                _check(graphs[-1], layers, values, threads, f"{form}, {kernel} × {kernel}, {tokens} tokens")
                plans.append((kernel, form, scaled))

    @contextmanager
    def load(order: Sequence[int]) -> Iterator[list[Call]]:
        sessions = {index: _session(graphs[index], threads) for index in order}
        yield [partial(_run, sessions[index], values) for index in range(len(graphs))]

    times = time_sittings(load, len(graphs), schedule)
    medians = [float(np.median(runs_of(times, index))) / 1e6 / LAYERS for index in range(len(graphs))]
    return [
        Timed(
            tokens=tokens,
            heads=heads,
            kernel=kernel,
            form=form,
            scaled=scaled,
            map_ms=medians[0],
            conv_ms=medians[index],
            speed_up=speed_up(times, 0, index),
        )
        for index, (kernel, form, scaled) in enumerate(plans, 1)
    ]


def _check(
    graph: onnx.ModelProto, layers: Sequence[LocalHeads], values: Sequence[NDArray[np.float32]], threads: int, what: str
) -> None:
    tolerance = TOLERANCES["f32-reassoc"].max_abs
    for layer, given, got in zip(layers, values, _run(_session(graph, threads), values), strict=True):
        by_head = given.reshape(given.shape[1], len(layer.kernel), -1).swapaxes(0, 1)
        expected = (layer.maps() @ by_head).swapaxes(0, 1).reshape(given.shape)
        worst = float(np.abs(got - expected).max())
        if not worst <= tolerance:
            raise ParityError(f"{what} does not compute what the map does", expected=f"within {tolerance}", got=worst)


def _session(graph: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # as in every session of `OrtRunner`
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run(session: onnxruntime.InferenceSession, values: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    return session.run(None, {given.name: value for given, value in zip(session.get_inputs(), values, strict=True)})


def look(path: Path, kernels: Sequence[int]) -> tuple[str, list[Head]]:
    """The timm name of a checkpoint, and how local its heads are that are frozen to whole maps.

    Raises:
        ConfigError: it has windows, parts of heads alone, no head with a whole map, or no such grid.
        CheckpointError: it is damaged.
    """
    loaded = checkpoints.load(path)
    header = loaded.header
    windows = any(shape.windows is not None for shape in header.attention.values())
    if windows or header.freezing.granularity != "head" or not loaded.frozen:
        raise ConfigError(f"{path} has no maps over all patches", expected="whole heads of a ViT, frozen to maps")
    model = load_reference(loaded, frozen=False, where=str(path)).model
    grid, prefix = tuple(model.patch_embed.grid_size), model.num_prefix_tokens
    if max(kernels) > min(grid):
        raise ConfigError("that kernel is larger than the patches' grid", expected=f"at most {min(grid)}", got=kernels)
    return header.timm_model, [
        locality(module, head, map_.astype(np.float64), grid, prefix, kernel)
        for module, frozen in loaded.frozen.items()
        for head, map_ in zip(frozen.heads.tolist(), frozen.maps(header.freezing.quantizer), strict=True)
        for kernel in kernels
    ]


def locality(path: str, head: int, map_: NDArray[np.float64], grid: tuple[int, int], prefix: int, kernel: int) -> Head:
    """How local a map `[N, N]` is whose tokens are `prefix` others and then the patches, row by row."""
    rows = map_[prefix:]
    among = by_offset(rows[:, prefix:], grid)
    inside = by_offset(np.ones_like(rows[:, prefix:]), grid) > 0
    total = among.sum()
    mass = among.sum(axis=0) / total
    boxes = np.lib.stride_tricks.sliding_window_view(mass, (kernel, kernel)).sum(axis=(2, 3))
    top, left = np.unravel_index(int(boxes.argmax()), boxes.shape)
    box = np.zeros_like(mass, dtype=bool)
    box[top : top + kernel, left : left + kernel] = True
    shared = _one_kernel(among, inside & box)
    norm = float(np.linalg.norm(rows))
    return Head(
        path=path,
        head=head,
        kernel=kernel,
        to_patches=float(total / rows.sum()),
        offsets=float(np.sort(mass, axis=None)[-(kernel**2) :].sum()),
        box=float(boxes.max()),
        own_error=float(np.linalg.norm(among[:, ~box])) / norm,
        kernel_error=float(np.linalg.norm(among - shared)) / norm,
    )


def _one_kernel(among: NDArray[np.float64], near: NDArray[np.bool_]) -> NDArray[np.float64]:
    """scale[i] · kernel[offset] where `near`, which has the row sums of `among` and is close to it.

    Kernel and scales follow from each other in turns: the kernel by least squares, the scales from
    the sums.
    """
    sums = among.sum(axis=(1, 2), keepdims=True)
    scale, found = np.ones_like(sums), np.zeros_like(among)
    for _ in range(_STEPS):
        weight = (near * scale**2).sum(axis=0)
        kernel = (among * near * scale).sum(axis=0) / np.where(weight > 0, weight, 1)
        found = near * kernel
        reached = found.sum(axis=(1, 2), keepdims=True)
        scale = np.divide(sums, reached, out=np.zeros_like(sums), where=reached > 0)
    result: NDArray[np.float64] = found * scale
    return result


def by_offset(among: NDArray[np.float64], grid: tuple[int, int]) -> NDArray[np.float64]:
    """What each patch gives to the patch that lies y rows below and x columns right of it.

    Args:
        among: [g·h, g·h], of patches in a grid [g, h].

    Returns:
        [g·h, 2g − 1, 2h − 1], y = x = 0 in the middle, 0 where no patch lies.
    """
    height, width = grid
    found = np.zeros((len(among), 2 * height - 1, 2 * width - 1))
    for query, weights in enumerate(among):
        top, left = height - 1 - query // width, width - 1 - query % width
        found[query, top : top + height, left : left + width] = weights.reshape(grid)
    return found


def tables(found: Local) -> list[Table]:
    """Those of the two that there is something for."""
    shown = []
    if found.timed:
        table = _table(
            f"{found.machine.cpu}, {found.threads} threads, heads of {found.head_dim} channels",
            (
                "tokens",
                "heads",
                "kernel",
                "form",
                "scaled",
                "map, ms",
                "conv, ms",
                "map ÷ conv (95 % interval)",
                "conv is",
            ),
        )
        for row in found.timed:
            gain = row.speed_up
            table.add_row(
                *(str(row.tokens), str(row.heads), str(row.kernel), row.form, "yes" if row.scaled else "no"),
                *(f"{row.map_ms:.3f}", f"{row.conv_ms:.3f}"),
                *(f"{gain.median:.3f}× ({gain.low:.3f}–{gain.high:.3f})", gain.verdict),
            )
        shown.append(table)
    if found.heads:
        table = _table(
            f"frozen maps of {found.checkpoint}",
            (
                "module",
                "head",
                "kernel",
                "to patches",
                "best offsets",
                "best box",
                "error, own weights",
                "error, one kernel",
            ),
        )
        for head in found.heads:
            shares = (head.to_patches, head.offsets, head.box, head.own_error, head.kernel_error)
            table.add_row(head.path, str(head.head), str(head.kernel), *(f"{100 * share:.1f} %" for share in shares))
        shown.append(table)
    return shown


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in ("form", "module", "conv is") else "right")
    return table


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="how local are this model's frozen maps?")
    parser.add_argument("--no-times", action="store_true", help="the checkpoint alone")
    parser.add_argument("--grids", type=int, nargs="+", default=[14, 24], help="g of g × g patches")
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 3, 6], help="of one layer")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--kernels", type=int, nargs="+", choices=range(1, 100, 2), metavar="K", default=[3, 5, 7])
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--seconds", type=float, default=1.0, help="time every form for at least this long")
    parser.add_argument("--sittings", type=int, default=6, help="how often sessions are loaded anew for that")
    parser.add_argument("-o", "--output", type=Path, help="also write the measurements as JSON")
    arguments = parser.parse_args()
    if arguments.no_times and arguments.checkpoint is None:
        parser.error("--no-times needs --checkpoint")
    return arguments


if __name__ == "__main__":
    main()
