"""Faults that the quick tier has to catch: each a text of one file, what is put in its place, and who must notice.

`old` occurs once in `file`, a path in the package. `tests` are tests of the quick tier, below `tests/`, the likeliest
first. Held by `test_mutations.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from cases import QUICK


class Fault(NamedTuple):
    """One row of the table."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def oracle(*names: str) -> tuple[str, ...]:
    """Runs of the contract table, CASE or CASE-PROGRAM, that are in its quick part."""
    runs = [f"{case.name}-{program}" for case, program in QUICK]
    found = [next((run for run in runs if name in (run, run.rpartition("-")[0])), None) for name in names]
    missing = [name for name, run in zip(names, found, strict=True) if run is None]
    if missing:
        raise ValueError(f"the quick part of the contract table has no {missing}; choose among {runs}.")
    return tuple(f"test_programs.py::test_values_and_gradients_equal_the_oracle[{run}]" for run in found)


QUANTIZER = [
    Fault(
        "ties up become ties to even",
        "core/lsq.py",
        "codes = jnp.floor(inside + 0.5) if half_up else jnp.rint(inside)",
        "codes = jnp.rint(inside)",
        ("test_lsq.py::test_ties",),
    ),
    Fault(
        "ties to even become ties up",
        "core/lsq.py",
        "codes = jnp.floor(inside + 0.5) if half_up else jnp.rint(inside)",
        "codes = jnp.floor(inside + 0.5)",
        ("test_lsq.py::test_ties",),
    ),
    Fault(
        "activations round ties up",
        "core/lsq.py",
        "return Codes(quantize(x, step, spec.code_range), step, spec)",
        "return Codes(quantize(x, step, spec.code_range, half_up=True), step, spec)",
        oracle("ties-twos"),
    ),
    Fault(
        "weights round ties up",
        "core/cells.py",
        "lsq.quantize(tiled, step, spec.weight.code_range)",
        "lsq.quantize(tiled, step, spec.weight.code_range, half_up=True)",
        oracle("ties-twos"),
    ),
    Fault(
        "ADCs of the definition round ties to even",
        "core/adc.py",
        "return lsq.quantize(psums, step, psum_ranges(spec), offset, half_up=True, **_gradient(spec))",
        "return lsq.quantize(psums, step, psum_ranges(spec), offset, half_up=False, **_gradient(spec))",
        oracle("ties-twos-reference"),
    ),
    Fault(
        "ADCs of dummy columns round ties to even",
        "core/adc.py",
        "lsq.quantize(sums, steps.reference, code_range, offset, half_up=True, **_gradient(spec))",
        "lsq.quantize(sums, steps.reference, code_range, offset, half_up=False, **_gradient(spec))",
        oracle("ties-offset-adc"),
    ),
    Fault(
        "the highest code is never given",
        "core/lsq.py",
        "inside = jnp.clip(u, bounds.q_min, bounds.q_max)",
        "inside = jnp.clip(u, bounds.q_min, bounds.q_max - 1)",
        ("test_lsq.py::test_a_ramp_reaches_exactly_the_codes_of_the_range",),
    ),
    Fault(
        "the sign of 0 is -1",
        "core/lsq.py",
        "jnp.where(distance >= 0, 1.0,",
        "jnp.where(distance > 0, 1.0,",
        ("test_lsq.py::test_the_sign_quantizer_gives_plus_one_at_zero_and_minus_one_just_below",),
    ),
    Fault(
        "the ends of a range count as outside",
        "core/lsq.py",
        "jnp.logical_and(bounds.low <= u, u <= bounds.high)",
        "jnp.logical_and(bounds.low < u, u < bounds.high)",
        ("test_lsq.py::test_both_ends_of_the_range_are_inside",),
    ),
    Fault(
        "the step's gradient has the other sign",
        "core/lsq.py",
        "sum_to_shape(-rest * to_x, step.shape)",
        "sum_to_shape(rest * to_x, step.shape)",
        ("test_lsq.py::test_gradients_are_those_of_the_definition",),
    ),
    Fault(
        "the offset gets no gradient",
        "core/lsq.py",
        "else sum_to_shape(-to_x, offset.shape)",
        "else sum_to_shape(0 * to_x, offset.shape)",
        ("test_lsq.py::test_gradients_are_those_of_the_definition",),
    ),
    Fault(
        "gradient_margin is ignored",
        "core/lsq.py",
        "np.where(sign, np.float32(0), np.float32(margin))",
        "np.float32(0) * np.where(sign, np.float32(0), np.float32(margin))",
        oracle("adc-3-margin"),
    ),
    Fault(
        "the step of a signed bit starts at twice the mean magnitude",
        "core/calibration/ladder.py",
        "size).binary, 1.0, 2.0)",
        "size).binary, 2.0, 2.0)",
        ("test_calibration.py::test_the_magnitude_start_of_one_bit_is_the_mean_magnitude",),
    ),
    Fault(
        "bumps at outer thresholds are repeated beyond them",
        "core/lsq.py",
        "jnp.clip(jnp.floor(u) + 0.5, bounds.q_min + 0.5, bounds.q_max - 0.5)",
        "jnp.floor(u) + 0.5",
        ("test_lsq.py::test_bumps_pass_gradients_around_thresholds",),
    ),
    Fault(
        "the bump of a sign is as high as those of other codes",
        "core/lsq.py",
        "jnp.where(bounds.sign, 2.0, 1.0) * gradient",
        "gradient",
        ("test_lsq.py::test_bumps_pass_as_much_as_the_stair_is_high",),
    ),
    Fault(
        "with bumps an offset gets all that codes do not pass in a window",
        "core/programs/ladders.py",
        "if bounds.bumps is None:",
        "if True:",
        oracle("adc-2-bumps-offset"),
    ),
    Fault(
        "the gain behind an ADC is left out",
        "core/readout.py",
        "scale if steps.gain is None else",
        "scale if True else",
        oracle("adc-3-gain"),
    ),
    Fault(
        "a gain is shared by all column tiles",
        "core/readout.py",
        "expand_outputs(steps.gain, tiling)",
        "steps.gain[..., :1]",
        oracle("adc-3-gain"),
    ),
    Fault(
        "gradients of 1-bit ADCs reach beyond their codes",
        "core/lsq.py",
        "np.where(sign, np.float32(0), np.float32(margin))",
        "np.float32(margin) + 0 * sign",
        ("test_lsq.py::test_a_margin_reaches_beyond_codes_but_not_of_a_sign",),
    ),
    Fault(
        "scale_gradient scales nothing",
        "core/lsq.py",
        "(tangents[0] * factor).astype(tangents[0].dtype)",
        "tangents[0]",
        ("test_lsq.py::test_scale_gradient_scales_only_the_gradient",),
    ),
    Fault(
        "a step at its limit is stuck",
        "core/lsq.py",
        "return jnp.exp(straight_through(lambda x: jnp.clip(x, -LOG_STEP_LIMIT, LOG_STEP_LIMIT), log_step))",
        "return jnp.exp(jnp.clip(log_step, -LOG_STEP_LIMIT, LOG_STEP_LIMIT))",
        ("test_lsq.py::test_a_stored_step_is_positive_and_its_gradient_passes_the_clip",),
    ),
    Fault(
        "powers of two stop gradients",
        "core/lsq.py",
        "return straight_through(_power_of_two, scale_gradient(step, _power_of_two(step) / step))",
        "return _power_of_two(step)",
        ("test_lsq.py::test_powers_of_two_pass_the_gradient_of_the_logarithm",),
    ),
    Fault(
        "reciprocals are as the division gives them",
        "core/reciprocal.py",
        "best, least = jnp.where(distance < least, candidate, best), jnp.minimum(distance, least)",
        "best, least = best, jnp.minimum(distance, least)",
        ("test_lsq.py::test_reciprocals_are_the_nearest_whatever_the_division_gives",),
    ),
]

