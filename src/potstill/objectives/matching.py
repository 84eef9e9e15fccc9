"""Score matching with a fake score: the engine behind one-step diffusion distillation.

    x = G(z),  x_t = x + sigma eps,  D_T the frozen teacher, D_S the fake score (a denoiser of the generator's samples)

Two losses suffice for the published methods: a detached pseudo-target on x, whose gradient is a vector field v,

    L = 1/2 mean |x - sg[x - v]|^2   =>   dL/dx = v / numel,

and a surrogate through the frozen networks. A method is then a choice of the field, of the levels on which generator
and fake score are compared, of a weight a sample, of an adversary, and of who moves when. B samples, C H W (or D).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from potstill.contracts import keyed
from potstill.contracts.batch import Batch, ImageBatch, PointBatch
from potstill.contracts.errors import RecipeError
from potstill.contracts.players import Always, Objective, OptimizerSpec, Player, When
from potstill.contracts.terms import Loss, Term
from potstill.models.build import freeze
from potstill.models.denoisers import OneStep
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


def denoising_loss(
    denoiser: nn.Module,
    x: Tensor,
    sigma_B: Tensor,
    seed: int,
    ids_B: Tensor,
    sigma_data: float,
    condition: Tensor | None = None,
) -> Tensor:
    """EDM's (1/sigma^2 + 1/sigma_data^2) mean |D(x + sigma eps; sigma) - x|^2. [B]"""
    error = denoiser(noised(x, sigma_B, seed, ids_B), sigma_B, condition) - x
    return edm_weight(sigma_B, sigma_data).to(x.dtype) * per_sample(error**2)


class DenoisingScoreMatching(Objective):
    """Train a denoiser on data (EDM, arXiv 2206.00364): how teachers are made."""

    def __init__(
        self,
        model: Any,
        *,
        optimizer: OptimizerSpec,
        seed: int,
        levels: LevelSampler = LogNormal(),
        sigma_data: float | None = None,
        ema: float | None = None,
        conditional: bool = False,
    ) -> None:
        super().__init__()
        self.student, self.optimizer, self.seed = model, optimizer, seed
        self.levels, self.conditional = levels, conditional
        self.sigma_data = sigma_data or getattr(model.preconditioning, "sigma_data", 0.5)
        self.ema = EMA(model, ema) if ema is not None else None

    @property
    def players(self) -> dict[str, Player]:
        return {"student": Player([self.student], self.optimizer)}

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        x, seed = real_samples(batch), keyed.key(self.seed, "denoise", step)
        sigma_B = self.levels(seed, batch.ids_B)
        condition = batch.labels_B if self.conditional and isinstance(batch, ImageBatch) else None
        values_B = denoising_loss(self.student, x, sigma_B, seed, batch.ids_B, self.sigma_data, condition)
        return Loss({"denoising": Term.over(values_B, unit="sample")})

    def after_step(self, player: str, step: int) -> None:
        if self.ema is not None:
            self.ema.update(self.student)


@dataclass
class Adversary:
    """A discriminator on features of a frozen denoiser: real against generated samples, both noised.

    Heads see the teacher's activations `taps`. Loss: softplus (non-saturating), label 1 is real, so that a calibrated
    logit is log p(x_t) / q(x_t) with p the data (teacher) and q the generator.
    r1: weight of the finite-difference penalty mean (logit(x + 0.1 n) - logit(x))^2 on real inputs (FastGen's form).
    """

    heads: Heads
    taps: Sequence[str] | None = None
    optimizer: OptimizerSpec = OptimizerSpec(lr=1e-4)
    weight: float = 1e-3  # of mean softplus(-logit(fake)) in the generator's loss
    levels: LevelSampler = field(default_factory=LogNormal)
    r1: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """What the generator's loss sees at one noise level, all detached but x: [B, ...], sigma_B [B]."""

    x: Tensor
    x_t: Tensor
    sigma_B: Tensor
    teacher: Tensor  # D_T(x_t; sigma)
    fake: Tensor  # D_S(x_t; sigma)
    logit_B: Tensor | None  # of the adversary at (x_t, sigma), mean over heads


