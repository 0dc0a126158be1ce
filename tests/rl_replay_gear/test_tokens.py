"""Token streams: discretisers against their definitions, ragged packing against a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rl_replay_gear import Discretizer, TokenStream, tokenize
from rl_replay_gear.tokens import merge_streams


def test_uniform_bins_cover_the_range_and_decode_to_centres():
    made = Discretizer.uniform(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 10.0]), 4)
    values = torch.tensor([[-9.0, 0.0], [-0.5, 2.4], [-0.51, 2.5], [0.99, 99.0]])
    assert made.encode(values).tolist() == [[0, 0], [1, 0], [0, 1], [3, 3]]
    assert made.decode(torch.tensor([[0, 0], [3, 3]])).tolist() == [[-0.75, 1.25], [0.75, 8.75]]
    with pytest.raises(ValueError, match="exceed"):
        Discretizer.uniform(torch.zeros(1), torch.zeros(1), 4)
    with pytest.raises(ValueError, match="2 values in the last dimension, got 3"):
        made.encode(torch.zeros(1, 3))


def test_quantile_bins_hold_equal_mass():
    samples = torch.randn(8000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
    made = Discretizer.quantile(samples, 16)
    tokens = made.encode(samples)
    for column in range(2):
        counts = torch.bincount(tokens[:, column], minlength=16)
        assert int(counts.min()) >= 498
        assert int(counts.max()) <= 502
        for token in (0, 7, 15):
            mean = samples[tokens[:, column] == token, column].mean()
            assert float(made.decode(torch.full((1, 2), token))[0, column]) == pytest.approx(float(mean))


def test_mu_law_equals_gatos_formula():
    made = Discretizer.mu_law(1)
    x = np.array([-300.0, -1.0, -0.01, 0.0, 0.01, 1.0, 100.0])
    squashed = np.sign(x) * np.log(np.abs(x) * 100 + 1) / np.log(256 * 100 + 1)
    expected = np.clip(np.floor((squashed + 1) / 2 * 1024), 0, 1023)
    assert made.encode(torch.from_numpy(x)[:, None])[:, 0].tolist() == expected.tolist()
    back = made.decode(made.encode(torch.tensor([[2.0]])))
    assert float(back) == pytest.approx(2.0, rel=0.02)


def test_ragged_tokens_equal_a_loop_over_steps(filled):
    from rl_replay_gear import Uniform, Window

    batch = filled.collect(filled.select(Uniform(), 9), Window(5, -2, "head"))
    states = Discretizer.uniform(torch.full((3,), -3.0), torch.full((3,), 3.0), 50)
    streams = [TokenStream("obs", states), TokenStream("action", None, offset=50, loss=True)]
    found = tokenize(batch, batch.mask["obs"], streams)
    position = 0
    for i in range(9):
        assert int(found["cu_seqlens"][i]) == position
        for j in range(5):
            if batch.mask["obs"][i, j]:
                expected = [*states.encode(batch["obs"][i, j]).tolist(), 50 + int(batch["action"][i, j])]
                assert found["tokens"][position : position + 4].tolist() == expected
                assert found["loss_mask"][position : position + 4].tolist() == [False, False, False, True]
                position += 4
    assert len(found["tokens"]) == position
    start = int(found["cu_seqlens"][3])
    assert found["position"][start : start + 4].tolist() == [0, 1, 2, 3]


def test_tasks_with_different_columns_merge_into_one_stream():
    one = tokenize({"a": torch.tensor([[1, 2], [3, 0]])}, torch.tensor([[True, True], [True, False]]),
                   [TokenStream("a", None)])  # fmt: skip
    two = tokenize(
        {"b": torch.tensor([[[7, 8]]])}, torch.tensor([[True]]), [TokenStream("b", None, offset=100)]
    )
    merged = merge_streams([one, two])
    assert merged["tokens"].tolist() == [1, 2, 3, 107, 108]
    assert merged["cu_seqlens"].tolist() == [0, 2, 3, 5]
    assert merged["position"].tolist() == [0, 1, 0, 0, 1]
