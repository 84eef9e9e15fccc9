"""TCOD: the curriculum reaches the rollouts, its ends are vanilla distillation, and the signal is the reverse KL's."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

from potstill import recipe as recipes
from potstill.contracts.errors import DataError, ModelError, RecipeError
from potstill.contracts.players import OptimizerSpec
from potstill.divergences import ForwardKL, ReverseKL
from potstill.methods.language import tcod as module
from potstill.methods.language.tcod import TCOD, EpisodeDivergence, EpisodeGradient
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.policy import Clip
from potstill.rollouts.episodes import Curriculum, by_turn, episodes
from potstill.run import Run, open_folder
from potstill.tasks.agents import calculator
from potstill.tasks.tokens import Prompts
from potstill.teachers import LocalTeacher

SOURCE = calculator(size=20, test_size=6, terms=4)
TOKENIZER = character_tokenizer([str(row) for row in SOURCE.train])


def net(seed, tokenizer=TOKENIZER):
    torch.manual_seed(seed)
    return CausalLM.PACKAGED["llama-tiny"](tokenizer=tokenizer, width=16, heads=2).double()


def prompts(size=3):
    return Prompts(SOURCE.train, TOKENIZER, 16, 64).batch(torch.arange(size))


def rollout(student, batch, step, curriculum=Curriculum("none"), max_turns=4):
    known = [row["actions"] for row in batch.extra["rows"]]
    return episodes(
        student, SOURCE.environment, batch, max_turns=curriculum.max_turns(step, max_turns), max_new_tokens=4, seed=step,
        prefixes=[actions[: curriculum.replayed(step, len(actions))] for actions in known],
    )  # fmt: skip


def gradient_of(curriculum, step, **options):
    """(loss, flat gradient) of one step's rollouts."""
    student = net(0)
    objective = EpisodeGradient(
        student, LocalTeacher(net(1)), rollout=lambda batch, step: rollout(student, batch, step, curriculum),
        task_coefficient=0.0, optimizer=OptimizerSpec(), seed=0, **options,
    )  # fmt: skip
    batch = objective.collect(prompts(), step)
    value = objective.loss("student", batch, step).value()
    value.backward()
    return value.detach(), torch.cat([p.grad.flatten() for p in student.parameters()]), batch


def test_a_curriculum_at_its_end_is_vanilla_distillation():
    value, gradient, batch = gradient_of(Curriculum("none"), 7)
    assert int(batch.extra["segment_BT"].max()) == 3
    for other in (Curriculum("f2b", k_start=4), Curriculum("b2f", k_start=4), Curriculum("b2f", eta=2)):
        theirs, slope, _ = gradient_of(other, 7)
        assert_close(theirs, value, rtol=0, atol=0)
        assert_close(slope, gradient, rtol=0, atol=0)
    for other in (Curriculum("f2b"), Curriculum("b2f", eta=3)):  # and before it, it is not
        assert not torch.equal(gradient_of(other, 4)[1], gradient_of(Curriculum("none"), 4)[1])


