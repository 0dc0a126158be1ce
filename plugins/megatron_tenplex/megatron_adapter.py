"""The only module that knows Megatron-core: what a rank holds, and how its small state is read and written.

Works around three faults of ``DistributedOptimizer`` without TransformerEngine or Apex (0.16.1): it asserts
when asked for its state before the first step, it fails with ``KeyError: 'step'`` on a fully reshardable
load, and after a load all parameters share one ``step`` tensor, which AdamW then counts once per parameter.
So we never go through its state dicts: missing Adam state is made here, tensors are written in place, and
every parameter gets a ``step`` of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_tenplex.layout import ParallelConfig
from megatron_tenplex.membership import World, gather_layout
from megatron_tenplex.ptc import Box, ParallelTensorCollection, Shard, TensorSpec

try:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.utils import unwrap_model
except ImportError as error:
    raise ImportError(
        f"megatron_tenplex needs megatron-core >= 0.16 (pip install graft-plugins[megatron]): {error}"
    ) from error

_GROUP_KEYS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
_NO_OPTIONS = {"params", *_GROUP_KEYS, *(f"pre_{key}" for key in _GROUP_KEYS)}
_MOMENTS = ("exp_avg", "exp_avg_sq")
_TRAINING_GROUPS = (
    "_TENSOR_MODEL_PARALLEL_GROUP",
    "_PIPELINE_MODEL_PARALLEL_GROUP",
    "_MODEL_PARALLEL_GROUP",
    "_DATA_PARALLEL_GROUP_WITH_CP",
    "_EMBEDDING_GROUP",
    "_EXPERT_MODEL_PARALLEL_GROUP",
    "_EXPERT_DATA_PARALLEL_GROUP",
)
_PADDED = ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")


@dataclass
class LocalState:
    """What one rank holds.

    Attributes:
        tensors: key -> global shape and dtype.
        shards: shard -> view of the live tensor; writing to it changes model or optimizer.
        padding: views of vocabulary rows that exist only to make the vocabulary divisible.
    """

    tensors: dict[str, TensorSpec]
    shards: dict[Shard, Tensor]
    padding: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(tensor.nbytes for tensor in self.shards.values())


@dataclass(frozen=True)
class _Part:
    """A box of a global tensor that is a contiguous range of a local parameter."""

    key: str
    box: Box
    spec: TensorSpec
    data: Tensor


def check_supported() -> None:
    """Raise ImportError naming what this version of megatron-core lacks."""
    from megatron.core import package_info

    for owner, name in (
        (DistributedOptimizer, "_get_model_param_range_map"),
        (parallel_state, "initialize_model_parallel"),
        (parallel_state, "_GLOBAL_MEMORY_BUFFER"),
        (tensor_parallel, "model_parallel_cuda_manual_seed"),
    ):
        if not hasattr(owner, name):
            raise ImportError(
                f"megatron-core {package_info.__version__} is not supported (0.16 is): "
                f"{getattr(owner, '__name__', owner)}.{name} is missing"
            )


def initialize_parallel(parallel: ParallelConfig, timeout: float) -> None:
    """Build Megatron's groups on the default group."""
    parallel_state.initialize_model_parallel(
        parallel.tp,
        parallel.pp,
        parallel.vpp,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        order=parallel.order,
        distributed_timeout_minutes=timeout / 60,
        create_gloo_process_groups=False,
    )


def training_groups() -> list[Any]:
    """The groups of this rank that a step uses; Megatron makes many more, which never connect."""
    found = (getattr(parallel_state, name, None) for name in _TRAINING_GROUPS)
    return [group for group in found if isinstance(group, torch.distributed.ProcessGroup)]


def put_parallel_aside() -> dict[str, Any]:
    """Take Megatron's groups and degrees out of its globals, without destroying anything."""
    state = {name: value for name, value in vars(parallel_state).items() if _is_parallel_state(name)}
    for name, value in state.items():
        setattr(parallel_state, name, {} if isinstance(value, dict) else None)
    scratch = state["_GLOBAL_MEMORY_BUFFER"]
    if scratch is not None:
        scratch.buffer.clear()
    return state


def _is_parallel_state(name: str) -> bool:
    return (name.startswith("_") and name.isupper()) or name == "_global_process_group_list"


def take_parallel_up(state: Mapping[str, Any]) -> None:
    """Write back what :func:`put_parallel_aside` took."""
    for name, value in state.items():
        setattr(parallel_state, name, value)


