"""The data sets, and what each says of prompts, limits and scores."""
from __future__ import annotations

from dataclasses import dataclass

# Beams and tiles of the published measurements, and what the tiles of several pictures are at least.
NUM_BEAMS, TILES, LEAST_TILES = 3, 36, 4

# What the answer of each kind of prompt may have in tokens: a letter, a word or phrase, one below a doubled prompt, a
# text, and what MME's branch leaves as it was.
LETTER, PHRASE, BRIEF, TEXT, LONG = 5, 100, 10, 500, 2048

# Columns that every data set has; pictures are in `image` or named by `image_path`.
COLUMNS = ("index", "question")

PAPER = "arXiv 2407.03320"


@dataclass(frozen=True)
class Benchmark:
    """A data set.

    Attributes:
        name: VLMEvalKit's, which its file and its result files have too.
        prompt: which of `prompts.PROMPTS` asks.
        metric: which of `scoring.METRICS` scores; empty where a judge does, another model that VLMEvalKit asks.
        max_new_tokens: of an answer.
        columns: that the file must have beside `COLUMNS`, an `answer` to be scored by aside.
        letter: whether the first capital letter of an answer is taken for the answer.
        paper: the published score; `None` where there is none.
        title: what the paper calls it.
        main: the line of the scores that is the paper's.
        note: what keeps a score from being compared with the paper's as it stands.
    """

    name: str
    prompt: str
    metric: str
    max_new_tokens: int
    columns: tuple[str, ...] = ()
    letter: bool = False
    paper: float | None = None
    title: str = ""
    main: str = "Overall"
    note: str = ""

    @property
    def has_marks(self) -> bool:
        """Whether the published prompt has marks of turns in the question itself."""
        return self.prompt in ("doubled", "mme")


# The published adapter cannot ask these two: its own prompt for them fails its own check.
_DETAIL = "VLMEvalKit's adapter stops at its own prompt for this set; the nearest to it is asked here"

_JUDGE = "scored by VLMEvalKit with a judge"

_SPLIT = "the paper does not say which split"


def _choice(name: str, paper: float | None = None, title: str = "", metric: str = "choice", **others: object) -> \
        Benchmark:
    fields = {"columns": ("A", "B"), "letter": True, **others}
    return Benchmark(name, "options", metric, LETTER, paper=paper, title=title, **fields)  # type: ignore[arg-type]


def _text(name: str, metric: str, paper: float | None = None, title: str = "", **others: object) -> Benchmark:
    return Benchmark(name, "phrase", metric, PHRASE, paper=paper, title=title, **others)  # type: ignore[arg-type]


_ALL = (
    *(_choice(f"MMBench_{split}_EN", 82.2, "MMB", "circular", note=_SPLIT) for split in ("DEV", "TEST")),
    *(_choice(f"MMBench_{split}_CN", 80.8, "MMB-CN", "circular", note=_SPLIT) for split in ("DEV", "TEST")),
    *(_choice(f"MMBench_{split}_{language}_V11", 79.4, "MMB 1.1", "circular", note=f"{_SPLIT} or language")
      for split in ("DEV", "TEST") for language in ("EN", "CN")),
    _choice("CCBench", metric="circular"),
    _choice("MMStar", 59.9, "MMStar"),
    _choice("SEEDBench_IMG", 75.4, "SEED-I"),
    _choice("RealWorldQA", 67.8, "RealWorldQA"),
    _choice("AI2D_TEST", 81.5, "AI2D"),
    _choice("ScienceQA_VAL"), _choice("ScienceQA_TEST"),
    _choice("MMMU_DEV_VAL", 42.9, "MMMU", "mmmu", letter=False, main="validation",
            note=f"{_SPLIT}; the validation set has public answers"),
    Benchmark("MME", "mme", "mme", LONG, ("category", "image_path"), paper=2229.0, title="MME", main="Overall"),
    Benchmark("HallusionBench", "doubled", "hallusion", BRIEF, ("l2-category",), paper=42.4, title="HallB",
              main="mean of aAcc, fAcc, qAcc", note="the paper does not say of what; VLMEvalKit's leaderboard shows "
              "this mean"),
    Benchmark("POPE", "doubled", "pope", BRIEF),
    _text("DocVQA_VAL", "anls"), _text("DocVQA_TEST", "anls", 90.9, "DocVQA"),
    _text("InfoVQA_VAL", "anls", 69.9, "InfoVQA", note=_SPLIT),
    _text("InfoVQA_TEST", "anls", 69.9, "InfoVQA", note=_SPLIT),
    _text("TextVQA_VAL", "vqa", 78.2, "TextVQA"),
    _text("ChartQA_TEST", "relaxed", 82.2, "ChartQA"),
    _text("OCRVQA_TEST", "exact"), _text("OCRVQA_TESTCORE", "exact"), _text("GQA_TestDev_Balanced", "exact"),
    _text("OCRBench", "ocrbench", 69.0, "OCRBench", columns=("category",), main="Final Score Norm"),
    Benchmark("MathVista_MINI", "question", "", PHRASE, paper=63.8, title="MathVista", note=_JUDGE),
    Benchmark("MMVet", "detail", "", TEXT, paper=51.7, title="MM-Vet", note=f"{_JUDGE}; {_DETAIL}"),
    Benchmark("LLaVABench", "detail", "", TEXT, note=f"{_JUDGE}; {_DETAIL}"),
)

BENCHMARKS = {one.name: one for one in _ALL}


def tiles_of(pictures: int, tiles: int = TILES) -> int:
    """Tiles that each of so many pictures may have.

    The published adapter divides by the number of pictures twice: once where it notes the limit, and once where it
    cuts.

    Args:
        pictures: of a question.
        tiles: that a single one may have.
    """
    if pictures < 2:
        return tiles
    return max(LEAST_TILES, max(1, tiles // pictures) // pictures)
