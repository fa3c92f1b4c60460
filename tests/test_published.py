"""The trained networks of `docs/runs`: each is there whole, and is what docs/accuracy.md says."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import cimjax
from cimjax.training.run.folder import read_records
from cimjax.training.run.network_file import NETWORK

DOCS = Path(__file__).parents[1] / "docs"
RUNS = sorted(path.parent for path in DOCS.glob(f"runs/*/{NETWORK}"))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_published_network_is_that_of_the_table(run: Path) -> None:
    assert all(path.stat().st_size <= 300_000 for path in run.iterdir())
    accuracy = read_records(run)[-1]["accuracy"]
    (row,) = re.findall(rf"^\| .*\[{run.name}\]\(runs/{run.name}/\).*$", (DOCS / "accuracy.md").read_text(), re.M)
    assert f"| {100 * accuracy:.2f} |" in row
    bits = {"ideal": None, "3bit": 3, "2bit": 2, "1bit": 1}[run.name.rpartition("-")[2]]
    loaded = cimjax.load(run)
    spec = loaded.spec
    assert isinstance(spec, cimjax.CIMSpec) and (spec.adc and spec.adc.bits) == bits
    if bits == 3:
        pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
        logits = jax.jit(loaded.model.apply)(loaded.variables, loaded.normalise(pixels))
        assert logits.shape == (2, 100) and np.isfinite(logits).all()


def test_there_are_published_networks() -> None:
    assert len(RUNS) >= 4
