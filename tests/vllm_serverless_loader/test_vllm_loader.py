"""``--load-format serverless_llm`` in the real vLLM: same tokens, nothing lost (SL-01, SL-03, SL-09)."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.support.tiny_models import write_tiny_model
from tests.vllm_serverless_loader.engines import greedy_ids
from tests.vllm_serverless_loader.tensors import assert_same
from vllm_serverless_loader import (
    CorruptCheckpointError,
    HostCache,
    StoreServer,
    convert,
    load_checkpoint,
)
from vllm_serverless_loader.metrics import record

pytestmark = pytest.mark.vllm

TRAINED = Path("examples/tiny_moe/model").resolve()


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory):
    return write_tiny_model("qwen3_moe", tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.fixture(scope="module", params=["trained", "tied"])
def case(request, tmp_path_factory, tied_model):
    """A model directory, vLLM's own ids, its state before post-processing, and its conversion inside vLLM."""
    from vllm.model_executor.model_loader import base_loader
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

    folder = TRAINED if request.param == "trained" else tied_model
    state = {}
    original = base_loader.process_weights_after_loading

    def remember(model, *arguments):
        subtensors = ShardedStateLoader._filter_subtensors(model.state_dict())
        state.update({name: tensor.clone() for name, tensor in subtensors.items()})
        return original(model, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_loader, "process_weights_after_loading", remember)
        ids = greedy_ids(folder)
    converted = tmp_path_factory.mktemp("converted") / request.param
    if request.param == "trained":
        assert greedy_ids(folder, {"convert_to": str(converted)}) == ids
    else:  # as the command line does it
        convert(folder, converted, engine_arguments={"distributed_executor_backend": "uni"})
    return folder, ids, state, converted


def test_sl03_store_holds_the_state_before_post_processing(case):
    _, _, state, converted = case
    assert len(state) > 10
    assert_same(load_checkpoint(converted), state)


def test_sl01_converted_directory_gives_the_ids_of_auto(case):
    _, ids, _, converted = case
    assert greedy_ids(converted, {}) == ids
    assert greedy_ids(converted, {"verify": False, "direct_io": "always", "io_threads": 2}) == ids


def test_sl01_original_layout_gives_the_ids_of_auto(case, tmp_path):
    folder, ids, _, _ = case
    assert greedy_ids(folder, {}) == ids
    assert greedy_ids(convert(folder, tmp_path / "full", layout="full"), {}) == ids


def test_sl09_restarted_engine_loads_from_the_store_without_the_disk(case, tmp_path, monkeypatch):
    import os

    folder, ids, _, converted = case
    extra = {"store": str(tmp_path / "s.sock"), "store_required": True}
    with (
        HostCache(256 << 20, chunk_bytes=1 << 20, shared=True) as cache,
        StoreServer(cache, extra["store"]),
    ):
        assert greedy_ids(converted, extra) == ids
        assert greedy_ids(folder, extra) == ids
        monkeypatch.setattr(os, "preadv", None)  # any read of the checkpoint would fail
        assert greedy_ids(converted, extra) == ids
        assert greedy_ids(folder, extra) == ids
        assert [cache.evict(*model) for model in cache.models] == [True, True]  # no lease is left


def test_sl01_store_that_is_gone(tied_model, caplog):
    from vllm.config.load import LoadConfig

    from vllm_serverless_loader.vllm_loader import ServerlessLoader

    extra = {"store": "/nowhere/s.sock"}
    loader = ServerlessLoader(LoadConfig(load_format="serverless_llm", model_loader_extra_config=extra))
    with pytest.warns(RuntimeWarning, match=r"store /nowhere/s.sock does not answer.*; reading .* directly"):
        assert loader._lease(tied_model, 0) is None
    strict = LoadConfig(
        load_format="serverless_llm", model_loader_extra_config={**extra, "store_required": True}
    )
    with pytest.raises(ConnectionError, match=r"/nowhere/s\.sock"):
        ServerlessLoader(strict)._lease(tied_model, 0)


