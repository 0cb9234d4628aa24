"""Whether the device that is to compute can be there; known without MindSpore, whose own message is a page long."""
from __future__ import annotations

import os
from pathlib import Path

from mindformers_ixc.errors import ConfigError

# What MindFormers computes on where a YAML does not say it.
USUAL = "Ascend"

# The files by which a driver shows a device, in /dev; a virtual NPU's is called vdavinci100, say.
FILES = {"CPU": None, "GPU": "nvidia[0-9]*", "Ascend": "*davinci[0-9]*"}

# With it MindSpore compiles for a device that need not be there.
SIMULATED = "MS_SIMULATION_LEVEL"


def check_device(target: object, where: str, devices: Path = Path("/dev")) -> None:
    """Refuses a device that is none, or that no driver shows.

    Args:
        target: its name; `None` is MindFormers' own choice.
        where: what names it: an option or a key of the YAML.
        devices: folder of device files.

    Raises:
        ConfigError: with what to do.
    """
    said = f"{where} is {target!r}" if target is not None else f"{where} is not said, which means {USUAL}"
    name = USUAL if target is None else target
    if name not in FILES:
        raise ConfigError(f"{said}; the choices are {', '.join(FILES)}.")
    pattern = FILES[str(name)]
    if pattern and SIMULATED not in os.environ and not any(devices.glob(pattern)):
        option = "--device_target CPU" if where.startswith("--") else f"--{where} CPU"
        raise ConfigError(f"{said}, but this machine shows no such device ({devices / pattern} is not there). "
                          f"`mindformers doctor --device_target {name}` says what is missing; {option} computes "
                          "without one.")
