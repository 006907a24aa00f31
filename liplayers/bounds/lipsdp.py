"""A Lipschitz bound of a dense network from all of its layers at once: LipSDP, with the solver's answer proven.

Differences of two trajectories are linear in ξ = (x, p). Every activation is made of folds z ↦ z − cFᵀFz + kFᵀp, of
whose free variables only |p_i| ≤ |F_i z| is known. For MaxMin F_i takes the difference of a pair, p_i is what its
absolute value changes by, and c = k = ½. For slopes in [m, β] it is one entry, 1 − c the middle of the range and k half
its width. A Householder fold has F_i = vᵀ on its pair and c = k = 1.

With d_i(ξ) = F_i z and y(ξ) the output, the network is √ρ-Lipschitz if there are λ_i > 0 such that

    ρ|x|² + Σ_i λ_i p_i² − Σ_i λ_i d_i(ξ)² − |y(ξ)|² ≥ 0    for all ξ.

A solver proposes λ, and nothing that it says is believed: in p_i√λ_i as variables the form is diag(ρ, 1) − SᵀS with
the rows √λ_i d_i and y of S, and ρ is such that a Cholesky factorisation proves that it is positive semidefinite.
S is computed layer by layer with a bound of its error. Assumptions, u and γ_n are those of `liplayers.linalg.verified`.

Source: Fazlyab et al. 2019 (arXiv 1906.04893); for MaxMin, Pauli et al. 2024 (arXiv 2401.14033).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from liplayers.bounds.composition import (
    _children,
    _is_sequential,
    _join,
    check_finite,
)
from liplayers.bounds.inputs import record_shapes
from liplayers.bounds.torch_modules import Shape, torch_bound
from liplayers.core.intact import require_intact
from liplayers.core.precision import executed
from liplayers.errors import ArgumentError, Obstacle, ShapeError, UnknownBoundError
from liplayers.extras import extra
from liplayers.layers.bases.dense import LipschitzLinear
from liplayers.linalg.norms import frobenius_norm
from liplayers.linalg.verified import (
    _U,
    _UNDERFLOW,
    _gamma,
    _largest_eigenvalue_bound,
    _scaled,
    _up,
    norm_enclosure,
)
from liplayers.modules.activations import TIED, FrozenHouseholder, Householder, slope_range, tied_channels
from liplayers.modules.containers import Normalize, Scale

__all__ = ["LipSDP", "lipsdp_bound"]

_SLACK = 1 + 2.0**-20  # for the rounding of bounds of errors, which are sums of positive terms
_STRETCHES = tuple(10.0**-k for k in range(11, 1, -1))


@dataclass(frozen=True)
class LipSDP:
    """What `lipsdp_bound` found.

    Attributes:
        bound: proven, never above `product`.
        product: the bound composed from those of the layers, for their weights as they run.
        solver_value: what the solver claimed, without a proof; NaN where it failed or there was nothing to solve.
        lmi_size: rows of the matrix that had to be positive semidefinite.
        seconds: in all.
    """

    bound: float
    product: float
    solver_value: float
    lmi_size: int
    seconds: float


class _Linear(NamedTuple):
    """z ↦ Wz, with a proven bound of ‖W‖."""

    weight: Tensor
    norm: float


class _Fold(NamedTuple):
    """z ↦ z − c Fᵀ(Fz) + k Fᵀp, |p_i| ≤ |F_i z|, with a bound of its Lipschitz constant."""

    rows: Tensor
    c: float
    k: float
    norm: float


_Step = _Linear | _Fold


def lipsdp_bound(model: nn.Module, input_shape: Shape, *, max_size: int = 350) -> LipSDP:
    """A proven upper bound on the ℓ2 Lipschitz constant of a dense network, jointly over its layers.

    It is never above the product of the layers' bounds, and equal to it where nothing better could be proven: for
    orthogonal weights, or where the solver failed. The size of the inequality is the smaller of the input and the first
    layer, half of each width for MaxMin, GroupSort(2) and a Householder fold, the whole width for entrywise
    activations. With MaxMin, on one core, 64-64-64-10 (size 128) takes 2 s, 128-128-128-10 (size 256) 17 s, and
    784-128-128-128-10 (size 320) 1 min with 1.4 GB; the solver is SCS.

    Args:
        model: an nn.Sequential, nested or not, of nn.Linear or our dense layers; MaxMin, GroupSort(2), Householder and
            entrywise activations with a slope range; nn.Flatten, nn.Identity, Scale; Normalize in front.
        input_shape: of one input, without the batch dimension.
        max_size: of the matrix inequality, above which nothing is tried.

    Raises:
        ArgumentError: a module that is not among these, by path and type; an inequality larger than max_size.
        MissingPackageError: without the extra liplayers[sdp].
        UnknownBoundError: a part without a known bound, as in `lipschitz_bound`.
        ShapeError: the model does not accept inputs of that shape, or a dense layer gets anything but vectors.
        NonFiniteError: the parameters contain NaN or infinity.

    Source: Fazlyab et al. 2019 (arXiv 1906.04893); for MaxMin, Pauli et al. 2024 (arXiv 2401.14033).

    >>> from liplayers import MaxMin
    >>> _ = torch.manual_seed(0)
    >>> found = lipsdp_bound(nn.Sequential(nn.Linear(4, 8), MaxMin(), nn.Linear(8, 2)), (4,))
    >>> found.bound < 0.9 * found.product
    True
    """
    start = time.perf_counter()
    with extra("sdp"):
        cvxpy, _ = map(import_module, ("cvxpy", "scs"))
    with torch.no_grad():
        factor, steps = _read(model, input_shape)
        size = _lmi_size(steps)
        if size > max_size:
            raise ArgumentError(
                f"lipsdp_bound: the matrix inequality has size {size}, max_size={max_size}; memory and time grow with "
                f"its third to fourth power: raise max_size, or take fewer or narrower layers"
            )
        exponent, balanced = _balanced(steps)
        short, isometry, rest = _compressed(balanced)
        claimed, multipliers = _solve(cvxpy, short)
        constant = _above(_proven_constant(short, multipliers) * isometry + rest, 2)
    norms = _above(math.prod(step.norm for step in balanced), len(steps))
    product, bound = (_above(_scaled(value, exponent, math.inf) * factor, 1) for value in (norms, constant))
    claimed = _scaled(claimed, exponent, 0.0) * factor
    return LipSDP(min(product, bound), product, claimed, size, time.perf_counter() - start)


def _above(x: float, roundings: int) -> float:
    """An upper bound of a nonnegative expression that was computed as x with so many roundings."""
    return math.nextafter(_up(x, roundings), math.inf)


# The model as steps ---------------------------------------------------------------------------------------------------


def _read(model: nn.Module, input_shape: Shape) -> tuple[float, list[_Step]]:
    """The steps of a model, and the product of its scalar factors: the inequality is homogeneous in each signal."""
    leaves = list(_leaves(model, ""))
    shapes = record_shapes(model, tuple(input_shape))
    factor, width = 1.0, 0
    steps: list[_Step] = []
    for path, module in leaves:
        if type(module) in (nn.Flatten, nn.Identity):
            _check_rows(module, path, shapes)
            continue
        if type(module) is Scale or (type(module) is Normalize and not steps):
            factor = _above(factor * module.lipschitz_bound(), 2)
            continue
        if _is_known(module) and any(len(shape) != 1 for shape in shapes[module]):
            raise ShapeError(
                f"{path or 'the model'} ({type(module).__name__}): got inputs of shape {max(shapes[module], key=len)}; "
                f"expected vectors: put nn.Flatten() in front"
            )
        width = width or math.prod(max(shapes[module]))
        steps += _steps(module, path, width)
        width = len(module.weight) if _is_dense(module) else width  # type: ignore[arg-type]
    if not any(isinstance(step, _Linear) for step in steps):
        raise ArgumentError("lipsdp_bound: the model has no dense layer; use lipschitz_bound")
    return factor, steps


def _leaves(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules in nested nn.Sequential, in the order in which they run, with their paths."""
    try:
        require_intact(module, parts=not _is_sequential(module))
        check_finite(module, path)
    except UnknownBoundError as error:
        raise UnknownBoundError.of([Obstacle(path, type(module).__name__, str(error))]) from None
    if _is_sequential(module):
        for name, child in _children(module):
            yield from _leaves(child, _join(path, name))
    else:
        yield path, module


