"""From a configuration to the parts of a run: data, network, optimizer, devices, and the state it begins with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict

from cimjax.core.calibration.report import CalibrationReport
from cimjax.core.calibration.steps import KINDS
from cimjax.core.programs.cpu import compiler_options
from cimjax.data import Dataset, StreamedDataset, load
from cimjax.data.dataset import Description
from cimjax.data.decoding import View
from cimjax.hardware.survey import Layer, layers_of
from cimjax.nn.calibrate import calibrate_and_report, without_calibration
from cimjax.nn.layers import ADC_STATISTICS
from cimjax.nn.models import build_model
from cimjax.nn.parameters import stored_steps, trained_as
from cimjax.nn.rules import conv_maker
from cimjax.nn.transfer import Given, put_in
from cimjax.nn.weight_codes import has_codes
from cimjax.spec import CIMSpec, Execution
from cimjax.spec.rules import check_rules
from cimjax.training.batches import Preparation
from cimjax.training.config.fields import check_config
from cimjax.training.optimizer import learning_rate, make_optimizer, steps_per_epoch, total_steps
from cimjax.training.oscillation import freeze_oscillating
from cimjax.training.parallel import Devices
from cimjax.training.random_streams import Stream, stream_key
from cimjax.training.state import TrainState
from cimjax.training.train_step import LossFunction, Setup, cross_entropy, step_rngs

# Images with which the layers of a network are looked up: a prime, which no other axis is likely to be a multiple of.
_SURVEYED = 7

# What the data was like from which the steps of each layer were set, by path.
Reports = dict[str, CalibrationReport]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run.

    layers: the network's layers in order.
    setup: what a training step needs, the network and its optimizer among it.
    schedule: of the learning rate; None of an optimizer of the caller's own.
    was_ideal: epochs with ideal ADCs of a run that goes on with another number of epochs; None: as its config plans.
    """

    config: ConfigDict
    dataset: Any
    layers: list[Layer]
    devices: Devices
    setup: Setup
    preparation: Preparation
    schedule: optax.Schedule | None
    was_ideal: int | None = None

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.setup.model

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """What makes updates of gradients."""
        return self.setup.optimizer

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training images."""
        return steps_per_epoch(self.config, len(self.dataset.train))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return total_steps(self.config, len(self.dataset.train))

    @property
    def specs(self) -> dict[str, CIMSpec]:
        """What each array layer is built as, by path."""
        return {layer.name: layer.spec for layer in self.layers if layer.spec is not None}

    @property
    def spec(self) -> CIMSpec | dict[str, CIMSpec] | None:
        """The specification of all array layers; by path where they differ; None where there are none."""
        specs = self.specs
        return specs if len(set(specs.values())) > 1 else next(iter(specs.values()), None)

    @property
    def codes(self) -> dict[str, int]:
        """How many codes the ADCs of each array layer have."""
        return {name: spec.adc_codes for name, spec in self.specs.items() if spec.adc is not None}

    @property
    def ideal_epochs(self) -> int:
        """Epochs at the start in which ADCs are ideal."""
        if not self.codes:
            return 0
        return planned_ideal(self.config) if self.was_ideal is None else self.was_ideal

    def going_on(self, step: int, saved: Mapping[str, Any]) -> Experiment:
        """The experiment in which a state of `step` was saved, with these things beside it, and which goes on from
        there, whatever its `epochs` are now: ADCs that were on stay on since when they were, and those that are to be
        on by now are set after this epoch."""
        before = saved.get("ideal_epochs")
        if not isinstance(before, int) or not step:
            return self
        on, done = step > before * self.steps_per_epoch, -(-step // self.steps_per_epoch)
        return dataclasses.replace(self, was_ideal=before if on else max(self.ideal_epochs, done))

    def sets_adcs_before(self, epoch: int) -> bool:
        """Whether ADC steps are set anew before an epoch, counted from 0."""
        return bool(self.codes) and epoch > 0 and epoch in (self.ideal_epochs, *self.config.recalibrate_epochs)

    @property
    def last_setting_of_adcs(self) -> int:
        """Epochs before ADC steps are set for the last time; 0 before training."""
        planned = filter(self.sets_adcs_before, (self.ideal_epochs, *self.config.recalibrate_epochs))
        return max((epoch for epoch in planned if epoch < self.config.epochs), default=0)

    def setup_in(self, epoch: int) -> Setup:
        """What is fixed in an epoch, counted from 0."""
        return dataclasses.replace(self.setup, ideal_adcs=epoch < self.ideal_epochs)

    def setup_on_one_device(self) -> Setup:
        """What is fixed, without the axis over which several devices spread a batch."""
        return dataclasses.replace(self.setup, model=self._model_on_one_device(), axis_name=None)

    def calibration_images(self) -> Array:
        """The images on which steps are calibrated: always the same ones of a seed, not augmented, (n, H, W, C)."""
        key = stream_key(self.config.seed, Stream.CALIBRATION)
        chosen = np.asarray(jax.random.permutation(key, len(self.dataset.train)))[: self.config.calibration_images]
        return self.preparation.normalise(jnp.asarray(self.dataset.train.images[chosen]))

    def first_state(self, given: Given | None = None) -> tuple[TrainState, Reports]:
        """The state before the first step, with steps calibrated on `calibration_images`; and what these were like, by
        layer. Where ADCs are ideal at first, their steps are set by `recalibrated` when they are turned on.

        Args:
          given: what takes the place of random weights; None for random ones.
        """
        given = given or Given({}, {})
        return jax.jit(self._first_state, compiler_options=compiler_options())(
            jnp.int32(self.config.seed), self.calibration_images(), given
        )

    def recalibrated(self, state: TrainState, images: Array) -> tuple[TrainState, Reports]:
        """The state with ADC steps and offsets set anew from `calibration_images`, and their optimizer state reset; and
        what the data was like, by layer."""
        setup = self.setup_on_one_device()
        options = {**setup.mode(train=True), "rngs": step_rngs(setup, state)}
        variables, reports = calibrate_and_report(setup.model, state.variables, images, kinds=("psum",), **options)
        params = variables["params"]

        def renewed(old: Any, new: Any) -> Any:
            return jax.tree_util.tree_map_with_path(lambda path, o, n: n if trained_as(path) == "psum" else o, old, new)

        state = state.replace(
            params=params,
            opt_state=renewed(state.opt_state, self.optimizer.init(params)),
            average=None if state.average is None else renewed(state.average, jax.tree.map(jnp.copy, params)),
            # Copies, as in the first state.
            first_steps=jax.tree.map(jnp.copy, renewed(state.first_steps, stored_steps(params))),
        )
        return state, reports

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state, to restore a checkpoint into."""
        return jax.eval_shape(self.uncalibrated_state)

    def uncalibrated_state(self) -> TrainState:
        """A state with all steps at 1: quick, where values do not matter."""
        images = jnp.zeros((2, *self.dataset.image_shape))
        return jax.jit(self._uncalibrated)(jnp.int32(self.config.seed), images)

    def _uncalibrated(self, seed: Array, images: Array) -> TrainState:
        with without_calibration():
            variables = self._model_on_one_device().init(self._rngs(seed), images, **self.setup.mode(train=True))
        return self._state(seed, variables)

    def _first_state(self, seed: Array, images: Array, given: Given) -> tuple[TrainState, Reports]:
        model, mode, rngs = self._model_on_one_device(), self.setup.mode(train=True), self._rngs(seed)
        with without_calibration():
            variables = put_in(model.init(rngs, images, **mode), {**given.values, **given.steps})
        # ADCs that come later are set when they do, and what is set before must not depend on them.
        first = self.setup_in(0)
        kinds = [kind for kind in KINDS if kind != "psum" or not first.ideal_adcs]
        what: dict[str, Any] = {"kinds": kinds, "kept": given.kept, "rngs": rngs}
        with first.adcs():
            variables, reports = calibrate_and_report(model, variables, images, **what, **mode)
        return self._state(seed, variables), reports

    def _rngs(self, seed: Array) -> dict[str, Array]:
        streams = {"params": Stream.WEIGHTS, "variation": Stream.CHIP, "dropout": Stream.FIRST_DROPOUT}
        return {name: stream_key(seed, stream) for name, stream in streams.items()}

    def _state(self, seed: Array, variables: Any) -> TrainState:
        params = variables["params"]
        return TrainState(
            seed=seed,
            step=jnp.int32(0),
            failed_at=jnp.int32(-1),
            params=params,
            collections=_carried(variables),
            opt_state=self.optimizer.init(params),
            # Copies: the state is donated to every step, and no buffer may be donated twice.
            average=jax.tree.map(jnp.copy, params) if self.setup.ema else None,
            first_steps=jax.tree.map(jnp.copy, stored_steps(params)),
        )

    def _model_on_one_device(self) -> nn.Module:
        # Initialisation and calibration run outside the mapped axis.
        return self.model.clone(axis_name=None) if hasattr(self.model, "axis_name") else self.model


