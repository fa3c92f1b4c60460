"""Experiments of the paper's section IV and beyond: each trains or measures, and leaves tables and figures."""
