"""Tables of losses and answers on single test rows, and their conversion to arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from system.intervals import wilson_interval

LOSSES = pa.schema(
    [
        pa.field("arm", pa.string(), nullable=False),
        pa.field("seed", pa.int32(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("nll", pa.float64(), nullable=False),  # nats, summed over response tokens
        pa.field("num_tokens", pa.int32(), nullable=False),
    ]
)
"""Loss of one held-out example with one model."""

OUTCOMES = pa.schema(
    [
        pa.field("arm", pa.string(), nullable=False),
        pa.field("seed", pa.int32(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("correct", pa.bool_(), nullable=False),
    ]
)
"""Whether one generated answer is correct."""

ACCURACY = pa.schema(
    [
        pa.field("arm", pa.string(), nullable=False),
        pa.field("seed", pa.int32(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("rows", pa.int32(), nullable=False),
        pa.field("correct", pa.int32(), nullable=False),
        pa.field("accuracy", pa.float64(), nullable=False),
        pa.field("low", pa.float64(), nullable=False),  # Wilson interval
        pa.field("high", pa.float64(), nullable=False),
    ]
)
"""Share of correct answers of one model in one category."""


def performance_of(
    table: pa.Table, column: str
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, int]]:
    """The values of a long table as arrays over seeds and examples.

    Args:
        table: columns arm, seed, category, id and `column`; LOSSES with `loss` gives minus the mean
            token loss.
        column: `loss` or `correct`.

    Returns:
        Arm -> category -> [S, n], with the examples that every arm and seed has, in the order of
        their ids; and category -> number of examples that some model lacks.
    """
    if column == "loss":
        nll = table.column("nll").to_numpy()
        values = -nll / table.column("num_tokens").to_numpy()
    else:
        values = table.column(column).to_numpy(zero_copy_only=False).astype(np.float64)
    models: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    names = zip(
        table.column("arm").to_pylist(),
        table.column("seed").to_pylist(),
        table.column("category").to_pylist(),
        table.column("id").to_pylist(),
        values.tolist(),
        strict=True,
    )
    for arm, seed, category, row_id, value in names:
        models.setdefault((arm, seed), {}).setdefault(category, {})[row_id] = value
    performance: dict[str, dict[str, np.ndarray]] = {arm: {} for arm, _ in models}
    left_out: dict[str, int] = {}
    for category in sorted({name for of in models.values() for name in of}):
        of_models = [of.get(category, {}) for of in models.values()]
        common = sorted(set.intersection(*(set(rows) for rows in of_models)))
        left_out[category] = len(set.union(*(set(rows) for rows in of_models))) - len(common)
        if len(common) < 2:  # one example has no error estimate
            left_out[category] += len(common)
            continue
        for arm in performance:
            rows = [models[key].get(category, {}) for key in sorted(models) if key[0] == arm]
            performance[arm][category] = np.array([[of[i] for i in common] for of in rows])
    return performance, {category: count for category, count in left_out.items() if count}


def accuracy_table(outcomes: pa.Table, confidence: float) -> pa.Table:
    """ACCURACY table: share of correct answers by model and category, with Wilson intervals."""
    cells: dict[tuple[str, int, str], list[bool]] = {}
    for row in outcomes.to_pylist():
        cells.setdefault((row["arm"], row["seed"], row["category"]), []).append(row["correct"])
    rows = []
    for (arm, seed, category), answers in sorted(cells.items()):
        interval = wilson_interval(sum(answers), len(answers), confidence)
        rows.append(
            {
                "arm": arm, "seed": seed, "category": category, "rows": len(answers),
                "correct": sum(answers), "accuracy": interval.value, "low": interval.low,
                "high": interval.high,
            }
        )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=ACCURACY)
