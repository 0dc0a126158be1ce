"""Compiled loops of the CPU sampler; ``numba_cpu.py`` calls them.

A hop is four passes over flat arrays (degrees, draws, neighbours, relabelling). Each pass has independent
iterations, so that the processor keeps many memory reads in flight: two random reads an edge are the limit.
"""

# Compiled functions take plain arrays by position; numba infers their types.
# ruff: noqa: ANN001, ANN201, ANN202, PLR0917
# mypy: ignore-errors

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_S8, _S11, _S27, _S30, _S31, _S32 = (np.uint64(s) for s in (8, 11, 27, 30, 31, 32))

_FIRST_CAPACITY = 1 << 22
_HASH_AT = 48  # fan-out from which Floyd's membership test uses a table instead of a scan


class GraphArrays(NamedTuple):
    """Arrays of one edge type as the compiled code takes them; absent ones are empty.

    ``weight`` and ``edge_time`` are per CSC position, ``node_time`` per source node.
    """

    colptr: np.ndarray
    row: np.ndarray
    weight: np.ndarray
    node_time: np.ndarray
    edge_time: np.ndarray


@njit(nogil=True, cache=True)
def _mix(z):
    z ^= z >> _S30
    z *= _M1
    z ^= z >> _S27
    z *= _M2
    return z ^ (z >> _S31)


@njit(nogil=True, cache=True)
def _draw(key, step, limit):
    return np.int64(((_mix(key + np.uint64(step) * GOLDEN) >> _S32) * np.uint64(limit)) >> _S32)


@njit(nogil=True, cache=True)
def _eligible(graph, start, end, limit):
    """End of the neighbours no later than ``limit``; neighbourhoods are sorted by time."""
    low, high = start, end
    while low < high:
        middle = (low + high) // 2
        time = graph.edge_time[middle] if len(graph.edge_time) else graph.node_time[graph.row[middle]]
        if time <= limit:
            low = middle + 1
        else:
            high = middle
    return low


@njit(nogil=True, cache=True)
def plan_hop(graph, nodes, groups, begin, end, fanout, replace, last, group_time, starts, degrees, offsets):
    """Degrees of the frontier ``nodes[begin:end]`` and where its edges go; returns the number of edges."""
    total = 0
    temporal = len(group_time) > 0
    for i in range(begin, end):
        v = nodes[i]
        start = graph.colptr[v]
        degree = graph.colptr[v + 1] - start
        if temporal:
            degree = _eligible(graph, start, start + degree, group_time[groups[i]]) - start
            if last and fanout >= 0 and degree > fanout:
                start += degree - fanout
                degree = fanout
        starts[i - begin] = start
        degrees[i - begin] = degree
        offsets[i - begin] = total
        if fanout < 0 or (degree <= fanout and not replace):
            total += degree
        elif degree > 0:
            total += fanout
    offsets[end - begin] = total
    return total


@njit(nogil=True, cache=True)
def _floyd_scan(key, start, degree, fanout, edge_out, at):
    """Floyd's sample of ``fanout`` of ``degree`` positions; membership by scanning what was taken."""
    for s in range(fanout):
        j = degree - fanout + s
        pick = start + _draw(key, s, j + 1)
        taken = False
        for k in range(at, at + s):
            taken |= edge_out[k] == pick
        edge_out[at + s] = start + j if taken else pick


@njit(nogil=True, cache=True)
def _floyd_table(key, start, degree, fanout, edge_out, at, table):
    """The same with an open-addressing table of positions (-1: free), for large fan-outs."""
    mask = len(table) - 1
    table[:] = -1
    for s in range(fanout):
        j = degree - fanout + s
        pick = _draw(key, s, j + 1)
        slot = np.int64(_mix(np.uint64(pick)) & np.uint64(mask))
        while table[slot] >= 0 and table[slot] != pick:
            slot = (slot + 1) & mask
        if table[slot] == pick:
            pick = j
            slot = np.int64(_mix(np.uint64(pick)) & np.uint64(mask))
            while table[slot] >= 0:
                slot = (slot + 1) & mask
        table[slot] = pick
        edge_out[at + s] = start + pick


@njit(nogil=True, cache=True)
def _weighted_with_replacement(key, start, degree, fanout, weight, edge_out, at):
    """Draw from the distribution of the weights; returns how many (none where all weights are 0)."""
    total = 0.0
    for j in range(degree):
        total += weight[start + j]
    if total <= 0.0:
        return 0
    for s in range(fanout):
        point = np.float64(_mix(key + np.uint64(s) * GOLDEN) >> _S11) * 2.0**-53 * total
        reached, chosen = 0.0, -1
        for j in range(degree):
            if weight[start + j] > 0.0:
                chosen = j
                reached += weight[start + j]
                if reached > point:
                    break
        edge_out[at + s] = start + chosen
    return fanout


