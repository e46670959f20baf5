"""What the modules about training share: one world, and the undisturbed training of it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def long_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A selection long enough to be killed in; trainings go to directories of their own."""
    from trainer_world import LONG_STEPS, build_world

    root = tmp_path_factory.mktemp("long")
    # Weights as a real model starts with: the differences of rounding then stay small.
    build_world(root, num_rows=4 * LONG_STEPS, hidden_size=192, spread=0.02)
    return root


@pytest.fixture(scope="session")
def undisturbed(long_world: Path) -> Path:
    """The directory of a training by two plain processes: no Ray, nothing that is killed."""
    from trainer_world import LONG, train_without_ray

    return train_without_ray(long_world, "train/undisturbed", **LONG)
