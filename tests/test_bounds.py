"""Composed bounds: each rule against the norm of the map itself, and the refusal of everything unknown."""

import math
from fractions import Fraction
from itertools import product

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import liplayers as lp
from benchmarks import bounds
from liplayers.bounds import norm_table
from liplayers.bounds.composition import head_splitter
from liplayers.errors import NonFiniteError, ShapeError, UnknownBoundError
from liplayers.linalg.verified import conv_norm_enclosure
from liplayers.losses import emma


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
    "our average": lp.ScaledAvgPool2d((2, 3)),
}
UPPER = {
    "average k>s": nn.AvgPool2d(3, stride=1),
    "average padded": nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
    "average ceil": nn.AvgPool2d(4, stride=4, ceil_mode=True),
    "average divisor": nn.AvgPool2d(2, divisor_override=1),
    "max k=s": nn.MaxPool2d(2),
    "max k>s": nn.MaxPool2d(3, stride=1),
    "max dilated": nn.MaxPool2d(2, stride=2, dilation=2),
    "adaptive max": nn.AdaptiveMaxPool2d((3, 2)),
    "adaptive max overlapping": nn.AdaptiveMaxPool2d((4, 5)),
    "adaptive max enlarging": nn.AdaptiveMaxPool2d((8, None)),
    "l2 pool": nn.LPPool2d(2, (2, 3)),
    "relu": nn.ReLU(),
    "leaky relu": nn.LeakyReLU(3.0),
    "sigmoid": nn.Sigmoid(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "prelu": nn.PReLU(4, init=1.7),
    "rrelu": nn.RReLU(0.5, 2.0),
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
    assert lp.lipschitz_bound(module.double().eval(), (4, 6, 6)) * (1 + 1e-9) >= jacobian_norm(module, (4, 6, 6))


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_bound_is_tight_on_large_images(stride):
    module = conv(stride=stride, padding=1).double()
    truth = jacobian_norm(module, (4, 16, 16), points=1)
    assert truth <= lp.lipschitz_bound(module, (4, 16, 16)) <= 1.1 * truth


PADS = [(0, 0), (1, 1), (0, 2), (2, 1), (3, 3)]


def linear_norm(module: nn.Module, shape: tuple[int, ...]) -> float:
    pixels = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    with torch.no_grad():
        return torch.linalg.matrix_norm((module(pixels) - module(0 * pixels)).flatten(1), 2).item()


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), ((2, 3), (2, 1), 1), (1, 3, 1), (3, 2, (1, 2))])
@pytest.mark.parametrize("kind", ["gaussian", "first tap", "all taps"])
def test_padding_that_repeats_pixels_counts_for_every_size(mode: str, kernel, stride, dilation, kind: str):
    for padding, size in product([0, 1, 2, (3, 1), (0, 2), "same"], [(4, 5), (6, 4), (7, 8)]):
        if padding == "same" and stride != 1:
            continue
        module = conv(kernel_size=kernel, stride=stride, dilation=dilation, padding=padding, padding_mode=mode).double()
        with torch.no_grad():
            if kind == "first tap":
                module.weight[:, :, torch.arange(module.kernel_size[0]) > 0] = 0
                module.weight[..., torch.arange(module.kernel_size[1]) > 0] = 0
            elif kind == "all taps":
                module.weight.abs_()
        try:
            truth = linear_norm(module, (4, *size))
        except RuntimeError:
            continue  # an image smaller than torch's padding or the kernel
        bound = lp.lipschitz_bound(module, (4, *size))
        assert truth <= bound * (1 + 1e-12)
        if mode != "circular":
            assert bound <= lp.lipschitz_bound(module)


@pytest.mark.parametrize(("mode", "padding", "copies"), [("reflect", 1, 2), ("replicate", 2, 3), ("circular", 2, 2)])
def test_the_count_of_repeated_pixels_is_attained_by_a_shift(mode: str, padding: int, copies: int):
    module = nn.Conv2d(1, 1, 3, padding=padding, padding_mode=mode, bias=False, dtype=torch.float64)
    module.weight.data.zero_()[..., 0, 0] = 1
    truth = linear_norm(module, (1, 12, 11))
    assert truth == pytest.approx(copies if mode != "replicate" else 3)
    assert lp.lipschitz_bound(module, (1, 12, 11)) == pytest.approx(truth)


