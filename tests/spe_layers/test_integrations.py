"""transformers, PyG and the harness, each the real one (SP-16, SP-22, PyG coordinates)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spe_layers import SPE, Bands, positional_encoding


@pytest.fixture(scope="module")
def speech_model():
    pytest.importorskip("transformers", reason="needs transformers")
    from spe_layers.integrations.transformers import (
        SPEFastSpeech2ConformerConfig,
        SPEFastSpeech2ConformerModel,
    )

    torch.manual_seed(0)
    config = SPEFastSpeech2ConformerConfig(
        spe_bands=3, hidden_size=16, vocab_size=12, num_mel_bins=8, encoder_layers=1, decoder_layers=1,
        encoder_num_attention_heads=2, decoder_num_attention_heads=2, encoder_linear_units=16,
        decoder_linear_units=16, speech_decoder_postnet_layers=2, speech_decoder_postnet_units=8,
        duration_predictor_channels=8, energy_predictor_channels=8, pitch_predictor_channels=8,
        duration_predictor_layers=1, energy_predictor_layers=1, pitch_predictor_layers=1,
    )  # fmt: skip
    return SPEFastSpeech2ConformerModel(config)


def speech_batch() -> dict[str, torch.Tensor]:
    durations = torch.tensor([[2, 3, 1, 2, 2]])
    return {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5]]),
        "attention_mask": torch.ones(1, 5, dtype=torch.long),
        "spectrogram_labels": torch.randn(1, 10, 8),
        "duration_labels": durations,
        "pitch_labels": torch.randn(1, 5, 1),
        "energy_labels": torch.randn(1, 5, 1),
    }


def test_sp16_one_optimiser_step_changes_the_spe(speech_model):
    layer = speech_model.speech_decoder_postnet.feat_out[0]
    assert isinstance(layer, SPE)
    assert layer.weight.shape == (16, 16 * 7)
    before = layer.weight.detach().clone()
    optimiser = torch.optim.Adam(speech_model.parameters(), lr=1e-3)
    speech_model.train()
    speech_model(**speech_batch()).loss.backward()
    optimiser.step()
    assert (layer.weight != before).any()


def test_sp16_saves_and_reloads_equal(speech_model, tmp_path):
    from transformers import AutoModel

    speech_model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(speech_model)
    assert loaded.config.spe_bands == 3
    old, new = speech_model.state_dict(), loaded.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    inputs = {k: speech_batch()[k] for k in ("input_ids", "attention_mask")}
    found = [m.eval()(**inputs).spectrogram for m in (speech_model, loaded)]
    assert torch.equal(*found)


@pytest.mark.pyg
def test_pyg_layer_with_bands_from_a_graph_trains_in_a_network():
    pytest.importorskip("torch_geometric", reason="needs PyG")
    from torch_geometric.data import Data
    from torch_geometric.nn import GCNConv

    from spe_layers.integrations.pyg import CoordinateSPE

    torch.manual_seed(0)
    data = Data(x=torch.rand(30, 4), pos=torch.rand(30, 2) * 2 - 1, edge_index=torch.randint(0, 30, (2, 90)))
    layer = CoordinateSPE.from_data(data, 16, targets=data.pos[:, 0].sin())
    assert layer.spe.init == "calibrated"
    features = layer(data.pos, data.x)
    assert features.shape == (30, 20)
    torch.testing.assert_close(features[:, 4:], layer.spe(data.pos))
    GCNConv(20, 2)(features, data.edge_index).sum().backward()
    assert layer.spe.weight.grad.abs().sum() > 0
    assert layer(data.pos).shape == (30, 16)
    with pytest.raises(ValueError, match=r"no data\.pos"):
        CoordinateSPE.from_data(Data(x=data.x), 8)


@pytest.mark.pyg
def test_pyg_transform_appends_the_encoding():
    pytest.importorskip("torch_geometric", reason="needs PyG")
    from torch_geometric.data import Data
    from torch_geometric.transforms import Compose

    from spe_layers.integrations.pyg import AddPositionalFeatures

    data = Data(x=torch.rand(5, 3), pos=torch.rand(5, 2))
    found = Compose([AddPositionalFeatures(2)])(data)
    expected = torch.cat([data.x, positional_encoding(data.pos, 2)], -1)
    torch.testing.assert_close(found.x, expected)
    named = AddPositionalFeatures(Bands.octaves(1), attr_name="encoding")(data)
    assert named.encoding.shape == (5, 6)
    assert named.x.shape == (5, 3)


def test_sp22_harness_finds_and_runs_the_workload(tmp_path):
    from moecap_eval.workload import ArmConfig, RunContext
    from spe_layers.moecap_workloads import FitWorkload

    workload = FitWorkload()
    params = {"side": 16, "steps": 40, "fits": 2}
    items = workload.items(params, seed=1)
    assert [i.id for i in items] == [i.id for i in workload.items(params, seed=1)]
    context = RunContext(seed=1, out_dir=Path(tmp_path), hardware=None, params=params)
    psnr = {}
    for options in ({}, {"encoding": "relu", "bands": 4}, {"encoding": "rff", "bands": 4}):
        system = workload.open(ArmConfig("arm", options), context)
        result = system.run(items)
        assert result.work == 2 * 40 * 128
        assert {s.item_id for s in result.samples} == {i.id for i in items}
        psnr[options.get("encoding", "spe")] = [s.values["psnr_db"] for s in result.samples]
        again = [s.values["psnr_db"] for s in system.run(items).samples]
        assert again == psnr[options.get("encoding", "spe")], "the same seed must give the same fit"
    assert min(psnr["spe"]) > 15
    for options, message in (
        ({"encodin": "spe"}, "unknown option 'encodin'"),
        ({"encoding": "spee"}, "encoding must be one of"),
        ({"kernel": "fast"}, "fused or eager"),
        ({"bands": "many"}, "auto or a number"),
    ):
        with pytest.raises(ValueError, match=message):
            workload.open(ArmConfig("arm", options), context)
    with pytest.raises(ValueError, match="unknown option 'step'"):
        workload.items({"step": 3}, seed=0)
