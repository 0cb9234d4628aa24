"""The tiny reward model, and best of N by it: pairs and answers about charts that nothing was trained on.

    python benchmarks/reward.py [--out FOLDER] [--samples 8]

From the starter: a model that knows charts (`ixc25_charts_tiny.yaml`) becomes the reward model
(`ixc25_reward_tiny.yaml`), and one that was trained a quarter as long answers questions, once greedily and N times by
sampling. Of the N are taken the one with the highest score, the one with the highest mean log-probability, and one at
random, which is right as often as the N are on the mean. Models that are in FOLDER are not trained again. Prints a
table and returns 1 if a bar is missed.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from preference_loop import train

STAGES = "pkg:mindformers_ixc/demo/stages"
BATCH = 16
HALF_EPOCHS = 3          # a quarter of the recipe's


def pair_accuracy(scorer, name: str, shuffled: bool = False) -> float:
    """Share of pairs in order; `shuffled` gives each the picture of another one, drawn at random."""
    from mindformers_ixc.data.preferences import load_preferences

    pairs = load_preferences(f"{STAGES}/{name}.json")
    pictures = [pair.images for pair in pairs]
    if shuffled:
        pictures = [pictures[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    samples = [scorer.encode(side.turns, images) for pair, images in zip(pairs, pictures) for side in pair.sides]
    chosen, rejected = np.array(scorer.score_samples(samples, BATCH)).reshape(-1, 2).T
    return float((chosen > rejected).mean())


def answers(out: Path, scorer, count: int) -> dict[str, float]:
    """Exact match in percent of the greedy answers to the held-out questions, and of the choices among `count`."""
    from mindformers_ixc.data.conversations import load_conversations
    from mindformers_ixc.data.questions import questions_of
    from mindformers_ixc.generation.assistant import Assistant
    from mindformers_ixc.generation.best_of import BestOf

    asked = questions_of(load_conversations(f"{STAGES}/vqa_held_out.json"))
    assistant, found = Assistant.from_directory(out / "half" / "model"), []
    best_of = BestOf(assistant, count, scorer)
    for number, question in enumerate(asked):
        right = question.expected.strip()
        greedy = assistant.answer([question.request(None)], max_new_tokens=8)[0] == right
        drawn = best_of.answer(question.request(None), max_new_tokens=8, top_p=1.0, seed=number)
        likeliest = max(drawn, key=lambda one: one.logp)
        found.append([greedy, np.mean([one.text == right for one in drawn]), likeliest.text == right,
                      drawn[0].text == right])
    names = ("greedy", "one at random", "the likeliest", "the best by its score")
    return dict(zip(names, 100 * np.mean(np.array(found, float), 0)))


def main() -> int:
    """Trains and measures; returns 0 if every bar holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where everything goes, and what is there is taken (a temporary one)")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="answers to a question")
    arguments = parser.parse_args()
    from mindformers_ixc.cli.inference import quiet_mindformers
    from mindformers_ixc.generation.scoring import Scorer

    quiet_mindformers()
    with tempfile.TemporaryDirectory() as scratch:
        out = (arguments.out or Path(scratch)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        train(out, "charts", "charts", "starter")
        train(out, "reward", "reward", "charts/model")
        train(out, "half", "charts", "starter", "--epochs", str(HALF_EPOCHS))
        scorer = Scorer.from_directory(out / "reward" / "model")
        own, new = pair_accuracy(scorer, "reward_train"), pair_accuracy(scorer, "reward_held_out")
        others = pair_accuracy(scorer, "reward_held_out", shuffled=True)
        match = answers(out, scorer, arguments.samples)
    best = match["the best by its score"]
    bars = [("pairs in order, those it trained on", f"{own:.3f}", own == 1.0),
            ("pairs in order, charts it has not seen", f"{new:.3f}", new >= 0.9),
            ("the same with the pictures of others", f"{others:.3f}", others < new - 0.2),
            *((f"exact match of {name}", f"{value:.1f} %",
               "" if name.startswith("the ") else best > value) for name, value in match.items())]
    for what, value, good in bars:
        print(f"{what:45} {value:10} {'' if good == '' else 'ok' if good else 'MISSED'}")
    return int(any(good is False or good is np.False_ for _, _, good in bars))


if __name__ == "__main__":
    sys.exit(main())