ENCODING = [
    Fault(
        "an ADC of 1.5 bits has four codes",
        "spec/codes.py",
        "CodeRange(0, 2, 3)",
        "CodeRange(0, 3, 4)",
        ("test_spec.py::test_code_ranges_are_those_of_the_table",),
    ),
    Fault(
        "the top plane counts with the wrong sign",
        "spec/codes.py",
        "Plane(-top.significance, 0, 1)",
        "Plane(top.significance, 0, 1)",
        ("test_spec.py::test_planes_of_the_papers_code_and_of_slices",),
    ),
    Fault(
        "the last plane is dropped",
        "core/encoding.py",
        "    return jnp.stack(digits)\n",
        "    return jnp.stack([*digits[:-1], 0 * digits[-1]])\n",
        ("test_encoding.py::test_encode_and_decode_are_inverse_for_every_code",),
    ),
    Fault(
        "offset codes are shifted the wrong way",
        "core/encoding.py",
        "_digit(q - spec.constant, plane)",
        "_digit(q + spec.constant, plane)",
        ("test_encoding.py::test_encode_and_decode_are_inverse_for_every_code",),
    ),
    Fault(
        "a differential code hears both signs' planes",
        "core/encoding.py",
        "sign * plane.significance >= 0",
        "True",
        ("test_encoding.py::test_a_differential_code_hears_only_the_planes_of_its_sign",),
    ),
    Fault(
        "plus and minus planes are exchanged for gradients",
        "core/encoding.py",
        "jnp.where(codes > 0, plus, jnp.where(codes < 0, minus,",
        "jnp.where(codes < 0, plus, jnp.where(codes > 0, minus,",
        oracle("encoding-diff-digital-1-joined"),
    ),
    Fault(
        "planes' gradients are added instead of averaged",
        "core/encoding.py",
        "return [count / sum(counts) for count in counts]",
        "return [count / 1 for count in counts]",
        oracle("encoding-twos-narrow-top-joined"),
    ),
    Fault(
        "slices' gradients are added instead of averaged",
        "core/encoding.py",
        "strict=True)) / len(planes),)",
        "strict=True)),)",
        oracle("slices-sliced-uneven-twos-wide-top"),
    ),
    Fault(
        "the sum of learned steps is not the nearest",
        "core/learned_scales.py",
        "jnp.argmin(jnp.abs(x - sums), axis=0)",
        "jnp.argmin(jnp.abs(x - sums[: len(sums) - 1]), axis=0)",
        ("test_learned_scales.py::test_no_other_sum_is_nearer",),
    ),
    Fault(
        "each learned step answers for the whole residual",
        "core/learned_scales.py",
        "rest * step_reciprocal / planes",
        "rest * step_reciprocal",
        ("test_learned_scales.py::test_a_weight_passes_its_gradient_and_a_step_gets_its_part_of_the_residual",),
    ),
    Fault(
        "learned steps start alike",
        "core/calibration/steps.py",
        "per_plane *= np.exp2",
        "per_plane *= 1 + 0 * np.exp2",
        ("test_learned_scales.py::test_each_step_starts_at_twice_the_one_below_and_weights_are_kept_well",),
    ),
    Fault(
        "gradients of planes with steps of their own are added",
        "core/encoding.py",
        "jnp.stack([share * g for share, g",
        "jnp.stack([len(row) * share * g for share, g",
        oracle("encoding-twos-planes"),
    ),
]

