"""Statistics against enumeration of their pairs and tuples, against expectations in closed form, and their invariances."""

import itertools
import math

import numpy as np
import pytest
import torch
from pydantic import BaseModel, TypeAdapter
from sklearn.metrics.pairwise import laplacian_kernel, polynomial_kernel, rbf_kernel
from torch import Tensor
from torch.testing import assert_close

from potstill.contracts.errors import DataError, ModelError, RecipeError
from potstill.contracts.spec import Part, written
from potstill.divergences.kernels import (
    Gaussian,
    Kernel,
    Laplacian,
    Linear,
    Polynomial,
    RationalQuadratic,
    cka,
    hsic,
    median_off_diagonal,
    mmd2,
    squared_distances,
)

KERNELS = [Linear(), Polynomial(), Gaussian(), Gaussian(bandwidth=1.5), Laplacian(), RationalQuadratic(alpha=0.5)]
kernels = pytest.mark.parametrize("kernel", KERNELS, ids=repr)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grad(value: Tensor, *at: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value.sum(), at)


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


# Kernels


def test_kernels_by_scikit_learn():
    x = normal(7, 3, seed=0)
    twin = lambda gram: torch.from_numpy(gram)
    assert_close(Polynomial(degree=2, offset=0.5)(x), twin(polynomial_kernel(x, degree=2, coef0=0.5)))
    h = (0.6, 3.0)
    expected = sum(rbf_kernel(x, gamma=1 / (2 * s**2)) for s in h)
    assert_close(Gaussian(scales=(0.3, 1.5), bandwidth=2.0)(x), twin(expected))
    expected = sum(laplacian_kernel(x, gamma=1 / s) for s in h)
    assert_close(Laplacian(scales=(0.3, 1.5), bandwidth=2.0)(x), twin(expected))
    square = torch.cdist(x, x).square()
    expected = (1 + square / (2 * 0.5 * 0.36)) ** -0.5 + (1 + square / (2 * 0.5 * 9)) ** -0.5
    assert_close(RationalQuadratic(alpha=0.5, scales=(0.3, 1.5), bandwidth=2.0)(x), expected)
    assert_close(Linear()(x), (x - x[0]) @ (x - x[0]).T)


