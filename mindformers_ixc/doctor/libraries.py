"""Libraries of the system that MindSpore needs, and what to do where they are missing."""
from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping

from mindformers_ixc.doctor.findings import OK, PROBLEM, Finding

# Libraries of the system that MindSpore's wheel needs and does not bring, and the packages of Debian and Ubuntu that
# have them: bare images lack the first.
SYSTEM_LIBRARIES = {"libgomp.so.1": "libgomp1", "libstdc++.so.6": "libstdc++6"}


def libraries_finding(names: Mapping[str, str] = SYSTEM_LIBRARIES) -> Finding:
    """Whether MindSpore will find what it needs of the system's libraries.

    Args:
        names: of the libraries, with the packages that have them.
    """
    missing = []
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            missing.append(name)
    if missing:
        return Finding("libraries", PROBLEM, f"{', '.join(missing)} not found, without which MindSpore cannot be "
                       "imported", how_to_install(missing[0]))
    return Finding("libraries", OK, f"{', '.join(names)} found")


def how_to_install(message: str) -> str:
    """What to do about a library of the system that is named in a message, or nothing if it names none."""
    named = re.search(r"lib[\w+-]+\.so[.\d]*", message)
    if named is None:
        return ""
    package = SYSTEM_LIBRARIES.get(named.group())
    return (f"install {named.group()}, a library of the system" +
            (f": apt-get install {package} on Debian and Ubuntu" if package else ""))
