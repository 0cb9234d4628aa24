"""Rotary embeddings: keys beyond the trained length, and settings that no door may drop."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import parity_wide
import pytest
from reference import ReferenceModel, cached_angles, rotary_angles

import mindformers_ixc  # noqa: F401  (registers what recipes name)
from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.checkpoint.inspection import inspect
from mindformers_ixc.cli.run_config import check_fields
from mindformers_ixc.cli.yaml_file import read_yaml
from mindformers_ixc.config import read_config
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.generation import slots
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.loading import load_model
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.processing.encoded import EncodedSample

# Of the model in goldens_more/t1, trained on 64 positions.
PROMPTS, NEW = (50, 62), 20


def text_prompt(ids: np.ndarray) -> EncodedSample:
    """A prompt without pictures."""
    ids = ids.astype(np.int32)
    return EncodedSample(ids, np.full_like(ids, -100), np.zeros_like(ids), [], np.zeros((0, 3, 56, 56), np.float32), 2)


@pytest.fixture(scope="module")
def rows() -> list[np.ndarray]:
    """Ids of prompts and of what is appended to them."""
    rng = np.random.default_rng(5)
    return [rng.integers(3, 500, length + NEW) for length in PROMPTS]


@pytest.fixture(scope="module")
def assistant(goldens_more) -> Assistant:
    return Assistant(load_model(goldens_more / "t1"), None)


def compare(assistant, folder, rows, angles) -> None:
    """Compares decoding in a batch with the formulae, row by row, at the angles of (configuration, prompt, length)."""
    decoder = assistant.engine.decoder([text_prompt(ids[:-NEW]) for ids in rows], NEW)
    ours = np.stack([decoder.prefill(), *(decoder.step(np.array(tokens)) for tokens in zip(*(i[-NEW:] for i in rows)))])
    model = ReferenceModel(folder)
    for row, ids in enumerate(rows):
        embeds = model.embed(ids)[None]
        turned = angles(model.config, len(ids) - NEW, len(ids))
        theirs = model.logits(embeds, np.zeros(embeds.shape[:2], bool), angles=turned)[0, -NEW - 1:]
        np.testing.assert_allclose(ours[:, row], theirs, atol=5e-5)


def test_each_new_key_turns_by_the_length_so_far(assistant, goldens_more, rows):
    compare(assistant, goldens_more / "t1", rows, cached_angles)


def test_one_base_for_the_whole_request_can_be_had(assistant, goldens_more, rows, monkeypatch):
    def of_request(config, prompt, length):
        return rotary_angles(config, length)

    monkeypatch.setattr(assistant.model.config, "dynamic_ntk", "request")
    compare(assistant, goldens_more / "t1", rows, of_request)
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compare(assistant, goldens_more / "t1", rows, of_request)


@pytest.mark.slow
def test_caches_that_can_be_cut_follow_the_same_rule(goldens_more, monkeypatch):
    monkeypatch.setattr(slots, "ContiguousSlot", slots.ShardedSlot)
    (row,) = parity_wide.check_cached(goldens_more / "t1")
    assert (row.cases, row.passed) == (15, True)


@pytest.fixture
def directory(goldens, tmp_path):
    """A model directory, and a function that writes its rotary settings anew."""
    shutil.copytree(goldens / "t1", tmp_path / "model", ignore=shutil.ignore_patterns("bin", "*.npz"))

    def write(**settings):
        file = tmp_path / "model" / "config.json"
        fields = {key: value for key, value in json.loads(file.read_text()).items() if not key.startswith("rope")}
        file.write_text(json.dumps({**fields, **settings}))
        return tmp_path / "model"

    return write


@pytest.mark.parametrize("settings", [
    {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 5e5}},
    {"rope_theta": 500000, "rope_scaling": {"rope_type": "dynamic", "factor": 3}},
    {"rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 3.0, "rope_theta": 5e5}},
])
def test_every_door_reads_every_spelling_and_writes_the_public_one(directory, tmp_path, settings):
    folder, public = directory(**settings), (5e5, {"type": "dynamic", "factor": 3.0})
    config = read_config(folder, IXC25Config)
    assert (config.rope_theta, config.rope_scaling) == public
    again = IXC25Config(**{key: value for key, value in config.to_dict().items() if key != "model_type"})
    assert (again.rope_theta, again.rope_scaling) == public
    convert(folder, tmp_path / "converted", to="hf")
    written = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]) == public
    assert "rope_parameters" not in written
    inspect(folder)


@pytest.mark.parametrize(("settings", "word"), [
    ({"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type is 'yarn'"),
    ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "rope_parameters.rope_theta"),
    ({"rope_theta": 1e6, "rope_scaling": {"type": "dynamic"}}, "no factor"),
])
def test_no_door_drops_what_it_does_not_have(directory, tmp_path, settings, word):
    folder = directory(**settings)
    for door in (read_config, inspect, lambda path: convert(path, tmp_path / "converted", to="hf")):
        with pytest.raises(ConfigError, match=word):
            door(folder)
    assert not (tmp_path / "converted").exists()


def test_a_yaml_may_have_the_newer_spelling():
    fields = read_yaml(Path(__file__).parents[2] / "yaml_configs" / "ixc25_sft_tiny.yaml")
    section = fields["model"]["model_config"]
    settings = {name: section.pop(name) for name in ("rope_theta", "rope_scaling")}
    section["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    check_fields(fields, "my.yaml")
    config = IXC25Config(**{name: value for name, value in section.items() if name != "type"})
    assert {"rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling} == settings
