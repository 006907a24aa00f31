"""The network that certificates are about: frozen weights, evaluated in float64, with every constant proven."""

from __future__ import annotations

import copy
import hashlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from liplayers.bounds import ClassifierBounds, classifier_bounds
from liplayers.bounds.rounding import Rounding, RoundingAnalysis
from liplayers.bounds.wrappers import unwrapped
from liplayers.certification.radius import certified_radius
from liplayers.core.precision import Setting, exact_precision, held
from liplayers.errors import ArgumentError, CheckpointError, ShapeError, UnknownBoundError, UnknownNameError
from liplayers.export.freeze import check_plain, freeze

__all__ = ["LARGEST_RADIUS", "MODES", "SAME_WEIGHTS", "CertifiedNetwork", "state_sha256"]

MODES = ("proof", "fast")
SAME_WEIGHTS = 1e-5  # relative to the largest entry: what orders of summation make of weights in float32
LARGEST_RADIUS = 2.0**20  # certified; rounding is analysed for a bounded set of inputs

# cuDNN may choose transforms for convolutions, even in float64; torch's own kernels sum products
_INNER_PRODUCTS = [Setting(torch.backends.cudnn, "enabled", False)]


@dataclass(frozen=True)
class _Proven:
    """What a `CertifiedNetwork` runs, and what is proven of it. It is handed out in copies only."""

    mode: str
    device: torch.device
    input_shape: tuple[int, ...]
    num_classes: int
    network: nn.Module
    bounds: ClassifierBounds
    margin_lipschitz: Tensor
    stored_dtypes: dict[str, torch.dtype]
    weights_distance: float
    analysis: RoundingAnalysis | None
    probe: Tensor  # (1, *input_shape), of which it gives these logits as long as nothing changes it
    probed: Tensor
    roundings: dict[float, Rounding] = field(default_factory=dict)


