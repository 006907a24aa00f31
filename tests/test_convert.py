"""Models of others become certifiable twins, or every obstacle is named."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import liplayers as lip
from liplayers import convert, freeze, from_torch, lipschitz_bound
from liplayers.certification import CertifiedNetwork
from liplayers.conversion import ConvexSum, Rewritten, ScaledCat
from liplayers.errors import ArgumentError, ShapeError, UnknownBoundError
from liplayers.testing.measure import operator_norm

SHAPE = (3, 8, 8)


class Block(nn.Module):
    """As torchvision's residual block, with the sum written in one of several ways."""

    def __init__(self, channels: int, stride: int = 1, write: str = "+=") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else None
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.write == "+=":
            y += identity
        elif self.write == "add_":
            y.add_(identity)
        else:
            y = torch.add(y, identity)
        return self.relu(y)


class Residual(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 7, 2, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
            Block(4), Block(4, 2, "add_"), Block(4, 1, "add"),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(4, 4),
        )  # fmt: skip


class Dense(nn.Module):
    """As DenseNet's block: what its layers take is a list."""

    class Layer(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(channels)
            self.conv = nn.Conv2d(channels, 4, 3, padding=1)

        def forward(self, features: list[Tensor]) -> Tensor:
            return self.conv(F.relu(self.norm(torch.cat(features, 1))))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Dense.Layer(3 + 4 * i) for i in range(3))
        self.head = nn.Linear(15, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return self.head(F.adaptive_avg_pool2d(torch.cat(features, 1), 1).flatten(1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.middle = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.out(torch.cat([skip, self.up(self.middle(skip))], dim=1)).mean((2, 3))


def mobile() -> nn.Module:
    """Depthwise and grouped convolutions, and an activation with slopes above 1."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, 1, 1, groups=2), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


NETWORKS = {"residual": Residual, "dense": Dense, "unet": UNet, "mobile": mobile}
FRESH = {"conv": "aol", "weights": "fresh"}
PROJECTED = {"conv": "aol", "linear": "cayley", "activation": "keep"}


def steepest(model: nn.Module, shape: tuple[int, ...]) -> float:
    """The largest norm of the Jacobian at some random inputs, in float64."""
    model = copy.deepcopy(model).double()
    inputs = (scale * torch.randn(1, *shape, dtype=torch.float64) for scale in (0.1, 1.0, 10.0))
    jacobians = (torch.autograd.functional.jacobian(model, x).flatten(2).flatten(0, 1) for x in inputs)
    return max(torch.linalg.matrix_norm(J.flatten(1), 2).item() for J in jacobians)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def statistics(model: nn.Module) -> nn.Module:
    """As after some training: its normalizations have means, variances and gains of their own."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (("running_mean", -1, 1), ("running_var", 0.5, 2), ("weight", 0.2, 3)):
                nn.init.uniform_(getattr(module, tensor), low, high)
            nn.init.uniform_(module.bias, -1, 1)
    return model


@pytest.mark.parametrize(
    ("name", "settings"),
    [("residual", PROJECTED), ("residual", FRESH), ("dense", FRESH), ("unet", PROJECTED), ("mobile", PROJECTED)],
)
def test_a_twin_trains_and_is_as_steep_as_its_bound_at_most(name: str, settings: dict):
    model = statistics(NETWORKS[name]())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    twin, report = convert(model, SHAPE, **settings)
    assert twin.training
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert 0.97 < report.bound < 1.04, "what a layer of norm 1 each composes to"

    optimizer = torch.optim.Adam(twin.parameters(), 3e-2)
    x = torch.randn(8, *SHAPE)
    for _ in range(4):  # towards steep directions
        optimizer.zero_grad()
        result = twin(x)
        (-result.var(0).sum()).backward()
        optimizer.step()
    assert all(p.grad is not None for p in twin.parameters())

    frozen = freeze(twin, SHAPE)
    torch.testing.assert_close(frozen(x), twin.eval()(x), rtol=1e-4, atol=1e-5)
    bound = lipschitz_bound(frozen, SHAPE)
    assert steepest(frozen, SHAPE) <= bound * (1 + 1e-9)
    assert bound <= report.bound * (1 + 1e-5)


@pytest.mark.parametrize("name", ["residual", "dense"])
def test_a_twin_copies_pickles_and_certifies(name: str):
    twin, _ = convert(NETWORKS[name](), SHAPE, conv="aol", weights="fresh")
    x = torch.rand(2, *SHAPE)
    expected = twin.eval()(x)
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert torch.equal(other(x), expected)
    fresh, _ = convert(NETWORKS[name](), SHAPE, conv="aol", weights="fresh")
    fresh.load_state_dict(twin.state_dict())
    assert torch.equal(fresh.eval()(x), expected)
    network = CertifiedNetwork(twin, SHAPE, num_classes=expected.shape[1])
    assert network.bounds.split.body_bound < 1.01
    radius = network.radius(x)
    for _ in range(3):  # no perturbation that is shorter changes the class
        noise = torch.randn_like(x)
        moved = x + 0.999 * radius.view(-1, 1, 1, 1) * noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        assert torch.equal(network(moved).argmax(1), network(x).argmax(1))


def test_batch_normalization_is_folded_into_the_layer_before_it():
    """Where the weights are members already, nothing but the gains' sizes changes."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Linear(5, 5), nn.BatchNorm2d(4)).eval()
    model = statistics(model)
    with torch.no_grad():
        model[0].weight.copy_(nn.init.orthogonal_(torch.empty(4, 4))[..., None, None])
        nn.init.orthogonal_(model[2].weight)
        for norm in (model[1], model[3]):
            norm.weight.copy_((norm.running_var + norm.eps).sqrt())  # gains of 1
    twin, report = convert(model, (4, 5, 5))
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-3, atol=1e-3)
    assert [row.distance is not None for row in report.rows] == [True, False, True, False]
    assert max(row.distance for row in report.rows if row.distance is not None) < 1e-3


def test_the_report_says_what_became_of_each_module():
    twin, report = convert(mobile(), SHAPE)
    rows = {row.path: row for row in report.rows}
    assert [rows[name].became for name in "014"] == ["AOCConv2d", "BatchCentering", "MaxMin"]
    assert rows["3"].became == "RescaledConv2d"
    assert "fallback" in rows["3"].note
    assert rows["7"].became == "AvgPool2d → Scale"
    assert rows["0"].distance > 0
    assert set(report.records()[0]) == {"path", "was", "became", "bound", "distance", "note"}
    assert report.bound == lipschitz_bound(twin.eval(), SHAPE)
    assert "RescaledConv2d" in str(report)
    assert "fresh" in {row.path: row for row in convert(mobile(), SHAPE, conv="soc")[1].rows}["0"].note


def test_what_is_given_decides():
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 4), nn.Tanh())
    kept, report = convert(model, (3,), activation="keep")
    assert isinstance(kept[1], nn.Sequential)
    assert isinstance(kept[3], nn.Tanh)
    assert report.bound <= 1
    swapped, report = convert(model, (7, 3))
    assert swapped[1].dim == -1, "behind a linear layer the channels are last"
    assert "last of 5 channels" in report.rows[1].note
    twin, _ = convert(Residual(), SHAPE, conv="aol", weights="fresh", learned_sums=True)
    logits = [p for key, p in twin.named_parameters() if key.endswith("logit")]
    assert len(logits) == 3
    assert twin[4].sum.logit in set(logits)


class Scaled(nn.Module):
    """Parameters and buffers that its forward reads, and a tensor that is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.position = nn.Parameter(torch.randn(4))
        self.register_buffer("offset", torch.ones(4))
        self.plain = torch.full((4,), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.position) + self.offset + (x - self.plain)


def test_tensors_of_a_module_stay_with_the_code():
    model = Scaled()
    twin, _ = convert(model, (4,), linear="aol")
    assert isinstance(twin, Rewritten)
    assert repr(twin).startswith("Scaled(")
    assert {"position", "offset"} <= twin.state_dict().keys()
    x = torch.randn(2, 4)
    linear = twin.linear(x + model.position)
    torch.testing.assert_close(twin(x), (linear + 1 + (x - 2)) / 2, msg="sums with constants stay, the last is convex")


def test_unchanged_classes_stay():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).flatten(1)

    twin, _ = convert(Plain(), (4,))
    assert type(twin) is Plain
    assert isinstance(twin.linear, lip.BjorckLinear)


def test_shared_modules_stay_shared_and_tied_weights_tied():
    layer = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = layer.weight
    twin, report = convert(nn.Sequential(layer, nn.ReLU(), layer, tied), (4,))
    assert twin[0] is twin[2]
    assert twin[3] is not twin[0]
    assert twin[3].raw is twin[0].raw
    assert report.bound == 1
    other = nn.Conv2d(4, 4, 1)
    layer.weight = other.weight = nn.Parameter(torch.randn(4, 4, 1, 1)[..., 0, 0])
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert convert(model, (4,))[1].bound == 1


def test_layers_of_ours_stay_and_what_is_in_containers_is_converted():
    ours = lip.AOLLinear(4, 4)
    model = nn.Sequential(ours, lip.ConvexResidual(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), lip.Scale(0.5))
    twin, report = convert(model, (4,))
    assert torch.equal(twin[0].raw, ours.raw)
    assert isinstance(twin[1].branch[0], lip.BjorckLinear)
    assert report.bound <= 0.5 + 1e-6


@pytest.mark.parametrize(("kind", "shape"), [(nn.Conv1d, (6, 9)), (nn.ConvTranspose1d, (6, 9))])
def test_convolutions_in_one_dimension(kind: type[nn.Module], shape: tuple[int, ...]):
    model = kind(6, 4, 3, stride=2, padding=1)
    twin, report = convert(model, shape, conv="aol")
    x = torch.randn(2, *shape)
    assert twin(x).shape == model(x).shape
    assert operator_norm(copy.deepcopy(twin).double(), shape) <= report.bound * (1 + 1e-9)
    assert report.rows[0].distance is not None


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class Control(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = 1 * x
        half = x[:, :2]
        half.relu_()
        return x


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


OBSTACLES = {
    "product": (Gate(), (4,), "as squeeze-and-excitation does"),
    "control flow": (Control(), (4,), "test_convert.py:"),
    "in place": (Writes(), (4,), "write out of place"),
    "attention": (Attention(), (3, 4), "which has no constant"),
    "layer norm": (nn.LayerNorm(4), (4,), "no useful constant"),
    "padding": (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), (4, 5, 5), "use 'zeros'"),
    "three dimensions": (nn.Conv3d(4, 4, 3), (4, 5, 5, 5), "three dimensions"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_an_obstacle_is_named_with_its_path(name: str):
    part, shape, reason = OBSTACLES[name]
    model = nn.Sequential(nn.Identity(), nn.Sequential(part))
    with pytest.raises(UnknownBoundError, match=r"1\.0.*") as caught:
        convert(model, shape)
    assert reason in str(caught.value)
    assert all(obstacle.path.startswith("1.0") for obstacle in caught.value.obstacles)


def test_all_obstacles_are_named_at_once_and_can_be_replaced():
    model = nn.Sequential(nn.LayerNorm(4), Gate(), nn.Linear(4, 4), nn.GroupNorm(2, 4))
    with pytest.raises(UnknownBoundError, match="3 obstacles") as caught:
        convert(model, (4,))
    assert [obstacle.path for obstacle in caught.value.obstacles] == ["0", "1", "3"]
    _, report = convert(
        model, (4,), replace={nn.LayerNorm: lambda norm: nn.Identity(), "1": lambda m: lip.MaxMin(), "3": nn.Identity}
    )
    assert report.bound == 1
    assert report.rows[1].note == "by replace"


def test_arguments_are_checked():
    model = nn.Sequential(nn.Linear(4, 4))
    for arguments in ({"activation": "relu"}, {"weights": "old"}, {"conv": "nope"}, {"replace": {1: nn.Identity}}):
        with pytest.raises((ArgumentError, LookupError)):
            convert(model, (4,), **arguments)
    with pytest.raises(ShapeError, match="does not run"):
        convert(model, (5,))
    depthwise = nn.Conv2d(4, 4, 3, groups=4)
    with pytest.raises(UnknownBoundError, match="fallback="):
        convert(depthwise, (4, 5, 5), fallback=None)


def test_merging_stays_within_the_largest_bound():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(ConvexSum(0.25)(a, b), 0.75 * a + 0.25 * b)
    both = ScaledCat(2)(a, b)
    assert both.norm() <= max(a.norm(), b.norm()) * 2**0.5
    torch.testing.assert_close(both * 2**0.5, torch.cat([a, b], 1))
    with pytest.raises(ArgumentError, match="strictly"):
        ConvexSum(1.0, learnable=True)


def test_a_layer_from_one_of_torchs():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    layer = from_torch(conv, "aol")
    assert type(layer) is lip.AOLConv2d
    assert layer.stride == (2, 2)
    assert torch.equal(layer.bias, conv.bias)
    cosine = F.cosine_similarity(layer.weight.flatten(), conv.weight.flatten(), dim=0)
    assert cosine > 0.8
    with pytest.raises(ArgumentError, match="expected one of Linear"):
        from_torch(nn.ReLU(), "aol")
    with pytest.raises(ArgumentError, match="no dense weight"):
        from_torch(conv, "soc")


@pytest.mark.parametrize("parametrization", ["orthogonal", "spectral_norm", "weight_norm"])
def test_torchs_parametrizations_are_bounded_by_the_weight_that_runs(parametrization: str):
    parametrize = getattr(nn.utils.parametrizations, parametrization)
    model = nn.Sequential(parametrize(nn.Linear(4, 6)), nn.ReLU(), parametrize(nn.Linear(6, 4, bias=False)))
    model(torch.randn(3, 4))
    model.eval()
    norms = [torch.linalg.matrix_norm(layer.weight.detach().double(), 2).item() for layer in (model[0], model[2])]
    bound = lipschitz_bound(model, (4,))
    assert norms[0] * norms[1] <= bound * (1 + 1e-12)
    assert bound <= norms[0] * norms[1] * (1 + 1e-4)
    frozen = freeze(model)
    assert type(frozen[0]) is nn.Linear
    assert lipschitz_bound(frozen, (4,)) == pytest.approx(bound, rel=1e-6)
    x = torch.randn(2, 4)
    torch.testing.assert_close(frozen(x), model(x))
    assert torch.isfinite(CertifiedNetwork(model, (4,), num_classes=4).radius(x)).all()
    twin, report = convert(model, (4,))
    assert isinstance(twin[0], lip.BjorckLinear)
    assert report.rows[0].distance < (1e-3 if parametrization == "orthogonal" else 1)


def test_a_parametrization_that_may_change_at_each_call_has_no_bound():
    class Noisy(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + torch.randn_like(weight)

    noisy = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(noisy, "weight", Noisy())
    with pytest.raises(UnknownBoundError, match="Noisy"):
        lipschitz_bound(noisy, (4,))
    with pytest.raises(ArgumentError, match="Noisy"):
        freeze(noisy)
    with pytest.raises(UnknownBoundError, match="eval"):
        lipschitz_bound(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), (4,))
