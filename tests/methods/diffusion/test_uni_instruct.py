"""Uni-Instruct on 1-D Gaussians by quadrature: the expansion's gradient, its parts, the ratio and the phases."""

import copy

import pytest
import torch
from tests.objectives.gaussians import SGD, SIGMA, Quadrature, gaussian, gradient, numbers, points, quadrature
from torch.nn.functional import softplus
from torch.testing import assert_close

from potstill import recipe as recipes
from potstill.contracts.errors import RecipeError
from potstill.divergences import (
    ForwardKL,
    Jeffreys,
    JensenShannon,
    PearsonChi2,
    ReverseKL,
    SoftenedReverseKL,
    SquaredHellinger,
    SquaredScore,
)
from potstill.methods.diffusion.sid import ScoreIdentity
from potstill.methods.diffusion.sim import ScoreImplicit
from potstill.methods.diffusion.uni_instruct import ChannelMean, ExpandedMatching, UniInstruct, objective_of
from potstill.models.denoisers import OneStep, mlp_denoiser
from potstill.noise.gaussian import KarrasUniform
from potstill.objectives.matching import TeacherError, time_bins
from potstill.tasks.mixture import Points
from potstill.training.spec import TrainSpec
from potstill.training.trainer import Trainer


def expanded(divergence, **options):
    limits = {"ratio_lower": 0.0, "ratio_upper": float("inf")}
    return quadrature(ExpandedMatching, divergence=divergence, elements="sum", **limits | options)


def slice_gradient(divergence, **options) -> torch.Tensor:
    """In scores, of a whole slice: the engine has half of it in denoisers."""
    return 2 / SIGMA**4 * gradient(expanded(divergence, **options))


SLICES = {  # d/d(mu, s) of E_q[F(r) |y|^2]
    ForwardKL(): (0.7100592, -0.9012289),
    ReverseKL(): (0.5405162, -0.2543145),
    JensenShannon(0.5): (0.2680731 / 2, -0.2162928 / 2),  # the paper's is twice ours
    PearsonChi2(): (3.6573776, -7.5198879),
    Jeffreys(): (1.2505754, -1.1555434),
    SquaredHellinger(): (0.1439367, -0.1233453),
    SoftenedReverseKL(): (0.2724431, -0.0380217),
}


@pytest.mark.parametrize("divergence", SLICES, ids=repr)
@pytest.mark.parametrize("ratio_gradient", ["network", "scores"])
def test_the_engine_has_the_gradient_of_the_slice(divergence, ratio_gradient):
    found = slice_gradient(divergence, ratio_gradient=ratio_gradient)
    assert_close(found, numbers(*SLICES[divergence]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon(0.3), PearsonChi2()], ids=repr)
