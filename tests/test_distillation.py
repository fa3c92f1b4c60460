"""Learning from a trained run: the loss is Hinton's, a wrong teacher is refused, and a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import config, quiet

import cimjax
from cimjax.data import Dataset
from cimjax.training.distillation import taught_by
from cimjax.training.run.folder import read_records
from cimjax.training.state import Batch


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of full precision."""
    folder = tmp_path_factory.mktemp("teacher") / "full"
    cimjax.train(config("smoke,weight=none", epochs=3.0), workdir=folder, display=quiet())
    return folder


def taught(run: Path | str, **fields: Any) -> Any:
    chosen = config("smoke,adc_bits=2", epochs=1.0)
    with chosen.unlocked():
        chosen.teacher = str(run)
        chosen.update(fields)
    return chosen


def test_the_loss_is_that_of_labels_and_of_softened_probabilities(teacher: Path) -> None:
    run = cimjax.load(teacher)
    images = jax.random.normal(jax.random.key(0), (5, 8, 8, 1))
    logits = jax.random.normal(jax.random.key(1), (5, 10))
    labels = jnp.array([3, 1, 4, 1, 5])
    batch = Batch(images, labels, jax.nn.one_hot(labels, 10))
    for weight, temperature in ((0.0, 3.0), (0.25, 2.0), (1.0, 5.0)):
        found = taught_by(run, weight, temperature)(logits, batch)
        z, theirs = (np.asarray(x, np.float64) for x in (logits, run.model.apply(run.variables, images)))

        def log_softmax(x: np.ndarray) -> np.ndarray:
            return x - np.log(np.exp(x).sum(-1, keepdims=True))

        hard = -log_softmax(z)[range(5), labels]
        soft = -(np.exp(log_softmax(theirs / temperature)) * log_softmax(z / temperature)).sum(-1)
        np.testing.assert_allclose(found, (1 - weight) * hard + weight * temperature**2 * soft, rtol=1e-4)


def test_nothing_flows_into_the_teacher(teacher: Path) -> None:
    run = cimjax.load(teacher)
    batch = Batch(jnp.ones((2, 8, 8, 1)), jnp.zeros(2, jnp.int32), jax.nn.one_hot(jnp.zeros(2, jnp.int32), 10))

    def loss(images: jax.Array) -> jax.Array:
        return jnp.sum(taught_by(run, 0.5, 2.0)(jnp.zeros((2, 10)), batch.replace(images=images)))

    assert not jax.grad(loss)(batch.images).any()


def test_a_run_learns_from_its_teacher_and_is_evaluated_without_it(teacher: Path, tmp_path: Path) -> None:
    plain = cimjax.train(taught(""), workdir=tmp_path / "plain", display=quiet())
    result = cimjax.train(taught(teacher), workdir=tmp_path / "taught", display=quiet())
    losses = [
        next(record["loss"] for record in read_records(run) if record["split"] == "train")
        for run in (plain.workdir, result.workdir)
    ]
    assert losses[0] != losses[1]
    moved = teacher.rename(tmp_path / "elsewhere")
    try:
        assert cimjax.evaluate(result.workdir)["accuracy"] == result.accuracy
        with pytest.raises(ValueError, match=f"^[^\n]*{teacher}[^\n]*$"):
            cimjax.train(taught(teacher, epochs=2.0), workdir=result.workdir, display=quiet())
    finally:
        moved.rename(teacher)


def test_a_wrong_teacher_is_refused_before_anything_is_written(teacher: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (40, 8, 8, 1), np.uint8), np.arange(40) % 10
    other = Dataset.from_arrays("other", pixels, labels, pixels, labels)
    few = Dataset.from_arrays("few", pixels, labels % 3, pixels, labels % 3)
    for given, message in (
        ({"dataset": other}, "was trained on images of another mean and deviation than other"),
        ({"dataset": few}, "tells 10 classes apart, but few has 3"),
        ({"loss_fn": lambda logits, batch: 0.0}, "`config.teacher` is a run, and there is a `loss_fn`; give one"),
    ):
        with pytest.raises(ValueError, match=message):
            cimjax.train(taught(teacher, batch_size=8), workdir=tmp_path / "run", display=quiet(), **given)
        assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="nowhere"):
        cimjax.train(taught(tmp_path / "nowhere"), workdir=tmp_path / "run", display=quiet())
