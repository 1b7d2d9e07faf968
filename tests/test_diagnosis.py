"""The rooms `diagnosis` and `data_checks`: each broken set-up is named, and a healthy run raises no finding."""

import dataclasses
import functools
import itertools
import random
import time

import keras
import nbformat
import numpy as np
import pytest
from cleanlab.filter import find_label_issues
from conftest import ROOT, TINY_NAMES, tiny_images
from sklearn.datasets import load_digits

import mscnn_helpers as mscnn
from mscnn_helpers import MSCNNError
from mscnn_parts import data_checks, diagnosis, explanation, networks
from mscnn_parts.diagnosis import diagnose

SEEDS = range(10)
IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = (IMAGES.reshape(-1, 8, 8, 1) / 16 * 255).astype(np.uint8)
TRAIN, HELD = mscnn.Split(IMAGES[:1200], LABELS[:1200]), mscnn.Split(IMAGES[1200:], LABELS[1200:])
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def small_cnn(normalized: bool = True, momentum: float = 0.0, bias: float = 0.0, follows: bool = True) -> keras.Model:
    """Digits (B, 8, 8, 1) -> logits (B, 10); momentum: of BatchNormalization, 0: without it."""
    layers = keras.layers
    x = inputs = keras.Input((8, 8, 1))
    x = layers.Rescaling(1 / 80, -1)(x) if normalized else x
    for block in (1, 2):
        x = layers.Conv2D(16, 3, padding="same", bias_initializer=keras.initializers.Constant(bias))(x)
        x = layers.BatchNormalization(momentum=momentum, trainable=follows)(x) if momentum else x
        x = layers.ReLU(name=f"block{block}")(x)
        x = layers.MaxPooling2D(2)(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(layers.Flatten()(x)), name="small")


SETUPS = {  # network, learning rate
    "healthy": ({}, 5e-3),
    "healthy with BatchNormalization": ({"momentum": 0.9}, 5e-3),
    "learning rate 100 times too large": ({}, 0.5),
    "images not normalized": ({"normalized": False}, 5e-3),
    "statistics frozen": ({"momentum": 1.0}, 5e-3),
    "layers frozen": ({"momentum": 0.9, "follows": False}, 5e-3),
    "dead ReLU": ({"bias": -10.0}, 5e-3),
}
EXPECTED = {
    "learning rate 100 times too large": "weights too large",
    "images not normalized": "input not normalized",
    "statistics frozen": "statistics do not fit",
    "layers frozen": "statistics do not fit",
    "dead ReLU": "dead units",
}
IN_THE_DATA = {  # what `diagnose` names with the data at hand
    "labels shuffled": {"labels do not fit the images"},
    "leak": {"leak"},
    "random negatives": {"easy negatives"},
    "sound": set(),
}


def with_seeds(setups, few: int = 3) -> list:
    """Each set-up with a few seeds, and with ten in the slow tests."""
    slow = [pytest.param(setup, 10, marks=pytest.mark.slow) for setup in setups]
    return [*((setup, few) for setup in setups), *slow]


def compiled(settings: dict, rate: float) -> keras.Model:
    network = small_cnn(**settings)
    network.compile(keras.optimizers.Adam(rate), LOSS)
    network.optimizer.build(network.trainable_variables)  # else TensorFlow traces a step twice
    return network


def fit_anew(network: keras.Model, settings: dict, split: mscnn.Split, seed: int) -> None:
    """Trains a compiled network from the start of a seed, without tracing it again."""
    keras.utils.set_random_seed(seed)
    network.set_weights(small_cnn(**settings).get_weights())
    for variable in network.optimizer.variables[:1] + network.optimizer.variables[2:]:  # not the learning rate
        variable.assign(np.zeros(variable.shape))
    network.fit(*split, 75, epochs=4, verbose=0)


@functools.cache
def trained(setup: str, seeds: int = 3) -> list[diagnosis.Report]:
    """Reports of one set-up on train images, a seed each; training and diagnosis are traced once."""
    settings, rate = SETUPS[setup]
    network = compiled(settings, rate)
    watch = diagnosis.Diagnosis(IMAGES, LABELS)
    watch.set_model(network)
    watch.on_train_begin()
    for seed in SEEDS[:seeds]:
        fit_anew(network, settings, TRAIN, seed)
        watch.on_epoch_begin(3)
        watch.on_epoch_end(3)
    return watch.reports


