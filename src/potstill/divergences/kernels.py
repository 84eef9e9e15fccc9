"""Batches compared through kernels: MMD between two samples, HSIC and CKA between two views of the same samples.

Every value couples the rows of a batch: it depends on who else is in it, and the batch may not be cut into micro-batches.
Nothing is detached but bandwidths: detach the teacher's rows. B student rows, C teacher rows, N rows of either kind or
both, D and E features, G groups (any leading shape), each with a value of its own. Float32 or better, under autocast too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from potstill.contracts.errors import DataError, ModelError, RecipeError
from potstill.contracts.spec import Part


class Kernel:
    """Base: `kernel(x)` is the Gram matrix of a sample, [*G, N, D] -> [*G, N, N]; two samples are joined into one."""

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError


Part(Kernel)


@dataclass(frozen=True)
class Linear(Kernel):
    """<x, y> with the sample's first row as origin, which no value here depends on: MMD^2 is that of the means."""

    def __call__(self, x: Tensor) -> Tensor:
        return _gram(_from_first(x))


@dataclass(frozen=True)
class Polynomial(Kernel):
    """(<x, y> / D + offset)^degree: moments up to the degree. The defaults are those of KID (arXiv 1801.01401)."""

    degree: int = 3
    offset: float = 1.0

    def __post_init__(self) -> None:
        if self.degree < 1 or not self.offset >= 0:
            raise RecipeError(
                f"Polynomial is a kernel for degree >= 1 and offset >= 0, got {self.degree} and {self.offset}."
            )

    def __call__(self, x: Tensor) -> Tensor:
        return (_gram(x) / x.shape[-1] + self.offset) ** self.degree


@dataclass(frozen=True)
class Gaussian(Kernel):
    """Summed over the scales s: exp(-|x - y|^2 / (2 s^2 h^2)), h = bandwidth, or else the sample's median distance."""

    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        _check_scales(self, self.scales, self.bandwidth)

    def __call__(self, x: Tensor) -> Tensor:
        square = squared_distances(x)
        unit = median_off_diagonal(square) if self.bandwidth is None else self.bandwidth**2
        return _total((square / (-2 * s**2 * unit)).exp() for s in self.scales)


@dataclass(frozen=True)
class Laplacian(Kernel):
    """Summed over the scales s: exp(-|x - y|_1 / (s h)), h = bandwidth, or else the sample's median L1 distance.

    Once differentiable; at coincident rows with gradient 0, the mean of the two sides.
    """

    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        _check_scales(self, self.scales, self.bandwidth)

    def __call__(self, x: Tensor) -> Tensor:
        distance = torch.cdist(x, x, p=1.0)
        unit = median_off_diagonal(distance) if self.bandwidth is None else self.bandwidth
        return _total((distance / (-s * unit)).exp() for s in self.scales)


@dataclass(frozen=True)
class RationalQuadratic(Kernel):
    """Summed over the scales s: (1 + |x - y|^2 / (2 alpha s^2 h^2))^-alpha: Gaussians of all widths at once, tails heavy."""

    alpha: float = 1.0
    scales: tuple[float, ...] = (1.0,)
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        _check_scales(self, self.scales, self.bandwidth)
        if not self.alpha > 0:
            raise RecipeError(f"RationalQuadratic.alpha must be positive, got {self.alpha}.")

    def __call__(self, x: Tensor) -> Tensor:
        square = squared_distances(x)
        unit = median_off_diagonal(square) if self.bandwidth is None else self.bandwidth**2
        return _total((1 + square / (2 * self.alpha * s**2 * unit)) ** -self.alpha for s in self.scales)


def squared_distances(x: Tensor) -> Tensor:
    """|x_i - x_j|^2, [*G, N, D] -> [*G, N, N]; differentiable at coincident rows, and twice."""
    inner = _gram(_from_first(x))
    norm = inner.diagonal(dim1=-2, dim2=-1)
    return norm.unsqueeze(-1) + norm.unsqueeze(-2) - 2 * inner


