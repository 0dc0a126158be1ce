"""TorchRL: a real ``torchrl.data.ReplayBuffer`` over a trajectory table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl_replay_gear.collect import Windows
from rl_replay_gear.selection import Selection
from rl_replay_gear.selectors import Selector, Uniform
from rl_replay_gear.spec import TableSpec
from rl_replay_gear.storage_format import load_table, save_table
from rl_replay_gear.table import Anchor, TrajectoryTable

try:
    from tensordict import TensorDict, TensorDictBase
    from torchrl.data.replay_buffers import ReplayBuffer, Sampler, Storage, Writer
except ImportError as error:
    raise ImportError('gear_replay_buffer needs TorchRL: pip install "graft-plugins[rl]"') from error


def gear_replay_buffer(
    spec_or_table: TableSpec | TrajectoryTable,
    *,
    window: Windows,
    batch_size: int,
    selector: Selector | None = None,
    anchor: Anchor = "uniform",
    device: torch.device | str | None = None,
    **replay_buffer_kwargs: Any,
) -> ReplayBuffer:
    """A TorchRL replay buffer whose items are trajectories and whose samples are windows.

    ``add(TensorDict [T])`` writes one trajectory, ``extend([TensorDict, ...])`` several; both return handles.
    ``sample()`` returns a TensorDict [B] of columns [B, L, ...] with ``mask``, ``timesteps``, ``handle`` and
    ``weight``; the nested key ``("next", "reward")`` is the column ``"next.reward"``.
    ``update_priority(handles, priority)`` writes priorities back; stale handles are dropped.

    Args:
        spec_or_table: Schema of a new table, or a table.
        window, selector, anchor: As in ``TrajectoryTable.select`` and ``collect``; ``Uniform()`` by default.
        batch_size: B.
        device: Where batches are wanted.
        replay_buffer_kwargs: Others of ``ReplayBuffer`` (transform, prefetch, pin_memory, generator, ...).
    """
    table = spec_or_table if isinstance(spec_or_table, TrajectoryTable) else TrajectoryTable(spec_or_table)
    chosen = Uniform() if selector is None else selector
    table.attach(chosen)
    return ReplayBuffer(
        storage=GearStorage(table, window, device=device),
        sampler=GearSampler(chosen, anchor=anchor),
        writer=GearWriter(),
        batch_size=batch_size,
        collate_fn=_identity,
        **replay_buffer_kwargs,
    )


def slice_sampler_buffer(episodes: Tensor, length: int, batch_size: int, folder: str) -> ReplayBuffer:
    """TorchRL's own way to windows, for comparison: memory-mapped storage and ``SliceSampler``.

    ``episodes`` [N, T, ...] become the entry ``obs``; ``sample()`` returns ``batch_size`` slices end to end.
    """
    from torchrl.data import LazyMemmapStorage, SliceSampler, TensorDictReplayBuffer

    count, steps = episodes.shape[:2]
    buffer = TensorDictReplayBuffer(
        storage=LazyMemmapStorage(count * steps, scratch_dir=folder),
        sampler=SliceSampler(slice_len=length, traj_key="episode", cache_values=True),
        batch_size=batch_size * length,
    )
    for number, episode in enumerate(episodes):
        which = torch.full((steps,), number)
        buffer.extend(TensorDict({"obs": episode, "episode": which}, batch_size=[steps]))
    return buffer


def _identity(data: Any) -> Any:
    return data


class GearStorage(Storage):
    """Holds the table. An index is a handle, or the pair (handles, anchors) that ``GearSampler`` draws."""

    def __init__(
        self, table: TrajectoryTable, window: Windows, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__(table.spec.max_trajectories)
        self.table, self.window, self.target = table, window, device
        self._weights: dict[int, Selection] = {}

    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> None:
        """Write trajectories; the table chooses their places, so ``cursor`` is only reported."""
        raise TypeError("a GearStorage is written through its GearWriter: buffer.add or buffer.extend")

    def write(self, data: TensorDictBase) -> int:
        """Store one trajectory, a TensorDict of batch size [T], and tell TorchRL of it."""
        handle = self.table.write(_columns_of(self.table.spec, data))
        self._set_last_cursor(handle & 0x7FFFFFFF)
        self._bump_mutation_revision()
        for entity in self._attached_entities_iter():
            entity.mark_update(handle)
        return handle

    def get(self, index: Any) -> TensorDictBase:
        """A trajectory for a handle; windows [B, L] for (handles, anchors)."""
        if isinstance(index, tuple):
            handles, anchors = index
            pending = self._weights.pop(id(handles), None)
            selection = pending or Selection(
                handles, anchors, torch.full((len(handles),), float("nan"), dtype=torch.float64)
            )
            batch = self.table.collect(selection, self.window, device=self.target)
            return batch.to_tensordict()
        columns = self.table.read(int(index))
        steps = min(len(values) for values in columns.values())
        entries = {tuple(name.split(".")): values[:steps] for name, values in columns.items()}
        return TensorDict(entries, batch_size=[steps])

    def expect(self, selection: Selection) -> None:
        """Remember the weights of a selection whose index ``get`` receives next."""
        self._weights.clear()
        self._weights[id(selection.handles)] = selection

    def __len__(self) -> int:
        return len(self.table)

    def contains(self, item: Any) -> Any:
        """Whether handles name live trajectories."""
        handles = torch.as_tensor(item, dtype=torch.int64)
        slots, _ = self.table.index.locate(handles.reshape(-1).numpy())
        live = torch.from_numpy(slots >= 0).reshape(handles.shape)
        return bool(live) if live.ndim == 0 else live

    def _empty(self) -> None:
        self.table.clear()
        self._bump_mutation_revision()

    def dumps(self, path: Any) -> None:
        """Save the table (``rl_replay_gear.save_table``)."""
        save_table(self.table, path)

    def loads(self, path: Any) -> None:
        """Load a table of the same schema; samplers attach to it at their next draw."""
        table = load_table(path)
        if table.spec.fingerprint() != self.table.spec.fingerprint():
            raise ValueError(f"{path} holds a table of another schema: {table.spec.to_json()}")
        self.table = table
        self._bump_mutation_revision()

    def state_dict(self) -> dict[str, Any]:
        """Columns end to end, lengths and priorities; handles are not kept (``dumps`` keeps them)."""
        trajectories = [self.table.read(int(handle)) for handle in self.table.handles()]
        columns = {
            column.name: torch.cat([item[column.name] for item in trajectories]) if trajectories else None
            for column in self.table.spec.columns
        }
        return {"columns": columns, "lengths": self.table.lengths(), "priorities": self.table.priorities()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the content."""
        self.table.clear()
        if len(state_dict["lengths"]):
            self.table.write_batch(
                state_dict["columns"], state_dict["lengths"], state_dict["priorities"].numpy()
            )
        self._bump_mutation_revision()


