"""What a layer proves is a fact about what runs: its settings, its parameters' kinds, where frozen ones lie.

And what else a layer has to take: empty batches, zeros, depth, sharding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from audit import EVERY, example
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import liplayers as lp
from liplayers.checkpoint import widen_scalars
from liplayers.core.module import SettledModule
from liplayers.errors import ArgumentError, LipschitzError, SettledError, ShapeError, UnknownBoundError
from liplayers.modules.frozen import FrozenFourierConv2d, FrozenPolynomialConv2d, Placement
from liplayers.testing.measure import operator_norm

REGISTERED = pytest.mark.parametrize(("family", "role"), EVERY, ids=["-".join(e) for e in EVERY])
IMAGE = (4, 6, 6)
FIXED: list[Callable[[], nn.Module]] = [
    lambda: lp.MaxMin(),
    lambda: lp.GroupSort(3),
    lambda: lp.BetaAbs(),
    lambda: lp.Householder(4),
    lambda: lp.ScaledAvgPool2d(2),
    lambda: lp.L2Pool2d(2),
    lambda: lp.MaxPool2d(2),
    lambda: lp.GlobalL2Pool2d(),
    lambda: lp.PadChannels(6),
    lambda: lp.Patchify2d(2),
    lambda: lp.PositionEmbedding(IMAGE),
    lambda: lp.BatchCentering(4),
    lambda: lp.Scale(2.0),
    lambda: lp.Normalize([0.5] * 4, [0.5] * 4),
    lambda: lp.SpatialShift2d(),
    lambda: lp.ConvexResidual(nn.ReLU()),
    lambda: lp.Concatenate([nn.Identity(), lp.AOLConv2d(4, 3, 3, padding=1)]),
]


def every_module() -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
    """A small module of every kind, as it is and frozen, with the shape of an input."""
    for build in FIXED:
        yield build(), IMAGE
    for family, role in EVERY:
        yield example(family, role)
    for family, role in [("bro", "conv"), ("soc", "conv"), ("sll", "conv_block"), ("ldlt", "conv_block")]:
        layer, shape = example(family, role)
        yield lp.freeze(layer, shape), shape
    yield lp.freeze(lp.Householder(4)), IMAGE
    yield lp.freeze(lp.ConvexResidual(nn.ReLU())), IMAGE


# Settings -------------------------------------------------------------------------------------------------------------


def settings_of(module: nn.Module) -> list[str]:
    """What a constructor put into a module beside parameters, buffers and modules, and properties computed from it."""
    state = {*vars(nn.Module()), "_kept"}
    given = [name for name in vars(module) if name not in state]
    rules = [n for cls in type(module).__mro__ for n, v in vars(cls).items() if isinstance(v, property) and not v.fset]
    return [*given, *rules]


def test_no_setting_can_be_changed_after_construction():
    count = 0
    for module, shape in every_module():
        x = torch.randn(2, *shape)
        before, bound = module.eval()(x), lp.lipschitz_bound(module)
        for part in module.modules():
            for name in settings_of(part) if isinstance(part, SettledModule) else ():
                count += 1
                for change in (lambda p, n: setattr(p, n, 7), lambda p, n: setattr(p, n, None), delattr):
                    with pytest.raises(SettledError, match=f"{name} cannot be changed.*build a new layer") as caught:
                        change(part, name)
                    assert "\n" not in str(caught.value)
                    assert isinstance(caught.value, AttributeError)
        assert torch.equal(module(x), before)
        assert lp.lipschitz_bound(module) == bound
    assert count > 300


@pytest.mark.parametrize("make", [lp.AOLConv2d, lp.AOCConv2d, lp.RKOConv2d, lp.BROConv2d])
def test_a_cached_weight_does_not_outlive_its_geometry(make: Callable[..., nn.Module]):
    layer = make(2, 8, 2, stride=2, bias=False, dtype=torch.float64).eval().requires_grad_(False)
    layer(torch.randn(1, 2, 6, 6).double())
    for name, value in {"stride": (1, 1), "dilation": (2, 2), "padding": (2, 2), "padding_mode": "reflect"}.items():
        with pytest.raises(SettledError):
            setattr(layer, name, value)
    assert operator_norm(layer, (2, 6, 6)) <= 1 + 1e-9


def test_another_adjoint_brings_its_own_geometry():
    layer = lp.RKOConvTranspose2d(3, 2, 2, stride=1, bias=False, dtype=torch.float64)
    layer.adjoint = lp.RKOConv2d(2, 3, 2, stride=2, dtype=torch.float64)  # orthogonal for its own stride only
    with torch.no_grad():
        layer.adjoint.raw.copy_(torch.ones_like(layer.adjoint.raw))
    assert layer.stride == (2, 2)
    assert operator_norm(layer, (3, 4, 4)) <= lp.lipschitz_bound(layer) * (1 + 1e-9)


def test_another_activation_in_a_block_is_refused_by_its_bound():
    block = lp.LipNeXtBlock(4)
    block.activation = nn.LeakyReLU(5.0)
    with pytest.raises(UnknownBoundError, match="activation was replaced"):
        lp.lipschitz_bound(block)


@REGISTERED
def test_parameters_of_another_shape_are_refused(family: str, role: str):
    layer, shape = example(family, role)
    for part in layer.modules():
        for name, p in list(part._parameters.items()):
            if p is None:
                continue
            with pytest.raises(ShapeError, match=f"{name} is of shape"):
                setattr(part, name, nn.Parameter(torch.zeros(2, *p.shape)))
    raw = next(p for p in layer.parameters() if p.dim() > 1)
    raw.data = torch.zeros(*raw.shape, 2)
    with pytest.raises(ShapeError, match="expected"):
        layer(torch.randn(1, *shape))


@pytest.mark.parametrize("make", [lambda: lp.BROConv2d(1, 1, 3, padding=1), lambda: lp.LDLTConv2dBlock(1)])
def test_a_bias_of_another_shape_does_not_multiply_the_output(make: Callable[[], nn.Module]):
    layer = make()
    layer.bias.data = torch.zeros(5)
    with pytest.raises((RuntimeError, ValueError)):
        layer(torch.randn(1, 1, 5, 5))


@pytest.mark.parametrize(
    ("module", "name", "shape"),
    [
        (lp.PositionEmbedding((1, 3, 3)), "position", (2, 1, 1, 3, 3)),
        (lp.BatchCentering(1), "running_mean", (5,)),
        (lp.Normalize([0.5], [0.5]), "std", (5,)),
        (lp.Normalize([0.5], [0.5]), "mean", (5,)),
    ],
)
def test_an_offset_of_another_shape_is_refused(module: nn.Module, name: str, shape: tuple[int, ...]):
    getattr(module.eval(), name).data = torch.ones(shape)
    with pytest.raises(ShapeError):
        module(torch.zeros(1, 1, 3, 3))


@pytest.mark.parametrize("factor", [math.nan, math.inf, "2", None, True, torch.ones(2)])
def test_a_factor_is_a_finite_number(factor: Any):
    with pytest.raises(ArgumentError, match="factor="):
        lp.Scale(factor)


# Frozen layers --------------------------------------------------------------------------------------------------------


def orthogonal_transfer(grid: tuple[int, int], channels: int) -> Tensor:
    A = torch.randn(grid[0], grid[1] // 2 + 1, channels, channels, dtype=torch.complex128)
    return torch.linalg.qr(A)[0]


def test_no_placement_makes_a_frozen_layer_exceed_its_bound():
    """Images and outputs of all sizes, put anywhere on small tori: what is accepted is measured."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    accepted = refused = 0
    for _ in range(150):
        image, grid, start = ((draw(low, high), draw(low, high)) for low, high in ((1, 5), (2, 5), (-4, 6)))
        pads = ((draw(0, 2), draw(0, 2)), (draw(-1, 1), draw(0, 1)))
        out, stride = (draw(1, 5), draw(1, 5)), (draw(1, 2), draw(1, 2))
        try:
            place = Placement(image, pads, stride, start, out)
            layer = FrozenFourierConv2d(orthogonal_transfer(grid, math.prod(stride)), None, grid, place)
        except ShapeError:
            refused += 1
            continue
        accepted += 1
        assert operator_norm(layer, (1, *image)) <= lp.lipschitz_bound(layer) * (1 + 1e-9), place
    assert accepted > 10
    assert refused > 50


