"""How far generated samples are from real ones. Pure functions of two sets of features [N, D] and [M, D].

Features are whatever the caller compares: points as they are, pixels, or a classifier's activations. Everything is
computed in float64. Images are flattened.

Sources: Frechet distance, Heusel et al. (arXiv 1706.08500); energy distance, Szekely and Rizzo (2013); MMD, Gretton et al.
(JMLR 13, 2012); sliced Wasserstein, Bonneel et al. (2015); precision and recall, Kynkaanniemi et al. (arXiv 1904.06991);
density and coverage, Naeem et al. (arXiv 2002.09797).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.errors import DataError
from potstill.divergences.kernels import Gaussian, mmd2
from potstill.noise.mixture import GaussianMixture


def _pair(real: Tensor, fake: Tensor, least: int) -> tuple[Tensor, Tensor]:
    real_ND, fake_MD = real.detach().flatten(1).double(), fake.detach().flatten(1).double()
    if real_ND.shape[1] != fake_MD.shape[1]:
        raise DataError(
            f"Real and generated samples differ in size: {real_ND.shape[1]} and {fake_MD.shape[1]} numbers."
        )
    if min(len(real_ND), len(fake_MD)) < least:
        raise DataError(f"This metric needs {least} samples on each side, got {len(real_ND)} and {len(fake_MD)}.")
    for name, values in (("real", real_ND), ("generated", fake_MD)):
        if not values.isfinite().all():
            raise DataError(f"The {name} samples hold NaN or infinite numbers.")
    return real_ND, fake_MD


def gaussian_frechet(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2): the squared 2-Wasserstein distance of two Gaussians."""
    values, axes = torch.linalg.eigh(cov_a)
    root = (axes * values.clamp_min(0).sqrt()) @ axes.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Frechet distance of Gaussians fitted to two sets of features (FID where they are Inception's)."""
    real_ND, fake_MD = _pair(real, fake, 2)
    one = lambda x: (x.mean(0), x.T.cov().view(x.shape[1], x.shape[1]))
    return max(gaussian_frechet(*one(real_ND), *one(fake_MD)), 0.0)


def _within(x: Tensor, of: Tensor) -> Tensor:
    """Mean of a symmetric matrix of pairs of x with itself, without the pairs (i, i)."""
    return (of.sum() - of.diagonal().sum()) / (len(x) * (len(x) - 1))


def energy_distance(real: Tensor, fake: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, unbiased (it may fall a little below 0 for equal laws)."""
    x, y = _pair(real, fake, 2)
    value = 2 * torch.cdist(x, y).mean() - _within(x, torch.cdist(x, x)) - _within(y, torch.cdist(y, y))
    return value.item()


def median_distance(real: Tensor, most: int = 1000) -> float:
    """Median distance between the first `most` samples: the usual bandwidth of a Gaussian kernel."""
    x, _ = _pair(real[:most], real[:most], 2)
    return torch.pdist(x).median().item()


def mmd(real: Tensor, fake: Tensor, bandwidths: Sequence[float] | None = None) -> float:
    """Squared maximum mean discrepancy, unbiased, summed over Gaussian kernels exp(-|x - y|^2 / (2 h^2)).

    Bandwidths default to 1/4, 1/2, 1, 2 and 4 times the median distance of the real samples.
    """
    x, y = _pair(real, fake, 2)
    chosen = [median_distance(real) * scale for scale in (0.25, 0.5, 1, 2, 4)] if bandwidths is None else bandwidths
    if not chosen or any(not h > 0 for h in chosen):
        raise DataError(
            f"MMD needs positive bandwidths, got {list(chosen)}. Equal real samples have none of their own."
        )
    return mmd2(teacher=x, student=y, kernel=Gaussian(scales=tuple(chosen), bandwidth=1.0)).item()


def sliced_wasserstein(real: Tensor, fake: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Root of the mean squared 2-Wasserstein distance over keyed random directions. In the unit of the features."""
    x, y = _pair(real, fake, 1)
    rows = torch.arange(projections)
    direction = keyed.normal_like(keyed.key(seed, "slices"), rows, torch.empty(projections, x.shape[1])).double()
    direction_DP = (direction / direction.norm(dim=1, keepdim=True)).T.to(x.device)
    x_NP, y_MP = (x @ direction_DP).sort(0).values, (y @ direction_DP).sort(0).values
    if len(x) != len(y):  # quantile functions are steps: compare them on the union of their steps
        edges = torch.cat([torch.arange(1, n + 1, dtype=torch.float64, device=x.device) / n for n in (len(x), len(y))])
        edges = edges.sort().values
        width = edges.diff(prepend=edges.new_zeros(1))
        middle = edges - width / 2
        at = lambda v: v[(middle * len(v)).floor().long().clamp_max(len(v) - 1)]
        return ((at(x_NP) - at(y_MP)).square() * width[:, None]).sum(0).mean().sqrt().item()
    return (x_NP - y_MP).square().mean().sqrt().item()


def _radius(x: Tensor, k: int) -> Tensor:
    """Distance of each sample to its k-th nearest other one. [N]."""
    return torch.cdist(x, x).fill_diagonal_(torch.inf).kthvalue(k, dim=1).values


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """(precision, recall): the share of generated samples inside a k-NN ball of a real one, and the reverse."""
    x, y = _pair(real, fake, k + 1)
    distance_NM = torch.cdist(x, y)
    precision = (distance_NM <= _radius(x, k)[:, None]).any(0).double().mean().item()
    recall = (distance_NM <= _radius(y, k)[None, :]).any(1).double().mean().item()
    return precision, recall


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """(density, coverage): real k-NN balls around a generated sample over k; the share of real balls that hold one.

    Density may exceed 1; both are robust to outliers among the generated samples, since only real balls are drawn.
    """
    x, _ = _pair(real, real, k + 1)
    x, y = _pair(real, fake, 1)
    inside_NM = torch.cdist(x, y) <= _radius(x, k)[:, None]
    return inside_NM.sum(0).double().mean().item() / k, inside_NM.any(1).double().mean().item()


def mode_coverage(
    points: Tensor, mixture: GaussianMixture, within: float = 3.0, share: float = 0.1
) -> dict[str, float]:
    """How samples spread over the components of a mixture whose components lie apart.

    `on_mode`: the share of samples within `within` standard deviations (Mahalanobis) of their nearest component;
    `modes`: components that hold at least `share` of the samples they would get by weight, of those on a mode;
    `mode_kl`: KL(shares of the samples || weights) in nats, 0 where the balance is right.
    """
    points_BD, _ = _pair(points, mixture.means_KD, 1)
    exact = mixture.to(device=points_BD.device, dtype=torch.float64)
    offset_BKD = torch.einsum("bkd,kde->bke", points_BD[:, None] - exact.means_KD, exact.axes_KDD)
    nearest = (offset_BKD.square() / exact.variances_KD).sum(-1).sqrt().min(1)
    on = nearest.values <= within
    if not on.any():
        return {"on_mode": 0.0, "modes": 0.0, "mode_kl": float("inf")}
    held_K = torch.bincount(nearest.indices[on], minlength=len(exact.means_KD)).double() / on.sum()
    weights_K = exact.log_weights_K.exp()
    kl = torch.special.xlogy(held_K, held_K / weights_K).sum()
    modes = (held_K >= share * weights_K) & (weights_K > 0)
    return {"on_mode": on.double().mean().item(), "modes": modes.double().sum().item(), "mode_kl": kl.item()}
