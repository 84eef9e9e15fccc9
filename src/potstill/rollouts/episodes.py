"""Episodes: a policy and its environments take turns, many at once. One TokenBatch row an episode, its whole conversation.

B prompts, G samples a prompt, T tokens, K turns. A turn is an action, sampled up to the token that closes it, and the
observation that it leads to. Tokens of turn s of sample i are drawn by noise keyed (seed, s, i, place in the action), so
batch layout and padding change nothing. Each turn reads the conversations again from their start and caches within the
turn (`rollouts.local.sample`): one forward pass a turn more than a cache kept throughout, but right for every
architecture, sliding windows included, and for rows that part in length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from potstill.contracts import keyed
from potstill.contracts.batch import PromptBatch, TokenBatch
from potstill.contracts.errors import DataError, ModelError, RecipeError
from potstill.models.causal import CausalLM
from potstill.rollouts.environments import Env, Turn
from potstill.rollouts.local import completions_of, joined, left_padded, repeated, sample

ACTION = "<<the action>>"  # stands for an action while a chat template is asked what follows one


class Dialogue:
    """How turns become tokens, and tokens turns.

    Plain text: an action ends with `end`. Where the tokenizer has a chat template, an action is an assistant's message, an
    observation a user's, and the template says what stands between them.
    """

    def __init__(self, tokenizer: Any, end: str = "\n", stop_ids: Sequence[int] = ()) -> None:
        self.tokenizer, self.end, self.chat = tokenizer, end, bool(tokenizer.chat_template)
        closing = () if self.chat else _tokens_with(tokenizer, end)
        if not self.chat and not closing:
            raise DataError(
                f"No token of the tokenizer holds {end!r}, which ends an action here: add it to the alphabet, or use a "
                "tokenizer with a chat template."
            )
        self.stop_ids = tuple(sorted({*stop_ids, *closing}))

    def action(self, text: str, last: bool = False) -> list[int]:
        """An action as a policy would have written it, closed: in a chat, and where it is the `last`, by the end token."""
        stop = self.tokenizer.eos_token_id
        if stop is None or not (self.chat or last):
            return self._ids(text if self.chat else text + self.end)
        return [*self._ids(text), stop]

    def said(self, tokens: Sequence[int]) -> str:
        """The action that these tokens write, without what closes it."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text if self.chat else text.partition(self.end)[0]

    def between(self, observation: str, closed: bool = True) -> list[int]:
        """What is read between two actions. An action that was cut before its end (not `closed`) is closed first."""
        if not self.chat:
            return self._ids(observation if closed else self.end + observation)
        turns = [("user", "-"), ("assistant", ACTION), ("user", observation)]
        shown = self.tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in turns], tokenize=False, add_generation_prompt=True
        )
        _, found, rest = shown.partition(ACTION)
        if not found:
            raise ModelError("The chat template hides earlier turns of the assistant, so it cannot show an episode.")
        return self._ids(rest.removeprefix(self.tokenizer.eos_token or "") if closed else rest)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@lru_cache(maxsize=8)
def _tokens_with(tokenizer: Any, text: str) -> tuple[int, ...]:
    words = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return tuple(i for i, word in enumerate(words) if text in word)


@dataclass
class _Episode:
    env: Env
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)  # behind the prompt
    logp: list[float] = field(default_factory=list)  # of each of these, 0 where it was not sampled
    segment: list[int] = field(default_factory=list)  # turn in which it was sampled, else -1
    turns: list[dict[str, Any]] = field(default_factory=list)
    reward: float = 0.0
    error: int = -1
    ending: str = ""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def holds(self, tokens: Sequence[int], logp: Sequence[float] | None = None) -> None:
        """Tokens join the conversation; without log-probabilities, the policy did not write them."""
        self.tokens += tokens
        self.logp += [0.0] * len(tokens) if logp is None else logp
        self.segment += [-1 if logp is None else len(self.turns)] * len(tokens)

    def took(self, action: str, turn: Turn | None, replayed: bool = False) -> None:
        if turn is not None and turn.error and self.error < 0 and not replayed:
            self.error = len(self.turns)
        self.reward += turn.reward if turn else 0.0
        self.turns.append({"action": action, "observation": turn and turn.observation, "replayed": replayed})


