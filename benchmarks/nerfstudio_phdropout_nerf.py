"""30 trials of nerfacto: whole renderings, or with everything before the first mask shared.

    python benchmarks/nerfstudio_phdropout_nerf.py [--out DIR]

Weights do not matter for time, so the model is not trained.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.common import RESULTS, Headline, interleaved, write_result  # noqa: E402
from benchmarks.nerfstudio_phdropout_arms import NoLPIPS  # noqa: E402
from nerfstudio_phdropout.synthetic import write_scene  # noqa: E402

TRIALS, RATIO = 30, 0.1
MODES = {"hidden": "hidden units", "features": "hash features", "table": "hash entries"}


@torch.no_grad()
def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--resolution", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_scene(Path(folder) / "scene", num_train=2, num_eval=1, resolution=options.resolution)
        from nerfstudio.configs.method_configs import all_methods
        from torchmetrics.image import lpip

        lpip.LearnedPerceptualImagePatchSimilarity = NoLPIPS  # type: ignore[misc]
        config = copy.deepcopy(all_methods["phd-nerfacto-tiny"].pipeline)
        config.datamanager.data = Path(folder) / "scene"
        config.model.phdropout.num_trials = TRIALS
        pipeline = config.setup(device="cpu", test_mode="test")
        pipeline.eval()
    model, camera = pipeline.model, pipeline.datamanager.eval_dataset.cameras[:1]

    settings = model.config.phdropout
    rows: list[Headline] = []
    samples: dict[str, list[float]] = {}
    for layers, what in MODES.items():
        settings.layers = layers

        def whole() -> torch.Tensor:
            return torch.stack([model.masked_rgb(camera, RATIO, trial) for trial in range(TRIALS)]).std(0)

        gap = float((whole() - model.moments_for_camera(camera, RATIO).std).abs().max())
        found = interleaved(
            {
                "one plain rendering": lambda: model.plain_rgb(camera),
                "30 whole renderings": whole,
                "30 trials, shared": lambda: model.moments_for_camera(camera, RATIO),
            },
            repeats=options.repeats,
        )
        samples.update({f"{arm}, {what}": seconds for arm, seconds in found.items()})
        median = {arm: statistics.median(seconds) for arm, seconds in found.items()}
        pairs = [a / b for a, b in zip(found["30 trials, shared"], found["30 whole renderings"], strict=True)]
        rows += [
            Headline(
                f"30 trials of {what}, shared / 30 whole renderings",
                median["30 trials, shared"] / median["30 whole renderings"],
                "x",
                low=min(pairs),
                high=max(pairs),
                target="<= 0.5",
            ),
            Headline(
                f"30 trials of {what}, shared / one plain rendering",
                median["30 trials, shared"] / median["one plain rendering"],
                "x",
            ),
            Headline(f"largest difference of sigma between the two, {what}", gap, "1"),
        ]
    write_result(
        "nerfstudio_phdropout_nerf",
        question="What do 30 trials of a NeRF cost when what precedes the first mask is computed once?",
        headline=rows,
        samples=samples,
        folder=options.out,
        trials=TRIALS,
        resolution=options.resolution,
    )
    for row in rows:
        print(f"{row.what}: {row.value:.4g} {row.unit}")


if __name__ == "__main__":
    main()
