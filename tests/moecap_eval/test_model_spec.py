"""ModelSpec against Hugging Face models on the meta device and against saved checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moecap_eval.model_spec import Breakdown, ModelSpec

sys.path.insert(0, str(Path(__file__).parent))
import tiny_configs as tiny

QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "vocab_size": 151936,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "vocab_size": 32000,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 14336,
}


def stored_elements(model: torch.nn.Module) -> int:
    """Distinct parameters plus persistent buffers."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_cap03_parameters_equal_the_meta_model(family: str, seed: int) -> None:
    config = tiny.random_config(family, seed)
    expected = stored_elements(tiny.build_model(config, "meta"))
    spec = ModelSpec.from_config(config.to_dict())
    assert spec.params.total == expected
    assert sum(spec.params.values()) == spec.params.total


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_cap03_components_equal_named_parameters(family: str) -> None:
    config = tiny.random_config(family, 11, tie_word_embeddings=False)
    model = tiny.build_model(config, "meta")
    tensors = model.state_dict(keep_vars=True)

    def named(*words: str) -> int:
        return sum(value.numel() for name, value in tensors.items() if any(word in name for word in words))

    spec = ModelSpec.from_config(config.to_dict())
    assert spec.params["embedding"] == named("embed_tokens")
    assert spec.params["lm_head"] == named("lm_head")
    assert spec.params["norm"] == named("norm.")
    assert spec.params["routed_experts"] == named(".experts.")
    assert spec.params["shared_experts"] == named("shared_experts.", "shared_expert.")
    assert spec.params["router"] == named("mlp.gate.", "router.", "shared_expert_gate")
    assert spec.params["attention"] == named("self_attn.") - named("q_norm", "k_norm", "a_layernorm")


def test_cap03_reference_models() -> None:
    qwen, mixtral = ModelSpec.from_config(QWEN3_30B), ModelSpec.from_config(MIXTRAL_8X7B)
    assert (qwen.params.total, qwen.kv_bytes_per_token) == (30_532_122_624, 98_304)
    assert (mixtral.params.total, mixtral.kv_bytes_per_token) == (46_702_792_704, 131_072)
    assert (qwen.top_k, qwen.num_experts, len(qwen.moe_layers)) == (8, 128, 48)


def test_cap03_sliding_windows_follow_the_configuration() -> None:
    alternating = ModelSpec.from_config(tiny.random_config("gpt_oss", 0, num_hidden_layers=3).to_dict())
    assert [layer.window for layer in alternating.layers] == [4, None, 4]
    mixtral = ModelSpec.from_config({**MIXTRAL_8X7B, "sliding_window": 4096})
    assert {layer.window for layer in mixtral.layers} == {4096}
    off = ModelSpec.from_config({**QWEN3_30B, "sliding_window": 4096, "use_sliding_window": False})
    assert {layer.window for layer in off.layers} == {None}


