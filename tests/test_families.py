"""Each family's map against a dense formulation by numpy and scipy; the audit checks what all have in common."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import liplayers as lip
from liplayers.layers import soc
from liplayers.layers.bcop import compose_projector
from liplayers.linalg.convolution import grid_slack, polyphase, symbol_norm_estimate
from liplayers.linalg.orthogonal import projector
from liplayers.testing.extremes import MATRICES
from liplayers.testing.measure import jacobian, operator_norm, singular_values

F64 = torch.float64


def matrix_of(layer: nn.Module, shape: tuple[int, ...]) -> np.ndarray:
    """The dense matrix of an affine layer."""
    return jacobian(layer, torch.zeros(shape, dtype=F64)).numpy()


def circulant(kernel: Tensor, size: tuple[int, int]) -> np.ndarray:
    """The dense matrix of the circular convolution Σ_t K_t x(p − t), taps counted from the kernel's centre."""
    out, channels, kh, kw = kernel.shape
    dense = np.zeros((out, *size, channels, *size))
    for a, b, h, w in product(range(kh), range(kw), range(size[0]), range(size[1])):
        source = (h - a + (kh - 1) // 2) % size[0], (w - b + (kw - 1) // 2) % size[1]
        dense[:, h, w, :, source[0], source[1]] += kernel[:, :, a, b].numpy()
    return dense.reshape(out * math.prod(size), channels * math.prod(size))


def circular(make, inputs: int = 3, outputs: int = 3, **options) -> nn.Module:
    torch.manual_seed(0)
    layer = make(inputs, outputs, 3, padding=1, padding_mode="circular", dtype=F64, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer


# Per frequency: the map of the whole circulant ------------------------------------------------------------------------

SIZES = [(4, 4), (3, 5), (1, 4), (2, 2)]


@pytest.mark.parametrize("size", SIZES)
def test_lot_is_the_polar_factor_of_the_circulant(size: tuple[int, int]):
    for inputs, outputs in ((3, 3), (2, 3), (3, 2)):
        layer = circular(lip.LOTConv2d, inputs, outputs)
        polar, _ = scipy.linalg.polar(circulant(layer.raw.detach(), size))
        np.testing.assert_allclose(matrix_of(layer, (inputs, *size)), polar, atol=1e-7)


@pytest.mark.parametrize("size", SIZES)
def test_cayley_is_the_cayley_transform_of_the_circulant(size: tuple[int, int]):
    layer = circular(lip.CayleyConv2d)
    P = layer.raw.detach() * (layer.gain.detach() / layer.raw.detach().norm())
    U = circulant(P, size)
    eye = np.eye(len(U))
    expected = np.linalg.inv(eye + U - U.T) @ (eye - U + U.T)
    np.testing.assert_allclose(matrix_of(layer, (3, *size)), expected, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_bro_reflects_the_span_of_the_circulant(size: tuple[int, int]):
    layer = circular(lip.BROConv2d, 4, 4)
    V = circulant(layer.raw.detach(), size)
    expected = np.eye(len(V)) - 2 * V @ np.linalg.pinv(V)
    np.testing.assert_allclose(matrix_of(layer, (4, *size)), expected, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_soc_is_the_exponential_of_a_skew_convolution(size: tuple[int, int], mode: str):
    layer = circular(lip.SOCConv2d, terms=12)
    if mode == "zeros":
        zeros = lip.SOCConv2d(3, 3, 3, padding=1, terms=12, dtype=F64)
        zeros.load_state_dict(layer.state_dict())
        layer = zeros
    kernel = layer.skew_kernel(layer.raw.detach())
    if mode == "circular":
        L = circulant(kernel, size)
    else:
        L = matrix_of(lambda x: F.conv2d(x, kernel, padding=1), (3, *size))
    assert np.abs(L + L.T).max() < 1e-14
    np.testing.assert_allclose(matrix_of(layer, (3, *size)), scipy.linalg.expm(L), atol=3e-9)


@pytest.mark.parametrize("arguments", [{"padding": 1}, {"padding": "same"}, {"stride": 2, "padding": 1}], ids=str)
def test_soc_is_orthogonal_with_zero_padding(arguments: dict):
    for inputs, outputs in ((3, 3), (2, 5), (5, 2), (1, 4)):
        layer = lip.SOCConv2d(inputs, outputs, 3, dtype=F64, **arguments)
        values = singular_values(layer, (inputs, 4, 6))
        assert (values - 1).abs().max() < 1e-6


def long_soc(channels: int, mode: str = "zeros", dtype: torch.dtype = F64) -> lip.SOCConv2d:
    """With a kernel of norm above 1.4, which is shortened."""
    torch.manual_seed(0)
    layer = lip.SOCConv2d(channels, channels, 3, padding=1, padding_mode=mode, dtype=dtype)
    nn.init.normal_(layer.raw, std=3 / math.sqrt(channels))
    return layer


@pytest.mark.parametrize("channels", [2, 16, 48])
def test_soc_turns_as_far_at_every_width(channels: int):
    layer = long_soc(channels, dtype=torch.float32)
    kernel = layer.effective().detach().double().numpy()
    symbol = np.fft.fft2(kernel, (32, 32)).transpose(2, 3, 0, 1)
    assert 1.37 < np.linalg.norm(symbol, 2, axis=(-2, -1)).max() <= 1.43
    assert 1 - 1e-6 < layer.lipschitz_bound() <= 1
    assert layer.lipschitz_estimate() == 1


@pytest.mark.parametrize("size", [(8, 8), (4, 5)])
def test_the_eigenvalues_of_soc_are_on_the_unit_circle_and_far_around_it(size: tuple[int, int]):
    values = np.linalg.eigvals(matrix_of(long_soc(3, "circular"), (3, *size)))
    assert np.abs(np.abs(values) - 1).max() < 1e-6
    assert 1.2 < np.abs(np.angle(values)).max() < 1.4301


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_the_bound_of_soc_holds_where_the_norm_of_its_kernel_is_underestimated(mode: str, monkeypatch):
    monkeypatch.setattr(soc, "symbol_norm_estimate", lambda kernel: 0.2 * symbol_norm_estimate(kernel))
    layer = long_soc(2, mode)
    norm = singular_values(layer, (2, 12, 12)).max().item()
    assert norm > 2
    assert norm <= layer.lipschitz_bound() < 1.3 * norm
    assert norm * (1 - 1e-6) <= lip.lipschitz_bound(lip.freeze(layer, (2, 12, 12))) < 1.3 * norm


def test_the_bound_of_soc_with_numbers_that_are_not_finite_is_infinite():
    layer = long_soc(2)
    with torch.no_grad():
        layer.raw[0, 1, 0, 0] = math.nan
    assert layer.lipschitz_bound() == math.inf


@pytest.mark.parametrize("std", [0.1, 1.0])
def test_gradients_of_soc_on_both_sides_of_its_longest_kernel(std: float):
    layer = lip.SOCConv2d(2, 2, (3, 2), dtype=F64)
    raw = std * torch.randn(2, 2, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    assert (layer.map_weight(raw).norm() < layer.map_weight(2 * raw).norm() * 0.99) == (std < 1)
    assert torch.autograd.gradcheck(layer.map_weight, raw.requires_grad_())


def test_cholesky_is_gram_schmidt_at_each_frequency():
    layer = circular(lip.CholeskyConv2d, 3, 2)
    transfer = np.fft.rfft2(F.pad(layer.raw.detach(), (0, 2, 0, 1)).numpy()).transpose(2, 3, 0, 1)
    L = np.linalg.cholesky(transfer @ transfer.conj().swapaxes(-1, -2))
    expected = np.linalg.solve(L, transfer)
    phase = np.exp(2j * np.pi * (np.arange(4)[:, None] / 4 + np.arange(3)[None] / 5))[..., None, None]  # the centre
    np.testing.assert_allclose(layer.effective((4, 5)).detach().numpy(), expected * phase, atol=1e-9)


def test_exponential_linear_is_the_matrix_exponential():
    torch.manual_seed(0)
    for inputs, outputs in ((4, 4), (3, 5), (5, 3)):
        layer = lip.ExponentialLinear(inputs, outputs, dtype=F64)
        raw = layer.raw.detach().numpy()
        assert np.linalg.norm(raw - raw.T, 2) < 3.5  # longer ones are shortened
        expected = scipy.linalg.expm(raw - raw.T)[:outputs, :inputs]
        np.testing.assert_allclose(layer.weight.detach().numpy(), expected, atol=1e-9)


# Explicit kernels -----------------------------------------------------------------------------------------------------


def test_composing_a_projector_is_convolving_twice():
    torch.manual_seed(0)
    kernel, P = torch.randn(1, 3, 4, 2, 2, dtype=F64), projector(torch.randn(1, 4, 2, dtype=F64))
    x = torch.randn(1, 4, 6, 7, dtype=F64)
    for axis, backwards in product((-2, -1), (False, True)):
        taps = [P[0], torch.eye(4, dtype=F64) - P[0]]
        pair = torch.stack(taps[::-1] if backwards else taps, -1).unsqueeze(2 if axis == -1 else 3)
        inner = F.conv2d(x, pair)
        expected = F.conv2d(inner, kernel[0])
        composed = compose_projector(kernel, P, axis, backwards)
        torch.testing.assert_close(F.conv2d(x, composed[0]), expected)


AOC = [
    (3, 3, 3, 1),
    (2, 5, 3, 1),
    (5, 2, (3, 2), 1),
    (2, 3, 3, 2),
    (2, 12, 3, 2),
    (3, 7, 4, 2),
    (2, 20, 3, (2, 1)),
    (1, 5, 4, 3),
    (1, 1, 3, 1),
    (4, 4, 2, 2),
]


@pytest.mark.parametrize(("inputs", "outputs", "kernel", "stride"), AOC, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_aoc_is_an_isometry_in_every_shape(inputs: int, outputs: int, kernel, stride, groups: int):
    """On the torus, by wrapping the image by hand: the constructor allows only what keeps the output small."""
    torch.manual_seed(0)
    layer = lip.AOCConv2d(groups * inputs, groups * outputs, kernel, stride, groups=groups, dtype=F64)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p))
    (kh, kw), (sh, sw) = layer.kernel_size, layer.stride
    weight = layer.weight.detach()

    def torus(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, kw - sw, 0, kh - sh), mode="circular"), weight, None, (sh, sw), groups=groups)

    values = singular_values(torus, (groups * inputs, 6, 12))
    assert (values - 1).abs().max() < 1e-9


def test_bcop_starts_as_one_orthogonal_tap():
    weight = lip.BCOPConv2d(4, 6, 3).weight.detach().clone()
    centre = weight[:, :, 1, 1].clone()
    weight[:, :, 1, 1] = 0
    assert weight.abs().max() < 1e-5
    torch.testing.assert_close(centre.mT @ centre, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [lip.RKOConv2d, lip.BjorckConv2d])
def test_rko_divides_an_orthogonal_matrix_by_no_more_than_the_overlap(make):
    for kernel, stride, dilation in ((3, 1, 1), (3, 2, 1), (2, 2, 1), (4, 2, 1), (3, 2, 2), (3, 3, 1)):
        layer = make(3, 5, kernel, stride, dilation=dilation, dtype=F64)
        with torch.no_grad():
            layer.raw.add_(0.3 * torch.randn_like(layer.raw))
        values = torch.linalg.svdvals(layer.weight.detach().flatten(1))
        assert (values / values[0] - 1).abs().max() < 1e-7
        overlap = math.ceil(kernel * math.gcd(stride, dilation) / stride)
        assert values[0] >= 1 / overlap - 1e-7  # what the iteration converges to
        if kernel == stride:
            assert (values - 1).abs().max() < 1e-7


@pytest.mark.parametrize("kind", ["gaussian", "ones", "one-tap shift"])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (2, 4), (5, 1)])
def test_the_estimate_is_close_below_the_norm_of_a_large_circulant(kind: str, kernel: tuple[int, int]):
    for out, channels, stride in ((3, 3, (1, 1)), (1, 4, (1, 1)), (4, 1, (2, 1))):
        raw = torch.randn(1, out, channels, *kernel, dtype=F64, generator=torch.Generator().manual_seed(0))
        raw = MATRICES[kind](raw[0], torch.Generator().manual_seed(0))[None]
        phases = polyphase(raw, stride)
        norms = np.linalg.svd(np.fft.fft2(phases[0].numpy(), (48, 48)).transpose(2, 3, 0, 1), compute_uv=False)
        estimate = symbol_norm_estimate(phases).item()
        slack = grid_slack(tuple(phases.shape[-2:]), (48, 48))  # what the norm may be more between its frequencies
        assert norms.max() * 0.98 <= estimate <= norms.max() * slack * (1 + 1e-12)


