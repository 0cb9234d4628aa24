"""Models that compute with weights as their file holds them, against the same model with full weights."""
from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from random_model import save

from mindformers_ixc import native
from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.checkpoint.model_directory import save_model_directory
from mindformers_ixc.checkpoint.packing import pack_awq, round_4
from mindformers_ixc.checkpoint.quantise import quantize
from mindformers_ixc.checkpoint.quantised import EMBEDDING, widened
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.generation import stored_weights
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.loading import load_model
from mindformers_ixc.generation.stored_weights import mapped
from mindformers_ixc.models.stored import StoredEmbedding, StoredLinear, StoredPartialLoRALinear
from mindformers_ixc.resources import resolve_model, resolve_path

PICTURE = resolve_path("pkg:mindformers_ixc/demo/images/astronaut.jpg")

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The starter with 4 and 8 bits and as AWQ's, and what each means in full weights."""
    place, made = tmp_path_factory.mktemp("stored"), {}
    for name, options in (("4", {}), ("8", {"bits": 8}), ("awq", {"layout": "awq"})):
        made[name] = quantize("starter", place / name, **options)
        made[f"full_{name}"] = convert(place / name, place / f"full_{name}", to="hf", dtype="float32")
    return made


def scores(folder, mode: str = "base") -> np.ndarray:
    """Logits after a question with a picture, and of three more tokens."""
    assistant = Assistant.from_directory(folder)
    sample = assistant.encode({"query": "What is shown?", "images": [PICTURE]})
    decoder = assistant.engine.decoder([sample], 4, mode)
    return np.stack([decoder.prefill(), *(decoder.step(np.array([token])) for token in (5, 77, 300))])


@needs_compiler
@pytest.mark.parametrize("name", ["4", "awq"])
def test_the_same_as_with_full_weights(folders, name):
    found, expected = scores(folders[name]), scores(folders[f"full_{name}"])
    np.testing.assert_allclose(found, expected, atol=2e-3 * expected.std())


@pytest.mark.slow
@needs_compiler
def test_eight_bits_and_other_modes(folders):
    found, expected = scores(folders["8"], "web"), scores(folders["full_8"], "web")
    np.testing.assert_allclose(found, expected, atol=2e-3 * expected.std())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["4", "8", "awq"])
def test_without_a_compiler(folders, monkeypatch, caplog, name):
    monkeypatch.setenv(native.SWITCH, "0")
    found, expected = scores(folders[name]), scores(folders[f"full_{name}"])
    np.testing.assert_allclose(found, expected, atol=1e-3 * expected.std())
    assert caplog.text.count("without the kernels for the CPU every weight is widened anew") == 1


