from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from attention_graphs import IMAGES, D, GraphBuilder, N, Spelling, forward, ints, run_unoptimized, scalar
from onnx.helper import set_model_props
from timm_graphs import Export

from eamdeploy.artifacts.card import CARD_KEY, Freezing, ModelCard, Preprocessing
from eamdeploy.errors import CheckpointError, UnsupportedGraph
from eamdeploy.graph.model import card_of, to_graph, to_model, with_card

CARD = ModelCard(
    timm_model="deit_tiny_patch16_224",
    weights="pretrained",
    num_classes=4,
    class_names=["ä", "b", "c", "d"],
    preprocessing=Preprocessing(size=(2, 3), mean=(0.1, 0.2, 0.3), std=(1, 1, 1)),
    freezing=Freezing(
        bits=4, quantizer="squared", score="entropy", sparsity_asked=0.2, sparsity=0.17, heads={"blocks.0.attn": [1]}
    ),
)


def test_there_and_back_computes_the_same() -> None:
    spelling = Spelling("gather", batch="batch")
    model = to_model(to_graph(spelling.model()))
    np.testing.assert_allclose(run_unoptimized(model, IMAGES), forward([spelling.weights]), atol=1e-4)


@pytest.mark.parametrize(
    "export", [Export("vit", "torchscript", None, 17), Export("vit", "torchscript", 2, 17)], ids=str
)
def test_constants_and_shape_arithmetic_are_folded(export: Export) -> None:
    stock = export.model()
    graph = to_graph(stock)
    assert {"Constant", "Identity"} & {node.op_type for node in stock.graph.node}
    assert not {"Constant", "Identity"} & {node.op for node in graph.nodes}
    assert ("Shape" in {node.op for node in graph.nodes}) == (export.batch is None)


def test_folding_keeps_dequantize_nodes() -> None:
    g = GraphBuilder()
    codes = np.ones((N, D), np.uint8)
    dequantized = g.op("DequantizeLinear", codes, scalar(0.5), np.array(0, np.uint8))
    folded = g.op("Add", np.ones(D, np.float32), np.ones(D, np.float32))
    graph = to_graph(g.classify(g.op("Add", g.op("Add", g.x, dequantized), folded)))
    assert dequantized in graph.tensors() and folded in graph.tensors()
    assert [node.op for node in graph.nodes if node.op == "DequantizeLinear"] == ["DequantizeLinear"]
    np.testing.assert_array_equal(graph.tensors()[folded].values, np.full(D, 2, np.float32))


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """onnxruntime warned about the folded Unsqueezes of this export, graphsurgeon about large folded constants."""
    to_model(Export("vit", "torchscript", None, 17).graph())
    g = GraphBuilder()
    large = g.op("Transpose", np.ones((601, 602), np.float32))
    to_graph(g.model({g.op("MatMul", g.op("Reshape", g.x, ints(-1, 1)), g.op("Reshape", large, ints(1, -1))): [1, 1]}))
    assert capfd.readouterr() == ("", "")


def test_warnings_of_others_are_not_silenced_for_good(capfd: pytest.CaptureFixture[str]) -> None:
    to_graph(Spelling().model())
    stock = Export("vit", "torchscript", None, 17).model()
    gs.import_onnx(onnx.shape_inference.infer_shapes(stock, data_prop=True)).fold_constants()
    assert "UnsqueezeElimination" in capfd.readouterr().err


def two_wide(shape: list[int]) -> gs.Graph:
    """A transpose of the image whose result claims `shape`."""
    image, logits = gs.Variable("image", np.float32, [1, 3]), gs.Variable("logits", np.float32, shape)
    node = gs.Node("Transpose", name="t", attrs={"perm": [1, 0]}, inputs=[image], outputs=[logits])
    return gs.Graph([node], inputs=[image], outputs=[logits], opset=17, ir_version=8)


def test_valid_graph_passes_the_checker() -> None:
    assert to_model(two_wide([3, 1])).graph.output[0].name == "logits"


def test_graph_that_contradicts_its_shapes_is_refused() -> None:
    with pytest.raises(UnsupportedGraph, match="not valid ONNX"):
        to_model(two_wide([5, 1]))


def test_graph_with_an_operator_of_no_opset_is_refused() -> None:
    graph = two_wide([3, 1])
    graph.nodes[0].op = "Transpoze"
    with pytest.raises(UnsupportedGraph, match="Transpoze"):
        to_model(graph)


def test_shapes_left_by_earlier_graphs_are_not_believed() -> None:
    graph = to_graph(Spelling().model())
    inner = graph.nodes[0].outputs[0]
    inner.shape = [9, 9, 9]
    shapes = {info.name: info.type.tensor_type.shape for info in to_model(graph).graph.value_info}
    assert [dim.dim_value for dim in shapes[inner.name].dim] == [2, 3, 6]


def test_card_comes_back_from_the_metadata_in_place_of_the_old_one() -> None:
    model = Spelling().model()
    set_model_props(model, {"author": "somebody", CARD_KEY: "old"})
    before = model.SerializeToString()
    carded = with_card(with_card(model, CARD), CARD)
    assert card_of(onnx.load_from_string(carded.SerializeToString()), "x.onnx") == CARD
    assert sorted(entry.key for entry in carded.metadata_props) == ["author", CARD_KEY]
    assert carded.producer_name == "eamdeploy"
    assert carded.graph == model.graph
    assert model.SerializeToString() == before


def test_model_without_a_card_has_none() -> None:
    model = Spelling().model()
    set_model_props(model, {"author": "somebody"})
    assert card_of(model, "x.onnx") is None


@pytest.mark.parametrize("text", ["", "not json", "{}", CARD.model_dump_json()[:-1]])
def test_damaged_card_is_refused_by_name(text: str) -> None:
    model = Spelling().model()
    set_model_props(model, {CARD_KEY: text})
    with pytest.raises(CheckpointError, match=r"x\.onnx is not a valid ModelCard"):
        card_of(model, "x.onnx")
