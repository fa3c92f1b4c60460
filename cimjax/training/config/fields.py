"""Every field of a config, described once: its name, its default, what it may be and what it means.

The defaults, the checks and what `cimjax.training.config.describe` prints come from this table. What only the data, the
network or the devices can tell (a batch larger than the data) is refused where these are built. jax is not imported
here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from cimjax.spec import ActivationSpec, ADCSpec, ArraySpec, CIMSpec, VariationSpec, WeightSpec
from cimjax.spec.base import LARGEST_COUNT, closest, is_number, shortened, shown
from cimjax.spec.execution import Operands, Product, Program, Residuals
from cimjax.spec.rules import check_rules
from cimjax.training.config.refusals import in_other_names

# The largest real number that a field takes: float32 holds it, and its product with a million.
_LARGE = 1e30
_SPEC_GROUPS: dict[str, Any] = {"array": ArraySpec, "adc": ADCSpec, "weight": WeightSpec, "activation": ActivationSpec}
_SPEC_GROUPS["variation"] = VariationSpec


class Kind(NamedTuple):
    """What a field may be."""

    # The end of a refusal, which says what to give; and a word for `--help`, where it needs one.
    words: str
    short: str
    accepts: Callable[[Any], bool]
    # An accepted value as a config holds it; may refuse it as well, in words of its own.
    stored: Callable[[Any], Any] = lambda value: value


class Field(NamedTuple):
    """One field of a config; `name` is dotted, and `default` None means that the field need not be there."""

    name: str
    default: Any
    kind: Kind
    meaning: str

    def read(self, value: Any) -> Any:
        """A value of this field, as a config holds it.

        Raises:
          ValueError: in one line: the field, the value, and what is allowed.
        """
        if not self.kind.accepts(value):
            raise ValueError(f"`config.{self.name}` is {shown(value)}; {self.kind.words}.")
        return self.kind.stored(value)


def _whole(low: int = 0, high: int = LARGEST_COUNT) -> Kind:
    def accepts(value: Any) -> bool:
        return type(value) is int and low <= value <= high

    short = f"{low} to {high}" if high < LARGEST_COUNT else f"at least {low}" if low > 0 else ""
    return Kind(f"give a whole number from {low} to {high}", short, accepts)


def _number(low: float, high: float, *, without: float | None = None) -> Kind:
    """Real numbers between two bounds, of which one may be left out itself."""
    first = f"above {low} up" if without == low else f"from {low}"
    last = f"to below {high}" if without == high else f"to {high}"

    def accepts(value: Any) -> bool:
        return is_number(value) and low <= value <= high and value != without

    short = f"{first} {last}".removeprefix("from ") if high < _LARGE else f"above {low}" if without == low else ""
    return Kind(f"give a number {first} {last}", short, accepts, float)


def _one_of(*names: str) -> Kind:
    allowed = ", ".join(names)
    return Kind(f"allowed: {allowed}", allowed, lambda value: isinstance(value, str) and value in names, str)


def _several(kind: Kind, words: str, least: int = 0) -> Kind:
    def accepts(value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) >= least and all(map(kind.accepts, value))

    return Kind(f"give a tuple of {words}", kind.short, accepts, lambda value: tuple(map(kind.stored, value)))


def _is_plain(value: Any, depth: int = 3) -> bool:
    """Whether a network may have it as an option: what JSON holds, in tuples at most."""
    if isinstance(value, list | tuple):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    return value is None or TEXT.accepts(value) or (isinstance(value, int | float) and abs(value) <= 1e300)


def _in_tuples(value: Any) -> Any:
    return tuple(map(_in_tuples, value)) if isinstance(value, list | tuple) else value


def _checked_spec(value: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The whole specification of a part of it; what it refuses is named as fields of a config are."""
    if value is None:
        return None
    names = {field: f"config.spec.{field}" for field in CIMSpec.__dataclass_fields__}
    for group, kind in _SPEC_GROUPS.items():
        own = {field: f"config.spec.{group}.{field}" for field in kind.__dataclass_fields__}
        if isinstance(value.get(group), Mapping):
            with in_other_names(own):
                kind.from_dict(value[group])
        names = own | names
    with in_other_names(names):
        return CIMSpec.from_dict(value).to_dict()


