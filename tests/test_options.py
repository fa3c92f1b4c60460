"""The options in a config path: what they mean, what is refused and in which words, and the configs that offer them."""

from __future__ import annotations

import json
import pathlib
import re
from random import Random
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import pytest
from ml_collections import ConfigDict

from cimjax.spec import CIMSpec, Execution, Granularity
from cimjax.training import optimizer
from cimjax.training.config.defaults import default_config
from cimjax.training.config.describe import describe_options
from cimjax.training.config.fields import FIELDS, SCHEDULES, check_config, completed
from cimjax.training.config.file import Override, load_config
from cimjax.training.config.options import (
    CIM_OPTIONS,
    SCHEMES,
    Option,
    parse_options,
    spec_from_options,
)
from cimjax.training.config.refusals import OptionError

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
NAMES = [option.name for option in CIM_OPTIONS]

REFUSED = [
    ("wieght=layer", r"unknown option 'wieght' \(did you mean 'weight'\?\); known: scheme, training, .*, smoke\."),
    ("xyz=red", r"unknown option 'xyz'; known: scheme, training, "),
    ("epochs=3", r"unknown option 'epochs', which is a field and named config\.epochs; known: scheme, training, "),
    ("weight=colum", r"weight is 'colum' \(did you mean 'column'\?\); allowed: layer, array, column, none\."),
    ("psum=row", r"psum is 'row'; allowed: layer, array, column, none\."),
    ("weight=Layer", r"weight is 'Layer' \(did you mean 'layer'\?\)"),
    ("weight", r"option weight needs a value, as in weight=VALUE; allowed: layer, array, column, none\."),
    ("weight=", r"weight is ''; allowed: layer"),
    ("adc_bits=two", r"adc_bits is 'two'; allowed: a whole number up to 999999999, 1\.5\."),
    ("adc_bits=2.5", r"adc_bits is '2\.5'; allowed: a whole number up to 999999999, 1\.5\."),
    ("rows=1e2", r"rows is '1e2'; allowed: a whole number"),
    ("rows=-64", r"rows is '-64'; allowed: a whole number"),
    ("seed=12345678901", r"seed is '12345678901'; allowed: a whole number up to 999999999\."),
    ("active_rows=none,rows=None", r"rows is 'None'; allowed: a whole number"),
    ("smoke=yes", r"smoke is 'yes'; allowed: true, false\."),
    (
        "adc_step=fix",
        r"adc_step is 'fix' \(did you mean 'fixed'\?\); allowed: learned, calibrated, fixed, power_of_two",
    ),
    ("full_scale=wide", r"full_scale is 'wide'; allowed: a number, as in 64 or 0\.5, none\."),
    ("full_scale=1e400", r"full_scale is '1e400'; allowed: a number"),
    ("full_scale=-64", r"full_scale is '-64'; allowed: a number"),
    ("rows=1" + "0" * 400, r"rows is '10{59}\.\.\.0{60}'; allowed: a whole number"),
    ("offset=no", r"offset is 'no'; allowed: true, false\."),
    ("seed=1,seed=1", r"option seed is given twice; leave one of them out\."),
    ("smoke,", r"an option is empty in 'smoke,'; write them as name=value,name=value,flag\."),
    ("=3", r"an option is empty in '=3'"),
    ("scheme=colum", r"scheme is 'colum' \(did you mean 'column'\?\); allowed: kim2022, bai2023, .*, column\."),
    ("scheme=kim2022,weight=array", r"scheme=kim2022 means weight=layer,psum=layer,training=post_training, not weight"),
    ("scheme=bai2023,training=one_stage", r"means weight=array,psum=array,training=post_training, not training=one"),
    ("scheme=saxena2022,weight_step=learned", r"training=two_stage,weight_step=calibrated, not weight_step=learned"),
    ("scheme=column,weight=layer", r"scheme=column means weight=column,psum=column,.* not weight=layer; leave one of"),
    ("psum=none,scheme=column", r"scheme=column means .*, not psum=none"),
    ("training=two_stage,weight=none", r"training has no effect with weight=none"),
    ("training=two_stage,psum=none", r"training has no effect with psum=none, which is an ideal ADC"),
    ("weight_step=calibrated,weight=none", r"weight_step has no effect with weight=none"),
    ("weight=none,rows=64", r"rows has no effect with weight=none, which is full precision; leave one of them out\."),
    ("weight=none,psum=layer", r"psum has no effect with weight=none"),
    ("adc_bits=2,psum=none", r"adc_bits has no effect with psum=none, which is an ideal ADC; leave one of them out\."),
    ("offset,psum=none", r"offset has no effect with psum=none"),
    ("full_scale=64,psum=none", r"full_scale has no effect with psum=none"),
    (
        "adc_step=fixed,full_scale=64,adc_start=range",
        r"adc_start has no effect with adc_step=fixed and no offset; leave",
    ),
]

