"""Can vLLM's Triton expert kernel read experts where they lie in pinned host memory, and how fast?

    python benchmarks/vllm_moe_offload_gpu_slice.py [--out DIR]

Half a minute on one H100 or H200 with vLLM 0.26.0. Each part is reported even if a later one fails:
  link       measured pinned and pageable bandwidth
  one_layer  vLLM's Triton expert kernel on: one array a tensor, records, half the experts read in place from
             pinned host memory by out-of-range rows, the same after a copy, after a pull by a gather kernel
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.common import RESULTS, Headline, write_result
from tiered_memory import PinnedArena, gather_rows, measure_bandwidth
from vllm_moe_offload import SlabLayout

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2048, 768, 128, 8


def timed(step, repeats: int = 15) -> list[float]:
    """Milliseconds of each repetition after three to warm up."""
    times = []
    for index in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        if index >= 3:
            times.append(start.elapsed_time(end))
    return times


def summary(samples: list[float]) -> dict:
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "samples": samples,
    }


def expert_layer(x, w13, w2, weights, ids, expert_map, config):  # noqa: PLR0917
    """vLLM's TritonExperts.apply for unquantised SiLU experts, with rows of w13 and w2 of our choice."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe import MoEActivation
    from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
    from vllm.model_executor.layers.fused_moe.fused_moe import (
        _prepare_expert_assignment,
        invoke_fused_moe_triton_kernel,
    )
    from vllm.triton_utils import tl

    tokens, top_k = ids.shape
    up = x.new_empty(tokens, top_k, w13.shape[1])
    act = x.new_empty(tokens * top_k, w13.shape[1] // 2)
    down = x.new_empty(tokens, top_k, w2.shape[1])
    out = torch.empty_like(x)
    order = _prepare_expert_assignment(ids, config, tokens, top_k, EXPERTS, expert_map)
    common = {
        "compute_type": tl.bfloat16,
        "use_fp8_w8a8": False,
        "use_int8_w8a8": False,
        "use_int8_w8a16": False,
        "use_int4_w4a16": False,
        "per_channel_quant": False,
    }
    invoke_fused_moe_triton_kernel(x, w13, up, None, None, None, *order, False, top_k, config, **common)
    apply_moe_activation(MoEActivation.SILU, act, up.view(-1, w13.shape[1]))
    invoke_fused_moe_triton_kernel(act, w2, down, None, None, weights, *order, True, 1, config, **common)
    ops.moe_sum(down, out)
    return out


def one_layer() -> dict:
    """Open questions 1 to 3 of the design: in-place reads, map or remapped ids, strided records."""
    torch.manual_seed(0)
    plain = {
        "w13": (torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, device="cuda") * 0.02).bfloat16(),
        "w2": (torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, device="cuda") * 0.02).bfloat16(),
    }
    layout = SlabLayout.from_tensors(plain)
    slabs = torch.zeros(EXPERTS, layout.nbytes, dtype=torch.uint8, device="cuda")
    records = layout.views(slabs)
    for name, tensor in plain.items():
        records[name].copy_(tensor)
    # The host's records start a whole number of records away from the device's: row numbers reach both.
    arena = PinnedArena((EXPERTS + 1) * layout.nbytes, pinned=True)
    shift = (slabs.data_ptr() - arena.buffer.data_ptr()) % layout.nbytes
    host = arena.buffer[shift : shift + EXPERTS * layout.nbytes].view(EXPERTS, layout.nbytes)
    host.copy_(slabs)
    distance, remainder = divmod(host.data_ptr() - slabs.data_ptr(), layout.nbytes)
    assert remainder == 0
    report: dict = {
        "record_nbytes": layout.nbytes,
        "rows_to_host": distance,
        "fits_int32": abs(distance) < 2**31,
    }

    own = torch.arange(EXPERTS, dtype=torch.int32, device="cuda")
    # Every second expert counts as missing on the device.
    missing = own % 2 == 1
    in_place = torch.where(missing, own + distance, own).int()
    for batch in (1, 8, 32):
        report[f"batch_{batch}"] = one_batch(batch, plain, slabs, host, layout, own, in_place)
    return report


