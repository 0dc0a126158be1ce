"""Counting experts by pass: on the host, and on a device with its ring, against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecap_eval.engines import device_counters
from moecap_eval.engines.counters import HostPassCounters, PassCounts
from moecap_eval.engines.device_counters import DevicePassCounters, count_passes

LAYERS, EXPERTS, TOP_K, MAX_ROWS, GRAPH_ROWS = 2, 6, 2, 16, 4
KINDS = ["host", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Bench:
    """Counters with the buffer of token ids that an engine would own."""

    def __init__(self, kind: str, **sizes: int) -> None:
        self.device = torch.device("cuda" if kind == "cuda" else "cpu")
        self.input_ids = torch.zeros(MAX_ROWS, dtype=torch.int32, device=self.device)
        given = {"num_layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K, "max_rows": MAX_ROWS} | sizes
        self.counters: HostPassCounters | DevicePassCounters
        if kind == "host":
            self.counters = HostPassCounters(**given, input_ids=self.input_ids)
        else:
            options = {"graph_rows": GRAPH_ROWS, "device": self.device}
            self.counters = DevicePassCounters(**given, **options, input_ids=self.input_ids)

    def run(self, ids: np.ndarray, tokens: np.ndarray, rows: int | None = None, parts: int = 1) -> None:
        """A pass of ``ids`` [layers, rows, top_k], in as many micro-batches as asked for."""
        self.input_ids[: len(tokens)] = torch.from_numpy(tokens).int().to(self.device)
        self.counters.begin()
        for slot, layer in enumerate(ids):
            for part in np.array_split(layer, parts):
                self.counters.capture(slot)(torch.from_numpy(part).int().to(self.device))
        self.counters.end(ids.shape[1] if rows is None else rows)


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [1, 2])
def test_cap08_counts_of_passes_of_all_sizes(kind: str, parts: int) -> None:
    """More passes than both halves of the ring hold, some larger than a slot of it."""
    bench, generator = Bench(kind), np.random.default_rng(0)
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
    bench, generator = Bench("cpu"), np.random.default_rng(len(sizes))
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
    bench = Bench("cpu")
    ids = np.array([[[0, 1], [2, 3], [4, 5], [4, 5]]] * LAYERS)
    for rows in (2, 1, 4):
        bench.run(ids, np.array([7, 8, 9, 9]), rows=rows)
    narrow = np.array([[[0, 1]]] * LAYERS)  # the next graph is smaller: what it does not write counts nowhere
    bench.run(narrow, np.array([7]))
    found = bench.counters.drain()
    for got, rows in zip(found, (2, 1, 4), strict=False):
        check(got, ids, np.array([7, 8, 9, 9]), rows)
    check(found[-1], narrow, np.array([7]), 1)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_cap08_a_layer_that_did_not_run_is_a_hole(kind: str) -> None:
    bench = Bench(kind)
    full = np.array([[[0, 1], [2, 3]]] * LAYERS)
    bench.run(full, np.array([1, 2]))
    for slot in range(LAYERS):
        bench.counters.begin()
        bench.counters.capture(slot)(torch.tensor([[1, 3]], dtype=torch.int32))
        bench.counters.end(1)
    bench.counters.begin()
    bench.counters.end(2)
    totals = [got.counts.sum(axis=1).tolist() for got in bench.counters.drain()]
    assert totals == [[4, 4], [2, 0], [0, 2], [0, 0]]


@pytest.mark.parametrize("kind", KINDS[:2])
def test_cap08_ids_outside_a_pass_are_not_kept(kind: str) -> None:
    bench = Bench(kind)
    bench.counters.capture(0)(torch.tensor([[0, 1]], dtype=torch.int32))
    bench.run(np.array([[[2, 3]], [[4, 5]]]), np.array([1]))
    (got,) = bench.counters.drain()
    assert got.counts.tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("kind", KINDS[:2])
def test_cap08_dense_models_have_tokens_alone(kind: str) -> None:
    bench = Bench(kind, num_layers=0, num_experts=0, top_k=0)
    bench.input_ids[:4] = torch.tensor([1, 1, 2, 5])
    for rows in (3, 9):
        bench.counters.begin()
        bench.counters.end(rows)
    found = bench.counters.drain()
    assert [got.counts.shape for got in found] == [(0, 0)] * 2
    assert [got.distinct_tokens for got in found] == [2, 4]


def test_cap08_one_buffer_for_all_layers_is_refused() -> None:
    bench = Bench("cpu")
    shared = torch.zeros((1, TOP_K), dtype=torch.int32)
    bench.counters.begin()
    bench.counters.capture(0)(shared)
    with pytest.raises(RuntimeError, match=r"in one buffer.*cannot be observed"):
        bench.counters.capture(1)(shared)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint32, torch.int32])
def test_cap08_any_dtype_of_ids(dtype: torch.dtype) -> None:
    bench = Bench("cpu")
    bench.counters.begin()
    for slot in range(LAYERS):
        bench.counters.capture(slot)(torch.tensor([[5, 0]]).to(dtype))
    bench.counters.end(1)
    (got,) = bench.counters.drain()
    assert got.counts.tolist() == [[1, 0, 0, 0, 0, 1]] * 2


def test_cap08_ids_of_no_expert_count_nowhere() -> None:
    passes = torch.full((1, 2, 4, 2), 99, dtype=torch.int32)
    passes[0, 0, :3] = torch.tensor([[-1, 0], [3, 7], [1, 1]])
    passes[0, 1] = torch.tensor([[2, 8], [8, 9], [0, 0], [0, 0]])  # 2 rows written, tokens 8 8 9
    got = count_passes(passes, torch.tensor([2], dtype=torch.int32), 4)[0].tolist()
    assert got == [1, 0, 0, 1, 2, 1]


class CapturingLane(device_counters._HostLane):
    """Says that a graph is being captured, as a CUDA stream would."""

    capturing = False

    def is_capturing(self) -> bool:
        return self.capturing


def test_cap08_a_graph_counts_at_each_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph stands for its kernels alone: host functions run at capture, copies at each replay."""
    bench = Bench("cpu")
    lane = bench.counters._lane = CapturingLane()
    ids = torch.tensor(
        [[[0, 1], [2, 3], [4, 5], [4, 5]], [[1, 0], [1, 2], [1, 3], [1, 4]]], dtype=torch.int32
    )
    copy, recorded = torch._foreach_copy_, []
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", lambda *lists: recorded.append(lists))
        lane.capturing = True
        for slot in range(LAYERS):
            bench.counters.capture(slot)(ids[slot])
        lane.capturing = False
    ((targets, sources),) = recorded
    tokens = np.array([3, 3, 4, 0])
    bench.input_ids[:4] = torch.from_numpy(tokens)
    for rows in (1, 2, 3, 4) * 40:
        bench.counters.begin()
        copy(targets, sources)
        bench.counters.end(rows)
    bench.counters.begin()
    bench.counters.end(5)  # larger than the graph, and nothing was called: a hole
    *found, hole = bench.counters.drain()
    assert hole.counts.sum() == 0
    for index, got in enumerate(found):
        check(got, ids.numpy(), tokens, index % 4 + 1)


def test_cap08_a_graph_without_the_gather_is_found() -> None:
    """At the latest the first pass after the ring turned shows that nothing was written."""
    bench = Bench("cpu")
    bench.counters._lane = CapturingLane()
    bench.counters._largest_graph = GRAPH_ROWS
    for _ in range(3):
        bench.counters.begin()
        bench.counters.end(2)
    assert [got.counts.sum() for got in bench.counters.drain()] == [0, 0, 0]


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
        bench.counters.begin()
        graphs[padded].replay()
        bench.counters.end(rows)
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
        bench.counters.begin()
        for slot in range(LAYERS):
            functions[slot](ids[slot])
        bench.counters.end(2)
    assert not mark.query()
    assert len(bench.counters.drain()) == 100
