"""Attacks that stay in their balls and find what is there; audits that catch wrong certificates and pass right ones."""

import copy
import io
import json
import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import liplayers as lp
from liplayers.audit.attack import (
    LOSSES,
    _checkpoints,
    apgd,
    attack,
    headroom,
    linear_distances,
    margin_loss,
    misclassified,
    nearest_classes,
    pgd,
)
from liplayers.audit.audit import Audit, RobustAccuracy, audit
from liplayers.audit.ball import distance, project
from liplayers.audit.boundary import HALVINGS, boundary_points, rounding_attack
from liplayers.audit.report import audit_figure, audit_table
from liplayers.audit.steepest import lipschitz_lower_bound, margin_ratio_lower_bound
from liplayers.bounds.rounding import RoundingAnalysis
from liplayers.certification import certified_radius
from liplayers.errors import ArgumentError, DataError, LipschitzError, ShapeError, UnknownNameError
from liplayers.testing.measure import jacobian, operator_norm

F64 = torch.float64
METHODS = {"pgd": pgd, "apgd": apgd}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, dtype=F64, generator=rng(seed))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=rng(seed))


def squared_distance(a: Tensor, b: Tensor) -> Fraction:
    """Exact, of one pair."""
    return sum(
        (Fraction(p) - Fraction(q)) ** 2 for p, q in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    )


def ready(model: nn.Module) -> nn.Module:
    return model.double().eval().requires_grad_(False)


def linear(classes: int = 4, features: int = 6, seed: int = 0) -> nn.Sequential:
    """A linear classifier of rows of very different length."""
    layer = nn.Linear(features, classes).double()
    layer.weight.data = randn(classes, features, seed=seed) * torch.logspace(-1, 1, classes, dtype=F64)[:, None]
    layer.bias.data = randn(classes, seed=seed + 1)
    return ready(nn.Sequential(nn.Flatten(), layer))


def exact_radius(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction of a linear classifier, and the distance to its nearest boundary, by numpy's formula."""
    W, b = model[1].weight.numpy(), model[1].bias.numpy()
    logits = x.flatten(1).numpy() @ W.T + b
    labels = logits.argmax(1)
    radii = [
        min((row[y] - row[j]) / math.dist(W[y], W[j]) for j in range(len(row)) if j != y)
        for row, y in zip(logits, labels, strict=True)
    ]
    return torch.tensor(labels), torch.tensor(radii, dtype=F64)


def orthogonal(layer: type[nn.Module] = lp.BROLinear, features: int = 16, width: int = 16, depth: int = 2) -> nn.Module:
    """Nearly tight: its certified radii are almost the distances to the boundary."""
    torch.manual_seed(0)
    sizes = [features, *[width] * depth]
    hidden = [m for a, b in pairwise(sizes) for m in (layer(a, b), lp.MaxMin())]
    return lp.freeze(nn.Sequential(*hidden, lp.NormalizedLinear(width, 10)).eval()).double().eval()


def certifier(model: nn.Module, error: float | None = 1e-9, features: int = 16):
    """The constants of a model, and what certifies inputs with them."""
    constants = lp.split_head(model, (features,)).margin_lipschitz(10)

    def certify(x: Tensor) -> Tensor:
        logits = model(x)
        return certified_radius(logits, constants, None if error is None else torch.full_like(logits, error))

    return constants, certify


@pytest.fixture(scope="module")
def relu_net() -> tuple[nn.Module, Tensor, Tensor]:
    """Trained, not Lipschitz by design, with the points of two rings; attacks of different strength differ on it."""
    torch.manual_seed(0)
    angle, far = 6.28 * rand(300), rand(300, seed=1) < 0.5
    x = torch.stack([angle.cos(), angle.sin()], 1) * (1.0 + far.double())[:, None] + 0.1 * randn(300, 2)
    y = far.long() * 2 + (angle > 3.14).long()
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return ready(model), x[:60], model(x[:60]).argmax(1)


# Balls ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-200, 1e-17, 1.0, 1e150, 1e300])
def test_distance_is_a_tight_upper_bound(scale):
    x = rand(20, 7) * scale
    other = randn(20, 7, seed=1) * scale
    for a, b, d in zip(x, other, distance(x, other).tolist(), strict=True):
        exact = squared_distance(a, b)
        assert Fraction(d) ** 2 >= exact
        slack = Fraction(d) * (1 - Fraction(40, 2**53)) - 2 * Fraction(5e-324)
        assert slack <= 0 or slack**2 <= exact
    assert distance(x, x).tolist() == [0.0] * 20


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e8])
@pytest.mark.parametrize("radius", [0.0, 5e-324, 1e-300, 1e-17, 1e-15, 0.3, 1e3])
def test_projected_points_lie_in_the_ball_exactly(offset, radius):
    x = offset + rand(30, 5)
    r = torch.full((30,), radius, dtype=F64)
    for step in (1e-16, 1e-3, 1.0, 1e6):
        inside = project(x, x + step * randn(30, 5, seed=3), r)
        assert all(squared_distance(a, b) <= Fraction(radius) ** 2 for a, b in zip(x, inside, strict=True))
        if radius > 1e-7 * max(offset, 1) and step > radius:
            assert (distance(x, inside) > 0.999 * r).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_points_that_are_not_finite_are_projected_to_the_centre(bad):
    x = rand(1, 3)
    assert torch.equal(project(x, torch.tensor([[bad, 0.0, 0.0]], dtype=F64), torch.ones(1, dtype=F64)), x)