def _checked_rules(value: Sequence[Any]) -> tuple[Any, ...]:
    if not value:
        return ()
    try:
        return tuple((pattern, spec and spec.to_dict()) for pattern, spec in check_rules(value))
    except ValueError as error:
        raise ValueError(f"`config.rules`: {error}") from error


TEXT = Kind("give a text of one line", "", lambda value: isinstance(value, str) and value.isprintable())
FLAG = Kind("give True or False", "", lambda value: isinstance(value, bool))
# Of some networks a factor, of others a number of channels, which stays one.
_WIDTH = _number(0, 4096, without=0)._replace(stored=lambda value: value)
_PLAIN = Kind("give a number, a text, True, False, None or a tuple of these", "", _is_plain, _in_tuples)
_SPEC = Kind(
    "give a group of fields or None", "", lambda value: value is None or isinstance(value, Mapping), _checked_spec
)
_RULES = Kind(
    "give a tuple of pairs (pattern of paths, specification or None), as in (('conv1', None),)",
    "",
    lambda value: isinstance(value, list | tuple),
    _checked_rules,
)


_PART = _number(0, 1, without=1)
_OPTIONS = "optimizer.schedule_options"
_BOUNDS = _several(_PART, "numbers from 0 to below 1")
_ROW = "whole numbers, one for each stage"
# Those of `training.optimizer`, which imports jax; a test compares them.
SCHEDULES = (
    *("cosine", "constant", "linear", "polynomial", "exponential", "piecewise_constant"),
    *("cosine_onecycle", "linear_onecycle", "sgdr"),
)

# What may stay as it was at the start: kernels, biases and scales; steps of activations, weights, partial sums.
FROZEN = ("network", "activation", "weight", "psum")

