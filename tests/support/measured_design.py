"""A small design with made-up scores."""

import pyarrow as pa

from system.influence.design.design import CategoryRows, Design, Replication, Target
from system.schema import SCORES

SOURCES = ("a", "b")


def rows(dose=8, extra=4):
    return CategoryRows(available=99, base=16, dose=dose, extra=extra, warm=0, warm_reused=0)


def design(replications=2, doses=(8, 8)):
    return Design(
        estimator="retrain",
        seed=0,
        directions=("add", "remove"),
        sources=SOURCES,
        targets=tuple(
            Target(name=name, num_rows=3, num_tokens=6, is_external=name == "x")
            for name in ("a", "b", "x")
        ),
        replications=tuple(
            Replication(
                index=index,
                seed=index,
                plan_sha256="",
                warm_sha256=None,
                num_steps=1,
                rows={"a": rows(dose=doses[index]), "b": rows()},
                dose_tokens={"add": {"a": 40, "b": 80}, "remove": {"a": 80, "b": 160}},
            )
            for index in range(replications)
        ),
        asked={"base": 16, "dose": 8, "extra": 4, "warm": 0, "heldout": 3},
        dropped={},
    )


def scores(shift=0.0, skip=(), tokens=2):
    keys = [(t, f"{t}{k}") for t in ("a", "b", "x") for k in range(3) if f"{t}{k}" not in skip]
    return pa.table(
        {
            "id": [key for _, key in keys],
            "category": [target for target, _ in keys],
            "nll": [2.0 * tokens + shift * tokens * (1 + int(key[1])) for _, key in keys],
            "num_tokens": [tokens] * len(keys),
        },
        schema=SCORES,
    )
