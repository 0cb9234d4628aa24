"""One rank of the collectives' tests: `collectives_rank.py exchange|die FOLDER JOBS`.

`exchange` runs the collectives in small graphs, and leaves what came out in FOLDER: `rank_N.npz` results,
`rank_N.json` sentences of what was refused. It begins when the mailbox has the folders of so many JOBS.
`die` lets two of three ranks die and leaves what the others raised, and when: `rank_N.json`.
"""
from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np

GROUPS = {2: {"world": [0, 1]},
          4: {"world": [0, 1, 2, 3], "even": [0, 2], "odd": [1, 3], "outer": [0, 1, 3]}}
DTYPES = ["float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
          "uint64", "bool", "complex64"]
OPERATIONS = ["sum", "max", "min", "prod"]
KINDS = ["allreduce", "reducescatter", "allgather", "sendreceive"]
DAMAGES = ["cut", "empty", "flipped", "strange", "shape", "type"]
TIMES = 6          # sums in one graph
SLOWEST_S = 0.6    # the last rank comes this much later to the barrier


def name_of(*words) -> str:
    """Of a case, in files."""
    return "/".join(words)


def operations(kind: str) -> list[str]:
    """Those of a collective; one without a name stands for none."""
    return OPERATIONS if "reduce" in kind else [""]


def has(operation: str, dtype: str) -> bool:
    """Whether there is such a reduction: no complex number is the greatest."""
    return not (dtype.startswith("complex") and operation in ("max", "min"))


def values(rank: int, dtype: str, members: int) -> np.ndarray:
    """The rank's tensor; bfloat16's in float32. Its first axis can be scattered over a group."""
    rng = np.random.default_rng([rank, *dtype.encode()])
    shape = (members * 2, 3)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if "int" in dtype:      # its whole range: sums and products wrap around
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
    array = rng.standard_normal(shape)
    if dtype.startswith("complex"):
        return (array + 1j * rng.standard_normal(shape)).astype(dtype)
    array[0, 0] = np.nan if rank == 1 else array[0, 0]
    return array.astype("float32" if dtype == "bfloat16" else dtype)


