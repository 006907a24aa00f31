"""Weights that are computed: what may be written into them, and layers that start from a dense one."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from audit import EVERY
from torch import Tensor, nn

import liplayers as lp
from liplayers import FAMILIES
from liplayers.errors import ArgumentError, SettledError, ShapeError
from liplayers.layers.bases.dense import LipschitzLinear
from liplayers.testing.measure import worst_norm

REGISTERED = pytest.mark.parametrize(("family", "role"), EVERY, ids=["-".join(e) for e in EVERY])


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "init": nn.init.zeros_,
    "init.normal": nn.init.normal_,
    "init.orthogonal": lambda weight: nn.init.orthogonal_(weight),
    "copy": lambda weight: weight.copy_(torch.zeros_like(weight)),
    "data": lambda weight: weight.data.mul_(2),
    "detached": lambda weight: weight.detach().mul_(2),
    "other data": lambda weight: setattr(weight, "data", torch.zeros_like(weight)),
    "a row": lambda weight: weight[0].zero_(),
    "an entry": lambda weight: weight.__setitem__(0, 0.0),
    "in place": lambda weight: operator.iadd(weight, 1),
    "out": lambda weight: torch.mul(torch.ones_like(weight), 2, out=weight),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_writing_into_a_computed_weight_raises(write: Callable[[Tensor], Any], mode: str):
    for layer in (lp.CayleyLinear(3, 4), lp.AOCConv2d(3, 4, 2), lp.AOLConvTranspose2d(3, 4, 2)):
        layer.train(mode == "train")
        before = layer.weight.clone()
        with pytest.raises(SettledError, match="would not change it"), torch.no_grad():
            write(layer.weight)
        assert torch.equal(layer.weight, before)


def test_a_computed_weight_is_otherwise_a_tensor(tmp_path: Path):
    layer = lp.CayleyLinear(3, 4)
    assert type(layer.weight + 0) is type(copy.deepcopy(layer.weight.detach())) is Tensor
    torch.save(layer.weight.detach(), tmp_path / "weight.pt")
    assert torch.equal(torch.load(tmp_path / "weight.pt"), layer.weight)
    assert torch.zeros(4, 3).copy_(layer.weight.detach()).equal(layer.weight)
    layer.weight.square().sum().backward()
    assert layer.raw.grad.abs().sum() > 0


@REGISTERED
def test_a_layer_starts_from_a_dense_weight(family: str, role: str):
    torch.manual_seed(0)
    make = getattr(FAMILIES[family], role)
    sizes = [(5,)] if role.endswith("block") else [(4, 4), (3, 5), (5, 3)]
    kernel = () if role in ("linear", "dense_block", "conv_block") else (3,)
    for size in sizes:
        layer, other = (make(*size, *kernel, dtype=torch.float64) for _ in range(2))
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.05 * torch.randn_like(p))
        if not hasattr(layer, "weight"):
            with pytest.raises(ArgumentError, match=type(layer).__name__):
                layer.weight = torch.eye(5)
            continue
        target = other.weight.detach()
        first = (layer.weight - target).norm().item()
        distance = layer.assign_weight(target)
        assert distance == pytest.approx((layer.weight - target).norm().item(), abs=1e-12)
        # what has a formula has the weight itself; what is rescaled again, or found by search, comes near it
        exact = family not in ("aol", "bcop", "aoc", "manifold")
        assert distance <= (1e-5 if exact else 0.5 * first)
        layer.weight = nn.Parameter(torch.randn_like(target))  # nothing that the layer can have: a contraction
        assert worst_norm(layer, shape_for(role, size), False) <= 1 + 1e-6


def shape_for(role: str, size: tuple[int, ...]) -> tuple[int, ...]:
    return (size[0],) if role in ("linear", "dense_block") else (size[0], 6, 7)


@pytest.mark.parametrize("family", ["bjorck", "cholesky", "manifold", "cayley"])
def test_an_orthogonal_layer_starts_at_the_polar_factor(family: str):
    torch.manual_seed(0)
    for m, n in ((4, 4), (3, 5), (5, 3)):
        layer = FAMILIES[family].linear(n, m, dtype=torch.float64)
        W = torch.randn(m, n, dtype=torch.float64)
        if m == n:  # Cayley's are rotations
            W = torch.linalg.matrix_exp(0.3 * (W - W.mT)) + 0.01 * W
        layer.weight = W
        polar, _ = scipy.linalg.polar(W.numpy())
        np.testing.assert_allclose(layer.weight.detach().numpy(), polar, atol=1e-7)


def test_no_reflection_of_that_rank_is_nearer_than_bros():
    torch.manual_seed(0)
    layer, W = lp.BROLinear(5, 5, rank_ratio=0.4, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    nearest = layer.assign_weight(W)
    for _ in range(100):
        nn.init.normal_(layer.raw)
        assert (layer.weight - W).norm() >= nearest


@pytest.mark.parametrize("wrong", [torch.eye(3), torch.full((4, 4), torch.nan), 1.0, torch.eye(4).to(torch.complex64)])
def test_what_is_no_dense_weight_is_refused(wrong: Any):
    layer = lp.CayleyLinear(4, 4)
    before = layer.raw.detach().clone()
    with pytest.raises((ArgumentError, ShapeError), match=r"CayleyLinear: weight"):
        layer.weight = wrong
    assert torch.equal(layer.raw, before)


def test_a_family_without_a_map_is_refused_when_its_class_is_made():
    with pytest.raises(TypeError, match=r"Unmapped: it has no map_weight"):

        class Unmapped(LipschitzLinear):
            pass


# Equal layers, mapped together ---------------------------------------------------------------------------------------


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes whose map is called, in order."""
    calls: list[str] = []
    for cls in (lp.BROConv2d, lp.CholeskyLinear, lp.LOTConv2d, lp.FreeResidualConv2dBlock):
        original = cls.map_weight

        def watching(self: Any, *raw: Any, original: Callable = original) -> Any:
            calls.append(type(self).__name__)
            return original(self, *raw)

        monkeypatch.setattr(cls, "map_weight", watching)
    return calls


