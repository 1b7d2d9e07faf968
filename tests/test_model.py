"""The model: both stages together, freezing, fingerprints, decide, save and load."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import NamedTuple

import h5py
import keras
import numpy as np
import pytest
from conftest import gross_strangers
from PIL import Image

import mscnn_helpers as mscnn
from mscnn_helpers import Decisions, MSCNNError, MultiStageCNN
from mscnn_parts.data import RawData, split_data
from mscnn_parts.inference import Networks
from mscnn_parts.layers import FusedBatchNormalization
from mscnn_parts.model_files import check_matches, parts_of
from mscnn_parts.sources import CIFAR10_NAMES, find_cifar10
from mscnn_parts.thresholds import threshold_text

ROOT = Path(mscnn.__file__).parent


@pytest.fixture(scope="module")
def model(trained_model_path) -> MultiStageCNN:
    """The trained model, shared: only for tests that change nothing."""
    return mscnn.load_model(trained_model_path)


def assert_same(one: Decisions, two: Decisions) -> None:
    """Bit for bit."""
    for name, a, b in zip(Decisions._fields, one, two, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def assert_close(one: Decisions, two: Decisions) -> None:
    """Up to the rounding of float32, whose order of summation depends on the batch."""
    for name, a, b in zip(Decisions._fields, one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3, err_msg=name)


def arrays_in(path: Path, folder: Path) -> dict[str, np.ndarray]:
    """Every array that a model file holds, by its place in the file; read without Keras."""
    with zipfile.ZipFile(path) as archive:
        weights = archive.extract("model.weights.h5", folder)
    found = {}
    with h5py.File(weights) as file:
        file.visititems(lambda name, one: found.update({name: one[()]}) if isinstance(one, h5py.Dataset) else None)
    return found


# ------------------------------------------------------------------------------------------------------------
# Both stages
# ------------------------------------------------------------------------------------------------------------


def test_call_gives_both_stages(model, tiny_data):
    images, count = tiny_data.test.images[:9], len(tiny_data.category_names)
    got = model(images)
    assert set(got) == {"stage1", "stage2"}
    np.testing.assert_array_equal(got["stage1"], model.stage1(images, training=False))
    assert got["stage1"].shape == got["stage2"].shape == (9, count)
    for c in range(count):
        expected = mscnn.log_odds(model.stage2_cnn(c)(images, training=False), np.full(9, c))
        np.testing.assert_allclose(got["stage2"][:, c], expected, rtol=1e-4, atol=1e-4)


def plain_decision(model: MultiStageCNN, images: np.ndarray, threshold: float) -> Decisions:
    """The decision by the long way: every Stage 2 CNN verifies every image and its mirror image."""
    one, mirrored = (model.stage1(view, training=False).numpy() for view in (images, images[:, :, ::-1]))
    logits = (one.astype(np.float64) + mirrored) / 2
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    category = p.argmax(axis=1)
    views = [model(view)["stage2"].numpy() for view in (images, images[:, :, ::-1])]
    everything = np.mean(views, axis=0)  # (B, C)
    rows = np.arange(len(images))
    stage2, first = everything[rows, category], p[rows, category]
    margin = mscnn.margin(logits, category)
    row = model.calibration_coefficients.numpy()[category]
    combined = row[:, 0] + row[:, 1] * margin + row[:, 2] * stage2
    confidence, strange = 1 / (1 + np.exp(-combined)), plain_novelty(model, images, combined)
    final = np.where((confidence >= threshold) & ~(strange > 0), category, len(model.category_names))
    odds, second = np.log(first / (1 - first)), 1 / (1 + np.exp(-stage2))
    return Decisions(final, category, first, second, confidence, odds, margin, stage2, logits, one, strange)


def plain_novelty(model: MultiStageCNN, images: np.ndarray, combined: np.ndarray) -> np.ndarray:
    """The same of `ood_score`: image by image, layer by layer."""
    known, inputs, found = model.ood_statistics, model.stage1.inputs[0], []
    layers = [model.stage1.get_layer(name).output for name in ("logits", "block1", "whitening")]
    logits, first, white = keras.Model(inputs, layers)(np.concatenate([images, images[:, :, ::-1]]), training=False)
    block1_means = np.asarray(first, np.float64).mean(axis=(1, 2))
    strength = np.abs(np.asarray(white, np.float64)[..., : white.shape[-1] // 2]).mean(axis=(1, 2))
    for i in range(len(images)):
        z, t, s = (
            np.asarray(one, np.float64)[i :: len(images)].mean(axis=0) for one in (logits, block1_means, strength)
        )
        t, d = t - known.block1_mean, np.log(s + 0.001) - known.whitening_mean
        distances = [np.log(t @ known.block1_precision @ t), np.log(d @ known.whitening_precision @ d)]
        signs = np.array([-np.log(np.exp(z).sum()), -combined[i], *distances])
        energy, doubt, unusual, whitening_strength = (signs - known.scale[0]) / known.scale[1]
        above = np.array([energy + doubt + max(0, unusual), unusual, whitening_strength]) - known.thresholds
        found.append(above.max() if (above[1:] > 0).any() else above[0])
    return np.array(found)


def test_decide_equals_the_plain_computation(model, tiny_data):
    """With rows under which Stage 2 counts: on easy data the calibration may have given it no weight."""
    fitted = model.calibration_coefficients.numpy()
    model.calibration_coefficients.assign(
        np.column_stack([np.linspace(-1, 1, 5), np.full(5, 0.3), np.linspace(0.2, 0.6, 5)])
    )
    try:
        confidence = np.sort(model.decide(tiny_data.test.images).confidence)[20:80]
        widest = np.diff(confidence).argmax()  # a threshold between two images, so that rounding decides nothing
        threshold = confidence[widest : widest + 2].mean()
        got = model.decide(tiny_data.test.images, threshold)
        assert_close(got, plain_decision(model, tiny_data.test.images, threshold))
        assert 20 <= (got.category == 5).sum() <= 80  # both verdicts occur
    finally:
        model.calibration_coefficients.assign(fitted)


def test_only_the_stage2_cnn_of_the_predicted_category_runs(model, tiny_data, monkeypatch):
    runs = []

    def spy(handles, images, graph=model._networks.stage2_graph):
        own = {c: [w.value.handle for w in model.stage2_cnn(c).weights] for c in range(5)}
        same = [c for c, known in own.items() if all(a is b for a, b in zip(handles, known, strict=True))]
        runs.append((same, len(images)))
        return graph(handles, images)

    predicted = model.decide(tiny_data.test.images).stage1_category
    monkeypatch.setattr(model._networks, "stage2_graph", spy)
    images = tiny_data.test.images[np.isin(predicted, [1, 3])]
    model.decide(images)
    assert [same for same, _ in runs] == [[1], [3]]
    counts = [((predicted == c).sum() + 7) // 8 * 8 for c in (1, 3)]  # batches are filled up to eights
    assert [count for _, count in runs] == counts


@pytest.mark.parametrize(("size", "at_once"), [(32, 512), (64, 48), (96, 16), (160, 7), (512, 1)])
def test_large_images_run_in_small_batches(size, at_once):
    whitening = types.SimpleNamespace(input=np.empty((0, size, size, 3)))
    networks = Networks(types.SimpleNamespace(get_layer=lambda name: whitening), [], None, 1)
    assert networks._at_once(512) == at_once and networks._at_once(1) == 1


def test_stage2_judges_an_image_and_its_mirror_image(model, tiny_data):
    images = tiny_data.test.images[:5]
    views = [model.stage2_cnn(2)(view, training=False) for view in (images, images[:, :, ::-1])]
    expected = np.mean([mscnn.log_odds(view, np.full(5, 2)) for view in views], axis=0)
    np.testing.assert_allclose(model.stage2_log_odds(images, 2), expected, rtol=1e-3, atol=1e-3)


def test_stage1_answers_by_two_looks(model, tiny_data):
    """On blends of two images, where the mirror image often changes the answer."""
    some = tiny_data.test.images[:60].astype(np.uint16)
    images = ((some[:, None] + some[None, :20]) // 2).astype(np.uint8).reshape(-1, 32, 32, 3)
    decisions, logits = model.decide(images), model.stage1_logits(images)
    mirrored = model.stage1_logits(np.ascontiguousarray(images[:, :, ::-1]))
    np.testing.assert_allclose(decisions.single_view_logits, logits, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(decisions.stage1_logits, (logits + mirrored) / 2, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(decisions.stage1_category, decisions.stage1_logits.argmax(axis=1))
    assert (decisions.stage1_category != logits.argmax(axis=1)).any()
    assert (decisions.stage1_margin >= 0).all()


def test_what_is_like_nothing_known_is_other_however_confident(trained_model, tiny_data):
    """At a threshold that everything passes; the certificate is one for what is left."""
    images = mscnn.synthetic_ood_images(tiny_data.test.images)["uniform noise"]
    decisions = trained_model.decide(images, threshold=0)
    assert (decisions.ood_score > 0).all()
    np.testing.assert_array_equal(decisions.category == 5, decisions.ood_score > 0)
    assert set(decisions.reasons()) <= {"accepted", mscnn.OUT_OF_DISTRIBUTION}
    split = tiny_data.certification
    with_noise = mscnn.Split(np.concatenate([split.images, images]), np.concatenate([split.labels, np.zeros(100, int)]))
    found = trained_model.certify(with_noise, risk=0.5, delta=0.2)
    assert found.accepted <= (trained_model.decide(with_noise.images).ood_score <= 0).sum() <= 90
    assert found.images == 190


@pytest.mark.parametrize(
    ("written", "told"), [(None, "was written by MSCNN 0.1: load it with tag v0.1.0"), (3, "has format 3")]
)
def test_a_file_of_another_version_is_not_called_damaged(trained_model_path, tmp_path, written, told):
    other = tmp_path / "other.keras"
    with zipfile.ZipFile(trained_model_path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    del config["config"]["format"]
    config["config"] |= {} if written is None else {"format": written}
    members["config.json"] = json.dumps(config)
    with zipfile.ZipFile(other, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(MSCNNError, match=told):
        mscnn.load_model(other)


def test_what_is_known_is_learnt_from_the_whole_model_and_stays_when_a_category_is_retrained(trained_model, tiny_data):
    before, recipe = trained_model.fingerprints()["ood_statistics"], mscnn.Recipe(1, 64)
    trained_model.certify(tiny_data.certification, risk=0.5, delta=0.2)
    mscnn.fit_ood(trained_model, tiny_data)
    assert trained_model.fingerprints()["ood_statistics"] == before and trained_model.certificate is None
    mscnn.retrain_stage2(trained_model, tiny_data, "ship", recipe)
    assert trained_model.fingerprints()["ood_statistics"] == before, "else other images would be decided anew"
    trained_model.set_stage1_trainable(True)
    trained_model.stage2_base.trainable = True
    trained_model.set_stage2_category_trainable("", True)
    block1_means = trained_model.ood_statistics.block1_mean
    mscnn.train_stage2_base(trained_model, tiny_data, recipe)
    trained_model.calibrate(tiny_data.calibration)
    assert trained_model.fingerprints()["ood_statistics"] != before, "its scale is that of the confidences"
    np.testing.assert_array_equal(trained_model.ood_statistics.block1_mean, block1_means)
    mscnn.train_stage1(trained_model, tiny_data, recipe)
    assert (trained_model.ood_statistics.block1_mean != block1_means).any() and np.isnan(
        trained_model.ood_statistics.thresholds
    ).all()


def test_an_image_that_may_not_be_mirrored_is_judged_once(digits):
    small = {"policy": "float32", "stage1_widths": (8, 8), "stage2_widths": (8, 8)}
    model, images = MultiStageCNN.for_dataset(digits, **small), digits.test.images[:5]
    expected = mscnn.log_odds(model.verifier(7)(images, training=False), np.full(5, 7))
    np.testing.assert_allclose(model.stage2_log_odds(images, 7), expected, rtol=1e-4, atol=1e-4)
    scores = model.scores(images)
    assert len(scores.logits) == 1
    np.testing.assert_array_equal(scores.stage1, mscnn.margin(scores.logits[0], scores.category))
    model.calibrate(digits.calibration)
    assert np.isnan(model.decide(images).ood_score).all(), "it has not learnt what is known"
    mscnn.fit_ood(model, digits)
    assert (model.decide(digits.calibration.images).ood_score > 0).mean() < 0.03
    assert (model.decide(mscnn.synthetic_ood_images(digits.test.images)["uniform noise"]).ood_score > 0).all()


def assert_notices_strangers(model: MultiStageCNN, images: np.ndarray) -> None:
    """All gross strangers are OTHER by the OOD rejection, and hardly any image of the categories is."""
    for kind, found in gross_strangers(model.image_shape).items():
        assert set(model.decide(found, threshold=0).reasons()) == {mscnn.OUT_OF_DISTRIBUTION}, kind
    assert (model.decide(images).ood_score > 0).mean() <= 0.05


def test_a_model_of_few_images_notices_gross_strangers(trained_model, tiny_data):
    assert_notices_strangers(trained_model, tiny_data.test.images)


def photographs_of_few_kinds(categories: int, count: int) -> mscnn.Dataset:
    """Pieces of scikit-learn's photographs, a category a strip: some of the categories look alike."""
    from sklearn.datasets import load_sample_image

    rng, photos = np.random.default_rng(0), [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    labels, images = np.arange(categories * count) % categories, []
    for label in labels:
        strip, (top, left) = photos[label % 2][:, (label // 2) * 320 :][:, :320], rng.integers(0, [300, 200])
        images.append(strip[top : top + 96 : 3, left : left + 96 : 3])
    arrays = np.stack(images), labels
    names = [f"strip {c}" for c in range(categories)]
    return split_data(RawData("strips", "", names, *arrays), light_mode=False, seed=0)


def trained_on(data: mscnn.Dataset) -> MultiStageCNN:
    recipe, model = mscnn.default_recipe(len(data.train), epochs=5), MultiStageCNN.for_dataset(data)
    mscnn.train_stage1(model, data, recipe)
    mscnn.train_stage2_base(model, data, recipe)
    mscnn.train_stage2(model, data, recipe)
    model.calibrate(data.calibration)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("categories", "count"), [(3, 60), (4, 60), (3, 300)])
def test_models_of_folders_of_photographs_notice_gross_strangers(categories, count):
    data = photographs_of_few_kinds(categories, count)
    assert_notices_strangers(trained_on(data), data.test.images)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "digits"])