ARRAYS = [
    Fault(
        "rows that store nothing hold the digits of code 0",
        "core/cells.py",
        "jnp.where(tiling.stored[..., None], encoding.encode(codes, spec.weight), 0)",
        "encoding.encode(codes, spec.weight)",
        ("test_properties.py::test_places_that_store_nothing_have_neither_code_nor_digit",),
    ),
    Fault(
        "places that store nothing have a code",
        "core/cells.py",
        "return jnp.where(tiling.stored[..., None], codes, 0)",
        "return codes",
        ("test_properties.py::test_places_that_store_nothing_have_neither_code_nor_digit",),
    ),
    Fault(
        "read groups ignore active_rows",
        "core/tiling.py",
        "_cut(array, spec.array.rows_per_read, area, spec.array)",
        "_cut(array, spec.array.rows, area, spec.array)",
        ("test_tiling.py::test_packed_fills_arrays_and_balanced_spreads_channels",),
    ),
    Fault(
        "larger tiles come last",
        "core/tiling.py",
        "(index < channels % tiles)",
        "(index >= tiles - channels % tiles)",
        ("test_tiling.py::test_packed_fills_arrays_and_balanced_spreads_channels",),
    ),
    Fault(
        "the last tile of channels is one short",
        "core/tiling.py",
        "bounds = [area * c for c in (*range(0, channels, fit), channels)]",
        "bounds = [area * c for c in (*range(0, channels, fit), max(channels - 1, 1))]",
        ("test_tiling.py::test_packed_fills_arrays_and_balanced_spreads_channels",),
    ),
    Fault(
        "the last tile is driven by the first channels",
        "core/tiling.py",
        "    index = tiling.channels.reshape(-1)\n",
        "    index = np.vstack([tiling.channels[:-1], np.arange(tiling.channels.shape[1])]).reshape(-1)\n",
        ("test_tiling.py::test_every_weight_is_stored_once_in_an_array_that_holds_it",),
    ),
    Fault(
        "a dummy column drives its undriven rows",
        "core/cells.py",
        "reference = jnp.asarray(tiling.stored, jnp.float32)",
        "reference = jnp.ones(tiling.stored.shape, jnp.float32)",
        ("test_properties.py::test_places_that_store_nothing_have_neither_code_nor_digit",),
    ),
    Fault(
        "an array's weight step and a column's are exchanged",
        "core/step_sizes.py",
        "        Granularity.ARRAY: (tiling.arrays, tiling.column_tiles),\n"
        "        Granularity.COLUMN: (tiling.arrays, tiling.features),",
        "        Granularity.COLUMN: (tiling.arrays, tiling.column_tiles),\n"
        "        Granularity.ARRAY: (tiling.arrays, tiling.features),",
        ("test_layers.py::test_parameters_are_named_and_shaped_as_documented",),
    ),
    Fault(
        "an array's psum step and a column's are exchanged",
        "core/step_sizes.py",
        "        Granularity.ARRAY: (tiling.groups, 1, tiling.column_tiles),\n"
        "        Granularity.COLUMN: (tiling.groups, planes, tiling.features),",
        "        Granularity.COLUMN: (tiling.groups, 1, tiling.column_tiles),\n"
        "        Granularity.ARRAY: (tiling.groups, planes, tiling.features),",
        ("test_layers.py::test_parameters_are_named_and_shaped_as_documented",),
    ),
    Fault(
        "read groups take the weight steps of other arrays",
        "core/step_sizes.py",
        "jnp.take(per_plane, tiling.array_of_group, axis=0)",
        "jnp.take(per_plane, tiling.array_of_group[::-1], axis=0)",
        oracle("tiling-packed-read-twos"),
    ),
    Fault(
        "outputs take the steps of other column tiles",
        "core/step_sizes.py",
        "jnp.take(step, tiling.column_tile_of_output, axis=-1)",
        "jnp.take(step, tiling.column_tile_of_output[::-1], axis=-1)",
        oracle("pair-array-layer"),
    ),
]

CONVERSION = [
    Fault(
        "dummy columns have no ADC",
        "core/adc.py",
        "if spec.adc is None or spec.weight.reference != Reference.ADC:",
        "if True:",
        oracle("encoding-offset-adc-1"),
    ),
    Fault(
        "the definition forgets an offset's constant",
        "core/readout.py",
        "if read.reference is None:",
        "if True:",
        oracle("encoding-offset-ideal-reference"),
    ),
    Fault(
        "an offset's constant has the other sign",
        "core/readout.py",
        "* spec.weight.constant",
        "* -spec.weight.constant",
        oracle("encoding-offset"),
    ),
    Fault(
        "slices all count the same",
        "core/readout.py",
        "[part.significance for part in spec.activation.slices]",
        "[1 for part in spec.activation.slices]",
        oracle("slices-sliced-uneven-twos-wide-top"),
    ),
    Fault(
        "an offset's constant takes the lowest plane's step",
        "core/readout.py",
        "expand_weight(steps.weight, tiling)[:, -1]",
        "expand_weight(steps.weight, tiling)[:, 0]",
        oracle("encoding-offset-planes"),
    ),
    Fault(
        "what is half a step beyond the ladder counts as saturated nowhere",
        "core/adc.py",
        "(u > code_range.q_max + margin)",
        "(u > code_range.q_max + margin + 1e9)",
        ("test_adc.py",),
    ),
    Fault(
        "codes used are those of any column",
        "core/adc.py",
        "axis=(0, 1)), jnp.asarray(values))",
        "axis=(0, 1, 2, 3, 4), keepdims=True)[0, 0], jnp.asarray(values))",
        ("test_adc.py",),
    ),
]

