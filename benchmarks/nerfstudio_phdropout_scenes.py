"""Which uncertainty says where a scene is wrong? nerfacto and splatfacto on half-circle captures, with peers.

    python benchmarks/nerfstudio_phdropout_scenes.py [--budget 170] [--out DIR] [--work DIR]

Traces scenes of 400x400 pixels, trains ensembles of nerfstudio's nerfacto and splatfacto on them (processes
share the GPUs at hand), and compares on views of the whole orbit: PH-Dropout in its modes, an ensemble,
BayesRays' Laplace, FisherRF, 1 - accumulation and noise. Then, alone on the machine, times each of them.
Results are rewritten as models finish, so a run that is cut off keeps what it has. ``--device cpu`` runs the
same with the -tiny methods; ``--prepare`` traces the scenes only; ``--collect`` trains nothing and puts
together what the work folder has; ``--draw`` draws sheets from saved maps.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tarfile
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from benchmarks.common import RESULTS, Headline, interleaved, write_result  # noqa: E402

NAME = "nerfstudio_phdropout_scenes"
KINDS = ("nerfacto", "splatfacto")
QUOTED = (
    "foreground_spearman",
    "foreground_ause",
    "ause",
    "plain_foreground_spearman",
    "plain_foreground_ause",
    "foreground_nll",
    "foreground_nll_best_scale",
    "unseen_over_seen",
)
# The sigma by which the two models of a scene are fused.
FUSED = {"nerfacto": "hash entries", "splatfacto": "exact"}
# Seconds kept at the end of the budget for timing on the quiet machine.
TIMING = 28.0
COLUMNS = 6  # of a sheet


def trace_scene(folder: Path, seed: int, options: argparse.Namespace, workers: int) -> None:
    """A half-circle capture and test views of the whole orbit, unless it is there."""
    from nerfstudio_phdropout.synthetic import write_scene

    if not (folder / "points.npz").exists():
        write_scene(
            folder, num_train=options.train_views, num_eval=options.views, resolution=options.resolution,
            train_azimuth=(0, 180), seed=seed, workers=workers,
        )  # fmt: skip


def work_through(jobs: list[Any], cursor: Any, gpu: str | None, timing: bool) -> None:
    """Entry of a process: take the next job until none is left. Output goes to a log a job."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import torch

    torch.set_num_threads(1)
    while True:
        with cursor.get_lock():
            index = cursor.value
            cursor.value += 1
        if index >= len(jobs):
            return
        job = jobs[index]
        with (job.work / f"{'time_' if timing else ''}{job.name}.log").open("w") as log:
            try:
                with redirect_stdout(log), redirect_stderr(log):
                    time_arms(job) if timing else judge(job)
            except Exception as error:  # the other jobs go on
                traceback.print_exc(file=log)
                print(f"{job.name} FAILED: {error!r}"[:300], flush=True)
                if "CUDA" in repr(error):  # every later call of this process would fail: a new one goes on
                    log.flush()
                    os._exit(1)
        gc.collect()
        if job.device == "cuda":
            torch.cuda.empty_cache()


