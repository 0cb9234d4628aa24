"""Scores of a reward model: against the numpy reference in float64, alone and in batches, by every door."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mindformers import AutoModel, AutoModelForCausalLM
from PIL import Image
from random_model import make
from reference import ReferenceModel
from reward_model import make_reward_model, reference_values

from mindformers_ixc import InternLM2Tokenizer, IXC25Config, IXC25ForCausalLM, IXC25ForReward
from mindformers_ixc.config import read_config
from mindformers_ixc.errors import CheckpointError, ConfigError, GenerationError, ImageError, PromptError
from mindformers_ixc.generation import continuing
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.loading import load_model
from mindformers_ixc.generation.scoring import Scorer
from mindformers_ixc.models.reward import IXC25RewardModel
from mindformers_ixc.processing.judged import judged_turns

RED, BLUE = (Image.new("RGB", size, colour) for size, colour in (((90, 50), (200, 10, 10)), ((40, 70), (9, 90, 200))))


def chat(answer: str, question: str = "What is shown in the picture?") -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CHATS = [chat("A cat on a mat."), chat("Nothing."), chat("Two colours.", "First <ImageHere>, then <ImageHere>?"),
         [*chat("Red.", "Which colour?"), *chat("It is warm.", "Why do you like it?")]]
PICTURES = [[RED], [], [RED, BLUE], [BLUE]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_reward_model(tmp_path_factory.mktemp("reward") / "model")


@pytest.fixture(scope="module")
def model(folder):
    model = AutoModel.from_pretrained(str(folder))
    model.tokenizer = InternLM2Tokenizer(str(folder / "tokenizer.model"))
    return model


def expected(folder, scorer, pooling="last") -> list[float]:
    reference, found = ReferenceModel(folder), []
    for one, pictures in zip(CHATS, PICTURES):
        values = reference_values(reference, scorer.encode(judged_turns(one)[0], pictures), pictures)
        found.append(float(values[-1] if pooling == "last" else values.mean()))
    return found


def test_scores_are_those_of_the_reference_alone_and_in_batches(folder, model):
    wanted = expected(folder, model.scorer())
    assert np.ptp(wanted) > 0.5, "the chats must differ"
    np.testing.assert_allclose(model.get_scores(CHATS, PICTURES), wanted, atol=1e-4)
    alone = [model.get_score(*one) for one in zip(CHATS, PICTURES)]
    np.testing.assert_allclose(alone, wanted, atol=1e-4)
    np.testing.assert_allclose(model.get_scores(CHATS, PICTURES, batch_size=3), alone, atol=1e-5)


def test_a_large_model_scores_every_position_too(monkeypatch, folder):
    monkeypatch.setattr(continuing, "is_large", lambda _: True)       # whose prompts go in calls
    scorer = Scorer.from_directory(folder)
    np.testing.assert_allclose(scorer.scores(CHATS, PICTURES), expected(folder, scorer), atol=1e-4)


def test_the_mean_of_all_positions_is_the_other_pooling(tmp_path):
    folder = make_reward_model(tmp_path / "model", "mean")
    scorer = Scorer.from_directory(folder)
    np.testing.assert_allclose(scorer.scores(CHATS, PICTURES), expected(folder, scorer, "mean"), atol=1e-4)


def test_a_conversation_ends_in_the_reward_token(model):
    sample = model.scorer().encode(judged_turns(CHATS[0])[0], [RED])
    tokenizer = model.tokenizer
    assert sample.input_ids[-2:].tolist() == [tokenizer.eos_token_id,
                                              tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_130]")]
    assert sample.image_mask[0] == 1 and not sample.image_mask[-1]


def test_the_prompt_is_that_of_the_public_training_code(model):
    sample = model.scorer().encode(judged_turns(CHATS[3])[0], [])
    text = ("<s>[UNUSED_TOKEN_146]user\nWhich colour?[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n"
            "Red.[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]user\nWhy do you like it?[UNUSED_TOKEN_145]\n"
            "[UNUSED_TOKEN_146]assistant\nIt is warm.[UNUSED_TOKEN_145]\n</s>[UNUSED_TOKEN_130]")
    marks = model.tokenizer.encode_text(text, control_tokens=True)
    assert sample.input_ids.tolist() == marks


def test_rank_and_compare_go_by_the_scores(model):
    scores = model.get_scores(CHATS, PICTURES)
    places = model.rank(CHATS, PICTURES)
    assert sorted(places) == [0, 1, 2, 3]
    assert [scores[places.index(place)] for place in range(4)] == sorted(scores, reverse=True)
    best, worst = places.index(0), places.index(3)
    assert model.compare(CHATS[best], PICTURES[best], CHATS[worst], PICTURES[worst]) is True
    assert model.compare(CHATS[worst], PICTURES[worst], CHATS[best], PICTURES[best]) is False
    assert model.rank([CHATS[0], CHATS[0]], [[RED], [RED]]) == [0, 1]


def test_pictures_may_stand_in_the_messages(model):
    inside = [{"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "What?"}]},
              {"role": "assistant", "content": "Red."}]
    assert model.get_score(inside) == pytest.approx(model.get_score(chat("Red.", "<ImageHere>What?"), RED), abs=1e-5)


def test_a_video_is_scored(model):
    pytest.importorskip("decord")
    video = str(Path(__file__).parents[1] / "data" / "goldens" / "video_land.mp4")
    assert model.get_score(chat("A clip."), [video]) != model.get_score(chat("A clip."))


@pytest.mark.parametrize(("chats", "images", "error", "message"), [
    ([CHATS[0][:1]], [[]], PromptError, "chat 0: The last message of a chat must be the assistant's"),
    ([CHATS[0], CHATS[2]], [[RED], [RED]], PromptError, "chat 1: the questions have 2 <ImageHere> for 1 pictures"),
    ([CHATS[0]], [[RED], []], PromptError, "one list for each of the 1 chats"),
    ([], [], PromptError, "at least one chat"),
    ([CHATS[0]], [["nowhere.png"]], ImageError, "nowhere.png"),
    ([[{"role": "user", "content": 5}, CHATS[0][1]]], [[]], PromptError, "'content' must be text"),
])
def test_bad_chats_are_refused_by_number(model, chats, images, error, message):
    with pytest.raises((error, OSError), match=message):
        model.get_scores(chats, images)


@pytest.mark.parametrize("options", [{"hd_num": 0}, {"hd_num": "9"}, {"max_length": "16384"}, {"batch_size": 0},
                                     {"batch_size": -1}])
def test_numbers_that_are_none_are_refused(model, options):
    (name,) = options
    with pytest.raises(GenerationError, match=f"{name} is .*; it must be a whole number of at least 1"):
        model.get_scores(CHATS[:1], PICTURES[:1], **options)


def test_what_is_too_long_is_refused(model):
    with pytest.raises(GenerationError, match="positions, more than 20"):
        model.get_score(CHATS[0], [RED], max_length=20)


def test_a_score_that_is_no_number_is_refused(folder):
    scorer = Scorer.from_directory(folder)
    head = scorer.model.v_head.weight
    head.set_data(head * float("inf"))
    with pytest.raises(GenerationError, match=r"The score is (nan|-?inf), which is no finite number"):
        scorer.scores([CHATS[0]])
    with pytest.raises(GenerationError, match=r"The score of conversation 0 is (nan|-?inf)"):
        scorer.scores([CHATS[0], CHATS[1]])


@pytest.mark.parametrize("said", ["architectures", "weights"])
def test_a_reward_model_is_known_without_being_told(tmp_path, model, said):
    folder = make_reward_model(tmp_path / "model", said=said)
    found = AutoModel.from_pretrained(str(folder))
    assert isinstance(found, IXC25ForReward) and found.config.reward_pooling == "last"
    found.tokenizer = model.tokenizer
    assert found.get_score(CHATS[1]) == pytest.approx(model.get_score(CHATS[1]), abs=1e-6)


def test_saved_and_loaded_again_it_is_the_same(model, tmp_path):
    model.save_pretrained(str(tmp_path / "again"))
    assert read_config(tmp_path / "again").reward_pooling == "last"
    again = IXC25ForReward.from_pretrained(str(tmp_path / "again"))
    again.tokenizer = model.tokenizer
    assert again.get_score(CHATS[1]) == model.get_score(CHATS[1])


@pytest.mark.parametrize("said", ["reward_pooling", "weights"])
def test_a_reward_model_does_not_write(tmp_path, said):
    folder = make_reward_model(tmp_path / "model", said=said)
    for load in (Assistant.from_directory, IXC25ForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"is a reward model: .* writes none"):
            load(str(folder))


def test_a_loaded_reward_model_is_not_asked_for_answers(model):
    for ask in (lambda: model.generate([[1]]), lambda: model.chat(model.tokenizer, "Hello"),
                lambda: Assistant(model, model.scorer().processor)):
        with pytest.raises(GenerationError, match=r"This is a reward model: it scores answers .* and writes none"):
            ask()


@pytest.mark.parametrize(("load", "name", "options", "error", "message"), [
    (AutoModelForCausalLM, "reward", {}, CheckpointError, "is a reward model"),
    (AutoModel, "reward", {"reward_pooling": "median"}, ConfigError, "'median'; the choices are last, mean"),
    (AutoModel, "writer", {"reward_pooling": "last"}, CheckpointError, "is a model that writes answers"),
])
def test_auto_classes_say_what_is_wrong_themselves(tmp_path, load, name, options, error, message):
    make_reward_model(tmp_path / "reward")
    make(tmp_path / "writer")
    with pytest.raises(error, match=message):
        load.from_pretrained(str(tmp_path / name), **options)


def test_a_configuration_that_the_weights_contradict_is_named(tmp_path):
    folder = make(tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "reward_pooling": "last"}), encoding="utf-8")
    for load in (Assistant.from_directory, Scorer.from_directory):
        with pytest.raises(CheckpointError, match=r"taken for a reward model .* but it has output\.weight and no"):
            load(folder)


def test_a_model_that_writes_does_not_score(tmp_path):
    with pytest.raises(CheckpointError, match="writes answers: it has no score head"):
        Scorer.from_directory(make(tmp_path / "model"))
    with pytest.raises(ConfigError, match="reward_pooling is not set"):
        IXC25RewardModel(IXC25Config())
    with pytest.raises(GenerationError, match="This model writes answers and has no score head"):
        Scorer(load_model(tmp_path / "model"), None)


def test_without_a_tokenizer_nothing_is_scored(folder):
    with pytest.raises(PromptError, match=r"set model\.tokenizer"):
        IXC25ForReward.from_pretrained(str(folder)).get_score(CHATS[0])