def one_batch(batch, plain, slots, host, layout, own, in_place) -> dict:  # noqa: PLR0917
    """All arms for one number of tokens; odd experts are missing from ``slots`` until an arm brings them."""
    from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config

    x = torch.randn(batch, HIDDEN, device="cuda").bfloat16()
    weights, ids = torch.rand(batch, EXPERTS, device="cuda").softmax(-1).topk(TOP_K)
    ids = ids.int()
    config = try_get_optimal_moe_config(plain["w13"].shape, plain["w2"].shape, TOP_K, None, batch)
    small = batch * TOP_K * 4 <= EXPERTS
    needed = torch.unique(ids)
    absent = needed[needed % 2 == 1].long()
    records = layout.views(slots)

    def run(rows, by_map):
        chosen, expert_map = (ids, rows) if by_map else (rows[ids.long()], None)
        return expert_layer(x, records["w13"], records["w2"], weights, chosen, expert_map, config)

    def bring():
        for expert in absent.tolist():
            slots[expert].copy_(host[expert], non_blocking=True)

    def pull():
        slots[absent] = gather_rows(host, absent)

    def resident():
        return expert_layer(x, plain["w13"], plain["w2"], weights, ids, None, config)

    def after(fetch):
        def arm():
            fetch()
            return run(own, not small)

        return arm

    reference = resident()
    results = {}

    def measure(name, arm, *, fetched):
        slots[1::2] = 0xFF  # NaN: a wrong read shows
        if fetched:
            bring()
        results[name] = (torch.equal(arm(), reference), timed(arm))

    measure("plain", resident, fetched=True)
    measure("records", lambda: run(own, not small), fetched=True)
    measure("records_by_map", lambda: run(own, True), fetched=True)
    measure("in_place", lambda: run(in_place, not small), fetched=False)
    measure("in_place_by_map", lambda: run(in_place, True), fetched=False)
    measure("copy_then_run", after(bring), fetched=False)
    measure("pull_then_run", after(pull), fetched=False)
    asked = []
    for _ in range(50):
        start = time.perf_counter()
        ids.cpu().numpy()
        asked.append((time.perf_counter() - start) * 1e6)
    moved = len(absent) * layout.expert_nbytes
    base = statistics.median(results["records"][1])
    return {
        "distinct_experts": len(needed),
        "missing_experts": len(absent),
        "missing_bytes": moved,
        "small_batch_path": small,
        "ids_to_host_us": statistics.median(asked),
        "arms": {
            name: {
                "bitwise_equal": equal,
                "ms": summary(times),
                "bytes_per_s_beyond_resident": moved / max(statistics.median(times) - base, 1e-6) * 1e3,
            }
            for name, (equal, times) in results.items()
        },
    }


def headline(parts: dict) -> list[Headline]:
    """The figures worth quoting of the parts that ran."""
    rows = [
        Headline(
            name.replace("_", " "),
            link["bytes_per_s"] / 1e9,
            "GB/s",
            min(link["samples"]) / 1e9,
            max(link["samples"]) / 1e9,
        )
        for name, link in parts.get("link", {}).items()
        if isinstance(link, dict)
    ]
    for batch, layer in parts.get("one_layer", {}).items():
        for arm, found in layer["arms"].items() if batch.startswith("batch_") else ():
            note = "bitwise equal to plain" if found["bitwise_equal"] else "differs from plain"
            time_ms = found["ms"]
            what = f"one layer, {batch.replace('_', ' ')}: {arm}"
            rows.append(Headline(what, time_ms["median"], "ms", time_ms["min"], time_ms["max"], note=note))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--parts", default="link,one_layer")
    arguments = parser.parse_args()
    result: dict = {}

    def save(part: dict, name: str) -> None:
        result[name] = part
        write_result(
            "vllm_moe_offload_gpu_slice",
            question="Can vLLM's expert kernel read experts in place from pinned host memory, and how fast?",
            headline=headline({key: value for key, value in result.items() if "error" not in value}),
            samples={},
            folder=arguments.out,
            **result,
        )

    def link() -> dict:
        return {
            name: measure_bandwidth(name, nbytes=512 << 20, seconds=0.3).__dict__
            for name in ("host_to_device", "pageable_to_device", "device_copy")
        }

    parts = {
        "link": link,
        "one_layer": one_layer,
    }
    failed = 0
    for name in arguments.parts.split(","):
        start = time.perf_counter()
        try:
            part = parts[name]()
        except Exception:
            part = {**result.get(name, {}), "error": traceback.format_exc()}
            failed = 1
        part["seconds"] = time.perf_counter() - start
        save(part, name)
        print(f"{name}: {part['seconds']:.1f} s{' FAILED' if 'error' in part else ''}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