@pytest.fixture(scope="module")
def notebook_08(tiny_data):
    """What the cell with the network of notebook 08 defines."""
    cells = nbformat.read(ROOT / "notebooks/08_when_training_goes_wrong.ipynb", 4).cells
    namespace = {"keras": keras, "data": tiny_data, "names": tiny_data.category_names}
    exec(next(cell.source for cell in cells if cell.id == "network"), namespace)
    return namespace


@pytest.fixture(scope="module")
def watched(notebook_08, tiny_data) -> diagnosis.Diagnosis:
    """A callback after two epochs of that notebook's network and set-up: 1,500 images, batches of 32."""
    images, labels = tiny_data.train.take(np.arange(1500) % len(tiny_data.train))
    keras.utils.set_random_seed(0)
    network, callback = notebook_08["small_network"](), diagnosis.Diagnosis(images, labels)
    network.compile(keras.optimizers.Adam(2e-3), LOSS)
    network.optimizer.build(network.trainable_variables)
    network.fit(images, labels, 32, epochs=2, verbose=0, callbacks=[callback])
    return callback


@pytest.mark.parametrize(("setup", "seeds"), with_seeds([setup for setup in SETUPS if setup not in EXPECTED]))
def test_a_healthy_run_raises_no_finding(setup, seeds):
    for report in trained(setup, seeds):
        assert report.findings == [], str(report)
        assert report.accuracy > 0.8, "it has learned"


@pytest.mark.parametrize(("setup", "seeds"), with_seeds(EXPECTED))
def test_a_broken_set_up_is_named(setup, seeds):
    for report in trained(setup, seeds):
        assert EXPECTED[setup] in report.names, str(report)
        assert ("A momentum of 1 keeps the first values forever" in str(report)) == (setup == "statistics frozen")
        assert ("It is frozen with the 0 and 1" in str(report)) == (setup == "layers frozen")


@pytest.mark.parametrize(("fault", "seeds"), with_seeds(IN_THE_DATA, few=1))
def test_a_fault_of_the_data_is_named_with_the_data_at_hand(fault, seeds):
    """The network is looked at as the verifier of a category; all checks run, and only the fault is named."""
    network, category = compiled(*SETUPS["healthy"]), 3
    for seed in SEEDS[:seeds]:
        rng = np.random.default_rng(seed)
        train = TRAIN
        if fault == "labels shuffled":
            train = mscnn.Split(TRAIN.images, rng.permutation(TRAIN.labels))
        if fault == "leak":
            train = mscnn.Split(*(np.concatenate(pair) for pair in zip(TRAIN, HELD.take(np.arange(50)), strict=True)))
        fit_anew(network, {}, train, seed)
        probability = keras.ops.softmax(network.predict(train.images, 500, verbose=0)).numpy()[:, category]
        shown = np.zeros(len(train)) if fault == "random negatives" else probability
        drawn = mscnn.sample_hard_negatives(train.labels, shown, category, 400, rng)
        sample = (network, train.images[:64], train.labels[:64], category)
        negatives = None if fault == "labels shuffled" else (probability, drawn)  # nothing learned, nothing is hard
        report = diagnose(*sample, train=train, held=HELD, negatives=negatives)
        assert report.names - diagnose(*sample).names == IN_THE_DATA[fault], str(report)
        assert fault != "sound" or report.findings == []


def test_held_out_images_and_negatives_need_what_they_are_compared_with():
    sample = (small_cnn(), IMAGES[:64], LABELS[:64])
    with pytest.raises(MSCNNError, match="give train, too"):
        diagnose(*sample, held=HELD)
    with pytest.raises(MSCNNError, match="give its category, too"):
        diagnose(*sample, train=TRAIN, negatives=(np.zeros(1200), np.arange(9)))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((20, 5)), np.arange(20) % 2, r"Images are \(20, 5\): this takes \(N, H, W, channels\) of 8 pixels"),
        (np.zeros((20, 4, 9, 1)), np.arange(20) % 2, r"Images are \(20, 4, 9, 1\)"),
        (IMAGES[:20], np.eye(2)[np.arange(20) % 2], r"labels are \(20, 2\): give one integer per image"),
    ],
)
def test_data_of_another_form_are_refused(images, labels, message):
    with pytest.raises(MSCNNError, match=message):
        data_checks.check_training(mscnn.Split(images, labels))


# ---- what else `diagnose` says


