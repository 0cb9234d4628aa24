"""Odd pictures and videos through the doors that take them: right or refused by name, and no request harms another."""
from __future__ import annotations

import json
import logging

import numpy as np
import odd_media
import odd_pictures
import odd_videos
import pytest
from indexed import fit_samples, read_image_sizes
from PIL import Image

from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.data.conversations import Conversation, load_conversations
from mindformers_ixc.data.fitting import check_bad_pictures
from mindformers_ixc.data.rows import ConversationTable, make_processor
from mindformers_ixc.data.sections import check_dataset_section
from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import DataError, ImageError, PromptError, VideoError
from mindformers_ixc.processing.processor import ImageProcessor, Processor
from mindformers_ixc.processing.tokenizer import Tokenizer

TOKENIZER = Tokenizer(str(demo_path("tokenizer.model")))
SECTION = {"data_loader": {}, "tokenizer": {}, "seq_length": 96, "max_tiles": 3, "batch_size": 1}


def processor(**options) -> Processor:
    return Processor(ImageProcessor(56, **options), TOKENIZER)


def test_some_odd_pictures(tmp_path):
    outcomes = [odd_media.load(case) for case in odd_pictures.cases(tmp_path / "pictures", 120, seed=7)]
    assert [outcome for outcome in outcomes if outcome[0] not in odd_media.GOOD] == []
    assert sum(kind == "right" for kind, _ in outcomes) > 30


def test_some_odd_videos(tmp_path):
    outcomes = [odd_media.load(case) for case in odd_videos.cases(tmp_path / "videos", 12, seed=7)]
    assert [outcome for outcome in outcomes if outcome[0] not in odd_media.GOOD] == []


def test_a_video_that_aborts_the_decoder_is_refused(tmp_path, goldens):
    content = bytearray((goldens / "video_long.mp4").read_bytes())
    place = content.index(b"stts") + 12
    content[place:place + 4] = b"\xff" * 4       # how long a frame is shown; decord's memory ends, and it calls abort
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(VideoError, match=r"^x\.json, sample 3: .*clip\.mp4 .*ended with signal 6"):
        processor().image_processor.preprocess(tmp_path / "clip.mp4", where="x.json, sample 3")


def test_motion_jpeg_in_avi_is_read(tmp_path):
    frames = [odd_pictures.encoded(Image.new("RGB", (64, 48), (60 * i, 0, 0)), "JPEG") for i in range(4)]
    (tmp_path / "clip.avi").write_bytes(odd_videos.avi(frames, 64, 48, rate=1))
    _, grids = processor().image_processor.preprocess(str(tmp_path / "clip.avi"))
    assert grids[0].columns == 1
    assert grids[0].rows > 1


# A black logo on transparent ground

@pytest.fixture
def logo(tmp_path):
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[10:30, 10:30, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "logo.png")
    return tmp_path / "logo.png"


def test_chat_and_training_see_a_logo(logo):
    white = processor().image_processor
    for training in (False, True):
        tiles, _ = white.preprocess(str(logo), training=training)
        assert tiles[1:, 0].max() - tiles[1:, 0].min() > 3          # black on white, in CLIP's units
    public, _ = processor(transparency="public").image_processor.preprocess(str(logo))
    assert public[1:, 0, :28].max() == public[1:, 0, :28].min()


def test_the_options_are_the_sections_and_the_directorys(tmp_path):
    class Section(dict):
        __getattr__ = dict.get

    assert make_processor(Section(image_size=56), TOKENIZER).image_processor.transparency == "white"
    made = make_processor(Section(image_size=56, transparency="public", exif="apply"), TOKENIZER).image_processor
    assert (made.transparency, made.exif) == ("public", "apply")
    fields = {"vision_config": {"image_size": 56}, "transparency": "public"}
    assert ImageProcessor.from_config(fields).transparency == "public"
    assert ImageProcessor.from_config(fields, transparency="white").transparency == "white"
    assert ImageProcessor.from_config({}).transparency == "white"
    check_dataset_section({**SECTION, "transparency": "public", "exif": "apply"})
    for key, value in (("transparency", "black"), ("exif", True)):
        with pytest.raises(DataError, match=rf"train_dataset\.{key} is {value!r}; the choices are"):
            check_dataset_section({**SECTION, key: value})
        with pytest.raises(PromptError, match=f"{key} is {value!r}; the choices are"):
            ImageProcessor(56, **{key: value})


@pytest.mark.parametrize("command", [["chat", "--model", "m", "q"], ["eval", "--model", "m", "--data", "d"],
                                     ["reference", "a", "b", "--model", "m"]])
def test_the_commands_have_the_options(command):
    from mindformers_ixc.cli.inference import image_options
    from mindformers_ixc.cli.parsers import build_parser

    parse = build_parser().parse_args
    assert image_options(parse(command)) == {}
    found = image_options(parse([*command, "--transparency", "public", "--exif", "apply"]))
    assert found == {"transparency": "public", "exif": "apply"}
    with pytest.raises(SystemExit):
        parse([*command, "--transparency", "black"])


# Training data

def source(folder, names):
    rows = [{"id": name, "image": name, "conversations": [{"from": "human", "value": "what?"},
                                                          {"from": "bot", "value": "a cat"}]} for name in names]
    (folder / "data.json").write_text(json.dumps(rows))
    return load_conversations(folder / "data.json")


