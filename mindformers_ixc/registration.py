"""Everything this package tells MindFormers: classes for its registry and Auto classes, PET types, the pipeline.

Importing this module registers all of it. Users need not: `import mindformers_ixc` does, as soon as MindFormers is
imported. The text and image classes here are thin: they are `processing`'s, with MindFormers' base class beside them.
What is registered where the class is defined (model, configuration, datasets, trainer, step cells) is imported here.
docs/architecture.md has the table of everything this package changes or leans on inside MindFormers and MindSpore.
"""
from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mindformers.mindformer_book import MindFormerBook
from mindformers.models.auto import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from mindformers.models.image_processing_utils import BaseImageProcessor
from mindformers.models.processing_utils import ProcessorMixin
from mindformers.models.tokenization_utils import PreTrainedTokenizer
from mindformers.pet.pet_model import PET_TYPE_TO_CONFIG_MAPPING, PET_TYPE_TO_MODEL_MAPPING
from mindformers.pipeline.registry_constant import PIPELINE_REGISTRY
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindpet.utils.constants import DELTA_LIST

from mindformers_ixc.checkpoint.family import know_member, refuse_other
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.config import read_config
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.generation.pipeline import TASK, MultimodalChatPipeline
from mindformers_ixc.generation.reward import IXC25ForReward
from mindformers_ixc.hub import not_a_folder
from mindformers_ixc.models.configuration import IXC25Config, IXC25VisionConfig
from mindformers_ixc.models.grpo import IXC25ForGRPO
from mindformers_ixc.models.preference import IXC25ForPreference
from mindformers_ixc.models.vision import IXC25VisionModel
from mindformers_ixc.processing.processor import ImageProcessor, Processor
from mindformers_ixc.processing.tokenizer import VOCAB_FILES_NAMES, SentencePieceText, check_directory
from mindformers_ixc.processing.video import VideoProcessor
from mindformers_ixc.resources import STARTER, resolve_model
from mindformers_ixc.training.datasets import (
    IXC25DataLoader,
    IXC25GroupDataset,
    IXC25PreferenceDataset,
    IXC25SFTDataset,
)
from mindformers_ixc.training.pet import (
    PartialLoRAModel,
    PartialLoRAPetConfig,
    TaskLoRAModel,
    TaskLoRAPetConfig,
    lora_model,
)
from mindformers_ixc.training.tracking import IXC25Tracker
from mindformers_ixc.training.trainer import IXC25Trainer
from mindformers_ixc.training.wrapper import (
    IXC25GroupStepCell,
    IXC25PipelineWithLossScaleCell,
    IXC25TrainOneStepCell,
)

__all__ = [
    "IXC25Config", "IXC25DataLoader", "IXC25ForCausalLM", "IXC25ForGRPO", "IXC25ForPreference", "IXC25ForReward",
    "IXC25GroupDataset", "IXC25GroupStepCell", "IXC25ImageProcessor",
    "IXC25PipelineWithLossScaleCell", "IXC25PreferenceDataset", "IXC25Processor",
    "IXC25SFTDataset", "IXC25Tracker", "IXC25TrainOneStepCell", "IXC25Trainer", "IXC25VideoProcessor",
    "IXC25VisionConfig",
    "IXC25VisionModel", "InternLM2Tokenizer", "InternLMXComposer2Tokenizer",
]


