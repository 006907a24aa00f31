"""Whether a model computes what was understood of it: its traced programs against itself, on random inputs.

A copy of the model runs on batches of two sizes, with gradients and without, and every call of a module that the proof
goes through is recorded. A sequence has to call its children one after the other, each with what the one
before it returned. A program runs again on what its module was given, with what the modules that it calls returned, and
has to give bit-identical results, since it does the same operations on the same numbers. Both also run on random
numbers, in the place of what the modules return, too, and in every mode of gradients, so that nothing hides behind
zeros or NaN.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from liplayers.bounds.graph import Shapes
from liplayers.bounds.inputs import Inputs
from liplayers.bounds.trace import Given, Program
from liplayers.bounds.twin import private_copy
from liplayers.errors import UnknownBoundError

__all__ = ["Trial"]

_RUNS = ((2, torch.inference_mode), (3, torch.enable_grad))  # batches: what is none has the same size in both
_MODES = (torch.no_grad, torch.inference_mode, torch.enable_grad)
_INTERNAL = vars(nn.Module()).keys() - {"training"}
_APART = 1e4  # rounding units by which logits may depend on the size of the batch


@dataclass
class _Call:
    """One call of a module: what it was given and returned, as objects and as the values that they had then.

    What it is given are the tensors among its arguments.
    """

    module: nn.Module
    given: list[Any]
    before: list[Any]
    result: Any = None
    after: Any = None
    calls: list[_Call] = field(default_factory=list)


class _Answers:
    """Stands for the modules that a program calls: returns what it was given, and keeps what it was asked."""

    def __init__(self, answers: Sequence[Tensor]) -> None:
        self.answers = answers
        self.again()

    def again(self) -> None:
        self.left = deque(self.answers)
        self.asked: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.asked += map(_kept, (*args, *kwargs.values()))
        return _given(self.left.popleft())


def _answered(answers: _Answers, in_place: bool, *args: Any, **kwargs: Any) -> Tensor:
    answer = answers(*args, **kwargs)
    (x,) = (*args, *kwargs.values())
    return x.copy_(answer) if in_place else answer


class Trial:
    """The runs, and what they showed.

    Args:
        model: as it is, in its mode; a copy of it runs.
        inputs: of the model.
        sequences: the paths of the children of each sequence.
        programs: by path.

    Attributes:
        refused: by path, what computes something else than was understood of it, with the reason.
        shapes: by program and shape of its input, those of the program's values without the batch dimension, None
            where they have none.

    Raises:
        UnknownBoundError: the model cannot be copied, or does not run on batches of several samples.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        sequences: Mapping[str, Sequence[str]],
        programs: Mapping[str, Program],
    ) -> None:
        self.refused: dict[str, str] = {}
        self._seen: dict[tuple[Program, tuple], dict[fx.Node, dict[int, tuple[int, ...]]]] = {}
        self._model = private_copy(model)
        for module in self._model.modules():  # they only see gradients, but stand between what is returned and given
            module._backward_hooks.clear()
            module._backward_pre_hooks.clear()
        self._sequences = {self._part(path): [self._part(p) for p in parts] for path, parts in sequences.items()}
        self._programs = {self._part(path): (path, program) for path, program in programs.items()}
        self._calls: list[_Call] = []
        largest = max(size for size, _ in _RUNS)
        self._generator = torch.Generator().manual_seed(0)
        self._inputs = inputs
        samples = inputs.filled(partial(self._sample, largest))
        results, states = [], []
        with self._recorded():
            for size, mode in _RUNS:
                results.append(self._run([x[:size] for x in samples], mode))
                states.append(self._states())  # after each run: what the first one sets shows in what the next computes
        for path, before in states[0].items():
            after = states[-1][path]
            changed = next((name for name in before | after if before.get(name) != after.get(name)), None)
            if changed is not None:
                self.refused[path] = f"a call changes {changed}, on which its forward may depend: keep no state"
        if not self.refused:
            _check_samples_apart(results, samples[0])

    @property
    def shapes(self) -> dict[Program, dict[tuple, Shapes]]:
        """See the class."""
        found: dict[Program, dict[tuple, Shapes]] = {}
        for (program, given), nodes in self._seen.items():
            found.setdefault(program, {})[given] = {node: _without_batch(sizes) for node, sizes in nodes.items()}
        return found

    def _part(self, path: str) -> nn.Module:
        return self._model.get_submodule(path)

    def _run(self, samples: list[Tensor], mode: Callable[[], Any]) -> list[Any]:
        with torch.inference_mode(False), mode():
            try:
                args, kwargs = self._inputs.nested([*map(_given, samples)])
                result = self._model(*args, **kwargs)
            except Exception as error:  # of the user's code: anything may come out
                raise UnknownBoundError(
                    f"it does not run on a batch of {len(samples[0])} ({' '.join(str(error).split())})"
                ) from None
            calls, self._calls = self._calls, []
            for call in calls:
                self._verify(call, len(samples[0]))
        return tree_leaves(tree_map(_kept, result))

    # recording

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        called = set(self._programs)
        called |= {m.get_submodule(p) for m, (_, program) in self._programs.items() for p in program.calls()}
        everything = called.union(self._sequences, *self._sequences.values())
        stack: list[_Call] = []

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = tree_leaves((args, kwargs))
            call = _Call(module, given, [*map(_kept, given)] if module in called else [])
            (stack[-1].calls if stack else self._calls).append(call)
            stack.append(call)

        def leave(module: nn.Module, args: tuple, result: Any) -> None:
            call = stack.pop()
            call.result, call.after = result, tree_map(_kept, result) if module in called else None

        handles = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in everything]
        handles += [m.register_forward_hook(leave) for m in everything]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # comparing

    def _verify(self, call: _Call, batch: int) -> None:
        if call.module in self._sequences:
            self._verify_sequence(call)
        elif call.module in self._programs:
            self._verify_program(call, batch)
        for inner in call.calls:
            self._verify(inner, batch)

    def _verify_sequence(self, call: _Call) -> None:
        children, value = self._sequences[call.module], call.given[0] if len(call.given) == 1 else None
        same = len(children) == len(call.calls)
        for child, inner in zip(children, call.calls, strict=False):
            same &= inner.module is child and len(inner.given) == 1 and inner.given[0] is value
            value = inner.result
        if not same or call.result is not value:
            path = next(name for name, m in self._model.named_modules() if m is call.module)
            self.refused[path] = "it does not run its children one after the other"

    def _verify_program(self, call: _Call, batch: int) -> None:
        path, program = self._programs[call.module]
        left = deque(call.calls)

        def returned(name: str, *args: Any, **kwargs: Any) -> Any:
            inner = left.popleft()
            (x,) = (*args, *kwargs.values())
            if inner.module is not call.module.get_submodule(name) or not _all_same(inner.before, [x]):
                raise ValueError(name)
            return inner.after

        try:
            values = program.run([*map(_kept, call.before)], returned)
            same = not left and _all_same(values[program.output], call.after) and self._agree_on_random(call, program)
        except Exception:  # whatever a program that is not this module's may do
            same = False
        if not same:
            self.refused[path] = (
                "its forward computes something else than its trace: it may ask for the type of its input, for the "
                "mode of gradients or how often it was called, or change a tensor in place that it uses again"
            )
        elif all(isinstance(x, Tensor) for x in call.before):
            nodes = self._seen.setdefault((program, _shapes(call.before)), {})
            for node, value in values.items():
                if isinstance(value, Tensor):
                    nodes.setdefault(node, {})[batch] = tuple(value.shape)

    def _agree_on_random(self, call: _Call, program: Program) -> bool:
        """In every mode; once for each shape of the input, since only the modes differ."""
        if (program, _shapes(call.before)) in self._seen:
            return True
        inputs, answers = [*map(self._random, call.before)], [self._random(inner.after) for inner in call.calls]
        own, traced = _Answers(answers), _Answers(answers)
        leaves = {call.module.get_submodule(path) for path in program.calls()}
        for mode in _MODES:
            with torch.inference_mode(False), mode():
                for leaf in leaves:
                    in_place = bool(getattr(leaf, "inplace", False))
                    leaf._compiled_call_impl = partial(_answered, own, in_place)  # type: ignore[assignment]
                try:
                    args, kwargs = tree_unflatten([*map(_given, inputs)], program.inputs)
                    result = call.module.forward(*args, **kwargs)
                finally:
                    for leaf in leaves:
                        del leaf._compiled_call_impl
                values = program.run([*map(_given, inputs)], lambda path, *args, **kwargs: traced(*args, **kwargs))
                asked = zip(own.asked, traced.asked, strict=True)
                if not _all_same(values[program.output], result) or not all(_same(a, b) for a, b in asked):
                    return False
                own.again()
                traced.again()
        return True

    def _sample(self, batch: int, given: Given) -> Tensor:
        shape = (batch, *given.shape)
        if given.dtype.is_floating_point:
            return self._random(torch.empty(shape, dtype=given.dtype, device=self._inputs.device))
        return torch.randint(0, 2, shape, generator=self._generator).to(self._inputs.device, given.dtype)

    def _random(self, like: Tensor) -> Tensor:
        if not like.is_floating_point():  # positions in a table
            return like.clone()
        with torch.inference_mode(False):
            return torch.randn(like.shape, generator=self._generator).to(like.device, like.dtype)

    def _states(self) -> dict[str, dict[str, str]]:
        """What a call may change and a later one read, by path of each program and a name for it."""
        found: dict[str, dict[str, str]] = {}
        for module, (path, program) in self._programs.items():
            leaves = tuple(f"{name}." for name in program.calls())
            parts = {name: part for name, part in module.named_modules() if not f"{name}.".startswith(leaves)}
            found[path] = {
                f"{what} of its {name}" if name else what: state
                for name, part in parts.items()
                for what, state in _state(part).items()
            }
        return found


