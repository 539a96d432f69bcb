"""Profiles engines on other machines, over SSH: one session each, side by side.

    session: check the board ──▶ send engines ──▶ `eamdeploy profile` there ──▶ bring the JSON back ──▶ clean up

Nothing is installed there, and nothing is left.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from eamdeploy.artifacts.records import Record
from eamdeploy.errors import ConfigError, DeviceError, EamDeployError, EngineError, ExitCode, ParityError
from eamdeploy.observer import SILENT, Observer
from eamdeploy.records.profile import Profile
from eamdeploy.remote.board_checks import require_eamdeploy, require_sizes, require_space, require_unpacked
from eamdeploy.remote.board_script import WORK, board_script, bootstrap
from eamdeploy.remote.cargo import Cargo, pack_cargo
from eamdeploy.remote.failures import last_line
from eamdeploy.remote.session import SshSession, new_mark
from eamdeploy.remote.target import SshTarget

_BOARD_PATIENCE_S = 60.0  # what the board's own deadline allows beyond ours
_KILLED = 128 + 9

_ERRORS: dict[int, type[EamDeployError]] = {
    ExitCode.BAD_INPUT: EngineError,
    ExitCode.GATE_FAILED: ParityError,
    ExitCode.UNAVAILABLE: DeviceError,
}


class RemoteFailure(Record):
    """Why a machine gave no figures.

    Attributes:
        message: names the machine.
        exit_code: of a command that ends with it (docs/design.md, Command line).
    """

    message: str
    exit_code: int


class RemoteProfiles(Record):
    """What machines measured; every target is in one of the two."""

    profiles: dict[str, Profile]
    failures: dict[str, RemoteFailure]

    def require_all(self) -> None:
        """Nothing happens if every machine gave figures.

        Raises:
            EamDeployError: with all failures, and who succeeded; its exit code is theirs where they have the same.
        """
        if not self.failures:
            return
        codes = {failure.exit_code for failure in self.failures.values()}
        kind = _ERRORS.get(codes.pop(), DeviceError) if len(codes) == 1 else DeviceError
        messages = " | ".join(failure.message for failure in self.failures.values())
        total = len(self.failures) + len(self.profiles)
        if total == 1:
            raise kind(messages)
        succeeded = ", ".join(self.profiles) or "none"
        raise kind(f"{len(self.failures)} of {total} machines failed: {messages} | succeeded: {succeeded}")


@dataclass(frozen=True)
class _Order:
    """What every machine is asked to do.

    Attributes:
        command: the words that run eamdeploy there.
        arguments: of eamdeploy, as `board_script` takes them.
    """

    cargo: Cargo
    has_baseline: bool
    command: tuple[str, ...]
    arguments: tuple[str, ...]
    timeout_s: float
    ssh_config: Path | None


def profile_remote(
    targets: Sequence[str],
    engines: Sequence[Path],
    baseline: Path | None = None,
    arguments: Sequence[str] = (),
    *,
    remote_command: str = "eamdeploy",
    timeout_s: float = 3600.0,
    ssh_config: Path | None = None,
    observer: Observer = SILENT,
) -> RemoteProfiles:
    """Figures of all engines from every machine, with the paths that the engines have here; or why it gave none.

    Args:
        targets: machines as `ssh://[user@]host[:port]`.
        engines: or any ONNX models; files that they keep their data in are sent along.
        arguments: options of `eamdeploy profile`, but for engines, `--baseline`, `--output` and `--json`.
        remote_command: what runs eamdeploy there, e.g. `~/venv/bin/eamdeploy`; `~/` is the home folder there.
        timeout_s: for each machine, everything together.
        ssh_config: read in place of the user's and the system's configuration of ssh.

    Raises:
        ConfigError: a target is misspelled or there twice, an engine can't be read, or `remote_command` is no command.
        CheckpointError, EngineError: an engine's manifest is damaged or describes another file.
    """
    machines = _parse_targets(targets)
    if not engines:
        raise ConfigError("there is nothing to profile", expected="at least 1 engine")
    cargo = pack_cargo([*([] if baseline is None else [baseline]), *engines])
    names = [f"{WORK}{engine.name}" for engine in cargo.engines]
    first = [] if baseline is None else ["--baseline", names.pop(0)]
    order = _Order(
        cargo=cargo,
        has_baseline=baseline is not None,
        command=_split_command(remote_command),
        arguments=("profile", *names, *first, *arguments, "--json"),
        timeout_s=timeout_s,
        ssh_config=ssh_config,
    )
    stopping = Event()
    with ThreadPoolExecutor(max_workers=len(machines)) as pool:
        try:
            running = {
                text: pool.submit(_measure, machine, order, stopping, observer) for text, machine in machines.items()
            }
            wait(running.values())
        except BaseException:  # Ctrl-C: leaving the block waits until the machines have ended their work
            stopping.set()
            raise
    profiles, failures = {}, {}
    for text, future in running.items():
        try:
            profiles[text] = future.result()
        except EamDeployError as err:
            failures[text] = RemoteFailure(message=str(err), exit_code=err.exit_code)
    return RemoteProfiles(profiles=profiles, failures=failures)


def _parse_targets(targets: Sequence[str]) -> dict[str, SshTarget]:
    if not targets:
        raise ConfigError("there is no machine to profile on", expected="at least one ssh://host")
    machines = {text: SshTarget.parse(text) for text in targets}
    if len(set(machines.values())) < len(targets):
        raise ConfigError(
            "a machine is named twice", expected="each once: engines would disturb each other", got=targets
        )
    return machines


def _split_command(remote_command: str) -> tuple[str, ...]:
    try:
        words = shlex.split(remote_command)
    except ValueError as err:
        raise ConfigError("the remote command can't be used", expected="words as in a shell", got=str(err)) from err
    if not words:
        raise ConfigError("the remote command can't be used", expected="a command that runs eamdeploy", got="nothing")
    return tuple(words)


def _measure(target: SshTarget, order: _Order, stopping: Event, observer: Observer) -> Profile:
    """What `target` measured; its folder there is gone again."""
    mark, cargo = new_mark(), order.cargo
    script = board_script(
        mark,
        order.command,
        order.arguments,
        [file.name for file in cargo.files],
        archive_bytes=cargo.archive_bytes,
        deadline_s=order.timeout_s + _BOARD_PATIENCE_S,
    )
    with SshSession(
        target, bootstrap(script), mark, timeout_s=order.timeout_s, stopping=stopping, ssh_config=order.ssh_config
    ) as session:
        session.send(script)
        session.receive("begin")
        folder = session.receive("folder", "no-folder")
        if folder.kind == "no-folder":
            raise DeviceError(f"no folder can be made on {target}", expected="space in TMPDIR or /tmp", got=folder.text)
        free_bytes = require_space(target, session.receive("disk"), cargo)
        doctor, errors = session.receive("doctor"), session.receive("errors")
        version = require_eamdeploy(target, doctor, errors, shlex.join(order.command), cargo)
        for sent_bytes in _send(session, cargo):
            observer.progress(f"sending to {target}", sent_bytes, cargo.archive_bytes)
        require_unpacked(target, session.receive("copied"), cargo, free_bytes)
        require_sizes(target, session.receive("sizes"), cargo)
        session.send(b"go\n")
        observer.note(f"{target}: eamdeploy {version} measures there")
        measured, errors = session.receive("profile"), session.receive("errors")
    if measured.detail != "0":
        raise _remote_error(target, int(measured.detail), _with_local_paths(errors.text, folder.text, cargo))
    profile = Profile.parse(measured.body, f"what {target} measured")
    return _of_local_files(target, profile, order)


def _send(session: SshSession, cargo: Cargo) -> Iterator[int]:
    """Bytes sent so far, after each piece of the archive."""
    sent_bytes = 0
    for data in cargo.archive():
        session.send(data)
        sent_bytes += len(data)
        yield sent_bytes


def _remote_error(target: SshTarget, code: int, errors: str) -> EamDeployError:
    """An error like the one that eamdeploy had there, with its words."""
    said = last_line(errors).removeprefix("error: ") or "nothing on stderr"
    if code in _ERRORS:
        return _ERRORS[code](f"{target}: {said}")
    if code == ExitCode.BUG:
        return DeviceError(f"{target}: eamdeploy failed there by a bug", got=said)
    memory = ", perhaps for want of memory" if code == _KILLED else ""
    return DeviceError(f"{target}: eamdeploy was ended there with exit code {code}{memory}", got=said)


def _with_local_paths(text: str, folder: str, cargo: Cargo) -> str:
    for file in cargo.files:
        text = text.replace(f"{folder}/{file.name}", str(file.path))
    return text


def _of_local_files(target: SshTarget, profile: Profile, order: _Order) -> Profile:
    """The profile with the paths that the engines have here.

    Raises:
        DeviceError: it is not one of these files.
    """
    everyone = [*([] if profile.baseline is None else [profile.baseline]), *profile.engines]
    digests = tuple(item.digest for item in everyone)
    if digests != order.cargo.digests or (profile.baseline is not None) != order.has_baseline:
        raise DeviceError(
            f"{target} measured other files than were sent", expected=", ".join(order.cargo.digests), got=digests
        )
    local = [
        item.model_copy(update={"engine": str(file.path)})
        for item, file in zip(everyone, order.cargo.engines, strict=True)
    ]
    baseline = local.pop(0) if order.has_baseline else None
    return profile.model_copy(update={"baseline": baseline, "engines": local})