STEPS = [
    Fault(
        "weight steps' gradients have no factor",
        "core/step_sizes.py",
        "lsq.step_from_log(lsq.scale_gradient(stored.weight, factors.weight))",
        "lsq.step_from_log(stored.weight)",
        ("test_step_sizes.py::test_every_stored_step_gets_its_gradient_times_its_factor_once",),
    ),
    Fault(
        "activation and psum steps' gradients have their factor twice",
        "core/step_sizes.py",
        "lsq.step_from_log(lsq.scale_gradient(jnp.asarray(log_step, jnp.float32), factor))",
        "lsq.step_from_log(lsq.scale_gradient(jnp.asarray(log_step, jnp.float32), factor * factor))",
        ("test_step_sizes.py::test_every_stored_step_gets_its_gradient_times_its_factor_once",),
    ),
    Fault(
        "offsets' gradients have no factor",
        "core/step_sizes.py",
        "lsq.offset_in_limits(lsq.scale_gradient(zeta, factor))",
        "lsq.offset_in_limits(zeta)",
        ("test_step_sizes.py::test_every_stored_step_gets_its_gradient_times_its_factor_once",),
    ),
    Fault(
        "gradient factors forget the slices",
        "core/step_sizes.py",
        "_columns_sharing(tiling, spec) * slices * output_size",
        "_columns_sharing(tiling, spec) * output_size",
        ("test_calibration.py::test_gradient_factors_count_what_shares_a_step",),
    ),
    Fault(
        "a ladder widens from its lowest code",
        "core/step_sizes.py",
        "* unit - step * middle",
        "* unit - jax.lax.stop_gradient(step) * middle",
        ("test_calibration.py::test_gradients_of_a_ladder_beyond_its_ends_are_the_derivatives_of_its_values",),
    ),
    Fault(
        "calibrated steps are trained",
        "core/step_sizes.py",
        "return jax.lax.stop_gradient(step) if kind == StepKind.CALIBRATED else step",
        "return step",
        ("test_step_sizes.py::test_every_stored_step_gets_its_gradient_times_its_factor_once",),
    ),
    Fault(
        "calibrated offsets are trained",
        "core/step_sizes.py",
        "return (step, offset) if adc.trainable else jax.lax.stop_gradient((step, offset))",
        "return step, offset",
        ("test_step_sizes.py::test_every_stored_step_gets_its_gradient_times_its_factor_once",),
    ),
    Fault(
        "a fixed step is one code too small",
        "core/step_sizes.py",
        "spec.adc.full_scale / (spec.adc_ranges[0][0].size - 1)",
        "spec.adc.full_scale / spec.adc_ranges[0][0].size",
        ("test_calibration.py::test_power_of_two_and_fixed_steps_are_kept_to_while_searching",),
    ),
    Fault(
        "powers of two are not kept to",
        "core/step_sizes.py",
        "if kind == StepKind.POWER_OF_TWO:",
        "if kind is None:",
        ("test_step_sizes.py::test_steps_of_powers_of_two_are_such_however_they_are_stored",),
    ),
]

VARIATION = [
    Fault(
        "varied digits are quantized again",
        "core/cells.py",
        "digits = variation.vary(digits, key, tiling, spec.variation)",
        "digits = jnp.rint(variation.vary(digits, key, tiling, spec.variation))",
        ("test_variation.py::test_factors_are_log_normal_with_median_one",),
    ),
    Fault(
        "varied sums are rounded",
        "core/array_mac.py",
        "return sums if spec.variation is not None else straight_through(jnp.rint, sums)",
        "return straight_through(jnp.rint, sums)",
        ("test_programs.py::test_without_adcs_cells_vary_as_the_definition_has_it[offset-adc]",),
    ),
    Fault(
        "zero digits vary",
        "core/variation.py",
        "return digits * jnp.exp(spec.sigma * theta)",
        "return digits + jnp.exp(spec.sigma * theta) - 1",
        ("test_variation.py::test_zero_digits_stay_zero_and_weights_share_their_factor",),
    ),
    Fault(
        "the cells of a weight share their factor",
        "core/variation.py",
        "theta = jax.random.normal(key, digits.shape, jnp.float32)",
        "theta = jax.random.normal(key, digits.shape[1:], jnp.float32)",
        ("test_variation.py::test_zero_digits_stay_zero_and_weights_share_their_factor",),
    ),
    Fault(
        "dummy columns vary with weights",
        "core/variation.py",
        "if spec.on != VariationTarget.CELLS:\n        return digits",
        "if spec.on == 0:\n        return digits",
        ("test_variation.py::test_dummy_columns_vary_as_cells_only",),
    ),
]

CALIBRATION = [
    Fault(
        "the search keeps the worse ladder",
        "core/calibration/ladder.py",
        "better = error < best.error",
        "better = error > best.error",
        ("test_calibration.py::test_with_an_offset_every_code_is_used_on_one_sided_psums",),
    ),
    Fault(
        "ladders are placed at the mean alone",
        "core/calibration/ladder.py",
        "centre = jnp.where(is_across, low + half + place * (high - low - 2 * half), mean + place * spread)",
        "centre = jnp.where(is_across, mean, mean)",
        ("test_calibration.py::test_ladders_come_within_a_tenth_of_the_best_error_of_brute_force[False-True-2]",),
    ),
    Fault(
        "ladders are not refined",
        "core/calibration/ladder.py",
        "return self.keep_better(best, step, mean_value - step * mean_code)",
        "return best",
        tuple(
            f"test_calibration.py::test_ladders_come_within_a_tenth_of_the_best_error_of_brute_force[{ladder}]"
            for ladder in ("False-True-2", "True-True-3")
        ),
    ),
    Fault(
        "planes count alike when ladders are searched",
        "core/calibration/steps.py",
        "weight = jnp.square(slices * planes * (step / jnp.max(step)))",
        "weight = jnp.square(slices * (planes * 0 + 1) * (step / jnp.max(step)))",
        (
            "test_calibration.py::test_every_group_is_fitted_on_its_own_psums_by_weight[layer-True]",
            "test_calibration.py::test_every_group_is_fitted_on_its_own_psums_by_weight[array-False]",
        ),
    ),
    Fault(
        "samples are those of another window",
        "core/window.py",
        "index.append(first + inside * window.kernel_dilation[axis])",
        "index.append(first + inside)",
        ("test_calibration.py::test_the_positions_looked_at_have_the_partial_sums_that_all_have",),
    ),
    Fault(
        "weights start at half of LSQ's step",
        "core/calibration/steps.py",
        "2.0 * mean / math.sqrt(codes.magnitude)",
        "mean / math.sqrt(codes.magnitude)",
        ("test_calibration.py::test_weight_steps_are_the_mean_magnitude_of_the_weights_that_a_group_has",),
    ),
    Fault(
        "a group that sees nothing gets a step of 0",
        "core/calibration/ladder.py",
        "silent = grouping.largest(jnp.max(jnp.abs(values), axis=(0, 1))) == 0",
        "silent = grouping.largest(jnp.max(jnp.abs(values), axis=(0, 1))) < 0",
        ("test_calibration.py::test_a_silent_group_gets_one_and_zero",),
    ),
    Fault(
        "what a layer's second call sets is dropped",
        "nn/calibrate.py",
        "jnp.where(calls == 0, value, mean)",
        "jnp.where(calls == 0, value, before)",
        ("test_calibrate_network.py::test_a_layer_called_several_times_gets_the_mean_of_what_each_call_sets[twice]",),
    ),
    Fault(
        "nothing is said of an input that is half lost",
        "nn/calibration_warnings.py",
        "if report.negative > MUCH_NEGATIVE:",
        "if report.negative > 1:",
        ("test_calibrate_network.py::test_what_data_cannot_tell_is_one_line_of_its_layer[negative]",),
    ),
]

