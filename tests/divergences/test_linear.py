"""The fused divergence is the plain one: values, totals and every gradient, for the whole family and every teacher."""

import math
import warnings

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from potstill.contracts.errors import ModelError, RecipeError, SignalError
from potstill.contracts.signals import FullLogits, HiddenAndHead, TokenLogp, TopKLogp
from potstill.divergences import (
    Adaptive,
    Alpha,
    Clipped,
    EntropyGated,
    Estimator,
    Exact,
    FDivergence,
    ForwardKL,
    Full,
    Jeffreys,
    JensenShannon,
    Mixture,
    NeymanChi2,
    PearsonChi2,
    ReverseKL,
    SampledReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SoftenedReverseKL,
    SquaredHellinger,
    TopK,
    TotalVariation,
    entropy,
    linear_divergence,
    log_probs,
    tail_logp,
)
from potstill.divergences import linear as module

FAMILY = [
    ForwardKL(),
    ReverseKL(),
    JensenShannon(0.5),
    JensenShannon(0.1),
    SkewForwardKL(0.1),
    SkewReverseKL(0.1),
    Alpha(0.3),
    TotalVariation(),
    SquaredHellinger(),
    PearsonChi2(),
    NeymanChi2(),
    Jeffreys(),
    SoftenedReverseKL(),
    Mixture(ForwardKL(), ReverseKL(), 0.3),
    EntropyGated(),
    Clipped(ForwardKL(), 0.02),
    Clipped(ForwardKL(), 0.5, per="position"),
    Adaptive(),
]
SUPPORTS = [
    Full(),
    *(
        TopK(4, of=of, tail=tail)
        for of in ("teacher", "student", "union")
        for tail in ("bucket", "renormalize", "drop")
    ),
]
N, V, DS, DT = 13, 29, 5, 7


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Case:
    """Hidden states, heads and tokens of both, and the plain way from them to log-probabilities."""

    def __init__(self, dtype: torch.dtype = torch.float64, **bend: float | None) -> None:
        self.hidden, self.head = draw(N, DS, seed=0, dtype=dtype), draw(V, DS, seed=1, dtype=dtype)
        self.bias = draw(V, seed=2, dtype=dtype)
        self.leaves = [x.requires_grad_() for x in (self.hidden, self.head, self.bias)]
        self.teacher = HiddenAndHead(
            draw(N, DT, seed=3, dtype=dtype), draw(V, DT, seed=4, dtype=dtype), draw(V, seed=5, dtype=dtype),
            bend.get("scale", 1.0), bend.get("softcap"),
        )  # fmt: skip
        self.bend = bend
        self.weights = draw(N, seed=6).abs()
        self.weights[::4] = 0
        self.tokens = torch.arange(N) % V

    def logits(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        return tuple(
            log_probs(bent(h @ w.T + b, **self.bend), temperature)
            for h, w, b in (
                (self.teacher.hidden_ND, self.teacher.head_VD, self.teacher.bias_V),
                (self.hidden, self.head, self.bias),
            )
        )

    def fused(self, divergence: FDivergence | Estimator, **options) -> module.LinearDivergence:
        defaults = {
            "teacher": self.teacher,
            "weights": self.weights,
            "student_bias": self.bias,
            "student_scale": self.bend.get("scale", 1.0),
            "student_softcap": self.bend.get("softcap"),
            "chunk": 4,
        }
        return linear_divergence(divergence, self.hidden, self.head, **(defaults | options))


def bent(logits: Tensor, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    logits = logits * scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def gradients(total: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("support", SUPPORTS, ids=repr)
@pytest.mark.parametrize("divergence", FAMILY, ids=repr)
def test_it_is_the_plain_divergence(divergence, support):
    case = Case()
    log_p, log_q = case.logits(1.7)
    teacher, student = support(teacher_logp=log_p, student_logp=log_q)
    value = divergence(teacher_logp=teacher, student_logp=student)
    plain = (case.weights * value).sum()
    out = case.fused(divergence, support=support, temperature=1.7, tokens=case.tokens)
    live = case.weights > 0
    assert_close(out.values, torch.where(live, value, 0.0))
    assert_close(out.total, plain)
    assert_close(out.count, case.weights.sum())
    assert_close(gradients(out.total, case.leaves), gradients(plain, case.leaves))
    at = torch.arange(N), case.tokens
    for got, expected in (
        (out.student_entropy, entropy(log_q)),
        (out.teacher_entropy, entropy(log_p)),
        (out.student_logp, log_q[at]),
        (out.teacher_logp, log_p[at]),
    ):
        assert not got.requires_grad
        assert_close(got, torch.where(live, expected, 0.0))


@pytest.mark.parametrize("bend", [{"scale": 0.0625}, {"softcap": 1.5}, {"scale": 0.5, "softcap": 2.0}], ids=repr)
@pytest.mark.parametrize("teacher", ["hidden", "logits"])
def test_scaled_and_soft_capped_heads(bend, teacher):
    case = Case(**bend)
    log_p, log_q = case.logits(0.8)
    plain = (case.weights * JensenShannon(0.2)(teacher_logp=log_p, student_logp=log_q)).sum()
    given = {} if teacher == "hidden" else {"teacher": FullLogits(log_p * 0.8)}
    out = case.fused(JensenShannon(0.2), temperature=0.8, **given)
    assert_close(out.total, plain)
    assert_close(gradients(out.total, case.leaves), gradients(plain, case.leaves))


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon(0.3), SquaredHellinger(), Jeffreys()], ids=repr)
def test_a_teacher_that_gives_its_top_k(divergence, tail):
    case = Case()
    log_p, log_q = case.logits()
    known, ids = log_p.detach().topk(4, -1)
    teacher, student = TopK(4, tail=tail)(teacher_logp=log_p.detach(), student_logp=log_q)
    value = divergence(teacher_logp=teacher, student_logp=student)
    plain = (case.weights * value).sum()
    out = case.fused(divergence, teacher=TopKLogp(known, ids), support=TopK(4, tail=tail), tokens=case.tokens)
    assert_close(out.values, torch.where(case.weights > 0, value, 0.0))
    assert_close(gradients(out.total, case.leaves), gradients(plain, case.leaves))
    assert out.teacher_logp is None
    bucketed = torch.cat([known, tail_logp(known)[:, None]], -1)
    if tail == "renormalize":  # only the kept logits of the student exist
        assert out.student_entropy is None and out.student_logp is None
        bucketed = known
    assert_close(out.teacher_entropy, torch.where(case.weights > 0, entropy(bucketed), 0.0))


def test_of_a_teachers_top_outcomes_the_support_may_keep_fewer():
    case = Case()
    log_p = case.logits()[0].detach()
    shuffled = log_p.topk(7, -1).indices.flip(-1)
    known = TopKLogp(log_p.gather(-1, shuffled), shuffled)
    few = case.fused(JensenShannon(), teacher=known, support=TopK(3))
    same = case.fused(JensenShannon(), support=TopK(3))
    assert_close(few.values, same.values)
    more = case.fused(JensenShannon(), teacher=known, support=TopK(100))  # it has no more to give
    assert_close(more.values, case.fused(JensenShannon(), support=TopK(7)).values)
    with pytest.raises(SignalError, match=r"its own top k alone, and TopK.of is 'union'"):
        case.fused(JensenShannon(), teacher=known, support=TopK(3, of="union"))


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL()], ids=repr)
def test_a_teacher_that_gives_all_outcomes_leaves_no_tail(divergence):
    case = Case(dtype=torch.float32)
    every = TopKLogp(*case.logits()[0].detach().topk(V, -1))
    assert_close(case.fused(divergence, teacher=every).values, case.fused(divergence).values)


