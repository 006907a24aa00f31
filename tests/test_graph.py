"""Traced forwards: the bound of each operation against the map itself, and what operations in place change."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import liplayers as lp
from liplayers.bounds import torch_modules
from liplayers.bounds.composition import head_splitter
from liplayers.bounds.rounding import RoundingAnalysis
from liplayers.certification import CertifiedNetwork
from liplayers.errors import LipschitzError, UnknownBoundError

F64 = torch.float64


def traced(body: Callable[..., Any], **parts: Any) -> nn.Module:
    """A module with this forward, and these modules, parameters and buffers, in float64."""
    module = type("Traced", (nn.Module,), {"forward": body})()
    module.register_parameter("unused", nn.Parameter(torch.zeros(())))
    for name, part in parts.items():
        if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
            module.register_buffer(name, part)
        else:
            setattr(module, name, part)
    return module.double().eval()


def leaves(value: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, Tensor) and x.is_floating_point()]


@torch.no_grad()
def steepest(module: nn.Module, shapes: list[tuple[int, ...]], scales: tuple[float, ...] = (0.3, 3.0, 100.0)) -> float:
    """The largest norm of a Jacobian, by differences, and difference quotient, at random points."""
    generator = torch.Generator().manual_seed(0)
    sizes = [math.prod(shape) for shape in shapes]

    def flat(v: Tensor) -> Tensor:
        inputs = [part.clone().view(1, *shape) for part, shape in zip(v.split(sizes), shapes, strict=True)]
        return torch.cat([y.flatten() for y in leaves(module(*inputs))])

    def slopes(x: Tensor) -> Tensor:
        steps = 1e-5 * torch.eye(len(x), dtype=F64)
        return torch.stack([(flat(x + step) - flat(x - step)) / 2e-5 for step in steps], 1)

    found = 0.0
    for scale in scales:
        x = scale * torch.randn(sum(sizes), dtype=F64, generator=generator)
        found = max(found, torch.linalg.matrix_norm(slopes(x), 2).item())
        for step in (1e-3, 1.0, 10.0):
            y = x + step * torch.randn(sum(sizes), dtype=F64, generator=generator)
            found = max(found, ((flat(x) - flat(y)).norm() / (x - y).norm()).item())
    return found


def check(module: nn.Module, *shapes: tuple[int, ...], tight: float | None = None) -> float:
    """The bound is not below what is found, and where it is `tight`, at most that factor above it."""
    bound = lp.lipschitz_bound(module, shapes[0] if len(shapes) == 1 else shapes)
    found = steepest(module, list(shapes))
    assert found <= bound * (1 + 1e-7)
    if tight is not None:
        assert bound <= tight * found
    return bound


# Operations in place --------------------------------------------------------------------------------------------------


def alias(self: nn.Module, x: Tensor) -> Tensor:
    y = x
    y += 3 * F.relu(x)
    return x


def alias_dead(self: nn.Module, x: Tensor) -> Tensor:
    """What is added shows for none of the inputs of a trial."""
    y = x.view(-1, 4)
    y += 5 * F.relu(x - 90)
    return x


def through_identity(self: nn.Module, x: Tensor) -> Tensor:
    y = self.i(x)
    y += 5 * F.relu(x - 90)
    return x


def through_flatten(self: nn.Module, x: Tensor) -> Tensor:
    y = self.i(x)
    y.mul_(5.0)
    return x + y


def slice_added(self: nn.Module, x: Tensor) -> Tensor:
    x[:, :2] += 3 * x[:, 2:]
    return x


def slice_assigned(self: nn.Module, x: Tensor) -> Tensor:
    y = 2 * x
    y[:, 1:3] = 7 * x[:, :1]
    return y


def chunk_scaled(self: nn.Module, x: Tensor) -> Tensor:
    first, second = x[:, :2], x[:, 2:]
    first *= 4
    return torch.cat([x, second], 1)


def nested_views(self: nn.Module, x: Tensor) -> Tensor:
    y = x.view(-1, 2, 2)
    z = y.transpose(1, 2)[:, :1]
    z.mul_(6.0)
    return x + y.flatten(1)


def twice(self: nn.Module, x: Tensor) -> Tensor:
    y = 0.5 * x
    z = y
    y += x
    y += z
    z -= 3 * x
    return y


def filled(self: nn.Module, x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], 6)
    z = y[:, 1:5]
    y[:, 1:5] = 3 * x
    return y + F.pad(z, (1, 1))


def zeros_then_zero_times(self: nn.Module, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y += 0 * x
    return x + (1 / y).clamp(-5, 5)


def reset(self: nn.Module, x: Tensor) -> Tensor:
    y = 100 * x
    y.zero_()
    y.add_(x, alpha=2.0)
    return y


def copied(self: nn.Module, x: Tensor) -> Tensor:
    y = 3 * x
    z = y.view(-1, 2, 2)
    y.copy_(9 * x)
    return z.flatten(1)


def cloned(self: nn.Module, x: Tensor) -> Tensor:
    y = x.clone()
    y *= 9
    return x


def relu_in_place(self: nn.Module, x: Tensor) -> Tensor:
    y = x - 1
    z = F.relu_(y)
    w = F.leaky_relu(y, 3.0, inplace=True)
    return y + z + w


def weighted_then_changed(self: nn.Module, x: Tensor) -> Tensor:
    y = 0.5 * x
    z = 1.0 * x
    half = 0.5 * z
    z *= 8
    half += 0.5 * z
    return half + y


def data(self: nn.Module, x: Tensor) -> Tensor:
    y = 1.0 * x
    y.data.mul_(7.0)
    return y


def expanded(self: nn.Module, x: Tensor) -> Tensor:
    y = x.clone()
    wide = y[:, :1].expand(-1, 4)
    y.mul_(3.0)
    return wide + x


def alternating(self: nn.Module, x: Tensor) -> Tensor:
    for i in range(x.shape[1]):
        x[:, i] += 0.5 * x[:, i - 1]
    return x


IN_PLACE = [
    alias, alias_dead, slice_added, slice_assigned, chunk_scaled, nested_views, twice, filled, reset, copied, cloned,
    relu_in_place, weighted_then_changed, alternating,
]  # fmt: skip


@pytest.mark.parametrize("body", IN_PLACE, ids=lambda body: body.__name__)
def test_later_reads_see_what_was_written_in_place(body: Callable):
    check(traced(body), (4,))
    check(nn.Sequential(nn.Tanh(), traced(body), nn.ReLU()), (4,))


EXPECTED = {alias: 4, slice_added: 4, twice: 6, reset: 2, cloned: 1, copied: 9}


@pytest.mark.parametrize("body", EXPECTED, ids=lambda body: body.__name__)
def test_bounds_after_writes_are_those_of_the_values(body: Callable):
    assert lp.lipschitz_bound(traced(body), (4,)) == pytest.approx(EXPECTED[body], rel=1e-12)


REFUSED = {
    "through a module": traced(through_identity, i=nn.Identity()),
    "through a module, small": traced(through_flatten, i=nn.Flatten()),
    "an expanded tensor": traced(expanded),
    "zero times": traced(zeros_then_zero_times),
    "a buffer": traced(lambda self, x: self.b.copy_(x[0]) + x, b=torch.zeros(4)),
    "a slice of a buffer": traced(lambda self, x: self.b[:, :2].add_(x[:1, :2]) + x, b=torch.zeros(1, 4)),
    "a parameter": traced(lambda self, x: self.p.add_(1.0) * x, p=nn.Parameter(torch.ones(4))),
    "samples": traced(lambda self, x: x.index_fill_(0, torch.tensor([0]), 1.0)),
    "a power": traced(lambda self, x: x.pow_(2)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_writes_of_which_not_all_is_known_are_refused(name: str):
    with pytest.raises(UnknownBoundError):
        lp.lipschitz_bound(REFUSED[name], (4,))


def test_a_module_that_writes_to_its_input_is_seen_by_those_that_call_it():
    """Also where the trial cannot see it, since nothing is added to its inputs."""

    def writes(self: nn.Module, x: Tensor) -> Tensor:
        x += 5 * F.relu(x - 90)
        return x

    def reads_again(self: nn.Module, x: Tensor) -> Tensor:
        h = 1.0 * x
        return self.s(h) + h

    inner = traced(writes)
    assert lp.lipschitz_bound(nn.Sequential(inner, nn.ReLU()), (4,)) == 6
    assert lp.lipschitz_bound(nn.Sequential(nn.Linear(4, 4).double(), nn.Sequential(inner)), (4,)) > 0
    again = traced(reads_again, s=nn.Sequential(nn.Identity(), nn.Sequential(inner)))
    convex = lp.ConvexResidual(nn.Sequential(inner)).double().eval()
    for module in (again, convex):
        with pytest.raises(UnknownBoundError, match="in place"):
            lp.lipschitz_bound(module, (4,))
    fresh = traced(reads_again, s=nn.Sequential(nn.Linear(4, 4).double(), inner))
    check(fresh, (4,))


def test_residual_blocks_as_others_write_them():
    def block(self: nn.Module, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn(self.conv(x)))
        out = self.conv2(out)
        out += identity
        return self.relu(out)

    torch.manual_seed(0)
    conv, conv2 = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.Conv2d(2, 2, 1)
    module = traced(block, conv=conv, conv2=conv2, bn=nn.BatchNorm2d(2), relu=nn.ReLU(inplace=True))
    expected = 1 + math.prod(lp.lipschitz_bound(part, (2, 5, 5)) for part in (module.conv, module.bn, module.conv2))
    assert check(module, (2, 5, 5)) == pytest.approx(expected, rel=1e-12)
    assert lp.lipschitz_bound(nn.Sequential(module, module), (2, 5, 5)) == pytest.approx(expected**2, rel=1e-12)


# Operations -----------------------------------------------------------------------------------------------------------

IMAGE = (4, 4, 6)
W = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
K = torch.randn(3, 4, 2, 3, generator=torch.Generator().manual_seed(2))
V = torch.randn(3, 1, 2, 2, 3, generator=torch.Generator().manual_seed(3))
SIGNED = torch.tensor([0.5, -2.0, 1.0, 3.0]).view(4, 1, 1)

# name: (function of images (4, 4, 6), factor that the bound may be above what is found, None where it may be loose)
OPERATIONS: dict[str, tuple[Callable[[Tensor], Any], float | None]] = {
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), 1.0001),
    "adaptive_avg_pool2d, overlapping": (lambda x: F.adaptive_avg_pool2d(x, (3, 4)), 1.0001),
    "adaptive_avg_pool2d, enlarging": (lambda x: F.adaptive_avg_pool2d(x, (7, 12)), 1.0001),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x.flatten(1, 2), 4), 1.0001),
    "adaptive_avg_pool3d": (lambda x: F.adaptive_avg_pool3d(x[:, None], (3, 1, 4)), 1.0001),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, (3, 3)), None),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), 1.0001),
    "avg_pool2d, overlapping": (lambda x: F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False), None),
    "avg_pool1d": (lambda x: F.avg_pool1d(x.flatten(1, 2), 3), 1.0001),
    "avg_pool3d": (lambda x: F.avg_pool3d(x[:, None], (2, 2, 3)), 1.0001),
    "max_pool2d": (lambda x: F.max_pool2d(x, (2, 3)), 1.0001),
    "max_pool1d, overlapping": (lambda x: F.max_pool1d(x.flatten(1, 2), 3, stride=1), None),
    "max_pool3d": (lambda x: F.max_pool3d(x[:, None], 2), 1.0001),
    "lp_pool2d": (lambda x: F.lp_pool2d(x, 2, 2), 1.0001),
    "pad": (lambda x: F.pad(x, (1, -1, 2, 0), value=3.0), 1.0001),
    "pad, reflect": (lambda x: F.pad(x, (2, 1, 1, 1), "reflect"), 1.0001),
    "pad, replicate": (lambda x: F.pad(x, (2, 1, 1, 3), mode="replicate"), 1.0001),
    "pad, circular": (lambda x: F.pad(x, (6, 1, 0, 3), mode="circular"), 1.0001),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2), 1.0001),
    "interpolate, other size": (lambda x: F.interpolate(x, size=(7, 5)), 1.0001),
    "interpolate, exact": (lambda x: F.interpolate(x, scale_factor=(1.5, 0.5), mode="nearest-exact"), 1.0001),
    "interpolate, bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), 1.0001),
    "interpolate, corners": (lambda x: F.interpolate(x, (9, 3), mode="bilinear", align_corners=True), 1.0001),
    "interpolate, bicubic": (lambda x: F.interpolate(x, (3, 11), mode="bicubic"), 1.0001),
    "interpolate, area": (lambda x: F.interpolate(x, (3, 11), mode="area"), 1.0001),
    "interpolate, linear": (lambda x: F.interpolate(x.flatten(1, 2), scale_factor=2.5, mode="linear"), 1.0001),
    "interpolate, trilinear": (lambda x: F.interpolate(x[:, None], (5, 7, 3), mode="trilinear"), 1.0001),
    "mean": (lambda x: x.mean((2, 3)), 1.0001),
    "mean, kept": (lambda x: torch.mean(x, dim=-1, keepdim=True), 1.0001),
    "sum": (lambda x: x.sum(dim=(1, -2)), 1.0001),
    "mean and back": (lambda x: x + x.mean(2, keepdim=True), 1.0001),
    "mean of a line and back": (lambda x: x.mean(1)[:, None] - x, None),
    "amax": (lambda x: x.amax((2, 3)) - torch.amin(x, dim=(2, 3)), None),
    "max": (lambda x: x.max(dim=2).values + x.min(2, keepdim=False)[0], None),
    "sort": (lambda x: torch.sort(x, 3, descending=True)[0], 1.0001),
    "chunk": (lambda x: x.chunk(2, 1)[0] + 2 * x.chunk(2, dim=1)[1], None),
    "split": (lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1), None),
    "unbind": (lambda x: [3 * y for y in x.unbind(2)][1], 1.0001),
    "stack": (lambda x: torch.stack([x, 2 * x, torch.zeros_like(x)], 1), 1.0001),
    "cat": (lambda x: torch.cat((x, -3 * x), dim=-1), 1.0001),
    "maximum": (lambda x: torch.maximum(x, 2 * x.flip(3)), None),
    "clamp": (lambda x: x.clamp(-1, 1) + torch.clamp(x, min=0.5), None),
    "clamp between tensors": (lambda x: x.clamp(min=SIGNED.to(x.dtype) - 3), 1.0001),
    "gelu": (lambda x: F.gelu(x), 1.02),
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), 1.02),
    "sigmoid": (lambda x: x.sigmoid() + torch.sigmoid(x), 1.05),
    "softplus": (lambda x: F.softplus(x, 2.0), 1.01),
    "silu": (lambda x: F.silu(x), 1.02),
    "hardswish": (lambda x: F.hardswish(x), 1.1),
    "hardtanh": (lambda x: F.hardtanh(x, -0.5, 2.0) + F.relu6(x), 1.01),
    "leaky_relu": (lambda x: F.leaky_relu(x, -2.5), 1.01),
    "elu": (lambda x: F.elu(x, 3.0, inplace=False), 1.15),
    "tanh": (lambda x: torch.tanh(x) + x.tanh(), 1.05),
    "softmax": (lambda x: x.softmax(-1), None),
    "softmax of pairs": (lambda x: F.softmax(x.view(-1, 12, 2, 4), dim=2), 1.05),
    "log_softmax": (lambda x: F.log_softmax(x, 1), 1.3),
    "roll": (lambda x: x.roll((1, 2), dims=(1, -1)) + x, 1.0001),
    "flip": (lambda x: x.flip(1, 2) - torch.flip(x, [3]), 1.0001),
    "pixel_shuffle": (lambda x: F.pixel_unshuffle(2 * F.pixel_shuffle(x, 2), 2), 1.0001),
    "linear": (lambda x: F.linear(x, W.to(x.dtype), W.to(x.dtype)[:, 0]), 1.01),
    "matmul": (lambda x: x @ W.to(x.dtype).T + torch.matmul(x, W.to(x.dtype)[:1].T), None),
    "matmul from the left": (lambda x: torch.ones(3, 4, dtype=x.dtype) @ x, 1.001),
    "conv2d": (lambda x: F.conv2d(x, K.to(x.dtype), padding=1), 1.3),
    "conv1d": (lambda x: F.conv1d(x.flatten(2), K.to(x.dtype).flatten(2), stride=2), 1.3),
    "conv3d": (lambda x: F.conv3d(x[:, None], V.to(x.dtype), dilation=(2, 1, 1)), None),
    "conv_transpose2d": (lambda x: F.conv_transpose2d(x, K.to(x.dtype).transpose(0, 1), stride=2, groups=1), 1.3),
    "batch_norm": (lambda x: F.batch_norm(x, SIGNED.to(x.dtype).view(4), SIGNED.to(x.dtype).abs().view(4)), 1.0001),
    "prelu": (lambda x: F.prelu(x, SIGNED.to(x.dtype).view(4)), 1.01),
    "views": (
        lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 2).transpose(1, -1).unsqueeze(1).squeeze(1),
        1.0001,
    ),
    "slices": (lambda x: 3 * x[:, 1:, ::2, 0] + x[..., 1:4, :3, None].squeeze(-1)[:, :3, :2, 1], None),
    "expand": (lambda x: x[:, :1].expand(-1, 5, 4, 6), 1.0001),
    "repeat": (lambda x: x.repeat(1, 2, 1, 3), 1.0001),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, dim=2), 1.0001),
    "products with constants": (lambda x: (x - 0.3) * SIGNED.to(x.dtype) / 0.5, 1.0001),
    "quotient by constants": (lambda x: x / SIGNED.to(x.dtype), 1.0001),
    "product that broadcasts": (lambda x: x[:, :1] * SIGNED.to(x.dtype), None),
    "alpha": (lambda x: torch.add(x, x.flip(1), alpha=3) - torch.sub(x, x, alpha=-2.0), None),
    "rsub": (lambda x: 1 - torch.rsub(x, 2 * x.flip(3), alpha=2), None),
    "dropout": (lambda x: F.dropout(x, 0.5, training=False), 1.0001),
    "conversions": (lambda x: x.to(x.dtype).contiguous().clone().detach(), 1.0001),
    "a loop over the channels": (lambda x: sum(x[:, i : i + 1] for i in range(x.shape[1])), None),
    "sizes": (lambda x: x.view(x.size(0), x.shape[1] // 2, -1) / math.sqrt(x.shape[-1]), 1.0001),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_bound_of_an_operation_is_above_its_slopes(name: str):
    function, tight = OPERATIONS[name]
    check(traced(lambda self, x: function(x)), IMAGE, tight=tight)


NOT_ROUNDED = {"lp_pool2d": "aten.pow"}


@pytest.mark.parametrize("name", OPERATIONS)
@torch.no_grad()
def test_the_rounding_of_an_operation_is_counted_or_named(name: str):
    """In float32, without the help of a bound, against float64."""
    function, _ = OPERATIONS[name]
    module = traced(lambda self, x: function(x)).float()
    analysis = RoundingAnalysis(module, IMAGE, {"": 1e9}, torch.float32)
    if name in NOT_ROUNDED:
        with pytest.raises(UnknownBoundError, match=NOT_ROUNDED[name]):
            analysis.at(1.0)
        return
    x = torch.randn(40, *IMAGE, generator=torch.Generator().manual_seed(4))
    x = x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * 0.999
    for norm in (1e-3, 5.0, 300.0):
        found, given = analysis.at(norm), norm * x
        run, exact = module(given), module(given.double())
        assert (run.double() - exact).flatten(1).norm(dim=1).max() <= found.error < 0.1 * (norm + 1)
        assert exact.flatten(1).norm(dim=1).max() <= found.magnitude


MIXING: dict[str, Callable[[Tensor], Any]] = {
    "softmax": lambda x: x.softmax(0),
    "softmax from the end": lambda x: x.softmax(-4),
    "mean": lambda x: x + x.mean(0, keepdim=True),
    "mean from the end": lambda x: x - x.mean(-4, keepdim=True),
    "mean of all": lambda x: x - x.mean(),
    "roll": lambda x: x.roll(1, 0),
    "roll of all": lambda x: x.roll(1),
    "flip": lambda x: x.flip(0),
    "flip from the end": lambda x: x.flip(-4),
    "sort": lambda x: x.sort(0)[0],
    "cat": lambda x: torch.cat([x, x], 0)[: x.shape[0]],
    "cat from the end": lambda x: torch.cat([x, x], -4)[: x.shape[0]],
    "stack": lambda x: torch.stack([x, x]).flatten(0, 1)[::2],
    "amax": lambda x: x - x.amax(0, keepdim=True),
    "transposed": lambda x: x.transpose(0, 1).softmax(1).transpose(0, 1),
    "some samples": lambda x: x + x[:1],
    "all as one": lambda x: x.reshape(1, -1).cumsum(1).view(x.shape),
    "padded": lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[1:],
    "expanded": lambda x: x[:1].expand(x.shape[0], -1, -1, -1),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_the_samples_of_a_batch_is_refused(name: str):
    with pytest.raises(UnknownBoundError):
        lp.lipschitz_bound(traced(lambda self, x: MIXING[name](x)), IMAGE)


WITHOUT_CONSTANT: dict[str, Callable[[Tensor], Any]] = {
    "product": lambda x: x * x.flip(1),
    "quotient": lambda x: 1 / (x + 5),
    "positions": lambda x: x.sort(1)[1] * 1.0,
    "positions of maxima": lambda x: x.max(1).indices * 1.0,
    "integers": lambda x: x.to(torch.int64) * 1.0,
    "long": lambda x: x.long().double(),
    "half": lambda x: x.to(torch.bfloat16).double(),
    "half by name": lambda x: x.to(dtype=torch.float16).double(),
    "rounding": lambda x: torch.div(x, 0.1, rounding_mode="trunc"),
    "floor division": lambda x: x // 2,
    "variable bounds": lambda x: x.clamp(max=x.flip(1) * 2),
    "dropout": lambda x: F.dropout(x, 0.0),
    "batch statistics": lambda x: F.batch_norm(x, None, None, training=True),
    "glu": lambda x: F.glu(x, 1),
    "softplus that jumps": lambda x: F.softplus(x, 1, 2),
    "index": lambda x: x[:, torch.tensor([0, 0])],
    "matrix of the input": lambda x: x @ x.transpose(2, 3),
    "weight of the input": lambda x: F.linear(x, x[0, 0]),
    "infinity": lambda x: (x * math.inf).clamp(-1, 1),
    "bits": lambda x: x.view(torch.int64) * 1.0,
    "dtype of another": lambda x: x.to(torch.zeros(1, dtype=torch.int64)) * 1.0,
    "p-norm": lambda x: F.normalize(x),
    "in the output": lambda x: torch.add(x, x, out=x.clone()),
    "power": lambda x: x**2,
    "antialias": lambda x: F.interpolate(x, (2, 3), mode="bilinear", antialias=True),
}


@pytest.mark.parametrize("name", WITHOUT_CONSTANT)
def test_what_has_no_constant_or_none_that_is_known_is_refused(name: str):
    with pytest.raises(UnknownBoundError):
        lp.lipschitz_bound(traced(lambda self, x: WITHOUT_CONSTANT[name](x)), IMAGE)


# Modules --------------------------------------------------------------------------------------------------------------

LINE, VOLUME = (3, 10), (2, 4, 5, 4)
MODULES: dict[str, tuple[nn.Module, tuple[int, ...], float | None]] = {
    "upsample": (nn.Upsample(scale_factor=3), IMAGE, 1.0001),
    "upsample, uneven": (nn.Upsample((5, 15)), IMAGE, 1.0001),
    "upsample, bilinear": (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), IMAGE, 1.0001),
    "upsample, bicubic": (nn.Upsample((6, 3), mode="bicubic"), IMAGE, 1.0001),
    "upsample a line": (nn.Upsample(scale_factor=2.5, mode="linear"), LINE, 1.0001),
    "upsample a volume": (nn.Upsample(scale_factor=2, mode="trilinear"), VOLUME, 1.0001),
    "upsampling": (nn.UpsamplingBilinear2d(scale_factor=2), IMAGE, 1.0001),
    "softplus": (nn.Softplus(3.0), IMAGE, 1.01),
    "softmax": (nn.Softmax(-1), (2,), 1.1),
    "softmax of channels": (nn.Softmax2d(), (2, 2, 2), 1.2),
    "softmin": (nn.Softmin(1), (3,), None),
    "log softmax": (nn.LogSoftmax(1), (5,), 1.1),
    "adaptive average, not dividing": (nn.AdaptiveAvgPool2d((3, 5)), IMAGE, 1.0001),
    "adaptive average of a line": (nn.AdaptiveAvgPool1d(4), LINE, 1.0001),
    "adaptive average of a volume": (nn.AdaptiveAvgPool3d((3, None, 2)), VOLUME, 1.0001),
    "adaptive maximum of a line": (nn.AdaptiveMaxPool1d(3), LINE, None),
    "adaptive maximum of a volume": (nn.AdaptiveMaxPool3d(2), VOLUME, None),
    "average of a line": (nn.AvgPool1d(3, 1), LINE, None),
    "average of a volume": (nn.AvgPool3d((2, 1, 2)), VOLUME, 1.0001),
    "maximum of a line": (nn.MaxPool1d(2, 1), LINE, None),
    "maximum of a volume": (nn.MaxPool3d(2), VOLUME, 1.0001),
    "convolution of a volume": (nn.Conv3d(2, 3, 2, (2, 1, 1), padding=1), VOLUME, None),
    "circular convolution of a volume": (nn.Conv3d(2, 2, 3, padding=1, padding_mode="circular"), VOLUME, None),
    "transposed convolution of a line": (nn.ConvTranspose1d(3, 2, 3, 2), LINE, 1.3),
    "transposed convolution of a volume": (nn.ConvTranspose3d(2, 3, 2, 2, groups=1), VOLUME, None),
    "padding a line": (nn.ReflectionPad1d((2, 3)), LINE, 1.0001),
    "padding a volume": (nn.ReplicationPad3d((1, 0, 2, 1, 0, 1)), VOLUME, 1.0001),
    "cropping a volume": (nn.ConstantPad3d((-1, 0, 2, 1, 0, 1), 2.0), VOLUME, 1.0001),
    "dropout": (nn.Sequential(nn.Dropout2d(), nn.AlphaDropout()), IMAGE, 1.0001),
    "batch normalisation of volumes": (nn.BatchNorm3d(2), VOLUME, 1.0001),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_the_bound_of_a_module_is_above_its_slopes_and_its_rounding_is_counted(name: str):
    module, shape, tight = MODULES[name]
    bound = check(module.double().eval(), shape, tight=tight)
    single = nn.Sequential(module.float()).eval()
    x = torch.randn(20, *shape, generator=torch.Generator().manual_seed(4))
    x = x / x.flatten(1).norm(dim=1).view(-1, *[1] * len(shape)) * 4.9
    found = RoundingAnalysis(single, shape, {"": bound, "0": bound}, torch.float32).at(5.0)
    with torch.no_grad():
        run, exact = single(x), single.double()(x.double())
    assert (run.double() - exact).flatten(1).norm(dim=1).max() <= found.error < 0.01
    assert exact.flatten(1).norm(dim=1).max() <= found.magnitude


@pytest.mark.parametrize("module", [nn.Softmax(0), nn.Softmax(-2), nn.Softmax(None), nn.GLU(), nn.Softplus(1, 5)])
def test_modules_without_a_constant_are_refused(module: nn.Module):
    with pytest.raises(UnknownBoundError):
        lp.lipschitz_bound(module, (4,))


def test_what_softplus_jumps_by_is_counted_as_rounding():
    """At its threshold torch's Softplus falls by 2e-9."""
    module = nn.Sequential(nn.Softplus()).double().eval()
    below, above = torch.tensor([[20.0]], dtype=F64), torch.tensor([[20 + 1e-12]], dtype=F64)
    jump = (module(below) - module(above)).item()
    assert jump > 1e-9
    assert jump <= 2 * RoundingAnalysis(module, (1,)).at(32.0).error < 1e-8


