"""The audit of every registered family: true norms against promised bounds, and the layer contract.

A family that is registered falls under all of it by itself.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable
from itertools import islice, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from audit import (
    EVERY,
    MATRICES,
    accepts,
    construct,
    example,
    executed_in_double,
    is_block,
    jacobian,
    lanczos_norm,
    of_role,
    operator_norm,
    settings,
    singular_values,
    train_to_exceed,
    worst_norm,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import liplayers
from liplayers import FAMILIES, cached
from liplayers.core.module import LipschitzModule
from liplayers.core.weights import ParametrizedModule
from liplayers.errors import LipschitzError

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
REGISTERED = pytest.mark.parametrize(("family", "role"), EVERY, ids=["-".join(e) for e in EVERY])


def every(*roles: str) -> pytest.MarkDecorator:
    found = of_role(*roles)
    return pytest.mark.parametrize(("family", "role"), found, ids=["-".join(f) for f in found])


def bound_of(layer: nn.Module) -> float:
    bound = liplayers.lipschitz_bound(layer)
    assert math.isfinite(bound)
    return bound


def assert_within_bound(layer: nn.Module, shape: tuple[int, ...], nonlinear: bool, dtype: torch.dtype) -> None:
    """At every extreme setting of the parameters, the measured norm is at most the bound."""
    layer.eval()
    exceeded = []
    for setting in settings(layer):
        measured, bound = worst_norm(executed_in_double(layer), shape, nonlinear), bound_of(layer)
        if not measured <= bound * (1 + TOLERANCE[dtype]):
            exceeded.append(f"{setting}: {measured} > {bound}")
    assert not exceeded, f"{layer} on {shape}: " + "; ".join(exceeded)


def assert_isometric(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """All singular values are 1: columns or rows are orthonormal, by shape."""
    values = singular_values(layer, shape)
    assert (values - 1).abs().max() < 1e-6, f"{layer} on {shape}: {values.min()} … {values.max()}"


# The instrument -------------------------------------------------------------------------------------------------------


def test_lanczos_agrees_with_the_dense_jacobian_and_both_see_an_excess():
    torch.manual_seed(0)
    W = torch.randn(40, 30, dtype=torch.float64)
    exact = torch.linalg.svdvals(W)[0].item()
    assert lanczos_norm(lambda v: W @ v, lambda u: W.mT @ u, torch.ones(30).double()) == pytest.approx(exact, rel=1e-12)
    assert operator_norm(lambda x: x @ W.mT, (30,)) == pytest.approx(exact, rel=1e-12)
    conv = nn.Conv2d(3, 4, 3, padding=1, dtype=torch.float64)
    large, small = operator_norm(conv, (3, 17, 13)), operator_norm(conv, (3, 9, 8))
    matrix = jacobian(conv, torch.zeros(3, 17, 13, dtype=torch.float64))
    assert large == pytest.approx(torch.linalg.svdvals(matrix)[0].item(), rel=1e-5)
    assert small < large


class _Cheat(LipschitzModule):
    """Its promise fails once its parameter is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.eye(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.raw

    def lipschitz_bound(self) -> float:
        return 1.0


def test_the_audit_catches_a_layer_that_exceeds_its_bound():
    with pytest.raises(AssertionError, match="gaussian"):
        assert_within_bound(_Cheat(), (3,), False, torch.float64)
    assert train_to_exceed(_Cheat(), (3,)) > 1.5


# Norms ----------------------------------------------------------------------------------------------------------------

DENSE_SIZES = [(1, 1), (1, 9), (9, 1), (2, 13), (13, 2), (7, 7), (8, 8)]


@every("linear")
@BOTH
@pytest.mark.parametrize(("inputs", "outputs"), DENSE_SIZES)
def test_linear_norm(family: str, role: str, dtype: torch.dtype, inputs: int, outputs: int):
    for bias in (True, False):
        layer = FAMILIES[family].linear(inputs, outputs, bias=bias, dtype=dtype)
        assert (layer.bias is not None) is bias
        assert layer(torch.randn(2, 3, inputs, dtype=dtype)).shape == (2, 3, outputs)
        assert_within_bound(layer, (inputs,), False, dtype)


@every("linear")
@pytest.mark.parametrize(("inputs", "outputs"), DENSE_SIZES)
def test_orthogonal_linear_preserves_norms(family: str, role: str, inputs: int, outputs: int):
    if "linear" not in FAMILIES[family].orthogonal:
        pytest.skip("not an orthogonal family")
    layer = FAMILIES[family].linear(inputs, outputs, dtype=torch.float64)
    assert_isometric(layer, (inputs,))
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.05 * torch.randn_like(p))
    assert_isometric(layer, (inputs,))