@torch.no_grad()
def episodes(
    model: CausalLM,
    make: Callable[[], Env],
    prompts: PromptBatch,
    *,
    max_turns: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    greedy: bool = False,
    seed: int = 0,
    samples_per_prompt: int = 1,
    prefixes: Sequence[Sequence[str]] | None = None,
    length: int | None = None,
) -> TokenBatch:
    """Play an episode of at most `max_turns` actions, of `max_new_tokens` tokens each, from every prompt.

    prefixes: of each prompt, actions of another policy that are replayed before the model acts; they count as turns, but
    their tokens never count. length: tokens of a conversation at most, beside the model's own limit.

    Returns [B * G] rows, group members side by side: prompts padded on the left, what follows on the right. Counted are
    the tokens that the model wrote, `sampled_logp_BT` their log-probs as in `sample`. In `extra`, beside the prompts' own:
        segment_BT: the turn, from 0, in which a counted token was written; -1 elsewhere
        reward: [B], the episode's sum · first_error: [B] int64, the model's first turn with an error; -1 without
        turns: of each row the turns as {action, observation, replayed}
        ending: of each row done (by itself), max_turns, context (it found no more room), or replay (it was over before
            the model could act: the row then holds its prompt and counts nothing) · finished: whether it was done
    """
    if max_turns < 1 or samples_per_prompt < 1 or max_new_tokens < 1:
        raise DataError(
            "Episodes need max_turns, max_new_tokens and samples_per_prompt of at least 1, got "
            f"{max_turns}, {max_new_tokens} and {samples_per_prompt}."
        )
    if len(prompts.extra.get("rows", ())) != len(prompts):
        raise DataError("Episodes need to know the row of each prompt (`rows` in extra), which resets its environment.")
    rows = repeated(left_padded(prompts.to(model.device)), samples_per_prompt)
    played = [_Episode(make(), tokens[here].tolist()) for tokens, here in zip(rows.tokens_BT, rows.attention_BT)]
    dialogue = Dialogue(model.tokenizer, played[0].env.end, model.stop_ids)
    limits = (length, getattr(model.network.config, "max_position_embeddings", None))
    room = min((limit for limit in limits if limit), default=2**62)
    if (longest := max(map(len, played))) >= room:
        raise DataError(f"A prompt of {longest} tokens leaves no room in a context of {room}. Shorten the prompts.")
    for b, (episode, row) in enumerate(zip(played, rows.extra["rows"])):
        episode.env.reset(row)
        if prefixes is not None:
            _replay(episode, prefixes[b // samples_per_prompt], dialogue, max_turns, room)

    ids_B = rows.ids_B.tolist()
    for turn in range(max_turns):
        budgets = {b: min(max_new_tokens, room - len(e)) for b, e in enumerate(played) if not e.ending}
        for budget in sorted(set(budgets.values())):
            going = [b for b in budgets if budgets[b] == budget]
            texts = [torch.tensor(played[b].prompt + played[b].tokens) for b in going]
            written = sample(
                model,
                PromptBatch(
                    torch.tensor([ids_B[b] for b in going]),
                    pad_sequence(texts, batch_first=True, padding_value=model.pad_id),
                    pad_sequence([torch.ones_like(t, dtype=torch.bool) for t in texts], batch_first=True),
                ),
                max_new_tokens=budget,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                greedy=greedy,
                seed=keyed.key(seed, "turn", turn),
                stop_ids=dialogue.stop_ids,
            )
            assert written.sampled_logp_BT is not None
            logps = [logp[counted].tolist() for logp, counted in zip(written.sampled_logp_BT, written.counted_BT)]
            for b, tokens, logp, closed in zip(going, completions_of(written), logps, written.extra["finished"]):
                episode, action = played[b], dialogue.said(tokens)
                episode.holds(tokens, logp)
                if not closed and budget < max_new_tokens:
                    episode.took(action, None)
                    episode.ending = "context"
                    continue
                answer = episode.env.step(action)
                episode.took(action, answer)
                _read(episode, answer, dialogue, closed, max_turns, room)

    prompt = rows.tokens_BT.shape[1]
    batch = joined(rows, [e.tokens for e in played], model.pad_id, logps=[e.logp for e in played])
    segment_BT = torch.full_like(batch.tokens_BT, -1)
    for b, episode in enumerate(played):
        segment_BT[b, prompt : prompt + len(episode.segment)] = torch.tensor(episode.segment, dtype=torch.int64)
    numbers = {
        "reward": torch.tensor([e.reward for e in played], device=model.device),
        "first_error": torch.tensor([e.error for e in played], device=model.device),
        "segment_BT": segment_BT,
    }
    words = {"turns": [e.turns for e in played], "ending": [e.ending for e in played]}
    finished = {"finished": [e.ending == "done" for e in played]}
    return replace(batch, counted_BT=segment_BT >= 0, extra=rows.extra | numbers | words | finished)


def _read(episode: _Episode, answer: Turn, dialogue: Dialogue, closed: bool, max_turns: int, room: int) -> None:
    """End the episode, or let it go on with what the environment answered."""
    if answer.done or len(episode.turns) >= max_turns:
        episode.ending = "done" if answer.done else "max_turns"
        return
    tokens = dialogue.between(answer.observation, closed)
    if len(episode) + len(tokens) >= room:
        episode.ending = "context"
    else:
        episode.holds(tokens)


def _replay(episode: _Episode, actions: Sequence[str], dialogue: Dialogue, max_turns: int, room: int) -> None:
    answers = episode.env.replay(actions)
    for action, answer in zip(actions, answers):
        episode.took(action, answer, replayed=True)
        episode.holds(dialogue.action(action))
        _read(episode, answer, dialogue, True, max_turns, room)
    if len(answers) < len(actions) or (answers and answers[-1].done):
        episode.ending = "replay"
    if episode.ending:  # nothing is left for the policy to do
        episode.tokens, episode.logp, episode.segment = [], [], []


def by_turn(values_BT: Tensor, segment_BT: Tensor) -> Tensor:
    """Sums of a per-token quantity over each turn, [B, T] -> [B, K]; 0 where an episode has no such turn."""
    sums = values_BT.new_zeros(len(values_BT), int(segment_BT.max()) + 2)
    return sums.scatter_add(1, segment_BT + 1, values_BT)[:, 1:]  # what no turn owns stands in front, and goes


@dataclass(frozen=True)
class Curriculum:
    """How deep into its episodes a policy is taken at step n: k(n) = k_start + floor(n / eta), up to a cap.

    none: always to the end. f2b (forward to backward): an episode is cut after k turns. b2f (backward to forward): of a
    known trajectory of L actions the first L - k are replayed, and the policy goes on from there; at k = L from the start.
    indices: where TCOD's equations and listings differ by one. "code": as above, which is its Eq. 3, Algorithm 2 and
    released code. "paper": Algorithm 1 (line 9) runs turns 0..k, one more; Eq. 5 begins at turn L - k + 1, replaying one
    more, yet never all.
    """

    kind: Literal["none", "f2b", "b2f"] = "f2b"
    k_start: int = 1
    eta: int = 2
    indices: Literal["code", "paper"] = "code"

    def __post_init__(self) -> None:
        if self.k_start < 1 or self.eta < 1:
            raise RecipeError(f"A curriculum needs k_start and eta of at least 1, got {self.k_start} and {self.eta}.")

    def depth(self, step: int, cap: int) -> int:
        return min(self.k_start + step // self.eta, cap)

    def max_turns(self, step: int, cap: int) -> int:
        """Turns of an episode at this step, of `cap` at most."""
        return min(self.depth(step, cap) + (self.indices == "paper"), cap) if self.kind == "f2b" else cap

    def replayed(self, step: int, length: int) -> int:
        """How many of a trajectory's `length` actions are replayed at this step."""
        if self.kind != "b2f":
            return 0
        left = length - self.depth(step, length)
        return min(left + 1, length - 1) if self.indices == "paper" else left
