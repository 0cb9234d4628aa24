"""Prompts, scores and result files of `mindformers eval --benchmark` beside VLMEvalKit's own, on small tables.

    python3 -m venv vlmeval && vlmeval/bin/pip install ms-vlmeval rapidfuzz openpyxl
    PYTHONPATH=. vlmeval/bin/python scripts/vlmeval_check.py

It needs neither MindSpore nor weights: a stand-in answers. For every kind of data set it compares

- what the adapter of VLMEvalKit for this model asks (text, new tokens, beams, tiles) with what is asked here;
- the score that VLMEvalKit computes from the result file that was written here with the one computed here;

how random texts are understood, and how pictures of many sizes are cut; then it lets `run.py --mode eval` go on from a
result file. VLMEvalKit is told that the small tables are its data sets'.
The installation takes some 60 packages and minutes, so this is run by hand.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import os
import random
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from benchmark_tables import SAID, TABLES, write_table

from mindformers_ixc.benchmarking import matching, scoring
from mindformers_ixc.benchmarking.catalogue import BENCHMARKS, NUM_BEAMS, tiles_of
from mindformers_ixc.benchmarking.prompts import final_answer, make_prompt
from mindformers_ixc.benchmarking.scoring import can_score, score
from mindformers_ixc.benchmarking.table_file import BenchmarkTable
from mindformers_ixc.benchmarking.workbook import write_results
from mindformers_ixc.processing.image import plan_partition

MODEL, RUN = "stand_in", "T00000000-000000"

# The variable by which VLMEvalKit finds its tables.
DATA = "LMUData"

# What random texts are made of.
WORDS = """
yes no No Yes. a The cat dog's couldnt couldn'tve A B (A) B. Z three None 1,000 3.5 x-ray what? ! don't somebody'd lets
shes ow's'at yall'll C 12% 0.5 ... a.b 1. N/A Failed
"""
PHRASES = ("\n", "\t", "Sorry, I can't help with images of people yet.", "Failed to obtain answer via API")

# Data sets whose published prompt stops VLMEvalKit's adapter.
NO_PROMPT = ("MMVet", "LLaVABench")


def kit_data_set(name: str, path: Path):
    """VLMEvalKit's data set over a small table."""
    from vlmeval.dataset import DATASET_CLASSES, build_dataset
    from vlmeval.smp import md5

    for one in DATASET_CLASSES:
        if name in getattr(one, "DATASET_MD5", {}):
            one.DATASET_MD5[name] = md5(str(path))
    return build_dataset(name)


@contextlib.contextmanager
def adapter():
    """VLMEvalKit's adapter for this model, which notes what it would ask; and its notes."""
    from vlmeval.vlm.xcomposer import xcomposer2d5

    asked: list[dict] = []
    real, cut = xcomposer2d5.model_gen, xcomposer2d5.HD_transform

    def transform(image, im_num, id_scale):
        asked[-1]["tiles"].append(im_num)
        return image

    def note(model, text, images, need_bos=True, padding=False, beams=3, max_token=2048, video_input=False):
        asked.append({"text": text, "beams": beams, "tokens": max_token, "tiles": []})
        with contextlib.suppress(_Enough):
            real(model, text, images, need_bos, padding, beams, max_token, video_input)
        return "A"

    xcomposer2d5.model_gen, xcomposer2d5.HD_transform = note, transform
    model = object.__new__(xcomposer2d5.XComposer2d5)
    model.org_hd_num, model.beam = 36, 3
    model.model = SimpleNamespace(hd_num=36, id_scale=1.5, device="cpu", encode_text=_nothing,
                                  vis_processor=lambda image: SimpleNamespace(unsqueeze=lambda _: _Tensor()),
                                  encode_img=lambda image: _nothing())
    model.model.generate = _enough
    try:
        yield model, asked
    finally:
        xcomposer2d5.model_gen, xcomposer2d5.HD_transform = real, cut


class _Enough(Exception):
    """The prompt is known; there is no model to answer it."""


