"""The trainer: MindFormers' causal-language-modelling trainer, plus what a vision-language model needs around it."""
from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

from mindformers.models.build_tokenizer import build_tokenizer
from mindformers.tools.register import MindFormerConfig, MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_output_root_path
from mindformers.trainer.causal_language_modeling import CausalLanguageModelingTrainer

from mindformers_ixc.checkpoint.model_directory import save_model_directory
from mindformers_ixc.device import is_parallel, rank, reports_loss, share_results
from mindformers_ixc.errors import ConfigError, DataError
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.options import GenerationOptions, check_mode, known_options
from mindformers_ixc.generation.predict import predict
from mindformers_ixc.generation.requests import read_requests
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.models.preference import REPORT_SIZE, IXC25ForPreference
from mindformers_ixc.parallel.degrees import inference_layout
from mindformers_ixc.parameters import part_of
from mindformers_ixc.training.checkpoints import use_safe_checkpoints
from mindformers_ixc.training.evaluation import Evaluation
from mindformers_ixc.training.log import TrainingLog
from mindformers_ixc.training.parts import grouped_schedule, parts_table, rates_table, stop_dropout, train_only
from mindformers_ixc.training.wrapper import averaged_weights, portable_wrapper

logger = logging.getLogger(__name__)

# Requests answered at once by run_mode predict, unless the YAML's predict_batch_size says otherwise.
PREDICT_BATCH_SIZE = 4

# Fields of the YAML's model section that run_mode predict takes; everything else comes from the model directory.
INFERENCE_FIELDS = ("use_past", "block_size", "num_blocks", "compute_dtype", "param_init_type",
                    "layernorm_compute_type", "softmax_compute_type", "vision_parallel", "offset")


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
             ("packing", bool(model.packing), bool(data.packing)),
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


