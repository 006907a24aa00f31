"""From layers with parametrisations to plain weights, and from those to torch.export, ONNX and safetensors.

`freeze` computes every weight once. What becomes what is stated for the base classes that families share, so that a
new family freezes by itself; one with another computation implements the method `frozen`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from liplayers.bounds.composition import _record_shapes
from liplayers.bounds.torch_modules import Shape
from liplayers.core.intact import is_changed
from liplayers.core.module import LipschitzModule
from liplayers.core.weights import ParametrizedModule
from liplayers.errors import ArgumentError
from liplayers.layers.bases.dense import LipschitzLinear
from liplayers.layers.bases.fourier import FourierConv2d
from liplayers.layers.bases.kernel import KernelConv2d, LipschitzConvTranspose2d
from liplayers.layers.bases.lmi import Conv2dLMIBlock, DenseLMIBlock
from liplayers.layers.bases.residual import Conv2dBlock, DenseBlock
from liplayers.layers.lipnext import LipNeXtBlock
from liplayers.layers.soc import SOCConv2d
from liplayers.modules.activations import Householder
from liplayers.modules.containers import Residual
from liplayers.modules.frozen import (
    FrozenFourierConv2d,
    FrozenHouseholder,
    FrozenLMIBlock,
    FrozenPolynomialConv2d,
    FrozenResidual,
    FrozenResidualBlock,
    Placement,
    constant,
)
from liplayers.modules.offsets import PositionEmbedding

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
        ArgumentError: a layer that freezing knows nothing about, hooks or torch's parametrizations, a missing
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
    check_plain(model)
    if dtype is not None:
        model = copy.deepcopy(model).to(dtype)
    shapes = {} if input_shape is None else _record_shapes(model, tuple(input_shape))
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
            rule = _rule(module)
            if rule is not None:
                self.done[id(module)] = rule(module, self)
        except ArgumentError as error:
            raise ArgumentError(f"{path or 'the model'} ({type(module).__name__}): {error}") from None

    def copied(self, module: nn.Module) -> Any:
        """A copy, with what was frozen in the place of each layer in it."""
        return copy.deepcopy(module, self.done)

    def image(self, module: nn.Module) -> Size:
        """The size of the images that a layer was seen to run on."""
        if self.input_shape is None:
            raise ArgumentError(
                "its weights depend on the size of the image; call freeze(model, input_shape=(C, H, W))"
            )
        sizes = {shape[-2:] for shape in self.shapes.get(module, ())}
        if len(sizes) != 1:
            found = f"images of the sizes {', '.join(map(str, sorted(sizes)))}" if sizes else "no image"
            raise ArgumentError(
                f"got {found} for inputs of shape {tuple(self.input_shape)}, and can be frozen for one size; "
                f"use one layer for each size, or one with an explicit kernel such as AOCConv2d"
            )
        ((height, width),) = sizes
        return height, width


def check_plain(model: nn.Module) -> None:
    """Raise ArgumentError where a copy of a model, or what replaces a module, would silently lose or keep something."""
    for path, module in model.named_modules():
        reason = None
        if is_changed(module):
            reason = "it has forward hooks, or a replaced forward, method or __call__, which freezing cannot keep"
        elif is_parametrized(module):
            reason = "it has parametrizations of torch: call torch.nn.utils.parametrize.remove_parametrizations"
        if reason is not None:
            raise ArgumentError(f"{path or 'the model'} ({type(module).__name__}): {reason}")


Rule = Callable[[Any, _Freezer], nn.Module]
PLAIN = (PositionEmbedding, FrozenFourierConv2d, FrozenPolynomialConv2d)  # their parameters are what runs


def _rule(module: nn.Module) -> Rule | None:
    """The rule of the nearest class that has one; None for what is copied.

    Raises:
        ArgumentError: a layer of ours with parameters and no rule, or one that computes otherwise than its rule says.
    """
    order = type(module).__mro__
    owner = next((cls for cls in order if cls in RULES or ("frozen" in vars(cls) and cls is not LipschitzModule)), None)
    if owner is None:
        parametrised = isinstance(module, ParametrizedModule) or (
            isinstance(module, LipschitzModule) and module._parameters and type(module) not in PLAIN
        )
        if parametrised:
            raise ArgumentError("it has parameters and no rule for freezing: give it a method frozen(shape)")
        return None
    for method in ("forward", "convolve", "_run"):
        computes = next((cls for cls in order if method in vars(cls)), owner)
        if not issubclass(owner, computes):
            raise ArgumentError(
                f"its {method} is not that of {owner.__name__}, which freezing knows: give it a method frozen(shape)"
            )
    return RULES[owner] if "frozen" not in vars(owner) else _own_rule


def _own_rule(module: LipschitzModule, freezer: _Freezer) -> nn.Module:
    shapes = freezer.shapes.get(module, {None})
    if len(shapes) != 1:
        raise ArgumentError(f"got inputs of several shapes, {', '.join(map(str, shapes))}; it can be frozen for one")
    frozen = module.frozen(*shapes)
    if any(isinstance(part, ParametrizedModule) for part in frozen.modules()):
        raise ArgumentError("its method frozen(shape) left a parametrisation in what it returned")
    return frozen


# What becomes what ----------------------------------------------------------------------------------------------------


def _filled(module: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """A module of torch, built on the meta device without a bias, with these weights."""
    module.weight = constant(weight)
    module.bias = None if bias is None else constant(bias)
    return module


def _dense(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    return _filled(nn.Linear(in_features, out_features, bias=False, device="meta"), weight, bias)


def _linear(layer: LipschitzLinear, freezer: _Freezer) -> nn.Linear:
    return _dense(layer.effective(), layer.bias)


def _kernel_conv(layer: KernelConv2d, freezer: _Freezer) -> nn.Conv2d:
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    mode: Any = layer.padding_mode
    conv = nn.Conv2d(*sizes, layer.groups, False, mode, device="meta")  # it pads as ours, for "same" too
    return _filled(conv, layer.effective(), layer.bias)


def _conv_transpose(layer: LipschitzConvTranspose2d, freezer: _Freezer) -> nn.ConvTranspose2d:
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
    conv = nn.ConvTranspose2d(*sizes, layer.output_padding, layer.groups, False, layer.dilation, device="meta")
    return _filled(conv, layer.weight, layer.bias)


def _placed(layer: FourierConv2d, freezer: _Freezer) -> tuple[Size, Size]:
    image = freezer.image(layer)
    return image, layer.output_size(*image)


def _fourier_conv(layer: FourierConv2d, freezer: _Freezer) -> FrozenFourierConv2d:
    image, out = _placed(layer, freezer)
    pads, grid, start = layer.place(image, out)
    placement = Placement(image, (pads[0], pads[1]), layer.stride, start, out)
    return FrozenFourierConv2d(layer.effective(*grid), layer.bias, grid, placement)


def _soc_conv(layer: SOCConv2d, freezer: _Freezer) -> nn.Module:
    if layer.padding_mode == "circular":
        return _fourier_conv(layer, freezer)
    image, out = _placed(layer, freezer)
    pads, start = layer.frame(image, out)
    placement = Placement(image, (pads[0], pads[1]), layer.stride, start, out)
    channels = (layer.in_channels, layer.out_channels)
    return FrozenPolynomialConv2d(layer.effective(), layer._coefficients, *channels, layer.bias, placement)


def _dense_block(block: DenseBlock, freezer: _Freezer) -> FrozenResidualBlock:
    W, V = block.effective()
    return FrozenResidualBlock(
        [_dense(W, block.bias)], freezer.copied(block.activation), _dense(-V.mT, None), nn.Identity()
    )


def _conv_block(block: Conv2dBlock, freezer: _Freezer) -> FrozenResidualBlock:
    W, V = block.effective()
    mode: Any = block.padding_mode

    def conv(kernel: Tensor, bias: Tensor | None) -> nn.Conv2d:
        out, channels, k, _ = kernel.shape
        plain = nn.Conv2d(channels, out, k, padding=k // 2, bias=False, padding_mode=mode, device="meta")
        return _filled(plain, kernel, bias)

    # the adjoint of a convolution that keeps the image's size is the one with the flipped, transposed kernel
    adjoint = rearrange(V, "h c a b -> c h a b").flip(-2, -1)
    return FrozenResidualBlock(
        [conv(W, block.bias)], freezer.copied(block.activation), conv(-adjoint, None), nn.Identity()
    )


def _lmi_block(
    block: DenseLMIBlock | Conv2dLMIBlock,
    layers: Sequence[nn.Module],
    multipliers: Sequence[Tensor],
    lipschitz: float,
    freezer: _Freezer,
) -> FrozenLMIBlock:
    n = len(block.sizes) - 1
    skip = layers[n + 1] if len(layers) > n + 1 else None
    activation = freezer.copied(block.activation)
    return FrozenLMIBlock(layers[:n], activation, layers[n], skip, multipliers, lipschitz, block.sector)


def _dense_lmi_block(block: DenseLMIBlock, freezer: _Freezer) -> FrozenLMIBlock:
    biases = [*block._hidden_biases(), block.bias, None]
    layers = [_dense(weight, bias) for weight, bias in zip(block.effective(), biases, strict=False)]
    return _lmi_block(block, layers, block.explicit_weights().multipliers, block.target(), freezer)


def _conv_lmi_block(block: Conv2dLMIBlock, freezer: _Freezer) -> FrozenLMIBlock:
    image = freezer.image(block)
    s = (block.stride, block.stride)
    pads, size, grid = block.place(image)
    whole = Placement(grid, ((0, 0), (0, 0)), (1, 1), (0, 0), grid)
    first = Placement(image, pads, s, (0, 0), grid)
    last = Placement(grid, ((0, 0), (0, 0)), (1, 1), (0, 0), size)
    skip = Placement(image, pads, s, (0, 0), size)
    places = [first, *[whole] * (len(block.sizes) - 2), last, skip]
    biases = [*block._hidden_biases(), block.bias, None]
    weights = zip(block.effective(*grid), biases, places, strict=False)
    layers = [FrozenFourierConv2d(transfer, bias, grid, place) for transfer, bias, place in weights]
    multipliers = block.explicit_weights(1, 1).multipliers  # the same at every frequency of every grid
    return _lmi_block(block, layers, multipliers, block.lipschitz, freezer)


def _householder(activation: Householder, freezer: _Freezer) -> FrozenHouseholder:
    return FrozenHouseholder(activation.effective(), activation.channels, activation.dim)


def _lipnext_block(block: LipNeXtBlock, freezer: _Freezer) -> nn.Sequential:
    def pointwise(matrix: Tensor, bias: Tensor | None) -> nn.Conv2d:
        plain = nn.Conv2d(block.channels, block.channels, 1, bias=False, device="meta")
        return _filled(plain, matrix[:, :, None, None], bias)

    mixed, rotation = block.effective()
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if block.position is not None:
        parts["position"] = PositionEmbedding(block.position.shape, device="meta")
        parts["position"].position = constant(block.position)
    parts["rotation"] = pointwise(rotation, None)
    parts["shift"] = freezer.copied(block.shift)
    parts["mixing"] = pointwise(mixed, block.bias)
    parts["activation"] = freezer.copied(block.activation)
    return nn.Sequential(parts)


def _residual(container: Residual, freezer: _Freezer) -> FrozenResidual:
    return FrozenResidual(freezer.copied(container.branch), container.logit.sigmoid().view(()))


RULES: dict[type[nn.Module], Rule] = {
    LipschitzLinear: _linear,
    KernelConv2d: _kernel_conv,
    LipschitzConvTranspose2d: _conv_transpose,
    FourierConv2d: _fourier_conv,
    SOCConv2d: _soc_conv,
    DenseBlock: _dense_block,
    Conv2dBlock: _conv_block,
    DenseLMIBlock: _dense_lmi_block,
    Conv2dLMIBlock: _conv_lmi_block,
    Householder: _householder,
    LipNeXtBlock: _lipnext_block,
    Residual: _residual,
}


# To files -------------------------------------------------------------------------------------------------------------
