"""What a model weighs: parameters, bytes, matrix products and key/value cache, layer by layer.

Everything follows from the numbers in ``config.json``; the model's *name* is never looked at. The counts
equal those of the Hugging Face implementation of each family (parameters and persistent buffers, a tied
embedding once), which the tests check on the meta device.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moecap_eval.checkpoint import Group, GroupKey, check_groups, read_groups
from moecap_eval.model_families import Blueprint, LayerBlueprint, Weight, blueprint_of
from moecap_eval.quantisation import Quantisation

COMPONENTS = (
    "embedding",
    "attention",
    "norm",
    "router",
    "dense_ffn",
    "routed_experts",
    "shared_experts",
    "lm_head",
)

DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "fp8": 1, "float64": 8}
)


class Breakdown(Mapping[str, int]):
    """A read-only mapping from component to count, with its sum."""

    def __init__(self, parts: Mapping[str, int]) -> None:
        self._parts = dict(parts)

    def __getitem__(self, key: str) -> int:
        return self._parts[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        inner = ", ".join(f"{key}={value:,}" for key, value in self._parts.items() if value)
        return f"Breakdown({inner}; total={self.total:,})"

    @property
    def total(self) -> int:
        """Sum over all components."""
        return sum(self._parts.values())


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer.

    ``params`` and ``weight_bytes`` hold all experts; ``expert_params``, ``expert_bytes`` and
    ``expert_matmul`` are one routed expert's. ``matmul`` counts the elements of the matrices that every
    token passes through (routed experts excluded). ``pair_flops`` is the cost of one (query, key) pair,
    ``kv_elements`` the cached elements of one token, ``window`` the sliding window in tokens or None.
    """

    index: int
    params: Breakdown
    weight_bytes: Breakdown
    matmul: Breakdown
    num_experts: int
    top_k: int
    expert_params: int
    expert_bytes: int
    expert_matmul: int
    kv_elements: int
    kv_bytes: int
    pair_flops: int
    window: int | None


