"""Kills runs at random moments and resumes them to the end: losses, evaluations and the final model must be bit-equal.

    python scripts/kill_runs.py WORK --single 50
    python scripts/kill_runs.py WORK --launch 12

A run that is not interrupted comes first; its length gives the time within which moments are drawn. Each case begins
anew, is killed with SIGKILL (one to three times, its resumes too) and resumed until it ends. With `--launch` the victim
of each kill is a rank, the scheduler or the launcher itself, and all of the run's processes must be gone after 60 s.
`--signal TERM` asks the run to stop instead. One line a case, a table at the end; exit code 1 when a case failed.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from safetensors.numpy import load_file

from mindformers_ixc.training.throughput import TIMED

ROOT = Path(__file__).parents[1]
SAVE = ("[{type: MFLossMonitor}, {type: CheckpointMonitor, prefix: k, save_checkpoint_steps: 2, "
        "keep_checkpoint_max: 1, integrated_save: True, async_save: False, checkpoint_format: safetensors}]")
EVALUATION = ("{dataset_dir: 'pkg:mindformers_ixc/demo/train.json', every: 3, metrics: [loss], keep_best: loss, "
              "max_samples: 2, batch_size: 2}")
TINY = {"epochs": 1, "callbacks": SAVE, "model.model_config.num_hidden_layers": 2, "model.model_config.hidden_size": 64,
        "model.model_config.intermediate_size": 64}
PARALLEL = {"parallel.parallel_mode": 1, "parallel.full_batch": True, "parallel.gradients_mean": False,
            "parallel_config.model_parallel": 2, "parallel_config.vocab_emb_dp": False, "run_mode": "finetune",
            "model.model_config.plora_dropout": 0.0,
            "train_dataset.input_columns": "[input_ids, labels, pixel_values, global_views, view_index, vision_index, "
                                           "image_mask]"}
GONE_S = 60


class Run:
    """A run in a folder, by itself or as two tensor-parallel ranks.

    Args:
        out: its output folder.
        parallel: use `mindformers launch`.
    """

    def __init__(self, out: Path, parallel: bool):
        self.out, self.parallel = out, parallel

    def start(self, resume: bool) -> subprocess.Popen:
        options = {**TINY, **(PARALLEL if self.parallel else {"evaluation": EVALUATION}), "output_dir": self.out}
        if resume:
            options["resume_training"] = True
        command = [str(Path(sys.executable).with_name("mindformers")), *(["launch", "-n", "2"] if self.parallel else
                                                                          ["run"])]
        command += ["--config", str(ROOT / "yaml_configs" / "ixc25_sft_tiny.yaml")]
        command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with open(self.out.with_suffix(".log"), "ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def has_checkpoint(self) -> bool:
        """Whether a resume has something to go on from: a step that every rank has saved."""
        folders = [self.out / "checkpoint" / f"rank_{rank}" for rank in range(2 if self.parallel else 1)]
        steps = [{path.name.rpartition("-")[2] for path in folder.glob("k_*.safetensors")} for folder in folders]
        return bool(set.intersection(*steps))

    def processes(self) -> list[psutil.Process]:
        """Everything that runs for this folder."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.out) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def victim(self, kind: str, launcher: subprocess.Popen) -> psutil.Process | None:
        """The process to be killed; `None` if it is not there at this moment."""
        if kind == "run":
            return psutil.Process(launcher.pid)
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                variables = process.environ()
                wanted = variables.get("MS_ROLE") == "MS_SCHED" if kind == "scheduler" else (
                    variables.get("MS_ROLE") == "MS_WORKER" and kind == f"rank {variables.get('RANK_ID')}")
                if wanted and "msrun" in " ".join(process.parent().cmdline()[:2]):
                    return process
        return None

    def result(self) -> dict:
        """What two runs of the same steps must have alike."""
        rows = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        found: dict = {"metrics": [{key: row[key] for key in row if key not in TIMED} for row in rows]}
        if self.parallel:
            for rank in range(2):
                last = max((self.out / "checkpoint" / f"rank_{rank}").glob("k_*.safetensors"),
                           key=lambda path: int(path.stem.rpartition("_")[2]))
                # MindFormers numbers the prefix of a resumed run
                found[f"rank {rank}"] = f"{last.name.rpartition('-')[2]} {digest(last)}"
            return found
        found["evaluations"] = (self.out / "evaluations.jsonl").read_text()
        for name in ("model", "best"):
            found[name] = digest(self.out / name / "model.safetensors")
        found["hidden"] = sorted(path.name for path in self.out.iterdir() if path.name.startswith("."))
        return found


def digest(path: Path) -> str:
    """SHA-256 of a file's tensors; safetensors writes the metadata of a header in an order of its own."""
    found = hashlib.sha256()
    for name, value in sorted(load_file(path).items()):
        found.update(f"{name} {value.dtype} {value.shape} ".encode() + value.tobytes())
    return found.hexdigest()


