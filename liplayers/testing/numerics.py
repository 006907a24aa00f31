"""Checks of the layer contract in numbers: gradients of every kind, and precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from liplayers.core.module import LipschitzModule
from liplayers.errors import NonFiniteError
from liplayers.testing.extremes import settings
from liplayers.testing.measure import computed_parts, executed_in_double, worst_norm
from liplayers.testing.subject import (
    Measured,
    Refused,
    Subject,
    bound_of,
    expect,
    expect_dtype,
    perturb,
    stated_bound,
    watched,
    worst,
)

__all__ = ["NUMERICS"]

# Gradients ------------------------------------------------------------------------------------------------------------


def gradients_reach_the_parameters(subject: Subject, mode: str) -> None:
    layer, x = subject.warm()
    layer.train(mode == "training")
    layer(x).square().sum().backward()
    # a multiplier may have no effect at a symmetric start, but it must be in the graph
    broken = [name for name, p in layer.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    expect(not broken, f"no finite gradient for {', '.join(broken)}")


def gradients_at_extreme_parameters(subject: Subject, dtype: torch.dtype) -> None:
    layer, shape = subject.example(dtype)
    x = torch.randn(2, *shape, dtype=dtype)
    broken = []
    for setting in settings(layer):
        layer.zero_grad()
        with torch.enable_grad():
            y = layer(x)
            # a bound that grows with the parameters would overflow the square, not the layer
            (y / max(1.0, bound_of(layer, shape))).square().mean().backward()
        found = [n for n, p in layer.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
        if found or not torch.isfinite(y).all():
            broken.append(f"{setting}: {', '.join(found) or 'output'}")
    expect(not broken, f"not finite: {'; '.join(broken)}")


def gradcheck(subject: Subject) -> None:
    """Gradients against difference quotients."""
    torch.manual_seed(1)
    sizes = {"linear": (3, 2), "dense_block": (3,), "conv_block": (2,)}.get(subject.role, (2, 2, 2))
    shape = (2, 3, 3) if subject.has_images else (3,)
    try:
        layer = subject.construct(*sizes, dtype=torch.float64)
    except Refused:  # an even kernel
        layer = subject.make(2, 2, 3, padding=1, dtype=torch.float64)
    perturb(layer)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(run, (x, *layer.parameters()), atol=1e-6)


def _loss_of(layer: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, values, (x,)).pow(3).sum()

    return loss


def second_derivatives(subject: Subject) -> None:
    """Right, or raising: gradients written by hand lack their own, and torch.func would not notice."""
    layer, shape = subject.example(torch.float64)
    perturb(layer)
    values = {name: p.detach() for name, p in layer.named_parameters()}
    along = {name: torch.randn_like(p) for name, p in values.items()}
    loss = _loss_of(layer, torch.randn(2, *shape, dtype=torch.float64))

    def slope(values: dict[str, Tensor]) -> Tensor:
        gradient = torch.func.grad(loss)(values)
        return torch.stack([(gradient[name] * along[name]).sum() for name in values]).sum()

    def moved(step: float) -> dict[str, Tensor]:
        return {name: p + step * along[name] for name, p in values.items()}

    try:
        second = torch.func.grad(slope)(values)
    except NotImplementedError as error:
        expect("differentiated again" in str(error), f"NotImplementedError: {error}")
        return
    curvature = torch.stack([(second[name] * along[name]).sum() for name in values]).sum()
    expected = (slope(moved(1e-5)) - slope(moved(-1e-5))) / 2e-5
    torch.testing.assert_close(curvature, expected, rtol=1e-4, atol=1e-4)


def gradients_of_each_sample(subject: Subject) -> None:
    """By torch.func: vmap of grad, and jacrev."""
    layer, shape = subject.example(torch.float64)
    perturb(layer)
    values = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(3, *shape, dtype=torch.float64)

    def one(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return _loss_of(layer, sample[None])(values)

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(values, x)
    together = torch.func.jacrev(lambda values: torch.stack([one(values, sample) for sample in x]))(values)
    for name in values:
        torch.testing.assert_close(each[name], together[name])


# Precision ------------------------------------------------------------------------------------------------------------


def _half_twin(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A float64 copy that runs what the layer's weights are after rounding to `dtype`, where they are real.

    Complex transfer matrices never run in half precision: no such transform exists.
    """

    def cast(value: Any) -> Any:
        return value if not isinstance(value, Tensor) or value.is_complex() else value.to(dtype).double()

    double = executed_in_double(layer)
    for part in double.modules():
        if type(part).__module__.startswith("torch.nn."):  # whose weights autocast rounds
            for p in part.parameters(recurse=False):
                p.data = cast(p.data)
    for part in computed_parts(double):
        part.effective = lambda *key, inner=part.effective: tree_map(cast, inner(*key))
    return double


