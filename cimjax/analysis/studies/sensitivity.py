"""What a trained network loses where some of its ADCs get other numbers of bits, without training.

The network is that of the run with rules for the layers that differ, and is computed layer by layer, not as one
program: layers of equal shapes and bits are compiled once, however many combinations are measured.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cimjax.nn.calibrate import calibrate_and_report
from cimjax.spec import CIMSpec
from cimjax.training.random_streams import Stream, chip_key, stream_key
from cimjax.training.restore import restore
from cimjax.training.run.files import read_json, write_json
from cimjax.training.run.folder import read_records

# Bits of all ADCs of a layer, or of those behind each plane, lowest first.
Bits = float | tuple[float, ...]
# Training images that are measured, in batches as large as those from which steps are set.
IMAGES = 1024


class Measured(NamedTuple):
    """A network on the measured images: its mean loss, and its accuracy, 0 to 1."""

    loss: float
    accuracy: float


def with_bits(spec: CIMSpec, bits: Bits) -> CIMSpec:
    """A specification whose ADCs have other bits; those of dummy columns keep theirs where planes have their own.

    Raises:
      ValueError: where its ADCs cannot have so many.
    """
    assert spec.adc is not None
    if isinstance(bits, tuple):
        same = set(bits) == {spec.adc.bits}
        return dataclasses.replace(spec, adc=dataclasses.replace(spec.adc, plane_bits=None if same else bits))
    return dataclasses.replace(spec, adc=dataclasses.replace(spec.adc, bits=bits, plane_bits=None))


def described_bits(bits: Bits) -> str:
    """Bits in a few letters: "3", or "3/1.5/2" of planes."""
    return "/".join(f"{one:g}" for one in bits) if isinstance(bits, tuple) else f"{bits:g}"


def rules_for(specs: Mapping[str, CIMSpec]) -> tuple[tuple[str, CIMSpec], ...]:
    """Rules by which layers, given by path, are built so; layers of one specification share a rule."""
    paths: dict[CIMSpec, list[str]] = {}
    for path, spec in specs.items():
        paths.setdefault(spec, []).append(re.escape(path))
    return tuple(("|".join(own), spec) for spec, own in paths.items())


class Measurement:
    """Measures the network of a run on training images, with ADCs of any bits.

    Never on test images, by which nothing may be chosen. The images are drawn by the run's seed, not augmented.
    """

    def __init__(self, run: str | Path) -> None:
        """Read the run's last state, and draw the images.

        Raises:
          RunFolderError: where the folder holds no run, or is damaged.
        """
        self.experiment, self.state, _ = restore(run, images=True)
        train, experiment = self.experiment.dataset.train, self.experiment
        size = min(experiment.config.calibration_images, IMAGES, len(train))
        # Whole batches: another size would compile every layer once more.
        count = min(IMAGES, len(train)) // size * size
        key = stream_key(experiment.config.seed, Stream.SENSITIVITY)
        drawn = np.asarray(jax.random.permutation(key, len(train)))[:count]
        parts = np.split(drawn, count // size)
        self.batches = [(experiment.preparation.normalise(train.images[part]), train.labels[part]) for part in parts]
        self.calibration_images = experiment.calibration_images()

    @property
    def images(self) -> int:
        """How many images are measured."""
        return sum(len(labels) for _, labels in self.batches)

    def __call__(self, bits: Mapping[str, Bits]) -> Measured:
        """Loss and accuracy with other bits for some layers; all else is as it was trained.

        The ADC steps of these layers are set anew from the calibration images, in network order, by the rule of their
        specification. A layer that is given its own bits is not touched.

        Args:
          bits: by path of layers that have ADCs.
        """
        specs = self.experiment.specs
        other = {path: with_bits(specs[path], one) for path, one in bits.items()}
        other = {path: spec for path, spec in other.items() if spec != specs[path]}
        model: Any = self.experiment.setup_on_one_device().model
        model = model.clone(rules=(*rules_for(other), *model.rules)) if other else model
        variables = self._calibrated(model, other) if other else self.state.variables
        loss = correct = 0.0
        for images, labels in self.batches:
            logits = jnp.asarray(model.apply(variables, images, **self._options()), jnp.float32)
            loss += float(jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels)))
            correct += float(jnp.sum(jnp.argmax(logits, -1) == labels))
        return Measured(loss / self.images, correct / self.images)

    def _options(self) -> dict[str, Any]:
        chip = chip_key(self.state.seed)
        return {"rngs": {"variation": chip, "params": chip}, **self.experiment.setup.mode(train=False)}

    def _calibrated(self, model: nn.Module, layers: Collection[str]) -> dict[str, Any]:
        """The variables with ADC steps of some layers set anew."""
        kept = [(path, "psum") for path in self.experiment.specs if path not in layers]
        found, _ = calibrate_and_report(
            model, self.state.variables, self.calibration_images, kinds=("psum",), kept=kept, **self._options()
        )
        return found


class KeptMeasurement:
    """A `Measurement` whose results stay in a file: nothing of a run is measured twice, nor the run read in vain.

    What was measured of the run when it had been trained for fewer epochs is measured anew.
    """

    def __init__(self, run: Path, file: Path, say: Callable[[str], None]) -> None:
        """Read what the file holds.

        Args:
          run: the folder of a run that has ended.
          file: a JSON file that is written after each network: `step` of the run, `networks` by what differs,
            "conv1=2,conv2=1".
          say: is told what is being measured.

        Raises:
          RunFolderError: where the file is damaged.
        """
        self.run, self.file, self.say = run, file, say
        self.step = max(record.get("step", 0) for record in read_records(run))
        kept = read_json(file, dict) if file.exists() else {}
        self.networks: dict[str, Any] = kept.get("networks", {}) if kept.get("step") == self.step else {}

    @functools.cached_property
    def _measure(self) -> Measurement:
        return Measurement(self.run)

    def __call__(self, bits: Mapping[str, Bits]) -> Measured:
        """As `Measurement`; `bits` holds only layers whose bits differ from the run's."""
        name = ",".join(f"{path}={described_bits(one)}" for path, one in bits.items()) or "as trained"
        if name not in self.networks:
            self.say(f"measuring {self.run}: {name}")
            self.networks[name] = self._measure(bits)._asdict()
            write_json(self.file, {"step": self.step, "networks": self.networks})
        return Measured(**self.networks[name])
