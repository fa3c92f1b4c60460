"""Images from files: decoding, folders, ImageNet's records, streams by any number of workers, and training from them.

All files are real: JPEG files of odd sizes, ArrayRecord files made from archives laid out as the published ones.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import photographs
import pytest
from PIL import Image
from test_data import message_of
from test_train_step import Tiny
from test_training import Stopping, quiet, without_times

import cimjax
import cimjax.data
from cimjax.analysis import bench_data
from cimjax.cli import main
from cimjax.data import DamagedDataError, StreamedDataset, StreamedSplit, imagenet_archives
from cimjax.data.catalog import find
from cimjax.data.decoding import UndecodableError, View, central_box, centre_crop, random_box, random_crop
from cimjax.data.image_folder import read_folder
from cimjax.data.reading import EvaluationStream, Images, TrainingStream
from cimjax.data.share import Share
from cimjax.data.stored import Encoded
from cimjax.training import loop
from cimjax.training.config.file import load_config
from cimjax.training.evaluate import Evaluator
from cimjax.training.experiment import build
from cimjax.training.run.checkpoint import Checkpoints
from cimjax.training.run.folder import read_records

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "resnet18_imagenet.py")
SMALL = View(size=32)


# ---- decoding


def smooth(width: int, height: int) -> Image.Image:
    """An image of slow waves, which no way of resizing changes much."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    waves = [np.sin(x / 37 + y / 53), np.cos(x / 71 - y / 41), np.sin(x / 59) * np.cos(y / 67)]
    return Image.fromarray((127 + 100 * np.stack(waves, -1)).astype(np.uint8))


