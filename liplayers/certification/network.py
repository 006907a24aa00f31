"""The network that certificates are about: frozen weights, evaluated in float64, with every constant proven."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from liplayers.bounds import classifier_bounds
from liplayers.bounds.rounding import Rounding, RoundingAnalysis
from liplayers.certification.radius import certified_radius
from liplayers.errors import ArgumentError, CheckpointError, ShapeError, UnknownBoundError, UnknownNameError
from liplayers.export import check_plain, freeze
from liplayers.layers.base import exact_precision

MODES = ("proof", "fast")
SAME_WEIGHTS = 1e-5  # relative to the largest entry: what orders of summation make of weights in float32
LARGEST_RADIUS = 2.0**20  # certified; rounding is analysed for a bounded set of inputs


class CertifiedNetwork(nn.Module):
    """A classifier, and proofs about its float64 evaluation.

    In mode "proof" the classifier is f̂, the evaluation of `freeze(model).double()` on `device` as it runs, rounding
    included: for every prediction y = argmax f̂(x) and every float64 input x' with ‖x' − x‖₂ ≤ R, argmax f̂(x') = y.
    In mode "fast" it is `model` as it is, in its dtype, and the rounding of the forward pass is not counted.

    Args:
        model: any classifier whose parts are known; not changed in mode "proof".
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

    Raises:
        UnknownBoundError: a part without a known bound, or without a known rounding; named by its path and type.
        ArgumentError: a part that cannot be frozen.
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
        self.mode = mode
        self.device = torch.device(device)
        self.input_shape = tuple(input_shape)
        self.num_classes = num_classes
        self.weights_distance = 0.0
        with torch.inference_mode(False), torch.no_grad(), exact_precision(torch.device("cpu")):
            if mode == "proof":
                check_plain(model)
                model = freeze(copy.deepcopy(model).cpu().eval(), input_shape)
                if weights is not None:
                    self.weights_distance = _load(model, weights)
            else:
                model = model.eval().requires_grad_(False)
            self.stored_dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
            model = model.double() if mode == "proof" else model
            self.bounds = classifier_bounds(model, input_shape)
            self.margin_lipschitz = self.bounds.split.margin_lipschitz(num_classes)
        self._analysis = RoundingAnalysis(model, input_shape, self.bounds.upper) if mode == "proof" else None
        self._roundings: dict[float, Rounding] = {}
        kept = self._analysis is not None and self.device.type != "cpu"  # the analysis needs it on the CPU
        self.network = (copy.deepcopy(model) if kept else model).to(self.device)
        self.eval()
        self._versions = self._count_versions()
        self._check_samples_apart()

    @property
    def dtype(self) -> torch.dtype:
        """That the network runs in."""
        return torch.float64 if self.mode == "proof" else _dtype(self.network)

    def forward(self, inputs: Tensor) -> Tensor:
        """The logits, (N, K); differentiable in the inputs."""
        if tuple(inputs.shape[1:]) != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise ShapeError(f"inputs of shape {tuple(inputs.shape)}; the proofs are for (N, {expected})")
        with exact_precision(self.device), _inner_products():
            logits = self.network(inputs.to(self.device, self.dtype, copy=True))  # it may write to its input
        if logits.dim() != 2 or logits.shape[1] != self.num_classes:
            raise ShapeError(f"the model has {tuple(logits.shape)} logits, the data {self.num_classes} classes")
        return logits

    def radius(self, inputs: Tensor, logits: Tensor | None = None) -> Tensor:
        """The certified radius of each prediction, (N,), on the CPU in float64.

        Args:
            inputs: (N, *input_shape), exact numbers: what is certified is the ball around these.
            logits: of the inputs, where they were computed already.
        """
        if self._count_versions() != self._versions:
            raise ArgumentError("the weights of this CertifiedNetwork were written to: make another for the new ones")
        with torch.no_grad():
            logits = (self(inputs) if logits is None else logits).detach().cpu().double()
            constants = self.margin_lipschitz.double().cpu()
            radius = certified_radius(logits, constants)
            if self._analysis is None:
                return radius
            # what is left when rounding is subtracted is smaller: the ball of `radius` holds all inputs that count
            reach = _upper_norm(inputs) + radius.clamp_max(LARGEST_RADIUS)
            error = torch.tensor([self.rounding(r).error for r in reach.tolist()], dtype=torch.float64)
            proven = certified_radius(logits, constants, error[:, None].expand_as(logits))
            return proven.clamp_max(LARGEST_RADIUS)

    def rounding(self, input_norm: float) -> Rounding:
        """The proven error of the logits for all inputs of norm up to the next power of two."""
        if self._analysis is None:
            raise ArgumentError("the rounding of mode=fast is not analysed; use mode=proof")
        if not math.isfinite(input_norm):
            return Rounding(math.inf, math.inf, math.inf, ())
        # the first power above input_norm: so few are met that each is analysed once
        power = 2.0 ** math.frexp(max(input_norm, 2.0**-20))[1]
        if power not in self._roundings:
            self._roundings[power] = self._analysis.at(power)
        return self._roundings[power]

    @property
    def worst_rounding(self) -> Rounding | None:
        """For the largest inputs asked about so far."""
        return self._roundings[max(self._roundings)] if self._roundings else None

    def weights(self) -> dict[str, Tensor]:
        """The weights that run, on the CPU, in the dtypes that they were computed in."""
        return {
            name: tensor.detach().cpu().to(self.stored_dtypes[name])
            for name, tensor in self.network.state_dict().items()
        }

    def sha256(self) -> str:
        """Of names, dtypes, shapes and bytes of `weights()`."""
        return state_sha256(self.weights())

    def train(self, mode: bool = True) -> CertifiedNetwork:
        if mode:
            raise ArgumentError("a CertifiedNetwork stays in evaluation mode: train the model that it was made from")
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> CertifiedNetwork:
        raise ArgumentError("a CertifiedNetwork stays what its proofs are about: make another, with device=…")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise ArgumentError("a CertifiedNetwork stays what its proofs are about: make another, with weights=…")

    def _count_versions(self) -> list[int]:
        return [tensor._version for tensor in (*self.network.parameters(), *self.network.buffers())]

    def _check_samples_apart(self) -> None:
        """Raise unless random samples get the same logits in batches of several sizes and alone, up to rounding."""
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(7, *self.input_shape, generator=generator, dtype=torch.float64).to(self.dtype)
        with torch.no_grad():
            alone = torch.cat([self(row[None]) for row in x])
            for size in (5, 7):
                together = self(x[:size])
                distance = (together - alone[:size]).abs().amax()
                if distance > 1e4 * torch.finfo(self.dtype).eps * alone.abs().amax().clamp_min(1):
                    raise UnknownBoundError("the logits of a sample depend on the other samples of its batch")


@contextmanager
def _inner_products() -> Iterator[None]:
    """cuDNN may choose transforms for convolutions, even in float64; torch's own kernels sum products."""
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


def _load(network: nn.Module, weights: Mapping[str, Tensor]) -> float:
    """Copy weights that are those of the network up to rounding; their distance, relative to each tensor's largest."""
    own, farthest = network.state_dict(), 0.0
    for name in own.keys() | weights.keys():
        if name not in own or name not in weights or own[name].shape != weights[name].shape:
            raise CheckpointError(f"{name}: is not in both networks with one shape; the weights are of another model")
        if own[name].dtype != weights[name].dtype:
            raise CheckpointError(f"{name}: is {weights[name].dtype}, expected {own[name].dtype}")
        if not own[name].numel():
            continue
        largest = own[name].double().abs().amax().item()
        distance = (own[name].double() - weights[name].double()).abs().amax().item()
        if not distance <= SAME_WEIGHTS * largest:
            raise CheckpointError(f"{name}: differs by {distance:.1e}; the weights are of another model")
        farthest = max(farthest, distance / largest if largest else 0.0)
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
