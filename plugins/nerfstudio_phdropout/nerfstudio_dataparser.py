"""``phd-synthetic``: reads folders of `synthetic.write_scene` and keeps the alpha channel of their images."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.plugins.registry_dataparser import DataParserSpecification
from PIL import Image


@dataclass
class PHDSyntheticDataParserConfig(DataParserConfig):
    """Procedural scenes of PH-Dropout."""

    _target: type = field(default_factory=lambda: PHDSyntheticDataParser)
    data: Path = Path("data/phd-synthetic")
    """Folder of the scene."""
    load_3D_points: bool = True
    """Give the surface points seen in training as seed points of Gaussians."""
    max_points: int = 20_000
    """How many seed points at most."""


class PHDSyntheticDataParser(DataParser):
    """Poses as Blender writes them; images with alpha, so metrics can tell the foreground."""

    config: PHDSyntheticDataParserConfig

    def _generate_dataparser_outputs(self, split: str = "train", **_kwargs: Any) -> DataparserOutputs:
        folder = Path(self.config.data)
        source = folder / f"transforms_{split}.json"
        if not source.exists():
            raise FileNotFoundError(
                f"{source} does not exist; write_scene of nerfstudio_phdropout.synthetic makes one"
            )
        content = json.loads(source.read_text())
        images = [folder / f"{frame['file_path']}.png" for frame in content["frames"]]
        poses = torch.tensor([frame["transform_matrix"] for frame in content["frames"]], dtype=torch.float32)
        with Image.open(images[0]) as first:
            width, height = first.size
        focal = 0.5 * width / math.tan(0.5 * content["camera_angle_x"])
        cameras = Cameras(
            camera_to_worlds=poses[:, :3],
            fx=focal,
            fy=focal,
            cx=width / 2,
            cy=height / 2,
            width=width,
            height=height,
            camera_type=CameraType.PERSPECTIVE,
        )
        metadata = {}
        if self.config.load_3D_points:
            points = np.load(folder / "points.npz")
            metadata = {
                "points3D_xyz": torch.from_numpy(points["xyz"][: self.config.max_points]),
                "points3D_rgb": torch.from_numpy(points["rgb"][: self.config.max_points]),
            }
        return DataparserOutputs(
            image_filenames=images,
            cameras=cameras,
            scene_box=SceneBox(aabb=torch.tensor([[-1.5, -1.5, -1.5], [1.5, 1.5, 1.5]])),
            metadata=metadata,
        )


phd_synthetic = DataParserSpecification(
    config=PHDSyntheticDataParserConfig(), description="Procedural scenes of nerfstudio_phdropout.synthetic"
)
