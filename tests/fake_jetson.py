"""Fake Jetson boards: trees of `/etc`, `/proc` and `/sys`, and the boards' programs as shell scripts.

Everything that a board says here has the form that real ones have; the numbers are made up or from public logs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Generation = Literal["jetpack5", "jetpack6", "jetpack7"]
GENERATIONS: tuple[Generation, ...] = ("jetpack5", "jetpack6", "jetpack7")

AGX_ORIN_LINE = (
    "10-16-2023 10:59:22 RAM 1205/30623MB (lfb 6429x4MB) SWAP 0/15311MB (cached 0MB) "
    "CPU [0%@729,2%@729,1%@729,0%@729,off,off,off,off,0%@729,0%@729,0%@729,0%@729] EMC_FREQ 0%@204 GR3D_FREQ 0%@114 "
    "GR3D2_FREQ 0%@0 NVJPG1 729 VIC_FREQ 115 APE 233 CV0@-256C CPU@41.437C Tboard@32C SOC2@39.343C GPU@-256C "
    "tj@42.593C VDD_GPU_SOC 2390mW/2390mW VDD_CPU_CV 796mW/796mW VIN_SYS_5V0 3522mW/3522mW NC 0mW/0mW "
    "VDDQ_VDD2_1V8AO 301mW/301mW NC 0mW/0mW"
)
ORIN_NANO_LINE = (
    "10-08-2026 04:35:02 RAM 6712/7620MB (lfb 12x4MB) SWAP 369/3810MB (cached 8MB) "
    "CPU [38%@1497,2%@729,1%@729,0%@729,1%@729,0%@729] EMC_FREQ 61%@2133 GR3D_FREQ 99%@[612] NVDEC off NVJPG off "
    "VIC off OFA off APE 200 cpu@57.125C soc2@55.093C soc0@56.625C gpu@58.625C tj@58.312C soc1@55.937C "
    "VDD_IN 16321mW/11204mW VDD_CPU_GPU_CV 7104mW/4944mW VDD_SOC 3120mW/3659mW"
)
THOR_LINE = (
    "08-08-2026 21:00:39 RAM 8353/125749MB (lfb 31x4MB) CPU [90%@2601,75%@2601,off,7%@2601] EMC_FREQ 34%@4266 "
    "GR3D_FREQ @[1574,1574,1574] NVENC0_FREQ @1691 PVA0_FREQ off VIC off APE 300 cpu@58.25C/61.75C tj@66.625C/66.625C "
    "VDD_GPU 37939mW/8660mW/37939mW VDD_CPU_SOC_MSS 30059mW/12281mW/30059mW VIN_SYS_5V0 15486mW/7424mW/15486mW "
    "VIN 124486mW/36487mW/124486mW"
)

_TEGRASTATS = """#!/bin/sh
interval=1000
while [ $# -gt 0 ]; do
  if [ "$1" = --interval ]; then interval=$2; shift; fi
  shift
done
seconds=$(printf '%d.%03d' $((interval / 1000)) $((interval % 1000)))
while :; do
  cat '{lines}'
  sleep "$seconds"
done
"""

_ROOT_ONLY = "#!/bin/sh\necho 'Error: Run this script(/usr/bin/jetson_clocks) as a root user' >&2\nexit 1\n"


@dataclass(frozen=True)
class FakeBoard:
    """A board in folders.

    Attributes:
        root: what holds its `/etc`, `/proc` and `/sys`.
        bin: its programs.
        lines: the file whose lines its tegrastats prints again and again.
    """

    root: Path
    bin: Path
    lines: Path

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make a process take this board for its own."""
        return {"EAMDEPLOY_ROOT": str(self.root), "PATH": os.pathsep.join((str(self.bin), os.environ["PATH"]))}


def make_board(root: Path, bin: Path, generation: Generation) -> FakeBoard:
    """The board of that generation, in two folders that may not exist yet: AGX Orin, Orin Nano or AGX Thor."""
    board = FakeBoard(root, bin, root / "tegrastats.txt")
    write_files(root, {"proc/meminfo": "MemTotal:  32000000 kB\nMemFree: 9 kB\nMemAvailable:  24000000 kB\n"})
    {"jetpack5": _agx_orin, "jetpack6": _orin_nano, "jetpack7": _thor}[generation](board)
    write_program(bin / "tegrastats", _TEGRASTATS.format(lines=board.lines))
    return board


def write_files(root: Path, files: Mapping[str, object]) -> None:
    """Every file below `root` holds its text and a line end, as the kernel's do."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def write_program(path: Path, script: str) -> None:
    """`path` is an executable script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)


