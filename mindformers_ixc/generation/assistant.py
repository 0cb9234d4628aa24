"""A model with its processor: questions and pictures in, answers out."""
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from mindformers_ixc.checkpoint.model_directory import load_model
from mindformers_ixc.config import MODE_ADAPTERS, ConfigError
from mindformers_ixc.generation.engine import InferenceEngine
from mindformers_ixc.generation.sampling import GenerationError, GenerationOptions
from mindformers_ixc.generation.search import beam_search, decode_steps, greedy_or_sample
from mindformers_ixc.generation.text import TextStream
from mindformers_ixc.processing.processor import EncodedSample, IXC25Processor
from mindformers_ixc.processing.prompt import END_OF_TURN


class Assistant:
    """Answers questions about pictures.

    Args:
        model: `IXC25ForCausalLM` in evaluation mode.
        processor: its processor; without one only `generate` works.

    Raises:
        ConfigError: when the tokenizer has more pieces than the model.
    """

    def __init__(self, model, processor: IXC25Processor | None):
        pieces = 0 if processor is None else len(processor.tokenizer)
        if pieces > model.config.vocab_size:
            raise ConfigError(f"The tokenizer has {pieces} pieces, more than the model's vocab_size "
                              f"{model.config.vocab_size}; they do not belong together.")
        self.model, self.processor = model, processor
        self.engine = InferenceEngine(model)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike, **overrides) -> Assistant:
        """Loads a model directory (`config.json`, tokenizer, safetensors).

        Args:
            directory: the model directory.
            **overrides: runtime fields of `IXC25Config`.
        """
        return cls(load_model(directory, **overrides), IXC25Processor.from_pretrained(str(directory)))

    @property
    def stop_token_ids(self) -> tuple[int, int]:
        """Ids that end an answer: `</s>` and the end of a turn."""
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)

    def generate(self, samples: Sequence[EncodedSample], options: GenerationOptions,
                 mode: str = "base") -> list[list[int]]:
        """Continues prompts.

        Args:
            samples: encoded prompts, answered as one batch.
            options: decoding options, stop ids included.
            mode: task LoRAs in use, `base`, `write` or `web`.

        Returns:
            New token ids of each prompt, with the stop id that ended it, if any.

        Raises:
            ConfigError: for an unknown mode or one whose task LoRAs the model lacks.
        """
        decoder = self._decoder(samples, options, mode)
        search = beam_search if options.num_beams > 1 else greedy_or_sample
        return search(decoder, options, len(samples), ended=self._ended(options))

    def _decoder(self, samples: Sequence[EncodedSample], options: GenerationOptions, mode: str):
        if mode not in MODE_ADAPTERS:
            raise ConfigError(f"mode is '{mode}'; the choices are {', '.join(MODE_ADAPTERS)}.")
        missing = [task for task in MODE_ADAPTERS[mode] if task not in self.model.config.task_lora_ranks]
        if missing:
            raise ConfigError(f"mode '{mode}' needs the task LoRAs {missing}, which this model does not have; use mode "
                              "'base'.")
        return self.engine.decoder(list(samples), options.max_new_tokens, mode, options.num_beams)

    def _ended(self, options: GenerationOptions):
        """Test of a row's ids for the stop strings, or `None` when there are none."""
        if not options.stop_strings:
            return None
        return lambda ids: any(stop in self.processor.tokenizer.decode(ids, skip_special_tokens=True)
                               for stop in options.stop_strings)

    def decode(self, ids: Sequence[int], stop_strings: Sequence[str] = ()) -> str:
        """Text of an answer: without what ended it and without outer white space."""
        stream = TextStream(self.processor.tokenizer, self.stop_token_ids, stop_strings)
        return ("".join(stream.push(token) for token in ids) + stream.flush()).strip()

    def _options(self, options: dict) -> GenerationOptions:
        return GenerationOptions(**{"stop_token_ids": self.stop_token_ids, **options})

    def answer(self, questions: Sequence[dict], mode: str = "base", **options) -> list[str]:
        """Answers questions as one batch.

        Args:
            questions: arguments of `IXC25Processor.encode_chat` for each question (`query`, `images`, `history`, ...).
            mode: task LoRAs in use.
            **options: fields of `GenerationOptions`.

        Returns:
            One text a question.
        """
        options = self._options(options)
        samples = [self.processor.encode_chat(**question) for question in questions]
        return [self.decode(ids, options.stop_strings) for ids in self.generate(samples, options, mode)]

    def stream(self, question: dict, mode: str = "base", **options) -> Iterator[str]:
        """Answers one question, giving the text as it comes; no character is split.

        Arguments as in `answer`; who stops iterating stops decoding.

        Raises:
            GenerationError: with several beams, which know their text only at the end.
        """
        options = self._options(options)
        if options.num_beams > 1:
            raise GenerationError(f"num_beams is {options.num_beams}; a stream needs num_beams 1, since beams know "
                                  "their text only at the end.")
        decoder = self._decoder([self.processor.encode_chat(**question)], options, mode)
        text = TextStream(self.processor.tokenizer, self.stop_token_ids, options.stop_strings)
        for (token,) in decode_steps(decoder, options, 1, self._ended(options)):
            piece = text.push(token)
            if piece:
                yield piece
        rest = text.flush()
        if rest.strip():
            yield rest
