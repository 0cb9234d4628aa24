"""The trainer: MindFormers' causal-language-modelling trainer, plus what a vision-language model needs around it."""
from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mindformers.models.build_tokenizer import build_tokenizer
from mindformers.tools.register import MindFormerConfig, MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_output_root_path
from mindformers.trainer import base_trainer
from mindformers.trainer.causal_language_modeling import CausalLanguageModelingTrainer
from mindspore import Model, nn
from mindspore.train.callback import Callback, RunContext

from mindformers_ixc import interruption, terminal
from mindformers_ixc.checkpoint.model_directory import weights_of, write_model_directory
from mindformers_ixc.checkpoint.start import OVERRIDE, pet_parts
from mindformers_ixc.checkpoint.tensors import LazyTensor
from mindformers_ixc.data.questions import as_typed
from mindformers_ixc.data.rows import ConversationTable
from mindformers_ixc.data.sections import check_shapes
from mindformers_ixc.decoding_options import PREDICT_BATCH_SIZE, check_reward
from mindformers_ixc.device import compute_alone, is_parallel, rank, reports_loss, share_results
from mindformers_ixc.errors import ConfigError, DataError, TrainingError
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.best_of import BestOf, load_scorer
from mindformers_ixc.generation.options import GenerationOptions, check_mode, known_options
from mindformers_ixc.generation.predict import best_batch, predict, predict_run, work_through
from mindformers_ixc.generation.requests import read_requests
from mindformers_ixc.grpo_options import rollout_options
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.models.placement import mark_backward_end
from mindformers_ixc.parallel.degrees import are_replicas, inference_layout
from mindformers_ixc.parameters import part_of
from mindformers_ixc.resources import shown
from mindformers_ixc.training.averaging import averaged_weights
from mindformers_ixc.training.checkpoints import MONITOR, safe_checkpoints
from mindformers_ixc.training.early_stopping import AlreadyOver
from mindformers_ixc.training.evaluation import Evaluation
from mindformers_ixc.training.joining import Joiner, PartsElsewhere
from mindformers_ixc.training.log import StepEnd, TrainingLog, log_options, steps_of
from mindformers_ixc.training.lora import begin_magnitudes, folded_weights, lora_linears, write_adapter
from mindformers_ixc.training.optimizer import native_optimizer
from mindformers_ixc.training.parts import grouped_schedule, parts_table, rates_table, stop_dropout, train_only
from mindformers_ixc.training.progress import header
from mindformers_ixc.training.resume import checkpoints_in, mark_finished
from mindformers_ixc.training.rollout import Rollout, stretch_schedule
from mindformers_ixc.training.run_folder import in_job
from mindformers_ixc.training.starting import load_start
from mindformers_ixc.training.step import GROUPS, StepPlan, plan_step

logger = logging.getLogger(__name__)

# Fields of the YAML's model section that run_mode predict takes; everything else comes from the model directory.
INFERENCE_FIELDS = ("use_past", "block_size", "num_blocks", "reuse_bytes", "cache_dtype", "compute_dtype",
                    "param_init_type", "layernorm_compute_type", "softmax_compute_type", "vision_parallel", "offset",
                    "dynamic_ntk", "fused_norm")


def check_sections_agree(config: MindFormerConfig) -> None:
    """Checks that data section and model section of a YAML describe the same shapes and vocabulary.

    Args:
        config: the run's `MindFormerConfig`.

    Raises:
        ConfigError: naming both keys and both values.
    """
    model, data = config.model.model_config, config.train_dataset
    check_shapes(model, data)
    pieces = len(build_tokenizer(dict(data.tokenizer)))
    if model.vocab_size is not None and pieces > model.vocab_size:
        raise ConfigError(f"The tokenizer {data.tokenizer.vocab_file} has {pieces} pieces, more than "
                          f"model.model_config.vocab_size {model.vocab_size}; raise vocab_size or take the model's "
                          "own tokenizer.")


def how_to_join(folder: str | os.PathLike) -> str:
    """The command that joins what the ranks of a run have saved."""
    source, target = shlex.quote(os.fspath(folder)), shlex.quote(os.path.join(folder, "model"))
    return f"Join the parts with\n    mindformers convert {source} {target} --to hf"


