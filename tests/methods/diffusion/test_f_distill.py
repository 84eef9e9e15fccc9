"""f-distill's theorem on 1-D Gaussians by quadrature, its two normalisations, and the method on real architectures."""

import copy
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.objectives.gaussians import jittered, points
from torch.testing import assert_close

from potstill import recipe as recipes
from potstill.contracts import keyed
from potstill.contracts.batch import ImageBatch, PointBatch
from potstill.contracts.errors import RecipeError
from potstill.contracts.players import OptimizerSpec
from potstill.divergences import (
    FDivergence,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    NeymanChi2,
    PearsonChi2,
    ReverseKL,
    SkewForwardKL,
    SoftenedReverseKL,
    SquaredHellinger,
    TimeBins,
)
from potstill.methods.diffusion.f_distill import FDistill, FDistillation, objective_of, time_bins
from potstill.models.denoisers import Denoiser, MixtureDenoiser, OneStep, affine, dit_tiny, mlp_denoiser, unet_tiny
from potstill.noise.gaussian import EDMPreconditioning, KarrasIndex, LogUniform
from potstill.noise.mixture import GaussianMixture
from potstill.objectives.matching import AffineScore, Bare, DistributionMatching
from potstill.run import Run, open_folder
from potstill.tasks.mixture import Points
from potstill.training.spec import TrainSpec
from potstill.training.trainer import Trainer
from potstill.use import evaluate_run, generate_run

MU, S, SIGMA = 0.6, 0.9, 0.7
SGD = OptimizerSpec(optimizer="sgd", momentum=0.0, lr=0.1)
ALL = [
    ReverseKL(), SoftenedReverseKL(), SquaredHellinger(), JensenShannon(), ForwardKL(), Jeffreys(), NeymanChi2(),
    PearsonChi2(), SkewForwardKL(0.2), JensenShannon(0.2),
]  # fmt: skip


# ---------------------------------------------------------------- the theorem


class Quadrature(FDistillation):
    """Gauss-Hermite nodes instead of random z and eps."""

    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(48))
    z, eps = (a.flatten()[:, None] for a in torch.meshgrid(nodes, nodes, indexing="ij"))
    node_weight = torch.outer(weights, weights).flatten() / (2 * torch.pi)
    batch = PointBatch(torch.arange(len(z)), torch.zeros(len(z), 1))
    swapped = False

    def latents(self, batch, step):
        return self.z

    def noised(self, x, batch, step, purpose):
        return x + SIGMA * self.eps, torch.full((len(x),), SIGMA, dtype=torch.float64)

    def ratio(self, logits_BL):  # no clipping, and no rounding to float32
        return (-logits_BL if self.swapped else logits_BL)[:, 0].exp()

    def sample_weight(self, at):
        self.h_B = super().sample_weight(at)
        return self.node_weight * self.h_B


def gaussian(mean: float, std: float) -> GaussianMixture:
    return GaussianMixture(torch.tensor([[mean]], dtype=torch.float64), std)


def quadrature(divergence: FDivergence, **options) -> Quadrature:
    generator = OneStep(affine().double(), sigma_init=1.0)
    with torch.no_grad():
        generator.denoiser.network.shift.fill_(MU)
        generator.denoiser.network.scale.fill_(S)
    return Quadrature(
        generator, MixtureDenoiser(gaussian(0, 1)), fake=AffineScore(generator), divergence=divergence, seed=0,
        optimizer=SGD, fake_optimizer=SGD, ema=None, normaliser=Bare(), **options,
    )  # fmt: skip


def gradient(objective: Quadrature) -> torch.Tensor:
    """Of the engine's loss with respect to (mu, s)."""
    network = objective.generator.denoiser.network
    loss = objective.loss("generator", Quadrature.batch, 0).value()
    return torch.cat(torch.autograd.grad(loss, [network.shift, network.scale]))


