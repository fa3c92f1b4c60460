"""Experiments: they train and evaluate, and make tables."""
