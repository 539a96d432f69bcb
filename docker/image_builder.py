"""Builds the image and runs it with Debian's podman: no container engine's daemon, no registry.

The base is a minimal Debian or Ubuntu made by mmdebstrap, in place of the image that the Dockerfile names by default.
It is no JetPack: no TensorRT, no CUDA. arm64 runs on x86-64 under qemu's user mode.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

Arch = Literal["amd64", "arm64"]

REPOSITORY: Final = Path(__file__).resolve().parents[1]
_HOST_ARCH: Final[dict[str, Arch]] = {"x86_64": "amd64", "aarch64": "arm64"}
_TOOLS: Final = {"podman": "podman", "runc": "runc", "mmdebstrap": "mmdebstrap"}  # Debian's package by program
_EMULATION_TOOLS: Final = {"qemu-aarch64-static": "qemu-user-static", "arch-test": "arch-test"}
SUITES: Final = {  # components of its archive; Ubuntu's are the userlands of JetPack 6 and 7, and need ubuntu-keyring
    "bookworm": "main",  # Python 3.11
    "jammy": "main,universe",  # 3.10
    "noble": "main,universe",  # 3.12
}
_BASE_PACKAGES: Final = (  # not set up by dpkg, only unpacked, which is enough to run Python
    *("base-files", "base-passwd", "libc-bin", "dash", "bash", "coreutils", "sed", "grep", "findutils", "tar", "gzip"),
    *("libstdc++6", "python3", "python3-venv"),
)
_BINFMT: Final = Path("/proc/sys/fs/binfmt_misc")
_QEMU_RULE: Final = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")
_CERTIFICATES: Final = Path("/etc/ssl/certs")
_QEMU_CPU: Final = "cortex-a57"  # a Jetson Nano's; qemu's default processor is several times slower
# ONNX Runtime detects the processor from /proc/cpuinfo, where qemu 7.2 shows the host's, and crashes on an x86 one.
_ARM_CORE: Final = """processor\t: {number}
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: 0xd07
CPU revision\t: 1