def median_off_diagonal(distance: Tensor) -> Tensor:
    """Median over the pairs i < j, [*G, N, N] -> [*G, 1, 1], detached (of an even number the lower of the middle two).

    Where half of the pairs coincide it is their mean, where all do 1: a bandwidth is never 0.
    """
    if distance.shape[-1] < 2:
        raise DataError(
            "A bandwidth from the median distance needs at least two rows, got one. Give bandwidth a number."
        )
    N = distance.shape[-1]
    i, j = torch.triu_indices(N, N, 1, device=distance.device)
    pairs = distance.detach()[..., i, j]
    median, mean = pairs.median(-1).values, pairs.mean(-1)
    typical = torch.where(median > 0, median, torch.where(mean > 0, mean, 1.0))
    return typical[..., None, None]


def mmd2(*, teacher: Tensor, student: Tensor, kernel: Kernel | None = None, unbiased: bool = True) -> Tensor:
    """Squared maximum mean discrepancy, [*G, C, D] and [*G, B, D] -> [*G]: one value a group.

        mean k(s, s') + mean k(t, t') - 2 mean k(s, t)

    unbiased: pairs of a row with itself are left out (U-statistic), so that equal laws give 0 on average, and may give
    less. Otherwise all pairs count (V-statistic): never negative, but with a gradient that shrinks the spread of a small
    student batch. Bandwidths left open are those of both samples joined. kernel: by default `Gaussian()`.
    Source: Gretton et al., JMLR 13 (2012).
    """
    student, teacher = _rows("mmd2", student, teacher, 2 if unbiased else 1, unbiased)
    if student.shape[-1] != teacher.shape[-1]:
        raise ModelError(
            f"mmd2 needs rows of equal width, got student {list(student.shape)} and teacher {list(teacher.shape)}. "
            "Project one to the width of the other first."
        )
    B, C = student.shape[-2], teacher.shape[-2]
    gram = (kernel or Gaussian())(torch.cat([student, teacher], -2))

    def within(block: Tensor, n: int) -> Tensor:
        if not unbiased:
            return block.mean((-2, -1))
        return (block.sum((-2, -1)) - block.diagonal(dim1=-2, dim2=-1).sum(-1)) / (n * (n - 1))

    across = gram[..., :B, B:].mean((-2, -1))
    return within(gram[..., :B, :B], B) + within(gram[..., B:, B:], C) - 2 * across


def hsic(
    *,
    teacher: Tensor,
    student: Tensor,
    kernel: Kernel | None = None,
    teacher_kernel: Kernel | None = None,
    unbiased: bool = False,
) -> Tensor:
    """Hilbert-Schmidt independence criterion of two views of the same rows, [*G, N, E] and [*G, N, D] -> [*G].

    Biased: tr(K H L H) / (N - 1)^2 (Gretton et al. 2005), never negative. Unbiased: HSIC_1 of Song et al. (JMLR 13, 2012),
    for N >= 4; 0 on average for independent views. kernel: by default `Gaussian()`, of the teacher's view too unless
    teacher_kernel is given.
    """
    N, k, l = _views("hsic", student, teacher, kernel or Gaussian(), teacher_kernel, unbiased)
    return (k * l).sum((-2, -1)) / (N * (N - 3) if unbiased else (N - 1) ** 2)


def cka(
    *,
    teacher: Tensor,
    student: Tensor,
    kernel: Kernel | None = None,
    teacher_kernel: Kernel | None = None,
    unbiased: bool = False,
    minibatches: bool = False,
) -> Tensor:
    """Centred kernel alignment of two views of the same rows, [*G, N, E] and [*G, N, D] -> [*G]: HSIC as a cosine.

    1 for views equal up to rotation and scale; biased, never negative, and near 1 for any two views with more features
    than rows. unbiased takes each HSIC so (N >= 4). minibatches: the groups are batches of one data set, and the HSICs
    are averaged over them before the quotient is taken, -> []; with unbiased their number, not their size, then limits the
    precision. A constant view has similarity 0. kernel: by default `Linear()`, of the teacher's view too unless
    teacher_kernel is given. Sources: arXiv 1905.00414; with minibatches, arXiv 2010.15327.
    """
    _, k, l = _views("cka", student, teacher, kernel or Linear(), teacher_kernel, unbiased)
    both, own, other = ((a * b).sum((-2, -1)) for a, b in ((k, l), (k, k), (l, l)))
    if minibatches:
        both, own, other = both.sum(), own.sum(), other.sum()
    constant = (own == 0) | (other == 0)
    return both / (own.masked_fill(constant, 1.0).sqrt() * other.masked_fill(constant, 1.0).sqrt())


