"""Small data and small models for all tests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # before Matplotlib is imported; the kernels that tests start inherit it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest

import mscnn_helpers as mscnn

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [ROOT / "mscnn_helpers.py", *sorted((ROOT / "mscnn_parts").glob("*.py"))]
TINY_NAMES = ("airplane", "cat", "ship", "truck", "dog")
TINY_COLORS = np.array([[70, 150, 240], [235, 190, 60], [60, 60, 190], [225, 60, 60], [110, 200, 90]])


def tiny_images(labels: np.ndarray, seed: int) -> np.ndarray:
    """uint8 (N, 32, 32, 3): a square in its category's color, anywhere on gray noise.

    The color varies from image to image, so that a good classifier makes a few mistakes, not none.
    """
    rng = np.random.default_rng(seed)
    images = rng.normal(128, 30, (len(labels), 32, 32, 3))
    for image, label in zip(images, labels, strict=True):
        top, left = rng.integers(0, 15, 2)
        image[top : top + 18, left : left + 18] += TINY_COLORS[label] - 128 + rng.normal(0, 42, 3)
    return np.clip(images, 0, 255).astype(np.uint8)


def write_tiny_npz(path: Path, train: int = 600, test: int = 100) -> Path:
    """A data set of five categories as a `.npz` file; returns its path."""
    labels = [np.arange(count) % len(TINY_NAMES) for count in (train, test)]
    x_train, x_test = (tiny_images(one, seed) for seed, one in enumerate(labels))
    np.savez(path, x_train=x_train, y_train=labels[0], x_test=x_test, y_test=labels[1], class_names=TINY_NAMES)
    return path


def gross_strangers(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """What no model may take for one of its categories, uint8 (B, H, W, channels) a kind."""
    some = np.zeros((60, *shape), np.uint8)
    kinds = mscnn.synthetic_ood_images(some, 7)
    return {kind: kinds[kind] for kind in ("uniform noise", "Gaussian noise", "one color", "stripes")}


def patch_rooms(monkeypatch, name: str, value: object) -> None:
    """Replaces a name wherever the project uses it: in every room that has it, and in the door."""
    rooms = [module for module in sys.modules if module == "mscnn_helpers" or module.startswith("mscnn_parts.")]
    bound = [module for module in rooms if name in vars(sys.modules[module])]
    assert bound, f"no room has {name}"
    for module in bound:
        monkeypatch.setattr(sys.modules[module], name, value)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory) -> Path:
    """The `.npz` file of `tiny_data`."""
    return write_tiny_npz(tmp_path_factory.mktemp("data") / "tiny.npz")


@pytest.fixture(scope="session")
def tiny_data(tiny_path) -> mscnn.Dataset:
    """Five categories of 32 x 32 RGB images: 420 train, 90 calibration, 90 certification, 100 test."""
    return mscnn.load_dataset(str(tiny_path))


@pytest.fixture(scope="session")
def digits() -> mscnn.Dataset:
    """scikit-learn's digits: ten categories, gray, not to be mirrored."""
    return mscnn.load_dataset("digits")


SMALL = {"policy": "float32", "stage1_widths": (8, 8), "stage2_widths": (8, 8), "stage2_branch": 0}  # see test_branches


@pytest.fixture
def untrained_model(tiny_data) -> mscnn.MultiStageCNN:
    """A small new model for `tiny_data`."""
    mscnn.keras.utils.set_random_seed(0)
    return mscnn.MultiStageCNN.for_dataset(tiny_data, **SMALL)


@pytest.fixture(scope="session")
def trained_model_path(tiny_data, tmp_path_factory) -> Path:
    """The file of a small model, trained and calibrated on `tiny_data`."""
    mscnn.keras.utils.set_random_seed(0)
    model = mscnn.MultiStageCNN.for_dataset(tiny_data, **SMALL)
    recipe = mscnn.Recipe(epochs=8, batch_size=32)
    mscnn.train_stage1(model, tiny_data, recipe)
    mscnn.train_stage2_base(model, tiny_data, recipe)
    mscnn.train_stage2(model, tiny_data, recipe)
    model.calibrate(tiny_data.calibration)
    path = tmp_path_factory.mktemp("model") / "trained.keras"
    model.save(path)
    return path


@pytest.fixture(scope="session")
def lent_model(trained_model_path):
    """The trained model, and what it holds: for `trained_model` alone."""
    model = mscnn.load_model(trained_model_path)
    return model, [variable.numpy() for variable in model.variables], known_of(model)


def known_of(model: mscnn.MultiStageCNN) -> tuple:
    """What a test that has borrowed a model could leave behind."""
    return model.fingerprints(), model.get_config(), model.trainable_summary(), model.flip, model.threshold_source


@pytest.fixture
def trained_model(lent_model) -> Iterator[mscnn.MultiStageCNN]:
    """The trained model as its file has it, so that a test may change it; loading it takes longer than most tests."""
    model, values, known = lent_model
    yield model
    for variable, value in zip(model.variables, values, strict=True):
        variable.assign(value)
    model.set_stage1_trainable()
    model.stage2_base.trainable = True
    model.set_stage2_category_trainable()
    model.threshold, model.certificate = 0.7, None
    assert known_of(model) == known