def derivative(divergence: FDivergence) -> torch.Tensor:
    """d D_f(p_t || q_t) / d (mu, s) by finite differences of the integral of q_t f(p_t / q_t)."""
    x = torch.linspace(-14, 14, 8001, dtype=torch.float64)[:, None]
    step = (x[1] - x[0]).item()

    def value(mu, s):
        log_p, log_q = (g.log_density(x, SIGMA) for g in (gaussian(0, 1), gaussian(mu, s)))
        return step * divergence.entries(teacher_logp=log_p[:, None], student_logp=log_q[:, None]).sum().item()

    h = 1e-4
    d = [(value(MU + h, S) - value(MU - h, S)) / (2 * h), (value(MU, S + h) - value(MU, S - h)) / (2 * h)]
    return torch.tensor(d, dtype=torch.float64)


@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_the_engines_gradient_is_the_divergences_derivative(divergence):
    """Equation 2. D_S - D_T = sigma^2 (s_q - s_p), and the trainer divides by E h: both are put back."""
    objective = quadrature(divergence)
    found = gradient(objective)
    mean_h = (Quadrature.node_weight * objective.h_B).sum()
    assert_close(found * mean_h / SIGMA**2, derivative(divergence), rtol=1e-5, atol=1e-7)


def test_a_swapped_ratio_is_another_divergence():
    """r = q / p with the forward KL's h points elsewhere; the reverse KL cannot tell."""
    for divergence, differs in ((ForwardKL(), True), (ReverseKL(), False)):
        right, wrong = quadrature(divergence), quadrature(divergence)
        wrong.swapped = True
        assert torch.allclose(gradient(right), gradient(wrong), rtol=1e-2) is not differs


TABLE = {  # the paper's table of h(r), up to a constant
    ReverseKL(): lambda r: torch.ones_like(r),
    SoftenedReverseKL(): lambda r: 1 / (r + 1),
    JensenShannon(): lambda r: r / (r + 1),
    SquaredHellinger(): lambda r: r.sqrt() / 4,
    ForwardKL(): lambda r: r,
    Jeffreys(): lambda r: r + 1,
    NeymanChi2(): lambda r: 1 / r,
}


@pytest.mark.parametrize("divergence", TABLE, ids=repr)
def test_weights_follow_the_papers_table(divergence):
    r = torch.tensor([0.1, 0.5, 1.0, 3.0, 20.0], dtype=torch.float64)
    f = lambda r: divergence.f(r.log())
    slope = torch.func.vmap(torch.func.grad(torch.func.grad(f)))
    assert_close(divergence.score_weight(r.log()), r**2 * slope(r))
    share = divergence.score_weight(r.log()) / TABLE[divergence](r)
    assert_close(share, share[:1].expand(5))


@dataclass(frozen=True)
class Tripled(FDivergence):
    def f(self, log_ratio):
        return 3 * ForwardKL().f(log_ratio)


def test_constants_of_h_cancel():
    assert_close(gradient(quadrature(ForwardKL())), gradient(quadrature(Tripled())))


# ---------------------------------------------------------------- networks


def learned(config: FDistill | None = None, teacher=None, condition=None) -> FDistillation:
    torch.manual_seed(0)
    teacher = teacher or jittered(mlp_denoiser(width=16, depth=2))
    return objective_of(config or small(), OneStep(copy.deepcopy(teacher), 2.0), teacher, SGD, 0, condition)


def small(**changes) -> FDistill:
    given = {"levels": LogUniform(0.1, 3.0), "sigma_init": 2.0, "fake": SGD, "discriminator": SGD, "ema": 0.9}
    return FDistill.model_validate(given | {"generator_every": 2} | changes)