def test_an_image_larger_than_the_grid_is_refused():
    place = Placement((5, 5), ((0, 0), (0, 0)), (1, 1), (0, 0), (4, 4))
    with pytest.raises(ShapeError, match=r"image of \(5, 5\) does not fit on the grid \(4, 4\)"):
        FrozenFourierConv2d(orthogonal_transfer((4, 4), 1), None, (4, 4), place)
    padded = Placement((4, 4), ((1, 0), (0, 0)), (1, 1), (0, 0), (4, 4))
    with pytest.raises(ShapeError, match=r"image of \(5, 4\)"):
        FrozenFourierConv2d(orthogonal_transfer((4, 4), 1), None, (4, 4), padded)
    with pytest.raises(ShapeError, match="transfer is of shape"):
        FrozenFourierConv2d(orthogonal_transfer((4, 4), 1), None, (5, 6), place)


@pytest.mark.parametrize("name", ["width_in", "height_in", "height_out", "width_out"])
@pytest.mark.parametrize(
    "change", [lambda t: t.mul_(2), lambda t: t.view(-1)[0].add_(1e-3), lambda t: t.fill_(math.nan)]
)
def test_a_changed_transform_is_refused(name: str, change: Callable[[Tensor], Tensor]):
    layer, shape = example("bro", "conv")
    frozen = lp.freeze(layer, shape)
    change(getattr(frozen, name))
    with pytest.raises(LipschitzError):
        lp.lipschitz_bound(frozen)