@MindFormerRegister.register(MindFormerModuleType.TOKENIZER)
class InternLM2Tokenizer(SentencePieceText, PreTrainedTokenizer):
    """SentencePiece tokenizer of InternLM2 and IXC2.5, as a MindFormers tokenizer.

    Args:
        vocab_file: SentencePiece model, a path or `pkg:package/file`.
        unk_token: piece of unknown characters.
        bos_token: piece that begins a text.
        eos_token: piece that ends a text.
        pad_token: piece that pads; the public model pads with `</s>`.
        add_bos_token: whether `<s>` is put in front when special tokens are asked for.
        add_eos_token: whether `</s>` is put at the end then.
        sp_model_kwargs: options of `sentencepiece.SentencePieceProcessor`.
        **kwargs: of MindFormers' tokenizer base.

    Raises:
        FileNotFoundError: when `vocab_file` is missing.
        ConfigError: when it is no SentencePiece model.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]
    _support_list: list[str] = []

    def __init__(self, vocab_file: str, unk_token: str = "<unk>", bos_token: str = "<s>", eos_token: str = "</s>",
                 pad_token: str = "</s>", add_bos_token: bool = True, add_eos_token: bool = False,
                 sp_model_kwargs: dict | None = None, **kwargs: Any):
        self.load(vocab_file, sp_model_kwargs)
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(unk_token=unk_token, bos_token=bos_token, eos_token=eos_token, pad_token=pad_token,
                         add_bos_token=add_bos_token, add_eos_token=add_eos_token, **kwargs)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> InternLM2Tokenizer:
        """The tokenizer of a model directory, whose files are looked at first; arguments as in MindFormers.

        Raises:
            FileNotFoundError: when the directory has no `tokenizer.model`.
            ConfigError: when a settings file is damaged.
            CheckpointError: for a hub's name.
        """
        name_or_path = _as_folder(name_or_path)
        # a directory with a YAML file may have its vocabulary elsewhere
        if os.path.isdir(name_or_path) and "vocab_file" not in kwargs and not any(Path(name_or_path).glob("*.yaml")):
            check_directory(name_or_path)
        return super().from_pretrained(name_or_path, *args, **kwargs)

    def __len__(self) -> int:
        """Number of ids; the special tokens are pieces of the model, not added to it."""
        return max([self.vocab_size, *(index + 1 for index in self.added_tokens_decoder)])

    def get_vocab(self) -> dict[str, int]:
        """All pieces with their ids."""
        vocab = {self.sp_model.IdToPiece(i): i for i in range(self.vocab_size)}
        vocab.update(self.added_tokens_encoder)
        return vocab

    def build_inputs_with_special_tokens(self, token_ids_0: Sequence[int],
                                         token_ids_1: Sequence[int] | None = None) -> list[int]:
        """Adds `<s>` and `</s>` as configured; a second text follows the first directly."""
        ids = ([self.bos_token_id] if self.add_bos_token else []) + list(token_ids_0) + list(token_ids_1 or [])
        return ids + ([self.eos_token_id] if self.add_eos_token else [])

    def get_special_tokens_mask(self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None,
                                already_has_special_tokens: bool = False) -> list[int]:
        """1 for `<s>` and `</s>` added by `build_inputs_with_special_tokens`, else 0."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        middle = [0] * (len(token_ids_0) + len(token_ids_1 or []))
        return [1] * self.add_bos_token + middle + [1] * self.add_eos_token

    def create_token_type_ids_from_sequences(self, token_ids_0: Sequence[int],
                                             token_ids_1: Sequence[int] | None = None) -> list[int]:
        """Zeros: the model has no token types."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))


@MindFormerRegister.register(MindFormerModuleType.TOKENIZER)
class InternLMXComposer2Tokenizer(InternLM2Tokenizer):
    """The same tokenizer under the name of the public `tokenizer_config.json`."""


@MindFormerRegister.register(MindFormerModuleType.PROCESSOR)
class IXC25ImageProcessor(ImageProcessor, BaseImageProcessor):
    """`processing.processor.ImageProcessor` for MindFormers; arguments as there."""

    model_input_names = ["pixel_values"]

    def __init__(self, *sizes: Any, **kwargs: Any):
        known = {key: kwargs.pop(key) for key in list(kwargs) if key in IMAGE_PROCESSOR_ARGUMENTS}
        ImageProcessor.__init__(self, *sizes, **known)
        own = {name: getattr(self, name) for name in IMAGE_PROCESSOR_ARGUMENTS}
        BaseImageProcessor.__init__(self, **own, **kwargs)


IMAGE_PROCESSOR_ARGUMENTS = ("image_size", "patch_size", "hd_num", "hd_num_several", "hd_num_training",
                             "training_transform", "transparency", "exif")


@MindFormerRegister.register(MindFormerModuleType.PROCESSOR)
class IXC25VideoProcessor(VideoProcessor, BaseImageProcessor):
    """`processing.video.VideoProcessor` for MindFormers; arguments as there."""

    model_input_names = ["pixel_values"]

    def __init__(self, *sizes: Any, **kwargs: Any):
        known = {key: kwargs.pop(key) for key in list(kwargs) if key in ("image_size", "frame_limit")}
        VideoProcessor.__init__(self, *sizes, **known)
        BaseImageProcessor.__init__(self, image_size=self.image_size, frame_limit=self.frame_limit, **kwargs)


@MindFormerRegister.register(MindFormerModuleType.PROCESSOR)
class IXC25Processor(Processor, ProcessorMixin):
    """`processing.processor.Processor` as one of MindFormers' processors.

    Args:
        image_processor: turns images into tiles.
        tokenizer: turns text into ids.
        control_tokens: as in `Processor`.
        **kwargs: as in MindFormers; kept.
    """

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "IXC25ImageProcessor"
    tokenizer_class = "InternLM2Tokenizer"

    def __init__(self, image_processor: ImageProcessor | None = None, tokenizer: SentencePieceText | None = None,
                 control_tokens: bool = False, **kwargs: Any):
        # not MindFormers' own initialiser: its check knows only classes inside its package
        Processor.__init__(self, image_processor, tokenizer, control_tokens)
        self.config = {"image_processor": self.image_processor, "tokenizer": tokenizer, **kwargs}

    @classmethod
    def from_pretrained(cls, yaml_name_or_path: str | os.PathLike, **kwargs: Any) -> IXC25Processor:
        """Builds the processor of a model directory from its config.json and tokenizer.model."""
        directory = Path(_as_folder(yaml_name_or_path))
        images = IXC25ImageProcessor.from_directory(directory)
        # the class under the public name: MindFormers warns when tokenizer_config.json names another one
        return cls(images, InternLMXComposer2Tokenizer.from_pretrained(str(directory)))

    def save_pretrained(self, save_directory=None, save_name: str = "mindspore_model", **kwargs: Any) -> None:
        """Writes the tokenizer's files; the image processor's sizes are in the model's config.json."""
        os.makedirs(save_directory, exist_ok=True)
        self.tokenizer.save_pretrained(str(save_directory))