def test_the_slice_by_finite_differences(divergence):
    x = torch.linspace(-14, 14, 8001, dtype=torch.float64)[:, None]
    width = (x[1] - x[0]).item()

    def value(mu, s):
        p, q = gaussian(0, 1), gaussian(mu, s)
        u = p.log_density(x, SIGMA) - q.log_density(x, SIGMA)
        gap = q.score(x, SIGMA) - p.score(x, SIGMA)
        return width * (q.log_density(x, SIGMA).exp() * divergence.score_weight(u) * gap[:, 0] ** 2).sum().item()

    h = 1e-4
    expected = [
        (value(0.6 + h, 0.9) - value(0.6 - h, 0.9)) / (2 * h),
        (value(0.6, 0.9 + h) - value(0.6, 0.9 - h)) / (2 * h),
    ]
    assert_close(slice_gradient(divergence), numbers(*expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("divergence", SLICES, ids=repr)
def test_the_parts_add_up(divergence):
    parts = [slice_gradient(divergence, parts=[part]) for part in ("score", "ratio", "sampling")]
    assert_close(sum(parts), slice_gradient(divergence))


def test_the_reverse_kl_is_sim_and_the_sampling_part():
    sim = gradient(quadrature(ScoreImplicit, distance=SquaredScore(), space="score", elements="sum"))
    assert_close(slice_gradient(ReverseKL(), parts=["score"]), sim)
    sampling = slice_gradient(ReverseKL(), parts=["sampling"])
    assert_close(sampling, numbers(-0.0789985, 0.0173189), rtol=0, atol=2e-7)
    assert_close(slice_gradient(ReverseKL()), sim + sampling)


def test_the_forward_kl_is_its_score_part_and_a_detached_ratio_is_wrong():
    assert_close(slice_gradient(ForwardKL(), parts=["score"]), slice_gradient(ForwardKL()))
    detached = slice_gradient(ForwardKL(), ratio_gradient="none")
    assert_close(detached, numbers(0.7100592, -0.5864312), rtol=0, atol=1e-6)
    for gradient_of in ("network", "scores", "none"):  # without r it cannot matter
        assert_close(slice_gradient(ReverseKL(), ratio_gradient=gradient_of), slice_gradient(ReverseKL()))


def test_a_swapped_ratio_is_another_divergence():
    class Swapped(ExpandedMatching):
        def logits(self, x_t, sigma_B, condition):
            return -super().logits(x_t, sigma_B, condition)

    wrong = quadrature(Swapped, divergence=ForwardKL(), elements="sum", ratio_lower=0.0, ratio_upper=float("inf"))
    assert not torch.allclose(2 / SIGMA**4 * gradient(wrong), slice_gradient(ForwardKL()), rtol=1e-2)


def test_where_the_ratio_is_clipped_it_is_a_constant():
    """Clipped to 2 everywhere, the forward KL is twice the score part of the reverse KL."""

    class Certain(ExpandedMatching):
        def logits(self, x_t, sigma_B, condition):
            return super().logits(x_t, sigma_B, condition) + 30.0

    limits = {"ratio_lower": 1.0, "ratio_upper": 2.0}
    objective = quadrature(Certain, divergence=ForwardKL(), parts=["score"], elements="sum", **limits)
    objective.ratio = lambda logits_BL: logits_BL.detach()[:, 0].exp().clamp(1.0, 2.0)
    assert_close(gradient(objective), 2 * gradient(expanded(ReverseKL(), parts=["score"])))


def test_first_sid_then_the_divergence():
    objective = expanded(ForwardKL(), sid_until=3)
    sid = gradient(quadrature(ScoreIdentity, alpha=1.0, elements="sum"))
    assert_close(gradient(objective, 2), sid)
    assert_close(gradient(objective, 3), gradient(expanded(ForwardKL())))
    assert not torch.allclose(gradient(objective, 3), sid, rtol=0.05)


def test_normalised_ratios_have_mean_one():
    """r / mean r: the forward KL's loss, divided by that mean."""
    bins = time_bins(KarrasUniform(), "sigma", 1, 0.0)
    objective, plain = expanded(ForwardKL(), bins=bins), expanded(ForwardKL())
    objective.collect(Quadrature.batch, 0)
    at = plain.compare(Quadrature.batch, 0, plain.generate(Quadrature.batch, 0))
    mean = plain.ratio(at.logits_BL).mean()
    assert_close(gradient(objective) * mean, gradient(plain), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- networks


def learned(**changes) -> ExpandedMatching:
    torch.manual_seed(0)
    teacher = mlp_denoiser(width=16, depth=2)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.2 * torch.randn_like(p))
    given = {"levels": KarrasUniform(0.1, 3.0), "fake": SGD, "warmup": 0, "sid_until": 0, "sigma_init": 2.0}
    config = UniInstruct.model_validate(given | changes)
    objective = objective_of(config, OneStep(copy.deepcopy(teacher), 2.0), teacher, SGD, 0)
    with torch.no_grad():
        for p in objective.fake.parameters():  # no longer the teacher's equal
            p.add_(0.1 * torch.randn_like(p))
    return objective


def test_the_fake_score_warms_up_alone_and_moves_first():
    moves = {name: [p.when(s) for s in range(4)] for name, p in learned(warmup=2).players.items()}
    assert moves == {"fake_score": [True] * 4, "generator": [False, False, True, True]}
    assert list(moves) == ["fake_score", "generator"]


def test_the_discriminator_is_the_channel_mean_of_the_fake_score():
    objective, x, sigma = learned(), torch.randn(3, 2), torch.ones(3)
    assert not list(objective.heads.parameters())
    features = objective.fake.features(x, sigma, names=["layers.1"])["layers.1"]
    assert_close(objective.logits(x, sigma, None), features.mean(1, keepdim=True))
    assert ChannelMean()(torch.randn(2, 8, 4, 4)).shape == (2, 16) and ChannelMean()(torch.randn(2, 5, 8)).shape == (
        2,
        5,
    )
    loss = objective.loss("fake_score", points(6), 0)
    assert {k: t.coefficient for k, t in loss.terms.items()} == {"denoising": 1.0, "generated": 0.5, "real": 0.5}
    assert list(learned(head="learned").heads.parameters())


def test_the_adversarial_term_is_weighted_as_the_divergence_is():
    objective, batch = learned(), points(6)
    at = objective.compare(batch, 0, objective.generate(batch, 0))
    om = (at.x - at.teacher).abs().mean(1).clamp(min=1e-5).detach()
    expected = 0.01 * 2 * (softplus(-at.logits_BL).mean(1) / om).mean()
    assert_close(objective.loss("generator", batch, 0).terms["adversarial"].mean(), expected)
    objective.sid_until = 1
    assert objective.loss("generator", batch, 0).terms["adversarial"].mean() == 0
    assert set(learned(gan_weight=0.0).loss("generator", batch, 0).terms) == {"matching"}


@pytest.mark.parametrize("ratio_gradient", ["network", "scores", "none"])
def test_gradients_reach_the_generator_alone(ratio_gradient):
    objective = learned(ratio_gradient=ratio_gradient, ratio_upper=1e4, ratio_lower=1e-4)
    objective.fake.requires_grad_(False)  # as the trainer does
    objective.loss("generator", points(6), 0).value().backward()
    assert all(p.grad is None for m in (objective.fake, objective.teacher) for p in m.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in objective.generator.parameters())


def test_without_a_gan_the_ratio_s_gradient_still_runs_through_the_discriminator():
    batch = points(6)
    wide = {"gan_weight": 0.0, "ratio_upper": 1e4, "ratio_lower": 1e-4}
    found = []
    for ratio_gradient in ("network", "none"):
        objective = learned(ratio_gradient=ratio_gradient, **wide)
        value = objective.loss("generator", batch, 0).value()
        gradients = torch.autograd.grad(value, list(objective.generator.parameters()))
        found.append(torch.cat([g.flatten() for g in gradients]))
    assert (found[0] - found[1]).norm() > 1e-2 * found[1].norm()


def test_micro_batches_change_nothing():
    data = Points(points(20).points_BD)
    whole, cut = (learned(ratio_normalization=True, normaliser=TeacherError(eps=0.1)) for _ in range(2))
    for objective, micro in ((whole, None), (cut, 2)):
        spec = TrainSpec(steps=3, batch=6, micro_batch=micro, trackers=[], device="cpu")
        objective.optimizer = objective.fake_optimizer = SGD.model_copy(update={"lr": 1e-4})
        Trainer(spec).fit(objective, data)
    for (name, a), b in zip(whole.state_dict().items(), cut.state_dict().values()):
        assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_refusals():
    raw = {"method": {"name": "uni_instruct", "divergence": "TotalVariation"}, "data": {"task": "mixture"}}
    with pytest.raises(RecipeError, match=r"TotalVariation\(\) has r\^2 f''\(r\) = 0"):
        recipes.resolve(raw)
    raw["method"] = {"name": "uni_instruct", "parts": ["fgm"]}
    with pytest.raises(RecipeError, match="parts"):
        recipes.resolve(raw)
