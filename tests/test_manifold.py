"""Orthogonal parameters, their optimiser, and the LipNeXt block, against scipy and dense formulations."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

import hydra
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import liplayers as lip
from liplayers import cli
from liplayers.errors import ArgumentError, ShapeError
from liplayers.layers.manifold import OrthogonalParameter, retract_
from liplayers.linalg.stiefel import (
    drift,
    fast_polar_factor,
    near_isometry_bound,
    nearest_orthogonal,
    rotate,
    skew_gradient,
    tangent,
)
from liplayers.testing.measure import executed_in_double, operator_norm, worst_norm
from liplayers.training import Lookahead, ManifoldAdamW, ManifoldMuon, warmup_cosine

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ROUNDING = 1e-14  # of the measurement and of bounds in float64
SIZES = [(1, 1), (1, 9), (9, 1), (3, 7), (7, 3), (6, 6), (2, 2)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def skew(n: int, length: float, seed: int = 0) -> Tensor:
    """A random skew matrix of Frobenius norm `length`."""
    A = randn(n, n, seed=seed)
    A = A - A.mT
    return A * (length / A.norm())


def orthogonal(m: int, n: int, seed: int = 0) -> Tensor:
    U, _, Vh = np.linalg.svd(randn(m, n, seed=seed).numpy(), full_matrices=False)
    return torch.from_numpy(U @ Vh)


def norm(W: Tensor) -> float:
    return torch.linalg.matrix_norm(W.detach().double(), 2).item()


# Mathematics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1e-3, 0.049, 0.051, 0.249, 0.251, 0.999, 1.01, 5.0, 40.0])
@pytest.mark.parametrize(("m", "n"), [(2, 2), (3, 7), (6, 6)])
def test_the_step_is_the_matrix_exponential(m: int, n: int, length: float):
    X, A = orthogonal(m, n), skew(n, length)
    expected = X @ torch.from_numpy(scipy.linalg.expm(A.numpy()))
    order = 2 if length <= 0.05 else 3 if length <= 0.25 else 4
    allowed = 1e-12 if length > 1 else length ** (order + 1) / math.factorial(order + 1) + 1e-15
    error = norm(rotate(X, A) - expected)
    assert error <= allowed
    if 0.01 < length <= 1 and m == n:
        assert error > 1e-3 * allowed  # the series is cut where it says


def test_a_batch_of_steps_takes_the_order_of_the_longest():
    X = torch.stack([orthogonal(4, 4, seed=s) for s in range(3)])
    A = torch.stack([skew(4, length, seed=i) for i, length in enumerate((0.01, 0.1, 3.0))])
    expected = torch.stack([x @ torch.from_numpy(scipy.linalg.expm(a.numpy())) for x, a in zip(X, A, strict=True)])
    torch.testing.assert_close(rotate(X, A), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_stays_so(bad: float):
    assert rotate(torch.eye(2), torch.full((2, 2), bad)).isnan().any()
    assert nearest_orthogonal(torch.full((2, 2), bad)).isnan().any()
    assert near_isometry_bound(torch.full((2, 2), bad)).item() == math.inf


@pytest.mark.parametrize(("m", "n"), [(3, 3), (2, 5), (1, 4)])
def test_the_skew_gradient_is_the_derivative_along_every_rotation(m: int, n: int):
    X, T = orthogonal(m, n), randn(m, n, seed=1)

    def f(W: Tensor) -> Tensor:
        return (W - T).pow(4).sum()

    point = X.clone().requires_grad_()
    (G,) = torch.autograd.grad(f(point), point)
    S = skew_gradient(X, G)
    assert torch.equal(S, -S.mT)
    h = 1e-5
    for i, j in combinations(range(n), 2):
        E = torch.zeros(n, n, dtype=torch.float64)
        E[i, j], E[j, i] = h, -h
        there, back = (f(X @ torch.from_numpy(scipy.linalg.expm(s * E.numpy()))).item() for s in (1, -1))
        assert (there - back) / (2 * h) == pytest.approx(2 * S[i, j].item(), rel=1e-6, abs=1e-7)
    if m == n:  # the gradient projected onto the tangent space
        torch.testing.assert_close(X @ S, (G - X @ G.mT @ X) / 2)


@pytest.mark.parametrize(("m", "n"), SIZES)
def test_retraction_gives_the_polar_factor(m: int, n: int):
    W = randn(m, n)
    expected = torch.from_numpy(scipy.linalg.polar(W.numpy())[0])
    torch.testing.assert_close(nearest_orthogonal(W), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(retract_(1e6 * W.float()), expected.float(), rtol=0, atol=1e-4)
    for lost in (torch.zeros(m, n), W[:, :1] @ W[:1], 1e-12 * W + W[:, :1] @ W[:1]):
        assert drift(nearest_orthogonal(lost)) < 1e-9


def test_retraction_of_a_batch_keeps_to_each_matrix():
    batch = torch.stack([randn(3, 4), torch.zeros(3, 4).double(), torch.full((3, 4), math.nan).double()])
    Q = nearest_orthogonal(batch)
    torch.testing.assert_close(Q[0], nearest_orthogonal(batch[0]))
    assert drift(Q[1]) < 1e-9
    assert Q[2].isnan().all()


@pytest.mark.parametrize(("m", "n"), [*SIZES, (64, 64)])
@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-6, 1e-2, 1.0, 1e3, 1e9])
def test_the_bound_of_an_almost_orthogonal_matrix_is_an_upper_bound(m: int, n: int, scale: float):
    for base in (orthogonal(m, n), torch.zeros(m, n).double()):
        W = base + scale * randn(m, n, seed=2)
        bound = near_isometry_bound(W).item()
        assert norm(W) * (1 - ROUNDING) <= bound <= norm(W) * 1.2 + 1e-12
    near = orthogonal(m, n) + 1e-6 * randn(m, n, seed=2)
    assert near_isometry_bound(near).item() - 1 <= 1e-5 * math.sqrt(max(m, n))


# The parameter --------------------------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "double": lambda m: m.double(),
    "to": lambda m: m.to("cpu", torch.bfloat16),
    "to_empty": lambda m: m.to("meta").to_empty(device="cpu"),
}
LAYERS: list[Callable[..., nn.Module]] = [
    lambda **k: lip.ManifoldLinear(5, 3, **k),
    lambda **k: lip.LipNeXtBlock(4, (3, 5), **k),
]


def classes(layer: nn.Module) -> dict[str, str]:
    return {name: type(p).__name__ for name, p in layer.named_parameters()}


def expected_classes(layer: nn.Module) -> dict[str, str]:
    return {
        name: "OrthogonalParameter" if name in ("raw", "rotation", "mixing") else "Parameter"
        for name, _ in layer.named_parameters()
    }


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("name", COPIES)
def test_orthogonal_parameters_stay_what_they_are(make: Callable, name: str):
    layer = make()
    layer.raw_device  # noqa: B018
    next(layer.parameters()).requires_grad_(False)
    other = COPIES[name](layer)
    assert classes(other) == expected_classes(other)
    assert not next(other.parameters()).requires_grad
    if name == "to_empty":
        other.reset_parameters()
        assert other.lipschitz_bound() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("assign", [False, True])
def test_loading_keeps_the_class(make: Callable, assign: bool):
    layer, other = make(), make()
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert classes(layer) == expected_classes(layer)
    assert all(type(value) is Tensor for value in layer.state_dict().values())
    meta = make(device="meta")
    assert classes(meta) == expected_classes(meta)
    meta.load_state_dict(other.state_dict(), assign=True)
    assert classes(meta) == expected_classes(meta)


@pytest.mark.parametrize("flag", ["swap", "overwrite"])
def test_the_other_ways_of_torch_to_cast_keep_the_class(flag: str):
    setting = getattr(torch.__future__, f"set_{flag}_module_params_on_conversion")
    setting(True)
    try:
        layer = lip.ManifoldLinear(4, 3).double()
    finally:
        setting(False)
    assert classes(layer) == expected_classes(layer)
    assert layer.raw.dtype == torch.float64


def test_a_parameter_tied_to_another_layer_stays_the_same_object():
    a, b = lip.ManifoldLinear(4, 4), lip.ManifoldLinear(4, 4)
    b.raw = a.raw
    plain = nn.Parameter(torch.eye(4))
    a.raw = plain
    assert a.raw is plain
    assert isinstance(plain, OrthogonalParameter)
    assert b.raw is not plain


# The layer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [*SIZES, (64, 64), (200, 50)])
@pytest.mark.parametrize(("dtype", "excess"), [(torch.float32, 5e-7), (torch.float64, 1e-14)])
def test_linear_is_orthogonal_at_first_and_after_a_retraction(m: int, n: int, dtype: torch.dtype, excess: float):
    torch.manual_seed(0)
    layer = lip.ManifoldLinear(n, m, dtype=dtype)
    assert layer.weight is layer.raw
    assert drift(layer.raw.double()) < 1e-14 * max(m, n) ** 2 + (1e-5 if dtype == torch.float32 else 0)
    assert norm(layer.raw) * (1 - ROUNDING) <= layer.lipschitz_bound() < 1 + 4 * excess
    with torch.no_grad():
        layer.raw.add_(0.3 * torch.randn_like(layer.raw))
    assert norm(layer.raw) * (1 - ROUNDING) <= layer.lipschitz_bound()
    layer.retract_()
    assert norm(layer.raw) * (1 - ROUNDING) <= layer.lipschitz_bound() < 1 + excess
    assert classes(layer) == expected_classes(layer)


def test_training_with_an_optimiser_that_leaves_the_manifold_is_counted():
    torch.manual_seed(0)
    for layer, shape in [(lip.ManifoldLinear(6, 5), (6,)), (lip.LipNeXtBlock(5, 4), (5, 4, 4))]:
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        x = torch.randn(8, *shape)
        target = 1.5 * layer(x).detach()
        bounds = []
        for _ in range(20):
            optimizer.zero_grad()
            F.mse_loss(layer(x), target).backward()
            optimizer.step()
            bounds.append(lip.lipschitz_bound(layer))
            assert worst_norm(executed_in_double(layer), shape, nonlinear=True) <= bounds[-1] * (1 + 1e-6)
        assert max(bounds) > 1.01
        layer.retract_()
        assert lip.lipschitz_bound(layer) < 1 + 2e-6


# The optimiser --------------------------------------------------------------------------------------------------------


def fit(
    layer: nn.Module, optimizer: ManifoldAdamW, x: Tensor, target: Tensor, steps: int, each: Callable = int
) -> None:
    schedule = warmup_cosine(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - target).square().sum().div(len(x)).backward()
        optimizer.step()
        schedule.step()
        each()


@pytest.mark.parametrize(("m", "n"), [(8, 8), (3, 8), (8, 3)])
def test_it_solves_the_procrustes_problem(m: int, n: int):
    """In the component of the solution: a step never changes the sign of the determinant of a square matrix."""
    x = np.linalg.qr(randn(40, n).numpy())[0] * math.sqrt(40)
    target = x @ orthogonal(m, n, seed=1).mT.numpy() + 0.3 * randn(40, m, seed=2).numpy()
    torch.manual_seed(0)
    layer = lip.ManifoldLinear(n, m, bias=False, dtype=torch.float64)
    if m == n:
        expected = scipy.linalg.orthogonal_procrustes(x, target)[0].T
        with torch.no_grad():
            layer.raw[0] *= np.sign(np.linalg.det(expected)) * layer.raw.det().sign()
    else:  # x has orthogonal columns of one length: the nearest frame to targetᵀx
        expected = scipy.linalg.polar(target.T @ x)[0]
    fit(layer, ManifoldAdamW(layer.parameters(), lr=0.1), torch.from_numpy(x), torch.from_numpy(target), 400)
    torch.testing.assert_close(layer.weight.detach(), torch.from_numpy(expected), rtol=0, atol=1e-4)


def test_the_determinant_keeps_its_sign():
    for sign in (1, -1):
        layer = lip.ManifoldLinear(4, 4, bias=False, dtype=torch.float64)
        with torch.no_grad():
            layer.raw[0] *= sign * layer.raw.det().sign()
        x = randn(30, 4)
        fit(layer, ManifoldAdamW(layer.parameters(), lr=0.3), x, -sign * x.flip(1), 100)
        assert layer.weight.det().item() == pytest.approx(sign, abs=0.1)


@pytest.mark.parametrize(("m", "n"), [(16, 16), (5, 12), (12, 5)])
def test_float32_weights_stay_orthogonal_over_500_steps(m: int, n: int):
    torch.manual_seed(0)
    layer = lip.ManifoldLinear(n, m)
    optimizer = ManifoldAdamW(layer.parameters(), lr=0.02, retract_every=50)
    seen = []

    def each() -> None:
        bound = layer.lipschitz_bound()
        assert norm(layer.raw) <= bound
        seen.append(bound - 1)

    x = torch.randn(64, n)
    start = layer.weight.detach().clone()
    fit(layer, optimizer, x, torch.randn(64, m), 500, each)
    assert norm(layer.weight - start) > 0.5
    assert max(seen) < 1e-4
    assert all(excess < 5e-7 for excess in seen[49::50])
    assert max(seen) > 1e-6  # what is cut off the series is seen, not hidden
    optimizer.retract()
    assert layer.lipschitz_bound() - 1 < 5e-7


def network() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [lip.ManifoldLinear(4, 6), lip.MaxMin(), lip.ManifoldLinear(6, 4), lip.ManifoldLinear(4, 4)]
    return nn.Sequential(*layers, lip.AOLLinear(4, 3))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for i in range(first, last):
        optimizer.zero_grad()
        model(randn(5, 4, seed=i, dtype=torch.float32)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("make", [partial(ManifoldAdamW, retract_every=4), ManifoldMuon], ids=["adamw", "muon"])
def test_training_that_is_saved_and_resumed_is_the_same(how: str, make: Callable[..., torch.optim.Optimizer]):
    model = network()
    optimizer = make(model.parameters(), lr=0.05)
    steps(model, optimizer, 0, 6)
    if how == "state_dict":
        other = network()
        other.load_state_dict(model.state_dict())
        resumed = make(other.parameters(), lr=0.5)
        resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    else:
        clone = copy.deepcopy if how == "deepcopy" else lambda pair: pickle.loads(pickle.dumps(pair))
        other, resumed = clone((model, optimizer))
    steps(model, optimizer, 6, 12)
    steps(other, resumed, 6, 12)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_other_parameters_get_torchs_adamw():
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    steps(ours, ManifoldAdamW(ours.parameters(), **settings), 0, 8)
    steps(theirs, torch.optim.AdamW(theirs.parameters(), **settings), 0, 8)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_step_is_adams_in_the_tangent_space_and_stacks_do_not_matter():
    lr, layers = 0.1, [lip.ManifoldLinear(*size, bias=False, dtype=torch.float64) for size in [(4, 3), (3, 4), (4, 3)]]
    before = [layer.raw.detach().clone() for layer in layers]
    for i, layer in enumerate(layers):
        layer.raw.grad = randn(*layer.raw.shape, seed=i)
    ManifoldAdamW([layer.raw for layer in layers], lr=lr, weight_decay=0.5).step()
    for layer, W in zip(layers, before, strict=True):
        X, G = (W, layer.raw.grad) if W.shape[0] < W.shape[1] else (W.mT, layer.raw.grad.mT)
        S = (X.mT @ G - G.mT @ X) / 2
        X = X @ torch.from_numpy(scipy.linalg.expm((-lr * S / (S.abs() + 1e-8)).numpy()))  # at the first step
        new = layer.raw.detach()
        torch.testing.assert_close(new if W.shape[0] < W.shape[1] else new.mT, X, rtol=0, atol=1e-3)


def test_schedules_closures_missing_gradients_and_groups():
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2:].parameters()}]
    optimizer = ManifoldAdamW(groups, lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    frozen = model[0].raw.detach().clone()
    model[3].requires_grad_(False)
    still = model[3].raw.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    moves = []
    for _ in range(4):
        before = model[2].raw.detach().clone()
        assert optimizer.step(closure).item() > 0
        schedule.step()
        moves.append(norm(model[2].raw - before))
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.05 / 16]
    assert all(later < 0.7 * earlier for earlier, later in pairwise(moves))
    assert torch.equal(model[0].raw, frozen)
    assert torch.equal(model[3].raw, still)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_train_and_are_counted(dtype: torch.dtype):
    layer = lip.ManifoldLinear(6, 4, dtype=dtype)
    optimizer = ManifoldAdamW(layer.parameters(), lr=0.05, eps=1e-4, retract_every=2)
    before = layer.raw.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        layer(torch.ones(2, 6, dtype=dtype)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(layer.raw, before)
    assert 1 - 1e-2 < norm(layer.raw) <= layer.lipschitz_bound() < 1.02


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1.0), ("lr", "fast"), ("betas", (0.9, 1.0)), ("betas", [0.9]), ("eps", 0.0), ("weight_decay", -0.1)]
    + [("retract_every", value) for value in (0, 1.5, True, None)],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: object):
    with pytest.raises(ArgumentError, match=name) as caught:
        ManifoldAdamW([nn.Parameter(torch.zeros(2))], **{name: value})
    assert "\n" not in str(caught.value)
    with pytest.raises(ArgumentError, match="matrix"):
        ManifoldAdamW([OrthogonalParameter(torch.zeros(2, 3, 4))])


@pytest.mark.parametrize(("m", "n"), [(4, 4), (3, 5), (5, 3)])
def test_identity_init_keeps_the_first_features(m: int, n: int):
    layer, x = lip.ManifoldLinear(n, m, init="identity"), randn(2, n).float()
    k = min(m, n)
    assert torch.equal(layer(x), torch.cat([x[:, :k], torch.zeros(2, m - k)], 1))
    assert layer.lipschitz_bound() == 1
    assert layer.raw.requires_grad


def test_unknown_init_is_refused():
    with pytest.raises(ArgumentError, match="ManifoldLinear: init='eye'; expected 'orthogonal' or 'identity'"):
        lip.ManifoldLinear(3, 3, init="eye")


# Muon -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 5), (3, 7), (6, 6), (2, 2)])
def test_the_tangent_part_is_the_nearest_tangent_vector(m: int, n: int):
    """The tangent space is {XA: A skew} for a wide X: a least squares problem in a basis of it."""
    X, G = orthogonal(m, n), randn(m, n, seed=1)
    T = tangent(X, G)
    torch.testing.assert_close(T @ X.mT, -(T @ X.mT).mT, rtol=0, atol=1e-14)
    units = [torch.zeros(n, n).double() for _ in range(n * (n - 1) // 2)]
    for A, (i, j) in zip(units, combinations(range(n), 2), strict=True):
        A[i, j], A[j, i] = 1, -1
    if units:
        basis = torch.stack([(X @ A).flatten() for A in units], 1).numpy()
        expected = basis @ np.linalg.lstsq(basis, G.flatten().numpy(), rcond=None)[0]
    else:
        expected = np.zeros(m * n)
    torch.testing.assert_close(T.flatten(), torch.from_numpy(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 7), (6, 6), (40, 60)])
def test_the_fast_polar_factor_keeps_directions_and_brings_values_near_one(m, n, scale, dtype, slack):
    U, Vh = orthogonal(m, m), orthogonal(m, n, seed=1)
    values = torch.linspace(0.3, 1, m).double()  # at least 4 % of ‖TTᵀ‖_F^½, which is at most m^¼ times the norm
    found = fast_polar_factor((scale * (U * values) @ Vh).to(dtype)).double()
    inner = U.mT @ found @ Vh.mT  # diagonal as the polynomials are odd
    assert (inner.diagonal() - 1).abs().max() <= 0.098 + slack
    assert norm(inner - inner.diagonal().diag()) <= slack
    assert norm(found - U @ inner @ Vh) <= slack


@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_rounding_to_bfloat16_does_not_blow_up_the_fast_polar_factor(rank: int):
    """The bound on the norm is tight for rank 1: values just above 1 would grow without limit."""
    batch = randn(500, 8, rank) @ randn(500, rank, 12, seed=1)
    norms = torch.linalg.matrix_norm(fast_polar_factor(batch.bfloat16()).double(), 2)
    assert 0.85 < norms.min() <= norms.max() < 1.15


def test_the_fast_polar_factor_never_lengthens_beyond_its_error_and_grows_small_values():
    values = torch.logspace(-8, 0, 200).double()  # of one matrix: ‖TTᵀ‖_F^½ is the norm of the largest, nearly
    scale = values.square().square().sum().sqrt().sqrt()
    found = fast_polar_factor(values.diag()).diagonal()
    assert found.max() <= 1.098
    assert (found[values >= 0.034 * scale] >= 0.902).all()
    assert (found >= 0.9 * values).all()
    assert not fast_polar_factor(torch.zeros(2, 3)).any()
    assert fast_polar_factor(torch.full((2, 2), math.nan)).isnan().all()


@pytest.mark.parametrize(("m", "n"), [(4, 4), (3, 5), (5, 3)])
def test_a_step_of_muon_turns_every_direction_by_the_learning_rate(m: int, n: int):
    """Against scipy's polar factors, from a gradient whose tangent part has no small singular values."""
    lr, W = 0.05, orthogonal(m, n)
    layer = lip.ManifoldLinear(n, m, bias=False, dtype=torch.float64)
    layer.raw.data.copy_(W)
    X = W if m <= n else W.mT
    layer.raw.grad = randn(m, n, seed=3)
    G = layer.raw.grad if m <= n else layer.raw.grad.mT
    ManifoldMuon([layer.raw], lr=lr, bfloat16=False).step()
    M = G @ X.mT
    T = (0.1 * 0.9 + 0.1) * (G - (M + M.mT) @ X / 2)  # Nesterov's mean of the gradient, at the first step
    U, values, Vh = np.linalg.svd(T.numpy(), full_matrices=False)
    found = layer.raw.detach() if m <= n else layer.raw.detach().mT
    moved = torch.from_numpy(scipy.linalg.polar((X - lr * torch.from_numpy(U @ Vh)).numpy())[0])
    kept = torch.from_numpy(U[:, values > 0.03 * values[0]])
    torch.testing.assert_close(kept.mT @ (found - X), kept.mT @ (moved - X), rtol=0, atol=0.12 * lr)
    assert norm(found - X) <= 1.5 * lr
    assert drift(found) <= 10 * lr**2


