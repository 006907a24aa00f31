"""The proven rounding error of a network is above what evaluation in floating point really makes.

Two oracles: a float32 evaluation against the float64 one of the same weights, through the same analysis with the unit
roundoff of float32; and float64 evaluations of small networks against exact rational arithmetic.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from audit import EVERY, example
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import liplayers as lp
from liplayers.bounds.rounding import Arithmetic, RoundingAnalysis
from liplayers.core.module import LipschitzModule
from liplayers.errors import ArgumentError, UnknownBoundError

F64 = torch.float64
every = pytest.mark.parametrize(("family", "role"), EVERY, ids=["-".join(e) for e in EVERY])


@torch.no_grad()
def stirred(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def inputs(shape: tuple[int, ...], norm: float, n: int = 12) -> Tensor:
    """Float32 inputs of norms up to `norm`: dense, sparse, of one sign, of few bits, of all scales, and zero."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, *shape, generator=generator)
    x[1] = x[1] * (torch.rand(shape, generator=generator) < 0.2)
    x[2] = 1.0
    x[3] = x[3].abs()
    x[4] = x[4].sign()
    x[5] = x[5] * 10 ** (8 * torch.rand(shape, generator=generator) - 6)
    x[6] = 0.0
    flat = x.flatten(1)
    length = flat.double().norm(dim=1, keepdim=True).clamp_min(1e-30)
    scale = norm * 0.999 * torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1e-3, 1e-20, 1e-38, 1.0, 1.0])[:n, None]
    return (flat * (scale / length).float()).view(n, *shape)


@torch.no_grad()
def assert_covered(network: nn.Module, shape: tuple[int, ...], norm: float = 4.0) -> float:
    """A float32 network's evaluation is off by no more than its analysis says; returns the share that is used."""
    found = RoundingAnalysis(network, shape, dtype=torch.float32).at(norm)
    x = inputs(shape, norm)
    exact = copy.deepcopy(network).double()
    difference = (network(x).double() - exact(x.double())).flatten(1).norm(dim=1)
    assert difference.isfinite().all()
    assert difference.amax() <= found.error
    assert exact(x.double()).flatten(1).norm(dim=1).amax() <= found.magnitude
    return difference.amax().item() / found.error if found.error else 0.0


# Every layer ----------------------------------------------------------------------------------------------------------


@every
def test_every_frozen_layer_evaluates_within_its_error(family: str, role: str):
    layer, shape = example(family, role, torch.float32)
    frozen = lp.freeze(stirred(layer), shape)
    used = assert_covered(frozen, shape)
    assert used > 1e-6  # an error far beyond what happens would prove nothing of use
    assert RoundingAnalysis(frozen.double(), shape).at(4.0).error < 1e-11


ENTRYWISE = [
    nn.Identity(), nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(), nn.Tanh(), nn.Sigmoid(),
    nn.LogSigmoid(), nn.Softsign(), nn.Softshrink(), nn.Tanhshrink(), nn.Hardsigmoid(), nn.Hardswish(), nn.ELU(),
    nn.ELU(3.0), nn.CELU(0.5), nn.SELU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.LeakyReLU(),
    nn.LeakyReLU(-2.0), nn.PReLU(), nn.PReLU(6), nn.RReLU(), lp.Abs(), lp.BetaAbs(), lp.MaxMin(), lp.GroupSort(),
    lp.GroupSort(4), lp.GroupSort(None), lp.Householder(6, 3), lp.MaxMin(pairs="neighbours"),
]  # fmt: skip


@pytest.mark.parametrize("norm", [1e-12, 1.0, 300.0])
@pytest.mark.parametrize("activation", ENTRYWISE, ids=repr)
def test_activations_evaluate_within_their_error(activation: nn.Module, norm: float):
    frozen = lp.freeze(nn.Sequential(stirred(copy.deepcopy(activation)), nn.Identity()))
    for shape in [(6,)] if isinstance(activation, nn.Mish) else [(6,), (6, 3, 4)]:
        assert_covered(frozen, shape, norm)


