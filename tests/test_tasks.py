"""Certificates of every task against other formulations, brute force and attacks; the evaluator on data of any form."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import liplayers as lp
from liplayers.audit.tasks import audit_task
from liplayers.certification import (
    Binary,
    CertifiedNetwork,
    Conformal,
    MultiLabel,
    Regression,
    Segmentation,
    Targeted,
    Task,
    TopK,
    certified_radius,
    flip_radii,
    in_norm,
    label_radius,
    slack_radius,
    target_radii,
)
from liplayers.errors import ArgumentError, DataError, LipschitzError, ShapeError, UnknownNameError

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def body(outputs: int, *head: nn.Module, inputs: int = 6) -> nn.Sequential:
    torch.manual_seed(outputs)
    return nn.Sequential(lp.BROLinear(inputs, 8), lp.MaxMin(), lp.BROLinear(8, 8), lp.MaxMin(), *head).eval()


def dense(outputs: int) -> nn.Sequential:
    return body(outputs, nn.Linear(8, outputs))


def pixels() -> nn.Sequential:
    torch.manual_seed(0)
    convs = lp.AOLConv2d(1, 8, 3, padding=1), lp.MaxMin(), nn.Conv2d(8, 3, 1)
    return nn.Sequential(*convs).eval()


def case(name: str) -> tuple[CertifiedNetwork, Task, Tensor, Tensor]:
    """A network, its task, inputs and labels, most of them right."""
    x = 2 * torch.randn(12, 6, generator=seeded(), dtype=F64)
    if name == "segmentation":
        network, images = CertifiedNetwork(pixels(), (1, 5, 4)), torch.rand(6, 1, 5, 4, generator=seeded(), dtype=F64)
        label = network(images).argmax(1)
        label[0, 0, 0] = 9
        label[:, 2, 1] = 0
        return network, Segmentation(ignore=9), images, label
    network = CertifiedNetwork(dense({"binary": 1, "regression": 2}.get(name, 4)), (6,))
    values = network(x)
    if name == "binary":
        return network, Binary(), x, (values[:, 0] > 0).long()
    if name == "multilabel":
        return network, MultiLabel(), x, (values > 0).long()
    if name == "regression":
        return network, Regression(0.5), x, values + 0.3 * torch.randn(values.shape, generator=seeded(), dtype=F64)
    label = values.argmax(1)
    if name == "conformal":
        return network, Conformal.calibrated(network, [(x, (label + torch.arange(12) % 2) % 4)], 0.2), x, label
    return network, {"targeted": Targeted(), "topk": TopK(2)}[name], x, label


NAMES = ["binary", "multilabel", "regression", "targeted", "topk", "conformal", "segmentation"]


@pytest.mark.parametrize("name", NAMES)
def test_no_radius_falls_to_an_attack_and_radii_of_twice_the_size_do(name: str):
    network, task, x, label = case(name)
    found = task.certificates(network.outputs(x), task.labels(label, len(x), network.output_shape, 0))
    assert (found.radius > 0).double().mean() > 0.3
    done = audit_task(network, task, x, found, steps=30)
    assert done.holds, done.summary()
    assert done.certified > 5
    larger = 30 if name == "segmentation" else 2  # of many outputs the bound of the whole is far from tight
    wrong = replace(found, radius=larger * found.radius)
    refuted = audit_task(network, task, x, wrong, steps=30)
    assert refuted.fallen > 0
    assert not refuted.holds
    assert len(refuted.index) == len(refuted.adversarial) == min(refuted.fallen, 100)


# Radii at linear models are distances ---------------------------------------------------------------------------------


def linear(outputs: int, inputs: int = 5) -> nn.Linear:
    torch.manual_seed(outputs + inputs)
    return nn.Linear(inputs, outputs, dtype=F64).eval()


def test_the_radius_of_a_sign_is_the_distance_to_where_it_changes():
    model, x = linear(3), torch.randn(30, 5, generator=seeded(), dtype=F64)
    network = CertifiedNetwork(model, (5,))
    radius = MultiLabel().certificates(network.outputs(x), torch.zeros(30, 3).long()).radius
    exact = (model(x).abs() / model.weight.norm(dim=1)).detach()
    assert ((1 - 1e-10) * exact <= radius).all()
    assert (radius < exact).all()
    for k in range(3):
        w = model.weight[k].detach()
        step = torch.outer(-model(x)[:, k].detach().sign() * radius[:, k], w / w.norm())
        inside, outside = (model(x + scale * step)[:, k].sign() for scale in (0.999, 1.001))
        assert torch.equal(inside, model(x)[:, k].sign())
        assert torch.equal(outside, -inside)


def test_one_feature_and_one_logit():
    model = nn.Linear(1, 1, dtype=F64).eval()
    model.load_state_dict({"weight": torch.tensor([[-2.0]]), "bias": torch.tensor([1.0])})
    found = lp.certify(model, (torch.tensor([[0.0], [0.5], [3.0]]), torch.tensor([True, False, False])), task="binary")
    assert found.radius.tolist() == pytest.approx([0.5, 0.0, 2.5], rel=1e-12)
    assert found.radius[1] == 0  # a tie
    assert found.certificates.correct.all()


@pytest.mark.parametrize("outputs", [1, 3])
def test_intervals_of_a_linear_regression_are_attained_and_never_left(outputs: int):
    model, x, eps = linear(outputs), torch.randn(20, 5, generator=seeded(), dtype=F64), 0.3
    y = torch.randn(20, *([outputs] if outputs > 1 else []), generator=seeded(1), dtype=F64)
    found = lp.certify(model, (x, y), task=Regression(1.5))
    low, high = (bound.reshape(20, outputs) for bound in found.interval(eps))
    error = found.error(eps).reshape(20, outputs)
    target = y.reshape(20, outputs)
    for k in range(outputs):
        step = eps * (model.weight[k] / model.weight[k].norm()).detach()
        up, down = model(x + step)[:, k].detach(), model(x - step)[:, k].detach()
        assert (low[:, k] <= down).all()
        assert (up <= high[:, k]).all()
        assert torch.allclose(high[:, k], up, atol=1e-9)
        assert torch.allclose(low[:, k], down, atol=1e-9)
        assert torch.allclose(error[:, k], torch.maximum((up - target[:, k]).abs(), (down - target[:, k]).abs()))
    radius, correct = found.radius, found.certificates.correct
    assert torch.equal(correct, (found.certificates.prediction - y).abs() <= 1.5)
    at = found.error(0.0).reshape(radius.shape)
    lipschitz = model.weight.norm(dim=1).detach().reshape(radius.shape[1:])
    assert torch.allclose(radius, ((1.5 - at) / lipschitz).clamp_min(0), atol=1e-9)


def test_the_norms_are_those_of_the_largest_balls_within():
    sign = nn.Linear(16, 1, bias=False, dtype=F64).eval()
    sign.load_state_dict({"weight": 1 - 2 * (torch.arange(16.0)[None] % 2)})
    x = torch.randn(9, 16, generator=seeded(), dtype=F64)
    found = lp.certify(sign, (x, torch.ones(9).long()), task="binary", eps=[0.1])
    f = sign(x).abs()[:, 0].detach()
    assert torch.allclose(found.radii("linf"), f / 16, rtol=1e-9)  # |f|/‖w‖₁: attained
    assert (found.radii("linf") < f / 16).all()
    axis = nn.Linear(16, 1, bias=False, dtype=F64).eval()
    axis.load_state_dict({"weight": torch.eye(16)[:1]})
    found = lp.certify(axis, (x, torch.ones(9).long()), task="binary")
    assert torch.allclose(found.radii("l1"), x[:, 0].abs(), rtol=1e-9)  # |f|/‖w‖_∞: attained
    assert found.accuracy(0.1, "linf") <= found.accuracy(0.1) == found.accuracy(0.1, "l1")
    with pytest.raises(UnknownNameError, match="l3"):
        found.radii("l3")
    assert in_norm(torch.tensor([3.0]), "linf", 1).item() == 3


# Pairs of classes -----------------------------------------------------------------------------------------------------


def pairs(count: int = 40, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(count, classes, generator=seeded(), dtype=F64)
    rows = torch.randn(classes, 7, generator=seeded(1), dtype=F64)
    return logits, torch.cdist(rows, rows), torch.full_like(logits, 1e-3)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_label_radius_is_the_k_th_smallest_of_the_pairs(k: int):
    logits, L, e = pairs()
    labels = torch.randint(5, (40,), generator=seeded(2))
    found = label_radius(logits, labels, k, L, e)
    for i, y in enumerate(labels.tolist()):
        ratios = sorted(((logits[i, y] - logits[i, j] - 4e-3) / L[y, j]).item() for j in range(5) if j != y)
        assert found[i].item() == pytest.approx(max(0.0, ratios[k - 1]), rel=1e-12)
    if k == 1:
        assert torch.equal(label_radius(logits, logits.argmax(1), 1, L, e), certified_radius(logits, L, e))


def test_the_radius_of_a_target_is_that_of_the_pair_that_holds_longest():
    logits, L, e = pairs()
    found = target_radii(logits, L, e)
    for i, j in itertools.product(range(40), range(5)):
        ratios = [((logits[i, h] - logits[i, j] - 4e-3) / L[h, j]).item() for h in range(5) if h != j]
        assert found[i, j].item() == pytest.approx(max(0.0, *ratios), rel=1e-12)
    assert (found.gather(1, logits.argmax(1)[:, None]) == 0).all()
    two = target_radii(logits[:, :2], L[:2, :2]).amax(1)
    assert torch.equal(two, certified_radius(logits[:, :2], L[:2, :2]))


@pytest.mark.parametrize("row", [[1.0, 1.0, 1.0], [math.nan, 1.0, 0.0], [math.inf, 1.0, 0.0]])
def test_ties_and_logits_that_are_not_finite_have_no_radius(row: list[float]):
    logits, L = torch.tensor([row], dtype=F64), 1 - torch.eye(3, dtype=F64)
    assert not label_radius(logits, torch.tensor([1]), 1, L).any()
    assert not target_radii(logits, L).any()
    assert not slack_radius(torch.tensor([math.nan, math.inf, 0.0, -1.0], dtype=F64), 1.0).any()
    assert slack_radius(torch.tensor([1.0]), 0.0).item() == math.inf
    assert not slack_radius(torch.tensor([1.0, 1.0]), torch.tensor([math.nan, -1.0])).any()


# Segmentation ---------------------------------------------------------------------------------------------------------


def test_as_many_pixels_flip_as_the_dearest_choice_allows():
    """Against all subsets of pixels."""
    generator = seeded()
    for trial in range(60):
        margins = 3 * torch.rand(1, 7, generator=generator, dtype=F64)
        margins[0, trial % 7] = math.inf if trial % 3 else margins[0, 0]
        radius = flip_radii(margins, 0.5)[0]
        costs = [m**2 / 2 for m in margins[0].tolist() if m < math.inf]
        for eps in (0.0, *(6 * torch.rand(5, generator=generator)).tolist()):
            most = max(
                size
                for size in range(len(costs) + 1)
                if any(sum(c) <= (0.5 * eps) ** 2 for c in itertools.combinations(costs, size))
            )
            assert int(((radius < eps) & margins[0].isfinite()).sum()) == most


def test_a_linear_map_attains_the_number_of_flips():
    identity = nn.Conv2d(2, 2, 1, bias=False, dtype=F64).eval()
    identity.load_state_dict({"weight": torch.eye(2)[:, :, None, None]})
    network = CertifiedNetwork(identity, (2, 3, 3))
    x = torch.randn(1, 2, 3, 3, generator=seeded(), dtype=F64)
    found = Segmentation().certificates(network.outputs(x), x.argmax(1))
    margins = (x[0, 0] - x[0, 1]).flatten()
    order = margins.abs().argsort()
    for k in range(1, 10):
        chosen = order[:k]
        step = torch.zeros(2, 9, dtype=F64)
        step[0, chosen], step[1, chosen] = -margins[chosen] / 2, margins[chosen] / 2
        need = found.radius[0].sort().values[k - 1].item()
        assert step.norm().item() == pytest.approx(need, rel=1e-9)
        assert need < step.norm().item()
        flipped = (x + 1.0001 * step.reshape(1, 2, 3, 3)).argmax(1).flatten() != x.argmax(1).flatten()
        assert int(flipped.sum()) == k


def test_pixels_of_huge_and_tiny_margins_keep_sound_radii():
    margins = torch.tensor([[1e200, 1e-200, 3e200, 0.0], [math.inf] * 4], dtype=F64)
    radius = flip_radii(margins, 1.0)
    assert radius[0].tolist() == pytest.approx([1e200 / 2**0.5, 0.0, 10**0.5 * 1e200 / 2**0.5, 0.0])
    assert not radius[1].any()


# Conformal ------------------------------------------------------------------------------------------------------------


def test_the_quantile_and_the_sets_are_those_of_their_definition():
    model, x = linear(4), torch.randn(60, 5, generator=seeded(), dtype=F64)
    y = (model(x) + torch.randn(60, 4, generator=seeded(1), dtype=F64)).argmax(1)
    network = CertifiedNetwork(model, (5,))
    task = Conformal.calibrated(network, [(x[:20], y[:20]), (x[20:40], y[20:40])], 0.2)
    logits = model(x).detach()
    others = torch.stack([logits.index_fill(1, torch.tensor([k]), -math.inf).amax(1) for k in range(4)], 1)
    scores = others - logits
    calibration = np.sort(scores[:40].gather(1, y[:40, None])[:, 0].numpy())
    assert task.quantile == pytest.approx(calibration[math.ceil(41 * 0.8) - 1], abs=1e-9)
    assert torch.equal(task.sets(network, x[40:], 0.0), scores[40:] <= task.quantile)
    sizes = [task.sets(network, x, eps).sum().item() for eps in (0.0, 0.1, 0.5, 2.0, 100.0)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 240


def test_robust_sets_cover_whatever_is_done_to_the_input():
    """The change that moves the label's logit down most against each other class, at a linear model."""
    model, x = linear(4), torch.randn(400, 5, generator=seeded(), dtype=F64)
    y = (model(x) + torch.randn(400, 4, generator=seeded(1), dtype=F64)).argmax(1)
    network, eps = CertifiedNetwork(model, (5,)), 0.7
    task = Conformal.calibrated(network, [(x[:200], y[:200])], 0.1)
    x, y = x[200:], y[200:]
    within = task.sets(network, x, 0.0).gather(1, y[:, None])[:, 0]
    held, plain = torch.ones(200, dtype=torch.bool), torch.ones(200, dtype=torch.bool)
    for j in range(4):
        d = (model.weight[j] - model.weight[y]).detach()
        moved = x + 0.999999 * eps * d / d.norm(dim=1, keepdim=True).clamp_min(1e-9)
        held &= task.sets(network, moved, eps).gather(1, y[:, None])[:, 0]
        plain &= task.sets(network, moved, 0.0).gather(1, y[:, None])[:, 0]
    assert (held | ~within).all()
    assert held.double().mean() >= within.double().mean() > 0.85
    found = lp.certify(network, (x, y), task=task)
    assert found.clean_accuracy == within.double().mean().item()
    assert plain.double().mean().item() == pytest.approx(found.accuracy(eps), abs=1e-12)  # attained at a linear model
    assert found.accuracy(eps) < 0.85