def test_a_rational_quadratic_of_large_alpha_is_the_gaussian():
    x = normal(5, 3, seed=0)
    assert_close(RationalQuadratic(alpha=1e7)(x), Gaussian(scales=(1.0,))(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [Gaussian, Laplacian, RationalQuadratic])
def test_the_default_bandwidth_is_the_median_distance(kernel):
    x = normal(2, 6, 3, seed=0)
    for group in range(2):
        gap = np.abs(x[group].numpy()[:, None] - x[group].numpy()[None])[np.triu_indices(6, 1)]
        distance = gap.sum(-1) if kernel is Laplacian else np.sqrt((gap**2).sum(-1))
        assert len(distance) % 2 == 1  # an odd number has one median
        assert_close(kernel()(x)[group], kernel(bandwidth=float(np.median(distance)))(x[group]))


def test_no_gradient_passes_through_the_bandwidth():
    x = normal(6, 3, seed=0).requires_grad_()
    with torch.no_grad():
        h = median_off_diagonal(squared_distances(x)).sqrt().item()
    assert_close(grad(Gaussian()(x), x), grad(Gaussian(bandwidth=h)(x), x))


def test_the_median_falls_back_where_it_is_zero():
    distance = torch.tensor([[0.0, 0, 0], [0, 0, 3], [0, 3, 0]])
    assert median_off_diagonal(distance).item() == 1  # the mean of 0, 0 and 3
    assert median_off_diagonal(torch.zeros(4, 4)).item() == 1
    assert median_off_diagonal(torch.tensor([[9.0, 2.0], [2.0, 9.0]])).item() == 2


@kernels
def test_gram_matrices_are_positive(kernel):
    gram = kernel(normal(2, 8, 3, seed=0))
    assert gram.shape == (2, 8, 8)
    assert_close(gram, gram.mT)
    assert torch.linalg.eigvalsh(gram).min() > -1e-9


@kernels
@pytest.mark.parametrize("unbiased", [True, False])
def test_gradients_are_finite_at_coincident_rows(kernel, unbiased):
    """In float32, where rounding may make a squared distance negative, and with half or all of the rows equal."""
    for student in (normal(5, 4, seed=0).float(), torch.ones(5, 4)):
        teacher = torch.cat([student[:1].expand(6, 4), student])
        student = student.clone().requires_grad_()
        value = mmd2(teacher=teacher, student=student, kernel=kernel, unbiased=unbiased)
        value = value + hsic(teacher=teacher[6:], student=student, kernel=kernel, unbiased=unbiased)
        value = value + cka(teacher=teacher[6:], student=student, kernel=kernel, unbiased=unbiased)
        assert value.isfinite() and grad(value, student)[0].isfinite().all()


@kernels
def test_derivatives_by_finite_differences(kernel):
    """Bandwidths are fixed here: no gradient passes through a median."""
    if hasattr(kernel, "bandwidth"):
        kernel = type(kernel)(bandwidth=1.3)
    x, y = normal(4, 2, seed=0).requires_grad_(), normal(4, 2, seed=1).requires_grad_()
    for of in (mmd2, hsic, cka):
        for unbiased in (True, False):
            value = lambda x, y, of=of, unbiased=unbiased: of(teacher=y, student=x, kernel=kernel, unbiased=unbiased)
            assert torch.autograd.gradcheck(value, (x, y))
            if not isinstance(kernel, Laplacian):
                assert torch.autograd.gradgradcheck(value, (x, y))
    if isinstance(kernel, Laplacian):
        (first,) = torch.autograd.grad(mmd2(teacher=y, student=x, kernel=kernel), x, create_graph=True)
        with pytest.raises(RuntimeError, match="not implemented"):  # refused, not wrong
            first.sum().backward()


# MMD


@kernels
def test_mmd_by_enumeration_of_pairs(kernel):
    student, teacher = normal(4, 3, seed=0), normal(6, 3, seed=1) + 0.5
    gram = kernel(torch.cat([student, teacher])).numpy()
    s, t = range(4), range(4, 10)
    for unbiased in (True, False):
        mean = lambda a, b, u=unbiased: np.mean([gram[i, j] for i in a for j in b if i != j or not u])
        value = mmd2(teacher=teacher, student=student, kernel=kernel, unbiased=unbiased)
        assert value.item() == pytest.approx(mean(s, s) + mean(t, t) - 2 * mean(s, t), rel=1e-9)


@kernels
def test_mmd_is_symmetric_and_the_biased_is_zero_between_equals(kernel):
    x, y = normal(5, 3, seed=0), normal(7, 3, seed=1)
    for unbiased in (True, False):
        both = [mmd2(teacher=a, student=b, kernel=kernel, unbiased=unbiased) for a, b in ((x, y), (y, x))]
        assert_close(*both)
    assert abs(mmd2(teacher=x.flip(0), student=x, kernel=kernel, unbiased=False)) < 1e-12
    assert mmd2(teacher=y, student=x, kernel=kernel, unbiased=False) > 1e-2
    assert mmd2(teacher=x.flip(0), student=x, kernel=kernel) < 0  # unbiased, so it must fall below 0 too


@kernels
def test_unbiased_mmd_is_right_on_average_over_every_sample(kernel):
    """All samples of two students and two teachers, drawn from three points, weighted: the population's MMD^2."""
    points, p, q = (
        normal(3, 2, seed=0),
        torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64),
    )
    if hasattr(kernel, "bandwidth"):
        kernel = type(kernel)(bandwidth=1.0)
    points = points - points[0]  # the linear kernel's origin
    gram = kernel(points)
    gap = p - q
    expected = gap @ gram @ gap
    mean = {True: 0.0, False: 0.0}
    for i, j, k, l in itertools.product(range(3), repeat=4):
        weight = (q[i] * q[j] * p[k] * p[l]).item()
        for unbiased in mean:
            value = mmd2(teacher=points[[k, l]], student=points[[i, j]], kernel=kernel, unbiased=unbiased)
            mean[unbiased] += weight * value.item()
    assert mean[True] == pytest.approx(expected.item(), rel=1e-9)
    assert mean[False] > expected + 1e-2


