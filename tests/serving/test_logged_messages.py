"""What of a request's messages stands in the log, where its contents are asked for."""
from __future__ import annotations

import json

from mindformers_ixc.serving.app import without_pictures

PICTURE = "iVBORw0KGgo" * 1000


def test_pictures_are_cut_also_in_forms_that_are_refused():
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}},
             {"type": "image", "source": {"type": "base64", "data": PICTURE}}, {"type": "image", "image": [PICTURE]},
             {"type": "input_image", "image_url": PICTURE}, PICTURE, {PICTURE: "x"}]
    shown = json.dumps(without_pictures({"role": "user", "content": parts, "images": [PICTURE]}))
    assert PICTURE[:45] not in shown and shown.count("iVBORw0KGgo") > 3


def test_words_are_whole():
    message = {"role": "user", "content": [{"type": "text", "text": "word " * 100}]}
    assert without_pictures(message) == message
    assert without_pictures({"role": "user", "content": "word " * 100}) == {"role": "user", "content": "word " * 100}
