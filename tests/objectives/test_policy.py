"""Policy gradients by enumeration: every completion of a tiny vocabulary with its probability, in float64."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from potstill.contracts.batch import PromptBatch, TokenBatch
from potstill.contracts.errors import DataError, ModelError, NonFiniteError, RecipeError, SignalError
from potstill.contracts.players import OptimizerSpec
from potstill.contracts.signals import HiddenAndHead, TokenLogp
from potstill.divergences import ReverseKL, SampledReverseKL
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.policy import Clip, PolicyGradient, clipped, estimated_kl, picked
from potstill.objectives.states import Rows
from potstill.objectives.tokens import RolloutSpec, TokenDistillation
from potstill.rollouts.groups import group_advantages
from potstill.teachers import FrozenStart, LocalTeacher
from potstill.training.spec import TrainSpec
from potstill.training.trainer import Trainer
from potstill.weighting import EarlyPrefix, EntropyTop

V, NEW = 3, 2  # words, and tokens of a completion
TOKENIZER = character_tokenizer(["abcdefg "])


class Table(nn.Module):
    """A language model that is a table of logits by place and last word: float64 throughout."""

    kind, name, tokenizer, compiled, has_linear_head = "causal_lm", "table", None, False, True
    vocabulary = V

    def __init__(self, seed: int, spread: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Linear(NEW * V, V, bias=False, dtype=torch.float64)
        self.table.weight.data = spread * torch.randn(V, NEW * V, generator=generator, dtype=torch.float64)

    def counted_hidden(self, batch: TokenBatch) -> Tensor:
        place_BT = torch.arange(batch.tokens_BT.shape[1] - 1).expand(len(batch), -1)
        state_BT = place_BT * V + batch.tokens_BT[:, :-1]
        return nn.functional.one_hot(state_BT, NEW * V).double()[batch.counted_BT[:, 1:]]

    def head(self, hidden: Tensor) -> Tensor:
        return self.table(hidden)

    def with_head(self, hidden: Tensor) -> HiddenAndHead:
        return HiddenAndHead(hidden, self.table.weight)


def every_completion() -> TokenBatch:
    """All V^NEW completions of the prompt 0."""
    tokens = torch.tensor([[0, *rest] for rest in itertools.product(range(V), repeat=NEW)])
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, 0] = False
    return TokenBatch(torch.arange(len(tokens)), tokens, torch.ones_like(counted), counted)


def logp_of(model, batch: TokenBatch) -> Tensor:
    """log-probabilities of the counted tokens, [N]."""
    return model.head(model.counted_hidden(batch)).log_softmax(-1).gather(-1, batch.tokens_counted[:, None])[:, 0]


def gradient(value: Tensor, model: nn.Module) -> Tensor:
    return torch.autograd.grad(value, model.table.weight)[0]


def policy(student, teacher=None, *, rollout=None, **options) -> PolicyGradient:
    teacher = None if teacher is None else LocalTeacher(teacher)
    options = {"rollout": rollout or (lambda batch, step: batch), "optimizer": OptimizerSpec(), "seed": 0} | options
    return PolicyGradient(student, teacher, **options)


def with_rewards(batch: TokenBatch, seed: int = 7) -> TokenBatch:
    rewards = torch.rand(len(batch), generator=torch.Generator().manual_seed(seed))
    return replace(batch, extra={**batch.extra, "reward": rewards})


def surrogate(objective: PolicyGradient, batch: TokenBatch, step: int = 0) -> Tensor:
    """The loss of rollouts at the student that made them."""
    return objective.loss("student", objective.collect(batch, step), step).value()


# -------------------------------------------------------------------- the clip


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "stopped"),
    [
        (1.0, 2.0, None, False),
        (1.27, 2.0, None, False),  # up to 1 + high
        (1.29, 2.0, None, True),
        (0.3, 2.0, None, False),  # far below, but to be raised
        (1.0, -2.0, None, False),
        (0.81, -2.0, None, False),
        (0.79, -2.0, None, True),  # low enough
        (9.0, -2.0, None, False),  # far above, and to be lowered
        (2.9, -2.0, 3.0, False),
        (3.1, -2.0, 3.0, True),
        (3.1, 2.0, 3.0, True),
        (0.79, -2.0, 3.0, True),
        (0.3, 2.0, 3.0, False),
    ],
)
def test_the_clip_stops_exactly_the_gradients_that_it_should(ratio, advantage, dual, stopped):
    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    a = torch.tensor([advantage], dtype=torch.float64)
    values, said = clipped(log_ratio, a, Clip(low=0.2, high=0.28, dual=dual))
    found = torch.autograd.grad(values.sum(), log_ratio)[0]
    assert said.tolist() == [stopped]
    assert_close(found, torch.zeros_like(found) if stopped else -a * ratio)
    bound = {True: 1.28, False: dual if dual and ratio > dual else 0.8}[advantage > 0] if stopped else ratio
    assert_close(values.detach(), -a * bound)
    assert clipped(log_ratio, a, None)[0].item() == pytest.approx(-advantage * ratio)


def test_ratios_without_bounds_stay_finite():
    log_ratio = torch.tensor([1e4, -1e4], requires_grad=True)
    values, _ = clipped(log_ratio, torch.zeros(2), Clip())
    assert values.isfinite().all() and torch.autograd.grad(values.sum(), log_ratio)[0].isfinite().all()


# -------------------------------------------------------------------- gradients


def test_at_ratio_one_it_is_reinforce():
    student, batch = Table(0), with_rewards(every_completion())
    objective = policy(student, group=3)
    advantages = group_advantages(batch.extra["reward"], 3).repeat_interleave(NEW)
    plain = -(advantages * logp_of(student, batch)).mean()
    assert_close(gradient(surrogate(objective, batch), student), gradient(plain, student))
    assert surrogate(objective, batch).item() == pytest.approx(-advantages.mean().item(), abs=1e-6)


def test_the_teacher_alone_is_the_sampled_reverse_kl_on_the_same_batch_and_its_gradient_on_average():
    student, teacher, batch = Table(0), Table(1), every_completion()
    objective = policy(student, teacher, task_coefficient=0.0)
    sampled = TokenDistillation(student, LocalTeacher(teacher), SampledReverseKL(), optimizer=OptimizerSpec(), seed=0)
    found = gradient(surrogate(objective, batch), student)
    assert_close(found, gradient(sampled.loss("student", batch, 0).value(), student))
    # Each completion with its probability: the divergence at the states that it visits, whose law is not differentiated.
    log_q = logp_of(student, batch).view(-1, NEW)
    chance = log_q.sum(1).exp().detach()
    rows = lambda model: model.head(model.counted_hidden(batch)).log_softmax(-1)
    kl = ReverseKL()(teacher_logp=rows(teacher).detach(), student_logp=rows(student)).view(-1, NEW)
    collected = objective.collect(batch, 0)
    one = lambda i: objective.loss("student", picked(collected, torch.tensor([i])), 0).value()
    mean = sum(chance[i] * one(i) for i in range(len(batch)))
    assert_close(gradient(mean, student), gradient((chance * kl.mean(1)).sum(), student))


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_averages_by_hand(average):
    student, batch = Table(0), with_rewards(every_completion())
    batch.counted_BT[::2, 2] = False
    batch = replace(batch, counted_BT=batch.counted_BT)
    objective = policy(student, group=3, average=average, length=5)
    A = group_advantages(batch.extra["reward"], 3)
    lengths = batch.counted_BT.sum(1)
    loss = surrogate(objective, batch)
    expected = {
        "token": (A * lengths).sum() / lengths.sum(),
        "sequence": A.mean(),
        "constant": (A * lengths / 5).mean(),
    }[average]
    assert loss.item() == pytest.approx(-expected.item(), abs=1e-6)
    each = logp_of(student, batch).split(lengths.tolist())
    plain = {
        "token": torch.cat([a * x for a, x in zip(A, each)]).mean(),
        "sequence": torch.stack([a * x.mean() for a, x in zip(A, each)]).mean(),
        "constant": torch.stack([a * x.sum() / 5 for a, x in zip(A, each)]).mean(),
    }[average]
    assert_close(gradient(loss, student), gradient(-plain, student))


@pytest.mark.parametrize(("baseline", "factor"), [("mean", 1 - 1 / 2), ("leave_one_out", 1.0)])
def test_a_group_is_an_unbiased_baseline(baseline, factor):
    """Over all pairs of completions with their probabilities; the mean of the group takes off the factor 1 - 1/G."""
    student, batch = Table(0), with_rewards(every_completion())
    objective = policy(student, group=2, normalise=False, baseline=baseline, average="constant", length=1)
    chance = logp_of(student, batch).view(-1, NEW).sum(1).exp()
    total = 0.0
    for pair in itertools.product(range(len(batch)), repeat=2):
        weight = chance[list(pair)].prod().detach()
        total = total + weight * surrogate(objective, picked_with_reward(batch, pair))
    expected = -factor * (chance * batch.extra["reward"]).sum()
    assert_close(gradient(total, student), gradient(expected, student), rtol=1e-6, atol=1e-7)


def picked_with_reward(batch: TokenBatch, rows) -> TokenBatch:
    rows = torch.tensor(rows)
    fields = {name: getattr(batch, name)[rows] for name in ("ids_B", "tokens_BT", "attention_BT", "counted_BT")}
    return TokenBatch(**fields, extra={"reward": batch.extra["reward"][rows]})


def test_what_k3_and_k2_descend():
    """On samples of q: the value of k3 is KL(q || ref), its gradient that of KL(ref || q); k2's is that of KL(q || ref)."""
    z, ref = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z.requires_grad_()
    log_q, log_r = z.log_softmax(-1), ref.log_softmax(-1)
    q = log_q.exp().detach()
    grad = lambda value: torch.autograd.grad(value, z, retain_graph=True)[0]
    k2, k3 = ((q * estimated_kl(log_r - log_q, kind)).sum() for kind in ("k2", "k3"))
    reverse, forward = (log_q.exp() * (log_q - log_r)).sum(), (log_r.exp() * (log_r - log_q)).sum()
    assert_close(k3, reverse)
    assert_close(grad(k3), grad(forward))
    assert_close(grad(k2), grad(reverse))
    assert (grad(k3) - grad(reverse)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_a_reference_pulls_back(kind):
    student, reference, batch = Table(0), Table(1), with_rewards(every_completion())
    batch.extra["reward"][:] = 1.0  # so that nothing else pulls
    objective = policy(student, group=3, reference=LocalTeacher(reference), reference_kl=0.3, reference_estimator=kind)
    expected = 0.3 * estimated_kl(logp_of(reference, batch).detach() - logp_of(student, batch), kind).mean()
    found = surrogate(objective, batch)
    assert_close(found, expected)
    assert_close(gradient(found, student), gradient(expected, student))
    assert reference.table.weight.grad is None


def test_entropy_is_raised():
    student, batch = Table(0), with_rewards(every_completion())
    batch.extra["reward"][:] = 0.0
    objective = policy(student, group=3, entropy=0.5)
    log_q = student.head(student.counted_hidden(batch)).log_softmax(-1)
    expected = 0.5 * (log_q.exp() * log_q).sum(-1).mean()
    found = surrogate(objective, batch)
    assert_close(found, expected)
    assert_close(gradient(found, student), gradient(expected, student))
    metrics = objective.loss("student", objective.collect(batch, 0), 0).metrics
    assert metrics["entropy"].mean().item() == pytest.approx(-2 * expected.item())


def test_equal_rewards_teach_nothing_and_are_no_nan():
    student, batch = Table(0), with_rewards(every_completion())
    batch.extra["reward"][:] = 0.7
    found = surrogate(policy(student, group=9, eps=0.0), batch)
    assert found.item() == 0.0
    assert_close(gradient(found, student), torch.zeros_like(student.table.weight))


# -------------------------------------------------------------------- advantages


def test_advantages_add_up_and_weights_are_of_the_teacher_alone():
    student, teacher, batch = Table(0), Table(1), with_rewards(every_completion())
    weighting = EarlyPrefix(gamma=2.0)
    objective = policy(
        student, teacher, group=3, weighting=weighting,
        task_coefficient=lambda step: 0.5 * step, teacher_coefficient=lambda step: 3.0 - step,
    )  # fmt: skip
    log_ratio = (logp_of(teacher, batch) - logp_of(student, batch)).detach().view(-1, NEW)
    size = log_ratio.abs()
    weights = 1 + 2.0 * (1 - (size.cumsum(1) - size) / size.sum(1, keepdim=True))
    for step in (0, 1, 2):
        collected = objective.collect(batch, step)
        expected = 0.5 * step * group_advantages(batch.extra["reward"], 3)[:, None] + (3 - step) * weights * log_ratio
        assert_close(collected.extra["advantage_BT"][:, 1:], expected, rtol=1e-6, atol=1e-6)
        assert not collected.extra["advantage_BT"].requires_grad
        assert (collected.extra["advantage_BT"][:, 0] == 0).all()
        said = objective.loss("student", collected, step).metrics["sampled_reverse_kl"].mean()
        assert said.item() == pytest.approx(-log_ratio.mean().item())


def test_a_weighting_sees_segments_rewards_groups_noise_and_whole_rows():
    from dataclasses import dataclass

    from potstill.weighting import Weighting

    seen = {}

    @dataclass(frozen=True, kw_only=True)
    class Watching(Weighting):
        needs = ("segment_BR", "reward_B", "noise_BR", "student_entropy_BR", "teacher_entropy_BR", "reverse_kl_BR")

        def weigh(self, values):
            seen["values"] = values
            return torch.ones(values.mask_BR.shape)

    student, teacher, batch = Table(0), Table(1), with_rewards(every_completion())
    batch.extra["segment_BT"] = torch.tensor([0, 0, 1]).expand(len(batch), -1)
    policy(student, teacher, group=3, weighting=Watching()).collect(batch, 0)
    values = seen["values"]
    assert values.segment_BR.tolist() == [[0, 1]] * 9 and values.group == 3
    assert_close(values.reward_B, batch.extra["reward"])
    assert ((values.noise_BR > 0) & (values.noise_BR < 1)).all() and values.noise_BR.unique().numel() == 18
    log_q, log_p = (m.head(m.counted_hidden(batch)).log_softmax(-1).detach() for m in (student, teacher))
    assert_close(values.student_entropy_BR.flatten(), -(log_q.exp() * log_q).sum(-1))
    assert_close(values.teacher_entropy_BR.flatten(), -(log_p.exp() * log_p).sum(-1))
    assert_close(values.reverse_kl_BR.flatten(), (log_q.exp() * (log_q - log_p)).sum(-1))
    assert policy(student, teacher, weighting=EntropyTop(scope="batch"), group=3).couples == "batch"


def test_the_old_policy_is_the_one_that_sampled():
    """After an update the ratio has moved, while advantages and old log-probabilities stand."""
    student, teacher, batch = Table(0), Table(1), with_rewards(every_completion())
    objective = policy(student, teacher, group=3, clip=None)
    collected = objective.collect(batch, 0)
    old = logp_of(student, batch).detach()
    assert_close(collected.sampled_logp_BT[batch.counted_BT], old)
    with torch.no_grad():
        student.table.weight.add_(0.3 * torch.randn(V, NEW * V, generator=torch.Generator().manual_seed(5)))
    ratio = (logp_of(student, batch) - old).exp()
    advantage = collected.extra["advantage_BT"][batch.counted_BT]
    loss = objective.loss("student", collected, 1)
    assert_close(loss.value(), -(ratio * advantage).mean())
    assert_close(gradient(loss.value(), student), gradient(-(ratio * advantage).mean(), student))
    assert loss.metrics["ratio"].mean().item() == pytest.approx(ratio.mean().item())
    bounded = policy(student, teacher, group=3, clip=Clip(low=0.1, high=0.1))
    said = clipped(ratio.log(), advantage, Clip(low=0.1, high=0.1))[1].double().mean()
    assert 0 < said < 1
    fraction = bounded.loss("student", collected, 1).metrics["clip_fraction"]
    assert fraction.mean().item() == pytest.approx(said.item())
    given = replace(batch, sampled_logp_BT=torch.full_like(collected.sampled_logp_BT, -1.5))
    assert (objective.collect(given, 0).sampled_logp_BT == -1.5).all(), "what a rollout says of itself is believed"


def test_temperature_is_that_of_both(monkeypatch):
    student, teacher, batch = Table(0), Table(1), every_completion()
    collected = policy(student, teacher, task_coefficient=0.0, temperature=2.0).collect(batch, 0)
    halved = [Table(0), Table(1)]
    for model in halved:
        model.table.weight.data /= 2
    expected = policy(*halved, task_coefficient=0.0).collect(batch, 0)
    assert_close(collected.extra["advantage_BT"], expected.extra["advantage_BT"])
    cold = policy(student, teacher, task_coefficient=0.0, temperature=2.0)
    assert cold.loss("student", collected, 0).metrics["ratio"].mean().item() == pytest.approx(1.0)


def test_whole_logits_do_the_same(monkeypatch):
    batch = with_rewards(every_completion())
    values = []
    for linear in (True, False):
        monkeypatch.setattr(Table, "has_linear_head", linear)
        student = Table(0)
        loss = surrogate(policy(student, Table(1), group=3), batch)
        values.append((loss.detach(), gradient(loss, student)))
    assert_close(values[0], values[1])


class Served:
    """A teacher that says its tokens' log-probabilities and no more."""

    name, gives, tokenizer, vocabulary = "served", frozenset({TokenLogp}), None, V

    def __init__(self, model) -> None:
        self.inner = model

    def score(self, batch, need):
        return TokenLogp(logp_of(self.inner, batch).detach())


def test_token_log_probabilities_are_enough_of_a_teacher():
    student, teacher, batch = Table(0), Table(1), every_completion()
    a = policy(student, teacher, task_coefficient=0.0).collect(batch, 0)
    served = PolicyGradient(
        student, Served(teacher), task_coefficient=0.0, rollout=lambda b, s: b, optimizer=OptimizerSpec(), seed=0
    )
    assert_close(served.collect(batch, 0).extra["advantage_BT"], a.extra["advantage_BT"])
    with pytest.raises(SignalError, match=r"needs TokenLogp at temperature 0\.5, which served does not give"):
        PolicyGradient(
            student, Served(teacher), rollout=lambda b, s: b, temperature=0.5, optimizer=OptimizerSpec(), seed=0
        )


# -------------------------------------------------------------------- real models: padding, groups, several updates


def model(seed: int, tokenizer=TOKENIZER) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM.PACKAGED["llama-tiny"](tokenizer=tokenizer)


class Asked:
    """A data set of prompts of several lengths."""

    def __len__(self) -> int:
        return 8

    def batch(self, rows: Tensor, epoch: int | Tensor = 0) -> PromptBatch:
        chosen = rows.tolist()
        tokens = torch.tensor([[1, 4 + i % 5, 5 + i % 4] for i in chosen])
        attention = torch.tensor([[i % 2 == 0, True, True] for i in chosen])
        extra = {"rows": [{"prompt": str(i)} for i in chosen]}
        return PromptBatch(rows + 100 * torch.as_tensor(epoch), tokens, attention, None, extra)


def length_and_letters(row, text: str) -> float:
    return len(text) + text.count("a")


def real(seed: int = 0, **options) -> PolicyGradient:
    options = {
        "rollouts": RolloutSpec(max_new_tokens=5, samples_per_prompt=3), "reward": length_and_letters,
        "optimizer": OptimizerSpec(lr=1e-2), "seed": 0,
    } | options  # fmt: skip
    return PolicyGradient(model(seed), LocalTeacher(model(9)), **options)


def test_prompts_padding_and_neighbours_change_nothing_and_only_the_student_learns():
    objective = real(reference=FrozenStart(model(3)), reference_kl=0.1)
    collected = objective.collect(Asked().batch(torch.arange(4)), 0)
    assert len(collected) == 12 and not collected.counted_BT[:, :3].any()
    assert_close(
        collected.extra["reward"].view(4, 3)[0],
        torch.tensor([
            float(length_and_letters(None, TOKENIZER.decode(t[c], skip_special_tokens=True)))
            for t, c in zip(collected.tokens_BT[:3], collected.counted_BT[:3])
        ]),
    )  # fmt: skip
    whole = objective.loss("student", collected, 0)
    whole.value().backward()
    assert all(p.grad is not None for p in objective.student.parameters())
    others = [objective.teacher.model, objective.reference.model]
    assert all(p.grad is None for other in others for p in other.parameters())
    assert not [name for name in objective.state_dict() if "teacher" in name or "reference" in name]
    total = sum(
        objective.loss("student", picked(collected, torch.tensor([i])), 0).terms["policy"].total for i in range(12)
    )
    assert_close(whole.terms["policy"].total, total, rtol=1e-4, atol=1e-5)
    junk = replace(collected, tokens_BT=collected.tokens_BT.masked_fill(~collected.attention_BT, 7), memo={})
    junk.extra["advantage_BT"] = collected.extra["advantage_BT"].masked_fill(~collected.counted_BT, math.nan)
    assert_close(objective.loss("student", junk, 0).value(), whole.value())


def test_micro_batches_add_up():
    from potstill.contracts.terms import divided

    objective = real()
    whole = objective.loss("student", objective.collect(Asked().batch(torch.arange(4)), 0), 0)
    parts = [
        objective.loss("student", objective.collect(Asked().batch(rows), 0), 0)
        for rows in (torch.tensor([0]), torch.tensor([1, 2, 3]))
    ]
    assert_close(divided([part.terms for part in parts]), whole.value(), rtol=1e-4, atol=1e-5)


def train(folder, objective, steps: int = 7, batch: int = 4, micro: int = 2) -> None:
    spec = TrainSpec(steps=steps, batch=batch, micro_batch=micro, device="cpu", trackers=[], checkpoint_every=1, keep=9)
    Trainer(spec, folder).fit(objective, Asked())


@pytest.mark.parametrize("dies_at", [1, 3, 5])
def test_a_killed_run_goes_on_with_the_rollouts_it_had(tmp_path, dies_at):
    options = {"updates_per_rollout": 4, "minibatches": 2}

    class Counting(PolicyGradient):
        rolls = 0
        dies = None

        def rolled(self, batch, step):
            self.rolls += 1
            return super().rolled(batch, step)

        def loss(self, player, batch, step):
            if step == self.dies:
                raise KeyboardInterrupt
            return super().loss(player, batch, step)

    def fresh() -> Counting:
        return Counting(
            model(0), LocalTeacher(model(9)), rollouts=RolloutSpec(max_new_tokens=5, samples_per_prompt=3),
            reward=length_and_letters, optimizer=OptimizerSpec(lr=1e-2), seed=0, **options,
        )  # fmt: skip

    once = fresh()
    train(tmp_path / "once", once)
    assert once.rolls == 4, "two micro-batches at steps 0 and 4"
    killed = fresh()
    killed.dies = dies_at
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "twice", killed)
    resumed = fresh()
    train(tmp_path / "twice", resumed)
    assert resumed.rolls == (2 if dies_at < 5 else 0)
    for name, tensor in once.student.state_dict().items():
        assert torch.equal(tensor, resumed.student.state_dict()[name]), name
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("once", "twice")]
    assert lines[0] == lines[1]


