"""Models whose weights stay in the file: mapped, shared by every process that answers with them, and there at once."""
from __future__ import annotations

import logging
import os

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn

from mindformers_ixc import native
from mindformers_ixc.checkpoint.dtypes import count_not_finite, format_of, item_size
from mindformers_ixc.checkpoint.model_directory import numpy_type, read_as
from mindformers_ixc.checkpoint.quantised import (
    AWQ,
    EMBEDDING,
    Quantization,
    check_scales,
    check_zeros,
    own_parts,
    quantization_of,
    stored_weights,
    widened,
)
from mindformers_ixc.checkpoint.sources import OpenedCheckpoint
from mindformers_ixc.checkpoint.start import match_tensors
from mindformers_ixc.checkpoint.streaming import say_not_finite
from mindformers_ixc.checkpoint.tensors import LazyTensor, MappedTensor, Stretch
from mindformers_ixc.device import is_parallel, on_ascend
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.generation.ascend_weights import load_repacked
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.models.stored import hold, holdable

logger = logging.getLogger(__name__)

HALVES = {"BF16": "bf16", "F16": "f16"}

# Bytes of a file that are mapped at a time. Python keeps a file open for every mapping, and many systems allow a
# process 1024 open files, about as many as the 7B has tensors; a mapping larger than the memory is refused by Linux.
WINDOW = 1 << 30

# Mapped parts of files, by path and number.
Windows = dict[tuple[str, int], np.ndarray]


def load_stored(model: IXC25Model, source: OpenedCheckpoint) -> None:
    """Gives a model the weights of a checkpoint as they are stored; quantised ones, and those of 16 bits.

    Args:
        model: the model, in float32 (on Ascend in a half), built without weights; it can answer and not train.
        source: the checkpoint, quantised or not.

    Raises:
        CheckpointError: for what `load_weights` refuses, or where stored weights cannot be computed with.
    """
    quantization = quantization_of(source)
    if quantization is not None and on_ascend():
        load_repacked(model, source, quantization)
        return
    _check_place(model, source)
    shapes = {parameter.name: tuple(parameter.shape) for parameter in model.get_parameters()}
    match_tensors(widened(source), shapes)
    tensors = {name: tensor for name, tensor in source.tensors.items() if name in shapes}
    able = holdable(model)
    kinds = {name: HALVES[tensors[f"{name}.weight"].dtype] for name in able
             if f"{name}.weight" in tensors and tensors[f"{name}.weight"].dtype in HALVES}
    if quantization is not None:
        kinds.update(_whole_numbers(source, quantization, able, tensors))
    hold(model, kinds)
    _say(source, quantization)
    _fill(model, tensors, str(source.path))


def suits_stored(config: IXC25Config, source: OpenedCheckpoint) -> bool:
    """Whether a checkpoint with full weights is better left in its file: half the memory, and half to be read a token.

    So it is where most weights have 16 bits, in files that can be mapped, and the kernels for the CPU are there.
    """
    halves = sum(tensor.nbytes for tensor in source.tensors.values()
                 if isinstance(tensor, MappedTensor) and tensor.dtype in HALVES and len(tensor.stretches) == 1)
    return (_is_place(config) and native.is_switched_on()
            and 2 * halves > sum(tensor.nbytes for tensor in source.tensors.values()))


def _is_place(config: IXC25Config) -> bool:
    """Whether stored weights can be computed with."""
    return not (on_ascend() or is_parallel()) and config.compute_dtype == config.param_init_type == mstype.float32


def _check_place(model: IXC25Model, source: OpenedCheckpoint) -> None:
    if not _is_place(model.config):
        raise CheckpointError(f"{source.path} holds weights that are computed with as they are stored, which is for "
                              "one process on the CPU with compute_dtype and param_init_type float32; for anything "
                              f"else make full weights of it: mindformers convert {source.path} TARGET --to hf.")


