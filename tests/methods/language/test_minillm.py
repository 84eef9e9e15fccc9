"""MiniLLM: over all completions with their probabilities its gradient is that of the reverse KL of whole sequences."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import GemmaConfig, LlamaConfig, Qwen3Config

from potstill import recipe as recipes
from potstill.contracts.batch import PromptBatch, TokenBatch
from potstill.contracts.errors import DataError, ModelError, RecipeError
from potstill.contracts.players import OptimizerSpec
from potstill.contracts.signals import HiddenAndHead
from potstill.divergences import ReverseKL
from potstill.methods.language.minillm import SequenceReverseKL, to_go
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.policy import Clip, clipped, picked
from potstill.objectives.tokens import RolloutSpec
from potstill.rollouts.local import sample
from potstill.rollouts.mixed import Mixed
from potstill.run import Run, open_folder
from potstill.teachers import LocalTeacher

V, NEW = 3, 3
TOKENIZER = character_tokenizer(["abcdefg "])
TEXT = "A pot still boils the wash, and what rises is lighter than what stays. Then it drips, clear and strong."


class Table(nn.Module):
    """A language model that is a table of logits by place and last word."""

    kind, name, tokenizer, compiled, has_linear_head, vocabulary = "causal_lm", "table", None, False, True, V

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.table = nn.Linear(NEW * V, V, bias=False, dtype=torch.float64)
        self.table.weight.data.normal_(generator=torch.Generator().manual_seed(seed))

    def counted_hidden(self, batch: TokenBatch) -> Tensor:
        state = torch.arange(batch.tokens_BT.shape[1] - 1) * V + batch.tokens_BT[:, :-1]
        return nn.functional.one_hot(state, NEW * V).double()[batch.counted_BT[:, 1:]]

    def head(self, hidden: Tensor) -> Tensor:
        return self.table(hidden)

    def with_head(self, hidden: Tensor) -> HiddenAndHead:
        return HiddenAndHead(hidden, self.table.weight)


def every_completion() -> TokenBatch:
    tokens = torch.tensor([[0, *rest] for rest in itertools.product(range(V), repeat=NEW)])
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, 0] = False
    return TokenBatch(torch.arange(len(tokens)), tokens, torch.ones_like(counted), counted)


def rows_of(model: Table, batch: TokenBatch) -> Tensor:
    return model.head(model.counted_hidden(batch)).log_softmax(-1)


def logp_of(model: Table, batch: TokenBatch) -> Tensor:
    return rows_of(model, batch).gather(-1, batch.tokens_counted[:, None])[:, 0]


def gradient(value: Tensor, model: Table) -> Tensor:
    return torch.autograd.grad(value, model.table.weight, retain_graph=True)[0]


def objective(student, teacher, **options) -> SequenceReverseKL:
    options = {
        "variant": "paper", "teacher_mixed": 0.0, "single_step": True, "length_norm": False, "clip": None,
        "rollouts": RolloutSpec(max_new_tokens=NEW), "average": "constant", "length": 1,
    } | options  # fmt: skip
    return SequenceReverseKL(student, LocalTeacher(teacher), optimizer=OptimizerSpec(), seed=0, **options)


@pytest.mark.parametrize("single_step", [True, False])
def test_the_gradient_is_that_of_the_reverse_kl_of_sequences(single_step):
    student, teacher, batch = Table(0), Table(1), every_completion()
    method = objective(student, teacher, single_step=single_step)
    judged = method.judged(batch, 0)
    log_q, log_p = (logp_of(m, batch).view(-1, NEW).sum(1) for m in (student, teacher))
    chance = log_q.exp().detach()
    one = lambda i: method.loss("student", picked(judged, torch.tensor([i])), 0).value()
    found = sum(chance[i] * one(i) for i in range(len(batch)))
    assert_close(
        gradient(found, student),
        gradient((log_q.exp() * (log_q - log_p.detach())).sum(), student),
        rtol=1e-6,
        atol=1e-9,
    )


def test_the_parts_are_the_exact_divergence_and_the_later_rewards():
    student, teacher, batch = Table(0), Table(1), every_completion()
    method = objective(student, teacher)
    judged = method.judged(batch, 0)
    terms = method.loss("student", judged, 0).terms
    reward = (logp_of(teacher, batch) - logp_of(student, batch)).detach().view(-1, NEW)
    later = torch.stack([reward[:, 1] + reward[:, 2], reward[:, 2], torch.zeros(27)], 1)
    assert_close(judged.extra["advantage_BT"][:, 1:], later)
    kl = ReverseKL()(teacher_logp=rows_of(teacher, batch), student_logp=rows_of(student, batch))
    assert_close(terms["divergence"].mean(), kl.sum() / 27)
    assert_close(gradient(terms["divergence"].mean(), student), gradient(kl.sum() / 27, student))
    assert set(objective(student, teacher, single_step=False).loss("student", judged, 0).terms) == {"policy"}


def test_rewards_to_go_by_hand():
    reward, mask = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 99.0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    here = lambda *args, **options: to_go(reward, mask, *args, **options)
    assert_close(here(False), torch.tensor([[7.0, 6.0, 4.0], [8.0, 5.0, 0.0]]))
    assert_close(here(True), torch.tensor([[7 / 3, 3.0, 4.0], [4.0, 5.0, 0.0]]))
    assert_close(here(False, later=True), torch.tensor([[6.0, 4.0, 0.0], [5.0, 0.0, 0.0]]))
    assert_close(here(True, later=True), torch.tensor([[3.0, 4.0, 0.0], [5.0, 0.0, 0.0]]))
    assert_close(here(False, gamma=0.5), torch.tensor([[3.0, 4.0, 4.0], [5.5, 5.0, 0.0]]))
    assert to_go(torch.zeros(2, 0), torch.zeros(2, 0).bool(), True).shape == (2, 0)


def mixed_batch(student: Table, teacher: Table, batch: TokenBatch, alpha: float) -> tuple[TokenBatch, Tensor]:
    """The batch as if the mixture had written it, and the mixture's log-probabilities."""
    log_q, log_p = logp_of(student, batch).detach(), logp_of(teacher, batch)
    log_m = ((1 - alpha) * log_q.exp() + alpha * log_p.detach().exp()).log()
    where = torch.zeros(batch.tokens_BT.shape, dtype=torch.float64).masked_scatter(batch.counted_BT, log_m)
    return replace(batch, extra={"mixed_logp_BT": where}), log_m


