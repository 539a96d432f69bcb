"""Sensors that read in a thread of their own while something else is measured."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType

from eamdeploy.devices.base import Reading
from eamdeploy.errors import DeviceError

_PATIENCE_S = 15.0  # for the first reading: tegrastats on a cold board takes seconds to start
_FAREWELL_S = 5.0  # for the thread to end


class BackgroundSensor(ABC):
    """Notes what `watch` finds, from `with` to the end of its block; opening it waits for the first reading.

    Attributes:
        source: where readings come from.
    """

    def __init__(self, source: str, patience_s: float = _PATIENCE_S) -> None:
        self.source = source
        self._patience_s = patience_s
        self._stopped = threading.Event()
        self._news = threading.Condition()
        self._readings: list[Reading] = []
        self._skipped = 0
        self._last_skipped = ""
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"sensor {source}", daemon=True)

    @property
    @abstractmethod
    def total_rails(self) -> tuple[str, ...]:
        """As `Sensor` says."""

    @abstractmethod
    def watch(self, stopped: threading.Event) -> None:
        """Calls `note` and `skip` until `stopped` is set; returning before that, or raising, is a failure."""

    def interrupt(self) -> None:  # noqa: B027 - most sensors look at `stopped` themselves
        """Wakes `watch` where it waits for something else than `stopped`."""

    def note(self, reading: Reading) -> None:
        """One more reading."""
        with self._news:
            self._readings.append(reading)
            self._news.notify_all()

    def skip(self, what: str) -> None:
        """One more reading that could not be understood."""
        with self._news:
            self._skipped += 1
            self._last_skipped = what

    @property
    def skipped(self) -> int:
        """Readings so far that could not be understood."""
        with self._news:
            return self._skipped

    def readings(self) -> list[Reading]:
        """All readings since it was opened, oldest first.

        Raises:
            DeviceError: reading stopped by itself.
        """
        with self._news:
            if self._failure is not None:
                if isinstance(self._failure, DeviceError):
                    raise self._failure
                raise DeviceError(f"{self.source} stopped: {self._failure}") from self._failure
            return list(self._readings)

    def __enter__(self) -> BackgroundSensor:
        self._thread.start()
        try:
            with self._news:
                told = self._news.wait_for(lambda: self._readings or self._failure, self._patience_s)
            self.readings()
            if not told:
                raise DeviceError(
                    f"{self.source} gave no reading",
                    expected=f"one within {self._patience_s:g} s",
                    got=f"{self.skipped} that can't be understood, the last: {self._last_skipped!r}"
                    if self.skipped
                    else "nothing",
                )
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._stopped.set()
        self.interrupt()
        self._thread.join(_FAREWELL_S)

    def _run(self) -> None:
        failure: Exception | None = None
        try:
            self.watch(self._stopped)
            if not self._stopped.is_set():
                failure = DeviceError(f"{self.source} stopped by itself")
        except Exception as err:  # noqa: BLE001 - readings() raises it in the thread that measures
            failure = err
        with self._news:
            if not self._stopped.is_set():
                self._failure = failure
            self._news.notify_all()


class PolledSensor(BackgroundSensor):
    """Asks `read` about every `interval_s`.

    Args:
        rails: names of the rails that are the device's total.
        read: the reading now, given `time.monotonic_ns()`; a rail that can't be read now is left out.
    """

    def __init__(self, source: str, rails: tuple[str, ...], read: Callable[[int], Reading], interval_s: float) -> None:
        super().__init__(source)
        self._rails = rails
        self._read = read
        self._interval_s = interval_s

    @property
    def total_rails(self) -> tuple[str, ...]:
        return self._rails

    def watch(self, stopped: threading.Event) -> None:
        due = time.monotonic()
        while True:
            self.note(self._read(time.monotonic_ns()))
            due = max(due + self._interval_s, time.monotonic())  # a slow read delays the next, it never piles up
            if stopped.wait(due - time.monotonic()):
                return


class EnergyCounter:
    """Mean power between two looks at a counter of energy.

    Args:
        wraps_at_uj: the counter starts anew at 0 after this value; None if it never does.
    """

    def __init__(self, wraps_at_uj: int | None = None) -> None:
        self._wraps_at_uj = wraps_at_uj
        self._before: tuple[int, int] | None = None

    def power_mw(self, at_ns: int, energy_uj: int) -> float | None:
        """Since the last look; None at the first one, and where the counter went back for another reason."""
        before, self._before = self._before, (at_ns, energy_uj)
        if before is None or at_ns <= before[0]:
            return None
        used_uj = energy_uj - before[1]
        if used_uj < 0 and self._wraps_at_uj is not None:
            used_uj += self._wraps_at_uj + 1
        return None if used_uj < 0 else used_uj * 1e6 / (at_ns - before[0])
