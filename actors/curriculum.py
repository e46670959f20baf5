"""Stage `curriculum`: computes the dependency taxonomy and curriculum stages in the driver."""

from __future__ import annotations

from actors.stage import StageContext, StageResult
from system import storage
from system.curriculum import plan_curriculum
from system.influence.estimate.matrix import EffectMatrix
from system.mix.question import (
    dependency_effects,
)
from system.solve import (
    Mix,
)
from system.taxonomy import estimate_taxonomy


def run(context: StageContext) -> StageResult:
    """Estimates the taxonomy, plans the curriculum stages, writes both."""
    config = context.config
    matrices = _matrices(context)
    categories, effects, errors, freedom = dependency_effects(matrices)
    taxonomy = estimate_taxonomy(
        categories,
        effects,
        errors,
        degrees_of_freedom=freedom,
        false_discovery_rate=config.curriculum.false_discovery_rate,
        num_bootstrap=config.curriculum.bootstrap,
        seed=config.seed,
    )
    mix = Mix.from_json(storage.read_bytes(context.input("solve", "mix")).decode())
    curriculum = plan_curriculum(
        {name: round(count) for name, count in mix.counts().items()},
        # A category that is not a target has no level: None keeps its natural share.
        {name: taxonomy.curriculum_levels.get(name) for name in mix.counts()},
        preset=config.curriculum.preset,
        num_stages=config.curriculum.num_stages,
        epochs=config.curriculum.epochs,
        tilt=config.curriculum.tilt,
        rehearsal=config.curriculum.rehearsal,
    )
    storage.write_json(storage.join(context.attempt, "taxonomy.json"), taxonomy.to_json())
    storage.write_json(storage.join(context.attempt, "curriculum.json"), curriculum.to_json())
    sizes = ", ".join(f"{stage.name} {stage.size:,}" for stage in curriculum.stages)
    lines = [taxonomy.summary, f"stages: {sizes}"]
    if curriculum.note:
        lines.append(curriculum.note)
    return StageResult(
        outputs={"taxonomy": "taxonomy.json", "curriculum": "curriculum.json"},
        counts={
            "edges": len(taxonomy.edges),
            "levels": max(taxonomy.levels) + 1,
            "stages": len(curriculum.stages),
            "examples": sum(stage.size for stage in curriculum.stages),
        },
        lines=tuple(lines),
    )


def _matrices(context: StageContext) -> dict[str, EffectMatrix]:
    """The matrices by direction, at the largest dose, whose effects are the most significant."""
    uri = context.input("influence", "matrix")
    table = storage.read_table(uri)
    return {
        direction: EffectMatrix.from_table(table, direction=direction, where=uri)
        for direction in context.config.influence.directions
    }