def test_f2b_keeps_the_first_turns_and_b2f_the_last():
    depths = lambda batch: [sorted({*row.tolist()} - {-1}) for row in batch.extra["segment_BT"]]
    for step in range(6):
        k = min(1 + step // 2, 4)
        assert depths(gradient_of(Curriculum("f2b"), step)[2]) == [list(range(k))] * 3
        assert depths(gradient_of(Curriculum("b2f"), step)[2]) == [list(range(4 - k, 4))] * 3


def test_replayed_turns_have_no_gradient():
    """Whatever student and teacher think of the replayed actions, the loss is that of the student's own turns."""
    _, gradient, batch = gradient_of(Curriculum("b2f"), 2)
    own = batch.extra["segment_BT"] >= 2
    assert torch.equal(batch.counted_BT, own)
    assert (batch.extra["advantage_BT"][~own] == 0).all()
    student, teacher = net(0), net(1)
    log_q, log_p = (m(batch.tokens_BT, batch.attention_BT).log_softmax(-1)[:, :-1] for m in (student, teacher))
    chosen = batch.tokens_BT[:, 1:, None]
    log_q, log_p = log_q.gather(-1, chosen)[..., 0], log_p.gather(-1, chosen)[..., 0].detach()
    own = own[:, 1:]
    by_hand = -((log_p - log_q.detach()) * log_q)[own].sum() / own.sum()
    by_hand.backward()
    assert_close(torch.cat([p.grad.flatten() for p in student.parameters()]), gradient, rtol=1e-4, atol=1e-7)


def test_the_signal_is_the_gradient_of_the_reverse_kl():
    """Every one-token action with its probability: at rho = 1 the mean gradient is that of KL(q || p), exactly."""
    student, teacher = net(0), LocalTeacher(net(1))
    objective = EpisodeGradient(
        student, teacher, rollout=lambda batch, step: batch, task_coefficient=0.0, optimizer=OptimizerSpec(), seed=0,
        clip=Clip(low=0.2, high=0.2, dual=3.0),
    )  # fmt: skip
    one = rollout(student, prompts(1), 0, max_turns=1)
    place = int(one.counted_BT[0].nonzero()[0])
    one.counted_BT[:, place + 1 :] = False
    before = one.tokens_BT[:, :place]
    log_q = student(before).log_softmax(-1)[0, -1]
    log_p = teacher.model(before).log_softmax(-1)[0, -1].detach()
    exact = torch.autograd.grad(ReverseKL()(teacher_logp=log_p, student_logp=log_q), list(student.parameters()))
    total = 0.0
    for token, chance in enumerate(log_q.exp().detach()):
        one.tokens_BT[0, place] = token
        one.sampled_logp_BT = one.sampled_logp_BT.double()
        one.sampled_logp_BT[0, place] = log_q[token].detach()
        one.memo.clear()
        value = objective.loss("student", objective.collect(one, 0), 0).value()
        total = total + chance * torch.cat(
            [g.flatten() for g in torch.autograd.grad(value, list(student.parameters()))]
        )
    assert_close(total, torch.cat([g.flatten() for g in exact]), rtol=1e-4, atol=1e-7)


def test_what_is_watched_and_the_exact_divergence_of_equation_2():
    student, teacher = net(0), LocalTeacher(net(1))
    play = lambda batch, step: rollout(student, batch, step)
    options = {"optimizer": OptimizerSpec(), "seed": 0}
    sampled = EpisodeGradient(student, teacher, rollout=play, task_coefficient=0.0, **options)
    batch = sampled.collect(prompts(), 5)
    metrics = sampled.loss("student", batch, 5).metrics
    away = by_turn(-batch.extra["log_ratio_BT"], batch.extra["segment_BT"]).sum(1)
    assert_close(metrics["trajectory_kl"].mean(), away.mean())
    assert metrics["turns"].mean() == 4
    exact = EpisodeDivergence(play, student, teacher, ForwardKL(), **options)
    same = exact.collect(prompts(), 5)
    assert torch.equal(same.tokens_BT, batch.tokens_BT)
    loss = exact.loss("student", same, 5)
    logp = [
        m(same.tokens_BT, same.attention_BT).log_softmax(-1)[:, :-1][same.counted_BT[:, 1:]]
        for m in (teacher.model, student)
    ]
    assert_close(loss.value(), (logp[0].exp() * (logp[0] - logp[1])).sum(-1).mean(), rtol=1e-4, atol=1e-6)
    reverse = (logp[1].exp() * (logp[1] - logp[0])).sum()
    assert_close(loss.metrics["trajectory_kl"].mean().double(), reverse.detach() / 3, rtol=1e-4, atol=1e-6)


def test_a_step_in_which_every_sample_was_dropped_moves_nothing():
    student = net(0)
    drop = lambda batch, step: episodes(
        student, SOURCE.environment, batch, max_turns=6, max_new_tokens=4,
        prefixes=[row["actions"] for row in batch.extra["rows"]],
    )  # fmt: skip
    objective = EpisodeGradient(
        student, LocalTeacher(net(1)), rollout=drop, task_coefficient=0.0, optimizer=OptimizerSpec(), seed=0
    )
    batch = objective.collect(prompts(), 0)
    assert batch.extra["ending"] == ["replay"] * 3
    loss = objective.loss("student", batch, 0)
    assert float(loss.terms["policy"].total) == float(loss.terms["policy"].count) == 0


def test_teachers_get_no_gradient():
    student, teacher = net(0), LocalTeacher(net(1))
    objective = EpisodeGradient(
        student, teacher, rollout=lambda batch, step: rollout(student, batch, step), task_coefficient=0.0,
        optimizer=OptimizerSpec(), seed=0,
    )  # fmt: skip
    objective.loss("student", objective.collect(prompts(), 0), 0).value().backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    assert not [name for name in objective.state_dict() if "teacher" in name]


# ---------------------------------------------------------------- whole runs


def plan_of(student, teacher, /, **overrides):
    raw = {
        "method": {"name": "tcod", "max_turns": 4, "max_new_tokens": 5, "attempts": 2, "eta": 1},
        "student": str(student),
        "teacher": str(teacher),
        "data": {"task": "calculator", "size": 8, "test_size": 4, "terms": 3, "length": 64, "prompt_length": 12},
        "train": {"steps": 2, "batch": 4, "lr": 1e-3, "trackers": [], "device": "cpu"},
        "eval": {"limit": 4, "batch": 4},
    }
    return recipes.resolve(recipes.apply(raw, overrides))


def run(folder, *args, **overrides):
    plan = plan_of(*args, **overrides)
    open_folder(folder, recipes.write(plan))
    return Run(plan, folder).execute()


@pytest.fixture
def knowing(monkeypatch):
    """A teacher that solves all but the first task, in one turn more than the source's own actions take."""
    longer = lambda run, config, prompts, playing: {
        str(i): ["CALL 1+1", *prompts.rows[i][2]["actions"]] for i in range(1, len(prompts))
    }
    monkeypatch.setattr(module, "trajectories", longer)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, Gemma3TextConfig])
