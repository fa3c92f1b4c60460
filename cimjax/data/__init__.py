"""Data sets: the ones that tensorflow-datasets prepares, folders of images, or arrays of the user's own.

`load("digits")` needs no network, `load("cifar10")` and `load("cifar100")` read what `prepare` has downloaded, and
`Dataset.from_arrays` takes any images, also where tensorflow-datasets is not installed: it is imported only to prepare
or to read records. ImageNet and folders of images are streams: their images stay in files, and are decoded by other
processes when they are needed (`cimjax.data.reading`, `pool`, `decoding`). Nothing here knows the rest of cimjax, but
for its words of a refusal (`cimjax.spec.base`); batches, augmentation and devices belong to `cimjax.training`.
"""

from cimjax.data.catalog import names
from cimjax.data.dataset import Dataset, Split
from cimjax.data.folder import DamagedDataError, DataError
from cimjax.data.loading import load
from cimjax.data.preparation import prepare
from cimjax.data.streams import StreamedDataset, StreamedSplit

__all__ = [
    "DamagedDataError",
    "DataError",
    "Dataset",
    "Split",
    "StreamedDataset",
    "StreamedSplit",
    "load",
    "names",
    "prepare",
]
