"""`pipeline("multimodal_chat")`: questions about images through MindFormers' pipeline interface."""
from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from mindformers.pipeline.base_pipeline import Pipeline
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from mindformers_ixc.decoding_options import check_reward
from mindformers_ixc.errors import GenerationError, PromptError
from mindformers_ixc.generation.ascend import prepare_inference
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.best_of import BestOf
from mindformers_ixc.generation.options import known_options
from mindformers_ixc.generation.requests import error_sentence, read_request
from mindformers_ixc.generation.scoring import Scorer
from mindformers_ixc.generation.store import Store
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.processing.processor import ImageProcessor, Processor
from mindformers_ixc.processing.tokenizer import SentencePieceText
from mindformers_ixc.sections import check_value, whole

TASK = "multimodal_chat"

# Arguments of a call that go to the prompt; everything else is a decoding option.
PROMPT_ARGUMENTS = ("history", "meta_instruction", "hd_num", "control_tokens")


@MindFormerRegister.register(MindFormerModuleType.PIPELINE, alias=TASK)
class MultimodalChatPipeline(Pipeline):
    """MindFormers' pipeline of the task `multimodal_chat`.

    A request is a dict with `query`, `images` (a list, optional) and `history` (optional), a plain question, or a list
    of messages (`[{"role": "user", "content": [{"type": "image", "image": ...}, {"type": "text", "text": ...}]}]`).
    Several requests come as a list or a generator; one that fails gives `{"error": sentence}` in its place, whatever is
    wrong with it (requests are counted from 0). Threads may share a pipeline; their requests are answered in turn.

    Args:
        model: `IXC25ForCausalLM`.
        tokenizer: its tokenizer; not needed when `processor` is given.
        image_processor: its image processor; by default one of the sizes in the model's configuration.
        processor: its `Processor`; by default one made of the two before.
        reuse_bytes: memory for what earlier requests computed of pictures and prompts, which the next ones take over;
            0 for none, by default what the model's configuration says.
        **kwargs: options of every call (`mode`, those of `PROMPT_ARGUMENTS`, fields of `GenerationOptions`; `best_of`,
            samples of a question of which the best is given, and `reward`, the directory of the reward model that
            chooses, or a `Scorer`) and MindFormers' own (`batch_size`, ...).

    Raises:
        GenerationError: for an unknown option, here and in calls; naming it and the choices.

    Examples:
        >>> import mindformers_ixc
        >>> from mindformers import pipeline
        >>> chat = pipeline("multimodal_chat", model="out/model")
        >>> chat({"query": "What is shown?", "images": ["photo.jpg"]})
        [{'text_generation_text': 'a cat'}]
    """

    return_name = "text_generation"

    def __init__(self, model: IXC25Model, tokenizer: SentencePieceText | None = None,
                 image_processor: ImageProcessor | None = None, processor: Processor | None = None,
                 reuse_bytes: int | None = None, **kwargs: Any):
        check_value("reuse_bytes", 0 if reuse_bytes is None else reuse_bytes, whole(0), GenerationError)
        prepare_inference()
        if processor is None:
            # MindFormers hands over the directory's tokenizer but knows no image processor for it
            image_processor = image_processor or ImageProcessor.from_config(model.config.to_public_dict())
            processor = Processor(image_processor=image_processor, tokenizer=tokenizer)
        kwargs.pop("audio_processor", None)      # MindFormers hands one over to every pipeline
        super().__init__(model, tokenizer=processor.tokenizer, image_processor=processor.image_processor, **kwargs)
        model.set_train(False)
        self.assistant = Assistant(model, processor, None if reuse_bytes is None else Store(reuse_bytes))
        self.scorers: dict[Any, Scorer] = {}

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict, dict, dict]:
        prompt = {key: parameters.pop(key) for key in PROMPT_ARGUMENTS if key in parameters}
        parameters.pop("batch_size", None)          # MindFormers' own, which it takes after this
        return prompt, known_options(parameters, ("mode", "best_of", "reward", *PROMPT_ARGUMENTS)), {}

    def preprocess(self, inputs: Any, **prompt: Any) -> dict:
        """Turns a request into the arguments of `Processor.encode_chat`.

        Raises:
            PromptError: for a request that is none of the known forms.
        """
        return {**prompt, **read_request(inputs)}

    def _forward(self, model_inputs: dict, **options: Any) -> dict[str, Any]:
        mode = options.pop("mode", "base")
        best_of, reward = options.pop("best_of", None), options.pop("reward", None)
        check_reward(best_of, reward, options)
        if best_of is not None:
            best = BestOf(self.assistant, best_of, self._scorer(reward))
            found = best.answer(model_inputs, mode, **options)
            return {"text": found[0].text, "samples": [one.to_dict() for one in found]}
        return {"text": self.assistant.answer([model_inputs], mode, **options)[0]}

    def postprocess(self, model_outputs: dict[str, Any], **_: Any) -> list[dict[str, Any]]:
        """Wraps the answer as MindFormers' text pipelines do; `samples` stay beside it."""
        return [{f"{self.return_name}_text": model_outputs["text"],
                 **{key: value for key, value in model_outputs.items() if key != "text"}}]

    def _scorer(self, reward: Any) -> Scorer | None:
        """The scorer of a reward model's directory, loaded once, or the one that was given.

        Raises:
            GenerationError: when it is neither.
        """
        if reward is None or isinstance(reward, Scorer):
            return reward
        if not isinstance(reward, (str, os.PathLike)):
            raise GenerationError(f"reward is {reward!r:.60}; it must be the directory of a reward model, or a Scorer, "
                                  "which model.scorer() of a loaded one is.")
        if reward not in self.scorers:
            self.scorers[reward] = Scorer.from_directory(reward)
        return self.scorers[reward]

    def __call__(self, inputs: Any, batch_size: int | None = None, **kwargs: Any) -> list[dict[str, str]]:
        """Answers one request, a list or a generator of them; options as for the class.

        Returns:
            `[{"text_generation_text": answer}]`, one entry a request.
        """
        if is_messages(inputs):   # one request, though it is a list
            return super().__call__([inputs], batch_size, **kwargs)
        if isinstance(inputs, Iterator):
            inputs = list(inputs)
        return super().__call__(inputs, batch_size, **kwargs)

    def run_multi(self, inputs: list, batch_size: int, preprocess_params: dict, forward_params: dict,
                  postprocess_params: dict) -> list[dict[str, str]]:
        """Answers a list of requests one by one; a bad one does not keep the others from being answered."""
        outputs: list[dict[str, str]] = []
        for number, item in enumerate(inputs):
            try:
                outputs += self.run_single(item, preprocess_params, forward_params, postprocess_params)
            except MemoryError:
                raise
            except Exception as error:
                outputs.append({"error": f"request {number}: {error_sentence(error)}"})
        return outputs

    def run_single(self, inputs: Any, preprocess_params: dict, forward_params: dict,
                   postprocess_params: dict) -> list[dict[str, str]]:
        """Answers one request.

        Raises:
            ValueError: of the package's classes, or OSError, whatever went wrong with the request.
        """
        try:
            return super().run_single(inputs, preprocess_params, forward_params, postprocess_params)
        except (ValueError, OSError, MemoryError):
            raise
        except Exception as error:
            raise PromptError(error_sentence(error)) from error


def is_messages(inputs: object) -> bool:
    """Whether a request has the message form."""
    return isinstance(inputs, (list, tuple)) and bool(inputs) and all(
        isinstance(item, dict) and "role" in item for item in inputs)
