"""Makes the pictures of docs/images/ anew: commands on a terminal, and pages in a browser.

    pip install pyte playwright            # a terminal in memory, a browser; Pillow, matplotlib (its font) are there
    python scripts/draw_screens.py         # all of them: two runs of the tiny model, 5 minutes of two cores
    python scripts/draw_screens.py chat report --work FOLDER      # some, from runs that are in FOLDER already

Chromium must be installed (the variable CHROMIUM names another browser of its kind), and for the picture `site` the
extra `docs` and a font with Chinese signs (such as WenQuanYi). What is filmed is README's example, the flags of twelve
countries; its two runs also measure themselves on the questions that they learn. Look at every picture before it is
committed.
"""
from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from filming import Film, chromium, draw, keep, photograph
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"

# Of a picture at most, so that a clone stays small.
MOST_BYTES = 150_000

COLUMNS = 100

EVALUATION = """
evaluation:                              # with every 40 steps: loss and answers
  dataset_dir: flags/questions.csv
  metrics: [loss, exact_match]
  every: 40
"""

PLAN = ["mindformers", "plan", "--config", "ixc25_sft_16", "--devices", "16", "--no_compile"]

# What is asked on the page of `serve`: pictures of the demo, and the rounds of a conversation about them.
DEMO = ROOT / "mindformers_ixc" / "demo" / "images"
CONVERSATIONS = [
    (["receipt.png"], ["What does the heading say?", "What is the total?"]),
    (["cat.jpg", "coffee.jpg"], ["Which picture shows an animal?"]),
    (["cat.jpg"], ["What is shown in the picture?", "What would be a good title?"])]
ANSWERS_AT, WINDOW = r"answers at (http://\S+)/v1", (1280, 800)

# Moves the pointer over an element, so that the page shows what it says there.
HOVER = """
const place = document.querySelectorAll(%r)[%d], box = place.getBoundingClientRect();
place.dispatchEvent(new PointerEvent('pointermove', {bubbles: true, clientX: box.left + %g * box.width,
                                                     clientY: box.top + %g * box.height}));"""

# The charts of speed are left out, so that the answers are on the same picture.
FEW_CHARTS = """
document.querySelectorAll('figure.chart:nth-child(n+%d)').forEach((one) => one.style.display = 'none');
window.dispatchEvent(new Event('resize'));"""

# The first chart is the loss.
LOGARITHMIC = "document.querySelector('figure.chart figcaption button').click();"


