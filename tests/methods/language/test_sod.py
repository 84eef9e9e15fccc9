"""SOD: its weights telescope, know runs from padding, and fuse with GRPO so that the gradients add up."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import GemmaConfig, LlamaConfig, Qwen3Config

from potstill import recipe as recipes
from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import DataError, RecipeError, SignalError
from potstill.contracts.files import read_json
from potstill.contracts.players import OptimizerSpec
from potstill.contracts.signals import HiddenAndHead
from potstill.methods.language.sod import SOD, SteppedGradient
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.policy import Clip, PolicyGradient
from potstill.rollouts.groups import group_advantages
from potstill.run import Run, open_folder
from potstill.teachers import LocalTeacher
from potstill.weighting import Uniform
from potstill.weighting.steps import AdvantageGate, ErrorDecay, StepPositions, StepRatio, runs_of, step_means

V, T = 5, 9
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 +-*=;,.:\n"


def positions(d, sizes=(2, 3, 1, 2), **known) -> StepPositions:
    """One row whose steps have these mean |log_ratio|, of either sign, behind one another and before padding."""
    ratios, steps = [], []
    for k, (mean, n) in enumerate(zip(d, sizes)):
        shape = torch.linspace(0.5, 1.5, n) if n > 1 else torch.ones(1)
        ratios += (mean * shape * torch.tensor([-1.0, 1.0, 1.0])[:n]).tolist()
        steps += [k] * n
    pad = [math.nan, 77.0]
    mask = torch.tensor([[True] * len(steps) + [False] * 2])
    log_ratio = torch.tensor([ratios + pad], dtype=torch.float64)
    return StepPositions(mask, log_ratio_BR=log_ratio, segment_BR=torch.tensor([[*steps, 0, 0]]), **known)


def weights(rule, values: StepPositions, sizes=(2, 3, 1, 2)) -> list[float]:
    """One weight a step; all of a step's are alike."""
    parts = rule(values)[0, : sum(sizes)].split(sizes)
    assert all((part == part[0]).all() for part in parts)
    assert (rule(values)[0, sum(sizes) :] == 0).all()
    return [part[0].item() for part in parts]


def as_printed(d, delta, e) -> list[float]:
    """Eq. 7, product and all."""
    found, product = [1.0], 1.0
    for before, after in itertools.pairwise(d):
        product *= (before + e) / (after + e)
        found.append(product if delta is None else min(product, 1 + delta))
    return found


@pytest.mark.parametrize("delta", [0.2, 0.0, None])
@pytest.mark.parametrize("d", [(0.3, 0.6, 0.1, 0.35), (0.2, 0.2, 0.2, 0.2), (1.0, 0.5, 0.25, 3.0)])
def test_the_product_telescopes_and_is_bounded_at_the_end_alone(d, delta):
    assert weights(StepRatio(delta=delta), positions(d)) == pytest.approx(as_printed(d, delta, 1e-6), rel=1e-6)


def test_what_the_weights_do():
    assert weights(StepRatio(), positions((0.4, 0.4, 0.4, 0.4))) == pytest.approx([1, 1, 1, 1])
    assert weights(StepRatio(), positions((0.9, 0.7, 0.5, 0.1))) == pytest.approx([1, 1.2, 1.2, 1.2], rel=1e-5)
    drifting = weights(StepRatio(), positions((0.1, 0.2, 0.4, 0.8)))
    assert drifting == pytest.approx([1, 0.5, 0.25, 0.125], rel=1e-4)
    scaled = weights(StepRatio(epsilon=1e-12), positions((0.05, 0.1, 0.2, 0.4)))
    assert scaled == pytest.approx(weights(StepRatio(epsilon=1e-12), positions((0.1, 0.2, 0.4, 0.8))))
    recovering = weights(StepRatio(), positions((0.1, 0.4, 0.1, 0.09)))
    assert recovering == pytest.approx([1, 0.25, 1, 0.1 / 0.09], rel=1e-4), "above the weight before, up to the bound"
    assert weights(StepRatio(), positions((0.7,), (2,)), (2,)) == [1.0]
    assert weights(StepRatio(), positions((0.0, 0.5, 0.0, 0.0))) == pytest.approx([1, 2e-6, 1, 1], rel=1e-3)


