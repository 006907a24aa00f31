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
