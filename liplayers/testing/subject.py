"""What is audited, and what a check says of it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liplayers.bounds import lipschitz_bound
from liplayers.core.module import LipschitzModule
from liplayers.errors import ArgumentError, AuditError, LipschitzError
from liplayers.testing.measure import computed_parts

__all__ = [
    "SIZES",
    "Measured",
    "Refused",
    "Subject",
    "bound_of",
    "expect",
    "expect_dtype",
    "outputs",
    "perturb",
    "refusal",
    "stated_bound",
    "watched",
    "worst",
]

#: The arguments that each role needs.
SIZES = {
    "linear": ("in_features", "out_features"),
    "conv": ("in_channels", "out_channels", "kernel_size"),
    "conv_transpose": ("in_channels", "out_channels", "kernel_size"),
    "dense_block": ("features",),
    "conv_block": ("channels",),
}


class Refused(Exception):  # noqa: N818 - no error: the constructor may refuse what it cannot bound
    """A configuration that the constructor refuses, with its reason."""


@dataclass(frozen=True)
class Measured:
    """The case that came nearest to its bound, or exceeded it by most, and the names of all that exceeded it."""

    measured: float
    bound: float
    where: str = ""
    exceeded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """A constructor in a role of the registry: "linear", "conv", "conv_transpose", "dense_block" or "conv_block"."""

    make: Callable[..., nn.Module]
    role: str
    orthogonal: bool = False

    @property
    def name(self) -> str:
        """Of the class or function, also of one within functools.partial."""
        make = getattr(self.make, "func", self.make)
        return getattr(make, "__name__", type(make).__name__)

    @property
    def nonlinear(self) -> bool:
        return self.role.endswith("_block")

    @property
    def has_images(self) -> bool:
        return "conv" in self.role

    def accepts(self, argument: str) -> bool:
        """Whether the constructor takes an argument of that name."""
        return argument in inspect.signature(self.make).parameters

    def construct(self, *sizes: Any, **arguments: Any) -> Any:
        """The layer.

        Raises:
            Refused: the constructor refuses with an ArgumentError, in one line that names an argument that was given.
        """
        try:
            return self.make(*sizes, **arguments)
        except ArgumentError as error:
            message = str(error)
            given = [*arguments, *SIZES[self.role]]
            expect(any(name in message for name in given), f"an ArgumentError that names no argument: {message}")
            expect("\n" not in message, f"an ArgumentError of several lines: {message}")
            raise Refused(message) from None

    def example(self, dtype: torch.dtype | None = None, **arguments: Any) -> tuple[Any, tuple[int, ...]]:
        """A small layer, the same at each call, and the shape of one input; every family must be able to build it."""
        torch.manual_seed(0)
        arguments = {"dtype": dtype, **arguments}
        if self.role == "linear":
            return self.make(6, 4, **arguments), (6,)
        if self.nonlinear:
            return self.make(6, **arguments), (6, 5, 6) if self.has_images else (6,)
        return self.make(3, 4, 3, padding=1, **arguments), (3, 5, 6)

    def twin(self, layer: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """A new example in eval mode with the same parameters, which has never run."""
        twin, _ = self.example(dtype)
        twin.load_state_dict(layer.state_dict())
        return twin.eval()

    def warm(self) -> tuple[Any, Tensor]:
        """An example in eval mode that has run, so that its weight is kept, and the input that it ran on."""
        layer, shape = self.example()
        x = torch.randn(3, *shape)
        layer.eval()
        outputs(layer, x)
        return layer, x


def expect(condition: bool, message: str) -> None:
    """`assert` that python -O keeps.

    Raises:
        AuditError: the condition does not hold.
    """
    if not condition:
        raise AuditError(message)


def expect_dtype(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """That its parameters are in `dtype`, and its outputs for inputs in it."""
    found = {p.dtype for p in layer.parameters()}
    expect(found == {dtype}, f"dtype={dtype} gives parameters in {sorted(map(str, found))}")
    got = layer(torch.randn(2, *shape, dtype=dtype)).dtype
    expect(got == dtype, f"inputs in {dtype} give outputs in {got}")


def stated_bound(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """The bound that the layer states itself, or that of its parts on inputs of `shape`."""
    return lipschitz_bound(layer, None if isinstance(layer, LipschitzModule) else shape)


def bound_of(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """The bound of the layer, which has to be finite."""
    bound = stated_bound(layer, shape)
    expect(math.isfinite(bound), f"lipschitz_bound() is {bound}")
    return bound


def worst(rows: Iterable[tuple[str, float, float]], tolerance: float) -> Measured:
    """Of (where, measured, bound): whether each measured value is at most its bound · (1 + tolerance), and the worst.

    What is measured may be infinite where the bound is: half precision has no more range.
    """
    exceeded = []
    largest = Measured(0.0, 0.0)
    highest = -math.inf
    for where, measured, bound in rows:
        if not math.isfinite(measured) and not math.isfinite(bound):
            continue
        if not measured <= bound * (1 + tolerance):
            exceeded.append(where)
        quotient = measured / bound if bound else (math.inf if measured else 0.0)
        if not quotient <= highest:
            highest, largest = quotient, Measured(measured, bound, where)
    return Measured(largest.measured, largest.bound, largest.where, tuple(exceeded))


@torch.no_grad()
def perturb(layer: nn.Module, by: float = 0.3) -> None:
    """Move every parameter at random."""
    for p in layer.parameters():
        p.add_(by * torch.randn_like(p))


def outputs(layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer computes, without gradients."""
    with torch.no_grad():
        return layer(x)


def watched(layer: nn.Module, before: Callable[[], None], after: Callable[[Any], None]) -> None:
    """Call `before` and `after` around each computation of a weight."""
    for part in computed_parts(layer):
        original = part.map_weight

        def watching(*key: Any, original: Callable = original) -> Any:
            before()
            weight = original(*key)
            after(weight)
            return weight

        part.map_weight = watching


def refusal(make: Callable[[], object]) -> LipschitzError | None:
    """The ValueError of the family of liplayers that a call raises, in one line; None if it raises nothing."""
    try:
        make()
    except ValueError as error:
        expect(isinstance(error, LipschitzError), f"a {type(error).__name__} that is no LipschitzError: {error}")
        expect("\n" not in str(error), f"an error of several lines: {error}")
        return error  # type: ignore[return-value]
    return None
