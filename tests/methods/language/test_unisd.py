"""UniSD: neutral switches are plain self-distillation, modes are the paper's arms, and real architectures run."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

from potstill import recipe as recipes
from potstill.contracts.errors import DataError, RecipeError
from potstill.divergences import Clipped, ForwardKL, JensenShannon, ReverseKL
from potstill.methods.language import unisd as module
from potstill.methods.language.unisd import MODES, UniSD, extras
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.run import Result, Run, open_folder
from potstill.weighting import Agreement, PerResponse, Uniform

SHORT = {"example": "{prompt}{completion}", "between": " ", "whole": "{examples} {prompt}", "shots": 1}
ARCHITECTURES = [LlamaConfig, Qwen3Config, Gemma3TextConfig]


def plan_of(student, /, data=None, **overrides):
    raw = {
        "method": {"name": "unisd", "rollouts": {"max_new_tokens": 6, "temperature": 0.7}, "context": SHORT},
        "student": student,
        "data": data or {"task": "facts", "people": 3, "places": 5, "length": 48, "prompt_length": 24},
        "train": {"steps": 2, "batch": 4, "lr": 1e-2, "trackers": [], "device": "cpu"},
        "eval": {"limit": 4, "batch": 4},
    }
    return recipes.resolve(recipes.apply(raw, overrides))


def run(folder, *args, **overrides):
    plan = plan_of(*args, **overrides)
    open_folder(folder, recipes.write(plan))
    return Run(plan, folder).execute()


@pytest.fixture
def quick(monkeypatch):
    """Nothing is measured at the end."""
    monkeypatch.setattr(module, "compared", lambda run, **_: Result(run.student(), {}))
    monkeypatch.setattr(module, "measured", lambda *_: {})


@pytest.mark.parametrize("config", ARCHITECTURES)
def test_real_architectures_with_every_component(config, tmp_path, tiny_lm):
    student = {"name": str(tiny_lm(1, config, spread=0.1)), "lora": {"r": 4, "alpha": 8}}
    known = {"task": "facts", "known": True, "people": 4}
    result = run(tmp_path / "run", student, **{"method.known": known, "method.ema_every": 1})
    metrics = result.metrics
    assert 0 < metrics["known_jsd"] < math.log(2) and metrics["known_perplexity"] != metrics["before_known_perplexity"]
    assert {"sampled_accuracy", "before_sampled_accuracy", "accuracy", "forward_kl"} <= metrics.keys()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    terms = {name for row in rows for name in row}
    assert any("contrast" in name for name in terms) and any("features" in name for name in terms)


NEUTRAL = {
    "gamma 0": {"mode": "agreement_tok_retrieval", "gamma": 0.0},
    "gamma 0, random": {"mode": "agreement_seq_random", "gamma": 0.0, "normalisation": "counts"},
    "gamma 0, induction": {"mode": "agreement_seq_induction", "gamma": 0.0},
    "sequence weights that cancel": {"mode": "agreement_seq_random", "gamma": 1e-9},
    "beta 1": {"mode": "ema", "ema": 1.0, "ema_every": 1},
    "no contrast": {"mode": "contrastive", "contrast": 0.0},
    "no features": {"mode": "match_joint", "features": 0.0},
    "no clip": {"mode": "clip", "clip": math.inf},
    "a dropout that never comes": {"mode": "plain", "context.dropout": 0.0},
}


def test_neutral_switches_are_plain_self_distillation(tmp_path, tiny_lm, quick):
    student = str(tiny_lm(1, spread=0.1))
    weights = lambda name, **method: (
        run(tmp_path / name, student, **{f"method.{k}": v for k, v in method.items()}),
        load_file(tmp_path / name / "student" / "model.safetensors"),
    )[1]
    plain, start = weights("plain", mode="plain"), load_file(f"{student}/model.safetensors")
    assert not all(torch.equal(plain[name], start[name]) for name in start)
    for name, method in NEUTRAL.items():
        found = weights(name, **method)
        for key in plain:
            assert_close(found[key], plain[key], rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
    apart = {
        "contrast": {"mode": "contrastive"}, "features": {"mode": "match_joint"}, "alone": {"mode": "match_repr"},
        "clip": {"mode": "clip", "clip": 0.01}, "quantile": {"mode": "plain", "clip_quantile": 0.3},
        "ema": {"mode": "ema", "ema": 0.0, "ema_every": 1}, "sft": {"mode": "sft"},
        "agreement": {"mode": "agreement_tok_random", "gamma": 5.0}, "alpha": {"mode": "plain", "alpha": 0.5},
        "induction": {"mode": "agreement_tok_induction", "gamma": 5.0},
        "own": {"mode": "agreement_tok_retrieval", "gamma": 5.0, "context.own": True},
        "others": {"mode": "agreement_tok_retrieval", "gamma": 5.0},
        "dropout": {"mode": "plain", "context.dropout": 1.0}, "temperature": {"mode": "plain", "rollouts.temperature": 1.0},
    }  # fmt: skip
    seen = {"plain": plain}
    for name, method in apart.items():
        found = weights(name, **method)
        for other, known in seen.items():
            assert any((found[key] - known[key]).abs().max() > 1e-4 for key in found), f"{name} does as {other}"
        seen[name] = found


def test_modes_are_switches_and_what_is_written_beside_them_is_kept():
    assert {"agreement_tok_random", "agreement_seq_retrieval", "agreement_tok_induction"} <= MODES.keys()
    star = UniSD()
    assert (star.agreement, star.contexts, star.gamma, star.context.count) == ("token", "retrieval", 0.001, 3)
    assert (star.ema, star.ema_every, star.contrast, star.margin, star.features) == (0.98, 10, 0.01, 0.1, 0.01)
    assert UniSD(mode="unisd_star", gamma=2.0, contrast=0.0).gamma == 2.0
    single = UniSD(mode="contrastive")
    assert (single.contrast, single.margin, single.ema, single.agreement) == (0.1, 0.5, None, None)
    assert (UniSD(mode="ema").ema, UniSD(mode="clip").clip, UniSD(mode="match_joint").features) == (0.9, 10.0, 0.1)
    assert UniSD(mode="match_repr").distillation == 0.0
    sequence = UniSD(mode="agreement_seq_induction")
    assert (sequence.agreement, sequence.contexts, sequence.gamma) == ("sequence", "induction", 0.01)
    written = star.model_dump()
    assert UniSD(**written) == star, "a resolved recipe reads as itself"


def test_alpha_is_the_teachers_share_and_its_ends_are_the_kls():
    assert UniSD(mode="plain").divergence() == ForwardKL()
    assert UniSD(mode="plain", alpha=1.0).divergence() == ReverseKL()
    assert UniSD(mode="plain", alpha=0.3).divergence() == JensenShannon(0.3)
    assert UniSD(mode="clip").divergence() == Clipped(ForwardKL(), 10.0, per="position")


def test_both_normalisations_by_name():
    released = UniSD(mode="agreement_tok_random", gamma=0.5, statistic="range")
    weights = Agreement(level="token", gamma=0.5, statistic="range")
    assert released.weighting() == PerResponse(of=weights, least=1.0)
    assert released.model_copy(update={"normalisation": "counts"}).weighting() == weights
    assert UniSD(mode="ema").weighting() == Uniform()


def test_extras_are_made_as_asked():
    contrast, features = extras(UniSD(features_over="sum"), None)
    assert (contrast.coefficient, contrast.margin, contrast.temperature) == (0.01, 0.1, 0.7)
    assert (features.coefficient, features.over) == (0.01, "sum")
    assert extras(UniSD(mode="plain"), None) == []


def tiny(seed: int) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM.PACKAGED["llama-tiny"](tokenizer=character_tokenizer(["abcdefg "]), width=16)


def test_a_packaged_student_starts_from_what_is_known(tmp_path, monkeypatch, quick):
    known = {"task": "facts", "known": True, "people": 4}
    made = {}

    def trained(kind, spec, source, context, data, seed, device, role):
        made["source"] = source.name
        torch.manual_seed(7)
        made["base"] = CausalLM.PACKAGED[spec.name](tokenizer=context["tokenizer"], **spec.options)
        return made["base"]

    monkeypatch.setattr("potstill.methods.language.graded.trained", trained)
    packaged = {"name": "llama-tiny", "options": {"width": 16}}
    plan = plan_of(packaged, **{"method.known": known})
    student = module.begun(Run(plan, tmp_path / "a"), plan.config.known)
    assert made["source"] == "facts-known"
    for x, y in zip(student.parameters(), made["base"].parameters(), strict=True):
        assert torch.equal(x, y)
    with pytest.raises(RecipeError, match=r"student\.lora: a packaged student is small enough"):
        run(tmp_path / "b", {**packaged, "lora": {"r": 2}}, **{"method.known": known})


def test_what_cannot_work_is_refused(tmp_path, tiny_lm, quick):
    student = str(tiny_lm(1))
    with pytest.raises(RecipeError, match=r"mode: agreement_random is none of plain, agreement_seq_random"):
        plan_of(student, **{"method.mode": "agreement_random"})
    with pytest.raises(RecipeError, match="clip and clip_quantile exclude each other"):
        plan_of(student, **{"method.clip": 1.0, "method.clip_quantile": 0.5})
    with pytest.raises(RecipeError, match="count"):
        plan_of(student, **{"method.context.count": 1})
    with pytest.raises(RecipeError, match=r"whole leaves \{prompt\} out"):
        plan_of(student, **{"method.context.whole": "{examples}"})
    with pytest.raises(RecipeError, match="factz is no packaged task"):
        plan_of(student, **{"method.known": {"task": "factz"}})
    with pytest.raises(DataError, match="A privileged prompt has .* tokens, and between 1 and 10 are allowed"):
        run(tmp_path / "a", student, **{"method.context.length": 10, "method.mode": "plain"})
    with pytest.raises(DataError, match="other rows are wanted as examples"):
        run(tmp_path / "b", student, **{"method.context.shots": 100})
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"say {i}"}) for i in range(40)))
    with pytest.raises(DataError, match="rows with a prompt and a completion or an answer"):
        data = {"jsonl": str(rows), "length": 48, "prompt_length": 24}
        run(tmp_path / "c", student, data, **{"method.mode": "plain"})