# in, out, kernel, image, then the arguments of nn.Conv2d
CONVS: list[tuple[int, int, Any, tuple[int, int], dict[str, Any]]] = [
    (1, 6, 3, (5, 7), {"padding": 1}),
    (6, 1, 3, (7, 5), {"padding": 1}),
    (2, 9, 3, (1, 4), {"padding": "same"}),
    (3, 3, 1, (3, 5), {}),
    (2, 3, 2, (5, 4), {}),
    (3, 2, 2, (4, 5), {"padding": "same"}),
    (2, 2, 2, (3, 3), {"padding": 1}),
    (2, 3, 4, (6, 5), {"padding": "same", "bias": False}),
    (2, 2, 5, (6, 7), {"padding": 2}),
    (2, 2, (1, 4), (5, 6), {"padding": "same"}),
    (2, 3, (3, 2), (5, 5), {"padding": (1, 0)}),
    (3, 2, (5, 2), (7, 6), {"padding": (2, 1), "stride": (2, 1)}),
    (2, 2, 3, (5, 5), {"padding": 4}),
    (2, 2, 5, (2, 3), {"padding": 5}),
    (1, 3, 3, (7, 5), {"stride": 2, "padding": 1}),
    (5, 2, 3, (8, 7), {"stride": 2}),
    (2, 8, 2, (6, 9), {"stride": 2}),
    (2, 2, 4, (9, 8), {"stride": 2, "padding": 1}),
    (2, 2, 3, (7, 8), {"stride": 3, "padding": 1}),
    (2, 3, 5, (9, 7), {"stride": 3, "padding": 2}),
    (2, 5, 2, (7, 7), {"stride": 3}),
    (2, 2, 1, (5, 6), {"stride": 2}),
    (2, 2, 3, (7, 7), {"dilation": 2, "padding": 2}),
    (2, 2, 3, (8, 7), {"dilation": 2, "stride": 2, "padding": 2}),
    (2, 2, 3, (9, 9), {"dilation": 2, "stride": 4, "padding": 1}),
    (2, 2, 2, (9, 7), {"dilation": 3, "stride": 2, "padding": "valid"}),
    (4, 6, 3, (5, 4), {"groups": 2, "padding": 1}),
    (4, 4, 3, (5, 5), {"groups": 4, "padding": "same"}),
    (6, 3, 2, (6, 5), {"groups": 3, "stride": 2}),
    (2, 3, 3, (4, 5), {"padding": 1, "padding_mode": "circular"}),
    (5, 2, 3, (3, 3), {"padding": "same", "padding_mode": "circular"}),
    (2, 4, 2, (4, 5), {"padding": "same", "padding_mode": "circular"}),
    (2, 2, 4, (5, 4), {"padding": 1, "padding_mode": "circular"}),
    (2, 2, 5, (2, 2), {"padding": 2, "padding_mode": "circular"}),
    (2, 2, 3, (5, 6), {"padding": 0, "padding_mode": "circular"}),
    (2, 3, 3, (6, 4), {"padding": 1, "stride": 2, "padding_mode": "circular"}),
    (2, 8, 2, (4, 6), {"stride": 2, "padding_mode": "circular"}),
    (2, 3, 4, (6, 6), {"padding": 1, "stride": 3, "padding_mode": "circular"}),
    (2, 2, 3, (5, 5), {"padding": 2, "dilation": 2, "padding_mode": "circular"}),
    (2, 2, 3, (6, 8), {"padding": 2, "dilation": 2, "stride": 2, "padding_mode": "circular"}),
    (2, 2, (3, 1), (5, 4), {"padding": (1, 0), "padding_mode": "circular"}),
]  # fmt: skip
CONV_IDS = [f"{i}-{o}-{k}-{s}-{a}".replace(" ", "") for i, o, k, s, a in CONVS]
BASIC_CONV = {"padding", "bias", "padding_mode"}  # with an odd kernel nobody may refuse these


@every("conv")
@pytest.mark.parametrize(("inputs", "outputs", "kernel", "image", "arguments"), CONVS, ids=CONV_IDS)
def test_conv_norm_and_shape(
    family: str, role: str, inputs: int, outputs: int, kernel: Any, image: tuple, arguments: dict
):
    # what float32 adds is the rounding of the map at extreme parameters: a third of the geometries show it
    index = CONVS.index((inputs, outputs, kernel, image, arguments))
    for dtype in (torch.float64, torch.float32) if index % 3 == 0 else (torch.float64,):
        layer = construct(FAMILIES[family].conv, inputs, outputs, kernel, dtype=dtype, **arguments)
        if layer is None:
            assert not set(arguments) <= BASIC_CONV or kernel not in (3, 5), "refuses a plain convolution"
            return
        theirs = nn.Conv2d(inputs, outputs, kernel, dtype=dtype, **arguments)
        x = torch.randn(2, inputs, *image, dtype=dtype)
        assert layer(x).shape == theirs(x).shape
        assert layer(x[0]).shape == theirs(x[0]).shape
        torch.testing.assert_close(layer(x[0]), layer(x)[0])
        assert (layer.bias is not None) is arguments.get("bias", True)
        assert_within_bound(layer, (inputs, *image), False, dtype)


