"""Ranking, entropy and transport terms against their definitions, written out in loops; selections, counts and gradients."""

import itertools
import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.testing import assert_close

from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import ModelError, RecipeError, SignalError
from potstill.contracts.players import OptimizerSpec
from potstill.contracts.signals import FullLogits
from potstill.contracts.terms import divided
from potstill.divergences import ForwardKL, Sinkhorn
from potstill.divergences.rankings import kendall_tau
from potstill.objectives.states import Rows, TokenStates
from potstill.objectives.token_terms import (
    EntropyTerm,
    RankingTerm,
    RowTransport,
    SinkhornTerm,
    problems,
    sequence_means,
)
from potstill.objectives.tokens import TokenDistillation
from potstill.weighting import EarlyPrefix, EntropyTop, Opener, SampledShare, Uniform

V = 7


class Direct:
    """A student whose hidden states are its logits."""

    has_linear_head = False

    @staticmethod
    def head(hidden):
        return hidden


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states(lengths=(4, 1, 3), seed: int = 0, student=None, teacher=None, pad: int = 0) -> TokenStates:
    """Rows of these lengths behind a first token, with `pad` columns of nothing on the right."""
    width = 1 + max(lengths) + pad
    counted = torch.tensor([[0 < t <= n for t in range(width)] for n in lengths])
    N = int(counted.sum())
    z = normal(N, V, seed=seed) * 2 if student is None else student
    v = normal(N, V, seed=seed + 1) * 2 if teacher is None else teacher
    tokens = torch.full(counted.shape, 1)
    batch = TokenBatch(torch.arange(len(lengths)) + 5, tokens, torch.ones_like(counted), counted)
    log_q = z.detach().log_softmax(-1)
    seen = {"student_entropy": -(log_q.exp() * log_q).sum(-1), "log_ratio": torch.arange(N).double() - 2}
    return TokenStates(
        Direct(), batch, Rows.of(counted), batch.tokens_counted, z.clone().requires_grad_(), torch.ones(N),
        torch.tensor(float(N)), "token", V, FullLogits(v), seen,
    )  # fmt: skip


def gradient(term, made: TokenStates) -> Tensor:
    return torch.autograd.grad(term(made).mean(), made.hidden_ND)[0]


# ---------------------------------------------------------------- ranking


def plackett_luce(z: list[float], order: list[int], prefix: bool = False) -> float:
    """-log of a product over places, as the paper writes it (or with the code's prefix)."""
    value = 0.0
    for j in range(len(order)):
        among = order[: j + 1] if prefix else order[j:]
        value -= z[order[j]] - math.log(sum(math.exp(z[i]) for i in among))
    return value


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("k", [2, 3, 20])
def test_the_students_candidates_in_the_teachers_order(k, variant):
    made = states()
    term = RankingTerm(0.1, k=k, variant=variant)
    total = 0.0
    for z, v in zip(made.hidden_ND.tolist(), made.signal.logits.tolist(), strict=True):
        candidates = sorted(range(V), key=lambda i: -z[i])[:k]
        total += plackett_luce(z, sorted(candidates, key=lambda i: -v[i]), prefix=variant == "code")
    found = term(made)
    assert_close(found.total, torch.tensor(total, dtype=torch.float64))
    assert (found.count.item(), found.coefficient) == (8, 0.1)
    assert_close(found.mean().item(), 0.1 * total / 8)


def test_one_candidate_says_nothing_and_two_are_bradley_terry():
    made = states()
    assert RankingTerm(1.0, k=1)(made).total.abs() < 1e-12
    best, where = made.hidden_ND.topk(2)
    theirs = made.signal.logits.gather(-1, where)
    sign = torch.where(theirs[:, 0] > theirs[:, 1], 1.0, -1.0)
    expected = torch.nn.functional.softplus(-sign * (best[:, 0] - best[:, 1])).sum()
    assert_close(RankingTerm(1.0, k=2)(made).total, expected)


def test_only_the_teachers_order_counts_and_an_offset_of_the_student_does_not():
    made = states()
    value = RankingTerm(1.0, k=4)(made).total
    monotone = states(teacher=made.signal.logits.exp() * 3)
    shifted = states(student=made.hidden_ND.detach() + normal(8, 1, seed=9))
    assert_close(RankingTerm(1.0, k=4)(monotone).total, value)
    assert_close(RankingTerm(1.0, k=4)(shifted).total, value)


def test_the_code_teaches_the_reversed_ranking_and_the_paper_the_teachers():
    made = states()
    for variant, sign in (("paper", 1.0), ("code", -1.0)):
        z = torch.zeros(8, V, dtype=torch.float64)
        for _ in range(100):
            z = z - gradient(RankingTerm(8.0, k=V, variant=variant), states(student=z))
        assert_close(kendall_tau(z, made.signal.logits), torch.full((8,), sign, dtype=torch.float64))
    reversed_ = states(teacher=-made.signal.logits)
    assert_close(RankingTerm(1.0, k=5, variant="code")(made).total, RankingTerm(1.0, k=5)(reversed_).total)


