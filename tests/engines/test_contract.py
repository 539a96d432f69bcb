"""What every backend must do. A new backend adds its builder to `BUILDERS`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import onnx
import pytest
from engine_models import CARD, CLASSES, SIZE, build, make_frozen_model
from numpy.typing import NDArray

from eamdeploy.artifacts.files import digest_file
from eamdeploy.convert.trt import prepare
from eamdeploy.convert.trt_passes import to_trt
from eamdeploy.engines.manifest import Manifest, manifest_path
from eamdeploy.engines.registry import open_runner
from eamdeploy.engines.trt import backend as trt
from eamdeploy.engines.trt.request import TrtOptions, make_request
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.errors import CheckpointError, ConfigError, EamDeployError, EngineError, ExitCode, ParityError
from eamdeploy.parity.gate import TOLERANCES, compare
from eamdeploy.parity.reference_set import ReferenceSet

Build = Callable[[Path, Path, ReferenceSet | None], Manifest]


def build_trt(model: Path, output: Path, reference: ReferenceSet | None) -> Manifest:
    """An FP32 engine by the TensorRT that is installed, which here is a fake."""
    version = trt.installed_version()
    prepared = prepare(model, version, TrtOptions())
    request = make_request(version, TrtOptions(), prepared.facts, list(prepared.changes))
    return trt.build(prepared, request, output, reference=reference, note=print)


BUILDERS: dict[str, tuple[str, Build]] = {
    "ort": (".onnx", lambda model, output, reference: build(model, output, threads=1, reference=reference)),
    "trt": (".plan", build_trt),
}

FROZEN = make_frozen_model()


@pytest.fixture(params=list(BUILDERS))
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Workshop:
    """A folder with a model in it, and the builder of one backend."""

    def __init__(self, folder: Path, backend: str) -> None:
        suffix, self.build_with = BUILDERS[backend]
        self.model, self.engine = folder / "eam.onnx", folder / f"eam.{backend}{suffix}"
        self.save_model()

    def save_model(self, batch: int | str = "batch", card: Any = CARD) -> None:
        model = FROZEN.to_onnx(batch, card)
        if card is None and self.engine.suffix == ".plan":
            model = to_trt(FROZEN.to_onnx(batch), TrtVersion.parse("10.3"))  # somebody else's model for TensorRT
            del model.metadata_props[:]
        onnx.save(model, self.model)

    def build(self, reference: ReferenceSet | None = None) -> Manifest:
        return self.build_with(self.model, self.engine, reference)

    def files(self) -> dict[str, bytes]:
        """What must survive a failure; logs are written then too."""
        return {path.name: path.read_bytes() for path in self.model.parent.iterdir() if path.suffix != ".log"}


@pytest.fixture
def workshop(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    if backend == "trt":
        fake_tensorrt.install(fake_tensorrt.make_machine(), monkeypatch)
    return Workshop(tmp_path, backend)


def images(n: int) -> NDArray[np.float32]:
    return np.random.default_rng(n).uniform(-2, 2, (n, 3, SIZE, SIZE)).astype(np.float32)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_engine_computes_the_model_at_any_batch_size(workshop: Workshop, n: int) -> None:
    workshop.build()
    with open_runner(workshop.engine, threads=1) as runner:
        logits = runner.infer(images(n))
    assert compare(FROZEN.forward(images(n)), logits, TOLERANCES["f32-engine"]).passed


def test_runner_describes_itself(workshop: Workshop) -> None:
    workshop.build()
    with open_runner(workshop.engine, threads=1) as runner:
        assert runner.io.input_shape == (None, 3, SIZE, SIZE)
        assert runner.io.batch is None
        assert (runner.io.input_name, runner.io.output_name, runner.io.num_classes) == ("image", "logits", CLASSES)
        assert runner.card == CARD
        assert runner.name == str(workshop.engine)


def test_fixed_batch_is_described_kept_and_checked(workshop: Workshop) -> None:
    workshop.save_model(batch=2)
    manifest = workshop.build(FROZEN.reference(n=5))
    assert manifest.batch == 2
    with open_runner(workshop.engine, threads=1) as runner:
        assert runner.io.batch == 2
        assert runner.infer(images(2)).shape == (2, CLASSES)
        with pytest.raises(ConfigError, match=r"\[2, 3, 8, 8\].*\[3, 3, 8, 8\]"):
            runner.infer(images(3))


@pytest.mark.parametrize(
    "wrong",
    [
        images(2).astype(np.float64),
        images(2).astype(np.uint8),
        images(2)[0],
        images(2)[:, :, :-1],
        images(2)[:, :1],
        images(2).transpose(0, 2, 3, 1),
        images(2)[:0],
        images(2)[..., None],
    ],
    ids=["float64", "uint8", "3d", "height", "channels", "nhwc", "empty", "5d"],
)
def test_input_that_does_not_fit_is_refused(workshop: Workshop, wrong: Any) -> None:
    workshop.build()
    with open_runner(workshop.engine, threads=1) as runner, pytest.raises(ConfigError, match="can't take this input"):
        runner.infer(wrong)


def test_input_that_is_not_contiguous_gives_the_same_logits(workshop: Workshop) -> None:
    workshop.build()
    nhwc = np.ascontiguousarray(images(2).transpose(0, 2, 3, 1))
    with open_runner(workshop.engine, threads=1) as runner:
        np.testing.assert_array_equal(runner.infer(nhwc.transpose(0, 3, 1, 2)), runner.infer(images(2)))


def test_logits_stay_the_callers_own(workshop: Workshop) -> None:
    workshop.build()
    with open_runner(workshop.engine, threads=1) as runner:
        first = runner.infer(images(2))
        kept = first.copy()
        runner.infer(-images(2))
    np.testing.assert_array_equal(first, kept)


def test_closed_runner_refuses_and_closes_again(workshop: Workshop) -> None:
    workshop.build()
    with open_runner(workshop.engine, threads=1) as runner:
        pass
    runner.close()
    with pytest.raises(EngineError, match="closed"):
        runner.infer(images(1))


def test_foreign_model_runs_without_a_card(workshop: Workshop) -> None:
    workshop.save_model(card=None)
    assert workshop.build().card is None
    with open_runner(workshop.engine, threads=1) as runner:
        assert runner.card is None
        assert runner.infer(images(1)).shape == (1, CLASSES)


def test_threads_below_one_are_refused(workshop: Workshop) -> None:
    workshop.build()
    with pytest.raises(ConfigError, match="threads"):
        open_runner(workshop.engine, threads=0)


def test_threads_default_to_the_manifests(workshop: Workshop) -> None:
    workshop.build()
    with open_runner(workshop.engine) as runner:
        assert runner.infer(images(1)).shape == (1, CLASSES)


def test_manifest_tells_what_was_built_from_what_and_checked_how(workshop: Workshop, backend: str) -> None:
    built = workshop.build(FROZEN.reference())
    manifest = Manifest.read(manifest_path(workshop.engine))
    assert manifest == built
    assert (manifest.backend, manifest.engine, manifest.threads) == (backend, workshop.engine.name, 1)
    assert manifest.engine_digest == digest_file(workshop.engine)
    assert manifest.engine_bytes == workshop.engine.stat().st_size
    assert manifest.model_digest == digest_file(workshop.model)
    assert manifest.card == CARD
    assert manifest.parity is not None and manifest.parity.passed and manifest.parity.n == 6
    assert "python" in manifest.versions and manifest.machine and manifest.created.endswith("+00:00")


def test_engine_without_reference_counts_as_unchecked(workshop: Workshop) -> None:
    assert workshop.build(reference=None).parity is None
    assert Manifest.read(manifest_path(workshop.engine)).parity is None


def test_engine_that_computes_something_else_is_not_built(workshop: Workshop) -> None:
    wrong = make_frozen_model(seed=7).reference()
    before = workshop.files()
    with pytest.raises(ParityError, match="parity") as caught:
        workshop.build(wrong)
    assert caught.value.exit_code == ExitCode.GATE_FAILED
    assert workshop.files() == before


def test_one_changed_map_entry_fails_the_gate_and_the_old_engine_survives(workshop: Workshop) -> None:
    workshop.build(FROZEN.reference())
    model = onnx.load(workshop.model)
    codes = next(tensor for tensor in model.graph.initializer if tensor.name == "codes")
    values = bytearray(codes.raw_data)
    values[3] += 1
    codes.raw_data = bytes(values)
    onnx.save(model, workshop.model)
    before = workshop.files()
    with pytest.raises(ParityError):
        workshop.build(FROZEN.reference())
    assert workshop.files() == before


@pytest.mark.parametrize("kind", ["size", "classes"])
def test_reference_of_another_model_is_refused(workshop: Workshop, kind: str) -> None:
    good = FROZEN.reference()
    other = (
        ReferenceSet(good.pixels[:, 1:], good.logits, "synthetic")
        if kind == "size"
        else ReferenceSet(good.pixels, good.logits[:, 1:], "synthetic")
    )
    before = workshop.files()
    with pytest.raises(EamDeployError, match=r"can't take this input|another model"):
        workshop.build(other)
    assert workshop.files() == before


def test_reference_without_a_card_to_preprocess_by_is_refused(workshop: Workshop) -> None:
    workshop.save_model(card=None)
    with pytest.raises(ConfigError, match="no model card"):
        workshop.build(FROZEN.reference())
    assert not workshop.engine.exists()


@pytest.mark.parametrize("content", [b"", b"hello world" * 50, "truncated", "zeros"])
def test_damaged_model_is_refused_in_one_line(workshop: Workshop, content: bytes | str) -> None:
    data = workshop.model.read_bytes()
    if isinstance(content, str):
        content = data[: len(data) // 2] if content == "truncated" else bytes(len(data))
    workshop.model.write_bytes(content)
    with pytest.raises(EngineError, match=r"eam\.onnx") as caught:
        workshop.build()
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert not workshop.engine.exists()


def test_damaged_engine_without_manifest_is_refused_by_name(workshop: Workshop) -> None:
    workshop.engine.write_bytes(b"no engine at all")
    with pytest.raises(EngineError, match=workshop.engine.name):
        open_runner(workshop.engine, threads=1)


def test_engine_changed_after_its_manifest_is_refused(workshop: Workshop) -> None:
    workshop.build()
    with workshop.engine.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(EngineError, match="describes another engine"):
        open_runner(workshop.engine, threads=1)


def test_damaged_manifest_is_refused_by_name(workshop: Workshop) -> None:
    workshop.build()
    path = manifest_path(workshop.engine)
    manifest = Manifest.read(path)
    manifest.model_copy(update={"threads": 0}).write(path)
    with pytest.raises(CheckpointError, match=rf"{path.name}.*threads"):
        open_runner(workshop.engine, threads=1)


def test_missing_files_are_config_errors(workshop: Workshop) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        open_runner(workshop.engine, threads=1)
    workshop.model.unlink()
    with pytest.raises(ConfigError, match=r"eam\.onnx"):
        workshop.build()


@pytest.mark.parametrize("which", ["engine", "manifest"])
def test_full_disk_leaves_the_old_engine_and_its_manifest(
    workshop: Workshop, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine_bytes = workshop.build().engine_bytes
    before = workshop.files()

    def disk_without_room_for_one(descriptor: int) -> None:
        if (os.fstat(descriptor).st_size == engine_bytes) is (which == "engine"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_without_room_for_one)
    with pytest.raises(ConfigError, match="No space left"):
        workshop.build(FROZEN.reference())
    assert workshop.files() == before


def test_output_folder_that_does_not_exist_is_a_config_error(workshop: Workshop) -> None:
    workshop.engine = workshop.engine.parent / "absent" / workshop.engine.name
    with pytest.raises(ConfigError, match="cannot write"):
        workshop.build()


def test_engine_never_replaces_its_model(workshop: Workshop) -> None:
    workshop.engine = workshop.model
    before = workshop.files()
    with pytest.raises(ConfigError, match="would replace"):
        workshop.build()
    assert workshop.files() == before
