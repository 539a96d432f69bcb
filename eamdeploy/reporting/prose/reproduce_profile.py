"""The command behind a profile, of this machine or of several over SSH."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eamdeploy.records.profile import Profile
from eamdeploy.remote.profile import RemoteProfiles
from eamdeploy.reporting.prose.command_line import Command, command_line
from eamdeploy.reporting.records.sources import Sourced


def local_profile(item: Sourced[Profile]) -> Command:
    """What measured here."""
    record = item.record
    return _command(item.file, [record], [record.device_before.kind], [])


def remote_profiles(item: Sourced[RemoteProfiles]) -> Command:
    """What measured on all the machines; without figures it is not known what was asked of them."""
    record = item.record
    targets = [*record.profiles, *record.failures]
    unknown = ["--remote-command, --ssh-config"]
    if record.profiles:
        return _command(item.file, list(record.profiles.values()), targets, unknown)
    text = command_line("profile", {"--device": targets, "-o": item.file}, "ENGINE")
    return Command(item.file, text, "; ".join(["the engines and all options", *unknown]))


def _command(file: str, profiles: Sequence[Profile], devices: list[str], unknown: list[str]) -> Command:
    """The command of profiles of the same engines, measured in the same way."""
    first = profiles[0]
    everyone = [*([] if first.baseline is None else [first.baseline]), *first.engines]
    powers = [engine.power for profile in profiles for engine in profile.engines]
    threads = {profile.threads for profile in profiles}
    options: dict[str, Any] = {
        "--baseline": None if first.baseline is None else first.baseline.engine,
        "--device": devices,
        "--threads": first.threads if len(threads) == 1 else None,  # by default each machine's number of cores
        "--batch": first.batch,
        "--streams": next((engine.throughput.streams for engine in everyone if engine.throughput is not None), None),
        "--warmup-ms": first.warmup_ms,
        "--min-seconds": first.min_seconds,
        "--min-runs": first.min_runs,
        "--sittings": first.sittings,
        "--no-memory": all(engine.memory is None for engine in everyone),
        "--layer-profile": any(engine.layer_ms is not None for engine in everyone),
        "-o": file,
    }
    missing = "--power-seconds" if any(powers) else "whether --no-power was given"
    text = command_line("profile", options, *(engine.engine for engine in first.engines))
    return Command(file, text, "; ".join([*unknown, missing]))