# What only the specification refuses: in its words, with the names of options.
REFUSED_BY_SPEC = [
    ("act_bits=0", r"`act_bits` is 0; give a whole number of bits from 1 to 16, or 1\.5"),
    ("act_bits=1.5", r"`act_bits` is 1\.5 for an unsigned activation"),
    ("weight_bits=9", r"`weight_bits` is 9; give a whole number of bits from 1 to 8"),
    ("weight_bits=1", r"`weight_bits` is 1 with `encoding` twos_complement"),
    ("cell_bits=0", r"`cell_bits` is 0; give a whole number of bits from 1 to 8\."),
    ("adc_bits=99", r"`adc_bits` is 99; give a whole number of bits from 1 to 16"),
    ("slice_bits=0", r"`slice_bits` is 0"),
    ("rows=0", r"`rows` is 0; give a whole number of at least 1"),
    ("columns=2", r"`columns` is 2 but one output needs 3 columns"),
    ("rows=64,active_rows=65", r"`active_rows` is 65 but an array has 64 rows"),
    ("subtract=analog", r"`subtract` is 'analog' with `encoding` twos_complement; it belongs to 'differential'"),
    ("reference=adc", r"`reference` is 'adc' with `encoding` twos_complement"),
    ("step_per_plane,weight=array", r"`step_per_plane` is True with `weight` array; it needs `weight` 'column'"),
    ("step_per_plane,encoding=differential", r"`step_per_plane` is True with `encoding` differential"),
    ("adc_step=fixed", r"`full_scale` is None with `adc_step` 'fixed'; give the span of psums that .* as in 64\."),
    ("full_scale=64", r"`full_scale` is 64\.0 with `adc_step` learned; it belongs to `adc_step` 'fixed'\."),
    ("adc_step=calibrated,full_scale=64", r"`full_scale` is 64\.0 with `adc_step` calibrated"),
    ("adc_step=fixed,full_scale=0", r"`full_scale` is 0\.0; give a number from 1e-06 to 1,000,000,000\."),
]


@pytest.mark.parametrize("argument,message", REFUSED, ids=[argument[:60] for argument, _ in REFUSED])
def test_a_bad_option_is_refused_in_one_clear_line(argument: str, message: str) -> None:
    with pytest.raises(OptionError, match=f"^[^\n]*{message}[^\n]*$"):
        parse_options(argument)


@pytest.mark.parametrize("argument,message", REFUSED_BY_SPEC, ids=[argument for argument, _ in REFUSED_BY_SPEC])
def test_what_the_specification_refuses_is_said_in_names_of_options(argument: str, message: str) -> None:
    with pytest.raises(OptionError, match=f"^[^\n]*{message}[^\n]*$"):
        spec_from_options(parse_options(argument))


def test_values_are_typed_and_defaults_are_those_of_the_config_then_of_the_table() -> None:
    argument = "psum=none , smoke=True,step_per_plane=FALSE,slice_bits=2,weight_bits=1.5,encoding=differential"
    options = parse_options(argument, seed=7, rows=64, offset=True)
    assert vars(options) == {option.name: option.default for option in CIM_OPTIONS} | {
        "psum": None,
        "smoke": True,
        "slice_bits": 2,
        "weight_bits": 1.5,
        "encoding": "differential",
        "seed": 7,
        "rows": 64,
        "offset": True,
    }


@pytest.mark.parametrize("argument", [None, "", " "])
def test_no_options_are_the_defaults(argument: str | None) -> None:
    assert vars(parse_options(argument)) == {option.name: option.default for option in CIM_OPTIONS}


def test_a_config_may_offer_options_of_its_own_and_wrong_defaults_are_its_fault_not_the_users() -> None:
    depth = Option("depth", (int,), 20, "layers")
    assert parse_options("depth=32,rows=64", depth).depth == 32
    assert parse_options(None, depth, depth=56).depth == 56
    for wrong in ({"depht": 3}, {"depth": "20"}, {"smoke": 1}, {"rows": True}, {"weight": "none"}):
        with pytest.raises(ValueError, match="is no default") as caught:
            parse_options(None, depth, **wrong)
        assert not isinstance(caught.value, OptionError)


