"""Entropic optimal transport between a batch of student rows and a batch of teacher rows.

    P = argmin <P, C> + epsilon sum P log P   over plans [B, C] with row sums a (student) and column sums b (teacher)
      = exp((f_i + g_j - C_ij) / epsilon)     with potentials f [B], g [C], unique up to a constant

Every value couples the rows of a batch: it depends on who else is in it, and the batch may not be cut into micro-batches.
Costs, epsilon and potentials share one unit, that of the rows' distance. B student rows, C teacher rows, D features,
G groups (any leading shape), each a problem of its own. Nothing is detached: detach the teacher's rows.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from potstill.contracts.errors import ModelError, RecipeError
from potstill.divergences.family import one_of, promoted

_BLOCK = 10  # Sinkhorn iterations between two looks at the error


def pairwise_cost(*, student: Tensor, teacher: Tensor, norm: float = 1.0, power: float = 1.0) -> Tensor:
    """|s_i - t_j|_norm ^ power of all pairs, [*G, B, D] and [*G, C, D] -> [*G, B, C], in float32 or better.

    On probabilities norm 1 is twice the total variation. At coincident rows the gradient is 0 (power 1 and above).
    """
    if min(student.dim(), teacher.dim()) < 2 or student.shape[-1] != teacher.shape[-1]:
        raise ModelError(
            f"pairwise_cost compares rows of equal width, student [*G, B, D] and teacher [*G, C, D], got "
            f"{list(student.shape)} and {list(teacher.shape)}. Project one to the width of the other first."
        )
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    # Taken through a matrix product, Euclidean distances of near rows would be rounding noise.
    cost = torch.cdist(student.to(dtype), teacher.to(dtype), p=norm, compute_mode="donot_use_mm_for_euclid_dist")
    return cost if power == 1.0 else cost**power


@dataclass(frozen=True, eq=False)
class Transport:
    """A solved problem. plan [*G, B, C] has the gradient that was asked for, and so has what is read off it.

    steps: the Sinkhorn iterations and Newton steps that it took.
    """

    plan: Tensor
    log_plan: Tensor
    cost: Tensor
    epsilon: float
    student_mass: Tensor
    teacher_mass: Tensor
    steps: int

    @property
    def value(self) -> Tensor:
        """<P, C> by student row: sum_j P_ij C_ij, [*G, B]. Its sum over B is the transport cost."""
        return (self.plan * self.cost).sum(-1)

    @property
    def error(self) -> Tensor:
        """What the marginals are off, L1, as a share of the mass, [*G], detached."""
        plan, a, b = self.plan.detach(), self.student_mass.detach(), self.teacher_mass.detach()
        return ((plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - b).abs().sum(-1)) / a.sum(-1)

    @property
    def teacher_potential(self) -> Tensor:
        """g, up to a constant, [*G, C], detached: where to start the next, similar problem."""
        return (self.epsilon * self.log_plan.detach() + self.cost.detach()).mean(-2)


@dataclass(frozen=True)
class Sinkhorn:
    """Sinkhorn's algorithm in the log domain: `iterations` times, rows to their masses, then columns to theirs.

    The defaults are SinKD's (arXiv 2402.17110 and its code): L1 distances of probabilities, 20 iterations from
    exp(-C / epsilon), masses 1 (so a plan weighs B), the value <P, C>, gradients through all iterations.

    tolerance: above 0, go on from there until the marginals are off by at most that share of the mass (L1): by Sinkhorn
    iterations where those are differentiated, else by damped Newton steps on the dual, of which tens do the work of tens
    of thousands. `max_iterations` bounds them all, the first included; a problem left unfinished warns.
    gradient: that of the plan. "unrolled": through the iterations. "implicit": of the fixed point, by one linear system
    of the size of the teacher's batch; exact at convergence, and right when differentiated again. "detached": none.
    marginals: "ones", or "uniform" for masses 1/B and 1/C. norm and power are those of `pairwise_cost`.
    """

    epsilon: float = 0.1
    iterations: int = 20
    tolerance: float = 0.0
    max_iterations: int = 1000
    gradient: Literal["unrolled", "implicit", "detached"] = "unrolled"
    marginals: Literal["ones", "uniform"] = "ones"
    norm: float = 1.0
    power: float = 1.0

    def __post_init__(self) -> None:
        for option, least in (("iterations", 1), ("max_iterations", 1), ("tolerance", 0), ("norm", 1)):
            if not getattr(self, option) >= least:
                raise RecipeError(f"Sinkhorn.{option} must be at least {least}, got {getattr(self, option)}.")
        for option in ("epsilon", "power"):
            if not getattr(self, option) > 0:
                raise RecipeError(f"Sinkhorn.{option} must be positive, got {getattr(self, option)}.")
        one_of(self, "gradient", self.gradient, ("unrolled", "implicit", "detached"))
        one_of(self, "marginals", self.marginals, ("ones", "uniform"))

    def __call__(self, *, teacher: Tensor, student: Tensor) -> Tensor:
        """sum_j P_ij C_ij of each student row, [*G, B]; SinKD's loss is its sum. Above 0 even for equal batches.

        Rows [*G, B, D] are whatever is compared: probabilities or features. Classes compared within each sample (the
        sample-wise variant) are groups: probabilities [B, V] as [B, V, 1].
        """
        return self.solve(self._cost(student, teacher)).value

    def entropic(self, cost: Tensor) -> Tensor:
        """<P, C> + epsilon sum P log(P m / (a b)), m the mass: one value a group, [*G, B, C] -> [*G], at least <P, C>.

        At convergence it is the minimum over plans, so its gradient is the plan (envelope theorem): no system is solved.
        """
        solved = self.solve(cost)
        plan, linear = solved.plan, solved.plan * solved.cost
        if self.gradient != "unrolled":
            plan, linear = plan.detach(), _Envelope.apply(solved.cost, plan)
        a, b = solved.student_mass.unsqueeze(-1), solved.teacher_mass.unsqueeze(-2)
        mass = solved.student_mass.sum(-1)[..., None, None]
        return (linear + self.epsilon * plan * (solved.log_plan - (a * b / mass).log())).sum((-2, -1))

    def divergence(self, *, teacher: Tensor, student: Tensor) -> Tensor:
        """E(s, t) - E(s, s) / 2 - E(t, t) / 2, E = `entropic`: one value a group, [*G]; 0 for equal batches.

        Debiased Sinkhorn divergence, arXiv 1810.08278. Never negative at convergence (set a tolerance) where
        exp(-C / epsilon) is a positive kernel: power 1 with norm 1 or 2, power 2 with norm 2.
        """
        costs = [self._cost(student, teacher), self._cost(student, student), self._cost(teacher, teacher)]
        if len({cost.shape for cost in costs}) == 1:  # one batched problem in place of three
            both, students, teachers = self.entropic(torch.stack(costs, -3)).unbind(-1)
        else:
            both, students, teachers = map(self.entropic, costs)
        return both - (students + teachers) / 2

    def solve(
        self,
        cost: Tensor,
        *,
        student_mass: Tensor | None = None,
        teacher_mass: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Transport:
        """The plan for a cost [*G, B, C]. Masses [*G, B] and [*G, C], of equal sums, replace `marginals`.

        Gradients reach the masses too, each side's up to a constant; a mass of 0 counts as 1e-30.
        start: the teacher's potential [*G, C] of a similar problem, to save steps.
        """
        cost = promoted(cost)
        weighted = student_mass is not None or teacher_mass is not None
        a, b = self._masses(cost, student_mass, teacher_mass)
        log_a, log_b = a.log().unsqueeze(-1), b.log().unsqueeze(-2)

        def rounds(log_plan: Tensor, count: int) -> Tensor:
            for _ in range(count):
                log_plan = log_plan.log_softmax(-1)
                if weighted:  # equal masses shift all rows alike, which the columns' turn undoes
                    log_plan = log_plan + log_a
                log_plan = log_plan.log_softmax(-2)
                if weighted:
                    log_plan = log_plan + log_b
            return log_plan if weighted else log_plan + log_b

        with torch.set_grad_enabled(self.gradient == "unrolled" and torch.is_grad_enabled()):
            log_kernel = log_plan = cost / -self.epsilon
            if start is not None:
                log_plan = log_kernel + self._start(start, cost) / self.epsilon
            log_plan, steps = rounds(log_plan, self.iterations), self.iterations
            if self.tolerance > 0 and cost.numel():
                error = _row_error(log_plan, a)
                if self.gradient != "unrolled" and not error <= self.tolerance:
                    most = self.max_iterations - steps
                    log_plan, more, error = _newton(log_kernel, log_plan, a, b, self.tolerance, most)
                    steps += more
                while self.gradient == "unrolled" and not error <= self.tolerance and steps < self.max_iterations:
                    more = min(_BLOCK, self.max_iterations - steps)
                    log_plan, steps = rounds(log_plan, more), steps + more
                    error = _row_error(log_plan, a)
                if not error <= self.tolerance:
                    warnings.warn(
                        f"Sinkhorn stopped after {steps} steps with marginals off by {error:.1e} of the mass (tolerance "
                        f"{self.tolerance:.1e}). Raise max_iterations, tolerance or epsilon.",
                        stacklevel=3,
                    )
        plan = _Plan.apply(cost, a, b, log_plan, self.epsilon) if self.gradient == "implicit" else log_plan.exp()
        return Transport(plan, log_plan, cost, self.epsilon, a, b, steps)

    def _cost(self, student: Tensor, teacher: Tensor) -> Tensor:
        return pairwise_cost(student=student, teacher=teacher, norm=self.norm, power=self.power)

    def _masses(self, cost: Tensor, student: Tensor | None, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        if cost.dim() < 2:
            raise ModelError(f"Sinkhorn.solve takes a cost [*G, B, C], got {list(cost.shape)}.")
        weighted = student is not None or teacher is not None
        if self.marginals == "ones" and not weighted and cost.shape[-2] != cost.shape[-1]:
            raise ModelError(
                f"Sinkhorn with marginals 'ones' gives every row mass 1, so student and teacher rows must be equally "
                f"many, got {cost.shape[-2]} and {cost.shape[-1]}. Take marginals 'uniform'."
            )
        made = []
        for whose, mass, shape in (("student", student, cost.shape[:-1]), ("teacher", teacher, cost.mT.shape[:-1])):
            if mass is None:
                mass = cost.new_ones(shape[-1]) / (1 if self.marginals == "ones" else shape[-1])
            elif mass.shape[-1:] != shape[-1:] or mass.dim() > len(shape):
                raise ModelError(
                    f"Sinkhorn.solve needs {whose}_mass {list(shape)} for a cost {list(cost.shape)}, "
                    f"got {list(mass.shape)}."
                )
            made.append(mass.to(cost.dtype).clamp_min(1e-30).expand(shape))
        a, b = made
        if weighted and not torch.allclose(a.sum(-1), b.sum(-1), rtol=1e-4, atol=0.0):
            raise ModelError(
                "Sinkhorn.solve moves all of the student's mass onto the teacher's, so both must have the same sum. "
                "Divide each by its own."
            )
        return a, b

    @staticmethod
    def _start(start: Tensor, cost: Tensor) -> Tensor:
        if start.shape[-1:] != cost.shape[-1:]:
            raise ModelError(
                f"Sinkhorn.solve starts from a teacher's potential [*G, {cost.shape[-1]}], got {list(start.shape)}. "
                "Leave it out where the number of teacher rows has changed."
            )
        return start.to(cost.dtype).unsqueeze(-2)


class _Plan(torch.autograd.Function):
    """The plan of the fixed point, with the gradient of the implicit function theorem.

    d log P = (df + dg - dC) / epsilon with the df, dg that move the marginals by da, db. Its adjoint, for a gradient G of
    P: fit G by u_i + v_j with weights P; then C gets -P (G - u - v) / epsilon, a gets u, b gets v.
    """

    @staticmethod
    def forward(ctx: Any, cost: Tensor, a: Tensor, b: Tensor, log_plan: Tensor, epsilon: float) -> Tensor:
        plan = log_plan.exp()
        ctx.save_for_backward(plan)
        ctx.epsilon = epsilon
        return plan

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        plan = ctx.saved_tensors[0].double()
        row, column, pull = plan.sum(-1, keepdim=True), plan.sum(-2), plan * gradient
        share, pull_row = plan / row, pull.sum(-1, keepdim=True)
        v = _curvature_solve(plan, share, column, pull.sum(-2) - (share * pull_row).sum(-2)).unsqueeze(-2)
        u = pull_row / row - (share * v).sum(-1, keepdim=True)
        to_cost = (plan * (u + v) - pull) / ctx.epsilon
        return to_cost.to(gradient), u.squeeze(-1).to(gradient), v.squeeze(-2).to(gradient), None, None


class _Envelope(torch.autograd.Function):
    """P * C with gradient P for C and none for P; that gradient, differentiated again, knows that P depends on C."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, plan: Tensor) -> Tensor:
        ctx.save_for_backward(plan)
        return cost * plan

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.saved_tensors[0], None