def test_a_polynomial_keeps_inside_its_image():
    layer, shape = example("soc", "conv", torch.float64)
    frozen = lp.freeze(layer, shape)
    place = frozen.placement
    for start, out in [((-1, 0), (2, 2)), ((0, 0), (50, 2)), ((5, 5), (3, 3))]:
        beyond = Placement(place.image, place.pads, place.stride, start, out)
        with pytest.raises(ShapeError, match="beyond the padded image"):
            FrozenPolynomialConv2d(frozen.kernel, frozen.coefficients, 3, 4, None, beyond)
    with pytest.raises(ArgumentError, match="finite"):
        FrozenPolynomialConv2d(frozen.kernel, (1.0, math.nan), 3, 4, None, place)
    one = Placement((1, 1), ((0, 0), (0, 0)), (1, 1), (0, 0), (1, 1))
    even = FrozenPolynomialConv2d(torch.zeros(1, 1, 2, 2), (1.0, 1.0), 1, 1, None, one)  # x would be broadcast
    with pytest.raises(UnknownBoundError, match="even sides"):
        lp.lipschitz_bound(even)


HOSTILE: list[Callable[[Any], Any]] = [
    lambda f: setattr(f.outgoing, "stride", (2, 2)),
    lambda f: setattr(f.outgoing, "padding_mode", "circular"),
    lambda f: setattr(f.inner[0], "padding_mode", "reflect"),
    lambda f: setattr(f.inner[0], "padding", (2, 2)),
    lambda f: setattr(f.inner[0], "dilation", (2, 2)),
    lambda f: setattr(f.inner[0], "groups", 2),
    lambda f: setattr(f, "skip", nn.Linear(6, 6)),
    lambda f: setattr(f, "skip", lp.Scale(3.0)),
    lambda f: setattr(f, "outgoing", nn.Sequential(f.outgoing, lp.Scale(3.0))),
    lambda f: f.inner.append(copy.deepcopy(f.inner[0])),
    lambda f: setattr(f.outgoing, "weight", nn.Parameter(f.outgoing.weight[:1])),
]


