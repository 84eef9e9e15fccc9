"""Forward-mode attention against torch's own rules, and directional derivatives of real denoisers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from potstill.contracts.errors import ModelError, RecipeError
from potstill.models.denoisers import dit_tiny, mlp_denoiser, unet_tiny
from potstill.models.jvp import attention, forward_mode, jvp
from potstill.noise.gaussian import TrigFlow

B, H, Q, K, D = 2, 3, 7, 5, 4


def noise(*shape: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(dtype=torch.float64, first=0):
    return tuple(noise(B, H, n, D, seed=first + i, dtype=dtype) for i, n in enumerate((Q, K, K)))


def plain(query, key, value, mask=None, causal=False, scale=None):
    """softmax(S) V with the whole matrix, which torch differentiates forward itself."""
    scores = (query @ key.mT) * (D**-0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


MASKS = {
    "none": {}, "causal": {"causal": True}, "scale": {"scale": 0.3},
    "keys": {"mask": torch.tensor([[True, False, True, True, False]])[None, None].expand(B, 1, 1, K)},
    "pairs": {"mask": (noise(B, H, Q, K, seed=9) > -0.5) | (torch.arange(K) == 2)},
    "additive": {"mask": 3 * noise(Q, K, seed=8)},
}  # fmt: skip


def arguments(options):
    names = {"mask": "attn_mask", "causal": "is_causal", "scale": "scale"}
    return {names[k]: v for k, v in options.items()}


@pytest.mark.parametrize("block", [1, 2, 3, 64])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_and_its_tangent_are_the_plain_ones(mask, block):
    options, primals, tangents = MASKS[mask], inputs(), inputs(first=10)
    expected = torch.func.jvp(lambda q, k, v: plain(q, k, v, **options), primals, tangents)
    found = torch.func.jvp(lambda *x: attention(*x, **arguments(options), block=block), primals, tangents)
    assert_close(found, expected)
    assert_close(found[0], F.scaled_dot_product_attention(*primals, **arguments(options)))


def test_the_tangent_is_the_papers_formula():
    """tO = P tV + H V - rowsum(H) O, H = P * tS."""
    (q, k, v), (tq, tk, tv) = inputs(), inputs(first=10)
    P = (q @ k.mT * D**-0.5).softmax(-1)
    S = (tq @ k.mT + q @ tk.mT) * D**-0.5
    expected = P @ tv + (P * S) @ v - (P * S).sum(-1, keepdim=True) * (P @ v)
    found = torch.func.jvp(lambda *x: attention(*x, block=2), (q, k, v), (tq, tk, tv))[1]
    assert_close(found, expected)


def test_the_tangent_is_that_of_the_double_backward():
    """J v = d/du (u^T J v): two reverse passes through the plain form."""
    primals, tangents = tuple(x.requires_grad_() for x in inputs()), inputs(first=10)
    output = plain(*primals)
    u = torch.ones_like(output, requires_grad=True)
    pulled = torch.autograd.grad(output, primals, u, create_graph=True)
    expected = torch.autograd.grad(pulled, u, tangents)[0]
    assert_close(torch.func.jvp(lambda *x: attention(*x, block=3), primals, tangents)[1], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_inputs_are_summed_wide(dtype):
    primals, tangents = inputs(dtype), inputs(dtype, first=10)
    found = torch.func.jvp(lambda *x: attention(*x, block=2), primals, tangents)
    wide = torch.func.jvp(plain, tuple(x.double() for x in primals), tuple(x.double() for x in tangents))
    for a, b in zip(found, wide):
        assert a.dtype == dtype
        assert_close(
            a.double(), b, rtol=2e-5 if dtype == torch.float32 else 2e-2, atol=1e-5 if dtype == torch.float32 else 1e-2
        )


def test_large_scores_neither_overflow_nor_lose_the_tangent():
    primals, tangents = tuple(300 * x for x in inputs()), inputs(first=10)
    found = torch.func.jvp(lambda *x: attention(*x, block=2), primals, tangents)
    assert_close(found, torch.func.jvp(plain, primals, tangents))
    assert all(x.isfinite().all() for x in found)


def test_a_row_that_sees_no_key_is_zero_with_a_zero_tangent():
    mask = torch.ones(Q, K, dtype=torch.bool)
    mask[3] = False
    value, tangent = torch.func.jvp(lambda *x: attention(*x, mask, block=2), inputs(), inputs(first=10))
    assert not value[..., 3, :].any() and not tangent[..., 3, :].any() and tangent.isfinite().all()


def test_grouped_queries():
    q, k, v = noise(B, 4, Q, D, seed=0), noise(B, 2, K, D, seed=1), noise(B, 2, K, D, seed=2)
    assert_close(attention(q, k, v, enable_gqa=True, block=2), F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


class Largest(TorchDispatchMode):
    """The most numbers that one result of any operation holds."""

    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        held = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.seen = max([self.seen, *held])
        return result


@pytest.mark.parametrize("block", [8, 16])
def test_nothing_of_size_queries_by_keys_is_held(block):
    size, width = 128, 4
    primals, tangents = ([noise(1, 1, size, width, seed=s + i) for i in range(3)] for s in (0, 5))
    largest = {}
    for name, function in {"blocks": lambda *x: attention(*x, block=block), "plain": plain}.items():
        with Largest() as mode, torch.no_grad():
            torch.func.jvp(function, tuple(primals), tuple(tangents))
        largest[name] = mode.seen
    assert largest["plain"] == size * size
    assert largest["blocks"] == max(block * block, size * width), "blocks of scores, and inputs and outputs"


# ---------------------------------------------------------------- networks


def jittered(net):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return net.double().eval()


def velocity(net):
    flow = TrigFlow(0.5)
    return lambda x, t: flow.from_x0("v", flow.denoise(net, x, t), x, t)


def place(net):
    t = torch.tensor([0.1, 0.8, 1.5], dtype=torch.float64)
    x = noise(3, *net.shape, seed=1)
    return (x, t), (0.2 * noise(3, *net.shape, seed=2), t.cos() * t.sin())


def test_every_derivative_agrees_and_errors_have_their_order():
    net = jittered(mlp_denoiser(width=16, depth=2))
    at, along = place(net)
    value, exact = jvp(velocity(net), at, along)
    assert_close(value, velocity(net)(*at))
    assert not value.requires_grad and not exact.requires_grad
    error = lambda how, h: (jvp(velocity(net), at, along, how, h=h)[1] - exact).abs().max().item()
    for how in ("semi", "backward"):
        assert error(how, 1e-4) < 1e-4 and error(how, 1e-3) / error(how, 1e-4) == pytest.approx(10, rel=0.05)
    assert error("central", 1e-2) < 1e-3 and error("central", 1e-1) / error("central", 1e-2) == pytest.approx(
        100, rel=0.3
    )


@pytest.mark.needs("diffusers")
@pytest.mark.parametrize(
    "make", [lambda: unet_tiny(channels=1, size=8, attention=True), lambda: dit_tiny(channels=1, size=8)]
)
def test_diffusers_networks_with_attention_have_exact_derivatives(make):
    """Unchanged: their processors call scaled_dot_product_attention. diffusers embeds time in float32: hence h and rtol."""
    net = jittered(make())
    at, along = place(net)
    value, exact = jvp(velocity(net), at, along, block=3)
    assert_close(value, velocity(net)(*at))
    assert_close(jvp(velocity(net), at, along, block=64), (value, exact))
    assert_close(jvp(velocity(net), at, along, "central", h=3e-3)[1], exact, rtol=1e-2, atol=1e-4)


def test_outside_the_mode_attention_is_torchs_own():
    x = inputs()
    with forward_mode(2):
        inside = F.scaled_dot_product_attention(*x)
    assert_close(inside, F.scaled_dot_product_attention(*x))
    with pytest.raises(NotImplementedError):
        torch.func.jvp(F.scaled_dot_product_attention, x, x)


def test_refusals():
    attend = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    x = noise(1, 3, 4, seed=0, dtype=torch.float32)
    call = lambda y: attend(y, y, y, need_weights=False)[0]
    with pytest.raises(ModelError, match="without a forward-mode derivative.*derivative: central"):
        jvp(call, (x,), (x,))
    assert jvp(call, (x,), (x,), "central")[1].shape == x.shape, "the way out that the message names"
    with pytest.raises(RecipeError, match="one of exact, semi, backward and central, got 'exactly'"):
        jvp(call, (x,), (x,), "exactly")
    with pytest.raises(RecipeError, match="h of a finite difference must be positive, got 0"):
        jvp(call, (x,), (x,), "central", h=0)
    with pytest.raises(RecipeError, match="at least one position, got 0"):
        forward_mode(0)
    with pytest.raises(ModelError, match="needs dropout 0, got 0.1: put the network in eval mode"):
        attention(*inputs(), None, 0.1)
