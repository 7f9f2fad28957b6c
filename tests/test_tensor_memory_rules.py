"""The rules of tensor memory, which hold for its own files and its examples for good, read off their syntax trees.

No default argument but None, no dropout, no function that makes models, no parameters from the command line, settings
and models as module-level names.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples" / "tensor_memory").glob("*.py"))
OWN = [
    ROOT / "senri_hf" / "configuration" / "tensor_memory.py",
    ROOT / "senri_hf" / "memory" / "head_groups.py",
    ROOT / "senri_hf" / "memory" / "tensor_memory.py",
    ROOT / "senri_hf" / "modeling" / "tensor_memory.py",
]
FILES = [*OWN, *EXAMPLES, ROOT / "benchmarks" / "tensor_memory.py"]
MODELS = ("TensorMemory", "MultiHeadMemory", "LinearMemoryAttention", "GPTNeoX", "Senri")
COMMAND_LINE = {"argparse", "click", "docopt", "fire", "getopt", "hydra", "optparse", "typer", "absl"}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


def is_none(node: ast.expr | None) -> bool:
    return node is None or (isinstance(node, ast.Constant) and node.value is None)


def name_of(node: ast.expr) -> str:
    """What a call calls: the last part of a dotted name, or the one before a class method's."""
    if isinstance(node, ast.Attribute):
        return name_of(node.value) if node.attr.startswith("from_") else node.attr
    return node.id if isinstance(node, ast.Name) else ""


def makes_model(node: ast.AST) -> bool:
    """Whether anything in it makes a model or a part of one."""
    return any(
        isinstance(part, ast.Call) and name_of(part.func).startswith(MODELS) and "Config" not in name_of(part.func)
        for part in ast.walk(node)
    )


def default_arguments(tree: ast.Module) -> Iterator[ast.AST]:
    """Default values that are not None: of functions, and of fields, which are arguments of their class."""
    for function in functions(tree):
        for value in (*function.args.defaults, *function.args.kw_defaults):
            if not is_none(value):
                yield function
    for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for field in cls.body:
            if isinstance(field, ast.AnnAssign) and not is_none(field.value) and "ClassVar" not in ast.dump(field):
                yield field


def dropout(tree: ast.Module) -> Iterator[ast.AST]:
    """Anything that is called so."""
    for node in ast.walk(tree):
        named = (getattr(node, key, None) for key in ("id", "attr", "arg", "name"))
        if any(isinstance(name, str) and "dropout" in name.lower() for name in named):
            yield node


def factories(tree: ast.Module) -> Iterator[ast.AST]:
    """Functions of a module that return what makes a model, or are called as such functions are."""
    for function in tree.body:
        if isinstance(function, ast.FunctionDef):
            returned = (node for node in ast.walk(function) if isinstance(node, ast.Return) and node.value)
            if function.name.startswith(("create_", "make_", "build_", "new_")) or any(map(makes_model, returned)):
                yield function


def command_line(tree: ast.Module) -> Iterator[ast.AST]:
    """Parsers of command lines, `sys.argv`, and what stands for it in an environment."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] in COMMAND_LINE for alias in node.names):
            yield node
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in COMMAND_LINE:
            yield node
        if isinstance(node, ast.Attribute) and node.attr in ("argv", "environ", "getenv", "HfArgumentParser"):
            yield node
        if isinstance(node, ast.Name) and node.id in ("argv", "environ", "getenv", "HfArgumentParser"):
            yield node


def hidden_structure(tree: ast.Module) -> Iterator[ast.AST]:
    """Classes, which would wrap settings, and models that are made in functions or in loops."""
    for node in ast.walk(tree):
        loops = (ast.For, ast.While, ast.ListComp, ast.GeneratorExp, ast.DictComp)
        if isinstance(node, ast.ClassDef) or (isinstance(node, loops) and makes_model(node)):
            yield node
        if isinstance(node, ast.FunctionDef) and any(
            makes_model(part) and "from_pretrained" not in ast.unparse(part) for part in node.body
        ):
            yield node


RULES: dict[str, Callable[[ast.Module], Iterator[ast.AST]]] = {
    "no default arguments": default_arguments,
    "no dropout": dropout,
    "no factory functions": factories,
    "no command-line parameters": command_line,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_rule_holds(path: Path, rule: str) -> None:
    broken = list(RULES[rule](ast.parse(path.read_text())))
    assert not broken, [f"line {node.lineno}: {ast.unparse(node)[:80]}" for node in broken]  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_has_its_settings_and_models_as_names_of_a_module(path: Path) -> None:
    broken = list(hidden_structure(ast.parse(path.read_text())))
    assert not broken, [f"line {node.lineno}: {ast.unparse(node)[:80]}" for node in broken]  # type: ignore[attr-defined]


def test_there_are_files_to_hold_to_the_rules() -> None:
    assert {"compare.py", "models.py", "settings.py"} <= {path.name for path in EXAMPLES}
    assert all(path.is_file() for path in FILES)


BREACHES = {
    "def f(a, b=1): ...": default_arguments,
    "def f(*, b=True): ...": default_arguments,
    "f = lambda a=(): a": default_arguments,
    "class C:\n    a: int = 1": default_arguments,
    "nn.Dropout(0.1)": dropout,
    "F.dropout(x)": dropout,
    "Config(hidden_dropout=0.0)": dropout,
    "def small_model(n):\n    return TensorMemoryForCausalLM(n)": factories,
    "def create_model(n): ...": factories,
    "def f():\n    return models.TensorMemoryForCausalLM.from_layers(vocab_size=1, layers=[])": factories,
    "import argparse": command_line,
    "from transformers import HfArgumentParser\nHfArgumentParser(x)": command_line,
    "print(sys.argv[1])": command_line,
    "class Settings: ...": hidden_structure,
    "layers = [TensorMemoryLayer([TensorMemory(HEAD)]) for _ in range(4)]": hidden_structure,
    "def main():\n    model = TensorMemoryForCausalLM.from_layers(vocab_size=1, layers=LAYERS)": hidden_structure,
}


@pytest.mark.parametrize("code", BREACHES)
def test_a_breach_would_be_seen(code: str) -> None:
    assert list(BREACHES[code](ast.parse(code)))


def test_what_is_allowed_is_no_breach() -> None:
    code = "def f(a, b=None, *, c: int | None = None): ...\nclass C:\n    b: ClassVar[int] = 3\nMODEL = TensorMemory(C)"
    assert not [node for rule in RULES.values() for node in rule(ast.parse(code))]
