import itertools

import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from potstill.contracts.batch import PromptBatch
from potstill.contracts.errors import DataError
from potstill.models.causal import CausalLM
from potstill.rollouts.local import completions_of, joined, left_padded, sample, sampling_logp

EOS, PAD = 1, 0


def model_of(family: str = "llama", vocabulary: int = 11, seed: int = 0, spread: float = 0.5) -> CausalLM:
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None, "initializer_range": spread}
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | ids
    config = {
        "llama": lambda: LlamaConfig(vocab_size=vocabulary, num_key_value_heads=1, max_position_embeddings=64, **shape),
        "qwen3": lambda: Qwen3Config(
            vocab_size=vocabulary,
            num_key_value_heads=1,
            head_dim=8,
            use_sliding_window=True,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            **shape,
        ),
        "gpt2": lambda: GPT2Config(vocab_size=vocabulary, n_layer=2, n_embd=16, n_head=2, n_positions=64, **ids),
    }[family]()
    torch.manual_seed(seed)
    return CausalLM(AutoModelForCausalLM.from_config(config), tokenizer)


def prompts_of(rows: list[list[int]], ids: list[int] | None = None, width: int = 0) -> PromptBatch:
    width = max(width, *(len(r) for r in rows))
    tokens = torch.tensor([[PAD] * (width - len(r)) + r for r in rows])
    attention = torch.tensor([[False] * (width - len(r)) + [True] * len(r) for r in rows])
    return PromptBatch(torch.tensor(ids or list(range(len(rows)))), tokens, attention)


ROWS = [[2, 3, 4], [5], [6, 7, 8, 9, 10, 2], [3, 3]]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"temperature": 1.4, "top_k": 4}, {"top_p": 0.7}, {"greedy": True, "temperature": 0.5}],
    ids=str,
)
def test_log_probs_are_those_of_a_teacher_forced_pass(family, options):
    model = model_of(family)
    batch = sample(model, prompts_of(ROWS), max_new_tokens=8, seed=3, samples_per_prompt=2, **options)
    law = {k: v for k, v in options.items() if k != "greedy"}
    logp = sampling_logp(model.eval().counted_logits(batch), **law)
    by_hand = logp.gather(1, batch.tokens_counted[:, None])[:, 0]
    assert by_hand.isfinite().all()  # nothing outside the truncated support was drawn
    assert_close(batch.sampled_logp_BT[batch.counted_BT], by_hand, rtol=1e-4, atol=1e-4)
    assert (batch.sampled_logp_BT[~batch.counted_BT] == 0).all()


def test_frequencies_are_the_exact_law():
    """All two-token texts of a five-word vocabulary, with the stop token: chi-square against their probabilities."""
    model, prompts, n, temperature = model_of(vocabulary=5, spread=0.3), prompts_of([[2, 4, 3]]), 4000, 0.8
    batch = sample(model, prompts, max_new_tokens=2, temperature=temperature, samples_per_prompt=n, seed=11)
    drawn = [tuple(c) for c in completions_of(batch)]
    law = {}
    for first, second in itertools.product(range(5), range(5)):
        text = [first] if first == EOS else [first, second]
        with torch.no_grad():
            logits = model.counted_logits(joined(prompts, [text], PAD)) / temperature
        law[tuple(text)] = logits.log_softmax(-1)[range(len(text)), text].sum().exp().item()
    assert sum(law.values()) == pytest.approx(1, abs=1e-5)
    assert set(drawn) <= set(law)
    texts = [text for text in law if law[text] * n >= 5]
    observed, expected = [drawn.count(text) for text in texts], [law[text] * n for text in texts]
    rest = n - sum(observed), n - sum(expected)
    assert stats.chisquare([*observed, rest[0]], [*expected, rest[1]], sum_check=False).pvalue > 1e-3
    assert len(texts) > 10


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_layout_and_padding_change_nothing(family, greedy):
    model = model_of(family)
    options = {"max_new_tokens": 10, "seed": 5, "greedy": greedy}
    together = completions_of(sample(model, prompts_of(ROWS), **options))
    alone = [completions_of(sample(model, prompts_of([row], [i]), **options))[0] for i, row in enumerate(ROWS)]
    wide = completions_of(sample(model, prompts_of(ROWS, width=9), **options))
    backwards = completions_of(sample(model, prompts_of(ROWS[::-1], [3, 2, 1, 0]), **options))[::-1]
    assert together == alone == wide == backwards
    assert len({len(c) for c in together}) > 1 or greedy  # some rows stopped before the others


def test_group_members_are_keyed_by_prompt_and_number():
    model = model_of()
    options = {"max_new_tokens": 6, "seed": 2, "samples_per_prompt": 3}
    batch = sample(model, prompts_of(ROWS[:3], [7, 8, 9]), **options)
    assert batch.ids_B.tolist() == [21, 22, 23, 24, 25, 26, 27, 28, 29]
    assert torch.equal(batch.tokens_BT[::3, :6], batch.tokens_BT[1::3, :6])
    assert len({tuple(c) for c in completions_of(batch)}) > 6  # members differ
    alone = sample(model, prompts_of(ROWS[1:2], [8]), **options)
    assert completions_of(alone) == completions_of(batch)[3:6]
    other = sample(model, prompts_of(ROWS[:3], [7, 8, 9]), **(options | {"seed": 3}))
    assert completions_of(other) != completions_of(batch)