SHAPED: list[tuple[nn.Module, tuple[int, ...]]] = [
    (lp.ScaledAvgPool2d(2), (4, 4, 6)),
    (lp.L2Pool2d(2), (4, 4, 6)),
    (lp.MaxPool2d(2), (4, 5, 6)),
    (lp.GlobalL2Pool2d(), (4, 4, 6)),
    (lp.PadChannels(9), (4, 4, 6)),
    (lp.PadChannels(3), (4, 4, 6)),
    (lp.Patchify2d(2), (4, 4, 6)),
    (lp.SpatialShift2d(), (4, 4, 6)),
    (lp.Normalize([0.1, 0.5], [0.3, 2.0]), (2, 4, 4)),
    (lp.Scale(-3.7), (4,)),
    (nn.Sequential(lp.BatchCentering(2, bias=True), lp.PositionEmbedding((2, 4, 4))), (2, 4, 4)),
    (lp.ConvexResidual(nn.Sequential(lp.AOLLinear(4, 4), lp.MaxMin()), alpha=0.3), (4,)),
    (lp.Concatenate([lp.AOLLinear(4, 2), nn.Tanh()]), (4,)),
    (nn.MaxPool2d(3, 2, padding=1), (2, 6, 6)),
    (nn.MaxPool2d(2, 1, dilation=2), (2, 6, 6)),
    (nn.AvgPool2d(3, 2, padding=1), (2, 7, 7)),
    (nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), (2, 7, 7)),
    (nn.AvgPool2d(3, divisor_override=2), (2, 7, 7)),
    (nn.AdaptiveAvgPool2d(2), (2, 4, 4)),
    (nn.AdaptiveAvgPool2d(1), (2, 4, 4)),
    (nn.AdaptiveMaxPool2d(3), (2, 7, 7)),
    (nn.LPPool2d(2, 2), (2, 6, 6)),
    (nn.BatchNorm1d(5), (5,)),
    (nn.BatchNorm2d(2), (2, 4, 4)),
    (nn.BatchNorm2d(2, affine=False), (2, 4, 4)),
    (nn.Sequential(nn.Flatten(), nn.Unflatten(1, (8, 2, 2)), nn.PixelShuffle(2), nn.ZeroPad2d(1)), (2, 4, 4)),
    (nn.Sequential(nn.PixelUnshuffle(2), nn.ChannelShuffle(2), nn.Dropout()), (2, 4, 4)),
    (nn.Linear(5, 7), (3, 5)),
    (nn.Linear(5, 7, bias=False), (5,)),
    (nn.Conv2d(4, 6, 3, 2, 1, 2, 2), (4, 7, 8)),
    (nn.Conv2d(4, 6, (1, 3), padding="same"), (4, 7, 8)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 7, 8)),
    (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2), (4, 5, 5)),
    (lp.CPLConv2dBlock(3, 4, activation=nn.Tanh()), (3, 5, 4)),
    (lp.LipNeXtBlock(5, (4, 3)), (5, 4, 3)),
]


@pytest.mark.parametrize(("part", "shape"), SHAPED, ids=lambda v: type(v).__name__)
def test_pooling_padding_containers_and_torch_layers_evaluate_within_their_error(part: nn.Module, shape: tuple):
    part = stirred(copy.deepcopy(part))
    for module in part.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-3, 3)  # type: ignore[union-attr]
            module.running_var.uniform_(0.01, 3)  # type: ignore[union-attr]
    assert_covered(lp.freeze(part, shape), shape)


class Custom(nn.Module):
    """Views, writes in place, broadcasts and sums that no module of ours has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("scale", torch.tensor([0.5, -2.0, 1.0, 3.0, 0.1, 0.3]))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)) + 0.5 * x
        h = torch.cat([h[:, :2], self.second(input=h).abs()[:, 1:5]], 1)
        y = (h - 1.5) / 3.0 + x[:, :1]
        return 2 - y.view(-1, 2, 3).transpose(1, 2).flatten(1).neg()


class InPlace(nn.Module):
    """The rest of a tensor stays as it was when a slice of it is written to."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 3.0
        y[:, :2].mul_(1e-3)
        y[:, 2:].add_(7.0)
        return y.relu_() - 0.1


def alone(compute: Callable[[Tensor], Tensor], bound: float = 1e9) -> tuple[RoundingAnalysis, nn.Module]:
    """The analysis of one function, in float32; with the default, without any help of a bound of its module."""

    class Alone(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return compute(x)

    module = Alone().eval()
    return RoundingAnalysis(module, (4, 6), {"": bound}, torch.float32), module


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: torch.add(x, x.flip(2), alpha=1e4),
        lambda x: torch.sub(x, x.flip(2), alpha=-300.0),
        lambda x: torch.rsub(x, x.flip(2), alpha=1e4),
        lambda x: torch.rsub(1e4 * x, 1e-4 * x.flip(2), alpha=1e4),
        lambda x: (x[:, :1].expand(-1, 4, -1) * 1.5).clone(),
        lambda x: torch.cat([x[:, :, :1].expand(-1, -1, 9), x], 2) / 3,
        lambda x: F.pad(x, (5, 5), "replicate") * 0.3,
        lambda x: F.pad(x[:, None], (5, 5, 3, 3), "reflect") * 0.3,
        lambda x: F.pad(x[:, None], (6, 6, 4, 4), "circular") * 0.3,
        lambda x: filled(x, 1e4) * 1.1,
        lambda x: filled(x, -1e4) - 0.1,
        lambda x: (x * 7.0).mul_(0.1).add_(x, alpha=3.0),
        lambda x: x.mean(1) + x.sum(1) / 3,
    ],
)
def test_single_operations_stay_within_their_error_and_magnitude(compute: Callable[[Tensor], Tensor]):
    analysis, module = alone(compute)
    x = inputs((4, 6), 4.0)
    found, exact = analysis.at(4.0), module(x.double())
    size = exact.flatten(1).norm(dim=1).amax()
    assert (module(x).double() - exact).flatten(1).norm(dim=1).amax() <= found.error
    assert size <= found.magnitude < 1e6 * size


