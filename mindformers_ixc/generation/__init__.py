"""Answers: graphs with a key/value cache, search and sampling, the public model's calls, requests and the pipeline."""
import mindformers  # noqa: F401 - first, so that registration finds no module here half imported (`mindformers_ixc`)