def test_linear_mmd_is_the_squared_distance_of_means():
    """Eq. 3 and its bias, tr Cov / B of both samples; the unbiased gradient uses the leave-one-out mean, (3u)."""
    student, teacher = normal(4, 3, seed=0).requires_grad_(), normal(9, 3, seed=1)
    of = lambda unbiased: mmd2(teacher=teacher, student=student, kernel=Linear(), unbiased=unbiased)
    gap = student.mean(0) - teacher.mean(0)
    assert_close(of(False), gap.square().sum())
    noise = student.var(0).sum() / 4 + teacher.var(0).sum() / 9
    assert_close(of(True), gap.square().sum() - noise)
    assert_close(grad(of(False), student)[0], (2 / 4 * gap.detach()).expand(4, 3))
    others = (student.sum(0) - student) / 3
    assert_close(grad(of(True), student)[0], 2 / 4 * (others - teacher.mean(0)).detach())


def test_gaussian_mmd_between_gaussians():
    """E k(x, y) = det(I + S / s^2)^(-1/2) exp(-d' (S + s^2 I)^-1 d / 2), d the gap, S the sum of covariances."""
    s, shift, spread = 0.8, torch.tensor([0.5, -0.3]).double(), torch.tensor([1.3, 0.6]).double()

    def expected_kernel(d: Tensor, covariance: Tensor) -> Tensor:
        return (1 + covariance / s**2).prod() ** -0.5 * (-0.5 * (d**2 / (covariance + s**2)).sum()).exp()

    zero, one = torch.zeros(2).double(), torch.ones(2).double()
    exact = (
        expected_kernel(zero, 2 * one)
        + expected_kernel(zero, 2 * spread**2)
        - 2 * expected_kernel(shift, one + spread**2)
    )
    student, teacher = normal(400, 50, 2, seed=0), shift + spread * normal(400, 50, 2, seed=1)
    draws = mmd2(teacher=teacher, student=student, kernel=Gaussian(scales=(1.0,), bandwidth=s))
    assert draws.shape == (400,)
    error = draws.std() / 20
    assert error < exact / 10
    assert abs(draws.mean() - exact) < 4 * error
    same = mmd2(teacher=normal(400, 50, 2, seed=2), student=student, kernel=Gaussian(scales=(1.0,), bandwidth=s))
    assert abs(same.mean()) < 4 * same.std() / 20


@kernels
def test_groups_are_batches_of_their_own(kernel):
    x, y = normal(2, 3, 5, 4, seed=0), normal(2, 3, 6, 4, seed=1)
    value = mmd2(teacher=y, student=x, kernel=kernel)
    assert value.shape == (2, 3)
    assert_close(value[1, 2], mmd2(teacher=y[1, 2], student=x[1, 2], kernel=kernel))
    assert_close(cka(teacher=y[..., :5, :], student=x)[1, 2], cka(teacher=y[1, 2, :5], student=x[1, 2]))


def test_mmd_knows_no_axes_and_with_the_median_no_scale():
    x, y = normal(5, 3, seed=0), normal(7, 3, seed=1)
    value = mmd2(teacher=y, student=x)
    turn = rotation(3, seed=2)
    assert_close(mmd2(teacher=5 * y @ turn + 2, student=5 * x @ turn + 2), value)
    assert_close(mmd2(teacher=y + 2, student=x + 2, kernel=Linear()), mmd2(teacher=y, student=x, kernel=Linear()))


