"""Errors a person can act on: each says what is wrong, where, what was expected and the way out, in one sentence or two.

The command line prints the message alone. Everything else that is raised is a bug and keeps its traceback.
"""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class PotstillError(Exception):
    """Base of every error that the user, not the library, can mend."""


class RecipeError(PotstillError, ValueError):
    """What the user wrote is wrong: the message names the key, the value, and what to write instead."""


class DataError(PotstillError, ValueError):
    """Data is missing, empty, broken or of another kind than the method needs."""


class ModelError(PotstillError, ValueError):
    """A model cannot be loaded or does not fit its role."""


class SignalError(PotstillError, TypeError):
    """A teacher does not give the signal that an objective needs."""


class AssetError(PotstillError, OSError):
    """A data set or a weight file was found nowhere; the message lists where it was looked for."""


class RunError(PotstillError, RuntimeError):
    """A run cannot start or go on: an existing folder, a full disk, a checkpoint of another recipe."""


class NonFiniteError(RunError):
    """A loss or a gradient became NaN or infinite; the message names player, term and step."""


class MissingExtra(PotstillError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module, or say which extra installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        package = module.partition(".")[0]
        raise MissingExtra(f"{package} is not installed. Install it with: pip install 'potstill[{extra}]'.") from cause


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the nearest known word, else ' Known: a, b, c.'; empty when nothing is known."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]}?"
    return f" Known: {', '.join(known)}." if known else ""
