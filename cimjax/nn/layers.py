"""The layers: `CIMConv`, `CIMDense` and `Quantize`, with the arguments and parameter names of their Flax namesakes.

They declare parameters and call `cimjax.core`. Networks made of them are elsewhere in `cimjax.nn`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from cimjax.core import conv, lsq, tiling
from cimjax.core import step_sizes as steps_lib
from cimjax.core import window as window_lib
from cimjax.core.adc import adc_statistics
from cimjax.core.array_mac import partial_sums
from cimjax.core.calibration.report import report_input
from cimjax.core.calibration.steps import activation_step, calibrate_layer
from cimjax.core.lsq import Codes
from cimjax.core.step_sizes import StepSizes
from cimjax.core.window import Padding, PerAxis, Window
from cimjax.nn.calibrate import kinds_to_set, make_room, refuse_unknown, set_steps
from cimjax.nn.calibration_warnings import level_of_caller, name_of
from cimjax.nn.ideal import as_asked
from cimjax.nn.parameters import PARAMETERS, lacks_step, stored_shapes
from cimjax.spec import ActivationSpec, CIMSpec, Execution, StepKind

# The collection in which layers leave the `ADCStatistics` of their ADCs when it is mutable.
ADC_STATISTICS = "adc_statistics"
# The collection in which layers leave what comes to their ADCs: for each call the partial sums (T, M, R, K, O) float32,
# and the real `StepSizes`. That takes much memory, so it must be named: `mutable=True` does not ask for it.
PARTIAL_SUMS = "partial_sums"


class Quantize(nn.Module):
    """Quantizes a tensor once for all the layers that read it: real in, `Codes` out.

    Parameter `log_step` () is the logarithm of the step, unless the specification fixes it; it is set from the input by
    `init` and `calibrate`.

    spec: bits and sign of the codes; the layers that read them need the same.
    """

    spec: ActivationSpec = ActivationSpec()

    @nn.compact
    def __call__(self, x: ArrayLike) -> Codes:
        """Quantize `x`: `a = clip(rint(x / s_a), q_min, q_max)`, one learned step for the tensor (LSQ, eq. 1).

        Args:
          x: (N, ..., C) real.

        Returns:
          `Codes` of the same shape, float32 integers with their step.

        Raises:
          ValueError: for codes, numbers that are not real, or steps that were never set.
        """
        x = require_real(x, name_of(self))
        factor = steps_lib.activation_factor(math.prod(x.shape[1:]), self.spec)
        first, log_step = not self.has_variable("params", "log_step"), None
        if self.spec.step != StepKind.FIXED:
            make_room(self, "log_step", ())
            _require_step(self, "log_step")
            log_step = self.param("log_step", nn.initializers.zeros, (), jnp.float32)
        if (kinds := kinds_to_set(self)) is not None:
            found = log_step
            if log_step is not None and "activation" in kinds:
                refuse_unknown(self, x)
                found = lsq.log_from_step(activation_step(x, self.spec))
            report = report_input(x, steps_lib.real_activation_step(found, factor, self.spec), self.spec)
            set_steps(self, {"log_step": found}, report, first=first)
            log_step = None if log_step is None else self.get_variable("params", "log_step")
        return lsq.quantize_activation(x, steps_lib.real_activation_step(log_step, factor, self.spec), self.spec)


class ArrayLayer(nn.Module):
    """What both layers share: what they take, the parameters of their steps, and their calibration."""

    @nn.nowrap
    def checked(self, x: Any, spatial: int) -> Array | Codes:
        """The input, before any parameter is made of it.

        Raises:
          ValueError: for `x` that is no array of real numbers, or has too few axes or other channels than the kernel.
        """
        x = x if isinstance(x, Codes) else require_real(x, name_of(self))
        shape = _shape(x)
        axes = ", ".join(("...", *("DHW"[3 - spatial :] if spatial <= 3 else "." * spatial), "C"))
        if len(shape) <= spatial:
            add = "; x[..., None] gives images their only channel" if spatial and len(shape) == spatial else ""
            raise ValueError(f"`{name_of(self)}` got an input of shape {shape}; it takes ({axes}){add}.")
        if not shape[-1]:
            raise ValueError(f"`{name_of(self)}` got an input of shape {shape}, without channels; it takes ({axes}).")
        if self.has_variable("params", "kernel"):
            conv.require_channels(shape, self.get_variable("params", "kernel").shape, f"the input of `{name_of(self)}`")
        return x

    @nn.nowrap
    def through_arrays(
        self,
        x: Array | Codes,
        kernel: Array,
        window: Window,
        *,
        spec: CIMSpec,
        execution: Execution,
        input_size: int,
        positions: int,
    ) -> Array:
        """`x` (N, H, W, C) times `kernel` (kh, kw, C, O) through the arrays; both counts are per example."""
        spec = as_asked(spec)
        tiled = tiling.tile(kernel.shape, spec)
        first = not self.has_variable("params", PARAMETERS.weight)
        stored = self._declare(steps_lib.shapes(tiled, spec), spec, has_step=not isinstance(x, Codes))
        key = self._variation_key(spec)
        if (kinds := kinds_to_set(self)) is not None:
            refuse_unknown(self, x.codes if isinstance(x, Codes) else x)
            found, report = calibrate_layer(x, kernel, stored, window, spec, kinds=kinds, variation_key=key)
            set_steps(self, dict(zip(PARAMETERS, found, strict=True)), report, first=first)
            stored = StepSizes(
                *(
                    None if value is None else self.get_variable("params", name)
                    for name, value in zip(PARAMETERS, found, strict=True)
                )
            )
        steps = _real_steps(kernel, stored, spec, input_size, positions)
        statistics = spec.adc is not None and self.is_mutable_collection(ADC_STATISTICS)
        wanted = self.scope is not None and self.scope.mutable is not True and self.is_mutable_collection(PARTIAL_SUMS)
        if (statistics or wanted) and not self.is_initializing():
            inputs = lsq.quantize_activation(x, steps.activation, spec.activation)
            psums = partial_sums(inputs.codes, kernel, steps, tiled, window, spec, key)
            if wanted:
                self.sow(PARTIAL_SUMS, "adc", (psums.columns, steps))
            if statistics:
                found = adc_statistics(psums.columns, steps, tiled, spec)
                self.sow(ADC_STATISTICS, "adc", found, reduce_fn=lambda _, new: new)
        return conv.cim_conv(x, kernel, steps, spec, variation_key=key, execution=execution, **window._asdict())

    @nn.nowrap
    def _declare(self, shapes: StepSizes, spec: CIMSpec, *, has_step: bool) -> StepSizes:
        """Parameters of every step, at a real step of 1 and an offset of 0 until they are set from data."""
        shapes = stored_shapes(shapes, spec, has_step=has_step)
        stored = []
        for name, shape in zip(PARAMETERS, shapes, strict=True):
            if shape is not None:
                make_room(self, name, shape)
                _require_step(self, name)
            stored.append(None if shape is None else self.param(name, nn.initializers.zeros, shape, jnp.float32))
        return StepSizes(*stored)

    @nn.nowrap
    def _variation_key(self, spec: CIMSpec) -> Array | None:
        if spec.variation is None:
            return None
        if not self.has_rng("variation") and not self.is_initializing():
            raise ValueError("The specification has `variation`: give its key, `apply(..., rngs={'variation': key})`.")
        assert self.scope is not None
        # Flax counts random numbers, and every call would be another chip.
        counts, before = self.scope.rng_counters, self.scope.rng_counters.get("variation")
        key = self.make_rng("variation")
        if before is None:
            counts.pop("variation", None)
        else:
            counts["variation"] = before
        return key


def _require_step(module: nn.Module, name: str) -> None:
    """Refuse variables in which a step is missing that would not be set now either."""
    if not (module.has_variable("params", name) or module.is_mutable_collection("params")):
        raise lacks_step(name_of(module), name)


def require_real(x: Any, name: str) -> Array:
    """`x` as an array.

    Raises:
      ValueError: for what is no array of real numbers.
    """
    try:
        array = jnp.asarray(x)
    except (TypeError, ValueError):
        array = None
    if array is None or not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        kind = f"of type {type(x).__name__}" if array is None else f"of {array.dtype}"
        raise ValueError(f"`{name}` got an input {kind}; give an array of real numbers.")
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"`{name}` got an input of {array.dtype}; give real numbers, such as parts or magnitudes.")
    return array


def doubt_channels_first(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Say so where a new layer's input (N, H, W, C) looks like images with their channels first.

    Warns:
      UserWarning: for an image of 1 or 3 lines with as many channels as columns.
    """
    if len(shape) == 4 and shape[1] in (1, 3) and shape[2] == shape[3] >= 8:
        warnings.warn(
            f"{name_of(module)}: its input of shape {shape} is read as images of {shape[1]} x {shape[2]} pixels and "
            f"{shape[3]} channels; if the channels come first, move them last: jnp.moveaxis(x, 1, -1).",
            stacklevel=level_of_caller(),
        )