# By what they are about.
SECTIONS: dict[str, tuple[Field, ...]] = {
    "data": (
        Field("dataset", "", TEXT, "a name of `cimjax data list`, folder:PATH of class folders, or npz:PATH of arrays"),
        Field("data_dir", "", TEXT, "folder of data sets; empty: tensorflow-datasets' own"),
        Field("subset.classes", 0, _whole(), "only the first so many classes; 0: all"),
        Field("subset.images", 0, _whole(), "only so many training images of these; 0: all"),
        Field("images_on", "device", _one_of("device", "host"), "where images of arrays lie; a host sends each batch"),
        Field("validation", 0.0, _PART, "part of the training images held out to choose the best state; 0: the last"),
        Field("image_size", 224, _whole(1, 4096), "height and width of images that are read from files"),
        Field("workers", -1, _whole(-1, 1024), "processes that decode files; 0: threads; -1: as many as cores allow"),
        Field("augment.smallest_crop", 0.08, _number(0, 1, without=0), "of images from files: least area of a crop"),
        Field("augment.shift", 0, _whole(0, 1000), "random shifts by up to so many pixels"),
        Field("augment.flip", False, FLAG, "random mirror images"),
        Field("mixup", 0.0, _number(0, _LARGE), "alpha of the mixture of two images; 0: none"),
        Field("label_smoothing", 0.0, _PART, "part of a label that is spread over all classes"),
        Field("calibration_images", 256, _whole(1), "training images from which steps are set"),
    ),
    "network": (
        Field("model.name", "", TEXT, "a network by name, whose own options stand beside it"),
        Field("model.width", None, _WIDTH, "factor of all channels; of `small`, channels"),
        Field("model.blocks", None, _several(_whole(1, 1000), _ROW, 1), "blocks of each stage"),
        Field("model.widths", None, _several(_whole(1, 65536), _ROW, 1), "channels of each stage, before the factor"),
        Field("model.stem_stride", None, _whole(1, 16), "stride of the first convolution"),
        Field("model.small_images", None, FLAG, "the first convolution is 3 x 3, not 7 x 7"),
        Field("model.bottleneck", None, FLAG, "blocks of 1 x 1, 3 x 3 and 1 x 1 convolutions"),
        Field("model.preactivation", None, FLAG, "normalisation and ReLU before convolutions"),
        Field("model.shortcut", None, _one_of("pad", "projection"), "how a shortcut changes shape"),
        Field("model.residual", None, _one_of("wide", "codes"), "what a shortcut carries"),
        Field("model.norm_momentum", None, _number(0, 1), "momentum of running batch statistics"),
    ),
    "arrays": (
        Field("spec", None, _SPEC, "what array layers are built as (`CIMSpec`); None: full precision"),
        Field("rules", (), _RULES, "(pattern of paths, spec or None) of layers that differ"),
        Field("ideal_share", 0.0, _PART, "part of the epochs, at the start, without ADCs"),
        Field(
            "recalibrate_epochs",
            (),
            _several(_whole(1), "whole numbers from 1"),
            "epochs after which ADCs are set anew",
        ),
        Field("variation_draw", "chip", _one_of("chip", "step"), "one chip for the run, or a new one in each step"),
        Field("fresh_chips", 0, _whole(0, 1_000_000), "new chips that are tested at the end, where cells vary"),
        Field("execution.program", "auto", _one_of(*Program), "how layers are computed; changes no result"),
        Field("execution.product", "auto", _one_of(*Product), "how inputs and digits are multiplied"),
        Field("execution.operands", "auto", _one_of(*Operands), "in which numbers they are multiplied"),
        Field("execution.residuals", "auto", _one_of(*Residuals), "what is kept for the backward pass"),
    ),
    "training": (
        Field("seed", 0, _whole(-LARGEST_COUNT), "seed of everything random"),
        Field("batch_size", 64, _whole(1), "images of a batch, over all devices"),
        Field("start", "random", _one_of("random", "run"), "random weights, or a run's, which must then be given"),
        Field("frozen", (), _several(_one_of(*FROZEN), ", ".join(FROZEN)), "what is not trained"),
        Field("epochs", 1.0, _number(0, LARGEST_COUNT), "passes over the training images; 0: calibrated only"),
        Field("warmup_epochs", 1.0, _number(0, LARGEST_COUNT), "epochs in which the rate rises from 0"),
        Field("optimizer.name", "sgd", _one_of("sgd", "adamw"), "the optimizer"),
        Field("optimizer.learning_rate", 0.1, _number(0, _LARGE), "the highest learning rate"),
        Field("optimizer.momentum", 0.9, _PART, "momentum of sgd"),
        Field("optimizer.nesterov", True, FLAG, "whether it is Nesterov's"),
        Field("optimizer.weight_decay", 5e-4, _number(0, _LARGE), "weight decay, of kernels only"),
        Field("optimizer.step_factor", 1.0, _number(0, _LARGE), "factor of the rate of quantization steps and offsets"),
        Field("optimizer.clip_norm", 0.0, _number(0, _LARGE), "longest gradient, over all parameters; 0: any"),
        Field(
            "optimizer.freeze_oscillating",
            0.0,
            _PART,
            "part of steps in which a weight's code turns back before it is frozen, as 0.01; 0: none is",
        ),
        Field("optimizer.accumulate", 1, _whole(1), "parts of a batch, computed one after the other"),
        Field("optimizer.schedule", "cosine", _one_of(*SCHEDULES), "the learning rate after the warm-up"),
        Field(f"{_OPTIONS}.alpha", 0.0, _number(0, 1), "last rate / highest, of cosine, linear, polynomial and sgdr"),
        Field(f"{_OPTIONS}.power", 1.0, _number(0, 100, without=0), "power of polynomial"),
        Field(f"{_OPTIONS}.decay_rate", 0.1, _number(0, 1, without=0), "factor of exponential, or at each boundary"),
        Field(f"{_OPTIONS}.boundaries", (0.5, 0.75), _BOUNDS, "of piecewise_constant, as parts of the run"),
        Field(f"{_OPTIONS}.cycles", 1, _whole(1, 1000), "equally long cycles of sgdr"),
        Field(
            "batch_norm_images",
            0,
            _whole(),
            "augmented training images whose statistics batch normalisation has after the last epoch; 0: running ones",
        ),
        Field("ema", 0.0, _PART, "decay of the average of weights, less at first; 0: none"),
        Field("teacher", "", TEXT, "a trained run whose probabilities are learned as well; empty: none"),
        Field("teacher_weight", 0.9, _number(0, 1), "part of the loss that is the teacher's"),
        Field("teacher_temperature", 4.0, _number(0, 100, without=0), "by which both networks' logits are divided"),
    ),
    "evaluation and files": (
        Field("eval_batch_size", 500, _whole(1), "images of a batch in evaluation"),
        Field("steps_per_dispatch", 0, _whole(), "optimizer steps in one program; 0: chosen"),
        Field("parallel", "shard_map", _one_of("shard_map", "pmap"), "how a batch is spread over devices"),
        Field("writers", (), _several(_one_of("csv", "tensorboard"), "csv, tensorboard"), "where records go as well"),
        Field("checkpoint_epochs", 1.0, _number(0, LARGEST_COUNT, without=0), "epochs between checkpoints"),
        Field("checkpoint_keep", 2, _whole(1), "last checkpoints that are kept, besides the best one"),
    ),
}
FIELDS = {field.name: field for section in SECTIONS.values() for field in section}
_USUAL = {name: field.default for name, field in FIELDS.items() if field.default is not None}
GROUPS = {name.rpartition(".")[0] for name in FIELDS} - {""}
# What a config without them cannot mean.
_NEEDED = ("dataset", "model.name", "spec")
# What the network is given by others.
_NOT_OPTIONS = {"classes", "conv", "rules", "axis_name", "parent"}


