"""``SPE``: the first layer of a network over coordinates."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from spe_layers.bands import Bands, as_bands
from spe_layers.eager import phase_eager
from spe_layers.encoding import positional_encoding
from spe_layers.functional import Backend, check_backend, check_sizes, spe
from spe_layers.init import Init, check_init, initialise
from spe_layers.selection import select_bands

# Coordinates beyond this are far outside what the initialisations and the usual bands assume.
USUAL_RANGE = 4.0


class SPE(nn.Module):
    """Sinusoidal positional encoding: ``y = sin(W e(x) + b)``, [..., in_features] -> [..., out_features].

    It stands in place of the first ``Linear + ReLU`` of a network over encoded coordinates and has the same
    parameters as that Linear (McIntosh et al., ICML 2024, section 4). W is what other sine layers call omega;
    there is no further frequency to set.

    Args:
        in_features: number of coordinates D.
        out_features: number of units H.
        bands: L bands or their number (octaves). ``SPE.from_coordinates`` chooses them from the data.
        bias: whether there is a bias b.
        init: ``linear``, ``lecun``, ``uniform`` or ``calibrated``; see ``spe_layers.init.initialise``.
        phase_std: standard deviation of the phases under ``calibrated``, radians.
        backend: ``auto``, ``eager`` or ``triton``; see ``spe_layers.spe``.
        device, dtype: of the parameters.

    Attributes:
        weight: W [H, F], F = bands.num_features(D).
        bias: b [H] or None. The state dict holds these two alone.

    Raises:
        ValueError: unknown init or backend, sizes below one, coordinates of another size, NaN or infinity in
            them (looked for in every call on the CPU, in the first call elsewhere, never while compiling).
        TypeError: integer coordinates.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bands: int | Bands = 10,
        *,
        bias: bool = True,
        init: Init = "linear",
        phase_std: float = 1.0,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_init(init, phase_std)
        check_backend(backend)
        if in_features < 1 or out_features < 1:
            raise ValueError(f"SPE needs sizes of at least 1, got {in_features} -> {out_features}")
        self.in_features, self.out_features = in_features, out_features
        self.bands = as_bands(bands)
        self.init, self.phase_std, self.backend = init, phase_std, backend
        features = self.bands.num_features(in_features)
        self.weight = nn.Parameter(torch.empty(out_features, features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self._range_checked = False
        self.reset_parameters()

    @classmethod
    def from_coordinates(
        cls,
        coordinates: Tensor,
        out_features: int,
        targets: Tensor | None = None,
        *,
        init: Init = "calibrated",
        **kwargs: Any,
    ) -> SPE:
        """A layer whose bands are chosen from training coordinates [N, D], better with targets [N] or [N, C].

        See ``select_bands`` for how; further arguments are those of ``SPE``.
        """
        bands = select_bands(coordinates, targets)
        return cls(coordinates.shape[-1], out_features, bands, init=init, **kwargs)

    def reset_parameters(self) -> None:
        """Draw new parameters."""
        initialise(
            self.init,
            self.weight,
            self.bias,
            self.bands,
            in_features=self.in_features,
            phase_std=self.phase_std,
        )

    def forward(self, x: Tensor, covariance: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """sin(W e(x) + b): [..., D] -> [..., H]; covariance and mask as in ``positional_encoding``."""
        self.check_coordinates(x)
        return spe(
            x, self.weight, self.bias, self.bands, covariance=covariance, mask=mask, backend=self.backend
        )

    def encode(self, x: Tensor, covariance: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """e(x): [..., D] -> [..., F]; what the reference concatenates at the skip connection."""
        self.check_coordinates(x)
        return positional_encoding(x, self.bands, covariance=covariance, mask=mask)

    def phase(self, x: Tensor, covariance: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """W e(x) + b, the argument of the sine: [..., D] -> [..., H], float32 or float64."""
        self.check_coordinates(x)
        check_sizes(x, self.weight, self.bias, self.bands)
        return phase_eager(x, self.weight, self.bias, self.bands, covariance=covariance, mask=mask)

    def extra_repr(self) -> str:
        """Sizes and bands, for ``print(module)``."""
        bands = self.bands
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bands={bands.num_bands}, "
            f"max_frequency={bands.max_frequency:.4g}, bias={self.bias is not None}, init={self.init!r}"
        )

    def check_coordinates(self, x: Tensor) -> None:
        """Refuse coordinates of another size, and NaN or infinity where the values may be looked at."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            size = x.shape[-1] if x.dim() else "a scalar"
            raise ValueError(
                f"SPE expects coordinates of size {self.in_features} in the last dimension, got {size}"
            )
        if not _values_readable(x) or (self._range_checked and x.device.type != "cpu"):
            return
        if x.is_floating_point() and x.numel():
            self._check_values(x.detach())

    def _check_values(self, x: Tensor) -> None:
        finite = x.isfinite()
        if not finite.all():
            row = int((~finite.reshape(-1, self.in_features).all(-1)).nonzero()[0])
            raise ValueError(f"coordinates contain NaN or infinity at row {row}")
        if self._range_checked:
            return
        self._range_checked = True
        low, high = x.min().item(), x.max().item()
        if self.bands.include_input and max(-low, high) > USUAL_RANGE:
            warnings.warn(
                f"SPE got coordinates from {low:.4g} to {high:.4g}; it is initialised for about [-1, 1]. "
                "Scale them, or let spe_layers.select_bands choose bands for their range",
                stacklevel=4,
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(prefix + "weight")
        if found is not None and found.dim() == 2 and found.shape[1] != self.weight.shape[1]:
            error_msgs = args[-1]
            error_msgs.append(
                f"{prefix}weight: checkpoint has {self._describe(found.shape[1])}, layer has "
                f"{self._describe(self.weight.shape[1])}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _describe(self, features: int) -> str:
        """A number of features, with the bands it means where it means any."""
        bands, rest = divmod(features // self.in_features - int(self.bands.include_input), 2)
        if features % self.in_features or rest or bands < 0:
            return f"{features} features"
        return f"{features} features ({bands} bands of {self.in_features} coordinates)"


def _values_readable(x: Tensor) -> bool:
    """Whether Python may look at the values: not while compiling or tracing, nor inside torch.func."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or x.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(x)  # no public question for it
    )
