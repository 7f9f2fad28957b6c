"""Registers what this package adds to other libraries, when they are imported and not before."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType


def when_imported(module: str, ours: str, function: str) -> None:
    """Call `function` of our module `ours` once `module` is imported: now, if it is already."""
    if module in sys.modules:
        getattr(importlib.import_module(ours), function)()
    else:
        sys.meta_path.insert(0, _Finder(module, ours, function))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as the others would, and has our function called after it was loaded."""

    def __init__(self, module: str, ours: str, function: str) -> None:
        self.module, self.ours, self.function = module, ours, function
        self.asks_others = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module or self.asks_others:
            return None
        # It stays in place until the module is loaded: many only ask whether there is such a module.
        self.asks_others = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asks_others = False
        if spec is None or spec.loader is None:
            return spec
        spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(importlib.abc.Loader):
    """The module's own loader, with our function after it."""

    def __init__(self, loader: importlib.abc.Loader, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module gets its own loader back: tools ask it for more than this class has.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        getattr(importlib.import_module(self.finder.ours), self.finder.function)()
