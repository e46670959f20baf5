"""Adds the effects of new categories to a finished matrix (`influence.append`)."""
