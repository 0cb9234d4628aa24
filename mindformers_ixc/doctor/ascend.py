"""What an Ascend machine says of itself: `npu-smi info`, the files of CANN and of the driver, the environment.

The functions that read texts are pure; `gather` collects the texts, `ascend_findings` judges them. Nothing here has run
on an Ascend machine: the forms are those that public logs and CANN's documentation show.
"""
from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mindformers_ixc.doctor.findings import NOTE, OK, PROBLEM, Finding
from mindformers_ixc.doctor.versions import PAIRS, Pair, version_key

# Where CANN and the driver are installed by root unless they are told otherwise.
ROOT = Path("/usr/local/Ascend")

# A device's second line begins with its place on the bus.
_BUS = re.compile(r"[0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.\d")
_MEMORY = re.compile(r"(\d+)\s*/\s*(\d+)")


@dataclass(frozen=True)
class Device:
    """One chip of `npu-smi info`.

    Attributes:
        card: number of its card.
        name: such as 910B3.
        health: `OK`, or what is wrong.
        used: megabytes of device memory in use.
        memory: megabytes of device memory.
    """

    card: int
    name: str
    health: str
    used: int
    memory: int


@dataclass(frozen=True)
class Ascend:
    """What a machine has of Ascend.

    Attributes:
        device_files: names of /dev/davinci0 and so on.
        npu_smi: what `npu-smi info` printed, `None` without the program.
        npu_smi_failed: the end of what it said when it failed.
        driver: version of the driver, from its own file.
        cann: version of CANN.
        cann_folder: where that was found.
        home: the variable ASCEND_HOME_PATH.
    """

    device_files: list[str] = field(default_factory=list)
    npu_smi: str | None = None
    npu_smi_failed: str = ""
    driver: str = ""
    cann: str = ""
    cann_folder: str = ""
    home: str = ""

    @property
    def is_there(self) -> bool:
        """Whether anything of Ascend is on this machine."""
        return bool(self.device_files or self.npu_smi is not None or self.driver or self.cann or self.home)


def parse_npu_smi(text: str) -> tuple[str, list[Device]]:
    """Reads the table of `npu-smi info`.

    Args:
        text: what it printed. A device takes two lines: number, name and health, then its place on the bus and, last,
            the memory in use and in all. Older programs have no column for HBM, where the last pair is the memory too.

    Returns:
        The program's version, which is the driver's, and the devices.
    """
    version = re.search(r"Version:\s*([^\s|]+)", text)
    devices: list[Device] = []
    first: tuple[int, str, str] | None = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.lstrip().startswith("|") or len(cells) != 3:
            continue
        memory = _MEMORY.findall(cells[2])
        if _BUS.search(cells[1]):
            if first is not None and memory:
                used, whole = memory[-1]
                devices.append(Device(*first, int(used), int(whole)))
            first = None
            continue
        words = cells[0].split(maxsplit=1)
        first = (int(words[0]), words[1], cells[1]) if len(words) == 2 and words[0].isdigit() else None
    return version[1] if version else "", devices


