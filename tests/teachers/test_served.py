"""A served teacher says what the same teacher says here; what it cannot say is refused before work starts."""

import copy
import math

import pytest
import torch
from tests.serving.servers import serving
from torch.testing import assert_close
from transformers import GemmaConfig, LlamaConfig, Qwen3Config

from potstill import recipe as recipes
from potstill.contracts.batch import ImageBatch, TokenBatch
from potstill.contracts.errors import DataError, ModelError, RecipeError, SignalError
from potstill.contracts.players import OptimizerSpec
from potstill.contracts.signals import FullLogits, HiddenAndHead, Teacher, TokenLogp, TopKLogp
from potstill.divergences import ForwardKL, SampledReverseKL
from potstill.models.causal import CausalLM
from potstill.models.spec import ServedSpec
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.tokens import TokenDistillation, completed
from potstill.run import Run, open_folder
from potstill.serving.client import ServerError
from potstill.tasks.tokens import Prompts
from potstill.teachers import LocalTeacher, PrivilegedTeacher, ServedTeacher
from potstill.teachers.privileged import PrivilegedContext, Solution

pytestmark = pytest.mark.needs("httpx", "starlette", "uvicorn")
TEXT = "A pot still boils the wash, and what rises is lighter than what stays. Then it drips, clear and strong."


@pytest.fixture(scope="module")
def model(tiny_lm):
    return CausalLM.from_pretrained(tiny_lm(1))


@pytest.fixture(scope="module")
def served(model):
    with serving(model, max_logprobs=100) as it:
        yield it


