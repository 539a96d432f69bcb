"""Sensors that read in a thread of their own while something else is measured."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType

from eamdeploy.devices.base import Reading, SensorNotes
from eamdeploy.devices.rails import total_rails
from eamdeploy.errors import DeviceError

_PATIENCE_S = 15.0  # for the first reading: tegrastats on a cold board takes seconds to start
_FAREWELL_S = 5.0  # for the thread to end
_EXAMPLE_LENGTH = 160


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
        self._rails_seen: dict[str, None] = {}
        self._notes = SensorNotes(source=source)
        self._thread = threading.Thread(target=self._run, name=f"sensor {source}", daemon=True)

    @property
    def total_rails(self) -> tuple[str, ...]:
        """As `Sensor` says, of all rails that were read so far: one that can't be read at first may come later."""
        with self._news:
            return total_rails(self._rails_seen)

    @abstractmethod
    def watch(self, stopped: threading.Event) -> None:
        """Calls `note` and `skip` until `stopped` is set; returning before that, or raising, is a failure."""

    def interrupt(self) -> None:  # noqa: B027 - most sensors look at `stopped` themselves
        """Wakes `watch` where it waits for something else than `stopped`."""

    def note(self, reading: Reading) -> None:
        """One more reading."""
        with self._news:
            self._readings.append(reading)
            self._rails_seen.update(dict.fromkeys(reading.power_mw))
            self._news.notify_all()

    def skip(self, what: str) -> None:
        """One more reading of which nothing could be used: `what` it said."""
        with self._news:
            self._change(skipped=self._notes.skipped + 1, skipped_example=_shortened(what))

    def leave_out(self, *what: str) -> None:
        """So many values or fields of a reading could not be used, while others of it were."""
        if what:
            with self._news:
                self._change(left_out=self._notes.left_out + len(what), left_out_example=_shortened(what[-1]))

    @property
    def skipped(self) -> int:
        """Readings so far of which nothing could be used."""
        return self.notes.skipped

    @property
    def notes(self) -> SensorNotes:
        """What could not be read so far, and why reading stopped by itself, if it did."""
        with self._news:
            return self._notes

    def readings(self) -> list[Reading]:
        """All readings since it was opened, oldest first; those before it stopped by itself, if it did."""
        with self._news:
            return list(self._readings)

    def __enter__(self) -> BackgroundSensor:
        self._thread.start()
        try:
            with self._news:
                self._news.wait_for(lambda: self._readings or self._notes.failure is not None, self._patience_s)
                if not self._readings:
                    raise _no_reading(self._notes, self._patience_s)
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
        failure: str | None = None
        try:
            self.watch(self._stopped)
            if not self._stopped.is_set():
                failure = f"{self.source} stopped by itself"
        except DeviceError as err:
            failure = str(err)
        except Exception as err:  # noqa: BLE001 - whatever a driver or a service raises, it must not end a measurement
            failure = f"{self.source} stopped: {str(err) or type(err).__name__}"
        with self._news:
            if not self._stopped.is_set():
                self._change(failure=failure)
            self._news.notify_all()

    def _change(self, **changes: object) -> None:
        self._notes = self._notes.model_copy(update=changes)


def _no_reading(notes: SensorNotes, patience_s: float) -> DeviceError:
    if notes.failure is not None:
        return DeviceError(notes.failure)
    return DeviceError(
        f"{notes.source} gave no reading",
        expected=f"one within {patience_s:g} s",
        got=f"{notes.skipped} that can't be understood, the last: {notes.skipped_example!r}"
        if notes.skipped
        else "nothing",
    )


def _shortened(text: str) -> str:
    """`text` in one line that can be printed, and not too long."""
    line = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in " ".join(text.split()))
    return line if len(line) <= _EXAMPLE_LENGTH else f"{line[:_EXAMPLE_LENGTH]}…"


Read = Callable[[int], tuple[Reading, Sequence[str]]]


class PolledSensor(BackgroundSensor):
    """Asks `read` about every `interval_s`.

    Args:
        rails: names of the rails that are the device's total; None for a board, whose rails tell.
        read: the reading now, given `time.monotonic_ns()`, and in words what could not be read of it.
    """

    def __init__(self, source: str, rails: tuple[str, ...] | None, read: Read, interval_s: float) -> None:
        super().__init__(source)
        self._rails = rails
        self._read = read
        self._interval_s = interval_s

    @property
    def total_rails(self) -> tuple[str, ...]:
        return super().total_rails if self._rails is None else self._rails

    def watch(self, stopped: threading.Event) -> None:
        due = time.monotonic()
        while True:
            reading, unread = self._read(time.monotonic_ns())
            if unread and not reading.power_mw and not reading.memory_bytes:
                self.skip(unread[0])
            else:
                self.leave_out(*unread)
                self.note(reading)
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

    def power_mw(self, at_ns: int, energy_uj: int | None) -> float | None:
        """Since the last look; None at the first one, and where the counter went back for another reason.

        Args:
            energy_uj: None where it can't be read now. The next look then counts as the first: the power since the
                one before would be that of other work too.
        """
        if energy_uj is None:
            self._before = None
            return None
        before, self._before = self._before, (at_ns, energy_uj)
        if before is None or at_ns <= before[0]:
            return None
        used_uj = energy_uj - before[1]
        if used_uj < 0 and self._wraps_at_uj is not None:
            used_uj += self._wraps_at_uj + 1
        return None if used_uj < 0 else used_uj * 1e6 / (at_ns - before[0])
