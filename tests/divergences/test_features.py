"""Features, relations and binary heads against closed forms, invariances and their edges."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity, cross_entropy, layer_norm
from torch.testing import assert_close

from potstill.contracts.errors import ModelError, RecipeError
from potstill.divergences import ForwardKL, JensenShannon, entropy, kl, log_probs
from potstill.divergences.features import (
    attention_transfer,
    bernoulli_kl,
    binary_log_probs,
    cosine_distance,
    exit_loss,
    gram_cosine,
    norm_and_direction,
    normalized_mse,
    relation_angles,
    relation_distances,
    relation_kl,
    similarity_preserving,
    whitened_smooth_l1,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size):
    return torch.linalg.qr(draw(size, size, seed=9))[0]


def test_bernoulli_kl_is_the_forward_kl_of_two_outcomes():
    t, s = draw(3, 4), draw(3, 4, seed=1).requires_grad_()
    pair = lambda x: torch.stack([x, torch.zeros_like(x)], -1).log_softmax(-1)
    value = bernoulli_kl(teacher_logits=t, student_logits=s)
    assert_close(value, ForwardKL()(teacher_logp=pair(t), student_logp=pair(s)))
    assert_close(torch.autograd.grad(value.sum(), s)[0], s.sigmoid() - t.sigmoid())


def test_bernoulli_kl_at_extreme_logits():
    t = torch.tensor([200.0, -200.0, 0.0])
    s = torch.tensor([-200.0, -200.0, 300.0], requires_grad=True)
    value = bernoulli_kl(teacher_logits=t, student_logits=s)
    assert_close(value, torch.tensor([200.0, 0.0, 150 - math.log(2)]))
    assert torch.autograd.grad(value.sum(), s)[0].isfinite().all()
    low = [(3 * draw(9, seed=seed)).bfloat16() for seed in (0, 1)]
    value = bernoulli_kl(teacher_logits=low[0], student_logits=low[1])
    assert value.dtype == torch.float32
    assert_close(value, bernoulli_kl(teacher_logits=low[0].float(), student_logits=low[1].float()))


@settings(max_examples=60, deadline=None)
@given(t=st.floats(-80, 80), s=st.floats(-80, 80))
def test_bernoulli_kl_keeps_its_digits(t, s):
    """Against 80 digits, to the rounding of the four terms that are added: e^-60 is not lost beside 1."""
    with localcontext(prec=80):
        one = Decimal(1)
        p, q = (one / (one + (-Decimal(x)).exp()) for x in (t, s))
        exact = p * (p / q).ln() + (one - p) * ((one - p) / (one - q)).ln()
        rounding = float(-p * (p.ln() + q.ln()) - (one - p) * ((one - p).ln() + (one - q).ln())) * 1e-14
        slope, least = q - p, float(p * (one - q) + q * (one - p)) * 1e-14
    student = torch.tensor(s, dtype=torch.float64, requires_grad=True)
    value = bernoulli_kl(teacher_logits=torch.tensor(t, dtype=torch.float64), student_logits=student)
    assert abs(Decimal(value.item()) - exact) <= Decimal(rounding)
    assert abs(Decimal(torch.autograd.grad(value, student)[0].item()) - slope) <= Decimal(least)


def test_certain_heads():
    inf = math.inf
    teacher = torch.tensor([inf, inf, -inf, 0.0, -inf])
    student = torch.tensor([inf, 1.0, 1.0, inf, -inf], requires_grad=True)
    value = bernoulli_kl(teacher_logits=teacher, student_logits=student)
    assert_close(value, torch.tensor([0.0, math.log1p(math.exp(-1)), math.log1p(math.exp(1)), inf, 0.0]))
    gradient = torch.autograd.grad(value[value.isfinite()].sum(), student)[0]
    assert_close(gradient[[0, 1, 2, 4]], torch.tensor([0.0, 1 / (1 + math.exp(-1)) - 1, 1 / (1 + math.exp(-1)), 0.0]))


def test_binary_heads_serve_any_divergence():
    t, s = draw(6), draw(6, seed=1)
    p, q = t.sigmoid(), s.sigmoid()
    m = (p + q) / 2
    of = lambda a, b: a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()
    value = JensenShannon()(teacher_logp=binary_log_probs(t), student_logp=binary_log_probs(s))
    assert_close(value, (of(p, m) + of(q, m)) / 2)
    bce = binary_cross_entropy_with_logits(s, p, reduction="none")
    assert_close(bernoulli_kl(teacher_logits=t, student_logits=s) + entropy(binary_log_probs(t)), bce)


@pytest.mark.parametrize("loss", [cosine_distance, normalized_mse])
@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_what_has_no_direction_has_no_gradient(loss, scale):
    t = draw(3, 6).float()
    student = torch.full((3, 6), scale, requires_grad=True)
    value = loss(teacher=t, student=student)
    assert_close(value, torch.ones(3))
    assert (torch.autograd.grad(value.sum(), student)[0] == 0).all()
    assert_close(loss(teacher=student.detach(), student=t), torch.ones(3))


@pytest.mark.parametrize("loss", [cosine_distance, normalized_mse])
def test_directions_are_scale_free_down_to_small_ones(loss):
    t, s = draw(5, 6), draw(5, 6, seed=1)
    value = loss(teacher=t, student=s)
    assert_close(loss(teacher=1e-6 * t, student=1e-6 * s), value, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: loss(teacher=t, student=x), s.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: loss(teacher=t, student=x), s)
    low = loss(teacher=t.bfloat16(), student=s.bfloat16())
    assert low.dtype == torch.float32
    assert_close(low, loss(teacher=t.bfloat16().float(), student=s.bfloat16().float()))


# Norm and direction


def test_a_short_student_grows_along_the_class_and_a_long_one_turns():
    """The two branches: gradient -e / |teacher|, or none along the feature itself."""
    teacher, direction = draw(5, 4), draw(5, 4, seed=1)
    e = direction / direction.norm(dim=-1, keepdim=True)
    unit = draw(5, 4, seed=2)
    unit = unit / unit.norm(dim=-1, keepdim=True)
    length = teacher.norm(dim=-1, keepdim=True)
    short = (0.5 * length * unit).requires_grad_()
    value = norm_and_direction(teacher=teacher, student=short, direction=3 * direction)
    assert_close(value, 1 - (short * e).sum(-1) / length[:, 0])
    assert_close(torch.autograd.grad(value.sum(), short)[0], -e / length)
    long = (2.0 * length * unit).requires_grad_()
    value = norm_and_direction(teacher=teacher, student=long, direction=direction)
    assert_close(value, cosine_distance(teacher=direction, student=long))
    gradient = torch.autograd.grad(value.sum(), long)[0]
    assert (gradient * long).sum(-1).abs().max() < 1e-12 and gradient.abs().max() > 1e-3


def test_norm_and_direction_at_its_least_and_its_invariances():
    teacher, direction, student = draw(5, 4), draw(5, 4, seed=1), draw(5, 4, seed=2)
    e = direction / direction.norm(dim=-1, keepdim=True)
    best = norm_and_direction(teacher=teacher, student=teacher.norm(dim=-1, keepdim=True) * e, direction=direction)
    assert_close(best, torch.zeros_like(best))
    value = norm_and_direction(teacher=teacher, student=student, direction=direction)
    assert_close(norm_and_direction(teacher=7 * teacher, student=7 * student, direction=direction), value)
    zero = torch.zeros(2, 4, requires_grad=True)
    nothing = norm_and_direction(teacher=torch.zeros(2, 4), student=zero, direction=direction[:2].float())
    assert_close(nothing, torch.ones(2))
    assert torch.autograd.grad(nothing.sum(), zero)[0].isfinite().all()


# Whitened features and exits


def test_whitened_features_by_a_layer_norm():
    teacher, student = 3 * draw(4, 8) + 5, 3 * draw(4, 8, seed=1)
    target = layer_norm(teacher, (8,), eps=0.0)
    gap = (student - target).abs()
    expected = torch.where(gap < 2, gap**2 / 4, gap - 1).mean(-1)
    assert (gap > 2).any() and (gap < 2).any()
    assert_close(whitened_smooth_l1(teacher=teacher, student=student), expected, rtol=1e-6, atol=1e-6)
    assert_close(whitened_smooth_l1(teacher=teacher, student=target), torch.zeros(4).double(), rtol=0, atol=1e-10)


def test_an_exit_at_gamma_one_is_the_kl_and_the_teachers_entropy():
    t, s, y = draw(4, 5), draw(4, 5, seed=1).requires_grad_(), torch.tensor([0, 3, 4, 1])
    value = exit_loss(teacher_logits=t, student_logits=s, labels=y, temperature=2.0)
    assert_close(value, kl(log_probs(t, 2.0), log_probs(s, 2.0)) + entropy(log_probs(t, 2.0)))
    assert_close(torch.autograd.grad(value.sum(), s)[0], ((s / 2).softmax(-1) - (t / 2).softmax(-1)).detach() / 2)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.4])
def test_exits_by_their_formulas(gamma):
    """With the label's cross-entropy beside it, log q at the label has the weight (1 + p)^gamma."""
    t, s, y = draw(3, 5), draw(3, 5, seed=1), [2, 0, 4]
    p, log_q = t.softmax(-1), s.log_softmax(-1)
    code, paper = [], []
    for b, label in enumerate(y):
        others = [v for v in range(5) if v != label]
        first = -((1 + p[b, label]) ** gamma) * log_q[b, label]
        code.append(first - sum(p[b, v] ** gamma * log_q[b, v] for v in others))
        paper.append(first - sum(p[b, v] * log_q[b, v] for v in others))
    given = {"teacher_logits": t, "student_logits": s, "labels": torch.tensor(y), "gamma": gamma}
    beside = cross_entropy(s, torch.tensor(y), reduction="none")
    assert_close(exit_loss(**given) + beside, torch.stack(code))
    assert_close(exit_loss(**given, form="paper"), torch.stack(paper))