@pytest.mark.parametrize("method", METHODS)
def test_attacked_points_lie_in_their_own_balls(method, relu_net):
    model, x, y = relu_net
    radius = torch.tensor([0.0, 1e-300, 1e-16, 1e-3, 0.1, 2.0], dtype=F64).repeat(10)
    found = METHODS[method](model, x, y, radius, generator=rng(), restarts=2, steps=10)
    for a, b, r in zip(x, found.points, radius.tolist(), strict=True):
        assert squared_distance(a, b) <= Fraction(r) ** 2
    assert torch.equal(found.points[radius == 0], x[radius == 0])
    assert not found.fallen[radius < 1e-15].any()
    assert found.fallen[radius == 2].all()
    assert torch.equal(found.fallen, misclassified(model(found.points), y))


def test_infinite_and_huge_balls_are_searched_far_out():
    model = linear()
    x = rand(8, 6)
    y, exact = exact_radius(model, x)
    for radius in (math.inf, 1e300):
        found = attack(model, x, y, torch.full((8,), radius, dtype=F64), steps=5)
        assert found.fallen.all()
        assert found.points.isfinite().all()
        assert (distance(x, found.points) >= exact * (1 - 1e-9)).all()


# Losses ---------------------------------------------------------------------------------------------------------------


def test_losses_by_their_definition():
    logits = randn(20, 6)
    labels, targets = torch.arange(20) % 6, (torch.arange(20) + 1) % 6
    for i, row in enumerate(logits.tolist()):
        y, t, top = int(labels[i]), int(targets[i]), sorted(row, reverse=True)
        others = max(v for j, v in enumerate(row) if j != y)
        log_sum = math.log(sum(map(math.exp, row)))
        expected = {
            "margin": (others - row[y], row[t] - row[y]),
            "dlr": (
                (others - row[y]) / (top[0] - top[2]),
                (row[t] - row[y]) / (top[0] - (top[2] + top[3]) / 2),
            ),
            "cross_entropy": (log_sum - row[y], row[t] - log_sum),
        }
        for name, loss in LOSSES.items():
            assert loss(logits, labels, None)[i].item() == pytest.approx(expected[name][0], rel=1e-12), name
            assert loss(logits, labels, targets)[i].item() == pytest.approx(expected[name][1], rel=1e-12), name


