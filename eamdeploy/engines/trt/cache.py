"""The timing cache: what the builder measured, kept between builds and shared by builds that run at the same time.

Any number of builders read the file. One that has finished takes a lock, reads the file again, adds its own
measurements to what others have written meanwhile, and replaces the file in one step. The file has TensorRT's own
format, so trtexec can use it too.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eamdeploy.artifacts.files import write_bytes
from eamdeploy.errors import ConfigError

Note = Callable[[str], None]


def load_cache(config: Any, path: Path, note: Note) -> bool:
    """The builder's configuration uses the measurements in the file, or starts without any and says why.

    Args:
        config: an IBuilderConfig.
        note: is told when a file is damaged, or of another TensorRT or GPU.

    Returns:
        Whether measurements were handed over; TensorRT may still leave them unused.
    """
    data = _read(path)
    cache = _make(config, data) if data else None
    if cache is not None and config.set_timing_cache(cache, False):
        return True
    if data:
        note(f"timing cache {path} is damaged, or of another TensorRT or GPU: not used, and replaced after the build")
    config.set_timing_cache(_make(config, b""), False)
    return False


def save_cache(config: Any, path: Path, note: Note) -> None:
    """The file has what it had, if that can be used, and what this build measured; a failure is a note, no error."""
    measured = config.get_timing_cache()
    if measured is None:
        return
    try:
        with _locked(path):
            data = _read(path)
            others = _make(config, data) if data else None
            if others is not None:
                measured.combine(others, False)  # False where it is of another TensorRT or GPU: then replaced
            write_bytes(path, bytes(measured.serialize()))
    except (ConfigError, OSError) as err:
        note(f"timing cache {path} was not saved: {' '.join(str(err).split())}")


def _make(config: Any, data: bytes) -> Any:
    """A cache with those measurements; None where TensorRT refuses them."""
    try:
        return config.create_timing_cache(data)
    except (RuntimeError, TypeError, ValueError):
        return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """No other process is inside this block for the same file; the lock's file stays, as removing it would race."""
    with path.with_name(f".{path.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back
