"""Score matching with a fake score: the engine behind one-step diffusion distillation.

    x = G(z),  x_t = x + sigma eps,  D_T the frozen teacher, D_S the fake score (a denoiser of the generator's samples)

Two losses suffice for the published methods: a detached pseudo-target on x, whose gradient is a vector field v,

    L = 1/2 mean |x - sg[x - v]|^2   =>   dL/dx = v / numel,

and a surrogate through the frozen networks. A method is then a choice of the field, of the levels on which generator
and fake score are compared, of a weight a sample, of an adversary, and of who moves when. B samples, C H W (or D), L
logits of one sample.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from potstill.contracts import keyed
from potstill.contracts.batch import Batch, ImageBatch, PointBatch
from potstill.contracts.errors import RecipeError
from potstill.contracts.players import Always, Objective, OptimizerSpec, Player, When
from potstill.contracts.terms import Loss, Term
from potstill.divergences.scores import sid
from potstill.models.build import freeze
from potstill.models.denoisers import Condition, Guided, OneStep
from potstill.models.ema import EMA
from potstill.noise.gaussian import LevelSampler, LogNormal, edm_weight, spread
from potstill.objectives.blocks import Heads


def real_samples(batch: Batch) -> Tensor:
    """The data of a batch: images or points. [B, ...]"""
    if isinstance(batch, ImageBatch):
        return batch.images
    if isinstance(batch, PointBatch):
        return batch.points_BD
    raise RecipeError(f"Diffusion needs batches of images or points, got {type(batch).__name__}.")


def per_sample(x: Tensor) -> Tensor:
    """Mean over all but the batch. [B, ...] -> [B]"""
    return x.flatten(1).mean(1)


def noised(x: Tensor, sigma_B: Tensor, seed: int, ids_B: Tensor) -> Tensor:
    """x + sigma eps, eps a function of (seed, id)."""
    return x + spread(sigma_B, x) * keyed.normal_like(seed, ids_B, x)


def identity_surrogate(x: Tensor, teacher: Tensor, fake: Tensor, alpha: float = 1.0) -> Tensor:
    """SiD (arXiv 2404.04057): mean of (1 - alpha) |D_T - D_S|^2 + (D_T - D_S) (D_S - x). [B]

    Nothing is detached: gradients run through x_t into both networks, whose parameters are held fixed, and through x.
    At alpha = 1 the gradient is half that of E|D_T - D_S|^2 where the fake score follows the generator while the points
    x_t stay: score implicit matching.
    """
    return sid(x, teacher=teacher, student=fake, alpha=alpha) / x[0].numel()


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
    """A discriminator on features of a denoiser that it does not train: real against generated samples, both noised.

    Heads see activations `taps` of the `trunk`, the teacher or the fake score. Loss: softplus (non-saturating), label 1
    is real, so that a calibrated logit is log p(x_t) / q(x_t) with p the data (teacher) and q the generator.
    r1: weight of the finite-difference penalty mean (logit(x_t + 0.1 n) - logit(x_t))^2 on real inputs (FastGen's
    form). shared_noise: real and generated samples get the same level and noise.
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


@dataclass(frozen=True)
class Comparison:
    """What the generator's loss sees at one noise level: [B, ...], sigma_B [B]. Only the logits carry a gradient."""

    x: Tensor
    x_t: Tensor
    sigma_B: Tensor
    teacher: Tensor  # D_T(x_t; sigma)
    fake: Tensor  # D_S(x_t; sigma)
    logits_BL: Tensor | None  # of the adversary at (x_t, sigma)


