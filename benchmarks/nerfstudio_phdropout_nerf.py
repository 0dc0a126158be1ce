"""30 sub-networks of nerfacto: whole renderings, or with everything before the first mask shared.

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
from benchmarks.nerfstudio_phdropout_quality import prepare  # noqa: E402
from nerfstudio_phdropout.synthetic import write_scene  # noqa: E402

TRIALS, RATIO = 30, 0.1


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
        prepare(Path(folder))
        write_scene(Path(folder) / "scene", num_train=2, num_eval=1, resolution=options.resolution)
        from nerfstudio.configs.method_configs import all_methods

        config = copy.deepcopy(all_methods["phd-nerfacto-tiny"].pipeline)
        config.datamanager.data = Path(folder) / "scene"
        config.model.phdropout.num_trials = TRIALS
        pipeline = config.setup(device="cpu", test_mode="test")
        pipeline.eval()
    model, camera = pipeline.model, pipeline.datamanager.eval_dataset.cameras[:1]

    def whole_renderings() -> torch.Tensor:
        return torch.stack([model.masked_rgb(camera, RATIO, trial) for trial in range(TRIALS)]).std(0)

    gap = float((whole_renderings() - model.moments_for_camera(camera, RATIO).std).abs().max())
    samples = interleaved(
        {
            "one plain rendering": lambda: model.plain_rgb(camera),
            "30 whole renderings": whole_renderings,
            "30 trials, shared trunk": lambda: model.moments_for_camera(camera, RATIO),
        },
        repeats=options.repeats,
    )
    median = {arm: statistics.median(seconds) for arm, seconds in samples.items()}
    pairs = [
        a / b for a, b in zip(samples["30 trials, shared trunk"], samples["30 whole renderings"], strict=True)
    ]
    rows = [
        Headline(
            "30 trials with shared trunk / 30 whole renderings",
            median["30 trials, shared trunk"] / median["30 whole renderings"],
            "x",
            low=min(pairs),
            high=max(pairs),
            target="<= 0.5",
        ),
        Headline(
            "30 trials with shared trunk / one plain rendering",
            median["30 trials, shared trunk"] / median["one plain rendering"],
            "x",
        ),
        Headline("largest difference of sigma between the two", gap, "1"),
    ]
    write_result(
        "nerfstudio_phdropout_nerf",
        question="What do 30 sub-networks cost when what precedes the first mask is computed once?",
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
