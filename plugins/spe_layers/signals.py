"""Data for studies of spectral bias that need no download."""

from __future__ import annotations

import json
from importlib.resources import files

import torch
from torch import Tensor


def paper_signal() -> tuple[Tensor, Tensor]:
    """The signal of the paper's 1-D study: coordinates [256, 1] on [0, 1) and values [256], float64.

    A random signal whose spectrum falls as 1/frequency and is zero in its upper three quarters. Every eighth
    sample is for training.
    """
    text = files("spe_layers").joinpath("data/paper_signal.json").read_text()
    values = torch.tensor(json.loads(text)["values"], dtype=torch.float64)
    return torch.arange(len(values), dtype=torch.float64)[:, None] / len(values), values


def power_law_signal(samples: int, power: float = 1.0, *, seed: int = 0) -> Tensor:
    """A random periodic signal [samples] (float64) in [-1/2, 1/2], of the kind of the paper's.

    Its spectrum falls as frequency^-power and is zero in its upper three quarters.
    """
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(samples, dtype=torch.complex128, generator=generator)
    frequency = torch.fft.fftfreq(samples, 1 / samples, dtype=torch.float64).abs() + 1
    decay = frequency**-power
    decay[samples // 4 :] = 0
    signal = torch.fft.ifft(raw * decay).real
    return (signal - signal.min()) / (signal.max() - signal.min()) - 0.5


def image_halves(name: str, size: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """A grey picture of scikit-image, cut into the two colours of a checkerboard.

    Args:
        name: a function of ``skimage.data`` whose picture comes with the package: astronaut, brick, camera,
            cat, coffee, moon, page, text, ...
        size: side of the square it is resized to.

    Returns:
        coordinates [size^2, 2] on [-1, 1], values [size^2] on [-1, 1] (both float32), and which of
        them are for training [size^2] (bool).
    """
    from skimage import color, data, transform

    picture = getattr(data, name)()
    if picture.ndim == 3:
        picture = color.rgb2gray(picture[..., :3])
    side = min(picture.shape)
    top, left = ((length - side) // 2 for length in picture.shape)
    square = picture[top : top + side, left : left + side]
    small = torch.from_numpy(transform.resize(square, (size, size), anti_aliasing=True)).float()
    axis = torch.linspace(-1, 1, size)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    checker = (torch.arange(size)[:, None] + torch.arange(size)[None, :]) % 2 == 0
    return torch.stack([rows, columns], -1).reshape(-1, 2), small.flatten() * 2 - 1, checker.flatten()