def test_mini_batches_cut_a_rollout_and_use_every_row_equally_often():
    objective = real(updates_per_rollout=4, minibatches=2)
    rows = [objective.collect(Asked().batch(torch.arange(3)), step).ids_B.tolist() for step in range(8)]
    assert rows[0] + rows[1] == rows[2] + rows[3] == list(range(9))
    assert [len(r) for r in rows] == [5, 4] * 4
    first, third = (objective.collect(Asked().batch(torch.arange(3)), step) for step in (8, 10))
    assert torch.equal(first.tokens_BT, third.tokens_BT) and torch.equal(first.sampled_logp_BT, third.sampled_logp_BT)
    later = objective.collect(Asked().batch(torch.arange(3)), 12)
    assert later.tokens_BT.shape != first.tokens_BT.shape or not torch.equal(later.tokens_BT, first.tokens_BT)
    assert (later.extra["version_B"] == 12).all()


def test_micro_batches_keep_rollouts_of_their_own():
    objective = real(updates_per_rollout=2)
    parts = [Asked().batch(torch.tensor(rows)) for rows in ([0, 1], [2])]
    seen = {step: [objective.collect(part, step) for part in parts] for step in (0, 1, 2)}
    for step in seen:
        assert [part.ids_B.tolist() for part in seen[step]] == [[0, 1, 2, 3, 4, 5], [6, 7, 8]]
    same = lambda a, b: torch.equal(seen[a][1].sampled_logp_BT, seen[b][1].sampled_logp_BT)
    assert same(0, 1) and not (seen[2][1].sampled_logp_BT.shape == seen[1][1].sampled_logp_BT.shape and same(1, 2))