class DistributionMatching(Objective):
    """Distil a teacher denoiser into a one-step generator by matching noised marginals through a fake score.

    generator: a OneStep; teacher: a frozen denoiser (never trained or saved); the fake score starts as `fake` or a copy
    of the teacher, without its guidance. With the default field and no weight this is DMD2's pseudo-target loss:

        v = (D_S - D_T) / (mean |x - D_T| + 1e-6).

    Subclasses override `sample_weight` (f-distill) or `field`. `normalize=False` leaves the field bare: Diff-Instruct.
    generator_when and fake_when decide the two-time-scale alternation; EMA moves only with the generator. A fake score
    without parameters is a formula and no player.
    """

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
        normalize: bool = True,
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
        self.generator_when, self.fake_when = generator_when, fake_when
        self.normalize, self.sigma_data = normalize, sigma_data or sigma_data_of(plain)
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
        if any(True for _ in self.fake.parameters()):
            players["fake_score"] = Player([self.fake], self.fake_optimizer, when=self.fake_when)
        if self.adversary is not None:
            players["discriminator"] = Player([self.adversary.heads], self.adversary.optimizer, when=self.fake_when)
        return players

    def train(self, mode: bool = True) -> "DistributionMatching":
        """Generator and fake score stay in evaluation mode: D_S - D_T must not be the noise of two dropout masks."""
        super().train(mode)
        self.generator.eval()
        self.fake.eval()
        return self

    # ---------------------------------------------------------------- the two choices of a method

    def field(self, at: Comparison) -> Tensor:
        """The vector field v that the generator descends. Shape of x; detached."""
        v = at.fake - at.teacher
        if self.normalize:
            v = v / spread(per_sample((at.x.detach() - at.teacher).abs()) + 1e-6, v)
        return v

    def sample_weight(self, at: Comparison) -> Tensor | None:
        """Relative weights of the samples, [B], detached and not negative; None is one for each.

        They are divided by their mean over the whole step: the trainer's one division is by their sum over all
        micro-batches and ranks. An absolute weight belongs into `field`.
        """
        return None

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
        return Comparison(x, x_t.detach(), sigma_B, teacher, fake, logits_BL)

    def answers(self, x_t: Tensor, sigma_B: Tensor, condition: Condition) -> tuple[Tensor, Tensor, Tensor | None]:
        """D_T, D_S, both detached, and the adversary's logits [B, L] with their gradient in x_t."""
        found: list[Tensor] = []
        logits_BL = None
        for model in (self.teacher, self.fake):
            if self.adversary is not None and model is self.trunk:  # one pass gives both
                with torch.set_grad_enabled(torch.is_grad_enabled() and self.adversary.weight > 0):
                    x0, features = model.with_features(x_t, sigma_B, condition, names=self.adversary.taps)
                    logits_BL = self.adversary.heads(features)
            else:
                with torch.no_grad():
                    x0 = model(x_t, sigma_B, condition)
            found.append(x0.detach())
        if self.adversary is not None and logits_BL is None:  # a guided teacher: the features are the plain one's
            logits_BL = self.logits(x_t, sigma_B, condition)
        return found[0], found[1], logits_BL

    def logits(self, x_t: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        """The adversary's logits. [B, L]"""
        assert self.adversary is not None
        return self.adversary.heads(self.trunk.features(x_t, sigma_B, condition, names=self.adversary.taps))

    def generator_loss(self, batch: Batch, step: int) -> Loss:
        x = self.generate(batch, step)
        at = self.compare(batch, step, x)
        target = (x - self.field(at)).detach()
        values_B = 0.5 * per_sample((x - target) ** 2)
        gap_B = per_sample((at.fake - at.teacher).abs())
        metrics = {"gap": Term.over(gap_B, unit="sample")}
        weight_B = self.sample_weight(at)
        if weight_B is None:
            terms = {"matching": Term.over(values_B, unit="sample")}
        else:
            weight_B = weight_B.detach().to(values_B.dtype)
            terms = {"matching": Term((weight_B * values_B).sum(), weight_B.sum(), unit="weight")}
            metrics["weight"] = Term.over(weight_B, unit="sample")
            metrics["weight_squared"] = Term.over(weight_B**2, unit="sample")
        if self.adversary is not None and self.adversary.weight > 0:
            assert at.logits_BL is not None
            terms["adversarial"] = Term.over(
                softplus(-at.logits_BL).mean(1), None, self.adversary.weight, unit="sample"
            )
        return Loss(terms, metrics)

    def fake_loss(self, batch: Batch, step: int) -> Loss:
        x, seed = self.fake_samples(batch, step), keyed.key(self.seed, "fake", step)
        sigma_B = self.fake_levels(seed, batch.ids_B)
        values_B = denoising_loss(self.fake, x, sigma_B, seed, batch.ids_B, self.sigma_data, self.condition(batch))
        return Loss({"denoising": Term.over(values_B, unit="sample")})

    def discriminator_loss(self, batch: Batch, step: int) -> Loss:
        assert self.adversary is not None
        condition = self.condition(batch)
        with torch.no_grad():
            real_t, sigma_B = self.noised(real_samples(batch), batch, step, "real")
            purpose = "real" if self.adversary.shared_noise else "generated"
            fake_t, fake_sigma_B = self.noised(self.fake_samples(batch, step), batch, step, purpose)
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


def tapped(denoiser: Any, names: Sequence[str] | None = None, condition: Condition = None) -> Mapping[str, Tensor]:
    """Activations of one zero sample (`condition`: its own, of one row): what `Heads.on` needs to know the shapes."""
    parameter = next(denoiser.parameters())
    with torch.no_grad():
        zero = torch.zeros(1, *denoiser.shape, device=parameter.device)
        return denoiser.features(zero, 1.0, condition, names=names)