@pytest.mark.parametrize("single_step", [True, False])
def test_importance_weights_undo_the_mixing_at_a_token(single_step):
    """The last token alone, drawn from the mixture: the mean gradient is that of the student's own samples."""
    student, teacher, batch = Table(0), Table(1), every_completion()
    batch.counted_BT[:, :NEW] = False
    batch = picked(replace(batch, sampled_logp_BT=torch.zeros(27, NEW + 1)), torch.arange(V))  # one prefix
    batch = replace(batch, sampled_logp_BT=None)
    found = {}
    for alpha in (0.2, 0.7):
        method = objective(student, teacher, teacher_mixed=alpha, single_step=single_step)
        mixed, log_m = mixed_batch(student, teacher, batch, alpha)
        judged = method.judged(mixed, 0)
        assert_close(judged.sampled_logp_BT[judged.counted_BT], logp_of(student, batch).detach())
        parts = [method.loss("student", picked(judged, torch.tensor([i])), 0).value() for i in range(V)]
        found[alpha] = gradient((log_m.exp() * torch.stack(parts)).sum(), student)
    kl = ReverseKL()(teacher_logp=rows_of(teacher, batch).detach(), student_logp=rows_of(student, batch))[0]
    for value in found.values():
        assert_close(value, gradient(kl, student), rtol=1e-6, atol=1e-9)


def test_the_papers_weight_is_on_both_parts():
    student, teacher, batch = Table(0), Table(1), every_completion()
    method = objective(student, teacher, teacher_mixed=0.4)
    mixed, log_m = mixed_batch(student, teacher, batch, 0.4)
    judged = method.judged(mixed, 0)
    w = (logp_of(student, batch).detach() - log_m).exp()
    kl = ReverseKL()(teacher_logp=rows_of(teacher, batch), student_logp=rows_of(student, batch))
    assert_close(method.loss("student", judged, 0).terms["divergence"].mean(), (w * kl).sum() / 27)
    plain = objective(student, teacher).judged(batch, 0).extra["advantage_BT"][batch.counted_BT]
    assert_close(judged.extra["advantage_BT"][batch.counted_BT], w * plain)


def test_the_codes_rewards_are_doubled_and_bounded():
    student, teacher, batch = Table(0), Table(1), every_completion()
    teacher.table.weight.data *= 40
    r = 2 * (logp_of(teacher, batch) - logp_of(student, batch)).detach().view(-1, NEW)
    assert (r.abs() > 100).any() and (r.abs() < 100).any()
    judged = objective(student, teacher, variant="code", length_norm=False).judged(batch, 0)
    to_come = to_go(r.clamp(-100, 100), torch.ones_like(r, dtype=torch.bool), False, gamma=0.95)
    assert_close(judged.extra["advantage_BT"][:, 1:], (to_come - to_come.mean()) / to_come.std())