@pytest.mark.parametrize(("alpha", "match"), [(0.01, "at least 99"), (0.0, "alpha=0.0"), (True, "alpha=True")])
def test_calibration_that_cannot_be_is_named(alpha: float, match: str):
    with pytest.raises(LipschitzError, match=match):
        Conformal.calibrated(CertifiedNetwork(linear(3), (5,)), [(torch.rand(9, 5), torch.arange(9) % 3)], alpha)


# Labels and outputs ---------------------------------------------------------------------------------------------------

NAN = torch.tensor([0.0, math.nan, 1.0])
WRONG: list[tuple[int, Any, Any, str]] = [
    (3, "multilabel", torch.eye(3), r"torch.float32 \(3, 3\).*0 and 1 for each label"),
    (3, "multilabel", torch.arange(3), r"torch.int64 \(3,\).*shape \(N, 3\)"),
    (3, "multilabel", torch.zeros(3, 2).long(), r"\(3, 2\).*\(3,\) for each sample"),
    (3, "multilabel", 2 * torch.eye(3).long(), r"sample 0 has label 2 at \(0,\); expected 0 … 1"),
    (3, "multilabel", torch.zeros(2, 3).long(), "3 inputs but 2 labels"),
    (1, "binary", torch.tensor([0, 1, -1]), "sample 2 has label -1"),
    (1, "binary", torch.zeros(3, 1).long(), r"\(3, 1\).*shape \(N,\)"),
    (1, "binary", torch.zeros(3), "torch.float32"),
    (1, Regression(1.0), NAN, "sample 1 has label nan"),
    (1, Regression(1.0), torch.zeros(3, 1), r"\(3, 1\).*expected real numbers \(N\)"),
    (2, Regression(1.0), torch.zeros(3), r"expected real numbers \(N, 2\)"),
    (1, Regression(1.0), torch.zeros(3, dtype=torch.bool), "torch.bool"),
    (3, TopK(2), torch.tensor([0, 1, 3]), "sample 2 has label 3; expected 0 … 2"),
    (3, "targeted", torch.zeros(3), "class numbers"),
]