def _real_steps(kernel: Array, stored: StepSizes, spec: CIMSpec, input_size: int, positions: int) -> StepSizes:
    tiled = tiling.tile(kernel.shape, spec)
    factors = steps_lib.gradient_factors(tiled, spec, input_size, positions)
    return steps_lib.real_steps(stored, factors, steps_lib.offset_units(tiled, spec), spec)


class CIMConv(ArrayLayer):
    """A convolution through memory arrays, in place of `flax.linen.Conv`.

    `kernel` (kh, kw, C, features) and `bias` (features,) are `Conv`'s, so that pretrained weights drop in. Steps are
    stored as logarithms, offsets in fixed units (`core.step_sizes.real_steps`): `activation_log_step` () unless the
    input is `Codes`, `weight_log_step`, and with an ADC `psum_log_step`, `psum_offset`, `reference_log_step`,
    `reference_offset`, `psum_log_gain` as the specification has them (shapes: `core.step_sizes.StepSizes`). `init` sets
    them from its input.

    features, kernel_size, strides, padding, input_dilation, kernel_dilation, use_bias, dtype, param_dtype, kernel_init,
      bias_init: as for `flax.linen.Conv`. `padding` is 'SAME', 'VALID', an integer or pairs.
    feature_group_count: only 1.
    spec: what to build.
    execution: by which program; changes no result.
    """

    features: int
    kernel_size: int | tuple[int, ...]
    strides: PerAxis = 1
    padding: Padding = "SAME"
    input_dilation: PerAxis = 1
    kernel_dilation: PerAxis = 1
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    spec: CIMSpec = CIMSpec()
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, inputs: ArrayLike | Codes) -> Array:
        """Convolve `inputs` through the arrays, and add the bias: the paper's eqs. 1-3, as `cim_conv`.

        Args:
          inputs: (..., H, W, C), real or `Codes`.

        Returns:
          (..., OH, OW, features), of `dtype`, or of what `flax.linen.Conv` would promote inputs and kernel to.

        Raises:
          ValueError: for `feature_group_count` other than 1, a kernel that does not fit the arrays, codes of another
            specification, or steps that were never set.
        """
        if self.feature_group_count != 1:
            raise ValueError(
                f"`feature_group_count` is {self.feature_group_count}; grouped convolutions through arrays are not "
                "supported: use one `CIMConv` per group, or `flax.linen.Conv` for this layer."
            )
        kernel_size = self._kernel_size
        x, batch = _with_one_batch_axis(self.checked(inputs, len(kernel_size)), len(kernel_size) + 1)
        shape = _shape(x)
        if not self.has_variable("params", "kernel") and kernel_size[0] > 1:
            doubt_channels_first(self, shape)
        kernel = self.param("kernel", self.kernel_init, (*kernel_size, shape[-1], self.features), self.param_dtype)
        window = self.window(shape[1:-1])
        positions = window_lib.positions(shape[1:-1], kernel_size, window)
        y = self.through_arrays(
            x,
            kernel,
            window,
            spec=self.spec,
            execution=self.execution,
            input_size=math.prod((*batch[1:], *shape[1:])),
            positions=math.prod(batch[1:]) * positions,
        )
        if self.use_bias:
            y = y + self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        return y.reshape(*batch, *y.shape[1:]).astype(self.dtype or _result_type(x, kernel))

    @nn.nowrap
    def window(self, input_size: tuple[int, ...]) -> Window:
        """How the kernel moves over an input of this spatial shape."""
        return window_lib.resolve(
            input_size,
            self._kernel_size,
            strides=self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
        )

    @property
    def _kernel_size(self) -> tuple[int, ...]:
        return (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)