@pytest.mark.parametrize(("m", "n"), [(6, 6), (4, 6), (6, 4)])
def test_muon_moves_a_parameter_of_any_layout_alike(m: int, n: int):
    """In memory the parameter and its gradient may be transposed; the step writes into it in place."""
    W, gradients, ends = orthogonal(m, n).float(), [randn(m, n, seed=s).float() for s in range(3)], []
    for transposed, gradient_transposed in [(False, False), (True, False), (False, True), (True, True)]:
        layer = lip.ManifoldLinear(n, m, bias=False)
        layer.raw.data = W.mT.contiguous().mT if transposed else W.clone()
        optimizer = ManifoldMuon(layer.parameters(), lr=0.2, bfloat16=False)
        for G in gradients:
            layer.raw.grad = G.mT.contiguous().mT if gradient_transposed else G.clone()
            optimizer.step()
        assert norm(layer.raw.detach().double() - W.double()) > 0.1
        ends.append(layer.raw.detach())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("m", "n"), [(8, 8), (3, 8), (8, 3)])
@pytest.mark.parametrize("bfloat16", [True, False])
def test_muon_solves_the_procrustes_problem(m: int, n: int, bfloat16: bool):
    x = np.linalg.qr(randn(40, n).numpy())[0] * math.sqrt(40)
    target = torch.from_numpy(x @ orthogonal(m, n, seed=1).mT.numpy() + 0.3 * randn(40, m, seed=2).numpy())
    layer = lip.ManifoldLinear(n, m, bias=False, dtype=torch.float64)
    expected = torch.from_numpy(scipy.linalg.polar((target.mT @ torch.from_numpy(x)).numpy())[0])
    with torch.no_grad():  # in the component of the solution, far from it
        layer.raw.copy_(expected @ torch.from_numpy(scipy.linalg.expm(skew(n, 1.5).numpy())))
    assert norm(layer.raw - expected) > 0.5
    fit(layer, ManifoldMuon(layer.parameters(), lr=0.1, bfloat16=bfloat16), torch.from_numpy(x), target, 400)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=2e-2 if bfloat16 else 2e-3)


