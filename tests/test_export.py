"""A frozen model computes what the model computed, holds nothing but weights, and leaves in three formats."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from audit import EVERY, example
from exact import exceeds_norm, rational, rows_of
from flint import fmpq
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import liplayers as lp
from liplayers.core.module import LipschitzModule
from liplayers.core.weights import ParametrizedModule
from liplayers.errors import ArgumentError, ExportError, MissingPackageError, OutputError, ShapeError, UnknownBoundError
from liplayers.modules.activations import FrozenHouseholder
from liplayers.modules.containers import FrozenResidual
from liplayers.modules.frozen import (
    FrozenFourierConv2d,
    FrozenLMIBlock,
    FrozenPolynomialConv2d,
    FrozenResidualBlock,
    Placement,
)
from liplayers.testing.measure import worst_norm

every = pytest.mark.parametrize(("family", "role"), EVERY, ids=["-".join(e) for e in EVERY])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@torch.no_grad()
def stirred(model: nn.Module) -> nn.Module:
    """In eval mode, with parameters off their initial values and biases that are not zero."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
    return model.eval()


@torch.no_grad()
def assert_equal(frozen: nn.Module, model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float64):
    x = torch.randn(3, *shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    expected, got = model(x), frozen(x)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= TOLERANCE[dtype] * max(1.0, expected.abs().max().item())


# Equal to the original ------------------------------------------------------------------------------------------------


@every
def test_a_frozen_state_holds_no_raw_parameters(family: str, role: str):
    layer, shape = example(family, role)
    names = {part for key in lp.freeze(layer, shape).state_dict() for part in key.split(".")}
    assert not any(name.startswith(("raw", "log_", "theta", "gain", "factors", "logit")) for name in names), names


CONV = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (1, 5), "padding": (0, 4), "bias": False},
    {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 2, "padding": 0, "padding_mode": "circular"},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 3, "padding": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 4), "stride": (3, 2), "padding": (2, 1)},
    {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "circular"},
]
CONV_FAMILIES = ["aol", "aoc", "rko", "bro", "cayley", "lot", "soc"]


@pytest.mark.parametrize("options", CONV, ids=str)
@pytest.mark.parametrize("family", CONV_FAMILIES)
def test_convolutions_freeze_with_every_geometry(family: str, options: dict[str, Any]):
    torch.manual_seed(0)
    layer = stirred(lp.get_layer(family, "conv")(2, 5, dtype=torch.float64, **options))
    for shape in ((2, 6, 8), (2, 8, 6)) if "circular" in options.values() else ((2, 6, 7), (2, 9, 5)):
        frozen = lp.freeze(layer, shape)
        assert_equal(frozen, layer, shape)
        assert lp.lipschitz_bound(frozen, shape) <= 1 + 1e-2


def test_convolutions_of_torch_keep_dilation_groups_and_output_padding():
    torch.manual_seed(0)
    conv = stirred(lp.AOLConv2d(4, 6, 3, padding=2, dilation=2, groups=2, dtype=torch.float64))
    assert_equal(lp.freeze(conv), conv, (4, 7, 6))
    up = stirred(lp.AOLConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dtype=torch.float64))
    assert type(lp.freeze(up)) is nn.ConvTranspose2d
    assert_equal(lp.freeze(up), up, (4, 7, 6))


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("make", [lp.SandwichConv2dBlock, lp.LDLTConv2dBlock], ids=lambda m: m.__name__)
def test_blocks_per_frequency_freeze_with_strides(make: Callable, padding_mode: str):
    torch.manual_seed(0)
    block = stirred(make(3, out_channels=4, stride=2, padding_mode=padding_mode, lipschitz=2.0, dtype=torch.float64))
    shape = (3, 6, 8) if padding_mode == "circular" else (3, 7, 9)
    frozen = lp.freeze(block, shape)
    assert_equal(frozen, block, shape)
    assert lp.lipschitz_bound(frozen) == pytest.approx(2, rel=1e-6)
    one = torch.rand(shape, dtype=torch.float64)
    assert torch.allclose(frozen(one), block(one), atol=1e-12)