def test_the_code_whitens_discounts_and_clips_the_weight_with_the_ratio():
    student, teacher, batch = Table(0), Table(1), every_completion()
    method = objective(
        student, teacher, variant="code", teacher_mixed=0.5, length_norm=True, clip=Clip(), average="token"
    )
    mixed, log_m = mixed_batch(student, teacher, batch, 0.5)
    judged = method.judged(mixed, 0)
    r = 2 * (logp_of(teacher, batch) - logp_of(student, batch)).detach().view(-1, NEW)
    R2 = r[:, 2]
    R1 = r[:, 1] + 0.95 * R2
    to_come = torch.stack([(r[:, 0] + 0.95 * R1) / 3, R1 / 2, R2], 1)
    advantage = (to_come - to_come.mean()) / (to_come.var() + 1e-8).sqrt()
    assert_close(judged.extra["advantage_BT"][:, 1:], advantage)
    loss = method.loss("student", judged, 0)
    log_rho_w = logp_of(student, batch) - log_m
    expected = clipped(log_rho_w, advantage.flatten(), Clip())[0].mean()
    assert_close(loss.terms["policy"].mean(), expected)
    kl = ReverseKL()(teacher_logp=rows_of(teacher, batch), student_logp=rows_of(student, batch))
    assert_close(loss.terms["divergence"].mean(), kl.mean())
    assert method.couples == "batch" and objective(student, teacher).couples == "position"


# -------------------------------------------------------------------- real models


def model(seed: int, tokenizer=TOKENIZER) -> CausalLM:
    torch.manual_seed(seed)
    net = CausalLM.PACKAGED["llama-tiny"](tokenizer=tokenizer, layers=1, width=32)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return net


def prompts() -> PromptBatch:
    return PromptBatch(
        torch.arange(2), torch.tensor([[0, 4, 5], [6, 7, 8]]), torch.tensor([[False, True, True], [True] * 3])
    )


def test_a_mixture_writes_what_it_says():
    student, guide = model(0), model(1)
    mixed = Mixed(student, guide, 0.3, temperature=2.0)
    out = sample(mixed, prompts(), max_new_tokens=6, samples_per_prompt=40, seed=1)
    q, p = ((m.counted_logits(out) / 2).softmax(-1) for m in (student, guide))
    log_m = (0.7 * q + 0.3 * p).log()
    assert_close(
        out.sampled_logp_BT[out.counted_BT], log_m.gather(-1, out.tokens_counted[:, None])[:, 0], rtol=1e-4, atol=1e-4
    )
    shares = Mixed(student, guide, 1e-6), Mixed(student, guide, 1 - 1e-6)
    hidden = torch.randn(4, 64)
    for share, whose, half in zip(shares, (student, guide), hidden.tensor_split([32], -1)):
        share.width = 32
        assert_close(share.head(hidden), whose.head(half).log_softmax(-1), rtol=1e-3, atol=1e-3)
    assert student.training, "as it was before"
    with pytest.raises(RecipeError, match="strictly between 0 and 1, got 1"):
        Mixed(student, guide, 1.0)


class Texts:
    def __len__(self) -> int:
        return 5

    def batch(self, rows: Tensor, epoch: int = 0) -> TokenBatch:
        tokens = torch.stack([rows % 3 + 4, rows + 4, torch.full_like(rows, 6)], 1)
        counted = torch.ones_like(tokens, dtype=torch.bool)
        counted[:, 0] = False
        return TokenBatch(rows, tokens, torch.ones_like(counted), counted)


