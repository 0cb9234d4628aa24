"""Build the demo data of ``mindformers_ixc/demo``: pictures, conversations and a small tokenizer.

For developers: the results are committed, so users never run this. Photographs come from the files inside
the installed scikit-image wheel (nothing is downloaded), documents are drawn with Pillow, and the
SentencePiece model is trained on the conversations plus generated plain sentences. The same Pillow and
sentencepiece versions give the same bytes on every run.

    python scripts/make_demo.py                # rewrite the committed files
    python scripts/make_demo.py --out FOLDER   # write them elsewhere, for example to compare
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
from pathlib import Path

import sentencepiece
import skimage
from PIL import Image, ImageDraw, ImageFont
from sentencepiece import sentencepiece_model_pb2

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "mindformers_ixc" / "demo"

# Keeps the whole folder well under a megabyte of package, with text in the documents still readable.
LONG_SIDE = 448
JPEG_QUALITY = 85

# Enough pieces for whole-word answers, few enough that a CPU trains the output head in minutes.
VOCAB_SIZE = 1024
# The public tokenizer.model ends with [UNUSED_TOKEN_0] .. [UNUSED_TOKEN_146]; 145 and 146 delimit chat turns.
UNUSED_TOKENS = [f"[UNUSED_TOKEN_{k}]" for k in range(147)]

# name -> (file in the scikit-image wheel, crop box in its pixels or None); crops vary the aspect ratios.
PHOTOGRAPHS = {
    "astronaut.jpg": ("astronaut.png", (30, 0, 400, 512)),
    "cat.jpg": ("chelsea.png", None),
    "coffee.jpg": ("coffee.png", None),
    "rocket.jpg": ("rocket.jpg", (178, 0, 462, 427)),
    "cameraman.jpg": ("camera.png", None),
    "coins.jpg": ("coins.png", None),
    "galaxies.jpg": ("hubble_deep_field.jpg", (0, 0, 1000, 500)),
    "retina.jpg": ("retina.jpg", None),
}

# Each asked of every picture, with a different answer for (nearly) each, so the picture has to be used.
COMMON_QUESTIONS = (
    "What is shown in the picture?",
    "What would be a good title?",
    "Where would you see this?",
    "Which colour stands out most?",
)
COMMON_ANSWERS = {
    "astronaut.jpg": ("a smiling astronaut", "Ready for Space", "at NASA", "orange"),
    "cat.jpg": ("the face of a cat", "Green Eyes", "at home", "ginger"),
    "coffee.jpg": ("a cup of coffee", "Fresh Espresso", "in a cafe", "red"),
    "rocket.jpg": ("a tall rocket", "Before the Launch", "on a launch pad", "blue"),
    "cameraman.jpg": ("a man using a camera", "The Cameraman", "on a field of grass", "grey"),
    "coins.jpg": ("rows of old coins", "Ancient Money", "in a museum", "grey"),
    "galaxies.jpg": ("many distant galaxies", "The Deep Sky", "through a space telescope", "black"),
    "retina.jpg": ("the back of an eye", "Inside the Eye", "in an eye clinic", "red"),
    "bar_chart.png": ("a bar chart", "Four Kinds of Fruit", "in a sales report", "green"),
    "line_chart.png": ("a line chart", "From Wet to Dry", "in a weather report", "purple"),
    "receipt.png": ("a receipt", "Lunch for Two", "at a restaurant", "yellow"),
    "timetable.png": ("a train timetable", "The Morning Trains", "at a station", "teal"),
}

DOCUMENT_QUESTIONS = ("What does the heading say?", "Which entry comes first?")
DOCUMENT_ANSWERS = {
    "bar_chart.png": ("Fruit sold in May", "apples"),
    "line_chart.png": ("Rain per month", "January"),
    "receipt.png": ("Luna Cafe", "soup"),
    "timetable.png": ("Trains from Bern", "Basel"),
}


# ---------------------------------------------------------------------------------------------- conversations
def _sample(name: str, turns: list[tuple[str, str]], images: list[str]) -> dict:
    """One conversation in the public fine-tuning format; ``turns`` are (question, answer) pairs."""
    conversations = []
    for question, answer in turns:
        conversations.append({"from": "human", "value": question})
        conversations.append({"from": "bot", "value": answer})
    sample: dict = {"id": name, "conversations": conversations}
    if images:
        paths = [f"images/{image}" for image in images]
        sample["image"] = paths[0] if len(paths) == 1 else paths
    return sample


def train_samples() -> list[dict]:
    """Single-turn samples, one question about one picture each (the set exact match is measured on)."""
    samples = []
    for questions, table in ((COMMON_QUESTIONS, COMMON_ANSWERS), (DOCUMENT_QUESTIONS, DOCUMENT_ANSWERS)):
        for image, answers in table.items():
            for question, answer in zip(questions, answers):
                name = f"{Path(image).stem}-{len(samples):02d}"
                samples.append(_sample(name, [(question, answer)], [image]))
    return samples


def multi_samples() -> list[dict]:
    """Several turns, two pictures in one conversation, and conversations without a picture."""

    def common(image: str, *picks: int) -> list[tuple[str, str]]:
        return [(COMMON_QUESTIONS[k], COMMON_ANSWERS[image][k]) for k in picks]

    receipt = [
        *common("receipt.png", 0),
        ("What is the total?", "18.50"),
        ("How much is the salad?", "5.50"),
    ]
    pair = [
        ("Image1 <ImageHere>; Image2 <ImageHere>; Which picture shows an animal?", "Image1"),
        ("What does the other picture show?", COMMON_ANSWERS["coffee.jpg"][0]),
    ]
    return [
        _sample("multi-cat", common("cat.jpg", 0, 3), ["cat.jpg"]),
        _sample("multi-rocket", common("rocket.jpg", 2, 0, 3), ["rocket.jpg"]),
        _sample("multi-receipt", receipt, ["receipt.png"]),
        _sample("two-pictures", pair, ["cat.jpg", "coffee.jpg"]),
        _sample("text-week", [("How many days are in a week?", "seven")], []),
        _sample("text-sky", [("What is two plus two?", "four"), ("And plus one more?", "five")], []),
    ]


def list_file(counts: dict[str, int]) -> str:
    """The public list format, ``<json path> <thousands of samples>`` a line, at each file's own size."""
    return "".join(f"{name} {count / 1000:.3f}\n" for name, count in counts.items())


