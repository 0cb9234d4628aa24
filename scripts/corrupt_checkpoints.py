"""Damages small checkpoints of every form and reads them: right, refused by name, or a defect of this code.

    python scripts/corrupt_checkpoints.py                      # 1000 corruptions, a minute or two
    python scripts/corrupt_checkpoints.py --count 60 --seed 7

Each corruption is a fresh copy of one form (model directory, shards, ranks, .ckpt, a run's checkpoint, .bin, adapter)
in which one thing is damaged: bits, blocks, lengths, headers, names, whole files, JSON values. It is then opened,
compared with its configuration, read to the last byte and inspected; some are converted, too. The exit code is 1 when
anything but an error of this package came out, or when what has digests gave other values without a word.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_ixc.checkpoint.adapters import open_adapter, read_adapter
from mindformers_ixc.checkpoint.convert import convert, select_tensors
from mindformers_ixc.checkpoint.digests import DIGEST_FILE, digest, tensor_stretches, write_digests
from mindformers_ixc.checkpoint.inspection import inspect
from mindformers_ixc.checkpoint.merge import fold_lora
from mindformers_ixc.checkpoint.model_config import config_of
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.checkpoint.tensor_file import TensorFile
from mindformers_ixc.checkpoint.writing import Options
from mindformers_ixc.config import ModelConfig
from mindformers_ixc.errors import CheckpointError, ConfigError, DataError
from mindformers_ixc.parameters import parameter_table

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "plora_rank": 2, "plora_alpha": 2, "task_lora_ranks": {"web": 2},
         "vision_config": {"image_size": 28, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                           "intermediate_size": 8}}

# What may come out: a sentence of the package, or of the system about a file that is not there.
REFUSALS = (CheckpointError, ConfigError, DataError, FileNotFoundError)

# One corruption in so many is converted as well, which takes most of the time.
CONVERT_EVERY = 20


@dataclass
class Form:
    """A form of checkpoint.

    Attributes:
        name: for the table.
        folder: the undamaged one.
        has_digests: whether damage must be noticed (in an old index the configuration has none).
        read: digest of what a folder gives, configuration included.
    """

    name: str
    folder: Path
    has_digests: bool
    read: Callable[[Path], str]


class Said(logging.Handler):
    """Keeps what was said of a changed configuration."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps one line."""
        self.lines.append(record.getMessage())


def read_model(folder: Path) -> str:
    """Digest of configuration and parameters, read as `convert` reads them."""
    source = open_source(folder)
    config = config_of(source)
    fields = {**config.to_public_dict(), "torch_dtype": None}          # which a conversion adds
    found = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(select_tensors(source, config, Options(to="hf")).items()):
        found.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.whole().tobytes())
    return found.hexdigest()


def read_lora(base: Path) -> Callable[[Path], str]:
    """Digest of a base with an adapter folded in."""
    def read(folder: Path) -> str:
        tensors = open_source(base).tensors
        merged = fold_lora(tensors, read_adapter(open_adapter(folder), tensors))
        return hashlib.sha256(b"".join(tensor.whole().tobytes() for tensor in merged.values())).hexdigest()
    return read


def make_public(folder: Path) -> dict[str, np.ndarray]:
    """A public model directory without digests, in one file."""
    config, rng = ModelConfig(**SIZES), np.random.default_rng(0)
    folder.mkdir()
    arrays = {entry.name: rng.standard_normal(entry.shape).astype(np.float32)
              for entry in parameter_table(config).values()}
    (folder / "config.json").write_text(json.dumps(config.to_public_dict(), indent=1))
    (folder / "tokenizer.model").write_bytes(rng.bytes(200))
    save(folder / "model.safetensors", arrays)
    return arrays


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes one file of tensors."""
    file = TensorFile(path, [(name, "F32", value.shape) for name, value in arrays.items()])
    file.open()
    for name, value in arrays.items():
        file.write(name, 0, value)
    file.close()


def make_forms(root: Path) -> list[Form]:
    """Every form, undamaged."""
    arrays = make_public(root / "public")
    forms = [Form("public", root / "public", False, read_model)]
    model = Path(shutil.copytree(root / "public", root / "model"))
    write_digests(model)
    forms.append(Form("model", model, True, read_model))
    for name, options in (("shards", {"to": "hf", "shard_bytes": 20000}), ("mindspore", {"to": "ms"}),
                          ("ckpt", {"format": "ckpt"}), ("ranks", {"tensor_parallel": 2, "pipeline_stages": 2}),
                          ("rank_ckpts", {"tensor_parallel": 2, "format": "ckpt"})):
        forms.append(Form(name, convert(model, root / name, **options), True, read_model))
    forms.append(Form("old_index", make_old(forms[2].folder, root / "old_index"), True, read_model))
    forms.append(Form("run", make_run(root / "run", arrays), True, read_model))
    if (folder := make_bin(root / "bin", root / "public", arrays)) is not None:
        forms.append(Form("bin", folder, False, read_model))
    forms.append(Form("adapter", make_lora(root / "adapter", arrays), False, read_lora(model)))
    return forms


def make_old(source: Path, folder: Path) -> Path:
    """What `convert` wrote before there were digest files: the tensors' digests in the index."""
    shutil.copytree(source, folder)
    (folder / DIGEST_FILE).unlink()
    index = folder / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["checksums"] = {name: digest(own) for file in folder.glob("*.safetensors")
                           for name, own in (tensor_stretches(file) or {}).items()}
    index.write_text(json.dumps(fields, indent=1))
    return folder


