"""``select_bands``: bands chosen from the coordinates, and from the targets where there are any."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from spe_layers.bands import Bands
from spe_layers.encoding import positional_encoding
from spe_layers.ntk import closed_form_ntk, leave_one_out

DECAYS = (0.0, 0.5, 1.0, 1.5)
NEIGHBOURHOODS = 4
# Ratio of the two terms of the NTK does not depend on it beyond this width.
NTK_WIDTH = 1024


def select_bands(
    coordinates: Tensor,
    targets: Tensor | None = None,
    *,
    scale: float = math.pi,
    max_points: int = 1024,
    candidates: Iterable[Bands] | None = None,
    include_input: bool = True,
    seed: int = 0,
) -> Bands:
    """Bands for these training points, with nothing to tune.

    Without targets: octaves from the one whose period spans the data (the largest range of a coordinate) up
    to the Nyquist frequency of the spacing (the median distance to the nearest neighbour), amplitudes halving
    from octave to octave. With targets: the candidate with the least leave-one-out error of kernel regression
    with the NTK of a (sine, ReLU) network. Multipliers are powers of two, so phases stay exact, and scaling
    the coordinates by a power of two only shifts the exponents.

    Args:
        coordinates: [N, D] (or [N], one coordinate), finite.
        targets: [N] or [N, C], finite.
        scale: radians per unit at multiplier 1.
        max_points: points that are queried for neighbours, and most points in the regression.
        candidates: bands to choose from by the targets, instead of the grid of band counts and decays.
        include_input: whether the coordinates are features; dropped when their range is outside [1/4, 8].
        seed: of the draw of points. Of more than twice ``max_points`` the regression takes a few with all
            their nearest neighbours.

    Raises:
        TypeError: coordinates or targets that are no tensors.
        ValueError: NaN or infinity, fewer than two distinct points, targets of another length, no candidates,
            candidates without targets.

    Warns:
        UserWarning: without targets; spacing says nothing about how smooth they are.
    """
    points = _points(coordinates)
    generator = torch.Generator().manual_seed(seed)
    if candidates is not None:
        if targets is None:
            raise ValueError("candidates are compared by their error on targets: pass targets")
        choices = list(candidates)
        if not choices:
            raise ValueError("candidates is empty: pass at least one Bands")
    else:
        choices = _grid(
            points,
            spacing_only=targets is None,
            scale=scale,
            include_input=include_input,
            max_points=max_points,
            generator=generator,
        )
    if targets is None:
        warnings.warn(
            "select_bands chose bands from sample spacing alone, which on smooth data may fall up to 1.5 dB "
            "short; pass the training targets to choose by them",
            stacklevel=2,
        )
        return choices[0]
    rows = _neighbourhoods(points, max_points, generator)
    device = coordinates.device if coordinates.is_cuda else torch.device("cpu")
    values = _target_rows(targets, len(points))[rows].to(device)
    return _least_error(points[rows].to(device), values, choices)


def _points(coordinates: Tensor) -> Tensor:
    """Coordinates as float64 [N, D] on the CPU, checked."""
    _refuse_other_types(coordinates, "coordinates")
    if coordinates.dim() not in (1, 2):
        raise ValueError(f"coordinates must be [N, D] or [N], got shape {tuple(coordinates.shape)}")
    points = coordinates.detach().to("cpu", torch.float64)
    points = points.unsqueeze(-1) if points.dim() == 1 else points
    _refuse_non_finite(points, "coordinates")
    if len(points) < 2 or not (points != points[:1]).any():
        raise ValueError("select_bands needs at least 2 distinct points")
    return points


def _refuse_other_types(rows: object, what: str) -> None:
    if not isinstance(rows, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(rows).__name__}; pass torch.as_tensor({what})")


def _target_rows(targets: Tensor, count: int) -> Tensor:
    _refuse_other_types(targets, "targets")
    values = targets.detach().to("cpu", torch.float64)
    if values.dim() == 0 or len(values) != count:
        raise ValueError(f"targets must have one row a point: {count} points, shape {tuple(targets.shape)}")
    values = values.reshape(count, -1)
    _refuse_non_finite(values, "targets")
    return values


def _refuse_non_finite(rows: Tensor, what: str) -> None:
    bad = ~rows.isfinite().all(1)
    if bad.any():
        raise ValueError(f"{what} contain NaN or infinity at row {int(bad.nonzero()[0])}")


def _grid(
    points: Tensor,
    *,
    spacing_only: bool,
    scale: float,
    include_input: bool,
    max_points: int,
    generator: torch.Generator,
) -> list[Bands]:
    extent = float((points.max(0).values - points.min(0).values).max())
    spacing = median_spacing(points, max_points, generator)
    unit = scale / (2 * math.pi)
    lowest = math.floor(math.log2(1 / (unit * extent)))
    # 1e-9: a grid's spacing comes out of floating point, and Nyquist itself must not depend on its last bit.
    highest = math.floor(math.log2(1 / (2 * spacing * unit)) + 1e-9)
    nyquist_bands = max(1, highest - lowest + 1)
    include = include_input and 0.25 <= extent <= 8
    if spacing_only:
        return [_octaves(lowest, nyquist_bands, 1.0, scale, include)]
    counts = range(1, nyquist_bands + 2)
    return [_octaves(lowest, n, decay, scale, include) for n in counts for decay in DECAYS]


def _octaves(lowest: int, count: int, decay: float, scale: float, include_input: bool) -> Bands:
    multipliers = tuple(2.0 ** (lowest + band) for band in range(count))
    amplitudes = tuple(2.0 ** (-decay * band) for band in range(count)) if decay else None
    return Bands(multipliers, scale, amplitudes, include_input)


def median_spacing(points: Tensor, max_queries: int, generator: torch.Generator) -> float:
    """Median distance to the nearest distinct neighbour, over at most ``max_queries`` of the points."""
    from scipy.spatial import cKDTree

    distinct = torch.unique(points, dim=0)
    queries = _draw(len(distinct), max_queries, generator)
    distance, _ = cKDTree(distinct.numpy()).query(distinct[queries].numpy(), k=2)
    return float(torch.from_numpy(distance[:, 1]).median())


def _draw(count: int, limit: int, generator: torch.Generator) -> Tensor:
    return torch.arange(count) if count <= limit else torch.randperm(count, generator=generator)[:limit]


def _neighbourhoods(points: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Rows of a few drawn points and their nearest neighbours, ``limit`` in all at most.

    Few points drawn one by one from many would lie further apart than the samples do, and detail that only
    the samples resolve would look like noise. Of up to twice the limit they are drawn all the same: that
    changes the spacing little, and shows all of the data.
    """
    if len(points) <= 2 * limit:
        return _draw(len(points), limit, generator)
    from scipy.spatial import cKDTree

    centres = points[_draw(len(points), NEIGHBOURHOODS, generator)].numpy()
    _, near = cKDTree(points.numpy()).query(centres, k=max(limit // NEIGHBOURHOODS, 2))
    return torch.from_numpy(near).flatten().unique()


def _least_error(points: Tensor, targets: Tensor, choices: list[Bands]) -> Bands:
    # No margin in favour of fewer bands: a kernel hardly tells them apart where training needs them.
    return min(choices, key=lambda bands: (_selection_error(points, targets, bands), bands.num_bands))


def _selection_error(points: Tensor, targets: Tensor, bands: Bands) -> float:
    """Leave-one-out error with the NTK of SPE and one ReLU layer, at phase standard deviation 1."""
    features = positional_encoding(points, bands)
    mean_square = float(features.square().sum(1).mean())
    gain = features.shape[1] / mean_square
    ntk, _ = closed_form_ntk(features, features, ("sine", "relu"), width=NTK_WIDTH, first_gain=gain)
    return leave_one_out(ntk, targets)