def judge(job: Any) -> None:
    """Train the job's model and save its images; for member 0 also scores (JSON) and maps (npz)."""
    import torch

    from benchmarks import nerfstudio_phdropout_arms as arms

    record = job.work / f"{job.name}.json"
    if record.exists() and json.loads(record.read_text()).get("complete"):
        return
    pipeline, seconds = arms.train(job)
    measured = (arms.NerfArms if job.kind == "nerfacto" else arms.SplatArms)(job, pipeline)
    if job.member == arms.TRAINED:
        maps, plain = measured.trained_dropout(), measured.plain()
        found = arms.score(*maps, measured.targets, measured.masks, plain=plain)
        scores = {"trained MC dropout": found}
        _write_json(record, {"training_seconds": seconds, "scores": scores, "complete": True})
        return
    with torch.no_grad():
        plain = measured.plain()
    _save(job.work / f"{job.name}.npy", lambda path: np.save(path, plain.cpu().numpy()))
    if job.kind == "splatfacto" and job.member:
        sigma = measured.own_sigma().cpu().numpy()
        _save(job.work / f"{job.name}_sigma.npy", lambda path: np.save(path, sigma))
    _write_json(record, {"training_seconds": seconds, "complete": bool(job.member)})
    if job.member:
        return
    targets, masks = measured.targets, measured.masks
    target, mask = targets.cpu().numpy(), masks.cpu().numpy()
    _save(job.work / f"{job.name}_truth.npz", lambda path: np.savez(path, target=target, mask=mask))
    view = job.views * 3 // 4
    maps = {
        "truth": target[view], "image": plain[view].cpu().numpy(),
        "error": (plain[view] - targets[view]).abs().mean(-1).cpu().numpy(),
    }  # fmt: skip
    result: dict[str, Any] = {
        "training_seconds": seconds,
        "error_of_views": [float(e[k].mean()) for e, k in zip((plain - targets).abs(), masks, strict=True)],
        "psnr_of_views": [arms.psnr(a, b) for a, b in zip(plain, targets, strict=True)],
        "parameters": sum(p.numel() for p in pipeline.model.parameters()),
        "ratios": measured.ratios,
        "scores": {},
        "failed": {},
    }
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(plain.shape, generator=generator).to(plain.device) * 0.1
    chosen: dict[str, Callable[[], Any]] = {
        name: run for name, run in measured.arms().items() if not job.only or name in job.only
    }
    first = dict(list(chosen.items())[:1])
    extra = {
        "1 - accumulation": lambda: (plain, (1 - measured.accumulation()).clamp(min=0).expand_as(plain)),
        "random": lambda: (plain, noise),
    }
    for name, estimate in {**first, **extra, **chosen}.items():
        try:
            with torch.no_grad():
                mean, sigma = estimate()
        except Exception as error:  # the other arms go on, unless the process is spoilt
            if "CUDA error" in repr(error):
                raise
            traceback.print_exc()
            result["failed"][name] = repr(error)[:300]
            continue
        result["scores"][name] = arms.score(mean, sigma, targets, masks, plain=plain)
        maps[f"sigma: {name}"] = sigma[view].mean(-1).cpu().numpy()
        if name == FUSED[job.kind]:
            _save(job.work / f"{job.name}_sigma.npy", lambda path, s=sigma: np.save(path, s.cpu().numpy()))
        _write_json(record, result)
        print(name, result["scores"][name], flush=True)
        halves = {key: value.astype(np.float16) for key, value in maps.items()}
        _save(job.work / f"{job.name}.npz", lambda path, kept=halves: np.savez_compressed(path, **kept))
    _write_json(record, {**result, "complete": True})


def time_arms(job: Any) -> None:
    """Seconds of each arm on one view of a trained model, taken in turns; nothing else should run."""
    import torch

    from benchmarks import nerfstudio_phdropout_arms as arms

    trainer = arms.trainer_config(job).setup(local_rank=0, world_size=1)
    trainer.setup(test_mode="test")
    pipeline = trainer.pipeline
    pipeline.model.load_state_dict(torch.load(job.work / f"{job.name}.pt", weights_only=True))
    pipeline.eval()
    measured = (arms.NerfArms if job.kind == "nerfacto" else arms.SplatArms)(job, pipeline)
    found = json.loads((job.work / f"{job.name}.json").read_text())
    measured.ratios.update(found["ratios"])
    measured.cameras = measured.cameras[:1]
    if job.kind == "nerfacto":
        measured.rays = measured.rays[:1]
    chosen = measured.arms()
    wanted = ("hidden units", "hash entries", "hash features", "authors' settings", "exact", "Monte Carlo")
    timed = {name: run for name, run in chosen.items() if name in wanted and name in measured.ratios}
    synchronize = torch.cuda.synchronize if job.device == "cuda" else lambda: None
    with torch.no_grad():
        samples = interleaved(
            {"one plain rendering": measured.plain, **timed}, repeats=5, synchronize=synchronize
        )
    _write_json(job.work / f"time_{job.name}.json", {"samples": samples, "trials": job.trials})


def _save(path: Path, write: Callable[[Path], Any]) -> None:
    """Write aside, then rename: readers see whole files."""
    aside = path.with_name(f"part_{path.name}")
    write(aside)
    os.replace(aside, path)


def _write_json(path: Path, content: Any) -> None:
    _save(path, lambda aside: aside.write_text(json.dumps(content, indent=1)))


