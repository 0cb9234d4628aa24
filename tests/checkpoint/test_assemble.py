"""A model to pre-train, made of a language model and a tower: against the parts themselves, and PyTorch's bicubic."""
from __future__ import annotations

import json

import numpy as np
import pytest
from random_model import SIZES, random_arrays, save

from mindformers_ixc.checkpoint.assemble import TOWER_FIELDS, InterpolatedPositions, assemble
from mindformers_ixc.checkpoint.digests import verify_folder
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.checkpoint.start import begin, match_tensors
from mindformers_ixc.checkpoint.tensors import ArrayTensor
from mindformers_ixc.config import ModelConfig, read_config
from mindformers_ixc.errors import CheckpointError, ConfigError
from mindformers_ixc.parameters import VISION, parameter_table, part_of

POSITIONS = "embeddings.position_embedding.weight"
TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16,
         "patch_size": 14, "image_size": 336}
LANGUAGE = {**{name: SIZES[name] for name in SIZES if name not in ("vision_config", "plora_rank", "plora_alpha",
                                                                  "task_lora_ranks")},
            "model_type": "internlm2", "max_position_embeddings": 32768, "rope_theta": 1000000, "bias": False,
            "rope_scaling": {"type": "dynamic", "factor": 2.0}, "auto_map": {"AutoModel": "modeling.Other"}}


def arrays_of(path) -> dict[str, np.ndarray]:
    return {name: tensor.whole() for name, tensor in open_source(path).tensors.items()}


def write(folder, fields, arrays, dtype="F32"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    save(folder / "model.safetensors", arrays, dtype)
    return folder


@pytest.fixture
def language(tmp_path):
    arrays = {name: value for name, value in random_arrays(ModelConfig(**SIZES), "BF16").items()
              if part_of(name) == "language"}
    folder = write(tmp_path / "internlm2", LANGUAGE, arrays, "BF16")
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "modeling.py").write_text("# public code\n", encoding="utf-8")
    return folder


def tower_arrays(prefix="vision_model."):
    arrays = random_arrays(ModelConfig(**{**SIZES, "vision_config": TOWER}), seed=3)
    return {prefix + name.removeprefix(VISION + "."): value for name, value in arrays.items()
            if part_of(name) == "vision"}


@pytest.fixture
def tower(tmp_path):
    text = {"text_model.final_layer_norm.weight": np.ones(8, np.float32), "logit_scale": np.float32(4.6),
            "visual_projection.weight": np.ones((8, 16), np.float32),
            "vision_model.embeddings.position_ids": np.zeros((1, 577), np.float32)}
    return write(tmp_path / "clip", {"model_type": "clip", "vision_config": TOWER}, {**tower_arrays(), **text})


def test_the_parts_come_through_bit_by_bit_and_the_rest_is_new(language, tower, tmp_path):
    target = assemble(language, tower, tmp_path / "start")
    config, found, words = read_config(target), arrays_of(target), arrays_of(language)
    for name, value in words.items():
        np.testing.assert_array_equal(found[name], value)
    for name, value in tower_arrays(VISION + ".").items():
        if not name.endswith(POSITIONS):
            np.testing.assert_array_equal(found[name], value)
    assert list(found) == list(parameter_table(config))
    assert config.vision_config.image_size == 560 and config.task_lora_ranks == {} and config.plora_scale == 1
    assert config.max_position_embeddings == 24576 and config.rope_scaling == {"type": "dynamic", "factor": 2.0}
    fields = json.loads((target / "config.json").read_text())
    assert "auto_map" not in fields and fields["model_type"] == "internlmxcomposer2"
    assert not (target / "modeling.py").exists() and (target / "tokenizer.model").read_bytes() == b"pieces"
    assert verify_folder(target)


def test_new_parts_start_as_the_cells_start_them(language, tower, tmp_path):
    source = open_source(assemble(language, tower, tmp_path / "start", dtype="float32"))
    first = source.tensors["model.layers.0.attention.wqkv.Plora_A.weight"].whole()
    assert 0.018 < first.std() < 0.022 and abs(first.mean()) < 2e-3
    other = source.tensors["model.layers.1.attention.wqkv.Plora_A.weight"].whole()
    assert not np.array_equal(first, other)
    for name, tensor in source.tensors.items():
        if name.endswith(".Plora_B.weight") or (name.startswith("vision_proj") and name.endswith(".bias")):
            assert not tensor.whole().any(), name
        elif part_of(name) in ("projector", "separators", "partial_lora"):
            assert tensor.whole().any(), name


def test_the_seed_decides_what_is_drawn(language, tower, tmp_path):
    once, again, other = (arrays_of(assemble(language, tower, tmp_path / f"start{i}", seed=seed))
                          for i, seed in enumerate((5, 5, 6)))
    assert all(np.array_equal(once[name], again[name]) for name in once)
    assert not np.array_equal(once["vision_proj.0.weight"], other["vision_proj.0.weight"])


