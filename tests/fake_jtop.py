"""A fake of jetson-stats' module `jtop`: the part that is used, with the numbers of real boards."""

from __future__ import annotations

import time
from types import ModuleType, TracebackType
from typing import Any

# As jetson-stats 4 shows them: the input is not among the rails, but the total with its name.
ORIN_NANO = {
    "rail": {
        "VDD_CPU_GPU_CV": {"volt": 4992, "curr": 1424, "power": 7104, "avg": 4944, "online": True, "type": "INA3221"},
        "VDD_SOC": {"volt": 4992, "curr": 625, "power": 3120, "avg": 3659, "online": True, "type": "INA3221"},
    },
    "tot": {"volt": 5000, "curr": 3264, "power": 16321, "avg": 11204, "name": "VDD_IN", "type": "INA3221"},
}
AGX_ORIN = {
    "rail": {
        "VDDQ_VDD2_1V8AO": {"volt": 5032, "curr": 60, "power": 301, "avg": 301},
        "VDD_CPU_CV": {"volt": 19920, "curr": 40, "power": 796, "avg": 796},
        "VDD_GPU_SOC": {"volt": 19920, "curr": 120, "power": 2390, "avg": 2390},
        "VIN_SYS_5V0": {"volt": 5032, "curr": 700, "power": 3522, "avg": 3522},
    },
    "tot": {"power": 7009, "avg": 7009},
}
MEMORY = {"RAM": {"tot": 7802880, "used": 6873088, "free": 1, "shared": 262144, "lfb": 4}, "SWAP": {"tot": 0}}


class JtopException(Exception):
    pass


class FakeService:
    """jtop's service.

    Attributes:
        power, memory: what it sends.
        refuses: what connecting to it raises.
        answers: how often it sends something before it falls silent.
        breaks: what waiting for it raises.
        intervals: what its clients asked for; `open` of them are connected.
    """

    def __init__(self) -> None:
        self.power: dict[str, Any] = ORIN_NANO
        self.memory: dict[str, Any] = MEMORY
        self.refuses: Exception | None = None
        self.answers = 10**9
        self.breaks: Exception | None = None
        self.intervals: list[float] = []
        self.open = 0

    def module(self) -> ModuleType:
        service = self

        class jtop:  # noqa: N801 - jetson-stats' name
            def __init__(self, interval: float = 1.0) -> None:
                service.intervals.append(interval)

            def __enter__(self) -> jtop:
                if service.refuses is not None:
                    raise service.refuses
                service.open += 1
                return self

            def __exit__(
                self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
            ) -> None:
                service.open -= 1

            def ok(self) -> bool:
                time.sleep(0.01)
                if service.breaks is not None:
                    raise service.breaks
                service.answers -= 1
                return service.answers >= 0

            @property
            def power(self) -> dict[str, Any]:
                return service.power

            @property
            def memory(self) -> dict[str, Any]:
                return service.memory

        module = ModuleType("jtop")
        module.jtop = jtop  # type: ignore[attr-defined]
        module.JtopException = JtopException  # type: ignore[attr-defined]
        return module
