import math

import pytest
import scipy.linalg
import torch
from torch.testing import assert_close

from potstill.contracts.errors import DataError
from potstill.evaluation.samples import (
    density_coverage,
    energy_distance,
    frechet_distance,
    gaussian_frechet,
    mmd,
    mode_coverage,
    precision_recall,
    sliced_wasserstein,
)
from potstill.noise.mixture import GaussianMixture


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def line(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_frechet_distance_of_gaussians():
    """Commuting covariances: |m|^2 + sum (sqrt a - sqrt b)^2; in general, scipy's matrix square root."""
    a, b, m = torch.tensor([1.0, 4.0]).double(), torch.tensor([9.0, 0.25]).double(), torch.tensor([0.5, -1.0]).double()
    value = gaussian_frechet(m, a.diag(), torch.zeros(2).double(), b.diag())
    assert value == pytest.approx(1.25 + (1 - 3) ** 2 + (2 - 0.5) ** 2)
    x, y = normal(50, 4, seed=0) @ normal(4, 4, seed=1), normal(60, 4, seed=2) @ normal(4, 4, seed=3) + 0.3
    product = scipy.linalg.sqrtm((x.T.cov() @ y.T.cov()).numpy()).real
    theirs = (x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace() - 2 * product.trace()
    assert frechet_distance(x, y) == pytest.approx(theirs.item())
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-10)
    shift = torch.tensor([3.0, 0, 0, 4.0])
    assert frechet_distance(x, x + shift) == pytest.approx(25.0)
    assert frechet_distance(x[:, :1], x[:, :1] * 2 + 1) > 0  # one feature too


def test_energy_distance_by_hand():
    x, y = line(0.0, 2.0), line(1.0, 5.0)
    between = (1 + 5 + 1 + 3) / 4
    assert energy_distance(x, y) == pytest.approx(2 * between - 2 - 4)


def test_energy_distance_of_shifted_gaussians():
    """X - Y ~ N(m, 2): E|X - Y| is that of a folded normal."""
    m, s = 1.5, math.sqrt(2)
    folded = s * math.sqrt(2 / math.pi) * math.exp(-(m**2) / (2 * s**2)) + m * math.erf(m / (s * math.sqrt(2)))
    expected = 2 * folded - 2 * s * math.sqrt(2 / math.pi)
    assert energy_distance(normal(3000, 1, seed=0), normal(3000, 1, seed=1) + m) == pytest.approx(expected, abs=0.1)
    assert energy_distance(normal(3000, 1, seed=0), normal(3000, 1, seed=1)) == pytest.approx(0, abs=0.01)


def test_mmd_by_hand_and_of_gaussians():
    x, y = line(0.0, 2.0), line(1.0, 5.0)
    kernel = lambda d, h: math.exp(-(d**2) / (2 * h**2))
    hand = lambda h: kernel(2, h) + kernel(4, h) - 2 * (2 * kernel(1, h) + kernel(5, h) + kernel(3, h)) / 4
    assert mmd(x, y, [0.7]) == pytest.approx(hand(0.7))
    assert mmd(x, y, [0.7, 2.0]) == pytest.approx(hand(0.7) + hand(2.0))
    # E k(X, Y) = h / sqrt(h^2 + 2) exp(-m^2 / (2 (h^2 + 2))) for unit Gaussians m apart
    m, h = 2.0, 1.0
    expected = 2 * h / math.sqrt(h**2 + 2) * (1 - math.exp(-(m**2) / (2 * (h**2 + 2))))
    assert mmd(normal(2000, 1, seed=0), normal(2000, 1, seed=1) + m, [h]) == pytest.approx(expected, abs=0.03)
    assert mmd(normal(2000, 1, seed=0), normal(2000, 1, seed=1) + m) > 0.5
    with pytest.raises(DataError, match="positive bandwidths"):
        mmd(torch.zeros(4, 1), torch.ones(4, 1))


def test_sliced_wasserstein():
    x = normal(500, 1, seed=0)
    assert sliced_wasserstein(x, x[torch.randperm(500)] + 3.0) == pytest.approx(3.0)
    # a shift by m in D dimensions is |m . direction| on each slice: root mean square |m| / sqrt(D)
    x = normal(300, 3, seed=1)
    shifted = sliced_wasserstein(x, x + torch.tensor([3.0, 0.0, 4.0]), projections=4000)
    assert shifted == pytest.approx(5 / math.sqrt(3), rel=0.03)
    assert sliced_wasserstein(x, x) == 0
    # unequal sizes: 2-Wasserstein of {0, 1, 5} and {0, 4} by the quantile function, thirds against halves
    value = sliced_wasserstein(line(0.0, 1.0, 5.0), line(0.0, 4.0))
    assert value == pytest.approx(math.sqrt(0 + 1 / 6 * 1 + 1 / 6 * 9 + 1 / 3 * 1))
    doubled = torch.cat([x, x])
    assert sliced_wasserstein(doubled, x) == pytest.approx(0.0, abs=1e-12)


def test_precision_and_recall_by_hand():
    """k = 1: real balls have radius 1 around 0, 1 and 9 around 10; generated ones radius 0.5 around 0.5, 1 and 99 at 100."""
    real, fake = line(0.0, 1.0, 10.0), line(0.5, 1.0, 100.0)
    precision, recall = precision_recall(real, fake, k=1)
    assert precision == pytest.approx(2 / 3)  # 100 lies in no real ball
    assert recall == pytest.approx(1.0)  # the ball around 100 reaches everything: the weakness that coverage mends
    density, coverage = density_coverage(real, fake, k=1)
    assert density == pytest.approx((2 + 3) / 3)  # 0.5 lies in the balls of 0 and 1; 1.0 in those of 0, 1 and 10
    assert coverage == pytest.approx(1.0)
    density, coverage = density_coverage(real, line(0.5), k=1)
    assert (density, coverage) == pytest.approx((2.0, 2 / 3))
    assert precision_recall(fake, real, k=1) == pytest.approx((recall, precision))


def test_a_dropped_mode_costs_recall_and_coverage_only():
    mixture = GaussianMixture(torch.tensor([[-5.0, 0.0], [5.0, 0.0]]), 0.5)
    real, fake = (
        mixture.sample(torch.arange(400)),
        GaussianMixture(torch.tensor([[5.0, 0.0]]), 0.5).sample(torch.arange(400), 1),
    )
    precision, recall = precision_recall(real, fake)
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.08)
    density, coverage = density_coverage(real, fake)
    assert coverage == pytest.approx(0.5, abs=0.08)
    assert density == pytest.approx(1.0, abs=0.1)  # each generated sample sits among as many real ones as it should
    same = density_coverage(real, mixture.sample(torch.arange(400), 7))
    assert same == pytest.approx((1.0, 1 - 0.5**5), abs=0.12)  # Naeem et al.: expected values for equal laws


