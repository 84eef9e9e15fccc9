"""Tasks that are played in turns: a calculator, water jugs, and calls of real functions. Kind "prompts", with environments.

Rows have prompt, actions (one way that succeeds) and completion (these actions with what the environment answers, so that
a model of the text can learn the dialogue), beside what the environment needs. All answers follow from row and actions.
"""

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from potstill.assets import Package, locate
from potstill.contracts import keyed
from potstill.contracts.batch import PromptBatch
from potstill.contracts.errors import DataError, did_you_mean, require
from potstill.contracts.signals import TokenLogp
from potstill.rollouts.environments import Env, Turn
from potstill.rollouts.episodes import Dialogue, by_turn, episodes
from potstill.tasks.base import Source
from potstill.tasks.reasoning import score as gym_score
from potstill.tasks.tokens import TokenRows, pad_id, prompt_tokens

MODELS: dict[str, dict[str, Any]] = {
    "teacher": {"name": "llama-small", "options": {"layers": 2, "width": 96}},
    "student": {"name": "llama-small", "options": {"layers": 2, "width": 48}},
}
TRAINING = {"steps": 1500, "batch": 32, "lr": 3e-3, "schedule": "cosine", "warmup": 30, "clip": 1.0}


@dataclass
class AgentSource(Source):
    """A source whose prompts open episodes of an environment."""

    environment: Callable[[], Env] | None = None


def environment_of(source: Source, asker: str) -> Callable[[], Env]:
    """What makes the environments of a source; refused where it has none."""
    if not isinstance(source, AgentSource) or source.environment is None:
        raise DataError(
            f"{asker} plays in turns, and {source.name} has no environment. Take calculator, jugs or functions."
        )
    return source.environment


# -------------------------------------------------------------------- a calculator


class Calculator(Env):
    """Answers "CALL 12+7" with "= 19"; "ANSWER 24" ends the episode, with reward 1 where it is right.

    malformed: what anything else is answered with, "= ERR" or ("digits") a number that means nothing.
    """

    end = ";"

    def __init__(self, malformed: Literal["error", "digits"] = "error") -> None:
        self.malformed = malformed

    def reset(self, row: Mapping[str, Any]) -> str:
        self.row, self.said = row, list[str]()
        return str(row["prompt"])

    def step(self, action: str) -> Turn:
        self.said = [*self.said, action]
        if found := re.fullmatch(r"CALL (-?\d{1,9})([-+*])(-?\d{1,9})", action.strip()):
            a, b = int(found[1]), int(found[3])
            return Turn(f"= {({'+': a + b, '-': a - b, '*': a * b})[found[2]]};")
        if found := re.fullmatch(r"ANSWER (-?\d{1,9})", action.strip()):
            return Turn("", done=True, reward=float(found[1] == self.row["answer"]))
        noise = keyed.key("malformed", self.row["prompt"], *self.said) % 90 + 10
        return Turn("= ERR;" if self.malformed == "error" else f"= {noise};", error=True)


def calculator(
    size: int = 4000,
    test_size: int = 200,
    terms: int = 4,
    largest: int = 20,
    malformed: Literal["error", "digits"] = "error",
    instruction: str = "",
    seed: int = 0,
) -> AgentSource:
    """Sums whose steps a tool works out: "12+7+5=" -> "CALL 12+7;", "= 19;", "CALL 19+5;", "= 24;", "ANSWER 24".

    `terms` numbers up to `largest` take as many turns. `instruction` stands before the sum, for models that follow one.
    """
    if size < 1 or test_size < 1 or terms < 2 or largest < 2:
        raise DataError(
            "data of calculator needs size and test_size of at least 1, terms and largest of at least 2, got "
            f"{size}, {test_size}, {terms}, {largest}."
        )
    draws = keyed.uniform(
        keyed.key("calculator", seed), torch.arange(4 * (size + test_size))[:, None], torch.arange(terms)[None]
    )
    sums = list(dict.fromkeys(map(tuple, (1 + draws * largest).long().clamp(max=largest).tolist())))
    if len(sums) < size + test_size:
        raise DataError(f"calculator has only {len(sums)} different sums here. Ask for fewer rows, or larger numbers.")
    rows = []
    for numbers in sums[: size + test_size]:
        actions, total = [], numbers[0]
        for n in numbers[1:]:
            actions.append(f"CALL {total}+{n}")
            total += n
        row = {"prompt": f"{instruction}{'+'.join(map(str, numbers))}=", "answer": str(total)}
        rows.append({**row, "actions": [*actions, f"ANSWER {total}"]})
    return _source("calculator", rows, test_size, partial(Calculator, malformed))