def test_the_report_reads_well():
    text = str(trained("dead ReLU")[0])
    assert "each as mean ± standard deviation" in text
    assert f"{trained('dead ReLU')[0].layers[-1].weights.mean:.1g} ± " in text
    assert "! dead units, block1: 16 of 16 units are 0 on the whole batch" in text and "smaller learning rate" in text
    assert "No findings." in str(trained("healthy")[0])


def test_histograms_have_fifty_bins_and_hold_the_output():
    layers = [layer for layer in trained("healthy")[0].layers if layer.histogram]
    assert [layer.kind for layer in layers] == ["Conv2D", "Conv2D", "Dense"]
    counts, edges = layers[-1].histogram
    assert (len(counts), len(edges), counts.sum()) == (50, 51, 64 * 10)


@pytest.mark.parametrize(("scale", "name"), [(1e-5, "vanishing gradients"), (1e3, "exploding gradients")])
def test_gradients_out_of_bounds_are_named(scale, name):
    network = small_cnn()
    for layer in network.layers:
        layer.set_weights([scale * weight for weight in layer.get_weights()])
    assert name in diagnose(network, IMAGES[:64], LABELS[:64]).names


def test_a_weight_that_is_not_a_number_is_named():
    network = small_cnn()
    kernel = network.layers[-1].kernel
    kernel.assign(kernel.numpy() * np.where(np.arange(10) == 3, np.nan, 1))
    report = diagnose(network, IMAGES[:64], LABELS[:64])
    assert report.findings[0].name == "not finite" and "tenth" in str(report)


def test_every_kernel_of_a_nested_model_is_watched():
    inner = keras.Sequential([keras.Input((64,)), keras.layers.Dense(8), keras.layers.Dense(8, name="second")])
    parts = [keras.layers.Rescaling(1 / 80, -1), keras.layers.Flatten(), inner, keras.layers.Dense(10, name="logits")]
    network = keras.Sequential([keras.Input((8, 8, 1)), *parts])
    report = diagnose(network, IMAGES[:64], LABELS[:64])
    (line,) = (layer for layer in report.layers if layer.name.endswith("second/kernel"))
    kernel = inner.get_layer("second").kernel
    assert line.weights.std == pytest.approx(np.std(kernel), rel=1e-4) and line.gradient.largest > 0
    assert "second/kernel" in str(report) and not report.names - {"no better than guessing"}
    network.get_layer("logits").kernel.assign(np.zeros((8, 10)))  # no gradient comes past it
    assert "in 2 of 3 layers" in str(diagnose(network, IMAGES[:64], LABELS[:64]))


def test_stage1_and_a_verifier_are_looked_into_and_stay_as_they_are(untrained_model, tiny_data):
    images, labels = tiny_data.train.take(np.arange(64))
    for network, category in ((untrained_model.stage1, None), (untrained_model.stage2_cnn(2), 2)):
        before = [variable.numpy() for variable in network.variables]
        report = diagnose(network, images, labels, category)
        assert report.guessing == pytest.approx(np.log(5 if category is None else 2))
        assert any(layer.gradient and layer.gradient.largest > 0 for layer in report.layers)
        for variable, value in zip(network.variables, before, strict=True):
            assert np.array_equal(variable.numpy(), value), variable.path


@pytest.mark.parametrize("name", ["classic", "resnet18", "efficientnet_lite0"])
def test_networks_of_the_zoo_start_in_bounds(name, tiny_data):
    """With shortcuts, depthwise convolutions, dropout; untrained, they only guess."""
    keras.utils.set_random_seed(0)
    statistics = (*tiny_data.channel_statistics(), True, "float32", 32)
    network = networks.build_network(mscnn.NETWORKS[name], tiny_data.input_shape, 5, *statistics)
    report = diagnose(network, *tiny_data.train.take(np.arange(16)))
    assert not report.names & {"weights too large", "input not normalized", "not finite", "exploding gradients"}
    assert max(layer.growth for layer in report.layers) > 0.3, "kernels are measured by their own fan-in"


@pytest.mark.parametrize(
    ("labels", "message"),
    [(np.eye(10)[LABELS], "one integer per image"), (LABELS + 1, "use integers from 0 to 9")],
)
def test_labels_of_another_form_are_refused(labels, message):
    with pytest.raises(MSCNNError, match=message):
        diagnose(small_cnn(), IMAGES[:64], labels[:64])


