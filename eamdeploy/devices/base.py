"""What every kind of device offers to a measurement: what it is and how it is set now, and sensors to read meanwhile.

    open_device("jetson") ──▶ Device ──state()──▶ DeviceState       before and after
                                └──sensor()──▶ Sensor ──readings()──▶ power and memory during the measurement

A kind of device is one file beside this one; `registry` chooses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol

from pydantic import Field

from eamdeploy.artifacts.records import Record

DeviceKind = Literal["cpu", "cuda", "jetson"]


class DeviceState(Record):
    """A device at one moment; what it does not tell is None or empty.

    Attributes:
        kind: which file here speaks for it.
        name: of the board or GPU, e.g. "NVIDIA Jetson Orin Nano Developer Kit".
        software: versions by name, e.g. {"JetPack": "6.2", "L4T": "36.4.3"} or {"driver": "550.54"}.
        power_mode: name of the mode that limits clocks and cores, e.g. "15W"; `power_mode_id`: its number.
        clocks_locked: whether clocks are held at their maximum (`jetson_clocks`, `nvidia-smi -lgc`).
        clocks_mhz: current clock by unit ("CPU0", "GPU", "EMC").
        temperatures_c: by sensor.
        throttling: reasons why it runs slower than its clocks allow now; empty when it does not.
        warnings: what makes figures from it doubtful, in words for people, and what to do about it.
    """

    kind: DeviceKind
    name: str
    software: dict[str, str] = Field(default_factory=dict)
    power_mode: str | None = None
    power_mode_id: int | None = None
    clocks_locked: bool | None = None
    clocks_mhz: dict[str, float] = Field(default_factory=dict)
    temperatures_c: dict[str, float] = Field(default_factory=dict)
    throttling: list[str] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)


class SensorNotes(Record):
    """What a sensor could not read, beside the readings that it gave.

    Attributes:
        source: as `Sensor` says.
        skipped: readings of which nothing could be used; `skipped_example`: one of them, shortened.
        left_out: single values or fields that could not be read or are not known here, in readings whose other values
            were used; `left_out_example`: one of them.
        failure: why no more readings came, or none at all; None for a sensor that read to the end.
    """

    source: str
    skipped: int = 0
    skipped_example: str | None = None
    left_out: int = 0
    left_out_example: str | None = None
    failure: str | None = None

    def warnings(self) -> list[str]:
        """The same for people, one sentence each; nothing for a sensor that read everything."""
        found = []
        if self.failure is not None:
            found.append(f"power is missing or incomplete: {self.failure}")
        if self.skipped:
            found.append(
                f"{self.source}: {self.skipped} readings could not be understood and were skipped, "
                f"e.g. {self.skipped_example!r}"
            )
        if self.left_out:
            found.append(
                f"{self.source}: {self.left_out} fields could not be read or are not known here and were left out, "
                f"e.g. {self.left_out_example!r}"
            )
        return found


@dataclass(frozen=True)
class Reading:
    """What the sensors said at one moment.

    Attributes:
        at_ns: `time.monotonic_ns()` when it was taken.
        power_mw: instantaneous power by rail.
        memory_bytes: in use, by name ("ram", "gpu", "nvmap").
    """

    at_ns: int
    power_mw: Mapping[str, float]
    memory_bytes: Mapping[str, int]


class Sensor(Protocol):
    """Reads power and memory in the background while it is open, as a context manager.

    Attributes:
        source: where readings come from: "jtop", "tegrastats", "sysfs ina3221", "NVML".
        total_rails: rails that together are the whole of what the device draws, without counting anything twice;
            empty where that is not known.
        skipped: readings so far of which nothing could be used.
        notes: what could not be read so far, and why it stopped if it did.
    """

    @property
    def source(self) -> str: ...

    @property
    def total_rails(self) -> tuple[str, ...]: ...

    @property
    def skipped(self) -> int: ...

    @property
    def notes(self) -> SensorNotes: ...

    def readings(self) -> list[Reading]:
        """All readings since it was opened, oldest first; those before it stopped by itself, if it did."""
        ...

    def __enter__(self) -> Sensor:
        """It reads.

        Raises:
            DeviceError: no reading came.
        """
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Device(Protocol):
    """Something that engines run on."""

    @property
    def kind(self) -> DeviceKind: ...

    def state(self) -> DeviceState:
        """The device now; what it does not tell is left out, and said in the warnings where that matters.

        Raises:
            DeviceError: it does not answer at all any more.
        """
        ...

    def sensor(self, interval_s: float) -> Sensor | None:
        """New, not yet open sensors that read about every `interval_s`; None where the device has none.

        Raises:
            DeviceError: it has sensors, but they can't be read; says why and what to try.
        """
        ...