def test_the_reverse_kl_is_dmd2_to_the_last_bit():
    batch, ours = points(6), learned(small(divergence="ReverseKL"))
    dmd2 = DistributionMatching(
        ours.generator, ours.teacher, seed=0, optimizer=SGD, fake_optimizer=SGD, fake=ours.fake,
        adversary=ours.adversary, levels=ours.levels,
    )  # fmt: skip
    ours.collect(batch, 0)
    wrt = list(ours.generator.parameters())
    for a, b in zip(*(torch.autograd.grad(o.loss("generator", batch, 0).value(), wrt) for o in (ours, dmd2))):
        assert torch.equal(a, b)
    forward = learned(small(divergence="ForwardKL"))
    first = torch.autograd.grad(forward.loss("generator", batch, 0).value(), list(forward.generator.parameters()))[0]
    assert not torch.equal(a, first)


def test_ratios_are_divided_by_the_running_mean_of_their_time_bin():
    """Two bins over sigma in 0..2; the whole batch fills them before the first ratio is divided."""
    objective = learned()
    objective.bins, objective.divergence = TimeBins(0.0, 2.0, 2, rho=0.5), ForwardKL()
    at = objective.compare(points(4), 0, objective.generate(points(4), 0))
    sigma = torch.tensor([0.5, 0.7, 1.5, 1.9])
    logits = torch.tensor([1.0, 2.0, 4.0, 6.0]).log()[:, None]
    at = type(at)(at.x, at.x_t, sigma, at.teacher, at.fake, logits)
    objective._gathered = (0, *objective.bins.sums(objective.ratio(logits), sigma))
    expected = torch.tensor([1 / 1.25, 2 / 1.25, 4 / 3, 6 / 3])  # means 1 -> (1 + 1.5) / 2 and (1 + 5) / 2
    assert_close(objective.sample_weight(at), expected, rtol=1e-5, atol=1e-5)
    assert_close(objective.bins.means, torch.tensor([1.25, 3.0]))
    assert_close(objective.sample_weight(at), expected, rtol=1e-5, atol=1e-5)  # not twice
    objective.bins = None
    assert_close(objective.sample_weight(at), logits[:, 0].exp())


def test_ratios_are_clipped():
    logits = torch.tensor([[-8.0, -4.0], [0.0, 0.2], [5.0, 7.0]])
    assert_close(learned().ratio(logits), torch.tensor([0.1, math.exp(0.1), 20.0]))


