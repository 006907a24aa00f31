"""Radii against their definition, and reports that leave nothing half written."""

import csv
import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import liplayers as lp
from liplayers.certification import (
    Certificates,
    CertifiedNetwork,
    certified_accuracy,
    certified_radius,
    certify,
    parse_radius,
    report,
)
from liplayers.errors import ArgumentError, DataError, OutputError, ShapeError

F64 = torch.float64


def test_radius_by_hand():
    constants = torch.tensor([[0.0, 2.0, 1.0], [2.0, 0.0, 4.0], [1.0, 4.0, 0.0]], dtype=F64)
    logits = torch.tensor([[5.0, 3.0, 4.5], [0.0, 9.0, 1.0]], dtype=F64)
    expected = [min((5 - 3) / 2, (5 - 4.5) / 1), min(9 / 2, 8 / 4)]
    assert certified_radius(logits, constants).tolist() == pytest.approx(expected, rel=1e-12)


def test_rounding_only_lowers_the_radius():
    logits = torch.tensor([[1.0, 0.0]], dtype=F64)
    constants = torch.tensor([[0.0, 3.0], [3.0, 0.0]], dtype=F64)
    exact = Fraction(1, 3)
    assert Fraction(certified_radius(logits, constants).item()) < exact
    error = torch.full_like(logits, 0.1)
    assert certified_radius(logits, constants, error).item() == pytest.approx((1 - 0.4) / 3)
    assert certified_radius(logits, constants, torch.full_like(logits, 1.0)).item() == 0


@pytest.mark.parametrize(
    "row", [[1.0, 1.0, 0.0], [2.0, 2.0, 2.0], [math.nan, 1.0, 0.0], [math.inf, 1.0, 0.0], [1.0, -math.inf, 0.0]]
)
def test_ties_and_non_finite_logits_certify_nothing(row):
    assert certified_radius(torch.tensor([row], dtype=F64), torch.ones(3, 3) - torch.eye(3)).item() == 0


def test_constant_difference():
    zero = torch.zeros(2, 2)
    assert certified_radius(torch.tensor([[1.0, 0.0]]), zero).item() == math.inf
    assert certified_radius(torch.tensor([[1.0, 1.0]]), zero).item() == 0


@pytest.mark.parametrize("constant", [math.nan, -1.0])
def test_constants_that_prove_nothing_give_no_radius(constant):
    assert certified_radius(torch.tensor([[1.0, 0.0]]), torch.full((2, 2), constant)).item() == 0


@pytest.mark.parametrize("shapes", [((3, 1), (1, 1)), ((3, 4), (3, 3)), ((4,), (4, 4))])
def test_shapes_are_checked(shapes):
    with pytest.raises(ShapeError):
        certified_radius(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_linear_classifier_radius_is_the_distance_to_the_boundary():
    torch.manual_seed(0)
    W, x = torch.randn(4, 6, dtype=F64), torch.randn(50, 6, dtype=F64)
    logits = x @ W.T
    radius = certified_radius(logits, torch.cdist(W, W))
    y = logits.argmax(1)
    for i in range(50):
        distances = [((logits[i, y[i]] - logits[i, j]) / (W[y[i]] - W[j]).norm()).item() for j in range(4) if j != y[i]]
        assert radius[i].item() == pytest.approx(min(distances), rel=1e-9)


def test_threshold_is_rounded_up():
    R = torch.tensor([0.5], dtype=F64)
    right = torch.tensor([True])
    assert certified_accuracy(R, right, 0.5) == 0
    assert certified_accuracy(R, right, math.nextafter(0.5, 0)) == 1
    assert certified_accuracy(R, ~right, 0.1) == 0


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_parsed_radius_is_never_below_the_quotient(a, b):
    parsed = Fraction(parse_radius(f"{a}/{b}"))
    assert Fraction(a, b) <= parsed <= Fraction(a, b) * (1 + Fraction(1, 2**51))


@pytest.mark.parametrize("bad", [-1, "-1/2", "abc", math.nan, math.inf, "1/0", True, None, "", "1e400", "1e999999999"])
def test_bad_radii_are_named(bad):
    with pytest.raises(ArgumentError, match="eps="):
        parse_radius(bad)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        lp.Normalize([0.5], [0.5]), nn.Flatten(), lp.BROLinear(4, 6), lp.MaxMin(), lp.NormalizedLinear(6, 3)
    )


def network() -> CertifiedNetwork:
    return CertifiedNetwork(model(), (1, 2, 2), 3)


def batch(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, 2, 2, generator=generator), torch.arange(n) % 3