def test_only_the_candidates_of_the_student_get_a_gradient():
    made = states()
    moved = gradient(RankingTerm(1.0, k=3), made) != 0
    expected = torch.zeros(8, V, dtype=torch.bool).scatter(1, made.hidden_ND.detach().topk(3).indices, True)
    assert torch.equal(moved, expected)
    assert made.signal.logits.grad is None


# ---------------------------------------------------------------- entropy


def test_entropy_of_the_most_uncertain_share_and_its_gradient():
    """d H / d z = -q (log q + H), at the kept positions only."""
    made = states((4, 1, 3))
    z, H = made.hidden_ND.detach(), made.seen["student_entropy"]
    kept = torch.zeros(8, dtype=torch.bool)
    for start, stop, keep in ((0, 4, 2), (4, 5, 1), (5, 8, 1)):
        kept[start + H[start:stop].topk(keep).indices] = True
    found = EntropyTerm(0.5, EntropyTop(0.5))(made)
    assert_close(found.total, H[kept].sum())
    assert (found.count.item(), found.coefficient) == (4, 0.5)
    log_q = z.log_softmax(-1)
    expected = torch.where(kept[:, None], -log_q.exp() * (log_q + H[:, None]), 0.0) * 0.5 / 4
    assert_close(gradient(EntropyTerm(0.5, EntropyTop(0.5)), made), expected)
    assert EntropyTerm().selection == EntropyTop(0.1)


# ---------------------------------------------------------------- selections


@pytest.mark.parametrize("term", [RankingTerm, EntropyTerm])
def test_weights_multiply_the_kept_and_the_count_is_how_many_are_kept(term):
    made = states()
    whole = torch.stack([term(1.0, Uniform()).values(made, torch.tensor([i]))[0] for i in range(8)])
    weights = made.rows.gather(EarlyPrefix(2.0)(_positions(made)))
    found = term(1.0, EarlyPrefix(2.0))(made)
    assert_close(found.total, (whole * weights).sum())
    assert found.count == 8
    opened = term(1.0, Opener(0.5))(made)
    kept = made.rows.gather(Opener(0.5)(_positions(made))) > 0
    assert 0 < kept.sum() < 8
    assert_close(opened.total, whole[kept].sum())
    assert opened.count == kept.sum()


def _positions(made):
    from potstill.weighting import Positions

    return Positions(made.rows.mask_BR, **{f"{k}_BR": made.rows.spread(v) for k, v in made.seen.items()})


@pytest.mark.parametrize("term", [RankingTerm(1.0, Opener(0.5)), EntropyTerm(1.0, EntropyTop(0.5)), SinkhornTerm(1.0)])
def test_padding_changes_nothing(term):
    a, b = term(states()), term(states(pad=3))
    assert_close(a.total, b.total)
    assert a.count == b.count


def test_random_positions_are_keyed_by_sample_and_place():
    made = states((9, 9, 9))
    term = EntropyTerm(1.0, SampledShare(1 / 3, alpha=0.0))
    assert term(made).count == 9
    assert_close(term(made).total, term(made).total)
    other = states((9, 9, 9))
    other.batch.ids_B = other.batch.ids_B + 100
    assert term(made).total != term(other).total
    assert term.needs == ("noise",)
    assert RankingTerm(1.0, SampledShare(1 / 3, alpha=0.0))(made).total != RankingTerm(1.0)(made).total


def test_a_batch_without_positions_counts_nothing():
    made = states((0, 0))
    for term in (RankingTerm(), EntropyTerm(), SinkhornTerm(), SinkhornTerm(of="sequences")):
        found = term(made)
        assert (found.count.item(), found.total.item()) == (0, 0)
        assert not gradient(term, made).any()


def test_terms_of_micro_batches_add_up():
    a, b = states((4, 2), seed=3), states((3,), seed=5)
    both = states((4, 2, 3), student=torch.cat([a.hidden_ND, b.hidden_ND]).detach(),
                  teacher=torch.cat([a.signal.logits, b.signal.logits]))  # fmt: skip
    for term in (RankingTerm(0.3, EntropyTop(0.5)), EntropyTerm(0.3, EntropyTop(0.5))):
        assert_close(divided([{"x": term(a)}, {"x": term(b)}]).double(), term(both).mean().double())


# ---------------------------------------------------------------- transport


