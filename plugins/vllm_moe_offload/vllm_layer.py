"""vLLM's RoutedExperts with its experts in slots. Every reference to vLLM's MoE internals is in this file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_moe_offload.cache import ExpertCache
from vllm_moe_offload.config import MoEOffloadConfig
from vllm_moe_offload.kernels import remap_expert_ids
from vllm_moe_offload.runtime import LayerHandle, ModelOffload

logger = logging.getLogger("vllm.moe_offload")

KEY = "moe_offload"
LOWEST_VLLM = "0.25.1"
_SUFFIX = ".moe_offload"
_MOE_OPS = ("vllm::moe_forward", "vllm::moe_forward_shared")


def probe() -> None:
    """Check that this vLLM has everything the plugin hooks into.

    Raises:
        ImportError: something is missing; the message names it and the lowest version that works.
    """
    try:
        from vllm.model_executor import custom_op
        from vllm.model_executor.layers.fused_moe import routed_experts
    except ImportError as error:
        raise ImportError(
            f"moe_offload needs vLLM {LOWEST_VLLM} or newer (pip install 'graft-plugins[vllm]'): {error}"
        ) from error
    wanted = {
        "vllm.model_executor.custom_op.PluggableLayer.register_oot": (
            getattr(custom_op, "PluggableLayer", None),
            "register_oot",
        ),
        "vllm.model_executor.layers.fused_moe.routed_experts.RoutedExperts.forward_modular": (
            getattr(routed_experts, "RoutedExperts", None),
            "forward_modular",
        ),
        "vllm.model_executor.layers.fused_moe.routed_experts.RoutedExperts._get_quant_method": (
            getattr(routed_experts, "RoutedExperts", None),
            "_get_quant_method",
        ),
    }
    for name, (owner, attribute) in wanted.items():
        if not hasattr(owner, attribute):
            raise ImportError(f"moe_offload: this vLLM has no {name}; vLLM {LOWEST_VLLM} or newer is needed")


def register() -> None:
    """Register the offloading layers with vLLM (entry point ``vllm.general_plugins``). Idempotent.

    They change nothing until an engine has ``additional_config["moe_offload"]``.
    """
    probe()
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    if is_registered():
        return
    if "RoutedExperts" in op_registry_oot:
        raise RuntimeError(
            f"moe_offload: another plugin replaces vLLM's RoutedExperts by {op_registry_oot['RoutedExperts']}"
        )
    _register_op()

    # vLLM looks replacements up by the class's own name, so every subclass needs one of its own, also those
    # that a model file defines later.
    def on_subclass(cls: type, **kwargs: Any) -> None:
        super(RoutedExperts, cls).__init_subclass__(**kwargs)
        _register_layer(cls)

    RoutedExperts.__init_subclass__ = classmethod(on_subclass)
    for cls in (RoutedExperts, *_subclasses(RoutedExperts)):
        _register_layer(cls)


def is_registered() -> bool:
    """Whether :func:`register` has run in this process."""
    from vllm.model_executor.custom_op import op_registry_oot

    return issubclass(op_registry_oot.get("RoutedExperts", object), _OffloadMixin)


def _subclasses(cls: type[Any]) -> Iterator[type]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _register_layer(cls: type) -> None:
    from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot

    if issubclass(cls, _OffloadMixin) or cls.__name__ in op_registry_oot:
        return
    offloaded = type(f"Offloaded{cls.__name__}", (_OffloadMixin, cls), {"_plain_class": cls})
    PluggableLayer.register_oot(offloaded, name=cls.__name__)


def _register_op() -> None:
    from vllm.utils.torch_utils import direct_register_custom_op

    if not hasattr(torch.ops.vllm, "moe_offload_apply"):
        direct_register_custom_op("moe_offload_apply", _apply_op, fake_impl=_apply_op_fake)


def _apply_op(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    from vllm.forward_context import get_forward_context

    return get_forward_context().no_compile_layers[layer_name].serve(x, topk_weights, topk_ids)


def _apply_op_fake(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x)


def options_of(vllm_config: Any) -> Mapping[str, object] | None:
    """The plugin's options in an engine's config, or None."""
    additional = vllm_config.additional_config
    return additional.get(KEY) if isinstance(additional, Mapping) else None


def offload_of(vllm_config: Any) -> ModelOffload | None:
    """The offload that an engine's layers announced themselves to in this process, or None."""
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if name.endswith(_SUFFIX):
            return layer.offload
    return None


