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

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from potstill.contracts.players import Always, Every, OptimizerSpec, Unless
from potstill.contracts.spec import MethodConfig, Part
from potstill.divergences import FDivergence, ForwardKL, TimeBins
from potstill.methods import Role, method
from potstill.methods.diffusion import fake_score
from potstill.models.denoisers import Condition, OneStep
from potstill.noise.gaussian import KarrasIndex, LevelSampler
from potstill.objectives import matching
from potstill.objectives.matching import Adversary, Comparison, RatioMatching
from potstill.run import Result, Run


class FDistill(MethodConfig):
    divergence: fake_score.Curved = ForwardKL()  # type: ignore[valid-type]  # table 1: the best on CIFAR-10
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


class FDistillation(RatioMatching):
    """Distribution matching weighted by h(r) = r^2 f''(r), r from the adversary's logits."""

    def __init__(self, generator: OneStep, teacher: Any, *, divergence: FDivergence, **options: Any) -> None:
        super().__init__(generator, teacher, **options)
        self.divergence = divergence

    def sample_weight(self, at: Comparison) -> Tensor:
        return self.divergence.score_weight(self.ratio_at(at).log())


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
    turn = Every(config.generator_every)
    adversary = None
    if not config.exact:
        adversary = Adversary(
            fake_score.heads(teacher, config.taps, condition), config.discriminator, config.taps, config.trunk,
            config.gan_weight, config.r1, config.shared_noise,
        )  # fmt: skip
    return FDistillation(
        generator,
        divergence=config.divergence,
        ratio_lower=config.ratio_lower,
        ratio_upper=config.ratio_upper,
        bins=time_bins(config),
        bins_over=config.bins_over,
        adversary=adversary,
        fake_when=Unless(turn) if config.exclusive else Always(),
        **fake_score.options(config, generator, teacher, optimizer, seed),
    )


def time_bins(config: FDistill) -> TimeBins | None:
    """Stage 1: equal bins between the ends of the noise levels."""
    if not config.ratio_normalization:
        return None
    return matching.time_bins(config.levels, config.bins_over, config.bins, config.ratio_ema)


@method("f_distill", student=Role("denoiser", ready=False), teacher="denoiser", data=("images", "points"))
def f_distill(run: Run, config: FDistill) -> Result:
    return fake_score.distilled(run, config, objective_of)
