"""Names that moved before 0.1, all in one place: each works for one more release and warns with the new name.

Standard library only: everything may import this module.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from typing import Any

#: Backends by their names before.
BACKENDS = {"slab": "torch"}
#: Keys of what :func:`marginkernels.backends` returns.
KEYS = {**BACKENDS, "proven": "verified"}
#: Attributes of the package itself.
ATTRIBUTES = {"Rows": "BatchInfo"}
#: Modules and those of their attributes that were public or documented -> where they are today.
MODULES = {
    "marginkernels.checks": {"raise_pending": "marginkernels:raise_pending_label_errors"},
    "marginkernels.forms": {
        "IDENTITY": "marginkernels:NonTarget.IDENTITY",
        "HARD_LINEAR": "marginkernels:NonTarget.HARD_LINEAR",
        "HARD_QUADRATIC": "marginkernels:NonTarget.HARD_QUADRATIC",
    },
    "marginkernels.verify": {
        name: f"marginkernels.testing:{name}" for name in ("TOLERANCE", "HEADS", "Case", "run", "eager", "relative_error", "errors")
    },
    "marginkernels.functional": {name: f"marginkernels:{name}" for name in ("margin_cross_entropy", "head_losses")},
    "marginkernels.center": {"CenterLoss": "marginkernels:CenterLoss"},
    "marginkernels.plan": {name: f"marginkernels.cli.plan:{name}" for name in ("memory", "exchanged", "flops", "traffic")},
}
#: Functions of :mod:`marginkernels.distributed`.
DISTRIBUTED = {"export_centres": "export_centers", "import_centres": "import_centers"}
#: Commands of ``python -m marginkernels``.
COMMANDS = {"check": "verify"}


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    warnings.warn(
        f"marginkernels: {old} is deprecated and goes with the next release; use {new}", DeprecationWarning, stacklevel=stacklevel
    )


def backend_name(name: str) -> str:
    """``name``, or the new name of a backend that was renamed."""
    new = BACKENDS.get(name)
    if new is None:
        return name
    warn(f"backend={name!r}", f"backend={new!r}", stacklevel=6)
    return new


class RenamedKeys(dict[str, Any]):
    """A dict that also answers to the keys it had before."""

    def __missing__(self, key: str) -> Any:
        new = KEYS.get(key)
        if new is None or new not in self:
            raise KeyError(key)
        warn(f"the key {key!r}", repr(new))
        return self[new]

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default


class _MovedModule(types.ModuleType):
    """Stands where a module was: its public names warn and lead to where they are."""

    def __getattr__(self, name: str) -> Any:
        target = MODULES[self.__name__].get(name)
        if target is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module, _, path = target.partition(":")
        warn(f"{self.__name__}.{name}", target.replace(":", "."))
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
        return found


def install() -> None:
    """Put a stand-in where each module of ``MODULES`` was."""
    for name in MODULES:
        sys.modules.setdefault(name, _MovedModule(name, __doc__))


def attribute(name: str) -> Any:
    """For the package's ``__getattr__``: what ``marginkernels.<name>`` leads to, or an AttributeError."""
    if f"marginkernels.{name}" in MODULES:
        return sys.modules[f"marginkernels.{name}"]
    if name in ATTRIBUTES:
        warn(f"marginkernels.{name}", f"marginkernels.{ATTRIBUTES[name]}")
        return getattr(sys.modules["marginkernels"], ATTRIBUTES[name])
    raise AttributeError(f"module 'marginkernels' has no attribute {name!r}")