def test_exits_of_certain_heads_and_of_low_precision():
    t = torch.tensor([[-math.inf, 0.0, -math.inf]], requires_grad=True)
    s = torch.tensor([[0.0, 1.0, -math.inf]], requires_grad=True)
    value = exit_loss(teacher_logits=t, student_logits=s, labels=torch.tensor([1]), gamma=1.2)
    assert value.item() == pytest.approx((2**1.2 - 1) * math.log1p(math.exp(-1)), rel=1e-6)
    gradient = torch.autograd.grad(value.sum(), [s, t], allow_unused=True)
    assert gradient[0].isfinite().all() and gradient[1] is None
    low = exit_loss(teacher_logits=t.bfloat16(), student_logits=s.bfloat16(), labels=torch.tensor([1]))
    assert low.dtype == torch.float32


# Relations


def test_gram_cosine_by_its_definition_and_its_invariances():
    t, s = draw(2, 5, 4), draw(2, 5, 3, seed=1)
    expected = torch.stack(
        [1 - cosine_similarity((a @ a.T).flatten(), (b @ b.T).flatten(), dim=0) for a, b in zip(t, s)]
    )
    value = gram_cosine(teacher=t, student=s)
    assert_close(value, expected)
    assert (value > 0).all() and (value < 1).all()
    assert gram_cosine(teacher=t, student=3 * t @ rotation(4)).abs().max() < 1e-12
    assert (gram_cosine(teacher=t, student=t + 1.0) > 1e-3).all()
    apart = torch.eye(4).double()[None, :2], torch.tensor([[[1.0], [0.0]]]).double()
    assert_close(gram_cosine(teacher=apart[1], student=apart[0]), torch.tensor([1 - 0.5**0.5]).double())
    zero = torch.zeros(1, 5, 3, requires_grad=True)
    nothing = gram_cosine(teacher=t[:1].float(), student=zero)
    assert nothing.item() == 1 and (torch.autograd.grad(nothing.sum(), zero)[0] == 0).all()


