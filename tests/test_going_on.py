"""Runs that go on otherwise than they began: of more epochs, of fewer, of other images, ended by callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from test_training import config, quiet

import cimjax
from cimjax.data import Dataset
from cimjax.training.experiment import planned_ideal
from cimjax.training.optimizer import total_steps
from cimjax.training.restore import restore
from cimjax.training.run.checkpoint import Checkpoints
from cimjax.training.run.folder import RunFolderError, read_records


class Tiny(nn.Module):
    """One layer in arrays."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(8)(x.reshape(len(x), -1)))
        return cimjax.CIMDense(4, spec=cimjax.CIMSpec(adc=cimjax.ADCSpec(bits=3)))(x)


def images(count: int = 64, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    pixels = (rng.integers(0, 90, (count, 4, 4, 1)) + 50 * labels[:, None, None, None]).astype(np.uint8)
    return Dataset.from_arrays("mine", pixels, labels, pixels[:32], labels[:32])


def trained(folder: Path, *, ends: float = 0, data: Dataset | None = None, **fields: Any) -> Any:
    """A run of 4 steps an epoch, which a callback ends after so many epochs."""
    chosen = config(**{"batch_size": 16, "eval_batch_size": 32, "ideal_share": 0.5, "warmup_epochs": 0.0, **fields})
    return cimjax.train(
        chosen,
        workdir=folder,
        model=Tiny(),
        dataset=data or images(),
        callbacks=[lambda epoch, *_: epoch == ends],
        display=quiet(),
    )


def ideal(folder: Path) -> list[bool]:
    """Of each epoch whether it was evaluated with ideal ADCs."""
    return [record.get("ideal_adcs", False) for record in read_records(folder) if record["split"] == "test"]


@pytest.mark.parametrize("more", [4.0, 6.0])
def test_adcs_that_are_on_stay_on_in_a_longer_run(more: float, tmp_path: Path) -> None:
    starts = []
    for epochs, ends in ((2.0, 0), (more, 3)):
        trained(tmp_path, epochs=epochs, ends=ends)
        starts.append(restore(tmp_path, model=Tiny())[1].first_steps["CIMDense_0/psum_log_step"])
    np.testing.assert_array_equal(*starts)  # not set anew
    trained(tmp_path, epochs=more)
    assert ideal(tmp_path) == [True] + [False] * (int(more) - 1)


def test_adcs_that_should_be_on_in_a_shorter_run_are_set_next(tmp_path: Path) -> None:
    trained(tmp_path, epochs=8.0, ends=3)
    line = r"has trained 3 epochs with ideal ADCs, and 3 `config.epochs` leave none for its own; give more, [^\n]*$"
    with pytest.raises(RunFolderError, match=line):
        trained(tmp_path, epochs=3.0)
    trained(tmp_path, epochs=5.0)
    assert ideal(tmp_path) == [True, True, True, False, False]
    steps = cimjax.load(tmp_path, model=Tiny()).variables["params"]["CIMDense_0"]["psum_log_step"]
    assert np.all(steps != 0)


def test_a_run_that_ends_with_ideal_adcs_says_so_and_nothing_of_its_adcs(tmp_path: Path) -> None:
    result = trained(tmp_path, epochs=8.0, ends=2, validation=0.25)
    assert result.more["ideal_adcs"] and "psum_moved" not in result.moved
    for which, accuracy in (("last", result.accuracy), ("best", result.more["best_accuracy"])):
        found = cimjax.evaluate(tmp_path, which, model=Tiny(), dataset=images())
        assert found["ideal_adcs"] and found["accuracy"] == accuracy
    records = read_records(tmp_path)
    assert not [record for record in records if record["split"] == "health"]
    assert records[-1]["split"] == "result" and records[-1]["ideal_adcs"]


def test_a_run_goes_on_and_is_evaluated_on_its_own_images_alone(tmp_path: Path) -> None:
    trained(tmp_path, epochs=1.0)
    for data, what in ((images(48), "training images: 64, not 48"), (images(64, seed=1), "the mean or deviation")):
        with pytest.raises(RunFolderError, match=rf"was trained on other images of mine \({what}[^\n]*$"):
            trained(tmp_path, epochs=2.0, data=data)
    with pytest.raises(RunFolderError, match=r"was trained on other images of mine \([^\n]* than its config names"):
        cimjax.evaluate(tmp_path, model=Tiny())
    # Other test images are normalised as those it was trained on.
    own = images()
    train, test = own.train, own.test
    other = Dataset.from_arrays("darker", train.images // 2, train.labels, test.images, test.labels)
    found = [cimjax.evaluate(tmp_path, model=Tiny(), dataset=data) for data in (own, other)]
    assert found[0]["loss"] == found[1]["loss"]


def test_images_that_a_data_set_holds_out_itself_choose_the_best_state(tmp_path: Path) -> None:
    result = trained(tmp_path, epochs=2.0, data=images().holding_out(0.25))
    assert "best_accuracy" in result.more
    with pytest.raises(ValueError, match=r"^16 images are held out already"):
        images().holding_out(0.25).holding_out(0.25)


def test_a_run_that_ended_within_an_epoch_goes_on_there(tmp_path: Path) -> None:
    for epochs in (1.5, 1.75, 3.0):
        trained(tmp_path, epochs=epochs, ideal_share=0.0)
    numbers = [(record["step"], record["epoch"]) for record in read_records(tmp_path) if record["split"] == "train"]
    assert numbers == [(4, 1), (6, 1.5), (7, 1.75), (8, 2), (12, 3)]
    with pytest.raises(RunFolderError, match=r"has trained 3 epochs, more than the 2.5 of"):
        trained(tmp_path, epochs=2.5, ideal_share=0.0)


def test_states_are_saved_within_epochs(tmp_path: Path) -> None:
    trained(tmp_path, epochs=2.0, checkpoint_epochs=0.5, checkpoint_keep=9)
    assert sorted(Checkpoints(tmp_path).steps()) == [2, 4, 6, 8]
    trained(tmp_path / "seldom", epochs=4.0, checkpoint_epochs=1.5, checkpoint_keep=9)
    assert sorted(Checkpoints(tmp_path / "seldom").steps()) == [4, 6, 12, 16]


@pytest.mark.parametrize("epochs,steps", [(1.1, 110), (2.2, 220), (1.005, 101), (0.29, 29)])
def test_parts_of_epochs_are_whole_steps(epochs: float, steps: int) -> None:
    assert total_steps(config(epochs=epochs, batch_size=1), 100) == steps


@pytest.mark.parametrize("share,epochs,first", [(0.29, 100, 29), (0.57, 100, 57), (0.5, 3, 1), (0.999, 2, 1)])
def test_a_part_of_the_epochs_is_whole_epochs(share: float, epochs: int, first: int) -> None:
    assert planned_ideal({"ideal_share": share, "epochs": epochs}) == first
