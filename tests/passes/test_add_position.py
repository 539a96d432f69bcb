from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from attention_graphs import IMAGES, B, D, Floats, GraphBuilder, ints, run_unoptimized
from rewriting import changed, initializers, left_alone, ops, rewritten, same
from timm_graphs import EXPORTS, Export, images_of, timm_model

from eamdeploy.passes.add_position import AddPosition
from eamdeploy.passes.static_shapes import StaticShapes

T, P = 6, 2
_RNG = np.random.default_rng(8)


def normal(*shape: int) -> Floats:
    return _RNG.normal(0, 1, shape).astype(np.float32)


WEIGHT, BIAS, CLASS, REGISTER = normal(D, 3, 1, 1), normal(D), normal(1, 1, D), normal(1, 1, D)
BEHIND, IN_FRONT, EVERYTHING = normal(1, T + P, D), normal(1, T, D), normal(3 * T + P, D)


@dataclass(frozen=True)
class Embedding:
    """Two tokens of weights and T patches, spelled as timm's models do.

    Attributes:
        in_front: the position embedding is added to the patches alone (`no_embed_class`).
        bias: the convolution has one.
        position: another embedding than `IN_FRONT` or `BEHIND`.
        patches_at: which of the three concatenated tensors are the patches.
        between: what stands between the patches and their sum.
        reads: which tensor something else reads too; "" for none.
    """

    in_front: bool = False
    bias: bool = True
    batch: int | str = B
    position: Floats | None = None
    patches_at: int = 2
    between: Callable[[GraphBuilder, str], str] = lambda g, t: t
    reads: str = ""

    def model(self) -> onnx.ModelProto:
        g = GraphBuilder(self.batch)
        others: list[str] = []

        def read(name: str, tensor: str) -> str:
            """`tensor`, which something else reads too if `reads` says so."""
            if self.reads == name:
                flat = g.op("Reshape", tensor, g.sizes(-1))
                others.append(g.op("ReduceMean", flat, axes=[1]))
            return tensor

        conv = read("Conv", g.op("Conv", "image", WEIGHT, *([BIAS] if self.bias else [])))
        rows = read("Reshape", g.op("Reshape", conv, g.sizes(D, T)))
        tokens = self.between(g, read("Transpose", g.op("Transpose", rows, perm=[0, 2, 1])))
        position = self.position
        if self.in_front:
            tokens = read("sum", g.op("Add", tokens, IN_FRONT if position is None else position))
        parts = [g.op("Expand", token, g.sizes(1, D)) for token in (CLASS, REGISTER)]
        parts.insert(self.patches_at, tokens)
        x = read("Concat", g.op("Concat", *parts, axis=1))
        if not self.in_front:
            x = g.op("Add", BEHIND if position is None else position, x)
        x = g.op("Mul", x, EVERYTHING[: T + P])
        for other in others:
            x = g.op("Add", x, g.op("Reshape", other, g.sizes(1, 1)))
        return g.classify(x)


def without_bias(model: onnx.ModelProto) -> bool:
    return [len(node.input) for node in model.graph.node if node.op_type == "Conv"] == [2]


