"""Curriculum: a mix and its dependency levels become training stages with exact integer counts."""

from system.curriculum.plan import plan_curriculum
from system.curriculum.records import Curriculum, Preset, Stage

__all__ = ["Curriculum", "Preset", "Stage", "plan_curriculum"]
