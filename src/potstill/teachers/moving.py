"""Teachers that change while the student learns: its average, its own recent past, a row of growing ones, and itself.

Each has a `state`, a module with what a resumed run must know: an objective holds it as a submodule, so that it is saved,
and calls `after_step(student, step)` after each update of the student (`follow`). None ever receives a gradient.

A student with adapters is followed by its effective weights, W + B A: the averages of B and of A have another product.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from potstill.contracts.batch import Batch
from potstill.contracts.errors import RecipeError
from potstill.contracts.signals import HiddenAndHead, Signal
from potstill.models.causal import evaluating
from potstill.models.ema import EMA
from potstill.models.lora import merged
from potstill.teachers.local import SIGNALS, LocalTeacher, check_vocabulary


class EffectiveEMA(EMA):
    """EMA of a module's effective weights: adapters are added in."""

    def __init__(self, module: nn.Module, decay: float = 0.999, ramp: bool = True) -> None:
        module = copy.deepcopy(module)
        if hasattr(module, "network"):
            module.network = merged(module.network)
        super().__init__(module, decay, ramp)

    def source(self, module: nn.Module) -> dict[str, Tensor]:
        return effective_state(module)


@torch.no_grad()
def effective_state(model: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` of a model as it would be with its adapters merged, without copying the rest."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    state = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            base: Any = layer.get_base_layer()
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
            state |= {f"{name}.{key}": value for key, value in base.state_dict().items()}
            if not layer.merged:
                deltas = [layer.get_delta_weight(adapter) for adapter in layer.active_adapters]  # type: ignore[attr-defined]
                state[f"{name}.weight"] = base.weight + sum(deltas)
    return state


class EMATeacher(LocalTeacher):
    """The student's moving average: average <- decay average + (1 - decay) student, every `every` updates.

    ramp: the first decays are smaller (`models.ema`). Sources: UniSD, arXiv 2605.06597, Eq. 3 (0.9 every 10 updates, no
    ramp); its released code averages base weights alone, which adapters never move.
    """

    def __init__(self, student: Any, decay: float = 0.999, *, every: int = 1, ramp: bool = True) -> None:
        if not 0 <= decay <= 1 or every < 1:
            raise RecipeError(
                f"A moving average needs a decay in [0, 1] and every of at least 1, got {decay} and {every}."
            )
        self.ema = self.state = EffectiveEMA(student, decay, ramp)
        self.every = every
        self.model, self.name, self.gives = self.ema.average, "moving average of the student", SIGNALS[student.kind]

    def after_step(self, student: nn.Module, step: int = 0) -> None:
        if (step + 1) % self.every == 0:
            self.ema.update(student)


class RefreshedTeacher(EMATeacher):
    """The student as it was at the last multiple of `every` updates: an average without memory."""

    def __init__(self, student: Any, every: int) -> None:
        super().__init__(student, 0.0, every=every, ramp=False)
        self.name = f"the student of up to {every} updates ago"


class ProgressiveTeacher(LocalTeacher):
    """A row of teachers of growing strength, such as a large one's checkpoints: teacher i teaches from step `starts[i]`."""

    def __init__(self, teachers: Sequence[LocalTeacher], starts: Sequence[int]) -> None:
        if not teachers or len(teachers) != len(starts) or starts[0] != 0 or sorted(set(starts)) != list(starts):
            raise RecipeError(
                f"A progressive teacher needs a step for each teacher, the first 0 and each later than the one before: got "
                f"{len(teachers)} teachers and {list(starts)}."
            )
        self.teachers, self.starts, self.state = tuple(teachers), tuple(starts), _Clock()
        self.gives = frozenset.intersection(*(teacher.gives for teacher in teachers))
        for teacher in teachers[1:]:
            check_vocabulary(teachers[0].model, teacher)

    @property
    def teacher(self) -> LocalTeacher:
        """The one that teaches now."""
        return self.teachers[sum(start <= int(self.state.step) for start in self.starts) - 1]

    @property
    def model(self) -> Any:  # type: ignore[override]
        return self.teacher.model

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.teacher.name

    def to(self, device: torch.device | str) -> "ProgressiveTeacher":
        for teacher in self.teachers:
            teacher.to(device)
        return self

    def score(self, batch: Batch, need: type[Signal]) -> Signal:
        return self.teacher.score(batch, need)

    def after_step(self, student: nn.Module, step: int = 0) -> None:
        self.state.step.fill_(step + 1)


class _Clock(nn.Module):
    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))


class LiveTeacher(LocalTeacher):
    """The student as it is now, in evaluation mode and without gradient: for a context that it alone lacks."""

    def __init__(self, student: Any) -> None:
        self.model, self.name, self.gives = student, "the student itself", SIGNALS[student.kind]

    def score(self, batch: Batch, need: type[Signal]) -> Signal:
        with evaluating(self.model):
            signal = super().score(batch, need)
        if isinstance(signal, HiddenAndHead):  # its head is the one that is trained
            bias = None if signal.bias_V is None else signal.bias_V.detach()
            return replace(signal, head_VD=signal.head_VD.detach(), bias_V=bias)
        return signal


def moving_state(*teachers: Any) -> nn.ModuleList:
    """The states of those teachers that move, once each, for an objective to hold."""
    states = [teacher.state for teacher in teachers if getattr(teacher, "state", None) is not None]
    return nn.ModuleList({id(state): state for state in states}.values())


def follow(student: nn.Module, step: int, *teachers: Any) -> None:
    """Let the teachers that move know of the student's update, each average once."""
    told: set[int] = set()
    for teacher in teachers:
        if getattr(teacher, "state", None) is not None and id(teacher.state) not in told:
            told.add(id(teacher.state))
            teacher.after_step(student, step)