@pytest.mark.parametrize(
    "activation", [lp.MaxMin(pairs="neighbours"), lp.GroupSort(3), lp.Householder(6, order=2), nn.GELU()], ids=repr
)
def test_dense_blocks_keep_their_activation_and_any_leading_dimensions(activation: nn.Module):
    torch.manual_seed(0)
    block = stirred(lp.LDLTBlock(5, (6, 6), 4, activation=activation, lipschitz=3.0).double())
    frozen = lp.freeze(block)
    assert_equal(frozen, block, (5,))
    assert_equal(frozen, block, (2, 7, 5))
    assert lp.lipschitz_bound(frozen) == pytest.approx(3, rel=1e-6)


PARTS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (lp.Householder(5, order=2), (5,)),
    (lp.Householder(4, dim=-1), (3, 4)),
    (lp.ConvexResidual(nn.Sequential(lp.AOLLinear(4, 4), lp.MaxMin()), alpha=0.3), (4,)),
    (lp.Concatenate([lp.AOLLinear(4, 2), nn.Identity()]), (4,)),
    (nn.Sequential(lp.Normalize([0.1, 0.2], [0.5, 2.0]), lp.Scale(0.7)), (2, 4, 4)),
    (nn.Sequential(lp.BatchCentering(2), lp.PositionEmbedding((2, 4, 4))), (2, 4, 4)),
    (nn.Sequential(lp.ScaledAvgPool2d(2), lp.SpatialShift2d(), lp.GlobalL2Pool2d()), (4, 4, 6)),
    (nn.Sequential(lp.Patchify2d(2), lp.PadChannels(20), lp.L2Pool2d(2), lp.BetaAbs(), lp.Abs()), (4, 4, 8)),
    (lp.LipNeXtBlock(5, (4, 3)), (5, 4, 3)),
    (lp.LipNeXtBlock(5, rotate=False), (5, 4, 3)),
    (nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), lp.SLLConv2dBlock(3, 5, padding_mode="circular")), (3, 5, 4)),
    (lp.CPLConv2dBlock(3, 4, activation=nn.Tanh()), (3, 5, 4)),
    (lp.LBDN(4, (5, 3), 2, learnable=True), (4,)),
]


@pytest.mark.parametrize(
    ("part", "shape"),
    PARTS,
    ids=[type(part[0] if isinstance(part, nn.Sequential) else part).__name__ for part, _ in PARTS],
)
def test_activations_containers_pooling_and_offsets_freeze(part: nn.Module, shape: tuple[int, ...]):
    part = stirred(copy.deepcopy(part).double())
    frozen = lp.freeze(part, shape)
    assert_equal(frozen, part, shape)
    bound = lp.lipschitz_bound(frozen, shape)
    assert worst_norm(frozen, shape, nonlinear=True) <= bound * (1 + 1e-9)
    assert bound <= lp.lipschitz_bound(part, shape) * (1 + 1e-6)


def test_the_weights_that_run_are_those_of_the_model_or_computed_in_the_dtype_asked_for():
    torch.manual_seed(0)
    model = stirred(nn.Sequential(lp.BROLinear(6, 6), lp.MaxMin(), lp.BROLinear(6, 4)))
    exact = lp.freeze(model).double()
    assert torch.equal(exact[0].weight, model[0].weight.double())
    computed = lp.freeze(model, dtype=torch.float64)
    assert_equal(computed, copy.deepcopy(model).double(), (6,))
    assert not torch.equal(computed[0].weight, exact[0].weight)
    assert model[0].raw.dtype == torch.float32
    with pytest.raises(ArgumentError, match=r"dtype=torch\.int64"):
        lp.freeze(model, dtype=torch.int64)


@pytest.mark.parametrize("family", ["bro", "soc"])
def test_weights_per_frequency_may_be_cast(family: str):
    layer, shape = example(family, "conv", padding_mode="circular")
    frozen = lp.freeze(stirred(layer), shape)
    x = torch.rand(2, *shape)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.1)):
        cast = copy.deepcopy(frozen).to(dtype)
        assert torch.allclose(cast(x.to(dtype)).float(), layer(x), atol=tolerance)


# Layers per frequency without transforms ------------------------------------------------------------------------------


def fourier(dtype: torch.dtype = torch.float32) -> FrozenFourierConv2d:
    torch.manual_seed(0)
    layer = lp.BROConv2d(3, 4, 3, stride=2, padding=1, dtype=torch.float32)
    return lp.freeze(layer, (3, 7, 6)).to(dtype)


MATRICES = ("width_in", "height_in", "height_out", "width_out")


