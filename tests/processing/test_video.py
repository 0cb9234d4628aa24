"""The video rule: reference outputs, closed formulae, the board's geometry, what is asked of the decoder, bad files."""
from __future__ import annotations

import io
import json
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import parity_video
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from PIL import Image

from mindformers_ixc.errors import VideoError
from mindformers_ixc.processing import video_decoder, video_process
from mindformers_ixc.processing.image import image_to_tiles
from mindformers_ixc.processing.processor import ImageProcessor
from mindformers_ixc.processing.video import (
    fit_board,
    frames_to_board,
    is_video,
    load_video,
    read_frames,
    sample_frames,
)
from mindformers_ixc.processing.video_process import VideoProcess
from mindformers_ixc.registration import IXC25VideoProcessor

OPTIONS = settings(deadline=None, max_examples=60)
RED, BLUE, BLACK, WHITE = (255, 0, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)


def test_reference_videos(goldens):
    rows = parity_video.check_video(goldens)
    assert [row for row in rows if not row.passed] == []
    assert {row.check: row.cases for row in rows}["video: mean colours of the first frames"] == 9


# Sampling

@OPTIONS
@given(st.integers(1, 200000), st.floats(0.1, 240), st.integers(1, 64))
def test_sampling_rule(count, fps, limit):
    frames = sample_frames(count, fps, limit)
    stride = max(1, round(fps))
    seconds = -(-count // stride)
    assert frames[0] == 0
    assert frames == sorted(set(frames))
    if seconds > limit:
        assert frames == [stride * int(i * (seconds / (limit + 1))) for i in range(limit)]
    else:
        assert frames == [stride * i for i in range(seconds)]
    assert frames[-1] < count


@pytest.mark.parametrize(("arguments", "words"), [((10, 5.0, 0), "limit"), ((10, math.nan), "frame rate"),
                                                  ((10, math.inf), "frame rate")])
def test_senseless_sampling_is_refused(arguments, words):
    with pytest.raises(VideoError, match=words):
        sample_frames(*arguments)


def test_slow_videos_give_every_frame():
    assert sample_frames(4, 0.2) == sample_frames(4, 0.0) == sample_frames(4, 1.4) == [0, 1, 2, 3]
    assert sample_frames(0, 25.0) == []


# Decoding

def served(path, *numbers) -> list:
    """What the decoder's program answers about a video, here in this process: messages, and frames as arrays."""
    lines = [json.dumps({"path": str(path)}), *(json.dumps({"frames": [number]}) for number in numbers)]
    answers = io.BytesIO()
    video_decoder.serve(io.BytesIO("".join(line + "\n" for line in lines).encode()), answers)
    answers.seek(0)
    found = []
    for line in answers:
        found.append(json.loads(line))
        if "size" in found[-1]:
            height, width = found[-1]["size"]
            found[-1] = np.frombuffer(answers.read(height * width * 3), np.uint8).reshape(height, width, 3)
    return found


def test_only_the_sampled_frames_are_decoded(goldens, monkeypatch):
    asked, real = [], VideoProcess.frames

    def counted(self, numbers):
        asked.extend(numbers)
        return real(self, numbers)

    monkeypatch.setattr(VideoProcess, "frames", counted)
    assert len(read_frames(goldens / "video_long.mp4", limit=3)) == 3
    assert asked == sample_frames(300, 5.0, 3)


def test_the_program_decodes_a_frame_when_it_is_asked_for(goldens, monkeypatch):
    import decord

    numbers, real = [], decord.VideoReader.__getitem__
    monkeypatch.setattr(decord.VideoReader, "__getitem__",
                        lambda self, number: numbers.append(number) or real(self, number))
    monkeypatch.delattr(decord.VideoReader, "get_batch")
    opened, last, first = served(goldens / "video_port.mp4", 32, 0)
    assert numbers == [32, 0]
    assert opened == {"count": 33, "fps": 8.0}
    expected = read_frames(goldens / "video_port.mp4", indices=[32, 0])
    assert np.array_equal(last, expected[0])
    assert np.array_equal(first, expected[1])


def test_frames_can_be_named(goldens):
    every = read_frames(goldens / "video_port.mp4")
    last, first = read_frames(str(goldens / "video_port.mp4"), indices=[32, 0])
    assert np.array_equal(last, every[-1])
    assert np.array_equal(first, every[0])


@pytest.mark.parametrize("indices", [[47], [-1], [0, 100], []])
def test_frames_the_video_does_not_have_are_refused(goldens, indices):
    with pytest.raises(VideoError, match="numbered 0 to 46"):
        read_frames(goldens / "video_land.mp4", indices=indices)


def test_padding_of_rows_is_not_part_of_the_picture(monkeypatch, goldens):
    """decord2 gives narrow frames as (H, W, 4) although each row is W pixels of three bytes and padding."""
    import decord

    class Padded:
        def __init__(self, frame):
            self.frame = frame

        def asnumpy(self):
            height, width = self.frame.height, self.frame.width
            rows = np.pad(np.asarray(self.frame).reshape(height, -1), ((0, 0), (0, width)), constant_values=77)
            return rows.reshape(height, width, 4)

    expected = dict(zip((0, 8), read_frames(goldens / "video_port.mp4", indices=[0, 8])))
    monkeypatch.setattr(decord.VideoReader, "__getitem__", lambda self, number: Padded(expected[number]))
    _, *found = served(goldens / "video_port.mp4", 8, 0)
    assert [frame.shape for frame in found] == [(128, 96, 3)] * 2
    assert np.array_equal(found[0], expected[8])
    assert np.array_equal(found[1], expected[0])


# The board

def test_landscape_frames_stand_below_each_other():
    board = frames_to_board([Image.new("RGB", (1120, 560), RED), Image.new("RGB", (1120, 560), BLUE)])
    assert board.size == (1120, 2 * (40 + 560 + 10))
    for top, colour in ((0, RED), (610, BLUE)):
        frame = np.asarray(board)[top + 40:top + 600]
        assert (frame == colour).all()
        caption = np.asarray(board.convert("L"))[top:top + 40]
        dark = np.nonzero((caption < 128).any(axis=0))[0]
        assert len(dark) > 0
        assert dark.max() < 300                            # at the left edge, not across the band
    gap = np.asarray(board)[600:610]
    assert [tuple(row[0]) for row in gap].count(BLACK) == 2
    assert tuple(gap[5, 1119]) == BLACK
    assert (np.asarray(board)[1210:] == WHITE).all()       # a line between frames, none after the last


def test_portrait_frames_stand_beside_each_other():
    board = frames_to_board([Image.new("L", (280, 560), 9), Image.new("L", (280, 560), 99)])
    assert board.size == (2 * (560 + 10), 40 + 1120)
    pixels = np.asarray(board)
    assert (pixels[40:, :560] == 9).all()
    assert (pixels[40:, 570:1130] == 99).all()
    assert (pixels[:, 560:570, 0] == 0).sum(axis=1).tolist() == [2] * 1160
    assert (pixels[:, 1130:] == 255).all()


def test_captions_count_the_frames():
    board = np.asarray(frames_to_board([Image.new("RGB", (1120, 560), RED)] * 3))
    captions = [board[610 * i:610 * i + 40] for i in range(3)]
    assert not np.array_equal(captions[0], captions[1])
    assert not np.array_equal(captions[1], captions[2])


def test_square_frames_stand_beside_each_other():
    assert frames_to_board([Image.new("RGB", (10, 10))] * 3).size == (3 * 1130, 1160)


@OPTIONS
@given(st.integers(30, 300), st.integers(30, 300), st.integers(1, 3))
def test_board_size(width, height, count):
    short = int(1120 / (width / height)) if width > height else int(1120 * (width / height))
    expected = (1120, count * (short + 50)) if width > height else (count * (short + 10), 1160)
    assert frames_to_board([Image.new("RGB", (width, height))] * count).size == expected


def test_the_ratio_is_divided_first():
    # 170 * (1120 / 800) is one rounding below 238, 1120 / (800 / 170) is not
    assert frames_to_board([Image.new("RGB", (800, 170))]).size == (1120, 238 + 50)


def test_frames_that_make_no_board_are_refused():
    with pytest.raises(VideoError, match="no frames"):
        frames_to_board([])
    with pytest.raises(VideoError, match="Frame 1 has 8 x 9 pixels"):
        frames_to_board([Image.new("RGB", (9, 8)), Image.new("RGB", (8, 9))])
    with pytest.raises(VideoError, match="too elongated"):
        frames_to_board([Image.new("RGB", (2000, 1))])


@OPTIONS
@given(st.integers(20, 900), st.integers(20, 900))
def test_boards_become_whole_tiles(width, height):
    fitted = fit_board(Image.new("RGB", (width, height), BLACK), 56)
    long, short = max(width, height), min(width, height)
    content = int(56 * (long / short))
    along = math.ceil(content / 56) * 56
    assert fitted.size == ((56, along) if width < height else (along, 56))
    pixels = np.asarray(fitted if width < height else fitted.transpose(Image.TRANSPOSE))
    assert (pixels[:content] == 0).all()
    assert (pixels[content:] == 255).all()


def test_tall_boards_are_resized_lying_on_their_side():
    noise = np.random.default_rng(0).integers(0, 256, (60, 50, 3), np.uint8)
    tall, wide = Image.fromarray(noise), Image.fromarray(np.ascontiguousarray(noise.transpose(1, 0, 2)))
    assert np.array_equal(np.asarray(fit_board(tall, 560)).transpose(1, 0, 2), np.asarray(fit_board(wide, 560)))


def test_long_videos_are_no_decompression_bombs(goldens, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)    # above a caption's, below the board's
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        assert load_video(goldens / "video_land.mp4").size == (560, 2240)


# The processor

def test_processor_gives_tiles(goldens):
    tiles, grid = IXC25VideoProcessor(image_size=56)(goldens / "video_land.mp4")
    assert grid == (4, 1)
    assert tiles.shape == (5, 3, 56, 56)
    assert tiles.dtype == np.float32
    assert np.array_equal(tiles, image_to_tiles(load_video(goldens / "video_land.mp4", 56), 56))
    assert IXC25VideoProcessor(image_size=56, frame_limit=2).preprocess(goldens / "video_port.mp4")[1] == (1, 2)


def test_processor_is_registered():
    assert MindFormerRegister.get_cls(MindFormerModuleType.PROCESSOR, "IXC25VideoProcessor") is IXC25VideoProcessor


@pytest.mark.parametrize("name", ["image_size", "frame_limit"])
def test_processor_refuses_senseless_sizes(name):
    with pytest.raises(VideoError, match=name):
        IXC25VideoProcessor(**{name: 0})


# Bad files

def test_bad_files_are_named(tmp_path, goldens):
    whole = (goldens / "video_land.mp4").read_bytes()
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    for name, content in (("empty.mp4", b""), ("cut.mp4", whole[:3000]), ("text.mp4", b"no video"),
                          ("half.mp4", whole[:5000] + bytes(6000) + whole[11000:])):
        (tmp_path / name).write_bytes(content)
    for name, words in (("gone.mp4", "does not exist"), ("empty.mp4", "0 bytes"), ("cut.mp4", "cannot be decoded"),
                        ("text.mp4", "cannot be decoded"), ("half.mp4", "cannot be decoded"),
                        ("picture.png", "cannot be decoded"), ("", "a folder")):
        with pytest.raises(VideoError, match=words) as error:
            read_frames(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


def test_other_sources_are_refused():
    with pytest.raises(VideoError, match="found list"):
        read_frames([1, 2])


def test_videos_without_frames_are_refused(goldens, monkeypatch):
    real = VideoProcess.__init__

    def empty(self, path):
        real(self, path)
        self.count = 0

    monkeypatch.setattr(VideoProcess, "__init__", empty)
    with pytest.raises(VideoError, match=r"video_land\.mp4 has no frames"):
        read_frames(goldens / "video_land.mp4")


def test_a_missing_decoder_is_named(goldens, monkeypatch, tmp_path):
    (tmp_path / "decord.py").write_text("raise ImportError('none here')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(VideoError, match=r"package decord.*none here"):
        read_frames(goldens / "video_land.mp4")


# The process that decodes

def decoder(monkeypatch, tmp_path, source: str):
    """Puts another module in decord's place, for the decoder's program alone."""
    (tmp_path / "decord.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(("source", "words"), [
    ("import os; os.abort()", "signal 6"),
    ("import os; os._exit(3)", "exit code 3"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
    ("bytearray(1 << 31)", "signal|MemoryError|decord"),
    ("while True: pass", "longer than 1 seconds"),
    ("import time; time.sleep(600)", "longer than 1 seconds"),
    ("import os; os.write(1, b'noise')\nraise ImportError('after noise')", "after noise"),
])
def test_whatever_becomes_of_the_decoder_is_a_sentence(monkeypatch, tmp_path, goldens, source, words):
    decoder(monkeypatch, tmp_path, source)
    monkeypatch.setenv("MINDFORMERS_IXC_VIDEO_SECONDS", "1" if "seconds" in words else "60")
    with pytest.raises(VideoError, match=words) as error:
        read_frames(goldens / "video_land.mp4")
    assert "video_land.mp4" in str(error.value)


FAKE = """
class Frame:
    def asnumpy(self):
        import numpy
        return numpy.zeros({shape}, numpy.uint8)
class VideoReader:
    def __init__(self, *a, **k): pass
    def __len__(self): return {count}
    def get_avg_fps(self): return {fps}
    def __getitem__(self, number): return Frame()
def cpu(number): pass
"""


@pytest.mark.parametrize(("shape", "count", "fps", "words"), [
    ("(2, 2, 3)", 3, "float('nan')", "frame rate"), ("(2, 2, 3)", 3, "float('inf')", "frame rate"),
    ("(0, 2, 3)", 3, 1.0, "cannot be decoded"), ("(9000, 9000, 3)", 3, 1.0, "9000 x 9000 pixels"),
    ("(1, 2000, 3)", 1, 1.0, "too elongated")])
def test_what_a_damaged_file_says_of_itself_is_named(monkeypatch, tmp_path, goldens, shape, count, fps, words):
    decoder(monkeypatch, tmp_path, FAKE.format(shape=shape, count=count, fps=fps))
    with pytest.raises(VideoError, match=words) as error:
        load_video(goldens / "video_land.mp4")
    assert "video_land.mp4" in str(error.value)


def test_any_number_of_frames_may_be_said(monkeypatch, tmp_path, goldens):
    decoder(monkeypatch, tmp_path, FAKE.format(shape="(2, 4, 3)", count=1 << 40, fps=0.0))
    assert len(read_frames(goldens / "video_land.mp4", limit=2)) == 2


def test_senseless_limits_are_refused(monkeypatch, goldens):
    monkeypatch.setenv("MINDFORMERS_IXC_VIDEO_MEMORY", "much")
    with pytest.raises(VideoError, match=r"MINDFORMERS_IXC_VIDEO_MEMORY is 'much'"):
        read_frames(goldens / "video_land.mp4")


def test_a_busy_machine_makes_no_damaged_videos(monkeypatch, goldens):
    """A process that waits for a processor is not counted as one that sleeps."""
    monkeypatch.setattr(video_process, "_sleeps", lambda process: False)
    monkeypatch.setattr(video_process, "TICK", 0.001)
    assert len(read_frames(goldens / "video_land.mp4")) == 5
    monkeypatch.setattr(video_process, "_sleeps", lambda process: True)
    monkeypatch.setattr(video_process, "SECONDS", 0.002)
    monkeypatch.setattr(video_process, "SECONDS_PER_MIB", 0)
    with pytest.raises(VideoError, match="longer"):
        read_frames(goldens / "video_land.mp4")


@pytest.mark.parametrize("content", [b"#EXTM3U\n#EXT-X-TARGETDURATION:9\nhttp://127.0.0.1:9/x.ts\n",
                                     b"ffconcat version 1.0\nfile /etc/hostname\n", b"v=0\r\nc=IN IP4 127.0.0.1\r\n",
                                     b"<?xml version='1.0'?>\n<MPD xmlns='urn:mpeg:dash:schema:mpd:2011'></MPD>"])
def test_playlists_are_refused_before_any_decoder_sees_them(tmp_path, monkeypatch, content):
    (tmp_path / "list.mp4").write_bytes(content)
    monkeypatch.setattr(video_process.subprocess, "Popen", None)
    with pytest.raises(VideoError, match=r"list\.mp4 is a playlist"):
        read_frames(tmp_path / "list.mp4")


@pytest.mark.parametrize("suffix", [".flv", ".wmv", ".3gp", ".mpg", ".mpeg", ".ts", ".m4v", ".ogv", ".MP4"])
def test_videos_under_other_names(tmp_path, goldens, suffix):
    assert is_video(f"a/clip{suffix}")
    assert not is_video("a/clip.jpg")
    (tmp_path / f"bad{suffix}").write_bytes(b"x" * 100)
    with pytest.raises(VideoError, match="cannot be decoded"):
        ImageProcessor(56).preprocess(str(tmp_path / f"bad{suffix}"))


def test_threads_decode_at_once(goldens):
    names = ["video_land.mp4", "video_port.mp4"] * 2
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: len(read_frames(goldens / name)), names))
    assert found == [5, 5, 5, 5]
