"""One table over several processes: each holds a shard, all draw from the whole."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rl_replay_gear.batch import TrajectoryBatch
from rl_replay_gear.collect import Backend, ReadPlan, Windows
from rl_replay_gear.communicator import Communicator
from rl_replay_gear.exchange import (
    SHARD_SHIFT,
    AllToAll,
    Exchange,
    GlobalSelection,
    Mapped,
    choose_exchange,
    map_shards,
    shard_facts,
)
from rl_replay_gear.layout import ParallelLayout
from rl_replay_gear.randomness import Generator, uniforms
from rl_replay_gear.selection import Selection
from rl_replay_gear.selectors import Drawn, Selector, TopK
from rl_replay_gear.spec import DTYPE_NAMES, TableSpec
from rl_replay_gear.table import Anchor, TrajectoryTable


class ShardedTable:
    """A table whose trajectories lie in the processes of a group, one shard each.

    ``write`` and ``read`` are local. ``select``, ``collect``, ``count_stale`` and ``update_priorities`` are
    collective: every process of the group calls them in the same order, with generators in the same state.

    A draw over trajectories or steps with replacement is exact: each shard sends three numbers (total weight,
    number of items, smallest weight), every process draws the same ``dp_size * B`` uniforms, and each
    resolves those that fall in its range by its own inverse cumulative sum. The items are those one table
    holding the shards in rank order would draw, except within rounding of a boundary. ``TopK`` and draws
    without replacement compare ``dp_size * B`` candidates a shard.

    Args:
        table: This process's shard.
        layout: Where this process stands; None: every process of the default group is a data-parallel rank.
        scope: ``"global"`` draws from all shards, ``"local"`` each process from its own.
        exchange: How rows travel: ``"all_to_all"``; ``"mapped"`` reads the shards of this host in place
            (their tables need ``shared=True``), in host memory or, where asked for, in that of a peer GPU;
            ``"auto"`` is mapped where every process is on this host and shares host memory.

    Raises:
        ValueError: the shards' schemas differ (names ranks and columns), or they cannot be mapped.
        RuntimeError: from any collective call when a peer is gone; names the call.
    """

    def __init__(
        self,
        table: TrajectoryTable,
        layout: ParallelLayout | None = None,
        *,
        scope: Literal["global", "local"] = "global",
        exchange: Literal["auto", "all_to_all", "mapped"] = "auto",
    ) -> None:
        if scope not in ("global", "local"):
            raise ValueError(f"scope must be 'global' or 'local', got {scope!r}")
        self.table, self.scope = table, scope
        self.comm = Communicator(None if layout is None else layout.group)
        self.layout = ParallelLayout(self.comm.rank, self.comm.size) if layout is None else layout
        table.index.shard = self.comm.rank
        facts = self.comm.gather_objects(
            {
                "spec": table.spec.to_json(),
                "fingerprint": table.spec.fingerprint(),
                "dp_rank": self.layout.dp_rank,
                "dp_size": self.layout.dp_size,
                "stage": self.layout.pp_stage,
                "host": socket.gethostname(),
                **shard_facts(table, exchange),
            }
        )
        _check_schemas(facts)
        self._dp_ranks = [fact["dp_rank"] for fact in facts]
        self._stages = [fact["stage"] for fact in facts]
        self.exchange = choose_exchange(exchange, facts)
        places = (table, self.comm, self._dp_ranks, self._stages)
        self._rows: Exchange
        if self.exchange == "mapped":
            self._rows = Mapped(*places, map_shards(table, self.comm, facts))
        else:
            self._rows = AllToAll(*places)

    @property
    def bytes_received(self) -> int:
        """Bytes of rows and segments that arrived from all shards so far."""
        return self._rows.bytes_received

    @property
    def spec(self) -> TableSpec:
        """The schema and this shard's capacity."""
        return self.table.spec

    def __len__(self) -> int:
        return len(self.table)

    def write(self, columns: Mapping[str, Any], *, priority: float | None = None) -> int:
        """Store a trajectory in this process's shard."""
        return self.table.write(columns, priority=priority)

    def read(self, handle: int) -> dict[str, Tensor]:
        """A trajectory of this process's shard."""
        return self.table.read(handle)

    def attach(self, selector: Selector) -> None:
        """See ``TrajectoryTable.attach``."""
        self.table.attach(selector)

    def count_stale(self, handles: Tensor) -> int:
        """How many of the processes' handles are stale, summed over all (collective)."""
        self.comm.step = "count_stale"
        every = handles if self._all_here else self.comm.gather(handles)
        return self._stale(every)

    def _stale(self, every: Tensor) -> int:
        mine = every if self._all_here else every[(every >> SHARD_SHIFT) == self.comm.rank]
        return int(self.comm.sum(torch.tensor([self.table.count_stale(mine)]))[0])

    @property
    def _all_here(self) -> bool:
        return self.scope == "local" or self.comm.size == 1

    def select(
        self,
        selector: Selector,
        batch_size: int,
        *,
        anchor: Anchor = "uniform",
        generator: Generator | None = None,
    ) -> Selection:
        """Draw ``batch_size`` items for each data-parallel rank (collective); returns this rank's.

        Raises:
            RuntimeError: all shards are empty.
            ValueError: a selector that has no global meaning (Fifo, Lifo, Shuffle: use ``scope="local"``).
        """
        self.attach(selector)
        self.comm.step = "select"
        if self.scope == "local":
            return self.table.select(selector, batch_size, anchor=anchor, generator=generator)
        wanted = self.layout.dp_size * batch_size
        if isinstance(selector, TopK) or (isinstance(selector, Drawn) and not selector.replacement):
            mine, slots, probability, weights = self._candidates(selector, batch_size, generator)
        elif isinstance(selector, Drawn):
            mine, slots, probability, weights = self._draw(selector, batch_size, generator)
        else:
            raise ValueError(
                f"{type(selector).__name__} has no order over shards; use ShardedTable(scope='local')"
            )
        anchors = self._anchors(uniforms(generator, wanted), mine, slots, anchor)
        handles = self.table.index.handles(slots)
        table = torch.zeros((3, wanted), dtype=torch.int64)
        table[0, mine], table[1, mine] = torch.from_numpy(handles), torch.from_numpy(anchors)
        table[2, mine] = torch.from_numpy(probability).view(torch.int64)
        table = self.comm.sum(table).view(3, self.layout.dp_size, batch_size)
        own = self.layout.dp_rank
        drawn = table[2, own].contiguous().view(torch.float64)
        return GlobalSelection(table[0, own], table[1, own], drawn, weights(drawn), table[0], table[1])

    def update_priorities(self, handles: Any, priorities: Any, *, strict: bool = False) -> int:
        """Send priorities to the shards that hold the trajectories (collective); returns stale ones of this
        call.

        A bad value in any process raises ValueError in all, with ``strict`` a stale handle RuntimeError, and
        nothing is changed.
        """
        self.comm.step = "update_priorities"
        keys = torch.as_tensor(handles, dtype=torch.int64).cpu()
        values = torch.as_tensor(priorities).detach().cpu().double()
        bad = torch.tensor([int(not bool((torch.isfinite(values) & (values >= 0)).all()))])
        if int(self.comm.sum(bad)[0]):
            raise ValueError("priorities must be finite and >= 0 in every process")
        owner = keys >> SHARD_SHIFT
        order = torch.argsort(owner, stable=True)
        counts = torch.bincount(owner, minlength=self.comm.size)[: self.comm.size]
        payload = torch.stack([keys[order], values[order].view(torch.int64)], 1)
        received = self.comm.exchange_unknown(payload, counts)
        mine = received[:, 0].contiguous()
        stale = int(self.comm.sum(torch.tensor([self.table.count_stale(mine)]))[0])
        if stale and strict:
            raise RuntimeError(f"{stale} handles are stale, over all processes")
        self.table.update_priorities(mine, received[:, 1].contiguous().view(torch.float64))
        return stale

    def collect(
        self,
        selection: Selection,
        windows: Windows,
        *,
        columns: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        backend: Backend = "auto",
        out: Sequence[Tensor] | None = None,
    ) -> TrajectoryBatch:
        """Gather this process's items from all shards (collective). See ``TrajectoryTable.collect``.

        ``out`` counts only where all items are this process's own; else rows arrive in new memory.

        Raises:
            RuntimeError: a trajectory was evicted after it was selected, in any shard.
        """
        self.comm.step = "collect"
        if self._all_here:
            return self.table.collect(
                selection,
                windows,
                columns=columns or self._own_columns(),
                device=device,
                backend=backend,
                out=out,
            )
        shared = selection if isinstance(selection, GlobalSelection) else self._share(selection)
        stale = self._stale(shared.every_handle())
        if stale:
            raise RuntimeError(f"{stale} handles are stale: select again")
        plans = {stage: self._stage_plan(windows, columns, stage) for stage in set(self._stages)}
        target = torch.device("cpu" if device is None else device)
        return self._rows.collect(shared, plans, target, backend)

    def _gather_masses(self, batch_size: int, *values: float) -> np.ndarray:
        """float64 [processes, values]; ValueError where the processes ask for batches of several sizes."""
        every = self.comm.gather_floats([float(batch_size), *values])
        if (every[:, 0] != batch_size).any():
            sizes = ", ".join(f"{size:.0f}" for size in every[:, 0])
            raise ValueError(f"every process must ask for the same batch_size; they ask for {sizes}")
        return every[:, 1:]

    def _draw(self, selector: Drawn, batch_size: int, generator: Generator | None) -> tuple[Any, ...]:
        wanted = self.layout.dp_size * batch_size
        total, items, smallest = selector.mass()
        masses = self._gather_masses(batch_size, total, float(items), smallest)
        cumulative = np.cumsum(masses[:, 0])
        if not cumulative[-1] > 0:
            if masses[:, 1].sum() == 0:
                raise RuntimeError("table is empty: write a trajectory into a shard before selecting")
            raise ValueError("no trajectory has positive weight")
        point = selector.points(wanted, generator) * cumulative[-1]
        last = int(np.flatnonzero(masses[:, 0])[-1])
        owner = np.minimum(np.searchsorted(cumulative, point, side="right"), last)
        mine = np.flatnonzero(owner == self.comm.rank)
        before = cumulative[self.comm.rank] - total
        slots = probability = np.empty(0)
        if len(mine):
            local = np.clip((point[mine] - before) / total, 0.0, 1.0 - 2.0**-53)
            slots, probability = selector.draw(local)
        share = total / cumulative[-1]
        weights = selector.global_weights(
            int(masses[:, 1].sum()), float(masses[:, 2].min()) / float(cumulative[-1])
        )
        return mine, slots.astype(np.int64), probability.astype(np.float64) * share, weights

    def _candidates(
        self, selector: Selector, batch_size: int, generator: Generator | None
    ) -> tuple[Any, ...]:
        wanted = self.layout.dp_size * batch_size
        slots = self.table.index.candidates()
        weight = np.ones(len(slots))
        if isinstance(selector, Drawn):
            total = selector.mass()[0]
            weight = selector.slot_probability(slots) * total if total > 0 else np.zeros(len(slots))
            # The first W draws of successive sampling are the W smallest of exponential clocks.
            seed = int(uniforms(generator, 1)[0] * 2**53)
            u = np.random.Generator(np.random.Philox(key=[seed, self.comm.rank])).random(len(slots))
            keys = np.full(len(slots), np.inf)
            np.divide(-np.log1p(-u), weight, out=keys, where=weight > 0)
        else:
            assert isinstance(selector, TopK)
            keys = self.table.index.priority[slots].astype(np.float64) * (-1 if selector.largest else 1)
        total_weight = self._gather_masses(batch_size, float(weight.sum())).sum()
        best = np.argsort(keys, kind="stable")[:wanted]
        offered = torch.full((wanted,), float("inf"), dtype=torch.float64)
        offered[: len(best)] = torch.from_numpy(keys[best])
        everyone = self.comm.gather(offered).view(-1)
        order = torch.argsort(everyone, stable=True)[:wanted]
        found = int(torch.isfinite(everyone[order]).sum())
        if found < wanted:
            raise ValueError(f"cannot select {wanted} distinct trajectories from a table of {found}")
        mine = torch.nonzero(order // wanted == self.comm.rank)[:, 0].numpy()
        chosen = best[(order[mine] % wanted).numpy()]
        drawn = isinstance(selector, Drawn)
        probability = weight[chosen] / total_weight if drawn else np.ones(len(chosen))
        return mine, slots[chosen], probability, lambda _: None

    def _anchors(self, u: np.ndarray, mine: np.ndarray, slots: np.ndarray, anchor: Anchor) -> np.ndarray:
        length = self.table.index.length[slots]
        if anchor == "start":
            return np.zeros(len(slots), np.int64)
        if anchor == "end":
            return length - 1
        if anchor != "uniform":
            raise ValueError(f"anchor must be 'uniform', 'start' or 'end', got {anchor!r}")
        return np.minimum((u[mine] * length).astype(np.int64), length - 1)

    def _share(self, selection: Selection) -> GlobalSelection:
        # A selection restored from a saved loader knows only its own items.
        both = self.comm.gather(torch.stack([selection.handles, selection.anchors]))
        by_rank = {dp: both[i] for i, dp in enumerate(self._dp_ranks)}
        every = torch.stack([by_rank[dp] for dp in range(self.layout.dp_size)])
        return GlobalSelection(
            selection.handles,
            selection.anchors,
            selection.probability,
            selection.weight,
            every[:, 0].contiguous(),
            every[:, 1].contiguous(),
        )

    def _own_columns(self) -> Sequence[str] | None:
        by_stage = self.layout.columns_by_stage
        return None if by_stage is None else by_stage[self.layout.pp_stage]

    def _stage_plan(self, windows: Windows, columns: Sequence[str] | None, stage: int) -> ReadPlan:
        by_stage = self.layout.columns_by_stage
        return self.table.plan(windows, columns if by_stage is None else by_stage[stage])


def _check_schemas(facts: Sequence[Mapping[str, Any]]) -> None:
    first = TableSpec.from_json(facts[0]["spec"])
    for rank, fact in enumerate(facts):
        if fact["fingerprint"] != facts[0]["fingerprint"]:
            other = TableSpec.from_json(fact["spec"])
            ours, theirs = _described(first), _described(other)
            columns = sorted(
                name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
            )
            raise ValueError(
                f"table schema differs between ranks: rank 0 and rank {rank} disagree on {', '.join(columns)}"
            )
        if fact["dp_size"] != facts[0]["dp_size"]:
            raise ValueError(
                f"dp_size differs between ranks: 0 has {facts[0]['dp_size']}, {rank} has {fact['dp_size']}"
            )


def _described(spec: TableSpec) -> dict[str, str]:
    return {
        column.name: f"{DTYPE_NAMES[column.dtype]} {column.shape} {column.final} {column.group}"
        for column in spec.all_columns
    } | {derived.name: str(derived.to_dict()) for derived in spec.derived}
