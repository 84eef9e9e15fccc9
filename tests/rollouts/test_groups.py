import pytest
import torch
from torch.testing import assert_close

from potstill.contracts.errors import DataError
from potstill.rollouts.groups import group_advantages


def rewards(seed: int = 0) -> torch.Tensor:
    return torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand():
    r = torch.tensor([1.0, 0.0, 0.0, 3.0, 10.0, 10.0, 10.0, 10.0])
    plain = group_advantages(r, 4, normalise=False)
    assert_close(plain, torch.tensor([0.0, -1.0, -1.0, 2.0, 0, 0, 0, 0]))
    assert_close(group_advantages(r, 4, eps=0.5)[:4], plain[:4] / (2.0**0.5 + 0.5))  # 6 / (4 - 1) = 2
    assert_close(group_advantages(r, 4, eps=0.5, unbiased=False)[:4], plain[:4] / (1.5**0.5 + 0.5))
    others = torch.tensor([1 - 3 / 3, 0 - 4 / 3, 0 - 4 / 3, 3 - 1 / 3])
    assert_close(group_advantages(r, 4, baseline="leave_one_out", normalise=False)[:4], others)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("normalise", [True, False])
def test_groups_sum_to_zero_and_ignore_each_other(baseline, normalise):
    r = rewards()
    a = group_advantages(r, 4, baseline=baseline, normalise=normalise)
    assert_close(a.view(3, 4).sum(1), torch.zeros(3, dtype=torch.float64))
    assert a.abs().min() > 0
    shifted = r + torch.tensor([5.0, -2.0, 0.0], dtype=torch.float64).repeat_interleave(4)
    assert_close(group_advantages(shifted, 4, baseline=baseline, normalise=normalise), a)


def test_normalised_advantages_do_not_see_the_scale():
    a = group_advantages(rewards(), 4, eps=0.0)
    assert_close(group_advantages(7 * rewards(), 4, eps=0.0), a)
    assert_close(a.view(3, 4).std(1), torch.ones(3, dtype=torch.float64))


def test_equal_rewards_give_exact_zeros():
    """The mean of equal floats may be off in the last bit, which a tiny eps would blow up to the size of a signal."""
    r = torch.full((7,), 0.1)
    assert (group_advantages(r, 7, eps=0.0) == 0).all()


def test_leave_one_out_gradient_is_unbiased():
    """Two actions, groups of two, enumerated: E[sum A grad log q] / G is the gradient of the mean reward."""
    logits = torch.tensor([0.3, -0.5], dtype=torch.float64, requires_grad=True)
    payoff = torch.tensor([1.0, 4.0], dtype=torch.float64)
    q = logits.softmax(0)
    surrogate = 0.0
    for a in range(2):
        for b in range(2):
            advantage = group_advantages(payoff[[a, b]], 2, baseline="leave_one_out", normalise=False)
            weight = (q[a] * q[b]).detach()
            surrogate = surrogate + weight * (advantage * q.log()[[a, b]]).sum() / 2
    theirs = torch.autograd.grad(surrogate, logits, retain_graph=True)[0]
    assert_close(theirs, torch.autograd.grad((q * payoff).sum(), logits)[0])


@pytest.mark.parametrize("size", [1, 5])
def test_refuses_broken_groups(size):
    with pytest.raises(DataError, match="at least 2 samples a prompt and whole groups"):
        group_advantages(rewards(), size)
