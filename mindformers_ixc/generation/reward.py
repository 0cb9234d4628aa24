"""The reward model with the public model's own methods: `get_score`, `get_scores`, `compare`, `rank`.

Names and order of the arguments are those of the public PyTorch code, so that its calls work unchanged.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from mindformers_ixc.checkpoint.model_directory import save_model_directory
from mindformers_ixc.errors import GenerationError, PromptError
from mindformers_ixc.fields import FIELDS
from mindformers_ixc.generation.loading import load_model
from mindformers_ixc.generation.scoring import SCORED_AT_ONCE, Scorer
from mindformers_ixc.generation.turns import TURNS
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.reward import WRITES_NONE, IXC25RewardModel
from mindformers_ixc.processing.pictures import ImageSource
from mindformers_ixc.processing.processor import ImageProcessor, Processor
from mindformers_ixc.processing.tokenizer import SentencePieceText

# A finished conversation: messages with `role` and `content`, the last one the answer to be judged.
Chat = Sequence[dict]
# Pictures of a chat; a single one may stand alone.
Images = Any


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class IXC25ForReward(IXC25RewardModel):
    """IXC-2.5-Reward, as MindFormers' Auto classes and users of the public model know it.

    Args:
        config: all sizes and dtypes; `reward_pooling` says which positions count.

    Attributes:
        tokenizer: set by the caller, as with the public model (`model.tokenizer = tokenizer`).
    """

    tokenizer: SentencePieceText | None = None

    @classmethod
    def from_pretrained_experimental_mode(cls, pretrained_model_name_or_path: str | os.PathLike, *model_args: Any,
                                          config: IXC25Config | None = None, **kwargs: Any) -> IXC25ForReward:
        """What `AutoModel.from_pretrained` calls for a directory; arguments as in `IXC25ForCausalLM`."""
        overrides = {key: value for key, value in kwargs.items() if key in FIELDS}
        model = load_model(pretrained_model_name_or_path, cls, config=config, **overrides)
        assert isinstance(model, cls)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike, save_name: str = "mindspore_model",
                        **kwargs: Any) -> None:
        """Writes `config.json` and `model.safetensors` in the public layout; the other arguments are ignored."""
        save_model_directory(self, save_directory)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses: this model writes nothing; MindFormers' base class would try.

        Raises:
            GenerationError: saying what the model is.
        """
        raise GenerationError(WRITES_NONE)

    def chat(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses, as `generate`."""
        return self.generate()

    def scorer(self) -> Scorer:
        """What scores with this model and its tokenizer; made once, since it owns graphs and caches.

        Raises:
            PromptError: without a tokenizer.
        """
        if self.tokenizer is None:
            raise PromptError("This method needs the model's tokenizer; set model.tokenizer = tokenizer first.")
        with TURNS:
            known: Scorer | None = self.__dict__.get("_scorer")
            if known is not None and known.processor.tokenizer is self.tokenizer:
                return known
            made = Scorer(self, Processor(ImageProcessor.from_config(self.config.to_public_dict()), self.tokenizer))
            object.__setattr__(self, "_scorer", made)
            return made

    def get_score(self, chat: Chat, image: Images = (), hd_num: int | None = None,
                  max_length: int | None = None) -> float:
        """Scores the answer that ends a chat.

        Args:
            chat: messages `{"role": "user" | "assistant", "content": text}` in turn.
            image: images of the chat, in the order of their places (`<ImageHere>`; a single image may go without):
                paths (a video's too), bytes, PIL images or uint8 arrays; a single one need not be in a list.
            hd_num: tiles of each image at most; `None` is what the model was trained with, 9 for the public model.
            max_length: positions at most; by default those of the model.

        Returns:
            The score; higher is better.

        Raises:
            PromptError: when images and their places differ in number, or the chat is none.
            GenerationError: when it is too long, or the score is no finite number.
        """
        return self.scorer().scores([chat], [image], max_length, hd_num)[0]

    def get_scores(self, chats: Sequence[Chat], images: Sequence[Images] | None = None,
                   max_length: int | None = None, hd_num: int | None = None,
                   batch_size: int = SCORED_AT_ONCE) -> list[float]:
        """Scores several chats.

        Args:
            chats: as in `get_score`.
            images: a list of images for each chat, empty for text alone; `None` for no images at all.
            max_length: as in `get_score`.
            hd_num: as in `get_score`.
            batch_size: chats at once; scores do not depend on it but for rounding.

        Returns:
            One score a chat.

        Raises:
            PromptError: naming the chat and what is wrong with it; other errors as in `get_score`.
        """
        return self.scorer().scores(chats, images, max_length, hd_num, batch_size)

    def compare(self, chat1: Chat, image1: Sequence[ImageSource], chat2: Chat, image2: Sequence[ImageSource],
                hd_num: int | None = None, max_length: int | None = None) -> bool:
        """Whether the first chat's answer is better than the second's; arguments and errors as in `get_scores`."""
        first, second = self.get_scores([chat1, chat2], [image1, image2], max_length, hd_num)
        return first > second

    def rank(self, chats: Sequence[Chat], images: Sequence[Images] | None = None, max_length: int | None = None,
             hd_num: int | None = None, batch_size: int = SCORED_AT_ONCE) -> list[int]:
        """Places of chats by their scores; arguments and errors as in `get_scores`.

        Returns:
            The place of each chat, 0 for the best; of equal ones the first is better.
        """
        scores = self.get_scores(chats, images, max_length, hd_num, batch_size)
        places = np.empty(len(scores), np.int64)
        places[np.argsort(-np.asarray(scores), kind="stable")] = np.arange(len(scores))
        return places.tolist()