def test_dlr_with_too_few_classes_is_the_margin():
    labels = torch.tensor([0, 1])
    two, three = randn(2, 2), randn(2, 3)
    assert torch.equal(LOSSES["dlr"](two, labels, None), margin_loss(two, labels))
    assert torch.equal(LOSSES["dlr"](three, labels, labels + 1), margin_loss(three, labels, labels + 1))
    assert not torch.equal(LOSSES["dlr"](three, labels, None), margin_loss(three, labels))


@pytest.mark.parametrize("row", [[1.0, 1.0], [0.0, 1.0], [math.nan, 0.0], [math.inf, 0.0], [0.0, -math.inf]])
def test_ties_and_logits_that_are_not_finite_have_fallen(row):
    assert misclassified(torch.tensor([row], dtype=F64), torch.tensor([0])).item()


def test_checkpoints_of_the_paper():
    assert _checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99, 100]
    for steps in (1, 2, 5, 33):
        points = _checkpoints(steps)
        assert points[0] == 0
        assert points[-1] == steps


# Attacks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("methods", [("pgd", "apgd"), ("apgd",)])
def test_linear_classifiers_fall_just_beyond_their_distance_and_never_within(classes, methods):
    model = linear(classes, 12)
    x = randn(50, 3, 2, 2, seed=5)
    y, exact = exact_radius(model, x)
    assert attack(model, x, y, 1.001 * exact, methods=methods).fallen.all()
    assert not attack(model, x, y, 0.999 * exact, methods=methods, steps=20).fallen.any()


def test_a_batch_of_one_falls_like_the_others():
    model = linear()
    x = rand(1, 6)
    y, exact = exact_radius(model, x)
    assert attack(model, x, y, 1.001 * exact).fallen.tolist() == [True]
    assert attack(model, x, y, 0.999 * exact).fallen.tolist() == [False]


def test_apgd_is_as_strong_as_pgd(relu_net):
    model, x, y = relu_net
    counts = {}
    for radius in (0.15, 0.25, 0.4):
        r = torch.full((len(x),), radius, dtype=F64)
        for name in METHODS:
            counts[name] = int(attack(model, x, y, r, methods=(name,), steps=25).fallen.sum())
        assert counts["apgd"] >= counts["pgd"]
        assert 0 < counts["pgd"] < len(x)


def test_grid_search_finds_no_more_than_the_attacks(relu_net):
    model, x, y = relu_net
    radius = 0.25
    angle, share = torch.linspace(0, 6.2832, 181, dtype=F64), torch.linspace(0.04, 0.999, 25, dtype=F64)
    grid = torch.einsum("s,ak->sak", share, torch.stack([angle.cos(), angle.sin()], 1)).reshape(-1, 2) * radius
    logits = model((x[:, None] + grid).reshape(-1, 2))
    on_grid = misclassified(logits, y.repeat_interleave(len(grid))).view(len(x), -1).any(1)
    fallen = attack(model, x, y, torch.full((len(x),), radius, dtype=F64), restarts=2).fallen
    assert on_grid.any()
    assert not on_grid.all()
    assert (on_grid & ~fallen).sum() == 0


class Plateau(nn.Module):
    """No gradient within 0.5 of the origin."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.full_like(x[:, 0], 0.1), (x.abs().amax(1) - 0.5).relu()], 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_plateau_is_left_at_random(method):
    x, y = torch.zeros(10, 3, dtype=F64), torch.zeros(10, dtype=torch.long)
    found = METHODS[method](Plateau().eval(), x, y, torch.full((10,), 3.0, dtype=F64), generator=rng())
    assert found.fallen.all()


class Constant(nn.Module):
    """Logits that no input changes; nothing to take a gradient of."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


@pytest.mark.parametrize(("logits", "falls"), [((1.0, 0.0), False), ((1.0, 1.0), True), ((math.nan, 0.0), True)])
def test_constant_tied_and_nan_models(logits, falls):
    model = Constant(*logits).eval()
    x, y, radius = rand(3, 2), torch.zeros(3, dtype=torch.long), torch.tensor([0.0, 1.0, math.inf], dtype=F64)
    found = attack(model, x, y, radius, steps=3)
    assert found.fallen.tolist() == [falls] * 3
    assert not falls or torch.equal(found.points, x)
    assert headroom(model, x, y).tolist() == ([0.0] * 3 if falls else [math.inf] * 3)


