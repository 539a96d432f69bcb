"""Profiles on other machines: against real OpenSSH servers on the loopback address."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import psutil
import pytest
from engine_models import build, make_frozen_model
from split_models import split, three_files
from ssh_server import REPOSITORY, Board, Boards, make_key, python_eamdeploy, running_boards

from eamdeploy.artifacts import onnx_files
from eamdeploy.artifacts.files import digest_file
from eamdeploy.artifacts.onnx_files import digest_model, model_files
from eamdeploy.errors import CheckpointError, ConfigError, DeviceError, EngineError, ParityError
from eamdeploy.profiling.timing import Schedule
from eamdeploy.records.profile import Profile
from eamdeploy.remote.profile import RemoteFailure, RemoteProfiles, profile_remote
from eamdeploy.stages.profile import Extras, profile

FROZEN = make_frozen_model()
QUICK = ("--threads", "1", "--warmup-ms", "0", "--min-seconds", "0", "--min-runs", "3", "--sittings", "1", "--no-power")
PATIENCE_S = 15.0
SLOW = 'echo $$ >"$HOME/pid"; sleep 300 & echo $! >"$HOME/own_child"; wait'


class Engines:
    """An engine with its manifest, its baseline of the same file name, and what a fake board says of them."""

    def __init__(self, folder: Path) -> None:
        onnx.save(FROZEN.to_onnx(), folder / "eam.onnx")
        for name in ("eam", "base"):
            (folder / name).mkdir()
            build(folder / "eam.onnx", folder / name / "x.ort.onnx", threads=1, reference=FROZEN.reference())
        self.engine, self.baseline = folder / "eam" / "x.ort.onnx", folder / "base" / "x.ort.onnx"
        self.measured = profile(
            [self.engine],
            threads=1,
            schedule=Schedule(warmup_ms=0, min_seconds=0, min_runs=2, sittings=1),
            extras=Extras(fresh=False, power=False),
        )


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def boards(tmp_path: Path) -> Iterator[Boards]:
    with running_boards(tmp_path) as running:
        yield running


@pytest.fixture
def board(boards: Boards) -> Board:
    return boards.start()


@pytest.fixture
def measure(boards: Boards, engines: Engines) -> Callable[..., RemoteProfiles]:
    """Profiles one engine on the given boards, with the remote command `eamdeploy`."""

    def run(*targets: str, files: list[Path] | None = None, timeout_s: float = 60.0) -> RemoteProfiles:
        return profile_remote(targets, files or [engines.engine], timeout_s=timeout_s, ssh_config=boards.ssh_config)

    return run


def put_answer(board: Board, measured: Profile, before: str = "") -> None:
    """The board's fake eamdeploy measures what `measured` says, after the commands `before`."""
    (board.home / "profile.json").write_text(measured.model_dump_json())
    board.put_eamdeploy(f'{before or ":"}; cat "$HOME/profile.json"')


def only_failure(result: RemoteProfiles) -> RemoteFailure:
    assert result.profiles == {}
    (failure,) = result.failures.values()
    assert "\n" not in failure.message
    return failure