def say(text: str) -> str:
    """A script that prints `text`."""
    return f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n"


def write_rails(root: Path, monitor: str, hwmon: str, rails: Mapping[str, tuple[int, int]]) -> None:
    """A power monitor of JetPack 5 and later, whose channels have these labels, millivolts and milliamperes."""
    folder = f"sys/bus/i2c/drivers/ina3221/{monitor}/hwmon/{hwmon}"
    for channel, (label, (millivolts, milliamperes)) in enumerate(rails.items(), start=1):
        write_files(
            root,
            {
                f"{folder}/in{channel}_label": label.split("#")[0],
                f"{folder}/in{channel}_input": millivolts,
                f"{folder}/curr{channel}_input": milliamperes,
            },
        )
    write_files(root, {f"{folder}/in7_label": "sum of shunt voltages", f"{folder}/in7_input": 12})


def write_zones(root: Path, zones: Mapping[str, int], cooling: Mapping[str, tuple[int, int]]) -> None:
    """Thermal zones with their temperature in m°C, and cooling devices with their state and its maximum."""
    folder = "sys/class/thermal"
    for index, (name, milli) in enumerate(zones.items()):
        write_files(root, {f"{folder}/thermal_zone{index}/type": name, f"{folder}/thermal_zone{index}/temp": milli})
    for index, (name, (state, highest)) in enumerate(cooling.items()):
        device = f"{folder}/cooling_device{index}"
        write_files(root, {f"{device}/type": name, f"{device}/cur_state": state, f"{device}/max_state": highest})


def write_cores(root: Path, clocks_khz: Mapping[int, tuple[int, int, int]], governor: str = "schedutil") -> None:
    """Lowest, highest and current frequency of cores."""
    for core, (low, high, now) in clocks_khz.items():
        folder = f"sys/devices/system/cpu/cpu{core}/cpufreq"
        write_files(
            root,
            {
                f"{folder}/scaling_min_freq": low,
                f"{folder}/scaling_max_freq": high,
                f"{folder}/scaling_cur_freq": now,
                f"{folder}/scaling_governor": governor,
            },
        )


def write_model(root: Path, model: str, compatible: str) -> None:
    """The board's device tree, whose texts end with NUL."""
    folder = root / "proc/device-tree"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model").write_bytes(f"{model}\0".encode())
    (folder / "compatible").write_bytes(f"{compatible}\0".encode())


def _agx_orin(board: FakeBoard) -> None:
    """JetPack 5.1: clocks not locked, no VDD_IN, rails that overlap."""
    root = board.root
    write_model(root, "NVIDIA Jetson AGX Orin Developer Kit", "nvidia,p3737-0000+p3701-0000\0nvidia,tegra234")
    write_files(
        root,
        {
            "etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64",
            "proc/meminfo": "MemTotal: 31358000 kB\nMemAvailable: 30000000 kB\nNvMapMemUsed: 65536 kB",
        },
    )
    write_files(root, {"tegrastats.txt": AGX_ORIN_LINE})
    write_rails(
        root,
        "1-0040",
        "hwmon3",
        {"VDD_GPU_SOC": (19920, 120), "VDD_CPU_CV": (19920, 40), "VIN_SYS_5V0": (5032, 700)},
    )
    write_rails(root, "1-0041", "hwmon4", {"NC": (0, 0), "VDDQ_VDD2_1V8AO": (5032, 60), "NC#2": (0, 0)})
    write_zones(
        root,
        {"CPU-therm": 41437, "GPU-therm": 38156, "CV0-therm": -256000},
        {"pwm-fan": (2, 10), "cpu-throttle-alert": (0, 1)},
    )
    write_program(board.bin / "nvpmodel", say("NV Fan Mode:quiet\nNV Power Mode: MAXN\n0"))
    write_program(
        board.bin / "jetson_clocks",
        say(
            "SOC family:tegra234  Machine:Jetson AGX Orin\nOnline CPUs: 0-3\n"
            "cpu0: Online=1 Governor=schedutil MinFreq=729600 MaxFreq=2201600 CurrentFreq=1113600 "
            "IdleStates: WFI=1 c7=1 \n"
            "cpu1:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=2201600 CurrentFreq=729600 "
            "IdleStates: WFI=1 c7=1 \n"
            "cpu10: Online=0 Governor=schedutil MinFreq=729600 MaxFreq=2201600 CurrentFreq=729600 "
            "IdleStates: WFI=1 c7=1 \n"
            "GPU MinFreq=306000000 MaxFreq=1300500000 CurrentFreq=306000000\nActive GPU TPCs: 8\n"
            "EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=2133000000 FreqOverride=0\n"
            "DLA0_CORE:   Online=1 MinFreq=0 MaxFreq=1600000000 CurrentFreq=1600000000\n"
            "PVA0_AXI:  Online=1 MinFreq=0 MaxFreq=832000000 CurrentFreq=832000000\n"
            "FAN Dynamic Speed control=active hwmon2_pwm1=55\nNV Power Mode: MAXN"
        ),
    )