@pytest.mark.parametrize(("outputs", "task", "labels", "match"), WRONG)
def test_labels_of_another_task_are_refused_by_name(outputs: int, task: Any, labels: Tensor, match: str):
    with pytest.raises(DataError, match=match):
        lp.certify(linear(outputs), [(torch.rand(3, 5), labels)], task=task)


@pytest.mark.parametrize(
    ("outputs", "task", "match"),
    [
        (1, "classification", r"outputs are \(N, 1\); expected logits \(N, K\) of at least two"),
        (2, "binary", r"\(N, 2\); expected one logit"),
        (2, TopK(2), "top-k"),
        (3, "segmentation", r"expected logits \(N, K, H, W\)"),
    ],
)
def test_outputs_of_another_task_are_refused(outputs: int, task: Any, match: str):
    with pytest.raises(ShapeError, match=match):
        lp.certify(linear(outputs), [(torch.rand(3, 5), torch.zeros(3).long())], task=task)


def test_ignored_pixels_count_for_nothing():
    network, task, x, label = case("segmentation")
    found = lp.certify(network, (x.float(), label), task=task)
    assert int(found.certificates.counted.sum()) == 6 * 20 - 1
    with pytest.raises(DataError, match=r"label 9 at \(0, 0\); expected 0 … 2"):
        lp.certify(network, (x.float(), label), task="segmentation")


