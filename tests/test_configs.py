"""Every configuration file with every granularity pair: it can be built, has the right shapes, and trains."""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cimjax
from cimjax.data import Dataset
from cimjax.training.batches import Resident
from cimjax.training.config.file import load_config
from cimjax.training.experiment import build
from cimjax.training.show.display import Display
from cimjax.training.train_step import train_step

CONFIGS = Path(__file__).parents[1] / "configs"
# The image and the classes that each file is for, and how many parameters its network has without steps.
FILES = {
    "digits": ((8, 8, 1), 10, 16_794),
    "resnet20_c10": ((32, 32, 3), 10, 269_722),
    "resnet20_c100": ((32, 32, 3), 100, 275_572),
    "resnet18_imagenet": ((224, 224, 3), 1000, 11_689_512),
}
GRANULARITIES = ("layer", "array", "column")
PAIRS = [f"weight={weight},psum={psum}" for weight, psum in itertools.product(GRANULARITIES, GRANULARITIES)]
OTHERS = ["", "weight=none", *(f"weight={weight},psum=none" for weight in GRANULARITIES), "encoding=differential"]
# Every pair on the smallest network, one or another kind of options on the others.
QUICK = {
    "digits": [*PAIRS, *OTHERS],
    "resnet20_c10": ["weight=array,psum=layer"],
    "resnet20_c100": ["encoding=differential"],
    "resnet18_imagenet": ["weight=none"],
}
BUILT = [
    pytest.param(name, options, marks=() if options in QUICK[name] else pytest.mark.full)
    for name, options in itertools.product(FILES, [*PAIRS, *OTHERS])
    # Its layers are those of the others, and take longest to trace.
    if name != "resnet18_imagenet" or options not in PAIRS[1::2]
]


def random_images(name: str, count: int, size: int | None = None) -> Dataset:
    shape, classes, _ = FILES[name]
    shape = shape if size is None else (size, size, shape[-1])
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *shape), np.uint8)
    labels = rng.integers(0, classes, count)
    return Dataset.from_arrays(name, images, labels, images[:4], labels[:4], classes=classes)


def loaded(name: str, options: str, **fields: Any) -> Any:
    config = load_config(f"{CONFIGS / name}.py:{options}".rstrip(":"), [])
    with config.unlocked():
        for field, value in fields.items():
            config[field] = value
    return config


def test_every_file_is_in_the_table() -> None:
    assert {path.stem for path in CONFIGS.glob("*.py")} == set(FILES)


@pytest.mark.parametrize("name,options", BUILT)
def test_every_pairing_can_be_built(name: str, options: str) -> None:
    """Shapes of parameters, of every layer and of a training step, without computing anything."""
    shape, classes, parameters = FILES[name]
    config = loaded(name, options, batch_size=2, eval_batch_size=2)
    if config.spec is not None:
        with config.unlocked():
            # One convolution for each layer is traced quickest, and is what GPUs and TPUs run.
            config.execution.product = "grouped_conv"
    experiment = build(config, dataset=random_images(name, 4))
    state = experiment.abstract_state()
    kinds = {"steps": 0, "others": 0}
    for path, value in jax.tree_util.tree_leaves_with_path(state.params):
        is_step = path[-1].key.endswith(("log_step", "psum_offset"))
        kinds["steps" if is_step else "others"] += int(np.prod(value.shape))
    assert kinds["others"] == parameters
    assert (kinds["steps"] == 0) == ("weight=none" in options)
    spec = None if config.spec is None else cimjax.CIMSpec.from_dict(config.spec.to_dict())
    through_arrays = [layer for layer in experiment.layers if layer.spec is not None]
    assert {layer.spec for layer in through_arrays} == (set() if spec is None else {spec})
    for layer in through_arrays:
        cost = cimjax.layer_cost(layer.kernel, layer.output, layer.spec)
        assert cost.arrays >= 1
    if name == "digits" or options in ("", "weight=layer,psum=column"):
        pixels, labels = jax.ShapeDtypeStruct((4, *shape), jnp.uint8), jax.ShapeDtypeStruct((4,), jnp.int32)
        batch = jax.eval_shape(experiment.preparation.plain, pixels, labels)
        after, metrics = jax.eval_shape(functools.partial(train_step, experiment.setup), state, batch)
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), after, state)
        assert all(jax.tree.leaves(same)) and metrics["loss"].shape == ()
    logits = jax.eval_shape(
        experiment.model.apply,
        state.variables,
        jax.ShapeDtypeStruct((3, *shape), jnp.float32),
    )
    assert (logits.shape, logits.dtype) == ((3, classes), jnp.float32)