"""


class Unavailable(Exception):
    """No image can be built or run on this machine, whatever the Dockerfile says."""


class BuildFailed(Exception):
    """The Dockerfile does not build."""


@dataclass(frozen=True)
class Outcome:
    """How a command in the container ended; `code` is None after a time-out."""

    code: int | None
    out: str
    err: str


@dataclass(frozen=True)
class Podman:
    """podman with a store of its own in `folder`, for the image of one architecture on one base.

    Attributes:
        suite: one of `SUITES`.
        extras: the Dockerfile's argument EXTRAS.
    """

    folder: Path
    arch: Arch
    suite: str
    extras: tuple[str, ...]

    @property
    def base(self) -> str:
        return f"localhost/eamdeploy-base:{self.suite}-{self.arch}"

    @property
    def image(self) -> str:
        return f"localhost/eamdeploy:{'-'.join((self.suite, *self.extras, self.arch))}"

    @property
    def emulated(self) -> bool:
        return self.arch != _HOST_ARCH.get(platform.machine())

    def command(self, *arguments: str) -> list[str]:
        store = ["--root", str(self.folder / "store"), "--runroot", str(self.folder / "run")]
        # cgroupfs and files: there need be no systemd; runc: crun refuses the hybrid cgroups of some machines
        how = ["--storage-driver", "overlay", "--cgroup-manager", "cgroupfs", "--events-backend", "file"]
        return ["podman", *store, *how, "--runtime", "runc", *arguments]

    def require(self) -> None:
        """podman and what else is needed are installed, by apt where they were missing, and a container runs.

        Raises:
            Unavailable: says what is missing or failed.
        """
        _require_tools({**_TOOLS, **(_EMULATION_TOOLS if self.emulated else {})})
        if self.emulated:
            _require_emulation(self.arch)
        self.folder.mkdir(parents=True, exist_ok=True)
        if _call(self.command("image", "exists", self.base)).returncode != 0:
            self._make_base()
        tried = self.run(["-c", "exit 0"], image=self.base, options=["--entrypoint", "/bin/sh"], timeout_s=60)
        if tried.code != 0:
            raise Unavailable(f"podman can't run a container here: {_last_lines(tried.err)}")

    def _make_base(self) -> None:
        root = self.folder / f"root-{self.arch}"
        shutil.rmtree(root, ignore_errors=True)
        what = [f"--components={SUITES[self.suite]}", f"--include={','.join(_BASE_PACKAGES)}", self.suite]
        made = _call(["mmdebstrap", "--quiet", f"--arch={self.arch}", "--variant=extract", *what, str(root)])
        if made.returncode != 0:
            raise Unavailable(f"mmdebstrap can't make a base of {self.suite}: {_last_lines(made.stderr)}")
        for name in ("passwd", "group"):  # what base-passwd's set-up would do
            shutil.copyfile(root / f"usr/share/base-passwd/{name}.master", root / f"etc/{name}")
        archive = self.folder / f"root-{self.arch}.tar"
        packed = _call(["tar", "-C", str(root), "-c", "-f", str(archive), "."])
        imported = _call(self.command("import", "--os", "linux", "--arch", self.arch, str(archive), self.base))
        archive.unlink(missing_ok=True)
        shutil.rmtree(root)
        if packed.returncode != 0 or imported.returncode != 0:
            raise Unavailable(f"podman can't import a base image: {_last_lines(packed.stderr + imported.stderr)}")

    def build(self) -> None:
        """`image` is the Dockerfile's, built on `base`.

        Raises:
            BuildFailed: with the end of the builder's output.
        """
        mounts = self._emulation()
        if _CERTIFICATES.is_dir():  # the base has none; while building only
            mounts += ["-v", f"{_CERTIFICATES}:{_CERTIFICATES}:ro"]
        how = ["--isolation", "oci", "--network", "host", "--pull=never", "--format", "docker"]
        arguments = {"BASE_IMAGE": self.base, "EXTRAS": " ".join(self.extras)}
        given = [word for key, value in arguments.items() for word in ("--build-arg", f"{key}={value}")]
        what = ["--platform", f"linux/{self.arch}", *given, "-t", self.image, str(REPOSITORY)]
        built = _call(self.command("build", *how, *mounts, *what))
        if built.returncode != 0:
            raise BuildFailed(_last_lines(built.stdout + built.stderr, 40))

    def run(
        self,
        arguments: list[str],
        *,
        image: str | None = None,
        options: list[str] | None = None,
        read_only: bool = True,
        timeout_s: float = 900,
    ) -> Outcome:
        """`arguments` given to the image: without network, 2 GB of memory, and only /tmp writable if `read_only`."""
        name = f"eamdeploy-check-{os.getpid()}"
        # explicit limits: podman's own can't be set without CAP_SYS_RESOURCE
        limits = ["--memory", "2g", "--ulimit", "nofile=1024:4096", "--ulimit", "nproc=4096:4096"]
        where = ["--network", "none", *(["--read-only", "--tmpfs", "/tmp"] if read_only else [])]
        # podman runs health checks by systemd, which may be missing; their command is checked by itself
        alone = ["--rm", "--name", name, "--pull=never", "--arch", self.arch, "--no-healthcheck"]
        emulation = [*self._emulation(), *(["-e", f"QEMU_CPU={_QEMU_CPU}"] if self.emulated else [])]
        options = [*alone, *where, *limits, *emulation, *(options or [])]
        command = [*self.command("run", *options, image or self.image), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:  # a crash under qemu hangs
            _call(self.command("rm", "--force", "--time", "0", name))
            return Outcome(None, "", f"no end within {timeout_s:g} s")
        return Outcome(done.returncode, done.stdout, done.stderr)

    def inspect(self, image: str) -> dict[str, Any]:
        """What podman knows of an image: `Config`, `Size` in bytes."""
        found: list[dict[str, Any]] = json.loads(_call(self.command("image", "inspect", image)).stdout)
        return found[0]

    def _emulation(self) -> list[str]:
        """Options with which programs of another architecture run."""
        if not self.emulated:
            return []
        cpuinfo = self.folder / "cpuinfo-arm64"
        cpuinfo.write_text("".join(_ARM_CORE.format(number=number) for number in range(os.cpu_count() or 1)))
        return ["-v", f"{cpuinfo}:/proc/cpuinfo:ro"]


def _require_tools(packages: dict[str, str]) -> None:
    missing = sorted(package for program, package in packages.items() if shutil.which(program) is None)
    if os.geteuid() != 0:
        raise Unavailable("building and running with podman as it is used here needs root")
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise Unavailable(f"not installed, and there is no apt-get to install them with: {', '.join(missing)}")
    _call(["apt-get", "update", "--quiet"])
    how = ["--yes", "--quiet", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"]  # others may be installing
    installed = _call(["apt-get", "install", *how, *missing])
    if installed.returncode != 0:
        raise Unavailable(f"apt-get can't install {', '.join(missing)}: {_last_lines(installed.stderr)}")


def _require_emulation(arch: Arch) -> None:
    """The kernel starts arm64 programs through qemu."""
    if arch != "arm64":
        raise Unavailable(f"only arm64 can be emulated here, not {arch}")
    if not (_BINFMT / "register").exists():
        _call(["mount", "-t", "binfmt_misc", "binfmt_misc", str(_BINFMT)])
    if (_BINFMT / "qemu-aarch64").exists():
        return
    try:
        (_BINFMT / "register").write_text(_QEMU_RULE.read_text())
    except OSError as err:
        raise Unavailable(f"the kernel can't be told to run arm64 programs through qemu: {err}") from err


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _last_lines(text: str, count: int = 3) -> str:
    return "\n".join(text.strip().splitlines()[-count:]) or "it said nothing"
