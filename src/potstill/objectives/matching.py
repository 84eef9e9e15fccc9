"""Score matching with a fake score: the engine behind one-step diffusion distillation.

    x = G(z),  x_t = x + sigma eps,  D_T the frozen teacher, D_S the fake score (a denoiser of the generator's samples)

Two losses suffice for the published methods. `DistributionMatching`: a detached pseudo-target on x, whose gradient is a
vector field v,

    L = 1/2 mean |x - sg[x - v]|^2   =>   dL/dx = v / numel,

and `ScoreSurrogate`: a scalar whose gradient flows through x_t into the frozen networks. A method is then a choice of
field or surrogate, of what normalises it, of the levels on which generator and fake score are compared, of a weight a
sample, of an adversary, and of who moves when. B samples, C H W (or D), L logits of one sample.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from potstill.contracts import keyed
from potstill.contracts.batch import Batch, ImageBatch, PointBatch
from potstill.contracts.errors import RecipeError
from potstill.contracts.players import Always, Objective, OptimizerSpec, Player, When
from potstill.contracts.spec import Part
from potstill.contracts.terms import Loss, Term
from potstill.divergences import TimeBins, ratio_from_logits
from potstill.models.build import freeze
from potstill.models.denoisers import Condition, Guided, MixtureDenoiser, OneStep, PointAffine
from potstill.models.ema import EMA
from potstill.noise.gaussian import LevelSampler, LogNormal, edm_weight, spread
from potstill.noise.mixture import GaussianMixture
from potstill.objectives.blocks import Heads


def real_samples(batch: Batch) -> Tensor:
    """The data of a batch: images or points. [B, ...]"""
    if isinstance(batch, ImageBatch):
        return batch.images
    if isinstance(batch, PointBatch):
        return batch.points_BD
    raise RecipeError(f"Diffusion needs batches of images or points, got {type(batch).__name__}.")


def per_sample(x: Tensor, elements: Literal["mean", "sum"] = "mean") -> Tensor:
    """Mean or sum over all but the batch. [B, ...] -> [B]"""
    return x.flatten(1).mean(1) if elements == "mean" else x.flatten(1).sum(1)


def noised(x: Tensor, sigma_B: Tensor, seed: int, ids_B: Tensor) -> Tensor:
    """x + sigma eps, eps a function of (seed, id)."""
    return x + spread(sigma_B, x) * keyed.normal_like(seed, ids_B, x)


def condition_of(batch: Batch, denoiser: Any) -> Condition:
    """What a denoiser is told of a batch's samples: their own condition, else their labels if it takes labels."""
    if not isinstance(batch, ImageBatch):
        return None
    if batch.condition is not None:
        return batch.condition
    return batch.labels_B if getattr(denoiser, "null_label", None) is not None else None


def denoising_loss(
    denoiser: nn.Module,
    x: Tensor,
    sigma_B: Tensor,
    seed: int,
    ids_B: Tensor,
    sigma_data: float,
    condition: Condition = None,
) -> Tensor:
    """EDM's (1/sigma^2 + 1/sigma_data^2) mean |D(x + sigma eps; sigma) - x|^2. [B]"""
    error = denoiser(noised(x, sigma_B, seed, ids_B), sigma_B, condition) - x
    return edm_weight(sigma_B, sigma_data).to(x.dtype) * per_sample(error**2)


def sigma_data_of(denoiser: Any) -> float:
    """The standard deviation of the data that a denoiser's preconditioning names, else EDM's 0.5."""
    return float(getattr(getattr(denoiser, "preconditioning", None), "sigma_data", 0.5))


