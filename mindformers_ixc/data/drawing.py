"""Numbers drawn as Python's `random` draws from a list, for millions of them: no Python object for each."""
from __future__ import annotations

import math
import random
from array import array

import numpy as np


def resampled(count: int, drawn: int, rng: random.Random) -> np.ndarray:
    """`drawn` of the numbers below `count`, int32: each as often as any other, and the rest without repetition.

    Args:
        count: of numbers.
        drawn: numbers that are wanted.
        rng: draws those that are not whole passes.
    """
    whole, rest = divmod(drawn, count)
    numbers = np.empty(drawn, np.int32)
    numbers[:whole * count].reshape(whole, count)[:] = np.arange(count, dtype=np.int32)
    numbers[whole * count:] = sampled(count, rest, rng)
    return numbers


def sampled(count: int, drawn: int, rng: random.Random) -> np.ndarray:
    """`rng.sample(range(count), drawn)`, int32: the same numbers, and `rng` is left in the same state.

    Python's own keeps a list of all numbers when many of them are drawn.
    """
    # as in Python: where few are drawn, a set of them is smaller than a list of all
    if count > (21 if drawn <= 5 else 21 + 4 ** math.ceil(math.log(drawn * 3, 4))):
        return np.fromiter(rng.sample(range(count), drawn), np.int32, drawn)
    pool, result = array("i", range(count)), array("i", bytes(4 * drawn))
    for number in range(drawn):
        place = rng.randrange(count - number)
        result[number] = pool[place]
        pool[place] = pool[count - number - 1]       # what was not drawn moves to the vacancy
    return np.array(result, np.int32)
