"""`eamdeploy profile --device …` on the command line: fake Jetson boards, and machines behind a real OpenSSH server."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import RunCli, only_error
from fake_jetson import ORIN_NANO_LINE, Generation, make_board, write_program
from ssh_server import python_eamdeploy, running_boards

from eamdeploy.cli import options as options
from eamdeploy.devices.background import BackgroundSensor
from eamdeploy.devices.base import Device
from eamdeploy.errors import ConfigError
from eamdeploy.records.profile import Profile
from eamdeploy.remote.profile import RemoteProfiles

QUICK = ("--threads", 1, "--warmup-ms", 0, "--min-seconds", 0, "--min-runs", 4, "--sittings", 2)
POWER = ("--power-seconds", 0.5)


@pytest.fixture
def no_jtop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jtop", None)


@pytest.mark.parametrize(
    ("generation", "name", "software", "total"),
    [
        ("jetpack5", "AGX Orin", {"JetPack": "5.1", "L4T": "35"}, ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"]),
        ("jetpack6", "Orin Nano", {"JetPack": "6", "L4T": "36"}, ["VDD_IN"]),
        ("jetpack7", "Thor", {"JetPack": "7", "L4T": "38"}, ["VIN"]),
    ],
)
def test_a_jetson_is_found_and_measured(
    generation: Generation,
    name: str,
    software: dict[str, str],
    total: list[str],
    no_jtop: None,
    eam_engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_cli: RunCli,
) -> None:
    board = make_board(tmp_path / "root", tmp_path / "bin", generation)
    for variable, value in board.environment.items():
        monkeypatch.setenv(variable, value)
    twin = eam_engine.with_name("base.ort.onnx")
    done = run_cli("profile", eam_engine, "--baseline", twin, "--device", "jetson", *QUICK, *POWER, "--json")
    assert done.code == 0, done.err
    measured = Profile.parse(done.out, "stdout")
    before = measured.device_before
    assert before.kind == "jetson" and name in before.name
    assert all(before.software[key].startswith(value) for key, value in software.items())
    assert before.power_mode and before.temperatures_c and before.clocks_mhz
    for item in (measured.baseline, *measured.engines):
        assert item is not None and item.power is not None
        power = item.power
        assert power.mean_mw is not None
        assert (power.source, power.total_rails) == ("tegrastats", total)
        assert power.mean_mw == pytest.approx(sum(power.rails_mw[rail] for rail in total))
        assert power.energy_mj_per_image == pytest.approx(power.mean_mw / power.images_per_s)
        assert power.energy_above_idle_mj_per_image == pytest.approx(0, abs=1e-9)  # a fake board never changes
        assert power.memory_peak_bytes["ram"] > 1 << 30
    for words in (before.name, before.power_mode, " + ".join(total), "(tegrastats)", *before.warnings):
        assert " ".join(words.split()) in " ".join(done.err.split())
    found = run_cli("profile", eam_engine, *QUICK, *POWER, "--no-memory", "--json")  # without being told
    assert Profile.parse(found.out, "stdout").device_before.name == before.name


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("#!/bin/sh\necho 'cannot open /dev/nvhost' >&2\nexit 3\n", "got exit code 3: cannot open /dev/nvhost"),
        ("#!/bin/sh\nwhile :; do echo Hello; sleep 0.05; done\n", "can't be understood, the last: 'Hello'"),
        ("#!/bin/sh\nexec sleep 60\n", "tegrastats gave no reading; expected one within 0.5 s; got nothing"),
        (None, "the power of this Jetson can't be read: jtop does not answer, tegrastats is not on PATH"),
    ],
)
def test_jetson_whose_power_can_not_be_read_keeps_its_latency_and_says_why(
    script: str | None,
    said: str,
    no_jtop: None,
    eam_engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_cli: RunCli,
) -> None:
    measured, shown = measure_board(tmp_path, monkeypatch, run_cli, eam_engine, script)
    (item,) = measured.engines
    assert item.power is None and item.latency.runs == 4 and item.latency.p50_ms > 0
    assert measured.sensor is not None and said in (measured.sensor.failure or "")
    assert "power is missing or incomplete: " in shown and said in shown


def test_jetson_whose_tegrastats_says_more_than_is_known_keeps_its_power(
    no_jtop: None, eam_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    line = ORIN_NANO_LINE.replace(" GR3D_FREQ 99%@[612]", "  FAN 30%  GR3D_FREQ 0 %@[612] ").replace(
        "10-08-2026 ", "2026-10-08T"
    )
    script = f"#!/bin/sh\nwhile :; do echo '{line}'; echo Hello; sleep 0.02; done\n"
    measured, shown = measure_board(tmp_path, monkeypatch, run_cli, eam_engine, script)
    (item,) = measured.engines
    assert item.power is not None and item.power.mean_mw == 16321
    notes = measured.sensor
    assert notes is not None and notes.failure is None
    assert notes.left_out >= item.power.samples and notes.left_out_example == "FAN 30%"
    assert notes.skipped >= item.power.samples and notes.skipped_example == "Hello"
    assert "left out, e.g. 'FAN 30%'" in shown and "were skipped, e.g. 'Hello'" in shown


def test_jetson_whose_tegrastats_ends_meanwhile_keeps_what_it_said_before(
    no_jtop: None, eam_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    """After 3 s of rest and the first pass of half a second it ends in the second one."""
    goes_on = "$(($(date +%s%N) / 1000000 < begin + 3700))"
    loop = f"while [ {goes_on} = 1 ]; do echo '{ORIN_NANO_LINE}'; sleep 0.05; done"
    script = f"#!/bin/sh\nbegin=$(($(date +%s%N) / 1000000))\n{loop}\necho gone >&2\nexit 4\n"
    measured, shown = measure_board(tmp_path, monkeypatch, run_cli, eam_engine, script)
    (item,) = measured.engines
    assert item.power is not None and item.power.mean_mw == 16321 and item.latency.runs == 4
    assert measured.sensor is not None and "exit code 4: gone" in (measured.sensor.failure or "")
    assert "exit code 4: gone" in shown


def measure_board(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli, engine: Path, tegrastats: str | None
) -> tuple[Profile, str]:
    """What `profile` gives on an Orin Nano with this tegrastats and no other source of power, and what it shows."""
    board = make_board(tmp_path / "root", tmp_path / "bin", "jetpack6")
    shutil.rmtree(board.root / "sys/bus")
    (board.bin / "tegrastats").unlink()
    if tegrastats is not None:
        write_program(board.bin / "tegrastats", tegrastats)
    for variable, value in board.environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(BackgroundSensor.__init__, "__defaults__", (0.5,))  # its patience
    done = run_cli("profile", engine, "--device", "jetson", *QUICK, *POWER, "--no-memory", "--json")
    assert done.code == 0, done.err
    return Profile.parse(done.out, "stdout"), " ".join(done.err.split())


def test_no_jetson_here_is_exit_code_4_and_says_where_it_looked(
    eam_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    monkeypatch.setenv("EAMDEPLOY_ROOT", str(tmp_path))
    refused = only_error(run_cli("profile", eam_engine, "--device", "jetson"), 4)
    assert str(tmp_path / "etc/nv_tegra_release") in refused and str(tmp_path / "proc/device-tree") in refused


def test_what_a_sensor_could_not_read_comes_back_over_ssh(eam_engine: Path, tmp_path: Path, run_cli: RunCli) -> None:
    jetson = make_board(tmp_path / "root", tmp_path / "bin", "jetpack6")
    shutil.rmtree(jetson.root / "sys/bus")
    write_program(jetson.bin / "tegrastats", "#!/bin/sh\necho 'cannot open /dev/nvhost' >&2\nexit 3\n")
    with running_boards(tmp_path) as boards:
        board = boards.start("one")
        variables = f"EAMDEPLOY_ROOT={jetson.root} PATH={jetson.bin}:$PATH"
        board.put_program("eamdeploy", f'#!/bin/sh\n{variables} exec {python_eamdeploy()} "$@"\n')
        named = ["--ssh-config", boards.ssh_config, "--device", board.alias, *QUICK, *POWER, "--no-memory"]
        done = run_cli("profile", eam_engine, *named, "--json")
    assert done.code == 0, done.err
    (measured,) = RemoteProfiles.parse(done.out, "stdout").profiles.values()
    (item,) = measured.engines
    assert measured.device_before.kind == "jetson" and item.power is None and item.latency.runs == 4
    assert measured.sensor is not None and "exit code 3: cannot open /dev/nvhost" in (measured.sensor.failure or "")
    assert "power is missing or incomplete: tegrastats ended by itself" in " ".join(done.err.split())


def test_machines_over_ssh(eam_engine: Path, tmp_path: Path, run_cli: RunCli) -> None:
    twin, output = eam_engine.with_name("base.ort.onnx"), tmp_path / "measured.json"
    with running_boards(tmp_path) as boards:
        first, second = boards.start("one"), boards.start("two")
        named = ["--ssh-config", boards.ssh_config, "--remote-command", python_eamdeploy()]
        named += ["--device", first.alias, "--device", second.alias, "-o", output]
        done = run_cli("profile", eam_engine, "--baseline", twin, *named, *QUICK, "--no-power", "--layer-profile")
        assert done.code == 0, done.err
        result = RemoteProfiles.read(output)
        assert list(result.profiles) == [first.alias, second.alias] and not result.failures
        for measured in result.profiles.values():
            (item,) = measured.engines
            assert (item.engine, measured.threads, measured.sittings) == (str(eam_engine), 1, 2)
            assert item.layer_ms and item.power is None and item.latency.runs == 4
        assert first.alias in done.out and second.alias in done.out
        lost = run_cli("profile", eam_engine, *named, "--device", "ssh://127.0.0.1:1", *QUICK)
        assert lost.code == 4 and "ssh://127.0.0.1:1" in lost.err and "succeeded: " in lost.err
        assert list(RemoteProfiles.read(output).failures) == ["ssh://127.0.0.1:1"]
        assert [list(board.temporary.iterdir()) for board in (first, second)] == [[], []]


@pytest.mark.parametrize(
    ("names", "local", "machines"),
    [([], None, []), (["cpu"], "cpu", []), (["ssh://a", "ssh://b"], None, ["ssh://a", "ssh://b"])],
)
def test_names_of_devices(names: list[str], local: str | None, machines: list[str]) -> None:
    device, others = options.parse_devices(names)
    assert (kind_of(device), others) == (local, machines)


def kind_of(device: Device | None) -> Any:
    return None if device is None else device.kind


@pytest.mark.parametrize("names", [["cpu", "jetson"], ["cpu", "ssh://a"], ["gpu"], ["user@host"]])
def test_names_that_mean_no_device(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="expected one of cpu, cuda, jetson"):
        options.parse_devices(names)
