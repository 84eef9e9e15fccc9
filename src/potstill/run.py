"""What a method gets in its hands: models by role, data, training by stage, and a folder that remembers what is done."""

import copy
import hashlib
import json
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from potstill.assets import cache_dir, lock
from potstill.contracts import keyed
from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import DataError, RecipeError, RunError
from potstill.contracts.files import load_tensors, read_json, save_tensors, whole_folder, write_json, write_text
from potstill.contracts.players import Objective
from potstill.contracts.spec import MethodConfig, Spec
from potstill.divergences import Full
from potstill.evaluation import evaluate
from potstill.methods import Method, Role
from potstill.models.build import adapter, build, finish, is_packaged, location
from potstill.models.spec import ModelSpec
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.tokens import completed
from potstill.tasks.base import Source
from potstill.tasks.sources import load
from potstill.tasks.tokens import Prompts, pad_id, token_rows
from potstill.teachers import LocalTeacher
from potstill.teachers.aligned import AlignedTeacher, check_tokenizers
from potstill.teachers.cached import CachedTeacher, cached_tokenizer
from potstill.teachers.served import ServedTeacher
from potstill.training.checkpoint import checkpoints
from potstill.training.launch import accelerator
from potstill.training.scratch import objective_from_scratch
from potstill.training.spec import TrainSpec
from potstill.training.tracking import read_journal
from potstill.training.trainer import Trainer


class EvalSpec(Spec):
    """`eval` of a recipe: how much is measured at the end, and while training."""

    batch: int = Field(250, gt=0)
    limit: int | None = Field(None, gt=0)  # test rows measured; None takes all


@dataclass(frozen=True)
class Plan:
    """A recipe, resolved: every field an object. `written` is what goes to recipe.yaml."""

    method: Method
    config: MethodConfig
    models: Mapping[str, ModelSpec | list[ModelSpec]]
    data: Any
    train: TrainSpec
    eval: EvalSpec
    written: Mapping[str, Any]


@dataclass
class Result:
    """What a method hands back: a finished student (anything with `save(folder)`), numbers, and files it made."""

    student: Any | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    artefacts: Mapping[str, Path] = field(default_factory=dict)


