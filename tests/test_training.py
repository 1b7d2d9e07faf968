"""Recipes, Stage 1, Stage 2 base network, Stage 2, selective retraining."""

import dataclasses
import gc
import json
import weakref
import zipfile
from types import SimpleNamespace

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import patch_rooms
from scipy.stats import chisquare
from sklearn.metrics import roc_auc_score

import mscnn_helpers as mscnn
from mscnn_helpers import MSCNNError, MultiStageCNN, Recipe
from mscnn_parts.callbacks import EpochLines, RestoreBestWeights
from mscnn_parts.layers import RANDOM_FLIP, RandomFlipCrop
from mscnn_parts.optimizers import Phase, kernel_matrix
from mscnn_parts.settings import Settings
from mscnn_parts.sources import CIFAR10_NAMES
from mscnn_parts.training import calibration_losses

ONE_EPOCH = Recipe(epochs=1, batch_size=32)


@pytest.fixture(scope="module")
def model(trained_model_path) -> MultiStageCNN:
    """The trained model, shared: only for tests that change nothing."""
    return mscnn.load_model(trained_model_path)


@pytest.fixture(scope="module")
def few_images(tiny_data) -> mscnn.Dataset:
    """`tiny_data` with 96 train images, where only the way matters and not the result."""
    return dataclasses.replace(tiny_data, train=tiny_data.train.take(np.arange(96)))


# ------------------------------------------------------------------------------------------------------------
# Recipe and schedule
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 0, "epochs is 0: it has to be a whole number from 1 on"),
        ("batch_size", 32.0, "batch_size is 32.0: it has to be a whole number from 1 on"),
        ("views", 0, "views is 0: it has to be a whole number from 1 on"),
        ("stage2_base_epochs", -1, "stage2_base_epochs is -1: it has to be a whole number from 0 on"),
        ("learning_rate", 0, "learning_rate is 0: it has to be a number above 0"),
        ("stage2_kernel_learning_rate", -1.0, "stage2_kernel_learning_rate is -1.0"),
        ("stage2_fraction", np.nan, "stage2_fraction is nan: it has to be a number above 0"),
        ("optimizer_decay", -0.1, "optimizer_decay is -0.1: it has to be a number from 0 on"),
        ("momentum", 1, "momentum is 1: it is a share, a number from 0 to below 1"),
        ("warm_up", 23, "warm_up is 23: it is a share, a number from 0 to 1"),
        ("optimizer", "rmsprop", "optimizer is 'rmsprop': choose among muon, sgd, adam"),
    ],
)
def test_a_recipe_with_which_nothing_can_be_trained_is_refused(name, value, message):
    with pytest.raises(MSCNNError, match=message):
        dataclasses.replace(ONE_EPOCH, **{name: value})


def test_a_phase_without_epochs_is_refused():
    with pytest.raises(MSCNNError, match="epochs of a phase is 0"):
        Phase((), 0, 1e-3)


def test_phases_are_trainings_with_rates_of_their_own():
    recipe = mscnn.default_recipe(500, network="efficientnet_lite0")
    parts = mscnn.phase_recipes(recipe)
    assert [(part.epochs, part.optimizer_rate) for part in parts] == [(20, 1e-3), (9, 5e-4)]
    assert max(np.asarray(mscnn.learning_rate_schedule(parts[1], 100)(np.arange(100)))) == pytest.approx(5e-4, rel=0.05)
    assert mscnn.phase_recipes(ONE_EPOCH) == [ONE_EPOCH]


@pytest.mark.parametrize(
    ("images", "asked", "epochs", "batch_size"),
    [
        (45_000, (0, 0), 20, 512),
        (20_000, (0, 0), 20, 512),
        (19_999, (0, 0), 20, 64),
        (4_500, (5, 0), 5, 64),
        (45_000, (50, 32), 50, 32),
        (100, (0, 16), 20, 16),
    ],
)
def test_recipe_for(images, asked, epochs, batch_size):
    recipe = mscnn.default_recipe(images, *asked)
    assert (recipe.epochs, recipe.batch_size) == (epochs, batch_size)
    assert recipe.stage2_base_epochs == round(epochs * (2 if images < 20_000 else 0.8))