def as_png(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", photographs.odd_ones(np.random.default_rng(0)))
def test_odd_images_become_squares_in_colour(kind: str) -> None:
    encoded = photographs.odd_ones(np.random.default_rng(0))[kind]
    for decode in (centre_crop, functools.partial(random_crop, rng=np.random.default_rng(1))):
        pixels, whole = decode(encoded, SMALL)
        assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
        assert whole == (kind != "truncated")
    if kind == "grey":
        assert (pixels == pixels[..., :1]).all()


def test_colours_are_those_of_the_image() -> None:
    want = centre_crop(as_png(smooth(300, 200)), SMALL).pixels.astype(int)
    cmyk = centre_crop(photographs.jpeg(smooth(300, 200).convert("CMYK"), 98), SMALL).pixels
    assert np.abs(cmyk - want).mean() < 4
    grey = np.asarray(smooth(300, 200).convert("L"))
    sixteen = centre_crop(as_png(Image.fromarray(grey.astype(np.uint16) * 257)), SMALL).pixels.astype(int)
    assert np.abs(sixteen - centre_crop(as_png(Image.fromarray(grey)), SMALL).pixels).max() <= 1
    palette = smooth(300, 200).quantize(256)
    assert np.abs(centre_crop(as_png(palette, transparency=b"\x00\xff"), SMALL).pixels - want).mean() < 8


def test_the_centre_is_that_of_an_image_resized_to_256() -> None:
    """Against the published way, resized as a whole and then cut, to the rounding of sizes to whole pixels."""
    for width, height in ((500, 375), (331, 480), (256, 256), (1000, 900)):
        image = smooth(width, height)
        scale = 256 / min(width, height)
        whole = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
        left, top = (whole.width - 224) // 2, (whole.height - 224) // 2
        want = np.asarray(whole.crop((left, top, left + 224, top + 224)), int)
        got = centre_crop(as_png(image), View()).pixels
        assert np.abs(got - want).mean() < 1.5
        # A JPEG file of many pixels is decoded at a fraction of its size.
        assert np.abs(centre_crop(photographs.jpeg(image, 98), View()).pixels - want).mean() < 2.5
    left, top, right, bottom = central_box(1, 30_000)
    assert (right - left, bottom - top) == (0.875, 0.875) and left > 0 and top > 14_000


def test_random_crops_are_as_published() -> None:
    """Area uniform from 8 % to 100 %, where every shape fits; width over height from 3/4 to 4/3; anywhere."""
    rng = np.random.default_rng(0)
    boxes = [random_box(4000, 4000, 0.08, rng) for _ in range(4000)]
    wide, tall = (np.array([box[end] - box[end - 2] for box in boxes]) for end in (2, 3))
    assert min(box.left for box in boxes) >= 0 and max(box.bottom for box in boxes) <= 4000
    ratios, areas = wide / tall, wide * tall / 4000**2
    assert 0.749 < ratios.min() < 0.76 and 1.32 < ratios.max() < 1.3345
    assert abs(np.log(ratios).mean()) < 0.02
    assert 0.079 < areas.min() < 0.09
    # Of the smaller areas all shapes fit; each tenth of them is as likely as the others.
    counts = np.histogram(areas, np.linspace(0.1, 0.7, 7))[0]
    assert counts.min() > 0.85 * counts.mean() and counts.max() < 1.15 * counts.mean()
    places = [box.left / (4000 - width) for box, width in zip(boxes, wide, strict=True) if width < 3000]
    assert abs(np.mean(places) - 0.5) < 0.02
    assert random_box(1, 50, 0.08, rng) == (0, 24, 1, 25)
    assert all(0 <= b.left < b.right <= 300 and b.top < b.bottom for b in (random_box(300, 2, 1, rng),))


def test_a_crop_of_a_large_file_is_that_of_its_pixels() -> None:
    """It is decoded at an eighth of its size."""
    image = smooth(800, 600)
    for seed in range(3):
        fast, slow = (
            random_crop(encoded, View(size=16, smallest_crop=0.5), np.random.default_rng(seed)).pixels.astype(int)
            for encoded in (photographs.jpeg(image, 98), as_png(image))
        )
        assert np.abs(fast - slow).mean() < 2


@pytest.mark.parametrize("content,words", [(b"", "it is empty"), (b"no image\n" * 99, "no image of a known format")])
def test_what_is_no_image_is_refused(content: bytes, words: str) -> None:
    with pytest.raises(UndecodableError, match=words):
        centre_crop(content, SMALL)
    with pytest.raises(UndecodableError):
        random_crop(photographs.jpeg(smooth(60, 50))[:200], SMALL, np.random.default_rng(0))


# ---- folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    photographs.write_folder(root, {"train": 60, "val": 21})
    return root


def loaded(folder: Path, **fields: Any) -> StreamedDataset:
    found = cimjax.data.load(f"folder:{folder}", view=SMALL)
    assert isinstance(found, StreamedDataset)
    return found


def test_a_folder_of_class_folders_is_a_data_set(folder: Path) -> None:
    data = loaded(folder)
    assert data.class_names == tuple(sorted(photographs.CLASSES[:3]))
    assert (data.name, data.classes, data.image_shape) == (folder.name, 3, (32, 32, 3))
    assert (len(data.train), len(data.test), data.validation) == (60, 21, None)
    for index in (0, 30, 59):
        name = Path(data.train.name(index))
        assert name.read_bytes() == data.train[index].image
        assert data.class_names[data.train[index].label] == name.parent.name
    np.testing.assert_array_equal(data.train.labels[[59, 0]], [2, 0])
    assert data.train.images[[3, 4]].shape == (2, 32, 32, 3)


def test_a_folder_may_be_relative_to_the_folder_of_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_folder(f"folder:{folder.name}", folder.parent)
    assert found.path == folder
    monkeypatch.chdir(folder)
    assert read_folder("folder:.").classes == found.classes


def test_val_chooses_where_there_is_test(tmp_path: Path) -> None:
    photographs.write_folder(tmp_path, {"train": 6, "val": 9, "test": 12})
    data = loaded(tmp_path)
    assert data.validation is not None and (len(data.validation), len(data.test)) == (9, 12)
    with pytest.raises(ValueError, match="9 images are held out already, as `val`"):
        data.holding_out(0.5)


def test_of_one_split_a_tenth_is_held_out_by_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "inner").mkdir(parents=True)
        for index in range(100):
            (tmp_path / name / "inner" / f"{index}.png").write_bytes(b"")
    (tmp_path / "a" / ".hidden").touch()
    first = read_folder(f"folder:{tmp_path}")
    names = [{split.name(index) for index in range(len(split))} for split in (first.train, first.test)]
    assert len(names[0] | names[1]) == 200 and not names[0] & names[1]
    assert 10 <= len(names[1]) <= 30
    for path in (tmp_path / "a" / "inner").glob("*5.png"):
        path.unlink()
    later = read_folder(f"folder:{tmp_path}")
    assert {later.test.name(index) for index in range(len(later.test))} <= names[1]