def filled(x: Tensor, value: float) -> Tensor:
    """x in a larger tensor of a constant that it is written to."""
    y = x.new_full((len(x), 4, 7), value)
    y[:, :, :-1] = x
    return y


def test_a_constant_that_is_written_to_counts_as_it_was_before():
    """And the rest of its storage with it: here the next layer cancels large numbers."""
    analysis, _ = alone(lambda x: filled(x, 1e8))
    assert analysis.at(1.0).magnitude >= 2e8
    analysis, _ = alone(lambda x: torch.full_like(x, 0.7).mul_(x))
    with pytest.raises(UnknownBoundError, match="both depend"):
        analysis.at(1.0)


def test_what_underflows_is_counted():
    analysis, module = alone(lambda x: torch.linalg.vector_norm(x, dim=(1, 2)))
    x = torch.full((1, 4, 6), 1e-30)
    assert module(x).item() == 0.0
    assert analysis.at(1e-28).error >= module(x.double()).item()


def test_the_output_at_zero_counts_with_its_own_error():
    """A constant that rounding takes away altogether."""
    analysis, module = alone(lambda x: 0.0 * x + 1.0 + 1e-9 - 1.0, bound=0.0)
    x = torch.zeros(1, 4, 6)
    assert module(x).norm() == 0 < module(x.double()).norm() <= analysis.at(1.0).magnitude < 1e-4


def test_a_module_s_input_is_what_it_was_for_whatever_reads_it_later():
    """The branch is analysed for an exact input; the skip connection carries the error that came in."""

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.branch = nn.Linear(6, 6), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.branch(h) + h

    analysis = RoundingAnalysis(Skip().double().eval(), (6,))
    first, branch = analysis.at(1.0).rows
    assert analysis.at(1.0).error >= first.error + branch.error > 1.5 * first.error


def test_results_computed_outside_torch_are_refused():
    outside = forward_of(lambda x: torch.from_numpy(abs(x.detach().numpy())))
    with pytest.raises(UnknownBoundError, match="outside torch"):
        RoundingAnalysis(outside, (3,), {"": 1.0, "0": 1.0, "1": 1.0}).at(1.0)
    analysis, _ = alone(lambda x: torch.tensor(x.tolist()))
    with pytest.raises(UnknownBoundError, match="outside torch"):
        analysis.at(1.0)


def state_bound(module: nn.Module, bound: float) -> None:
    lp.register_bound(type(module), lambda module, shape: bound)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    from liplayers.bounds import torch_modules

    monkeypatch.setattr(torch_modules, "RULES", dict(torch_modules.RULES))
    monkeypatch.setattr("liplayers.bounds.composition.RULES", torch_modules.RULES)


def test_custom_forwards_evaluate_within_their_error(registered: None):
    assert_covered(lp.freeze(stirred(Custom()), (6,)), (6,))
    state_bound(InPlace(), 3.0)
    assert_covered(nn.Sequential(InPlace()).eval(), (6,))


# Whole networks -------------------------------------------------------------------------------------------------------

DENSE = [name for name, family in lp.FAMILIES.items() if family.linear]
BLOCKS = [name for name, family in lp.FAMILIES.items() if family.dense_block]


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    families=st.lists(st.sampled_from(DENSE), min_size=5, max_size=5),
    blocks=st.lists(st.sampled_from(BLOCKS), max_size=2),
    activation=st.sampled_from([lp.MaxMin, nn.ReLU, nn.Tanh, lp.Abs, lambda: lp.GroupSort(3)]),
    norm=st.sampled_from([1e-6, 1.0, 50.0]),
    seed=st.integers(0, 1000),
)
def test_random_dense_networks_evaluate_within_their_error(
    widths: list[int], families: list[str], blocks: list[str], activation: Callable, norm: float, seed: int
):
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for (a, b), name in zip(itertools.pairwise(widths), families, strict=False):
        layers += [lp.FAMILIES[name].linear(a, b), activation()]  # type: ignore[misc]
    layers += [lp.FAMILIES[name].dense_block(widths[-1]) for name in blocks]  # type: ignore[misc]
    layers.append(lp.NormalizedLinear(widths[-1], 3))
    assert_covered(lp.freeze(stirred(nn.Sequential(*layers), seed)), (widths[0],), norm)


