"""Activations, pooling, containers, heads, and the errors of the constructors."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import liplayers as lip
from liplayers.core.module import LipschitzModule
from liplayers.errors import ArgumentError, LipschitzError, ShapeError, UnknownNameError
from liplayers.linalg.norms import row_distances
from liplayers.testing.measure import jacobian, operator_norm, worst_norm


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Activations ----------------------------------------------------------------------------------------------------------

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    lip.MaxMin,
    lip.GroupSort,
    lip.Abs,
    lambda: lip.GroupSort(3),
    lambda: lip.GroupSort(None),
    lambda: lip.MaxMin(dim=-1),
    lambda: lip.MaxMin(pairs="neighbours"),
]


@pytest.mark.parametrize("make", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1,), (2,), (5,), (7,), (8,), (5, 3, 2), (4, 1, 3)])
def test_activations_preserve_norms_and_distances(make: Callable, shape: tuple[int, ...]):
    activation = make()
    x, y = randn(16, *shape), randn(16, *shape, seed=1)
    assert activation(x).shape == x.shape
    torch.testing.assert_close(activation(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    moved = (activation(x) - activation(y)).flatten(1).norm(dim=1)
    assert (moved <= (x - y).flatten(1).norm(dim=1) * (1 + 1e-12)).all()
    J = jacobian(activation, x[0])
    torch.testing.assert_close(J.mT @ J, torch.eye(J.shape[1], dtype=torch.float64))
    assert lip.lipschitz_bound(activation) == 1


@pytest.mark.parametrize("channels", range(1, 10))
@pytest.mark.parametrize("size", [1, 2, 3, 4, None])
def test_group_sort_sorts_each_group_and_the_remainder(channels: int, size: int | None):
    x = randn(4, channels, 2)
    y = lip.GroupSort(size)(x)
    step = size or channels
    for start in range(0, channels, step):
        torch.testing.assert_close(y[:, start : start + step], x[:, start : start + step].sort(1).values)


@pytest.mark.parametrize("channels", range(1, 8))
def test_maxmin_orders_the_halves_and_passes_the_odd_channel(channels: int):
    x = randn(6, channels, 3)
    y = lip.MaxMin()(x)
    half = channels // 2
    torch.testing.assert_close(y[:, :half], torch.maximum(x[:, :half], x[:, half : 2 * half]))
    torch.testing.assert_close(y[:, half : 2 * half], torch.minimum(x[:, :half], x[:, half : 2 * half]))
    assert torch.equal(y[:, 2 * half :], x[:, 2 * half :])


def test_maxmin_has_its_derivatives_in_every_mode():
    x = randn(3, 5, 2).requires_grad_()
    modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(lip.MaxMin(), x, **modes)
    assert torch.autograd.gradgradcheck(lip.MaxMin(), x)
    samples = x.detach()
    torch.testing.assert_close(torch.func.vmap(lip.MaxMin(0))(samples), lip.MaxMin(1)(samples))


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_maxmin_keeps_channels_last(pairs: str):
    x = randn(2, 6, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = lip.MaxMin(pairs=pairs)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.square().sum().backward()
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", list(lip.ACTIVATIONS))
def test_activations_by_name(name: str):
    activation = lip.get_activation(name)
    x = randn(3, 6)
    assert activation(x).shape == x.shape
    assert lip.lipschitz_bound(activation) == 1
    assert lip.get_activation(name) is not activation


def test_an_unknown_activation_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match=r"maxmni.*maxmin"):
        lip.get_activation("maxmni")


# Pooling --------------------------------------------------------------------------------------------------------------

POOLS = [lip.ScaledAvgPool2d, lip.L2Pool2d, lip.MaxPool2d]


@pytest.mark.parametrize("make", POOLS)
@pytest.mark.parametrize("kernel", [1, 2, 3, (2, 1), (1, 3)])
@pytest.mark.parametrize("image", [(6, 6), (7, 5), (3, 8)])
def test_pooling_is_a_contraction_of_torch_s_shape(make: Callable, kernel: int | tuple, image: tuple[int, int]):
    pool = make(kernel)
    x = randn(3, 2, *image)
    assert pool(x).shape == nn.MaxPool2d(kernel)(x).shape
    for point in (x[0], 1e-3 * x[1], torch.ones_like(x[0])):
        assert operator_norm(pool, (2, *image), at=point) <= 1 + 1e-12
    constant = randn(1, 2, 1, 1).expand(1, 2, *image)
    if make is lip.ScaledAvgPool2d:
        torch.testing.assert_close(
            pool(x), nn.AvgPool2d(kernel)(x) * math.sqrt(math.prod((kernel, kernel) if type(kernel) is int else kernel))
        )
    elif make is lip.MaxPool2d:
        torch.testing.assert_close(pool(x), nn.MaxPool2d(kernel)(x))
    else:
        torch.testing.assert_close(pool(x), nn.LPPool2d(2, kernel)(x))
        torch.testing.assert_close(pool(constant), lip.ScaledAvgPool2d(kernel)(constant).abs())


@pytest.mark.parametrize("make", POOLS)
def test_pooling_refuses_overlap_and_small_images(make: Callable):
    for kernel, stride in [(3, 2), (2, 1), ((2, 3), 2), (2, 3)]:
        with pytest.raises(ArgumentError, match="stride"):
            make(kernel, stride)
    assert make(2, 2).stride == (2, 2)
    with pytest.raises(ArgumentError, match="kernel_size"):
        make(0)
    with pytest.raises(ShapeError, match="kernel_size"):
        make(3)(torch.zeros(1, 1, 2, 5))


@pytest.mark.parametrize("pool", [lip.L2Pool2d(2), lip.GlobalL2Pool2d()])
def test_l2_pooling_has_a_finite_gradient_at_zero(pool: nn.Module):
    x = torch.zeros(1, 2, 4, 4, requires_grad=True)
    pool(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("image", [(1, 1), (5, 3)])
def test_global_l2_pooling_preserves_norms(image: tuple[int, int]):
    pool, x = lip.GlobalL2Pool2d(), randn(4, 3, *image)
    assert pool(x).shape == (4, 3)
    torch.testing.assert_close(pool(x).norm(dim=1), x.flatten(1).norm(dim=1))
    assert operator_norm(pool, (3, *image), at=x[0]) == pytest.approx(1)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("shape", [(3,), (3, 4, 2)])
def test_pad_channels_appends_zeros_or_cuts(channels: int, shape: tuple[int, ...]):
    pad, x = lip.PadChannels(channels), randn(2, *shape)
    y = pad(x)
    assert y.shape == (2, channels, *shape[1:])
    assert torch.equal(y[:, :3], x[:, :channels])
    assert (y[:, 3:] == 0).all()
    assert operator_norm(pad, shape) == 1
    with pytest.raises(ArgumentError, match="channels"):
        lip.PadChannels(0)


# Containers -----------------------------------------------------------------------------------------------------------


class Times(LipschitzModule):
    """x ↦ a·x, whose bound is known."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x

    def lipschitz_bound(self) -> float:
        return abs(self.factor)