def _carried(variables: Any) -> dict[str, Any]:
    """The collections that go from step to step: not what layers leave for whoever looks."""
    return {name: value for name, value in variables.items() if name not in ("params", "intermediates", ADC_STATISTICS)}


def planned_ideal(config: Mapping[str, Any]) -> int:
    """Epochs at the start that a config plans with ideal ADCs, where it has others."""
    return int(round(config["ideal_share"] * config["epochs"], 6))  # 0.29 times 100 is a little less than 29


def build(
    config: ConfigDict,
    *,
    model: nn.Module | None = None,
    dataset: Dataset | StreamedDataset | Description | None = None,
    loss_fn: LossFunction | None = None,
    optimizer: optax.GradientTransformation | None = None,
    to_train: bool = True,
) -> Experiment:
    """The parts of the run that a configuration describes.

    Args:
      config: as the files in `configs/` give it.
      model: a network of the caller's own, `model(images, train=...)` giving logits; else `config.model`.
      dataset: images of the caller's own, or, of a run that is not trained, what is known of them; else
        `config.dataset`.
      loss_fn, optimizer: the caller's own; else cross entropy, and `config.optimizer`.
      to_train: whether devices must be able to share the batches of training.

    Raises:
      ValueError: for anything in the configuration that cannot be built.
    """
    check_config(config)
    if not isinstance(dataset, Description):
        found = dataset or load(config.dataset, config.data_dir or None, view=view_of(config))
        dataset = found.part(**config.subset).holding_out(config.validation, config.seed)
    devices = Devices(config.parallel)
    if to_train:
        _require_shares(config, devices)
    # Not `or`: a network of the caller's own may have a length.
    model = _network(config, dataset.classes) if model is None else model
    if devices.axis_name and hasattr(model, "axis_name"):
        model = model.clone(axis_name=devices.axis_name)
    layers = layers_of(model, jax.ShapeDtypeStruct((_SURVEYED, *dataset.image_shape), jnp.float32))
    _require_variation(config, layers)
    schedule = None if optimizer else learning_rate(config, len(dataset.train))
    optimizer = optimizer or make_optimizer(config, len(dataset.train))
    if config.optimizer.freeze_oscillating:
        optimizer = _freezing(optimizer, config, layers, len(dataset.train))
    setup = Setup(
        model=model,
        optimizer=optimizer,
        loss_fn=loss_fn or cross_entropy,
        accumulate=config.optimizer.accumulate,
        ema=config.ema,
        fresh_chips=config.variation_draw == "step",
        axis_name=devices.axis_name,
    )
    return Experiment(
        config=config,
        dataset=dataset,
        layers=layers,
        devices=devices,
        setup=setup,
        preparation=Preparation(config, dataset.mean, dataset.std, dataset.classes),
        schedule=schedule,
    )


