import math

import torch
from scipy import stats

from potstill.contracts import keyed


def test_numbers_depend_on_their_indices_alone():
    """The same cell asked in another layout is the same number: batch order, size and neighbours are irrelevant."""
    rows, columns = torch.arange(6), torch.arange(9)
    whole = keyed.uniform(7, rows[:, None], columns[None])
    assert torch.equal(whole[4:5, 3:], keyed.uniform(7, rows[4:5, None], columns[None, 3:]))
    assert torch.equal(whole.flip(0), keyed.uniform(7, rows.flip(0)[:, None], columns[None]))
    assert not torch.equal(whole, keyed.uniform(8, rows[:, None], columns[None]))
    assert not torch.equal(whole[:6, :6], whole[:6, :6].T), "row and column play different parts"


def test_uniform_is_uniform_and_open():
    x = keyed.uniform(keyed.key("t"), torch.arange(200)[:, None], torch.arange(500)[None])
    assert x.min() > 0 and x.max() < 1
    assert stats.kstest(x.flatten().numpy(), "uniform").pvalue > 1e-3
    lag = torch.corrcoef(torch.stack([x[:, :-1].flatten(), x[:, 1:].flatten()]))[0, 1]
    assert abs(lag) < 0.01, "neighbouring columns are uncorrelated"


def test_normal_and_gumbel_have_their_laws():
    index = torch.arange(100_000)
    assert stats.kstest(keyed.normal(1, index).numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(keyed.gumbel(2, index).numpy(), "gumbel_r").pvalue > 1e-3


def test_gumbel_argmax_samples_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    draws = (logits + keyed.gumbel(3, torch.arange(40_000)[:, None], torch.arange(4)[None])).argmax(-1)
    frequency = torch.bincount(draws, minlength=4) / len(draws)
    assert (frequency - logits.softmax(-1)).abs().max() < 4 * math.sqrt(0.25 / len(draws))


def test_normal_like_is_a_function_of_the_sample():
    like = torch.zeros(3, 2, 5)
    whole = keyed.normal_like(5, torch.tensor([10, 20, 30]), like)
    assert torch.equal(whole[1:2], keyed.normal_like(5, torch.tensor([20]), like[:1]))
    assert whole.shape == like.shape


def test_key_separates_its_parts():
    assert keyed.key(1, 23) != keyed.key(12, 3) and keyed.key("a", 1) == keyed.key("a", 1)
    assert -(2**63) <= keyed.key("x") < 2**63