def test_the_same_seed_gives_the_same_points_and_another_one_others(relu_net):
    model, x, y = relu_net
    radius = torch.full((len(x),), 0.2, dtype=F64)
    first, again, other = (
        attack(model, x, y, radius, steps=5, restarts=2, seed=seed, batch_size=25) for seed in (1, 1, 2)
    )
    assert torch.equal(first.points, again.points)
    assert torch.equal(first.fallen, again.fallen)
    assert not torch.equal(first.points, other.points)


def test_the_callers_random_state_and_tensors_are_left_alone(relu_net):
    model, x, y = relu_net
    before, state = x.clone(), torch.get_rng_state()
    attack(model, x, y, torch.full((len(x),), 0.2, dtype=F64), steps=3, restarts=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before)
    assert not x.requires_grad


SAMPLES = {"inputs": rand(4, 6), "labels": torch.arange(4), "radius": torch.ones(4, dtype=F64)}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"inputs": rand(0, 6), "labels": torch.arange(0), "radius": rand(0)}, DataError, "no samples"),
        ({"inputs": rand(4, 6).float()}, ArgumentError, "float32.*float64"),
        ({"inputs": rand(4)}, ArgumentError, r"\(N, \*shape\)"),
        ({"inputs": torch.full((4, 6), math.nan, dtype=F64)}, DataError, "row 0"),
        ({"labels": torch.arange(3)}, ShapeError, r"labels: \(3,\)"),
        ({"labels": torch.arange(4.0)}, ShapeError, "int64"),
        ({"labels": torch.tensor([0, 1, 2, 4])}, ArgumentError, "labels, row 3: 4; expected a class from 0 to 3"),
        ({"labels": torch.tensor([0, -1, 2, 3])}, ArgumentError, "labels, row 1: -1"),
        ({"radius": torch.ones(4)}, ShapeError, "float64"),
        ({"radius": torch.ones(4, 1, dtype=F64)}, ShapeError, r"radius: \(4, 1\)"),
        ({"radius": torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=F64)}, ArgumentError, "radius, row 1: -1.0"),
        ({"radius": torch.tensor([1.0, 1.0, math.nan, 1.0], dtype=F64)}, ArgumentError, "radius, row 2: nan"),
        ({"model": linear(4).train()}, ArgumentError, "training mode"),
        ({"model": linear(4).float()}, ArgumentError, r"1\.weight: of torch\.float32"),
        ({"model": nn.Identity().eval(), "inputs": rand(4, 3, 2, 2)}, ShapeError, r"\(1, 3, 2, 2\)"),
        ({"model": Constant(1.0).eval()}, ShapeError, "K ≥ 2"),
        ({"steps": 0}, ArgumentError, "steps=0"),
        ({"restarts": 0}, ArgumentError, "restarts=0"),
        ({"batch_size": 0}, ArgumentError, "batch_size=0"),
        ({"methods": ("fgsm",)}, ArgumentError, "fgsm"),
    ],
)
def test_what_cannot_be_attacked_is_named_in_one_line(changed, error, message):
    arguments = {"model": linear(4), **SAMPLES, **changed}
    with pytest.raises(error, match=message) as caught:
        attack(**arguments)
    assert isinstance(caught.value, LipschitzError)
    assert "\n" not in str(caught.value)


def test_unknown_losses_are_named():
    with pytest.raises(UnknownNameError, match="did you mean margin"):
        pgd(linear(4), **SAMPLES, generator=rng(), loss="margins")


# Gradients ------------------------------------------------------------------------------------------------------------


