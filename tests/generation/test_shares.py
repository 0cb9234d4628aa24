"""Files of requests answered by several replicas: one file in order, whatever is left of an earlier run."""
from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mindformers_ixc.errors import DataError
from mindformers_ixc.generation import predict as predicting
from mindformers_ixc.generation.predict import predict
from mindformers_ixc.generation.requests import read_requests
from mindformers_ixc.generation.shares import Share

RUN = {"model": "m"}


class Answering:
    """Stands for an assistant: answers with the question in capitals, and can be killed."""

    def __init__(self, die_after=100):
        self.asked, self.die_after = [], die_after

    def encode(self, question):
        return question["query"]

    def answer_samples(self, samples, mode, **options):
        if self.die_after == 0:
            raise KeyboardInterrupt
        self.die_after -= 1
        self.asked += samples
        return [sample.upper() for sample in samples]


@pytest.fixture
def requests(tmp_path):
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps({"query": one}) + "\n" for one in "abcdefghi")
                                             + "{not json\n", encoding="utf-8")
    return read_requests(tmp_path / "requests.jsonl")


@pytest.fixture
def replica(monkeypatch, requests, tmp_path):
    """Runs one of several replicas."""
    here = threading.local()
    monkeypatch.setattr(predicting, "rank", lambda: getattr(here, "rank", 0))
    monkeypatch.setattr(predicting, "LOOK_S", 0.01)

    def run(number, answering, barrier, count):
        monkeypatch.setattr(predicting, "barrier", barrier)
        here.rank = number
        return predict(lambda: answering, requests, tmp_path, RUN, 2, "base", {}, count)

    return run


@pytest.fixture
def ranks(replica):
    """Runs all replicas at once; gives what each returned."""
    def run(*answering):
        barrier, count = threading.Barrier(len(answering)).wait, len(answering)
        with ThreadPoolExecutor(count) as pool:
            waiting = [pool.submit(replica, number, one, barrier, count) for number, one in enumerate(answering)]
            return [one.result(120) for one in waiting]

    return run


def whole(folder):
    return (folder / "predictions.jsonl").read_text(encoding="utf-8")


@pytest.fixture
def alone(requests, tmp_path_factory):
    """The file of a single process."""
    folder = tmp_path_factory.mktemp("alone")
    predict(Answering, requests, folder, RUN, 2, "base", {})
    return whole(folder)


@pytest.mark.parametrize("count", [2, 3])
def test_each_answers_its_share_and_one_file_in_order_comes_out(ranks, tmp_path, alone, count):
    answering = [Answering() for _ in range(count)]
    found = ranks(*answering)
    assert whole(tmp_path) == alone
    assert found == [[json.loads(line) for line in alone.splitlines()]] * count
    # of a batch of one question and a bad line the second row is the first one again
    assert sorted(set("".join("".join(one.asked) for one in answering))) == list("abcdefghi")
    assert all(answering[0].asked.count(one) == 0 for one in answering[1].asked)
    assert {path.name for path in tmp_path.iterdir()} == {"predictions.jsonl", "predictions.run.json",
                                                          "requests.jsonl"}
    assert ranks(None, None) == found[:2]         # finished: nothing is loaded


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_replicas_left_that_died_is_taken_over(replica, ranks, requests, tmp_path, alone, count):
    Share(tmp_path, requests, RUN, 0).add([0], [{"answer": "A"}])
    second = Answering(die_after=1)
    with pytest.raises(KeyboardInterrupt):
        replica(1, second, lambda: None, 2)
    assert not (tmp_path / "predictions.jsonl").exists() and second.asked == ["c", "d"]
    with open(tmp_path / "predictions.share_1.jsonl", "a", encoding="utf-8") as file:
        file.write('{"number": 6, "request"')     # killed while it wrote
    later = [Answering() for _ in range(count)]
    if count == 1:
        predict(lambda: later[0], requests, tmp_path, RUN, 2, "base", {})
    else:
        ranks(*later)
    assert whole(tmp_path) == alone
    asked = "".join("".join(one.asked) for one in later)
    assert not set(asked) & set("acd") and set("befghi") <= set(asked)
    assert not list(tmp_path.glob("predictions.share*"))


def test_what_a_single_process_left_is_taken_over(ranks, requests, tmp_path, alone):
    with pytest.raises(KeyboardInterrupt):
        predict(lambda: Answering(die_after=2), requests, tmp_path, RUN, 2, "base", {})
    answering = [Answering(), Answering()]
    ranks(*answering)
    assert whole(tmp_path) == alone
    assert not set("abcd") & set("".join("".join(one.asked) for one in answering))
    assert not list(tmp_path.glob("predictions.part*"))


def test_answers_of_another_run_are_refused(requests, tmp_path):
    share = Share(tmp_path, requests, RUN, 0)
    share.add([3], [{"answer": "D"}])
    with pytest.raises(DataError, match=r"predictions\.share_0\.jsonl holds answers of another model"):
        Share(tmp_path, requests, {"model": "other"}, 1)
    with pytest.raises(DataError, match=r"predictions\.share_0\.jsonl: an answer to another request"):
        Share(tmp_path, requests[::-1], RUN, 1)
    with pytest.raises(DataError, match=r"predictions\.share_0\.jsonl: an answer to another request"):
        Share(tmp_path, requests[:3], RUN, 1)


def test_ranks_of_one_replica_name_what_several_have_left(requests, tmp_path, monkeypatch):
    Share(tmp_path, requests, RUN, 1).add([3], [{"answer": "D"}])
    monkeypatch.setattr(predicting, "is_parallel", lambda: True)
    with pytest.raises(DataError, match=r"predictions\.share_1\.jsonl holds answers of a run of several replicas"):
        predict(Answering, requests, tmp_path, RUN, 2, "base", {})