def _views(
    name: str, student: Tensor, teacher: Tensor, kernel: Kernel, teacher_kernel: Kernel | None, unbiased: bool
) -> tuple[int, Tensor, Tensor]:
    """N and both centred Gram matrices [*G, N, N]."""
    student, teacher = _rows(name, student, teacher, 4 if unbiased else 2, unbiased)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ModelError(
            f"{name} compares two views of the same rows, got student {list(student.shape)} and teacher "
            f"{list(teacher.shape)}. Only the last sizes may differ."
        )
    grams = kernel(student), (teacher_kernel or kernel)(teacher)
    k, l = (_centred(gram, unbiased) for gram in grams)
    return student.shape[-2], k, l


def _centred(gram: Tensor, unbiased: bool) -> Tensor:
    """Rows and columns with sum 0; unbiased (U-centred): over i != j, with a diagonal of 0. 0 where only rounding is left.

    The product of two U-centred matrices, divided by N (N - 3), is Song's statistic (Szekely and Rizzo 2014).
    """
    N = gram.shape[-1]
    diagonal = torch.eye(N, dtype=torch.bool, device=gram.device) & unbiased
    kept = gram.masked_fill(diagonal, 0.0)
    row = kept.sum(-1, keepdim=True) / (N - 2 if unbiased else N)
    total = row.sum(-2, keepdim=True) / (N - 1 if unbiased else N)
    centred = (kept - row - row.mT + total).masked_fill(diagonal, 0.0)
    noise = 8 * torch.finfo(gram.dtype).eps * gram.detach().abs().amax((-2, -1), keepdim=True)
    constant = centred.detach().abs().amax((-2, -1), keepdim=True) <= noise
    return centred.masked_fill(constant, 0.0)


def _total(grams: Iterable[Tensor]) -> Tensor:
    """Their sum, one at a time: a sample's Gram matrix may be large."""
    return reduce(torch.add, grams)


def _from_first(x: Tensor) -> Tensor:
    """Far from the origin, inner products lose in rounding what is compared; equal rows become exactly 0."""
    return x - x[..., :1, :]


def _gram(x: Tensor) -> Tensor:
    return inner(x, x)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of all pairs of rows, [*G, N, D] and [*G, M, D] -> [*G, N, M], in the rows' type under autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.mT


def _rows(name: str, student: Tensor, teacher: Tensor, least: int, unbiased: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    for whose, rows in (("student", student), ("teacher", teacher)):
        if rows.dim() < 2:
            raise ModelError(f"{name} takes rows of features [*G, N, D], got {whose} {list(rows.shape)}. Flatten them.")
        if rows.shape[-2] < least:
            way_out = ", or take unbiased=False." if unbiased else "."
            raise DataError(
                f"{name} needs at least {least} {whose} rows, got {rows.shape[-2]}. Raise the batch size{way_out}"
            )
    return student.to(dtype), teacher.to(dtype)


def _check_scales(part: object, scales: tuple[float, ...], bandwidth: float | None) -> None:
    object.__setattr__(part, "scales", tuple(scales))  # a recipe gives a list
    if not scales or not all(s > 0 for s in scales):
        raise RecipeError(f"{type(part).__name__}.scales must be one or more positive numbers, got {list(scales)}.")
    if bandwidth is not None and not bandwidth > 0:
        raise RecipeError(
            f"{type(part).__name__}.bandwidth must be positive, got {bandwidth}. Leave it out for the median distance."
        )
