"""Conversion of a model directory into a loading-optimised checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from vllm_serverless_loader.checkpoint.index import DEFAULT_CHUNK_BYTES, CheckpointKey
from vllm_serverless_loader.checkpoint.reader import model_digest, open_checkpoint
from vllm_serverless_loader.checkpoint.writer import copy_other_files, write_partition


def convert(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    layout: str = "vllm",
    tensor_parallel_size: int = 1,
    dtype: str = "auto",
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    engine_arguments: dict[str, Any] | None = None,
) -> Path:
    """Write the checkpoint of ``model`` into the directory ``out``.

    Args:
        model: directory with safetensors files.
        out: new directory; also gets the configuration and tokenizer files.
        layout: ``"full"``: names and shapes of the original, for any number of ranks, needs no vLLM.
            ``"vllm"``: the parameters of each vLLM rank before post-processing; fastest to load. vLLM is
            started once to make them.
        tensor_parallel_size: ranks of the ``"vllm"`` layout.
        dtype: vLLM's dtype of the ``"vllm"`` layout.
        chunk_bytes: bytes covered by one checksum (``"full"``).
        engine_arguments: further arguments of ``vllm.LLM``.

    Raises:
        ValueError: unknown layout, ``out`` is ``model``, no rank, or a number of ranks or a dtype with
            ``"full"``, which has neither.
        FileNotFoundError: no weights in ``model``.
        FileExistsError: ``out`` holds a checkpoint already.
        OSError: the disk is full; a new ``out`` is removed.
    """
    source, target = Path(model), Path(out)
    if layout not in ("full", "vllm"):
        raise ValueError(f"layout must be 'full' or 'vllm', got {layout!r}")
    if tensor_parallel_size < 1:
        raise ValueError(f"tensor_parallel_size must be at least 1, got {tensor_parallel_size}")
    if layout == "full" and tensor_parallel_size != 1:
        raise ValueError("layout 'full' serves any number of ranks; leave tensor_parallel_size at 1")
    if layout == "full" and dtype != "auto":
        raise ValueError("layout 'full' keeps the dtypes of the original; leave dtype at 'auto'")
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is the model itself; choose another directory for the checkpoint")
    if target.is_dir() and any(target.glob("partition-*.json")):
        raise FileExistsError(f"{target} holds a checkpoint already; remove it or choose another directory")
    is_new = not target.exists()
    with open_checkpoint(source) as checkpoint:
        try:
            if layout == "vllm":
                from vllm_serverless_loader.vllm_loader import convert_in_vllm

                convert_in_vllm(source, target, tensor_parallel_size, dtype, engine_arguments or {})
            else:
                key = CheckpointKey(layout="full", model=model_digest(source))
                write_partition(target, checkpoint.load().tensors, key=key, chunk_bytes=chunk_bytes)
                copy_other_files(source, target)
        except BaseException:
            if is_new:
                shutil.rmtree(target, ignore_errors=True)
            raise
    return target