def spoil(root: Path, what: str) -> Path:
    """Does something wrong to a folder; the path that the message must name."""
    name = sorted(photographs.CLASSES[:3])[0]
    if what == "stray file":
        path = root / "val" / name / "notes.txt"
        path.touch()
    elif what == "file beside classes":
        path = root / "train" / "list.csv"
        path.touch()
    elif what == "empty class":
        path = root / "train" / "empty"
        path.mkdir()
        (root / "val" / "empty").mkdir()
    elif what == "class without counterpart":
        path = root / "val" / "another"
        path.mkdir()
    elif what == "class missing":
        path = root / "val" / name
        shutil.rmtree(path)
    elif what == "one class":
        path = root / "train"
        for other in sorted(photographs.CLASSES[:3])[1:]:
            shutil.rmtree(path / other)
    elif what == "link to itself":
        path = root / "train" / "loop"
        path.symlink_to(path)
    elif what == "no train":
        path = root
        shutil.rmtree(root / "train")
    else:
        path = root
        shutil.rmtree(root)
    return path


@pytest.mark.parametrize(
    "what,words",
    [
        ("stray file", "is no image by its name"),
        ("file beside classes", "lies beside the class folders"),
        ("empty class", "holds no image"),
        ("class without counterpart", "has no counterpart in train"),
        ("class missing", "is missing, a class of train"),
        ("one class", "alone; every class is a folder"),
        ("link to itself", "cannot be read"),
        ("no train", "has val/ but no train/"),
        ("nothing", "is no folder"),
    ],
)
def test_mistakes_in_a_folder_are_one_line_with_its_path(folder: Path, tmp_path: Path, what: str, words: str) -> None:
    shutil.copytree(folder, tmp_path / "images")
    path = spoil(tmp_path / "images", what)
    message = message_of(lambda: loaded(tmp_path / "images"))
    assert words in message and str(path) in message


def test_classes_of_which_a_split_has_no_images_are_refused(folder: Path) -> None:
    data = loaded(folder)
    labels = data.test.known_labels()
    assert labels is not None
    of_last = dataclasses.replace(data, test=data.test.where(labels == data.classes - 1))
    with pytest.raises(ValueError, match=r"^`subset.classes` is 2, of which test has no images; give more, or 0\.$"):
        of_last.part(classes=2)