@dataclass(frozen=True)
class ModelSpec:
    """A model as the accounting sees it. Build it by ``from_config`` or ``from_checkpoint``."""

    model_type: str
    hidden_size: int
    vocab_size: int
    tied: bool
    layers: tuple[LayerSpec, ...]
    params: Breakdown
    weight_bytes: Breakdown
    weight_dtype: str
    kv_dtype: str
    embedding_row_bytes: int
    final_norm_bytes: int
    lm_head_bytes: int

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | str | Path,
        *,
        weight_dtype: str | None = None,
        kv_dtype: str | None = None,
    ) -> ModelSpec:
        """Derive the spec from a Hugging Face configuration.

        Args:
            config: the parsed ``config.json``, its path, or the model's folder.
            weight_dtype: dtype of unquantised weights, e.g. ``"bfloat16"``; default: the config's.
            kv_dtype: dtype of the key/value cache; default: ``weight_dtype``.

        Raises:
            ValueError: an unsupported ``model_type`` or quantisation, a missing key, an unknown dtype.
        """
        data = _read_config(config)
        dtype = _dtype_name(weight_dtype or data.get("dtype") or data.get("torch_dtype") or "bfloat16")
        blueprint = blueprint_of(data)
        return _assemble(blueprint, dtype, _dtype_name(kv_dtype or dtype), Quantisation.from_config(data))

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, kv_dtype: str | None = None) -> ModelSpec:
        """Derive the spec from a folder with ``config.json`` and safetensors files.

        Bytes come from the safetensors headers, so quantised weights count with their scales. The sum of
        the spec's bytes is the sum of the headers' bytes, next-token-prediction layers left aside.

        Raises:
            ValueError: tensors that the configuration does not explain, or that it needs and are absent.
        """
        folder = Path(path)
        data = _read_config(folder)
        blueprint = blueprint_of(data)
        dtype = _dtype_name(data.get("dtype") or data.get("torch_dtype") or "bfloat16")
        expected = _assemble(blueprint, dtype, _dtype_name(kv_dtype or dtype), None)
        return _with_header_bytes(expected, read_groups(folder, len(expected.layers)))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have routed experts."""
        return tuple(layer.index for layer in self.layers if layer.num_experts)

    @property
    def num_experts(self) -> int:
        """Routed experts of an MoE layer, 0 for a dense model."""
        return max((layer.num_experts for layer in self.layers), default=0)

    @property
    def top_k(self) -> int:
        """Routed experts per token, 0 for a dense model."""
        return max((layer.top_k for layer in self.layers), default=0)

    @property
    def kv_bytes_per_token(self) -> int:
        """Key/value cache bytes of one token over all layers."""
        return sum(layer.kv_bytes for layer in self.layers)


def _read_config(config: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    path = Path(config)
    if path.is_dir():
        path = path / "config.json"
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found: a model folder needs a config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def _dtype_name(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ValueError(f"unknown dtype {name!r} (known: {', '.join(sorted(DTYPE_BYTES))})")
    return name


def _weight_nbytes(weight: Weight, layer: int, dtype: str, quantisation: Quantisation | None) -> int:
    quantised = quantisation.nbytes(weight, layer) if quantisation else None
    if quantised is not None:
        return quantised
    return weight.elements * DTYPE_BYTES[weight.dtype or dtype]


def _sum_by_component(pairs: Iterator[tuple[str, int]]) -> dict[str, int]:
    sums = dict.fromkeys(COMPONENTS, 0)
    for component, value in pairs:
        sums[component] += value
    return sums


def _assemble_layer(
    index: int, layer: LayerBlueprint, dtype: str, kv_dtype: str, quantisation: Quantisation | None
) -> LayerSpec:
    nbytes = {weight.name: _weight_nbytes(weight, index, dtype, quantisation) for weight in layer.weights}
    experts = [weight for weight in layer.weights if weight.component == "routed_experts"]
    common = [weight for weight in layer.weights if weight.component != "routed_experts"]
    return LayerSpec(
        index=index,
        params=Breakdown(_sum_by_component((w.component, w.elements * w.copies) for w in layer.weights)),
        weight_bytes=Breakdown(
            _sum_by_component((w.component, nbytes[w.name] * w.copies) for w in layer.weights)
        ),
        matmul=Breakdown(_sum_by_component((w.component, w.elements) for w in common if w.matrix)),
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        expert_params=sum(weight.elements for weight in experts),
        expert_bytes=sum(nbytes[weight.name] for weight in experts),
        expert_matmul=sum(weight.elements for weight in experts if weight.matrix),
        kv_elements=layer.kv_elements,
        kv_bytes=layer.kv_elements * DTYPE_BYTES[kv_dtype],
        pair_flops=layer.pair_flops,
        window=layer.window,
    )


def _assemble(
    blueprint: Blueprint, dtype: str, kv_dtype: str, quantisation: Quantisation | None
) -> ModelSpec:
    layers = tuple(
        _assemble_layer(index, layer, dtype, kv_dtype, quantisation)
        for index, layer in enumerate(blueprint.layers)
    )
    table = blueprint.vocab_size * blueprint.hidden_size
    width = DTYPE_BYTES[dtype]
    return _with_totals(
        ModelSpec(
            model_type=blueprint.model_type,
            hidden_size=blueprint.hidden_size,
            vocab_size=blueprint.vocab_size,
            tied=blueprint.tied,
            layers=layers,
            params=Breakdown({}),
            weight_bytes=Breakdown({}),
            weight_dtype=dtype,
            kv_dtype=kv_dtype,
            embedding_row_bytes=blueprint.hidden_size * width,
            final_norm_bytes=blueprint.hidden_size * width,
            lm_head_bytes=table * width,
        )
    )


def _with_totals(spec: ModelSpec) -> ModelSpec:
    params = {key: sum(layer.params[key] for layer in spec.layers) for key in COMPONENTS}
    nbytes = {key: sum(layer.weight_bytes[key] for layer in spec.layers) for key in COMPONENTS}
    params["embedding"] = spec.vocab_size * spec.hidden_size
    params["norm"] += spec.hidden_size
    nbytes["embedding"] = spec.vocab_size * spec.embedding_row_bytes
    nbytes["norm"] += spec.final_norm_bytes
    if not spec.tied:
        params["lm_head"] = spec.vocab_size * spec.hidden_size
        nbytes["lm_head"] = spec.lm_head_bytes
    return replace(spec, params=Breakdown(params), weight_bytes=Breakdown(nbytes))


def _with_header_bytes(expected: ModelSpec, groups: dict[GroupKey, Group]) -> ModelSpec:
    wanted: dict[GroupKey, int] = {
        (layer.index, key): value for layer in expected.layers for key, value in layer.params.items() if value
    }
    wanted[None, "embedding"] = expected.vocab_size * expected.hidden_size
    wanted[None, "norm"] = expected.hidden_size
    # A tied head may be stored or not; one matrix is read either way.
    head = groups.pop((None, "lm_head"), None) if expected.tied else None
    if not expected.tied:
        wanted[None, "lm_head"] = expected.vocab_size * expected.hidden_size
    check_groups(wanted, groups)
    nbytes = {key: sum(size for _, _, size in group.values()) for key, group in groups.items()}

    layers = []
    for layer in expected.layers:
        parts = {key: nbytes.get((layer.index, key), 0) for key in COMPONENTS}
        expert_bytes = parts["routed_experts"] // layer.num_experts if layer.num_experts else 0
        layers.append(replace(layer, weight_bytes=Breakdown(parts), expert_bytes=expert_bytes))
    head_bytes = sum(size for _, _, size in head.values()) if head else nbytes[None, "embedding"]
    return _with_totals(
        replace(
            expected,
            layers=tuple(layers),
            embedding_row_bytes=nbytes[None, "embedding"] // expected.vocab_size,
            final_norm_bytes=nbytes[None, "norm"],
            lm_head_bytes=head_bytes if expected.tied else nbytes[None, "lm_head"],
        )
    )