@pytest.mark.parametrize("alpha", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("factor", [0.0, 1.0, 3.0])
def test_residual_is_the_convex_combination(alpha: float, factor: float):
    residual = lip.ConvexResidual(Times(factor), alpha).double()
    x = randn(2, 3)
    torch.testing.assert_close(residual(x), (1 - alpha) * x + alpha * factor * x, rtol=1e-6, atol=0)
    measured = operator_norm(residual, (3,))
    assert measured == pytest.approx(lip.lipschitz_bound(residual), rel=1e-9)
    assert sum(p.requires_grad for p in residual.parameters()) == 1
    assert not any(p.requires_grad for p in lip.ConvexResidual(Times(1.0), learnable=False).parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residual_counts_the_rounding_of_its_two_weights(dtype: torch.dtype):
    """In half precision 1 − α is rounded too, and the sum of what runs can be 1.002."""
    sums = []
    for logit in torch.linspace(-4, 4, 201):
        residual = lip.ConvexResidual(nn.Identity()).to(dtype)
        residual.logit.data.fill_(logit)
        alpha = residual.logit.sigmoid()
        sums.append(((1 - alpha).double() + alpha.double()).item())
        assert lip.lipschitz_bound(residual) >= sums[-1]
        plain = lip.ConvexResidual(nn.Identity())
        plain.logit.data.fill_(logit)
        alpha = plain.logit.sigmoid()
        with torch.autocast("cpu", dtype):
            assert lip.lipschitz_bound(plain) >= ((1 - alpha).to(dtype).double() + alpha.to(dtype).double()).item()
    assert max(sums) > 1  # the rounding is there to be counted


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, 2.0, math.nan])
def test_residual_refuses_weights_outside_the_interval(alpha: float):
    with pytest.raises(ArgumentError, match="alpha"):
        lip.ConvexResidual(nn.Identity(), alpha)


