"""The models inside the board's image are what today's exporter makes of the embedded checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from eamdeploy.artifacts.card import CARD_KEY
from eamdeploy.artifacts.files import digest_file
from eamdeploy.engines.gate import check_against_reference
from eamdeploy.engines.ort.runner import OrtRunner
from eamdeploy.images.source import ImageSource
from eamdeploy.parity.gate import TOLERANCES
from eamdeploy.parity.reference_set import ReferenceSet, reference_path
from eamdeploy.stages.inspect import inspect

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINT = REPOSITORY / "models/digits_deit.eam.safetensors"
NAMES = ("digits_deit.onnx", "digits_deit_baseline.onnx")
REMEDY = "make image-models writes them anew"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models as `make image-models` writes them."""
    export = pytest.importorskip("eamdeploy.stages.export", reason="export needs the extra 'host'").export
    folder = tmp_path_factory.mktemp("models")
    images = ImageSource(REPOSITORY / "calib_data/digits/heldout", "all", 16, False)
    export(CHECKPOINT, folder / NAMES[0], baseline=folder / NAMES[1], opset=17, images=images)
    return folder


def described(path: Path) -> dict[str, Any]:
    """What must not go stale in an exported model; versions may differ, and floats by what a processor rounds."""
    onnx = pytest.importorskip("onnx", reason="the extra 'host' is not installed")
    model = onnx.load(path)
    card = json.loads({item.key: item.value for item in model.metadata_props}[CARD_KEY])
    integers = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
    return {
        "card": {key: value for key, value in card.items() if key != "versions"},
        "opset": [entry.version for entry in model.opset_import],
        "operators": Counter(node.op_type for node in model.graph.node),
        "maps": sorted(item.raw_data for item in model.graph.initializer if item.data_type in integers),
    }


@pytest.mark.parametrize("name", NAMES)
def test_model_is_what_export_makes(name: str, fresh: Path) -> None:
    stored, made = described(REPOSITORY / "models" / name), described(fresh / name)
    for topic, value in made.items():
        assert stored[topic] == value, f"{name} is stale: {topic}; {REMEDY}"


@pytest.mark.parametrize("name", NAMES)
def test_model_gives_the_logits_of_the_checkpoint(name: str, fresh: Path) -> None:
    """And the reference set beside it has the images and logits of a fresh one."""
    made = ReferenceSet.load(reference_path(fresh / name))
    with OrtRunner(REPOSITORY / "models" / name, threads=1, settings={}) as runner:
        check_against_reference(runner, made, TOLERANCES["f32-engine"])
    stored = ReferenceSet.load(reference_path(REPOSITORY / "models" / name))
    assert (stored.pixels == made.pixels).all() and stored.source == made.source
    assert stored.logits == pytest.approx(made.logits, abs=1e-4)


def test_models_are_small_and_of_the_embedded_checkpoint() -> None:
    for name in NAMES:
        path = REPOSITORY / "models" / name
        assert path.stat().st_size + reference_path(path).stat().st_size < 1_000_000
        assert inspect(path).details["checkpoint"] == digest_file(CHECKPOINT), REMEDY


def test_makefile_writes_these_files() -> None:
    recipe = (REPOSITORY / "Makefile").read_text().partition("\nimage-models:")[2].partition("\n\n")[0]
    for word in (*(f"models/{name}" for name in NAMES), "--opset 17", "calib_data/digits/heldout", "--images 16"):
        assert word in recipe
