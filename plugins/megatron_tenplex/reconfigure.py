"""Change the layout of a running job: plan, re-form the groups, build, move, verify, commit."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from megatron_tenplex.dataset import DatasetProgress
from megatron_tenplex.executor import ReshardReport, execute
from megatron_tenplex.layout import ParallelConfig
from megatron_tenplex.membership import World
from megatron_tenplex.memory import check_memory, needed_bytes
from megatron_tenplex.planner import ReshardPlan
from megatron_tenplex.planning import Planning
from megatron_tenplex.ptc import ParallelTensorCollection, Shard
from megatron_tenplex.stages import Trace
from megatron_tenplex.tensor_store import TensorStore
from megatron_tenplex.topology import Topology
from megatron_tenplex.transport import TorchTransport, Transport
from megatron_tenplex.verify import check_target, expected_digests

if TYPE_CHECKING:
    from megatron_tenplex.megatron_adapter import LocalState

logger = logging.getLogger(__name__)
_Layout = tuple[ParallelConfig, tuple[int, ...]]  # and its members: worker of each role


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
            filled, so that the device holds one layout at a time.
        store: replicas for :meth:`snapshot` and for resuming.
        redundancy: copies on other hosts.
        seed: of new random streams (Megatron's formula, plus the iteration so that no stream repeats).
        vocab_size: real rows of the vocabulary where Megatron pads it by the tensor-parallel degree.

    Attributes:
        trace: when each stage ran, since the change before the last one; ``pause`` encloses what training
            waited for.
        planning: the plans that are known.
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
        self.trace = Trace()
        self.planning = Planning(placement, self.hosts(), self.trace)
        self._layouts: dict[ParallelConfig, ParallelTensorCollection] = {}  # by role
        self._held: ParallelTensorCollection | None = None  # by worker, at the present
        self._shadow: tuple[_Layout, TrainingState | None] | None = None

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
        if not gc.get_freeze_count():
            # Every change collects the old model's cycles; the objects of imported modules are not garbage,
            # and searching them takes longer than all else in the pause of a small job.
            gc.collect()
            gc.freeze()
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
        shadow = self._take_shadow(parallel, members)
        old, self._held = self.state, None
        self.state = None
        try:
            with self.trace.timed("groups"):
                self._enter(parallel, members)
            if old is not None:
                self._retire(old)
            if self.role is not None:
                self._megatron.seed_everything(self.seed + iteration)
                if shadow is None:
                    with self.trace.timed("build"):
                        shadow = self._build(parallel)
                self.state = shadow
                local = self.describe()
        except Exception as error:  # reported to all workers, then raised
            failure = error
        self.world.agree(failure, f"building {parallel}")
        self.parallel = parallel
        return local

    def _retire(self, state: TrainingState) -> None:
        """Empty a state that trains no longer: its memory goes although somebody may refer to it."""
        self._megatron.release(state.model, state.optimizer)
        state.model, state.optimizer, state.scheduler = [], None, None

    def _enter(self, parallel: ParallelConfig, members: tuple[int, ...]) -> None:
        """Make the groups of a layout the present ones, new or as they were left."""
        self.world.attachment = self._megatron.put_parallel_aside()
        self.world.form(members, parallel)
        if self.world.attachment is not None:
            self._megatron.take_parallel_up(self.world.attachment)
        elif self.role is not None:
            self._megatron.initialize_parallel(parallel, self.world.timeout.total_seconds())

    def _take_shadow(self, parallel: ParallelConfig, members: tuple[int, ...]) -> TrainingState | None:
        """What :meth:`prepare` built for this layout and placement; anything else is dropped."""
        shadow, self._shadow = self._shadow, None
        return shadow[1] if shadow is not None and shadow[0] == (parallel, members) else None

    def describe(self) -> LocalState | None:
        """Views of what this worker holds; None while it is idle."""
        return None if self.state is None else self._describe(self.state)

    def _describe(self, state: TrainingState) -> LocalState:
        return self._megatron.describe(state.model, state.optimizer, vocab_size=self.vocab_size)

    def gather(self, local: LocalState | None) -> ParallelTensorCollection:
        """What all workers hold, by worker. Collective."""
        return self._megatron.gather(local, self.world)

    def _present_layout(self, local: LocalState | None) -> ParallelTensorCollection:
        """What all workers hold, gathered only if it is not known. Collective."""
        if self._held is None or not self._all_hold(local, self._held.shards):
            self._held = self.gather(local)
        return self._held

    def _all_hold(self, local: LocalState | None, shards: Sequence[Sequence[Shard]]) -> bool:
        """Whether every worker w holds ``shards[w]`` and nothing else. Collective."""
        mine = () if local is None else tuple(local.shards)
        return all(self.world.all_gather_json(mine == tuple(shards[self.world.worker])))

    def _layout_in_roles(
        self, parallel: ParallelConfig, local: LocalState | None
    ) -> ParallelTensorCollection:
        """The layout that was just built, by role; gathered only if it is not known. Collective."""
        known, members = self._layouts.get(parallel), self.world.members
        if known is not None and self._all_hold(
            local, _in_worker_order(known, members, self.world.num_workers)
        ):
            return known
        self._layouts[parallel] = _in_role_order(self.gather(local), members)
        return self._layouts[parallel]

    def target_layout(self) -> ParallelTensorCollection:
        """The present layout in role order. Collective."""
        return _in_role_order(self.gather(self.describe()), self.world.members)

    # ------------------------------------------------------------------------------------------- change

    def prepare(self, parallel: ParallelConfig, *, shadow: bool = False) -> None:
        """Do now what a later :meth:`reconfigure` to ``parallel`` would do in its pause. Collective.

        Between two iterations: groups are formed and connected, and a layout that was never used is built
        once and dropped, which tells what it holds. The plan is then computed in a thread while training
        goes on.

        Args:
            shadow: build the layout and keep it, so that a change only has to fill it. Holds the memory of
                both layouts until then.

        Raises:
            ValueError, MemoryError: the layout is not possible; the present one goes on.
        """
        if self.parallel is None:
            raise RuntimeError("call start() before prepare()")
        self._begin_trace()
        parallel = parallel.resolve(self.world.num_workers)
        local = self.describe()
        source = self._present_layout(local)
        self._check_memory(source, parallel, local)
        roles: tuple[int, ...] = tuple(range(parallel.world_size))
        self._shadow = None
        if parallel in self._layouts:
            roles = self.planning.members(source, self._layouts[parallel])
        built = self._visit(parallel, roles, build=shadow or parallel not in self._layouts)
        better = self.planning.members(source, self._layouts[parallel])
        if better != roles:
            del built
            built = self._visit(parallel, better, build=shadow)
            self.world.forget(roles, parallel)
        if shadow:
            self._shadow = ((parallel, better), built)
        elif built is not None:
            self._retire(built)
            del built
            _free_device_memory()
        self.planning.plan_ahead(source, self._layouts[parallel], better)
        self.world.begin_training()

    def _visit(
        self, parallel: ParallelConfig, members: tuple[int, ...], *, build: bool
    ) -> TrainingState | None:
        """Enter a layout's groups, build on them if asked for, and come back. Collective."""
        home, roles, role = self.parallel, self.world.members, self.role
        assert home is not None
        stream = self._megatron.capture_rng() if role is not None else None
        failure: BaseException | None = None
        built: TrainingState | None = None
        local: LocalState | None = None
        try:
            with self.trace.timed("groups"):
                self._enter(parallel, members)
                if self.role is not None:
                    self.world.connect(self._megatron.training_groups())
            if build and self.role is not None:
                self._megatron.seed_everything(self.seed)
                with self.trace.timed("build"):
                    built = self._build(parallel)
                local = self._describe(built)
        except Exception as error:  # reported to all workers, then raised
            failure = error
        try:
            self.world.agree(failure, f"preparing {parallel}")
            if build:
                self._layout_in_roles(parallel, local)
        except Exception:
            self._enter(home, roles)
            self.world.forget(members, parallel)
            raise
        else:
            self._enter(home, roles)
        finally:
            if stream is not None:
                self._megatron.restore_rng(stream)
        return built

    def _begin_trace(self) -> None:
        if self.trace.spans and self.trace.spans[-1].name == "pause":
            self.trace.spans.clear()

    def reconfigure(self, parallel: ParallelConfig) -> TrainingState | None:
        """Move the whole state to another layout, between two iterations. Collective over all workers.

        The old state is used up: its optimizer holds nothing afterwards.

        Returns:
            The new state; None on a worker without a role.

        Raises:
            ValueError, MemoryError: the layout is not possible; nothing has changed.
            RuntimeError: another worker failed. The old layout is restored where all workers are alive.
        """
        if self.parallel is None:
            raise RuntimeError("call start() before reconfigure()")
        self._begin_trace()
        with self.trace.timed("pause"):
            self._reconfigure(parallel.resolve(self.world.num_workers), (self.parallel, self.world.members))
        assert self.report is not None
        self.report.seconds.update(self.trace.seconds("pause"))
        return self.state

    def _reconfigure(self, parallel: ParallelConfig, home: _Layout) -> None:
        with self.trace.timed("describe"):
            local = self.describe()
            source = self._present_layout(local)
            small = self.gather_small()
        held = dict(local.shards) if local is not None else {}
        if self._shadow is None or self._shadow[0][0] != parallel:
            self._check_memory(source, parallel, local)
        del local  # parked tensors must have no other holder
        try:
            self._change(parallel, source, held, small)
        except Exception as error:
            self._roll_back(parallel, home, held, small, error)
            self.world.begin_training()
            raise
        held.clear()
        with self.trace.timed("free"):
            _free_device_memory()
        self.world.begin_training()

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
    ) -> None:
        members: tuple[int, ...] = tuple(range(parallel.world_size))
        if parallel in self._layouts:
            members = self.planning.members(source, self._layouts[parallel])
        if self.release_source:
            with self.trace.timed("park"):
                for shard, tensor in held.items():
                    held[shard] = tensor.to("cpu", copy=True)
                if self.state is not None:
                    self._retire(self.state)
                self.state = None
                _free_device_memory()
        local = self._form(parallel, members, small["iteration"])
        target = self._layout_in_roles(parallel, local)
        better = self.planning.members(source, target)
        if better != members:
            # The layout was not known before it was built once: build again, on better placed workers.
            del local
            local = self._form(parallel, better, small["iteration"])
            self.world.forget(members, parallel)
            target = self._layout_in_roles(parallel, local)
        plan = self.planning.plan(source, target, better)
        self._agree_on(plan)
        into = dict(local.shards) if local is not None else {}
        self._move(plan, source, target, held, into)
        if local is not None:
            for padding in local.padding:
                padding.zero_()
        with self.trace.timed("commit"):
            if self.state is not None:
                self.apply_small(small)
            self.world.agree(None, "committing")
        shards = _in_worker_order(target, better, self.world.num_workers)
        self._held = ParallelTensorCollection(target.tensors, shards)
        logger.info("%s: %s", parallel, plan.summary())

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
    ) -> None:
        wanted = None
        if self.verify:
            with self.trace.timed("verify"):
                wanted = expected_digests(source, target, plan.placement, held, self.world)
        failure: BaseException | None = None
        try:
            self.report = execute(plan, held, into, self.transport, staging_bytes=self.staging_bytes)
        except Exception as error:  # reported to all workers, then raised
            failure = error
        self.world.agree(failure, "moving tensors")
        if wanted is not None:
            with self.trace.timed("verify"):
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
        failed: ParallelConfig,
        home: _Layout,
        held: dict[Shard, Tensor],
        small: dict[str, Any],
        cause: BaseException,
    ) -> None:
        """Rebuild the old layout from the tensors of its shards, which nothing has written to."""
        parallel, members = home
        logger.warning("change of layout failed (%s); restoring %s", cause, parallel)
        try:
            self.world.agree(None, "looking for all workers")  # fails at once where one is gone
            entered = self.world.members
            local = self._form(parallel, members, small["iteration"])
            if (entered, failed) != (members, parallel):
                self.world.forget(entered, failed)
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
        source, target = self._present_layout(self.describe()), self._layouts[parallel]
        return self.planning.plan(source, target, self.planning.members(source, target))

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


def _in_worker_order(
    layout: ParallelTensorCollection, members: Sequence[int], num_workers: int
) -> list[tuple[Shard, ...]]:
    """Shards of worker w at index w."""
    shards: list[tuple[Shard, ...]] = [()] * num_workers
    for role, worker in enumerate(members):
        shards[worker] = layout.shards[role]
    return shards


def _free_device_memory() -> None:
    gc.collect()  # a model and its hooks refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
