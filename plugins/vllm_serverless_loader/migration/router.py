"""The holder of all tokens: clients stream from here while their requests move between engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

from vllm_serverless_loader.migration.request import (
    Engine,
    MigrationError,
    MigrationReport,
    RequestMigration,
    RequestState,
    Round,
    Token,
)


class _Live:
    """A request whose client is listening."""

    def __init__(self, request: RequestState) -> None:
        self.state = request
        self.attempt = 0
        self.engine: Engine | None = None
        self.pump: asyncio.Task[None] | None = None
        self.out: asyncio.Queue[Token | Exception] = asyncio.Queue()
        self.over = asyncio.Event()  # finished, or the client left
        self.moved = asyncio.Event()  # first token of the present attempt
        self.source_error: Exception | None = None

    def attempt_id(self, kind: str = "") -> str:
        """Id of this attempt at an engine; engines must never see one twice."""
        return f"{self.state.request_id}#{self.attempt}{kind}"


class _Migration:
    def __init__(self, destination: Engine) -> None:
        self.destination = destination
        self.failed: asyncio.Future[tuple[str | None, Exception]] = asyncio.get_running_loop().create_future()

    def fail(self, request_id: str | None, error: Exception) -> None:
        if not self.failed.done():
            self.failed.set_result((request_id, error))


class TokenRouter:
    """Serves requests from one engine at a time and moves them to another without breaking their streams.

    Args:
        engine: serves until :meth:`migrate` succeeds.

    Attributes:
        engine: the engine that new requests go to.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._live: dict[str, _Live] = {}
        self._migration: _Migration | None = None

    def requests(self) -> tuple[RequestState, ...]:
        """The live requests."""
        return tuple(live.state for live in self._live.values())

    async def generate(self, request: RequestState) -> AsyncIterator[Token]:
        """The client's stream of new tokens; survives migrations.

        Raises:
            ValueError: the request's id is in use.
            Exception: what the engine raised, outside of a migration.
        """
        if request.request_id in self._live:
            raise ValueError(f"request id {request.request_id!r} is in use")
        live = self._live[request.request_id] = _Live(request)
        self._start(live, self._migration.destination if self._migration else self.engine)
        try:
            while True:
                item = await live.out.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            live.over.set()
            del self._live[request.request_id]
            await asyncio.shield(self._stop(live))

    async def migrate(
        self, destination: Engine, *, max_gap_tokens: int = 16, max_rounds: int = 8
    ) -> MigrationReport:
        """Move all live requests to ``destination``, where new ones start from now on.

        In each round the destination computes what it lacks while the source goes on; a request is handed
        over once at most ``max_gap_tokens`` came meanwhile, the gap no longer shrinks, or after
        ``max_rounds``.
        Returns when every moved request has its first token from the destination.

        Raises:
            MigrationError: a request cannot be carried (nothing has happened then), or the destination
                failed: every request goes on at the source, those handed over are replayed there.
        """
        if self._migration is not None:
            raise MigrationError(None, "another migration is under way")
        # A request handed over goes back to the source if the destination fails, so both must carry it.
        carries = set(getattr(destination, "carries", ())) & set(getattr(self.engine, "carries", ()))
        for live in self._live.values():
            reason = live.state.refusal(carries)
            if reason is not None:
                raise MigrationError(live.state.request_id, reason)
        begin = time.perf_counter()
        migration = self._migration = _Migration(destination)
        moving = [
            asyncio.ensure_future(self._move(live, migration, max_gap_tokens, max_rounds))
            for live in list(self._live.values())
        ]
        try:
            everything = asyncio.gather(*moving)
            outcomes: set[asyncio.Future[Any]] = {everything, migration.failed}
            await asyncio.wait(outcomes, return_when=asyncio.FIRST_COMPLETED)
            if migration.failed.done():
                everything.cancel()
                await asyncio.gather(everything, *moving, return_exceptions=True)
                request_id, error = migration.failed.result()
                await self._roll_back(destination)
                raise MigrationError(request_id, f"the destination failed: {error!r}") from error
            self.engine = destination
            return MigrationReport(tuple(await everything), time.perf_counter() - begin)
        except asyncio.CancelledError:
            for task in moving:
                task.cancel()
            await asyncio.gather(*moving, return_exceptions=True)
            await asyncio.shield(self._roll_back(destination))
            raise
        finally:
            self._migration = None

    async def _move(
        self, live: _Live, migration: _Migration, max_gap_tokens: int, max_rounds: int
    ) -> RequestMigration:
        rounds: list[Round] = []
        while not live.over.is_set():
            state, begin = live.state, time.perf_counter()
            name = live.attempt_id(f"-prefill{len(rounds)}")
            try:
                done = await _unless(live.over, migration.destination.prefill(state.renamed(name)))
            except asyncio.CancelledError:
                await asyncio.shield(_abort(migration.destination, name))
                raise
            except Exception as error:
                migration.fail(state.request_id, error)
                await asyncio.get_running_loop().create_future()  # until the migration is called off
                raise
            if done is None:
                await _abort(migration.destination, name)
                break
            context = len(state.token_ids)
            gap = len(live.state.token_ids) - context
            rounds.append(Round(context, done, gap, time.perf_counter() - begin))
            no_longer_shrinks = len(rounds) > 1 and gap >= rounds[-2].gap_tokens
            if gap <= max_gap_tokens or no_longer_shrinks or len(rounds) >= max_rounds or live.source_error:
                break
        if live.over.is_set():
            return RequestMigration(live.state.request_id, "finished", tuple(rounds), 0.0)
        begin = time.perf_counter()
        await self._stop(live)
        if live.over.is_set():
            return RequestMigration(live.state.request_id, "finished", tuple(rounds), 0.0)
        self._start(live, migration.destination)
        await _unless(live.over, live.moved.wait())
        pause = time.perf_counter() - begin
        return RequestMigration(live.state.request_id, "migrated", tuple(rounds), pause)

    async def _roll_back(self, destination: Engine) -> None:
        """Everything that runs at the destination starts again at the source, from the router's tokens."""
        for live in list(self._live.values()):
            if live.engine is destination and not live.over.is_set():
                await self._stop(live)
                if not live.over.is_set():
                    self._start(live, self.engine)
            elif live.source_error is not None:
                live.out.put_nowait(live.source_error)

    def _start(self, live: _Live, engine: Engine) -> None:
        live.attempt += 1
        live.engine, live.moved = engine, asyncio.Event()
        live.pump = asyncio.ensure_future(self._pump(live, engine, live.moved))

    async def _stop(self, live: _Live) -> None:
        """End the present attempt: no token of it arrives after this, and its engine forgets it."""
        pump, engine, name = live.pump, live.engine, live.attempt_id()
        live.pump = None
        if pump is None or engine is None:
            return
        ended_by_itself = pump.done()
        pump.cancel()
        await asyncio.gather(pump, return_exceptions=True)
        if not ended_by_itself:
            await _abort(engine, name)

    async def _pump(self, live: _Live, engine: Engine, moved: asyncio.Event) -> None:
        """Carry tokens of one attempt to the client."""
        try:
            stream = engine.generate(live.state.renamed(live.attempt_id()))
            async with aclosing(stream) as tokens:  # type: ignore[type-var]
                async for token in tokens:
                    output = (*live.state.output_token_ids, token.id)
                    live.state = replace(live.state, output_token_ids=output)
                    live.out.put_nowait(token)
                    moved.set()
                    if token.finish_reason is not None:
                        live.over.set()
                        return
            raise RuntimeError("the engine ended the stream before the request was finished")
        except Exception as error:
            migration = self._migration
            if migration is None:
                live.out.put_nowait(error)
            elif engine is migration.destination:
                migration.fail(live.state.request_id, error)
            else:
                live.source_error = error


async def _unless(over: asyncio.Event, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of ``work``, or None if ``over`` is set first; ``work`` is cancelled then."""
    task, waiter = asyncio.ensure_future(work), asyncio.ensure_future(over.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, waiter):
            one.cancel()
        await asyncio.gather(task, waiter, return_exceptions=True)


async def _abort(engine: Engine, request_id: str) -> None:
    # An engine that is gone holds nothing any more.
    with suppress(Exception):
        await engine.abort(request_id)
