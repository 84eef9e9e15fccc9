"""A player: parameters with an optimizer, a schedule, an update rule and a sign of their own."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pydantic import Field
from torch import nn

from potstill.contracts.batch import Batch
from potstill.contracts.spec import Spec
from potstill.contracts.terms import Loss


class OptimizerSpec(Spec):
    """An optimizer and its learning-rate schedule. Steps count this player's own updates."""

    optimizer: Literal["adamw", "adam", "sgd", "radam"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)  # sgd only
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: int = Field(0, ge=0)  # updates of linear warm-up
    end: float = Field(0.0, ge=0, le=1)  # share of lr left at the end of the schedule
    stretch: float = Field(1.0, ge=1)  # the schedule is cut off after 1 / stretch of its course
    clip: float | None = Field(None, gt=0)  # gradient norm; None leaves it alone


class When(Protocol):
    """Whether a player moves at step i (0-based)."""

    def __call__(self, step: int) -> bool: ...


@dataclass(frozen=True)
class Always:
    def __call__(self, step: int) -> bool:
        return True


@dataclass(frozen=True)
class Every:
    """Steps 0, n, 2n, ... shifted by offset: with another player on `Always`, one update to its n."""

    n: int
    offset: int = 0

    def __call__(self, step: int) -> bool:
        return (step - self.offset) % self.n == 0


@dataclass(frozen=True)
class Unless:
    """All the steps of which another rule says no: the exclusive alternation."""

    other: When

    def __call__(self, step: int) -> bool:
        return not self.other(step)


@dataclass(frozen=True)
class From:
    """A rule that starts to hold at a step (warm-up phases of the other players)."""

    start: int
    rule: When = field(default_factory=Always)

    def __call__(self, step: int) -> bool:
        return step >= self.start and self.rule(step - self.start)


@dataclass
class Player:
    """Who is optimised, how and when.

    `modules` own the parameters (only those that require gradients are optimised); what a loss owns (`blocks`) may be
    listed with the student's. `ascend` flips the sign: the player maximises its loss.
    """

    modules: list[nn.Module]
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    when: When = field(default_factory=Always)
    ascend: bool = False

    def parameters(self) -> Iterable[nn.Parameter]:
        seen: set[int] = set()
        for module in self.modules:
            for parameter in module.parameters():
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter


class Objective(nn.Module):
    """What is optimised: players, and one loss for each.

    Every trained module must be a submodule (it is checkpointed); teachers must not be (they are never saved).
    `couples` is what one micro-batch may not be cut through: a position, a group of rollouts, or the whole batch.
    """

    couples: Literal["position", "group", "batch"] = "position"

    @property
    def players(self) -> dict[str, Player]:
        """Players in the order in which they move within a step. Asked once, before training."""
        raise NotImplementedError

    def collect(self, batch: Batch, step: int) -> Batch:
        """Called once per micro-batch without gradient, before any player moves: rollouts, trajectories, noised states."""
        return batch

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        """Named terms of one micro-batch for one player."""
        raise NotImplementedError

    def after_step(self, player: str, step: int) -> None:
        """Called after a player's update: EMA, reference refresh, re-projection."""