def add_ensembles(work: Path, scene: int, kind: str, found: dict[str, Any], maps: dict[str, Any]) -> None:
    """Score the spread of the members that are there, at least two."""
    import torch

    from benchmarks.nerfstudio_phdropout_arms import score

    truth = work / f"{kind}{scene}_0_truth.npz"
    images = [np.load(path) for path in sorted(work.glob(f"{kind}{scene}_[0-9].npy"))]
    if len(images) < 2 or not truth.exists():
        return
    known = np.load(truth)
    stack = torch.from_numpy(np.stack(images))
    mean, sigma = stack.mean(0), stack.std(0)
    name = f"ensemble of {len(images)}"
    target, mask = torch.from_numpy(known["target"]), torch.from_numpy(known["mask"])
    kept = work / f"{kind}{scene}_ensemble{len(images)}.json"
    if not kept.exists():
        _write_json(kept, score(mean, sigma, target, mask, plain=stack[0]))
    found["scores"][name] = json.loads(kept.read_text())
    maps[f"sigma: {name}"] = sigma[len(sigma) * 3 // 4].mean(-1).numpy()


def fuse(work: Path, names: list[str]) -> dict[str, float] | None:
    """Errors of one scene's models and of their fusion, as far as they are judged; None below two."""
    import torch

    from benchmarks.nerfstudio_phdropout_arms import fusion

    names = [name for name in names if (work / f"{name}_sigma.npy").exists()]
    truths = [path for name in names if (path := work / f"{name}_truth.npz").exists()]
    if len(names) < 2 or not truths:
        return None
    images, sigmas = (
        torch.from_numpy(np.stack([np.load(work / f"{name}{suffix}.npy") for name in names]))
        for suffix in ("", "_sigma")
    )
    return fusion(images, sigmas, torch.from_numpy(np.load(truths[0])["target"]))


def draw(path: Path, maps: dict[str, dict[str, NDArray[np.float32]]], keep: tuple[str, ...] = ()) -> None:
    """Truth, image, error and sigmas, model after model; ``keep`` names those to show, else all but noise."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: list[list[tuple[str, NDArray[np.float32]]]] = []
    for kind, found in maps.items():
        shown = []
        for name, panel in found.items():
            if name == "sigma: random" or (keep and name.startswith("sigma") and name not in keep):
                continue
            title = kind if name == "image" else name.replace("sigma: ", "\u03c3: ")
            shown.append((title, panel.astype(np.float32)))
        panels += [shown[i : i + COLUMNS] for i in range(0, len(shown), COLUMNS)]
    size = (1.75 * COLUMNS, 2.2 * len(panels))
    figure, axes = plt.subplots(len(panels), COLUMNS, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, line in zip(axes, panels, strict=True):
        for axis, (title, values) in zip(row, line, strict=False):
            axis.set_title(textwrap.fill(title, 24), fontsize=7)
            if values.ndim == 3:
                axis.imshow(values.clip(0, 1))
            else:
                top = max(float(np.quantile(values, 0.995)), 1e-6)
                axis.imshow(values, cmap="magma" if title == "error" else "viridis", vmin=0, vmax=top)
    figure.tight_layout(pad=0.4, h_pad=1.2)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def collect(options: argparse.Namespace, started: float) -> dict[str, Any]:
    """Put together what the jobs have written so far, and write the result, and pictures and maps."""
    work, out = options.work, options.out
    results: dict[str, Any] = {}
    samples: dict[str, list[float]] = {}
    fused: dict[str, Any] = {}
    for scene in options.scenes:
        sheet: dict[str, Any] = {}
        for kind in KINDS:
            part, picture = work / f"{kind}{scene}_0.json", work / f"{kind}{scene}_0.npz"
            if not part.exists() or not picture.exists():
                continue
            found, maps = json.loads(part.read_text()), dict(np.load(picture))
            add_ensembles(work, scene, kind, found, maps)
            dropped = work / f"{kind}{scene}_trained.json"
            if dropped.exists():
                found["scores"] |= json.loads(dropped.read_text())["scores"]
            trained = [json.loads(p.read_text()) for p in sorted(work.glob(f"{kind}{scene}_[0-9].json"))]
            found["training_seconds"] = [member["training_seconds"] for member in trained]
            results[f"scene {scene}, {kind}"], sheet[kind] = found, maps
        if sheet:
            sets = {
                "nerfacto and splatfacto": [f"{kind}{scene}_0" for kind in KINDS],
                "splatfacto members": [f"splatfacto{scene}_{member}" for member in range(options.members)],
            }
            fused[f"scene {scene}"] = {what: fuse(work, names) for what, names in sets.items()}
        if sheet:
            draw(out / f"{NAME}_{scene}.png", sheet)
            flat = {f"{kind}|{name}": m for kind, maps in sheet.items() for name, m in maps.items()}
            halves = {name: m.astype(np.float16) for name, m in flat.items()}
            np.savez_compressed(out / f"{NAME}_{scene}.npz", **halves)
    for kind in KINDS:
        path = work / f"time_{kind}{options.scenes[0]}_0.json"
        if path.exists():
            timed = json.loads(path.read_text())["samples"]
            samples.update({f"{arm}, {kind}, one view": seconds for arm, seconds in timed.items()})
    write_result(
        NAME,
        question="Which uncertainty ranks and sizes the errors of half-circle captures best, at what cost?",
        headline=headlines(results, samples, fused),
        samples=samples,
        folder=out,
        results=results,
        fused_models=fused,
        settings={k: v for k, v in vars(options).items() if not isinstance(v, Path)},
        seconds=time.time() - started,
        note="training ran in parallel on shared GPUs: its seconds are an upper bound; samples ran alone",
    )
    files = [path for path in sorted(out.glob(f"{NAME}*")) if path.suffix != ".tar"]
    _save(out / f"{NAME}.tar", lambda path: _pack(path, files))
    return results


def _pack(path: Path, files: list[Path]) -> None:
    with tarfile.open(path, "w") as tar:
        for file in files:
            tar.add(file, file.name)


def headlines(
    results: dict[str, Any], samples: dict[str, list[float]], fused: dict[str, Any]
) -> list[Headline]:
    """Means over scenes with their span, of each arm and metric; of fusion; costs beside a rendering."""
    rows = []
    for what in dict.fromkeys(key for found in fused.values() for key in found):
        known = [found[what] for found in fused.values() if found[what]]
        for way in ("view", "pixel", "inverse_variance", "efficacy"):
            values = [
                found[way] if way == "efficacy"
                else found[way] / min(v for k, v in found.items() if k.startswith("model"))
                for found in known
            ]  # fmt: skip
            if values:
                label = (
                    "E_em" if way == "efficacy" else f"squared error of fusion by {way} / of the best model"
                )
                span = {"low": min(values), "high": max(values), "note": f"mean of {len(values)} scenes"}
                rows.append(Headline(f"{label}: {what}", statistics.fmean(values), "", **span))
    for kind in KINDS:
        scores = [found["scores"] for name, found in results.items() if name.endswith(kind)]
        arms = dict.fromkeys(arm for found in scores for arm in found)
        for metric in QUOTED:
            for arm in arms:
                values = [found[arm][metric] for found in scores if arm in found]
                known = [value for value in values if value is not None]
                if known:
                    note = f"mean of {len(known)} scenes"
                    span = {"low": min(known), "high": max(known), "note": note}
                    rows.append(Headline(f"{metric}, {kind}: {arm}", statistics.fmean(known), "", **span))
        plain = samples.get(f"one plain rendering, {kind}, one view")
        for name, seconds in samples.items():
            if plain and kind in name and not name.startswith("one plain"):
                ratios = [a / b for a, b in zip(seconds, plain, strict=True)]
                middle = statistics.median(ratios)
                what = f"{name} / one plain rendering"
                rows.append(Headline(what, middle, "x", low=min(ratios), high=max(ratios)))
    return rows


def jobs_in_order(options: argparse.Namespace) -> list[Any]:
    """First the models that are judged, then scene by scene the other members of their ensembles."""
    from benchmarks.nerfstudio_phdropout_arms import TRAINED, Job

    steps = {"nerfacto": options.nerf_steps, "splatfacto": options.splat_steps}
    kinds = [kind for kind in ("splatfacto", "nerfacto") if kind in options.kinds]
    order = [(kind, scene, 0) for kind in kinds for scene in options.scenes]
    for scene in options.scenes:
        order += [(kind, scene, member) for kind in kinds for member in range(1, options.members)]
        order += [(kind, scene, TRAINED) for kind in kinds]
    return [
        Job(
            kind, scene, member, options.work / f"scene{scene}_{options.resolution}", options.work,
            options.device, steps[kind], options.trials, options.stride, options.views,
            small=options.device == "cpu", only=tuple(options.arms),
        )
        for kind, scene, member in order
    ]  # fmt: skip


def run_all(options: argparse.Namespace, started: float) -> None:
    """Work through the jobs until done or out of budget, then time the first scene's models."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.nerfstudio_phdropout_arms"])
    jobs = jobs_in_order(options)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",") if options.device == "cuda" else [None]

    cursors = []

    def start(todo: list[Any], count: int, timing: bool = False) -> list[Any]:
        cursor = context.Value("i", 0)
        # A process finds the lock by name once it is up: it must outlive this call.
        cursors.append(cursor)
        return [launch(todo, cursor, i, timing) for i in range(count)]

    def launch(todo: list[Any], cursor: Any, place: int, timing: bool = False) -> Any:
        process = context.Process(target=work_through, args=(todo, cursor, gpus[place % len(gpus)], timing))
        process.start()
        return process

    running = start(jobs, options.jobs)
    told: set[str] = set()
    collected = started
    while any(process.is_alive() for process in running) and time.time() < started + options.budget - TIMING:
        time.sleep(0.3)
        for place, process in enumerate(running):
            if process.exitcode not in (None, 0) and cursors[0].value < len(jobs):
                running[place] = launch(jobs, cursors[0], place)
        done = {job.name for job in jobs if (options.work / f"{job.name}.json").exists()} - told
        for name in sorted(done):
            print(f"{time.time() - started:.0f} s: {name}", flush=True)
        told |= done
        if done and time.time() > collected + 15:
            collect(options, started)
            collected = time.time()
    _end(running)
    if not options.budget:
        return
    firsts = [job for job in jobs if job.scene == options.scenes[0] and job.member == 0]
    trained = [job for job in firsts if (options.work / f"{job.name}.pt").exists()]
    timed = start(trained, 1, timing=True)
    timed[0].join(max(started + options.budget - 8 - time.time(), 4))
    _end(timed)