def _check_rows(module: nn.Module, path: str, shapes: dict[nn.Module, set]) -> None:
    try:
        for shape in shapes.get(module, ()):
            torch_bound(module, shape)
    except UnknownBoundError as error:
        raise UnknownBoundError.of([Obstacle(path, type(module).__name__, str(error))]) from None


def _is_dense(module: nn.Module) -> bool:
    ours = isinstance(module, LipschitzLinear) and type(module).forward is LipschitzLinear.forward
    return ours or type(module) is nn.Linear


def _is_known(module: nn.Module) -> bool:
    return _is_dense(module) or type(module) in TIED or slope_range(module) is not None


def _steps(module: nn.Module, path: str, width: int) -> list[_Step]:
    """A dense layer or an activation of `width` channels as steps."""
    if _is_dense(module):
        W = executed(module.weight).cpu()  # type: ignore[arg-type]
        return [_Linear(W, norm_enclosure(W).upper)]
    reason = "LipSDP knows dense layers, MaxMin, GroupSort(2), Householder, slope ranges, and Normalize in front"
    if type(module) in TIED:
        if module.dim not in (1, -1):
            reason = f"dim={module.dim}; expected the channels in dimension 1"
        elif isinstance(module, (Householder, FrozenHouseholder)):
            return _mirror_folds(module, width)
        else:
            pairs = _pairs(module, width)
            if pairs is not None:
                return pairs
            reason = "it sorts groups of more than 2 channels; use MaxMin() or GroupSort(2)"
    slopes = slope_range(module)
    if slopes is None:
        raise ArgumentError(f"{path or 'the model'} ({type(module).__name__}): {reason}")
    c = 1 - (slopes[0] + slopes[1]) / 2
    middle = 1 - Fraction(c)
    k = _above(float(max(Fraction(slopes[1]) - middle, middle - Fraction(slopes[0]))), 1)
    return [_fold(torch.eye(width, dtype=torch.float64), c, k)]


