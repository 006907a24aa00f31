"""The mathematics against independent formulations: scipy, naive loops, and the dense matrix of torch's conv2d."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import flint
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from flint import arb, fmpq
from torch import Tensor

from liplayers import AOLConv2d, AOLLinear, SLLBlock, SLLConv2dBlock
from liplayers.linalg.convolution import (
    autocorrelation,
    orthogonal_taps_,
    overlap,
    polyphase,
    row_sum_bound,
)
from liplayers.linalg.fourier import (
    fast_size,
    fourier_multiply,
    isometric_dft,
    isometric_dft_error,
    transfer_matrix,
)
from liplayers.linalg.norms import gram_iteration_bound, spectral_norm_bound, spectral_norm_lower_bound
from liplayers.linalg.orthogonal import (
    block_reflector,
    cayley,
    cholesky_orthogonal,
    newton_schulz,
    projector,
    rotation,
    skew_exponential,
    skew_exponential_coefficients,
    skew_polynomial_bound,
)
from liplayers.linalg.verified import conv_norm_enclosure

SHAPES = [(1, 1), (1, 5), (5, 1), (4, 4), (7, 3), (3, 7)]
COMPLEX = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def norm(W: Tensor) -> float:
    return torch.linalg.matrix_norm(W, 2).item()


def conv_matrix(weight: Tensor, size: tuple[int, int], mode: str = "zeros", **arguments: Any) -> Tensor:
    """The dense matrix of torch's conv2d, one column for each input pixel."""
    channels = weight.shape[1] * arguments.get("groups", 1)
    padding = arguments.pop("padding", 0)
    ph, pw = (padding, padding) if isinstance(padding, int) else padding
    columns = []
    for index in range(channels * size[0] * size[1]):
        x = torch.zeros(channels * size[0] * size[1], dtype=weight.dtype)
        x[index] = 1
        x = x.view(1, channels, *size)
        x = F.pad(x, (pw, pw, ph, ph), mode="circular" if mode == "circular" else "constant")
        columns.append(F.conv2d(x, weight, **arguments).flatten())
    return torch.stack(columns, 1)


# Orthogonal maps ------------------------------------------------------------------------------------------------------


@COMPLEX
@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_is_the_polar_factor(shape: tuple[int, int], dtype: torch.dtype):
    P = randn(*shape, dtype=dtype)
    polar, _ = scipy.linalg.polar(P.numpy())
    np.testing.assert_allclose(newton_schulz(P, iterations=40).resolve_conj().numpy(), polar, atol=1e-9)


@pytest.mark.parametrize("iterations", [0, 1, 3, 12])
def test_newton_schulz_is_a_contraction_before_it_has_converged(iterations: int):
    for scale, shape in product((1e-30, 1.0, 1e30), SHAPES):
        assert norm(newton_schulz(scale * randn(*shape), iterations)) <= 1 + 1e-12


@pytest.mark.parametrize(("iterations", "reached"), [(5, 0.19), (10, 0.03), (13, 2e-3), (14, 2e-3)])
def test_newton_schulz_converges_and_damps_as_documented(iterations: int, reached: float):
    """All singular values from the documented one up to 1 reach 1, also those between; much smaller ones do not."""
    for low in (reached, 3 * reached, 1.0):
        P = torch.diag(torch.tensor([1.0, low, math.sqrt(low), reached / 100], dtype=torch.float64))
        values = newton_schulz(P, iterations).diagonal()
        assert (values[:3] - 1).abs().max() < 1e-6
        assert values[3] < 0.9


