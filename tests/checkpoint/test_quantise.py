"""Quantised checkpoints: rounding, both layouts there and back, what is refused, and what an interrupted run leaves."""
from __future__ import annotations

import json
import re

import numpy as np
import pytest
from random_model import make, random_arrays, save

from mindformers_ixc.checkpoint import quantise, streaming
from mindformers_ixc.checkpoint.assemble import assemble
from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.checkpoint.dtypes import to_float32
from mindformers_ixc.checkpoint.inspection import inspect
from mindformers_ixc.checkpoint.merge import merge
from mindformers_ixc.checkpoint.packing import (
    pack_4,
    pack_awq,
    round_4,
    round_8,
    unpack_4,
    unpack_awq,
    widen_4,
    widen_8,
)
from mindformers_ixc.checkpoint.quantise import quantize
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.checkpoint.start import begin
from mindformers_ixc.config import read_config
from mindformers_ixc.errors import CheckpointError

# two groups for w2, one elsewhere
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
LINEAR = re.compile(r".*\.(wqkv|wo|w1|w2|w3)\.weight$")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make(tmp_path_factory.mktemp("quantise") / "model", "BF16", **SIZES)


def values(path) -> dict[str, np.ndarray]:
    return {name: to_float32(tensor.whole(), tensor.dtype) for name, tensor in open_source(path).tensors.items()}


def content(path) -> dict[str, bytes]:
    return {name: tensor.whole().tobytes() for name, tensor in open_source(path).tensors.items()}


