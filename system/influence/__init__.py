"""How categories help and harm each other: interventions, effects, errors."""
