"""`mindformers doctor`: whether this machine and what is installed will do, and what to do where they will not."""
from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict

from mindformers_ixc import terminal
from mindformers_ixc.doctor.ascend import ascend_findings, gather
from mindformers_ixc.doctor.findings import PROBLEM, Finding, findings_text, has_problems
from mindformers_ixc.doctor.machine import machine_findings
from mindformers_ixc.doctor.self_test import self_test
from mindformers_ixc.doctor.versions import find_pair, installed_version, version_findings


def doctor(arguments: argparse.Namespace) -> int:
    """Looks at versions, machine and devices, and lets a tiny model train and answer.

    Args:
        arguments: of the `doctor` subcommand.

    Returns:
        Exit code: 1 if something is wrong that would stop a run.
    """
    findings = quick_findings(arguments.device_target, not arguments.quick)
    if not arguments.quick:
        findings.append(_tested(findings, arguments.device_target))
    if arguments.json:
        found = {"problems": sum(finding.state == PROBLEM for finding in findings),
                 "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(found, indent=1), file=arguments.answers)
    else:
        width = min(shutil.get_terminal_size((100, 24)).columns, 120)
        print(findings_text(findings, max(width, 20)), file=arguments.answers)
    return 1 if has_problems(findings) else 0


def quick_findings(device_target: str, build_now: bool = False) -> list[Finding]:
    """All that can be known without importing MindSpore.

    Args:
        device_target: where runs are to compute; a missing device is a problem for those that need one.
        build_now: build the kernels for the CPU if they have not been.
    """
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    pair = find_pair(installed_version("mindspore"), installed_version("mindformers"))
    return [*version_findings(sys.version_info[:2], python), *machine_findings(os.environ, build_now),
            *ascend_findings(gather(os.environ), pair, device_target == "Ascend")]


def _tested(findings: list[Finding], device_target: str) -> Finding:
    """The self test, unless it is known that it cannot run."""
    stops = next((finding for finding in findings if finding.state == PROBLEM
                  and finding.topic in ("Python", "MindSpore", "libraries")), None)
    if stops is not None:
        return Finding("self test", "note", f"left out, since {stops.topic} is not in order")
    what = "Self test: a tiny model trains and answers (about 11 seconds where nothing else computes)"
    with terminal.current.doing(what, at_once=True):
        return self_test(device_target)
