"""The audit of layers from outside: a right family passes, and each kind of mistake is caught by the check for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from liplayers import AOLConv2d, AOLLinear, Family, SLLBlock
from liplayers.errors import ArgumentError, AuditError, LipschitzError, UnknownNameError
from liplayers.layers.bases.dense import LipschitzLinear
from liplayers.linalg.orthogonal import block_reflector
from liplayers.testing import Check, Finding, audit, checks


class Mirror(LipschitzLinear):
    """A reflection, cut to the shape: right."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(in_features, out_features)
        self.raw = self.new_parameter((max(in_features, out_features), 1), device, dtype)
        self.bias = self.new_parameter((out_features,), device, dtype) if bias else None
        self.reset_parameters()

    def map_weight(self, raw: Tensor) -> Tensor:
        return block_reflector(raw, self.out_features, self.in_features)


class Trainable(LipschitzLinear):
    """1-Lipschitz for a gain of 0, where it begins, and for large ones."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(in_features, out_features)
        self.raw = self.new_parameter((max(in_features, out_features), 1), device, dtype)
        self.gain = self.new_parameter((1,), device, dtype)
        self.bias = self.new_parameter((out_features,), device, dtype) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.gain)

    def map_weight(self, raw: Tensor, gain: Tensor) -> Tensor:
        return (1 + gain * torch.exp(-gain.square())) * block_reflector(raw, self.out_features, self.in_features)


class Tiny(Mirror):
    """An ε on one side of a ratio."""

    def map_weight(self, raw: Tensor) -> Tensor:
        largest = raw.abs().amax()
        return super().map_weight(raw) * (largest + 1e-11) / torch.where(largest > 0, largest, 1.0)


class Stale(Mirror):
    """Its weight depends on a parameter that is not raw."""

    def map_weight(self, raw: Tensor) -> Tensor:
        weight = super().map_weight(raw)
        return weight if self.bias is None else weight * torch.cos(self.bias.sum())


class Shrunk(Mirror):
    """A contraction."""

    def map_weight(self, raw: Tensor) -> Tensor:
        return 0.9 * super().map_weight(raw)


class Reordered(Mirror):
    def __init__(self, in_features: int, out_features: int, device=None, dtype=None, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)


class Hidden(Mirror):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class FrozenOtherwise(Mirror):
    """It loses its bias."""

    def frozen(self, shape: tuple[int, ...] | None) -> nn.Module:
        plain = nn.Linear(self.in_features, self.out_features, bias=False)
        plain.weight = nn.Parameter(self.effective())
        return plain


class FrozenLarger(Mirror):
    """What it becomes has another bound than it stated."""

    def map_weight(self, raw: Tensor) -> Tensor:
        return 1.5 * super().map_weight(raw)


class Locked(Mirror):
    """A lock is neither copied nor pickled."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.lock = threading.Lock()


class Unbounded(Mirror):
    def lipschitz_bound(self) -> float:
        return float("inf")


class Choosy(Mirror):
    """It refuses what it cannot do, by name."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None) -> None:
        if not bias:
            raise ArgumentError("Choosy: bias=False; expected True")
        super().__init__(in_features, out_features, bias, device, dtype)


class Nameless(Mirror):
    """It refuses, and does not say what."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None) -> None:
        if not bias:
            raise ArgumentError("not possible")
        super().__init__(in_features, out_features, bias, device, dtype)


class Strided(AOLConv2d):
    """It makes up for the smaller image."""

    def map_weight(self, *raw: Tensor) -> Tensor:
        return self.stride[0] * super().map_weight(*raw)


class Circular(AOLConv2d):
    def map_weight(self, *raw: Tensor) -> Tensor:
        return (1.5 if self.padding_mode == "circular" else 1.0) * super().map_weight(*raw)


class Unchecked(AOLConv2d):
    """It accepts images that its stride does not divide, around which windows overlap."""

    def _check_input(self, x: Tensor) -> None:
        pass


