"""What a server is told when it starts: its name, its limits, whom it trusts."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mindformers_ixc.serving.limits import Limits


@dataclass(frozen=True)
class ServerSettings:
    """All a server is told.

    Attributes:
        name: of the model, as clients call it.
        modes: task LoRAs that the model has, `base` first.
        limits: what requests may take.
        api_key: that clients must send; empty for none.
        image_root: folder of pictures that requests may name by path; `None` for none.
        hosts: from which pictures may be fetched; none by default.
        origins: of pages elsewhere that may ask from a browser.
        control_tokens: text that is spelled like a control token becomes one.
        log_contents: questions and answers stand in the request log.
        has_page: whether `/` is a page to chat.
        weights: a mark that changes with the model's weights; empty where nobody knows one.
    """

    name: str
    modes: tuple[str, ...] = ("base",)
    limits: Limits = field(default_factory=Limits)
    api_key: str = ""
    image_root: Path | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    control_tokens: bool = False
    log_contents: bool = False
    has_page: bool = True
    weights: str = ""

    @property
    def models(self) -> dict[str, str]:
        """Mode of each name that a request's `model` may have."""
        return {self.name if mode == "base" else f"{self.name}:{mode}": mode for mode in self.modes}
