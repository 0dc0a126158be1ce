"""Neural tangent kernels of networks whose first layer reads encoded coordinates.

``Theta_0 = e e'``, ``Theta_{l+1} = width K + Theta_l K'`` per hidden layer, where K and K' are the
expectations of phi(u) phi(v) and phi'(u) phi'(v) over the layer's Gaussian pre-activations. A kernel is a sum
over parameters, not a mean (Lee et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

if TYPE_CHECKING:
    from collections.abc import Iterator

# Expectations (K, K') from the covariance entries k11 [N1], k12 [N1, N2], k22 [N2].
_Dual = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _sine(k11: Tensor, k12: Tensor, k22: Tensor) -> tuple[Tensor, Tensor]:
    # In this order no exponential overflows: the exponents are never positive.
    mean = 0.5 * (k11[:, None] + k22[None, :])
    near, far = torch.exp(k12 - mean), torch.exp(-k12 - mean)
    return 0.5 * (near - far), 0.5 * (near + far)


def _relu(k11: Tensor, k12: Tensor, k22: Tensor) -> tuple[Tensor, Tensor]:
    norm = (k11[:, None] * k22[None, :]).sqrt()
    cosine = (k12 / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp(-1, 1)
    angle = torch.pi - torch.arccos(cosine)
    k = norm * ((1 - cosine**2).sqrt() + cosine * angle) / (2 * torch.pi)
    return k, angle / (2 * torch.pi)


def _identity(k11: Tensor, k12: Tensor, k22: Tensor) -> tuple[Tensor, Tensor]:
    return k12, torch.ones_like(k12)


_DUALS: dict[str, _Dual] = {"sine": _sine, "relu": _relu, "identity": _identity}


def closed_form_ntk(
    e1: Tensor, e2: Tensor, activations: Sequence[str], *, width: int, first_gain: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Infinite-width kernels over ENCODED features: standard parametrisation, no bias, scalar output.

    Args:
        e1, e2: features [N1, F] and [N2, F], float64 advised.
        activations: ``sine``, ``relu`` or ``identity``, one per hidden layer.
        width: units of every hidden layer.
        first_gain: the first layer's weights have variance first_gain / F, the others' 1 / width.

    Returns:
        (ntk, nngp), each [N1, N2].

    Raises:
        ValueError: unknown activation.
    """
    unknown = [name for name in activations if name not in _DUALS]
    if unknown:
        raise ValueError(f"unknown activation {unknown[0]!r}, known: {', '.join(_DUALS)}")
    variance = first_gain / e1.shape[1]
    theta = e1 @ e2.T
    k12, k11, k22 = variance * theta, variance * e1.square().sum(1), variance * e2.square().sum(1)
    for name in activations:
        k, k_prime = _DUALS[name](k11, k12, k22)
        k11, k22 = _diagonal(name, k11), _diagonal(name, k22)
        # A weight of the next layer has variance 1/width; so has its gradient's sum over units, times width.
        theta = width * k + theta * k_prime
        k12 = k
    return theta, k12


def _diagonal(name: str, k: Tensor) -> Tensor:
    """E phi(u)^2 for u of variance k."""
    if name == "sine":
        return -0.5 * torch.expm1(-2 * k)
    return k / 2 if name == "relu" else k


def gradient_flow(
    ntk_train: Tensor, ntk_test_train: Tensor, targets: Tensor, *, learning_rate: float, steps: float
) -> tuple[Tensor, Tensor]:
    """Predictions after gradient descent on ``0.5 sum (f - y)^2`` from f = 0, in the kernel's limit.

    Args:
        ntk_train: [N, N]; ntk_test_train: [M, N]; targets: [N] or [N, C].
        learning_rate, steps: their product is the time of the flow.

    Returns:
        (train [N(, C)], test [M(, C)]).
    """
    values, vectors = torch.linalg.eigh(ntk_train)
    time = learning_rate * steps
    # (1 - exp(-t lambda)) / lambda, which is t where lambda vanishes.
    positive = values.clamp_min(torch.finfo(values.dtype).tiny)
    response = torch.where(values > 0, -torch.expm1(-time * positive) / positive, time)
    weights = vectors @ (response.reshape(-1, *[1] * (targets.dim() - 1)) * (vectors.T @ targets))
    return ntk_train @ weights, ntk_test_train @ weights


def leave_one_out(kernel: Tensor, targets: Tensor, *, ridge: float = 1e-3) -> float:
    """Mean squared leave-one-out error of kernel ridge regression: mean of (alpha_i / (K^-1)_ii)^2.

    Args:
        kernel: [N, N]; ``ridge * trace / N`` is added to its diagonal.
        targets: [N] or [N, C]; their mean is removed.
    """
    targets = targets.reshape(targets.shape[0], -1).to(kernel)
    targets = targets - targets.mean(0)
    shift = ridge * kernel.diagonal().mean()
    identity = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    factor = torch.linalg.cholesky(kernel + shift * identity)
    inverse = torch.cholesky_inverse(factor)
    return float(((inverse @ targets) / inverse.diagonal()[:, None]).square().mean())


def empirical_ntk(module: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """Inner products of parameter gradients, [N1, N2], of a module with one scalar output a point.

    Every parameter that requires a gradient counts.
    """
    parameters = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}

    def output(values: dict[str, Tensor], point: Tensor) -> Tensor:
        return functional_call(module, values, (point,)).squeeze()

    with _eager_backend(module):
        gradients = vmap(grad(output), (None, 0))
        j1, j2 = gradients(parameters, x1), gradients(parameters, x2)
    return torch.stack([j1[n].flatten(1) @ j2[n].flatten(1).T for n in parameters]).sum(0)


@contextmanager
def _eager_backend(module: nn.Module) -> Iterator[None]:
    """The fused kernels have no rule for vmap; plain torch has."""
    layers = [m for m in module.modules() if getattr(m, "backend", None) in ("auto", "triton")]
    previous = [layer.backend for layer in layers]
    try:
        for layer in layers:
            layer.backend = "eager"  # type: ignore[assignment]
        yield
    finally:
        for layer, backend in zip(layers, previous, strict=True):
            layer.backend = backend
