"""The gather on the CPU: torch twin and interpreted kernels against plain indexing (TM-07 to TM-10)."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_memory.gather import ROW_MASK, addressable, gather_rows, gather_segments, peer_access, row_code

DTYPES = [
    torch.uint8, torch.int8, torch.bool, torch.int16, torch.float16, torch.bfloat16, torch.int32,
    torch.float32, torch.int64, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn,
]  # fmt: skip


@pytest.fixture(params=["auto", "torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        if torch.cuda.is_available():
            pytest.skip("test_gather_gpu.py runs the kernels on the device")
        pytest.importorskip("triton")
        os.environ["TRITON_INTERPRET"] = "1"
    return request.param


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def random_table(
    rows: int, row: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    width = torch.empty(row, dtype=dtype).nbytes
    raw = torch.randint(
        0, 2 if dtype == torch.bool else 256, (rows, width), dtype=torch.uint8, generator=generator
    )
    return raw.view(dtype).view(rows, *row)


def naive_rows(sources: list[torch.Tensor], code: torch.Tensor) -> torch.Tensor:
    if code.numel() == 0:
        return torch.empty(0, *sources[0].shape[1:], dtype=sources[0].dtype)
    return torch.stack([sources[int(c) >> 48][int(c) & ROW_MASK] for c in code])


def random_codes(sources: list[torch.Tensor], count: int, generator: torch.Generator) -> torch.Tensor:
    which = torch.randint(0, len(sources), (count,), generator=generator)
    rows = torch.tensor([source.shape[0] for source in sources])[which]
    return row_code(which, (torch.rand(count, generator=generator, dtype=torch.float64) * rows).long())


def test_row_code_names_source_and_row():
    assert row_code(3, torch.tensor([0, 7])).tolist() == [3 << 48, (3 << 48) + 7]
    assert row_code(torch.tensor([0, 1]), torch.tensor([5, 6])).tolist() == [5, (1 << 48) + 6]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tm07_tm08_every_dtype_and_row_shape(backend: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    for row in [(), (1,), (3,), (5, 2), (16,)]:
        sources = [random_table(rows, row, dtype, generator) for rows in (4, 1, 9)]
        code = random_codes(sources, 13, generator)
        assert torch.equal(
            as_bytes(gather_rows(sources, code, backend=backend)), as_bytes(naive_rows(sources, code))
        )


@pytest.mark.parametrize(
    "width", [1, 2, 3, 7, 8, 12, 15, 16, 17, 48, 64, 100, 112, 128, 400, 513, 1024, 4096, 4100]
)
@pytest.mark.parametrize("count", [1, 2, 8])
def test_tm07_tm08_every_width_and_number_of_sources(backend: str, width: int, count: int):
    generator = torch.Generator().manual_seed(width * 10 + count)
    sources = [random_table(3 + s, (width,), torch.uint8, generator) for s in range(count)]
    code = random_codes(sources, 11, generator)
    expected = naive_rows(sources, code)
    assert torch.equal(gather_rows(sources, code, backend=backend), expected)
    out = torch.empty_like(expected)
    assert gather_rows(sources, code, out=out, backend=backend) is out
    assert torch.equal(out, expected)


def test_tm07_tm08_strided_rows_unaligned_bases_index_and_empty(backend: str):
    generator = torch.Generator().manual_seed(1)
    wide = random_table(20, (40,), torch.uint8, generator)
    sources = [wide[:, 1:25], wide[::3, 8:32], wide[5:9, 16:40]]
    code = random_codes(sources, 30, generator)
    index = torch.randint(0, 30, (50,), generator=generator)
    assert torch.equal(gather_rows(sources, code, index, backend=backend), naive_rows(sources, code[index]))
    empty = torch.empty(0, dtype=torch.int64)
    assert gather_rows(sources, empty, backend=backend).shape == (0, 24)
    assert gather_rows(wide[:, :0], code & ROW_MASK & 15, backend=backend).shape == (30, 0)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_tm07_rows_equal_plain_indexing(data: st.DataObject):
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    width = data.draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    sources = [random_table(rows, (width,), torch.uint8, generator) for rows in sizes]
    code = random_codes(sources, data.draw(st.integers(0, 20)), generator)
    assert torch.equal(gather_rows(sources, code), naive_rows(sources, code))


def naive_segments(sources, first, count, shift, length, fill):
    row = sources[0].shape[1:]
    out = torch.zeros(len(first), length, *row, dtype=sources[0].dtype)
    if fill is not None:
        out[:] = fill
    for b in range(len(first)):
        for k in range(int(count[b])):
            c = int(first[b])
            out[b, int(shift[b]) + k] = sources[c >> 48][(c & ROW_MASK) + k]
    return out


def test_tm09_all_small_segments(backend: str):
    generator = torch.Generator().manual_seed(2)
    sources = [
        random_table(5, (3,), torch.float32, generator),
        random_table(4, (3,), torch.float32, generator),
    ]
    fill = random_table(1, (3,), torch.float32, generator)[0]
    for length in range(5):
        cases = [
            (s, first, count, shift)
            for s, first, count in itertools.product(range(2), range(4), range(length + 1))
            for shift in range(length - count + 1)
            if first + count <= sources[s].shape[0]
        ]
        which, row, count, shift = (torch.tensor(column) for column in zip(*cases, strict=True))
        first = row_code(which, row)
        for value in (None, fill):
            result = gather_segments(sources, first, count, shift, length, fill=value, backend=backend)
            expected = naive_segments(sources, first, count, shift, length, value)
            assert torch.equal(as_bytes(result), as_bytes(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tm09_fill_of_every_dtype(backend: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(3)
    source = random_table(6, (2, 2), dtype, generator)
    fill = random_table(1, (2, 2), dtype, generator)[0]
    first, count, shift = torch.tensor([1, 0, 4]), torch.tensor([3, 0, 2]), torch.tensor([1, 0, 2])
    result = gather_segments(source, first, count, shift, 4, fill=fill, backend=backend)
    assert torch.equal(as_bytes(result), as_bytes(naive_segments([source], first, count, shift, 4, fill)))


def test_tm09_identity_with_gather_rows(backend: str):
    generator = torch.Generator().manual_seed(4)
    sources = [random_table(9, (28,), torch.float32, generator) for _ in range(3)]
    code = random_codes(sources, 40, generator)
    ones, zeros = torch.ones_like(code), torch.zeros_like(code)
    segments = gather_segments(sources, code, ones, zeros, 1, backend=backend)
    assert torch.equal(
        segments[:, 0].view(torch.int32), gather_rows(sources, code, backend=backend).view(torch.int32)
    )


def test_tm09_first_is_ignored_where_count_is_zero(backend: str):
    result = gather_segments(
        torch.ones(2, 1), torch.tensor([1 << 52]), torch.tensor([0]), torch.tensor([0]), 2, backend=backend
    )
    assert result.tolist() == [[[0.0], [0.0]]]


def test_tm08_skipped_sources_are_left_to_the_caller():
    """TM-10's split on the CPU: the kernel leaves a source's rows, the host path writes exactly those."""
    if torch.cuda.is_available():
        pytest.skip("needs the interpreter; test_gather_gpu.py runs the real split")
    os.environ["TRITON_INTERPRET"] = "1"
    from tiered_memory import gather, kernels

    generator = torch.Generator().manual_seed(5)
    sources = [random_table(7, (4,), torch.int32, generator) for _ in range(3)]
    code = random_codes(sources, 50, generator)
    views, unit = gather._unit_views(sources)
    out = torch.full((50, views[0].shape[1]), -1, dtype=views[0].dtype)
    kernels.gather_rows(views, code, None, out, skipped=[1], unit_bytes=min(unit, 8))
    expected = gather._unit_views([naive_rows(sources, code)])[0][0]
    written = (code >> 48) != 1
    assert torch.equal(out[written], expected[written])
    assert (out[~written] == -1).all()
    gather._rows_by_source(views, code, out, only=[1])
    assert torch.equal(out, expected)


@pytest.mark.parametrize("programs", [0, 3])
def test_tm08_any_order_and_number_of_programs_give_the_same_rows(programs: int):
    if torch.cuda.is_available():
        pytest.skip("needs the interpreter; test_gather_gpu.py sorts requests on the device")
    os.environ["TRITON_INTERPRET"] = "1"
    from tiered_memory import gather, kernels

    generator = torch.Generator().manual_seed(6)
    sources = [random_table(9, (48,), torch.uint8, generator) for _ in range(2)]
    code, index = random_codes(sources, 40, generator), torch.randint(0, 40, (70,), generator=generator)
    views, _ = gather._unit_views(sources)
    out = torch.empty(70, views[0].shape[1], dtype=views[0].dtype)
    kernels.gather_rows(
        views, code, index, out, skipped=[], unit_bytes=8, order=torch.argsort(code[index]),
        shape=kernels.LaunchShape(32, 1, programs),
    )  # fmt: skip
    assert torch.equal(out.view(torch.uint8), naive_rows(sources, code[index]))


def test_tm07_errors_name_the_argument_and_both_values():
    x, code = torch.zeros(10, 4), torch.tensor([0, 1, 2, 3])
    with pytest.raises(ValueError, match="sources has 0 tensors; it must have 1 to 8"):
        gather_rows([], code)
    with pytest.raises(ValueError, match="sources has 9 tensors"):
        gather_rows([x] * 9, code)
    with pytest.raises(ValueError, match=r"sources\[1\] has rows \(5,\), sources\[0\] has \(4,\)"):
        gather_rows([x, torch.zeros(2, 5)], code)
    with pytest.raises(ValueError, match=r"sources\[1\] is torch.float64, sources\[0\] is torch.float32"):
        gather_rows([x, x.double()], code)
    with pytest.raises(ValueError, match="each row must be contiguous"):
        gather_rows(x.t(), code)
    with pytest.raises(ValueError, match=r"code is torch\.int32"):
        gather_rows(x, code.int())
    with pytest.raises(ValueError, match=r"out is \(3, 4\).*needed: \(4, 4\)"):
        gather_rows(x, code, out=torch.empty(3, 4))
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        gather_rows(x, code, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(IndexError, match=r"code\[3\] names row 12 of source 1, which has 10 rows"):
        gather_rows([x, x], torch.tensor([0, 1, 2, row_code(1, torch.tensor(12))]))
    with pytest.raises(IndexError, match=r"code\[0\] names source -1, but there are 1 sources"):
        gather_rows(x, torch.tensor([-1]))
    with pytest.raises(IndexError, match=r"index\[1\] is 4, but code has 4 entries"):
        gather_rows(x, code, torch.tensor([0, 4]))


def test_tm07_tm09_a_bad_request_writes_nothing(backend: str):
    x, out = torch.zeros(10, 4), torch.full((2, 4), 7.0)
    with pytest.raises(IndexError, match=r"code\[1\] names row 10 of source 1"):
        gather_rows([x, x], torch.tensor([0, row_code(1, torch.tensor(10))]), out=out, backend=backend)
    with pytest.raises(IndexError, match=r"index\[1\] is -1"):
        gather_rows(x, torch.tensor([0, 1]), torch.tensor([0, -1]), out=out, backend=backend)
    windows = torch.full((2, 1, 4), 7.0)
    ones, zeros = torch.ones(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(IndexError, match=r"first\[1\] names rows 10 to 10 of source 0"):
        gather_segments(x, torch.tensor([0, 10]), ones, zeros, 1, out=windows, backend=backend)
    assert (out == 7).all()
    assert (windows == 7).all()


def test_tm09_errors():
    x, one = torch.zeros(10, 4), torch.tensor([1])
    with pytest.raises(ValueError, match=r"segment 0 has count 3 at shift 2.*length 4"):
        gather_segments(x, one, torch.tensor([3]), torch.tensor([2]), 4)
    with pytest.raises(ValueError, match="count -1"):
        gather_segments(x, one, torch.tensor([-1]), one, 4)
    with pytest.raises(ValueError, match="count has 2 entries, first has 1"):
        gather_segments(x, one, torch.tensor([1, 1]), one, 4)
    with pytest.raises(ValueError, match="fill is"):
        gather_segments(x, one, one, one, 4, fill=torch.zeros(5))
    with pytest.raises(IndexError, match=r"first\[0\] names rows 8 to 10 of source 0, which has 10 rows"):
        gather_segments(x, torch.tensor([8]), torch.tensor([3]), torch.tensor([0]), 4)


def test_tm07_mapped_file_is_a_source(tmp_path):
    path = tmp_path / "rows.bin"
    table = torch.arange(40, dtype=torch.int32).view(10, 4)
    path.write_bytes(table.numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=40, dtype=torch.int32).view(10, 4)
    code = torch.tensor([9, 0, row_code(1, torch.tensor(3))])
    assert torch.equal(gather_rows([mapped, -table], code), torch.stack([table[9], table[0], -table[3]]))


def test_tm11_peer_access_without_such_devices():
    missing = torch.cuda.device_count() if torch.cuda.is_available() else 0
    assert peer_access(0, missing) is False
    assert addressable(torch.zeros(1), torch.device("cpu"))
