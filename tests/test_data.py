"""The data room: real digits, miniature CIFAR archives through the real download and reading code, and every error.

No test reaches beyond this machine: the archives come from a server in this process.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

import cimjax.data
from cimjax.data import DamagedDataError, DataError, Dataset, Split, bridge, cache, cifar, digits
from cimjax.data.catalog import find

DIGITS = "cimjax_digits/1.0.0"
CIFAR100 = "cifar100/3.0.2"


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter in which every warning is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
    )


def message_of(call: Callable[[], object], kind: type[ValueError] = DataError) -> str:
    """The message of the error that a call must raise; it must be one line."""
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(one: Dataset, other: Dataset) -> bool:
    """Whether two data sets hold the same numbers in the same order."""
    return all(
        np.array_equal(getattr(getattr(one, split), field), getattr(getattr(other, split), field))
        for split in ("train", "test")
        for field in ("images", "labels")
    )


# ---- arrays of the user's own


def splits(train: int = 4, test: int = 2, shape: tuple[int, ...] = (5, 4, 3)) -> tuple[Split, Split]:
    rng = np.random.default_rng(0)
    return tuple(  # type: ignore[return-value]
        Split(rng.integers(0, 256, (n, *shape), np.uint8), np.arange(n, dtype=np.int32) % 3) for n in (train, test)
    )


def test_from_arrays_measures_what_is_not_given() -> None:
    train, test = splits(train=500)
    images = train.images.copy()
    data = Dataset.from_arrays("mine", images, train.labels.astype(np.uint8), test.images, test.labels.tolist())
    assert data.classes == 3
    assert data.image_shape == (5, 4, 3)
    assert len(data.train) == 500
    assert data.train.images is images
    np.testing.assert_allclose(data.mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.std, (images / 255).std((0, 1, 2)), rtol=1e-12)
    given = Dataset.from_arrays("mine", images, train.labels, test.images, test.labels, classes=7, std=np.ones(3))
    assert (given.classes, given.mean, given.std) == (7, data.mean, (1.0, 1.0, 1.0))


def test_grey_images_get_a_channel_and_a_constant_one_has_std_1() -> None:
    data = Dataset.from_arrays("grey", np.full((2, 4, 4), 51, np.uint8), [0, 1], np.zeros((1, 4, 4), np.uint8), [1])
    assert data.image_shape == (4, 4, 1)
    assert data.mean == pytest.approx((0.2,))
    assert data.std == (1.0,)


UINT8, INT32 = np.uint8, np.int32
REFUSED = {
    "float images": (lambda: Split(np.zeros((1, 4, 4, 3)), np.zeros(1, INT32)), "`images` must be .* uint8"),
    "flat images": (lambda: Split(np.zeros((1, 48), UINT8), np.zeros(1, INT32)), r"\(N, H, W, C\), got uint8 \(1, 4"),
    "list of images": (lambda: Split([[1]], np.zeros(1, INT32)), "got list"),
    "int64 labels": (lambda: Split(np.zeros((1, 4, 4, 3), UINT8), np.zeros(1, np.int64)), "`labels` must be .* int32"),
    "no images": (lambda: Split(np.zeros((0, 4, 4, 3), UINT8), np.zeros(0, INT32)), "must not be empty"),
    "lengths": (lambda: Split(np.zeros((2, 4, 4, 3), UINT8), np.zeros(1, INT32)), "same length, got 2 and 1"),
    "negative label": (lambda: Split(np.zeros((1, 4, 4, 3), UINT8), np.full(1, -1, INT32)), "0 or more, got -1"),
    "not a split": (lambda: Dataset("a", splits()[0], "b", 3, (0.5,) * 3, (1,) * 3), "`test` must be .*, got str"),
    "shapes": (lambda: Dataset("a", splits()[0], splits(shape=(5, 5, 3))[1], 3, (0.5,) * 3, (1,) * 3), "of one shape"),
    "label range": (lambda: Dataset("a", *splits(), 2, (0.5,) * 3, (1,) * 3), "`train` must be 0 .. 1 .*, got 2"),
    "classes": (lambda: Dataset("a", *splits(), 2.0, (0.5,) * 3, (1,) * 3), "`classes` must be an integer"),
    "channels of mean": (lambda: Dataset("a", *splits(), 3, (0.5,), (1,) * 3), r"`mean` .* per channel \(3\)"),
    "mean of 0 .. 255": (lambda: Dataset("a", *splits(), 3, (127,) * 3, (1,) * 3), "`mean` must lie in 0 .. 1"),
    "std": (lambda: Dataset("a", *splits(), 3, (0.5,) * 3, (1, 0, 1)), "`std` must be greater than 0"),
    "std that is not a number": (lambda: Dataset("a", *splits(), 3, (0.5,) * 3, (1, np.nan, 1)), "finite"),
    "name": (lambda: Dataset("", *splits(), 3, (0.5,) * 3, (1,) * 3), "`name`"),
    "one number for mean": (
        lambda: Dataset.from_arrays("a", np.zeros((1, 4, 4), UINT8), [0], np.zeros((1, 4, 4), UINT8), [0], mean=0.5),
        r"`mean` must hold one finite number per channel \(1\), got 0.5",
    ),
    "no numbers for std": (lambda: Dataset("a", *splits(), 3, (0.5,) * 3, (None,) * 3), "`std` must hold one finite"),
    "words for std": (lambda: Dataset("a", *splits(), 3, (0.5,) * 3, "abc"), "`std` must hold .*, got 'abc'"),
    "a label far off": (
        lambda: Dataset.from_arrays("a", *2 * [np.zeros((2, 4, 4), UINT8), [0, 2**31 - 1]]),
        "largest label is 2147483647, and there are 2 training images: number the classes from 0, or give `classes`",
    ),
    "validation": (lambda: Dataset("a", *splits(), 3, (0.5,) * 3, (1,) * 3, 0.1), "`validation` must be .*, got float"),
    "float images given": (lambda: Dataset.from_arrays("a", np.zeros((1, 4, 4)), [0], [[[0.5]]], [0]), "255 . images"),
    "one-hot labels": (
        lambda: Dataset.from_arrays("a", np.zeros((1, 4, 4), UINT8), [[0, 1]], np.zeros((1, 4, 4), UINT8), [0]),
        r"integers of shape \(N,\), got int64 \(1, 2\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    build, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        build()


def test_works_without_tensorflow_datasets(tmp_path: pathlib.Path) -> None:
    code = """