class Run:
    """One execution of a recipe in one folder."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.config, self.train, self.seed = plan.config, plan.train, plan.train.seed
        self.accelerator = accelerator(plan.train)
        self.device = self.accelerator.device
        self._models: dict[str, Any] = {}

    # ---------------------------------------------------------------- data

    @cached_property
    def source(self) -> Source:
        """The recipe's data, loaded; refused when it is of a kind that the method cannot use."""
        source = load(self.plan.data)
        kinds = self.plan.method.data
        if source.kind not in kinds and not (source.kind in CONVERTIBLE and set(kinds) & CONVERTIBLE[source.kind]):
            raise DataError(
                f"{self.plan.method.name} needs data of kind {' or '.join(kinds)}, but {source.name} gives {source.kind}."
            )
        if len(source.train) == 0 or len(source.test) == 0:
            raise DataError(
                f"{source.name} has {len(source.train)} training and {len(source.test)} test rows; both are needed."
            )
        return source

    @cached_property
    def context(self) -> dict[str, Any]:
        """What packaged networks must know of the data: classes, sizes, the tokenizer."""
        context = dict(self.source.context)
        if self.source.kind in ("text", "prompts", "chat") and "tokenizer" not in context:
            own = [s for s in self._specs() if not s.aligned]  # others bring a tokenizer of their own
            named = [s for s in own if s.cache or (s.name is not None and s.address is None)]
            foreign = next((s for s in named if s.cache or not self._packaged(s)), None)
            if foreign is not None and foreign.cache:
                context["tokenizer"] = cached_tokenizer(foreign.cache)
            elif foreign is not None:
                from transformers import AutoTokenizer

                context["tokenizer"] = AutoTokenizer.from_pretrained(
                    location(foreign.name or ""), trust_remote_code=False
                )
            else:
                context["tokenizer"] = character_tokenizer([str(row) for row in self.source.train], mask=True)
        return context

    def tokens(self, split: str = "train", length: int | None = None) -> Any:
        """The source's text as token rows under the run's tokenizer: packed text, chats with assistant masks, or
        prompts with their completions."""
        rows = getattr(self.source, split)
        return token_rows(self.source.kind, rows, self.context["tokenizer"], length or self.plan.data.length)

    def states(self, kind: str) -> Any:
        """The training states that hold still: the rows of `tokens`, or of `prompts` with their own completions."""
        return self.tokens() if kind == "tokens" else Completed(self.prompts(), pad_id(self.context["tokenizer"]))

    def prompts(self, split: str = "train", length: int | None = None, completion: int | None = None) -> Any:
        """The source's rows as left-padded prompts of at most `length` tokens."""
        length = length or self.plan.data.prompt_length
        return Prompts(
            getattr(self.source, split), self.context["tokenizer"], length, completion or self.plan.data.length - length
        )

    # ---------------------------------------------------------------- models

    def student(self) -> Any:
        return self.model("student")

    def teacher(self, role: str = "teacher") -> Any:
        """A role's model as a teacher: frozen here, asked at its address, or its answers to this run's rows from a cache."""
        spec = self.spec(role)
        if isinstance(spec, ModelSpec) and spec.cache is not None:
            support = getattr(self.config, "support", Full())
            tokenizer = self.context["tokenizer"]
            cached = CachedTeacher(spec.cache, tokenizer=tokenizer, asked=spec.identity(), support=support)
            return cached.check(self.states(cached.index["data"]["kind"]))
        if isinstance(spec, ModelSpec) and spec.address is not None:
            return ServedTeacher(spec.address, self.context["tokenizer"], spec.served)
        teacher = LocalTeacher(self.model(role))
        if isinstance(spec, ModelSpec) and spec.aligned:
            student = self.student()
            check_tokenizers(teacher.model, student)
            return AlignedTeacher(teacher, student.tokenizer)
        return teacher

    def model(self, role: str) -> Any:
        """The model of a role, on the run's device; built once."""
        if role not in self._models:
            spec = self.spec(role)
            if isinstance(spec, list):
                raise RunError(f"{role} is a list of models: ask for models({role!r}).")
            self._models[role] = self._build(role, spec, self._role(role)).to(self.device)
        return self._models[role]

    def models(self, role: str) -> list[Any]:
        """The models of a role that takes several."""
        if role not in self._models:
            specs = self.spec(role)
            specs = specs if isinstance(specs, list) else [specs]
            made = [self._build(f"{role}.{i}", s, self._role(role)).to(self.device) for i, s in enumerate(specs)]
            self._models[role] = made
        return self._models[role]

    def fresh(self, kind: str, spec: ModelSpec | Mapping[str, Any] | str, name: str) -> Any:
        """A model with fresh weights for a part that is no role: a judge, a fake score. Keyed by its name."""
        spec = spec if isinstance(spec, ModelSpec) else ModelSpec.model_validate(spec)
        seed = keyed.key(self.seed, "init", name)
        return build(kind, spec, context=self.context, seed=seed, role=name).to(self.device)

    def spec(self, role: str) -> ModelSpec | list[ModelSpec]:
        """The recipe's spec of a role, else the data source's default."""
        if role in self.plan.models:
            return self.plan.models[role]
        default = self.source.models.get(role)
        if default is None:
            raise RecipeError(
                f"{self.plan.method.name} needs a {role}; {self.source.name} has no default. Give {role}: NAME."
            )
        if isinstance(default, list):
            return [ModelSpec.model_validate(d) for d in default]
        return ModelSpec.model_validate(default)

    def has(self, role: str) -> bool:
        return role in self.plan.models or role in self.source.models

    def loads(self, role: str) -> bool:
        """Whether a role's weights are loaded here: not those of a teacher whose answers come from elsewhere."""
        specs = self.spec(role)
        return all(s.loaded for s in (specs if isinstance(specs, list) else [specs]))

    def aligned(self, role: str) -> bool:
        """Whether a role's model has a tokenizer of its own, and is compared by spans of text."""
        spec = self.spec(role)
        return isinstance(spec, ModelSpec) and spec.aligned

    @cached_property
    def roles(self) -> dict[str, Role]:
        """The method's roles, each of the kind of model that the data asks for."""
        return {name: role.on(self.source.kind) for name, role in self.plan.method.roles.items()}

    def _role(self, role: str) -> Role:
        if role not in self.plan.method.roles:
            raise RunError(f"{self.plan.method.name} has no role {role}.")
        return self.roles[role]

    def _specs(self) -> list[ModelSpec]:
        specs: list[ModelSpec] = []
        for role in self.plan.method.roles:
            if self.has(role):
                spec = self.spec(role)
                specs += spec if isinstance(spec, list) else [spec]
        return specs

    def _packaged(self, spec: ModelSpec) -> bool:
        return any(is_packaged(role.kind, spec) for role in self.roles.values())

    def _build(self, role: str, spec: ModelSpec, of: Role) -> Any:
        if spec.cache is not None:
            raise RecipeError(
                f"{role}.cache gives a teacher's answers to the training rows, and {self.plan.method.name} needs the weights "
                f"of its {role} here. Give {role}: NAME without cache."
            )
        if spec.address is not None:
            raise RecipeError(
                f"{role}: {spec.address} is a server, and {self.plan.method.name} needs this model's weights here. "
                f"Give {role} as a folder or an id."
            )
        if spec.from_ is not None:
            if spec.from_ not in self.plan.method.roles:
                raise RecipeError(f"{role}.from names {spec.from_}, which is no role of {self.plan.method.name}.")
            origin = self.model(spec.from_)
            if spec.layers is None:
                return finish(copy.deepcopy(origin).requires_grad_(True), spec, role)
            if not hasattr(origin, "shortened"):
                raise RecipeError(
                    f"{role}.layers: a {of.kind} cannot be cut in layers. Without layers it is copied whole."
                )
            return finish(origin.shortened(spec.layers).requires_grad_(True), spec, role)
        if of.ready and is_packaged(of.kind, spec):
            return trained(of.kind, spec, self.source, self.context, self.plan.data, self.seed, self.train.device, role)
        seed = keyed.key(self.seed, "init", role)
        return build(of.kind, spec, context=self.context, seed=seed, role=role, adapt=not of.ready)

    # ---------------------------------------------------------------- work

    def fit(
        self,
        objective: Objective,
        dataset: Any,
        stage: str = "distil",
        evaluate: Callable[[int], Mapping[str, float]] | None = None,
        **changes: Any,
    ) -> None:
        """Train a stage, or walk past it when it is done (its last checkpoint is loaded). `changes` override `train`."""
        spec = TrainSpec(**{**self.train.model_dump(), **changes})
        Trainer(spec, self.folder, stage, evaluate).fit(objective, dataset)

    def stage(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Run a step once and remember what it returns: JSON values, tensors, or a dictionary of both.

        A resumed run reads the stored value instead of working again; a fresh one returns the stored value too, so that
        both go on with the same numbers.
        """
        place = self.folder / "stages" / name
        if not self._agreed((place / "value.json").is_file()):
            value = function(*args)
            if self.accelerator.is_main_process:
                with whole_folder(place) as part:
                    tensors: dict[str, Tensor] = {}
                    plain = _unpack(value, "", tensors)
                    aliases = save_tensors(part / "tensors.safetensors", tensors) if tensors else {}
                    write_json(part / "value.json", {"value": plain, "aliases": aliases})
            self.accelerator.wait_for_everyone()
        stored = read_json(place / "value.json")
        file = place / "tensors.safetensors"
        return _pack(stored["value"], load_tensors(file, stored["aliases"]) if file.is_file() else {})

    def _agreed(self, seen: bool) -> bool:
        """What the first process has seen: a slower one may look when the file is already there."""
        if self.accelerator.num_processes == 1:
            return seen
        flag = torch.tensor(int(seen), device=self.device)
        torch.distributed.broadcast(flag, 0)
        return bool(flag)

    def seconds_spent(self, but: str = "") -> float:
        """Seconds of training that the newest checkpoints of all stages (but one) stand for."""
        stages = [stage for stage in (self.folder / "checkpoints").glob("*") if stage.name != but]
        newest = [found[-1] for stage in stages if (found := checkpoints(stage))]
        return sum(read_json(path / "state.json")["seconds"] for path in newest)

    def record(self, name: str, type: str, title: str, **content: Any) -> None:
        """Keep something for the report: `type` is table, texts, token_values, images, curves or text."""
        if self.accelerator.is_main_process:
            write_json(self.folder / "records" / f"{name}.json", {"type": type, "title": title, **content})

    def evaluate(self, model: Any, **options: Any) -> dict[str, float]:
        """The standard metrics of a model's kind on the source's test rows."""
        return evaluate(model, self.test_data(model), batch=self.plan.eval.batch, limit=self.plan.eval.limit, **options)

    def test_data(self, model: Any) -> Any:
        return self.tokens("test") if model.kind in ("causal_lm", "masked_lm") else self.source.test

    def execute(self) -> Result:
        """Run the method to its end and write what it hands back. Walks past whatever is done."""
        main = self.accelerator.is_main_process
        if main:
            write_json(self.folder / "environment.json", environment(self.device))
        result = self.plan.method.run(self, self.config)
        if main:
            if result.student is not None:
                with whole_folder(self.folder / "student") as part:
                    result.student.save(part)
            metrics = {k: float(v) for k, v in result.metrics.items()}
            artefacts = {k: str(Path(v).relative_to(self.folder)) for k, v in result.artefacts.items()}
            kind = getattr(result.student, "kind", None)
            write_json(self.folder / "result.json", {"metrics": metrics, "artefacts": artefacts, "student_kind": kind})
        self.accelerator.wait_for_everyone()
        return result


@dataclass
class Completed:
    """Prompts as the TokenBatch rows that an off-policy step makes of them."""

    prompts: Prompts
    fill: int

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, rows: Tensor, epoch: int = 0) -> TokenBatch:
        return completed(self.prompts.batch(rows, epoch), self.fill)


CONVERTIBLE = {"text": {"prompts"}, "prompts": {"text"}, "chat": {"text", "prompts"}}


def trained(
    kind: str,
    spec: ModelSpec,
    source: Source,
    context: Mapping[str, Any],
    data: Any,
    seed: int,
    device: str = "auto",
    role: str = "teacher",
) -> Any:
    """A packaged network trained on a source: trained once, cached by a hash of all that made it, and reused.

    How long and how fast is the source's to say (`Source.teacher`, where an entry under a kind's name is that kind's);
    the seed of the teacher is fixed, so that runs with different seeds compare under one teacher. A network without
    parameters, a formula, needs no training.
    """
    given = source.teacher or {}
    own = given.get(kind) or {key: value for key, value in given.items() if not isinstance(value, Mapping)}
    init = keyed.key(own.get("seed", 0), "init", kind, spec.name or "")
    model: Any = build(kind, spec, context=context, seed=init, role=role)
    if next(model.parameters(), None) is None:
        return model
    if source.teacher is None:
        raise RecipeError(
            f"{role}: {source.name} does not say how a {spec.name} is trained. Give {role} as a folder or an id."
        )
    settings = {**own, "trackers": [], "device": device}
    identity = {
        "kind": kind, "spec": spec.model_dump(mode="json", exclude={"cache", "served"}),
        "data": data.model_dump(mode="json"), "source": source.name,
        "settings": {k: v for k, v in settings.items() if k != "device"}, "format": 1,
    }  # fmt: skip
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()
    words = re.sub(r"[^\w.]+", "-", f"{spec.name}-{source.name}")  # a source may be named by its path
    folder = cache_dir() / "models" / f"{words[-80:]}-{digest}"
    cls: Any = adapter(kind)
    train = TrainSpec(**settings)
    world = accelerator(train)
    with lock(folder) if world.is_main_process else nullcontext():
        world.wait_for_everyone()  # until the first process has the lock, so that all see the same folder
        if not (folder / "potstill-identity.json").is_file():
            dataset = source.train
            if kind in ("causal_lm", "masked_lm"):
                dataset = token_rows(source.kind, source.train, context["tokenizer"], data.length)
            Trainer(train, None, stage=f"train {role}").fit(objective_from_scratch(model, train), dataset)
            if world.is_main_process:
                with whole_folder(folder) as part:
                    model.save(part)
                    write_json(part / "potstill-identity.json", identity)
        world.wait_for_everyone()
    model = cls.from_pretrained(str(folder))
    return finish(model, spec, role)


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to run the same again."""
    packages = ("potstill", "torch", "transformers", "accelerate", "diffusers", "peft", "safetensors", "numpy")
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": str(device),
        "packages": found,
    }


