"""Matching a request with finished ones, in compiled loops that read each stored count once.

Products of counts are integers, exact in any order of summation as long as they fit the mantissa; so single
precision, twice as fast, is used wherever their bound does.
"""

# Compiled functions take plain arrays; numba's decorator is untyped.
# ruff: noqa: ANN001, ANN202
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

Counts = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]

# Given in advance, so that nothing is compiled while an engine runs.
_SIMILARITIES = [
    f"float64[::1](int64[:,::1], float64[::1], {counts}[:,:,::1], float64[:,::1], {products}[::1])"
    for counts in ("uint16", "uint32")
    for products in ("float32", "float64")
]
_SHARES = [
    f"float64[:,::1]({counts}[:,:,::1], int64[:,::1], int64[::1], float64[::1])"
    for counts in ("uint16", "uint32")
]


def similarities(
    observed: Counts, norms: Floats, by_key: Counts, stored_norms: Floats, entries: int
) -> Floats:
    """Mean cosine between the rows of ``observed`` and of each entry, over the rows with counts.

    Args:
        observed: ``[layers, experts]``, not all zero.
        norms: ``[layers]``, lengths of its rows.
        by_key: ``[layers, experts, room]``, counts of the entries.
        stored_norms: ``[layers, room]``, lengths of their rows; a row of length 0 has cosine 0.
        entries: how many of ``room`` there are.

    Returns:
        float64 ``[entries]``.
    """
    # By Cauchy and Schwarz no partial sum of a row exceeds the product of lengths.
    exact = norms.max() * stored_norms[:, :entries].max() < 2**24
    products = np.empty(entries, dtype=np.float32 if exact else np.float64)
    observed = np.ascontiguousarray(observed, dtype=np.int64)
    return _similarities(observed, norms, by_key, stored_norms, products)


def weighted_shares(by_entry: Counts, sums: Counts, entries: Counts, weights: Floats) -> Floats:
    """``sum_i weights[i] * rownormalise(by_entry[entries[i]])``; zero rows count as uniform ones.

    Args:
        by_entry: ``[room, layers, experts]`` counts.
        sums: ``[room, layers]``, sums of their rows.
        entries: ``[n]`` indices.
        weights: ``[n]``.

    Returns:
        float64 ``[layers, experts]``.
    """
    return _weighted_shares(by_entry, sums, np.asarray(entries, dtype=np.int64), weights)


@njit(_SIMILARITIES, cache=True, nogil=True)
def _similarities(observed, norms, by_key, stored_norms, products):
    layers, experts = observed.shape
    entries = len(products)
    total = np.zeros(entries)
    seen = 0
    for layer in range(layers):
        if norms[layer] == 0:
            continue
        seen += 1
        products[:] = 0
        for expert in range(experts):
            if observed[layer, expert] == 0:
                continue
            count = products.dtype.type(observed[layer, expert])
            stored = by_key[layer, expert]
            for entry in range(entries):
                products[entry] += count * products.dtype.type(stored[entry])
        for entry in range(entries):
            length = norms[layer] * stored_norms[layer, entry]
            if length > 0:
                total[entry] += products[entry] / length
    return total / seen


@njit(_SHARES, cache=True, nogil=True)
def _weighted_shares(by_entry, sums, entries, weights):
    _, layers, experts = by_entry.shape
    total = np.zeros((layers, experts))
    for place in range(len(entries)):
        for layer in range(layers):
            row, out = by_entry[entries[place], layer], total[layer]
            if sums[entries[place], layer] == 0:
                out += weights[place] / experts
                continue
            for expert in range(experts):
                out[expert] += weights[place] * (row[expert] / sums[entries[place], layer])
    return total