import sys
import numpy as np
sys.modules["tensorflow_datasets"] = None
import cimjax.data
heavy = {"PIL", "sklearn", "array_record", "absl", "requests", "jax"} & set(sys.modules)
assert not heavy, heavy
images = np.zeros((2, 4, 4), np.uint8)
cimjax.data.Dataset.from_arrays("mine", images, [0, 1], images, [0, 1])
try:
    cimjax.data.load("digits", sys.argv[1])
except cimjax.data.DataError as error:
    print(error)
"""
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    assert "tensorflow_datasets cannot be imported" in result.stdout
    assert bridge.INSTALL_COMMAND in result.stdout
    assert list(tmp_path.iterdir()) == []


# ---- digits

LOAD = "import sys, cimjax.data; cimjax.data.load(sys.argv[1], sys.argv[2])"


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Digits as a user's first call prepares them; that this prints nothing is asserted here."""
    root = tmp_path_factory.mktemp("digits")
    result = run_python(LOAD, "digits", root)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    return root


def test_digits_are_scikit_learns(digits_dir: pathlib.Path) -> None:
    from sklearn.datasets import load_digits

    original = load_digits()
    data = cimjax.data.load("digits", digits_dir)
    assert (data.name, data.classes, data.image_shape) == ("digits", 10, (8, 8, 1))
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.train.images.max() == 240
    np.testing.assert_allclose(data.mean, (data.train.images / 255).mean((0, 1, 2)), rtol=1e-12)
    for split, indices in zip((data.train, data.test), digits.split_indices(1797), strict=True):
        expected = {i: ((original.images[i] * 15).astype(np.uint8).tobytes(), original.target[i]) for i in indices}
        stored = ((image.tobytes(), label) for image, label in zip(split.images, split.labels, strict=True))
        assert sorted(stored) == sorted(expected.values())


def test_digits_split_is_fixed_and_disjoint() -> None:
    train, test = digits.split_indices(1797)
    assert sorted(train + test) == list(range(1797))
    assert test[:5] == [739, 874, 375, 1480, 219]