def batch_of(model, seed=0, size=6, length=12):
    """Rows with padding on either side; the second counts nothing, others count some of their places."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, len(model.tokenizer), (size, length), generator=generator)
    attention, counted = torch.ones(2, size, length, dtype=torch.bool)
    counted = torch.rand(size, length, generator=generator) < 0.6
    for b in range(size):
        attention[b, : b % 3] = False
        attention[b, length - b % 4 :] = False
        counted[b, : b % 3 + 1] = False
    counted &= attention
    counted[1] = False
    return TokenBatch(torch.arange(size), tokens, attention, counted)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, GemmaConfig])
def test_it_says_what_a_local_teacher_says(config, tiny_lm):
    model = CausalLM.from_pretrained(tiny_lm(2, config))
    with serving(model) as served:
        teacher = ServedTeacher(served.url, model.tokenizer, ServedSpec(k=5, rows=2))
        assert isinstance(teacher, Teacher) and teacher.name == f"tiny at {served.url}"
        local, batch = LocalTeacher(model), batch_of(model)
        assert_close(teacher.score(batch, TokenLogp).logp_N, local.score(batch, TokenLogp).logp_N, rtol=0, atol=1e-5)
        found, logp = teacher.score(batch, TopKLogp), local.score(batch, FullLogits).logits.log_softmax(-1)
    best = logp.topk(5)
    assert_close(found.logp_NK, best.values, rtol=0, atol=1e-5)
    assert torch.equal(found.indices_NK, best.indices)
    assert found.logp_NK.shape == (int(batch.counted_BT.sum()), 5) and not found.logp_NK.requires_grad


def test_all_tokens_are_logits(model, served):
    teacher, batch = ServedTeacher(served.url, model.tokenizer, ServedSpec(k=1000)), batch_of(model)
    assert teacher.gives == {FullLogits, TokenLogp, TopKLogp}
    logp = LocalTeacher(model).score(batch, FullLogits).logits.log_softmax(-1)
    assert_close(teacher.score(batch, FullLogits).logits, logp, rtol=0, atol=1e-5)


def test_it_may_see_more_than_the_student(model, served):
    """A privileged context is written here and read there: what the same teacher says of it here, and the same step."""
    rows = [{"prompt": "one and two is", "completion": "three"}, {"prompt": "no", "completion": "yes, it is so"}]
    prompts = Prompts(rows, model.tokenizer, 30, 30).batch(torch.arange(2))
    batch, context = completed(prompts, model.pad_id), PrivilegedContext(model.tokenizer, Solution(), 200)
    there = PrivilegedTeacher(ServedTeacher(served.url, model.tokenizer, ServedSpec(k=100)), context)
    here = PrivilegedTeacher(LocalTeacher(model), context)
    assert there.gives == {FullLogits, TokenLogp, TopKLogp} and there.temperature == 1.0
    assert_close(there.score(batch, TokenLogp).logp_N, here.score(batch, TokenLogp).logp_N, rtol=0, atol=1e-5)
    logp = here.score(batch, FullLogits).logits.log_softmax(-1)
    assert_close(there.score(batch, FullLogits).logits, logp, rtol=0, atol=1e-5)
    plain = LocalTeacher(model).score(batch, FullLogits).logits.log_softmax(-1)
    assert (plain - logp).abs().max() > 0.1, "the context is seen, or nothing is tested"
    losses = {}
    for name, teacher in (("there", there), ("here", here)):
        student = copy.deepcopy(model).requires_grad_(True)
        objective = TokenDistillation(student, teacher, ForwardKL(), optimizer=OptimizerSpec(), seed=0)
        losses[name] = objective.loss("student", batch, 0).value()
        losses[name].backward()
        losses[f"{name} gradient"] = student.network.lm_head.weight.grad
        batch.memo.clear()
    assert_close(losses["there"], losses["here"], rtol=0, atol=1e-5)
    assert_close(losses["there gradient"], losses["here gradient"], rtol=0, atol=1e-5)
    few = PrivilegedTeacher(ServedTeacher(served.url, model.tokenizer, ServedSpec(k=5)), context)
    sampled = TokenDistillation(model, few, SampledReverseKL(), optimizer=OptimizerSpec(), seed=0)
    own = model.counted_logits(batch).log_softmax(-1).gather(1, batch.tokens_counted[:, None])[:, 0]
    gap = here.score(batch, TokenLogp).logp_N - own
    assert_close(sampled.loss("student", batch, 0).value(), -(gap.detach() * own).mean(), rtol=0, atol=1e-4)
    with pytest.raises(SignalError, match="needs more than tiny at .* with privileged context gives"):
        TokenDistillation(model, few, SampledReverseKL(baseline="full"), optimizer=OptimizerSpec(), seed=0)


def test_a_batch_is_asked_for_once_and_for_no_more_than_counts(model, served):
    teacher = ServedTeacher(served.url, model.tokenizer, ServedSpec(k=3, rows=64))
    batch, before = batch_of(model), len(served.posts)
    alone = teacher.score(batch, TokenLogp).logp_N
    teacher.score(batch, TokenLogp)
    assert [post["prompt_logprobs"] for post in served.posts[before:]] == [0]
    teacher.score(batch, TopKLogp)
    both = batch_of(model)
    teacher.score(both, TopKLogp)
    assert_close(teacher.score(both, TokenLogp).logp_N, alone, rtol=0, atol=1e-5)
    assert [post["prompt_logprobs"] for post in served.posts[before:]] == [0, 3, 3]
    rows = served.posts[-1]["prompt"]
    assert len(rows) == len(batch) - 1, "the row that counts nothing is not sent"
    for row in rows:
        b = next(b for b in range(len(batch)) if row == batch.tokens_BT[b][batch.attention_BT[b]][: len(row)].tolist())
        assert len(row) - 1 == batch.counted_BT[b][batch.attention_BT[b]].nonzero().max(), (
            "nothing after the last that counts"
        )


def test_nothing_counts(model, served):
    batch = batch_of(model)
    batch.counted_BT[:] = False
    teacher = ServedTeacher(served.url, model.tokenizer, ServedSpec(k=3))
    assert teacher.score(batch, TokenLogp).logp_N.shape == (0,)
    found = teacher.score(batch, TopKLogp)
    assert found.logp_NK.shape == found.indices_NK.shape == (0, 3)


def test_impossible_tokens(model):
    """What the teacher never says has log-probability -inf here as there."""
    batch = batch_of(model)
    never = int(batch.tokens_counted[0])
    head = model.head
    model.head = lambda hidden: head(hidden).index_fill(-1, torch.tensor(never), -math.inf)
    try:
        with serving(model) as served:
            found = ServedTeacher(served.url, model.tokenizer).score(batch, TokenLogp).logp_N
        assert_close(found, LocalTeacher(model).score(batch, TokenLogp).logp_N, rtol=0, atol=1e-5)
        assert found[0] == -math.inf
    finally:
        del model.head


def test_what_it_does_not_give(model, served):
    teacher = ServedTeacher(served.url, model.tokenizer, ServedSpec(k=7))
    for need in (FullLogits, HiddenAndHead):
        with pytest.raises(
            SignalError,
            match=f"is served: it gives the log-probs of tokens and of its 7 likeliest, no {need.__name__}. Use a divergence "
            r"over the top k \(TopKLogp\) or the sampled gradient \(TokenLogp\), or load the teacher here",
        ):
            teacher.score(batch_of(model), need)
    images = ImageBatch(torch.arange(1), torch.zeros(1, 3, 4, 4), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(SignalError, match="cannot score a ImageBatch"):
        teacher.score(images, TokenLogp)
    batch = batch_of(model)
    batch.counted_BT[0, 0] = True
    with pytest.raises(DataError, match="A first token cannot count"):
        teacher.score(batch, TokenLogp)
    batch = batch_of(model)
    batch.counted_BT[3, -1] = True
    with pytest.raises(DataError, match="A token that counts is padding"):
        teacher.score(batch, TokenLogp)


def test_another_tokenizer(model, served, tiny_lm):
    small = character_tokenizer("abcdefghijklmnopqrstuvwxyz ")
    with pytest.raises(
        ModelError,
        match=r"another tokenizer than the student: where the student reads token \d+ in a probe, it reads token \d+",
    ):
        ServedTeacher(served.url, small)
    shifted = character_tokenizer("".join(sorted(k for k in model.tokenizer.get_vocab() if len(k) == 1)) + "~")
    with pytest.raises(ModelError, match="another tokenizer"):
        ServedTeacher(served.url, shifted)
    longer = CausalLM.from_pretrained(tiny_lm(1)).tokenizer
    longer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    with pytest.raises(
        ServerError,
        match=r"Token id 84 is out of vocabulary.*probe for the 64 likeliest tokens and the student's last token, 84",
    ):
        ServedTeacher(served.url, longer)


def test_a_short_context_still_tells_tokenizers_apart(tiny_lm):
    with serving(tiny_lm(1, max_position_embeddings=16)) as served:
        ServedTeacher(served.url, served.model.tokenizer)
        with pytest.raises(ModelError, match="another tokenizer"):
            ServedTeacher(served.url, character_tokenizer("abcdefgh"))
        teacher = ServedTeacher(served.url, served.model.tokenizer)
        with pytest.raises(DataError, match=r"A row of 16 tokens and a new one exceed the 16 that .* Shorten the rows"):
            batch = batch_of(served.model, length=16)
            batch.counted_BT[0, -1] = True
            teacher.score(batch, TokenLogp)
        batch = batch_of(served.model, length=15)
        batch.counted_BT[0, -1] = True
        assert len(teacher.score(batch, TokenLogp).logp_N) == len(batch.tokens_counted)


def test_more_than_the_server_gives(model):
    with serving(model, max_logprobs=20) as served:
        with pytest.raises(
            ServerError,
            match=r"prompt_logprobs is 64, and this server gives 20 at most .* lower served\.k or raise the server's",
        ):
            ServedTeacher(served.url, model.tokenizer)
        assert ServedTeacher(served.url, model.tokenizer, ServedSpec(k=20)).k == 20
    with serving(model) as served:
        assert (
            ServedTeacher(served.url, model.tokenizer, ServedSpec(k=1000)).k == model.vocabulary == len(model.tokenizer)
        )


def test_tokens_that_the_student_has_not(model):
    """A head padded with words that no tokenizer makes, and a teacher that says them."""

    def spoil(count, answer):
        for entry in [e for choice in answer["choices"] for e in choice["prompt_logprobs"][1:] if count > 1]:
            if len(entry) == 4:  # the place's own token is none of the three likeliest
                entry["900"] = entry.pop(next(token for token in entry if entry[token]["rank"] == 1))
        return answer

    batch = batch_of(model)
    with serving(model, spoil) as served:
        teacher = ServedTeacher(served.url, model.tokenizer, ServedSpec(k=3))
        with pytest.raises(ModelError, match="token 900 among its 3 likeliest, and the student has 84 tokens"):
            teacher.score(batch, TopKLogp)


# ---------------------------------------------------------------- recipes


@pytest.fixture
def lines(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(f"{TEXT} {i}" for i in range(40)))
    return file


def plan_of(lines, student, teacher, method="token_kd", /, **overrides):
    raw = {
        "method": method,
        "student": str(student),
        "teacher": teacher,
        "data": {"text": str(lines), "length": 16, "prompt_length": 6},
        "train": {"steps": 2, "batch": 4, "lr": 1e-2, "trackers": [], "device": "cpu"},
        "eval": {"limit": 4, "batch": 4},
    }
    return recipes.resolve(recipes.apply(raw, overrides))


def run(folder, *args, **overrides):
    plan = plan_of(*args, **overrides)
    open_folder(folder, recipes.write(plan))
    return Run(plan, folder).execute()


def test_a_method_learns_from_it_what_it_learns_from_the_same_teacher_here(tmp_path, lines, tiny_lm):
    """With all tokens among the k likeliest, two steps of token_kd end in the same student, and a resumed run knows the
    address from its recipe."""
    student, teacher = tiny_lm(3, spread=0.1), tiny_lm(4)
    run(tmp_path / "here", lines, student, str(teacher))
    with serving(teacher) as served:
        run(tmp_path / "there", lines, student, {"name": served.url, "served": {"k": 84}})
        run(tmp_path / "most", lines, student, {"name": served.url, "served": {"k": 83}})
        run(tmp_path / "few", lines, student, served.url, **{"teacher.served.k": 2})
        assert {post["prompt_logprobs"] for post in served.posts} == {0, 84, 83, 2}
        written = recipes.resolve(recipes.read(str(tmp_path / "few"))).models["teacher"]
        assert written.address == served.url and written.served.k == 2
    weights = [
        CausalLM.from_pretrained(tmp_path / name / "student").state_dict() for name in ("here", "there", "most", "few")
    ]
    for name, weight in weights[0].items():
        assert_close(weights[1][name], weight, rtol=0, atol=1e-5)
        assert_close(weights[2][name], weight, rtol=0, atol=1e-3)
    assert any(not torch.equal(weights[3][name], weight) for name, weight in weights[0].items())


@pytest.mark.parametrize(
    "method",
    [
        {"name": "gkd", "rollouts": {"max_new_tokens": 4}},
        {"name": "vopd", "estimator": "sampled", "probe": 0, "rollouts": {"max_new_tokens": 4}},
    ],
    ids=["gkd", "vopd"],
)
def test_on_policy_methods_learn_from_it(method, tmp_path, lines, tiny_lm):
    student = tiny_lm(3, spread=0.1)
    with serving(tiny_lm(4)) as served:
        result = run(tmp_path / "run", lines, student, served.url, method)
    assert all(math.isfinite(value) for value in result.metrics.values())
    start, end = (CausalLM.from_pretrained(f).state_dict() for f in (student, tmp_path / "run" / "student"))
    assert any(not torch.equal(start[name], end[name]) for name in start)


def test_a_server_gives_no_tokenizer(lines):
    """A packaged student's tokenizer comes of the data; the teacher's address is no folder to take one from."""
    tokenizer = Run(plan_of(lines, "llama-tiny", "http://127.0.0.1:9/v1"), None).context["tokenizer"]
    assert tokenizer.get_vocab() == character_tokenizer(lines.read_text().splitlines()).get_vocab()


def test_recipes_that_cannot_work(tmp_path, lines, tiny_lm):
    student, url = tiny_lm(3), "http://127.0.0.1:9/v1"
    with pytest.raises(RecipeError, match=r"teacher: http.* is a server: lora belong to a model that is loaded here"):
        plan_of(lines, student, {"name": url, "lora": {"r": 2}})
    with pytest.raises(RecipeError, match=r"teacher: served says how a server is asked, and .* is none"):
        plan_of(lines, student, {"name": str(student), "served": {"k": 2}})
    with pytest.raises(
        RecipeError, match=r"teacher\.served\.key: names an environment variable.* Never write a key"
    ) as failed:
        plan_of(lines, student, {"name": url, "served": {"key": "sk-secret"}})
    assert "sk-secret" not in str(failed.value)
    with pytest.raises(RecipeError, match=r"teacher\.served\.kk is not a field of ServedSpec. Did you mean k"):
        plan_of(lines, student, {"name": url, "served": {"kk": 2}})
    with pytest.raises(ServerError, match="cannot be reached"):
        run(tmp_path / "a", lines, student, url)
    with pytest.raises(RecipeError, match=f"student: {url} is a server, and token_kd needs this model's weights here"):
        run(tmp_path / "b", lines, url, str(student))