def test_a_scheme_stands_for_its_granularities_whatever_the_config_prefers() -> None:
    for argument in ("scheme=column", "scheme=column,weight=column", "psum=column,scheme=column"):
        options = parse_options(argument, weight="layer", psum=None)
        assert (options.weight, options.psum) == ("column", "column")


def test_full_precision_and_an_ideal_adc() -> None:
    assert spec_from_options(parse_options("weight=none")) is None
    assert spec_from_options(parse_options("weight=none,psum=none,seed=3,smoke")) is None
    spec = spec_from_options(parse_options("psum=none"))
    assert spec is not None and spec["adc"] is None
    assert CIMSpec.from_dict(spec) == CIMSpec(adc=None)


def test_every_option_sets_its_field_and_only_that() -> None:
    """Against the specification's defaults, which the options repeat."""
    usual = CIMSpec().to_dict()
    assert spec_from_options(parse_options(None)) == usual
    for text, field, value in [
        ("weight=layer", "weight.granularity", "layer"),
        ("psum=array", "adc.granularity", "array"),
        ("act_bits=3", "activation.bits", 3),
        ("slice_bits=1", "activation.slice_bits", 1),
        ("weight_bits=5", "weight.bits", 5),
        ("cell_bits=3", "weight.cell_bits", 3),
        ("adc_bits=1.5", "adc.bits", 1.5),
        ("rows=256", "array.rows", 256),
        ("columns=64", "array.columns", 64),
        ("active_rows=32", "array.active_rows", 32),
        ("tiling=im2col", "array.tiling", "im2col"),
        ("encoding=offset", "weight.encoding", "offset"),
        ("signed_cells=ideal", "weight.signed_cells", "ideal"),
        ("step_per_plane", "weight.step_per_plane", True),
        ("offset", "adc.offset", True),
        ("adc_step=power_of_two", "adc.step", "power_of_two"),
        ("adc_step=calibrated", "adc.step", "calibrated"),
    ]:
        group, name = field.split(".")
        changed = usual | {group: usual[group] | {name: value}}
        assert spec_from_options(parse_options(text)) == changed, text
    fixed = usual | {"adc": usual["adc"] | {"step": "fixed", "full_scale": 48.5}}
    assert spec_from_options(parse_options("adc_step=fixed,full_scale=48.5")) == fixed
    assert (
        spec_from_options(parse_options("", adc_step="fixed", full_scale=48))
        == CIMSpec.from_dict(fixed | {"adc": fixed["adc"] | {"full_scale": 48}}).to_dict()
    )


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.py")), ids=lambda file: file.stem)
def test_a_fixed_adc_has_no_offset_unless_one_is_typed(file: pathlib.Path) -> None:
    """Whatever the config prefers for learned steps; other steps keep that."""
    for argument, offset in {
        "adc_step=fixed,full_scale=64": False,
        "adc_step=fixed,full_scale=64,offset": True,
        "adc_step=fixed,full_scale=64,offset=true": True,
        "": True,
        "offset=false": False,
        "adc_step=power_of_two": True,
        "adc_step=calibrated,offset=false": False,
    }.items():
        spec = CIMSpec.from_dict(load_config(f"{file}:{argument}").spec.to_dict())
        assert spec.adc is not None and spec.adc.offset == offset, argument
        assert spec.adc.full_scale == (64.0 if "fixed" in argument else None)


def typed_options() -> st.SearchStrategy[str]:
    """Option strings that parse: some of the options, each with a value that it allows."""

    def value(option: Option) -> st.SearchStrategy[str]:
        texts: list[st.SearchStrategy[str]] = []
        for one in option.allowed:
            if one is bool:
                texts.append(st.sampled_from([option.name, f"{option.name}=true", f"{option.name}=false"]))
            else:
                number = st.just("none" if one is None else str(one))
                if one in (int, float):
                    number = st.integers(0, 200).map(str) if one is int else st.floats(0, 200).map("{:.3f}".format)
                texts.append(number.map(lambda text: f"{option.name}={text}"))
        return st.one_of(texts)

    some = st.lists(st.sampled_from(CIM_OPTIONS), unique_by=lambda option: option.name)
    return some.flatmap(lambda options: st.tuples(*map(value, options))).map(",".join)