def check_micro_batches(config) -> None:
    """Lets several micro batches of a parallel step weigh as their labelled positions, in place.

    Raises:
        ConfigError: for preference pairs, whose report MindFormers' accumulating step does not take.
    """
    accumulated = config.runner_config.gradient_accumulation_steps or 1
    if not is_parallel() or (accumulated == 1 and (config.parallel_config.pipeline_stage or 1) == 1):
        return
    if config.model.arch.type == "IXC25ForPreference":
        raise ConfigError(f"runner_config.gradient_accumulation_steps is {accumulated}, but preference pairs are not "
                          "accumulated in parallel runs; raise batch_size or data_parallel instead.")
    config.calculate_per_token_loss = True


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
        table = getattr(self.train_dataset, "conversations", None)
        if self.config.run_mode != "predict" and table is not None:
            self.config.model.model_config.num_sources = len(table.source_names)
        network = super().create_network(default_args=default_args)
        # a PET model holds the model it trains
        model = getattr(network, "network", network)
        if isinstance(model, IXC25Model) and self.config.run_mode != "predict":
            if self.config.get("train_parts") is not None:
                train_only(model, self.config.train_parts)
            if not any(part_of(parameter.name) == "partial_lora" for parameter in model.trainable_params()):
                stop_dropout(model)
            print(parts_table(model), file=sys.stderr, flush=True)
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
        """Builds the train-step cell: MindFormers' own, or this package's where it is not enough."""
        section, columns = self.config.runner_wrapper, list(self.config.train_dataset.input_columns)
        kind = self._report_kind()
        if self._micro_batches > 1 or section.get("ema_decay") is not None or kind:
            if is_parallel() and kind != "preference":
                raise ConfigError("runner_wrapper.ema_decay and the column source work in stand-alone runs only.")
            section.type = "IXC25TrainOneStepCell"
            section.micro_batches = self._micro_batches
            if kind == "preference" and not is_parallel():
                section.report_shape = (REPORT_SIZE,)
            elif kind != "preference":
                section.labels_column = columns.index("labels")
                section.report_shape = (2, len(self.train_dataset.conversations.source_names)) if kind else None
        section.type = portable_wrapper(section.type)
        return super().create_model_wrapper(network, optimizer)

    def _report_kind(self) -> str | None:
        """What the network reports beside its loss."""
        if isinstance(self.real_model, IXC25ForPreference):
            return "preference"
        return "sources" if "source" in self.config.train_dataset.input_columns else None

    def create_train_dataset(self, default_args=None):
        """Builds the dataset; batches are as large as all micro batches together."""
        self.config.runner_config.batch_size *= self._micro_batches
        self.global_batch_size = self.global_batch_size * self._micro_batches
        dataset = super().create_train_dataset(default_args)
        if dataset.get_dataset_size() == 0:
            raise DataError(f"train_dataset has fewer samples than a batch of {self.config.runner_config.batch_size}; "
                            "lower batch_size or gradient_accumulation_steps.")
        self._log.bind(dataset, self)
        return dataset

    def train(self, config=None, network=None, dataset=None, wrapper=None, optimizer=None, callbacks=None, **kwargs):
        """Trains, then writes `<output_dir>/model`; arguments as in MindFormers.

        Raises:
            ConfigError: when data and model section of the YAML contradict each other.
            DataError: when too many images turn out damaged.
            TrainingError: when a loss is not finite.
        """
        check_sections_agree(config)
        use_safe_checkpoints()
        check_micro_batches(config)
        # MindFormers accumulates in semi-auto parallel only and would silently not do it here
        self._micro_batches = 1
        if not is_parallel():
            self._micro_batches = config.runner_config.gradient_accumulation_steps or 1
            config.runner_config.gradient_accumulation_steps = 1
        self._log = TrainingLog(get_output_root_path())
        callbacks = [*(callbacks or []), self._log]
        if config.get("evaluation"):
            if is_parallel():
                raise ConfigError("evaluation works in stand-alone runs only; take the section out and evaluate the "
                                  "joined checkpoint (mindformers convert, mindformers eval).")
            callbacks.append(Evaluation(self, dict(config.evaluation), config.train_dataset))
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
        if is_parallel():
            logger.info("Every rank has saved its own part; join them with `mindformers convert`.")
            return
        if not reports_loss():
            return
        folder, model = get_output_root_path(), getattr(self.real_model, "network", self.real_model)
        if not isinstance(model, IXC25Model):
            return
        parts = sorted({part_of(parameter.name) for parameter in model.trainable_params()})
        if self.config.get("train_parts") is not None or self.config.model.model_config.get("pet_config"):
            names = [parameter.name for parameter in model.trainable_params()]
            self.save_directory("trained_parts", names)
            print(f"Of it, {', '.join(parts)} alone are in {folder}/trained_parts; put them on any checkpoint with\n"
                  f"    mindformers merge BASE TARGET --attach {folder}/trained_parts", file=sys.stderr, flush=True)
        self.save_directory("model")
        if self._log.average:
            with averaged_weights(model, self._log.average):
                self.save_directory("model_ema")
        target = os.path.join(folder, "model")
        image, question = "PICTURE", "QUESTION"
        sample = next((s for s in (table.samples if table else []) if len(s.images) == 1), None)
        if sample is not None:
            image = sample.images[0]
            question = next(text for role, text in sample.turns if role == "user")
        print(f"The trained model is in {target}. Ask it about a picture:\n"
              f'    mindformers chat --model {target} --image {image} "{question}"', file=sys.stderr, flush=True)

    def save_directory(self, name: str, parameters: list[str] | None = None) -> None:
        """Writes a model directory below the run's folder, with all parameters or some."""
        data, model = self.config.train_dataset, getattr(self.real_model, "network", self.real_model)
        save_model_directory(model, os.path.join(get_output_root_path(), name), data.tokenizer.vocab_file, data.hd_num,
                             parameters)

    def predict(self, config=None, input_data=None, network=None, tokenizer=None, **kwargs):
        """Answers the questions of a JSON-lines file with the model directory `load_checkpoint`.

        Args:
            config: the run's configuration; `load_checkpoint` must be a model directory.
            input_data: JSON-lines file of requests, see `mindformers_ixc.generation.requests`.
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
        if is_parallel():
            share_results()
            fields["parallel_config"] = inference_layout(config.parallel_config)
        answers = predict(lambda: Assistant.from_directory(config.load_checkpoint, **fields),
                          read_requests(input_data), folder, run, size, mode, options)
        failed = sum("error" in answer for answer in answers)
        note = f" {failed} of {len(answers)} requests failed; their lines have an 'error'." if failed else ""
        if rank() == 0:
            print(f"The answers are in {folder}/predictions.jsonl.{note}", file=sys.stderr, flush=True)
        return answers