@njit(nogil=True, cache=True)
def _weighted_without_replacement(key, start, degree, fanout, weight, edge_out, at, arrival):
    """The ``fanout`` first arrivals of exponential clocks, in CSC order; returns how many.

    Clock j rings at -log(u_j) / w_j (Efraimidis and Spirakis 2006); edges of weight 0 never do.
    """
    count = 0
    for j in range(degree):
        if weight[start + j] <= 0.0:
            continue
        u = (np.float64(_mix(key + np.uint64(j) * GOLDEN) >> _S11) + 0.5) * 2.0**-53
        time = -np.log(u) / weight[start + j]
        if count == fanout and time >= arrival[count - 1]:
            continue
        k = min(count, fanout - 1)
        while k > 0 and arrival[k - 1] > time:
            arrival[k] = arrival[k - 1]
            edge_out[at + k] = edge_out[at + k - 1]
            k -= 1
        arrival[k] = time
        edge_out[at + k] = start + j
        count = min(count + 1, fanout)
    edge_out[at : at + count].sort()
    return count


@njit(nogil=True, cache=True)
def draw_hop(
    nodes,
    groups,
    streams,
    first,
    begin,
    end,
    hop,
    fanout,
    replace,
    weight,
    starts,
    degrees,
    offsets,
    edge_out,
    col_out,
    at,
):
    """Draw the edges (CSC positions) of ``nodes[begin:end]`` into ``edge_out[at:]``; returns their number.

    ``starts``, ``degrees`` and ``offsets`` count from node ``first``. Only weighted draws can be fewer
    than planned.
    """
    table = np.empty(0, np.int64)
    if fanout >= _HASH_AT:
        size = 128
        while size < 2 * fanout:
            size *= 2
        table = np.empty(size, np.int64)
    arrival = np.empty(max(fanout, 0), np.float64)
    written = at + offsets[begin - first]
    for i in range(begin, end):
        start, degree = starts[i - first], degrees[i - first]
        count = offsets[i - first + 1] - offsets[i - first]
        if fanout < 0 or (degree <= fanout and not replace):
            for k in range(count):
                edge_out[written + k] = start + k
        elif count > 0:
            key = _mix(streams[groups[i]] ^ _mix(np.uint64(nodes[i]) << _S8 | np.uint64(hop)))
            if len(weight):
                if replace:
                    count = _weighted_with_replacement(key, start, degree, fanout, weight, edge_out, written)
                else:
                    count = _weighted_without_replacement(
                        key, start, degree, fanout, weight, edge_out, written, arrival
                    )
            elif replace:
                for s in range(fanout):
                    edge_out[written + s] = start + _draw(key, s, degree)
            elif fanout < _HASH_AT:
                _floyd_scan(key, start, degree, fanout, edge_out, written)
            else:
                _floyd_table(key, start, degree, fanout, edge_out, written, table)
        for k in range(count):
            col_out[written + k] = i
        written += count
    return written - at - offsets[begin - first]


@njit(nogil=True, cache=True)
def neighbours(row, edge, out, begin, end):
    """out[i] = row[edge[i]]."""
    for i in range(begin, end):
        out[i] = row[edge[i]]


@njit(nogil=True, cache=True)
def relabel_dense(slot, local, begin, end, nodes, count):
    """Replace nodes by local ids in place, numbering new ones by first appearance; returns the new count."""
    for i in range(begin, end):
        v = local[i]
        s = slot[v]
        if s < 0:
            s = count
            slot[v] = s
            nodes[count] = v
            count += 1
        local[i] = s
    return count


@njit(nogil=True, cache=True)
def _hash_slot(keys, key):
    mask = len(keys) - 1
    slot = np.int64(_mix(np.uint64(key)) & np.uint64(mask))
    while keys[slot] >= 0 and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot


@njit(nogil=True, cache=True)
def _grow(keys, values):
    new_keys = np.full(2 * len(keys), -1, np.int64)
    new_values = np.empty(2 * len(keys), np.int64)
    for i in range(len(keys)):
        if keys[i] >= 0:
            slot = _hash_slot(new_keys, keys[i])
            new_keys[slot] = keys[i]
            new_values[slot] = values[i]
    return new_keys, new_values