class DistributionMatching(Objective):
    """Distil a teacher denoiser into a one-step generator by matching noised marginals through a fake score.

    generator: a OneStep; teacher: a frozen denoiser (never trained or saved); the fake score starts as `fake` or a copy
    of the teacher. With the default field and no weight this is DMD2's pseudo-target loss without its adversary:

        v = (D_S - D_T) / (mean |x - D_T| + 1e-6).

    Subclasses override `sample_weight` (f-distill) or `field`. `normalize=False` leaves the field bare: Diff-Instruct.
    generator_when and fake_when decide the two-time-scale alternation; EMA moves only with the generator.
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
        fake_levels: LevelSampler = LogNormal(),
        generator_when: When = Always(),
        fake_when: When = Always(),
        normalize: bool = True,
        sigma_data: float = 0.5,
        ema: float | None = 0.999,
        conditional: bool = False,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.fake = fake if fake is not None else copy.deepcopy(teacher)
        self.fake.requires_grad_(True)
        self._frozen = (freeze(teacher),)  # in a tuple, so that it is no submodule: never trained, moved or saved
        self.adversary = adversary
        self.heads = adversary.heads if adversary is not None else None
        self.seed, self.optimizer, self.fake_optimizer = seed, optimizer, fake_optimizer
        self.levels, self.fake_levels = levels, fake_levels
        self.generator_when, self.fake_when = generator_when, fake_when
        self.normalize, self.sigma_data, self.conditional = normalize, sigma_data, conditional
        self.ema = EMA(generator, ema) if ema is not None else None

    @property
    def teacher(self) -> Any:
        return self._frozen[0]

    @property
    def players(self) -> dict[str, Player]:
        players = {
            "generator": Player([self.generator], self.optimizer, when=self.generator_when),
            "fake_score": Player([self.fake], self.fake_optimizer, when=self.fake_when),
        }
        if self.adversary is not None:
            players["discriminator"] = Player([self.adversary.heads], self.adversary.optimizer, when=self.fake_when)
        return players

    # ---------------------------------------------------------------- the two choices of a method

    def field(self, at: Comparison) -> Tensor:
        """The vector field v that the generator descends. Shape of x; detached."""
        v = at.fake - at.teacher
        if self.normalize:
            v = v / spread(per_sample((at.x.detach() - at.teacher).abs()) + 1e-6, v)
        return v

    def sample_weight(self, at: Comparison) -> Tensor | None:
        """A weight a sample, [B], detached; None is one."""
        return None

    # ---------------------------------------------------------------- one step

    def condition(self, batch: Batch) -> Tensor | None:
        return batch.labels_B if self.conditional and isinstance(batch, ImageBatch) else None

    def generate(self, batch: Batch, step: int) -> Tensor:
        like = torch.empty(len(batch), *self.generator.shape, device=batch.ids_B.device)
        z = keyed.normal_like(keyed.key(self.seed, "latent", step), batch.ids_B, like)
        return self.generator(z, self.condition(batch))

    def fake_samples(self, batch: Batch, step: int) -> Tensor:
        """This step's generated samples without gradient, shared by fake score and discriminator."""

        def make() -> Tensor:
            with torch.no_grad():
                return self.generate(batch, step)

        # The generator may have moved earlier in this step: what it gave before that is not what it gives now.
        return batch.remember(("fake samples", self.generator_when(step)), make)

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        match player:
            case "generator":
                return self.generator_loss(batch, step)
            case "fake_score":
                return self.fake_loss(batch, step)
        return self.discriminator_loss(batch, step)

    def compare(self, batch: Batch, step: int, x: Tensor) -> Comparison:
        """Noise x and ask teacher, fake score and adversary, without gradient."""
        seed, condition = keyed.key(self.seed, "compare", step), self.condition(batch)
        sigma_B = self.levels(seed, batch.ids_B)
        with torch.no_grad():
            x_t = noised(x, sigma_B, seed, batch.ids_B)
            fake = self.fake(x_t, sigma_B, condition)
            if self.adversary is None:
                return Comparison(x, x_t, sigma_B, self.teacher(x_t, sigma_B, condition), fake, None)
            teacher, features = self.teacher.with_features(x_t, sigma_B, condition, names=self.adversary.taps)
            return Comparison(x, x_t, sigma_B, teacher, fake, self.adversary.heads(features).mean(1))

    def generator_loss(self, batch: Batch, step: int) -> Loss:
        x = self.generate(batch, step)
        at = self.compare(batch, step, x)
        v = self.field(at)
        weight_B = self.sample_weight(at)
        if weight_B is not None:
            v = v * spread(weight_B, v)
        values_B = 0.5 * per_sample((x - (x - v).detach()) ** 2)
        terms = {"matching": Term.over(values_B, unit="sample")}
        metrics = {"gap": Term.over(per_sample((at.fake - at.teacher).abs()), unit="sample")}
        if weight_B is not None:
            metrics["weight"] = Term.over(weight_B, unit="sample")
        if self.adversary is not None and self.adversary.weight > 0:
            logits_BL = self.logits(x, batch, step, "adversarial")
            terms["adversarial"] = Term.over(softplus(-logits_BL).mean(1), None, self.adversary.weight, unit="sample")
        return Loss(terms, metrics)

    def fake_loss(self, batch: Batch, step: int) -> Loss:
        x, seed = self.fake_samples(batch, step), keyed.key(self.seed, "fake", step)
        sigma_B = self.fake_levels(seed, batch.ids_B)
        values_B = denoising_loss(self.fake, x, sigma_B, seed, batch.ids_B, self.sigma_data, self.condition(batch))
        return Loss({"denoising": Term.over(values_B, unit="sample")})

    def discriminator_loss(self, batch: Batch, step: int) -> Loss:
        assert self.adversary is not None
        real_BL = self.logits(real_samples(batch), batch, step, "real")
        fake_BL = self.logits(self.fake_samples(batch, step), batch, step, "generated")
        terms = {
            "generated": Term.over(softplus(fake_BL).mean(1), unit="sample"),
            "real": Term.over(softplus(-real_BL).mean(1), unit="sample"),
        }
        if self.adversary.r1:
            moved_BL = self.logits(real_samples(batch), batch, step, "real", shift=0.1)
            terms["r1"] = Term.over(((moved_BL - real_BL) ** 2).mean(1), None, self.adversary.r1, unit="sample")
        right = ((real_BL.mean(1) > 0).float() + (fake_BL.mean(1) < 0).float()) / 2
        return Loss(terms, {"accuracy": Term.over(right, unit="sample")})

    def logits(self, x: Tensor, batch: Batch, step: int, purpose: str, shift: float = 0.0) -> Tensor:
        """The adversary's logits at noised x, [B, L]; noise and level keyed by purpose. `shift` adds noise on top."""
        assert self.adversary is not None
        seed = keyed.key(self.seed, purpose, step)
        sigma_B = self.adversary.levels(seed, batch.ids_B)
        x_t = noised(x, sigma_B, seed, batch.ids_B)
        if shift:
            x_t = x_t + shift * keyed.normal_like(keyed.key(seed, "shift"), batch.ids_B, x_t)
        return self.adversary.heads(
            self.teacher.features(x_t, sigma_B, self.condition(batch), names=self.adversary.taps)
        )

    def after_step(self, player: str, step: int) -> None:
        if player == "generator" and self.ema is not None:
            self.ema.update(self.generator)


def tapped(teacher: Any, names: Sequence[str] | None = None) -> Mapping[str, Tensor]:
    """Activations of one zero sample: what `Heads.on` needs to know the shapes."""
    parameter = next(teacher.parameters())
    with torch.no_grad():
        return teacher.features(torch.zeros(1, *teacher.shape, device=parameter.device), 1.0, names=names)
