"""Models as functions of a family's name: every family in place, bounds that compose, and what cannot work refused."""

from __future__ import annotations

import pytest
import torch
from audit import of_role
from torch import nn

import liplayers
from liplayers.errors import ArgumentError, UnknownNameError
from liplayers.models import blockmlp

BLOCKS = [family for family, _ in of_role("dense_block")]
ONE_SIZE = ("cpl", "liresnet", "sll")  # their output has the size of their input


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("features", [3, 8, 13])
def test_every_dense_block_makes_a_network_of_bound_1(block: str, features: int):
    model = blockmlp((features,), 4, block=block, width=8, depth=2, mean=None)
    assert model(torch.randn(5, features)).shape == (5, 4)
    assert liplayers.lipschitz_bound(model[:-1], (features,)) == 1
    activations = sum(isinstance(m, nn.ReLU) for m in model.body.modules())
    assert activations == 2
    assert len([m for m in model.body if not isinstance(m, nn.ReLU)]) == 2 + (block in ONE_SIZE and features != 8)


@pytest.mark.parametrize("block", ["ldlt", "ldlt_sequential", "lbdn", "gershgorin"])
def test_blocks_of_several_layers(block: str):
    model = blockmlp((1, 4, 4), 3, block=block, width=6, depth=2, layers=3, mean=0.5)
    assert [b.hidden_features for b in model.body] == [(6, 6, 6)] * 2
    assert liplayers.lipschitz_bound(model[:-1], (1, 4, 4)) == 1


@pytest.mark.parametrize("block", ["sll", "cpl", "sandwich"])
def test_blocks_of_one_layer_refuse_several(block: str):
    with pytest.raises(ArgumentError, match="layers=2"):
        blockmlp((4,), 3, block=block, layers=2)


def test_activations_and_names_are_passed_on():
    model = blockmlp((4,), 3, block="ldlt", width=8, depth=1, activation="maxmin")
    assert isinstance(model.body[0].activation, liplayers.MaxMin)
    assert isinstance(blockmlp((4,), 3, width=8, activation=nn.Tanh).body[0].activation, nn.Tanh)
    with pytest.raises(ArgumentError, match="activation"):
        blockmlp((4,), 3, block="sandwich", activation="maxmin")
    with pytest.raises(UnknownNameError, match="ldlt"):
        blockmlp((4,), 3, block="lldt")
    for bad in ({"width": 0}, {"depth": 0}, {"layers": 0}):
        with pytest.raises(ArgumentError, match=next(iter(bad))):
            blockmlp((4,), 3, **bad)
