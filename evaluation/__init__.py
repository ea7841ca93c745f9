"""Judging optax transformations: learned or hand-designed, each enters as `horizon -> optax`."""