def test_cap03_fp8_blocks_equal_the_transformers_layer() -> None:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    config = {
        **MIXTRAL_8X7B,
        "model_type": "llama",
        "hidden_size": 320,
        "intermediate_size": 704,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "num_hidden_layers": 1,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    spec = ModelSpec.from_config(config)
    with torch.device("meta"):
        modules = [
            FP8Linear(320, 704, (128, 128)),
            FP8Linear(320, 704, (128, 128)),
            FP8Linear(704, 320, (128, 128)),
        ]
    expected = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    assert spec.layers[0].weight_bytes["dense_ffn"] == expected


def test_cap03_mxfp4_experts_equal_the_transformers_layer() -> None:
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    config = tiny.random_config("gpt_oss", 3, hidden_size=64, intermediate_size=32)
    options = config.to_dict()
    options["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    layer = ModelSpec.from_config(options, weight_dtype="bfloat16").layers[0]
    with torch.device("meta"):
        module = Mxfp4GptOssExperts(config)
    blocks = sum(p.numel() for name, p in module.named_parameters() if "bias" not in name)
    biases = sum(p.numel() for name, p in module.named_parameters() if "bias" in name)
    scales = blocks // 16  # one byte for 32 elements, which take 16 bytes
    assert layer.weight_bytes["routed_experts"] == blocks + scales + 2 * biases
    assert layer.weight_bytes["attention"] == 2 * layer.params["attention"]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_cap03_four_bit_groups_equal_the_stored_layout(method: str) -> None:
    """As AutoGPTQ and AutoAWQ store them: packed weights, zeros, scales and, for GPTQ, a group index."""
    options = {
        **QWEN3_30B,
        "num_hidden_layers": 1,
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "num_experts": 4,
        "quantization_config": {"quant_method": method, "bits": 4, "group_size": 64},
    }
    layer = ModelSpec.from_config(options).layers[0]

    def stored(inputs: int, outputs: int) -> int:
        packed, zeros = inputs * outputs // 8, (inputs // 64) * (outputs // 8)
        tensors = {torch.int32: packed + zeros, torch.float16: (inputs // 64) * outputs}
        if method == "gptq":
            tensors[torch.int32] += inputs
        return sum(dtype.itemsize * count for dtype, count in tensors.items())

    assert layer.expert_bytes == 2 * stored(256, 128) + stored(128, 256)
    assert layer.weight_bytes["router"] == 2 * layer.params["router"]
    assert layer.weight_bytes["norm"] == 2 * layer.params["norm"]


def test_cap03_modules_left_out_of_quantisation_keep_their_dtype() -> None:
    quantised = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.self_attn"]}
    options = {**QWEN3_30B, "num_hidden_layers": 2, "quantization_config": quantised}
    first, second = ModelSpec.from_config(options).layers
    assert first.weight_bytes["attention"] == 2 * first.params["attention"]
    assert second.weight_bytes["attention"] < first.weight_bytes["attention"]
    assert first.weight_bytes["routed_experts"] == second.weight_bytes["routed_experts"]


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_cap04_checkpoint_bytes_equal_the_files(family: str, tmp_path: Path) -> None:
    model = tiny.build_model(tiny.random_config(family, 4, tie_word_embeddings=False)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    header_bytes = sum(
        tensor.numel() * tensor.element_size()
        for file in tmp_path.glob("*.safetensors")
        for tensor in load_file(file).values()
    )
    spec = ModelSpec.from_checkpoint(tmp_path)
    assert spec.weight_bytes.total == header_bytes
    assert spec.params == ModelSpec.from_config(tmp_path).params


def _save_quantised(folder: Path) -> int:
    """A Mixtral checkpoint whose experts are 4-bit with scales; returns the bytes of its tensors."""
    model = tiny.build_model(tiny.random_config("mixtral", 4, tie_word_embeddings=False))
    model.save_pretrained(folder)
    (file,) = folder.glob("*.safetensors")
    tensors = {}
    for name, tensor in load_file(file).items():
        if ".experts." not in name:
            tensors[name] = tensor
            continue
        module = name.removesuffix(".weight")
        tensors[f"{module}.qweight"] = torch.zeros(tensor.shape[1] // 8, tensor.shape[0], dtype=torch.int32)
        tensors[f"{module}.scales"] = torch.zeros(tensor.shape[1] // 8, tensor.shape[0], dtype=torch.float16)
    save_file(tensors, file, metadata={"format": "pt"})
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_cap04_quantised_weights_count_with_their_scales(tmp_path: Path) -> None:
    total = _save_quantised(tmp_path)
    spec = ModelSpec.from_checkpoint(tmp_path)
    assert spec.weight_bytes.total == total
    layer = spec.layers[0]
    assert layer.expert_bytes * layer.num_experts == layer.weight_bytes["routed_experts"]
    assert layer.expert_bytes < 4 * layer.expert_params / 3


def test_cap04_checkpoint_with_other_tensors_is_refused(tmp_path: Path) -> None:
    model = tiny.build_model(tiny.random_config("qwen3_moe", 2, num_hidden_layers=2))
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    extra = {**tensors, "model.vision_tower.weight": torch.zeros(3)}
    save_file(extra, file)
    with pytest.raises(ValueError, match=r"1 tensors .* model\.vision_tower\.weight"):
        ModelSpec.from_checkpoint(tmp_path)

    wrong = {**tensors, "model.norm.weight": torch.zeros(7)}
    save_file(wrong, file)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: 7 elements"):
        ModelSpec.from_checkpoint(tmp_path)

    save_file({name: value for name, value in tensors.items() if "self_attn" not in name}, file)
    with pytest.raises(ValueError, match="lacks tensors"):
        ModelSpec.from_checkpoint(tmp_path)


def test_bad_configurations_name_the_fault(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_type 'mamba' is not supported .*qwen3_moe"):
        ModelSpec.from_config({"model_type": "mamba"})
    with pytest.raises(ValueError, match="lacks 'num_hidden_layers'"):
        ModelSpec.from_config({"model_type": "llama"})
    with pytest.raises(ValueError, match="unknown dtype 'int3'"):
        ModelSpec.from_config(QWEN3_30B, weight_dtype="int3")
    with pytest.raises(ValueError, match=r"quant_method 'hqq' .*from_checkpoint"):
        ModelSpec.from_config({**QWEN3_30B, "quantization_config": {"quant_method": "hqq"}})
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        ModelSpec.from_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        ModelSpec.from_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    with pytest.raises(FileNotFoundError, match="safetensors"):
        ModelSpec.from_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        ModelSpec.from_checkpoint(tmp_path)


def test_breakdown_is_a_read_only_mapping() -> None:
    parts = Breakdown({"norm": 2, "router": 3})
    assert (parts.total, dict(parts), len(parts)) == (5, {"norm": 2, "router": 3}, 2)
    with pytest.raises(TypeError):
        parts["norm"] = 1
