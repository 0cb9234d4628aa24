"""Ascend's own texts are read and judged; the samples have the forms of programs of 2022, 2024 and 2025."""
from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest

from mindformers_ixc.doctor.ascend import (
    Ascend,
    Device,
    ascend_findings,
    cann_version,
    driver_version,
    gather,
    parse_npu_smi,
)
from mindformers_ixc.doctor.findings import NOTE, OK, PROBLEM
from mindformers_ixc.doctor.versions import PAIRS

NEW = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.5.0                   Version: 25.5.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 90.4        32                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3401 / 65536         |
+===========================+===============+====================================================+
| 1     910B3               | Alarm         | 92.9        33                0    / 0             |
| 0                         | 0000:C2:00.0  | 0           0    / 0          60840/ 65536         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 1       0                 | 12345         | python                   | 57440                   |
+===========================+===============+====================================================+
"""
OLD = """\
+-------------------+-----------------+------------------------------------------------------+
| npu-smi 22.0.0                       Version:22.0.2                                        |
+-------------------+-----------------+------------------------------------------------------+
| NPU     Name      | Health          | Power(W)     Temp(C)           Hugepages-Usage(page) |
| Chip    Device    | Bus-Id          | AICore(%)    Memory-Usage(MB)                        |
+===================+=================+======================================================+
| 2       310P3     | OK              | 16.2         42                0    / 0              |
| 0       0         | 0000:86:00.0    | 0            994  / 21534                            |
+===================+=================+======================================================+
"""
TWO_CHIPS = """\
| npu-smi 24.1.rc3.7               Version: 24.1.rc3.7                                           |
| 0     Ascend910           | OK            | 178.9       36                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3412 / 65536         |
+------------------------------------------------------------------------------------------------+
| 0     Ascend910           | OK            | -           36                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          3189 / 65536         |
"""
PAIR = PAIRS[-1]        # 2.7.2 with 1.8.0: CANN 8.5.0, driver 25.5.0
GOOD = Ascend(["davinci0", "davinci1"], NEW.replace("Alarm", "OK   ").replace("60840/", "3401 /"), "", "25.5.0",
              "8.5.0", "/usr/local/Ascend/cann", "/usr/local/Ascend/cann")


def test_devices_of_npu_smi():
    assert parse_npu_smi(NEW) == ("25.5.0", [Device(0, "910B3", "OK", 3401, 65536),
                                             Device(1, "910B3", "Alarm", 60840, 65536)])
    assert parse_npu_smi(OLD) == ("22.0.2", [Device(2, "310P3", "OK", 994, 21534)])
    assert [device.used for device in parse_npu_smi(TWO_CHIPS)[1]] == [3412, 3189]
    assert parse_npu_smi("dcmi module initialize failed. ret is -8005") == ("", [])


@pytest.mark.parametrize("text,version", [
    ("package_name=Ascend-cann-toolkit\nversion=8.5.0\ninnerversion=V100R001C25\narch=aarch64\n", "8.5.0"),
    ("# made by the installer\nruntime_running_version=[7.3.0.1.231:8.0.RC2]\n", "8.0.RC2"),
    ("toolkit_running_version=[7.7.0.1.238:8.2.RC1]\n", "8.2.RC1"), ("Version=9.0.0\n", "9.0.0"), ("nothing", "")])
def test_version_of_cann(text, version):
    assert cann_version(text) == version


def test_version_of_the_driver():
    assert driver_version("Version=25.5.0\nascendhal_version=7.35.23\npackage_version=25.5.0\n") == "25.5.0"
    assert driver_version("package_version=24.1.rc3\n") == "24.1.rc3"


def test_files_and_program_are_found(tmp_path):
    root, devices, program = tmp_path / "Ascend", tmp_path / "dev", tmp_path / "bin" / "npu-smi"
    latest = root / "ascend-toolkit" / "latest" / f"{platform.machine()}-linux"
    for folder in (latest, root / "driver", devices, program.parent):
        folder.mkdir(parents=True)
    (latest / "ascend_toolkit_install.info").write_text("version=8.5.0\n")
    (root / "driver" / "version.info").write_text("Version=25.5.0\n")
    for name in ("davinci0", "davinci1", "davinci_manager"):
        (devices / name).touch()
    (tmp_path / "table").write_text(NEW)
    program.write_text(f"#!/bin/sh\ncat {tmp_path / 'table'}\n")
    program.chmod(0o755)
    found = gather({"PATH": f"{program.parent}{os.pathsep}{os.defpath}"}, root, devices)
    assert found == Ascend(["davinci0", "davinci1"], NEW, "", "25.5.0", "8.5.0", str(latest.parent), "")
    program.write_text("#!/bin/sh\necho dcmi module initialize failed >&2\nexit 255\n")
    failed = gather({"PATH": f"{program.parent}{os.pathsep}{os.defpath}"}, root, devices)
    assert (failed.npu_smi, failed.npu_smi_failed) == ("", "dcmi module initialize failed")


def test_the_environment_names_cann_first(tmp_path):
    root, mine = tmp_path / "Ascend", tmp_path / "mine"
    for folder, version in ((root / "cann", "9.0.0"), (mine, "8.5.0")):
        folder.mkdir(parents=True)
        (folder / "version.cfg").write_text(f"toolkit_running_version=[7.1:{version}]\n")
    assert gather({"PATH": "", "ASCEND_HOME_PATH": str(mine)}, root, tmp_path).cann == "8.5.0"
    assert gather({"PATH": ""}, root, tmp_path).cann == "9.0.0"


def test_a_machine_without_anything(tmp_path):
    nothing = gather({"PATH": ""}, tmp_path / "Ascend", tmp_path)
    assert not nothing.is_there
    assert [finding.state for finding in ascend_findings(nothing, PAIR, False)] == [OK]
    wanted, = ascend_findings(nothing, PAIR, True)
    assert wanted.state == PROBLEM and "docs/install.md" in wanted.advice
    assert Path(__file__).parents[2].joinpath("docs", "install.md").exists()


def test_a_machine_in_order():
    findings = ascend_findings(GOOD, PAIR, True)
    assert [finding.state for finding in findings] == [OK, OK, OK]
    assert "2 x 910B3, 64 GiB each, 60.7 GiB free" in findings[0].text


@pytest.mark.parametrize("change,topic,words,advice", [
    ({"npu_smi": NEW}, "Ascend", "not healthy: device 1 (Alarm)", "ASCEND_RT_VISIBLE_DEVICES"),
    ({"npu_smi": None}, "Ascend", "2 device files, but the program npu-smi is not found", "/usr/local/dcmi"),
    ({"npu_smi": "", "npu_smi_failed": "ret is -8005"}, "Ascend", "sees no device: ret is -8005", "HwHiAiUser"),
    ({"driver": "25.3.rc1"}, "driver", "25.3.rc1; MindSpore 2.7.2 is documented with 25.5.0", "25.5.0"),
    ({"driver": "", "npu_smi": None}, "driver", "not to be found", "mount"),
    ({"cann": "8.3.RC1"}, "CANN", "8.3.RC1 in /usr/local/Ascend/cann; MindSpore 2.7.2 is documented with 8.5.0",
     "install CANN 8.5.0"),
    ({"cann": "", "home": ""}, "CANN", "CANN is not found", "set_env.sh"),
    ({"home": ""}, "CANN", "environment is not set", "source /usr/local/Ascend/cann/set_env.sh"),
    ({"home": "", "cann_folder": "/usr/local/Ascend/ascend-toolkit/latest"}, "CANN", "environment is not set",
     "source /usr/local/Ascend/ascend-toolkit/set_env.sh")])
def test_what_is_wrong_comes_with_what_to_do(change, topic, words, advice):
    changed = replace(GOOD, **change)
    wrong = [finding for finding in ascend_findings(changed, PAIR, True) if finding.state == PROBLEM]
    found, = (finding for finding in wrong if words in finding.text)
    assert found.topic == topic and advice in found.advice
    # a run on the CPU is not stopped by it
    assert all(finding.state != PROBLEM for finding in ascend_findings(changed, PAIR, False))


def test_newer_versions_and_busy_devices_are_only_noted():
    findings = ascend_findings(replace(GOOD, npu_smi=NEW.replace("Alarm", "OK   "), cann="9.0.0", driver="26.0.RC1"),
                               PAIR, True)
    assert [(finding.topic, finding.state) for finding in findings] == [
        ("Ascend", OK), ("Ascend", NOTE), ("driver", NOTE), ("CANN", NOTE)]
    assert "in use by others: device 1" in findings[1].text