@needs_compiler
def test_a_processor_without_the_instructions_is_named(folders, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(native, "PROCESSOR", tmp_path / "cpuinfo")
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    words = "this processor lacks AVX2, F16C, so the plain form"
    for flags, said in (("fpu sse2 avx2 fma f16c", False), ("fpu avx fma", True)):
        native.PROCESSOR.write_text(f"model name\t: some\nflags\t\t: {flags}\nbugs\t\t: avx2\n")
        load_model(folders["4"])
        assert (words in caplog.text) is said


@needs_compiler
def test_weights_of_16_bits_stay_where_an_assistant_answers(monkeypatch):
    assistant = Assistant.from_directory("starter")
    found = {parameter.name: parameter for parameter in assistant.model.get_parameters()}
    assert str(found["model.layers.0.attention.wo.weight"].dtype) == "Float16"
    assert str(found["model.layers.0.attention_norm.weight"].dtype) == "Float32"
    stored = scores("starter")
    monkeypatch.setenv(native.SWITCH, "0")
    full = Assistant.from_directory("starter").model
    assert {str(parameter.dtype) for parameter in full.get_parameters()} == {"Float32"}
    np.testing.assert_allclose(stored, scores("starter"), atol=1e-3 * stored.std())     # sums in other orders


def test_parameters_are_the_files(folders, tmp_path):
    model = load_model(folders["4"])
    tensors = open_source(folders["4"]).tensors
    found = {parameter.name: parameter for parameter in model.get_parameters()}
    assert set(found) == set(tensors)
    wo = "model.layers.0.attention.wo"
    for name in (f"{wo}.qweight", f"{wo}.qzeros", f"{wo}.Plora_A.qweight", "output.scales"):
        value = found[name].asnumpy()
        np.testing.assert_array_equal(value.view(np.uint8), tensors[name].whole().view(np.uint8))
        assert not found[name].requires_grad
    layer = model.model.layers[0]
    assert type(layer.attention.wqkv) is StoredPartialLoRALinear and type(model.output) is StoredLinear
    assert type(model.model.tok_embeddings) is StoredEmbedding
    assert type(layer.attention.wqkv.Plora_A) is StoredLinear
    assert not hasattr(layer.attention.wqkv, "weight")
    with pytest.raises(CheckpointError, match="quantised weights, which are not written"):
        save_model_directory(model, tmp_path / "written")
    assert not (tmp_path / "written").exists()


def test_an_embedding_of_four_bits_is_made_one_of_eight(folders, tmp_path):
    odd = tmp_path / "odd"
    shutil.copytree(folders["awq"], odd)
    (odd / "digests.json").unlink()
    arrays = {name: (tensor.dtype, tensor.whole()) for name, tensor in open_source(odd).tensors.items()}
    table = arrays.pop(f"{EMBEDDING}.weight")[1].astype(np.float32)
    numbers, scales, zeros = (np.ascontiguousarray(part.T) for part in round_4(table))
    arrays |= {f"{EMBEDDING}.qweight": ("I32", pack_awq(numbers)), f"{EMBEDDING}.scales": ("F16", scales),
               f"{EMBEDDING}.qzeros": ("I32", pack_awq(zeros))}
    for file in [*odd.glob("*.safetensors"), *odd.glob("*.index.json")]:
        file.unlink()
    for dtype in ("I32", "F16"):
        save(odd / f"{dtype}.safetensors", {name: value for name, (of, value) in arrays.items() if of == dtype}, dtype)
    with pytest.raises(CheckpointError, match=f"holds {EMBEDDING} with 4 bits.*mindformers quantize .*odd TARGET"):
        load_model(odd)
    weights = widened(open_source(quantize(odd, tmp_path / "made"))).tensors
    assert np.abs(weights[f"{EMBEDDING}.weight"].whole() - table).max() < 0.1 * np.abs(table).max()
    load_model(tmp_path / "made")


def test_zeros_that_four_bits_do_not_hold(folders, tmp_path):
    odd = tmp_path / "odd"
    shutil.copytree(folders["4"], odd)
    (odd / "digests.json").unlink()
    name = "model.layers.0.attention.wo.qzeros"
    place = open_source(odd).tensors[name].stretches[0]
    with open(place.path, "r+b") as file:
        file.seek(place.offset)
        file.write(bytes([16]))
    with pytest.raises(CheckpointError, match=f"{name} holds 1 numbers above 15.*the file is damaged"):
        load_model(odd)


def test_only_aligned_arrays_of_the_same_format_are_mapped(folders, tmp_path):
    tensors = open_source(folders["4"]).tensors
    numbers = tensors["model.layers.0.attention.wo.qweight"]
    found = mapped(numbers, "U8")
    np.testing.assert_array_equal(found, numbers.whole())
    found[0, 0] ^= 255                                             # a page of its own, the file stays as it is
    assert found[0, 0] != numbers.whole()[0, 0]
    assert mapped(numbers, "F32") is None
    assert mapped(open_source(folders["awq"]).tensors["output.weight"], "F32") is None


@pytest.mark.parametrize("window", [1 << 30, 4096])
def test_a_file_is_opened_once_and_not_for_every_tensor(folders, monkeypatch, window):
    monkeypatch.setattr(stored_weights, "WINDOW", window)
    tensors = open_source(folders["4"]).tensors.values()
    before, windows = len(os.listdir("/proc/self/fd")), {}
    arrays = [mapped(tensor, "U8", windows) for tensor in tensors]
    there = [(tensor, array) for tensor, array in zip(tensors, arrays) if array is not None]
    assert len(there) > 30
    assert (len(os.listdir("/proc/self/fd")) - before < 10) is (window > 4096)
    for tensor, array in there:
        np.testing.assert_array_equal(array, tensor.whole())


def test_stored_weights_are_for_float32_on_the_cpu(folders):
    with pytest.raises(CheckpointError, match=r"for one process on the CPU with compute_dtype .* float32; .* convert"):
        load_model(folders["4"], compute_dtype="bfloat16", param_init_type="bfloat16")


def test_the_loader_of_training_refuses_them(folders):
    from mindformers_ixc.checkpoint.model_directory import load_weights
    from mindformers_ixc.config import read_config
    from mindformers_ixc.models.configuration import IXC25Config
    from mindformers_ixc.models.ixc25 import IXC25Model

    model = IXC25Model(read_config(resolve_model("starter"), IXC25Config))
    with pytest.raises(CheckpointError, match="is quantised, and what loads it here needs full weights"):
        load_weights(model, folders["4"])
