"""Networks designed by a linear matrix inequality: the inequality for the weights that run, and what is reached."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from exact import Rows, is_positive_definite, rational, rows_of
from flint import fmpq
from torch import Tensor, nn

import liplayers
from liplayers import (
    LBDN,
    Abs,
    BetaAbs,
    GershgorinBlock,
    GroupSort,
    Householder,
    LDLTBlock,
    LDLTConv2dBlock,
    LDLTSequential,
    MaxMin,
    SandwichBlock,
    SandwichConv2dBlock,
    SLLBlock,
)
from liplayers.errors import ArgumentError, LipschitzError, ShapeError
from liplayers.layers.bases.lmi import Conv2dLMIBlock, DenseLMIBlock
from liplayers.linalg.lmi import ExplicitWeights, Sector, is_proven, ldlt_weights, limited, proven_lipschitz
from liplayers.modules.activations import sector, tied_channels
from liplayers.testing.measure import jacobian, train_to_exceed, worst_norm

DEPTHS = {LDLTBlock: True, LDLTSequential: True, LBDN: True, GershgorinBlock: True, SandwichBlock: False}
SIZES = (7, 3, 6, 5, 4)
Block = DenseLMIBlock | Conv2dLMIBlock


def inequality(weights: ExplicitWeights, lipschitz: float, low: float, high: float) -> Tensor:
    """The matrix of 𝓛²|x|² − |y|² − 2Σ(w − mv)ᵀΛ(βv − w) by selection matrices, in units of 𝓛|x| and √(2Λ)|w|.

    Another formulation than the library's, which fills blocks.
    """
    sizes = [weights.inner[0].shape[-1], *(C.shape[-2] for C in weights.inner)]
    eye = torch.eye(sum(sizes), dtype=weights.outgoing.dtype)
    states = eye.split(sizes)
    y = weights.outgoing @ states[-1]
    if weights.skip is not None:
        y = y + weights.skip @ states[0]
    M = lipschitz**2 * states[0].mH @ states[0] - y.mH @ y
    scale = [torch.full((sizes[0],), lipschitz, dtype=torch.float64)]
    for (below, w), C, multiplier in zip(pairwise(states), weights.inner, weights.multipliers, strict=True):
        v = C @ below
        product = (w - low * v).mH @ (multiplier[:, None] * (high * v - w))
        M = M - product - product.mH
        scale.append((2 * multiplier).sqrt())
    unit = torch.cat(scale)
    return M / unit[:, None] / unit


def running(block: Block, *key: int) -> ExplicitWeights:
    """The weights as they run, in float64, with the block's multipliers."""
    grid = (key,) if key else ()
    with torch.no_grad():
        values = [w.to(torch.complex128 if w.is_complex() else torch.float64) for w in block.effective(*grid)]
        return block.explicit_weights(*grid).with_executed(values)


def assert_inequality(block: Block, *key: int) -> None:
    M = inequality(running(block, *key), block.lipschitz, *block.sector)
    smallest = torch.linalg.eigvalsh(M).min().item()
    assert smallest > -1e-12, f"{block}: {smallest}"


