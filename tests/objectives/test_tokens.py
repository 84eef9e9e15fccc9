"""The token objective against closed forms: what counts, how it is weighed and divided, and what a step optimises."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from potstill.contracts.batch import PromptBatch, TokenBatch
from potstill.contracts.errors import DataError, ModelError, NonFiniteError, RecipeError, SignalError
from potstill.contracts.players import OptimizerSpec
from potstill.contracts.signals import FullLogits, TokenLogp, TopKLogp
from potstill.contracts.terms import Term
from potstill.divergences import Clipped, Exact, ForwardKL, JensenShannon, ReverseKL, SampledReverseKL, TopK
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.states import Rows, TokenTerm, by_rows
from potstill.objectives.tokens import RolloutSpec, TokenDistillation, completed
from potstill.teachers import FrozenStart, LocalTeacher, PrivilegedTeacher
from potstill.weighting import EarlyPrefix, EntropyTop, Uniform

TOKENIZER = character_tokenizer(["abcdefg "])


def model(seed: int, tokenizer=TOKENIZER) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM.PACKAGED["llama-tiny"](tokenizer=tokenizer).double()


def batch(seed: int = 0, size: int = 3, length: int = 7) -> TokenBatch:
    """Rows of several lengths, padded on the right, with the first two tokens of each as context."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(4, TOKENIZER.vocab_size, (size, length), generator=generator)
    lengths = torch.tensor([7, 5, 3])[:size, None]
    attention_BT = torch.arange(length)[None] < lengths
    return TokenBatch(torch.arange(size), tokens_BT, attention_BT, attention_BT & (torch.arange(length) >= 2))


def objective(estimator=ForwardKL(), teacher_seed: int = 1, **options) -> TokenDistillation:
    teacher = LocalTeacher(model(teacher_seed))
    return TokenDistillation(model(0), teacher, estimator, optimizer=OptimizerSpec(), seed=0, **options)


