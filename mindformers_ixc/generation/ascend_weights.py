"""Quantised models on Ascend: the same files, packed anew while they are loaded, for one operator of Ascend's."""
from __future__ import annotations

import mindspore.common.dtype as mstype
from mindspore import Tensor

from mindformers_ixc.checkpoint.ascend_packing import repacked
from mindformers_ixc.checkpoint.dtypes import STORAGE, count_not_finite, format_of
from mindformers_ixc.checkpoint.model_directory import numpy_type, read_as
from mindformers_ixc.checkpoint.quantised import AWQ, Quantization, stored_weights, widened
from mindformers_ixc.checkpoint.sources import OpenedCheckpoint
from mindformers_ixc.checkpoint.start import match_tensors
from mindformers_ixc.checkpoint.streaming import say_not_finite
from mindformers_ixc.device import is_parallel
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.models.stored_ascend import hold_on_ascend


def load_repacked(model: IXC25Model, source: OpenedCheckpoint, quantization: Quantization) -> None:
    """Gives a model the weights of a quantised checkpoint as Ascend's operator takes them.

    What it does not take is widened to full weights, one after the other.

    Args:
        model: the model, built without weights; it can answer and not train.
        source: the checkpoint, in either layout.
        quantization: how it is quantised.

    Raises:
        CheckpointError: for what `load_weights` refuses, or where the operator cannot compute.
    """
    dtype = model.config.compute_dtype
    if is_parallel() or dtype not in (mstype.float16, mstype.bfloat16):
        raise CheckpointError(f"{source.path} is quantised; on Ascend it is computed with by one process, with "
                              f"compute_dtype float16 or bfloat16. For anything else make full weights of it: "
                              f"mindformers convert {source.path} TARGET --to hf.")
    full, weights = widened(source), stored_weights(source, quantization)
    match_tensors(full, {parameter.name: tuple(parameter.shape) for parameter in model.get_parameters()})
    kinds = {name: "int4" if weight.kind == AWQ else weight.kind for name, weight in weights.items()}
    for name, cell in hold_on_ascend(model, kinds, dtype).items():
        for part, array in repacked(weights[name], _format(dtype)).items():
            parameter = getattr(cell, part)
            parameter.set_data(Tensor(array, dtype=mstype.qint4x2) if parameter.dtype == mstype.qint4x2
                               else Tensor.from_numpy(array.view(numpy_type(parameter.dtype))))
    odd = {}
    for parameter in model.get_parameters():
        if parameter.name not in full.tensors:      # an array of whole numbers, or what belongs to them
            continue
        wanted = _format(parameter.dtype)
        value = read_as(full.tensors[parameter.name], wanted)
        odd[parameter.name] = count_not_finite(value.view(STORAGE[wanted]), wanted)
        parameter.set_data(Tensor.from_numpy(value))
    say_not_finite(odd, str(source.path))


def _format(dtype: object) -> str:
    found = format_of(dtype)
    assert found is not None, f"{dtype} is no format of numbers"
    return found