def test_learning_rate_rises_then_falls_to_nearly_nothing():
    recipe = Recipe(epochs=1, batch_size=256, learning_rate=1.0, warm_up=0.25)  # half of 512: half the peak
    rates = np.array([float(mscnn.learning_rate_schedule(recipe, 200)(step)) for step in range(201)])
    assert rates.argmax() == 50 and rates[50] == pytest.approx(0.5)
    assert (np.diff(rates[:51]) > 0).all() and (np.diff(rates[50:]) < 0).all()
    assert rates[0] == pytest.approx(0.1) and rates[-1] == pytest.approx(0.005)


def test_the_schedule_spans_the_training(untrained_model, few_images, monkeypatch):
    """96 images in batches of 40 are 3 steps an epoch."""
    asked, make = [], mscnn.learning_rate_schedule
    patch_rooms(monkeypatch, "learning_rate_schedule", lambda *arguments: asked.append(arguments) or make(*arguments))
    recipe = Recipe(epochs=2, batch_size=40)
    mscnn.train_stage1(untrained_model, few_images, recipe)
    assert asked == [(recipe, 6)]


# ------------------------------------------------------------------------------------------------------------
# Muon
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 72), (72, 24), (16, 16)])
def test_orthogonalising_evens_out_the_singular_values_and_keeps_the_directions(shape):
    rng = np.random.default_rng(0)
    left, _, right = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    values = np.geomspace(1, 0.1, min(shape))
    result = mscnn.orthogonalize(tf.constant((left * values) @ right, tf.float32)).numpy()
    inside = left.T @ result @ right.T  # diagonal, if the directions are kept
    assert np.diag(inside).min() > 0.6 and np.diag(inside).max() < 1.3
    np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=1e-4)


def test_a_kernel_as_a_matrix_has_a_column_an_output_channel():
    kernel = np.arange(3 * 3 * 2 * 5).reshape(3, 3, 2, 5)
    matrix = kernel_matrix(tf.constant(kernel)).numpy()
    assert matrix.shape == (18, 5)
    np.testing.assert_array_equal(matrix[:, 3], kernel[..., 3].ravel())


def test_muon_turns_kernels_at_one_length_and_steps_the_rest_plainly():
    rng = np.random.default_rng(0)
    values = {"kernel": rng.normal(size=(3, 3, 4, 6)), "offset": rng.normal(size=6), "dense": rng.normal(size=(6, 2))}
    ours, theirs = ([keras.Variable(value, dtype="float32") for value in values.values()] for _ in range(2))
    recipe = Recipe(epochs=1, batch_size=1, momentum=0.5, weight_decay=0.01)
    muon = mscnn.Muon(0.1, 0.2, recipe)
    sgd = keras.optimizers.SGD(0.1, momentum=0.5, nesterov=True, weight_decay=0.01)
    for _ in range(3):
        before = kernel_matrix(ours[0]).numpy()
        gradients = [tf.constant(rng.normal(size=one.shape), tf.float32) for one in ours]
        muon.apply(gradients, ours)
        sgd.apply(gradients, theirs)
        step = kernel_matrix(ours[0]).numpy() - before * np.sqrt(6) / np.linalg.norm(before)
        sizes = np.linalg.svd(step, compute_uv=False)
        assert sizes.min() > 0.02 * 0.6 and sizes.max() < 0.02 * 1.3  # all directions as far: rate x gain
        assert (step * kernel_matrix(gradients[0]).numpy()).sum() < 0  # downhill
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-6)


def test_muon_takes_the_nearest_orthogonal_matrix_to_the_momentum_ahead():
    """Against NumPy: heavy-ball momentum, Nesterov's look ahead, the polar factor by a singular value decomposition."""
    rng = np.random.default_rng(0)
    kernel = keras.Variable(rng.normal(size=(3, 3, 4, 6)), dtype="float32")
    muon = mscnn.Muon(0.1, 0.2, Recipe(epochs=1, batch_size=1, momentum=0.8))
    momentum = np.zeros((36, 6))
    for _ in range(4):
        before, gradient = kernel.numpy().reshape(36, 6), rng.normal(size=(36, 6))
        muon.apply([tf.constant(gradient.reshape(3, 3, 4, 6), tf.float32)], [kernel])
        momentum = 0.8 * momentum + gradient
        left, _, right = np.linalg.svd(gradient + 0.8 * momentum, full_matrices=False)
        step = before * np.sqrt(6) / np.linalg.norm(before) - kernel.numpy().reshape(36, 6)
        likeness = (step * (left @ right)).sum() / np.linalg.norm(step) / np.linalg.norm(left @ right)
        assert likeness > 0.97, "singular values are only about 1, so the direction is"


