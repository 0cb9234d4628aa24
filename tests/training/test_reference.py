"""`mindformers reference`: its log-probabilities are those of the model's logits, whatever the batch."""
from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mindspore import Tensor
from PIL import Image

from mindformers_ixc import IXC25Config, IXC25ForCausalLM
from mindformers_ixc.checkpoint.model_directory import save_model_directory
from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.data.preferences import REFERENCE_COLUMN, load_preferences
from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import DataError
from mindformers_ixc.generation.loading import load_model
from mindformers_ixc.training import reference as reference_module
from mindformers_ixc.training.reference import _processor, add_reference_logps

SIZES = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "plora_rank": 2, "plora_alpha": 2,
         "task_lora_ranks": {"sft": 2, "dpo": 2},
         "vision_config": {"image_size": 56, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                           "intermediate_size": 16}}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A model directory whose second halves of pairs are not zero."""
    ms.set_seed(3)
    model = IXC25ForCausalLM(IXC25Config(**SIZES, seq_length=8, max_tiles=1, adapter_mode="write"))
    rng = np.random.default_rng(0)
    for parameter in model.get_parameters():
        if parameter.name.endswith("_B.weight"):
            parameter.set_data(Tensor(rng.normal(0, 0.3, parameter.shape).astype(np.float32)))
    folder = tmp_path_factory.mktemp("reference") / "model"
    save_model_directory(model, folder, str(demo_path("tokenizer.model")), 2)
    return folder


@pytest.fixture
def pairs(tmp_path):
    Image.new("RGB", (90, 40), (200, 30, 0)).save(tmp_path / "a.png")
    rows = [{"id": 0, "prompt": "what?", "image": "a.png", "chosen": "a red square", "rejected": "no"},
            {"id": 1, "prompt": "say it", "chosen": "it", "rejected": "nothing at all is said here"}]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows))
    return path


def expected_logp(directory, mode: str, answer) -> float:
    """Of one answer alone, in float64 from the logits."""
    sample = _processor(str(directory), "training").encode_conversation(answer.turns, answer.images, answer.where, 2)
    row = sample.pad(len(sample.input_ids), max(1, sample.tiles), 1, 0)
    model = load_model(directory, IXC25ForCausalLM, adapter_mode=mode, seq_length=len(sample.input_ids),
                       max_tiles=max(1, sample.tiles))
    columns = [None if name == "labels" else Tensor(row[name][None]) for name in BATCH_COLUMNS]
    logits = model(*columns).asnumpy()[0].astype(np.float64)
    logps = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) \
        - logits.max(-1, keepdims=True)
    return sum(logps[i, label] for i, label in enumerate(row["labels"]) if label != -100)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["base", "write"])
def test_log_probabilities_are_those_of_each_answer_alone(reference, pairs, mode):
    target = pairs.with_name("with.json")
    assert add_reference_logps(str(pairs), str(target), str(reference), mode, batch_size=3) == 2
    rows = load_preferences(target)
    for pair in rows:
        expected = [expected_logp(reference, mode, answer) for answer in pair.sides]
        np.testing.assert_allclose(pair.logps, expected, rtol=1e-5)
    before = json.loads(pairs.read_text())
    assert [{key: value for key, value in row.items() if key != REFERENCE_COLUMN}
            for row in json.loads(target.read_text())] == before


def test_in_another_folder_the_pictures_are_still_found(reference, pairs, tmp_path):
    (tmp_path / "other").mkdir()
    target = tmp_path / "other" / "pairs.json"
    rows = json.loads(pairs.read_text())
    rows.append({"chosen": "a", "rejected": "b", "messages": [{"role": "user", "content": [
        {"type": "text", "text": "what?"}, {"type": "image", "image": "a.png"}]}]})
    asked = [{"from": "user", "value": "<image>what?"}]
    rows.append({"chosen": "a", "rejected": "b", "image": "a.png", "conversations": [
        {"from": "system", "value": "be short"}, *asked]})
    rows.append({"image": "a.png", "system": "be long", **{
        key: [*asked, {"from": "gpt", "value": "a"}, {"from": "human", "value": "and?"}, {"from": "gpt", "value": last}]
        for key, last in (("conversations_a", "b"), ("conversations_b", "c"))}})
    pairs.write_text("\n".join(map(json.dumps, rows)))
    add_reference_logps(str(pairs), str(target), str(reference))
    written = load_preferences(target)
    assert [pair.images for pair in written] == [[tmp_path / "a.png"], [], *[[tmp_path / "a.png"]] * 3]
    assert [(pair.turns, pair.rejected) for pair in written] == [(pair.turns, pair.rejected)
                                                                 for pair in load_preferences(pairs)]


def test_bad_pairs_leave_no_file(reference, pairs, tmp_path):
    pairs.write_text(json.dumps([{"prompt": "a", "chosen": "b", "rejected": "b"}]))
    with pytest.raises(DataError, match="chosen equals rejected"):
        add_reference_logps(str(pairs), str(tmp_path / "x.json"), str(reference))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "pairs.json"]


def test_pairs_with_pictures_inside_are_refused_before_the_work(reference, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(reference_module, "_answer_logps", lambda *given: pytest.fail("the work was done first"))
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c",
             "image": {"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match=r"sample 0: its pictures lie inside of .*pairs\.parquet"):
        add_reference_logps(str(tmp_path / "pairs.parquet"), str(tmp_path / "x.json"), str(reference))
    assert not (tmp_path / "x.json").exists()