class _Tensor:
    def to(self, device):
        return self


def _nothing(*_, **__):
    import torch

    return torch.zeros((1, 0, 4))


def _enough(**_):
    raise _Enough


def ask(model, name: str, data_set, number: int) -> None:
    """Has the adapter ask one question."""
    line = data_set.data.iloc[number]
    message = model.build_prompt(line, dataset=name) if model.use_custom_prompt(name) else data_set.build_prompt(line)
    model.generate_inner(message, dataset=name)


def adapter_stops(name: str, data_set) -> bool:
    """Whether the adapter's own prompt fails its own check."""
    with adapter() as (model, _):
        model.set_dump_image(data_set.dump_image)
        try:
            ask(model, name, data_set, 0)
        except AssertionError:
            return True
    return False


def compare_prompts(name: str, source: BenchmarkTable, data_set) -> int:
    """Differences between what is asked there and here."""
    benchmark, there = BENCHMARKS[name], []
    with adapter() as (model, asked):
        model.set_dump_image(data_set.dump_image)
        for number in range(len(data_set.data)):
            ask(model, name, data_set, number)
            there.append(asked.pop())
    different = 0
    for row, asks in zip(source.rows, there):
        prompt = make_prompt(benchmark, row.cells, row.count)
        here = {"text": "".join("<IM_POS>" if piece.kind == "picture" else piece.text for piece in prompt.pieces()),
                "beams": NUM_BEAMS, "tokens": benchmark.max_new_tokens, "tiles": [tiles_of(row.count)] * row.count}
        if asks != here:
            different += 1
            print(f"{name}, row {row.index}: there {asks}\n{' ' * len(name)}  here {here}")
    return different


def kit_score(name: str, data_set, target: Path) -> float:
    """VLMEvalKit's own score of a result file, as this package's line that the paper has."""
    found = data_set.evaluate(str(target), model="exact_matching")
    if isinstance(found, dict):
        return float(found["Final Score Norm"])
    if name == "HallusionBench":
        return float(found.loc[0, ["aAcc", "fAcc", "qAcc"]].mean())
    if name == "MME":
        return float(found["perception"][0] + found["reasoning"][0])
    split = BENCHMARKS[name].main
    if name == "MMMU_DEV_VAL":
        return 100 * float(found.loc[found["split"] == split, "Overall"].iloc[0])
    scale = 100 if data_set.TYPE == "MCQ" else 1
    return scale * float(found["Overall"].iloc[0])


def check(name: str, folder: Path) -> bool:
    """Compares one data set; whether all was equal."""
    path = write_table(os.environ[DATA], name)
    source, benchmark = BenchmarkTable(path, BENCHMARKS[name]), BENCHMARKS[name]
    data_set = kit_data_set(name, path)
    same_rows = [row.index for row in source.rows] == [str(index) for index in data_set.data["index"]]
    if name in NO_PROMPT:
        prompts = "its adapter stops" if adapter_stops(name, data_set) else "its adapter asks"
    else:
        prompts = compare_prompts(name, source, data_set)
    answers = [final_answer(benchmark, said) for said in SAID[name]]
    target = folder / MODEL / RUN / f"{MODEL}_{name}.xlsx"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_results(target, source.columns, source.rows, answers)
    if not can_score(benchmark, source.rows):
        print(f"{name:16} rows {len(source.rows)}, prompts that differ: {prompts}, scored by a judge")
        return same_rows and prompts in (0, "its adapter stops")
    here = score(benchmark, source.rows, answers)[benchmark.main]
    scored = folder / "scored" / f"{MODEL}_{name}.xlsx"         # VLMEvalKit writes beside what it scores
    scored.parent.mkdir(exist_ok=True)
    scored.write_bytes(target.read_bytes())
    with contextlib.redirect_stdout(io.StringIO()):
        there = kit_score(name, data_set, scored)
    print(f"{name:16} rows {len(source.rows)}, prompts that differ: {prompts}, score there {there:.6f}, here "
          f"{here:.6f}")
    return same_rows and prompts == 0 and math.isclose(there, here, rel_tol=1e-9, abs_tol=1e-9)


