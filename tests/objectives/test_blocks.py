import pytest
import torch
from torch import nn
from torch.testing import assert_close

from potstill.contracts.errors import ModelError
from potstill.models.images import ImageClassifier
from potstill.models.taps import tap
from potstill.objectives.blocks import ConvHead, Heads, PooledHead, Projector, TokenHead


def test_projectors_match_shapes_and_can_be_the_identity():
    for student, teacher in (((2, 6, 8, 8), (2, 10, 4, 4)), ((2, 5, 6), (2, 5, 10)), ((2, 6), (2, 10))):
        assert Projector(student, teacher)(torch.randn(student)).shape == teacher
    same = Projector((2, 3, 4, 4), (2, 3, 2, 2))
    with torch.no_grad():
        same.map.weight.copy_(torch.eye(3)[:, :, None, None])
        same.map.bias.zero_()
    x = torch.randn(2, 3, 4, 4)
    assert_close(same(x), nn.functional.avg_pool2d(x, 2))


def test_projectors_refuse_what_cannot_be_compared():
    with pytest.raises(ModelError, match=r"features of one rank, got student \[2, 3, 4, 4\] and teacher \[2, 5, 3\]"):
        Projector((2, 3, 4, 4), (2, 5, 3))
    with pytest.raises(ModelError, match=r"smaller than the teacher's \[2, 3, 8, 8\]: tap an earlier stage"):
        Projector((2, 3, 4, 4), (2, 3, 8, 8))
    with pytest.raises(ModelError, match="differ in positions"):
        Projector((2, 4, 3), (2, 5, 3))


@pytest.mark.parametrize(("size", "positions"), [(4, 16), (7, 9), (8, 16), (14, 9), (28, 9), (1, 1)])
def test_conv_heads_end_in_a_few_positions_and_keep_samples_apart(size, positions):
    torch.manual_seed(0)
    head, x = ConvHead(8, size), torch.randn(3, 8, size, size)
    assert head(x).shape == (3, positions)
    assert_close(head(x)[:1], head(x[:1]))


def test_token_head_is_spectrally_normalised_and_acts_per_token():
    torch.manual_seed(0)
    head, x = TokenHead(12), torch.randn(2, 5, 12)
    with torch.no_grad():
        for layer in (head.layers[0], head.layers[2]):
            layer.parametrizations.weight.original.mul_(50.0)  # the scale of the weight must not matter
        for _ in range(200):
            head(x)  # each training pass is one power iteration
    head.eval()
    assert torch.linalg.matrix_norm(head.layers[0].weight, 2).item() == pytest.approx(1, abs=1e-3)
    assert torch.linalg.matrix_norm(head.layers[2].weight, 2).item() == pytest.approx(1, abs=1e-3)
    assert head(x).shape == (2, 5)
    assert_close(head(x)[:, 3], head(x[:, 3]))


def test_pooled_head_ignores_the_order_of_positions():
    head, x = PooledHead(6), torch.randn(2, 5, 6)
    assert head(x).shape == (2, 1)
    assert_close(head(x), head(x.flip(1)))
    maps = torch.randn(2, 6, 3, 3)
    assert_close(head(maps), head(maps.flatten(2).transpose(1, 2)))


def test_heads_on_tapped_features_tell_two_sets_of_images_apart():
    """A frozen trunk and trained heads; mean softplus(fake) + mean softplus(-real) falls below that of a coin."""
    torch.manual_seed(0)
    trunk = ImageClassifier.PACKAGED["resnet-xs"](size=8).eval().requires_grad_(False)
    names = ["network.stages.0", "network.stages.2"]

    def features(x):
        with tap(trunk, names) as taps:
            trunk(x)
        return taps.outputs

    real, fake = torch.randn(16, 1, 8, 8), 0.3 * torch.randn(16, 1, 8, 8)
    heads = Heads.on(features(real))
    assert heads(features(real)).shape == (16, 16 + 4)  # an 8x8 map to 4x4 logits, a 2x2 map as it is
    assert Heads.on(features(real), pooled=True)(features(real)).shape == (16, 2)
    optimizer = torch.optim.Adam(heads.parameters(), 1e-2)
    softplus = nn.functional.softplus
    for _ in range(30):
        loss = softplus(heads(features(fake))).mean() + softplus(-heads(features(real))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.7
    assert heads(features(real)).mean() > 0 > heads(features(fake)).mean()