PROGRAMS = [
    Fault(
        "without ADCs an offset's constant is lost",
        "core/programs/dequantized.py",
        "if arrays.reference is None:",
        "if True:",
        ("test_programs.py::test_without_adcs_cells_vary_as_the_definition_has_it[offset-adc]",),
    ),
    Fault(
        "without ADCs varied cells hold the codes they were made of",
        "core/programs/dequantized.py",
        "if spec.skips_decomposition:",
        "if not spec.weight.step_per_plane:",
        ("test_programs.py::test_without_adcs_cells_vary_as_the_definition_has_it[offset-adc]",),
    ),
    Fault(
        "without ADCs every read group has the first one's steps",
        "core/programs/dequantized.py",
        "arrays.codes * expand_weight(steps.weight, tiling)",
        "arrays.codes * expand_weight(steps.weight, tiling)[:1]",
        ("test_programs.py::test_without_adcs_a_layer_is_one_convolution[offset-adc]",),
    ),
    Fault(
        "partial sums are kept in 16 bits that do not fit",
        "core/programs/joined.py",
        "SMALL_INTEGERS = 2**15 - 1",
        "SMALL_INTEGERS = 2**30",
        oracle("large-psums-joined"),
    ),
    Fault(
        "the loop over read groups keeps the last one alone",
        "core/programs/joined.py",
        "return total + slice_adc.read(",
        "return slice_adc.read(",
        oracle("macro-diff-digital"),
    ),
    Fault(
        "a kernel's program keeps its last block alone",
        "core/programs/pallas_backward.py",
        "jax.tree.map(jnp.add, carry, (added, products))",
        "(added, products)",
        ("test_programs.py::test_a_kernel_of_several_blocks_adds_them_up",),
    ),
    Fault(
        "kernels multiply gradients in bfloat16",
        "core/programs/pallas_backward.py",
        "for _ in range(3):",
        "for _ in range(1):",
        ("test_programs.py::test_a_kernel_of_several_blocks_adds_them_up",),
    ),
    Fault(
        "a kernel takes what lies between two strides for a place it meets",
        "core/programs/pallas_backward.py",
        " & (lax.rem(first, stride) == 0)",
        "",
        ("test_programs.py::test_the_fused_kernel_equals_the_oracle_on_a_row_or_two[window-stride-2-twos]",),
    ),
    Fault(
        "int8 operands hide what is no number",
        "core/programs/products.py",
        "part.astype(jnp.float32) + _missing(inputs, columns)",
        "part.astype(jnp.float32)",
        ("test_programs.py::test_what_is_no_number_stays_none_in_cheap_operands[int8]",),
    ),
    Fault(
        "cheap operands are taken where they are not exact",
        "core/programs/contract.py",
        "spec.largest_operand <= operands.largest_integer",
        "spec.largest_operand <= 2 * operands.largest_integer**2",
        ("test_programs.py::test_operands_hold_the_integers_that_they_claim",),
    ),
    Fault(
        "a program is that of the machine it is traced on",
        "core/programs/platforms.py",
        'chosen.get(platform) or chosen["default"]',
        'chosen.get(jax.default_backend()) or chosen["default"]',
        ("test_programs.py::test_the_row_of_the_platform_is_lowered_and_no_other",),
    ),
]

HARDWARE = [
    Fault(
        "read groups cost no multiplication",
        "hardware/cost.py",
        "outputs * (1 if _one_factor(spec) else groups) *",
        "outputs * (1 if _one_factor(spec) else 1) *",
        ("test_cost.py",),
    ),
    Fault(
        "a digital reference costs nothing",
        "hardware/cost.py",
        "return count + outputs * (1 if layer_wide else groups)",
        "return count",
        ("test_cost.py",),
    ),
    Fault(
        "conversions forget the slices",
        "hardware/cost.py",
        "conversions = slices * groups *",
        "conversions = groups *",
        ("test_cost.py",),
    ),
    Fault(
        "dummy columns need no conversion",
        "hardware/cost.py",
        "(outputs * planes + dummies)",
        "(outputs * planes)",
        ("test_cost.py",),
    ),
    Fault(
        "a loop's layers are counted once",
        "hardware/survey.py",
        'inside = turns * step.params["length"]',
        "inside = turns",
        ("test_survey.py::test_layers_in_lifted_transforms_are_counted_as_often_as_they_run",),
    ),
]


def frozen(*names: str) -> tuple[str, ...]:
    """Rows of the contract table that the quick tier freezes."""
    test = "test_conversions_are_the_oracles_and_outputs_too_but_for_rounded_factors"
    return tuple(f"test_freeze.py::{test}[{name}]" for name in names)


