"""Functions of the user's own, named `module:function` in the configuration.

The module is looked for on the import path and in the directory from which the command was started,
here and in every worker.  Its source is part of the fingerprint of the stage that calls it.
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
    """A function by its name, as it travels to the workers."""

    name: str
    """`module:function`."""
    field: str
    """Where the configuration names it, for messages."""
    folder: str
    """Where its module is looked for, besides the import path."""

    @classmethod
    def here(cls, name: str, field: str) -> UserFunction:
        """A function whose module may lie in the current directory."""
        return cls(name, field, os.getcwd())

    def load(self) -> Callable[..., Any]:
        """The function itself.

        Raises:
            ConfigError: there is no such module or function, or importing it fails.
        """
        return _load(self)

    def source_digest(self) -> str:
        """SHA-256 of the module's source: what tells that the function changed.

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
        """The error for a function that does not do what is asked of it."""
        return ConfigError(f"{self.field} {self.name!r}: {what}")

    def _find(self) -> Any:
        module = self.name.partition(":")[0]
        if self.folder not in sys.path:
            # It stays there: a function may import more when it runs.
            sys.path.append(self.folder)
        importlib.invalidate_caches()
        try:
            found = importlib.util.find_spec(module)
        except ImportError:
            found = None  # a parent package is missing
        if found is None:
            raise self.failed(
                f"expected a module {module!r} on the import path or in {self.folder}, found "
                "none. Start the command where the module lies, set PYTHONPATH, or install it "
                "(on a cluster: on every node)."
            )
        return found


@functools.lru_cache(maxsize=64)
def _load(function: UserFunction) -> Callable[..., Any]:
    module_name, _, name = function.name.partition(":")
    function._find()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise function.failed(
            f"importing {module_name!r} failed with {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise function.failed(
            f"expected a function {name!r} in {getattr(module, '__file__', module_name)}, found "
            f"{'nothing of that name' if found is None else type(found).__name__}"
        )
    return found
