"""TIP: a share of one is plain distillation, the kept gradient is the masked mean's, and its numbers mean what they say."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import Gemma2Config, LlamaConfig, Qwen3Config

from potstill import recipe as recipes
from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import ModelError, RecipeError
from potstill.contracts.files import read_json
from potstill.contracts.players import OptimizerSpec
from potstill.divergences import ReverseKL
from potstill.methods.language.tip import TIP, TokenImportance
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.tokens import TokenDistillation
from potstill.run import Run, open_folder
from potstill.teachers import LocalTeacher
from potstill.weighting import (
    DivergenceTop,
    EntropyTop,
    Overconfident,
    PerResponse,
    Positions,
    SampledShare,
    SoftOR,
    Uniform,
)

TOKENIZER = character_tokenizer(["abcdefg "])
RULES = [EntropyTop, DivergenceTop, SoftOR, Overconfident, SampledShare]


def model(seed: int) -> CausalLM:
    torch.manual_seed(seed)
    net = CausalLM.PACKAGED["llama-tiny"](tokenizer=TOKENIZER, layers=1, width=32).double()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)
    return net


def batch(lengths: tuple[int, ...] = (12, 9, 6)) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(4, TOKENIZER.vocab_size, (len(lengths), 12), generator=generator)
    attention_BT = torch.arange(12)[None] < torch.tensor(lengths)[:, None]
    return TokenBatch(torch.arange(len(lengths)), tokens_BT, attention_BT, attention_BT & (torch.arange(12) >= 2))


def objective(weighting, cls=TokenImportance, **options) -> TokenDistillation:
    options = {"average": "sequence", **options}
    return cls(model(0), LocalTeacher(model(1)), ReverseKL(), optimizer=OptimizerSpec(), seed=0, weighting=weighting,
               **options)  # fmt: skip


def value_and_gradient(made: TokenDistillation, rows: TokenBatch) -> tuple[Tensor, list[Tensor]]:
    value = made.loss("student", rows, 0).value()
    return value, list(torch.autograd.grad(value, list(made.student.parameters())))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("average", ["sequence", "token"])
def test_a_share_of_one_is_plain_distillation_bit_for_bit(rule, average):
    rows = batch()
    plain, gradient = value_and_gradient(objective(Uniform(), TokenDistillation, average=average), rows)
    for weighting in (rule(1.0), PerResponse(rule(1.0))):
        value, found = value_and_gradient(objective(weighting, average=average), batch())
        assert torch.equal(value, plain)
        assert all(map(torch.equal, found, gradient))


@pytest.mark.parametrize("rule", RULES)
def test_the_loss_and_its_gradient_are_the_mean_over_what_is_kept(rule):
    """Equation 9, from whole logits by hand: the student's scores choose, and nothing flows through the choice."""
    made, rows = objective(PerResponse(rule(0.4))), batch()
    value, gradient = value_and_gradient(made, rows)
    logits = [net.counted_logits(rows).log_softmax(-1) for net in (made.student, made.teacher.model)]
    log_q, log_p = logits[0], logits[1].detach()
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
    forward = (log_p.exp() * (log_p - log_q)).sum(-1)
    m = ((log_p.exp() + log_q.exp()) / 2).log()
    jsd = ((log_p.exp() * (log_p - m)).sum(-1) + (log_q.exp() * (log_q - m)).sum(-1)) / 2
    seen = {"student_entropy": -(log_q.exp() * log_q).sum(-1), "reverse_kl": divergence, "forward_kl": forward}
    lengths = rows.counted_BT.sum(1).tolist()
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    spread = lambda x: torch.stack([torch.nn.functional.pad(r, (0, max(lengths) - len(r))) for r in x.split(lengths)])
    values = {f"{name}_BR": spread(x.detach()) for name, x in (seen | {"jensen_shannon": jsd}).items()}
    states = made._states(rows)
    noise = made._positions(states, 0).noise_BR
    chosen = rule(0.4)(Positions(mask, noise_BR=noise, **values)) > 0
    assert chosen.sum(1).tolist() == [4, 2, 1]
    means = [spread(divergence)[b][chosen[b]].mean() for b in range(3)]
    expected = torch.stack(means).mean()
    assert_close(value, expected, rtol=1e-6, atol=0)
    by_hand = torch.autograd.grad(expected, list(made.student.parameters()))
    for a, b in zip(gradient, by_hand, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_padding_changes_nothing_and_the_teacher_gets_no_gradient():
    made, rows = objective(PerResponse(SoftOR(0.4))), batch()
    value = made.loss("student", rows, 0).value()
    pad = lambda x, fill: torch.nn.functional.pad(x, (0, 3), value=fill)
    wider = TokenBatch(rows.ids_B, pad(rows.tokens_BT, 5), pad(rows.attention_BT, False), pad(rows.counted_BT, False))
    assert_close(made.loss("student", wider, 0).value(), value)
    value.backward()
    assert all(p.grad is None for p in made.teacher.model.parameters())


def test_only_kept_positions_build_rows_of_the_vocabulary(monkeypatch):
    """The first pass makes no gradient, the second looks at the kept positions only."""
    made, rows = objective(PerResponse(SoftOR(0.4))), batch()
    looked: list[tuple[bool, int]] = []
    compare = TokenDistillation._compare

    def watching(self, teacher, hidden_ND, batch, tokens_N, weights_N):
        looked.append((torch.is_grad_enabled(), len(tokens_N) if weights_N is None else int((weights_N != 0).sum())))
        return compare(self, teacher, hidden_ND, batch, tokens_N, weights_N)

    monkeypatch.setattr(TokenDistillation, "_compare", watching)
    made.loss("student", rows, 0).value().backward()
    assert looked == [(False, 21), (True, 7)]


def test_quadrants_and_kept_shares_are_watched():
    metrics = objective(PerResponse(SoftOR(0.4))).loss("student", batch(), 0).metrics
    assert metrics["kept"].mean().item() == pytest.approx(7 / 21)
    assert sum(metrics[q].mean().item() for q in ("q1", "q2", "q3", "q4")) == pytest.approx(1.0)
    seen = objective(Uniform()).loss("student", batch(), 0).metrics
    assert all(seen[q].mean() == metrics[q].mean() for q in ("q1", "q2", "q3", "q4"))
    drawn = objective(SampledShare(0.4, alpha=0.0)).loss("student", batch(), 0).metrics  # no first pass: the kept alone
    assert sum(drawn[q].mean().item() for q in ("q1", "q2", "q3", "q4")) == pytest.approx(7 / 21)


def test_the_papers_defaults():
    config = TIP()
    assert config.weighting == PerResponse(SoftOR(0.5))
    assert (config.divergence, config.average, config.temperature) == (ReverseKL(), "sequence", 1.0)
    assert (config.rollouts.max_new_tokens, config.rollouts.samples_per_prompt) == (8192, 1)


def plan_of(student, teacher, /, **overrides):
    raw = {
        "method": {"name": "tip", "rollouts": {"max_new_tokens": 6}, "warm_start": 2, "warm_start_on": "mistaken"},
        "student": str(student),
        "teacher": str(teacher),
        "data": {"task": "rewriting", "size": 40, "test_size": 8, "length": 32},
        "train": {"steps": 2, "batch": 4, "lr": 1e-3, "trackers": [], "device": "cpu"},
        "eval": {"limit": 4, "batch": 4},
    }
    return recipes.resolve(recipes.apply(raw, overrides))


def run(folder, *args, **overrides):
    plan = plan_of(*args, **overrides)
    open_folder(folder, recipes.write(plan))
    return Run(plan, folder).execute()


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, Gemma2Config])
def test_real_architectures(config, tmp_path, tiny_lm):
    result = run(tmp_path / "run", tiny_lm(3, config), tiny_lm(4, config, hidden_size=48))
    assert {"accuracy", "confident_errors", "rollout_reverse_kl"} <= result.metrics.keys()
    rows = [row for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "distil" in row]
    assert len(rows) == 2
    assert all("q3" in row and "kept" in row for row in rows)
    assert read_json(tmp_path / "run" / "result.json")["student_kind"] == "causal_lm"


def test_what_cannot_work_is_refused(tmp_path, tiny_lm):
    student = tiny_lm(1)
    with pytest.raises(RecipeError, match=r"SoftOR.share must lie in \(0, 1\]"):
        plan_of(student, student, **{"method.weighting": {"name": "SoftOR", "share": 0}})
    with pytest.raises(RecipeError, match="SoftOr is no Weighting. Did you mean SoftOR"):
        plan_of(student, student, **{"method.weighting": "SoftOr"})
    with pytest.raises(RecipeError, match=r"warm_start_on: rows of rewriting have no wrong, they have answer"):
        run(tmp_path / "a", student, student, **{"method.warm_start_on": "wrong"})
    with pytest.raises(ModelError, match="different vocabularies"):
        run(tmp_path / "b", student, tiny_lm(2, tokenizer=character_tokenizer("abc ")))