def closing_lines(folder: Path, written: list[str], model: IXC25Model, table: ConversationTable | None) -> str:
    """What a run says at its end: what it has left, and what to type.

    Args:
        folder: of the run.
        written: names of the directories in it.
        model: the trained model.
        table: the training samples, of which one is taken as an example.
    """
    lines = []
    if "trained_parts" in written:
        place, has_pairs = shown(folder / "trained_parts"), bool(lora_linears(model))
        parts = ["pairs of LoRA"] if has_pairs else sorted({str(part_of(parameter.name))
                                                            for parameter in model.trainable_params()})
        line = f"Of it, {', '.join(parts)} alone are in {place}"
        if has_pairs and model.config.reward_pooling is not None:     # they belong to the head, which no base has
            lines.append(f"{line}.")
        else:
            lines += [f"{line}; put them on any checkpoint with",
                      f"    mindformers merge BASE TARGET --{'lora' if has_pairs else 'attach'} {shlex.quote(place)}"]
    model_path = shown(folder / "model")
    if model.config.reward_pooling is not None:
        return "\n".join([*lines, f"The trained model is in {model_path}. It scores answers, a JSON object a line:",
                          f"    mindformers score --model {shlex.quote(model_path)} --data answers.jsonl"])
    single = [] if table is None else np.flatnonzero(table.samples.images == 1)[:1].tolist()
    image, question = as_typed(table.samples[index] for index in single if table is not None)
    lines += [f"The trained model is in {model_path}. Ask it about a picture:",
              f"    mindformers chat --model {shlex.quote(model_path)} --image {image} {question}"]
    return "\n".join(lines)


class ResumableModel(Model):
    """MindSpore's `Model`, which trains nothing when a resumed run is over already; there that is an error."""

    def train(self, epoch, train_dataset, callbacks=None, dataset_sink_mode=False, sink_size=-1, initial_epoch=0):
        """Trains; with no step left this package's callbacks write what is missing. Arguments as there."""
        begun = False
        if initial_epoch < epoch:
            try:
                super().train(epoch, train_dataset, callbacks, dataset_sink_mode, sink_size, initial_epoch)
                return
            except AlreadyOver:
                begun = True
        own = [callback for callback in callbacks or [] if isinstance(callback, (TrainingLog, Evaluation))]
        context = RunContext(_Parameters(train_network=self._train_network, cur_step_num=0))
        for callback in own if not begun else ():
            callback.on_train_begin(context)
        for callback in own:
            callback.on_train_end(context)


class _Parameters(dict):
    """What callbacks are told of a run: entries that are attributes, as MindSpore wants them."""

    __getattr__ = dict.__getitem__


@contextlib.contextmanager
def resumable_model() -> Iterator[None]:
    """Puts `ResumableModel` where MindFormers' trainer takes its model from, for a while; there is no hook."""
    before, base_trainer.Model = base_trainer.Model, ResumableModel
    try:
        yield
    finally:
        base_trainer.Model = before