# Constants ------------------------------------------------------------------------------------------------------------


def test_parameters_and_buffers_are_constants():
    torch.manual_seed(0)
    mean, std, gamma = torch.rand(4, 1, 1), torch.rand(4, 1, 1) + 0.2, nn.Parameter(torch.randn(4, 1, 1))
    module = traced(lambda self, x: self.g * ((x - self.mean) / self.std), mean=mean, std=std, g=gamma)
    expected = gamma.abs().max().item() / std.min().item()
    assert check(module, IMAGE) == pytest.approx(expected, rel=1e-6)
    layer_scale = traced(lambda self, x: x + F.relu(x) * self.g.view(1, -1, 1, 1), g=gamma)
    assert check(layer_scale, IMAGE) == pytest.approx(1 + gamma.abs().max().item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(), (4, 1, 1), (4, 4, 6)])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_learned_convex_sums(shape: tuple[int, ...], scale: float):
    torch.manual_seed(1)

    def body(self: nn.Module, x: Tensor) -> Tensor:
        a = torch.sigmoid(self.a)
        return a * self.f(x) + (1 - a) * x

    module = traced(body, a=nn.Parameter(scale * torch.randn(shape)), f=nn.Sequential(lp.Scale(-1.0), nn.ReLU()))
    bound = check(module, IMAGE)
    assert bound <= (1 + 1e-9) * (math.sqrt(2) if shape else 1.0)


