"""A model with its processor: questions and pictures in, answers out."""
from __future__ import annotations

import os
from collections.abc import Sequence

from mindformers_ixc.checkpoint.model_directory import load_model
from mindformers_ixc.config import MODE_ADAPTERS, ConfigError
from mindformers_ixc.generation.engine import InferenceEngine
from mindformers_ixc.generation.sampling import GenerationOptions
from mindformers_ixc.generation.search import beam_search, greedy_or_sample
from mindformers_ixc.processing.processor import EncodedSample, IXC25Processor
from mindformers_ixc.processing.prompt import END_OF_TURN


class Assistant:
    """Answers questions about pictures.

    Args:
        model: `IXC25ForCausalLM` in evaluation mode.
        processor: its processor.
    """

    def __init__(self, model, processor: IXC25Processor):
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

    def generate(self, samples: Sequence[EncodedSample], options: GenerationOptions, mode: str = "base",
                 on_tokens=None) -> list[list[int]]:
        """Continues prompts.

        Args:
            samples: encoded prompts, answered as one batch.
            options: decoding options; without stop ids the model's own are used.
            mode: task LoRAs in use, `base`, `write` or `web`.
            on_tokens: called with every step's ids (one a prompt); a true result ends decoding.

        Returns:
            New token ids of each prompt, with the stop id that ended it, if any.

        Raises:
            ConfigError: for an unknown mode or one whose task LoRAs the model lacks.
        """
        self._check_mode(mode)
        decoder = self.engine.decoder(list(samples), options.max_new_tokens, mode, options.num_beams)
        if options.num_beams > 1:
            return beam_search(decoder, options, len(samples))
        return greedy_or_sample(decoder, options, len(samples), on_tokens)

    def _check_mode(self, mode: str) -> None:
        if mode not in MODE_ADAPTERS:
            raise ConfigError(f"mode is '{mode}'; the choices are {', '.join(MODE_ADAPTERS)}.")
        missing = [task for task in MODE_ADAPTERS[mode] if task not in self.model.config.task_lora_ranks]
        if missing:
            raise ConfigError(f"mode '{mode}' needs the task LoRAs {missing}, which this model does not have; use mode "
                              "'base'.")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer: stop tokens removed, outer white space stripped."""
        stops = self.stop_token_ids
        return self.processor.tokenizer.decode([i for i in ids if i not in stops], skip_special_tokens=True).strip()

    def answer(self, questions: Sequence[dict], mode: str = "base", **options) -> list[str]:
        """Answers questions as one batch.

        Args:
            questions: arguments of `IXC25Processor.encode_chat` for each question (`query`, `images`, `history`, ...).
            mode: task LoRAs in use.
            **options: fields of `GenerationOptions`.

        Returns:
            One text a question.
        """
        options.setdefault("stop_token_ids", self.stop_token_ids)
        samples = [self.processor.encode_chat(**question) for question in questions]
        return [self.decode(ids) for ids in self.generate(samples, GenerationOptions(**options), mode)]
