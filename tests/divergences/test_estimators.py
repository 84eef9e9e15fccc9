"""Every expectation is an enumeration of all tokens with their probabilities, so the identities are exact."""

import math

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.testing import assert_close

from potstill.contracts.errors import RecipeError, SignalError
from potstill.contracts.signals import FullLogits, TokenLogp
from potstill.contracts.spec import Part
from potstill.divergences import (
    Estimator,
    Exact,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SampledReverseKL,
    TopK,
    kl,
    log_probs,
)

V = 50
ESTIMATORS = [
    SampledReverseKL(),
    SampledReverseKL("full"),
    SampledReverseKL("topk", k=3),
    SampledReverseKL("topk", k=V),
]


def rows(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(value: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(value, z, retain_graph=True)[0]


def every_token(estimator: Estimator, log_p: Tensor, log_q: Tensor, old: Tensor | None = None) -> Tensor:
    """Values [V] of one state, for each token it could have sampled."""
    p, q = log_p.expand(V, V), log_q.expand(V, V)
    return estimator.per_position(p, q, torch.arange(V), old)


@pytest.mark.parametrize("scale", [0.5, 4.0])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_expected_gradient_is_that_of_the_reverse_kl(estimator, scale):
    z, log_p = rows(V, seed=2, scale=scale).requires_grad_(), log_probs(rows(V, seed=3, scale=scale))
    log_q = log_probs(z)
    q = log_q.detach().exp()
    found = gradient((q * every_token(estimator, log_p, log_q)).sum(), z)
    analytic = q * (log_q.detach() - log_p - kl(log_q.detach(), log_p))
    assert (found - analytic).abs().max() < 1e-12
    assert (gradient(every_token(Exact(), log_p, log_q)[0], z) - analytic).abs().max() < 1e-12


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_old_policies_are_corrected_by_the_importance_ratio(estimator):
    z, log_p, old = rows(V, seed=2).requires_grad_(), log_probs(rows(V, seed=3)), log_probs(rows(V, seed=4))
    log_q = log_probs(z)
    found = gradient((old.exp() * every_token(estimator, log_p, log_q, old)).sum(), z)
    assert (found - gradient(kl(log_q, log_p), z)).abs().max() < 1e-12


def test_advantages_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    token = torch.tensor([0])
    reverse = 0.25 * math.log(0.5) + 0.5 * math.log(2)
    assert SampledReverseKL().advantage(p, q, token).item() == pytest.approx(math.log(2))
    assert SampledReverseKL("full").advantage(p, q, token).item() == pytest.approx(math.log(2) + reverse)
    p, q = torch.tensor([[0.5, 0.1, 0.4]]).log(), torch.tensor([[0.3, 0.5, 0.2]]).log()
    top2 = 0.625 * math.log(0.625 / (1 / 6)) + 0.375 * math.log(0.375 / (5 / 6))  # the student's: tokens 1 and 0
    expected = math.log(0.5 / 0.3) + top2
    assert SampledReverseKL("topk", k=2).advantage(p, q, token).item() == pytest.approx(expected, rel=1e-5)


def test_the_full_baseline_centres_the_advantage():
    log_p, log_q = log_probs(rows(V, seed=3)), log_probs(rows(V, seed=2))
    pair, tokens = (log_p.expand(V, V), log_q.expand(V, V)), torch.arange(V)
    assert (log_q.exp() * SampledReverseKL("full").advantage(*pair, tokens)).sum().abs() < 1e-12
    assert (log_q.exp() * SampledReverseKL("none").advantage(*pair, tokens)).sum() < -0.1


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_no_gradient_flows_through_advantage_or_teacher(estimator):
    z, t = rows(1, V, seed=2).requires_grad_(), rows(1, V, seed=3).requires_grad_()
    log_q, log_p, token = log_probs(z), log_probs(t), torch.tensor([7])
    advantage = estimator.advantage(log_p, log_q, token)
    assert not advantage.requires_grad
    value = estimator.surrogate(teacher_logp=log_p, student_logp=log_q, tokens_N=token)
    assert_close(gradient(value.sum(), z), -advantage * gradient(log_q[0, 7], z))
    assert torch.autograd.grad(value.sum(), t, allow_unused=True) == (None,)


def test_exact_gives_no_gradient_to_the_teacher_and_uses_its_support():
    z, t = rows(2, V, seed=2).requires_grad_(), rows(2, V, seed=3).requires_grad_()
    estimator = Exact(JensenShannon(0.3), TopK(4, "union"))
    value = estimator.per_position(log_probs(t), log_probs(z), torch.zeros(2, dtype=torch.long))
    teacher, student = TopK(4, "union")(teacher_logp=log_probs(t), student_logp=log_probs(z))
    assert_close(value, JensenShannon(0.3)(teacher_logp=teacher, student_logp=student))
    assert torch.autograd.grad(value.sum(), t, allow_unused=True) == (None,)


def test_what_the_k_estimates_would_do_as_losses():
    """Differentiated over tokens sampled from q: k1 goes nowhere, k2 is the reverse KL, k3 the FORWARD KL."""
    z, log_p = rows(V, seed=2).requires_grad_(), log_probs(rows(V, seed=3))
    log_q = log_probs(z)
    q = log_q.detach().exp()
    expected = {"k1": torch.zeros(V, dtype=torch.float64), "k2": gradient(kl(log_q, log_p), z)}
    expected["k3"] = gradient(ForwardKL()(teacher_logp=log_p, student_logp=log_q), z)
    for kind, direction in expected.items():
        loss = (q * ReverseKL()._estimate(log_p - log_q, kind)).sum()
        assert_close(gradient(loss, z), direction, rtol=0, atol=1e-12)
        assert not ReverseKL().estimate(log_p - log_q, kind).requires_grad  # so nobody does it by accident


def _variance(estimator: Estimator, log_p: Tensor, log_q: Tensor) -> float:
    """Trace of the covariance of the one-token gradient with respect to the logits, by enumeration."""
    q = log_q.exp()
    a = estimator.advantage(log_p.expand(V, V), log_q.expand(V, V), torch.arange(V))
    gradients = -a[:, None] * (torch.eye(V, dtype=torch.float64) - q)
    mean = q @ gradients
    return (q @ gradients.square().sum(-1) - mean.square().sum()).item()


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 4.0])
def test_baselines_lower_the_variance_on_average(scale):
    """Exact variances, meaned over states (single states may rise at large scales): none > top-3 value > full value."""
    total = {"none": 0.0, "topk": 0.0, "full": 0.0}
    for state in range(60):
        log_q, log_p = (log_probs(rows(V, seed=2 * state + side, scale=scale)) for side in (0, 1))
        for name in total:
            total[name] += _variance(SampledReverseKL(name, k=3), log_p, log_q)
    assert total["full"] < total["topk"] < total["none"]


