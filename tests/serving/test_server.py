"""The server: what vLLM's clients expect, numbers equal to the model's own, refusals in words, nothing broken in silence."""

import json
import math
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from tests.serving.servers import free_port, serving
from torch.testing import assert_close

from potstill.contracts.errors import RecipeError, RunError
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.serving import client, server
from potstill.serving.client import Client
from potstill.serving.engine import processed, seed_of
from potstill.serving.server import listening, serve

pytestmark = pytest.mark.needs("httpx", "starlette", "uvicorn")


@pytest.fixture(scope="module")
def served(tiny_lm):
    with serving(tiny_lm(1), mode="processed_logprobs", max_logprobs=40) as it:
        yield it


def ask(served, status=200, **body):
    response = httpx.post(f"{served.url}/completions", json=body, timeout=30)
    assert response.status_code == status, response.text
    return response.json() if status == 200 else response.json()["error"]


def logp_of(model, ids):
    """Log-probs of the next token after each of some ids. [T, V]"""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0].log_softmax(-1)


def ids_of(served, text):
    return served.model.tokenizer(text)["input_ids"]


def test_prompts_in_every_form_and_in_order(served):
    texts = ["spirits", "a pot still boils the wash"]
    ids = [ids_of(served, text) for text in texts]
    options = {"max_tokens": 3, "temperature": 0}
    answers = [ask(served, prompt=p, **options) for p in (texts, ids, texts[0], ids[0])]
    words = [[choice["text"] for choice in answer["choices"]] for answer in answers]
    assert words[0] == words[1] and words[2] == words[3] == words[0][:1]
    assert [choice["index"] for choice in answers[0]["choices"]] == [0, 1]
    read = len(ids[0]) + len(ids[1])
    assert answers[1]["usage"] == {"prompt_tokens": read, "completion_tokens": 6, "total_tokens": read + 6}
    assert answers[0]["object"] == "text_completion" and answers[0]["model"] == "tiny"


def test_prompt_logprobs_are_the_models_and_ranked(served):
    rows = [ids_of(served, "wash"), ids_of(served, "low wines, then spirit")]
    choices = ask(served, prompt=rows, max_tokens=1, prompt_logprobs=5)["choices"]
    for ids, choice in zip(rows, choices):
        logp, found = logp_of(served.model, ids), choice["prompt_logprobs"]
        assert found[0] is None and len(found) == len(ids)
        for place, entry in enumerate(found[1:]):
            best = logp[place].topk(5)
            own = ids[place + 1]
            assert {int(t) for t in entry} == {*best.indices.tolist(), own}
            for token, about in entry.items():
                assert about["logprob"] == pytest.approx(logp[place, int(token)].item(), abs=1e-5)
                assert about["rank"] == (logp[place] >= logp[place, int(token)]).sum()
                assert about["decoded_token"] == served.model.tokenizer.decode([int(token)])