def test_a_cast_layer_has_the_matrices_of_its_new_precision_and_the_same_state():
    frozen = fourier()
    assert set(frozen.state_dict()) == {"transfer", "bias"}
    fresh = fourier(torch.float64)
    again = copy.deepcopy(fresh).float().double()
    for name in MATRICES:
        assert frozen.get_buffer(name).dtype == torch.float32
        assert torch.equal(again.get_buffer(name), fresh.get_buffer(name))
    assert fourier(torch.bfloat16).width_in.dtype == torch.float32
    frozen.load_state_dict(fresh.state_dict())
    x = torch.randn(2, 3, 7, 6)
    torch.testing.assert_close(frozen(x), fresh(x.double()).float())


def test_the_matrices_are_as_close_to_the_exact_ones_as_stated():
    """Those of float64 are compared with exact ones where they are made."""
    double, single = fourier(torch.float64), fourier()
    assert set(double.constant_errors()) == set(MATRICES)
    for name in MATRICES:
        assert 0 < double.constant_errors()[name] < 1e-13
        distance = (double.get_buffer(name) - single.get_buffer(name).double()).norm().item()
        assert distance <= single.constant_errors()[name] <= distance + 1e-13
    double.width_in[0, 0] += 0.5
    assert double.constant_errors()["width_in"] >= 0.5
    assert lp.AOLLinear(2, 2).constant_errors() == {}


def test_the_matrices_are_parts_of_isometries():
    frozen = fourier(torch.float64)
    for matrix in (
        frozen.width_in,
        frozen.width_out,
        *map(torch.view_as_complex, (frozen.height_in, frozen.height_out)),
    ):
        singular = torch.linalg.svdvals(matrix)
        assert singular.max() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("batch", [0, 1, 16, 17, 50])
def test_batches_of_every_size_have_the_values_of_their_samples(batch: int):
    frozen = fourier(torch.float64)
    x = torch.randn(batch, 3, 7, 6, dtype=torch.float64)
    y = frozen(x)
    assert y.shape == (batch, 4, 4, 3)
    for one, expected in zip(x, y, strict=True):
        torch.testing.assert_close(frozen(one), expected)


def test_a_compiled_layer_per_frequency_computes_the_same():
    frozen = fourier(torch.float64)
    x = torch.randn(20, 3, 7, 6, dtype=torch.float64)
    compiled = torch.compile(frozen, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), frozen(x))


def test_an_output_beyond_the_grid_is_refused():
    place = Placement((4, 4), ((0, 0), (0, 0)), (1, 1), (0, 0), (5, 4))
    with pytest.raises(ShapeError, match=r"\(5, 4\) does not fit on the grid \(4, 4\)"):
        FrozenFourierConv2d(torch.ones(4, 3, 1, 1, dtype=torch.complex64), None, (4, 4), place)


# Whole models ---------------------------------------------------------------------------------------------------------


