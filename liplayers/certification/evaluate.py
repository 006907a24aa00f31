"""Certify a network on a data set: one radius for each sample, or for each of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from liplayers.certification.certificates import Certificates
from liplayers.certification.network import CertifiedNetwork, Outputs
from liplayers.certification.tasks import Classification, Task
from liplayers.errors import DataError, ShapeError

__all__ = ["Certificates", "certify"]


def certify(
    network: CertifiedNetwork,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    task: Task | None = None,
    input_range: tuple[float, float] | None = (0.0, 1.0),
    progress: Callable[[int], object] | None = None,
    seen: Callable[[Tensor, Tensor, Outputs], object] | None = None,
) -> Certificates:
    """Certify the prediction of each sample: the loop below `liplayers.certify`, which takes data of any form.

    Args:
        network: with its proven constants.
        batches: (inputs, labels). Certified are the float64 numbers that the inputs stand for; labels are as the task
            wants them, class numbers (N,) for a classifier.
        task: what the outputs mean; None: `Classification`.
        input_range: what every input must lie within; None for any finite number.
        progress: called after each batch with the number of samples that are done.
        seen: called with the inputs, labels and outputs of each batch.

    Raises:
        ShapeError: inputs of another shape than the network's, outputs that are not of the task.
        DataError: no samples, inputs that are NaN, infinite, or outside `input_range`, labels that are not the task's.

    >>> from liplayers import AOLLinear
    >>> certify(CertifiedNetwork(AOLLinear(2, 2), (2,), 2), [(torch.rand(3, 2), torch.tensor([0, 1, 0]))]).radius.shape
    torch.Size([3])
    """
    task = Classification() if task is None else task
    task.check(network)
    parts: list[Certificates] = []
    done = 0
    for inputs, labels in batches:
        _check_inputs(inputs, network.input_shape, input_range, done)
        found = task.labels(labels, len(inputs), network.output_shape, done)
        outputs = network.outputs(inputs)
        parts.append(task.certificates(outputs, found))
        if seen is not None:
            seen(inputs, found, outputs)
        done += len(inputs)
        if progress is not None:
            progress(done)
    if not done:
        raise DataError("no samples to certify: the data set is empty")
    return Certificates.joined(parts)


def _check_inputs(
    inputs: Tensor, input_shape: tuple[int, ...], input_range: tuple[float, float] | None, done: int
) -> None:
    if tuple(inputs.shape[1:]) != tuple(input_shape):
        images = len(input_shape) == 3
        raise ShapeError(
            f"the {'images' if images else 'inputs'} have shape {tuple(inputs.shape[1:])}, the model was trained on "
            f"{tuple(input_shape)}{' (channels, height, width); set data.image_size or' if images else ';'} use the "
            "data set it was trained on"
        )
    if inputs.is_complex():
        raise DataError(f"samples from {done} on: inputs are {inputs.dtype}; expected real numbers")
    low, high = input_range or (-torch.inf, torch.inf)
    wrong = ~(inputs.isfinite() & (inputs >= low) & (inputs <= high))
    if wrong.any():
        position = wrong.nonzero()[0].tolist()
        value = inputs[tuple(position)].item()
        what, expected = (
            ("feature", "a finite number") if input_range is None else ("pixel", f"pixels in [{low:g}, {high:g}]")
        )
        raise DataError(f"sample {done + position[0]}, {what} {tuple(position[1:])}: {value}; expected {expected}")