def check_matching(count: int = 20000) -> bool:
    """Whether texts are understood alike: options, yes and no, VQA's rule, ANLS, relaxed accuracy."""
    from vlmeval.dataset.utils.vqa_eval import hit_calculate, process_answer, process_line
    from vlmeval.dataset.utils.yorn import YOrN_Extraction
    from vlmeval.utils.matching_util import can_infer

    dice, different, words = random.Random(1), 0, [*WORDS.split(), *PHRASES]
    methods = (("vqa_score", matching.vqa_accuracy, "TextVQA"),
               ("relaxed_accuracy", matching.relaxed_correct, "ChartQA"),
               ("accuracy", matching.same_text, "OCRVQA"), ("anls", scoring.anls, "DocVQA"))
    for _ in range(count):
        text = " ".join(dice.choice(words) for _ in range(dice.randint(0, 7)))
        text = text.replace(" ", "", dice.randint(0, 1))
        options = {letter: dice.choice(words) for letter in "ABCD"[:dice.randint(2, 4)]}
        people = [dice.choice(words) for _ in range(10)]
        said = dice.choice((text, dice.choice(people)))
        line = {"answer": str(people), "prediction": said}
        pairs = [(process_answer(text), matching.vqa_text(text)), (YOrN_Extraction(text), matching.yes_or_no(text)),
                 (can_infer(text, dict(options)) or "", matching.chosen(text, options))]
        pairs += [(round(float(hit_calculate([process_line(line, name)], data)[0]), 9), round(here(said, people), 9))
                  for name, here, data in methods]
        different += any(there != here for there, here in pairs)
    print(f"random texts that are understood otherwise: {different} of {count}")
    return different == 0


def check_tiles() -> bool:
    """Whether pictures of many sizes are cut alike: VLMEvalKit's transform, and the transform of training here."""
    from PIL import Image
    from vlmeval.vlm.xcomposer.xcomposer2d5 import HD_transform

    different = 0
    sizes = [(width, height) for width in (1, 13, 280, 560, 700, 1999) for height in (1, 44, 561, 900, 2500)]
    for width, height in sizes:
        for limit in (4, 9, 36):
            ratio = max(width, height) / min(width, height)
            if ratio > 500:
                continue        # nothing would be left of it; refused here
            there = HD_transform(Image.new("RGB", (width, height)), im_num=limit, id_scale=1.5).size
            different += there != plan_partition(width, height, limit, 560, True).padded
    print(f"pictures of {len(sizes)} sizes that are cut otherwise: {different}")
    return different == 0


def go_on(folder: Path, name: str) -> bool:
    """Lets VLMEvalKit's run.py score a result file where it lies."""
    import vlmeval.run as run

    kit_data_set(name, Path(os.environ[DATA]) / f"{name}.tsv")
    words = ["run.py", "--mode", "eval", "--work-dir", str(folder), "--model", MODEL, "--data", name, "--judge",
             "exact_matching"]
    before, sys.argv = sys.argv, words
    try:
        run.main()
    finally:
        sys.argv = before
    scores = folder / MODEL / f"{MODEL}_{name}_acc.csv"
    print(f"run.py --mode eval on {name}: {json.dumps(scores.read_text()) if scores.exists() else 'no scores'}")
    return scores.exists()


def main() -> int:
    """Prints a line a data set; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="data sets (default: one of each kind)")
    names = parser.parse_args().names or list(TABLES)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as place:
        os.environ[DATA] = os.path.join(place, "data")
        os.makedirs(os.environ[DATA])
        folder = Path(place) / "out"
        good = [check(name, folder) for name in names]
        good += [check_matching(), check_tiles()]
        good.append(go_on(folder, names[0]))
    print("all equal" if all(good) else "something differs")
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
