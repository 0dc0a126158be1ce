"""Text to speech: does SPE between decoder and mel layer of FastSpeech2Conformer help on espeak-ng speech?

    python benchmarks/spe_layers_speech.py --save-data FILE            where espeak-ng is installed
    python benchmarks/spe_layers_speech.py --device cuda --data FILE   about 100 s on an H100

A small FastSpeech2Conformer of transformers learns 96 sentences and is scored on 32 others, given the true
durations, pitches and energies. Arms differ in the head before the last Linear alone; "wide" has as many
parameters as SPE. Same learning rate, steps and seeds for every arm. Errors are mean squares of the mel
spectrogram in units of its variance, of all bands and above 4 kHz.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

from benchmarks.common import RESULTS, Headline, write_result
from benchmarks.spe_layers_pool import run_pool
from spe_layers import SPE, build_first_layer

TRAIN, TEST, BATCH, HIDDEN, BANDS = 96, 32, 16, 128, 5
RATES = (1e-3,)
ARMS = ("none", "linear + relu", "wide", "PE + relu", "tiled + sine", "SPE")
Job = tuple[str, int, float]  # arm, seed, learning rate


def head(arm: str) -> nn.Module | None:
    """What stands before the mel layer: [..., 128] -> [..., 128]."""
    if arm == "none":
        return None
    if arm == "linear + relu":
        return nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
    if arm == "linear":
        return nn.Linear(HIDDEN, HIDDEN)
    if arm == "wide":
        width = HIDDEN * (2 * BANDS + 1) // 2
        return nn.Sequential(nn.Linear(HIDDEN, width), nn.ReLU(), nn.Linear(width, HIDDEN))
    if arm.startswith("SPE"):
        return SPE(HIDDEN, HIDDEN, BANDS, init="calibrated" if "calibrated" in arm else "linear")
    return build_first_layer({"PE + relu": "relu", "tiled + sine": "tiled"}[arm], HIDDEN, HIDDEN, BANDS)


def build_model(arm: str, phones: int) -> nn.Module:
    """A small FastSpeech2Conformer with this head."""
    from transformers import FastSpeech2ConformerConfig, FastSpeech2ConformerModel

    model = FastSpeech2ConformerModel(
        FastSpeech2ConformerConfig(
            hidden_size=HIDDEN, vocab_size=phones + 1, encoder_layers=2, decoder_layers=2,
            encoder_linear_units=256, decoder_linear_units=256, speech_decoder_postnet_layers=2,
            speech_decoder_postnet_units=HIDDEN, duration_predictor_channels=HIDDEN,
            energy_predictor_channels=HIDDEN, pitch_predictor_channels=HIDDEN, pitch_predictor_layers=2,
        )
    )  # fmt: skip
    layer = head(arm)
    if layer is not None:
        postnet = model.speech_decoder_postnet
        postnet.feat_out = nn.Sequential(layer, postnet.feat_out)
    return model


def corpus() -> dict[str, Tensor]:
    """Padded tensors of all sentences, standardised by the training part; spectrograms as float16."""
    from spe_layers.speech import mel_frequencies, sentences, speak

    spoken = speak(sentences(TRAIN + TEST))
    order = torch.randperm(len(spoken), generator=torch.Generator().manual_seed(0)).tolist()
    spoken = [spoken[i] for i in order]
    phones = {p: i + 1 for i, p in enumerate(sorted({p for u in spoken for p in u.phones}))}
    frames = torch.cat([u.mel for u in spoken[:TRAIN]])
    mean, std = frames.mean(0), frames.std()

    def padded(rows: list[Tensor], value: float = 0.0) -> Tensor:
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    def standard(rows: list[Tensor]) -> Tensor:
        everything = torch.cat(rows)
        return padded([(r - everything.mean()) / everything.std() for r in rows])[..., None]

    return {
        "input_ids": padded([torch.tensor([phones[p] for p in u.phones]) for u in spoken]),
        "duration_labels": padded([u.durations for u in spoken]),
        "pitch_labels": standard([u.pitch.log1p() for u in spoken]),
        "energy_labels": standard([u.energy for u in spoken]),
        "spectrogram_labels": padded([((u.mel - mean) / std).half() for u in spoken], -100.0),
        "frequencies": mel_frequencies().float(),
    }


def inputs(data: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Arguments of the model for some sentences, cut to the longest of them."""
    batch = {k: v[rows] for k, v in data.items() if k != "frequencies"}
    phones = int((batch["input_ids"] > 0).sum(1).max())
    batch = {k: v if k == "spectrogram_labels" else v[:, :phones] for k, v in batch.items()}
    frames = int(batch["duration_labels"].sum(1).max())
    batch["spectrogram_labels"] = batch["spectrogram_labels"][:, :frames].float()
    batch["attention_mask"] = (batch["input_ids"] > 0).long()
    return batch


