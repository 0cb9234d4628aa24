"""What MindSpore's compiler arrives at is what the table of cuts says, and its strategy files are written alike."""
from __future__ import annotations

import pytest

from mindformers_ixc.checkpoint.protobuf import decode_fields
from mindformers_ixc.checkpoint.strategy_file import CURRENT_STAGE
from mindformers_ixc.config import read_config
from mindformers_ixc.planning.check_layout import check_layout


@pytest.mark.slow
def test_a_compiled_layout_is_the_tables(goldens, tmp_path):
    strategy = check_layout(read_config(goldens / "t1"), 2, 2, "all", tmp_path)
    assert strategy.stages["model.tok_embeddings.weight"] == [0] and strategy.stages["output.weight"] == [1]
    for stage in range(2):
        fields = dict(decode_fields((tmp_path / f"stage_rank_{stage}.ckpt").read_bytes()))
        assert fields[1] == CURRENT_STAGE
