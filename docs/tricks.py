"""What each arrangement for XLA's CPU backend is worth: ResNet-20's training step with one of them switched off at a time.

    python docs/tricks.py [--runs 8] [--configs W3A3 ...] [--only NAME ...]

Of the program of commit 62fcac7, before most of these were taken out: run it in a checkout of that commit.

Every program is compiled in this process, without a cache, and then all run in turns; two rows are everything switched
on, so that their difference shows the noise. 3-bit weights in 1-bit cells (W3A3) and 4-bit weights in 2-bit cells
(W4A4), batch 64. For large pages start it with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` (or `=0`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cimjax.analysis.timing import Program, machine, measured, show, without_cache
from cimjax.core import conv, conversion, convolution, digitise, lowering, readout, recompute, schedule
from cimjax.data import Dataset
from cimjax.nn import rules
from cimjax.training import step as step_lib
from cimjax.training.config_file import load_config
from cimjax.training.experiment import build, on_device
from cimjax.training.step import order_of_epoch

CONFIGS = {
    "W3A3": "configs/resnet20_c10.py",
    "W4A4": "configs/resnet20_c10.py:act_bits=4,weight_bits=4,cell_bits=2",
    "full precision": "configs/resnet20_c10.py:weight=none",
}


def _plainly(function: Callable[..., Any], *operands: Any, known: Any = None, like: Any = None) -> Any:
    del known, like
    return function(*operands)


def _sum(values: Any, parts: int = 0) -> Any:
    del parts
    return jnp.sum(values, axis=tuple(range(values.ndim - 1)))


def _int16(psums: Any) -> Any:
    return psums.astype(jnp.int16)


def _summed(values: Any, features: int) -> Any:
    count = values.shape[-1] // features
    return jnp.sum(values.reshape(*values.shape[:-1], count, features), axis=-2)


APART = [(module, "apart", _plainly) for module in (schedule, conversion, convolution, digitise, lowering)]
ONCE = [(readout, "columns_once", lambda values: values)]
CODES = [(conv, "codes_once", lambda codes, step, code_range: codes)]
PLAIN = [(rules, "plain_conv", nn.Conv), (rules, "conv_maker", None)]
# Per trick: (module, name, what stands there instead).
TRICKS: dict[str, list[tuple[Any, str, Any]]] = {
    "all on": [],
    "turns": [(lowering, "MANY_TILES", 10**9)],
    "apart": APART,
    "columns_once": ONCE,
    "codes_once": CODES,
    "few weights written out": [(convolution, "FEW", 0)],
    "input gradient as a product": [(convolution, "WIDENING", 10**9)],
    "_over_positions": [(conversion, "_over_positions", _sum)],
    "16 bits by bit pattern": [(conversion, "as_small_integers", _int16)],
    "columns added one by one": [(conversion, "over_columns", _summed), (readout, "over_columns", _summed)],
    "plain layers' conv": [(convolution, "_to_kernel", None)],
    "all of these": [],
    "all on again": [],
}


@contextlib.contextmanager
def without(name: str) -> Iterator[None]:
    """One of the tricks switched off; traces of before forgotten."""
    jax.clear_caches()
    patches = TRICKS[name]
    if name == "all of these":
        patches = [patch for row in TRICKS.values() for patch in row]
    with contextlib.ExitStack() as stack:
        for module, attribute, value in patches:
            if attribute == "_to_kernel":
                module, attribute, value = rules, "plain_conv", nn.Conv
            stack.enter_context(mock.patch.object(module, attribute, value))
        if name in ("plain layers' conv", "all of these"):
            from cimjax.nn import resnet

            stack.enter_context(mock.patch.object(resnet, "plain_conv", nn.Conv))
        yield


def program(label: str, name: str, residuals: str = "psums") -> Program:
    """The compiled training step with a trick switched off."""
    config = load_config(CONFIGS[label], [])
    with config.unlocked():
        config.batch_size = config.eval_batch_size = 64
        if config.spec is not None:
            config.spec.residuals = residuals
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (64, 32, 32, 3), np.uint8), rng.integers(0, 10, 64)
    dataset = Dataset.from_arrays("random", x, y, x, y, classes=10)
    with without(name):
        experiment = build(config, dataset=dataset)
        data, order = on_device(experiment.dataset.train), order_of_epoch(experiment.key, 0, 64)
        state = experiment.uncalibrated_state()
        made = Program(f"{label} {name}, train", experiment.stepper.train, state, data, order, images=64, carry=True)
    print(f"{made.name}: {made.compile_seconds:.1f} s, {made.temporary_mb:.0f} MB", flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--only", nargs="*", default=list(TRICKS))
    parser.add_argument("--configs", nargs="*", default=list(CONFIGS))
    parser.add_argument("--residuals", default="psums")
    args = parser.parse_args()
    with without_cache():
        programs = [program(label, name, args.residuals) for label in args.configs for name in args.only]
    print(json.dumps(machine()), os.environ.get("GLIBC_TUNABLES"))
    for _ in range(2):
        print(show(measured(programs, args.runs)), flush=True)


if __name__ == "__main__":
    main()
