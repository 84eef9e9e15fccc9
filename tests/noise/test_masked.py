import itertools
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from potstill.contracts.errors import RecipeError
from potstill.noise.masked import (
    BetaTime,
    Cosine,
    LogLinear,
    UniformTime,
    ancestral,
    confident,
    corrupt,
    draw,
    jump,
    jump_logp,
    masked_nll,
    subs_log_probs,
)

MASK = 2  # of a vocabulary of three: 0, 1, mask


def random_logits(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("schedule", [LogLinear(), LogLinear(0.0), Cosine()], ids=repr)
def test_schedules(schedule):
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    slope = torch.autograd.grad(alpha.sum(), t)[0]
    assert_close(schedule.slope(t.detach()), slope)
    assert (slope < 0).all()
    assert_close(schedule.weight(t.detach()), (-slope / (1 - alpha)).detach())
    assert schedule.alpha(0.0).item() == pytest.approx(1.0, abs=1e-12)
    assert schedule.alpha(1.0).item() == pytest.approx(schedule.rest, abs=1e-12)


def test_log_linear_weight_is_one_over_t():
    assert LogLinear().weight(0.25).item() == pytest.approx(4.0)
    assert LogLinear().alpha(0.5).item() == pytest.approx(1 - 0.999 * 0.5)


def test_subs_never_predicts_the_mask_and_copies_what_is_visible():
    logits, tokens = random_logits(2, 3, 3, seed=0).requires_grad_(), torch.tensor([[MASK, 1, MASK], [0, MASK, 1]])
    log_p = subs_log_probs(logits, tokens, MASK)
    masked = tokens == MASK
    assert_close(log_p[masked][:, :2], logits[masked][:, :2].log_softmax(-1))
    assert (log_p[masked][:, MASK] == -math.inf).all()
    assert log_p[0, 1].tolist() == [-math.inf, 0.0, -math.inf]
    log_p.gather(-1, torch.zeros(2, 3, 1, dtype=torch.long))[masked].sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[~masked] == 0).all()
    assert (logits.grad[masked][:, :2] != 0).all()


def test_corruption_masks_the_right_share_and_is_nested():
    ids, tokens = torch.arange(500), torch.zeros(500, 40, dtype=torch.long)
    alpha = torch.linspace(0.1, 0.9, 500)
    noisy = corrupt(tokens, alpha, MASK, 0, ids)
    share = (noisy == MASK).double().mean(1)
    assert (share - (1 - alpha)).mean().abs() < 0.01
    assert share[:100].mean() > share[-100:].mean() + 0.5
    more = corrupt(tokens, alpha * 0.5, MASK, 0, ids)
    assert ((more == MASK) | (noisy != MASK)).all()  # a superset is masked
    assert_close(corrupt(tokens[:, :20], alpha.flip(0), MASK, 0, ids.flip(0)).flip(0), noisy[:, :20])
    free = torch.arange(40)[None].expand(500, 40) >= 10
    kept = corrupt(tokens, 0.0, MASK, 0, ids, free)
    assert (kept[:, :10] == 0).all()
    assert (kept[:, 10:] == MASK).all()
    assert torch.equal(corrupt(tokens, 1.0, MASK, 0, ids), tokens)


def exact_jump(log_p_BLV, state, alpha_from, alpha_to):
    """Probabilities of all states of two positions after a jump, by enumeration."""
    before = torch.tensor([state])
    return {
        after: jump_logp(log_p_BLV, before, torch.tensor([after]), alpha_from, alpha_to, MASK).sum().exp().item()
        for after in itertools.product(range(3), repeat=2)
    }


@pytest.mark.parametrize("state", [(MASK, MASK), (1, MASK)])
def test_a_jump_is_a_distribution_and_two_compose_to_one(state):
    tokens = torch.tensor([state])
    log_p = subs_log_probs(random_logits(1, 2, 3, seed=1), tokens, MASK)
    a, b, c = 0.1, 0.35, 0.8
    once = exact_jump(log_p, state, a, c)
    assert sum(once.values()) == pytest.approx(1.0)
    twice = dict.fromkeys(once, 0.0)
    for middle, p in exact_jump(log_p, state, a, b).items():
        if p > 0:
            for after, q in exact_jump(log_p, middle, b, c).items():
                twice[after] += p * q
    assert twice == pytest.approx(once)
    stay = sum(p for after, p in once.items() if after[1] == MASK)
    assert stay == pytest.approx((1 - c) / (1 - a))


