"""Compiled passes over all edges for PSGS and FAP (see ``metrics.py``)."""

# Compiled functions take plain arrays; numba infers their types.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def _ratio(degree, fanout):
    return 1.0 if fanout < 0 or degree <= fanout else fanout / degree


@njit(nogil=True, cache=True)
def pull(colptr, row, value, fanout):
    """out[v] = 1 + r(v) * sum of value over the in-neighbours of v."""
    out = np.empty(len(colptr) - 1, np.float64)
    for v in range(len(out)):
        total = 0.0
        for e in range(colptr[v], colptr[v + 1]):
            total += value[row[e]]
        out[v] = 1.0 + _ratio(colptr[v + 1] - colptr[v], fanout) * total
    return out


@njit(nogil=True, cache=True)
def push(colptr, row, value, fanout):
    """out[u] = sum of value(v) r(v) over the v that have u as in-neighbour."""
    out = np.zeros(len(value), np.float64)
    for v in range(len(colptr) - 1):
        share = value[v] * _ratio(colptr[v + 1] - colptr[v], fanout)
        for e in range(colptr[v], colptr[v + 1]):
            out[row[e]] += share
    return out


@njit(nogil=True, cache=True)
def push_missing(colptr, row, value, fanout):
    """out[u] = product of 1 - value(v) r(v) over the same v."""
    out = np.ones(len(value), np.float64)
    for v in range(len(colptr) - 1):
        kept = 1.0 - value[v] * _ratio(colptr[v + 1] - colptr[v], fanout)
        for e in range(colptr[v], colptr[v + 1]):
            out[row[e]] *= kept
    return out
