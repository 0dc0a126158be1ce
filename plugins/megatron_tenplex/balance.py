"""Share demands among the holders of replicas so that the busiest sender sends as little as possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

Class = tuple[int, ...]


def balanced_quotas(
    demand: Mapping[Class, int], base: Sequence[int]
) -> tuple[dict[Class, dict[int, float]], float]:
    """The fractional optimum: minimise the largest number of bytes any worker sends.

    Args:
        demand: bytes that may come from any of the workers of the class (two or more of them).
        base: bytes each worker sends in any case.

    Returns:
        class -> worker -> bytes, and the optimum.
    """
    classes = list(demand)
    if not classes:
        return {}, float(max(base, default=0))
    pairs = [(c, worker) for c, of_class in enumerate(classes) for worker in of_class]
    workers = sorted({worker for _, worker in pairs})
    row_of = {worker: row for row, worker in enumerate(workers)}
    scale = float(max(demand.values()))
    count = len(pairs)
    cost = np.zeros(count + 1)
    cost[-1] = 1.0
    columns = np.arange(count)
    load_rows = np.array([row_of[worker] for _, worker in pairs])
    upper = coo_matrix(
        (
            np.concatenate([np.ones(count), -np.ones(len(workers))]),
            (
                np.concatenate([load_rows, np.arange(len(workers))]),
                np.concatenate([columns, np.full(len(workers), count)]),
            ),
        )
    )
    equal = coo_matrix(
        (np.ones(count), (np.array([c for c, _ in pairs]), columns)), shape=(len(classes), count + 1)
    )
    solved = linprog(
        cost,
        A_ub=upper.tocsr(),
        b_ub=np.array([-base[worker] / scale for worker in workers]),
        A_eq=equal.tocsr(),
        b_eq=np.array([demand[c] / scale for c in classes]),
        bounds=(0, None),
        method="highs",
    )
    if solved.status != 0:
        raise RuntimeError(f"the balancing problem was not solved: {solved.message}")
    quotas: dict[Class, dict[int, float]] = {c: {} for c in classes}
    for (c, worker), share in zip(pairs, solved.x[:-1], strict=True):
        quotas[classes[c]][worker] = float(share) * scale
    return quotas, max(float(solved.x[-1]) * scale, float(max(base, default=0)))
