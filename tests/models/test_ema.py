"""The moving average has its closed form for every weight, also for one that two layers share."""

import torch
from torch import nn
from torch.testing import assert_close

from potstill.models.ema import EMA


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.seen = nn.Linear(3, 3, bias=False), nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.last.weight = self.first.weight


def test_every_weight_moves_once_an_update():
    torch.manual_seed(0)
    module = Tied()
    ema = EMA(module, 0.9, ramp=False)
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    for _ in range(3):
        with torch.no_grad():
            module.first.weight.normal_()
            module.last.bias.normal_()
        module.seen(torch.randn(4, 3))
        for name, value in module.state_dict().items():
            floating = value.is_floating_point()
            expected[name] = 0.9 * expected[name] + 0.1 * value if floating else value.clone()
        ema.update(module)
    assert_close(dict(ema.average.state_dict()), expected)
    assert ema.average.last.weight is ema.average.first.weight


def test_early_updates_forget_the_start_quickly():
    module = nn.Linear(1, 1, bias=False)
    ema = EMA(module, 0.9)
    with torch.no_grad():
        module.weight.fill_(0.0)
        ema.average.weight.fill_(1.0)
    ema.update(module)
    assert_close(ema.average.weight.item(), 2 / 11)
