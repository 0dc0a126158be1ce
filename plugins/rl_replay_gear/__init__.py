"""Trajectory replay across memory tiers, after GEAR (Wang et al., ICML 2023, arXiv 2310.05205).

Data flows one way: writer -> table -> selector -> windows -> batch -> loader -> learner; only priorities
come back. Names are resolved on first use, so that importing the package touches no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl_replay_gear.batch import TrajectoryBatch
    from rl_replay_gear.channel import SharedMemoryChannel
    from rl_replay_gear.derived import Derived, GeneralizedAdvantage, NStepReturn, ReturnsToGo
    from rl_replay_gear.disk import ColdTable
    from rl_replay_gear.graphed import GraphedCollect
    from rl_replay_gear.importers import import_hdf5, import_minari
    from rl_replay_gear.layout import ParallelLayout
    from rl_replay_gear.limiter import RateLimiter
    from rl_replay_gear.loader import TrajectoryLoader
    from rl_replay_gear.mixture import Mixture
    from rl_replay_gear.prefix import PrefixSumTree
    from rl_replay_gear.selection import Selection
    from rl_replay_gear.selectors import Fifo, Lifo, Prioritized, Selector, Shuffle, TopK, TopShare, Uniform
    from rl_replay_gear.sequence import (
        RunningMoments,
        agents_as_sequence,
        chain_episodes,
        prepend_prompt,
        sequence_priority,
        split_burn_in,
    )
    from rl_replay_gear.sharded import ShardedTable
    from rl_replay_gear.spec import ColumnSpec, TableSpec
    from rl_replay_gear.storage_format import load_table, save_table
    from rl_replay_gear.table import TrajectoryTable
    from rl_replay_gear.tokens import Discretizer, TokenStream, merge_streams, tokenize
    from rl_replay_gear.window import Window
    from rl_replay_gear.writer import TrajectoryWriter

_NAMES_IN = {
    "batch": ("TrajectoryBatch",),
    "channel": ("SharedMemoryChannel",),
    "derived": ("Derived", "GeneralizedAdvantage", "NStepReturn", "ReturnsToGo"),
    "disk": ("ColdTable",),
    "graphed": ("GraphedCollect",),
    "importers": ("import_hdf5", "import_minari"),
    "layout": ("ParallelLayout",),
    "limiter": ("RateLimiter",),
    "loader": ("TrajectoryLoader",),
    "mixture": ("Mixture",),
    "prefix": ("PrefixSumTree",),
    "selectors": ("Fifo", "Lifo", "Prioritized", "Selector", "Shuffle", "TopK", "TopShare", "Uniform"),
    "sequence": (
        "RunningMoments",
        "agents_as_sequence",
        "chain_episodes",
        "prepend_prompt",
        "sequence_priority",
        "split_burn_in",
    ),
    "sharded": ("ShardedTable",),
    "spec": ("ColumnSpec", "TableSpec"),
    "storage_format": ("load_table", "save_table"),
    "selection": ("Selection",),
    "table": ("TrajectoryTable",),
    "tokens": ("Discretizer", "TokenStream", "merge_streams", "tokenize"),
    "window": ("Window",),
    "writer": ("TrajectoryWriter",),
}
_MODULE_OF = {name: module for module, names in _NAMES_IN.items() for name in names}

__all__ = [
    "ColdTable",
    "ColumnSpec",
    "Derived",
    "Discretizer",
    "Fifo",
    "GeneralizedAdvantage",
    "GraphedCollect",
    "Lifo",
    "Mixture",
    "NStepReturn",
    "ParallelLayout",
    "PrefixSumTree",
    "Prioritized",
    "RateLimiter",
    "ReturnsToGo",
    "RunningMoments",
    "Selection",
    "Selector",
    "ShardedTable",
    "SharedMemoryChannel",
    "Shuffle",
    "TableSpec",
    "TokenStream",
    "TopK",
    "TopShare",
    "TrajectoryBatch",
    "TrajectoryLoader",
    "TrajectoryTable",
    "TrajectoryWriter",
    "Uniform",
    "Window",
    "agents_as_sequence",
    "chain_episodes",
    "import_hdf5",
    "import_minari",
    "load_table",
    "merge_streams",
    "prepend_prompt",
    "save_table",
    "sequence_priority",
    "split_burn_in",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    """Import the module that defines ``name`` on first use (PEP 562)."""
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
