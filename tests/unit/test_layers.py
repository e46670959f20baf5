import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "system").rglob("*.py"))


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(top-level name, whether it is inside a function) of every import."""
    tree = ast.parse(path.read_text())
    inside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        found += [(name.split(".")[0], id(node) in inside) for name in names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_system_imports_neither_ray_nor_actors(path: Path) -> None:
    for name, is_inside in imports_of(path):
        allowed = path.name == "cli.py" and path.parent.name == "system" and is_inside
        assert name != "ray", f"{path} imports ray; move that code to actors/"
        assert name != "actors" or allowed, f"{path} imports actors; move that code to actors/"


@pytest.mark.parametrize(
    "module", ["system.config", "system.cli", "system.config.load", "system.errors"]
)
def test_light_modules_stay_light(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print([name for name in ('torch', 'vllm', 'ray', 'transformers', 'datasets', 'plotly') "
        "if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"


def imported_files(path: Path) -> set[Path]:
    """The files of the repository that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            module = ROOT / name.replace(".", "/")
            found |= {module.with_suffix(".py"), module / "__init__.py"}
    return {file for file in found - {path} if file.is_file()}


def test_no_files_import_each_other_in_a_circle() -> None:
    """A file can then be understood, and tried, with those below it alone."""
    left = {path: imported_files(path) for path in [*MODULES, *(ROOT / "actors").rglob("*.py")]}
    assert sum(map(len, left.values())) > 500, "the imports were not found"
    while free := {path for path, imports in left.items() if not imports & left.keys()}:
        left = {path: imports for path, imports in left.items() if path not in free}
    circle = {
        str(path.relative_to(ROOT)): sorted(map(str, left[path] & left.keys())) for path in left
    }
    assert not circle


def room_of(path: Path) -> str:
    """The folder of a file right below `system/`, the file itself there, or `actors`."""
    top, *rest = path.relative_to(ROOT).with_suffix("").parts
    return top if top == "actors" else rest[0]


def test_no_rooms_import_each_other_in_a_circle() -> None:
    left: dict[str, set[str]] = {}
    for path in MODULES:
        rooms = {room_of(file) for file in imported_files(path)} - {room_of(path)}
        left.setdefault(room_of(path), set()).update(rooms)
    while free := {room for room, imports in left.items() if not imports & left.keys()}:
        left = {room: imports for room, imports in left.items() if room not in free}
    assert not left, f"each of these rooms reaches another of them: {left}"


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "system").rglob("*.py"), *(ROOT / "actors").rglob("*.py")]),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_and_functions_keep_to_their_size(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 500, f"{path} outgrew its room: redesign it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            start = (first.end_lineno or first.lineno) if is_docstring else node.lineno
            length = (node.end_lineno or node.lineno) - start + 1
            assert length <= 65, f"{path}:{node.lineno} {node.name} has {length} lines"