def test_models_of_light_mode_and_of_digits_notice_gross_strangers(name):
    if name == "cifar10" and find_cifar10() is None:
        pytest.skip("CIFAR-10 is not at hand")
    data = mscnn.load_dataset(name, light_mode=name == "cifar10")
    assert_notices_strangers(trained_on(data), data.test.images)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_the_batch_size_changes_nothing(model, tiny_data, batch_size):
    images = tiny_data.test.images[:30]
    assert_close(model.decide(images, batch_size=batch_size), model.decide(images))


def test_decide_on_one_image_and_on_none(model, tiny_data):
    everything = model.decide(tiny_data.test.images[:8])
    assert_close(model.decide(tiny_data.test.images[:1]), Decisions(*(values[:1] for values in everything)))
    empty = model.decide(tiny_data.test.images[:0])
    assert [len(values) for values in empty] == [0] * len(Decisions._fields)
    assert empty.stage1_logits.shape == (0, 5)


def test_the_threshold_decides_and_can_be_overridden(trained_model, tiny_data):
    images, other = tiny_data.test.images, 5
    usual = trained_model.decide(images)
    strange = usual.ood_score > 0
    np.testing.assert_array_equal(usual.category == other, (usual.confidence < 0.7) | strange)
    np.testing.assert_array_equal(trained_model.decide(images, threshold=0).category == other, strange)
    assert (trained_model.decide(images, threshold=1).category == other).all()
    middle = float(np.median(usual.confidence))
    trained_model.threshold = middle
    np.testing.assert_array_equal(trained_model.decide(images).category == other, (usual.confidence < middle) | strange)


