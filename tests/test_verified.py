"""Proven enclosures of norms, against exact rational arithmetic and dense operator matrices."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from exact import exceeds_norm, is_positive_definite, rational, rows_of
from flint import fmpq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import liplayers as lp
from liplayers.errors import ArgumentError, NonFiniteError, ShapeError
from liplayers.linalg.verified import (
    conv_norm_enclosure,
    eigenvalues_exceed,
    entry_norm,
    largest_norm_enclosure,
    norm_enclosure,
    weighted_row_sum_norm,
)

EVERYTHING, DIRECT = 0.0, math.inf  # tolerances: all methods, and only those without eigenvalues


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(randn(max(m, n), min(m, n), seed=seed))[0].reshape(m, n).float()


def norm(W: Tensor) -> float:
    return torch.linalg.matrix_norm(W.double(), 2).item()


# Exact arithmetic -----------------------------------------------------------------------------------------------------


def assert_encloses(W: Tensor) -> None:
    for tolerance in (DIRECT, 1e-6, EVERYTHING):
        found = norm_enclosure(W, tolerance)
        assert exceeds_norm(found.upper, W), found
        assert not exceeds_norm(found.lower, W), found


def test_the_oracle_knows_an_exact_norm():
    W = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    assert exceeds_norm(math.nextafter(5.0, 6), W)
    assert not exceeds_norm(5.0, W)
    assert not exceeds_norm(math.nextafter(5.0, 4), W)


def hadamard(n: int) -> Tensor:
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


def hilbert(n: int) -> Tensor:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return 1 / (i[:, None] + i - 1)


MATRICES = {
    "one entry": torch.tensor([[-0.1]], dtype=torch.float64),
    "orthogonal after rounding": hadamard(8) / math.sqrt(8),
    "orthogonal in single precision": orthogonal(8, 8),
    "wide with orthogonal rows": orthogonal(3, 8),
    "identity": torch.eye(5),
    "permutation times 3": 3 * torch.eye(6)[[2, 0, 1, 5, 4, 3]],
    "half precision": randn(5, 4).half(),
    "bfloat16": randn(5, 4).bfloat16(),
    "hilbert": hilbert(8),
    "rank one": randn(6, 1) @ randn(1, 5),
    "all equal": torch.full((8, 8), 0.1, dtype=torch.float64),
    "duplicated rows": randn(1, 4).expand(6, 4).contiguous(),
    "two equal singular values": torch.diag(torch.tensor([1.0, 1.0 + 2**-52, 0.5], dtype=torch.float64)),
    "cancelling": torch.tensor([[1.0, 1.0], [1.0, -1.0 + 2**-50]], dtype=torch.float64),
    "graded": torch.diag(10.0 ** -torch.arange(0, 160, 20, dtype=torch.float64)) @ randn(8, 8),
    "subnormal": randn(4, 4) * 1e-310,
    "smallest subnormal": torch.full((3, 2), 5e-324, dtype=torch.float64),
    "subnormal single": (randn(4, 4) * 1e-41).float(),
    "tiny": randn(4, 3) * 1e-300,
    "huge": randn(4, 3) * 1e300,
    "huge beside tiny": torch.tensor([[1e300, 1e-300], [1e-300, 1e300]], dtype=torch.float64),
    "largest single": torch.full((4, 4), torch.finfo(torch.float32).max),
    "row": randn(1, 8),
    "column": randn(8, 1),
    "zero row and column": torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 4.0]]),
}


@pytest.mark.parametrize("name", MATRICES)
def test_enclosure_holds_in_exact_arithmetic(name: str):
    assert_encloses(MATRICES[name])


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    m, n = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    W = randn(m, n, seed=draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["gaussian", "orthogonal", "rank one", "duplicated", "exponents", "integers"]))
    if kind == "orthogonal":
        W = orthogonal(m, n, draw(st.integers(0, 2**32))).double()
    elif kind == "rank one":
        W = W[:, :1] * W[:1]
    elif kind == "duplicated":
        W = W[:1].expand(m, n).contiguous()
    elif kind == "exponents":
        W = W * 10.0 ** (80 * randn(m, n, seed=1)).clamp(-150, 150)
    elif kind == "integers":
        W = (3 * W).round()
    return W * 10.0 ** draw(st.integers(-150, 150)) if draw(st.booleans()) else W


@settings(max_examples=120, deadline=None, derandomize=True)
@given(matrices())
def test_enclosure_holds_in_exact_arithmetic_for_random_matrices(W: Tensor):
    assert_encloses(W)


@pytest.mark.parametrize("tolerance", [DIRECT, EVERYTHING])
@pytest.mark.parametrize("transposed", [False, True])
def test_squares_lost_in_summation_are_counted(tolerance: float, transposed: bool):
    """Each of n squares 2⁻⁵⁴ is lost when it is added to 1 alone."""
    n = 100_000
    W = torch.full((n + 1, 1), 2.0**-27, dtype=torch.float64)
    W[0] = 1
    square = 1 + n * fmpq(1, 2**54)
    found = norm_enclosure(W.T if transposed else W, tolerance)
    assert fmpq(*found.upper.as_integer_ratio()) ** 2 >= square
    assert fmpq(*found.lower.as_integer_ratio()) ** 2 <= square


# Matrices -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 200), (50, 300), (120, 120)])
@pytest.mark.parametrize("kind", ["gaussian", "orthogonal", "rank one", "positive"])
def test_enclosure_of_large_matrices_is_tight(shape: tuple[int, int], kind: str):
    W = {
        "gaussian": lambda: randn(*shape),
        "orthogonal": lambda: orthogonal(*shape),
        "rank one": lambda: randn(shape[0], 1) @ randn(1, shape[1]),
        "positive": lambda: randn(*shape).abs(),
    }[kind]()
    truth = norm(W)
    for tolerance, width in ((1e-6, 2e-6), (EVERYTHING, 1e-9)):
        found = norm_enclosure(W, tolerance)
        assert truth * (1 - width) <= found.lower <= truth * (1 + 1e-13)
        assert truth * (1 - 1e-13) <= found.upper <= truth * (1 + width)


def test_near_orthogonal_matrices_need_no_eigenvalues():
    Q = orthogonal(512, 512)
    found = norm_enclosure(Q)
    assert found.method in ("row sums", "residual")
    assert found.upper <= norm(Q) * (1 + 1e-6)


@pytest.mark.parametrize("scale", [2.0**-700, 2.0**600])
def test_powers_of_two_scale_the_enclosure_exactly(scale: float):
    W = randn(7, 5)
    found, scaled = norm_enclosure(W, EVERYTHING), norm_enclosure(W * scale, EVERYTHING)
    assert scaled.lower == pytest.approx(found.lower * scale, rel=1e-15)
    assert scaled.upper == pytest.approx(found.upper * scale, rel=1e-15)


def test_zero_and_empty_have_norm_zero():
    for W in (torch.zeros(3, 2), torch.zeros(0, 4), torch.zeros(4, 0)):
        found = norm_enclosure(W)
        assert (found.lower, found.upper) == (0, 0)


def test_a_norm_beyond_the_largest_float_has_an_infinite_upper_end():
    found = norm_enclosure(torch.full((4, 4), 1.7e308, dtype=torch.float64))
    assert found.upper == math.inf
    assert found.lower == torch.finfo(torch.float64).max


def test_autocast_gradients_and_default_dtype_change_nothing():
    W = randn(6, 5)
    expected = norm_enclosure(W, EVERYTHING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm_enclosure(W, EVERYTHING) == expected
        assert conv_norm_enclosure(W[:, :, None, None], tolerance=EVERYTHING) == expected
    assert norm_enclosure(W.requires_grad_(), EVERYTHING) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_refused(value: float):
    W = torch.ones(3, 3)
    W[1, 2] = value
    with pytest.raises(NonFiniteError, match="W contains NaN or infinity"):
        norm_enclosure(W)
    with pytest.raises(NonFiniteError, match="weight contains NaN or infinity"):
        conv_norm_enclosure(W[None, None])


def test_what_is_no_weight_is_refused():
    with pytest.raises(ShapeError, match=r"\(2, 3, 4\); expected two dimensions"):
        norm_enclosure(torch.ones(2, 3, 4))
    with pytest.raises(ArgumentError, match=r"torch.int64; expected a real"):
        norm_enclosure(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ArgumentError, match=r"torch.complex64; expected a real"):
        norm_enclosure(torch.ones(2, 3, dtype=torch.complex64))
    with pytest.raises(ShapeError, match="groups=2"):
        conv_norm_enclosure(torch.ones(3, 1, 3, 3), groups=2)
    with pytest.raises(ArgumentError, match="grid=0"):
        conv_norm_enclosure(torch.ones(1, 1, 3, 3), grid=0)


# Convolutions ---------------------------------------------------------------------------------------------------------


def conv_matrix(weight: Tensor, size: tuple[int, int], circular: tuple[int, int] | None = None, **options) -> Tensor:
    """The dense matrix of torch's conv2d, after circular padding by (height, width) if asked for."""
    channels = weight.shape[1] * options.get("groups", 1)
    pixels = torch.eye(channels * size[0] * size[1], dtype=torch.float64).view(-1, channels, *size)
    if circular is not None:
        pixels = F.pad(pixels, (circular[1], circular[1], circular[0], circular[0]), mode="circular")
    return F.conv2d(pixels, weight.double(), **options).flatten(1).T


