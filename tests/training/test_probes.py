"""The variance probe against closed forms: a loss whose gradient is known sample by sample."""

import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from potstill.contracts import keyed
from potstill.contracts.batch import PointBatch
from potstill.contracts.errors import DataError
from potstill.contracts.players import Objective, OptimizerSpec, Player
from potstill.contracts.terms import Loss, Term
from potstill.training.checkpoint import save_checkpoint
from potstill.training.optimizers import make_optimizer
from potstill.training.probes import adam_variance, gradient_noise


class Pull(Objective):
    """Loss w . x for x keyed by the step: its gradient is x, whatever w is. `unused` takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        self.dropout = nn.Dropout(0.5)

    @property
    def players(self):
        return {"w": Player([self], OptimizerSpec())}

    def collect(self, batch, step):
        assert not torch.is_grad_enabled()
        return PointBatch(batch.ids_B, draws(step)[None])

    def loss(self, player, batch, step):
        return Loss({"pull": Term.over(self.dropout(self.w * batch.points_BD))})


def draws(step):
    return keyed.normal(keyed.key(5, step), torch.arange(3)) + torch.tensor([3.0, 0, 0])


BATCH = PointBatch(torch.arange(1), torch.zeros(1, 3))


def test_total_variance_and_squared_mean_of_known_gradients():
    objective = Pull()
    samples = torch.stack([draws(-1 - r) for r in range(6)]).double() / 3  # the loss is a mean over 3
    noise = gradient_noise(objective, "w", BATCH, 6)
    assert noise.variance == pytest.approx(samples.var(0).sum().item(), rel=1e-6)
    expected = samples.mean(0).square().sum().item() - samples.var(0).sum().item() / 6
    assert noise.squared_mean == pytest.approx(expected, rel=1e-6)
    assert noise.repeats == 6
    assert objective.training
    assert objective.w.grad is None
    with pytest.raises(DataError, match="at least 2 repetitions"):
        gradient_noise(objective, "w", BATCH, 1)


def test_adams_moments_estimate_it_too(tmp_path):
    objective, spec = Pull(), OptimizerSpec(betas=(0.9, 0.99))
    objective.dropout.p = 0.0
    optimizer = make_optimizer(spec, objective.players["w"].parameters())
    first, second = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for step in range(5):
        gradient = draws(step).double() / 3
        objective.loss("w", objective_batch(step), step).value().backward()
        optimizer.step()
        optimizer.zero_grad()
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
    save_checkpoint(tmp_path, 5, objective, {"w": optimizer}, {}, keep=1)
    expected = (second / (1 - 0.99**5)).sum() - (first / (1 - 0.9**5)).square().sum()
    found = adam_variance(tmp_path / "step-00000005", "w", spec.betas)
    assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-5, atol=1e-7)
    assert json.loads((tmp_path / "step-00000005" / "state.json").read_text())["step"] == 5


def objective_batch(step):
    return PointBatch(torch.arange(1), draws(step)[None])