def test_prompt_logprobs_are_the_same_in_pieces(served, monkeypatch):
    ids = ids_of(served, "a longer prompt")
    asked = {"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 3}
    whole = ask(served, **asked)["choices"][0]["prompt_logprobs"]
    monkeypatch.setattr("potstill.serving.engine.CHUNK", 4 * served.model.vocabulary)
    pieces = ask(served, **asked)["choices"][0]["prompt_logprobs"]
    assert len(pieces) == len(ids)
    for one, other in zip(pieces[1:], whole[1:], strict=True):
        assert one.keys() == other.keys()
        assert [v["logprob"] for v in one.values()] == pytest.approx([v["logprob"] for v in other.values()], abs=1e-5)


def test_echo_and_no_new_token(served):
    ids = ids_of(served, "wash")
    choice = ask(served, prompt=ids, max_tokens=0, echo=True, logprobs=2)["choices"][0]
    about, logp = choice["logprobs"], logp_of(served.model, ids)
    assert choice["text"] == "wash" and choice["finish_reason"] == "length"
    assert about["tokens"] == list("wash") and about["text_offset"] == [0, 1, 2, 3]
    assert about["token_logprobs"][0] is None and about["top_logprobs"][0] is None
    own = [logp[t, token].item() for t, token in enumerate(ids[1:])]
    assert about["token_logprobs"][1:] == pytest.approx(own, abs=1e-5)
    assert all(2 <= len(entry) <= 3 for entry in about["top_logprobs"][1:])
    eos = served.model.tokenizer.eos_token_id
    about = ask(served, prompt=[ids[0], eos, ids[1]], max_tokens=0, echo=True, logprobs=0)["choices"][0]["logprobs"]
    assert about["tokens"] == ["w", "<eos>", "a"] and about["text_offset"] == [0, 1, 6]
    both = ask(
        served, prompt="wash", max_tokens=2, echo=True, logprobs=0, temperature=0, return_tokens_as_token_ids=True
    )
    about = both["choices"][0]["logprobs"]
    assert about["tokens"][:4] == [f"token_id:{i}" for i in ids] and len(about["tokens"]) == 6
    assert both["choices"][0]["text"].startswith("wash") and len(both["choices"][0]["text"]) > 4


def test_each_is_given_as_many_as_it_asked_for(served):
    """The prompt's and the new tokens' log-probs of one request, and requests of one batch, may differ in number."""
    asked = {"prompt": "wash", "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    choice = ask(served, echo=True, logprobs=1, prompt_logprobs=4, **asked)["choices"][0]
    assert {len(entry) for entry in choice["prompt_logprobs"][1:]} <= {4, 5}
    assert {len(entry) for entry in choice["logprobs"]["top_logprobs"][1:]} <= {1, 2}
    with serving(served.model, wait=0.3) as slow, ThreadPoolExecutor(2) as pool:
        counts = list(
            pool.map(lambda k: ask(slow, logprobs=k, **asked)["choices"][0]["logprobs"]["top_logprobs"], (0, 3))
        )
    assert [[len(entry) for entry in found] for found in counts] == [[1, 1], [3, 3]]


def test_greedy_is_the_likeliest_and_logprobs_are_of_the_new_tokens(served):
    ids = ids_of(served, "the heart")
    answer = ask(served, prompt=ids, max_tokens=6, temperature=0, logprobs=1, return_token_ids=True, ignore_eos=True)
    choice = answer["choices"][0]
    assert choice["prompt_token_ids"] == ids
    for n, token in enumerate(choice["token_ids"]):
        logp = logp_of(served.model, ids + choice["token_ids"][:n])[-1]
        assert logp.argmax() == token
        assert choice["logprobs"]["token_logprobs"][n] == pytest.approx(logp[token].item(), abs=1e-4)
        assert len(choice["logprobs"]["top_logprobs"][n]) == 1


def test_samples_depend_on_seed_and_choice_alone(served):
    same = {"prompt": "mash", "max_tokens": 8, "temperature": 1.3, "return_token_ids": True, "ignore_eos": True}
    alone = ask(served, seed=5, **same)["choices"][0]["token_ids"]
    group = [c["token_ids"] for c in ask(served, seed=5, n=3, **same)["choices"]]
    crowd = ask(served, seed=5, **same | {"prompt": ["mash", "a far longer prompt than that"]})["choices"]
    assert group[0] == alone == crowd[0]["token_ids"]
    assert len({tuple(g) for g in group}) == 3
    assert ask(served, seed=6, **same)["choices"][0]["token_ids"] != alone
    assert ask(served, seed=-(2**63), **same)["choices"]


def test_samples_have_the_frequencies_of_the_model(served):
    """200 choices of one token against its law: 5 deviations of the likeliest token's count."""
    ids = ids_of(served, "q")
    made = ask(served, prompt=ids, max_tokens=1, n=200, seed=3, temperature=0.7, return_token_ids=True)["choices"]
    p = (logp_of(served.model, ids)[-1] / 0.7).softmax(-1).max().item()
    best = logp_of(served.model, ids)[-1].argmax().item()
    hits = sum(choice["token_ids"] == [best] for choice in made)
    assert abs(hits - 200 * p) < 5 * math.sqrt(200 * p * (1 - p))


def test_truncation_row_by_row():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4, 1)
    out = processed(
        logits, torch.tensor([1.0, 1.0, 1.0, 0.5]), torch.tensor([1.0, 0.7, 0.9, 1.0]), torch.tensor([0, 0, 2, 0])
    ).exp()
    assert_close(out[0], torch.tensor([0.5, 0.3, 0.15, 0.05]))
    assert_close(out[1], torch.tensor([0.625, 0.375, 0.0, 0.0]))
    assert_close(out[2], torch.tensor([0.625, 0.375, 0.0, 0.0]))  # top_k first: of 0.5 and 0.3 the first is 0.625 < 0.9
    assert_close(out[3], torch.tensor([0.25, 0.09, 0.0225, 0.0025]) / 0.365)


def test_raw_and_processed_logprobs(served, tiny_lm):
    ids, asked = (
        ids_of(served, "mash"),
        {"max_tokens": 1, "temperature": 0.5, "logprobs": 0, "seed": 1, "return_token_ids": True},
    )
    logp = logp_of(served.model, ids)[-1]
    choice = ask(served, prompt=ids, **asked)["choices"][0]
    token = choice["token_ids"][0]
    tempered = (logp / 0.5).log_softmax(-1)
    assert choice["logprobs"]["token_logprobs"] == pytest.approx([tempered[token].item()], abs=1e-5)
    greedy = ask(served, prompt=ids, **asked | {"temperature": 0, "top_p": 0.1})["choices"][0]
    assert greedy["logprobs"]["token_logprobs"] == pytest.approx([logp.max().item()], abs=1e-5)
    with serving(served.model) as raw:
        choice = ask(raw, prompt=ids, **asked)["choices"][0]
        assert choice["token_ids"] == [token]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx([logp[token].item()], abs=1e-5)


def test_what_ends_a_text(served):
    asked = {"prompt": "the heart", "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    free = ask(served, ignore_eos=True, **asked)["choices"][0]
    assert len(free["token_ids"]) == 12 and free["finish_reason"] == "length" and free["stop_reason"] is None
    token = free["token_ids"][3]
    first = free["token_ids"].index(token)
    by_id = ask(served, ignore_eos=True, stop_token_ids=[token], **asked)["choices"][0]
    assert by_id["token_ids"] == free["token_ids"][: first + 1]
    assert (by_id["finish_reason"], by_id["stop_reason"], by_id["text"]) == ("stop", token, free["text"][:first])
    word = free["text"][2:4]
    by_word = ask(served, ignore_eos=True, stop=["never", word], **asked)["choices"][0]
    assert by_word["text"] == free["text"][: free["text"].index(word)] and by_word["stop_reason"] == word
    assert len(by_word["token_ids"]) == free["text"].index(word) + 2
    eos = served.model.tokenizer.eos_token_id
    head = served.model.head

    def ends(hidden):
        logits = head(hidden)
        return logits + 1e3 * torch.nn.functional.one_hot(torch.tensor(eos), logits.shape[-1])

    served.model.head = ends
    try:
        own = ask(served, **asked)["choices"][0]
        assert (own["token_ids"], own["text"], own["finish_reason"], own["stop_reason"]) == ([eos], "", "stop", None)
        assert len(ask(served, ignore_eos=True, **asked)["choices"][0]["token_ids"]) == 12
    finally:
        del served.model.head


def test_rows_that_end_early_leave_the_others_alone(served):
    """A batch whose rows end at different places gives what each gives alone."""
    prompts = ["the heart", "q", "a pot still boils", "wash", "low wines"]
    ends = list(range(0, served.model.vocabulary, 6))
    asked = {"temperature": 1.5, "seed": 4, "stop_token_ids": ends, "max_tokens": 20, "return_token_ids": True}
    before = served.engine.batches
    together = ask(served, prompt=prompts, **asked)["choices"]
    assert served.engine.batches == before + 1, "they were one batch, and it did not fail"
    lengths = {len(choice["token_ids"]) for choice in together}
    assert len(lengths) > 2, "choose another seed: the rows are of like length"
    for i, (prompt, choice) in enumerate(zip(prompts, together)):
        alone = ask(served, prompt=prompt, **asked | {"seed": seed_of(4, i)})["choices"][0]
        assert alone["token_ids"] == choice["token_ids"] and alone["text"] == choice["text"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "a", "top_q": 1}, "top_q is not a field of a completion request. Did you mean top_p?"),
        ({"prompt": 3}, "prompt must be a string, a list of strings, a list of token ids or a list of such lists."),
        ({"prompt": [[1, "a"]]}, "prompt must be a string"),
        ({"prompt": []}, "prompt is an empty list."),
        ({"prompt": ""}, "A prompt is empty, so nothing predicts its next token."),
        ({"prompt": [5, 5000]}, "Token id 5000 is out of vocabulary: tiny has 84 tokens."),
        ({"prompt": [-1]}, "Token id -1 is out of vocabulary"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens must be at least 1 without echo."),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens: input should be greater than or equal to 0, got -1."),
        ({"prompt": "a", "max_tokens": 5000}, "A prompt of 1 tokens and 5000 new ones exceed the 2048 positions of tiny."),
        ({"prompt": "a", "temperature": -1}, "temperature: input should be greater than or equal to 0, got -1."),
        ({"prompt": "a", "top_p": 0}, "top_p: input should be greater than 0, got 0."),
        ({"prompt": "a", "seed": 2**63}, "seed: input should be less than"),
        ({"prompt": "a", "logprobs": 41}, "logprobs is 41, and this server gives 40 at most (--max-logprobs)."),
        ({"prompt": "a", "prompt_logprobs": 41}, "prompt_logprobs is 41, and this server gives 40 at most"),
        ({"prompt": "a", "stream": True}, "stream: input should be False, got True."),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty: input should be less than or equal to 0, got 0.5."),
    ],
)  # fmt: skip
def test_refusals_name_the_field(served, body, message):
    error = ask(served, 400, **body)
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] in {"prompt", *body}


