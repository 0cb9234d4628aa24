"""All ranks of a run stop after the same step, whoever is asked and however they take turns."""
from __future__ import annotations

import random

import pytest

from mindformers_ixc import interruption
from mindformers_ixc.training import stopping
from mindformers_ixc.training.stopping import Stopping, ask_ranks

RANKS = 4


class Ranks:
    """Ranks of a run as they may take turns: none ends a step that another has not begun."""

    def __init__(self, folder, monkeypatch):
        self.now, self.folder = 0, folder
        monkeypatch.setattr(stopping, "is_parallel", lambda: True)
        monkeypatch.setattr(stopping, "rank", lambda: self.now)
        self.signals = [interruption.Interruption() for _ in range(RANKS)]
        self.monkeypatch = monkeypatch
        self.deciders = []
        for number in range(RANKS):
            self.become(number)
            self.deciders.append(Stopping(folder))
        for number in range(RANKS):
            self.become(number)
            self.deciders[number].begin()

    def become(self, number: int) -> None:
        self.now = number
        self.monkeypatch.setattr(interruption, "current", self.signals[number])

    def run(self, rng, ask, at: int) -> list[int]:
        """The step after which each stops; `ask` is called after some turns."""
        steps, stopped, turn = [0] * RANKS, [0] * RANKS, 0
        while not all(stopped):
            turn += 1
            if turn == at:
                ask()
            ready = [number for number in range(RANKS) if not stopped[number] and steps[number] == min(
                step for step, end in zip(steps, stopped) if not end)]
            number = rng.choice(ready)
            steps[number] += 1
            self.become(number)
            if self.deciders[number].is_due(steps[number]):
                stopped[number] = steps[number]
        return stopped


@pytest.mark.parametrize("asked", ["launcher", 0, 2, "all"])
def test_all_ranks_stop_after_the_same_step(tmp_path, monkeypatch, asked):
    for seed in range(40):
        rng = random.Random(seed)
        ranks = Ranks(tmp_path, monkeypatch)

        def ask(ranks=ranks):
            if asked == "launcher":
                assert ask_ranks(tmp_path, 15)
            for number in range(RANKS):
                if asked in (number, "all"):
                    ranks.signals[number].number = 15

        found = ranks.run(rng, ask, at := rng.randrange(1, 40))
        assert len(set(found)) == 1
        assert found[0] <= at // RANKS + 4


def test_ranks_that_do_not_train_yet_cannot_be_asked(tmp_path):
    assert not ask_ranks(tmp_path, 15)
    assert not list(tmp_path.iterdir())
