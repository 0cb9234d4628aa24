"""The trainer: MindFormers' causal-language-modelling trainer, plus what a vision-language model needs around it."""
from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import mindspore as ms
from mindformers.models.build_tokenizer import build_tokenizer
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerConfig, MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_output_root_path
from mindformers.trainer.causal_language_modeling import CausalLanguageModelingTrainer

from mindformers_ixc.checkpoint.model_directory import save_model_directory
from mindformers_ixc.config import ConfigError
from mindformers_ixc.data.conversations import DataError
from mindformers_ixc.data.requests import read_requests
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.predict import predict
from mindformers_ixc.generation.public import check_mode, known_options
from mindformers_ixc.generation.sampling import GenerationOptions
from mindformers_ixc.models.ixc25 import IXC25ForCausalLM
from mindformers_ixc.training.parts import grouped_schedule, parts_table, rates_table, train_only
from mindformers_ixc.training.wrapper import portable_wrapper

# Requests answered at once by run_mode predict, unless the YAML's predict_batch_size says otherwise.
PREDICT_BATCH_SIZE = 4

# Fields of the YAML's model section that run_mode predict takes; everything else comes from the model directory.
INFERENCE_FIELDS = ("use_past", "block_size", "num_blocks", "compute_dtype", "param_init_type",
                    "layernorm_compute_type", "softmax_compute_type")


def check_sections_agree(config) -> None:
    """Checks that data section and model section of a YAML describe the same shapes and vocabulary.

    Args:
        config: the run's `MindFormerConfig`.

    Raises:
        ConfigError: naming both keys and both values.
    """
    model, data = config.model.model_config, config.train_dataset
    vision = model.vision_config or {}
    pairs = [("seq_length", model.seq_length, data.seq_length), ("max_tiles", model.max_tiles, data.max_tiles),
             ("image_size", vision.get("image_size"), data.image_size),
             ("patch_size", vision.get("patch_size"), data.patch_size)]
    for key, ours, theirs in pairs:
        if ours is not None and theirs is not None and ours != theirs:
            raise ConfigError(f"model.model_config has {key} {ours} but train_dataset has {key} {theirs}; the graph "
                              "has one static shape, so give both the same value (a YAML anchor does it).")
    pieces = len(build_tokenizer(dict(data.tokenizer)))
    if model.vocab_size is not None and pieces > model.vocab_size:
        raise ConfigError(f"The tokenizer {data.tokenizer.vocab_file} has {pieces} pieces, more than "
                          f"model.model_config.vocab_size {model.vocab_size}; raise vocab_size or take the model's "
                          "own tokenizer.")