def test_the_estimate_is_differentiable_for_each_group():
    torch.manual_seed(0)
    kernel = torch.randn(2, 2, 3, 3, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(symbol_norm_estimate, (kernel,))
    alone = torch.cat([symbol_norm_estimate(k[None]) for k in kernel])
    torch.testing.assert_close(symbol_norm_estimate(kernel), alone)
    for scale in (1e-30, 1e30):  # whose squares are no floats
        torch.testing.assert_close(symbol_norm_estimate(scale * kernel.float()), scale * alone.float())


def test_rescaled_layers_have_norm_one_nearly():
    torch.manual_seed(0)
    linear = lip.RescaledLinear(9, 5, dtype=F64)
    conv = lip.RescaledConv2d(3, 4, 3, padding=1, padding_mode="circular", dtype=F64)
    with torch.no_grad():
        for layer in (linear, conv):
            layer.raw.normal_()
    assert 0.99 < operator_norm(linear, (9,)) <= 1 + 1e-12
    assert 0.94 < operator_norm(conv, (3, 12, 12)) <= 1 + 1e-12
    ratio = linear.weight / linear.raw
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))


# Blocks ---------------------------------------------------------------------------------------------------------------


def test_cpl_is_the_formula():
    torch.manual_seed(0)
    block = lip.CPLBlock(4, 6, dtype=F64)
    with torch.no_grad():
        block.raw.normal_()
        block.bias.normal_()
    W, b = block.raw.detach().numpy(), block.bias.detach().numpy()
    x = np.random.default_rng(0).normal(size=(5, 4))
    step = 2 / np.linalg.norm(W, 2) ** 2
    moved = x - block(torch.from_numpy(x)).detach().numpy()
    expected = step * np.maximum(x @ W.T + b, 0) @ W
    shrink = moved / expected
    assert np.ptp(shrink) < 1e-9
    assert 0.97 < shrink.min() <= 1


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_cpl_convolution_is_a_gradient_step(mode: str):
    torch.manual_seed(0)
    block = lip.CPLConv2dBlock(2, 3, padding_mode=mode, dtype=F64)
    with torch.no_grad():
        block.raw.normal_()
        block.bias.normal_()
    kernel = block.raw.detach()
    x = torch.randn(1, 2, 5, 6, dtype=F64, requires_grad=True)
    wrapped = F.pad(x, (1, 1, 1, 1), mode="circular") if mode == "circular" else F.pad(x, (1, 1, 1, 1))
    hidden = F.conv2d(wrapped, kernel, block.bias.detach())
    (gradient,) = torch.autograd.grad(hidden.relu().square().sum() / 2, x)
    step = (x - block(x)).detach() / gradient
    assert step.max() - step.min() < 1e-9
    exact = operator_norm(lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), kernel), (2, 12, 12))
    assert 0.9 * 2 / exact**2 < step.mean() <= 2 / exact**2 * (1 + 1e-9)