@hypothesis.given(typed_options())
def test_options_give_a_valid_specification_or_one_line_about_options(argument: str) -> None:
    try:
        options = parse_options(argument)
        spec = spec_from_options(options)
    except OptionError as error:
        assert "\n" not in str(error)
        # The two names that are values, or fields without an option, as the specification writes them.
        assert set(re.findall(r"`(\w+)", str(error))) <= {*NAMES, "signed"}
        return
    assert (spec is None) == (options.weight is None)
    if spec is not None:
        assert CIMSpec.from_dict(json.loads(json.dumps(spec))).to_dict() == spec


@hypothesis.given(st.text() | st.lists(st.text(), max_size=4).map(",".join) | st.sampled_from(NAMES).map("{}=".format))
def test_any_other_text_is_refused_in_one_way(argument: str) -> None:
    try:
        parse_options(argument)
    except OptionError as error:
        assert str(error)


def test_the_help_names_every_option() -> None:
    lines = describe_options().splitlines()
    assert all(any(line.startswith((f"  {name}=", f"  {name}, {name}=false")) for line in lines) for name in NAMES)
    text = "\n".join(lines)
    assert "adc_step=learned|calibrated|fixed|power_of_two\n" in text and "full_scale=N|none " in text
    assert max(map(len, lines)) <= 80


# What a run is without anything that a config file changes: another value would change results.
USUAL: dict[str, Any] = {
    "seed": 0,
    "dataset": "",
    "data_dir": "",
    "image_size": 224,
    "workers": -1,
    "images_on": "device",
    "start": "random",
    "frozen": (),
    "subset": {"classes": 0, "images": 0},
    "model": {"name": ""},
    "spec": CIMSpec().to_dict(),
    "rules": (),
    "execution": Execution().to_dict(),
    "batch_size": 64,
    "epochs": 1.0,
    "warmup_epochs": 1.0,
    "optimizer": {
        "name": "sgd",
        "learning_rate": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
        "step_factor": 1.0,
        "clip_norm": 0.0,
        "accumulate": 1,
        "freeze_oscillating": 0.0,
        "schedule": "cosine",
        "schedule_options": {"alpha": 0.0, "power": 1.0, "decay_rate": 0.1, "boundaries": (0.5, 0.75), "cycles": 1},
    },
    "batch_norm_images": 0,
    "ema": 0.0,
    "teacher": "",
    "teacher_weight": 0.9,
    "teacher_temperature": 4.0,
    "validation": 0.0,
    "mixup": 0.0,
    "label_smoothing": 0.0,
    "augment": {"smallest_crop": 0.08, "shift": 0, "flip": False},
    "variation_draw": "chip",
    "fresh_chips": 0,
    "eval_batch_size": 500,
    "calibration_images": 256,
    "ideal_share": 0.0,
    "recalibrate_epochs": (),
    "steps_per_dispatch": 0,
    "parallel": "shard_map",
    "writers": (),
    "checkpoint_epochs": 1.0,
    "checkpoint_keep": 2,
}


def test_the_defaults_are_those_of_every_run_so_far() -> None:
    config = default_config(parse_options(None))
    assert not config.is_locked and config.to_dict() == USUAL
    check_config(config)
    assert tuple(optimizer.SCHEDULES) == SCHEDULES


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.py")), ids=lambda file: file.stem)
@pytest.mark.parametrize("options", ["", ":smoke", ":weight=none", ":weight=layer,psum=array,adc_bits=2,seed=3"])
def test_every_config_has_exactly_the_fields_that_training_reads(file: pathlib.Path, options: str) -> None:
    config = load_config(f"{file}{options}")
    assert config.is_locked
    check_config(config)
    without = {name: value for name, value in config.to_dict().items() if name not in ("model", "spec")}
    assert jax.tree.map(type, without) == jax.tree.map(type, {name: USUAL[name] for name in without})
    assert (config.spec is None) == (options == ":weight=none")
    json.loads(config.to_json())


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.py")), ids=lambda file: file.stem)
def test_schemes_are_granularities_and_a_way_of_training(file: pathlib.Path) -> None:
    usual = load_config(str(file))
    for name, meant in SCHEMES.items():
        config = load_config(f"{file}:scheme={name}")
        adc, weight = config.spec.adc, config.spec.weight
        assert (weight.granularity, adc.granularity) == (meant["weight"], meant["psum"])
        assert (adc.offset, weight.start) == (False, "magnitude")
        after = meant["training"] == "post_training"
        assert config.start == ("run" if after else "random")
        assert config.ideal_share == (0.5 if meant["training"] == "two_stage" else 0.0)
        frozen = {"kim2022": ("network", "activation", "weight"), "saxena2022": ("weight",)}
        assert config.frozen == frozen.get(name.replace("bai2023", "kim2022").replace("bai2024", "kim2022"), ())
        assert config.epochs == (max(1, round(usual.epochs / 10)) if after else usual.epochs)
    config = load_config(f"{file}:training=post_training,adc_step=calibrated,weight_start=percentile")
    assert (config.epochs, config.batch_norm_images, config.spec.weight.start) == (0.0, 5000, "percentile")
    assert load_config(f"{file}:scheme=column,offset").spec.adc.offset