@COMPLEX
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 10.0])
def test_cayley_is_the_explicit_formula(shape: tuple[int, int], scale: float, dtype: torch.dtype):
    P = scale * randn(*shape, dtype=dtype)
    X = P.numpy() if shape[0] >= shape[1] else P.numpy().conj().T
    n = X.shape[1]
    U, V = X[:n], X[n:]
    A = U - U.conj().T + V.conj().T @ V
    inverse = np.linalg.inv(np.eye(n) + A)
    W = np.concatenate([inverse @ (np.eye(n) - A), -2 * V @ inverse])
    expected = W if shape[0] >= shape[1] else W.conj().T
    np.testing.assert_allclose(cayley(P).resolve_conj().numpy(), expected, atol=1e-10)
    Q = cayley(P)
    small = Q.mH @ Q if shape[0] >= shape[1] else Q @ Q.mH
    torch.testing.assert_close(small, torch.eye(min(shape), dtype=dtype), atol=1e-10, rtol=0)


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cayley_stays_a_contraction_where_the_inverse_is_hopeless(scale: float, dtype: torch.dtype):
    for shape, seed in product([(3, 3), (7, 3), (3, 8), (5, 5)], range(3)):
        P = scale * randn(*shape, seed=seed).to(dtype)
        for raw in (P, torch.full_like(P, scale), P * torch.eye(*shape, dtype=dtype)):
            W = cayley(raw).double()
            assert torch.isfinite(W).all()
            assert norm(W) <= 1 + 1e-6


@COMPLEX
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (4, 4), (7, 3)])
def test_projector_and_block_reflector_go_by_the_span(shape: tuple[int, int], dtype: torch.dtype):
    V = randn(*shape, dtype=dtype) * torch.logspace(-8, 8, shape[1], dtype=torch.float64)
    Q, _ = np.linalg.qr(V.numpy())
    onto = Q @ Q.conj().T
    np.testing.assert_allclose(projector(V).resolve_conj().numpy(), onto, atol=1e-8)
    np.testing.assert_allclose(projector(V, 1, shape[0]).resolve_conj().numpy(), onto[:1], atol=1e-8)
    np.testing.assert_allclose(block_reflector(V).resolve_conj().numpy(), np.eye(shape[0]) - 2 * onto, atol=1e-8)


def test_block_reflector_of_a_deficient_factor_stays_a_contraction():
    V = randn(6, 4)
    cases = [V[:, :1].expand(6, 4), torch.zeros(6, 4).double(), V[:, :1] @ V[:1] + 1e-9 * randn(6, 4, seed=1)]
    for case in [*cases, torch.cat([V[:, :2], V[:, :2] * 1e-200], 1)]:
        assert norm(block_reflector(case)) <= 1 + 1e-12


@COMPLEX
@pytest.mark.parametrize("shape", SHAPES)
def test_cholesky_orthogonal_is_triangular_times_the_free_matrix(shape: tuple[int, int], dtype: torch.dtype):
    """It is Gram–Schmidt: the factor Q of scipy's QR of the adjoint, with a positive diagonal in R."""
    P = randn(*shape, dtype=dtype) * torch.logspace(-5, 5, shape[0], dtype=torch.float64)[:, None]
    wide = P.numpy() if shape[0] <= shape[1] else P.numpy().conj().T
    Q, R = scipy.linalg.qr(wide.conj().T, mode="economic")
    phase = np.diag(R) / np.abs(np.diag(R))
    expected = (Q * phase).conj().T
    W = cholesky_orthogonal(P).resolve_conj().numpy()
    np.testing.assert_allclose(W, expected if shape[0] <= shape[1] else expected.conj().T, atol=1e-7)


def test_cholesky_orthogonal_of_deficient_rows_stays_a_contraction():
    V = randn(4, 6)
    for case in (V[:1].expand(4, 6), torch.zeros(4, 6).double(), V[:, :1] @ V[:1] + 1e-9 * randn(4, 6, seed=1)):
        for P in (case, case.mT, case.float()):
            assert norm(cholesky_orthogonal(P).double()) <= 1 + 1e-6