def test_headroom_of_a_linear_classifier_is_its_distance():
    model = linear(5)
    x = rand(40, 6)
    y, exact = exact_radius(model, x)
    assert torch.allclose(headroom(model, x, y, batch_size=7), exact, rtol=1e-12)
    assert headroom(model, x, (y + 1) % 5).tolist() == [0.0] * 40


def test_headroom_by_dense_jacobians(relu_net):
    model, x, y = relu_net
    for row, label, room in zip(x[:10], y[:10].tolist(), headroom(model, x, y)[:10].tolist(), strict=True):
        J, logits = jacobian(model, row), model(row[None])[0]
        others = [j for j in range(4) if j != label]
        distances = {j: ((logits[label] - logits[j]) / (J[label] - J[j]).norm()).item() for j in others}
        assert room == pytest.approx(min(distances.values()), rel=1e-12)
        order = nearest_classes(model, row[None], torch.tensor([label]), 9)[:, 0].tolist()
        assert order == sorted(others, key=distances.__getitem__)


# Lower bounds ---------------------------------------------------------------------------------------------------------


def test_lower_bound_of_a_linear_map_is_its_norm():
    model = ready(nn.Conv2d(2, 3, 3, padding=1))
    exact = operator_norm(model, (2, 5, 5))
    found = lipschitz_lower_bound(model, rand(6, 2, 5, 5), steps=200)
    assert exact * (1 - 1e-4) <= found.quotient <= exact * (1 + 1e-9)


def test_the_pair_attains_the_lower_bound(relu_net):
    model, x, _ = relu_net
    found = lipschitz_lower_bound(model, x, batch_size=17)
    pair = torch.stack([found.x, found.other])
    change = model(pair)
    quotient = math.sqrt(squared_distance(*change)) / math.sqrt(squared_distance(*pair))
    assert found.quotient == pytest.approx(quotient, rel=1e-9)
    assert found.quotient <= lp.lipschitz_bound(model)
    at_data = max(operator_norm(model, (2,), at=row) for row in x)
    assert found.quotient >= 0.999 * at_data


def test_lower_bounds_of_margins_approach_tight_constants_and_never_pass_them():
    model = orthogonal()
    constants, _ = certifier(model)
    x = rand(20, 16)
    y = model(x).argmax(1)
    ratio = margin_ratio_lower_bound(model, x, y, constants).quotient
    assert 0.999 < ratio <= 1
    assert margin_ratio_lower_bound(model, x, y, 0.9 * constants).quotient == pytest.approx(ratio / 0.9, rel=1e-6)


@pytest.mark.parametrize(("constant", "ratio"), [(0.0, math.inf), (math.nan, math.inf), (math.inf, 0.0)])
def test_constants_that_claim_nothing_or_too_much(constant, ratio):
    found = margin_ratio_lower_bound(linear(2), rand(3, 6), torch.zeros(3).long(), torch.full((2, 2), constant))
    assert found.quotient == ratio


# Rounding -------------------------------------------------------------------------------------------------------------


def test_boundary_points_keep_their_label_by_ever_less(relu_net):
    model, x, y = relu_net
    points, labels = boundary_points(model, x, y, batch_size=len(x))
    assert len(points) == len(x) * len(HALVINGS)
    margin = -margin_loss(model(points), labels)
    # what is kept when alone or in another batch, up to the rounding of two logits on both occasions
    largest = points.norm(dim=1).max().item()
    rounding = 4 * RoundingAnalysis(model, (2,)).at(2 * largest).error
    assert (margin >= -rounding).all()
    # after h halvings another class is as near as 2⁻ʰ of the ball that was searched
    steepest = math.sqrt(2) * lp.lipschitz_bound(model)
    reach = 3 * linear_distances(model, x, y).amin(1)
    for halving, margins in zip(HALVINGS, margin.view(len(HALVINGS), len(x)), strict=True):
        assert (margins <= steepest * reach * 2.0**-halving + rounding).all()
    assert (margin > 1e-8).float().mean() > 0.1
    assert attack(model, points, labels, 1e-3 * torch.ones_like(margin), steps=10).fallen.all()


