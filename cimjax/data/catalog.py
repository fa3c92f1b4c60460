"""The data sets that `load` and `prepare` know by name: one row each. Reading and writing them happens elsewhere."""

from __future__ import annotations

import dataclasses

from cimjax.spec.base import nearest, shown


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a data set lies and how it is made."""

    name: str
    # "module:class" of the tensorflow-datasets builder; imported only to prepare or to read records.
    builder: str
    # DATA_DIR/folder/version is where every builder of this name and version prepares.
    folder: str
    version: str
    classes: int
    image_shape: tuple[int, int, int]
    # True: made from a download, by `prepare` only. False: made from an installed package, on first use.
    downloads: bool
    # Means and standard deviations per channel, of training images divided by 255; None: measured when loaded.
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    # Whether images stay in their records and are decoded when they are needed, in the size that is asked for.
    streamed: bool = False


_SOURCES = (
    Source(
        name="cifar10",
        builder="cimjax.data.cifar:Cifar10",
        folder="cifar10",
        version="3.0.2",
        classes=10,
        image_shape=(32, 32, 3),
        downloads=True,
        statistics=((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ),
    Source(
        name="cifar100",
        builder="cimjax.data.cifar:Cifar100",
        folder="cifar100",
        version="3.0.2",
        classes=100,
        image_shape=(32, 32, 3),
        downloads=True,
        # The published 0.5071, 0.4865, 0.4409 and 0.2673, 0.2564, 0.2762, measured to more digits.
        statistics=((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
    ),
    Source(
        name="digits",
        builder="cimjax.data.digits:CimjaxDigits",
        folder="cimjax_digits",
        version="1.0.0",
        classes=10,
        image_shape=(8, 8, 1),
        downloads=False,
    ),
    Source(
        name="imagenet2012",
        builder="cimjax.data.imagenet:Imagenet2012",
        folder="imagenet2012",
        version="5.1.0",
        classes=1000,
        image_shape=(224, 224, 3),
        downloads=True,
        streamed=True,
    ),
)


def names() -> tuple[str, ...]:
    """The names that `load` and `prepare` take."""
    return tuple(source.name for source in _SOURCES)


def find(name: str) -> Source:
    """The row of a name; `ValueError` with the nearest name for any other."""
    for source in _SOURCES:
        if source.name == name:
            return source
    hint = nearest(name.lower(), names(), otherwise_all=False) if isinstance(name, str) else ""
    raise ValueError(
        f"unknown dataset {shown(name)}{hint}: known are {', '.join(names())}; "
        "your own images go in as `folder:PATH`, arrays as `npz:PATH` or `cimjax.data.Dataset.from_arrays(...)`"
    )
