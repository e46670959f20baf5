"""Dependency taxonomy: which categories depend on which, estimated from the effect matrix."""

from system.taxonomy.estimate import estimate_taxonomy
from system.taxonomy.records import Edge, Taxonomy

__all__ = ["Edge", "Taxonomy", "estimate_taxonomy"]
