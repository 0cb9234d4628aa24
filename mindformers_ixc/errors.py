"""Every error of this package: each is a sentence that says what was found, where, and what to do."""
from __future__ import annotations


class ConfigError(ValueError):
    """A configuration value that is unknown or contradicts another one."""


class DataError(ValueError):
    """Training data that cannot be used; the message names file, sample and field."""


class PromptError(ValueError):
    """Text and images that do not fit together."""


class ImageError(ValueError):
    """An image that cannot be read or cannot be partitioned."""


class SampleError(ImageError):
    """A sample that cannot be used any more, and could when its source was indexed; like one with a damaged picture."""


class VideoError(ValueError):
    """A video that cannot be read, or frames that cannot be put on a board."""


class GenerationError(ValueError):
    """A decoding option outside its range, or scores that nothing can be decoded from."""


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged or of another model, or a target that cannot be written."""


class TrainingError(ValueError):
    """A run that must not go on; the message says at which step, with which samples, and what to do."""


class LayoutError(ValueError):
    """A graph that does not compile for a layout, or compiles to other slices than the table of cuts says.

    It is a defect of the model's strategies, not of the input.
    """


class BuildError(OSError):
    """Libraries that cannot be built here; the message says what is missing."""


class RanksError(OSError):
    """Ranks of a server that are no longer together."""


class ServerError(OSError):
    """A server that does not answer, or refuses what it was asked.

    Attributes:
        status: of its answer in HTTP; `None` when there was none.
        retry_after: seconds after which it wants to be asked again.
    """

    def __init__(self, sentence: str, status: int | None = None, retry_after: float | None = None):
        super().__init__(sentence)
        self.status, self.retry_after = status, retry_after