def test_an_uncalibrated_model_does_not_decide(untrained_model, tiny_data):
    assert not untrained_model.is_calibrated
    with pytest.raises(MSCNNError, match="not trained and calibrated yet: run notebook 03_stage2_training"):
        untrained_model.decide(tiny_data.test.images[:1])


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda x: x.astype(np.float32), r"float32 \(2, 32, 32, 3\)"),
        (lambda x: x[0], r"uint8 \(32, 32, 3\)"),
        (lambda x: x[..., :1], r"uint8 \(2, 32, 32, 1\)"),
        (lambda x: x[:, :28, :28], r"uint8 \(2, 28, 28, 3\)"),
        (lambda x: x.tolist(), r"list \(2, 32, 32, 3\)"),
    ],
)
def test_images_of_another_kind_are_refused(model, tiny_data, spoil, found):
    with pytest.raises(MSCNNError, match=f"Images are {found}: this model takes uint8 .B, 32, 32, 3"):
        model.decide(spoil(tiny_data.test.images[:2]))


# ------------------------------------------------------------------------------------------------------------
# Freezing
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "indices"),
    [("ship", (2,)), (3, (3,)), ("3,0", (0, 3)), ("truck,ship,2", (2, 3)), (["dog", 1], (1, 4)), ("", (0, 1, 2, 3, 4))],
)
def test_categories_are_freed_by_name_and_index(untrained_model, chosen, indices):
    untrained_model.set_stage2_category_trainable("", False)
    assert untrained_model.trainable_categories() == ()
    untrained_model.set_stage2_category_trainable(chosen)
    assert untrained_model.trainable_categories() == indices
    untrained_model.set_stage2_category_trainable(chosen, False)
    assert untrained_model.trainable_categories() == ()


