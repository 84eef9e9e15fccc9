"""One-step distribution matching against 1-D Gaussians by quadrature, and who may move whom."""

import copy

import pytest
import torch
from tests.objectives.gaussians import (
    MU,
    SGD,
    SIGMA,
    Quadrature,
    S,
    affine_generator,
    gaussian,
    gradient,
    jittered,
    points,
    quadrature,
)
from torch import nn
from torch.testing import assert_close

from potstill.contracts import keyed
from potstill.contracts.batch import ImageBatch, PointBatch, TokenBatch
from potstill.contracts.errors import RecipeError
from potstill.contracts.players import Every, Unless
from potstill.divergences import TimeBins
from potstill.divergences.scores import sid
from potstill.models.denoisers import Guided, OneStep, mlp_denoiser, unet_tiny
from potstill.noise.gaussian import KarrasUniform, LogNormal
from potstill.objectives.blocks import Heads
from potstill.objectives.matching import (
    Adversary,
    AffineScore,
    Bare,
    Comparison,
    DenoisingScoreMatching,
    DistributionMatching,
    NoisePower,
    RatioMatching,
    ScoreSurrogate,
    TeacherError,
    denoising_loss,
    real_samples,
    tapped,
    time_bins,
)
from potstill.tasks.mixture import Points
from potstill.training.spec import TrainSpec
from potstill.training.trainer import Trainer


def test_bare_field_has_the_gradient_of_the_reverse_kl():
    """Diff-Instruct: D_S - D_T = sigma^2 (s_S - s_T), so the gradient is sigma^2 times that of KL(q_t || p_t)."""
    a, b = S**2 + SIGMA**2, 1 + SIGMA**2  # KL(N(mu, a) || N(0, b)) = (log(b / a) + (a + mu^2) / b - 1) / 2
    expected = SIGMA**2 * torch.tensor([MU / b, S * (1 / b - 1 / a)], dtype=torch.float64)
    assert_close(gradient(quadrature(DistributionMatching)), expected)


class Identity(ScoreSurrogate):
    def surrogate(self, at, step):
        return sid(at.x, teacher=at.teacher, student=at.fake)


def test_score_identity_is_half_of_the_squared_score_differences_gradient():
    """SiD at alpha 1: fake fixed, gradients through both networks = 1/2 d E|D_T - D_S|^2, where the fake score follows the
    generator and the points x_t stay (score implicit matching)."""

    def squared(mu, s):
        x_t = MU + S * Quadrature.z + SIGMA * Quadrature.eps
        level = torch.full((len(x_t),), SIGMA, dtype=torch.float64)
        gap = gaussian(0, 1).denoise(x_t, level) - gaussian(mu, s).denoise(x_t, level)
        return (Quadrature.node_weight * gap[:, 0] ** 2).sum().item()

    h = 1e-5
    expected = [
        (squared(MU + h, S) - squared(MU - h, S)) / (2 * h),
        (squared(MU, S + h) - squared(MU, S - h)) / (2 * h),
    ]
    found = gradient(quadrature(Identity))
    assert_close(2 * found, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9)
    assert_close(2 * found / SIGMA**4, torch.tensor([0.6195, -0.2716], dtype=torch.float64), rtol=0, atol=1e-4)


def test_a_pseudo_target_detaches_both_networks_and_a_surrogate_neither():
    for cls, through in ((DistributionMatching, False), (Identity, True)):
        objective = quadrature(cls)
        at = objective.compare(Quadrature.batch, 0, objective.generate(Quadrature.batch, 0))
        assert at.teacher.requires_grad == at.fake.requires_grad == at.x_t.requires_grad == through
        assert at.x.requires_grad


def test_the_exact_fake_score_follows_the_generator_but_gives_it_no_gradient():
    generator = affine_generator()
    generator.sigma_init = 2.0
    fake, x = AffineScore(generator), torch.tensor([[0.3], [-1.0]], dtype=torch.float64, requires_grad=True)
    assert not list(fake.parameters())
    assert_close(fake(x, 0.5), gaussian(MU, 2 * S).denoise(x, 0.5))
    network = generator.denoiser.network
    assert torch.autograd.grad(fake(x, 0.5).sum(), [x, network.shift], allow_unused=True)[1] is None
    with torch.no_grad():
        network.shift.add_(1.0)
    assert_close(fake(x, 0.5), gaussian(MU + 1, 2 * S).denoise(x, 0.5))


