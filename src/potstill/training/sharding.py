"""Sharded training: every process keeps its rows of each trained weight, of its gradient and of its optimizer state.

torch's `fully_shard` (FSDP2) does it, one unit a transformer block and one for the rest. A unit is whole while it computes,
forward and backward, and only then. Around it, where a method may do anything (rollouts of other lengths on each process,
averages, evaluation, `save`), the models are plain modules with whole weights (`Shards.whole`), as they are after training.

Frozen teachers are no player's, so each process holds them whole: serve or cache one that does not fit. A model is built
whole on each process before it is sharded, and needs its whole weights during `collect`: what is saved is the memory of
gradients and optimizer state, and of weights while activations are there.

Run on CPUs with gloo only, with torch 2.13; never on a GPU.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from potstill.contracts.errors import RecipeError
from potstill.contracts.players import Player

METHODS = ("hidden", "head", "logits", "embeddings")  # through which adapters use their weights, beside forward
BUCKET_BYTES = 2**27  # of weights that one collective gathers, where more than one does
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a module: what its library says not to split, else the items of its lists of modules.

    The outermost alone, and none that shares a weight with the rest.
    """
    names = {name for m in module.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    listed = {
        id(item): item for items in lists for item in items if not isinstance(item, nn.ModuleList | nn.ModuleDict)
    }
    blocks = [item for item in listed.values() if type(item).__name__ in names] or list(listed.values())
    inner = {id(m) for block in blocks for m in block.modules() if m is not block}
    users = _users(module)
    return [
        block
        for block in blocks
        if id(block) not in inner and (own := _users(block)) and all(users[p] == mine for p, mine in own.items())
    ]


def shard(
    objective: nn.Module, players: Mapping[str, Player], device: torch.device, low: torch.dtype | None
) -> "Shards":
    """Shard the players' modules that have repeated blocks over all processes, in place; small parts stay whole.

    low: the type of autocast, in which the blocks' weights are then gathered; what is outside of them keeps its type, and
        with it the residual stream. Gradients are added in float32 or better.
    """
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise RecipeError(f"train.sharded needs torch 2.13 or newer, and this is {torch.__version__}. Upgrade it.")
    modules = {id(m): m for player in players.values() for m in player.modules}
    inner = {id(x) for m in modules.values() for x in m.modules() if x is not m}
    roots = [
        m for i, m in modules.items() if i not in inner and type(m).forward is not nn.Module.forward and blocks_of(m)
    ]
    if not roots:
        raise RecipeError(
            f"train.sharded finds no repeated blocks in what {', '.join(players)} trains. Set train.sharded=false: each "
            "process then holds all of it."
        )
    _check_own(objective, roots)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    shards = Shards()
    for root in roots:
        trained = next((p.dtype for p in root.parameters() if p.requires_grad), torch.float32)
        wide = torch.promote_types(trained, torch.float32)
        scalars = {p for p in root.parameters() if p.ndim == 0}
        before = [(m, type(m), set(vars(m)), {name: set(vars(m)[name]) for name in HOOKS}) for m in root.modules()]
        for module in [*blocks_of(root), root]:
            # Autocast decides what is computed in which type, so inputs keep theirs.
            policy = MixedPrecisionPolicy(None if module is root else low, wide, cast_forward_inputs=False)
            unit = cast(Any, fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=scalars))
            unit.set_gradient_divide_factor(1.0)  # totals are sums, so gradients add
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_reduce_scatter_unused_params(True)
            shards.units.append(unit)
        for name in METHODS:
            if callable(getattr(type(root), name, None)):
                register_fsdp_forward_method(root, name)
        # Otherwise done by the first forward pass, when another player's turn may hold these weights still.
        cast(Any, root)._get_fsdp_state()._lazy_init()
        shards.looks += [
            _Look(
                m,
                plain,
                type(m),
                {k: v for k, v in vars(m).items() if k not in had},
                {name: {k: v for k, v in vars(m)[name].items() if k not in hooks[name]} for name in HOOKS},
            )
            for m, plain, had, hooks in before
        ]
    return shards