def test_steps_that_were_replayed_do_not_make_the_first():
    values = positions((9.0, 0.2, 0.4, 0.1))
    values.mask_BR[0, :2] = False
    assert StepRatio()(values)[0, 2:8].tolist() == pytest.approx([1, 1, 1, 0.5, 1.2, 1.2], rel=1e-4)


def test_heuristics_begin_behind_the_first_error():
    known = lambda error: positions((0.1,) * 4, first_error_B=torch.tensor([error]))
    assert weights(ErrorDecay(0.9), known(1)) == pytest.approx([1, 1, 0.9, 0.81])
    assert weights(ErrorDecay(0.0), known(1)) == [1, 1, 0, 0]
    assert weights(ErrorDecay(0.0), known(0)) == [1, 0, 0, 0]
    assert weights(ErrorDecay(0.0), known(-1)) == [1, 1, 1, 1]
    with pytest.raises(SignalError, match="ErrorDecay needs first_error_B"):
        ErrorDecay()(positions((0.1,) * 4))


def test_the_older_gate_helps_failures_more():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    values = StepPositions(torch.ones(4, 3, dtype=torch.bool), reward_B=rewards, group=4)
    A = group_advantages(rewards, 4)
    assert_close(AdvantageGate(0.1, 0.3, 2.0)(values), (0.1 + 0.2 * torch.sigmoid(-2 * A))[:, None].expand(4, 3))


def test_runs_of_counted_tokens():
    counted = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1, 1, 0, 0], [0] * 9]).bool()
    assert runs_of(counted).tolist() == [[-1, 0, 0, -1, 1, -1, -1, 2, 2], [0, 0, -1, -1, 1, 1, 1, -1, -1], [-1] * 9]
    values = torch.arange(27.0).view(3, 9).masked_fill(~counted, math.nan)
    means, there = step_means(values, runs_of(counted), counted)
    assert_close(means, torch.tensor([[1.5, 4.0, 7.5], [9.5, 14.0, 0.0], [0.0, 0.0, 0.0]]))
    assert there.tolist() == [[True] * 3, [True, True, False], [False] * 3]


class Table(nn.Module):
    kind, name, tokenizer, compiled, has_linear_head, vocabulary = "causal_lm", "table", None, False, True, V

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.table = nn.Linear(V, V, bias=False, dtype=torch.float64)
        self.table.weight.data.normal_(generator=torch.Generator().manual_seed(seed))

    def counted_hidden(self, batch: TokenBatch) -> Tensor:
        return nn.functional.one_hot(batch.tokens_BT[:, :-1], V).double()[batch.counted_BT[:, 1:]]

    def head(self, hidden: Tensor) -> Tensor:
        return self.table(hidden)

    def with_head(self, hidden: Tensor) -> HiddenAndHead:
        return HiddenAndHead(hidden, self.table.weight)


def trajectories() -> TokenBatch:
    """Four rows of two steps, tool tokens in between, padding behind."""
    tokens = torch.randint(0, V, (4, T), generator=torch.Generator().manual_seed(3))
    counted = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 1, 0, 0, 0]] * 2).bool()
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5])
    return TokenBatch(torch.arange(4), tokens, torch.ones_like(counted), counted, extra={"reward": rewards})


def logp_of(model: Table, batch: TokenBatch) -> Tensor:
    rows = model.head(model.counted_hidden(batch)).log_softmax(-1)
    return rows.gather(-1, batch.tokens_counted[:, None])[:, 0]


def made(student, teacher, **options) -> PolicyGradient:
    options = {"weighting": StepRatio(), "clip": Clip(low=0.2, high=0.28), "group": 2, "seed": 0} | options
    return SteppedGradient(
        student, LocalTeacher(teacher), optimizer=OptimizerSpec(), rollout=lambda batch, step: batch, **options
    )