@pytest.mark.parametrize("make", [lambda: TopK(0), lambda: Regression(0.0), lambda: Regression(math.nan)])
def test_settings_of_tasks_are_checked(make: Any):
    with pytest.raises(ArgumentError, match=r"TopK|Regression"):
        make()


def test_outputs_that_overflow_certify_nothing():
    model = nn.Linear(2, 2, dtype=F64).eval()
    weight = torch.tensor([[1e308, 1e308], [0.0, 1.0]], dtype=F64)
    model.load_state_dict({"weight": weight, "bias": torch.zeros(2)})
    x = torch.tensor([[1.0, 1.0], [0.1, 0.1]])
    for task, label in (("multilabel", torch.ones(2, 2).long()), (Regression(1e300), torch.zeros(2, 2))):
        found = lp.certify(model, (x, label), task=task)
        assert not found.radius[0].any()
        assert found.certificates.not_finite == 1


# The evaluator --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[CertifiedNetwork, Tensor, Tensor]:
    network = CertifiedNetwork(dense(3), (6,))
    x = 2 * torch.randn(30, 6, generator=seeded(5))
    y = torch.where(torch.arange(30) % 4 > 0, network(x).argmax(1), 0)
    return network, x, y


def test_data_of_every_form_give_the_same_certificates(digits):
    network, x, y = digits
    plain = lp.certify(network, (x, y))
    dicts = [{"image": a, "label": b} for a, b in zip(x.split(8), y.split(8), strict=True)]
    forms: list[Any] = [
        (x.numpy(), y.numpy()),
        [x, y],
        [(x[:7], y[:7]), [x[7:], y[7:]]],
        TensorDataset(x, y),
        DataLoader(TensorDataset(x, y), batch_size=9),
        {"image": x, "label": y},
        dicts,
        iter(dicts),
    ]
    for form in forms:
        found = lp.certify(network, form, keys=("image", "label"), batch_size=11)
        assert torch.allclose(found.radius, plain.radius, rtol=1e-12)
        assert torch.equal(found.certificates.label, y)
    shuffled = lp.certify(network, DataLoader(TensorDataset(x, y), batch_size=9, shuffle=True))
    assert torch.allclose(shuffled.radius.sort().values, plain.radius.sort().values, rtol=1e-12)
    assert shuffled.accuracy("1/4") == plain.accuracy(0.25)


