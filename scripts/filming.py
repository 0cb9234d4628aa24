"""Runs a command on a pseudo terminal and draws what it shows; photographs pages by headless Chromium.

    pip install pyte                                       # a terminal in memory; Pillow and matplotlib are there
    python scripts/filming.py --columns 40 plan.png mindformers plan --config ixc25_sft --no_compile

draws one command as it is when it has ended, to look at it; scripts/draw_screens.py draws those of the documents.
"""
from __future__ import annotations

import argparse
import codecs
import fcntl
import os
import pty
import re
import select
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyte
from PIL import Image, ImageColor, ImageDraw, ImageFont

# Lines that are kept: no scene is longer, and what is empty at the end is not drawn.
ROWS = 200

# Of a picture, in points: the size of a letter, the height of a line, the frame. They are drawn at twice the size, for
# screens that are finer.
LETTER, LINE, FRAME, SHARP = 14, 18, 14, 2

GROUND, INK = "#151a22", "#d7dde6"
COLOURS = {"black": "#3b4252", "red": "#ff7b7b", "green": "#7fd18b", "brown": "#e3c07b", "blue": "#7aa7ff",
           "magenta": "#e29ae0", "cyan": "#62cfe0", "white": "#eef2f7"}
# Between an ink and the ground.
SHADES = 12

# Full and empty part of a bar.
BAR = (COLOURS["blue"], COLOURS["black"])

PROMPT = "\033[1;32m$\033[0m "

Cell = tuple[str, str, bool]      # sign, colour, bold
Shot = list[list[Cell]]


class Film:
    """A command on a terminal.

    Args:
        words: of the command.
        columns: of the terminal.
        folder: where it runs.
        environment: what is set beside the usual variables.
        typed: what stands behind the prompt, if it is not the words themselves.
    """

    def __init__(self, words: Sequence[str], columns: int, folder: Path | None = None,
                 environment: Mapping[str, str] | None = None, typed: str | None = None):
        self.screen = pyte.Screen(columns, ROWS)
        self.stream = pyte.Stream(self.screen)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        typed = shlex.join(words) if typed is None else typed
        self.stream.feed(PROMPT + typed.replace("\n", "\r\n") + "\r\n")
        own, self.terminal = pty.openpty()
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        variables = {**os.environ, "TERM": "xterm-256color", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1",
                     **(environment or {})}
        for name in ("LC_ALL", "LC_CTYPE", "COLUMNS"):
            variables.pop(name, None)
        self.process = subprocess.Popen(words, stdin=self.terminal, stdout=self.terminal, stderr=self.terminal,
                                        cwd=folder, env=variables, start_new_session=True,
                                        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(self.terminal)
        self.terminal = own

    def text(self) -> str:
        """All that the screen shows."""
        return "\n".join(self.screen.display)

    def until(self, pattern: str, seconds: float = 1800, times: int = 1) -> Shot:
        """Waits until a pattern is seen so many times, and returns what there is to see then.

        Raises:
            TimeoutError: when it has not been seen by then.
            EOFError: when the command ends before.
        """
        end = time.monotonic() + seconds
        while len(re.findall(pattern, self.text(), re.MULTILINE)) < times:
            if time.monotonic() > end:
                raise TimeoutError(f"{pattern!r} did not come within {seconds:.0f} s:\n{self.text().rstrip()}")
            if not self._read(0.2) and not re.search(pattern, self.text(), re.MULTILINE):
                raise EOFError(f"the command ended without {pattern!r}:\n{self.text().rstrip()}")
        while self._read(0.15):               # what comes with it
            if not select.select([self.terminal], [], [], 0.02)[0]:
                break
        return self.shot()

    def type(self, line: str) -> None:
        """Types a line, as somebody at the keyboard."""
        os.write(self.terminal, line.encode() + b"\n")

    def end(self, seconds: float = 1800) -> Shot:
        """Waits for the end of the command.

        Raises:
            TimeoutError: when it has not ended by then.
        """
        end = time.monotonic() + seconds
        while self._read(0.5):
            if time.monotonic() > end:
                self.process.terminate()
                raise TimeoutError(f"it did not end within {seconds:.0f} s:\n{self.text().rstrip()}")
        self.process.wait()
        os.close(self.terminal)
        return self.shot()

    def _read(self, seconds: float) -> bool:
        """Takes what the command has written, waiting for it at most so long; false at the end."""
        if not select.select([self.terminal], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.terminal, 65536)
        except OSError:                       # how Linux says that nobody is at the other end
            return False
        self.stream.feed(self.decoder.decode(data))
        return bool(data)

    def shot(self) -> Shot:
        """What there is to see now."""
        rows = [[(cell.data, cell.fg, cell.bold) for cell in (self.screen.buffer[number][column]
                                                              for column in range(self.screen.columns))]
                for number in range(self.screen.lines)]
        while rows and not "".join(sign for sign, _, _ in rows[-1]).strip():
            rows.pop()
        return rows


def fonts(size: int) -> dict[bool, ImageFont.FreeTypeFont]:
    """DejaVu Sans Mono, plain and bold, as matplotlib ships it."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return {bold: ImageFont.truetype(str(folder / f"DejaVuSansMono{'-Bold' if bold else ''}.ttf"), size)
            for bold in (False, True)}


def draw(rows: Shot, path: Path) -> None:
    """Draws a screen into a PNG file."""
    letters = fonts(LETTER * SHARP)
    width, height, frame = round(letters[False].getlength("M")), LINE * SHARP, FRAME * SHARP
    size = (width * max(map(len, rows)) + 2 * frame, height * len(rows) + 2 * frame)
    picture = Image.new("RGB", size, GROUND)
    pencil = ImageDraw.Draw(picture)
    for number, row in enumerate(rows):
        for column, (sign, colour, bold) in enumerate(row):
            left, top = frame + column * width, frame + number * height
            ink = COLOURS.get(colour, INK)
            if sign in "█░":                  # the blocks of fonts leave gaps between lines and columns
                middle = top + round(0.18 * height)
                pencil.rectangle((left, middle, left + width - 1, middle + round(0.62 * height)),
                                 fill=BAR["█░".index(sign)])
            elif "⠀" <= sign <= "⣿":
                _draw_braille(pencil, sign, left, top, ink)
            elif sign.strip():
                pencil.text((left, top + height // 2), sign, fill=ink, font=letters[bold], anchor="lm")
    save(picture, path, {INK, *(COLOURS[one] for row in rows for _, one, _ in row if one in COLOURS), *BAR})


def _draw_braille(pencil: ImageDraw.ImageDraw, sign: str, left: int, top: int, ink: str) -> None:
    """The spinner's sign, which the font does not have: the bits of its number are its dots."""
    places = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3))
    for bit, (x, y) in enumerate(places):
        if ord(sign) - 0x2800 >> bit & 1:
            at = (left + (3 + 5 * x) * SHARP // 2, top + (7 + 7 * y) * SHARP // 2)
            pencil.ellipse((*at, at[0] + 2 * SHARP, at[1] + 2 * SHARP), fill=ink)


def save(picture: Image.Image, path: Path, inks: set[str]) -> None:
    """Writes a picture as a small file: its inks, and what lies between each of them and the ground."""
    ground, palette = ImageColor.getrgb(GROUND), Image.new("P", (1, 1))
    shades = [round(low + (high - low) * share / (SHADES - 1)) for ink in sorted(inks) for share in range(SHADES)
              for low, high in zip(ground, ImageColor.getrgb(ink))]
    palette.putpalette(shades)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)