@pytest.mark.parametrize(
    "name,options,size",
    [
        pytest.param("resnet20_c10", "weight=array,psum=layer", 16, marks=pytest.mark.full),
        pytest.param("resnet20_c100", "smoke", 32, marks=pytest.mark.full),
        pytest.param("resnet18_imagenet", "smoke,weight=layer", 64, marks=pytest.mark.full),
    ],
)
def test_one_pairing_of_each_data_set_takes_real_steps(name: str, options: str, size: int) -> None:
    """Loss on the same few images falls, and every kind of parameter moves."""
    config = loaded(name, options, batch_size=8, eval_batch_size=4, warmup_epochs=0.0, epochs=8.0, ideal_share=0.0)
    with config.unlocked():
        config.subset = {"classes": 0, "images": 0}
        # Every stage, but one block of each: the others would compile to the same programs once more.
        config.model.blocks = (1,) * (4 if name == "resnet18_imagenet" else 3)
        if name == "resnet20_c10":
            config.model.width = 0.5
        # Eight images without warm-up.
        config.optimizer.learning_rate = 0.02
        if name == "resnet18_imagenet":
            # Many row tiles, and one program for each would take long to compile.
            config.execution.product = "grouped_conv"
            config.model.width = 0.0625
            config.calibration_images = 2
    experiment = build(config, dataset=random_images(name, 8, size))
    first = state = experiment.first_state()[0]
    batches = Resident(experiment.dataset.train, experiment.preparation, 0, jax.device_put)
    step = jax.jit(lambda state, feed: train_step(experiment.setup, state, batches.batch(feed, state, 0, None)))
    losses = []
    for _ in range(6):
        state, metrics = step(state, batches.feed(0, 1))
        losses.append(float(metrics["loss"]))
    assert int(state.failed_at) == -1
    assert min(losses[3:]) < losses[0]
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), first.params, state.params)
    still = [path for path, value in jax.tree_util.tree_leaves_with_path(moved) if not value]
    assert not still


@pytest.mark.skipif("CIMJAX_CIFAR100" not in os.environ, reason="set CIMJAX_CIFAR100 to a folder with CIFAR-100")
def test_the_look_at_real_images_learns(tmp_path: Path) -> None:
    config = loaded("resnet20_c100", "smoke", data_dir=os.environ["CIMJAX_CIFAR100"], epochs=2.0)
    with open(os.devnull, "w") as nowhere:
        result = cimjax.train(config, workdir=tmp_path, display=Display(stream=nowhere))
    assert result.accuracy > 0.2


def test_imagenet_may_start_from_full_precision_at_the_published_rate() -> None:
    decays = {bits: loaded("resnet18_imagenet", f"start=run,weight_bits={bits}").optimizer for bits in (2, 3, 4)}
    assert {bits: optimizer.weight_decay for bits, optimizer in decays.items()} == {2: 0.25e-4, 3: 0.5e-4, 4: 1e-4}
    config = loaded("resnet18_imagenet", "start=run")
    assert (config.start, config.warmup_epochs, config.optimizer.learning_rate, config.epochs) == ("run", 0, 0.01, 90)
    assert loaded("resnet18_imagenet", "").start == "random"


def test_imagenet_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"imagenet2012 is not prepared: .*cimjax data prepare imagenet2012"):
        build(loaded("resnet18_imagenet", "", data_dir=str(tmp_path)))