class Custom(nn.Module):
    """Uses a layer twice, shares one, mixes in torch's own, and reads a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = lp.AOLConv2d(3, 4, 3, padding=1)
        self.twice = lp.BROConv2d(4, 4, 3, padding=1)
        self.alias = self.twice
        self.activation = lp.Householder(4)
        self.blocks = nn.ModuleDict({"a": lp.SLLConv2dBlock(4), "b": lp.LDLTConv2dBlock(4, activation=self.activation)})
        self.norm = nn.BatchNorm2d(4)
        self.head = lp.NormalizedLinear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.twice(self.activation(self.stem(x))))
        x = 0.5 * (x + self.alias(x))
        for block in self.blocks.values():
            x = block(x)
        return self.norm(x).mean((2, 3)) @ self.head.weight.mT


def test_a_custom_model_keeps_its_forward_its_names_and_what_it_shares():
    torch.manual_seed(0)
    model = stirred(Custom().double())
    frozen = lp.freeze(model, (3, 6, 5))
    assert_equal(frozen, model, (3, 6, 5))
    assert [name for name, _ in frozen.named_children()] == [name for name, _ in model.named_children()]
    assert frozen.alias is frozen.twice
    assert frozen.blocks["b"].activation is frozen.activation
    assert type(frozen.twice) is FrozenFourierConv2d
    assert type(frozen.stem) is nn.Conv2d
    assert type(frozen.blocks["a"]) is FrozenResidualBlock


def test_the_bound_of_a_frozen_custom_forward_is_traced():
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.out = lp.BROConv2d(2, 2, 3, padding=1), lp.SLLConv2dBlock(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(0.5 * (x + self.block(x)))

    frozen = lp.freeze(Averaged().double(), (2, 5, 4))
    assert lp.lipschitz_bound(frozen, (2, 5, 4)) == pytest.approx(1, rel=1e-9)


def test_freezing_is_apart_from_the_model_in_both_directions():
    torch.manual_seed(0)
    model = nn.Sequential(lp.BROLinear(4, 4), nn.Linear(4, 4), lp.PositionEmbedding((4,))).train()
    model(torch.ones(2, 4)).sum().backward()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    frozen = lp.freeze(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in frozen.parameters())
    expected = frozen(torch.ones(2, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2).add_(1)
        assert torch.equal(frozen(torch.ones(2, 4)), expected)
        for p in frozen.parameters():
            p.zero_()
        model.load_state_dict(before)
        assert torch.allclose(model.eval()(torch.ones(2, 4)), expected, atol=1e-6)


@every
def test_a_frozen_layer_survives_deepcopy_pickle_its_state_and_freezing_again(family: str, role: str):
    layer, shape = example(family, role, torch.float64)
    frozen = lp.freeze(stirred(layer), shape)
    buffer = io.BytesIO()
    torch.save(frozen, buffer)
    buffer.seek(0)
    other = lp.freeze(example(family, role, torch.float64)[0], shape)
    other.load_state_dict(frozen.state_dict())
    for copied in (copy.deepcopy(frozen), torch.load(buffer, weights_only=False), other, lp.freeze(frozen)):
        assert_equal(copied, frozen, shape)
        assert lp.lipschitz_bound(copied, shape) == lp.lipschitz_bound(frozen, shape)


# What cannot be frozen ------------------------------------------------------------------------------------------------


class Parametrised(ParametrizedModule):
    """A layer with a forward of its own, about which freezing knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = self.new_parameter((3,))
        nn.init.ones_(self.raw)

    def map_weight(self, raw: Tensor) -> Tensor:
        return raw.tanh()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.effective()


class Doubling(lp.AOLLinear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Shifting(lp.BROConv2d):
    def convolve(self, x: Tensor, out: tuple[int, int]) -> Tensor:
        return super().convolve(x, out).roll(1, -1)


class Multiplier(nn.Module):
    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.register_buffer("factors", factors)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


class Stated(Parametrised):
    def frozen(self, shape: tuple[int, ...] | None) -> nn.Module:
        return Multiplier(self.effective().clone())


class Gain(LipschitzModule):
    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.logit.sigmoid()


def hooked() -> nn.Module:
    layer = lp.AOLLinear(3, 3)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Parametrised, "Parametrised"),
        (Gain, "Gain"),
        (lambda: Doubling(3, 3), "its forward is not that of LipschitzLinear"),
        (lambda: Shifting(3, 3, 3), "its convolve is not that of FourierConv2d"),
        (hooked, "hooks"),
        (lambda: register_parametrization(nn.Linear(3, 3), "weight", nn.Tanh()), "remove_parametrizations"),
        (lambda: nn.utils.weight_norm(nn.Linear(3, 3)), "hooks"),
        (lambda: lp.BROConv2d(3, 3, 3), "input_shape"),
        (lambda: lp.SOCConv2d(3, 3, 3), "input_shape"),
        (lambda: lp.LDLTConv2dBlock(3), "input_shape"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_what_cannot_be_frozen_is_named_by_path_and_type(make: Callable[[], nn.Module], says: str):
    model = nn.Sequential(lp.MaxMin(), nn.ModuleDict({"inner": make()}))
    with pytest.raises(ArgumentError, match=r"^1\.inner \(") as caught:
        lp.freeze(model)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_layer_may_state_what_it_becomes():
    model = nn.Sequential(Stated(), nn.ReLU())
    assert_equal(lp.freeze(model), model, (3,), torch.float32)
    assert type(lp.freeze(model)[0]) is Multiplier


def test_a_stated_form_that_keeps_a_parametrisation_is_refused():
    class Lazy(Parametrised):
        def frozen(self, shape: tuple[int, ...] | None) -> nn.Module:
            return nn.Sequential(copy.deepcopy(self))

    with pytest.raises(ArgumentError, match="left a parametrisation"):
        lp.freeze(Lazy())


@pytest.mark.parametrize("make", [lp.BROConv2d, lp.SOCConv2d, lambda i, *_: lp.SandwichConv2dBlock(i)])
def test_another_size_of_image_raises(make: Callable):
    frozen = lp.freeze(nn.Sequential(make(3, 3, 3)), (3, 6, 5))
    for shape in ((1, 3, 5, 6), (1, 4, 6, 5), (6, 5)):
        with pytest.raises(ShapeError, match=r"\(N, 3, 6, 5\)"):
            frozen(torch.zeros(shape))


def test_a_layer_on_images_of_several_sizes_or_of_none_raises():
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.unused = lp.BROConv2d(2, 2, 3, padding=1), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x)[..., ::2, ::2])

    with pytest.raises(ArgumentError, match=r"conv \(BROConv2d\): got inputs of the shapes \(\d, 4, 4\), \(\d, 8, 8\)"):
        lp.freeze(Pyramid(), (2, 8, 8))
    model = Pyramid()
    model.conv, model.unused = nn.Conv2d(2, 2, 1), lp.BROConv2d(2, 2, 3)
    with pytest.raises(ArgumentError, match=r"unused \(BROConv2d\): got no input"):
        lp.freeze(model, (2, 8, 8))
    with pytest.raises(ShapeError, match="does not accept inputs"):
        lp.freeze(model, (3, 8, 8))


