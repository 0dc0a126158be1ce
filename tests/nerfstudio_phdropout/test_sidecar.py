"""The sidecar file: what it accepts, and by what name it refuses."""

from __future__ import annotations

import json

import pytest

from nerfstudio_phdropout import PHDropoutConfig, max_dropout_ratio
from nerfstudio_phdropout.sidecar import read_ratio, sidecar_path, write_sidecar


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "step-000000007.ckpt"
    path.write_bytes(b"weights")
    return path


def test_a_ratio_survives_the_round_trip(checkpoint):
    found = max_dropout_ratio(lambda r: 1 - r)
    path = write_sidecar(checkpoint, PHDropoutConfig(), found)
    assert path == sidecar_path(checkpoint)
    assert path.name == "step-000000007.ckpt.phdropout.json"
    assert read_ratio(path, step=7) == found.ratio
    content = json.loads(path.read_text())
    assert set(content) >= {"version", "ratio", "margin", "quality", "seed", "sha256"}
    assert not list(checkpoint.parent.glob("*.part"))
    assert read_ratio(write_sidecar(checkpoint, PHDropoutConfig(), 0.25)) == 0.25


def test_another_checkpoint_is_refused_by_name(checkpoint):
    path = write_sidecar(checkpoint, PHDropoutConfig(), 0.1)
    with pytest.raises(ValueError, match=r"belongs to step-000000007\.ckpt, but the checkpoint of step 8"):
        read_ratio(path, step=8)
    checkpoint.write_bytes(b"other weights")
    with pytest.raises(ValueError, match=r"made for another checkpoint than step-000000007\.ckpt"):
        read_ratio(path, step=7)


def test_broken_files_are_refused(checkpoint):
    path = sidecar_path(checkpoint)
    with pytest.raises(FileNotFoundError, match="run ns-phdropout"):
        read_ratio(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a PH-Dropout sidecar"):
        read_ratio(path)
    write_sidecar(checkpoint, PHDropoutConfig(), 0.1)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": 2}))
    with pytest.raises(ValueError, match="has version 2, this release reads 1"):
        read_ratio(path)
    path.write_text(json.dumps({**content, "ratio": 1.5}))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        read_ratio(path)
