"""What the processor of a run's data does with pictures."""
from __future__ import annotations

from types import SimpleNamespace

import pytest

from mindformers_ixc.data.rows import make_processor
from mindformers_ixc.demo import demo_path
from mindformers_ixc.processing.tokenizer import Tokenizer


@pytest.mark.parametrize(("hd_num", "found"), [(4, (4, 4, 4)), (18, (18, 6, 18)), (None, (24, 6, 18))])
def test_questions_while_a_run_trains_take_as_many_tiles_as_those_to_its_model_directory(hd_num, found):
    options = SimpleNamespace(hd_num=hd_num, image_size=112, patch_size=14, image_transform=None, transparency=None,
                              exif=None, control_tokens=False)
    images = make_processor(options, Tokenizer(str(demo_path("tokenizer.model")))).image_processor
    assert (images.hd_num_for(1), images.hd_num_for(3), images.hd_num_training) == found
