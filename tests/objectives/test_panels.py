"""Several teachers: the weighted sum of the divergences to each, what it equals, and what it is not."""

import math

import pytest
import torch
from torch.testing import assert_close

from potstill.contracts.batch import PromptBatch, TokenBatch
from potstill.contracts.errors import DataError, ModelError, RecipeError, SignalError
from potstill.contracts.players import OptimizerSpec
from potstill.contracts.signals import FullLogits
from potstill.divergences import Exact, ForwardKL, JensenShannon, ReverseKL, TopK
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.panels import PanelDistillation
from potstill.objectives.tokens import RolloutSpec, TokenDistillation
from potstill.teachers import EMATeacher, LocalTeacher, Panel, PrivilegedTeacher
from potstill.teachers.debate import Debate, DebatePrompts
from potstill.weighting import EntropyTop, Uniform

TOKENIZER = character_tokenizer(["abcdefg "])


def model(seed: int, tokenizer=TOKENIZER, spread: float = 1.0) -> CausalLM:
    torch.manual_seed(seed)
    made = CausalLM.PACKAGED["llama-tiny"](tokenizer=tokenizer, width=16, heads=2).double()
    for parameter in made.parameters():
        parameter.data.mul_(spread if parameter.dim() > 1 else 1.0)
    return made


TEACHERS = [LocalTeacher(model(seed, spread=6.0), f"t{seed}") for seed in (1, 2)]


def rows() -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(5, TOKENIZER.vocab_size, (2, 6), generator=generator)
    attention_BT = torch.arange(6)[None] < torch.tensor([6, 4])[:, None]
    return TokenBatch(torch.arange(2), tokens_BT, attention_BT, attention_BT & (torch.arange(6) >= 1))


def made(teachers=TEACHERS, estimator=JensenShannon(0.5), **options) -> PanelDistillation:
    return PanelDistillation(model(0), teachers, estimator, optimizer=OptimizerSpec(), seed=0, **options)


def plain(teacher, estimator=JensenShannon(0.5), **options) -> TokenDistillation:
    return TokenDistillation(model(0), teacher, estimator, optimizer=OptimizerSpec(), seed=0, **options)


def taught(objective, batch) -> tuple[float, torch.Tensor]:
    """The value and the student's gradient, as one vector."""
    objective.student.zero_grad()
    value = objective.loss("student", batch, 0).value()
    value.backward()
    return value.detach(), torch.cat([p.grad.flatten() for p in objective.student.parameters()])


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize(
    "estimator", [JensenShannon(0.5), ReverseKL(), Exact(ForwardKL(), TopK(3, tail="renormalize"))]
)
def test_it_is_the_weighted_sum_over_teachers(estimator, average):
    """Row by row: the weights stand at each row's own positions, and the mean is that of the objective."""
    batch = rows()
    batch.extra["weights"] = [[0.9, 0.1], [0.2, 0.8]]
    value, gradient = taught(made(estimator=estimator, weights="weights", average=average), batch)
    expected, expected_gradient = 0.0, 0.0
    for k, teacher in enumerate(TEACHERS):
        for b in range(2):
            cut = (batch.tokens_BT[b : b + 1], batch.attention_BT[b : b + 1], batch.counted_BT[b : b + 1])
            one = TokenBatch(batch.ids_B[b : b + 1], *cut)
            share = batch.extra["weights"][b][k] * (0.5 if average == "sequence" else (5 / 8, 3 / 8)[b])
            v, g = taught(plain(teacher, estimator), one)
            expected, expected_gradient = expected + share * v, expected_gradient + share * g
    assert_close(value, expected)
    assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)  # norms are float32


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("weighting", [Uniform(), EntropyTop(share=0.5)], ids=repr)
def test_one_teacher_is_plain_distillation_and_so_are_equal_ones(weighting, average):
    options = {"weighting": weighting, "average": average}
    one = taught(plain(TEACHERS[0], **options), rows())
    same = LocalTeacher(TEACHERS[0].model, "again")
    for panel in (made(TEACHERS[:1], **options), made([TEACHERS[0], same], weights=[0.3, 0.7], **options)):
        assert_close(taught(panel, rows()), one)
    seen, expected = (x.loss("student", rows(), 0) for x in (panel, plain(TEACHERS[0], **options)))
    for name, term in expected.metrics.items():
        assert_close(seen.metrics[name].mean(), term.mean())
    for name, values in expected.positions.items():
        assert_close(seen.positions[name], values)