def test_rows_of_an_old_student_do_not_count():
    student, batch = Table(0), with_rewards(every_completion())
    batch.extra["version_B"] = torch.tensor([3, 4, 5] * 3)
    objective = policy(student, group=3, max_staleness=1)
    collected = objective.collect(batch, 5)
    assert collected.counted_BT.any(1).tolist() == [False, True, True] * 3
    every = policy(student, group=3).collect(batch, 5)
    kept = objective.loss("student", collected, 5).terms["policy"]
    assert kept.count == 12
    fresh = torch.tensor([1, 2, 4, 5, 7, 8])
    assert_close(kept.mean(), policy(student, group=3).loss("student", picked(every, fresh), 5).value())
    nobody = objective.collect(batch, 9)
    loss = objective.loss("student", nobody, 9)
    assert loss.value().item() == 0.0
    assert objective.collect(replace(batch, extra={"reward": batch.extra["reward"]}), 40).counted_BT.any()


def test_further_terms_on_the_same_states():
    from dataclasses import dataclass

    from potstill.contracts.terms import Term
    from potstill.objectives.states import TokenTerm

    @dataclass(frozen=True)
    class Gap(TokenTerm):
        name = "gap"
        needs = ("log_ratio",)
        coefficient: float = 2.0

        def __call__(self, states):
            gap_N = (states.student_logits() - states.teacher_logits()).square().sum(-1) + states.seen["log_ratio"]
            return Term((states.share_N * gap_N).sum(), states.count, self.coefficient, states.unit)

    student, teacher, batch = Table(0), Table(1), every_completion()
    objective = policy(student, teacher, task_coefficient=0.0, extras=(Gap(),))
    term = objective.loss("student", objective.collect(batch, 0), 0).terms["gap"]
    gap = (student.head(student.counted_hidden(batch)) - teacher.head(teacher.counted_hidden(batch))).square().sum(-1)
    ratio = logp_of(teacher, batch) - logp_of(student, batch)
    assert_close(term.mean(), 2 * (gap + ratio).mean())


