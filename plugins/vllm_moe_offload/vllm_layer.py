"""vLLM's RoutedExperts with its experts in slots. Every reference to vLLM's MoE internals is in this file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vllm_moe_offload.config import MoEOffloadConfig
from vllm_moe_offload.copy_serving import CopyServing
from vllm_moe_offload.direct import DirectCache
from vllm_moe_offload.live import LivePublisher, register_collector
from vllm_moe_offload.pools import LayerHandle
from vllm_moe_offload.predictor import GatePredictor
from vllm_moe_offload.runtime import ModelOffload

logger = logging.getLogger("vllm.moe_offload")

KEY = "moe_offload"
LOWEST_VLLM = "0.25.1"
_SUFFIX = ".moe_offload"


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
    register_collector()

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


def find_gates(model: torch.nn.Module) -> None:
    """Give each offloaded layer its gate, so that it can be predicted.

    vLLM's runner of a layer holds the gate, or the block around the runner has it as ``gate`` or ``router``.

    Raises:
        NotImplementedError: a layer's gate is in neither place.
    """
    modules = dict(model.named_modules())
    for name, layer in modules.items():
        if not isinstance(layer, _OffloadMixin):
            continue
        runner = modules[name.rpartition(".")[0]]
        block = modules[name.rpartition(".")[0].rpartition(".")[0]]
        places = ((runner, "gate"), (block, "gate"), (block, "router"))
        gates = [getattr(owner, attribute, None) for owner, attribute in places]
        gate = next((gate for gate in gates if isinstance(gate, torch.nn.Module)), None)
        if gate is None:
            raise NotImplementedError(
                f"moe_offload: prefetch='gate' looked for the gate of {name} as `gate` of its runner and as "
                f"`gate` or `router` of {type(block).__name__}, and found none; use prefetch='none'"
            )
        layer.look_ahead(gate)


def offload_of(vllm_config: Any) -> ModelOffload | None:
    """The offload that an engine's layers announced themselves to in this process, or None."""
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if name.endswith(_SUFFIX):
            return layer.offload
    return None


def _refuse_features(vllm_config: Any, *, direct: bool) -> None:
    """Raise NotImplementedError naming a configured feature that would break or bypass the offload.

    ``direct``: the device serves misses.
    """
    parallel = vllm_config.parallel_config
    model = vllm_config.model_config
    # vLLM's CPU kernel ignores the map of experts to ranks; the host's path serves one rank's ids only.
    split = parallel.enable_expert_parallel and parallel.tensor_parallel_size > 1 and not direct
    found = {
        "expert parallelism (enable_expert_parallel) unless a GPU serves misses (miss='direct')": split,
        # Ranks would exchange tokens behind the layer's back.
        "data parallelism (data_parallel_size)": parallel.data_parallel_size > 1,
        "prefill context parallelism (prefill_context_parallel_size)": getattr(
            parallel, "prefill_context_parallel_size", 1
        )
        > 1,
        "expert load balancing (enable_eplb)": parallel.enable_eplb,
        "elastic expert parallelism (enable_elastic_ep)": getattr(parallel, "enable_elastic_ep", False),
        "dual batch overlap (enable_dbo)": getattr(parallel, "enable_dbo", False),
        "LoRA (enable_lora)": vllm_config.lora_config is not None,
        "sleep mode (enable_sleep_mode)": getattr(model, "enable_sleep_mode", False),
        "weight reloading (weight_transfer_config)": getattr(vllm_config, "weight_transfer_config", None),
    }
    for feature, enabled in found.items():
        if enabled:
            raise NotImplementedError(f"moe_offload does not work with {feature}; disable one of the two")
    offload = getattr(vllm_config, "offload_config", None)
    for part, option in (("uva", "cpu_offload_gb"), ("prefetch", "offload_group_size")):
        if getattr(getattr(offload, part, None), option, 0) > 0:
            raise NotImplementedError(
                f"moe_offload does not work with {option}: both would move experts; disable one of the two"
            )


def _without_graphs(vllm_config: Any) -> None:
    """Turn CUDA graphs off: the host decides at each layer what to copy.

    Graphs cut at the expert layers would not do. vLLM replays a piece on the addresses of its capture, and an
    expert layer returns a new tensor, so that the next piece would read whatever lies where the old one was.
    """
    from vllm.config import CUDAGraphMode

    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is not None and mode != CUDAGraphMode.NONE:
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        logger.info(
            "moe_offload: miss='copy' needs the host at each layer; CUDA graphs (%s) are off", mode.name
        )


