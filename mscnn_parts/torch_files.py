"""Reads the arrays in a file of PyTorch, without PyTorch and without running any code that the file names."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class _Storage(NamedTuple):
    """Where the values of an array lie in the file."""

    key: str
    dtype: np.dtype


class _Array(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in values, not bytes


def _rebuild(storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> _Array:
    return _Array(storage, offset, shape, strides)


ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch", "FloatStorage"): np.dtype("<f4"),
    ("torch", "LongStorage"): np.dtype("<i8"),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Knows what arrays are made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of an array")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        return _Storage(pid[2], pid[1])


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a state dict that `torch.save` wrote before PyTorch 1.6, by name.

    Such a file has four pickles (a magic number, a version, the machine, the state dict), a pickled list of the
    storages' keys, and each storage: the count of its values as int64, then the values.

    Raises:
        pickle.UnpicklingError: the file names something that is no part of an array.
    """
    with open(path, "rb") as file:
        *_, described = [_ArrayUnpickler(file).load() for _ in range(4)]
        keys = _ArrayUnpickler(file).load()
        dtypes = {array.storage.key: array.storage.dtype for array in described.values()}
        values = {}
        for key in keys:
            count = int(np.frombuffer(file.read(8), "<i8")[0])
            values[key] = np.frombuffer(file.read(count * dtypes[key].itemsize), dtypes[key])
    return {name: _array(values[one.storage.key], one) for name, one in described.items()}


def _array(values: np.ndarray, described: _Array) -> np.ndarray:
    """An array with strides of its own: kernels are not contiguous."""
    strides = [step * values.itemsize for step in described.strides]
    view = np.lib.stride_tricks.as_strided(values[described.offset :], described.shape, strides, writeable=False)
    return view.copy()
