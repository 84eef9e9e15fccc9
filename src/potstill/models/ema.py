"""Exponential moving average of a module, as a module: checkpointed with the objective that owns it."""

import copy

import torch
from torch import Tensor, nn


class EMA(nn.Module):
    """`average <- decay * average + (1 - decay) * module`, after each update of the module.

    ramp: early in training the decay is min(decay, (1 + n) / (10 + n)) after n updates, so that the random start is
    forgotten quickly.
    """

    updates: Tensor

    def __init__(self, module: nn.Module, decay: float = 0.999, ramp: bool = True) -> None:
        super().__init__()
        self.average = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay, self.ramp = decay, ramp
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        n = int(self.updates)
        decay = min(self.decay, (1 + n) / (10 + n)) if self.ramp else self.decay
        source = self.source(module)
        moved: set[int] = set()
        for name, value in self.average.state_dict().items():
            if value.data_ptr() in moved:  # a weight that two layers share has two names
                continue
            moved.add(value.data_ptr())
            if value.is_floating_point():
                value.lerp_(source[name].to(value.dtype), 1 - decay)
            else:
                value.copy_(source[name])

    def source(self, module: nn.Module) -> dict[str, Tensor]:
        """What is averaged of a module, under the average's names."""
        return module.state_dict()

    def train(self, mode: bool = True) -> "EMA":
        """The average always stays in evaluation mode."""
        super().train(mode)
        self.average.eval()
        return self
