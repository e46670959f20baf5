"""Curriculum: turns a mix and dependency levels into training stages with exact integer counts."""

from system.curriculum.plan import plan_curriculum
from system.curriculum.records import Curriculum, Preset, Stage

__all__ = ["Curriculum", "Preset", "Stage", "plan_curriculum"]