# --------------------------------------------------------------------------------------------------- pictures
def photograph(name: str) -> Image.Image:
    """The cropped, shrunk RGB photograph ``name`` (a key of :data:`PHOTOGRAPHS`).

    Raises:
        FileNotFoundError: the installed scikit-image wheel does not carry the file.
    """
    source, box = PHOTOGRAPHS[name]
    path = Path(skimage.__file__).parent / "data" / source
    if not path.is_file():
        raise FileNotFoundError(
            f"The installed scikit-image {skimage.__version__} has no data/{source}, from which {name} "
            "is made; install the scikit-image version named in mindformers_ixc/demo/README.md."
        )
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image = image.crop(box) if box else image
    image.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    return image


def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's built-in face: the drawing does not depend on the fonts a machine has.
    return ImageFont.load_default(size)


def draw_bar_chart() -> Image.Image:
    """Landscape bar chart of four fruits, 400 x 300."""
    image = Image.new("RGB", (400, 300), "white")
    draw = ImageDraw.Draw(image)
    draw.text((200, 24), "Fruit sold in May", fill="black", font=_font(26), anchor="mm")
    base, unit = 260, 5
    for k, (fruit, count) in enumerate((("apples", 40), ("pears", 25), ("plums", 15), ("grapes", 30))):
        left = 40 + 90 * k
        draw.rectangle((left, base - unit * count, left + 60, base), fill=(40, 160, 70))
        above = base - unit * count - 10
        draw.text((left + 30, above), str(count), fill="black", font=_font(18), anchor="mm")
        draw.text((left + 30, base + 16), fruit, fill="black", font=_font(18), anchor="mm")
    draw.line((25, base, 385, base), fill="black", width=2)
    return image