@pytest.mark.parametrize("change", HOSTILE)
def test_a_frozen_residual_block_whose_convolutions_were_changed_is_refused(change: Callable[[Any], Any]):
    layer, shape = example("sll", "conv_block")
    frozen = lp.freeze(layer, shape)
    assert lp.lipschitz_bound(frozen) < 1 + 1e-5
    change(frozen)
    with pytest.raises(LipschitzError):
        lp.lipschitz_bound(frozen)


def test_a_frozen_network_lies_on_one_grid():
    torch.manual_seed(0)
    block = lp.LDLTConv2dBlock(2, hidden_channels=(3, 3), dtype=torch.float64)
    frozen = lp.freeze(block, (2, 4, 4))
    assert lp.lipschitz_bound(frozen) == 1.0
    layers = {"first": frozen.inner[0], "second": frozen.inner[1], "outgoing": frozen.outgoing, "skip": frozen.skip}
    for name, part in layers.items():
        for moved in (shifted(part, (1, 0), part.grid), shifted(part, (0, 0), (part.grid[0], part.grid[1] - 1))):
            if moved is None:
                continue
            other = copy.deepcopy(frozen)
            owner, key = (other.inner, "01"[name == "second"]) if name in ("first", "second") else (other, name)
            setattr(owner, key, moved)
            with pytest.raises(LipschitzError):
                lp.lipschitz_bound(other)
    frozen.inner[1] = nn.Linear(3, 3)
    with pytest.raises(UnknownBoundError, match="consists of"):
        lp.lipschitz_bound(frozen)