@pytest.mark.parametrize("side", [40, 24, 16])
def test_positions_are_pytorchs_bicubic(side):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).standard_normal((577, 8)).astype(np.float32) / 4
    grid = torch.from_numpy(table[1:].T.reshape(1, 8, 24, 24).copy())
    made = InterpolatedPositions(ArrayTensor(table, "F32"), side)
    np.testing.assert_array_equal(made.rows(0, 1)[0], table[0])
    # PyTorch's float32 differs by 1e-5 of the numbers from its own float64
    for values, bound in ((grid, 1e-5), (grid.double(), 1e-6)):
        wanted = torch.nn.functional.interpolate(values, size=(side, side), mode="bicubic", align_corners=False)
        np.testing.assert_allclose(made.rows(1, side ** 2 + 1), wanted.reshape(8, -1).T.numpy(), atol=bound, rtol=0)


def test_positions_are_the_cubic_kernels():
    """Without PyTorch: Keys' kernel with a = -0.75, point by point, beyond the edge the edge."""
    def kernel(x):
        x, a = abs(x), -0.75
        return (a + 2) * x ** 3 - (a + 3) * x ** 2 + 1 if x <= 1 else a * x ** 3 - 5 * a * x ** 2 + 8 * a * x - 4 * a

    table = np.random.default_rng(1).standard_normal((26, 1)).astype(np.float32)
    grid = np.pad(table[1:].reshape(5, 5).astype(np.float64), 3, mode="edge")
    made = InterpolatedPositions(ArrayTensor(table, "F32"), 8).whole()[1:].reshape(8, 8)
    for row, column in np.ndindex(8, 8):
        y, x = (row + 0.5) * 5 / 8 - 0.5, (column + 0.5) * 5 / 8 - 0.5
        near = [(int(np.floor(v)) + k) for v in (y, x) for k in (-1, 0, 1, 2)]
        wanted = sum(grid[i + 3, j + 3] * kernel(y - i) * kernel(x - j) for i in near[:4] for j in near[4:])
        assert made[row, column] == pytest.approx(wanted, abs=1e-6)


def test_the_tower_of_the_public_clip_and_one_in_a_model_are_the_same(language, tower, tmp_path):
    alone = write(tmp_path / "alone", {**TOWER, "model_type": "clip_vision_model"}, tower_arrays())
    inside = assemble(language, tower, tmp_path / "once")
    made = [arrays_of(assemble(words, sight, tmp_path / name)) for name, words, sight in
            (("a", language, tower), ("b", language, alone), ("c", inside, inside))]
    for other in made[1:]:
        for name, value in made[0].items():
            np.testing.assert_array_equal(value, other[name])


def test_omnilives_base_gives_its_language_model_and_tower(language, tower, tmp_path):
    inside = assemble(language, tower, tmp_path / "once")
    arrays = arrays_of(inside)
    width = SIZES["hidden_size"]
    memory = {"video_mem_proj.0.weight": (width, 24), "video_mem_proj.0.bias": (width,),
              "video_mem_proj.2.weight": (width, width), "video_mem_proj.2.bias": (width,)}
    both = {**arrays, **{name: np.ones(shape, np.float32) for name, shape in memory.items()}}
    base = write(tmp_path / "base", json.loads((inside / "config.json").read_text()),
                 {name: value.astype(np.float32) for name, value in both.items()})
    assert list(arrays_of(assemble(base, base, tmp_path / "start"))) == list(arrays)


def test_a_reward_model_is_no_language_model(language, tower, tmp_path):
    arrays = arrays_of(language)
    del arrays["output.weight"]
    arrays = {**arrays, "v_head.weight": np.ones((1, SIZES["hidden_size"]), np.uint16)}
    reward = write(tmp_path / "reward", {**LANGUAGE, "model_type": "internlmxcomposer2"}, arrays, "BF16")
    with pytest.raises(CheckpointError, match=r"reward is a reward model: it has v_head\.weight in place of output"):
        assemble(reward, tower, tmp_path / "start")
    fields = ModelConfig(**{**SIZES, "vision_config": TOWER, "reward_pooling": "last"}).to_public_dict()
    (reward / "config.json").write_text(json.dumps({**fields, "vision_config": {**TOWER, "image_size": 560}}))
    with pytest.raises(CheckpointError, match=r"is a reward model's; name the config\.json of a model that writes"):
        assemble(language, tower, tmp_path / "start", config=reward)