def ratio_form(cost: Tensor, epsilon: float, iterations: int, mass: float = 1.0) -> Tensor:
    """The paper's: a kernel divided by its row sums, then by its column sums."""
    K = (-cost / epsilon).exp()
    for _ in range(iterations):
        K = mass * K / K.sum(1, keepdim=True)
        K = mass * K / K.sum(0, keepdim=True)
    return K


def by_hand(z: Tensor, v: Tensor, tau=2.0, epsilon=0.1, iterations=20, p=1.0, mass=1.0) -> Tensor:
    s, t = (z / tau).softmax(-1), (v / tau).softmax(-1)
    D = ((s[:, None] - t[None]).abs() ** p).sum(-1) ** (1 / p)
    return (ratio_form(D, epsilon, iterations, mass) * D).sum()


def test_the_papers_loss_over_all_counted_positions_with_its_gradient():
    made = states()
    z = made.hidden_ND.detach().requires_grad_()
    expected = by_hand(z, made.signal.logits)
    found = SinkhornTerm()(made)
    assert_close(found.total, expected, rtol=0, atol=1e-6)
    assert (found.count.item(), found.coefficient) == (1, 0.0008)
    assert_close(gradient(SinkhornTerm(1.0), made), torch.autograd.grad(expected, z)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [
    ({"epsilon": 0.3}, {"epsilon": 0.3}), ({"iterations": 1}, {"iterations": 1}), ({"norm": 2.0}, {"p": 2.0}),
    ({"marginals": "uniform"}, {"mass": 1 / 8}),
])  # fmt: skip
def test_its_options(options):
    made = states()
    term = SinkhornTerm(1.0, RowTransport(1.5, Sinkhorn(**options[0])))
    assert_close(
        term(made).total, by_hand(made.hidden_ND, made.signal.logits, tau=1.5, **options[1]), rtol=0, atol=1e-6
    )


def test_a_detached_plan_and_the_implicit_gradient():
    made = states()
    of = lambda **o: gradient(SinkhornTerm(1.0, RowTransport(2.0, Sinkhorn(**o))), made)
    z = made.hidden_ND.detach().requires_grad_()
    s, t = (z / 2).softmax(-1), (made.signal.logits / 2).softmax(-1)
    D = (s[:, None] - t).abs().sum(-1)
    detached = torch.autograd.grad((ratio_form(D, 0.1, 20).detach() * D).sum(), z)[0]
    assert_close(of(gradient="detached"), detached, rtol=0, atol=1e-8)
    unrolled = of(iterations=2000)
    assert_close(of(gradient="implicit", tolerance=1e-12), unrolled, rtol=0, atol=1e-7)
    assert (unrolled - detached).abs().max() > 1e-3


def test_the_order_of_the_teachers_rows_is_free_and_equals_cost_something():
    made = states()
    value = SinkhornTerm(1.0)(made).total
    permuted = states(teacher=made.signal.logits[torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])])
    assert (SinkhornTerm(1.0)(permuted).total - value).abs() < 1e-12
    assert SinkhornTerm(1.0)(states(teacher=made.hidden_ND.detach())).total > 1e-3


def test_small_epsilon_is_the_best_assignment():
    made = states()
    s, t = (made.hidden_ND.detach() / 2).softmax(-1), (made.signal.logits / 2).softmax(-1)
    D = (s[:, None] - t).abs().sum(-1)
    exact = D[linear_sum_assignment(D)].sum()
    of = lambda e: SinkhornTerm(1.0, RowTransport(2.0, Sinkhorn(epsilon=e, iterations=3000)))(made).total
    assert of(0.1) > of(0.01) > exact - 1e-9
    assert_close(of(0.002), exact, rtol=1e-3, atol=0)


def test_problems_share_the_rows_and_neighbours_part():
    assert [part.tolist() for part in problems(8, 3)] == [[[0, 3, 6], [1, 4, 7]], [[2, 5]]]
    for rows, size in itertools.product(range(1, 20), range(1, 8)):
        parts = problems(rows, size)
        assert sorted(torch.cat([p.flatten() for p in parts]).tolist()) == list(range(rows))
        assert sum(map(len, parts)) == math.ceil(rows / size)
        assert max(p.shape[1] for p in parts) <= size


def test_problems_of_a_size_are_problems_of_their_own():
    made = states()
    z, v = made.hidden_ND, made.signal.logits
    parts = [[0, 3, 6], [1, 4, 7], [2, 5]]
    found = SinkhornTerm(0.5, RowTransport(size=3))(made)
    assert_close(found.total, sum(by_hand(z[p], v[p]) for p in parts), rtol=0, atol=1e-6)
    assert_close(found.mean().item(), found.total.item() * 0.5 / 3)
    one = SinkhornTerm(1.0, RowTransport(size=1))(made)
    assert_close(one.total, ((z / 2).softmax(-1) - (v / 2).softmax(-1)).abs().sum())  # 2 TV a row
    assert one.count == 8