@dataclass
class Shards:
    """The sharded modules of an objective."""

    units: list[Any] = field(default_factory=list)
    looks: list["_Look"] = field(default_factory=list)
    held: list[tuple[nn.Module, str, DTensor]] = field(default_factory=list)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Plain modules with whole weights inside the block, on all processes; what it does to them is kept."""
        self._gather()
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, part in self.held:
                    part.to_local().copy_(rows_of(cast(Tensor, module._parameters[name]), part))
                    module._parameters[name] = cast(nn.Parameter, part)
            self.held = []
            for look in self.looks:
                look.put_on()

    def end(self) -> None:
        """Plain modules with whole weights from now on."""
        self._gather()
        for unit in self.units:
            _module_state_mapping.pop(unit, None)  # so that a later stage may shard it again
        self.units, self.looks, self.held = [], [], []

    def reshard(self) -> None:
        """Give up what a pass has left whole: an optimizer moves the rows alone."""
        for unit in self.units:
            unit.reshard()

    @torch.no_grad()
    def _gather(self) -> None:
        self.reshard()
        for look in self.looks:
            look.take_off()
            parts = cast(dict[str, Any], look.module._parameters).items()
            self.held += [(look.module, name, part) for name, part in parts if isinstance(part, DTensor)]
        made: dict[int, nn.Parameter] = {}
        for some in _buckets({id(part): part for _, _, part in self.held}.values()):
            for part, tensor in zip(some, _together(some), strict=True):
                made[id(part)] = nn.Parameter(tensor, part.requires_grad)
        for module, name, part in self.held:
            module._parameters[name] = made[id(part)]


@dataclass
class _Look:
    """What sharding adds to a module: a class, attributes and hooks."""

    module: nn.Module
    plain: type[nn.Module]
    sharded: type[nn.Module]
    attributes: dict[str, Any]
    hooks: dict[str, dict[int, Any]]

    def take_off(self) -> None:
        self.module.__class__ = self.plain
        for name in self.attributes:
            del vars(self.module)[name]
        for name, hooks in self.hooks.items():
            for key in hooks:
                del vars(self.module)[name][key]

    def put_on(self) -> None:
        self.module.__class__ = self.sharded
        vars(self.module).update(self.attributes)
        for name, hooks in self.hooks.items():
            vars(self.module)[name].update(hooks)
        for key in self.hooks["_forward_pre_hooks"]:
            vars(self.module)["_forward_pre_hooks"].move_to_end(key, last=False)


def _buckets(parts: Iterable[DTensor]) -> Iterator[list[DTensor]]:
    """The same in groups of one type that are worth one collective each."""
    some: list[DTensor] = []
    for part in parts:
        if some and (part.dtype != some[0].dtype or sum(p.nbytes for p in some) > BUCKET_BYTES):
            yield some
            some = []
        some.append(part)
    if some:
        yield some


def _together(parts: list[DTensor]) -> list[Tensor]:
    """Sharded tensors of one type, each whole, by one all-gather."""
    world = parts[0].device_mesh.size()
    local = [part.to_local() for part in parts]
    shapes = [(-(-part.shape[0] // world), *part.shape[1:]) for part in parts]  # of the most rows that a process has
    sizes = [math.prod(shape) for shape in shapes]
    mine = local[0].new_zeros(sum(sizes))
    for rows, place in zip(local, mine.split(sizes), strict=True):
        place[: rows.numel()] = rows.flatten()
    every = mine.new_empty(world * len(mine))
    torch.distributed.all_gather_into_tensor(every, mine)
    pieces = every.view(world, -1).split(sizes, 1)
    return [
        piece.reshape(-1, *part.shape[1:])[: len(part)].contiguous() for piece, part in zip(pieces, parts, strict=True)
    ]


def rows_of(whole: Any, part: DTensor) -> Tensor:
    """The rows of a whole tensor (or of anything that is sliced like one) that this process has of `part`."""
    size = -(-part.shape[0] // part.device_mesh.size())
    first = min(part.device_mesh.get_local_rank() * size, part.shape[0])
    return whole[first : first + len(part.to_local())]


def own_rows(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: its rows where that is sharded, else all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The same with sharded ones whole and on the CPU, gathered one at a time; for the processes that `keep` them.

    Names of one tensor stay names of one tensor.
    """
    made: dict[int, Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            if id(tensor) not in made:
                whole = cast(Any, tensor.detach()).full_tensor()
                made[id(tensor)] = whole.cpu() if keep else whole.new_empty(0)
            tensor = made[id(tensor)]
        if keep:
            found[name] = tensor
    return found


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """`clip_grad_norm_` where some gradients are sharded: the norm over all processes' rows and what each has whole."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    zero = torch.zeros((), dtype=wide, device=gradients[0].device)
    square = lambda tensors: sum((torch.linalg.vector_norm(t, dtype=wide) ** 2 for t in tensors), start=zero.clone())
    rows = [g.to_local() for g in gradients if isinstance(g, DTensor)]
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    shared = square(rows)
    torch.distributed.all_reduce(shared)
    norm = (shared + square(whole)).sqrt()
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(rows + whole, scale)
    return norm


def fused(optimizer: torch.optim.Optimizer) -> None:
    """Have groups that are sharded throughout updated at once; torch does so by itself for plain tensors alone."""
    for group in optimizer.param_groups:
        if all(isinstance(p, DTensor) for p in group["params"]):
            group["foreach"] = True


def _users(module: nn.Module) -> dict[int, set[int]]:
    """The modules that have each parameter for their own."""
    users: dict[int, set[int]] = {}
    for m in module.modules():
        for p in m.parameters(recurse=False):
            users.setdefault(id(p), set()).add(id(m))
    return users


def _check_own(objective: nn.Module, roots: list[nn.Module]) -> None:
    """A weight that another module uses as well would stay behind there."""
    inside = {id(m) for root in roots for m in root.modules()}
    mine = {p for root in roots for p in _users(root)}
    users = _users(objective)
    for name, p in objective.named_parameters():
        if id(p) in mine and users[id(p)] - inside:
            raise RecipeError(
                f"train.sharded cannot split {name}, which a module outside the trained model uses too. "
                "Set train.sharded=false."
            )
