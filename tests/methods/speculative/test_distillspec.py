"""DistillSpec: the loss is the acceptance lost, the source follows its probabilities, and real architectures run."""

import json

import pytest
import torch
import yaml
from torch.testing import assert_close
from transformers import LlamaConfig, Qwen3Config

from potstill import recipe as recipes
from potstill.contracts import keyed
from potstill.contracts.errors import ModelError, RecipeError
from potstill.evaluation.speculative import acceptance
from potstill.methods.speculative.distillspec import DistillSpec, objective_of
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives import tokens
from potstill.objectives.tokens import completed
from potstill.rollouts.local import sample
from potstill.rollouts.speculative import Lenience
from potstill.run import Run, open_folder

TEXT = "A pot still boils the wash, and what rises is lighter than what stays. Then it drips, clear and strong."


@pytest.fixture
def lines(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(f"{TEXT} {i}" for i in range(40)))
    return file


def plan_of(lines, student, teacher, /, **overrides):
    raw = {
        "method": {"name": "distillspec", "max_new_tokens": 6, "eval_prompts": 2, "gamma": 3},
        "student": str(student),
        "teacher": str(teacher),
        "data": {"text": str(lines), "length": 16, "prompt_length": 6},
        "train": {"steps": 2, "batch": 4, "lr": 1e-3, "trackers": [], "device": "cpu"},
        "eval": {"limit": 4, "batch": 4},
    }
    return recipes.resolve(recipes.apply(raw, overrides))


def run(folder, *args, **overrides):
    plan = plan_of(*args, **overrides)
    open_folder(folder, recipes.write(plan))
    return Run(plan, folder).execute()


def pair(tmp_path, lines, tiny_lm, **options):
    """The objective of a configuration, its draft and target (far apart) and a batch of prompts."""
    student, teacher = tiny_lm(1, spread=0.3), tiny_lm(2, spread=0.3)
    plan = plan_of(lines, student, teacher, **{f"method.{k}": v for k, v in options.items()})
    work = Run(plan, tmp_path / "run")
    draft, target = work.student(), work.teacher()
    batch = work.prompts().batch(torch.arange(4))
    return objective_of(work, plan.config, draft, target), draft, target.model, batch


@pytest.mark.parametrize(("temperature", "source"), [(1.0, "draft"), (0.5, "target"), (2.0, "fixed")])
def test_the_loss_of_tvd_is_the_acceptance_that_is_lost(tmp_path, lines, tiny_lm, temperature, source):
    """Mean over sequences of the mean over their tokens of 1 - sum_v min(p, q); sequences of different lengths."""
    objective, draft, target, batch = pair(tmp_path, lines, tiny_lm, temperature=temperature, data_source=source)
    texts = objective.collect(batch, 0)
    for row, cut in enumerate((1, 3, 6, 2)):  # rows of different lengths
        places = texts.counted_BT[row].nonzero()[cut:]
        texts.counted_BT[row, places] = texts.attention_BT[row, places] = False
    term = objective.loss("student", texts, 0).terms["divergence"]
    with torch.no_grad():
        p, q = (
            (model.head(model.hidden(texts.tokens_BT, texts.attention_BT)) / temperature).softmax(-1)[:, :-1]
            for model in (target, draft)
        )
    counted = texts.counted_BT[:, 1:]
    lost = [(1 - acceptance(p[b], q[b])[counted[b]]).mean() for b in range(4)]
    assert_close(term.total / term.count, torch.stack(lost).mean(), rtol=1e-4, atol=1e-5)
    assert min(lost) > 0.02


def test_texts_come_from_the_named_source(tmp_path, lines, tiny_lm):
    """The same keyed sampler under draft and target writes different texts; the fixed ones are the data's."""
    for source in ("fixed", "draft", "target"):
        objective, draft, target, batch = pair(tmp_path, lines, tiny_lm, data_source=source)
        written = {
            name: sample(model, batch, max_new_tokens=6, seed=keyed.key(objective.seed, "rollout", 3)).tokens_BT
            for name, model in (("draft", draft), ("target", target))
        }
        written["fixed"] = completed(batch, draft.pad_id).tokens_BT
        collected = objective.collect(batch, 3).tokens_BT
        same = {n for n, t in written.items() if t.shape == collected.shape and torch.equal(t, collected)}
        assert same == {source}