@pytest.mark.parametrize("baseline", ["none", "full", "topk"])
def test_estimators_look_at_tokens(baseline):
    case = Case()
    estimator = SampledReverseKL(baseline=baseline, k=5)
    log_p, log_q = case.logits()
    sampled = log_q.detach()[torch.arange(N), case.tokens] - 0.3
    plain = (case.weights * estimator.per_position(log_p.detach(), log_q, case.tokens, sampled)).sum()
    out = case.fused(estimator, tokens=case.tokens, sampled_logp=sampled)
    assert_close(out.total, plain)
    assert_close(gradients(out.total, case.leaves), gradients(plain, case.leaves))


def entropy_weight(row: module.RowStatistics) -> Tensor:
    return 1 + row.student_entropy + (row.teacher_logp - row.student_logp).abs()


def test_weights_that_the_row_gives_are_not_differentiated():
    case = Case()
    log_p, log_q = case.logits()
    at = torch.arange(N), case.tokens
    weight = (1 + entropy(log_q) + (log_p - log_q)[at].abs()).detach()
    value = ReverseKL()(teacher_logp=log_p, student_logp=log_q)
    plain = (weight * value).sum()
    out = case.fused(ReverseKL(), weights=entropy_weight, tokens=case.tokens)
    assert_close(out.total, plain)
    assert_close(out.count, weight.sum())
    assert_close(gradients(out.total, case.leaves), gradients(plain, case.leaves))