def test_the_rates_of_a_recipe_follow_the_batch_size():
    """In proportion for plain steps; not for those of kernels, whose length does not come from the gradients."""
    for size, plain in ((512, 1.0), (128, 0.25)):
        recipe = Recipe(epochs=1, batch_size=size, learning_rate=0.4, kernel_learning_rate=0.06, warm_up=0.25)
        muon = mscnn.stage1_optimizer(recipe, 100)
        peak = float(muon._learning_rate(25))
        assert peak == pytest.approx(0.4 * plain)
        assert peak * muon.kernel_gain == pytest.approx(0.06)


# ------------------------------------------------------------------------------------------------------------
# Stage 1 and Stage 2 base network
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "best"), [([0.2, 0.9, 0.5], 2), ([0.3, 0.4, 0.6], 3), ([0.9, 0.1, 0.9, 0.8], 3), ([0.0], 1)]
)
def test_the_best_epoch_is_kept(accuracies, best, capsys):
    """The later one of equals, since a later epoch has had the lower learning rate."""
    network = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    callback = RestoreBestWeights()
    callback.set_model(network)
    callback.on_train_begin()
    for epoch, accuracy in enumerate(accuracies):
        network.set_weights([np.full((1, 1), epoch + 1.0)])
        callback.on_epoch_end(epoch, {"val_accuracy": accuracy, "accuracy": 1 - accuracy})
    callback.on_train_end()
    assert network.get_weights()[0] == best
    assert f"after epoch {best};" in capsys.readouterr().out


def test_an_epoch_has_a_line_and_quick_ones_share_it(capsys, monkeypatch):
    lines, clock = EpochLines(), [100.0]
    monkeypatch.setattr("mscnn_parts.callbacks.time", SimpleNamespace(time=lambda: clock[0]))
    lines.set_params({"epochs": 8})
    lines.on_train_begin()
    for epoch, seconds in enumerate([1, 1, 1, 1, 9, 20, 1, 1]):
        lines.on_epoch_begin(epoch)
        clock[0] += seconds
        lines.on_epoch_end(epoch, {"accuracy": 0.5, "loss": 1.25, "val_accuracy": 0.25, "val_loss": 2})
    printed = capsys.readouterr().out.splitlines()
    assert [int(line.split("/")[0].removeprefix("Epoch ")) for line in printed] == [1, 5, 6, 8]
    assert printed[1] == "Epoch 5/8: train 50.0%, loss 1.250; calibration 25.0%, loss 2.000; 9.0 s"


@pytest.mark.parametrize(
    ("seconds", "small", "told"), [(30, 0, "About 5 more minutes.\n"), (30, 6, "About 7"), (9, 0, "")]
)
def test_a_long_training_says_how_long_it_will_take(capsys, monkeypatch, seconds, small, told):
    """Epochs of small crops take 9/16 of the time of the others."""
    lines, clock = EpochLines(small), [100.0]
    monkeypatch.setattr("mscnn_parts.callbacks.time", SimpleNamespace(time=lambda: clock[0]))
    lines.set_params({"epochs": 11})
    lines.on_train_begin()
    for epoch in range(2):
        lines.on_epoch_begin(epoch)
        clock[0] += seconds
        lines.on_epoch_end(epoch, {"accuracy": 0.5, "loss": 1.25, "val_accuracy": 0.25, "val_loss": 2})
    printed = capsys.readouterr().out
    assert printed.count("more minutes") == bool(told) and told in printed


def test_stage1_and_base_network_learn(model, tiny_data):
    """Chance is 20 %."""
    images, labels = tiny_data.test
    assert (model.stage1_logits(images).argmax(axis=1) == labels).mean() > 0.75
    assert (model.stage2_base(images).numpy().argmax(axis=1) == labels).mean() > 0.65


