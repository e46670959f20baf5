"""The corpus: Arrow shards by split and category, and the manifest that makes them one.

    manifest.json
    shards/train/math-1f3c/00000-000.arrow     rows of one category, ordered by id

Stage `ingest` writes the corpus, stage `tag` writes a new manifest, and all later stages read it
through `Corpus`.  A path in a manifest is relative to the directory of the manifest, so a later
stage can write its own manifest that refers to shards of an earlier one.  Readers use only the
manifest and never list directories.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, where no type checker sees them)
from __future__ import annotations

import bisect
import hashlib
import heapq
import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from system import storage
from system.data.rows.canonical import canonical_table
from system.data.rows.conversation import SPLITS
from system.errors import DataError
from system.schema import CORPUS, check_table

FORMAT = 1
_BATCH_ROWS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One Arrow file of rows of one category and split, ordered by id."""

    path: str
    """Relative to the manifest's directory."""
    split: str
    category: str | None
    """None: rows without a category, which stage `tag` has to tag."""
    rows: int
    """Rows that are used; the file has more rows if `lengths` is set."""
    first_id: str
    last_id: str
    sha256: str
    lengths: str | None = None
    """Path of the LENGTHS table that marks the rows to leave out; None: no row is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What the corpus contains, and what happened to every row that was read."""

    categories: tuple[str, ...]
    counts: dict[str, dict[str, int]]
    """Split -> category -> rows, without the untagged ones."""
    untagged: dict[str, int]
    """Split -> rows without a category."""
    shards: tuple[Shard, ...]
    read: int = 0
    """Rows read; equals kept + duplicates + the sum of rejected."""
    kept: int = 0
    duplicates: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    sources: tuple[dict[str, Any], ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    """More counts, such as duplicates by kind, and tokens by split and category."""
    format: int = FORMAT

    @property
    def duplicates_in_words(self) -> str:
        """Number of duplicates, by kind: `1,234 duplicates (1,100 exact, 134 near)`."""
        kinds = self.details.get("duplicates", {})
        listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        return f"{self.duplicates:,} duplicates" + (
            f" ({listed})" if set(kinds) - {"exact"} else ""
        )

    @property
    def content_digest(self) -> str:
        """16 hex digits of a hash of all rows; it does not depend on the files they came from."""
        shards = json.dumps([asdict(shard) for shard in self.shards], sort_keys=True)
        return hashlib.sha256(shards.encode()).hexdigest()[:16]


def make_manifest(shards: Sequence[Shard], **counts: Any) -> Manifest:
    """The manifest of these shards; counts by split and category are computed from them."""
    by_split: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    untagged = dict.fromkeys(SPLITS, 0)
    names = sorted({shard.category for shard in shards if shard.category is not None})
    for shard in shards:
        if shard.category is None:
            untagged[shard.split] += shard.rows
        else:
            counted = by_split[shard.split]
            counted[shard.category] = counted.get(shard.category, 0) + shard.rows
    ordered = {
        split: {name: counted.get(name, 0) for name in names} for split, counted in by_split.items()
    }
    ranked = sorted(
        shards, key=lambda shard: (SPLITS.index(shard.split), shard.category or "", shard.first_id)
    )
    return Manifest(
        categories=tuple(names),
        counts=ordered,
        untagged=untagged,
        shards=tuple(ranked),
        **counts,
    )


def write_manifest(uri: str, manifest: Manifest) -> None:
    """Writes the manifest, which makes the corpus complete."""
    storage.write_json(uri, asdict(manifest))


def read_manifest(uri: str) -> Manifest:
    """Reads a manifest.

    Raises:
        DataError: it is missing, damaged, or of another format version.
    """
    if not storage.exists(uri):
        raise DataError(f"{uri}: expected a corpus manifest, found nothing; run `ingest` first")
    value = storage.read_json(uri)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        version = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise DataError(
            f"{uri}: expected a corpus manifest of format {FORMAT}, found {version!r}; run "
            "`ingest` again with --redo"
        )
    try:
        value["shards"] = tuple(Shard(**shard) for shard in value["shards"])
        value["categories"] = tuple(value["categories"])
        value["sources"] = tuple(value["sources"])
        return Manifest(**value)
    except (LookupError, TypeError) as error:
        raise DataError(
            f"{uri}: expected a corpus manifest, but it is damaged ({error!r}); run `ingest` again "
            "with --redo"
        ) from error


def shard_directory(split: str, category: str | None) -> str:
    """Directory of the shards of a split and category; each category has one of its own.

    A short name of small letters, digits and hyphens stands in its directory as it is.  Of other
    names only the readable part does, so the whole hash tells them apart.
    """
    if category is None:
        return f"shards/{split}/_untagged"
    readable = re.sub(r"[^a-z0-9]+", "-", category.lower()).strip("-")[:40]
    digest = hashlib.sha256(category.encode()).hexdigest()
    return f"shards/{split}/{readable}-{digest[:6] if readable == category else digest}"


def write_shard(
    base_uri: str, path: str, table: pa.Table, split: str, category: str | None
) -> Shard:
    """Writes rows (CORPUS schema, one category, ordered by id) as a shard.

    The bytes depend on the rows alone, not on how the table was built.
    """
    shard, data = shard_of(path, table, split, category)
    with storage.atomic_output(storage.join(base_uri, path)) as file:
        file.write(memoryview(data))
    return shard


def shard_of(
    path: str, table: pa.Table, split: str, category: str | None
) -> tuple[Shard, pa.Buffer]:
    """The shard that `write_shard` would write, and its bytes."""
    table = canonical_table(check_table(table, CORPUS, path))
    sink = pa.BufferOutputStream()
    with pyarrow.ipc.new_file(sink, CORPUS) as writer:
        writer.write_table(table, max_chunksize=_BATCH_ROWS)
    data = sink.getvalue()
    shard = Shard(
        path=path,
        split=split,
        category=category,
        rows=table.num_rows,
        first_id=table["id"][0].as_py(),
        last_id=table["id"][-1].as_py(),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    return shard, data


class Corpus:
    """Reads a corpus: counts, shards, samples, and rows by id."""

    def __init__(self, uri: str, manifest: Manifest) -> None:
        self.uri = uri
        self.manifest = manifest
        self.base = uri.rsplit("/", 1)[0]
        self._shards: dict[tuple[str, str | None], list[Shard]] = {}
        for shard in manifest.shards:
            self._shards.setdefault((shard.split, shard.category), []).append(shard)

    @classmethod
    def open(cls, manifest_uri: str) -> Corpus:
        """Opens the corpus of a manifest.

        Raises:
            DataError: there is no manifest, or it is of another format version.
        """
        return cls(manifest_uri, read_manifest(manifest_uri))

    @property
    def categories(self) -> tuple[str, ...]:
        """All categories, sorted."""
        return self.manifest.categories

    def counts(self, split: str) -> dict[str, int]:
        """Rows of each category in the split."""
        return dict(self.manifest.counts[split])

    def num_rows(self, split: str, category: str | None) -> int:
        """Rows of a category (None: untagged ones) in a split."""
        if category is None:
            return self.manifest.untagged[split]
        self._check_category(category)
        return self.manifest.counts[split][category]

    def shards(self, split: str, category: str | None) -> list[Shard]:
        """The shards of a category, by first id."""
        self._check_category(category)
        return list(self._shards.get((split, category), ()))

    def shard_uri(self, shard: Shard) -> str:
        """The URI of the shard's file."""
        return resolve_path(self.base, shard.path)

    def read_shard(self, shard: Shard, columns: list[str] | None = None) -> pa.Table:
        """The rows of a shard, without the rows to leave out; a local file is memory-mapped.

        Raises:
            DataError: the file is missing or damaged, has another number of rows, or has rows of
                another category.
        """
        uri = self.shard_uri(shard)
        names = columns or CORPUS.names
        try:
            table = storage.read_table(uri, list(dict.fromkeys([*names, "category"])))
            _check_one_category(table, shard.category, uri)
            table = table.select(names)
            if shard.lengths is not None:
                lengths = storage.read_table(resolve_path(self.base, shard.lengths))
                table = table.filter(pc.is_null(lengths["left_out"]))
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{uri}: expected {shard.rows} rows of {shard.category!r}; the file cannot be read "
                f"({error}). Run `ingest` again with --redo."
            ) from error
        if table.num_rows != shard.rows:
            raise DataError(
                f"{uri}: expected {shard.rows} rows as its manifest says, found {table.num_rows}. "
                "Run `ingest` again with --redo."
            )
        return table

    def iter_tables(
        self, split: str, category: str | None, columns: list[str] | None = None
    ) -> Iterator[pa.Table]:
        """Rows of a category, sorted by id, in tables of some thousand rows.

        Shards with overlapping ids (a later stage added some) are merged while reading.
        """
        names = columns or CORPUS.names
        read = names if "id" in names else [*names, "id"]
        for group in _overlapping(self.shards(split, category)):
            tables = [self.read_shard(shard, read) for shard in group]
            for table in _merged(tables):
                yield table.select(names)

    def sample(self, split: str, category: str | None, num_rows: int, seed: int) -> pa.Table:
        """The rows with the smallest `sha256(f"{seed}:{id}")`, in the order of that hash.

        The sample does not depend on shards, files or workers, and a larger sample begins with the
        smaller one.  If the category has fewer rows, all of them are returned.
        """
        best: list[tuple[int, str]] = []
        for table in self.iter_tables(split, category, ["id"]):
            for row_id in table["id"].to_pylist():
                item = (-seeded_rank(seed, row_id), row_id)
                if len(best) < num_rows:
                    heapq.heappush(best, item)
                elif best and item > best[0]:
                    heapq.heapreplace(best, item)
        order = [row_id for _, row_id in sorted(best, reverse=True)]
        return self.rows_by_id(split, category, order)

    def rows_by_id(self, split: str, category: str | None, ids: Sequence[str]) -> pa.Table:
        """The rows with these ids, in the order given.

        Raises:
            DataError: an id is not there.
        """
        id_set = pa.array(sorted(ids), pa.string())
        matches: list[pa.Table] = []
        for shard in self.shards(split, category):
            table = self.read_shard(shard)
            mask = pc.is_in(table["id"], value_set=id_set)
            if pc.any(mask).as_py():
                matches.append(table.filter(mask))
        table = pa.concat_tables(matches) if matches else CORPUS.empty_table()
        place = {row_id: k for k, row_id in enumerate(table["id"].to_pylist())}
        missing = [row_id for row_id in ids if row_id not in place]
        if missing:
            raise DataError(
                f"{self.uri}: expected {len(ids)} rows of {category!r} in {split!r} by their ids; "
                f"{len(missing)} are not there, the first is {missing[0]}"
            )
        return table.take(pa.array([place[row_id] for row_id in ids], pa.int64()))

    def _check_category(self, category: str | None) -> None:
        if category is not None and category not in self.manifest.categories:
            raise DataError(
                f"{self.uri}: no category {category!r}; there are {list(self.manifest.categories)}"
            )


def _check_one_category(table: pa.Table, category: str | None, uri: str) -> None:
    found = pc.unique(table["category"]).to_pylist()
    if found not in ([category], []):
        raise DataError(
            f"{uri}: expected rows of the category {category!r} only, found {found[:5]}. The file "
            "belongs to another corpus or was overwritten: run `ingest` again with --redo."
        )


def seeded_rank(seed: int, row_id: str) -> int:
    """First 64 bits of SHA-256 over `seed:id`: the sort key of a row in a seeded random order."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row_id}".encode()).digest()[:8], "big")


def resolve_path(base_uri: str, path: str) -> str:
    """Joins a relative path to a directory and resolves `..`; for local paths and URIs."""
    scheme, separator, rest = base_uri.rpartition("://")
    return f"{scheme}{separator}{posixpath.normpath(posixpath.join(rest, path))}"


def relative_path(uri: str, base_uri: str) -> str:
    """The inverse of `resolve_path`."""
    return posixpath.relpath(uri.rpartition("://")[2], base_uri.rpartition("://")[2])


def moved_shards(corpus: Corpus, manifest_dir: str) -> list[Shard]:
    """The shards of a corpus, with their paths made relative to another manifest's directory."""
    return [
        replace(
            shard,
            path=relative_path(corpus.shard_uri(shard), manifest_dir),
            lengths=relative_path(resolve_path(corpus.base, shard.lengths), manifest_dir)
            if shard.lengths
            else None,
        )
        for shard in corpus.manifest.shards
    ]


def _overlapping(shards: Sequence[Shard]) -> Iterator[list[Shard]]:
    """Groups of shards whose ranges of ids overlap, in the order of the ids."""
    group: list[Shard] = []
    last = ""
    for shard in sorted(shards, key=lambda shard: shard.first_id):
        if group and shard.first_id > last:
            yield group
            group = []
        group.append(shard)
        last = max(last, shard.last_id)
    if group:
        yield group


def _merged(tables: Sequence[pa.Table]) -> Iterator[pa.Table]:
    """Merges tables that are each sorted by id into one sorted stream of small tables."""
    places = [0] * len(tables)
    while True:
        open_tables = [k for k, table in enumerate(tables) if places[k] < table.num_rows]
        if not open_tables:
            return
        # All rows up to the cutoff lie in the next _BATCH_ROWS rows of each table, so they can be
        # sorted now: no row that is read later comes before them.
        cutoff = min(
            tables[k]["id"][min(places[k] + _BATCH_ROWS, tables[k].num_rows) - 1].as_py()
            for k in open_tables
        )
        parts = []
        for k in open_tables:
            ids = tables[k]["id"]
            end = bisect.bisect_right(
                range(tables[k].num_rows),
                cutoff,
                lo=places[k],
                key=lambda row, ids=ids: ids[row].as_py(),
            )
            parts.append(tables[k].slice(places[k], end - places[k]))
            places[k] = end
        if len(parts) == 1:
            yield parts[0]
        else:
            whole = pa.concat_tables(parts)
            yield whole.take(pc.sort_indices(whole["id"]))