def heads(seed, width=4):
    return draw(2, 3, 5, width, seed=seed)


def test_relation_kl_by_its_definition():
    """Rows of softmax(Q K^T / sqrt(D)) with each model's own D, forward KL."""
    q_t, k_t, q_s, k_s = heads(0), heads(1), heads(2, 6).requires_grad_(), heads(3, 6)
    value = relation_kl(teacher_queries=q_t, teacher_keys=k_t, student_queries=q_s, student_keys=k_s)
    maps = [(q @ k.mT / d**0.5).softmax(-1) for q, k, d in ((q_t, k_t, 4), (q_s, k_s, 6))]
    assert value.shape == (2, 3, 5)
    assert_close(value, (maps[0] * (maps[0] / maps[1]).log()).sum(-1))
    same = {"teacher_queries": q_t, "teacher_keys": k_t}
    at = q_t.clone().requires_grad_()
    turned = relation_kl(**same, student_queries=at @ rotation(4), student_keys=k_t @ rotation(4))
    assert turned.abs().max() < 1e-12 and torch.autograd.grad(turned.sum(), at)[0].abs().max() < 1e-12


def test_keys_that_do_not_count_reach_nothing():
    keep = torch.tensor([True, True, False, True, False]).expand(2, 3, 5)
    names = ("teacher_queries", "teacher_keys", "student_queries", "student_keys")
    at = {name: heads(i) for i, name in enumerate(names)}
    junk = {k: v.masked_fill(~keep[..., None], 1e30) if "keys" in k else v for k, v in at.items()}
    value = relation_kl(**junk, keep=keep)
    short = {k: v[:, :, keep[0, 0]] for k, v in at.items()}
    assert_close(value[:, :, keep[0, 0]], relation_kl(**short))
    none = relation_kl(**at, keep=torch.zeros(2, 3, 5, dtype=torch.bool))
    assert none.isfinite().all()