def _given(x: Tensor) -> Tensor:
    """x as an input in this mode. Where gradients are on it has one and is no leaf, which could not be written to."""
    return x.detach().requires_grad_(torch.is_grad_enabled() and x.is_floating_point()).clone()


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())  # NaN where both are


def _all_same(a: Any, b: Any) -> bool:
    """Of nested tensors and other values."""
    (first, structure), (second, other) = tree_flatten(_plain(a)), tree_flatten(_plain(b))
    if structure != other:
        return False
    return all(_same(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(first, second, strict=True))


def _plain(value: Any) -> Any:
    """Without the collections of torch.fx, which cannot be changed."""
    if isinstance(value, (immutable_list, immutable_dict)):
        return [*map(_plain, value)] if isinstance(value, list) else {key: _plain(v) for key, v in value.items()}
    return tuple(map(_plain, value)) if type(value) is tuple else value


def _shapes(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(x.shape[1:]) for x in tensors)


def _without_batch(sizes: dict[int, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape behind the batch dimension, from those for several sizes of the batch; None if it has none."""
    found = {shape[1:] for shape in sizes.values()}
    batched = all(shape[:1] == (batch,) for batch, shape in sizes.items())
    return found.pop() if batched and len(found) == 1 else None


def _check_samples_apart(results: Sequence[list[Any]], like: Tensor) -> None:
    """Raise unless each sample's result is the same in both batches, up to rounding."""
    (size, _), (largest, _) = _RUNS
    for result, other in zip(*results, strict=True):
        tensors = [isinstance(x, Tensor) and x.dim() > 0 and len(x) == n for x, n in ((result, size), (other, largest))]
        if not all(tensors):
            continue  # what has no sample for each sample is refused by its shape
        dtypes = [result.dtype, like.dtype]
        if torch.is_autocast_enabled(like.device.type):
            dtypes.append(torch.get_autocast_dtype(like.device.type))
        if like.device.type != "cpu":
            dtypes.append(torch.float16)  # TF32 has its rounding unit
        unit = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
        distance = (result - other[:size]).abs().amax() if result.numel() else torch.zeros(())
        if distance > _APART * unit * max(1.0, other[:size].abs().amax().item() if result.numel() else 0.0):
            raise UnknownBoundError("its result for a sample depends on the other samples of its batch")


def _state(module: nn.Module) -> dict[str, str]:
    """Attributes of a module and its class, and what its methods know from outside, as text."""
    found = {f"its attribute {name!r}": value for name, value in vars(module).items() if name not in _INTERNAL}
    found |= {f"its tensor {name!r}": _written(tensor) for name, tensor in module._buffers.items()}
    found |= {f"its tensor {name!r}": _written(tensor) for name, tensor in module._parameters.items()}
    kind = type(module)
    found |= {f"{kind.__name__}.{name}": value for name, value in vars(kind).items() if not name.startswith("__")}
    bases = [base for base in kind.__mro__ if _is_users(base)]
    found |= _outside([value for base in bases for value in vars(base).values()], set())
    return {name: _text(value) for name, value in found.items()}


def _is_users(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "torch").partition(".")[0] not in ("torch", "liplayers", "builtins")


def _outside(values: Iterable[Any], seen: set[Any]) -> dict[str, Any]:
    """The defaults, attributes and outer variables of the functions among some values, and of those that they know."""
    found: dict[str, Any] = {}
    for function in (inspect.unwrap(value) for value in values if inspect.isfunction(value) and _is_users(value)):
        if function in seen or not inspect.isfunction(function):
            continue
        seen.add(function)
        found[f"a default of {function.__qualname__}"] = (function.__defaults__, function.__kwdefaults__)
        found[f"an attribute of {function.__qualname__}"] = vars(function)
        with suppress(ValueError):  # of a variable that has no value yet
            known = inspect.getclosurevars(function)
            variables = {**known.nonlocals, **known.globals}
            found |= {f"the variable {name!r}": value for name, value in variables.items()}
            found |= _outside(variables.values(), seen)
    return found


def _written(tensor: Tensor | None) -> tuple:
    return () if tensor is None else (id(tensor), tensor._version, tensor)


def _text(value: Any, depth: int = 3) -> str:
    """A value as far as a counter or a switch would show in it; new larger tensors are results that are kept."""
    if isinstance(value, Tensor):
        written = 0 if value.is_inference() else value._version
        return str(value.item()) if value.numel() == 1 else f"tensor, written to {written} times"
    if isinstance(value, (str, bytes, int, float, complex, type(None))):
        return repr(value)
    if not depth or callable(value) or inspect.ismodule(value):
        return type(value).__name__
    if isinstance(value, Mapping):
        return "".join(f"{key}: {_text(v, depth - 1)}," for key, v in islice(value.items(), 100))
    if isinstance(value, (list, tuple, deque, Set)):
        return f"{len(value)}: " + "".join(f"{_text(v, depth - 1)}," for v in islice(value, 100))
    with suppress(Exception):  # of the user's __repr__
        return repr(value) + (_text(vars(value), depth - 1) if hasattr(value, "__dict__") else "")
    return type(value).__name__
