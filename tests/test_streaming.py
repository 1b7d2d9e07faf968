"""Folders of images that do not fit in memory: the file that holds them, and all that is done with a data set."""

import os
import shutil
import tracemalloc
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, TINY_NAMES, patch_rooms, tiny_images
from PIL import Image

import mscnn_helpers as mscnn
from mscnn_helpers import MSCNNError, Recipe, load_dataset
from mscnn_parts.data import RawData, split_data, train_and_calibration
from mscnn_parts.on_disk import IndexedRows, filled, joined
from mscnn_parts.pictures import free_memory

SPLITS = ("train", "calibration", "certification", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """900 images of five categories: `train/`, `val/` and `test/` of 700, 100 and 100."""
    place = tmp_path_factory.mktemp("images") / "many pets"
    for seed, (split, count) in enumerate({"train": 700, "val": 100, "test": 100}.items()):
        labels = np.arange(count) % len(TINY_NAMES)
        for i, (image, label) in enumerate(zip(tiny_images(labels, seed), labels, strict=True)):
            path = place / split / TINY_NAMES[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return place


@pytest.fixture(scope="module")
def in_memory(folder) -> mscnn.Dataset:
    return load_dataset(folder)


@pytest.fixture
def no_memory(tmp_path, monkeypatch) -> Path:
    """Half of the free memory holds no images; returns the folder where they are kept."""
    monkeypatch.setenv("MSCNN_DATA_DIR", str(tmp_path / "datasets"))
    patch_rooms(monkeypatch, "free_memory", lambda: 2 * 16 * 16 * 3)
    return tmp_path / "datasets" / ".mscnn_cache"


@pytest.fixture
def on_disk(folder, no_memory) -> mscnn.Dataset:
    return load_dataset(folder)


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """How many images are read at a time, of each reading."""
    counts, read = [], IndexedRows.__array__
    monkeypatch.setattr(
        IndexedRows,
        "__array__",
        lambda self, *given, **named: (counts.append(len(self)), read(self, *given, **named))[1],
    )
    return counts


def test_a_folder_without_room_in_memory_is_the_same_data_set(folder, in_memory, no_memory, capsys):
    data = load_dataset(folder)
    (file,) = no_memory.iterdir()
    told = f"900 images of 32 px, 3 MB, do not fit in half of the free memory (0 MB): they are kept in {file}"
    assert told in capsys.readouterr().out
    for name in SPLITS:
        expected, split = getattr(in_memory, name), getattr(data, name)
        assert type(expected.images) is np.ndarray
        assert isinstance(split.images, IndexedRows)
        assert np.array_equal(split.images, expected.images)
        assert np.array_equal(split.labels, expected.labels)
    assert data.describe() == in_memory.describe()
    assert data.input_shape == in_memory.input_shape
    np.testing.assert_array_equal(data.channel_statistics(), in_memory.channel_statistics())
    light = load_dataset(folder, light_mode=True, seed=1)
    assert isinstance(light.train.images, IndexedRows)
    assert list(no_memory.iterdir()) == [file]


def trained(data: mscnn.Dataset, reads: list[int]):
    """A model after an epoch of Stage 1 and of one verifier, their histories, and its decisions on the test split."""
    recipe, histories = Recipe(epochs=1, batch_size=64), []
    model = mscnn.MultiStageCNN.for_dataset(data, **SMALL)
    reads.clear()  # whitening has looked at some thousand images
    histories.append(mscnn.train_stage1(model, data, recipe))
    model.train_only("cat")
    histories += mscnn.train_stage2(model, data, recipe).values()
    model.set_stage2_category_trainable()
    model.calibrate(data.calibration)
    return model, histories, model.decide(data.test.images)


def test_training_reads_batches_and_gives_the_same_model(in_memory, on_disk, reads):
    expected, expected_histories, expected_decisions = trained(in_memory, reads)
    assert reads == []
    model, histories, decisions = trained(on_disk, reads)
    assert 0 < max(reads) <= 512 < len(on_disk.train)
    for was, now in zip(expected_histories, histories, strict=True):
        assert was.keys() == now.keys()
        for key in was.keys() - {"seconds"}:
            np.testing.assert_allclose(now[key], was[key], rtol=1e-3, atol=1e-3)
    for was, now in zip(expected.weights, model.weights, strict=True):
        np.testing.assert_allclose(now, was, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(decisions.stage1_category, expected_decisions.stage1_category)
    np.testing.assert_allclose(decisions.confidence, expected_decisions.confidence, atol=1e-3)
    traces = mscnn.trace_decisions(model, on_disk.test.images[:2])
    assert np.array_equal(traces[1].image, in_memory.test.images[1])


def test_the_file_is_kept_as_long_as_the_folder_is_what_it_was(in_memory, folder, tmp_path, no_memory, monkeypatch):
    own = shutil.copytree(folder, tmp_path / "own")
    first = load_dataset(own).fingerprint
    (file,) = no_memory.iterdir()
    with monkeypatch.context() as patched:
        patch_rooms(patched, "read_image", None)  # nothing is read again
        assert load_dataset(own).fingerprint == first == in_memory.fingerprint

    path = own / "test" / "cat" / "1.png"
    Image.new("RGB", (32, 32)).save(path)
    os.utime(path, (0, 0))
    assert load_dataset(own).fingerprint != first
    (changed,) = no_memory.iterdir()
    assert changed != file
    os.truncate(changed, 1000)
    assert (load_dataset(own).test.images[20] == 0).all()
    load_dataset(own, image_size=16)
    assert len(list(no_memory.iterdir())) == 2, "one for each size"


def test_a_bad_image_or_a_full_disk_leaves_no_file(folder, tmp_path, no_memory, monkeypatch):
    own = shutil.copytree(folder, tmp_path / "own")
    (own / "train" / "cat" / "1.png").write_bytes(b"no picture")
    with pytest.raises(MSCNNError, match=r"1\.png cannot be read as an image(.|\n)*1 bad in"):
        load_dataset(own)
    assert list(no_memory.iterdir()) == []
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(900 * 32 * 32 * 3 - 1))
    with pytest.raises(MSCNNError, match=r"more than half of the free memory.*mscnn_cache: make room.*MSCNN_DATA_DIR"):
        load_dataset(folder)


def test_free_memory_is_what_both_the_system_and_the_container_have(tmp_path):
    system, container = tmp_path / "meminfo", tmp_path / "cgroup"
    assert free_memory(system, container) is None
    system.write_text("MemTotal:       9000 kB\nMemAvailable:    800 kB\n")
    container.mkdir()
    for limit, expected in (("max", 800 * 1024), ("500000", 500_000 - 200_000 + 30_000), ("1000", 0)):
        for name, text in {"max": limit, "current": "200000" if limit != "1000" else "90000",
                           "stat": "anon 5\ninactive_file 30000\nactive_file 7\n"}.items():  # fmt: skip
            (container / f"memory.{name}").write_text(text + "\n")
        assert free_memory(system, container) == expected


def test_half_of_the_free_memory_is_the_limit(folder, monkeypatch):
    patch_rooms(monkeypatch, "free_memory", lambda: 2 * 900 * 32 * 32 * 3)
    assert isinstance(load_dataset(folder).train.images, np.ndarray)
    patch_rooms(monkeypatch, "free_memory", lambda: 2 * 900 * 32 * 32 * 3 - 2)
    assert load_dataset(folder).train.images.on_disk


def test_what_stands_in_for_an_array_reads_only_what_is_asked_for(reads):
    array = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), np.uint8)
    order = np.random.default_rng(1).permutation(20)
    images = IndexedRows(array, order)
    part = images[5:15][np.arange(10) % 2 == 0][[3, 1]]
    assert (len(part), part.shape, part.ndim, part.dtype, part.nbytes) == (2, (2, 4, 4, 3), 4, np.uint8, 96)
    assert np.array_equal(images[7], array[order[7]])
    assert np.array_equal(images[np.int64(-1)], array[order[-1]])
    assert not hasattr(images, "numpy")
    assert "(20, 4, 4, 3) in memory" in repr(images)
    assert not reads
    assert np.array_equal(part, array[order[[11, 7]]])
    assert np.array_equal(images[:, 1, ::-1], array[order][:, 1, ::-1])
    assert np.array_equal(images / 255, array[order] / 255)
    assert (images == array[order]).all()
    assert images.mean() == array.mean()
    assert np.array_equal(joined(part, images), np.concatenate([part, images]))


