"""Contexts that agree, contrast and features: against closed forms, and neutral where they must be."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import RecipeError, SignalError
from potstill.contracts.players import OptimizerSpec
from potstill.contracts.signals import FullLogits, HiddenAndHead, TokenLogp
from potstill.divergences import Clipped, ForwardKL, ReverseKL, SampledReverseKL
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.agreement import ContextDistillation, ContrastiveTerm, FeatureTerm, context_logp
from potstill.objectives.states import teacher_logp
from potstill.objectives.tokens import TokenDistillation
from potstill.teachers import EMATeacher, LiveTeacher, LocalTeacher, PrivilegedTeacher
from potstill.weighting import Agreement, PerResponse

TOKENIZER = character_tokenizer(["abcdefg "])
LENGTHS = (5, 3, 1)  # counted positions of the rows


def model(seed: int) -> CausalLM:
    torch.manual_seed(seed)
    made = CausalLM.PACKAGED["llama-tiny"](tokenizer=TOKENIZER).double()
    with torch.no_grad():  # fresh weights all say nearly the same
        for parameter in made.parameters():
            parameter.mul_(6.0 if parameter.dim() > 1 else 1.0)
    return made


def batch(seed: int = 0) -> TokenBatch:
    tokens_BT = torch.randint(4, TOKENIZER.vocab_size, (3, 7), generator=torch.Generator().manual_seed(seed))
    attention_BT = torch.arange(7)[None] < torch.tensor([7, 5, 3])[:, None]
    return TokenBatch(torch.arange(3), tokens_BT, attention_BT, attention_BT & (torch.arange(7) >= 2))


def after(token: int, times: int = 2):
    """A context: every row after some tokens more."""

    def context(rows: TokenBatch) -> TokenBatch:
        shape = (len(rows), times)
        before = (torch.full(shape, token), torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool))
        kept = (rows.tokens_BT, rows.attention_BT, rows.counted_BT)
        return TokenBatch(rows.ids_B, *(torch.cat(pair, 1) for pair in zip(before, kept)))

    return context


CONTEXTS = [after(5), after(7, 1), after(9, 3)]


def logp(net: CausalLM, rows: TokenBatch, temperature: float = 1.0) -> Tensor:
    """Whole rows at the counted positions, by hand. [N, V]."""
    logits = net(rows.tokens_BT, rows.attention_BT) / temperature
    return torch.cat([logits[b, :-1][rows.counted_BT[b, 1:]] for b in range(len(rows))]).log_softmax(-1)


def chosen(log_NV: Tensor, rows: TokenBatch) -> Tensor:
    return log_NV.gather(-1, rows.tokens_counted[:, None])[:, 0]


def objective(estimator=ForwardKL(), kind=ContextDistillation, **options):
    teacher = PrivilegedTeacher(LocalTeacher(model(1)), after(6))
    return kind(
        model(0), teacher, estimator, optimizer=OptimizerSpec(), seed=0, average="sequence", **options
    )  # fmt: skip


def loss_of(distilled, rows=None, step: int = 0):
    return distilled.loss("student", distilled.collect(rows or batch(), step), step)


def grads(value: Tensor, distilled) -> list[Tensor]:
    return [
        g for g in torch.autograd.grad(value, list(distilled.student.parameters()), allow_unused=True) if g is not None
    ]


def same_step(a, b) -> None:
    """Equal losses with equal gradients."""
    x, y = (loss_of(each) for each in (a, b))
    assert_close(x.value(), y.value(), rtol=1e-9, atol=1e-12)
    for g, h in zip(grads(x.value(), a), grads(y.value(), b), strict=True):
        assert_close(g, h, rtol=1e-6, atol=1e-10)


def test_contexts_are_scored_by_one_teacher_on_the_tokens_there():
    teacher, rows = LocalTeacher(model(1)), batch()
    found = context_logp(teacher, CONTEXTS, rows)
    assert found.shape == (3, 3, 7)
    assert not found.requires_grad
    assert not found[:, ~rows.counted_BT].any()
    for k, context in enumerate(CONTEXTS):
        seen = context(rows)
        assert_close(found[k][rows.counted_BT].double(), chosen(logp(teacher.model, seen), seen), rtol=1e-5, atol=1e-5)
    alone = TokenBatch(rows.ids_B[1:2], *(x[1:2, :5] for x in (rows.tokens_BT, rows.attention_BT, rows.counted_BT)))
    assert_close(context_logp(teacher, CONTEXTS, alone)[:, 0], found[:, 1, :5], rtol=1e-5, atol=1e-5)


def test_the_teachers_own_context_is_not_among_them():
    distilled = objective(contexts=CONTEXTS, weighting=Agreement())
    inner = LocalTeacher(model(1))
    seen = distilled.collect(batch(), 0)
    assert_close(seen.extra["context_logp_KBT"], context_logp(inner, CONTEXTS, batch()))
    assert "context_logp_KBT" not in objective().collect(batch(), 0).extra


def test_the_mean_that_is_released_and_the_one_in_which_weights_act_by_hand():
    rows, weigh = batch(), Agreement(gamma=5.0)
    teacher, student = LocalTeacher(model(1)), model(0)
    log_p, log_q = logp(teacher.model, after(6)(rows)), logp(student, rows)
    values = (log_p.exp() * (log_p - log_q)).sum(-1)
    scores = torch.stack([chosen(logp(teacher.model, c(rows)), c(rows)) for c in CONTEXTS])
    d = scores.var(0, correction=1)
    w = (1 / (1 + 5.0 * (d / d.quantile(0.95)).clamp_max(10))).clamp_min(0.01)
    per_row = list(zip(w.split(LENGTHS), values.split(LENGTHS)))
    released = torch.stack([(a * v).sum() / a.sum().clamp_min(1) for a, v in per_row]).mean()
    acting = torch.stack([(a * v).mean() for a, v in per_row]).mean()
    assert (w[-1] < 1) and (w > 0.01).any(), "the last row's weight is below the guard of 1"
    close = {"rtol": 1e-5, "atol": 1e-7}
    assert_close(
        loss_of(objective(contexts=CONTEXTS, weighting=PerResponse(of=weigh, least=1.0))).value(), released, **close
    )
    assert_close(loss_of(objective(contexts=CONTEXTS, weighting=weigh)).value(), acting, **close)


def test_weights_of_whole_responses_cancel_in_the_released_mean_alone():
    """They multiply both sides, until they add up to less than 1."""
    plain, weigh = loss_of(objective()).value(), Agreement(level="sequence", gamma=0.01)
    free = PerResponse(of=weigh)
    assert_close(loss_of(objective(contexts=CONTEXTS, weighting=free)).value(), plain, rtol=1e-6, atol=0)
    acting = loss_of(objective(contexts=CONTEXTS, weighting=weigh)).value()
    assert acting < plain * (1 - 1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("released", [True, False])
def test_contexts_that_agree_and_gamma_zero_are_plain_self_distillation(level, released):
    wrap = (lambda w: PerResponse(of=w, least=1.0)) if released else (lambda w: w)
    plain = objective(kind=TokenDistillation)
    same = objective(contexts=[after(5)] * 3, weighting=wrap(Agreement(level=level, gamma=9.0)))
    same_step(same, plain)
    same_step(objective(contexts=CONTEXTS, weighting=wrap(Agreement(level=level, gamma=0.0))), plain)
    same_step(objective(), plain)


def test_more_disagreement_is_less_weight():
    distilled = objective(contexts=CONTEXTS, weighting=Agreement(gamma=2.0))
    rows = distilled.collect(batch(), 0)
    spread = rows.extra["context_logp_KBT"].var(0)[rows.counted_BT]
    weights = distilled.loss("student", rows, 0).positions["weights"]
    mask = torch.arange(5)[None] < torch.tensor(LENGTHS)[:, None]
    ordered = weights[mask][spread.argsort()]
    assert (ordered.diff() < 0).all()
    assert 0.01 <= ordered[-1] < ordered[0] <= 1


def test_one_context_has_nothing_to_agree_with():
    with pytest.raises(RecipeError, match="One context has nothing to agree with: give at least 2"):
        objective(contexts=CONTEXTS[:1])
    teacher = LocalTeacher(model(1))
    teacher.gives = frozenset({FullLogits})
    with pytest.raises(SignalError, match="compared by TokenLogp, which .* does not give"):
        ContextDistillation(model(0), teacher, contexts=CONTEXTS, optimizer=OptimizerSpec(), seed=0)


@pytest.mark.parametrize("part", [ForwardKL(), ReverseKL()])
def test_a_quantile_clips_the_largest_values_and_leaves_the_others(part):
    distilled, rows = objective(part, quantile=0.6, temperature=0.7), batch()
    log_p, log_q = logp(model(1), after(6)(rows), 0.7), logp(distilled.student, rows, 0.7)
    values = part(teacher_logp=log_p, student_logp=log_q)
    limit = values.detach().quantile(0.6)
    kept = torch.where(values < limit, values, limit.expand_as(values))
    assert 0 < (values > limit).sum() < len(values)
    expected = torch.stack([v.mean() for v in kept.split(LENGTHS)]).mean()
    for seed in (0, 1, 2, 0):  # each step clips the divergence, not what the one before has clipped
        loss = loss_of(distilled, batch(seed))
        assert_close(loss.value(), loss_of(objective(part, quantile=0.6, temperature=0.7), batch(seed)).value())
    assert_close(loss.value(), expected, rtol=1e-5, atol=1e-8)
    for g, h in zip(grads(loss.value(), distilled), grads(expected, distilled), strict=True):
        assert_close(g, h, rtol=1e-4, atol=1e-7)
    assert distilled.couples == "batch" and objective().couples == "position"
    same_step(objective(Clipped(part, float("inf"), per="position")), objective(part))


def test_a_quantile_that_cannot_be_is_refused():
    with pytest.raises(RecipeError, match="strictly between 0 and 1, got 1.0"):
        objective(quantile=1.0)
    with pytest.raises(RecipeError, match="SampledReverseKL has no divergence to clip"):
        objective(SampledReverseKL(), quantile=0.5)


def seen_states(distilled, rows: TokenBatch):
    states = distilled._states(rows)
    distilled._divergence(states, 0)
    return states


@pytest.mark.parametrize("margin", [0.5, -0.3, -100.0])
def test_contrast_and_its_gradient_by_hand(margin):
    """grad = sign(log q - log p) - sign(log q - log p-) times grad log q where the hinge is open, and 0 elsewhere."""
    misled = PrivilegedTeacher(LocalTeacher(model(1)), after(8, 3))
    distilled, rows = objective(temperature=0.7), batch()
    term = ContrastiveTerm(misled, coefficient=0.3, margin=margin, temperature=0.7)(seen_states(distilled, rows))
    log_q = chosen(logp(distilled.student, rows, 0.7), rows)
    log_p, negative = (chosen(logp(model(1), c(rows), 0.7), rows).detach() for c in (after(6), after(8, 3)))
    open_ = margin + (log_q - log_p).abs() - (log_q - negative).abs() > 0
    hinge = torch.where(open_, margin + (log_q - log_p).abs() - (log_q - negative).abs(), 0.0)
    share = torch.cat([torch.full((n,), 1 / n) for n in LENGTHS]).double()
    assert open_.any() == (margin > -1)
    assert_close(term.total, (share * hinge).sum(), rtol=1e-5, atol=1e-7)
    assert term.count == 3 and term.coefficient == 0.3 and term.unit == "sequence"
    sign = torch.where(open_, (log_q - log_p).sign() - (log_q - negative).sign(), 0.0).detach()
    if margin > 0:
        assert {-2.0, 0.0, 2.0} >= set(sign.tolist()) and sign.any()
    for g, h in zip(grads(term.total, distilled), grads((share * sign * log_q).sum(), distilled), strict=True):
        assert_close(g, h, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in misled.model.parameters())


def test_a_misled_teacher_that_is_the_student_gets_no_gradient():
    distilled, rows = objective(), batch()
    misled = PrivilegedTeacher(LiveTeacher(distilled.student), after(8, 3))
    found = teacher_logp(misled, rows, 0.7, None)
    assert not found.requires_grad
    assert_close(found, chosen(logp(distilled.student, after(8, 3)(rows), 0.7), rows).detach(), rtol=1e-5, atol=1e-6)
    fixed = PrivilegedTeacher(LocalTeacher(model(0)), after(8, 3))
    a, b = (grads(ContrastiveTerm(x)(seen_states(distilled, rows)).total, distilled) for x in (misled, fixed))
    for g, h in zip(a, b, strict=True):
        assert_close(g, h)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_a_teacher_says_of_the_tokens_is_the_same_by_any_signal(temperature):
    live, rows = LocalTeacher(model(1)), batch()
    rows.tokens_BT.clamp_(max=9)
    laws = {
        vocabulary: logp(live.model, rows, temperature)[:, :vocabulary].log_softmax(-1) for vocabulary in (None, 10)
    }
    for gives in ({HiddenAndHead, FullLogits, TokenLogp}, {FullLogits, TokenLogp}, {TokenLogp}):
        live.gives = frozenset(gives)
        for vocabulary, law in laws.items() if FullLogits in gives else [(None, laws[None])] * (temperature == 1.0):
            rows.memo.clear()
            found = teacher_logp(live, rows, temperature, vocabulary)
            assert not found.requires_grad
            assert_close(found.double(), chosen(law, rows).detach(), rtol=1e-5, atol=1e-6)


def test_contrast_needs_live_teachers():
    misled = PrivilegedTeacher(LocalTeacher(model(1)), after(8))
    misled.gives = frozenset({TokenLogp})
    distilled = objective()
    with pytest.raises(
        SignalError, match="gives TokenLogp at temperature 1.0, and the .* at 0.7 are asked. Use a live"
    ):
        ContrastiveTerm(misled, temperature=0.7)(seen_states(distilled, batch()))
    with pytest.raises(SignalError, match="needs the teacher's log-probabilities"):
        ContrastiveTerm(misled)(distilled._states(batch()))


@pytest.mark.parametrize("over", ["mean", "sum"])
def test_features_and_their_gradient_by_hand(over):
    distilled, rows = objective(), batch()
    states = seen_states(distilled, rows)
    term = FeatureTerm(0.2, over)(states)
    theirs = distilled.teacher.model.counted_hidden(after(6)(rows)).detach()
    ours = distilled.student.counted_hidden(rows)
    share = torch.cat([torch.full((n,), 1 / n) for n in LENGTHS]).double()
    size = ours.shape[1] if over == "mean" else 1
    assert_close(term.total, (share * ((ours - theirs) ** 2).sum(-1) / size).sum())
    (gradient,) = torch.autograd.grad(term.total, states.hidden_ND)
    assert_close(gradient, share[:, None] * 2 * (ours - theirs) / size)
    assert term.count == 3 and term.coefficient == 0.2


def test_features_alone_leave_the_divergence_out():
    both = objective(extras=[FeatureTerm(1.0)], distillation=0.0)
    loss = loss_of(both)
    assert_close(loss.value(), loss.terms["features"].mean())
    assert loss.terms["divergence"].total > 0
    added = loss_of(objective(extras=[FeatureTerm(0.1)]))
    assert_close(added.value(), loss_of(objective()).value() + 0.1 * loss.value())


def test_features_of_another_width_are_refused():
    torch.manual_seed(3)
    wide = CausalLM.PACKAGED["llama-tiny"](tokenizer=TOKENIZER, width=32).double()
    distilled = ContextDistillation(
        model(0), LocalTeacher(wide), extras=[FeatureTerm()], optimizer=OptimizerSpec(), seed=0
    )
    with pytest.raises(SignalError, match="hidden states of one width"):
        loss_of(distilled)
    with pytest.raises(RecipeError, match=r"FeatureTerm\.over must be one of mean, sum"):
        FeatureTerm(over="total")


def moved(beta: float, every: int, steps: int):
    """An objective whose student's first weight walks 1, 2, 3 ... and whose teacher averages it."""
    student = model(0)
    teacher = PrivilegedTeacher(EMATeacher(student, beta, every=every, ramp=False), after(6))
    distilled = ContextDistillation(
        student, teacher, contexts=CONTEXTS, weighting=Agreement(), optimizer=OptimizerSpec(), seed=0
    )
    weight, scored = next(student.parameters()), []
    with torch.no_grad():
        start = weight.clone()
        for step in range(steps):
            weight.copy_(start + step + 1)
            distilled.after_step("student", step)
            scored.append(distilled.collect(batch(), step).extra["context_logp_KBT"])
    return start, next(teacher.model.parameters()), scored, distilled


def test_the_average_is_the_closed_form_and_scores_the_contexts_too():
    start, average, scored, distilled = moved(0.9, 2, 7)
    seen = [start + step for step in (2, 4, 6)]  # the student after steps 2, 4 and 6
    expected = 0.9**3 * start + sum(0.1 * 0.9 ** (2 - i) * x for i, x in enumerate(seen))
    assert_close(average, expected)
    assert torch.equal(scored[1], scored[2]) and not torch.equal(scored[0], scored[1])
    assert [name for name in distilled.state_dict() if "teacher" in name], "a moving teacher is saved"
    start, average, _, _ = moved(1.0, 1, 3)
    assert torch.equal(average, start), "beta 1 is the frozen start"