# in, out, kernel, image, then the arguments of nn.ConvTranspose2d
TRANSPOSED: list[tuple[int, int, Any, tuple[int, int], dict[str, Any]]] = [
    (2, 3, 3, (4, 5), {}),
    (5, 1, 3, (3, 4), {"padding": 1, "bias": False}),
    (1, 5, 2, (3, 2), {"stride": 2}),
    (3, 2, 4, (3, 4), {"stride": 2, "padding": 1}),
    (2, 3, (3, 2), (4, 3), {"stride": (2, 1), "padding": (1, 0), "output_padding": (1, 0)}),
    (2, 2, 3, (3, 3), {"stride": 3, "output_padding": 2}),
    (4, 6, 3, (3, 4), {"groups": 2, "stride": 2, "padding": 1, "output_padding": 1}),
    (2, 2, 3, (4, 4), {"dilation": 2, "padding": 2, "output_padding": 1}),
    (2, 2, 3, (3, 4), {"dilation": 3, "stride": 2, "padding": 1}),
    (2, 2, 2, (3, 4), {"dilation": 2, "stride": 2}),
    (2, 2, 2, (3, 4), {"stride": 3}),
]  # fmt: skip


@every("conv_transpose")
@pytest.mark.parametrize(("inputs", "outputs", "kernel", "image", "arguments"), TRANSPOSED, ids=str)
def test_conv_transpose_norm_and_shape(
    family: str, role: str, inputs: int, outputs: int, kernel: Any, image: tuple, arguments: dict
):
    index = TRANSPOSED.index((inputs, outputs, kernel, image, arguments))
    for dtype in (torch.float64, torch.float32) if index % 3 == 0 else (torch.float64,):  # as for convolutions
        layer = construct(FAMILIES[family].conv_transpose, inputs, outputs, kernel, dtype=dtype, **arguments)
        if layer is None:
            assert "dilation" in arguments, "refuses a plain transposed convolution"
            return
        theirs = nn.ConvTranspose2d(inputs, outputs, kernel, dtype=dtype, **arguments)
        assert layer.weight.shape == theirs.weight.shape
        x = torch.randn(2, inputs, *image, dtype=dtype)
        assert layer(x).shape == theirs(x).shape
        assert layer(x[0]).shape == theirs(x[0]).shape
        assert_within_bound(layer, (inputs, *image), False, dtype)


@every("conv_transpose")
def test_conv_transpose_is_the_adjoint_of_the_convolution(family: str, role: str):
    geometry: dict[str, Any] = {"stride": 2, "padding": 1, "bias": False, "dtype": torch.float64}
    back = FAMILIES[family].conv_transpose(4, 3, 3, output_padding=1, **geometry)
    forth = FAMILIES[family].conv(3, 4, 3, **geometry)
    perturb(back)
    forth.load_state_dict(back.adjoint.state_dict())
    x, y = torch.randn(1, 3, 8, 6, dtype=torch.float64), torch.randn(1, 4, 4, 3, dtype=torch.float64)
    torch.testing.assert_close((forth(x) * y).sum(), (x * back(y)).sum())


@every("conv_transpose")
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"padding_mode": "circular"}, "padding_mode"),
        ({"output_padding": 1}, "output_padding"),
        ({"groups": 2}, "groups"),
        ({"padding": -1}, "padding"),
    ],
)
def test_conv_transpose_refuses_by_name(family: str, role: str, arguments: dict, name: str):
    with pytest.raises(ValueError, match=name) as caught:
        FAMILIES[family].conv_transpose(3, 4, 3, **arguments)
    assert isinstance(caught.value, LipschitzError)
    assert "\n" not in str(caught.value)


ISOMETRIES = [
    (3, 3, 3, (4, 5), {"padding": 1}),
    (2, 5, 3, (5, 3), {"padding": "same"}),
    (5, 2, 5, (5, 6), {"padding": 2}),
    (3, 3, 1, (3, 2), {}),
    (2, 3, 2, (4, 3), {"padding": "same"}),
    (2, 3, (1, 3), (3, 4), {"padding": (0, 1)}),
    (2, 8, 2, (4, 6), {"stride": 2}),
    (3, 2, 2, (4, 4), {"stride": 2}),
    (2, 3, 3, (6, 4), {"stride": 2, "padding": 1}),
]


