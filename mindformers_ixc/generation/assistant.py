"""A model with its processor: questions and images in, answers out."""
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from mindformers_ixc.device import is_parallel
from mindformers_ixc.errors import ConfigError, GenerationError
from mindformers_ixc.fields import MODE_ADAPTERS
from mindformers_ixc.generation.ascend import prepare_inference
from mindformers_ixc.generation.engine import CachedDecoder, InferenceEngine
from mindformers_ixc.generation.extending import FEW_POSITIONS, unavailable
from mindformers_ixc.generation.loading import load_model
from mindformers_ixc.generation.options import GenerationOptions, check_mode, known_options
from mindformers_ixc.generation.preparing import prepare
from mindformers_ixc.generation.requests import REQUEST_KEYS, read_request
from mindformers_ixc.generation.reuse import BLOCK
from mindformers_ixc.generation.sampling import log_softmax
from mindformers_ixc.generation.search import (
    Decoder,
    Ended,
    Watched,
    beam_search,
    decode_steps,
    greedy_or_sample,
)
from mindformers_ixc.generation.store import Store
from mindformers_ixc.generation.text import Streamer, TextStream
from mindformers_ixc.generation.turns import TURNS
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.models.reward import WRITES_NONE
from mindformers_ixc.processing.processor import EncodedSample, Processor
from mindformers_ixc.processing.prompt import END_OF_TURN