# -------------------------------------------------------------------- water jugs


class Jugs(Env):
    """Moves ("fill A", "empty B", "pour A->B") are answered with the jugs' contents, until one holds the target.

    The reward is reasoning-gym's own score of the moves. A move that is none changes nothing.
    """

    end = ";"

    def reset(self, row: Mapping[str, Any]) -> str:
        self.row, self.moves = row, list[str]()
        puzzle = row["entry"]["metadata"]["puzzle"]
        self.capacity, self.target = puzzle["jug_capacities"], puzzle["target"]
        self.holds = [0] * len(self.capacity)
        return str(row["prompt"])

    def step(self, action: str) -> Turn:
        jug = f"[A-{chr(ord('A') + len(self.holds) - 1)}]"
        found = re.fullmatch(rf"(fill|empty) ({jug})|pour ({jug})->(?!\3)({jug})", action.strip())
        if not found:
            return Turn("cannot;", error=True)
        self.moves.append(found[0])
        if found[1]:
            place = ord(found[2]) - ord("A")
            self.holds[place] = self.capacity[place] if found[1] == "fill" else 0
        else:
            a, b = ord(found[3]) - ord("A"), ord(found[4]) - ord("A")
            poured = min(self.holds[a], self.capacity[b] - self.holds[b])
            self.holds[a], self.holds[b] = self.holds[a] - poured, self.holds[b] + poured
        done = self.target in self.holds
        reward = gym_score(self.row, json.dumps(self.moves)) if done else 0.0
        return Turn(f"{' '.join(map(str, self.holds))};", done, reward)


def jugs(
    size: int = 200,
    test_size: int = 50,
    difficulty: int = 6,
    words: bool = False,
    instruction: str = "Reply with one move at a time.",
    seed: int = 0,
) -> AgentSource:
    """Puzzles of reasoning-gym's `jugs`, a move a turn: "A8 B5 C3 to 4:" -> "fill A;", "8 0 0;", ...

    `difficulty` is the least number of moves; there are a few hundred different puzzles of each. `words` asks in the
    task's own words, with `instruction` behind.
    """
    if size < 1 or test_size < 1:
        raise DataError(f"data.size and data.test_size must be positive, got {size} and {test_size}.")
    gym = require("reasoning_gym", "reasoning")
    drawn = 8 * (size + test_size)
    try:
        made = gym.create_dataset("jugs", size=drawn, seed=keyed.key(seed, "jugs") & 0x7FFFFFFF, difficulty=difficulty)
    except AssertionError as cause:
        raise DataError(f"reasoning_gym jugs refuses difficulty {difficulty}: {cause}") from cause
    rows: dict[str, dict[str, Any]] = {}
    for entry in (made[i] for i in range(drawn)):
        puzzle = entry["metadata"]["puzzle"]
        capacities = " ".join(f"{chr(ord('A') + i)}{c}" for i, c in enumerate(puzzle["jug_capacities"]))
        short, asked = f"{capacities} to {puzzle['target']}:", entry["question"].rpartition("Reply as")[0] + instruction
        row = {"prompt": asked if words else short, "task": "jugs", "entry": entry, "answer": entry["answer"]}
        rows.setdefault(short, {**row, "actions": json.loads(entry["answer"])})
        if len(rows) == size + test_size:
            return _source("jugs", list(rows.values()), test_size, Jugs)
    raise DataError(
        f"reasoning_gym jugs has given {len(rows)} different puzzles of difficulty {difficulty}, and {size + test_size} are "
        "asked. Ask for fewer, or for another difficulty."
    )


# -------------------------------------------------------------------- function calls