@every("conv")
@pytest.mark.parametrize(("inputs", "outputs", "kernel", "image", "arguments"), ISOMETRIES)
def test_orthogonal_conv_preserves_norms(
    family: str, role: str, inputs: int, outputs: int, kernel: Any, image: tuple, arguments: dict
):
    if "conv" not in FAMILIES[family].orthogonal:
        pytest.skip("not an orthogonal family")
    make = FAMILIES[family].conv
    layer = construct(make, inputs, outputs, kernel, dtype=torch.float64, padding_mode="circular", **arguments)
    if layer is None:
        assert kernel not in (1, 3, 5) or "stride" in arguments, "refuses a plain circular convolution"
        return
    assert_isometric(layer, (inputs, *image))
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.05 * torch.randn_like(p))
    assert_isometric(layer, (inputs, *image))


WIDENINGS = {"hidden_features": (3, 11), "hidden_channels": (2, 5)}


def block_variants(make: Callable[..., nn.Module]) -> list[dict[str, Any]]:
    """The combinations of the usual arguments that this block takes."""
    choices: dict[str, list] = {}
    if accepts(make, "bias"):
        choices["bias"] = [True, False]
    for name, sizes in WIDENINGS.items():
        if accepts(make, name):
            choices[name] = list(sizes)
    if accepts(make, "kernel_size"):
        choices["kernel_size"] = [1, 2, 3, 5]
    if accepts(make, "padding_mode"):
        choices["padding_mode"] = ["zeros", "circular"]
    if accepts(make, "activation"):
        choices["activation"] = [nn.ReLU(), nn.Tanh()]
    base = {name: values[0] for name, values in choices.items()}
    single = [{**base, name: value} for name, values in choices.items() for value in values]
    last = {name: values[-1] for name, values in choices.items()}
    return [base, last, *single]


@every("dense_block", "conv_block")
@BOTH
def test_block_norm(family: str, role: str, dtype: torch.dtype):
    make = getattr(FAMILIES[family], role)
    built = 0
    default, *variants = [{}, *block_variants(make)]
    # what float32 adds is the rounding of the map at extreme parameters: three variants show it
    for arguments in [default, *(variants if dtype is torch.float64 else variants[:2])]:
        layer = construct(make, 3, dtype=dtype, **arguments)
        if layer is None:
            assert arguments.get("kernel_size", 2) % 2 == 0, f"refuses {arguments}"
            continue
        built += 1
        shape = (3,) if role == "dense_block" else (3, 4, 5)
        assert layer(torch.randn(2, *shape, dtype=dtype)).shape == (2, *shape)
        assert_within_bound(layer, shape, True, dtype)
    assert built


@REGISTERED
def test_norm_on_a_large_image_by_lanczos(family: str, role: str):
    """Far beyond the size at which a kernel could have been normalised by its luck with the border."""
    if "conv" not in role:
        pytest.skip("no image")
    layer, (channels, *_) = example(family, role, torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            if p.dim() > 1:
                p.copy_(MATRICES["gaussian"](p, torch.Generator().manual_seed(1)).abs())
    shape = (channels, 23, 17)
    at = torch.randn(shape, dtype=torch.float64)
    assert operator_norm(layer, shape, at) <= bound_of(layer) * (1 + 1e-6)


@REGISTERED
@pytest.mark.parametrize("lr", [0.05, 1.0])
def test_training_cannot_exceed_the_bound(family: str, role: str, lr: float):
    layer, shape = example(family, role, torch.float64)
    reached = train_to_exceed(layer, shape, steps=30, lr=lr)
    layer.eval()
    measured, bound = worst_norm(layer, shape, is_block(role)), bound_of(layer)
    assert max(reached, measured) <= bound * (1 + 1e-6)


# The contract: state and caches ---------------------------------------------------------------------------------------


def perturb(layer: nn.Module) -> None:
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))


def outputs(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


@pytest.fixture
def warm(family: str, role: str) -> tuple[nn.Module, Tensor, tuple[int, ...]]:
    """A layer in eval mode whose cache is filled, an input, and its shape."""
    layer, shape = example(family, role)
    x = torch.randn(3, *shape)
    layer.eval()
    outputs(layer, x)
    return layer, x, shape


def fresh_twin(layer: nn.Module, family: str, role: str) -> nn.Module:
    """A new layer with the same parameters that has never run."""
    twin, _ = example(family, role)
    twin.load_state_dict(layer.state_dict())
    return twin.eval()


@REGISTERED
def test_state_dict_holds_parameters_only_and_keeps_its_keys(family: str, role: str):
    layer, shape = example(family, role)
    keys = list(layer.state_dict())
    for training in (True, False):
        layer.train(training)
        layer(torch.randn(1, *shape))
        outputs(layer, torch.randn(1, *shape))
        liplayers.lipschitz_bound(layer)
        assert list(layer.state_dict()) == keys
    assert set(keys) >= {name for name, _ in layer.named_parameters()}


@REGISTERED
def test_loading_in_eval_replaces_a_warm_cache(family: str, role: str, warm: tuple):
    layer, x, _ = warm
    before = outputs(layer, x)
    other, _ = example(family, role)
    perturb(other)
    buffer = io.BytesIO()
    torch.save(other.state_dict(), buffer)
    buffer.seek(0)
    layer.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(outputs(layer, x), outputs(other.eval(), x))
    assert not torch.equal(outputs(layer, x), before)


@REGISTERED
@pytest.mark.parametrize("swap", ["data.copy_", "data=", "copy_", "optimizer"])
def test_changed_parameters_replace_a_warm_cache(family: str, role: str, warm: tuple, swap: str):
    layer, x, _ = warm
    before = outputs(layer, x)
    if swap == "optimizer":
        layer(x).square().sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.5).step()
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(0.1 * torch.randn_like(p))
    for p in layer.parameters():
        new = p.detach() + 0.3 * torch.randn_like(p)
        if swap == "data.copy_":
            p.data.copy_(new)
        elif swap == "data=":
            p.data = new
        elif swap == "copy_":
            with torch.no_grad():
                p.copy_(new)
    assert not torch.equal(outputs(layer, x), before)
    assert torch.equal(outputs(layer, x), outputs(fresh_twin(layer, family, role), x))


