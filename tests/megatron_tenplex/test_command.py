from __future__ import annotations

import json

import pytest

from megatron_tenplex.__main__ import main


def plan(capsys, *arguments):
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_tx16_plan_prints_bytes_per_link_and_time(capsys, tmp_path):
    picture = tmp_path / "plan.png"
    said = plan(
        capsys, "--from", "tp=2,pp=2,dp=2", "--to", "tp=4,pp=1,dp=2", "--ranks-per-host", "4", "tiny",
        "--picture", str(picture),
    )  # fmt: skip
    assert said["remote_bytes"] == said["minimum_bytes"] == sum(n for _, _, n in said["links"])
    assert said["remote_bytes"] <= said["identity_bytes"]
    crossing = sum(n for a, b, n in said["links"] if a // 4 != b // 4)
    assert said["inter_host_bytes"] == crossing
    assert said["predicted_seconds"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_tx16_closed_form_of_bytes_received_by_two_ranks(capsys, tmp_path):
    shape = {"num_layers": 16, "hidden_size": 128, "num_attention_heads": 8, "vocab_size": 128}
    model = tmp_path / "model.json"
    model.write_text(json.dumps(shape))
    # One bucket, bf16 with Adam and fp32 masters: 3.5, 4, 3, 7, 6 bytes a parameter for each of two ranks.
    for before, after, each in (
        ("tp=2", "pp=2", 3.5),
        ("tp=2", "dp=2", 4),
        ("dp=2", "tp=2", 3),
        ("pp=2", "dp=2", 7),
        ("dp=2", "pp=2", 6),
    ):
        said = plan(capsys, "--from", before, "--to", after, str(model), "--placement", "identity")
        assert said["remote_bytes"] / said["parameters"] / 2 == pytest.approx(each, rel=0.03)


def test_tx16_lost_ranks_are_replaced_by_replicas_or_named(capsys):
    weights = ["--from", "tp=2,dp=2", "--to", "tp=2,dp=1", "tiny"]
    assert plan(capsys, *weights, "--lost")["remote_bytes"] > 0
    assert main(["plan", "--from", "tp=2,pp=2", "--to", "tp=2,pp=1", "tiny", "--lost", "3"]) == 2
    assert "lost ranks: [3]" in capsys.readouterr().err


def test_tx16_bad_input_names_what_was_meant(capsys):
    assert main(["plan", "--from", "tp=2", "--to", "ttp=2", "tiny"]) == 2
    assert "did you mean 'tp'" in capsys.readouterr().err
    assert main(["plan", "--from", "tp=2", "--to", "tp=1", "gpt3-x"]) == 2
    assert "did you mean 'gpt3-xl'" in capsys.readouterr().err


def test_tx16_model_from_a_file(capsys, tmp_path):
    shape = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 16}
    file = tmp_path / "shape.json"
    file.write_text(json.dumps(shape))
    assert plan(capsys, "--from", "tp=2", "--to", "pp=2", str(file))["workers"] == 2
    file.write_text(json.dumps({**shape, "layers": 2}))
    assert main(["plan", "--from", "tp=2", "--to", "pp=2", str(file)]) == 2
    assert "unknown field 'layers'; did you mean 'num_layers'?" in capsys.readouterr().err
    file.write_text("{")
    assert main(["plan", "--from", "tp=2", "--to", "pp=2", str(file)]) == 2
    assert "is not JSON" in capsys.readouterr().err


def test_tx21_simulator_for_many_ranks(capsys):
    assert main(["simulate", "tiny", "--ranks", "8", "16", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["ranks"] for row in rows} == {8, 16}
    assert all(row["remote_bytes"] == row["minimum_bytes"] for row in rows)
