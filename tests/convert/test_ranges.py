from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from attention_graphs import HEIGHT, WIDTH, Spelling
from PIL import Image

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.convert import ranges as activation_ranges
from eamdeploy.convert.ranges import ActivationRanges, Calibration, measure_ranges
from eamdeploy.errors import ConfigError, EngineError
from eamdeploy.graph.model import to_graph
from eamdeploy.images.preprocess import normalize
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT
from eamdeploy.passes.quantize_products import calibrated_tensors

HOW = Preprocessing(size=(HEIGHT, WIDTH), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), crop_pct=1.0)
DYNAMIC = Spelling("separate", batch="b").model()
TENSORS = calibrated_tensors(to_graph(DYNAMIC))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures of the model's own size, so that nothing is resized."""
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for index in range(7):
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
    return tmp_path / "pictures"


def values_on(folder: Path, name: str) -> Any:
    """The tensor on all pictures."""
    model = onnx.ModelProto()
    model.CopyFrom(DYNAMIC)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    pixels = np.stack([np.array(Image.open(file)) for file in sorted(folder.iterdir())])
    return session.run([name], {"image": normalize(pixels, HOW)})[0]


@pytest.mark.parametrize("batch", ["b", 2, 3])
def test_minmax_gives_the_smallest_and_largest_value_over_all_images(batch: int | str, folder: Path) -> None:
    model = Spelling("separate", batch=batch).model()
    tensors = calibrated_tensors(to_graph(model))
    ranges = measure_ranges(model, tensors, HOW, Calibration(ImageSource(folder), "minmax"), SILENT)
    assert set(ranges.ranges) == set(tensors) and ranges.images == 7
    for name, same in zip(tensors, TENSORS, strict=True):
        values = values_on(folder, same)
        np.testing.assert_allclose(ranges.ranges[name], (values.min(), values.max()), rtol=1e-5)


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_other_methods_stay_inside_and_say_nothing_on_stdout(
    method: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    widest = measure_ranges(DYNAMIC, TENSORS, HOW, Calibration(ImageSource(folder), "minmax"), SILENT).ranges
    ranges = measure_ranges(DYNAMIC, TENSORS, HOW, Calibration(ImageSource(folder), method), SILENT).ranges
    for name in TENSORS:
        limit, wide = (max(map(abs, each[name])) for each in (ranges, widest))
        assert 0 < limit <= 1.01 * wide
    assert capsys.readouterr().out == ""


def test_ranges_are_measured_once_for_the_same_model_images_and_method(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    measure = activation_ranges._measure

    def counted(*given: Any) -> Any:
        runs.append(1)
        return measure(*given)

    monkeypatch.setattr(activation_ranges, "_measure", counted)
    wanted = Calibration(ImageSource(folder), "minmax", tmp_path / "ranges.json")
    first = measure_ranges(DYNAMIC, TENSORS, HOW, wanted, SILENT)
    assert measure_ranges(DYNAMIC, TENSORS, HOW, wanted, SILENT) == first == ActivationRanges.read(wanted.cache)  # type: ignore[arg-type]
    assert len(runs) == 1
    measure_ranges(DYNAMIC, TENSORS, HOW, replace(wanted, method="percentile"), SILENT)
    measure_ranges(DYNAMIC, TENSORS, replace_crop(HOW), replace(wanted, method="percentile"), SILENT)
    measure_ranges(DYNAMIC, TENSORS, HOW, replace(wanted, images=ImageSource(folder, limit=3)), SILENT)
    measure_ranges(Spelling("gather").model(), [], HOW, wanted, SILENT)
    assert len(runs) == 5
    measure_ranges(DYNAMIC, TENSORS, HOW, wanted, SILENT)
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "0.png")
    measure_ranges(DYNAMIC, TENSORS, HOW, wanted, SILENT)
    assert len(runs) == 7
    measure_ranges(DYNAMIC, TENSORS, HOW, replace(wanted, images=ImageSource(folder, exif_transpose=True)), SILENT)
    assert len(runs) == 8


def replace_crop(how: Preprocessing) -> Preprocessing:
    return how.model_copy(update={"crop_pct": 0.5})


def test_a_file_that_is_no_cache_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text('{"my": "notes"}')
    with pytest.raises(ConfigError, match=r"mine\.json is no file of activation ranges"):
        measure_ranges(DYNAMIC, TENSORS, HOW, Calibration(ImageSource(folder), "minmax", mine), SILENT)
    assert mine.read_text() == '{"my": "notes"}'


def test_a_tensor_that_calibration_does_not_see_is_named(folder: Path) -> None:
    with pytest.raises(EngineError, match="no range of 1 tensors, the first nowhere; expected finite values; got noth"):
        measure_ranges(DYNAMIC, [*TENSORS, "nowhere"], HOW, Calibration(ImageSource(folder), "minmax"), SILENT)


def test_a_model_that_can_not_run_is_an_error_with_the_runtimes_reason(folder: Path) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(DYNAMIC)
    broken.graph.node[0].input[0] = "nothing"
    with pytest.raises(EngineError, match=r"ONNX Runtime can't calibrate the model: .*nothing"):
        measure_ranges(broken, TENSORS, HOW, Calibration(ImageSource(folder), "minmax"), SILENT)