FOLDER = "bfcl_eval/data/"
HASHES = {  # of the questions and of their gold calls
    "simple_python": (
        "82dd63ba502eb2520c6b5d1d9a5c4b590e03ff261565175561f6228a367d1991",
        "90cd5bc653690ee8e459b5b3f3fc9458606f7f3fcbf795bb51b7dc581f8c86dc",
    ),
    "multiple": (
        "aef168155ebd74b7ac2401198b201343bc7d16d7a3d7e0d4e6d8ee82c6969b2a",
        "244e00ce9395df948bcafc7bee64e8f9c87ef70887587d83cae45b13699f3047",
    ),
    "parallel": (
        "19f51a82eff42e5d62541aa500115a056eb78f437c2ba1f10415fd7c8e5dda84",
        "8a6aa19c1adddc6a5a2f7e40f9dbf30cc7e95815e7b830c90589ab318229e0f0",
    ),
    "parallel_multiple": (
        "8863ea8433239f55c5f016154cf0830853c89f693c6ea270396a2fa121960579",
        "5ebf24f458c1f16300c05505d83d6f0a1b68b79be273a033febd0d4f840507e3",
    ),
}
BFCL = Package(
    "pypi",
    "bfcl-eval",
    "2026.3.23",
    {
        f"{FOLDER}{place}BFCL_v4_{category}.json": digest
        for category, digests in HASHES.items()
        for place, digest in zip(("", "possible_answer/"), digests)
    },
    "1.9 MB",
    "Apache-2.0",
)
TYPES: dict[str, Any] = {
    "integer": int, "float": (int, float), "number": (int, float), "string": str, "boolean": bool, "array": list,
    "tuple": (list, tuple), "dict": dict, "object": dict,
}  # fmt: skip


class Functions(Env):
    """One call of a described function a turn, checked against its signature; DONE ends the episode.

    Reward 1 where the accepted calls are the gold ones, in any order and none besides. Values are compared as in the
    Berkeley leaderboard: any of those that its gold lists, text up to case, spaces and punctuation.
    """

    def reset(self, row: Mapping[str, Any]) -> str:
        self.row, self.calls = row, list[tuple[str, dict[str, Any]]]()
        self.known = {function["name"]: function["parameters"] for function in row["functions"]}
        return str(row["prompt"])

    def step(self, action: str) -> Turn:
        if action.strip() == "DONE":
            return Turn("", done=True, reward=float(_all_made(self.calls, self.row["gold"])))
        try:
            self.calls.append(self._checked(*parsed_call(action)))
        except ValueError as problem:
            return Turn(f"ERR {problem}\n", error=True)
        return Turn("OK\n")

    def _checked(self, name: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if name not in self.known:
            raise ValueError(f"no function {name}.{did_you_mean(name, self.known)}")
        properties = self.known[name]["properties"]
        for argument, value in arguments.items():
            if argument not in properties:
                raise ValueError(f"{name} has no argument {argument}.{did_you_mean(argument, properties)}")
            kind = TYPES.get(properties[argument]["type"], object)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, (int, float))):
                raise ValueError(f"{argument} must be of type {properties[argument]['type']}.")
        missing = [argument for argument in self.known[name].get("required", ()) if argument not in arguments]
        if missing:
            raise ValueError(f"{name} needs {', '.join(missing)}.")
        return name, arguments