def test_the_worst_size_of_an_image_is_assumed_where_none_is_known():
    worst = {"reflect": 3, "replicate": 5}
    for mode, copies in worst.items():
        module = nn.Conv2d(1, 1, 1, padding=2, padding_mode=mode, bias=False, dtype=torch.float64)
        module.weight.data.fill_(1)
        assert lp.lipschitz_bound(module) == pytest.approx(copies)
        smallest = (1, 3, 3) if mode == "reflect" else (1, 1, 1)
        assert linear_norm(module, smallest) == pytest.approx(copies)
    with pytest.raises(UnknownBoundError, match="pass input_shape"):
        lp.lipschitz_bound(nn.Conv2d(1, 1, 1, padding=2, padding_mode="circular"))


@pytest.mark.parametrize("make", [nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d, nn.ZeroPad2d])
@pytest.mark.parametrize("size", [(4, 5), (9, 4)])
def test_padding_modules_have_the_norm_of_what_they_repeat(make, size: tuple[int, int]):
    for horizontal, vertical in product(PADS, PADS):
        module = make((*horizontal, *vertical))
        truth = linear_norm(module, (1, *size))
        assert lp.lipschitz_bound(module, (1, *size)) == pytest.approx(truth, rel=1e-12)
        if make in (nn.ReflectionPad2d, nn.ReplicationPad2d):
            assert lp.lipschitz_bound(module) >= truth * (1 - 1e-12)
    cropped = make((-1, 2, 1, -1))
    assert lp.lipschitz_bound(cropped, (1, *size)) == pytest.approx(linear_norm(cropped, (1, *size)), rel=1e-12)
    assert lp.lipschitz_bound(nn.ConstantPad2d((1, -1, 2, 0), 7.0)) == 1


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_one_dimensional_convolutions_are_images_of_one_row(mode: str):
    torch.manual_seed(0)
    for size, (kernel, stride, padding, dilation, groups) in product(
        (6, 9), [(3, 1, 1, 1, 1), (3, 2, 1, 1, 2), (2, 1, 2, 2, 1), (4, 3, 0, 1, 2)]
    ):
        module = nn.Conv1d(4, 6, kernel, stride, padding, dilation, groups, padding_mode=mode, dtype=torch.float64)
        truth = linear_norm(module, (4, size))
        assert truth <= lp.lipschitz_bound(module, (4, size)) * (1 + 1e-12)
    long = nn.Conv1d(3, 3, 3, padding=1, padding_mode="zeros", dtype=torch.float64)
    assert lp.lipschitz_bound(long) <= 1.01 * linear_norm(long, (3, 200))


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
    assert lp.lipschitz_bound(lp.ConvexResidual(branch, alpha=0.25)) == pytest.approx(0.75 + 0.25 * 3)
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

    assert lp.lipschitz_bound(Twice(), (3,)) == 4


def forward_of(body) -> nn.Module:
    module_type = type("Foreign", (nn.Module,), {"forward": body})
    return nn.Sequential(nn.ReLU(), module_type())


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), "1 (LayerNorm)"),
        (nn.Sequential(nn.Sequential(nn.Hardshrink())), "0.0 (Hardshrink)"),
        (nn.Sequential(nn.Threshold(0.1, 0.0)), "0 (Threshold)"),
        (nn.Sequential(nn.SiLU(inplace=True)), "0 (SiLU)"),
        (nn.Sequential(nn.RReLU()), "0 (RReLU)"),
        (nn.Sequential(nn.Softplus(threshold=0)), "0 (Softplus)"),
        (nn.Sequential(nn.Dropout()), "0 (Dropout)"),
        (nn.Sequential(nn.BatchNorm2d(4)), "0 (BatchNorm2d)"),
        (nn.Sequential(conv(padding=2, padding_mode="circular")), "0 (Conv2d)"),
        (nn.Sequential(conv(padding=1, stride=2, padding_mode="circular")), "0 (Conv2d)"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(4)), "0 (AdaptiveAvgPool2d)"),
        (nn.Sequential(nn.AdaptiveMaxPool2d(4)), "0 (AdaptiveMaxPool2d)"),
        (nn.Sequential(nn.LPPool2d(2, 2, ceil_mode=True)), "0 (LPPool2d)"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), "the model (ParametrizedLinear)"),
        (forward_of(lambda self, x: x * x), "1 (Foreign)"),
        (forward_of(lambda self, x: x.exp()), "'exp'"),
        (forward_of(lambda self, x: x / x.sum()), "1 (Foreign)"),
        (forward_of(lambda self, x: x if x.sum() > 0 else -x), "cannot be traced"),
        (forward_of(lambda self, x: x[:, [0, 0]]), "'getitem'"),
        (lp.Concatenate([nn.Identity(), nn.LayerNorm(3)]), "paths.1 (LayerNorm)"),
    ],
)
def test_unknown_raises_and_is_named(model, named):
    with pytest.raises(UnknownBoundError) as caught:
        lp.lipschitz_bound(model.train())
    assert named in str(caught.value)
    found = caught.value.obstacles
    assert ("\n" in str(caught.value)) == (len(found) > 1)


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


