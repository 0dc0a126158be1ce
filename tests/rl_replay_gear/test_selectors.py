"""Laws of the selectors (GR-05, GR-07, GR-24): enumeration and chi-square with fixed seeds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from rl_replay_gear import (
    ColumnSpec,
    Fifo,
    Lifo,
    Mixture,
    Prioritized,
    Shuffle,
    TableSpec,
    TopK,
    TrajectoryTable,
    Uniform,
    Window,
)
from rl_replay_gear.randomness import CounterGenerator

LENGTHS = (1, 4, 2, 9, 3, 6)
PRIORITIES = (0.5, 2.0, 0.0, 1.0, 4.0, 1e-3)


def table_of(lengths=LENGTHS, priorities=PRIORITIES, **options):
    table = TrajectoryTable(TableSpec((ColumnSpec("x"),), 1000, 100), **options)
    for length, priority in zip(lengths, priorities, strict=True):
        table.write({"x": torch.zeros(length)}, priority=priority)
    return table


def assert_law(counts, probability):
    """Chi-square over the possible cells, |z| < 4.5 as a normal deviate; impossible cells never occur."""
    counts, probability = np.asarray(counts, float), np.asarray(probability, float)
    assert counts[probability == 0].sum() == 0
    cells = probability > 0
    expected = probability[cells] / probability[cells].sum() * counts.sum()
    statistic = ((counts[cells] - expected) ** 2 / expected).sum()
    p = stats.chi2.sf(statistic, cells.sum() - 1)
    assert p > stats.norm.sf(4.5), (statistic, counts, expected)


def step_probabilities(weights):
    return np.repeat(np.array(weights) / (np.array(weights) * np.array(LENGTHS)).sum(), LENGTHS)


@pytest.mark.parametrize(
    ("selector", "trajectory_weights"),
    [
        (Uniform(), [1] * 6),
        (Uniform(over="steps"), LENGTHS),
        (Prioritized(0.7), [p**0.7 if p else 0 for p in PRIORITIES]),
        (Prioritized(1.0, over="steps"), [p * n for p, n in zip(PRIORITIES, LENGTHS, strict=True)]),
        (Prioritized(0.0), [1, 1, 0, 1, 1, 1]),
    ],
)
def test_gr05_draws_follow_their_law_over_trajectories_and_steps(selector, trajectory_weights):
    table = table_of()
    draws = 120_000
    selection = table.select(selector, draws, generator=CounterGenerator(5))
    handles = table.handles().tolist()
    place = {handle: i for i, handle in enumerate(handles)}
    which = np.array([place[h] for h in selection.handles.tolist()])
    weights = np.array(trajectory_weights, float)
    assert_law(np.bincount(which, minlength=6), weights)
    first = np.concatenate([[0], np.cumsum(LENGTHS)[:-1]])
    steps = np.bincount(first[which] + selection.anchors.numpy(), minlength=sum(LENGTHS))
    assert_law(steps, np.repeat(weights / weights.sum() / LENGTHS, LENGTHS))
    expected = weights / weights.sum()
    if getattr(selector, "over", "") == "steps":
        expected = expected / LENGTHS
    assert np.allclose(selection.probability.numpy(), expected[which], rtol=1e-12)


def test_gr05_the_grid_of_quantiles_gives_exact_proportions():
    table = table_of(priorities=(1, 2, 0, 3, 4, 0))
    selector = Prioritized(1.0)
    table.attach(selector)
    slots, _ = selector.draw((np.arange(1000) + 0.5) / 1000)
    assert np.bincount(slots, minlength=6).tolist() == [100, 200, 0, 300, 400, 0]


@pytest.mark.parametrize("weights", [(1.0, 2.0, 3.0, 0.5), (1000.0, 1.0, 1e-3, 2.0)])
def test_gr05_without_replacement_is_successive_sampling(weights):
    """Against the enumeration of all orders; the second case needs the race keys."""
    table = table_of((1, 1, 1, 1), weights)
    selector = Prioritized(1.0, replacement=False)
    table.attach(selector)
    size, repeats = 3, 20_000
    orders = list(itertools.permutations(range(4), size))
    probability = []
    for order in orders:
        left, p = sum(weights), 1.0
        for i in order:
            p *= weights[i] / left
            left -= weights[i]
        probability.append(p)
    generator = np.random.default_rng(0)
    counts = dict.fromkeys(orders, 0)
    for _ in range(repeats):
        slots, first_draw = selector.select(size, generator)
        counts[tuple(slots.tolist())] += 1
        assert np.allclose(first_draw, np.array(weights)[slots] / sum(weights))
    assert math.isclose(sum(probability), 1.0, rel_tol=1e-9)
    large = np.array([p * repeats > 5 for p in probability])
    found = np.array([counts[order] for order in orders])
    pooled = np.append(found[large], found[~large].sum())
    assert_law(
        pooled, np.append(np.array(probability)[large], max(sum(np.array(probability)[~large]), 1e-12))
    )


def test_gr05_uniform_without_replacement_is_a_uniform_subset():
    table = table_of()
    selector = Uniform(replacement=False)
    generator = np.random.default_rng(1)
    counts = {}
    for _ in range(15_000):
        chosen = table.select(selector, 2, generator=generator).handles
        key = tuple(sorted(chosen.tolist()))
        assert len(set(key)) == 2
        counts[key] = counts.get(key, 0) + 1
    assert_law(list(counts.values()), [1] * 15)
    everyone = table.select(selector, 6, generator=generator).handles
    assert sorted(everyone.tolist()) == table.handles().tolist()


def test_gr05_ranked_selectors_and_their_ties():
    table = table_of(priorities=(1, 3, 2, 3, 0, 2))
    handles = table.handles()
    for selector, order in [
        (TopK(), [1, 3, 2, 5, 0, 4]),
        (TopK(largest=False), [4, 0, 2, 5, 1, 3]),
        (Fifo(), [0, 1, 2, 3, 4, 5]),
        (Lifo(), [5, 4, 3, 2, 1, 0]),
    ]:
        for k in range(1, 7):
            assert table.select(selector, k).handles.tolist() == handles[order[:k]].tolist()
        with pytest.raises(ValueError, match="cannot select 7 distinct trajectories from a table of 6"):
            table.select(selector, 7)


def test_gr05_refusals():
    table = table_of(priorities=[0] * 6)
    with pytest.raises(ValueError, match="no trajectory has positive weight"):
        table.select(Prioritized(), 4)
    with pytest.raises(RuntimeError, match="table is empty"):
        table_of((), ()).select(Uniform(), 1)
    sparse = table_of(priorities=(1, 0, 2, 0, 0, 0))
    with pytest.raises(ValueError, match="cannot select 3 distinct trajectories from a table of 2"):
        sparse.select(Prioritized(replacement=False), 3)
    with pytest.raises(ValueError, match="'trajectories' or 'steps'"):
        Uniform(over="episodes")
    with pytest.raises(ValueError, match="anchor"):
        sparse.select(Uniform(), 3, anchor="middle")
    with pytest.raises(TypeError, match=r"a Selector such as Uniform\(\), got <class"):
        sparse.select(Uniform, 3)
    for size in (-1, "3"):
        with pytest.raises(ValueError, match="batch_size must be an integer of at least 0"):
            sparse.select(Uniform(), size)
    with pytest.raises(TypeError, match="windows must be a Window"):
        sparse.collect(sparse.select(Uniform(), 3), 20)


def test_gr05_selectors_follow_writes_removals_and_updates():
    table = table_of()
    selectors = [Uniform(over="steps"), Prioritized(1.0), Prioritized(0.5, over="steps"), Uniform()]
    for selector in selectors:
        table.attach(selector)
    random = np.random.default_rng(2)
    for _ in range(200):
        action = random.integers(0, 3)
        handles = table.handles()
        if action == 0 or len(table) < 2:
            table.write({"x": torch.zeros(int(random.integers(1, 20)))}, priority=float(random.random()))
        elif action == 1:
            table.remove(int(handles[random.integers(len(table))]))
        else:
            table.update_priorities(handles[:2], random.random(2))
    slots = table.index.ordered()
    length, priority = table.index.length[slots], table.index.priority[slots].astype(float)
    expected = [length, priority, priority**0.5 * length, np.ones(len(slots))]
    for selector, weights in zip(selectors, expected, strict=True):
        assert np.allclose(selector.slot_probability(slots), weights / weights.sum(), rtol=1e-12)


@pytest.mark.parametrize("normalize", ["table", "batch", None])
@pytest.mark.parametrize("over", ["trajectories", "steps"])
def test_gr07_importance_weights_equal_the_formula(normalize, over):
    table = table_of()
    selector = Prioritized(0.6, 0.7, over=over, normalize=normalize)
    selection = table.select(selector, 50, generator=CounterGenerator(1))
    weights = np.array(PRIORITIES) ** 0.6 * (np.array(LENGTHS) if over == "steps" else 1)
    weights[2] = 0
    item = weights / weights.sum() / (np.array(LENGTHS) if over == "steps" else 1)
    count = sum(LENGTHS) if over == "steps" else 6
    probability = selection.probability.numpy()
    raw = (count * probability) ** -0.7
    largest = {"table": ((count * item[item > 0]) ** -0.7).max(), "batch": raw.max(), None: 1.0}[normalize]
    assert np.allclose(selection.weight.numpy(), raw / largest, rtol=1e-6)
    assert selection.weight.dtype == torch.float32
    batch = table.collect(selection, Window(2))
    assert torch.equal(batch.weight, selection.weight)


def test_gr07_update_keeps_a_reused_slot_untouched():
    """A priority computed for an evicted trajectory must not land on its successor."""
    table = TrajectoryTable(TableSpec((ColumnSpec("x"),), 100, 3))
    selector = Prioritized(1.0)
    handles = [table.write({"x": torch.zeros(2)}, priority=1.0) for _ in range(3)]
    batch = table.select(selector, 30, generator=CounterGenerator(0))
    table.write({"x": torch.zeros(2)}, priority=0.125)  # evicts handles[0] and takes its slot
    dropped = table.update_priorities(batch.handles, np.full(30, 9.0))
    assert dropped == int((batch.handles == handles[0]).sum()) > 0
    assert table.priorities().tolist() == [9.0, 9.0, 0.125]


def test_gr24_a_use_once_queue_returns_every_trajectory_once_in_order():
    table = TrajectoryTable(TableSpec((ColumnSpec("x"),), 100, 10), max_times_sampled=1)
    selector = Fifo()
    written, seen = [], []
    for number in range(40):
        written.append(table.write({"x": torch.full((3,), float(number))}))
        if number % 4 == 3:
            selection = table.select(selector, 4, anchor="start")
            seen += selection.handles.tolist()
            batch = table.collect(selection, Window(1))
            assert batch["x"][:, 0].tolist() == [number - 3.0, number - 2, number - 1, number]
    assert seen == written
    with pytest.raises(RuntimeError, match="table is empty"):
        table.select(selector, 1)


def test_gr24_times_sampled_are_never_exceeded():
    table = table_of(max_times_sampled=3)
    selector = Uniform()
    drawn = torch.cat([table.select(selector, 6, generator=CounterGenerator(i)).handles for i in range(3)])
    assert torch.bincount(drawn & 0x7FFFFFFF).tolist() == [3] * 6
    again = table_of(max_times_sampled=2)
    again.select(Uniform(), 7)
    with pytest.raises(ValueError, match=r"cannot select 6 trajectories: 5 selections are left"):
        again.select(Uniform(), 6)


def test_gr24_shuffle_takes_every_trajectory_once_an_epoch():
    table = table_of()
    selector = Shuffle()
    generator = np.random.default_rng(0)
    handles = table.handles().tolist()
    orders = {}
    for _ in range(4000):
        epoch = [h for _ in range(2) for h in table.select(selector, 3, generator=generator).handles.tolist()]
        assert sorted(epoch) == handles
        orders[tuple(epoch[:2])] = orders.get(tuple(epoch[:2]), 0) + 1
    assert_law(list(orders.values()), [1] * 30)
    first = table.select(selector, 2, generator=generator).handles.tolist()
    left = [h for h in handles if h not in first]
    table.remove(left[0])
    rest = table.select(selector, 3, generator=generator).handles.tolist()
    assert sorted(rest) == sorted(left[1:])


@pytest.mark.parametrize(
    ("make", "weights"),
    [
        (lambda: Prioritized(1.0, stratified=True), [5.0, 0.0, 1.0, 2.5, 0.25]),
        (lambda: Uniform(over="steps", stratified=True), [1.0, 2.0, 3.0, 4.0, 5.0]),
    ],
)
def test_gr24_stratified_draws_take_one_item_a_stratum_and_keep_the_law(make, weights):
    table = table_of(lengths=(1, 2, 3, 4, 5), priorities=(5.0, 0.0, 1.0, 2.5, 0.25))
    selector, handles = make(), table.handles()
    expected = 64 * torch.tensor(weights, dtype=torch.float64) / sum(weights)
    first, turns = torch.zeros(5), 600
    for turn in range(turns):
        drawn = table.select(selector, 64, generator=CounterGenerator(3, turn)).handles
        counts = (drawn[:, None] == handles).sum(0)
        assert bool(((counts - expected).abs() < 2).all())  # i.i.d. draws would stray by 4 and more
        first += drawn[0] == handles
    law = expected / 64 * turns
    kept = law > 0
    assert bool((first[~kept] == 0).all())
    assert float(((first - law)[kept] ** 2 / law[kept]).sum()) < 30  # the first position has the law
    with pytest.raises(ValueError, match="stratified draws are with replacement"):
        Uniform(replacement=False, stratified=True)


def test_gr30_a_mixture_draws_tasks_by_weight():
    tables = {"a": table_of(), "b": table_of((5,), (1.0,)), "c": table_of((2,), (1.0,))}
    mixture = Mixture(tables, {name: Uniform() for name in tables}, {"a": 3.0, "b": 1.0, "c": 0.0})
    windows = dict.fromkeys(tables, Window(2))
    generator = np.random.default_rng(0)
    counts = np.zeros(3)
    for _ in range(300):
        batches = mixture.sample(64, windows, generator=generator)
        sizes = [batches[name].batch_size if name in batches else 0 for name in tables]
        assert sum(sizes) == 64
        counts += sizes
    assert_law(counts, [3, 1, 0])
    with pytest.raises(ValueError, match="same tasks"):
        Mixture(tables, {}, {})
