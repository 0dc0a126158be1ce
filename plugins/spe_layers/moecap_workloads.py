"""The workload ``spe.fit``: fit a picture's function of two coordinates with one first layer or another."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moecap_eval.workload import ArmConfig, Axis, BlockResult, Item, RunContext, Sample, System, Workload
from spe_layers.baselines import FIRST_LAYERS, build_first_layer
from spe_layers.layer import SPE
from spe_layers.selection import select_bands
from spe_layers.signals import power_law_signal

OPTIONS = {"encoding": "spe", "bands": "auto", "kernel": "eager"}
PARAMS = {"side": 32, "steps": 150, "learning_rate": 3e-3, "width": 64, "fits": 4}
KERNELS = {"fused": "triton", "eager": "eager"}


class FitWorkload(Workload):
    """Each item is one surface to fit; the same steps for every arm, then the PSNR on held-out points.

    Arms: ``{encoding: a key of FIRST_LAYERS, bands: auto | number, kernel: fused | eager}``. Params: ``side``
    of the square grid of points, ``steps``, ``learning_rate``, ``width``, ``fits`` (number of surfaces).
    """

    name: ClassVar[str] = "spe.fit"
    work_unit: ClassVar[str] = "optimiser step x point"
    axes: ClassVar[tuple[Axis, ...]] = (
        Axis("psnr_db", "accuracy", "dB", "higher", level="item", margin=0.5, headline=True),
        Axis("step_s", "performance", "s", "lower", level="item", headline=True),
        Axis("output_bytes_per_s", "performance", "B/s", "higher", level="item"),
    )

    def items(self, params: Mapping[str, Any], seed: int) -> Sequence[Item]:
        """One seed a surface."""
        count = _known(params, PARAMS, "spe.fit")["fits"]
        return [Item(f"surface-{seed}-{index}", seed * 1000 + index) for index in range(count)]

    def open(self, arm: ArmConfig, context: RunContext) -> System:
        """Check the arm; every fit builds its own network."""
        options = _known(arm.options, OPTIONS, f"arm {arm.name!r} of spe.fit")
        if options["encoding"] not in FIRST_LAYERS:
            raise ValueError(
                f"encoding must be one of {', '.join(FIRST_LAYERS)}, got {options['encoding']!r}"
            )
        if options["kernel"] not in KERNELS:
            raise ValueError(f"kernel must be fused or eager, got {options['kernel']!r}")
        if options["bands"] != "auto" and not (isinstance(options["bands"], int) and options["bands"] >= 0):
            raise ValueError(f"bands must be auto or a number of octaves, got {options['bands']!r}")
        if options["kernel"] == "fused" and not torch.cuda.is_available():
            raise ValueError("kernel: fused needs a CUDA device; use eager")
        return _FitSystem(options, _known(context.params, PARAMS, "spe.fit"))


def _known(given: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Defaults overridden by what is given."""
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ValueError(f"{where}: unknown option {unknown[0]!r}, known: {', '.join(defaults)}")
    return {**defaults, **given}


class _FitSystem(System):
    def __init__(self, options: dict[str, Any], params: dict[str, Any]) -> None:
        self.options, self.params = options, params
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def run(self, items: Sequence[Item]) -> BlockResult:
        """Fit every item's surface."""
        samples = [self._fit(item) for item in items]
        points = self.params["side"] ** 2 // 2
        return BlockResult(work=float(len(items) * self.params["steps"] * points), samples=samples)

    def _fit(self, item: Item) -> Sample:
        x, y, train = _surface(self.params["side"], item.payload)
        torch.manual_seed(item.payload)
        network = self._network(x[train], y[train]).to(self.device)
        x, y, train = x.to(self.device), y.to(self.device), train.to(self.device)
        steps = self.params["steps"]
        optimiser = torch.optim.Adam(network.parameters(), lr=self.params["learning_rate"])
        start = time.perf_counter()
        for _ in range(steps):
            optimiser.zero_grad()
            (network(x[train]).squeeze(-1) - y[train]).square().mean().backward()
            optimiser.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        step_s = (time.perf_counter() - start) / steps
        with torch.no_grad():
            error = (network(x[~train]).squeeze(-1) - y[~train]).square().mean()
        written = 4 * int(train.sum()) * self.params["width"]
        values = {
            "psnr_db": float(-10 * error.log10()),
            "step_s": step_s,
            "output_bytes_per_s": written / step_s,
        }
        return Sample(item.id, values)

    def _network(self, x: Tensor, y: Tensor) -> nn.Module:
        width, bands = self.params["width"], self.options["bands"]
        chosen = select_bands(x, y, max_points=512) if bands == "auto" else bands
        first = build_first_layer(self.options["encoding"], 2, width, chosen)
        if isinstance(first, SPE):
            if bands == "auto":
                first.init = "calibrated"
                first.reset_parameters()
            first.backend = KERNELS[self.options["kernel"]]  # type: ignore[assignment]
        return nn.Sequential(first, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def memory_bytes(self) -> dict[str, int]:
        """Peak of device memory, where there is a device."""
        return {"hbm": torch.cuda.max_memory_allocated()} if self.device.type == "cuda" else {}


def _surface(side: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A sum of two power-law signals, one a coordinate, on [-1, 1]^2, of range 1; half of it trains."""
    rows, columns = (power_law_signal(4 * side, 1.0, seed=2 * seed + i)[:side].float() for i in range(2))
    values = (rows[:, None] + columns[None, :]).flatten()
    values = (values - values.min()) / (values.max() - values.min())
    axis = torch.linspace(-1, 1, side)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    index = torch.arange(side)
    return grid, values, ((index[:, None] + index[None, :]) % 2 == 0).flatten()
