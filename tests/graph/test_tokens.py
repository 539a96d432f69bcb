from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from attention_graphs import EPSILON, GRID, HEIGHT, SCALE, WEIGHTS, WIDTH, B, D, GraphBuilder, N, Windows, ints, scalar

from eamdeploy.graph.model import to_graph
from eamdeploy.graph.skip import Skip
from eamdeploy.graph.tokens import TokenMove, behind_views, find_moves, is_tokenwise, is_view, token_gather

DYNAMIC = "batch"
T = GRID[0] * GRID[1]


def normed(g: GraphBuilder, tensor: str | None = None) -> str:
    """The tokens, computed token by token."""
    gain = np.linspace(0.5, 2, D).astype(np.float32)
    return g.op("LayerNormalization", tensor or g.x, gain, axis=-1, epsilon=EPSILON)


def found(g: GraphBuilder, target: str) -> list[TokenMove | Skip]:
    """The moves of a graph in which a Relu reads `target`."""
    return find_moves(to_graph(g.model({g.op("Relu", target): None, g.op("Relu", g.x): None})))


def only_move(g: GraphBuilder, target: str) -> TokenMove:
    (move,) = found(g, target)
    assert isinstance(move, TokenMove), move
    return move


# --- moves -----------------------------------------------------------------------------------------------------------

WINDOWS = {
    "partition": Windows(),
    "shifted": Windows(shift=(1, 2)),
    "padded": Windows((3, 5)),
    "shifted and padded": Windows((3, 5), (1, 1)),
}


@pytest.mark.parametrize("batch", [B, 1, DYNAMIC])
@pytest.mark.parametrize("kind", WINDOWS)
def test_partition_is_read_off_whatever_the_shift_and_the_padding(kind: str, batch: int | str) -> None:
    windows = WINDOWS[kind]
    g = GraphBuilder(batch, grid=windows.grid)
    source = normed(g)
    target = windows.partition(g, source)
    move = only_move(g, target)
    assert (move.source.name, move.target.name) == (source, target)
    np.testing.assert_array_equal(move.indices, windows.tokens())
    height, width = windows.grid
    assert (move.tokens, move.channels, move.is_identity) == (height * width, D, False)
    assert (move.source_shape, move.target_shape) == ((height * width, D), (N, D))
    assert {"Reshape", "Transpose"} <= set(move.ops) and ("Pad" in move.ops) == (windows.padded != windows.grid)


@pytest.mark.parametrize("kind", WINDOWS)
def test_reverse_is_the_partition_undone(kind: str) -> None:
    windows = WINDOWS[kind]
    g = GraphBuilder(DYNAMIC, grid=windows.grid)
    inside = normed(g, windows.partition(g, normed(g)))
    partition, reverse = found(g, windows.reverse(g, inside))
    assert isinstance(partition, TokenMove) and isinstance(reverse, TokenMove)
    np.testing.assert_array_equal(partition.indices[reverse.indices], np.arange(partition.tokens))
    assert reverse.tokens == len(partition.indices) and reverse.source.name == inside


