"""Requests to answers: prompts are made in threads, answers come from the thread that computes."""
from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from mindformers_ixc import errors
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.processing.prompt import END_OF_TURN
from mindformers_ixc.serving.answering import AnswerWriter, Piece
from mindformers_ixc.serving.messages import encode
from mindformers_ixc.serving.metrics import Metrics
from mindformers_ixc.serving.scheduling import Ended, Job, Refused, Scheduler
from mindformers_ixc.serving.settings import ServerSettings
from mindformers_ixc.serving.wire import ChatRequest, RequestError
from mindformers_ixc.serving.worker import Mailbox, Worker

_OWN_ERRORS = tuple(one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, Exception))


@dataclass
class Exchange:
    """A request that is being answered.

    Attributes:
        request: as it was asked.
        positions: of its prompt.
        image_positions: those of pictures among them.
        job: of the scheduler.
        mailbox: where its pieces come.
        began: when it was read.
        first: seconds to its first token; `None` before.
        tokens: of each answer so far.
        finished: why each answer has ended.
    """

    request: ChatRequest
    positions: int
    image_positions: int
    job: Job
    mailbox: Mailbox
    began: float
    first: float | None = None
    tokens: list[int] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)

    @property
    def usage(self) -> dict:
        """In OpenAI's form; positions of pictures are tokens of the prompt."""
        new = sum(self.tokens)
        return {"prompt_tokens": self.positions, "completion_tokens": new, "total_tokens": self.positions + new,
                "prompt_tokens_details": {"cached_tokens": self.job.known, "image_tokens": self.image_positions}}


class Service:
    """Answers requests by one model.

    Args:
        processor: of the model.
        scheduler: in front of what decodes.
        settings: of the server.
        failed: told errors that were not foreseen.

    Attributes:
        metrics: what `/metrics` shows.
    """

    def __init__(self, processor: Processor, scheduler: Scheduler, settings: ServerSettings,
                 failed: Callable[[BaseException], None] = lambda error: None):
        self.processor, self.scheduler, self.settings, self.failed = processor, scheduler, settings, failed
        self.worker = Worker(scheduler, failed)
        self.metrics = Metrics(scheduler)
        self._readers = ThreadPoolExecutor(settings.limits.reading, "reading")
        self._reading = 0
        tokenizer = processor.tokenizer
        self.stop_token_ids = (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN))

    async def in_reader(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Does something that takes processor time or reads files in one of a few threads.

        Raises:
            RequestError: when too many wait for one.
        """
        if self._reading >= self.settings.limits.queue + self.settings.limits.reading:
            raise RequestError("Too many requests are being read; try again later.", None, 503, "overloaded", 2)
        self._reading += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, work, *arguments)
        finally:
            self._reading -= 1

    async def begin(self, request: ChatRequest, client: str) -> Exchange:
        """Makes a request's prompt and puts it in the queue.

        Args:
            request: to be answered.
            client: who asks; clients take turns.

        Raises:
            RequestError: when it is refused.
        """
        began = time.monotonic()
        if self.scheduler.is_draining:
            raise RequestError("The server is shutting down and takes no new requests.", None, 503, "shutting_down", 5)
        sample, prompt = await self.in_reader(self._encode, request)
        limits, mailbox = self.settings.limits, Mailbox(self.worker)
        room = limits.positions - len(sample.input_ids)
        options = replace(request.options, max_new_tokens=min(request.options.max_new_tokens, room),
                          stop_token_ids=self.stop_token_ids)
        writers = [AnswerWriter(number, options, self.processor.tokenizer, mailbox.put, request.likeliest)
                   for number in range(request.n)]
        job = Job(prompt, request.mode, options.max_new_tokens, list(writers), client, mailbox.put,
                  options.num_beams > 1, began + limits.seconds, options)
        try:
            self.worker.submit(job)
        except Refused as error:
            raise refusal(error) from error
        return Exchange(request, len(sample.input_ids), int(sample.image_mask.sum()), job, mailbox, began, None,
                        [0] * request.n, [""] * request.n)

    def _encode(self, request: ChatRequest) -> tuple[EncodedSample, Any]:
        sample = encode(request, self.processor, self.settings)
        request.messages.clear()        # pictures as text, larger than their files: nobody reads them any more
        return sample, self.scheduler.decoder.prepare(sample)

    async def pieces(self, exchange: Exchange, idle: float | None = None) -> AsyncIterator[Piece | None]:
        """What comes of a request; `None` after `idle` seconds of silence.

        Raises:
            RequestError: when it fails.
        """
        while True:
            try:
                item = await asyncio.wait_for(exchange.mailbox.queue.get(), idle)
            except asyncio.TimeoutError:
                yield None
                continue
            if item is None:
                self.metrics.answered(time.monotonic() - exchange.began)
                return
            if isinstance(item, Exception):
                raise self._error(item)
            if exchange.first is None:
                exchange.first = time.monotonic() - exchange.began
                self.metrics.began(exchange.first)
            exchange.tokens[item.number] = item.tokens
            exchange.finished[item.number] = item.finished
            yield item

    def leave(self, exchange: Exchange) -> None:
        """Says that nobody waits for a request any more; nothing happens to one that has ended."""
        if not exchange.job.has_ended:
            self.worker.cancel(exchange.job)

    def _error(self, error: Exception) -> RequestError:
        if isinstance(error, Refused):
            return refusal(error)
        if isinstance(error, Ended):
            return RequestError("The request was ended.", None, 499, "cancelled")
        if isinstance(error, _OWN_ERRORS):
            # the request was read and found right before, so what fails now is the server's: scores that are no numbers
            return RequestError(str(error), None, 500, "failed")
        self.failed(error)
        return RequestError("The server failed to answer this request; its log has more.", None, 500, "failed")

    def close(self) -> None:
        """Ends the threads that read."""
        self._readers.shutdown(wait=False)


def refusal(error: Refused) -> RequestError:
    """A scheduler's refusal as the client gets it."""
    codes = {429: "too_many_requests", 503: "overloaded", 504: "timeout"}
    return RequestError(str(error), None, error.status, codes.get(error.status), error.retry_after)
