"""What is kept of earlier requests: within its bytes, the least recently used going first."""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mindformers_ixc.generation.store import Store


def block(value: int, size: int = 10) -> np.ndarray:
    return np.full(size, value, np.uint8)


def keys(text: str) -> list[bytes]:
    return [letter.encode() for letter in text]


def held(store: Store, text: str) -> str:
    return "".join(letter for letter in text if letter.encode() in store)


def test_the_least_recently_used_goes_first():
    store = Store(30)
    for letter in "abc":
        store.put(letter.encode(), block(ord(letter)))
    assert store.get(b"a")[0] == ord("a")
    store.put(b"d", block(0))
    assert (held(store, "abcd"), store.bytes) == ("acd", 30)
    assert store.get(b"b") is None
    store.put(b"e", block(0, 25))
    assert (held(store, "abcde"), store.bytes) == ("e", 25)


def test_what_is_larger_than_all_room_is_not_kept_and_pushes_nothing_out():
    store = Store(30)
    store.put(b"a", block(0))
    store.put(b"b", block(0, 31))
    assert (held(store, "ab"), store.bytes) == ("a", 10)
    none = Store(0)
    none.put(b"a", block(0))
    assert (len(none), none.bytes) == (0, 0)


def test_a_chain_is_found_up_to_its_first_gap():
    store = Store(100)
    store.put_chain(keys("abc"), [block(1), block(2), block(3)])
    assert [int(found[0]) for found in store.longest(keys("abxc"))] == [1, 2]
    assert store.longest(keys("xabc")) == []


def test_the_end_of_a_chain_goes_before_its_beginning():
    store = Store(40)
    store.put_chain(keys("abc"), [block(1), block(2), block(3)])
    store.put_chain(keys("xy"), [block(4), block(5)])
    assert held(store, "abcxy") == "abxy"
    store.longest(keys("ab"))                   # used now, so the other one's end is next
    store.put(b"z", block(6))
    assert held(store, "abcxyz") == "abxz"


def test_chains_share_what_they_have_in_common():
    store = Store(100)
    store.put_chain(keys("abc"), [block(1), block(2), block(3)])
    store.put_chain(keys("abd"), [None, None, block(4)])
    assert (store.bytes, [int(found[0]) for found in store.longest(keys("abd"))]) == (40, [1, 2, 4])


def test_of_a_chain_that_is_too_long_the_beginning_is_kept():
    store = Store(30)
    store.put(b"z", block(0))
    store.put_chain(keys("abcde"), (block(number) for number in range(5)))
    assert (held(store, "abcdez"), store.bytes) == ("abc", 30)


def test_a_lower_limit_holds_from_the_next_value_on_and_clear_forgets():
    store = Store(100)
    store.put_chain(keys("abcde"), [block(0)] * 5)
    store.limit = 20
    store.put(b"f", block(0))
    assert (held(store, "abcdef"), store.bytes) == ("af", 20)
    store.clear()
    assert (len(store), store.bytes) == (0, 0)


def test_what_one_of_several_has_put_can_be_forgotten():
    store = Store(100)
    for key in (b"one a", b"one b", b"two a"):
        store.put(key, block(0))
    store.forget(b"one")
    assert (len(store), store.bytes, b"two a" in store) == (1, 10, True)


def test_threads_leave_its_bytes_right():
    store = Store(500)

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        for _ in range(300):
            chain = [bytes([letter]) for letter in rng.integers(0, 40, 6)]
            chain = list(dict.fromkeys(chain))
            store.put_chain(chain, [block(0, 10) for _ in chain])
            store.longest(chain)
            store.get(chain[0])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert store.bytes == 10 * len(store) <= 500
