"""Names of machines, and what becomes of ssh's failures."""

from __future__ import annotations

import pytest

from eamdeploy.errors import ConfigError
from eamdeploy.remote.failures import lost_connection
from eamdeploy.remote.target import SshTarget


@pytest.mark.parametrize(
    ("text", "target", "arguments"),
    [
        ("ssh://board", SshTarget("board"), ["--", "board"]),
        ("ssh://board/", SshTarget("board"), ["--", "board"]),
        (
            "ssh://nv@orin-2.lan:2222",
            SshTarget("orin-2.lan", "nv", 2222),
            ["-l", "nv", "-p", "2222", "--", "orin-2.lan"],
        ),
        ("ssh://10.0.0.7:22", SshTarget("10.0.0.7", None, 22), ["-p", "22", "--", "10.0.0.7"]),
        ("ssh://[::1]", SshTarget("::1"), ["--", "::1"]),
        (
            "ssh://u@[fe80::1%eth0]:99",
            SshTarget("fe80::1%eth0", "u", 99),
            ["-l", "u", "-p", "99", "--", "fe80::1%eth0"],
        ),
    ],
)
def test_targets(text: str, target: SshTarget, arguments: list[str]) -> None:
    assert SshTarget.parse(text) == target
    assert target.arguments() == arguments
    assert SshTarget.parse(str(target)) == target


@pytest.mark.parametrize(
    "text",
    [
        *("", "board", "ssh://", "ssh:///", "http://board", "ssh://board/opt/eamdeploy", "ssh://board?x", "ssh://a b"),
        *(
            "ssh://-oProxyCommand=x",
            "ssh://u@-oProxyCommand=x",
            "ssh://-u@board",
            "ssh://u:secret@board",
            "ssh://@board",
        ),
        *("ssh://board:0", "ssh://board:65536", "ssh://board:", "ssh://board:22x", "ssh://board:²"),
        *(
            "ssh://::1",
            "ssh://[::1",
            "ssh://[board]",
            "ssh://[::1%;x]",
            "ssh://a;b",
            "ssh://$(x)",
            "ssh://a\nb",
            "ssh://ü",
        ),
    ],
)
def test_what_names_no_machine(text: str) -> None:
    with pytest.raises(ConfigError, match="names no machine for ssh; expected ssh://"):
        SshTarget.parse(text)


@pytest.mark.parametrize(
    ("code", "errors", "message"),
    [
        (
            255,
            "ssh: Could not resolve hostname x: Name or service not known\r\n",
            "no machine of the name in ssh://u@x",
        ),
        (
            255,
            "ssh: connect to host x port 22: No route to host",
            "can't be reached; got ssh: connect to host x port 22: No",
        ),
        (255, "Connection timed out during banner exchange", "ssh://u@x can't be reached"),
        (
            255,
            "/home/me/.ssh/config: line 3: Bad configuration option: nosuch",
            "can't connect to ssh://u@x; got /home",
        ),
        (255, "", "can't connect to ssh://u@x; got nothing on stderr. `ssh -l u x true` must work"),
        (127, "sh: not found", "its login shell ended with exit code 127; got sh: not found"),
        (None, "", "its login shell did not begin"),
    ],
)
def test_failures_before_our_program_began(code: int | None, errors: str, message: str) -> None:
    error = lost_connection(SshTarget("x", "u"), code, errors, "", connected=False)
    assert error.exit_code == 4 and message in str(error)


def test_a_connection_lost_later_is_told_with_ssh_s_last_words() -> None:
    errors = "Permission denied, said a banner\nTimeout, server x not responding.\n"
    error = lost_connection(SshTarget("x"), 255, errors, "", connected=True)
    assert "ssh://x was lost in the middle" in str(error) and "got Timeout, server x not responding. Look" in str(error)
