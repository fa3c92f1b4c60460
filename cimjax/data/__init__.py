"""Data sets: the ones that tensorflow-datasets prepares, or arrays of the user's own, as NumPy arrays.

`load("digits")` needs no network, `load("cifar10")` and `load("cifar100")` read what `prepare` has downloaded, and
`Dataset.from_arrays` takes any images, also where tensorflow-datasets is not installed: it is imported only to prepare
or to read records. Nothing here knows the rest of cimjax, but for its words of a refusal (`cimjax.spec.base`);
batches, augmentation and devices belong to `cimjax.training`.
"""

from cimjax.data.catalog import names
from cimjax.data.dataset import Dataset, Split
from cimjax.data.folder import DamagedDataError, DataError
from cimjax.data.loading import load
from cimjax.data.preparation import prepare

__all__ = ["DamagedDataError", "DataError", "Dataset", "Split", "load", "names", "prepare"]