def _pairs(activation: nn.Module, width: int) -> list[_Step] | None:
    """MaxMin and GroupSort as a fold; None where groups have more than two channels."""
    groups: dict[int, list[int]] = {}
    for channel, group in enumerate(tied_channels(activation, width) or ()):
        groups.setdefault(group, []).append(channel)
    if any(len(channels) > 2 for channels in groups.values()):
        return None
    eye = torch.eye(width, dtype=torch.float64)
    rows = [eye[channels[0]] - eye[channels[1]] for channels in groups.values() if len(channels) == 2]
    return [_fold(torch.stack(rows), 0.5, 0.5)] if rows else []


def _mirror_folds(activation: Householder | FrozenHouseholder, width: int) -> list[_Step]:
    mirrors = activation.effective() if isinstance(activation, Householder) else activation.mirrors
    half = mirrors.shape[-1]
    eye = torch.eye(width, dtype=torch.float64)
    a, b = mirrors.detach().cpu().double()[..., None].unbind(1)  # (order, half, 1) each
    return [_fold(rows, 1.0, 1.0) for rows in a * eye[:half] + b * eye[half : 2 * half]] if half else []


def _fold(rows: Tensor, c: float, k: float) -> _Fold:
    """Its norm is that of the slopes 1 − (c ± k)|row|² on its rows; on pairs c = k, so that 1 is among them."""
    square = rows.square().sum(1)
    slopes = torch.stack([1 - (c - k) * square, 1 - (c + k) * square])
    rounding = 8 * _U * (1 + (abs(c) + k) * square.amax().item())
    return _Fold(rows, c, k, _above(slopes.abs().amax().item() + rounding, 1))


def _lmi_size(steps: Sequence[_Step]) -> int:
    first = steps[0]
    inputs = min(first.weight.shape) if isinstance(first, _Linear) else first.rows.shape[1]
    return inputs + sum(len(step.rows) for step in steps if isinstance(step, _Fold))