def test_an_unknown_category_freezes_nothing(untrained_model):
    with pytest.raises(MSCNNError, match=r"Unknown category 'shipp'\. Did you mean ship\?"):
        untrained_model.set_stage2_category_trainable("truck,shipp", False)
    assert untrained_model.trainable_categories() == (0, 1, 2, 3, 4)


def test_trainable_summary(untrained_model):
    assert untrained_model.trainable_summary().splitlines()[0] == "✓ Stage 1: True   ✓ Stage 2 base network: True"
    untrained_model.train_only("ship,truck")
    stage1, title, *rows = untrained_model.trainable_summary().splitlines()
    assert (stage1, title) == ("✗ Stage 1: False   ✗ Stage 2 base network: False", "Stage 2")
    entries = [entry.strip() for row in rows for entry in row.split("   ") if entry.strip()]
    assert entries == ["✗ airplane: False", "✗ cat: False", "✓ ship: True", "✓ truck: True", "✗ dog: False"]


def test_trainable_summary_of_ten_categories_is_two_rows_of_five():
    names = CIFAR10_NAMES
    stub = MultiStageCNN(names, (32, 32, 1), [0], [1], stage1_widths=(1,), stage2_widths=(1,))
    rows = stub.trainable_summary().splitlines()[2:]
    assert [row.count(": True") for row in rows] == [5, 5]
    assert max(map(len, rows)) <= 120


class Retrained(NamedTuple):
    """A model before and after two of its categories were retrained."""

    before: MultiStageCNN
    after: MultiStageCNN
    results: list
    paths: tuple[Path, Path]


@pytest.fixture(scope="module")
def retrained(trained_model_path, tiny_data, tmp_path_factory) -> Retrained:
    """Ship and truck retrained; the outcome is kept even if it is worse, so that something has changed."""
    before, after = mscnn.load_model(trained_model_path), mscnn.load_model(trained_model_path)
    recipe = mscnn.Recipe(epochs=2, batch_size=32)
    results, _ = mscnn.retrain_stage2(after, tiny_data, "truck,2", recipe, seed=9, keep_worse=True)
    path = tmp_path_factory.mktemp("retrained") / "after.keras"
    after.save(path)
    return Retrained(before, after, results, (trained_model_path, path))


MOVED = {"stage2/ship", "stage2/truck", "calibration/ship", "calibration/truck"}


def test_retraining_moves_the_chosen_parts_only(retrained):
    """Every array of every other part is identical, BatchNormalization statistics included."""
    before, after = parts_of(retrained.before), parts_of(retrained.after)
    assert list(before) == list(after)
    same = {name for name in before if all(map(np.array_equal, before[name], after[name]))}
    assert set(before) - same == MOVED
    assert {"stage1", "stage2_base", "calibration/shared", "stage2/cat", "calibration/cat"} <= same


def test_fingerprints_change_for_the_chosen_parts_only(retrained):
    before, after = retrained.before.fingerprints(), retrained.after.fingerprints()
    assert {name for name in before if before[name] != after[name]} == MOVED
    assert mscnn.load_model(retrained.paths[1]).fingerprints() == after


