"""Where data sets come from: published ones by their names, .npz files and image folders."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mscnn_parts.data import IMAGE_SIZE, Dataset, RawData, split_data
from mscnn_parts.downloads import Archive, data_folder, download
from mscnn_parts.files import current_folder, places_of, project_root
from mscnn_parts.pictures import as_uint8, read_image_folder
from mscnn_parts.settings import FALLBACK_NOTICE, MSCNNError, check_image_size, check_seed, did_you_mean

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_NAMES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
STL10_NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
CIFAR10 = Archive(
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a",
    "cifar-10-batches-py",
    {  # as torchvision's reader checks them
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
)  # fmt: skip
CIFAR100 = Archive(
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85",
    "cifar-100-python",
    {
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
)  # fmt: skip
STL10 = Archive(
    "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz", "91f7769df0f17e558f3565bffb0c7dfb",
    "stl10_binary",
    {
        "train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
        "train_y.bin": "5a34089d4802c674881badbb80307741",
        "test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
        "test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
    },
)  # fmt: skip
KERAS_DATA_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/"
MNIST_SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"
FASHION_MD5 = {  # zalandoresearch/fashion-mnist, README
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
BUILT_IN = (
    "cifar10",
    "digits",
    "mnist",
    "fashion_mnist",
    "cifar100",
    "stl10",
)  # names of data sets; `./digits` is a folder


def load_dataset(
    name: str | Path = "auto",
    light_mode: bool = False,
    seed: int = 0,
    image_size: int = 0,
    mirror: bool = True,
    quarter_turns: bool = False,
) -> Dataset:
    """Loads a data set and splits it; see `Settings.dataset` for the names.

    Images are shrunk to `image_size` pixels in height and width, 0 meaning 32. Smaller ones stay as they are, but for
    those below 32, and are enlarged by Stage 1. `mirror` allows mirrored images, in training and in decisions, and
    `quarter_turns` turned ones, in training; a data set such as digits forbids both.

    `auto` is CIFAR-10 if it is on disk or can be downloaded, else scikit-learn's digits with
    `fallback=True`. A named data set never falls back.

    Raises:
        MSCNNError: the data is absent, damaged or not of the form described in the README, or the seed is no seed.

    Example:
        >>> data = load_dataset("digits", light_mode=True)
        >>> data.describe()["sizes"]
        {'train': 1006, 'calibration': 216, 'certification': 216, 'test': 300}
    """
    check_seed(seed)
    if not isinstance(name, (str, os.PathLike)):
        raise MSCNNError(f"dataset is {name!r}: give its name, or the path of a .npz file or an image folder.")
    for flag, value in {"light_mode": light_mode, "mirror": mirror, "quarter_turns": quarter_turns}.items():
        if not isinstance(value, (bool, np.bool_)):
            raise MSCNNError(f"{flag} is {value!r}: it has to be True or False.")
    check_image_size(image_size)
    size, fallback = int(image_size or IMAGE_SIZE), False
    if str(name) != "auto":
        raw = _read_dataset(str(name), size)
    else:
        try:
            raw = _cifar10()
        except FileNotFoundError as reason:
            _tell_fallback(reason)
            raw, fallback = _digits(), True
    data = split_data(raw, light_mode, seed, size)
    turned = data.flip and quarter_turns  # what may not be mirrored may not be turned, such as a 6
    return dataclasses.replace(data, flip=data.flip and mirror, quarter_turns=turned, fallback=fallback)


def auto_name(name: str) -> tuple[str, bool]:
    """The data set that a name stands for, and whether it is the fallback: `auto` is found or downloaded for that."""
    if name != "auto":
        return name, False
    try:
        CIFAR10.fetch()
    except FileNotFoundError as reason:
        _tell_fallback(reason)
        return "digits", True
    return "cifar10", False


def _tell_fallback(reason: FileNotFoundError) -> None:
    print(f"{'!' * 88}\n{FALLBACK_NOTICE}.\n{reason}\n{'!' * 88}")


def _read_dataset(name: str, size: int) -> RawData:
    builtin = dict(zip(BUILT_IN, (_cifar10, _digits, _mnist, _fashion_mnist, _cifar100, _stl10), strict=True))
    if name in builtin:
        try:
            return builtin[name]()
        except FileNotFoundError as error:
            raise MSCNNError(str(error)) from error
    path, places = find_data(name)
    if path is not None and path.is_dir():
        return read_image_folder(path, size)
    if path is not None and path.suffix.lower() == ".npz":
        return _npz(path)
    if path is not None or ("/" in name or os.sep in name) or name.endswith(".npz"):
        raise MSCNNError(
            f"No image folder or .npz file '{name}': looked in {' and '.join(str(place.parent) for place in places)}. "
            "Check the path."
        )
    known = f"auto, {', '.join(builtin)}, a .npz file or an image folder"
    absent = f", and no such folder in {' or '.join(str(place.parent) for place in places)}" if places else ""
    raise MSCNNError(f"Unknown dataset '{name}'{absent}: use {known}.{did_you_mean(name, builtin)}")


def find_data(name: str) -> tuple[Path | None, list[Path]]:
    """The folder or file that `dataset` names, if it is there, and the places where it was looked for."""
    if name in ("", "auto", *BUILT_IN):
        return None, []
    places = places_of(name, project_root(), current_folder())
    return next((place for place in places if os.path.exists(place)), None), places


def find_cifar10() -> Path | None:
    return CIFAR10.find()


def _cifar10() -> RawData:
    """CIFAR-10 in the publishers' layout: 50,000 train and 10,000 test images, uint8 (N, 32, 32, 3)."""
    folder = CIFAR10.fetch()
    parts = [_cifar_images(CIFAR10.read(folder, name), b"labels") for name in CIFAR10.files]
    x_train, y_train = map(np.concatenate, zip(*parts[:5], strict=True))
    return RawData(
        "cifar10", str(folder), CIFAR10_NAMES, x_train, y_train, *parts[5], published=json.dumps(CIFAR10.files)
    )