FROZEN = [
    Fault(
        "a threshold lies one partial sum too high",
        "hardware/thresholds.py",
        "ADCTable(np.moveaxis(high, 1, -1)",
        "ADCTable(np.moveaxis(high + 1, 1, -1)",
        frozen("adc-1-signed-offset"),
    ),
    Fault(
        "offsets of ADCs are counted for one slice",
        "hardware/factors.py",
        "slices, added = readout.slice_significances(spec).sum(), np.zeros(tiling.features)",
        "slices, added = 1.0, np.zeros(tiling.features)",
        frozen("macro-twos-column"),
    ),
    Fault(
        "plus and minus cells change places",
        "hardware/freeze.py",
        "held[array, tiling.column_tile_of_output, row, plus] = np.maximum(digit, 0)",
        "held[array, tiling.column_tile_of_output, row, plus] = np.maximum(-digit, 0)",
        frozen("adc-1-signed-offset"),
    ),
    Fault(
        "accumulators may leave an int32",
        "hardware/factors.py",
        "if found.largest_total(reach) <= INT32:",
        "if True:",
        ("test_freeze.py::test_accumulators_fit_int32_or_the_layer_is_refused_with_what_fits",),
    ),
    Fault(
        "the chip's integers are not what later layers see",
        "hardware/on_chip.py",
        "if not feeds_on:",
        "if True:",
        ("test_freeze.py::test_more_bits_of_factors_come_nearer",),
    ),
    Fault(
        "codes that fall with a value rise with it",
        "hardware/network/rounding.py",
        "sign = np.where(ends[1] < ends[0], -1, 1)",
        "sign = np.where(ends[1] < ends[0], 1, 1)",
        ("test_integer_network.py::test_codes_at_every_edge_are_those_of_the_quantizer",),
    ),
    Fault(
        "normalization is left out of a layer's factors",
        "hardware/network/fold.py",
        'scaled = real.scaled(node.fields["step"] * factor, added)',
        'scaled = real.scaled(node.fields["step"], added)',
        ("test_integer_network.py::test_what_may_stand_between_array_layers[factors]",),
    ),
    Fault(
        "integers of a network may leave an int32",
        "hardware/network/units.py",
        "_ROOM = 0.98 * INT32",
        "_ROOM = 8.0 * INT32",
        ("test_integer_network.py::test_what_may_stand_between_array_layers[a sum]",),
    ),
    Fault(
        "what enters is not cut off",
        "hardware/network/operations.py",
        "value = np.clip(np.asarray(entries[step.operation.number]), -most, most)",
        "value = np.asarray(entries[step.operation.number])",
        ("test_integer_network.py::test_what_may_stand_between_array_layers[a sum]",),
    ),
    Fault(
        "the largest value of a window may be its padding",
        "hardware/network/operations.py",
        "constant_values=-INT32 if largest else 0",
        "constant_values=0",
        ("test_integer_network.py::test_what_may_stand_between_array_layers[largest of negatives]",),
    ),
]

LAYERS = [
    Fault(
        "a layer forgets its bias",
        "nn/layers.py",
        'y = y + self.param("bias", self.bias_init, (self.features,), self.param_dtype)\n'
        "        return y.reshape(*batch",
        'self.param("bias", self.bias_init, (self.features,), self.param_dtype)\n        return y.reshape(*batch',
        ("test_layers.py::test_pretrained_weights_of_flax_drop_in",),
    ),
    Fault(
        "a fork goes on from the last state of the other run",
        "training/forking.py",
        "checkpoints.restore(common, step=step, passes_over=_of_adcs)",
        "checkpoints.restore(common, passes_over=_of_adcs)",
        ("test_forking.py::test_a_fork_comes_to_what_a_run_by_itself_comes_to[adc_bits=2]",),
    ),
    Fault(
        "what is set before training depends on ADCs that come later",
        "training/experiment.py",
        "first = self.setup_in(0)",
        "first = self.setup",
        ("test_forking.py::test_steps_that_are_set_before_training_know_nothing_of_adcs_that_come_later",),
    ),
    Fault(
        "a run of other ADCs from an earlier epoch on can be forked",
        "training/forking.py",
        "if ideal is not None and ideal < epochs:",
        "if False:",
        ("test_forking.py::test_a_run_with_adcs_too_soon_cannot_be_forked",),
    ),
    Fault(
        "ADCs stay on where they should be ideal",
        "nn/ideal.py",
        "dataclasses.replace(spec, adc=None) if _ideal.value else spec",
        "spec",
        ("test_training.py::test_networks_of_ones_own_have_ideal_adcs_too",),
    ),
    Fault(
        "a dense layer's positions are not counted",
        "nn/layers.py",
        "positions = math.prod(leading[1:])",
        "positions = 1",
        ("test_layers.py::test_a_dense_layer_of_several_positions_learns_as_a_convolution_of_one_pixel",),
    ),
    Fault(
        "what several layers read is quantized by each",
        "nn/rules.py",
        'return Quantize(activation, name="quantize")(x)',
        "return x",
        ("test_models.py::test_a_tensor_that_two_layers_read_is_quantized_once",),
    ),
    Fault(
        "a network inside a converted one is converted anew",
        "nn/convert.py",
        "nearest = _converting.value == how",
        "nearest = True",
        ("test_convert.py::test_a_converted_network_stays_so_inside_another",),
    ),
    Fault(
        "functions that are applied to a converted network pass the arrays by",
        "nn/convert.py",
        'own or name in ("__call__", "apply", "init_with_output")',
        'own or name == "__call__"',
        ("test_convert.py::test_every_way_to_call_the_network_goes_through_arrays",),
    ),
    Fault(
        "a layer that arrays stand in for is counted beside them",
        "hardware/survey.py",
        "if calls[0] > before:",
        "if False:",
        ("test_convert.py::test_a_converted_network_is_the_one_written_with_array_layers[layers of setup]",),
    ),
    Fault(
        "steps that are missing and not set stay at one",
        "nn/calibrate.py",
        "if trained_as(path) not in kinds",
        "if False",
        ("test_convert.py::test_the_variables_of_full_precision_are_calibrated_as_they_are[layers of setup]",),
    ),
]

