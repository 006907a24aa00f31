"""The same layers of other libraries, by family and role: the only place that names another library's classes.

Only the same method counts as the same layer. Each peer gets torch's arguments and the use that its documentation or
torch's recommends: training inside `torch.nn.utils.parametrize.cached()`, which spares those a second computation that
read their weight twice; in evaluation, exported to torch's plain layer where that is documented, else `.eval()`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from liplayers.errors import ArgumentError

PACKAGES = {"deel.torchlip": "deel-torchlip", "orthogonium": "orthogonium"}  # what is imported → what pip installs

_AOC = "orthogonium.layers.conv.AOC"
_AOL = "orthogonium.layers.conv.AOL"
_CAYLEY = "orthogonium.legacy.cayley_ortho_conv"
_LINEAR = "orthogonium.layers.linear"
_PARAMS = "orthogonium.reparametrizers"
_SLL = "orthogonium.layers.conv.SLL"
_SOC = "orthogonium.layers.conv.adaptiveSOC.fast_skew_ortho_conv"
_DEEL = "deel.torchlip"


@dataclass(frozen=True)
class Peer:
    """One layer of another library.

    `build` gets the arguments of ours; `export` gives what the library's documentation has users run in evaluation.
    """

    module: str
    name: str
    build: Callable[..., nn.Module]
    export: Callable[[nn.Module], nn.Module] = lambda layer: layer

    @property
    def package(self) -> str:
        return next(package for package in PACKAGES if self.module.startswith(package))

    @property
    def label(self) -> str:
        return f"{PACKAGES[self.package]} {self.name}"


def missing_packages() -> dict[str, str]:
    """The packages that cannot be imported, each with one line that says why and what to do."""
    missing = {}
    for package, distribution in PACKAGES.items():
        try:
            importlib.import_module(package)
        except ImportError as error:
            reason = " ".join(str(error).split())
            missing[package] = f"{distribution} is left out ({reason}); pip install {distribution}"
    return missing


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _peer(module: str, name: str, export: Callable[[nn.Module], nn.Module], **defaults: Any) -> Peer:
    """A class that takes torch's arguments."""
    return Peer(module, name, lambda *args, **options: _attribute(module, name)(*args, **options, **defaults), export)


# Evaluation -----------------------------------------------------------------------------------------------------------


def _vanilla(layer: Any) -> nn.Module:
    """deel-torchlip's `vanilla_export`."""
    return layer.eval().vanilla_export()


def _weight_saved(layer: Any) -> nn.Module:
    """Torch's plain layer with the peer's weight, as orthogonium's README advises for deployment."""
    layer.eval()
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        outputs, inputs = weight.shape
        plain: Any = nn.Linear(inputs, outputs)
    else:
        names = ["in_channels", "out_channels", "stride", "padding", "dilation", "groups", "padding_mode"]
        options: dict[str, Any] = {name: getattr(layer, name) for name in names}
        options["kernel_size"] = tuple(weight.shape[-2:])  # it may be larger than what the layer was asked for
        if isinstance(layer, nn.ConvTranspose2d):
            options["output_padding"] = layer.output_padding
        plain = (nn.ConvTranspose2d if isinstance(layer, nn.ConvTranspose2d) else nn.Conv2d)(**options)
    plain.weight.data = weight.clone()
    plain.bias.data = layer.bias.detach().clone()
    return plain


# Layers whose arguments are not torch's -------------------------------------------------------------------------------


def _sll_dense(features: int) -> nn.Module:
    return _attribute(_SLL, "SDPBasedLipschitzDense")(features, features, features)


def _sll_conv(channels: int, padding_mode: str = "zeros") -> nn.Module:
    if padding_mode != "zeros":
        raise ArgumentError(f"SDPBasedLipschitzResBlock: padding_mode={padding_mode!r}; it pads with zeros only")
    return _attribute(_SLL, "SDPBasedLipschitzResBlock")(channels, inner_dim_factor=1)