def _cifar100() -> RawData:
    """CIFAR-100 with its 100 fine categories: 50,000 train and 10,000 test images, uint8 (N, 32, 32, 3)."""
    folder = CIFAR100.fetch()
    train, test = (_cifar_images(CIFAR100.read(folder, name), b"fine_labels") for name in ("train", "test"))
    names = [name.decode() for name in _unpickled(CIFAR100.read(folder, "meta"))[b"fine_label_names"]]
    return RawData("cifar100", str(folder), names, *train, *test, published=json.dumps(CIFAR100.files))


def _cifar_images(content: bytes, labels: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 32, 32, 3) and labels (N,) of a file of CIFAR."""
    batch = _unpickled(content)
    images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (N, 32, 32, 3)
    return np.ascontiguousarray(images), np.asarray(batch[labels])


def _unpickled(content: bytes) -> dict[bytes, Any]:
    """Of `Archive.read` only, which checks the hash: a pickle can run code."""
    return pickle.loads(content, encoding="bytes")


def _stl10() -> RawData:
    """STL-10 in the publishers' binary files: 5,000 train and 8,000 test images, uint8 (N, 96, 96, 3)."""
    folder = STL10.fetch()

    def values(name: str) -> np.ndarray:
        return np.frombuffer(STL10.read(folder, name), np.uint8)

    def images(name: str) -> np.ndarray:
        columns_first = values(name).reshape(-1, 3, 96, 96)  # (N, channels, columns, rows)
        return np.ascontiguousarray(columns_first.transpose(0, 3, 2, 1))

    return RawData(
        "stl10", str(folder), STL10_NAMES, images("train_X.bin"), values("train_y.bin") - 1,
        images("test_X.bin"), values("test_y.bin") - 1, published=json.dumps(STL10.files),
    )  # fmt: skip