def test_concatenate_adds_squares():
    factors = (1.0, 2.0, 0.5)
    joined = lip.Concatenate([Times(f) for f in factors])
    assert joined(randn(2, 3)).shape == (2, 9)
    assert operator_norm(joined, (3,)) == pytest.approx(lip.lipschitz_bound(joined), rel=1e-12)
    assert lip.lipschitz_bound(joined) == pytest.approx(math.hypot(*factors))
    with pytest.raises(ArgumentError, match="modules"):
        lip.Concatenate([])


def test_scale_and_normalize_have_their_norms():
    for factor in (-2.0, 0.0, 0.3):
        assert operator_norm(lip.Scale(factor), (3,)) == pytest.approx(lip.lipschitz_bound(lip.Scale(factor)))
    with pytest.raises(ArgumentError, match="factor"):
        lip.Scale(math.inf)
    normalize = lip.Normalize([0.1, 0.2, 0.3], [0.5, 0.25, 2.0]).double()
    assert operator_norm(normalize, (3, 2, 2)) == pytest.approx(4) == lip.lipschitz_bound(normalize)
    x = randn(2, 3, 2, 2)
    torch.testing.assert_close(normalize(x)[:, 2], (x[:, 2] - 0.3) / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("mean", "std"),
    [([0.0], [0.0]), ([0.0], [-1.0]), ([0.0], [math.nan]), ([0.0, 1.0], [1.0]), ([], []), ([0.0], [math.inf])],
)
def test_normalize_refuses_what_is_no_std(mean: list, std: list):
    with pytest.raises(ArgumentError, match="std"):
        lip.Normalize(mean, std)


# Heads ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e9, 1e30])
def test_normalized_linear_has_unit_rows_and_a_true_bound(scale: float):
    head = lip.NormalizedLinear(5, 7)
    with torch.no_grad():
        head.raw.copy_(scale * randn(7, 5))
        head.raw[2] = 0
        head.raw[3:5] = scale
    norms = head.weight.double().norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([1, 1, 0, 1, 1, 1, 1.0]).double(), atol=1e-6, rtol=0)
    exact = torch.linalg.svdvals(head.weight.double())[0].item()
    assert exact * (1 - 1e-12) <= head.lipschitz_bound() <= exact * 1.01
    head(torch.randn(2, 5)).sum().backward()
    assert torch.isfinite(head.raw.grad).all()


def test_row_distances_are_the_pairwise_norms():
    W = randn(5, 3).requires_grad_()
    D = row_distances(W)
    for i, j in product(range(5), repeat=2):
        assert D[i, j].item() == pytest.approx((W[i] - W[j]).norm().item())
    D.sum().backward()
    assert torch.isfinite(W.grad).all()


# Constructors ---------------------------------------------------------------------------------------------------------

CONVS = [lip.AOLConv2d, lip.BjorckConv2d, lip.BROConv2d, lip.CayleyConv2d]
DENSE = [lip.AOLLinear, lip.BjorckLinear, lip.BROLinear, lip.CayleyLinear, lip.NormalizedLinear]

