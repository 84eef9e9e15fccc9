"""What the tests of divergences compare: random rows, and the distribution at which a function is least."""

import torch
from torch import Tensor

from potstill.divergences import log_probs


def rows(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def least(value, size: int, seed: int) -> Tensor:
    """The log q at which a function of log q is least over all distributions, by L-BFGS on logits from a random start."""
    z = rows(size, seed=seed).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [z], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = value(log_probs(z))
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_probs(z.detach())