def test_normalisers():
    x, teacher, fake = (keyed.normal_like(k, torch.arange(3), torch.empty(3, 2, 4, 4)) for k in range(3))
    at = Comparison(x, x, torch.tensor([0.5, 1.0, 2.0]), teacher, fake, None)
    error = (x - teacher).abs().mean((1, 2, 3))
    dmd2 = quadrature(DistributionMatching, normaliser=TeacherError())
    assert_close(dmd2.field(at), (fake - teacher) / (error + 1e-6)[:, None, None, None])
    assert_close(quadrature(DistributionMatching).field(at), fake - teacher)
    assert_close(NoisePower(-2)(at), torch.tensor([4.0, 1.0, 0.25]))
    least = error.sort().values[1].item()
    assert_close(TeacherError(eps=0.0, least=least)(at), error.clamp_min(least))


@pytest.mark.parametrize("cls", [DistributionMatching, Identity])
def test_a_sum_over_elements_is_the_mean_times_their_number_and_the_scale_is_a_factor(cls):
    def value(**options):
        generator, teacher = networks()
        fake = jittered(copy.deepcopy(teacher))
        given = {"seed": 0, "optimizer": SGD, "fake_optimizer": SGD, "normaliser": Bare()}
        return cls(generator, teacher, fake=fake, **given, **options).loss("generator", points(5), 0).value()

    assert_close(value(elements="sum"), 2 * value(elements="mean"))
    assert_close(value(scale=100.0), 100 * value())


class Shows(DistributionMatching):
    """The gradient at x, whatever the generator does with it."""

    weight_B = None

    def generate(self, batch, step):
        self.x = super().generate(batch, step).detach().requires_grad_()
        return self.x

    def field(self, at):
        return torch.arange(at.x.numel()).view(at.x.shape).to(at.x)

    def sample_weight(self, at):
        return self.weight_B


@pytest.mark.parametrize("weight", [None, [1.0, 3.0, 0.0, 4.0]])
def test_gradient_at_the_sample_is_the_field_over_its_size(weight):
    """v / numel; with weights w v / (numel mean w): stage 2 of f-distill is the trainer's own division."""
    objective = Shows(*networks(), seed=0, optimizer=SGD, fake_optimizer=SGD)
    objective.weight_B = None if weight is None else torch.tensor(weight)
    objective.loss("generator", points(4), 0).value().backward()
    expected = torch.arange(8.0).view(4, 2) / 8
    if weight is not None:
        expected = expected * torch.tensor(weight)[:, None] / 2.0
    assert_close(objective.x.grad, expected)


def test_the_fake_score_may_move_first():
    options = {"seed": 0, "optimizer": SGD, "fake_optimizer": SGD}
    assert list(DistributionMatching(*networks(), fake_first=True, **options).players) == ["fake_score", "generator"]
    assert list(DistributionMatching(*networks(), **options).players) == ["generator", "fake_score"]


def test_an_adversary_may_learn_with_the_fake_score_whose_trunk_it_then_moves():
    objective = full("fake", joint=0.25)
    assert list(objective.players) == ["generator", "fake_score"]
    assert {id(p) for p in objective.heads.parameters()} < {id(p) for p in objective.players["fake_score"].parameters()}
    batch = points(6)
    together, alone = objective.loss("fake_score", batch, 1), full("fake").loss("discriminator", batch, 1)
    assert set(together.terms) == {"denoising", "generated", "real", "r1"}
    for name, term in alone.terms.items():
        assert_close(together.terms[name].mean(), 0.25 * term.mean())
    trunk = list(objective.fake.parameters())
    found = torch.autograd.grad(together.terms["real"].mean(), trunk, allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in found)
    with pytest.raises(RecipeError, match="needs its features: trunk is fake"):
        full("teacher", joint=0.25)


def test_an_adversary_may_have_levels_of_its_own():
    objective = full("fake", levels=KarrasUniform(5.0, 6.0), weight=1.0)
    batch = points(4)
    at = objective.compare(batch, 0, objective.generate(batch, 0))
    assert at.logits_BL is None, "where nobody needs a ratio it is not asked there"
    x_t, sigma_B = objective.criticised(at.x, batch, 0, "adversarial")
    assert (sigma_B >= 5).all() and (at.sigma_B <= 3).all()
    expected = nn.functional.softplus(-objective.logits(x_t, sigma_B, None)).mean()
    assert_close(objective.loss("generator", batch, 0).terms["adversarial"].mean(), expected)


