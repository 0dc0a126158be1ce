"""Flags for scripts with Megatron's argument parser, and a schedule of changes known beforehand."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_tenplex.layout import ParallelConfig
from megatron_tenplex.tensor_store import TensorStore

if TYPE_CHECKING:
    from megatron_tenplex.reconfigure import Reconfigurator, TrainingState


def add_tenplex_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags; usable as Megatron's ``extra_args_provider``."""
    group = parser.add_argument_group("tenplex")
    group.add_argument(
        "--tenplex-schedule",
        metavar="FILE",
        help='JSON: {"iteration": "tp=2,pp=1", ...}, changes at boundaries',
    )
    group.add_argument(
        "--tenplex-store", metavar="FOLDER", help="replicas in shared memory, e.g. /dev/shm/job"
    )
    group.add_argument("--tenplex-host", default=os.uname().nodename, help="name of this host in the store")
    group.add_argument("--tenplex-redundancy", type=int, default=1, help="copies on other hosts")
    group.add_argument(
        "--tenplex-snapshot-every", type=int, default=0, metavar="N", help="iterations; 0: never"
    )
    group.add_argument(
        "--tenplex-verify", action="store_true", help="compare digests before and after a change"
    )
    return parser


def store_from_args(arguments: argparse.Namespace) -> TensorStore | None:
    """The store that the flags name.

    Raises:
        ValueError: snapshots are asked for without a store.
    """
    if arguments.tenplex_store is None:
        if arguments.tenplex_snapshot_every:
            raise ValueError("--tenplex-snapshot-every needs --tenplex-store")
        return None
    return TensorStore(arguments.tenplex_store, host=arguments.tenplex_host)


class Schedule:
    """Changes of layout at given iterations, the same on all workers.

    Args:
        changes: iteration -> layout that holds from then on.
        snapshot_every: iterations between replicas; 0 for none.
    """

    def __init__(self, changes: Mapping[int, ParallelConfig], *, snapshot_every: int = 0) -> None:
        if any(iteration < 1 for iteration in changes):
            raise ValueError(f"changes must lie at iteration 1 or later, got {min(changes)}")
        self.changes = dict(sorted(changes.items()))
        self.snapshot_every = snapshot_every

    @classmethod
    def from_args(cls, arguments: argparse.Namespace) -> Schedule:
        """The schedule of ``--tenplex-schedule``; empty without.

        Raises:
            ValueError: the file is not what the flag's help says.
        """
        if arguments.tenplex_schedule is None:
            return cls({}, snapshot_every=arguments.tenplex_snapshot_every)
        path = arguments.tenplex_schedule
        try:
            with open(path) as file:
                content = json.load(file)
            changes = {int(iteration): ParallelConfig.parse(text) for iteration, text in content.items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is not a schedule of changes: {error}") from error
        return cls(changes, snapshot_every=arguments.tenplex_snapshot_every)

    def at_boundary(self, elastic: Reconfigurator) -> TrainingState | None:
        """Call after every iteration, on every worker: snapshot and change of layout where they are due.

        Workers without a role wait here until the others have done an iteration.
        """
        mine = -1 if elastic.state is None else elastic.state.iteration
        idle = len(elastic.world.members) < elastic.world.num_workers
        iteration = max(elastic.world.all_gather_json(mine)) if idle else mine
        if self.snapshot_every and iteration % self.snapshot_every == 0 and elastic.store is not None:
            elastic.snapshot()
        if iteration in self.changes:
            return elastic.reconfigure(self.changes[iteration])
        return elastic.state
