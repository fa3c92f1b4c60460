"""A network in integers: normalization and all steps folded into factors and thresholds (3.8 of the design).

Every sum has units of its own, a power of two, as fine as an int32 allows whatever comes in. A layer's factors bring
its result into the units of what it is added to, and what comes in finer ones is shifted; codes come by thresholds on
the integers, so that nothing is rounded for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from cimjax.hardware.factors import INT32, MOST_BITS, check_bits, exponent_of_bits, int32
from cimjax.hardware.freeze import MOST_ADC_BITS, FrozenLayer, factors_of, freeze
from cimjax.hardware.network.nodes import Node, NotIntegersError
from cimjax.hardware.network.operations import Add, Entry, IntegerNetwork, Join, Operation, Product, Rescale, Step
from cimjax.hardware.network.rounding import adding, crossed, folded, function, limits, moved, terms
from cimjax.hardware.network.tracing import Graph, Layers
from cimjax.hardware.network.units import Unit, Value, choose, ordered

# Of the weights of a matrix product, and of factors that are multiplied with 64 bits.
_WEIGHT_BITS, _FACTOR_BITS = 10, 31
# What enters may be so many times as large as in the images that were seen, before it is cut off.
_ENTRY_MARGIN = 2.0
_HAVE_FACTORS = ("entry", "affine", "arrays", "product", "codes")
_REARRANGED = ("pick", "pad", "reshape", "transpose")


def integer_network(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: Any,
    *,
    factor_bits: int | None = None,
    frozen: Mapping[str, FrozenLayer] | None = None,
    **kwargs: Any,
) -> IntegerNetwork:
    """A network in integers from its first codes to its result.

    What stands before the first codes (a first convolution in full precision) is computed as the network has it, and
    rounded; a classifier in full precision behind array layers becomes a product of integers. On what comes in, cells,
    thresholds of ADCs and codes are exact; rounded are the factors behind ADCs, and what enters.

    Args:
      model, variables: a trained network with array layers.
      images: (N, H, W, C), of the size that it is used on; what enters may be twice as large as with these.
      factor_bits: of the factors behind ADCs, with their sign, 2 to 24; None for 24. Where their accumulators have no
        room for as many, they have fewer.
      frozen: what `cimjax.freeze` gives for this network, where it was done already.
      **kwargs: what `model.apply` takes besides, such as `train=False`.

    Raises:
      ValueError: as `cimjax.freeze`.
      NotIntegersError: a ValueError, for a network of which something behind array layers is no operation on integers
        (two results multiplied, a convolution in full precision, batch statistics of training, ...).
    """
    check_bits(factor_bits)
    images = _two_or_more(images)
    layers = Layers(freeze(model, variables, images[:1], **kwargs) if frozen is None else frozen)

    def network(images: Any) -> Any:
        return model.apply(variables, images, **kwargs)

    graph = Graph(network, layers, images)
    params = flax.traverse_util.flatten_dict(dict(variables["params"]), sep="/")
    plan = _Plan(params, MOST_BITS if factor_bits is None else factor_bits)
    # What comes first is planned first: each codes then find those before them.
    for node in ordered(graph.result):
        if node.kind == "codes":
            plan.codes(node)
    steps = plan.steps(plan.value(graph.result))
    places = [(graph.entries.index(node), exponent) for node, exponent in plan.entered()]

    def enter(images: Any) -> list[np.ndarray]:
        count = len(images)
        found = Graph(network, layers, _two_or_more(images)).entries
        arrays = [(np.asarray(found[place].fields["value"], np.float64)[:count], e) for place, e in places]
        return [int32(array, e) for array, e in arrays]

    return IntegerNetwork(steps, enter)


def _two_or_more(images: Any) -> Any:
    images = jnp.asarray(images)
    return jnp.concatenate([images, images]) if len(images) == 1 else images


class _Plan:
    """The steps of a graph, each planned once."""

    def __init__(self, params: Mapping[str, Any], bits: int) -> None:
        """Nothing is planned yet; `params` are those of all layers, "conv1/kernel"."""
        self._params, self._bits = params, bits
        self._values: dict[tuple[Node, bool], Value] = {}
        self._entries: list[tuple[Node, Value]] = []

    def value(self, node: Node) -> Value:
        """A tensor in integers of some unit."""
        return self._planned(node, codes=False)

    def codes(self, node: Node) -> Value:
        """A tensor of codes."""
        return self._planned(node, codes=True)

    def entered(self) -> list[tuple[Node, int]]:
        """What enters, in the order of the entries' numbers, and the exponents that it enters with."""
        return [(node, value.exponent) for node, value in self._entries]

    def steps(self, result: Value) -> tuple[Step, ...]:
        """The steps up to a result."""
        values: list[Value] = ordered(result)
        choose([value.unit.root() for value in values if value.unit is not None], self._bits)
        made: list[Step] = []
        bounds: list[int] = []
        for value in values:
            numbers = tuple(values.index(each) for each in value.inputs)
            of_inputs = [bounds[number] for number in numbers]
            operation = value.make(value.exponent, of_inputs)
            bounds.append(operation.bound(*of_inputs))
            if bounds[-1] > INT32:
                raise NotIntegersError(f"{type(operation).__name__} can reach {bounds[-1]}, beyond an int32")
            made.append(Step(operation, numbers, None if value.unit is None else value.exponent))
        return tuple(made)

    def _planned(self, node: Node, *, codes: bool) -> Value:
        if (node, codes) not in self._values:
            plan = self._of_codes if codes else self._of_value
            self._values[node, codes] = plan(node)
        return self._values[node, codes]

    def _of_value(self, node: Node) -> Value:
        kind, fields = node.kind, node.fields
        if kind == "entry":
            return self._entry(node, _ENTRY_MARGIN * float(np.abs(fields["value"]).max()), codes=False)
        if kind in ("affine", "arrays", "product", "codes"):
            return self._scaled(node)
        if kind == "rising":
            raise NotIntegersError("tanh or a sigmoid stands elsewhere than before codes")
        if kind in ("add", "join"):
            return self._together(node)
        x = self.value(node.inputs[0])
        assert x.unit is not None
        if kind == "limit":
            reach = float(np.abs(np.clip(np.array([[-x.reach], [x.reach]]), fields["low"], fields["high"])).max())
            return Value((x,), reach, x.unit.joined(Unit(reach)), limits(fields["low"], fields["high"]))
        if kind == "sum" or (kind == "window" and not fields["largest"]):
            reach = x.reach * terms(node)
            return Value((x,), reach, Unit(reach, least=[(x.unit, 0)]), adding(node, x))
        return Value((x,), x.reach, x.unit, lambda exponent, bounds: moved(node))

    def _together(self, node: Node) -> Value:
        """A sum, or values side by side: what has factors of its own comes in its units, all else is shifted."""
        parts = tuple(self.value(each) for each in node.inputs)
        reach = (sum if node.kind == "add" else max)(each.reach for each in parts)
        unit = Unit(reach)
        for part, made in zip(parts, node.inputs, strict=True):
            assert part.unit is not None
            if made.kind in _HAVE_FACTORS:
                unit = unit.joined(part.unit)
            else:
                unit.root().least.append((part.unit, 0))

        def make(exponent: int, bounds: Sequence[int]) -> Operation:
            shifts = tuple(exponent - part.exponent for part in parts)
            return Add(shifts) if node.kind == "add" else Join(node.fields["axis"], shifts)

        return Value(parts, reach, unit, make)

    def _of_codes(self, node: Node) -> Value:
        if node.kind == "entry":
            return self._entry(node, float(node.fields["largest"]), codes=True)
        if node.kind == "codes":
            return self._thresholds(node)
        if node.kind in _REARRANGED or (node.kind == "window" and node.fields["largest"]):
            x = self.codes(node.inputs[0])
            return Value((x,), x.reach, None, lambda exponent, bounds: moved(node))
        raise NotIntegersError(f"codes go through {node.kind!r} before an array layer reads them")

    def _entry(self, node: Node, largest: float, *, codes: bool) -> Value:
        number, unit = len(self._entries), None if codes else Unit(largest)
        value = Value((), largest, unit, lambda exponent, bounds: Entry(number, int(math.ldexp(largest, -exponent))))
        self._entries.append((node, value))
        return value

    def _scaled(self, node: Node) -> Value:
        """`factor x + added`: in the factors of arrays or of a product that gives `x`, else by ones of its own."""
        (x,), factor, added = ((node,), np.ones(1), np.zeros(1)) if node.kind != "affine" else _of_affine(node)
        if x.kind == "arrays":
            return self._arrays(x, factor, added)
        if x.kind == "product":
            return self._product(x, factor, added)
        if x.kind != "codes" and (factor == 1).all() and not added.any():
            return self.value(x)
        inner = self.codes(x) if x.kind == "codes" else self.value(x)
        reach = float((np.abs(factor) * inner.reach + np.abs(added)).max())

        def make(exponent: int, bounds: Sequence[int]) -> Operation:
            real = np.ldexp(factor, inner.exponent - exponent)
            shift = min(max(0, -exponent_of_bits(float(np.abs(real).max()) or 1.0, _FACTOR_BITS)), 2 * _FACTOR_BITS)
            factors, numbers = np.broadcast_arrays(np.ldexp(real, shift), np.ldexp(added, -exponent))
            return Rescale(shift, int32(factors), int32(numbers))

        return Value((inner,), reach, Unit(reach), make)

    def _arrays(self, node: Node, factor: np.ndarray, added: np.ndarray) -> Value:
        layer: FrozenLayer = node.fields["layer"]
        real, reach = factors_of(layer, self._params)
        scaled = real.scaled(node.fields["step"] * factor, added)
        most = scaled.largest_total(reach)
        return Value((self.codes(node.inputs[0]),), most, Unit(most, scaled.largest), folded(layer, scaled, reach))

    def _product(self, node: Node, factor: np.ndarray, added: np.ndarray) -> Value:
        (x,), weights = node.inputs, node.fields["weights"] * factor
        if x.kind == "affine":
            (x,), inner, shifts = _of_affine(x)
            added = added + (shifts * np.ones(len(weights))) @ weights
            weights = weights * np.broadcast_to(inner, len(weights))[:, None]
        value = self.codes(x) if x.kind == "codes" else self.value(x)
        added = np.broadcast_to(added, weights.shape[1:])
        reach = float((np.abs(weights).sum(axis=0) * value.reach + np.abs(added)).max())

        unit_of_weights = exponent_of_bits(float(np.abs(weights).max()) or 1.0, _WEIGHT_BITS)
        least = [] if value.unit is None else [(value.unit, unit_of_weights)]

        def make(exponent: int, bounds: Sequence[int]) -> Operation:
            shift = max(0, exponent - unit_of_weights - value.exponent)
            integers = int32(np.ldexp(weights, value.exponent + shift - exponent))
            return Product(shift, integers, int32(added, exponent))

        return Value((value,), reach, Unit(reach * 1.05, least=least), make)

    def _thresholds(self, node: Node) -> Value:
        codes, chain, base = node.fields["spec"].code_range, [], node.inputs[0]
        if math.log2(codes.size) > MOST_ADC_BITS:
            raise NotIntegersError(f"thresholds of {codes.size} codes are more than the table of {MOST_ADC_BITS} bits")
        while base.kind in ("affine", "limit", "rising"):
            chain.append(function(base))
            (base,) = base.inputs
        value = self.codes(base) if base.kind == "codes" else self.value(base)

        def make(exponent: int, bounds: Sequence[int]) -> Operation:
            def real(integers: np.ndarray) -> np.ndarray:
                result = np.ldexp(integers.astype(np.float64), value.exponent)
                for each in reversed(chain):
                    result = each(result)
                return result

            return crossed(real, bounds[0], node)

        return Value((value,), codes.magnitude, None, make)


def _of_affine(node: Node) -> tuple[tuple[Node, ...], np.ndarray, np.ndarray]:
    return node.inputs, node.fields["factor"], node.fields["added"]