def test_real_architectures(config, tmp_path, tiny_lm):
    student, teacher = tiny_lm(1, config, TOKENIZER), tiny_lm(2, config, TOKENIZER, hidden_size=48)
    more = {"method.warm_start": 1, "method.updates_per_rollout": 2, "train.evaluate_every": 2}
    metrics = run(tmp_path / "run", student, teacher, **more).metrics
    assert metrics["turns"] == 4
    assert math.isfinite(metrics["early_trajectory_kl"])
    assert metrics["turns_played"] == 4 * (1 + 1), "the second update uses the first one's rollouts"
    journal = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in journal] == ["warm start", "distil", "distil"]
    assert journal[-1]["eval/trajectory_kl"] == pytest.approx(metrics["trajectory_kl"])
    records = {path.stem for path in (tmp_path / "run" / "records").glob("*.json")}
    assert {"4-episodes", "5-turns", "6-training", "7-episodes"} <= records


def test_arms_of_a_seed_share_their_start_and_play_as_deep_as_they_say(tmp_path, tiny_lm, knowing):
    student, teacher = tiny_lm(1, tokenizer=TOKENIZER, spread=0.1), tiny_lm(2, tokenizer=TOKENIZER)
    arms = {
        "f2b": {"method.indices": "paper"}, "b2f": {"method.curriculum": "b2f"}, "sft": {"method.signal": "sft"},
        "forward": {"method.signal": "forward", "method.curriculum": "none"},
    }  # fmt: skip
    found = {name: run(tmp_path / name, student, teacher, **more).metrics for name, more in arms.items()}
    assert len({m["before_trajectory_kl"] for m in found.values()}) == 1
    played = {name: m.get("turns_played") for name, m in found.items()}
    # two steps of four tasks; an untrained student never ends an episode before its four turns
    assert played == {"f2b": 4 * (2 + 3), "b2f": 4 * (1 + 2), "forward": 32, "sft": None}
    stages = json.loads((tmp_path / "b2f" / "stages" / "trajectories" / "value.json").read_text())["value"]
    assert list(stages) == [str(i) for i in range(1, 8)]
    curve = json.loads((tmp_path / "f2b" / "records" / "5-turns.json").read_text())["series"]
    assert [s["label"] for s in curve] == ["student before", "student after"]
    assert [len(s["y"]) for s in curve] == [4, 4]