class Assistant:
    """Answers questions about images.

    May be used from several threads: whole answers are made one after the other, in the order in which they were asked
    for, streams a token at a time between them.

    Args:
        model: `IXC25ForCausalLM`; it is put in evaluation mode.
        processor: its processor; without one only `generate` works.
        store: what requests take over from earlier ones, which other models may share; by default one of its own of
            `config.reuse_bytes`. `Store(0)` keeps nothing.

    Raises:
        ConfigError: when the tokenizer has more pieces than the model.
        GenerationError: for a reward model.
    """

    def __init__(self, model: IXC25Model, processor: Processor | None, store: Store | None = None):
        if model.config.reward_pooling is not None:
            raise GenerationError(WRITES_NONE)
        pieces = 0 if processor is None else len(processor.tokenizer)
        if pieces > model.config.vocab_size:
            raise ConfigError(f"The tokenizer has {pieces} pieces, more than the model's vocab_size "
                              f"{model.config.vocab_size}; they do not belong together.")
        self.model, self.processor = model, processor
        with TURNS:
            model.set_train(False)   # dropout has no place in an answer
            self.engine = InferenceEngine(model, Store(model.config.reuse_bytes) if store is None else store)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike, image_options: dict | None = None,
                       **overrides: Any) -> Assistant:
        """Loads a model directory (`config.json`, tokenizer, safetensors).

        On a CPU weights of 4, 8 and 16 bits stay in the file, which is mapped.

        Args:
            directory: the model directory.
            image_options: arguments of `ImageProcessor` that replace the directory's: `transparency`, `exif`.
            **overrides: runtime fields of `IXC25Config`; `use_past` is True unless it says otherwise.
        """
        prepare_inference()
        model = load_model(directory, stored=True, **{"use_past": True, **overrides})
        return cls(model, Processor.from_directory(directory, **(image_options or {})))

    def _known_processor(self) -> Processor:
        assert self.processor is not None, "without a processor only generate works"
        return self.processor

    @property
    def stop_token_ids(self) -> tuple[int, int]:
        """Ids that end an answer: `</s>` and the end of a turn."""
        tokenizer = self._known_processor().tokenizer
        return tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)

    def generate(self, samples: Sequence[EncodedSample], options: GenerationOptions, mode: str = "base",
                 streamer: Streamer | None = None) -> list[list[int]]:
        """Continues a batch of prompts by the search that the options ask for.

        Args:
            samples: encoded prompts, answered as one batch.
            options: decoding options, stop ids included.
            mode: task LoRAs in use, a key of `fields.MODE_ADAPTERS`.
            streamer: gets a single prompt's new ids as they come, without the stop id: MindFormers' streamer interface,
                `put(ids)` (the first time an empty prompt) and `end()`.

        Returns:
            New token ids of each prompt, with the stop id that ended it, if any.

        Raises:
            ConfigError: for an unknown mode or one whose task LoRAs the model lacks.
            GenerationError: for a prompt longer than the model, or a streamer with several prompts or beams.
        """
        if streamer is not None and options.num_beams > 1:
            raise GenerationError(f"num_beams is {options.num_beams}; a streamer needs num_beams 1, since beams know "
                                  "their text only at the end.")
        if streamer is not None and len(samples) > 1:
            raise GenerationError(f"A streamer takes one prompt at a time, found {len(samples)}.")
        with TURNS:
            decoder, options = self._decoder(samples, options, mode)
            with closing(decoder):
                if options.num_beams > 1:
                    return beam_search(decoder, options, len(samples), self._ended(options))
                if streamer is None:
                    return greedy_or_sample(decoder, options, len(samples), ended=self._ended(options))
                return self._stream_ids(decoder, options, streamer)

    def _stream_ids(self, decoder: Decoder, options: GenerationOptions, streamer: Streamer) -> list[list[int]]:
        stops = frozenset(options.stop_token_ids)

        def show(tokens: list[int | None]) -> None:
            if tokens[0] not in stops:
                streamer.put(np.array(tokens, np.int32))

        streamer.put(np.zeros(0, np.int32))   # the prompt, which a streamer may skip; it went in as embeddings
        try:
            return greedy_or_sample(decoder, options, 1, show, self._ended(options))
        finally:
            streamer.end()

    @property
    def longest(self) -> int:
        """Positions that prompt and answer may have together.

        The public model, trained on 24 576, is used up to 96 K (arXiv 2407.03320): four times as many, by dynamic NTK.
        """
        config = self.model.config
        return config.max_position_embeddings * (4 if config.rope_scaling else 1)

    def draw(self, sample: EncodedSample, options: GenerationOptions, count: int,
             mode: str = "base") -> list[tuple[list[int], list[float]]]:
        """Samples several answers to one prompt as one batch.

        Args:
            sample: encoded prompt.
            options: decoding options, stop ids included.
            count: of answers; each has random numbers of its own, which follow from the options' seed.
            mode: task LoRAs in use.

        Returns:
            New token ids of each answer, with the stop id that ended it, if any, and the log-probability of each at
            temperature 1.
        """
        if self.engine.reuse is not None and len(sample.input_ids) > BLOCK:
            # alone at first, so that all rows begin with what is then known of the prompt
            with TURNS, closing(self._decoder([sample], options, mode)[0]) as alone:
                alone.prefill()
        return self.draw_groups([sample], options, count, mode)[0]

    def draw_groups(self, samples: Sequence[EncodedSample], options: GenerationOptions, count: int, mode: str = "base",
                    seeds: Sequence[Any] | None = None) -> list[list[tuple[list[int], list[float]]]]:
        """Samples several answers to each of some prompts as one batch.

        Args:
            samples: encoded prompts.
            options: decoding options, stop ids included.
            count: of answers to each prompt.
            mode: task LoRAs in use.
            seeds: what the random numbers of each prompt follow from (`numpy.random.SeedSequence`); of a single prompt
                the options' seed by default.

        Returns:
            For each prompt what `draw` gives.
        """
        with TURNS:
            decoder, options = self._decoder(samples, options, mode, count)      # refuses more than there is memory for
            drawn: list[tuple[list[int], list[float]]] = [([], []) for _ in range(count * len(samples))]
            generators = [np.random.default_rng(one) for seed in seeds or [options.seed]
                          for one in np.random.SeedSequence(seed).spawn(count)]
            with closing(decoder):
                watched = Watched(decoder)
                for shown in decode_steps(watched, options, len(drawn), self._ended(options), generators):
                    logps = log_softmax(watched.logits.astype(np.float64))
                    for row, token in enumerate(shown):
                        if token is not None:
                            drawn[row][0].append(token)
                            drawn[row][1].append(float(logps[row, token]))
        return [drawn[first:first + count] for first in range(0, len(drawn), count)]

    def _decoder(self, samples: Sequence[EncodedSample], options: GenerationOptions, mode: str,
                 rows: int | None = None) -> tuple[CachedDecoder, GenerationOptions]:
        """A decoder, and the options with no more new tokens than the model has positions left.

        Each prompt has so many rows, by default as many as beams.
        """
        check_mode("mode", mode)
        missing = [task for task in MODE_ADAPTERS[mode] if task not in self.model.config.task_lora_ranks]
        if missing:
            raise ConfigError(f"mode '{mode}' needs the task LoRAs {missing}, which this model does not have; use mode "
                              "'base'.")
        if options.prompt_lookup and unavailable():
            raise GenerationError(f"prompt_lookup is {options.prompt_lookup}, but {unavailable()}. Leave it out.")
        longest = max(len(sample.input_ids) for sample in samples)
        self._check_length(longest)
        options = replace(options, max_new_tokens=min(options.max_new_tokens, self.longest - longest))
        if is_parallel() and options.seed is None:
            options = replace(options, seed=0)      # every rank draws, and all must draw alike
        beams = options.num_beams if rows is None else rows
        return self.engine.decoder(list(samples), options.max_new_tokens, mode, beams), options

    def _check_length(self, positions: int) -> None:
        if positions >= self.longest:
            raise GenerationError(f"The prompt has {positions} positions; this model takes {self.longest} of prompt "
                                  "and answer together. Shorten it, or lower hd_num or the number of pictures.")

    def prepare(self, positions: int, max_new_tokens: int, mode: str = "base") -> None:
        """Compiles what the next question of a chat needs, short or longer, for whoever is idle until it comes.

        Args:
            positions: of the chat so far.
            max_new_tokens: new tokens of the next answer at most.
            mode: task LoRAs in use.
        """
        for question in (FEW_POSITIONS // 4, FEW_POSITIONS):
            prepare(self.engine, min(positions + question + max_new_tokens, self.longest), mode)

    def _ended(self, options: GenerationOptions) -> Ended | None:
        """Test of a row's ids for the stop strings, or `None` when there are none."""
        if not options.stop_strings:
            return None
        tokenizer = self._known_processor().tokenizer
        return lambda ids: any(stop in tokenizer.decode(ids, skip_special_tokens=True) for stop in options.stop_strings)

    def has_ended(self, ids: Sequence[int], options: GenerationOptions) -> bool:
        """Whether the model ended an answer, by a stop id or a stop string; if not, it was cut."""
        ended = self._ended(options)
        return bool(ids) and (ids[-1] in options.stop_token_ids or (ended is not None and ended(list(ids))))

    def decode(self, ids: Sequence[int], stop_strings: Sequence[str] = ()) -> str:
        """Text of an answer: without what ended it and without outer white space."""
        stream = TextStream(self._known_processor().tokenizer, self.stop_token_ids, stop_strings)
        return ("".join(stream.push(token) for token in ids) + stream.flush()).strip()

    def _options(self, options: dict) -> GenerationOptions:
        return GenerationOptions(**{"stop_token_ids": self.stop_token_ids, **known_options(options)})

    def answer(self, questions: Sequence[dict], mode: str = "base", **options: Any) -> list[str]:
        """Answers questions as one batch.

        Args:
            questions: arguments of `Processor.encode_chat` for each question (`query`, `images`, `history`, ...).
            mode: task LoRAs in use.
            **options: fields of `GenerationOptions`.

        Returns:
            One text a question.
        """
        return self.answer_samples([self.encode(question) for question in questions], mode, **options)

    def encode(self, question: dict) -> EncodedSample:
        """A question as a prompt this model takes.

        Raises:
            PromptError: for a value of the wrong type, by name.
            ImageError: for a picture that cannot be read.
            GenerationError: when it is longer than the model.
        """
        known = read_request({key: value for key, value in question.items() if key in REQUEST_KEYS})
        others = {key: value for key, value in question.items() if key not in REQUEST_KEYS}
        sample = self._known_processor().encode_chat(**known, **others)
        self._check_length(len(sample.input_ids))
        return sample

    def answer_samples(self, samples: Sequence[EncodedSample], mode: str = "base", **options: Any) -> list[str]:
        """Answers encoded prompts as one batch; further arguments as in `answer`."""
        chosen = self._options(options)
        return [self.decode(ids, chosen.stop_strings) for ids in self.generate(samples, chosen, mode)]

    def reply(self, question: dict, options: GenerationOptions, mode: str = "base",
              streamer: Streamer | None = None, total: int | None = None) -> str:
        """Answers one question; an answer that would not fit is cut, not refused.

        Args:
            question: as in `answer`.
            options: decoding options, stop ids included.
            mode: task LoRAs in use.
            streamer: as in `generate`.
            total: positions of prompt and answer together at most.

        Raises:
            GenerationError: when the prompt alone fills `total`.
        """
        sample = self.encode(question)
        if total is not None:
            length = len(sample.input_ids)
            if length >= total:
                raise GenerationError(f"The prompt has {length} positions, but max_length, which counts prompt and "
                                      f"answer, is {total}; raise it or shorten the prompt.")
            options = replace(options, max_new_tokens=min(options.max_new_tokens, total - length))
        return self.decode(self.generate([sample], options, mode, streamer)[0], options.stop_strings)

    def stream(self, question: dict | EncodedSample, mode: str = "base", **options: Any) -> Iterator[str]:
        """Answers one question, or what `encode` made of it, giving the text as it comes; no character is split.

        Arguments as in `answer`; who stops iterating stops decoding. Several streams may be read in turns, and others
        may ask in between: each stream has keys and values of its own.

        Raises:
            GenerationError: with several beams, which know their text only at the end; at the next text, when the
                engine was reset meanwhile.
        """
        chosen = self._options(options)
        if chosen.num_beams > 1:
            raise GenerationError(f"num_beams is {chosen.num_beams}; a stream needs num_beams 1, since beams know "
                                  "their text only at the end.")
        sample = question if isinstance(question, EncodedSample) else self.encode(question)
        decoder, chosen = self._decoder([sample], chosen, mode)
        text = TextStream(self._known_processor().tokenizer, self.stop_token_ids, chosen.stop_strings)
        with closing(decoder):
            for (token,) in decode_steps(decoder, chosen, 1, self._ended(chosen)):
                assert token is not None        # decoding ends with its only row
                piece = text.push(token)
                if piece:
                    yield piece
        rest = text.flush()
        if rest.strip():
            yield rest