def gradient(value: Tensor, model: Table) -> Tensor:
    return torch.autograd.grad(value, model.table.weight)[0]


def test_the_fused_gradient_is_the_sum_of_both():
    """L_GRPO + L_step at ratio 1; the runs of the mask are the steps where nothing else says them."""
    student, teacher, batch = Table(0), Table(1), trajectories()
    method = made(student, teacher)
    loss = method.loss("student", method.collect(batch, 0), 0)
    lengths, steps = batch.counted_BT.sum(1).tolist(), [(2, 3), (3, 1)] * 2
    A = group_advantages(batch.extra["reward"], 2)
    total = 0.0
    log_p = logp_of(teacher, batch).detach().split(lengths)
    for a, sizes, q, p in zip(A, steps, logp_of(student, batch).split(lengths), log_p, strict=True):
        d = [(x - y).abs().mean().item() for x, y in zip(q.split(sizes), p.split(sizes))]
        w = torch.tensor(as_printed(d, 0.2, 1e-6)).repeat_interleave(torch.tensor(sizes))
        total = total - (a * q).sum() + (w * (q - p).detach() * q).sum()
    assert_close(gradient(loss.value(), student), gradient(total / sum(lengths), student), rtol=1e-5, atol=1e-7)
    assert loss.metrics["d_1"].count == 4 and loss.metrics["w_1"].mean() == 1.0
    wanted = method.collect(batch, 0).extra["weight_BT"][:, 5].mean().item()
    assert loss.metrics["w_2"].mean().item() == pytest.approx(wanted)


def test_a_step_is_averaged_over_the_rows_that_have_it():
    student, teacher, batch = Table(0), Table(1), trajectories()
    batch.counted_BT[1, 5] = False  # one step is left
    method = made(student, teacher)
    collected = method.collect(batch, 0)
    metrics = method.loss("student", collected, 0).metrics
    steps = collected.extra["log_ratio_BT"].abs()
    second = torch.stack([steps[0, 5:8].mean(), steps[2, 5:8].mean(), steps[3, 5]]).mean()
    assert metrics["d_2"].count == 3 and metrics["d_3"].count == 0
    assert metrics["d_2"].mean().item() == pytest.approx(second.item())
    assert set(metrics) >= {f"{letter}_{k}" for letter in "dw" for k in range(1, 17)}


def test_neutral_settings_are_its_parts():
    student, teacher, batch = Table(0), Table(1), trajectories()
    advantages = lambda **options: made(student, teacher, **options).collect(batch, 0).extra["advantage_BT"]
    grpo, opd = advantages(teacher_coefficient=0.0), advantages(task_coefficient=0.0, weighting=Uniform())
    log_ratio = torch.zeros(4, T, dtype=torch.float64)
    log_ratio[batch.counted_BT] = (logp_of(teacher, batch) - logp_of(student, batch)).detach()
    assert_close(opd, log_ratio)
    assert_close(grpo, group_advantages(batch.extra["reward"], 2)[:, None] * batch.counted_BT)
    assert_close(advantages(weighting=Uniform()), grpo + opd)
    one_step = {**batch.extra, "segment_BT": torch.zeros_like(batch.tokens_BT)}
    batch = TokenBatch(batch.ids_B, batch.tokens_BT, batch.attention_BT, batch.counted_BT, extra=one_step)
    assert_close(advantages(), grpo + opd)


def test_tool_tokens_get_no_gradient_and_change_no_step():
    student, teacher, batch = Table(0), Table(1), trajectories()
    method = made(student, teacher)
    collected = method.collect(batch, 0)
    said = method.loss("student", collected, 0)
    for_tools = batch.tokens_BT.clone()
    for_tools[:, 4] = (for_tools[:, 4] + 1) % V  # read by nobody in a table of the last word, and not counted
    for_tools[1, 7] = (for_tools[1, 7] + 1) % V
    other = TokenBatch(batch.ids_B, for_tools, batch.attention_BT, batch.counted_BT, extra=dict(batch.extra))
    keep = [0, 2]  # rows whose next counted token does not follow the changed one
    found = method.collect(other, 0).extra["advantage_BT"][keep]
    assert_close(found[:, :5], collected.extra["advantage_BT"][keep][:, :5])
    assert said.terms["policy"].count == batch.counted_BT.sum()


