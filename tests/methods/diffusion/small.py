"""A small network away from its start, and a few points."""

import torch

from potstill.contracts import keyed
from potstill.contracts.batch import PointBatch


def jittered(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def points(size: int = 6) -> PointBatch:
    ids = torch.arange(size)
    return PointBatch(ids, 0.5 * keyed.normal_like(7, ids, torch.empty(size, 2)))
