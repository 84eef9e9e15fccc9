"""Environments: what answers an agent's actions. Text in, text out; an episode is reset, step, step, ... until done.

Everything that happens follows from the row and the actions so far: an environment that needs chance draws it by a key of
these, so that a replay meets the same observations again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Turn:
    """What one action led to. `error`: the action could not be carried out as written."""

    observation: str
    done: bool = False
    reward: float = 0.0
    error: bool = False


class Env:
    """One episode of one task; `reset` makes it ready for another.

    `end` closes an action where the dialogue is plain text (with a chat template the template's end token does).
    """

    end: str = "\n"

    def reset(self, row: Mapping[str, Any]) -> str:
        """The first observation, which is the row's prompt."""
        raise NotImplementedError

    def step(self, action: str) -> Turn:
        """The answer to an action, whatever it says; never an exception."""
        raise NotImplementedError

    def replay(self, actions: Sequence[str]) -> list[Turn]:
        """The answers to actions taken one after the other; it ends early where the episode does."""
        turns: list[Turn] = []
        for action in actions:
            turns.append(self.step(action))
            if turns[-1].done:
                break
        return turns
