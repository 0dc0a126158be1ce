"""Options of the plugin: what stands under ``additional_config["moe_offload"]``."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIB = 1 << 30
POLICIES = ("eam", "eam_reference", "least_stale", "lfu", "lru")
PREFETCHERS = ("none", "eam", "gate", "eam+gate")
_SIZES = ("cache_size", "cache_fraction", "slots_per_layer")
_CHOICES = {
    "policy": POLICIES,
    "prefetch": PREFETCHERS,
    "miss": ("auto", "copy", "direct"),
}
_UNITS = {
    "": 1,
    **{prefix: 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{prefix + "i": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}


def parse_size(name: str, value: object) -> int:
    """Bytes of a size given as a number or as text such as ``"8GiB"`` or ``"500 MB"``.

    Raises:
        ValueError: ``value`` is not a positive size; the message names the option.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?b?)\s*", str(value).lower())
    if isinstance(value, bool) or match is None or match[2].removesuffix("b") not in _UNITS:
        raise ValueError(f'moe_offload: {name} must be bytes or text such as "8GiB", "500MB"; got {value!r}')
    size = int(float(match[1]) * _UNITS[match[2].removesuffix("b")])
    if size < 1:
        raise ValueError(f"moe_offload: {name} must be positive; got {value!r}")
    return size


@dataclass(frozen=True)
class MoEOffloadConfig:
    """Validated options. Exactly one of the first three sizes the pool of expert slots.

    Attributes:
        cache_size: bytes of device memory for expert slots.
        cache_fraction: share of all experts that has a slot, in (0, 1].
        slots_per_layer: slots for each MoE layer. All three only size the pool; eviction is global.
        policy: eviction policy.
        prefetch: predictor whose choices are fetched ahead: ``eam`` between steps, by what requests did so
            far; ``gate`` within a step, by the next layer's gate on the running layer's hidden states.
        prefetch_budget: at most this share of the slots may hold prefetched experts not used yet.
        miss: how a missing expert is served. ``direct``: by the device, which copies it into a slot that the
            host gave up, or reads it from host memory in place; no step waits for the host. ``copy``: by
            the host, layer for layer. ``auto``: ``direct`` on a GPU, else ``copy``.
        host_memory: bytes of host memory for experts; what exceeds it lives in ``disk_path``.
        disk_path: file of experts on disk.
        eam_capacity: requests kept in the collection of expert activation matrices.
        eam_temperature: softmax temperature over distances (0: the nearest entry alone).
        eam_path: collection loaded at start and saved at exit.
        record_trace: keep the routing of every step for ``collect_trace``.
        debug_checks: fill freed slots with NaN and verify checksums on every copy.
    """

    cache_size: int | None = None
    cache_fraction: float | None = None
    slots_per_layer: int | None = None
    policy: str = "eam"
    prefetch: str = "none"
    prefetch_budget: float = 0.25
    miss: str = "auto"
    host_memory: int | None = None
    disk_path: str | None = None
    eam_capacity: int = 1000
    eam_temperature: float = 0.05
    eam_path: str | None = None
    record_trace: bool = False
    debug_checks: bool = False

    def __post_init__(self) -> None:
        if sum(getattr(self, name) is not None for name in _SIZES) != 1:
            raise ValueError(f"moe_offload: give exactly one of {', '.join(_SIZES)}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"moe_offload: {name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}"
                )
        for name, low, high in (("cache_fraction", 0.0, 1.0), ("prefetch_budget", -1e-9, 1.0)):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and low < value <= high):
                interval = "(0, 1]" if low == 0.0 else "[0, 1]"
                raise ValueError(f"moe_offload: {name} must be a number in {interval}; got {value!r}")
        for name in ("slots_per_layer", "eam_capacity"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= 1):
                raise ValueError(f"moe_offload: {name} must be a whole number of at least 1; got {value!r}")
        if not (_is_number(self.eam_temperature) and 0 <= self.eam_temperature < math.inf):
            raise ValueError(f"moe_offload: eam_temperature must be 0 or more; got {self.eam_temperature!r}")
        for name in ("record_trace", "debug_checks"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"moe_offload: {name} must be true or false; got {getattr(self, name)!r}")
        for name in ("disk_path", "eam_path"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise ValueError(f"moe_offload: {name} must be a path; got {getattr(self, name)!r}")
        if self.host_memory is not None and self.disk_path is None:
            raise ValueError("moe_offload: host_memory needs disk_path, where the other experts live")
        if self.disk_path is not None and self.host_memory is None:
            raise ValueError("moe_offload: disk_path needs host_memory, the bytes of experts kept in memory")
        if self.disk_path is not None and self.miss == "direct":
            raise ValueError("moe_offload: miss='direct' needs all experts in host memory, not in disk_path")

    @classmethod
    def from_dict(cls, options: Mapping[str, object]) -> MoEOffloadConfig:
        """Validate the options of ``additional_config["moe_offload"]``.

        Raises:
            ValueError: an unknown option (with the nearest known one), or a bad value.
        """
        if not isinstance(options, Mapping):
            raise ValueError(f"moe_offload: options must be an object of key: value; got {options!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                raise ValueError(f"moe_offload: unknown option {name!r}; {hint}")
        values: dict[str, Any] = dict(options)
        for name in ("cache_size", "host_memory"):
            if values.get(name) is not None:
                values[name] = parse_size(name, values[name])
        return cls(**values)

    def num_slots(self, num_layers: int, num_experts: int, top_k: int, expert_nbytes: int) -> int:
        """Slots of the pool for ``num_layers`` layers of ``num_experts`` experts of ``expert_nbytes`` bytes.

        Capped at all experts; nothing is ever moved then.

        Raises:
            ValueError: fewer slots than the ``top_k`` experts of one token.
        """
        total = num_layers * num_experts
        if self.cache_size is not None:
            slots = self.cache_size // expert_nbytes
        elif self.cache_fraction is not None:
            # Exact for fractions such as 0.1 of 30, which is 3.0000000000000004 in floating point.
            slots = int(round(self.cache_fraction * total, 6))
        else:
            assert self.slots_per_layer is not None
            slots = self.slots_per_layer * num_layers
        if slots < top_k:
            raise ValueError(
                f"moe_offload: {slots} slots are fewer than top_k={top_k}; at least {top_k} slots "
                f"({top_k * expert_nbytes / GIB:.2f} GiB) are needed"
            )
        return min(slots, total)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
