"""How rough a trained network is: how much of what it says of an image hangs on differences that mean nothing.

    python docs/roughness.py docs/runs/resnet20-cifar100-3bit --images 5000 --draws 6

Statistics of batch normalisation are taken anew of ten batches of augmented training images, several times, of other
images each time. The networks that differ in nothing else are evaluated: each by itself, and the mean of their
probabilities. What docs/accuracy.md says of it comes from here.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import cimjax
from cimjax.data import load

BATCHES, SIZE = 10, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder or a packed network")
    parser.add_argument("--images", type=int, default=5000, help="test images, the first ones")
    parser.add_argument("--draws", type=int, default=6, help="how often statistics are taken")
    arguments = parser.parse_args()

    run = cimjax.load(arguments.run)
    data = load(run.config.dataset, run.config.data_dir)
    train, labels = data.train, np.asarray(data.test.labels[: arguments.images])

    @jax.jit(compiler_options=cimjax.compiler_options())
    def logits_of(variables, images):
        return run.model.apply(variables, run.normalise(images), train=False)

    def probabilities(variables):
        parts = range(0, len(labels), 500)
        logits = [logits_of(variables, jnp.asarray(data.test.images[at : at + 500])) for at in parts]
        return np.asarray(jax.nn.softmax(jnp.concatenate(logits)[: len(labels)]))

    def batch(key, augmented):
        for_choice, *others = jax.random.split(key, 2 + SIZE)
        chosen = np.asarray(jax.random.choice(for_choice, len(train), (SIZE,), replace=False))
        pixels, of_class = (jnp.asarray(each[chosen]) for each in (train.images, train.labels))
        if not augmented:
            return run.normalise(pixels)
        return run.preparation.for_training(pixels, of_class, others[0], jnp.stack(others[1:])).images

    def anew(draw, augmented=True):
        keys = jax.random.split(jax.random.key(draw), BATCHES)
        batches = (batch(key, augmented) for key in keys)
        return probabilities(cimjax.update_batch_norm(run.model, run.variables, batches, train=True))

    def right(found):
        return 100 * np.mean(found.argmax(1) == labels)

    as_trained = probabilities(run.variables)
    each = [anew(draw) for draw in range(arguments.draws)]
    changed = [100 * np.mean(found.argmax(1) != as_trained.argmax(1)) for found in each]
    accuracies = [right(found) for found in each]
    print(f"{arguments.run}, {len(labels)} test images")
    print(f"as trained                                {right(as_trained):.2f} %")
    print(f"statistics of {BATCHES} batches, {len(each)} draws         {np.mean(accuracies):.2f} % (", end="")
    print(f"{min(accuracies):.2f} to {max(accuracies):.2f}; standard deviation {np.std(accuracies, ddof=1):.2f})")
    print(f"  images in another class than as trained {np.mean(changed):.1f} %")
    print(f"mean of the draws' probabilities          {right(np.mean(each, 0)):.2f} %")
    print(f"statistics of images that are not shifted {right(anew(0, augmented=False)):.2f} %")


if __name__ == "__main__":
    main()