@REGISTERED
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(family: str, role: str, warm: tuple, clone: Callable):
    layer, x, _ = warm
    before = outputs(layer, x)
    other = clone(layer)
    assert torch.equal(outputs(other, x), before)
    perturb(other)
    assert torch.equal(outputs(layer, x), before)
    assert torch.equal(outputs(other, x), outputs(fresh_twin(other, family, role), x))
    assert repr(layer) == repr(fresh_twin(layer, family, role))


@REGISTERED
def test_casting_recomputes_in_the_new_precision(family: str, role: str, warm: tuple):
    layer, x, _ = warm
    before = outputs(layer, x)
    double = outputs(layer.double(), x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), before, rtol=1e-3, atol=1e-3)
    twin, _ = example(family, role, torch.float64)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(double, outputs(twin.eval(), x.double()))
    assert outputs(layer.to(torch.float32), x).dtype == torch.float32


@REGISTERED
def test_a_warm_cache_follows_the_image_size(family: str, role: str, warm: tuple):
    layer, _, shape = warm
    if "conv" not in role:
        pytest.skip("no image")
    for size in [(4, 7), (9, 3), (6, 6), (3, 8), (5, 9), shape[1:]]:
        y = torch.randn(2, shape[0], *size)
        assert torch.equal(outputs(layer, y), outputs(fresh_twin(layer, family, role), y))


@REGISTERED
def test_reading_changes_nothing(family: str, role: str, warm: tuple):
    layer, x, _ = warm
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    first = outputs(layer, x)
    bound = liplayers.lipschitz_bound(layer)
    for _ in range(3):
        assert torch.equal(outputs(layer, x), first)
        assert liplayers.lipschitz_bound(layer) == bound
    layer.train()
    torch.testing.assert_close(outputs(layer, x), first, rtol=0, atol=0)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@REGISTERED
@pytest.mark.parametrize("training", [True, False])
def test_gradients_reach_the_raw_parameters(family: str, role: str, warm: tuple, training: bool):
    layer, x, _ = warm
    layer.train(training)
    layer(x).square().sum().backward()
    # a multiplier may have no effect at a symmetric start, but it must be in the graph
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())


@REGISTERED
@BOTH
def test_gradients_are_finite_at_every_extreme_setting(family: str, role: str, dtype: torch.dtype):
    layer, shape = example(family, role, dtype)
    x = torch.randn(2, *shape, dtype=dtype)
    broken = []
    for setting in settings(layer):
        layer.zero_grad()
        with torch.enable_grad():
            y = layer(x)
            # a bound that grows with the parameters would overflow the square, not the layer
            (y / max(1.0, bound_of(layer))).square().mean().backward()
        found = [n for n, p in layer.named_parameters() if not torch.isfinite(p.grad).all()]
        if found or not torch.isfinite(y).all():
            broken.append(f"{setting}: {found or 'output'}")
    assert not broken, "; ".join(broken)


@REGISTERED
def test_a_weight_written_to_from_outside_does_not_stay(family: str, role: str, warm: tuple):
    layer, x, _ = warm
    if not hasattr(layer, "weight"):
        pytest.skip("no weight attribute")
    if isinstance(layer.weight, nn.Parameter):
        pytest.skip("the weight is the parameter")
    before = outputs(layer, x)
    with torch.no_grad():
        getattr(layer, "adjoint", layer).effective().mul_(3)
    assert torch.equal(outputs(layer, x), before)