def test_certified_points_survive_attack_at_their_radius():
    net = model()
    images, labels = batch(40)
    network = CertifiedNetwork(net, (1, 2, 2), 3)
    certificates = certify(network, [(images, labels)])
    assert 2 - 1e-6 < network.bounds.split.body_bound < 2 + 1e-6
    x0, R, y = images.double(), certificates.radius, certificates.prediction
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        delta = torch.randn(x0.shape, generator=generator, dtype=F64)
        for _ in range(25):
            delta = delta / delta.flatten(1).norm(dim=1)[:, None, None, None] * R[:, None, None, None]
            delta.requires_grad_(True)
            logits = network(x0 + delta)
            others = logits.masked_fill(nn.functional.one_hot(y, 3).bool(), -math.inf).amax(1)
            gap = logits.gather(1, y[:, None])[:, 0] - others
            (gradient,) = torch.autograd.grad(gap.sum(), delta)
            assert (gap >= 0).all()
            delta = (delta - 0.3 * R.mean() * gradient).detach()


def test_certificates_agree_over_batch_sizes():
    images, labels = batch()
    whole = certify(network(), [(images, labels)])
    halves = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    done: list[int] = []
    parts = certify(network(), halves, progress=done.append)
    assert done == [3, 8]
    assert torch.allclose(whole.radius, parts.radius, rtol=1e-12)
    assert torch.equal(whole.label, parts.label)


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (1.5, "1.5"), (-0.1, "-0.1")])
def test_bad_pixels_are_named(value, shown):
    images, labels = batch()
    images[5, 0, 1, 0] = value
    with pytest.raises(DataError, match=rf"sample 5, pixel \(0, 1, 0\): {shown}"):
        certify(network(), [(images, labels)])


def test_non_finite_logits_are_not_right():
    net = nn.Linear(2, 3).double()
    net.weight.data = torch.tensor([[1e308, 1e308], [0.0, 0.0], [0.0, 0.0]], dtype=F64)
    net.bias.data.zero_()
    images, labels = torch.tensor([[1.0, 1.0], [0.1, 0.1]]), torch.zeros(2, dtype=torch.long)  # the first overflows
    certificates = certify(CertifiedNetwork(net, (2,), 3), [(images, labels)])
    assert certificates.prediction.tolist() == [-1, 0]
    assert (certificates.not_finite, certificates.clean_accuracy) == (1, 0.5)
    assert certificates.radius[0] == 0


def test_wrong_shapes_and_empty_sets():
    images, labels = batch()
    with pytest.raises(ShapeError, match="trained on"):
        certify(network(), [(images.repeat(1, 3, 1, 1), labels)])
    with pytest.raises(ShapeError, match="num_classes is 4"):
        CertifiedNetwork(model(), (1, 2, 2), 4)
    with pytest.raises(ShapeError, match="two classes"):
        CertifiedNetwork(model(), (1, 2, 2), 1)
    with pytest.raises(DataError, match="empty"):
        certify(network(), [])


CERTIFICATES = Certificates(
    label=torch.tensor([0, 1, 2, 0]),
    prediction=torch.tensor([0, 1, 1, 0]),
    margin=torch.tensor([1.0, 0.1, 2.0, 3.0], dtype=F64),
    radius=torch.tensor([0.5, 0.1, 9.0, math.inf], dtype=F64),
)


def test_summary_counts_right_predictions_only():
    figures = report.summary(CERTIFICATES, ["1/10", 0.3, 10])
    assert figures["clean_accuracy"] == 0.75
    assert [row["accuracy"] for row in figures["certified_accuracy"]] == [0.5, 0.5, 0.25]
    assert figures["mean_radius"] == math.inf


def test_curve_steps_where_points_fall():
    line = report.curve({"a": CERTIFICATES}, "t", "pixels in [0, 1]").axes[0].lines[0]
    x, y = line.get_xdata(), line.get_ydata()
    assert line.get_drawstyle() == "steps-post"
    assert dict(zip(x.tolist(), y.tolist(), strict=True)) == {0.0: 75.0, 0.1: 50.0, 0.5: 25.0}


def test_files_hold_the_exact_numbers(tmp_path):
    paths = report.write_outputs(
        tmp_path / "new" / "folder",
        {
            "c.csv": report.text_writer(report.csv_text(CERTIFICATES)),
            "r.json": report.json_writer(report.summary(CERTIFICATES, [0.3])),
        },
    )
    rows = list(csv.DictReader(paths[0].open()))
    assert [float(row["radius"]) for row in rows] == CERTIFICATES.radius.tolist()
    assert [int(row["prediction"]) for row in rows] == [0, 1, 1, 0]
    assert json.loads(paths[1].read_text())["mean_radius"] == "inf"


def test_failed_writing_leaves_earlier_files(tmp_path):
    (tmp_path / "a").write_text("old")

    def fail(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        report.write_outputs(tmp_path, {"a": lambda path: path.write_text("new") and None, "b": fail})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="output="):
        report.write_outputs(tmp_path / "file" / "x", {})