def make_run(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    """The folder of a stand-alone run that ended before it wrote its model: two checkpoints with optimizer states."""
    ranks = folder / "checkpoint" / "rank_0"
    ranks.mkdir(parents=True)
    (folder / "strategy").mkdir()
    for step in (5, 10):
        states = {f"adam_m.{name}": value * 0.1 for name, value in arrays.items() if "attention" in name}
        counters = {"global_step": np.full(1, step, np.float32), "train_report": np.zeros((2, 1), np.float32)}
        save(ranks / f"x_rank_0-1_{step}.safetensors",
             {**{name: value + step for name, value in arrays.items()}, **states, **counters})
    (ranks / "meta.json").write_text(json.dumps({"last_epoch": 1, "last_step": 10}))
    (folder / "run_config.json").write_text(json.dumps({"model": {"model_config": SIZES}, "start": None}))
    write_digests(ranks, rank=0, ranks=1)
    return folder


def make_bin(folder: Path, public: Path, arrays: dict[str, np.ndarray]) -> Path | None:
    """The public directory as PyTorch writes it, with PyTorch only."""
    try:
        import torch
    except ImportError:
        return None
    shutil.copytree(public, folder)
    (folder / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(value) for name, value in arrays.items()}, folder / "pytorch_model.bin")
    return folder


def make_lora(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    """A PEFT adapter."""
    folder.mkdir()
    rng, pairs = np.random.default_rng(1), {}
    for linear in ("model.layers.0.attention.wo", "model.layers.1.feed_forward.w1"):
        rows, columns = arrays[f"{linear}.weight"].shape
        pairs[f"base_model.model.{linear}.lora_A.weight"] = rng.standard_normal((3, columns)).astype(np.float32)
        pairs[f"base_model.model.{linear}.lora_B.weight"] = rng.standard_normal((rows, 3)).astype(np.float32)
    save(folder / "adapter_model.safetensors", pairs)
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["wo", "w1"], "bias": "none",
                "alpha_pattern": {"wo": 9}, "rank_pattern": {}, "use_rslora": False, "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


# --- ways to damage

def flip_bits(path: Path, rng: random.Random) -> None:
    """One to four bits, anywhere."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 4))):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flip_head(path: Path, rng: random.Random) -> None:
    """A byte among the first: lengths and headers."""
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(min(len(content), rng.choice((8, 64, 1000))))] = rng.randrange(256)
    path.write_bytes(content)


def truncate(path: Path, rng: random.Random) -> None:
    """Cut off, also to nothing."""
    size = path.stat().st_size
    os.truncate(path, rng.choice((0, 1, max(0, size - 1), rng.randrange(max(1, size)))))


def zero_block(path: Path, rng: random.Random) -> None:
    """Zeros where a block was not written."""
    content = bytearray(path.read_bytes())
    begin = rng.randrange(max(1, len(content)))
    end = min(len(content), begin + rng.choice((16, 512, 4096)))
    content[begin:end] = bytes(end - begin)
    path.write_bytes(content)


def append(path: Path, rng: random.Random) -> None:
    """Bytes behind the end."""
    path.write_bytes(path.read_bytes() + rng.choice((b"\0", b"\n", rng.randbytes(100), bytes(4096))))


def replace(path: Path, rng: random.Random) -> None:
    """Another content altogether."""
    path.write_bytes(rng.choice((b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100000, rng.randbytes(500),
                                 b"\x80\x02}.", b"PK\x05\x06" + bytes(18), path.read_bytes()[::-1])))


def delete(path: Path, rng: random.Random) -> None:
    """The file is gone."""
    path.unlink()


def rename(path: Path, rng: random.Random) -> None:
    """The file has another name of its kind."""
    path.rename(path.with_name(rng.choice(("model", "a", "x_rank_1-9_9", path.stem + "0")) + path.suffix))


def swap(path: Path, rng: random.Random) -> None:
    """Two files of one kind have each other's place."""
    root = next(folder for folder in path.parents if folder.name == "damaged")
    others = [file for file in sorted(root.rglob(f"*{path.suffix}")) if file != path]
    if others:
        other = rng.choice(others)
        content = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)


def duplicate(path: Path, rng: random.Random) -> None:
    """A copy stands beside the file."""
    shutil.copy(path, path.with_name(f"{path.stem}{rng.choice(('_copy', '-9_99'))}{path.suffix}"))


