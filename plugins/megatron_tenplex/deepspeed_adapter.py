"""DeepSpeed ZeRO-1 and ZeRO-2: how the optimizer's flat partitions lie over the parameters, and moving them.

Both stages keep whole weights on every rank and split one flat buffer of each parameter group evenly: fp32
masters and Adam's moments. :func:`zero_layout` computes that from shapes alone, for the planner, and imports
no DeepSpeed; :class:`ZeroReconfigurator` changes the number of ranks of a running engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_tenplex.executor import ReshardReport, execute
from megatron_tenplex.membership import World, gather_layout
from megatron_tenplex.planner import plan_reshard
from megatron_tenplex.ptc import Box, ParallelTensorCollection, Shard, TensorSpec
from megatron_tenplex.transport import TorchTransport, Transport

_MOMENTS = ("exp_avg", "exp_avg_sq")
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_ALIGNMENT = 2  # DeepSpeed's nccl_start_alignment_factor, per rank


def zero_layout(
    groups: list[Mapping[str, tuple[int, ...]]],
    world_size: int,
    *,
    precision: Literal["fp32", "bf16"] = "bf16",
) -> ParallelTensorCollection:
    """The collection of a model under ZeRO-1 or ZeRO-2 on ``world_size`` data-parallel ranks.

    Args:
        groups: parameter groups in the optimizer's order, each parameter name -> shape in DeepSpeed's order
            (``round_robin_gradients`` off).

    Keys: ``model.<name>``, ``optimizer.{param,exp_avg,exp_avg_sq}.<name>``; the masters are separate in fp32,
    too.

    Raises:
        ValueError: a name occurs twice, or ``world_size`` is below 1.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    tensors: dict[str, TensorSpec] = {}
    shards: list[list[Shard]] = [[] for _ in range(world_size)]
    weight = torch.float32 if precision == "fp32" else torch.bfloat16
    for group in groups:
        unit = _ALIGNMENT * world_size
        numel = sum(math.prod(shape) for shape in group.values())
        share = -(-numel // unit) * unit // world_size
        start = 0
        for name, shape in group.items():
            if f"model.{name}" in tensors:
                raise ValueError(f"parameter {name!r} occurs twice")
            tensors[f"model.{name}"] = TensorSpec(shape, weight)
            box = Box((0,) * len(shape), shape)
            for kind in ("param", "exp_avg", "exp_avg_sq"):
                tensors[f"optimizer.{kind}.{name}"] = TensorSpec(shape, torch.float32)
            for rank in range(world_size):
                shards[rank].append(Shard(f"model.{name}", box))
                flat = (max(rank * share - start, 0), min((rank + 1) * share - start, box.numel))
                if flat[0] < flat[1]:
                    shards[rank] += [
                        Shard(f"optimizer.{kind}.{name}", box, flat)
                        for kind in ("param", "exp_avg", "exp_avg_sq")
                    ]
            start += box.numel
    return ParallelTensorCollection(tensors, shards)


class ZeroReconfigurator:
    """Owns a DeepSpeed engine with ZeRO-1 or ZeRO-2 and changes its number of data-parallel ranks.

    Args:
        build: calls ``deepspeed.initialize`` on the default group, which exists by then, and returns the
            engine. Called anew for every change; the global batch must not depend on the number of ranks.
        world: all workers; those of the default group or of torchrun by default.
        transport: how tensors travel; the world's data group by default.
        staging_bytes: memory for messages under way, per worker.

    Attributes:
        engine: of this worker; None while it is idle.
        report: what this worker moved in the last change.
    """

    def __init__(
        self,
        build: Callable[[], Any],
        *,
        world: World | None = None,
        transport: Transport | None = None,
        staging_bytes: int = 256 << 20,
    ) -> None:
        self._build = build
        self.world = world or World.from_default()
        self.transport = transport or TorchTransport(self.world.data, self.world.worker)
        self.staging_bytes = staging_bytes
        self.engine: Any = None
        self.report: ReshardReport | None = None

    def start(self, dp: int) -> Any:
        """Build the first engine on workers 0..dp-1. Collective; None on a worker without a role."""
        return self._form(tuple(range(dp)))

    def reconfigure(self, dp: int) -> Any:
        """Move the whole state to ``dp`` ranks, between two steps. Collective over all workers.

        The old engine is used up. If ``build`` fails, training cannot go on.

        Returns:
            The new engine; None on a worker without a role.

        Raises:
            ValueError: ``dp`` is impossible, or the optimizer is not supported; nothing has changed.
            RuntimeError: another worker failed.
        """
        if not 1 <= dp <= self.world.num_workers:
            raise ValueError(f"dp must be in 1..{self.world.num_workers}, got {dp}")
        tensors, held = describe_engine(self.engine) if self.engine is not None else ({}, {})
        source = gather_layout(tensors, list(held), self.world)
        small = next(s for s in self.world.all_gather_json(_small_state(self.engine)) if s is not None)
        members = tuple(range(dp))
        self._form(members)
        tensors, into = describe_engine(self.engine) if self.engine is not None else ({}, {})
        gathered = gather_layout(tensors, list(into), self.world)
        target = ParallelTensorCollection(gathered.tensors, [gathered.shards[w] for w in members])
        plan = plan_reshard(source, target, placement=members)
        self.report = execute(plan, held, into, self.transport, staging_bytes=self.staging_bytes)
        if self.engine is not None:
            _apply_small_state(self.engine, small)
        self.world.agree(None, "committing")
        return self.engine

    def _form(self, members: tuple[int, ...]) -> Any:
        failure: BaseException | None = None
        self.engine = None
        try:
            _forget_groups()
            if self.world.form(members) is not None:
                self.engine = self._build()
        except Exception as error:  # reported to all workers, then raised
            failure = error
        self.world.agree(failure, f"building an engine on {len(members)} ranks")
        self.world.begin_training()
        return self.engine


def describe_engine(engine: Any) -> tuple[dict[str, TensorSpec], dict[Shard, Tensor]]:
    """Global tensors, and the shards of this rank as views of the live tensors.

    Adam's state is made, as zeros, where it does not exist yet.

    Raises:
        ValueError: the engine's optimizer is not ZeRO-1 or ZeRO-2 over torch's Adam.
    """
    zero = engine.optimizer
    if not hasattr(zero, "single_partition_of_fp32_groups"):
        raise ValueError(f"optimizer {type(zero).__name__} is not supported; use ZeRO stage 1 or 2")
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    tensors: dict[str, TensorSpec] = {}
    shards: dict[Shard, Tensor] = {}
    for parameter, start, partition, low, high in _partitions(zero):
        name, shape = names[id(parameter)], tuple(parameter.shape)
        box = Box((0,) * len(shape), shape)
        tensors[f"model.{name}"] = TensorSpec(shape, parameter.dtype)
        shards[Shard(f"model.{name}", box)] = parameter.data
        flat = (max(low - start, 0), min(high - start, box.numel))
        state = zero.optimizer.state[partition]
        for kind in _MOMENTS:
            state.setdefault(kind, torch.zeros_like(partition, requires_grad=False))
        state.setdefault("step", torch.tensor(0.0))
        for kind, data in (("param", partition.data), *((k, state[k]) for k in _MOMENTS)):
            tensors[f"optimizer.{kind}.{name}"] = TensorSpec(shape, data.dtype)
            if flat[0] < flat[1]:
                first = start + flat[0] - low
                piece = data[first : first + flat[1] - flat[0]]
                shards[Shard(f"optimizer.{kind}.{name}", box, flat)] = piece
    return tensors, shards


def _partitions(zero: Any) -> Iterator[tuple[Tensor, int, Tensor, int, int]]:
    """(parameter, its start in the flat buffer, this rank's partition of that, first and last element)."""
    for group, flat in enumerate(zero.bit16_groups_flat):
        partition = zero.single_partition_of_fp32_groups[group]
        rank = torch.distributed.get_rank(zero.real_dp_process_group[group])
        size = flat.numel() // torch.distributed.get_world_size(zero.real_dp_process_group[group])
        for parameter in zero.bit16_groups[group]:
            start = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            yield parameter, start, partition, rank * size, (rank + 1) * size


def _small_state(engine: Any) -> dict[str, Any] | None:
    """State that is not sharded, as JSON values; None on a worker without an engine."""
    if engine is None:
        return None
    inner = engine.optimizer.optimizer
    steps = [float(state["step"]) for state in inner.state.values() if "step" in state]
    scaler = engine.optimizer.loss_scaler
    return {
        "step": max(steps, default=0.0),
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in inner.param_groups],
        "counters": {name: getattr(engine, name) for name in _COUNTERS},
        "scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None,
        "scaler": {k: v for k, v in vars(scaler).items() if isinstance(v, (bool, int, float))},
    }


def _apply_small_state(engine: Any, small: Mapping[str, Any]) -> None:
    inner = engine.optimizer.optimizer
    for group, saved in zip(inner.param_groups, small["groups"], strict=True):
        for name, value in saved.items():
            group[name] = tuple(value) if isinstance(value, list) else value
        for partition in group["params"]:
            inner.state[partition]["step"] = torch.tensor(small["step"])
    for name, value in small["counters"].items():
        setattr(engine, name, value)
    if engine.lr_scheduler is not None and small["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(small["scheduler"])
    vars(engine.optimizer.loss_scaler).update(small["scaler"])


def _forget_groups() -> None:
    """Let DeepSpeed look up the groups anew, which it keeps in the globals of two modules."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    comm.cdb = None
    for name, value in list(vars(groups).items()):
        if name.startswith("_") and name.isupper() and not isinstance(value, str):
            setattr(groups, name, {} if isinstance(value, dict) else None)
