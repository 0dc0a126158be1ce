"""How well a layer's gate names its experts ahead of its turn, on the trained model of examples/tiny_moe."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.common import RESULTS
from benchmarks.vllm_moe_offload_lookahead import history_guesses, measure, recall, requests

pytestmark = pytest.mark.slow


def test_mo21_recall_of_the_gate_beside_the_eam_predictor():
    rows = {(row["predictor"], row["named"]): row["recall"] for row in measure(1)}
    for named in ("k", "2k"):
        ahead = [rows[f"gate, {distance} ahead", named] for distance in (1, 2, 3)]
        assert ahead == sorted(ahead, reverse=True)  # the farther, the worse
        assert ahead[0] > 2 * rows["EAM", named]
    published = json.loads((RESULTS / "vllm_moe_offload_lookahead.json").read_text())["rows"]
    for row in published:
        if row["predictor"].startswith("gate"):  # from five items of each task; history grows with them
            assert abs(rows[row["predictor"], row["named"]] - row["recall"]) < 0.05


def test_mo21_recall_counts_choices_found_among_the_first_guesses():
    chosen = np.asarray([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
    guess = np.asarray([[[2, 9, 1, 0], [-1, -1, -1, -1]], [[6, 5, 1, 2], [1, 2, 8, 7]]])
    assert recall(chosen, guess, 2) == (3, 6)
    assert recall(chosen, guess, 4) == (6, 6)


def test_mo21_what_history_names_knows_nothing_of_the_token_itself():
    found, experts = requests(1)
    changed = [type(request)(request.task, request.chosen.copy(), {}) for request in found]
    changed[-1].chosen[-1] = (changed[-1].chosen[-1] + 1) % experts
    before, after = (list(history_guesses(some, experts))[-1] for some in (found, changed))
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
        assert (one[0] == -1).all()
