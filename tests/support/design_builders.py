"""Small designs of interventions."""

import numpy as np
import pyarrow as pa

from system.config import InfluenceConfig
from system.influence.design.design import InterventionRun, Target
from system.influence.design.interventions import (
    active_rows,
    assemble_design,
    plan_replication,
)
from system.schema import TOKENS

SOURCES = ("alpha", "beta", "gamma")


def tokens(category, ids):
    rows = [[1, 2, 3, 4 + len(name) % 5] for name in ids]
    masks = [[False, False, True, True]] * len(rows)
    return pa.table(
        {"id": ids, "category": [category] * len(ids), "input_ids": rows, "response_mask": masks},
        schema=TOKENS,
    )


def draw_from(supply):
    """Rows in an order that depends on the seed, as the corpus gives them."""

    def draw(split, category, wanted, seed):
        assert split == "train"
        order = np.random.default_rng([seed, len(category)]).permutation(supply[category])
        return tokens(category, [f"{category}-{row}" for row in order[:wanted]]), {}

    return draw


def config(estimator="retrain", **knobs):
    made = InfluenceConfig(
        **{"rows_per_category": 24, "dose_rows": 8, "batch_size": 4, "replications": 2, **knobs}
    )
    return made.model_copy(update={"estimator": estimator})


def schedule(index=0, supply=None, **knobs):
    return plan_replication(
        index,
        run_seed=5,
        sources=SOURCES,
        config=config(**knobs),
        max_length=16,
        draw=draw_from(supply or dict.fromkeys(SOURCES, 500)),
    )


def design_of(made, **knobs):
    return assemble_design(
        run_seed=5,
        config=config(**knobs),
        sources=SOURCES,
        targets=(Target(name="alpha", num_rows=9, num_tokens=40, is_external=False),),
        schedules=made,
        heldout_dropped={"no-response-token": 2},
    )


def active_ids(made, unit):
    mask = active_rows(made.plan, unit, design_of([made]))
    return {made.plan.table.column("id")[row].as_py() for row in np.flatnonzero(mask)}


def unit(kind, source=-1):
    return InterventionRun(replication=0, kind=kind, source=source)