class Composed(nn.Module):
    """Not of a base of liplayers: it states no bound, that of its parts is composed over the trace of its forward."""

    def __init__(self, features: int, device=None, dtype=None) -> None:
        super().__init__()
        self.first = AOLLinear(features, features, device=device, dtype=dtype)
        self.second = nn.Linear(features, features, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + 0.5 * self.second(torch.relu(self.first(x)))


def failures(make: Callable[..., nn.Module], role: str = "linear", only: str = "", **options: Any) -> list[Finding]:
    found = [check.run() for check in checks(make, role, **options) if check.name.startswith(only)]
    assert found
    return [finding for finding in found if not finding.passed]


def test_a_right_family_from_outside_passes():
    found = audit(Family("mirror", linear=Mirror, orthogonal=frozenset({"linear"})))
    assert not found.failed
    norms = [finding for finding in found.findings if finding.check == "norm"]
    assert len(norms) == 28
    assert all(finding.bound == 1.0 and finding.measured == pytest.approx(1.0, abs=1e-5) for finding in norms)
    *rows, last = str(found).splitlines()
    assert len(rows) == len(found.findings) + 1
    assert last == f"{len(found.findings)} passed, 0 refused by the constructor, 0 failed"


@pytest.mark.parametrize(
    ("make", "caught"),
    [
        (Trainable, {"norm after training to exceed it"}),
        (Stale, {"changed parameters", "cached context of equal layers"}),
        (Shrunk, {"orthogonality"}),
        (Reordered, {"signature"}),
        (FrozenOtherwise, {"freezing"}),
    ],
)
def test_a_mistake_is_caught_by_the_check_for_it(make: Callable[..., nn.Module], caught: set[str]):
    assert {finding.check for finding in failures(make, orthogonal=make is Shrunk)} == caught


def test_a_bound_exceeded_for_tiny_parameters_alone_is_caught_with_the_numbers():
    with pytest.raises(AuditError) as error:
        audit(Tiny, "linear")
    count, *lines = str(error.value).splitlines()
    assert count.split()[0] == str(len(lines))
    [line] = [line for line in lines if "norm (9, 1, bias=True), float64" in line]
    assert "Tiny (linear)" in line
    assert "> 1 at scale 1e-9" in line
    assert "gaussian" not in line
    assert isinstance(error.value, LipschitzError)
    assert isinstance(error.value, AssertionError)


@pytest.mark.parametrize(("make", "argument"), [(Strided, "stride="), (Circular, "'circular'")])
def test_a_bound_exceeded_for_one_kind_of_convolution_alone_is_caught(make: Callable[..., nn.Module], argument: str):
    found = [check.run() for check in checks(make, "conv") if check.name == "norm" and "float64" in check.configuration]
    blamed = [finding.configuration for finding in found if not finding.passed]
    assert blamed == [finding.configuration for finding in found if argument in finding.configuration]


def test_an_image_that_the_stride_does_not_divide_is_refused_or_within_the_bound():
    assert [finding.configuration for finding in failures(Unchecked, "conv", "stride")] == ["stride=2", "stride=3"]
    assert not failures(AOLConv2d, "conv", "stride")


@pytest.mark.parametrize(
    ("make", "only", "said"),
    [
        (Hidden, "signature", "write its arguments out"),
        (FrozenLarger, "freezing", "at the frozen layer's bound"),
        (Locked, "deepcopy", "cannot pickle '_thread.lock'"),
        (Locked, "pickling", "cannot pickle '_thread.lock'"),
        (Unbounded, "norm", "its bound is inf"),
        (Nameless, "norm (1, 1, bias=False)", "names no argument"),
    ],
)
def test_what_failed_is_said_in_one_line(make: Callable[..., nn.Module], only: str, said: str):
    check = next(check for check in checks(make, "linear") if f"{check.name} {check.configuration}".startswith(only))
    with pytest.raises(AuditError) as error:
        check()
    assert said in str(error.value)
    assert str(error.value).startswith(f"{make.__name__} (linear): {check.name}")
    assert "\n" not in str(error.value)
    assert str(check.run()) == str(error.value)


def test_a_refused_configuration_is_noted():
    found = audit(Choosy, "linear")
    refused = [finding for finding in found.findings if finding.refused]
    assert {finding.note for finding in refused} == {"refused: Choosy: bias=False; expected True"}
    assert all("bias=False" in finding.configuration for finding in refused)
    assert len(refused) == 14


def test_checks_have_names_of_their_own_and_leave_random_numbers_and_modes_as_they_are():
    every = checks(partial(SLLBlock, bias=False), "dense_block")
    assert len({check.__name__ for check in every}) == len(every)
    first = every[0]
    assert isinstance(first, Check)
    assert first.__name__.startswith("SLLBlock dense_block norm (3), float64")
    state = torch.get_rng_state()
    with torch.no_grad():
        assert first() == first()
        assert not failures(AOLLinear, "linear", "norm after training")
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("only", ["norm after training", "autocast float16", "freezing float64"])
def test_a_layer_that_states_no_bound_is_measured_against_that_of_its_parts(only: str):
    chosen = [
        check for check in checks(Composed, "dense_block") if f"{check.name} {check.configuration}".startswith(only)
    ]
    assert chosen
    assert all(check().bound > 0 for check in chosen)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "said"),
    [
        ((Mirror,), {}, ArgumentError, "without a role"),
        ((Mirror, "dense"), {}, UnknownNameError, "did you mean dense_block"),
        ((Mirror(2, 2), "linear"), {}, ArgumentError, "expected a class"),
        ((None, "linear"), {}, ArgumentError, "expected a class"),
        ((Family("none", linear=Mirror), "conv"), {}, ArgumentError, "expected a class"),
        ((Family("twice", linear=Mirror),), {"orthogonal": True}, ArgumentError, "beside a Family"),
        ((SLLBlock, "dense_block"), {"orthogonal": True}, ArgumentError, "measured for linear and conv"),
    ],
)
def test_what_cannot_be_audited_is_refused(arguments: tuple, options: dict, kind: type[Exception], said: str):
    with pytest.raises(kind, match=said) as error:
        audit(*arguments, **options)
    assert "\n" not in str(error.value)