@pytest.mark.parametrize("lr", [0.05, 0.5])
def test_weights_stay_orthogonal_under_muon_and_the_bound_counts_what_is_left(lr: float):
    torch.manual_seed(0)
    layer, seen = lip.ManifoldLinear(12, 16), []
    optimizer = ManifoldMuon(layer.parameters(), lr=lr)

    def each() -> None:
        assert norm(layer.raw) <= layer.lipschitz_bound() * (1 + ROUNDING)
        assert norm(layer.raw) < 1 + 0.01 * lr  # even at the largest rate nothing but rounding grows
        seen.append(drift(layer.raw).item())

    fit(layer, optimizer, torch.randn(64, 12), torch.randn(64, 16), 300, each)
    assert max(seen) < 12 * lr**2
    assert seen[-1] < 1e-5  # the schedule has fallen to 0
    optimizer.retract()
    assert layer.lipschitz_bound() - 1 < 5e-7


@pytest.mark.parametrize(("m", "n"), [(16, 16), (8, 16), (16, 8)])
@pytest.mark.parametrize(("lr", "least"), [(0.1, 0.99), (0.5, 0.9)])
@pytest.mark.parametrize("bfloat16", [True, False])
def test_a_gradient_that_points_off_the_manifold_does_not_shrink_the_weight(m, n, lr, least, bfloat16):
    """A loss of ‖W‖ alone is constant on the manifold: what is left of it is rounding, which must not be followed."""
    layer = lip.ManifoldLinear(n, m, bias=False)
    optimizer = ManifoldMuon(layer.parameters(), lr=lr, bfloat16=bfloat16)
    for _ in range(60):
        layer.raw.grad = layer.raw.detach().clone()
        optimizer.step()
        values = torch.linalg.svdvals(layer.raw.detach())
        assert least < values.min() <= values.max() < 1.01


