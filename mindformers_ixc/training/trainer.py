"""The trainer: MindFormers' causal-language-modelling trainer, plus what a vision-language model needs around it."""
from __future__ import annotations

import os
import sys

import mindspore as ms
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_output_root_path
from mindformers.trainer.causal_language_modeling import CausalLanguageModelingTrainer

from mindformers_ixc.checkpoint.model_directory import save_model_directory
from mindformers_ixc.config import ConfigError
from mindformers_ixc.training.wrapper import portable_wrapper


def check_shapes_agree(config) -> None:
    """Checks that data section and model section of a YAML describe the same static shapes.

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


@MindFormerRegister.register(MindFormerModuleType.TRAINER)
class IXC25Trainer(CausalLanguageModelingTrainer):
    """Trains IXC2.5 from YAML and leaves a model directory behind.

    Args:
        model_name: MindFormers' name for the recipe; only used in its logs.
    """

    def create_model_wrapper(self, network, optimizer):
        """Builds the train-step cell, choosing the portable one where there is no Ascend device."""
        wrapper = self.config.runner_wrapper
        wrapper.type = portable_wrapper(wrapper.type)
        return super().create_model_wrapper(network, optimizer)

    def train(self, config=None, network=None, dataset=None, wrapper=None, optimizer=None, callbacks=None, **kwargs):
        """Trains, then writes `<output_dir>/model`; arguments as in MindFormers."""
        check_shapes_agree(config)
        super().train(config=config, network=network, dataset=dataset, wrapper=wrapper, optimizer=optimizer,
                      callbacks=callbacks, **kwargs)
        self._save_model()

    def _save_model(self) -> None:
        if ms.get_auto_parallel_context("parallel_mode") in ("semi_auto_parallel", "auto_parallel"):
            logger.info("Every rank has saved its own part; join them with MindSpore's unified_safetensors.")
            return
        target = os.path.join(get_output_root_path(), "model")
        model = self.real_model
        data = self.config.train_dataset
        save_model_directory(model, target, tokenizer_file=data.tokenizer.vocab_file, hd_num=data.hd_num)
        print(f"The trained model is in {target}. Ask it about a picture:\n"
              f'    mindformers chat --model {target} --image PICTURE "QUESTION"', file=sys.stderr, flush=True)