def _digits() -> RawData:
    """The 1,797 handwritten digits that come with scikit-learn, 8 x 8 gray."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)  # (1797, 64) from 0 to 16
    images = np.round(np.asarray(pixels) * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return RawData("digits", "scikit-learn", [str(d) for d in range(10)], images, np.asarray(labels), flip=False)


def _mnist() -> RawData:
    path = data_folder() / "mnist.npz"  # as it is, if it is there: nothing in it is executed
    if not os.path.isfile(path):
        path = download(KERAS_DATA_URL + "mnist.npz", f"sha256:{MNIST_SHA256}", "mnist.npz")
    return dataclasses.replace(_npz(path), name="mnist", flip=False)


def _fashion_mnist() -> RawData:
    paths = [
        download(KERAS_DATA_URL + name, f"md5:{md5}", f"fashion-mnist/{name}") for name, md5 in FASHION_MD5.items()
    ]
    content = [np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) for path in paths]
    x_train, x_test = (one[16:].reshape(-1, 28, 28, 1) for one in content[::2])  # 16 bytes of header
    return RawData(
        "fashion_mnist", str(paths[0].parent), FASHION_NAMES, x_train, content[1][8:], x_test, content[3][8:]
    )


def _npz(path: Path) -> RawData:
    """A `.npz` with x_train, y_train, x_test, y_test and optionally class_names; no pickles are opened."""
    arrays = _read_arrays(path, ("x_train", "y_train", "x_test", "y_test", "class_names"))
    x_train, x_test = as_uint8(arrays["x_train"], "x_train"), as_uint8(arrays["x_test"], "x_test")
    y_train = _as_labels(arrays["y_train"], "y_train", len(x_train))
    y_test = _as_labels(arrays["y_test"], "y_test", len(x_test))
    highest = int(max(y_train.max(), y_test.max()))
    given = _as_names(arrays["class_names"]) if "class_names" in arrays else None
    count = highest + 1 if given is None else len(given)
    if highest >= count:
        raise MSCNNError(f"{path} has labels up to {highest} but {count} class_names: number the labels from 0.")
    present = set(y_train.tolist())
    absent = next((label for label in range(count) if label not in present), None)
    if absent is not None:
        name = given[absent] if given else absent
        raise MSCNNError(f"{path} has no train images of category '{name}': number the labels without gaps, from 0.")
    if x_train.shape[-1] != x_test.shape[-1]:
        raise MSCNNError(f"{path}: x_train has {x_train.shape[-1]} channels, x_test has {x_test.shape[-1]}.")
    names = given or [str(label) for label in range(count)]
    return RawData(path.stem, str(path), names, x_train, y_train, x_test, y_test)


def _read_arrays(path: Path, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` that are wanted and there, each read to its end, which checks its sum.

    Raises:
        MSCNNError: the file is damaged or none, or lacks one of the wanted arrays but the last.
    """
    arrays, place = {}, ""
    try:
        with zipfile.ZipFile(path) as file:
            there = {name.removesuffix(".npy"): name for name in file.namelist()}
            for name in wanted:
                place = f"{name}: "
                if name in there:
                    with file.open(there[name]) as member:
                        arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
                        if member.read():
                            raise ValueError("it is longer than it says")
    except Exception as error:  # zlib, struct, zipfile, lzma and NumPy each have their own
        raise MSCNNError(
            f"{path} cannot be read as a .npz file of plain arrays: {place}{str(error) or type(error).__name__}. If it "
            f"is damaged or incomplete ({path.stat().st_size:,} bytes), get it anew; objects go in as text or numbers."
        ) from error
    missing = set(wanted[:-1]) - arrays.keys()
    if missing:
        raise MSCNNError(
            f"{path} lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(there)) or 'no arrays'}."
        )
    return arrays


def _as_labels(labels: np.ndarray, name: str, count: int) -> np.ndarray:
    """Labels as int64 (count,): of any integers, truth values or whole floats, also in a column."""

    def refuse(what: str):
        raise MSCNNError(f"Labels have to be {count} integers from 0: got {what}.")

    if labels.ndim > 1 and min(labels.shape) > 1:
        refuse(f"{name} of shape {labels.shape}; of rows with one 1 each, use {name}.argmax(axis=1)")
    if labels.dtype.kind not in "buif":
        refuse(f"{labels.dtype} in {name}; of names, use class_names, {name} = np.unique(names, return_inverse=True)")
    labels = labels.reshape(-1)
    if len(labels) != count:
        refuse(f"{len(labels)} in {name}, for {count} images in x{name[1:]}")
    numbers = labels.astype(np.float64)
    incorrect = labels[~((numbers >= 0) & (numbers < 2**31) & (numbers == np.floor(numbers)))]  # NaN, too
    if len(incorrect):
        refuse(f"{len(labels)} of {labels.dtype} in {name}, among them {incorrect[0]}")
    return labels.astype(np.int64)


def _as_names(names: np.ndarray) -> list[str]:
    """Names of categories from text, bytes in UTF-8 or numbers, also in a column."""
    if names.dtype.kind not in "SUuifb" or (names.ndim > 1 and min(names.shape) > 1):
        raise MSCNNError(f"class_names has shape {names.shape} and dtype {names.dtype}: use (C,) names as text.")
    try:
        names = np.char.decode(names, "utf-8") if names.dtype.kind == "S" else names
    except UnicodeDecodeError as error:
        raise MSCNNError(f"class_names holds bytes that are not UTF-8 ({error}): use text.") from error
    return names.reshape(-1).astype(str).tolist()
