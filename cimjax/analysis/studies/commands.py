"""The commands `cimjax study ...`: their arguments; each imports its study when it runs, jax not before."""

from __future__ import annotations

from cimjax.command import Command

STUDIES: dict[str, Command] = {}
