"""Compiled steps that are kept: taken again where nothing has changed, and never otherwise."""
from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from kept_line import Line
from mindspore import Tensor

from mindformers_ixc.training import fingerprint as fingerprints
from mindformers_ixc.training import kept_graphs
from mindformers_ixc.training.fingerprint import UnknownKind, fingerprint

PROGRAM = Path(__file__).parent.parent / "helpers" / "kept_line.py"
X = Tensor(np.arange(3, dtype=np.float32))
TAKEN = "was taken"


@pytest.fixture(autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)


def begin(folder, *words) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(PROGRAM), str(folder), *map(str, words)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(folder.parent)})


def end(process: subprocess.Popen, expected: list[float]) -> str:
    """What a process says beside the line, which must be right both times."""
    text, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("[")] == [str(list(map(float, expected)))] * 2
    return "\n".join(line for line in lines if not line.startswith("["))


def test_a_graph_is_taken_again_unless_something_has_changed(tmp_path):
    """Two processes at once, then the same with other weights, another constant of each kind, and a damaged file."""
    folder = tmp_path / "graphs"
    for process in [begin(folder), begin(folder)]:
        end(process, [1, 3, 5])
    file, = folder.iterdir()
    assert zipfile.ZipFile(file).testzip() is None
    assert TAKEN in end(begin(folder, 2, 1, 10), [1, 21, 41])
    assert TAKEN not in end(begin(folder, 3), [1, 4, 7])
    assert TAKEN not in end(begin(folder, 2, 2), [2, 4, 6])
    assert len(list(folder.iterdir())) == 3
    content = file.read_bytes()
    file.write_bytes(content[:300] + bytes([content[300] ^ 1]) + content[301:])
    said = end(begin(folder), [1, 3, 5])
    assert f"{file} is damaged" in said and "compiled anew" in said and TAKEN not in said
    assert zipfile.ZipFile(file).testzip() is None
    with zipfile.ZipFile(file) as kept:
        entries = {name: kept.read(name) for name in kept.namelist()}
    with zipfile.ZipFile(file, "w") as kept:          # whole, and not what MindSpore reads
        for name, graph in entries.items():
            kept.writestr(name, b"no graph" if name.endswith(".mindir") else graph)
    assert TAKEN not in end(begin(folder), [1, 3, 5])
    assert not list(tmp_path.glob("mindformers_ixc_graph_*")), "something is left in the temporary folder"


@pytest.fixture
def said(caplog, monkeypatch):
    """What is logged."""
    monkeypatch.setattr(kept_graphs.logger, "propagate", False)
    kept_graphs.logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, kept_graphs.logger.name)
    yield caplog
    kept_graphs.logger.removeHandler(caplog.handler)


def written(place: Path) -> Path:
    """A folder with what MindSpore would have written there."""
    (place / "rank_0").mkdir(parents=True)
    (place / "rank_0" / "graph.mindir").write_bytes(bytes(1000))
    return place


@pytest.mark.parametrize("damage", [lambda content: content[:500], lambda content: b"", lambda content: content[:200]
                                    + b"x" + content[201:]])
def test_a_damaged_file_is_forgotten_with_a_line(tmp_path, said, damage):
    file = tmp_path / "kept" / "a.zip"
    kept_graphs._keep(written(tmp_path / "place"), file)
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    whole.mkdir()
    damaged.mkdir()
    assert list(kept_graphs._unpacked(file, whole)) == ["rank_0/graph.mindir"] and not said.text
    file.write_bytes(damage(file.read_bytes()))
    assert kept_graphs._unpacked(file, damaged) == {} and f"{file} is damaged" in said.text
    assert not file.exists() and not list(damaged.iterdir())


def test_without_room_a_run_goes_on(tmp_path, said):
    (tmp_path / "file").write_text("no folder")
    kept_graphs._keep(written(tmp_path / "place"), tmp_path / "file" / "a.zip")
    assert "cannot be kept" in said.text


def test_old_ones_go(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_graphs, "MOST", 2)
    place = written(tmp_path / "place")
    for name in ("a", "b", "c"):
        kept_graphs._keep(place, tmp_path / "kept" / f"{name}.zip")
    assert len(list((tmp_path / "kept").iterdir())) == 2 and (tmp_path / "kept" / "c.zip").exists()


