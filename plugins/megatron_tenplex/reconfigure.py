"""Change the layout of a running job: plan, re-form the groups, build, move, verify, commit."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from megatron_tenplex.dataset import DatasetProgress
from megatron_tenplex.executor import ReshardReport, execute
from megatron_tenplex.layout import ParallelConfig
from megatron_tenplex.membership import World
from megatron_tenplex.memory import check_memory, needed_bytes
from megatron_tenplex.placement import assign_roles
from megatron_tenplex.planner import ReshardPlan, plan_reshard
from megatron_tenplex.ptc import ParallelTensorCollection, Shard
from megatron_tenplex.tensor_store import TensorStore
from megatron_tenplex.topology import Topology
from megatron_tenplex.transport import TorchTransport, Transport
from megatron_tenplex.verify import check_target, expected_digests

if TYPE_CHECKING:
    from megatron_tenplex.megatron_adapter import LocalState

logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """What ``build`` makes and a change of layout carries over.

    Attributes:
        model: model chunks of this rank, wrapped in Megatron's DistributedDataParallel.
        optimizer: Megatron's optimizer.
        scheduler: object with ``state_dict`` and ``load_state_dict`` whose values are JSON values.
        progress: where in the data set training is.
        iteration: number of optimizer steps done.
        extra: further JSON values, the same on all ranks.
    """

    model: list[nn.Module]
    optimizer: Any
    scheduler: Any = None
    progress: DatasetProgress | None = None
    iteration: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


class Reconfigurator:
    """Owns the training state of this worker and changes its layout.

    Args:
        build: makes model and optimizer for a layout, on Megatron's groups and seeds, which exist by then.
        world: all workers; those of the default group or of torchrun by default.
        topology: hosts and links; all workers on one host by default.
        transport: how tensors travel; the world's data group by default.
        placement: ``"optimal"`` lets workers change ranks so that less moves; ``"identity"`` keeps them.
        staging_bytes: memory for messages under way, per worker.
        verify: compare digests of all tensors before and after.
        release_source: the tensors of the old layout wait in host memory while the new one is built and
        filled, so
            that the device holds one layout at a time.
        store: replicas for :meth:`snapshot` and for resuming.
        redundancy: copies on other hosts.
        seed: of new random streams (Megatron's formula, plus the iteration so that no stream repeats).
        vocab_size: real rows of the vocabulary where Megatron pads it by the tensor-parallel degree.
    """

    def __init__(
        self,
        build: Callable[[ParallelConfig], TrainingState],
        *,
        world: World | None = None,
        topology: Topology | None = None,
        transport: Transport | None = None,
        placement: Literal["optimal", "identity"] = "optimal",
        staging_bytes: int = 256 << 20,
        verify: bool = False,
        release_source: bool = False,
        store: TensorStore | None = None,
        redundancy: int = 1,
        seed: int = 1234,
        vocab_size: int | None = None,
    ) -> None:
        if placement not in ("optimal", "identity"):
            raise ValueError(f"placement must be optimal or identity, got {placement!r}")
        from megatron_tenplex import megatron_adapter

        megatron_adapter.check_supported()
        self._megatron = megatron_adapter
        self._build = build
        self.world = world or World.from_default()
        self.topology = topology or Topology(ranks_per_host=self.world.num_workers)
        self.transport = transport or TorchTransport(self.world.data, self.world.worker)
        self.placement, self.staging_bytes, self.verify = placement, staging_bytes, verify
        self.release_source, self.store, self.redundancy, self.seed = release_source, store, redundancy, seed
        self.vocab_size = vocab_size
        self.state: TrainingState | None = None
        self.parallel: ParallelConfig | None = None
        self.report: ReshardReport | None = None
        self._layouts: dict[ParallelConfig, ParallelTensorCollection] = {}

    @property
    def role(self) -> int | None:
        """Rank of this worker in the present layout; None while it is idle."""
        return self.world.role

    # -------------------------------------------------------------------------------------------- start

    def start(self, parallel: ParallelConfig, *, resume: bool = True) -> TrainingState | None:
        """Build the first layout, and fill it from stored replicas if there are any. Collective.

        Returns:
            The state, or None on a worker without a role.

        Raises:
            UncoveredRangeError: replicas exist, but no version is complete.
        """
        parallel = parallel.resolve(self.world.num_workers)
        self._form(parallel, tuple(range(parallel.world_size)), iteration=0)
        if resume and self.store is not None:
            from megatron_tenplex.recovery import resume_from_replicas

            resume_from_replicas(self)
        self.world.begin_training()
        return self.state

    def _form(self, parallel: ParallelConfig, members: tuple[int, ...], iteration: int) -> LocalState | None:
        """Groups, seeds, build; all workers learn of a failure of one."""
        failure: BaseException | None = None
        local = None
        self._megatron.destroy_parallel()
        try:
            if self.world.form(members) is not None:
                self._megatron.initialize_parallel(parallel, self.world.timeout.total_seconds())
                self._megatron.seed_everything(self.seed + iteration)
                if self.state is not None:
                    self._megatron.release(self.state.model)
                self.state = self._build(parallel)
                local = self.describe()
            else:
                self.state = None
        except Exception as error:  # reported to all workers, then raised
            failure = error
        self.world.agree(failure, f"building {parallel}")
        self.parallel = parallel
        return local

    def describe(self) -> LocalState | None:
        """Views of what this worker holds; None while it is idle."""
        if self.state is None:
            return None
        return self._megatron.describe(self.state.model, self.state.optimizer, vocab_size=self.vocab_size)

    def gather(self, local: LocalState | None) -> ParallelTensorCollection:
        """What all workers hold, by worker. Collective."""
        return self._megatron.gather(local, self.world)

    def target_layout(self) -> ParallelTensorCollection:
        """The present layout in role order. Collective."""
        return _in_role_order(self.gather(self.describe()), self.world.members)

    # ------------------------------------------------------------------------------------------- change

    def reconfigure(self, parallel: ParallelConfig) -> TrainingState | None:
        """Move the whole state to another layout, between two iterations. Collective over all workers.

        Returns:
            The new state; None on a worker without a role.

        Raises:
            ValueError, MemoryError: the layout is not possible; nothing has changed.
            RuntimeError: another worker failed. The old layout is restored where all workers are alive.
        """
        old_parallel, old_members = self.parallel, self.world.members
        if old_parallel is None:
            raise RuntimeError("call start() before reconfigure()")
        parallel = parallel.resolve(self.world.num_workers)
        seconds: dict[str, float] = {}
        with _timed(seconds, "describe"):
            local = self.describe()
            source = self.gather(local)
            small = self.gather_small()
        held = dict(local.shards) if local is not None else {}
        self._check_memory(source, parallel, local)
        try:
            self._change(parallel, source, held, small, seconds)
        except Exception as error:
            self._roll_back(old_parallel, old_members, held, small, error)
            self.world.begin_training()
            raise
        # The old model, its gradients and its groups' threads go only with its reference cycles.
        held.clear()
        del local
        _free_device_memory()
        self.world.begin_training()
        return self.state

    def _check_memory(
        self, source: ParallelTensorCollection, parallel: ParallelConfig, local: LocalState | None
    ) -> None:
        needed = needed_bytes(source, parallel, self.staging_bytes, self._layouts.get(parallel))
        freed = local.nbytes if self.release_source and local is not None else 0
        on_cpu = not torch.cuda.is_available()
        sharing = min(self.topology.ranks_per_host, self.world.num_workers) if on_cpu else 1
        check_memory(self.world, needed, freed, sharing=sharing, release_source=self.release_source)

    def _change(
        self,
        parallel: ParallelConfig,
        source: ParallelTensorCollection,
        held: dict[Shard, Tensor],
        small: dict[str, Any],
        seconds: dict[str, float],
    ) -> None:
        members = tuple(range(parallel.world_size))
        if self.placement == "optimal" and parallel in self._layouts:
            with _timed(seconds, "plan"):
                members = assign_roles(source, self._layouts[parallel], topology=self.hosts())
        if self.release_source:
            with _timed(seconds, "park"):
                held = {shard: tensor.to("cpu", copy=True) for shard, tensor in held.items()}
                self.state = None
                _free_device_memory()
        with _timed(seconds, "build"):
            local = self._form(parallel, members, small["iteration"])
        with _timed(seconds, "plan"):
            target = _in_role_order(self.gather(local), members)
            better = self._better_members(source, target, members)
        if better is not None:
            # The layout was not known before it was built once: build again, on better placed workers.
            with _timed(seconds, "build"):
                local = self._form(parallel, better, small["iteration"])
                members = better
                target = _in_role_order(self.gather(local), members)
        self._layouts[parallel] = target
        with _timed(seconds, "plan"):
            plan = plan_reshard(source, target, placement=members, topology=self.hosts())
            self._agree_on(plan)
        into = dict(local.shards) if local is not None else {}
        self._move(plan, source, target, held, into, seconds=seconds)
        if local is not None:
            for padding in local.padding:
                padding.zero_()
        self._commit(small, seconds)
        logger.info("%s: %s", parallel, plan.summary())

    def _better_members(
        self, source: ParallelTensorCollection, target: ParallelTensorCollection, members: tuple[int, ...]
    ) -> tuple[int, ...] | None:
        if self.placement != "optimal":
            return None
        better = assign_roles(source, target, topology=self.hosts())
        return None if better == members else better

    def hosts(self) -> Topology | None:
        """The topology, None if all workers are on one host."""
        one_host = self.topology.ranks_per_host >= self.world.num_workers
        return None if one_host else self.topology

    def _agree_on(self, plan: ReshardPlan) -> None:
        digests = self.world.all_gather_json(plan.digest)
        if len(set(digests)) > 1:
            raise RuntimeError(f"reshard plans differ among ranks: {sorted(set(digests))}")

    def _move(
        self,
        plan: ReshardPlan,
        source: ParallelTensorCollection,
        target: ParallelTensorCollection,
        held: dict[Shard, Tensor],
        into: dict[Shard, Tensor],
        *,
        seconds: dict[str, float],
    ) -> None:
        wanted = None
        if self.verify:
            with _timed(seconds, "verify"):
                wanted = expected_digests(source, target, plan.placement, held, self.world)
        failure: BaseException | None = None
        try:
            self.report = execute(
                plan,
                held,
                into,
                self.transport,
                staging_bytes=self.staging_bytes,
            )
            seconds.update(self.report.seconds)
            self.report.seconds = seconds
        except Exception as error:  # reported to all workers, then raised
            failure = error
        self.world.agree(failure, "moving tensors")
        if wanted is not None:
            with _timed(seconds, "verify"):
                check_target(wanted, target, into, self.world)

    def gather_small(self) -> dict[str, Any]:
        """State of all roles that is not sharded, as JSON values. Collective."""
        mine: dict[str, Any] | None = None
        if self.state is not None:
            progress = self.state.progress
            mine = {
                "common": self._megatron.capture_common(self.state.optimizer, self.state.scheduler),
                "rng": self._megatron.capture_rng(),
                "iteration": self.state.iteration,
                "progress": progress.to_json() if progress is not None else None,
                "extra": self.state.extra,
                "parallel": str(self.parallel),
                "order": self.parallel.order if self.parallel is not None else "",
            }
        by_worker = self.world.all_gather_json(mine)
        by_role = [by_worker[worker] for worker in self.world.members]
        return {
            "common": self._megatron.merge_common([state["common"] for state in by_role]),
            "rng": [state["rng"] for state in by_role],
            **{name: by_role[0][name] for name in ("iteration", "progress", "extra", "parallel", "order")},
        }

    def _commit(self, small: dict[str, Any], seconds: dict[str, float]) -> None:
        with _timed(seconds, "commit"):
            if self.state is not None:
                self.apply_small(small)
            self.world.agree(None, "committing")

    def apply_small(self, small: dict[str, Any]) -> None:
        """Write what :meth:`gather_small` read to this worker's new state."""
        state, parallel, members = self.state, self.parallel, self.world.members
        assert state is not None
        assert parallel is not None
        self._megatron.apply_common(state.optimizer, state.scheduler, small["common"])
        self._megatron.reconfigure_microbatches(
            small["common"], members.index(self.world.worker), parallel.dp or 1
        )
        state.iteration = small["iteration"]
        state.progress = DatasetProgress.from_json(small["progress"]) if small["progress"] else None
        state.extra = small["extra"]
        stream = self._stream_of(parallel, members, small)
        if stream is not None:
            self._megatron.restore_rng(stream)

    def _stream_of(
        self, parallel: ParallelConfig, members: tuple[int, ...], small: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Random streams of the same role in the old layout; None where roles changed their meaning."""
        old = replace(ParallelConfig.parse(small["parallel"]), order=small["order"])
        if not self._megatron.rng_is_kept(old, parallel):
            return None
        at = parallel.coordinates(members.index(self.world.worker))
        for rank, stream in enumerate(small["rng"]):
            if old.coordinates(rank) == at:
                return stream
        return None

    def _roll_back(
        self,
        parallel: ParallelConfig,
        members: tuple[int, ...],
        held: dict[Shard, Tensor],
        small: dict[str, Any],
        cause: BaseException,
    ) -> None:
        """Rebuild the old layout from the tensors of its shards, which nothing has written to."""
        logger.warning("change of layout failed (%s); restoring %s", cause, parallel)
        try:
            self.world.agree(None, "looking for all workers")  # fails at once where one is gone
            local = self._form(parallel, members, small["iteration"])
        except Exception as error:
            raise RuntimeError(
                f"the old layout could not be restored ({error}); restart and resume from replicas"
            ) from cause
        if local is not None:
            with torch.no_grad():
                for shard, tensor in local.shards.items():
                    tensor.copy_(held[shard])
                for padding in local.padding:
                    padding.zero_()
            self.apply_small(small)

    def plan(self, parallel: ParallelConfig) -> ReshardPlan:
        """The plan for a layout that has been built before. Collective; nothing moves.

        Raises:
            ValueError: the layout has not been used yet; ``gpt_layout`` describes one without building it.
        """
        parallel = parallel.resolve(self.world.num_workers)
        if parallel not in self._layouts:
            raise ValueError(f"{parallel} has not been built yet; use gpt_layout for a plan without building")
        source = self.gather(self.describe())
        target = self._layouts[parallel]
        members: tuple[int, ...] = tuple(range(target.world_size))
        if self.placement == "optimal":
            members = assign_roles(source, target, topology=self.hosts())
        return plan_reshard(source, target, placement=members, topology=self.hosts())

    def snapshot(self) -> int:
        """Write replicas of this worker's state to its own host and ``redundancy`` others. Collective.

        Returns:
            The version, which is the iteration.
        """
        from megatron_tenplex.recovery import write_replicas

        return write_replicas(self)


def _in_role_order(gathered: ParallelTensorCollection, members: tuple[int, ...]) -> ParallelTensorCollection:
    """Rank r of the result is what ``members[r]`` holds."""
    return ParallelTensorCollection(gathered.tensors, [gathered.shards[worker] for worker in members])


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


def _free_device_memory() -> None:
    gc.collect()  # a model and its hooks refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
