"""Spans are compared with loops and with enumerations of all short texts in float64, so the identities are exact."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.divergences.inputs import rows
from torch import Tensor
from torch.testing import assert_close

from potstill.contracts.errors import ModelError
from potstill.contracts.spec import members
from potstill.divergences import (
    Exact,
    FDivergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SampledReverseKL,
    TopK,
    TotalVariation,
    kl,
    log_mass,
    log_probs,
)
from potstill.divergences.spans import Shared, complement_logp, event_divergence, span_logp
from potstill.models.alignment import align, piece_ranges

INF = math.inf
OURS = [m for _, m in sorted(members(FDivergence).items()) if m.__module__.startswith("potstill.")]
DIVERGENCES = [member() for member in OURS]


def gradient(value: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(value, z, retain_graph=True)[0]


def span_lists(most: int = 12):
    """(row, start, end) of some spans in rows of 7 tokens, in any order, also empty and overlapping."""
    span = st.tuples(st.integers(0, 2), st.integers(0, 7), st.integers(0, 7)).map(lambda s: (s[0], *sorted(s[1:])))
    return st.lists(span, max_size=most)


# --- the log-probability of a span ---


@given(span_lists())
@settings(max_examples=60, deadline=None)
def test_a_span_is_the_sum_of_its_tokens_in_value_and_gradient(spans):
    logp_BT = (-rows(3, 7, seed=0).abs()).requires_grad_()
    made = torch.tensor(spans, dtype=torch.int64).reshape(-1, 3)
    found = span_logp(logp_BT, made[:, 1:], made[:, 0])
    expected = [sum(logp_BT[b, t].item() for t in range(start, end)) for b, start, end in spans]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    weights = torch.arange(1.0, len(spans) + 1, dtype=torch.float64)
    count_BT = torch.zeros_like(logp_BT)
    for weight, (b, start, end) in zip(weights, spans):
        count_BT[b, start:end] += weight
    assert_close(gradient((weights * found).sum(), logp_BT), count_BT)


def test_one_row_needs_no_row_numbers_and_impossible_tokens_make_impossible_spans():
    logp_T = torch.tensor([0.5, 0.25, 0.0, 0.5]).log().requires_grad_()
    found = span_logp(logp_T, torch.tensor([[0, 2], [1, 3], [3, 4]]))
    assert found.tolist() == pytest.approx([math.log(0.125), -INF, math.log(0.5)])
    assert gradient(found[0] + found[2], logp_T).tolist() == [1.0, 1.0, 0.0, 1.0]
    assert span_logp(logp_T.bfloat16(), torch.tensor([[0, 2]])).dtype == torch.float32
    assert span_logp(logp_T, torch.zeros(0, 2, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize(
    ("ranges", "row", "message"),
    [
        ([[0, 2], [3, 5]], [0, 1], r"span 1 is tokens 3 to 5 of row 1, outside log-probabilities of shape \[2, 4\]"),
        ([[2, 1]], [0], "span 0 is tokens 2 to 1 of row 0"),
        ([[-1, 1]], [0], "span 0 is tokens -1 to 1 of row 0"),
        ([[0, 1]], [2], "span 0 is tokens 0 to 1 of row 2"),
        ([[0, 1]], [-1], "span 0 is tokens 0 to 1 of row -1"),
        ([[0, 1]], [0, 1], r"span_logp needs .* got \[2, 4\], \[1, 2\] and \[2\]"),
        ([[0, 1]], None, r"\(or \[T\] without rows\), got \[2, 4\]"),
    ],
)
def test_spans_outside_the_tokens_are_refused(ranges, row, message):
    row = None if row is None else torch.tensor(row)
    with pytest.raises(ModelError, match=message):
        span_logp(torch.zeros(2, 4), torch.tensor(ranges), row)


# --- a span against everything else ---


def test_the_complement_cancels_nowhere():
    """In float32, against float64 of the same numbers; 1 - exp would lose every digit at both ends."""
    logp = torch.cat([-torch.logspace(-8, 1.9, 200), torch.tensor([-math.log(2.0)])])
    exact = torch.where(logp > -0.5, torch.log(-torch.expm1(logp.double())), torch.log1p(-logp.double().exp()))
    assert_close(complement_logp(logp).double(), exact, rtol=3e-7, atol=0)
    assert_close(complement_logp(torch.tensor(0.3).log()), torch.tensor(0.7).log())


def test_the_gradient_of_the_complement():
    logp = (-torch.logspace(-6, 1, 30, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(complement_logp, (logp,), eps=1e-9, atol=1e-3, rtol=1e-3)
    assert_close(gradient(complement_logp(logp).sum(), logp), -logp.detach().exp() / -torch.expm1(logp.detach()))
    edge = torch.tensor([0.0, -INF], requires_grad=True)
    assert complement_logp(edge).tolist() == [-INF, 0.0]
    assert gradient(complement_logp(edge)[1] + complement_logp(edge)[0].exp(), edge).tolist() == [0.0, 0.0]


def test_events_by_hand():
    """Teacher 0.5, student 0.2: the direction, and the part that is not the event, can both be read off."""
    p, q = torch.tensor(0.5).log(), torch.tensor(0.2).log()
    forward = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)
    reverse = 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5)
    for d, expected in ((ForwardKL(), forward), (ReverseKL(), reverse), (TotalVariation(), 0.3)):
        assert event_divergence(d, teacher_logp=p, student_logp=q).item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_an_event_by_hand():
    """d/d log q of -p log q - (1 - p) log(1 - q) is (q - p) / (1 - q): the part that is not the event pulls too."""
    p, q = torch.tensor([0.5, 0.2]).log(), torch.tensor([0.2, 0.9]).log().requires_grad_()
    value = event_divergence(ForwardKL(), teacher_logp=p, student_logp=q)
    assert gradient(value.sum(), q).tolist() == pytest.approx([(0.2 - 0.5) / 0.8, (0.9 - 0.2) / 0.1], rel=1e-5)


def test_events_in_bfloat16_lose_only_their_input():
    p, q = torch.tensor([-0.013, -3.1]).bfloat16(), torch.tensor([-0.37, -0.0021]).bfloat16()
    found = event_divergence(ForwardKL(), teacher_logp=p, student_logp=q)
    assert found.dtype == complement_logp(p).dtype == torch.float32
    assert_close(found, event_divergence(ForwardKL(), teacher_logp=p.float(), student_logp=q.float()))


@pytest.mark.parametrize("d", [ForwardKL(), ReverseKL(), JensenShannon(0.3), TotalVariation()], ids=repr)
def test_an_event_is_the_bucketed_divergence_and_below_the_whole(d):
    """On one token: the teacher's likeliest against a bucket is TopK(1); merging outcomes adds no information."""
    both = {"teacher_logp": log_probs(rows(5, 9, seed=1)), "student_logp": log_probs(rows(5, 9, seed=2))}
    token = both["teacher_logp"].argmax(-1, keepdim=True)
    event = {name: logp.gather(-1, token).squeeze(-1) for name, logp in both.items()}
    teacher, student = TopK(1)(**both)
    found = event_divergence(d, **event)
    assert_close(found, d(teacher_logp=teacher, student_logp=student))
    assert (found < d(**both)).all()
    assert_close(event_divergence(d, teacher_logp=event["teacher_logp"], student_logp=event["teacher_logp"]), 0 * found)