def test_mode_coverage_by_hand():
    mixture = GaussianMixture(torch.tensor([[-5.0, 0.0], [5.0, 0.0], [0.0, 9.0]]), torch.tensor([0.5, 1.0, 1.0]))
    points = torch.tensor([[-5.0, 1.4], [-5.0, 1.6], [5.0, 2.9], [5.0, -2.0], [4.0, 0.0]])
    got = mode_coverage(points, mixture)
    assert got["on_mode"] == pytest.approx(4 / 5)  # the second is 3.2 deviations off
    assert got["modes"] == 2
    assert got["mode_kl"] == pytest.approx(0.25 * math.log(0.75) + 0.75 * math.log(2.25))
    balanced = mode_coverage(mixture.sample(torch.arange(6000)), mixture)
    assert balanced["modes"] == 3
    assert balanced["mode_kl"] == pytest.approx(0.0, abs=1e-3)
    assert balanced["on_mode"] == pytest.approx(1 - math.exp(-4.5), abs=0.005)  # chi-square of two features
    assert mode_coverage(torch.full((2, 2), 1e3), mixture) == {"on_mode": 0.0, "modes": 0.0, "mode_kl": math.inf}


@pytest.mark.parametrize(
    "metric", [frechet_distance, energy_distance, mmd, sliced_wasserstein, precision_recall, density_coverage]
)
def test_bad_samples_are_refused(metric):
    x = normal(20, 2, seed=0)
    with pytest.raises(DataError, match="2 and 3 numbers"):
        metric(x, normal(20, 3, seed=0))
    with pytest.raises(DataError, match="generated samples hold NaN"):
        metric(x, torch.full((20, 2), torch.nan))
    with pytest.raises(DataError, match="samples on each side"):
        metric(x[:0], x[:0])


def test_images_are_flattened():
    x, y = normal(30, 1, 2, 2, seed=0), normal(30, 1, 2, 2, seed=1)
    assert_close(energy_distance(x, y), energy_distance(x.flatten(1), y.flatten(1)))