def test_equal_weights_are_fixed_equal_weights():
    batch = rows()
    batch.extra["weights"] = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    by_row = taught(made(weights="weights"), batch)
    assert_close(by_row, taught(made(weights=[0.5, 0.5]), batch))
    assert_close(by_row, taught(made(), batch))


@pytest.mark.parametrize(
    ("estimator", "combine"), [(ForwardKL(), "mixture"), (ReverseKL(), "product")], ids=["forward", "reverse"]
)
def test_under_a_kl_its_gradient_is_that_of_one_combined_teacher(estimator, combine):
    """The values differ by what the teachers differ among themselves, which no student can mend."""
    batch = rows()
    batch.extra["weights"] = [[0.9, 0.1], [0.2, 0.8]]
    summed = taught(made(estimator=estimator, weights="weights"), batch)
    joint = taught(plain(Panel(TEACHERS, "weights", combine), estimator), batch)
    assert_close(summed[1], joint[1], rtol=1e-5, atol=1e-8)  # norms are float32
    assert summed[0] > joint[0] + 1e-3


def test_under_jensen_shannon_it_is_not_the_divergence_to_the_mixture():
    summed, joint = taught(made(), rows()), taught(plain(Panel(TEACHERS)), rows())
    assert summed[0] > joint[0] + 1e-3, "convex in the teacher"
    assert (summed[1] - joint[1]).norm() > 1e-3 * joint[1].norm()


def test_weights_are_taken_as_they_are_and_a_teacher_without_weight_is_not_asked():
    once, twice = taught(made(weights=[0.3, 0.7]), rows()), taught(made(weights=[0.6, 1.4]), rows())
    assert_close((2 * once[0], 2 * once[1]), twice)

    class Silent(LocalTeacher):
        def score(self, batch, need):
            raise AssertionError("asked")

    assert_close(
        taught(made([TEACHERS[0], Silent(model(3))], weights=[1, 0]), rows()), taught(plain(TEACHERS[0]), rows())
    )


def test_where_a_teacher_has_no_weight_it_may_forbid_what_it_likes():
    class Forbidding(LocalTeacher):
        gives = frozenset({FullLogits})

        def __init__(self, net):
            self.model, self.name = net, "forbidding"

        def score(self, batch, need):
            logits = super().score(batch, need).logits
            logits[:5, 7] = -math.inf  # in the first row
            return FullLogits(logits)

    batch = rows()
    batch.extra["weights"] = [[1.0, 0.0], [0.5, 0.5]]
    panels = [
        made([TEACHERS[0], second], ReverseKL(), weights="weights", weighting=EntropyTop(share=0.5))
        for second in (Forbidding(TEACHERS[1].model), TEACHERS[1])
    ]
    assert_close(taught(panels[0], batch), taught(panels[1], batch))


def test_what_is_seen_is_the_weighted_mean_of_the_teachers():
    panel = made(weights=[0.6, 1.4])
    seen = panel.loss("student", rows(), 0)
    each = [plain(teacher).loss("student", rows(), 0) for teacher in TEACHERS]
    expected = 0.3 * each[0].metrics["reverse_kl"].mean() + 0.7 * each[1].metrics["reverse_kl"].mean()
    assert_close(seen.metrics["reverse_kl"].mean(), expected)
    assert_close(seen.metrics["student_entropy"].mean(), each[0].metrics["student_entropy"].mean())


def test_padding_and_masked_rows_change_nothing():
    batch = rows()
    batch.extra["weights"] = [[0.9, 0.1], [0.2, 0.8]]
    pad = lambda x, fill: torch.cat([x, torch.full((2, 3), fill, dtype=x.dtype)], 1)
    longer = TokenBatch(
        batch.ids_B,
        pad(batch.tokens_BT, 1),
        pad(batch.attention_BT, False),
        pad(batch.counted_BT, False),
        extra=batch.extra,
    )
    panel = made(weights="weights", average="sequence")
    assert_close(taught(panel, batch), taught(panel, longer))
    first = TokenBatch(
        batch.ids_B[:1],
        batch.tokens_BT[:1],
        batch.attention_BT[:1],
        batch.counted_BT[:1],
        extra={"weights": [[0.9, 0.1]]},
    )
    masked = TokenBatch(batch.ids_B, batch.tokens_BT, batch.attention_BT, batch.counted_BT.clone(), extra=batch.extra)
    masked.counted_BT[1] = False
    assert_close(taught(panel, masked), taught(panel, first))
    masked.counted_BT[:] = False
    value, gradient = taught(panel, masked)
    assert value == 0 and not gradient.any(), "a batch in which nothing counts teaches nothing"


