"""A student sampled by a server: the tokens and log-probs of `rollouts.local`, and refusals where they would not be exact."""

import re

import httpx
import pytest
import torch
from tests.serving.servers import failure, serving
from torch.testing import assert_close

from potstill.contracts.batch import PromptBatch
from potstill.contracts.errors import DataError, ModelError, RecipeError
from potstill.models.causal import CausalLM
from potstill.models.spec import ServedSpec
from potstill.rollouts.local import completions_of, sample
from potstill.rollouts.served import ServedPolicy
from potstill.serving.client import ServerError

pytestmark = pytest.mark.needs("httpx", "starlette", "uvicorn")


@pytest.fixture(scope="module")
def model(tiny_lm):
    return CausalLM.from_pretrained(tiny_lm(1, spread=0.2))


@pytest.fixture(scope="module")
def raw(model):
    with serving(model) as served:
        yield served


@pytest.fixture(scope="module")
def exact(model):
    with serving(model, mode="processed_logprobs") as served:
        yield served


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("potstill.serving.client.WAIT", 0.02)


def prompts():
    tokens = torch.tensor([[0, 0, 9, 8], [7, 6, 5, 10], [20, 21, 0, 0]])  # padded on either side
    attention = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    return PromptBatch(torch.tensor([11, 3, 40]), tokens, attention, extra={"rows": ["a", "b", "c"]})


@pytest.mark.parametrize(
    "options",
    [{}, {"samples_per_prompt": 2}, {"temperature": 0.7}, {"top_p": 0.8, "temperature": 1.4}, {"top_k": 5}],
    ids=str,
)
def test_a_served_policy_is_the_local_one(options, model, raw, exact):
    server = raw if options.keys() <= {"samples_per_prompt"} else exact
    options = {"max_new_tokens": 7, "seed": 9, "stop_ids": range(5, 80, 7)} | options
    there, here = (
        ServedPolicy(server.url, model.tokenizer).sample(prompts(), **options),
        sample(model, prompts(), **options),
    )
    assert torch.equal(there.ids_B, here.ids_B) and torch.equal(there.tokens_BT, here.tokens_BT)
    assert torch.equal(there.attention_BT, here.attention_BT) and torch.equal(there.counted_BT, here.counted_BT)
    assert_close(there.sampled_logp_BT, here.sampled_logp_BT, rtol=0, atol=1e-5)
    assert there.extra == here.extra
    assert len(set(here.extra["finished"])) == 2, "some end and some do not, or nothing is tested"
    assert len({len(row) for row in completions_of(here)}) > 1


@pytest.fixture
def ending(model):
    """The model with a token that ends its texts more often than once in 84."""
    before, model.tokenizer.eos_token = model.tokenizer.eos_token, model.tokenizer.convert_ids_to_tokens(21)
    yield
    model.tokenizer.eos_token = before


def test_the_models_own_stop_tokens_are_the_default(model, raw, ending):
    policy = ServedPolicy(raw.url, model.tokenizer)
    found = [policy.sample(prompts(), max_new_tokens=12, seed=s) for s in range(3)]
    wanted = [sample(model, prompts(), max_new_tokens=12, seed=s) for s in range(3)]
    assert any(any(here.extra["finished"]) for here in wanted), "choose other seeds: no row ends by itself"
    for there, here in zip(found, wanted):
        assert completions_of(there) == completions_of(here) and there.extra == here.extra
    none = policy.sample(prompts(), max_new_tokens=12, seed=1, stop_ids=())
    assert [len(row) for row in completions_of(none)] == [12] * 3 and none.extra["finished"] == [False] * 3


