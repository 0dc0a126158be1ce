from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_memory import PinnedArena, host_memory
from tiered_memory.arena import _Mapping

PIECES = st.lists(
    st.tuples(
        st.lists(st.integers(0, 40), max_size=3),
        st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64]),
        st.sampled_from([1, 2, 64, 512, 4096, 1 << 16]),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(PIECES)
def test_tm01_pieces_are_aligned_disjoint_and_inside(pieces):
    arena = PinnedArena(2_000_003, pinned=False)
    arena.buffer.zero_()
    cut = []
    for number, (shape, dtype, align) in enumerate(pieces):
        try:
            piece = arena.empty(shape, dtype, align=align)
        except MemoryError:
            continue
        assert piece.shape == tuple(shape)
        assert piece.dtype == dtype
        if piece.numel():
            assert piece.data_ptr() % align == 0
            assert piece.data_ptr() >= arena.buffer.data_ptr()
            assert piece.data_ptr() + piece.nbytes <= arena.buffer.data_ptr() + arena.nbytes
        piece.view(-1).view(torch.uint8).fill_(number + 1)
        cut.append((number + 1, piece))
    for number, piece in cut:
        assert bool((piece.view(-1).view(torch.uint8) == number).all())
    assert sum(piece.nbytes for _, piece in cut) <= arena.nbytes - arena.free_bytes


def test_tm01_refuses_more_than_is_left_and_takes_nothing():
    arena = PinnedArena(8 << 20, pinned=False)
    arena.empty(7 << 20)
    with pytest.raises(MemoryError, match=r"^arena: 3\.0 GiB asked for, 0\.0 GiB of 0\.0 GiB left$"):
        arena.empty((3, 1 << 30))
    assert arena.free_bytes == 1 << 20
    arena.empty(1 << 20)
    assert arena.free_bytes == 0


def test_tm01_bad_arguments():
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        PinnedArena(0)
    with pytest.raises(ValueError, match="power of two, got 24"):
        PinnedArena(100, pinned=False).empty(4, align=24)


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a CUDA device")
def test_tm01_without_a_device_pinned_true_is_refused_and_none_is_pageable(recwarn):
    with pytest.raises(RuntimeError, match="there is no CUDA device"):
        PinnedArena(4096, pinned=True)
    assert not PinnedArena(4096, pinned=None).pinned
    assert not recwarn


def test_tm01_more_than_free_memory_is_refused_before_pages_are_touched(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("tiered_memory.arena.available_bytes", lambda: 12 << 30)
    refusal = r"^cannot pin 14\.0 GiB: locked-memory limit (none|[0-9.]+ GiB), free memory 12\.0 GiB"
    with pytest.raises(MemoryError, match=refusal):
        PinnedArena(14 << 30, pinned=True)
    with pytest.warns(RuntimeWarning, match=refusal) as caught:
        arena = PinnedArena(14 << 30)
    assert len(caught) == 1
    assert not arena.pinned
    # Refused before the pages were populated: a page of the far end is still absent.
    far = arena.buffer.data_ptr() + (13 << 30) // 4096 * 4096
    assert host_memory.absent_bytes(far, 4096) == 4096


def test_tm01_contents_survive_population():
    arena = PinnedArena(5 << 20, pinned=False, threads=3)
    arena.buffer.copy_(torch.arange(5 << 20, dtype=torch.int64).to(torch.uint8))
    before = arena.buffer.clone()
    host_memory.populate(arena.buffer.data_ptr(), arena.nbytes, threads=3)
    assert torch.equal(arena.buffer, before)
    assert host_memory.absent_bytes(arena.buffer.data_ptr(), arena.nbytes) == 0


def test_tm01_memory_goes_with_the_last_tensor():
    arena = PinnedArena(1 << 20, pinned=False)
    mapping = weakref.ref(arena._mapping)
    piece = arena.empty(100)
    arena.close()
    arena.close()
    del arena
    gc.collect()
    piece.fill_(7)
    assert bool((piece == 7).all())
    assert isinstance(mapping(), _Mapping)
    del piece
    gc.collect()
    assert mapping() is None


def test_tm01_closed_arena_is_refused():
    with PinnedArena(4096, pinned=False) as arena:
        pass
    for use in (lambda: arena.empty(1), arena.pin):
        with pytest.raises(ValueError, match="already closed"):
            use()


@pytest.mark.gpu
def test_tm01_pinned_on_a_device_keeps_contents_and_is_freed():
    arena = PinnedArena(64 << 20, pinned=False)
    arena.buffer.fill_(3)
    arena.pin()
    arena.pin()
    assert arena.pinned
    piece = arena.empty((1 << 20,))
    assert piece.is_pinned()
    assert torch.equal(
        piece.to("cuda", non_blocking=True).cpu(), torch.full((1 << 20,), 3, dtype=torch.uint8)
    )
    arena.close()
    assert piece.is_pinned()
    assert int(piece.to("cuda", non_blocking=True).sum()) == 3 << 20