def _refuse_unbuilt(options: Mapping[str, object]) -> None:
    """Raise NotImplementedError naming an option whose mechanism is not there yet."""
    built = {
        "prefetch": "none",
        "miss": "copy",
        "prefill": "waves",
        "host_memory": None,
        "disk_path": None,
    }
    for name, value in built.items():
        if options.get(name, value) not in (value, "auto"):
            raise NotImplementedError(
                f"moe_offload: option {name}={options[name]!r} is not built yet; leave it out"
            )


def _refuse_features(vllm_config: Any) -> None:
    """Raise NotImplementedError naming a configured feature that would break or bypass the offload."""
    parallel = vllm_config.parallel_config
    model = vllm_config.model_config
    found = {
        "expert parallelism (enable_expert_parallel)": parallel.enable_expert_parallel,
        "expert load balancing (enable_eplb)": parallel.enable_eplb,
        "elastic expert parallelism (enable_elastic_ep)": getattr(parallel, "enable_elastic_ep", False),
        "dual batch overlap (enable_dbo)": getattr(parallel, "enable_dbo", False),
        "LoRA (enable_lora)": vllm_config.lora_config is not None,
        "sleep mode (enable_sleep_mode)": getattr(model, "enable_sleep_mode", False),
    }
    for feature, enabled in found.items():
        if enabled:
            raise NotImplementedError(f"moe_offload does not work with {feature}; disable one of the two")
    offload = getattr(vllm_config, "offload_config", None)
    uva = getattr(offload, "uva", None)
    if uva is not None and uva.cpu_offload_gb > 0:
        raise NotImplementedError(
            "moe_offload does not work with cpu_offload_gb: both would move experts; disable one of the two"
        )


def _lower_graphs(vllm_config: Any) -> None:
    """Keep expert layers out of CUDA graphs: they decide on the host what to copy."""
    from vllm.config import CompilationMode, CUDAGraphMode

    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is None or mode == CUDAGraphMode.NONE:
        return
    piecewise = compilation.mode == CompilationMode.VLLM_COMPILE and compilation.splitting_ops
    if piecewise:
        compilation.splitting_ops += [op for op in _MOE_OPS if op not in compilation.splitting_ops]
    lowered = CUDAGraphMode.PIECEWISE if piecewise else CUDAGraphMode.NONE
    if mode != lowered:
        compilation.cudagraph_mode = lowered
        logger.info("moe_offload: CUDA graphs lowered from %s to %s", mode.name, lowered.name)