def test_relations_of_whole_batches_in_loops():
    t, s = draw(5, 3), draw(5, 2, seed=1)
    huber = lambda x: 0.5 * x**2 if abs(x) < 0.3 else 0.3 * (abs(x) - 0.15)
    distance = lambda x: torch.stack([torch.stack([(a - b).norm() for b in x]) for a in x])
    scaled = [distance(x) / (distance(x).sum() / 20) for x in (t, s)]
    gap = (scaled[1] - scaled[0]).tolist()
    expected = [sum(huber(gap[i][j]) for j in range(5) if j != i) / 4 for i in range(5)]
    assert_close(relation_distances(teacher=t, student=s, delta=0.3), torch.tensor(expected).double())
    assert any(abs(g) > 0.3 for row in gap for g in row)

    def cosine(x, i, j, k):
        a, b = x[j] - x[i], x[k] - x[i]
        return 0.0 if i in (j, k) else float(a @ b / (a.norm() * b.norm()))

    expected = [
        sum(huber(cosine(s, i, j, k) - cosine(t, i, j, k)) for j in range(5) for k in range(5)) / 25 for i in range(5)
    ]
    assert_close(relation_angles(teacher=t, student=s, delta=0.3), torch.tensor(expected).double())
    grams = [x @ x.T for x in (t, s)]
    rows = [g / g.norm(dim=-1, keepdim=True) for g in grams]
    value = similarity_preserving(teacher=t, student=s)
    assert_close(value, ((rows[1] - rows[0]) ** 2).sum(-1))