# what is given → what the message must name: the argument, the value, and what would work
BAD_CONVS = [
    ({"padding_mode": "reflect"}, ("padding_mode", "'reflect'", "'circular'")),
    ({"padding_mode": "replicate"}, ("padding_mode", "'replicate'", "'zeros'")),
    ({"padding_mode": "circular", "padding": 2}, ("padding", "2", "padding=1")),
    ({"padding_mode": "circular", "padding": (1, 2)}, ("padding", "(1, 2)", "padding=1")),
    ({"padding": "full"}, ("padding", "'full'", "'same'")),
    ({"padding": "same", "stride": 2}, ("padding", "stride=(2, 2)", "stride 1")),
    ({"padding": -1}, ("padding", "-1", "at least 0")),
    ({"padding": (1, 2, 3)}, ("padding", "(1, 2, 3)", "pair")),
    ({"stride": 0}, ("stride", "0", "at least 1")),
    ({"stride": (1, 0)}, ("stride", "(1, 0)", "at least 1")),
    ({"stride": 1.5}, ("stride", "1.5", "integer")),
    ({"dilation": 0}, ("dilation", "0", "at least 1")),
    ({"groups": 3}, ("groups", "3", "in_channels")),
    ({"groups": 0}, ("groups", "0", "at least 1")),
    ({"kernel_size": 0}, ("kernel_size", "0", "at least 1")),
    ({"kernel_size": (3,)}, ("kernel_size", "(3,)", "pair")),
]


@pytest.mark.parametrize("make", CONVS)
@pytest.mark.parametrize(("arguments", "named"), BAD_CONVS, ids=str)
def test_conv_constructors_name_argument_value_and_mend(make: Callable, arguments: dict, named: tuple[str, ...]):
    with pytest.raises(ValueError, match=make.__name__) as caught:
        make(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **arguments})
    assert isinstance(caught.value, LipschitzError)
    message = str(caught.value)
    assert "\n" not in message
    assert all(text in message for text in named), message


@pytest.mark.parametrize("make", [lip.BROConv2d, lip.CayleyConv2d])
@pytest.mark.parametrize("arguments", [{"groups": 2}, {"dilation": 2}, {"dilation": (1, 2)}], ids=str)
def test_fourier_convs_refuse_groups_and_dilation_with_a_way_out(make: Callable, arguments: dict):
    with pytest.raises(ArgumentError, match=rf"{next(iter(arguments))}.*AOLConv2d"):
        make(4, 4, 3, **arguments)


@pytest.mark.parametrize("make", DENSE)
def test_dense_layers_take_torch_s_arguments(make: Callable):
    for x in (torch.randn(3), torch.randn(2, 3), torch.randn(2, 5, 3)):
        assert make(3, 4)(x).shape == nn.Linear(3, 4)(x).shape
    assert make(in_features=3, out_features=4, bias=False, device="cpu", dtype=torch.float64).bias is None
    with pytest.raises(TypeError, match="biass"):
        make(3, 4, biass=True)


@pytest.mark.parametrize("make", [lip.BROLinear, lip.BROConv2d])
@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, math.nan])
def test_bro_refuses_rank_ratios(make: Callable, ratio: float):
    sizes = (4, 4) if make is lip.BROLinear else (4, 4, 3)
    with pytest.raises(ArgumentError, match=r"rank_ratio.*\(0, 1\]"):
        make(*sizes, rank_ratio=ratio)


