"""Generated photographs: JPEG files of ImageNet's sizes, odd ones too, in folders or in archives as ImageNet's.

    python tests/photographs.py FOLDER --images 5000

makes FOLDER/imagenet2012 by the same code as users prepare ImageNet with.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image
from tensorflow_datasets.core import tfds_path

# Names of ImageNet's first classes, in the order of their labels.
CLASSES = tfds_path("datasets/imagenet2012/labels.txt").read_text().split()


def photograph(rng: np.random.Generator, width: int = 400, height: int = 350) -> Image.Image:
    """Noise of several scales; a JPEG file of it has about as many bytes as one of ImageNet."""
    pixels = np.zeros((height, width, 3), np.float32)
    for scale, amplitude in ((120, 60), (30, 25), (8, 15), (2, 40), (1, 30)):
        size = (max(1, height // scale), max(1, width // scale), 3)
        coarse = (127 + amplitude * rng.standard_normal(size)).clip(0, 255).astype(np.uint8)
        pixels += (
            np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32) - 127
        )
    return Image.fromarray((127 + pixels).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def odd_ones(rng: np.random.Generator) -> dict[str, bytes]:
    """JPEG files as they occur, by what is odd about them."""
    usual = photograph(rng, 60, 50)
    return {
        "grey": jpeg(usual.convert("L")),
        "cmyk": jpeg(usual.convert("CMYK")),
        "truncated": jpeg(usual)[:-900],
        "narrow": jpeg(photograph(rng, 1, 50)),
        "flat": jpeg(photograph(rng, 300, 2)),
        "tiny": jpeg(photograph(rng, 1, 1)),
        "large": jpeg(photograph(rng, 700, 500)),
    }


def photographs(count: int, *, classes: int, mean: tuple[int, int], seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Class and file of `count` images, in which every tenth is an odd one."""
    rng = np.random.default_rng(seed)
    odd, largest = list(odd_ones(rng).values()), [round(1.3 * size) for size in mean]
    # Windows of a few pictures: to draw noise takes much longer than to encode it.
    pictures = [photograph(rng, *largest) for _ in range(min(count, 20))]
    for index in range(count):
        width, height = (round(size * rng.uniform(0.75, 1.25)) for size in mean)
        left, top = rng.integers(largest[0] - width + 1), rng.integers(largest[1] - height + 1)
        window = pictures[index % len(pictures)].crop((left, top, left + width, top + height))
        is_odd = index % 10 == 9 and index // 10 < len(odd)
        yield CLASSES[index % classes], odd[index // 10] if is_odd else jpeg(window)


def write_folder(root: Path, splits: Mapping[str, int], *, classes: int = 3, mean: tuple[int, int] = (60, 50)) -> None:
    """Class folders of images: `root/SPLIT/CLASS/00012.jpg`."""
    for seed, (split, count) in enumerate(splits.items()):
        for index, (name, encoded) in enumerate(photographs(count, classes=classes, mean=mean, seed=seed)):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            (root / split / name / f"{index:05d}.jpg").write_bytes(encoded)


def write_archives(folder: Path, train: int, test: int, *, classes: int = 3, mean: tuple[int, int] = (60, 50)) -> None:
    """ILSVRC2012_img_train.tar, of one archive for each class, and ILSVRC2012_img_val.tar, as they are published."""
    folder.mkdir(parents=True, exist_ok=True)
    of_class: dict[str, list[bytes]] = {}
    for name, encoded in photographs(train, classes=classes, mean=mean):
        of_class.setdefault(name, []).append(encoded)
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as tar:
        for name, files in of_class.items():
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as images:
                for index, encoded in enumerate(files):
                    _add(images, f"{name}_{index}.JPEG", encoded)
            _add(tar, f"{name}.tar", inner.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for index, (_, encoded) in enumerate(photographs(test, classes=classes, mean=mean, seed=1)):
            _add(tar, f"ILSVRC2012_val_{index + 1:08d}.JPEG", encoded)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def prepare(root: Path) -> Path:
    """Prepares the archives in `root/downloads/manual`, whatever their sizes."""
    from cimjax.data import imagenet_archives
    from cimjax.data import prepare as prepare_data

    manual = root / "downloads" / "manual"
    sizes = {name: (manual / name).stat().st_size for name in imagenet_archives.SIZES}
    with mock.patch.object(imagenet_archives, "SIZES", sizes):
        return prepare_data("imagenet2012", root)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=5000)
    given = parser.parse_args()
    write_archives(
        given.folder / "downloads" / "manual", given.images, given.images // 10, classes=100, mean=(400, 350)
    )
    print(prepare(given.folder))
