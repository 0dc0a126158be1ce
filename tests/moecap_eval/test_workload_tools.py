"""What workloads share: options that are checked, items that are seeds, a stopwatch; and the size it buys."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from moecap_eval.workload_tools import ConfiguredSystem, Stopwatch, read_options, seeded_items

PLUGINS = Path(__file__).parents[2] / "plugins"
KNOWN = {"mode": ("cpu", "gpu"), "share": 0.2, "count": 4, "cached": True, "fanouts": [10, 5]}


def test_defaults_are_completed_and_choices_begin_with_theirs() -> None:
    assert read_options({}, KNOWN, "params") == {**KNOWN, "mode": "cpu"}
    given = {"mode": "gpu", "share": 1, "count": 2, "cached": False, "fanouts": [1]}
    assert read_options(given, KNOWN, "params") == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shares": 1}, r"arms\.a: unknown option 'shares' .*did you mean 'share'\?"),
        ({"xyz": 1}, r"unknown option 'xyz' \(options: mode, share, count, cached, fanouts\)$"),
        ({"mode": "tpu"}, r"arms\.a: mode must be one of cpu, gpu, got 'tpu'"),
        ({"count": 2.5}, r"arms\.a: count must be of type int, such as 4, got 2\.5"),
        ({"count": True}, r"count must be of type int"),
        ({"share": "half"}, r"share must be of type float"),
        ({"cached": 1}, r"cached must be of type bool"),
        ({"fanouts": 10}, r"fanouts must be of type list"),
    ],
)
def test_bad_options_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options(given, KNOWN, "arms.a")


def test_items_are_seeds_that_no_other_run_has() -> None:
    assert [(item.id, item.payload) for item in seeded_items("fit", 2, 3)] == [
        ("fit-3-0", 3000),
        ("fit-3-1", 3001),
    ]


def test_a_stopwatch_adds_up_its_laps_alone() -> None:
    watch, begin = Stopwatch(), time.perf_counter()
    for _ in range(3):
        with watch:
            time.sleep(0.002)
    outside = time.perf_counter() - begin
    assert len(watch.laps) == 3
    assert 0.006 <= sum(watch.laps) == watch.seconds <= outside
    assert watch.peak_bytes is None


def test_a_configured_system_tells_its_options() -> None:
    class Nothing(ConfiguredSystem):
        def run(self, items):
            raise NotImplementedError

    assert Nothing({"a": 1}, {"b": 2}, seed=7).describe() == {"a": 1, "b": 2}


def test_cap17_the_contract_is_small() -> None:
    """A plugin's file, its imports, docstrings and metrics included, stays under 150 lines."""
    sizes = {
        path.parent.name: len(path.read_text().splitlines()) for path in PLUGINS.glob("*/moecap_workloads.py")
    }
    assert len(sizes) == 7
    assert max(sizes.values()) < 150, sizes