@pytest.mark.parametrize("length", [3000, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factorisations_of_long_deficient_rows_are_finite(length: int, dtype: torch.dtype):
    """The rounding of a Gram matrix grows with the length of the sums in it."""
    equal = randn(1, length).expand(16, length).to(dtype)
    for P in (equal, torch.full_like(equal, 0.3), torch.ones_like(equal)):
        assert norm(cholesky_orthogonal(P).double()) <= 1 + 1e-6
        assert norm(projector(P.mT, 16, length).double()) <= 1 + 1e-6


@COMPLEX
@pytest.mark.parametrize("degree", range(1, 10))
def test_skew_exponential_is_a_contraction_close_to_the_exponential(degree: int, dtype: torch.dtype):
    error = {4: 1e-3, 5: 1e-4, 6: 6e-6, 7: 6e-7, 8: 6e-8, 9: 1e-8}.get(degree, 1.0)
    for seed, length in product(range(4), (1.0, 0.5, 1e-9)):
        S = randn(5, 5, dtype=dtype, seed=seed)
        S = S - S.mH
        S = S * (length / norm(S))
        W = skew_exponential(S, skew_exponential_coefficients(degree))
        assert norm(W) <= 1
        assert norm(W - torch.from_numpy(scipy.linalg.expm(S.numpy()))) < error


@COMPLEX
@pytest.mark.parametrize("length", [1e-9, 0.3, 3.3, 4.5, 1e3, 1e9])
def test_rotation_is_the_exponential_up_to_half_a_turn(length: float, dtype: torch.dtype):
    S = randn(6, 6, dtype=dtype)
    S = S - S.mH
    S = S * (length / norm(S))
    W = rotation(S)
    torch.testing.assert_close(W.mH @ W, torch.eye(6, dtype=dtype), atol=1e-9, rtol=0)
    if length < 3.5:
        assert norm(W - torch.from_numpy(scipy.linalg.expm(S.numpy()))) < 1e-9
    assert norm(rotation(S.to(torch.complex64 if S.is_complex() else torch.float32)).to(dtype)) <= 1 + 1e-6


@pytest.mark.parametrize("degree", range(1, 12))
def test_skew_exponential_polynomial_stays_in_the_unit_disc_between_its_nodes(degree: int):
    theta = np.linspace(-1, 1, 20001)
    values = np.polynomial.polynomial.polyval(1j * theta, skew_exponential_coefficients(degree))
    assert np.abs(values).max() <= 1


@pytest.mark.parametrize("degree", range(1, 13))
def test_skew_exponential_polynomials_are_proven_contractions(degree: int):
    assert 0.999 < skew_polynomial_bound(skew_exponential_coefficients(degree)) <= 1


@pytest.mark.parametrize(
    ("degree", "length", "angle"), [(5, 6e-5, 5e-3), (6, 9e-7, 3e-4), (7, 6e-7, 5e-5), (9, 4e-9, 3e-7)]
)
@pytest.mark.parametrize("reach", [0.7, 1.43])
def test_a_weight_brings_the_polynomial_nearer_to_the_unit_circle(degree, length, angle, reach: float):
    coefficients = skew_exponential_coefficients(degree, reach, 200.0)
    assert 1 - length < skew_polynomial_bound(coefficients, reach) <= 1
    theta = np.linspace(-reach, reach, 2001)
    values = np.polynomial.polynomial.polyval(1j * theta, coefficients)
    assert 1 - length < np.abs(values).min()
    assert np.abs(values).max() <= 1
    assert np.abs(np.angle(values * np.exp(-1j * theta))).max() < angle


def random_coefficients(seed: int, degree: int) -> tuple[float, ...]:
    generator = np.random.default_rng(seed)
    return tuple((generator.standard_normal(degree + 1) * 10.0 ** generator.integers(-9, 9, degree + 1)).tolist())


@pytest.mark.parametrize("length", [1.0, 1 + 1e-7, 0.3, 3.7, 1e-200, 1e30])
@pytest.mark.parametrize(
    "coefficients",
    [
        skew_exponential_coefficients(7),
        (0.0, 1.0),
        (1.0, 0.0, 0.5),  # 1 − θ²/2: largest at 0
        (0.3, 0.0, -4.0, 0.1, 5.0),
        (0.1, 0.1),
        (0.0, 0.0),
        *(random_coefficients(seed, degree) for seed, degree in ((0, 1), (1, 4), (2, 9))),
    ],
    ids=str,
)
def test_the_bound_of_a_skew_polynomial_holds_in_exact_arithmetic_and_is_tight(coefficients, length: float):
    bound = fmpq(*skew_polynomial_bound(coefficients, length).as_integer_ratio())
    c = [fmpq(*x.as_integer_ratio()) for x in coefficients]
    largest = fmpq(0)
    for step in range(801):
        theta = fmpq(*length.as_integer_ratio()) * fmpq(step, 800)
        real = sum(((-1) ** (j // 2) * c[j] * theta**j for j in range(0, len(c), 2)), fmpq(0))
        imaginary = sum(((-1) ** (j // 2) * c[j] * theta**j for j in range(1, len(c), 2)), fmpq(0))
        largest = max(largest, real**2 + imaginary**2)
    assert largest <= bound**2 <= largest * fmpq(1001, 1000)


def test_the_bound_of_a_skew_polynomial_of_unbounded_maps_is_infinite():
    assert skew_polynomial_bound((1.0, 1.0), math.inf) == math.inf
    assert skew_polynomial_bound((1.0, 1e200, 1e200), 1e200) == math.inf


@COMPLEX
@pytest.mark.parametrize("fn", [newton_schulz, cayley, cholesky_orthogonal, projector, block_reflector])
@pytest.mark.parametrize("shape", [(4, 4), (5, 3)])
def test_derivatives_of_the_maps(fn: Any, dtype: torch.dtype, shape: tuple[int, int]):
    """Written out by hand, hence against finite differences; also where the Cayley map cuts the length."""
    P = randn(2, *shape, dtype=dtype).requires_grad_()
    assert torch.autograd.gradcheck(fn, (P,))
    if fn is cayley:
        assert torch.autograd.gradcheck(lambda P: fn(1e4 * P), (P,), atol=1e-4)
    if fn in (projector, block_reflector):
        for rows, columns in ((2, 4), (4, 1)):
            assert torch.autograd.gradcheck(lambda P, r=rows, c=columns: fn(P, r, c), (P,))
    else:
        assert torch.autograd.gradcheck(lambda P: fn(P.mH), (P,))


@pytest.mark.parametrize("fn", [newton_schulz, cayley, cholesky_orthogonal, block_reflector])
def test_batches_are_maps_of_each(fn: Any):
    P = randn(2, 3, 5, 4)
    batched = fn(P)
    for i, j in product(range(2), range(3)):
        torch.testing.assert_close(batched[i, j], fn(P[i, j]))


@pytest.mark.parametrize("fn", [newton_schulz, cayley, cholesky_orthogonal, block_reflector])
def test_nan_comes_out_as_nan(fn: Any):
    assert fn(torch.full((3, 3), math.nan)).isnan().any()


# Norms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_norm_bounds_enclose_the_largest_singular_value(shape: tuple[int, int], scale: float):
    W = randn(3, *shape) * scale
    exact = torch.linalg.svdvals(W)[..., 0]
    for iterations in range(9):
        bound = gram_iteration_bound(W, iterations)
        assert (bound >= exact * (1 - 1e-14)).all()
        overestimate = min(shape) ** (0.5 / 2**iterations)
        assert (bound <= exact * overestimate * (1 + 1e-12)).all()
    tight = spectral_norm_bound(W)
    assert (tight >= exact * (1 - 1e-14)).all()
    assert (tight <= exact * 1.01).all()


def test_norm_bounds_of_zero_and_of_nan():
    assert gram_iteration_bound(torch.zeros(3, 2)) == 0
    assert spectral_norm_bound(torch.zeros(3, 2)) == 0
    assert spectral_norm_bound(torch.tensor([[math.nan, 1.0]])).isnan()


def test_gram_iteration_has_the_gradient_of_its_value():
    W = randn(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda W: gram_iteration_bound(W, 4), W)


def test_power_iteration_stays_below():
    for seed in range(20):
        W = randn(6, 5, seed=seed)
        W[:, 0] *= 1.5
        exact = norm(W)
        for iterations in (1, 5, 100):
            low = spectral_norm_lower_bound(W, iterations, torch.Generator().manual_seed(seed)).item()
            assert low <= exact * (1 + 1e-12)


# Fourier --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (5, 3), (1, 6), (3, 2)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 4), (5, 1)])
def test_transfer_matrices_diagonalise_the_circulant(size: tuple[int, int], kernel: tuple[int, int]):
    """The dense circulant, built by shifting, has the transfer matrices as its blocks in numpy's Fourier basis."""
    K = randn(3, 2, *kernel)
    (H, W), (kh, kw) = size, kernel
    dense = np.zeros((3, H, W, 2, H, W))
    for h, w, a, b in product(range(H), range(W), range(kh), range(kw)):
        source = (h + a - (kh - 1) // 2) % H, (w + b - (kw - 1) // 2) % W
        dense[:, h, w, :, source[0], source[1]] += K[:, :, a, b].numpy()
    basis = np.kron(np.fft.ifft(np.eye(H)) * math.sqrt(H), np.fft.ifft(np.eye(W)) * math.sqrt(W))
    blocks = np.einsum("xp,opiq,qy->oxiy", basis.conj(), dense.reshape(3, H * W, 2, H * W), basis)
    ours = transfer_matrix(K, size).numpy()
    for x, y in product(range(H * W), repeat=2):
        if x != y:
            assert np.abs(blocks[:, x, :, y]).max() < 1e-10
    for h, w in product(range(H), range(W // 2 + 1)):
        # ours counts taps as torch's cross-correlation does, x[p + t], which is exp(+iωt) for this basis
        np.testing.assert_allclose(blocks[:, h * W + w, :, h * W + w], ours[h, w].conj(), atol=1e-10)


@pytest.mark.parametrize("size", [1, 2, 5, 12, 33])
@pytest.mark.parametrize("half", [False, True])
def test_the_isometric_dft_is_as_close_to_the_exact_one_as_stated_and_keeps_norms(size: int, half: bool):
    positions = torch.arange(-3, size + 40, 2)
    found = isometric_dft(positions, size, half)
    distance = arb(0)
    with flint.ctx.workprec(200):
        for f, row in enumerate(found.tolist()):
            scale = (arb(2 if half and 2 * f % size else 1) / size).sqrt()
            for t, value in zip(positions.tolist(), row, strict=True):
                angle = arb(fmpq(-2 * f * t, size))
                distance += (scale * angle.cos_pi() - value.real) ** 2 + (scale * angle.sin_pi() - value.imag) ** 2
    assert distance < isometric_dft_error(len(positions)) ** 2
    once = found[:, (positions >= 0) & (positions < size)]
    gram = (once.mH @ once).real if half else once.mH @ once
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=gram.dtype))


@pytest.mark.parametrize("size", [(4, 4), (5, 3), (1, 6), (3, 1), (7, 2)])
@pytest.mark.parametrize("extra", [(0, 0), (1, 2), (0, 3)])
def test_fourier_multiply_is_the_convolution_of_the_embedded_image(size: tuple[int, int], extra: tuple[int, int]):
    """Against sums over shifted images; more images than are transformed at a time."""
    grid = size[0] + extra[0], size[1] + extra[1]
    x, K = randn(35, 2, *size), randn(3, 2, 3, 2, seed=1)
    torus = F.pad(x, (0, extra[1], 0, extra[0]))
    expected = sum(
        torch.einsum("oi,bihw->bohw", K[..., a, b], torus.roll((a - 1, b), (-2, -1)))
        for a, b in product(range(3), range(2))
    )
    for out in (grid, (1, grid[1]), size):
        y = fourier_multiply(x, transfer_matrix(K, grid), grid, out)
        torch.testing.assert_close(y, expected[..., : out[0], : out[1]])


def test_fourier_multiply_has_first_and_second_derivatives():
    x, K = randn(2, 2, 3, 4).requires_grad_(), randn(3, 2, 3, 2, seed=1).requires_grad_()
    for grid in ((3, 4), (4, 5)):

        def run(x: Tensor, K: Tensor, grid: tuple[int, int] = grid) -> Tensor:
            return fourier_multiply(x, transfer_matrix(K, grid), grid, (3, 4))

        assert torch.autograd.gradcheck(run, (x, K), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(run, (x, K))


def test_fast_sizes_have_no_prime_factor_above_eleven():
    from scipy.fft import next_fast_len

    assert [fast_size(n) for n in range(1, 300)] == [next_fast_len(n) for n in range(1, 300)]


# Convolutions ---------------------------------------------------------------------------------------------------------


def test_overlap_is_the_count_of_taps_that_read_one_position():
    for k, s, d in product(range(1, 6), range(1, 5), range(1, 5)):
        counts: dict[int, int] = {}
        for j, t in product(range(60), range(k)):
            position = s * j + d * t
            counts[position] = counts.get(position, 0) + 1
        assert overlap(k, s, d) == max(counts.values()), (k, s, d)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (4, 4)])
def test_polyphase_is_the_strided_convolution(stride: tuple, dilation: tuple, kernel: tuple):
    weight = randn(3, 2, *kernel)
    x = randn(1, 2, 12 * stride[0], 12 * stride[1])
    phases = polyphase(weight[None], stride, dilation)[0]
    shuffled = x.view(1, 2, 12, stride[0], 12, stride[1]).permute(0, 1, 3, 5, 2, 4).reshape(1, -1, 12, 12)
    expected = F.conv2d(x, weight, stride=stride, dilation=dilation)
    got = F.conv2d(shuffled, phases)
    h, w = min(expected.shape[-2], got.shape[-2]), min(expected.shape[-1], got.shape[-1])
    assert h
    assert w
    torch.testing.assert_close(got[..., :h, :w], expected[..., :h, :w])


@pytest.mark.parametrize("side", ["in", "out"])
def test_autocorrelation_is_the_naive_sum(side: str):
    K = randn(2, 3, 2, 2, 3)
    got = autocorrelation(K, side)
    channels = 2 if side == "in" else 3
    assert got.shape == (2, channels, channels, 3, 5)
    expected = torch.zeros_like(got)
    for g, m, n, dy, dx in product(range(2), range(channels), range(channels), range(-1, 2), range(-2, 3)):
        for c, a, b in product(range(3 if side == "in" else 2), range(2), range(3)):
            if 0 <= a + dy < 2 and 0 <= b + dx < 3:
                p, q = (K[g, c, m], K[g, c, n]) if side == "in" else (K[g, m, c], K[g, n, c])
                expected[g, m, n, 1 + dy, 2 + dx] += p[a, b] * q[a + dy, b + dx]
    # which of the two channels is shifted is a convention: lags may come mirrored
    mirrored = expected.flip(-2, -1)
    assert torch.allclose(got, expected) or torch.allclose(got, mirrored)


CASES = [
    {},
    {"padding": 1},
    {"padding": 3},
    {"padding": (0, 2)},
    {"stride": 2, "padding": 1},
    {"stride": (3, 1), "padding": 2},
    {"dilation": 2, "padding": 2},
    {"dilation": 2, "stride": 2, "padding": 2},
    {"dilation": (3, 2), "stride": (2, 4), "padding": 3},
    {"groups": 2, "padding": 1},
    {"groups": 2, "stride": 2, "padding": 1},
]


@pytest.mark.parametrize("arguments", CASES, ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (2, 2), (1, 4), (5, 5)])
@pytest.mark.parametrize("kind", ["gaussian", "positive", "shift"])
def test_conv_norm_bounds_enclose_the_dense_matrix(arguments: dict, kernel: tuple[int, int], kind: str):
    arguments = dict(arguments)
    groups = arguments.get("groups", 1)
    weight = randn(4, 4 // groups, *kernel)
    if kind == "positive":
        weight = weight.abs()
    elif kind == "shift":
        weight = torch.zeros_like(weight)
        weight[:, 0, -1, -1] = 1
    stride, dilation = arguments.get("stride", 1), arguments.get("dilation", 1)
    stride, dilation = (v if isinstance(v, tuple) else (v, v) for v in (stride, dilation))
    bound = conv_norm_enclosure(weight, stride, dilation, groups).upper
    grouped = weight.view(groups, 4 // groups, 4 // groups, *kernel)
    rows = row_sum_bound(polyphase(grouped, stride, dilation)).amax().item()
    assert bound <= rows * (1 + 1e-12)
    measured = 0.0
    for size in [(3, 4), (9, 7)]:
        span = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
        pads = arguments.get("padding", 0)
        pads = pads if isinstance(pads, tuple) else (pads, pads)
        if all(n + 2 * p >= s for n, p, s in zip(size, pads, span, strict=True)):
            measured = max(measured, norm(conv_matrix(weight, size, **arguments)))
    assert measured <= bound * (1 + 1e-12)


def test_conv_norm_enclosure_is_tight_for_large_images_and_circular_padding():
    weight = randn(2, 2, 3, 3).abs()
    exact = norm(conv_matrix(weight, (6, 7), mode="circular", padding=1))
    bound = conv_norm_enclosure(weight).upper
    assert exact <= bound * (1 + 1e-12)
    assert bound <= exact * 1.02  # at ω = 0, which every grid contains


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("groups", [1, 2])
def test_orthogonal_taps_are_isometric_or_coisometric(stride: tuple, kernel: tuple, groups: int):
    weight = orthogonal_taps_(torch.empty(4, 6 // groups, *kernel, dtype=torch.float64), stride, groups)
    matrix = conv_matrix(weight, (12, 12), stride=stride, groups=groups)
    assert norm(matrix) == pytest.approx(1, abs=1e-6)


# The formulas of the layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_aol_is_the_formula(shape: tuple[int, int]):
    """W = P·diag(Σ_j |PᵀP|_ij)^(−1/2), on the rows where they are fewer."""
    layer = AOLLinear(shape[1], shape[0], dtype=torch.float64)
    with torch.no_grad():
        layer.raw.copy_(randn(*shape))
    P = layer.raw.detach().numpy()
    P = P if shape[0] >= shape[1] else P.T
    W = np.empty_like(P)
    for i in range(P.shape[1]):
        W[:, i] = P[:, i] / math.sqrt(sum(abs(P[:, i] @ P[:, j]) for j in range(P.shape[1])))
    np.testing.assert_allclose(layer.weight.detach().numpy(), W if shape[0] >= shape[1] else W.T, atol=1e-12)


def test_aol_conv_is_the_formula():
    layer = AOLConv2d(2, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.raw.copy_(randn(3, 2, 3, 3))
    P = layer.raw.detach()
    for i in range(2):
        total = 0.0
        for j, dy, dx in product(range(2), range(-2, 3), range(-2, 3)):
            lag = 0.0
            for o, a, b in product(range(3), range(3), range(3)):
                if 0 <= a + dy < 3 and 0 <= b + dx < 3:
                    lag += (P[o, i, a, b] * P[o, j, a + dy, b + dx]).item()
            total += abs(lag)
        torch.testing.assert_close(layer.weight[:, i], P[:, i] / math.sqrt(total))


def test_sll_is_the_formula():
    """y = x − 2W T⁻¹σ(Wᵀx + b), T_i = Σ_j |WᵀW|_ij q_j/q_i, with loops."""
    block = SLLBlock(4, hidden_features=5, dtype=torch.float64)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(randn(*p.shape, seed=p.numel()))
    W, q, b = block.raw.detach().T, block.log_q.detach().exp(), block.bias.detach()
    x = randn(4, seed=9)
    y = x.clone()
    for i in range(5):
        T = sum(abs(W[:, i] @ W[:, j]) * q[j] / q[i] for j in range(5))
        y -= 2 * W[:, i] / T * torch.relu(W[:, i] @ x + b[i])
    torch.testing.assert_close(block(x[None])[0], y)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_sll_conv_is_the_formula(mode: str):
    """The same with the dense matrix of the convolution; T from the lags of the kernels' correlation."""
    block = SLLConv2dBlock(2, hidden_channels=3, padding_mode=mode, dtype=torch.float64)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(randn(*p.shape, seed=p.numel()))
    K, q, b = block.raw.detach(), block.log_q.detach().exp(), block.bias.detach()
    T = torch.zeros(3, dtype=torch.float64)
    for i, j, dy, dx in product(range(3), range(3), range(-2, 3), range(-2, 3)):
        lag = 0.0
        for c, u, v in product(range(2), range(3), range(3)):
            if 0 <= u + dy < 3 and 0 <= v + dx < 3:
                lag += (K[i, c, u, v] * K[j, c, u + dy, v + dx]).item()
        T[i] += abs(lag) * q[j] / q[i]
    matrix = conv_matrix(K, (4, 5), mode=mode, padding=1)
    x = randn(2 * 20, seed=5)
    hidden = torch.relu(matrix @ x + b.repeat_interleave(20))
    y = x - 2 * matrix.T @ (hidden / T.repeat_interleave(20))
    torch.testing.assert_close(block(x.view(1, 2, 4, 5)).flatten(), y)