def field_of(name: str) -> Field:
    """The description of a dotted name, which may be an option of a network that is not described.

    Raises:
      ValueError: where there is no such field, or it is a group.
    """
    group, _, last = name.rpartition(".")
    if name in FIELDS:
        return FIELDS[name]
    if name in GROUPS:
        raise ValueError(f"`config.{name}` is a group of fields ({', '.join(_members(name))}); set one of them.")
    if group == "model" and last.isidentifier() and last not in _NOT_OPTIONS and not last.startswith("_"):
        return Field(name, None, _PLAIN, "an option of the network")
    known = next((one for one in FIELDS if one.rpartition(".")[2] == last), None) or closest(name, FIELDS)
    hint = f"did you mean config.{known}?" if known else f"known: {', '.join(_members(group) or _members(''))}"
    raise ValueError(f"unknown field config.{' '.join(shortened(name).split())} ({hint}).")


def completed(plain: Mapping[str, Any]) -> ConfigDict:
    """The config of a plain dictionary, as an older `config.json` has it: fields that it lacks take their defaults.

    Lists become tuples, and whole numbers floats where a field is one.

    Raises:
      ValueError: in one line, for what is no config: an unknown field, a value that is refused, or no data set, network
        or specification at all.
    """
    given = checked_fields(plain, _NEEDED)
    return ConfigDict(_nested({**_USUAL, **given}))


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as groups."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        holder = nested
        for group in groups:
            holder = holder.setdefault(group, {})
        holder[last] = value
    return nested


def check_config(config: ConfigDict) -> None:
    """Refuse a config that cannot be trained, whatever the data.

    Raises:
      ValueError: in one line: which field, what it is, and what is allowed.
    """
    if not isinstance(config, ConfigDict):
        raise ValueError(f"`config` is {shown(config)}; give a ConfigDict, as `load_config` returns.")
    checked_fields(config.to_dict(), (*_NEEDED, *_USUAL))


def checked_fields(plain: Any, needed: Iterable[str] = ()) -> dict[str, Any]:
    """The fields of a plain dictionary by dotted name, each checked."""
    values = {name: field_of(name).read(value) for name, value in _given(plain)}
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"`config.{missing[0]}` is missing; `cimjax config resolve` prints all fields of a config.")
    if values.get("model.name") == "small" and "model.width" in values:
        FIELDS["model.width"]._replace(kind=_whole(1, 4096)).read(values["model.width"])
    return values


def _given(plain: Any, group: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(plain, Mapping):
        text = f"`config.{group}` is {shown(plain)}; give" if group else f"{shown(plain)} is no config; that is"
        raise ValueError(f"{text} a group of fields ({', '.join(_members(group)[:10])}, ...).")
    for key, value in plain.items():
        name = f"{group}.{key}" if group else str(key)
        if name in GROUPS:
            yield from _given(value, name)
        else:
            yield name, value


def _members(group: str) -> list[str]:
    above = f"{group}." if group else ""
    return list(dict.fromkeys(name.removeprefix(above).partition(".")[0] for name in FIELDS if name.startswith(above)))
