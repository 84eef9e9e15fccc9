"""Uni-Instruct: one-step diffusion by any f-divergence, expanded over the noise levels.

    D_f(p_0 || q_0) = int 1/2 E_{x_t ~ q_t}[ F(r) |y|^2 ] d(sigma^2) + D_f(p_S || q_S),  F(r) = r^2 f''(r)            (1)
    p teacher, q student, r = p_t / q_t, y = s_S - s_T, D_f(p || q) = E_q f(p / q);  gradient of a level, in three parts:
    score:     grad E[ -2 F(r(x_t)) y^T (s_S - grad log q(x_t | x)) ], through x_t everywhere, r too
    ratio:     E[ sg(r^2 F''(r) |y|^2 y)^T dx_t / dtheta ]
    sampling:  E[ sg(F - r F') (grad |y|^2)^T dx_t / dtheta ]
    L_G = sum_elements (the three parts) sigma^4 / (2 om) * 100 + 0.01 n softplus(-logit) / om,  om = sg[mean |x - D_T|]
    L_S = denoising of sg[G(z)] + 1/2 [mean softplus(logit fake) + mean softplus(-logit real)],  r = exp(logit)

ForwardKL has the score part alone, ReverseKL the score part of SIM and the sampling part, without r. `parts` switches
them: score alone is SIM or SiD weighted by F, ratio alone is Diff-Instruct-like. The discriminator is the mean over the
channels of the fake score's bottleneck, trained with it. First only the fake score moves, then the generator by SiD at
alpha = 1, then by the divergence.

Source: "Uni-Instruct: One-step Diffusion Model through Unified Diffusion Divergence Instruction", arXiv 2505.20755; the
authors' code; the gradient derived again, because the statement for ReverseKL lacks the sampling part.
Departures from the code: r is exp(logit), not a function of the value of the discriminator's loss, and has its gradient
(`ratio_gradient: none` drops it, as the code does; `scores` gives it that of the score difference); r is clipped to
[0.1, 20], f-distill's range; the discriminator learns at the levels where its ratio is asked, not at the fake score's;
Jeffreys has equal shares; no clipping of single gradient values.
"""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from potstill.contracts.batch import Batch
from potstill.contracts.players import Every, From, OptimizerSpec
from potstill.contracts.spec import Part
from potstill.divergences import FDivergence, ForwardKL, expanded, scores, with_score_gradient
from potstill.methods import Role, method
from potstill.methods.diffusion.fake_score import Curved, FakeScoreConfig, bottleneck, distilled, heads, options
from potstill.methods.diffusion.sid import OM
from potstill.models.denoisers import Condition, OneStep
from potstill.noise.gaussian import KarrasUniform, LevelSampler, spread
from potstill.objectives.blocks import Heads
from potstill.objectives.matching import (
    Adversary,
    Comparison,
    Normaliser,
    RatioMatching,
    ScoreSurrogate,
    time_bins,
)
from potstill.run import Result, Run

RatioGradient = Literal["network", "scores", "none"]


class UniInstruct(FakeScoreConfig):
    divergence: Curved = ForwardKL()  # type: ignore[valid-type]  # the best on ImageNet-64
    parts: list[Literal["score", "ratio", "sampling"]] = ["score", "ratio", "sampling"]
    ratio_gradient: RatioGradient = "network"
    ratio_lower: float = Field(0.1, ge=0)
    ratio_upper: float = Field(20.0, gt=0)
    ratio_normalization: bool = False  # r divided by its mean in the batch
    warmup: int = Field(390, ge=0)  # steps of the fake score alone: 100,000 images at batch 256
    sid_until: int = Field(781, ge=0)  # the step at which the divergence takes over from SiD: 200,000 images
    levels: Part(LevelSampler) = KarrasUniform(high=0.8)  # type: ignore[valid-type]
    normaliser: Part(Normaliser) = OM  # type: ignore[valid-type]
    elements: Literal["mean", "sum"] = "sum"
    scale: float = Field(100.0, gt=0)
    gan_weight: float = Field(0.01, ge=0)  # 0: without a GAN; the discriminator stays for the ratio
    discriminator_weight: float = Field(1.0, gt=0)
    head: Literal["channel_mean", "learned"] = "channel_mean"
    taps: list[str] | None = None  # blocks of the fake score that the discriminator reads; default: the bottleneck