def prepare(work: Path) -> None:
    """Draws README's flags and lets `init` write the YAML file."""
    code = re.search(r"python - <<'END'\n(.*?)\nEND", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    if code is None:
        raise ValueError("README.md has no example that draws flags any more.")
    subprocess.run([sys.executable, "-c", code[1]], cwd=work, check=True)
    subprocess.run(["mindformers", "init", "--data", "flags", "--output", "my.yaml"], cwd=work, check=True,
                   stdin=subprocess.DEVNULL)
    with open(work / "my.yaml", "a", encoding="utf-8") as file:
        file.write(EVALUATION)


def trained(work: Path) -> None:
    """Films the run of the flags, half way and at its end, and runs a second one to compare it with."""
    if not (work / "my" / "model").is_dir():
        prepare(work)
        film = Film(["mindformers", "run", "--config", "my.yaml"], COLUMNS, work)
        shots = {"run": film.until(r"2[3-9]\d/\d+ .*left"), "run_end": film.end()}
        (work / "shots.json").write_text(json.dumps(shots), encoding="utf-8")
    if not (work / "slower" / "model").is_dir():
        subprocess.run(["mindformers", "run", "--config", "my.yaml", "--output_dir", "slower",
                        "--lr_schedule.learning_rate", "2.e-4", "--quiet"], cwd=work, check=True)


def run(work: Path, _: Path) -> None:
    """The run half way, and at its end."""
    trained(work)
    for name, shot in json.loads((work / "shots.json").read_text(encoding="utf-8")).items():
        draw(shot, IMAGES / f"{name}.png")


def chat(work: Path, path: Path) -> None:
    """A conversation about two flags."""
    trained(work)
    film = Film(["mindformers", "chat", "--model", "my/model"], COLUMNS, work)
    film.until("^> ")
    lines = ["/image flags/Peru.png", "Which country has this flag?", "What is its capital?", "/stats", "/new",
             "/image flags/Estonia.png", "Which country has this flag?"]
    for number, line in enumerate(lines, 2):
        film.type(line)
        film.until("^> ", times=number)
    draw(film.shot()[:-1], path)
    film.type("/quit")
    film.end()


def search(work: Path, path: Path) -> None:
    """The layouts of a recipe, ranked."""
    words = ["mindformers", "plan", "--config", "ixc25_sft_64", "--devices", "64", "--search", "--no_compile"]
    draw(Film(words, 110, work).end(), path)


def report(work: Path, path: Path) -> None:
    """The page of a run."""
    trained(work)
    subprocess.run(["mindformers", "report", "my"], cwd=work, check=True)
    photograph(work / "my" / "report.html", path, (1080, 1250),
               script=FEW_CHARTS % 3 + LOGARITHMIC + HOVER % ("figure.chart .plot", 0, 0.42, 0.2))


def comparison(work: Path, path: Path) -> None:
    """The page of two runs, dark."""
    trained(work)
    subprocess.run(["mindformers", "report", "my", "slower"], cwd=work, check=True)
    photograph(work / "comparison.html", path, (1080, 1250), dark=True,
               script=FEW_CHARTS % 3 + LOGARITHMIC)


def plan(work: Path, path: Path) -> None:
    """A plan as a page."""
    subprocess.run([*PLAN, "--model_parallel", "4", "--pipeline_stage", "2", "--html", "plan.html"], cwd=work,
                   check=True, stdout=subprocess.DEVNULL)
    photograph(work / "plan.html", path, (1080, 1190),
               script=HOVER % ('[data-tip^="stage 1, backward pass of micro batch 2"]', 0, 0.5, 0.5))


def site(work: Path, path: Path) -> None:
    """The front page of the site."""
    subprocess.run(["mkdocs", "build", "--quiet", "--site-dir", str(work / "site")], cwd=ROOT, check=True)
    photograph(work / "site" / "index.html", path, (1280, 860))


def server_page(work: Path, path: Path) -> None:
    """The page of `serve`, with answers of the starter's."""
    film = Film(["mindformers", "serve", "--model", "starter", "--port", "0", "--log", "requests.log"], COLUMNS, work)
    film.until(ANSWERS_AT)
    try:
        with sync_playwright() as tools:
            browser = tools.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": WINDOW[0], "height": WINDOW[1]}, locale="en-GB",
                                    color_scheme="light")
            page.goto(re.findall(ANSWERS_AT, film.text())[0])
            for pictures, questions in CONVERSATIONS:
                page.click("#new")
                page.set_input_files("#choose", [DEMO / name for name in pictures])
                for question in questions:
                    page.fill("#question", question)
                    page.keyboard.press("Enter")
                    page.wait_for_selector(".answer:last-child:not(.running)")
            page.mouse.move(WINDOW[0] / 2, WINDOW[1] - 5)
            page.screenshot(path=work / "page.png")
            browser.close()
    finally:
        film.process.terminate()
    film.end()
    keep(work / "page.png", path, WINDOW)


SCENES: dict[str, Callable[[Path, Path], None]] = {
    "run": run, "chat": chat, "search": search, "report": report, "comparison": comparison, "plan": plan, "site": site,
    "server_page": server_page}


def main() -> int:
    """Draws what is named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"pictures: {', '.join(SCENES)}")
    parser.add_argument("--work", type=Path, help="folder of the runs, kept (default: a temporary one)")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in SCENES]
    if unknown:
        parser.error(f"{unknown[0]} is no picture; there are {', '.join(SCENES)}.")
    work = arguments.work or Path(tempfile.mkdtemp(prefix="screens_"))
    work.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or SCENES:
        SCENES[name](work.resolve(), IMAGES / f"{name}.png")
    if arguments.work is None:
        shutil.rmtree(work)
    large = [path for path in sorted(IMAGES.glob("*.png")) if path.stat().st_size > MOST_BYTES]
    for path in large:
        print(f"{path} has {path.stat().st_size:,} bytes, more than {MOST_BYTES:,}.", file=sys.stderr)
    return 1 if large else 0


if __name__ == "__main__":
    sys.exit(main())
