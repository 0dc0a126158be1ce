"""The result format and the page that is made from it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from benchmarks import __main__ as page_module
from benchmarks.common import RESULTS, Headline, interleaved, write_result

KEYS = {"question", "command", "date", "hardware", "versions", "headline", "samples"}


def test_arms_take_turns_and_every_second_round_goes_backwards():
    order: list[str] = []
    ticks = iter(range(1000))
    seconds = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        repeats=3,
        clock=lambda: float(next(ticks)),
    )
    assert "".join(order) == "ab" + "abbaab"
    assert seconds == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_page_quotes_figures_and_says_unknown(tmp_path: Path):
    rows = [Headline("speed", 12345.6, "GB/s", 12000.0, 13000.0, target=">= 1"), Headline("power", None, "W")]
    path = write_result("demo", question="How fast?", headline=rows, samples={"a": [1.0]}, folder=tmp_path)
    assert json.loads(path.read_text()).keys() >= KEYS
    text = page_module.page(tmp_path)
    assert "| speed | 12,346 GB/s | 12,000 to 13,000 | >= 1 |" in text
    assert "| power | unknown |" in text


def test_a_result_without_a_value_is_null_and_nan_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_result("x", question="", headline=[], samples={"a": [math.nan]}, folder=tmp_path)
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_say_how_they_were_made(path: Path):
    result = json.loads(path.read_text())
    assert result.keys() >= KEYS
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
    assert result["headline"], "a result without a figure answers no question"
    for row in result["headline"]:
        assert row.keys() == Headline.__dataclass_fields__.keys()


def test_results_page_is_up_to_date():
    assert (RESULTS.parent / "RESULTS.md").read_text() == page_module.page()