def stack(*makes: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(make() for make in makes))


def conv(**options: Any) -> nn.Module:
    return lp.BROConv2d(4, 4, 3, padding=1, **options)


def used_twice(model: nn.Module, x: Tensor, mapped: list[str]) -> int:
    """How often a map is called once it is known what is used."""
    for _ in range(2):
        mapped.clear()
        with lp.cached(model):
            model(x).sum().backward()
    return len(mapped)


@pytest.mark.parametrize(
    ("makes", "calls"),
    [
        ([conv] * 5, 1),
        ([conv, lambda: conv(rank_ratio=0.25)] * 2, 2),
        ([conv, lambda: conv().requires_grad_(False), conv], 1),
        ([lambda: lp.FreeResidualConv2dBlock(4, residual_depth=3)] * 3, 1),
        ([lambda: lp.LOTConv2d(4, 4, 3, padding=1)] * 3, 3),
        ([conv, lambda: lp.LOTConv2d(4, 4, 3, padding=1), conv], 2),
    ],
)
def test_equal_layers_are_mapped_in_one_call(makes: list[Callable[[], nn.Module]], calls: int, mapped: list[str]):
    model, x = stack(*makes), torch.randn(2, 4, 5, 5)
    assert used_twice(model, x, mapped) == calls
    mapped.clear()
    with lp.cached():
        model(x)
    assert len(mapped) == len([p for p in model if next(p.parameters()).requires_grad])
    assert used_twice(copy.deepcopy(model), x, mapped) == calls


def test_a_group_is_of_one_size_of_image(mapped: list[str]):
    model = stack(conv, conv, lambda: lp.ScaledAvgPool2d(2), conv, conv)
    assert used_twice(model, torch.randn(2, 4, 8, 8), mapped) == 2
    mapped.clear()
    with lp.cached(model):
        model(torch.randn(2, 4, 6, 6))
    assert len(mapped) == 4  # of new sizes
    with lp.cached(model):
        model(torch.randn(2, 4, 6, 6))
    assert len(mapped) == 6


def test_what_is_not_used_is_mapped_once_in_vain(mapped: list[str]):
    model, x = stack(conv, conv, conv), torch.randn(2, 4, 5, 5)
    used_twice(model, x, mapped)
    for expected in (torch.zeros_like(model[2].raw), None):
        model.zero_grad()
        with lp.cached(model):
            model[:2](x).sum().backward()
        grad = model[2].raw.grad
        assert grad is None if expected is None else torch.equal(grad, expected)


def test_a_changed_parameter_of_a_group_is_noticed(mapped: list[str]):
    model, x = stack(conv, conv, conv), torch.randn(2, 4, 5, 5)
    used_twice(model, x, mapped)
    mapped.clear()
    with lp.cached(model), lp.cached(model[0]):
        model[0](x)
        nn.init.normal_(model[2].raw)
        y = model(x)
    assert len(mapped) == 2
    torch.testing.assert_close(y, model(x))
    other = {"0.raw": torch.randn_like(model[0].raw), "1.raw": torch.randn_like(model[1].raw)}
    with lp.cached(model):
        model(x)
        y = torch.func.functional_call(model, other, (x,))
    torch.testing.assert_close(y, torch.func.functional_call(model, other, (x,)))


def test_a_map_that_reads_values_says_so():
    class Reading(LipschitzLinear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.raw = self.new_parameter((3, 3))
            self.bias = None
            self.reset_parameters()

        def map_weight(self, raw: Tensor) -> Tensor:
            return raw / raw.norm() if raw.norm().item() > 1 else raw

    model = stack(Reading, Reading)
    with lp.cached(model):
        model(torch.ones(3))
    with lp.cached(model), pytest.raises(RuntimeError) as caught:
        model(torch.ones(3))
    assert "batched = False" in "".join(caught.value.__notes__)
