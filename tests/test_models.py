"""Models as functions of a family's name: every family in place, bounds that compose, and what cannot work refused."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from audit import of_role
from torch import nn

import liplayers as lp
from liplayers.bounds.composition import head_splitter
from liplayers.errors import ArgumentError, UnknownNameError
from liplayers.models import aolnet, blockmlp, bronet, convnet, lbdn, lipconvnet, lipnext, liresnet, sllnet

BLOCKS = [family for family, _ in of_role("dense_block")]
CONV_BLOCKS = [family for family, _ in of_role("conv_block")]
CONVS = [family for family, _ in of_role("conv")]
ONE_SIZE = ("cpl", "liresnet", "sll")  # their output has the size of their input
IMAGE = (3, 8, 8)


def parameters(make: Callable[[], nn.Module]) -> int:
    """How many parameters a model has, without the memory for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


def randomised(model: nn.Module) -> nn.Module:
    """The model with biases and other parameters away from their start, orthogonal ones kept."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not isinstance(parameter, lp.OrthogonalParameter):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def check_network(model: nn.Module, tolerance: float = 1e-5) -> None:
    """A body of bound about 1 that no pair of images contradicts, a head, gradients, and the same logits frozen."""
    torch.manual_seed(0)
    x, y = torch.rand(2, 4, *IMAGE)
    randomised(model)(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    split = lp.split_head(model, IMAGE)
    assert head_splitter(model, IMAGE, estimates=True)().body_bound <= 1 + tolerance
    assert split.body_bound <= 1.1  # what norms are divided by is an estimate; the bound is that of the quotients
    assert lp.lipschitz_bound(model, IMAGE) >= split.body_bound * (1 - 1e-6)
    with torch.no_grad():
        apart = (model[:-1](x) - model[:-1](y)).flatten(1).norm(dim=1)
        assert (apart <= split.body_bound * (x - y).flatten(1).norm(dim=1) * (1 + 1e-5)).all()
        logits = model(x)
        assert logits.shape == (4, 3)
        torch.testing.assert_close(lp.freeze(model, IMAGE)(x), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("features", [3, 8, 13])
def test_every_dense_block_makes_a_network_of_bound_1(block: str, features: int):
    model = blockmlp((features,), 4, block=block, width=8, depth=2, mean=None)
    assert model(torch.randn(5, features)).shape == (5, 4)
    assert lp.lipschitz_bound(model[:-1], (features,)) == 1
    activations = sum(isinstance(m, nn.ReLU) for m in model.body.modules())
    assert activations == 2
    assert len([m for m in model.body if not isinstance(m, nn.ReLU)]) == 2 + (block in ONE_SIZE and features != 8)


@pytest.mark.parametrize("block", ["ldlt", "ldlt_sequential", "lbdn", "gershgorin"])
def test_blocks_of_several_layers(block: str):
    model = blockmlp((1, 4, 4), 3, block=block, width=6, depth=2, layers=3, mean=0.5)
    assert [b.hidden_features for b in model.body] == [(6, 6, 6)] * 2
    assert lp.lipschitz_bound(model[:-1], (1, 4, 4)) == 1


@pytest.mark.parametrize("block", ["sll", "cpl", "sandwich"])
def test_blocks_of_one_layer_refuse_several(block: str):
    with pytest.raises(ArgumentError, match="layers=2"):
        blockmlp((4,), 3, block=block, layers=2)


def test_activations_and_names_are_passed_on():
    model = blockmlp((4,), 3, block="ldlt", width=8, depth=1, activation="maxmin")
    assert isinstance(model.body[0].activation, lp.MaxMin)
    assert isinstance(blockmlp((4,), 3, width=8, activation=nn.Tanh).body[0].activation, nn.Tanh)
    with pytest.raises(ArgumentError, match="activation"):
        blockmlp((4,), 3, block="sandwich", activation="maxmin")
    with pytest.raises(UnknownNameError, match="ldlt"):
        blockmlp((4,), 3, block="lldt")
    for bad in ({"width": 0}, {"depth": 0}, {"layers": 0}):
        with pytest.raises(ArgumentError, match=next(iter(bad))):
            blockmlp((4,), 3, **bad)


# ------------------------------------------------------------------------------------------------- published networks


@pytest.mark.parametrize("conv", CONVS)
def test_convnet_takes_every_convolution(conv: str):
    check_network(convnet(IMAGE, 3, conv=conv, channels=4, convs_per_block=1))


@pytest.mark.parametrize("conv", CONVS)
def test_aolnet_takes_every_convolution(conv: str):
    check_network(aolnet(IMAGE, 3, conv=conv, linear="cayley", channels=6, depth=1, patch_features=2, dense=2))


@pytest.mark.parametrize("conv", CONVS)
def test_bronet_takes_every_convolution(conv: str):
    check_network(bronet(IMAGE, 3, conv=conv, channels=4, depth=2, width=6, dense=1))


def test_bronet_may_begin_with_residual_blocks():
    check_network(bronet(IMAGE, 3, blocks=1, channels=4, depth=1, width=6, dense=1))


@pytest.mark.parametrize("block", CONV_BLOCKS)
def test_liresnet_takes_every_block(block: str):
    check_network(liresnet(IMAGE, 3, block=block, channels=4, depth=2, width=6, dense=1))


@pytest.mark.parametrize("make", [bronet, liresnet])
def test_means_may_be_subtracted_after_each_layer(make: Callable[..., nn.Module]):
    model = make(IMAGE, 3, channels=4, depth=2, width=6, dense=0, centering="after")
    layer, centering = model.body[2:4]
    assert layer.bias is None
    assert isinstance(centering, lp.BatchCentering)
    seen: list[torch.Tensor] = []
    centering.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(torch.rand(5, *IMAGE))
    torch.testing.assert_close(seen[0].mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-6)
    centering._forward_hooks.clear()
    check_network(model)
    same = {"channels": 4, "depth": 2, "width": 6, "dense": 0}
    assert parameters(lambda: make(IMAGE, 3, **same)) == sum(p.numel() for p in model.parameters())


def test_a_block_with_its_activation_inside_keeps_its_bias_before_a_centering():
    model = liresnet(IMAGE, 3, block="sll", channels=4, depth=1, width=6, dense=0, centering="after")
    assert model.body[2].bias is not None
    assert model.body[3].bias is None
    check_network(model)


def test_ranks_of_bros_dense_layers():
    model = bronet(
        IMAGE,
        3,
        channels=4,
        depth=1,
        width=8,
        dense=1,
        patch="bro",
        linear="bro",
        rank_ratio=0.25,
        dense_rank_ratio=0.5,
    )
    shapes = [tuple(layer.raw.shape) for layer in model.body if isinstance(layer, (lp.BROConv2d, lp.BROLinear))]
    assert shapes == [(4, 1, 3, 3), (64, 4, 1, 1), (8, 4), (8, 4)]  # a patch of 4 × 4 on 4 × 4; 4 features to 8
    check_network(model)
    mixed = bronet(IMAGE, 3, channels=4, depth=1, width=2, dense=1, linear="bro", dense_rank_ratio=0.5)
    assert [tuple(layer.raw.shape) for layer in mixed.body if isinstance(layer, lp.BROLinear)] == [(4, 2), (2, 1)]


def test_l2_pooling_in_place_of_patches():
    model = bronet(IMAGE, 3, patch="l2", channels=4, depth=1, width=6)
    assert any(isinstance(m, lp.L2Pool2d) for m in model.body)
    check_network(model)


def test_convnet_and_aolnet_may_start_as_the_identity():
    conv = convnet(IMAGE, 3, channels=4, convs_per_block=1, start="identity", padding_mode="circular")
    patches = aolnet(IMAGE, 3, channels=6, depth=2, patch_features=2, dense=2, start="identity")
    for model, last in ((conv, 1), (patches, 0)):  # the first layer of both, and the last of one, are orthogonal
        layers = [m for m in model.body if isinstance(m, (lp.AOLConv2d, lp.AOLLinear))]
        for layer in layers[1 : len(layers) - last]:
            weight = torch.zeros(layer.weight.shape)
            nn.init.dirac_(weight) if weight.dim() == 4 else nn.init.eye_(weight)
            torch.testing.assert_close(torch.Tensor(layer.weight.detach()), weight, rtol=0, atol=0)
        for layer in (layers[0], layers[-last]) if last else layers[:1]:
            matrix = layer.weight.detach().flatten(1)
            short = min(matrix.shape)
            gram = matrix @ matrix.mT if len(matrix) == short else matrix.mT @ matrix
            torch.testing.assert_close(torch.Tensor(gram), torch.eye(short), rtol=0, atol=1e-5)
        check_network(model)
    with pytest.raises(ArgumentError, match="no dense weight"):
        convnet(IMAGE, 3, conv="soc", channels=4, start="identity")


def test_models_subtract_a_mean_of_each_channel():
    model = lipconvnet(IMAGE, 3, channels=4, stages=1, mean=[0.1, 0.2, 0.3])
    x = torch.rand(2, *IMAGE)
    torch.testing.assert_close(model.preprocess(x), x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1))
    with pytest.raises(ArgumentError, match=r"mean=\[0.1, 0.2\].*3 channels"):
        lipconvnet(IMAGE, 3, mean=[0.1, 0.2])


@pytest.mark.parametrize("patch", ["aol", "bro", "cayley", "rko"])
def test_the_stem_may_have_patches_and_any_family(patch: str):
    check_network(bronet(IMAGE, 3, stem=patch, patch=patch, linear="bro", stem_patch=4, channels=6, depth=1, width=6))


@pytest.mark.parametrize("block", CONV_BLOCKS)
def test_sllnet_takes_every_block(block: str):
    check_network(sllnet(IMAGE, 3, conv_block=block, channels=4, conv_blocks=2, pool=4, width=None))


@pytest.mark.parametrize(
    ("conv_block", "dense_block", "activation"),
    [
        ("sandwich", "sandwich", "relu"),
        ("sandwich", "lbdn", "relu"),
        ("ldlt", "gershgorin", "relu"),
        ("ldlt", "ldlt", "maxmin"),
    ],
)
def test_lbdn_takes_blocks_that_change_the_size(conv_block: str, dense_block: str, activation: str):
    model = lbdn(
        IMAGE, 3, conv_block=conv_block, dense_block=dense_block, channels=2, stages=2, width=6, activation=activation
    )
    check_network(model)


def test_lbdn_as_its_code_has_it():
    model = lbdn(IMAGE, 3, channels=2, stages=2, width=6, padding_mode="circular", strided_kernel=1, output_bias=False)
    blocks = [block for block in model.body if not isinstance(block, nn.Flatten)]
    assert [tuple(b.raw.shape[2:]) for b in blocks] == [(3, 3), (1, 1), (3, 3), (1, 1), (), (), ()]
    assert all(b.bias is None and b.hidden_bias is not None for b in blocks)
    check_network(model)


def test_lipnext_in_stages():
    options = {"patch_size": 2, "rotate": False, "position": False, "dense": 1, "dense_width": 7}
    model = lipnext(IMAGE, 3, width=[6, 8], depth=[1, 2], pool="flat", **options)
    check_network(model)
    assert [layer.channels for layer in model.modules() if isinstance(layer, lp.LipNeXtBlock)] == [6, 8, 8]
    dense = [layer for layer in model.modules() if isinstance(layer, lp.ManifoldLinear)]
    assert [(layer.in_features, layer.out_features) for layer in dense] == [(8 * IMAGE[1] // 4 * IMAGE[2] // 4, 7)]


@pytest.mark.parametrize("stem", ["rko", "aoc", "bro"])
@pytest.mark.parametrize("position", [True, False])
def test_lipnext_takes_every_strided_stem(stem: str, position: bool):
    check_network(lipnext(IMAGE, 3, width=6, depth=2, patch_size=2, stem=stem, position=position))


@pytest.mark.parametrize("conv", ["aoc", "bro", "soc"])
def test_lipconvnet_5_has_no_convolution_of_stride_1(conv: str):
    check_network(lipconvnet(IMAGE, 3, conv=conv, channels=2, stages=3, convs_per_stage=0))


def test_models_of_odd_and_non_square_images():
    x = torch.rand(2, 1, 9, 14)
    for make in (bronet, liresnet):
        assert make((1, 9, 14), 3, channels=4, depth=1, width=6, dense=0)(x).shape == (2, 3)
    assert lbdn((1, 9, 14), 3, channels=2, width=6)(x).shape == (2, 3)
    assert sllnet((1, 9, 14), 3, channels=2, pool=4, width=None, hidden_features=3)(x).shape == (2, 3)
    assert convnet((1, 12, 8), 3, channels=4)(torch.rand(2, 1, 12, 8)).shape == (2, 3)


def test_logits_of_a_truncated_head_differ_by_root_2():
    model = convnet(IMAGE, 3, channels=4, convs_per_block=1)
    apart = lp.split_head(model, IMAGE).margin_lipschitz(3)
    torch.testing.assert_close(apart, math.sqrt(2) * (1 - torch.eye(3, dtype=apart.dtype)))
    x = torch.rand(2, *IMAGE)
    torch.testing.assert_close(model(x), model[:-1](x)[:, :3])


# ------------------------------------------------------------------------------------- sizes of the published networks


@pytest.mark.parametrize(("channels", "millions"), [(16, 1.57), (32, 6.28), (64, 25.12), (128, 100.46)])
def test_convnets_xs_to_l(channels: int, millions: float):
    stages = [(channels * 2**i, 3 if i < 4 else 1) for i in range(5)]
    expected = channels * (channels + 1) + sum(5 * (w * w * k * k + w) for w, k in stages)
    expected += 32 * channels * (32 * channels + 1)
    assert parameters(lambda: convnet((3, 32, 32), 10, channels=channels)) == expected
    assert expected / 1e6 == pytest.approx(millions, abs=0.005)


def test_convnet_halves_tiny_imagenet_six_times():
    with torch.device("meta"):
        model = convnet((3, 64, 64), 200, channels=16)
    sizes = [(m.in_channels, m.kernel_size[0]) for m in model.body if isinstance(m, lp.AOLConv2d)]
    stages = [(16 * 2**i, 3 if i < 5 else 1) for i in range(6) for _ in range(5)]
    assert sizes == [(16, 1), *stages, (1024, 1)]


@pytest.mark.parametrize(
    ("size", "millions"), [((45, 20, 7), 41), ((60, 30, 10), 78), ((90, 50, 10), 118), ((120, 70, 15), 236)]
)
def test_sll_networks_small_to_xlarge(size: tuple[int, int, int], millions: int):
    channels, convs, dense = size
    paper = {"hidden_channels": 5, "pool": 4, "width": None, "hidden_features": 2048}
    features = channels * 8 * 8
    expected = convs * (5 * channels * 9 + 5 + 5) + dense * (2048 * features + 2048 + 2048) + 10 * (features + 1)
    found = parameters(
        lambda: sllnet((3, 32, 32), 10, channels=channels, conv_blocks=convs, dense_blocks=dense, **paper)
    )
    assert found == expected
    assert found // 10**6 == millions


def test_bronet_l_and_liresnet_share_all_but_the_backbone():
    around = 512 * (3 * 25 + 1)  # stem
    around += 512 * (512 * 16 + 1)  # patches
    around += 2048 * (512 * 4 * 4 + 1) + 8 * 2048 * (2048 + 2) + 10 * (2048 + 1)  # a bias and a gain for each row
    assert parameters(lambda: bronet((3, 32, 32), 10)) == around + 12 * (512 * 256 * 9 + 1024)
    assert parameters(lambda: liresnet((3, 32, 32), 10)) == around + 12 * (512 * 512 * 9 + 1024)
    ranks = parameters(lambda: bronet((3, 32, 32), 10, rank_ratio=0.125))
    assert ranks == around + 12 * (512 * 64 * 9 + 1024)
    hybrid = parameters(lambda: bronet((3, 32, 32), 10, blocks=6, depth=8))
    assert hybrid == around + 6 * (512 * 512 * 9 + 1024) + 8 * (512 * 256 * 9 + 1024)


@pytest.mark.parametrize("kept", [16, 32, 48])
def test_aol_networks_small_to_large(kept: int):
    def layer(there: int, here: int) -> int:
        return there * (here + 1)

    expected = layer(192, 48) + 12 * layer(192, 192 * 9) + layer(192, 192) + 14 * layer(64 * kept, 64 * kept)
    assert parameters(lambda: aolnet((3, 32, 32), 10, patch_features=kept)) == expected


@pytest.mark.parametrize(("image", "stages"), [(32, 3), (64, 4)])
def test_lbdn_on_cifar_and_tiny_imagenet(image: int, stages: int):
    def block(here: int, there: int, taps: int = 1) -> int:  # raw, Ψ, hidden and outer bias
        return there * (there + here) * taps + 3 * there

    here, expected = 3, 0
    for there in (64 * 2**stage for stage in range(stages)):
        # a stride makes 4 channels of each, and a kernel of 2 × 2 of one of 3 × 3
        expected += block(here, there, 9) + block(4 * there, there, 4)
        here = there
    expected += block(here * 16, 2048) + block(2048, 2048) + block(2048, 1024) + 10 * (1024 + 1)
    found = parameters(lambda: lbdn((3, image, image), 10, stages=stages))
    assert found == expected


def test_lipnext_l32w1024_has_64m_parameters_on_the_manifold():
    with torch.device("meta"):
        model = lipnext((3, 32, 32), 10)
    on_manifold = sum(p.numel() for p in model.parameters() if isinstance(p, lp.OrthogonalParameter))
    assert on_manifold == 64 * 2**20
    rest = 1024 * (48 + 1) + 32 * (1024 * 8 * 8 + 1024) + 10 * (1024 + 1)
    assert sum(p.numel() for p in model.parameters()) == on_manifold + rest


@pytest.mark.parametrize("n", range(5, 45, 5))
def test_lipconvnet_n_has_n_convolutions_and_1024_features(n: int):
    with torch.device("meta"):
        model = lipconvnet((3, 32, 32), 10, conv="soc", stages=5, convs_per_stage=n // 5 - 1)
    convs = [m for m in model.body if isinstance(m, lp.SOCConv2d)]
    assert len(convs) == n
    assert [c.out_channels for c in convs if c.stride == (2, 2)] == [64, 128, 256, 512, 1024]
    assert model.head.in_features == 1024


# ---------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (convnet, {"blocks": 4}, "blocks=4"),
        (convnet, {"blocks": 0}, "blocks=0"),
        (convnet, {"channels": 5}, "channels=5"),
        (convnet, {"kernel_size": 2}, "kernel_size=2"),
        (convnet, {"channels": 0}, "channels=0"),
        (aolnet, {"patch_size": 3}, "patch_size=3"),
        (aolnet, {"patch_features": 0}, "patch_features=0"),
        (aolnet, {"patch_size": 8, "patch_features": 2}, "2 features for 3 classes"),
        (bronet, {"depth": 0}, "depth=0"),
        (bronet, {"dense": -1}, "dense=-1"),
        (bronet, {"blocks": -1}, "blocks=-1"),
        (bronet, {"stem_patch": 9}, "stem_patch=9"),
        (bronet, {"stem_patch": 0}, "stem_patch=0"),
        (bronet, {"rank_ratio": 2.0}, "rank_ratio=2.0"),
        (bronet, {"centering": "between"}, "before"),
        (bronet, {"start": "identity"}, "residual"),
        (convnet, {"start": "random"}, "identity"),
        (lbdn, {"conv_block": "ldlt", "output_bias": False}, "output_bias"),
        (liresnet, {"dense": True}, "dense=True"),
        (liresnet, {"block": "bro"}, "bro"),
        (liresnet, {"head": "normalised"}, "normalized"),
        (lbdn, {"width": 1}, "width=1"),
        (lbdn, {"stages": 0}, "stages=0"),
        (lbdn, {"conv_block": "sll"}, "sll"),
        (lbdn, {"dense_block": "cpl"}, "cpl"),
        (lbdn, {"activation": "maxmin"}, "activation"),
        (lipnext, {"patch_size": 3}, "patch_size=3"),
        (lipnext, {"width": [4, 4], "depth": 2}, "as many of one"),
        (lipnext, {"width": [4, 0], "depth": [1, 1]}, "width of stage 2=0"),
        (lipnext, {"pool": "flaat"}, "flaat"),
        (lipnext, {"stem": "bcop"}, "stride"),
        (lipnext, {"beta": 2}, "beta=2"),
        (sllnet, {"pool": 9}, "pool=9"),
        (sllnet, {"conv_blocks": -1}, "conv_blocks=-1"),
        (sllnet, {"width": 0}, "width=0"),
        (lipconvnet, {"convs_per_stage": -1}, "convs_per_stage=-1"),
        (lipconvnet, {"dense": -1}, "dense=-1"),
        (lipconvnet, {"stages": 4}, "stages=4"),
    ],
)
def test_what_cannot_work_is_refused_by_name(make: Callable[..., nn.Module], arguments: dict, message: str):
    small = {"channels": 4, "width": 6, "depth": 1, "dense": 1}
    taken = inspect.signature(make).parameters
    settings = {**{key: value for key, value in small.items() if key in taken}, **arguments}
    with pytest.raises(lp.LipschitzError, match=message) as caught:
        make(IMAGE, 3, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [aolnet, bronet, convnet, lbdn, lipnext, liresnet, sllnet])
def test_image_models_refuse_rows_of_a_table(make: Callable[..., nn.Module]):
    with pytest.raises(ArgumentError, match="input_shape"):
        make((7,), 3)