def _balanced(steps: Sequence[_Step]) -> tuple[int, list[_Step]]:
    """The steps with norms of all weights in [½, 1), and the power of two that was taken out."""
    total = 0
    balanced = []
    for step in steps:
        if isinstance(step, _Linear):
            exponent = math.frexp(step.norm)[1]
            W = step.weight * 2.0 ** (-exponent // 2) * 2.0 ** (-exponent - -exponent // 2)  # one may not be a float
            step = _Linear(W, math.ldexp(step.norm, -exponent))
            total += exponent
        balanced.append(step)
    return total, balanced


def _compressed(steps: Sequence[_Step]) -> tuple[Sequence[_Step], float, float]:
    """With W_1 = LX + Δ for a wide first weight: the steps with L in its place, ‖X‖, and what Δ adds to the bound.

    The inequality holds for any biases, so that f(W_1x) is √ρ‖X‖-Lipschitz in LXx, with Δx as a bias.
    """
    first = steps[0]
    if not isinstance(first, _Linear) or first.weight.shape[0] >= first.weight.shape[1]:
        return steps, 1.0, 0.0
    W = first.weight
    Q, R = torch.linalg.qr(W.mT)
    L, X = R.mT.contiguous(), Q.mT
    rounding = _gamma(len(L) + 2) * frobenius_norm(L) * frobenius_norm(X)
    distance = ((frobenius_norm(W - L @ X) + rounding) * _SLACK).item() + _UNDERFLOW
    rest = _above(distance * math.prod(step.norm for step in steps[1:]), len(steps))
    return [_Linear(L, norm_enclosure(L).upper), *steps[1:]], norm_enclosure(X).upper, rest


# The form -------------------------------------------------------------------------------------------------------------


class _Signal(NamedTuple):
    """A signal as a matrix that multiplies ξ, and bounds of the Frobenius norms of its error and of each row's."""

    matrix: Tensor
    error: Tensor
    row_errors: Tensor


def _signal(matrix: Tensor, error: Tensor, row_errors: Tensor) -> _Signal:
    row_errors = row_errors * _SLACK + _UNDERFLOW
    return _Signal(matrix, torch.minimum(error * _SLACK + _UNDERFLOW, row_errors.norm() * _SLACK), row_errors)


def _times(W: Tensor, z: _Signal, norm: float = math.inf, radius: Tensor | float = 0.0) -> _Signal:
    """A matrix within `radius` of W, entry by entry, and of norm ≤ `norm`, times a signal."""
    absolute = W.abs()
    rounding = _gamma(W.shape[1] + 2) * absolute + radius
    sizes = z.matrix.norm(dim=1)
    carried = torch.minimum(absolute @ z.row_errors, W.norm(dim=1) * z.error)
    row_errors = carried + rounding @ (sizes + z.row_errors)
    error = norm * z.error + frobenius_norm(rounding) * (frobenius_norm(z.matrix) + z.error)
    return _signal(W @ z.matrix, error, row_errors)


def _folded(fold: _Fold, z: _Signal, root: Tensor, column: int) -> tuple[_Signal, _Signal]:
    """√λ d, and what follows, for √λ = `root`; p√λ are the entries of ξ from `column` on."""
    d = _times(fold.rows, z)
    sizes = d.matrix.norm(dim=1)
    d = _signal(root[:, None] * d.matrix, torch.tensor(math.inf), root * (d.row_errors + 2 * _U * sizes))
    eye = torch.eye(fold.rows.shape[1], dtype=root.dtype)
    kept = eye - fold.c * (fold.rows.mT @ fold.rows)
    radius = 8 * _U * (eye + abs(fold.c) * (fold.rows.abs().mT @ fold.rows.abs()))
    norm = (kept.abs() + radius).sum(1).amax().item() * _SLACK  # it is symmetric
    z = _times(kept, z, norm, radius)
    free = fold.k * fold.rows.mT / root
    z.matrix[:, column : column + len(root)] = free
    return d, _signal(z.matrix, z.error + 4 * _U * free.norm(), z.row_errors + 4 * _U * free.norm(dim=1))


def _form(steps: Sequence[_Step], roots: Sequence[Tensor]) -> tuple[Tensor, Tensor, int]:
    """S, a bound of the Frobenius norm of its error, and the number of inputs, for √λ of each fold."""
    first = steps[0]
    inputs = (first.weight if isinstance(first, _Linear) else first.rows).shape[1]
    start = torch.eye(inputs, inputs + sum(map(len, roots)), dtype=torch.float64)
    z = _Signal(start, torch.zeros((), dtype=torch.float64), torch.zeros(inputs, dtype=torch.float64))
    column, left = inputs, iter(roots)
    rows = []
    for step in steps:
        if isinstance(step, _Linear):
            z = _times(step.weight, z, step.norm)
        else:
            root = next(left)
            d, z = _folded(step, z, root, column)
            rows.append(d)
            column += len(root)
    rows.append(z)
    error = torch.stack([signal.error for signal in rows]).norm() * _SLACK
    return torch.cat([signal.matrix for signal in rows]), error, inputs


def _solve(cvxpy: Any, steps: Sequence[_Step]) -> tuple[float, list[Tensor]]:
    """√ρ and λ of each fold, as the solver gives them; NaN where it fails.

    It computes in the units that prove the product of the norms, with ρ and all λ equal to 1.
    """
    gain = 1.0
    units: list[Tensor] = []
    for step in reversed(steps):
        if isinstance(step, _Fold):
            units.insert(0, torch.full((len(step.rows),), gain, dtype=torch.float64))
        gain *= step.norm
    total = sum(map(len, units))
    if not total or gain == 0:
        return math.nan, [math.nan * unit for unit in units]
    S, _, inputs = _form(steps, units)
    S[:, :inputs] /= gain
    D, Y = S[:total].numpy(), S[total:].numpy()
    rho, multipliers = cvxpy.Variable(nonneg=True), cvxpy.Variable(total, nonneg=True)
    diagonal = cvxpy.hstack([rho * torch.ones(inputs).numpy(), multipliers])
    form = cvxpy.diag(diagonal) - D.T @ cvxpy.diag(multipliers) @ D - Y.T @ Y
    problem = cvxpy.Problem(cvxpy.Minimize(rho), [form >> 0])
    with suppress(cvxpy.SolverError):
        problem.solve(solver="SCS", eps=1e-7, max_iters=5000)
    if multipliers.value is None:
        return math.nan, [math.nan * unit for unit in units]
    parts = torch.from_numpy(multipliers.value).split([len(unit) for unit in units])
    return math.sqrt(max(rho.value, 0.0)) * gain, [part * unit**2 for part, unit in zip(parts, units, strict=True)]


# The proof ------------------------------------------------------------------------------------------------------------


def _proven_constant(steps: Sequence[_Step], multipliers: Sequence[Tensor]) -> float:
    """The least √ρ that multipliers near the given ones prove; infinity where none do.

    The form less its last terms is nonnegative, too: those of the layers that are cut off vanish for |p_i| = |d_i|. So
    larger weights for λ of earlier layers, and the largest for ρ, add nonnegative forms: together they are definite,
    which is room for the errors of the solver and of rounding.
    """
    largest = max((m.amax().item() for m in multipliers), default=1.0)
    if not all(m.isfinite().all() for m in multipliers) or largest <= 0:
        return math.inf
    found = math.inf
    for stretch in _STRETCHES:
        weights = [(1 + stretch) ** power for power in range(len(multipliers), 0, -1)]
        roots = [m.clamp_min(1e-8 * largest).sqrt() * r for m, r in zip(multipliers, weights, strict=True)]
        found = min(found, _proven_square(*_form(steps, roots)))
    return math.nextafter(math.sqrt(found), math.inf)


def _proven_square(S: Tensor, error: Tensor, inputs: int) -> float:
    """A ρ for which diag(ρ, 1) − TᵀT is positive semidefinite for every T within `error` of S; infinity if none is."""
    m, n = S.shape
    rough = _least_square(S.mT @ S, inputs, 0.0)
    if not math.isfinite(rough):
        return math.inf
    unit = 2.0 ** (math.frexp(rough)[1] // 2)  # of the inputs, so that ρ is about 1
    S = torch.cat([S[:, :inputs] / unit, S[:, inputs:]], 1)
    error = error * max(1.0, 1 / unit)
    size = frobenius_norm(S)
    off = (((_gamma(m + 2) * size + 2 * error) * size + error.square()) * _SLACK).item() + _UNDERFLOW
    G = S.mT @ S
    G = G.tril() + G.tril(-1).mT
    rho = _least_square(G, inputs, 8 * (off + n * n * _U))
    if not math.isfinite(rho):
        return math.inf
    diagonal = G.diagonal()
    diagonal[:inputs] -= rho
    diagonal[inputs:] -= 1
    off = (off + 2 * _U * diagonal.abs().amax().item()) * _SLACK
    top = _largest_eigenvalue_bound(G[None], torch.linalg.eigvalsh(G)[-1].item())
    return rho * unit**2 + _UNDERFLOW if top + off <= 0 else math.inf


def _least_square(G: Tensor, inputs: int, room: float) -> float:
    """ρ, up to rounding, for which diag(ρ, 1) − G has the least eigenvalue `room`; infinity where there is none."""
    pivot = (1 - room) * torch.eye(len(G) - inputs, dtype=G.dtype) - G[inputs:, inputs:]
    L, failed = torch.linalg.cholesky_ex(pivot)
    X = torch.linalg.solve_triangular(L, G[inputs:, :inputs], upper=False)
    complement = G[:inputs, :inputs] + X.mT @ X
    if failed or not complement.isfinite().all():
        return math.inf
    return torch.linalg.eigvalsh(complement)[-1].item() + room
