"""Settings of all tests: offline, deterministic, one thread."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any


os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings


ROOT = Path(__file__).parents[1]


# "laws": few examples, in every run the same ones. "search" (`make laws`): many, other ones in every run; one that
# fails is printed with what repeats it.
COMMON: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("laws", derandomize=True, max_examples=3, **COMMON)
settings.register_profile("search", derandomize=False, max_examples=50, print_blob=True, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "laws"))


@pytest.fixture(autouse=True, scope="session")
def deterministic_torch() -> None:
    """Runs of these tests differ in nothing; tiny tensors are slower on several threads."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of the examples or benchmarks, by its path there; it finds the other scripts of its folder."""
    before = set(sys.modules)

    def script(path: str) -> ModuleType:
        folder = next(ROOT / of for of in ("examples", "benchmarks") if (ROOT / of / path).exists())
        monkeypatch.syspath_prepend(str((folder / path).parent))
        sys.modules.pop(Path(path).stem, None)
        return importlib.import_module(Path(path).stem)

    yield script
    folders = tuple(f"{ROOT}/{of}/" for of in ("examples", "benchmarks"))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(folders):
            del sys.modules[name]