def foreign(body, **children) -> nn.Module:
    """A custom module with the given forward, children and buffers."""
    module = type("Foreign", (nn.Module,), {"forward": body})()
    for name, child in children.items():
        if isinstance(child, torch.Tensor):
            module.register_buffer(name, child)
        else:
            setattr(module, name, child)
    return module


BROADCASTS = {
    "slice": ((16,), foreign(lambda self, x: x[:, :1] + x)),
    "outer sum": ((8,), foreign(lambda self, x: x[:, None] + x[:, :, None])),
    "onto a buffer": ((16,), foreign(lambda self, x: x[:, :1] + self.b, b=torch.ones(1, 16))),
    "average back": ((2, 4, 4), foreign(lambda self, x: x + self.p(x), p=nn.AdaptiveAvgPool2d(1))),
    "maximum back": ((2, 4, 4), foreign(lambda self, x: self.p(x) - x, p=nn.MaxPool2d(4))),
    "no broadcast": ((5,), foreign(lambda self, x: x + self.b - 2 * x, b=torch.ones(1, 5))),
}


@pytest.mark.parametrize("name", BROADCASTS)
def test_sums_count_what_broadcasting_repeats(name):
    shape, module = BROADCASTS[name]
    assert lp.lipschitz_bound(module, shape) * (1 + 1e-9) >= jacobian_norm(module, shape)
    with pytest.raises(UnknownBoundError, match="pass input_shape"):
        lp.lipschitz_bound(module)


@pytest.mark.parametrize(
    "module",
    [
        lp.ConvexResidual(lp.AOLLinear(16, 1)),
        lp.ConvexResidual(nn.MaxPool2d(4)),
        lp.Normalize([0.5] * 3, [1.0] * 3),
    ],
)
def test_modules_that_would_broadcast_refuse(module):
    shape = (16,) if "Linear" in repr(module) else (1, 4, 4)
    with pytest.raises(ShapeError):
        module(torch.zeros(2, *shape))


def hooked(module: nn.Module, kind: str) -> nn.Module:
    if kind == "forward hook":
        module.register_forward_hook(lambda m, args, out: 10 * out)
    elif kind == "pre-hook":
        module.register_forward_pre_hook(lambda m, args: 10 * args[0])
    else:
        module.forward = lambda x: 10 * x
    return module


@pytest.mark.parametrize("kind", ["forward hook", "pre-hook", "replaced"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(4, 4),
        lambda: lp.AOLLinear(4, 4),
        lambda: nn.Sequential(nn.ReLU()),
        lambda: lp.ConvexResidual(nn.ReLU()),
        lambda: foreign(lambda self, x: x),
    ],
)
def test_changed_modules_are_refused(kind, make):
    for model in (
        hooked(make(), kind),
        nn.Sequential(hooked(make(), kind)),
        foreign(lambda self, x: self.m(x), m=hooked(make(), kind)),
    ):
        with pytest.raises(UnknownBoundError, match="hook"):
            lp.lipschitz_bound(model, (4,))
        with pytest.raises(UnknownBoundError, match="hook"):
            lp.split_head(model, (4,))


def test_weight_norm_of_the_old_kind_is_refused():
    with pytest.raises(UnknownBoundError):
        lp.lipschitz_bound(nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3))))