def test_events_that_are_certain_or_impossible():
    certain, never, half = torch.tensor([0.0, -INF, math.log(0.5)])
    assert event_divergence(ForwardKL(), teacher_logp=certain, student_logp=half).item() == pytest.approx(math.log(2))
    assert event_divergence(ReverseKL(), teacher_logp=certain, student_logp=half).item() == INF
    assert event_divergence(ForwardKL(), teacher_logp=never, student_logp=half).item() == pytest.approx(math.log(2))
    edges = torch.tensor([0.0, -INF, 0.0, -INF, -1.0], requires_grad=True)
    value = event_divergence(
        JensenShannon(), teacher_logp=torch.tensor([0.0, -INF, -INF, 0.0, 0.0]), student_logp=edges
    )
    assert value.tolist()[:4] == pytest.approx([0.0, 0.0, math.log(2), math.log(2)])
    assert gradient(value.sum(), edges).isfinite().all()


# --- the shared vocabulary ---


@pytest.mark.parametrize("d", DIVERGENCES, ids=repr)
def test_vocabularies_that_are_the_same_give_the_ordinary_divergence(d):
    """The student numbers the teacher's tokens in another order: value and gradient are those over the tokens."""
    z, log_p, order = rows(4, 11, seed=3).requires_grad_(), log_probs(rows(4, 11, seed=4)), rows(11, seed=0).argsort()
    log_q = log_probs(z)
    whole = d(teacher_logp=log_p, student_logp=log_q)
    for k in (10, 11):  # one token alone in the rest is as good as shared
        support = Shared(teacher_K=torch.arange(11)[:k], student_K=order.argsort()[:k])
        teacher, student = support(teacher_logp=log_p, student_logp=log_q[:, order])
        found = d(teacher_logp=teacher, student_logp=student)
        assert_close(found, whole)
        assert_close(gradient(found.sum(), z), gradient(whole.sum(), z))


