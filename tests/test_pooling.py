"""Patches, offsets, and the bounds of torch's adaptive and ℓp pooling. The other pools are in test_layers."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

import liplayers as lip
from liplayers.errors import ArgumentError, NonFiniteError, ShapeError, UnknownBoundError
from liplayers.testing.measure import jacobian, operator_norm, singular_values


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Patches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_square_patches_are_torch_s_pixel_unshuffle(size: int):
    x = randn(2, 3, 6, 12)
    assert torch.equal(lip.Patchify2d(size)(x), nn.PixelUnshuffle(size)(x))
    assert torch.equal(lip.Patchify2d(size)(x[0]), nn.PixelUnshuffle(size)(x)[0])


@pytest.mark.parametrize("size", [(1, 2), (3, 1), (2, 3), (6, 4)])
def test_patches_are_a_permutation_of_the_pixels(size: tuple[int, int]):
    patchify, x = lip.Patchify2d(size), randn(2, 3, 6, 12)
    y = patchify(x)
    (ph, pw), (_, channels, height, width) = size, x.shape
    assert y.shape == (2, channels * ph * pw, height // ph, width // pw)
    for c, a, b, h, w in [
        (0, 0, 0, 0, 0),
        (2, ph - 1, pw - 1, height // ph - 1, width // pw - 1),
        (1, ph - 1, 0, 0, 1),
    ]:
        assert torch.equal(y[:, (c * ph + a) * pw + b, h, w], x[:, c, h * ph + a, w * pw + b])
    values = singular_values(patchify, (2, ph * 2, pw * 2))
    assert torch.equal(values, torch.ones_like(values))
    assert lip.lipschitz_bound(patchify, x.shape[1:]) == 1


def test_patches_refuse_what_they_do_not_divide():
    for shape in [(1, 1, 5, 6), (1, 1, 4, 7), (4, 6), (3, 4, 7)]:
        with pytest.raises(ShapeError, match=r"patch_size=\(2, 3\)") as caught:
            lip.Patchify2d((2, 3))(torch.zeros(shape))
        assert str(shape) in str(caught.value)
    for size in (0, (1, 0), 1.5, (2,), True):
        with pytest.raises(ArgumentError, match="patch_size"):
            lip.Patchify2d(size)
    assert repr(lip.Patchify2d(2)) == "Patchify2d(patch_size=(2, 2))"


def test_patches_and_an_orthogonal_map_are_orthogonal():
    embed = nn.Sequential(lip.Patchify2d((2, 1)), lip.BROConv2d(6, 6, 1, dtype=torch.float64))
    values = singular_values(embed, (3, 4, 3))
    torch.testing.assert_close(values, torch.ones_like(values))


# Position embedding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 4, 3)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e9])
def test_position_embedding_is_a_shift(shape: tuple[int, ...], scale: float):
    layer = lip.PositionEmbedding(shape, dtype=torch.float64)
    x = randn(3, *shape)
    assert torch.equal(layer(x), x)
    with torch.no_grad():
        layer.position.copy_(scale * randn(*shape, seed=1))
    torch.testing.assert_close(layer(x), x + layer.position[None])
    assert torch.equal(jacobian(layer, x[0]), torch.eye(x[0].numel()).double())
    assert lip.lipschitz_bound(layer, shape) == 1
    layer(x).sum().backward()
    assert (layer.position.grad == len(x)).all()


def test_position_embedding_refuses_shapes():
    layer = lip.PositionEmbedding((3, 1, 4))
    for shape in [(2, 3, 4, 4), (2, 1, 1, 4), (3, 1, 4), (2, 3, 4), (2, 2, 3, 1, 4)]:
        with pytest.raises(ShapeError, match=r"expected \(N, 3, 1, 4\)"):
            layer(torch.zeros(shape))
    for shape in [(), 3, (3, 0), (3, 1.5), None, "ab"]:
        with pytest.raises(ArgumentError, match="PositionEmbedding: shape"):
            lip.PositionEmbedding(shape)


def test_position_embedding_state_and_copies():
    layer = lip.PositionEmbedding([2, 3])
    assert list(layer.state_dict()) == ["position"]
    assert repr(layer) == "PositionEmbedding(shape=(2, 3))"
    with torch.no_grad():
        layer.position.normal_()
    x = randn(4, 2, 3).float()
    twin = lip.PositionEmbedding((2, 3))
    twin.load_state_dict(layer.state_dict())
    for other in (twin, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    for dtype in (torch.bfloat16, torch.float16):
        assert layer(x.to(dtype)).dtype == dtype
        assert lip.lipschitz_bound(copy.deepcopy(layer).to(dtype), (2, 3)) == 1
    assert lip.PositionEmbedding((2,), device="meta", dtype=torch.float64).position.dtype == torch.float64


# BatchCentering -------------------------------------------------------------------------------------------------------

CENTRED = [(6, 3), (5, 3, 4), (4, 3, 2, 5), (1, 3, 2, 2), (1, 3)]


@pytest.mark.parametrize("shape", CENTRED)
def test_centering_projects_the_batch_in_training(shape: tuple[int, ...]):
    """Against the dense projection I − 11ᵀ/M of each channel, as a map of the whole batch."""
    layer = lip.BatchCentering(3, dtype=torch.float64)
    x = randn(*shape) + 5
    entries = x.numel() // 3
    P = torch.eye(entries).double() - 1 / entries
    for c in range(3):
        torch.testing.assert_close(layer(x)[:, c].flatten(), P @ x[:, c].flatten(), rtol=0, atol=1e-12)
    J = torch.autograd.functional.jacobian(layer, x).reshape(x.numel(), x.numel())
    torch.testing.assert_close(J @ J, J, rtol=0, atol=1e-12)  # the gradient goes through the mean
    torch.testing.assert_close(J, J.mT)
    assert torch.linalg.matrix_norm(J, 2) <= 1 + 1e-12
    assert lip.lipschitz_bound(layer.train()) == 1


def test_centering_changes_the_batch_no_more_than_one_sample_moved():
    layer, x = lip.BatchCentering(3, dtype=torch.float64), randn(4, 3, 2)
    moved = x.clone()
    moved[1] += 10 * randn(3, 2, seed=1)
    change = layer(moved) - layer(x)
    assert (change[0] != 0).any()  # it couples the samples
    assert change.norm() <= (moved - x).norm()


@pytest.mark.parametrize("shape", CENTRED)
def test_centering_shifts_by_the_running_mean_in_eval(shape: tuple[int, ...]):
    layer = lip.BatchCentering(3, momentum=0.25, dtype=torch.float64)
    mean = torch.zeros(3, dtype=torch.float64)
    for seed in range(3):
        x = randn(*shape, seed=seed)
        layer(x)
        mean = 0.75 * mean + 0.25 * x.transpose(0, 1).flatten(1).mean(1)
    layer.eval()
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer(x), x - mean.view(3, *[1] * (len(shape) - 2)))
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))  # each sample by itself
    assert torch.equal(jacobian(layer, x[0]), torch.eye(x[0].numel()).double())
    assert operator_norm(layer, shape[1:]) == 1 == lip.lipschitz_bound(layer, shape[1:])


def test_the_running_mean_is_batch_norm_s():
    layer, norm = lip.BatchCentering(3, momentum=0.3), nn.BatchNorm2d(3, momentum=0.3)
    for seed in range(4):
        x = 3 + randn(5, 3, 4, 4, seed=seed).float()
        layer(x)
        norm(x)
    torch.testing.assert_close(layer.running_mean, norm.running_mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_centering_in_half_precision_takes_the_mean_in_float32(dtype: torch.dtype):
    x = (100 + randn(4096, 2)).to(dtype)
    layer = lip.BatchCentering(2, momentum=1.0, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), (x.double() - x.double().mean(0)), rtol=0.01, atol=1e-3)
    assert lip.lipschitz_bound(layer) == lip.lipschitz_bound(layer.eval()) == 1
    assert layer(x).dtype == dtype
    with torch.autocast("cpu", dtype):
        assert lip.BatchCentering(2)(x).dtype == dtype
        assert lip.lipschitz_bound(layer) == 1


def test_centering_state_copies_and_modes():
    layer = lip.BatchCentering(2, momentum=0.5)
    assert list(layer.state_dict()) == ["running_mean"]
    assert not list(layer.parameters())
    assert repr(layer) == "BatchCentering(channels=2, momentum=0.5)"
    layer(randn(8, 2).float() + 1)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    twin = lip.BatchCentering(2).eval()
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    x = randn(3, 2, seed=1).float()
    for other in (twin, copy.deepcopy(layer).eval(), pickle.loads(pickle.dumps(layer)).eval()):
        assert torch.equal(other(x), layer.eval()(x))
    model = nn.Sequential(lip.AOLLinear(3, 2), lip.BatchCentering(2)).train()
    assert lip.lipschitz_bound(model, (3,)) == 1
    assert torch.equal(model[1].running_mean, torch.zeros(2))  # trying the shape is no training
    layer.running_mean[0] = math.nan
    with pytest.raises(NonFiniteError, match="running_mean"):
        lip.lipschitz_bound(layer)


@pytest.mark.parametrize("shape", CENTRED)
def test_centering_adds_its_bias_after_the_mean(shape: tuple[int, ...]):
    plain, layer = lip.BatchCentering(3, dtype=torch.float64), lip.BatchCentering(3, dtype=torch.float64, bias=True)
    assert list(layer.state_dict()) == ["bias", "running_mean"]
    assert repr(layer) == "BatchCentering(channels=3, momentum=0.1, bias=True)"
    offset = randn(3, seed=2)
    with torch.no_grad():
        layer.bias.copy_(offset)
    x = randn(*shape)
    for mode in (True, False):
        expected = plain.train(mode)(x) + offset.view(3, *[1] * (len(shape) - 2))
        torch.testing.assert_close(layer.train(mode)(x), expected)
        assert lip.lipschitz_bound(layer) == 1
    torch.testing.assert_close(lip.freeze(layer)(x), layer(x))
    layer.reset_parameters()
    assert not layer.bias.any()
    layer.bias.data = torch.zeros(1)
    with pytest.raises(ShapeError, match="bias"):
        layer(x)


def test_centering_refuses_arguments_and_shapes():
    with pytest.raises(ArgumentError, match="channels"):
        lip.BatchCentering(0)
    for momentum in (-0.1, 1.1, math.nan, None):
        with pytest.raises(ArgumentError, match=r"momentum=.*\[0, 1\]"):
            lip.BatchCentering(3, momentum)
    for training in (True, False):
        layer = lip.BatchCentering(3).train(training)
        for shape in [(3,), (2, 4), (2, 1, 3)]:
            with pytest.raises(ShapeError, match=r"expected \(N, 3, …\)"):
                layer(torch.zeros(shape))
    for training in (True, False):
        assert layer.train(training)(torch.zeros(0, 3)).shape == (0, 3)
    assert torch.equal(layer.running_mean, torch.zeros(3))


# torch's adaptive maximum and ℓp pooling ------------------------------------------------------------------------------


def true_max_pool_norm(pool: nn.Module, size: tuple[int, int]) -> float:
    """The largest norm at a lone peak, which is the maximum of all the windows that it lies in."""
    best = 0.0
    for i in range(size[0]):
        for j in range(size[1]):
            x = torch.zeros(1, 1, *size, dtype=torch.float64)
            x[0, 0, i, j] = 1
            best = max(best, operator_norm(pool, (1, *size), at=x[0]))
    return best


@pytest.mark.parametrize("size", [(6, 6), (5, 7), (1, 4)])
@pytest.mark.parametrize("target", [1, 2, 3, (3, 2), (4, None), (None, None), [2, 1], 5, (8, 9)])
def test_adaptive_max_pooling_counts_its_windows(size: tuple[int, int], target: int | tuple | list):
    pool = nn.AdaptiveMaxPool2d(target)
    bound = lip.lipschitz_bound(pool, (1, *size))
    assert true_max_pool_norm(pool, size) == pytest.approx(bound, rel=1e-12)
    for seed in range(5):
        assert operator_norm(pool, (1, *size), at=randn(1, *size, seed=seed)) <= bound * (1 + 1e-12)
    targets = target if isinstance(target, (tuple, list)) else (target, target)
    if all(not n % (t or n) for n, t in zip(size, targets, strict=True)):
        assert bound == 1


def test_adaptive_max_pooling_without_a_size_or_with_indices_is_unknown():
    with pytest.raises(UnknownBoundError, match="input_shape"):
        lip.lipschitz_bound(nn.AdaptiveMaxPool2d(2))
    with pytest.raises(UnknownBoundError, match="return_indices"):
        lip.lipschitz_bound(nn.AdaptiveMaxPool2d(2, return_indices=True), (1, 4, 4))


@pytest.mark.parametrize("kernel", [1, 2, (2, 3)])
def test_torch_s_l2_pooling_is_ours(kernel: int | tuple):
    for pool in (nn.LPPool2d(2, kernel), nn.LPPool2d(2.0, kernel, stride=kernel)):
        x = randn(3, 2, 6, 7)  # of both signs
        torch.testing.assert_close(pool(x), lip.L2Pool2d(kernel)(x))
        assert lip.lipschitz_bound(pool, (2, 6, 7)) == 1
        assert operator_norm(pool, (2, 6, 7), at=x[0]) <= 1 + 1e-12


@pytest.mark.parametrize(
    "pool",
    [nn.LPPool2d(2, 3, 1), nn.LPPool2d(2, 2, ceil_mode=True), nn.LPPool2d(3, 2), nn.LPPool2d(1, 2)],
    ids=str,
)
def test_other_lp_pooling_stays_unknown(pool: nn.Module):
    with pytest.raises(UnknownBoundError, match="LPPool2d"):
        lip.lipschitz_bound(nn.Sequential(pool), (1, 7, 7))


def test_l2_pooling_of_torch_with_ceil_mode_does_expand():
    """A patch cut by the border is scaled as if it were whole: why it is refused."""
    assert operator_norm(nn.LPPool2d(2, 2, ceil_mode=True), (1, 3, 3), at=torch.ones(1, 3, 3)) == pytest.approx(2)
