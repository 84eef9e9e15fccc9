"""One-step distillation where all is known: teacher N(0, 1), student mu + s z, one noise level, integrated by quadrature.

Both scores are formulas, and the generator's gradient in (mu, s) is that of the engine's own loss.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from potstill.contracts import keyed
from potstill.contracts.batch import PointBatch
from potstill.contracts.players import OptimizerSpec
from potstill.models.denoisers import MixtureDenoiser, OneStep, affine
from potstill.noise.mixture import GaussianMixture
from potstill.objectives.matching import AffineScore, Bare, DistributionMatching

MU, S, SIGMA = 0.6, 0.9, 0.7
SGD = OptimizerSpec(optimizer="sgd", momentum=0.0, lr=0.1)


def gaussian(mean: float, std: float) -> GaussianMixture:
    return GaussianMixture(torch.tensor([[mean]], dtype=torch.float64), std)


def affine_generator(mean: float = MU, std: float = S) -> OneStep:
    generator = OneStep(affine().double(), sigma_init=1.0)
    with torch.no_grad():
        generator.denoiser.network.shift.fill_(mean)
        generator.denoiser.network.scale.fill_(std)
    return generator


def points(size: int, first: int = 0) -> PointBatch:
    """Samples of N(0, I) in two dimensions, keyed by their numbers."""
    ids = torch.arange(first, first + size)
    return PointBatch(ids, keyed.normal_like(7, ids, torch.empty(size, 2)))


def jittered(model: nn.Module) -> nn.Module:
    """Away from the zeros that last layers start with."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


class Quadrature:
    """Gauss-Hermite nodes instead of random z and eps: `sample_weight` holds the nodes' weights, whose sum is 1, times
    the method's own. Goes before the class it changes."""

    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(48))
    z, eps = (a.flatten()[:, None] for a in torch.meshgrid(nodes, nodes, indexing="ij"))
    node_weight = torch.outer(weights, weights).flatten() / (2 * torch.pi)
    batch = PointBatch(torch.arange(len(z)), torch.zeros(len(z), 1))

    def latents(self, batch, step):
        return self.z

    def noised(self, x, batch, step, purpose):
        return x + SIGMA * self.eps, torch.full((len(x),), SIGMA, dtype=torch.float64)

    def sample_weight(self, at):
        weight_B = super().sample_weight(at)
        return self.node_weight if weight_B is None else self.node_weight * weight_B

    def ratio(self, logits_BL):  # no clipping, and no rounding to float32
        return logits_BL.detach()[:, 0].exp()


def quadrature(cls: type[DistributionMatching], **options: Any) -> Any:
    """An objective of the class on the nodes. Bare, and summed over the one element."""
    made = type(f"Quadrature{cls.__name__}", (Quadrature, cls), {})
    generator = affine_generator()
    given = {"normaliser": Bare(), "seed": 0, "optimizer": SGD, "fake_optimizer": SGD, "ema": None}
    fake = AffineScore(generator)
    return made(generator, MixtureDenoiser(gaussian(0, 1)), fake=fake, **given | options)


def gradient(objective: Any, step: int = 0) -> Tensor:
    """Of the generator's loss with respect to (mu, s)."""
    network = objective.generator.denoiser.network
    value = objective.loss("generator", Quadrature.batch, step).value()
    return torch.cat(torch.autograd.grad(value, [network.shift, network.scale]))


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
