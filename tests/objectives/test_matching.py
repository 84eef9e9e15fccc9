"""One-step distribution matching against 1-D Gaussians by quadrature, and who may move whom."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from potstill.contracts import keyed
from potstill.contracts.batch import ImageBatch, PointBatch, TokenBatch
from potstill.contracts.errors import RecipeError
from potstill.contracts.players import Every, OptimizerSpec, Unless
from potstill.models.denoisers import Guided, MixtureDenoiser, OneStep, affine, mlp_denoiser, unet_tiny
from potstill.noise.gaussian import KarrasUniform, LogNormal
from potstill.noise.mixture import GaussianMixture
from potstill.objectives.blocks import Heads
from potstill.objectives.matching import (
    Adversary,
    Comparison,
    DenoisingScoreMatching,
    DistributionMatching,
    denoising_loss,
    identity_surrogate,
    real_samples,
    tapped,
)
from potstill.tasks.mixture import Points
from potstill.training.spec import TrainSpec
from potstill.training.trainer import Trainer

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


def gradient(objective: DistributionMatching, value: torch.Tensor) -> torch.Tensor:
    """With respect to (mu, s)."""
    network = objective.generator.denoiser.network
    return torch.cat(torch.autograd.grad(value, [network.shift, network.scale]))


class Quadrature(DistributionMatching):
    """Gauss-Hermite nodes instead of random z and eps: `sample_weight` holds the nodes' weights."""

    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(40))
    z, eps = (a.flatten()[:, None] for a in torch.meshgrid(nodes, nodes, indexing="ij"))
    node_weight = torch.outer(weights, weights).flatten() / (2 * torch.pi)
    batch = PointBatch(torch.arange(len(z)), torch.zeros(len(z), 1))

    def latents(self, batch, step):
        return self.z

    def noised(self, x, batch, step, purpose):
        return x + SIGMA * self.eps, torch.full((len(x),), SIGMA, dtype=torch.float64)

    def sample_weight(self, at):
        return self.node_weight


def quadrature(**options) -> Quadrature:
    pair = {"teacher": MixtureDenoiser(gaussian(0, 1)), "fake": MixtureDenoiser(gaussian(MU, S))}
    return Quadrature(affine_generator(), **pair, seed=0, optimizer=SGD, fake_optimizer=SGD, **options)


def test_bare_field_has_the_gradient_of_the_reverse_kl():
    """Diff-Instruct: D_S - D_T = sigma^2 (s_S - s_T), so the gradient is sigma^2 times that of KL(q_t || p_t)."""
    objective = quadrature(normalize=False, ema=None)
    a, b = S**2 + SIGMA**2, 1 + SIGMA**2  # KL(N(mu, a) || N(0, b)) = (log(b / a) + (a + mu^2) / b - 1) / 2
    expected = SIGMA**2 * torch.tensor([MU / b, S * (1 / b - 1 / a)], dtype=torch.float64)
    assert_close(gradient(objective, objective.loss("generator", Quadrature.batch, 0).value()), expected)


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
    objective = quadrature(ema=None)
    x = objective.generate(Quadrature.batch, 0)
    x_t, level = objective.noised(x, Quadrature.batch, 0, "compare")
    teacher, fake = objective.teacher(x_t, level), objective.fake(x_t, level)
    found = gradient(objective, (Quadrature.node_weight * identity_surrogate(x, teacher, fake)).sum())
    assert_close(2 * found, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9)
    assert_close(2 * found / SIGMA**4, torch.tensor([0.6195, -0.2716], dtype=torch.float64), rtol=0, atol=1e-4)


def test_field_is_dmd2s_and_its_bare_form_diff_instructs():
    x, teacher, fake = (keyed.normal_like(k, torch.arange(3), torch.empty(3, 2, 4, 4)) for k in range(3))
    at = Comparison(x, x, torch.ones(3), teacher, fake, None)
    scale = (x - teacher).abs().mean((1, 2, 3), keepdim=True)
    assert_close(quadrature().field(at), (fake - teacher) / (scale + 1e-6))
    assert_close(quadrature(normalize=False).field(at), fake - teacher)


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


def networks(teacher: nn.Module | None = None):
    torch.manual_seed(0)
    teacher = teacher or jittered(mlp_denoiser(width=16, depth=2))
    return OneStep(copy.deepcopy(getattr(teacher, "denoiser", teacher)), 2.0), teacher


def jittered(model: nn.Module) -> nn.Module:
    """Away from the zeros that last layers start with."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def points(size: int, first: int = 0) -> PointBatch:
    ids = torch.arange(first, first + size)
    return PointBatch(ids, keyed.normal_like(7, ids, torch.empty(size, 2)))


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
    assert list(quadrature().players) == ["generator"]
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
