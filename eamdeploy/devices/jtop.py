"""Power and memory of a Jetson through jetson-stats, whose service reads them as root. Source: docs/tensorrt.md.

The service reads at its own pace, set by whoever connected first, so readings may come less often than asked.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping

from eamdeploy.devices.background import BackgroundSensor
from eamdeploy.devices.base import Reading
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

    def _take(self, at_ns: int, power: object, memory: object) -> None:
        rails, bad_rails = rails_mw(power)
        used, bad_memory = memory_bytes(memory)
        unread = [*bad_rails, *bad_memory]
        if unread and not rails and not used:
            self.skip("; ".join(unread))
            return
        self.leave_out(*unread)
        self.note(Reading(at_ns, rails, used))


def rails_mw(power: object) -> tuple[dict[str, float], list[str]]:
    """Power by rail of `jtop.power`, and in words what of it is no power.

    A board's input is not among the rails but the total, with its name. A total without a name is the sum of all rails,
    whether they overlap or not, and is not taken.
    """
    if not isinstance(power, Mapping):
        return {}, [f"power: {power!r}"]
    rails, total = power.get("rail"), power.get("tot")
    found = dict(rails) if isinstance(rails, Mapping) else {}
    bad = [] if isinstance(rails, Mapping) else [f"power without rails: {power!r}"]
    if isinstance(total, Mapping) and total.get("name") is not None:
        found[total["name"]] = total
    rails_found = {}
    for name, rail in found.items():
        number = _number(rail, "power")
        if number is None:
            bad.append(f"{name}: {rail!r}")
        else:
            rails_found[str(name)] = number
    return rails_found, bad


def memory_bytes(memory: object) -> tuple[dict[str, int], list[str]]:
    """Memory in use of `jtop.memory`, whose numbers are in KB, and in words what of it is no number.

    "nvmap" is what the GPU has of the RAM; where the kernel does not tell that (Thor), jtop gives the driver's number
    for the GPU instead: "gpu".
    """
    ram = memory.get("RAM") if isinstance(memory, Mapping) else None
    used = _number(ram, "used")
    if not isinstance(ram, Mapping) or used is None:
        return {}, [f"memory: {memory!r}"]
    found = {"ram": int(used) * _KB}
    if ram.get("shared"):
        shared = _number(ram, "shared")
        if shared is None:
            return found, [f"shared memory: {ram['shared']!r}"]
        found["gpu" if ram.get("shared_label") == "VRAM" else "nvmap"] = int(shared) * _KB
    return found, []


def _number(parts: object, name: str) -> float | None:
    """The finite number of that name; None where there is something else."""
    value = parts.get(name) if isinstance(parts, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
