"""Products with weights of 4, 8 and 16 bits: both forms of the kernels against NumPy in float64, without a graph."""
from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from needed import program

from mindformers_ixc.checkpoint.packing import pack_4, round_4, round_8, widen_4, widen_8
from mindformers_ixc.native import building, check, library

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")

BAD_PLACE, BAD_SHAPE = 2, 3


@pytest.fixture(scope="module")
def functions():
    return ctypes.CDLL(library())


@pytest.fixture(params=["plain", "fastest"])
def form(request, functions):
    functions.plain_form(request.param == "plain")
    yield request.param
    functions.plain_form(0)


def call(functions, name: str, *arrays: np.ndarray) -> int:
    return check.call(getattr(functions, name), arrays)


def weights(kind: str, outputs: int, width: int, rng) -> tuple[list[np.ndarray], np.ndarray]:
    """Arrays of a random weight, and what they mean."""
    weight = rng.standard_normal((outputs, width)).astype(np.float32)
    if kind == "int4":
        numbers, scales, zeros = round_4(weight + 0.3)
        return [pack_4(numbers), scales, zeros], widen_4(numbers, scales, zeros)
    if kind == "int8":
        numbers, scales = round_8(weight)
        return [numbers, scales], widen_8(numbers, scales)
    if kind == "f16":
        small = weight.astype(np.float16)
        small[0, :3] = [6e-8, -6e-8, 0]                   # numbers without an exponent of their own
        return [small], small.astype(np.float32)
    bits = (weight.view(np.uint32) >> 16).astype(np.uint16)
    return [bits], (bits.astype(np.uint32) << 16).view(np.float32)


# few rows and many, with and without whole blocks and whole tiles; the last is shared among threads
SHAPES = [(1, 128, 5), (3, 384, 37), (8, 256, 16), (9, 256, 70), (33, 640, 205), (530, 128, 20), (2, 1024, 400)]
ODD = [(1, 72, 33), (7, 100, 9), (20, 100, 50), (5, 3, 2)]


@pytest.mark.parametrize(("kind", "shape"), [(kind, shape) for kind in ("int4", "int8", "bf16", "f16")
                                             for shape in (SHAPES if kind == "int4" else SHAPES + ODD)])
def test_products(functions, form, kind, shape):
    rows, width, outputs = shape
    rng = np.random.default_rng(rows * width + outputs)
    arrays, meaning = weights(kind, outputs, width, rng)
    x = (rng.standard_normal((rows, width)) * 10.0 ** rng.integers(-3, 3, (rows, 1))).astype(np.float32)
    x[0, :64] = 0
    y = np.full((rows, outputs), np.nan, np.float32)
    assert call(functions, f"linear_{kind}", x, *arrays, y) == 0
    expected = x.astype(np.float64) @ meaning.T.astype(np.float64)
    # float32's rounding of a sum; few rows are rounded to 2^-16 of a group's largest before whole numbers meet them
    size = np.abs(x).astype(np.float64) @ np.abs(meaning).T.astype(np.float64)
    allowed = size * (2.0 ** -14 if kind in ("int4", "int8") and rows <= 8 else 2.0 ** -20)
    assert (np.abs(y - expected) <= allowed).all()


def test_the_forms_agree(functions):
    rng = np.random.default_rng(3)
    arrays, _ = weights("int4", 64, 512, rng)
    x, found = rng.standard_normal((4, 512)).astype(np.float32), []
    for plain in (1, 0):
        functions.plain_form(plain)
        y = np.zeros((4, 64), np.float32)
        call(functions, "linear_int4", x, *arrays, y)
        found.append(y)
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-4)       # the same whole numbers, summed in another order