def test_a_strip_is_left_out_by_name(tmp_path, caplog):
    Image.new("RGB", (50, 40)).save(tmp_path / "good.png")
    Image.new("RGB", (5000, 3)).save(tmp_path / "strip.png")
    samples = source(tmp_path, ["good.png", "strip.png", "good.png"])
    read_image_sizes(samples)
    with caplog.at_level(logging.WARNING):
        fitted = fit_samples(processor(), samples, 96, 3, 1)
    assert [sample.id for sample in fitted] == ["good.png", "good.png"]
    assert all(word in caplog.text for word in ("Left out", "data.json, sample 1", "strip.png", "too elongated"))
    with pytest.raises(DataError, match=r"2 of 3 samples.*max_bad_share 0\.5.*strip\.png"):
        fit_samples(processor(), [samples[0], samples[1], samples[1]], 96, 3, 1, 0.5)
    with pytest.raises(DataError, match=r"1 of 1 samples.*strip\.png"):
        fit_samples(processor(), [samples[1]], 96, 3, 1)
    with pytest.raises(ImageError, match=r"^data, sample 1: .*strip\.png cannot be cut into tiles.*5000 x 3"):
        processor().image_processor.preprocess(tmp_path / "strip.png", 1, where="data, sample 1")


def test_the_share_of_bad_pictures():
    errors = [ImageError("a"), ImageError("b")]
    check_bad_pictures(errors, 10, 0.2)
    check_bad_pictures(errors[:1], 10, 0)
    check_bad_pictures([], 0, 0)
    for total, share in ((10, 0.19), (2, 1)):
        with pytest.raises(DataError, match=f"2 of {total}"):
            check_bad_pictures(errors, total, share)


def test_the_scan_names_what_it_cannot_use(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((4, 4), np.int32)).save(tmp_path / "deep.tif")
    (tmp_path / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0\n")
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    (tmp_path / "bad.wmv").write_bytes(b"x")
    samples = source(tmp_path, ["deep.tif", "eps.jpg", "bomb.png", "bad.wmv"])
    with pytest.raises(DataError) as error:
        read_image_sizes(samples)
    lines = str(error.value).splitlines()
    for number, (line, words) in enumerate(zip(lines, ("integer pixels", "PostScript", "bomb", "cannot be decoded"))):
        assert f"data.json, sample {number}" in line
        assert words in line
    assert len(lines) == 4


def test_the_scan_turns_sizes_as_loading_does(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (60, 20)).save(tmp_path / "a.jpg", exif=exif)
    for how, size in (("ignore", (60, 20)), ("apply", (20, 60))):
        samples = source(tmp_path, ["a.jpg"])
        read_image_sizes(samples, how)
        assert samples[0].sizes == [size]
        grid = processor(exif=how).image_processor.preprocess(samples[0].images, 4, training=True)[1][0]
        assert (grid.columns > grid.rows) == (how == "ignore")


@pytest.mark.parametrize("error", [RuntimeError("planes"), KeyError("x"), MemoryError()])
def test_a_picture_whose_decoder_fails_is_left_out_of_training(tmp_path, monkeypatch, error):
    names = ["a.png", "b.png", "c.bmp", "d.png"]
    for name in names:
        Image.new("RGB", (50, 40)).save(tmp_path / name)
    samples = source(tmp_path, names)
    read_image_sizes(samples)

    def fail(self):
        raise error

    monkeypatch.setattr("PIL.BmpImagePlugin.BmpImageFile.load", fail)
    table = ConversationTable(processor(), samples, 96, 3, 1)
    assert len(table[2]) == len(BATCH_COLUMNS)
    assert table.bad_samples == 1


def test_workers_decode_videos_and_leave_out_what_they_cannot_use(tmp_path, goldens):
    """MindSpore's workers are daemons, which may start no process of `multiprocessing`."""
    from mindformers.dataset.build_dataset import build_dataset
    from mindformers.tools.register import MindFormerConfig

    Image.new("RGB", (5000, 3)).save(tmp_path / "strip.png")
    Image.new("RGB", (60, 40)).save(tmp_path / "good.png")
    source(tmp_path, [str(goldens / "video_land.mp4"), "good.png", "strip.png"])
    section = {**SECTION, "data_loader": {"type": "IXC25DataLoader", "dataset_dir": str(tmp_path / "data.json")},
               "tokenizer": {"type": "InternLM2Tokenizer", "vocab_file": str(demo_path("tokenizer.model"))},
               "max_tiles": 9, "hd_num": 1, "image_size": 56, "patch_size": 14, "num_parallel_workers": 1,
               "python_multiprocessing": True, "repeat": 1, "drop_remainder": True, "seed": 1, "prefetch_size": 1,
               "numa_enable": False}
    data = build_dataset(MindFormerConfig(type="IXC25SFTDataset", dataset_config=MindFormerConfig(**section)))
    rows = list(data.create_dict_iterator(num_epochs=1, output_numpy=True))
    local = sorted(int((row["pixel_values"] != 0).any(axis=(2, 3, 4)).sum()) for row in rows)
    assert local == [1, 4]
    assert all((row["view_index"] == [1, *[0] * 8]).all() and row["global_views"][:, 0].any() for row in rows)


def test_another_requests_error_names_its_picture(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff" * 9)
    with pytest.raises(ImageError, match=r"a\.jpg"):
        processor().encode_chat("what?", [str(tmp_path / "a.jpg")])
    sample = Conversation("d.json", 3, 0, [("user", "q"), ("assistant", "a")], [tmp_path / "a.jpg"])
    with pytest.raises(DataError, match=r"d\.json, sample 3"):
        read_image_sizes([sample])
