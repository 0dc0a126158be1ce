"""The command line (SL-22)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.vllm_serverless_loader.tensors import assert_same
from vllm_serverless_loader import load_checkpoint
from vllm_serverless_loader.cli import main, parse_size

MODEL = Path("examples/tiny_moe/model")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "converted"
    assert main(["convert", str(MODEL), str(path), "--layout", "full"]) == 0
    return path


def test_sl22_convert_keeps_every_tensor_and_the_other_files(converted):
    assert_same(load_checkpoint(converted), load_file(MODEL / "model.safetensors"))
    assert (converted / "config.json").read_bytes() == (MODEL / "config.json").read_bytes()
    assert not list(converted.glob("*.safetensors"))
    assert main(["convert", str(MODEL), str(converted), "--layout", "full"]) == 2


def test_sl22_inspect(converted, capsys):
    assert main(["inspect", str(converted), "--tensors"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    summary = json.loads(first)
    assert summary["format"] == "serverless_llm"
    assert summary["key"]["layout"] == "full"
    assert len(rest) == summary["tensors"] == len(load_file(MODEL / "model.safetensors"))
    assert main(["inspect", str(MODEL)]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "safetensors"


def test_sl22_verify_finds_one_flipped_byte(converted, capsys):
    assert main(["verify", str(converted)]) == 0
    assert "all checksums agree" in capsys.readouterr().out
    path = converted / "partition-00000-of-00001.bin"
    good = path.read_bytes()
    try:
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 1
        path.write_bytes(bad)
        assert main(["verify", str(converted)]) == 1
        assert "checksum of chunk" in capsys.readouterr().err
    finally:
        path.write_bytes(good)
    assert main(["verify", str(MODEL)]) == 0
    assert "no checksums" in capsys.readouterr().out
    assert main(["verify", str(converted / "absent")]) == 2


def test_sl22_probe_measures_disk_and_memory(tmp_path, capsys):
    assert main(["probe", "--disk", str(tmp_path), "--size", "16MiB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) >= {"disk", "host_copy"}
    assert all(rate > 1e6 for rate in found.values())


def test_sl22_simulate_compares_the_policies(capsys):
    assert main(["simulate", "--servers", "2", "--seconds", "60", "--models", "4"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = ["RandomPolicy", "FirstAvailablePolicy", "LocalityPolicy", "StartupTimePolicy"]
    assert [row["policy"] for row in rows] == names
    assert len({row["requests"] for row in rows}) == 1
    assert all(row["startup_p99_s"] >= row["startup_p50_s"] > 0 for row in rows)
    assert main(["simulate", "--models", "0"]) == 2


@pytest.mark.parametrize(
    ("text", "expected"), [("64GiB", 64 << 30), ("500MB", 500_000_000), ("1.5k", 1500), ("7", 7)]
)
def test_sl22_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "many", "3XB"])
def test_sl22_bad_sizes(text):
    with pytest.raises(ValueError, match="a size must be"):
        parse_size(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", str(MODEL), str(MODEL), "--layout", "full"], "is the model itself"),
        (["convert", str(MODEL), "OUT", "--layout", "full", "--dtype", "bfloat16"], "leave dtype at 'auto'"),
        (
            ["convert", str(MODEL), "OUT", "--layout", "full", "--tensor-parallel-size", "2"],
            "leave tensor_par",
        ),
        (["convert", str(MODEL), "OUT", "--tensor-parallel-size", "0"], "must be at least 1, got 0"),
        (["convert", "/nowhere", "OUT", "--layout", "full"], "no checkpoint in /nowhere"),
        (["inspect", str(MODEL), "--rank", "-1"], "rank must not be negative"),
        (["probe", "--size", "3"], "--size must be at least 1MiB"),
        (["store", "--memory", "1", "--socket", "OUT"], "hold no chunk"),
        (
            ["store", "--memory", "1MiB", "--chunk", "1MiB", "--socket", "/nowhere/s"],
            "no socket at /nowhere/s",
        ),
    ],
)
def test_sl22_bad_input_is_named_before_anything_is_written(arguments, message, tmp_path, capsys):
    before = sorted(MODEL.iterdir())
    out = tmp_path / "out"
    assert main([str(out) if word == "OUT" else word for word in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
    assert sorted(MODEL.iterdir()) == before


def test_sl22_a_conversion_that_fails_leaves_nothing(tmp_path, capsys, monkeypatch):
    from vllm_serverless_loader import conversion

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "copy_other_files", full)
    out = tmp_path / "out"
    assert main(["convert", str(MODEL), str(out), "--layout", "full"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert main(["convert", str(MODEL), str(out), "--layout", "full"]) == 2
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.vllm
def test_sl22_doctor(converted, capsys, monkeypatch):
    assert main(["doctor", "--model", str(converted), "--extra-config", '{"io_threads": 2}']) == 0
    assert "load format registered" in capsys.readouterr().out
    assert main(["doctor", "--extra-config", '{"io_thread": 2}']) == 1
    assert "did you mean 'io_threads'" in capsys.readouterr().err
    assert main(["doctor", "--extra-config", '{"store": "/nowhere/s.sock"}']) == 1
    assert "/nowhere/s.sock does not answer" in capsys.readouterr().err
    monkeypatch.setenv("VLLM_PLUGINS", "moe_offload")
    assert main(["doctor"]) == 1
    assert "leaves it out; add serverless_loader" in capsys.readouterr().err
