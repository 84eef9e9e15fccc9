"""Group-relative advantages. G samples of one prompt stand side by side; each is compared with its group.

The mean (or the mean of the others) is a baseline that does not depend on the sample, so plain and leave-one-out
advantages leave the policy gradient unbiased (the plain one up to the factor 1 - 1/G); dividing by the group's spread
reweights prompts. Sources: GRPO, arXiv 2402.03300; RLOO, arXiv 2402.14740; without the
spread, Dr. GRPO, arXiv 2503.20783.
"""

from typing import Literal

import torch
from torch import Tensor

from potstill.contracts.errors import DataError

Baseline = Literal["mean", "leave_one_out"]


def group_advantages(
    rewards_B: Tensor,
    group_size: int,
    *,
    baseline: Baseline = "mean",
    normalise: bool = True,
    unbiased: bool = True,
    eps: float = 1e-4,
) -> Tensor:
    """Rewards minus their group's baseline, divided (`normalise`) by the group's standard deviation + eps. [B].

    `unbiased` divides the variance by G - 1, not G. A group of equal rewards gets exact zeros, however small eps is.
    """
    if group_size < 2 or len(rewards_B) % group_size:
        raise DataError(
            f"Group advantages need at least 2 samples a prompt and whole groups: got {len(rewards_B)} rewards in "
            f"groups of {group_size}. Raise samples_per_prompt."
        )
    rewards = rewards_B.detach().to(torch.promote_types(rewards_B.dtype, torch.float32)).view(-1, group_size)
    centred = rewards - rewards.mean(1, keepdim=True)
    if baseline == "leave_one_out":  # r_i - mean of the others = G / (G - 1) (r_i - mean)
        centred = centred * (group_size / (group_size - 1))
    if normalise:
        centred = centred / (rewards.std(1, keepdim=True, correction=int(unbiased)) + eps)
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)  # rounding over a tiny eps is no signal
    return centred.masked_fill(equal, 0.0).flatten()
