"""Computes one vector for every train row, shard by shard; similarity is measured on them.

    tf-idf   hashed words and pairs of words, weighted by how rare they are, summed into 256
             components with random signs (feature hashing, Weinberger et al. 2009, arXiv 0902.2206)
    model    mean of the base model's last hidden states over the tokens of the conversation
    column   the vectors in the `embedding_column` of the sources

A row's vector depends on the row and, for tf-idf, on document frequencies of the corpus.  Those are
counted on the rows with the smallest ids, about 100,000, so they do not depend on shards.
`actors.features` calls this for each shard; `system.selection.choose` reads the vectors.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from system import storage
from system.data.corpus import Corpus, Shard
from system.data.duplicates.shingles import find_words, mix, ngrams
from system.errors import DataError
from system.models.chat import encode_rows
from system.selection.vectors import pack, quantise, spread, unpack

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DIMENSIONS = 256
"""Components of a tf-idf vector: the standard error of a cosine near 0 is about 0.06."""
COUNTED_ROWS = 100_000
"""Approximate number of rows on which document frequencies are counted."""

_BUCKET_BITS = 18
_WEIGHTS = "work/word-weights.npz"
_TEXT_ROWS = 2048
_MODEL_ROWS = 512
_WEIGHT_STEPS = 256.0


def vectors_path(shard: Shard) -> str:
    """Path of a shard's vectors, below the attempt; the hash in it is that of its content."""
    return f"vectors/{shard.split}-{shard.sha256[:24]}.arrow"


def has_vectors(attempt: str, shard: Shard) -> bool:
    """Whether the shard's vectors are committed."""
    return storage.is_whole(storage.join(attempt, f"{vectors_path(shard)}.json"))


def count_vectors(attempt: str, shard: Shard) -> int:
    """Number of rows of a shard that have a vector."""
    return int(storage.read_json(storage.join(attempt, f"{vectors_path(shard)}.json"))["vectors"])


def dimensions_differ(category: str, first: int, other: int) -> DataError:
    """The error for vectors that cannot be compared."""
    return DataError(
        f"category {category!r}: expected vectors of one length, found {first} and {other} "
        "components (rounded up to powers of two); compute the embedding columns of all sources "
        "with the same model"
    )