# Bounds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.1, 4.0, -1.0])
@every
def test_weights_changed_after_freezing_change_the_bound(family: str, role: str, factor: float):
    layer, shape = example(family, role, torch.float64)
    frozen = lp.freeze(stirred(layer), shape)
    factor = 1.1 if type(frozen) is FrozenLMIBlock else factor  # its multipliers prove no more
    with torch.no_grad():
        for p in frozen.parameters():
            if p.dim() > 1:
                p.mul_(factor)
    bound = lp.lipschitz_bound(frozen, shape)
    assert worst_norm(frozen, shape, nonlinear=role.endswith("_block")) <= bound * (1 + 1e-9)


def test_a_residual_block_is_bounded_beyond_its_own_form():
    torch.manual_seed(0)
    frozen = lp.freeze(stirred(lp.SLLBlock(5, 7, dtype=torch.float64)))
    with torch.no_grad():
        frozen.outgoing.weight.add_(0.3 * torch.randn(5, 7, dtype=torch.float64))
    bound = lp.lipschitz_bound(frozen)
    assert 1.05 < worst_norm(frozen, (5,), nonlinear=True) <= bound < 4


def test_a_polynomial_of_what_is_not_skew_has_no_bound():
    frozen = lp.freeze(lp.SOCConv2d(2, 2, 3, padding=1), (2, 5, 5))
    assert type(frozen) is FrozenPolynomialConv2d
    with torch.no_grad():
        frozen.kernel[0, 1, 0, 0] += 0.5
    with pytest.raises(UnknownBoundError, match="not skew"):
        lp.lipschitz_bound(frozen)


def test_another_activation_in_a_frozen_block_is_refused():
    for block in (lp.SLLBlock(4), lp.SandwichBlock(4)):
        frozen = lp.freeze(block)
        frozen.activation = nn.GELU()
        with pytest.raises(ArgumentError, match="slopes in"):
            lp.lipschitz_bound(frozen)


def test_multipliers_prove_and_do_not_run():
    frozen = lp.freeze(lp.LDLTBlock(4, 6, dtype=torch.float64))
    assert type(frozen) is FrozenLMIBlock
    x = torch.rand(2, 4, dtype=torch.float64)
    before = frozen(x)
    frozen.multiplier_1.fill_(1e6)
    assert torch.equal(frozen(x), before)
    with pytest.raises(UnknownBoundError, match="multipliers prove no bound"):
        lp.lipschitz_bound(frozen)


def test_half_precision_inside_autocast_counts_in_the_bound_of_a_block():
    torch.manual_seed(0)
    frozen = lp.freeze(stirred(lp.SLLBlock(8)))
    with torch.autocast("cpu", torch.bfloat16):
        assert lp.lipschitz_bound(frozen) > 1 + 1e-4


