"""GNN inference as a service in one process: batches bounded by predicted work, deadlines, back-pressure."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyg_quiver.answering import Samplers, Setup
from pyg_quiver.feature_store import QuiverFeatureStore
from pyg_quiver.routing import CostModel, EarliestFinishRouter, ThresholdRouter, require_routes

Router = ThresholdRouter | EarliestFinishRouter

# Batches that wait at a route while it works: with more, requests would miss better routes.
_BATCHES_AHEAD = 1
_SMOOTHING = 0.2
_RECENT = 10_000
_MOST_CORRECTION = 4.0  # a batch that compiled or waited says little about the next


class EngineOverloaded(RuntimeError):
    """The queue is full; try again after ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        """For a caller in another process: an exception is otherwise made again from its message alone."""
        return type(self), (*self.args, self.retry_after_s)


@dataclass(frozen=True)
class Response:
    """Answer to a request.

    Attributes:
        request_id: as submitted or assigned.
        output: ``[len(node), C]`` on the CPU.
        route: which sampler made it.
        psgs: predicted work of the request.
        queue_s: seconds from submission to the start of its batch.
        service_s: seconds from there to the answer.
        degraded: sampled with the smaller fan-outs, because the engine was overloaded.
    """

    request_id: int
    output: Tensor
    route: str
    psgs: float
    queue_s: float
    service_s: float
    degraded: bool = False


@dataclass(frozen=True)
class EngineStats:
    """Requests since the start, and how it stands now.

    Attributes:
        accepted: requests that were not refused.
        rejected: requests that met a full queue.
        failed: accepted ones that ended in an exception.
        completed: answers.
        per_route: answers of each route.
        degraded: answers from the smaller fan-outs.
        waiting: requests in the queue now.
        latency_s: "p50", "p99" and "p99.9" of the last 10,000 answers, from submission; empty without.
    """

    accepted: int
    rejected: int
    failed: int
    completed: int
    per_route: dict[str, int]
    degraded: int = 0
    waiting: int = 0
    latency_s: dict[str, float] = field(default_factory=dict)


@dataclass(order=True)
class _Request:
    deadline: float
    number: int
    request_id: int = field(compare=False)
    node: Tensor = field(compare=False)
    psgs: float = field(compare=False)
    submitted: float = field(compare=False)
    future: Future[Response] = field(compare=False)


@dataclass(frozen=True)
class _Batch:
    """Requests that are answered together, what answers them, and their predicted work."""

    requests: list[_Request]
    setup: Setup
    psgs: float
    degraded: bool


