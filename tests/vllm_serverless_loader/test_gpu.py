"""Loading into GPU memory: through staging, from page-locked memory, by the store process."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from tests.vllm_serverless_loader.tensors import assert_same, hostile
from vllm_serverless_loader import HostCache, LoadOptions, StoreClient, open_checkpoint, write_partition

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "model"
    write_partition(path, hostile(), chunk_bytes=64 << 10)
    return path


def on_gpu(tensors):
    return {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype, device="cuda") for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("slots", [1, 3])
def test_sl07_through_staging(folder, slots):
    expected = hostile()
    options = LoadOptions(staging_chunks=slots, io_threads=4)
    with open_checkpoint(folder) as checkpoint:
        loaded = checkpoint.load("cuda", options=options).tensors
        assert_same(loaded, expected)
        assert loaded["plain"].data_ptr() == loaded["tied"].data_ptr()
        into = on_gpu(expected)
        into["big"] = torch.zeros(2 * 200_003, dtype=torch.float64, device="cuda")[::2]
        into["odd"] = torch.zeros(4097, dtype=torch.uint8)  # one of them stays on the CPU
        assert_same(checkpoint.load(into=into, options=options).tensors, expected)
        streamed = {name: tensor.clone() for name, tensor in checkpoint.tensors("cuda", options=options)}
        assert all(tensor.is_cuda for tensor in streamed.values())
        assert_same(streamed, expected)


@pytest.mark.parametrize("pinned", [True, False])
def test_sl08_from_the_host_cache(folder, pinned):
    expected = hostile()
    with (
        HostCache(64 << 20, chunk_bytes=4096, pinned=pinned) as cache,
        open_checkpoint(folder) as checkpoint,
        cache.load(checkpoint) as model,
    ):
        assert_same(model.load(into=on_gpu(expected)).tensors, expected)
        assert_same(model.load("cuda").tensors, expected)
        assert_same({name: tensor.clone() for name, tensor in model.tensors("cuda")}, expected)


@pytest.mark.parametrize("push", [True, False])
def test_sl09_from_a_store_process(folder, tmp_path, push):
    expected = hostile()
    socket = tmp_path / "s.sock"
    command = [
        sys.executable,
        "-m",
        "vllm_serverless_loader",
        "store",
        "--memory",
        "64MiB",
        "--socket",
        str(socket),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout.readline().startswith("store: ")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no fall-back
            for _ in range(2):
                with StoreClient(socket, push=push) as client, client.open(folder) as model:
                    assert_same(model.load(into=on_gpu(expected)).tensors, expected)
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()
