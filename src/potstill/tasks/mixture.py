"""Points of a two-dimensional Gaussian mixture, whose densities, scores and optimal denoiser are known exactly."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.batch import PointBatch
from potstill.contracts.errors import DataError
from potstill.noise.mixture import GaussianMixture
from potstill.tasks.base import Source, sample_ids


@dataclass
class Points:
    """Points in memory. points [N, D] float32."""

    points: Tensor

    def __len__(self) -> int:
        return len(self.points)

    def batch(self, rows: Tensor, epoch: int = 0) -> PointBatch:
        return PointBatch(sample_ids(rows, epoch, len(self)), self.points[rows])


def mixture(
    modes: int = 8,
    radius: float = 1.0,
    std: float = 0.05,
    imbalance: float = 1.0,
    size: int = 10000,
    test_size: int = 2000,
) -> Source:
    """A ring of `modes` round Gaussians, kind "points". The exact density is `context["mixture"]`.

    imbalance: weight of the heaviest mode over the lightest; the weights between fall geometrically.
    """
    if modes < 1 or radius <= 0 or std <= 0:
        raise DataError(f"mixture needs modes >= 1, radius > 0 and std > 0, got {modes}, {radius:g} and {std:g}.")
    if imbalance < 1:
        raise DataError(f"data.imbalance is the heaviest weight over the lightest, at least 1, got {imbalance:g}.")
    if size < 1 or test_size < 1:
        raise DataError(f"data.size and data.test_size must be positive, got {size} and {test_size}.")
    weights_K = imbalance ** -(torch.arange(modes) / max(modes - 1, 1))
    density = GaussianMixture(GaussianMixture.ring(modes, radius, std).means_KD, std, weights=weights_K)
    train, test = (
        Points(density.sample(torch.arange(count), seed=keyed.key("mixture", part)))
        for part, count in (("train", size), ("test", test_size))
    )
    return Source(
        "mixture",
        "points",
        train,
        test,
        {"dimension": 2, "mixture": density},
        {"teacher": {"name": "mlp-denoiser"}, "student": {"name": "mlp-denoiser"}},
        {"steps": 3000, "batch": 256, "lr": 1e-3},
        score=lambda points_BD: against(density, points_BD),
    )


def against(density: GaussianMixture, points_BD: Tensor) -> dict[str, float]:
    """How generated points stand to the exact mixture.

    log_density: mean exact log-density in nats. near: share within 3 standard deviations of their mode's centre (98.9%
    of the density's own points in two dimensions). modes: modes with at least a tenth of their due of near points.
    mode_kl: KL(found || due) in nats of the modes' shares among near points, inf where no point is near.
    """
    points_BD = points_BD.detach().to(density.means_KD)
    nearest_B = density.responsibilities(points_BD).argmax(-1)
    spread_BD = density.variances_KD[nearest_B]
    off_BD = torch.einsum("bd,bde->be", points_BD - density.means_KD[nearest_B], density.axes_KDD[nearest_B])
    near_B = (off_BD**2 / spread_BD).sum(-1).sqrt() <= 3.0
    due_K = density.log_weights_K.exp()
    counts_K = nearest_B[near_B].bincount(minlength=len(due_K)).to(due_K)
    found_K = counts_K / counts_K.sum()
    enough_K = counts_K >= 0.1 * due_K * len(points_BD)
    kl = torch.special.xlogy(found_K, found_K / due_K).sum().item() if near_B.any() else math.inf
    return {
        "log_density": density.log_density(points_BD).mean().item(),
        "near": near_B.double().mean().item(),
        "modes": float(enough_K.sum()),
        "mode_kl": kl,
    }