def test_no_teacher_learns_or_is_saved_but_those_that_move():
    student = model(0)
    average = EMATeacher(student, 0.5, ramp=False)
    context = lambda batch: batch
    panel = PanelDistillation(
        student,
        [
            PrivilegedTeacher(average, context),
            TEACHERS[0],
            PrivilegedTeacher(average, context),
            EMATeacher(student, 0.9),
        ],
        ReverseKL(),
        optimizer=OptimizerSpec(),
        seed=0,
    )
    taught(panel, rows())
    assert all(p.grad is None for t in panel.teachers for p in t.model.parameters())
    panel.after_step("student", 0)
    assert int(average.ema.updates) == 1 == int(panel.teachers[3].ema.updates), (
        "each once, however often it is a member"
    )
    state = {name.split(".")[0] for name in panel.state_dict()}
    assert state == {"student", "teacher_state", "moving"}
    assert {id(p) for p in panel.players["student"].parameters()} == {id(p) for p in student.parameters()}


def test_the_smallest_vocabulary_is_compared():
    def wide(seed):
        net = model(seed)
        net.network.resize_token_embeddings(16, mean_resizing=False)
        return net

    panel = PanelDistillation(
        wide(0), [LocalTeacher(wide(1)), TEACHERS[1]], ForwardKL(), optimizer=OptimizerSpec(), seed=0
    )
    assert panel.shared == TOKENIZER.vocab_size
    assert panel.loss("student", rows(), 0).value() > 0


def test_a_debate_is_held_about_the_prompts_and_its_weights_teach():
    """Two samples of each prompt share their prompt's debate."""
    heard = []

    def speaker(k):
        def speak(prompts, ids_B, seed):
            heard.append((k, list(prompts), seed))
            return [f"confidence {100 * (k == b % 2)}" for b in range(len(prompts))]

        return speak

    words = DebatePrompts(first="{prompt}", later="{prompt}", last="", scored="{transcript}{prompt}")
    debate = Debate([speaker(0), speaker(1)], rounds=1, prompts=words)
    panel = made(weights="weights", debate=debate, rollouts=RolloutSpec(max_new_tokens=2, samples_per_prompt=2))
    tokens = torch.tensor([[5, 6], [7, 8]])
    asked = [{"prompt": "ab"}, {"prompt": "cd"}]
    prompts = PromptBatch(torch.tensor([3, 9]), tokens, tokens > 0, extra={"rows": asked})
    out = panel.collect(prompts, 4)
    high, low = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))
    assert_close(out.extra["weights"], [[high, low]] * 2 + [[low, high]] * 2)
    assert [row["prompt"] for row in out.extra["rows"]] == ["ab", "ab", "cd", "cd"]
    assert all("round 1" in row["debate"] for row in out.extra["rows"])
    assert [(k, texts) for k, texts, _ in heard] == [(0, ["ab", "cd"]), (1, ["ab", "cd"])]
    without = made(rollouts=RolloutSpec(max_new_tokens=2, samples_per_prompt=2)).collect(prompts, 4)
    assert torch.equal(without.tokens_BT, out.tokens_BT), "the student's samples are blind to the debate too"
    seeds = {seed for _, _, seed in heard}
    panel.collect(prompts, 5)
    assert seeds.isdisjoint(seed for _, _, seed in heard[2:]), "another step, other noise"
    assert panel.loss("student", out, 4).value() > 0


def test_what_is_no_panel_is_refused():
    with pytest.raises(RecipeError, match="at least one teacher"):
        made([])
    with pytest.raises(RecipeError, match="1 weights for 2 teachers"):
        made(weights=[1.0])
    with pytest.raises(RecipeError, match="at least 0 and a positive sum"):
        made(weights=[2.0, -1.0])
    with pytest.raises(ModelError, match="different vocabularies"):
        made([TEACHERS[0], LocalTeacher(model(1, character_tokenizer(["xyz"])))])
    mute = LocalTeacher(TEACHERS[1].model, "mute")
    mute.gives = frozenset()
    with pytest.raises(SignalError, match="needs more than mute gives"):
        made([TEACHERS[0], mute])
    with pytest.raises(DataError, match=r"extra\['weights'\] is missing"):
        made(weights="weights").loss("student", rows(), 0)