def stop(run: Run, process: subprocess.Popen, kind: str, number: int) -> str | None:
    """Sends a signal to a victim and waits until all is gone; what was wrong with that, if anything."""
    victim = run.victim(kind, process)
    if victim is None:
        return "absent"
    with contextlib.suppress(psutil.Error):
        victim.send_signal(number)
    began = time.monotonic()
    while process.poll() is None or run.processes():
        if time.monotonic() - began > GONE_S:
            left = [f"{left.pid} {' '.join(left.cmdline())[:80]}" for left in run.processes()]
            for other in run.processes():
                with contextlib.suppress(psutil.Error):
                    other.kill()
            return f"after {GONE_S} s there were still {left}"
        time.sleep(0.1)
    if number == signal.SIGTERM and process.returncode not in (0, 143):
        return f"the run ended with {process.returncode} after SIGTERM"
    return None


def wait_for_training(run: Run, process: subprocess.Popen) -> None:
    """Waits until a run that was just started begins with its steps, or ends."""
    log, since = run.out / "metrics.jsonl", time.time() - 0.1
    while process.poll() is None and not (log.exists() and log.stat().st_mtime > since):
        time.sleep(0.02)


def case(run: Run, rng: random.Random, lengths: tuple[float, float], kinds: list[str],
         number: int) -> tuple[list[str], str | None]:
    """One run that is killed and resumed until it ends.

    Args:
        run: where and how.
        rng: draws moments and victims.
        lengths: seconds from the start to the first step, and from there to the end, of a run left alone.
        kinds: of victims.
        number: of the signal.

    Returns:
        Its kills in words, and what went wrong, if anything.
    """
    shutil.rmtree(run.out, ignore_errors=True)
    run.out.with_suffix(".log").unlink(missing_ok=True)
    said = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        resume = run.has_checkpoint()
        if not resume:
            shutil.rmtree(run.out, ignore_errors=True)
        kind, in_training = rng.choice(kinds), rng.random() < 0.8
        moment = rng.uniform(0, 1.1 * lengths[1]) if in_training else rng.uniform(0.1, 1) * lengths[0]
        process = run.start(resume)
        if in_training:
            wait_for_training(run, process)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            wrong = stop(run, process, kind, number)
            while wrong == "absent" and process.poll() is None:     # not started yet, or just ended
                time.sleep(0.1)
                wrong = stop(run, process, kind, number)
            said.append(f"{kind}, {moment:.2f} s after {'the first step began' if in_training else 'the start'}")
            if wrong and wrong != "absent":
                return said, wrong
            continue
        said.append(f"came to its end before {moment:.2f} s")
        if process.returncode:
            return said, f"ended with {process.returncode}"
    resume = run.has_checkpoint()
    if not resume:
        shutil.rmtree(run.out, ignore_errors=True)
    code = run.start(resume).wait()
    return said, f"the resume ended with {code}" if code else None


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the runs")
    parser.add_argument("--single", type=int, default=0, metavar="N", help="cases of a run by itself")
    parser.add_argument("--launch", type=int, default=0, metavar="N", help="cases of two tensor-parallel ranks")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL", help="what is sent (default: KILL)")
    parser.add_argument("--keep", action="store_true", help="keep the folders of cases that went well")
    arguments = parser.parse_args()
    number, rng = signal.Signals[f"SIG{arguments.signal}"], random.Random(arguments.seed)
    table = []
    for name, count, kinds in (("single", arguments.single, ["run"]),
                               ("launch", arguments.launch, ["rank 0", "rank 1", "scheduler", "run"])):
        if not count:
            continue
        whole = Run((arguments.work / f"{name}_whole").resolve(), name == "launch")
        shutil.rmtree(whole.out, ignore_errors=True)
        began = time.monotonic()
        process = whole.start(False)
        wait_for_training(whole, process)
        middle = time.monotonic()
        if code := process.wait():
            print(f"{name}: the run that is not interrupted ended with {code}; see {whole.out.with_suffix('.log')}")
            return 1
        lengths, expected, good = (middle - began, time.monotonic() - middle), whole.result(), 0
        print(f"{name}: {len(expected['metrics'])} steps; {lengths[0]:.1f} s to the first, then {lengths[1]:.1f} s",
              flush=True)
        for index in range(count):
            run = Run((arguments.work / f"{name}_{index}").resolve(), name == "launch")
            if number == signal.SIGTERM:
                kinds = ["run"]
            said, wrong = case(run, rng, lengths, kinds, number)
            if wrong is None:
                found = run.result()
                differs = [key for key in expected if found.get(key) != expected[key]]
                wrong = f"{', '.join(differs)} differ" if differs else None
            good += wrong is None
            print(f"{name} {index}: {'; '.join(said)}: {wrong or 'bit-equal'}", flush=True)
            if wrong is None and not arguments.keep:
                shutil.rmtree(run.out, ignore_errors=True)
        table.append((name, good, count))
    print("\n| kind | bit-equal |\n|---|---|")
    for name, good, count in table:
        print(f"| {name}, SIG{arguments.signal} | {good} of {count} |")
    return int(any(good < count for _, good, count in table))


if __name__ == "__main__":
    sys.exit(main())