@njit(nogil=True, cache=True)
def relabel_hashed(keys, values, num_nodes, local, edge_groups, begin, end, nodes, groups, count):
    """The same with a table of (group, node), at most half full; ``edge_groups`` are those of the edges."""
    for i in range(begin, end):
        v = local[i]
        group = edge_groups[i]
        key = group * num_nodes + v
        slot = _hash_slot(keys, key)
        if keys[slot] < 0:
            if 2 * (count + 1) > len(keys):
                keys, values = _grow(keys, values)
                slot = _hash_slot(keys, key)
            keys[slot] = key
            values[slot] = count
            nodes[count] = v
            groups[count] = group
            count += 1
        local[i] = values[slot]
    return keys, values, count


@njit(nogil=True, cache=True)
def place_seeds(slot, keys, values, num_nodes, hashed, nodes, groups, begin, end):
    """Enter the seeds ``nodes[begin:end]``; a repeated seed keeps its row, later edges name the first."""
    for i in range(begin, end):
        v = nodes[i]
        if not hashed:
            if slot[v] < 0:
                slot[v] = i
            continue
        if 2 * (i + 1) > len(keys):
            keys, values = _grow(keys, values)
        key = groups[i] * num_nodes + v
        at = _hash_slot(keys, key)
        if keys[at] < 0:
            keys[at] = key
            values[at] = i
    return keys, values


@njit(nogil=True, cache=True)
def _resized(array, size, used):
    out = np.empty(size, array.dtype)
    out[:used] = array[:used]
    return out


@njit(nogil=True, cache=True)
def sample(graph, seeds, seed_groups, streams, fanouts, replace, last, group_time, slot, hashed):
    """Sample all hops; see ``numba_cpu.sample``."""
    num_nodes = max(len(graph.colptr) - 1, 1)
    count = len(seeds)
    estimate, width = 0, len(seeds)
    for fanout in fanouts:
        width = min(width * max(fanout, 1), _FIRST_CAPACITY)
        estimate += width
    capacity = min(max(estimate, 1), _FIRST_CAPACITY)
    edge, col, local = (
        np.empty(capacity, np.int64),
        np.empty(capacity, np.int64),
        np.empty(capacity, np.int64),
    )
    nodes, groups = seeds.copy(), seed_groups.copy()
    keys = np.full(1024 if hashed else 0, -1, np.int64)
    values = np.empty(len(keys), np.int64)
    keys, values = place_seeds(slot, keys, values, num_nodes, hashed, nodes, groups, 0, count)
    nodes_per_hop = np.zeros(len(fanouts) + 1, np.int64)
    edges_per_hop = np.zeros(len(fanouts), np.int64)
    nodes_per_hop[0] = count
    begin, used = 0, 0
    for hop in range(len(fanouts)):
        fanout, end = fanouts[hop], count
        size = end - begin
        starts, degrees, offsets = (
            np.empty(size, np.int64),
            np.empty(size, np.int64),
            np.empty(size + 1, np.int64),
        )
        total = plan_hop(
            graph, nodes, groups, begin, end, fanout, replace, last, group_time, starts, degrees, offsets
        )  # fmt: skip
        if used + total > len(edge):
            capacity = max(used + total, 2 * len(edge))
            edge, col, local = (
                _resized(edge, capacity, used),
                _resized(col, capacity, used),
                _resized(local, capacity, used),
            )
        total = draw_hop(
            nodes, groups, streams, begin, begin, end, hop, fanout, replace, graph.weight,
            starts, degrees, offsets, edge, col, used,
        )  # fmt: skip
        neighbours(graph.row, edge, local, used, used + total)
        room = count + total if hashed else min(count + total, num_nodes + len(seeds))
        nodes, groups = _resized(nodes, room, count), _resized(groups, room, count)
        if hashed:
            keys, values, count = relabel_hashed(
                keys, values, num_nodes, local[used : used + total], groups[col[used : used + total]],
                0, total, nodes, groups, count,
            )  # fmt: skip
        else:
            groups[count:] = 0
            count = relabel_dense(slot, local, used, used + total, nodes, count)
        edges_per_hop[hop] = total
        nodes_per_hop[hop + 1] = count - end
        begin, used = end, used + total
    if not hashed:
        for i in range(count):
            slot[nodes[i]] = -1
    return nodes[:count], local[:used], col[:used], edge[:used], groups[:count], nodes_per_hop, edges_per_hop
