"""Runs or simulates MindSpore's semi-auto parallel on the CPU: for tests, for planning, for cutting checkpoints.

MindSpore's CPU back end can start and group processes (`msrun`, MCCL), but its parallel front end refuses the CPU by
name and most communication operators have no CPU kernel. Three small C++ libraries beside this file close that gap.
They are built with g++ against the headers that MindSpore's wheel carries, when they are first needed, and kept in the
user's cache, one set for each MindSpore version. A real cluster needs none of this.

    preload_environment()    what a process must be started with
    install()                in such a process under msrun: tensor, data and pipeline parallel over real processes
    simulate(rank, size)     in such a process: compile any rank of any cluster, front end only

Messages between ranks are files in CPU_PARALLEL_MAILBOX (a folder in /dev/shm unless it is set); a rank that waits
longer than CPU_PARALLEL_TIMEOUT_S (300) for another raises.
"""
from __future__ import annotations

import ctypes
import os

from mindformers_ixc.parallel.cpu.build import BuildError, build

__all__ = ["BuildError", "build", "install", "preload_environment", "simulate"]

_CREATE_GROUP = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_int)
_callbacks = []   # must outlive their registration
# Names for the world of a cluster: the front end's, the CPU back end's, and the default of Python functions.
_FRONT_END_WORLD, _CPU_WORLD, _DEFAULT_WORLD = "nccl_world_group", "mccl_world_group", "hccl_world_group"


def preload_environment(simulated: bool = False) -> dict[str, str]:
    """Variables a process must be started with.

    Args:
        simulated: the process only compiles; MindSpore then skips the back end and its device checks.

    Raises:
        BuildError: when the libraries cannot be built.
    """
    for name in ("comm_manager",) if simulated else ("comm_manager", "collectives"):
        build(name)         # here, once, and not in every rank at the same time
    earlier = os.environ.get("LD_PRELOAD")
    variables = {"LD_PRELOAD": f"{build('device_name')}{':' + earlier if earlier else ''}"}
    if simulated:
        variables["MS_SIMULATION_LEVEL"] = "0"
    return variables


def _register(create, rank: int, size: int) -> None:
    import mindspore  # noqa: F401 - its libraries must be loaded before ours

    if "libdevice_name" not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError("The process was not started with the variables of preload_environment().")
    callback = _CREATE_GROUP(create)
    _callbacks.append(callback)
    ctypes.CDLL(str(build("comm_manager"))).register_cpu_comm_manager(callback, rank, size)


def install() -> None:
    """After `mindspore.communication.init()`: semi-auto parallel uses the CPU's groups and these collectives."""
    import mindspore.communication.management as management
    from mindspore._c_expression import CollectiveManager, GroupOptions
    from mindspore.communication import get_group_size, get_rank
    from mindspore.ops.operations import comm_ops

    mailbox = os.environ.setdefault(
        "CPU_PARALLEL_MAILBOX", f"/dev/shm/mindspore_cpu_parallel_{os.environ.get('MS_SCHED_PORT', '0')}")
    os.makedirs(mailbox, exist_ok=True)
    manager = CollectiveManager.get_instance()
    collectives = ctypes.CDLL(str(build("collectives")))

    def add(name: str, ranks: list[int]) -> None:
        collectives.add_cpu_group(name.encode(), (ctypes.c_uint * len(ranks))(*ranks), len(ranks))

    def create(name, ranks, size):
        members = [ranks[i] for i in range(size)]
        add(name.decode(), members)
        return bool(manager.create_group(name.decode(), members, GroupOptions()))

    world = list(range(get_group_size()))
    collectives.register_cpu_collectives(get_rank())
    for name in (_FRONT_END_WORLD, _CPU_WORLD, _DEFAULT_WORLD):
        add(name, world)
    manager.create_group(_FRONT_END_WORLD, world, GroupOptions())
    # groups that Python code creates must be known to the collectives too; neither function has a hook
    original_create, original_name = management._create_group_helper, comm_ops._get_group

    def create_group_helper(group, rank_ids, *args, **kwargs):
        add(group, list(rank_ids))
        return original_create(group, rank_ids, *args, **kwargs)

    management._create_group_helper = create_group_helper
    comm_ops._get_group = lambda group: _CPU_WORLD if group == _FRONT_END_WORLD else original_name(group)
    _register(create, 0, 0)


def simulate(rank: int, size: int) -> dict[str, list[int]]:
    """Pretends to be a rank of a cluster: graphs can be compiled, not run.

    Returns:
        The communication groups, by name, filled as compilation creates them.
    """
    import mindspore.communication._comm_helper as helper
    import mindspore.communication.management as management

    groups: dict[str, list[int]] = {}

    def create(name, ranks, count):
        groups[name.decode()] = [ranks[i] for i in range(count)]
        return True

    def group_rank(group="", *_, **__):
        ranks = groups.get(group)
        return ranks.index(rank) if ranks and rank in ranks else rank

    def group_size(group="", *_, **__):
        return len(groups[group]) if group in groups else size

    def add_group(group, rank_ids, *_, **__):
        groups[group] = list(rank_ids)

    # MindSpore asks these helpers, and they ask a cluster that is not there; there is no hook
    for module in (helper, management):
        for name, substitute in (("_get_rank_helper", group_rank), ("_get_size_helper", group_size),
                                 ("_create_group_helper", add_group)):
            if hasattr(module, name):
                setattr(module, name, substitute)
    _register(create, rank, size)
    return groups
