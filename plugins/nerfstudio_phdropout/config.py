"""Settings of PH-Dropout, the same for NeRF and splats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nerfstudio_phdropout.checks import check_open_unit, check_ratio


@dataclass
class PHDropoutConfig:
    """How the uncertainty of a trained model is estimated."""

    ratio: float | None = None
    """Share of parameters dropped, in [0, 1). None: the sidecar, else a search after training."""
    sidecar: str | None = None
    """File that holds the ratio found for the checkpoint; a path like nerfstudio's own ``output_dir``."""
    margin: float = 0.05
    """Share of training-view quality that the search may give up, in (0, 1)."""
    quality: Literal["ssim", "psnr", "expected_psnr"] = "ssim"
    """What the search keeps up. ``expected_psnr`` needs no random masks (splats only)."""
    search: Literal["bisection", "linear"] = "bisection"
    """Order in which ratios are tried. ``linear`` is the authors' scan."""
    first_violating: bool = False
    """Return the first ratio that fails, as the authors' code does, instead of the last that passes."""
    estimator: Literal["auto", "exact", "monte_carlo"] = "auto"
    """``auto``: exact for splats, Monte Carlo for NeRF."""
    num_trials: int = 30
    """Masks drawn by Monte Carlo, at least 2."""
    mask: Literal["trial", "sample"] = "trial"
    """NeRF: one mask a trial (a sub-network), or another for every 3-D sample (the authors' code)."""
    layers: Literal["auto", "first", "hidden", "features", "table"] = "auto"
    """NeRF: what is dropped. ``first``, ``hidden``: units of those layers of each MLP; ``features``: outputs
    of the hash encoding; ``table``: entries of its table; ``auto``: ``table`` where there is one."""
    rescale: bool = True
    """NeRF: divide what is kept by 1 - ratio."""
    mask_proposal_networks: bool = False
    """NeRF: drop units of proposal networks too."""
    quantize: bool = False
    """Round each trial image to 8 bits, as writing and reading PNG files does."""
    search_views: int = 8
    """Training views that the search renders, spread over the capture; 0 for all."""
    seed: int = 0
    """Seed of every mask."""

    def __post_init__(self) -> None:
        """Refuse impossible values where they are written, not where they are used."""
        if self.ratio is not None:
            check_ratio(self.ratio)
        check_open_unit("margin", self.margin)
        if self.num_trials < 2:
            raise ValueError(f"num_trials must be at least 2 for an unbiased variance, got {self.num_trials}")
        if self.mask == "sample" and self.layers in ("features", "table"):
            raise ValueError(
                f"layers={self.layers!r} has one mask a trial; mask='sample' is for hidden units"
            )
        if self.search_views < 0:
            raise ValueError(f"search_views must be 0 (all) or positive, got {self.search_views}")

    @classmethod
    def reference(cls, kind: Literal["nerf", "splat"]) -> PHDropoutConfig:
        """The settings of the authors' code: linear scan, first failing ratio, 8-bit trial images.

        Args:
            kind: ``nerf`` (30 trials, first layers, a mask a 3-D sample) or ``splat`` (100 trials).

        Raises:
            ValueError: another ``kind``.
        """
        if kind not in ("nerf", "splat"):
            raise ValueError(f"kind must be 'nerf' or 'splat', got {kind!r}")
        return cls(
            search="linear",
            first_violating=True,
            estimator="monte_carlo",
            num_trials=30 if kind == "nerf" else 100,
            mask="sample",
            layers="first",
            quantize=True,
            search_views=0,
        )
