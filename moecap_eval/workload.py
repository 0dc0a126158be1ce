"""The contract between the harness and whatever it measures.

A plugin registers one ``Workload`` under the entry point group ``moecap.workloads``. The harness asks it
for items, opens one ``System`` per arm in a process of its own, and calls ``System.run`` on blocks of
items. Nothing here knows a framework.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from moecap_eval.hardware import HardwareProfile

ENTRY_POINT_GROUP = "moecap.workloads"


@dataclass(frozen=True)
class Axis:
    """One quantity on which arms are compared.

    ``margin`` is the half-width of the equivalence zone: relative for cost and performance, in score
    units for accuracy. ``headline`` axes are drawn on the radar and share one Holm correction.
    """

    name: str
    kind: Literal["cost", "accuracy", "performance"]
    unit: str
    better: Literal["lower", "higher"]
    level: Literal["item", "block"] = "block"
    margin: float = 0.03
    headline: bool = False


@dataclass(frozen=True)
class Item:
    """One input. Every arm receives the same ids in the same order."""

    id: str
    payload: Any


@dataclass
class Sample:
    """What an arm made of one item. ``digest`` identifies the output; None where outputs have no identity."""

    item_id: str
    values: dict[str, float | None]
    digest: str | None = None
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepRecord:
    """One forward pass of a language model, as the accounting of ``moecap_eval.accounting`` needs it.

    Rows of padding are in no count except ``experts_loaded``. ``kv_tokens_read`` sums, over the pass's
    requests, the cached positions attended, this pass's own included; ``attended_positions`` counts
    (query, key) pairs under the causal mask, so a prefill of T tokens has T(T+1)/2. ``windowed`` holds both
    for layers with a sliding window, by its length and clipped request by request.

    With speculative decoding ``tokens`` and ``sampled_tokens`` hold the drafts that the pass checks;
    ``accepted_tokens`` are the sampled ones that stand (accepted drafts and one per request), None without
    speculation or where the engine does not tell; ``draft_bytes`` were read to propose the next drafts.
    """

    duration_s: float
    tokens: int
    requests: int
    sampled_tokens: int
    distinct_tokens: int
    kv_tokens_read: int
    attended_positions: int
    experts_touched: Mapping[int, int]
    experts_loaded: Mapping[int, int] | None = None
    moved_bytes: Mapping[str, int] = field(default_factory=dict)
    invalid: str | None = None
    accepted_tokens: int | None = None
    draft_bytes: int = 0
    windowed: Mapping[int, tuple[int, int]] = field(default_factory=dict)


@dataclass
class BlockResult:
    """What ``System.run`` returns for a block: ``work`` in the workload's unit, block-level axis values.

    A value that could not be measured is None, never 0.0; ``reasons`` then says why, by axis name. ``finish``
    is called on the result when the block's time and energy have been taken: for what is no part of the work,
    such as scoring that needs the engine again.
    """

    work: float
    values: dict[str, float | None] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    finish: Callable[[BlockResult], None] | None = None


@dataclass(frozen=True)
class ArmConfig:
    """One configuration under comparison. ``options`` belong to the workload."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunContext:
    """What the harness tells a workload when it opens an arm.

    ``seed`` is the config's ``params.seed`` (default 0); ``params`` are the other params, their relative
    paths resolved against the config file.
    """

    seed: int
    out_dir: Path
    hardware: HardwareProfile
    params: Mapping[str, Any]


class System(ABC):
    """One configured system, alive for the whole run."""

    @abstractmethod
    def run(self, items: Sequence[Item]) -> BlockResult:
        """Process the items. The harness times this call."""

    def warm_up(self, items: Sequence[Item]) -> None:
        """Reach steady state; results are dropped."""
        self.run(items)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes in use by tier (``hbm``, ``dram``, ``disk``)."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Facts of the opened system for the records, JSON only.

        A language model gives ``model_config`` (the Hugging Face config as a mapping) and, where they differ
        from it, ``weight_dtype`` and ``kv_dtype``: from these and the StepRecords the report computes bytes,
        FLOPs and utilisation. Other keys are shown as they are.
        """
        return {}

    def clock(self) -> float:
        """Seconds on the clock by which the harness times ``run``.

        A simulation has its own; a system that reads counters within ``run`` lets its clock stand still.
        """
        return time.perf_counter()

    def close(self) -> None:  # noqa: B027 - optional, most systems hold nothing
        """Release what ``Workload.open`` acquired."""


class Workload(ABC):
    """A measurable job: its axes, its items, and how to open one arm of it.

    An unknown option in ``arm.options`` or ``context.params`` is a ValueError from ``open`` or ``items``
    before anything is loaded.
    """

    name: ClassVar[str]
    work_unit: ClassVar[str]
    axes: ClassVar[tuple[Axis, ...]]

    @abstractmethod
    def items(self, params: Mapping[str, Any], seed: int) -> Sequence[Item]:
        """The items of a run; the same params and seed give the same items. Imports no framework."""

    def axes_for(self, params: Mapping[str, Any]) -> tuple[Axis, ...]:
        """The axes of a run with these params; all of ``axes`` by default."""
        return self.axes

    @abstractmethod
    def open(self, arm: ArmConfig, context: RunContext) -> System:
        """Load and configure one arm. Called in the arm's own process."""
