"""Training from YAML: data sets, trainer, step cells, checkpoints of a run, its log, evaluation and PET types."""
import mindformers  # noqa: F401 - first, so that registration finds no module here half imported (`mindformers_ixc`)