def test_the_mixer_follows_its_probabilities_and_a_step_its_key(tmp_path, lines, tiny_lm, monkeypatch):
    """lambda fixed, (1 - lambda) beta draft, the rest target; the two coins are independent."""
    objective, draft, target, batch = pair(
        tmp_path, lines, tiny_lm, data_source="mixed", fixed_share=0.3, draft_share=0.25
    )
    monkeypatch.setattr(tokens, "sample", lambda model, *_, **__: model)
    monkeypatch.setattr(tokens, "completed", lambda *_: "fixed")
    steps = 4000
    seen = [objective.collect(batch, step) for step in range(steps)]
    assert [objective.collect(batch, step) is seen[step] for step in (5, 1, 77)] == [True] * 3
    share = lambda which: sum(s is which for s in seen) / steps
    fixed = sum(isinstance(s, str) for s in seen) / steps
    for found, expected in ((fixed, 0.3), (share(draft), 0.7 * 0.25), (share(target), 0.7 * 0.75)):
        assert abs(found - expected) < 4 * (expected * (1 - expected) / steps) ** 0.5


def test_target_samples_carry_no_weight_and_the_target_does_not_learn(tmp_path, lines, tiny_lm):
    objective, draft, target, batch = pair(tmp_path, lines, tiny_lm, data_source="target")
    texts = objective.collect(batch, 0)
    with_logp = objective.loss("student", texts, 0).terms["divergence"].total
    texts.sampled_logp_BT = None
    assert_close(objective.loss("student", texts, 0).terms["divergence"].total, with_logp, rtol=0, atol=0)
    with_logp.backward()
    assert all(p.grad is None for p in target.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in draft.parameters())
    assert not any(name.startswith(("policy", "teacher")) for name in objective.state_dict())


def test_shares():
    assert DistillSpec(data_source="fixed").shares() == (0, 0)
    assert DistillSpec(data_source="draft").shares() == (1, 0)
    assert DistillSpec(data_source="target").shares() == (1, 1)
    assert DistillSpec(data_source="mixed", fixed_share=0.25, draft_share=0.4).shares() == (0.75, 0.6)


@pytest.mark.parametrize("config", [Qwen3Config, LlamaConfig])
def test_real_architectures_and_stages(config, tmp_path, lines, tiny_lm):
    student, teacher = tiny_lm(3, config), tiny_lm(4, config, hidden_size=48)
    found = run(
        tmp_path / "run", lines, student, teacher,
        **{
            "method.fine_tune": 1, "method.warm_start": 2, "method.data_source": "mixed", "method.control": True,
            "method.lenience": [{"kind": "f_sq", "e": 0.5}],
        },
    ).metrics  # fmt: skip
    stages = [json.loads(line)["stage"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(stages)) == ["fine-tune", "warm start", "distil", "control"]
    for prefix in ("before_", "", "control_"):
        assert 1 <= found[f"{prefix}block_efficiency"] <= 4
        assert 1 <= found[f"{prefix}greedy_block_efficiency"] <= 4
        assert 0 < found[f"{prefix}acceptance_target_texts"] < 1
        assert found[f"{prefix}bound"] <= found[f"{prefix}sharper_bound"] + 1e-9
    rows = json.loads((tmp_path / "run" / "records" / "4-speculation.json").read_text())["rows"]
    assert [row[1] for row in rows] == ["sampling", "greedy", "f_sq e=0.5"] * 3
    CausalLM.from_pretrained(str(tmp_path / "run" / "student"))


def test_a_copy_of_the_target_is_accepted_whole(tmp_path, lines, tiny_lm):
    """Special case q = p: every draft token accepted, gamma + 1 tokens a call but for the last block."""
    teacher = tiny_lm(2, spread=0.3)
    found = run(tmp_path / "run", lines, teacher, teacher, **{"train.lr": 1e-12, "method.max_new_tokens": 8}).metrics
    assert found["acceptance_target_texts"] == pytest.approx(1, abs=1e-4)
    assert found["acceptance"] == found["greedy_acceptance"] == 1
    assert found["greedy_block_efficiency"] == found["greedy_transformers_block_efficiency"] == 4


def test_what_cannot_work_is_refused(tmp_path, lines, tiny_lm):
    student = tiny_lm(1)
    with pytest.raises(RecipeError, match="'fixed', 'draft', 'target' or 'mixed'"):
        plan_of(lines, student, student, **{"method.data_source": "drafts"})
    with pytest.raises(RecipeError, match=r"method\.lenience.*e must lie in \(0, 1\], got 2"):
        plan_of(lines, student, student, **{"method.lenience": [{"e": 2.0}]})
    with pytest.raises(ModelError, match=r"different vocabularies"):
        run(tmp_path / "c", lines, student, tiny_lm(2, tokenizer=character_tokenizer("abc ")))


def test_lenience_is_read_and_written_back(lines, tiny_lm):
    plan = plan_of(lines, tiny_lm(1), tiny_lm(2), **{"method.lenience": [{"kind": "f_exp", "e": 0.5}]})
    assert plan.config.lenience == (Lenience("f_exp", 0.5),)
    again = recipes.resolve(yaml.safe_load(recipes.write(plan)))
    assert again.config == plan.config