def test_log_probs_that_would_not_be_exact_are_refused(model, raw):
    policy = ServedPolicy(raw.url, model.tokenizer)
    message = re.escape(f"tiny at {raw.url} counts log-probs before temperature, top_p and top_k")
    for options in ({"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 3}):
        with pytest.raises(
            RecipeError, match=message + ".* Start it with --logprobs-mode processed_logprobs, or sample at 1"
        ):
            policy.sample(prompts(), max_new_tokens=2, **options)
    assert policy.sample(prompts(), max_new_tokens=2)


def test_other_refusals(model, raw):
    policy = ServedPolicy(raw.url, model.tokenizer)
    with pytest.raises(DataError, match="must be positive"):
        policy.sample(prompts(), max_new_tokens=0)
    with pytest.raises(DataError, match=r"temperature > 0, 0 < top_p <= 1 and top_k >= 0, got 0, 1.0 and 0"):
        policy.sample(prompts(), max_new_tokens=1, temperature=0)
    with pytest.raises(DataError, match=r"A prompt of 4 tokens and 2045 new ones exceed the 2048 that tiny at"):
        policy.sample(prompts(), max_new_tokens=2045)


def spoiled(**changes):
    def spoil(count, answer):
        choice = answer["choices"][0]
        for name, value in changes.items():
            at = choice if name in choice else choice["logprobs"]
            at[name] = value(at[name]) if callable(value) else value
        return answer

    return spoil


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            spoiled(tokens=lambda t: t[:-1]),
            ServerError,
            r"sent 2 tokens and 3 log-probs, ended by 'length', where up to 3",
        ),
        (spoiled(tokens=[], token_logprobs=[]), ServerError, "sent 0 tokens and 0 log-probs"),
        (
            spoiled(tokens=lambda t: t[:-1], token_logprobs=lambda t: t[:-1], finish_reason="abort"),
            ServerError,
            "sent 2 tokens and 2 log-probs, ended by 'abort', where up to 3 were asked for",
        ),
        (
            spoiled(tokens=lambda t: t[:-1], token_logprobs=lambda t: t[:-1]),
            ServerError,
            "sent 2 tokens and 2 log-probs, ended by 'length', where up to 3 were asked for",
        ),
        (spoiled(tokens=["a", "b", "c"]), ServerError, "names a token 'a' instead of by its id"),
        (spoiled(token_logprobs=[0.0, float("nan"), 0.0]), ServerError, "sent nan where a log-probability belongs"),
        (spoiled(logprobs=None), ServerError, "sent an answer without logprobs"),
        (
            spoiled(tokens=["token_id:84"] * 3),
            ModelError,
            "wrote token 84, and the student has 84 tokens. Serve the student",
        ),
    ],
)
def test_what_cannot_be_true(spoil, error, message, model):
    with serving(model, spoil) as served:
        policy = ServedPolicy(served.url, model.tokenizer)
        with pytest.raises(error, match=message):
            policy.sample(prompts(), max_new_tokens=3, stop_ids=())


def test_the_server_takes_new_weights(tiny_lm):
    first, second = tiny_lm(2), tiny_lm(3)
    new = CausalLM.from_pretrained(second)
    with serving(first, refresh_from=second.parent) as served:
        policy = ServedPolicy(served.url, new.tokenizer)
        wanted = completions_of(sample(new, prompts(), max_new_tokens=6, seed=1))
        assert completions_of(policy.sample(prompts(), max_new_tokens=6, seed=1)) != wanted
        policy.refresh(second)
        assert completions_of(policy.sample(prompts(), max_new_tokens=6, seed=1)) == wanted
    with serving(new) as served:
        with pytest.raises(
            ServerError, match=r"refuses the request \(403: This server takes no new weights\. Start it with"
        ):
            ServedPolicy(served.url, new.tokenizer).refresh(second)


def test_adapters_are_loaded_as_vllm_loads_them(model, raw, monkeypatch, tmp_path):
    policy, posts = ServedPolicy(raw.url, model.tokenizer, adapter="student"), []

    def post(url, json):
        posts.append((url, json))
        return httpx.Response(200, json="Success: LoRA adapter 'student' added successfully.")

    monkeypatch.setattr(policy.client.http, "post", post)
    policy.refresh(tmp_path)
    assert posts == [
        (f"{raw.url}/load_lora_adapter", {"lora_name": "student", "lora_path": str(tmp_path), "load_inplace": True})
    ]
    assert policy.client.model == "student", "what is asked from now on is the adapter"


def test_retries_draw_the_same(model):
    with serving(model, lambda count, answer: failure(500) if count in (0, 2) else None) as served:
        policy = ServedPolicy(served.url, model.tokenizer, ServedSpec(concurrency=2))
        assert completions_of(policy.sample(prompts(), max_new_tokens=6, seed=4)) == completions_of(
            sample(model, prompts(), max_new_tokens=6, seed=4)
        )
