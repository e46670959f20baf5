"""Generated corpora for `bench_select.py`: random words in rows as long as real ones."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from conditions import ROOT

NUM_CATEGORIES = 14
SHARD_ROWS = 50_000
TEXT_BYTES = 64 * 2**20


def ingest_real(data_dir: Path, folder: Path) -> Any:
    """The corpus of `configs/real_cpu.yaml`, ingested into the folder."""
    from system.config.load import load_config
    from system.data.corpus import Corpus
    from system.data.ingest.ingest import ingest_local

    example = str(ROOT / "configs" / "real_cpu.yaml")
    config = load_config(example, [f"data_dir={data_dir}", f"run_dir={folder}"])
    ingest_local(config, str(folder))
    return Corpus.open(str(folder / "manifest.json"))


def real_lengths(data_dir: Path, work: Path) -> np.ndarray:
    """[N, 2] characters of prompt (all turns but the last) and response of the real rows."""
    kept = work / "lengths.npy"
    if not kept.exists():
        corpus = ingest_real(data_dir, work / "real")
        rows = [
            (sum(len(turn["content"]) for turn in turns[:-1]), len(turns[-1]["content"]))
            for category in corpus.categories
            for table in corpus.iter_tables("train", category, ["messages"])
            for turns in table["messages"].to_pylist()
        ]
        np.save(kept, np.array(rows, np.int64))
        shutil.rmtree(work / "real")
    return np.load(kept)


def random_text(seed: int) -> np.ndarray:
    """[TEXT_BYTES] uint8: random words of 2 to 9 letters."""
    draw = np.random.default_rng(seed)
    letters = np.frombuffer(b"etaoinshrdlcumwfgypbvk", np.uint8)
    text = letters[draw.integers(0, len(letters), TEXT_BYTES)]
    text[np.cumsum(draw.integers(3, 11, TEXT_BYTES // 10))] = ord(" ")
    return text


def random_ids(draw: np.random.Generator, count: int, low: float, high: float) -> pa.Array:
    """Ordered random content ids, from a range of all."""
    heads = np.sort(draw.integers(int(low * 2**62), int(high * 2**62), count)).astype(np.uint64)
    raw = np.empty((count, 2), ">u8")
    raw[:, 0], raw[:, 1] = heads << np.uint64(2), draw.integers(0, 2**63, count)
    text = raw.tobytes().hex()
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * 32)
    return pa.StringArray.from_buffers(count, offsets.buffers()[1], pa.py_buffer(text.encode()))


def messages_of(draw: np.random.Generator, lengths: np.ndarray, text: np.ndarray) -> pa.Array:
    """Conversations of one question and one answer."""
    from system.schema import MESSAGES

    count = len(lengths)
    ends = np.concatenate([[0], np.cumsum(lengths.reshape(-1))])
    start = int(draw.integers(0, len(text)))
    bytes_ = np.take(text, np.arange(start, start + ends[-1]), mode="wrap")
    offsets = pa.array(ends.astype(np.int32))
    contents = pa.StringArray.from_buffers(2 * count, offsets.buffers()[1], pa.py_buffer(bytes_))
    roles = pa.array(["user", "assistant"]).take(pa.array(np.tile([0, 1], count)))
    fields = list(MESSAGES.value_type)
    marks = [pa.nulls(2 * count, field.type) for field in fields[2:]]
    turns = pa.StructArray.from_arrays([roles, contents, *marks], fields=fields)
    places = pa.array(np.arange(0, 2 * count + 1, 2, dtype=np.int32))
    return pa.ListArray.from_arrays(places, turns, type=MESSAGES)


def write_corpus(folder: Path, num_rows: int, lengths: np.ndarray, is_index: bool) -> None:
    """Shards and manifest; with `is_index` only the columns that choosing reads."""
    from system.data.corpus import Shard, make_manifest, write_manifest
    from system.schema import CORPUS

    draw = np.random.default_rng(num_rows)
    text = random_text(0)
    shards = []
    for category in range(NUM_CATEGORIES):
        total = num_rows // NUM_CATEGORIES + (category < num_rows % NUM_CATEGORIES)
        cuts = -(-total // SHARD_ROWS)
        for cut in range(cuts):
            count = total * (cut + 1) // cuts - total * cut // cuts
            columns: dict[str, Any] = {
                "id": random_ids(draw, count, cut / cuts, (cut + 1) / cuts),
                "score": pa.array(draw.normal(size=count)),
            }
            if not is_index:
                sizes = lengths[draw.integers(0, len(lengths), count)]
                name = pa.scalar(f"category_{category:02d}", pa.string())
                columns |= {
                    "category": pa.repeat(name, count),
                    "source": pa.repeat(pa.scalar("generated"), count),
                    "messages": messages_of(draw, sizes, text),
                    "answer": pa.nulls(count, pa.string()),
                    "answer_pattern": pa.nulls(count, pa.string()),
                    "embedding": pa.nulls(count, CORPUS.field("embedding").type),
                }
            table = pa.table(columns)
            if not is_index:
                table = table.select(CORPUS.names).cast(CORPUS)
            path = f"category_{category:02d}/{cut:05d}.arrow"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with pyarrow.ipc.new_file(str(folder / path), table.schema) as writer:
                writer.write_table(table, max_chunksize=8192)
            shards.append(
                Shard(
                    path=path, split="train", category=f"category_{category:02d}", rows=count,
                    first_id=table["id"][0].as_py(), last_id=table["id"][-1].as_py(),
                    sha256=hashlib.sha256(path.encode()).hexdigest(),
                )
            )  # fmt: skip
    write_manifest(str(folder / "manifest.json"), make_manifest(shards))
