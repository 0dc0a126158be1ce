"""How good an uncertainty is: ranking (AUSE, correlations) and calibration (NLL, ECE, AUCE, coverage).

Arguments are NumPy arrays or torch tensors of one shape; pixels and channels are flattened together.
Sources: sparsification, Ilg et al. 2018 (arXiv 1802.07095); normalised AUSE, BayesRays (arXiv 2309.03185);
the `reference` variant and the standard-deviation floor, the code of PH-Dropout (arXiv 2410.05468).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_LEVELS = np.arange(1, 100) / 100


def _flat(**arrays: Any) -> list[Array]:
    """The arguments as flat float64 arrays of one length."""
    flat = []
    shapes = {}
    for name, value in arrays.items():
        array = value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
        shapes[name] = array.shape
        flat.append(array.astype(np.float64).reshape(-1))
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
    if flat[0].size == 0:
        raise ValueError(f"{', '.join(arrays)} are empty")
    return flat


def spearman(errors: Any, uncertainties: Any) -> float:
    """Spearman's rank correlation, ties averaged; NaN when either argument is constant."""
    from scipy.stats import rankdata

    e, u = _flat(errors=errors, uncertainties=uncertainties)
    return pearson(rankdata(e), rankdata(u))


def pearson(errors: Any, uncertainties: Any) -> float:
    """Pearson's linear correlation; NaN when either argument is constant."""
    e, u = _flat(errors=errors, uncertainties=uncertainties)
    e, u = e - e.mean(), u - u.mean()
    scale = float(np.linalg.norm(e) * np.linalg.norm(u))
    return float(e @ u) / scale if scale > 0 else float("nan")


def sparsification_curve(errors: Any, uncertainties: Any, *, metric: str = "mae") -> Array:
    """Error of what remains after removing the t % most uncertain entries, t = 0 .. 99.

    Entries of equal uncertainty all count with their group's mean error, so pixel order cannot matter.

    Args:
        errors: absolute errors (``mae``) or squared ones (``mse``, ``rmse``), not negative.
        uncertainties: same shape, any scale.
        metric: ``mae``, ``mse`` or ``rmse`` (square root of the mean).

    Returns:
        ``[100]`` float64.

    Raises:
        ValueError: fewer than 100 entries, negative errors, other shapes or metrics.
    """
    e, u = _flat(errors=errors, uncertainties=uncertainties)
    if metric not in ("mae", "mse", "rmse"):
        raise ValueError(f"metric must be 'mae', 'mse' or 'rmse', got {metric!r}")
    if e.size < 100:
        raise ValueError(f"AUSE needs at least 100 entries, got {e.size}")
    if float(e.min()) < 0:
        raise ValueError("errors must not be negative: give absolute or squared errors")
    order = np.lexsort((e, u))
    _, group = np.unique(u[order], return_inverse=True)
    means = np.bincount(group, weights=e[order]) / np.bincount(group)
    running = np.cumsum(means[group])
    kept = e.size * (100 - np.arange(100)) // 100
    curve = running[kept - 1] / kept
    return np.sqrt(curve) if metric == "rmse" else curve


def ause(
    errors: Any,
    uncertainties: Any,
    *,
    definition: Literal["normalized", "reference"] = "normalized",
    metric: Literal["mae", "mse", "rmse"] = "mae",
) -> float:
    """Area between the sparsification curve and the one of a perfect ranking; 0 is perfect.

    Args:
        errors, uncertainties, metric: see `sparsification_curve`.
        definition: ``normalized`` (BayesRays): t = 0 .. 99 %, both curves divided by the maximum of both, the
            area over t / 100. ``reference`` (PH-Dropout's code): t = 1 .. 99 %, not normalised, step 1.
    """
    if definition not in ("normalized", "reference"):
        raise ValueError(f"definition must be 'normalized' or 'reference', got {definition!r}")
    curve = sparsification_curve(errors, uncertainties, metric=metric)
    oracle = sparsification_curve(errors, errors, metric=metric)
    if definition == "reference":
        return float(np.trapezoid(curve[1:] - oracle[1:], dx=1.0))
    top = max(float(curve.max()), float(oracle.max()))
    return float(np.trapezoid(curve - oracle, dx=0.01)) / top if top > 0 else 0.0


