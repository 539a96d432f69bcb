"""A command line as text."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """A command line.

    Attributes:
        file: what it wrote.
        text: ready for a shell, but for its words in capitals.
        unknown: what the file does not tell; empty if it tells all that matters.
    """

    file: str
    text: str
    unknown: str


def command_line(command: str, options: Mapping[str, Any], *arguments: str) -> str:
    """The command with those options that are set.

    Args:
        options: True stands for a switch, a tuple for an option of several words, a list for one that is repeated.
    """
    words = ["eamdeploy", command, *arguments]
    for name, value in options.items():
        if value is None or value is False:
            continue
        for each in value if isinstance(value, list) else [value]:
            words.append(name)
            if each is not True:
                words += map(str, each) if isinstance(each, tuple) else [str(each)]
    return shlex.join(words)
