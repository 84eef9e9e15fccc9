"""Every expectation is an enumeration of all tokens with their probabilities, so the identities are exact."""

import math
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter
from tests.divergences.inputs import rows
from torch import Tensor
from torch.testing import assert_close

from potstill.contracts.errors import RecipeError, SignalError
from potstill.contracts.signals import FullLogits, TokenLogp
from potstill.contracts.spec import Part, members
from potstill.divergences import (
    Alpha,
    Clipped,
    Estimator,
    Exact,
    FDivergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SampledReverseKL,
    SquaredHellinger,
    TopK,
    TotalVariation,
    kl,
    linear_divergence,
    log_probs,
)
from potstill.divergences.estimators import SampledDivergence
from potstill.divergences.family import Adaptive

V = 50
ESTIMATORS = [
    SampledReverseKL(),
    SampledReverseKL("full"),
    SampledReverseKL("topk", k=3),
    SampledReverseKL("topk", k=V),
    SampledReverseKL(exact_k=3),
    SampledReverseKL(exact_k=V),
    SampledReverseKL("full", exact_k=3),
    SampledReverseKL("topk", k=3, exact_k=7),
    SampledDivergence(divergence=ReverseKL()),
    SampledDivergence(divergence=JensenShannon(0.3)),
    SampledDivergence("full", divergence=ForwardKL()),
    SampledDivergence("topk", k=3, divergence=SquaredHellinger()),
    SampledDivergence("full", exact_k=3, divergence=Alpha(1.5)),
    SampledDivergence(divergence=TotalVariation()),
]
estimators = pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)


