"""Existing data sets as tables: Minari, and HDF5 files in the manner of D4RL."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rl_replay_gear.derived import Derived
from rl_replay_gear.spec import TableSpec
from rl_replay_gear.table import TrajectoryTable


def _fill(
    episodes: Sequence[Mapping[str, Any]], max_steps: int | None, derived: tuple[Derived, ...]
) -> TrajectoryTable:
    if not episodes:
        raise ValueError("the data set has no episode")
    example = episodes[0]
    steps = sum(min(len(value) for value in episode.values()) for episode in episodes)
    inferred = TableSpec.infer(example, max_steps or steps, len(episodes))
    spec = TableSpec(inferred.columns, inferred.max_steps, inferred.max_trajectories, derived)
    table = TrajectoryTable(spec)
    for episode in episodes:
        table.write(episode)
    return table


def import_minari(
    dataset: Any, *, max_steps: int | None = None, derived: tuple[Derived, ...] = ()
) -> TrajectoryTable:
    """A table of the episodes of a ``minari.MinariDataset`` (or its id, if it is on disk).

    Columns ``observations`` (final), ``actions``, ``rewards`` (float32), ``terminations``, ``truncations``;
    dict and tuple spaces become ``observations.key`` and ``observations.0``.

    Args:
        dataset: The data set or its id.
        max_steps: Capacity in steps; the data set's size by default. With less, the oldest episodes go.
        derived: Columns to compute, e.g. ``ReturnsToGo()``.
    """
    if isinstance(dataset, str):
        try:
            import minari
        except ImportError as error:
            raise ImportError("import_minari by id needs minari: pip install minari") from error
        dataset = minari.load_dataset(dataset)
    episodes = []
    for episode in dataset.iterate_episodes():
        columns: dict[str, Any] = {}
        _flatten("observations", episode.observations, columns)
        _flatten("actions", episode.actions, columns)
        columns["rewards"] = np.asarray(episode.rewards, np.float32)
        columns["terminations"] = np.asarray(episode.terminations, np.bool_)
        columns["truncations"] = np.asarray(episode.truncations, np.bool_)
        episodes.append({name: torch.as_tensor(np.asarray(value)) for name, value in columns.items()})
    return _fill(episodes, max_steps, derived)


def _flatten(prefix: str, value: Any, out: dict[str, Any]) -> None:
    if isinstance(value, Mapping | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            _flatten(f"{prefix}.{key}", item, out)
    else:
        out[prefix] = value


def import_hdf5(
    path: str | os.PathLike[str],
    columns: Mapping[str, str],
    *,
    terminals: str = "terminals",
    timeouts: str = "timeouts",
    derived: tuple[Derived, ...] = (),
) -> TrajectoryTable:
    """A table of the episodes of a flat HDF5 file (D4RL): steps end to end, cut after terminals and timeouts.

    Args:
        path: The file.
        columns: Column name -> HDF5 data set.
        terminals, timeouts: Data sets of end flags; a missing ``timeouts`` counts as all False. Steps after
            the last flag form a last episode.
        derived: Columns to compute.

    Raises:
        KeyError: a data set is missing; names those there are.
        ImportError: h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError("import_hdf5 needs h5py: pip install h5py") from error
    with h5py.File(path, "r") as file:
        for name in [*columns.values(), terminals]:
            if name not in file:
                raise KeyError(f"{path} has no data set {name!r} (data sets: {', '.join(file)})")
        data = {column: torch.from_numpy(file[name][()]) for column, name in columns.items()}
        ends = np.asarray(file[terminals][()], np.bool_)
        if timeouts in file:
            ends = ends | np.asarray(file[timeouts][()], np.bool_)
    stops = (np.flatnonzero(ends) + 1).tolist()
    if not stops or stops[-1] < len(ends):
        stops.append(len(ends))
    starts = [0, *stops[:-1]]
    episodes = [
        {name: value[a:b] for name, value in data.items()} for a, b in zip(starts, stops, strict=True)
    ]
    return _fill(episodes, None, derived)