def test_other_refusals(served):
    error = ask(served, 404, prompt="a", model="other")
    assert (
        error["message"] == "There is no model other here. This server has tiny." and error["code"] == "model_not_found"
    )
    response = httpx.post(f"{served.url}/completions", content=b"{")
    assert response.status_code == 400 and "not valid JSON" in response.json()["error"]["message"]
    response = httpx.post(f"{served.url}/completions", content=b"[1]")
    assert response.json()["error"]["message"] == "The body must be a JSON object."
    response = httpx.get(f"{served.url}/completion")
    assert response.status_code == 404 and response.json()["error"]["message"] == "Not Found: GET /v1/completion."
    response = httpx.post(f"{served.url}/refresh", json={"folder": "/tmp"})
    assert response.status_code == 403 and "--refresh-from" in response.json()["error"]["message"]
    assert httpx.get(f"{served.url}/models").json()["data"][0]["max_model_len"] == 2048
    assert httpx.get(served.url.removesuffix("/v1") + "/health").json() == {"status": "ok"}


def test_a_key_is_asked_for(served):
    with serving(served.model, key="sesame") as locked:
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "sesame"}):
            response = httpx.post(f"{locked.url}/completions", json={"prompt": "a"}, headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{locked.url}/models").status_code == 401
        assert httpx.get(locked.url.removesuffix("/v1") + "/health").status_code == 200
        right = {"Authorization": "Bearer sesame"}
        assert httpx.post(f"{locked.url}/completions", json={"prompt": "a"}, headers=right).status_code == 200


def test_requests_are_batched_and_a_bad_one_fails_alone(tiny_lm):
    """A NaN in one token's embedding: requests that hold it fail and say where, those beside it in the batch do not."""
    model = CausalLM.from_pretrained(tiny_lm(2))
    z, clean = model.tokenizer("z")["input_ids"][0], model.tokenizer("wash")["input_ids"]
    with serving(model, wait=0.3) as served:
        before = ask(served, prompt=clean, max_tokens=1, temperature=0, prompt_logprobs=2)["choices"][0]
        with torch.no_grad():
            model.network.get_input_embeddings().weight[z] = math.nan
        batches = served.engine.batches
        bodies = [{"prompt": clean, "prompt_logprobs": 2}, {"prompt": [*clean, z, *clean], "prompt_logprobs": 2}] * 4
        bodies[3] = {"prompt": [*clean, z], "logprobs": 0}
        with ThreadPoolExecutor(8) as pool:
            post = lambda body: httpx.post(
                f"{served.url}/completions", json={"max_tokens": 1, "temperature": 0, **body}, timeout=30
            )
            answers = list(pool.map(post, bodies))
        assert served.engine.batches - batches <= 2
        for answer in answers[::2]:
            found = answer.json()["choices"][0]["prompt_logprobs"]
            for here, there in zip(found[1:], before["prompt_logprobs"][1:]):
                assert here.keys() == there.keys()
                assert [v["logprob"] for v in here.values()] == pytest.approx(
                    [v["logprob"] for v in there.values()], abs=1e-5
                )
        places = [a.json()["error"]["message"].partition(".")[0] for a in answers[1::2]]
        said = "The model gives NaN at token {} of the prompt"
        assert places == [
            said.format(1),
            "The model gives NaN at token 1 after the prompt",
            said.format(1),
            said.format(1),
        ]
        assert {a.status_code for a in answers[1::2]} == {500}
        assert {a.json()["error"]["code"] for a in answers[1::2]} == {"not_finite"}


def test_a_nan_is_named_by_its_place(served):
    head = served.model.head

    def broken(hidden):
        logits = head(hidden)
        logits[2, 7] = math.nan
        return logits

    served.model.head = broken
    try:
        message = ask(served, 500, prompt="wash", max_tokens=1, prompt_logprobs=0)["message"]
    finally:
        del served.model.head
    assert message == (
        "The model gives NaN at token 3 of the prompt. Its weights are broken, or too large for this dtype: serve it in float32."
    )


def test_impossible_tokens_travel(served):
    head, ids = served.model.head, ids_of(served, "wash")

    def masked(hidden):
        logits = head(hidden)
        logits[..., ids[1]] = -math.inf
        return logits

    served.model.head = masked
    try:
        entry = ask(served, prompt=ids, max_tokens=1, prompt_logprobs=0)["choices"][0]["prompt_logprobs"][1]
        assert entry[str(ids[1])]["logprob"] == -9999.0
    finally:
        del served.model.head


def test_an_error_of_the_model_is_the_requests_not_the_servers(served):
    head = served.model.head
    served.model.head = lambda hidden: 1 / 0
    try:
        assert ask(served, 500, prompt="a")["message"] == "ZeroDivisionError: division by zero"
    finally:
        del served.model.head
    assert served.model.head == head and ask(served, prompt="a")["choices"]


def test_a_batch_that_fails_is_tried_one_by_one(served):
    head, long = served.model.head, ids_of(served, "far too long for this")

    def narrow(hidden):
        if len(hidden) == len(long) - 1:
            raise MemoryError("no room")
        return head(hidden)

    served.model.head = narrow
    try:
        with ThreadPoolExecutor(2) as pool, served.engine.busy:
            body = {"max_tokens": 1, "prompt_logprobs": 0}
            post = lambda prompt: httpx.post(f"{served.url}/completions", json=body | {"prompt": prompt}, timeout=30)
            waiting = [
                pool.submit(post, prompt) for prompt in ("first", long, "short")
            ]  # the last two at once, or nearly
            time.sleep(0.3)
        answers = [future.result() for future in waiting]
    finally:
        del served.model.head
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    assert answers[1].json()["error"]["message"] == "MemoryError: no room"


def test_too_many_wait(served, monkeypatch):
    monkeypatch.setattr("potstill.serving.engine.WAITING", 2)
    assert ask(served, 503, prompt="a", n=3)["message"].startswith("More than 2 choices are waiting.")


def test_who_hangs_up_leaves_the_queue(served, monkeypatch):
    worked, run = [], served.engine.run
    monkeypatch.setattr(served.engine, "run", lambda jobs: worked.extend(job.asked.prompt for job in jobs) or run(jobs))
    post = lambda prompt: httpx.post(f"{served.url}/completions", json={"prompt": prompt, "n": 3}, timeout=0.1)
    with served.engine.busy:
        for prompt in ("first, in the engine's hands", "second", "second"):
            with pytest.raises(httpx.ReadTimeout):
                post(prompt)
        time.sleep(1.3)
    assert ask(served, prompt="third")["choices"]
    assert "second" not in worked and worked[-1] == "third"


def test_new_weights(tiny_lm, tmp_path):
    first, second = tiny_lm(3), tiny_lm(4)
    asked = {"prompt": "wash", "max_tokens": 5, "temperature": 0}
    with serving(second) as there:
        wanted = ask(there, **asked)["choices"][0]["text"]
    with serving(first, refresh_from=second.parent) as served:
        before = ask(served, **asked)["choices"][0]["text"]
        refresh = lambda folder: httpx.post(f"{served.url}/refresh", json={"folder": str(folder)}, timeout=30)
        other = tiny_lm(5, tokenizer=character_tokenizer("abc"))
        for folder, status, message in (
            ("/etc", 403, "folder must lie in"),
            (second.parent / "none", 400, "There is no model folder"),
            (other, 400, "has another tokenizer than the served"),
            (tiny_lm(5, num_hidden_layers=1), 400, "holds a model of another shape than the served"),
        ):
            response = refresh(folder)
            assert response.status_code == status and message in response.json()["error"]["message"]
        assert ask(served, **asked)["choices"][0]["text"] == before != wanted
        assert refresh(second).status_code == 200
        assert ask(served, **asked)["choices"][0]["text"] == wanted


def test_the_command_and_its_mistakes(tmp_path, monkeypatch):
    options = {
        "host": "127.0.0.1", "port": 0, "name": None, "dtype": "float32", "device": "cpu", "batch": 1, "wait": 0.0,
        "max_logprobs": 1, "mode": "raw_logprobs", "refresh_from": None,
    }  # fmt: skip
    with pytest.raises(RecipeError, match="--dtype float31 is unknown. Did you mean float32?"):
        serve("x", **options | {"dtype": "float31"})
    with pytest.raises(RecipeError, match="--logprobs-mode raw is unknown"):
        serve("x", **options | {"mode": "raw"})
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=rf"127\.0\.0\.1:{port} cannot be listened on .* Choose another with --port"):
            serve("x", **options | {"port": port})


