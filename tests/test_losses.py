"""Losses against their formulas written out sample by sample, and their gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from liplayers import losses
from liplayers.errors import ArgumentError

torch.manual_seed(0)
LOGITS = 3 * torch.randn(16, 5, dtype=torch.float64)
TARGET = torch.randint(5, (16,))
W = torch.randn(5, 7, dtype=torch.float64)
CONSTANTS = torch.cdist(W, W)


def softmax_of(values: list[float], index: int) -> float:
    return math.exp(values[index]) / sum(map(math.exp, values))


def test_offset_cross_entropy():
    expected = 0.0
    for row, y in zip(LOGITS.tolist(), TARGET.tolist(), strict=True):
        shifted = [(f - (1.5 if j == y else 0)) / 0.25 for j, f in enumerate(row)]
        expected += -0.25 * math.log(softmax_of(shifted, y)) / len(LOGITS)
    got = losses.offset_cross_entropy(LOGITS, TARGET, offset=1.5, temperature=0.25)
    assert got.item() == pytest.approx(expected, rel=1e-9)


def emma_rows(epsilon: float) -> list[list[float]]:
    rows = []
    for row, y in zip(LOGITS.tolist(), TARGET.tolist(), strict=True):
        out = []
        for j, f in enumerate(row):
            m = CONSTANTS[y, j].item()
            share = 0.0 if j == y else min(1.0, max(0.01, (row[y] - f) / (epsilon * m)))
            out.append(f - row[y] + share * epsilon * m)
        rows.append(out)
    return rows


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 10.0])
def test_emma(epsilon):
    rows = zip(emma_rows(epsilon), TARGET.tolist(), strict=True)
    expected = sum(-math.log(softmax_of(row, y)) for row, y in rows) / len(LOGITS)
    assert losses.emma(LOGITS, TARGET, CONSTANTS, epsilon).item() == pytest.approx(expected, rel=1e-9)


def test_emma_shares_carry_no_gradient_but_constants_do():
    logits, constants = LOGITS.clone().requires_grad_(), CONSTANTS.clone().requires_grad_()
    losses.emma(logits, TARGET, constants, 1.0).backward()
    # with the shares constant the gradient is that of cross-entropy on the shifted logits
    z = torch.tensor(emma_rows(1.0), dtype=torch.float64)
    p = z.softmax(1) - F.one_hot(TARGET, 5)
    relative = p - p.sum(1, keepdim=True) * F.one_hot(TARGET, 5)
    assert torch.allclose(logits.grad, relative / len(LOGITS), atol=1e-12)
    assert constants.grad.abs().sum() > 0


@pytest.mark.parametrize(("temperature", "offset", "exponent"), [(0.75, 2.0, 5.0), (1.0, 0.0, 0.0), (2.0, 1.0, 1.5)])
def test_logit_annealing(temperature, offset, exponent):
    expected = 0.0
    for row, y in zip(LOGITS.tolist(), TARGET.tolist(), strict=True):
        p = softmax_of([(f - (offset if j == y else 0)) / temperature for j, f in enumerate(row)], y)
        expected += temperature * (1 - p) ** exponent * -math.log(p) / len(LOGITS)
    got = losses.logit_annealing(LOGITS, TARGET, temperature, offset, exponent)
    assert got.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("margin", [40.0, 200.0, 1e4])
def test_logit_annealing_is_finite_for_sure_points(margin):
    logits = torch.tensor([[margin, 0.0], [-margin, 0.0]], requires_grad=True)
    losses.logit_annealing(logits, torch.tensor([0, 0])).backward()
    assert logits.grad.isfinite().all()


def test_logit_annealing_module_shifts_by_emma_where_it_has_a_radius():
    z = torch.tensor(emma_rows(0.7), dtype=torch.float64)
    module = losses.LogitAnnealing(epsilon=0.7)
    assert torch.allclose(module(LOGITS, TARGET, CONSTANTS), losses.logit_annealing(z, TARGET))
    plain = losses.LogitAnnealing(epsilon=0)
    assert torch.equal(plain(LOGITS, TARGET, CONSTANTS), losses.logit_annealing(LOGITS, TARGET))


def test_certificate_regularization():
    expected = 0.0
    for row, y in zip(LOGITS.tolist(), TARGET.tolist(), strict=True):
        radius = min((row[y] - row[j]) / CONSTANTS[y, j].item() for j in range(5) if j != y)
        expected += (-math.log(softmax_of(row, y)) - 0.3 * max(0.0, radius)) / len(LOGITS)
    got = losses.CertificateRegularization(0.3)(LOGITS, TARGET, CONSTANTS)
    assert got.item() == pytest.approx(expected, rel=1e-9)


def test_certificate_regularization_reaches_the_head_and_leaves_wrong_points_to_the_cross_entropy():
    constants = CONSTANTS.clone().requires_grad_()
    right = LOGITS.argmax(1) == TARGET
    assert right.any()
    assert not right.all()
    for rows, moves in ((right, True), (~right, False)):
        (grad,) = torch.autograd.grad(
            losses.certificate_regularization(LOGITS[rows], TARGET[rows], constants, 1.0), constants
        )
        assert grad.isfinite().all()
        assert bool(grad.any()) is moves


def test_multi_margin():
    expected = 0.0
    for row, y in zip(LOGITS.tolist(), TARGET.tolist(), strict=True):
        expected += sum(max(0.0, 2.5 - row[y] + row[j]) for j in range(5) if j != y) / 5 / len(LOGITS)
    assert losses.MultiMargin(2.5)(LOGITS, TARGET).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("target", [TARGET, TARGET.clamp_max(2), torch.zeros_like(TARGET)], ids=["all", "some", "one"])
def test_hkr(target):
    """Classes without samples, or without others, have no Wasserstein distance and only the hinge."""
    expected = 0.0
    for k in range(5):
        column = list(zip(LOGITS[:, k].tolist(), target.tolist(), strict=True))
        inside, outside = [f for f, y in column if y == k], [f for f, y in column if y != k]
        if inside and outside:
            expected += sum(outside) / len(outside) - sum(inside) / len(inside)
        expected += 7 * sum(max(0.0, 0.5 - (f if y == k else -f)) for f, y in column) / len(column)
    assert losses.HKR(7, 0.5)(LOGITS, target).item() == pytest.approx(expected / 5, rel=1e-9)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 10.0])
def test_gloro_trades(epsilon):
    """Against the divergence of the K + 1 probabilities, summed as it is defined."""
    expected = 0.0
    for row, y in zip(LOGITS.tolist(), TARGET.tolist(), strict=True):
        i = row.index(max(row))
        bottom = max(row[j] + epsilon * CONSTANTS[i, j].item() for j in range(5) if j != i)
        p, q = ([softmax_of(logits, j) for j in range(5)] for logits in (row, [*row, bottom]))
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        expected += (-math.log(p[y]) + 0.6 * divergence) / len(LOGITS)
    got = losses.GloRoTrades(epsilon, trade_off=0.6)(LOGITS, TARGET, CONSTANTS)
    assert got.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1e4])
@pytest.mark.parametrize(
    "loss",
    [losses.CertificateRegularization(), losses.MultiMargin(), losses.HKR(), losses.GloRoTrades(epsilon=0.5)],
    ids=str,
)
def test_gradients_are_finite_for_equal_and_for_huge_logits(loss, scale):
    logits = (scale * LOGITS).requires_grad_()
    constants = (scale * CONSTANTS,) if isinstance(loss, losses.MarginLoss) else ()
    value = loss(logits, TARGET, *constants)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: losses.OffsetCrossEntropy(offset=-1),
        lambda: losses.OffsetCrossEntropy(temperature=0),
        lambda: losses.OffsetCrossEntropy(offset=math.nan),
        lambda: losses.EMMA(epsilon=0),
        lambda: losses.EMMA(epsilon="1"),
        lambda: losses.LogitAnnealing(exponent=-1),
        lambda: losses.CertificateRegularization(gamma=-0.1),
        lambda: losses.MultiMargin(margin=0),
        lambda: losses.HKR(hinge=-1),
        lambda: losses.HKR(margin=math.inf),
        lambda: losses.GloRoTrades(epsilon=0),
        lambda: losses.GloRoTrades(epsilon=1, trade_off=-1),
    ],
)
def test_bad_arguments_are_named(make):
    with pytest.raises(ArgumentError, match=r"(offset|temperature|epsilon|exponent|gamma|margin|hinge|trade_off)="):
        make()