@pytest.mark.parametrize("teacher", ["hidden", "top-k"])
def test_another_divergence_looked_at_on_the_way(teacher):
    case = Case()
    log_p, log_q = case.logits()
    support = Full() if teacher == "hidden" else TopK(4)
    given = {"teacher": TopKLogp(*log_p.topk(4, -1))} if teacher == "top-k" else {}
    pair = dict(zip(("teacher_logp", "student_logp"), support(teacher_logp=log_p, student_logp=log_q), strict=True))
    plain = JensenShannon()(**pair).sum()
    out = case.fused(JensenShannon(), weights=None, support=support, also=(SquaredHellinger(),), **given)
    assert_close(out.also[:, 0], SquaredHellinger()(**pair).detach())
    assert not out.also.requires_grad
    assert_close(gradients(out.total, case.leaves), gradients(plain, case.leaves))
    whole = ReverseKL()(teacher_logp=log_p, student_logp=log_q).detach()
    if teacher == "hidden":  # whatever the support of what is differentiated
        assert_close(case.fused(JensenShannon(), weights=None, support=TopK(3), also=(ReverseKL(),)).also[:, 0], whole)
    sampled = case.fused(SampledReverseKL(), weights=None, tokens=case.tokens, also=(ReverseKL(),))
    assert_close(sampled.also[:, 0], whole)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(frozen):
    case = Case()
    wanted = [x for i, x in enumerate(case.leaves) if i != frozen]
    expected = gradients(case.fused(ForwardKL()).total, wanted)
    case.leaves[frozen].requires_grad_(False)
    assert_close(gradients(case.fused(ForwardKL()).total, wanted), expected)


def test_without_gradient_nothing_is_made(monkeypatch):
    case = Case()
    expected = case.fused(ForwardKL()).total.detach()
    monkeypatch.setattr(module._Product, "back", lambda *a: pytest.fail("a product for nothing"))
    with torch.no_grad():
        assert_close(case.fused(ForwardKL()).total, expected)


def test_differentiable_values():
    """A loss that bends the values: sum_n sqrt(1 + D_n), which no weight known beforehand can give."""
    case = Case()
    log_p, log_q = case.logits()
    plain = (1 + JensenShannon()(teacher_logp=log_p, student_logp=log_q)).sqrt().sum()
    out = case.fused(JensenShannon(), weights=None, differentiable_values=True)
    loss = (1 + out.values).sqrt().sum()
    assert_close(loss, plain)
    assert_close(gradients(loss, case.leaves), gradients(plain, case.leaves))


def test_differentiable_values_give_the_same_total():
    case = Case()
    once, again = case.fused(ForwardKL()), case.fused(ForwardKL(), differentiable_values=True)
    assert_close(once.total, again.total)
    assert_close(once.count, again.count)
    assert_close(gradients(once.total, case.leaves), gradients(again.total, case.leaves))


@pytest.mark.parametrize("chunk", [1, 3, 13, 100, None])
def test_chunks_change_nothing(chunk):
    case = Case()
    expected, got = case.fused(JensenShannon()), case.fused(JensenShannon(), chunk=chunk)
    assert_close(got.values, expected.values)
    assert_close(gradients(got.total, case.leaves), gradients(expected.total, case.leaves))


def test_positions_of_weight_zero_are_not_looked_at():
    case = Case()
    expected = case.fused(ForwardKL())
    gradient = gradients(expected.total, case.leaves)
    with torch.no_grad():
        case.hidden[case.weights == 0] = math.nan
    out = case.fused(ForwardKL())
    assert_close(out.total, expected.total)
    got = gradients(out.total, case.leaves)
    assert_close(got, gradient)
    assert (got[0][case.weights == 0] == 0).all()


