"""The parts of a radiance field that know no framework: first layers, trunk, occlusion loss, critic."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from spe_layers.bands import Bands
from spe_layers.encoding import PositionalEncoding
from spe_layers.init import Init
from spe_layers.layer import SPE

FirstLayer = Literal["spe", "residual", "relu", "identity"]
SkipInput = Literal["encoding", "spe"]


class EncodedLinear(nn.Module):
    """``phi(W e(x) + b)`` with phi ReLU or nothing: the controls, of SPE's size."""

    def __init__(self, out_features: int, bands: Bands, *, relu: bool) -> None:
        super().__init__()
        self.encoding = PositionalEncoding(3, bands)
        self.linear = xavier_linear(self.encoding.out_features, out_features)
        self.relu = relu

    def forward(self, x: Tensor, covariance: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """[..., 3] -> [..., out_features]."""
        z = self.linear(self.encoding(x, covariance, mask))
        return F.relu(z) if self.relu else z


class ResidualFirstLayer(nn.Module):
    """``relu(W1 e(x) + b1) + sin(W2 r + b2)``, r = x repeated to the width of e (FineNeRFAdd)."""

    def __init__(self, out_features: int, bands: Bands) -> None:
        super().__init__()
        self.encoded = EncodedLinear(out_features, bands, relu=True)
        self.copies = bands.num_groups
        self.sine = xavier_linear(3 * self.copies, out_features)

    def forward(self, x: Tensor, covariance: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """[..., 3] -> [..., out_features]."""
        repeated = torch.cat([x] * self.copies, dim=-1)
        return self.encoded(x, covariance, mask) + torch.sin(self.sine(repeated))


class Trunk(nn.Module):
    """Eight layers from positions to features: a first layer by name, then ReLU (or sine) layers, one skip.

    After layer 4 the raw encoding e(x) is concatenated, as in the reference, or the first layer's output.

    Args:
        bands: of the position encoding.
        first_layer: ``spe`` is the paper's; ``residual`` the reference's default; the others are controls.
        init: of the SPE.
        width, layers: units of every layer, and how many there are with the first.
        skip_after: index of the layer after which the skip joins.
        skip_input: what joins there.
        all_sine: sine instead of ReLU in every layer.
    """

    def __init__(
        self,
        bands: Bands,
        *,
        first_layer: FirstLayer = "spe",
        init: Init = "uniform",
        width: int = 256,
        layers: int = 8,
        skip_after: int = 4,
        skip_input: SkipInput = "encoding",
        all_sine: bool = False,
    ) -> None:
        super().__init__()
        self.encoding = PositionalEncoding(3, bands)
        self.first = _first_layer(first_layer, width, bands, init)
        joined = self.encoding.out_features if skip_input == "encoding" else width
        self.hidden = nn.ModuleList(
            xavier_linear(width + (joined if i == skip_after + 1 else 0), width) for i in range(1, layers)
        )
        self.skip_after, self.skip_input, self.out_features = skip_after, skip_input, width
        self.activation = torch.sin if all_sine else F.relu

    def forward(self, x: Tensor, covariance: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Positions [..., 3] -> features [..., width]."""
        first = h = self.first(x, covariance, mask)
        for index, layer in enumerate(self.hidden, start=1):
            if index == self.skip_after + 1:
                joined = self.encoding(x, covariance, mask) if self.skip_input == "encoding" else first
                h = torch.cat([joined.to(h.dtype), h], dim=-1)
            h = self.activation(layer(h))
        return h


def _first_layer(name: FirstLayer, width: int, bands: Bands, init: Init) -> nn.Module:
    if name == "spe":
        return SPE(3, width, bands, init=init)
    if name == "residual":
        return ResidualFirstLayer(width, bands)
    if name in ("relu", "identity"):
        return EncodedLinear(width, bands, relu=name == "relu")
    raise ValueError(f"first_layer must be spe, residual, relu or identity, got {name!r}")


def xavier_linear(in_features: int, out_features: int) -> nn.Linear:
    """A Linear with Xavier weights and zero bias, as the reference has them."""
    linear = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def nyquist_octaves(pixel_size: float, scale: float) -> int:
    """Octaves whose frequencies two neighbouring pixels can tell apart; at least one.

    Args:
        pixel_size: distance between their rays where it is least, scene units: near plane over focal length.
        scale: radians per unit in the lowest octave.
    """
    return max(1, math.floor(math.log2(math.pi / (pixel_size * scale))) + 1)


def occlusion_loss(density: Tensor, distances: Tensor, *, samples: int, distance: float | None) -> Tensor:
    """Mean over all samples of density near the camera (FreeNeRF, equation 6).

    Args:
        density: [rays, S, 1]; distances: [rays, S, 1] from the camera, ascending along a ray.
        samples: how many first samples of a ray are near; what the reference does, whatever their distance.
        distance: if given, those closer than it instead.
    """
    if distance is not None:
        near = distances < distance
    else:
        near = (torch.arange(density.shape[-2], device=density.device) < samples)[:, None]
    return (density * near).mean()


class RayCritic(nn.Module):
    """Scores colours of rays: [..., 9] (origin, direction, colour) -> [..., 1]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(9, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, rays: Tensor) -> Tensor:
        """Score, unbounded."""
        return self.layers(rays)

    def losses(self, real: Tensor, fake: Tensor, *, wasserstein: bool) -> dict[str, Tensor]:
        """Both players' losses for one backward pass: neither reaches the other's parameters.

        ``critic_loss`` trains the critic on detached colours; ``adversarial_loss`` (x 0.01, or x 0.1 for
        Wasserstein, as in the paper) trains the field against a frozen critic.
        """
        frozen = {name: p.detach() for name, p in self.named_parameters()}
        against = functional_call(self, frozen, (fake,))
        on_real, on_fake = self(real), self(fake.detach())
        if wasserstein:
            return {"critic_loss": on_fake.mean() - on_real.mean(), "adversarial_loss": -0.1 * against.mean()}
        bce, ones = F.binary_cross_entropy_with_logits, torch.ones_like
        critic = bce(on_real, ones(on_real)) + bce(on_fake, torch.zeros_like(on_fake))
        return {"critic_loss": critic, "adversarial_loss": 0.01 * bce(against, ones(against))}

    @torch.no_grad()
    def clip(self, limit: float = 0.01) -> None:
        """Clip every weight, as the Wasserstein critic needs after each step."""
        for parameter in self.parameters():
            parameter.clamp_(-limit, limit)
