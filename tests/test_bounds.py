"""Composed bounds: each rule against the norm of the map itself, and the refusal of everything unknown."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import liplayers as lp
from liplayers.errors import NonFiniteError, ShapeError, UnknownBoundError


def jacobian_norm(module: nn.Module, shape: tuple[int, ...], points: int = 3) -> float:
    """The largest spectral norm of the dense Jacobian at random points, in float64."""
    module = module.double().eval()
    generator = torch.Generator().manual_seed(0)
    norms = []
    for _ in range(points):
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        J = torch.func.jacrev(lambda v: module(v[None])[0])(x).reshape(-1, x.numel())
        norms.append(torch.linalg.matrix_norm(J, 2).item())
    return max(norms)


def conv(**arguments) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 6, **{"kernel_size": 3, **arguments})


def norm_layer() -> nn.BatchNorm2d:
    torch.manual_seed(1)
    layer = nn.BatchNorm2d(4)
    layer.running_var.uniform_(0.1, 2)
    nn.init.normal_(layer.weight)
    return layer


EXACT = {
    "identity": nn.Identity(),
    "flatten": nn.Flatten(),
    "unshuffle": nn.PixelUnshuffle(2),
    "zero pad": nn.ZeroPad2d((1, 2, 0, 1)),
    "average k=s": nn.AvgPool2d(2),
    "adaptive average": nn.AdaptiveAvgPool2d(3),
    "global average": nn.AdaptiveAvgPool2d(1),
    "scale": lp.Scale(-2.5),
    "normalize": lp.Normalize([0.1] * 4, [0.2, 0.5, 1.0, 2.0]),
    "batch norm": norm_layer(),
    "our average": lp.AvgPool2d((2, 3)),
}
UPPER = {
    "average k>s": nn.AvgPool2d(3, stride=1),
    "average padded": nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
    "average ceil": nn.AvgPool2d(4, stride=4, ceil_mode=True),
    "average divisor": nn.AvgPool2d(2, divisor_override=1),
    "max k=s": nn.MaxPool2d(2),
    "max k>s": nn.MaxPool2d(3, stride=1),
    "max dilated": nn.MaxPool2d(2, stride=2, dilation=2),
    "relu": nn.ReLU(),
    "leaky relu": nn.LeakyReLU(3.0),
    "sigmoid": nn.Sigmoid(),
    "conv": conv(),
    "conv padded": conv(padding=2),
    "conv strided": conv(stride=2, padding=1),
    "conv dilated": conv(dilation=2, padding=1),
    "conv grouped": conv(groups=2),
    "conv circular": conv(padding=1, padding_mode="circular"),
    "conv circular strided": conv(padding=1, stride=2, padding_mode="circular"),
    "conv 1x1": conv(kernel_size=1),
}


@pytest.mark.parametrize("name", EXACT)
def test_rule_is_the_norm(name):
    module = EXACT[name]
    assert lp.lipschitz_bound(module.eval(), (4, 6, 6)) == pytest.approx(jacobian_norm(module, (4, 6, 6)), rel=1e-6)


@pytest.mark.parametrize("name", UPPER)
def test_rule_bounds_the_norm(name):
    module = UPPER[name]
    assert lp.lipschitz_bound(module.double(), (4, 6, 6)) * (1 + 1e-9) >= jacobian_norm(module, (4, 6, 6))


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_bound_is_tight_on_large_images(stride):
    module = conv(stride=stride, padding=1).double()
    truth = jacobian_norm(module, (4, 16, 16), points=1)
    assert truth <= lp.lipschitz_bound(module, (4, 16, 16)) <= 1.1 * truth


def test_linear_bound_is_the_norm():
    torch.manual_seed(0)
    module = nn.Linear(30, 20)
    truth = torch.linalg.matrix_norm(module.weight.double(), 2).item()
    assert truth <= lp.lipschitz_bound(module) <= truth * 1.002


def test_sequential_multiplies_and_nested_paths_are_reported():
    model = nn.Sequential(lp.Scale(2.0), nn.Sequential(lp.Scale(3.0), nn.ReLU()))
    assert lp.lipschitz_bound(model) == 6
    assert lp.layer_bounds(model) == {"0": 2.0, "1.0": 3.0, "1.1": 1.0, "1": 3.0, "": 6.0}


def test_containers():
    branch = nn.Sequential(lp.Scale(3.0))
    assert lp.lipschitz_bound(lp.Residual(branch, alpha=0.25)) == pytest.approx(0.75 + 0.25 * 3)
    assert lp.lipschitz_bound(lp.Concatenate([branch, lp.Scale(4.0)])) == pytest.approx(5.0)


class Custom(nn.Module):
    """A forward method of sums, a concatenation and functional calls."""

    def __init__(self):
        super().__init__()
        self.a = lp.Scale(2.0)
        self.b = lp.Scale(3.0)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        y = x + 0.5 * self.a(F.relu(x))  # 1 + 1
        z = torch.cat([self.b(y), -y], 1)  # hypot(6, 2)
        z = self.a(z) - self.a(z) / 4  # 2 + 1/2
        return self.head(z.view(z.size(0), -1)[:, :12])


def test_traced_forward():
    model = Custom()
    split = lp.split_head(model, (2, 3))
    assert split.body_bound == pytest.approx(math.hypot(6, 2) * 2.5)
    assert split.head is model.head
    full = lp.lipschitz_bound(model, (2, 3))
    assert full == pytest.approx(split.body_bound * lp.lipschitz_bound(model.head))
    assert jacobian_norm(model, (2, 3)) <= full


def test_module_used_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = lp.Scale(2.0)

        def forward(self, x):
            return self.a(self.a(x))

    assert lp.lipschitz_bound(Twice()) == 4


def forward_of(body) -> nn.Module:
    module_type = type("Foreign", (nn.Module,), {"forward": body})
    return nn.Sequential(nn.ReLU(), module_type())


def in_place(self, x):
    y = x
    x += 1.0 * y
    return x + y


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), "1 (LayerNorm)"),
        (nn.Sequential(nn.Sequential(nn.GELU())), "0.0 (GELU)"),
        (nn.Sequential(nn.SiLU()), "0 (SiLU)"),
        (nn.Sequential(nn.Softplus(threshold=0)), "0 (Softplus)"),
        (nn.Sequential(nn.Dropout()), "0 (Dropout)"),
        (nn.Sequential(nn.BatchNorm2d(4)), "0 (BatchNorm2d)"),
        (nn.Sequential(conv(padding=1, padding_mode="reflect")), "0 (Conv2d)"),
        (nn.Sequential(conv(padding=2, padding_mode="circular")), "0 (Conv2d)"),
        (nn.Sequential(conv(padding=1, stride=2, padding_mode="circular")), "0 (Conv2d)"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(4)), "0 (AdaptiveAvgPool2d)"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), "the model (ParametrizedLinear)"),
        (forward_of(lambda self, x: x * x), "1 (Foreign)"),
        (forward_of(lambda self, x: x.exp()), "'exp'"),
        (forward_of(lambda self, x: x / x.sum()), "1 (Foreign)"),
        (forward_of(lambda self, x: x if x.sum() > 0 else -x), "cannot be traced"),
        (forward_of(lambda self, x: x[:, [0, 0]]), "'getitem'"),
        (forward_of(in_place), "in place"),
        (lp.Concatenate([nn.Identity(), nn.LayerNorm(3)]), "paths.1 (LayerNorm)"),
    ],
)
def test_unknown_raises_and_is_named(model, named):
    with pytest.raises(UnknownBoundError) as caught:
        lp.lipschitz_bound(model.train())
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_registered_rule_holds_for_the_exact_type():
    class Halve(nn.Module):
        def forward(self, x):
            return torch.special.expit(x)

    class Other(Halve):
        pass

    lp.register_bound(Halve, lambda module, shape: 0.25)
    assert lp.lipschitz_bound(nn.Sequential(Halve())) == 0.25
    with pytest.raises(UnknownBoundError, match="Other"):
        lp.lipschitz_bound(nn.Sequential(Other()))


def test_input_shape_is_tried():
    model = nn.Sequential(nn.Flatten(), lp.AOLLinear(12, 5))
    assert lp.lipschitz_bound(model, (3, 2, 2)) == 1
    with pytest.raises(ShapeError, match=r"\(3, 3, 2\)"):
        lp.lipschitz_bound(model, (3, 3, 2))


def test_trying_the_shape_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnknownBoundError):
        lp.lipschitz_bound(model, (3,))
    assert all(m.training for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_parameters_are_named(bad):
    model = nn.Sequential(lp.AOLLinear(3, 3), lp.BROLinear(3, 3))
    model[1].raw.data[0, 0] = bad
    with pytest.raises(NonFiniteError, match=r"1\.raw"):
        lp.lipschitz_bound(model)


def test_head_split():
    model = nn.Sequential(lp.Scale(2.0), nn.Sequential(lp.Scale(3.0), lp.NormalizedLinear(4, 3)))
    split = lp.split_head(model, (4,))
    assert split.body_bound == 6
    W = split.head.weight
    L = split.margin_lipschitz(3)
    assert L[0, 1].item() == pytest.approx(6 * (W[0] - W[1]).norm().item(), rel=1e-6)
    assert L.diagonal().abs().max() == 0


def test_without_a_linear_head_the_whole_bound_counts():
    split = lp.split_head(nn.Sequential(lp.AOLLinear(4, 3), lp.Scale(2.0)), (4,))
    assert split.head is None
    assert split.margin_lipschitz(3)[0, 1].item() == pytest.approx(2 * math.sqrt(2))
