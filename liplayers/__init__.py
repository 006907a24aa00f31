"""liplayers: certifiably robust networks in PyTorch.

1-Lipschitz layers with torch's own signatures, bounds that compose over models, and certified ℓ2 radii.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from liplayers.public import *
else:

    def __getattr__(name):
        """The public names, with torch, when one is first asked for: the commands say what they do without it."""
        if name == "__all__" or not name.startswith("__"):
            public = vars(import_module("liplayers.public")).items()
            names = {key: value for key, value in public if not (key.startswith("_") or isinstance(value, ModuleType))}
            globals().update(names, __all__=list(names))
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
