"""From layers with parametrisations to plain weights, and from those to torch.export, ONNX and safetensors.

`freeze` computes every weight once. The base classes that families share state what becomes of a layer, so a new family
freezes by itself. A layer with another computation implements the method `frozen`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from liplayers.bounds.inputs import record_shapes
from liplayers.bounds.torch_modules import Shape
from liplayers.bounds.wrappers import unwrapped
from liplayers.core.intact import is_changed
from liplayers.core.module import LipschitzModule
from liplayers.core.parametrized import unknown_parametrization, without_parametrizations
from liplayers.core.weights import ParametrizedModule
from liplayers.errors import ArgumentError
from liplayers.modules.frozen import (
    FrozenFourierConv2d,
    FrozenPolynomialConv2d,
)
from liplayers.modules.offsets import BatchCentering, PositionEmbedding

__all__ = ["freeze"]

Size = tuple[int, int]


def freeze(model: nn.Module, input_shape: Shape | None = None, *, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of `model` with every weight computed once: equal in eval mode up to rounding, without parametrisations.

    Dense layers become nn.Linear, convolutions with an explicit kernel nn.Conv2d, those per frequency hold their
    transfer matrices for one size of image, residual blocks their explicit weights. What has no parametrisation is
    copied; shared modules stay shared. The copy is in eval mode, without gradients; `lipschitz_bound` proves its bound
    from its weights.

    The weights that run are those of `model`, in its dtype: `freeze(model).double()` holds float32 weights exactly and
    multiplies by them in float64, while `freeze(model, dtype=torch.float64)` computes the weights themselves in float64
    from the raw parameters.

    Args:
        model: any module; layers of liplayers anywhere in it.
        input_shape: of one input, without the batch dimension. Needed for layers per frequency and `SOCConv2d`; the
            model is then run once on zeros, and the frozen layers accept the image sizes of that run only.
        dtype: of the computation and the weights, that of `model` by default.

    Raises:
        ArgumentError: a layer that freezing knows nothing about, hooks or parametrizations of others, a missing
            input_shape, a layer that runs on images of several sizes; by path and type.
        ShapeError: the model does not accept inputs of input_shape.

    >>> from liplayers import AOLLinear, MaxMin
    >>> freeze(nn.Sequential(AOLLinear(4, 6), MaxMin()))
    Sequential(
      (0): Linear(in_features=4, out_features=6, bias=True)
      (1): MaxMin(dim=1)
    )
    """
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise ArgumentError(f"freeze: dtype={dtype!r}; expected a floating point dtype of torch")
    model = unwrapped(model)
    check_plain(model)
    if dtype is not None:
        model = copy.deepcopy(model).to(dtype)
    if any(map(is_parametrized, model.modules())):
        model = without_parametrizations(copy.deepcopy(model).eval())
    shapes = {} if input_shape is None else record_shapes(model, tuple(input_shape))
    freezer = _Freezer(shapes, input_shape)
    with torch.no_grad():
        freezer.visit(model, "")
    frozen = freezer.copied(model).eval().requires_grad_(False)
    for parameter in frozen.parameters():
        parameter.grad = None
    return frozen


class _Freezer:
    """One walk over a model, children first. `done` maps ids to what was made of them, as copy.deepcopy's memo."""

    def __init__(self, shapes: dict[nn.Module, set], input_shape: Shape | None) -> None:
        self.shapes = shapes
        self.input_shape = input_shape
        self.done: dict[int, Any] = {}
        self.seen: set[nn.Module] = set()

    def visit(self, module: nn.Module, path: str) -> None:
        if module in self.seen:
            return
        self.seen.add(module)
        for name, child in module.named_children():
            self.visit(child, f"{path}.{name}" if path else name)
        try:
            if _freezes(module):
                self.done[id(module)] = self.copied(self.frozen(module))
        except ArgumentError as error:
            raise ArgumentError(f"{path or 'the model'} ({type(module).__name__}): {error}") from None

    def frozen(self, module: Any) -> nn.Module:
        shapes = self.shapes.get(module, set())
        if module.frozen_for_one_shape and self.input_shape is not None and len(shapes) != 1:
            found = f"inputs of the shapes {', '.join(map(str, sorted(shapes)))}" if shapes else "no input"
            raise ArgumentError(
                f"got {found} for those of shape {tuple(self.input_shape)} of the model, and can be frozen for one; "
                f"use one layer for each, or one with an explicit kernel such as AOCConv2d"
            )
        frozen = module.frozen(next(iter(shapes)) if len(shapes) == 1 else None)
        if any(isinstance(part, ParametrizedModule) and id(part) not in self.done for part in frozen.modules()):
            raise ArgumentError("its method frozen(shape) left a parametrisation in what it returned")
        return frozen

    def copied(self, module: nn.Module) -> Any:
        """A copy, with what was frozen in the place of each layer in it."""
        return copy.deepcopy(module, self.done)


def check_plain(model: nn.Module) -> None:
    """Raise ArgumentError where a copy of a model, or what replaces a module, would silently lose or keep something."""
    for path, module in model.named_modules():
        reason = None
        if is_changed(module):
            reason = "it has forward hooks, or a replaced forward, method or __call__, which freezing cannot keep"
        elif (unknown := unknown_parametrization(module)) is not None:
            reason = (
                f"its parametrization {unknown} is not one of torch's orthogonal, spectral_norm and weight_norm: call "
                f"torch.nn.utils.parametrize.remove_parametrizations"
            )
        if reason is not None:
            raise ArgumentError(f"{path or 'the model'} ({type(module).__name__}): {reason}")


# their parameters are what runs
PLAIN = (BatchCentering, PositionEmbedding, FrozenFourierConv2d, FrozenPolynomialConv2d)
_COMPUTES = ("forward", "convolve", "run")


def _freezes(module: nn.Module) -> bool:
    """Whether something else is put in its place; False for what is copied.

    Raises:
        ArgumentError: a layer of ours with parameters that does not say what replaces it, or whose forward is not that
            of the class that says so.
    """
    order = type(module).__mro__
    owner = next((cls for cls in order if "frozen" in vars(cls) and cls is not LipschitzModule), None)
    if owner is None:
        parametrised = isinstance(module, LipschitzModule) and module._parameters and type(module) not in PLAIN
        if parametrised or isinstance(module, ParametrizedModule):
            raise ArgumentError("it has parameters and no rule for freezing: give it a method frozen(shape)")
        return False
    for method in _COMPUTES:
        computes = next((cls for cls in order if method in vars(cls)), owner)
        if not issubclass(owner, computes):
            raise ArgumentError(
                f"its {method} is not that of {owner.__name__}, which freezing knows: give it a method frozen(shape)"
            )
    return True