# Of a window's height, what its page takes to be covered.
MARGIN = 160


def chromium() -> str:
    """The browser: what CHROMIUM names, or what is installed under a usual name.

    Raises:
        FileNotFoundError: when there is none.
    """
    names = [os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        raise FileNotFoundError("No Chromium is installed; install it, or name it in the variable CHROMIUM.")
    return found


def photograph(page: Path, path: Path, size: tuple[int, int], dark: bool = False, script: str = "") -> None:
    """Photographs a page of one file.

    Args:
        page: the file.
        path: of the picture.
        size: of the window.
        dark: the browser prefers dark pages.
        script: JavaScript that runs when the page is there, such as one that moves the pointer.
    """
    with tempfile.TemporaryDirectory() as folder:
        shown, raw = page, Path(folder) / "page.png"
        if script:                            # beside the page, so that what it names relatively is found
            shown = page.with_name(f".{page.stem}_photographed.html")
            shown.write_text(page.read_text(encoding="utf-8").replace(
                "</body>", f"<script>window.addEventListener('load', () => {{{script}}});</script></body>"),
                encoding="utf-8")
        try:
            subprocess.run([chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                            f"--user-data-dir={folder}/profile",
                            f"--blink-settings=preferredColorScheme={int(not dark)}",
                            f"--window-size={size[0]},{size[1] + MARGIN}", "--virtual-time-budget=3000",
                            f"--screenshot={raw}", shown.resolve().as_uri()], check=True, capture_output=True,
                           timeout=120)
        finally:
            if script:
                shown.unlink()
        keep(raw, path, size)


def keep(raw: Path, path: Path, size: tuple[int, int]) -> None:
    """Keeps the top of a browser's picture in 256 colours, in a file of a fourth of its size."""
    with Image.open(raw) as picture:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.convert("RGB").crop((0, 0, *size)).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> int:
    """Draws one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("--text", action="store_true", help="print the screen as text too")
    parser.add_argument("picture", type=Path)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    film = Film(arguments.words, arguments.columns)
    rows = film.end()
    draw(rows, arguments.picture)
    if arguments.text:
        print("\n".join("".join(sign for sign, _, _ in row).rstrip() for row in rows))
    return film.process.returncode


if __name__ == "__main__":
    sys.exit(main())
