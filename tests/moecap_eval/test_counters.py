"""Recording experts by pass in the ring on the device, against plain NumPy."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moecap_eval.engines.counters import PassCounters, PassCounts
from moecap_eval.engines.counting import count_passes
from moecap_eval.engines.lanes import HostLane

LAYERS, EXPERTS, TOP_K, MAX_ROWS, GRAPH_ROWS = 2, 6, 2, 16, 4
RING_ROWS = 90
EAGER_OPERATIONS, REPLAYED_CALLS = 5, 6  # of a recorded pass, on the host
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Bench:
    """Counters with the buffer of token ids that an engine would own."""

    def __init__(self, device: str = "cpu", ring_rows: int = RING_ROWS, **sizes: int) -> None:
        self.device = torch.device(device)
        self.input_ids = torch.zeros(MAX_ROWS, dtype=torch.int32, device=self.device)
        given = {"num_layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K} | sizes
        ring_bytes = 4 * ring_rows * (given["num_layers"] + 2) * max(given["top_k"], 1)
        self.counters = PassCounters(
            **given, input_ids=self.input_ids, device=self.device, ring_bytes=ring_bytes
        )

    def run(self, ids: np.ndarray, tokens: np.ndarray, rows: int | None = None, parts: int = 1) -> None:
        """A pass of ``ids`` [layers, rows, top_k], layer by layer, in as many micro-batches as asked for."""
        self.input_ids[: len(tokens)] = torch.from_numpy(tokens).int().to(self.device)
        self.counters.begin(ids.shape[1] if rows is None else rows)
        for slot, layer in enumerate(ids):
            for part in np.array_split(layer, parts):
                self.counters.capture(slot)(torch.from_numpy(part).int().to(self.device))
        self.counters.end()


def random_pass(generator: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    ids = [[generator.permutation(EXPERTS)[:TOP_K] for _ in range(rows)] for _ in range(LAYERS)]
    return np.array(ids).reshape(LAYERS, rows, TOP_K), generator.integers(0, 5, rows)


def check(got: PassCounts, ids: np.ndarray, tokens: np.ndarray, rows: int) -> None:
    """Against counting by hand; ``ids`` holds padding rows too."""
    counts = [np.bincount(layer[:rows].ravel(), minlength=EXPERTS) for layer in ids]
    assert got.counts.tolist() == [layer.tolist() for layer in counts]
    assert got.loaded.tolist() == [np.unique(layer).size for layer in ids]
    assert got.distinct_tokens == np.unique(tokens[:rows]).size
    assert got.duration_s > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parts", [1, 2])
def test_cap08_counts_of_passes_of_all_sizes(device: str, parts: int) -> None:
    """Many more passes than the ring holds."""
    bench, generator = Bench(device), np.random.default_rng(0)
    sizes = [5, 1, 16, 3, 4, 2, 1, 1, 2, 4] * 40
    passes = [random_pass(generator, rows) for rows in sizes]
    for ids, tokens in passes:
        bench.run(ids, tokens, parts=parts)
    found = bench.counters.drain()
    assert bench.counters.drain() == []
    for got, (ids, tokens), rows in zip(found, passes, sizes, strict=True):
        check(got, ids, tokens, rows)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, MAX_ROWS), min_size=1, max_size=12), st.data())
def test_cap08_drains_at_any_moment_lose_nothing(sizes: list[int], data: st.DataObject) -> None:
    bench, generator = Bench(), np.random.default_rng(len(sizes))
    passes, found = [], []
    for rows in sizes:
        passes.append(random_pass(generator, rows))
        bench.run(*passes[-1])
        if data.draw(st.booleans()):
            found += bench.counters.drain()
    found += bench.counters.drain()
    for got, (ids, tokens), rows in zip(found, passes, sizes, strict=True):
        check(got, ids, tokens, rows)


def test_cap08_padding_rows_load_experts_and_route_nothing() -> None:
    bench = Bench()
    ids = np.array([[[0, 1], [2, 3], [4, 5], [4, 5]]] * LAYERS)
    for rows in (2, 1, 4):
        bench.run(ids, np.array([7, 8, 9, 9]), rows=rows)
    narrow = np.array([[[0, 1]]] * LAYERS)  # the next graph is smaller: what it does not write counts nowhere
    bench.run(narrow, np.array([7]))
    found = bench.counters.drain()
    for got, rows in zip(found, (2, 1, 4), strict=False):
        check(got, ids, np.array([7, 8, 9, 9]), rows)
    check(found[-1], narrow, np.array([7]), 1)


def test_cap08_a_layer_that_did_not_run_is_a_hole() -> None:
    bench = Bench()
    full = np.array([[[0, 1], [2, 3]]] * LAYERS)
    bench.run(full, np.array([1, 2]))
    for slot in range(LAYERS):
        bench.counters.begin(1)
        bench.counters.capture(slot)(torch.tensor([[1, 3]], dtype=torch.int32))
        bench.counters.end()
    bench.counters.begin(2)
    bench.counters.end()
    totals = [got.counts.sum(axis=1).tolist() for got in bench.counters.drain()]
    assert totals == [[4, 4], [2, 0], [0, 2], [0, 0]]


def test_cap08_each_pass_keeps_its_note_whoever_drains_and_whatever_raised() -> None:
    """A recorder that paired its own list with what it drained died when anything else had drained."""
    bench = Bench()
    ids, tokens = np.array([[[0, 1], [2, 3]]] * LAYERS), np.array([1, 2])
    bench.counters.begin(2, "drained elsewhere")
    bench.counters.end()
    assert [got.note for got in bench.counters.drain()] == ["drained elsewhere"]
    for note in ("raised, another follows", "raised, a drain follows"):
        bench.run(ids, tokens)
        bench.counters.begin(2, note)
        bench.counters.capture(0)(torch.from_numpy(ids[0]).int())  # and then the model raises
        bench.counters.flush()  # a dummy batch of another rank
    found = bench.counters.drain()
    bench.counters.end()
    assert bench.counters.drain() == []
    assert [got.note for got in found] == [None, "raised, another follows", None, "raised, a drain follows"]
    check(found[0], ids, tokens, 2)
    check(found[2], ids, tokens, 2)
    assert [got.counts.sum(axis=1).tolist() for got in found[1::2]] == [[4, 0], [4, 0]]


def test_cap08_ids_outside_a_pass_are_not_kept() -> None:
    bench = Bench()
    bench.counters.capture(0)(torch.tensor([[0, 1]], dtype=torch.int32))
    bench.run(np.array([[[2, 3]], [[4, 5]]]), np.array([1]))
    (got,) = bench.counters.drain()
    assert got.counts.tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]


def test_cap08_dense_models_have_tokens_alone() -> None:
    bench = Bench(num_layers=0, num_experts=0, top_k=0)
    bench.input_ids[:4] = torch.tensor([1, 1, 2, 5])
    for rows in (3, 9):
        bench.counters.begin(rows)
        bench.counters.end()
    found = bench.counters.drain()
    assert [got.counts.shape for got in found] == [(0, 0)] * 2
    assert [got.distinct_tokens for got in found] == [2, 4]


def test_cap08_one_buffer_for_all_layers_is_refused() -> None:
    bench = Bench()
    shared = torch.zeros((1, TOP_K), dtype=torch.int32)
    bench.counters.begin(1)
    bench.counters.capture(0)(shared)
    with pytest.raises(RuntimeError, match=r"in one buffer.*cannot be observed"):
        bench.counters.capture(1)(shared)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint32, torch.int32])
def test_cap08_any_dtype_of_ids(dtype: torch.dtype) -> None:
    bench = Bench()
    bench.counters.begin(1)
    for slot in range(LAYERS):
        bench.counters.capture(slot)(torch.tensor([[5, 0]]).to(dtype))
    bench.counters.end()
    (got,) = bench.counters.drain()
    assert got.counts.tolist() == [[1, 0, 0, 0, 0, 1]] * 2


def test_cap08_ids_of_no_expert_count_nowhere() -> None:
    """Two passes of 3 and 1 rows, the second one's last row is padding, and an entry behind the end."""
    entries = torch.full((4, 6, 2), 99, dtype=torch.int32)  # two layers, tokens, numbers of rows
    entries[0, :5] = torch.tensor([[-1, 0], [3, 7], [1, 1], [2, 0], [3, 3]])
    entries[1, :5] = 9
    entries[2, :5] = torch.tensor([8, 8, 9, 4, 5])[:, None]
    entries[3, :5] = torch.tensor([0, 1, 2, 0, 1])[:, None]
    used = torch.tensor([3, 1], dtype=torch.int32)
    got = count_passes(entries, torch.tensor([5]), used, num_experts=4)
    first, second = got[:-2].view(2, -1).tolist()
    assert first == [1, 2, 0, 1, 0, 0, 0, 0, 3, 0, 2]
    assert second == [1, 0, 1, 0, 0, 0, 0, 0, 3, 0, 1]
    assert got[-2:].tolist() == [2, 5]


