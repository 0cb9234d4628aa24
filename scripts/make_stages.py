"""Build the data of the four tiny training stages in ``mindformers_ixc/demo/stages``.

For developers: the results are committed, so users never run this. Charts are drawn with Pillow; pages are rendered by
headless Chromium (Debian's package ``chromium``), whose version decides about single pixels of the screenshots.

    python scripts/make_stages.py                 # rewrite the committed files
    python scripts/make_stages.py --out FOLDER    # write them elsewhere
"""
from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "mindformers_ixc" / "demo" / "stages"

COLOURS = {"red": (210, 30, 30), "green": (30, 150, 50), "blue": (40, 70, 210), "orange": (245, 150, 20),
           "purple": (130, 40, 160), "black": (20, 20, 20)}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
SIDE = 112          # one tile of the tiny recipes, in pixels

# Every colour and number in both sets, each with heights and widths of its own.
TRAINING_CHARTS, HELD_OUT_CHARTS = 240, 48

PAGES = {
    "bakery": ("a bakery", "#ffcc80", "#bf360c", "Corner Bakery", "Fresh bread every day.", "Order"),
    "library": ("a library", "#90caf9", "#0d47a1", "City Library", "Read, borrow, return.", "Search"),
    "garden": ("a garden club", "#a5d6a7", "#1b5e20", "Garden Club", "Meet us on Sunday.", "Join"),
    "cinema": ("a cinema", "#212121", "#ffca28", "Old Cinema", "Two films tonight.", "Tickets"),
    "clinic": ("a dentist", "#ffffff", "#00695c", "Bright Smiles", "Open until six.", "Call"),
    "school": ("a music school", "#ce93d8", "#4a148c", "Music School", "Learn the piano.", "Try"),
    "train": ("a train museum", "#c62828", "#eceff1", "Train Museum", "Steam and steel.", "Visit"),
    "swim": ("a swimming pool", "#80deea", "#01579b", "Blue Pool", "Warm all winter.", "Prices"),
}

# What the small language model reads before stage 1: pages of random words and colours. The words of the pages of stage
# 4 are among them, as they are in a large model's reading; those pages are not.
PLACES = ("tea shop", "chess club", "farm", "hotel", "bike shop", "zoo", "theatre", "village", "print shop",
          "ski school", "harbour", "gallery")
WORDS = ("tea", "cheese", "warm", "golden", "quiet", "open", "new", "paper", "snow", "river", "early", "table")
BUTTONS = ("Book", "Call us", "Buy", "Read more", "Find us", "Map")
CODE_PAGES = 96