BAD = torch.rand(3, 1, 2, 2)
ERRORS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([], {}, DataError, "empty"),
    (7, {}, DataError, "got int"),
    ("runs", {}, DataError, "got str"),
    ((BAD / 0 * 0, torch.zeros(3).long()), {}, DataError, r"sample 0, pixel \(0, 0, 0\): nan"),
    ((BAD + 1.0, torch.zeros(3).long()), {}, DataError, r"expected pixels in \[0, 1\]"),
    ((BAD[:, :, :1], torch.zeros(3).long()), {}, ShapeError, r"\(1, 1, 2\).*\(1, 2, 2\)"),
    ((BAD, torch.zeros(2).long()), {}, DataError, "one label for each input"),
    ((BAD, torch.tensor([0, 1, 5])), {}, DataError, "sample 2 has label 5"),
    ([BAD], {}, DataError, "batch 0: got Tensor"),
    ([(BAD, BAD, BAD)], {}, DataError, "batch 0: got 3 parts"),
    ({"x": BAD, "y": BAD}, {}, DataError, r"\['x', 'y'\].*keys="),
    ([{"x": BAD, "y": BAD}], {"keys": ("x", "z")}, DataError, "batch 0: has no 'z'"),
    ((BAD, torch.zeros(3).long()), {"eps": ["x"]}, ArgumentError, "eps='x'"),
    ((BAD, torch.zeros(3).long()), {"task": "multi"}, UnknownNameError, "multilabel"),
    ((BAD, torch.zeros(3).long()), {"task": "regression"}, ArgumentError, "tolerance="),
    ((BAD, torch.zeros(3).long()), {"mode": "fast"}, ArgumentError, "mode='fast'"),
    ((BAD, torch.zeros(3).long()), {"input_range": "auot"}, ArgumentError, "auot"),
]