def test_bro_with_full_rank_is_minus_the_identity():
    layer = lip.BROLinear(4, 4, rank_ratio=1, dtype=torch.float64)
    torch.testing.assert_close(layer.weight, -torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("make", [lip.BjorckLinear, lip.BjorckConv2d])
def test_bjorck_refuses_iterations(make: Callable):
    sizes = (4, 4) if make is lip.BjorckLinear else (4, 4, 3)
    with pytest.raises(ArgumentError, match="iterations"):
        make(*sizes, iterations=0)
    assert "iterations=7" in repr(make(*sizes, iterations=7))


@pytest.mark.parametrize("make", CONVS)
def test_convs_say_which_input_they_expected(make: Callable):
    layer = make(3, 4, 3)
    for shape in [(1, 2, 8, 8), (3, 8), (1, 1, 3, 8, 8)]:
        with pytest.raises(ShapeError, match=r"expected \(N, 3, H, W\)"):
            layer(torch.zeros(shape))
    with pytest.raises(ShapeError, match="smaller than"):
        layer(torch.zeros(1, 3, 2, 9))


@pytest.mark.parametrize("make", [lip.AOLConv2d, lip.BjorckConv2d])
def test_circular_padding_wider_than_the_image_is_a_shape_error(make: Callable):
    with pytest.raises(ShapeError, match="circular padding"):
        make(2, 2, 7, padding=3, padding_mode="circular")(torch.zeros(1, 2, 2, 2))
    with pytest.raises(ShapeError, match="circular padding"):
        lip.SLLConv2dBlock(2, kernel_size=7, padding_mode="circular")(torch.zeros(1, 2, 2, 2))


@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1), (5, 2), (2, "same"), (4, "same"), ((3, 1), "same")])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_fourier_convs_keep_the_image_in_place(kernel: int | tuple, padding: int | str, mode: str):
    """With gain 0 the Cayley map is the identity: what is padded must be cropped where it was added."""
    layer = lip.CayleyConv2d(2, 2, kernel, padding=padding, padding_mode=mode, dtype=torch.float64)
    with torch.no_grad():
        layer.gain.zero_()
    x = randn(2, 2, 5, 6)
    torch.testing.assert_close(layer(x), x)


def test_sll_blocks_refuse_what_breaks_their_proof():
    for activation in (lip.MaxMin(), lip.Abs(), nn.GELU(), nn.SiLU(), nn.LeakyReLU(1.5), nn.ELU(2.0)):
        for make in (lip.SLLBlock, lip.SLLConv2dBlock):
            with pytest.raises(ArgumentError, match="activation"):
                make(4, activation=activation)
    for arguments, name in [({"kernel_size": 2}, "kernel_size"), ({"padding_mode": "reflect"}, "padding_mode")]:
        with pytest.raises(ArgumentError, match=name):
            lip.SLLConv2dBlock(4, **arguments)
    for activation in (nn.Tanh(), nn.ReLU6(), nn.Softsign(), nn.LeakyReLU(0.1)):
        block = lip.SLLBlock(4, 6, activation=activation, dtype=torch.float64)
        assert worst_norm(block, (4,), nonlinear=True) <= 1 + 1e-9


def test_sll_does_not_depend_on_the_scale_of_a_unit():
    """(W_i, q_i) and (cW_i, q_i/c) are the same block, for every c that is a float."""
    torch.manual_seed(0)
    block = lip.SLLBlock(4, 6, bias=False, dtype=torch.float64)
    x = randn(5, 4)
    expected = block(x)
    scales = torch.logspace(-20, 20, 6, dtype=torch.float64)
    with torch.no_grad():
        block.raw.mul_(scales[:, None])
        block.log_q.sub_(scales.log())
    torch.testing.assert_close(block(x), expected)


def test_families_and_roles_by_name():
    assert lip.get_layer("cayley", "conv") is lip.CayleyConv2d
    assert lip.get_layer(nn.Linear, "linear") is nn.Linear
    with pytest.raises(UnknownNameError, match="cayley"):
        lip.get_layer("caley", "conv")
    with pytest.raises(UnknownNameError, match="conv"):
        lip.get_layer("cayley", "covn")
    with pytest.raises(ArgumentError, match="aol"):
        lip.register(lip.FAMILIES["aol"])


def test_a_module_without_a_bound_says_so():
    with pytest.raises(NotImplementedError, match="LipschitzModule"):
        LipschitzModule().lipschitz_bound()