@pytest.mark.parametrize("in_memory", [0, 1e9])
def test_features_are_filled_in_from_parts(in_memory, tmp_path):
    parts = np.split(np.arange(12, dtype=np.float32).reshape(6, 2), [2, 5])
    (tmp_path / "missing").touch()  # where no folder can be made, the next is taken
    array = filled((6, 2), np.float32, parts, in_memory, [tmp_path / "missing/file", tmp_path])
    assert isinstance(array, np.memmap) == (not in_memory)
    assert np.array_equal(array, np.concatenate(parts))
    assert ("in memory" if in_memory else "in a temporary file") in repr(IndexedRows(array))
    wrong = {"5 rows": parts[:2], "8 rows": [*parts, parts[0]], r"\(2, 1\)": [part[:, :1] for part in parts]}
    for message, given in wrong.items():
        with pytest.raises(ValueError, match=f"{message}.*the array is \\(6, 2\\)"):
            filled((6, 2), np.float32, given, in_memory, [tmp_path])


def test_features_without_room_on_the_disk_are_refused(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(47))
    with pytest.raises(MSCNNError, match=r"The features take .* more than the 0\.00 GB that are free.*MSCNN_DATA_DIR"):
        filled((6, 2), np.float32, [], 0, [tmp_path / "cache"])
    assert list(tmp_path.iterdir()) == []


