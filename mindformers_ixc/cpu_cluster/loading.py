"""Lets MindFormers load checkpoints in parallel runs on the CPU.

To know how a device's slices are cut, MindFormers compiles the step with `Model.build` before it loads anything; that
function accepts Ascend devices with a data sink only.
"""
from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from mindformers.trainer import utils as trainer_utils
from mindformers.utils import load_checkpoint_utils

if TYPE_CHECKING:
    from mindspore import Model

logger = logging.getLogger(__name__)


def compile_on_first_batch(model: Model, dataset: Any, *_: Any, do_eval: bool = False,
                           do_predict: bool = False, **__: Any) -> None:
    """Stands in for `mindformers.checkpoint.utils.compile_model`: compiles the step on the first batch.

    Args:
        model: MindSpore's `Model`.
        dataset: training data; of an evaluation or prediction the inputs themselves.
        do_eval: compile the evaluation network.
        do_predict: the same.
    """
    if do_eval or do_predict:
        model._eval_network.compile(*dataset) if do_eval else model._predict_network.compile(*dataset)
        return
    network = model._train_network
    network.set_train()
    batch = next(dataset.create_tuple_iterator(num_epochs=1, do_copy=False))
    logger.info("Compiling the step to know how parameters are cut.")
    network.compile(*batch)


def load_on_cpu() -> None:
    """Puts `compile_on_first_batch` where MindFormers looks for its own; there is no hook."""
    for module in (trainer_utils, load_checkpoint_utils):
        module.compile_model = compile_on_first_batch
