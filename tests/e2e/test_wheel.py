"""The built wheel, installed into an empty environment, outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/solve/worked"
UV = Path(sys.executable).with_name("uv")

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call(UV, "build", "--quiet", "--wheel", "--out-dir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bin_dir(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that holds the wheel and what it asks for."""
    environment = tmp_path_factory.mktemp("environment") / "venv"
    call(UV, "venv", "--quiet", "--python", sys.executable, environment, cwd=wheel.parent)
    call(
        UV, "pip", "install", "--quiet", "--python", environment / "bin/python",
        "--override", ROOT / "deploy/cpu-overrides.txt", f"{wheel}[cpu,quickstart]",
        cwd=wheel.parent,
    )  # fmt: skip
    return environment / "bin"


def call(*command: object, cwd: Path, code: int = 0) -> str:
    """Runs a command without anything of this process's environment that leads to the repository.

    Returns:
        What it wrote on standard output.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    inherited |= {"UV_FIND_LINKS": inherited.get("PIP_FIND_LINKS", "")}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=inherited, capture_output=True, text=True
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout


def test_the_wheel_holds_the_packages_and_nothing_else_at_the_top(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"actors", "system"}
    # Every file of the packages is there: a folder without __init__.py would be left out.
    kept = {".py", ".yaml", ".css", ".html", ".js"}
    expected = {
        str(path.relative_to(ROOT))
        for top in ("actors", "system")
        for path in (ROOT / top).rglob("*")
        if path.suffix in kept and "__pycache__" not in path.parts
    } | {f"system/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert expected <= set(names)


def test_the_installed_command_solves(bin_dir: Path, tmp_path: Path) -> None:
    call(
        bin_dir / "instructmix", "solve", "--effect", GOLDEN / "effect.csv",
        "--base", GOLDEN / "base.csv", "--out", "mix.json", cwd=tmp_path,
    )  # fmt: skip
    assert '"status": "optimal"' in (tmp_path / "mix.json").read_text()


def test_the_installed_command_checks_a_file_of_the_user(bin_dir: Path, tmp_path: Path) -> None:
    rows = [f'{{"question": "q {k}", "answer": "a {k}", "topic": "t{k % 2}"}}' for k in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    config = {
        "run_dir": "run", "data_dir": ".", "model": {"path": "builtin:tiny"},
        "sources": [{"path": "rows.jsonl", "category_column": "topic"}], "solve": {"budget": 50},
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    text = call(bin_dir / "instructmix", "check", "mine.yaml", "--no-probe", cwd=tmp_path)
    assert "influence" in text
    call(
        bin_dir / "instructmix", "check", "mine.yaml", "--set", "solve.budgett=1",
        cwd=tmp_path, code=2,
    )  # fmt: skip


def test_the_installed_quickstart_reads_its_own_example(bin_dir: Path, tmp_path: Path) -> None:
    call(bin_dir / "instructmix", "quickstart", "--until", "ingest", cwd=tmp_path)
    records = list(tmp_path.rglob("corpus/record.json"))
    assert len(records) == 1