def _cayley_conv(*args: int, stride: int, padding: int, padding_mode: str) -> nn.Module:
    if stride != 1 or padding_mode != "circular" or padding != args[2] // 2:
        raise ArgumentError("Cayley: it pads circularly to the same size, and halves the kernel for a stride")
    return _attribute(_CAYLEY, "Cayley")(*args)


def _soc_conv(*args: int, stride: int, padding: int, padding_mode: str) -> nn.Module:
    """Its kernel is larger than asked for (three terms of the series), and its padding must be given for that size."""
    if stride != 1 or padding != args[2] // 2:
        raise ArgumentError("FastSOC: with a stride it is another layer, composed with RKO")
    make = _attribute(_SOC, "FastSOC")
    size = make(*args, padding="same", padding_mode="zeros").weight.shape[-1]
    return make(*args, padding=size // 2, padding_mode=padding_mode)


def _soc_conv_transpose(*args: int, stride: int, padding: int) -> nn.Module:
    if stride != 1 or padding != args[2] // 2:
        raise ArgumentError("SOCTranspose: with a stride it is another layer, composed with RKO")
    make = _attribute(_SOC, "SOCTranspose")
    return make(*args, padding=make(*args).weight.shape[-1] // 2)


def _ortho_linear(params: str) -> Callable[..., nn.Module]:
    return lambda *args: _attribute(_LINEAR, "OrthoLinear")(*args, ortho_params=_attribute(_PARAMS, params))


_RKO = (_peer(_DEEL, "SpectralConv2d", _vanilla), _peer(_AOC, "RKOConv2d", _weight_saved))
_RKO_TRANSPOSE = (_peer(_DEEL, "SpectralConvTranspose2d", _vanilla),)

# orthogonium's transposed RKO is no peer: its kernel has the size of the stride, whatever is asked for
PEERS: dict[tuple[str, str], tuple[Peer, ...]] = {
    ("aoc", "conv"): (_peer(_AOC, "AdaptiveOrthoConv2d", _weight_saved),),
    ("aoc", "conv_transpose"): (_peer(_AOC, "AdaptiveOrthoConvTranspose2d", _weight_saved),),
    ("aol", "conv"): (_peer(_AOL, "AOLConv2D", _weight_saved),),
    ("aol", "conv_transpose"): (_peer(_AOL, "AOLConvTranspose2D", _weight_saved),),
    ("bcop", "conv"): (_peer(_AOC, "FastBlockConv2d", _weight_saved),),
    ("bcop", "conv_transpose"): (_peer(_AOC, "FastBlockConvTranspose2D", _weight_saved),),
    ("bjorck", "conv"): _RKO,
    ("bjorck", "conv_transpose"): _RKO_TRANSPOSE,
    ("bjorck", "linear"): (
        _peer(_DEEL, "SpectralLinear", _vanilla),
        _peer(_LINEAR, "OrthoLinear", _weight_saved),
    ),
    ("cayley", "conv"): (Peer(_CAYLEY, "Cayley", _cayley_conv),),
    ("cayley", "linear"): (_peer(_CAYLEY, "CayleyLinear", lambda layer: layer),),  # its constructor wants a GPU
    ("cholesky", "linear"): (
        Peer(_LINEAR, "OrthoLinear (Cholesky)", _ortho_linear("CHOLESKY_ORTHO_PARAMS"), _weight_saved),
    ),
    ("rko", "conv"): _RKO,
    ("rko", "conv_transpose"): _RKO_TRANSPOSE,
    ("sll", "conv_block"): (Peer(_SLL, "SDPBasedLipschitzResBlock", _sll_conv),),
    ("sll", "dense_block"): (Peer(_SLL, "SDPBasedLipschitzDense", _sll_dense),),
    ("soc", "conv"): (Peer(_SOC, "FastSOC", _soc_conv, _weight_saved),),
    ("soc", "conv_transpose"): (Peer(_SOC, "SOCTranspose", _soc_conv_transpose, _weight_saved),),
    ("soc", "linear"): (Peer(_LINEAR, "OrthoLinear (exponential)", _ortho_linear("EXP_ORTHO_PARAMS"), _weight_saved),),
}