def test_the_rest_is_a_bucket_as_top_k_has_it():
    both = {"teacher_logp": log_probs(rows(12, seed=5)), "student_logp": log_probs(rows(12, seed=6))}
    ids = TopK(4).indices(**both)
    for mine, theirs in zip(Shared(teacher_K=ids, student_K=ids)(**both), TopK(4)(**both)):
        assert torch.equal(mine, theirs)


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.sampled_from(range(len(DIVERGENCES))), st.data())
@settings(max_examples=60, deadline=None)
def test_both_sides_stay_distributions_and_a_smaller_share_tells_less(seed, v, w, which, data):
    teacher_logp, student_logp = log_probs(rows(2, 3, v, seed=seed)), log_probs(rows(2, 3, w, seed=seed + 1))
    k = data.draw(st.integers(0, min(v, w)))
    teacher_K = torch.tensor(data.draw(st.permutations(range(v)))[:k], dtype=torch.int64)
    student_K = torch.tensor(data.draw(st.permutations(range(w)))[:k], dtype=torch.int64)
    values = []
    for size in range(k + 1):
        support = Shared(teacher_K=teacher_K[:size], student_K=student_K[:size])
        p, q = support(teacher_logp=teacher_logp, student_logp=student_logp)
        assert p.shape == q.shape == (2, 3, size + 1)
        for mine, given_logp, ids in ((p, teacher_logp, teacher_K[:size]), (q, student_logp, student_K[:size])):
            assert_close(log_mass(mine), torch.zeros(2, 3, dtype=torch.float64), atol=1e-12, rtol=0)
            assert torch.equal(mine[..., :-1], given_logp[..., ids])
        values.append(kl(p, q))
    assert (values[0].abs() < 1e-12).all()  # nothing shared, nothing to compare
    assert all((coarse <= fine + 1e-12).all() for coarse, fine in itertools.pairwise(values))


def test_shared_outcomes_by_hand_with_the_gradient():
    """Teacher (a .5, b .2, c .3), student (x .1, b .4, a .25, y .25): a and b are shared, the rest is .3 and .35."""
    p, q = torch.tensor([0.5, 0.2, 0.3]).log(), torch.tensor([0.1, 0.4, 0.25, 0.25]).double().log().requires_grad_()
    support = Shared(teacher_K=torch.tensor([0, 1]), student_K=torch.tensor([2, 1]))
    teacher, student = support(teacher_logp=p, student_logp=q)
    assert_close(teacher.exp(), torch.tensor([0.5, 0.2, 0.3]))
    assert_close(student.exp(), torch.tensor([0.25, 0.4, 0.35]).double())
    value = Exact(ForwardKL(), support).per_position(p, q, torch.tensor([0]))
    expected = 0.5 * math.log(2) + 0.2 * math.log(0.5) + 0.3 * math.log(0.3 / 0.35)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    split = [-0.3 * 0.1 / 0.35, -0.2, -0.5, -0.3 * 0.25 / 0.35]  # the bucket pulls its members by their share
    assert gradient(value, q).tolist() == pytest.approx(split, rel=1e-6)


def test_the_rest_of_an_almost_certain_row_survives_float32_and_certain_rows_have_gradients():
    ids = {"teacher_K": torch.tensor([0]), "student_K": torch.tensor([0])}
    logits = torch.tensor([0.0, -25.0, -25.0])
    teacher, student = Shared(**ids)(teacher_logp=log_probs(logits), student_logp=log_probs(logits).bfloat16())
    assert teacher[-1].item() == pytest.approx(-25 + math.log(2), rel=1e-6)
    assert student.dtype == torch.float32
    z = torch.tensor([[0.0, -INF, -INF], [-INF, 0.0, 0.0]], requires_grad=True)
    teacher, student = Shared(**ids)(teacher_logp=log_probs(z.detach().flip(0)), student_logp=log_probs(z))
    value = JensenShannon()(teacher_logp=teacher, student_logp=student)
    assert value.tolist() == pytest.approx([math.log(2)] * 2)
    assert gradient(value.sum(), z).isfinite().all()