def older() -> dict[str, Any]:
    """The fields of a run of the first version, as `config.json` holds them."""
    new = (
        "image_size",
        "workers",
        "images_on",
        "start",
        "frozen",
        "ema",
        "validation",
        "mixup",
        "variation_draw",
        "fresh_chips",
        "parallel",
        "writers",
        "checkpoint_keep",
    )
    plain = json.loads(load_config(f"{CONFIGS / 'digits.py'}:smoke").to_json())
    optimizer = {name: plain["optimizer"][name] for name in ("name", "learning_rate", "momentum", "nesterov")}
    spec = plain["spec"] | {"activation": {"bits": 3}}
    return {name: plain[name] for name in plain if name not in new} | {"optimizer": optimizer, "spec": spec}


def test_an_older_config_is_completed() -> None:
    config = completed(older())
    check_config(config)
    usual = load_config(f"{CONFIGS / 'digits.py'}:smoke").to_dict()
    usual["optimizer"] |= {"weight_decay": 5e-4}
    assert config.to_dict() == usual
    assert completed(json.loads(config.to_json())).to_dict() == usual


@pytest.mark.parametrize(
    "change,message",
    [
        ({"epochs": None}, "`config.epochs` is None; give a number from 0 to 2147483647."),
        ({"seed": "22"}, "`config.seed` is '22'; give a whole number from -2147483647 to 2147483647."),
        ({"batch_size": 64.0}, "`config.batch_size` is 64.0; give a whole number from 1 to 2147483647."),
        ({"batch_size": True}, "`config.batch_size` is True; give a whole number"),
        ({"epoch": 3}, "unknown field config.epoch (did you mean config.epochs?)."),
        ({"zzz": 3}, "unknown field config.zzz (known: dataset, data_dir, subset, "),
        ({"two\nlines": 3}, "unknown field config.two lines (known: "),
        ({"model": {}}, "`config.model.name` is missing"),
        ({"model": []}, "`config.model` is []; give a group of fields (name, width, "),
        ({"model": {"name": "small", "width": 0}}, "`config.model.width` is 0; give a number above 0 up to 4096."),
        ({"model": {"name": "mine", "a b": 0}}, "unknown field config.model.a b"),
        ({"model": {"name": "mine", "__class__": 0}}, "unknown field config.model.__class__"),
        ({"spec": 3}, "`config.spec` is 3; give a group of fields or None."),
        ({"spec": {"adc": 3}}, "`config.spec.adc` is 3; give a ADCSpec or None."),
        ({"spec": {"adc": {"bit": 3}}}, "`ADCSpec` has no field 'bit' (did you mean 'bits'?)."),
        ({"execution": {"program": None}}, "`config.execution.program` is None; allowed: auto, reference, "),
    ],
)
def test_what_is_no_config_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        completed(older() | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    if "spec" not in change and "class" not in message:  # which no ConfigDict can hold
        with pytest.raises(ValueError) as caught:
            check_config(ConfigDict(load_config(str(CONFIGS / "digits.py")).to_dict() | change))
        assert message in str(caught.value)


def test_a_config_to_train_has_every_field() -> None:
    with pytest.raises(ValueError, match=r"^`config.ema` is missing; `cimjax config resolve` prints"):
        check_config(ConfigDict({name: value for name, value in USUAL.items() if name != "ema"}))
    with pytest.raises(ValueError, match="give a ConfigDict, as `load_config` returns"):
        check_config(USUAL)  # type: ignore[arg-type]


def test_an_override_follows_the_description_and_references_follow_an_override(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "linked.py"
    file.write_text(
        (CONFIGS / "digits.py")
        .read_text()
        .replace("    return", "    config.warmup_epochs = config.get_ref('epochs') * 0.1\n    return")
    )
    overrides = ["epochs=20", "model.width=7", "model.name=mine", "model.odd=(1,[2])", "model.shortcut=projection"]
    config = load_config(str(file), [Override(*text.split("=")) for text in overrides])
    assert (config.epochs, type(config.epochs), config.warmup_epochs) == (20.0, float, 2.0)
    assert config.model.to_dict() == {"name": "mine", "width": 7, "odd": (1, (2,)), "shortcut": "projection"}


# Values of every type and size, as they are typed.
WORDS = """
0 1 -1 2 7 64 1.5 0.5 -0.25 1e-9 1e308 1e999 nan inf 2147483648 12345678901234567890 None True false 1j 0x10 1_000
() (1,) (1,2.5) (0.1,) [] [1,[2]] {} {'a':1} {1:2} {1,2} (None,) (('stem',None),) (('(',None),) (('a',{'adc':3}),)
column layer sgd adamw digits small resnet20 sgdr auto int8 chip step pad ' \\0 ü x*y b'' ... lambda:0 {'sigma':0.1}
"""
VALUES = (*WORDS.split(), "9" * 5000, "[" * 3000, "", "a\nb", "\udc80")
SPEC_FIELDS = [
    f"spec.{group}.{name}" for group in ("activation", "weight", "adc", "array") for name in USUAL["spec"][group]
]


def one_of_many(random: Random) -> None:
    """A random command or file: a config that passes, or one line."""
    fields = [
        *FIELDS,
        *SPEC_FIELDS,
        "spec",
        "spec.adc",
        "spec.variation",
        "optimizer",
        "model.odd",
        "model",
        "x",
        "a.b",
    ]

    def value() -> str:
        return random.choice([str(random.choice(VALUES)), str(random.randint(-3, 300)), f"{random.random():.3f}"])

    def option() -> str:
        option = random.choice(CIM_OPTIONS)
        chosen = str(random.choice(option.allowed)) if random.random() < 0.7 else value()
        return random.choice([option.name, "x", "", f"{option.name}={chosen}", f"{option.name}={chosen}"])

    file = random.choice(sorted(CONFIGS.glob("*.py")))
    argument = ",".join(option() for _ in range(random.choice([0, 0, 1, 2, 3])))
    overrides = [
        Override(random.choice(fields), random.choice([value(), value(), None]))
        for _ in range(random.choice([0, 1, 2]))
    ]
    plain = json.loads(load_config(str(file)).to_json()) if random.random() < 0.5 else None
    try:
        if plain is not None:
            for _ in range(random.choice([1, 1, 2])):
                damaged(random, plain, value())
            config = completed(plain)
        else:
            config = load_config(f"{file}:{argument}" if argument else str(file), overrides)
    except ValueError as error:
        assert str(error) and len(str(error).splitlines()) == 1 and len(str(error)) < 1000, (argument, overrides, plain)
        return
    check_config(config)
    assert completed(json.loads(config.to_json())).to_dict() == config.to_dict()


def damaged(random: Random, plain: dict[str, Any], text: str) -> None:
    """Change, add or take away one value of a plain dictionary, somewhere in its depth."""
    group: Any = plain
    while isinstance(inner := group[random.choice(list(group))] if group else None, dict) and random.random() < 0.8:
        group = inner
    name = random.choice([*group, "x", "a.b", "__class__"])
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = random.choice([text, None, [text], {"x": text}, [[["deep"]]]])
    if random.random() < 0.3:
        group.pop(name, None)
    else:
        group[name] = value


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.full)])
def test_any_options_fields_and_values_are_a_config_or_one_line(count: int) -> None:
    for seed in range(count):
        one_of_many(Random(seed))


def test_the_digits_config_is_the_documented_network() -> None:
    spec = CIMSpec.from_dict(load_config(str(CONFIGS / "digits.py")).spec.to_dict())
    assert (spec.activation.bits, spec.weight.bits, spec.weight.cell_bits, spec.adc and spec.adc.bits) == (3, 3, 1, 3)
    assert (spec.array.rows, spec.array.columns) == (64, 64)
    assert spec.weight.granularity == Granularity.COLUMN == (spec.adc and spec.adc.granularity)