def test_a_schedule_that_raises_the_angle_too_far_is_refused():
    layer = lip.ManifoldLinear(3, 3)
    optimizer = ManifoldMuon(layer.parameters(), lr=0.5)
    optimizer.param_groups[0]["lr"] = 0.9
    layer(torch.ones(3)).sum().backward()
    with pytest.raises(ArgumentError, match=r"ManifoldMuon: lr=0\.9"):
        optimizer.step()
    with pytest.raises(ArgumentError, match=r"lr=0\.7"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 0.7})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_muon_with_half_precision_parameters_trains_and_resumes(dtype: torch.dtype):
    layer = lip.ManifoldLinear(6, 4, dtype=dtype)

    def train(layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for i in range(5):
            optimizer.zero_grad()
            layer(randn(2, 6, seed=i).to(dtype)).square().sum().backward()
            optimizer.step()

    optimizer = ManifoldMuon(layer.parameters(), lr=0.05)
    train(layer, optimizer)
    other = copy.deepcopy(layer)
    resumed = ManifoldMuon(other.parameters(), lr=0.05)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(layer, optimizer)
    train(other, resumed)
    assert torch.equal(layer.raw, other.raw)
    assert 1 - 1e-2 < norm(layer.raw) <= layer.lipschitz_bound() < 1.05


def test_under_muon_other_parameters_get_torchs_adamw_at_their_share_of_the_rate():
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    settings = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    steps(ours, ManifoldMuon(ours.parameters(), lr=0.1, plain_ratio=0.3, **settings), 0, 8)
    steps(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.1 * 0.3, **settings), 0, 8)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_lookahead_retracts_what_muon_moved():
    model = network()
    optimizer = Lookahead(model.parameters(), lambda params, lr: ManifoldMuon(params, lr=lr), lr=0.3, every=4)
    steps(model, optimizer, 0, 8)
    assert max(drift(model[i].raw).item() for i in (0, 2, 3)) < 1e-5


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 0.51), ("lr", -1.0), ("momentum", 1.0), ("momentum", "big"), ("plain_ratio", -1.0), ("bfloat16", 1)],
)
def test_settings_of_muon_out_of_range_are_refused_by_name(name: str, value: object):
    with pytest.raises(ArgumentError, match=f"ManifoldMuon: {name}=") as caught:
        ManifoldMuon([nn.Parameter(torch.zeros(2))], **{name: value})
    assert "\n" not in str(caught.value)


