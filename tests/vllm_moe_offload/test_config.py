from __future__ import annotations

import pytest

from vllm_moe_offload import MoEOffloadConfig

BAD = [
    (
        {"slots_per_layer": 1, "polcy": "lru"},
        r"^moe_offload: unknown option 'polcy'; did you mean 'policy'\?$",
    ),
    ({}, "^moe_offload: give exactly one of cache_size, cache_fraction, slots_per_layer$"),
    ({"cache_size": 1, "cache_fraction": 0.5}, "give exactly one of"),
    (
        {"slots_per_layer": 1, "policy": "x"},
        "^moe_offload: policy must be one of eam, eam_reference, least_stale, lfu, lru; got 'x'$",
    ),
    ({"cache_fraction": 0}, r"cache_fraction must be a number in \(0, 1\]; got 0"),
    ({"cache_fraction": True}, "cache_fraction"),
    ({"cache_size": "8 bananas"}, "cache_size must be bytes or text such as"),
    ({"cache_size": "0"}, "cache_size must be positive"),
    ({"slots_per_layer": 2.5}, "slots_per_layer must be a whole number"),
    ({"slots_per_layer": 2, "prefetch_budget": 2}, r"prefetch_budget must be a number in \[0, 1\]"),
    ({"slots_per_layer": 2, "debug_checks": "yes"}, "debug_checks must be true or false"),
    ({"slots_per_layer": 2, "eam_temperature": -1}, "eam_temperature must be 0 or more"),
    ({"slots_per_layer": 2, "host_memory": "1GiB"}, "host_memory needs disk_path"),
    ({"slots_per_layer": 2, "disk_path": "experts"}, "disk_path needs host_memory"),
    (
        {"slots_per_layer": 2, "disk_path": "experts", "host_memory": "1GiB", "miss": "direct"},
        "miss='direct' needs all experts in host memory",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        MoEOffloadConfig.from_dict(options)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("500 MB", 500_000_000), ("1.5kib", 1536), (4096, 4096), ("7", 7), ("2g", 2 * 10**9)],
)
def test_sizes(text, size):
    assert MoEOffloadConfig.from_dict({"cache_size": text}).cache_size == size


def test_number_of_slots():
    slots = {
        "cache_size": ({"cache_size": 1000}, 10),
        "fraction": ({"cache_fraction": 0.1}, 3),  # 0.1 * 30 is 3.0000000000000004
        "per layer": ({"slots_per_layer": 4}, 12),
        "capped": ({"cache_size": "1GiB"}, 30),
    }
    for options, expected in slots.values():
        assert MoEOffloadConfig.from_dict(options).num_slots(3, 10, 2, 100) == expected


def test_too_few_slots():
    message = r"^moe_offload: 3 slots are fewer than top_k=4; at least 4 slots \(0\.04 GiB\) are needed$"
    with pytest.raises(ValueError, match=message):
        MoEOffloadConfig(cache_size=3 * 10_737_419).num_slots(6, 32, 4, 10_737_418)