def test_drawn_jumps_follow_their_log_probability():
    """Frequencies of 40,000 keyed jumps against the exact probabilities of all nine outcomes."""
    count = 40000
    before = torch.tensor([[MASK, MASK]])
    log_p = subs_log_probs(random_logits(1, 2, 3, seed=2), before, MASK)
    exact = exact_jump(log_p, (MASK, MASK), 0.2, 0.6)
    after = jump(log_p.expand(count, 2, 3), before.expand(count, 2), 0.2, 0.6, MASK, 0, torch.arange(count))
    frequency = torch.bincount(after[:, 0] * 3 + after[:, 1], minlength=9) / count
    assert_close(frequency.double(), torch.tensor(list(exact.values())).double(), rtol=0, atol=0.01)


def test_jump_logp_by_hand_and_its_gradient():
    before, after = torch.tensor([[MASK, MASK, 1, 0]]), torch.tensor([[0, MASK, 1, 1]])
    logits = random_logits(1, 4, 3, seed=3).requires_grad_()
    log_p = subs_log_probs(logits, before, MASK)
    value = jump_logp(log_p, before, after, torch.tensor([0.2]), 0.6, MASK)
    assert value[0, 0].item() == pytest.approx(math.log(0.4 / 0.8) + log_p[0, 0, 0].item())
    assert value[0, 1].item() == pytest.approx(math.log(0.4 / 0.8))
    assert value[0, 2].item() == 0
    assert value[0, 3].item() == -math.inf  # a visible token never changes
    value[0, :3].sum().backward()
    assert_close(logits.grad[0, 0, :2], torch.tensor([1.0, 0.0]).double() - log_p[0, 0, :2].exp().detach())
    assert (logits.grad[0, 1:] == 0).all()


def test_policy_gradient_of_a_jump_sums_to_zero():
    """E[grad log P] = 0: the score-function identity behind trajectory policy gradients."""
    before = torch.tensor([[MASK, MASK]])
    logits = random_logits(1, 2, 3, seed=4).requires_grad_()
    log_p = subs_log_probs(logits, before, MASK)
    mean = torch.zeros(1, 2, 3, dtype=torch.float64)
    for after in itertools.product(range(3), repeat=2):
        logp = jump_logp(log_p, before, torch.tensor([after]), 0.2, 0.6, MASK).sum()
        mean += logp.exp().detach() * torch.autograd.grad(logp, logits, retain_graph=True)[0]
    assert_close(mean, torch.zeros_like(mean))


def conditional(joint, tokens_BL):
    """Exact log p(x_i | visible tokens) of a joint table [2, 2], as logits. [B, 2, 3]."""
    out = torch.full((*tokens_BL.shape, 3), -math.inf, dtype=torch.float64)
    for row, tokens in enumerate(tokens_BL.tolist()):
        table = joint.clone()
        for i, token in enumerate(tokens):
            if token != MASK:
                keep = torch.arange(2) == token
                table = table * (keep[:, None] if i == 0 else keep[None, :])
        for i in range(2):
            out[row, i, :2] = (table.sum(1 - i) / table.sum()).log()
    return out


@pytest.mark.parametrize("schedule", [LogLinear(0.0), Cosine(0.0)], ids=repr)
def test_the_bound_is_tight_for_an_exact_denoiser(schedule):
    """integral_0^1 weight(t) E[sum of masked nll] dt = -log p(x), by quadrature over t and enumeration of the masks."""
    joint = random_logits(2, 2, seed=5).flatten().softmax(0).view(2, 2)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    for x in itertools.product(range(2), repeat=2):
        total = 0.0
        for node, w in zip(nodes, weights):
            t = (node + 1) / 2
            alpha = schedule.alpha(t).item()
            for masks in itertools.product([False, True], repeat=2):
                noisy = torch.tensor([[MASK if m else v for v, m in zip(x, masks)]])
                log_p = subs_log_probs(conditional(joint, noisy), noisy, MASK)
                nll = masked_nll(log_p, torch.tensor([x]), noisy, MASK).sum().item()
                chance = alpha ** (2 - sum(masks)) * (1 - alpha) ** sum(masks)
                total += w / 2 * schedule.weight(t).item() * chance * nll
        assert total == pytest.approx(-math.log(joint[x]), rel=1e-9)