def _orin_nano(board: FakeBoard) -> None:
    """JetPack 6.2: clocks locked, VDD_IN, nothing wrong."""
    root = board.root
    write_model(root, "NVIDIA Jetson Orin Nano Developer Kit", "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234")
    write_files(
        root,
        {
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64",
            "tegrastats.txt": ORIN_NANO_LINE,
            "sys/class/hwmon/hwmon2/oc1_event_cnt": 0,
            "sys/class/hwmon/hwmon2/oc3_event_cnt": 0,
        },
    )
    write_rails(
        root, "1-0040", "hwmon1", {"VDD_IN": (5000, 3264), "VDD_CPU_GPU_CV": (4992, 1424), "VDD_SOC": (4992, 625)}
    )
    write_zones(
        root,
        {"cpu-thermal": 57125, "gpu-thermal": 58625, "tj-thermal": 58625},
        {"pwm-fan": (3, 4), "cpufreq-cpu0": (0, 9), "devfreq-17000000.gpu": (0, 5), "hot-surface-alert": (0, 1)},
    )
    write_program(board.bin / "nvpmodel", say("NV Power Mode: 15W\n0"))
    cores = "\n".join(
        f"cpu{core}:  Online=1 Governor=schedutil MinFreq=1510400 MaxFreq=1510400 CurrentFreq=1510400 "
        "IdleStates: WFI=0 c7=0 "
        for core in range(6)
    )
    write_program(
        board.bin / "jetson_clocks",
        say(
            f"SOC family:tegra234  Machine:NVIDIA Jetson Orin Nano Developer Kit\nOnline CPUs: 0-5\n{cores}\n"
            "GPU MinFreq=624750000 MaxFreq=624750000 CurrentFreq=624750000\nActive GPU TPCs: 4\n"
            "EMC MinFreq=204000000 MaxFreq=2133000000 CurrentFreq=2133000000 FreqOverride=1\n"
            "FAN Dynamic Speed Control=nvfancontrol hwmon0_pwm1=69\nNV Power Mode: 15W"
        ),
    )


def _thor(board: FakeBoard) -> None:
    """JetPack 7.0: jetson_clocks wants root, the GPU is throttled, its thermal zone can't be read."""
    root = board.root
    write_model(root, "NVIDIA Jetson AGX Thor Developer Kit", "nvidia,p4071-0000+p3834-0008\0nvidia,tegra264")
    write_files(
        root,
        {
            "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64",
            "tegrastats.txt": THOR_LINE,
            "sys/class/hwmon/hwmon5/oc1_event_cnt": 0,
            "sys/class/hwmon/hwmon5/oc3_event_cnt": 27,
            "sys/class/devfreq/gpu-gpc-0/min_freq": 306000000,
            "sys/class/devfreq/gpu-gpc-0/max_freq": 1574000000,
            "sys/class/devfreq/gpu-gpc-0/cur_freq": 1020000000,
            "sys/class/devfreq/gpu-nvd-0/min_freq": 400000000,
            "sys/class/devfreq/gpu-nvd-0/max_freq": 1692000000,
            "sys/class/devfreq/gpu-nvd-0/cur_freq": 400000000,
            "sys/class/devfreq/8188050000.vic/min_freq": 1,
        },
    )
    write_cores(root, {0: (972000, 2601000, 2601000), 1: (972000, 2601000, 972000)})
    write_rails(
        root,
        "2-0040",
        "hwmon0",
        {"VDD_GPU": (12040, 640), "VDD_CPU_SOC_MSS": (12040, 960), "VIN_SYS_5V0": (5088, 1740)},
    )
    write_zones(
        root,
        {"cpu-thermal": 58250, "tj-thermal": 66625},
        {"cpufreq-cpu0": (0, 48), "gpu-throttle-alert": (1, 2), "pwm-fan": (4, 4)},
    )
    write_files(root, {"sys/class/thermal/thermal_zone2/type": "gpu-thermal"})
    (root / "sys/class/thermal/thermal_zone2/temp").mkdir()  # reading it fails, as EAGAIN does for a GPU without power
    write_program(board.bin / "nvpmodel", say("NV Power Mode: 120W\n1"))
    write_program(board.bin / "jetson_clocks", _ROOT_ONLY)