# ---- ImageNet's records


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet prepared from two small archives, as users prepare it."""
    root = tmp_path_factory.mktemp("imagenet")
    photographs.write_archives(root / "downloads" / "manual", 60, 12)
    photographs.prepare(root)
    return root


def test_records_hold_what_the_archives_held(imagenet: Path) -> None:
    """Every image of the archives, byte by byte, with its label and its name."""
    data = cimjax.data.load("imagenet2012", imagenet, view=SMALL)
    assert isinstance(data, StreamedDataset)
    assert (len(data.train), len(data.test), data.classes) == (60, 12, 1000)
    stored = sorted((data.train[index].label, data.train[index].image) for index in range(60))
    made = photographs.photographs(60, classes=3, mean=(60, 50))
    assert stored == sorted((photographs.CLASSES.index(name), encoded) for name, encoded in made)
    label, name = data.train[7].label, data.train.name(7)
    assert data.class_names == tuple(photographs.CLASSES)
    assert name.startswith(f"{photographs.CLASSES[label]}_") and "record 7 of" in name
    assert data.train.images[[0, 5]].shape == (2, 32, 32, 3)


def test_records_are_those_of_tensorflow_datasets(imagenet: Path) -> None:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(imagenet / "imagenet2012" / "5.1.0")
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 60, "validation": 12}
    assert set(builder.info.features) == {"image", "label", "file_name"}
    assert builder.info.features["label"].num_classes == 1000


def test_images_that_are_no_rgb_jpeg_become_one_in_preparation() -> None:
    from cimjax.data import imagenet as module

    cmyk = photographs.jpeg(smooth(60, 50).convert("CMYK"))
    assert module._as_rgb_jpeg("n01440764_1.JPEG", cmyk) is cmyk
    for name, encoded in (("n01739381_1309.JPEG", cmyk), ("n02105855_2933.JPEG", as_png(smooth(60, 50)))):
        with Image.open(io.BytesIO(module._as_rgb_jpeg(name, encoded))) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")


def test_preparation_asks_first_for_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = functools.partial(cimjax.data.prepare, "imagenet2012", tmp_path)
    message = message_of(prepare)
    assert "image-net.org/download-images" in message and "(155 GB" in message
    assert f"{tmp_path}/downloads/manual" in message and "cimjax data prepare imagenet2012" in message
    manual = tmp_path / "downloads" / "manual"
    photographs.write_archives(manual, 6, 3)
    assert "ILSVRC2012_img_train.tar has" in message_of(prepare) and "of 147,897,477,120" in message_of(prepare)
    sizes = {name: (manual / name).stat().st_size for name in imagenet_archives.SIZES}
    monkeypatch.setattr(imagenet_archives, "SIZES", sizes)
    monkeypatch.setattr(imagenet_archives, "ROOM", 1e15)
    assert "make room" in message_of(prepare)
    assert [path.name for path in tmp_path.iterdir()] == ["downloads"]


def test_missing_and_broken_records_are_one_line(imagenet: Path, tmp_path: Path) -> None:
    load = functools.partial(cimjax.data.load, "imagenet2012", tmp_path)
    message = message_of(load)
    assert "imagenet2012 is not prepared" in message and "cimjax data prepare imagenet2012" in message
    shutil.copytree(imagenet / "imagenet2012", tmp_path / "imagenet2012")
    version = tmp_path / "imagenet2012" / find("imagenet2012").version
    shard = version / "imagenet2012-train.array_record-00000-of-00001"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    data = load(view=SMALL)
    message = message_of(lambda: data.train[3], DamagedDataError)
    assert f"record 3 of {shard} cannot be read" in message and "mend it with: cimjax data prepare" in message
    shard.write_bytes(b"")
    assert f"{shard.name} is empty" in message_of(load, DamagedDataError)
    shard.unlink()
    assert f"{shard.name} is missing" in message_of(load, DamagedDataError)
    info = json.loads((version / "dataset_info.json").read_text())
    (version / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    assert "is stored as tfrecord, of which no image can be read by itself" in message_of(load)


# ---- parts of a data set


def test_parts_and_held_out_images(folder: Path, imagenet: Path) -> None:
    data = loaded(folder)
    part = data.part(classes=2, images=10)
    assert (part.classes, len(part.train), len(part.class_names)) == (2, 10, 2)
    assert set(part.train.known_labels()) == set(part.test.known_labels()) == {0, 1}
    held = data.holding_out(0.1, seed=3)
    assert held.validation is not None
    np.testing.assert_array_equal(np.bincount(held.validation.known_labels()), [2, 2, 2])
    assert len(np.union1d(held.validation.chosen, held.train.chosen)) == 60
    assert set(data.holding_out(0.1, seed=4).validation.chosen) != set(held.validation.chosen)
    records = cimjax.data.load("imagenet2012", imagenet)
    assert len(records.holding_out(0.1).validation) == 6 and len(records.part(images=7).train) == 7
    for wrong in (1, -0.1):
        with pytest.raises(ValueError, match=r"`part` is .*; give the part of the training images to hold out"):
            data.holding_out(wrong)
    with pytest.raises(ValueError, match="tell no classes before they are read"):
        records.part(classes=10)
    with pytest.raises(ValueError, match=r"`subset\.images` is 61; give up to 60"):
        data.part(images=61)


# ---- streams


class Counting:
    """A store that remembers which images were read, and gives their numbers as labels."""

    def __init__(self, split: StreamedSplit) -> None:
        self.split, self.read = split, []  # type: StreamedSplit, list[int]

    labels = None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Encoded:
        self.read.append(index)
        return Encoded(self.split[index].image, index)

    def name(self, index: int) -> str:
        return self.split.name(index)


def stream(split: StreamedSplit, workers: int = 0, **options: Any) -> TrainingStream:
    return TrainingStream(split, **{"seed": 5, "batch_size": 8, "workers": workers, **options})


def batches(split: StreamedSplit, start: int, count: int, workers: int = 0, **options: Any) -> Images:
    reader = stream(split, workers, **options)
    try:
        return reader.read(start, count)
    finally:
        reader.close()


def same(one: Images, other: Images) -> bool:
    return np.array_equal(one.pixels, other.pixels) and np.array_equal(one.labels, other.labels)


def test_the_batch_of_a_step_is_a_function_of_seed_and_step(folder: Path) -> None:
    """Whatever was read before it; other seeds and other epochs have other images and other crops."""
    split = loaded(folder).train
    whole = batches(split, 0, 15)
    assert (whole.pixels.shape, whole.labels.shape) == ((15, 8, 32, 32, 3), (15, 8))
    reader = stream(split)
    for step in (3, 4, 9, 4):
        assert np.array_equal(reader.read(step).pixels[0], whole.pixels[step])
    reader.close()
    assert not same(batches(split, 0, 1, seed=6), Images(whole.pixels[:1], whole.labels[:1]))
    assert not np.array_equal(whole.labels[0], whole.labels[7])
    assert batches(split, 0, 1, seed=-1).labels.shape == (1, 8)


def test_an_epoch_has_every_image_once_but_for_what_is_left(folder: Path) -> None:
    split = StreamedSplit.of(Counting(loaded(folder).train), SMALL)
    numbers = batches(split, 0, 14).labels.reshape(2, 56)
    assert [len(set(epoch)) for epoch in numbers] == [56, 56]
    assert set(numbers[0]) != set(numbers[1])


def test_reading_begins_at_a_step_without_what_came_before(folder: Path) -> None:
    store = Counting(loaded(folder).train)
    batches(StreamedSplit.of(store, SMALL), 700_000, 1)
    # What is read ahead by the threads is more than the batch, and far less than what came before it.
    assert 8 <= len(store.read) <= 300


def test_shares_put_together_are_the_whole_batch(folder: Path) -> None:
    split = loaded(folder).train
    whole = batches(split, 5, 4)
    for count in (2, 4):
        shares = [batches(split, 5, 4, share=Share(number, count)) for number in range(count)]
        together = Images(*(np.concatenate(each, axis=1) for each in zip(*shares, strict=True)))
        assert same(together, whole)
    with pytest.raises(ValueError, match="`batch_size` is 8, which 3 processes cannot share evenly"):
        stream(split, share=Share(0, 3))
    with pytest.raises(ValueError, match="`batch_size` is 61; give 1 to 60"):
        stream(split, batch_size=61)


FRESH = """
import sys, hashlib
sys.path.insert(0, sys.argv[1])
from test_streams import *
from test_streams import batches, loaded
found = batches(loaded(Path(sys.argv[2])).train, 3, 6, workers=int(sys.argv[3]))
print(hashlib.sha256(found.pixels.tobytes() + found.labels.tobytes()).hexdigest())
"""


@pytest.mark.full
def test_a_stream_is_the_same_by_any_number_of_workers_and_in_a_fresh_process(
    folder: Path, imagenet: Path, tmp_path: Path
) -> None:
    """Also of a program that does not say `if __name__ == "__main__"`, which new processes would run again."""
    for split in (loaded(folder).train, cimjax.data.load("imagenet2012", imagenet, view=SMALL).train):
        want = batches(split, 3, 6)
        for workers in (1, 4):
            assert same(batches(split, 3, 6, workers), want)
        assert same(batches(split, 3, 6, 2, share=Share(0, 1)), want)
    (tmp_path / "fresh.py").write_text(FRESH)
    runs = [
        subprocess.run(
            [sys.executable, str(tmp_path / "fresh.py"), str(Path(__file__).parent), str(folder), workers],
            capture_output=True,
            text=True,
            check=True,
        )
        for workers in ("0", "2")
    ]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout) == 65
    assert [run.stderr for run in runs] == ["", ""]


def test_truncated_images_are_named_and_what_is_no_image_ends_the_run(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "images")
    reader = stream(loaded(tmp_path / "images").train)
    reader.read(0, 7)
    reader.read(7, 8)
    assert len(reader.truncated) == 1  # of the odd ones
    assert not centre_crop(Path(reader.truncated[0]).read_bytes(), SMALL).whole
    reader.close()
    victim = next((tmp_path / "images" / "train").rglob("*1.jpg"))
    victim.write_bytes(b"no image")
    message = message_of(lambda: batches(loaded(tmp_path / "images").train, 0, 8))
    assert message == f"{victim} cannot be decoded (it is no image of a known format); put a whole image in its place."
    victim.unlink()
    split = loaded(folder).train
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    gone = loaded(moved).train
    shutil.rmtree(moved)
    assert "cannot be read (No such file or directory)" in message_of(lambda: batches(gone, 0, 1))
    assert len(split) == 60


@pytest.mark.full
def test_workers_name_what_they_cannot_decode(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "images")
    victim = next((tmp_path / "images" / "train").rglob("*1.jpg"))
    victim.write_bytes(b"no image")
    message = message_of(lambda: batches(loaded(tmp_path / "images").train, 0, 8, 2))
    assert message.startswith(f"{victim} cannot be decoded")


def test_evaluation_has_every_image_once_in_order(folder: Path) -> None:
    split = loaded(folder).test
    reader = EvaluationStream(split, batch_size=8, workers=0)
    for _ in range(2):
        passed = list(reader)
        assert [len(images.labels) for images in passed] == [8, 8, 5]
        np.testing.assert_array_equal(np.concatenate([images.labels for images in passed]), split.known_labels())
        np.testing.assert_array_equal(np.concatenate([i.pixels for i in passed]), split.images[np.arange(21)])
    next(iter(reader))  # broken off
    np.testing.assert_array_equal(next(iter(reader)).pixels, passed[0].pixels)
    reader.close()


@pytest.mark.parametrize("out_of", [2, 4, 8])
def test_shares_of_evaluation_are_the_whole_batches(folder: Path, out_of: int) -> None:
    """21 images in batches of 8: of the last one some shares are empty, but all have as many batches."""
    split = loaded(folder).test
    whole = list(EvaluationStream(split, batch_size=8, workers=0))
    readers = [EvaluationStream(split, batch_size=8, workers=0, share=Share(n, out_of)) for n in range(out_of)]
    for _ in range(2):
        for batch, *shares in zip(whole, *readers, strict=True):
            np.testing.assert_array_equal(np.concatenate([share.pixels for share in shares]), batch.pixels)
            np.testing.assert_array_equal(np.concatenate([share.labels for share in shares]), batch.labels)
    for reader in readers:
        reader.close()


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_streams import *
from test_streams import loaded, stream
reader = stream(loaded(Path(sys.argv[2])).train, workers=2)
reader.read(0)
import psutil
print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
time.sleep(60)
"""