def draw_line_chart() -> Image.Image:
    """Square line chart of falling monthly rain, 360 x 360."""
    image = Image.new("RGB", (360, 360), "white")
    draw = ImageDraw.Draw(image)
    draw.text((180, 26), "Rain per month", fill="black", font=_font(26), anchor="mm")
    base, unit = 310, 4
    values = (("January", 60), ("February", 50), ("March", 35), ("April", 15))
    points = [(60 + 80 * k, base - unit * value) for k, (_, value) in enumerate(values)]
    draw.polygon([*points, (points[-1][0], base), (points[0][0], base)], fill=(232, 214, 245))
    draw.line(points, fill=(130, 40, 170), width=6)
    for (x, y), (month, value) in zip(points, values):
        draw.ellipse((x - 7, y - 7, x + 7, y + 7), fill=(130, 40, 170))
        draw.text((x + 4, y - 20), str(value), fill="black", font=_font(18), anchor="mm")
        draw.text((x, base + 18), month, fill="black", font=_font(17), anchor="mm")
    draw.line((30, base, 340, base), fill="black", width=2)
    return image


def draw_receipt() -> Image.Image:
    """Tall receipt on yellow paper, 220 x 440."""
    image = Image.new("RGB", (220, 440), (250, 222, 90))
    draw = ImageDraw.Draw(image)
    draw.text((110, 36), "Luna Cafe", fill="black", font=_font(32), anchor="mm")
    draw.line((16, 70, 204, 70), fill="black", width=2)
    for k, (item, price) in enumerate((("soup", "9.00"), ("salad", "5.50"), ("tea", "4.00"))):
        y = 110 + 60 * k
        draw.text((20, y), item, fill="black", font=_font(26), anchor="lm")
        draw.text((200, y), price, fill="black", font=_font(26), anchor="rm")
    draw.line((16, 280, 204, 280), fill="black", width=2)
    draw.text((20, 325), "Total", fill="black", font=_font(30), anchor="lm")
    draw.text((200, 325), "18.50", fill="black", font=_font(30), anchor="rm")
    draw.text((110, 400), "Thank you!", fill="black", font=_font(22), anchor="mm")
    return image


def draw_timetable() -> Image.Image:
    """Wide timetable with a teal heading band, 448 x 176."""
    image = Image.new("RGB", (448, 176), "white")
    draw = ImageDraw.Draw(image)
    teal = (0, 128, 128)
    draw.rectangle((0, 0, 448, 48), fill=teal)
    draw.text((224, 24), "Trains from Bern", fill="white", font=_font(28), anchor="mm")
    rows = (
        ("Basel", "9:05", "Platform 3"),
        ("Geneva", "9:20", "Platform 7"),
        ("Zurich", "9:32", "Platform 5"),
    )
    for k, row in enumerate(rows):
        top = 48 + 42 * k
        for x, cell in zip((16, 180, 290), row):
            draw.text((x, top + 21), cell, fill="black", font=_font(24), anchor="lm")
        draw.line((0, top + 42, 448, top + 42), fill=teal, width=2)
    return image


DOCUMENTS = {
    "bar_chart.png": draw_bar_chart,
    "line_chart.png": draw_line_chart,
    "receipt.png": draw_receipt,
    "timetable.png": draw_timetable,
}


def write_pictures(folder: Path) -> None:
    """Write all pictures under ``folder`` (created when missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PHOTOGRAPHS:
        photograph(name).save(folder / name, quality=JPEG_QUALITY, optimize=True)
    for name, draw in DOCUMENTS.items():
        draw().quantize(64).save(folder / name, optimize=True)


# -------------------------------------------------------------------------------------------------- tokenizer
# Parts of the generated sentences, separated by bars to keep the lists short.
_PARTS = (
    "The woman|My friend|A young man|The teacher|Our neighbour|The old captain|She|He",
    "looks at|draws|reads about|talks about|remembers|points to|writes about|wants",
    "the picture|a small house|the blue river|three red apples|a long letter|the city map|an open window|"
    "the black horse|a new computer|the white mountain|her first question|some fresh bread",
    "in the morning|every day|before lunch|after school|at night|during the summer|on the way home|"
    "while it rains|because it is important|when the sun is shining",
)
_PLURALS = ("books", "chairs", "bottles", "flowers", "people", "children", "letters", "cars", "animals")
_COUNTING = (
    "There are {n} {thing} on the table.",
    "How many {thing} can you see? I count {n} of them.",
    "Please describe the image in detail, and say which {thing} is the largest.",
    "The answer is {n}, not {m}: the {thing} on the left should be counted as well.",
    "If there were {n} {thing}, we would need {m} more.",
)


def plain_sentences() -> list[str]:
    """Generated English sentences: coverage beyond the demo's own text."""
    combos = list(itertools.product(*(part.split("|") for part in _PARTS)))
    # A stride coprime to the number of combinations walks over all parts of the template evenly.
    picked = [combos[k * 131 % len(combos)] for k in range(360)]
    sentences = [" ".join(words) + "." for words in picked]
    for k, (template, thing) in enumerate(itertools.product(_COUNTING, _PLURALS)):
        sentences.append(template.format(n=k % 17 + 2, m=k % 9 + 1, thing=thing))
    return sentences