def _require_shares(config: ConfigDict, devices: Devices) -> None:
    """Refuse batches that devices, mixup or accumulation cannot share evenly."""
    devices.check_batch(config.batch_size)
    share, parts = config.batch_size // devices.count, config.optimizer.accumulate
    if config.mixup and devices.count > 1 and share % 2:
        raise ValueError(
            f"`config.mixup` mixes neighbours, and {devices.count} devices have {share} images of a batch each; "
            f"give a `config.batch_size` that {2 * devices.count} divides."
        )
    if share % parts:
        raise ValueError(
            f"`config.optimizer.accumulate` is {parts}, which does not divide the {share} images of a device; give one "
            "of their divisors."
        )


def _network(config: ConfigDict, classes: int) -> nn.Module:
    """The network that a configuration names."""
    spec = None if config.spec is None else CIMSpec.from_dict(config.spec.to_dict())
    conv = conv_maker(spec, Execution.from_dict(config.execution.to_dict()))
    options = config.model.to_dict()
    return build_model(options.pop("name"), classes=classes, conv=conv, rules=check_rules(config.rules), **options)


def _require_variation(config: ConfigDict, layers: Sequence[Layer]) -> None:
    """Refuse fields of chips that vary where none does."""
    if any(layer.spec is not None and layer.spec.variation for layer in layers):
        return
    for field in ("fresh_chips", "variation_draw"):
        if config[field] not in (0, "chip"):
            raise ValueError(
                f"`config.{field}` is {config[field]}, but no layer has `variation`: all chips are alike; give "
                "--config.spec.variation.sigma=0.1, or leave the field out."
            )


def _freezing(
    optimizer: optax.GradientTransformation, config: ConfigDict, layers: Sequence[Layer], images: int
) -> optax.GradientTransformation:
    """The optimizer, with `config.optimizer.freeze_oscillating`."""
    threshold, specs = config.optimizer.freeze_oscillating, {x.name: x.spec for x in layers if x.spec is not None}
    if any(layer.copies > 1 for layer in layers if layer.spec is not None):
        raise ValueError(
            f"`config.optimizer.freeze_oscillating` is {threshold}, but the network stacks the weights of "
            "several layers (`nn.scan`, `nn.vmap`); give 0."
        )
    if not all(map(has_codes, specs.values())):
        raise ValueError(
            f"`config.optimizer.freeze_oscillating` is {threshold}, but with a step for each plane a weight has no one "
            "code; give 0, or one step."
        )
    return freeze_oscillating(optimizer, specs, threshold, total_steps(config, images))


def view_of(config: ConfigDict) -> View:
    """What of each image of a stream a network is given."""
    return View(size=config.image_size, smallest_crop=config.augment.smallest_crop)