# -------------------------------------------------------------------- what cannot be meant


def test_what_cannot_work_is_refused():
    student, batch = Table(0), every_completion()
    spec = {"optimizer": OptimizerSpec(), "seed": 0}
    with pytest.raises(RecipeError, match="either rollouts .* or a rollout of its own"):
        PolicyGradient(student, **spec)
    with pytest.raises(RecipeError, match=r"rollouts\.top_p 1, rollouts\.top_k 0 and rollouts\.temperature 1\.0"):
        PolicyGradient(student, rollouts=RolloutSpec(top_p=0.9, samples_per_prompt=2), **spec)
    with pytest.raises(RecipeError, match=r"rollouts\.temperature 0\.5"):
        PolicyGradient(student, rollouts=RolloutSpec(samples_per_prompt=2), temperature=0.5, **spec)
    with pytest.raises(RecipeError, match=r"within a group: set rollouts\.samples_per_prompt"):
        PolicyGradient(student, rollouts=RolloutSpec(), reward=length_and_letters, **spec)
    with pytest.raises(RecipeError, match="nothing is left to learn"):
        policy(student, task_coefficient=0.0)
    with pytest.raises(RecipeError, match="divides by a length"):
        policy(student, average="constant")
    with pytest.raises(RecipeError, match="3 must be a multiple of minibatches 2"):
        policy(student, updates_per_rollout=3, minibatches=2)
    with pytest.raises(RecipeError, match="The last of 4 updates uses rollouts 3 steps old"):
        policy(student, updates_per_rollout=4, max_staleness=2)
    with pytest.raises(DataError, match=r"A task's advantage needs rewards"):
        policy(student, group=3).collect(batch, 0)
    with pytest.raises(DataError, match="whole groups: got 9 rewards in groups of 2"):
        policy(student, group=2).collect(with_rewards(batch), 0)
    with pytest.raises(DataError, match="A reward is not a finite number"):
        policy(student, group=3).collect(replace(batch, extra={"reward": [math.nan] * 9}), 0)
    with pytest.raises(DataError, match="needs prompts to continue"):
        real().collect(batch, 0)
    with pytest.raises(ModelError, match="different vocabularies"):
        PolicyGradient(
            model(0), LocalTeacher(model(1, character_tokenizer(["xyz"]))), rollouts=RolloutSpec(), **spec,
            task_coefficient=0.0,
        )  # fmt: skip
    silent = Table(1)
    silent.table.weight.data[0] = -math.inf
    with pytest.raises(NonFiniteError, match="gives probability 0 to a token"):
        policy(student, silent, task_coefficient=0.0).collect(batch, 0)


def test_nothing_counted_is_no_nan():
    student, batch = Table(0), with_rewards(every_completion())
    batch.counted_BT[:] = False
    objective = policy(student, Table(1), group=3)
    loss = objective.loss("student", objective.collect(batch, 0), 0)
    assert loss.value().item() == 0.0
    assert Rows.of(batch.counted_BT).mask_BR.shape == (9, 0)
