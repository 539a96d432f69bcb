"""`docker/check_image.py` against fakes of podman and mmdebstrap: what it says where nothing can be built or run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BUILDS = '*" build "*) ;;'
BUILD_FAILS = '*" build "*) echo "COPY failed: no such file" >&2; exit 125 ;;'
NOT_PERMITTED = '*" run "*) echo "mount proc: operation not permitted" >&2; exit 126 ;;'
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="the image is built by root only, and that is checked first")


def check(folder: Path, podman: str, mmdebstrap: str = "exit 0") -> tuple[int, str]:
    """Exit code and output of the check with a fake podman, to which `podman` adds a case, and a fake mmdebstrap.

    Fakes succeed and print nothing unless told otherwise.
    """
    programs = folder / "bin"
    programs.mkdir()
    known = '*"image inspect"*) echo "[{\\"Size\\": 5000000, \\"Healthcheck\\": {\\"Test\\": [\\"NONE\\"]}}]" ;;'
    for name, script in {"podman": f'case "$*" in {podman} {known} esac', "mmdebstrap": mmdebstrap, "runc": ""}.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    done = subprocess.run(
        [sys.executable, REPOSITORY / "docker/check_image.py", "amd64", "--folder", folder / "store"],
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


@ROOT_ONLY
def test_containers_that_are_not_permitted_are_no_pass_and_no_failure(tmp_path: Path) -> None:
    code, out = check(tmp_path, NOT_PERMITTED)
    assert code == 4
    assert out.startswith("NOT CHECKED: ") and "operation not permitted" in out and "ok" not in out


@ROOT_ONLY
def test_base_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    code, out = check(tmp_path, '*"image exists"*) exit 1 ;;', "echo no such mirror >&2; exit 1")
    assert code == 4
    assert "mmdebstrap can't make a base of bookworm: no such mirror" in out


@ROOT_ONLY
def test_dockerfile_that_does_not_build_fails(tmp_path: Path) -> None:
    code, out = check(tmp_path, BUILD_FAILS)
    assert code == 1
    assert "ok    base" in out and "FAIL  build" in out and "COPY failed: no such file" in out


@ROOT_ONLY
def test_image_that_does_nothing_fails_every_check(tmp_path: Path) -> None:
    """Programs that succeed and print nothing are not enough for any of them."""
    code, out = check(tmp_path, BUILDS)
    lines = [line[:4] for line in out.splitlines() if line.startswith(("ok", "FAIL"))]
    assert (code, lines) == (1, ["ok  "] * 2 + ["FAIL"] * 12), out
