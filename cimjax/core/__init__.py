"""Pure functions on arrays: the computation of an array layer, step by step. Imports jax and numpy only."""