def edit_values(path: Path, rng: random.Random) -> None:
    """A value of a JSON file, or of the header of a safetensors file, is another; the header keeps its length."""
    content = path.read_bytes()
    head = path.suffix == ".safetensors"
    start = 8 + int.from_bytes(content[:8], "little") if head else len(content)
    fields = json.loads(content[8:start] if head else content)
    holder = rng.choice(walk(fields) or [[None]])
    key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    value = holder[key]
    odd = [None, True, -1, 0, 1, 10**30, "x", "", [], {}, 0.5, float("nan"), [value], "F16", "I32", "BOOL"]
    if isinstance(value, int):
        odd += [value + 1, value - 4, value * 2, -value]
    if isinstance(holder, dict) and rng.random() < 0.3:
        del holder[key]
        if rng.random() < 0.5:
            holder[rng.choice(("", "x", str(key) + "0", "rope_type"))] = value
    else:
        holder[key] = rng.choice(odd)
    text = json.dumps(fields).encode()
    if head:
        text += b" " * max(0, start - 8 - len(text))
        text = len(text).to_bytes(8, "little") + text + content[start:]
    path.write_bytes(text)


def walk(value: object) -> list:
    """Every list and map in a JSON value that holds something."""
    if not isinstance(value, (dict, list)) or not value:
        return []
    return [value, *(found for item in (value.values() if isinstance(value, dict) else value) for found in walk(item))]


WAYS = (flip_bits, flip_bits, flip_bits, flip_head, truncate, zero_block, append, replace, delete, rename, swap,
        duplicate, edit_values, edit_values, edit_values)


def damage(folder: Path, rng: random.Random) -> str:
    """Damages one file in one way; says which."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    while True:
        way, path = rng.choice(WAYS), rng.choice(files)
        if way is edit_values and path.suffix not in (".json", ".safetensors"):
            continue
        way(path, rng)
        return f"{way.__name__} {path.relative_to(folder)}"


def classify(form: Form, right: str, folder: Path, scratch: Path, what: str, also_convert: bool) -> tuple[str, str]:
    """What became of a damaged folder, and the words that came with it."""
    has_digests = form.has_digests and not (form.name == "old_index" and what.endswith("config.json"))
    said = Said()
    package = logging.getLogger("mindformers_ixc.checkpoint")
    package.addHandler(said)
    try:
        found = form.read(folder)
        if form.name != "adapter":
            inspect(folder)
            if also_convert:
                read = form.read(convert(folder, scratch / "converted"))
                found = found if read == found else read
    except REFUSALS as error:
        return ("refused", str(error)) if "\n" not in str(error) else ("traceback", f"several lines: {error}")
    except Exception:
        return "traceback", traceback.format_exc()
    finally:
        package.removeHandler(said)
    if found == right:
        return "right", ""
    named = [line for line in said.lines if "was changed after its weights" in line or "is gone" in line]
    if named:
        return "said", named[0]
    return ("silently wrong" if has_digests else "wrong, no digests"), ""


def run(count: int, seed: int, root: Path, show: bool = False, only: str | None = None) -> dict[str, Counter]:
    """Damages and reads; returns the outcomes by form.

    Args:
        count: of corruptions.
        seed: of their choice.
        root: an empty folder to work in.
        show: print every corruption, not only the defects.
        only: name of a form.
    """
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    with contextlib.redirect_stderr(io.StringIO()):          # progress bars
        forms = [form for form in make_forms(root) if only in (None, form.name)]
        right = {form.name: form.read(form.folder) for form in forms}
    outcomes: dict[str, Counter] = {form.name: Counter() for form in forms}
    for number in range(count):
        rng, form = random.Random(f"{seed} {number}"), forms[number % len(forms)]
        scratch = root / "scratch"
        folder = Path(shutil.copytree(form.folder, scratch / "damaged"))
        what = damage(folder, rng)
        with contextlib.redirect_stderr(io.StringIO()):
            outcome, words = classify(form, right[form.name], folder, scratch, what, rng.randrange(CONVERT_EVERY) == 0)
        outcomes[form.name][outcome] += 1
        if show or outcome in ("traceback", "silently wrong"):
            print(f"{number} {form.name}: {what}: {outcome} {words}", flush=True)
        shutil.rmtree(scratch)
    return outcomes


def main() -> None:
    """Runs and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=1000, help="corruptions")
    parser.add_argument("--seed", type=int, default=0, help="of their choice")
    parser.add_argument("--form", help="of this form only")
    parser.add_argument("--show", action="store_true", help="print every corruption and what came of it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        outcomes = run(arguments.count, arguments.seed, Path(root), arguments.show, arguments.form)
    columns = ("right", "refused", "said", "wrong, no digests", "silently wrong", "traceback")
    print(f"{'form':<12}" + "".join(f"{name:>19}" for name in columns))
    total: Counter = sum(outcomes.values(), Counter())
    for name, counts in [*outcomes.items(), ("all", total)]:
        print(f"{name:<12}" + "".join(f"{counts[column]:>19}" for column in columns))
    sys.exit(1 if total["silently wrong"] + total["traceback"] else 0)


if __name__ == "__main__":
    main()
