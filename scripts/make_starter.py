"""Train the starter, the small model that ships with the package and that runs on little data begin with.

For developers: the result is committed, so users never run this. It is the model of the tiny recipes, trained on the
demo's questions and on pictures drawn here: shapes, their numbers and places, stripes, letters. It took 13 minutes of
one core. The seed decides pictures and training; other versions of the libraries may give other bytes.

    OMP_NUM_THREADS=1 python scripts/make_starter.py WORK_FOLDER                 # rewrite the committed files
    OMP_NUM_THREADS=1 python scripts/make_starter.py WORK_FOLDER --out FOLDER    # write them elsewhere
"""
from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_OUT = ROOT / "mindformers_ixc" / "starter"
SEED = 42

COLOURS = {"red": (210, 35, 35), "green": (35, 150, 60), "blue": (40, 75, 205), "yellow": (245, 215, 40),
           "orange": (240, 140, 30), "purple": (130, 50, 160), "pink": (240, 130, 180), "brown": (120, 75, 40),
           "black": (25, 25, 25), "white": (250, 250, 250), "grey": (140, 140, 140), "teal": (20, 150, 150)}
BACKGROUNDS = ((255, 255, 255), (235, 235, 235), (225, 240, 250), (250, 240, 215), (225, 245, 225), (60, 60, 70))
DARK = BACKGROUNDS[-1]
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart", "arrow", "moon")
NUMBERS = ("one", "two", "three", "four", "five")
PLACES = {(0, 0): "at the top left", (1, 0): "at the top", (2, 0): "at the top right", (0, 1): "on the left",
          (1, 1): "in the middle", (2, 1): "on the right", (0, 2): "at the bottom left", (1, 2): "at the bottom",
          (2, 2): "at the bottom right"}
SIZES = ((160, 160), (160, 160), (200, 150), (150, 200), (240, 120))
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ0123456789"

# Pictures of each kind, and how many questions about each are in its conversation.
PICTURES, QUESTIONS = 480, 2

# Of four samples one is of the demo.
STEPS, BATCH_SIZE, SAMPLES_PER_EPOCH, WEIGHTS = 1500, 8, 2400, [1, 3]

Pairs = list[tuple[str, str]]