@REGISTERED
def test_a_cache_from_inference_mode_serves_a_later_backward_pass(family: str, role: str):
    layer, shape = example(family, role)
    layer.eval().requires_grad_(False)
    x = torch.randn(2, *shape)
    with torch.inference_mode():
        expected = layer(x).clone()
    probe = x.clone().requires_grad_()
    y = layer(probe)
    y.square().sum().backward()
    assert torch.equal(y.detach(), expected)
    assert probe.grad.abs().sum() > 0


@REGISTERED
def test_the_cached_context_shares_and_notices_changes(family: str, role: str):
    layer, shape = example(family, role)
    x = torch.randn(2, *shape)
    parts = [m for m in layer.modules() if isinstance(m, ParametrizedModule)]
    computed = []
    for part in parts:
        original = part.map_weight

        def counting(*key: Any, original: Callable = original) -> Any:
            computed.append(1)
            return original(*key)

        part.map_weight = counting  # type: ignore[method-assign]
    plain = layer(x)
    once = len(computed)
    with cached():
        first = layer(x)
        with cached():
            second = layer(x)
        assert len(computed) == 2 * once
        assert torch.equal(first, plain)
        assert torch.equal(second, plain)
        (first + second).square().sum().backward()
        perturb(layer)
        changed = layer(x)
        assert len(computed) == 3 * once
    assert torch.equal(changed, layer(x))
    assert not torch.equal(changed, plain)


# The contract: precision ----------------------------------------------------------------------------------------------

HALF = [torch.bfloat16, torch.float16]


