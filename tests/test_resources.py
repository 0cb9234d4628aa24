"""Names of files and models: paths, `pkg:`, and the shipped model."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

import mindformers_ixc
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.config import read_config
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.resources import (
    STARTER,
    STARTER_PLACE,
    is_starter,
    model_name,
    resolve_model,
    resolve_path,
    shown,
    usable_cache_folder,
    usable_log_folder,
)

PLACE = Path(mindformers_ixc.__file__).parent / "starter"

# What it may add to a wheel.
MOST_BYTES = 3_000_000


def test_the_starter_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_model(STARTER) == resolve_model(STARTER_PLACE) == PLACE
    assert resolve_model("out/model") == Path("out/model")
    assert is_starter(STARTER)
    assert is_starter(PLACE)
    assert not is_starter("out/model")


def test_a_folder_of_the_same_name_is_not_passed_over_in_silence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / STARTER).mkdir()
    with pytest.raises(ConfigError, match=r"write \./starter for that"):
        resolve_model(STARTER)
    assert resolve_model("./starter") == Path("starter")
    assert not is_starter("./starter")


def test_a_model_is_called_by_its_folder_or_by_its_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [model_name(one) for one in (STARTER, "flags/model", "flags/model/", "./7b", "/a/b/model", "/model")] == [
        "starter", "flags", "flags", "7b", "b", "model"]
    (tmp_path / "model").mkdir()
    assert model_name("model") == tmp_path.name
    monkeypatch.chdir("model")
    assert model_name(".") == tmp_path.name


@pytest.mark.parametrize("home", ["", None])
def test_without_a_home_directory_a_temporary_folder_has_to_do(tmp_path, monkeypatch, home):
    monkeypatch.setenv("HOME", home or "")
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)        # of a container's user who is in no list
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = tmp_path / f"mindformers_ixc_{os.getuid()}"
    assert usable_cache_folder("index") == place / "index"
    folder, why = usable_log_folder()
    assert folder.parent == tmp_path and isinstance(why, RuntimeError)


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="'no_such_package' is not installed"):
        resolve_path("pkg:no_such_package/file")


def test_the_starter_is_a_small_whole_model_directory():
    assert sum(file.stat().st_size for file in PLACE.iterdir()) < MOST_BYTES
    open_source(STARTER, verify=True)                 # every byte against its digest
    assert read_config(STARTER).hidden_size == 128
    assert Processor.from_directory(STARTER).image_processor.hd_num == 4


def test_paths_are_shown_as_short_as_they_can_be_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "out" / "model") == "out/model" and shown("a.png") == "a.png"
    assert shown("/elsewhere/model") == "/elsewhere/model"
    assert shown(resolve_path(STARTER_PLACE)) == shown(STARTER) == "starter"
    (tmp_path / "starter").mkdir()
    assert shown(tmp_path / "starter") == "./starter"