@pytest.fixture(scope="module")
def trained_twice(trained_model_path, few_images):
    """Stage 1 trained on for two epochs from the same start: twice with seed 1, once with seed 2."""
    runs = []
    for seed in (1, 1, 2):
        model = mscnn.load_model(trained_model_path)
        history = mscnn.train_stage1(model, few_images, Recipe(epochs=2, batch_size=32), seed)
        runs.append(SimpleNamespace(model=model, history=history))
    return runs


def test_the_seed_decides_the_weights(trained_twice):
    one, again, other = (run.model.fingerprints()["stage1"] for run in trained_twice)
    assert one == again != other


def test_training_stage1_leaves_stage2_alone_voids_the_calibration_and_learns_what_is_known(trained_twice, model):
    """The rows were fitted to another Stage 1: to go on deciding with them would be silently wrong."""
    before, trained = model.fingerprints(), trained_twice[0].model
    moved = {name for name, now in trained.fingerprints().items() if before[name] != now}
    calibrated = {f"calibration/{name}" for name in ("shared", *model.category_names)}
    assert moved == {"stage1", "ood_statistics"} | calibrated
    assert not trained.is_calibrated


def test_history_has_a_value_an_epoch_and_the_kept_weights_are_the_best(trained_twice, few_images):
    images, labels = few_images.calibration
    for run in trained_twice:
        assert set(run.history) == {"loss", "accuracy", "val_loss", "val_accuracy", "seconds"}
        assert all(len(values) == 2 for values in run.history.values())
        accuracy = (run.model.stage1_logits(images).argmax(axis=1) == labels).mean()
        assert max(run.history["val_accuracy"]) == pytest.approx(accuracy)


def test_the_optimizer_does_not_end_up_in_the_model_file(trained_twice, tmp_path):
    model = trained_twice[0].model
    assert not model.compiled and not model.stage1.compiled
    model.save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        assert not json.loads(archive.read("config.json")).get("compile_config")
        names = []
        with h5py.File(archive.extract("model.weights.h5", tmp_path)) as file:
            file.visit(names.append)
    assert names and not [name for name in names if "optimizer" in name or "momentum" in name]


def test_tensorboard_logs_are_written_only_if_asked_for(untrained_model, few_images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mscnn.train_stage1(untrained_model, few_images, ONE_EPOCH)
    assert not list(tmp_path.iterdir())
    mscnn.train_stage1(untrained_model, few_images, ONE_EPOCH, log_dir=tmp_path / "logs")
    assert {path.parent.name for path in tmp_path.rglob("*tfevents*")} == {"train", "validation"}


def test_only_training_sees_altered_images(untrained_model, few_images, monkeypatch):
    """With the augmentation replaced by blackening: all that is not training still sees the images themselves."""
    seen, plain = [], RandomFlipCrop.call

    def blacken(self, images, training=False):
        seen.append(bool(training))
        return plain(self, images * 0 if training else images, training)

    monkeypatch.setattr(RandomFlipCrop, "call", blacken)
    history = mscnn.train_stage1(untrained_model, few_images, Recipe(epochs=2, batch_size=32))
    assert set(seen) == {True, False}
    assert max(history["accuracy"]) < 0.35  # all train images were the same
    assert untrained_model.stage1_logits(few_images.calibration.images).std(axis=0).min() > 1e-3


@pytest.mark.slow
def test_many_steps_in_one_call_give_the_same_network(few_images, monkeypatch):
    """As on a GPU, where one call takes all steps of an epoch."""
    trained = []
    for of_an_epoch in (lambda epoch: 1, lambda epoch: epoch):
        patch_rooms(monkeypatch, "steps_per_execution", of_an_epoch)
        model = MultiStageCNN.for_dataset(few_images, "float32", stage1_widths=(8, 8), stage2_widths=(8, 8))
        recipe = Recipe(epochs=2, batch_size=16, stage2_fraction=0.5)
        history = mscnn.train_stage1(model, few_images, recipe)
        mscnn.train_stage2_base(model, few_images, recipe)
        mscnn.train_stage2(model, few_images, recipe)
        trained.append((model.get_weights(), history["loss"]))
    for one, other in zip(trained[0][0], trained[1][0], strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)  # a loop around the steps may round differently
    np.testing.assert_allclose(trained[0][1], trained[1][1], rtol=1e-5)


def test_training_mirrors_in_turn_and_leaves_it_to_chance_afterwards(untrained_model, few_images):
    augmentation, seen = untrained_model.stage1.get_layer("augmentation"), []
    watch = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(int(augmentation.epoch)))
    mscnn.train_stage1(untrained_model, few_images, Recipe(epochs=3, batch_size=32), callbacks=[watch])
    assert seen == [0, 1, 2]
    assert int(augmentation.epoch) == RANDOM_FLIP