def test_liresnet_is_a_scaled_residual_convolution():
    torch.manual_seed(0)
    block = lip.LiResNetConv2dBlock(3, dtype=F64)
    with torch.no_grad():
        block.raw.normal_(std=0.3)
        block.bias.normal_()
    x = torch.randn(2, 3, 6, 5, dtype=F64)
    plain = x + F.conv2d(x, block.raw, padding=1)
    ratio = (block(x) - block.bias[:, None, None]) / plain
    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio))
    dense = lip.LiResNetBlock(4, bias=False, dtype=F64)
    y = torch.randn(2, 4, dtype=F64)
    scale = dense(y) / (y + y @ dense.raw.mT)
    torch.testing.assert_close(scale, scale.flatten()[0].expand_as(scale))


# Near the identity ----------------------------------------------------------------------------------------------------


def test_layers_with_a_residual_depth_start_as_the_publications_have_them():
    """The figures were measured on the authors' code: ‖V − I‖_F of BRO at 64 channels, ‖W − I‖ of Cholesky at 256."""
    torch.manual_seed(0)
    conv = lip.BROConv2d(64, 64, 3, padding=1, residual_depth=12)
    V = quasi_residual(conv, 12)
    assert np.linalg.norm(V - identity(V.shape)) == pytest.approx(0.068, rel=0.02)
    assert np.linalg.norm(lip.BROConv2d(64, 64, 3).raw.detach().numpy() - identity(V.shape)) > 2.7
    near, far = (lip.CholeskyLinear(256, 256, residual_depth=depth).weight.detach().numpy() for depth in (8, None))
    assert np.linalg.norm(near - np.eye(256), 2) == pytest.approx(0.044, rel=0.1)
    assert np.linalg.norm(far - np.eye(256), 2) > 1.9
    W = lip.FreeResidualConv2dBlock(64, residual_depth=12).weight.detach().numpy()
    assert np.linalg.norm(W - identity(W.shape)) == pytest.approx(0.096, rel=0.02)


