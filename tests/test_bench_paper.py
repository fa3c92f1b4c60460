"""Training steps on paper: the counts against XLA's own, what devices take for them, and the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from cimjax.analysis.bench_paper import H100, PSUMS, REST, TO_INPUTS, Accelerator, Part, Step, step_of
from cimjax.cli import main
from cimjax.hardware.survey import Layer, layers_of
from cimjax.nn.layers import CIMConv
from cimjax.spec import ActivationSpec, ADCSpec, ArraySpec, CIMSpec, Execution, WeightSpec

SPEC = CIMSpec(
    activation=ActivationSpec(bits=4),
    weight=WeightSpec(bits=4, cell_bits=2, granularity="column"),
    adc=ADCSpec(bits=3, granularity="column"),
    array=ArraySpec(rows=128, columns=128),
)
IMAGES = jax.ShapeDtypeStruct((2, 12, 12, 32), jnp.float32)


class Two(nn.Module):
    """Two 3 x 3 layers without padding, 32 to 64 to 64 channels, at 10 x 10 and 8 x 8 positions."""

    spec: CIMSpec | None = None
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            more: dict[str, Any] = {"padding": "VALID", "use_bias": False}
            conv = nn.Conv if self.spec is None else CIMConv
            if self.spec is not None:
                more |= {"spec": self.spec, "execution": self.execution}
            x = conv(64, (3, 3), **more)(x)
        return x


MACS = 9 * 64 * (32 * 100 + 64 * 64)
OF_FIRST = 9 * 64 * 32 * 100


def layers(spec: CIMSpec | None = None, **execution: Any) -> list[Layer]:
    return layers_of(Two(spec, Execution(**execution)), IMAGES)


def flop_of_xla(spec: CIMSpec | None) -> float:
    """FLOP of an image, forwards and back, as XLA counts what is lowered for a GPU."""
    model = Two(spec)
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    params = variables.pop("params")

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(model.apply({**variables_now(), "params": params}, x, mutable=False) ** 2)

    def variables_now() -> Any:
        return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), variables)

    lowered = jax.jit(jax.grad(loss)).trace(params, IMAGES).lower(lowering_platforms=("cuda",))
    return lowered.cost_analysis()["flops"] / IMAGES.shape[0]


def test_arithmetic_is_what_xla_counts() -> None:
    plain = step_of("plain", layers(), batch=1)
    # Forwards, to weights, and to inputs but of the first layer.
    assert plain.total("tf32") == 2 * (3 * MACS - OF_FIRST) and plain.total("float32") == plain.total("bfloat16") == 0
    assert flop_of_xla(None) == pytest.approx(plain.total("tf32"), rel=0.01)
    arrays = step_of("arrays", layers(SPEC), batch=1)
    # Two planes of two bits, one gradient to weights for both.
    assert arrays.total("bfloat16") == 2 * 2 * MACS
    assert arrays.total("float32") == 2 * (2 * (MACS - OF_FIRST) + MACS)
    products = arrays.total("bfloat16") + arrays.total("float32")
    # XLA does not know that nobody asks for the gradient to images, and counts what is done with each partial sum.
    assert products < flop_of_xla(SPEC) < 1.5 * (products + 2 * 2 * OF_FIRST)


def test_partial_sums_are_the_conversions_and_their_traffic_follows_them() -> None:
    found = layers(SPEC)
    step = step_of("arrays", found, batch=1)
    assert step.psums == sum(layer.cost.adc_conversions for layer in found if layer.cost) > 0
    outputs = 64 * (100 + 64)
    assert step.traffic_of(PSUMS) == 18 * step.psums + 8 * outputs
    # Computed again instead of kept: more arithmetic.
    again = step_of("again", layers(SPEC, residuals="inputs"), batch=1)
    assert again.total("bfloat16") == 2 * step.total("bfloat16") and again.psums == step.psums
    # So are those of layers of many read groups.
    many = step_of("many", layers(dataclasses.replace(SPEC, array=ArraySpec(rows=128, active_rows=9))), batch=1)
    assert many.total("bfloat16") == again.total("bfloat16") and many.psums > 8 * outputs * 2
    # Bit-serial inputs: as many times the partial sums as slices.
    serial = dataclasses.replace(SPEC, activation=ActivationSpec(bits=4, slice_bits=1))
    assert step_of("serial", layers(serial), batch=1).psums == 4 * step.psums
    # Without ADCs there are none: one convolution, and its gradients but for the first layer's to the image.
    ideal = step_of("ideal", layers(dataclasses.replace(SPEC, adc=None)), batch=1)
    assert (ideal.total("bfloat16"), ideal.psums) == (0, 0)
    assert ideal.total("float32") == 2 * (3 * MACS - OF_FIRST)


def test_a_part_takes_as_long_as_its_arithmetic_or_its_traffic() -> None:
    device = Accelerator("slow", 4.0, 2.0, 1.0, 10.0, link=8.0, network=2.0, in_machine=2)
    assert Part("a", bfloat16=4, tf32=2, float32=1, memory=10).seconds(device) == 3.0
    assert Part("a", float32=1, memory=50).seconds(device) == 5.0
    step = Step("net", (Part(TO_INPUTS, float32=1), Part(REST, memory=30)), parameters=10, psums=0, batch=2)
    assert step.seconds(device) == 2 * (1 + 3) + 32 * 10 / 10
    assert step.share_of(device, REST) == 6 / 40
    # 40 bytes in rings: none alone, half of twice as much within a machine, and between two machines as well.
    assert [step.all_reduce_seconds(device, count) for count in (1, 2, 4)] == [0, 40 / 8, 40 / 8 + 40 / 2]


def test_the_command_needs_no_data_and_takes_any_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "--of", "paper", "--config", "configs/resnet18_imagenet.py:smoke", "--config.batch_size=128"]
    assert main([*command, "--save", str(tmp_path / "paper.json")]) == 0
    out = capsys.readouterr().out
    assert "989 TFLOP/s bfloat16" in out and "cores to feed them" in out and "| arrays " in out
    saved = json.loads((tmp_path / "paper.json").read_text())
    assert saved["device"]["name"] == H100.name and [step["name"] for step in saved["steps"]][1] == "arrays"
    assert all(step["seconds"] > 0 for step in saved["steps"])
    assert main(["bench", "--of", "paper", "--config", "configs/digits.py:weight=none"]) == 0
    out = capsys.readouterr().out
    assert "cores" not in out and "arrays" not in out
    assert main([*command, "--plot", "a.png"]) == 2
    assert "--plot draws programs; of paper give --save FILE" in capsys.readouterr().err
