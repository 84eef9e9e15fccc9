"""f-distill: one-step diffusion by the score difference, weighted so that any f-divergence is minimised.

    D_f(p || q) = E_q f(r),  r = p / q;  p teacher, q student, p_t and q_t noised, s their scores                      (1)
    grad D_f(p_t || q_t) = -E_{z, eps} [ h(r(x_t)) (s_p - s_q)(x_t)^T dx_t / dtheta ],  h(r) = r^2 f''(r)              (2)
    r(x_t) = exp of the discriminator's logit (mean over heads, clamped to +-10), clipped to [0.1, 20], detached
    stage 1: r <- r / (its running mean in the time bin + 1e-6);  stage 2: h <- h / mean over the global batch
    L_G = 1/2 mean |x - sg[x - w (D_S - D_T)]|^2 + lambda mean softplus(-logit),  w = h / (mean |x - D_T| + 1e-6)
    L_D = mean softplus(logit fake) + mean softplus(-logit real) + gamma R1;  L_S = denoising of sg[G(z)]

One step in `generator_every` moves the generator, the others move fake score and discriminator. ReverseKL has h = 1 and
is DMD2.

Source: "One-step Diffusion Models with f-Divergence Distribution Matching", arXiv 2502.15681; FastGen's code.
Departures: h follows from f for every divergence, not from a table. Stage 2 is the trainer's division by the sum of h
over micro-batches and ranks (no epsilon), and the bins of stage 1 are filled from the whole batch before any micro-batch
is divided by them, so that the batch layout changes nothing. The running means are saved with the objective, not inside
the student. The fake score has EDM's weight, as in DMD2, where FastGen leaves its loss unweighted. R1 moves the noised
input; FastGen moves the clean image and gives it to the teacher without noise. `bins_over: log_sigma` spreads the bins
where the levels are (on Karras' levels to 80 nearly all of them fall in the first bin of sigma).
"""

import copy
import math
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from potstill.contracts.batch import Batch
from potstill.contracts.errors import RecipeError
from potstill.contracts.players import Always, Every, OptimizerSpec, Unless
from potstill.contracts.spec import MethodConfig, Part
from potstill.divergences import FDivergence, ForwardKL, TimeBins, ratio_from_logits
from potstill.methods import Role, method
from potstill.methods.diffusion.comparison import compared
from potstill.models.denoisers import Condition, Guided, MixtureDenoiser, OneStep, PointAffine
from potstill.noise.gaussian import KarrasIndex, LevelSampler
from potstill.noise.mixture import GaussianMixture
from potstill.objectives.blocks import Heads
from potstill.objectives.matching import Adversary, Comparison, DistributionMatching, condition_of, tapped
from potstill.run import Result, Run


class FDistill(MethodConfig):
    divergence: Part(FDivergence) = ForwardKL()  # type: ignore[valid-type]  # table 1: the best on CIFAR-10
    generator_every: int = Field(5, ge=1)
    exclusive: bool = True  # fake score and discriminator rest while the generator moves; DMD2: false
    gan_weight: float = Field(1e-3, ge=0)  # lambda; at 0 the discriminator only gives the ratio
    r1: float = Field(1.0, ge=0)  # gamma
    trunk: Literal["teacher", "fake"] = "teacher"  # whose features the discriminator sees
    taps: list[str] | None = None  # blocks of the trunk; default: the downward and middle ones
    shared_noise: bool = False  # real and generated samples at the same level and noise
    ratio_lower: float = Field(0.1, ge=0)
    ratio_upper: float = Field(20.0, gt=0)
    ratio_normalization: bool = True  # stage 1
    bins: int = Field(10, ge=1)
    bins_over: Literal["sigma", "log_sigma"] = "sigma"
    ratio_ema: float = Field(0.0, ge=0, lt=1)  # rho; 0.5 on ImageNet-64
    levels: Part(LevelSampler) = KarrasIndex()  # type: ignore[valid-type]
    sigma_init: float = Field(80.0, gt=0)  # G(z) = D(sigma_init z; sigma_init)
    guidance: float = Field(1.0, ge=1)  # of the teacher; 1.75 for SD 1.5
    ema: float = Field(0.9999, ge=0, lt=1)
    fake: OptimizerSpec = OptimizerSpec(lr=1e-4, weight_decay=0.01)
    discriminator: OptimizerSpec = OptimizerSpec(lr=1e-4, weight_decay=0.01)
    exact: bool = False  # mixture teacher, affine student: scores and ratio in closed form, nothing but h differs

    @field_validator("divergence")
    @classmethod
    def _has_curvature(cls, divergence: FDivergence) -> FDivergence:
        log_ratio = torch.tensor([-1.0, 0.0, 1.0])
        if not (divergence.score_weight(log_ratio) > 0).any():
            raise ValueError(
                f"{divergence} has r^2 f''(r) = 0: its weight would never move the student. Take a smooth one"
            )
        return divergence


