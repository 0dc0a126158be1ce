"""The OpenAI server with and without the plugin, under concurrent load: same tokens, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MODEL = Path(__file__).parents[2] / "examples" / "tiny_moe" / "model"
REQUESTS, ABORTS, AT_ONCE = 1000, 40, 24
# Prompts share beginnings (prefix caching), some exceed a step (chunked prefill), and together they exceed
# the key/value cache (preemption).
ARGUMENTS = [
    "--max-model-len=256",
    "--max-num-seqs=12",
    "--max-num-batched-tokens=64",
    "--num-gpu-blocks-override=12",
    "--block-size=32",
    "--enable-prefix-caching",
    "--enforce-eager",
    "--no-enable-log-requests",
]


def prompt(index: int) -> list[int]:
    """Token ids, 6 to 100 of them."""
    kind = index % 10
    return [(7 * kind + j * j) % 90 + 3 for j in range(6 + 10 * kind)] + [index % 7 + 3]


@contextmanager
def server(options: dict | None):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={MODEL}"]
    command += [f"--port={port}", "--host=127.0.0.1", "--served-model-name=tiny", *ARGUMENTS]
    if options is not None:
        command.append("--additional-config=" + json.dumps({"moe_offload": options}))
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    os.set_blocking(process.stdout.fileno(), False)
    lines: list[str] = []
    try:
        wait_until_healthy(process, port, lines)
        yield f"http://127.0.0.1:{port}", process, lines
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_healthy(process: subprocess.Popen, port: int, lines: list[str]) -> None:
    import urllib.error
    import urllib.request

    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        lines += process.stdout.readlines()
        if process.poll() is not None:
            raise RuntimeError("the server ended:\n" + "".join(lines[-60:]))
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        except (urllib.error.URLError, OSError):
            time.sleep(1)
        else:
            return
    raise RuntimeError("the server did not come up:\n" + "".join(lines[-60:]))


async def load(url: str, process: subprocess.Popen, lines: list[str]) -> dict[int, list[str]]:
    """Send all requests, some streaming, some aborted in mid-stream; the tokens of the complete ones."""
    import aiohttp

    results: dict[int, list[str]] = {}
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(session: aiohttp.ClientSession, index: int) -> None:
        aborts = index % (REQUESTS // ABORTS) == 3
        body = {
            "model": "tiny",
            "prompt": prompt(index),
            "max_tokens": 60 if aborts else 3 + index % 6,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            "stream": aborts or index % 3 == 0,
        }
        async with gate, session.post(f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            if not body["stream"]:
                (choice,) = (await response.json())["choices"]
                results[index] = choice["logprobs"]["tokens"]
                return
            tokens: list[str] = []
            async for line in response.content:
                text = line.decode().strip()
                if text.startswith("data: {"):
                    (choice,) = json.loads(text[6:])["choices"]
                    tokens += choice["logprobs"]["tokens"] if choice["logprobs"] else []
                if aborts and len(tokens) >= 2:
                    return  # closing the response is the client's way to abort
            results[index] = tokens

    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        tasks = [asyncio.create_task(one(session, index)) for index in range(REQUESTS)]
        for task in asyncio.as_completed(tasks):
            await task
            lines += process.stdout.readlines()  # or the pipe would fill up
        # vLLM tells its worker of ended requests with the next step.
        for index in range(2):
            await one(session, REQUESTS + 1 + 3 * index)
        async with session.get(f"{url}/metrics") as response:
            lines.append(await response.text())
    return results


def metric(text: str, name: str) -> float:
    values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, flags=re.MULTILINE)
    assert values, f"{name} is not in /metrics"
    return sum(map(float, values))


def test_mo05_the_server_under_load_gives_the_same_tokens_and_keeps_no_request():
    answers = {}
    for name, options in (("plain", None), ("ours", {"cache_fraction": 0.25, "policy": "eam"})):
        with server(options) as (url, process, lines):
            answers[name] = asyncio.run(load(url, process, lines))
            metrics = lines[-1]
        assert metric(metrics, "vllm:num_preemptions_total") > 0, f"{name}: the cache was large enough"
        assert len(answers[name]) >= REQUESTS - ABORTS
    common = answers["plain"].keys() & answers["ours"].keys()
    assert len(common) >= REQUESTS - ABORTS
    different = [index for index in common if answers["plain"][index] != answers["ours"][index]]
    assert not different
    assert metric(metrics, "vllm:moe_offload_traced_requests") <= 1
    hits, misses = (metric(metrics, f"vllm:moe_offload_expert_{name}_total") for name in ("hits", "misses"))
    assert hits > 0
    assert misses > 0
    assert metric(metrics, "vllm:moe_offload_expert_accesses_total") == hits + misses
