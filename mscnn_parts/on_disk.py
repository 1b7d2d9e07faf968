"""Images or features that stay on disk: a file that holds them, and what stands in for some rows of its array."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from mscnn_parts.files import check_writable, write_atomically
from mscnn_parts.settings import MSCNNError

LARGE = 500e6  # bytes; more images are not copied: a training reads them batch by batch, also where there is a GPU


class IndexedRows(np.lib.mixins.NDArrayOperatorsMixin):
    """Some rows of a larger array, in any order, which are read when they are needed: a stand-in for their array.

    A slice or an index array gives another stand-in, and reads nothing; one index gives a row. All else that an
    array can do is done on the array, for which all its rows are read.

    Args:
        array: images, uint8 (M, H, W, channels), or features (M, ...), in memory or a `np.memmap`.
        indices: int64 (N,), of the rows; None: all of them.
    """

    def __init__(self, array: np.ndarray, indices: np.ndarray | None = None):
        self.array, self.indices = array, np.arange(len(array)) if indices is None else indices

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.indices), *self.array.shape[1:])

    @property
    def ndim(self) -> int:
        return self.array.ndim

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def on_disk(self) -> bool:
        return isinstance(self.array, np.memmap)

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        place = (self.array.filename or "a temporary file") if isinstance(self.array, np.memmap) else "memory"
        return f"<IndexedRows {self.shape} in {place}>"

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice) or (isinstance(key, (list, np.ndarray)) and np.ndim(key) == 1):
            return IndexedRows(self.array, self.indices[key])
        if isinstance(key, (int, np.integer)):
            return np.array(self.array[self.indices[key]])
        return np.asarray(self)[key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        first = int(self.indices[0]) if len(self) else 0
        in_a_row = np.array_equal(self.indices, np.arange(first, first + len(self)))  # these need no copy
        rows = self.array[first : first + len(self)] if in_a_row else self.array[self.indices]
        return np.array(rows, dtype) if copy and in_a_row else np.asarray(rows, dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        read = [np.asarray(array) if isinstance(array, IndexedRows) else array for array in inputs]
        return getattr(ufunc, method)(*read, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(np.ndarray, name):  # what libraries ask for is not worth reading it all
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        return getattr(np.asarray(self), name)


def indexed(images: np.ndarray, indices: np.ndarray | None = None) -> np.ndarray:
    """`IndexedRows` of an array under its type; such a stand-in is returned as it is."""
    return images if isinstance(images, IndexedRows) else cast(np.ndarray, IndexedRows(images, indices))


def is_on_disk(images: np.ndarray) -> bool:
    """Whether images are a stand-in for images on disk."""
    return isinstance(images, IndexedRows) and images.on_disk


def is_large(images: np.ndarray) -> bool:
    """Whether images are on disk, or a stand-in for so many that a copy of them is to be avoided."""
    return is_on_disk(images) or (isinstance(images, IndexedRows) and images.nbytes > LARGE)


def unless_large(images: np.ndarray) -> np.ndarray:
    """The array for which a stand-in stands; of large ones the stand-in itself."""
    return images if is_large(images) else np.asarray(images)


def joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Rows of two arrays as one array, which are not read if both stand for rows of the same."""
    if isinstance(first, IndexedRows) and isinstance(second, IndexedRows) and first.array is second.array:
        return indexed(first.array, np.concatenate([first.indices, second.indices]))
    return np.concatenate([first, second])


def file_of(path: Path, shape: Sequence[int], images: Iterable[np.ndarray]) -> np.memmap:
    """Opens a file NAME-KEY.npy, which is written if it is not there; files NAME with other keys are deleted then.

    Args:
        shape: (N, H, W, channels). images: N of them, uint8 (H, W, channels) each, read one by one.

    Raises:
        MSCNNError: the file cannot be written, or an image cannot be read.
    """
    needed = math.prod(shape)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, header | {"shape": tuple(shape)})
            for image in _exactly((image[None] for image in images), shape):
                file.write(image.tobytes())

    if not path.is_file() or path.stat().st_size < needed:
        for old in path.parent.glob(f"{path.name.rpartition('-')[0]}-*.npy"):
            old.unlink(missing_ok=True)
        take = f"The images take {needed / 1e9:,.2f} GB, more than half of the free memory, and"
        _check_space(path.parent, needed, take, "give a smaller image_size, ")
        write_atomically(path, write)
    return cast(np.memmap, np.load(path, mmap_mode="r"))


def filled(
    shape: Sequence[int], dtype: Any, parts: Iterable[np.ndarray], in_memory: float, folders: Sequence[Path]
) -> np.ndarray:
    """An array of features from parts that follow each other; of more than `in_memory` bytes in a temporary file.

    Args:
        shape: (N, ...). parts: of (n, ...) each, N rows in all. folders: the file is made in the first with room.

    Raises:
        MSCNNError: the file cannot be written, or the disk has no room for it.
        ValueError: the parts are not of that shape.
    """
    needed = math.prod(shape) * np.dtype(dtype).itemsize
    if needed > in_memory:
        folder = _with_room(folders, needed)
        _check_space(folder, needed, f"The features take {needed / 1e9:,.2f} GB,")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:  # the mapping keeps what it needs of it
                for part in _exactly(parts, shape):
                    file.write(part.astype(dtype, copy=False).tobytes())
                file.flush()
                return np.memmap(file, dtype, "r", shape=tuple(shape))
        except OSError as error:
            raise MSCNNError(
                f"Features of {needed / 1e9:,.2f} GB cannot be kept in {folder}: {error.strerror}. Make room there, or "
                "set MSCNN_DATA_DIR to a folder on another disk."
            ) from error
    array, done = np.empty(tuple(shape), dtype), 0
    for part in _exactly(parts, shape):
        array[done : done + len(part)] = part
        done += len(part)
    return array


def _with_room(folders: Sequence[Path], needed: int) -> Path:
    """The first folder that has room for so many bytes and may be written to; the first of all if there is none."""
    for folder in folders:
        with contextlib.suppress(OSError, MSCNNError):
            _check_space(folder, needed, "")
            check_writable(folder, "", "")
            return folder
    return folders[0]


def _exactly(parts: Iterable[np.ndarray], shape: Sequence[int]) -> Iterator[np.ndarray]:
    """The parts of an array of a shape, one by one; raises ValueError where they are not that."""
    rows = 0
    for part in parts:
        rows += len(part)
        if part.shape[1:] != tuple(shape[1:]) or rows > shape[0]:
            raise ValueError(f"A part {part.shape} makes {rows} rows: the array is {tuple(shape)}.")
        yield part
    if rows < shape[0]:
        raise ValueError(f"The parts have {rows} rows: the array is {tuple(shape)}.")


def _check_space(folder: Path, needed: int, take: str, remedy: str = "") -> None:
    """Raises MSCNNError, which begins with `take` and offers `remedy`, if the disk lacks room for so many bytes."""
    place = next(place for place in (folder, *folder.parents) if place.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise MSCNNError(
            f"{take} more than the {free / 1e9:,.2f} GB that are free on the disk of {folder}: make room there, "
            f"{remedy}or set MSCNN_DATA_DIR to a folder on another disk."
        )