@MindFormerRegister.register(MindFormerModuleType.TRAINER)
class IXC25Trainer(CausalLanguageModelingTrainer):
    """Trains IXC2.5 from YAML and leaves a model directory behind; answers questions in run_mode predict.

    Args:
        model_name: MindFormers' name for the recipe; only used in its logs.
    """

    def __init__(self, model_name: str | None = None):
        super().__init__(model_name)
        self.plan = StepPlan()
        self.log: TrainingLog | None = None
        self.evaluation: Evaluation | None = None
        self.start = ""

    @property
    def trained_model(self):
        """The model itself, also inside the cells of MindFormers' PET."""
        model = self.real_model
        while not isinstance(model, IXC25Model) and hasattr(model, "network"):
            model = model.network
        return model

    def create_network(self, default_args=None):
        """Builds the network, freezes what `train_parts` leaves out and logs what trains.

        Raises:
            ConfigError: when `train_parts` names a part of which nothing can train.
        """
        # MindFormers takes the type out of the section while it builds
        added = pet_parts(self.config.model.model_config.get("pet_config"))
        with terminal.current.doing("Building the network"):
            network = super().create_network(default_args=default_args)
        model = self.trained_model
        if isinstance(model, IXC25Model) and self.config.run_mode != "predict":
            if self.start:
                with terminal.current.doing(f"Loading the weights of {self.start}"):
                    load_start(model, self.start, dict(self.config.model.model_config),
                               self.config.get(OVERRIDE) or (), added)
            if self.config.get("train_parts") is not None:
                train_only(model, self.config.train_parts)
            if not any(part_of(parameter.name) == "partial_lora" for parameter in model.trainable_params()):
                stop_dropout(model)
            begin_magnitudes(model)
            if is_parallel():
                mark_backward_end(model)
            terminal.current.log(parts_table(model))
        return network

    def create_optimizer_scheduler(self, network: nn.Cell, model_params):
        """Builds the optimizer; `part_learning_rates` becomes MindFormers' `grouped_lr_schedule`."""
        section, model = self.config.get("part_learning_rates"), self.trained_model
        if section:
            schedule = dict(self.config.lr_schedule)
            self.config.grouped_lr_schedule = MindFormerConfig(**grouped_schedule(model, schedule, section))
            terminal.current.log(rates_table(model, schedule, section))
        with native_optimizer(self.config.optimizer, network.trainable_params(), self.plan.ema_decay is not None):
            self.optimizer = self.plan.optimizer(super().create_optimizer_scheduler(network, model_params))
        return self.optimizer

    def create_model_wrapper(self, network: nn.Cell, optimizer: nn.Cell):
        """Builds the train-step cell: MindFormers' own, or this package's where it is not enough."""
        section = self.config.runner_wrapper
        for key, value in self.plan.cell(section.type).items():
            section[key] = value
        if self.log is not None and isinstance(self.trained_model, IXC25Model):
            self.log.header = lambda: header(self)
        cell = super().create_model_wrapper(network, optimizer)
        if self.plan.report == GROUPS and self.log is not None:
            options = rollout_options(self.config.get("rollout"))
            cell.updates = options["updates"]
            cell.rollout = Rollout(self.trained_model, self.train_dataset, options, self.config.seed or 0,
                                   self.plan.micro_batches, self.log)
        return cell

    @staticmethod
    def sort_callbacks(default_callbacks: list[Callback]) -> list[Callback]:
        """MindFormers' order, with the log first: a checkpoint's step has its row when the checkpoint is there.

        Last is what notes the end of a step: neither checkpoints nor evaluations are a wait for data.
        """
        ordered = CausalLanguageModelingTrainer.sort_callbacks(default_callbacks)
        return sorted(ordered, key=lambda callback: isinstance(callback, StepEnd) - isinstance(callback, TrainingLog))

    def create_train_dataset(self, default_args=None):
        """Builds the dataset; it says how many sources there are."""
        with terminal.current.doing("Reading the data"):
            dataset = super().create_train_dataset(default_args)
        if dataset.get_dataset_size() == 0:
            raise DataError(f"train_dataset has fewer samples than a batch of {self.config.runner_config.batch_size}; "
                            "lower batch_size or gradient_accumulation_steps.")
        dataset.plan_sampler.plan.check(self.config.runner_config.epochs or 1)
        self.plan = self.plan.with_sources(dataset.conversations.source_names)
        self.config.model.model_config.num_sources = len(self.plan.sources)
        self.log.bind(dataset, self.plan, self)
        if self.plan.report == GROUPS:
            stretch_schedule(self.config, steps_of(self.config.runner_config, dataset))
        return dataset

    def train(self, config=None, network=None, dataset=None, wrapper=None, optimizer=None, callbacks=None, **kwargs):
        """Trains, then writes `<output_dir>/model`; arguments as in MindFormers.

        A run that was asked to stop saves a checkpoint and writes no model. A resume of a run that has done all its
        steps writes what it has not come to.

        Raises:
            ConfigError: when data and model section of the YAML contradict each other.
            DataError: when too many images turn out damaged.
            TrainingError: when a loss is not finite, or something cannot be written.
        """
        self._take_start(config)
        check_sections_agree(config)
        self.plan = plan_step(config)
        self.plan.put_into(config)
        on_error = config.get("on_save_error") or "stop"
        self.log = TrainingLog(get_output_root_path(), **log_options(config))
        callbacks = [*(callbacks or []), self.log, self.log.step_end]
        if config.get("evaluation"):
            self.evaluation = Evaluation(self, dict(config.evaluation), config.train_dataset)
            callbacks.append(self.evaluation)
        try:
            with safe_checkpoints(on_error) as saved, resumable_model():
                super().train(config=config, network=network, dataset=dataset, wrapper=wrapper, optimizer=optimizer,
                              callbacks=callbacks, **kwargs)
        except RuntimeError as error:
            # MindSpore wraps what a data worker raises into its own report of three call stacks
            sentence = re.search(r"^DataError: (.+?)$", str(error), re.MULTILINE)
            if sentence is None:
                raise
            raise DataError(sentence[1]) from error
        finally:
            self.log.first_step.close()
        if self.log.stopped_after is not None:
            self._say_stopped(self.log.stopped_after)
            return
        table = getattr(self.train_dataset, "conversations", None)
        if table is not None and table.bad_samples:
            logger.warning(f"{table.bad_samples} of {len(table)} samples had damaged pictures or were changed, and "
                           "were left out.")
        try:
            with terminal.current.doing("Writing the model"):
                self._save_model(table, saved.final)
        except OSError as error:
            raise TrainingError(f"Training is done, but its results could not be written to {get_output_root_path()} "
                                f"({error.strerror or error}); the last checkpoint is there. Make room, then write "
                                "them with resume_training.") from error

    def _take_start(self, config: MindFormerConfig) -> None:
        """Takes loading over from MindFormers, which says nothing of missing weights.

        Resumed runs and those whose graphs are cut are left to it: it knows optimizer states, and cuts weights.
        """
        place = config.get("checkpoint")
        start = (place and place.get("load_path")) or config.load_checkpoint
        if not start or config.resume_training or is_parallel():
            return
        self.start, config.load_checkpoint = str(start), ""
        if place and place.get("load_path"):
            place.load_path = ""

    def _say_stopped(self, step: int) -> None:
        """Says after which step the run stopped, and how to go on."""
        interruption.current.stopped = True
        folder = get_output_root_path()
        saved = checkpoints_in(Path(folder) / "checkpoint" / f"rank_{rank()}")
        kept = f"its checkpoint is {saved[-1]}; go on with --resume_training True" if saved else \
            f"nothing was saved, for callbacks has no {MONITOR}"
        number = interruption.current.number
        who = interruption.name_of(number) if number else "The launcher"
        terminal.current.say(f"{who} stopped the run after step {step}; {kept}.")

    def _save_model(self, table: ConversationTable | None, checkpoint: Path | None) -> None:
        """Leaves the trained model as directories, and says what to do with them.

        Args:
            table: the training samples, of which one is taken as an example.
            checkpoint: this process's checkpoint of the last step, if it has one.
        """
        folder, model = Path(get_output_root_path()), self.trained_model
        if not is_parallel() and not reports_loss():
            return      # replicas are alike
        if not isinstance(model, IXC25Model):
            if rank() == 0:
                mark_finished(folder, [])
            return
        if is_parallel() and self.config.get("no_join"):
            self._leave_parts(model)
            return
        written = self._save_joined(model, checkpoint) if is_parallel() else self._save_whole(model)
        if not written:
            return
        if (folder / "best").is_dir():
            written.append("best")
        self._close(closing_lines(folder, written, model, table), written)

    def _close(self, text: str, written: list[str], joined: bool = True) -> None:
        """Says what the run has left, and notes it; of several ranks' output the launcher's is the last."""
        if self.evaluation is not None and self.evaluation.why_over is not None:
            text = f"{self.evaluation.why_over}\n{text}"
        mark_finished(get_output_root_path(), written, text, joined)
        if not in_job():
            terminal.current.say(text)

    def _partial(self, model: IXC25Model) -> list[str] | None:
        """Names of what trained, if that is to be had alone; PET trains parts too."""
        if self.config.get("train_parts") is None and model is self.real_model:
            return None
        return [parameter.name for parameter in model.trainable_params()]

    def _save_whole(self, model: IXC25Model) -> list[str]:
        """Writes directories from memory; returns their names."""
        written, names = ["model"], self._partial(model)
        if names is not None:
            self._write_parts(names, weights_of(model, names))
            written.append("trained_parts")
        self.save_directory("model")
        if self.log is not None and self.log.average:
            with averaged_weights(model, self.log.average):
                self.save_directory("model_ema")
            written.append("model_ema")
        return written

    def _save_joined(self, model: IXC25Model, checkpoint: Path | None) -> list[str]:
        """Joins the ranks' parts to directories; returns their names, none where this rank wrote none."""
        averages = self.log.average if self.log is not None else {}
        try:
            with Joiner(Path(get_output_root_path()), model).joined("model", checkpoint, averages) as whole:
                if whole is None:
                    return []
                written, names = ["model"], self._partial(model)
                if names is not None:
                    self._write_parts(names, whole.weights)
                    written.append("trained_parts")
                self._write_directory("model", whole.weights)
                if whole.averages:
                    self._write_directory("model_ema", {**whole.weights, **whole.averages})
                    written.append("model_ema")
                return written
        except PartsElsewhere as error:
            self._close(f"{error} {how_to_join(get_output_root_path())}", [], joined=False)
            return []

    def _leave_parts(self, model: IXC25Model) -> None:
        """Says how to join what the ranks have saved."""
        if rank() == 0:
            folder = Path(get_output_root_path())
            Joiner(folder, model).leave_unused()
            self._close(f"Every rank's part of the trained model is in {folder}/checkpoint. {how_to_join(folder)}", [],
                        joined=False)

    def save_directory(self, name: str, parameters: list[str] | None = None) -> None:
        """Writes a model directory below the run's folder, with all parameters or some; every rank calls it.

        In a parallel run it is joined, and not written where parts of the model are not to be seen.
        """
        model = self.trained_model
        if not is_parallel():
            if reports_loss():
                self._write_directory(name, weights_of(model, parameters))
            return
        try:
            with Joiner(Path(get_output_root_path()), model).joined(name) as whole:
                if whole is not None:
                    self._write_directory(name, {key: tensor for key, tensor in whole.weights.items()
                                                 if parameters is None or key in parameters})
        except PartsElsewhere as error:
            terminal.current.say(f"{error} So {name} is not written.")

    def _write_parts(self, names: list[str], weights: dict[str, LazyTensor]) -> None:
        """Writes what trained alone; an ordinary LoRA as PEFT keeps it."""
        parts = {name: weights[name] for name in names}
        if lora_linears(self.trained_model):
            target = os.path.join(get_output_root_path(), "trained_parts")
            write_adapter(target, self.trained_model.config.pet_config, self.trained_model, parts)
        else:
            self._write_directory("trained_parts", parts)

    def _write_directory(self, name: str, tensors: dict[str, LazyTensor]) -> None:
        """Writes a directory of weights, all or some; of ordinary pairs those they are folded into."""
        tensors = folded_weights(self.trained_model, tensors)
        data = self.config.train_dataset
        write_model_directory(self.trained_model, tensors, os.path.join(get_output_root_path(), name),
                              data.tokenizer.vocab_file, data.hd_num,
                              {key: data[key] for key in ("transparency", "exif") if data.get(key)})

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
            are also in `<output_dir>/predictions.jsonl`. A run that was interrupted goes on where it stopped. With
            `parallel_config.data_parallel` each replica answers its share, and all get the whole.

        Raises:
            DataError: when the output folder holds answers to other requests, or of another model or options.
        """
        options = dict(config.get("generation") or {"max_new_tokens": 64})
        size = config.predict_batch_size or PREDICT_BATCH_SIZE
        run = predict_run(config.load_checkpoint, options)
        mode = options.pop("mode", "base")
        check_mode("generation.mode", mode)
        best_of, reward = options.pop("best_of", None), options.pop("reward", None)
        GenerationOptions(**known_options(dict(options)))      # said before a model is loaded
        check_reward(best_of, reward, options)
        folder = get_output_root_path()
        section = dict(config.model.model_config) if config.model else {}
        fields = {key: section[key] for key in INFERENCE_FIELDS if key in section}
        replicas = 1
        if is_parallel() and are_replicas(config.parallel_config):
            replicas = config.parallel_config.data_parallel
            compute_alone()
        elif is_parallel():
            share_results()
            fields["parallel_config"] = inference_layout(config.parallel_config)

        def load() -> Assistant:
            return Assistant.from_directory(config.load_checkpoint, **fields)

        requests = read_requests(input_data)
        if best_of is None:
            answers = predict(load, requests, folder, run, size, mode, options, replicas)
        else:
            answers = work_through(lambda: BestOf(load(), best_of, load_scorer(reward, fields)),
                                   lambda best, batch: best_batch(best, batch, mode, options), requests, folder, run,
                                   size, replicas=replicas)
        failed = sum("error" in answer for answer in answers)
        note = f" {failed} of {len(answers)} requests failed; their lines have an 'error'." if failed else ""
        if rank() == 0:
            terminal.current.say(f"The answers are in {folder}/predictions.jsonl.{note}")
        return answers
