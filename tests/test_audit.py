"""The audit of every registered family: true norms against promised bounds, and the layer contract.

A family that is registered falls under all of it by itself. What is measured is in `liplayers.testing`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from audit import EVERY, example, of_role
from torch import nn

from liplayers import FAMILIES
from liplayers.errors import LipschitzError
from liplayers.testing import Check, Finding, checks
from liplayers.testing.contract import contract_checks
from liplayers.testing.measure import jacobian, lanczos_norm, operator_norm
from liplayers.testing.norms import norm_checks
from liplayers.testing.subject import Subject, perturb

REGISTERED = pytest.mark.parametrize(("family", "role"), EVERY, ids=["-".join(e) for e in EVERY])
CHECKS = [(f"{name}-{check.__name__}", check) for name, family in FAMILIES.items() for check in checks(family)]


def every(*roles: str) -> pytest.MarkDecorator:
    found = of_role(*roles)
    return pytest.mark.parametrize(("family", "role"), found, ids=["-".join(f) for f in found])


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in CHECKS])
def test_audit(check: Check):
    found = check()
    assert not found.refused or may_refuse(found), f"refuses a plain configuration: {found}"


def may_refuse(found: Finding) -> bool:
    """Whether the configuration is one that a family may refuse: beyond padding and bias, or with an even kernel."""
    text = found.configuration
    if found.role in ("conv_transpose", "conv"):
        own = ["dilation"] if found.role == "conv_transpose" else ["stride", "dilation", "groups"]
        odd = re.match(r"\(\d+, \d+, [135][,)]", text) or found.role == "conv_transpose"
        return not odd or any(f"{name}=" in text for name in own)
    return re.search(r"kernel_size=[24]\b", text) is not None


# The instrument -------------------------------------------------------------------------------------------------------


def test_lanczos_agrees_with_the_dense_jacobian_and_both_see_an_excess():
    torch.manual_seed(0)
    W = torch.randn(40, 30, dtype=torch.float64)
    exact = torch.linalg.svdvals(W)[0].item()
    assert lanczos_norm(lambda v: W @ v, lambda u: W.mT @ u, torch.ones(30).double()) == pytest.approx(exact, rel=1e-12)
    assert operator_norm(lambda x: x @ W.mT, (30,)) == pytest.approx(exact, rel=1e-12)
    conv = nn.Conv2d(3, 4, 3, padding=1, dtype=torch.float64)
    large, small = operator_norm(conv, (3, 17, 13)), operator_norm(conv, (3, 9, 8))
    matrix = jacobian(conv, torch.zeros(3, 17, 13, dtype=torch.float64))
    assert large == pytest.approx(torch.linalg.svdvals(matrix)[0].item(), rel=1e-5)
    assert small < large


# The option of some families ------------------------------------------------------------------------------------------


class Square(Subject):
    """Its examples have as many outputs as inputs."""

    def example(self, dtype: torch.dtype | None = None, **arguments: Any) -> tuple[Any, tuple[int, ...]]:
        torch.manual_seed(0)
        if self.role == "linear":
            return self.make(5, 5, dtype=dtype, **arguments), (5,)
        if self.role == "conv":
            return self.make(4, 4, 3, padding=1, dtype=dtype, **arguments), (4, 5, 6)
        return super().example(dtype, **arguments)


def residual_checks() -> Iterator[tuple[str, Check]]:
    for name, role in (("bro", "linear"), ("bro", "conv"), ("cholesky", "linear"), ("liresnet", "dense_block")):
        subject = Square(partial(getattr(FAMILIES[name], role), residual_depth=3), role)
        for found in (*contract_checks(subject), *norm_checks(subject)):
            check = Check(subject, *found)
            # of other sizes than the example's
            other = ("representation", "gradcheck", "attributes of torch", "norm", "stride that does not divide")
            if check.name not in other or (check.name == "gradcheck" and role == "dense_block"):
                yield f"{name}-{check.__name__}", check


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in residual_checks()])
def test_the_contract_near_the_identity(check: Check):
    assert not check().refused


# What only registered families promise -------------------------------------------------------------------------------


@every("conv_transpose")
def test_conv_transpose_is_the_adjoint_of_the_convolution(family: str, role: str):
    geometry: dict[str, Any] = {"stride": 2, "padding": 1, "bias": False, "dtype": torch.float64}
    back = FAMILIES[family].conv_transpose(4, 3, 3, output_padding=1, **geometry)
    forth = FAMILIES[family].conv(3, 4, 3, **geometry)
    perturb(back)
    forth.load_state_dict(back.adjoint.state_dict())
    x, y = torch.randn(1, 3, 8, 6, dtype=torch.float64), torch.randn(1, 4, 4, 3, dtype=torch.float64)
    torch.testing.assert_close((forth(x) * y).sum(), (x * back(y)).sum())


@every("conv_transpose")
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"padding_mode": "circular"}, "padding_mode"),
        ({"output_padding": 1}, "output_padding"),
        ({"groups": 2}, "groups"),
        ({"padding": -1}, "padding"),
    ],
)
def test_conv_transpose_refuses_by_name(family: str, role: str, arguments: dict, name: str):
    with pytest.raises(ValueError, match=name) as caught:
        FAMILIES[family].conv_transpose(3, 4, 3, **arguments)
    assert isinstance(caught.value, LipschitzError)
    assert "\n" not in str(caught.value)


@REGISTERED
def test_a_missing_argument_is_named_by_the_class_that_was_called(family: str, role: str):
    make = getattr(FAMILIES[family], role)
    with pytest.raises(TypeError, match=rf"^{make.__name__}\.__init__\(\) missing"):
        make()


@pytest.mark.slow
@REGISTERED
@pytest.mark.parametrize("training", [True, False])
def test_compile(family: str, role: str, training: bool):
    layer, shape = example(family, role)
    layer.train(training)
    x = torch.randn(2, *shape)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
    compiled(x).square().sum().backward()
    ours = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).square().sum().backward()
    for p, g in zip(layer.parameters(), ours, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-4)
