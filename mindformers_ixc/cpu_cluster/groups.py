"""Gives MindSpore's parallel compiler its groups on the CPU: of real processes, or of a cluster that is not there."""
from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from typing import Any

import mindspore.communication._comm_helper as helper
import mindspore.communication.management as management
import numpy as np
from mindspore import Tensor
from mindspore._c_expression import CollectiveManager, GroupOptions, PyNativeExecutor_
from mindspore.communication import get_group_size, get_rank
from mindspore.mint import distributed
from mindspore.ops.operations import comm_ops

from mindformers_ixc.cpu_cluster.build import build
from mindformers_ixc.cpu_cluster.mailbox import Mailbox, timeout_s

_CREATE_GROUP = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_int)
_callbacks: list[object] = []   # must outlive their registration
_installed: list[bool] = []
# Names for the world of a cluster: the front end's, the CPU back end's, and the default of Python functions.
_FRONT_END_WORLD, _CPU_WORLD, _DEFAULT_WORLD = "nccl_world_group", "mccl_world_group", "hccl_world_group"


def _check_preloaded() -> None:
    if "libdevice_name" not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError("The process was not started with the variables of preload_environment().")


def _register(create: Callable[..., bool], rank: int, size: int) -> None:
    _check_preloaded()
    callback = _CREATE_GROUP(create)
    _callbacks.append(callback)
    ctypes.CDLL(str(build("comm_manager"))).register_cpu_comm_manager(callback, rank, size)


def _library(rank: int, size: int) -> ctypes.CDLL:
    """The collectives, set to work in this job's mailbox."""
    def total(values: np.ndarray) -> np.ndarray:
        # not AllReduce: MindSpore keeps what types an operator takes, and AllReduce would keep those of its own kernel
        tensor = Tensor(values)
        distributed.all_reduce(tensor)
        return tensor.asnumpy()

    collectives = ctypes.CDLL(str(build("collectives")))
    timeout = timeout_s()
    mailbox = Mailbox(rank, size, total, lambda path: collectives.cpu_rank_holds_lock(os.fsencode(path)),
                      PyNativeExecutor_.get_instance().sync)
    collectives.register_cpu_collectives(rank, size, os.fsencode(mailbox.folder), ctypes.c_double(timeout))
    return collectives


def install() -> None:
    """After `mindspore.communication.init()`: semi-auto parallel uses the CPU's groups and these collectives.

    Every rank must call it, before any AllReduce runs. A second call does nothing.

    Raises:
        RuntimeError: when the process was not started with the variables of `preload_environment`.
        ValueError: when CPU_PARALLEL_TIMEOUT_S is not a positive number.
        OSError: when the mailbox cannot be written, by this rank or another.
    """
    if _installed:
        return
    _check_preloaded()
    manager = CollectiveManager.get_instance()
    collectives = _library(get_rank(), get_group_size())

    def add(name: str, ranks: list[int], channel: str = "") -> None:
        collectives.add_cpu_group(name.encode(), (channel or name).encode(), (ctypes.c_uint * len(ranks))(*ranks),
                                  len(ranks))

    def create(name: bytes, ranks: ctypes._Pointer[ctypes.c_uint], size: int) -> bool:
        members = [ranks[i] for i in range(size)]
        add(name.decode(), members)
        return bool(manager.create_group(name.decode(), members, GroupOptions()))

    world = list(range(get_group_size()))
    for name in (_FRONT_END_WORLD, _CPU_WORLD, _DEFAULT_WORLD):
        add(name, world, _CPU_WORLD)        # a sender may know the world by another name than the receiver
    manager.create_group(_FRONT_END_WORLD, world, GroupOptions())
    # groups that Python code creates must be known to the collectives too; neither function has a hook
    original_create, original_name = management._create_group_helper, comm_ops._get_group

    def create_group_helper(group: str, rank_ids: Iterable[int], *args: Any, **kwargs: Any) -> Any:
        add(group, list(rank_ids))
        return original_create(group, rank_ids, *args, **kwargs)

    management._create_group_helper = create_group_helper
    comm_ops._get_group = lambda group: _CPU_WORLD if group == _FRONT_END_WORLD else original_name(group)
    _register(create, 0, 0)
    _installed.append(True)


def simulate(rank: int, size: int) -> dict[str, list[int]]:
    """Pretends to be a rank of a cluster: graphs can be compiled, not run.

    Returns:
        The communication groups, by name, filled as compilation creates them.
    """
    groups: dict[str, list[int]] = {}

    def create(name: bytes, ranks: ctypes._Pointer[ctypes.c_uint], count: int) -> bool:
        groups[name.decode()] = [ranks[i] for i in range(count)]
        return True

    def group_rank(group: str = "", *_: Any, **__: Any) -> int:
        ranks = groups.get(group)
        return ranks.index(rank) if ranks and rank in ranks else rank

    def group_size(group: str = "", *_: Any, **__: Any) -> int:
        return len(groups[group]) if group in groups else size

    def add_group(group: str, rank_ids: Iterable[int], *_: Any, **__: Any) -> None:
        groups[group] = list(rank_ids)

    # MindSpore asks these helpers, and they ask a cluster that is not there; there is no hook
    for module in (helper, management):
        for name, substitute in (("_get_rank_helper", group_rank), ("_get_size_helper", group_size),
                                 ("_create_group_helper", add_group)):
            if hasattr(module, name):
                setattr(module, name, substitute)
    _register(create, rank, size)
    return groups