class InferenceEngine:
    """Serves a model over sampled neighbourhoods; a context manager.

    Each request is sampled by itself with its own key, whatever else is in its batch and wherever it runs, so
    an answer depends on the model, the sampler's seed, the request id and the nodes only.

    Args:
        model: ``model(x, edge_index)``, in evaluation mode; ``num_sampled_nodes_per_hop`` and
            ``num_sampled_edges_per_hop`` are passed too if its forward takes them.
        features: a :class:`QuiverFeatureStore` with the attribute "x", or a tensor ``[N, F]``.
        samplers: one :class:`QuiverSampler`, or one for each route.
        router: chooses the route of a batch; needed for several routes.
        max_batch_psgs: predicted work of a batch; a larger request runs alone.
        max_wait_ms: how long the first request of a batch waits for others.
        max_queue: waiting requests; more are refused with :class:`EngineOverloaded`.
        deadline_ms: of every request, unless it brings its own; past it its Future gets a TimeoutError.
        workers: threads of each route (1 where absent); more let CPU sampling use more cores.
        degraded: samplers of the same routes with smaller fan-outs, used while requests would wait longer
            than ``degrade_after_ms``. Such an answer says so, and ``infer(..., degraded=True)`` repeats it.
        degrade_after_ms: predicted wait from which batches are degraded.
    """

    def __init__(
        self,
        model: Any,
        features: QuiverFeatureStore | Tensor,
        samplers: Samplers,
        *,
        router: Router | None = None,
        max_batch_psgs: float = 50_000.0,
        max_wait_ms: float = 1.0,
        max_queue: int = 4096,
        deadline_ms: float | None = None,
        workers: Mapping[str, int] | None = None,
        degraded: Samplers | None = None,
        degrade_after_ms: float = 5.0,
    ) -> None:
        self._setup = Setup.make(model, features, samplers, degraded)
        routes = list(self._setup.samplers)
        if router is None and len(routes) > 1:
            raise ValueError(f"samplers has routes {', '.join(routes)}: pass a router")
        if router is not None:
            require_routes(router, routes)
        if max_queue < 1 or max_batch_psgs <= 0 or max_wait_ms < 0 or (deadline_ms or 0) < 0:
            raise ValueError(
                "max_queue must be at least 1, max_batch_psgs positive, "
                "max_wait_ms and deadline_ms not negative"
            )
        count = dict.fromkeys(routes, 1) | dict(workers or {})
        if set(count) != set(routes) or min(count.values()) < 1:
            raise ValueError(f"workers is {workers}; it must give at least 1 for some of {', '.join(routes)}")
        self._router = router
        self._degrade_after_s = degrade_after_ms / 1e3
        self._max_batch_psgs = max_batch_psgs
        self._max_wait_s = max_wait_ms / 1e3
        self._max_queue = max_queue
        self._deadline_s = None if deadline_ms is None else deadline_ms / 1e3
        self._changed = threading.Condition()
        self._queue: deque[_Request] = deque()
        self._deadlines: list[_Request] = []
        self._number = itertools.count()
        self._accepting, self._stopping = True, False
        self._in_flight: dict[int, _Request] = {}
        self._accepted = self._rejected = self._failed = self._completed = self._degraded = 0
        self._waiting_psgs = 0.0
        self._recent_s: deque[float] = deque(maxlen=_RECENT)
        self._per_route = dict.fromkeys(routes, 0)
        self._second_per_psgs = 1e-7
        self._lanes = [_Lane(self, route, i) for route in routes for i in range(count[route])]
        self._dispatcher = threading.Thread(target=self._dispatch, name="pyg_quiver-dispatch", daemon=True)
        self._dispatcher.start()

    def submit(
        self, node: Tensor, *, request_id: int | None = None, deadline_ms: float | None = None
    ) -> Future[Response]:
        """Ask for the outputs of some nodes.

        Args:
            node: int64 ``[n]``.
            request_id: part of the answer's randomness; consecutive numbers when absent.
            deadline_ms: milliseconds from now.

        Returns:
            A Future that resolves exactly once; ``cancel()`` works until its batch starts.

        Raises:
            IndexError: a node that is not in the graph.
            EngineOverloaded: the queue is full.
            RuntimeError: the engine is closed or all its workers died.
        """
        node = torch.as_tensor(node).cpu()
        setup = self._setup
        setup.check(node)
        node = node.long()
        if deadline_ms is not None and deadline_ms < 0:
            raise ValueError(f"deadline_ms is {deadline_ms}; it must not be negative")
        if request_id is not None and not isinstance(request_id, Integral):
            raise TypeError(f"request_id is {request_id!r}; it must be an integer: draws are made from it")
        psgs = float(setup.psgs[node].sum())
        limit = self._deadline_s if deadline_ms is None else deadline_ms / 1e3
        now = time.perf_counter()
        with self._changed:
            self.check()
            if len(self._queue) >= self._max_queue:
                self._rejected += 1
                retry = max(self._backlog_s(), 1e-3)
                raise EngineOverloaded(
                    f"{len(self._queue)} requests are waiting (max_queue); retry in {retry:.3f} s", retry
                )
            number = next(self._number)
            request = _Request(
                float("inf") if limit is None else now + limit, number,
                number if request_id is None else int(request_id), node, psgs, now, Future(),
            )  # fmt: skip
            self._accepted += 1
            self._queue.append(request)
            self._waiting_psgs += psgs
            if limit is not None:
                heapq.heappush(self._deadlines, request)
            self._changed.notify_all()
        return request.future

    def infer(self, node: Tensor, *, request_id: int = 0, degraded: bool = False) -> Tensor:
        """The answer that :meth:`submit` would give, computed here and now: ``[len(node), C]``."""
        node = torch.as_tensor(node).cpu()
        setup = self._setup.degraded if degraded else self._setup
        if setup is None:
            raise ValueError("degraded=True, but the engine has no degraded samplers")
        setup.check(node)
        node = node.long()
        return setup.answer(next(iter(setup.samplers)), node, torch.zeros_like(node), [request_id])

    def check(self) -> None:
        """Raise RuntimeError if the engine is closed or all its workers died."""
        if not self._accepting:
            raise RuntimeError("InferenceEngine is closed")
        if all(lane.dead for lane in self._lanes):
            names = ", ".join(lane.name for lane in self._lanes)
            raise RuntimeError(f"all workers died: {names}")

    def stats(self) -> EngineStats:
        """Counts of requests so far, what waits now, and recent latencies."""
        with self._changed:
            recent = list(self._recent_s)
            counts = (
                self._accepted, self._rejected, self._failed, self._completed, dict(self._per_route),
                self._degraded, len(self._queue),
            )  # fmt: skip
        shares = dict(zip(("p50", "p99", "p99.9"), (0.5, 0.99, 0.999), strict=True))
        latency = {name: float(np.quantile(recent, q)) for name, q in shares.items()} if recent else {}
        return EngineStats(*counts, latency)

    def reload(
        self,
        *,
        model: Any = None,
        features: QuiverFeatureStore | Tensor | None = None,
        samplers: Samplers | None = None,
    ) -> None:
        """Replace model, features or graph without dropping a request: later batches use the new ones.

        Raises:
            ValueError: samplers of other routes.
        """
        old = self._setup
        new = old.changed(model, features, samplers)
        if set(new.samplers) != set(old.samplers):
            raise ValueError(f"samplers has routes {sorted(new.samplers)}, the engine {sorted(old.samplers)}")
        self._setup = new

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Stop accepting, finish what is waiting (or refuse it), end all threads. Idempotent.

        Args:
            drain: answer waiting requests first; otherwise they fail with RuntimeError.
            timeout_s: how long to drain; what is left then fails likewise.
        """
        with self._changed:
            self._accepting = False
            if drain:
                self._changed.wait_for(lambda: not self._queue and not self._in_flight, timeout_s)
            self._stopping = True
            refused = [*self._queue, *self._in_flight.values()]
            self._queue.clear()
            self._waiting_psgs = 0.0
            self._changed.notify_all()
        for request in refused:
            self._fail(request, RuntimeError("InferenceEngine is closed"))
        self._dispatcher.join()
        for lane in self._lanes:
            lane.stop(timeout_s)

    def __enter__(self) -> InferenceEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Dispatching.

    def _dispatch(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._something_to_do, self._seconds_to_deadline())
                expired = self._expired()
                batch: _Batch | None = None
                stop = self._stopping and not self._queue
                if not stop:
                    batch = self._next_batch()
            for request in expired:
                self._fail(request, TimeoutError(f"request {request.request_id} missed its deadline"))
            if stop:
                return
            if batch:
                self._send(batch)

    def _something_to_do(self) -> bool:
        if self._stopping or (self._deadlines and self._deadlines[0].deadline <= time.perf_counter()):
            return True
        return bool(self._queue) and self._has_room()

    def _has_room(self) -> bool:
        """Whether the worker that the next batch would go to is free for it (or none is left to wait for)."""
        lane = self._lane_for(min(self._waiting_psgs, self._max_batch_psgs))
        return lane is None or lane.has_room

    def _backlog_s(self) -> float:
        """Predicted seconds until what is waiting now has been served."""
        return self._waiting_psgs * self._second_per_psgs / len(self._lanes)

    def _seconds_to_deadline(self) -> float | None:
        return max(self._deadlines[0].deadline - time.perf_counter(), 0.0) if self._deadlines else None

    def _expired(self) -> list[_Request]:
        now, out = time.perf_counter(), []
        while self._deadlines and (self._deadlines[0].deadline <= now or self._deadlines[0].future.done()):
            request = heapq.heappop(self._deadlines)
            if not request.future.done():
                out.append(request)
        if out:
            gone = {id(request) for request in out}
            self._queue = deque(request for request in self._queue if id(request) not in gone)
            self._waiting_psgs = sum(request.psgs for request in self._queue)
        return out

    def _next_batch(self) -> _Batch | None:
        """Take requests up to the work of a batch, waiting a little for more; called with the lock held."""
        while self._queue and self._queue[0].future.done():
            _acknowledge(self._take_first())
        if not self._queue or not self._has_room():
            return None
        ready_at = self._queue[0].submitted + self._max_wait_s
        self._changed.wait_for(
            lambda: self._stopping or self._waiting_psgs >= self._max_batch_psgs,
            max(ready_at - time.perf_counter(), 0.0),
        )
        setup, work = self._setup, 0.0
        degraded = setup.degraded is not None and self._backlog_s() > self._degrade_after_s
        if degraded:
            setup = setup.degraded  # type: ignore[assignment]
        requests: list[_Request] = []
        while self._queue:
            first = self._queue[0]
            psgs = float(setup.psgs[first.node].sum()) if degraded else first.psgs
            if requests and work + psgs > self._max_batch_psgs:
                break
            request = self._take_first()
            if request.future.done():
                _acknowledge(request)
                continue
            requests.append(request)
            work += psgs
        self._in_flight.update((request.number, request) for request in requests)
        return _Batch(requests, setup, work, degraded) if requests else None

    def _take_first(self) -> _Request:
        request = self._queue.popleft()
        self._waiting_psgs = self._waiting_psgs - request.psgs if self._queue else 0.0
        return request

    def _send(self, batch: _Batch) -> None:
        lane = self._lane_for(batch.psgs)
        if lane is None:
            self._finish_batch(batch, RuntimeError("all workers died"))
        else:
            lane.put(batch, self._predict(lane.route, batch.psgs))

    def _lane_for(self, psgs: float) -> _Lane | None:
        """The worker for a batch: of the router's route the one that is free first; None if all died."""
        now = time.perf_counter()
        first_free: dict[str, _Lane] = {}
        free_at: dict[str, float] = {}
        for lane in self._lanes:
            free = lane.expected_free_at(now)
            if not lane.dead and free < free_at.get(lane.route, float("inf")):
                first_free[lane.route], free_at[lane.route] = lane, free
        if not first_free:
            return None
        route = next(iter(first_free))
        if self._router is not None:
            route = self._router.choose(psgs, now, free_at)
        return first_free.get(route) or next(iter(first_free.values()))

    def _predict(self, route: str, work: float) -> float:
        if isinstance(self._router, EarliestFinishRouter):
            return self._router.cost[route].predict(work)
        return work * self._second_per_psgs

    def _learn(self, route: str, batch: _Batch, predicted: float, seconds: float) -> None:
        """Correct predictions by what a batch really took; called with the lock held."""
        if batch.psgs:
            self._second_per_psgs += _SMOOTHING * (seconds / batch.psgs - self._second_per_psgs)
        if isinstance(self._router, EarliestFinishRouter) and predicted > 0:
            factor = 1 + _SMOOTHING * (min(seconds / predicted, _MOST_CORRECTION) - 1)
            model = self._router.cost[route]
            corrected = CostModel(model.intercept_s * factor, model.slope_s * factor)
            self._router = EarliestFinishRouter({**self._router.cost, route: corrected})

    # Results.

    def _run(self, lane: _Lane, batch: _Batch, predicted: float) -> None:
        started = time.perf_counter()
        running = []
        for request in batch.requests:
            if request.future.done() or not request.future.set_running_or_notify_cancel():
                continue
            running.append(request)
        if not running:
            return
        node = torch.cat([request.node for request in running])
        sizes = torch.tensor([request.node.numel() for request in running])
        group = torch.repeat_interleave(torch.arange(len(running)), sizes)
        keys = [request.request_id for request in running]
        output = batch.setup.answer(lane.route, node, group, keys)
        done = time.perf_counter()
        for request, part in zip(running, output.split(sizes.tolist()), strict=True):
            response = Response(
                request.request_id, part, lane.route, request.psgs, started - request.submitted,
                done - started, batch.degraded,
            )  # fmt: skip
            self._resolve(request, response)
        with self._changed:
            self._learn(lane.route, batch, predicted, time.perf_counter() - started)

    def _resolve(self, request: _Request, response: Response) -> None:
        try:
            request.future.set_result(response)
        except InvalidStateError:  # its deadline passed while it ran
            return
        with self._changed:
            self._completed += 1
            self._degraded += response.degraded
            self._recent_s.append(response.queue_s + response.service_s)
            self._per_route[response.route] += 1

    def _fail(self, request: _Request, error: BaseException) -> None:
        try:
            request.future.set_exception(error)
        except InvalidStateError:
            return
        with self._changed:
            self._failed += 1

    def _finish_batch(self, batch: _Batch, error: BaseException | None = None) -> None:
        if error is not None:
            for request in batch.requests:
                if not request.future.cancelled():
                    self._fail(request, error)
        with self._changed:
            for request in batch.requests:
                self._in_flight.pop(request.number, None)
            self._changed.notify_all()