class CapturingLane(HostLane):
    """Says that a graph is being captured, as a CUDA stream would."""

    capturing = False

    def is_capturing(self) -> bool:
        return self.capturing


class Graph(TorchDispatchMode):
    """What a CUDA graph is to the host, on a CPU: the operations seen while it is captured, to be repeated
    on the same memory. Host functions run at capture alone."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.nodes.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for function, args, kwargs, result in self.nodes:
            again = function(*args, **kwargs)
            if again.data_ptr() != result.data_ptr():  # neither a view nor in place
                result.copy_(again)


def captured(bench: Bench, sources: torch.Tensor) -> Graph:
    """A graph in which the layers hand over copies of ``sources`` [layers, rows, top_k]."""
    lane = bench.counters._lane = CapturingLane()
    with Graph() as graph:
        lane.capturing = True
        for slot in range(LAYERS):
            bench.counters.capture(slot)(sources[slot] + 0)
        lane.capturing = False
    return graph


def test_cap08_a_graph_counts_at_each_replay() -> None:
    """Graphs of two sizes, eager passes between, and replays that no pass announced."""
    bench, generator = Bench(), np.random.default_rng(3)
    sources = torch.zeros((LAYERS, GRAPH_ROWS, TOP_K), dtype=torch.int32)
    graphs = {rows: captured(bench, sources[:, :rows]) for rows in (4, 2)}
    expected = []
    for index in range(300):
        rows = int(generator.integers(1, 8))
        ids, tokens = random_pass(generator, max(rows, GRAPH_ROWS))
        if rows > GRAPH_ROWS:
            bench.run(ids, tokens)
        else:
            padded = 2 if rows <= 2 else 4
            sources.copy_(torch.from_numpy(ids[:, :GRAPH_ROWS]))
            bench.input_ids[: len(tokens)] = torch.from_numpy(tokens)
            bench.counters.begin(rows)
            graphs[padded].replay()
            bench.counters.end()
            ids = ids[:, :padded]
        expected.append((ids, tokens, rows))
        if index % 100 == 50:
            bench.counters.flush()
            for _ in range(200):  # a paused recorder, a dummy run
                graphs[4].replay()
    for got, (ids, tokens, rows) in zip(bench.counters.drain(), expected, strict=True):
        check(got, ids, tokens, rows)


def test_cap08_a_graph_that_does_not_record_is_found() -> None:
    bench = Bench()
    graph = captured(bench, torch.zeros((LAYERS, GRAPH_ROWS, TOP_K), dtype=torch.int32))
    for replayed in (True, False, True):
        bench.counters.begin(2)
        if replayed:
            graph.replay()
        bench.counters.end()
    problems = [got.problem for got in bench.counters.drain()]
    assert problems == ["2 passes were recorded where 3 ran: which of them is not known"] * 3
    bench.counters.begin(5)  # larger than the graph, and nothing was called: a hole
    bench.counters.end()
    (hole,) = bench.counters.drain()
    assert hole.problem is None
    assert hole.counts.sum() == 0


@pytest.mark.parametrize("ring_rows", [20, 23])
def test_cap08_overflow_is_found_and_spares_what_came_before(ring_rows: int) -> None:
    """The engine runs larger graphs than the host reckons with: passes 4, 5, 6 do not fit."""
    bench = Bench(ring_rows=ring_rows)
    ids = np.array([[[0, 1], [2, 3], [4, 5], [4, 5]]] * LAYERS)
    large = captured(bench, torch.from_numpy(ids).int())
    bench.counters._graph_sizes = [1]
    announced = 7
    for _ in range(announced):
        bench.counters.begin(1)
        large.replay()
        bench.counters.end()
    found = bench.counters.drain()
    assert len(found) == announced
    whole = [got for got in found if got.problem is None]
    # The copy of the ring ends with the 7 rows that the host reckons with: one pass of four and a part.
    assert len(whole) == 1
    check(whole[0], ids, np.array([0]), 1)
    assert all("overflowed" in got.problem for got in found[1:])


def test_cap08_overflow_of_the_ring_itself_overwrites_nothing() -> None:
    bench = Bench(ring_rows=20)
    graph = captured(bench, torch.zeros((LAYERS, GRAPH_ROWS, TOP_K), dtype=torch.int32))
    bench.counters.begin(4)
    for _ in range(50):  # far beyond the last row
        graph.replay()
    bench.counters.end()
    assert int(bench.counters._positions.max()) == 20
    (got,) = bench.counters.drain()
    assert "overflowed" in got.problem
    bench.run(np.array([[[2, 3]], [[4, 5]]]), np.array([1]))
    (after,) = bench.counters.drain()
    assert after.problem is None
    assert after.counts.tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]


def host_cost(work: Callable[[], None]) -> tuple[int, int]:
    """Operations on tensors that ``work`` dispatches, and Python functions it calls."""
    calls = 0

    def count(frame, event: str, argument) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    with Graph() as operations:
        work()
    return len(operations.nodes), calls - 1  # without `work` itself


@pytest.mark.parametrize("layers", [2, 24, 61])
def test_cap08_a_recorded_step_costs_the_host_the_same_for_any_number_of_layers(layers: int) -> None:
    """A replayed graph: two readings of the clock and no tensor is touched. An eager pass: 5 operations,
    and for each layer one call of what vLLM was given."""
    bench = Bench(num_layers=layers, ring_rows=5000)
    ids = [torch.zeros((1, TOP_K), dtype=torch.int32) for _ in range(layers)]
    functions = [bench.counters.capture(slot) for slot in range(layers)]

    def eager() -> None:
        bench.counters.begin(1)
        with torch.inference_mode():  # as an engine runs its model
            for function, of_layer in zip(functions, ids, strict=True):
                function(of_layer)
        bench.counters.end()

    def replayed() -> None:
        bench.counters.begin(1)
        bench.counters.end()

    eager()  # the first pass sets the ring back
    assert host_cost(eager)[0] == EAGER_OPERATIONS
    bench.counters._graph_sizes = [1]
    assert host_cost(replayed) == (0, REPLAYED_CALLS)


@pytest.mark.gpu
def test_cap08_counts_under_replayed_cuda_graphs() -> None:
    """Graphs of several sizes share a pool, as vLLM's do; passes alternate between them and eager ones."""
    bench, generator = Bench("cuda"), np.random.default_rng(1)
    sources = torch.zeros((LAYERS, GRAPH_ROWS, TOP_K), dtype=torch.int32, device="cuda")
    functions = [bench.counters.capture(slot) for slot in range(LAYERS)]
    graphs, pool = {}, torch.cuda.graph_pool_handle()
    for rows in (4, 2, 1):
        graphs[rows] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[rows], pool=pool):
            for slot in range(LAYERS):
                functions[slot](sources[slot, :rows] + 0)  # a tensor that only the graph holds
                torch.full((64,), 5, dtype=torch.int32, device="cuda").add_(1)  # may take its place
    expected = []
    for index in range(300):
        rows = int(generator.integers(1, 10))
        ids, tokens = random_pass(generator, max(rows, GRAPH_ROWS))
        if rows > GRAPH_ROWS:
            bench.run(ids, tokens)
            expected.append((ids, tokens, rows))
            continue
        padded = next(size for size in (1, 2, 4) if size >= rows)
        bench.input_ids[: len(tokens)] = torch.from_numpy(tokens).int().cuda()
        sources.copy_(torch.from_numpy(ids[:, :GRAPH_ROWS]))
        bench.counters.begin(rows)
        graphs[padded].replay()
        bench.counters.end()
        expected.append((ids[:, :padded], tokens, rows))
        if index % 100 == 50:
            torch.cuda.synchronize()
    for got, (ids, tokens, rows) in zip(bench.counters.drain(), expected, strict=True):
        check(got, ids, tokens, rows)


@pytest.mark.gpu
def test_cap08_end_of_a_pass_does_not_wait_for_the_device() -> None:
    """A hundred passes are handed over while the device still works on the first."""
    bench = Bench("cuda")
    for _ in range(100):
        bench.run(*random_pass(np.random.default_rng(0), 2))
    bench.counters.drain()  # pinned memory is there from now on
    ids = torch.zeros((LAYERS, 2, TOP_K), dtype=torch.int32, device="cuda")
    functions = [bench.counters.capture(slot) for slot in range(LAYERS)]
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    mark = torch.cuda.Event()
    mark.record()
    for _ in range(100):
        bench.counters.begin(2)
        for slot in range(LAYERS):
            functions[slot](ids[slot])
        bench.counters.end()
    assert not mark.query()
    assert len(bench.counters.drain()) == 100
