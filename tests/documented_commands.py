"""The commands that the documentation shows, and what each needs to be run by a test.

A fence of the language bash, sh or console holds commands. The line directly above it may be a
note: `<!-- not run: why -->`, or `<!-- exits with 3 -->` where another exit code than 0 is meant.
"""

from __future__ import annotations

import functools
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from tiny_models import KWARGS

from eamdeploy.cli.app import app

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LANGUAGES = ("bash", "sh", "console")

TINY = ("--model-kwargs", *(f"{name}={value}" for name, value in KWARGS.items()))
SUBSTITUTES = {"pretrained": "weights.safetensors"}
"""What a test writes in place of a word of a command; what a reader sees stays natural."""
ADDED: dict[str, tuple[str, ...]] = {
    "analyze": TINY,
    "freeze": TINY,
    "pack": TINY,
    "export": ("--no-measure",),
    "profile": (
        *("--warmup-ms", "0", "--min-seconds", "0", "--min-runs", "2", "--sittings", "1"),
        *("--no-memory", "--power-seconds", "0.1"),
    ),
}
"""What a test adds to a command: the arguments that make the model a tiny one, and short timings."""

_FENCE = re.compile(
    r"(?:^<!--[ ]*(?P<note>[^\n]*?)[ ]*-->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_NOTE = re.compile(r"not run: *(?P<reason>.+)|exits with (?P<code>\d+)")
_COMMAND = re.compile(r"(?:\$ )?(?:eamdeploy|make|pip|docker|git|python3?) [-\w.]")
_SHELL = {"&&", "||", "|", ";", "<", ">", ">>"}


@dataclass(frozen=True)
class Fence:
    """A block of a page between two lines of three backquotes.

    Attributes:
        line: the number in the page of the line that opens it.
        note: the text of the comment on the line above; empty without one.
    """

    line: int
    language: str
    note: str
    body: str

    @property
    def excused(self) -> bool:
        """Whether its commands are not run."""
        return self.note.startswith("not run:")

    @property
    def exit_code(self) -> int:
        """What its commands must exit with."""
        found = _NOTE.fullmatch(self.note)
        return int(found["code"]) if found and found["code"] else 0

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command, without comments and prompts; none where it is no shell."""
        if self.language not in LANGUAGES:
            return []
        lines = self.body.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def documents(root: Path) -> list[Path]:
    """The pages that show commands."""
    named = [root / name for name in ("README.md", "CONTRIBUTING.md", "models/README.md")]
    return [*named, *sorted((root / "docs").rglob("*.md"))]


def fences(text: str) -> list[Fence]:
    """All fences of a page, in order."""
    return [
        Fence(
            line=text.count("\n", 0, found.start("language")) + 1,
            language=found["language"],
            note=found["note"] or "",
            body=found["body"],
        )
        for found in _FENCE.finditer(text)
    ]


def complaints(text: str, root: Path) -> list[str]:
    """What is wrong with the commands of a page before any is run, each with its line."""
    found = []
    for fence in fences(text):
        wrong = [
            *_wrong_form(fence),
            *(_wrong_command(fence, words, root) for words in fence.commands),
        ]
        found += [(fence.line, each) for each in wrong if each]
    outside = _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    for number, line in enumerate(outside.splitlines(), 1):
        if line.strip().startswith(("```", "~~~")):
            found.append((number, "a fence of another form: ``` at the margin, above and below"))
        elif re.match(r"    |\t", line) and _COMMAND.match(line.strip()):
            found.append((number, f"a command that is only indented; use ```bash: {line.strip()}"))
    return [f"line {number}: {what}" for number, what in sorted(found)]


def as_run(words: list[str]) -> list[str]:
    """The arguments with which a test runs a command of ours: a tiny model, and short timings."""
    name, *arguments = words[1:]
    if "--model" in arguments and "--weights" not in arguments:
        arguments = ["--weights", "pretrained", *arguments]
    return [name, *(SUBSTITUTES.get(each, each) for each in arguments), *ADDED.get(name, ())]


def _wrong_form(fence: Fence) -> list[str]:
    lines = [line for line in fence.body.splitlines() if _COMMAND.match(line)]
    if lines and not fence.language:
        return [f"a command in a fence without a language; use ```bash: {lines[0]}"]
    if fence.language in LANGUAGES and fence.note and not _NOTE.fullmatch(fence.note):
        return [f"the note is neither `not run: REASON` nor `exits with N`: {fence.note}"]
    return []


def _wrong_command(fence: Fence, words: list[str], root: Path) -> str:
    """What is wrong with a command; nothing where it can be run, or is checked and excused."""
    name = words[0]
    if name == "eamdeploy":
        return _wrong_options(words, excused=fence.excused)
    if name in CHECKED:
        return CHECKED[name](words, root)
    if fence.excused:
        return ""
    return f"`{name}` is neither run nor excused by `<!-- not run: REASON -->`"


def _wrong_options(words: list[str], *, excused: bool) -> str:
    """An option that the command does not have, or what only a shell could run."""
    group = _command_line()
    name = next((word for word in words if word in group.commands), None)
    known = {"--help", *(option for each in group.params for option in each.opts)}
    if name is not None:
        params = group.commands[name].params
        known |= {option for each in params for option in (*each.opts, *each.secondary_opts)}
    unknown = [word for word in words if re.match(r"-\D", word) and word.split("=")[0] not in known]
    if unknown:
        return f"`eamdeploy {name}` has no option {unknown[0]}"
    if name is None and "--version" not in words and "--help" not in words:
        return f"no command of eamdeploy: {shlex.join(words)}"
    if excused or not _SHELL & set(words):
        return ""
    return "a line for a shell; one plain command a line, please"


@functools.cache
def _command_line() -> Any:
    return typer.main.get_command(app)


def _unknown_target(words: list[str], root: Path) -> str:
    targets = re.findall(r"(?m)^([a-z0-9-]+):", (root / "Makefile").read_text(encoding="utf-8"))
    asked = [word for word in words[1:] if "=" not in word]
    return "".join(f"the Makefile has no target {word}" for word in asked if word not in targets)


def _unknown_extra(words: list[str], root: Path) -> str:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [extra for word in words for extra in re.findall(r"^(?:eamdeploy|\.)\[(.*)\]$", word)]
    names = {name for each in asked for name in each.split(",")}
    unknown = sorted(names - set(project["optional-dependencies"]))
    return f"eamdeploy has no extra {', '.join(unknown)}" if unknown else ""


def _missing_file(words: list[str], root: Path) -> str:
    scripts = [word for word in words if word.endswith(".py")]
    return "".join(f"no file {word}" for word in scripts if not (root / word).is_file())


def _missing_dockerfile(words: list[str], root: Path) -> str:
    file = "compose.yaml" if "compose" in words else "Dockerfile"
    return "" if (root / file).is_file() else f"no file {file}"


CHECKED: dict[str, Callable[[list[str], Path], str]] = {
    "make": _unknown_target,
    "pip": _unknown_extra,
    "python": _missing_file,
    "docker": _missing_dockerfile,
}
"""Commands that are not run, and what of each is looked at: that it names what there is."""