def test_what_can_be_refused_is_refused_before_anything_is_read(tmp_path):
    for given, words in ((({"seed": -1}), "seed is -1; it must be a whole number"),
                         (({"target": tmp_path / "start.safetensors"}), r"start\.safetensors is the name of one file")):
        with pytest.raises(CheckpointError, match=words):
            assemble("none", "none", **{"target": tmp_path / "start", **given})


def test_a_language_model_without_its_tokenizer_is_said(language, tower, tmp_path, caplog):
    (language / "tokenizer.model").unlink()
    assemble(language, tower, tmp_path / "start")
    assert "has no tokenizer.model, so" in caplog.text


def test_a_recipe_starts_from_it(language, tower, tmp_path):
    """As `mindformers run` does: the YAML's section takes the sizes over, and no parameter is missing."""
    source = open_source(assemble(language, tower, tmp_path / "start"))
    section = {"plora_rank": 256, "task_lora_ranks": {}, "max_position_embeddings": 24576,
               "vision_config": {"image_size": 560, "patch_size": 14}}
    recipe = begin(section, source)
    shapes = {name: entry.shape for name, entry in parameter_table(ModelConfig(**section)).items()}
    tensors, new = match_tensors(source, shapes, recipe)
    assert not new and list(tensors) == list(shapes)


def test_a_configuration_may_be_named(language, tower, tmp_path):
    wanted = ModelConfig(**{**SIZES, "vision_config": {**TOWER, "image_size": 112}}).to_public_dict()
    (tmp_path / "config.json").write_text(json.dumps(wanted), encoding="utf-8")
    target = assemble(language, tower, tmp_path / "start", config=tmp_path / "config.json")
    assert read_config(target).plora_rank == 2 and read_config(target).vision_config.positions == 65


def test_a_tower_of_another_width_is_refused(language, tower, tmp_path):
    wanted = ModelConfig(**{**SIZES, "vision_config": {**TOWER, "hidden_size": 32}}).to_public_dict()
    (tmp_path / "config.json").write_text(json.dumps(wanted), encoding="utf-8")
    with pytest.raises(CheckpointError, match="hidden_size 16 instead of 32"):
        assemble(language, tower, tmp_path / "start", config=tmp_path / "config.json")
    narrow = {**TOWER, "hidden_size": 12, "model_type": "clip_vision_model"}
    with pytest.raises(CheckpointError, match=r"embeddings.class_embedding with shape \(16,\).* asks for \(12,\)"):
        assemble(language, write(tmp_path / "narrow", narrow, tower_arrays()), tmp_path / "start")
    assert not (tmp_path / "start").exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "llama"}, "model_type 'llama', expected a language model of type internlm2"),
    ({"hidden_size": None}, "does not say hidden_size"),
    ({"num_attention_heads": 7}, "make no model: hidden_size 32 does not divide"),
])
def test_a_language_model_of_another_kind_is_refused(language, tower, tmp_path, change, message):
    fields = {name: value for name, value in {**LANGUAGE, **change}.items() if value is not None}
    (language / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises((CheckpointError, ConfigError), match=message):
        assemble(language, tower, tmp_path / "start")


def test_missing_and_surplus_parameters_are_named(language, tower, tmp_path):
    arrays = tower_arrays()
    del arrays["vision_model.pre_layrnorm.weight"]
    arrays["vision_model.head.weight"] = np.ones((2, 2), np.float32)
    fields = {**TOWER, "model_type": "clip_vision_model"}
    with pytest.raises(CheckpointError, match=r"1 parameters are missing .*pre_layrnorm.*1 are surplus .*head.weight"):
        assemble(language, write(tmp_path / "odd", fields, arrays), tmp_path / "start")
    (language / "config.json").write_text(json.dumps(LANGUAGE), encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not a CLIP tower: it holds none of the"):
        other = write(tmp_path / "no", fields, {"x.weight": np.ones((2, 2), np.float32)})
        assemble(language, other, tmp_path / "start")


def test_a_table_that_is_no_grid_is_refused(language, tmp_path):
    arrays = {**tower_arrays(), f"vision_model.{POSITIONS}": np.ones((570, 16), np.float32)}
    odd = write(tmp_path / "odd", {**TOWER, "model_type": "clip_vision_model"}, arrays)
    with pytest.raises(CheckpointError, match="570 positions, which is no square grid"):
        assemble(language, odd, tmp_path / "start")


def test_defaults_of_a_clip_configuration_may_be_left_out(language, tmp_path):
    assert TOWER_FIELDS["hidden_act"] == "quick_gelu"
    fields = {name: value for name, value in TOWER.items() if name != "num_attention_heads"}
    odd = write(tmp_path / "odd", {**fields, "model_type": "clip_vision_model"}, tower_arrays())
    with pytest.raises(ConfigError, match=r"hidden_size 16 does not divide by vision_config.num_attention_heads 12"):
        assemble(language, odd, tmp_path / "start")