def test_retraining_moves_only_the_chosen_arrays_of_the_file(retrained, tmp_path):
    """The same read from the two files without Keras, in case `parts` overlooks an array."""
    before, after = (arrays_in(p, tmp_path / str(i)) for i, p in enumerate(retrained.paths))
    assert before.keys() == after.keys() and len(before) > 100
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    rows = {name for name in moved if before[name].shape == (5, 3)}
    assert len(rows) == 1
    networks = [retrained.after.stage2_cnn(c).get_weights() for c in (2, 3)]
    theirs = {array.tobytes() for arrays in networks for array in arrays}
    assert all(after[name].tobytes() in theirs for name in moved - rows)
    assert len(moved - rows) == 2 * (len(networks[0]) - 1)  # all but the whitening, which is fixed
    row = rows.pop()
    np.testing.assert_array_equal(np.flatnonzero((before[row] != after[row]).any(axis=1)), [2, 3])


def test_parts_hold_every_array_of_the_model(model):
    parts = parts_of(model)
    rows = [arrays[0] for name, arrays in parts.items() if name.startswith("calibration/") and "shared" not in name]
    np.testing.assert_array_equal(np.stack(rows), model.calibration_coefficients.numpy())
    assert sum(map(len, parts.values())) - len(rows) + 1 == len(model.weights)


def test_images_of_other_categories_are_decided_as_before(retrained, tiny_data):
    """Bit for bit, every field; and the images of the retrained categories are not, or this shows nothing."""
    images = np.concatenate([tiny_data.test.images, tiny_data.certification.images])
    before, after = retrained.before.decide(images), retrained.after.decide(images)
    elsewhere = ~np.isin(before.stage1_category, [2, 3])
    assert 50 < elsewhere.sum() < len(images) - 50
    assert_same(after.take(elsewhere), before.take(elsewhere))
    loaded = mscnn.load_model(retrained.paths[1]).decide(images)
    assert_same(loaded.take(elsewhere), before.take(elsewhere))
    assert (before.stage2_log_odds != after.stage2_log_odds)[~elsewhere].all()


def test_retraining_leaves_everything_else_frozen(retrained):
    assert retrained.after.trainable_categories() == (2, 3)
    assert not retrained.after.stage1.trainable
    assert [(r.category, r.kept) for r in retrained.results] == [("ship", True), ("truck", True)]


def test_calibrating_some_rows_leaves_the_others(trained_model, tiny_data):
    before, common = trained_model.calibration_coefficients.numpy(), trained_model.shared_coefficients.numpy()
    trained_model.calibrate(tiny_data.certification, [1])
    after = trained_model.calibration_coefficients.numpy()
    np.testing.assert_array_equal(np.flatnonzero((before != after).any(axis=1)), [1])
    np.testing.assert_array_equal(trained_model.shared_coefficients.numpy(), common)
    trained_model.calibrate(tiny_data.certification)
    assert (trained_model.shared_coefficients.numpy() != common).any()


def test_a_category_that_never_occurs_gets_the_common_row(trained_model, tiny_data):
    predicted = trained_model.scores(tiny_data.calibration.images).category
    trained_model.calibrate(tiny_data.calibration.take(predicted != 4))
    np.testing.assert_array_equal(
        trained_model.calibration_coefficients.numpy()[4], trained_model.shared_coefficients.numpy()
    )
    assert (trained_model.calibration_coefficients.numpy()[0] != trained_model.shared_coefficients.numpy()).any()


def test_a_fingerprint_notices_one_statistic(trained_model):
    before = trained_model.fingerprints()
    layer = next(x for x in trained_model.stage2_cnn(1).layers if isinstance(x, FusedBatchNormalization))
    moved = layer.moving_mean.numpy()
    moved[0] = np.nextafter(moved[0], np.float32(np.inf))
    layer.moving_mean.assign(moved)
    after = trained_model.fingerprints()
    assert {name for name in before if before[name] != after[name]} == {"stage2/cat"}


# ------------------------------------------------------------------------------------------------------------
# Save and load
# ------------------------------------------------------------------------------------------------------------


def test_a_loaded_model_is_the_saved_one(model, tmp_path, tiny_data):
    path = tmp_path / "again.keras"
    model.save(path)
    again = mscnn.load_model(path)
    assert again.fingerprints() == model.fingerprints()
    assert again.get_config() == model.get_config()
    assert again.stage1.get_layer("block1").activation is keras.activations.relu
    assert_same(again.decide(tiny_data.test.images), model.decide(tiny_data.test.images))


def test_the_threshold_is_saved(trained_model, tmp_path):
    trained_model.threshold = 0.42
    trained_model.save(tmp_path / "m.keras")
    assert mscnn.load_model(tmp_path / "m.keras").threshold == 0.42


@pytest.mark.parametrize(
    "given", [[0.5, 0.6, 0.7, 0.8, 0.9], np.linspace(0.5, 0.9, 5, dtype=np.float32), np.float32(1)]
)
def test_thresholds_by_category_are_saved_and_told(certified, tmp_path, given):
    certified.threshold = given
    certified.save(tmp_path / "m.keras")
    loaded = mscnn.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded.threshold, np.asarray(given, np.float64))
    assert loaded.valid_certificate is None
    if np.ndim(given):
        assert threshold_text(loaded).startswith("Thresholds 0.5000 to 0.9000 by category, as given. No error rate is ")
        assert "at threshold 0.5 to 0.9, but one of at most " in loaded.guarantee()
    certified.threshold = [certified.certificate.threshold] * 5  # the same decisions as that of the certificate
    assert certified.valid_certificate == certified.certificate


