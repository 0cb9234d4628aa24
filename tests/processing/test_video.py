"""The video rule: reference outputs, closed formula, bad files."""
from __future__ import annotations

import parity_video
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mindformers_ixc.processing.video import (
    IXC25VideoProcessor,
    VideoError,
    fit_board,
    frames_to_board,
    read_frames,
    sample_frames,
)


def test_reference_videos(goldens):
    assert [row for row in parity_video.check_video(goldens) if not row.passed] == []


@given(st.integers(1, 200000), st.floats(0.1, 240), st.integers(1, 64))
def test_sampling_rule(count, fps, limit):
    frames = sample_frames(count, fps, limit)
    stride = max(1, round(fps))
    seconds = -(-count // stride)
    assert frames[0] == 0
    assert frames == sorted(set(frames))
    assert all(frame < count and frame % stride == 0 for frame in frames)
    assert len(frames) == min(seconds, limit)
    if seconds > limit:
        assert frames == [stride * int(i * seconds / (limit + 1)) for i in range(limit)]


def test_only_the_sampled_frames_are_decoded(goldens, monkeypatch):
    import decord

    asked = []
    real = decord.VideoReader.get_batch
    monkeypatch.setattr(decord.VideoReader, "get_batch",
                        lambda self, numbers: asked.append(numbers) or real(self, numbers))
    read_frames(goldens / "video_long.mp4", limit=3)
    assert asked == [sample_frames(300, 5.0, 3)]


def test_frames_stand_below_their_captions():
    board = frames_to_board([Image.new("RGB", (1120, 560), (255, 0, 0)), Image.new("RGB", (1120, 560), (0, 0, 255))])
    assert board.size == (1120, 2 * (560 + 50))
    assert board.getpixel((5, 40 + 100)) == (255, 0, 0)
    assert board.getpixel((5, 610 + 40 + 100)) == (0, 0, 255)
    assert board.getpixel((5, 605)) == (0, 0, 0)
    caption = board.crop((0, 0, 1120, 40)).convert("L")
    assert caption.getextrema()[0] < 128


def test_boards_are_padded_to_whole_tiles():
    fitted = fit_board(Image.new("RGB", (100, 330), (0, 0, 0)), 56)
    assert fitted.size == (56, 224)
    assert fitted.getpixel((0, 183)) == (0, 0, 0)
    assert fitted.getpixel((0, 185)) == (255, 255, 255)


def test_processor_gives_tiles(goldens):
    tiles, grid = IXC25VideoProcessor(image_size=56).preprocess(goldens / "video_land.mp4")
    assert grid == (4, 1)
    assert tiles.shape == (5, 3, 56, 56)


def test_bad_files_are_named(tmp_path, goldens):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes((goldens / "video_land.mp4").read_bytes()[:3000])
    (tmp_path / "text.mp4").write_text("no video")
    for name, words in (("gone.mp4", "does not exist"), ("empty.mp4", "0 bytes"), ("cut.mp4", "cannot be decoded"),
                        ("text.mp4", "cannot be decoded")):
        with pytest.raises(VideoError, match=words) as error:
            read_frames(tmp_path / name)
        assert name in str(error.value)