@pytest.mark.parametrize("relation", [relation_distances, relation_angles, similarity_preserving])
def test_half_coincident_and_zero_rows(relation):
    """In float32, far from the origin: rounding must not make a distance out of nothing."""
    base = draw(3, 4).float() + 100
    student = torch.cat([base, base, torch.zeros(1, 4)]).requires_grad_()
    value = relation(teacher=draw(7, 4).float(), student=student)
    gradient = torch.autograd.grad(value.sum(), student)[0]
    assert value.isfinite().all() and gradient.isfinite().all() and gradient.abs().max() < 1e3


@pytest.mark.parametrize("relation", [relation_distances, relation_angles, similarity_preserving, gram_cosine])
def test_relations_keep_float32_under_autocast_and_promote(relation):
    t, s = draw(6, 4).float(), draw(6, 3, seed=1).float()
    value = relation(teacher=t, student=s)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(relation(teacher=t, student=s), value)
    assert relation(teacher=t.bfloat16(), student=s.bfloat16()).dtype == torch.float32
    assert_close(
        relation(teacher=t.bfloat16(), student=s.bfloat16()),
        relation(teacher=t.bfloat16().float(), student=s.bfloat16().float()),
    )
    with torch.autocast("cpu", torch.bfloat16):
        rows = {"teacher_queries": t, "teacher_keys": t, "student_queries": s, "student_keys": s}
        inside = relation_kl(**rows)
    assert_close(inside, relation_kl(**rows))


def test_double_backward_is_right_or_refused():
    t, s = draw(4, 3), draw(4, 2, seed=1).requires_grad_()
    for relation in (relation_angles, similarity_preserving, gram_cosine):
        assert torch.autograd.gradgradcheck(lambda x, relation=relation: relation(teacher=t, student=x), s)
    first = torch.autograd.grad(relation_distances(teacher=t, student=s).sum(), s, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="not implemented"):
        first.sum().backward()


def test_cosine_and_normalised_mse():
    t, s = draw(5, 6), draw(5, 6, seed=1)
    expected = 1 - cosine_similarity(s, t, dim=-1)
    assert_close(cosine_distance(teacher=t, student=3 * s), expected)
    assert_close(normalized_mse(teacher=2 * t, student=s), 2 * expected)
    zero = torch.zeros(1, 6, requires_grad=True)
    value = cosine_distance(teacher=t[:1].float(), student=zero)
    assert value.item() == 1.0
    assert torch.autograd.grad(value.sum(), zero)[0].isfinite().all()


def test_attention_transfer_by_hand():
    """Two places, one channel: maps (1, 4) and (1, 1), of length 1 each."""
    t, s = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2), torch.tensor([1.0, 1.0]).view(1, 1, 1, 2)
    a, b = (1 / 17**0.5, 4 / 17**0.5), (0.5**0.5, 0.5**0.5)
    expected = (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2
    assert attention_transfer(teacher=t, student=s).item() == pytest.approx(expected, rel=1e-6)
    low = [draw(2, 8, 3, 3, seed=seed).bfloat16() for seed in (0, 1)]
    exact = attention_transfer(teacher=low[0].float(), student=low[1].float())
    assert_close(attention_transfer(teacher=low[0], student=low[1]), exact)
    wide = s.expand(1, 3, 1, 2)
    assert_close(attention_transfer(teacher=t, student=5 * wide), attention_transfer(teacher=t, student=s))


@pytest.mark.parametrize("relation", [relation_distances, relation_angles, similarity_preserving])
def test_relations_are_kept_by_a_rotation_and_a_scale(relation):
    x = draw(6, 4)
    moved = 3 * x @ rotation(4)
    assert relation(teacher=x, student=moved).abs().max() < 1e-12
    other = relation(teacher=x, student=draw(6, 2, seed=1))
    assert other.shape == (6,) and (other > 0).all()
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    assert_close(relation(teacher=x[order], student=draw(6, 2, seed=1)[order]), other[order])


@pytest.mark.parametrize("relation", [relation_distances, relation_angles])
def test_relations_do_not_see_where_the_batch_lies(relation):
    x, y = draw(6, 4), draw(6, 3, seed=1)
    assert_close(relation(teacher=x, student=y + 5), relation(teacher=x, student=y))


def test_relation_distances_by_hand():
    """Points 0, 1, 3 on a line have distances 1, 3, 2 with mean 2; a triangle of equal sides has 1, 1, 1."""
    line = torch.tensor([[0.0], [1.0], [3.0]])
    even = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]])
    gaps = {(0, 1): 0.5 - 1, (0, 2): 1.5 - 1, (1, 2): 1.0 - 1}
    expected = [sum(0.5 * g**2 for pair, g in gaps.items() if i in pair) / 2 for i in range(3)]
    assert_close(relation_distances(teacher=line, student=even), torch.tensor(expected))


