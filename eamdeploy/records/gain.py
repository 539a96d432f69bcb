"""What freezing gains on one machine."""

from __future__ import annotations

from pydantic import Field

from eamdeploy.artifacts.records import Record
from eamdeploy.profiling.timing import SpeedUp


class Gain(Record):
    """How much faster the frozen model is than its unfrozen twin, here and now.

    Attributes:
        speed_up: the twin's time ÷ the frozen model's, run by run, on ONNX Runtime CPU with one image.
    """

    speed_up: SpeedUp
    threads: int = Field(ge=1)
    machine: str
