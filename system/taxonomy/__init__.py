"""Dependency taxonomy: which categories stand on which, learned from the effect matrix."""

from system.taxonomy.estimate import estimate_taxonomy
from system.taxonomy.records import Edge, Taxonomy

__all__ = ["Edge", "Taxonomy", "estimate_taxonomy"]
