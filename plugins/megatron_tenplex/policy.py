"""Which layout to use on the workers that are there: the one that is reached fastest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megatron_tenplex.layout import GPTShape, ParallelConfig, check_shape, gpt_layout
from megatron_tenplex.placement import assign_roles
from megatron_tenplex.planner import plan_reshard
from megatron_tenplex.topology import Topology


def feasible_layouts(
    shape: GPTShape, num_workers: int, *, least_model_parallel: int = 1, most_tp: int = 8
) -> Iterator[ParallelConfig]:
    """Dense layouts that use all workers, tp and pp powers of two and ``tp * pp >= least_model_parallel``."""
    tp = 1
    while tp <= min(most_tp, num_workers):
        pp = 1
        while tp * pp <= num_workers:
            if num_workers % (tp * pp) == 0 and tp * pp >= least_model_parallel:
                parallel = ParallelConfig(tp=tp, pp=pp, dp=num_workers // (tp * pp))
                try:
                    check_shape(shape, parallel)
                except ValueError:
                    pass
                else:
                    yield parallel
            pp *= 2
        tp *= 2


def smallest_move(
    shape: GPTShape,
    current: ParallelConfig,
    num_workers: int,
    topology: Topology,
    *,
    least_model_parallel: int = 1,
    precision: Literal["fp32", "bf16"] = "bf16",
) -> ParallelConfig:
    """The feasible layout with the smallest predicted transfer from ``current``.

    Args:
        least_model_parallel: ``tp * pp`` at which the model still fits into a device.

    Raises:
        ValueError: no layout fits ``num_workers``.
    """
    source = gpt_layout(shape, current, precision=precision)
    best: tuple[float, str, ParallelConfig] | None = None
    for parallel in feasible_layouts(shape, num_workers, least_model_parallel=least_model_parallel):
        target = gpt_layout(shape, parallel, precision=precision)
        placement = assign_roles(source, target, topology=topology)
        plan = plan_reshard(source, target, placement=placement, topology=topology)
        candidate = (plan.predict(), str(parallel), parallel)
        best = candidate if best is None or candidate[:2] < best[:2] else best
    if best is None:
        raise ValueError(f"no layout of {shape} fits {num_workers} workers")
    return best[2]