class Exchange:
    """The graphs of this rank.

    Args:
        size: number of ranks.
        rank: this one's.
    """

    def __init__(self, size: int, rank: int):
        from mindspore.communication import GlobalComm, create_group

        self.rank, self.groups = rank, {"world": GlobalComm.WORLD_COMM_GROUP}
        self.members = GROUPS[size]
        self.results: dict[str, np.ndarray] = {}
        self.sentences: dict[str, str] = {}
        self.taken: dict[str, list[str]] = {}
        for group, ranks in self.members.items():
            if group != "world" and rank in ranks:
                # a name that no file could have
                self.groups[group] = f"{group}/{'x' * 300}"
                create_group(self.groups[group], ranks)

    def run(self, name: str, work) -> None:
        """Keeps what a case results in, or the sentence with which it was refused."""
        try:
            self.results[name] = work()
        except (TypeError, ValueError, RuntimeError) as error:
            self.sentences[name] = str(error)

    def ask(self, kind: str) -> None:
        """Notes the types that this version's primitive takes, which it tells when it is given another."""
        listed = []
        try:
            self.case(kind, "sum", "world", ["complex128"])
        except TypeError as error:
            listed = [name.lower() for name in re.findall(r"Tensor\[(\w+)\]", str(error).split("}")[0])]
        self.taken[kind] = [dtype for dtype in DTYPES if dtype in listed]

    def case(self, kind: str, operation: str, group: str, dtypes: list[str]) -> list[np.ndarray]:
        """This rank's results of a collective, for each type, in one graph.

        Operations have graphs of their own: MindSpore takes sum and max of the same tensor for the same.
        """
        import mindspore as ms
        from mindspore import ops

        members = self.members[group]
        place, count, channel = members.index(self.rank), len(members), self.groups[group]
        tensors = [tensor_of(self.rank, dtype, count) for dtype in dtypes]
        if kind == "sendreceive":
            graph([ops.Send(sr_tag=tag, dest_rank=(place + 1) % count, group=channel)
                   for tag in range(len(dtypes))])(*tensors)
            results = graph([ops.Receive(sr_tag=tag, src_rank=(place - 1) % count, shape=list(tensor.shape),
                                         dtype=tensor.dtype, group=channel) for tag, tensor in enumerate(tensors)])()
        elif kind == "allgather":
            results = graph([ops.AllGather(channel) for _ in dtypes])(*tensors)
        else:
            primitive = {"allreduce": ops.AllReduce, "reducescatter": ops.ReduceScatter}[kind]
            results = graph([primitive(operation, channel) for _ in dtypes])(*tensors)
        return [(result.astype(ms.float32) if result.dtype == ms.bfloat16 else result).asnumpy() for result in results]

    def barrier(self) -> np.ndarray:
        """When this rank came to the barrier, and when it left it, on a clock that all ranks share."""
        from mindspore import ops

        barrier = graph([ops.Barrier(self.groups["world"])])
        barrier()
        time.sleep(SLOWEST_S * self.rank / (len(self.members["world"]) - 1))
        came = time.monotonic()
        barrier()
        return np.array([came, time.monotonic()])

    def order(self) -> np.ndarray:
        """Sums of one graph that do not depend on each other: all ranks must take them in one order."""
        from mindspore import Tensor, ops

        sums = graph([ops.AllReduce()] * TIMES)
        tensors = [Tensor(np.full((2, 2), 10.0 ** i * (self.rank + 1), np.float32)) for i in range(TIMES)]
        for _ in range(20):
            result = np.stack([tensor.asnumpy() for tensor in sums(*tensors)])
        return result

    def damaged(self, how: str, to: int) -> None:
        """A rank finds a message of rank 0 that is not as it was sent, or not the one it expects."""
        from mindspore import Tensor, float32, int32, ops

        tag = 100 + DAMAGES.index(how)
        if self.rank == 0:
            graph([ops.Send(sr_tag=tag, dest_rank=to)])(Tensor(np.ones((4, 4), np.float32)))
        elif self.rank == to:
            file, = wait_for(lambda: list(self.folder().glob(f"p2p{tag}.*.0-{to}.0")))
            content = bytearray(file.read_bytes())
            if how == "flipped":
                content[-1] ^= 1
            file.write_bytes({"cut": content[:-1], "empty": b"", "strange": b"x" * len(content)}.get(how, content))
            shape, dtype = (4, 5) if how == "shape" else (4, 4), int32 if how == "type" else float32
            self.run(how, lambda: receive(tag, 0, shape, dtype))

    def save(self, folder: Path) -> None:
        """Leaves the results."""
        np.savez(folder / f"rank_{self.rank}.npz", **self.results)
        (folder / f"rank_{self.rank}.json").write_text(json.dumps({"taken": self.taken, **self.sentences}))

    def folder(self) -> Path:
        """This job's; the other that runs at the same time has another number of ranks."""
        return next(folder for folder in Path(os.environ["CPU_PARALLEL_MAILBOX"]).glob("mindspore_cpu_parallel_*")
                    if len(list(folder.glob("rank.*"))) == len(self.members["world"]))


def tensor_of(rank: int, dtype: str, members: int):
    """The rank's tensor, in MindSpore."""
    import mindspore as ms
    from mindspore import Tensor

    tensor = Tensor(values(rank, dtype, members))
    return tensor.astype(ms.bfloat16) if dtype == "bfloat16" else tensor


def graph(primitives: list):
    """A graph that applies each operator to an input of its own, or to none."""
    from mindspore import nn

    class Graph(nn.Cell):
        def __init__(self):
            super().__init__()
            self.primitives = tuple(primitives)

        def construct(self, *tensors):
            result = ()
            for i in range(len(self.primitives)):
                result += (self.primitives[i](*tensors[i:i + 1]),)
            return result

    return Graph()


def receive(tag: int, place: int, shape, dtype) -> np.ndarray:
    """What the member at a place of the world has sent."""
    from mindspore import ops
    from mindspore.communication import GlobalComm

    primitive = ops.Receive(sr_tag=tag, src_rank=place, shape=list(shape), dtype=dtype,
                            group=GlobalComm.WORLD_COMM_GROUP)
    return graph([primitive])()[0].asnumpy()