def reference_awq(qweight: np.ndarray, scales: np.ndarray, qzeros: np.ndarray) -> np.ndarray:
    """What the published layout means, one number at a time, as weights `(O, F)`."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    width, words = qweight.shape
    weight = np.zeros((8 * words, width))
    for i in range(width):
        for word in range(words):
            for place in range(8):
                q = int(qweight[i, word]) >> 4 * place & 15
                zero = int(qzeros[i // 128, word]) >> 4 * place & 15
                output = 8 * word + order[place]
                weight[output, i] = (q - zero) * float(scales[i // 128, output])
    return weight


def test_packing_goes_there_and_back():
    numbers = np.random.default_rng(0).integers(0, 16, (24, 256), np.uint8)
    np.testing.assert_array_equal(unpack_4(pack_4(numbers)), numbers)
    np.testing.assert_array_equal(unpack_awq(pack_awq(numbers)), numbers)
    # by hand: the lowest bits of the first word are the first weight, then the ones 16, 32 and 48 further
    word = int.from_bytes(pack_4(numbers)[0, :2].tobytes(), "little")
    assert [word >> shift & 15 for shift in (0, 4, 8, 12)] == numbers[0, [0, 16, 32, 48]].tolist()


@pytest.mark.parametrize("spread", [1e-7, 0.02, 30.0])
def test_rounding_is_within_half_a_step(spread):
    weight = (np.random.default_rng(1).standard_normal((6, 256)) * spread).astype(np.float32)
    weight[0, :128] = 0
    weight[1] = np.abs(weight[1])                   # a range that does not hold 0 is widened to it
    numbers, scales, zeros = round_4(weight)
    step = np.repeat(scales.astype(np.float32), 128, -1)
    # the range is rounded to whole steps, and so may end half a step early
    assert (np.abs(widen_4(numbers, scales, zeros) - weight) <= step * 1.01).all()
    assert np.abs(widen_4(numbers, scales, zeros)[0, :128]).max() == 0
    numbers, scales = round_8(weight)
    assert (np.abs(widen_8(numbers, scales) - weight) <= scales[:, None] * 0.501).all()
    assert round_8(np.array([[2.6e-43, -2.6e-43]], np.float32))[0].tolist() == [[127, -127]]


@pytest.mark.parametrize("bits", [4, 8])
def test_own_layout(model, tmp_path, bits):
    quantize(model, tmp_path / "small", bits)
    small, before = open_source(tmp_path / "small"), values(model)
    assert all(tensor.stretches[0].offset % 2 == 0 for tensor in small.tensors.values())
    convert(tmp_path / "small", tmp_path / "full", to="hf")
    after = values(tmp_path / "full")
    assert set(after) == set(before)
    fields = json.loads((tmp_path / "full" / "config.json").read_text())
    assert fields.pop("torch_dtype") == "bfloat16"
    assert fields == json.loads((model / "config.json").read_text())
    for name, weight in before.items():
        error = np.abs(after[name] - weight).max() / np.abs(weight).max()
        if LINEAR.match(name):
            assert f"{name[:-6]}qweight" in small.tensors
            assert 0 < error < (0.12 if bits == 4 else 0.01), name
        elif weight.ndim == 1 or ("embeddings." in name and "tok_" not in name) or "_GN" in name:
            assert error == 0, name
        else:
            assert error < 0.01, name
    assert small.tensors["output.qweight"].dtype == "I8"
    assert small.tensors["model.layers.0.attention.wo.lora_web_B.qweight"].dtype == "I8"
    report = inspect(tmp_path / "small", verify=True)
    text = report.to_text()
    assert f"the decoder's linears have {bits} bits" in text and "exactly what its configuration asks for" in text
    assert "`mindformers chat` and `eval` take it." in text and "`run` take" in inspect(model).to_text()
    assert not report.damaged and report.verified
    assert report.parts["partial_lora"].formats == {"I8": 2 * 5 * 2, "F32": 2 * 5 * 2}
    assert sum(part.parameters for part in report.parts.values()) == sum(value.size for value in before.values())


def test_awqs_layout_is_what_others_read(model, tmp_path):
    quantize(model, tmp_path / "awq", layout="awq")
    section = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert section == {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
    tensors = open_source(tmp_path / "awq").tensors
    convert(tmp_path / "awq", tmp_path / "full", to="hf", dtype="float32")
    full = values(tmp_path / "full")
    for name in ("model.layers.0.attention.wo", "model.layers.1.feed_forward.w2"):
        parts = [tensors[f"{name}.{part}"].whole() for part in ("qweight", "scales", "qzeros")]
        assert [part.dtype for part in parts] == [np.int32, np.float16, np.int32]
        np.testing.assert_allclose(full[f"{name}.weight"], reference_awq(*parts), rtol=1e-6)
    others = {tensor.dtype for name, tensor in tensors.items() if not name.endswith(("qweight", "qzeros"))}
    assert others == {"F16"}


def test_the_layouts_hold_the_same_numbers(model, tmp_path):
    quantize(model, tmp_path / "own")
    quantize(model, tmp_path / "awq", layout="awq")
    quantize(tmp_path / "awq", tmp_path / "own_again")
    quantize(tmp_path / "own", tmp_path / "awq_again", layout="awq")
    for first, second in (("own", "own_again"), ("awq", "awq_again")):
        one, other = content(tmp_path / first), content(tmp_path / second)
        linears = [name for name in one if re.search(r"\.(wqkv|wo|w1|w2|w3)\.(q|scales)", name)]
        assert len(linears) == 2 * 5 * 3
        assert all(one[name] == other[name] for name in linears)


@pytest.mark.parametrize("layout", ["mindformers_ixc", "awq"])
def test_an_interrupted_run_goes_on(model, tmp_path, monkeypatch, layout):
    quantize(model, tmp_path / "whole", layout=layout)
    monkeypatch.setattr(streaming, "SYNC_BYTES", 1)
    send, sent = streaming.Lanes.send, []

    def fail_once(lanes, item):
        if len(sent) == 40:
            sent.append("failed")
            raise KeyboardInterrupt
        sent.append(item.name)
        send(lanes, item)

    monkeypatch.setattr(streaming.Lanes, "send", fail_once)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "target", layout=layout)
    assert not (tmp_path / "target").exists()
    before = len(sent)
    quantize(model, tmp_path / "target", layout=layout)
    assert len(sent) - before < len(open_source(tmp_path / "whole").tensors)      # what was done is not done again
    assert content(tmp_path / "target") == content(tmp_path / "whole")
    assert {entry.name for entry in tmp_path.iterdir()} == {"whole", "target"}


def refuse(words, function, *arguments, **options):
    with pytest.raises(CheckpointError, match=words) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_sizes_that_do_not_fit(tmp_path):
    odd = make(tmp_path / "odd")
    refuse("attention.wqkv has 32 inputs, which do not divide into the groups of 128 .* --bits 8", quantize, odd,
           tmp_path / "target")
    assert not (tmp_path / "target").exists()
    quantize(odd, tmp_path / "target", 8)
    refuse("AWQ's layout has 4 bits", quantize, odd, tmp_path / "other", 8, layout="awq")
    refuse("bits is 3", quantize, odd, tmp_path / "other", 3)
    refuse("looks like a file", quantize, odd, tmp_path / "other.safetensors")
    refuse("samples is 3 without a file", quantize, odd, tmp_path / "other", 8, samples=3)


def test_weights_that_whole_numbers_cannot_say(model, tmp_path):
    broken = make(tmp_path / "broken", **SIZES)
    arrays = random_arrays(read_config(broken))
    arrays["model.layers.1.attention.wo.weight"][3, 5] = np.nan
    save(broken / "model.safetensors", arrays)
    refuse("model.layers.1.attention.wo.weight holds NaN", quantize, broken, tmp_path / "target")
    assert {entry.name for entry in tmp_path.iterdir()} == {"broken"}
    arrays["model.layers.1.attention.wo.weight"][3, 5] = 3e6
    save(broken / "model.safetensors", arrays)
    refuse("holds weights up to 3e\\+06, whose scale is beyond float16", quantize, broken, tmp_path / "target")
    arrays["model.layers.1.attention.wo.weight"][3, 5] = 3
    arrays["model.norm.weight"][7] = -7e4
    save(broken / "model.safetensors", arrays)
    refuse("model.norm.weight holds values up to 7e\\+04, beyond float16, which AWQ's layout", quantize, broken,
           tmp_path / "target", layout="awq")
    assert {entry.name for entry in tmp_path.iterdir()} == {"broken"}


def test_what_needs_full_weights_says_how_to_make_them(model, tmp_path):
    small = quantize(model, tmp_path / "small", 8)
    made = "mindformers convert .*small TARGET --to hf"
    refuse(f"is quantised, and training needs full weights: .*{made}", begin, {}, open_source(small))
    refuse(f"merging needs full weights.*{made}", merge, small, tmp_path / "merged", fold=("web",))
    refuse(f"attaching needs full weights.*{made}", merge, model, tmp_path / "merged", attach=small)
    refuse(f"merging needs full weights.*{made}", merge, model, tmp_path / "merged", average=[small])
    refuse(f"merging needs full weights.*{made}", merge, small, tmp_path / "merged", extract=["partial_lora"])
    refuse(f"quantised already, with 8 bits.*{made}", quantize, small, tmp_path / "again")
    for sources in ((small, model), (model, small)):
        refuse(f"training begins with needs full weights.*{made}", assemble, *sources, tmp_path / "start")
    # as AWQ lays a model out its tower has full weights
    awq = quantize(model, tmp_path / "awq", layout="awq")
    refuse("awq is quantised, and a model that training begins with", assemble, awq, model, tmp_path / "start")
    assert inspect(assemble(model, awq, tmp_path / "start"))


def test_zeros_that_four_bits_do_not_hold(model, tmp_path):
    small = quantize(model, tmp_path / "small")
    (small / "digests.json").unlink()
    source = open_source(small)
    name = "model.layers.0.attention.wo.qzeros"
    place = source.tensors[name].stretches[0]
    with open(place.path, "r+b") as file:
        file.seek(place.offset)
        file.write(bytes([200, 16]))
    words = f"{name} holds 2 numbers above 15, which no zero of four bits is; the file is damaged"
    refuse(words, convert, small, tmp_path / "full")
    for layout in ("awq", "mindformers_ixc"):
        refuse(words, quantize, small, tmp_path / "again", layout=layout)
    assert {entry.name for entry in tmp_path.iterdir()} == {"small"}


@pytest.mark.parametrize("layout", ["awq", "mindformers_ixc"])
def test_scales_that_are_no_numbers_are_not_packed_anew(model, tmp_path, layout):
    small = quantize(model, tmp_path / "small", layout=layout)
    (small / "digests.json").unlink()
    name = "model.layers.0.attention.wo.scales"
    place = open_source(small).tensors[name].stretches[0]
    with open(place.path, "r+b") as file:
        file.seek(place.offset)
        file.write(np.array([np.nan], "<f2").tobytes())
    for target in ("awq", "mindformers_ixc"):
        refuse(f"{name} holds 1 NaN or infinities", quantize, small, tmp_path / "again", layout=target)
    assert {entry.name for entry in tmp_path.iterdir()} == {"small"}


@pytest.mark.parametrize(("change", "words"), [
    ({"version": "gemv"}, "version 'gemv'; of AWQ's packings the one with version 'gemm' is read"),
    ({"group_size": 64}, "group_size 64; of AWQ's packings the one with group_size 128"),
    ({"bits": 8}, "bits 8"), ({"zero_point": False}, "zero_point False"),
    ({"quant_method": "gptq"}, "quant_method 'gptq'; the choices are mindformers_ixc and awq"),
    ({"quant_method": "mindformers_ixc"}, "this version of the package reads version 1")])
def test_other_packings(model, tmp_path, change, words):
    quantize(model, tmp_path / "awq", layout="awq")
    file = tmp_path / "awq" / "config.json"
    fields = json.loads(file.read_text())
    fields["quantization_config"].update(change)
    file.write_text(json.dumps(fields))
    (tmp_path / "awq" / "digests.json").unlink()
    refuse(words, convert, tmp_path / "awq", tmp_path / "full")
    refuse(words, inspect, tmp_path / "awq")
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize(("change", "words"), [
    ({"bits": 8}, "wqkv.qweight with 4 bits, and its config.json says that the decoder's linears have 8"),
    ({"group_size": 64}, "group_size 64; groups of 128 are read"), ({"bits": 3}, "bits 3"),
    ({"source_dtype": "int7"}, "source_dtype 'int7'"), ({"version": 2}, "reads version 1")])
def test_a_section_that_is_of_other_weights(model, tmp_path, change, words):
    small = quantize(model, tmp_path / "small")
    fields = json.loads((small / "config.json").read_text())
    fields["quantization_config"].update(change)
    (small / "config.json").write_text(json.dumps(fields))
    (small / "digests.json").unlink()
    refuse(words, convert, small, tmp_path / "full")
    refuse(words, inspect, small)
    assert {entry.name for entry in tmp_path.iterdir()} == {"small"}


def test_arrays_that_are_missing_or_of_another_kind(model, tmp_path):
    small = quantize(model, tmp_path / "small")
    arrays = {name: (tensor.dtype, tensor.whole()) for name, tensor in open_source(small).tensors.items()}
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((small / "config.json").read_bytes())
    name = "model.layers.0.attention.wo"

    def write(changed):
        (other / "model.safetensors").unlink(missing_ok=True)
        for number, dtype in enumerate(sorted({dtype for dtype, _ in changed.values()})):
            save(other / f"{number}.safetensors", {key: value for key, (of, value) in changed.items() if of == dtype},
                 dtype)

    write({key: value for key, value in arrays.items() if key != f"{name}.qzeros"})
    refuse(f"holds {name}.qweight without {name}.qzeros", convert, other, tmp_path / "full")
    write({**arrays, f"{name}.scales": ("F16", arrays[f"{name}.scales"][1][:, :0])})
    refuse("do not belong together in groups of 128", convert, other, tmp_path / "full")
    write({**arrays, f"{name}.scales": ("F32", arrays[f"{name}.scales"][1].astype(np.float32))})
    refuse(f"{name}.scales in the format F32", convert, other, tmp_path / "full")
    write({key: value for key, value in arrays.items() if key != f"{name}.qweight"})
    refuse(f"1 parameters are missing .*{name}.weight.* 2 are surplus .*{name}.scales", convert, other,
           tmp_path / "full")
    write({**arrays, f"{name}.weight": ("F32", np.zeros((128, 128), np.float32))})
    refuse(f"holds both {name}.qweight and {name}.weight", convert, other, tmp_path / "full")
    odd = arrays[f"{name}.scales"][1].copy()
    odd[3] = np.nan
    write({**arrays, f"{name}.scales": ("F16", odd)})
    refuse(f"{name}.scales holds 1 NaN or infinities.*the file is damaged", convert, other, tmp_path / "full")
    assert not (tmp_path / "full").exists()
    write(arrays)
    (other / "config.json").unlink()
    refuse("no quantization_config in a config.json says how", convert, other, tmp_path / "full", config=small)


def test_rounding_reads_a_few_rows_at_a_time(model, tmp_path, monkeypatch):
    quantize(model, tmp_path / "at_once", 8)
    monkeypatch.setattr(quantise, "ROUNDED_BYTES", 1000)
    for layout in ("mindformers_ixc", "awq"):
        quantize(model, tmp_path / layout, layout=layout)
    quantize(model, tmp_path / "by_rows", 8)
    assert content(tmp_path / "by_rows") == content(tmp_path / "at_once")
    quantize(tmp_path / "awq", tmp_path / "own")
    own = content(tmp_path / "own")
    assert all(own[name] == value for name, value in content(tmp_path / "mindformers_ixc").items() if "qweight" in name
               and ".w" in name)
