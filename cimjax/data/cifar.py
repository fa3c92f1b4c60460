"""tensorflow-datasets' own CIFAR builders, made to download and prepare without TensorFlow.

Name, version, features, archive and checksum are theirs, so that what either prepares the other reads. Replaced is what
calls TensorFlow: unpacking the archive, reading its binary files, and encoding PNG.
"""

from __future__ import annotations

import io
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import requests
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image
from tensorflow_datasets.core.download import checksums, resource
from tensorflow_datasets.image_classification import cifar

from cimjax.data.bridge import SilentBuilder
from cimjax.data.catalog import find

_PIXELS = 32 * 32 * 3


class _WithoutTensorFlow(SilentBuilder):
    """The methods that both builders replace."""

    name: str
    info: Any
    _cifar_info: Any

    def __init_subclass__(cls, **options: Any) -> None:
        """Passes tensorflow-datasets its option `skip_registration`: the names are registered to its own builders."""
        super().__init_subclass__(**options)

    @property
    def archive(self) -> str:
        """Name of the file that is downloaded."""
        return self._cifar_info.url.rpartition("/")[2]

    def unreachable(self, downloads: pathlib.Path, seconds: float = 5) -> str | None:
        """Why the archive cannot be had, or None: asked first, because a failing download is retried for minutes.

        Args:
          downloads: where the archive is kept; if it is there, the network is not asked.
          seconds: how long to wait for the server.
        """
        url = self._cifar_info.url
        if known := checksums.get_all_url_infos().get(url):
            file = resource.get_dl_fname(url, known.checksum)
            kept = (epath.Path(downloads / self.name / file), epath.Path(downloads / file))
            if any(map(resource.is_locally_cached, kept)) or (downloads / "manual" / self.archive).exists():
                return None
        try:
            with requests.get(url, timeout=seconds, stream=True) as answer:
                answer.raise_for_status()
        except requests.RequestException as error:
            return f"{url} cannot be reached ({type(error).__name__})"
        return None

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        source = self._cifar_info
        archive = dl_manager.download(source.url)
        with tarfile.open(archive) as tar:
            files = {member.name: file.read() for member in tar if (file := tar.extractfile(member))}
        for key, file in zip(source.label_keys, source.label_files, strict=True):
            self.info.features[key].names = files[source.prefix + file].decode().split()
        return {
            "train": self._generate_examples("train_", [files[source.prefix + file] for file in source.train_files]),
            "test": self._generate_examples("test_", [files[source.prefix + file] for file in source.test_files]),
        }

    def _generate_examples(self, split_prefix: str, files: list[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields what the original yields, with each image as PNG bytes instead of an array.

        Args:
          split_prefix: beginning of the examples' `id`.
          files: contents of the binary files: per image its labels, a byte each, then 3 x 32 x 32 bytes of colour.
        """
        keys = self._cifar_info.label_keys
        rows = np.concatenate([np.frombuffer(file, np.uint8).reshape(-1, len(keys) + _PIXELS) for file in files])
        for index, row in enumerate(rows):
            png = io.BytesIO()
            Image.fromarray(row[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0)).save(png, "PNG")
            labels = {key: int(label) for key, label in zip(keys, row, strict=False)}
            yield index, {"id": f"{split_prefix}{index:05d}", "image": png.getvalue(), **labels}


class Cifar10(_WithoutTensorFlow, cifar.Cifar10, skip_registration=True):
    """CIFAR-10, 50,000 training and 10,000 test images of 10 classes."""

    name = "cifar10"
    # Fixed, also under a later tensorflow-datasets, because the folder is looked up without importing that.
    VERSION = tfds.core.Version(find("cifar10").version)


class Cifar100(_WithoutTensorFlow, cifar.Cifar100, skip_registration=True):
    """CIFAR-100, 50,000 training and 10,000 test images of 100 classes."""

    name = "cifar100"
    VERSION = tfds.core.Version(find("cifar100").version)
