"""The timing cache is used, shared and replaced safely."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt.common import CACHE_MAGIC
from trt_workshop import Workshop, make_workshop

from eamdeploy.engines.trt.cache import load_cache, save_cache
from eamdeploy.engines.trt.request import TrtOptions
from eamdeploy.errors import EngineError


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return make_workshop(tmp_path, monkeypatch)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "timing.cache"


def content(cache: Path) -> Any:
    return json.loads(cache.read_bytes().removeprefix(CACHE_MAGIC))


def test_first_build_makes_the_cache_and_the_next_keeps_what_it_has(workshop: Workshop, cache: Path) -> None:
    workshop.build(TrtOptions(timing_cache=cache))
    owner, entries = content(cache)
    assert owner == "10.3.0 Orin" and len(entries) == 1
    cache.write_bytes(CACHE_MAGIC + json.dumps([owner, [*entries, "of another model"]]).encode())
    workshop.notes.clear()
    workshop.build(TrtOptions(timing_cache=cache))
    assert content(cache) == [owner, sorted([*entries, "of another model"])]
    assert not any("timing cache" in note for note in workshop.notes)


@pytest.mark.parametrize(
    "data", [b"rubbish", CACHE_MAGIC + b'["8.6.2.3 Orin", ["old"]]', CACHE_MAGIC], ids=["foreign", "version", "cut"]
)
def test_cache_that_cannot_be_used_is_noted_and_replaced(workshop: Workshop, cache: Path, data: bytes) -> None:
    cache.write_bytes(data)
    assert workshop.build(TrtOptions(timing_cache=cache)).parity is not None
    assert sum("timing.cache is damaged, or of another TensorRT or GPU" in note for note in workshop.notes) == 1
    owner, entries = content(cache)
    assert owner == "10.3.0 Orin" and "old" not in entries


def test_cache_that_cannot_be_written_is_a_note_and_no_failure(workshop: Workshop, tmp_path: Path) -> None:
    workshop.build(TrtOptions(timing_cache=tmp_path / "absent" / "timing.cache"))
    assert any("timing.cache was not saved" in note for note in workshop.notes)
    assert workshop.engine.exists()


def test_failed_build_leaves_the_cache_alone(workshop: Workshop, cache: Path) -> None:
    workshop.machine.trt.fake.build_error = "no"
    with pytest.raises(Exception, match="could not build"):
        workshop.build(TrtOptions(timing_cache=cache))
    assert not cache.exists()


def test_what_8_6_says_of_a_cache_is_no_reason_for_a_failure_and_noted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    workshop = make_workshop(tmp_path, monkeypatch, "8.6")
    workshop.build(TrtOptions(timing_cache=cache))
    assert not any("timing cache" in note for note in workshop.notes)
    workshop.notes.clear()
    workshop.build(TrtOptions(timing_cache=cache))
    said = [note for note in workshop.notes if "timing cache" in note]
    assert said == [f"timing cache {cache}: TensorRT said that it will not be used, and went on without"]
    log = workshop.engine.with_name("eam.plan.log").read_text()
    assert "[ERROR] 4: The timing cache will not be used!" in log
    workshop.machine.trt.fake.build_error = "it broke"
    with pytest.raises(EngineError, match=r"could not build an engine: it broke; free"):
        workshop.build(TrtOptions(timing_cache=cache))


class Config:
    """A builder configuration whose cache has one entry of its own."""

    def __init__(self, entry: str) -> None:
        import fake_tensorrt

        self.inner = fake_tensorrt.make_machine().trt.IBuilderConfig()
        self.entry = entry

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def measure(self) -> None:
        self.inner.get_timing_cache()._entries.add(self.entry)


def one_build(cache: str, number: int, barrier: Any) -> None:
    """A build in a process of its own that has read the cache before any other has written it."""
    config = Config(f"kernel {number}")
    load_cache(config, Path(cache), print)
    barrier.wait()
    config.measure()
    save_cache(config, Path(cache), lambda note: pytest.fail(note))


def test_builds_at_the_same_time_lose_nothing_of_each_other(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=one_build, args=(str(cache), number, barrier)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert content(cache)[1] == [f"kernel {number}" for number in range(4)]
    assert sorted(path.name for path in cache.parent.iterdir()) == [".timing.cache.lock", "timing.cache"]