class CertifiedNetwork(nn.Module):
    """A classifier, and proofs about its float64 evaluation.

    In mode "proof" the classifier is f̂, the evaluation of `freeze(model).double()` on `device` as it runs, rounding
    included: for every prediction y = argmax f̂(x) and every float64 input x' with ‖x' − x‖₂ ≤ R, argmax f̂(x') = y.
    In mode "fast" it is a copy of `model` as it is, in its dtype, and the rounding of the forward pass is not counted.

    What runs belongs to this object alone: later changes of `model` do not reach it, attributes cannot be set, and
    those below are copies. It may be called from several threads, copied and pickled.

    Args:
        model: any classifier whose parts are known; not changed.
        input_shape: of one input, without the batch dimension.
        num_classes: of the logits, at least 2.
        mode: "proof" or "fast".
        device: where it runs; in mode "proof" the weights are always computed on the CPU.
        weights: those of an earlier `CertifiedNetwork`, to run instead of those computed here, which may
            differ from machine to machine in the last digits; only for mode "proof".

    Attributes:
        network: what runs.
        bounds: proven bounds of each layer, of the body below the linear head, and of the whole.
        margin_lipschitz: (K, K), of the logit differences.
        mode, device, dtype, input_shape, num_classes: where and on what it runs.
        stored_dtypes: of `weights()`, by name.
        weights_distance: how far the given weights are from those computed here.

    Raises:
        UnknownBoundError: a part without a known bound, or without a known rounding; named by its path and type.
        ArgumentError: a part that cannot be copied or frozen. At call: a forward hook, subnormal numbers flushed to
            zero, or another result for a known input, by what a forward reads outside of its module.
        ShapeError: logits of another number than num_classes.
        CheckpointError: `weights` of another network.

    >>> from liplayers import AOLLinear
    >>> network = CertifiedNetwork(AOLLinear(4, 2), (4,), num_classes=2)
    >>> network.radius(torch.rand(3, 4)).shape
    torch.Size([3])
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        mode: str = "proof",
        device: torch.device | str = "cpu",
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        if mode not in MODES:
            raise UnknownNameError.of("mode", mode, MODES)
        if num_classes < 2:
            raise ShapeError(f"num_classes={num_classes}; a certificate needs at least two classes")
        super().__init__()
        self.training = False
        self.__proven = _prove(model, tuple(input_shape), num_classes, mode, torch.device(device), weights)
        self._check_samples_apart()

    def forward(self, inputs: Tensor) -> Tensor:
        """The logits, (N, K); differentiable in the inputs."""
        self._check_surroundings()
        proven = self.__proven
        logits = _evaluate(proven.network, proven.device, self._own(inputs))
        if logits.dim() != 2 or logits.shape[1] != proven.num_classes:
            raise ShapeError(f"the model has {tuple(logits.shape)} logits, the data {proven.num_classes} classes")
        return logits

    def radius(self, inputs: Tensor) -> Tensor:
        """The certified radius of each prediction, (N,), on the CPU in float64.

        Args:
            inputs: (N, *input_shape), exact numbers: what is certified is the ball around these.
        """
        return self.logits_and_radius(inputs)[1]

    @torch.no_grad()
    def logits_and_radius(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """(N, K) and (N,), from one evaluation; the radius is that of `radius`."""
        proven = self.__proven
        inputs = self._own(inputs)  # what runs and what is measured are the same, whoever writes to the caller's
        logits = self(inputs)
        exact = logits.cpu().double()
        radius = certified_radius(exact, proven.margin_lipschitz)
        if proven.analysis is not None:
            # what is left when rounding is subtracted is smaller: the ball of `radius` holds all inputs that count
            error = self.logit_error(inputs, radius)
            proof = certified_radius(exact, proven.margin_lipschitz, error[:, None].expand_as(exact))
            radius = proof.clamp_max(LARGEST_RADIUS)
        return logits, torch.where(inputs.flatten(1).isfinite().all(1).cpu(), radius, 0.0)

    def logit_error(self, inputs: Tensor, radius: Tensor) -> Tensor:
        """(N,), proven for each logit of every input within LARGEST_RADIUS and within `radius`, (N,), of these."""
        reach = _upper_norm(inputs) + radius.clamp_max(LARGEST_RADIUS)
        return torch.tensor([self.rounding(r).error for r in reach.tolist()], dtype=torch.float64)

    def rounding(self, input_norm: float) -> Rounding:
        """The proven error of the logits for all inputs of norm up to the next power of two."""
        proven = self.__proven
        if proven.analysis is None:
            raise ArgumentError("the rounding of mode=fast is not analysed; use mode=proof")
        if not math.isfinite(input_norm):
            return Rounding(math.inf, math.inf, math.inf, ())
        # the first power above input_norm: so few are met that each is analysed once
        power = 2.0 ** math.frexp(max(input_norm, 2.0**-20))[1]
        if power not in proven.roundings:
            self._check_surroundings()
            proven.roundings[power] = proven.analysis.at(power)
        return proven.roundings[power]

    @property
    def worst_rounding(self) -> Rounding | None:
        """For the largest inputs asked about so far."""
        roundings = self.__proven.roundings.copy()  # another thread may add to them
        return roundings[max(roundings)] if roundings else None

    @property
    def network(self) -> nn.Module:
        """A copy of what runs."""
        return copy.deepcopy(self.__proven.network)

    @property
    def bounds(self) -> ClassifierBounds:
        return copy.deepcopy(self.__proven.bounds)

    @property
    def margin_lipschitz(self) -> Tensor:
        return self.__proven.margin_lipschitz.clone()

    @property
    def mode(self) -> str:
        return self.__proven.mode

    @property
    def device(self) -> torch.device:
        return self.__proven.device

    @property
    def dtype(self) -> torch.dtype:
        """That the network runs in."""
        return torch.float64 if self.mode == "proof" else _dtype(self.__proven.network)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.__proven.input_shape

    @property
    def num_classes(self) -> int:
        return self.__proven.num_classes

    @property
    def stored_dtypes(self) -> dict[str, torch.dtype]:
        return self.__proven.stored_dtypes.copy()

    @property
    def weights_distance(self) -> float:
        return self.__proven.weights_distance

    def weights(self) -> dict[str, Tensor]:
        """The weights that run, on the CPU, in the dtypes that they were computed in."""
        proven = self.__proven
        return {
            name: tensor.detach().to("cpu", proven.stored_dtypes[name], copy=True)
            for name, tensor in proven.network.state_dict().items()
        }

    def sha256(self) -> str:
        """Of names, dtypes, shapes and bytes of `weights()`."""
        return state_sha256(self.weights())

    def extra_repr(self) -> str:
        proven = self.__proven
        sizes = f"input_shape={proven.input_shape}, num_classes={proven.num_classes}"
        return f"{sizes}, mode={proven.mode}, device={proven.device}\n(network): {proven.network!r}"

    # What keeps it what its proofs are about

    def train(self, mode: bool = True) -> CertifiedNetwork:
        if mode:
            raise ArgumentError("a CertifiedNetwork stays in evaluation mode: train the model that it was made from")
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ArgumentError("a CertifiedNetwork stays what its proofs are about: make another, with device=…")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ArgumentError("a CertifiedNetwork stays what its proofs are about: make another, with weights=…")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in self.__proven.network.state_dict().items():
            destination[f"{prefix}network.{name}"] = tensor.detach().clone()

    def __setattr__(self, name: str, value: Any) -> None:
        if "_CertifiedNetwork__proven" in vars(self):
            raise ArgumentError(f"a CertifiedNetwork stays what its proofs are about: {name} cannot be set")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> NoReturn:
        raise ArgumentError(f"a CertifiedNetwork stays what its proofs are about: {name} cannot be deleted")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        proven = self.__proven
        for tensor in (*proven.network.parameters(), *proven.network.buffers()):
            if tensor.device.type != proven.device.type:
                raise ArgumentError(
                    f"a CertifiedNetwork on {proven.device} was loaded to {tensor.device}, where it was not proven: "
                    "load it without map_location, or make another with device=…"
                )

    def _check_surroundings(self) -> None:
        """Raise where something outside this object may change what it computes."""
        everywhere = nn.modules.module
        hooks = (self._forward_hooks, self._forward_pre_hooks)
        if any((*hooks, everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks)):
            raise ArgumentError("a forward hook, on this CertifiedNetwork or on all modules, may change it: remove it")
        if sys.float_info.min / 2 == 0:
            raise ArgumentError(
                "subnormal numbers are flushed to zero, which no proof counts: call torch.set_flush_denormal(False)"
            )
        proven = self.__proven
        with torch.no_grad():
            now = _evaluate(proven.network, proven.device, proven.probe.clone())
        if not torch.allclose(now, proven.probed, rtol=0, atol=_summation(proven.probed), equal_nan=True):
            raise ArgumentError(
                "what a CertifiedNetwork computes has changed, by a global variable that a forward reads, a replaced "
                "function or class, or torch's default dtype: put it back, or make another"
            )

    def _own(self, inputs: Tensor) -> Tensor:
        """A copy of the inputs as the network takes them: it may write to it."""
        proven = self.__proven
        if not isinstance(inputs, Tensor) or inputs.is_complex():
            got = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            raise ArgumentError(f"inputs: got {got}; expected a tensor of real numbers")
        if tuple(inputs.shape[1:]) != proven.input_shape or not inputs.dim():
            expected = ", ".join(map(str, proven.input_shape))
            raise ShapeError(f"inputs of shape {tuple(inputs.shape)}; the proofs are for (N, {expected})")
        with torch._C.DisableTorchFunctionSubclass():  # a subclass of Tensor may compute otherwise
            own = inputs.as_subclass(Tensor).to(proven.device, self.dtype, copy=True)
        if not inputs.is_floating_point() and (own.to(inputs.dtype) != inputs.to(proven.device)).any():
            raise ArgumentError(
                f"inputs: {inputs.dtype} with numbers that {self.dtype} cannot hold; convert them first"
            )
        return own

    def _check_samples_apart(self) -> None:
        """Raise unless random samples get the same logits in batches of several sizes and alone, up to rounding."""
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(7, *self.input_shape, generator=generator, dtype=torch.float64).to(self.dtype)
        with torch.no_grad():
            alone = torch.cat([self(row[None]) for row in x])
            for size in (5, 7):
                together = self(x[:size])
                if (together - alone[:size]).abs().amax() > _summation(alone):
                    raise UnknownBoundError("the logits of a sample depend on the other samples of its batch")


@torch.inference_mode(False)
@torch.no_grad()
def _prove(
    model: nn.Module,
    input_shape: tuple[int, ...],
    num_classes: int,
    mode: str,
    device: torch.device,
    weights: Mapping[str, Tensor] | None,
) -> _Proven:
    distance, analysis = 0.0, None
    model = unwrapped(model)
    if any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module in model.modules()):
        raise ArgumentError(
            "the model has an embedding, whose inputs are no vectors: certify what follows the embedding"
        )
    check_plain(model)
    with exact_precision(torch.device("cpu")):
        network = _private_copy(model).eval().requires_grad_(False)
        if mode == "proof":
            computed_from = network.cpu().state_dict()
            network = freeze(network, input_shape)
            distance = 0.0 if weights is None else _load(network, weights, computed_from)
        stored = {name: tensor.dtype for name, tensor in network.state_dict().items()}
        network = network.double() if mode == "proof" else network
        bounds = classifier_bounds(network, input_shape)
        constants = bounds.split.margin_lipschitz(num_classes).double().cpu()
    if mode == "proof":
        analysis = RoundingAnalysis(network, input_shape, bounds.upper)  # which needs it on the CPU
    runs = (copy.deepcopy(network) if analysis is not None and device.type != "cpu" else network).to(device)
    dtype = torch.float64 if mode == "proof" else _dtype(runs)
    probe = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    probe = probe.to(device, dtype)
    probed = _evaluate(runs, device, probe.clone())
    return _Proven(
        mode, device, input_shape, num_classes, runs, bounds, constants, stored, distance, analysis, probe, probed
    )


def _evaluate(network: nn.Module, device: torch.device, inputs: Tensor) -> Tensor:
    with exact_precision(device), held(_INNER_PRODUCTS if device.type == "cuda" else ()):
        return network(inputs)


def _summation(logits: Tensor) -> float:
    """What another order of summation may change in these logits at most, generously."""
    return 1e4 * torch.finfo(logits.dtype).eps * max(1.0, logits.abs().amax().item())


def _private_copy(model: nn.Module) -> nn.Module:
    """A copy that shares no module and no tensor with the model, so that nothing done to that one reaches it."""
    try:
        copied = copy.deepcopy(model)
    except Exception as error:  # copying runs the modules' own code
        raise ArgumentError(f"the model cannot be copied ({' '.join(str(error).split())[:200]})") from None
    modules = set(model.modules())
    storages = set().union(*map(_storages, modules))
    for path, module in copied.named_modules():
        if module in modules or storages & _storages(module):
            raise ArgumentError(
                f"{path or 'the model'} ({type(module).__name__}): copy.deepcopy shares it with the model, where "
                "a later change would undo the proofs: let its __deepcopy__ copy it"
            )
    return copied


def _storages(module: nn.Module) -> set[int]:
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return {address for t in tensors if (address := t.untyped_storage().data_ptr())}


def _load(network: nn.Module, weights: Mapping[str, Tensor], computed_from: Mapping[str, Tensor]) -> float:
    """Copy weights that are those of the network up to rounding; their distance, relative to each tensor's largest.

    The rounding of a computed weight may be that of its largest entries; what freezing only copied is as exact as they.
    """
    own, farthest = network.state_dict(), 0.0
    for name in own.keys() | weights.keys():
        if name not in own or name not in weights or own[name].shape != weights[name].shape:
            raise CheckpointError(f"{name}: is not in both networks with one shape; the weights are of another model")
        if own[name].dtype != weights[name].dtype:
            raise CheckpointError(f"{name}: is {weights[name].dtype}, expected {own[name].dtype}")
        if not own[name].numel():
            continue
        entries = own[name].double().abs()
        largest = entries.amax()
        distance = (own[name].double() - weights[name].double()).abs()
        copied = any(own[name].shape == t.shape and torch.equal(own[name], t) for t in computed_from.values())
        if not (distance <= SAME_WEIGHTS * (entries if copied else largest)).all():
            raise CheckpointError(f"{name}: differs by {distance.amax():.1e}; the weights are of another model")
        farthest = max(farthest, (distance.amax() / largest).item() if largest else 0.0)
    network.load_state_dict(weights)
    return farthest


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _dtype(model: nn.Module) -> torch.dtype:
    tensors = [*model.parameters(), *model.buffers()]
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())


def _upper_norm(inputs: Tensor) -> Tensor:
    """At least ‖x‖₂ of each input, (N,)."""
    values = inputs.detach().cpu().double().flatten(1)
    entries = values.shape[1]
    largest = values.abs().amax(1) if entries else torch.zeros(len(values), dtype=torch.float64)
    scale = torch.where(largest > 0, largest, 1.0)
    return scale * (values / scale[:, None]).square().sum(1).sqrt() * (1 + (entries + 8) * 2.0**-52)