def nll(targets: Any, mean: Any, std: Any, *, std_floor: float = 1e-2) -> float:
    """Mean negative log-likelihood of ``targets`` under N(mean, max(std, std_floor)^2), in nats."""
    y, m, s = _flat(targets=targets, mean=mean, std=std)
    s = np.maximum(s, std_floor)
    return float(np.mean(0.5 * np.log(2 * np.pi * s**2) + (y - m) ** 2 / (2 * s**2)))


def ece(errors: Any, stds: Any, *, bins: int = 10) -> float:
    """Expected calibration error: mean of |mean error - mean std| over equal-width bins of std.

    Bins run from 0 to the largest std, the last one closed, and weigh what they hold.
    """
    e, s = _flat(errors=errors, stds=stds)
    if bins < 1:
        raise ValueError(f"bins must be positive, got {bins}")
    top = float(s.max())
    index = np.minimum((s / top * bins).astype(int), bins - 1) if top > 0 else np.zeros(s.size, dtype=int)
    gap = np.bincount(index, weights=e, minlength=bins) - np.bincount(index, weights=s, minlength=bins)
    return float(np.abs(gap).sum() / s.size)


def _required_level(y: Array, m: Array, s: Array) -> Array:
    """Confidence of the smallest central interval that holds each target."""
    from scipy.stats import norm

    error = np.abs(y - m)
    z = np.divide(error, s, out=np.where(error > 0, np.inf, 0.0), where=s > 0)
    return 2 * norm.cdf(z) - 1


def coverage(targets: Any, mean: Any, std: Any, *, confidence: float = 0.95) -> float:
    """Share of targets inside the central Gaussian interval of that confidence."""
    y, m, s = _flat(targets=targets, mean=mean, std=std)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    return float(np.mean(_required_level(y, m, s) <= confidence))


def auce(targets: Any, mean: Any, std: Any) -> float:
    """Mean over confidence levels 0.01 .. 0.99 of |coverage - level|."""
    y, m, s = _flat(targets=targets, mean=mean, std=std)
    needed = np.sort(_required_level(y, m, s))
    covered = np.searchsorted(needed, _LEVELS, side="right") / needed.size
    return float(np.mean(np.abs(covered - _LEVELS)))


def calibrate_scale(errors: Any, stds: Any, *, std_floor: float = 1e-2) -> float:
    """The factor on std that maximises the Gaussian likelihood: sqrt(mean(e^2 / max(std, floor)^2))."""
    e, s = _flat(errors=errors, stds=stds)
    return float(np.sqrt(np.mean(e**2 / np.maximum(s, std_floor) ** 2)))


def uncertainty_metrics(mean: Any, std: Any, target: Any, mask: Any = None) -> dict[str, float]:
    """All metrics of one image.

    Args:
        mean, std, target: ``[H, W, C]``.
        mask: ``[H, W]`` or ``[H, W, 1]``, true on the foreground; adds every key again as ``foreground_...``.

    Returns:
        spearman, pearson, ause, ause_reference, nll, ece, auce, coverage95, sharpness, sigma_max.

    Raises:
        ValueError: shapes differ, or fewer than 100 values.
    """
    shape = tuple(target.shape)
    m, s, y = _flat(mean=mean, std=std, target=target)
    result = _all_metrics(m, s, y)
    if mask is not None:
        chosen = mask.detach().cpu().numpy() if hasattr(mask, "detach") else np.asarray(mask)
        inside = np.broadcast_to(chosen.reshape(*shape[:-1], 1) > 0, shape).reshape(-1)
        if int(inside.sum()) < 100:
            foreground = dict.fromkeys(result, float("nan"))
        else:
            foreground = _all_metrics(m[inside], s[inside], y[inside])
        result.update({f"foreground_{name}": value for name, value in foreground.items()})
    return result


def _all_metrics(m: Array, s: Array, y: Array) -> dict[str, float]:
    error = np.abs(y - m)
    return {
        "spearman": spearman(error, s),
        "pearson": pearson(error, s),
        "ause": ause(error, s),
        "ause_reference": ause(error, s, definition="reference"),
        "nll": nll(y, m, s),
        "ece": ece(error, s),
        "auce": auce(y, m, s),
        "coverage95": coverage(y, m, s),
        "sharpness": float(s.mean()),
        "sigma_max": float(s.max()),
    }