# HSIC


def hsic_by_tuples(k: Tensor, l: Tensor) -> float:
    """Mean over distinct i, j, q, r of k_ij l_ij + k_ij l_qr - 2 k_ij l_iq: the U-statistic as it is defined."""
    terms = [
        k[i, j] * l[i, j] + k[i, j] * l[q, r] - 2 * k[i, j] * l[i, q]
        for i, j, q, r in itertools.permutations(range(len(k)), 4)
    ]
    return float(sum(terms) / len(terms))


@kernels
@pytest.mark.parametrize("n", [4, 6])
def test_unbiased_hsic_by_enumeration_of_tuples(kernel, n):
    x, y = normal(n, 3, seed=0), normal(n, 2, seed=1)
    expected = hsic_by_tuples(kernel(x), Linear()(y))
    value = hsic(teacher=y, student=x, kernel=kernel, teacher_kernel=Linear(), unbiased=True)
    assert value.item() == pytest.approx(expected, rel=1e-9)


@kernels
def test_biased_hsic_by_its_matrices(kernel):
    x, y = normal(6, 3, seed=0), normal(6, 2, seed=1)
    h = torch.eye(6) - torch.full((6, 6), 1 / 6).double()
    k, l = kernel(x), kernel(y)
    assert_close(hsic(teacher=y, student=x, kernel=kernel), (k @ h @ l @ h).trace() / 25)


def test_kernels_are_gaussian_unless_said_and_linear_for_cka():
    x, y = normal(6, 3, seed=0), normal(6, 3, seed=1)
    assert_close(mmd2(teacher=y, student=x), mmd2(teacher=y, student=x, kernel=Gaussian()))
    assert_close(hsic(teacher=y, student=x), hsic(teacher=y, student=x, kernel=Gaussian()))
    assert_close(cka(teacher=y, student=x), cka(teacher=y, student=x, kernel=Linear()))


def test_linear_hsic_is_the_cross_covariance():
    x, y = normal(6, 3, seed=0), normal(6, 2, seed=1)
    cross = (x - x.mean(0)).T @ (y - y.mean(0)) / 5
    assert_close(hsic(teacher=y, student=x, kernel=Linear()), cross.square().sum())