def test_the_error_of_many_residual_blocks_adds_up_and_does_not_multiply():
    torch.manual_seed(0)
    errors = []
    for depth in (5, 40):
        blocks = nn.Sequential(*(lp.SLLBlock(32) for _ in range(depth)))
        errors.append(RoundingAnalysis(lp.freeze(blocks).double(), (32,)).at(8.0).error)
    assert errors[1] < 10 * errors[0]


def test_the_error_grows_with_the_inputs_and_every_module_has_a_row():
    network = lp.freeze(nn.Sequential(nn.Flatten(), lp.AOLLinear(12, 5), lp.MaxMin(), nn.Linear(5, 3))).double()
    analysis = RoundingAnalysis(network, (3, 2, 2))
    small, large = analysis.at(1.0), analysis.at(1000.0)
    assert small.error < large.error < 1000 * small.error
    assert [row.path for row in small.rows] == ["0", "1", "2", "3"]
    assert [row.local_error > 0 for row in small.rows] == [False, True, False, True]
    assert small.rows[-1].error == small.error


# Exact arithmetic -----------------------------------------------------------------------------------------------------


def exactly(x: Tensor) -> list[Fraction]:
    return [Fraction(v) for v in x.tolist()]


def run_exactly(layers: list[nn.Module], x: Tensor) -> list[Fraction]:
    """Of linear layers, ReLU, MaxMin and Abs, in rational numbers."""
    h = exactly(x)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            rows = [exactly(row) for row in layer.weight]
            h = [sum((w * v for w, v in zip(row, h, strict=True)), Fraction(0)) for row in rows]
            h = [a + b for a, b in zip(h, exactly(layer.bias), strict=True)]
        elif isinstance(layer, lp.MaxMin):
            half = len(h) // 2
            a, b = h[:half], h[half : 2 * half]
            h = [*map(max, a, b), *map(min, a, b), *h[2 * half :]]
        elif isinstance(layer, lp.Abs):
            h = [abs(v) for v in h]
        else:
            h = [max(v, Fraction(0)) for v in h]
    return h


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    scale=st.sampled_from([1e-300, 1e-160, 1e-20, 1.0, 1e10]),
    cancelling=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_float64_evaluation_stays_within_its_error_of_exact_arithmetic(
    widths: list[int], scale: float, cancelling: bool, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        linear = nn.Linear(a, b).double()
        linear.weight.data = scale * torch.randn(b, a, dtype=F64, generator=generator)
        linear.bias.data = scale * torch.randn(b, dtype=F64, generator=generator)
        layers += [linear, [nn.ReLU(), lp.MaxMin(), lp.Abs()][seed % 3]]
    x = torch.randn(widths[0], dtype=F64, generator=generator)
    if cancelling:  # the last linear layer's rows are nearly orthogonal to what it meets
        last = layers[-2]
        h = nn.Sequential(*layers[:-2])(x[None])[0]
        if h.square().sum() > 0 and isinstance(last, nn.Linear):
            last.weight.data -= torch.outer(last.weight @ h, h) / h.square().sum()
            last.bias.data *= 1e-16
    network = nn.Sequential(*layers).eval().requires_grad_(False)
    exact = run_exactly(layers, x)
    got = exactly(network(x[None])[0])
    norm = math.nextafter(math.sqrt(float(sum(v * v for v in exactly(x)))), math.inf)
    error = RoundingAnalysis(network, (widths[0],)).at(norm).error
    assert sum((a - b) ** 2 for a, b in zip(exact, got, strict=True)) <= Fraction(error) ** 2


def test_gamma_is_above_the_exact_number():
    for dtype, n in [(torch.float64, 10), (torch.float64, 10**6), (torch.float32, 1000)]:
        format = Arithmetic.of(dtype)
        nu = n * Fraction(format.u)
        assert format.gamma(n) >= nu / (1 - nu) * (1 - Fraction(1, 2**50))
    assert Arithmetic.of(torch.float32).gamma(2**23) == math.inf


# Refusals -------------------------------------------------------------------------------------------------------------


def forward_of(compute: Callable[[Tensor], Tensor]) -> nn.Module:
    class Module(LipschitzModule):
        def forward(self, x: Tensor) -> Tensor:
            return compute(x)

        def lipschitz_bound(self) -> float:
            return 1.0

    return nn.Sequential(nn.Identity(), Module()).eval()


@pytest.mark.parametrize(
    ("compute", "says"),
    [
        (lambda x: x * x, "both depend on the input"),
        (lambda x: x @ x.mT, "both depend on the input"),
        (lambda x: x / (1 + x.abs()), "divides by values that depend"),
        (lambda x: x / torch.zeros(3, dtype=F64), "divides by zero"),
        (lambda x: torch.where(x > 0, x, -x), "aten.gt"),
        (lambda x: x + torch.randn(3, dtype=F64), "draws random numbers"),
        (lambda x: x.float().double(), "converts"),
        (lambda x: torch.fft.rfft(x).real, "aten._fft_r2c"),
        (lambda x: x.cumsum(1), "aten.cumsum"),
        (lambda x: x if x.sum() > -1 else -x, "aten.gt"),
        (lambda x: x.clone() if x.sum().item() else x, "aten._local_scalar_dense"),
        (lambda x: x[:, torch.tensor([0, 0, 0])], "aten.index"),
        (lambda x: F.batch_norm(x.view(1, 1, 3), None, None, training=True), "training mode"),
        (lambda x: torch.linalg.vector_norm(x, 1, dim=1, keepdim=True), "order 1"),
        (lambda x: torch.addmm(x.new_ones(3), x, x.new_ones(3, 3), alpha=2), "alpha=2"),
        (lambda x: torch.eye(3, dtype=x.dtype)[x.sort(1).indices[:, 0]], "aten.index"),
        (lambda x: x.view(torch.int64).abs().view(x.dtype), "a view gives torch.int64"),
        (lambda x: torch.complex(x, x).abs(), "aten.complex"),
        (lambda x: torch.view_as_complex(x[:, :2]).abs()[:, None], "complex numbers"),
        (lambda x: torch.add(x, 1.0, out=torch.empty_like(x)), "aten.add.out"),
        (lambda x: x.as_strided((1, 3), (3, 1)), "aten.as_strided"),
        (lambda x: x.clamp(x.flip(1)), "clamp"),
    ],
)
def test_what_is_not_known_is_refused_and_named(compute: Callable[[Tensor], Tensor], says: str):
    with pytest.raises(UnknownBoundError, match=rf"^1 \(Module\): .*{says}"):
        RoundingAnalysis(forward_of(compute), (3,), {"": 1.0, "0": 1.0, "1": 1.0}).at(1.0)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda m: m.train(), "training mode"),
        (lambda m: m.bfloat16(), "bfloat16"),
        (lambda m: m.to("meta"), "on meta; expected"),
    ],
)
def test_models_that_cannot_be_analysed_are_refused(spoil: Callable[[nn.Module], Any], says: str):
    network = nn.Sequential(nn.Linear(2, 2)).double().eval()
    with pytest.raises(ArgumentError, match=says):
        RoundingAnalysis(spoil(network), (2,))