def by_hand(distilled: TokenDistillation, rows: TokenBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log p and log q at counted tokens, from whole logits, row by row. [N, V] each."""
    found = []
    for net in (distilled.teacher.model, distilled.student):
        logits = net(rows.tokens_BT, rows.attention_BT) / temperature
        found.append(torch.cat([logits[b, :-1][rows.counted_BT[b, 1:]] for b in range(len(rows))]).log_softmax(-1))
    return found[0], found[1]


def test_the_mean_over_counted_tokens_of_the_divergence():
    distilled, rows = objective(), batch()
    log_p, log_q = by_hand(distilled, rows)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert len(log_p) == 5 + 3 + 1
    assert_close(distilled.loss("student", rows, 0).value(), expected)


def test_a_sequence_mean_weighs_each_sequence_alike():
    distilled, rows = objective(ReverseKL(), average="sequence"), batch()
    log_p, log_q = by_hand(distilled, rows)
    values = (log_q.exp() * (log_q - log_p)).sum(-1)
    expected = torch.stack([values[:5].mean(), values[5:8].mean(), values[8:].mean()]).mean()
    assert_close(distilled.loss("student", rows, 0).value(), expected)


def test_temperature_divides_both_logits_and_is_squared_only_when_asked():
    rows, plain, squared = batch(), objective(temperature=3.0), objective(temperature=3.0, temperature_squared=True)
    log_p, log_q = by_hand(plain, rows, 3.0)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert_close(plain.loss("student", rows, 0).value(), expected)
    assert_close(squared.loss("student", rows, 0).value(), 9 * expected)


def test_cross_entropy_is_the_next_token_loss_and_a_control_needs_no_teacher():
    rows = batch()
    control = TokenDistillation(model(0), None, cross_entropy=1.0, optimizer=OptimizerSpec(), seed=0)
    _, log_q = by_hand(objective(), rows)
    nll = -log_q.gather(-1, rows.tokens_counted[:, None]).mean()
    assert_close(control.loss("student", rows, 0).value(), nll)
    both = objective(cross_entropy=0.5)
    assert_close(both.loss("student", rows, 0).value(), objective().loss("student", rows, 0).value() + 0.5 * nll)
    with pytest.raises(RecipeError, match="Without a teacher nothing is left to learn"):
        TokenDistillation(model(0), None, optimizer=OptimizerSpec(), seed=0)


def test_padding_and_neighbours_change_nothing():
    distilled, rows = objective(), batch()
    alone = [
        distilled.loss(
            "student",
            TokenBatch(torch.arange(1), *(x[b : b + 1] for x in (rows.tokens_BT, rows.attention_BT, rows.counted_BT))),
            0,
        )
        for b in range(3)
    ]
    total = torch.stack([loss.terms["divergence"].total for loss in alone]).sum()
    assert_close(distilled.loss("student", rows, 0).terms["divergence"].total, total)


def test_teachers_get_no_gradient_and_are_not_saved():
    distilled = objective()
    distilled.loss("student", batch(), 0).value().backward()
    assert all(p.grad is None for p in distilled.teacher.model.parameters())
    assert all(p.grad is not None for p in distilled.student.parameters())
    assert not [name for name in distilled.state_dict() if "teacher" in name]


def test_sampled_tokens_of_every_length_one_rollout_give_the_exact_gradient():
    """Enumerate the sampled token of one position: the estimator's mean gradient is the reverse KL's, through the model."""
    exact, sampled = objective(ReverseKL()), objective(SampledReverseKL(baseline="full"))
    rows = batch(size=1)
    rows.counted_BT[:] = False
    rows.counted_BT[0, 6] = True
    _, log_q = by_hand(exact, rows)
    total = 0.0
    for token, weight in enumerate(log_q[0].exp().tolist()):
        tokens_BT = rows.tokens_BT.clone()
        tokens_BT[0, 6] = token
        one = TokenBatch(rows.ids_B, tokens_BT, rows.attention_BT, rows.counted_BT)
        total = total + weight * sampled.loss("student", one, 0).value()
    a = torch.autograd.grad(total, list(sampled.student.parameters()), allow_unused=True)
    b = torch.autograd.grad(exact.loss("student", rows, 0).value(), list(exact.student.parameters()), allow_unused=True)
    for x, y in zip(a, b):
        assert_close(x, y, rtol=1e-4, atol=1e-7)  # the network rounds its norms to float32


def test_weights_multiply_positions_and_leave_the_count():
    distilled, rows = objective(weighting=EntropyTop(share=0.5, scope="response")), batch()
    log_p, log_q = by_hand(distilled, rows)
    values, entropy = (log_p.exp() * (log_p - log_q)).sum(-1), -(log_q.exp() * log_q).sum(-1)
    kept = torch.zeros(9)
    for start, stop, keep in ((0, 5, 2), (5, 8, 1), (8, 9, 1)):
        kept[start + entropy[start:stop].topk(keep).indices] = 1
    assert_close(distilled.loss("student", rows, 0).value(), (values * kept).sum() / 9)


def test_rows_spread_and_gather_are_inverse():
    counted = torch.tensor([[False, True, False, True], [True, True, True, False]])
    rows, values = Rows.of(counted), torch.arange(5.0) + 1
    assert rows.spread(values).tolist() == [[1, 2, 0], [3, 4, 5]]
    assert torch.equal(rows.gather(rows.spread(values)), values)


def prompts() -> PromptBatch:
    tokens = torch.tensor([[0, 0, 5, 6], [4, 5, 6, 7]])
    attention = torch.tensor([[False, False, True, True], [True, True, True, True]])
    return PromptBatch(torch.tensor([3, 9]), tokens, attention, completions=[[4, 5], [6]])


def test_prompts_are_continued_by_the_student_or_completed_from_the_data():
    mixed = objective(on_policy=0.5, rollouts=RolloutSpec(max_new_tokens=3))
    given = completed(prompts(), TOKENIZER.pad_token_id or 0)
    assert given.tokens_counted.tolist() == [4, 5, 6]
    kinds = [mixed.collect(prompts(), step).tokens_BT.shape for step in range(40)]
    off = sum(shape == given.tokens_BT.shape for shape in kinds)
    assert 8 < off < 32, "a fair keyed coin a step"
    assert kinds == [mixed.collect(prompts(), step).tokens_BT.shape for step in range(40)]


def test_an_unbiased_estimator_refuses_what_would_bias_it():
    with pytest.raises(RecipeError, match=r"unbiased only on untruncated samples.*top_p 1"):
        objective(SampledReverseKL(), rollouts=RolloutSpec(top_p=0.9))
    with pytest.raises(RecipeError, match="temperature 1.0"):
        objective(SampledReverseKL(), rollouts=RolloutSpec(temperature=0.7))
    with pytest.raises(RecipeError, match="on_policy 1"):
        objective(SampledReverseKL(), rollouts=RolloutSpec(), on_policy=0.5)
    with pytest.raises(DataError, match="needs prompts to continue"):
        objective(SampledReverseKL()).collect(batch(), 0)


def test_other_vocabularies_are_refused():
    with pytest.raises(ModelError, match=r"different vocabularies.*student: \{from: teacher"):
        TokenDistillation(
            model(0), LocalTeacher(model(1, character_tokenizer(["xyz"]))), optimizer=OptimizerSpec(), seed=0
        )


def test_batch_wide_weights_couple_the_batch():
    assert objective().couples == "position"
    assert objective(weighting=EntropyTop(share=0.5, scope="batch")).couples == "batch"


def test_frozen_start_stays_and_privileged_context_sees_more():
    distilled = objective()
    start = FrozenStart(distilled.student)
    rows = batch()
    same = TokenDistillation(distilled.student, start, ReverseKL(), optimizer=OptimizerSpec(), seed=0)
    assert same.loss("student", rows, 0).value().abs() < 1e-9, "the start equals the student before training"
    longer = TokenBatch(
        rows.ids_B,
        torch.cat([torch.full((3, 2), 5), rows.tokens_BT], 1),
        torch.cat([torch.ones(3, 2, dtype=torch.bool), rows.attention_BT], 1),
        torch.cat([torch.zeros(3, 2, dtype=torch.bool), rows.counted_BT], 1),
    )
    seeing = PrivilegedTeacher(start, lambda _: longer)
    told = TokenDistillation(distilled.student, seeing, ReverseKL(), optimizer=OptimizerSpec(), seed=0)
    assert told.loss("student", rows, 0).value() > 1e-6
    broken = PrivilegedTeacher(start, lambda b: TokenBatch(b.ids_B, b.tokens_BT + 1, b.attention_BT, b.counted_BT))
    with pytest.raises(DataError, match="other counted tokens"):
        TokenDistillation(distilled.student, broken, optimizer=OptimizerSpec(), seed=0).loss("student", rows, 0)


def test_support_is_an_axis():
    full, topk = objective(Exact(ReverseKL())), objective(Exact(ReverseKL(), TopK(4, of="student", tail="bucket")))
    rows = batch()
    assert 0 < topk.loss("student", rows, 0).value() < full.loss("student", rows, 0).value()


@pytest.mark.parametrize("chunk", [1, 40, 10_000])
def test_rows_in_pieces_give_the_values_and_gradients_of_all_at_once(chunk, monkeypatch):
    monkeypatch.setattr("potstill.objectives.states.CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(7, 12, generator=generator, dtype=torch.float64), torch.arange(7.0).double()
    function = lambda rows, where: (rows.log_softmax(-1).exp() * torch.arange(12.0)).sum(-1) * (1 + where.start * 0)
    pieces, whole = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    values = by_rows(function, pieces)
    assert_close(values, function(whole, slice(0, 7)))
    (values * weights).sum().backward()
    (function(whole, slice(0, 7)) * weights).sum().backward()
    assert_close(pieces.grad, whole.grad)
    with torch.no_grad():
        assert_close(by_rows(function, logits), values.detach())


def test_pieces_of_a_batch_keep_their_own_teacher_rows_and_tokens(monkeypatch):
    monkeypatch.setattr(CausalLM, "has_linear_head", False)  # the path through logits
    rows = batch()
    for estimator in (ForwardKL(), SampledReverseKL(baseline="full")):
        whole, pieces = objective(estimator, cross_entropy=0.3), objective(estimator, cross_entropy=0.3)
        a = whole.loss("student", rows, 0)
        monkeypatch.setattr("potstill.objectives.states.CHUNK", 2 * TOKENIZER.vocab_size)
        b = pieces.loss("student", rows, 0)
        monkeypatch.setattr("potstill.objectives.states.CHUNK", 2**20)
        assert_close(a.value(), b.value())
        assert_close(a.positions["reverse_kl"], b.positions["reverse_kl"])
        a.value().backward()
        b.value().backward()
        for x, y in zip(whole.student.parameters(), pieces.student.parameters()):
            assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("weighting", [Uniform(), EntropyTop(0.5), EarlyPrefix(0.5)], ids=repr)
@pytest.mark.parametrize(
    "estimator", [JensenShannon(0.3), SampledReverseKL(baseline="full"), Exact(ForwardKL(), TopK(3))]
)
def test_from_hidden_states_it_is_as_from_logits(estimator, weighting, average, monkeypatch):
    results = []
    for linear in (True, False):
        monkeypatch.setattr(CausalLM, "has_linear_head", linear)
        made = objective(estimator, weighting=weighting, average=average, temperature=1.3)
        loss = made.loss("student", batch(), 0)
        loss.value().backward()
        results.append((loss, [p.grad for p in made.student.parameters()]))
    (a, grad_a), (b, grad_b) = results
    assert_close(a.terms["divergence"].mean(), b.terms["divergence"].mean())
    for name in a.metrics:
        assert_close(a.metrics[name].mean(), b.metrics[name].mean())
    for x, y in zip(grad_a, grad_b, strict=True):
        assert_close(x, y, rtol=1e-4, atol=1e-7)


class Forbidding(LocalTeacher):
    """Gives the token `a` no probability at all, and logits only."""

    def __init__(self, model):
        super().__init__(model)
        self.gives = frozenset({FullLogits})

    def score(self, batch, need):
        signal = super().score(batch, need)
        signal.logits[:, TOKENIZER.convert_tokens_to_ids("a")] = -float("inf")
        return signal


@pytest.mark.parametrize("estimator", [ReverseKL(), SampledReverseKL(baseline="full")])
def test_a_token_that_the_teacher_forbids_is_said_plainly(estimator):
    make = lambda part: TokenDistillation(model(0), Forbidding(model(1)), part, optimizer=OptimizerSpec(), seed=0)
    rows = batch()
    rows.tokens_BT[0, 3] = TOKENIZER.convert_tokens_to_ids("a")
    with pytest.raises(NonFiniteError, match=r"gives probability 0 to tokens .*ForwardKL, JensenShannon"):
        make(estimator).loss("student", rows, 0)
    for finite in (ForwardKL(), JensenShannon(0.5), SampledReverseKL(clip=0.1)):
        assert make(finite).loss("student", rows, 0).value().isfinite()


def test_a_reward_moves_a_completion_by_its_advantage_in_the_group():
    scores = iter([1.0, 0.0, 5.0, 5.0])
    rollouts = RolloutSpec(max_new_tokens=4, samples_per_prompt=2)
    distilled = objective(SampledReverseKL(), reward=lambda row, text: next(scores), rollouts=rollouts)
    asked = prompts()
    asked.extra["rows"] = ["x", "y"]
    rows = distilled.collect(asked, 0)
    advantage = rows.extra["advantage"]
    assert_close(advantage, torch.tensor([1.0, -1.0, 0.0, 0.0]) * (0.5 / (0.5**0.5 + 1e-4)))
    loss = distilled.loss("student", rows, 0)
    assert loss.metrics["reward"].mean() == pytest.approx(2.75)
    _, log_q = by_hand(distilled, rows)
    chosen = log_q.gather(-1, rows.tokens_counted[:, None])[:, 0]
    spread = advantage.repeat_interleave(rows.counted_BT.sum(1))
    assert_close(loss.terms["reward"].mean(), -(spread * chosen).mean())
    with pytest.raises(RecipeError, match="samples_per_prompt to 2 or more"):
        objective(SampledReverseKL(), reward=lambda row, text: 0.0, rollouts=RolloutSpec())
    with pytest.raises(RecipeError, match="needs the student's own samples everywhere"):
        objective(ReverseKL(), reward=lambda row, text: 0.0, rollouts=rollouts, on_policy=0.5)


class Telling(LocalTeacher):
    """A teacher that gives less than its rows: its k likeliest tokens, or the log-probability of the tokens said."""

    def __init__(self, model, gives, k=3, temperature=1.0):
        super().__init__(model)
        self.gives, self.k, self.temperature = frozenset({gives}), k, temperature

    def score(self, batch, need):
        logp = (self.model.counted_logits(batch).detach() / self.temperature).log_softmax(-1)
        if need is TopKLogp:
            return TopKLogp(*logp.topk(self.k, -1))
        return TokenLogp(logp.gather(-1, batch.tokens_counted[:, None])[:, 0])


def both(estimator, telling, **options) -> list[tuple]:
    """(loss, gradients) of one objective under the whole teacher and under one that tells less of itself."""
    found = []
    for teacher in (LocalTeacher(model(1)), telling):
        made = TokenDistillation(model(0), teacher, estimator, optimizer=OptimizerSpec(), seed=0, **options)
        loss = made.loss("student", batch(), 0)
        loss.value().backward()
        found.append((loss, [p.grad for p in made.student.parameters()]))
    return found


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("weighting", [Uniform(), EarlyPrefix(0.5)], ids=repr)
def test_the_sampled_gradient_is_content_with_the_tokens_log_probabilities(weighting, temperature):
    telling = Telling(model(1), TokenLogp, temperature=temperature)
    (a, grad_a), (b, grad_b) = both(SampledReverseKL(), telling, weighting=weighting, temperature=temperature)
    assert_close(a.value(), b.value())
    for x, y in zip(grad_a, grad_b, strict=True):
        assert_close(x, y, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("k", [3, TOKENIZER.vocab_size - 1])
def test_a_teachers_top_k_is_the_bucketed_support(k):
    (a, grad_a), (b, grad_b) = both(Exact(ForwardKL(), TopK(k, of="teacher")), Telling(model(1), TopKLogp, k))
    assert_close(a.value(), b.value())
    for x, y in zip(grad_a, grad_b, strict=True):
        assert_close(x, y, rtol=1e-5, atol=1e-9)
    assert "reverse_kl" in b.metrics


@pytest.mark.parametrize(
    ("gives", "options", "message"),
    [
        (TopKLogp, {"estimator": SampledReverseKL()}, "SampledReverseKL needs more than .* gives .TopKLogp."),
        (TokenLogp, {"estimator": ForwardKL()}, "Exact needs more than .* gives .TokenLogp."),
        (TokenLogp, {"estimator": SampledReverseKL(baseline="full")}, "needs more than"),
        (TopKLogp, {"estimator": ForwardKL(), "temperature": 2.0}, "at temperature 1.0, and 2.0 is asked"),
    ],
)
def test_a_teacher_that_gives_too_little_is_refused_before_work(gives, options, message):
    with pytest.raises(SignalError, match=message):
        TokenDistillation(model(0), Telling(model(1), gives), **options, optimizer=OptimizerSpec(), seed=0)


@dataclass(frozen=True)
class MeanEntropy(TokenTerm):
    """The student's entropy at the positions where the teacher is unsure."""

    name: ClassVar[str] = "entropy"
    needs: ClassVar[tuple[str, ...]] = ("forward_kl",)
    coefficient: float = 0.5

    def __call__(self, states) -> Term:
        where = states.seen["teacher_entropy"] > states.seen["teacher_entropy"].median()
        assert states.teacher_logits(where).shape == states.student_logits(where).shape
        log_q = states.student_logits(where).log_softmax(-1)
        total = -(log_q.exp() * log_q).sum()
        return Term(total + 0 * states.seen["forward_kl"].sum(), where.sum().float(), self.coefficient, unit="unsure")


def test_a_further_term_sees_the_same_states():
    with_term, without, rows = objective(extras=(MeanEntropy(),)), objective(), batch()
    log_p, log_q = by_hand(with_term, rows)
    unsure = (log_p.exp() * -log_p).sum(-1)
    where = unsure > unsure.median()
    expected = -(log_q.exp() * log_q).sum(-1)[where].mean()
    loss = with_term.loss("student", rows, 0)
    assert_close(loss.terms["entropy"].mean(), 0.5 * expected)
    assert_close(loss.value(), without.loss("student", rows, 0).value() + 0.5 * expected)


def test_what_states_say_of_the_tokens_is_differentiable_and_right():
    made, rows = objective(), batch()
    states = made._states(rows)
    _, log_q = by_hand(made, rows)
    chosen = log_q.gather(-1, rows.tokens_counted[:, None])[:, 0]
    weights = torch.arange(len(chosen)).double()
    assert_close(states.student_logp(), chosen)
    mine = torch.autograd.grad((states.student_logp() * weights).sum(), made.student.parameters(), allow_unused=True)
    theirs = torch.autograd.grad((chosen * weights).sum(), made.student.parameters(), allow_unused=True)
    for x, y in zip(mine, theirs, strict=True):
        assert_close(x, y, rtol=1e-5, atol=1e-9)


def test_a_selection_reads_everything_and_learns_from_what_it_keeps():
    """The gradient of kept positions alone; metrics over them; a position left out may hold anything."""
    made, rows = objective(ReverseKL(), weighting=EntropyTop(0.5)), batch()
    log_p, log_q = by_hand(made, rows)
    entropy = -(log_q.exp() * log_q).sum(-1)
    value = (log_q.exp() * (log_q - log_p)).sum(-1)
    kept, start = [], 0
    for n in rows.counted_BT.sum(1).tolist():
        top = entropy[start : start + n].topk(max(1, n // 2)).indices + start
        kept += top.tolist()
        start += n
    loss = made.loss("student", rows, 0)
    assert_close(loss.value(), value[kept].sum() / len(value))
    assert_close(loss.metrics["reverse_kl"].mean(), value[kept].mean().detach())


def test_rewards_may_be_there_for_the_weighting_alone():
    rollouts = RolloutSpec(max_new_tokens=4, samples_per_prompt=2)
    made = objective(ReverseKL(), reward=lambda row, text: 1.0, rollouts=rollouts, advantage=0.0)
    asked = prompts()
    asked.extra["rows"] = ["x", "y"]
    loss = made.loss("student", made.collect(asked, 0), 0)
    assert set(loss.terms) == {"divergence"} and loss.metrics["reward"].mean() == 1.0


def test_the_log_ratio_is_the_teachers_over_the_students_whatever_it_tells():
    rows, found = batch(), []
    for teacher in (LocalTeacher(model(1)), Telling(model(1), TokenLogp)):
        made = TokenDistillation(model(0), teacher, SampledReverseKL(), optimizer=OptimizerSpec(), seed=0)
        states = made._states(rows)
        made._divergence(states, 0)
        found.append(states.seen["log_ratio"])
    log_p, log_q = by_hand(made, rows)
    expected = (log_p - log_q).gather(-1, rows.tokens_counted[:, None])[:, 0].detach()
    assert_close(found, [expected, expected])


def test_advantages_have_their_weight_and_the_objectives_average():
    rows = batch()
    rows.extra["advantage"] = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    made = objective(SampledReverseKL(), average="sequence", advantage=0.3)
    _, log_q = by_hand(made, rows)
    chosen = log_q.gather(-1, rows.tokens_counted[:, None])[:, 0]
    means = torch.stack([part.mean() for part in chosen.split(rows.counted_BT.sum(1).tolist())])
    expected = -0.3 * (rows.extra["advantage"] * means).mean()
    assert_close(made.loss("student", rows, 0).terms["reward"].mean(), expected)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("per", ["entry", "position", "raw"])
def test_the_share_that_a_clip_cuts_is_logged(linear, per, monkeypatch):
    monkeypatch.setattr(CausalLM, "has_linear_head", linear)
    rows = batch()
    log_p, log_q = by_hand(objective(), rows)
    entries = log_p.exp() * (log_p - log_q) + (0.0 if per == "raw" else 1.0) * (log_q.exp() - log_p.exp())
    sizes = entries.sum(-1) if per == "position" else entries
    limit = sizes.quantile(0.7).item()
    part, cut = (
        Clipped(ForwardKL(), limit, raw=per == "raw", per="position" if per == "position" else "entry"),
        sizes > limit,
    )
    distilled = objective(part)
    found = distilled.loss("student", rows, 0)
    assert_close(found.metrics["clip_fraction"].mean(), cut.double().mean())
    assert_close(found.value(), part(teacher_logp=log_p, student_logp=log_q).mean())
    chosen = objective(part, weighting=EntropyTop(0.4))
    seen = chosen.loss("student", rows, 0)
    kept = Rows.of(rows.counted_BT).gather(seen.positions["weights"]) > 0
    assert 0 < kept.sum() < len(kept)
    assert_close(seen.metrics["clip_fraction"].mean(), cut[kept].double().mean())


def test_the_share_of_bounded_rewards_is_logged_and_no_other():
    rows, bound = batch(), math.log(0.9) / 0.1
    distilled = objective(SampledReverseKL(clip=0.9), temperature=0.1)
    log_p, log_q = by_hand(distilled, rows, 0.1)
    under = (log_p - log_q).gather(1, rows.tokens_counted[:, None]) < bound
    assert 0 < under.float().mean() < 1
    assert_close(distilled.loss("student", rows, 0).metrics["clip_fraction"].mean(), under.float().mean())
    for plain in (ForwardKL(), SampledReverseKL()):
        assert "clip_fraction" not in objective(plain).loss("student", rows, 0).metrics
