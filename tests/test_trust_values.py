"""Proofs are about values: what parts hold, what a trace computes, which weights run, what is a constant."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import liplayers as lp
from liplayers.bounds import classifier_bounds, lipsdp_bound, torch_modules
from liplayers.certification.network import CertifiedNetwork
from liplayers.errors import ArgumentError, LipschitzError, ShapeError, UnknownBoundError
from liplayers.modules.activations import FrozenHouseholder, sector, slope_range, tied_channels


def foreign(body: Callable, **parts: object) -> nn.Module:
    """A custom module with the given forward, children, buffers and attributes."""
    module = type("Foreign", (nn.Module,), {"forward": body})()
    for name, part in parts.items():
        if isinstance(part, Tensor):
            module.register_buffer(name, part)
        else:
            setattr(module, name, part)
    return module


def quotient(module: Callable, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return ((module(x) - module(y)).double().norm() / (x - y).double().norm()).item()


# Parts by what they hold ----------------------------------------------------------------------------------------------


def folded(dense: bool = True) -> nn.Module:
    torch.manual_seed(0)
    if dense:
        return lp.freeze(lp.LDLTBlock(4, hidden_features=4, activation=lp.Householder(4))).double()
    block = lp.LDLTConv2dBlock(2, hidden_channels=4, activation=lp.Householder(4))
    return lp.freeze(block, (2, 4, 4)).double()


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("factor", [1.2, 10.0, math.inf])
def test_a_fold_that_stretches_is_not_taken_for_one_that_does_not(dense: bool, factor: float):
    block, shape = folded(dense), (4,) if dense else (2, 4, 4)
    assert lp.lipschitz_bound(nn.Sequential(block), shape) == 1
    block.activation.mirrors.mul_(factor)
    for bound in (block.lipschitz_bound, lambda: lp.lipschitz_bound(nn.Sequential(block), shape)):
        with pytest.raises(LipschitzError):
            bound()


def test_a_fold_couples_the_channels_that_its_mirrors_say():
    fold = FrozenHouseholder(torch.tensor([[[0.6], [-0.8]]]), 4, 1)  # one pair: channel 1 with channel 0
    assert tied_channels(fold, 4) == [0, 0, 1, 2]
    low, high = sector(None, fold)
    assert (low, high) == (-fold.lipschitz_bound(), fold.lipschitz_bound())
    x, eye = torch.randn(50, 4), torch.eye(4)
    changes = [(fold(x + eye[j]) - fold(x)).any(0) for j in range(4)]
    assert {(i, j) for i, j in itertools.product(range(4), repeat=2) if changes[j][i]} == {
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (3, 3),
    }  # fmt: skip


def scaled(part: nn.Module, how: str) -> None:
    """Make a module return ten times what it says."""
    original = part.forward
    if how == "hook":
        part.register_forward_hook(lambda module, args, result: 10 * result)
    elif how == "method":
        part.forward = lambda x: 10 * original(x)
    elif how == "call":
        part._call_impl = lambda x: 10 * original(x)
    else:
        part._compiled_call_impl = lambda x: 10 * original(x)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "LDLT": (lambda: lp.LDLTBlock(4), "activation"),
    "sandwich": (lambda: lp.SandwichBlock(4), "activation"),
    "SLL": (lambda: lp.SLLBlock(4), "activation"),
    "frozen LMI": (lambda: lp.freeze(lp.LDLTBlock(4)), "activation"),
    "frozen LMI, layer": (lambda: lp.freeze(lp.LDLTBlock(4)), "inner.0"),
    "frozen SLL": (lambda: lp.freeze(lp.SLLBlock(4)), "activation"),
    "frozen SLL, layer": (lambda: lp.freeze(lp.SLLBlock(4)), "outgoing"),
    "frozen convex sum": (lambda: lp.freeze(lp.ConvexResidual(nn.ReLU())), "branch"),
}


@pytest.mark.parametrize("how", ["hook", "method", "call", "compiled"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_part_that_was_changed_is_refused_in_every_block(name: str, how: str):
    make, path = BLOCKS[name]
    block = make()
    scaled(block.get_submodule(path), how)
    for model in (block, nn.Sequential(block), foreign(lambda self, x: self.b(x), b=block)):
        with pytest.raises((UnknownBoundError, ArgumentError)):
            lp.lipschitz_bound(model, (4,))
    if "convex" not in name:
        with pytest.raises((UnknownBoundError, ArgumentError)):
            block.lipschitz_bound()


def test_methods_replaced_in_one_layer_are_refused():
    layer = lp.AOLLinear(4, 4)
    layer.map_weight = lambda raw: 10 * raw
    with pytest.raises(UnknownBoundError, match="replaced"):
        lp.lipschitz_bound(layer, (4,))
    activation = nn.ReLU()
    assert slope_range(activation) == (0, 1)
    scaled(activation, "hook")
    assert slope_range(activation) is None


def test_a_module_compiled_in_place_counts_as_itself():
    model = nn.Sequential(lp.Scale(2.0))
    model.compile()
    assert lp.lipschitz_bound(model, (4,)) == 2


def changed_convolutions() -> dict[str, tuple[nn.Module, dict]]:
    """Modules whose attributes were set after construction."""
    torch.manual_seed(0)

    def conv(**arguments: object) -> nn.Conv2d:
        return nn.Conv2d(2, 3, 3, padding=1, bias=False, dtype=torch.float64, **arguments)  # type: ignore[arg-type]

    return {
        "stride": (conv(stride=2), {"stride": 1}),
        "dilation": (conv(), {"dilation": (2, 2)}),
        "padding mode": (conv(), {"padding_mode": "circular", "_reversed_padding_repeated_twice": [4, 4, 4, 4]}),
        "kernel size": (conv(padding_mode="circular"), {"kernel_size": (9, 9)}),
        "pooling": (nn.AvgPool2d(2), {"stride": 1}),
        "pooling without stride": (nn.MaxPool2d(2), {"stride": None}),
        "pooling, divisor": (nn.AvgPool2d(2), {"divisor_override": 1}),
    }


@pytest.mark.parametrize("name", changed_convolutions())
def test_rules_go_by_what_a_module_holds_now(name: str):
    module, attributes = changed_convolutions()[name]
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    pixels = torch.eye(72, dtype=torch.float64).view(-1, 2, 6, 6)
    truth = torch.linalg.matrix_norm(module(pixels).flatten(1), 2).item() if name != "pooling without stride" else 1.0
    assert truth <= lp.lipschitz_bound(module, (2, 6, 6)) * (1 + 1e-12)


# Traces against what runs ---------------------------------------------------------------------------------------------


def counting(increase: Callable, read: Callable) -> Callable:
    """A forward that would compute something else from its hundredth call on."""

    def body(self: nn.Module, x: Tensor) -> Tensor:
        increase(self)
        return x if read(self) < 100 else 5 * x

    return body


def increased(owner: object, name: str) -> None:
    setattr(owner, name, getattr(owner, name, 0) + 1)


CALLS = [0]
NUMBERS = itertools.count()


def in_a_closure() -> Callable:
    calls = {"made": 0}

    def body(self: nn.Module, x: Tensor) -> Tensor:
        calls["made"] += 1
        return x if calls["made"] < 100 else 5 * x

    return body


def counted_globally(self: nn.Module, x: Tensor) -> Tensor:
    CALLS[0] += 1
    return x if CALLS[0] < 100 else 5 * x


def helped(x: Tensor) -> Tensor:
    CALLS[0] += 1
    return x if CALLS[0] < 100 else 5 * x


def with_a_default(self: nn.Module, x: Tensor, calls: list[int] = [0]) -> Tensor:  # noqa: B006
    calls[0] += 1
    return x if calls[0] < 100 else 5 * x


UNFAITHFUL: dict[str, nn.Module] = {
    "type of the input": foreign(lambda self, x: x * 5 if isinstance(x, Tensor) else x),
    "exact type": foreign(lambda self, x: x * 5 if type(x) is Tensor else x),
    "is_tensor": foreign(lambda self, x: x * 5 if torch.is_tensor(x) else x),
    "gradients on": foreign(lambda self, x: x * 5 if torch.is_grad_enabled() else x),
    "gradients off": foreign(lambda self, x: x if torch.is_grad_enabled() else x * 5),
    "inference": foreign(lambda self, x: x * 5 if torch.is_inference_mode_enabled() else x),
    "leaf": foreign(lambda self, x: x * 5 if x.requires_grad else x),
    "size of the batch": foreign(lambda self, x: x * 5 if x.shape[0] > 2 else x),
    "random factor": foreign(lambda self, x: x * random.random()),
    "random term": foreign(lambda self, x: x + torch.rand(4)),
    "counter": foreign(counting(lambda self: increased(self, "n"), lambda self: self.n)),
    "private counter": foreign(counting(lambda self: increased(self, "_n"), lambda self: self._n)),
    "counter of the class": foreign(counting(lambda self: increased(type(self), "n"), lambda self: self.n)),
    "list": foreign(counting(lambda self: self.n.append(0), lambda self: len(self.n)), n=[]),
    "buffer": foreign(counting(lambda self: self.n.add_(1), lambda self: self.n.item()), n=torch.zeros(())),
    "tensor of several": foreign(
        counting(lambda self: self.n[0].add_(1), lambda self: self.n[0][0]), n=[torch.zeros(2)]
    ),
    "dtype of a constant": foreign(lambda self, x: x.view(x.new_zeros(1, dtype=torch.int32).dtype) * 1.0),
    "closure": foreign(in_a_closure()),
    "global": foreign(counted_globally),
    "in a function": foreign(lambda self, x: helped(x)),
    "default": foreign(with_a_default),
    "in a part": foreign(
        lambda self, x: self.p(x), p=foreign(counting(lambda self: increased(self, "n"), lambda self: self.n)), n=0
    ),
    "iterator": foreign(lambda self, x: x if next(NUMBERS) < 100 else 5 * x),
    "through forward": foreign(lambda self, x: self.m(x) if isinstance(x, Tensor) else x, m=lp.Scale(5.0)),
}


@pytest.mark.parametrize("name", UNFAITHFUL)
def test_a_trace_that_is_not_what_runs_is_refused(name: str):
    module = UNFAITHFUL[name]
    for model in (module, nn.Sequential(nn.ReLU(), module), foreign(lambda self, x: self.m(x), m=module)):
        with pytest.raises(UnknownBoundError):
            lp.lipschitz_bound(model, (4,))
        with pytest.raises(UnknownBoundError):
            lp.split_head(model, (4,))


def test_a_tensor_that_a_layer_changes_in_place_is_used_again_as_it_is_then():
    def body(self: nn.Module, x: Tensor) -> Tensor:
        y = 2 * x
        return self.relu(y) - y

    module = foreign(body, relu=nn.ReLU(inplace=True))
    assert not module(torch.randn(5, 4)).any()  # both are what the layer left
    assert lp.lipschitz_bound(module, (4,)) == 4
    assert lp.lipschitz_bound(foreign(lambda self, x: self.relu(2 * x), relu=nn.ReLU(inplace=True)), (4,)) == 2


@pytest.mark.parametrize("where", ["input", "argument", "result"])
def test_nothing_hides_behind_zeros(where: str):
    dead = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    nn.init.constant_(dead[0].bias, -100.0)  # zero for all inputs of a trial, not for all inputs

    def body(self: nn.Module, x: Tensor) -> Tensor:
        five = 5 if isinstance(x, Tensor) else 1
        if where == "argument":
            return self.dead(five * self.dead(x))
        return five * self.dead(x) if where == "result" else five * x

    module = foreign(body, dead=dead)
    with pytest.raises(UnknownBoundError, match="trace"):
        lp.lipschitz_bound(nn.Sequential(dead, module), (4,))


def test_densenets_idiom_is_refused_and_a_faithful_one_is_not():
    def idiom(self: nn.Module, x: Tensor) -> Tensor:
        features = [x] if isinstance(x, Tensor) else x
        return torch.cat([self.scale(torch.cat(features, 1)), *features], 1)

    with pytest.raises(UnknownBoundError):
        lp.lipschitz_bound(foreign(idiom, scale=lp.Scale(2.0)), (4,))
    plain = foreign(lambda self, x: torch.cat([self.scale(x), x], 1), scale=lp.Scale(2.0))
    assert lp.lipschitz_bound(plain, (4,)) == pytest.approx(math.sqrt(5))


class Thrice(nn.Sequential):
    def __iter__(self):
        return iter([*super().__iter__()] * 3)


class OtherLength(nn.Sequential):
    def __len__(self):
        return 1


class ThriceList(nn.ModuleList):
    def __iter__(self):
        return iter([*super().__iter__()] * 3)


class CalledOtherwise(nn.Sequential):
    def _call_impl(self, *args, **kwargs):
        return 5 * super()._call_impl(*args, **kwargs)


class Wrapped(nn.ReLU):
    def _wrapped_call_impl(self, x):
        return 5 * x

    __call__ = _wrapped_call_impl


class FoundOtherwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.ReLU()

    def __getattr__(self, name: str):
        found = super().__getattr__(name)
        return (lambda x: 5 * found(x)) if name == "part" else found

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


class ItsModules(dict):
    def values(self):
        return [*super().values()] * 2


def other_modules() -> nn.Module:
    model = nn.Sequential(lp.Scale(2.0))
    model._modules = ItsModules(model._modules)
    return model


def in_turn(self: nn.Module, x: Tensor) -> Tensor:
    for layer in self.layers:
        x = layer(x)
    return x


WALKS: dict[str, Callable[[], nn.Module]] = {
    "iteration": lambda: Thrice(lp.Scale(2.0)),
    "length": lambda: OtherLength(lp.Scale(2.0)),
    "list": lambda: foreign(in_turn, layers=ThriceList([lp.Scale(2.0)])),
    "list in a container": lambda: concatenated(),
    "call": lambda: CalledOtherwise(nn.ReLU()),
    "wrapped call": lambda: nn.Sequential(Wrapped()),
    "attributes": FoundOtherwise,
    "modules": other_modules,
}


def concatenated() -> nn.Module:
    joined = lp.Concatenate([lp.Scale(2.0)])
    joined.paths = ThriceList(joined.paths)
    return joined


@pytest.mark.parametrize("shape", [(4,), None])
@pytest.mark.parametrize("name", WALKS)
def test_what_walks_or_is_called_otherwise_is_refused(name: str, shape: tuple[int, ...] | None):
    for model in (WALKS[name](), nn.Sequential(WALKS[name]())):
        with pytest.raises(UnknownBoundError):
            lp.lipschitz_bound(model, shape)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(nn.ReLU, "forward"), (nn.Sequential, "forward"), (nn.Sequential, "__iter__"), (nn.Hardtanh, "forward")],
)
def test_a_class_of_torch_that_was_changed_is_refused(kind: type, name: str, monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(lp.Scale(2.0), nn.ReLU(), nn.ReLU6())
    assert lp.lipschitz_bound(model) == 2
    original = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda self, *args: original(self, *args))
    with pytest.raises(UnknownBoundError, match=r"replaced|overridden"):
        lp.lipschitz_bound(model)


def test_a_weight_of_a_class_that_multiplies_otherwise_is_refused():
    class Tenfold(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            result = super().__torch_function__(function, types, args, kwargs or {})
            return 10 * result if function is nn.functional.linear else result

    layer = nn.Linear(4, 4)
    del layer.weight
    layer.register_buffer("weight", torch.eye(4).as_subclass(Tenfold))
    with pytest.raises(UnknownBoundError, match="tensor"):
        lp.lipschitz_bound(layer, (4,))


def test_hooks_that_see_gradients_only_do_not_matter():
    model = nn.Sequential(nn.ReLU(), foreign(lambda self, x: self.m(x), m=lp.Scale(2.0)))
    for module in model.modules():
        module.register_full_backward_hook(lambda module, given, received: None)
    with torch.inference_mode():
        assert lp.lipschitz_bound(model, (4,)) == 2


def test_plain_lists_are_traced_as_they_run():
    scale = lp.Scale(2.0)
    assert lp.lipschitz_bound(foreign(in_turn, layers=nn.ModuleList([scale, nn.ReLU(), scale])), (4,)) == 4


def test_a_trial_leaves_no_trace():
    def body(self: nn.Module, x: Tensor) -> Tensor:
        self.kept = x
        self.seen.add_(1)
        return x

    module = foreign(body, seen=torch.zeros(()))
    before = dict(vars(module))
    with pytest.raises(UnknownBoundError, match="'seen'"):
        lp.lipschitz_bound(module, (4,))
    assert module.seen == 0
    assert vars(module).keys() == before.keys()
    state = torch.get_rng_state()
    lp.lipschitz_bound(foreign(lambda self, x: self.m(x), m=lp.Scale(2.0)), (4,))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_forward_may_keep_a_result_that_it_does_not_use():
    def body(self: nn.Module, x: Tensor) -> Tensor:
        self.kept = x
        return 2 * x

    assert lp.lipschitz_bound(foreign(body), (4,)) == 2


def test_what_the_first_call_decides_is_seen():
    def body(self: nn.Module, x: Tensor) -> Tensor:
        first, self.called = not hasattr(self, "called"), True
        return x if first else 5 * x

    with pytest.raises(UnknownBoundError, match="trace"):
        lp.lipschitz_bound(foreign(body), (4,))


def test_a_trace_needs_a_shape_to_be_compared():
    with pytest.raises(UnknownBoundError, match="pass input_shape"):
        lp.lipschitz_bound(foreign(lambda self, x: 2 * x))


def test_the_mode_of_the_model_is_that_of_the_trial():
    module = foreign(lambda self, x: 5 * x if self.training else x)
    assert lp.lipschitz_bound(module.train(), (4,)) == 5
    assert lp.lipschitz_bound(module.eval(), (4,)) == 1


# Weights as they run --------------------------------------------------------------------------------------------------

ROUNDED_UP = 1.0042  # bfloat16 has 1 and 1.0078125 around it


def filled(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """One entry of the kernel is set, the others are zero; no bias."""
    module = module.to(dtype)
    weight = nn.init.zeros_(module.weight)
    weight.data.view(-1)[weight[0, 0].numel() // 2 if weight.dim() > 1 else 0] = ROUNDED_UP
    return module


WEIGHTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(1, 1, bias=False), (1,)),
    "Conv1d": (lambda: nn.Conv1d(1, 1, 3, padding=1, bias=False), (1, 5)),
    "Conv2d": (lambda: nn.Conv2d(1, 1, 3, padding=1, bias=False), (1, 5, 5)),
    "Conv2d, circular": (lambda: nn.Conv2d(1, 1, 3, padding=1, bias=False, padding_mode="circular"), (1, 5, 5)),
    "Conv2d, reflecting": (lambda: nn.Conv2d(1, 1, 3, padding=1, bias=False, padding_mode="reflect"), (1, 5, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(1, 1, 3, padding=1, bias=False), (1, 5, 5)),
    "PReLU": (lambda: nn.PReLU(), (5,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WEIGHTED)
def test_under_autocast_the_weight_that_runs_is_bounded(name: str, dtype: torch.dtype):
    make, shape = WEIGHTED[name]
    module = filled(make(), dtype)
    x = torch.zeros(1, *shape, dtype=dtype)
    x.view(-1)[x.numel() // 2] = -1.0  # a power of two: the product is not rounded
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quotient(module, x, 0 * x)
        assert found >= ROUNDED_UP - 1e-7
        assert found <= lp.lipschitz_bound(module, shape) <= 2.1 * found
        assert found <= classifier_bounds(nn.Sequential(nn.Identity(), module), shape).upper["1"]
    if dtype == torch.float64:
        assert found == pytest.approx(ROUNDED_UP, abs=1e-12)  # which autocast lets be


def test_under_autocast_the_margins_are_those_of_the_head_that_runs():
    for dtype in (torch.float32, torch.float64):
        head = nn.Linear(1, 2, bias=False, dtype=dtype)
        head.weight.data = torch.tensor([[ROUNDED_UP], [0.0]], dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = torch.ones(1, 1, dtype=dtype)
            run = (head(x)[0, 0] - head(x)[0, 1]).item()
            assert run <= lp.split_head(head, (1,)).margin_lipschitz(2)[0, 1].item() <= 1.001 * run


def test_without_autocast_nothing_is_rounded():
    assert lp.lipschitz_bound(filled(nn.Linear(1, 1, bias=False), torch.float32)) == pytest.approx(ROUNDED_UP, rel=1e-7)


@pytest.mark.parametrize("make", [lambda: lp.SLLBlock(6), lambda: lp.LDLTBlock(6), lambda: lp.CayleyLinear(6, 6)])
def test_frozen_layers_under_autocast(make: Callable[[], nn.Module]):
    torch.manual_seed(0)
    frozen = lp.freeze(make())
    run = copy.deepcopy(frozen).double()
    for module in run.modules():
        if isinstance(module, nn.Linear):  # what autocast makes of them, in exact products
            module.weight.data = module.weight.data.bfloat16().double()
    points = torch.randn(20, 1, 6, dtype=torch.float64)
    jacobian = torch.stack([torch.autograd.functional.jacobian(run, x)[0, :, 0] for x in points])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.linalg.matrix_norm(jacobian, 2).max().item() <= lp.lipschitz_bound(frozen, (6,))


# Constants ------------------------------------------------------------------------------------------------------------

ONES = torch.ones(4)

NOT_CONSTANT: dict[str, nn.Module] = {
    "reciprocal": foreign(lambda self, x: x + (1 / (x * 0)).clamp(-5, 5)),
    "reciprocal of 0·x": foreign(lambda self, x: (self.c / (0 * x)).clamp(-5, 5), c=ONES),
    "reciprocal of a layer": foreign(lambda self, x: x + (1 / self.zero(x)).clamp(-5, 5), zero=lp.Scale(0.0)),
    "reciprocal of a quotient": foreign(lambda self, x: x + (1 / (x / math.inf)).clamp(-5, 5)),
    "reciprocal of zeros": foreign(lambda self, x: x + (1 / (-self.relu(x) * 0)).clamp(-5, 5), relu=nn.ReLU()),
    "sign": foreign(lambda self, x: x + torch.sign(x * 0)),
    "sign bit": foreign(lambda self, x: x + torch.signbit(x * 0)),
    "copied sign": foreign(lambda self, x: x + torch.copysign(self.c, x * 0), c=ONES),
    "angle": foreign(lambda self, x: torch.atan2(x * 0, -self.c), c=ONES),
    "choice": foreign(lambda self, x: x + torch.where(1 / (x * 0) > 0, self.c, -self.c), c=ONES),
    "product with infinity": foreign(lambda self, x: (x * 0) * torch.tensor(math.inf)),
    "multiplied": foreign(lambda self, x: x * (x * 0 + 1)),
    "uninitialised": foreign(lambda self, x: x + torch.empty_like(x)),
    "random": foreign(lambda self, x: x + torch.rand_like(x)),
    "detached": foreign(lambda self, x: x + torch.exp(x.detach())),
}


@pytest.mark.parametrize("name", NOT_CONSTANT)
def test_a_value_of_bound_0_is_no_constant(name: str):
    for model in (NOT_CONSTANT[name], nn.Sequential(NOT_CONSTANT[name])):
        with pytest.raises(UnknownBoundError):
            lp.lipschitz_bound(model, (4,))


CONSTANT: dict[str, tuple[nn.Module, float]] = {
    "tensor in the code": (foreign(lambda self, x: x + torch.ones(4)), 1.0),
    "tensor made there": (foreign(lambda self, x: 2 * x - torch.arange(4.0).exp()), 2.0),
    "buffer": (foreign(lambda self, x: x + self.c.exp() / 3, c=ONES), 1.0),
    "parameter": (foreign(lambda self, x: x + self.c.view(1, -1), c=nn.Parameter(ONES)), 1.0),
    "zeros like it": (foreign(lambda self, x: torch.cat([x, torch.zeros_like(x)], 1)), 1.0),
    "new zeros": (foreign(lambda self, x: torch.cat([x, x.new_zeros(x.shape[0], 2)], 1)), 1.0),
    "ones like it": (foreign(lambda self, x: x - torch.ones_like(x).exp()), 1.0),
    "shape": (foreign(lambda self, x: x.view(x.shape[0], x.size(1) // 2, 2)), 1.0),
    "bound 0": (foreign(lambda self, x: 3 * x + 0 * x), 3.0),
    "nothing of it": (foreign(lambda self, x: 0 * x), 0.0),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_true_constants_may_enter_operations(name: str):
    module, expected = CONSTANT[name]
    assert lp.lipschitz_bound(module, (4,)) == expected
    assert lp.lipschitz_bound(nn.Sequential(nn.ReLU(), module), (4,)) == expected


def test_certificates_of_a_forward_with_a_constant_tensor():
    module = foreign(
        lambda self, x: self.head(self.below(x) + torch.ones(4)), below=lp.AOLLinear(4, 4), head=nn.Linear(4, 2)
    )
    network = CertifiedNetwork(module, (4,), 2)
    assert network.bounds.split.body_bound <= 1 + 1e-6
    with pytest.raises(UnknownBoundError):
        CertifiedNetwork(nn.Sequential(NOT_CONSTANT["reciprocal"], nn.Linear(4, 2)), (4,), 2)


# Obstacles ------------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp() + x.sin()


def test_all_obstacles_are_named_before_any_norm_is_computed(monkeypatch: pytest.MonkeyPatch):
    def no_norm(*args: object) -> None:
        raise AssertionError("a norm was computed")

    for name in ("norm_enclosure", "conv_norm_enclosure"):
        monkeypatch.setattr(torch_modules, name, no_norm)
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda module, args, result: result)
    block = lp.LDLTBlock(9)
    block.activation = nn.SiLU()
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.LocalResponseNorm(2), nn.LPPool2d(3, 2)),
        hooked,
        nn.GLU(2),
        Odd(),
        nn.Flatten(),
        nn.LayerNorm(32),
        nn.Dropout(),
        nn.Linear(32, 9),
        block,
        foreign(lambda self, x: self.b(x) if isinstance(x, Tensor) else x, b=nn.Linear(9, 9)),
    )
    paths = ["0.1", "0.2", "1", "2", "3", "5", "6", "8", "9"]
    for ask in (lp.lipschitz_bound, lp.split_head, classifier_bounds, lp.layer_bounds):
        with pytest.raises(UnknownBoundError) as caught:
            ask(model, (1, 8, 8))
        found = caught.value.obstacles
        assert list(dict.fromkeys(obstacle.path for obstacle in found)) == paths
        assert {o.path: o.type for o in found}["0.1"] == "LocalResponseNorm"
        message = str(caught.value)
        first, *lines = message.splitlines()
        assert first == f"{len(found)} obstacles"
        assert lines[: len(found)] == [str(o) for o in found]
        assert all(f"{o.path} ({o.type}): {o.reason}" in message for o in found)
        assert all(reason in message for reason in ("'exp'", "'sin'", "model.eval()", "not bounded", "hook"))


def test_one_obstacle_is_data_too():
    with pytest.raises(UnknownBoundError) as caught:
        lp.lipschitz_bound(nn.Sequential(nn.ReLU(), nn.GLU(1)), (4,))
    [obstacle] = caught.value.obstacles
    assert obstacle[:2] == ("1", "GLU")
    assert str(caught.value).startswith(str(obstacle))


def test_a_shape_that_does_not_fit_hides_no_obstacle():
    with pytest.raises(UnknownBoundError, match="1 \\(LayerNorm\\)"):
        lp.lipschitz_bound(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (5,))
    with pytest.raises(ShapeError):
        lp.lipschitz_bound(nn.Sequential(nn.Linear(4, 4), nn.AdaptiveAvgPool2d(1)), (5,))


# Errors of the family -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(0, 1), (-3, -2)])
def test_joining_the_samples_of_a_batch_is_refused(arguments: tuple[int, ...]):
    model = nn.Sequential(nn.Flatten(*arguments), nn.Linear(4, 4))
    for ask in (lp.lipschitz_bound, lipsdp_bound, lambda m, shape: CertifiedNetwork(m, shape, 4)):
        with pytest.raises(UnknownBoundError, match="start_dim"):
            ask(model, (3, 4))
    assert lp.lipschitz_bound(nn.Flatten(-2), (2, 3, 4)) == 1


def test_weight_normalisation_of_the_old_kind_is_refused_after_a_call_too():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))
    model(torch.randn(2, 4))  # its weight is now a result, which torch does not copy
    for ask in (lp.lipschitz_bound, lp.freeze, lambda m, shape: lp.freeze(m, shape, dtype=torch.float64)):
        with pytest.raises((UnknownBoundError, ArgumentError), match="0 \\(Linear\\)"):
            ask(model, (4,))
    for mode in ("proof", "fast"):
        with pytest.raises((UnknownBoundError, ArgumentError), match="0 \\(Linear\\)"):
            CertifiedNetwork(model, (4,), 4, mode=mode)


def test_what_cannot_be_copied_is_named():
    held = foreign(lambda self, x: self.m(x), m=nn.ReLU())
    held.handle = (n for n in range(3))
    with pytest.raises(UnknownBoundError, match="cannot be copied"):
        lp.lipschitz_bound(held, (4,))


@pytest.mark.parametrize("order", [1, 2])
def test_a_fold_without_a_pair_is_certified(order: int):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1), lp.Householder(1, order=order), nn.Linear(1, 2))
    plain = nn.Sequential(model[0], nn.Identity(), model[2])
    x = torch.randn(5, 4)
    folded, expected = (CertifiedNetwork(m, (4,), 2).radius(x) for m in (model, plain))
    assert torch.allclose(folded, expected, rtol=1e-12)