def shifted(part: FrozenFourierConv2d, start: tuple[int, int], grid: tuple[int, int]) -> nn.Module | None:
    place = part.placement
    other = Placement(place.image, place.pads, place.stride, start, place.out)
    transfer = part.matrices()[:, : grid[1] // 2 + 1]
    try:
        return FrozenFourierConv2d(transfer, part.bias, grid, other)
    except ShapeError:
        return None


def test_float32_weights_exceed_the_constructed_bound_by_roundings_which_a_frozen_layer_counts():
    largest = 1.0
    for family, role in EVERY:
        if role == "linear":
            layer = getattr(lp.FAMILIES[family], role)(48, 48)
            for p in layer.parameters():
                nn.init.normal_(p, std=0.2)
            norm = torch.linalg.matrix_norm(layer.weight.detach().double(), 2).item()
            assert norm <= lp.lipschitz_bound(lp.freeze(layer)) * (1 + 1e-14)
            assert family == "manifold" or norm <= 1 + 1e-6
            largest = max(largest, norm) if family != "manifold" else largest
    assert largest > 1  # or lipschitz_bound() could say that it is about the weights that run


# Kinds of numbers -----------------------------------------------------------------------------------------------------

NO_DTYPES = [torch.complex64, torch.complex128, torch.int32, torch.bool, torch.float8_e4m3fn, torch.quint8, "float32"]


@pytest.mark.filterwarnings("ignore:Complex modules")
@REGISTERED
def test_only_real_numbers_are_parameters(family: str, role: str):
    for dtype in NO_DTYPES:
        with pytest.raises(ArgumentError, match=r"dtype=.*expected one of torch\.float64") as caught:
            example(family, role, dtype)
        assert "\n" not in str(caught.value)
    layer, shape = example(family, role)
    x = torch.randn(1, *shape)
    before = layer(x)
    for dtype in (torch.complex64, torch.float8_e5m2):
        with pytest.raises(ArgumentError, match="expected one of"):
            nn.Sequential(layer).to(dtype)
        assert torch.equal(layer(x), before)
    raw = next(p for p in layer.parameters() if p.dim() > 1)
    raw.data = raw.data.to(torch.complex64)
    with pytest.raises(ArgumentError, match="complex64"):
        layer(x)


@pytest.mark.parametrize(
    "make",
    [
        lp.LipNeXtBlock,
        lp.Householder,
        lp.BatchCentering,
        lambda size, dtype: lp.PositionEmbedding((size,), dtype=dtype),
    ],
)
def test_nor_are_others_the_parameters_of_what_is_no_family(make: Callable[..., nn.Module]):
    for dtype in NO_DTYPES:
        with pytest.raises(ArgumentError, match="dtype="):
            make(4, dtype=dtype)
    with pytest.raises(ArgumentError, match="complex64"):
        lp.ConvexResidual(nn.ReLU()).to(torch.complex64)


# Empty batches --------------------------------------------------------------------------------------------------------


def test_empty_batches_pass_forward_and_backward():
    for module, shape in [*every_module(), (lp.LBDN(5, (4, 4), 3, learnable=True), (5,))]:
        expected = module(torch.randn(2, *shape)).shape[1:]
        for training in (True, False):
            module.train(training).zero_grad()
            x = torch.empty(0, *shape, requires_grad=True)
            y = module(x)
            assert y.shape == (0, *expected), module
            y.sum().backward()
            assert x.grad is not None
            assert x.grad.shape == x.shape
            for p in module.parameters():
                assert not p.requires_grad or (p.grad is not None and not p.grad.any()), module
            with torch.no_grad():
                assert module(x).shape == y.shape


# Gradients ------------------------------------------------------------------------------------------------------------


def _extremes(p: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Where a division, a square or a reciprocal of raw parameters would leave the numbers."""
    generator, numbers = torch.Generator().manual_seed(0), torch.finfo(dtype)
    g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    rows = torch.arange(len(p)).view(-1, *[1] * (p.dim() - 1))
    return {
        "zeros": 0 * g,
        "zero rows": g * (rows % 2),
        "zero columns": g * (torch.arange(p.shape[1]).view(-1, *[1] * (p.dim() - 2)) % 2),
        "one entry": (torch.arange(p.numel()).view(p.shape) == 1).double(),
        "subnormal": g.sign() * numbers.tiny * 2**-10,
        "subnormal rows": torch.where(rows % 2 == 0, g * numbers.tiny * 2**-10, g),
        "least": g * numbers.tiny * 4,
        "small": g * numbers.tiny**0.8,
        "large": g * numbers.tiny**-0.8,
        "largest": g.sign() * numbers.max * 0.9,
        "rows of all sizes": g * 10.0 ** (60 * rows / len(p) - 30),
    }


@REGISTERED
def test_gradients_are_finite_wherever_parameters_are(family: str, role: str):
    """For a random functional: where the output is zero, the gradient of its square could hide what a layer does."""
    if family in ("manifold", "lipnext"):
        pytest.skip("its parameters are the weights that run, and its bound grows with them")
    broken = []
    for dtype in (torch.float32, torch.float64):
        layer, shape = example(family, role, dtype)
        matrices = [p for p in layer.parameters() if p.dim() > 1]
        x = torch.randn(2, *shape, dtype=dtype)
        for name in _extremes(matrices[0], dtype):
            with torch.no_grad():
                for p in matrices:
                    p.copy_(_extremes(p, dtype)[name])
            layer.zero_grad()
            y = layer(x)
            (y * torch.randn_like(y)).sum().backward()
            if not y.isfinite().all() or not all(p.grad.isfinite().all() for p in layer.parameters()):
                broken.append(f"{name} in {dtype}")
    assert not broken, broken


@pytest.mark.parametrize(
    "make", [lambda: lp.AOLConv2d(3, 3, 3), lambda: lp.RKOConv2d(3, 3, 3), lambda: lp.LBDN(4, (4,) * 6)]
)
def test_entries_of_zero_have_their_gradient(make: Callable[[], nn.Module]):
    layer = make()
    shape = (3, 5, 5) if isinstance(layer, lp.AOLConv2d | lp.RKOConv2d) else (4,)
    y = layer(torch.randn(8, *shape))
    (y * torch.randn_like(y)).sum().backward()
    p = layer.get_parameter("raw" if len(shape) == 3 else "raw_6")
    zeros = p.detach() == 0
    assert zeros.any()
    assert p.grad[zeros].abs().max() > 1e-3 * p.grad.abs().max()


# Depth ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lp.LBDN, lp.LDLTSequential, lp.LDLTBlock, lp.GershgorinBlock])
def test_networks_of_forty_layers_start_with_signals_and_gradients(make: Callable[..., nn.Module]):
    n = 32
    least, gains = {}, {}
    for depth in (5, 40):
        torch.manual_seed(0)
        net = make(n, (n,) * depth)
        x = torch.randn(64, n)
        y = net(x)
        gains[depth] = ((y - y.mean(0)).norm() / x.norm()).item()
        (y * torch.randn_like(y)).sum().backward()
        least[depth] = min(p.grad.norm().item() for p in net.parameters() if p.dim() > 1)
        assert lp.lipschitz_bound(net) <= 1 + 1e-6
    assert gains[40] > 0.1
    assert gains[40] > 0.8 * gains[5]
    assert least[40] > 0.1 * least[5] > 0


# One number -----------------------------------------------------------------------------------------------------------

SCALARS: list[tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = [
    (lambda: lp.CayleyLinear(4, 4), "gain", (4,)),
    (lambda: lp.CayleyConv2d(2, 2, 3), "gain", (2, 5, 5)),
    (lambda: lp.LBDN(4, learnable=True), "log_lipschitz", (4,)),
    (lambda: lp.ConvexResidual(nn.ReLU()), "logit", (4,)),
]


def test_no_parameter_is_a_scalar():
    for module, _ in every_module():
        assert all(p.dim() for p in module.parameters()), module


@pytest.mark.parametrize(("make", "name", "shape"), SCALARS)
def test_older_checkpoints_with_scalars_load(make: Callable[[], nn.Module], name: str, shape: tuple[int, ...]):
    saved, new = make(), nn.Sequential(make())
    saved.get_parameter(name).data.fill_(0.3)
    old = {f"0.{key}": value for key, value in saved.state_dict().items()}
    old[f"0.{name}"] = old[f"0.{name}"][0].clone()
    assert old[f"0.{name}"].dim() == 0
    x = torch.randn(2, *shape)
    for assign in (False, True):
        new.load_state_dict(dict(old), assign=assign)
        assert new[0].get_parameter(name).shape == (1,)
        assert torch.equal(new(x), saved(x))


def test_a_residual_connection_keeps_the_dtype_of_its_input():
    assert lp.ConvexResidual(nn.ReLU())(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.NAdam])
def test_what_optimizers_kept_of_scalars_goes_on(optimizer: Callable[..., torch.optim.Optimizer]):
    def steps(params: list[nn.Parameter], state: dict | None = None) -> dict:
        opt = optimizer(params, lr=0.1)
        if state is not None:
            opt.load_state_dict(state)
        for _ in range(3):
            opt.zero_grad()
            sum((p - 1).square().sum() for p in params).backward()
            opt.step()
        return opt.state_dict()

    vector, scalar = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.tensor(0.0))
    state = copy.deepcopy(steps([vector, scalar]))
    now = [nn.Parameter(vector.detach().clone()), nn.Parameter(scalar.detach().clone()[None])]
    widen_scalars(state["state"])
    steps(now, state)
    assert torch.allclose(now[0], now[1].expand(2))


def test_layers_with_one_number_are_sharded():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for make, _, shape in SCALARS:
            torch.manual_seed(0)
            module, x = make(), torch.randn(2, *shape)
            expected = module(x)
            sharded = fully_shard(nn.Sequential(module))
            y = sharded(x)
            torch.testing.assert_close(y, expected)
            y.square().sum().backward()
            assert all(p.grad is not None for p in sharded.parameters())
    finally:
        dist.destroy_process_group()