def release(model: Sequence[nn.Module], optimizer: Any) -> None:
    """Let a model and its optimizer be freed; they can train no longer.

    Both are part of cycles that Python cannot see: gradient accumulators hold parameters and the hooks of
    DDP, and in fp32 the optimizer's parameters are views with such an accumulator in their history. Methods
    with a cache (rotary embeddings) keep the module they were called on, and so its process group.
    """
    for chunk in model:
        getattr(chunk, "grad_accs", []).clear()
        for kind in {type(module) for module in chunk.modules()}:
            for method in vars(kind).values():
                getattr(method, "cache_clear", int)()
    for inner in _inner_optimizers(optimizer):
        for name in ("shard_fp32_groups", "shard_float16_groups", "shard_fp32_from_float16_groups"):
            getattr(inner, name, []).clear()
        for group in inner.optimizer.param_groups:
            group["params"].clear()
        inner.optimizer.state.clear()


def seed_everything(seed: int, *, data_parallel_random_init: bool = False) -> None:
    """Megatron's formula: seed + 100 * pipeline rank (+ 10 * data-parallel rank), and its CUDA streams."""
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    if data_parallel_random_init:
        seed += 10 * parallel_state.get_data_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def describe(model: Sequence[nn.Module], optimizer: Any, *, vocab_size: int | None = None) -> LocalState:
    """Shards of this rank, as views of the live tensors.

    Args:
        model: the (wrapped) model chunks of this rank.
        optimizer: Megatron's optimizer over them, or None for weights alone. Adam state that does not exist
            yet is made, as zeros.
        vocab_size: rows of the vocabulary that are real; rows behind them are padding and are not described.

    Raises:
        TypeError: the optimizer is of an unknown kind.
        ValueError: a sharded tensor is no contiguous part of a parameter.
    """
    state = LocalState({}, {}, [])
    parts_of: dict[int, list[_Part]] = {}
    params = _parameters(model)
    for part in _model_parts(model, vocab_size, state.padding):
        _add(state, part.spec, Shard(f"model.{part.key}", part.box), part.data)
        owner = _owner(params, part)
        if owner is not None:
            parts_of.setdefault(id(owner), []).append(part)
    for inner in _inner_optimizers(optimizer):
        for param, low, high, tensors in _optimizer_ranges(inner):
            for part in parts_of.get(id(param), ()):
                _add_optimizer_part(state, param, part, (low, high), tensors)
    return state


def _parameters(model: Sequence[nn.Module]) -> list[tuple[int, int, nn.Parameter]]:
    return sorted(
        (p.data_ptr(), p.data_ptr() + p.nbytes, p)
        for chunk in model
        for p in dict.fromkeys(chunk.parameters())
        if p.numel()
    )


def _owner(params: list[tuple[int, int, nn.Parameter]], part: _Part) -> nn.Parameter | None:
    at = part.data.data_ptr()
    for low, high, param in params:
        if low <= at < high:
            return param
    return None


def _model_parts(
    model: Sequence[nn.Module], vocab_size: int | None, padding: list[Tensor]
) -> Iterator[_Part]:
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    for chunk in model:
        described = unwrap_model(chunk).sharded_state_dict(metadata=metadata)
        for entry in _sharded(nested_values(described)):
            key, data = entry.key, entry.data.detach()
            if not data.is_contiguous():
                raise ValueError(f"{key}: a part of a tensor that is not contiguous cannot be described")
            shape = tuple(entry.global_shape)
            box = Box(tuple(entry.global_offset), (1,) * entry.prepend_axis_num + tuple(entry.local_shape))
            if vocab_size is not None and key in _PADDED:
                rows = min(max(vocab_size - box.offset[0], 0), box.shape[0])
                if rows < box.shape[0]:
                    padding.append(data[rows:])
                shape = (vocab_size, *shape[1:])
                box = Box((min(box.offset[0], vocab_size), *box.offset[1:]), (rows, *box.shape[1:]))
                data = data[:rows]
            if box.numel:
                yield _Part(key, box, TensorSpec(shape, data.dtype), data.view(box.shape))


def _sharded(values: Iterable[Any]) -> Iterator[ShardedTensor]:
    for value in values:
        if isinstance(value, ShardedTensorFactory):
            yield from _sharded(nested_values(value.build()))
        elif isinstance(value, ShardedTensor):
            yield value
        elif isinstance(value, ShardedObject) and _has_content(value.data):
            raise ValueError(
                f"{value.key} is state that is no tensor (TransformerEngine's FP8?); not supported"
            )


def _has_content(data: Any) -> bool:
    if data is None:
        return False
    position = getattr(data, "getbuffer", None)
    return bool(len(position())) if position else getattr(data, "numel", lambda: 1)() > 0