@pytest.mark.parametrize("divergence", ["ForwardKL", "JensenShannon"])
def test_micro_batches_change_nothing(divergence):
    """Both normalisations couple the batch; any cut of it gives the same weights and the same time bins."""
    data = Points(points(20).points_BD)
    config = small(divergence=divergence, ratio_ema=0.5, bins_over="log_sigma", bins=3)
    whole, cut = learned(config), learned(config)
    for objective, micro in ((whole, None), (cut, 2)):
        Trainer(TrainSpec(steps=4, batch=6, micro_batch=micro, trackers=[], device="cpu")).fit(objective, data)
    assert "bins.means" in whole.state_dict() and not torch.equal(whole.bins.means, torch.ones(3))
    for (name, a), b in zip(whole.state_dict().items(), cut.state_dict().values()):
        assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_two_processes_fill_the_same_time_bins(tmp_path):
    """torchrun with half of the batch each, against one process with all of it: weights, averages and bins."""
    script = tmp_path / "two.py"
    script.write_text(
        "import importlib.util, sys, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[3])!r})\n"
        "from safetensors.torch import save_file\n"
        f"spec = importlib.util.spec_from_file_location('t', {__file__!r})\n"
        "t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)\n"
        "objective = t.trained_for_ranks()\n"
        "assert torch.distributed.get_world_size() == 2\n"
        "if torch.distributed.get_rank() == 0:\n"
        f"    save_file(objective.state_dict(), {str(tmp_path / 'two.safetensors')!r})\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29537"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    two = load_file(tmp_path / "two.safetensors")
    for name, value in trained_for_ranks().state_dict().items():
        assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def trained_for_ranks() -> FDistillation:
    objective = learned(small(divergence="ForwardKL", ratio_ema=0.5, bins_over="log_sigma", bins=3))
    spec = TrainSpec(steps=3, batch=6, trackers=[], device="cpu")
    Trainer(spec).fit(objective, Points(points(20).points_BD))
    return objective


def test_turns():
    """Exclusive: 1 generator step to 4 of the others at 5; DMD2's schedule lets the others move always."""
    moves = lambda **c: {n: [p.when(s) for s in range(5)] for n, p in learned(small(**c)).players.items()}
    exclusive, always = moves(generator_every=5), moves(generator_every=5, exclusive=False)
    assert exclusive["generator"] == always["generator"] == [True, False, False, False, False]
    for name in ("fake_score", "discriminator"):
        assert exclusive[name] == [False, True, True, True, True] and all(always[name])


def test_the_discriminator_stays_for_the_ratio_without_its_term_in_the_generator():
    objective, batch = learned(small(gan_weight=0.0, divergence="ForwardKL")), points(6)
    loss = objective.loss("generator", batch, 0)
    assert set(loss.terms) == {"matching"} and "discriminator" in objective.players
    before = loss.metrics["weight_squared"].mean()
    with torch.no_grad():
        for p in objective.heads.parameters():
            p.mul_(3.0)
    assert not torch.isclose(objective.loss("generator", batch, 0).metrics["weight_squared"].mean(), before)


def test_exact_distillation_moves_the_generator_alone_and_towards_the_teacher():
    mixture = GaussianMixture(torch.tensor([[1.0, -1.0]]), 0.5)
    generator = OneStep(affine(dimension=2, shift=0.0, scale=1.0), 1.0)
    config = FDistill(exact=True, divergence="JensenShannon", generator_every=1, levels=LogUniform(0.05, 1.0), ema=0)
    adam = OptimizerSpec(optimizer="adam", lr=0.03)
    objective = objective_of(config, generator, MixtureDenoiser(mixture), adam, seed=0)
    assert list(objective.players) == ["generator"]
    Trainer(TrainSpec(steps=150, batch=64, trackers=[], device="cpu")).fit(objective, Points(torch.zeros(64, 2)))
    network = generator.denoiser.network
    assert_close(network.shift, mixture.means_KD[0], rtol=0, atol=0.1)
    assert_close(network.scale.abs(), torch.full((2,), 0.5), rtol=0, atol=0.1)


# ---------------------------------------------------------------- what a user can get wrong


def test_refusals():
    with pytest.raises(RecipeError, match=r"TotalVariation\(\) has r\^2 f''\(r\) = 0: its weight would never move"):
        recipes.resolve({"method": {"name": "f_distill", "divergence": "TotalVariation"}, "data": "digits"})
    with pytest.raises(RecipeError, match="needs ratio_lower < ratio_upper, got 3.0 and 2.0"):
        learned(small(ratio_lower=3.0, ratio_upper=2.0))
    with pytest.raises(RecipeError, match="exact: true takes teacher: exact-mixture and student: affine"):
        learned(small(exact=True))
    with pytest.raises(RecipeError, match="has no features for a discriminator. Set method.exact=true"):
        objective_of(small(), OneStep(affine(), 1.0), MixtureDenoiser(gaussian(0, 1)), SGD, 0)
    objective = learned()
    objective.adversary = objective.heads = None
    with pytest.raises(RecipeError, match="density ratio: give it an adversary"):
        objective.loss("generator", points(2), 0)


def test_time_bins_span_the_levels():
    bins = time_bins(FDistill())
    assert bins.low == pytest.approx(0.002) and bins.high == pytest.approx(80.0) and len(bins.means) == 10
    assert time_bins(FDistill(bins_over="log_sigma")).low == pytest.approx(math.log(0.002))
    assert time_bins(FDistill(ratio_normalization=False)) is None
    share = (bins.bin(KarrasIndex()(0, torch.arange(1000))) == 0).float().mean()
    assert share > 0.6, "on Karras' levels most draws fall into the first bin of sigma"


# ---------------------------------------------------------------- whole runs


def run(folder, overrides=(), **sections):
    raw = {"method": "f_distill", "data": {"task": "digits"}, "train": {"steps": 2, "batch": 4, "trackers": []}}
    raw = recipes.apply({**raw, **sections}, overrides)
    plan = recipes.resolve(raw)
    open_folder(folder, recipes.write(plan))
    return Run(plan, folder).execute()


def saved(model, folder):
    model.save(folder)
    return str(folder)


@pytest.mark.needs("diffusers", "sklearn", "PIL")
@pytest.mark.parametrize("trunk", ["teacher", "fake"])
def test_a_unet_run_leaves_a_student_that_diffusers_loads(trunk, tmp_path, untrained_judge):
    from diffusers import UNet2DModel

    teacher = saved(jittered(unet_tiny(channels=1, size=8, classes=10, conditional=True)), tmp_path / "teacher")
    result = run(
        tmp_path / "run",
        [f"method.trunk={trunk}", "method.generator_every=2", "eval.limit=12"],
        teacher=teacher, student={"from": "teacher"}, data={"task": "digits", "size": 64, "test_size": 40},
    )  # fmt: skip
    network = UNet2DModel.from_pretrained(tmp_path / "run/student")
    for a, b in zip(network.state_dict().values(), result.student.denoiser.network.state_dict().values()):
        assert torch.equal(a, b)
    again = OneStep.from_pretrained(tmp_path / "run/student")
    assert again.kind == "one_step" and again.sigma_init == 80.0
    assert_close(again.generate(4, seed=1), result.student.generate(4, seed=1))
    assert {"fid_own", "recall", "before_fid_own", "teacher_fid_own", "samples_per_second"} <= set(result.metrics)
    found = evaluate_run(tmp_path / "run", ["eval.limit=12"])
    assert found["fid_own"] == pytest.approx(result.metrics["fid_own"]), "the same noise and labels, measured again"
    assert generate_run(tmp_path / "run", prompt=None, count=4, tokens=0, seed=0, output=None).is_file()
    records = {p.stem for p in (tmp_path / "run/records").glob("*.json")}
    assert {"samples", "predictions", "comparison"} <= records


@pytest.mark.needs("diffusers", "sklearn", "PIL")
def test_a_diffusion_transformer_runs(tmp_path, untrained_judge):
    teacher = saved(
        jittered(dit_tiny(channels=1, size=8, classes=10, conditional=True, width=32)), tmp_path / "teacher"
    )
    result = run(
        tmp_path / "run", ["eval.limit=12", "method.guidance=1.5", "method.generator_every=2"],
        teacher=teacher, student={"from": "teacher", "lora": {"r": 2}},
        data={"task": "digits", "size": 64, "test_size": 40},
    )  # fmt: skip
    assert result.student.generate(3).shape == (3, 1, 8, 8)


@pytest.mark.needs("diffusers")
def test_a_text_conditional_unet_moves_all_three_players():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    teacher = Denoiser(network, EDMPreconditioning(), [4, 8, 8], "sd")

    class Captioned:
        def __len__(self):
            return 8

        def batch(self, rows, epoch=0):
            states = keyed.normal_like(1, rows, torch.empty(len(rows), 5, 12))
            return ImageBatch(rows, torch.randn(len(rows), 4, 8, 8), torch.zeros(len(rows), dtype=torch.int64), states)

    objective = learned(small(), teacher, torch.zeros(1, 5, 12))
    start = copy.deepcopy(objective.state_dict())
    Trainer(TrainSpec(steps=2, batch=4, trackers=[], device="cpu")).fit(objective, Captioned())
    moved = {k.split(".")[0] for k, v in objective.state_dict().items() if not torch.equal(v, start[k])}
    assert {"generator", "fake", "heads", "ema", "bins"} <= moved