def test_boundary_points_of_several_batches_are_those_of_all_samples(relu_net):
    model, x, y = relu_net
    points, labels = boundary_points(model, x, y, batch_size=25)
    assert torch.equal(labels, torch.cat([part.repeat(len(HALVINGS)) for part in y.split(25)]))
    starts = torch.cat([part.repeat(len(HALVINGS), 1) for part in x.split(25)])
    assert ((points - starts).norm(dim=1) <= 3 * linear_distances(model, starts, labels).amin(1) * (1 + 1e-9)).all()


def test_a_single_sample_gives_boundary_points_and_a_wrong_or_constant_one_none():
    model = linear()
    x = rand(1, 6)
    y, _ = exact_radius(model, x)
    assert len(boundary_points(model, x, y)[0]) == len(HALVINGS)
    for hopeless, label in ((model, (y + 1) % 4), (Constant(1.0, 0.0).eval(), torch.tensor([0]))):
        points, labels = boundary_points(hopeless, x, label)
        assert points.shape == (0, 6)
        assert labels.shape == (0,)


@pytest.mark.parametrize("layer", [lp.BROLinear, lp.CayleyLinear])
def test_rounding_refutes_naive_certificates_and_none_that_count_it(layer):
    model = orthogonal(layer, 196, 64, 5)
    x = rand(20, 196)
    points, labels = boundary_points(model, x, model(x).argmax(1))
    _, naive = certifier(model, None, 196)
    radius = naive(points)
    found = rounding_attack(model, points, labels, radius)
    assert found.fallen.float().mean() > 0.3
    fallen = found.fallen & (radius > 1e-15)  # balls of many floats
    assert fallen.sum() > 10
    alone = []
    for row in fallen.nonzero()[:, 0].tolist():
        assert squared_distance(points[row], found.points[row]) <= Fraction(radius[row].item()) ** 2
        alone.append(misclassified(model(found.points[row][None]), labels[row : row + 1]).item())
    assert any(alone)  # some only fall in their batch: another size rounds otherwise
    _, counted = certifier(model, 1e-9, 196)
    radius = counted(points)
    assert (radius > 0).float().mean() > 0.1
    assert not (rounding_attack(model, points, labels, radius).fallen & (radius > 0)).any()


# The audit ------------------------------------------------------------------------------------------------------------


def audited(
    model: nn.Module,
    factor: float = 1.0,
    error: float | None = 1e-9,
    shrink: float = 1.0,
    samples: int = 24,
    **changed,
) -> Audit:
    constants, certify = certifier(model, error)
    x = rand(samples, 16, seed=7)
    labels = model(x).argmax(1)
    labels[::6] = (labels[::6] + 1) % 10  # wrongly predicted
    options = {
        "margin_lipschitz": shrink * constants,
        "certify": lambda z: factor * certify(z),
        "eps": [0.02, 0.01],
        "steps": 10,
        "batch_size": 10,
    }
    return audit(model, x, labels, factor * certify(x), **(options | changed))


def test_right_certificates_hold():
    result = audited(orthogonal(), samples=12)
    assert result.holds
    assert result.fallen == ()
    assert (result.samples, result.certified, result.clean_accuracy) == (12, 12, 10 / 12)
    assert 0.999 < result.margin_ratio <= 1
    assert result.boundary == 12 * len(HALVINGS)
    assert 0 < result.boundary_certified < result.boundary
    assert 1 - 1e-6 < result.headroom[0.0] <= result.headroom[0.5] <= result.headroom[0.95]
    assert [row.eps for row in result.rows] == [0.02, 0.01]
    for row in result.rows:
        assert 0 < row.certified <= min(row.pgd, row.apgd) <= max(row.pgd, row.apgd) <= result.clean_accuracy


def test_the_same_seed_gives_the_same_audit():
    first, again, other = (
        audited(orthogonal(), factor=1.05, eps=[], steps=3, samples=8, seed=seed) for seed in (1, 1, 2)
    )
    assert first.summary() == again.summary()
    assert [r.adversarial.tolist() for r in first.fallen] == [r.adversarial.tolist() for r in again.fallen]
    assert first.margin_ratio != other.margin_ratio