def test_no_position_counts():
    case = Case()
    out = case.fused(ForwardKL(), weights=torch.zeros(N))
    assert out.total == 0 and out.count == 0 and (out.values == 0).all()
    assert all((g == 0).all() for g in gradients(out.total, case.leaves))
    empty = linear_divergence(ForwardKL(), case.hidden[:0], case.head, teacher=FullLogits(torch.zeros(0, V)))
    assert empty.values.shape == (0,) and empty.total == 0


def test_padded_vocabularies_are_impossible_tokens():
    """20 tokens exist; both heads are padded, to 29 and 32 rows, and what stands in the padding is no mass."""
    case = Case()
    wide = HiddenAndHead(
        case.teacher.hidden_ND, torch.cat([case.teacher.head_VD, 9 * torch.ones(3, DT).double()]), None
    )
    log_p = log_probs(wide.hidden_ND @ wide.head_VD[:20].T)
    log_q = log_probs(case.hidden @ case.head[:20].T)
    plain = JensenShannon()(teacher_logp=log_p, student_logp=log_q).sum()
    out = linear_divergence(JensenShannon(), case.hidden, case.head, teacher=wide, vocabulary=20)
    assert_close(out.total, plain)
    got = gradients(out.total, case.leaves[:2])
    assert_close(got, gradients(plain, case.leaves[:2]))
    assert (got[1][20:] == 0).all()
    logits = FullLogits(wide.hidden_ND @ wide.head_VD.T)
    assert_close(linear_divergence(JensenShannon(), case.hidden, case.head, teacher=logits, vocabulary=20).total, plain)


def test_shapes_of_positions_are_kept():
    case = Case()
    hidden, teacher = case.hidden[:12].reshape(3, 4, DS), case.teacher.hidden_ND[:12].reshape(3, 4, DT)
    out = linear_divergence(ForwardKL(), hidden, case.head, teacher=HiddenAndHead(teacher, case.teacher.head_VD))
    flat = linear_divergence(
        ForwardKL(), hidden.flatten(0, 1), case.head, teacher=HiddenAndHead(teacher.flatten(0, 1), case.teacher.head_VD)
    )
    assert out.values.shape == out.student_entropy.shape == (3, 4)
    assert_close(out.values.flatten(), flat.values)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_infinite_values_stay_infinite_and_gradients_finite(softcap):
    """A certain teacher: the forward KL is finite with finite gradients, the reverse KL infinite."""
    case = Case()
    certain = FullLogits(torch.full((N, V), -math.inf).index_put((torch.arange(N), case.tokens), torch.zeros(N)))
    out = case.fused(ForwardKL(), teacher=certain, weights=None, student_softcap=softcap)
    log_q = log_probs(bent(case.hidden @ case.head.T + case.bias, softcap=softcap))
    assert_close(out.values, -log_q[torch.arange(N), case.tokens])
    assert all(g.isfinite().all() for g in gradients(out.total, case.leaves))
    assert case.fused(ReverseKL(), teacher=certain, weights=None).values.isinf().all()


@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon(), TotalVariation()], ids=repr)
def test_bfloat16(divergence):
    """Half the digits in, float32 inside: as good as the same numbers in float64, up to the rounding of the results."""
    low, high = Case(torch.bfloat16), Case(torch.bfloat16)
    high.__dict__.update({k: getattr(low, k).detach().double() for k in ("hidden", "head", "bias")})
    high.leaves = [x.requires_grad_() for x in (high.hidden, high.head, high.bias)]
    t = low.teacher
    high.teacher = HiddenAndHead(t.hidden_ND.double(), t.head_VD.double(), t.bias_V.double())
    got, expected = low.fused(divergence), high.fused(divergence)
    assert got.values.dtype == torch.float32
    assert_close(got.values.double(), expected.values, rtol=2e-5, atol=1e-6)
    for g, e in zip(gradients(got.total, low.leaves), gradients(expected.total, high.leaves), strict=True):
        assert g.dtype == torch.bfloat16
        assert_close(g.double(), e, rtol=1e-2, atol=1e-2 * e.abs().max().item())