class DenoisingScoreMatching(Objective):
    """Train a denoiser on data (EDM, arXiv 2206.00364): how teachers are made.

    A class-conditional one sees its label for "none" on the share `label_dropout` of the samples, so that it can guide.
    """

    def __init__(
        self,
        model: Any,
        *,
        optimizer: OptimizerSpec,
        seed: int,
        levels: LevelSampler = LogNormal(),
        sigma_data: float | None = None,
        ema: float | None = None,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.student, self.optimizer, self.seed = model, optimizer, seed
        self.levels, self.label_dropout = levels, label_dropout
        self.sigma_data = sigma_data or sigma_data_of(model)
        self.ema = EMA(model, ema) if ema is not None else None

    @property
    def players(self) -> dict[str, Player]:
        return {"student": Player([self.student], self.optimizer)}

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        x, seed = real_samples(batch), keyed.key(self.seed, "denoise", step)
        sigma_B = self.levels(seed, batch.ids_B)
        condition = condition_of(batch, self.student)
        none = getattr(self.student, "null_label", None)
        if none is not None and isinstance(condition, Tensor) and not condition.is_floating_point():
            dropped_B = keyed.uniform(keyed.key(seed, "none"), batch.ids_B) < self.label_dropout
            condition = torch.where(dropped_B, none, condition)
        values_B = denoising_loss(self.student, x, sigma_B, seed, batch.ids_B, self.sigma_data, condition)
        return Loss({"denoising": Term.over(values_B, unit="sample")})

    def after_step(self, player: str, step: int) -> None:
        if self.ema is not None:
            self.ema.update(self.student)


@dataclass
class Adversary:
    """A discriminator on features of a denoiser: real against generated samples, both noised.

    Heads see activations `taps` of the `trunk`, the teacher or the fake score. Loss: softplus (non-saturating), label 1
    is real, so that a calibrated logit is log p(x_t) / q(x_t) with p the data (teacher) and q the generator.
    r1: weight of the finite-difference penalty mean (logit(x_t + 0.1 n) - logit(x_t))^2 on real inputs (FastGen's
    form). shared_noise: real and generated samples get the same level and noise. levels: the adversary's own; None takes
    those of the comparison, and for the generator its very points. joint: weight of the discriminator's loss inside the
    fake score's, which then trains heads and trunk; None makes the heads a player, and the trunk is not moved.
    """

    heads: Heads
    optimizer: OptimizerSpec
    taps: Sequence[str] | None = None
    trunk: Literal["teacher", "fake"] = "teacher"
    weight: float = (
        1e-3  # of mean softplus(-logit(fake)) in the generator's loss; 0 keeps the discriminator for its ratio
    )
    r1: float = 0.0
    shared_noise: bool = False
    levels: LevelSampler | None = None
    joint: float | None = None

    def __post_init__(self) -> None:
        if self.joint is not None and self.trunk != "fake":
            raise RecipeError("An adversary that is trained with the fake score needs its features: trunk is fake.")


@dataclass(frozen=True)
class Comparison:
    """What the generator's loss sees at one noise level: [B, ...], sigma_B [B].

    Of a pseudo-target only x and the logits carry a gradient; of a surrogate everything does, through x_t.
    """

    x: Tensor
    x_t: Tensor
    sigma_B: Tensor
    teacher: Tensor  # D_T(x_t; sigma)
    fake: Tensor  # D_S(x_t; sigma)
    logits_BL: Tensor | None  # of the adversary at (x_t, sigma)


class Normaliser:
    """What a sample's field or surrogate is divided by: [B], detached."""

    def __call__(self, at: Comparison) -> Tensor:
        raise NotImplementedError


Part(Normaliser)


@dataclass(frozen=True)
class Bare(Normaliser):
    """1: the loss as it is, in denoisers. Seen in scores, whose difference is 1 / sigma^2 of theirs, a weight sigma^2."""

    def __call__(self, at: Comparison) -> Tensor:
        return torch.ones_like(per_sample(at.teacher.detach()))


@dataclass(frozen=True)
class TeacherError(Normaliser):
    """mean |x - D_T| + eps, at least `least`: what DMD, DMD2 and f-distill (eps), SiD and Uni-Instruct (least) take."""

    eps: float = 1e-6
    least: float = 0.0

    def __call__(self, at: Comparison) -> Tensor:
        return (per_sample((at.x.detach() - at.teacher.detach()).abs()) + self.eps).clamp_min(self.least)


@dataclass(frozen=True)
class NoisePower(Normaliser):
    """sigma^power: an explicit weight of the noise level."""

    power: float

    def __call__(self, at: Comparison) -> Tensor:
        return at.sigma_B.to(at.teacher.dtype) ** self.power


class AffineScore(nn.Module):
    """The fake score of an affine generator of points as a formula: the optimal denoiser of what it makes now."""

    def __init__(self, generator: OneStep) -> None:
        super().__init__()
        self._generator = (generator,)  # in a tuple, so that its parameters are not this module's

    @property
    def density(self) -> GaussianMixture:
        """The generator's law, without gradients."""
        (generator,) = self._generator
        affine: PointAffine = generator.denoiser.network
        std_D = (affine.scale * generator.sigma_init).abs().detach()
        return GaussianMixture(affine.shift.detach()[None], std_D[None])

    def forward(self, x: Tensor, sigma: Tensor | float, condition: Condition = None) -> Tensor:
        return self.density.denoise(x, sigma)


class DistributionMatching(Objective):
    """Distil a teacher denoiser into a one-step generator by matching noised marginals through a fake score.

    generator: a OneStep; teacher: a frozen denoiser (never trained or saved); the fake score starts as `fake` or a copy
    of the teacher, without its guidance. With the default field and no weight this is DMD2's pseudo-target loss:

        v = (D_S - D_T) / (mean |x - D_T| + 1e-6).

    Subclasses override `sample_weight` (f-distill), `field`, or `matching`; `normaliser=Bare()` leaves the field bare:
    Diff-Instruct. elements: whether a sample's loss is the mean or the sum over its elements, which a published learning
    rate supposes; scale: the published factor before it. generator_when and fake_when decide the two-time-scale
    alternation, fake_first who moves first within a step; EMA moves only with the generator. A fake score without
    parameters is a formula and no player.
    """

    through: ClassVar[bool] = False  # whether gradients run through x_t into teacher and fake score
    uses_ratio: ClassVar[bool] = False  # whether the loss needs log p_t / q_t where it compares

    def __init__(
        self,
        generator: OneStep,
        teacher: Any,
        *,
        seed: int,
        optimizer: OptimizerSpec,
        fake_optimizer: OptimizerSpec,
        fake: Any | None = None,
        adversary: Adversary | None = None,
        levels: LevelSampler = LogNormal(),
        fake_levels: LevelSampler | None = None,
        generator_when: When = Always(),
        fake_when: When = Always(),
        fake_first: bool = False,
        normaliser: Normaliser = TeacherError(),
        elements: Literal["mean", "sum"] = "mean",
        scale: float = 1.0,
        sigma_data: float | None = None,
        ema: float | None = 0.999,
    ) -> None:
        super().__init__()
        self.generator = generator
        plain = teacher.denoiser if isinstance(teacher, Guided) else teacher
        self.fake = fake if fake is not None else copy.deepcopy(plain)
        self.fake.requires_grad_(True)
        self._frozen = (freeze(teacher), plain)  # in a tuple, so that it is no submodule: never trained, moved or saved
        self.adversary = adversary
        self.heads = adversary.heads if adversary is not None else None
        self.seed, self.optimizer, self.fake_optimizer = seed, optimizer, fake_optimizer
        self.levels, self.fake_levels = levels, fake_levels or levels
        self.generator_when, self.fake_when, self.fake_first = generator_when, fake_when, fake_first
        self.normaliser, self.elements, self.scale = normaliser, elements, scale
        self.sigma_data = sigma_data or sigma_data_of(plain)
        self.ema = EMA(generator, ema) if ema is not None else None

    @property
    def teacher(self) -> Any:
        return self._frozen[0]

    @property
    def trunk(self) -> Any:
        """The denoiser whose features the adversary sees."""
        assert self.adversary is not None
        return self.fake if self.adversary.trunk == "fake" else self._frozen[1]

    @property
    def players(self) -> dict[str, Player]:
        players = {"generator": Player([self.generator], self.optimizer, when=self.generator_when)}
        joint = self.adversary is not None and self.adversary.joint is not None
        if any(True for _ in self.fake.parameters()):
            modules = [self.fake, self.adversary.heads] if self.adversary is not None and joint else [self.fake]
            players["fake_score"] = Player(modules, self.fake_optimizer, when=self.fake_when)
        if self.adversary is not None and not joint:
            players["discriminator"] = Player([self.adversary.heads], self.adversary.optimizer, when=self.fake_when)
        if self.fake_first:
            players["generator"] = players.pop("generator")  # to the end
        return players

    def train(self, mode: bool = True) -> "DistributionMatching":
        """Generator and fake score stay in evaluation mode: D_S - D_T must not be the noise of two dropout masks."""
        super().train(mode)
        self.generator.eval()
        self.fake.eval()
        return self

    # ---------------------------------------------------------------- the choices of a method

    def field(self, at: Comparison) -> Tensor:
        """The vector field v that the generator descends. Shape of x; detached."""
        v = at.fake - at.teacher
        return v / spread(self.normaliser(at), v)

    def matching(self, at: Comparison, step: int) -> Tensor:
        """The generator's loss of each sample. [B]"""
        target = (at.x - self.field(at)).detach()
        return 0.5 * per_sample((at.x - target) ** 2, self.elements)

    def sample_weight(self, at: Comparison) -> Tensor | None:
        """Relative weights of the samples, [B], detached and not negative; None is one for each.

        They are divided by their mean over the whole step: the trainer's one division is by their sum over all
        micro-batches and ranks. An absolute weight belongs into `normaliser`.
        """
        return None

    def adversarial(self, at: Comparison, batch: Batch, step: int) -> Tensor:
        """softplus(-logit) of the generated samples, [B], at the compared points unless the adversary has own levels."""
        logits_BL = at.logits_BL
        assert self.adversary is not None
        if self.adversary.levels is not None:
            logits_BL = self.logits(*self.criticised(at.x, batch, step, "adversarial"), self.condition(batch))
        assert logits_BL is not None
        return softplus(-logits_BL).mean(1)

    # ---------------------------------------------------------------- one step

    def condition(self, batch: Batch) -> Condition:
        return condition_of(batch, self._frozen[1])

    def latents(self, batch: Batch, step: int) -> Tensor:
        """Unit noise for this step's samples. [B, ...]"""
        like = torch.empty(len(batch), *self.generator.shape, device=batch.ids_B.device)
        return keyed.normal_like(keyed.key(self.seed, "latent", step), batch.ids_B, like)

    def generate(self, batch: Batch, step: int) -> Tensor:
        return self.generator(self.latents(batch, step), self.condition(batch))

    def fake_samples(self, batch: Batch, step: int) -> Tensor:
        """This step's generated samples without gradient, shared by fake score and discriminator."""

        def make() -> Tensor:
            with torch.no_grad():
                return self.generate(batch, step)

        return batch.remember("fake samples", make)

    def noised(self, x: Tensor, batch: Batch, step: int, purpose: str) -> tuple[Tensor, Tensor]:
        """(x + sigma eps, sigma_B) at the levels of the comparison, keyed by purpose."""
        seed = keyed.key(self.seed, purpose, step)
        sigma_B = self.levels(seed, batch.ids_B)
        return noised(x, sigma_B, seed, batch.ids_B), sigma_B

    def criticised(self, x: Tensor, batch: Batch, step: int, purpose: str) -> tuple[Tensor, Tensor]:
        """The same at the adversary's levels."""
        assert self.adversary is not None
        if self.adversary.levels is None:
            return self.noised(x, batch, step, purpose)
        seed = keyed.key(self.seed, purpose, step)
        sigma_B = self.adversary.levels(seed, batch.ids_B)
        return noised(x, sigma_B, seed, batch.ids_B), sigma_B

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        match player:
            case "generator":
                return self.generator_loss(batch, step)
            case "fake_score":
                return self.fake_loss(batch, step)
        return self.discriminator_loss(batch, step)

    def compare(self, batch: Batch, step: int, x: Tensor) -> Comparison:
        """Noise x and ask teacher, fake score and adversary there."""
        x_t, sigma_B = self.noised(x, batch, step, "compare")
        teacher, fake, logits_BL = self.answers(x_t, sigma_B, self.condition(batch))
        return Comparison(x, x_t if self.through else x_t.detach(), sigma_B, teacher, fake, logits_BL)

    def answers(self, x_t: Tensor, sigma_B: Tensor, condition: Condition) -> tuple[Tensor, Tensor, Tensor | None]:
        """D_T, D_S (detached unless the loss runs through them), and logits [B, L] with their gradient in x_t."""
        found: list[Tensor] = []
        logits_BL = None
        asked = self.uses_ratio or (self.adversary is not None and self.adversary.levels is None)
        wanted = torch.is_grad_enabled() and (
            self.through or (self.adversary is not None and self.adversary.weight > 0)
        )
        for model in (self.teacher, self.fake):
            if asked and self.adversary is not None and model is self.trunk:  # one pass gives both
                with torch.set_grad_enabled(wanted):
                    x0, features = model.with_features(x_t, sigma_B, condition, names=self.adversary.taps)
                    logits_BL = self.adversary.heads(features)
            else:
                with torch.set_grad_enabled(torch.is_grad_enabled() and self.through):
                    x0 = model(x_t, sigma_B, condition)
            found.append(x0 if self.through else x0.detach())
        if asked and logits_BL is None:  # a formula; or a guided teacher: the features are the plain one's
            with torch.set_grad_enabled(wanted):
                logits_BL = self.logits(x_t, sigma_B, condition)
        return found[0], found[1], logits_BL

    def logits(self, x_t: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        """The adversary's logits, [B, L]; without one, of a mixture and an affine generator, log p - log q, [B, 1]."""
        if self.adversary is not None:
            return self.adversary.heads(self.trunk.features(x_t, sigma_B, condition, names=self.adversary.taps))
        if not isinstance(self.fake, AffineScore):
            raise RecipeError(f"{type(self).__name__} needs a density ratio: give it an adversary.")
        log_q_B = self.fake.density.log_density(x_t, sigma_B)
        return (self.teacher.mixture.log_density(x_t, sigma_B) - log_q_B)[:, None]

    def generator_loss(self, batch: Batch, step: int) -> Loss:
        at = self.compare(batch, step, self.generate(batch, step))
        values_B = self.matching(at, step)
        metrics = {"gap": Term.over(per_sample((at.fake - at.teacher).detach().abs()), unit="sample")}
        weight_B = self.sample_weight(at)
        if weight_B is None:
            terms = {"matching": Term.over(values_B, None, self.scale, unit="sample")}
        else:
            weight_B = weight_B.detach().to(values_B.dtype)
            terms = {"matching": Term((weight_B * values_B).sum(), weight_B.sum(), self.scale, unit="weight")}
            metrics["weight"] = Term.over(weight_B, unit="sample")
            metrics["weight_squared"] = Term.over(weight_B**2, unit="sample")
        if self.adversary is not None and self.adversary.weight > 0:
            values_B = self.adversarial(at, batch, step)
            terms["adversarial"] = Term.over(values_B, None, self.adversary.weight, unit="sample")
        return Loss(terms, metrics)

    def fake_loss(self, batch: Batch, step: int) -> Loss:
        x, seed = self.fake_samples(batch, step), keyed.key(self.seed, "fake", step)
        sigma_B = self.fake_levels(seed, batch.ids_B)
        values_B = denoising_loss(self.fake, x, sigma_B, seed, batch.ids_B, self.sigma_data, self.condition(batch))
        loss = Loss({"denoising": Term.over(values_B, unit="sample")})
        if self.adversary is not None and self.adversary.joint is not None:
            critic = self.discriminator_loss(batch, step)
            weight = self.adversary.joint
            terms = {k: replace(v, coefficient=weight * v.coefficient) for k, v in critic.terms.items()}
            return Loss(loss.terms | terms, critic.metrics)
        return loss

    def discriminator_loss(self, batch: Batch, step: int) -> Loss:
        assert self.adversary is not None
        condition = self.condition(batch)
        with torch.no_grad():
            real_t, sigma_B = self.criticised(real_samples(batch), batch, step, "real")
            purpose = "real" if self.adversary.shared_noise else "generated"
            fake_t, fake_sigma_B = self.criticised(self.fake_samples(batch, step), batch, step, purpose)
        real_BL, fake_BL = self.logits(real_t, sigma_B, condition), self.logits(fake_t, fake_sigma_B, condition)
        terms = {
            "generated": Term.over(softplus(fake_BL).mean(1), unit="sample"),
            "real": Term.over(softplus(-real_BL).mean(1), unit="sample"),
        }
        if self.adversary.r1:
            shift = keyed.normal_like(keyed.key(self.seed, "shift", step), batch.ids_B, real_t)
            moved_BL = self.logits(real_t + 0.1 * shift, sigma_B, condition)
            terms["r1"] = Term.over(((moved_BL - real_BL) ** 2).mean(1), None, self.adversary.r1, unit="sample")
        right_B = ((real_BL.mean(1) > 0).float() + (fake_BL.mean(1) < 0).float()) / 2
        return Loss(terms, {"accuracy": Term.over(right_B, unit="sample")})

    def after_step(self, player: str, step: int) -> None:
        if player == "generator" and self.ema is not None:
            self.ema.update(self.generator)


class ScoreSurrogate(DistributionMatching):
    """The other loss: gradients run through x_t into teacher and fake score, whose parameters are held fixed.

    Its value means nothing and may be negative; watch `gap`.
    """

    through = True

    def surrogate(self, at: Comparison, step: int) -> Tensor:
        """A scalar of each sample, summed over its elements, before the normaliser. [B]"""
        raise NotImplementedError

    def matching(self, at: Comparison, step: int) -> Tensor:
        value_B = self.surrogate(at, step) / self.normaliser(at)
        return value_B if self.elements == "sum" else value_B / at.x[0].numel()


class RatioMatching(DistributionMatching):
    """What methods share that need r = p_t / q_t: the adversary's logit, clipped, divided by the mean of its time bin.

    The bins are filled from the whole step before the first ratio is divided by them.
    """

    uses_ratio = True

    def __init__(
        self,
        generator: OneStep,
        teacher: Any,
        *,
        ratio_lower: float = 0.1,
        ratio_upper: float = 20.0,
        bins: TimeBins | None = None,
        bins_over: Literal["sigma", "log_sigma"] = "sigma",
        **options: Any,
    ) -> None:
        super().__init__(generator, teacher, **options)
        if not ratio_lower < ratio_upper:
            raise RecipeError(f"A ratio needs ratio_lower < ratio_upper, got {ratio_lower} and {ratio_upper}.")
        self.limits = (ratio_lower, ratio_upper)
        self.bins, self.bins_over = bins, bins_over
        self._gathered: tuple[int, Tensor, Tensor] | None = None  # (step, totals, counts) of the time bins

    def ratio(self, logits_BL: Tensor) -> Tensor:
        lower, upper = self.limits
        return ratio_from_logits(logits_BL, lower=lower, upper=upper)

    def times(self, sigma_B: Tensor) -> Tensor:
        return sigma_B.log() if self.bins_over == "log_sigma" else sigma_B

    def collect(self, batch: Batch, step: int) -> Batch:
        """Needs the ratios of the whole batch before the first of them is divided."""
        if self.bins is not None and self.generator_when(step):
            x_t, sigma_B = self.noised(self.generate(batch, step), batch, step, "compare")
            ratio_B = self.ratio(self.logits(x_t, sigma_B, self.condition(batch)))
            total, count = self.bins.sums(ratio_B, self.times(sigma_B))
            if self._gathered is not None and self._gathered[0] == step:
                total, count = total + self._gathered[1], count + self._gathered[2]
            self._gathered = (step, total, count)
        return batch

    def ratio_at(self, at: Comparison) -> Tensor:
        """r of the compared points, detached. [B]"""
        assert at.logits_BL is not None
        ratio_B = self.ratio(at.logits_BL)
        if self.bins is None:
            return ratio_B
        if self._gathered is not None:
            _, total, count = self._gathered
            self.bins.update(over_ranks(total), over_ranks(count))
            self._gathered = None
        return self.bins.divide(ratio_B, self.times(at.sigma_B))


def over_ranks(x: Tensor) -> Tensor:
    """The sum of a tensor over the processes of the run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x


def time_bins(levels: LevelSampler, over: Literal["sigma", "log_sigma"], bins: int, rho: float) -> TimeBins:
    """Equal bins between the ends of the noise levels."""
    low, high = levels.of_uniform(torch.tensor([1e-4, 1 - 1e-4], dtype=torch.float64)).tolist()
    if over == "log_sigma":
        low, high = math.log(low), math.log(high)
    return TimeBins(low, high, bins, rho)


def is_exact(generator: OneStep, teacher: Any) -> bool:
    """Whether both scores are formulas: a mixture teaches, and the generator is affine."""
    return isinstance(teacher, MixtureDenoiser) and isinstance(
        getattr(generator.denoiser, "network", None), PointAffine
    )


def tapped(denoiser: Any, names: Sequence[str] | None = None, condition: Condition = None) -> Mapping[str, Tensor]:
    """Activations of one zero sample (`condition`: its own, of one row): what `Heads.on` needs to know the shapes."""
    parameter = next(denoiser.parameters())
    with torch.no_grad():
        zero = torch.zeros(1, *denoiser.shape, device=parameter.device)
        return denoiser.features(zero, 1.0, condition, names=names)