class Louder(lp.MaxMin):
    def forward(self, x):
        return 10 * super().forward(x)


class PlainSum(lp.ConvexResidual):
    def forward(self, x):
        return x + self.branch(x)


class Warmer(lp.NormalizedLinear):
    def forward(self, x):
        return 10 * super().forward(x)


def test_subclasses_do_not_inherit_a_bound_for_another_forward():
    assert lp.lipschitz_bound(PlainSum(nn.ReLU()), (4,)) == 2  # traced
    for module in (Louder(), Warmer(4, 3)):  # traced, too: 10 times what they inherit
        assert lp.lipschitz_bound(module, (4,)) >= 10
        assert lp.split_head(module, (4,)).body_bound >= 10


@pytest.mark.parametrize(
    "body",
    [
        lambda self, x: torch.div(x, 2.0, rounding_mode="floor"),
        lambda self, x: torch.add(x, x, out=0.1 * x),
        lambda self, x: x / 0,
        lambda self, x: x[:1] + x,
        lambda self, x: x.view(-1),
        lambda self, x: self.g(x, gain=10.0),
    ],
)
def test_arguments_that_change_the_effect_are_refused(body):
    gain = type(
        "Gain", (lp.Scale,), {"forward": lambda self, x, gain=1.0: gain * x, "lipschitz_bound": lambda self: 1.0}
    )
    with pytest.raises(UnknownBoundError):
        lp.lipschitz_bound(foreign(body, g=gain(1.0)), (4,))


def test_autocast_inside_a_forward_is_refused():
    def body(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.m(x)

    with pytest.raises(UnknownBoundError, match="autocast"):
        lp.lipschitz_bound(foreign(body, m=nn.Linear(3, 3)), (3,))


def test_tracing_leaves_no_trace():
    def body(self, x):
        self.kept = x
        return x

    module = foreign(body)
    lp.lipschitz_bound(module, (3,))
    assert not isinstance(getattr(module, "kept", None), torch.fx.Proxy)


def test_margin_constants_are_exact_enough_and_never_below():
    plain = lp.split_head(nn.Identity(), (2,)).margin_lipschitz(2)
    assert plain[0, 1].item() == pytest.approx(math.sqrt(2), rel=1e-15)
    torch.manual_seed(0)
    head = nn.Linear(64, 10).bfloat16()
    W = head.weight.double()
    truth = (W[:, None] - W[None]).norm(dim=-1)
    assert torch.allclose(lp.split_head(head).margin_lipschitz(10), truth, rtol=1e-12)
    with pytest.raises(ShapeError, match="10 rows"):
        lp.split_head(head).margin_lipschitz(9)


def exact_square(row: torch.Tensor, other: torch.Tensor) -> Fraction:
    return sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(row.tolist(), other.tolist(), strict=True))


@pytest.mark.parametrize("scale", [1.0, 1e-170, 1e300, 5e-324, 1e-310])
@pytest.mark.parametrize("kind", ["gaussian", "close", "close in one entry", "huge beside tiny"])
def test_margin_constants_are_not_below_the_exact_ones(scale: float, kind: str):
    torch.manual_seed(0)
    W = torch.randn(5, 33, dtype=torch.float64).clamp(-1, 1)
    if kind == "close":
        W = W[:1] * (1 + 2.0**-50 * torch.randint(0, 9, (5, 33)))
    elif kind == "close in one entry":
        W = W[:1].repeat(5, 1)
        W[:, 7] += torch.arange(5) * 2.0**-52
    elif kind == "huge beside tiny":
        W = W * 10.0 ** torch.arange(0, -330, -10, dtype=torch.float64)
        W[:, 0] = 1
    head = nn.Linear(33, 5, dtype=torch.float64)
    head.weight.data = W * scale
    constants = lp.split_head(nn.Sequential(lp.Scale(0.1), head)).margin_lipschitz(5)
    factor = Fraction(0.1) ** 2
    for y, j in product(range(5), repeat=2):
        exact = factor * exact_square(head.weight.detach()[y], head.weight.detach()[j])
        assert Fraction(constants[y, j].item()) ** 2 >= exact
    assert not constants.diagonal().any()
    constants.sum().backward()
    assert torch.isfinite(head.weight.grad).all()


