import math

import pytest
import torch
from torch.testing import assert_close

from potstill.contracts.errors import DataError
from potstill.noise.mixture import GaussianMixture


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(kind: str) -> GaussianMixture:
    means = normal(3, 3, seed=0)  # in the plane eigenvector matrices may be symmetric, which would hide a transpose
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    if kind == "full":
        root = normal(3, 3, 3, seed=1)
        return GaussianMixture(means, covariances=root @ root.mT, weights=weights)
    return GaussianMixture(
        means, torch.rand(3, 3, generator=torch.Generator().manual_seed(2)).double() + 0.1, weights=weights
    )


@pytest.mark.parametrize("kind", ["axes", "full"])
@pytest.mark.parametrize("sigma", [0.0, 0.3, 2.0])
def test_log_density_is_torchs(kind, sigma):
    from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

    of = mixture(kind)
    covariance = of.axes_KDD @ (of.variances_KD[..., None] * of.axes_KDD.mT) + sigma**2 * torch.eye(3)
    if kind == "full":
        assert_close(covariance, normal(3, 3, 3, seed=1) @ normal(3, 3, 3, seed=1).mT + sigma**2 * torch.eye(3))
    theirs = MixtureSameFamily(Categorical(logits=of.log_weights_K), MultivariateNormal(of.means_KD, covariance))
    x = normal(7, 3, seed=3)
    assert_close(of.log_density(x, sigma), theirs.log_prob(x))


@pytest.mark.parametrize("kind", ["axes", "full"])
def test_score_is_the_gradient_and_the_denoiser_is_tweedies(kind):
    of, x = mixture(kind), normal(5, 3, seed=4).requires_grad_()
    sigma = torch.tensor([0.05, 0.3, 1.0, 2.0, 80.0], dtype=torch.float64)
    expected = torch.autograd.grad(of.log_density(x, sigma).sum(), x)[0]
    assert_close(of.score(x, sigma).detach(), expected)
    assert_close(((of.denoise(x, sigma) - x) / sigma[:, None] ** 2).detach(), expected)


def test_denoiser_of_one_gaussian_by_hand():
    of = GaussianMixture(torch.tensor([[0.6]]).double(), 0.9)
    x, sigma = torch.tensor([[1.3]]).double(), 0.7
    assert of.denoise(x, sigma).item() == pytest.approx((0.81 * 1.3 + 0.49 * 0.6) / (0.81 + 0.49))


def test_points_may_have_any_shape():
    of = GaussianMixture(normal(2, 12, seed=5), 0.3)
    x = normal(4, 3, 2, 2, seed=6)
    assert_close(of.denoise(x, 0.5), of.denoise(x.flatten(1), 0.5).view(4, 3, 2, 2))
    assert of.score(x, 0.5).shape == x.shape
    with pytest.raises(ValueError, match="12 numbers each"):
        of.log_density(normal(4, 3, seed=0))


def test_samples_follow_the_density():
    """Shares, means and covariances of the components; each point a function of its id."""
    of = GaussianMixture(
        torch.tensor([[-9.0, 0.0], [9.0, 0.0]]).double(),
        covariances=torch.tensor([[[1.0, 0.8], [0.8, 1.0]], [[0.25, 0.0], [0.0, 4.0]]]).double(),
        weights=torch.tensor([1.0, 3.0]),
    )
    ids = torch.arange(40000)
    drawn = of.sample(ids, seed=1, sigma=0.5)
    left = drawn[:, 0] < 0
    assert left.double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert_close(drawn[left].T.cov(), torch.tensor([[1.25, 0.8], [0.8, 1.25]]).double(), rtol=0, atol=0.05)
    assert_close(drawn[~left].T.cov(), torch.tensor([[0.5, 0.0], [0.0, 4.25]]).double(), rtol=0, atol=0.1)
    assert_close(of.sample(ids.flip(0), seed=1, sigma=0.5).flip(0), drawn)
    root = normal(3, 3, seed=7)
    one = GaussianMixture(torch.zeros(1, 3).double(), covariances=(root @ root.T)[None])
    assert_close(one.sample(ids).T.cov(), root @ root.T, rtol=0, atol=0.05)


def test_ring_and_grid():
    ring = GaussianMixture.ring(8, radius=2.0, std=0.1)
    assert_close(ring.means_KD.norm(dim=1), torch.full((8,), 2.0))
    assert ring.responsibilities(torch.tensor([[2.0, 0.0]])).argmax() == 0
    assert ring.log_density(torch.tensor([[2.0, 0.0]])).item() == pytest.approx(
        -math.log(8 * 2 * math.pi * 0.01), rel=1e-5
    )
    grid = GaussianMixture.grid(5)
    assert grid.means_KD.shape == (25, 2)
    assert_close(grid.means_KD.mean(0), torch.zeros(2))
    assert ring.to(dtype=torch.float64).log_density(torch.zeros(1, 2)).dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GaussianMixture(torch.zeros(3), 1.0), r"means \[K, D\]"),
        (lambda: GaussianMixture(torch.zeros(3, 2)), "exactly one of stds and covariances"),
        (lambda: GaussianMixture(torch.zeros(3, 2), covariances=torch.ones(2, 2)), r"\[3, 2, 2\]"),
        (lambda: GaussianMixture(torch.zeros(3, 2), weights=torch.ones(2), stds=1.0), "3 non-negative numbers"),
        (lambda: GaussianMixture(torch.zeros(1, 2), covariances=-torch.eye(2)[None]), "non-negative stds"),
    ],
)
def test_impossible_mixtures_are_refused(make, said):
    with pytest.raises(DataError, match=said):
        make()