@MindFormerRegister.register(MindFormerModuleType.TRAINER)
class IXC25Trainer(CausalLanguageModelingTrainer):
    """Trains IXC2.5 from YAML and leaves a model directory behind; answers questions in run_mode predict.

    Args:
        model_name: MindFormers' name for the recipe; only used in its logs.
    """

    def create_network(self, default_args=None):
        """Builds the network, freezes what `train_parts` leaves out and prints what trains.

        Raises:
            ConfigError: when `train_parts` names a part of which nothing can train.
        """
        network = super().create_network(default_args=default_args)
        if isinstance(network, IXC25ForCausalLM) and self.config.run_mode != "predict":
            if self.config.get("train_parts") is not None:
                train_only(network, self.config.train_parts)
            print(parts_table(network), file=sys.stderr, flush=True)
        return network

    def create_optimizer_scheduler(self, network, model_params):
        """Builds the optimizer; `part_learning_rates` becomes MindFormers' `grouped_lr_schedule`."""
        section = self.config.get("part_learning_rates")
        if section:
            schedule = dict(self.config.lr_schedule)
            self.config.grouped_lr_schedule = MindFormerConfig(**grouped_schedule(self.real_model, schedule, section))
            print(rates_table(self.real_model, schedule, section), file=sys.stderr, flush=True)
        return super().create_optimizer_scheduler(network, model_params)

    def create_model_wrapper(self, network, optimizer):
        """Builds the train-step cell, choosing the portable one where there is no Ascend device."""
        wrapper = self.config.runner_wrapper
        wrapper.type = portable_wrapper(wrapper.type)
        return super().create_model_wrapper(network, optimizer)

    def train(self, config=None, network=None, dataset=None, wrapper=None, optimizer=None, callbacks=None, **kwargs):
        """Trains, then writes `<output_dir>/model`; arguments as in MindFormers.

        Raises:
            ConfigError: when data and model section of the YAML contradict each other.
            DataError: when too many pictures turn out damaged.
        """
        check_sections_agree(config)
        try:
            super().train(config=config, network=network, dataset=dataset, wrapper=wrapper, optimizer=optimizer,
                          callbacks=callbacks, **kwargs)
        except RuntimeError as error:
            # MindSpore wraps what a data worker raises into its own report of three call stacks
            sentence = re.search(r"^DataError: (.+?)$", str(error), re.MULTILINE)
            if sentence is None:
                raise
            raise DataError(sentence[1]) from error
        table = getattr(self.train_dataset, "conversations", None)
        if table is not None and table.bad_samples:
            logger.warning(f"{table.bad_samples} of {len(table)} samples had damaged pictures and were left out.")
        self._save_model(table)

    def _save_model(self, table) -> None:
        if ms.get_auto_parallel_context("parallel_mode") in ("semi_auto_parallel", "auto_parallel"):
            logger.info("Every rank has saved its own part; join them with MindSpore's unified_safetensors.")
            return
        target = os.path.join(get_output_root_path(), "model")
        data = self.config.train_dataset
        save_model_directory(self.real_model, target, tokenizer_file=data.tokenizer.vocab_file, hd_num=data.hd_num)
        picture, question = "PICTURE", "QUESTION"
        sample = next((s for s in (table.samples if table else []) if len(s.images) == 1), None)
        if sample is not None:
            picture = sample.images[0]
            question = next(text for role, text in sample.turns if role == "user")
        print(f"The trained model is in {target}. Ask it about a picture:\n"
              f'    mindformers chat --model {target} --image {picture} "{question}"', file=sys.stderr, flush=True)

    def predict(self, config=None, input_data=None, network=None, tokenizer=None, **kwargs):
        """Answers the questions of a JSON-lines file with the model directory `load_checkpoint`.

        Args:
            config: the run's configuration; `load_checkpoint` must be a model directory.
            input_data: JSON-lines file of requests, see `mindformers_ixc.data.requests`.
            network: as in MindFormers; unused, the directory says what the model is.
            tokenizer: as in MindFormers; unused.
            **kwargs: ignored.

        Returns:
            `{"request": line, "answer": text}` or `{"request": line, "error": sentence}` for each line, in order; they
            are also in `<output_dir>/predictions.jsonl`. A run that was interrupted goes on where it stopped.

        Raises:
            DataError: when the output folder holds answers to other requests, or of another model or options.
        """
        options = dict(config.get("generation") or {"max_new_tokens": 64})
        size = config.predict_batch_size or PREDICT_BATCH_SIZE
        run = {"model": str(Path(config.load_checkpoint).resolve()), "generation": dict(options)}
        mode = options.pop("mode", "base")
        check_mode("generation.mode", mode)
        GenerationOptions(**known_options(dict(options)))      # said before a model is loaded
        folder = get_output_root_path()
        section = dict(config.model.model_config) if config.model else {}
        fields = {key: section[key] for key in INFERENCE_FIELDS if key in section}
        answers = predict(lambda: Assistant.from_directory(config.load_checkpoint, **fields),
                          read_requests(input_data), folder, run, size, mode, options)
        failed = sum("error" in answer for answer in answers)
        note = f" {failed} of {len(answers)} requests failed; their lines have an 'error'." if failed else ""
        print(f"The answers are in {folder}/predictions.jsonl.{note}", file=sys.stderr, flush=True)
        return answers