def draw_chart(colour: str, count: int, rng: random.Random) -> Image.Image:
    """A chart of bars of one colour on white, with an axis."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(image)
    slot = (SIDE - 16) / count
    width = min(22, slot * rng.uniform(0.5, 0.75))
    for i in range(count):
        left = 10 + slot * i + (slot - width) * rng.uniform(0.2, 0.8)
        draw.rectangle((left, SIDE - 10 - rng.randint(28, 88), left + width, SIDE - 10), COLOURS[colour])
    draw.line((6, SIDE - 10, SIDE - 4, SIDE - 10), (90, 90, 90), 1)
    return image


def sample(name: str, question: str, answer: str, image: str | None = None) -> dict:
    """One conversation in the public format."""
    row = {"id": name, "conversations": [{"from": "human", "value": question}, {"from": "bot", "value": answer}]}
    return {**row, "image": image} if image else row


def questions(colour: str, count: int) -> list[tuple[str, str, str]]:
    """Question, right answer and a wrong one."""
    others = [name for name in COLOURS if name != colour], [name for name in NUMBERS if name != count]
    return [("Which colour are the bars?", colour, others[0][count % len(others[0])]),
            ("How many bars are there?", NUMBERS[count], NUMBERS[others[1][len(colour) % len(others[1])]])]


def write_charts(out: Path, name: str, count: int, rng: random.Random) -> list[tuple[str, str, int]]:
    """Draws charts; every combination of colour and number comes as often as any other."""
    (out / "charts").mkdir(parents=True, exist_ok=True)
    combinations = [(colour, number) for colour in COLOURS for number in NUMBERS]
    rows = []
    for i in range(count):
        colour, number = combinations[i % len(combinations)]
        path = f"charts/{name}_{i:03d}.png"
        draw_chart(colour, number, rng).quantize(16).save(out / path, optimize=True)
        rows.append((path, colour, number))
    return rows


def write_json(path: Path, rows: list) -> None:
    """One sample a line."""
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


def caption(colour: str, count: int) -> str:
    """What stage 1 learns to say."""
    return f"a chart with {NUMBERS[count]} {colour} {'bar' if count == 1 else 'bars'}"


def scored_pairs(name: str, charts: list[tuple[str, str, int]]) -> Iterator[dict]:
    """What the reward model learns: right answers before wrong ones, which only the chart tells apart."""
    for i, (path, colour, number) in enumerate(charts):
        rounds = i // (len(COLOURS) * len(NUMBERS))
        for j, (question, answer, others) in enumerate((
                ("Which colour are the bars?", colour, [one for one in COLOURS if one != colour]),
                ("How many bars are there?", NUMBERS[number], [one for one in NUMBERS.values()
                                                               if one != NUMBERS[number]]))):
            sides = [[{"from": "human", "value": question}, {"from": "bot", "value": text}]
                     for text in (answer, others[(i + rounds) % len(others)])]
            yield {"id": f"{name}-{i}-{j}", "conversations_a": sides[0], "conversations_b": sides[1], "image": path}


def make_charts(out: Path) -> None:
    """Charts, captions, questions, preference pairs, and the same language without pictures."""
    rng = random.Random(0)
    for name, count in (("train", TRAINING_CHARTS), ("held_out", HELD_OUT_CHARTS)):
        charts = write_charts(out, name, count, rng)
        write_json(out / f"captions_{name}.json",
                   [{"id": f"{name}-{i}", "image": path, "caption": caption(c, n)} for i, (path, c, n) in
                    enumerate(charts)])
        write_json(out / f"vqa_{name}.json",
                   [sample(f"{name}-{i}-{j}", question, answer, path) for i, (path, c, n) in enumerate(charts)
                    for j, (question, answer, _) in enumerate(questions(c, n))])
        write_json(out / f"reward_{name}.json", list(scored_pairs(name, charts)))
        if name == "train":
            write_json(out / "preferences.json",
                       [{"id": f"pair-{i}-{j}", "image": path, "prompt": question, "chosen": f"{answer}, I think",
                         "rejected": f"I do not know, perhaps {wrong}"}
                        for i, (path, c, n) in enumerate(charts[:48])
                        for j, (question, answer, wrong) in enumerate(questions(c, n))])
    texts = [(f"text-{c}-{n}", c, n) for c in COLOURS for n in NUMBERS]
    rows = [{"id": name, "caption": caption(c, n)} for name, c, n in texts] * 2
    rows += [sample(f"{name}-{j}", question, answer) for name, c, n in texts
             for j, (question, answer, _) in enumerate(questions(c, n))]
    write_json(out / "language.json", rows)


def page(background: str, colour: str, title: str, text: str, button: str) -> str:
    """A small page."""
    return (f'<html><body style="background:{background};color:{colour}"><h1>{title}</h1><p>{text}</p>'
            f"<button>{button}</button></body></html>")


def make_code(out: Path) -> None:
    """Pages as text, for the small language model."""
    rng, rows = random.Random(1), []
    own = [re.findall(r"\w+", f"{title} {text} {button}") for _, _, _, title, text, button in PAGES.values()]
    words = [*WORDS, *(word for page_words in own for word in page_words)]
    buttons = [*BUTTONS, *(button for *_, button in PAGES.values())]
    for i in range(CODE_PAGES):
        place, colours = PLACES[i % len(PLACES)], [f"#{rng.randrange(1 << 24):06x}" for _ in range(2)]
        title = " ".join(word.title() for word in rng.sample(words, 2))
        text = " ".join(rng.sample(words, rng.randint(2, 4))) + "."
        code = page(*colours, title, text[0].upper() + text[1:], rng.choice(buttons))
        rows.append(sample(f"code-{i}", f"Write a web page for a {place}.", code))
    write_json(out / "code.json", rows)


def make_pages(out: Path) -> None:
    """Pages, their screenshots, and instructions for them."""
    (out / "pages").mkdir(parents=True, exist_ok=True)
    rows = []
    for name, (what, *rest) in PAGES.items():
        code = page(*rest)
        with tempfile.TemporaryDirectory() as folder:
            source, shot = Path(folder) / "page.html", Path(folder) / "page.png"
            source.write_text(code, encoding="utf-8")
            browser = shutil.which("chromium") or "chromium-browser"
            subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                            "--window-size=336,224", f"--screenshot={shot}", source.as_uri()],
                           check=True, capture_output=True)
            with Image.open(shot) as image:
                picture = image.convert("RGB").crop((0, 0, 336, 224)).quantize(64)
                picture.save(out / "pages" / f"{name}.png", optimize=True)
        rows.append(sample(f"screenshot-{name}", "Write the HTML of this page.", code, f"pages/{name}.png"))
        rows.append(sample(f"instruction-{name}", f"Write a web page for {what}.", code))
    write_json(out / "web.json", rows)


def main() -> None:
    """Writes everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    make_charts(out)
    make_code(out)
    make_pages(out)


if __name__ == "__main__":
    main()