def test_the_teacher_tries_again_what_it_has_not_solved_and_stops_when_all_is(monkeypatch):
    """Task i is solved at attempt i: of three tasks, 3, 2 and 1 are tried, and no fourth time none."""
    tried = []

    def attempt(teacher, make, rows, **options):
        tried.append(rows)
        rewards = torch.tensor([float(i < len(tried)) for i in rows])
        return SimpleNamespace(extra={"reward": rewards, "turns": [[{"action": f"{i} at {len(tried)}"}] for i in rows]})

    class Tasks(list):
        def batch(self, rows):
            assert len(rows)
            return SimpleNamespace(to=lambda device: rows.tolist())

    monkeypatch.setattr(module, "episodes", attempt)
    monkeypatch.setattr(module, "environment_of", lambda source, name: None)
    fake = SimpleNamespace(
        plan=SimpleNamespace(eval=SimpleNamespace(batch=4)), model=lambda role: None, source=None, seed=0, device="cpu"
    )
    found = module.trajectories(fake, TCOD(attempts=5), Tasks("abc"), {})
    assert found == {"0": ["0 at 1"], "1": ["1 at 2"], "2": ["2 at 3"]}
    assert tried == [[0, 1, 2], [1, 2], [2]]


def test_what_cannot_work_is_refused(tmp_path, tiny_lm):
    student, teacher = tiny_lm(1, tokenizer=TOKENIZER), tiny_lm(2, tokenizer=TOKENIZER)
    with pytest.raises(RecipeError, match="'none', 'f2b' or 'b2f'"):
        plan_of(student, teacher, **{"method.curriculum": "f2f"})
    with pytest.raises(RecipeError, match="eta: input should be greater than or equal to 1, got 0"):
        plan_of(student, teacher, **{"method.eta": 0})
    with pytest.raises(DataError, match=r"tcod plays in turns, and arithmetic has no environment"):
        run(tmp_path / "a", student, teacher, data={"task": "arithmetic", "size": 8, "test_size": 4})
    with pytest.raises(DataError, match="teacher has solved none of the tasks"):
        run(tmp_path / "b", student, teacher, **{"method.curriculum": "b2f"})
    with pytest.raises(ModelError, match="different vocabularies"):
        run(tmp_path / "c", student, tiny_lm(2, tokenizer=character_tokenizer("abc;= ")))
    with pytest.raises(RecipeError, match="max_staleness is 0"):
        run(tmp_path / "d", student, teacher, **{"method.updates_per_rollout": 2, "method.max_staleness": 0})


def test_the_defaults_are_the_papers():
    config = TCOD()
    assert (config.k_start, config.eta, config.max_turns, config.max_new_tokens, config.attempts) == (1, 2, 30, 512, 10)
    assert (config.clip.low, config.clip.high, config.clip.dual, config.coefficient) == (0.2, 0.2, 3.0, 1.0)
    assert (config.temperature, config.eval_temperature, config.max_staleness, config.average) == (1.0, 0.4, 2, "token")
