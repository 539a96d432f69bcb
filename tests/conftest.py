"""What several test files share. Session artifacts are read, never changed: a test that damages one takes a copy."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command_line import Outcome, RunCli

if TYPE_CHECKING:
    from eamdeploy.host.stock_export import StockExport

# Torch, here and in the processes that tests start. Models this tiny gain nothing from a second thread, and lose a
# factor of three when it has to share its core with another program.
os.environ.setdefault("OMP_NUM_THREADS", "1")


LONGEST_FILES = ("test_real_data.py", "test_peers.py", "test_export_matrix.py", "test_pass_order.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: one that starts last would leave the other workers without work."""

    def place(item: pytest.Item) -> int:
        name = item.path.name
        return LONGEST_FILES.index(name) if name in LONGEST_FILES else len(LONGEST_FILES)

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def stock_exports_made_once(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., StockExport] | None]:
    """Torch exports each model once, see `stock_exports`; gives what stands in for `export_stock`."""
    if find_spec("torch") is None:
        yield None
        return
    from stock_exports import made_once

    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.getbasetemp()
        shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        once = made_once(shared / "stock-exports")
        patch.setattr("eamdeploy.stages.export.export_stock", once)
        yield once


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real weights and photographs beside the project; they are no part of it."""
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not data.is_dir():
        pytest.skip("real weights and photographs (../shared/data) are not on this machine")
    return data


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 unlabelled pictures."""
    from tiny_models import draw_pictures

    folder = tmp_path_factory.mktemp("data") / "pictures"
    draw_pictures(folder, 24)
    return folder


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the tiny ViT of `tiny_models`."""
    from tiny_models import make_model, save_weights

    return save_weights(make_model(), tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="session")
def eam_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path, pictures: Path) -> Path:
    """The tiny ViT with head 1 of its first and heads 0 and 1 of its second module frozen."""
    from tiny_models import KWARGS, NAME

    from eamdeploy import freeze
    from eamdeploy.eam.options import FreezeOptions
    from eamdeploy.host.model import ModelSpec
    from eamdeploy.images.source import ImageSource

    output = tmp_path_factory.mktemp("checkpoint") / "tiny.eam.safetensors"
    options = FreezeOptions(sparsity=0.5, score="random", seed=3)
    freeze(ModelSpec(NAME, str(tiny_weights), KWARGS), ImageSource(pictures), output, options)
    return output


@pytest.fixture(scope="session")
def eam_model(tmp_path_factory: pytest.TempPathFactory, eam_checkpoint: Path, pictures: Path) -> Path:
    """That checkpoint as `tiny.onnx`, with its unfrozen twin `base.onnx` and both reference sets beside it."""
    from eamdeploy import export
    from eamdeploy.images.source import ImageSource

    output = tmp_path_factory.mktemp("model") / "tiny.onnx"
    export(eam_checkpoint, output, baseline=output.with_name("base.onnx"), images=ImageSource(pictures))
    return output


@pytest.fixture(scope="session")
def eam_engine(tmp_path_factory: pytest.TempPathFactory, eam_model: Path) -> Path:
    """The engine `tiny.ort.onnx` of that model, with `base.ort.onnx` and both manifests beside it."""
    from eamdeploy import build_ort

    folder = tmp_path_factory.mktemp("engine")
    for name in ("base", "tiny"):
        build_ort(eam_model.with_name(f"{name}.onnx"), folder / f"{name}.ort.onnx", threads=1)
    return folder / "tiny.ort.onnx"


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunCli:
    """Runs `eamdeploy` with the given arguments in this process."""
    from eamdeploy.cli.app import main

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["eamdeploy", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), out, err)

    return run