def test_a_bound_follows_the_weights():
    """The structure is understood once, the weights are those of the moment."""
    module = traced(
        lambda self, x: self.head(F.linear(x, self.w * self.g)),
        w=nn.Parameter(torch.eye(4)), g=torch.ones(1), head=nn.Linear(4, 2),
    )  # fmt: skip
    split = head_splitter(module, (4,))
    assert split().body_bound == pytest.approx(1, rel=1e-9)
    with torch.no_grad():
        module.w.mul_(3)
        module.g.mul_(2)
    assert split().body_bound == pytest.approx(6, rel=1e-9)


def test_the_value_of_a_parameter_may_decide():
    module = traced(lambda self, x: 2 * x if self.p > 0 else 3 * x, p=nn.Parameter(torch.ones(())))
    assert lp.lipschitz_bound(module, (4,)) == 2
    split = head_splitter(module, (4,))
    with torch.no_grad():
        module.p.fill_(-1)
    assert lp.lipschitz_bound(module, (4,)) == 3
    assert split().body_bound == 3


# Several inputs and outputs -------------------------------------------------------------------------------------------


def test_several_inputs_have_the_joint_norm():
    module = traced(lambda self, x, y: torch.cat([3 * x, 4 * y], 1))
    assert check(module, (3,), (2,)) == pytest.approx(5)
    named = traced(lambda self, x, other: x + 2 * other["y"])
    bound = lp.lipschitz_bound(named, {"x": (3,), "other": {"y": (3,)}})
    assert math.sqrt(5) <= bound == 3
    assert lp.lipschitz_bound(named, ((3,), {"y": (3,)})) == bound
    mixed = traced(lambda self, x, y: x + y[:1])
    with pytest.raises(UnknownBoundError):
        lp.lipschitz_bound(mixed, ((3,), (3,)))


