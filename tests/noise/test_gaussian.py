import math

import pytest
import torch
from torch.testing import assert_close

from potstill.contracts.errors import RecipeError
from potstill.contracts.spec import Part, Spec
from potstill.noise.gaussian import (
    VE,
    VP,
    DiscreteVP,
    EDMPreconditioning,
    KarrasIndex,
    KarrasUniform,
    LevelSampler,
    LogNormal,
    LogUniform,
    MatchedPreconditioning,
    Preconditioning,
    RectifiedFlow,
    ShiftedUniform,
    TrigFlow,
    edm_weight,
    karras,
    karras_grid,
)

SCHEDULES = [
    VE(),
    VP(),
    DiscreteVP(),
    DiscreteVP(beta_schedule="scaled_linear"),
    RectifiedFlow(),
    TrigFlow(),
    TrigFlow(0.5),
]
RATIOS = torch.tensor([0.05, 0.4, 1.0, 7.0], dtype=torch.float64)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_time_inverts_the_ratio(schedule):
    assert_close(schedule.ratio(schedule.time(RATIOS)), RATIOS, rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "score"])
def test_every_conversion_knows_the_truth_and_goes_back(schedule, kind):
    """From the true x0 come the true eps, v and score of a mixed sample, and each of them gives x0 back."""
    x0, eps, t = normal(4, 3, 2, seed=0), normal(4, 3, 2, seed=1), schedule.time(RATIOS)
    x_t = schedule.mix(x0, eps, t)
    wide = lambda v: v.view(-1, 1, 1)
    a, b = schedule.velocity(t)
    truth = {
        "x0": x0,
        "eps": eps,
        "v": wide(a) * x0 + wide(b) * eps,
        "score": -(x_t - wide(schedule.alpha(t)) * x0) / wide(schedule.sigma(t)) ** 2,
    }[kind]
    assert_close(schedule.from_x0(kind, x0, x_t, t), truth)
    assert_close(schedule.to_x0(kind, truth, x_t, t), x0)


@pytest.mark.parametrize("schedule", [VE(), RectifiedFlow(), TrigFlow(), TrigFlow(0.5)], ids=repr)
def test_velocity_is_the_time_derivative(schedule):
    t = schedule.time(RATIOS).requires_grad_()
    for level, given in zip((schedule.alpha, schedule.sigma), schedule.velocity(t)):
        slope = torch.autograd.grad((level(t) + 0.0 * t).sum(), t)[0]
        assert_close(slope, given.detach())


@pytest.mark.parametrize("schedule", [VP(), DiscreteVP()], ids=repr)
def test_variance_preserving_velocity_is_salimans(schedule):
    """v = alpha eps - sigma x0, so x0 = alpha x_t - sigma v."""
    t, x_t, v = schedule.time(RATIOS), normal(4, 2, seed=2), normal(4, 2, seed=3)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    assert_close(alpha**2 + sigma**2, torch.ones(4, 1, dtype=torch.float64))
    assert_close(schedule.to_x0("v", v, x_t, t), alpha * x_t - sigma * v)


