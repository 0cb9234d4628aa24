"""The public model's own methods (`chat`, `write_artical`, `write_webpage`, ...) and Hugging Face's `generate`.

Names, order and defaults of the arguments are those of the public PyTorch code, so that its calls work unchanged.
Where it prints a warning and goes on, or writes a file nobody asked for, here are errors and `save_to`. The public
code's instruction texts and its system turn are not part of this package; what stands here in their place is its own
wording, and every method takes another one.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Union, overload

import numpy as np
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import Tensor
from mindspore.nn import no_init_parameters

from mindformers_ixc.checkpoint.family import check_kind
from mindformers_ixc.checkpoint.model_directory import save_model_directory
from mindformers_ixc.checkpoint.quantised import quantization_of
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.config import ModelConfig, read_config
from mindformers_ixc.errors import GenerationError, PromptError
from mindformers_ixc.fields import FIELDS
from mindformers_ixc.files import write_whole
from mindformers_ixc.generation.ascend import prepare_inference
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.loading import load_weights
from mindformers_ixc.generation.options import (
    GenerationOptions,
    NamedOptions,
    check_mode,
    hugging_face_options,
    known_options,
)
from mindformers_ixc.generation.stored_weights import load_stored
from mindformers_ixc.generation.text import Streamer
from mindformers_ixc.generation.turns import TURNS
from mindformers_ixc.generation.webpage import (
    RESUME_INSTRUCTION,
    SCREENSHOT_INSTRUCTION,
    free_target,
    html_of,
    read_resume,
)
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.processing.image import Tiles
from mindformers_ixc.processing.messages import History, read_history
from mindformers_ixc.processing.pictures import ImageSource
from mindformers_ixc.processing.processor import EncodedSample, ImageProcessor, Processor
from mindformers_ixc.processing.prompt import IGNORE_INDEX
from mindformers_ixc.processing.tokenizer import SentencePieceText

META_INSTRUCTION = (
    "You are InternLM-XComposer (浦语·灵笔), a multi-modal assistant developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). You look closely at the pictures you are shown and answer helpfully, honestly and "
    "harmlessly, in the language of the user.")

# Positions of prompt and article together (public `max_length` of article writing).
ARTICLE_LENGTH = 8192

# What `generate` takes for an array.
Array = Union[Tensor, np.ndarray, Sequence]


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class IXC25ForCausalLM(IXC25Model):
    """IXC2.5 with a language-modelling head, as MindFormers' Auto classes and users of the public model know it.

    Args:
        config: all sizes, dtypes and the adapter mode used in training.

    Attributes:
        tokenizer: set by the caller, as with the public model (`model.tokenizer = tokenizer`), for the methods that do
            not take one.
    """

    tokenizer: SentencePieceText | None = None

    def construct(self, input_ids, labels=None, pixel_values=None, global_views=None, view_index=None,
                  vision_index=None, image_mask=None, position_ids=None, segment_ends=None, noise_seed=None,
                  source=None, lengths=None, loss_weights=None):
        """Training loss, or logits when `labels` is `None`, as with MindFormers' own models; see `IXC25Model`."""
        if labels is None:
            return self.logits(input_ids, pixel_values, global_views, view_index, vision_index, image_mask,
                               position_ids, segment_ends, noise_seed)
        return self.training_loss(input_ids, labels, pixel_values, global_views, view_index, vision_index, image_mask,
                                  position_ids, segment_ends, noise_seed, source, lengths, loss_weights)

    @classmethod
    def from_pretrained_experimental_mode(cls, pretrained_model_name_or_path: str | os.PathLike, *model_args: Any,
                                          config: IXC25Config | None = None, **kwargs: Any) -> IXC25ForCausalLM:
        """What `AutoModel.from_pretrained` calls for a directory; MindFormers' own looks for .ckpt files only.

        Args:
            pretrained_model_name_or_path: model directory in the public layout; a quantised one answers and cannot
                train.
            *model_args: as in MindFormers; unused.
            config: configuration to use instead of the directory's.
            **kwargs: fields of a run; hub options are ignored, nothing is ever downloaded.

        Returns:
            The model in evaluation mode.
        """
        if config is None:
            overrides = {key: value for key, value in kwargs.items() if key in FIELDS}
            config = read_config(pretrained_model_name_or_path, IXC25Config, **overrides)
        config.check()
        if config.use_past:
            prepare_inference(paged=True)
        source = open_source(pretrained_model_name_or_path)
        check_kind(config, source, pretrained_model_name_or_path, scores=False)
        if quantization_of(source) is None:
            model = cls(config)
            load_weights(model, source)
        else:
            with no_init_parameters():
                model = cls(config)
            load_stored(model, source)
        model.set_train(False)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike, save_name: str = "mindspore_model",
                        **kwargs: Any) -> None:
        """Writes `config.json` and `model.safetensors` in the public layout; the other arguments are ignored."""
        save_model_directory(self, save_directory)

    def assistant_for(self, tokenizer: SentencePieceText | None) -> Assistant:
        """The assistant that answers with this model and a tokenizer; made once, since it owns graphs and caches.

        Raises:
            PromptError: without a tokenizer.
        """
        if tokenizer is None:
            raise PromptError("This method needs the model's tokenizer; set model.tokenizer = tokenizer first.")
        with TURNS:
            known: Assistant | None = self.__dict__.get("_assistant")
            if known is not None and known.processor is not None and known.processor.tokenizer is tokenizer:
                return known
            images = ImageProcessor.from_config(self.config.to_public_dict())
            made = Assistant(self, Processor(images, tokenizer))
            if known is not None:
                made.engine = known.engine      # its graphs serve any tokenizer
            object.__setattr__(self, "_assistant", made)
            return made

    def chat(self, tokenizer: SentencePieceText, query: str, image: Sequence[ImageSource] = (),
             hd_num: int | None = None, history: History = (), streamer: Streamer | None = None,
             max_new_tokens: int = 1024, do_sample: bool = True, num_beams: int = 1, temperature: float = 1.0,
             top_p: float = 0.8, repetition_penalty: float = 1.005, infer_mode: str = "base", use_meta: bool = False,
             meta_instruction: str = META_INSTRUCTION, **kwargs: Any) -> tuple[str, list[tuple[str, str]]]:
        """Answers a question about images.

        Args:
            tokenizer: the model's tokenizer.
            query: the question; `<ImageHere>` marks an image's place, a single image may go without.
            image: images of the whole conversation, in the order of their places: paths (a video's too), bytes, PIL
                images or uint8 arrays; a single one need not be in a list.
            hd_num: tiles of a single image at most; `None` is the model's own limit, 24 for the public model. Several
                images take 6 tiles each (public rule).
            history: finished rounds (question, answer), as an earlier call returned them, or in another form of
                `messages.read_history`.
            streamer: MindFormers' or Hugging Face's streamer (`put`, `end`), which gets ids as they come.
            max_new_tokens: new tokens at most.
            do_sample: sample instead of taking the likeliest token.
            num_beams: beams; 1 is no beam search.
            temperature: of sampling.
            top_p: of sampling.
            repetition_penalty: 1 is none.
            infer_mode: task LoRAs in use, a key of `fields.MODE_ADAPTERS`.
            use_meta: begin with the system turn `meta_instruction`.
            meta_instruction: text of the system turn.
            **kwargs: further fields of `GenerationOptions` (`top_k`, `seed`, `length_penalty`, ...), and
                `control_tokens` (see `Processor`).

        Returns:
            The answer, and the history with this round appended.

        Raises:
            PromptError: when images and their places differ in number, or nothing is asked.
            GenerationError: for an option outside its range, or a streamer together with beams.
            ConfigError: for an unknown `infer_mode`.
        """
        check_mode("infer_mode", infer_mode)
        assistant = self.assistant_for(tokenizer)
        rounds = read_history(history)
        question = {"query": query, "images": image_list(image), "hd_num": hd_num, "history": rounds,
                    "meta_instruction": meta_instruction if use_meta else "",
                    "control_tokens": kwargs.pop("control_tokens", None)}
        options = GenerationOptions(
            max_new_tokens=max_new_tokens, do_sample=do_sample, num_beams=num_beams, temperature=temperature,
            top_p=top_p, repetition_penalty=repetition_penalty,
            **{"stop_token_ids": assistant.stop_token_ids, **known_options(kwargs)})
        response = assistant.reply(question, options, infer_mode, streamer)
        return response, [*rounds, (query, response)]

    def write_article(self, inst: str, image: Sequence[ImageSource] = (), hd_num: int | None = 25,
                      history: History = (), streamer: Streamer | None = None, max_new_tokens: int | None = None,
                      do_sample: bool = True, num_beams: int = 1, temperature: float = 1.0, top_p: float = 0.8,
                      repetition_penalty: float = 1.005, max_length: int = ARTICLE_LENGTH, seed: int = -1,
                      use_meta: bool = False, **kwargs: Any) -> str:
        """Writes an article (mode `write`: the sft and dpo LoRAs); `write_artical`, as the public code spells it, too.

        Args:
            inst: what to write; `<ImageHere>` marks an image's place.
            image: as in `chat`.
            hd_num: as in `chat`.
            history: must be empty: articles know no rounds.
            streamer: as in `chat`.
            max_new_tokens: new tokens at most; `None` leaves it to `max_length`.
            do_sample: as in `chat`, likewise the following up to `repetition_penalty`.
            num_beams: beams.
            temperature: of sampling.
            top_p: of sampling.
            repetition_penalty: 1 is none.
            max_length: positions of prompt and article together.
            seed: of sampling; -1 is none.
            use_meta: begin with a system turn.
            **kwargs: `meta_instruction`, `control_tokens`, and fields of `GenerationOptions`; `top_k` is 40.

        Returns:
            The article.
        """
        if history:
            raise PromptError(f"history has {len(history)} round(s); articles are written in one go, use chat for "
                              "conversations.")
        return self._write(inst, image, "write", seed, use_meta, kwargs, streamer=streamer, hd_num=hd_num,
                           total=max_length if max_new_tokens is None else None,
                           options={"top_k": 40, "max_new_tokens": max_new_tokens or max_length,
                                    "do_sample": do_sample, "num_beams": num_beams, "temperature": temperature,
                                    "top_p": top_p, "repetition_penalty": repetition_penalty})

    # the public code's spelling
    write_artical = write_article

    def write_webpage(self, inst: str, image: Sequence[ImageSource] = (), max_new_tokens: int = 4800,
                      do_sample: bool = True, num_beams: int = 2, temperature: float = 1.0,
                      repetition_penalty: float = 3.0, seed: int = -1, use_meta: bool = False,
                      task: str = "Instruction-aware Webpage Generation",
                      save_to: str | os.PathLike | None = None, overwrite: bool = False, **kwargs: Any) -> str:
        """Writes a web page from an instruction (mode `web`).

        Args:
            inst: what the page should be.
            image: as in `chat`.
            max_new_tokens: new tokens at most.
            do_sample: sample (with several beams: beam sampling, as the public code).
            num_beams: beams.
            temperature: of sampling.
            repetition_penalty: 1 is none.
            seed: of sampling; -1 is none.
            use_meta: begin with a system turn.
            task: names the task; of no effect (the public code names its file after it).
            save_to: file to write the page to.
            overwrite: whether that file may exist already.
            **kwargs: `meta_instruction`, `control_tokens`, `hd_num`, `streamer` and fields of `GenerationOptions`.

        Returns:
            The page's HTML.

        Raises:
            FileExistsError: before anything is computed, when `save_to` exists and `overwrite` is not set.
        """
        target = free_target(save_to, overwrite)
        streamer, hd_num = kwargs.pop("streamer", None), kwargs.pop("hd_num", None)
        text = self._write(inst, image, "web", seed, use_meta, kwargs, streamer=streamer, hd_num=hd_num, options={
            "max_new_tokens": max_new_tokens, "do_sample": do_sample, "num_beams": num_beams,
            "temperature": temperature, "repetition_penalty": repetition_penalty})
        page = html_of(text)
        if target is not None:
            write_whole(target, page)
        return page

    def resume_2_webpage(self, inst: str | os.PathLike, image: Sequence[ImageSource] = (), *args: Any,
                         prompt: str = RESUME_INSTRUCTION, task: str = "Resume-to-Personal Page",
                         **kwargs: Any) -> str:
        """Writes a personal page from a resume in Markdown.

        Args:
            inst: the resume's file.
            image: as in `chat`.
            *args: as in `write_webpage`.
            prompt: instruction in front of the resume.
            task: as in `write_webpage`.
            **kwargs: as in `write_webpage`.

        Returns:
            The page's HTML.

        Raises:
            PromptError: when the file is missing, empty or no text.
        """
        return self.write_webpage(prompt + read_resume(inst), image, *args, **{"task": task, **kwargs})

    def screen_2_webpage(self, inst: str = SCREENSHOT_INSTRUCTION, image: Sequence[ImageSource] = (), *args: Any,
                         task: str = "Screenshot-to-Webpage", **kwargs: Any) -> str:
        """Writes the web page that a screenshot shows.

        Args:
            inst: the instruction (the public code ignores it and always takes its own).
            image: the screenshot, as in `chat`.
            *args: as in `write_webpage`.
            task: as in `write_webpage`.
            **kwargs: as in `write_webpage`.

        Returns:
            The page's HTML.

        Raises:
            PromptError: without an image.
        """
        if not image_list(image):
            raise PromptError("screen_2_webpage needs a screenshot; give it as image.")
        return self.write_webpage(inst, image, *args, **{"task": task, **kwargs})

    def _write(self, inst: str, image: object, mode: str, seed: int, use_meta: bool, kwargs: dict,
               streamer: Streamer | None, hd_num: int | None, options: dict, total: int | None = None) -> str:
        """One answer in a task's mode; `total` bounds prompt and answer together."""
        assistant = self.assistant_for(self.tokenizer)
        meta = kwargs.pop("meta_instruction", META_INSTRUCTION)
        question = {"query": inst, "images": image_list(image), "hd_num": hd_num,
                    "meta_instruction": meta if use_meta else "",
                    "control_tokens": kwargs.pop("control_tokens", None)}
        chosen = GenerationOptions(**{"stop_token_ids": assistant.stop_token_ids, **options,
                                      "seed": None if seed == -1 else seed, **known_options(kwargs)})
        return assistant.reply(question, chosen, mode, streamer, total)

    def generate(self, input_ids: Array, pixel_values: Array | None = None, image_mask: Array | None = None,
                 vision_index: Array | None = None, attention_mask: Array | None = None,
                 streamer: Streamer | None = None, infer_mode: str = "base",
                 tokenizer: SentencePieceText | None = None,
                 generation_config: NamedOptions | dict[str, Any] | None = None, **kwargs: Any) -> np.ndarray:
        """Continues token ids, with Hugging Face's semantics.

        The first arguments are what `IXC25Processor` returns: `model.generate(**processor(text, image))`.

        Args:
            input_ids: int `(L,)` or `(B, L)`.
            pixel_values: float32 `(B, t, 3, P, P)`, tiles of each prompt.
            image_mask: int `(B, L)`, 1 on image positions.
            vision_index: int `(B, L)`, row of each prompt's vision table of t tiles for each image position.
            attention_mask: int `(B, L)`, 0 on padding; by default everything is real.
            streamer: as in `chat`, for a single prompt.
            infer_mode: as in `chat`.
            tokenizer: needed for `stop_strings` only.
            generation_config: an object or dict with options; those given by name win.
            **kwargs: fields of `GenerationOptions`, with Hugging Face's `max_length` (prompt included) and
                `eos_token_id` (one or several) for `max_new_tokens` and `stop_token_ids`, and
                `prompt_lookup_num_tokens` for `prompt_lookup`. The repetition penalty counts new tokens only, as the
                public model's does.

        Returns:
            int32 `(B, L + new)`: the prompts as given, then the new ids, padded with `pad_token_id`.

        Raises:
            GenerationError: for an unknown option or one outside its range.
        """
        check_mode("infer_mode", infer_mode)
        ids = np.atleast_2d(as_array(input_ids)).astype(np.int32)
        samples = [sample_of(ids, i, as_array(attention_mask), as_array(pixel_values), as_array(image_mask),
                             as_array(vision_index), self.config) for i in range(len(ids))]
        options = hugging_face_options(generation_config, kwargs, ids.shape[1], self.config)
        with TURNS:
            if self.__dict__.get("_assistant") is None:
                object.__setattr__(self, "_assistant", Assistant(self, None))
            assistant: Assistant = self.__dict__["_assistant"]
        if tokenizer is not None:
            assistant = self.assistant_for(tokenizer)
        elif options.stop_strings and assistant.processor is None:
            raise GenerationError("stop_strings need the tokenizer; give generate(..., tokenizer=tokenizer).")
        new = assistant.generate(samples, options, infer_mode, streamer)
        longest = max(len(row) for row in new)
        rows = [row + [self.config.pad_token_id] * (longest - len(row)) for row in new]
        return np.concatenate((ids, np.array(rows, np.int32).reshape(len(ids), longest)), 1)


