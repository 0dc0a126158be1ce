"""Adapters in host memory, and vLLM's resolver that takes them from there (SL-24)."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_serverless_loader import AdapterCache, HostCache, StoreClient, StoreServer


def write_adapter(folder: Path, seed: int, base: str = "base", rows: int = 4096) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    save_file({"a": torch.randn(rows, generator=generator)}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "seed": seed}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def content(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def in_memory(folder: Path) -> bool:
    return os.readlink(folder / "adapter_model.safetensors").startswith("/proc/")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def adapters(tmp_path):
    return [write_adapter(tmp_path / f"adapter{n}", n) for n in range(3)]


def test_sl24_folder_in_memory_equals_the_original(adapters, tmp_path):
    with AdapterCache(tmp_path / "memory", 1 << 20) as cache:
        for original in adapters:
            folder = cache.get(original)
            assert in_memory(folder)
            assert content(folder) == content(original)
            assert json.loads((folder / "adapter_config.json").read_text())["seed"] == int(original.name[-1])
        assert cache.adapters == tuple(map(str, adapters))
        assert cache.used_bytes == sum(len(content(original)) for original in adapters)


def test_sl24_a_hit_reads_nothing(adapters, tmp_path, monkeypatch):
    with AdapterCache(tmp_path / "memory", 1 << 20) as cache:
        folder = cache.get(adapters[0])
        monkeypatch.setattr(os, "preadv", None)
        assert cache.get(adapters[0]) == folder


def test_sl24_least_recently_used_leaves_and_its_path_stays_good(adapters, tmp_path):
    with AdapterCache(tmp_path / "memory", 2 * len(content(adapters[0]))) as cache:
        first, second = cache.get(adapters[0]), cache.get(adapters[1])
        cache.get(adapters[0])
        mapped = load_file(second / "adapter_model.safetensors")
        cache.get(adapters[2])
        assert cache.adapters == (str(adapters[0]), str(adapters[2]))
        assert in_memory(first)
        assert not in_memory(second)
        assert content(second) == content(adapters[1])
        assert torch.equal(mapped["a"], load_file(adapters[1] / "adapter_model.safetensors")["a"])
        assert in_memory(cache.get(adapters[1]))


def test_sl24_changed_adapter_is_read_again(adapters, tmp_path):
    with AdapterCache(tmp_path / "memory", 1 << 20) as cache:
        cache.get(adapters[0])
        save_file({"a": torch.ones(7)}, adapters[0] / "adapter_model.safetensors")
        assert content(cache.get(adapters[0])) == content(adapters[0])


def test_sl24_nothing_is_left_behind(adapters, tmp_path, monkeypatch):
    before = descriptors()
    with AdapterCache(tmp_path / "memory", 1 << 20) as cache:
        folder = cache.get(adapters[0])
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
            with pytest.raises(OSError, match="Input/output error"):
                cache.get(adapters[1])
    assert descriptors() == before
    assert content(folder) == content(adapters[0])


def test_sl24_bad_adapters_are_named(adapters, tmp_path):
    with pytest.raises(ValueError, match="capacity_bytes must be at least 1"):
        AdapterCache(tmp_path / "memory", 0)
    with AdapterCache(tmp_path / "memory", 100) as cache:
        with pytest.raises(MemoryError, match=r"adapter0 has \d+ bytes, the cache 100"):
            cache.get(adapters[0])
        (adapters[1] / "adapter_model.safetensors").rename(adapters[1] / "adapter_model.bin")
        with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
            cache.get(adapters[1])


def test_sl24_store_shares_adapters(adapters, tmp_path):
    path = tmp_path / "s.sock"
    with HostCache(1 << 20, chunk_bytes=1 << 16, shared=True) as cache:
        with StoreServer(cache, path, adapter_bytes=1 << 20), StoreClient(path) as client:
            folder = client.adapter(adapters[0])
            assert in_memory(folder)
            assert content(folder) == content(adapters[0])
            assert client.status()["adapters"] == [str(adapters[0])]
            with pytest.raises(FileNotFoundError, match="no adapter in"):
                client.adapter(tmp_path)
        assert content(folder) == content(adapters[0])  # an engine may load it again without the store


@pytest.mark.vllm
def test_sl24_resolver_finds_only_what_belongs_to_the_model(adapters, tmp_path, caplog):
    from vllm_serverless_loader.vllm_adapters import HostMemoryResolver

    with AdapterCache(tmp_path / "memory", 1 << 20) as cache:
        resolver = HostMemoryResolver(tmp_path, cache.get)

        def resolve(base, name):
            return asyncio.run(resolver.resolve_lora(base, name))

        request = resolve("base", "adapter1")
        assert request.lora_name == "adapter1"
        assert in_memory(Path(request.lora_path))
        assert resolve("other", "adapter1") is None
        for name in ("missing", "", ".", "..", "../" + tmp_path.name + "/adapter1/..", "/etc", "memory/.."):
            assert resolve("base", name) is None

        def broken(path):
            raise ConnectionError("store gone")

        fallback = asyncio.run(HostMemoryResolver(tmp_path, broken).resolve_lora("base", "adapter1"))
        assert fallback.lora_path == str(adapters[1])


@pytest.mark.vllm
def test_sl24_registered_by_the_environment(adapters, tmp_path, monkeypatch):
    from vllm.lora.resolver import LoRAResolverRegistry

    from vllm_serverless_loader import vllm_adapters

    monkeypatch.setattr(LoRAResolverRegistry, "resolvers", {})
    monkeypatch.delenv(vllm_adapters.FOLDER, raising=False)
    vllm_adapters.register()
    assert not LoRAResolverRegistry.get_supported_resolvers()
    monkeypatch.setenv(vllm_adapters.FOLDER, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"SERVERLESS_LOADER_ADAPTERS: .*nowhere is not a folder"):
        vllm_adapters.register()
    monkeypatch.setenv(vllm_adapters.FOLDER, str(tmp_path))
    for memory in ("much", "1MiB"):
        monkeypatch.setenv(vllm_adapters.MEMORY, memory)
        if memory == "much":
            with pytest.raises(ValueError, match="a size must be"):
                vllm_adapters.register()
        else:
            vllm_adapters.register()
            vllm_adapters.register()
    resolver = LoRAResolverRegistry.get_resolver(vllm_adapters.NAME)
    assert in_memory(Path(asyncio.run(resolver.resolve_lora("base", "adapter2")).lora_path))


@pytest.mark.vllm
def test_sl24_real_engine_gives_the_tokens_of_the_file_system_resolver(tmp_path):
    import transformers
    from vllm import LLM, SamplingParams
    from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver

    from tests.vllm_serverless_loader.engines import PROMPTS
    from vllm_serverless_loader.vllm_adapters import HostMemoryResolver

    # Dense: vLLM's adapters of experts need Triton.
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 256}
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**shape, max_position_embeddings=512)
    model = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
    weights = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    lora = {}
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            rows, columns = weight.shape
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            lora[f"{stem}.lora_A.weight"] = torch.randn(8, columns, generator=generator).bfloat16()
            lora[f"{stem}.lora_B.weight"] = torch.randn(rows, 8, generator=generator).bfloat16()
    folder = tmp_path / "adapters" / "one"
    folder.mkdir(parents=True)
    save_file(lora, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 8, "lora_alpha": 16}
    config |= {"target_modules": ["q_proj", "v_proj"], "bias": "none", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))

    llm = LLM(
        model=str(model),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        distributed_executor_backend="uni",
        enable_prefix_caching=False,
        enable_lora=True,
        max_lora_rank=8,
        max_loras=1,
        max_cpu_loras=1,
    )
    try:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)

        def ids(request):
            outputs = llm.generate(PROMPTS, params, use_tqdm=False, lora_request=request)
            return [list(output.outputs[0].token_ids) for output in outputs]

        with AdapterCache(tmp_path / "memory", 1 << 20) as cache:
            found = {}
            for number, resolver in enumerate(
                (FilesystemResolver(str(folder.parent)), HostMemoryResolver(folder.parent, cache.get)), 1
            ):
                request = asyncio.run(resolver.resolve_lora(str(model), "one"))
                # The server numbers adapters; another number makes the engine load the adapter again.
                request.lora_int_id = number
                request.lora_name = f"one-{number}"
                found[number] = ids(request)
            assert in_memory(Path(request.lora_path))
        assert found[1] == found[2]
        assert found[1] != ids(None)
    finally:
        llm.llm_engine.engine_core.shutdown()
