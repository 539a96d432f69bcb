"""Power and memory of a Jetson through jetson-stats, whose service reads them as root. Source: FACTS §5.

The service reads at its own pace, set by whoever connected first, so readings may come less often than asked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from eamdeploy.devices.background import BackgroundSensor
from eamdeploy.devices.base import Reading
from eamdeploy.devices.rails import total_rails
from eamdeploy.errors import DeviceError

_KB = 1024


def jtop_answers(interval_s: float) -> bool:
    """Whether jetson-stats is installed and its service sends something."""
    try:
        import jtop
    except ImportError:
        return False
    try:
        with jtop.jtop(interval=interval_s) as board:
            return bool(board.ok())
    except Exception:  # noqa: BLE001 - whatever it raises, and it raises many kinds, it does not answer
        return False


class JtopSensor(BackgroundSensor):
    """Listens to jtop's service while it is open."""

    def __init__(self, interval_s: float) -> None:
        super().__init__("jtop")
        self._interval_s = interval_s
        self._rails: tuple[str, ...] = ()

    @property
    def total_rails(self) -> tuple[str, ...]:
        return self._rails

    def watch(self, stopped: threading.Event) -> None:
        import jtop

        try:
            with jtop.jtop(interval=self._interval_s) as board:
                while board.ok() and not stopped.is_set():  # waits for the service's next reading
                    self._take(time.monotonic_ns(), board.power, board.memory)
        except (jtop.JtopException, OSError, EOFError) as err:
            raise DeviceError(
                f"jtop's service stopped: {err}", hint="Look at it with: systemctl status jtop.service"
            ) from err

    def _take(self, at_ns: int, power: Mapping[str, Any], memory: Mapping[str, Any]) -> None:
        try:
            reading = Reading(at_ns, rails_mw(power), memory_bytes(memory))
        except (KeyError, TypeError, ValueError) as err:
            self.skip(repr(err))
            return
        self._rails = self._rails or total_rails(reading.power_mw)
        self.note(reading)


def rails_mw(power: Mapping[str, Any]) -> dict[str, float]:
    """Power by rail of `jtop.power`.

    A board's input is not among the rails but the total, with its name. A total without a name is the sum of all rails,
    whether they overlap or not, and is not taken.
    """
    rails = {str(name): float(rail["power"]) for name, rail in power["rail"].items()}
    if "name" in power["tot"]:
        rails[str(power["tot"]["name"])] = float(power["tot"]["power"])
    return rails


def memory_bytes(memory: Mapping[str, Any]) -> dict[str, int]:
    """Memory in use of `jtop.memory`, whose numbers are in KB.

    "nvmap" is what the GPU has of the RAM; where the kernel does not tell that (Thor), jtop gives the driver's number
    for the GPU instead: "gpu".
    """
    ram = memory["RAM"]
    used = {"ram": int(ram["used"]) * _KB}
    if ram.get("shared"):
        used["gpu" if ram.get("shared_label") == "VRAM" else "nvmap"] = int(ram["shared"]) * _KB
    return used