@pytest.mark.parametrize("batch", [B, 1, "batch"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("in_front", [False, True])
def test_tokens_positions_and_bias_are_one_sum(in_front: bool, bias: bool, batch: int | str) -> None:
    stock = Embedding(in_front, bias, batch).model()
    model, result = rewritten(stock, AddPosition(), 1, StaticShapes())
    assert result.skipped == () and without_bias(model)
    counts = ops(model)
    assert (counts["Pad"], counts["Add"]) == (1, 1) and not {"Concat", "Expand", "Shape"} & set(counts)
    if batch != "batch":
        assert result.nodes_after == result.nodes_before
    (constant,) = (value for name, value in initializers(model).items() if name.endswith("/embedding"))
    tokens = np.concatenate([CLASS, REGISTER], axis=1)[0]
    patches = np.broadcast_to(BIAS if bias else np.zeros(D), (T, D))
    expected = (
        np.concatenate([tokens, patches + IN_FRONT[0]]) if in_front else np.concatenate([tokens, patches]) + BEHIND[0]
    )
    np.testing.assert_allclose(constant[0], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(constant[0, :P], tokens if in_front else tokens + BEHIND[0, :P])
    images = IMAGES[: 1 if batch == 1 else B]
    assert same(run_unoptimized(stock, images), model, images)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_tokens_stand_where_they_stood(place: int) -> None:
    stock = Embedding(patches_at=place).model()
    model, _ = rewritten(stock, AddPosition(), 1)
    assert same(run_unoptimized(stock, IMAGES), model, IMAGES)


def test_position_without_an_axis_for_images_is_one_too() -> None:
    stock = Embedding(position=BEHIND[0]).model()
    model, _ = rewritten(stock, AddPosition(), 1)
    assert same(run_unoptimized(stock, IMAGES), model, IMAGES)


@pytest.mark.parametrize("place", ["Conv", "Reshape", "Transpose", "sum"])
def test_bias_of_a_convolution_that_is_read_elsewhere_stays(place: str) -> None:
    stock = Embedding(in_front=place == "sum", reads=place).model()
    model, _ = rewritten(stock, AddPosition(), 1)
    assert not without_bias(model)
    assert same(run_unoptimized(stock, IMAGES), model, IMAGES)


def normed(g: GraphBuilder, tokens: str) -> str:
    """As `norm_layer` of timm's PatchEmbed."""
    return g.op("LayerNormalization", tokens, np.ones(D, np.float32), axis=-1)


def turned(g: GraphBuilder, tokens: str) -> str:
    """Tokens as channels: the transpose is not the one that the bias needs."""
    return g.op("Transpose", g.op("Reshape", tokens, ints(B, D, T)), perm=[0, 2, 1])


@pytest.mark.parametrize("between", [normed, turned], ids=lambda between: between.__name__)
def test_bias_that_is_not_added_to_tokens_stays(between: Any) -> None:
    stock = Embedding(between=between).model()
    model, _ = rewritten(stock, AddPosition(), 1)
    assert not without_bias(model)
    assert same(run_unoptimized(stock, IMAGES), model, IMAGES)


def test_another_embedding_is_noticed() -> None:
    stock = Embedding().model()
    model, _ = rewritten(stock, AddPosition(), 1)
    (name,) = (name for name in initializers(model) if name.endswith("/embedding"))
    wrong = changed(model, name, lambda values: np.roll(values, 1, axis=1))
    assert not same(run_unoptimized(stock, IMAGES), wrong, IMAGES)


# --- near misses -----------------------------------------------------------------------------------------------------

NO_POSITION = "no position embedding is added in front of it or behind"


@pytest.mark.parametrize(
    "position",
    [normal(B, T + P, D), normal(D), normal(1, 1, D), normal(T + P, 1)],
    ids=["of each image", "of channels", "of all tokens", "of tokens"],
)
@pytest.mark.parametrize("in_front", [False, True])
def test_other_sums_are_no_position_embedding(in_front: bool, position: Floats) -> None:
    if in_front and position.shape[-2:] == (T + P, D):
        position = position[:, :T]
    elif in_front and position.shape == (T + P, 1):
        position = position[:T]
    assert left_alone(Embedding(in_front, position=position).model(), AddPosition()) == [NO_POSITION]


def test_concatenated_tokens_that_are_read_without_position_stay() -> None:
    assert left_alone(Embedding(reads="Concat").model(), AddPosition()) == [NO_POSITION]


def beside(*parts: Callable[[GraphBuilder], Any], batch: int | str = B) -> onnx.ModelProto:
    """Tensors [B,T,D] side by side, and a position embedding."""
    g = GraphBuilder(batch)
    x = g.op("Concat", *(part(g) for part in parts), axis=1)
    return g.classify(g.op("Mul", g.op("Add", x, EVERYTHING[None, : T * len(parts)]), EVERYTHING[: T * len(parts)]))


def patches(g: GraphBuilder) -> str:
    return g.x


def constant(g: GraphBuilder) -> Floats:
    return np.repeat(IN_FRONT, B, axis=0)


def constant_of_each_image(g: GraphBuilder) -> Floats:
    return IN_FRONT * np.arange(1, B + 1, dtype=np.float32)[:, None, None]


def repeated_token(g: GraphBuilder) -> str:
    """One token expanded to six, not only to every image."""
    return g.op("Expand", CLASS[0], g.sizes(T, D))


@pytest.mark.parametrize(("part", "batch"), [(constant, B), (repeated_token, B), (repeated_token, "batch")])
def test_tokens_are_the_same_for_all_images_however_they_are_spelled(part: Any, batch: int | str) -> None:
    stock = beside(part, patches, batch=batch)
    model, _ = rewritten(stock, AddPosition(), 1, StaticShapes())
    assert same(run_unoptimized(stock, IMAGES), model, IMAGES)


@pytest.mark.parametrize(
    ("parts", "reasons"),
    [
        ((constant, patches, patches), ["2 of its inputs depend on the image"]),
        ((patches, patches), []),
        ((constant_of_each_image, patches), ["constant_4 differs from image to image"]),
    ],
    ids=["two of patches", "no constant", "of each image"],
)
def test_all_tokens_but_the_patches_must_be_the_same_for_all_images(parts: Any, reasons: list[str]) -> None:
    got = left_alone(beside(*parts), AddPosition())
    assert [reason.partition(" ")[2] for reason in got] == [reason.partition(" ")[2] for reason in reasons]


def test_what_is_no_token_is_left_alone() -> None:
    g = GraphBuilder()
    image = g.op("Concat", np.ones((B, 3, 2, 3), np.float32), "image", axis=1)
    mean = g.op("Reshape", g.op("ReduceMean", image, axes=[1, 2, 3]), ints(B, 1, 1))
    stock = g.classify(g.op("Mul", g.x, mean))
    assert left_alone(stock, AddPosition()) == ["its patches are no tokens [B, T, D]"]


# --- what torch exports ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("export", EXPORTS, ids=str)
def test_exports_compute_the_same_without_a_shape(export: Export) -> None:
    stock = export.model()
    torch_model = timm_model(export.variant)
    places = int(torch_model.num_prefix_tokens > 0)
    model, _ = rewritten(stock, AddPosition(), places, StaticShapes())
    counts = ops(model)
    assert counts["Pad"] == places and (not places or not {"Expand", "Shape", "Concat"} & set(counts))
    assert without_bias(model) == bool(places)
    images = images_of(export.variant)[: export.batch or 2]
    assert same(run_unoptimized(stock, images), model, images)


def test_swin_has_none() -> None:
    assert left_alone(Export("swin", "torchscript", 2, 17).model(), AddPosition()) == []
