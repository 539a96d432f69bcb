"""What OpenSSH's client says when it fails, as errors that name the machine and the remedy."""

from __future__ import annotations

from eamdeploy.errors import DeviceError
from eamdeploy.remote.target import SshTarget

_SSH_FAILED = 255
_UNREACHABLE = (
    *("Connection refused", "No route to host", "Connection timed out", "Operation timed out"),
    *("Network is unreachable", "Host is down", "Connection reset by", "kex_exchange_identification"),
)


def lost_connection(target: SshTarget, code: int | None, errors: str, output: str, *, connected: bool) -> DeviceError:
    """Why ssh ended too early.

    Args:
        code: its exit code; None when it has not ended yet.
        errors: what it wrote to stderr, messages of the login shell there among them.
        output: the last that came from the other side.
        connected: whether our program there had begun.
    """
    last = last_line(errors) or last_line(output)
    if connected:
        return DeviceError(
            f"the connection to {target} was lost in the middle; what ran there has been told to end",
            got=last or f"exit code {code}",
            hint="Look whether it is still up, has power and memory, and try again.",
        )
    if code != _SSH_FAILED:
        ended = "did not begin" if code is None else f"ended with exit code {code}"
        return DeviceError(
            f"no program can be run on {target}: its login shell {ended}",
            got=last or "nothing on stderr",
            hint=f"`{target.command()} sh -c true` should end without an error.",
        )
    return _refused(target, errors)


def _refused(target: SshTarget, errors: str) -> DeviceError:
    known = f"[{target.host}]:{target.port}" if target.port not in (None, 22) else target.host
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in errors:
        return DeviceError(
            f"{target} shows another host key than the one that is known: nothing was sent to it",
            hint=f"If the board was set up anew, forget its old key with: ssh-keygen -R '{known}', and connect "
            f"once with: {target.command()}. If it was not, another machine answers in its place.",
        )
    if "Host key verification failed" in errors:
        return DeviceError(
            f"the host key of {target} is not known: nothing was sent to it",
            hint=f"Connect once by hand and compare the fingerprint: {target.command()}",
        )
    if "Permission denied" in errors or "Too many authentication failures" in errors:
        return DeviceError(
            f"{target} lets nobody in with the keys that ssh has here",
            got=_line_with("Permission denied", errors) or last_line(errors),
            hint="Passwords and passphrases can't be typed: put your key there with ssh-copy-id, or a locked key into "
            f"the agent with ssh-add; `{target.command()} true` must work without a question.",
        )
    if "Could not resolve hostname" in errors:
        return DeviceError(
            f"there is no machine of the name in {target}",
            got=_line_with("Could not resolve hostname", errors),
            hint="Give its address, or an alias in ~/.ssh/config.",
        )
    for words in _UNREACHABLE:
        if words in errors:
            return DeviceError(
                f"{target} can't be reached",
                got=_line_with(words, errors),
                hint="Check its power, its network, and that an SSH server runs on that port.",
            )
    return DeviceError(
        f"ssh can't connect to {target}",
        got=last_line(errors) or "nothing on stderr",
        hint=f"`{target.command()} true` must work without a question.",
    )


def _line_with(words: str, text: str) -> str:
    return next((line.strip() for line in text.splitlines() if words in line), "")


def last_line(text: str) -> str:
    """The last line that says something, without its full stop."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else ""
