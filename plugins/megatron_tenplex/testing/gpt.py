"""A small GPT job on Megatron-core: tests, examples, benchmarks and workloads train it in any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tenplex.dataset import DatasetProgress, ElasticBatchSampler
from megatron_tenplex.layout import GPTShape, ParallelConfig
from megatron_tenplex.reconfigure import TrainingState


@dataclass(frozen=True)
class GPTJob:
    """Model, data and optimizer of the job; a callable that builds it in a layout.

    Attributes:
        shape: of the model.
        seq_length, global_batch_size, micro_batch_size, num_samples: of the synthetic data.
        precision: ``"fp32"``, or ``"bf16"`` with fp32 masters.
        distributed_optimizer: shard optimizer state over data parallelism.
        sequence_parallel: in layouts with tp > 1.
        learning_rate: decays linearly over 1000 steps, so that a lost scheduler state shows.
        padded_vocab: pad the vocabulary to a multiple of 128 times tp, as Megatron does.
        initialize: draw initial weights; not needed where a change or a load writes all of them.
    """

    shape: GPTShape = field(default=GPTShape(4, 64, 4, 128))
    seq_length: int = 16
    global_batch_size: int = 8
    micro_batch_size: int = 1
    num_samples: int = 44
    precision: str = "fp32"
    distributed_optimizer: bool = True
    sequence_parallel: bool = False
    learning_rate: float = 1e-3
    dropout: float = 0.0
    bucket_size: int | None = None
    padded_vocab: bool = False
    initialize: bool = True

    def __call__(self, parallel: ParallelConfig) -> TrainingState:
        """Build model, optimizer and scheduler on Megatron's present groups."""
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        if parallel.vpp is not None and parallel.pp == 2:
            raise ValueError("vpp needs pp > 2: both neighbours of a stage would be the same rank")
        bf16 = self.precision == "bf16"
        model = self._wrapped([self._chunk(parallel, v) for v in range(parallel.vpp or 1)])
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=self.learning_rate,
                min_lr=0.0,
                weight_decay=0.1,
                bf16=bf16,
                params_dtype=torch.bfloat16 if bf16 else torch.float32,
                use_distributed_optimizer=self.distributed_optimizer,
                clip_grad=1.0,
            ),
            model,
            use_gloo_process_groups=False,
        )
        scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=self.learning_rate,
            min_lr=0.0,
            lr_warmup_steps=2,
            lr_decay_steps=1000,
            lr_decay_style="linear",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=1000,
            wd_incr_style="constant",
        )
        return TrainingState(model, optimizer, scheduler, DatasetProgress(0, 0, self.num_samples))

    def _chunk(self, parallel: ParallelConfig, stage: int) -> Any:
        from megatron.core import parallel_state
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        shape = self.shape
        vpp = None if parallel.vpp is None else stage
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=vpp is None, vp_stage=vpp)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=vpp is None, vp_stage=vpp)
        unit = 128 * parallel.tp
        vocab = -(-shape.vocab_size // unit) * unit if self.padded_vocab else shape.vocab_size
        config = self._config(parallel)
        layer = get_gpt_layer_local_spec(
            num_experts=shape.num_experts or None, moe_grouped_gemm=False, normalization=shape.norm
        )
        chunk = GPTModel(
            config,
            _with_sequence_parallel_norms(layer, config, vpp) if self.sequence_parallel else layer,
            vocab_size=vocab,
            max_sequence_length=self.seq_length,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="rope",
            vp_stage=vpp,
        )
        return chunk.cuda()

    def _config(self, parallel: ParallelConfig) -> Any:
        import torch.nn.functional as F
        from megatron.core.transformer.transformer_config import TransformerConfig

        shape, bf16 = self.shape, self.precision == "bf16"
        dtype = torch.bfloat16 if bf16 else torch.float32
        return TransformerConfig(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            num_attention_heads=shape.num_attention_heads,
            num_query_groups=shape.num_query_groups or shape.num_attention_heads,
            ffn_hidden_size=shape.ffn_hidden_size or 4 * shape.hidden_size,
            gated_linear_unit=shape.gated,
            activation_func=F.silu if shape.gated else F.gelu,
            add_bias_linear=shape.bias,
            normalization=shape.norm,
            num_moe_experts=shape.num_experts or None,
            moe_token_dispatcher_type="allgather",
            moe_router_topk=2,
            moe_router_load_balancing_type="none",
            tensor_model_parallel_size=parallel.tp,
            pipeline_model_parallel_size=parallel.pp,
            virtual_pipeline_model_parallel_size=parallel.vpp,
            context_parallel_size=parallel.cp,
            expert_model_parallel_size=parallel.ep,
            expert_tensor_parallel_size=parallel.etp or parallel.tp,
            sequence_parallel=self.sequence_parallel and parallel.tp > 1,
            pipeline_dtype=dtype,
            params_dtype=dtype,
            bf16=bf16,
            hidden_dropout=self.dropout,
            attention_dropout=self.dropout,
            perform_initialization=self.initialize,
            use_cpu_initialization=not torch.cuda.is_available(),
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            apply_rope_fusion=False,
            batch_p2p_comm=True,
            deallocate_pipeline_outputs=False,
        )

    def _wrapped(self, chunks: list[Any]) -> list[Any]:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.transformer.module import Float16Module

        config = DistributedDataParallelConfig(
            use_distributed_optimizer=self.distributed_optimizer,
            overlap_grad_reduce=self.bucket_size is not None,
            bucket_size=self.bucket_size,
            grad_reduce_in_fp32=True,
        )
        if self.precision == "bf16":
            chunks = [Float16Module(c.config, c) for c in chunks]
        return [
            DistributedDataParallel(c.config, config, c, disable_bucketing=i > 0 and self.bucket_size is None)
            for i, c in enumerate(chunks)
        ]

    # ----------------------------------------------------------------------------------------- training

    def step(self, state: TrainingState, parallel: ParallelConfig) -> tuple[float, float]:
        """One optimizer step on the next global batch; (mean loss, gradient norm), the same on all ranks."""
        from megatron.core import parallel_state
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.pipeline_parallel import get_forward_backward_func

        assert state.progress is not None
        dp, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        sampler = ElasticBatchSampler(
            self.num_samples,
            self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            dp_rank=rank,
            dp_size=dp,
            progress=state.progress,
        )
        count = self.global_batch_size // (self.micro_batch_size * dp)
        batches = [self._batch(indices) for indices, _ in zip(sampler, range(count), strict=False)]
        chunks: list[Any] = state.model
        for chunk in chunks:
            chunk.zero_grad_buffer()
            config = chunk.config
            config.grad_scale_func = state.optimizer.scale_loss
            config.finalize_model_grads_func = finalize_model_grads
        state.optimizer.zero_grad()
        losses: list[Tensor] = []
        iterators: list[Iterator[Any]] = [iter(batches) for _ in state.model]
        get_forward_backward_func()(
            forward_step_func=partial(_forward_step, losses),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=state.model if len(state.model) > 1 else state.model[0],
            num_microbatches=count,
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            forward_only=False,
        )
        _, norm, _ = state.optimizer.step()
        state.scheduler.step(increment=1)
        state.iteration += 1
        state.progress = DatasetProgress(
            state.progress.consumed_samples + self.global_batch_size, 0, self.num_samples
        )
        return self._mean_loss(losses), float(norm)

    def _mean_loss(self, losses: list[Tensor]) -> float:
        from megatron.core import parallel_state

        device = "cuda" if torch.cuda.is_available() else "cpu"
        total = torch.zeros(2, dtype=torch.float64, device=device)
        if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
            total[0], total[1] = torch.stack(losses).double().sum(), len(losses)
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def _batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Tokens and labels ``[micro_batch, seq_length]``; each sample counts up by its own stride."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        start = torch.tensor(indices)[:, None]
        positions = torch.arange(self.seq_length + 1)[None]
        tokens = (start * 7 + positions * (1 + start % 5)) % self.shape.vocab_size
        return tokens[:, :-1].contiguous().to(device), tokens[:, 1:].contiguous().to(device)


def _forward_step(
    losses: list[Tensor], data: Iterator[tuple[Tensor, Tensor]], model: Callable[..., Tensor]
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]:
    tokens, labels = next(data)
    length = tokens.shape[1]
    positions = torch.arange(length, device=tokens.device)[None].expand_as(tokens)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device).triu(1)
    output = model(tokens, positions, mask, labels=labels)

    def loss_of(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = output.float().mean()
        losses.append(loss.detach().clone())  # Megatron scales what it is given in place
        return loss, {"loss": losses[-1]}

    return output, loss_of


class SequenceParallelNorm:
    """A norm that marks its weights; Megatron's own in torch refuses sequence parallelism."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        """The torch norm that ``config.normalization`` names."""
        norm = getattr(torch.nn, config.normalization)(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def _with_sequence_parallel_norms(layer: Any, config: Any, stage: int | None) -> Any:
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = SequenceParallelNorm
    count = get_num_layers_to_build(config, stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=SequenceParallelNorm)
