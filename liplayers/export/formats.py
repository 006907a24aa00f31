"""Frozen models as programs of torch.export, ONNX and safetensors, each compared with the model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from liplayers.bounds.torch_modules import Shape
from liplayers.core.weights import ParametrizedModule
from liplayers.errors import ArgumentError, ExportError, LipschitzError, OutputError
from liplayers.extras import extra

__all__ = ["export_onnx", "export_program", "export_safetensors"]


def export_program(
    frozen: nn.Module, input_shape: Shape, path: str | Path | None = None
) -> torch.export.ExportedProgram:
    """The frozen model as a program of torch.export, for batches of any size, compared with it on random inputs.

    `torch.export.load(path).module()` runs it where liplayers is not installed.

    Args:
        frozen: from `freeze`.
        input_shape: of one input, without the batch dimension.
        path: of a .pt2 file to write; None for none.

    Raises:
        ArgumentError: the model is not frozen.
        ExportError: torch cannot export it, or the program computes something else.
        OutputError: the file cannot be written.

    >>> from liplayers import AOLLinear, freeze
    >>> program = export_program(freeze(AOLLinear(4, 6)), (4,))
    >>> program.module()(torch.ones(3, 4)).shape
    torch.Size([3, 6])
    """
    _check_frozen(frozen)
    batch = {0: torch.export.Dim("batch", min=1)}
    with _refusals("torch.export cannot export this model"), torch.no_grad():
        program = torch.export.export(frozen, (_random(frozen, input_shape, 2),), dynamic_shapes=(batch,))
    if path is None:
        _compare("torch.export", frozen, program.module(), input_shape)
        return program
    with _written(path) as temporary:
        torch.export.save(program, temporary)
        _compare("torch.export", frozen, torch.export.load(temporary).module(), input_shape)
    return program


def export_onnx(frozen: nn.Module, path: str | Path, input_shape: Shape) -> None:
    """Write the frozen model as ONNX, in one file, and compare that with it in ONNX Runtime.

    Input and output are called "x" and "y"; the batch may be of any size. In float64 dense layers and
    layers per frequency run; for convolutions with an explicit kernel ONNX Runtime has float32 only.

    Args:
        frozen: from `freeze`.
        path: of the .onnx file.
        input_shape: of one input, without the batch dimension.

    Raises:
        MissingPackageError: without the extra liplayers[export].
        ArgumentError: the model is not frozen.
        ExportError: it cannot be exported, or ONNX Runtime computes something else.
        OutputError: the file cannot be written.
    """
    with extra("export"):
        runtime, _, _ = map(import_module, ("onnxruntime", "onnx", "onnxscript"))
    program = export_program(frozen, input_shape)
    with _refusals("ONNX cannot express this model"):
        exported = torch.onnx.export(program, dynamo=True, input_names=["x"], output_names=["y"], verbose=False)
    with _written(path) as temporary:
        assert exported is not None
        exported.save(temporary, external_data=False)
        with _refusals("ONNX Runtime cannot run this model in its dtype"):
            session = runtime.InferenceSession(temporary, providers=["CPUExecutionProvider"])

        def run(x: Tensor) -> Tensor:
            return torch.from_numpy(session.run(["y"], {"x": x.cpu().numpy()})[0])

        _compare("ONNX Runtime", frozen, run, input_shape)


def export_safetensors(frozen: nn.Module, path: str | Path) -> None:
    """Write the weights of the frozen model as safetensors, and read them back: `frozen.load_state_dict` takes them.

    Args:
        frozen: from `freeze`.
        path: of the .safetensors file.

    Raises:
        MissingPackageError: without the extra liplayers[export].
        ArgumentError: the model is not frozen.
        ExportError: the file holds something else.
        OutputError: the file cannot be written.
    """
    with extra("export"):
        from safetensors.torch import load_file, save_file
    _check_frozen(frozen)
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in frozen.state_dict().items()}
    with _written(path) as temporary:
        save_file(tensors, temporary)
        read = load_file(temporary)
        if read.keys() != tensors.keys() or not all(_same(read[name], t) for name, t in tensors.items()):
            raise ExportError(f"safetensors: {path} does not hold the weights that were written")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _check_frozen(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, ParametrizedModule) or module.training:
            state = "in training mode" if module.training else "not frozen"
            raise ArgumentError(f"{path or 'the model'} ({type(module).__name__}): it is {state}; export freeze(model)")


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Whatever an exporter raises, as one line that begins with `what`."""
    try:
        yield
    except LipschitzError:
        raise
    except Exception as error:  # the exporters raise anything
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"{what}: {type(error).__name__}: {reason}") from None


@contextmanager
def _written(path: str | Path) -> Iterator[str]:
    """A temporary file of the same name, moved to `path` where nothing is raised."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
            temporary = Path(folder) / path.name
            yield str(temporary)
            os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); choose another path") from None


def _random(model: nn.Module, input_shape: Shape, batch: int) -> Tensor:
    """A Gaussian batch in the dtype and on the device of the model."""
    like = next((t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *input_shape, generator=generator, dtype=torch.float64).to(like.device, like.dtype)


def _compare(name: str, frozen: nn.Module, exported: Callable[[Tensor], Tensor], input_shape: Shape) -> None:
    """Raise ExportError unless both compute the same, to a thousand times the rounding unit, on batches of 1 and 3."""
    for batch in (1, 3):
        x = _random(frozen, input_shape, batch)
        with _refusals(f"{name} cannot run this model"), torch.no_grad():
            expected, got = frozen(x).cpu(), exported(x).cpu()
        limit = 1e3 * torch.finfo(x.dtype).eps * max(1.0, expected.abs().amax().item())
        if got.shape != expected.shape or not (got - expected).abs().amax() <= limit:
            error = (got - expected).abs().amax().item() if got.shape == expected.shape else "another shape"
            raise ExportError(
                f"{name}: the exported model differs by {error} on a batch of {batch}, expected at most {limit:.1e}; "
                f"nothing is written; a float32 model may fare better"
            )
