"""Where a process stands among the data-parallel, pipeline and tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class ParallelLayout:
    """Where this process stands. Processes of one ``dp_rank`` receive the same batch.

    Args:
        dp_rank, dp_size: Data-parallel position.
        pp_stage, pp_size, tp_rank, tp_size: Pipeline and tensor-parallel positions.
        group: Process group of all shards; None is the default group.
        columns_by_stage: Pipeline stage -> columns it needs; other columns do not travel to it.
    """

    dp_rank: int
    dp_size: int
    pp_stage: int = 0
    pp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    group: Any = None
    columns_by_stage: Mapping[int, Sequence[str]] | None = None

    @classmethod
    def single(cls) -> ParallelLayout:
        """One process."""
        return cls(0, 1)

    @classmethod
    def from_mesh(
        cls, mesh: Any, *, columns_by_stage: Mapping[int, Sequence[str]] | None = None
    ) -> ParallelLayout:
        """From a ``torch.distributed.device_mesh.DeviceMesh`` with dimensions among ``dp``, ``pp``,
        ``tp``.
        """
        names = mesh.mesh_dim_names or ()
        if "dp" not in names:
            raise ValueError(f"the mesh needs a dimension named 'dp', it has {names}")
        place = {name: (mesh.get_local_rank(name), mesh.size(names.index(name))) for name in names}
        pp, tp = place.get("pp", (0, 1)), place.get("tp", (0, 1))
        return cls(*place["dp"], *pp, *tp, columns_by_stage=columns_by_stage)

    @classmethod
    def from_deepspeed(
        cls, engine: Any, *, columns_by_stage: Mapping[int, Sequence[str]] | None = None
    ) -> ParallelLayout:
        """From a DeepSpeed engine: its ``mpu`` or pipeline grid where it has one, else its data-parallel
        group.
        """
        grid = getattr(engine, "grid", None) or getattr(engine, "mpu", None)
        if grid is None:
            return cls(
                dist.get_rank(engine.data_parallel_group),
                dist.get_world_size(engine.data_parallel_group),
                columns_by_stage=columns_by_stage,
            )
        pipe = getattr(grid, "get_pipe_parallel_rank", None)
        # What DeepSpeed's pipeline grid calls model parallel spans the stages too.
        tensor = next(
            name
            for name in ("get_tensor_model_parallel", "get_slice_parallel", "get_model_parallel")
            if hasattr(grid, f"{name}_rank")
        )
        return cls(
            grid.get_data_parallel_rank(),
            grid.get_data_parallel_world_size(),
            pipe() if pipe else 0,
            grid.get_pipe_parallel_world_size() if pipe else 1,
            getattr(grid, f"{tensor}_rank")(),
            getattr(grid, f"{tensor}_world_size")(),
            columns_by_stage=columns_by_stage,
        )
