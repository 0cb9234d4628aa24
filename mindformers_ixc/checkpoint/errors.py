"""What goes wrong with checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged or of another model, or a target that cannot be written."""
