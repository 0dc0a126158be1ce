"""The plugin's workload for ``moecap``: text generation with a part of the experts resident.

Arms: ``{}`` is plain vLLM, ``{residency: 0.5}`` keeps half of the experts in slots, ``{policy: lru}`` and
``{prefetch: none}`` choose how, and ``{engine: {...}}`` passes any argument of ``vllm.LLM``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from moecap_eval import ArmConfig, Axis, BlockResult, HardwareProfile, Item
from moecap_eval.workloads.text_generation import TextGeneration, TextParams, TextSystem

_OPTION_OF = {"residency": "cache_fraction", "policy": "policy", "prefetch": "prefetch"}


class GenerateWorkload(TextGeneration):
    """Greedy answers of a mixture-of-experts model whose experts partly live in host memory."""

    name: ClassVar[str] = "moe_offload.generate"
    axes: ClassVar[tuple[Axis, ...]] = (
        *TextGeneration.axes,
        Axis("expert_memory_bytes", "cost", "B", "lower", headline=True),
        Axis("hit_rate", "performance", "share of expert requests", "higher", margin=0.05),
        Axis("moved_bytes_per_s", "performance", "B/s", "lower", margin=0.05),
    )
    arm_options: ClassVar[tuple[str, ...]] = (*_OPTION_OF, "engine")
    moved_bytes: ClassVar[str | None] = "vllm_moe_offload:moved_bytes"

    def engine_arguments(self, arm: ArmConfig) -> dict[str, Any]:
        """The engine's own arguments, with the plugin's options where the arm has any."""
        arguments = super().engine_arguments(arm)
        options = offload_options(arm)
        if options:
            additional = dict(arguments.get("additional_config") or {})
            arguments["additional_config"] = {**additional, "moe_offload": options}
        return arguments

    def system(self, llm: Any, params: TextParams, hardware: HardwareProfile, arm: ArmConfig) -> TextSystem:
        """A system that also reads the plugin's counters, where the plugin is on."""
        config = llm.llm_engine.vllm_config.additional_config
        is_offloaded = isinstance(config, Mapping) and "moe_offload" in config
        return OffloadSystem(llm, params, hardware) if is_offloaded else PlainSystem(llm, params, hardware)


def offload_options(arm: ArmConfig) -> dict[str, Any]:
    """The plugin's options of an arm, checked by the plugin itself; empty for a plain arm.

    Raises:
        ValueError: a residency outside (0, 1], an unknown policy, or a policy without a residency.
    """
    options = {key: arm.options[name] for name, key in _OPTION_OF.items() if name in arm.options}
    if not options:
        return {}
    if "cache_fraction" not in options:
        raise ValueError(
            f"arms.{arm.name}: {', '.join(options)} needs residency, the share of experts in slots, e.g. 0.5"
        )
    from vllm_moe_offload import MoEOffloadConfig

    MoEOffloadConfig.from_dict(options)
    return options


class PlainSystem(TextSystem):
    """Plain vLLM: every expert is resident, and there is no cache to ask.

    ``memory_bytes`` calls what the engine computes from ``hbm`` in all arms of this workload. On a CPU it is
    the part that a GPU would hold; ``describe`` says so.
    """

    def run(self, items: Sequence[Item]) -> BlockResult:
        """Answer all items."""
        result = super().run(items)
        for axis in ("hit_rate", "moved_bytes_per_s"):
            result.values[axis] = None
            result.reasons[axis] = "no expert cache in this arm"
        if self.spec is None:
            result.values["expert_memory_bytes"] = None
            result.reasons["expert_memory_bytes"] = "the accounting does not know this model's family"
        else:
            result.values["expert_memory_bytes"] = self.spec.weight_bytes["routed_experts"]
        return result

    def memory_bytes(self) -> dict[str, int]:
        """Weights and key/value cache."""
        return {"hbm": sum(super().memory_bytes().values())}

    def describe(self) -> dict[str, Any]:
        """The engine's facts, and what ``hbm`` means on this machine."""
        held = super().memory_bytes()
        note = {} if "hbm" in held else {"hbm_means": "bytes that a GPU would hold; this machine has none"}
        return {**super().describe(), **note}


class OffloadSystem(PlainSystem):
    """vLLM with the plugin on: experts in host memory, a pool of slots to compute from."""

    def run(self, items: Sequence[Item]) -> BlockResult:
        """Answer all items; hit rate and traffic are of this block alone."""
        before, begin = self._counters(), time.perf_counter()
        result = TextSystem.run(self, items)
        seconds, after = time.perf_counter() - begin, self._counters()
        accesses = after["accesses"] - before["accesses"]
        hits = after["hits"] - before["hits"]
        slots, experts = self._slot_and_expert_bytes()
        # With a slot for every expert nothing is counted, because nothing can be missed.
        result.values["hit_rate"] = hits / accesses if accesses else 1.0 if slots == experts else None
        moved = sum(sum(step.moved_bytes.values()) for step in result.steps)
        result.values["moved_bytes_per_s"] = moved / seconds
        result.values["expert_memory_bytes"] = slots
        return result

    def _slot_and_expert_bytes(self) -> tuple[int, int]:
        """Bytes of all slots and of all experts, over the ranks."""
        from vllm_moe_offload import stats

        slots = experts = 0
        for rank in stats(self.llm):
            slots += rank["num_slots"] * rank["expert_nbytes"]
            experts += rank["num_layers"] * rank["num_experts"] * rank["expert_nbytes"]
        return slots, experts

    def _counters(self) -> dict[str, float]:
        from vllm_moe_offload import stats

        ranks = stats(self.llm)
        return {name: sum(rank[name] for rank in ranks) for name in ("accesses", "hits")}

    def memory_bytes(self) -> dict[str, int]:
        """``hbm`` holds the slots and all that is no expert, ``dram`` the experts."""
        held = TextSystem.memory_bytes(self)
        slots, experts = self._slot_and_expert_bytes()
        if "hbm" in held:  # the allocator's count already holds the slots and no other expert
            return {"hbm": held["hbm"], "dram": experts}
        return {"hbm": held["dram"] - experts + slots, "dram": experts}

    def describe(self) -> dict[str, Any]:
        """The engine's facts and the plugin's sizes and choices."""
        from vllm_moe_offload import stats

        keys = ("num_slots", "num_layers", "num_experts", "expert_nbytes", "policy", "prefetch")
        rank = stats(self.llm)[0]
        return {**super().describe(), "moe_offload": {key: rank[key] for key in keys}}
