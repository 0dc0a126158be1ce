"""Where feature rows lie: hottest in the GPUs of each NVLink clique, then host memory, then disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

HOST, DISK = -1, -2

Policy = Literal["p2p_clique_replicate", "device_replicate", "auto"]
_FORMAT = "pyg_quiver.placement/1"


@dataclass(frozen=True)
class DeviceTopology:
    """Which GPUs can read each other's memory, as data: plans need no GPU.

    Attributes:
        peer: bool ``[D, D]``; ``peer[i, j]``: i reads j's memory. A link needs both directions.
        free_bytes: free memory of each device, where known; budgets must not exceed it.
    """

    peer: Tensor
    free_bytes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.peer.dtype != torch.bool or self.peer.dim() != 2 or self.peer.shape[0] != self.peer.shape[1]:
            raise ValueError(f"peer is {self.peer.dtype} {tuple(self.peer.shape)}; it must be bool [D, D]")

    @classmethod
    def detect(cls) -> DeviceTopology:
        """The CUDA devices of this process and their links; enables peer access."""
        from tiered_memory.gather import peer_access

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        peer = torch.tensor(
            [[peer_access(i, j) for j in range(count)] for i in range(count)], dtype=torch.bool
        )
        free = tuple(torch.cuda.mem_get_info(i)[0] for i in range(count))
        return cls(peer.reshape(count, count), free)

    def __len__(self) -> int:
        return self.peer.shape[0]

    def cliques(self) -> list[list[int]]:
        """Groups in which every pair is linked; each device joins the first group that takes it."""
        linked = self.peer & self.peer.t()
        groups: list[list[int]] = []
        for device in range(len(self)):
            home = next((g for g in groups if all(bool(linked[device, other]) for other in g)), None)
            if home is None:
                groups.append([device])
            else:
                home.append(device)
        return groups


@dataclass(frozen=True)
class PlacementPlan:
    """Rows of every device, of the host and of the disk, and how often each is expected to be read.

    Attributes:
        device_rows: for each device its row ids in slot order, int64.
        host_rows: row ids in host memory, likewise.
        disk_rows: the rest.
        cliques: devices that read each other's rows.
        hotness: float64 ``[N]`` expected reads.
        row_bytes: bytes of a row.
    """

    device_rows: tuple[Tensor, ...]
    host_rows: Tensor
    disk_rows: Tensor
    cliques: tuple[tuple[int, ...], ...]
    hotness: Tensor
    row_bytes: int
    _locations: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_rows(self) -> int:
        """N."""
        return self.hotness.numel()

    def rows(self, place: int) -> Tensor:
        """Row ids at a device, :data:`HOST` or :data:`DISK`, in slot order."""
        if place == HOST:
            return self.host_rows
        if place == DISK:
            return self.disk_rows
        return self.device_rows[self._checked(place)]

    def bytes(self, place: int) -> int:
        """Bytes held there."""
        return self.rows(place).numel() * self.row_bytes

    def location(self, device: int) -> Tensor:
        """Where a reader finds each row: a device id, HOST or DISK; int8 ``[N]``. Own rows come first."""
        if device not in self._locations:
            where = torch.full((self.num_rows,), DISK, dtype=torch.int8)
            where[self.host_rows] = HOST
            for owner in self.clique_of(device):
                where[self.device_rows[owner]] = owner
            where[self.device_rows[device]] = device
            self._locations[device] = where
        return self._locations[device]

    def clique_of(self, device: int) -> tuple[int, ...]:
        """The devices whose rows a reader can use, itself among them."""
        self._checked(device)
        return next(group for group in self.cliques if device in group)

    def hit_rate(self, device: int) -> dict[str, float]:
        """Share of a reader's expected reads by tier: local, peer, host, disk."""
        where = self.location(device)
        total = float(self.hotness.sum()) or 1.0
        local = float(self.hotness[where == device].sum()) / total
        peer = float(self.hotness[(where >= 0) & (where != device)].sum()) / total
        host = float(self.hotness[where == HOST].sum()) / total
        return {"local": local, "peer": peer, "host": host, "disk": max(0.0, 1.0 - local - peer - host)}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        tensors = {f"device_{i}": rows.contiguous() for i, rows in enumerate(self.device_rows)}
        tensors |= {"host": self.host_rows, "disk": self.disk_rows, "hotness": self.hotness}
        header = {"format": _FORMAT, "row_bytes": self.row_bytes, "cliques": self.cliques}
        # Tensors that share memory cannot be stored together.
        save_file(
            {name: tensor.clone() for name, tensor in tensors.items()}, path, {"plan": json.dumps(header)}
        )

    @classmethod
    def load(cls, path: str | Path) -> PlacementPlan:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is something else.
        """
        try:
            opened = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path}: not a placement plan ({error})") from error
        with opened as file:
            header = json.loads((file.metadata() or {}).get("plan", "{}"))
            if header.get("format") != _FORMAT:
                raise ValueError(f"{path}: format {header.get('format')!r}, expected {_FORMAT!r}")
            devices = sum(name.startswith("device_") for name in file.keys())  # noqa: SIM118
            return cls(
                tuple(file.get_tensor(f"device_{i}") for i in range(devices)),
                file.get_tensor("host"),
                file.get_tensor("disk"),
                tuple(tuple(group) for group in header["cliques"]),
                file.get_tensor("hotness"),
                header["row_bytes"],
            )

    def _checked(self, device: int) -> int:
        if not 0 <= device < len(self.device_rows):
            raise IndexError(f"device {device} is out of range [0, {len(self.device_rows)})")
        return device


def plan_placement(
    hotness: Tensor,
    row_bytes: int,
    devices: DeviceTopology,
    *,
    device_budget: int | Sequence[int],
    host_budget: int | None = None,
    policy: Policy = "p2p_clique_replicate",
    bandwidth: Mapping[str, float] | None = None,
) -> PlacementPlan:
    """Place rows by hotness.

    - "p2p_clique_replicate": every clique holds each of its hottest rows once, dealt round-robin by hotness.
    - "device_replicate": every device holds the hottest rows itself.
    - "auto": in every clique the very hottest rows on each device and the next ones once, with the number of
      the former chosen for the least modelled time (``bytes / bandwidth`` of each read's tier).

    Args:
        hotness: ``[N]`` expected reads (see :func:`pyg_quiver.fap`).
        row_bytes: bytes of a row.
        devices: GPUs and their links.
        device_budget: bytes on each device.
        host_budget: bytes of host memory; None: all that is needed.
        policy: see above.
        bandwidth: bytes per second of "local", "peer", "host" and "disk" (policy "auto").

    Raises:
        ValueError: negative budgets or hotness, a budget above the free memory, "auto" without bandwidth.
    """
    budgets = [device_budget] * len(devices) if isinstance(device_budget, int) else list(device_budget)
    _check_plan_arguments(hotness, row_bytes, devices, budgets, host_budget)
    order = torch.argsort(hotness.double(), descending=True, stable=True)
    capacities = [min(budget // row_bytes, order.numel()) for budget in budgets]
    cliques = [[d] for d in range(len(devices))] if policy == "device_replicate" else devices.cliques()
    if policy not in ("p2p_clique_replicate", "device_replicate", "auto"):
        raise ValueError(
            f"policy is {policy!r}; it must be 'p2p_clique_replicate', 'device_replicate' or 'auto'"
        )
    host_rows_limit = order.numel() if host_budget is None else host_budget // row_bytes
    rows: list[Tensor] = [order[:0]] * len(devices)
    covered = []
    for clique in cliques:
        replicated = 0
        if policy == "auto":
            held = [capacities[d] for d in clique]
            replicated = _rows_to_replicate(hotness[order].double(), held, host_rows_limit, bandwidth)
        dealt, end = _deal([capacities[d] - replicated for d in clique], order.numel() - replicated)
        for device, slots in zip(clique, dealt, strict=True):
            rows[device] = torch.cat([order[:replicated], order[replicated + slots]])
        covered.append(replicated + end)
    first_on_host = min(covered, default=0)
    last_on_host = min(first_on_host + host_rows_limit, order.numel())
    return PlacementPlan(
        tuple(rows), order[first_on_host:last_on_host].clone(), order[last_on_host:].clone(),
        tuple(tuple(clique) for clique in cliques), hotness.double(), row_bytes,
    )  # fmt: skip


def _check_plan_arguments(
    hotness: Tensor, row_bytes: int, devices: DeviceTopology, budgets: list[int], host_budget: int | None
) -> None:
    if row_bytes < 1:
        raise ValueError(f"row_bytes is {row_bytes}; it must be at least 1")
    if hotness.dim() != 1 or (hotness.numel() and not bool((hotness >= 0).all())):
        raise ValueError("hotness must be [N] expected reads, none negative")
    if len(budgets) != len(devices):
        raise ValueError(f"device_budget has {len(budgets)} entries for {len(devices)} devices")
    for device, budget in enumerate(budgets):
        if budget < 0:
            raise ValueError(f"device {device}: budget {budget} is negative")
        if devices.free_bytes is not None and budget > devices.free_bytes[device]:
            free = devices.free_bytes[device]
            raise ValueError(
                f"device {device}: budget {budget / 1e9:.1f} GB exceeds the free {free / 1e9:.1f} GB"
            )
    if host_budget is not None and host_budget < 0:
        raise ValueError(f"host_budget {host_budget} is negative")


def _deal(capacities: list[int], count: int) -> tuple[list[Tensor], int]:
    """Ranks 0.. dealt round-robin to devices until all are full; (ranks of each device, ranks dealt)."""
    total = min(sum(capacities), count)
    # In round t every device that still has room takes one: rank order is (round, device).
    owner = torch.cat([torch.full((c,), d, dtype=torch.int64) for d, c in enumerate(capacities)])
    turn = torch.cat([torch.arange(c) for c in capacities])
    by_rank = owner[torch.argsort(turn * len(capacities) + owner, stable=True)][:total]
    return [(by_rank == d).nonzero().squeeze(1) for d in range(len(capacities))], total


def _rows_to_replicate(
    hotness: Tensor, capacities: list[int], host_rows: int, bandwidth: Mapping[str, float] | None
) -> int:
    """How many of the hottest rows each device of a clique should hold itself: the least modelled time."""
    missing = {"local", "peer", "host", "disk"} - set(bandwidth or ())
    if bandwidth is None or missing:
        raise ValueError(f"policy='auto' needs bandwidth in B/s of {', '.join(sorted(missing))}")
    members = len(capacities)
    if members == 1:
        return 0
    reads = torch.cat([hotness.new_zeros(1), hotness.cumsum(0)])
    replicated = torch.arange(min(capacities) + 1)
    split_end = (replicated + sum(capacities) - members * replicated).clamp(max=hotness.numel())
    host_end = (split_end + host_rows).clamp(max=hotness.numel())
    split = reads[split_end] - reads[replicated]
    seconds = (
        (reads[replicated] + split / members) / bandwidth["local"]
        + split * (members - 1) / members / bandwidth["peer"]
        + (reads[host_end] - reads[split_end]) / bandwidth["host"]
        + (reads[-1] - reads[host_end]) / bandwidth["disk"]
    )
    return int(seconds.argmin())