@pytest.mark.parametrize(("data", "settings", "kind", "match"), ERRORS)
def test_what_cannot_be_certified_is_named_in_one_line(data: Any, settings: dict, kind: type[Exception], match: str):
    network = CertifiedNetwork(nn.Sequential(nn.Flatten(), linear(3, 4)), (1, 2, 2))
    with pytest.raises(kind, match=match) as caught:
        lp.certify(network, data, **settings)
    assert "\n" not in str(caught.value)


def test_a_model_in_training_mode_and_what_is_no_model_are_refused():
    model, data = dense(3), (torch.rand(2, 6), torch.zeros(2).long())
    model[1].train()
    with pytest.raises(ArgumentError, match=r"part 1 is in training mode; call model.eval\(\)"):
        lp.certify(model, data)
    with pytest.raises(ArgumentError, match="got function"):
        lp.certify(lambda x: x, data)
    with pytest.raises(ShapeError, match="3 logits, the data 2 classes"):
        lp.certify(model.eval(), data, class_names=["a", "b"])


def test_the_figures_are_those_of_their_definitions(digits):
    network, x, y = digits
    found = lp.certify(network, (x, y), eps=["1/4", 1.0], class_names="abc")
    own, radius = found.certificates, found.radius.numpy()
    right = (own.prediction == y).numpy()
    assert found.accuracy("1/4") == (right & (radius > 0.25)).mean()
    for k, row in enumerate(found.per_class()):
        chosen = y.numpy() == k
        assert (row.name, row.samples) == ("abc"[k], chosen.sum())
        assert row.clean_accuracy == right[chosen].mean()
        assert row.certified_accuracy == tuple((right & (radius > e))[chosen].mean() for e in (0.25, 1.0))
    confusion = np.zeros((3, 3))
    np.add.at(confusion, (y.numpy(), own.prediction.numpy()), 1)
    assert np.array_equal(found.confusion().numpy(), confusion)
    assert found.confusion(1.0).sum() == (radius > 1.0).sum()
    for threshold, coverage, accuracy in found.selective():
        kept = radius >= threshold
        assert coverage == kept.mean()
        assert accuracy == right[kept].mean()
    frame = found.to_frame()
    assert np.array_equal(frame.radius, radius)
    assert frame.correct.mean() == found.clean_accuracy
    assert found.table().row_count == 1
    assert found.plot().axes[0].lines[0].get_ydata()[0] == pytest.approx(100 * found.clean_accuracy)
    assert "clean" in str(found)
    assert len(found) == 30