def test_the_commands_train_and_certify_with_it(tmp_path: Path):
    def compose(name: str, *overrides: str):
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return hydra.compose(name, list(overrides))

    small = ["model.width=16", "model.depth=2", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]
    chosen = ["model.linear=manifold", "optimizer=manifold_adamw", "optimizer.lr=5e-3", "optimizer.retract_every=7"]
    limits = ["trainer.max_epochs=2", "trainer.gradient_clip_val=0.5", f"output={tmp_path}"]
    metrics = cli.train(compose("train", *small, *chosen, *limits))
    assert metrics["val/accuracy"] > 0.3
    (result,) = cli.certify(compose("certify", f"ckpt={tmp_path}/checkpoints/best.ckpt")).values()
    assert result["clean_accuracy"] > 0.3


# LipNeXt --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 9, 16, 32, 48])
@pytest.mark.parametrize("ratio", [0, 1 / 16, 1 / 8, 0.25])
@pytest.mark.parametrize("image", [(1, 1), (4, 7), (5, 1)])
def test_spatial_shift_is_torchs_roll(channels: int, ratio: float, image: tuple[int, int]):
    shift = lip.SpatialShift2d(ratio)
    x = randn(2, channels, *image)
    y = shift(x)
    sizes = shift.group_sizes(channels)
    assert sum(sizes) == channels
    assert sizes[0] == max(1, min(round(ratio * channels), channels // 4))
    start = 0
    for size, (step, axis) in zip(sizes, [(-1, 2), (1, 2), (-1, 3), (1, 3), (0, 2)], strict=True):
        assert torch.equal(y[:, start : start + size], torch.roll(x[:, start : start + size], step, axis))
        start += size
    assert torch.equal(shift(x[0]), y[0])
    torch.testing.assert_close(y.flatten(1).sort(1).values, x.flatten(1).sort(1).values, rtol=0, atol=0)
    assert lip.lipschitz_bound(shift) == 1


def dense_block(block: nn.Module, x: Tensor) -> Tensor:
    """The formula of the block with explicit matrices on the flattened image."""
    M = block.mixing.detach()
    R = torch.eye(len(M), dtype=M.dtype) if block.rotation is None else block.rotation.detach()
    c, h, w = x.shape[1:]
    P = torch.zeros(c, h, w, c, h, w, dtype=x.dtype)  # the shift as a matrix
    group = max(1, min(round(block.shift.ratio * c), c // 4))
    for k in range(c):
        direction = k // group
        di, dj = [(1, 0), (-1, 0), (0, 1), (0, -1)][direction] if direction < 4 else (0, 0)
        for i in range(h):
            for j in range(w):
                P[k, i, j, k, (i + di) % h, (j + dj) % w] = 1
    y = torch.einsum("ab,nbhw->nahw", R, x if block.position is None else x + block.position.detach())
    y = torch.einsum("ahwbij,nbij->nahw", P, y)
    y = torch.einsum("ab,cb,nchw->nahw", M, R, y)
    y = y + (0 if block.bias is None else block.bias.detach()[:, None, None])
    folded = round(block.beta * c)
    return torch.cat([y[:, :folded].abs(), y[:, folded:]], 1)


@pytest.mark.parametrize("channels", [1, 3, 8, 20])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"image_size": (3, 5)},
        {"image_size": (3, 5), "beta": 1.0, "shift_ratio": 0.25},
        {"beta": 0.0, "bias": False},
        {"shift_ratio": 1 / 8, "beta": 0.3},
        {"image_size": (3, 5), "rotate": False},
    ],
)
def test_block_is_its_dense_formula(channels: int, arguments: dict):
    torch.manual_seed(0)
    block = lip.LipNeXtBlock(channels, dtype=torch.float64, **arguments)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x = randn(2, channels, 3, 5)
    torch.testing.assert_close(block(x), dense_block(block, x))
    torch.testing.assert_close(block(x[0]), block(x)[0])
    at = randn(channels, 3, 5, seed=1)
    assert operator_norm(block, (channels, 3, 5), at) <= block.lipschitz_bound() * (1 + 1e-12)
    block.retract_()
    assert block.lipschitz_bound() < 1 + 1e-13
    y, z = block(x)
    assert (y - z).norm() <= (x[0] - x[1]).norm() * (1 + 1e-12)
    if arguments.get("beta") == 0:
        assert (y - z).norm().item() == pytest.approx((x[0] - x[1]).norm().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_block_with_positions_runs_under_autocast_and_its_bound_counts_it(dtype: torch.dtype):
    block = lip.LipNeXtBlock(8, (4, 6))
    with torch.autocast("cpu", dtype):
        y = block(torch.randn(2, 8, 4, 6))
        bound = block.lipschitz_bound()
    assert y.isfinite().all()
    K, R = (W.to(dtype).double() for W in block.effective())
    assert block.lipschitz_bound() < norm(K) * norm(R) <= bound < 1.05


def test_lipnext_stack_trains_on_the_manifold():
    torch.manual_seed(0)
    model = nn.Sequential(lip.LipNeXtBlock(6, 4), lip.LipNeXtBlock(6, 4, shift_ratio=1 / 8), nn.Flatten())
    head = lip.AOLLinear(96, 3)
    optimizer = ManifoldAdamW([*model.parameters(), *head.parameters()], lr=0.02, retract_every=10)
    x, labels = torch.randn(48, 6, 4, 4), torch.arange(48) % 3
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(10 * head(model(x)), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert 1 <= lip.lipschitz_bound(model, (6, 4, 4)) < 1 + 1e-5
    assert model[0].position.abs().max() > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"channels": 0}, "channels"),
        ({"channels": 4, "image_size": 0}, "image_size"),
        ({"channels": 4, "image_size": (3, 4, 5)}, "image_size"),
        ({"channels": 4, "shift_ratio": 0.3}, "shift_ratio"),
        ({"channels": 4, "beta": 1.5}, "beta"),
        ({"channels": 4, "beta": "half"}, "beta"),
    ],
)
def test_block_refuses_bad_arguments_by_name(arguments: dict, named: str):
    with pytest.raises(ArgumentError, match=named) as caught:
        lip.LipNeXtBlock(**arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(ArgumentError, match="ratio"):
        lip.SpatialShift2d(0.5)


@pytest.mark.parametrize("shape", [(2, 5, 4, 6), (2, 4, 6, 4), (4, 6), (1, 2, 4, 4, 6), (1, 4, 1, 1)])
def test_block_refuses_other_shapes(shape: tuple[int, ...]):
    block = lip.LipNeXtBlock(4, (4, 6))
    with pytest.raises(ShapeError, match=r"expected \(N, 4, 4, 6\)"):
        block(torch.zeros(shape))
    if shape[-3:-2] != (4,):
        with pytest.raises(ShapeError, match=r"expected \(N, 4, H, W\)"):
            lip.LipNeXtBlock(4)(torch.zeros(shape))
    with pytest.raises(ShapeError, match="SpatialShift2d"):
        block.shift(torch.zeros(4, 6))