def gradient(value: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(value, z, retain_graph=True)[0]


def every_token(estimator: Estimator, log_p: Tensor, log_q: Tensor, old: Tensor | None = None) -> Tensor:
    """Values [V] of one state, for each token it could have sampled."""
    p, q = log_p.expand(V, V), log_q.expand(V, V)
    return estimator.per_position(p, q, torch.arange(V), old)


def target(estimator: Estimator) -> FDivergence:
    return getattr(estimator, "divergence", ReverseKL())


def test_nobody_is_missing():
    ours = {part for part in members(Estimator).values() if part.__module__ == "potstill.divergences.estimators"}
    assert ours == {type(estimator) for estimator in ESTIMATORS} | {Exact}


@pytest.mark.parametrize("scale", [0.5, 4.0])
@estimators
def test_expected_gradient_is_that_of_the_divergence(estimator, scale):
    z, log_p = rows(V, seed=2, scale=scale).requires_grad_(), log_probs(rows(V, seed=3, scale=scale))
    log_q, d = log_probs(z), target(estimator)
    q = log_q.detach().exp()
    found = gradient((q * every_token(estimator, log_p, log_q)).sum(), z)
    expected = gradient(d(teacher_logp=log_p, student_logp=log_q), z)
    size = max(1.0, expected.abs().max().item())  # the forward KL's and Alpha's rewards are ratios up to 1e6
    assert (found - expected).abs().max() < 1e-12 * size
    assert_close(gradient(every_token(Exact(d), log_p, log_q)[0], z), expected, rtol=0, atol=1e-14)
    if d == ReverseKL():
        assert_close(expected, q * (log_q.detach() - log_p - kl(log_q.detach(), log_p)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("behaviour", ["older student", "teacher"])
@estimators
def test_other_policies_are_corrected_by_the_importance_ratio(estimator, behaviour):
    z, log_p = rows(V, seed=2).requires_grad_(), log_probs(rows(V, seed=3))
    old, log_q, d = log_p if behaviour == "teacher" else log_probs(rows(V, seed=4)), log_probs(z), target(estimator)
    found = gradient((old.exp() * every_token(estimator, log_p, log_q, old)).sum(), z)
    assert (found - gradient(d(teacher_logp=log_p, student_logp=log_q), z)).abs().max() < 1e-11
    ignored = gradient((old.exp() * every_token(estimator, log_p, log_q)).sum(), z)
    if getattr(estimator, "exact_k", 0) < V:
        assert (ignored - found).abs().max() > 1e-4  # tokens of another policy taken for one's own


@pytest.mark.parametrize("estimator", [SampledReverseKL(), SampledReverseKL("full", exact_k=3)], ids=repr)
def test_truncated_ratios_are_a_bound_and_a_bias(estimator):
    """The mean gradient is -sum min(q, c b) a grad log q over the tokens that are not summed exactly, b the behaviour."""
    z, log_p, old = rows(V, seed=2).requires_grad_(), log_probs(rows(V, seed=3)), log_probs(rows(V, seed=4))
    log_q = log_probs(z)
    q, b, advantage = (
        log_q.detach().exp(),
        old.exp(),
        estimator.advantage(log_p.expand(V, V), log_q.expand(V, V), torch.arange(V)),
    )
    exactly = torch.zeros(V, dtype=torch.bool)
    exactly[q.topk(estimator.exact_k).indices] = True

    def mean(max_ratio: float | None) -> Tensor:
        part = replace(estimator, max_ratio=max_ratio)
        return gradient((b * every_token(part, log_p, log_q, old)).sum(), z)

    for c in (0.5, 1.0, 3.0):
        weight = torch.where(exactly, q, torch.minimum(q, c * b))
        assert_close(mean(c), gradient(-(weight * advantage * log_q).sum(), z), rtol=0, atol=1e-12)
        assert (mean(c) - mean(None)).abs().max() > 1e-3
    assert_close(mean(1e9), mean(None))
    far = estimator.surrogate(
        teacher_logp=log_p[None],
        student_logp=log_q[None],
        tokens_N=torch.tensor([7]),
        sampled_logp_N=torch.tensor([-900.0]),
    )
    assert not far.isfinite().all()
    far = replace(estimator, max_ratio=2.0).surrogate(
        teacher_logp=log_p[None],
        student_logp=log_q[None],
        tokens_N=torch.tensor([7]),
        sampled_logp_N=torch.tensor([-900.0]),
    )
    assert gradient(far.sum(), z).isfinite().all()


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


@estimators
def test_no_gradient_flows_through_advantage_or_teacher(estimator):
    z, t = rows(1, V, seed=2).requires_grad_(), rows(1, V, seed=3).requires_grad_()
    log_q, log_p, token = log_probs(z), log_probs(t), torch.tensor([7])
    advantage = estimator.advantage(log_p, log_q, token)
    assert not advantage.requires_grad
    value = estimator.surrogate(teacher_logp=log_p, student_logp=log_q, tokens_N=token)
    if not estimator.exact_k:
        assert_close(gradient(value.sum(), z), -advantage * gradient(log_q[0, 7], z))
    assert torch.autograd.grad(value.sum(), t, allow_unused=True) == (None,)
    old = torch.zeros(1, dtype=torch.float64, requires_grad=True)  # nor through the policy that sampled
    value = estimator.surrogate(teacher_logp=log_p, student_logp=log_q, tokens_N=token, sampled_logp_N=old)
    assert torch.autograd.grad(value.sum(), old, allow_unused=True) == (None,)


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


@pytest.mark.parametrize("baseline", ["none", "full"])
def test_what_is_summed_exactly_has_no_variance(baseline):
    """What is left is the remainder's: E_out |g|^2 - |E_out g|^2, nothing once all are summed, and less on average."""
    total = {k: 0.0 for k in (0, 3, 10, V)}
    for state in range(30):
        log_q, log_p = (log_probs(rows(V, seed=2 * state + side, scale=2.0)) for side in (0, 1))
        q, z = log_q.exp(), log_q.clone().requires_grad_()
        for k in total:
            values = every_token(SampledReverseKL(baseline, exact_k=k), log_p, log_probs(z))
            each = torch.stack([gradient(value, z) for value in values]) if state == 0 else None
            a = SampledReverseKL(baseline).advantage(log_p.expand(V, V), log_q.expand(V, V), torch.arange(V))
            outside = torch.ones(V, dtype=torch.bool)
            outside[q.topk(k).indices] = False
            g = -a[:, None] * (torch.eye(V, dtype=torch.float64) - q) * outside[:, None]
            variance = (q @ g.square().sum(-1) - (q @ g).square().sum()).item()
            if each is not None:
                found = (q @ each.square().sum(-1) - (q @ each).square().sum()).item()
                assert found == pytest.approx(variance, abs=1e-12)
            total[k] += variance
    assert total[V] == 0.0
    assert total[10] < total[3] < total[0]


def test_exact_tokens_by_hand():
    """The two likeliest of three are summed; the sampled token counts when it is the third, a task's reward always."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.4, 0.35, 0.25]]).log()
    summed = -(0.4 * math.log(0.5 / 0.4) + 0.35 * math.log(0.25 / 0.35))
    part, extra = SampledReverseKL(exact_k=2), torch.tensor([0.5])
    for token, alone in ((0, 0.0), (1, 0.0), (2, math.log(1.0))):
        pair = {"teacher_logp": p, "student_logp": q, "tokens_N": torch.tensor([token])}
        assert part.surrogate(**pair).item() == pytest.approx(summed - alone * q[0, token].item(), rel=1e-5)
        rewarded = part.surrogate(**pair, extra_advantage_N=extra).item()
        assert rewarded == pytest.approx(summed - (alone + 0.5) * q[0, token].item(), rel=1e-5)


def test_exact_tokens_keep_the_reward_clip_and_need_no_ppo_clip():
    z, log_p, old = (
        rows(V, seed=2, scale=3.0).requires_grad_(),
        log_probs(rows(V, seed=3, scale=3.0)),
        log_probs(rows(V, seed=4)),
    )
    log_q = log_probs(z)
    q = log_q.detach().exp()
    clipped = [
        gradient((q * every_token(SampledReverseKL(clip=0.5, exact_k=k), log_p, log_q)).sum(), z) for k in (0, 3, V)
    ]
    assert_close(clipped[1], clipped[0])
    assert_close(clipped[2], clipped[0])
    unclipped = gradient((q * every_token(SampledReverseKL(exact_k=3), log_p, log_q)).sum(), z)
    assert (clipped[1] - unclipped).abs().max() > 1e-2
    bounded = every_token(SampledReverseKL(ppo_clip=0.2, exact_k=V), log_p, log_q, old)
    assert_close(gradient(bounded[0], z), gradient(kl(log_q, log_p), z))


def test_a_forbidden_or_impossible_token_among_the_exact_ones():
    """q = 0 counts nothing; p = 0 < q costs all that it does in the divergence."""
    q = torch.tensor([[0.6, 0.4, 0.0]]).log().requires_grad_()
    pair = {"student_logp": q, "tokens_N": torch.tensor([0])}
    value = SampledReverseKL(exact_k=3).surrogate(teacher_logp=torch.tensor([[0.5, 0.25, 0.25]]).log(), **pair)
    assert torch.autograd.grad(value.sum(), q)[0].isfinite().all()
    forbidden = torch.tensor([[1.0, 0.0, 0.0]]).log()
    assert SampledReverseKL(exact_k=3).surrogate(teacher_logp=forbidden, **pair).item() == math.inf
    bounded = SampledDivergence("full", exact_k=3, divergence=JensenShannon()).surrogate(teacher_logp=forbidden, **pair)
    expected = torch.autograd.grad(JensenShannon()(teacher_logp=forbidden, student_logp=log_probs(q)).sum(), q)[0]
    found = torch.autograd.grad(bounded.sum(), q)[0]
    normal = found - q.detach().exp() * found.sum()  # through the softmax that the exact value has
    assert_close(normal, expected)


def test_the_reverse_kl_is_one_of_the_sampled_divergences():
    """Rewards differ by the constant 1, which the value takes away."""
    log_p, log_q, tokens = log_probs(rows(4, V, seed=1)), log_probs(rows(4, V, seed=2)), torch.tensor([3, 0, 49, 3])
    for baseline, shift in (("none", 1.0), ("full", 0.0), ("topk", 0.0)):
        one, other = SampledReverseKL(baseline, k=5), SampledDivergence(baseline, k=5, divergence=ReverseKL())
        assert_close(one.advantage(log_p, log_q, tokens), other.advantage(log_p, log_q, tokens) + shift)


def test_the_full_baseline_is_the_mean_reward_of_any_divergence():
    log_p, log_q = log_probs(rows(V, seed=3)), log_probs(rows(V, seed=2))
    pair, tokens = (log_p.expand(V, V), log_q.expand(V, V)), torch.arange(V)
    for d in (JensenShannon(0.3), ForwardKL(), Alpha(1.5)):
        part = SampledDivergence("full", divergence=d)
        assert (log_q.exp() * part.advantage(*pair, tokens)).sum().abs() < 1e-10
        assert not part.advantage(*pair, tokens).requires_grad


@pytest.mark.parametrize(
    "estimator", [SampledReverseKL(), SampledReverseKL("full", exact_k=5), SampledDivergence("full")], ids=repr
)
def test_low_precision_is_computed_in_float32(estimator):
    log_p, log_q, tokens = (
        log_probs(rows(4, V, seed=1)).bfloat16(),
        log_probs(rows(4, V, seed=2)).bfloat16(),
        torch.arange(4),
    )
    value = estimator.per_position(log_p, log_q, tokens)
    assert value.dtype == torch.float32
    assert_close(value, estimator.per_position(log_p.float(), log_q.float(), tokens))


@pytest.mark.parametrize(
    "part",
    [
        SampledReverseKL("full", exact_k=5),
        SampledDivergence(exact_k=2),
        Clipped(ForwardKL(), 0.3, per="position"),
        Adaptive(),
    ],
    ids=repr,
)
def test_they_go_through_linear_divergence(part):
    hidden, head = rows(7, 4, seed=1).requires_grad_(), rows(V, 4, seed=2).requires_grad_()
    teacher, tokens = rows(7, V, seed=3), torch.arange(7)
    fused = linear_divergence(part, hidden, head, teacher=FullLogits(teacher), tokens=tokens)
    estimator = Exact(part) if isinstance(part, FDivergence) else part
    plain = estimator.per_position(log_probs(teacher), log_probs(hidden @ head.T), tokens)
    assert_close(fused.values, plain.detach())
    assert_close(*(torch.autograd.grad(x, (hidden, head)) for x in (fused.total, plain.sum())))


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
    assert SampledReverseKL(exact_k=1).needs is FullLogits
    assert SampledDivergence().needs is TokenLogp
    assert Exact().needs is FullLogits
    read = TypeAdapter(Part(Estimator)).validate_python
    assert read({"name": "Exact", "divergence": "ForwardKL", "support": {"name": "TopK", "k": 8}}) == Exact(
        ForwardKL(), TopK(8)
    )
    assert read({"name": "SampledReverseKL", "baseline": "full"}) == SampledReverseKL("full")
    assert read({"name": "SampledDivergence", "divergence": "ForwardKL"}) == SampledDivergence(divergence=ForwardKL())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "mean"}, "SampledReverseKL.baseline must be one of none, full, topk, got 'mean'"),
        ({"clip": 1.0}, "SampledReverseKL.clip must lie strictly between 0 and 1, got 1.0"),
        ({"clip": 0.5, "baseline": "full"}, "clip bounds the reward without a baseline; with baseline 'full'"),
        ({"k": 0}, "SampledReverseKL.k must be at least 1"),
        ({"ppo_clip": 0.0}, "SampledReverseKL.ppo_clip must be positive"),
        ({"max_ratio": 0.0}, "SampledReverseKL.max_ratio must be positive, got 0.0"),
        ({"max_ratio": 2.0, "ppo_clip": 0.2}, "one bound on the ratio: leave ppo_clip or max_ratio out"),
        ({"exact_k": -1}, "SampledReverseKL.exact_k must not be negative, got -1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        SampledReverseKL(**options)
    with pytest.raises(RecipeError, match="SampledDivergence has no clip: its bound is on log-ratios"):
        SampledDivergence(clip=0.5)


def test_missing_rows_or_tokens_are_refused():
    with pytest.raises(SignalError, match=r"baseline 'full' needs rows \[N, V\] .* \[2\] and \[2\]"):
        SampledReverseKL("full").advantage(torch.zeros(2), torch.zeros(2))
    with pytest.raises(SignalError, match=r"SampledDivergence with exact_k 4 needs rows \[N, V\] .* \[2\] and \[2\]"):
        SampledDivergence(exact_k=4).surrogate(teacher_logp=torch.zeros(2), student_logp=torch.zeros(2))
    with pytest.raises(SignalError, match=r"the teacher's rows \[2, 5\] need tokens of shape \[2\], got None"):
        SampledReverseKL().advantage(torch.zeros(2, 5), torch.zeros(2))