def test_several_outputs_have_the_joint_norm():
    assert check(traced(lambda self, x: (3 * x, {"a": [4 * x]})), (3,)) == pytest.approx(5)
    assert check(traced(lambda self, x: [x, x]), (3,), tight=1.0001) == pytest.approx(math.sqrt(2))
    with pytest.raises(UnknownBoundError):
        lp.lipschitz_bound(traced(lambda self, x: (x, x.mean(0))), (3,))


def test_behind_an_embedding_the_bound_is_that_of_what_follows():
    torch.manual_seed(0)

    def body(self: nn.Module, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        h = self.words(tokens) + self.places(positions)
        return self.head(F.relu(h).mean(1))

    head = nn.Linear(8, 3).double()
    module = traced(body, words=nn.Embedding(10, 8), places=nn.Embedding(6, 8), head=head)
    expected = lp.lipschitz_bound(head) / math.sqrt(6)
    for shape in ((6,), torch.zeros(6, dtype=torch.long)):
        assert lp.lipschitz_bound(module, shape) == pytest.approx(expected)
    assert lp.lipschitz_bound(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), (3,)) > 0
    with pytest.raises(UnknownBoundError, match="max_norm"):
        lp.lipschitz_bound(nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)), (3,))
    with pytest.raises(LipschitzError, match="embedding"):
        CertifiedNetwork(module, (6,), 3)


