"""No table ends in a traceback: `solve` answers or says what is wrong, and leaves no half file."""

import random
from pathlib import Path

import pytest

from system import cli

ODD = (
    "", " ", "0", "-1", "1e308", "1e400", "inf", "nan", "-0.0", "1e-320", "0x10", "1_0", "１", "x",
    "9" * 5000, "a\nb", '"', '""', "'", ",", ";", "\t", "\x00", "é", "\ud83d", "\ufeff",
    "x" * 200_000,     "=1+1", "category", "count", "math", "true", "None",
)  # fmt: skip
LIMITS = (
    "{}", "[]", "3", "groups: {a: {min: 0.1, categories: [math]}}", "groups: {a: {max: 2}}",
    "groups: [a]", "groups: {a: 3}", "groups: {a: {categories: x}}", "categories: {math: {cap: 1}}",
    "categories: {math: {lower: 9e999}}", "categories: {none: {}}", "guards: {math: 0.1}",
    "guards: {math: x}", "importance: {math: 0}", "importance: {math: -1}", "other: 1",
    f"guards: {{math: {'9' * 400}}}", "guards: {math: !!int abc}", "a: &a [*a]", "[" * 3000,
    "groups: {? [a] : 1}", "guards: {math: 2020-13-45}", "guards: {math: .nan}",
)  # fmt: skip
FLAGS = (
    [], [], [], [], [], [], [], ["--budget", "5"], ["--budget", "0"], ["--budget", "1e300"],
    ["--budget", "nan"],
    ["--move", "2"], ["--guard", "0.1"], ["--objective", "max-min"], ["--integer"],
    ["--objective", "concave"], ["--max-categories", "1"], ["--max-categories", "0"],
    ["--objective", "robust"], ["--move", "-1"],
)  # fmt: skip


def table(draw: random.Random, kind: str) -> bytes:
    """A small table, mostly valid, with up to three odd cells, rows or bytes."""
    names = ["math", "code", "chat"]
    if kind == "base":
        columns = ["supply", "importance", "lower", "upper", "cap", "tokens", "group"]
        more = draw.sample(columns, draw.choice((0, 0, 1, 3)))
        rows = [["category", "count", *more]]
        rows += [[name, str(10 * k + 10), *["1" for _ in more]] for k, name in enumerate(names)]
    else:
        rows = [["target", *names]]
        rows += [[t, *[f"{draw.gauss(0, 1):.3f}" for _ in names]] for t in names]
    for _ in range(draw.choice((0, 0, 0, 1, 1, 3))):
        row = draw.choice(rows)
        match draw.randrange(9):
            case 0 if row:
                del row[draw.randrange(len(row))]
            case 1 if len(rows) > 1:
                rows.remove(row)
            case 2:
                rows.append(list(row))
            case 3 | 4 | 5 if len(row) > 1:  # a number
                row[draw.randrange(1, len(row))] = draw.choice(ODD[:12])
            case _ if row:
                row[draw.randrange(len(row))] = draw.choice(ODD)
    data = "\n".join(",".join(row) for row in rows).encode(errors="surrogatepass")
    if draw.random() < 0.1:
        place = draw.randrange(len(data) + 1)
        data = data[:place] + draw.choice((b"\xff\xfe", b"\x00", b"\x1f\x8b")) + data[place:]
    return data


def check_tables(folder: Path, capsys: pytest.CaptureFixture, seeds: range) -> None:
    codes = set()
    for seed in seeds:
        draw = random.Random(str(seed))
        for kind in ("base", "gamma"):
            (folder / f"{kind}.csv").write_bytes(table(draw, kind))
        out = folder / f"{seed}.json"
        arguments = ["--base", f"{folder}/base.csv", "--gamma", f"{folder}/gamma.csv"]
        if draw.random() < 0.3:
            (folder / "limits.yaml").write_text(draw.choice(LIMITS))
            arguments += ["--limits", f"{folder}/limits.yaml"]
        try:
            code = cli.main(["solve", *arguments, *draw.choice(FLAGS), "--out", str(out)])
        except SystemExit as refused:  # the command line itself
            code = refused.code
        printed = capsys.readouterr()
        assert code in (0, 2), (seed, printed.err)
        assert out.exists() == (code == 0), seed
        assert len(printed.err) < 5000, seed
        codes.add(code)
    assert codes == {0, 2}
    assert not list(folder.glob("*.tmp"))


def test_odd_tables_are_solved_or_refused(tmp_path, capsys):
    check_tables(tmp_path, capsys, range(200))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_odd_tables_are_solved_or_refused(tmp_path, capsys):
    check_tables(tmp_path, capsys, range(200, 20_000))
