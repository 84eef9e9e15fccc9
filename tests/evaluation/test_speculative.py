import itertools
import math

import pytest
import torch
from tests.rollouts.test_local import model_of, prompts_of
from tests.rollouts.test_speculative import Table, laws, near
from torch.testing import assert_close

from potstill.contracts.batch import PromptBatch, TokenBatch
from potstill.contracts.errors import DataError, ModelError
from potstill.divergences import ForwardKL, JensenShannon, ReverseKL, TotalVariation, log_probs
from potstill.evaluation.speculative import (
    acceptance,
    analytic_acceptance,
    assisted_generation,
    block_efficiency,
    decode,
    sequence_acceptance,
    sharper_bound,
    speedup,
    theorem_bound,
    token_tvd,
)
from potstill.rollouts.local import sample
from potstill.rollouts.speculative import speculative_generate


def random_logits(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_acceptance_is_one_minus_total_variation():
    p, q = laws(0, 30, 9, zeros=True), laws(1, 30, 9, zeros=True)
    tvd = TotalVariation()(teacher_logp=p.log(), student_logp=q.log())
    assert_close(acceptance(p, q), 1 - tvd, rtol=0, atol=1e-14)


def test_total_variation_gradient():
    """d TVD / d logits = q (s - sum q s) with s = -(1/2) sign(p - q): DistillSpec's training signal for acceptance."""
    logits, log_p = random_logits(5, 9, seed=0).requires_grad_(), log_probs(random_logits(5, 9, seed=1))
    log_q = log_probs(logits)
    gradient = torch.autograd.grad(TotalVariation()(teacher_logp=log_p, student_logp=log_q).sum(), logits)[0]
    q, s = log_q.exp(), -torch.sign(log_p.exp() - log_q.exp()) / 2
    assert_close(gradient, q * (s - (q * s).sum(-1, keepdim=True)))


def test_jensen_shannon_tends_to_both_kl():
    pair = {
        "teacher_logp": log_probs(random_logits(5, 9, seed=0)),
        "student_logp": log_probs(random_logits(5, 9, seed=1)),
    }
    near_zero, near_one = JensenShannon(1e-6), JensenShannon(1 - 1e-6)
    assert_close(near_zero(**pair) / 1e-6, ForwardKL()(**pair), rtol=1e-3, atol=0)
    assert_close(near_one(**pair) / 1e-6, ReverseKL()(**pair), rtol=1e-3, atol=0)


@pytest.mark.parametrize("gamma", [1, 3, 7])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_block_efficiency_by_enumeration(alpha, gamma):
    ends = [alpha**k * (1 - alpha) * (k + 1) for k in range(gamma)]  # k accepted, then the target's own token
    assert block_efficiency(alpha, gamma) == pytest.approx(sum(ends) + alpha**gamma * (gamma + 1))
    if alpha < 1:
        assert block_efficiency(alpha, gamma) == pytest.approx((1 - alpha ** (gamma + 1)) / (1 - alpha))


def test_speed_by_hand():
    assert block_efficiency(0.7, 7) == pytest.approx(3.141, abs=1e-3)
    assert speedup(3.0, 0.1, 5) == pytest.approx(2.0)
    with pytest.raises(DataError, match="0 <= alpha <= 1 and gamma >= 1"):
        block_efficiency(1.1, 3)


def test_decoding_accepts_as_often_as_the_laws_say():
    """A target and a draft that ignore the text: every test accepts with 1 - TVD, and blocks have the closed form."""
    p, q, gamma = laws(4, 1, 5), laws(5, 1, 5), 3
    alpha = acceptance(p, q).item()
    run = speculative_generate(
        Table(p.expand(5, 5)), Table(q.expand(5, 5)), [0], gamma=gamma, max_new_tokens=2500, cached=False
    )
    assert 0.2 < alpha < 0.9
    error = math.sqrt(alpha * (1 - alpha) / run.tests)
    assert abs(sum(run.accepted) / run.tests - alpha) < 4 * error
    lengths = torch.tensor(run.accepted[:-1]).double() + 1
    error = lengths.std().item() / math.sqrt(len(lengths))
    assert abs(lengths.mean().item() - block_efficiency(alpha, gamma)) < 4 * error


# Laws in quarters: the 4^T combinations of quarters are the tree of texts with its exact weights, as equal samples.
QUARTERS = torch.tensor([c for c in itertools.product(range(5), repeat=3) if sum(c) == 4])
STOP, LONGEST = 2, 3


def tabular(seed: int, stops: bool) -> dict[tuple[int, ...], torch.Tensor]:
    """A random law in quarters after every prefix of up to two of the words 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    laws_of = QUARTERS if stops else QUARTERS[QUARTERS[:, STOP] == 0]
    prefixes = [p for n in range(LONGEST) for p in itertools.product((0, 1), repeat=n)]
    return {prefix: laws_of[int(torch.randint(len(laws_of), (), generator=generator))] / 4 for prefix in prefixes}


def all_texts(p: dict, q: dict, sampler: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """TVD(p, q) at every token of the sampler's 64 equally likely texts, and which tokens there are. [64, T] twice."""
    tvd, counted = torch.zeros(4**LONGEST, LONGEST, dtype=torch.float64), torch.zeros(4**LONGEST, LONGEST).bool()
    for row, quarters in enumerate(itertools.product(range(4), repeat=LONGEST)):
        prefix: tuple[int, ...] = ()
        for t, quarter in enumerate(quarters):
            tvd[row, t], counted[row, t] = (p[prefix] - q[prefix]).abs().sum() / 2, True
            word = int((sampler[prefix].cumsum(0) * 4 <= quarter).sum())
            if word == STOP:
                break
            prefix = (*prefix, word)
    return tvd, counted


@pytest.mark.parametrize("stops", [False, True])
def test_the_theorem_by_enumeration(stops):
    """E_x[alpha] >= sharper >= theorem on random models, two prompts each, texts of one or of varying length."""
    tight = 0
    for seed in range(40):
        models = [(tabular(4 * seed + i, stops), tabular(4 * seed + 2 + i, stops)) for i in range(2)]
        under_p = [all_texts(p, q, p) for p, q in models]
        under_q = [all_texts(p, q, q) for p, q in models]
        p_tvd, p_counted = (torch.cat(parts) for parts in zip(*under_p, strict=True))
        q_tvd, q_counted = (torch.cat(parts) for parts in zip(*under_q, strict=True))
        alpha = sequence_acceptance(p_tvd, p_counted, 64)
        lengths = p_counted.sum(1).double().view(2, 64).mean(1)
        eps = (q_tvd.sum(1) / q_counted.sum(1)).view(2, 64).mean(1).max()
        sharper, bound = sharper_bound(q_tvd, q_counted, LONGEST, lengths), theorem_bound(eps, LONGEST, lengths)
        assert alpha.mean() >= sharper - 1e-12
        assert sharper >= bound - 1e-12
        tight += bool(alpha.mean() < sharper + 0.4)
        if not stops:
            assert bound == pytest.approx(1 - LONGEST * eps.item())
    assert tight > 0  # the bound is near enough to be broken by a wrong factor


def test_sequence_quantities_by_hand():
    tvd = torch.tensor([[0.9, 0.2, 0.4, 9.0], [0.9, 0.1, 9.0, 9.0], [0.9, 0.5, 0.5, 0.2], [0.9, 0.0, 9.0, 9.0]])
    counted = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1], [0, 1, 0, 0]]).bool()
    assert_close(sequence_acceptance(tvd, counted, 2), torch.tensor([1 - 0.7 / 3, 1 - 1.2 / 4]))
    lengths = torch.tensor([1.5, 2.0])
    first = (3 * 0.2 + 2 * 0.4 + 3 * 0.1) / 2 / 1.5
    second = (3 * 0.5 + 2 * 0.5 + 1 * 0.2 + 3 * 0.0) / 2 / 2.0
    assert_close(sharper_bound(tvd, counted, 3, lengths), torch.tensor(1 - (first + second) / 2))
    assert_close(theorem_bound(0.1, 3, lengths), torch.tensor(1 - 3 * (3 / 1.5 + 3 / 2.0) / 2 * 0.1))


