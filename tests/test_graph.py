"""Traced forwards: the bound of each operation against the map itself, and what operations in place change."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import liplayers as lp
from liplayers.errors import UnknownBoundError

F64 = torch.float64


def traced(body: Callable[..., Any], **parts: Any) -> nn.Module:
    """A module with this forward, and these modules, parameters and buffers, in float64."""
    module = type("Traced", (nn.Module,), {"forward": body})()
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