def _half_bound(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """Infinite where the weights are beyond the range of half precision, which must not pretend to be bounded."""
    try:
        return stated_bound(layer, shape)
    except NonFiniteError:
        return math.inf


def autocast(subject: Subject, dtype: torch.dtype) -> Measured:
    """Weights are computed in float32 without autocast, and the bound counts their rounding to `dtype`."""
    layer, shape = subject.example()
    perturb(layer)
    seen: list[torch.dtype] = []

    def before() -> None:
        expect(not torch.is_autocast_enabled("cpu"), "map_weight runs under autocast")

    watched(layer, before, lambda w: seen.extend(v.dtype for v in tree_leaves(w) if isinstance(v, Tensor)))
    with torch.autocast("cpu", dtype):
        layer(torch.randn(2, *shape)).float().square().sum().backward()
        if isinstance(layer, LipschitzModule):
            layer.lipschitz_bound()
    expect(all(d.itemsize >= 4 for d in seen), f"weights are computed in {sorted(map(str, set(seen)))}")
    finite = all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in layer.parameters())
    expect(finite, "gradients are missing or not finite")
    for part in computed_parts(layer):
        part.__dict__.pop("map_weight", None)
    layer.eval()

    def rows() -> Iterator[tuple[str, float, float]]:
        # what float16 adds to bfloat16 is its range: a third of the settings show it
        for setting in islice(settings(layer), 0, None, 1 if dtype is torch.bfloat16 else 3):
            with torch.autocast("cpu", dtype):
                bound = _half_bound(layer, shape)
            yield setting, worst_norm(_half_twin(layer, dtype), shape, subject.nonlinear), bound

    return worst(rows(), 1e-5)


def half_precision(subject: Subject, dtype: torch.dtype) -> Measured:
    """Layers in `dtype` count the rounding of their weight."""
    layer, shape = subject.example(dtype)
    expect_dtype(layer, shape, dtype)
    layer.eval()

    def rows() -> Iterator[tuple[str, float, float]]:
        for setting in settings(layer):
            if all(torch.isfinite(p).all() for p in layer.parameters()):  # within the range of the dtype
                bound = _half_bound(layer, shape)
                yield setting, worst_norm(_half_twin(layer, dtype), shape, subject.nonlinear), bound

    return worst(rows(), 1e-5)


def weights_without_tf32(subject: Subject) -> None:
    """A bound proven in float32 says nothing of a weight that was computed in TF32 or bfloat16."""
    layer, shape = subject.example()
    mkldnn: Any = torch.backends.mkldnn
    backends = [mkldnn.matmul, mkldnn.conv]  # those of the CPU
    seen: list[str] = []
    watched(layer, lambda: seen.extend(backend.fp32_precision for backend in backends), lambda weight: None)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32"
        layer(torch.randn(2, *shape))
        left = {backend.fp32_precision for backend in backends}
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
    expect(left == {"tf32"}, "a forward pass changes torch's precision settings")
    expect(set(seen) <= {"ieee"}, f"weights are computed in {sorted(set(seen))}")


#: Checks, and what they are run for.
NUMERICS: dict[Callable[..., Measured | None], tuple] = {
    gradients_reach_the_parameters: ("training", "evaluation"),
    gradients_at_extreme_parameters: (torch.float64, torch.float32),
    gradcheck: (),
    second_derivatives: (),
    gradients_of_each_sample: (),
    autocast: (torch.bfloat16, torch.float16),
    half_precision: (torch.bfloat16, torch.float16),
    weights_without_tf32: (),
}
