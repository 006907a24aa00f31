"""Uses liplayers where nothing but torch, einops and numpy can be imported beside it.

    python tests/without_extras.py

Other packages may be installed: they are not found.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import ClassVar

NEEDED = ("torch", "einops", "numpy")
OF_TRAIN = ("certification.report", "audit.report", "cli", "data", "training")  # and everything below them


def plain(requirement: str) -> str:
    """The name of a package, in its one spelling.

    >>> plain("Typing_Extensions>=4.10; python_version < '3.12'")
    'typing-extensions'
    """
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def with_requirements(names: tuple[str, ...]) -> set[str]:
    """The packages and all that they require in turn, without their extras."""
    installed = {plain(found.metadata["Name"]): found for found in metadata.distributions()}
    found: set[str] = set()
    left = list(names)
    while left:
        name = plain(left.pop())
        if name not in found:
            found.add(name)
            requirements = (installed[name].requires if name in installed else None) or []
            left += [requirement for requirement in requirements if "extra ==" not in requirement]
    return found


def other_modules() -> set[str]:
    """What the other installed packages would be imported as."""
    there = {"liplayers"} | with_requirements(NEEDED)
    owners = metadata.packages_distributions()
    return {name for name, packages in owners.items() if there.isdisjoint(map(plain, packages))}


class CoreFinder(PathFinder):
    """Finds them all but those that are left out."""

    left_out: ClassVar[set[str]]

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in cls.left_out else super().find_spec(fullname, path, target)


def says_what_to_install(extra: str, call: Callable[..., object], *arguments: object) -> None:
    try:
        call(*arguments)
    except (ImportError, SystemExit) as error:
        expected = rf"(error: )?\w+ is not installed: pip install 'liplayers\[{extra}\]'"
        if not re.fullmatch(expected, str(error)):  # of a command that ends with a number, that
            raise
    else:
        raise AssertionError(f"{call}{arguments}: nothing was missing")


def import_everything() -> None:
    """Every module of liplayers; those of the extra `train` say so."""
    import liplayers

    root = Path(liplayers.__file__).parent
    for file in sorted(root.rglob("*.py")):
        name = ".".join(file.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
        room = name.removeprefix("liplayers.")
        if any(f"{room}.".startswith(f"{of_train}.") for of_train in OF_TRAIN):
            says_what_to_install("train", import_module, name)
        elif not room.startswith("commands."):
            import_module(name)


def use_the_core() -> None:
    """Bound, train a step, freeze, certify, attack; exporting and LipSDP say what they need."""
    import torch

    import liplayers as lp
    from liplayers.audit.audit import audit
    from liplayers.bounds.lipsdp import lipsdp_bound
    from liplayers.certification import CertifiedNetwork, certify
    from liplayers.losses import offset_cross_entropy
    from liplayers.models import mlp

    assert lp.lipschitz_bound(lp.BROLinear(4, 4)) == 1
    model, x = mlp((4,), 3, width=4, depth=1), torch.rand(6, 4, dtype=torch.float64)
    offset_cross_entropy(model(x.float()), torch.arange(6) % 3, offset=0.1, temperature=1.0).backward()
    frozen, network = lp.freeze(model), CertifiedNetwork(model, (4,), 3)
    labels = network(x).argmax(1)
    radius = certify(network, [(x, labels)]).radius
    assert radius.gt(0).any()
    constants = network.margin_lipschitz
    assert audit(network, x, labels, radius, margin_lipschitz=constants, certify=network.radius, eps=[], steps=2).holds
    says_what_to_install("export", lp.export_onnx, frozen, "net.onnx", (4,))
    says_what_to_install("export", lp.export_safetensors, frozen, "net.safetensors")
    says_what_to_install("bundles", lp.load_pretrained, "digits-mlp")
    says_what_to_install("sdp", lipsdp_bound, frozen, (4,))


def run_commands() -> None:
    from liplayers import commands

    for command in (commands.train_command, commands.certify_command, commands.audit_command, commands.front_command,
                    commands.bundle_command):  # fmt: skip
        for arguments in ([], ["--help"]):
            sys.argv = ["liplayers", *arguments]
            says_what_to_install("train", command)


if __name__ == "__main__":
    CoreFinder.left_out = other_modules()
    sys.meta_path[sys.meta_path.index(PathFinder)] = CoreFinder
    import_everything()
    use_the_core()
    run_commands()