def parse_properties(text: str) -> dict[str, str]:
    """Reads `key=value` lines, as version.info, version.cfg and ascend_toolkit_install.info have them.

    Returns:
        Values by key in small letters, without quotes and brackets.
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, separator, value = line.partition("=")
        if separator and key.strip() and not key.lstrip().startswith("#"):
            found[key.strip().lower()] = value.strip().strip("\"'[]")
    return found


def cann_version(text: str) -> str:
    """The version of CANN that one of its files names, or an empty text.

    ascend_toolkit_install.info has `version=8.5.0`, version.cfg `toolkit_running_version=[7.3.0.1.231:8.0.RC2]`, the
    public number being the last one, and version.info `Version=8.5.0`.
    """
    found = parse_properties(text)
    for key in ("version", "toolkit_running_version", "runtime_running_version"):
        if found.get(key):
            return found[key].rpartition(":")[2]
    return ""


def driver_version(text: str) -> str:
    """The version that /usr/local/Ascend/driver/version.info names, or an empty text."""
    found = parse_properties(text)
    return found.get("version") or found.get("package_version", "")


def gather(environment: Mapping[str, str], root: Path = ROOT, devices: Path = Path("/dev")) -> Ascend:
    """Collects what the machine says; asks `npu-smi` where it is there.

    Args:
        environment: variables of the process.
        root: where Ascend's software is by default.
        devices: the folder of device files.
    """
    home = environment.get("ASCEND_HOME_PATH") or environment.get("ASCEND_TOOLKIT_HOME") or ""
    cann, folder = _find_cann([Path(home)] if home else [], root)
    printed, failed = _run_npu_smi(environment)
    return Ascend(sorted(file.name for file in devices.glob("davinci[0-9]*")), printed, failed,
                  driver_version(_read(root / "driver" / "version.info")), cann, folder, home)


def _find_cann(given: list[Path], root: Path) -> tuple[str, str]:
    """Version and folder of CANN: the environment's own first, then the usual places."""
    places = [*given, root / "ascend-toolkit" / "latest", root / "cann", root / "latest"]
    system = f"{platform.machine()}-linux"
    for place in places:
        for name in (f"{system}/ascend_toolkit_install.info", "ascend_toolkit_install.info", "version.cfg",
                     "version.info", "compiler/version.info"):
            found = cann_version(_read(place / name))
            if found:
                return found, str(place)
    return "", ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _run_npu_smi(environment: Mapping[str, str]) -> tuple[str | None, str]:
    """What `npu-smi info` prints, and the end of its words when it fails."""
    program = shutil.which("npu-smi", path=environment.get("PATH", os.defpath))
    if program is None:
        return None, ""
    try:
        done = subprocess.run([program, "info"], capture_output=True, text=True, errors="replace", timeout=30,
                              check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    return done.stdout, "" if done.returncode == 0 else (done.stderr or done.stdout).strip()[-300:] or "no message"


def ascend_findings(found: Ascend, pair: Pair | None, wanted: bool) -> list[Finding]:
    """What is right and wrong with Ascend on this machine.

    Args:
        found: what the machine says.
        pair: the installed pair of MindSpore and MindFormers, if it is in the table.
        wanted: whether a device is asked for; else a machine without one is in order.
    """
    if not found.is_there:
        text = "no NPU, driver or CANN is on this machine"
        return [Finding("Ascend", PROBLEM, text, "install driver, firmware and CANN (docs/install.md), or run on the "
                        "CPU with --device_target CPU") if wanted else
                Finding("Ascend", OK, f"{text}: runs compute on the CPU")]
    bad = PROBLEM if wanted else NOTE
    return [*_device_findings(found, bad), *_driver_findings(found, pair, bad), *_cann_findings(found, pair, bad)]


def _device_findings(found: Ascend, bad: str) -> list[Finding]:
    if found.npu_smi is None:
        seen = f"{len(found.device_files)} device files, but " if found.device_files else ""
        return [Finding("Ascend", bad, f"{seen}the program npu-smi is not found",
                        "install the driver; in a container mount /usr/local/bin/npu-smi, /usr/local/dcmi and "
                        "/usr/local/Ascend/driver, and pass the devices (docs/install.md)")]
    version, devices = parse_npu_smi(found.npu_smi)
    if found.npu_smi_failed or not devices:
        said = f": {' '.join(found.npu_smi_failed.split())}" if found.npu_smi_failed else ""
        return [Finding("Ascend", bad, f"npu-smi {version} sees no device{said}".replace("  ", " "),
                        "run `npu-smi info` yourself; the user must be in the driver's group (HwHiAiUser), and a "
                        "container needs /dev/davinciN, /dev/davinci_manager, /dev/devmm_svm and /dev/hisi_hdc")]
    names = sorted({device.name for device in devices})
    free = min(device.memory - device.used for device in devices) / 1024
    text = (f"{len(devices)} x {', '.join(names)}, {max(device.memory for device in devices) / 1024:.0f} GiB each, "
            f"{free:.1f} GiB free on the fullest")
    findings = [Finding("Ascend", OK, text)]
    sick = [f"{device.card} ({device.health})" for device in devices if device.health != "OK"]
    if sick:
        findings.append(Finding("Ascend", bad, f"not healthy: device {', '.join(sick)}",
                                "leave it out with ASCEND_RT_VISIBLE_DEVICES and look at `npu-smi info -t health`"))
    busy = [str(device.card) for device in devices if device.used > 0.2 * device.memory]
    if busy:
        findings.append(Finding("Ascend", NOTE, f"in use by others: device {', '.join(busy)}",
                                "`npu-smi info` names the processes; ASCEND_RT_VISIBLE_DEVICES chooses others"))
    return findings


def _driver_findings(found: Ascend, pair: Pair | None, bad: str) -> list[Finding]:
    version = found.driver or (parse_npu_smi(found.npu_smi)[0] if found.npu_smi else "")
    wanted = (pair or PAIRS[0]).driver
    if not version:
        return [Finding("driver", bad, "the version of the driver is not to be found",
                        "install the driver, or mount /usr/local/Ascend/driver into the container")]
    return [_compared("driver", version, wanted, pair, bad, "a newer driver serves older CANN, not the other way; ask "
                      f"for {wanted}")]


def _cann_findings(found: Ascend, pair: Pair | None, bad: str) -> list[Finding]:
    wanted = (pair or PAIRS[0]).cann
    if not found.cann:
        return [Finding("CANN", bad, "CANN is not found" + (f" in {found.home}" if found.home else ""),
                        f"install CANN {wanted} and its kernels for your chip, then `source "
                        f"{ROOT}/ascend-toolkit/set_env.sh` (since 8.5 {ROOT}/cann/set_env.sh)")]
    findings = [_compared("CANN", found.cann, wanted, pair, bad, f"install CANN {wanted}",
                          f" in {found.cann_folder}")]
    if not found.home:
        findings.append(Finding("CANN", bad, "its environment is not set in this shell (ASCEND_HOME_PATH is empty)",
                                f"source {_set_env(found.cann_folder)}"))
    return findings


def _set_env(folder: str) -> str:
    """The script that belongs to a folder of CANN: beside `latest`, else inside."""
    place = Path(folder)
    return str((place.parent if place.name == "latest" else place) / "set_env.sh")


def _compared(topic: str, version: str, wanted: str, pair: Pair | None, bad: str, advice: str,
              where: str = "") -> Finding:
    """A version held against the table's: older is wrong, newer is only not the documented one."""
    versions = pair or PAIRS[0]
    known = f"MindSpore {versions.mindspore} is documented with {wanted}"
    if version_key(version) == version_key(wanted):
        return Finding(topic, OK, f"{version}{where}, as documented for MindSpore {versions.mindspore}")
    if version_key(version) < version_key(wanted):
        return Finding(topic, bad, f"{version}{where}; {known}", advice)
    return Finding(topic, NOTE, f"{version}{where}, newer than documented: {known}")