# -------------------------------------------------------------------- as a method


def plan_of(student, teacher, **overrides):
    raw = {
        "method": {
            "name": "sod", "samples": 2, "max_turns": 3, "max_new_tokens": 6, "evaluations": 1,
            "updates_per_rollout": 2, "minibatches": 2, "warm_start": 1, "warm_rows": 8,
        },
        "student": str(student),
        "teacher": str(teacher),
        "data": {"task": "calculator", "size": 60, "test_size": 8, "malformed": "digits", "length": 64, "prompt_length": 20},
        "train": {"steps": 2, "batch": 4, "lr": 1e-3, "trackers": [], "device": "cpu"},
        "eval": {"limit": 4, "batch": 4},
    }  # fmt: skip
    return recipes.resolve(recipes.apply(raw, overrides))


def run(folder, *args, **overrides):
    plan = plan_of(*args, **overrides)
    open_folder(folder, recipes.write(plan))
    return Run(plan, folder).execute()


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, GemmaConfig])
def test_real_architectures(config, tmp_path, tiny_lm):
    tokenizer = character_tokenizer(ALPHABET)
    student, teacher = tiny_lm(3, config, tokenizer), tiny_lm(4, config, tokenizer, hidden_size=48)
    result = run(tmp_path / "run", student, teacher)
    assert 0 <= result.metrics["success"] <= 1 and result.metrics["errors"] > 0 and result.metrics["drift"] > 0
    records = {path.stem for path in (tmp_path / "run" / "records").glob("*.json")}
    assert {"4-episodes", "5-d", "5-w"} <= records
    series = read_json(tmp_path / "run" / "records" / "5-w.json")["series"]
    assert series[0]["y"][0] == pytest.approx(1.0)


@pytest.mark.parametrize("weighting", ["Uniform", {"name": "ErrorDecay", "gamma": 0.0}, "AdvantageGate"])
def test_the_baselines_run(weighting, tmp_path, tiny_lm):
    tokenizer = character_tokenizer(ALPHABET)
    student = tiny_lm(3, tokenizer=tokenizer)
    run(tmp_path / "run", student, student, **{"method.weighting": weighting, "method.warm_start": 0, "train.steps": 1})


def test_the_defaults_are_the_papers_and_errors_say_what_to_do(tmp_path, tiny_lm):
    assert SOD().weighting == StepRatio(delta=0.2, epsilon=1e-6) and SOD().clip == Clip(low=0.2, high=0.28)
    student = tiny_lm(1)
    with pytest.raises(RecipeError, match=r"StepRatio\.delta must not be negative, got -1\.0; null sets no bound"):
        plan_of(student, student, **{"method.weighting": {"name": "StepRatio", "delta": -1.0}})
    with pytest.raises(RecipeError, match=r"StepRatio\.epsilon must be positive"):
        StepRatio(epsilon=0.0)
    with pytest.raises(RecipeError, match=r"ErrorDecay\.gamma must lie in \[0, 1\], got 1\.5"):
        ErrorDecay(1.5)
    with pytest.raises(DataError, match="sod plays in turns, and arithmetic has no environment"):
        run(tmp_path / "a", student, student, data={"task": "arithmetic", "length": 64, "prompt_length": 16})
    with pytest.raises(RecipeError, match="updates_per_rollout 3 must be a multiple of minibatches 2"):
        run(
            tmp_path / "b", tiny_lm(1, tokenizer=character_tokenizer(ALPHABET)),
            tiny_lm(1, tokenizer=character_tokenizer(ALPHABET)), **{"method.updates_per_rollout": 3},
        )  # fmt: skip