def read_vectors(attempt: str, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """[N, D] int8 vectors of a shard's rows and [N] bool which rows have one.

    Raises:
        DataError: the file is missing, or has another number of rows.
    """
    uri = storage.join(attempt, vectors_path(shard))
    if not storage.exists(uri):
        raise DataError(
            f"{uri}: expected the vectors of {shard.rows:,} rows, found no file; run `select` "
            "again with --redo"
        )
    vectors, has_vector = unpack(storage.read_table(uri))
    if len(vectors) != shard.rows:
        raise DataError(
            f"{uri}: expected {shard.rows:,} vectors, found {len(vectors):,}; run `select` again "
            "with --redo"
        )
    return vectors, has_vector


def write_vectors(attempt: str, shard: Shard, vectors_ND: np.ndarray, has: np.ndarray) -> None:
    """Writes a shard's vectors, then the JSON file with their number, which commits the shard."""
    path = storage.join(attempt, vectors_path(shard))
    storage.write_table(path, pack(vectors_ND, has))
    storage.write_json(f"{path}.json", {"rows": len(has), "vectors": int(has.sum())})


def count_words(corpus: Corpus, shard: Shard, num_rows: int) -> tuple[np.ndarray, int]:
    """[H] int64 number of rows with each word or pair of words, and the number of rows counted.

    Args:
        corpus: corpus of the shard.
        shard: its rows with ids below a bound are counted.
        num_rows: number of train rows of the whole corpus, from which the bound follows.
    """
    counts = np.zeros(1 << _BUCKET_BITS, np.int64)
    bound = f"{min(2**32 - 1, COUNTED_ROWS * 2**32 // max(num_rows, 1)):08x}"
    if shard.first_id[:8] > bound:
        return counts, 0
    # Rows are ordered by id, so those below the bound come first.
    ids = corpus.read_shard(shard, ["id"])["id"].to_pylist()
    size = bisect.bisect_right(ids, bound, key=lambda row_id: row_id[:8])
    table = corpus.read_shard(shard, ["messages"]).slice(0, size)
    for start in range(0, size, _TEXT_ROWS):
        buckets, _, _ = _terms(_texts(table.slice(start, _TEXT_ROWS)))
        counts += np.bincount(buckets, minlength=len(counts))
    return counts, size


def write_weights(attempt: str, counts: np.ndarray, num_rows: int) -> None:
    """Writes the weight of each word: log((1 + N) / (1 + n)) + 1 when n of N rows contain it.

    Args:
        attempt: attempt of stage `select`.
        counts: [H] number of rows that contain each word.
        num_rows: N, number of rows counted.
    """
    weights = np.log((1.0 + num_rows) / (1.0 + counts)) + 1.0
    with storage.atomic_output(storage.join(attempt, _WEIGHTS)) as file:
        np.savez(file, weights=weights)


def has_weights(attempt: str) -> bool:
    """Whether the word weights are written."""
    return storage.is_whole(storage.join(attempt, _WEIGHTS))


def read_weights(attempt: str) -> np.ndarray:
    """[H] float64: the weights of all words."""
    with storage.open_input(storage.join(attempt, _WEIGHTS)) as file, np.load(file) as arrays:
        return arrays["weights"]


def embed_texts(corpus: Corpus, shard: Shard, weights: np.ndarray) -> np.ndarray:
    """[N, DIMENSIONS] int8: tf-idf vectors of a shard's rows; zero for rows without a word."""
    table = corpus.read_shard(shard, ["messages"])
    parts = [
        _hashed(_texts(table.slice(start, _TEXT_ROWS)), weights)
        for start in range(0, table.num_rows, _TEXT_ROWS)
    ]
    return np.concatenate(parts)


def _texts(table: pa.Table) -> list[str]:
    return [
        " \n ".join(turn["content"] for turn in turns) for turns in table["messages"].to_pylist()
    ]


def _terms(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Buckets, rows and counts of the words and pairs of words of each text, by row and bucket."""
    if not texts:
        empty = np.zeros(0, np.int64)
        return empty, empty, empty
    words = find_words(texts)
    pairs, pair_rows = ngrams(words, 2, keep_short=False)
    hashes = np.concatenate([words.hashes, mix(pairs + np.uint64(1))])
    rows = np.concatenate([words.rows, pair_rows])
    keys = (rows << _BUCKET_BITS) | (hashes >> np.uint64(64 - _BUCKET_BITS)).astype(np.int64)
    unique_keys, counts = np.unique(keys, return_counts=True)
    return unique_keys & ((1 << _BUCKET_BITS) - 1), unique_keys >> _BUCKET_BITS, counts


def _hashed(texts: list[str], weights: np.ndarray) -> np.ndarray:
    buckets, rows, counts = _terms(texts)
    # Whole numbers: their sums do not depend on the order of additions.
    weight = np.rint((1.0 + np.log(counts)) * weights[buckets] * _WEIGHT_STEPS).astype(np.int64)
    drawn = mix(buckets.astype(np.uint64) + np.uint64(0x5E1EC7))
    place = (drawn >> np.uint64(32)).astype(np.int64) % DIMENSIONS
    sign = np.where(drawn & np.uint64(1), 1, -1)
    summed = np.zeros(len(texts) * DIMENSIONS, np.int64)
    np.add.at(summed, rows * DIMENSIONS + place, weight * sign)
    return quantise(summed.reshape(-1, DIMENSIONS).astype(np.float64))


def embed_column(corpus: Corpus, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """[N, D] int8 vectors from the corpus and [N] bool which rows have one.

    Raises:
        DataError: the vectors have different lengths.
    """
    column = corpus.read_shard(shard, ["embedding"])["embedding"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    has_vector = ~np.asarray(column.is_null())
    sizes = {len(row) for row in column.drop_null()}
    if len(sizes) > 1:
        raise DataError(
            f"{corpus.shard_uri(shard)}: expected vectors of one length in `embedding_column`, "
            f"found {sorted(sizes)}; compute them with the same model"
        )
    size = sizes.pop() if sizes else 1
    vectors = np.zeros((len(column), size))
    vectors[has_vector] = np.asarray(column.drop_null().flatten(), np.float64).reshape(-1, size)
    return quantise(spread(vectors)), has_vector


def embed_model(
    corpus: Corpus,
    shard: Shard,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tuple[np.ndarray, np.ndarray]:
    """[N, D] int8 mean last hidden states of the model and [N] bool which rows have one.

    The model gets one row at a time; in a batch, the low bits of a row would depend on the others.
    """
    import torch

    table = corpus.read_shard(shard, ["messages"])
    body: Any = getattr(model, model.base_model_prefix)
    vectors = np.zeros((table.num_rows, int(model.config.hidden_size)))
    has_vector = np.zeros(table.num_rows, bool)
    for start in range(0, table.num_rows, _MODEL_ROWS):
        part = table.slice(start, _MODEL_ROWS)
        encoded, kept, _ = encode_rows(part, tokenizer, max_length)
        for place, row in zip(kept, encoded, strict=True):
            ids = torch.tensor(row.input_ids[None], dtype=torch.long, device=model.device)
            with torch.inference_mode():
                states = body(input_ids=ids).last_hidden_state[0].float().mean(dim=0)
            vectors[start + place] = states.double().cpu().numpy()
            has_vector[start + place] = True
    has_vector &= np.isfinite(vectors).all(axis=1)
    vectors[~has_vector] = 0.0
    return quantise(spread(vectors)), has_vector
