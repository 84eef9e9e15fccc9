"""Features, relations and binary heads against closed forms, invariances and their edges."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

from potstill.contracts.errors import ModelError
from potstill.divergences import ForwardKL
from potstill.divergences.features import (
    attention_transfer,
    bernoulli_kl,
    cosine_distance,
    normalized_mse,
    relation_angles,
    relation_distances,
    similarity_preserving,
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
    assert bernoulli_kl(teacher_logits=t.bfloat16(), student_logits=s.bfloat16()).dtype == torch.float32


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
    value = relation(teacher=torch.randn(4, 3), student=student)
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
    ],
)
def test_wrong_shapes_are_said(call, message):
    with pytest.raises(ModelError, match=message):
        call()