def test_ratios_need_an_adversary_or_formulas():
    generator, teacher = networks()
    bare = RatioMatching(generator, teacher, seed=0, optimizer=SGD, fake_optimizer=SGD)
    with pytest.raises(RecipeError, match="RatioMatching needs a density ratio: give it an adversary"):
        bare.loss("generator", points(2), 0)
    with pytest.raises(RecipeError, match="needs ratio_lower < ratio_upper, got 2.0 and 1.0"):
        RatioMatching(*networks(), seed=0, optimizer=SGD, fake_optimizer=SGD, ratio_lower=2.0, ratio_upper=1.0)
    exact = quadrature(RatioMatching)
    x, level = torch.tensor([[0.2], [2.0]], dtype=torch.float64), torch.full((2,), SIGMA, dtype=torch.float64)
    expected = gaussian(0, 1).log_density(x, SIGMA) - gaussian(MU, S).log_density(x, SIGMA)
    assert_close(exact.logits(x, level, None), expected[:, None])


def test_one_bin_makes_the_mean_ratio_of_a_step_one():
    objective = quadrature(RatioMatching, bins=time_bins(KarrasUniform(), "sigma", 1, 0.0))
    assert isinstance(objective.bins, TimeBins)
    objective.collect(Quadrature.batch, 0)
    at = objective.compare(Quadrature.batch, 0, objective.generate(Quadrature.batch, 0))
    free = objective.ratio(at.logits_BL)
    assert_close(objective.ratio_at(at).float(), (free / free.mean()).float(), rtol=1e-4, atol=1e-5)


def networks(teacher: nn.Module | None = None):
    torch.manual_seed(0)
    teacher = teacher or jittered(mlp_denoiser(width=16, depth=2))
    return OneStep(copy.deepcopy(getattr(teacher, "denoiser", teacher)), 2.0), teacher


def full(trunk: str = "teacher", teacher: nn.Module | None = None, cls=DistributionMatching, **options):
    generator, teacher = networks(teacher)
    heads = Heads.on(tapped(generator.denoiser))
    adversary = Adversary(heads, SGD, trunk=trunk, **{"weight": 0.3, "r1": 0.5, **options})
    turn = Every(2)
    return cls(
        generator, teacher, seed=0, optimizer=SGD, fake_optimizer=SGD, adversary=adversary,
        levels=KarrasUniform(0.1, 3.0), generator_when=turn, fake_when=Unless(turn),
    )  # fmt: skip


def test_who_may_move_whom():
    """Generator: neither fake nor teacher gets a gradient. Fake score and discriminator: the generator gets none."""
    objective = full()
    has_gradient = lambda module: any(p.grad is not None for p in module.parameters())
    for player, moved in (
        ("generator", objective.generator),
        ("fake_score", objective.fake),
        ("discriminator", objective.heads),
    ):
        objective.zero_grad(set_to_none=True)
        if player == "generator":
            objective.heads.requires_grad_(False)  # as the trainer does
        objective.loss(player, points(6), 1).value().backward()
        objective.heads.requires_grad_(True)
        others = [objective.generator, objective.fake, objective.heads, objective.teacher]
        assert has_gradient(moved)
        assert not any(has_gradient(m) for m in others if m is not moved), player


def test_teacher_is_neither_trained_nor_saved_nor_moved():
    objective = full()
    assert {name.split(".")[0] for name in objective.state_dict()} == {"generator", "fake", "heads", "ema"}
    before = copy.deepcopy(objective.teacher.state_dict())
    start = copy.deepcopy(objective.state_dict())
    Trainer(TrainSpec(steps=3, batch=4, trackers=[], device="cpu")).fit(objective, Points(points(12).points_BD))
    for name, value in objective.teacher.state_dict().items():
        assert torch.equal(value, before[name])
    moved = {k.split(".")[0] for k, v in objective.state_dict().items() if not torch.equal(v, start[k])}
    assert moved == {"generator", "fake", "heads", "ema"}
    assert int(objective.ema.updates) == 2, "the average moves with the generator: steps 0 and 2"


