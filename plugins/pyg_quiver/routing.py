"""Which sampler a batch goes to: cost measured against PSGS, and routers that use it."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

if TYPE_CHECKING:
    from pyg_quiver.sampler import QuiverSampler

_FORMAT = "pyg_quiver.calibration/1"


@dataclass(frozen=True)
class CostModel:
    """Seconds of a batch: ``intercept_s + slope_s * psgs``."""

    intercept_s: float
    slope_s: float

    def predict(self, psgs: float) -> float:
        """Expected seconds of a batch of this PSGS."""
        return self.intercept_s + self.slope_s * psgs

    @classmethod
    def fit(cls, psgs: Sequence[float], seconds: Sequence[float]) -> CostModel:
        """Fit measured batches; a few slow ones do not matter.

        Batches of equal size stand for their median. The slope is the weighted median of all slopes between
        sizes (Theil-Sen, weighted by the distance), the intercept the median residual of the smaller half.

        Raises:
            ValueError: fewer than two sizes.
        """
        groups: dict[float, list[float]] = {}
        for size, value in zip(psgs, seconds, strict=True):
            groups.setdefault(float(size), []).append(float(value))
        sizes = np.array(sorted(groups))
        if len(sizes) < 2:
            raise ValueError(f"CostModel.fit needs batches of two sizes or more, got {len(sizes)}")
        medians = np.array([statistics.median(groups[size]) for size in sizes])
        i, j = np.triu_indices(len(sizes), 1)
        distance = sizes[j] - sizes[i]
        slopes = (medians[j] - medians[i]) / distance
        order = np.argsort(slopes)
        weight = np.cumsum(distance[order])
        slope = max(float(slopes[order][np.searchsorted(weight, weight[-1] / 2)]), 0.0)
        small = slice(0, max(len(sizes) // 2, 1))
        intercept = float(np.median(medians[small] - slope * sizes[small]))
        return cls(max(intercept, 0.0), slope)


@dataclass(frozen=True)
class CalibrationProfile:
    """What calibration found, and under which conditions.

    Attributes:
        cost: mean cost of each route.
        context: conditions (graph, fan-outs, processor, GPU, versions); a profile holds only under the same.
        worst: cost from the slowest measurements of each size, for latency.
    """

    cost: dict[str, CostModel]
    context: dict[str, str]
    worst: dict[str, CostModel] = field(default_factory=dict)

    def require(self, context: Mapping[str, str]) -> None:
        """Refuse a profile made under other conditions.

        Raises:
            ValueError: the first key that differs, with both values.
        """
        for key in sorted({*self.context, *context}):
            mine, given = self.context.get(key), context.get(key)
            if mine != given:
                raise ValueError(f"profile was calibrated for {key}={mine!r}, this is {key}={given!r}")

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        content = {"format": _FORMAT, **asdict(self)}
        Path(path).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CalibrationProfile:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is something else.
        """
        try:
            content = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not a calibration profile ({error})") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path}: not a calibration profile")
        if content.get("format") != _FORMAT:
            raise ValueError(f"{path}: format {content.get('format')!r}, expected {_FORMAT!r}")
        models = {
            part: {route: CostModel(**values) for route, values in content[part].items()}
            for part in ("cost", "worst")
        }
        return cls(models["cost"], content["context"], models["worst"])


