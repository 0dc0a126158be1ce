"""Carry out a plan: pack, exchange and unpack in rounds of bounded memory."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_tenplex.planner import Move, ReshardPlan, split_box
from megatron_tenplex.ptc import Box, Shard
from megatron_tenplex.transport import Pending, Transport

_ALIGNMENT = 16
_DIRECT_BYTES = 1 << 20  # a larger contiguous piece is sent from, or received into, where it lies
_IN_FLIGHT = 2


@dataclass
class ReshardReport:
    """What one worker moved.

    Attributes:
        sent_bytes, received_bytes, copied_bytes: of this worker.
        staging_bytes: the most that staging buffers held at once.
        seconds: by stage; ``execute`` fills ``prepare`` (views, staging memory) and ``move``.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    copied_bytes: int = 0
    staging_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def view_of(shard: Shard, tensor: Tensor, box: Box) -> Tensor:
    """The part ``box`` of a shard's tensor, as a view of shape ``box.shape``.

    Raises:
        ValueError: the tensor has not the shape of the shard.
    """
    if shard.flat is None:
        if tuple(tensor.shape) != shard.box.shape:
            raise ValueError(f"tensor of {shard.key}{shard.box} has shape {tuple(tensor.shape)}")
        inside = zip(box.offset, shard.box.offset, box.shape, strict=True)
        return tensor[tuple(slice(o - start, o - start + n) for o, start, n in inside)]
    if tensor.ndim != 1 or tensor.numel() != shard.numel:
        raise ValueError(
            f"tensor of {shard.key}{shard.box} flat {shard.flat} has shape {tuple(tensor.shape)}"
        )
    strides = [math.prod(shard.box.shape[d + 1 :]) for d in range(len(shard.box.shape))]
    first = sum((o - s) * n for o, s, n in zip(box.offset, shard.box.offset, strides, strict=True))
    unit = tensor.stride(0)
    start = tensor.storage_offset() + (first - shard.flat[0]) * unit
    return tensor.as_strided(box.shape, [n * unit for n in strides], start)


@dataclass(slots=True)
class _Piece:
    """A part of a move that fits into one round, and its place in the packed message (-1: not packed)."""

    move: Move
    box: Box
    nbytes: int
    offset: int = -1


