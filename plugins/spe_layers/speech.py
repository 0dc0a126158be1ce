"""A speech corpus without a download: sentences from word lists, spoken by espeak-ng, durations exact."""

from __future__ import annotations

import ctypes
import math
from ctypes.util import find_library
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

SAMPLE_RATE, WINDOW, HOP, MELS = 22_050, 1024, 256, 80
_SUBJECTS = ("the old sailor", "a quiet engineer", "my neighbour", "the young queen", "every student",
             "the tired driver", "our teacher", "a clever fox")  # fmt: skip
_VERBS = ("watches", "repairs", "forgets", "describes", "follows", "measures", "paints", "carries")
_OBJECTS = ("the broken clock", "a yellow bridge", "seven heavy boxes", "the winding river", "fresh bread",
            "an unknown song", "the northern lighthouse", "this curious machine")  # fmt: skip
_PLACES = ("near the harbour", "in the morning", "without a sound", "under bright stars", "for a short while",
           "behind the church", "with great care", "just before dinner")  # fmt: skip


@dataclass(frozen=True)
class Utterance:
    """One spoken sentence.

    Attributes:
        text: the sentence.
        phones: IPA symbol of each phone, S of them.
        durations: frames of each phone [S], int64; they sum to T.
        mel: log mel spectrogram [T, 80], float32.
        pitch: mean fundamental frequency of each phone [S] in Hz, 0 where unvoiced.
        energy: mean log energy of each phone [S].
    """

    text: str
    phones: tuple[str, ...]
    durations: Tensor
    mel: Tensor
    pitch: Tensor
    energy: Tensor


class _EventId(ctypes.Union):
    _fields_: ClassVar[Any] = [
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_char * 8),
    ]


class _Event(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        ("type", ctypes.c_int), ("unique_identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
        ("length", ctypes.c_int), ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p), ("id", _EventId),
    ]  # fmt: skip


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)
_PHONE_EVENT, _UTF8 = 7, 1


def sentences(count: int, *, seed: int = 0) -> list[str]:
    """Different sentences [count] from fixed word lists, sorted.

    Raises:
        ValueError: more than the lists give.
    """
    lists = (_SUBJECTS, _VERBS, _OBJECTS, _PLACES)
    total = math.prod(map(len, lists))
    if not 0 <= count <= total:
        raise ValueError(f"count must be from 0 to {total}, got {count}")
    picked = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    found = []
    for number in picked:
        words, left = [], number
        for choices in lists:
            left, place = divmod(left, len(choices))
            words.append(choices[place])
        found.append(" ".join(words))
    return sorted(found)


def speak(texts: list[str]) -> list[Utterance]:
    """Utterances of these texts, by espeak-ng's English voice; the same on every run.

    Raises:
        OSError: espeak-ng's library is not installed, or does not start.
        ValueError: a text without phones.
    """
    library = _library()
    return [_utterance(text, *_synthesise(library, text)) for text in texts]


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    name = find_library("espeak-ng")
    if name is None:
        raise OSError("speak needs espeak-ng's library: apt-get install libespeak-ng1 espeak-ng-data")
    library = ctypes.CDLL(name)
    synchronous, phonemes_as_ipa = 2, 1 | 2
    rate = library.espeak_Initialize(synchronous, 0, None, phonemes_as_ipa)
    if rate != SAMPLE_RATE:
        raise OSError(f"espeak-ng did not start: sample rate {rate}, expected {SAMPLE_RATE}")
    library.espeak_SetVoiceByName(b"en")
    return library


def _synthesise(library: ctypes.CDLL, text: str) -> tuple[Tensor, list[tuple[int, str]]]:
    """Audio [samples] in [-1, 1] and the start sample of every phone."""
    audio: list[int] = []
    starts: list[tuple[int, str]] = []

    def receive(wave: Any, count: int, events: Any) -> int:
        audio.extend(wave[:count] if wave and count > 0 else ())
        index = 0
        while events[index].type:
            if events[index].type == _PHONE_EVENT:
                starts.append((events[index].sample, events[index].id.string.decode("utf-8", "replace")))
            index += 1
        return 0

    callback = _CALLBACK(receive)
    library.espeak_SetSynthCallback(callback)
    encoded = text.encode() + b"\0"
    status = library.espeak_Synth(encoded, len(encoded), 0, 0, 0, _UTF8, None, None)
    if status:
        raise OSError(f"espeak-ng could not speak {text!r}: error {status}")
    return torch.tensor(audio, dtype=torch.float32) / 32768, starts


def _utterance(text: str, audio: Tensor, starts: list[tuple[int, str]]) -> Utterance:
    voiced = [(sample, phone or "_") for sample, phone in starts]
    mel = mel_spectrogram(audio)
    frames = len(mel)
    edges = [min(frames, round(sample / HOP)) for sample, _ in voiced] + [frames]
    if not voiced:
        raise ValueError(f"espeak-ng gave no phones for {text!r}")
    edges[0] = 0
    spans = [(p, a, b) for (_, p), a, b in zip(voiced, edges, edges[1:], strict=False) if b > a]
    power = mel.exp().mean(1).log()
    track = _pitch(audio, frames)
    pitch = []
    for _, a, b in spans:
        heard = track[a:b][track[a:b] > 0]
        pitch.append(float(heard.mean()) if len(heard) else 0.0)
    return Utterance(
        text=text,
        phones=tuple(p for p, _, _ in spans),
        durations=torch.tensor([b - a for _, a, b in spans]),
        mel=mel,
        pitch=torch.tensor(pitch),
        energy=torch.stack([power[a:b].mean() for _, a, b in spans]),
    )


def mel_spectrogram(audio: Tensor) -> Tensor:
    """Log mel power [T, 80] of audio [samples] at 22,050 Hz: 1024-sample Hann window, hop 256, 0 to 8 kHz."""
    spectrum = torch.stft(
        audio, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True, pad_mode="constant"
    ).abs()
    return (_mel_filters() @ spectrum).clamp_min(1e-5).log().T.contiguous()


def mel_frequencies() -> Tensor:
    """Centre of each mel band [80] in Hz."""
    return _mel_edges()[1:-1]


def _mel_edges() -> Tensor:
    top = 2595 * math.log10(1 + 8000 / 700)
    return 700 * (10 ** (torch.linspace(0, top, MELS + 2, dtype=torch.float64) / 2595) - 1)


def _mel_filters() -> Tensor:
    """Triangles [80, bins]."""
    edges = _mel_edges()
    bins = torch.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rise, fall).clamp_min(0).float()


def _pitch(audio: Tensor, frames: int) -> Tensor:
    """Fundamental frequency of each frame in Hz by autocorrelation between 60 and 400 Hz; 0 if unvoiced."""
    padded = torch.nn.functional.pad(audio, (WINDOW // 2, WINDOW))
    blocks = padded.unfold(0, WINDOW, HOP)[:frames]
    spectrum = torch.fft.rfft(blocks - blocks.mean(1, keepdim=True), 2 * WINDOW)
    correlation = torch.fft.irfft(spectrum.abs().square())[:, :WINDOW]
    low, high = SAMPLE_RATE // 400, SAMPLE_RATE // 60
    value, lag = (correlation[:, low:high] / correlation[:, :1].clamp_min(1e-9)).max(1)
    return torch.where((value > 0.4) & (correlation[:, 0] > 1e-3), SAMPLE_RATE / (lag + low), 0.0)