def test_what_is_not_known_is_not_kept(tmp_path, monkeypatch, said):
    monkeypatch.setattr(kept_graphs, "folder", tmp_path / "graphs")
    monkeypatch.setattr(kept_graphs, "_is_spent", False)
    cell = Line()
    cell.something = object()
    assert cell(X).asnumpy().tolist() == [1, 3, 5]
    assert "not kept: cell.something" in said.text and not (tmp_path / "graphs").exists()
    with pytest.raises(UnknownKind):
        fingerprint(cell, ())


def test_what_only_the_host_looks_at_is_no_part_of_a_graph():
    class Sampling(Line):
        not_compiled = ("rollout",)

    cell, other = Sampling(), Sampling()
    cell.rollout, other.rollout = object(), [1]
    assert fingerprint(cell, (X,)) == fingerprint(other, (X,))


def test_changed_code_is_another_graph(tmp_path, monkeypatch):
    """A constant of a module is in no cell; the file that has it is read."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "some_cells.py"
    file.write_text("from mindspore import nn\nTIMES = 2\n\n\nclass Times(nn.Cell):\n    def construct(self, x):\n"
                    "        return x * TIMES\n")
    module = importlib.import_module("some_cells")
    try:
        before = fingerprint(module.Times(), (X,))
        assert fingerprint(module.Times(), (X,)) == before
        file.write_text(file.read_text().replace("TIMES = 2", "TIMES = 3"))
        assert fingerprint(module.Times(), (X,)) != before
    finally:
        del sys.modules["some_cells"]


def test_changed_sources_versions_settings_and_shapes_are_other_graphs(monkeypatch):
    before, others = fingerprint(Line(), (X,)), []
    for change in (lambda patch: patch.setattr(fingerprints, "sources", lambda: "other"),
                   lambda patch: patch.setattr(fingerprints.ms, "__version__", "0"),
                   lambda patch: patch.setattr(fingerprints, "version", lambda name: "0"),
                   lambda patch: patch.setenv("MS_DEV_SOMETHING", "1")):
        with monkeypatch.context() as patch:
            change(patch)
            others.append(fingerprint(Line(), (X,)))
    trained, frozen = Line(), Line()
    trained.set_train(True)
    frozen.weight.requires_grad = False
    others += [fingerprint(cell, (X,)) for cell in (trained, frozen)]
    others += [fingerprint(Line(), (Tensor(np.zeros((2, 3), np.float32)),)), fingerprint(Line(), (None,))]
    assert len({before, *others}) == len(others) + 1
    assert fingerprint(Line(weight=2.0), (X,)) == before


def with_function(function) -> Line:
    cell = Line()
    cell.function = function
    return cell


def with_buffer(value: float) -> Line:
    cell = Line()
    cell.register_buffer("more", Tensor(np.full(3, value, np.float32)))
    return cell


def scaled_by(number: float):
    def scaled(x, *, factor=number):
        return x * factor

    return scaled


def at_level(level: str) -> Line:
    cell = Line()
    cell.set_jit_config(ms.JitConfig(jit_level=level))
    return cell


@pytest.mark.parametrize("cells", [
    lambda: [with_function(one) for one in (lambda x: x + 1, lambda x: x + 2, lambda x: x - 1)],      # on one line
    lambda: [with_function(scaled_by(2.0)), with_function(scaled_by(3.0))],
    lambda: [with_buffer(2.0), with_buffer(3.0)],
    lambda: [Line(), at_level("O2")],
], ids=["code", "keyword", "buffer", "jit"])
def test_what_a_file_and_its_lines_do_not_tell_is_read(cells):
    found = [fingerprint(cell, (X,)) for cell in cells()]
    assert len(set(found)) == len(found) and found == [fingerprint(cell, (X,)) for cell in cells()]


def test_only_a_run_of_one_process_on_the_cpu_keeps_steps_here(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_graphs, "folder", None)
    wanted = {"device_target": "CPU", "enable_compile_cache": True, "compile_cache_path": str(tmp_path)}
    assert kept_graphs.use({"context": wanted}) == {"context": {"device_target": "CPU"}}
    assert kept_graphs.folder == tmp_path
    for fields in ({"context": {**wanted, "device_target": "Ascend"}}, {"context": wanted, "use_parallel": True}):
        assert kept_graphs.use(fields) == fields and kept_graphs.folder is None
    kept_graphs.use({"context": {"device_target": "CPU", "enable_compile_cache": False}})
    assert kept_graphs.folder is None
