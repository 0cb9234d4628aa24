"""What is published beside this model: its repositories, the command that downloads one, and models it is mistaken for.

Nothing in this package goes online. docs/weights.md has the table of these repositories.
"""
from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Repository:
    """A public repository of the model's family.

    Attributes:
        name: without its owner.
        gigabytes: of its weights, 10^9 bytes; `None` where no public list of its files was seen.
        what: what it is.
        joined: what `mindformers assemble` joins it with, where it is no model by itself.
    """

    name: str
    gigabytes: float | None
    what: str
    joined: str = ""


# The first is the model this package is for. Sizes: docs/weights.md says where each is from.
REPOSITORIES = (
    Repository("internlm-xcomposer2d5-7b", 22.2, "InternLM-XComposer-2.5 with its three task LoRAs"),
    Repository("internlm-xcomposer2d5-7b-chat", None, "the same after reinforcement learning; not tried here"),
    Repository("internlm-xcomposer2d5-7b-reward", 16.6, "a model that scores answers"),
    Repository("internlm-xcomposer2d5-7b-4bit", None, "the first in 4 bit (AWQ)"),
    Repository("internlm-xcomposer2d5-ol-7b", None, "a system for streams of video and sound, in five folders"),
    Repository("internlm-xcomposer2d5-clip", 1.1, "the vision tower alone", "a language model"),
)
HUGGING_FACE, MODEL_SCOPE = "internlm", "Shanghai_AI_Laboratory"

# Names of the language models that `mindformers assemble` takes, which are of the same owners.
_LANGUAGE = re.compile(r"internlm2(_5)?-\w+")

# Other models that lie beside this one in public repositories, by `model_type` or the class that `architectures` names,
# and what they are. The values of the two inside OmniLive are those of the models that it was made of.
RELATIVES = {
    "clip_vision_model": "a CLIP vision tower, which `mindformers assemble` joins with a language model",
    "clip": "a CLIP model, whose vision tower `mindformers assemble` joins with a language model",
    "internlm2": "an InternLM2 language model, which `mindformers assemble` joins with a vision tower",
    "GroundQwenForCausalLM": "OmniLive's memory model, which is another model and does nothing here",
    "qwen2_audio": "OmniLive's audio model (a Qwen2-Audio), which is another model and does nothing here",
    "Qwen2AudioForConditionalGeneration": "OmniLive's audio model (a Qwen2-Audio), which is another model and does "
                                          "nothing here",
}


def relative_of(fields: Mapping[str, Any], own: str) -> str | None:
    """What another model is, by its `config.json`; `None` for this one, and where nothing says so.

    Args:
        fields: of the file.
        own: `model_type` of this model.
    """
    kind, names = fields.get("model_type"), fields.get("architectures")
    classes = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    # the more telling name first: the memory model calls its type that of what it was made of
    known = next((RELATIVES[key] for key in (*reversed(classes), kind) if isinstance(key, str) and key in RELATIVES),
                 None)
    if known is not None or kind == own or (kind is None and not classes):
        return known
    return f"another model ({[*classes, kind][0]!s:.80}), which does nothing here"


_URL = re.compile(r"(?:hf|modelscope):/+|(?:https?:/+)?(?:www\.)?"
                  r"(?:huggingface\.co|hf\.co|hf-mirror\.com|modelscope\.(?:cn|com))/(?:models/)?", re.IGNORECASE)
# A branch or another state behind a name.
_REVISION = re.compile(r"@[\w./-]+$")


def download_command(name: str, folder: str | None = None) -> str:
    """The command of Hugging Face's own tool that downloads a repository.

    Args:
        name: of the repository, without its owner.
        folder: where to; by default one of the repository's name in the working directory.
    """
    return f"huggingface-cli download {HUGGING_FACE}/{name} --local-dir {folder or name}"


def hub_name(path: str | os.PathLike) -> str | None:
    """The repository that a path names which is no file or folder here: `internlm/NAME`, a URL, or the bare name.

    Returns:
        The repository's name without its owner; `None` for anything that is here or is no name of this family.
    """
    text = os.fspath(path)
    if Path(text).exists():
        return None
    bare = _URL.sub("", _REVISION.sub("", text), count=1).strip("/")
    owner, _, rest = bare.rpartition("/")
    owners = {HUGGING_FACE.lower(), MODEL_SCOPE.lower()}
    if _URL.match(text):            # an address: owner, name, and perhaps tree/main behind them
        parts = bare.split("/")
        owner, rest = (parts[0], parts[1]) if len(parts) > 1 else ("", bare)
    known = {repository.name.lower(): repository.name for repository in REPOSITORIES}
    if rest.lower() in known and (not owner or owner.lower() in owners):
        return known[rest.lower()]
    # another model of these owners, where no folder of that name can have been meant
    if owner.lower() in owners and re.fullmatch(r"[\w.-]+", rest) and not Path(text).parent.exists():
        return rest
    return None


def not_a_folder(path: str | os.PathLike, what: str = "") -> str | None:
    """The sentence for a name on a hub where a folder is expected; `None` for any other path.

    Args:
        path: what was given.
        what: where it was given, such as `load_checkpoint`.
    """
    name = hub_name(path)
    if name is None:
        return None
    where = f"{what}: " if what else ""
    found = next((repository for repository in REPOSITORIES if repository.name == name), None)
    joined = "a vision tower" if found is None and _LANGUAGE.fullmatch(name) else found.joined if found else ""
    if joined:
        return (f"{where}{os.fspath(path)} is a name on a hub, no folder here, and alone no model of this kind: "
                f"`mindformers assemble` joins it with {joined}. Download it with `{download_command(name)}`, then "
                f"give assemble the folder {name} (docs/checkpoints.md).")
    if found is None:
        first = REPOSITORIES[0].name
        return (f"{where}{os.fspath(path)} is a name on a hub, no folder here, and of another model. This package is "
                f"for {first}: `{download_command(first)}` (docs/weights.md).")
    size = f"its {found.gigabytes:.1f} GB" if found.gigabytes else "it"
    return (f"{where}{os.fspath(path)} is a name on a hub, no folder here, and nothing in this package goes online. "
            f"Download {size} with `{download_command(name)}` or `modelscope download --model "
            f"{MODEL_SCOPE}/{name} --local_dir {name}`, then give the folder {name} (docs/weights.md).")
