"""A whole step of training whose rollouts a server samples, on a real socket."""

import json

import pytest
import torch
from tests.serving.servers import serving
from torch.testing import assert_close

from potstill import recipe as recipes
from potstill.contracts import keyed
from potstill.contracts.batch import PromptBatch
from potstill.contracts.errors import RecipeError
from potstill.contracts.players import OptimizerSpec
from potstill.divergences import ReverseKL, SampledReverseKL
from potstill.methods.language.minillm import SequenceReverseKL
from potstill.models.causal import CausalLM
from potstill.objectives.policy import PolicyGradient
from potstill.objectives.states import token_logp
from potstill.objectives.tokens import RolloutSpec, TokenDistillation
from potstill.rollouts.local import sample
from potstill.rollouts.served import ServerSpec
from potstill.run import Run, open_folder
from potstill.serving.client import ServerError
from potstill.teachers import LocalTeacher

pytestmark = pytest.mark.needs("httpx", "starlette", "uvicorn")
TEXT = "A pot still boils the wash, and what rises is lighter than what stays. Then it drips, clear and strong."


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def server(tiny_lm, weights):
    """It starts with other weights than any student here."""
    with serving(tiny_lm(9), refresh_from=weights, mode="processed_logprobs") as served:
        yield served


def prompts():
    tokens = torch.tensor([[0, 0, 9, 8], [7, 6, 5, 10], [0, 20, 21, 22]])
    return PromptBatch(torch.tensor([11, 3, 40]), tokens, tokens > 0, extra={"rows": ["a", "b", "c"]})


def spec(server, weights, **options):
    return RolloutSpec(max_new_tokens=6, server=ServerSpec(url=server.url, folder=str(weights / "student")), **options)


def models(tiny_lm):
    return CausalLM.from_pretrained(tiny_lm(1)), LocalTeacher(CausalLM.from_pretrained(tiny_lm(2)))


def own_logp(student, batch):
    with torch.no_grad():
        return token_logp(student, student.counted_hidden(batch), batch.tokens_counted)


def test_steps_of_token_distillation(tiny_lm, server, weights):
    """The tokens are those that the student would sample itself, before an update and after, with its log-probs."""
    student, teacher = models(tiny_lm)
    options = {"optimizer": OptimizerSpec(), "seed": 3}
    served = TokenDistillation(
        student, teacher, SampledReverseKL(), rollouts=spec(server, weights, samples_per_prompt=2), **options
    )
    local = TokenDistillation(
        student, teacher, SampledReverseKL(), rollouts=RolloutSpec(max_new_tokens=6, samples_per_prompt=2), **options
    )
    optimizer, seen = torch.optim.SGD(student.parameters(), lr=0.5), []
    for step in (0, 1):
        there, here = served.collect(prompts(), step), local.collect(prompts(), step)
        seen.append(there.tokens_BT)
        assert len(there) == 6 and torch.equal(there.tokens_BT, here.tokens_BT)
        assert torch.equal(there.counted_BT, here.counted_BT) and torch.equal(there.ids_B, here.ids_B)
        assert_close(there.sampled_logp_BT[there.counted_BT], own_logp(student, there), rtol=0, atol=1e-4)
        optimizer.zero_grad()
        value, alike = (o.loss("student", batch, step).value() for o, batch in ((served, there), (local, here)))
        assert_close(value, alike)
        value.backward()
        optimizer.step()
    old = own_logp(CausalLM.from_pretrained(weights / "student"), there)
    assert_close(there.sampled_logp_BT[there.counted_BT], old, rtol=0, atol=1e-4)
    assert (old - own_logp(student, there)).abs().max() > 0.01, "the update changes the student, or nothing is tested"
    again = served.collect(prompts(), 1)
    assert_close(again.sampled_logp_BT[again.counted_BT], own_logp(student, again), rtol=0, atol=1e-4)


def test_weights_travel_once_a_step(tiny_lm, server, weights, monkeypatch):
    student, teacher = models(tiny_lm)
    objective = TokenDistillation(
        student, teacher, ReverseKL(), rollouts=spec(server, weights), optimizer=OptimizerSpec(), seed=0
    )
    saved, save = [], CausalLM.save
    monkeypatch.setattr(CausalLM, "save", lambda self, folder: (saved.append(folder), save(self, folder)))
    for step in (0, 0, 1, 1):  # two micro-batches each
        objective.collect(prompts(), step)
    assert saved == [weights / "student"] * 2
    with torch.no_grad():
        student.network.lm_head.weight.add_(1e-3)
    objective.collect(prompts(), 1)
    assert len(saved) == 3, "weights changed within a step"


def test_policy_gradients_know_what_the_server_sampled_with(tiny_lm, server, weights):
    student, teacher = models(tiny_lm)
    rollouts = spec(server, weights, temperature=0.7, samples_per_prompt=2)
    objective = PolicyGradient(
        student, teacher, rollouts=rollouts, temperature=0.7, task_coefficient=0.0, optimizer=OptimizerSpec(), seed=5
    )
    batch = objective.collect(prompts(), 0)
    assert_close(objective.loss("student", batch, 0).metrics["ratio"].mean().item(), 1.0, rtol=0, atol=1e-4)
    mine = sample(student, prompts(), **rollouts.sampling, seed=keyed.key(5, "rollout", 0))
    assert torch.equal(batch.tokens_BT, mine.tokens_BT)


@pytest.mark.parametrize("method", [{"name": "gkd", "on_policy": 1.0}, {"name": "vopd", "estimator": "value"}])
def test_recipes_name_a_server(method, tiny_lm, server, weights, tmp_path):
    """The whole run is that of local rollouts, to the last logged digit but rounding's."""
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(f"{TEXT} {i}" for i in range(40)))
    raw = {
        "student": str(tiny_lm(1)), "teacher": str(tiny_lm(2)),
        "data": {"text": str(file), "length": 16, "prompt_length": 6},
        "train": {"steps": 2, "batch": 4, "lr": 1e-2, "trackers": [], "device": "cpu"}, "eval": {"limit": 4, "batch": 4},
    }  # fmt: skip
    place, asked = {"url": server.url, "folder": str(weights / "student")}, len(server.posts)
    logged = []
    for name, rollouts in (("local", {}), ("served", {"server": place})):
        how = {**method, "rollouts": {"max_new_tokens": 8, **rollouts}}
        plan = recipes.resolve({"method": how, **raw})
        open_folder(tmp_path / name, recipes.write(plan))
        Run(plan, tmp_path / name).execute()
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        logged.append([{k: v for k, v in json.loads(line).items() if isinstance(v, float)} for line in lines])
    assert len(server.posts) > asked
    for one, other in zip(*logged, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_what_cannot_be_served_is_refused(tiny_lm, server, weights):
    student, teacher = models(tiny_lm)
    how = {"optimizer": OptimizerSpec(), "seed": 0}
    with pytest.raises(RecipeError, match=r"A server samples the student alone. Set method.teacher_mixed to 0"):
        SequenceReverseKL(
            student, teacher, variant="paper", teacher_mixed=0.2, single_step=True, length_norm=True,
            rollouts=spec(server, weights), **how,
        )  # fmt: skip
    away = RolloutSpec(max_new_tokens=6, server=ServerSpec(url=server.url, folder=str(weights.parent / "elsewhere")))
    objective = TokenDistillation(student, teacher, ReverseKL(), rollouts=away, **how)
    with pytest.raises(ServerError, match="folder must lie in"):
        objective.collect(prompts(), 0)