def test_relation_angles_by_hand():
    """A right angle at the first point against a straight line through it: cosines 0 and -1."""
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    line = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    at_first = 2 * 0.5 * 1.0**2 / 9  # the pair (j, k) and (k, j) of nine
    assert relation_angles(teacher=corner, student=line)[0].item() == pytest.approx(at_first, rel=1e-6)


def test_similarity_preserving_by_hand():
    t, s = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    root = 0.5**0.5
    expected = [(1 - root) ** 2 + root**2, root**2 + (1 - root) ** 2]
    assert_close(similarity_preserving(teacher=t, student=s), torch.tensor(expected))


@pytest.mark.parametrize("relation", [relation_distances, relation_angles, similarity_preserving])
def test_coincident_rows_have_finite_gradients(relation):
    student = torch.ones(4, 3, requires_grad=True)
    value = relation(teacher=draw(4, 3).float(), student=student)
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), student)[0].isfinite().all()
    moved = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: relation(teacher=draw(4, 2), student=x), moved)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bernoulli_kl(teacher_logits=draw(2), student_logits=draw(3)), "bernoulli_kl compares equal shapes"),
        (lambda: cosine_distance(teacher=draw(2, 3), student=draw(2, 4)), "Project one to the width"),
        (lambda: relation_angles(teacher=draw(2, 3), student=draw(3, 3)), "two batches of equal size"),
        (lambda: attention_transfer(teacher=draw(2, 3, 4, 4), student=draw(2, 3, 2, 4)), "one height and width"),
        (lambda: gram_cosine(teacher=draw(2, 3, 4), student=draw(2, 2, 4)), r"groups of as many rows"),
        (
            lambda: relation_kl(
                teacher_queries=draw(3, 2), teacher_keys=draw(3, 2), student_queries=draw(4, 2), student_keys=draw(4, 2)
            ),
            r"heads of as many tokens.*teacher \[3, 2\] and \[3, 2\], of student \[4, 2\]",
        ),
        (
            lambda: exit_loss(teacher_logits=draw(2, 3), student_logits=draw(2, 3), labels=torch.zeros(3).long()),
            r"one label a position, \[2\], got \[3\]. Give the likeliest class",
        ),
        (
            lambda: norm_and_direction(teacher=draw(2, 3), student=draw(2, 3), direction=draw(1, 3)),
            "norm_and_direction compares equal shapes",
        ),
    ],
)
def test_wrong_shapes_are_said(call, message):
    with pytest.raises(ModelError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.0}, "gamma must be positive, got 0"),
        ({"form": "text"}, "form must be 'code' or 'paper', got 'text'"),
    ],
)
def test_wrong_options_are_said(options, message):
    with pytest.raises(RecipeError, match=message):
        exit_loss(teacher_logits=draw(2, 3), student_logits=draw(2, 3), labels=torch.zeros(2).long(), **options)
    with pytest.raises(RecipeError, match="beta must be positive, got 0"):
        whitened_smooth_l1(teacher=draw(2, 3), student=draw(2, 3), beta=0.0)
