"""The speech corpus: sentences without a library, and what espeak-ng says of them where it is installed."""

from __future__ import annotations

from ctypes.util import find_library

import pytest
import torch

from spe_layers import speech


def test_sentences_are_different_sorted_and_repeatable():
    found = speech.sentences(128)
    assert len(set(found)) == 128
    assert found == sorted(found)
    assert found == speech.sentences(128)
    assert found != speech.sentences(128, seed=1)
    with pytest.raises(ValueError, match="count must be from 0 to 4096"):
        speech.sentences(5000)


def test_mel_bands_peak_where_a_tone_is():
    time = torch.arange(speech.SAMPLE_RATE, dtype=torch.float64) / speech.SAMPLE_RATE
    for tone in (200.0, 1000.0, 5000.0):
        mel = speech.mel_spectrogram(torch.sin(2 * torch.pi * tone * time).float())
        centre = speech.mel_frequencies()[int(mel.exp().mean(0).argmax())]
        assert abs(float(centre) - tone) < 0.06 * tone + 25


def test_pitch_of_a_pulse_train_is_its_rate():
    audio = torch.zeros(speech.SAMPLE_RATE)
    audio[:: speech.SAMPLE_RATE // 120] = 1.0
    track = speech._pitch(audio, 60)
    assert abs(float(track[5:55].median()) - 120) < 4
    assert not speech._pitch(torch.zeros(4000), 10).any()


def test_missing_library_names_the_package(monkeypatch):
    monkeypatch.setattr(speech, "find_library", lambda _name: None)
    speech._library.cache_clear()
    with pytest.raises(OSError, match="apt-get install libespeak-ng1"):
        speech.speak(["hello"])
    speech._library.cache_clear()


@pytest.mark.skipif(find_library("espeak-ng") is None, reason="espeak-ng is not installed")
def test_spoken_sentence_has_phones_whose_durations_fill_the_spectrogram():
    (found,) = speech.speak(["a clever fox follows the river"])
    assert "f" in found.phones
    assert "ɒ" in found.phones
    assert int(found.durations.sum()) == len(found.mel)
    assert found.mel.shape[1] == speech.MELS
    assert len(found.phones) == len(found.pitch) == len(found.energy) == len(found.durations)
    assert int(found.durations.min()) >= 1
    voiced = found.pitch[found.pitch > 0]
    assert 60 < float(voiced.median()) < 300
