"""The video rule: reference outputs, closed formulae, the board's geometry, what is asked of the decoder, bad files."""
from __future__ import annotations

import math
import struct
import warnings

import numpy as np
import parity_video
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from PIL import Image

from mindformers_ixc.processing import video
from mindformers_ixc.processing.image import image_to_tiles
from mindformers_ixc.processing.video import (
    IXC25VideoProcessor,
    VideoError,
    fit_board,
    frames_to_board,
    load_video,
    read_frames,
    sample_frames,
)

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
        assert frames == [stride * int(i * seconds / (limit + 1)) for i in range(limit)]
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

@pytest.fixture
def asked(monkeypatch):
    """Frame numbers the decoder is asked for."""
    import decord

    numbers, real = [], decord.VideoReader.__getitem__
    monkeypatch.setattr(decord.VideoReader, "__getitem__",
                        lambda self, number: numbers.append(number) or real(self, number))
    for other in ("next", "get_batch"):
        monkeypatch.setattr(decord.VideoReader, other, lambda *_, other=other: numbers.append(other))
    monkeypatch.setattr(decord.VideoReader, "next", lambda self, real=decord.VideoReader.next: real(self))
    return numbers


def test_only_the_sampled_frames_are_decoded(goldens, monkeypatch):
    import decord

    numbers, real = [], decord.VideoReader.__getitem__

    def counted(self, number):
        numbers.append(number)
        return real(self, number)

    monkeypatch.setattr(decord.VideoReader, "__getitem__", counted)
    monkeypatch.delattr(decord.VideoReader, "get_batch")
    assert len(read_frames(goldens / "video_long.mp4", limit=3)) == 3
    assert numbers == sample_frames(300, 5.0, 3)