def test_token_tvd_does_not_see_the_micro_batch():
    target, draft = model_of(), model_of(seed=1)
    tokens = torch.randint(2, 11, (5, 6), generator=torch.Generator().manual_seed(0))
    counted = torch.rand(5, 6, generator=torch.Generator().manual_seed(1)) > 0.4
    counted[:, 0] = counted[2] = False
    batch = TokenBatch(torch.arange(5), tokens, torch.ones_like(counted), counted)
    tvd = token_tvd(target, draft, batch, temperature=0.7)
    with torch.no_grad():
        p, q = ((model.eval()(tokens) / 0.7).softmax(-1)[:, :-1] for model in (target, draft))
    by_hand = torch.nn.functional.pad((p - q).abs().sum(-1) / 2, (1, 0))
    assert_close(tvd, torch.where(counted, by_hand, 0.0))
    assert_close(token_tvd(target, draft, batch, temperature=0.7, rows=2), tvd)


def test_analytic_acceptance_agrees_with_decoding():
    target = model_of(spread=0.3)
    draft = near(target, 0.15)
    rows = [[2, 3], [4], [5, 6, 7]]
    found = analytic_acceptance(
        target, draft, [prompts_of(rows[:2]), prompts_of(rows[2:], [2])], max_new_tokens=8, samples_per_prompt=30
    )
    assert 0.3 < found["acceptance_target_texts"] < 0.95
    assert found["sequence_acceptance"] >= found["sharper_bound"] >= found["bound"]
    runs = [speculative_generate(target, draft, rows[i % 3], max_new_tokens=8, gamma=2, sample_id=i) for i in range(90)]
    tests = sum(run.tests for run in runs)
    empirical, between = sum(sum(run.accepted) for run in runs) / tests, found["acceptance_target_texts"]
    # tests are not a fair sample of positions (a rejection skips the rest of its block), so near, not equal
    assert abs(empirical - between) < 5 * math.sqrt(between * (1 - between) / tests) + 0.03
    options = {"max_new_tokens": 8, "samples_per_prompt": 30}
    for name, model in (("acceptance_target_texts", target), ("acceptance_draft_texts", draft)):
        texts = sample(model, prompts_of(rows), **options)
        tvd = token_tvd(target, draft, texts)
        assert found[name] == pytest.approx(1 - tvd[texts.counted_BT].mean().item(), abs=1e-5)
    perfect = analytic_acceptance(target, target, [prompts_of(rows)], max_new_tokens=4)
    assert perfect == pytest.approx({name: 0.0 if name == "draft_tvd" else 1.0 for name in perfect}, abs=1e-6)
    with pytest.raises(DataError, match="no prompt"):
        analytic_acceptance(target, draft, [], max_new_tokens=4)