def test_sl01_extra_config_is_checked(tied_model):
    from vllm.config.load import LoadConfig

    from vllm_serverless_loader.vllm_loader import ServerlessLoader

    for extra, text in (
        ({"io_thread": 3}, "unknown key 'io_thread'; did you mean 'io_threads'"),
        ({"io_threads": 0}, "io_threads must be a whole number of at least 1"),
        ({"direct_io": "yes"}, "direct_io must be one of auto, always, never"),
        ({"store": 5}, "store must be a str"),
        ({"verify": "no"}, "verify must be true or false"),
    ):
        with pytest.raises(ValueError, match=text):
            ServerlessLoader(LoadConfig(load_format="serverless_llm", model_loader_extra_config=extra))


def test_sl10_damaged_conversion_never_serves(tied_model, tmp_path):
    folder = convert(tied_model, tmp_path / "full", layout="full")
    path = folder / "partition-00000-of-00001.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="checksum of chunk"):
        greedy_ids(folder, {})


def test_sl03_models_quantised_while_loading_are_refused(tied_model, tmp_path):
    from torch import nn
    from vllm.config.load import LoadConfig

    from vllm_serverless_loader.vllm_loader import ServerlessLoader

    class Quantising:
        uses_meta_device = True

    model = nn.ModuleDict({"layer": nn.Linear(2, 2)})
    model["layer"].quant_method = Quantising()
    extra = {"convert_to": str(tmp_path / "out")}
    loader = ServerlessLoader(LoadConfig(load_format="serverless_llm", model_loader_extra_config=extra))
    with pytest.raises(ValueError, match="layer is quantised while loading"):
        loader._convert(model, None, tied_model)
    assert not (tmp_path / "out").exists()


def test_sl01_registering_twice_changes_nothing():
    import vllm_serverless_loader
    from vllm_serverless_loader import vllm_loader

    vllm_serverless_loader.register()
    vllm_serverless_loader.register()
    assert vllm_loader.is_registered()


def shown_by_metrics():
    """What ``/metrics`` would show of our loads: sample name and tier -> value."""
    from prometheus_client import REGISTRY, generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(generate_latest(REGISTRY).decode())
    samples = [sample for family in families for sample in family.samples]
    return {
        (sample.name.removeprefix("vllm:serverless_loader_"), sample.labels.get("tier", "")): sample.value
        for sample in samples
        if sample.name.startswith("vllm:serverless_loader_") and sample.labels["model_name"] == "sl25"
    }


@pytest.mark.parametrize("case", ["trained"], indirect=True)
def test_sl25_one_line_a_rank_and_counters_equal_the_reports(case, tmp_path, caplog, monkeypatch):
    from vllm_serverless_loader import open_checkpoint, vllm_loader

    folder, _, _, converted = case
    reports = []
    monkeypatch.setattr(
        vllm_loader,
        "record",
        lambda report, **labels: reports.append(report) or record(report, model="sl25", rank=labels["rank"]),
    )
    # vLLM takes the handlers off its own loggers when an engine starts.
    monkeypatch.setattr(vllm_loader, "logger", logging.getLogger("test_sl25"))
    before = shown_by_metrics()
    extra = {"store": str(tmp_path / "s.sock"), "store_required": True}
    with caplog.at_level(logging.INFO, "test_sl25"):
        greedy_ids(folder, {})
        with (
            HostCache(64 << 20, chunk_bytes=1 << 20, shared=True) as cache,
            StoreServer(cache, extra["store"]),
        ):
            greedy_ids(converted, extra)
            greedy_ids(converted, extra)
    lines = [record.getMessage() for record in caplog.records if record.name == "test_sl25"]
    assert [line.split(" from ")[1].split()[0] for line in lines] == ["disk", "disk", "host"]
    assert all("rank 0" in line and "GiB/s" in line for line in lines)

    size = {path: open_checkpoint(path).num_bytes for path in (folder, converted)}
    assert [dict(report.bytes_read) for report in reports] == [
        {"disk": size[folder]},
        {"disk": size[converted], "host": size[converted]},
        {"host": size[converted]},
    ]
    shown = shown_by_metrics()
    added = {key: value - before.get(key, 0) for key, value in shown.items()}
    assert added["loads_total", ""] == 3
    assert added["load_seconds_total", ""] == pytest.approx(sum(report.seconds for report in reports))
    assert added["bytes_read_total", "disk"] == size[folder] + size[converted]
    assert added["bytes_read_total", "host"] == 2 * size[converted]
    assert shown["bytes_per_second", "host"] == pytest.approx(size[converted] / reports[-1].seconds)