def _add(state: LocalState, spec: TensorSpec, shard: Shard, data: Tensor) -> None:
    known = state.tensors.setdefault(shard.key, spec)
    if known != spec:
        raise ValueError(f"global shape of {shard.key} differs: {known.shape} -> {spec.shape}")
    state.shards[shard] = data


def _add_optimizer_part(
    state: LocalState,
    param: nn.Parameter,
    part: _Part,
    owned: tuple[int, int],
    tensors: Mapping[str, Tensor],
) -> None:
    """Add the intersection of a range of ``param``, which ``tensors`` belong to, with ``part``."""
    low, high = owned
    first = (part.data.data_ptr() - param.data_ptr()) // param.element_size()
    flat = (max(low - first, 0), min(high - first, part.box.numel))
    if flat[0] >= flat[1]:
        return
    start = first + flat[0] - low
    for name, tensor in tensors.items():
        key = f"optimizer.{name}.{part.key}"
        spec = TensorSpec(part.spec.shape, tensor.dtype)
        piece = tensor.view(-1)[start : start + flat[1] - flat[0]]
        _add(state, spec, Shard(key, part.box, flat), piece)


def _inner_optimizers(optimizer: Any) -> list[Any]:
    if optimizer is None:
        return []
    return [c for c in getattr(optimizer, "chained_optimizers", [optimizer]) if not _is_stub(c)]


def _is_stub(optimizer: Any) -> bool:
    return getattr(optimizer, "is_stub_optimizer", False) or optimizer.optimizer is None


def _optimizer_ranges(optimizer: Any) -> Iterator[tuple[nn.Parameter, int, int, dict[str, Tensor]]]:
    """(model parameter, first and last element, tensors by name) of everything the optimizer updates."""
    if isinstance(optimizer, DistributedOptimizer):
        for param in optimizer.model_param_gbuf_map:
            owned = optimizer._get_model_param_range_map(param)["param"]
            group, order = optimizer.model_param_group_index_map[param]
            main = optimizer.optimizer.param_groups[group]["params"][order]
            yield param, owned.start, owned.end, _adam_tensors(optimizer, param, main)
    elif isinstance(optimizer, MegatronOptimizer):
        masters = {
            id(model): main
            for models, mains in zip(
                getattr(optimizer, "float16_groups", ()),
                getattr(optimizer, "fp32_from_float16_groups", ()),
                strict=True,
            )
            for model, main in zip(models, mains, strict=True)
        }
        for param in _trained(optimizer):
            yield param, 0, param.numel(), _adam_tensors(optimizer, param, masters.get(id(param), param))
    else:
        raise TypeError(
            f"optimizer {type(optimizer).__name__} is not supported; use Megatron's Adam optimizers"
        )


def _trained(optimizer: Any) -> list[nn.Parameter]:
    """Model parameters of an optimizer that is not distributed."""
    if hasattr(optimizer, "float16_groups"):
        groups = [*optimizer.float16_groups, *optimizer.fp32_from_fp32_groups]
        return [p for group in groups for p in group]
    return [p for group in optimizer.optimizer.param_groups for p in group["params"]]


def _adam_tensors(optimizer: Any, param: nn.Parameter, main: Tensor) -> dict[str, Tensor]:
    """Moments of ``main``, made where they are missing, and ``main`` itself unless it is the weight."""
    state = optimizer.optimizer.state[main]
    for name in _MOMENTS:
        if name not in state:
            state[name] = torch.zeros_like(main, requires_grad=False)
    if _steps_by_param(optimizer):
        state.setdefault("step", torch.tensor(0.0))
    tensors = {name: state[name] for name in _MOMENTS}
    if main.dtype != param.dtype:
        tensors["param"] = main.detach()
    return tensors


def _steps_by_param(optimizer: Any) -> bool:
    """torch's Adam counts steps by parameter; the fused ones of TransformerEngine and Apex by group."""
    return isinstance(optimizer.optimizer, torch.optim.Optimizer) and type(
        optimizer.optimizer
    ).__module__.startswith("torch.optim")


def gather(local: LocalState | None, world: World) -> ParallelTensorCollection:
    """What every worker holds, by worker; nothing for one without a role. Collective."""
    tensors, shards = ({}, []) if local is None else (local.tensors, list(local.shards))
    return gather_layout(tensors, shards, world)


# ---------------------------------------------------------------------------------------------- small state