def points(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corners of a shape that is drawn as a polygon."""
    if shape == "star":
        return [(x + r * (1 if i % 2 == 0 else 0.42) * math.sin(i * math.pi / 5),
                 y - r * (1 if i % 2 == 0 else 0.42) * math.cos(i * math.pi / 5)) for i in range(10)]
    outlines = {
        "triangle": [(0, -1), (0.95, 0.8), (-0.95, 0.8)],
        "diamond": [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)],
        "cross": [(-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33), (0.33, 1), (-0.33, 1),
                  (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33)],
        "arrow": [(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)],
        "heart": [(0, 0.95), (-0.95, -0.05), (-0.95, -0.5), (-0.65, -0.85), (-0.3, -0.85), (0, -0.5), (0.3, -0.85),
                  (0.65, -0.85), (0.95, -0.5), (0.95, -0.05)],
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    }
    return [(x + r * a, y + r * b) for a, b in outlines[shape]]


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, place: tuple[float, float, float], colour: str,
               background: tuple[int, int, int]) -> None:
    """Draws one shape; `place` is the middle and half the side."""
    x, y, r = place
    box = (x - r, y - r, x + r, y + r)
    if shape in ("circle", "moon"):
        draw.ellipse(box, COLOURS[colour])
    elif shape == "ring":
        draw.ellipse(box, outline=COLOURS[colour], width=max(3, int(r / 3)))
    else:
        draw.polygon(points(shape, x, y, r), COLOURS[colour])
    if shape == "moon":
        draw.ellipse((x - r * 0.3, y - r, x + r * 1.5, y + r * 0.8), background)


def canvas(rng: random.Random) -> tuple[Image.Image, ImageDraw.ImageDraw, tuple[int, int, int], list[str]]:
    """An empty picture, what draws in it, its background, and colours that are seen on it."""
    background = rng.choice(BACKGROUNDS)
    image = Image.new("RGB", rng.choice(SIZES), background)
    hidden = ("black", "brown") if background == DARK else ("white",)
    return image, ImageDraw.Draw(image), background, [name for name in COLOURS if name not in hidden]


def one_shape(rng: random.Random) -> tuple[Image.Image, Pairs]:
    """A shape somewhere in the picture."""
    image, draw, background, colours = canvas(rng)
    shape, colour, (column, row) = rng.choice(SHAPES), rng.choice(colours), rng.choice(list(PLACES))
    radius = min(image.size) * rng.uniform(0.12, 0.17)
    where = [side * (2 * cell + 1) / 6 + rng.uniform(-0.02, 0.02) * side
             for side, cell in zip(image.size, (column, row))]
    draw_shape(draw, shape, (where[0], where[1], radius), colour, background)
    return image, [("What is shown in the picture?", f"a {colour} {shape}"), ("Which shape is it?", shape),
                   ("Which colour is it?", colour), ("Where is it?", PLACES[column, row])]


def big_shape(rng: random.Random) -> tuple[Image.Image, Pairs]:
    """A shape that fills the picture."""
    image, draw, background, colours = canvas(rng)
    shape, colour = rng.choice(SHAPES), rng.choice(colours)
    radius = min(image.size) * rng.uniform(0.28, 0.45)
    draw_shape(draw, shape, (image.width / 2, image.height / 2, radius), colour, background)
    return image, [("What is shown in the picture?", f"a {colour} {shape}"), ("Which shape is it?", shape),
                   ("Which colour stands out most?", colour)]


def several(rng: random.Random) -> tuple[Image.Image, Pairs]:
    """One to five equal shapes."""
    image, draw, background, colours = canvas(rng)
    shape, colour, count = rng.choice(SHAPES), rng.choice(colours), rng.randrange(len(NUMBERS))
    plural = {"cross": "crosses"}.get(shape, f"{shape}s") if count else shape
    for column, row in rng.sample(list(PLACES), count + 1):
        draw_shape(draw, shape, (image.width * (2 * column + 1) / 6, image.height * (2 * row + 1) / 6,
                                 min(image.size) * 0.13), colour, background)
    return image, [("How many shapes are there?", NUMBERS[count]), ("Which colour are they?", colour),
                   ("What is shown in the picture?", f"{NUMBERS[count]} {colour} {plural}" if count
                    else f"a {colour} {shape}")]


def two_shapes(rng: random.Random) -> tuple[Image.Image, Pairs]:
    """Two shapes, one beside or above the other."""
    image, draw, background, colours = canvas(rng)
    shapes, chosen, upright = rng.sample(SHAPES, 2), rng.sample(colours, 2), rng.random() < 0.5
    for i, (shape, colour) in enumerate(zip(shapes, chosen)):
        share = (2 * i + 1) / 4
        x, y = (image.width / 2, image.height * share) if upright else (image.width * share, image.height / 2)
        draw_shape(draw, shape, (x, y, min(image.size) * 0.2), colour, background)
    names = [f"a {colour} {shape}" for shape, colour in zip(shapes, chosen)]
    sides = ("at the top", "at the bottom") if upright else ("on the left", "on the right")
    return image, [("What is shown in the picture?", " and ".join(names)),
                   *((f"What is {side}?", name) for side, name in zip(sides, names))]


def stripes(rng: random.Random) -> tuple[Image.Image, Pairs]:
    """Two or three stripes, upright or lying."""
    image = Image.new("RGB", rng.choice(SIZES))
    draw, chosen, upright = ImageDraw.Draw(image), rng.sample(list(COLOURS), rng.choice((2, 3))), rng.random() < 0.5
    for i, colour in enumerate(chosen):
        start, end = ((image.width if upright else image.height) * j / len(chosen) for j in (i, i + 1))
        draw.rectangle((start, 0, end, image.height) if upright else (0, start, image.width, end), COLOURS[colour])
    named = f"{', '.join(chosen[:-1])} and {chosen[-1]}"
    first, last = ("on the left", "on the right") if upright else ("at the top", "at the bottom")
    return image, [("Which colours are the stripes?", named), (f"Which colour is {first}?", chosen[0]),
                   (f"Which colour is {last}?", chosen[-1]), ("How many stripes are there?", NUMBERS[len(chosen) - 1])]


def letter(rng: random.Random) -> tuple[Image.Image, Pairs]:
    """A large letter or digit."""
    image, draw, _, colours = canvas(rng)
    text, colour = rng.choice(LETTERS), rng.choice(colours)
    font = ImageFont.load_default(size=min(image.size) * rng.uniform(0.5, 0.85))
    draw.text((image.width / 2, image.height / 2), text, COLOURS[colour], font=font, anchor="mm")
    kind = "digit" if text.isdigit() else "letter"
    return image, [(f"Which {kind} is it?", text), ("What does it say?", text), ("Which colour is it?", colour),
                   ("What is shown in the picture?", f"the {kind} {text}")]


def write_drawings(folder: Path) -> None:
    """Draws the pictures and writes their conversations, `folder/drawn.json`."""
    rng, samples = random.Random(SEED), []
    for make in (one_shape, big_shape, several, two_shapes, stripes, letter):
        for i in range(PICTURES):
            image, pairs = make(rng)
            name = f"{make.__name__}_{i:03d}.png"
            image.save(folder / name)
            turns = [{"from": role, "value": text} for pair in rng.sample(pairs, QUESTIONS)
                     for role, text in zip(("human", "bot"), pair)]
            samples.append({"id": name, "image": name, "conversations": turns})
    (folder / "drawn.json").write_text(json.dumps(samples, indent=1), encoding="utf-8")


def train(work: Path) -> Path:
    """Runs the training; returns the model directory."""
    demo = ROOT / "mindformers_ixc" / "demo" / "train.json"
    section = {"dataset_dir": [str(demo), str(work / "drawn.json")],
               "mixture": {"weights": WEIGHTS, "samples_per_epoch": SAMPLES_PER_EPOCH}}
    overrides = {"train_dataset.data_loader.dataset_dir": section["dataset_dir"],
                 "train_dataset.data_loader.mixture": section["mixture"], "seed": SEED,
                 "runner_config.epochs": STEPS * BATCH_SIZE // SAMPLES_PER_EPOCH,
                 "runner_config.batch_size": BATCH_SIZE, "train_dataset.batch_size": BATCH_SIZE,
                 "train_dataset.seq_length": 168, "model.model_config.seq_length": 168,
                 "lr_schedule.warmup_ratio": 0.04}
    words = [word for name, value in overrides.items() for word in (f"--{name}", json.dumps(value))]
    run("run", "--config", str(ROOT / "yaml_configs" / "ixc25_sft_tiny.yaml"), "--output_dir", str(work / "out"),
        *words)
    return work / "out" / "model"


def run(*words: str) -> None:
    """Runs a command of this package."""
    subprocess.run([sys.executable, str(ROOT / "mindformers_ixc_cli.py"), *words], check=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Train the starter model.")
    parser.add_argument("work", type=Path, help="folder for the drawn pictures and the run; must not exist")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="model directory to be written")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True)
    write_drawings(arguments.work)
    model = train(arguments.work)
    # half the size on disk; float16 keeps 11 bits, bfloat16 8
    run("convert", str(model), str(arguments.work / "half"), "--to", "hf", "--dtype", "float16")
    shutil.rmtree(arguments.out, ignore_errors=True)
    shutil.copytree(arguments.work / "half", arguments.out)


if __name__ == "__main__":
    main()
