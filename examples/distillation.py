"""A loss and an optimizer of one's own: a network with 2-bit ADCs learns from a trained one in full precision.

python train.py --config configs/digits.py:weight=none --workdir runs/teacher
python examples/distillation.py runs/teacher
"""

import sys
from pathlib import Path

import jax
import optax

import cimjax
from cimjax.training.config.file import load_config

teacher = cimjax.load(sys.argv[1])


def loss_fn(logits: jax.Array, batch: cimjax.Batch) -> jax.Array:
    """Hinton et al. 2015: half of the labels, half of what the teacher thinks at temperature 2."""
    taught = jax.nn.softmax(teacher.model.apply(teacher.variables, batch.images) / 2)
    hard = optax.softmax_cross_entropy(logits, batch.targets)
    return 0.5 * hard + 0.5 * 4 * optax.softmax_cross_entropy(logits / 2, jax.lax.stop_gradient(taught))


config = load_config(f"{Path(__file__).parents[1] / 'configs' / 'digits.py'}:adc_bits=2")
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.lion(optax.cosine_decay_schedule(1e-3, 1100)))
result = cimjax.train(config, workdir="runs/student", variables=teacher, loss_fn=loss_fn, optimizer=optimizer)
print(f"{result.accuracy:.2%}")