def test_unbiased_hsic_is_right_on_average_over_every_sample():
    """All samples of four pairs from a 2 x 2 table: the population's HSIC, here the squared covariance."""
    table = torch.tensor([[0.4, 0.1], [0.2, 0.3]], dtype=torch.float64)
    covariance = (table[1, 1] - table[1].sum() * table[:, 1].sum()).item()
    mean = 0.0
    for cells in itertools.product(range(4), repeat=4):
        x, y = (torch.tensor([c // 2 for c in cells]), torch.tensor([c % 2 for c in cells]))
        weight = table[x, y].prod().item()
        mean += (
            weight
            * hsic(teacher=y[:, None].double(), student=x[:, None].double(), kernel=Linear(), unbiased=True).item()
        )
    assert mean == pytest.approx(covariance**2, rel=1e-9)


# CKA


def test_linear_cka_by_features():
    """|Y'X|_F^2 / (|X'X|_F |Y'Y|_F) of centred features."""
    x, y = normal(9, 4, seed=0), normal(9, 3, seed=1)
    xc, yc = x - x.mean(0), y - y.mean(0)
    expected = (yc.T @ xc).norm() ** 2 / ((xc.T @ xc).norm() * (yc.T @ yc).norm())
    assert_close(cka(teacher=y, student=x), expected)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel", [Linear(), Gaussian(), Laplacian(), RationalQuadratic()], ids=repr)
def test_cka_knows_no_scale_offset_or_order(kernel, unbiased):
    x, y = normal(8, 4, seed=0), normal(8, 3, seed=1)
    of = lambda a, b: cka(teacher=b, student=a, kernel=kernel, unbiased=unbiased)
    value = of(x, y)
    assert 1e-3 < value.abs() < 0.9
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert_close(of(7 * x + 2, y / 3 - 1), value)
    assert_close(of(x[order], y[order]), value)
    assert_close(of(y, x), value)
    assert_close(of(x, x), torch.tensor(1.0).double())
    if not isinstance(kernel, Laplacian):  # L1 distances know axes
        turned = x @ rotation(4, seed=2)
        assert_close(of(turned, y), value)
        assert_close(of(turned, x), torch.tensor(1.0).double())
        assert (
            of(x @ torch.diag(torch.tensor([1.0, 2, 4, 8])).double(), y) - value
        ).abs() > 1e-3  # no general linear map


def test_unbiased_cka_of_independent_views_is_about_zero_where_the_biased_is_not():
    x, y = normal(200, 8, 50, seed=0), normal(200, 8, 50, seed=1)
    assert cka(teacher=y, student=x).mean() > 0.8
    unbiased = cka(teacher=y, student=x, unbiased=True)
    assert unbiased.abs().mean() < 0.2 and abs(unbiased.mean()) < 4 * unbiased.std() / 200**0.5


def test_minibatches_agree_with_the_whole_on_average():
    """The HSICs are averaged before the quotient (arXiv 2010.15327), not the quotients after."""
    x = normal(2000, 5, seed=0)
    y = x @ normal(5, 4, seed=1) + 2 * normal(2000, 4, seed=2)
    whole = cka(teacher=y, student=x, unbiased=True)
    for size in (5, 20):
        batches = {"teacher": y.view(-1, size, 4), "student": x.view(-1, size, 5)}
        value = cka(**batches, unbiased=True, minibatches=True)
        assert value.shape == ()
        assert_close(value, whole, atol=0.03, rtol=0)
        each = {
            name: hsic(teacher=batches[t], student=batches[s], kernel=Linear(), unbiased=True).mean()
            for name, t, s in (
                ("both", "teacher", "student"),
                ("own", "student", "student"),
                ("other", "teacher", "teacher"),
            )
        }
        assert_close(value, each["both"] / (each["own"] * each["other"]).sqrt())
    small = {"teacher": y.view(-1, 5, 4), "student": x.view(-1, 5, 5)}
    assert cka(**small, minibatches=True) > whole + 0.1  # biased, the size of the batches shows


@pytest.mark.parametrize("kernel", [Linear(), Gaussian(), Polynomial()], ids=repr)
@pytest.mark.parametrize("unbiased", [True, False])
def test_a_constant_view_resembles_nothing(kernel, unbiased):
    x, constant = normal(6, 3, seed=0).float(), torch.full((6, 3), 0.1, requires_grad=True)
    value = cka(teacher=x, student=constant, kernel=kernel, unbiased=unbiased)
    assert value.item() == 0
    assert torch.equal(grad(value, constant)[0], torch.zeros(6, 3))


def test_far_from_the_origin_float32_still_sees_the_difference():
    x, y = normal(6, 3, seed=0), normal(6, 3, seed=1)
    x, y = (x + 1000).float(), (y + 1000).float()
    for of in (mmd2, hsic, cka):
        for kernel in (Linear(), Gaussian()):
            in_double = of(teacher=y.double(), student=x.double(), kernel=kernel)
            assert_close(of(teacher=y, student=x, kernel=kernel).double(), in_double, rtol=1e-4, atol=1e-5)


def test_a_small_deviation_from_constant_is_still_a_view():
    """A Gaussian much wider than the sample: its Gram matrix is 1 up to 1e-4, and tends to the linear kernel's."""
    x, y, wide = normal(6, 3, seed=0), normal(6, 3, seed=1), Gaussian(scales=(1.0,), bandwidth=100.0)
    assert_close(
        cka(teacher=y.float(), student=x.float(), kernel=wide), cka(teacher=y, student=x).float(), rtol=1e-2, atol=0
    )


# Input


@kernels
def test_half_precision_and_autocast_compute_in_float32(kernel):
    x, y = normal(5, 3, seed=0).bfloat16().requires_grad_(), normal(5, 3, seed=1).bfloat16()
    for of in (mmd2, hsic, cka):
        expected = of(teacher=y.float(), student=x.float(), kernel=kernel)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = of(teacher=y, student=x, kernel=kernel)
        assert value.dtype == torch.float32
        assert_close(value, expected)
        assert grad(value, x)[0].dtype == torch.bfloat16


class Recipe(BaseModel):
    kernel: Part(Kernel) = Gaussian()


def test_kernels_are_parts_of_a_recipe():
    recipe = TypeAdapter(Recipe).validate_python({"kernel": {"name": "Gaussian", "scales": [1, 2], "bandwidth": 0.5}})
    assert recipe.kernel == Gaussian(scales=(1, 2), bandwidth=0.5)
    assert written(Polynomial(degree=2)) == {"name": "Polynomial", "degree": 2, "offset": 1.0}
    assert hash(Gaussian(scales=[1.0, 2.0])) == hash(Gaussian(scales=(1.0, 2.0)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Gaussian(scales=()), r"Gaussian.scales must be one or more positive numbers, got \[\]"),
        (
            lambda: Laplacian(scales=(1.0, 0.0)),
            r"Laplacian.scales must be one or more positive numbers, got \[1.0, 0.0\]",
        ),
        (lambda: Gaussian(bandwidth=0.0), "Gaussian.bandwidth must be positive, got 0.0. Leave it out"),
        (lambda: Gaussian(bandwidth=math.nan), "Gaussian.bandwidth must be positive, got nan"),
        (lambda: RationalQuadratic(alpha=0.0), "RationalQuadratic.alpha must be positive, got 0.0"),
        (lambda: Polynomial(degree=0), "degree >= 1 and offset >= 0, got 0 and 1.0"),
        (lambda: Polynomial(offset=-1.0), "degree >= 1 and offset >= 0, got 3 and -1.0"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


def test_batches_that_are_too_small_are_refused():
    one, two, three = (torch.ones(n, 2) for n in (1, 2, 3))
    with pytest.raises(DataError, match="mmd2 needs at least 2 student rows, got 1.*or take unbiased=False"):
        mmd2(teacher=two, student=one)
    with pytest.raises(DataError, match="mmd2 needs at least 2 teacher rows, got 1"):
        mmd2(teacher=one, student=two)
    assert mmd2(teacher=one, student=one, unbiased=False).item() == 0
    with pytest.raises(DataError, match=r"mmd2 needs at least 1 student rows, got 0. Raise the batch size\.$"):
        mmd2(teacher=one, student=torch.ones(0, 2), unbiased=False)
    for of in (hsic, cka):
        with pytest.raises(
            DataError, match=rf"{of.__name__} needs at least 2 student rows, got 1. Raise the batch size\.$"
        ):
            of(teacher=one, student=one)
        with pytest.raises(DataError, match="needs at least 4 student rows, got 3.*or take unbiased=False"):
            of(teacher=three, student=three, unbiased=True)
    with pytest.raises(DataError, match="median distance needs at least two rows, got one. Give bandwidth a number"):
        Gaussian()(one)


def test_shapes_are_checked():
    with pytest.raises(ModelError, match=r"rows of equal width, got student \[3, 4\] and teacher \[3, 5\]. Project"):
        mmd2(teacher=torch.ones(3, 5), student=torch.ones(3, 4))
    with pytest.raises(ModelError, match=r"mmd2 takes rows of features \[\*G, N, D\], got student \[3\]. Flatten"):
        mmd2(teacher=torch.ones(3, 5), student=torch.ones(3))
    for of in (hsic, cka):
        with pytest.raises(ModelError, match=r"two views of the same rows, got student \[3, 4\] and teacher \[2, 4\]"):
            of(teacher=torch.ones(2, 4), student=torch.ones(3, 4))