def _end(processes: list[Any]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "phdropout_scenes")
    parser.add_argument("--budget", type=float, default=170, help="seconds in all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--jobs", type=int, default=3, help="processes at a time, spread over visible GPUs")
    parser.add_argument("--scenes", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--arms", nargs="+", default=[], help="names of those to judge, all by default")
    parser.add_argument("--members", type=int, default=5, help="models of an ensemble")
    parser.add_argument("--resolution", type=int, default=400)
    parser.add_argument("--train-views", type=int, default=20)
    parser.add_argument("--views", type=int, default=4, help="test views, on the whole orbit")
    parser.add_argument("--stride", type=int, default=3, help="map every so many pixels of a test view")
    parser.add_argument("--nerf-steps", type=int, default=700)
    parser.add_argument("--splat-steps", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=30, help="sub-networks of NeRF arms")
    parser.add_argument("--prepare", action="store_true", help="trace the scenes and stop")
    parser.add_argument(
        "--collect", action="store_true", help="put together what the work folder has, and stop"
    )
    parser.add_argument("--draw", type=Path, help="folder of saved maps: draw its sheets and stop")
    parser.add_argument("--keep", nargs="+", default=[], help="arms on the sheets that --draw makes")
    options = parser.parse_args()
    started = time.time()
    # Told to stop, it writes once more what there is.
    signal.signal(signal.SIGTERM, lambda *_: setattr(options, "budget", 0.0))
    # Processes are forked after their imports: the driver must not have been started by then.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # splatfacto compiles a few lines of camera algebra, which takes longer than it saves here.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.draw:
        for path in sorted(options.draw.glob(f"{NAME}_*.npz")):
            draw_saved(
                path, options.out / f"{path.stem}.png", tuple(f"sigma: {name}" for name in options.keep)
            )
        return 0
    if options.collect:
        collect(options, started)
        return 0
    for scene in options.scenes:
        folder = options.work / f"scene{scene}_{options.resolution}"
        trace_scene(folder, scene, options, len(os.sched_getaffinity(0)))
    print(f"scenes traced: {time.time() - started:.0f} s", flush=True)
    if options.prepare:
        return 0
    run_all(options, started)
    results = collect(options, started)
    for name, found in results.items():
        for arm, values in found["scores"].items():
            shown = {key: values[key] for key in ("foreground_spearman", "foreground_ause", "ause")}
            print(name, arm, {k: None if v is None else round(v, 3) for k, v in shown.items()})
    print(f"{time.time() - started:.0f} s in all", flush=True)
    return 0 if len(results) == len(options.kinds) * len(options.scenes) else 1


def draw_saved(path: Path, target: Path, keep: tuple[str, ...] = ()) -> None:
    """A sheet from maps that a run has saved."""
    sheet: dict[str, dict[str, Any]] = {}
    for key, values in np.load(path).items():
        kind, name = key.split("|")
        sheet.setdefault(kind, {})[name] = values
    draw(target, sheet, keep)


if __name__ == "__main__":
    sys.exit(main())