def calibration_context(samplers: Mapping[str, QuiverSampler]) -> dict[str, str]:
    """The conditions under which costs of these samplers hold."""
    context = {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
    context["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    for route, sampler in samplers.items():
        context[f"{route}.sampler"] = f"{sampler.mode} {sampler.backend}"
        context[f"{route}.num_neighbors"] = str(sampler.num_neighbors.values)
        context[f"{route}.graph"] = sampler.graphs.fingerprint()
    return context


def calibrate(
    samplers: Mapping[str, QuiverSampler],
    *,
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    repeats: int = 30,
    seed: int = 0,
) -> CalibrationProfile:
    """Time the same random batches on every sampler, taking turns.

    Args:
        samplers: route name to sampler of one homogeneous graph.
        batch_sizes: seeds of a batch.
        repeats: batches of each size.
        seed: of the batches.

    Raises:
        ValueError: nothing to time.
    """
    if not samplers or not batch_sizes or repeats < 1:
        raise ValueError(
            f"calibrate needs samplers, batch sizes and at least 1 repeat; got {len(samplers)} samplers, "
            f"{len(batch_sizes)} sizes and repeats={repeats}"
        )
    first = next(iter(samplers.values()))
    sizes = first.psgs()
    num_nodes = sizes.numel()
    generator = torch.Generator().manual_seed(seed)
    work: list[float] = []
    seconds: dict[str, list[float]] = {route: [] for route in samplers}
    for batch_size in batch_sizes:
        batches = torch.randint(0, num_nodes, (repeats + 1, batch_size), generator=generator)
        mean = float(sizes[batches[1:]].sum()) / repeats
        for turn, node in enumerate(batches):
            for route, sampler in samplers.items():
                start = time.perf_counter()
                sampler.sample(node, key=turn)
                if sampler.mode != "cpu":
                    torch.cuda.synchronize()
                if turn:  # the first batch of a size compiles and allocates
                    seconds[route].append(time.perf_counter() - start)
        work += [mean] * repeats
    worst = {
        route: [max(values[i : i + repeats]) for i in range(0, len(values), repeats)]
        for route, values in seconds.items()
    }
    return CalibrationProfile(
        {route: CostModel.fit(work, values) for route, values in seconds.items()},
        calibration_context(samplers),
        {route: CostModel.fit(work[::repeats], values) for route, values in worst.items()},
    )


@dataclass(frozen=True)
class ThresholdRouter:
    """Small batches to one route, large ones to another."""

    threshold: float
    below: str = "cpu"
    above: str = "gpu"

    @classmethod
    def from_profile(
        cls,
        profile: CalibrationProfile,
        prefer: Literal["throughput", "latency"] = "throughput",
        *,
        below: str = "cpu",
        above: str = "gpu",
    ) -> ThresholdRouter:
        """The PSGS at which the two cost lines cross: of the means, or of the slowest for "latency".

        Where they do not cross, the threshold is 0 (``above`` always cheaper) or infinity.
        """
        if prefer not in ("throughput", "latency"):
            raise ValueError(f"prefer is {prefer!r}; it must be 'throughput' or 'latency'")
        models = profile.cost if prefer == "throughput" else profile.worst
        missing = [route for route in (below, above) if route not in models]
        if missing:
            raise ValueError(f"the profile has no route {missing[0]!r} (it has {', '.join(sorted(models))})")
        low, high = models[below], models[above]
        steeper = low.slope_s - high.slope_s
        if steeper <= 0:
            never = low.intercept_s <= high.intercept_s
            return cls(float("inf") if never else 0.0, below, above)
        return cls(max((high.intercept_s - low.intercept_s) / steeper, 0.0), below, above)

    def choose(self, psgs: float, now: float, free_at: Mapping[str, float]) -> str:
        """The route of a batch."""
        return self.above if psgs > self.threshold else self.below


@dataclass(frozen=True)
class EarliestFinishRouter:
    """The route that would finish a batch first, counting what each has still to do."""

    cost: Mapping[str, CostModel]

    def choose(self, psgs: float, now: float, free_at: Mapping[str, float]) -> str:
        """argmin over routes of ``max(now, free_at[route]) + predict(psgs)``; ties go to the first."""
        routes = [route for route in self.cost if route in free_at]
        if not routes:
            raise ValueError(f"no route of {sorted(self.cost)} is among {sorted(free_at)}")
        return min(routes, key=lambda route: max(now, free_at[route]) + self.cost[route].predict(psgs))


def require_routes(router: Any, routes: Sequence[str]) -> None:
    """Refuse a router that could choose a route that is not there."""
    wanted = list(router.cost) if isinstance(router, EarliestFinishRouter) else []
    wanted += [router.below, router.above] if isinstance(router, ThresholdRouter) else []
    missing = [route for route in wanted if route not in routes]
    if missing:
        raise ValueError(
            f"the router chooses {missing[0]!r}, but the samplers are {', '.join(sorted(routes))}"
        )
