"""The collection of a GPT model in a given layout, computed without Megatron, GPUs or processes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from megatron_tenplex.ptc import Box, ParallelTensorCollection, Shard, TensorSpec

_PARAM_ALIGNMENT = 64  # elements; Megatron's buffers start each parameter at a multiple
_BUCKET_ALIGNMENT = 128


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism. ``dp=None`` fills all workers; ``etp=None`` means ``tp``."""

    tp: int = 1
    pp: int = 1
    dp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    vpp: int | None = None
    order: str = "tp-cp-ep-dp-pp"

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "cp", "ep", "etp", "vpp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.vpp is not None and self.pp == 1:
            raise ValueError("vpp needs pp > 1")

    @property
    def world_size(self) -> int:
        """Number of ranks; ``dp`` must be known."""
        if self.dp is None:
            raise ValueError("dp is not known: use resolve(num_workers)")
        return self.tp * self.pp * self.cp * self.dp

    def resolve(self, num_workers: int) -> ParallelConfig:
        """The layout with ``dp`` filled in, as large as fits."""
        block = self.tp * self.pp * self.cp
        if self.dp is None:
            if num_workers % block:
                raise ValueError(f"{num_workers} workers are not divisible by tp*pp*cp = {block}")
            return replace(self, dp=num_workers // block)
        if self.world_size > num_workers:
            raise ValueError(f"{self} needs {self.world_size} workers, there are {num_workers}")
        return self

    @classmethod
    def parse(cls, text: str) -> ParallelConfig:
        """``"tp=2,pp=2,dp=2"`` as a layout."""
        values: dict[str, Any] = {}
        known = [f.name for f in fields(cls) if f.name != "order"]
        for part in filter(None, (p.strip() for p in text.split(","))):
            name, _, value = part.partition("=")
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f", known: {', '.join(known)}"
                raise ValueError(f"unknown degree {name!r} in {text!r}{hint}")
            if not value.isdigit():
                raise ValueError(f"{name} in {text!r} must be a number")
            values[name] = int(value)
        return cls(**values)

    def __str__(self) -> str:
        shown = [f"{n}={getattr(self, n)}" for n in ("tp", "pp", "dp", "cp", "ep", "etp", "vpp")]
        return ",".join(s for s in shown if not s.endswith(("=None", "cp=1", "ep=1")))

    def coordinates(self, rank: int) -> dict[str, int]:
        """Index of ``rank`` along tp, cp, dp and pp in Megatron's order (experts have their own)."""
        sizes = {"tp": self.tp, "cp": self.cp, "dp": self.dp or 1, "pp": self.pp, "ep": 1}
        return _unravel(rank, self.order, sizes)

    def expert_coordinates(self, rank: int) -> dict[str, int]:
        """Index of ``rank`` along expert tp, ep, expert dp and pp."""
        etp = self.tp if self.etp is None else self.etp
        inner = etp * self.ep * self.pp
        if self.world_size % inner:
            raise ValueError(f"{self.world_size} ranks are not divisible by etp*ep*pp = {inner}")
        sizes = {"tp": etp, "cp": 1, "ep": self.ep, "dp": self.world_size // inner, "pp": self.pp}
        return _unravel(rank, self.order, sizes)


def _unravel(rank: int, order: str, sizes: dict[str, int]) -> dict[str, int]:
    found = {}
    for name in order.split("-"):
        found[name] = rank % sizes[name]
        rank //= sizes[name]
    return found


@dataclass(frozen=True)
class GPTShape:
    """What a GPT model's tensors depend on.

    Attributes:
        vocab_size: rows of the embedding; padding that depends on ``tp`` is no part of the collection.
        ffn_hidden_size: ``4 * hidden_size`` by default.
        num_query_groups: ``num_attention_heads`` by default.
        gated: the first MLP matrix holds gate and value (SwiGLU).
        tied: input embedding and output layer share their weight.
        bias: linear layers have biases.
        num_experts: 0 for a dense model; every layer's MLP is replicated so often otherwise.
        norm: RMSNorm has no bias.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    ffn_hidden_size: int | None = None
    num_query_groups: int | None = None
    gated: bool = False
    tied: bool = False
    bias: bool = True
    num_experts: int = 0
    norm: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(math.prod(shape) for _, shape, *_ in _global_tensors(self))


PRESETS: dict[str, GPTShape] = {
    "tiny": GPTShape(4, 64, 4, 128),
    "gpt3-xl": GPTShape(24, 2048, 16, 51200, tied=True),
    "gpt3-2.7b": GPTShape(32, 2560, 32, 51200, tied=True),
    "gpt3-6.7b": GPTShape(32, 4096, 32, 51200, tied=True),
    "gpt3-175b": GPTShape(96, 12288, 96, 51200, tied=True),
    "llama2-7b": GPTShape(32, 4096, 32, 32000, 11008, gated=True, bias=False, norm="RMSNorm"),
    "mixtral-8x7b": GPTShape(
        32, 4096, 32, 32000, 14336, 8, gated=True, bias=False, num_experts=8, norm="RMSNorm"
    ),
}


@dataclass(frozen=True)
class _Param:
    """A local parameter: key, boxes of its row-blocks, whether experts own it, elements of padding."""

    key: str
    boxes: tuple[Box, ...]
    expert: bool = False
    own_bucket: bool = False
    padding: int = 0

    @property
    def numel(self) -> int:
        return sum(box.numel for box in self.boxes) + self.padding


def _layer_tensors(shape: GPTShape) -> list[tuple[str, tuple[int, ...], int | None, bool, bool]]:
    """(key, shape of a layer's tensor, split axis, gated, expert) in Megatron's order of parameters."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    groups = shape.num_query_groups or heads
    qkv = hidden + 2 * groups * (hidden // heads)
    ffn = shape.ffn_hidden_size or 4 * hidden
    ffn_in = ffn * (2 if shape.gated else 1)
    layer = "decoder.layers."
    norm = ("weight", "bias") if shape.norm == "LayerNorm" else ("weight",)
    rows: list[tuple[str, tuple[int, ...], int | None, bool, bool]] = []

    def linear(
        name: str, out: int, into: int, axis: int, *, gated: bool = False, expert: bool = False
    ) -> None:
        rows.append((f"{layer}{name}.weight", (out, into), axis, gated, expert))
        if shape.bias:
            rows.append((f"{layer}{name}.bias", (out,), 0 if axis == 0 else None, gated, expert))

    before = f"{layer}self_attention.linear_qkv.layer_norm_"  # as Megatron saves it: part of the next layer
    rows += [(f"{before}{n}", (hidden,), None, False, False) for n in norm]
    linear("self_attention.linear_proj", hidden, hidden, 1)
    linear("self_attention.linear_qkv", qkv, hidden, 0)
    before = f"{layer}mlp.linear_fc1.layer_norm_"
    rows += [(f"{before}{n}", (hidden,), None, False, False) for n in norm]
    if shape.num_experts:
        rows.append((f"{layer}mlp.router.weight", (shape.num_experts, hidden), None, False, False))
        linear("mlp.experts.experts.linear_fc1", ffn_in, hidden, 0, gated=shape.gated, expert=True)
        linear("mlp.experts.experts.linear_fc2", hidden, ffn, 1, expert=True)
    else:
        linear("mlp.linear_fc1", ffn_in, hidden, 0, gated=shape.gated)
        linear("mlp.linear_fc2", hidden, ffn, 1)
    return rows


def _global_tensors(shape: GPTShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "embedding.word_embeddings.weight", (shape.vocab_size, shape.hidden_size)
    for key, size, _, _, expert in _layer_tensors(shape):
        yield key, (shape.num_layers, *((shape.num_experts,) if expert else ()), *size)
    for name in ("weight", "bias") if shape.norm == "LayerNorm" else ("weight",):
        yield f"decoder.final_layernorm.{name}", (shape.hidden_size,)
    if not shape.tied:
        yield "output_layer.weight", (shape.vocab_size, shape.hidden_size)


def check_shape(shape: GPTShape, parallel: ParallelConfig) -> None:
    """Refuse degrees that do not divide the model."""
    groups = shape.num_query_groups or shape.num_attention_heads
    stages = parallel.pp * (parallel.vpp or 1)
    ffn = shape.ffn_hidden_size or 4 * shape.hidden_size
    for what, size, degree in (
        ("query groups", groups, parallel.tp),
        ("attention heads", shape.num_attention_heads, parallel.tp),
        ("ffn_hidden_size", ffn, parallel.tp),
        ("layers", shape.num_layers, stages),
        ("experts", shape.num_experts, parallel.ep),
    ):
        if size % degree:
            raise ValueError(f"{size} {what} are not divisible by {degree} ({parallel})")
    if parallel.ep > 1 and not shape.num_experts:
        raise ValueError("ep > 1 needs a model with experts")


def _local_params(shape: GPTShape, parallel: ParallelConfig, rank: int) -> list[list[_Param]]:
    """Parameters of every virtual stage of ``rank`` in Megatron's order."""
    at, expert_at = parallel.coordinates(rank), parallel.expert_coordinates(rank)
    vpp = parallel.vpp or 1
    per_stage = shape.num_layers // (parallel.pp * vpp)
    etp = parallel.tp if parallel.etp is None else parallel.etp
    padded = -(-shape.vocab_size // (128 * parallel.tp)) * 128 * parallel.tp
    rows = padded // parallel.tp
    low = min(at["tp"] * rows, shape.vocab_size)
    vocab = Box((low, 0), (min((at["tp"] + 1) * rows, shape.vocab_size) - low, shape.hidden_size))
    layer_tensors = _layer_tensors(shape)
    padding = rows * shape.hidden_size - vocab.numel
    chunks = []
    for v in range(vpp):
        stage = v * parallel.pp + at["pp"]
        first, last = stage == 0, stage == parallel.pp * vpp - 1
        params = []
        if first:
            alone = shape.tied and parallel.pp > 1
            params.append(
                _Param("embedding.word_embeddings.weight", (vocab,), own_bucket=alone, padding=padding)
            )
        for layer in range(stage * per_stage, (stage + 1) * per_stage):
            for key, size, axis, gated, expert in layer_tensors:
                own_group = expert and parallel.ep > 1
                count = shape.num_experts // parallel.ep if expert else 1
                position = expert_at if expert else at
                degree = etp if expert else parallel.tp
                boxes = _slice(size, axis, position["tp"], degree, gated)
                for e in range(count):
                    lead = (layer, position["ep"] * count + e) if expert else (layer,)
                    ones = (1,) * len(lead)
                    params.append(
                        _Param(
                            key, tuple(Box((*lead, *b.offset), (*ones, *b.shape)) for b in boxes), own_group
                        )
                    )
        if last:
            for name in ("weight", "bias") if shape.norm == "LayerNorm" else ("weight",):
                whole = Box((0,), (shape.hidden_size,))
                params.append(_Param(f"decoder.final_layernorm.{name}", (whole,)))
            if not shape.tied:
                params.append(_Param("output_layer.weight", (vocab,), padding=padding))
            elif not first:
                params.append(
                    _Param("embedding.word_embeddings.weight", (vocab,), own_bucket=True, padding=padding)
                )
        chunks.append(params)
    return chunks


def _slice(size: tuple[int, ...], axis: int | None, index: int, degree: int, gated: bool) -> tuple[Box, ...]:
    """The boxes of slice ``index`` of ``degree``: two for a gated matrix, whose halves are split each."""
    if axis is None:
        return (Box((0,) * len(size), size),)
    parts = 2 if gated else 1
    width = size[axis] // (parts * degree)
    boxes = []
    for part in range(parts):
        offset = [0] * len(size)
        offset[axis] = part * (size[axis] // parts) + index * width
        boxes.append(Box(tuple(offset), (*size[:axis], width, *size[axis + 1 :])))
    return tuple(boxes)


def _buckets(params: list[_Param], dp: int, bucket_size: int | None) -> list[tuple[_Param, int, int, int]]:
    """(parameter, its start, bucket start, end) in Megatron's gradient buffer: reverse order, aligned."""
    divisor = math.lcm(dp, _BUCKET_ALIGNMENT)
    placed: list[tuple[_Param, int, int, int]] = []
    pending: list[tuple[_Param, int]] = []
    start = bucket_start = 0

    def close(end: int) -> int:
        end = -(-end // divisor) * divisor
        placed.extend((param, at, bucket_start, end) for param, at in pending)
        pending.clear()
        return end

    end = 0
    for param in reversed(params):
        start = -(-end // _PARAM_ALIGNMENT) * _PARAM_ALIGNMENT
        if param.own_bucket and pending:
            start = bucket_start = close(start)
        end = start + param.numel
        pending.append((param, start))
        if param.own_bucket or (bucket_size is not None and end - bucket_start >= bucket_size):
            end = bucket_start = close(end)
    if pending:
        close(end)
    return placed


def gpt_layout(
    shape: GPTShape,
    parallel: ParallelConfig,
    *,
    precision: Literal["fp32", "bf16"] = "bf16",
    bucket_size: int | None = None,
) -> ParallelTensorCollection:
    """The collection of model and distributed Adam optimizer of a Megatron GPT in layout ``parallel``.

    Assumes Megatron's order of parameters in its gradient buffer, one bucket unless ``bucket_size``
    (elements) is given. Keys: ``model.<key>``, ``optimizer.{param,exp_avg,exp_avg_sq}.<key>``; ``param``, the
    fp32 master, only with bf16 weights.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be fp32 or bf16, got {precision!r}")
    check_shape(shape, parallel)
    moments = ("exp_avg", "exp_avg_sq") if precision == "fp32" else ("param", "exp_avg", "exp_avg_sq")
    weight_dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    tensors: dict[str, TensorSpec] = {}
    for key, size in _global_tensors(shape):
        tensors[f"model.{key}"] = TensorSpec(size, weight_dtype)
        for name in moments:
            tensors[f"optimizer.{name}.{key}"] = TensorSpec(size, torch.float32)
    shards = []
    for rank in range(parallel.world_size):
        of_rank = []
        for params in _local_params(shape, parallel, rank):
            of_rank += [Shard(f"model.{p.key}", box) for p in params for box in p.boxes if box.numel]
            for expert in (False, True):
                group = [p for p in params if p.expert == expert]
                of_rank += _optimizer_shards(group, parallel, rank, expert, moments, bucket_size=bucket_size)
        shards.append(of_rank)
    return ParallelTensorCollection(tensors, shards)


def _optimizer_shards(
    params: list[_Param],
    parallel: ParallelConfig,
    rank: int,
    expert: bool,
    moments: tuple[str, ...],
    *,
    bucket_size: int | None,
) -> Iterator[Shard]:
    if expert:
        etp = parallel.tp if parallel.etp is None else parallel.etp
        index = parallel.expert_coordinates(rank)["dp"]
        size = parallel.world_size // (etp * parallel.ep * parallel.pp)
    else:
        at = parallel.coordinates(rank)
        index, size = at["dp"] * parallel.cp + at["cp"], (parallel.dp or 1) * parallel.cp
    for param, start, bucket_start, bucket_end in _buckets(params, size, bucket_size):
        share = (bucket_end - bucket_start) // size
        low, high = bucket_start + index * share, bucket_start + (index + 1) * share
        at_box = start
        for box in param.boxes:
            flat = (max(low - at_box, 0), min(high - at_box, box.numel))
            at_box += box.numel
            if flat[0] < flat[1]:
                for name in moments:
                    yield Shard(f"optimizer.{name}.{param.key}", box, flat)