def test_classes_within_each_row():
    made = states()
    s, t = (made.hidden_ND / 2).softmax(-1), (made.signal.logits / 2).softmax(-1)
    cost = lambda i: (s[i][:, None] - t[i][None]).abs()
    expected = sum((ratio_form(cost(i), 0.1, 20) * cost(i)).sum() for i in range(8))
    found = SinkhornTerm(1.0, RowTransport(over="classes"))(made)
    assert_close(found.total, expected, rtol=0, atol=1e-6)
    assert found.count == 8


def test_sequences_are_mean_probabilities():
    made = states((4, 0, 1, 3))
    q, p = (made.hidden_ND / 2).softmax(-1), (made.signal.logits / 2).softmax(-1)
    pool = lambda x: torch.stack([x[:4].mean(0), x[4], x[5:].mean(0)])
    assert_close(sequence_means(q, made.rows), pool(q))
    D = (pool(q)[:, None] - pool(p)).abs().sum(-1)
    found = SinkhornTerm(1.0, of="sequences")(made)
    assert_close(found.total, (ratio_form(D, 0.1, 20) * D).sum(), rtol=0, atol=1e-6)
    assert found.count == 1


def test_one_outcome_has_nothing_to_move():
    made = states(student=normal(8, 1, seed=0), teacher=normal(8, 1, seed=1))
    assert SinkhornTerm(1.0)(made).total == 0


def test_the_teacher_gets_no_gradient():
    v = normal(8, V, seed=4).requires_grad_()
    made = states(teacher=v)
    for term in (SinkhornTerm(1.0), RankingTerm(1.0)):
        term(made).total.backward()
    assert v.grad is None
    cost, _ = RowTransport()(teacher=v.softmax(-1), student=normal(8, V, seed=5).softmax(-1).requires_grad_())
    cost.sum().backward()
    assert v.grad is None


def test_half_precision_is_computed_in_float32():
    made = states(student=normal(8, V, seed=0).bfloat16(), teacher=normal(8, V, seed=1).bfloat16())
    for term in (RankingTerm(), EntropyTerm(), SinkhornTerm()):
        assert term(made).total.dtype == torch.float32


# ---------------------------------------------------------------- in the objective


def test_what_looks_at_the_whole_batch_may_not_be_cut(lm):
    of = lambda *extras: TokenDistillation(*lm, ForwardKL(), optimizer=OptimizerSpec(), seed=0, extras=extras).couples
    assert of() == of(RankingTerm(selection=Opener()), EntropyTerm()) == "position"
    assert of(SinkhornTerm()) == of(EntropyTerm(1.0, EntropyTop(0.5, scope="batch"))) == "batch"


@pytest.fixture
def lm():
    from potstill.models.causal import CausalLM
    from potstill.models.tokenizers import character_tokenizer
    from potstill.teachers import LocalTeacher

    tokenizer = character_tokenizer(["abcdefg "])
    torch.manual_seed(0)
    make = lambda: CausalLM.PACKAGED["llama-tiny"](tokenizer=tokenizer)
    return make(), LocalTeacher(make())


def test_wrong_options_are_said():
    with pytest.raises(RecipeError, match=r"RankingTerm\.k must be at least 1, got 0"):
        RankingTerm(k=0)
    with pytest.raises(RecipeError, match=r"RankingTerm\.variant must be one of paper, code, got 'codes'"):
        RankingTerm(variant="codes")
    with pytest.raises(RecipeError, match=r"SinkhornTerm\.of must be one of positions, sequences"):
        SinkhornTerm(of="rows")
    with pytest.raises(RecipeError, match=r"RowTransport\.over must be one of batch, classes"):
        RowTransport(over="rows")
    with pytest.raises(RecipeError, match=r"RowTransport\.size must be at least 1 row"):
        RowTransport(size=0)
    with pytest.raises(RecipeError, match=r"RowTransport\.temperature must be positive, got 0"):
        RowTransport(temperature=0)
    with pytest.raises(ModelError, match=r"as many student as teacher rows .* got \[3, 3\] and \[2, 3\]"):
        RowTransport()(teacher=torch.ones(2, 3), student=torch.ones(3, 3))


def test_a_teacher_without_logits_is_refused():
    from potstill.contracts.signals import TopKLogp

    made = states()
    made.signal = TopKLogp(torch.zeros(8, 1), torch.zeros(8, 1, dtype=torch.int64))
    for term in (SinkhornTerm(), RankingTerm()):
        with pytest.raises(SignalError, match="needs the teacher's whole logits, and it gives TopKLogp"):
            term(made)
    made.seen = {}
    with pytest.raises(SignalError, match="EntropyTop needs student_entropy_BR"):
        EntropyTerm()(made)