class _Lane:
    """A worker of one route: a thread that runs batches in order."""

    def __init__(self, engine: InferenceEngine, route: str, number: int) -> None:
        self.route = route
        self.name = f"pyg_quiver-{route}" + (f"-{number}" if number else "")
        self.free_at = 0.0
        self.dead = False
        self._engine = engine
        self._batches: deque[tuple[_Batch, float] | None] = deque()
        self._ready = threading.Condition()
        self._busy = False
        self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
        self._thread.start()

    @property
    def has_room(self) -> bool:
        """Whether a batch sent now would start next."""
        return not self.dead and len(self._batches) < _BATCHES_AHEAD

    def expected_free_at(self, now: float) -> float:
        """When what it has will be done: now if idle; a batch that is overdue may take as long again."""
        if not self._busy and not self._batches:
            return now
        return self.free_at if self.free_at > now else 2 * now - self.free_at

    def put(self, batch: _Batch, seconds: float) -> None:
        with self._ready:
            self.free_at = max(self.free_at, time.perf_counter()) + seconds
            self._batches.append((batch, seconds))
            self._ready.notify()

    def stop(self, timeout_s: float | None) -> None:
        with self._ready:
            self._batches.append(None)
            self._ready.notify()
        self._thread.join(timeout_s)

    def _take(self) -> tuple[_Batch, float] | None:
        with self._ready:
            self._ready.wait_for(lambda: bool(self._batches))
            item = self._batches.popleft()
            self._busy = item is not None
        with self._engine._changed:  # there is room at this route again
            self._engine._changed.notify_all()
        return item

    def _work(self) -> None:
        while (item := self._take()) is not None:
            batch, predicted = item
            error: BaseException | None = None
            try:
                self._engine._run(self, batch, predicted)
            except Exception as problem:
                error = problem
            except BaseException as problem:
                self.dead = True
                error = RuntimeError(f"worker {self.name} died: {problem!r}")
                error.__cause__ = problem
            with self._ready:
                self._busy = False
                if not self._batches:
                    self.free_at = time.perf_counter()
            self._engine._finish_batch(batch, error)  # tells the dispatcher too
            if self.dead:
                break
        while self.dead and self._batches:
            left = self._batches.popleft()
            if left is not None:
                self._engine._finish_batch(left[0], RuntimeError(f"worker {self.name} died"))


def _acknowledge(request: _Request) -> None:
    """Tell those who wait for a cancelled request."""
    if request.future.cancelled():
        request.future.set_running_or_notify_cancel()