def html_lines() -> list[str]:
    """Lines of small web pages, for the webpage mode's prompts and answers."""
    lines = []
    tags = ("div", "p", "h1", "h2", "section", "button", "span", "li")
    for tag, word in itertools.product(tags, ("title", "content", "main", "menu", "footer")):
        lines.append(f'<{tag} class="{word}">{word.capitalize()}</{tag}>')
        lines.append(f'  <{tag} style="color: #333; margin: 0 auto; padding: 10px;">')
    page = (
        '<!DOCTYPE html>|<html lang="en">|<head>|</head>|<body>|</body>|</html>|<meta charset="utf-8">|'
        '<title>Demo page</title>|<img src="images/photo.jpg" alt="Photo">|<ul>|</ul>|<style>|</style>|'
        '<a href="https://example.org/index.html">Read more</a>'
    )
    return lines + page.split("|") * 3


def corpus(samples: list[dict]) -> list[str]:
    """Training lines; the demo's own text often enough that its words become single pieces."""
    lines = []
    for sample in samples:
        lines += [turn["value"] for turn in sample["conversations"]] * 12
    lines += [
        "user",
        "assistant",
        "system",
        "You are a helpful assistant.",
        "Describe this image briefly.",
        "Describe this image in detail.",
        "<IMAGE 1>",
        "Here are some frames of a video.",
    ] * 40
    return lines + plain_sentences() + html_lines()


def train_tokenizer(lines: list[str]) -> bytes:
    """Train the SentencePiece BPE model and return its serialised bytes.

    Normalisation, digit splitting and byte fallback are those of the public tokenizer.model (read from its
    trainer_spec and normalizer_spec); so are ids 0 to 2, the 256 byte pieces from id 3 on and the
    ``[UNUSED_TOKEN_k]`` pieces at the end of the vocabulary.
    """
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        # The trainer reads lines, so the line break itself is only known to it as a given piece.
        user_defined_symbols=["\n", *UNUSED_TOKENS],
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(written.getvalue())
    unused = set(UNUSED_TOKENS)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece

    def rank(piece: sentencepiece_model_pb2.ModelProto.SentencePiece) -> int:
        if piece.type in (kinds.UNKNOWN, kinds.CONTROL):
            return 0
        if piece.type == kinds.BYTE:
            return 1
        return 3 if piece.piece in unused else 2

    # Merges follow the pieces' scores, not their places, so moving pieces changes ids and nothing else.
    ordered = sorted(model.pieces, key=rank)
    pieces = [kinds.FromString(piece.SerializeToString()) for piece in ordered]
    del model.pieces[:]
    model.pieces.extend(pieces)
    return model.SerializeToString(deterministic=True)


def main(arguments: list[str] | None = None) -> None:
    """Write every generated file of the demo folder."""
    parser = argparse.ArgumentParser(description="Build the demo pictures, conversations and tokenizer.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder (default: the package's)")
    out = parser.parse_args(arguments).out
    write_pictures(out / "images")
    files = {"multi.json": multi_samples(), "train.json": train_samples()}
    for name, samples in files.items():
        (out / name).write_text(json.dumps(samples, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    counts = {name: len(samples) for name, samples in files.items()}
    (out / "data.txt").write_text(list_file(counts), encoding="utf-8")
    lines = corpus([*files["train.json"], *files["multi.json"]])
    (out / "tokenizer.model").write_bytes(train_tokenizer(lines))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"wrote {counts} samples and {len(COMMON_ANSWERS)} pictures to {out} ({size / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()