TRAINING = [
    Fault(
        "processes stop where the first of them has been asked",
        "training/processes/agreement.py",
        "max(map(int, said.values()))",
        "min(map(int, said.values()))",
        ("test_processes.py::test_processes_agree_on_where_to_stop",),
    ),
    Fault(
        "every process evaluates the first share of a batch",
        "data/reading.py",
        "range(mine.start, len(split), batch_size)",
        "range(0, len(split), batch_size)",
        ("test_streams.py::test_shares_of_evaluation_are_the_whole_batches",),
    ),
    Fault(
        "more states are kept than were wanted",
        "training/run/checkpoint.py",
        "saves[-self._keep :]",
        "saves[-2:]",
        ("test_checkpoint.py::test_as_many_as_wanted_are_kept",),
    ),
    Fault(
        "decay touches steps",
        "training/optimizer.py",
        'lambda path: kind_of(path) == "kernel")',
        "lambda path: True)",
        ("test_training.py::test_decay_touches_kernels_only_and_steps_have_their_own_rate",),
    ),
    Fault(
        "every epoch has the same order",
        "training/batches.py",
        "stream_key(seed, Stream.ORDER, epoch)",
        "stream_key(seed, Stream.ORDER, 0)",
        ("test_training.py::test_order_and_augmentation_are_functions_of_seed_and_step",),
    ),
    Fault(
        "every step augments alike",
        "training/batches.py",
        "stream_key(state.seed, Stream.AUGMENTATION, state.step), size",
        "stream_key(state.seed, Stream.AUGMENTATION, 0), size",
        ("test_training.py::test_every_step_takes_the_next_images_and_augments_them_in_its_own_way",),
    ),
    Fault(
        "an epoch begins at any place of its order",
        "training/batches.py",
        "position = state.step % (labels.shape[0] // self.size)",
        "position = state.step % (labels.shape[0] // self.size + 1)",
        ("test_training.py::test_every_step_takes_the_next_images_and_augments_them_in_its_own_way",),
    ),
    Fault(
        "all purposes share their keys",
        "training/random_streams.py",
        "jax.random.fold_in(jax.random.key(seed), stream)",
        "jax.random.fold_in(jax.random.key(seed), 0)",
        ("test_random_streams.py::test_no_two_purposes_share_a_key",),
    ),
    Fault(
        "a step is part of no key of its stream",
        "training/random_streams.py",
        "for number in counted:",
        "for number in counted[1:]:",
        ("test_random_streams.py::test_no_two_purposes_share_a_key",),
    ),
    Fault(
        "a resumed run has another order",
        "training/batches.py",
        "put(order_of_epoch(self.seed, epoch, images))",
        "put(order_of_epoch(self.seed, step, images))",
        ("test_training.py::test_a_run_stopped_within_an_epoch_ends_with_the_numbers_of_one_that_was_not",),
    ),
    Fault(
        "a resumed run forgets what it saw of the epoch",
        "training/begin.py",
        'extra["best"], extra["seen"]',
        'extra["best"], {}',
        ("test_training.py::test_a_run_stopped_within_an_epoch_ends_with_the_numbers_of_one_that_was_not",),
    ),
    Fault(
        "batch statistics are taken of one batch again and again",
        "training/batch_norm.py",
        "state.replace(step=state.step + 1), jax.tree.map",
        "state, jax.tree.map",
        ("test_batch_norm.py::test_many_batches_are_averaged_as_training_augments_them",),
    ),
    Fault(
        "a layer that is called again is another chip",
        "nn/layers.py",
        'counts["variation"] = before',
        "pass",
        ("test_variation.py::test_a_layer_that_is_called_twice_is_one_chip",),
    ),
    Fault(
        "codes that enter are cut off where those seen end",
        "hardware/network/fold.py",
        'float(node.fields["largest"])',
        'float(np.abs(node.fields["value"]).max())',
        ("test_integer_network.py::test_codes_that_enter_may_be_larger_than_those_it_was_made_with",),
    ),
    Fault(
        "a layer is moved over every input as over the first",
        "hardware/freeze.py",
        "return self if window == self.window else dataclasses.replace(self, window=window)",
        "return self",
        ("test_integer_network.py::test_a_layer_is_moved_over_every_input_as_the_network_moves_it",),
    ),
    Fault(
        "statistics of batches count alike however many images they have",
        "nn/batch_norm.py",
        "value * count, found",
        "value * 1, found",
        ("test_batch_norm.py::test_a_network_is_given_those_of_batches_weighted_by_their_images",),
    ),
    Fault(
        "second derivatives are derived from what is not differentiable",
        "core/conv.py",
        "return differentiable_once(x) if jnp.issubdtype(x.dtype, jnp.floating) else x",
        "return x",
        ("test_layers.py::test_second_derivatives_are_refused_in_one_line[reference]",),
    ),
    Fault(
        "images that pad a batch count",
        "training/train_step.py",
        "jnp.sum(right & real)",
        "jnp.sum(right)",
        ("test_training.py::test_evaluation_counts_every_image_once",),
    ),
    Fault(
        "the best state is the last one",
        "training/run/checkpoint.py",
        "[save for save in saves if save.best][:1]",
        "saves[:1]",
        ("test_checkpoint.py::test_the_last_and_the_best_are_kept",),
    ),
    Fault(
        "arrays are not held against their checksums",
        "training/run/seal.py",
        "if _digest_of(leaves[name]) != digest:",
        "if False:",
        ("test_checkpoint.py::test_a_damaged_state_is_replaced_by_the_one_before_it_with_a_warning",),
    ),
    Fault(
        "what stands beside the arrays is not held against its checksum",
        "training/run/seal.py",
        'if found.get("seal") != seal_of(content):',
        "if False:",
        ("test_checkpoint.py::test_every_bit_of_what_stands_beside_the_arrays_counts",),
    ),
    Fault(
        "a save of another name is swept",
        "training/run/checkpoint.py",
        "SAVE_NAME.fullmatch(path.name) and path not in kept",
        "SAVE_NAME.match(path.name) and path not in kept",
        ("test_checkpoint.py::test_what_killed_processes_leave_is_passed_over_and_swept",),
    ),
    Fault(
        "lost records are not missed",
        "training/run/records.py",
        "if not _is_mark(marked) or _begins_with(self._content(), marked):",
        "if True:",
        ("test_run_folder.py::test_the_metrics_are_taken_back_to_what_a_state_was_saved_with",),
    ),
    Fault(
        "the chip of an evaluation is another one",
        "training/evaluate.py",
        "chip_key(self.experiment.devices.here(state.seed)) if chip is None else chip",
        "jax.random.key(0) if chip is None else chip",
        ("test_training.py::test_evaluation_is_on_the_chip_of_the_run",),
    ),
    Fault(
        "with 64 bits the corner of a shifted image is of two types",
        "training/batches.py",
        "(corner[0], corner[1], jnp.int32(0))",
        "(corner[0], corner[1], 0)",
        ("test_64_bits.py::test_the_mathematics_layers_and_training_hold_with_64_bits",),
    ),
    Fault(
        "what is frozen is trained, and nothing else",
        "training/optimizer.py",
        "trained_as(path) in config.frozen",
        "trained_as(path) not in config.frozen",
        ("test_start.py::test_what_is_frozen_stays",),
    ),
    Fault(
        "steps of another quantizer are taken over",
        "nn/transfer.py",
        "return bool(built(here[layer], kind) == built(there[layer], kind))",
        "return True",
        ("test_start.py::test_steps_are_taken_where_what_they_quantize_is_built_alike",),
    ),
    Fault(
        "ADCs are set behind steps that give way to those of the run that is started from",
        "training/experiment.py",
        "calibrate_and_report(model, variables, images, **what, **mode)",
        "calibrate_and_report(model, variables, images, **{**what, 'kept': ()}, **mode)\n"
        "            variables = put_in(variables, given.steps)",
        ("test_start.py::test_adcs_are_set_behind_the_steps_that_were_taken",),
    ),
    Fault(
        "images on the host come in the order of the next epoch",
        "training/batches.py",
        "np.asarray(order_of_epoch(self.seed, epoch, images))",
        "np.asarray(order_of_epoch(self.seed, epoch + 1, images))",
        ("test_train_step.py::test_images_on_the_host_give_the_steps_of_images_on_the_device",),
    ),
    Fault(
        "a stream begins a batch too late where it goes on",
        "data/reading.py",
        "self._order.parts_from(step))",
        "self._order.parts_from(step + (step > 0)))",
        ("test_streams.py::test_the_batch_of_a_step_is_a_function_of_seed_and_step",),
    ),
    Fault(
        "every process of several reads the first share of a batch",
        "data/reading.py",
        "for start in range(first + mine.start, first + mine.stop, part):",
        "for start in range(first, first + mine.stop - mine.start, part):",
        ("test_streams.py::test_shares_put_together_are_the_whole_batch",),
    ),
    Fault(
        "random crops are as wide as high",
        "data/decoding.py",
        "math.exp(rng.uniform(low, high))",
        "1.0",
        ("test_streams.py::test_random_crops_are_as_published",),
    ),
    Fault(
        "a ladder by percentile covers everything",
        "core/calibration/ladder.py",
        "best = problem.covering(start, PERCENTILE)",
        "best = problem.covering(start)",
        ("test_calibration.py::test_the_percentile_of_a_ladder_leaves_out_the_outermost_psums",),
    ),
]