def test_rollouts_are_of_the_mixture_and_weigh_no_more_than_it_allows():
    student, teacher = model(0), model(1)
    method = SequenceReverseKL(
        student, LocalTeacher(teacher), optimizer=OptimizerSpec(), seed=3, variant="paper", teacher_mixed=0.2,
        single_step=True, length_norm=True, rollouts=RolloutSpec(max_new_tokens=8, samples_per_prompt=8),
    )  # fmt: skip
    collected = method.collect(prompts(), 0)
    log_q = student.counted_logits(collected).log_softmax(-1).gather(-1, collected.tokens_counted[:, None])[:, 0]
    assert_close(collected.sampled_logp_BT[collected.counted_BT], log_q.detach(), rtol=1e-4, atol=1e-4)
    w = collected.extra["importance_BT"][collected.counted_BT]
    assert (w < 1 / 0.8 + 1e-4).all() and ((w - 1).abs() > 1e-2).any()
    assert_close(
        w, (log_q.detach() - collected.extra["mixed_logp_BT"][collected.counted_BT]).exp(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_text_is_read_beside(variant):
    student, teacher = model(0), model(1)
    method = SequenceReverseKL(
        student, LocalTeacher(teacher), optimizer=OptimizerSpec(), seed=3, variant=variant, teacher_mixed=0.2,
        single_step=True, length_norm=True, pretraining=0.5, text=Texts(), rollouts=RolloutSpec(max_new_tokens=4),
    )  # fmt: skip
    collected = method.collect(prompts(), 0)
    terms = method.loss("student", collected, 0).terms
    names = {"pretraining_cross_entropy"} | ({"pretraining_divergence"} if variant == "code" else set())
    assert set(terms) == {"policy", "divergence", *names}
    assert terms["pretraining_cross_entropy"].count == 4
    total = sum(terms[name].mean() for name in names)
    means = []
    for rows in itertools.product(range(5), repeat=2):
        text = Texts().batch(torch.tensor(rows))
        log_q, log_p = (m.counted_logits(text).log_softmax(-1) for m in (student, teacher))
        nll = -log_q.gather(-1, text.tokens_counted[:, None]).mean()
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        means.append((0.5 * nll if variant == "paper" else 0.25 * nll + 0.25 * kl).item())
    assert min(abs(total.item() - mean) for mean in means) < 1e-5
    assert all(p.grad is None for p in teacher.parameters())
    again = method.loss("student", collected, 1).terms["pretraining_cross_entropy"].total
    assert again != terms["pretraining_cross_entropy"].total, "another step reads other text"
    assert not [name for name in method.state_dict() if not name.startswith(("student.", "_extra"))]


def plan_of(lines, student, teacher, **overrides):
    raw = {
        "method": {"name": "minillm", "rollouts": {"max_new_tokens": 6}, "updates_per_rollout": 2, "minibatches": 2},
        "student": str(student),
        "teacher": str(teacher),
        "data": {"text": str(lines), "length": 16, "prompt_length": 6},
        "train": {"steps": 2, "batch": 4, "lr": 1e-3, "trackers": [], "device": "cpu"},
        "eval": {"limit": 4, "batch": 4},
    }
    return recipes.resolve(recipes.apply(raw, overrides))


@pytest.fixture
def lines(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(f"{TEXT} {i}" for i in range(40)))
    return file


def run(folder, *args, **overrides):
    plan = plan_of(*args, **overrides)
    open_folder(folder, recipes.write(plan))
    return Run(plan, folder).execute()


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, GemmaConfig])
def test_real_architectures(config, tmp_path, lines, tiny_lm):
    student, teacher = tiny_lm(3, config), tiny_lm(4, config, hidden_size=48)
    for variant in ("paper", "code"):
        result = run(tmp_path / variant, lines, student, teacher, **{"method.variant": variant, "method.warm_start": 1})
        assert result.metrics["rollout_reverse_kl"] > 0


def test_what_cannot_work_is_refused(tmp_path, lines, tiny_lm):
    student = tiny_lm(1)
    with pytest.raises(RecipeError, match="'paper' or 'code'"):
        plan_of(lines, student, student, **{"method.variant": "papr"})
    with pytest.raises(RecipeError, match=r"method\.teacher_mixed"):
        plan_of(lines, student, student, **{"method.teacher_mixed": 1.0})
    with pytest.raises(RecipeError, match=r"rollouts\.top_p 1, rollouts\.top_k 0"):
        run(tmp_path / "a", lines, student, student, **{"method.rollouts.top_p": 0.9})
    with pytest.raises(RecipeError, match="couples the samples of a batch"):
        run(tmp_path / "b", lines, student, student, **{"method.variant": "code", "train.micro_batch": 2})
    with pytest.raises(ModelError, match="different vocabularies"):
        run(tmp_path / "c", lines, student, tiny_lm(2, tokenizer=character_tokenizer("abc ")))
    with pytest.raises(RecipeError, match="needs text, or pretraining 0"):
        objective(Table(0), Table(1), pretraining=1.0)
    with pytest.raises(DataError, match="needs prompts to continue"):
        objective(Table(0), Table(1), teacher_mixed=0.2).collect(every_completion(), 0)