def test_patch_merging_gathers_four_tokens_for_one() -> None:
    g = GraphBuilder(DYNAMIC, grid=GRID)
    height, width = GRID
    split = g.op("Reshape", normed(g), ints(-1, height // 2, 2, width // 2, 2, D))
    merged = g.op("Transpose", split, perm=[0, 1, 3, 4, 2, 5])
    move = only_move(g, g.op("Reshape", merged, ints(-1, height // 2, width // 2, 4 * D)))
    image = np.arange(T).reshape(GRID)
    corners = [image[i::2, j::2].reshape(-1) for j in (0, 1) for i in (0, 1)]
    np.testing.assert_array_equal(move.indices, np.stack(corners, axis=1).reshape(-1))
    assert move.target_shape == (height // 2, width // 2, 4 * D)


def test_chain_that_moves_nothing_is_the_identity() -> None:
    g = GraphBuilder(DYNAMIC, grid=GRID)
    image = g.op("Reshape", normed(g), ints(-1, *GRID, D))
    there = g.op("Transpose", image, perm=[0, 2, 1, 3])
    move = only_move(g, g.op("Transpose", there, perm=[0, 2, 1, 3]))
    assert move.is_identity and (move.source_shape, move.target_shape) == ((T, D), (*GRID, D))


def test_end_inside_a_longer_chain_is_a_move_of_its_own() -> None:
    g = GraphBuilder(DYNAMIC, grid=GRID)
    first = g.op("Gather", g.op("Reshape", normed(g), ints(-1, T, D)), ints(*reversed(range(T))), axis=1)
    read_here = g.op("Relu", first)
    moves = find_moves(to_graph(g.model({read_here: None, g.op("Relu", g.op("Reshape", first, ints(-1, N, D))): None})))
    assert [move.target_shape for move in moves if isinstance(move, TokenMove)] == [(T, D), (N, D)]


# --- near misses -----------------------------------------------------------------------------------------------------


def between_images(g: GraphBuilder) -> str:
    return g.op("Gather", g.op("Reshape", normed(g), ints(B, T, D)), ints(1, 0), axis=0)


def around_a_batch_in_the_middle(g: GraphBuilder) -> str:
    """[B,T,D] as [T,B,D]."""
    return g.op("Transpose", g.op("Reshape", normed(g), ints(B, T, D)), perm=[1, 0, 2])


def parts_of_tokens(g: GraphBuilder) -> str:
    halves = g.op("Transpose", g.op("Reshape", normed(g), ints(-1, T, 2, D // 2)), perm=[0, 2, 1, 3])
    return g.op("Reshape", halves, ints(-1, T, D))


def inside_tokens(g: GraphBuilder) -> str:
    channels = g.op("Reshape", normed(g), ints(-1, *GRID, D))
    return g.op("Slice", channels, ints(-1), ints(-D - 1), ints(3), ints(-1))


def half_of_each_token(g: GraphBuilder) -> str:
    return g.op("Slice", g.op("Reshape", normed(g), ints(-1, *GRID, D)), ints(0), ints(D // 2), ints(3))


def padded_with_ones(g: GraphBuilder) -> str:
    return g.op("Pad", g.op("Reshape", normed(g), ints(-1, *GRID, D)), ints(0, 0, 0, 0, 0, 1, 0, 0), scalar(1))


def half_a_token_padded(g: GraphBuilder) -> str:
    wide = g.op("Reshape", normed(g), ints(-1, 1, T * D))
    return g.op("Reshape", g.op("Pad", wide, ints(0, 0, D // 2, 0, 0, D // 2)), ints(-1, T + 1, D))


def an_image_of_zeros(g: GraphBuilder) -> str:
    return g.op("Pad", g.op("Reshape", normed(g), ints(-1, *GRID, D)), ints(0, 0, 0, 0, B, 0, 0, 0))


REFUSED: dict[Callable[[GraphBuilder], str], str] = {
    between_images: "parts of tokens, or between images",
    around_a_batch_in_the_middle: "parts of tokens, or between images",
    parts_of_tokens: "parts of tokens, or between images",
    half_a_token_padded: "parts of tokens, or between images",
    an_image_of_zeros: "parts of tokens, or between images",
    inside_tokens: "the order inside a token",
    half_of_each_token: "its chunks are no tokens of 10 values",
    padded_with_ones: "pads with something else than zeros",
}


@pytest.mark.parametrize("draw", REFUSED, ids=lambda draw: draw.__name__)
def test_what_moves_no_whole_tokens_inside_an_image_is_refused(draw: Callable[[GraphBuilder], str]) -> None:
    g = GraphBuilder(grid=GRID)
    target = draw(g)
    (skip,) = found(g, target)
    assert isinstance(skip, Skip) and REFUSED[draw] in skip.reason, skip
    assert skip.node == target


def test_tokens_of_all_images_side_by_side_are_refused_where_the_batch_is_dynamic() -> None:
    """[T,B,D] with tokens 0 and 1 swapped: for 2 images this looks like a move inside images of 24 tokens."""
    g = GraphBuilder(DYNAMIC, grid=GRID)
    tokens_first = normed(g, g.op("Relu", g.op("Transpose", normed(g), perm=[1, 0, 2])))
    swapped = g.op("Gather", g.op("Identity", tokens_first), ints(1, 0, *range(2, T)), axis=0)
    (skip,) = found(g, g.op("Unsqueeze", swapped, ints(3)))
    assert isinstance(skip, Skip) and skip.reason == "another axis than the first depends on the batch"


def class_token(g: GraphBuilder) -> str:
    """As ViT prepends it."""
    return g.op("Concat", np.ones((B, 1, D), np.float32), g.op("Reshape", normed(g), ints(B, T, D)), axis=1)


def two_sources(g: GraphBuilder) -> str:
    return g.op("Concat", g.op("Reshape", normed(g), ints(B, T, D)), g.op("Relu", g.x), axis=1)


def one_operator(g: GraphBuilder) -> str:
    return g.op("Gather", normed(g), ints(*reversed(range(T))), axis=1)


def behind_a_product_of_variables(g: GraphBuilder) -> str:
    product = g.op("MatMul", normed(g), g.op("Transpose", g.x, perm=[0, 2, 1]))
    return g.op("Transpose", g.op("Reshape", product, ints(-1, *GRID, T)), perm=[0, 2, 1, 3])


def behind_the_image(g: GraphBuilder) -> str:
    return g.op("Transpose", g.op("Reshape", "image", ints(-1, 3, T)), perm=[0, 2, 1])


@pytest.mark.parametrize(
    "draw",
    [class_token, two_sources, one_operator, behind_a_product_of_variables, behind_the_image],
    ids=lambda draw: draw.__name__,
)
def test_chains_of_several_sources_or_of_no_tokens_are_none(draw: Callable[[GraphBuilder], str]) -> None:
    g = GraphBuilder(grid=GRID)
    assert found(g, draw(g)) == []


# --- token by token --------------------------------------------------------------------------------------------------

GAIN = np.ones(D, np.float32)


def mean_of_tokens(g: GraphBuilder) -> str:
    """[D]."""
    return g.op("ReduceMean", g.x, axes=[0, 1], keepdims=0)


TOKENWISE: dict[str, tuple[bool, Callable[[GraphBuilder], str]]] = {
    "view": (True, lambda g: g.op("Reshape", g.x, ints(-1, *GRID, D))),
    "last axis by -1": (False, lambda g: g.op("Reshape", g.x, ints(B, T, -1))),
    "tokens cut": (False, lambda g: g.op("Reshape", g.x, ints(B, 2 * T, D // 2))),
    "computed shape": (False, lambda g: g.op("Reshape", g.x, g.op("Shape", g.op("Relu", g.x)))),
    "layer norm": (True, lambda g: g.op("LayerNormalization", g.x, GAIN, axis=-1)),
    "layer norm, axis counted": (True, lambda g: g.op("LayerNormalization", g.x, GAIN, axis=2)),
    "layer norm over tokens too": (
        False,
        lambda g: g.op("LayerNormalization", g.x, np.ones((T, D), np.float32), axis=1),
    ),
    "layer norm, gain computed": (
        False,
        lambda g: g.op("LayerNormalization", g.x, g.op("ReduceMean", g.x, axes=[0, 1], keepdims=0), axis=-1),
    ),
    "mean of channels": (True, lambda g: g.mean(g.x, -1)),
    "mean of channels, axis counted": (True, lambda g: g.mean(g.x, 2)),
    "mean of tokens": (False, lambda g: g.mean(g.x, 1)),
    "mean of channels without their axis": (False, lambda g: g.op("ReduceMean", g.x, axes=[2], keepdims=0)),
    "mean of all": (False, lambda g: g.op("ReduceMean", g.x)),
    "linear": (True, lambda g: g.op("MatMul", g.x, WEIGHTS.query.matrix)),
    "matrices per image": (False, lambda g: g.op("MatMul", g.x, np.ones((B, D, D), np.float32))),
    "tokens mixed": (False, lambda g: g.op("MatMul", np.ones((T, T), np.float32), g.x)),
    "product of variables": (False, lambda g: g.op("MatMul", g.x, g.op("Transpose", g.x, perm=[0, 2, 1]))),
    "bias": (True, lambda g: g.op("Add", g.x, GAIN)),
    "scale": (True, lambda g: g.op("Mul", scalar(SCALE), g.x)),
    "sum": (True, lambda g: g.op("Sub", g.x, g.op("Relu", g.x))),
    "positions": (False, lambda g: g.op("Add", g.x, np.ones((T, D), np.float32))),
    "power": (True, lambda g: g.op("Pow", g.x, scalar(2))),
    "erf": (True, lambda g: g.op("Erf", g.x)),
    "relu": (True, lambda g: g.op("Relu", g.x)),
    "softmax": (False, lambda g: g.op("Softmax", g.x, axis=1)),
    "transpose": (False, lambda g: g.op("Transpose", g.x, perm=[0, 2, 1])),
    "halves of a token": (True, lambda g: g.ops("Split", 2, g.x, ints(D // 2, D - D // 2), axis=-1)[1]),
    "halves of a token, axis counted": (True, lambda g: g.ops("Split", 2, g.x, ints(4, D - 4), axis=2)[0]),
    "half of the tokens": (False, lambda g: g.ops("Split", 2, g.x, ints(2, T - 2), axis=1)[0]),
    "halves of a batch": (False, lambda g: g.ops("Split", 2, g.x, ints(1, B - 1))[0]),
    "part of a token": (True, lambda g: g.op("Slice", g.x, ints(0), ints(4), ints(-1))),
    "part of a token, backwards": (True, lambda g: g.op("Slice", g.x, ints(-1), ints(0), ints(2), ints(-2))),
    "some of the tokens": (False, lambda g: g.op("Slice", g.x, ints(0), ints(4), ints(1))),
    "part of some of the tokens": (False, lambda g: g.op("Slice", g.x, ints(0, 0), ints(2, 4), ints(1, 2))),
    "part of the first axis": (False, lambda g: g.op("Slice", g.x, ints(0), ints(1))),
    "gather": (False, lambda g: g.op("Gather", g.x, ints(1, 0), axis=1)),
}


@pytest.mark.parametrize("name", TOKENWISE)
def test_table_of_what_treats_every_token_alike(name: str) -> None:
    expected, draw = TOKENWISE[name]
    g = GraphBuilder(grid=GRID)
    result = draw(g)
    graph = gs.import_onnx(g.model({result: None}))
    graph.tensors()[g.x].shape = [B, T, D]
    assert is_tokenwise(graph.tensors()[result].inputs[0]) == expected


@pytest.mark.parametrize("opset", [17, 18])
def test_axes_of_a_reduction_are_an_attribute_or_an_input(opset: int) -> None:
    g = GraphBuilder(opset=opset)
    channels, tokens = g.mean(g.x, -1), g.mean(g.x, 1)
    tensors = gs.import_onnx(g.model({channels: None, tokens: None})).tensors()
    assert is_tokenwise(tensors[channels].inputs[0]) and not is_tokenwise(tensors[tokens].inputs[0])


# --- gathers of tokens -----------------------------------------------------------------------------------------------


def gathered(*indices: int, axis: int = 1) -> gs.Graph:
    """A graph whose output `y` gathers tokens of x [B,N,D]."""
    g = GraphBuilder()
    graph = to_graph(g.model({g.op("Gather", g.x, ints(*indices), axis=axis): None}))
    graph.outputs[0].name = "y"
    return graph


@pytest.mark.parametrize(
    ("indices", "is_permutation"),
    [
        ((5, 4, 3, 2, 1, 0), True),
        ((0, 1, 2, 3, 4, 4), False),
        ((0, 1, 2), False),
        ((0, 1, 2, 3, 4, 5, 0), False),
        ((-1, 0, 1, 2, 3, 4), False),
    ],
)
def test_gather_is_a_permutation_if_every_token_occurs_once(indices: tuple[int, ...], is_permutation: bool) -> None:
    graph = gathered(*indices)
    gather = token_gather(graph.outputs[0].inputs[0])
    assert gather is not None and gather.indices.tolist() == list(indices)
    assert (gather.tokens, gather.is_permutation) == (N, is_permutation)


def test_other_gathers_are_none_of_tokens() -> None:
    for axis in (0, 2):
        assert token_gather(gathered(1, 0, axis=axis).outputs[0].inputs[0]) is None
    g = GraphBuilder()
    image = g.op("Reshape", g.x, ints(B, HEIGHT, WIDTH, D))
    others = [
        g.op("Gather", g.x, np.array(0), axis=1),
        g.op("Gather", g.x, np.array([[0, 1]]), axis=1),
        g.op("Gather", image, ints(1, 0), axis=1),
        g.op("Gather", g.x, g.op("ArgMax", g.op("ReduceSum", g.x, ints(1, 2), keepdims=0), axis=0), axis=1),
        g.op("Relu", g.x),
    ]
    tensors = to_graph(g.model(dict.fromkeys(others))).tensors()
    assert [token_gather(tensors[name].inputs[0]) for name in others] == [None] * len(others)


def test_views_are_looked_through_to_what_computes() -> None:
    g = GraphBuilder(grid=GRID)
    computed = g.op("Relu", g.x)
    view = g.op("Reshape", g.op("Reshape", computed, ints(-1, *GRID, D)), ints(-1, N, D))
    cut = g.op("Reshape", view, ints(-1, 2 * N, D // 2))
    tensors = to_graph(g.model({view: None, cut: None})).tensors()
    assert behind_views(tensors[view]) is tensors[computed]
    assert behind_views(tensors[cut]) is tensors[cut]
    assert is_view(tensors[view].inputs[0]) and not is_view(tensors[cut].inputs[0])
    assert not is_view(tensors[computed].inputs[0])