def parsed_call(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a call such as `area(base=10, unit="cm")`; nothing is executed."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError("one call with named arguments is expected.")
        return ast.unparse(call.func), {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, TypeError, RecursionError, MemoryError, ValueError) as cause:
        raise ValueError("one call with named, literal arguments is expected.") from cause


def _all_made(calls: Sequence[tuple[str, dict[str, Any]]], gold: Sequence[Mapping[str, Any]]) -> bool:
    left = list(calls)
    for wanted in gold:
        found = next((call for call in left if _matches(call, wanted)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def _matches(call: tuple[str, dict[str, Any]], gold: Mapping[str, Any]) -> bool:
    ((name, accepted),) = gold.items()
    if call[0] != name or set(call[1]) - set(accepted):
        return False
    return all(
        any(_same(call[1][argument], value) for value in values) if argument in call[1] else "" in values
        for argument, values in accepted.items()
    )


def _same(said: Any, accepted: Any) -> bool:
    if isinstance(said, str) and isinstance(accepted, str):
        plain = lambda text: re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
        return plain(said) == plain(accepted)
    if isinstance(said, list | tuple) and isinstance(accepted, list | tuple):
        return len(said) == len(accepted) and all(map(_same, said, accepted))
    if isinstance(said, dict) and isinstance(accepted, dict):  # a list of what is accepted at each key
        return not set(said) - set(accepted) and all(
            any(_same(said[key], value) for value in values) if key in said else "" in values
            for key, values in accepted.items()
        )
    return bool(said == accepted) and isinstance(said, bool) == isinstance(accepted, bool)


def functions(
    categories: list[str] | None = None, test_size: int = 100, largest: int = 4000, seed: int = 0
) -> AgentSource:
    """Questions of the Berkeley function-calling leaderboard with its functions and gold calls, one call a turn.

    The data of the package bfcl-eval is read; nothing of it is imported or run. Prompts of more than `largest` characters
    are left out, and three questions whose gold their own functions refuse; without `categories` all of HASHES are taken.
    """
    categories = list(HASHES) if categories is None else categories
    for category in categories:
        if category not in HASHES:
            raise DataError(f"data.categories: {category} is not known.{did_you_mean(category, HASHES)}")
    root = locate(BFCL) / FOLDER
    lines = lambda file: [json.loads(line) for line in (root / file).read_text().splitlines() if line.strip()]
    rows = []
    for category in categories:
        file = f"BFCL_v4_{category}.json"
        gold = {item["id"]: item["ground_truth"] for item in lines(f"possible_answer/{file}")}
        for item in lines(file):
            described = "\n".join(map(_described, item["function"]))
            asked = "\n".join(message["content"] for message in item["question"][0])
            prompt = (
                f"{described}\n\n{asked}\n\nCall one function a line with named arguments; write DONE after the last.\n"
            )
            actions = [*map(_written, gold[item["id"]]), "DONE"]
            row = {"prompt": prompt, "actions": actions, "functions": item["function"], "gold": gold[item["id"]]}
            if len(prompt) <= largest and _plays(Functions(), row):
                rows.append({**row, "answer": "\n".join(actions), "id": item["id"]})
    if not 0 < test_size < len(rows):
        raise DataError(f"data.test_size must lie in 1..{len(rows) - 1} for functions, got {test_size}.")
    order = keyed.permutation(keyed.key("functions", seed), len(rows)).tolist()
    models = {"teacher": {"name": "smollm2"}, "student": {"from": "teacher", "layers": 6}}
    return _source("functions", [rows[i] for i in order], test_size, Functions, models, None)


def _plays(env: Env, row: Mapping[str, Any]) -> bool:
    """Whether a row's own actions succeed."""
    env.reset(row)
    return env.replay(row["actions"])[-1].reward == 1


def _described(function: Mapping[str, Any]) -> str:
    required = set(function["parameters"].get("required", ()))
    arguments = ", ".join(
        f"{name}: {of['type']}{'' if name in required else '?'}"
        for name, of in function["parameters"]["properties"].items()
    )
    return f"{function['name']}({arguments}): {function['description']}"


def _written(gold: Mapping[str, Any]) -> str:
    """A gold call as text, with the first of the accepted values."""
    ((name, accepted),) = gold.items()
    first = {argument: values[0] for argument, values in accepted.items() if values[0] != ""}
    return f"{name}({', '.join(f'{argument}={_plain(value)!r}' for argument, value in first.items())})"


def _plain(value: Any) -> Any:
    """A gold value with one value a key."""
    if isinstance(value, dict):
        return {key: _plain(values[0]) for key, values in value.items() if values[0] != ""}
    return [_plain(item) for item in value] if isinstance(value, list) else value


# -------------------------------------------------------------------- what they share


def _source(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    test_size: int,
    make: Callable[[], Env],
    models: Mapping[str, Any] = MODELS,
    teacher: Mapping[str, Any] | None = TRAINING,
) -> AgentSource:
    """The first rows are the test's. A completion is what stands in a dialogue behind the prompt, up to its end."""
    whole = []
    for row in rows:
        env = make()
        env.reset(row)
        answers = env.replay(row["actions"])
        ends = [env.end + answer.observation if not answer.done else "" for answer in answers]
        whole.append({**row, "completion": "".join(map(str.__add__, row["actions"], ends))})
    settings = None if teacher is None else {"causal_lm": teacher}
    return AgentSource(
        name, "prompts", whole[test_size:], whole[:test_size], models=models, teacher=settings,
        grade=partial(graded, make), environment=make,
    )  # fmt: skip


def graded(make: Callable[[], Env], row: Mapping[str, Any], text: str) -> float:
    """The reward of an episode whose actions are every other piece of a written dialogue, answers in between."""
    env = make()
    env.reset(row)
    return sum(turn.reward for turn in env.replay(text.split(env.end)[::2]))


def transcripts(rows: Sequence[Mapping[str, Any]], make: Callable[[], Env], tokenizer: Any, length: int) -> TokenRows:
    """What a policy reads and writes that takes each row's `actions`, as token rows in which the actions alone count."""
    out = []
    for row in rows:
        env = make()
        env.reset(row)
        dialogue = Dialogue(tokenizer, env.end)
        tokens = prompt_tokens(row, tokenizer, None)
        counted = [False] * len(tokens)
        for action, answer in zip(row["actions"], env.replay(row["actions"])):
            said = dialogue.action(action, last=answer.done)
            heard = [] if answer.done else dialogue.between(answer.observation)
            tokens = tokens + said + heard
            counted += [True] * len(said) + [False] * len(heard)
        if any(counted[1:length]):
            out.append((tokens[:length], counted[:length]))
    if not out:
        raise DataError(f"None of {len(rows)} transcripts has an action within {length} tokens. Give a larger length.")
    return TokenRows(out, pad_id(tokenizer))


def played(
    model: Any,
    teacher: Any,
    make: Callable[[], Env],
    prompts: Iterable[PromptBatch],
    *,
    max_turns: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    length: int | None = None,
) -> dict[str, Any]:
    """How a policy fares from the start of its tasks, and how far from the teacher it is on its way.

    success: mean reward · finished: share of episodes that ended by themselves · turns: their mean number · errors: share
    of episodes with an action that could not be carried out · trajectory_kl: mean over episodes of
    sum_t log q(y_t) - log p(y_t), whose mean is KL(q || p) of whole episodes · turn_kl: list, the same by turn, over the
    episodes that have that turn (reached: how many) · texts: some episodes.
    """
    found = []
    for batch in prompts:
        out = episodes(
            model, make, batch, max_turns=max_turns, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
            length=length,
        )  # fmt: skip
        assert out.sampled_logp_BT is not None
        away_BT = torch.zeros_like(out.sampled_logp_BT)
        scored_N = teacher.score(out, TokenLogp).logp_N.to(away_BT)
        away_BT[out.counted_BT] = out.sampled_logp_BT[out.counted_BT] - scored_N
        segment_BT = out.extra["segment_BT"]
        kl_BK = by_turn(away_BT, segment_BT)
        there_BK = by_turn(out.counted_BT.float(), segment_BT) > 0
        found.append((out, kl_BK.cpu(), there_BK.cpu()))
    total = sum(len(out) for out, _, _ in found)
    deepest = max(kl_BK.shape[1] for _, kl_BK, _ in found)
    pad = lambda x_BK: torch.nn.functional.pad(x_BK.double(), (0, deepest - x_BK.shape[1]))
    sums_K = torch.cat([pad(kl_BK) for _, kl_BK, _ in found]).sum(0)
    reached_K = torch.cat([pad(there_BK) for _, _, there_BK in found]).sum(0)
    mean = lambda values: float(sum(values)) / total
    extras = [out.extra for out, _, _ in found]
    return {
        "success": mean(x["reward"].sum() for x in extras),
        "finished": mean(sum(x["finished"]) for x in extras),
        "turns": mean(sum(map(len, x["turns"])) for x in extras),
        "errors": mean((x["first_error"] >= 0).sum() for x in extras),
        "trajectory_kl": mean([sums_K.sum()]),
        "turn_kl": (sums_K / reached_K).tolist(),
        "reached": reached_K.long().tolist(),
        "texts": [
            {"prompt": str(row["prompt"]), "turns": turns, "ending": ending}
            for x in extras[:1]
            for row, turns, ending in zip(x["rows"], x["turns"], x["ending"])
        ][:4],
    }