def test_radii_that_are_too_large_are_refuted():
    model = orthogonal()
    result = audited(model, factor=1.05)
    assert not result.holds
    assert 0 < result.certified_fallen <= 24
    kinds = {r.kind for r in result.fallen}
    assert "radius" in kinds
    for r in result.fallen:
        assert squared_distance(r.input, r.adversarial) <= Fraction(r.distance) ** 2
        assert r.distance <= r.radius
        if r.kind == "radius":
            assert r.alone
            assert model(r.input[None]).argmax().item() == r.label
            assert model(r.adversarial[None]).argmax().item() != r.label


def test_radii_are_refuted_at_a_smaller_eps_too():
    result = audited(orthogonal(), factor=100.0, samples=8)
    refuted = [r for r in result.fallen if r.kind == "eps"]
    assert refuted
    assert all(r.distance <= 0.02 < r.radius for r in refuted)


def test_constants_that_are_too_small_are_refuted():
    result = audited(orthogonal(), shrink=0.9, samples=12)
    assert result.margin_ratio == pytest.approx(1 / 0.9, rel=1e-3)
    assert result.certified_fallen == 0
    assert not result.holds


def test_a_layer_that_exceeds_its_bound_is_refuted():
    model = orthogonal()
    constants, _ = certifier(model)
    wrong = copy.deepcopy(model)
    wrong[0].weight.mul_(1.1)
    certify = lambda z: certified_radius(wrong(z), constants, torch.full((len(z), 10), 1e-9, dtype=F64))  # noqa: E731
    result = audited(wrong, margin_lipschitz=constants, certify=certify)
    x = rand(24, 16, seed=7)
    attacked = audit(wrong, x, wrong(x).argmax(1), certify(x), margin_lipschitz=constants, certify=certify, eps=[])
    assert result.margin_ratio > 1.05
    assert attacked.certified_fallen > 0
    assert attacked.rows == ()


def test_certificates_that_do_not_count_rounding_are_refuted():
    result = audited(orthogonal(lp.CayleyLinear, 16, 64, 5), error=None, eps=[], steps=2)
    assert result.boundary_fallen > 10
    assert not result.holds
    assert {r.kind for r in result.fallen} == {"rounding"}
    numbers = [r.index for r in result.fallen]
    assert len(set(numbers)) == len(numbers)
    assert max(numbers) < result.boundary


class FallsInBatches(nn.Module):
    """Another class from the second row of a batch on."""

    def forward(self, x: Tensor) -> Tensor:
        second = (torch.arange(len(x)) > 0).to(x)
        return torch.stack([x[:, 0] * 0 + 0.5, second * (x[:, 0] > 0.5)], 1)


def test_a_fall_that_a_batch_of_one_does_not_repeat_is_told_apart():
    ones = torch.ones(3, dtype=F64)
    result = audit(
        FallsInBatches().eval(),
        torch.zeros(3, 1, dtype=F64),
        torch.zeros(3, dtype=torch.long),
        ones,
        margin_lipschitz=1 - torch.eye(2),
        certify=lambda z: torch.zeros(len(z), dtype=F64),
        eps=[],
    )
    assert result.fallen
    assert not any(r.alone for r in result.fallen)
    assert not result.holds


@pytest.mark.parametrize("logits", [(1.0, 0.0), (math.nan, 0.0)])
def test_nothing_certified_is_nothing_to_refute(logits):
    result = audit(
        Constant(*logits).eval(),
        rand(3, 2),
        torch.zeros(3, dtype=torch.long),
        torch.zeros(3, dtype=F64),
        margin_lipschitz=torch.ones(2, 2),
        certify=lambda z: torch.zeros(len(z), dtype=F64),
        eps=[0.1],
    )
    assert result.holds
    assert (result.certified, result.headroom, result.margin_ratio) == (0, {}, 0.0)
    assert result.rows == (RobustAccuracy(0.1, 0.0, *[0.0 if math.isnan(logits[0]) else 1.0] * 2),)


