"""Do the tests notice a wrong formula?  Each mutation breaks one, and a named test must fail.

    python tests/mutation/mutate.py [--only solver|estimator|packer|lease] [--jobs 1]

Run by hand after tests or formulas changed; it takes some minutes.  The list is in `mutations.py`:
file, exact text, replacement, why it matters, and the tests that must catch it.  All work is done
on a copy of the repository in a temporary directory.  Before any mutation, the named tests run
once on the unchanged copy, since a test that fails anyway catches nothing.

Prints one line a mutation, `caught` or `SURVIVED`; exits with 1 where one survived.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutations import AREAS, MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
_COPIED = ("system", "actors", "tests", "configs", "docs", "deploy", "pyproject.toml", "README.md")
_SECONDS = 900
"""A mutant that makes a test run for longer is caught: it hangs."""


def copy_repository(to: Path) -> Path:
    """A copy with everything that unit tests read, without caches."""
    for name in _COPIED:
        source, target = ROOT / name, to / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", ".*", "*.pyc")
            shutil.copytree(source, target, ignore=ignore)
        else:
            shutil.copy2(source, target)
    return to


def run_tests(copy: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit code and last lines of pytest, which must import the copy and nothing else."""
    # Same size and time of a changed file would make Python take an old .pyc: none is written.
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
    command += ["-m", "not slow and not real_model and not gpu and not long", *tests]
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return 1, f"stopped after {_SECONDS} s"
    return done.returncode, (done.stdout + done.stderr)[-2000:]


def check_copy(copy: Path) -> None:
    """Refuses an environment in which the installed package hides the copy."""
    code = "import actors, system; print(system.__file__); print(actors.__file__)"
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    files = subprocess.run(
        [sys.executable, "-c", code],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    outside = [name for name in files if not name.startswith(str(copy))]
    if outside:
        sys.exit(f"expected the copy in {copy} to be imported, found {outside}")


def check_unchanged(copy: Path, mutations: list[Mutation]) -> None:
    """The tests must pass before anything is broken."""
    tests = tuple(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
    code, output = run_tests(copy, tests)
    if code != 0:
        sys.exit(f"the tests fail on unchanged code (pytest exit code {code}):\n{output}")


def is_caught(copy: Path, mutation: Mutation) -> bool:
    """Whether a test fails on the mutated copy; the copy is as before afterwards."""
    path = copy / mutation.file
    text = path.read_text()
    path.write_text(mutation.apply(text))
    try:
        code, output = run_tests(copy, mutation.tests)
    finally:
        path.write_text(text)
    if code not in (0, 1):
        # 1 says that a test failed; anything else, that the tests could not be run.
        sys.exit(f"pytest ended with exit code {code} on {mutation.name}:\n{output}")
    return code == 1


def main() -> None:
    """Break, test, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=AREAS, help="one area")
    parser.add_argument("--name", help="mutations whose name contains this text")
    parser.add_argument("--jobs", type=int, default=1, help="copies that are tested at once")
    options = parser.parse_args()
    chosen = [
        mutation
        for mutation in MUTATIONS
        if options.only in (None, mutation.area) and (options.name or "") in mutation.name
    ]
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        copies: queue.Queue[Path] = queue.Queue()
        for job in range(options.jobs):
            copies.put(copy_repository(Path(folder, str(job))))
        first = copies.queue[0]
        check_copy(first)
        check_unchanged(first, chosen)

        def try_one(mutation: Mutation) -> tuple[Mutation, bool, float]:
            copy = copies.get()
            start = time.monotonic()
            try:
                return mutation, is_caught(copy, mutation), time.monotonic() - start
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(options.jobs) as pool:
            for mutation, caught, seconds in pool.map(try_one, chosen):
                verdict = "caught  " if caught else "SURVIVED"
                line = f"{verdict}  {seconds:4.0f} s  {mutation.area:<9}  {mutation.name}"
                print(line, flush=True)
                if not caught:
                    survivors.append(mutation)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations were caught")
    for mutation in survivors:
        print(f"  {mutation.file}: {mutation.why}; {', '.join(mutation.tests)} did not notice")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