def wait_for(what: str, holds: Callable[[], bool]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < until_s, what
        time.sleep(0.05)


def pids(board: Board) -> list[int]:
    """The process of the board's slow `profile`, and the one that it started; none before both run."""
    files = [board.home / "pid", board.home / "own_child"]
    texts = [file.read_text().strip() if file.exists() else "" for file in files]
    return [int(text) for text in texts] if all(texts) else []


def none_runs(board: Board) -> bool:
    """Those processes have ended, whether or not this machine's init has noticed."""
    running = [psutil.Process(pid) for pid in pids(board) if psutil.pid_exists(pid)]
    return all(process.status() == psutil.STATUS_ZOMBIE for process in running)


def require_no_debris(board: Board) -> None:
    """Nothing that a measurement had there is left, or soon is."""
    wait_for("the folder on the board is gone", lambda: not list(board.temporary.iterdir()))
    wait_for("its processes have ended", lambda: none_runs(board))


# --- it measures -----------------------------------------------------------------------------------------------------


def test_an_engine_and_its_baseline_are_measured_there(boards: Boards, board: Board, engines: Engines) -> None:
    notes: list[str] = []
    sent: list[tuple[int, int]] = []

    class Listener:
        def progress(self, what: str, done: int, total: int) -> None:
            sent.append((done, total))

        def note(self, text: str) -> None:
            notes.append(text)

    result = profile_remote(
        [board.alias],
        [engines.engine],
        engines.baseline,
        QUICK,
        remote_command=python_eamdeploy(),
        ssh_config=boards.ssh_config,
        observer=Listener(),
    )
    result.require_all()
    measured = result.profiles[board.alias]
    assert measured.baseline is not None and measured.baseline.engine == str(engines.baseline)
    (only,) = measured.engines
    assert (only.engine, only.digest) == (str(engines.engine), digest_file(engines.engine))
    assert only.parity is not None and only.parity.passed, "the manifest has come along"
    assert only.speed_up is not None and only.memory is not None and only.latency.runs == 4
    assert (measured.threads, measured.min_runs) == (1, 3)
    assert sent[-1][0] == sent[-1][1] > engines.engine.stat().st_size and notes
    require_no_debris(board)


def test_models_of_several_files_are_measured_there(
    boards: Boards, board: Board, engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_files, "ONE_FILE_BYTES", 1000)
    (tmp_path / "a board's models").mkdir()
    foreign = split(
        FROZEN.to_onnx(), tmp_path / "a board's models" / "x y.onnx", three_files, at_least=10, shapes=False
    )
    engine = tmp_path / "x.ort.onnx"
    build(foreign, engine, threads=1, reference=FROZEN.reference())
    assert len(model_files(foreign)) == 4 and len(model_files(engine)) == 2
    result = profile_remote(
        [board.alias],
        [engine, foreign],
        engines.baseline,
        QUICK,
        remote_command=python_eamdeploy(),
        ssh_config=boards.ssh_config,
    )
    result.require_all()
    measured = result.profiles[board.alias].engines
    assert [(item.engine, item.digest) for item in measured] == [
        (str(path), digest_model(path)) for path in (engine, foreign)
    ]
    sizes = [item.memory.engine_bytes for item in measured if item.memory is not None]
    assert sizes == [sum(file.stat().st_size for file in model_files(path)) for path in (engine, foreign)]
    assert measured[0].parity is not None and measured[0].parity.passed
    require_no_debris(board)


def test_two_boards_work_side_by_side_and_one_that_fails_is_told(
    boards: Boards, measure: Callable[..., RemoteProfiles], engines: Engines
) -> None:
    left, right, broken = (boards.start(name) for name in ("left", "right", "broken"))
    for mine, other in ((left, right), (right, left)):  # each waits for the other
        waiting = f'touch "$HOME/ready"; while [ ! -e {other.home}/ready ]; do sleep 0.1; done'
        put_answer(mine, engines.measured, waiting)
    broken.put_eamdeploy("echo 'error: the sensor is gone' >&2; exit 4")
    result = measure(left.alias, broken.alias, right.target)
    assert list(result.profiles) == [left.alias, right.target]
    assert result.failures == {broken.alias: RemoteFailure(message=f"{broken.alias}: the sensor is gone", exit_code=4)}
    assert RemoteProfiles.parse(result.model_dump_json(), "x") == result
    with pytest.raises(DeviceError, match=rf"1 of 3 machines failed: .*sensor is gone \| succeeded: {left.alias}, "):
        result.require_all()
    for each in (left, right, broken):
        require_no_debris(each)


def test_what_a_login_shell_prints_is_not_taken_for_the_answer(
    boards: Boards, measure: Callable[..., RemoteProfiles], engines: Engines
) -> None:
    noise = r"""printf 'Welcome!\n{"machine": 1}\nno line break'; echo noise >&2; eval "$SSH_ORIGINAL_COMMAND" """
    board = boards.start(forced_command=noise)
    put_answer(board, engines.measured)
    assert measure(board.alias).profiles[board.alias].engines[0].engine == str(engines.engine)


def test_names_of_files_stay_names(
    board: Board, boards: Boards, measure: Callable[..., RemoteProfiles], engines: Engines, tmp_path: Path
) -> None:
    """A file's name may hold anything, and the remote command may have spaces and a home folder."""
    name = tmp_path / 'it\'s $(touch oops) "ü" -x; é.ort.onnx'
    shutil.copy(engines.engine, name)
    put_answer(board, engines.measured, 'echo "$2" >"$HOME/name"')
    (board.home / "my bin").mkdir()
    (board.programs / "eamdeploy").rename(board.home / "my bin" / "eamdeploy")
    result = profile_remote(
        [board.alias], [name], remote_command="~/'my bin/eamdeploy'", ssh_config=boards.ssh_config, timeout_s=60
    )
    assert result.profiles[board.alias].engines[0].engine == str(name)
    assert (board.home / "name").read_text().endswith(f"/0/{name.name}\n")
    assert not list(board.home.glob("**/oops"))


# --- it does not get there -------------------------------------------------------------------------------------------


def test_an_unknown_host_key_is_refused(boards: Boards, measure: Callable[..., RemoteProfiles]) -> None:
    board = boards.start(trusted=False)
    failure = only_failure(measure(board.alias))
    assert failure.exit_code == 4
    assert failure.message.startswith(f"the host key of {board.alias} is not known: nothing was sent")
    assert "ssh board" in failure.message


def test_a_changed_host_key_is_refused(boards: Boards, measure: Callable[..., RemoteProfiles], tmp_path: Path) -> None:
    board = boards.start(trusted=False)
    make_key(tmp_path / "old_key")
    board.trust(tmp_path / "old_key")
    failure = only_failure(measure(board.target))
    assert f"{board.target} shows another host key" in failure.message
    assert f"ssh-keygen -R '[127.0.0.1]:{board.port}'" in failure.message


def test_a_wrong_user_key_is_refused(boards: Boards, measure: Callable[..., RemoteProfiles], tmp_path: Path) -> None:
    make_key(tmp_path / "other_key")
    board = boards.start(authorized=tmp_path / "other_key.pub")
    failure = only_failure(measure(board.alias))
    assert "lets nobody in" in failure.message and "Permission denied" in failure.message


def test_nobody_answers(board: Board, measure: Callable[..., RemoteProfiles]) -> None:
    board.stop()
    failure = only_failure(measure(board.alias))
    assert f"{board.alias} can't be reached" in failure.message and "Connection refused" in failure.message


def test_an_account_without_a_shell(boards: Boards, measure: Callable[..., RemoteProfiles]) -> None:
    board = boards.start(forced_command="echo This account is currently not available.; exit 1")
    failure = only_failure(measure(board.alias))
    assert "no program can be run on" in failure.message and "currently not available" in failure.message


def test_without_an_ssh_client(
    boards: Boards, measure: Callable[..., RemoteProfiles], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    failure = only_failure(measure("ssh://board"))
    assert failure.exit_code == 4 and "openssh-client" in failure.message


# --- the board does not fit ------------------------------------------------------------------------------------------


def test_no_eamdeploy_there(board: Board, boards: Boards, engines: Engines) -> None:
    for command in ("eamdeploy-nosuch", "~/nosuch/eamdeploy", f"{sys.executable} -m eamdeploy_nosuch", "env nosuch"):
        result = profile_remote([board.alias], [engines.engine], remote_command=command, ssh_config=boards.ssh_config)
        failure = only_failure(result)
        assert failure.exit_code == 4
        assert f"there is no eamdeploy on {board.alias}" in failure.message and "pip install" in failure.message
        assert command.split()[0] in failure.message
    require_no_debris(board)


def test_another_version_there(board: Board, measure: Callable[..., RemoteProfiles]) -> None:
    board.put_eamdeploy("exit 1", version="9.9.0")
    failure = only_failure(measure(board.alias))
    assert f"{board.alias} has another version of eamdeploy; expected " in failure.message
    assert "got 9.9.0" in failure.message
    require_no_debris(board)


@pytest.mark.parametrize(
    ("doctor", "message"),
    [
        ("echo \"Error: No such command 'doctor'.\" >&2; exit 2", "eamdeploy on ssh://board is too old"),
        ("echo '{}'", "what `eamdeploy doctor --json` wrote on ssh://board is not a valid"),
        ("echo libgomp is missing >&2; exit 1", "does not work on ssh://board; got exit code 1: libgomp is missing"),
    ],
)
def test_an_eamdeploy_that_is_too_old_or_broken(
    board: Board, measure: Callable[..., RemoteProfiles], doctor: str, message: str
) -> None:
    board.put_program("eamdeploy", f"#!/bin/sh\n{doctor}\n")
    assert message in only_failure(measure(board.alias)).message


def test_too_little_memory_there(board: Board, measure: Callable[..., RemoteProfiles], engines: Engines) -> None:
    board.put_eamdeploy("exit 1", memory_free_bytes=7)
    failure = only_failure(measure(board.alias))
    assert "too little free memory" in failure.message and "got 7 bytes" in failure.message
    assert f"{engines.engine.stat().st_size:,}" in failure.message


def test_no_folder_can_be_made_there(board: Board, measure: Callable[..., RemoteProfiles]) -> None:
    board.temporary.rmdir()
    board.temporary.write_text("a file")
    assert f"no folder can be made on {board.alias}" in only_failure(measure(board.alias)).message


@pytest.fixture
def small_disk(board: Board) -> Iterator[Path]:
    """The board's temporary folder, on a disk of 1 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(board.temporary)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root can mount a small disk, and not in every container")
    yield board.temporary
    subprocess.run(["umount", "--lazy", str(board.temporary)], check=True)


@pytest.mark.parametrize("df_knows", [True, False])
def test_a_full_disk_there(
    board: Board, measure: Callable[..., RemoteProfiles], small_disk: Path, tmp_path: Path, df_knows: bool
) -> None:
    """Found out before anything is sent, or in the middle of it where `df` does not know, e.g. of a quota."""
    if not df_knows:
        board.put_program("df", "#!/bin/sh\necho Filesystem 1024-blocks Used Available Capacity Mounted on\n"
                          "echo tmpfs 9999999 0 9999999 0% /tmp\n")  # fmt: skip
    large = tmp_path / "large.onnx"
    large.write_bytes(bytes(3 << 20))
    board.put_eamdeploy("exit 1")
    failure = only_failure(measure(board.alias, files=[large]))
    assert failure.exit_code == 4
    assert f"too little space on {board.alias} for the engines; expected 4,1" in failure.message
    assert (" bytes free. Nothing was left" if df_knows else "bytes were free. Nothing was left") in failure.message
    require_no_debris(board)


def test_an_engine_that_does_not_arrive_whole(board: Board, measure: Callable[..., RemoteProfiles]) -> None:
    board.put_program("tar", "#!/bin/sh\ncat >/dev/null; mkdir 0; echo x >0/x.ort.onnx\n")
    board.put_eamdeploy("exit 1")
    assert f"not arrived whole on {board.alias}" in only_failure(measure(board.alias)).message
    board.put_program("tar", "#!/bin/sh\necho tar: broken >&2; exit 2\n")
    assert f"can't be unpacked on {board.alias}; got tar: broken" in only_failure(measure(board.alias)).message
    require_no_debris(board)


# --- measuring fails -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind", "exit_code"), [(2, EngineError, 2), (3, ParityError, 3), (4, DeviceError, 4), (1, DeviceError, 4)]
)
def test_an_error_of_eamdeploy_there_is_passed_on(
    board: Board,
    measure: Callable[..., RemoteProfiles],
    engines: Engines,
    code: int,
    kind: type[Exception],
    exit_code: int,
) -> None:
    board.put_eamdeploy(f'echo note >&2; echo "error: engine $2 can\'t be loaded" >&2; exit {code}')
    result = measure(board.alias)
    failure = only_failure(result)
    assert failure.exit_code == exit_code and failure.message.startswith(f"{board.alias}: ")
    assert f"engine {engines.engine} can't be loaded" in failure.message
    assert ("by a bug" in failure.message) == (code == 1)
    with pytest.raises(kind, match="can't be loaded"):
        result.require_all()


def test_a_real_error_of_eamdeploy_there(boards: Boards, board: Board, tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no model")
    result = profile_remote(
        [board.alias], [bad], None, QUICK, remote_command=python_eamdeploy(), ssh_config=boards.ssh_config
    )
    failure = only_failure(result)
    assert failure.exit_code == 2 and str(bad) in failure.message and "can't load" in failure.message


def test_answers_that_are_none(board: Board, measure: Callable[..., RemoteProfiles], engines: Engines) -> None:
    board.put_eamdeploy("echo hello")
    assert "is not a valid Profile" in only_failure(measure(board.alias)).message
    other = engines.measured.engines[0].model_copy(update={"digest": "sha256:0"})
    put_answer(board, engines.measured.model_copy(update={"engines": [other]}))
    assert "measured other files than were sent" in only_failure(measure(board.alias)).message
    board.put_eamdeploy("kill -9 $$")
    assert "exit code 137, perhaps for want of memory" in only_failure(measure(board.alias)).message


def test_a_board_that_takes_too_long_is_told_to_end(board: Board, measure: Callable[..., RemoteProfiles]) -> None:
    board.put_eamdeploy(SLOW)
    failure = only_failure(measure(board.alias, timeout_s=3))
    assert f"{board.alias} was not done in time" in failure.message and "3 s" in failure.message
    assert pids(board) and none_runs(board)
    assert not list(board.temporary.iterdir()), "gone when the call returns"


@pytest.mark.parametrize("side", ["server", "client"])
def test_a_connection_that_breaks_in_the_middle(
    board: Board, measure: Callable[..., RemoteProfiles], boards: Boards, engines: Engines, side: str
) -> None:
    board.put_eamdeploy(SLOW)
    with ThreadPoolExecutor() as pool:
        measuring = pool.submit(measure, board.alias)
        wait_for("the board measures", lambda: bool(pids(board)))
        assert not none_runs(board) and list(board.temporary.iterdir())
        ours = [child for child in psutil.Process().children() if child.name() == "ssh"]
        for process in board.sessions() if side == "server" else ours:
            process.kill()
        result = measuring.result()
    message = only_failure(result).message
    assert f"the connection to {board.alias} was lost in the middle" in message
    require_no_debris(board)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_this_side_ends_the_board_too(board: Board, engines: Engines, how: signal.Signals) -> None:
    board.put_eamdeploy(SLOW)
    program = (
        "import pathlib, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in the background
        "from eamdeploy.remote.profile import profile_remote\n"
        "profile_remote([sys.argv[1]], [pathlib.Path(sys.argv[2])], ssh_config=pathlib.Path(sys.argv[3]))\n"
    )
    words = [board.alias, str(engines.engine), str(board.ssh_config)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", program, *words], stderr=subprocess.PIPE, env=environment) as ours:
        wait_for("the board measures", lambda: bool(pids(board)))
        ours.send_signal(how)
        _, errors = ours.communicate(timeout=PATIENCE_S)
    assert ours.returncode == -how
    if how == signal.SIGINT:
        assert b"KeyboardInterrupt" in errors
        assert not list(board.temporary.iterdir()), "gone when the call returns"
    require_no_debris(board)


# --- wrong use -------------------------------------------------------------------------------------------------------


def test_wrong_use_is_found_before_anything_is_connected(engines: Engines, tmp_path: Path) -> None:
    engine = engines.engine
    wrong: list[tuple[list[str], list[Path], str, str]] = [
        ([], [engine], "eamdeploy", "no machine"),
        (["board"], [engine], "eamdeploy", "names no machine for ssh"),
        (["ssh://a", "ssh://a"], [engine], "eamdeploy", "named twice"),
        (["ssh://a", "ssh://a/"], [engine], "eamdeploy", "named twice"),
        (["ssh://a"], [], "eamdeploy", "nothing to profile"),
        (["ssh://a"], [tmp_path / "x.onnx"], "eamdeploy", "no such file"),
        (["ssh://a"], [tmp_path], "eamdeploy", "not an engine by its name"),
        (["ssh://a"], [engine], "", "remote command"),
        (["ssh://a"], [engine], "'open", "remote command"),
    ]
    for targets, files, command, message in wrong:
        with pytest.raises(ConfigError, match=message):
            profile_remote(targets, files, remote_command=command)
    copy = tmp_path / "y.ort.onnx"
    shutil.copy(engine, copy)
    shutil.copy(f"{engine}.json", f"{copy}.json")
    copy.write_bytes(copy.read_bytes() + b"x")
    with pytest.raises(EngineError, match="describes another engine"):
        profile_remote(["ssh://a"], [copy])
    Path(f"{copy}.json").write_text("{")
    with pytest.raises(CheckpointError):
        profile_remote(["ssh://a"], [copy])
