"""Rotary settings: every spelling read as the public one, contradictions and other models' settings refused."""
from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ixc.config import ModelConfig, read_config
from mindformers_ixc.errors import ConfigError

DYNAMIC = {"type": "dynamic", "factor": 2.0}
# as the public file has it
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.mark.parametrize(("fields", "theta", "scaling"), [
    ({}, 1e6, None),
    ({"rope_scaling": None, "rope_theta": 10000}, 10000.0, None),
    ({"rope_scaling": {}}, 1e6, None),
    ({"rope_scaling": DYNAMIC}, 1e6, DYNAMIC),
    ({"rope_scaling": {"type": "dynamic", "factor": 2}}, 1e6, DYNAMIC),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 1e6, DYNAMIC),
    ({"rope_scaling": {**DYNAMIC, "rope_type": "dynamic"}}, 1e6, DYNAMIC),
    ({"rope_scaling": {"type": "default"}}, 1e6, None),
    ({"rope_scaling": {"rope_type": "default", "factor": 1.0}}, 1e6, None),
    ({"rope_scaling": {**DYNAMIC, "original_max_position_embeddings": 64}}, 1e6, DYNAMIC),
    ({"rope_scaling": {**DYNAMIC, "partial_rotary_factor": 1.0}}, 1e6, DYNAMIC),
    ({"rope_scaling": {**DYNAMIC, "rope_theta": 5e5}}, 5e5, DYNAMIC),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 4.0}}, 5e5,
     {"type": "dynamic", "factor": 4.0}),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000}, "rope_scaling": None}, 10000.0, None),
    ({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": DYNAMIC}, 5e5, DYNAMIC),
    ({"rope_parameters": {**DYNAMIC, "rope_theta": 1000000}, "rope_scaling": DYNAMIC, "rope_theta": 1e6}, 1e6, DYNAMIC),
    ({"rope_type": None, "partial_rotary_factor": None, "rope_scaling": DYNAMIC}, 1e6, DYNAMIC),
])
def test_every_spelling_becomes_the_public_one(fields, theta, scaling):
    config = ModelConfig(**SMALL, **fields)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
    public = config.to_public_dict()
    assert (public["rope_theta"], public.get("rope_scaling"), "rope_parameters" in public) == (theta, scaling, False)


@pytest.mark.parametrize(("fields", "words"), [
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["rope_scaling.rope_type is 'yarn'", "'dynamic'"]),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling.type is 'linear'"]),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["rope_parameters.rope_type is 'llama3'"]),
    ({"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}}, ["rope_parameters.long_factor"]),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["rope_parameters.full_attention"]),
    ({"rope_scaling": {"type": ["dynamic"], "factor": 2.0}}, ["rope_scaling.type is ['dynamic']"]),
    ({"rope_scaling": {**DYNAMIC, "rope_type": "default"}},
     ["rope_scaling.type says 'dynamic'", "rope_scaling.rope_type says 'default'"]),
    ({"rope_scaling": {"type": "dynamic"}}, ["rope_scaling", "no factor"]),
    ({"rope_scaling": {"type": "dynamic", "factor": None}}, ["rope_scaling", "no factor"]),
    ({"rope_parameters": {"rope_type": "dynamic"}}, ["rope_parameters", "no factor"]),
    ({"rope_scaling": {"factor": 2.0}}, ["rope_scaling has factor 2.0 and no type"]),
    ({"rope_scaling": {"type": "default", "factor": 2.0}}, ["factor 2.0", "does not scale"]),
    ({"rope_scaling": {"type": "dynamic", "factor": "2.0"}}, ["rope_scaling.factor is '2.0'"]),
    ({"rope_scaling": {"type": "dynamic", "factor": True}}, ["rope_scaling.factor is True"]),
    ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, ["rope_scaling.factor is 0.5", "at least 1"]),
    ({"rope_scaling": {"type": "dynamic", "factor": math.nan}}, ["rope_scaling.factor is nan"]),
    ({"rope_scaling": {**DYNAMIC, "original_max_position_embeddings": 32}},
     ["rope_scaling.original_max_position_embeddings is 32", "64"]),
    ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor is 0.5"]),
    ({"rope_scaling": "dynamic"}, ["rope_scaling is 'dynamic'", "a section"]),
    ({"rope_scaling": [DYNAMIC]}, ["rope_scaling is [", "a section"]),
    ({"rope_scaling": {**DYNAMIC, "factro": 3.0}}, ["rope_scaling.factro"]),
    ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}},
     ["rope_theta says 1000000.0", "rope_parameters.rope_theta says 10000.0"]),
    ({"rope_scaling": DYNAMIC, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
     ["rope_scaling says", "rope_parameters says"]),
    ({"rope_theta": -1.0}, ["rope_theta is -1.0"]), ({"rope_theta": "1e6"}, ["rope_theta is '1e6'"]),
    ({"rope_theta": 10 ** 400}, ["rope_theta is 1000", "a number above 0"]),
    ({"rope_parameters": {"rope_theta": math.inf}}, ["rope_parameters.rope_theta is inf"]),
    ({"rope_type": "dynamic"}, ["rope_type is 'dynamic'"]), ({"theta": 10000.0}, ["theta is 10000.0"]),
    ({"rotary_emb_base": 10000}, ["rotary_emb_base"]), ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    ({"extend_method": "NTK", "scaling_factor": 2.0}, ["extend_method is 'NTK'"]),
    ({"dynamic_ntk": "step"}, ["dynamic_ntk is 'step'", "public, request"]),
])
def test_what_the_model_does_not_have_is_refused_by_name(fields, words):
    with pytest.raises(ConfigError) as error:
        ModelConfig(**SMALL, **fields)
    assert [word for word in words if word not in str(error.value)] == []


PLAIN = st.sampled_from([None, True, False, 0, 1, 2, 10000, -1, 0.5, 2.0, 1e6, math.inf, math.nan, "", "2.0", "dynamic",
                         "default", "linear"])
KEYS = st.sampled_from(["type", "rope_type", "factor", "rope_theta", "beta"])


@given(st.dictionaries(st.sampled_from(["rope_theta", "rope_scaling", "rope_parameters"]),
                       PLAIN | st.lists(PLAIN, max_size=2) | st.dictionaries(KEYS, PLAIN, max_size=3)))
def test_whatever_is_written_is_read_or_refused(fields):
    try:
        config = ModelConfig(**SMALL, **fields)
    except ConfigError:
        return
    assert ModelConfig(**SMALL, rope_theta=config.rope_theta,
                       rope_scaling=config.rope_scaling).to_public_dict() == config.to_public_dict()
    assert math.isfinite(config.rope_theta)
    assert config.rope_scaling is None or config.rope_scaling["factor"] >= 1


def test_a_file_is_read_and_written_in_the_public_spelling(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**SMALL, "model_type": "internlmxcomposer2", "note": "kept", "rope_parameters":
                                {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5}}))
    config = read_config(file)
    assert (config.rope_theta, config.rope_scaling) == (5e5, DYNAMIC)
    public = config.to_public_dict()
    assert (public["rope_theta"], public["rope_scaling"], public["note"]) == (5e5, DYNAMIC, "kept")
    assert "rope_parameters" not in public
