"""Points whose density is known: the samples are of that density, and the metrics say what is missing."""

import math

import pytest
import torch

from potstill.contracts.errors import DataError
from potstill.tasks.mixture import against, mixture


def test_points_are_of_the_density():
    """Mode shares and spread against their expectation, within five standard errors."""
    source = mixture(modes=4, radius=2.0, std=0.1, imbalance=8.0, size=20000)
    points, density = source.train.points, source.context["mixture"]
    weights = torch.tensor([8.0, 4.0, 2.0, 1.0]) / 15  # geometric from 8 to 1
    torch.testing.assert_close(density.log_weights_K.exp(), weights)
    shares = torch.bincount(torch.cdist(points, density.means_KD).argmin(1), minlength=4) / len(points)
    assert ((shares - weights).abs() < 5 * (weights * (1 - weights) / len(points)).sqrt()).all()
    offsets = (points[:, None] - density.means_KD).square().sum(-1).min(1).values
    assert offsets.mean().item() == pytest.approx(2 * 0.1**2, rel=0.05)
    assert density.means_KD.norm(dim=1).tolist() == pytest.approx([2.0] * 4)


def test_train_and_test_share_no_point_and_batches_are_rows():
    source = mixture(size=500, test_size=500)
    assert not (source.train.points[:, None] == source.test.points).all(-1).any()
    batch = source.train.batch(torch.tensor([3, 0]), epoch=2)
    assert torch.equal(batch.points_BD, source.train.points[[3, 0]])
    assert batch.ids_B.tolist() == [1003, 1000]
    assert torch.equal(mixture(size=100).train.points, source.train.points[:100])


def test_metrics_of_the_truth_and_of_lost_modes():
    source = mixture(modes=8, imbalance=1.0, test_size=8000)
    truth = source.score(source.test.points)
    assert truth["modes"] == 8
    assert truth["near"] == pytest.approx(1 - math.exp(-4.5), abs=0.006)  # a chi of two degrees within 3
    assert truth["mode_kl"] < 0.01
    # Minus the entropy of eight far round Gaussians: -(log 8 + log(2 pi e std^2)).
    assert truth["log_density"] == pytest.approx(-math.log(8 * 2 * math.pi * math.e * 0.05**2), abs=0.06)
    half = source.test.points[source.context["mixture"].responsibilities(source.test.points).argmax(-1) < 4]
    lost = source.score(half)
    assert lost["modes"] == 4
    assert lost["mode_kl"] == pytest.approx(math.log(2), abs=0.01)  # uniform on half the modes
    nothing = source.score(torch.zeros(10, 2))
    assert (nothing["near"], nothing["modes"], nothing["mode_kl"]) == (0.0, 0.0, math.inf)


def test_near_is_measured_along_the_axes():
    """One component with standard deviations 1 and 0.1: 2.9 off along the first is near, 0.4 along the second is far."""
    from potstill.noise.mixture import GaussianMixture

    density = GaussianMixture(torch.zeros(1, 2), covariances=torch.diag(torch.tensor([1.0, 0.01]))[None])
    assert against(density, torch.tensor([[2.9, 0.0]]))["near"] == 1.0
    assert against(density, torch.tensor([[0.0, 0.4]]))["near"] == 0.0


def test_numbers_out_of_range_are_refused():
    with pytest.raises(DataError, match="mixture needs modes >= 1, radius > 0 and std > 0, got 0, 1 and 0.05"):
        mixture(modes=0)
    with pytest.raises(DataError, match="data.imbalance is the heaviest weight over the lightest"):
        mixture(imbalance=0.5)
    with pytest.raises(DataError, match="data.size and data.test_size must be positive, got 0 and 2000"):
        mixture(size=0)
