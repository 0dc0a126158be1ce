"""DirectReader against ``open().read()``, and under injected faults (TM-04)."""

from __future__ import annotations

import errno
import os
import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiered_memory.direct_io as direct_io
from tiered_memory import DirectReader

NBYTES = 3 * (1 << 20) + 1237
_preadv, _open = os.preadv, os.open


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("direct") / "file"
    path.write_bytes(os.urandom(NBYTES))
    return path


@pytest.fixture(autouse=True)
def forget_warnings():
    direct_io._warned_devices.clear()


def drop_cache(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def target(nbytes, shift):
    """A uint8 tensor whose address is ``shift`` above a multiple of 4096."""
    room = torch.zeros(nbytes + 2 * 4096, dtype=torch.uint8)
    start = -room.data_ptr() % 4096 + shift
    return room[start : start + nbytes]


def descriptors():
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("mode", ["auto", "always", "never"])
@pytest.mark.parametrize("cold", [False, True])
@settings(max_examples=60, deadline=None)
@given(
    offset=st.integers(0, NBYTES) | st.integers(0, NBYTES // 4096).map(lambda page: page * 4096),
    length=st.integers(0, 20000) | st.integers(0, NBYTES),
    shift=st.integers(0, 4095) | st.just(0),
)
def test_tm04_bytes_equal_read_for_any_offset_length_and_address(file, mode, cold, offset, length, shift):
    expected = file.read_bytes()[offset : offset + length]
    out = target(len(expected), shift)
    if cold:
        drop_cache(file)
    seen = []
    with DirectReader(file, mode=mode) as reader:
        reader.read_into(out, offset, lambda part: seen.append(bytes(part)))
    assert out.numpy().tobytes() == expected
    assert b"".join(seen) == expected
    out.zero_()
    with DirectReader(file, mode=mode) as reader:
        reader.read_into(out, offset)
    assert out.numpy().tobytes() == expected


def test_tm04_fills_tensors_of_any_dtype(file):
    data = file.read_bytes()
    with DirectReader(file) as reader:
        for dtype in (torch.bfloat16, torch.float64, torch.bool, torch.float8_e4m3fn):
            out = torch.empty((3, 5), dtype=dtype)
            reader.read_into(out, 17)
            assert out.view(torch.uint8).numpy().tobytes() == data[17 : 17 + out.nbytes]
        scalar = torch.empty((), dtype=torch.int64)
        reader.read_into(scalar, 8)
        assert scalar.item() == int.from_bytes(data[8:16], "little", signed=True)


def test_tm04_end_of_file_is_named(file):
    with DirectReader(file) as reader:
        with pytest.raises(OSError, match=f"{file}: expected 4096 bytes at {NBYTES - 100}, found 100"):
            reader.read_into(target(4096, 0), NBYTES - 100)
        with pytest.raises(OSError, match="expected 1 bytes at 99999999, found 0"):
            reader.read_into(target(1, 0), 99999999)


@pytest.mark.parametrize("mode", ["auto", "always", "never"])
def test_tm04_file_that_shrinks_is_named(tmp_path, mode):
    path = tmp_path / "shrinks"
    path.write_bytes(os.urandom(20000))
    with DirectReader(path, mode=mode) as reader:
        os.truncate(path, 8192)
        drop_cache(path)
        with pytest.raises(OSError, match=r"expected \d+ bytes at \d+, found"):
            reader.read_into(target(20000, 0), 0)


@pytest.mark.parametrize("where", ["open", "preadv"])
def test_tm04_refusal_of_direct_io_gives_the_same_bytes_and_one_warning(file, monkeypatch, where):
    direct_descriptors = set()

    def refuse_open(path, flags, *args, **kwargs):
        if flags & os.O_DIRECT and where == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        fd = _open(path, flags, *args, **kwargs)
        if flags & os.O_DIRECT:
            direct_descriptors.add(fd)
        return fd

    def refuse_read(fd, buffers, offset, flags=0):
        if fd in direct_descriptors:
            raise OSError(errno.EINVAL, "Invalid argument")
        return _preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "open", refuse_open)
    monkeypatch.setattr(os, "preadv", refuse_read)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for shift in (0, 7):
            out = target(NBYTES - 5, shift)
            with DirectReader(file, mode="always") as reader:
                reader.read_into(out, 5)
                assert not reader.direct
            assert out.numpy().tobytes() == file.read_bytes()[5:]
    refusals = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    assert len(refusals) == 1
    assert str(file) in refusals[0]
    assert "O_DIRECT" in refusals[0]


@pytest.mark.parametrize("mode", ["auto", "always", "never"])
@pytest.mark.parametrize("piece", [1, 511, 4096, 100_000])
def test_tm04_short_reads_go_on_where_they_stopped(file, monkeypatch, mode, piece):
    def short(fd, buffers, offset, flags=0):
        (buffer,) = buffers
        # O_DIRECT returns whole blocks only.
        limit = piece if mode == "never" else max(piece // 4096, 1) * 4096
        return _preadv(fd, [buffer[: min(limit, len(buffer))]], offset, flags)

    length = 3000 if piece == 1 else 600_000
    drop_cache(file)
    monkeypatch.setattr(os, "preadv", short)
    out = target(length, 12)
    seen = []
    with DirectReader(file, mode=mode) as reader:
        reader.read_into(out, 12, lambda part: seen.append(bytes(part)))
    assert b"".join(seen) == out.numpy().tobytes()
    assert out.numpy().tobytes() == file.read_bytes()[12 : 12 + length]


def test_tm04_half_resident_file(file):
    drop_cache(file)
    with file.open("rb") as handle:
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        handle.seek(0)
        handle.read(1 << 20)
    out = target(NBYTES, 0)
    with DirectReader(file) as reader:
        reader.read_into(out, 0)
    assert out.numpy().tobytes() == file.read_bytes()


def test_tm04_io_errors_name_path_and_offset(file, monkeypatch):
    def broken(fd, buffers, offset, flags=0):
        if offset >= 1 << 20:
            raise OSError(errno.EIO, "Input/output error")
        return _preadv(fd, [buffers[0][: 1 << 20]], offset, flags)

    monkeypatch.setattr(os, "preadv", broken)
    for mode in ("auto", "always", "never"):
        with DirectReader(file, mode=mode) as reader:
            with pytest.raises(OSError, match=r"Input/output error \(read at byte \d+\).*file") as caught:
                reader.read_into(target(2 << 20, 0), 0)
            assert caught.value.errno == errno.EIO


def test_tm04_eight_threads_on_one_reader(file):
    data = file.read_bytes()
    drop_cache(file)
    wrong = []

    def read(reader, number):
        for turn in range(30):
            offset = (number * 77_777 + turn * 50_021) % (NBYTES - 70_000)
            out = target(70_000, turn)
            reader.read_into(out, offset)
            if out.numpy().tobytes() != data[offset : offset + 70_000]:
                wrong.append((number, turn))

    with DirectReader(file) as reader:
        threads = [threading.Thread(target=read, args=(reader, number)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_tm04_buffers_go_with_the_last_reader(file):
    from tiered_memory import direct_io

    idle = direct_io._bounce_buffers._idle
    drop_cache(file)
    with DirectReader(file, mode="always") as first:
        with DirectReader(file, mode="always") as second:
            first.read_into(target(10_000, 12), 0)
            assert len(idle) == 1
            second.read_into(target(10_000, 12), 0)
            assert len(idle) == 1
        assert len(idle) == 1
    assert not idle


def test_tm04_no_descriptor_is_left(file, tmp_path, monkeypatch):
    before = descriptors()
    with DirectReader(file) as reader:
        reader.read_into(target(100, 0), 0)
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.read_into(target(100, 0), 0)
    with pytest.raises(FileNotFoundError):
        DirectReader(tmp_path / "absent")

    def forbid_direct(path, flags, *args, **kwargs):
        if flags & os.O_DIRECT:
            raise OSError(errno.EACCES, "Permission denied")
        return _open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", forbid_direct)
    with pytest.raises(PermissionError):
        DirectReader(file)
    assert descriptors() == before


def test_tm04_bad_arguments_are_refused(file):
    with pytest.raises(ValueError, match="mode must be"):
        DirectReader(file, mode="sometimes")
    with DirectReader(file) as reader, pytest.raises(ValueError, match="contiguous CPU tensor"):
        reader.read_into(torch.empty(4, 4, dtype=torch.uint8).t()[:, :2], 0)
