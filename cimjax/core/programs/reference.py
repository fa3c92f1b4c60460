"""The definition as a program: `array_mac`, the ADC, `dequantize_and_add`, differentiated by JAX."""

from __future__ import annotations

from jax import Array

from cimjax.core import adc, encoding, readout
from cimjax.core.array_mac import PartialSums, array_mac
from cimjax.core.cells import StoredArrays
from cimjax.core.programs.contract import Layer
from cimjax.core.programs.cpu import written
from cimjax.core.step_sizes import StepSizes


def run(codes: Array, arrays: StoredArrays, steps: StepSizes, layer: Layer) -> Array:
    """As `contract.ArrayProgram`. Gradients are LSQ's through every quantizer (`lsq.quantize`)."""
    tiling, window, spec, _ = layer
    slices = encoding.slice_codes(codes, spec.activation)
    psums = array_mac(slices, arrays, tiling, window, spec)
    # Changes nothing: without it XLA computes the gradient of each partial sum again for every use, on CPU a quarter
    # more time forwards and back (docs/speed.md).
    psums = psums._replace(columns=written(psums.columns))
    read = PartialSums(
        columns=adc.convert(psums.columns, steps, tiling, spec),
        reference=None if psums.reference is None else adc.convert_reference(psums.reference, steps, spec),
    )
    return readout.dequantize_and_add(read, steps, tiling, spec)
