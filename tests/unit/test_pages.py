"""What the pages say of the code is there: every path, and every name that is said to be in one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/glossary.md")
PATH = re.compile(r"`((?:system|actors|tests|configs|deploy|docs)/[\w/.*-]+)`")
NAME_IN_PATH = re.compile(
    r"((?:`[A-Za-z_][\w.]*`(?:, | and |, and )?)+) in `((?:system|actors|tests)/[\w/]+\.py)`"
)


def names_of(path: Path) -> set[str]:
    """Every function, class, method and assigned name of a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


@pytest.mark.parametrize("page", PAGES)
def test_every_path_on_a_page_exists(page: str) -> None:
    paths = PATH.findall((ROOT / page).read_text())
    assert len(paths) >= 2
    assert [path for path in paths if not list(ROOT.glob(path))] == []


@pytest.mark.parametrize("page", PAGES[1:])
def test_every_name_on_a_page_is_where_the_page_says(page: str) -> None:
    found = NAME_IN_PATH.findall((ROOT / page).read_text())
    assert len(found) >= 5
    missing = [
        (name, path)
        for names, path in found
        for name in re.findall(r"`([\w.]+)`", names)
        if name.rsplit(".", 1)[-1] not in names_of(ROOT / path)
    ]
    assert missing == []