def test_reward_clip_is_a_lower_bound():
    teacher, student = torch.tensor([-9.0, -1.0]), torch.tensor([-1.0, -2.0])
    advantage = SampledReverseKL(clip=0.5).advantage(teacher, student)
    assert_close(advantage, torch.tensor([math.log(0.5) / 0.5, 1.0]))


def test_chosen_log_probs_do_as_well_as_rows():
    log_p, z, tokens = log_probs(rows(4, V, seed=1)), rows(4, V, seed=2).requires_grad_(), torch.tensor([3, 0, 49, 3])
    log_q, at = log_probs(z), (torch.arange(4), tokens)
    whole = SampledReverseKL().surrogate(teacher_logp=log_p, student_logp=log_q, tokens_N=tokens)
    chosen = SampledReverseKL().surrogate(teacher_logp=log_p[at], student_logp=log_q[at])
    assert_close(gradient(whole.sum(), z), gradient(chosen.sum(), z))


def test_a_task_reward_adds_to_the_advantage():
    teacher, student = torch.tensor([-1.0]), torch.tensor([-2.0], requires_grad=True)
    extra = torch.tensor([0.5], requires_grad=True)
    value = SampledReverseKL().surrogate(teacher_logp=teacher, student_logp=student, extra_advantage_N=extra)
    assert gradient(value.sum(), student).item() == -1.5
    assert torch.autograd.grad(value.sum(), extra, allow_unused=True) == (None,)


def test_ppo_clip_stops_only_what_has_gone_far_enough():
    """Ratio 1.5 at clip 0.2: a good token is pushed no further, a bad one still is; and the reverse at ratio 0.5."""
    student = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5])).requires_grad_()
    teacher = student.detach() + torch.tensor([1.0, -1.0, 1.0, -1.0])
    old = torch.zeros(4)
    estimator = SampledReverseKL(ppo_clip=0.2)
    value = estimator.surrogate(teacher_logp=teacher, student_logp=student, sampled_logp_N=old)
    assert_close(gradient(value.sum(), student), torch.tensor([0.0, 1.5, -0.5, 0.0]))
    assert_close(value.detach(), torch.tensor([-1.2, 1.5, -0.5, 0.8]))


def test_needs_and_recipe_parts():
    assert SampledReverseKL().needs is TokenLogp
    assert SampledReverseKL("topk").needs is FullLogits
    assert Exact().needs is FullLogits
    read = TypeAdapter(Part(Estimator)).validate_python
    assert read({"name": "Exact", "divergence": "ForwardKL", "support": {"name": "TopK", "k": 8}}) == Exact(
        ForwardKL(), TopK(8)
    )
    assert read({"name": "SampledReverseKL", "baseline": "full"}) == SampledReverseKL("full")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "mean"}, "SampledReverseKL.baseline must be one of none, full, topk, got 'mean'"),
        ({"clip": 1.0}, "SampledReverseKL.clip must lie strictly between 0 and 1, got 1.0"),
        ({"clip": 0.5, "baseline": "full"}, "clip bounds the reward without a baseline; with baseline 'full'"),
        ({"k": 0}, "SampledReverseKL.k must be at least 1"),
        ({"ppo_clip": 0.0}, "SampledReverseKL.ppo_clip must be positive"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        SampledReverseKL(**options)


def test_missing_rows_or_tokens_are_refused():
    with pytest.raises(SignalError, match=r"baseline 'full' needs rows \[N, V\] .* \[2\] and \[2\]"):
        SampledReverseKL("full").advantage(torch.zeros(2), torch.zeros(2))
    with pytest.raises(SignalError, match=r"the teacher's rows \[2, 5\] need tokens of shape \[2\], got None"):
        SampledReverseKL().advantage(torch.zeros(2, 5), torch.zeros(2))