GEOMETRIES = [
    {},
    {"stride": (2, 2)},
    {"stride": (3, 1)},
    {"dilation": (2, 2)},
    {"stride": (2, 2), "dilation": (2, 2)},
    {"stride": (4, 2), "dilation": (2, 3)},
    {"stride": (2, 2), "dilation": (4, 6)},
    {"stride": (3, 2), "dilation": (2, 3)},
    {"groups": 2},
    {"groups": 2, "stride": (2, 2)},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (2, 2), (1, 4), (1, 1)])
@pytest.mark.parametrize("kind", ["gaussian", "positive", "last tap", "orthogonal"])
def test_no_image_exceeds_the_upper_end_of_a_convolution(geometry: dict, kernel: tuple[int, int], kind: str):
    groups = geometry.get("groups", 1)
    weight = randn(4, 4 // groups, *kernel)
    if kind == "positive":
        weight = weight.abs()
    elif kind == "last tap":
        weight = torch.zeros_like(weight)
        weight[:, :, -1, -1] = randn(4, 4 // groups)
    elif kind == "orthogonal":
        lp.linalg.convolution.orthogonal_taps_(weight, geometry.get("stride", (1, 1)), groups)
        weight = weight.float()
    measured = 0.0
    for size, padding in product([(3, 4), (6, 5)], [0, 3]):
        span = [d * (k - 1) + 1 for k, d in zip(kernel, geometry.get("dilation", (1, 1)), strict=True)]
        if all(n + 2 * padding >= s for n, s in zip(size, span, strict=True)):
            measured = max(measured, norm(conv_matrix(weight, size, padding=padding, **geometry)))
    for tolerance in (DIRECT, EVERYTHING):
        found = conv_norm_enclosure(weight, tolerance=tolerance, **geometry)
        assert measured <= found.upper * (1 + 1e-13)
        assert found.lower <= found.upper


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_large_images_approach_the_lower_end_and_the_ends_are_close(geometry: dict):
    groups = geometry.get("groups", 1)
    weight = randn(2, 2 // groups, 3, 1, seed=3)
    found = conv_norm_enclosure(weight, **geometry)
    assert found.lower <= found.upper <= found.lower * (1 + 2.5e-3)
    stride, dilation = geometry.get("stride", (1, 1))[0], geometry.get("dilation", (1, 1))[0]
    options = {"stride": (stride, 1), "dilation": (dilation, 1), "groups": groups}
    large = norm(conv_matrix(weight, (240, 1), padding=(2 * dilation, 0), **options))
    assert found.lower * (1 - 2e-3) <= large <= found.upper


@pytest.mark.parametrize("size", [(6, 4), (12, 8)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_circular_images_attain_the_norm_at_a_frequency_of_the_grid(size: tuple[int, int], stride: tuple[int, int]):
    weight = randn(2, 3, 3, 3).abs()  # largest at frequency 0, which every image has
    found = conv_norm_enclosure(weight, stride, tolerance=EVERYTHING)
    circular = norm(conv_matrix(weight, size, circular=(1, 1), stride=stride))
    assert circular == pytest.approx(found.lower, rel=1e-9)
    assert found.lower <= circular * (1 + 1e-13)
    assert circular <= found.upper


def test_zero_padding_may_exceed_the_circulant_of_the_same_size_but_not_the_bound():
    weight = torch.tensor([[[0.0, 0, -1], [1, 0, 0]], [[1, 0, 0], [0, 0, 1]]])[:, :, None]
    zeros = norm(conv_matrix(weight, (1, 4), padding=(0, 1)))
    circulant = norm(conv_matrix(weight, (1, 4), circular=(0, 1)))
    assert zeros > 1.1 * circulant
    for tolerance in (DIRECT, EVERYTHING):
        assert zeros <= conv_norm_enclosure(weight, tolerance=tolerance).upper


def test_small_convolutions_are_enclosed_in_exact_arithmetic():
    for seed, tolerance in product(range(5), (DIRECT, EVERYTHING)):
        for weight in (randn(1, 1, 1, 3, seed=seed), orthogonal(2, 2, seed)[:, :, None, None].expand(2, 2, 1, 1)):
            upper = conv_norm_enclosure(weight, tolerance=tolerance).upper
            assert exceeds_norm(upper, conv_matrix(weight, (1, 5), padding=(0, (weight.shape[-1] - 1) // 2)))


@pytest.mark.parametrize("kernel", [(1, 1), (1, 2), (2, 2), (3, 3)])
@pytest.mark.parametrize("centre", [0.0, 100.0])
def test_every_grid_gives_a_bound(kernel: tuple[int, int], centre: float):
    weight = randn(3, 2, *kernel)
    weight[:2, :, 0, 0] += centre * torch.eye(2)  # the least eigenvalue is then near the largest
    truth = conv_norm_enclosure(weight, grid=256)
    for grid in (1, 5, 16, 33):
        found = conv_norm_enclosure(weight, grid=grid)
        assert found.upper >= truth.lower
        assert found.lower <= truth.upper


def test_one_tap_is_a_matrix_and_groups_take_the_maximum():
    W = randn(4, 3)
    assert conv_norm_enclosure(W[:, :, None, None], (2, 2)).upper == pytest.approx(norm(W), rel=1e-6)
    weight = torch.cat([randn(2, 3, 3, 3), 5 * randn(2, 3, 3, 3, seed=1)])
    grouped = conv_norm_enclosure(weight, groups=2)
    alone = conv_norm_enclosure(weight[2:])
    assert grouped.upper == pytest.approx(alone.upper, rel=1e-9)
    assert grouped.lower == pytest.approx(alone.lower, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_convolutions_of_extreme_scale(scale: float):
    weight = randn(2, 2, 3, 3).clamp(-1, 1)
    found, scaled = conv_norm_enclosure(weight), conv_norm_enclosure(weight * scale)
    assert scaled.upper == pytest.approx(found.upper * scale, rel=1e-9)
    assert scaled.lower == pytest.approx(found.lower * scale, rel=1e-9)


def test_nearly_orthogonal_kernels_have_tight_bounds_from_a_grid():
    layer = lp.AOCConv2d(4, 4, 3)
    nn.init.normal_(layer.raw)
    weight = layer.eval().weight.detach()
    noisy = weight + 1e-4 * randn(4, 4, 3, 3).float()
    for kernel, width in ((weight, 1e-7), (noisy, 1e-5)):
        found = conv_norm_enclosure(kernel, tolerance=EVERYTHING)
        assert found.method.startswith("symbol")
        assert found.upper <= found.lower * (1 + width)


# Several matrices -----------------------------------------------------------------------------------------------------


def unitary(B: int, n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.complex(randn(B, n, n, seed=seed), randn(B, n, n, seed=seed + 1)))[0]


def gaussian(B: int, m: int, n: int) -> Tensor:
    return torch.complex(randn(B, m, n), randn(B, m, n, seed=1))


BATCHES = {
    "gaussian": gaussian(3, 4, 3),
    "wide": gaussian(2, 2, 5),
    "real": randn(3, 4, 4),
    "unitary": unitary(4, 4),
    "unitary in single precision": unitary(3, 4).to(torch.complex64),
    "unitary times a spread": unitary(2, 4) * torch.tensor([1.0, 1e-3, 1e-160, 1 + 2**-52], dtype=torch.float64),
    "rank one": gaussian(2, 4, 1) @ gaussian(2, 1, 4),
    "huge": gaussian(2, 3, 3) * 1e300,
    "tiny": gaussian(2, 3, 3) * 1e-300,
    "subnormal": gaussian(2, 3, 3) * 1e-310,
    "smallest subnormal": torch.full((2, 2, 2), 5e-324, dtype=torch.complex128),
    "huge beside tiny": torch.stack([unitary(1, 3)[0] * 1e300, unitary(1, 3)[0] * 1e-300]),
    "imaginary": 1j * gaussian(2, 3, 3).imag,
    "one number": torch.tensor([[[3.0 + 4.0j]], [[-5.0 + 0j]]], dtype=torch.complex128),
}


@pytest.mark.parametrize("tolerance", [DIRECT, 1e-6, EVERYTHING])
@pytest.mark.parametrize("name", BATCHES)
def test_the_largest_of_several_norms_is_enclosed_in_exact_arithmetic(name: str, tolerance: float):
    found = largest_norm_enclosure(BATCHES[name], tolerance)
    assert all(exceeds_norm(found.upper, W) for W in BATCHES[name])
    assert not all(exceeds_norm(found.lower, W) for W in BATCHES[name])


def test_the_largest_of_several_norms_is_tight():
    for W, width in (
        (unitary(33, 24), 1e-11),
        (unitary(33, 24).to(torch.complex64), 1e-6),
        (gaussian(40, 24, 17), 1e-11),
    ):
        truth = torch.linalg.matrix_norm(W.to(torch.complex128), 2).amax().item()
        found = largest_norm_enclosure(W.view(-1, 1, *W.shape[1:]))
        assert truth * (1 - width) <= found.lower <= truth * (1 + 1e-13)
        assert truth * (1 - 1e-13) <= found.upper <= truth * (1 + width)


def test_the_largest_of_several_norms_refuses_what_is_no_matrix():
    assert largest_norm_enclosure(torch.zeros(3, 2, 2, dtype=torch.complex64)).upper == 0
    with pytest.raises(ShapeError, match="two dimensions or more"):
        largest_norm_enclosure(torch.ones(2))
    with pytest.raises(ArgumentError, match="floating-point or complex"):
        largest_norm_enclosure(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(NonFiniteError):
        largest_norm_enclosure(torch.full((1, 2, 2), complex(0, math.nan)))


@pytest.mark.parametrize("name", MATRICES)
def test_no_matrix_of_smaller_entries_exceeds_the_entry_norm(name: str):
    W = MATRICES[name]
    assert exceeds_norm(entry_norm(W), W.abs())
    assert entry_norm(torch.stack([W, 0 * W])) == entry_norm(W)


def test_eigenvalues_are_shown_to_exceed_a_bound_only_where_they_do_in_exact_arithmetic():
    shown = 0
    for seed in range(40):
        X = randn(4, 4, seed=seed)
        G = X @ X.T
        G = G.tril() + G.tril(-1).T
        least = torch.linalg.eigvalsh(G)[0].item()
        for below in (1e-3, 1e-12, 1e-14, 1e-15, 0.0, -1e-15, -1e-14):
            bound = least - below
            if eigenvalues_exceed(G[None], bound):
                shown += 1
                exact = rows_of(G)
                for i in range(4):
                    exact[i][i] -= rational(math.nextafter(bound, -math.inf))
                assert is_positive_definite(exact)
    assert shown >= 40
    assert not eigenvalues_exceed(torch.full((2, 2), math.nan, dtype=torch.float64), 0.0)


def test_weighted_row_sums_bound_a_convolution_and_are_exact_for_normalised_kernels():
    for seed in range(5):
        weight = randn(3, 2, 1, 3, seed=seed)
        assert exceeds_norm(weighted_row_sum_norm(weight), conv_matrix(weight, (1, 6), padding=(0, 1)))
        W = randn(4, 4, seed=seed)
        assert exceeds_norm(weighted_row_sum_norm(W[..., None, None]), W)
    positive = randn(5, 5).abs()  # |WWᵀ| is WWᵀ, whose Perron value is the square of the norm
    assert weighted_row_sum_norm(positive[..., None, None]) == pytest.approx(norm(positive), rel=1e-12)


# Use ------------------------------------------------------------------------------------------------------------------


def test_lipschitz_bound_of_torchs_layers_is_the_upper_end():
    linear, conv = nn.Linear(8, 6), nn.Conv2d(4, 6, 3, stride=2, dilation=2, groups=2)
    assert exceeds_norm(lp.lipschitz_bound(linear), linear.weight.detach())
    assert lp.lipschitz_bound(linear) == norm_enclosure(linear.weight).upper
    assert lp.lipschitz_bound(conv) == conv_norm_enclosure(conv.weight, (2, 2), (2, 2), 2).upper