def test_stop_tokens_are_counted_and_end_the_row():
    model = model_of()
    batch = sample(model, prompts_of(ROWS), max_new_tokens=12, seed=1, samples_per_prompt=8, stop_ids=[EOS, 4])
    rows = completions_of(batch)
    for row, finished in zip(rows, batch.extra["finished"], strict=True):
        assert not {EOS, 4} & set(row[:-1])
        assert finished == (row[-1] in (EOS, 4))
        assert finished or len(row) == 12
    assert 0 < sum(batch.extra["finished"]) < len(rows) or len({len(r) for r in rows}) > 2
    assert torch.equal(batch.attention_BT[:, 6:], batch.counted_BT[:, 6:])
    assert (batch.tokens_BT[~batch.attention_BT] == PAD).all()
    assert batch.counted_BT[:, :6].sum() == 0
    endless = sample(model, prompts_of(ROWS), max_new_tokens=12, seed=1, stop_ids=())
    assert (endless.counted_BT.sum(1) == 12).all()


def test_finished_rows_leave_the_forward_pass():
    model, sizes = model_of(), []
    model.network.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    batch = sample(model, prompts_of(ROWS), max_new_tokens=12, seed=1, samples_per_prompt=8, stop_ids=[EOS, 4])
    lengths = batch.counted_BT.sum(1)
    assert sizes[0] == 4  # each prompt is read once for its group of 8
    assert sizes[1:] == [int((lengths > t).sum()) for t in range(1, int(lengths.max()))]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_greedy_is_what_transformers_generates(family):
    model, prompts = model_of(family).eval(), prompts_of(ROWS)
    theirs = model.network.generate(
        input_ids=prompts.tokens_BT, attention_mask=prompts.attention_BT.long(), do_sample=False, max_new_tokens=10
    )[:, 6:]
    ours = completions_of(sample(model, prompts, max_new_tokens=10, greedy=True))
    for row, theirs_row in zip(ours, theirs.tolist(), strict=True):
        assert row == theirs_row[: len(row)]
        assert all(token == PAD for token in theirs_row[len(row) :])


def test_truncation_by_hand():
    p = torch.tensor([0.1, 0.4, 0.3, 0.2])
    kept = lambda **options: sampling_logp(p.log(), **options).exp()
    assert_close(kept(top_k=2), torch.tensor([0.0, 4 / 7, 3 / 7, 0.0]))
    assert_close(kept(top_p=0.6), torch.tensor([0.0, 4 / 7, 3 / 7, 0.0]))  # 0.4 is not enough, 0.7 is
    assert_close(kept(top_p=0.3), torch.tensor([0.0, 1.0, 0.0, 0.0]))  # never empty
    assert_close(kept(top_k=3, top_p=0.75), torch.tensor([0.0, 4 / 7, 3 / 7, 0.0]))  # of the renormalised three
    assert_close(kept(temperature=0.5), p.square() / p.square().sum())
    assert_close(kept(top_k=9), p)


def test_modes_and_gradients_are_left_alone():
    model = model_of().train()
    batch = sample(model, prompts_of(ROWS), max_new_tokens=2)
    assert model.network.training
    assert not batch.sampled_logp_BT.requires_grad


def test_dropout_is_off_while_sampling():
    model = model_of("gpt2").train()  # dropout 0.1 by default
    batch = sample(model, prompts_of(ROWS), max_new_tokens=6, seed=4)
    logp = model.eval().counted_logits(batch).log_softmax(-1).gather(1, batch.tokens_counted[:, None])[:, 0]
    assert_close(batch.sampled_logp_BT[batch.counted_BT], logp, rtol=1e-4, atol=1e-4)


def test_joined_and_left_padded_by_hand():
    right = PromptBatch(
        torch.tensor([4, 5]), torch.tensor([[2, 3, 0], [4, 5, 6]]), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    )
    left = left_padded(right)
    assert left.tokens_BT.tolist() == [[0, 2, 3], [4, 5, 6]]
    batch = joined(left, [[7, 8], [9]], pad_id=0, logps=[[-1.0, -2.0], [-3.0]])
    assert batch.tokens_BT.tolist() == [[0, 2, 3, 7, 8], [4, 5, 6, 9, 0]]
    assert batch.attention_BT.long().tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.counted_BT.long().tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 0]]
    assert batch.sampled_logp_BT.tolist() == [[0, 0, 0, -1, -2], [0, 0, 0, -3, 0]]
    assert joined(left, [[], []], pad_id=0).tokens_BT.tolist() == left.tokens_BT.tolist()
    model = model_of()
    assert completions_of(sample(model, right, max_new_tokens=4)) == completions_of(
        sample(model, left, max_new_tokens=4)
    )


def test_prompt_extras_follow_their_prompts():
    prompts = prompts_of(ROWS[:2])
    prompts.extra = {"answer": ["a", "b"], "task": "sum"}
    batch = sample(model_of(), prompts, max_new_tokens=1, samples_per_prompt=2)
    assert batch.extra["answer"] == ["a", "a", "b", "b"]
    assert batch.extra["task"] == "sum"


def test_refuses():
    model, prompts = model_of(), prompts_of(ROWS)
    with pytest.raises(DataError, match="temperature > 0"):
        sample(model, prompts, max_new_tokens=2, temperature=0.0)
    with pytest.raises(DataError, match="must be positive"):
        sample(model, prompts, max_new_tokens=0)
    with pytest.raises(DataError, match="6 tokens and 60 new ones exceed the 64 positions"):
        sample(model, prompts, max_new_tokens=60)
    empty = PromptBatch(torch.tensor([0]), torch.tensor([[2]]), torch.tensor([[False]]))
    with pytest.raises(DataError, match="prompt is empty"):
        sample(model, empty, max_new_tokens=2)
