"""Dropout in hash encodings, on an encoding small enough to write down."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nerfstudio_phdropout import PHDropoutConfig, drop_uniforms
from nerfstudio_phdropout.encodings import encoding_dropout, hash_encodings


class Table(nn.Module):
    """Looks rows up: the layout of nerfstudio's torch hash encoding."""

    def __init__(self, entries: int = 200, features: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hash_table = nn.Parameter(torch.randn(entries, features))

    def get_out_dim(self) -> int:
        return self.hash_table.shape[1]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.hash_table[rows]


@pytest.fixture
def field() -> nn.Module:
    return nn.ModuleDict({"proposal": Table(50), "base": Table()})


ROWS = torch.arange(200)


@pytest.mark.parametrize("part", ["table", "features"])
def test_ph05_zero_ratio_and_the_end_of_the_block_leave_the_encoding_as_it_was(field, part):
    table = field["base"].hash_table
    before, storage = table.detach().clone(), table.data_ptr()
    with encoding_dropout(field, 0.0, part=part) as names:
        assert names == ["proposal", "base"]
        assert torch.equal(field["base"](ROWS), before)
    with encoding_dropout(field, 0.5, part=part):
        assert not torch.equal(field["base"](ROWS), before)
    with pytest.raises(KeyError), encoding_dropout(field, 0.5, part=part):
        raise KeyError
    assert field["base"].hash_table is table
    assert table.data_ptr() == storage
    assert torch.equal(field["base"](ROWS), before)


def test_ph06_entries_are_dropped_whole_by_their_counter_and_nested(field):
    whole = field["base"].hash_table.detach().clone()
    with encoding_dropout(field, 0.3, seed=5, trial=2, select=lambda name: name == "base") as names:
        assert names == ["base"]
        masked = field["base"](ROWS)
        assert torch.equal(field["proposal"](ROWS[:50]), field["proposal"].hash_table)
    kept = drop_uniforms(200, seed=5, trial=2, stream=1 << 20) >= 0.3
    assert torch.equal(masked[~kept], torch.zeros_like(masked[~kept]))
    torch.testing.assert_close(masked[kept], whole[kept] / 0.7)
    with encoding_dropout(field, 0.6, seed=5, trial=2, select=lambda name: name == "base", rescale=False):
        more = field["base"](ROWS)
    assert bool((more[~kept] == 0).all())
    torch.testing.assert_close(more[more.any(-1)], whole[more.any(-1)])


def test_ph05_features_are_dropped_for_every_row(field):
    with encoding_dropout(field, 0.5, seed=3, part="features"):
        factors = field["base"](ROWS) / field["base"].hash_table
    torch.testing.assert_close(factors, factors[:1].expand_as(factors))
    assert set(factors[0].round(decimals=4).tolist()) <= {0.0, 2.0}


@torch.no_grad()
def test_ph05_the_expected_output_is_the_plain_one(field):
    plain = field["base"](ROWS)
    total = torch.zeros_like(plain)
    for trial in range(400):
        with encoding_dropout(field, 0.2, trial=trial):
            total += field["base"](ROWS)
    error = (total / 400 - plain) / plain
    # Relative spread of a rescaled Bernoulli mean: (p / (1 - p) / T)^1/2 = 0.025.
    assert float(error.abs().max()) < 5 * 0.025
    assert abs(float(error.mean())) < 5 * 0.025 / 200**0.5


def test_ph12_models_without_a_table_and_bad_values_are_refused(field):
    with pytest.raises(ValueError, match="no hash encoding in Linear; use layers='hidden'"):
        hash_encodings(nn.Linear(2, 2))
    with (
        pytest.raises(ValueError, match="no hash encoding in ModuleDict"),
        encoding_dropout(field, 0.1, select=lambda _name: False),
    ):
        pass
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), got 1.0"), encoding_dropout(field, 1.0):
        pass
    with (
        pytest.raises(ValueError, match="part must be 'table' or 'features', got 'rows'"),
        encoding_dropout(field, 0.1, part="rows"),
    ):
        pass
    with pytest.raises(ValueError, match="layers='table' has one mask a trial"):
        PHDropoutConfig(layers="table", mask="sample")
