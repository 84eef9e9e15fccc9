"""Optimizers and schedules of players."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from potstill.contracts.players import OptimizerSpec


def make_optimizer(spec: OptimizerSpec, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a player. Weight decay is left off vectors and scalars (norms and biases)."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    match spec.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum)
        case "adam":
            return torch.optim.Adam(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps)
        case "radam":
            return torch.optim.RAdam(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps)
        case _:
            return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps)


def learning_rate(spec: OptimizerSpec, update: int, updates: int) -> float:
    """The learning rate of a player's update (0-based) out of `updates`: linear warm-up, then the schedule."""
    if update < spec.warmup:
        return spec.lr * (update + 1) / spec.warmup
    if spec.schedule == "constant":
        return spec.lr
    progress = min(1.0, (update - spec.warmup) / max(1, updates - spec.warmup)) / spec.stretch
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if spec.schedule == "cosine" else 1 - progress
    return spec.lr * (spec.end + (1 - spec.end) * shape)