def test_a_model_that_hides_its_layers_is_refused(untrained_model, tiny_data):
    with pytest.raises(MSCNNError, match=r"diagnose its parts, such as \.stage1"):
        diagnose(untrained_model, tiny_data.train.images[:8], tiny_data.train.labels[:8])


# ---- the callback and the figure


def test_the_callback_costs_less_than_a_tenth_of_an_epoch_of_notebook_08(watched, tiny_data):
    """In processor time, so that it holds beside other work, too; its figure is 3 to 5 %."""
    images, labels = tiny_data.train.take(np.arange(1500) % len(tiny_data.train))
    begun = time.process_time()
    watched.model.fit(images, labels, 32, verbose=0)
    epoch, spent = time.process_time() - begun, []
    for _ in range(3):
        begun = time.process_time()
        watched.on_epoch_end(2)
        spent.append(time.process_time() - begun)
    assert min(spent) < 0.1 * epoch
    assert len(watched.reports) == len(watched.seconds) == len(watched.epoch_seconds) == 5


def test_the_network_of_notebook_08_is_healthy_and_its_switches_are_named(watched, notebook_08, tiny_data):
    assert watched.reports[1].findings == [] and watched.reports[1].accuracy > 0.8
    for switches, name in (({"scaled": False}, "input not normalized"), ({"bias": -20.0}, "dead units")):
        assert name in diagnose(notebook_08["small_network"](**switches), *tiny_data.train.take(np.arange(64))).names


def test_the_callback_says_what_diagnose_says(watched, tiny_data):
    """One on a traced graph, the other without."""
    watched.on_epoch_end(2)
    one, other = watched.reports[-1], diagnose(watched.model, *tiny_data.train.take(np.arange(64)))
    assert str(one).splitlines()[0] == str(other).splitlines()[0]
    for layer, same in zip(one.layers, other.layers, strict=True):
        if layer.gradient:
            np.testing.assert_allclose(layer.gradient, same.gradient, rtol=1e-3, atol=1e-6)


def test_the_callback_tells_a_finding_once(capsys):
    network = small_cnn(bias=-10.0)
    network.compile("adam", LOSS)
    network.fit(IMAGES, LABELS, 500, epochs=2, verbose=0, callbacks=[diagnosis.Diagnosis(IMAGES, LABELS)])
    assert capsys.readouterr().out.count("! dead units") == 1


def test_the_callback_sees_through_a_trainer(tiny_data, untrained_model):
    callback = diagnosis.Diagnosis(*tiny_data.train)
    recipe = mscnn.Recipe(epochs=6, batch_size=32)
    mscnn.train_classifier(untrained_model.stage1, tiny_data, recipe, callbacks=[callback])
    last = callback.reports[-1]
    assert last.network == "stage1" and last.accuracy > 0.7
    assert last.findings == [], "a healthy Stage 1"


def test_the_figure_has_a_histogram_for_each_kernel():
    figure = diagnosis.plot_diagnosis(trained("healthy")[0])
    titles = [axis.get_title() for axis in figure.axes]
    assert sum(title.endswith(": output") for title in titles) == 3
    assert titles[:3] == ["largest gradient", "weights / start", "dead share"]


# ---- explanations


def test_occlusion_finds_the_only_place_that_counts():
    network = keras.Sequential([keras.Input((16, 16, 1)), keras.layers.Flatten(), keras.layers.Dense(2)])
    kernel = np.zeros((16, 16, 2), np.float32)
    kernel[2, 13, 1] = 1  # one pixel of the upper right quarter
    network.set_weights([kernel.reshape(256, 2), np.zeros(2)])
    image = np.zeros((1, 16, 16, 1), np.uint8)
    image[0, 2, 13] = 250
    heat = explanation.occlusion(network, image, lambda logits: logits[:, 1], size=8, stride=8)
    assert heat.shape == (1, 2, 2)
    np.testing.assert_allclose(heat[0], [[0, 250], [0, 0]], atol=1)


def test_occlusion_of_small_images_still_has_places():
    network = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(2)])
    heat = explanation.occlusion(network, IMAGES[:2], lambda logits: logits[:, 1])
    assert heat.shape == (2, 7, 7) and np.ptp(heat[0]) > 0