def test_without_a_head_the_margin_constant_is_not_below_root_two_times_the_bound():
    for factor in (1.0, 0.1, 1e-300, 3.3):
        constant = lp.split_head(lp.Scale(factor)).margin_lipschitz(2)[0, 1].item()
        assert Fraction(constant) ** 2 >= 2 * Fraction(factor) ** 2


def exact_rules() -> dict[str, tuple[nn.Module, Fraction]]:
    """Modules and the squares of their norms."""
    torch.manual_seed(0)
    normal = lp.Normalize([0.0] * 3, [0.3, 0.7, 0.1]).double()
    batch = nn.BatchNorm2d(7).double().eval()
    batch.running_var.uniform_(0.1, 2)
    nn.init.normal_(batch.weight)
    squares = [
        Fraction(w) ** 2 / (Fraction(v) + Fraction(batch.eps))
        for w, v in zip(batch.weight.tolist(), batch.running_var.tolist(), strict=True)
    ]
    near_one = nn.Sequential(*(lp.Scale(1 + k * 2.0**-52) for k in range(1, 200)))
    tenth = Fraction(0.1)
    return {
        "normalize": (normal, 1 / Fraction(normal.std.min().item()) ** 2),
        "batch norm": (batch, max(squares)),
        "average": (nn.AvgPool2d((1, 3)), Fraction(1, 3)),
        "average overlapping": (nn.AvgPool2d(3, 1), Fraction(1)),
        "average divisor": (nn.AvgPool2d(2, divisor_override=7), Fraction(4, 49)),
        "our average": (lp.ScaledAvgPool2d((1, 3)), 3 / Fraction(math.sqrt(3)) ** 2),
        "max": (nn.MaxPool2d((1, 3), 1), Fraction(3)),
        "hard sigmoid": (nn.Hardsigmoid(), Fraction(1, 36)),
        "near one": (near_one, math.prod((Fraction(m.factor) for m in near_one), start=Fraction(1)) ** 2),
        "concatenated": (lp.Concatenate([lp.Scale(0.1), lp.Scale(0.3)]), tenth**2 + Fraction(0.3) ** 2),
        "sum": (Sum(), (tenth * Fraction(0.7) + Fraction(1) / Fraction(3)) ** 2),
    }


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = lp.Scale(0.1)

    def forward(self, x):
        return self.a(x) * 0.7 + x / 3


@pytest.mark.parametrize("name", exact_rules())
def test_rules_and_compositions_are_rounded_upward(name: str):
    module, square = exact_rules()[name]
    bound = Fraction(lp.lipschitz_bound(module, (7 if name == "batch norm" else 3, 6, 6)))
    assert square <= bound**2 <= square * (1 + Fraction(1, 2**50))


def test_tiny_row_differences_do_not_vanish():
    head = nn.Linear(2, 2).double()
    head.weight.data = torch.tensor([[1e-170, 0.0], [0.0, 1e-170]], dtype=torch.float64)
    assert lp.split_head(head).margin_lipschitz(2)[0, 1].item() == pytest.approx(math.sqrt(2) * 1e-170)


@pytest.mark.parametrize("std", [-1.0, 0.0])
def test_damaged_normalisation_never_certifies_more(std):
    model = nn.Sequential(lp.Normalize([0.0], [0.5]))
    model[0].std.fill_(std)
    if std:
        assert lp.lipschitz_bound(model, (1, 2, 2)) == 1
    else:
        with pytest.raises(NonFiniteError):
            lp.lipschitz_bound(model, (1, 2, 2))


# Tables of norms ------------------------------------------------------------------------------------------------------


def test_the_table_of_norms_has_a_row_for_each_explicit_weight():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        lp.MaxMin(),
        lp.AOCConv2d(4, 4, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Sequential(lp.CayleyLinear(36, 8), nn.Linear(8, 3)),
    ).eval()
    model(torch.zeros(1, 3, 6, 6))
    rows = norm_table(model)
    assert [(row.path, row.type) for row in rows] == [
        ("0", "Conv2d"),
        ("2", "AOCConv2d"),
        ("4.0", "CayleyLinear"),
        ("4.1", "Linear"),
    ]
    assert all(0 < row.lower <= row.upper and row.seconds >= 0 for row in rows)
    truth = torch.linalg.matrix_norm(model[4][1].weight.double(), 2).item()
    assert rows[3].lower <= truth * (1 + 1e-13) <= rows[3].upper * (1 + 2e-13)
    assert rows[1].upper == pytest.approx(1, abs=1e-5)
    assert rows[2].upper == pytest.approx(1, abs=1e-5)