def _whole_numbers(source: OpenedCheckpoint, quantization: Quantization, able: set[str],
                   tensors: dict[str, LazyTensor]) -> dict[str, str]:
    """Kinds of the weights that are whole numbers; their arrays go to the tensors."""
    kinds = {}
    for name, weight in stored_weights(source, quantization).items():
        if name not in able:
            raise CheckpointError(f"{source.path} holds {name} as whole numbers; only linears and the embedding are "
                                  "computed with like that.")
        if name == EMBEDDING and weight.kind != "int8":
            raise CheckpointError(f"{source.path} holds {name} with 4 bits, and rows of an embedding are looked up of "
                                  f"8 bits or more; `mindformers quantize {source.path} TARGET` makes them 8.")
        kinds[name] = "int4" if weight.kind == AWQ else weight.kind
        tensors.update({f"{name}.{part}": tensor for part, tensor in own_parts(weight).items()})
    return kinds


def _say(source: OpenedCheckpoint, quantization: Quantization | None) -> None:
    """What whoever waits should know: why it is slow, and what would make it faster."""
    if not native.is_switched_on():
        logger.warning(f"{source.path}: without the kernels for the CPU every weight is widened anew whenever it is "
                       "used, which is slow; `mindformers doctor` says what they need.")
    elif lacking := native.lacking_instructions():
        logger.warning(f"{source.path}: this processor lacks {', '.join(lacking)}, so the plain form of the kernels "
                       "computes with its weights: the same answers, more slowly.")
    if quantization is not None and quantization.method == AWQ:
        logger.warning(f"{source.path} is packed as AWQ, which is packed anew in memory whenever it is loaded; "
                       f"`mindformers quantize {source.path} TARGET` does that once, and TARGET is there at once.")


def _fill(model: nn.Cell, tensors: dict[str, LazyTensor], where: str) -> None:
    """Puts arrays into parameters: mapped where the file has them in the parameter's format, otherwise read."""
    odd: dict[str, int] = {}
    windows: Windows = {}
    for parameter in model.get_parameters():
        tensor, wanted = tensors[parameter.name], format_of(parameter.dtype)
        assert wanted is not None, parameter.name       # the table has every type of a weight
        array = mapped(tensor, wanted, windows)
        if array is None:
            array = read_as(tensor, wanted)
        # scales, zeros and what is small; nobody waits for a look at every number of a mapped file
        if parameter.name.endswith(".scales"):
            check_scales(parameter.name, array)
        elif parameter.name.endswith(".qzeros"):
            check_zeros(parameter.name, array)
        elif parameter.name.endswith(".bias") or wanted == "F32":
            odd[parameter.name] = count_not_finite(array, wanted)
        parameter.set_data(Tensor.from_numpy(array))
    say_not_finite(odd, where)


def mapped(tensor: LazyTensor, dtype: str, windows: Windows | None = None) -> np.ndarray | None:
    """A tensor's bytes in its file as an array; `None` where they lie elsewhere, in another format or not aligned.

    The array can be written to without changing the file, since MindSpore takes no other; nothing does.

    Args:
        tensor: in a file.
        dtype: that is wanted.
        windows: what of files is mapped already; more is added.
    """
    if not isinstance(tensor, MappedTensor) or tensor.dtype != dtype or len(tensor.stretches) != 1:
        return None
    place = tensor.stretches[0]
    if place.offset % item_size(dtype) or not place.nbytes:
        return None
    return _bytes_of(place, {} if windows is None else windows).view(numpy_type(dtype)).reshape(tensor.shape)


def _bytes_of(place: Stretch, windows: Windows) -> np.ndarray:
    """Bytes of a file, uint8 `(n,)`, as a part of a mapped window if they lie in one."""
    number, inside = divmod(place.offset, WINDOW)
    if inside + place.nbytes > WINDOW:
        return np.asarray(np.memmap(place.path, np.uint8, mode="c", offset=place.offset, shape=(place.nbytes,)))
    key = str(place.path), number
    if key not in windows:
        length = min(WINDOW, os.path.getsize(place.path) - number * WINDOW)
        windows[key] = np.asarray(np.memmap(place.path, np.uint8, mode="c", offset=number * WINDOW, shape=(length,)))
    return windows[key][inside:inside + place.nbytes]
