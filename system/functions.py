"""Loads functions that the user wrote, named `module:function` in the configuration.

The driver and every worker search for the module on the import path and in the directory in which
the command was started.  The source of the module is part of the fingerprint of the stage that
calls the function.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from system.errors import ConfigError

FUNCTION_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""`package.module:function`."""


@dataclass(frozen=True, slots=True)
class UserFunction:
    """The name of a function, which is sent to the workers instead of the function."""

    name: str
    """`module:function`."""
    field: str
    """The configuration field that names it, for messages."""
    folder: str
    """Directory that is searched for the module, besides the import path."""

    @classmethod
    def here(cls, name: str, field: str) -> UserFunction:
        """A function whose module may lie in the current directory."""
        return cls(name, field, os.getcwd())

    def load(self) -> Callable[..., Any]:
        """Imports the module and returns the function.

        Raises:
            ConfigError: there is no such module or function, or the import fails.
        """
        return _load(self)

    def source_digest(self) -> str:
        """16 hex digits of the SHA-256 of the module's source, which change with the function.

        Raises:
            ConfigError: there is no such module.
        """
        origin = self._find().origin
        path = None if origin is None else Path(origin)
        if path is None or not path.is_file():
            raise ConfigError(
                f"{self.field} {self.name!r}: expected a module with a source file, found "
                f"{origin or 'a package without code'}; name the module that holds the function"
            )
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def failed(self, what: str) -> ConfigError:
        """An error that names the function and its configuration field."""
        return ConfigError(f"{self.field} {self.name!r}: {what}")

    def _find(self) -> Any:
        module = self.name.partition(":")[0]
        if self.folder not in sys.path:
            # Not removed afterwards: the function may import other modules when it runs.
            sys.path.append(self.folder)
        importlib.invalidate_caches()
        try:
            spec = importlib.util.find_spec(module)
        except ImportError:
            spec = None  # a parent package is missing
        if spec is None:
            raise self.failed(
                f"expected a module {module!r} on the import path or in {self.folder}, found "
                "none. Start the command in the directory of the module, set PYTHONPATH, or "
                "install the module (on a cluster: on every node)."
            )
        return spec


@functools.lru_cache(maxsize=64)
def _load(function: UserFunction) -> Callable[..., Any]:
    module_name, _, name = function.name.partition(":")
    # First find, then import: an ImportError inside an existing module is another mistake than a
    # missing module, and has its own message (pkgutil.resolve_name cannot tell them apart).
    function._find()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise function.failed(
            f"importing {module_name!r} failed with {type(error).__name__}: {error}"
        ) from error
    value = getattr(module, name, None)
    if not callable(value):
        raise function.failed(
            f"expected a function {name!r} in {getattr(module, '__file__', module_name)}, found "
            f"{'nothing of that name' if value is None else type(value).__name__}"
        )
    return value