def test_save_replaces_no_file_unless_it_may(untrained_model, tmp_path):
    path = tmp_path / "precious.keras"
    path.write_bytes(b"precious")
    with pytest.raises(MSCNNError, match=r"precious.keras is there already: give another name, or overwrite=True"):
        untrained_model.save(path, overwrite=False)
    assert path.read_bytes() == b"precious"
    untrained_model.save(tmp_path / "new.keras", overwrite=False)
    assert (tmp_path / "new.keras").is_file()


@pytest.mark.parametrize("name", ["stage1", "stage2_base", "stage2"])
def test_a_network_is_not_replaced(model, name):
    before = getattr(model, name)
    with pytest.raises(MSCNNError, match=rf"^{name} cannot be replaced: .*set_weights"):
        setattr(model, name, model.build_stage2(name="mine"))
    assert getattr(model, name) is before


def test_a_replaced_network_of_stage2_is_not_saved(untrained_model, tmp_path):
    untrained_model.stage2["category_1"] = untrained_model.build_stage2(name="mine")
    with pytest.raises(MSCNNError, match="category_1 cannot be replaced"):
        untrained_model.save(tmp_path / "m.keras")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "8", None])
def test_a_batch_size_that_is_no_number_of_images(model, tiny_data, batch_size):
    images = tiny_data.test.images[:3]
    for ask in (model.stage1_logits, model.stage1_outputs, model.scores):
        with pytest.raises(MSCNNError, match=f"batch_size is {batch_size!r}: it has to be a whole number from 1 on"):
            ask(images, batch_size=batch_size)
    with pytest.raises(MSCNNError, match="batch_size is"):
        model.stage2_log_odds(images, 0, batch_size)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("m.keras", b"", "is empty"),
        ("m.keras", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("m", b"PK", "ends in .keras"),
        ("m.keras", b"PK\3\4 and no more", "is damaged or not a model of this project: it is no zip archive"),
    ],
)
def test_why_a_file_is_no_model(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MSCNNError, match=reason):
        mscnn.load_model(tmp_path / name)


@pytest.mark.parametrize("name", ["folder.keras", "m", "m.h5"])
def test_a_model_is_saved_under_a_name_that_can_be_loaded(model, tmp_path, name):
    (tmp_path / "folder.keras").mkdir()
    with pytest.raises(MSCNNError, match=r"is no name for a model file: give one that ends in \.keras"):
        model.save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.keras"]


def test_a_model_is_saved_and_loaded_in_the_home_folder(untrained_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    untrained_model.save("~/m.keras")
    assert [path.name for path in tmp_path.iterdir()] == ["m.keras"]
    assert mscnn.load_model("~/m.keras").fingerprints() == untrained_model.fingerprints()


@pytest.mark.parametrize(
    "name", ["category_names", "image_shape", "flip", "quarter_turns", "dataset", "data_fingerprint", "policy"]
)
def test_what_the_networks_were_made_for_cannot_be_changed(model, name):
    with pytest.raises(MSCNNError, match=f"{name} cannot be changed: the networks were made for it"):
        setattr(model, name, getattr(model, name))


def test_labels_of_another_number_calibrate_nothing(model, tiny_data):
    split = mscnn.Split(tiny_data.calibration.images, tiny_data.calibration.labels[1:])
    before = model.fingerprints()
    for use in (model.calibrate, lambda split: model.certify(split, 0.5)):
        with pytest.raises(MSCNNError, match=r"decisions is \(90,\) and labels \(89,\)"):
            use(split)
    assert model.fingerprints() == before


def test_no_path_is_no_model():
    with pytest.raises(MSCNNError, match=r"The model file is None: give the path of a \.keras file"):
        mscnn.load_model(None)


def test_a_folder_is_no_model(tmp_path):
    with pytest.raises(MSCNNError, match=r"is a folder: give the path of a \.keras file"):
        mscnn.load_model(tmp_path)


def test_a_file_that_may_not_be_read_is_not_called_damaged(trained_model_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # root, who may run this, has every right
    with pytest.raises(MSCNNError, match=r"Cannot read .*: Permission denied\. Its rights have to let you read it"):
        mscnn.load_model(trained_model_path)


@pytest.mark.parametrize(("setting", "found"), [("backend", "jax"), ("image_data_format", "channels_first")])
def test_a_keras_that_is_set_up_otherwise_is_named(tmp_path, tiny_data, monkeypatch, setting, found):
    (tmp_path / "m.keras").write_bytes(b"PK")
    monkeypatch.setattr(mscnn.keras.config, setting, lambda: found)
    for make in (lambda: mscnn.load_model(tmp_path / "m.keras"), lambda: MultiStageCNN.for_dataset(tiny_data)):
        with pytest.raises(MSCNNError, match=rf"Keras has the {setting} {found}, and .*keras\.json"):
            make()


def test_thresholds_of_another_number_cannot_be_set(model):
    with pytest.raises(MSCNNError, match=r"Thresholds are \(3,\): give one for all, or one per category, \(5,\)"):
        model.threshold = [0.5, 0.6, 0.7]
    assert model.threshold == 0.7


def test_a_fresh_process_decides_alike(model, trained_model_path, tiny_data, tmp_path):
    """With the module and the model file only, from another folder."""
    np.save(tmp_path / "images.npy", tiny_data.test.images)
    script = (
        "import sys, numpy as np, mscnn_helpers as m\n"
        "d = m.load_model(sys.argv[1]).decide(np.load('images.npy'))\n"
        "np.savez('decisions.npz', **d._asdict())\n"
    )
    command = [sys.executable, "-c", script, str(trained_model_path)]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=120)
    with np.load(tmp_path / "decisions.npz") as file:
        got = Decisions(**{name: file[name] for name in Decisions._fields})
    assert_same(got, model.decide(tiny_data.test.images))


def test_mixed_precision_survives_saving(tiny_data, tmp_path):
    widths = {"stage1_widths": (8, 8), "stage2_widths": (8, 8)}
    model = MultiStageCNN.for_dataset(tiny_data, policy="mixed_bfloat16", **widths)
    model.calibrate(tiny_data.calibration)
    assert all(weight.dtype in ("float32", "float64") for weight in model.weights)
    logits = model(tiny_data.test.images[:2])
    assert logits["stage1"].dtype == logits["stage2"].dtype == mscnn.tf.float32
    assert model.stage1.get_layer("block1").compute_dtype == "bfloat16"
    model.save(tmp_path / "m.keras")
    again = mscnn.load_model(tmp_path / "m.keras")
    assert again.stage1.get_layer("block1").compute_dtype == "bfloat16"
    assert_same(again.decide(tiny_data.test.images), model.decide(tiny_data.test.images))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("interrupted")])