class _OffloadMixin:
    """Comes before a RoutedExperts class; becomes that class again where the engine has no options for us.

    The layer's expert Parameters keep their identity and get the slots as data. Each forward pass makes the
    experts that the router chose resident and runs vLLM's own kernel on ids remapped to slots.
    """

    _plain_class: type
    # Of RoutedExperts:
    quant_method: Any
    top_k: int
    layer_name: str
    local_num_experts: int
    global_num_experts: int
    named_parameters: Callable[..., Iterator[tuple[str, torch.nn.Parameter]]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from vllm.config import get_current_vllm_config

        vllm_config = get_current_vllm_config()
        options = options_of(vllm_config)
        if options is None:
            plain = self._plain_class
            self.__class__ = plain
            plain.__init__(self, *args, **kwargs)  # type: ignore[misc]
            return
        config = MoEOffloadConfig.from_dict(options)
        _refuse_unbuilt(options)
        _refuse_features(vllm_config)
        super().__init__(*args, **kwargs)
        self._refuse_monolithic()
        offload = offload_of(vllm_config)
        if offload is None:
            offload = _start_offload(vllm_config, config)
        self.offload = offload
        self._handle = offload.announce(
            LayerHandle(
                self.layer_name,
                self.local_num_experts,
                self.top_k,
                self._expert_tensors,
                self._replace_tensors,
            )
        )
        self._served_map: Tensor | None = None
        self._plain_shapes: dict[str, torch.Size] = {}
        self._op_name = self.layer_name + _SUFFIX
        vllm_config.compilation_config.static_forward_context[self._op_name] = self

    def _get_quant_method(self, *args: Any, **kwargs: Any) -> Any:
        method = super()._get_quant_method(*args, **kwargs)  # type: ignore[misc]
        create_weights = method.create_weights

        def create_on_host(*args: Any, **kwargs: Any) -> None:
            with torch.device("cpu"):
                create_weights(*args, **kwargs)

        method.create_weights = create_on_host
        return method

    @property
    def expert_map(self) -> Tensor | None:
        """What the kernel uses in place of vLLM's map: expert -> slot, or None where ids are remapped."""
        return self._served_map

    def forward_modular(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """As RoutedExperts.forward_modular; vLLM runs the shared experts itself (no all-to-all here)."""
        return torch.ops.vllm.moe_offload_apply(x, topk_weights, topk_ids, self._op_name)

    def serve(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Run the layer: experts into slots, then vLLM's kernel, in waves if they do not fit at once."""
        offload = self.offload
        offload.take_over()
        cache = offload.caches[self._handle.pool]
        if offload.step is None:
            # Profiling: the output is not used, only its cost counts.
            return self._apply(x, topk_weights, topk_ids % min(cache.num_slots, self.local_num_experts))
        rows = min(offload.step.num_tokens, topk_ids.shape[0])
        if rows < topk_ids.shape[0]:
            # Padding rows hold leftovers: they must not cause copies.
            topk_ids = topk_ids.clone()
            topk_ids[rows:] = topk_ids[0]
        chosen = topk_ids[:rows].cpu().numpy()
        layer = self._handle.index
        needed = np.unique(chosen)
        offload.before_layer(self._handle)
        if len(needed) <= cache.num_slots:
            with _resident(cache, layer, needed):
                output = self._run(x, topk_weights, topk_ids, cache.table_row(layer))
        elif self._has_tiles:
            output = self._run_expert_waves(x, topk_weights, topk_ids, needed, cache)
        else:
            output = self._run_token_waves(x, topk_weights, topk_ids, chosen, cache)
        offload.after_layer(self._handle, chosen)
        return output

    def _run(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, slot_of_expert: Tensor) -> Tensor:
        """vLLM's kernel on slots, by the path and with the tiles it would choose for the full weights."""
        if not self._has_tiles:
            return self._apply(x, topk_weights, remap_expert_ids(topk_ids, slot_of_expert).to(topk_ids.dtype))
        with self._plain_tiles(x):
            # The rule of vLLM's _prepare_expert_assignment for batches too small to be sorted by expert.
            if topk_ids.numel() * 4 <= self.global_num_experts:
                slots = remap_expert_ids(topk_ids, slot_of_expert).to(topk_ids.dtype)
                return self._apply(x, topk_weights, slots)
            return self._apply(x, topk_weights, topk_ids, slot_of_expert)

    def _run_token_waves(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        chosen: npt.NDArray[np.integer],
        cache: ExpertCache,
    ) -> Tensor:
        """Consecutive tokens whose experts fit together: exact where a token's result is its own affair."""
        layer = self._handle.index
        output = torch.empty_like(x)
        waves = list(token_waves(chosen, cache.num_slots))
        cache.counters.waves += len(waves) - 1
        for wave in waves:
            with _resident(cache, layer, np.unique(chosen[wave])):
                output[wave] = self._run(x[wave], topk_weights[wave], topk_ids[wave], cache.table_row(layer))
        return output

    def _run_expert_waves(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        needed: npt.NDArray[np.integer],
        cache: ExpertCache,
    ) -> Tensor:
        """All tokens, some experts at a time; the sum over a token's experts is taken once, at the end.

        The number of tokens, on which the kernel's tiles depend, stays that of the batch, and each missing
        expert is copied once.
        """
        layer = self._handle.index
        waves = expert_waves(needed, cache.resident(layer), cache.num_slots)
        cache.counters.waves += len(waves) - 1
        kernel = self._kernel
        reduce = kernel.moe_sum
        terms: Tensor | None = None
        slot_of_expert = torch.empty_like(cache.table_row(layer))

        def collect(part: Tensor, output: Tensor) -> None:
            nonlocal terms
            ours = (slot_of_expert[topk_ids.long()] >= 0).unsqueeze(-1)
            terms = part.clone() if terms is None else torch.where(ours, part, terms)
            reduce(terms, output)

        kernel.moe_sum = collect
        try:
            with self._plain_tiles(x):
                for wave in waves:
                    with _resident(cache, layer, wave):
                        slot_of_expert.fill_(-1)
                        index = torch.from_numpy(wave).to(slot_of_expert.device)
                        slot_of_expert[index] = cache.table_row(layer)[index]
                        output = self._apply(x, topk_weights, topk_ids, slot_of_expert)
        finally:
            del kernel.moe_sum
        return output

    def _apply(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, slot_of_expert: Tensor | None = None
    ) -> Tensor:
        self._served_map = slot_of_expert
        try:
            return self.quant_method.apply(
                layer=self,
                x=x,
                topk_weights=topk_weights,
                topk_ids=topk_ids,
                shared_experts=None,
                shared_experts_input=None,
            )
        finally:
            self._served_map = None

    @property
    def _kernel(self) -> Any:
        """vLLM's experts kernel, or None where this vLLM calls it without one (older CPU builds)."""
        return getattr(self.quant_method.moe_kernel, "fused_experts", None)

    @property
    def _has_tiles(self) -> bool:
        """Whether the kernel picks its tiles by the shape of the weights (vLLM's TritonExperts)."""
        return hasattr(self._kernel, "moe_sum")

    @contextmanager
    def _plain_tiles(self, x: Tensor) -> Iterator[None]:
        """Make vLLM's Triton kernel use the tiles it would pick if all experts were resident."""
        from vllm.model_executor.layers import fused_moe
        from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config

        previous = fused_moe.get_config()
        fused_moe._config = previous or try_get_optimal_moe_config(
            self._plain_shapes["w13_weight"],
            self._plain_shapes["w2_weight"],
            self.top_k,
            self._kernel.quant_config.config_name(x.dtype),
            x.shape[0],
            block_shape=self._kernel.block_shape,
        )
        try:
            yield
        finally:
            fused_moe._config = previous

    def _expert_tensors(self) -> dict[str, Tensor]:
        tensors = {
            name: parameter.data
            for name, parameter in self.named_parameters()
            if name not in _NOT_OF_EXPERTS
            and parameter.dim() > 0
            and parameter.shape[0] == self.local_num_experts
        }
        if not self._plain_shapes:
            self._refuse_kernel()
            self._plain_shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return tensors

    def _replace_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        # Kernels keep some of the Parameter objects: only their data may change.
        parameters = dict(self.named_parameters())
        for name, tensor in tensors.items():
            parameters[name].data = tensor

    def _refuse_kernel(self) -> None:
        # On a GPU the result may depend on tiles, which only the Triton kernel lets us hold fixed.
        if self.offload.device.type == "cuda" and not self._has_tiles:
            raise NotImplementedError(
                f"moe_offload: results on vLLM's kernel {type(self._kernel).__name__} would depend on the "
                "number of slots; choose --moe-backend triton"
            )

    def _refuse_monolithic(self) -> None:
        if self.quant_method.is_monolithic:
            raise NotImplementedError(
                f"moe_offload: the kernel of {type(self.quant_method).__name__} routes and computes in one "
                "call; choose a modular one with --moe-backend triton"
            )


# vLLM's RoutedExperts.get_expert_weights leaves out the same names: they are not per expert.
_NOT_OF_EXPERTS = frozenset(
    {"e_score_correction_bias", "w13_input_scale", "w2_input_scale", "hash_indices_table"}
)


def _start_offload(vllm_config: Any, config: MoEOffloadConfig) -> ModelOffload:
    from vllm_moe_offload import vllm_runner

    vllm_runner.install()
    _lower_graphs(vllm_config)
    device = torch.device(vllm_config.device_config.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    # vLLM's CPU kernels ignore the stride between experts.
    return ModelOffload(config, device, contiguous=device.type == "cpu")


@contextmanager
def _resident(cache: ExpertCache, layer: int, experts: npt.NDArray[np.integer]) -> Iterator[None]:
    cache.ensure(layer, experts)
    try:
        yield
    finally:
        cache.release(layer)


def token_waves(chosen: npt.NDArray[np.integer], num_slots: int) -> Iterator[slice]:
    """Split token rows into consecutive runs whose distinct experts fit into the slots.

    Args:
        chosen: ``[tokens, top_k]`` expert ids, ``top_k <= num_slots``.
        num_slots: slots.
    """
    start, union = 0, set[int]()
    for row, experts in enumerate(chosen.tolist()):
        grown = union.union(experts)
        if len(grown) > num_slots:
            yield slice(start, row)
            start, grown = row, set(experts)
        union = grown
    yield slice(start, len(chosen))


def expert_waves(
    needed: npt.NDArray[np.integer], resident: Sequence[int] | frozenset[int], num_slots: int
) -> list[npt.NDArray[np.integer]]:
    """Split the experts a layer needs into waves of at most ``num_slots``, residents first.

    Then no resident is evicted before it was used, so that each missing expert moves exactly once.
    """
    here = np.isin(needed, list(resident))
    order = np.concatenate([needed[here], needed[~here]])
    return [order[start : start + num_slots] for start in range(0, len(order), num_slots)]