def test_a_head_is_found_behind_a_frozen_body():
    model = nn.Sequential(lp.BROLinear(6, 6), lp.MaxMin(), lp.NormalizedLinear(6, 3))
    ours, theirs = lp.split_head(lp.freeze(model)), lp.split_head(model)
    assert ours.body_bound == pytest.approx(theirs.body_bound, rel=1e-6)
    assert torch.allclose(ours.margin_lipschitz(3), theirs.margin_lipschitz(3), rtol=1e-6)


def test_a_transposed_convolution_of_torch_is_bounded_by_its_adjoint():
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), 1, (1, 0), groups=2, dtype=torch.float64)
    measured = worst_norm(up, (4, 5, 6), nonlinear=False)
    assert measured <= lp.lipschitz_bound(up) <= 1.3 * measured


# Bounds in exact arithmetic -------------------------------------------------------------------------------------------


SCALES = [1.0, 1e-160, 1e-310, 1e150]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("family", ["bro", "cayley", "lot"])
def test_no_matrix_of_a_layer_per_frequency_exceeds_its_bound_in_exact_arithmetic(family: str, scale: float):
    torch.manual_seed(0)
    frozen = lp.freeze(stirred(lp.get_layer(family, "conv")(2, 2, 3, padding=1)), (2, 3, 2)).double()
    with torch.no_grad():
        frozen.transfer.mul_(scale)
    bound = lp.lipschitz_bound(frozen)
    for W in frozen.matrices().flatten(0, 1):
        assert exceeds_norm(bound, W)


def residual_block(W: Tensor, V: Tensor) -> FrozenResidualBlock:
    """y = x − Vᵀ relu(Wx)."""
    frozen = lp.freeze(lp.SLLBlock(W.shape[1], W.shape[0], bias=False, dtype=torch.float64))
    with torch.no_grad():
        frozen.inner[0].weight.copy_(W)
        frozen.outgoing.weight.copy_(-V.T)
    return frozen


