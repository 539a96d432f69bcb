"""The reference of all commands says what the commands say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from command_line import COMMANDS, RunCli

DOCS = Path(__file__).resolve().parents[2] / "docs"
REFERENCE = DOCS / "reference" / "commands.md"


def test_the_page_is_what_the_commands_print() -> None:
    printed = runpy.run_path(str(DOCS / "print_commands.py"))["page"]()
    same = REFERENCE.read_text(encoding="utf-8") == printed
    assert same, "the commands have changed: `make docs` writes docs/reference/commands.md anew"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_the_help_is_there(
    run_cli: RunCli,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = set(re.findall(r"(?m)^\W*(--[a-z0-9-]+)", run_cli(command, "--help").out))
    text = REFERENCE.read_text(encoding="utf-8")
    section = text.split(f"\n## {command}\n")[1].split("\n## ")[0]
    rows = re.findall(r"(?m)^\| `([^`]+)`", section)
    options = [row.split(",")[0].split("/")[0] for row in rows if row.startswith("--")]
    assert shown - {"--help"} == set(options)