def identity(shape: tuple[int, ...]) -> np.ndarray:
    kernel = np.zeros(shape)
    kernel[(slice(None), slice(None), *((k - 1) // 2 for k in shape[2:]))] = np.eye(*shape[:2])
    return kernel


def quasi_residual(layer: nn.Module, depth: int) -> np.ndarray:
    raw, gain = (p.detach().double().numpy() for p in (layer.raw, layer.gain))
    return identity(raw.shape) + gain * raw / math.sqrt(depth)


def reflector(V: np.ndarray) -> np.ndarray:
    return np.eye(len(V)) - 2 * V @ np.linalg.pinv(V)


def gram_schmidt(P: np.ndarray) -> np.ndarray:
    Q, R = np.linalg.qr(P.T)
    return (Q * np.sign(np.diag(R))).T


RESIDUAL = [
    (lambda: lip.BROLinear(5, 5, residual_depth=3, dtype=F64), reflector),
    (lambda: lip.CholeskyLinear(5, 5, residual_depth=3, dtype=F64), gram_schmidt),
    (lambda: lip.LiResNetBlock(5, residual_depth=3, dtype=F64), lambda V: V / np.linalg.norm(V, 2)),
    (lambda: lip.FreeResidualConv2dBlock(5, residual_depth=3, dtype=F64), lambda V: V),
    (lambda: lip.BROConv2d(4, 4, 1, residual_depth=3, dtype=F64), lambda V: reflector(V[..., 0, 0])),
    (lambda: lip.CholeskyConv2d(4, 4, 1, residual_depth=3, dtype=F64), lambda V: gram_schmidt(V[..., 0, 0])),
]


@pytest.mark.parametrize(("make", "map_of"), RESIDUAL)
def test_a_residual_depth_is_a_parametrisation_around_the_identity(make, map_of):
    torch.manual_seed(0)
    layer = make()
    for p in (layer.raw, layer.gain):
        nn.init.normal_(p)
    expected = map_of(quasi_residual(layer, 3))
    found = layer.weight if layer.has_weight else layer.effective((1, 1))[0, 0].real
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-6, atol=1e-6)
    assert f"residual_depth={layer.residual_depth}" in repr(layer)


@pytest.mark.parametrize(("make", "d"), [(lip.BROConv2d, 12), (lip.CholeskyLinear, 8)])
def test_a_step_moves_the_matrix_less_by_the_root_of_the_depth(make, d: int):
    moved = []
    for depth in (d, None):
        torch.manual_seed(0)
        layer = make(*((16, 16, 3) if make is lip.BROConv2d else (16, 16)), residual_depth=depth, dtype=F64)
        matrix = (
            (lambda layer=layer: quasi_residual(layer, d)) if depth else (lambda p=layer.raw: p.detach().numpy().copy())
        )
        before = matrix()
        x = torch.randn(3, 16, *((5, 5) if make is lip.BROConv2d else ()), dtype=F64)
        layer(x).pow(3).sum().backward()
        if depth:
            assert (layer.gain.grad.abs() > 0).sum() >= len(layer.gain) - 1
        torch.optim.Adam(layer.parameters(), lr=1e-4).step()
        moved.append(np.linalg.norm(matrix() - before))
    assert moved[1] / moved[0] == pytest.approx(math.sqrt(d), rel=0.02)


def test_a_residual_depth_needs_an_identity():
    for make in (lip.BROLinear, lip.CholeskyLinear):
        with pytest.raises(lip.LipschitzError, match=r"residual_depth=8 with in_features=4, out_features=6"):
            make(4, 6, residual_depth=8)
    for make in (lip.BROConv2d, lip.CholeskyConv2d):
        with pytest.raises(lip.LipschitzError, match=r"residual_depth=8 with in_channels=16, out_channels=4"):
            make(4, 4, 2, stride=2, residual_depth=8)
        assert make(2, 8, 3, stride=2, residual_depth=8)(torch.ones(1, 2, 4, 4)).shape == (1, 8, 1, 1)
    for depth in (0, 1.5, True):
        with pytest.raises(lip.LipschitzError, match=f"residual_depth={depth}"):
            lip.LiResNetBlock(4, residual_depth=depth)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [0, 13, 80, 2.0])
def test_soc_refuses_polynomials_that_lose_their_accuracy(terms):
    with pytest.raises(lip.LipschitzError, match="terms"):
        lip.SOCConv2d(2, 2, 3, terms=terms)


@pytest.mark.parametrize("make", [lip.BROConv2d, lip.SOCConv2d, lip.LOTConv2d])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, F64])
def test_layers_per_frequency_refuse_images_of_another_dtype(make, dtype: torch.dtype):
    layer = make(2, 2, 3, padding=1)
    with pytest.raises(lip.LipschitzError, match=str(dtype)):
        layer(torch.ones(1, 2, 4, 4, dtype=dtype))


def test_bro_refuses_a_rank_ratio_that_is_no_number():
    for ratio in ("a", True, None):
        with pytest.raises(lip.LipschitzError, match="rank_ratio"):
            lip.BROLinear(4, 4, rank_ratio=ratio)