PAIRS: dict[str, tuple[list[list[float]], list[list[float]]]] = {
    "one number": ([[1.1]], [[1.9]]),
    "at the edge": ([[0.1]], [[20.0]]),
    "beyond": ([[0.3]], [[11.0]]),
    "of its form": ([[1.0, 0.3], [0.2, -0.7]], [[0.7, 0.21], [0.1, -0.35]]),
    "not of its form": ([[1.0, 0.3], [0.2, -0.7]], [[-0.7, 1.1], [0.0, 0.0]]),
    "opposite": ([[0.3]], [[-0.7]]),
    "tiny times huge": ([[1e-150, 2e-150]], [[3e150, 6e150]]),
    "subnormal": ([[3e-310, 1e-312]], [[1e300, 1e300]]),
    "zero rows": ([[0.0, 0.0], [1.0, 2.0]], [[1.0, 1.0], [0.1, 0.2]]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_no_slopes_take_a_residual_block_beyond_its_bound_in_exact_arithmetic(name: str):
    """The norm of I − VᵀDW is convex in D: its largest value is at slopes of 0 and 1."""
    W, V = (torch.tensor(rows, dtype=torch.float64) for rows in PAIRS[name])
    bound = lp.lipschitz_bound(residual_block(W, V))
    exact_W, exact_V = rows_of(W), rows_of(V)
    for slopes in product((0, 1), repeat=len(W)):
        J = [[fmpq(int(i == j)) for j in range(W.shape[1])] for i in range(W.shape[1])]
        for i, j in product(range(W.shape[1]), repeat=2):
            J[i][j] -= sum((d * v[i] * w[j] for d, v, w in zip(slopes, exact_V, exact_W, strict=True)), fmpq(0))
        assert exceeds_norm(bound * (1 + 2**-52), J)


def test_a_residual_block_within_its_form_keeps_its_bound():
    for name, expected in (("of its form", 1), ("at the edge", 1), ("beyond", 2.3)):
        W, V = (torch.tensor(rows, dtype=torch.float64) for rows in PAIRS[name])
        assert lp.lipschitz_bound(residual_block(W, V)) == pytest.approx(expected, rel=1e-13)


def test_the_bound_of_a_polynomial_holds_for_angles_up_to_the_norm_of_its_kernel():
    torch.manual_seed(0)
    frozen = lp.freeze(stirred(lp.SOCConv2d(2, 2, (1, 3), padding=(0, 1))), (2, 1, 6)).double()
    for factor in (1.0, 1.5, 40.0):
        with torch.no_grad():
            frozen.kernel.mul_(factor)
        bound = lp.lipschitz_bound(frozen)
        c = [rational(x) for x in frozen.coefficients]
        pixels = torch.eye(12, dtype=torch.float64).view(12, 2, 1, 6)
        L = rows_of(torch.nn.functional.conv2d(pixels, frozen.kernel, padding=(0, 1)).flatten(1).T)
        power = [[fmpq(int(i == j)) for j in range(12)] for i in range(12)]
        value = [[fmpq(0)] * 12 for _ in range(12)]
        for coefficient in c:
            value = [
                [v + coefficient * p for v, p in zip(*rows, strict=True)] for rows in zip(value, power, strict=True)
            ]
            columns = list(zip(*power, strict=True))
            power = [
                [sum((a * b for a, b in zip(row, column, strict=True)), fmpq(0)) for column in columns] for row in L
            ]
        assert exceeds_norm(bound, value)


def test_folds_and_residual_connections_are_rounded_upward():
    generator = torch.Generator().manual_seed(0)
    mirrors = torch.randn(3, 2, 40, dtype=torch.float64, generator=generator)
    squares = [max(Fraction(p) ** 2 + Fraction(q) ** 2 for p, q in fold.T.tolist()) for fold in mirrors]
    exact = max(1, 2 * squares[0] - 1) * max(1, 2 * squares[1] - 1) * max(1, 2 * squares[2] - 1)
    assert exact <= Fraction(FrozenHouseholder(mirrors, 80, 1).lipschitz_bound()) <= exact * (1 + Fraction(1, 2**51))
    for alpha, factor in ((0.1, 0.3), (0.7, 3.3), (1e-17, 1.1)):
        frozen = FrozenResidual(lp.Scale(factor), torch.tensor(alpha, dtype=torch.float64))
        exact = Fraction(1 - alpha) + Fraction(alpha) * Fraction(factor)
        assert exact <= Fraction(lp.lipschitz_bound(frozen)) <= exact * (1 + Fraction(1, 2**51))


# To files -------------------------------------------------------------------------------------------------------------


def small() -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    net = nn.Sequential(
        lp.Normalize([0.5] * 3, [0.25] * 3),
        lp.AOLConv2d(3, 8, 4, padding="same", padding_mode="circular"),
        lp.MaxMin(),
        lp.BCOPConv2d(8, 8, 3, padding=1),
        lp.GroupSort(2),
        lp.SLLConv2dBlock(8),
        lp.L2Pool2d(4),
        nn.Flatten(),
        lp.Householder(32),
        lp.ConvexResidual(lp.BjorckLinear(32, 32)),
        lp.LDLTBlock(32, 8, activation=lp.MaxMin(pairs="neighbours")),
        lp.NormalizedLinear(32, 5),
    )
    return stirred(net), (3, 8, 8)


def test_a_program_runs_where_liplayers_is_not_installed(tmp_path: Path):
    model, shape = small()
    frozen = lp.freeze(model, shape)
    x = torch.rand(5, *shape)
    lp.export_program(frozen, shape, tmp_path / "net.pt2")
    torch.save({"x": x, "y": frozen(x)}, tmp_path / "pair.pt")
    code = (
        "import sys; sys.modules['liplayers'] = None; import torch; "
        "pair = torch.load('pair.pt'); net = torch.export.load('net.pt2').module(); "
        "assert torch.allclose(net(pair['x']), pair['y'], atol=1e-5)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.pt2", "pair.pt"]


def test_safetensors_hold_the_weights_and_load_again(tmp_path: Path):
    safetensors = pytest.importorskip("safetensors.torch", reason="the extra liplayers[export] is not installed")
    model, shape = small()
    frozen = lp.freeze(model)
    lp.export_safetensors(frozen, tmp_path / "new" / "net.safetensors")
    other = lp.freeze(small()[0].apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None))
    with torch.no_grad():
        assert not torch.allclose(other(torch.ones(1, *shape)), frozen(torch.ones(1, *shape)), atol=1e-3)
    other.load_state_dict(safetensors.load_file(tmp_path / "new" / "net.safetensors"))
    assert_equal(other, frozen, shape, torch.float32)


def onnx_runtime() -> Any:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="the extra liplayers[export] is not installed")
    return pytest.importorskip("onnxruntime", reason="the extra liplayers[export] is not installed")