def test_the_table_of_norms_names_the_weight_that_is_not_finite():
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    nn.init.constant_(model[1].weight, math.nan)
    with pytest.raises(NonFiniteError, match=r"1 \(Linear\): .*W contains NaN"):
        norm_table(model)


def test_the_benchmark_has_a_row_for_each_family_and_no_bound_below_the_norm(tmp_path, monkeypatch):
    monkeypatch.setattr(bounds, "FAMILIES", {name: lp.FAMILIES[name] for name in ("aol", "bcop", "sll")})
    assert bounds.main(["--quick", "--output", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "bounds_quick.csv")
    assert set(table.family) == {"torch", "aol", "bcop", "sll"}
    assert len(table[(table.family == "bcop") & (table.role == "conv")]) == 1  # it refuses strides
    assert (table.norm <= table.upper * (1 + 1e-12)).all()
    enclosed = table.dropna(subset="lower")
    assert (enclosed.lower <= enclosed.upper).all()
    assert set(enclosed.family) == {"torch", "aol", "bcop"}
    text = (tmp_path / "bounds_quick.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in text for name in ("torch", "aol", "bcop", "sll"))


# Estimates ------------------------------------------------------------------------------------------------------------


def free_network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(lp.FreeResidualConv2dBlock(8, dtype=dtype), lp.MaxMin())
    stem = lp.FreeConv2d(3, 8, 3, padding=1, dtype=dtype)
    head = lp.NormalizedLinear(6, 3, dtype=dtype)
    network = nn.Sequential(stem, lp.MaxMin(), inner, nn.Flatten(), lp.AOLLinear(8 * 36, 6, dtype=dtype), head)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def test_the_estimate_of_a_body_is_close_below_its_bound_and_has_its_gradient():
    network = free_network()
    split = head_splitter(network, (3, 6, 6), estimates=True)

    def logarithm() -> torch.Tensor:
        found = split()
        return (found.body_bound * found.scale).log()

    estimate = logarithm()
    proven = math.log(lp.split_head(network, (3, 6, 6)).body_bound)
    assert proven - 0.04 <= estimate.item() <= proven
    estimate.backward()
    for layer in (network[0], network[2][0]):
        step = 1e-4 * layer.raw.grad
        before = conv_norm_enclosure(layer.effective().detach()).lower
        with torch.no_grad():
            layer.raw.add_(step)
        after = conv_norm_enclosure(layer.effective().detach()).lower
        expected = (layer.raw.grad * step).sum().item()
        assert math.log(after / before) == pytest.approx(expected, rel=0.05)
    assert all(layer.grad is None for layer in network[4].parameters())


def test_a_loss_that_is_given_the_constants_trains_the_scale():
    network = free_network(torch.float32)
    constants = head_splitter(network, (3, 6, 6), estimates=True)().margin_lipschitz(3)
    x, labels = torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 2, 0])
    emma(network(x), labels, constants, epsilon=0.5).backward(inputs=[network[0].raw], retain_graph=True)
    with_constants, network[0].raw.grad = network[0].raw.grad.clone(), None
    emma(network(x), labels, constants.detach(), epsilon=0.5).backward(inputs=[network[0].raw])
    assert (with_constants - network[0].raw.grad).norm() > 1e-3 * with_constants.norm()


def test_a_free_layer_within_a_container_counts_as_a_number():
    layer = lp.FreeConv2d(3, 3, 3, padding=1)
    with torch.no_grad():
        layer.raw.mul_(2)
    model = nn.Sequential(lp.ConvexResidual(layer, alpha=0.5), nn.Flatten(), nn.Linear(48, 2))
    split = head_splitter(model, (3, 4, 4), estimates=True)()
    assert split.scale == 1
    assert split.body_bound == pytest.approx(1.5, rel=0.01)