def test_the_base_network_reads_batches(on_disk, reads):
    model = mscnn.MultiStageCNN.for_dataset(on_disk, **SMALL)
    reads.clear()
    logits = mscnn.stage2_base_logits(model, on_disk.train.images)
    assert reads == [500, 200]
    expected = model.stage2_base.predict(np.asarray(on_disk.train.images), verbose=0)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_train_and_calibration_are_joined_without_reading(on_disk, reads):
    both = train_and_calibration(on_disk)
    assert isinstance(both.images, IndexedRows)
    assert not reads
    assert len(both) == len(both.images) == len(on_disk.train) + len(on_disk.calibration)


@pytest.mark.parametrize("large, most", [(1e9, 1.2), (1e6, 0.1)])
def test_splits_take_as_much_memory_as_the_images_and_large_ones_none(large, most, monkeypatch):
    monkeypatch.setattr("mscnn_parts.on_disk.LARGE", large)
    images, labels = np.zeros((6000, 32, 32, 3), np.uint8), np.arange(6000) % 4
    tracemalloc.start()
    data = split_data(RawData("zeros", "", "abcd", images, labels), False, 0)
    both = train_and_calibration(data) if large < images.nbytes else data.train
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(len(getattr(data, name)) for name in SPLITS) == 6000
    assert peak < most * images.nbytes
    assert isinstance(both.images, IndexedRows) == (large < images.nbytes)


def test_no_split_keeps_more_in_memory_than_it_is(folder, in_memory, monkeypatch):
    assert all(getattr(in_memory, name).images.base is None for name in SPLITS)
    monkeypatch.setattr("mscnn_parts.on_disk.LARGE", 1e5)
    images, labels = np.zeros((20_000, 8, 8, 3), np.uint8), np.arange(20_000) % 4
    light = split_data(RawData("zeros", "", "abcd", images, labels), True, 0, 8)
    assert all(isinstance(getattr(light, name).images, np.ndarray) for name in SPLITS)