def test_all_labels_hold_where_each_does():
    network, task, x, label = case("multilabel")
    label[::3, 1] = 1 - label[::3, 1]
    found = lp.certify(network, (x, label), task=task, eps=[0.2])
    held = ((found.radius > 0.2) & found.certificates.correct).numpy()
    assert found.accuracy(0.2) == held.mean()
    assert found.all_accuracy(0.2) == held.all(1).mean()
    assert [row.certified_accuracy[0] for row in found.per_class()] == held.mean(0).tolist()
    assert found.to_frame().shape == (48, 5)
    for refused in (found.confusion, found.selective, lambda: found.interval(0.1)):
        with pytest.raises(ArgumentError, match="multilabel"):
            refused()


def test_files_and_audits_of_other_tasks(digits, tmp_path):
    network, x, y = digits
    found = lp.certify(network, iter([(x, y)]), eps=[0.1])
    assert {p.name for p in found.save(tmp_path / "a")} == {
        "report.json", "certificates.csv", "certified_accuracy.png", "network.pt",
    }  # fmt: skip
    with pytest.raises(ArgumentError, match="once only"):
        found.audit()
    found = lp.certify(network, (x, y), eps=[0.1])
    assert found.audit(samples=5, steps=3).samples == 5
    several = lp.certify(network, (x, y), eps=[0.1], task="targeted")
    several.save(tmp_path / "b")
    with np.load(tmp_path / "b" / "certificates.npz") as stored:
        assert np.array_equal(stored["radius"], several.radius.numpy())
    assert several.report["task"]["name"] == "targeted"
    assert several.audit(samples=5, steps=3).holds
    with pytest.raises(ArgumentError, match="mode='fast'"):
        lp.certify(dense(3), (x, y), mode="fast").audit()