def capture_common(optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """State that is not sharded, as JSON values: parameter groups, step, LR scheduler, loss scale."""
    groups = []
    for inner in _inner_optimizers(optimizer):
        step = 0.0
        if _steps_by_param(inner):
            steps = {float(s["step"]) for s in inner.optimizer.state.values() if "step" in s}
            step = max(steps, default=0.0)
        for group in inner.optimizer.param_groups:
            options = {k: v for k, v in group.items() if k not in _NO_OPTIONS and _is_json(v)}
            groups.append({"identity": _identity(group), "options": options, "step": step})
    scaler = getattr(optimizer, "grad_scaler", None) if optimizer is not None else None
    return {
        "groups": groups,
        "scheduler": scheduler.state_dict() if scheduler is not None else None,
        "grad_scaler": _tensors_to_lists(scaler.state_dict()) if scaler is not None else None,
        "microbatches": _microbatch_state(),
    }


def merge_common(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state for all: the first that is there, with the parameter groups of all stages."""
    present = [state for state in states if state]
    if not present:
        raise ValueError("no worker holds the training state")
    groups: dict[str, Any] = {}
    for state in present:
        for group in state["groups"]:
            known = groups.setdefault(repr(group["identity"]), group)
            known["step"] = max(known["step"], group["step"])
    return {**present[0], "groups": list(groups.values())}


def apply_common(optimizer: Any, scheduler: Any, common: Mapping[str, Any]) -> None:
    """Write what :func:`capture_common` read; every parameter gets its own step counter."""
    groups = {repr(group["identity"]): group for group in common["groups"]}
    # With ep = 1 Megatron counts experts among the dense parameters: their groups differ only in that.
    similar = {repr(_without_expert(group["identity"])): group for group in common["groups"]}
    for inner in _inner_optimizers(optimizer):
        for group in inner.optimizer.param_groups:
            identity = _identity(group)
            saved = groups.get(repr(identity)) or similar.get(repr(_without_expert(identity)))
            if saved is None:
                raise ValueError(f"the old layout has no parameter group {identity}")
            for name, value in saved["options"].items():
                group[name] = tuple(value) if isinstance(value, list) else value
            if _steps_by_param(inner):
                for main in group["params"]:
                    inner.optimizer.state[main]["step"] = torch.tensor(saved["step"])
    if scheduler is not None and common["scheduler"] is not None:
        scheduler.load_state_dict(common["scheduler"])
    scaler = getattr(optimizer, "grad_scaler", None) if optimizer is not None else None
    if scaler is not None and common["grad_scaler"] is not None:
        device = scaler._scale.device
        scaler.load_state_dict(
            {
                k: torch.tensor(v, device=device) if isinstance(v, list) else v
                for k, v in common["grad_scaler"].items()
            }
        )


def _identity(group: Mapping[str, Any]) -> list[Any]:
    return [group.get(key, group.get(f"pre_{key}")) for key in _GROUP_KEYS]


def _without_expert(identity: Sequence[Any]) -> list[Any]:
    return [v for key, v in zip(_GROUP_KEYS, identity, strict=True) if key != "is_expert_parallel"]


def _is_json(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_json(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _tensors_to_lists(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in state.items()}


def _microbatch_state() -> dict[str, Any] | None:
    from megatron.core import num_microbatches_calculator as calculator

    current = calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR
    if current is None:
        return None
    return {
        "global_batch_size": calculator.get_current_global_batch_size(),
        "micro_batch_size": calculator.get_micro_batch_size(),
    }


def reconfigure_microbatches(common: Mapping[str, Any], role: int, data_parallel_size: int) -> None:
    """Give Megatron's global calculator, where there is one, the new data-parallel size."""
    saved = common["microbatches"]
    if saved is None:
        return
    from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator

    reconfigure_num_microbatches_calculator(
        role, None, saved["global_batch_size"], saved["micro_batch_size"], data_parallel_size, False
    )


def capture_rng() -> dict[str, Any]:
    """Random streams of this rank, as JSON values (bytes as hexadecimal text)."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        "torch": _hex(torch.get_rng_state()),
        "cuda": _hex(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
        "tracker": {name: _hex(state) for name, state in tracker.items()},
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Continue the streams of :func:`capture_rng`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_unhex(state["torch"]))
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(_unhex(state["cuda"]))
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.set_states({name: _unhex(text) for name, text in state["tracker"].items()})


def _hex(state: Tensor) -> str:
    return bytes(state.cpu().numpy()).hex()


def _unhex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def rng_is_kept(old: ParallelConfig, new: ParallelConfig) -> bool:
    """Whether roles mean the same in both layouts, up to the number of data-parallel replicas."""
    return replace(old, dp=1) == replace(new, dp=1)