def test_ancestral_sampling_follows_the_joint():
    """With many steps positions are revealed one at a time, so the exact denoiser gives the exact joint."""
    joint = torch.tensor([[0.45, 0.05], [0.05, 0.45]], dtype=torch.float64)
    states = torch.tensor(list(itertools.product(range(3), repeat=2)))
    table = torch.stack([subs_log_probs(conditional(joint, s[None]), s[None], MASK)[0] for s in states])
    predict = lambda tokens: table[tokens[:, 0] * 3 + tokens[:, 1]]
    count = 8000
    masks, ids = torch.full((count, 2), MASK), torch.arange(count)
    drawn = ancestral(predict, masks, MASK, steps=64, seed=0, ids_B=ids)
    assert (drawn != MASK).all()
    agree = lambda x: (x[:, 0] == x[:, 1]).double().mean().item()
    assert agree(drawn) == pytest.approx(0.9, abs=0.03)
    assert agree(ancestral(predict, masks, MASK, steps=1, seed=0, ids_B=ids)) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(
        ancestral(predict, masks[:50], MASK, steps=4, seed=0, ids_B=ids[:50].flip(0)).flip(0),
        ancestral(predict, masks, MASK, steps=4, seed=0, ids_B=ids)[:50],
    )
    # by confidence, one at a time: exact too
    assert agree(confident(predict, masks, MASK, steps=2, seed=0, ids_B=ids)) == pytest.approx(0.9, abs=0.02)


def test_confident_reveals_the_surest_first():
    """Position 1 is surest, then 2, then 0; a prompt at position 3 stays. One mask falls at each of three steps."""
    logits = torch.tensor([[[1.0, 0, 0], [5.0, 0, 0], [0, 3.0, 0], [0, 0, 0]]])
    seen = []

    def predict(tokens):
        seen.append(tokens.tolist()[0])
        return subs_log_probs(logits, tokens, MASK)

    out = confident(
        predict, torch.tensor([[MASK, MASK, MASK, 1]]), MASK, steps=3, seed=0, ids_B=torch.tensor([0]), temperature=0
    )
    assert seen == [[2, 2, 2, 1], [2, 0, 2, 1], [2, 0, 1, 1]]
    assert out.tolist() == [[0, 0, 1, 1]]
    noisy = confident(
        predict, torch.tensor([[MASK] * 4]), MASK, steps=4, seed=0, ids_B=torch.tensor([0]), choice_temperature=1.0
    )
    assert (noisy != MASK).all()


def test_draw_only_where_asked_and_greedy_at_zero():
    log_p = random_logits(2, 3, 5, seed=6).log_softmax(-1)
    where = torch.tensor([[True, False, True], [False, True, True]])
    greedy = draw(log_p, 0, torch.arange(2), where, temperature=0.0)
    assert torch.equal(greedy, log_p.argmax(-1) * where)
    count, p = 40000, torch.tensor([0.1, 0.2, 0.7])  # three outcomes: with two, the noise's sign could not be seen
    drawn = draw(p.log().expand(count, 1, 3), 0, torch.arange(count), torch.ones(count, 1, dtype=torch.bool))
    assert_close(torch.bincount(drawn.flatten()) / count, p, rtol=0, atol=0.01)


def test_visible_positions_are_left_alone_by_any_probabilities():
    log_p, tokens = random_logits(1, 4, 3, seed=7).log_softmax(-1), torch.tensor([[0, MASK, 1, MASK]])
    assert masked_nll(log_p, torch.tensor([[0, 1, 1, 0]]), tokens, MASK)[0, [0, 2]].tolist() == [0, 0]
    after = jump(log_p.expand(200, 4, 3), tokens.expand(200, 4), 0.1, 1.0, MASK, 0, torch.arange(200))
    assert (after[:, [0, 2]] == tokens[:, [0, 2]]).all()


def test_times():
    ids = torch.arange(20000)
    t = BetaTime(2.0, 3.0, 0.0, 1.0)(0, ids)
    assert t.mean().item() == pytest.approx(0.4, abs=0.01)
    assert t.var().item() == pytest.approx(0.04, abs=0.003)
    assert BetaTime()(0, ids).min().item() == pytest.approx(0.02)
    at = torch.tensor([0.2, 0.7], dtype=torch.float64)
    assert_close(BetaTime(2.0, 3.0).log_density(at), torch.distributions.Beta(2.0, 3.0).log_prob(at))
    assert UniformTime(0.1, 0.6)(0, ids).mean().item() == pytest.approx(0.35, abs=0.01)
    assert UniformTime(0.1, 0.6).log_density(at)[0].item() == pytest.approx(math.log(2))
    for make in (lambda: BetaTime(a=0.0), lambda: UniformTime(0.5, 0.5)):
        with pytest.raises(RecipeError, match="low < high"):
            make()


def test_no_steps_are_refused():
    for sampler in (ancestral, confident):
        with pytest.raises(RecipeError, match="at least one step"):
            sampler(lambda x: x, torch.zeros(1, 2), MASK, steps=0, seed=0, ids_B=torch.tensor([0]))
