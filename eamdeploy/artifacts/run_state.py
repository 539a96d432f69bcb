"""What `run.json` says: which stages of a run are finished, of what they were made and what they wrote."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from eamdeploy.artifacts.records import Record

RUN_STATE = "run.json"


class StageState(Record):
    """What a finished stage depended on, and the digests of its outputs by file name."""

    inputs: str
    outputs: dict[str, str]


class RunState(Record):
    """The finished stages by name."""

    format: Literal[1] = 1
    stages: dict[str, StageState] = Field(default_factory=dict)