class ChannelMean(nn.Module):
    """The mean over channels as a logit of each position: [B, C, H, W] -> [B, HW], [B, T, D] -> [B, T], [B, D] -> [B, 1]."""

    def forward(self, features: Tensor) -> Tensor:
        if features.dim() == 2:
            return features.mean(1, keepdim=True)
        return features.mean(1 if features.dim() == 4 else -1).flatten(1)


class ExpandedMatching(RatioMatching, ScoreSurrogate):
    """A level of the expansion of an f-divergence, after `sid_until` steps of SiD."""

    def __init__(
        self,
        generator: OneStep,
        teacher: Any,
        *,
        divergence: FDivergence,
        parts: Sequence[str] = scores.PARTS,
        ratio_gradient: RatioGradient = "network",
        sid_until: int = 0,
        **given: Any,
    ) -> None:
        super().__init__(generator, teacher, **given)
        self.divergence, self.parts = divergence, parts
        self.ratio_gradient, self.sid_until = ratio_gradient, sid_until

    def log_ratio(self, at: Comparison, teacher: Tensor, student: Tensor) -> Tensor:
        """log r in value as every ratio here, with the gradient in x_t that was chosen; none where r is clipped. [B]"""
        assert at.logits_BL is not None
        value_B = self.ratio_at(at).log().to(at.x.dtype)
        free_B = at.logits_BL.to(at.x.dtype).mean(1)
        if self.ratio_gradient == "scores":
            free_B = with_score_gradient(free_B, at.x_t, teacher_score=teacher, student_score=student)
        lower, upper = self.limits
        inside_B = (free_B.detach().exp() >= lower) & (free_B.detach().exp() <= upper)
        return value_B + inside_B * (free_B - free_B.detach())

    def surrogate(self, at: Comparison, step: int) -> Tensor:
        if step < self.sid_until:
            return scores.sid(at.x, teacher=at.teacher, student=at.fake)
        variance = spread(at.sigma_B**2, at.x)
        teacher, student, conditional = (d / variance for d in (at.teacher, at.fake, at.x))  # scores, but for -x_t
        value_B = expanded(
            self.divergence, at.x_t, teacher_score=teacher, student_score=student, conditional_score=conditional,
            log_ratio=self.log_ratio(at, teacher, student), parts=self.parts,
            detach_ratio=self.ratio_gradient == "none",
        )  # fmt: skip
        return 0.5 * at.sigma_B.to(value_B.dtype) ** 4 * value_B

    def adversarial(self, at: Comparison, batch: Batch, step: int) -> Tensor:
        """Weighted as the surrogate is, and as many times as there are elements to sum; nothing while SiD lasts."""
        value_B = super().adversarial(at, batch, step) / self.normaliser(at) * (step >= self.sid_until)
        return value_B * at.x[0].numel() if self.elements == "sum" else value_B


def objective_of(
    config: UniInstruct,
    generator: OneStep,
    teacher: Any,
    optimizer: OptimizerSpec,
    seed: int,
    condition: Condition = None,
) -> ExpandedMatching:
    given = options(config, generator, teacher, optimizer, seed)
    adversary = None
    if not config.exact:
        taps = config.taps or bottleneck(teacher)
        fitted = heads(teacher, taps, condition)
        chosen = fitted if config.head == "learned" else Heads({name: ChannelMean() for name in fitted.names})
        adversary = Adversary(
            chosen, config.fake, taps, "fake", config.gan_weight, shared_noise=True,
            joint=0.5 * config.discriminator_weight,
        )  # fmt: skip
    given["generator_when"] = From(config.warmup, Every(config.generator_every))
    return ExpandedMatching(
        generator,
        divergence=config.divergence,
        parts=config.parts,
        ratio_gradient=config.ratio_gradient,
        ratio_lower=config.ratio_lower,
        ratio_upper=config.ratio_upper,
        bins=time_bins(config.levels, "sigma", 1, 0.0) if config.ratio_normalization else None,
        sid_until=config.sid_until,
        normaliser=config.normaliser,
        elements=config.elements,
        scale=config.scale,
        adversary=adversary,
        fake_first=True,
        **given,
    )


@method("uni_instruct", student=Role("denoiser", ready=False), teacher="denoiser", data=("images", "points"))
def uni_instruct(run: Run, config: UniInstruct) -> Result:
    return distilled(run, config, objective_of)