class _OffloadMixin(CopyServing):
    """Comes before a RoutedExperts class; becomes that class again where the engine has no options for us.

    The layer's expert Parameters keep their identity and get the slots as data. Each forward pass has the
    experts that the router chose made resident, by the device or by the host, and runs vLLM's own kernel on
    rows. Where all experts have a slot, the layer becomes vLLM's class as well, once they are loaded.
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
        _refuse_features(vllm_config, direct=_is_direct(vllm_config, config))
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
                self._become_plain,
                self._ranks_map(),
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
        """What the kernel uses in place of vLLM's map: expert -> row; vLLM's own where ids are remapped."""
        return super().expert_map if self._served_map is None else self._served_map  # type: ignore[misc]

    def _ranks_map(self) -> tuple[int, ...] | None:
        """Index of each of the model's experts on this rank, -1 elsewhere; None without such a split."""
        map_of_ranks = super().expert_map  # type: ignore[misc]
        return None if map_of_ranks is None else tuple(map_of_ranks.tolist())

    def forward_modular(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """As RoutedExperts.forward_modular; vLLM runs the shared experts itself (no all-to-all here)."""
        if self.offload.direct:
            return self._serve_direct(x, topk_weights, topk_ids)
        return torch.ops.vllm.moe_offload_apply(x, topk_weights, topk_ids, self._op_name)

    def _serve_direct(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Run the layer without the host: the device finds or fetches the experts."""
        cache = self.offload.caches[self._handle.pool]
        assert isinstance(cache, DirectCache)
        layer = self._handle.index
        # vLLM's _prepare_expert_assignment does not sort so small a batch by expert; with a map it does.
        small = topk_ids.numel() * 4 <= self.global_num_experts and self._handle.expert_map is None
        with self._plain_tiles(x):
            chosen = cache.serve(layer, topk_ids.contiguous(), remap=small)
            following = self._handle.following
            if following is None or following.predictor is None:
                return self._apply(x, topk_weights, chosen, None if small else cache.row_table(layer))
            # Held until the side stream is joined: freed earlier, its memory could go to the experts' kernel.
            named = following.predictor.predict(x)
            cache.foresee(following.index, named)
            output = self._apply(x, topk_weights, chosen, None if small else cache.row_table(layer))
            cache.join()
            return output

    def _apply(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, row_of_expert: Tensor | None = None
    ) -> Tensor:
        self._served_map = row_of_expert
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

    def look_ahead(self, gate: Callable[[Tensor], Any]) -> None:
        """Predict this layer's experts by its gate, a module of logits, on the layer before it."""

        def logits(hidden: Tensor) -> Tensor:
            found = gate(hidden)
            return found[0] if isinstance(found, tuple) else found

        bias = getattr(self, "e_score_correction_bias", None)
        self._handle.predictor = GatePredictor(logits, count=self.top_k, bias=bias)

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
            self._refuse_kernel(tensors)
            self._plain_shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return tensors

    def _replace_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        # Kernels keep some of the Parameter objects: only their data may change.
        parameters = dict(self.named_parameters())
        for name, tensor in tensors.items():
            parameters[name].data = tensor

    def _become_plain(self) -> None:
        """Leave the forward pass to vLLM's class, before it is compiled: no code of this one is in it."""
        self.__class__ = self._plain_class

    def _refuse_kernel(self, tensors: Mapping[str, Tensor]) -> None:
        if self.offload.device.type != "cuda":
            return
        # Vectors over the experts are read as if they were contiguous, which those of records are not.
        for name, tensor in tensors.items():
            if tensor.dim() == 1:
                raise NotImplementedError(
                    f"moe_offload: {name} has one number an expert, which vLLM's kernel cannot read from "
                    "slots; quantise by channel or block"
                )
        # The result may depend on tiles, which only the Triton kernel lets us hold fixed.
        if not self._has_tiles:
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


def _is_direct(vllm_config: Any, config: MoEOffloadConfig) -> bool:
    """Whether the device serves misses; NotImplementedError where it should and cannot."""
    kind = torch.device(vllm_config.device_config.device).type
    if config.miss == "direct" and kind != "cuda":
        raise NotImplementedError(
            f"moe_offload: miss='direct' has a GPU read host memory, but the model runs on {kind}; use 'copy'"
        )
    return kind == "cuda" and config.miss != "copy" and config.disk_path is None


def _start_offload(vllm_config: Any, config: MoEOffloadConfig) -> ModelOffload:
    from vllm_moe_offload import vllm_runner

    vllm_runner.install(vllm_config)
    device = torch.device(vllm_config.device_config.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    direct = _is_direct(vllm_config, config)
    if not direct:
        _without_graphs(vllm_config)
    parallel = vllm_config.parallel_config
    offload = ModelOffload(
        config,
        device,
        direct,
        vllm_config.scheduler_config.max_num_batched_tokens,
        vllm_config.model_config.model,
        parallel.rank % parallel.tensor_parallel_size,
        parallel.tensor_parallel_size,
    )
    offload.publisher = LivePublisher({"model": offload.model_id, "rank": offload.rank})
    return offload
