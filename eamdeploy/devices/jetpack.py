"""Releases of NVIDIA's system for Jetson boards, and what is in them: the one table of that."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from eamdeploy.devices.sysfs import read_text

RELEASE_FILE = "etc/nv_tegra_release"


@dataclass(frozen=True)
class JetPack:
    """A JetPack and the versions in it.

    Attributes:
        version: e.g. "6.2"; "6.1/6.2" where the release does not tell which.
        python: of the system.
    """

    version: str
    tensorrt: str
    python: str

    @property
    def name(self) -> str:
        return f"JetPack {self.version}"


# By L4T release, the first that the board's one begins with; previews (35.1, 36.2) had others.
# Source: docs/tensorrt.md, JetPack.
_JETPACKS: tuple[tuple[str, JetPack], ...] = (
    ("32.7", JetPack("4.6", "8.2", "3.6")),
    *((f"35.{minor}", JetPack("5.1", "8.5.2", "3.8")) for minor in range(2, 7)),
    ("36.3", JetPack("6.0", "8.6.2", "3.10")),
    ("36.4.0", JetPack("6.1", "10.3", "3.10")),
    ("36.4.3", JetPack("6.2", "10.3", "3.10")),
    ("36.4.4", JetPack("6.2.1", "10.3", "3.10")),
    ("36.4.7", JetPack("6.2.1", "10.3", "3.10")),
    ("36.5", JetPack("6.2.2", "10.3", "3.10")),
    ("36.4", JetPack("6.1/6.2", "10.3", "3.10")),
    ("38.2", JetPack("7.0", "10.13", "3.12")),
    ("38.4", JetPack("7.1", "10.13", "3.12")),
    ("39.2", JetPack("7.2", "10.16", "3.12")),
)


def find_l4t(root: Path = Path("/")) -> str | None:
    """The release of Jetson Linux (L4T) on this board, e.g. "36.4.3"; None on another machine."""
    found = re.search(r"R(\d+).*?REVISION:\s*(\d+(?:\.\d+)*)", read_text(root / RELEASE_FILE) or "")
    return None if found is None else f"{found[1]}.{found[2]}"


def find_jetpack(root: Path = Path("/")) -> JetPack | None:
    """The JetPack of this board; None on another machine, or for a release that is not known here."""
    release = find_l4t(root)
    if release is None:
        return None
    return next((jetpack for first, jetpack in _JETPACKS if f"{release}.".startswith(f"{first}.")), None)