@pytest.mark.parametrize("trunk", ["teacher", "fake"])
def test_adversarial_term_pulls_through_the_trunks_features(trunk):
    """The generator's gradient with the adversary minus the one without = weight x that of softplus(-logit)."""
    with_it, without = full(trunk), full(trunk, weight=0.0)
    batch = points(5)
    for objective in (with_it, without):
        torch.manual_seed(1)
        jittered(objective.fake)  # no longer the teacher's equal
    gradients = []
    for objective in (with_it, without):
        loss = objective.loss("generator", batch, 0).value()
        gradients.append(torch.autograd.grad(loss, list(objective.generator.parameters()), allow_unused=True))
    x = with_it.generate(batch, 0)
    x_t, sigma = with_it.noised(x, batch, 0, "compare")
    model = with_it.teacher if trunk == "teacher" else with_it.fake
    logits = with_it.heads(model.features(x_t, sigma))
    expected = torch.autograd.grad(
        0.3 * nn.functional.softplus(-logits).mean(), list(with_it.generator.parameters()), allow_unused=True
    )
    assert any(e is not None and e.abs().max() > 1e-5 for e in expected)
    at = with_it.compare(batch, 0, x)
    assert at.logits_BL.requires_grad and not (at.teacher.requires_grad or at.fake.requires_grad)
    for a, b, e in zip(*gradients, expected):
        if e is not None:
            assert_close(a - b, e, rtol=1e-3, atol=1e-6)


class Atoms(nn.Module):
    """A denoiser of three atoms whose features say which one a noised point is nearest to."""

    shape, places = (1,), torch.tensor([-1.0, 0.0, 1.0])

    def forward(self, x, sigma, condition=None):
        return x

    def features(self, x, sigma, condition=None, names=None):
        nearest = (x - self.places).abs().argmin(1)
        return {"which": nn.functional.one_hot(nearest, 3).float()}


def test_optimal_logit_is_log_teacher_over_student():
    """Real atoms in shares p, generated ones in shares q: the discriminator's stationary point is log p / q."""
    p, q = torch.tensor([1, 3, 6]), torch.tensor([5, 4, 1])

    class Tabular(DistributionMatching):
        def generate(self, batch, step):
            return Atoms.places.repeat_interleave(q)[:, None]

    table = nn.Linear(3, 1, bias=False)
    heads = Heads({"which": table})
    adversary = Adversary(heads, SGD)
    generator = affine_generator()
    objective = Tabular(
        generator, Atoms(), seed=0, optimizer=SGD, fake_optimizer=SGD, adversary=adversary,
        levels=KarrasUniform(1e-4, 1e-3), ema=None,
    )  # fmt: skip
    batch = PointBatch(torch.arange(10), Atoms.places.repeat_interleave(p)[:, None])
    optimizer = torch.optim.LBFGS(table.parameters(), max_iter=100, tolerance_grad=1e-8)

    def closure():
        optimizer.zero_grad()
        value = objective.loss("discriminator", batch, 0).value()
        value.backward()
        return value

    optimizer.step(closure)
    assert_close(table.weight[0], (p / q).log(), rtol=1e-3, atol=1e-3)


def test_r1_is_the_heads_change_under_a_tenth_of_unit_noise():
    objective = full(r1=2.0)
    batch = points(5)
    x_t, sigma = objective.noised(batch.points_BD, batch, 3, "real")
    n = keyed.normal_like(keyed.key(0, "shift", 3), batch.ids_B, x_t)
    change = objective.logits(x_t + 0.1 * n, sigma, None) - objective.logits(x_t, sigma, None)
    found = objective.loss("discriminator", batch, 3).terms
    assert_close(found["r1"].mean(), 2.0 * (change**2).mean())
    assert "r1" not in full(r1=0.0).loss("discriminator", batch, 3).terms


def test_shared_noise_gives_real_and_generated_samples_one_level_and_noise():
    class Same(DistributionMatching):
        def fake_samples(self, batch, step):
            return batch.points_BD

    batch = points(6)
    loss = full(cls=Same, shared_noise=True).loss(
        "discriminator", batch, 1
    )  # equal inputs: softplus(a) - softplus(-a) = a
    apart = full(cls=Same).loss("discriminator", batch, 1)
    logits = lambda one: one.logits(*one.noised(batch.points_BD, batch, 1, "real"), None)
    difference = lambda found: (found.terms["generated"].mean() - found.terms["real"].mean()).item()
    expected = logits(full()).mean().item()
    assert difference(loss) == pytest.approx(expected, abs=1e-6)
    assert difference(apart) != pytest.approx(expected, abs=1e-3)


