"""Flax modules: they declare parameters and call `cimjax.core`; all mathematics is there."""