class GearSampler(Sampler):
    """Draws with a selector of this package. ``info`` holds ``handle``, ``weight`` and ``probability``."""

    def __init__(self, selector: Selector, *, anchor: Anchor = "uniform") -> None:
        self.selector, self.anchor = selector, anchor

    def sample(self, storage: GearStorage, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """Indices (handles, anchors), both int64 [B]."""
        if not self.selector.serves(storage.table):
            self.selector.detach()
        selection = storage.table.select(self.selector, batch_size, anchor=self.anchor, generator=self._rng)
        storage.expect(selection)
        weight = torch.ones(batch_size) if selection.weight is None else selection.weight
        info = {"handle": selection.handles, "weight": weight, "probability": selection.probability}
        return (selection.handles, selection.anchors), info

    def update_priority(
        self, index: int | Tensor, priority: float | Tensor, *, storage: GearStorage | None = None
    ) -> None:
        """Set priorities by handle; a [B, 2] index (handle, anchor) is understood too."""
        if storage is None:
            raise ValueError("update_priority needs the storage; call it on the buffer")
        handles = torch.as_tensor(index, dtype=torch.int64)
        if handles.ndim == 2:
            handles = handles[:, 0]
        handles = handles.reshape(-1)
        values = torch.as_tensor(priority, dtype=torch.float64).reshape(-1).expand(len(handles))
        storage.table.update_priorities(handles, values)

    def _empty(self) -> None:
        self.selector.load_state_dict({"remaining": []})

    def state_dict(self) -> dict[str, Any]:
        """State of the selector."""
        return self.selector.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        self.selector.load_state_dict(state_dict)

    def dumps(self, path: Any) -> None:
        """The state as JSON."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "selector.json").write_text(json.dumps(self.state_dict()))

    def loads(self, path: Any) -> None:
        """Inverse of ``dumps``."""
        self.load_state_dict(json.loads((Path(path) / "selector.json").read_text()))


class GearWriter(Writer):
    """Writes whole trajectories; an index is the trajectory's handle."""

    def add(self, data: TensorDictBase) -> int:
        """Store one trajectory [T]."""
        return self._storage.write(data)

    def extend(self, data: Sequence[TensorDictBase] | TensorDictBase) -> Tensor:
        """Store several: a list of TensorDicts [T], or one TensorDict [N, T]."""
        return torch.tensor([self._storage.write(item) for item in data], dtype=torch.int64)

    def _empty(self, empty_write_count: bool = True) -> None:
        """Nothing is kept here."""

    def dumps(self, path: Any) -> None:
        """Nothing is kept here."""

    def loads(self, path: Any) -> None:
        """Nothing is kept here."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept here."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing is kept here."""


def _columns_of(spec: TableSpec, data: TensorDictBase) -> dict[str, Tensor]:
    missing = [c.name for c in spec.columns if tuple(c.name.split(".")) not in data.keys(True, True)]
    if missing:
        have = [".".join(key) if isinstance(key, tuple) else key for key in data.keys(True, True)]
        raise KeyError(f"missing columns: {', '.join(missing)} (entries: {', '.join(have)})")
    return {
        column.name: _fitted(data.get(tuple(column.name.split("."))), column.shape) for column in spec.columns
    }


def _fitted(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    # TorchRL keeps rewards and done flags as [T, 1].
    value = value.detach().cpu()
    return value.squeeze(-1) if shape == () and value.ndim == 2 and value.shape[-1] == 1 else value
