"""Experts that a prediction brings in ahead of need, into slots that the host owns, beside the running steps.

A slot goes through three states, each entered between two steps on the stream that runs the model:

    holds an expert --retire--> empty, its copy under way on a side stream --publish--> holds another one

After *retire* no table names the slot, and the copy starts only when the steps launched before are done, so
that nothing reads a slot while it is overwritten. *Publish* comes after the copy is complete. If meanwhile
the device gave the expert a slot of its own, the copy was for nothing, and the slot stays empty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiered_memory import Copy, CopyEngine
from vllm_moe_offload.predictor import Shares
from vllm_moe_offload.residency import NO_KEY, NUM_COUNTERS, REMOTE, Residency

_IN_FLIGHT = 4  # copies on the link at a time, next to what layers pull
# An expert must be so many times as likely as the one it replaces, or slots would change hands over noise.
_MARGIN = 1.1


@dataclass
class _Flight:
    slot: int
    key: int
    copy: Copy


class Promoter:
    """Owner of the last ``count`` slots of a pool.

    Args:
        residency: the pool's tables.
        record: gives the record of a key in host memory.
        count: slots, from the end.
        engine: carries the copies.

    Attributes:
        copies: copies started so far.
        used: of these, experts that a step used before their slot was given away.
    """

    def __init__(
        self, residency: Residency, record: Callable[[int], Tensor], count: int, engine: CopyEngine
    ) -> None:
        self._r, self._record, self._engine = residency, record, engine
        self._first = residency.num_slots - count
        self._key_of = residency.key_of[self._first :].cpu().numpy().astype(np.int64)
        self._unused = np.zeros(count, dtype=bool)  # brought in by a prediction and not used yet
        self._since = np.zeros(count, dtype=np.int64)  # step before which the slot got its expert
        self._flights: list[_Flight] = []
        self._wanted: list[tuple[int, int]] = []  # (slot, key), most urgent first
        self.copies = self.used = 0

    def plan(self, share: Shares, rows: npt.NDArray[np.int64], tick: int) -> None:
        """Choose what to bring in, in place of what was chosen before and has not started.

        Args:
            share: predicted shares ``[layers, experts]``.
            rows: where the device read each expert at the end of a step.
            tick: the number of that step.
        """
        self._wanted = []
        # Slots that were not published after all: the device had the expert by then.
        known = np.flatnonzero((self._key_of != NO_KEY) & (self._since <= tick))
        lost = known[rows[self._key_of[known]] != known + self._first]
        self._key_of[lost], self._unused[lost] = NO_KEY, False
        room = _IN_FLIGHT - len(self._flights)
        likely = share.reshape(-1)
        absent = ((rows < 0) | (rows >= self._r.num_slots)) & (rows != REMOTE)
        absent[[flight.key for flight in self._flights]] = False
        candidates = np.flatnonzero(absent)
        flying = [flight.slot - self._first for flight in self._flights]
        worth = np.where(self._key_of == NO_KEY, 0.0, likely[self._key_of])
        worth[flying] = np.inf
        count = min(room, len(candidates), len(worth))
        if count <= 0:
            return
        best = candidates[np.argsort(-likely[candidates], kind="stable")[:count]]
        least = np.argsort(worth, kind="stable")[:count]
        for place, key in zip(least.tolist(), best.tolist(), strict=True):
            if likely[key] > _MARGIN * worth[place]:
                self._wanted.append((self._first + place, key))

    @property
    def claimed(self) -> list[int]:
        """Keys chosen or on their way."""
        return [key for _, key in self._wanted] + [flight.key for flight in self._flights]

    def before_step(self, tick: int) -> None:
        """Publish what has arrived, retire what makes room and start its copies; step ``tick`` comes next."""
        arrived = [flight for flight in self._flights if flight.copy.done]
        if arrived:
            self._flights = [flight for flight in self._flights if flight not in arrived]
            for flight in arrived:
                flight.copy.wait()
            self._publish([flight.slot for flight in arrived], [flight.key for flight in arrived], tick)
        if not self._wanted:
            return
        self._retire([slot for slot, _ in self._wanted])
        for slot, key in self._wanted:
            pair = (self._r.slabs[slot], self._record(key))
            self._flights.append(_Flight(slot, key, self._engine.submit([pair], after=self._stream())))
        self.copies += len(self._wanted)
        self._wanted = []

    def saw(self, used: npt.NDArray[np.bool_], rows: npt.NDArray[np.int64]) -> None:
        """Learn which keys a step used and where the device reads each."""
        held = np.flatnonzero(self._unused & (self._key_of != NO_KEY))
        keys = self._key_of[held]
        hit = used[keys] & (rows[keys] == held + self._first)
        self.used += int(hit.sum())
        self._unused[held[hit]] = False

    def close(self) -> None:
        """Finish what is in flight."""
        self._engine.close()

    def _retire(self, slots: list[int]) -> None:
        at, r = self._tensor(slots), self._r
        keys = r.key_of[at].long()
        # The word before row_of is spare: what empty slots (-1) write goes there.
        r.report[NUM_COUNTERS - 1 :][keys - NO_KEY] = r.far[keys.clamp(min=0)]
        r.key_of[at] = NO_KEY
        places = np.asarray(slots) - self._first
        self._key_of[places], self._unused[places] = NO_KEY, False

    def _publish(self, slots: list[int], keys: list[int], tick: int) -> None:
        at, key, r = self._tensor(slots), self._tensor(keys), self._r
        rows = r.row_of[key]
        absent = rows == r.far[key]
        r.row_of[key] = torch.where(absent, at, rows)
        r.key_of[at] = torch.where(absent, key, NO_KEY).int()
        # Whether the device had it already shows in the next step's report; until then it counts as held.
        places = np.asarray(slots) - self._first
        self._key_of[places], self._unused[places], self._since[places] = keys, True, tick

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._r.slabs.device)

    def _stream(self) -> torch.cuda.Stream | None:
        device = self._r.slabs.device
        return torch.cuda.current_stream(device) if device.type == "cuda" else None
