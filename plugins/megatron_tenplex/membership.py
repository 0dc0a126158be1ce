"""A fixed set of workers that re-forms torch's default process group with new ranks and sizes."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tenplex import process_groups
from megatron_tenplex.process_groups import GroupSet
from megatron_tenplex.ptc import Box, ParallelTensorCollection, Shard, TensorSpec, dtype_of


class World:
    """All workers of the job, those without a role in the present layout included.

    Workers are numbered once. Two groups of our own span all of them: ``control`` (gloo, small messages on
    the CPU) and ``data`` (NCCL where there is CUDA, else the same). The default group, which Megatron uses,
    spans only the workers that have a role.

    Args:
        store: a store that outlives every worker which may leave; torchrun's agent hosts such a one.
        worker: number of this worker.
        num_workers: number of all workers.
        backend: of the default group; ``"nccl"`` where there is CUDA, else ``"gloo"``.
        timeout: seconds after which waiting for another worker during a change is an error.
        training_timeout: the same while training, for the collectives of the default group and Megatron's.
        kept_groups: the groups of this many earlier layouts are kept, so that coming back to one costs no new
            communicators. Each holds threads and, over NCCL, device memory.

    Attributes:
        attachment: what the framework on top keeps about the present groups; put aside and taken up with
            them, None where they were formed anew.
    """

    def __init__(
        self,
        store: dist.Store,
        worker: int,
        num_workers: int,
        *,
        backend: str | None = None,
        timeout: float = 25.0,
        training_timeout: float = 1800.0,
        kept_groups: int = 3,
    ) -> None:
        if not 0 <= worker < num_workers:
            raise ValueError(f"worker must be in 0..{num_workers - 1}, got {worker}")
        self.store, self.worker, self.num_workers = store, worker, num_workers
        self.backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        self.timeout = timedelta(seconds=timeout)
        self.training_timeout = timedelta(seconds=training_timeout)
        self.members: tuple[int, ...] = ()
        self.generation = 0
        self.kept_groups = kept_groups
        self.attachment: Any = None
        self._layout: Hashable = None
        self._kept: dict[tuple[tuple[int, ...], Hashable], GroupSet | None] = {}  # least recently used first
        # Twice: who waits for the others' verdict must outlast a worker that waits for one which failed.
        self.control: Any = dist.ProcessGroupGloo(
            dist.PrefixStore("tenplex/control", store), worker, num_workers, 2 * self.timeout
        )
        self.data = self._nccl_group() if self.backend == "nccl" else self.control

    @classmethod
    def from_default(cls, *, timeout: float = 25.0) -> World:
        """The world of the default group, or of ``torchrun``'s environment where none is initialised."""
        if dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
            world = cls(store, dist.get_rank(), dist.get_world_size(), timeout=timeout)
            world.members = tuple(range(world.num_workers))
            return world
        store, rank, size = next(dist.rendezvous("env://"))
        return cls(store, rank, size, timeout=timeout)

    def _nccl_group(self) -> Any:
        store = dist.PrefixStore("tenplex/data", self.store)
        group = dist.ProcessGroup(store, self.worker, self.num_workers)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self.timeout
        backend = dist.ProcessGroupNCCL(store, self.worker, self.num_workers, options)
        backend._set_sequence_number_for_group()
        group._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
        group._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, backend)
        return group

    @property
    def role(self) -> int | None:
        """Rank of this worker in the default group; None while it is idle."""
        return self.members.index(self.worker) if self.worker in self.members else None

    def form(self, members: Sequence[int], layout: Hashable = None) -> int | None:
        """Re-form the default group: ``members[role] = worker``. Collective over all workers.

        Args:
            layout: names the use that is made of the group. With one, the present groups are put aside for
                the next time and, if this is not the first time, taken up again; None always forms anew.

        Returns:
            The new rank of this worker, None if it has no role.
        """
        members = tuple(members)
        if len(set(members)) != len(members) or not set(members) <= set(range(self.num_workers)):
            raise ValueError(f"members must be different workers of 0..{self.num_workers - 1}, got {members}")
        self._leave()
        wanted = (members, layout)
        known = layout is not None and wanted in self._kept
        groups = self._kept.pop(wanted, None)
        self._shrink(self.kept_groups)
        self.members, self._layout, self.attachment = members, layout, None
        if groups is not None:
            self.attachment = groups.attachment
            process_groups.take_up(groups)
            self._set_timeout(self.timeout)
        if not known:
            self._form_anew(members)
        return self.role

    def _leave(self) -> None:
        """Put the present groups aside, or destroy them if they are of no named layout."""
        groups = None
        if dist.is_initialized():
            groups = process_groups.put_aside()
            groups.attachment = self.attachment
        if self._layout is not None:
            self._kept[self.members, self._layout] = groups  # None on a worker without a role, to count alike
        elif groups is not None:
            process_groups.destroy(groups)
        self.members, self._layout, self.attachment = (), None, None

    def _shrink(self, count: int) -> None:
        """Destroy all but the ``count`` sets of groups that were in use last."""
        for key in list(self._kept)[: max(0, len(self._kept) - count)]:
            groups = self._kept.pop(key)
            if groups is not None:
                process_groups.destroy(groups)

    def _form_anew(self, members: tuple[int, ...]) -> None:
        self.generation += 1
        process_groups.number_groups_from(self.generation << 16)
        if self.role is not None:
            dist.init_process_group(
                self.backend,
                store=dist.PrefixStore(f"tenplex/g{self.generation}", self.store),
                rank=self.role,
                world_size=len(members),
                timeout=self.timeout,
            )

    def forget(self, members: Sequence[int], layout: Hashable) -> None:
        """Destroy groups that were put aside, as they may be in any state. Collective over all workers."""
        groups = self._kept.pop((tuple(members), layout), None)
        if groups is not None:
            present = process_groups.put_aside() if dist.is_initialized() else None
            process_groups.destroy(groups)
            if present is not None:
                process_groups.take_up(present)

    def connect(self, groups: Sequence[Any]) -> None:
        """Make groups connect, which NCCL and gloo do at the first use. Collective.

        Args:
            groups: of this worker, in an order that is the same for the members of each.
        """
        device = "cuda" if self.backend == "nccl" else "cpu"
        for group in groups:
            dist.all_reduce(torch.zeros(1, device=device), group=group)

    def begin_training(self) -> None:
        """Let collectives of all groups under the default one take ``training_timeout``."""
        self._set_timeout(self.training_timeout)

    def _set_timeout(self, timeout: timedelta) -> None:
        for group in process_groups.present():
            dist.distributed_c10d._set_pg_timeout(timeout, group)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The one-dimensional CPU tensors of all workers, which may differ in length but not in dtype."""
        length = torch.tensor([tensor.numel()])
        lengths = [torch.zeros_like(length) for _ in range(self.num_workers)]
        self.control.allgather([lengths], [length]).wait()
        longest = max(int(n) for n in lengths)
        padded = tensor.new_zeros(longest)
        padded[: tensor.numel()] = tensor
        gathered = [torch.empty_like(padded) for _ in range(self.num_workers)]
        if longest:
            self.control.allgather([gathered], [padded]).wait()
        return [g[: int(n)] for g, n in zip(gathered, lengths, strict=True)]

    def all_gather_json(self, value: Any) -> list[Any]:
        """JSON values of all workers."""
        encoded = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(bytes(text.numpy()).decode()) for text in self.all_gather(encoded)]

    def agree(self, error: BaseException | None, doing: str) -> None:
        """Raise on every worker if any of them failed at ``doing``; its own error first. Collective."""
        said = self.all_gather_json(None if error is None else f"{type(error).__name__}: {error}")
        failed = [f"worker {w} failed at {doing}: {text}" for w, text in enumerate(said) if text is not None]
        if error is not None:
            if len(failed) > 1:
                error.add_note("; ".join(failed))
            raise error
        if failed:
            raise RuntimeError(failed[0])


def gather_layout(
    tensors: Mapping[str, TensorSpec], shards: Sequence[Shard], world: World
) -> ParallelTensorCollection:
    """What all workers hold, by worker. Collective; boxes travel as integers, nothing is unpickled."""
    keys = sorted({shard.key for shard in shards})
    number_of = {key: number for number, key in enumerate(keys)}
    specs = [[k, list(tensors[k].shape), str(tensors[k].dtype).removeprefix("torch.")] for k in keys]
    row: list[int] = []
    for shard in shards:
        flat = (-1, -1) if shard.flat is None else shard.flat
        row += [number_of[shard.key], len(shard.box.shape), *shard.box.offset, *shard.box.shape, *flat]
    described = world.all_gather_json(specs)
    numbers = world.all_gather(torch.tensor(row, dtype=torch.int64))
    merged: dict[str, TensorSpec] = {}
    for key, shape, dtype in (entry for of_worker in described for entry in of_worker):
        spec = TensorSpec(tuple(shape), dtype_of(dtype))
        if merged.setdefault(key, spec) != spec:
            raise ValueError(f"global shape of {key} differs: {merged[key].shape} -> {spec.shape}")
    by_worker = [
        _decode([key for key, *_ in of_worker], n.tolist())
        for of_worker, n in zip(described, numbers, strict=True)
    ]
    return ParallelTensorCollection(merged, by_worker)


def _decode(keys: list[str], row: list[int]) -> list[Shard]:
    shards, at = [], 0
    while at < len(row):
        key, dims = keys[row[at]], row[at + 1]
        numbers = row[at + 2 : at + 4 + 2 * dims]
        flat = (numbers[-2], numbers[-1]) if numbers[-1] >= 0 else None
        shards.append(Shard(key, Box(tuple(numbers[:dims]), tuple(numbers[dims : 2 * dims])), flat))
        at += 4 + 2 * dims
    return shards