def test_shares_that_cannot_be_are_refused():
    two, three, twice = torch.tensor([0, 1]), torch.tensor([0, 1, 2]), torch.tensor([1, 1])
    with pytest.raises(ModelError, match=r"pairs K ids of the teacher with K of the student, got \[2\] and \[3\]"):
        Shared(teacher_K=two, student_K=three)
    with pytest.raises(ModelError, match="an id of the student stands twice"):
        Shared(teacher_K=two, student_K=twice)
    with pytest.raises(ModelError, match="an id of the teacher stands twice"):
        Shared(teacher_K=twice, student_K=two)
    support = Shared(teacher_K=torch.tensor([5]), student_K=torch.tensor([1]))
    with pytest.raises(ModelError, match="the teacher's rows have 5 outcomes, but ids go up to 5"):
        support(teacher_logp=torch.zeros(5), student_logp=torch.zeros(9))
    assert repr(support) == "Shared(1 outcomes)"


# --- two vocabularies: letters, and the same with "ab" merged ---

LETTERS = "abc$"  # $ ends a text


def coarse(text: str) -> list[str]:
    """The tokens of the merged vocabulary: "ab" wherever it stands."""
    return [t for part in text.split("ab") for t in ["ab", *part]][1:]


def letter_logp(log_q: Tensor, text: str) -> Tensor:
    """log q of each letter of a text, after the one before; the last row of log_q [4 + 1, 4] is the start."""
    before = [-1, *(LETTERS.index(c) for c in text[:-1])]
    return torch.stack([log_q[b, LETTERS.index(c)] for b, c in zip(before, text)])


def merged_logp(log_q: Tensor, text: str) -> Tensor:
    """log p of each merged token, for the merged model that gives every text the probability that the letters give it.

    q(ab) is one outcome, so that "a" says "and no b", and what follows an "a" has its probability given no b.
    """
    a, b, out, before = LETTERS.index("a"), LETTERS.index("b"), [], -1
    for token in coarse(text):
        no_b = torch.log1p(-log_q[a, b].exp())
        logp = log_q[before, LETTERS.index(token[0])] - (no_b if before == a else 0.0)
        if token[0] == "a":
            logp = logp + (log_q[a, b] if token == "ab" else no_b)
        out.append(logp)
        before = LETTERS.index(token[-1])
    return torch.stack(out)


def texts(longest: int = 4) -> list[str]:
    return ["".join(w) + "$" for n in range(longest + 1) for w in itertools.product("abc", repeat=n)]


def aligned(text: str):
    teacher = piece_ranges(text, [t.encode() for t in coarse(text)])
    return align(text, teacher=teacher, student=piece_ranges(text, [c.encode() for c in text]))


def test_a_merged_vocabulary_with_hand_computed_spans():
    """Letters: q(a) = 0.5, q(b | a) = 0.8. Merged teacher: p(ab) = 0.3, then p(c) = 0.1. Text "abc"."""
    q_T, p_T = torch.tensor([0.5, 0.8, 0.25]).double().log(), torch.tensor([0.3, 0.1]).double().log()
    spans = align("abc", teacher=[(0, 2), (2, 3)], student=[(0, 1), (1, 2), (2, 3)])
    student, teacher = span_logp(q_T, spans.student_N2), span_logp(p_T, spans.teacher_N2)
    assert student.exp().tolist() == pytest.approx([0.4, 0.25])
    assert teacher.exp().tolist() == pytest.approx([0.3, 0.1])
    found = event_divergence(ForwardKL(), teacher_logp=teacher, student_logp=student)
    by_hand = [
        0.3 * math.log(0.3 / 0.4) + 0.7 * math.log(0.7 / 0.6),
        0.1 * math.log(0.1 / 0.25) + 0.9 * math.log(0.9 / 0.75),
    ]
    assert found.tolist() == pytest.approx(by_hand)
    k3 = ReverseKL().estimate(teacher - student)
    assert k3.tolist() == pytest.approx([r - 1 - math.log(r) for r in (0.75, 0.4)])
    assert SampledReverseKL().surrogate(teacher_logp=teacher, student_logp=student).tolist() == pytest.approx(
        [-math.log(0.75) * math.log(0.4), -math.log(0.4) * math.log(0.25)]
    )


def test_the_merged_model_is_one_and_gives_every_text_the_same_probability():
    """So that what the next test calls exact and approximate is about spans, not about the construction."""
    log_q = log_probs(rows(5, 4, seed=8))
    for before in ("", "b", "a"):  # all next tokens after a "c" or the start, a "b" or "ab", and a lone "a"
        after = {t: before + t for t in ("a", "ab", "b", "c", "$") if before + t != "ab" or t == "ab"}
        total = sum(
            merged_logp(log_q, text)[-1].exp() for text in after.values() if coarse(text)[-1] == text[len(before) :]
        )
        assert total.item() == pytest.approx(1.0, abs=1e-12)
    for text in texts():
        assert merged_logp(log_q, text).sum().item() == pytest.approx(letter_logp(log_q, text).sum().item(), abs=1e-12)