def fit(block: nn.Module, features: int, outputs: int, steps: int = 20) -> None:
    """A few steps towards a function that is steeper than the block may be."""
    generator = torch.Generator().manual_seed(0)
    dtype = next(block.parameters()).dtype
    x = torch.randn(64, features, generator=generator).to(dtype)
    target = 5 * (x @ torch.randn(features, outputs, generator=generator).to(dtype)).sin()
    optimizer = torch.optim.Adam(block.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (block(x) - target).square().mean().backward()
        optimizer.step()


def scaled(block: nn.Module, gain: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in block.named_parameters():
            if name.startswith("raw"):
                p.copy_(gain * torch.randn(p.shape, generator=generator, dtype=torch.float64))
            elif name.startswith("log_multiplier"):
                p.copy_(torch.randn(p.shape, generator=generator))


def built(make: Callable[..., Block], depth: int, **arguments: Any) -> Block:
    torch.manual_seed(0)
    sizes = {"hidden_features": SIZES[:depth]} if DEPTHS[make] else {}
    return make(5, **sizes, out_features=4, **arguments)


CASES = [(make, depth) for make, deep in DEPTHS.items() for depth in ((1, 2, 3, 4, 5) if deep else (1,))]
EACH = pytest.mark.parametrize(("make", "depth"), CASES, ids=[f"{m.__name__}-{d}" for m, d in CASES])


# The inequality -------------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("lipschitz", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_inequality_holds_for_the_weights_that_run(make: Callable, depth: int, lipschitz: float, dtype: Any):
    block = built(make, depth, lipschitz=lipschitz, dtype=dtype)
    assert_inequality(block)
    assert block.lipschitz_bound() == lipschitz
    for gain in (0.1, 1.0, 10.0, 100.0, 1e6):
        scaled(block, gain)
        assert_inequality(block)
        assert block.lipschitz_bound() == lipschitz, gain


@EACH
@pytest.mark.parametrize("lipschitz", [0.5, 2.0])
def test_it_holds_after_training_and_after_training_to_exceed(make: Callable, depth: int, lipschitz: float):
    block = built(make, depth, lipschitz=lipschitz)
    fit(block, 5, 4)
    assert_inequality(block)
    block.double()
    for gain in (1.0, 100.0):
        scaled(block, gain)
        assert train_to_exceed(block, (5,), steps=25) <= lipschitz * (1 + 1e-9)
        for dtype in (torch.float32, torch.float64):
            assert_inequality(block.to(dtype))
            assert block.lipschitz_bound() == lipschitz


@pytest.mark.parametrize("make", [LDLTBlock, LDLTSequential])
@pytest.mark.parametrize("activation", [Abs(), nn.GELU(), nn.LeakyReLU(-0.5), nn.SELU(), nn.Hardswish()], ids=str)
@pytest.mark.parametrize("depth", [1, 3])
def test_every_range_of_slopes_has_its_inequality(make: Callable, activation: nn.Module, depth: int):
    block = built(make, depth, activation=activation, dtype=torch.float64)
    for gain in (0.3, 3.0, 100.0):
        scaled(block, gain)
        assert_inequality(block)
        assert worst_norm(block.eval(), (5,), nonlinear=True) <= 1 + 1e-9
        assert block.lipschitz_bound() == 1


@pytest.mark.parametrize("make", [LDLTBlock, LDLTSequential])
@pytest.mark.parametrize("activation", [MaxMin(), MaxMin(pairs="neighbours"), GroupSort(3), GroupSort(None)], ids=str)
def test_sorting_activations_share_the_multipliers_of_a_group(make: Callable, activation: nn.Module):
    block = built(make, 2, activation=activation, dtype=torch.float64)
    scaled(block, 10.0)
    for multiplier, size in zip(block.explicit_weights().multipliers, SIZES, strict=False):
        groups = tied_channels(activation, size)
        for group in set(groups):
            assert len({v.item() for v, g in zip(multiplier, groups, strict=True) if g == group}) == 1
    assert_inequality(block)
    assert train_to_exceed(block, (5,), steps=60) <= 1 + 1e-9


def test_free_multipliers_with_a_sorting_activation_would_not_be_proven():
    """Why they are tied: pairs with different multipliers satisfy the matrix inequality and exceed the bound."""
    block = LDLTSequential(4, dtype=torch.float64, activation=Abs())  # entrywise: all multipliers are free
    with torch.no_grad():
        block.get_parameter("log_multiplier").copy_(torch.tensor([3.0, 3.0, -3.0, -3.0]))
    assert_inequality(block)
    block.activation = MaxMin()
    assert train_to_exceed(block, (4,), steps=5) > 1.5
    with pytest.raises(ArgumentError, match="couples other channels"):
        block.lipschitz_bound()


@pytest.mark.parametrize("make", [LDLTBlock, LDLTSequential])
def test_householder_pairs_share_their_multipliers(make: Callable):
    """With the pairs of other channels tied, training finds twice the bound."""
    activation = Householder(6, dtype=torch.float64)
    block = make(6, 6, activation=activation, dtype=torch.float64)
    with torch.no_grad():
        activation.theta.copy_(torch.tensor([[0.5, 1.5, 4.0]]))
        block.get_parameter("log_multiplier").copy_(torch.tensor([2.0, 0.0, -2.0]))
    assert_inequality(block)
    assert train_to_exceed(block, (6,), steps=60) <= 1 + 1e-9


def test_what_the_weights_are_made_for_cannot_be_changed():
    """A cached weight would not notice."""
    block = LDLTBlock(4)
    for name, value in (("lipschitz", 0.1), ("sector", Sector(-1.0, 1.0))):
        with pytest.raises(AttributeError):
            setattr(block, name, value)


def test_the_bound_is_that_of_the_weights_that_run():
    """Not of weights computed afresh."""
    block = LDLTBlock(4, dtype=torch.float64).eval().requires_grad_(False)
    block(torch.randn(1, 4).double())
    block.rounded = lambda weights: tuple(2 * w for w in LDLTBlock.rounded(block, weights))  # type: ignore
    block.double()  # which forgets what was kept
    assert block.lipschitz_bound() > 1.5


@pytest.mark.parametrize("activation", [MaxMin(), GroupSort(2), Householder(6)], ids=str)
def test_further_dimensions_are_a_batch(activation: nn.Module):
    block = LDLTBlock(6, activation=activation)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(block(x), torch.stack([block(row) for row in x]))
    torch.testing.assert_close(block(x[0, 0]), block(x)[0, 0])


CONVOLUTIONS: list[tuple[Callable[..., Block], dict]] = [
    (LDLTConv2dBlock, {"hidden_channels": 4}),
    (LDLTConv2dBlock, {"hidden_channels": (4, 2), "activation": MaxMin(), "lipschitz": 2.0}),
    (LDLTConv2dBlock, {"out_channels": 2, "stride": 2, "kernel_size": 5}),
    (SandwichConv2dBlock, {}),
    (SandwichConv2dBlock, {"out_channels": 5, "stride": 2, "lipschitz": 0.5}),
    (SandwichConv2dBlock, {"kernel_size": 1, "stride": 2, "output_bias": False}),
]


@pytest.mark.parametrize(("make", "arguments"), CONVOLUTIONS)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_convolutions_satisfy_it_at_each_frequency(make: Callable, arguments: dict, mode: str, dtype: torch.dtype):
    block = make(3, padding_mode=mode, dtype=dtype, **arguments)
    for gain in (0.3, 3.0, 100.0):
        scaled(block, gain)
        for grid in ((4, 6), (5, 3), (1, 2)):
            weights = running(block, *grid)
            for at in [(i, j) for i in range(grid[0]) for j in range(grid[1] // 2 + 1)]:
                one = weights.with_executed([w[at] for w in weights.executed()])
                M = inequality(one, block.lipschitz, *block.sector)
                assert torch.linalg.eigvalsh(M).min().item() > -1e-12


@pytest.mark.parametrize(("make", "arguments"), CONVOLUTIONS)
@pytest.mark.parametrize("image", [(6, 4), (7, 5), (1, 3)])
def test_convolutions_keep_the_bound_and_torchs_sizes(make: Callable, arguments: dict, image: tuple):
    block = make(3, dtype=torch.float64, **arguments)
    stride = arguments.get("stride", 1)
    assert block(torch.randn(2, 3, *image).double()).shape[-2:] == tuple(-(-n // stride) for n in image)
    for gain in (1.0, 30.0):
        scaled(block, gain)
        assert train_to_exceed(block, (3, *image), steps=15) <= block.lipschitz * (1 + 1e-9)
        assert worst_norm(block.eval(), (3, *image), nonlinear=True) <= block.lipschitz * (1 + 1e-9)


def test_a_circular_image_that_the_stride_does_not_divide_is_refused():
    block = SandwichConv2dBlock(2, stride=2, padding_mode="circular")
    assert block(torch.randn(1, 2, 4, 6)).shape == (1, 2, 2, 3)
    with pytest.raises(ShapeError, match="stride 2"):
        block(torch.randn(1, 2, 4, 5))


# What is reached ------------------------------------------------------------------------------------------------------


def free_matrix(X: Tensor) -> Tensor:
    """V with X = T⁻¹V, TTᵀ = VVᵀ + I: I − XXᵀ = T⁻¹T⁻ᵀ."""
    inverse = torch.linalg.cholesky(torch.eye(len(X)).double() - X @ X.mT)
    return torch.linalg.solve_triangular(inverse, X, upper=False)


def as_ldlt(weights: ExplicitWeights, lipschitz: float) -> ExplicitWeights:
    """One-layer weights with slopes in [0, 1] from the LDLᵀ factorisation of their own free matrices."""
    (C,), B, (multiplier,) = weights.inner, weights.outgoing, weights.multipliers
    A = torch.zeros(B.shape[0], C.shape[1]).double() if weights.skip is None else weights.skip
    V = free_matrix(multiplier.sqrt()[:, None] * C / (math.sqrt(2) * lipschitz))
    T = torch.linalg.cholesky(V @ V.mT + torch.eye(len(V)).double())
    X_B = (B + A @ C.mT * multiplier / lipschitz**2) @ (T.mT / (math.sqrt(2) * multiplier.sqrt()[:, None]))
    V_out = free_matrix(torch.cat([A / lipschitz, X_B], 1))
    return ldlt_weights([V], V_out, [multiplier], lipschitz, Sector(0.0, 1.0), True)


def sll_weights(block: SLLBlock) -> ExplicitWeights:
    """x − Vᵀσ(Wx + b) with V = 2T⁻¹W: the multiplier that makes B = −CᵀΛ is 2T⁻¹."""
    W, V = (w.detach() for w in block.effective())
    return ExplicitWeights((W,), -V.mT, torch.eye(W.shape[1]).double(), ((V / W).mean(1),))


def test_every_block_that_strictly_satisfies_the_inequality_is_an_ldlt_block():
    """Sandwich layers, Gershgorin blocks and SLL blocks (up to the strictness) come out again, entry by entry."""
    torch.manual_seed(0)
    sandwich, gershgorin = SandwichBlock(5, 4, dtype=torch.float64), GershgorinBlock(5, 6, 4, dtype=torch.float64)
    sll = SLLBlock(5, 7, dtype=torch.float64)
    for block in (sandwich, gershgorin, sll):
        with torch.no_grad():
            for p in block.parameters():
                p.add_(0.3 * torch.randn_like(p))
    found = [sandwich.explicit_weights(), gershgorin.explicit_weights(), sll_weights(sll)]
    for weights in found:
        assert torch.linalg.eigvalsh(inequality(weights, 1.0, 0.0, 1.0)).min() > -1e-12
        strict = ExplicitWeights(*(tree_detach(part) for part in weights)).shrunk(0.999)
        again = as_ldlt(strict, 1.0)
        for ours, theirs in zip(again.executed(), (*strict.executed(), torch.zeros(4, 5).double()), strict=False):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def tree_detach(part: Any) -> Any:
    return tuple(p.detach() for p in part) if isinstance(part, tuple) else part if part is None else part.detach()


def test_the_reflection_of_sll_is_the_limit_of_ldlt_blocks():
    block = LDLTBlock(6, dtype=torch.float64)
    with torch.no_grad():
        nn.init.orthogonal_(block.raw).mul_(10)
        block.get_parameter("raw_out").zero_()
        block.get_parameter("raw_out")[:, :6] = 100 * torch.eye(6)
    weights = running(block)
    torch.testing.assert_close(weights.skip, torch.eye(6).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(-weights.outgoing @ weights.inner[0], 2 * torch.eye(6).double(), atol=1e-2, rtol=0)


def test_lbdn_is_a_stack_of_sandwich_layers():
    net = LBDN(5, (7, 3), 4, lipschitz=4.0, dtype=torch.float64)
    scaled(net, 1.0)
    with torch.no_grad():
        net.hidden_bias.normal_()
        net.bias.normal_()
    first, second = SandwichBlock(5, 7, dtype=torch.float64), SandwichBlock(7, 3, dtype=torch.float64)
    logs = net.get_parameter("log_multiplier").split([7, 3])
    for layer, name, log, bias in zip(
        (first, second), ("raw", "raw_2"), logs, net.hidden_bias.split([7, 3]), strict=True
    ):
        with torch.no_grad():
            layer.raw.copy_(net.get_parameter(name))
            layer.get_parameter("log_multiplier").copy_(log)
            layer.hidden_bias.copy_(bias)
    last = SandwichBlock(3, 4, dtype=torch.float64)
    with torch.no_grad():
        last.raw.copy_(net.get_parameter("raw_out"))
    B = last.explicit_weights().inner[0].detach() / math.sqrt(2)
    x = torch.randn(9, 5).double()
    torch.testing.assert_close(net(x), 2 * second(first(2 * x)) @ B.mT + net.bias, rtol=1e-7, atol=1e-7)


def test_lbdn_learns_its_bound():
    net = LBDN(5, (8,), 5, lipschitz=1.0, learnable=True)
    fit(net, 5, 5, steps=60)
    bound = liplayers.lipschitz_bound(net)
    assert bound > 1.5
    assert bound == pytest.approx(net.get_parameter("log_lipschitz").exp().item())
    assert worst_norm(net.double().eval(), (5,), nonlinear=True) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("log", [-1e9, -60.0, 60.0, 1e9])
def test_a_learned_bound_stays_a_number(log: float):
    net = LBDN(5, (8,), 5, learnable=True)
    with torch.no_grad():
        net.get_parameter("log_lipschitz").fill_(log)
    assert torch.isfinite(net(torch.randn(3, 5))).all()
    assert net.lipschitz_bound() == pytest.approx(1e20 if log > 0 else 1e-20)
    with pytest.raises(ArgumentError, match="learnable"):
        LBDN(5, learnable="yes")  # type: ignore[arg-type]


def test_extreme_raw_parameters_give_weights_that_hold():
    for make in (LDLTBlock, LDLTSequential):
        block = make(4, (5, 3))
        for size in (1e37, 1e-38):
            scaled(block, size)
            assert_inequality(block)
            assert block.lipschitz_bound() == 1
        with torch.no_grad():
            block.get_parameter("log_multiplier").copy_(1e9 * torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1]))
        assert_inequality(block)


def test_gershgorin_rows_are_dominated_by_their_diagonal():
    block = GershgorinBlock(5, (6, 3), 4, lipschitz=2.0, dtype=torch.float64)
    scaled(block, 3.0)
    weights = block.explicit_weights()
    for C in weights.inner:
        assert C.abs().sum(1).max() < 2
    unit = torch.cat([torch.full((5,), 2.0), *((2 * m).sqrt().detach() for m in weights.multipliers)]).double()
    with torch.no_grad():
        M = inequality(weights, 2.0, 0.0, 1.0) * unit[:, None] * unit
    dominance = 2 * M.diagonal() - M.abs().sum(1)
    assert dominance.min() > -1e-9


# The proof ------------------------------------------------------------------------------------------------------------


def test_weights_beyond_the_inequality_get_a_larger_bound_that_is_one():
    torch.manual_seed(0)
    block = LDLTBlock(5, (4, 6), 3, dtype=torch.float64)
    scaled(block, 1.0)
    weights = ExplicitWeights(*(tree_detach(part) for part in block.explicit_weights()))
    for excess in (1e-6, 1e-3, 0.1):
        larger = weights.shrunk(1 + excess, (1 + excess) ** 3)
        bound = proven_lipschitz(larger, 1.0, block.sector)
        assert 1 < bound <= (1 + excess) ** 3 * (1 + 3 * excess)
        C1, C2 = larger.inner

        def run(x: Tensor, larger: ExplicitWeights = larger, C1: Tensor = C1, C2: Tensor = C2) -> Tensor:
            return x @ larger.skip.mT + torch.relu(torch.relu(x @ C1.mT) @ C2.mT) @ larger.outgoing.mT

        norms = [torch.linalg.matrix_norm(jacobian(run, torch.randn(5).double()), 2) for _ in range(50)]
        assert max(norms) <= bound
    assert proven_lipschitz(weights.shrunk(6.0), 1.0, block.sector) == math.inf
    broken = weights.with_executed([w * math.nan for w in weights.executed()])
    assert proven_lipschitz(broken, 1.0, block.sector) == math.inf


@pytest.mark.parametrize("edges", [Sector(0.0, 1.0), Sector(-1.0, 1.0), Sector(-3.0, 0.5)])
@pytest.mark.parametrize("depth", [1, 3, 8])
def test_shrinking_weights_leaves_a_margin_in_every_direction(edges: Sector, depth: int):
    """M' ⪰ rM + (1 − r)I: with A shrunk by r^(n+1) instead it would not, from n = 5 or so."""
    torch.manual_seed(depth)
    V = [torch.randn(4, 4).double() for _ in range(depth)]
    weights = ldlt_weights(V, torch.randn(4, 8).double(), [torch.ones(4).double()] * depth, 1.0, edges, True)
    r = 0.99
    difference = inequality(weights.shrunk(r), 1.0, *edges) - r * inequality(weights, 1.0, *edges)
    assert torch.linalg.eigvalsh(difference).min() >= (1 - r) * (1 - 1e-9)


def test_a_violation_below_the_rounding_of_the_check_is_not_proven():
    """A sum of 100,000 squares: its rounding is larger than that of the small matrix that it goes into."""
    B = torch.full((100_000, 1), 0.1, dtype=torch.float64)
    for short in (3.8e-13, 1e-15):
        multiplier = B.square().sum(0) * (1 - short) / 2
        weights = ExplicitWeights((torch.zeros(1, 1).double(),), B, None, (multiplier,))
        assert not is_proven(weights, 1.0, Sector(0.0, 1.0))
    ample = ExplicitWeights((torch.zeros(1, 1).double(),), B, None, (multiplier * 1.001,))
    assert is_proven(ample, 1.0, Sector(0.0, 1.0))


def exact_form(weights: ExplicitWeights, lipschitz: fmpq, low: float, high: float) -> Rows:
    """The matrix of the inequality in x, w_1, … over the rationals, by selection matrices; Λ as it proves."""

    def multiply(A: Rows, B: Rows) -> Rows:
        columns = list(zip(*B, strict=True))
        return [[sum((a * b for a, b in zip(row, column, strict=True)), fmpq(0)) for column in columns] for row in A]

    def transposed(A: Rows) -> Rows:
        return [list(column) for column in zip(*A, strict=True)]

    def combine(A: Rows, s: fmpq, B: Rows) -> Rows:
        return [[a + s * b for a, b in zip(*rows, strict=True)] for rows in zip(A, B, strict=True)]

    sizes = [weights.inner[0].shape[-1], *(len(C) for C in weights.inner)]
    eye = [[fmpq(int(i == j)) for j in range(sum(sizes))] for i in range(sum(sizes))]
    states = [eye[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
    y = multiply(rows_of(weights.outgoing), states[-1])
    if weights.skip is not None:
        y = combine(y, fmpq(1), multiply(rows_of(weights.skip), states[0]))
    M = [[lipschitz**2 * value for value in row] for row in multiply(transposed(states[0]), states[0])]
    M = combine(M, fmpq(-1), multiply(transposed(y), y))
    for (below, w), C, multiplier in zip(pairwise(states), weights.inner, weights.multipliers, strict=True):
        v = multiply(rows_of(C), below)
        units = [rational(unit) for unit in (2 * multiplier).sqrt().tolist()]
        left = combine(w, -rational(low), v)
        right = combine([[rational(high) * value for value in row] for row in v], fmpq(-1), w)
        right = [[unit**2 / 2 * value for value in row] for unit, row in zip(units, right, strict=True)]
        product = multiply(transposed(left), right)
        M = combine(combine(M, fmpq(-1), product), fmpq(-1), transposed(product))
    return M


@pytest.mark.parametrize("edges", [Sector(0.0, 1.0), Sector(-1.0, 1.0), Sector(-0.13, 1.13)])
@pytest.mark.parametrize("skip", [False, True])
def test_what_is_proven_holds_in_exact_arithmetic_at_the_edge(edges: Sector, skip: bool):
    torch.manual_seed(0)
    for sizes in ((2, 2), (1, 2, 2)):
        V = [torch.randn(d, c).double() for c, d in pairwise(sizes)]
        outgoing = torch.randn(2, sizes[-1] + (sizes[0] if skip else 0)).double()
        multipliers = [torch.rand(d).double() + 0.1 for d in sizes[1:]]
        weights = ldlt_weights(V, outgoing, multipliers, 1.3, edges, skip)
        low, high = 0.01, 2.0
        while high > math.nextafter(low, math.inf):  # the least constant that is proven
            middle = (low + high) / 2
            if middle in (low, high):
                break
            low, high = (low, middle) if is_proven(weights, middle, edges) else (middle, high)
        assert is_positive_definite(exact_form(weights, rational(high), *edges))
        assert not is_positive_definite(exact_form(weights, rational(high * (1 - 1e-9)), *edges))


@pytest.mark.parametrize(("size", "expected"), [(1e200, math.inf), (1e308, math.inf), (1e-310, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("edges", [Sector(0.0, 1.0), Sector(-1.0, 1.0)])
def test_weights_of_extreme_size_are_proven_or_not_without_an_error(size: float, expected: float, edges: Sector):
    W = torch.full((2, 2), size, dtype=torch.float64)
    weights = ExplicitWeights((W,), W, None, (torch.ones(2).double(),))
    assert proven_lipschitz(weights, 1.0, edges) == expected
    tiny = ExplicitWeights((W,), W, None, (torch.full((2,), 1e-300, dtype=torch.float64),))
    assert proven_lipschitz(tiny, 1.0, edges) == math.inf


def test_float64_factorisations_hold_where_float32_would_fail():
    """‖V‖² around 1e9: a Cholesky factor in float32 would not see the 1 in VᵀV + I."""
    V = [1e5 * torch.randn(6, 6, dtype=torch.float64) for _ in range(3)]
    weights = ldlt_weights(
        [limited(v) for v in V[:2]], limited(V[2]), [torch.ones(6).double()] * 2, 1.0, Sector(0.0, 1.0), False
    )
    assert torch.linalg.eigvalsh(inequality(weights, 1.0, 0.0, 1.0)).min() > -1e-9


def test_leading_dimensions_are_a_batch():
    torch.manual_seed(0)
    V = [torch.randn(3, 6, 5).double(), torch.randn(3, 4, 6).double(), torch.randn(3, 2, 9).double()]
    multipliers = [torch.rand(6).double() + 0.5, torch.rand(4).double() + 0.5]
    for edges in (Sector(0.0, 1.0), Sector(-0.2, 1.0), Sector(-1.0, 1.0)):
        together = ldlt_weights(V[:2], V[2], multipliers, 2.0, edges, True)
        for i in range(3):
            alone = ldlt_weights([V[0][i], V[1][i]], V[2][i], multipliers, 2.0, edges, True)
            for a, b in zip(together.executed(), alone.executed(), strict=True):
                torch.testing.assert_close(a[i], b)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [SandwichBlock, SandwichConv2dBlock, LBDN, GershgorinBlock])
@pytest.mark.parametrize("activation", [MaxMin(), Abs(), nn.GELU()], ids=str)
def test_families_for_slopes_in_zero_one_refuse_others(make: Callable, activation: nn.Module):
    with pytest.raises(ArgumentError, match="activation"):
        make(4, activation=activation)


@pytest.mark.parametrize("make", [LDLTBlock, LDLTSequential, LDLTConv2dBlock])
@pytest.mark.parametrize(
    "activation",
    [nn.Softplus(), nn.Softmax(1), MaxMin(dim=2), BetaAbs(dim=2), Householder(7), nn.RReLU(), nn.Sequential(), nn.ReLU],
    ids=str,
)
def test_activations_without_a_proof_are_refused(make: Callable, activation: Any):
    with pytest.raises(ArgumentError, match="activation="):
        make(4, activation=activation)


@pytest.mark.parametrize("make", [LDLTBlock, LDLTSequential, LBDN, GershgorinBlock, SandwichBlock, LDLTConv2dBlock])
@pytest.mark.parametrize("lipschitz", [0, -1.0, math.inf, math.nan, True, "1", 1e-30, 1e30])
def test_a_bound_that_is_no_positive_number_is_refused(make: Callable, lipschitz: Any):
    with pytest.raises(ArgumentError, match="lipschitz="):
        make(4, lipschitz=lipschitz)


@pytest.mark.parametrize("hidden", [(), (3, 0), (2.5,), "64", (None,), (True,)])
def test_hidden_sizes_are_checked(hidden: Any):
    with pytest.raises(ArgumentError, match=re.escape(f"hidden_features={hidden!r}")):
        LDLTBlock(4, hidden)


def test_inputs_of_another_size_or_dtype_are_refused():
    with pytest.raises(RuntimeError, match="shapes"):
        LDLTBlock(6)(torch.randn(2, 3, 4))
    for image in (torch.zeros(1, 4, 5, 5, dtype=torch.uint8), torch.zeros(1, 4, 5, 5, dtype=torch.float64)):
        with pytest.raises(ArgumentError, match="cast"):
            LDLTConv2dBlock(4)(image)


def test_an_activation_changed_afterwards_is_noticed():
    block = LDLTBlock(4, activation=nn.PReLU())
    assert block.lipschitz_bound() == 1
    with torch.no_grad():
        block.activation.weight.fill_(-0.5)
    with pytest.raises(ArgumentError, match=r"slopes in \[-0.5, 1\]"):
        block.lipschitz_bound()
    block.activation = nn.ReLU6()
    assert block.lipschitz_bound() == 1
    block.activation = MaxMin()
    with pytest.raises(LipschitzError):
        liplayers.lipschitz_bound(nn.Sequential(block))
    image_block = LDLTConv2dBlock(2, activation=nn.PReLU())
    image_block.activation.weight.data.fill_(3.0)
    with pytest.raises(ArgumentError, match=r"slopes in \[0, 3\]"):
        image_block.lipschitz_bound()


def test_sectors_hold_zero():
    assert sector(None, nn.LeakyReLU(0.2)) == (0.0, 1.0)
    assert sector(None, nn.Sigmoid()) == (0.0, 0.25)
    assert sector(None, nn.Identity()) == (0.0, 1.0)
