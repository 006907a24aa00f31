"""LipSDP: what it proves, against exact rational arithmetic and lower bounds found by ascent."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable

import pytest
import torch
from flint import fmpq, fmpq_mat
from torch import Tensor, nn

import liplayers as lp
from liplayers.bounds import lipsdp
from liplayers.bounds.lipsdp import LipSDP, lipsdp_bound
from liplayers.errors import ArgumentError, MissingPackageError, NonFiniteError, ShapeError, UnknownBoundError
from liplayers.models import mlp

pytestmark = pytest.mark.filterwarnings("ignore:Solution may be inaccurate")  # the proof does not ask for accuracy

Make = Callable[[], nn.Module]

ACTIVATIONS: dict[str, Make] = {
    "maxmin": lp.MaxMin,
    "groupsort": lp.GroupSort,
    "abs": lp.Abs,
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "steep": lambda: nn.LeakyReLU(1.7),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
}


def network(*sizes: int, activation: Make = lp.MaxMin, seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(sizes):
        layer = nn.Linear(n, m, dtype=torch.float64)
        layer.weight.data = torch.randn(m, n, generator=generator, dtype=torch.float64) / math.sqrt(n)
        layer.bias.data = torch.randn(m, generator=generator, dtype=torch.float64)
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1]).requires_grad_(False)


def lower_bound(model: nn.Module, features: int, rounds: int = 8, points: int = 256) -> float:
    """The largest norm of a Jacobian, by a random search that narrows around the best point."""
    generator = torch.Generator().manual_seed(1)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: model(x[None])[0]))
    centre, found = torch.zeros(features, dtype=torch.float64), 0.0
    for step in range(rounds):
        noise = torch.randn(points, features, generator=generator, dtype=torch.float64)
        x = centre + noise * 4 * 0.5**step
        norms = torch.linalg.matrix_norm(jacobian(x), 2)
        if norms.max() > found:
            found, centre = norms.max().item(), x[norms.argmax()]
    return found


def propose(monkeypatch: pytest.MonkeyPatch, propose_for: Callable[[Tensor], Tensor], claimed: float = 1e-9) -> None:
    """Put another solver in place: it returns multipliers computed from the right ones."""
    solve = lipsdp._solve

    def other(cvxpy, steps):
        return claimed, [propose_for(m) for m in solve(cvxpy, steps)[1]]

    monkeypatch.setattr(lipsdp, "_solve", other)


# Exact arithmetic -----------------------------------------------------------------------------------------------------


def exact(A: Tensor) -> fmpq_mat:
    rows, columns = A.shape
    return fmpq_mat(rows, columns, [fmpq(*x.as_integer_ratio()) for x in A.double().flatten().tolist()])


def diagonal(entries: list[fmpq]) -> fmpq_mat:
    n = len(entries)
    return fmpq_mat(n, n, [entries[i] if i == j else fmpq(0) for i in range(n) for j in range(n)])


def square(x: float) -> fmpq:
    return fmpq(*x.as_integer_ratio()) ** 2


def is_definite(A: fmpq_mat) -> bool:
    """Whether the exact LDLᵀ has positive pivots."""
    n = A.nrows()
    for k in range(n):
        if A[k, k] <= 0:
            return False
        for i in range(k + 1, n):
            factor = A[i, k] / A[k, k]
            for j in range(k + 1, n):
                A[i, j] -= factor * A[k, j]
    return True


def exact_form(weights: list[Tensor], roots: list[Tensor], maxmin: bool, rho: fmpq) -> fmpq_mat:
    """ρ|x|² + Σλ(p² − d²) − |y|² as a matrix in x and p: |p| ≤ |a − b| on pairs for MaxMin, (z ± p)/2 for ReLU."""
    inputs = weights[0].shape[1]
    n = inputs + sum(map(len, roots))
    form = diagonal([rho] * inputs + [square(r) for root in roots for r in root.tolist()])
    z = exact(torch.eye(inputs, n))
    column = inputs
    for W, root in zip(weights, roots, strict=False):
        v = exact(W) * z
        free = exact(torch.eye(n)[column : column + len(root)])
        column += len(root)
        half = len(root)
        select = [exact(torch.eye(len(W))[i * half : (i + 1) * half]) for i in range(2)] if maxmin else []
        d = (select[0] - select[1]) * v if maxmin else v
        form -= d.transpose() * diagonal([square(r) for r in root.tolist()]) * d
        if maxmin:
            total = (select[0] + select[1]) * v
            z = (select[0].transpose() * (total + free) + select[1].transpose() * (total - free)) / 2
        else:
            z = (v + free) / 2
    y = exact(weights[-1]) * z
    return form - y.transpose() * y


@pytest.mark.parametrize("maxmin", [True, False])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inequality_holds_in_exact_arithmetic(
    monkeypatch: pytest.MonkeyPatch, maxmin: bool, seed: int, dtype: torch.dtype
):
    model = network(3, 6, 4, 2, activation=lp.MaxMin if maxmin else nn.ReLU, seed=seed).to(dtype)
    used = []
    form = lipsdp._form

    def spy(steps, roots):
        used.append((steps, roots))
        return form(steps, roots)

    monkeypatch.setattr(lipsdp, "_form", spy)
    monkeypatch.setattr(lipsdp, "_STRETCHES", (1e-6,))
    found = lipsdp_bound(model, (3,))
    steps, roots = used[-1]
    assert found.bound < 0.95 * found.product
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    taken_out = [
        (W.abs().max().double() / step.weight.abs().max()).item() for W, step in zip(weights, steps[::2], strict=True)
    ]
    assert all(math.frexp(scale)[0] == 0.5 for scale in taken_out)
    balanced = [W.double() / scale for W, scale in zip(weights, taken_out, strict=True)]
    root = found.bound / math.prod(taken_out)
    assert is_definite(exact_form(balanced, roots, maxmin, square(root)))
    assert not is_definite(exact_form(balanced, roots, maxmin, square(root * (1 - 1e-8))))


@pytest.mark.parametrize("seed", range(8))
def test_a_square_is_proven_for_every_matrix_within_the_error(seed: int):
    generator = torch.Generator().manual_seed(seed)
    m, n, inputs = 5, 6, 2
    S = torch.randn(m, n, generator=generator, dtype=torch.float64)
    S = S / torch.linalg.matrix_norm(S[:, inputs:], 2) * (1 - 10.0**-seed if seed else 0.5)
    for error in (0.0, 1e-9):
        rho = lipsdp._proven_square(S, torch.tensor(error, dtype=torch.float64), inputs)
        assert math.isfinite(rho)
        _, _, Vh = torch.linalg.svd(torch.cat([S[:, :inputs] / math.sqrt(rho), S[:, inputs:]], 1))
        worst = (S @ Vh[0])[:, None] * Vh[0] / (S @ Vh[0]).norm()
        for T in (S, S + 0.999 * error * worst, S - 0.999 * error * worst):
            P = diagonal([fmpq(*rho.as_integer_ratio())] * inputs + [fmpq(1)] * (n - inputs))
            assert is_definite(P - exact(T).transpose() * exact(T))


def test_a_square_that_is_too_small_is_not_proven(monkeypatch: pytest.MonkeyPatch):
    S = torch.tensor([[3.0, 0.5], [1.0, 0.5]], dtype=torch.float64)
    none = torch.zeros((), dtype=torch.float64)
    rho = lipsdp._proven_square(S, none, 1)
    assert rho == pytest.approx(10 + 2**2 / (1 - 0.5), rel=1e-9)
    least = lipsdp._least_square
    for factor, proven in ((1 + 1e-12, True), (1 - 1e-12, False)):
        monkeypatch.setattr(lipsdp, "_least_square", lambda G, inputs, room, f=factor: f * least(G, inputs, 0.0))
        assert math.isfinite(lipsdp._proven_square(S, none, 1)) == proven


def test_errors_are_carried_through_a_product():
    generator = torch.Generator().manual_seed(0)
    W, H, E = (torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    V = torch.linalg.svd(W)[2]
    for error in (E, V[0][:, None] * V[0], torch.outer(V[0], H[1])):
        z = lipsdp._Signal(H, error.norm(), error.norm(dim=1))
        for radius in (torch.zeros_like(W), E.abs() / 10):
            true = (W + radius * W.sign()) @ (H + error)
            found = lipsdp._times(W, z, torch.linalg.matrix_norm(W.abs() + radius).item(), radius)
            assert (true - found.matrix).norm() <= found.error
            assert ((true - found.matrix).norm(dim=1) <= found.row_errors).all()


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_error_of_the_form_is_counted(scale: float):
    model = network(4, 6, 6, 3, seed=5)
    _, steps = lipsdp._read(model, (4,))
    roots = [scale * torch.tensor([0.1, 0.7, 1.3], dtype=torch.float64), torch.tensor([0.3, 0.9, 3.1]).double()]
    S, error, inputs = lipsdp._form(steps, roots)
    zero = exact_form([layer.weight for layer in model if isinstance(layer, nn.Linear)], roots, True, fmpq(0))
    units = diagonal([fmpq(1)] * inputs + [1 / fmpq(*r.as_integer_ratio()) for root in roots for r in root.tolist()])
    ones = diagonal([fmpq(0)] * inputs + [fmpq(1)] * 6)
    T = ones - units * zero * units  # SᵀS without rounding
    difference = T - exact(S).transpose() * exact(S)
    largest = max(abs(float(difference[i, j].p) / float(difference[i, j].q)) for i in range(10) for j in range(10))
    allowed = (2 * torch.linalg.matrix_norm(S) * error + error**2).item()
    assert 0 < largest <= allowed < 1e-11 * scale**2


# Against the truth ----------------------------------------------------------------------------------------------------


def check(found: LipSDP, model: nn.Module, features: int) -> None:
    truth = lower_bound(model, features)
    assert truth <= found.bound <= found.product
    assert found.product <= lp.lipschitz_bound(model, (features,)) * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_it_is_between_the_largest_jacobian_and_the_product_on_random_networks(seed: int):
    model = network(8, 16, 16, 4, seed=seed)
    found = lipsdp_bound(model, (8,))
    check(found, model, 8)
    assert found.bound < 0.75 * found.product
    assert found.bound == pytest.approx(found.solver_value, rel=1e-4)
    assert found.lmi_size == 8 + 8 + 8


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [(5, 8, 3), (9, 4, 5, 2), (2, 7, 7, 1), (1, 1, 1), (1, 2, 1), (3, 3)])
def test_it_bounds_each_activation_on_every_shape(name: str, sizes: tuple[int, ...]):
    model = network(*sizes, activation=ACTIVATIONS[name])
    check(lipsdp_bound(model, (sizes[0],)), model, sizes[0])


def test_a_layer_between_two_units_is_bounded_exactly():
    """x ↦ |2x| through ReLU of ±2x: 2, where the product of norms is 2√2·√2."""
    first, last = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)
    first.weight.data, last.weight.data = torch.tensor([[2.0], [-2.0]]), torch.ones(1, 2)
    found = lipsdp_bound(nn.Sequential(first, nn.ReLU(), last), (1,))
    assert found.product == pytest.approx(4)
    assert 2 <= found.bound < 2.0001


def test_dense_layers_without_an_activation_are_multiplied():
    model = nn.Sequential(network(4, 3), network(3, 4, seed=1))
    product = model[1][0].weight @ model[0][0].weight
    found = lipsdp_bound(model, (4,))
    assert found.bound == pytest.approx(torch.linalg.matrix_norm(product, 2).item(), rel=1e-9)
    assert math.isnan(found.solver_value)


@pytest.mark.parametrize("activation", [lp.MaxMin, lp.GroupSort, lp.Abs])
def test_orthogonal_networks_have_the_constant_one(activation: Make):
    model = network(8, 12, 12, 12, activation=activation)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
    assert 1 - 1e-12 <= lipsdp_bound(model, (8,)).bound <= 1 + 1e-9


def test_a_fold_at_a_right_angle_is_maxmin():
    maxmin = network(6, 8, 8, 3)
    folds = nn.Sequential(*(lp.Householder(8) if isinstance(layer, lp.MaxMin) else layer for layer in maxmin))
    found = lipsdp_bound(folds, (6,))
    assert found.bound == pytest.approx(lipsdp_bound(maxmin, (6,)).bound, rel=1e-4)
    assert lipsdp_bound(lp.freeze(folds), (6,)).bound == found.bound


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("channels", [6, 7])
def test_folds_at_any_angle_are_bounded(order: int, channels: int):
    def fold() -> nn.Module:
        activation = lp.Householder(channels, order)
        activation.theta.data.uniform_(-7, 7, generator=torch.Generator().manual_seed(order))
        return activation

    model = network(5, channels, channels, 3, activation=fold)
    found = lipsdp_bound(model, (5,))
    check(found, model, 5)
    assert found.bound < 0.95 * found.product
    assert found.lmi_size == 5 + 2 * order * 3


def test_a_wide_first_layer_costs_nothing():
    model = network(300, 8, 8, 3)
    found = lipsdp_bound(model, (300,))
    assert found.lmi_size == 8 + 4 + 4
    W = model[0].weight
    L = torch.linalg.cholesky(W @ W.mT)
    small = network(8, 8, 8, 3)
    small.load_state_dict(model.state_dict() | {"0.weight": L})
    assert found.bound == pytest.approx(lipsdp_bound(small, (8,)).bound, rel=1e-6)
    check(found, model, 300)


def test_a_wide_first_layer_without_full_rank_is_bounded():
    model = network(12, 6, 4, 2)
    model[0].weight.data[3:] = model[0].weight[:3]
    found = lipsdp_bound(model, (12,))
    check(found, model, 12)
    assert found.bound < 0.95 * found.product


@pytest.mark.parametrize("scale", [2.0**300, 2.0**-300, 1e-140])
def test_layers_of_extreme_scales_that_cancel_change_nothing(scale: float):
    model = network(4, 6, 6, 3)
    plain = lipsdp_bound(model, (4,)).bound
    model[0].weight.data.mul_(scale)
    model[4].weight.data.div_(scale)
    assert lipsdp_bound(model, (4,)).bound == pytest.approx(plain, rel=1e-4)


def test_a_product_that_is_no_float_on_the_way_is_bounded():
    model = network(4, 6, 6, 3)
    plain = lipsdp_bound(model, (4,))
    for index, scale in ((0, 1e-200), (2, 1e-200), (4, 1e300)):
        model[index].weight.data.mul_(scale)
    found = lipsdp_bound(model, (4,))
    assert found.product == pytest.approx(1e-100 * plain.product, rel=1e-9, abs=0)
    assert found.bound == pytest.approx(1e-100 * plain.bound, rel=1e-4, abs=0)


def test_units_of_extreme_scales_are_bounded():
    model = network(4, 6, 6, 3, activation=nn.ReLU)
    scale = 10.0 ** torch.tensor([-9.0, -5, 0, 3, 6, 9]).double()
    model[0].weight.data *= scale[:, None]
    model[2].weight.data /= scale
    check(lipsdp_bound(model, (4,)), model, 4)


def test_zero_weights_and_dead_units_are_bounded():
    model = network(4, 6, 6, 3)
    model[2].weight.data[:, :2] = 0
    model[2].weight.data[3] = 0
    model[2].weight.data[0] = 0
    check(lipsdp_bound(model, (4,)), model, 4)
    model[2].weight.data.zero_()
    assert 0 <= lipsdp_bound(model, (4,)).bound < 1e-300


def test_constants_are_factors_wherever_they_stand():
    body = list(network(6, 8, 3))
    plain = lipsdp_bound(nn.Sequential(*body), (6,)).bound
    front = [lp.Normalize([0.5, 0.5], [0.25, 0.5]), nn.Flatten(), nn.Identity(), lp.Scale(-3.0)]
    model = nn.Sequential(*front, nn.Sequential(*body[:2], lp.Scale(0.5)), body[2], nn.Flatten(), lp.Scale(2.0))
    assert lipsdp_bound(model, (2, 3)).bound == pytest.approx(4 * 3 * plain, rel=1e-9)


def test_our_own_layers_are_bounded_as_they_run():
    model = mlp((1, 2, 4), 5, linear="aol", width=8, depth=2).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)).double()
    found = lipsdp_bound(model, (1, 2, 4))
    assert found.bound == lipsdp_bound(lp.freeze(model), (1, 2, 4)).bound
    check(found, model[1:], 8)
    assert found.bound < 0.95 * found.product


def test_shared_modules_count_each_time_they_run():
    shared, activation = network(4, 4)[0], lp.MaxMin()
    model = nn.Sequential(shared, activation, shared, activation, shared)
    check(lipsdp_bound(model, (4,)), model, 4)


# Nothing of the solver is believed ------------------------------------------------------------------------------------

PROPOSALS: dict[str, Callable[[Tensor], Tensor]] = {
    "negative": lambda m: -m,
    "zero": torch.zeros_like,
    "some zero": lambda m: m * torch.arange(len(m)).remainder(2),
    "not a number": lambda m: m * math.nan,
    "one not a number": lambda m: torch.where(torch.arange(len(m)) == 0, math.nan, m),
    "infinite": lambda m: m * math.inf,
    "huge": lambda m: m * 1e300,
    "tiny": lambda m: m * 1e-300,
    "subnormal": lambda m: torch.full_like(m, 5e-324),
    "halved": lambda m: m / 2,
    "doubled": lambda m: m * 2,
    "reversed": lambda m: m.flip(0),
    "shaken": lambda m: m * torch.linspace(0.9, 1.1, len(m)),
    "far apart": lambda m: 10.0 ** torch.linspace(-150, 150, len(m), dtype=torch.float64),
}


@pytest.mark.parametrize("name", PROPOSALS)
@pytest.mark.parametrize("activation", [lp.MaxMin, nn.ReLU])
def test_wrong_multipliers_never_bring_the_bound_below_the_truth(
    monkeypatch: pytest.MonkeyPatch, name: str, activation: Make
):
    model = network(5, 8, 8, 3, activation=activation)
    best = lipsdp_bound(model, (5,)).bound
    propose(monkeypatch, PROPOSALS[name])
    found = lipsdp_bound(model, (5,))
    check(found, model, 5)
    assert best * (1 - 1e-4) <= found.bound


@pytest.mark.parametrize("name", ["negative", "not a number", "infinite", "zero"])
def test_multipliers_that_prove_nothing_leave_the_product(monkeypatch: pytest.MonkeyPatch, name: str):
    propose(monkeypatch, PROPOSALS[name])
    found = lipsdp_bound(network(5, 8, 8, 3), (5,))
    assert found.bound == found.product


def test_what_the_solver_claims_does_not_enter_the_bound(monkeypatch: pytest.MonkeyPatch):
    model = network(5, 8, 8, 3)
    best = lipsdp_bound(model, (5,))
    propose(monkeypatch, lambda m: m, claimed=1e-9)
    found = lipsdp_bound(model, (5,))
    assert found.bound == best.bound
    assert found.solver_value < 1e-6


def test_a_solver_that_fails_leaves_the_product(monkeypatch: pytest.MonkeyPatch):
    import cvxpy

    def fail(*_: object, **__: object) -> None:
        raise cvxpy.SolverError("out of patience")

    monkeypatch.setattr(cvxpy.Problem, "solve", fail)
    found = lipsdp_bound(network(5, 8, 3), (5,))
    assert found.bound == found.product
    assert math.isnan(found.solver_value)


def test_the_caller_s_model_and_random_state_stay_as_they_were():
    model = network(5, 8, 3).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    lipsdp_bound(model, (5,))
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (nn.LayerNorm(8), r"^1\.0 \(LayerNorm\): LipSDP knows dense layers"),
        (nn.Softplus(), r"^1\.0 \(Softplus\): LipSDP knows"),
        (lp.GroupSort(3), r"^1\.0 \(GroupSort\): it sorts groups of more than 2 channels; use MaxMin"),
        (lp.GroupSort(None), r"^1\.0 \(GroupSort\): it sorts groups"),
        (lp.MaxMin(dim=0), r"^1\.0 \(MaxMin\): dim=0; expected the channels in dimension 1"),
        (lp.Normalize([0.0] * 8, [1.0] * 8), r"^1\.0 \(Normalize\): .*Normalize in front"),
        (lp.ConvexResidual(nn.Linear(8, 8)), r"^1\.0 \(ConvexResidual\): LipSDP knows"),
        (nn.RReLU(), r"^1\.0 \(RReLU\): LipSDP knows"),
    ],
)
def test_an_unknown_module_is_named_by_path_and_type(part: nn.Module, message: str):
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(part), nn.Linear(8, 2))
    with pytest.raises(ArgumentError, match=message):
        lipsdp_bound(model, (4,))


def test_a_subclass_that_computes_otherwise_is_unknown():
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Backwards(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for model in (Twice(4, 4), Backwards(nn.Linear(4, 4))):
        with pytest.raises(ArgumentError, match=rf"the model \({type(model).__name__}\): LipSDP knows"):
            lipsdp_bound(model, (4,))


def test_convolutions_are_refused_before_their_shape_is():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ArgumentError, match=r"^0 \(Conv2d\)"):
        lipsdp_bound(model, (1, 4, 4))


def test_dense_layers_on_images_ask_for_a_flatten():
    with pytest.raises(
        ShapeError, match=r"^0 \(Linear\): got inputs of shape \(1, 4, 4\); expected vectors: put nn.Fl"
    ):
        lipsdp_bound(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (1, 4, 4))
    with pytest.raises(ShapeError, match="the model does not accept inputs"):
        lipsdp_bound(network(4, 4), (5,))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(value: float):
    model = network(4, 6, 3)
    model[2].weight.data[1, 1] = value
    with pytest.raises(NonFiniteError, match=r"^2\.weight"):
        lipsdp_bound(model, (4,))


def test_hooks_are_refused():
    model = network(4, 6, 3)
    model[1].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(UnknownBoundError, match=r"^1 \(MaxMin\)"):
        lipsdp_bound(model, (4,))


def test_a_model_without_a_dense_layer_is_refused():
    with pytest.raises(ArgumentError, match="no dense layer"):
        lipsdp_bound(nn.Sequential(nn.Flatten(), nn.ReLU()), (4,))


def test_a_large_inequality_is_refused_with_its_size():
    with pytest.raises(ArgumentError, match="has size 24, max_size=23"):
        lipsdp_bound(network(8, 16, 16, 4), (8,), max_size=23)


@pytest.mark.parametrize("package", ["cvxpy", "scs"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"{package} is not installed: pip install 'liplayers\[sdp\]'"):
        lipsdp_bound(network(4, 4), (4,))