def test_what_is_exact_and_what_is_not():
    """Two models that agree on every text: the log-ratios of the spans cancel over a text, and single ones need not be 0.

    "ab" is exact. A lone "a" is off by log(1 - q(b | a)), which the merged token says already, and the span after it by
    the same the other way.
    """
    log_q = log_probs(rows(5, 4, seed=8))
    no_b = torch.log1p(-log_q[0, 1].exp()).item()
    seen = set()
    for text in texts():
        spans = aligned(text)
        student = span_logp(letter_logp(log_q, text), spans.student_N2)
        teacher = span_logp(merged_logp(log_q, text), spans.teacher_N2)
        ratio = (teacher - student).tolist()
        assert sum(ratio) == pytest.approx(0.0, abs=1e-12)
        tokens = coarse(text)
        for token, before, found in zip(tokens, ["", *tokens], ratio, strict=False):
            expected = (no_b if token == "a" else 0.0) - (no_b if before == "a" else 0.0)
            assert found == pytest.approx(expected, abs=1e-12)
            seen.add((token, before))
    assert {("ab", ""), ("ab", "a"), ("a", "a"), ("c", "a")} <= seen
    event = event_divergence(
        ForwardKL(), teacher_logp=merged_logp(log_q, "ab")[:1], student_logp=log_q[-1, :1] + log_q[0, 1]
    )
    assert event.item() == pytest.approx(0.0, abs=1e-12)


def test_the_sampled_gradient_of_whole_texts_is_that_of_the_reverse_kl():
    """Over all texts of two letters with their probabilities: sum of spans = text, whatever the segmentations.

    Leaving out what a span cannot change, the spans before it, is right for letters. Merged, "a" and "ab" differ in what
    comes next, so that a little is lost.
    """
    z, log_p = rows(5, 4, seed=9).requires_grad_(), log_probs(rows(5, 4, seed=10))
    log_q = log_probs(z.index_fill(1, torch.tensor([3]), -INF))  # no text ends early
    for merged in (True, False):
        whole = onward = divergence = torch.zeros(())
        for text in ("".join(w) for w in itertools.product("abc", repeat=2)):
            spans = aligned(text)
            letters = letter_logp(log_q, text)
            student = span_logp(letters, spans.student_N2) if merged else letters
            teacher = span_logp(merged_logp(log_p, text), spans.teacher_N2) if merged else letter_logp(log_p, text)
            q, ratio = letters.sum().exp(), (teacher - student).detach()
            assert_close(SampledReverseKL().advantage(teacher, student), ratio)
            whole = whole - q.detach() * ratio.sum() * student.sum()
            onward = onward - q.detach() * (ratio.flip(0).cumsum(0).flip(0) * student).sum()
            divergence = divergence + q * (student.sum() - teacher.sum())
        exact = gradient(divergence, z)
        assert exact.abs().max() > 1e-2
        assert_close(gradient(whole, z), exact, atol=1e-12, rtol=0)
        lost = (gradient(onward, z) - exact).abs().max()
        assert lost > 1e-3 if merged else lost < 1e-12


def test_one_tokenizer_on_both_sides_gives_the_divergence_of_its_tokens():
    """Spans are tokens: the shared rows give the whole divergence, the span log-probs the sampled one."""
    log_p, log_q = log_probs(rows(3, 4, seed=11)), log_probs(rows(3, 4, seed=12))
    tokens_T = torch.tensor([0, 2, 1])
    spans = align("acb", teacher=[(0, 1), (1, 2), (2, 3)], student=[(0, 1), (1, 2), (2, 3)])
    assert spans.single_N.all()
    support = Shared(teacher_K=torch.arange(4), student_K=torch.arange(4))
    at = spans.student_N2[:, 0]
    assert_close(Exact(ReverseKL(), support).per_position(log_p[at], log_q[at], tokens_T), kl(log_q, log_p))
    pick = lambda logp: span_logp(logp.gather(-1, tokens_T[:, None]).squeeze(-1), spans.student_N2)
    on_tokens = SampledReverseKL().per_position(log_p, log_q, tokens_T)
    assert_close(SampledReverseKL().surrogate(teacher_logp=pick(log_p), student_logp=pick(log_q)), on_tokens)