def train(job: Job, file: Path, steps: int, device: str) -> dict[str, Any]:
    """Train one arm; errors on the test sentences. Runs in a process of its own."""
    arm, seed, rate = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    start = time.perf_counter()
    data = {k: v.to(device) for k, v in torch.load(file, weights_only=True).items()}
    model = build_model(arm, int(data["input_ids"].max())).to(device).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for _ in range(steps):
        rows = torch.randperm(TRAIN)[:BATCH].to(device)
        optimiser.zero_grad()
        model(**inputs(data, rows)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    # Only the outermost flag: the true durations are used, as in training, while dropout stays off.
    model.eval()
    model.training = True
    with torch.no_grad():
        batch = inputs(data, torch.arange(TRAIN, TRAIN + TEST, device=device))
        found, true = model(**batch).spectrogram, batch["spectrogram_labels"]
    square = (found - true).square()[(true != -100).any(-1)].mean(0)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "mse": float(square.mean()),
        "mse_high": float(square[data["frequencies"] > 4000].mean()),
        "seconds": time.perf_counter() - start,
        "parameters": parameters,
    }


def best(found: dict[Job, dict[str, Any]], key: str) -> dict[str, list[float]]:
    """Errors by seed of every arm at its better rate, over the seeds that every arm has finished."""
    seeds = {s for s in {job[1] for job in found} if all((a, s, r) in found for a in ARMS for r in RATES)}
    if not seeds:
        return {}
    table = {}
    for arm in ARMS:
        by_rate = [[found[arm, s, r][key] for s in sorted(seeds)] for r in RATES]
        table[arm] = min(by_rate, key=statistics.mean)
    return table


def interval(values: list[float]) -> tuple[float | None, float | None]:
    """95 % interval of the mean by Student's t."""
    if len(values) < 2:
        return None, None
    low, high = stats.t.interval(0.95, len(values) - 1, loc=statistics.mean(values), scale=stats.sem(values))
    return float(low), float(high)


def headline(found: dict[Job, dict[str, Any]]) -> list[Headline]:
    """Errors of each arm, and differences to SPE by seed."""
    rows = []
    for key, name in (("mse", "all bands"), ("mse_high", "above 4 kHz")):
        table = best(found, key)
        for arm, values in table.items():
            rows.append(
                Headline(f"test error, {name}: {arm}", statistics.mean(values), "of variance",
                         *interval(values), note=f"{len(values)} seeds, 95 % interval")
            )  # fmt: skip
        for arm in ("none", "linear + relu", "wide", "PE + relu"):
            if table:
                gaps = [a - b for a, b in zip(table["SPE"], table[arm], strict=True)]
                rows.append(
                    Headline(f"{name}: SPE - {arm}", statistics.mean(gaps), "of variance", *interval(gaps),
                             note="below 0 SPE is better")
                )  # fmt: skip
    return rows


def save(arguments: argparse.Namespace, found: dict[Job, dict[str, Any]], seconds: float) -> None:
    """Rewrite the result with what is done."""
    samples: dict[str, list[float]] = {}
    for (arm, _seed, rate), result in sorted(found.items()):
        samples.setdefault(f"{arm}, rate {rate:g} (test error)", []).append(result["mse"])
    write_result(
        "spe_layers_speech",
        question="Does SPE before the mel layer of FastSpeech2Conformer help on espeak-ng speech?",
        headline=headline(found),
        samples=samples,
        folder=arguments.out,
        sentences={"train": TRAIN, "test": TEST}, steps=arguments.steps, batch=BATCH, bands=BANDS,
        learning_rates=list(RATES), seconds=round(seconds, 1),
        parameters={job[0]: result["parameters"] for job, result in found.items()},
        runs=[{"arm": a, "seed": s, "rate": r} | result for (a, s, r), result in sorted(found.items())],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, help="corpus written by --save-data")
    parser.add_argument("--save-data", type=Path, help="write the corpus and stop")
    parser.add_argument("--budget", type=float, default=100, help="seconds after which no run is started")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=4, help="processes that share the device")
    arguments = parser.parse_args()
    if arguments.save_data:
        torch.save(corpus(), arguments.save_data)
        return
    if arguments.data is None:
        parser.error("--data is needed; make it with --save-data")
    order = itertools.product(range(arguments.seeds), RATES)
    found = run_pool(
        train,
        [(arm, seed, rate) for seed, rate in order for arm in ARMS],
        (arguments.data, arguments.steps, arguments.device),
        workers=arguments.workers,
        budget=arguments.budget,
        save=partial(save, arguments),
    )
    for row in headline(found):
        low, high = row.low or math.nan, row.high or math.nan
        print(f"{row.what:50s} {row.value:8.4f} [{low:8.4f}, {high:8.4f}]")
    print(f"{len(found)} runs, longest {max((r['seconds'] for r in found.values()), default=0):.0f} s")


if __name__ == "__main__":
    main()