def _pieces(move: Move, limit: int) -> Iterator[tuple[Box, int]]:
    itemsize = move.nbytes // move.box.numel
    pending = [move.box]
    while pending:
        box = pending.pop()
        nbytes = box.numel * itemsize
        splittable = [d for d, n in enumerate(box.shape) if n > 1]
        if nbytes <= limit or not splittable:
            yield box, nbytes
            continue
        axis = splittable[0]  # the outermost: the parts stay contiguous where the whole was
        per_slice = nbytes // box.shape[axis]
        count = min(max(limit // per_slice, 1), box.shape[axis] - 1)
        head, tail = split_box(box, axis, count)
        pending += [tail, head]


def _rounds(moves: Sequence[Move], limit: int) -> list[list[_Piece]]:
    """The pieces of one pair of workers by round; both sides compute the same."""
    rounds: list[list[_Piece]] = []
    used, packed = limit + 1, 0
    for move in moves:
        for box, nbytes in _pieces(move, limit):
            room = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
            if used + room > limit:
                rounds.append([])
                used = packed = 0
            piece = _Piece(move, box, nbytes)
            if nbytes < _DIRECT_BYTES:
                piece.offset, packed = packed, packed + room
            used += room
            rounds[-1].append(piece)
    return rounds


class _Side:
    """One direction of a round with all peers: views of the tensors, and the messages that carry them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.messages: list[tuple[int, Tensor]] = []
        # (parts of the staging memory, views of the tensors): contiguous ones as bytes, which all go in one
        # launch on a GPU, and strided ones.
        self.contiguous: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.strided: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.staging_bytes = 0
        self._buffers: list[tuple[int, int, int, list[tuple[int, Tensor]]]] = []

    def add(self, peer: int, pieces: Sequence[_Piece], views: Sequence[Tensor]) -> None:
        packed = [(p, v) for p, v in zip(pieces, views, strict=True) if p.offset >= 0]
        if packed:
            size = max(p.offset + p.nbytes for p, _ in packed)
            self._stage(peer, size, [(p.offset, v) for p, v in packed])
        for piece, view in zip(pieces, views, strict=True):
            if piece.offset >= 0:
                continue
            if view.is_contiguous() and view.device == self.device:
                self.messages.append((peer, view.reshape(-1).view(torch.uint8)))
            else:
                self._stage(peer, piece.nbytes, [(0, view)])

    def _stage(self, peer: int, size: int, parts: list[tuple[int, Tensor]]) -> None:
        """Note a message that needs staging memory; its place among the messages stays free until then."""
        self._buffers.append((len(self.messages), self.staging_bytes, size, parts))
        self.messages.append((peer, torch.empty(0)))
        self.staging_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT

    def bind(self, arena: Tensor) -> None:
        """Use the first ``staging_bytes`` of ``arena`` (uint8)."""
        for index, start, size, parts in self._buffers:
            buffer = arena[start : start + size]
            self.messages[index] = (self.messages[index][0], buffer)
            for offset, view in parts:
                part = buffer[offset : offset + view.numel() * view.element_size()]
                if view.is_contiguous():
                    self.contiguous[0].append(part)
                    self.contiguous[1].append(view.reshape(-1).view(torch.uint8))
                else:
                    self.strided[0].append(part.view(view.dtype).view(view.shape))
                    self.strided[1].append(view)
        self._buffers.clear()

    def pack(self) -> None:
        for staged, views in (self.contiguous, self.strided):
            if staged:
                torch._foreach_copy_(staged, views)

    def unpack(self) -> None:
        for staged, views in (self.contiguous, self.strided):
            if staged:
                torch._foreach_copy_(views, staged)

    def clear(self) -> None:
        """Let go of the tensors."""
        self.messages, self.contiguous, self.strided = [], ([], []), ([], [])


def execute(
    plan: ReshardPlan,
    source: Mapping[Shard, Tensor],
    target: Mapping[Shard, Tensor],
    transport: Transport,
    *,
    staging_bytes: int = 256 << 20,
    release_source: bool = False,
) -> ReshardReport:
    """Carry out this worker's part. Collective over all workers of the plan.

    Args:
        source: tensors of this worker's shards in the source layout; empty for a worker that has none.
        target: tensors of its shards in the target layout, filled in place.
        staging_bytes: limit of all buffers of this worker together.
        release_source: remove a tensor from ``source`` (then a mutable mapping) once nothing reads it any
        more.

    Raises:
        RuntimeError: the exchange with another worker failed; ``source`` is unchanged unless it was released.
        ValueError: a tensor is missing or has not the shape of its shard.
    """
    started = time.perf_counter()
    work = _Execution(plan, source, target, transport, staging_bytes)
    work.report.seconds["prepare"] = time.perf_counter() - started
    if release_source and not isinstance(source, MutableMapping):
        raise ValueError("release_source needs a mutable mapping of source tensors")
    started = time.perf_counter()
    with torch.no_grad():
        work.run(release_source)
    if transport.device.type == "cuda":
        torch.cuda.synchronize(transport.device)
    work.report.seconds["move"] = time.perf_counter() - started
    return work.report


class _Execution:
    def __init__(
        self,
        plan: ReshardPlan,
        source: Mapping[Shard, Tensor],
        target: Mapping[Shard, Tensor],
        transport: Transport,
        staging_bytes: int,
    ) -> None:
        self.source, self.target, self.transport = source, target, transport
        self.plan = plan
        mine = plan.for_worker(transport.worker)
        limit = _message_limit(plan, staging_bytes)
        self.copies: dict[int, list[Move]] = {}
        for move in mine.copies:
            self.copies.setdefault(move.phase, []).append(move)
        self.sends = _by_phase_and_peer(mine.sends, limit, lambda m: m.target)
        self.receives = _by_phase_and_peer(mine.receives, limit, lambda m: m.source)
        self.phases = sorted({m.phase for m in plan.moves})
        self.report = ReshardReport(
            sum(m.nbytes for m in mine.sends),
            sum(m.nbytes for m in mine.receives),
            sum(m.nbytes for m in mine.copies),
        )
        self.pending_reads = Counter(
            piece.move.source_shard
            for (phase, _), rounds in self.sends.items()
            for pieces in rounds
            for piece in pieces
            if phase == 0
        )
        self.pending_reads.update(m.source_shard for m in self.copies.get(0, ()))
        self._check_tensors(mine.sends + mine.copies, mine.receives + mine.copies)
        self.rounds = self._prepare()
        self.local = {phase: self._local(phase) for phase in self.phases}

    def _check_tensors(self, read: Sequence[Move], written: Sequence[Move]) -> None:
        missing = {m.source_shard for m in read if m.phase == 0} - self.source.keys()
        missing |= {m.target_shard for m in written} - self.target.keys()
        if missing:
            shard = min(missing)
            raise ValueError(f"no tensor was given for {shard.key}{shard.box} flat {shard.flat}")

    def _prepare(self) -> dict[int, list[tuple[_Side, _Side]]]:
        """All rounds by phase, views and staging memory included, so that moving only moves.

        Rounds share the staging memory: those ``_IN_FLIGHT`` apart are never under way at once.
        """
        rounds = {phase: self._rounds_of(phase) for phase in self.phases}
        for direction in (0, 1):
            for slot in range(_IN_FLIGHT):
                sides = [pair[direction] for pairs in rounds.values() for pair in pairs[slot::_IN_FLIGHT]]
                size = max((side.staging_bytes for side in sides), default=0)
                arena = torch.empty(size, dtype=torch.uint8, device=self.transport.device)
                self.report.staging_bytes += size
                for side in sides:
                    side.bind(arena)
        return rounds

    def _rounds_of(self, phase: int) -> list[tuple[_Side, _Side]]:
        both = [*self.sends.items(), *self.receives.items()]
        count = max((len(rounds) for (p, _), rounds in both if p == phase), default=0)
        return [
            (
                self._side(self.sends, phase, number, read=True),
                self._side(self.receives, phase, number, read=False),
            )
            for number in range(count)
        ]

    def _local(self, phase: int) -> tuple[list[Tensor], list[Tensor]]:
        """(written, read) views of the copies within this worker."""
        moves = self.copies.get(phase, ())
        return [self._view(m, m.box, read=False) for m in moves], [
            self._view(m, m.box, read=True) for m in moves
        ]

    def run(self, release: bool) -> None:
        for phase in self.phases:
            self._run_phase(phase, release)

    def _run_phase(self, phase: int, release: bool) -> None:
        under_way: list[tuple[int, Pending]] = []
        for number, (out, into) in enumerate(self.rounds[phase]):
            out.pack()
            under_way.append((number, self.transport.exchange(out.messages, into.messages)))
            if number == 0:
                self._copy(phase, release)
            if len(under_way) == _IN_FLIGHT:
                self._finish(*under_way.pop(0), phase, release)
        if not self.rounds[phase]:
            self._copy(phase, release)
        for number, pending in under_way:
            self._finish(number, pending, phase, release)

    def _side(
        self, of: Mapping[tuple[int, int], list[list[_Piece]]], phase: int, number: int, *, read: bool
    ) -> _Side:
        side = _Side(self.transport.device)
        for (p, peer), rounds in of.items():
            if p != phase or number >= len(rounds):
                continue
            pieces = rounds[number]
            side.add(peer, pieces, [self._view(piece.move, piece.box, read) for piece in pieces])
        return side

    def _view(self, move: Move, box: Box, read: bool) -> Tensor:
        if not read:
            return view_of(move.target_shard, self.target[move.target_shard], box)
        tensors = self.source if move.phase == 0 else self.target
        return view_of(move.source_shard, tensors[move.source_shard], box)

    def _copy(self, phase: int, release: bool) -> None:
        into, out = self.local.pop(phase)
        if into:
            torch._foreach_copy_(into, out)
        del into, out
        if phase == 0 and release:
            self._read_done(m.source_shard for m in self.copies.get(0, ()))

    def _finish(self, number: int, pending: Pending, phase: int, release: bool) -> None:
        out, into = self.rounds[phase][number]
        pending.wait()
        into.unpack()
        out.clear()
        into.clear()
        if phase == 0 and release:
            for (p, _), rounds in self.sends.items():
                if p == 0 and number < len(rounds):
                    self._read_done(piece.move.source_shard for piece in rounds[number])

    def _read_done(self, shards: Iterator[Shard]) -> None:
        assert isinstance(self.source, MutableMapping)
        for shard in shards:
            self.pending_reads[shard] -= 1
            if not self.pending_reads[shard]:
                del self.source[shard]


def _message_limit(plan: ReshardPlan, staging_bytes: int) -> int:
    """Bytes of one round of one pair, so that no worker's buffers exceed ``staging_bytes``."""
    peers = Counter(worker for link in plan.links() for worker in link)
    batches = max(peers.values(), default=1) * _IN_FLIGHT
    limit = staging_bytes // batches // _ALIGNMENT * _ALIGNMENT
    if limit < _ALIGNMENT:
        raise ValueError(
            f"staging_bytes must be at least {batches * _ALIGNMENT} for this plan, got {staging_bytes}"
        )
    return limit


def _by_phase_and_peer(
    moves: Sequence[Move], limit: int, peer_of: object
) -> dict[tuple[int, int], list[list[_Piece]]]:
    grouped: dict[tuple[int, int], list[Move]] = {}
    for move in moves:
        grouped.setdefault((move.phase, peer_of(move)), []).append(move)  # type: ignore[operator]
    return {pair: _rounds(of_pair, limit) for pair, of_pair in sorted(grouped.items())}


def execute_local(
    plan: ReshardPlan, sources: Sequence[Mapping[Shard, Tensor]], targets: Sequence[Mapping[Shard, Tensor]]
) -> None:
    """Carry out a whole plan in one process: ``sources[worker]``, ``targets[role]``."""
    target_of = {worker: targets[role] for role, worker in enumerate(plan.placement)}
    with torch.no_grad():
        for move in plan.moves:
            tensors = sources[move.source] if move.phase == 0 else target_of[move.source]
            into = view_of(move.target_shard, target_of[move.target][move.target_shard], move.box)
            into.copy_(view_of(move.source_shard, tensors[move.source_shard], move.box))