def test_a_failing_save_leaves_the_old_file(model, trained_model_path, tmp_path, monkeypatch, error):
    path = tmp_path / "m.keras"
    shutil.copy(trained_model_path, path)
    before = path.read_bytes()

    def fail(self, filepath, **options):
        Path(filepath).write_bytes(b"half a model")
        raise error

    monkeypatch.setattr(keras.Model, "save", fail)
    with pytest.raises(MSCNNError if isinstance(error, OSError) else RuntimeError, match=error.args[-1]):
        model.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.keras"]


def test_saving_into_a_new_folder_makes_it(model, tmp_path):
    model.save(tmp_path / "new" / "folder" / "m.keras")
    assert os.listdir(tmp_path / "new" / "folder") == ["m.keras"]


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(MSCNNError, match=f"There is no model file at {tmp_path / 'none.keras'}"):
        mscnn.load_model(tmp_path / "none.keras")


def truncated(path: Path, whole: Path) -> None:
    path.write_bytes(whole.read_bytes()[:-1000])


def half(path: Path, whole: Path) -> None:
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])


def random_bytes(path: Path, whole: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def empty(path: Path, whole: Path) -> None:
    path.touch()


def another_zip(path: Path, whole: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


def without_weights(path: Path, whole: Path) -> None:
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for name in ("config.json", "metadata.json"):
            new.writestr(name, old.read(name))


def of_other_categories(path: Path, whole: Path) -> None:
    """The configuration says four categories, the weights are for five."""
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        config = json.loads(old.read("config.json"))
        config["config"]["category_names"].pop()
        for name in old.namelist():
            new.writestr(name, json.dumps(config) if name == "config.json" else old.read(name))


@pytest.mark.parametrize(
    "spoil", [truncated, half, random_bytes, empty, another_zip, without_weights, of_other_categories]
)
def test_a_damaged_model_file_is_said_to_be(trained_model_path, tmp_path, spoil):
    path = tmp_path / "bad.keras"
    spoil(path, trained_model_path)
    with pytest.raises(MSCNNError, match=r"bad\.keras is damaged or not a model of this project: .") as caught:
        mscnn.load_model(path)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_a_model_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "other.keras"
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(path)
    with pytest.raises(MSCNNError, match=r"other\.keras holds a Sequential, not a MultiStageCNN"):
        mscnn.load_model(path)


def test_a_model_of_other_data_is_refused(model, tiny_data, digits):
    check_matches(model, tiny_data)
    with pytest.raises(MSCNNError, match="model is for another data set: tiny; the data has digits"):
        check_matches(model, digits)
    renamed = dataclasses.replace(tiny_data, category_names=("plane", *tiny_data.category_names[1:]))
    for other in (renamed, dataclasses.replace(tiny_data, name="mine")):
        with pytest.raises(MSCNNError, match="Choose the data set that the model was trained on, or train a new"):
            check_matches(model, other)


def test_other_splits_of_the_same_data_are_refused(model, tiny_data):
    """Else images that the model was trained on would calibrate and verifier it."""
    swapped = dataclasses.replace(tiny_data, calibration=tiny_data.certification, certification=tiny_data.calibration)
    with pytest.raises(MSCNNError, match=r"trained on other splits of tiny \(seed, light_mode or files differ\)"):
        check_matches(model, swapped)


def test_a_frozen_calibration_row_does_not_move(trained_model, tiny_data):
    before = trained_model.fingerprints()
    trained_model.train_only("ship")
    with pytest.raises(MSCNNError, match="The calibration of airplane, cat is frozen"):
        trained_model.calibrate(tiny_data.calibration, [0, 1])
    trained_model.calibrate(tiny_data.test)  # other images, so that the row moves
    after = trained_model.fingerprints()
    assert {name for name in before if before[name] != after[name]} == {"calibration/ship"}


@pytest.mark.parametrize("threshold", [-0.1, 1.1, 7, float("nan")])
def test_a_threshold_that_is_no_confidence(model, tiny_data, threshold):
    with pytest.raises(MSCNNError, match=r"threshold is .*: it is a confidence, so use 0 to 1"):
        model.decide(tiny_data.test.images[:1], threshold)


# ------------------------------------------------------------------------------------------------------------
# Certificate
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def certified(trained_model, tiny_data) -> MultiStageCNN:
    trained_model.certify(tiny_data.certification, risk=0.5, delta=0.2)
    return trained_model


def test_a_certificate_is_of_the_decisions_on_the_split(certified, tiny_data):
    decisions = certified.decide(tiny_data.certification.images)
    accepted = decisions.category == decisions.stage1_category
    incorrect = decisions.stage1_category != tiny_data.certification.labels
    assert certified.threshold == certified.certificate.threshold
    assert certified.certificate.accepted == accepted.sum() > 0
    assert certified.certificate.errors == (accepted & incorrect).sum()
    assert certified.certificate.images == len(tiny_data.certification)
    counted = f"Of {accepted.sum():,} accepted images, {(accepted & incorrect).sum()} were."
    assert f"at most 50.00% of the accepted are incorrect. {counted}" in certified.guarantee()


def test_a_certificate_is_saved_with_the_model(certified, tmp_path):
    certified.save(tmp_path / "model.keras")
    again = mscnn.load_model(tmp_path / "model.keras")
    assert again.certificate == certified.certificate
    assert again.guarantee() == certified.guarantee()


def test_a_certificate_holds_at_its_threshold_only(certified):
    certified.threshold = 0.123
    assert certified.guarantee().startswith("No error rate is guaranteed at threshold 0.123, but one of at most ")
    assert certified.valid_certificate is None
    certified.threshold = certified.certificate.threshold
    assert certified.valid_certificate == certified.certificate


@pytest.mark.parametrize("void", ["calibrate", "retrain", "train_stage1", "train_stage2_base"])
def test_training_and_calibration_void_a_certificate(certified, tiny_data, void):
    recipe = mscnn.Recipe(epochs=1, batch_size=64)
    if void == "calibrate":
        certified.calibrate(tiny_data.calibration)
    elif void == "retrain":
        mscnn.retrain_stage2(certified, tiny_data, "ship", recipe)
    else:
        getattr(mscnn, void)(certified, tiny_data, recipe)
    assert certified.certificate is None
    assert "not certified after its last training" in certified.guarantee()


def test_a_refused_certificate_changes_nothing(certified, tiny_data):
    before = certified.threshold, certified.certificate
    with pytest.raises(MSCNNError, match=r"needs .* images without a single error"):
        certified.certify(tiny_data.certification, risk=0.01)
    assert (certified.threshold, certified.certificate) == before


def test_thresholds_of_another_number_are_refused(trained_model, tiny_data):
    with pytest.raises(MSCNNError, match=r"Thresholds are \(7,\): give one for all, or one per category"):
        trained_model.decide(tiny_data.test.images, np.full(7, 0.5))


def test_a_threshold_for_each_category(model, tiny_data):
    images = tiny_data.test.images
    usual, decided = model.decide(images), model.decide(images, threshold=np.array([0.0, 1.0, 0.0, 1.0, 0.0])).category
    accepted = np.isin(usual.stage1_category, [0, 2, 4]) | (usual.confidence == 1)
    expected = np.where(accepted & ~(usual.ood_score > 0), usual.stage1_category, 5)
    assert np.array_equal(decided, expected)
    with pytest.raises(MSCNNError, match=r"threshold is 2: it is a confidence"):
        model.decide(images, threshold=np.array([0.0, 2.0, 0.0, 1.0, 0.0]))


def test_decide_takes_paths_pillow_images_and_lists_as_well_as_arrays(model, tiny_data, tmp_path):
    images = tiny_data.test.images[:3]
    expected = model.decide(images)
    pictures = [Image.fromarray(image) for image in images]
    pictures[0].save(tmp_path / "first.png")
    for given in (list(images), pictures, [tmp_path / "first.png", pictures[1], images[2]]):
        for one, other in zip(model.decide(given), expected, strict=True):
            np.testing.assert_array_equal(one, other)
    for given in (str(tmp_path / "first.png"), tmp_path / "first.png", pictures[0]):
        assert model.decide(given).confidence.shape == (1,)
    assert len(model.decide([]).confidence) == 0
    with pytest.raises(MSCNNError, match="There is no image at"):
        model.decide(str(tmp_path / "absent.png"))


def test_a_verifier_refuses_images_of_another_kind_as_decide_does(model, tiny_data):
    images = tiny_data.test.images[:2]
    for spoiled in (images[:, :16], images.astype(np.float32), images[0]):
        with pytest.raises(MSCNNError, match="this model takes uint8"):
            model.stage2_log_odds(spoiled, 0)
