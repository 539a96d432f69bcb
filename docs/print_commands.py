"""Writes docs/reference/commands.md anew, from the commands themselves: `make docs`.

The signatures of the commands are read, not the help that Typer prints: the page is the same with
every version of Typer and on terminals of every width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from inspect import Signature, getdoc, signature
from pathlib import Path
from textwrap import fill
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from eamdeploy.cli.app import COMMANDS, configure
from eamdeploy.cli.spread import spread

PAGE = Path(__file__).with_name("reference") / "commands.md"
WIDTH = 100  # of a line that is not in a table
KINDS = {Path: "path", str: "text", int: "whole number", float: "number"}
UNITS = {"ms": "milliseconds", "seconds": "seconds"}
"""What the last word of a name says of the number."""
GUIDES = {
    "analyze": "[Choosing what is frozen](../guides/sparsity.md)",
    "freeze": "[Choosing what is frozen](../guides/sparsity.md), [Images](../guides/images.md)",
    "pack": "[Pack your own frozen maps](../guides/own-maps.md)",
    "recover": "[Freezing more](../guides/recovering.md)",
    "export": "[ONNX Runtime](../guides/onnx-runtime.md), [TensorRT](../guides/tensorrt.md)",
    "lint": "[TensorRT](../guides/tensorrt.md)",
    "build-ort": "[ONNX Runtime](../guides/onnx-runtime.md), [INT8](../guides/int8.md)",
    "build-trt": "[TensorRT](../guides/tensorrt.md), [INT8](../guides/int8.md)",
    "evaluate": "[Measure and report](../guides/measuring.md), [Images](../guides/images.md)",
    "profile": "[Measure and report](../guides/measuring.md), [Other machines](../guides/ssh.md)",
    "report": "[Measure and report](../guides/measuring.md)",
    "run": "[The configuration file](configuration.md)",
    "inspect": "[Files](files.md)",
    "doctor": "[Getting started](../getting-started.md)",
}
"""Where each command is explained, as seen from docs/reference/."""

HEAD = """\
# Commands

<!-- Printed by docs/print_commands.py from the commands themselves; `make docs` prints it anew. -->

`eamdeploy COMMAND --help` shows the same in a terminal. [Exit codes](exit-codes.md) are the same
for every command.
"""
BEFORE = """\
## Options before the command

As in `eamdeploy --quiet freeze …`.

"""


class Parameter(NamedTuple):
    """An option or argument: its name in Python, its type without None, Typer's record, default."""

    name: str
    kind: Any
    info: OptionInfo | ArgumentInfo
    default: Any

    @property
    def required(self) -> bool:
        return self.default is Signature.empty

    def spelling(self) -> str:
        """As it is written on the command line."""
        if isinstance(self.info, ArgumentInfo):
            return self.name.upper() + ("…" if get_origin(self.kind) is list else "")
        name = self.name.replace("_", "-")
        # Typer keeps the first spelling as the record's default until it makes the command
        given: tuple[object, ...] = (self.info.default, *(self.info.param_decls or ()))
        declared = [each for each in given if isinstance(each, str)]
        usual = f"--{name}/--no-{name}" if self.kind is bool else f"--{name}"
        return ", ".join(declared or [usual])

    def value(self) -> str:
        """What may be given: the choices, or a kind with unit and bound; nothing for a switch."""
        kinds = get_args(self.kind)
        if self.kind is bool:
            return ""
        if get_origin(self.kind) is Literal:
            return ", ".join(f"`{choice}`" for choice in kinds)
        if kinds:
            return f"{KINDS[kinds[0]]}, repeatable" if len(kinds) == 1 else f"{len(kinds)} numbers"
        unit = UNITS.get(self.name.split("_")[-1], KINDS[self.kind])
        return unit if self.info.min is None else f"{unit}, at least {self.info.min}"

    def fallback(self) -> str:
        """What holds where nothing is given; nothing for a switch, which is off."""
        if self.required:
            return "required"
        if isinstance(self.info.show_default, str):
            return self.info.show_default
        if self.kind is bool:
            return ("on" if self.default else "off") if "/" in self.spelling() else ""
        if self.default in (None, []):
            return ""
        return f"`{self.default:g}`" if self.kind is float else f"`{self.default}`"


def parameters(command: Callable[..., Any]) -> Iterator[Parameter]:
    """The options and arguments of a command, in the order of its help."""
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in signature(command).parameters.items():
        kind, *infos = get_args(hints[name]) or (None,)
        if NoneType in get_args(kind):
            (kind,) = (each for each in get_args(kind) if each is not NoneType)
        for info in infos:
            if isinstance(info, OptionInfo | ArgumentInfo):
                yield Parameter(name, kind, info, parameter.default)


def table(command: Callable[..., Any]) -> str:
    """What a command takes, the arguments first, then the options."""
    lines = ["| argument or option | value | default | meaning |", "|---|---|---|---|"]
    for row in sorted(parameters(command), key=lambda each: isinstance(each.info, OptionInfo)):
        meaning = as_markdown(row.info.help)
        lines.append(f"| `{row.spelling()}` | {row.value()} | {row.fallback()} | {meaning} |")
    return "\n".join([*lines, ""])


def section(name: str, command: Callable[..., Any]) -> str:
    """What the page says of a command."""
    every = list(parameters(command))
    arguments = [each.spelling() for each in every if isinstance(each.info, ArgumentInfo)]
    asked = [each.name for each in every if each.required and isinstance(each.info, OptionInfo)]
    needed = [f"--{each} {each.upper()}" for each in asked]
    usage = " ".join(["eamdeploy", name, *needed, "[OPTIONS]", *arguments])
    title = fill(as_markdown(getdoc(command)), WIDTH)
    head = [f"## {name}", title, f"`{usage}`", f"Explained in {GUIDES[name]}.", table(command)]
    return "\n\n".join(head)


def page() -> str:
    """The whole page."""
    commands = {each.__name__.replace("_", "-"): spread(each) for each in COMMANDS}
    heads = {name: as_markdown(getdoc(each)) for name, each in commands.items()}
    listed = [f"| [{name}](#{name}) | {head} |" for name, head in heads.items()]
    contents = "\n".join(["| command | what it does |", "|---|---|", *listed, ""])
    before = BEFORE + table(configure)
    return "\n".join([HEAD, contents, before, *(section(*each) for each in commands.items())])


def as_markdown(text: str | None) -> str:
    """Plain text, with what Markdown would read as its own escaped."""
    return re.sub(r"[|<*]", r"\\\g<0>", text or "")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