@pytest.mark.parametrize("make", [small, lambda: example("bro", "conv"), lambda: example("soc", "conv")])
def test_onnx_runtime_computes_the_same_for_every_batch(make: Callable, tmp_path: Path):
    runtime = onnx_runtime()
    model, shape = make()
    frozen = lp.freeze(stirred(model), shape)
    lp.export_onnx(frozen, tmp_path / "net.onnx", shape)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 7):
        x = torch.randn(batch, *shape)
        (y,) = session.run(["y"], {"x": x.numpy()})
        assert torch.allclose(torch.from_numpy(y), model(x), atol=1e-4)


def test_layers_per_frequency_and_dense_ones_run_in_onnx_in_double_precision(tmp_path: Path):
    runtime = onnx_runtime()
    model = nn.Sequential(lp.BROConv2d(3, 4, 3, padding=1), lp.MaxMin(), nn.Flatten(), lp.AOLLinear(4 * 6 * 5, 3))
    frozen = lp.freeze(stirred(model), (3, 6, 5)).double()
    lp.export_onnx(frozen, tmp_path / "net.onnx", (3, 6, 5))
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(20, 3, 6, 5, dtype=torch.float64)
    (y,) = session.run(["y"], {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(y), frozen(x), atol=1e-12)


EXPORTS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "torch.export": lambda m, path: lp.export_program(m, (3,), path),
    "onnx": lambda m, path: lp.export_onnx(m, path, (3,)),
    "safetensors": lambda m, path: lp.export_safetensors(m, path),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_what_is_not_frozen_is_not_exported(name: str, tmp_path: Path):
    if name != "torch.export":
        onnx_runtime(), pytest.importorskip("safetensors")
    with pytest.raises(ArgumentError, match=r"0 \(AOLLinear\): it is not frozen"):
        EXPORTS[name](nn.Sequential(lp.AOLLinear(3, 3)).eval(), tmp_path / "net")
    with pytest.raises(ArgumentError, match="in training mode"):
        EXPORTS[name](nn.Linear(3, 3), tmp_path / "net")
    assert not list(tmp_path.iterdir())


class Drifting(nn.Module):
    """Computes something else in every call: what was exported is not what runs."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return x + type(self).calls


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_an_export_that_differs_or_fails_leaves_the_earlier_file(tmp_path: Path):
    path = tmp_path / "net.pt2"
    path.write_text("earlier")
    for model, says in ((Drifting(), r"differs by [\d.]+ on a batch of 1"), (Branching(), "cannot export this model")):
        with pytest.raises(ExportError, match=says) as caught:
            lp.export_program(model.eval(), (3,), path)
        assert "\n" not in str(caught.value)
    assert path.read_text() == "earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt2"]


def test_a_folder_that_is_a_file_is_an_output_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"net\.pt2: cannot be written"):
        lp.export_program(lp.freeze(lp.AOLLinear(3, 3)), (3,), tmp_path / "file" / "net.pt2")


@pytest.mark.parametrize(("name", "package"), [("onnx", "onnxruntime"), ("safetensors", "safetensors")])
def test_a_missing_package_names_the_extra(name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.torch", None)
    with pytest.raises(MissingPackageError, match=rf"{package} is not installed: .*liplayers\[export\]"):
        EXPORTS[name](lp.freeze(lp.AOLLinear(3, 3)), tmp_path / "net")


def test_residual_connections_freeze_to_a_buffer():
    frozen = lp.freeze(lp.ConvexResidual(lp.AOLLinear(3, 3), alpha=0.25))
    assert type(frozen) is FrozenResidual
    assert frozen.alpha.item() == pytest.approx(0.25)


def test_a_frozen_block_refuses_an_activation_that_couples_other_channels():
    """Its multipliers are free for Abs; with MaxMin the same weights exceed the bound that they would prove."""
    block = lp.LDLTSequential(4, activation=lp.Abs(), dtype=torch.float64)
    with torch.no_grad():
        block.get_parameter("log_multiplier").copy_(torch.tensor([3.0, 3.0, -3.0, -3.0]))
    frozen = lp.freeze(block)
    assert lp.lipschitz_bound(frozen) == 1
    frozen.activation = lp.MaxMin()
    with pytest.raises(ArgumentError, match="couples channels"):
        lp.lipschitz_bound(frozen)
    tied = lp.freeze(lp.LDLTSequential(4, activation=lp.MaxMin()))
    assert lp.lipschitz_bound(tied) == 1
