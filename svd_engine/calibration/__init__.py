"""From examples to a strength, and whether it is worth using."""
