"""Losses by source against sums in numpy, and reports that grow over micro batches until they are read."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor, nn

from mindformers_ixc.checkpoint.sources import is_state
from mindformers_ixc.models.layers import Linear
from mindformers_ixc.models.placement import mark_backward_end
from mindformers_ixc.models.report import REPORT_NAME, SourceSums, keep_report, take_report


@pytest.mark.parametrize("sources", [1, 3])
def test_sums_by_source_are_of_positions_not_of_rows(sources):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 50, (4, 9)).astype(np.int32)
    labels[rng.random((4, 9)) < 0.4] = -100
    losses = np.where(labels == -100, 0, rng.random((4, 9))).astype(np.float32)
    source = rng.integers(0, sources, (4, 9)).astype(np.int32)            # a packed row has several
    found = SourceSums(SimpleNamespace(num_sources=sources))(*map(Tensor, (losses, labels, source))).asnumpy()
    expected = [[losses[source == number].sum() for number in range(sources)],
                [(labels[source == number] != -100).sum() for number in range(sources)]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


class Reporting(nn.Cell):
    def __init__(self):
        super().__init__()
        keep_report(self, 2)

    def construct(self, loss, report):
        return self.kept_report(loss, report)


def test_a_kept_report_is_the_sum_of_those_since_it_was_taken():
    cell = Reporting()
    assert [parameter.name for parameter in cell.get_parameters()] == [REPORT_NAME]
    assert not cell.trainable_params() and is_state(REPORT_NAME)
    assert not cell.train_report.parallel_optimizer       # optimizer sharding would cut it
    for step in range(2):
        for part in ([1, 2], [10, 20]):
            assert cell(Tensor(3.5), Tensor(np.array(part, np.float32) + step)).asnumpy() == 3.5
        np.testing.assert_array_equal(take_report(cell.train_report), [11 + 2 * step, 22 + 2 * step])
    np.testing.assert_array_equal(cell.train_report.asnumpy(), [0, 0])


class Frozen(nn.Cell):
    """The names of the parts that matter: a tower, a layer and a head."""

    def __init__(self, tower: bool, layer: bool):
        super().__init__()
        self.vit, self.layer, self.output = (Linear(2, 2) for _ in range(3))
        self.vit.weight.requires_grad, self.layer.weight.requires_grad = tower, layer
        self.output.weight.requires_grad = False

    @property
    def head(self):
        """The last linear, as `IXC25Model` names it."""
        return self.output


@pytest.mark.parametrize(("tower", "layer", "marked"), [(True, True, None), (False, True, "layer"),
                                                        (False, False, "output")])
def test_the_end_of_a_backward_pass_is_marked_where_the_tower_is_frozen(tower, layer, marked):
    model = Frozen(tower, layer)
    mark_backward_end(model)
    found = [name for name in ("vit", "layer", "output")
             if "first_parameter_cnode" in getattr(model, name).matmul.attrs]
    assert found == ([marked] if marked else [])