def test_guidance_teaches_but_neither_the_fake_score_nor_the_discriminator_is_guided():
    torch.manual_seed(0)
    plain = jittered(mlp_denoiser(width=16, depth=2, classes=3, conditional=True))
    objective = full(teacher=Guided(plain, 3.0))
    assert type(objective.fake) is type(plain) and objective.trunk is plain
    x, sigma, labels = torch.randn(4, 2), torch.ones(4), torch.tensor([0, 1, 2, 0])
    teacher, fake, logits = objective.answers(x, sigma, labels)
    none = plain(x, sigma, torch.full((4,), 3))
    assert_close(teacher, none + 3.0 * (plain(x, sigma, labels) - none))
    assert_close(fake, plain(x, sigma, labels))
    assert_close(logits, objective.heads(plain.features(x, sigma, labels)))


def test_generator_and_fake_score_do_not_drop_out():
    objective = full()
    objective.generator.denoiser.network.layers.append(nn.Dropout(0.5))
    objective.train()
    assert not objective.generator.training and not objective.fake.training and objective.heads.training


def test_micro_batches_change_nothing(tmp_path):
    """Relative weights, adversarial term and three players: any layout gives the same weights and metrics."""

    class Weighted(DistributionMatching):
        def sample_weight(self, at):
            return at.x_t.detach().abs().sum(1)

    data = Points(points(20).points_BD)
    whole, cut = full(cls=Weighted), full(cls=Weighted)
    for objective, micro in ((whole, None), (cut, 2)):
        Trainer(TrainSpec(steps=4, batch=6, micro_batch=micro, trackers=[], device="cpu")).fit(objective, data)
    for (name, a), b in zip(whole.state_dict().items(), cut.state_dict().values()):
        assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_a_formula_is_no_player():
    assert list(quadrature(DistributionMatching).players) == ["generator"]
    assert list(full().players) == ["generator", "fake_score", "discriminator"]


def test_denoising_loss_has_edms_weight():
    x, sigma = torch.randn(3, 1, 2, 2), torch.tensor([0.5, 1.0, 2.0])
    zero = lambda x_t, sigma_B, condition: torch.zeros_like(x_t)
    expected = (1 / sigma**2 + 1 / 0.25) * (x**2).mean((1, 2, 3))
    assert_close(denoising_loss(zero, x, sigma, 0, torch.arange(3), 0.5), expected)


def test_denoiser_training_drops_labels_by_their_keyed_share():
    torch.manual_seed(0)
    seen = []

    class Spy(nn.Module):
        null_label = 10

        def forward(self, x, sigma, condition=None):
            seen.append(condition)
            return x

    batch = ImageBatch(torch.arange(4000), torch.zeros(4000, 1, 1, 1), torch.arange(4000) % 10)
    objective = DenoisingScoreMatching(Spy(), optimizer=SGD, seed=0, levels=LogNormal())
    objective.loss("student", batch, 0)
    dropped = seen[0] == 10
    assert 0.08 < dropped.float().mean() < 0.12
    assert torch.equal(seen[0][~dropped], batch.labels_B[~dropped])
    Spy.null_label = None
    objective.loss("student", batch, 0)
    assert seen[1] is None, "a network without labels is told none"


def test_denoiser_training_learns_images():
    """One constant picture, one noise: what is left is half of what was there."""
    torch.manual_seed(0)
    objective = DenoisingScoreMatching(unet_tiny(channels=1, size=8), optimizer=SGD, seed=0)
    x = torch.full((16, 1, 8, 8), 0.7)
    batch = ImageBatch(torch.arange(16), x, torch.zeros(16, dtype=torch.int64))
    optimizer = torch.optim.Adam(objective.student.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = objective.loss("student", batch, 0).value()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_batches_of_tokens_are_refused():
    two = torch.ones(1, 2)
    with pytest.raises(RecipeError, match="needs batches of images or points, got TokenBatch"):
        real_samples(TokenBatch(torch.arange(1), two.long(), two.bool(), two.bool()))
