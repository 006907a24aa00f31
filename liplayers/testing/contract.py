"""Checks of the layer contract: construction, state and caches, freezing."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from liplayers.bounds import lipschitz_bound
from liplayers.core.weights import cached
from liplayers.export import freeze
from liplayers.testing.measure import computed_parts, worst_norm
from liplayers.testing.numerics import NUMERICS
from liplayers.testing.subject import (
    SIZES,
    Measured,
    Refused,
    Subject,
    bound_of,
    expect,
    expect_dtype,
    outputs,
    perturb,
    refusal,
    watched,
    worst,
)

__all__ = ["contract_checks"]

TORCHS: dict[str, Callable[..., nn.Module]] = {
    "linear": nn.Linear,
    "conv": nn.Conv2d,
    "conv_transpose": nn.ConvTranspose2d,
}


def contract_checks(subject: Subject) -> Iterator[tuple[str, str, Callable[[], Measured | None]]]:
    """(check, configuration, what to call) for every check of the contract."""
    chosen = CONTRACT | NUMERICS
    chosen |= IMAGES if subject.has_images else {}
    chosen |= CONVOLUTIONS if subject.role == "conv" else {}
    for check, variants in chosen.items():
        for variant in variants or [None]:
            arguments = [] if variant is None else [variant]
            configuration = "" if variant is None else str(variant).removeprefix("torch.")
            yield check.__name__.replace("_", " "), configuration, partial(check, subject, *arguments)


# Construction ---------------------------------------------------------------------------------------------------------


def signature(subject: Subject) -> None:
    """Written out, in torch's order and with torch's defaults; further arguments by keyword only."""
    ours = inspect.signature(subject.make).parameters
    hidden = [str(p) for p in ours.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    expect(not hidden, f"{', '.join(hidden)} in the constructor: write its arguments out")
    if subject.role not in TORCHS:
        return
    theirs = inspect.signature(TORCHS[subject.role]).parameters
    positional = [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    expect(positional == list(theirs), f"the arguments are {positional}; expected {list(theirs)}, others after a *")
    for name in positional:
        got, expected = ours[name].default, theirs[name].default
        expect(name in ("device", "dtype") or got == expected, f"{name}={got!r} by default; torch has {expected!r}")


def parameters_exist_after_construction(subject: Subject) -> None:
    layer, shape = subject.example()
    before = [id(p) for p in layer.parameters()]
    layer(torch.randn(1, *shape)).sum().backward()
    layer.eval()
    outputs(layer, torch.randn(1, *shape))
    expect([id(p) for p in layer.parameters()] == before, "a forward pass replaces or adds parameters")
    layer.reset_parameters()
    expect([id(p) for p in layer.parameters()] == before, "reset_parameters() replaces or adds parameters")


def device_and_dtype(subject: Subject) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer, shape = subject.example(dtype, device="cpu")
        expect_dtype(layer, shape, dtype)
    layer, shape = subject.example(device="meta")
    found = {p.device.type for p in layer.parameters()}
    expect(found == {"meta"}, f"device='meta' gives parameters on {sorted(found)}")
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    finite = torch.isfinite(layer(torch.randn(1, *shape))).all()
    expect(bool(finite), "to_empty() and reset_parameters() leave numbers that are not finite")


def shapes_on_meta(subject: Subject) -> None:
    layer, shape = subject.example()
    on_meta, _ = subject.example(device="meta")
    x = torch.randn(2, *shape)
    got, expected = tuple(on_meta(x.to("meta")).shape), tuple(layer(x).shape)
    expect(got == expected, f"an output of shape {got} on meta, {expected} on the CPU")


def representation(subject: Subject) -> None:
    """repr() shows what the constructor took."""
    sizes = (6, 5, 3)[: len(SIZES[subject.role])]
    text = subject.make(*sizes).extra_repr()
    missing = [size for size in sizes if str(size) not in text]
    expect(not missing, f"extra_repr() is {text!r}, which does not show {missing}")
    expect(text in " ".join(repr(subject.make(*sizes)).split()), f"repr() does not show {text!r}")
    expect("bias=False" not in text, f"extra_repr() is {text!r} by default")
    given = {"bias": False, "padding_mode": "circular", "hidden_features": 11, "hidden_channels": 13}
    for name, value in given.items():
        if subject.accepts(name):
            with suppress(Refused):
                shown = repr(subject.construct(*sizes, **{name: value})).replace("'", "")
                expect(f"{name}={value}" in shown, f"{name}={value} is not in {shown}")


def sizes_that_are_no_positive_integers(subject: Subject) -> None:
    """They are refused by name."""
    names = SIZES[subject.role]
    for i, name in enumerate(names):
        for bad in (0, -1, 1.5, True, "8"):
            sizes: list[Any] = [6] * len(names)
            sizes[i] = bad
            error = refusal(partial(subject.make, *sizes))
            expect(error is not None, f"{name}={bad!r} is accepted")
            expect(name in str(error) and repr(bad) in str(error), f"{name}={bad!r} gives an error without it: {error}")


def initial_gain(subject: Subject) -> Measured:
    """A deep stack neither decays nor explodes."""
    sizes, shape = {
        "linear": ((32, 32), (64, 32)),
        "conv": ((8, 8, 3), (8, 8, 9, 9)),
        "conv_transpose": ((8, 8, 2), (8, 8, 5, 5)),
        "dense_block": ((8,), (64, 8)),
        "conv_block": ((8,), (64, 8, 9, 9)),
    }[subject.role]
    arguments = {"conv": {"padding": 1}, "conv_transpose": {"stride": 2}}.get(subject.role, {})
    torch.manual_seed(0)
    layer, x = subject.make(*sizes, **arguments), torch.randn(shape)
    gain = (outputs(layer, x).norm() / x.norm()).item()
    expect(gain > 0.6, f"the initial layer keeps {gain:.3g} of the norm of Gaussian inputs; expected 0.6 at least")
    return worst([("Gaussian inputs", gain, bound_of(layer, tuple(x.shape[1:])))], 1e-5)


def attributes_of_torch(subject: Subject) -> None:
    ours, theirs = subject.make(3, 5, 3), nn.Conv2d(3, 5, 3)
    x = torch.randn(2, 3, 6, 7)
    expect(ours(x).shape == theirs(x).shape, f"an output of shape {tuple(ours(x).shape)} with the default arguments")
    sizes = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    for name in (*sizes, "padding_mode"):
        got, expected = getattr(ours, name), getattr(theirs, name)
        expect(got == expected, f"layer.{name} is {got!r}; torch has {expected!r}")


# State and caches -----------------------------------------------------------------------------------------------------


def state_dict_keys(subject: Subject) -> None:
    layer, shape = subject.example()
    keys = list(layer.state_dict())
    missing = {name for name, _ in layer.named_parameters()} - set(keys)
    expect(not missing, f"the state_dict lacks {sorted(missing)}")
    for training in (True, False):
        layer.train(training)
        layer(torch.randn(1, *shape))
        outputs(layer, torch.randn(1, *shape))
        bound_of(layer, shape)
        found = list(layer.state_dict())
        expect(found == keys, f"the state_dict has the keys {found} after a forward pass; before, {keys}")


def loading_in_eval(subject: Subject) -> None:
    layer, x = subject.warm()
    before = outputs(layer, x)
    other, _ = subject.example()
    perturb(other)
    buffer = io.BytesIO()
    torch.save(other.state_dict(), buffer)
    buffer.seek(0)
    layer.load_state_dict(torch.load(buffer, weights_only=True))
    expect(torch.equal(outputs(layer, x), outputs(other.eval(), x)), "a loaded layer computes something else: stale")
    expect(not torch.equal(outputs(layer, x), before), "loading other parameters changes nothing")


def _swap(p: nn.Parameter, new: Tensor, way: str) -> None:
    if way == "data.copy_":
        p.data.copy_(new)
    elif way == "data=":
        p.data = new
    else:
        with torch.no_grad():
            p.copy_(new)


def changed_parameters(subject: Subject, way: str) -> None:
    """Each alone, then all: a layer that has run computes what a new one with the same parameters does."""
    layer, x = subject.warm()
    before = outputs(layer, x)
    if way == "optimizer":
        layer(x).square().sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.5).step()
        perturb(layer, 0.1)
    else:
        for name, p in layer.named_parameters():
            _swap(p, p.detach() + 0.3 * torch.randn_like(p), way)
            fresh = torch.equal(outputs(layer, x), outputs(subject.twin(layer), x))
            expect(fresh, f"after a change of {name} the layer computes something else than a new one: stale")
    expect(not torch.equal(outputs(layer, x), before), "changing the parameters changes nothing")
    expect(
        torch.equal(outputs(layer, x), outputs(subject.twin(layer), x)),
        "the layer computes something else than a new one: stale",
    )


def deepcopy(subject: Subject) -> None:
    _expect_independent(subject, copy.deepcopy)


def pickling(subject: Subject) -> None:
    _expect_independent(subject, lambda layer: pickle.loads(pickle.dumps(layer)))


def _expect_independent(subject: Subject, clone: Callable[[nn.Module], nn.Module]) -> None:
    layer, x = subject.warm()
    before = outputs(layer, x)
    other = clone(layer)
    expect(torch.equal(outputs(other, x), before), "the copy computes something else")
    perturb(other)
    expect(torch.equal(outputs(layer, x), before), "changing the copy changes the layer")
    expect(torch.equal(outputs(other, x), outputs(subject.twin(other), x)), "the copy keeps a stale weight")
    expect(repr(layer) == repr(subject.twin(layer)), f"the repr changed: {layer!r}")


def casting(subject: Subject) -> None:
    """`.double()` computes the weight again, in double."""
    layer, x = subject.warm()
    before = outputs(layer, x)
    double = outputs(layer.double(), x.double())
    expect(double.dtype == torch.float64, f".double() gives outputs in {double.dtype}")
    torch.testing.assert_close(double.float(), before, rtol=1e-3, atol=1e-3)
    expected = outputs(subject.twin(layer, torch.float64), x.double())
    expect(torch.equal(double, expected), "after .double() the layer computes something else than one made in float64")
    back = outputs(layer.to(torch.float32), x).dtype
    expect(back == torch.float32, f".float() gives outputs in {back}")


def images_of_several_sizes(subject: Subject) -> None:
    layer, x = subject.warm()
    for size in [(4, 7), (9, 3), (6, 6), (3, 8), (5, 9), x.shape[-2:]]:
        y = torch.randn(2, x.shape[1], *size)
        expect(torch.equal(outputs(layer, y), outputs(subject.twin(layer), y)), f"stale on an image of {tuple(size)}")


def reading_changes_nothing(subject: Subject) -> None:
    layer, x = subject.warm()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    shape = tuple(x.shape[1:])
    first, bound = outputs(layer, x), bound_of(layer, shape)
    for _ in range(3):
        expect(torch.equal(outputs(layer, x), first), "the same input gives another output")
        expect(bound_of(layer, shape) == bound, "the bound changes from call to call")
    layer.train()
    torch.testing.assert_close(outputs(layer, x), first, rtol=0, atol=0)
    after = layer.state_dict()
    changed = [k for k in after if k not in before or not torch.equal(before[k], after[k])]
    expect(not changed and before.keys() == after.keys(), f"forward passes change the state: {changed}")


def written_weight(subject: Subject) -> None:
    """Writing into the weight that was handed out changes nothing that runs."""
    layer, x = subject.warm()
    before = outputs(layer, x)
    with torch.no_grad():
        for part in computed_parts(layer):
            for weight in tree_leaves(part.effective()) if part.has_weight else ():
                weight.mul_(3)
    expect(torch.equal(outputs(layer, x), before), "what was written into effective() stays")


def inference_mode(subject: Subject) -> None:
    """A weight kept from it serves a later backward pass."""
    layer, shape = subject.example()
    layer.eval().requires_grad_(False)
    x = torch.randn(2, *shape)
    with torch.inference_mode():
        expected = layer(x).clone()
    probe = x.clone().requires_grad_()
    y = layer(probe)
    y.square().sum().backward()
    expect(torch.equal(y.detach(), expected), "another output than in inference mode")
    expect(probe.grad is not None and bool(probe.grad.abs().sum() > 0), "no gradient reaches the input")


def cached_context(subject: Subject) -> None:
    """`liplayers.cached()` shares the weight, and notices changes."""
    layer, shape = subject.example()
    x = torch.randn(2, *shape)
    computed: list[Any] = []
    watched(layer, lambda: None, computed.append)
    plain = layer(x)
    once = len(computed)
    with cached():
        first = layer(x)
        with cached():
            second = layer(x)
        expect(len(computed) == 2 * once, f"{len(computed) - once} computations of weights in cached(), {once} outside")
        expect(torch.equal(first, plain) and torch.equal(second, plain), "another output in cached()")
        (first + second).square().sum().backward()
        perturb(layer)
        changed = layer(x)
        expect(len(computed) == 3 * once, "cached() does not notice that parameters changed")
    expect(torch.equal(changed, layer(x)), "another output in cached() after a change of parameters")
    expect(not torch.equal(changed, plain), "changing the parameters in cached() changes nothing")


def cached_context_with_other_parameters(subject: Subject) -> None:
    """`cached()` notices what torch.func.functional_call puts in the place of parameters."""
    layer, shape = subject.example()
    x = torch.randn(2, *shape)
    with cached():
        for scale in range(1, 7):
            values = {name: p * torch.linspace(1, scale, p.numel()).view_as(p) for name, p in layer.named_parameters()}
            inside = torch.func.functional_call(layer, values, (x,)).detach()
            twin, _ = subject.example()
            twin.load_state_dict({name: value.detach() for name, value in values.items()}, strict=False)
            torch.testing.assert_close(inside, outputs(twin, x))
            del values


def cached_context_of_equal_layers(subject: Subject) -> None:
    """What `cached(model)` maps together is what each layer maps by itself, up to rounding."""
    layers, shape = [subject.example(torch.float64)[0] for _ in range(3)], subject.example()[1]
    for layer in layers:
        perturb(layer, 0.1)
    model, x = nn.ModuleList(layers), torch.randn(2, *shape, dtype=torch.float64)

    def run() -> list[Tensor]:
        outputs = [layer(x) for layer in layers]
        gradients = torch.autograd.grad(sum(y.pow(3).sum() for y in outputs), list(model.parameters()))
        return [*outputs, *gradients]

    alone = run()
    for _ in range(2):  # in the first it learns what is used
        with cached(model):
            together = run()
        torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-9)


# Freezing -------------------------------------------------------------------------------------------------------------


def freezing(subject: Subject, dtype: torch.dtype) -> Measured:
    """What `liplayers.freeze` makes of it computes the same, and its bound, proven from its weights, is no larger."""
    layer, shape = subject.example(dtype)
    perturb(layer, 0.1)
    frozen = freeze(layer.eval(), shape)
    x = torch.randn(3, *shape, dtype=dtype)
    got, expected = outputs(frozen, x), outputs(layer, x)
    expect(got.dtype == expected.dtype, f"outputs in {got.dtype}, {expected.dtype} before")
    expect(got.shape == expected.shape, f"an output of shape {tuple(got.shape)}, {tuple(expected.shape)} before")
    difference = (got - expected).abs().max().item()
    allowed = (1e-12 if dtype is torch.float64 else 1e-5) * max(1.0, expected.abs().max().item())
    expect(difference <= allowed, f"the frozen layer's outputs differ by {difference:.3g} > {allowed:.3g}")
    expect(not computed_parts(frozen), "a parametrisation is left")
    expect(not any(m.training for m in frozen.modules()), "the frozen layer is in training mode")
    expect(not any(p.requires_grad for p in frozen.parameters()), "the frozen layer asks for gradients")
    if dtype is not torch.float64:
        return Measured(difference, allowed, "outputs")
    bound = lipschitz_bound(frozen, shape)
    stated = worst([("the frozen layer's bound", bound, bound_of(layer, shape))], 1e-6)
    return stated if stated.exceeded else worst([("", worst_norm(frozen, shape, subject.nonlinear), bound)], 1e-9)


CONTRACT: dict[Callable[..., Measured | None], tuple] = {  # checks, and what they are run for
    signature: (),
    parameters_exist_after_construction: (),
    device_and_dtype: (),
    shapes_on_meta: (),
    representation: (),
    sizes_that_are_no_positive_integers: (),
    initial_gain: (),
    state_dict_keys: (),
    loading_in_eval: (),
    changed_parameters: ("data.copy_", "data=", "copy_", "optimizer"),
    deepcopy: (),
    pickling: (),
    casting: (),
    reading_changes_nothing: (),
    written_weight: (),
    inference_mode: (),
    cached_context: (),
    cached_context_of_equal_layers: (),
    cached_context_with_other_parameters: (),
    freezing: (torch.float64, torch.float32),
}
IMAGES: dict[Callable[..., Measured | None], tuple] = {images_of_several_sizes: ()}
CONVOLUTIONS: dict[Callable[..., Measured | None], tuple] = {attributes_of_torch: ()}
