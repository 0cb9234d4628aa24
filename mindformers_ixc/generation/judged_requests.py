"""Answers to be scored as files give them, checked by name, and their scores."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from mindformers_ixc.errors import PromptError
from mindformers_ixc.generation.requests import Request, error_sentence, read_request
from mindformers_ixc.generation.scoring import Scorer
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.processing.judged import turns_of
from mindformers_ixc.processing.messages import before_answer, read_answer
from mindformers_ixc.processing.prompt import check_text

# What a line may hold beside its question and answers: what predict and this command write.
WRITTEN = ("score", "scores", "samples", "logp", "tokens", "finished")


def read_judged(value: object) -> dict:
    """A question with the answers to it, as arguments of `Processor.encode_chat` and `answers`.

    Args:
        value: a request of `requests.read_request` with `answer` (a text) or `answers` (a list of texts); messages
            whose last one is the assistant's; or a line that run mode predict wrote, `{"request": ..., "answer": ...}`.

    Returns:
        The request; `answers`, a list; and `several`, whether it was given as one.

    Raises:
        PromptError: naming the key and what was found.
    """
    if not isinstance(value, Mapping):
        raise PromptError(f"a line must be an object with a question and 'answer', found {type(value).__name__}.")
    given = {key: item for key, item in value.items() if key not in WRITTEN}
    if "error" in given:
        raise PromptError("the line holds an error in place of an answer.")
    if "request" in given:
        inner = given.pop("request")
        given = {**(dict(inner) if isinstance(inner, Mapping) else {"query": inner}), **given}
    several = "answers" in given
    if several and "answer" in given:
        raise PromptError("a line has 'answer' or 'answers', found both.")
    answers = given.pop("answers", None) if several else [given.pop("answer")] if "answer" in given else None
    if answers is None and isinstance(given.get("messages"), Sequence) and given["messages"]:
        *_, last = given["messages"]
        if isinstance(last, Mapping) and last.get("role") == "assistant":
            where = f"messages[{len(given['messages']) - 1}]"
            given["messages"], answers = before_answer(given["messages"], where), [read_answer(last, where)]
    if several and not (isinstance(answers, (list, tuple)) and answers):
        raise PromptError(f"answers must be a list of at least one text, found {answers!r:.40}.")
    if answers is None:
        raise PromptError("a line needs 'answer' with a text, 'answers' with a list, or messages whose last one is the "
                          f"assistant's; found {', '.join(map(str, value)) or 'nothing'}.")
    for answer in answers:
        check_text(answer, "answer")
    return {**_question(given), "answers": list(answers), "several": several}


def _question(given: dict) -> dict:
    """The question of a line; pictures may stand beside messages, too."""
    images = given.pop("images", None) if "messages" in given else None
    question = read_request(given)
    if images:
        if question["images"]:
            raise PromptError("pictures stand both in the messages and beside them; give them in one place.")
        question["images"] = read_request({"query": "", "images": images})["images"]
    return question


def score_requests(scorer: Scorer, requests: Sequence[Request], size: int, hd_num: int | None = None,
                   max_length: int | None = None) -> list[dict]:
    """Scores of requests; one that fails gets its error in place of a score, and the others are scored all the same.

    Args:
        scorer: who scores.
        requests: of `read_judged`.
        size: conversations at once.
        hd_num: tiles of a picture at most, where a request says nothing.
        max_length: positions of a conversation at most.

    Returns:
        `{"score": number}`, `{"scores": [...]}` for several answers, or `{"error": sentence}` for each request.

    Raises:
        MemoryError: when there is none left; no single request is to blame.
    """
    results: list[dict] = [{"error": request.error} for request in requests]
    samples: dict[int, list[EncodedSample]] = {}
    for number, request in enumerate(requests):
        question = request.question
        if question is None:
            continue
        try:
            limit = question.get("hd_num") or hd_num
            samples[number] = [scorer.encode(turns_of(question, answer), question["images"], limit, max_length)
                               for answer in question["answers"]]
        except Exception as error:
            results[number] = {"error": error_sentence(error)}
    groups = [list(samples)] if samples else []
    while groups:
        group = groups.pop()
        try:
            scores = iter(scorer.score_samples([one for number in group for one in samples[number]], size))
        except MemoryError:
            raise
        except Exception as error:
            if len(group) == 1:
                results[group[0]] = {"error": error_sentence(error)}
            groups += [[number] for number in group if len(group) > 1]      # one of them is at fault: each by itself
        else:
            for number in group:
                own = [next(scores) for _ in samples[number]]
                several = (requests[number].question or {})["several"]
                results[number] = {"scores": own} if several else {"score": own[0]}
    return results