def test_numbers_that_may_overflow_have_an_infinite_error():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double().eval()
    network[0].weight.data.fill_(1e200)
    network[1].weight.data.fill_(1e-200)
    assert RoundingAnalysis(network, (2,)).at(1.0).error < 1
    assert RoundingAnalysis(network, (2,)).at(1e100).error == math.inf


class Approximate(LipschitzModule):
    """Multiplies by what stands for the matrix of thirds, or adds it, or something that no rule covers."""

    third: Tensor

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        self.register_buffer("third", torch.full((3, 3), 1 / 3, dtype=F64) + 1e-9)

    def forward(self, x: Tensor) -> Tensor:
        if self.use == "multiply":
            return x @ self.third.mT
        if self.use == "add":
            return x + self.third[0]
        return x * self.third[0] if self.use == "entries" else x @ (self.third + self.third)

    def lipschitz_bound(self) -> float:
        return 1.0

    def constant_errors(self) -> dict[str, float]:
        return {"third": 3.01e-9}


def test_constants_that_stand_for_others_count():
    for use, norm in [("multiply", 2.0), ("add", 1.0)]:
        error = RoundingAnalysis(Approximate(use).eval(), (3,), {"": 1.0}).at(2.0).error
        assert 3e-9 * norm < error < 3.1e-9 * norm
    for use in ("entries", "sum"):
        with pytest.raises(UnknownBoundError, match="approximate constant"):
            RoundingAnalysis(Approximate(use).eval(), (3,), {"": 1.0}).at(2.0)