def test_the_command_is_killed_and_another_takes_over(tiny_lm, monkeypatch):
    """`potstill serve` in a process of its own, killed in the middle of a client's work; the client goes on with the next."""
    folder, port = tiny_lm(6), free_port()
    monkeypatch.setattr("potstill.serving.client.WAIT", 0.1)
    command = [
        sys.executable,
        "-m",
        "potstill.cli",
        "serve",
        str(folder),
        "--port",
        str(port),
        "--name",
        "tiny",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == f"tiny at http://127.0.0.1:{port}/v1, without a key.\n"
        asker = Client(f"http://127.0.0.1:{port}/v1", rows=1, concurrency=2, patience=20)
        rows = [[5 + i, 7, 9 + i] for i in range(40)]
        wanted = asker.score(rows, [[1, 2]] * 40, 3)
        found, asked = [], asker.asked
        worker = threading.Thread(target=lambda: found.extend(asker.score(rows, [[1, 2]] * 40, 3)))
        worker.start()
        while not asker.kept:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        told = set(asker.kept)
        assert 0 < len(told) < 40, "the kill came too late to test anything"
        with serving(folder, port=port) as served:
            worker.join()
            again = {json.dumps(post, sort_keys=True) for post in served.posts}
        assert not told & again and len(again) == len(served.posts)
        assert asker.asked > asked + 40, "some were asked twice"
        for one, other in zip(found, wanted, strict=True):
            assert one.ids == other.ids and one.own == pytest.approx(other.own, abs=1e-5)
    finally:
        process.kill()


def test_both_ends_agree_on_infinity():
    assert server.LOWEST == client.LOWEST