def half_twin(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A float64 copy that runs what the layer's weights are after rounding to `dtype`, where they are real.

    Complex transfer matrices never run in half precision: no such transform exists.
    """
    double = executed_in_double(layer)
    for module in double.modules():
        if isinstance(module, ParametrizedModule):
            inner = module.effective

            def rounded(*key: Any, inner: Callable = inner) -> Any:
                value = inner(*key)
                values = value if isinstance(value, tuple) else (value,)
                cast = tuple(v if v.is_complex() else v.to(dtype).double() for v in values)
                return cast if isinstance(value, tuple) else cast[0]

            module.effective = rounded  # type: ignore[method-assign]
    return double


@REGISTERED
@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
def test_autocast_computes_weights_in_float32_and_the_bound_counts_rounding(family: str, role: str, dtype: torch.dtype):
    layer, shape = example(family, role)
    perturb(layer)
    x = torch.randn(2, *shape)
    seen = []
    for part in layer.modules():
        if isinstance(part, ParametrizedModule):
            original = part.map_weight

            def spying(*key: Any, original: Callable = original) -> Any:
                assert not torch.is_autocast_enabled("cpu")
                value = original(*key)
                seen.extend(v.dtype for v in tree_leaves(value) if isinstance(v, Tensor))
                return value

            part.map_weight = spying  # type: ignore[method-assign]
    with torch.autocast("cpu", dtype):
        layer(x).float().square().sum().backward()
        layer.lipschitz_bound()
    assert all(d.itemsize >= 4 for d in seen)
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    for part in layer.modules():
        part.__dict__.pop("map_weight", None)
    exceeded = []
    layer.eval()
    # what float16 adds to bfloat16 is its range: a third of the settings show it
    for setting in islice(settings(layer), 0, None, 1 if dtype is torch.bfloat16 else 3):
        with torch.autocast("cpu", dtype):
            bound = layer.lipschitz_bound()
        measured = worst_norm(half_twin(layer, dtype), shape, is_block(role))
        # weights beyond the range of float16 have no finite bound, and must not pretend to
        if not (measured <= bound * (1 + 1e-5) or (not math.isfinite(measured) and not math.isfinite(bound))):
            exceeded.append(f"{setting}: {measured} > {bound}")
    assert not exceeded, "; ".join(exceeded)


@REGISTERED
@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
def test_half_precision_layers_count_their_rounded_weight(family: str, role: str, dtype: torch.dtype):
    layer, shape = example(family, role, dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(torch.randn(2, *shape, dtype=dtype)).dtype == dtype
    layer.eval()
    exceeded = []
    for setting in settings(layer):
        if not all(torch.isfinite(p).all() for p in layer.parameters()):
            continue  # beyond the range of the dtype
        bound = layer.lipschitz_bound()
        measured = worst_norm(half_twin(layer, dtype), shape, is_block(role))
        if not (measured <= bound * (1 + 1e-5) or (not math.isfinite(measured) and not math.isfinite(bound))):
            exceeded.append(f"{setting}: {measured} > {bound}")
    assert not exceeded, "; ".join(exceeded)


# The contract: construction -------------------------------------------------------------------------------------------


@REGISTERED
def test_all_parameters_exist_after_construction(family: str, role: str):
    layer, shape = example(family, role)
    before = [id(p) for p in torch.optim.SGD(layer.parameters(), lr=0.1).param_groups[0]["params"]]
    layer(torch.randn(1, *shape)).sum().backward()
    layer.eval()
    outputs(layer, torch.randn(1, *shape))
    assert [id(p) for p in layer.parameters()] == before
    layer.reset_parameters()
    assert [id(p) for p in layer.parameters()] == before


@REGISTERED
def test_device_and_dtype_arguments(family: str, role: str):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer, shape = example(family, role, dtype, device="cpu")
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert layer(torch.randn(1, *shape, dtype=dtype)).dtype == dtype
    layer, shape = example(family, role, device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.isfinite(layer(torch.randn(1, *shape))).all()


@REGISTERED
def test_repr_shows_what_the_constructor_took(family: str, role: str):
    make = getattr(FAMILIES[family], role)
    sizes = {"linear": (6, 5), "conv": (6, 5, 3), "conv_transpose": (6, 5, 3)}.get(role, (6,))
    text = make(*sizes).extra_repr()
    assert text in " ".join(repr(make(*sizes)).split())
    assert all(str(size) in text for size in sizes)
    if accepts(make, "bias"):
        assert "bias=False" in make(*sizes, bias=False).extra_repr()
        assert "bias=False" not in text
    if accepts(make, "padding_mode") and role != "conv_transpose":
        assert "circular" in repr(make(*sizes, padding_mode="circular"))
    for name, value in [("hidden_features", 11), ("hidden_channels", 13)]:
        if accepts(make, name):
            assert f"{name}={value}" in repr(make(*sizes, **{name: value}))


TORCHS = {"linear": nn.Linear, "conv": nn.Conv2d, "conv_transpose": nn.ConvTranspose2d}


@REGISTERED
def test_the_signature_is_written_out_in_torchs_order(family: str, role: str):
    make = getattr(FAMILIES[family], role)
    ours = inspect.signature(make).parameters
    kinds = {p.kind for p in ours.values()}
    assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    if role in TORCHS:
        theirs = inspect.signature(TORCHS[role]).parameters
        positional = [n for n, p in ours.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        assert positional == list(theirs)
        assert all(ours[n].default == theirs[n].default for n in positional if n not in ("device", "dtype"))
    with pytest.raises(TypeError, match=rf"^{make.__name__}\.__init__\(\) missing"):
        make()


@REGISTERED
@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "8"])
def test_a_size_that_is_no_positive_integer_is_refused_by_name(family: str, role: str, bad: Any):
    make = getattr(FAMILIES[family], role)
    names = {
        "linear": ("in_features", "out_features"),
        "conv": ("in_channels", "out_channels", "kernel_size"),
        "conv_transpose": ("in_channels", "out_channels", "kernel_size"),
        "dense_block": ("features",),
        "conv_block": ("channels",),
    }[role]
    for i, name in enumerate(names):
        sizes = [6] * len(names)
        sizes[i] = bad
        with pytest.raises(ValueError, match=name) as caught:
            make(*sizes)
        assert isinstance(caught.value, LipschitzError)
        assert repr(bad) in str(caught.value)
        assert "\n" not in str(caught.value)


@REGISTERED
def test_gradcheck(family: str, role: str):
    make = getattr(FAMILIES[family], role)
    torch.manual_seed(1)
    small: dict[str, tuple] = {
        "linear": ((3, 2), (3,)),
        "conv": ((2, 2, 2), (2, 3, 3)),
        "conv_transpose": ((2, 2, 2), (2, 3, 3)),
        "dense_block": ((3,), (3,)),
        "conv_block": ((2,), (2, 3, 3)),
    }
    sizes, shape = small[role]
    layer = construct(make, *sizes, dtype=torch.float64)
    if layer is None:  # an even kernel
        layer = make(2, 2, 3, padding=1, dtype=torch.float64)
    perturb(layer)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), atol=1e-6)


def loss_of(layer: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, values, (x,)).pow(3).sum()

    return loss


@REGISTERED
def test_a_second_derivative_is_right_or_raises(family: str, role: str):
    """Gradients that are written out by hand lack their own derivatives; torch.func would not have noticed."""
    layer, shape = example(family, role, torch.float64)
    perturb(layer)
    values = {name: p.detach() for name, p in layer.named_parameters()}
    along = {name: torch.randn_like(p) for name, p in values.items()}
    loss = loss_of(layer, torch.randn(2, *shape, dtype=torch.float64))

    def slope(values: dict[str, Tensor]) -> Tensor:
        gradient = torch.func.grad(loss)(values)
        return torch.stack([(gradient[name] * along[name]).sum() for name in values]).sum()

    def moved(step: float) -> dict[str, Tensor]:
        return {name: p + step * along[name] for name, p in values.items()}

    try:
        second = torch.func.grad(slope)(values)
    except NotImplementedError as error:
        if "differentiated again" not in str(error):
            raise
        return
    curvature = sum((second[name] * along[name]).sum() for name in values)
    expected = (slope(moved(1e-5)) - slope(moved(-1e-5))) / 2e-5
    torch.testing.assert_close(curvature, expected, rtol=1e-4, atol=1e-4)


@REGISTERED
def test_per_sample_gradients_and_jacobians_of_the_parameters(family: str, role: str):
    layer, shape = example(family, role, torch.float64)
    perturb(layer)
    values = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(3, *shape, dtype=torch.float64)

    def one(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return loss_of(layer, sample[None])(values)

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(values, x)
    together = torch.func.jacrev(lambda values: torch.stack([one(values, sample) for sample in x]))(values)
    for name in values:
        torch.testing.assert_close(each[name], together[name])


@REGISTERED
def test_the_cached_context_notices_parameters_put_in_their_place(family: str, role: str):
    layer, shape = example(family, role)
    x = torch.randn(2, *shape)
    with cached():
        for scale in range(1, 7):
            values = {name: p * torch.linspace(1, scale, p.numel()).view_as(p) for name, p in layer.named_parameters()}
            inside = torch.func.functional_call(layer, values, (x,)).detach()
            twin, _ = example(family, role)
            twin.load_state_dict({name: value.detach() for name, value in values.items()}, strict=False)
            torch.testing.assert_close(inside, outputs(twin, x))
            del values


@REGISTERED
def test_weights_are_computed_without_tf32(family: str, role: str):
    """A bound proven in float32 says nothing of a weight that was computed in TF32 or bfloat16."""
    layer, shape = example(family, role)
    settings = [torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv]  # those of the CPU
    seen = []
    for part in layer.modules():
        if isinstance(part, ParametrizedModule):
            original = part.map_weight

            def spying(*key: Any, original: Callable = original) -> Any:
                seen.extend(backend.fp32_precision for backend in settings)
                return original(*key)

            part.map_weight = spying  # type: ignore[method-assign]
    before = [backend.fp32_precision for backend in settings]
    try:
        for backend in settings:
            backend.fp32_precision = "tf32"
        layer(torch.randn(2, *shape))
        assert [backend.fp32_precision for backend in settings] == ["tf32"] * 2
    finally:
        for backend, precision in zip(settings, before, strict=True):
            backend.fp32_precision = precision
    assert set(seen) == {"ieee"}


@REGISTERED
def test_runs_on_meta_for_its_shapes(family: str, role: str):
    layer, shape = example(family, role)
    on_meta, _ = example(family, role, device="meta")
    x = torch.randn(2, *shape)
    assert on_meta(x.to("meta")).shape == layer(x).shape


@pytest.mark.slow
@REGISTERED
@pytest.mark.parametrize("training", [True, False])
def test_compile(family: str, role: str, training: bool):
    layer, shape = example(family, role)
    layer.train(training)
    x = torch.randn(2, *shape)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
    compiled(x).square().sum().backward()
    ours = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).square().sum().backward()
    for p, g in zip(layer.parameters(), ours, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-4)


@REGISTERED
def test_initial_gain_neither_decays_nor_explodes(family: str, role: str):
    layer, _ = example(family, role)
    make = getattr(FAMILIES[family], role)
    torch.manual_seed(0)
    if role == "linear":
        layer, x = make(32, 32), torch.randn(64, 32)
    elif role == "conv":
        layer, x = make(8, 8, 3, padding=1), torch.randn(8, 8, 9, 9)
    elif role == "conv_transpose":
        layer, x = make(8, 8, 2, stride=2), torch.randn(8, 8, 5, 5)
    else:
        layer, x = make(8), torch.randn(64, 8, *([9, 9] if role == "conv_block" else []))
    y = outputs(layer, x)
    assert 0.6 < (y.norm() / x.norm()).item() <= 1 + 1e-5


@every("conv")
@pytest.mark.parametrize("stride", [2, 3])
def test_circular_padding_with_a_stride_that_does_not_divide_is_refused_at_call(family: str, role: str, stride: int):
    layer = construct(FAMILIES[family].conv, 2, 2, 3, stride=stride, padding=1, padding_mode="circular")
    if layer is None:
        return
    for size in product((6, 7), (6, 7)):
        if all(n % stride == 0 for n in size):
            layer(torch.randn(1, 2, *size))
        else:
            with pytest.raises(ValueError, match="stride") as caught:
                layer(torch.randn(1, 2, *size))
            assert isinstance(caught.value, LipschitzError)


@every("conv")
def test_default_arguments_are_those_of_torch(family: str, role: str):
    ours, theirs = FAMILIES[family].conv(3, 5, 3), nn.Conv2d(3, 5, 3)
    x = torch.randn(2, 3, 6, 7)
    assert ours(x).shape == theirs(x).shape == F.conv2d(x, theirs.weight).shape
    sizes = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    for name in (*sizes, "padding_mode"):
        assert getattr(ours, name) == getattr(theirs, name), name