@pytest.mark.parametrize("greedy", [True, False])
def test_decode_reports_what_the_runs_say(greedy):
    target = model_of()
    draft = near(target)
    prompts = [[2, 3], [4, 5, 6]]
    found = decode(target, draft, prompts, gamma=3, max_new_tokens=12, greedy=greedy, seed=1)
    runs = [
        speculative_generate(target, draft, p, gamma=3, max_new_tokens=12, greedy=greedy, seed=1, sample_id=i)
        for i, p in enumerate(prompts)
    ]
    tokens, calls = sum(len(r.tokens) for r in runs), sum(r.target_calls for r in runs)
    assert found["tokens"] == tokens
    assert found["block_efficiency"] == pytest.approx(tokens / calls)
    assert found["acceptance"] == pytest.approx(sum(sum(r.accepted) for r in runs) / sum(r.tests for r in runs))
    assert found["predicted_speedup"] == pytest.approx(found["block_efficiency"] / (3 * found["cost"] + 1))
    assert found["measured_speedup"] > 0
    with pytest.raises(DataError, match="no prompt"):
        decode(target, draft, [], max_new_tokens=4)


def test_transformers_assisted_generation_is_a_second_witness():
    """A perfect draft gives gamma + 1 tokens a call there too, and greedy blocks are as long as ours."""
    target = model_of(seed=4)
    target.network.generation_config.eos_token_id = None
    perfect = assisted_generation(target, near(target, 0.0), [[2, 3]], gamma=3, max_new_tokens=24)
    assert perfect["block_efficiency"] == 4.0
    draft = near(target)
    theirs = assisted_generation(target, draft, [[2, 3], [4]], gamma=3, max_new_tokens=24)
    ours = [
        speculative_generate(target, draft, p, gamma=3, max_new_tokens=24, greedy=True, stop_ids=())
        for p in ([2, 3], [4])
    ]
    assert theirs["tokens"] == 48
    assert theirs["block_efficiency"] == pytest.approx(48 / sum(run.target_calls for run in ours))
    assert theirs["block_efficiency"] < 4
    assert draft.network.generation_config.num_assistant_tokens != 3  # as it was
    sampled = assisted_generation(target, draft, [[2, 3]], gamma=3, max_new_tokens=24, greedy=False)
    assert 1 <= sampled["block_efficiency"] <= 4
    with pytest.raises(ModelError, match="different tokenizers"):
        assisted_generation(target, model_of(vocabulary=13), [[2]], max_new_tokens=4)


def test_prompts_are_needed():
    with pytest.raises(DataError, match="no prompt"):
        assisted_generation(model_of(), model_of(), [], max_new_tokens=4)


def test_prompt_batches_may_come_padded_on_the_right():
    target, draft = model_of(), model_of(seed=1)
    left = prompts_of([[2, 3, 4], [5]])
    right = PromptBatch(left.ids_B, torch.tensor([[2, 3, 4], [5, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool())
    options = {"max_new_tokens": 4, "samples_per_prompt": 2}
    found, expected = (analytic_acceptance(target, draft, [b], **options) for b in (right, left))
    assert found == pytest.approx(expected)