def test_randomized_weights_keep_the_scaling_only(untrained_model, tiny_data):
    stage1 = untrained_model.stage1
    keras.utils.set_random_seed(5)
    before = random.getstate()
    copy, again = (explanation.randomized(stage1, seed=1) for _ in range(2))
    assert random.getstate() == before, "the caller's random numbers go on"
    for one, other in zip(copy.get_weights(), again.get_weights(), strict=True):
        assert np.array_equal(one, other)
    for name, same in (("whitening", True), ("logits", False)):
        one, other = (network.get_layer(name).get_weights()[0] for network in (stage1, copy))
        assert np.array_equal(one, other) == same
    assert copy(tiny_data.test.images[:2]).shape == (2, 5)


# ---- data: form


def test_healthy_data_raises_no_finding():
    for seed in SEEDS:
        labels = np.arange(200) % len(TINY_NAMES)
        images = tiny_images(labels, 10 + seed)
        found = data_checks.check_images(images) + data_checks.check_labels(labels, len(TINY_NAMES))
        found += data_checks.check_leak(images, tiny_images(labels, 100 + seed))
        assert found == []
    assert data_checks.findings_text([]) == "No findings."


def test_a_whole_data_set_is_checked(tiny_data):
    assert data_checks.check_data(tiny_data) == []


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.combinations(("train", "calibration", "certification", "test"), 2))
)
def test_a_copy_between_any_two_splits_is_named(first, second, tiny_data):
    copied, leaky = getattr(tiny_data, first).take([0]), getattr(tiny_data, second)
    leaky = mscnn.Split(*(np.concatenate(pair) for pair in zip(leaky, copied, strict=True)))
    (finding,) = data_checks.check_data(dataclasses.replace(tiny_data, **{second: leaky}))
    assert (finding.name, finding.where) == ("leak", f"{first} and {second}")


@pytest.mark.parametrize(
    ("images", "name", "remedy"),
    [
        (IMAGES / 255, "value range", "255"),
        ((IMAGES / 255).astype(np.uint8), "value range", "cast before"),
        (
            np.where(np.arange(len(IMAGES))[:, None, None, None] == 7, 9, IMAGES).astype(np.uint8),
            "empty images",
            "Look",
        ),
        (IMAGES[:0], "no images", "Look"),
    ],
)
def test_images_of_another_range_are_named(images, name, remedy):
    finding = data_checks.check_images(images)[0]
    assert finding.name == name and remedy in finding.remedy


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        (np.eye(10)[LABELS], "one-hot labels"),
        (LABELS[:0], "no labels"),
        (LABELS.astype(float), "label type"),
        (LABELS + 1, "shifted labels"),
        (LABELS + 10 * (LABELS == 3), "label range"),
        (np.where(LABELS == 3, 4, LABELS), "missing categories"),
        (LABELS[(LABELS != 3) | (np.arange(len(LABELS)) < 300)], "class balance"),
    ],
)
def test_labels_of_another_form_are_named(labels, name):
    assert [finding.name for finding in data_checks.check_labels(labels, 10)] == [name]


# ---- data: duplicates


def test_a_leak_is_named_however_the_copies_were_changed():
    for seed in SEEDS:
        labels = np.arange(200) % len(TINY_NAMES)
        train, test = tiny_images(labels, seed), tiny_images(labels, 100 + seed)
        rng = np.random.default_rng(seed)
        brighter = np.clip(train[[5]] * 1.1 + 8, 0, 255).astype(np.uint8)
        noisy = np.clip(train[[6]] + rng.normal(0, 4, train[[6]].shape), 0, 255).astype(np.uint8)
        leaky = np.concatenate([test, train[[4]], brighter, noisy])
        (finding,) = data_checks.check_leak(train, leaky)
        assert finding.name == "leak" and "3 of 203 test images" in finding.evidence
        found = data_checks.find_duplicates(train, leaky)
        assert {tuple(pair) for pair in found.pairs} == {(4, 200), (5, 201), (6, 202)}
        assert found.exact.tolist() == [True, False, False]


def test_digits_are_no_copies_of_each_other_but_a_copy_is_found(digits):
    train, calibration = digits.train.images, digits.calibration.images
    assert data_checks.check_data(digits) == []
    darker = (0.9 * train[:5]).round().astype(np.uint8)
    leaky = np.concatenate([calibration, train[5:10], darker])
    (finding,) = data_checks.check_leak(train, leaky, ("train", "calibration"))
    assert f"10 of {len(leaky)} calibration images are in train, 5 pairs exactly" in finding.evidence
    (finding,) = data_checks.check_leak(train, calibration, distance=10, correlation=0.95)
    assert int(finding.evidence.split()[0]) > 100, "with the bounds of photographs"