# Wrappers -------------------------------------------------------------------------------------------------------------


def test_wrappers_are_taken_off():
    inner = nn.Sequential(lp.Scale(3.0))
    for wrapped in (nn.DataParallel(inner), AveragedModel(inner), torch.compile(inner, backend="eager")):
        assert lp.lipschitz_bound(wrapped, (4,)) == 3
        assert lp.layer_bounds(wrapped, (4,)) == {"0": 3.0, "": 3.0}
    classifier = AveragedModel(nn.Sequential(nn.Linear(4, 2)))
    assert CertifiedNetwork(classifier, (4,), 2).radius(torch.rand(1, 4)).item() > 0
    with pytest.raises(UnknownBoundError, match=r"module.compile\(\)"):
        lp.lipschitz_bound(nn.Sequential(torch.compile(inner, backend="eager")), (4,))


# Certificates ---------------------------------------------------------------------------------------------------------


class OthersNetwork(nn.Module):
    """With what other people's networks have: sums in place, functional calls, buffers, learned gains."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1))
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv, self.norm, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.gain = nn.Parameter(torch.full((4, 1, 1), 0.3))
        self.up = nn.Upsample(scale_factor=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.stem((x - self.mean) / self.std))
        out = self.gain * self.norm(self.conv(h))
        out += h
        out = F.max_pool2d(F.gelu(out), 2)
        out[:, :2] += F.interpolate(F.adaptive_avg_pool2d(out, 1), out.shape[-2:])[:, 2:]
        out = F.softplus(F.avg_pool2d(self.up(out), 2))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


def test_certificates_of_a_network_as_others_write_it_hold():
    torch.manual_seed(0)
    network = CertifiedNetwork(OthersNetwork().eval(), (3, 8, 8), 3)
    x = torch.rand(12, 3, 8, 8, dtype=F64)
    logits, radius = network.logits_and_radius(x)
    assert (radius > 0).all()
    top, rival = logits.topk(2, 1).indices.T
    for sign in (1.0, 0.999999):  # towards the nearest other class, to the end of the ball
        moved = x.clone().requires_grad_()
        for _ in range(20):
            margin = network(moved).gather(1, top[:, None]) - network(moved).gather(1, rival[:, None])
            (slope,) = torch.autograd.grad(margin.sum(), moved)
            step = moved - x - slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            length = (sign * radius / step.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
            moved = (x + step * length).detach().requires_grad_()
        assert torch.equal(network(moved).argmax(1), top)


def test_what_has_a_bound_and_no_rule_for_rounding_is_refused_by_name():
    module = traced(lambda self, x: self.head(F.lp_pool2d(x, 2, 2).flatten(1)), head=nn.Linear(24, 2))
    assert lp.lipschitz_bound(module, IMAGE) > 0
    with pytest.raises(UnknownBoundError, match=r"aten\.pow"):
        CertifiedNetwork(module, IMAGE, 2).radius(torch.rand(1, *IMAGE))


# Explanations ---------------------------------------------------------------------------------------------------------


class Obstructed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()
        self.blocks = nn.Sequential(lp.AOLConv2d(4, 4, 3, padding=1), nn.Hardshrink(), lp.ConvexResidual(nn.Tanh()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.act(self.conv(x)))
        h = h + self.blocks(h)
        return (h * torch.softmax(h, 1)).mean((2, 3)).exp()


def test_an_explanation_has_every_part_and_all_obstacles_before_any_norm(monkeypatch: pytest.MonkeyPatch):
    def no_norm(*args: object, **kwargs: object) -> None:
        raise AssertionError("a norm was computed")

    for name in ("norm_enclosure", "conv_norm_enclosure"):
        monkeypatch.setattr(torch_modules, name, no_norm)
    model = Obstructed().eval()
    found = lp.explain(model, (3, 8, 8))
    assert not found
    assert not found.ok
    names = [(row.path, row.name, row.ok) for row in found.rows]
    assert names == [
        ("conv", "Conv2d", True), ("act", "ReLU", True), ("norm", "GroupNorm", False),
        ("blocks.0", "AOLConv2d", True), ("blocks.1", "Hardshrink", False), ("blocks.2", "ConvexResidual", True),
        ("blocks.2.branch", "Tanh", True), ("", "add", True), ("", "softmax", True), ("", "mul", False),
        ("", "mean", True), ("", "exp", False),
    ]  # fmt: skip
    bounds = {row.name: row.bound for row in found.rows}
    assert bounds["ReLU"] == bounds["Tanh"] == 1
    assert bounds["softmax"] == 0.5
    assert bounds["mean"] == pytest.approx(1 / 6)
    assert bounds["Conv2d"] is None
    assert all(row.reason and row.instead for row in found.rows if not row.ok)
    with pytest.raises(UnknownBoundError) as caught:
        lp.lipschitz_bound(model, (3, 8, 8))
    assert caught.value.obstacles == found.obstacles
    assert {o.path for o in found.obstacles} == {"", "norm", "blocks.1"}
    text = str(found)
    assert all(str(obstacle) in text for obstacle in found.obstacles)
    assert list(found.to_frame().name) == [row.name for row in found.rows]


def test_an_explanation_may_have_the_norms():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), traced(lambda self, x: 2 * x).float())
    assert lp.explain(model, (4,)).bound is None
    found = lp.explain(model, (4,), norms=True)
    assert found
    assert found.bound == lp.lipschitz_bound(model, (4,))
    assert [row.bound for row in found.rows] == [lp.lipschitz_bound(model[0]), 1, 2]


def test_what_does_not_run_or_is_not_finite_is_an_obstacle():
    found = lp.explain(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), (5,))
    assert [o.path for o in found.obstacles] == ["1", ""]
    model = nn.Sequential(nn.Linear(4, 3))
    nn.init.constant_(model[0].bias, math.nan)
    [obstacle] = lp.explain(model, (4,)).obstacles
    assert "NaN" in obstacle.reason