def test_digits_are_the_same_every_time(digits_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    random.seed(1)
    first = cimjax.data.load("digits", digits_dir)
    assert same(first, cimjax.data.load("digits", tmp_path))
    (tmp_path / DIGITS / cache.FILE).unlink()
    assert same(first, cimjax.data.load("digits", tmp_path))
    assert (tmp_path / DIGITS / cache.FILE).is_file()


def test_digits_are_a_real_tensorflow_dataset(digits_dir: pathlib.Path) -> None:
    import tensorflow_datasets as tfds

    info = tfds.builder("cimjax_digits", data_dir=digits_dir).info
    assert {name: split.num_examples for name, split in info.splits.items()} == {"train": 1437, "test": 360}
    builder = tfds.builder_from_directory(digits_dir / DIGITS)
    assert builder.as_data_source("test")[0]["image"].shape == (8, 8, 1)


def test_the_default_folder_is_that_of_tensorflow_datasets(digits_dir: pathlib.Path) -> None:
    code = "import sys, cimjax.data; print(len(cimjax.data.load('digits').test), 'tensorflow_datasets' in sys.modules)"
    result = run_python(code, TFDS_DATA_DIR=str(digits_dir))
    assert (result.stdout, result.stderr) == ("360 False\n", "")


def test_two_processes_prepare_at_the_same_time(tmp_path: pathlib.Path) -> None:
    code = """
import pathlib, random, sys, time
import cimjax.data, cimjax.data.digits, sklearn.datasets
random.seed(0)  # tensorflow-datasets draws the name of its unfinished folder from this generator
root, me = pathlib.Path(sys.argv[1]), sys.argv[2]
(root / f"ready{me}").touch()
while len(list(root.glob("ready*"))) < 2:
    time.sleep(0.005)
assert len(cimjax.data.load("digits", root).test) == 360
"""
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    both = [subprocess.Popen([*command, me], stderr=subprocess.PIPE, text=True) for me in "ab"]
    assert [process.communicate(timeout=60)[1] for process in both] == ["", ""]
    assert [process.returncode for process in both] == [0, 0]
    assert [path.name for path in (tmp_path / "cimjax_digits").iterdir()] == ["1.0.0"]


def test_switches_of_tensorflow_datasets_are_put_back(tmp_path: pathlib.Path) -> None:
    import logging

    from tensorflow_datasets.core.utils import tqdm_utils

    before = (tqdm_utils._active, logging.getLogger("absl").disabled)
    cimjax.data.prepare("digits", tmp_path)
    assert (tqdm_utils._active, logging.getLogger("absl").disabled) == before


# ---- CIFAR, from miniature archives


def write_archive(name: str, path: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Writes an archive laid out as the published one, two training images per class and one test image.

    Returns:
      Images and labels (the fine ones) of each split.
    """
    classes = find(name).classes
    rng = np.random.default_rng(classes)
    source = getattr(cifar, name.capitalize())._cifar_info.fget(find(name))
    contents = {
        source.prefix + file: "\n".join(f"{key}_{i}" for i in range(20 if key == "coarse_label" else classes)) + "\n"
        for key, file in zip(source.label_keys, source.label_files, strict=True)
    }
    expected, files = {}, {file: text.encode() for file, text in contents.items()}
    for split, number, parts in (("train", 2 * classes, source.train_files), ("test", classes, source.test_files)):
        images = rng.integers(0, 256, (number, 32, 32, 3), np.uint8)
        labels = np.arange(number) % classes
        expected[split] = (images, labels)
        columns = [labels // 5, labels] if name == "cifar100" else [labels]
        rows = np.concatenate(
            [np.stack(columns, 1).astype(np.uint8), images.transpose(0, 3, 1, 2).reshape(number, -1)], axis=1
        )
        for file, part in zip(parts, np.array_split(rows, len(parts)), strict=True):
            files[source.prefix + file] = part.tobytes()
    with tarfile.open(path, "w:gz") as tar:
        for file, data in files.items():
            member = tarfile.TarInfo(file)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return expected


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    folder = tmp_path_factory.mktemp("archives")
    expected = {
        name: write_archive(name, folder / f"cifar-{name.removeprefix('cifar')}-binary.tar.gz")
        for name in ("cifar10", "cifar100")
    }
    return {"folder": folder, **expected}  # type: ignore[dict-item]


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets both builders fetch their archive from another address."""
    for builder in (cifar.Cifar10, cifar.Cifar100):
        original = builder._cifar_info.fget

        def moved(self: object, original: Callable = original) -> object:
            info = original(self)
            return info._replace(url=f"{url}/{info.url.rpartition('/')[2]}")

        monkeypatch.setattr(builder, "_cifar_info", property(moved))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@contextlib.contextmanager
def serving(folder: pathlib.Path) -> Iterator[list[str]]:
    """Serves the archives on this machine, and lets both builders fetch them there; gives the paths asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd, pytest.MonkeyPatch.context() as patch:
        httpd.handle_error = lambda *_: None  # type: ignore[method-assign]  # the first question is hung up on
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        point_to(f"http://127.0.0.1:{httpd.server_port}", patch)
        yield asked
        httpd.shutdown()


@pytest.fixture
def server(archives: dict) -> Iterator[list[str]]:
    with serving(archives["folder"]) as asked:
        yield asked


@pytest.fixture(scope="module")
def miniature(archives: dict, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A prepared `cifar100` of 200 and 100 images, without a cache of decoded arrays."""
    root = tmp_path_factory.mktemp("miniature")
    with serving(archives["folder"]):
        cimjax.data.prepare("cifar100", root)
    (root / CIFAR100 / cache.FILE).unlink()
    return root


@pytest.fixture
def cifar_dir(miniature: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the miniature that a test may break."""
    return shutil.copytree(miniature, tmp_path / "data")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded_prepared_and_read(
    name: str, archives: dict, server: list[str], tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import tensorflow_datasets as tfds

    folder = cimjax.data.prepare(name, tmp_path)
    assert folder == tmp_path / name / "3.0.2"
    data = cimjax.data.load(name, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert (data.classes, data.image_shape, len(data.mean), len(data.std)) == (find(name).classes, (32, 32, 3), 3, 3)
    for split in ("train", "test"):
        images, labels = archives[name][split]
        stored = getattr(data, split)
        place = {image.tobytes(): number for number, image in enumerate(images)}
        order = [place[image.tobytes()] for image in stored.images]
        assert sorted(order) == list(range(len(images)))
        np.testing.assert_array_equal(stored.labels, labels[order])
    before = len(server)
    assert cimjax.data.prepare(name, tmp_path) == folder
    assert len(server) == before
    # What cimjax prepares, tensorflow-datasets' own builder reads, in the same order.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builder = tfds.builder(name, data_dir=tmp_path)
        first = builder.as_data_source("test")[0]
    np.testing.assert_array_equal(first["image"], data.test.images[0])
    assert first["label"] == data.test.labels[0]
    assert builder.info.features["label"].int2str(3) == "label_3"


def test_the_archive_is_used_again(server: list[str], tmp_path: pathlib.Path) -> None:
    cimjax.data.prepare("cifar100", tmp_path)
    shutil.rmtree(tmp_path / "cifar100")
    before = server.count("/cifar-100-binary.tar.gz")
    cimjax.data.prepare("cifar100", tmp_path)
    # Once to ask whether it is there (its checksum is not registered), not again to fetch it.
    assert server.count("/cifar-100-binary.tar.gz") == before + 1


def test_tfrecord_files_are_read_too(miniature: pathlib.Path, cifar_dir: pathlib.Path) -> None:
    folder = cifar_dir / CIFAR100
    for path in folder.glob("*.array_record-*"):
        reader = ArrayRecordReader(str(path))
        with (folder / path.name.replace("array_record", "tfrecord")).open("wb") as file:
            for record in reader.read_all():
                file.write(len(record).to_bytes(8, "little") + bytes(4) + record + bytes(4))
        path.unlink()
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    assert same(cimjax.data.load("cifar100", cifar_dir), cimjax.data.load("cifar100", miniature))
    os.truncate(folder / "cifar100-test.tfrecord-00000-of-00001", 100_000)
    assert "truncated" in message_of(lambda: cimjax.data.load("cifar100", cifar_dir), DamagedDataError)
    info.write_text(info.read_text().replace("tfrecord", "riegeli"))
    assert "is stored as riegeli" in message_of(lambda: cimjax.data.load("cifar100", cifar_dir))


# ---- the cache of decoded arrays


def test_a_cache_that_is_old_or_broken_is_replaced(cifar_dir: pathlib.Path) -> None:
    first = cimjax.data.load("cifar100", cifar_dir)
    cached = cifar_dir / CIFAR100 / cache.FILE
    forged = dict(np.load(cached))
    forged["test_labels"][:] = 0
    np.savez(cached, **forged)
    assert cimjax.data.load("cifar100", cifar_dir).test.labels.max() == 0
    os.utime(cifar_dir / CIFAR100 / "cifar100-test.array_record-00000-of-00001")
    assert same(cimjax.data.load("cifar100", cifar_dir), first)
    os.truncate(cached, cached.stat().st_size // 2)
    assert same(cimjax.data.load("cifar100", cifar_dir), first)
    assert same(cimjax.data.load("cifar100", cifar_dir), first)
    assert not list(cached.parent.glob("*.tmp"))


def test_a_folder_that_cannot_be_written_has_no_cache(cifar_dir: pathlib.Path) -> None:
    (cifar_dir / CIFAR100 / cache.FILE).unlink(missing_ok=True)
    (cifar_dir / CIFAR100 / cache.FILE).mkdir()
    assert len(cimjax.data.load("cifar100", cifar_dir).train) == 200
    assert not list((cifar_dir / CIFAR100).glob("*.tmp"))


# ---- errors


def test_unknown_names() -> None:
    assert cimjax.data.names() == ("cifar10", "cifar100", "digits", "imagenet2012")
    for call in (cimjax.data.load, cimjax.data.prepare):
        assert "did you mean 'cifar100'?" in message_of(functools.partial(call, "CIFAR-100"), ValueError)
    assert "known are cifar10, cifar100, digits, imagenet2012" in message_of(
        lambda: cimjax.data.load("svhn"), ValueError
    )
    assert "did you mean 'imagenet2012'?" in message_of(lambda: cimjax.data.load("imagenet"), ValueError)


def test_load_never_downloads(server: list[str], tmp_path: pathlib.Path) -> None:
    message = message_of(lambda: cimjax.data.load("cifar100", tmp_path / "a b"))
    assert f"found no folder {tmp_path}/a b/cifar100/3.0.2" in message
    assert f"cimjax data prepare cifar100 --data_dir '{tmp_path}/a b'" in message
    assert server == []
    assert list(tmp_path.iterdir()) == []


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as httpd:
        port = httpd.server_port  # free again after this block
    point_to(f"http://127.0.0.1:{port}", monkeypatch)
    message = message_of(lambda: cimjax.data.prepare("cifar100", tmp_path))
    assert f"{port}/cifar-100-binary.tar.gz cannot be reached (ConnectionError)" in message
    assert f"cifar-100-binary.tar.gz put into {tmp_path}/downloads/manual" in message
    assert list(tmp_path.iterdir()) == []


def test_an_archive_with_the_wrong_checksum(tmp_path: pathlib.Path) -> None:
    manual = tmp_path / "downloads/manual/cifar-100-binary.tar.gz"
    manual.parent.mkdir(parents=True)
    manual.write_bytes(b"not the archive")
    message = message_of(lambda: cimjax.data.prepare("cifar100", tmp_path))
    assert "wrong checksum" in message
    assert f"cimjax data prepare cifar100 --data_dir {tmp_path}" in message


def test_a_broken_download(archives: dict, server: list[str], tmp_path: pathlib.Path) -> None:
    archive = archives["folder"] / "cifar-100-binary.tar.gz"
    whole = archive.read_bytes()
    try:
        archive.write_bytes(whole[: len(whole) // 2])
        message = message_of(lambda: cimjax.data.prepare("cifar100", tmp_path))
    finally:
        archive.write_bytes(whole)
    assert "cifar100 could not be prepared" in message
    assert list((tmp_path / "cifar100").iterdir()) == []


def break_image(path: pathlib.Path) -> None:
    """Writes the records again, whole, with one PNG that is none."""
    reader = ArrayRecordReader(str(path))
    records = reader.read_all()
    reader.close()
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for number, record in enumerate(records):
        writer.write(record.replace(b"IDAT", b"XXXX") if number == 7 else record)
    writer.close()


def overwrite(path: pathlib.Path) -> None:
    """Changes bytes in the middle."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(3000))


def replace(old: str, new: str) -> Callable[[pathlib.Path], object]:
    return lambda path: path.write_text(path.read_text().replace(old, new))


RECORDS, INFO = "cifar100-test.array_record-00000-of-00001", "dataset_info.json"
DAMAGES: dict[str, tuple[str, Callable[[pathlib.Path], object], str]] = {
    "truncated": (RECORDS, lambda path: os.truncate(path, path.stat().st_size // 2), "Riegeli"),
    "emptied": (RECORDS, lambda path: os.truncate(path, 0), "64KB"),
    "missing": (RECORDS, lambda path: path.unlink(), "No such file"),
    "overwritten": (RECORDS, overwrite, ""),
    "image": (RECORDS, break_image, ""),
    "more examples": (INFO, replace('"100"', '"99"'), "test has 100 examples, its dataset_info.json says 99"),
    "fewer examples": (INFO, replace('"100"', '"101"'), "test has 100 examples, its dataset_info.json says 101"),
    "no split": (INFO, replace('"test"', '"validation"'), "there is no split 'test'"),
    "no info": (INFO, lambda path: path.unlink(), "dataset_info.json is missing"),
    "half an info": (INFO, lambda path: os.truncate(path, path.stat().st_size // 2), "JSON"),
}


@pytest.mark.parametrize("case", DAMAGES)
@pytest.mark.parametrize("cached", [False, True])
def test_damage_is_told_in_one_line(case: str, cached: bool, cifar_dir: pathlib.Path) -> None:
    if cached:
        cimjax.data.load("cifar100", cifar_dir)
    file, damage, words = DAMAGES[case]
    damage(cifar_dir / CIFAR100 / file)
    message = message_of(lambda: cimjax.data.load("cifar100", cifar_dir), DamagedDataError)
    assert message.startswith(f"cifar100 in {cifar_dir / CIFAR100} is damaged (")
    assert message.endswith(f"mend it with: cimjax data prepare cifar100 --data_dir {cifar_dir}")
    assert words in message


def test_prepare_mends_damage(digits_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    root = shutil.copytree(digits_dir, tmp_path / "data")
    os.truncate(root / DIGITS / "cimjax_digits-train.array_record-00000-of-00001", 70_000)
    assert "data prepare digits" in message_of(lambda: cimjax.data.load("digits", root), DamagedDataError)
    cimjax.data.prepare("digits", root)
    assert same(cimjax.data.load("digits", root), cimjax.data.load("digits", digits_dir))
    assert [path.name for path in root.rglob("*incomplete*")] == []


def test_damage_stays_when_it_cannot_be_mended(cifar_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to("http://127.0.0.1:9", monkeypatch)
    (cifar_dir / CIFAR100 / RECORDS).unlink()
    shutil.rmtree(cifar_dir / "downloads")
    before = sorted(cifar_dir.rglob("*"))
    message_of(lambda: cimjax.data.prepare("cifar100", cifar_dir))
    assert sorted(cifar_dir.rglob("*")) == before


def test_a_place_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    message = message_of(lambda: cimjax.data.load("digits", tmp_path / "file"))
    assert "digits could not be prepared in" in message
    assert "(Not a directory)" in message
    assert "gs://bucket" in message_of(lambda: cimjax.data.load("digits", "gs://bucket"))
    for call in (cimjax.data.load, cimjax.data.prepare):
        assert "cannot be read (File name too long)" in message_of(functools.partial(call, "cifar100", "a" * 300))


def test_files_that_may_not_be_read(cifar_dir: pathlib.Path) -> None:
    (cifar_dir / CIFAR100 / RECORDS).chmod(0)
    if os.access(cifar_dir / CIFAR100 / RECORDS, os.R_OK):
        pytest.skip("this user may read everything")
    message = message_of(lambda: cimjax.data.load("cifar100", cifar_dir))
    assert "cannot be read" in message
    assert "damaged" not in message


def test_scikit_learn_is_not_installed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "sklearn cannot be imported" in message_of(lambda: cimjax.data.load("digits", tmp_path))


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_full_disk(tmp_path: pathlib.Path) -> None:
    code = """
import resource, sys
import cimjax.data
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    cimjax.data.load("digits", sys.argv[1])
except cimjax.data.DataError as error:
    print(error)
"""
    result = run_python(code, tmp_path)
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    assert "digits could not be prepared" in result.stdout
    assert "File too large" in result.stdout
    assert list((tmp_path / "cimjax_digits").iterdir()) == []


def test_a_part_has_the_first_classes_and_the_first_images_of_each() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 4, 4, 3), np.uint8)
    labels = rng.permutation(np.repeat(np.arange(6), 10))
    whole = Dataset.from_arrays("mine", images, labels, images[:30], labels[:30])
    part = whole.part(classes=3, images=12)
    assert (part.classes, len(part.train), part.mean, part.std) == (3, 12, whole.mean, whole.std)
    for label in range(3):
        np.testing.assert_array_equal(part.train.images[part.train.labels == label], images[labels == label][:4])
    np.testing.assert_array_equal(part.test.labels, labels[:30][labels[:30] < 3])
    assert whole.part() is whole
    assert len(whole.part(images=6).train) == 6 and len(whole.part(classes=2).train) == 20
    assert "give 2 to 6, or 0 for all" in message_of(lambda: whole.part(classes=7), ValueError)
    assert "give a multiple of 3, the number of classes, up to 30" in message_of(
        lambda: whole.part(classes=3, images=13), ValueError
    )
    assert "up to 60" in message_of(lambda: whole.part(images=66), ValueError)


def test_some_training_images_are_held_out() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (100, 4, 4, 3), np.uint8)
    labels = rng.permutation(np.repeat(np.arange(4), (40, 30, 20, 10)))
    whole = Dataset.from_arrays("mine", images, labels, images[:30], labels[:30])
    assert whole.validation is None and whole.holding_out(0) is whole
    held = whole.holding_out(0.2, seed=3)
    assert held.validation is not None
    assert np.bincount(held.validation.labels).tolist() == [8, 6, 4, 2]
    assert (held.mean, held.std, held.test) == (whole.mean, whole.std, whole.test)
    # Both are in the order of the whole, and together they are the whole.
    places = {image.tobytes(): place for place, image in enumerate(images)}
    train, validation = ([places[image.tobytes()] for image in s.images] for s in (held.train, held.validation))
    assert train == sorted(train) and validation == sorted(validation)
    assert sorted(train + validation) == list(range(100))
    np.testing.assert_array_equal(held.train.labels, labels[train])
    # A function of the seed alone, the same everywhere.
    assert validation[:5] == [places[image.tobytes()] for image in whole.holding_out(0.2, 3).validation.images[:5]]
    assert validation != [places[image.tobytes()] for image in whole.holding_out(0.2, 4).validation.images]
    part = held.part(classes=2)
    assert np.bincount(part.validation.labels).tolist() == [8, 6] and len(part.train) == 56
    for call, words in (
        (lambda: whole.holding_out(1), "`part` is 1; give the part"),
        (lambda: whole.holding_out(-0.1), "0 to below 1"),
        (lambda: whole.holding_out("a"), "`part` is 'a'"),
        (lambda: whole.holding_out(float("nan")), "`part` is nan"),
        (lambda: whole.holding_out(0.001), "leaves a split empty"),
        (lambda: whole.holding_out(0.999), "leaves a split empty"),
        (lambda: held.holding_out(0.1), "20 images are held out already"),
    ):
        assert words in message_of(call, ValueError)


@pytest.mark.parametrize("call", [cimjax.data.load, cimjax.data.prepare])
def test_the_folder_of_one_data_set_is_not_that_of_all(
    call: Callable, digits_dir: pathlib.Path, miniature: pathlib.Path, tmp_path: pathlib.Path, server: list[str]
) -> None:
    for name, root, one in (("digits", digits_dir, DIGITS), ("cifar100", miniature, CIFAR100)):
        before = sorted(root.rglob("*"))
        for folder in (root / one, (root / one).parent):
            message = message_of(functools.partial(call, name, folder))
            assert message.startswith(f"{folder} is the folder of one data set, not of all: give {root} as `data_dir`")
        assert sorted(root.rglob("*")) == before
    # Nothing is there, and the place is wrong all the same.
    message = message_of(functools.partial(call, "cifar100", tmp_path / CIFAR100))
    assert f"give {tmp_path} as `data_dir`" in message
    assert list(tmp_path.iterdir()) == [] == server


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(*_: object) -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr(pathlib.Path, "expanduser", no_home)
    for call in (cimjax.data.load, cimjax.data.prepare):
        assert "there is no home for '~/tensorflow_datasets'; give" in message_of(functools.partial(call, "digits"))