@pytest.mark.parametrize("side, channels, strict", [(32, 3, False), (32, 1, True), (8, 3, True)])
def test_small_and_grey_images_have_strict_bounds(side, channels, strict):
    assert (data_checks.copy_bounds(np.zeros((1, side, side, channels))).distance < 10) == strict


def test_of_too_many_candidates_the_nearest_are_compared(digits, monkeypatch):
    train = digits.train.images
    monkeypatch.setattr(data_checks, "MOST_CANDIDATES", 300)
    found = data_checks.find_duplicates(train, train[:50], distance=10)
    assert {(i, i) for i in range(50)} <= set(map(tuple, found.pairs)) and 0 <= found.distance < 10
    assert "copies not ruled out" in {one.name for one in data_checks.check_leak(train, train[:50], distance=10)}
    same = np.zeros((20, 32, 32, 1), np.uint8)
    assert (len((found := data_checks.find_duplicates(same, same)).pairs), found.distance) == (300, -1)


def test_the_hash_is_one_of_brightness_not_of_size():
    image = tiny_images(np.zeros(1, int), 0)
    large = np.repeat(np.repeat(image, 2, 1), 2, 2)
    hashes = data_checks.dhash(image)
    assert hashes.shape == (1, 64) and hashes.dtype == bool
    assert (data_checks.dhash(large) != hashes).sum() <= 10, "the distance that find_duplicates allows"
    assert data_checks.dhash(IMAGES[:3]).shape == (3, 64), "images smaller than the thumbnail"


# ---- data: labels against images


@functools.cache
def probability_for(shuffled: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.random.default_rng(seed).permutation(len(IMAGES))[:400]
    labels = LABELS[chosen]
    labels = np.random.default_rng(seed).permutation(labels) if shuffled else labels
    return labels, data_checks.cross_validated(data_checks.pixel_features(IMAGES[chosen]), labels, 3, seed)


@pytest.mark.parametrize("shuffled", [False, True])
def test_labels_that_were_shuffled_are_named(shuffled):
    for seed in SEEDS:
        found = data_checks.check_labels_fit(*probability_for(shuffled, seed))
        assert [finding.name for finding in found] == ["labels do not fit the images"] * shuffled


def test_suspects_by_the_definition():
    probability = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6], [0.1, 0.9]])
    labels = np.array([0, 0, 0, 1, 1])
    # The thresholds are the means 0.6 and 0.75: image 2 reaches that of category 1; image 3 reaches none.
    assert data_checks.suspected_label_errors(labels, probability).tolist() == [2]


def test_planted_label_errors_are_found():
    rng = np.random.default_rng(0)
    planted = rng.choice(len(LABELS), 50, replace=False)
    labels = LABELS.copy()
    labels[planted] = (labels[planted] + rng.integers(1, 10, 50)) % 10
    probability = data_checks.cross_validated(data_checks.pixel_features(IMAGES), labels, 3)
    suspects = data_checks.suspected_label_errors(labels, probability)
    assert len(set(planted) & set(suspects)) >= 35
    assert len(set(suspects[:40]) & set(planted)) >= 33, "the most suspicious come first"
    ranked = {"return_indices_ranked_by": "normalized_margin", "filter_by": "confident_learning", "n_jobs": 1}
    theirs = find_label_issues(labels, probability, **ranked)
    assert suspects.tolist() == theirs.tolist(), "as the authors' library has it"


def test_a_category_too_small_to_divide_is_told():
    with pytest.raises(MSCNNError, match="5 folds need 5 or more"):
        data_checks.cross_validated(np.zeros((20, 3)), np.repeat([0, 1], [18, 2]))
    with pytest.raises(MSCNNError, match="-1 to 1: use integers from 0 to 1"):
        data_checks.cross_validated(np.zeros((20, 3)), np.repeat([-1, 1], 10))


# ---- data: negatives


@pytest.mark.parametrize("hard", [False, True])
def test_a_verifier_s_random_negatives_are_named(hard):
    for seed in SEEDS:
        labels, probability = probability_for(False, seed)
        own = probability[:, 3] if hard else np.zeros(len(labels))
        order = mscnn.sample_hard_negatives(labels, own, 3, 400, np.random.default_rng(seed))
        found = data_checks.check_negatives(labels, probability[:, 3], 3, order)
        assert [finding.name for finding in found] == ([] if hard else ["easy negatives"])