@pytest.mark.parametrize("logits", [(1.0, 1.0), (math.nan, 0.0)])
def test_radii_of_ties_and_of_logits_that_are_not_finite_are_refuted(logits):
    x, zero = rand(2, 2), torch.zeros(2, dtype=torch.long)
    none = lambda z: torch.zeros(len(z), dtype=F64)  # noqa: E731
    model = Constant(*logits).eval()
    radius = torch.tensor([0.5, 0.0], dtype=F64)
    result = audit(model, x, zero, radius, margin_lipschitz=torch.ones(2, 2), certify=none, eps=[])
    assert [(r.index, r.distance, r.alone) for r in result.fallen] == [(0, 0.0, True)]


@pytest.mark.parametrize("eps", [-0.1, math.nan, math.inf])
def test_bad_eps_are_named(eps):
    with pytest.raises(ArgumentError, match="eps="):
        audited(orthogonal(), eps=[0.1, eps])


def test_radii_and_constants_of_a_wrong_shape_are_named():
    with pytest.raises(ShapeError, match="certify: gave radii"):
        audited(orthogonal(), certify=lambda z: torch.ones(2, dtype=F64), eps=[])
    with pytest.raises(ShapeError, match="margin_lipschitz"):
        audited(orthogonal(), margin_lipschitz=torch.ones(3, 3))
    with pytest.raises(DataError, match="no samples"):
        audit(linear(), rand(0, 6), torch.arange(0), rand(0), margin_lipschitz=torch.ones(4, 4), certify=len, eps=[])


RESULT = Audit(
    samples=40,
    clean_accuracy=0.9,
    rows=(RobustAccuracy(0.5, 0.25, 0.5, 0.375), RobustAccuracy(0.1, 0.75, 0.875, 0.825)),
    certified=33,
    certified_fallen=0,
    margin_ratio=0.97,
    boundary=560,
    boundary_certified=123,
    boundary_fallen=0,
    naive_certified=500,
    naive_fallen=44,
    headroom={0.5: 1.25},
    fallen=(),
)


def test_the_table_shows_the_numbers_and_the_verdict():
    def printed(result: Audit) -> str:
        console = Console(file=io.StringIO(), width=120)
        console.print(audit_table(result, "some data"))
        return console.file.getvalue()

    for shown in ("some data", "37.50", "123 of 560", "0.970000", "1.2500", "nothing was refuted"):
        assert shown in printed(RESULT)
    refuted = printed(audited(orthogonal(), shrink=0.9, eps=[], samples=4))
    assert "REFUTED" in refuted
    assert "above 1" in refuted


def test_the_figure_has_the_rows_in_order():
    lines = {line.get_label(): line for line in audit_figure(RESULT, "t").axes[0].lines}
    assert {name: line.get_ydata().tolist() for name, line in lines.items()} == {
        "under PGD": [90, 87.5, 50],
        "under APGD": [90, 82.5, 37.5],
        "certified": [90, 75, 25],
    }
    assert lines["certified"].get_xdata().tolist() == [0, 0.1, 0.5]


def test_the_summary_is_plain_json():
    result = audited(orthogonal(), factor=1.05, steps=3, samples=8)
    summary = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert summary["holds"] is False
    assert summary["certified_fallen"] == result.certified_fallen
    assert summary["rows"][0] == {
        "eps": 0.02,
        "certified": result.rows[0].certified,
        "pgd": result.rows[0].pgd,
        "apgd": result.rows[0].apgd,
    }
    assert summary["fallen"][0].keys() == {"kind", "index", "label", "radius", "distance", "alone"}


def test_the_stages_are_counted():
    done: list[tuple[int, int]] = []
    audited(orthogonal(), eps=[], steps=2, samples=8, progress=lambda *counts: done.append(counts))
    assert done == [(stage, 4) for stage in range(5)]