SCALE = [
    Fault(
        "a run that is preempted is asked twice to save, and loses its state",
        "analysis/cluster.py",
        "and not (once and self._asked)",
        "",
        ("test_cluster.py::test_a_job_that_outlives_its_sweep_is_taken_up",),
    ),
    Fault(
        "the averaged parameters are those of the last state",
        "training/restore.py",
        "state = state.replace(params=state.average, average=None)",
        "state = state.replace(average=None)",
        ("test_pack.py::test_the_averaged_parameters_are_evaluated_and_handed_on",),
    ),
    Fault(
        "a cancelled job is left before its run has saved",
        "analysis/cluster.py",
        "return None if self._asked and self._saves() else super().ended()",
        "return super().ended()",
        ("test_cluster.py::test_a_cancelled_job_has_ended_once_its_state_is_saved",),
    ),
    Fault(
        "a job that is queued again is forgotten",
        "analysis/cluster.py",
        "(self.output.parent / SAVED).touch()",
        "(self.output.parent / SAVED).touch(); (self.output.parent / JOB).unlink(missing_ok=True)",
        ("test_cluster.py::test_a_job_that_is_queued_again_can_still_be_taken_up",),
    ),
    Fault(
        "a job that goes on is submitted again",
        "analysis/cluster.py",
        "return self._shown(job, run) if waits_or_runs else None",
        "return None",
        ("test_cluster.py::test_a_job_that_outlives_its_sweep_is_taken_up",),
    ),
    Fault(
        "half a save counts in a bucket",
        "training/run/remote.py",
        "and save in ([save] if whole is None else whole))",
        ")",
        ("test_remote.py::test_a_save_that_is_half_there_does_not_count",),
    ),
    Fault(
        "a run that was taken for dead copies on",
        "training/run/remote.py",
        'return None if there.get("id") == self._id else str(there.get("owner"))',
        "return None",
        ("test_remote.py::test_a_run_that_lives_keeps_others_out_and_one_that_was_killed_does_not_for_long",),
    ),
    Fault(
        "layers of many read groups keep their partial sums on paper",
        "analysis/bench_paper.py",
        "layer.cost is not None and is_loop(execution, layer.cost.read_groups)",
        "layer.cost is not None and not is_loop(execution, layer.cost.read_groups)",
        ("test_bench_paper.py::test_partial_sums_are_the_conversions_and_their_traffic_follows_them",),
    ),
]

FAULTS = [
    *QUANTIZER,
    *ENCODING,
    *ARRAYS,
    *CONVERSION,
    *STEPS,
    *VARIATION,
    *CALIBRATION,
    *PROGRAMS,
    *HARDWARE,
    *FROZEN,
    *LAYERS,
    *TRAINING,
    *SCALE,
]
