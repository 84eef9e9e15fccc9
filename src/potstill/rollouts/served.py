"""Completions sampled by a server that holds the student: what `rollouts.local.sample` gives, written elsewhere.

B prompts, G samples a prompt, T tokens. Each row is a request with a seed of its own, made of the call's seed and the
row's id, so layout, order and retries change nothing; `potstill serve` then draws the very tokens of `rollouts.local`.

The log-probs are those of the distribution that was sampled from. A server counts them before temperature and truncation
("raw_logprobs", vLLM's default) or after ("processed_logprobs"). Which of them is found out by asking, since no server
says so: at temperature t the gap between the two likeliest tokens is 1 / t of what it is at 1, or the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from potstill.contracts import keyed
from potstill.contracts.batch import PromptBatch, TokenBatch
from potstill.contracts.errors import DataError, ModelError, RecipeError
from potstill.contracts.spec import Spec
from potstill.models.spec import ServedSpec
from potstill.models.tokenizers import pad_id
from potstill.rollouts.local import joined, left_padded, repeated
from potstill.serving.client import Client


class ServerSpec(Spec):
    """`rollouts.server` of a recipe: who samples in the student's place, and from where it takes the student's weights.

    url: of a `potstill serve --refresh-from` that holds a model of the student's shape and tokenizer. folder: below the
    one it takes weights from, a path that server and student both know; the student is saved there again and again.
    """

    url: str
    folder: str
    served: ServedSpec = ServedSpec()


class ServedPolicy:
    """A student behind an address.

    tokenizer: the student's. adapter: the name under which vLLM holds the student's LoRA weights, which `refresh` then
    loads; None where the server takes whole folders (`potstill serve --refresh-from`).
    """

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        served: ServedSpec = ServedSpec(),
        *,
        adapter: str | None = None,
    ) -> None:
        self.tokenizer, self.adapter = tokenizer, adapter
        self.client = Client(url, **served.model_dump(exclude={"k"}))
        self.name = f"{self.client.model} at {self.client.url}"
        self._processed: bool | None = None

    @property
    def pad_id(self) -> int:
        return pad_id(self.tokenizer)

    def sample(
        self,
        prompts: PromptBatch,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        samples_per_prompt: int = 1,
        stop_ids: Sequence[int] | None = None,
    ) -> TokenBatch:
        """Continue every prompt `samples_per_prompt` times until a stop token (kept, and counted) or `max_new_tokens`.

        `stop_ids` None: those of the server's model. See `rollouts.local.sample` for what comes back.
        """
        if max_new_tokens < 1 or samples_per_prompt < 1:
            raise DataError(
                f"max_new_tokens and samples_per_prompt must be positive: {max_new_tokens}, {samples_per_prompt}."
            )
        if temperature <= 0 or not 0 < top_p <= 1 or top_k < 0:
            raise DataError(
                f"Sampling needs temperature > 0, 0 < top_p <= 1 and top_k >= 0, got {temperature}, {top_p} and {top_k}."
            )
        rows = repeated(left_padded(prompts), samples_per_prompt)
        tokens = [row[attended].tolist() for row, attended in zip(rows.tokens_BT, rows.attention_BT)]
        longest = max(map(len, tokens), default=0)
        if self.client.room is not None and longest + max_new_tokens > self.client.room:
            raise DataError(
                f"A prompt of {longest} tokens and {max_new_tokens} new ones exceed the {self.client.room} that {self.name} "
                "reads. Lower max_new_tokens or shorten the prompts."
            )
        if (temperature, top_p, top_k) != (1.0, 1.0, 0) and tokens and not self.counts_processed(tokens[0]):
            raise RecipeError(
                f"{self.name} counts log-probs before temperature, top_p and top_k, so at {temperature}, {top_p} and {top_k} "
                "they are not those of its samples. Start it with --logprobs-mode processed_logprobs, or sample at 1, 1 and 0."
            )
        stops = {} if stop_ids is None else {"stop_token_ids": list(stop_ids), "ignore_eos": True}
        made = self.client.sample(
            tokens,
            keyed.bits(seed, rows.ids_B).tolist(),
            max_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k or -1,
            **stops,
        )
        if (highest := max((max(c.tokens) for c in made), default=0)) >= len(self.tokenizer):
            raise ModelError(
                f"{self.name} wrote token {highest}, and the student has {len(self.tokenizer)} tokens. Serve the student."
            )
        return joined(
            rows,
            [c.tokens for c in made],
            self.pad_id,
            logps=[c.logps for c in made],
            extra=rows.extra | {"finished": [c.finished for c in made]},
        )

    def counts_processed(self, prompt: Sequence[int]) -> bool:
        """Whether the server's log-probs are those after temperature, by the gap of the two likeliest tokens."""
        if self._processed is None:
            heat = 2.0
            plain, hot = (self.client.top(prompt, 2, t) for t in (1.0, heat))
            first, second = sorted(plain, key=lambda name: -plain[name])[:2]
            if first not in hot or second not in hot:
                raise ModelError(
                    f"{self.name} changes its two likeliest tokens with the temperature: it cannot be a policy."
                )
            gap, hot_gap = plain[first] - plain[second], hot[first] - hot[second]
            if gap < 1e-3:  # a tie says nothing; another prompt will
                return False
            self._processed = abs(hot_gap * heat - gap) < abs(hot_gap - gap)
        return self._processed

    def refresh(self, folder: Path) -> None:
        """Have the server take the student's weights from a folder that it can read."""
        if self.adapter is None:
            self.client.post("refresh", {"folder": str(folder)})
        else:
            self.client.post(
                "load_lora_adapter", {"lora_name": self.adapter, "lora_path": str(folder), "load_inplace": True}
            )
            self.client.model = self.adapter
        self.client.kept.clear()


class ServedStudent:
    """A student that lives here and is sampled by a server, which is given its weights before it samples.

    Once a step is enough, and whenever the weights have changed since, whatever the step.
    """

    def __init__(self, student: Any, spec: ServerSpec) -> None:
        self.student, self.folder = student, Path(spec.folder)
        self.policy = ServedPolicy(spec.url, student.tokenizer, spec.served)
        self._given: tuple[int, ...] | None = None

    def sample(self, prompts: PromptBatch, *, step: int, **options: Any) -> TokenBatch:
        """What `rollouts.local.sample` gives of the student as it is now; `options` are those of `ServedPolicy.sample`."""
        now = (step, *(parameter._version for parameter in self.student.parameters()))
        if now != self._given:
            many = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
            if many:
                torch.distributed.barrier()  # nobody samples from the old weights any more
            if not many or torch.distributed.get_rank() == 0:
                self.student.save(self.folder)
                self.policy.refresh(self.folder)
            if many:
                torch.distributed.barrier()
            self._given = now
        return self.policy.sample(prompts, stop_ids=self.student.stop_ids, **options)
