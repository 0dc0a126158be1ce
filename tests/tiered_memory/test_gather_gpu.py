"""The gather's kernels on a real GPU against the torch twin (TM-08 to TM-11)."""

from __future__ import annotations

import pytest
import torch

from tiered_memory.gather import gather_rows, gather_segments, peer_access, row_code

pytestmark = pytest.mark.gpu


def sources(width: int, device: str = "cuda") -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same rows on the CPU, and in device, pinned and pageable memory."""
    generator = torch.Generator().manual_seed(width)
    host = [
        torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=generator) for rows in (50, 31, 17)
    ]
    return host, [host[0].to(device), host[1].pin_memory(), host[2]]


def codes(tables: list[torch.Tensor], count: int, used: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    which = torch.randint(0, used, (count,), generator=generator)
    rows = torch.tensor([table.shape[0] for table in tables])[which]
    return row_code(which, (torch.rand(count, generator=generator) * rows).long())


@pytest.mark.parametrize("width", [1, 3, 8, 15, 16, 17, 48, 112, 128, 400, 512, 1024, 2408, 4096, 4100])
def test_tm08_tm10_device_pinned_and_pageable_in_one_call(width):
    host, mixed = sources(width)
    for used in (1, 2, 3):
        code = codes(host, 3000, used)
        expected = gather_rows(host[:used], code)
        assert torch.equal(gather_rows(mixed[:used], code.cuda()).cpu(), expected)
        index = torch.randint(0, 3000, (777,))
        assert torch.equal(gather_rows(mixed[:used], code.cuda(), index.cuda()).cpu(), expected[index])


def test_tm08_strided_and_unaligned_rows():
    host = torch.randint(0, 256, (100, 96), dtype=torch.uint8)
    code = torch.randint(0, 50, (999,))
    for source in (host[::2, 5:45], host[:50, 16:80]):
        there = host.cuda()[::2, 5:45] if source.stride(0) != 96 else host.cuda()[:50, 16:80]
        assert torch.equal(gather_rows(there, code.cuda()).cpu(), gather_rows(source, code))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool], ids=str
)
def test_tm08_dtypes(dtype):
    table = (torch.randn(64, 10) * 3).to(dtype)
    code = torch.randint(0, 64, (500,))
    assert torch.equal(gather_rows(table.cuda(), code.cuda()).cpu(), table[code])


def test_tm08_requests_read_in_address_order_give_the_same_rows(monkeypatch):
    from tiered_memory import kernels

    monkeypatch.setattr(kernels, "ORDERED_REQUEST_BYTES", 0)
    monkeypatch.setattr(kernels, "ORDERED_TABLE_BYTES", 0)
    host, mixed = sources(112)
    code, index = codes(host, 3000, 3), torch.randint(0, 3000, (5000,))
    expected = gather_rows(host, code, index)
    assert torch.equal(gather_rows(mixed, code.cuda(), index.cuda()).cpu(), expected)


def test_tm08_a_source_past_two_gib():
    rows = (3 << 30) // 512
    table = torch.empty(rows, 128, dtype=torch.int32, device="cuda")
    table[:] = torch.arange(rows, device="cuda", dtype=torch.int32).unsqueeze(1)
    code = torch.tensor([0, rows - 1, rows // 2, rows - 2], device="cuda")
    assert gather_rows(table, code)[:, 0].tolist() == code.tolist()


@pytest.mark.parametrize("width", [4, 16, 112])
def test_tm09_segments_of_every_tier(width):
    host, mixed = sources(width)
    first = row_code(torch.tensor([0, 1, 2, 0]), torch.tensor([3, 0, 10, 40]))
    count, shift = torch.tensor([5, 31, 0, 10]), torch.tensor([0, 2, 7, 23])
    fill = torch.arange(width, dtype=torch.uint8)
    for value in (None, fill):
        expected = gather_segments(host, first, count, shift, 33, fill=value)
        there = gather_segments(
            mixed, first.cuda(), count.cuda(), shift.cuda(), 33, fill=None if value is None else value.cuda()
        )
        assert torch.equal(there.cpu(), expected)


def test_tm11_rows_of_a_peer():
    if torch.cuda.device_count() < 2 or not peer_access(0, 1):
        pytest.skip("needs two GPUs with peer access")
    host, _ = sources(512)
    mixed = [host[0].to("cuda:0"), host[1].to("cuda:1"), host[2].pin_memory()]
    code = codes(host, 4000, 3)
    assert torch.equal(gather_rows(mixed, code.to("cuda:0")).cpu(), gather_rows(host, code))