def test_a_processor_that_is_slow_in_low_precision_multiplies_tiles(monkeypatch):
    case = Case(torch.bfloat16)
    monkeypatch.setattr(module, "fast_in_low", lambda: False)
    monkeypatch.setattr(module, "TILE", 4 * DS)
    tiles = case.fused(JensenShannon())
    assert_close(tiles.total, Case(torch.bfloat16).fused(JensenShannon()).total, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(module, "TILE", 2**22)
    assert_close(gradients(tiles.total, case.leaves), gradients(case.fused(JensenShannon()).total, case.leaves))


def test_many_chunks_do_not_stall_in_low_precision(monkeypatch):
    """600 equal positions, one a chunk, multiplied in bfloat16: added up in bfloat16 they would stop growing at 256."""
    monkeypatch.setattr(module, "fast_in_low", lambda: True)
    case = Case(torch.bfloat16)
    hidden, theirs, table = case.hidden[:1].detach(), case.teacher.hidden_ND[:1], case.teacher.head_VD
    many = HiddenAndHead(theirs.expand(600, -1), table)
    total = linear_divergence(ForwardKL(), hidden.expand(600, -1), case.head, teacher=many, chunk=1).total
    log_p, log_q = log_probs(theirs.float() @ table.float().T), log_probs(hidden.float() @ case.head.float().T)
    (expected,) = gradients(ForwardKL()(teacher_logp=log_p, student_logp=log_q).sum(), [case.head])
    (got,) = gradients(total, [case.head])
    assert_close(got.float(), 600 * expected.float(), rtol=0.05, atol=0.05 * 600 * expected.abs().max().item())


def test_gradcheck():
    """Of the values' backward pass; the gradient that is made once is held against it, since gradcheck asks twice."""
    case = Case()
    options = {"teacher": case.teacher, "chunk": 4}

    def values(hidden: Tensor, head: Tensor, bias: Tensor) -> Tensor:
        part = JensenShannon(0.3)
        return linear_divergence(part, hidden, head, student_bias=bias, differentiable_values=True, **options).values

    assert torch.autograd.gradcheck(values, tuple(case.leaves))
    once = linear_divergence(JensenShannon(0.3), case.hidden, case.head, student_bias=case.bias, **options)
    assert_close(gradients(once.total, case.leaves), gradients(values(*case.leaves).sum(), case.leaves))


def test_the_gradient_scales_and_is_used_once():
    case = Case()
    expected = gradients(case.fused(ForwardKL()).total, case.leaves)
    total = case.fused(ForwardKL()).total
    got = torch.autograd.grad(2.5 * total, case.leaves, retain_graph=True)
    assert_close(list(got), [2.5 * e for e in expected])
    with pytest.raises(ModelError, match="a second backward pass needs a second call, or differentiable_values=True"):
        torch.autograd.grad(total, case.leaves)


@pytest.mark.parametrize("again", [False, True])
def test_double_backward_is_refused(again):
    case = Case()
    out = case.fused(ForwardKL(), differentiable_values=again)
    with pytest.raises(ModelError, match="cannot be differentiated twice"):
        torch.autograd.grad(out.total, [case.hidden], create_graph=True)


def test_differentiable_values_may_be_differentiated_twice_over():
    case = Case()
    out = case.fused(ForwardKL(), differentiable_values=True)
    first = torch.autograd.grad(out.total, case.leaves, retain_graph=True)
    assert_close(list(torch.autograd.grad(out.total, case.leaves)), list(first))


def test_the_heads_gradient_can_go_straight_where_it_belongs():
    case, plain = Case(), Case()
    (0.25 * plain.fused(ForwardKL()).total).backward()
    case.head.grad = torch.ones_like(case.head)
    there = case.head.grad.data_ptr()
    out = case.fused(ForwardKL(), grad_scale=0.25)
    assert_close(out.total, plain.fused(ForwardKL()).total)
    assert_close(out.count, case.weights.sum())
    (0.25 * out.total).backward()
    assert case.head.grad.data_ptr() == there
    assert_close(case.head.grad, 1 + plain.head.grad)
    assert_close(case.hidden.grad, plain.hidden.grad)
    assert_close(case.bias.grad, plain.bias.grad)


def test_another_factor_than_announced_is_refused():
    case = Case()
    case.head.grad = torch.zeros_like(case.head)
    with pytest.raises(ModelError, match="factor 0.25 in the loss, and it has 0.5"):
        (0.5 * case.fused(ForwardKL(), grad_scale=0.25).total).backward()


def test_tied_heads_add_up():
    """An embedding that is also the head gets both gradients."""
    case = Case()
    table = draw(V, DS, seed=1).requires_grad_()
    log_p = log_probs(case.teacher.hidden_ND @ case.teacher.head_VD.T + case.teacher.bias_V)
    plain = ForwardKL()(teacher_logp=log_p, student_logp=log_probs(table[case.tokens] @ table.T)).sum()
    fused = linear_divergence(ForwardKL(), table[case.tokens], table, teacher=case.teacher).total
    assert_close(gradients(fused, [table]), gradients(plain, [table]))


def test_autocast_leaves_it_exact():
    case = Case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.fused(ForwardKL())
    assert out.values.dtype == torch.float32
    tolerance = {"rtol": 0.05, "atol": 0.05} if module.fast_in_low() else {}
    assert_close(out.total, case.fused(ForwardKL()).total, **tolerance)
    assert all(g.dtype == torch.float32 for g in gradients(out.total, case.leaves))


def test_a_missing_compiler_is_said(monkeypatch):
    def broken(*args, **kwargs):
        def call(*inputs):
            raise RuntimeError("no C++ compiler here")

        return call

    module._row_function.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    case = Case()
    with pytest.warns(UserWarning, match="goes on without torch.compile: no C"):
        out = case.fused(ForwardKL(), compiled=True)
    assert_close(out.total, Case().fused(ForwardKL()).total)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        case.fused(ForwardKL(), compiled=True)
    module._row_function.cache_clear()


def test_compiled_is_the_same():
    """Two members and the tokens' log-probabilities through the real compiler, with a block that the rows do not fill."""
    for divergence in (JensenShannon(0.2), TotalVariation()):
        case, fused = Case(torch.float32), Case(torch.float32)
        plain = case.fused(divergence, tokens=case.tokens, chunk=12)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            out = fused.fused(divergence, tokens=case.tokens, compiled=True, chunk=12)
        for name in ("total", "values", "student_entropy", "teacher_logp"):
            assert_close(getattr(out, name), getattr(plain, name), rtol=1e-4, atol=1e-5)
        for g, e in zip(gradients(out.total, fused.leaves), gradients(plain.total, case.leaves), strict=True):
            assert_close(g, e, rtol=1e-4, atol=1e-5)


def test_teachers_get_no_gradient():
    case = Case()
    head = case.teacher.head_VD.requires_grad_()
    case.fused(ForwardKL()).total.backward()
    assert head.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": HiddenAndHead(torch.zeros(N, 3), torch.zeros(V, 4))}, r"teacher's hidden states \[13, 3\] do not fit"),
        ({"teacher": HiddenAndHead(torch.zeros(N, 3), torch.zeros(V + 3, 3))}, r"29 rows, the teacher's 32.*vocabulary="),
        ({"teacher": FullLogits(torch.zeros(N - 1, V))}, r"positions \[13\], the teacher \[12\]"),
        ({"teacher": TokenLogp(torch.zeros(N))}, "needs HiddenAndHead, FullLogits or TopKLogp of the teacher, got TokenLogp"),
        ({"teacher": TopKLogp(torch.zeros(N, 3), torch.zeros(N, 2).long())}, "differ in shape"),
        ({"weights": torch.ones(N - 1)}, r"weights has shape \[12\], but the positions are \[13\]"),
        ({"tokens": torch.zeros(N, 1).long()}, r"tokens has shape \[13, 1\]"),
        ({"student_bias": torch.zeros(3)}, r"student's bias \[3\] does not fit"),
        ({"vocabulary": 40}, "vocabulary 40 does not lie between 1 and the heads' 29 rows"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"differentiable_values": True, "weights": entropy_weight}, "Multiply the values by your weights yourself"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(options, message):
    with pytest.raises((ModelError, SignalError, RecipeError), match=message):
        Case().fused(ForwardKL(), **options)


def test_an_estimator_has_its_own_support():
    with pytest.raises(RecipeError, match="give `support` to Exact"):
        Case().fused(Exact(ForwardKL()), support=TopK(3))