def test_a_training_that_is_interrupted_leaves_whole_images(untrained_model, few_images):
    augmentation = untrained_model.stage1.get_layer("augmentation")

    def interrupt(batch, logs):
        raise KeyboardInterrupt

    stop = keras.callbacks.LambdaCallback(on_train_batch_end=interrupt)
    with pytest.raises(KeyboardInterrupt):
        mscnn.train_stage1(untrained_model, few_images, Recipe(epochs=4, batch_size=32), callbacks=[stop])
    assert (int(augmentation.epoch), float(augmentation.crop_fraction)) == (RANDOM_FLIP, 1.0)


def test_a_training_leaves_no_images_behind(untrained_model, few_images, monkeypatch):
    made, make = [], mscnn.Trainer.__init__

    def watched(self, *arguments):
        make(self, *arguments)
        made.append(weakref.ref(self))

    monkeypatch.setattr(mscnn.Trainer, "__init__", watched)
    recipe = Recipe(epochs=1, batch_size=32)
    mscnn.train_stage1(untrained_model, few_images, recipe)
    mscnn.train_stage2(untrained_model, few_images, recipe)
    gc.collect()
    assert [trainer() for trainer in made] == [None, None]


def test_callbacks_can_predict_and_save(untrained_model, few_images, tmp_path):
    seen, path = [], tmp_path / "best.keras"

    def look(epoch, logs):
        seen.append(watch.model.predict(few_images.test.images[:4], verbose=0))

    watch = keras.callbacks.LambdaCallback(on_epoch_end=look)
    keep = keras.callbacks.ModelCheckpoint(path)
    mscnn.train_stage1(untrained_model, few_images, Recipe(epochs=1, batch_size=32), callbacks=[watch, keep])
    saved = keras.saving.load_model(path).predict(few_images.test.images[:4], verbose=0)
    np.testing.assert_allclose(saved, seen[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("share", "expected"), [(0.5, [24, 24, 32, 32, 32]), (0.0, [32] * 5)])
def test_the_first_epochs_see_a_part_of_each_image(untrained_model, few_images, share, expected):
    augmentation, seen = untrained_model.stage1.get_layer("augmentation"), []

    def look(epoch, logs):
        seen.append(augmentation(few_images.train.images[:2], training=True).shape[1:3])

    watch = keras.callbacks.LambdaCallback(on_epoch_end=look)
    recipe = Recipe(epochs=5, batch_size=32, small_crops=share)
    mscnn.train_stage1(untrained_model, few_images, recipe, callbacks=[watch])
    assert seen == [(side, side) for side in expected]
    look(None, None)
    assert seen[-1] == (32, 32), "whatever is trained next starts with whole images"


def test_a_frozen_stage1_refuses_training(trained_model, few_images):
    before = trained_model.fingerprints()
    trained_model.set_stage1_trainable(False)
    with pytest.raises(MSCNNError, match="stage1 is frozen: set its trainable to True"):
        mscnn.train_stage1(trained_model, few_images, ONE_EPOCH)
    assert trained_model.fingerprints() == before
    trained_model.set_stage1_trainable()
    mscnn.train_stage1(trained_model, few_images, ONE_EPOCH)
    assert trained_model.fingerprints()["stage1"] != before["stage1"]


def test_the_base_network_is_copied_to_the_trainable_categories(trained_model, few_images):
    before = trained_model.fingerprints()
    trained_model.train_only("cat,dog")
    with pytest.raises(MSCNNError, match="stage2_base is frozen"):
        mscnn.train_stage2_base(trained_model, few_images, ONE_EPOCH)
    trained_model.stage2_base.trainable = True
    mscnn.train_stage2_base(trained_model, few_images, ONE_EPOCH)
    after = trained_model.fingerprints()
    moved = {"stage2_base", *(f"{part}/{name}" for part in ("stage2", "calibration") for name in ("cat", "dog"))}
    assert {n for n in before if before[n] != after[n]} == moved
    assert after["stage2/cat"] == after["stage2/dog"] == after["stage2_base"]


# ------------------------------------------------------------------------------------------------------------
# What a Stage 2 CNN is trained on
# ------------------------------------------------------------------------------------------------------------


def test_half_of_the_drawn_images_show_the_category():
    labels = np.arange(50) % 5
    for count in (40, 41):
        drawn = mscnn.sample_hard_negatives(labels, np.full(50, 0.2), 3, count, np.random.default_rng(0))
        assert drawn.shape == (count,)
        np.testing.assert_array_equal(labels[drawn] == 3, np.arange(count) % 2 == 0)


def test_hard_images_are_drawn_in_proportion_to_the_square_of_their_probability():
    """Of the others in proportion to its square + 0.00001; of the category itself evenly, however sure Stage 1 is."""
    rng = np.random.default_rng(0)
    labels, probability = np.arange(30) % 3, 0.05 * rng.random(30) ** 4
    probability[labels == 1] = np.linspace(0, 1, 10)
    probability[0] = 0  # never mistaken: drawn all the same, though rarely
    drawn = mscnn.sample_hard_negatives(labels, probability, 1, 200_000, rng)
    counts = np.bincount(drawn, minlength=30)
    own, weight = labels == 1, (probability**2 + 0.00001)[labels != 1]
    assert chisquare(counts[own]).pvalue > 0.01
    assert chisquare(counts[~own], 100_000 * weight / weight.sum()).pvalue > 0.01
    assert counts[0] > 0


def test_the_same_generator_draws_the_same():
    labels, probability = np.arange(30) % 3, np.linspace(0, 1, 30)
    one, same, other = (
        mscnn.sample_hard_negatives(labels, probability, 1, 100, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_batches_carry_the_right_labels(trained_model, tiny_data, monkeypatch):
    trainer = mscnn.Stage2Trainer(trained_model, tiny_data, Recipe(epochs=4, batch_size=32))
    assert trainer.steps == round(Recipe.stage2_fraction * 4 * 420 / 32 / 5) == 1
    seen = []
    fit = trainer.trainer.fit
    monkeypatch.setattr(
        trainer.trainer, "fit", lambda batches, **given: (seen.extend(batches), fit(batches, **given))[1]
    )
    trainer.train(2, trained_model.stage2_base, seed=0)
    assert len(seen) == 5
    for index, correct in seen:
        np.testing.assert_array_equal(correct, np.arange(32) % 2 == 0)
        np.testing.assert_array_equal(tiny_data.train.labels[index] == 2, correct)


# ------------------------------------------------------------------------------------------------------------
# Stage 2
# ------------------------------------------------------------------------------------------------------------


def retrain(path, data, categories: str, start: str = "stage2_base") -> MultiStageCNN:
    model = mscnn.load_model(path)
    model.train_only(categories)
    mscnn.train_stage2(model, data, Recipe(epochs=5, batch_size=32), seed=4, start=start)
    return model


def test_a_category_does_not_depend_on_those_trained_before(trained_model_path, few_images):
    """Neither the optimizer's state nor the random numbers of the category before reach the next one."""
    together = retrain(trained_model_path, few_images, "cat,truck").fingerprints()
    alone = retrain(trained_model_path, few_images, "truck").fingerprints()
    assert together["stage2/truck"] == alone["stage2/truck"]
    assert together["stage2/cat"] != alone["stage2/cat"]


def test_a_training_step_is_traced_once(trained_model, few_images, monkeypatch):
    """TensorFlow traces again what makes a variable while it is traced."""
    traces, step = [], keras.Model.train_step
    monkeypatch.setattr(keras.Model, "train_step", lambda self, data: traces.append(1) or step(self, data))
    recipe = Recipe(epochs=1, batch_size=32)
    mscnn.train_stage1(trained_model, few_images, recipe)
    assert traces == [1]
    mscnn.Stage2Trainer(trained_model, few_images, recipe).train(0, trained_model.stage2_base, seed=0)
    assert traces == [1, 1]


def test_all_categories_are_trained_by_one_graph(trained_model, few_images, monkeypatch):
    traces, loss = [], keras.losses.BinaryCrossentropy

    class Spy(loss):
        def call(self, *arguments):
            traces.append(1)  # Python runs this only while a graph is made: one for training, one for validation
            return super().call(*arguments)

    monkeypatch.setattr(keras.losses, "BinaryCrossentropy", Spy)
    trainer = mscnn.Stage2Trainer(trained_model, few_images, Recipe(epochs=5, batch_size=32))
    trainer.train(0, trained_model.stage2_base, seed=0)
    first = len(traces)
    for category in (1, 2, 3):
        trainer.train(category, trained_model.stage2_base, seed=0)
    assert 2 <= first <= 4 and len(traces) == first


def test_only_trainable_categories_are_trained_each_from_its_start(trained_model, few_images, monkeypatch):
    calls = []

    class Spy:
        def __init__(self, *arguments):
            pass

        def train(self, category, start, seed):
            calls.append((category, start.name, seed))
            return {"accuracy": [0.5], "loss": [0.5]}

    patch_rooms(monkeypatch, "Stage2Trainer", Spy)
    trained_model.train_only("truck,1")
    histories = mscnn.train_stage2(trained_model, few_images, ONE_EPOCH)
    assert list(histories) == ["cat", "truck"]
    mscnn.train_stage2(trained_model, few_images, ONE_EPOCH, start="current")
    assert [name for _, name, _ in calls] == ["stage2_base", "stage2_base", "category_1", "category_3"]
    assert len({seed for _, _, seed in calls[:2]}) == 2  # each category draws its own images


def test_training_stage2_leaves_its_start_alone_and_voids_its_own_row(trained_model, few_images):
    before = trained_model.fingerprints()
    trained_model.set_stage2_category_trainable("", False)
    trained_model.set_stage2_category_trainable("dog")
    history = mscnn.train_stage2(trained_model, few_images, Recipe(epochs=5, batch_size=32))["dog"]
    after = trained_model.fingerprints()
    assert {name for name in before if before[name] != after[name]} == {"stage2/dog", "calibration/dog"}
    assert not trained_model.is_calibrated
    assert set(history) == {"loss", "accuracy", "val_loss", "val_accuracy", "seconds"}
    assert all(len(values) == 5 for values in history.values())


def test_a_category_that_stage1_never_predicts_is_trained_without_validation(trained_model, few_images):
    trainer = mscnn.Stage2Trainer(trained_model, few_images, Recipe(epochs=5, batch_size=32))
    trainer.predicted = np.zeros_like(trainer.predicted)
    assert set(trainer.train(3, trained_model.stage2_base, seed=0)) == {"loss", "accuracy", "seconds"}


def test_stage2_learns_what_is_right(model, untrained_model, tiny_data):
    """Each trained verifier tells its category from the others; an untrained one does not."""
    images = np.concatenate([tiny_data.test.images, tiny_data.certification.images])
    labels = np.concatenate([tiny_data.test.labels, tiny_data.certification.labels])

    def auroc(verifiers: MultiStageCNN) -> np.ndarray:
        return np.array([roc_auc_score(labels == c, verifiers.stage2_log_odds(images, c)) for c in range(5)])

    assert auroc(model).min() > 0.8
    assert auroc(model).mean() > auroc(untrained_model).mean() + 0.15
    # And so it finds Stage 1's errors, which an untrained verifier does not.
    category, _, trained, *_ = model.scores(images)
    untrained = np.zeros(len(images))
    for c in range(5):
        untrained[category == c] = untrained_model.stage2_log_odds(images[category == c], c)
    correct = category == labels
    assert mscnn.aurc(trained, correct) < 0.7 * mscnn.aurc(untrained, correct)


# ------------------------------------------------------------------------------------------------------------
# Selective retraining
# ------------------------------------------------------------------------------------------------------------


def test_calibration_losses_are_those_of_the_decisions(model, tiny_data):
    decisions = model.decide(tiny_data.calibration.images)
    got = calibration_losses(model, tiny_data)
    assert got.shape == (5,)
    for c in range(5):
        here = decisions.stage1_category == c
        correct = tiny_data.calibration.labels[here] == c
        given = np.where(correct, decisions.confidence[here], 1 - decisions.confidence[here])
        assert got[c] == pytest.approx(-np.log(given).mean())


def test_the_weakest_categories_have_the_highest_losses(model, tiny_data, monkeypatch):
    """A category that Stage 1 never predicts is not among them, unless all are asked for."""
    patch_rooms(monkeypatch, "calibration_losses", lambda *_: np.array([0.3, np.nan, 0.1, 0.9, 0.3]))
    assert mscnn.weakest_categories(model, tiny_data) == (0, 3)
    assert mscnn.weakest_categories(model, tiny_data, 1) == (3,)
    assert mscnn.weakest_categories(model, tiny_data, 4) == (0, 2, 3, 4)


@pytest.fixture
def noisy_training(monkeypatch):
    """Stage 2's training replaced by one that ruins the weights at once."""

    def ruin(model, data, recipe, seed, start):
        rng = np.random.default_rng(seed)
        for c in model.trainable_categories():
            network = model.stage2_cnn(c)
            network.set_weights([rng.normal(size=w.shape) ** 2 for w in network.get_weights()])
        return {}

    patch_rooms(monkeypatch, "train_stage2", ruin)


def test_a_worse_category_is_put_back(trained_model, tiny_data, noisy_training, monkeypatch):
    """The verifier is ruined, and its row made to doubt everything, so that the log loss does rise."""
    before, losses = trained_model.fingerprints(), calibration_losses(trained_model, tiny_data)
    moved, during = {"stage2/cat", "calibration/cat", "stage2/dog", "calibration/dog"}, []

    def doubt(self, split, categories):
        rows = self.calibration_coefficients.numpy()
        rows[list(categories)] = [-5, 0, 0]
        self.calibration_coefficients.assign(rows)
        during.append(self.fingerprints())

    monkeypatch.setattr(MultiStageCNN, "calibrate", doubt)
    results, _ = mscnn.retrain_stage2(trained_model, tiny_data, "dog,cat", ONE_EPOCH)
    assert {name for name in before if before[name] != during[0][name]} == moved
    assert trained_model.fingerprints() == before
    assert [(r.category, r.kept) for r in results] == [("cat", False), ("dog", False)]
    assert [r.loss_before for r in results] == [losses[1], losses[4]]
    assert all(r.loss_after > r.loss_before + 1 for r in results)

    results, _ = mscnn.retrain_stage2(trained_model, tiny_data, "dog,cat", ONE_EPOCH, keep_worse=True)
    assert all(r.kept for r in results)
    assert {name for name in before if before[name] != trained_model.fingerprints()[name]} == moved


def test_each_category_is_judged_by_itself(trained_model, tiny_data, noisy_training, monkeypatch):
    """Better is kept; equal, worse and unknown are rolled back."""
    before = trained_model.fingerprints()
    nan = np.nan
    losses = iter([np.array([0.5, 0.5, 0.5, nan, 0.5]), np.array([0.4, 0.5, 0.6, nan, 0.1])])
    patch_rooms(monkeypatch, "calibration_losses", lambda *_: next(losses))
    results, _ = mscnn.retrain_stage2(trained_model, tiny_data, "0,1,2,3", ONE_EPOCH)
    assert [r.kept for r in results] == [True, False, False, False]
    after = trained_model.fingerprints()
    assert {n for n in before if before[n] != after[n]} == {"stage2/airplane", "calibration/airplane"}


def test_an_unknown_category_stops_retraining_before_it_begins(trained_model, tiny_data, noisy_training):
    before, free = trained_model.fingerprints(), trained_model.trainable_categories()
    with pytest.raises(MSCNNError, match="Category index 5 is out of range: use 0 to 4"):
        mscnn.retrain_stage2(trained_model, tiny_data, "ship,5", ONE_EPOCH)
    assert trained_model.fingerprints() == before and trained_model.trainable_categories() == free


@pytest.mark.parametrize(
    ("only", "chosen", "calibrated", "kept"),
    [(True, "ship", True, True), (True, "", True, False), (False, "ship", True, False), (True, "ship", False, False)],
)
def test_stage2_is_kept_where_some_categories_of_a_finished_model_are_retrained(only, chosen, calibrated, kept):
    model = SimpleNamespace(category_names=CIFAR10_NAMES, is_calibrated=calibrated)
    settings = Settings(stage2_only=only, stage2_categories=chosen)
    assert mscnn.keeps_stage2(model, settings) is kept