def wait_for(condition, seconds: float = 60.0):
    """The condition's value, as soon as it is one."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError("What this rank waits for does not come.")
        time.sleep(0.05)
    return found


def say_last_words() -> None:
    """Returns while the message has still to be computed."""
    import mindspore as ms
    from mindspore import Tensor, ops

    ms.set_context(mode=ms.PYNATIVE_MODE)       # operators run after their call
    tensor = Tensor(np.eye(600, dtype=np.float32))
    for _ in range(60):
        tensor = ops.matmul(tensor, tensor)
    ops.Send(sr_tag=98, dest_rank=0)(tensor)


def exchange(folder: Path, jobs: int, rank: int, size: int) -> None:
    """Every case; those that MindSpore takes seconds to recover from in one of the jobs only."""
    from mindspore import float32, ops

    mailbox = Path(os.environ["CPU_PARALLEL_MAILBOX"])
    wait_for(lambda: len(list(mailbox.glob("mindspore_cpu_parallel_*"))) >= jobs, 120)
    job = Exchange(size, rank)
    for kind in KINDS:
        job.ask(kind)
        for group, members in GROUPS[size].items():
            for operation in operations(kind) if rank in members else ():
                dtypes = [dtype for dtype in job.taken[kind] if has(operation, dtype)]
                for dtype, result in zip(dtypes, job.case(kind, operation, group, dtypes)):
                    job.results[name_of(kind, operation, group, dtype)] = result
    job.results["barrier"], job.results["order"] = job.barrier(), job.order()
    if size == 4:
        for i, how in enumerate(DAMAGES):
            job.damaged(how, 1 + i % 3)
        return job.save(folder)
    maximum = graph([ops.ReduceScatter("max")])
    job.run("maximum", lambda: maximum(tensor_of(rank, "complex64", size))[0].asnumpy())
    if rank == 1:
        job.save(folder)
        return say_last_words()
    job.run("last", lambda: receive(98, 1, (600, 600), float32))
    job.run("ended", lambda: receive(99, 1, (1,), float32))
    for kind in KINDS:
        for dtype in DTYPES:
            if dtype not in job.taken[kind]:
                job.run(name_of(kind, dtype), lambda kind=kind, dtype=dtype: job.case(kind, "sum", "world", [dtype]))
    return job.save(folder)


def die(folder: Path, rank: int) -> None:
    """Rank 2 is killed amid an exchange; rank 1 goes on without sending what rank 0 expects, and then leaves."""
    from mindspore import Tensor, float32, ops

    exchanging, tensor = graph([ops.AllReduce()]), Tensor(np.ones((8,), np.float32))
    report = {"process": os.getpid()}

    def note(name: str, *facts) -> None:
        report[name] = [time.monotonic(), *facts]
        partial = folder / f"rank_{rank}.part"
        partial.write_text(json.dumps(report))
        partial.replace(folder / f"rank_{rank}.json")

    def kill() -> None:
        time.sleep(0.5)
        note("died")
        os.kill(os.getpid(), signal.SIGKILL)

    def expect(name: str, work) -> None:
        try:
            work()
        except RuntimeError as error:
            note(name, str(error))

    exchanging(tensor)       # compiled, and every rank is there
    if rank == 2:
        threading.Thread(target=kill).start()
    expect("killed", lambda: [exchanging(tensor) for _ in range(10 ** 6)])
    if rank == 1:
        wait_for(lambda: "stuck" in (folder / "rank_0.json").read_text() if (folder / "rank_0.json").exists() else "")
        time.sleep(0.5)         # rank 0 waits again by now
        note("died")
        os._exit(0)
    expect("stuck", lambda: receive(1, 1, (1,), float32))
    expect("left", lambda: receive(2, 1, (1,), float32))
    threading.Event().wait()        # the test kills all that is left


def main(mode: str, folder: str, jobs: str) -> None:
    import mindspore as ms
    from mindspore.communication import get_group_size, get_rank, init

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    init()              # the scheduler stays in here
    # the collectives need nothing else of the package, whose import takes every rank seconds
    package = types.ModuleType("mindformers_ixc")
    package.__path__ = importlib.util.find_spec("mindformers_ixc").submodule_search_locations
    sys.modules["mindformers_ixc"] = package
    from mindformers_ixc.cpu_cluster.groups import install

    install()
    if mode == "die":
        die(Path(folder), get_rank())
    else:
        exchange(Path(folder), int(jobs), get_rank(), get_group_size())
    # all that is done at exit but MindSpore's last clearing up, in which its receiving thread was once seen to crash
    atexit._run_exitfuncs()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
