"""Gaussian mixtures under Gaussian noise: exact density, score, optimal denoiser and samples at every noise level.

    x0 ~ sum_k w_k N(m_k, C_k);  x = x0 + sigma eps  =>  x ~ sum_k w_k N(m_k, C_k + sigma^2 I)
    D(x; sigma) = sum_k P(k | x) [m_k + C_k (C_k + sigma^2 I)^-1 (x - m_k)],  score = (D - x) / sigma^2

K components, D features. Points may have any shape [B, ...] with D numbers each.
"""

import math

import torch
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.errors import DataError
from potstill.noise.gaussian import levels


class GaussianMixture:
    """`stds` is a number, [K] or [K, D]; or give `covariances` [K, D, D]. `weights` [K] need no normalising."""

    def __init__(
        self,
        means_KD: Tensor,
        stds: Tensor | float | None = None,
        *,
        covariances: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        if means_KD.ndim != 2 or len(means_KD) == 0:
            raise DataError(f"GaussianMixture needs means [K, D], got {list(means_KD.shape)}.")
        if (stds is None) == (covariances is None):
            raise DataError("GaussianMixture needs exactly one of stds and covariances.")
        count, width = means_KD.shape
        self.means_KD = means_KD
        if covariances is None:
            std = torch.as_tensor(stds, dtype=means_KD.dtype, device=means_KD.device)
            std_KD = (std[:, None] if std.ndim == 1 else std).expand(count, width)
            self.variances_KD = std_KD**2  # along the axes of each component
            self.axes_KDD = torch.eye(width, dtype=means_KD.dtype, device=means_KD.device).expand(count, width, width)
        else:
            if covariances.shape != (count, width, width):
                raise DataError(
                    f"GaussianMixture.covariances must be [{count}, {width}, {width}], got {list(covariances.shape)}."
                )
            self.variances_KD, self.axes_KDD = torch.linalg.eigh(covariances.to(means_KD))  # columns are the axes
        if not (self.variances_KD >= 0).all():
            raise DataError("GaussianMixture needs non-negative stds or positive semi-definite covariances.")
        given = torch.ones(count) if weights is None else weights
        if given.shape != (count,) or not (given >= 0).all() or not given.sum() > 0:
            raise DataError(f"GaussianMixture.weights must be {count} non-negative numbers, got {given.tolist()}.")
        self.log_weights_K = (given / given.sum()).to(means_KD).log()

    @classmethod
    def ring(
        cls, modes: int = 8, radius: float = 1.0, std: float = 0.05, dtype: torch.dtype = torch.float32
    ) -> "GaussianMixture":
        """Equal modes on a circle in the plane."""
        angle = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
        return cls((radius * torch.stack([angle.cos(), angle.sin()], -1)).to(dtype), std)

    @classmethod
    def grid(
        cls, side: int = 5, spacing: float = 0.5, std: float = 0.05, dtype: torch.dtype = torch.float32
    ) -> "GaussianMixture":
        """Equal modes on a centred square grid in the plane."""
        line = spacing * (torch.arange(side, dtype=dtype) - (side - 1) / 2)
        return cls(torch.cartesian_prod(line, line), std)

    @property
    def features(self) -> int:
        return self.means_KD.shape[1]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "GaussianMixture":
        moved = object.__new__(GaussianMixture)
        moved.__dict__ = {name: value.to(device=device, dtype=dtype) for name, value in self.__dict__.items()}
        return moved

    def _axes(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets from the means along each component's axes, noised variances there, joint log-densities."""
        flat_BD = x.flatten(1)
        if flat_BD.shape[1] != self.features:
            raise ValueError(f"Points must have {self.features} numbers each, got {list(x.shape)}.")
        offset_BKD = torch.einsum("bkd,kde->bke", flat_BD[:, None] - self.means_KD, self.axes_KDD)
        variance_BKD = self.variances_KD + levels(sigma, x).to(self.means_KD.dtype)[:, None, None] ** 2
        joint_BK = self.log_weights_K - 0.5 * (
            offset_BKD**2 / variance_BKD + variance_BKD.log() + math.log(2 * math.pi)
        ).sum(-1)
        return offset_BKD, variance_BKD, joint_BK

    def log_density(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """Log-density in nats of the mixture noised to level sigma. [B]."""
        return self._axes(x, sigma)[2].logsumexp(-1)

    def responsibilities(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """P(component | x) at level sigma. [B, K]."""
        return self._axes(x, sigma)[2].softmax(-1)

    def score(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """Gradient of log_density with respect to x. [B, ...]."""
        offset_BKD, variance_BKD, joint_BK = self._axes(x, sigma)
        pull_BKD = torch.einsum("bke,kde->bkd", offset_BKD / variance_BKD, self.axes_KDD)
        return -(joint_BK.softmax(-1)[..., None] * pull_BKD).sum(1).view(x.shape)

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The optimal denoiser E[x0 | x0 + sigma eps = x]. [B, ...], differentiable in x."""
        offset_BKD, variance_BKD, joint_BK = self._axes(x, sigma)
        shrunk_BKD = torch.einsum("bke,kde->bkd", offset_BKD * (self.variances_KD / variance_BKD), self.axes_KDD)
        return (joint_BK.softmax(-1)[..., None] * (self.means_KD + shrunk_BKD)).sum(1).view(x.shape).to(x.dtype)

    def sample(self, ids_B: Tensor, seed: int = 0, sigma: float = 0.0) -> Tensor:
        """Points of the mixture (noised to sigma), each a function of (seed, id) alone. [B, D]."""
        ids_B = ids_B.to(self.means_KD.device)
        u_B = keyed.uniform(keyed.key(seed, "component"), ids_B)
        chosen_B = torch.searchsorted(self.log_weights_K.double().exp().cumsum(0), u_B).clamp_max(
            len(self.means_KD) - 1
        )
        eps_BD = keyed.normal_like(keyed.key(seed, "within"), ids_B, self.means_KD[chosen_B])
        along_BD = eps_BD * (self.variances_KD[chosen_B] + sigma**2).sqrt()
        return self.means_KD[chosen_B] + torch.einsum("be,bde->bd", along_BD, self.axes_KDD[chosen_B])
