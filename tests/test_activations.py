"""Activations against independent formulations, and every slope range against difference quotients."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import liplayers as lip
from liplayers.errors import ArgumentError, ShapeError, UnknownBoundError, UnknownNameError
from liplayers.modules.activations import SLOPE_RANGES, tied_channels
from liplayers.testing.measure import executed_in_double, jacobian, train_to_exceed

ANGLES = [0.0, 1e-9, 0.3, math.pi / 2, math.pi, 2.5, -4.0, 2 * math.pi, 1e3, -1e9, 1e9]
SHAPES = {"vectors": (6, 5), "sequences": (4, 5, 3), "images": (3, 5, 2, 4)}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def householder(channels: int, *angles: float, dtype: torch.dtype = torch.float64, dim: int = 1) -> lip.Householder:
    """One fold for each angle, the same for every pair."""
    layer = lip.Householder(channels, len(angles), dim=dim, dtype=dtype)
    with torch.no_grad():
        layer.theta.copy_(torch.tensor(angles, dtype=torch.float64)[:, None].expand_as(layer.theta))
    return layer


# MaxMin ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_maxmin_has_the_derivatives_of_torchs_maximum_and_minimum_away_from_ties(
    shape: tuple[int, ...], dim: int, pairs: str
):
    def plain(x: Tensor) -> Tensor:
        half = x.shape[dim] // 2
        order = torch.arange(2 * half)
        if pairs == "neighbours":
            order = torch.cat([order[0::2], order[1::2]])
        a, b = x.index_select(dim, order[:half]), x.index_select(dim, order[half:])
        sorted_pairs = torch.cat([a.maximum(b), a.minimum(b)], dim).index_select(dim, order.argsort())
        return torch.cat([sorted_pairs, x.narrow(dim, 2 * half, x.shape[dim] - 2 * half)], dim)

    layer, x, v = lip.MaxMin(dim, pairs), randn(*shape).requires_grad_(), randn(*shape, seed=1)
    assert torch.equal(layer(x), plain(x))
    (ours,) = torch.autograd.grad(layer(x), x, v)
    (theirs,) = torch.autograd.grad(plain(x), x, v)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (v,))[1], torch.func.jvp(plain, (x,), (v,))[1])
    each = torch.func.vmap(torch.func.jacrev(lip.MaxMin(dim - (dim > 0), pairs)))
    torch.testing.assert_close(each(x), torch.func.vmap(torch.func.jacrev(plain_of_one(plain)))(x))
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


def plain_of_one(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: f(x[None])[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_derivative_of_maxmin_keeps_norms_at_ties_too(dtype: torch.dtype):
    x = torch.tensor([1.0, 0.0, -2.0, 1.0, -0.0, 7.0], dtype=dtype)
    J = torch.autograd.functional.jacobian(lip.MaxMin(0), x)
    assert torch.equal(J @ J.mT, torch.eye(6, dtype=dtype))


def test_maxmin_on_neighbours_leaves_maxima_and_minima_in_each_half_of_the_channels():
    x = torch.tensor([[1.0, 2.0, 9.0, 4.0, 5.0, 6.0, 7.0]])
    assert lip.MaxMin(pairs="neighbours")(x).tolist() == [[2.0, 1.0, 9.0, 4.0, 6.0, 5.0, 7.0]]
    assert lip.MaxMin()(x).tolist() == [[4.0, 5.0, 9.0, 1.0, 2.0, 6.0, 7.0]]
    assert tied_channels(lip.MaxMin(pairs="neighbours"), 7) == [0, 0, 1, 1, 2, 2, 3]
    assert str(lip.get_activation("maxmin_neighbours")) == "MaxMin(dim=1, pairs='neighbours')"
    with pytest.raises(UnknownNameError, match=r"pairs 'neighbors'.*neighbours"):
        lip.MaxMin(pairs="neighbors")


def test_maxmin_hands_on_what_is_not_finite_with_and_without_gradients():
    x = torch.tensor([[math.nan, math.inf, 1.0, 2.0, -math.inf, math.nan]])
    with_gradient = lip.MaxMin()(x.clone().requires_grad_())
    torch.testing.assert_close(lip.MaxMin()(x), with_gradient.detach(), equal_nan=True, rtol=0, atol=0)
    assert with_gradient.isnan().tolist() == [[True, False, True, True, False, True]]


# Householder ----------------------------------------------------------------------------------------------------------


def folded(z: complex, theta: float) -> complex:
    """The fold in polar form: angles measured from the line, those beyond it mirrored."""
    if math.sin(np.angle(z) - theta / 2) > 0:
        return np.conj(z) * np.exp(1j * theta)
    return z


@pytest.mark.parametrize("theta", ANGLES)
@pytest.mark.parametrize("channels", [1, 2, 5, 8])
def test_householder_folds_each_pair_in_polar_form(theta: float, channels: int):
    x = randn(40, channels)
    y = householder(channels, theta)(x).detach()
    half = channels // 2
    for i in range(half):
        expected = [
            folded(complex(a, b), theta) for a, b in zip(x[:, i].tolist(), x[:, half + i].tolist(), strict=True)
        ]
        torch.testing.assert_close(y[:, i], torch.tensor([z.real for z in expected]).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            y[:, half + i], torch.tensor([z.imag for z in expected]).double(), rtol=0, atol=1e-12
        )
    assert torch.equal(y[:, 2 * half :], x[:, 2 * half :])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_householder_starts_at_maxmin(shape: tuple[int, ...], dim: int, dtype: torch.dtype):
    x = randn(*shape).to(dtype)
    layer = lip.Householder(shape[dim], dim=dim, dtype=dtype)
    tolerance = 30 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), lip.MaxMin(dim)(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_householder_of_higher_order_starts_with_a_smaller_wedge_each(order: int):
    """Order k maps the plane onto one wedge of angle π/2^(k − 1), so that it has 2^k pieces."""
    angle = torch.linspace(-math.pi, math.pi, 4001, dtype=torch.float64)[:-1] + 1e-4
    y = lip.Householder(2, order, dtype=torch.float64)(torch.stack([angle.cos(), angle.sin()], 1)).detach()
    angles = np.unwrap(np.angle(y.numpy() @ [1, 1j]))
    assert np.ptp(angles) == pytest.approx(math.pi / 2 ** (order - 1), abs=2e-3)
    turns = np.sum(np.diff(np.sign(np.diff(np.append(angles, angles[:1])))) != 0)
    assert turns + turns % 2 == 2**order


@pytest.mark.parametrize("first", ANGLES)
@pytest.mark.parametrize("second", [0.3, 2.5, 1e9])
def test_householder_of_order_two_is_two_folds(first: float, second: float):
    x = randn(20, 4, 3)
    expected = householder(4, second)(householder(4, first)(x))
    torch.testing.assert_close(householder(4, first, second)(x), expected)


@pytest.mark.parametrize("first", ANGLES)
@pytest.mark.parametrize("second", [None, 1.0, 4.0])
@pytest.mark.parametrize("channels", [2, 5])
def test_householder_is_continuous_and_preserves_norms(first: float, second: float | None, channels: int):
    layer = householder(channels, *([first] if second is None else [first, second]))
    x, y = randn(200, channels), randn(200, channels, seed=1)
    torch.testing.assert_close(layer(x).norm(dim=1), x.norm(dim=1), rtol=1e-12, atol=0)
    J = jacobian(layer, x[0])
    torch.testing.assert_close(J.mT @ J, torch.eye(channels).double(), rtol=0, atol=1e-12)
    for a, b in ((x, y), (x, x + 1e-6 * y), (x, -x), (1e9 * x, 1e-9 * y)):
        rounding = 1e-15 * (a.norm(dim=1) + b.norm(dim=1))
        assert ((layer(a) - layer(b)).norm(dim=1) <= (a - b).norm(dim=1) + rounding).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [1, 3])
def test_the_vectors_that_run_are_no_longer_than_one(dtype: torch.dtype, order: int):
    """In exact rational arithmetic: then I − 2vvᵀ is a contraction, and 1 is a bound for what is executed."""
    layer = lip.Householder(400, order, dtype=dtype)
    with torch.no_grad():
        layer.theta.copy_(randn(order, 200) * 10 ** (6 * torch.rand(order, 200).double() - 2))
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            v = layer.effective().detach()
            assert lip.lipschitz_bound(layer) == 1
        assert torch.finfo(v.dtype).bits >= 32
        for p, q in v.movedim(1, -1).reshape(-1, 2).tolist():
            assert 1 - 1e-6 < Fraction(p) ** 2 + Fraction(q) ** 2 <= 1


def test_householder_in_float32_never_expands():
    """The executed weights, run in float64, at points on both sides of the line."""
    layer = executed_in_double(householder(2, 0.7, 2.9, dtype=torch.float32).eval())
    for x in randn(20, 2):
        assert torch.linalg.matrix_norm(jacobian(layer, x), 2) <= 1 + 1e-15  # float64 measures it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_householder_in_half_precision(dtype: torch.dtype):
    """Dtype of the input is kept; the fold runs in float32, so only θ and the result are rounded."""
    layer = householder(6, 0.7, 2.9)
    x = randn(50, 6)
    low = copy.deepcopy(layer).to(dtype)
    with torch.no_grad():
        layer.theta.copy_(low.theta)
    y = low(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), layer(x.to(dtype).double()), rtol=torch.finfo(dtype).eps, atol=1e-6)
    with torch.autocast("cpu", dtype):
        assert layer(x.to(dtype)).dtype == dtype


def test_training_householder_cannot_exceed_its_bound():
    for order in (1, 2):
        layer = lip.Householder(5, order, dtype=torch.float64)
        assert train_to_exceed(layer, (5, 2), steps=60) <= 1 + 1e-9


@pytest.mark.parametrize("theta", ANGLES)
def test_householder_gradients_are_right_and_finite(theta: float):
    layer = householder(4, theta, 1.0)
    for scale in (0.0, 1e-300, 1.0, 1e150):
        x = (scale * randn(6, 4)).requires_grad_()
        layer.zero_grad()
        layer(x).sum().backward()
        assert torch.isfinite(x.grad).all()
        assert torch.isfinite(layer.theta.grad).all()
    if abs(theta) < 10:
        x = randn(3, 4) + 0.1
        assert torch.autograd.gradcheck(
            lambda t: torch.func.functional_call(layer, {"theta": t}, (x,)), layer.theta.detach().requires_grad_()
        )


def test_every_fold_learns_from_the_start():
    layer = lip.Householder(8, 3, dtype=torch.float64)
    (layer(randn(64, 8)) * randn(64, 8, seed=1)).sum().backward()
    assert (layer.theta.grad.abs() > 1e-3).all()


def test_householder_state_copies_and_cache():
    layer = lip.Householder(5, 2)
    assert list(layer.state_dict()) == ["theta"]
    assert layer.theta.shape == (2, 2)
    assert repr(layer) == "Householder(channels=5, order=2, dim=1)"
    x = randn(3, 5).float()
    layer.eval().requires_grad_(False)
    before = layer(x)
    other = lip.Householder(5, 2).eval()
    with torch.no_grad():
        other.theta.add_(1.0)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert not torch.equal(layer(x), before)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    assert lip.Householder(4, device="meta", dtype=torch.float64).theta.dtype == torch.float64


def test_householder_refuses_sizes_and_shapes():
    for arguments, name in [((0,), "channels"), ((4, 0), "order"), ((4, 1.5), "order"), ((True,), "channels")]:
        with pytest.raises(ArgumentError, match=rf"Householder: {name}="):
            lip.Householder(*arguments)
    for shape in [(2, 3), (2, 5, 4), (4, 3, 4)]:
        with pytest.raises(ShapeError, match=r"expected 4 channels in dimension 1"):
            lip.Householder(4)(torch.zeros(shape))
    assert lip.slope_range(lip.Householder(4)) is None


def test_householder_in_a_model():
    model = nn.Sequential(lip.AOLLinear(4, 6), lip.Householder(6, 2), lip.NormalizedLinear(6, 3))
    assert lip.split_head(model, (4,)).body_bound == 1
    for make in (lip.SLLBlock, lip.SLLConv2dBlock):
        with pytest.raises(ArgumentError, match="no slope range"):
            make(4, activation=lip.Householder(4))


# β-abs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("beta", "folded_channels"), [(0, 0), (0.1, 0), (0.2, 1), (0.5, 2), (0.75, 4), (1, 5), (1.0, 5)]
)
def test_beta_abs_takes_the_modulus_of_the_first_channels(shape: tuple[int, ...], beta: float, folded_channels: int):
    activation, x = lip.BetaAbs(beta), randn(*shape)
    y = activation(x)
    assert torch.equal(y[:, :folded_channels], x[:, :folded_channels].abs())
    assert torch.equal(y[:, folded_channels:], x[:, folded_channels:])
    assert torch.equal(lip.BetaAbs(beta, dim=-1)(x.movedim(1, -1)), y.movedim(1, -1))
    assert lip.lipschitz_bound(activation) == 1


def test_half_of_beta_abs_is_maxmin_between_rotations():
    x = randn(10, 6, 2)
    a, b = x.chunk(2, 1)
    s, d = lip.BetaAbs()(torch.cat([a - b, a + b], 1) / math.sqrt(2)).chunk(2, 1)
    torch.testing.assert_close(torch.cat([d + s, d - s], 1) / math.sqrt(2), lip.MaxMin()(x))


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan, math.inf, "half", None])
def test_beta_abs_refuses_what_is_no_share(beta: object):
    with pytest.raises(ArgumentError, match=r"beta=.*\[0, 1\]"):
        lip.BetaAbs(beta)


def test_beta_abs_copies_and_shows_its_arguments():
    activation = lip.BetaAbs(0.25, dim=-1)
    assert repr(activation) == "BetaAbs(beta=0.25, dim=-1)"
    assert repr(pickle.loads(pickle.dumps(activation))) == repr(copy.deepcopy(activation)) == repr(activation)
    assert isinstance(lip.get_activation("beta_abs"), lip.BetaAbs)
    for dtype in (torch.bfloat16, torch.float16):
        assert activation(torch.ones(2, 4, dtype=dtype)).dtype == dtype


# Slope ranges ---------------------------------------------------------------------------------------------------------


def prelu(*weights: float) -> nn.PReLU:
    module = nn.PReLU(len(weights))
    module.weight.data.copy_(torch.tensor(weights))
    return module


SLOPED: list[nn.Module] = [
    *(make() for make in SLOPE_RANGES if make is not nn.RReLU),
    nn.ELU(0.3),
    nn.ELU(2.5),
    nn.ELU(-0.5),
    nn.CELU(0.2),
    nn.CELU(3.0),
    nn.LeakyReLU(0.2),
    nn.LeakyReLU(1.5),
    nn.LeakyReLU(-0.7),
    nn.Hardtanh(-0.5, 2.0),
    nn.Softshrink(0.1),
    nn.GELU("tanh"),
    nn.RReLU().eval(),
    nn.RReLU(-0.5, -0.25).eval(),
    nn.RReLU(1.0, 3.0).eval(),
    prelu(-0.5),
    prelu(1.75),
    prelu(0.0, -2.0, 0.5, 3.0),
    lip.BetaAbs(1.0),
]


def quotients(activation: nn.Module) -> Tensor:
    """Difference quotients in float64: of neighbours and far pairs on a grid, of random pairs of all distances."""
    # off the grid of round numbers, so that pairs straddle the kinks
    grid = torch.linspace(-40, 40, 80013, dtype=torch.float64)
    centre = torch.linspace(-0.01, 0.0101, 2001, dtype=torch.float64)
    pairs = [(grid[step:], grid[:-step]) for step in (1, 7, 500, 20000)] + [(centre[1:], centre[:-1])]
    generator = torch.Generator().manual_seed(0)
    x = 5 * torch.randn(50000, dtype=torch.float64, generator=generator)
    distance = 10 ** (5 * torch.rand(50000, dtype=torch.float64, generator=generator) - 4)
    pairs.append((x, x + distance))
    channels = activation.num_parameters if isinstance(activation, nn.PReLU) else 2
    activation = copy.deepcopy(activation).double()

    def apply(v: Tensor) -> Tensor:
        return activation(v[:, None].repeat(1, channels))

    return torch.cat([((apply(a) - apply(b)) / (a - b)[:, None]).flatten() for a, b in pairs])


@pytest.mark.parametrize("activation", SLOPED, ids=str)
def test_slope_ranges_hold_and_are_attained(activation: nn.Module):
    low, high = lip.slope_range(activation)
    found = quotients(activation)
    assert low - 1e-9 <= found.min().item() <= low + 1e-3
    assert high - 1e-3 <= found.max().item() <= high + 1e-9
    assert lip.lipschitz_bound(activation.eval()) == max(-low, high)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish()], ids=str)
def test_rounded_constants_contain_the_derivative(activation: nn.Module):
    """On a grid of step h its extremes are seen up to K·h²/8, K a bound of the derivative's second derivative."""
    h, K = 2.0**-13, 4.0
    x = torch.arange(-12, 12, h, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(activation(x).sum(), x)
    assert slopes.diff().diff().abs().max().item() / h**2 < K
    low, high = lip.slope_range(activation)
    unseen = K * h**2 / 8
    assert low <= slopes.min().item() - unseen <= low + 2e-7
    assert high >= slopes.max().item() + unseen >= high - 2e-7
    assert slopes[0].abs() < 1e-3  # the tails, monotone beyond the grid
    assert (slopes[-1] - 1).abs() < 1e-3


JUMPS = [nn.Softplus(), nn.Softplus(threshold=0), nn.Threshold(0.1, 0.0), nn.Hardshrink()]


@pytest.mark.parametrize("activation", JUMPS, ids=str)
def test_activations_that_jump_have_no_slope_range(activation: nn.Module):
    at = getattr(activation, "threshold", getattr(activation, "lambd", 0.0))
    x = torch.tensor([at, math.nextafter(at, math.inf)], dtype=torch.float64)
    assert abs(activation(x).diff() / x.diff()).item() > 1e5  # the jump is there
    assert lip.slope_range(activation) is None


NO_RANGE = [nn.RReLU(), nn.Dropout(), nn.Softmax(1), nn.GLU(), lip.MaxMin(), lip.GroupSort(), lip.Householder(4)]


@pytest.mark.parametrize("activation", [*JUMPS, *NO_RANGE], ids=str)
def test_activations_without_a_slope_range_are_refused(activation: nn.Module):
    assert lip.slope_range(activation) is None
    with pytest.raises(ArgumentError, match="activation"):
        lip.require_slope_range(object(), activation)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "make",
    [nn.ELU, nn.LeakyReLU, lambda a: prelu(0.5, a), lambda a: nn.CELU(a), lambda a: nn.RReLU(0.1, a).eval()],
)
def test_parameters_that_are_not_finite_prove_nothing(make: Callable, bad: float):
    try:
        activation = make(bad)
    except (AssertionError, ValueError):  # torch refuses it
        return
    assert lip.slope_range(activation) is None
    with pytest.raises(lip.LipschitzError):
        lip.lipschitz_bound(activation)