def open_folder(folder: Path, recipe: str) -> None:
    """Claim a new run folder and write its recipe; an existing one is never touched."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        state = "is finished" if (folder / "result.json").is_file() else "was interrupted"
        if (folder / "recipe.yaml").is_file():
            report = folder / "report.html"
            way = f"Its report: {report}." if state == "is finished" else f"Go on with: potstill resume {folder}."
            raise RunError(
                f"{folder} holds a run that {state}. {way} To run anew, choose another folder with output=PATH."
            )
        raise RunError(f"{folder} exists and is no run folder. Choose another with output=PATH.")
    write_text(folder / "recipe.yaml", recipe)


def longer(finished: Path, folder: Path, steps: int) -> None:
    """Copy what a run of `steps` steps may keep when it is given more, so that resuming the copy trains on.

    That is every training stage up to the first that ended with the budget, which goes on from its checkpoint, and the
    remembered values (`Run.stage`) that were there before it ended. Later stages and measurements rest on it and are
    made again.
    """
    for stage in dict.fromkeys(row["stage"] for row in read_journal(finished / "metrics.jsonl")):
        if not (found := checkpoints(finished / "checkpoints" / stage)):
            raise RunError(f"{finished} has no checkpoint of {stage} left to go on from. Run the recipe anew.")
        shutil.copytree(finished / "checkpoints" / stage, folder / "checkpoints" / stage)
        state = found[-1] / "state.json"
        if read_json(state)["step"] >= steps:
            for value in (finished / "stages").glob("*/value.json"):
                if value.stat().st_mtime_ns < state.stat().st_mtime_ns:
                    shutil.copytree(value.parent, folder / "stages" / value.parent.name)
            break
    for name in ("metrics.jsonl", "timing.jsonl"):
        if (finished / name).is_file():
            shutil.copy2(finished / name, folder / name)


def _unpack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path or "value"] = value
        return {"__tensor__": path or "value"}
    if isinstance(value, Mapping):
        return {str(k): _unpack(v, f"{path}/{k}", tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_unpack(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _pack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Mapping):
        if "__tensor__" in value:
            return tensors[value["__tensor__"]]
        return {k: _pack(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_pack(v, tensors) for v in value]
    return value