def image_list(image: object) -> list:
    """Images as a list; `None` is none, and a single one may stand alone."""
    if image is None:
        return []
    return list(image) if isinstance(image, (list, tuple)) else [image]


@overload
def as_array(value: None) -> None: ...


@overload
def as_array(value: Array) -> np.ndarray: ...


def as_array(value: Array | None) -> np.ndarray | None:
    """A MindSpore tensor, list or array as an array."""
    if value is None:
        return None
    return value.asnumpy() if hasattr(value, "asnumpy") else np.asarray(value)


def sample_of(ids: np.ndarray, row: int, attention_mask: np.ndarray | None, pixels: np.ndarray | None,
              image_mask: np.ndarray | None, index: np.ndarray | None, config: ModelConfig) -> EncodedSample:
    """One row of `generate`'s arguments as a sample without its padding."""
    given = [value is not None for value in (pixels, image_mask, index)]
    if any(given) and not all(given):
        raise PromptError("pixel_values, image_mask and vision_index belong together; give all three or none.")
    real: slice | np.ndarray = slice(None) if attention_mask is None else np.atleast_2d(attention_mask)[row] != 0
    ids = ids[row][real]
    vision = config.vision_config
    if not len(ids):
        raise PromptError(f"Prompt {row} is empty; a prompt needs at least one token.")
    if pixels is None or image_mask is None or index is None or not image_mask[row].any():
        return EncodedSample(ids, np.full_like(ids, IGNORE_INDEX), np.zeros_like(ids), [],
                             Tiles.none(vision.image_size), vision.tokens_per_side)
    tiles = Tiles.of_normalised(pixels[row])
    return EncodedSample(ids, np.full_like(ids, IGNORE_INDEX), image_mask[row][real].astype(np.int32), [], tiles,
                         vision.tokens_per_side, index[row][real])