class IXC25AnyModel(IXC25ForCausalLM):
    """What `AutoModel` loads a directory with: the model that writes, or the reward model, whichever it holds."""

    @classmethod
    def from_pretrained_experimental_mode(cls, pretrained_model_name_or_path: str | os.PathLike, *model_args: Any,
                                          **kwargs: Any) -> Any:
        """The directory's model; arguments as in `IXC25ForCausalLM`."""
        source = open_source(pretrained_model_name_or_path, verify=False)
        found = know_member(read_config(pretrained_model_name_or_path), source)
        if getattr(kwargs.get("config"), "reward_pooling", None) is not None:      # a caller may have said so
            refuse_other(found.reward_pooling is not None, pretrained_model_name_or_path, scores=True)
        of_kind = IXC25ForCausalLM if found.reward_pooling is None else IXC25ForReward
        return of_kind.from_pretrained_experimental_mode(pretrained_model_name_or_path, *model_args, **kwargs)


def register_auto_classes() -> None:
    """Lets MindFormers' Auto classes find everything by the model types of public `config.json` files."""
    for config_class in (IXC25Config, IXC25VisionConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(IXC25Config, IXC25ForCausalLM, exist_ok=True)
    AutoModel.register(IXC25Config, IXC25AnyModel, exist_ok=True)
    AutoModel.register(IXC25VisionConfig, IXC25VisionModel, exist_ok=True)
    # under the public class name, which is what a public tokenizer_config.json asks for
    AutoTokenizer.register(IXC25Config, slow_tokenizer_class=InternLMXComposer2Tokenizer, exist_ok=True)
    AutoProcessor.register(IXC25Config, IXC25Processor, exist_ok=True)


def register_pet_types() -> None:
    """Adds the types to MindFormers' tables, so that `pet_config.pet_type` of a YAML file finds them."""
    for config, model in ((PartialLoRAPetConfig, PartialLoRAModel), (TaskLoRAPetConfig, TaskLoRAModel)):
        PET_TYPE_TO_CONFIG_MAPPING[config.pet_type_name] = config
        PET_TYPE_TO_MODEL_MAPPING[config.pet_type_name] = model
        if config.pet_type_name not in DELTA_LIST:   # MindPet freezes only for types it has heard of
            DELTA_LIST.append(config.pet_type_name)
    # MindFormers replaces cells of its own classes only, and says nothing when it finds none
    PET_TYPE_TO_MODEL_MAPPING["lora"] = lora_model


def register_pipeline() -> None:
    """Makes `pipeline("multimodal_chat")` find the pipeline, for a model instance and for a model directory."""
    MindFormerBook.get_pipeline_support_task_list().setdefault(TASK, {}).setdefault("common", None)
    PIPELINE_REGISTRY.register_pipeline(TASK, MultimodalChatPipeline, ms_model=(IXC25ForCausalLM,), default=None,
                                        task_type="multimodal")


def _refuse_hub_name(given: Any) -> None:
    """Says how this model is downloaded where its name on a hub is given for a folder.

    Raises:
        CheckpointError: with the command.
    """
    advice = not_a_folder(given) if isinstance(given, (str, os.PathLike)) else None
    if advice:
        raise CheckpointError(advice)


def _as_folder(given: Any) -> Any:
    """What stands for a name where a model directory is taken: the shipped model's folder for `starter`.

    Raises:
        CheckpointError: for a hub's name, with the command that downloads the model.
    """
    _refuse_hub_name(given)
    return str(resolve_model(given)) if isinstance(given, str) and given == STARTER else given


def _with_advice(original: Callable) -> Callable:
    """A function that takes a directory or a hub's name, and looks at it first; its errors say what is wrong."""
    @functools.wraps(original)
    def looking(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*map(_as_folder, args), **{name: _as_folder(value) for name, value in kwargs.items()})
        except RuntimeError as error:
            # MindFormers puts "Error occurred when executing function ..." in front of every sentence
            if isinstance(error.__cause__, (ValueError, OSError)):
                raise error.__cause__ from None
            raise
    return looking


def look_at_names() -> None:
    """Lets Auto classes and `pipeline` know `starter`, and name the command that downloads this model.

    They would look for a model of MindFormers' own list, or ask its hub.
    """
    for auto in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, IXC25ForCausalLM,
                 IXC25ForReward):
        auto.from_pretrained = classmethod(_with_advice(auto.from_pretrained.__func__))
    names = vars(importlib.import_module("mindformers.pipeline.pipeline"))     # the package's name is the function's
    for name in ("cached_file", "is_experimental_mode", "get_ms_experimental_pipeline"):
        names[name] = _with_advice(names[name])


register_auto_classes()
look_at_names()
register_pet_types()
register_pipeline()