@pytest.mark.parametrize("kind", ["int4", "int8", "bf16", "f16"])
def test_weights_are_widened_exactly_and_land_in_their_places(functions, form, kind):
    arrays, meaning = weights(kind, 205, 256, np.random.default_rng(6))
    y = np.full((256, 205), np.nan, np.float32)
    assert call(functions, f"linear_{kind}", np.eye(256, dtype=np.float32), *arrays, y) == 0
    np.testing.assert_array_equal(y, meaning.T)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("kind", ["int4", "int8", "bf16", "f16"])
def test_what_is_no_finite_number_shows(functions, form, kind, rows, odd):
    rng = np.random.default_rng(7)
    arrays, _ = weights(kind, 9, 256, rng)
    x, y = rng.standard_normal((rows, 256)).astype(np.float32), np.zeros((rows, 9), np.float32)
    x[1, 130] = odd
    assert call(functions, f"linear_{kind}", x, *arrays, y) == 0
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(np.delete(y, 1, 0)).all()
    x[1, 130] = 1
    if kind in ("bf16", "f16"):                     # the others are whole numbers, and scales are looked at before
        bits = np.float32(odd).view(np.uint32) >> 16 if kind == "bf16" else np.float16(odd).view(np.uint16)
        for column in (5, 255):
            wrong = arrays[0].copy()
            wrong.view(np.uint16)[4, column] = bits
            assert call(functions, f"linear_{kind}", x, wrong, y) == 0
            assert not np.isfinite(y[:, 4]).any()
            assert np.isfinite(np.delete(y, 4, 1)).all()


@pytest.mark.parametrize("kind", ["int8", "bf16", "f16"])
def test_rows_of_tables(functions, kind):
    rng = np.random.default_rng(4)
    arrays, meaning = weights(kind, 50, 96, rng)
    ids = rng.integers(0, 50, (2, 7)).astype(np.int32)
    y = np.zeros((2, 7, 96), np.float32)
    assert call(functions, f"embedding_{kind}", ids, *arrays, y) == 0
    np.testing.assert_array_equal(y, meaning[ids])
    for outside in (-1, 50):
        ids[1, 3] = outside
        assert call(functions, f"embedding_{kind}", ids, *arrays, y) == BAD_PLACE


def test_every_float16_is_widened_to_itself(functions):
    table = np.arange(2 ** 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    y = np.zeros((256, 256), np.float32)
    assert call(functions, "embedding_f16", np.arange(256, dtype=np.int32), table, y) == 0
    np.testing.assert_array_equal(y, table.astype(np.float32))


def test_arrays_that_do_not_belong_together(functions):
    rng = np.random.default_rng(5)
    arrays, _ = weights("int4", 8, 256, rng)
    x, y = rng.standard_normal((1, 256)).astype(np.float32), np.zeros((1, 8), np.float32)
    assert call(functions, "linear_int4", x[:, :128].copy(), *arrays, y) == BAD_SHAPE
    assert call(functions, "linear_int4", x, arrays[0], arrays[1][:, :1].copy(), arrays[2], y) == BAD_SHAPE
    assert call(functions, "linear_int8", x, *weights("int8", 8, 128, rng)[0], y) == BAD_SHAPE
    assert call(functions, "linear_bf16", x, *weights("bf16", 8, 128, rng)[0], y) == BAD_SHAPE


@pytest.mark.parametrize(("compiler", "runner"), [("cc", []), ("aarch64-linux-gnu-gcc", ["qemu-aarch64"])])
def test_the_plain_form_as_a_program(tmp_path, compiler, runner):
    for name in (compiler, *runner):
        program(name)
    here = Path(building.__file__).parent
    made, sources = tmp_path / "program", [Path(__file__).parent / "quantised_check.c"]
    sources += [here / name for name in ("quantised.c", "widened.c", "team.c", "products.c")]
    options = [option for option in building._COMPILE if option not in ("-c", "-fPIC")]
    subprocess.run([compiler, *options, "-static", *map(str, sources), "-lm", "-o", str(made)], check=True,
                   capture_output=True)
    result = subprocess.run([*runner, str(made)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("of what is allowed") == 20