def test_a_trained_prelu_is_asked_again():
    block = lip.SLLBlock(4, activation=nn.PReLU(4))
    assert lip.lipschitz_bound(block) == 1
    for value in (1.01, -0.01):
        block.activation.weight.data[2] = value
        with pytest.raises(ArgumentError, match=r"the proof needs \[0, 1\]"):
            lip.lipschitz_bound(block)
    block.activation.weight.data[2] = 0.5
    assert lip.lipschitz_bound(block) == 1


def test_prelu_counts_the_rounding_of_its_weight():
    module = prelu(1.005, -0.3)
    x = -torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        executed = (-module(x)).double().flatten().tolist()
        low, high = lip.slope_range(module)
        assert low <= min(executed)
        assert max(executed) <= high
    assert max(executed) > lip.slope_range(module)[1]  # the rounding is there to be counted
    assert lip.slope_range(module.bfloat16())[1] == max(executed)


def test_rrelu_is_random_in_training():
    with pytest.raises(UnknownBoundError, match=r"random.*model\.eval\(\)"):
        lip.lipschitz_bound(nn.Sequential(nn.RReLU()))
    assert lip.lipschitz_bound(nn.Sequential(nn.RReLU(1.0, 2.0)).eval()) == 1.5


@pytest.mark.parametrize("make", [nn.SiLU, nn.Mish, nn.Hardswish, nn.SELU, lambda inplace: nn.LeakyReLU(2.0, inplace)])
def test_steep_activations_in_place_are_refused(make: Callable):
    assert lip.lipschitz_bound(make(inplace=False)) > 1
    with pytest.raises(UnknownBoundError, match="inplace"):
        lip.lipschitz_bound(make(inplace=True))
    assert lip.lipschitz_bound(nn.CELU(inplace=True)) == 1


@pytest.mark.parametrize(
    "activation", [nn.GELU(), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.SELU(), prelu(1.1)], ids=str
)
@pytest.mark.parametrize("make", [lip.SLLBlock, lip.SLLConv2dBlock])
def test_known_but_steep_activations_stay_out_of_the_blocks(activation: nn.Module, make: Callable):
    with pytest.raises(ArgumentError, match="slopes in"):
        make(4, activation=activation)


def test_a_subclass_of_a_known_activation_is_not_known():
    class Steep(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return 5 * x

    assert lip.slope_range(Steep()) is None