def _curvature_solve(plan: Tensor, share: Tensor, column: Tensor, right: Tensor) -> Tensor:
    """x [*G, C] of (diag(c) - P^T diag(1 / r) P) x = right: minus the dual's Hessian in g, f eliminated; share = P / r.

    In float64. Constants are its null space, which c c^T / mass takes out. The ridge, relative to the diagonal, stands in
    for directions that the plan hardly couples: those are lost in rounding, and move nothing.
    """
    matrix = column.unsqueeze(-1) * (column / column.sum(-1, keepdim=True)).unsqueeze(-2) - plan.mT @ share
    factor, _ = torch.linalg.cholesky_ex(matrix + torch.diag_embed(column * (1 + 1e-12)))
    return torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)


def _newton(
    log_kernel: Tensor, log_plan: Tensor, a: Tensor, b: Tensor, tolerance: float, most: int
) -> tuple[Tensor, int, float]:
    """(log plan, steps, error) at the maximum of the dual over g, in float64; f is eliminated, so that rows are exact.

    Along a direction of range d = max - min the dual's third derivative is at most d times its second, so that the step
    log(1 + d) / d always ascends: generalised self-concordance (arXiv 1703.04599, nu = 2). No line search.
    """
    dtype, log_kernel, a, b = log_kernel.dtype, log_kernel.double(), a.double().unsqueeze(-1), b.double()
    g, step, mass = (log_plan - log_kernel).mean(-2), 0, b.sum(-1)
    while True:
        log_plan = log_kernel + g.unsqueeze(-2)
        share = log_plan.softmax(-1)
        plan = a * share
        column = plan.sum(-2)
        missing = b - column
        error = (missing.abs().sum(-1) / mass).max().item()
        if error <= tolerance or step >= most or math.isnan(error):
            return (log_plan.log_softmax(-1) + a.log()).to(dtype), step, error
        direction = _curvature_solve(plan, share, column, missing)
        low, high = direction.aminmax(dim=-1, keepdim=True)
        spread = (high - low).clamp_min(1e-30)
        g, step = g + direction * (spread.log1p() / spread), step + 1


def _row_error(log_plan: Tensor, a: Tensor) -> float:
    """What the row sums are off, L1, as a share of the mass, of the worst group; after a round columns are exact."""
    off = (log_plan.detach().exp().sum(-1) - a.detach()).abs().sum(-1)
    return (off / a.detach().sum(-1)).max().item()
