"""A name on a hub where a folder is expected is refused with the command that downloads it."""
from __future__ import annotations

import re
from pathlib import Path

import pytest

import mindformers_ixc_cli
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.config import read_fields
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.hub import REPOSITORIES, download_command, hub_name, not_a_folder

ROOT = Path(__file__).parents[1]
NAME = "internlm-xcomposer2d5-7b"


@pytest.mark.parametrize("text", [
    f"internlm/{NAME}", NAME, f"Shanghai_AI_Laboratory/{NAME}", f"InternLM/{NAME}", f"internlm/{NAME}/",
    f"https://huggingface.co/internlm/{NAME}", f"https://huggingface.co/internlm/{NAME}/tree/main",
    f"hf-mirror.com/internlm/{NAME}", f"https://www.modelscope.cn/models/Shanghai_AI_Laboratory/{NAME}",
    f"https:/huggingface.co/internlm/{NAME}", f"hf://internlm/{NAME}", f"internlm/{NAME}@main",
    f"modelscope://Shanghai_AI_Laboratory/{NAME}"])
def test_names_and_addresses(text):
    assert hub_name(text) == NAME


@pytest.mark.parametrize("text", ["out/model", "models/7b", f"downloads/{NAME}", f"./{NAME}", f"/data/internlm/{NAME}",
                                  f"other/{NAME}", "", "internlm", f"internlm/{NAME}/model.safetensors"])
def test_paths_are_none(text):
    assert hub_name(text) is None


def test_what_is_here_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    assert hub_name(NAME) is None and hub_name(f"internlm/{NAME}") == NAME
    (tmp_path / "internlm").mkdir()
    # a folder of the owner's name is a place of models: another name in it is a mistyped path
    assert hub_name("internlm/another") is None


def test_other_models_of_the_family_are_not_advised():
    reward = not_a_folder(f"internlm/{NAME}-reward")
    assert "nothing in this package goes online" in reward and download_command(f"{NAME}-reward") in reward
    assert "of another model" in not_a_folder("internlm/internlm3-8b-instruct")
    assert "of another model" not in not_a_folder(f"internlm/{NAME}")


@pytest.mark.parametrize(("name", "other"), [
    ("internlm2-7b", "a vision tower"), ("internlm2_5-7b", "a vision tower"),
    ("internlm-xcomposer2d5-clip", "a language model")])
def test_what_is_joined_with_another_is_advised_as_such(name, other):
    said = not_a_folder(f"internlm/{name}")
    assert f"`mindformers assemble` joins it with {other}" in said and download_command(name) in said


@pytest.mark.parametrize("words", [
    ["chat", "--model", "{}", "What?"], ["eval", "--model", "{}", "--data", "{demo}"], ["inspect", "{}"],
    ["convert", "{}", "target"], ["merge", "{}", "target"], ["reference", "{demo}", "target", "--model", "{}"],
    ["run", "--config", "{yaml}", "--load_checkpoint", "{}"],
    ["launch", "-n", "2", "--config", "{yaml}", "--load_checkpoint", "{}"]])
def test_every_command_refuses_it_with_the_command(words, tmp_path, monkeypatch, capfd):
    places = {"demo": "pkg:mindformers_ixc/demo/train.json", "yaml": str(ROOT / "yaml_configs" / "ixc25_sft.yaml")}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOG_MF_PATH", str(tmp_path / "log"))
    assert mindformers_ixc_cli.main([word.format(f"internlm/{NAME}", **places) for word in words]) == 1
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and "Traceback" not in said
    assert f"`huggingface-cli download internlm/{NAME} --local-dir {NAME}`" in said
    assert not (tmp_path / "target").exists()


def test_ordinary_sentences_stay(tmp_path):
    for read in (read_fields, open_source):
        with pytest.raises(CheckpointError, match="does not exist"):
            read(tmp_path / "model")
        with pytest.raises(CheckpointError, match="huggingface-cli download"):
            read(f"internlm/{NAME}")


def test_the_page_has_every_repository():
    rows = [row for row in (ROOT / "docs" / "weights.md").read_text(encoding="utf-8").splitlines()
            if row.startswith("| `internlm/")]
    assert len(rows) == len(REPOSITORIES)
    for row, repository in zip(rows, REPOSITORIES):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[0] == f"`internlm/{repository.name}`"
        size = f"{repository.gigabytes:.1f} GB" if repository.gigabytes else "?"
        assert re.match(rf"{re.escape(size)}\b|\?", cells[1]) and cells[1].startswith(size)
        assert cells[3].startswith("no" if repository.joined else "yes") or not repository.gigabytes