class FDistillation(DistributionMatching):
    """Distribution matching weighted by h(r) = r^2 f''(r), r from the adversary's logits."""

    def __init__(
        self,
        generator: OneStep,
        teacher: Any,
        *,
        divergence: FDivergence,
        ratio_lower: float = 0.1,
        ratio_upper: float = 20.0,
        bins: TimeBins | None = None,
        bins_over: Literal["sigma", "log_sigma"] = "sigma",
        **options: Any,
    ) -> None:
        super().__init__(generator, teacher, **options)
        self.divergence, self.limits = divergence, (ratio_lower, ratio_upper)
        self.bins, self.bins_over = bins, bins_over
        self._gathered: tuple[int, Tensor, Tensor] | None = None  # (step, totals, counts) of the time bins

    def ratio(self, logits_BL: Tensor) -> Tensor:
        lower, upper = self.limits
        return ratio_from_logits(logits_BL, lower=lower, upper=upper)

    def times(self, sigma_B: Tensor) -> Tensor:
        return sigma_B.log() if self.bins_over == "log_sigma" else sigma_B

    def collect(self, batch: Batch, step: int) -> Batch:
        """Stage 1 needs the ratios of the whole batch before the first of them is divided."""
        if self.bins is not None and self.generator_when(step):
            x_t, sigma_B = self.noised(self.generate(batch, step), batch, step, "compare")
            ratio_B = self.ratio(self.logits(x_t, sigma_B, self.condition(batch)))
            total, count = self.bins.sums(ratio_B, self.times(sigma_B))
            if self._gathered is not None and self._gathered[0] == step:
                total, count = total + self._gathered[1], count + self._gathered[2]
            self._gathered = (step, total, count)
        return batch

    def sample_weight(self, at: Comparison) -> Tensor:
        if at.logits_BL is None:
            raise RecipeError("f-distill weighs samples by a density ratio: give it an adversary.")
        ratio_B = self.ratio(at.logits_BL)
        if self.bins is not None:
            if self._gathered is not None:
                _, total, count = self._gathered
                self.bins.update(over_ranks(total), over_ranks(count))
                self._gathered = None
            ratio_B = self.bins.divide(ratio_B, self.times(at.sigma_B))
        return self.divergence.score_weight(ratio_B.log())


class ExactFDistillation(FDistillation):
    """An affine generator of points against a Gaussian mixture: both scores and the ratio are formulas."""

    def student_density(self) -> GaussianMixture:
        affine: PointAffine = self.generator.denoiser.network
        std_D = (affine.scale * self.generator.sigma_init).abs().detach()
        return GaussianMixture(affine.shift.detach()[None], std_D[None])

    def logits(self, x_t: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        """log p(x_t) - log q(x_t). [B, 1]"""
        log_q_B = self.student_density().log_density(x_t, sigma_B)
        return (self.teacher.mixture.log_density(x_t, sigma_B) - log_q_B)[:, None]

    def answers(self, x_t: Tensor, sigma_B: Tensor, condition: Condition) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch.no_grad():
            fake = self.student_density().denoise(x_t, sigma_B)
            return self.teacher(x_t, sigma_B), fake, self.logits(x_t, sigma_B, condition)


def over_ranks(x: Tensor) -> Tensor:
    """The sum of a tensor over the processes of the run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x


def time_bins(config: FDistill) -> TimeBins | None:
    """Equal bins between the ends of the noise levels."""
    if not config.ratio_normalization:
        return None
    low, high = config.levels.of_uniform(torch.tensor([1e-4, 1 - 1e-4], dtype=torch.float64)).tolist()
    if config.bins_over == "log_sigma":
        low, high = math.log(low), math.log(high)
    return TimeBins(low, high, config.bins, config.ratio_ema)


def objective_of(
    config: FDistill,
    generator: OneStep,
    teacher: Any,
    optimizer: OptimizerSpec,
    seed: int,
    condition: Condition = None,
) -> FDistillation:
    """The three players of a config. `teacher` is a plain denoiser, which guidance is added to; `condition` that of any
    one sample, where the teacher needs one."""
    if not config.ratio_lower < config.ratio_upper:
        raise RecipeError(
            f"f_distill needs ratio_lower < ratio_upper, got {config.ratio_lower} and {config.ratio_upper}."
        )
    turn = Every(config.generator_every)
    exact = isinstance(teacher, MixtureDenoiser) and isinstance(
        getattr(generator.denoiser, "network", None), PointAffine
    )
    if config.exact and not exact:
        raise RecipeError("f_distill with exact: true takes teacher: exact-mixture and student: affine, on points.")
    if isinstance(teacher, MixtureDenoiser) and not config.exact:
        raise RecipeError("A mixture has no features for a discriminator. Set method.exact=true, or train a teacher.")
    adversary = None
    if not config.exact:
        device = next(teacher.parameters()).device
        heads = Heads.on(tapped(teacher, config.taps, condition)).to(device)
        adversary = Adversary(
            heads, config.discriminator, config.taps, config.trunk, config.gan_weight, config.r1, config.shared_noise
        )
    return (ExactFDistillation if config.exact else FDistillation)(
        generator,
        Guided(teacher, config.guidance) if config.guidance > 1 else teacher,
        divergence=config.divergence,
        ratio_lower=config.ratio_lower,
        ratio_upper=config.ratio_upper,
        bins=time_bins(config),
        bins_over=config.bins_over,
        seed=seed,
        optimizer=optimizer,
        fake_optimizer=config.fake,
        adversary=adversary,
        levels=config.levels,
        generator_when=turn,
        fake_when=Unless(turn) if config.exclusive else Always(),
        ema=config.ema or None,
    )


@method("f_distill", student=Role("denoiser", ready=False), teacher="denoiser", data=("images", "points"))
def f_distill(run: Run, config: FDistill) -> Result:
    teacher = run.model("teacher")
    generator = OneStep(run.student(), config.sigma_init)
    before = copy.deepcopy(generator).eval()
    torch.manual_seed(run.seed)  # the discriminator's first weights
    one = condition_of(run.source.train.batch(torch.zeros(1, dtype=torch.int64)).to(run.device), teacher)
    objective = objective_of(config, generator, teacher, run.train.optimizer_spec(), run.seed, one)
    run.fit(objective, run.source.train)
    return compared(run, objective, before)