@pytest.mark.full
def test_workers_end_with_a_parent_that_is_killed(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers):
        assert time.monotonic() < deadline, workers
        time.sleep(0.05)


# ---- training


def tiny(folder: Path, **fields: Any) -> Any:
    config = load_config(f"{CONFIG}:weight=none", [])
    small = {"image_size": 16, "batch_size": 8, "eval_batch_size": 8, "epochs": 3.0, "calibration_images": 4}
    with config.unlocked():
        for name, value in {"dataset": f"folder:{folder}", "workers": 0, **small, **fields}.items():
            config[name] = value
    return config


def test_a_run_from_files_goes_on_within_an_epoch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its records are those of a run that was never stopped; a truncated image is named once."""
    monkeypatch.setattr(loop, "LOOK_EVERY", 0.0)
    output = (tmp_path / "output").open("w+")
    from cimjax.training.show.display import Display

    cimjax.train(tiny(folder), workdir=tmp_path / "whole", model=Tiny(), display=Display(stream=output))
    output.seek(0)
    assert output.read().count("is truncated: what is there is decoded, and the rest of the image is grey") == 1
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step (10|11) of 21"):
        cimjax.train(tiny(folder), workdir=tmp_path / "cut", model=Tiny(), display=Stopping(after=10))
    cimjax.train(tiny(folder), workdir=tmp_path / "cut", model=Tiny(), display=quiet())
    assert without_times(read_records(tmp_path / "cut")) == without_times(read_records(tmp_path / "whole"))
    assert cimjax.load(tmp_path / "cut", model=Tiny()).class_names == loaded(folder).class_names


DEVICES = """
import os, sys
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=" + sys.argv[1]
sys.path.insert(0, sys.argv[2])
import jax
from test_streams import *
from test_streams import tiny
assert len(jax.devices()) == int(sys.argv[1])
config = tiny(Path(sys.argv[3]), epochs=1.0, steps_per_dispatch=3, parallel=sys.argv[5])
result = cimjax.train(config, workdir=sys.argv[4], model=Tiny(), display=quiet())
print(json.dumps([result.accuracy, result.loss, read_records(sys.argv[4])[0]["loss"]]))
"""


@pytest.mark.full
def test_devices_share_batches_from_files(folder: Path, tmp_path: Path) -> None:
    found = []
    for count, way in (("1", "shard_map"), ("2", "shard_map"), ("2", "pmap")):
        words = [count, str(Path(__file__).parent), str(folder), str(tmp_path / f"{count}{way}"), way]
        run = subprocess.run([sys.executable, "-c", DEVICES, *words], capture_output=True, text=True, check=True)
        found.append(json.loads(run.stdout.splitlines()[-1]))
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)


def test_evaluation_from_files_is_that_of_arrays(folder: Path) -> None:
    data = loaded(folder)
    arrays = [(split.images[np.arange(len(split))], split.known_labels()) for split in (data.train, data.test)]
    resident = cimjax.data.Dataset.from_arrays(
        "arrays", *arrays[0], *arrays[1], classes=3, mean=data.mean, std=data.std
    )
    config = tiny(folder, image_size=32)
    found = []
    for dataset in (data, resident):
        experiment = build(config, model=Tiny(), dataset=dataset)
        evaluator = Evaluator(experiment, experiment.dataset.test)
        found.append(evaluator(experiment.first_state()[0]))
        evaluator.close()
    # The random weights are the same: no step is set from images here.
    assert found[0] == found[1]


def test_missing_data_is_said_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = [f"--config.data_dir={tmp_path}", "--workdir", str(tmp_path / "run")]
    assert main(["train", "--config", CONFIG, *fields]) == 2
    assert capsys.readouterr().err.startswith("cimjax: imagenet2012 is not prepared: found no folder")
    assert not (tmp_path / "run").exists()


def trained(folder: Path, workdir: Path, *fields: str) -> subprocess.Popen[str]:
    command = [sys.executable, "train.py", "--config", f"{CONFIG}:weight=none", "--workdir", str(workdir)]
    small = ["image_size=32", "model.width=0.05", "batch_size=8", "eval_batch_size=8", "epochs=4", "warmup_epochs=0"]
    command += [f"--config.{field}" for field in (f"dataset=folder:{folder}", *small, *fields)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_until(happened: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def saved(workdir: Path) -> int:
    """The step of the last checkpoint."""
    return Checkpoints(workdir).latest_step() or 0


def records(workdir: Path) -> list[dict[str, Any]]:
    return read_records(workdir) if (workdir / "metrics.jsonl").exists() else []


@pytest.mark.full
def test_resnet_trains_from_files_by_any_number_of_workers_and_after_kills(folder: Path, tmp_path: Path) -> None:
    whole = trained(folder, tmp_path / "whole", "workers=0")
    assert "test accuracy" in (output := whole.communicate())[0], output
    other = trained(folder, tmp_path / "other", "workers=3")
    output, error = other.communicate()
    assert "test accuracy" in output and error == "", error
    # Killed, then stopped by Ctrl-C as a terminal sends it: to the workers too.
    cut = trained(folder, tmp_path / "cut", "workers=2")
    wait_until(lambda: saved(tmp_path / "cut") >= 7, cut)
    cut.kill()
    cut.communicate()
    cut = trained(folder, tmp_path / "cut", "workers=1")
    wait_until(lambda: saved(tmp_path / "cut") >= 14, cut)
    os.killpg(cut.pid, signal.SIGINT)
    output, error = cut.communicate()
    lines = error.splitlines()
    assert cut.returncode == 130 and len(lines) == 1 and lines[0].startswith("cimjax: stopped after step"), error
    output, error = trained(folder, tmp_path / "cut", "workers=2").communicate()
    assert "resumed after step" in output and error == "", error
    want = without_times(records(tmp_path / "whole"))
    assert without_times(records(tmp_path / "other")) == want == without_times(records(tmp_path / "cut"))


@pytest.mark.full
def test_imagenet_trains_through_arrays_from_records(imagenet: Path, tmp_path: Path) -> None:
    command = ["train", "--config", f"{CONFIG}:weight=layer", "--workdir", str(tmp_path / "run")]
    fields = ["image_size=32", "model.width=0.05", "batch_size=8", "eval_batch_size=8", "epochs=2", "workers=1"]
    fields += [f"data_dir={imagenet}", "calibration_images=8", "validation=0.1", "execution.product=grouped_conv"]
    fields += ["model.blocks=(1,1,1,1)"]
    assert main([*command, *(f"--config.{field}" for field in fields)]) == 0
    assert {record["split"] for record in records(tmp_path / "run")} >= {"train", "test", "validation", "result"}
    assert main(["evaluate", str(tmp_path / "run"), "--which", "best"]) == 0


@pytest.mark.full
def test_the_pipeline_is_timed_by_number_of_workers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_data, "_ALONE", 20)
    saved = tmp_path / "rates.json"
    command = ["bench", "--of", "data", "--config", CONFIG, f"--config.dataset=folder:{folder}", "--runs", "2"]
    assert main([*command, "--config.batch_size=16", "--config.image_size=32", "--save", str(saved)]) == 0
    printed = capsys.readouterr().out
    rates = json.loads(saved.read_text())["rates"]
    assert [rate["workers"] for rate in rates][:4] == [-1, -1, 0, 1]
    assert all(rate["images_per_second"] > 0 for rate in rates)
    assert "1,000 images/s need " in printed.splitlines()[-1]
    assert main(["bench", "--of", "data", "--config", str(ROOT / "configs" / "digits.py")]) == 2
    assert "whose images lie in memory" in capsys.readouterr().err
