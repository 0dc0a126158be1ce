"""An engine without a model: its next token is a hash of all tokens before it.

One token lost, doubled or reordered changes everything after it, so a stream can be checked from its tokens
alone.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence

from vllm_serverless_loader.migration.request import RequestState, Token

VOCABULARY = 50_000


def next_token(token_ids: Sequence[int]) -> int:
    """The token that follows ``token_ids``."""
    content = ",".join(map(str, token_ids)).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "little") % VOCABULARY


class SimulatedEngine:
    """Takes time as an engine does: a step a token, a prefill linear in the tokens it lacks.

    Args:
        step_s: seconds of a decode step.
        prefill_s_per_token, prefill_fixed_s: prefill time.
        block_size: tokens of a block of the prefix cache; only full blocks are kept.

    Attributes:
        running: ids of requests that are being served.
        computed_tokens: tokens whose prefill was computed so far.
    """

    def __init__(
        self,
        *,
        step_s: float = 0.001,
        prefill_s_per_token: float = 0.0,
        prefill_fixed_s: float = 0.0,
        block_size: int = 16,
    ) -> None:
        self.step_s = step_s
        self.prefill_s_per_token = prefill_s_per_token
        self.prefill_fixed_s = prefill_fixed_s
        self.block_size = block_size
        self.running: set[str] = set()
        self.computed_tokens = 0
        self.dead: Exception | None = None
        self._cached: set[tuple[int, ...]] = set()

    def kill(self, error: Exception) -> None:
        """From now on every call, and every stream under way, raises ``error``."""
        self.dead = error

    async def generate(self, request: RequestState) -> AsyncIterator[Token]:
        """As :class:`Engine`."""
        self.running.add(request.request_id)
        try:
            await self._compute(request.token_ids)
            tokens = list(request.token_ids)
            left = request.continuation().get("max_tokens", 16)
            while left > 0:
                await asyncio.sleep(self.step_s)
                self._check()
                tokens.append(next_token(tokens))
                left -= 1
                yield Token(tokens[-1], None if left else "length")
        finally:
            self.running.discard(request.request_id)

    async def prefill(self, request: RequestState) -> int:
        """As :class:`Engine`."""
        self.running.add(request.request_id)
        try:
            return await self._compute(request.token_ids)
        finally:
            self.running.discard(request.request_id)

    async def abort(self, request_id: str) -> None:
        """As :class:`Engine`; a request stops when its stream is closed."""
        self._check()

    async def _compute(self, token_ids: tuple[int, ...]) -> int:
        self._check()
        # The last token is always computed: its output is what the next token comes from.
        full = (len(token_ids) - 1) // self.block_size
        hit = next((n for n in range(full, 0, -1) if token_ids[: n * self.block_size] in self._cached), 0)
        computed = len(token_ids) - hit * self.block_size
        await asyncio.sleep(self.prefill_fixed_s + self.prefill_s_per_token * computed)
        self._check()
        self.computed_tokens += computed
        for blocks in range(1, len(token_ids) // self.block_size + 1):
            self._cached.add(token_ids[: blocks * self.block_size])
        return computed

    def _check(self) -> None:
        if self.dead is not None:
            raise self.dead
