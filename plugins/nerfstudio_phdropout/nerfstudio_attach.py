"""``ns-phdropout``: give a run that exists already an uncertainty, without training.

It writes a sibling run ``<output_dir>/<experiment>/phd-<method>/<timestamp>``: the same weights in a plain
checkpoint, and the drop ratio beside it. ns-eval, ns-render and ns-viewer work on that run.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
import yaml
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.engine.trainer import TrainerConfig

from nerfstudio_phdropout.config import PHDropoutConfig
from nerfstudio_phdropout.nerfstudio_models import TWINS
from nerfstudio_phdropout.sidecar import sidecar_path, write_sidecar


@dataclass
class Attach:
    """Search the drop ratio of a trained run and write a run with uncertainty beside it."""

    load_config: Path
    """config.yml of the trained run."""
    ratio: float | None = None
    """Use this drop ratio instead of searching one."""
    margin: float = 0.05
    """Share of training-view quality that the search may give up."""
    output_dir: Path | None = None
    """Where the new run goes; the plain run's output folder if not given."""

    def main(self) -> None:
        """Write the run and print the path of its config."""
        print(attach(self.load_config, ratio=self.ratio, margin=self.margin, output_dir=self.output_dir))


def twin_config(config: TrainerConfig, settings: PHDropoutConfig) -> TrainerConfig:
    """The same run with the PH-Dropout form of its model.

    Raises:
        ValueError: the method has no such form.
    """
    model = config.pipeline.model
    twin = copy.deepcopy(config)
    if hasattr(model, "phdropout"):
        twin.pipeline.model.phdropout = settings
        return twin
    if type(model) not in TWINS:
        supported = ", ".join(name.removeprefix("phd-") for name, _ in TWINS.values())
        raise ValueError(f"{config.method_name} has no PH-Dropout form; supported methods: {supported}")
    name, model_config = TWINS[type(model)]
    values = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name != "_target"}
    twin.pipeline.model = model_config(**copy.deepcopy(values), phdropout=settings)
    twin.method_name = name
    return twin


def attach(
    load_config: Path, *, ratio: float | None = None, margin: float = 0.05, output_dir: Path | None = None
) -> Path:
    """See `Attach`. Nothing is written before the search has succeeded.

    Returns:
        The new config.yml.

    Raises:
        ValueError: a method without PH-Dropout form, or a bad ratio or margin.
        FileNotFoundError: no config or no checkpoint.
        FileExistsError: the new run is there already.
        RuntimeError: fused tinycudann networks.
    """
    settings = PHDropoutConfig(ratio=ratio, margin=margin)
    if not load_config.exists():
        raise FileNotFoundError(f"{load_config} does not exist; give the config.yml of a trained run")
    # nerfstudio keeps its configs as YAML of Python objects: load only runs you trust, as with ns-eval.
    config = yaml.load(load_config.read_text(), Loader=yaml.Loader)
    if not isinstance(config, TrainerConfig):
        raise ValueError(f"{load_config} is not the config.yml of a nerfstudio run")
    twin = twin_config(config, settings)
    checkpoint = _latest_checkpoint(load_config.parent / config.relative_model_dir)
    if output_dir is not None:
        twin.output_dir = output_dir
    target = twin.get_base_dir()
    if target.exists() and target.resolve() != load_config.parent.resolve():
        raise FileExistsError(f"{target} exists already; remove it or choose another --output-dir")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    plain = {"step": state["step"], "pipeline": state["pipeline"]}
    found: Any = ratio if ratio is not None else _search(twin, plain)
    new = twin.get_checkpoint_dir() / checkpoint.name
    new.parent.mkdir(parents=True, exist_ok=True)
    if new.resolve() != checkpoint.resolve():
        torch.save(plain, new)
        transforms = load_config.parent / "dataparser_transforms.json"
        if transforms.exists():
            shutil.copy(transforms, target)
    write_sidecar(new, settings, found)
    settings.ratio, settings.sidecar = None, str(sidecar_path(new))
    twin.load_dir = None
    twin.save_config()
    return target / "config.yml"


def _latest_checkpoint(folder: Path) -> Path:
    checkpoints = sorted(folder.glob("step-*.ckpt"))
    if not checkpoints:
        raise FileNotFoundError(f"no step-*.ckpt in {folder}")
    return checkpoints[-1]


def _search(config: TrainerConfig, state: dict[str, Any]) -> Any:
    config = copy.deepcopy(config)
    config.pipeline.datamanager._target = all_methods[config.method_name].pipeline.datamanager._target
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = config.pipeline.setup(device=device, test_mode="test")
    pipeline.eval()
    pipeline.load_pipeline(state["pipeline"], state["step"])
    return pipeline.model.search_ratio(pipeline.datamanager.train_dataset)


def entrypoint() -> None:
    """Console script; errors of the user's input print one line."""
    try:
        tyro.cli(Attach).main()
    except (ValueError, FileNotFoundError, FileExistsError, RuntimeError) as error:
        sys.exit(f"ns-phdropout: {error}")


if __name__ == "__main__":
    entrypoint()