class CIMDense(ArrayLayer):
    """A matrix product through memory arrays, in place of `flax.linen.Dense`; parameters as `CIMConv`'s.

    features, use_bias, dtype, param_dtype, kernel_init, bias_init: as for `flax.linen.Dense`.
    spec: what to build.
    execution: by which program; changes no result.
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    spec: CIMSpec = CIMSpec()
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, inputs: ArrayLike | Codes) -> Array:
        """Multiply `inputs` by the kernel through the arrays, and add the bias, as `cim_dense`.

        Args:
          inputs: (..., C), real or `Codes`, any leading axes.

        Returns:
          (..., features), of `dtype`, or of what `flax.linen.Dense` would promote inputs and kernel to.

        Raises:
          ValueError: as `CIMConv`.
        """
        x = self.checked(inputs, 0)
        *leading, channels = _shape(x)
        flat, _ = _with_one_batch_axis(x, 1)
        kernel = self.param("kernel", self.kernel_init, (channels, self.features), self.param_dtype)
        positions = math.prod(leading[1:])
        window = self.window(())
        y = self.through_arrays(
            flat,
            kernel,
            window,
            spec=self.spec,
            execution=self.execution,
            input_size=positions * channels,
            positions=positions,
        )
        if self.use_bias:
            y = y + self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        return y.reshape(*leading, self.features).astype(self.dtype or _result_type(x, kernel))

    @nn.nowrap
    def window(self, input_size: tuple[int, ...]) -> Window:
        """As `CIMConv.window`; without spatial axes nothing moves."""
        del input_size
        return Window((), (), (), ())


def _shape(x: Array | Codes) -> tuple[int, ...]:
    return x.codes.shape if isinstance(x, Codes) else x.shape


def _result_type(x: Array | Codes, kernel: Array) -> Any:
    return jnp.result_type(x.codes if isinstance(x, Codes) else x, kernel)


def _with_one_batch_axis(x: Array | Codes, trailing: int) -> tuple[Array | Codes, tuple[int, ...]]:
    """`x` with all axes before the last `trailing` flattened to one, and what they were."""
    shape = _shape(x)
    batch = shape[: len(shape) - trailing]
    flat = (math.prod(batch), *shape[len(shape) - trailing :])
    if isinstance(x, Codes):
        return Codes(x.codes.reshape(flat), x.step, x.spec), batch
    return x.reshape(flat), batch