def test_vp_by_hand():
    """At t = 1: log alpha = -(20 - 0.1) / 4 - 0.1 / 2."""
    assert VP().alpha(1.0).item() == pytest.approx(math.exp(-19.9 / 4 - 0.05), rel=1e-12)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_discrete_table_is_that_of_diffusers(kind):
    schedulers = pytest.importorskip("diffusers")
    theirs = schedulers.DDPMScheduler(beta_schedule=kind, beta_start=1e-4, beta_end=0.02).alphas_cumprod
    ours = DiscreteVP(beta_schedule=kind).alpha(torch.arange(1000))
    assert_close(ours.float() ** 2, theirs, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_one_denoiser_serves_every_schedule(schedule):
    """Data N(m, v I): E[x0 | x_t] in closed form for any alpha and sigma, from the denoiser of the VE process."""
    m, v, x_t, t = 0.3, 0.6, normal(4, 5, seed=4), schedule.time(RATIOS)
    denoise = lambda x, sigma: (v * x + sigma[:, None] ** 2 * m) / (v + sigma[:, None] ** 2)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    expected = m + alpha * v / (alpha**2 * v + sigma**2) * (x_t - alpha * m)
    assert_close(schedule.denoise(denoise, x_t, t), expected)
    score = schedule.from_x0("score", expected, x_t, t)
    assert_close(score, -(x_t - alpha * m) / (alpha**2 * v + sigma**2))  # of N(alpha m, alpha^2 v + sigma^2)


def test_a_wrong_prediction_or_level_is_refused():
    with pytest.raises(RecipeError, match="x0, eps, v and score, got 'noise'"):
        VE().target("noise", 1.0)
    with pytest.raises(ValueError, match=r"shape \[4\], got \[3\]"):
        VE().mix(normal(4, 2, seed=0), normal(4, 2, seed=1), torch.ones(3))


def test_edm_preconditioning_has_unit_variance():
    """EDM's derivation: Var(c_in x) = 1, and the network's target (x0 - c_skip x) / c_out has variance 1."""
    sigma, data = RATIOS, 0.5
    c_skip, c_out, c_in, c_noise = EDMPreconditioning(data).coefficients(sigma)
    one = torch.ones_like(sigma)
    assert_close(c_in**2 * (data**2 + sigma**2), one)
    assert_close(((1 - c_skip) ** 2 * data**2 + c_skip**2 * sigma**2) / c_out**2, one)
    assert_close(c_noise, sigma.log() / 4)
    assert_close(edm_weight(sigma, data) * c_out**2, one)


def test_edm_is_trigflow_with_the_sign_of_the_network():
    """(v) of the shared checks: both wrappers give one D for F and -F at matched level."""
    edm = EDMPreconditioning(0.5).coefficients(RATIOS)
    trig = MatchedPreconditioning(TrigFlow(0.5), "v", scale=0.5).coefficients(RATIOS)
    assert_close(edm[0], trig[0])
    assert_close(edm[1], -trig[1])
    assert_close(edm[2], trig[2])


@pytest.mark.parametrize("schedule", [VP(), DiscreteVP(), RectifiedFlow(), TrigFlow()], ids=repr)
@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_a_matched_network_gives_the_denoiser_it_encodes(schedule, prediction):
    """Data N(m, v I): the exact network of a schedule, wrapped, is the exact D(x; sigma)."""
    m, v, x, sigma = 0.3, 0.6, normal(4, 5, seed=5), RATIOS[:, None]
    exact = (v * x + sigma**2 * m) / (v + sigma**2)
    c_skip, c_out, c_in, t = MatchedPreconditioning(schedule, prediction).coefficients(RATIOS)
    x_t = c_in[:, None] * x
    assert_close(c_skip[:, None] * x + c_out[:, None] * schedule.from_x0(prediction, exact, x_t, t), exact)


def test_rectified_flow_wrapper_by_hand():
    """D = x_t - t v with t = sigma / (1 + sigma) and x_t = x / (1 + sigma); time in thousandths."""
    c_skip, c_out, c_in, c_noise = MatchedPreconditioning(RectifiedFlow(), "v", time_scale=1000.0).coefficients(RATIOS)
    assert_close(c_in, 1 / (1 + RATIOS))
    assert_close(c_skip, 1 / (1 + RATIOS))
    assert_close(c_out, -RATIOS / (1 + RATIOS))
    assert_close(c_noise, 1000 * RATIOS / (1 + RATIOS))


def test_preconditioning_reads_and_writes_as_a_part():
    class Holder(Spec):
        of: Part(Preconditioning)

    part = MatchedPreconditioning(DiscreteVP(beta_schedule="scaled_linear"), "v")
    assert Holder.model_validate(Holder(of=part).model_dump()).of == part
    with pytest.raises(RecipeError, match="must be positive"):
        EDMPreconditioning(0.0)
    with pytest.raises(RecipeError, match="x0, eps or v"):
        MatchedPreconditioning(VP(), "noise")


def test_karras_grid():
    grid = karras_grid(18)
    assert len(grid) == 19
    assert grid[-1] == 0
    assert_close(grid[[0, 17]], torch.tensor([80.0, 0.002], dtype=torch.float64))
    assert (grid.diff() < 0).all()
    middle = ((0.002 ** (1 / 7) + 80 ** (1 / 7)) / 2) ** 7
    assert karras(torch.tensor(0.5)).item() == pytest.approx(middle)
    with pytest.raises(RecipeError, match="at least one step"):
        karras_grid(0)


@pytest.mark.parametrize(
    "sampler", [LogNormal(), LogUniform(), KarrasIndex(), KarrasUniform(low=0.2), ShiftedUniform(5.0)], ids=repr
)
def test_levels_are_functions_of_seed_and_id(sampler):
    ids = torch.arange(1000)
    sigma = sampler(3, ids)
    assert sigma.dtype == torch.float32
    assert (sigma > 0).all()
    assert_close(sampler(3, ids.flip(0)).flip(0), sigma, rtol=0, atol=0)
    assert not torch.equal(sampler(4, ids), sigma)


def test_level_distributions():
    ids = torch.arange(20000)
    log = LogNormal(-1.0, 1.4)(0, ids).log()
    assert log.mean().item() == pytest.approx(-1.0, abs=0.05)
    assert log.std().item() == pytest.approx(1.4, abs=0.05)
    drawn = KarrasIndex(steps=10, low=2, high=4)(0, ids)
    grid = karras(torch.arange(10) / 9.0).float()
    assert_close(drawn.unique(), grid[2:5])
    assert (drawn == grid[2]).float().mean().item() == pytest.approx(1 / 3, abs=0.02)
    assert_close(KarrasIndex(steps=10)(0, ids).unique(), grid)  # both ends belong
    log = LogUniform(0.01, 1.0)(0, ids).log()
    assert log.mean().item() == pytest.approx(math.log(0.1), abs=0.03)
    t = RectifiedFlow().time(ShiftedUniform(5.0, 1e-6, 1 - 1e-6).of_uniform(torch.tensor([0.5], dtype=torch.float64)))
    assert t.item() == pytest.approx(5 * 0.5 / (1 + 4 * 0.5), rel=1e-5)
    sid = KarrasUniform(low=0.2).of_uniform(torch.tensor([0.0, 1.0]))
    assert_close(sid, karras(torch.tensor([0.2, 1.0])))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: KarrasIndex(low=5, high=3), "low <= high < steps"),
        (lambda: KarrasIndex(high=1000), "low <= high < steps"),
        (lambda: LogUniform(1.0, 0.1), "LogUniform needs 0 < smin < smax"),
        (lambda: KarrasUniform(low=0.5, high=0.2), "0 <= low < high <= 1"),
        (lambda: ShiftedUniform(0.0), "shift > 0"),
        (lambda: DiscreteVP(beta_schedule="cosine"), "beta_schedule must be"),
    ],
)
def test_impossible_levels_are_refused(make, said):
    with pytest.raises(RecipeError, match=said):
        make()


def test_level_samplers_are_parts():
    class Holder(Spec):
        levels: Part(LevelSampler)

    assert Holder(levels={"name": "LogNormal", "mean": -1}).levels == LogNormal(-1.0)
