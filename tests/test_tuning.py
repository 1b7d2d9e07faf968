"""The craft of training: the learning rate finder, schedules, augmentation, ensembles and the search."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import mscnn_helpers as mscnn
from mscnn_parts import tuning
from mscnn_parts.training import Stage2Trainer

RECIPE = mscnn.Recipe(epochs=2, batch_size=32, stage2_fraction=0.3)


def trainer_of(model, data) -> tuple[mscnn.Trainer, tf.data.Dataset]:
    """Stage 1's trainer, compiled, and its batches."""
    trainer = mscnn.compile_classifier(mscnn.Trainer(model.stage1, data.train.images), RECIPE, 100)
    return trainer, trainer.batches(keras.utils.to_categorical(data.train.labels), 32)


def state(*parts) -> list[np.ndarray]:
    return [variable.numpy() for part in parts for variable in part.variables]


def assert_same(before: list[np.ndarray], after: list[np.ndarray]) -> None:
    assert len(before) == len(after) > 0
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)  # NaN equals NaN, else bit for bit


@pytest.fixture
def stage1(untrained_model, tiny_data):
    return trainer_of(untrained_model, tiny_data)


def used_optimizer(trainer, batches) -> keras.optimizers.Optimizer:
    """An optimizer that has momentum from three steps at another rate."""
    optimizer = keras.optimizers.SGD(0.03, momentum=0.9)
    tuning.find_learning_rate(trainer, batches, optimizer, 0.01, 0.02, 2)  # builds it
    for variable in optimizer.variables[2:]:
        variable.assign(np.random.default_rng(0).normal(scale=1e-3, size=variable.shape))
    return optimizer


def test_the_finder_puts_everything_back(stage1):
    trainer, batches = stage1
    optimizer = used_optimizer(trainer, batches)
    before = state(trainer, optimizer)
    test = tuning.find_learning_rate(trainer, batches, optimizer, 1e-4, 1e-1, 20)
    assert_same(before, state(trainer, optimizer))
    assert float(optimizer.learning_rate) == np.float32(0.03) and len(test.rates) == 20
    assert len({variable.path for variable in trainer.variables if "moving" in variable.path}) > 5


def test_it_moves_what_it_puts_back(stage1):
    """Else the test above would prove nothing."""
    trainer, batches = stage1
    before, seen = state(trainer), []
    inputs, targets = next(iter(batches))

    def watched():
        for _ in range(3):
            yield inputs, targets
            seen.append(state(trainer))

    tuning.find_learning_rate(trainer, watched(), keras.optimizers.Adam(), 1e-3, 1e-2, 3)
    moved = sum(not np.array_equal(one, other) for one, other in zip(before, seen[-1], strict=True))
    assert moved > len(before) / 2
    assert_same(before, state(trainer))


@pytest.mark.parametrize("fails", ["data", "loss"])
def test_everything_is_put_back_when_a_later_step_fails(stage1, fails):
    trainer, batches = stage1
    optimizer, seen = keras.optimizers.Adam(), []

    def watched():
        for number, batch in enumerate(batches):
            if fails == "data" and number == 5:
                raise OSError("this is the sixth")
            seen.append(state(trainer))
            yield batch

    def loss(truth, logits):
        taken, most = tf.cast(optimizer.iterations, tf.int32), 5 if fails == "loss" else 1000
        with tf.control_dependencies([tf.debugging.assert_less(taken, most, "this is the sixth")]):
            return keras.losses.categorical_crossentropy(truth, logits, from_logits=True)

    trainer.compile(loss=loss)
    optimizer.build(trainer.trainable_variables)
    before = state(trainer, optimizer)
    with pytest.raises((OSError, tf.errors.InvalidArgumentError), match="this is the sixth"):
        tuning.find_learning_rate(trainer, watched(), optimizer)
    moved = [not np.array_equal(*pair) for pair in zip(seen[0], seen[-1], strict=True)]
    assert any(moved), "there was something to put back"
    assert_same(before, state(trainer, optimizer))


def test_the_finder_serves_float16_with_its_scaled_loss(tiny_data):
    model = mscnn.MultiStageCNN.for_dataset(tiny_data, "mixed_float16", stage1_widths=(8, 8), stage2_widths=(8, 8))
    trainer, batches = trainer_of(model, tiny_data)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.03, momentum=0.9), initial_scale=1024.0)
    optimizer.build(trainer.trainable_variables)
    before = state(trainer, optimizer)
    test = tuning.find_learning_rate(trainer, batches, optimizer, 1e-3, 0.3, 30)
    assert test.smoothed.min() < test.losses[0] - 0.05, "it learns"
    assert float(optimizer.learning_rate) == np.float32(0.03)
    assert_same(before, state(trainer, optimizer))


@pytest.mark.slow
def test_a_training_after_the_finder_is_the_one_without(tiny_data):
    weights = []
    for find in (False, True):
        keras.utils.set_random_seed(0)
        model = mscnn.MultiStageCNN.for_dataset(tiny_data, "float32", stage1_widths=(8, 8), stage2_widths=(8, 8))
        if find:
            tuning.find_learning_rate(*trainer_of(model, tiny_data), keras.optimizers.SGD(), steps=10)
        mscnn.train_classifier(model.stage1, tiny_data, RECIPE)
        weights.append(model.stage1.get_weights())
    assert_same(*weights)


def test_the_finder_finds_where_a_known_loss_diverges():
    """Loss w^2 by SGD: a step multiplies w by 1 - 2 rate, so rates above 1 diverge."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    model.compile(loss="mse")
    data = [(np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32))]
    test = tuning.find_learning_rate(model, data, keras.optimizers.SGD(), 1e-3, 1000, 200)
    assert test.diverged and len(test.rates) < 200
    assert 0.3 < test.best < 10 and test.suggestion == test.best / 10


def test_the_finder_stops_at_what_is_no_number(stage1):
    trainer, batches = stage1
    optimizer = keras.optimizers.SGD()
    optimizer.build(trainer.trainable_variables)
    before = state(trainer, optimizer)
    test = tuning.find_learning_rate(trainer, batches, optimizer, 1e-3, 1e30, 40)
    assert test.diverged and len(test.rates) < 40 and np.isfinite(test.losses).all()
    assert_same(before, state(trainer, optimizer))


def test_the_finder_serves_a_verifier(trained_model, tiny_data):
    stage2 = Stage2Trainer(trained_model, tiny_data, RECIPE)
    correct = np.float32(stage2.labels == 1)
    batches = stage2.trainer.batches(correct, 32, shuffle_seed=0)
    before = state(stage2.trainer)
    recipe_optimizer = tuning.optimizers(RECIPE)["Muon"](0.01)
    test = tuning.find_learning_rate(stage2.trainer, batches, recipe_optimizer, 1e-5, 1, 40)
    assert test.losses[0] < 1.5 and 1e-6 < test.suggestion < 1
    assert_same(before, state(stage2.trainer))


def test_the_finder_says_what_is_wrong(stage1):
    trainer, batches = stage1
    sgd = keras.optimizers.SGD
    with pytest.raises(mscnn.MSCNNError, match="0 < low < high"):
        tuning.find_learning_rate(trainer, batches, sgd(), 1.0, 0.1)
    with pytest.raises(mscnn.MSCNNError, match="no batches"):
        tuning.find_learning_rate(trainer, [], sgd())
    with pytest.raises(mscnn.MSCNNError, match="constant rate"):
        tuning.find_learning_rate(trainer, batches, sgd(keras.optimizers.schedules.CosineDecay(0.1, 10)))
    with pytest.raises(mscnn.MSCNNError, match="not compiled"):
        tuning.find_learning_rate(keras.Sequential([keras.layers.Dense(1)]), batches, sgd())
    trainer.network.layers[-1].bias.assign(np.full(5, np.nan))
    with pytest.raises(mscnn.MSCNNError, match="no number at the lowest"):
        tuning.find_learning_rate(trainer, batches, sgd())


def test_a_range_that_ends_too_early_is_told():
    rates, falling = np.geomspace(1e-4, 1e-2, 20), np.linspace(3, 2, 20)
    early = tuning.RangeTest(rates, falling, falling, False)
    assert "raise `high`" in early.warning
    for axis in tuning.plot_range_tests({"Stage 1": early}).axes:
        assert axis.get_title() == f"Stage 1\n{early.warning}"
    risen = np.concatenate([falling[:10], falling[:10]])
    assert tuning.RangeTest(rates, risen, risen, False).warning == ""
    assert tuning.RangeTest(rates, falling, falling, True).warning == "", "the next loss was no number"


def test_smoothing_starts_at_the_first_loss():
    np.testing.assert_allclose(tuning.smooth([2.0, 2.0, 2.0]), 2.0)
    assert tuning.smooth([1, 3], keep=0.5)[1] == pytest.approx((0.5 * 1 + 3) / 1.5)


def test_the_range_plot_marks_the_suggestion():
    rates = np.geomspace(1e-4, 1, 5)
    losses = np.array([3.0, 2.0, 1.0, 2.0, 9.0])
    figure = tuning.plot_range_tests({"Stage 1": tuning.RangeTest(rates, losses, losses, True)})
    (axis,) = figure.axes
    assert axis.get_xscale() == "log" and axis.lines[2].get_xdata()[0] == pytest.approx(1e-3)


@pytest.mark.parametrize("name", tuning.optimizers(RECIPE))
def test_each_optimizer_brings_a_kernel_nearer_to_its_aim(name):
    keras.utils.set_random_seed(0)
    network = keras.Sequential([keras.Input((6, 6, 2)), keras.layers.Conv2D(4, 3), keras.layers.Flatten()])
    images = np.random.default_rng(0).normal(size=(8, 6, 6, 2)).astype(np.float32)
    aim = network(images)
    network.layers[0].kernel.assign(keras.random.normal((3, 3, 2, 4)) / 5)
    optimizer = tuning.optimizers(RECIPE)[name](0.1 if name in ("SGD", "Adagrad", "Muon") else 0.02)
    losses = []
    for _ in range(40):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((tf.nn.l2_normalize(network(images), 1) - tf.nn.l2_normalize(aim, 1)) ** 2) / 8
        optimizer.apply(tape.gradient(loss, [network.layers[0].kernel.value]), [network.layers[0].kernel])
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_each_schedule_has_its_peak_where_it_should():
    peaks = {"one-cycle": 60, "our triangle": 46}  # 30 % and 23 % of the steps; the others begin there
    for name, schedule in tuning.schedules(0.3, 200).items():
        rates = [float(schedule(step)) if callable(schedule) else schedule for step in range(200)]
        assert max(rates) == pytest.approx(0.3, rel=0.03), name
        assert name == "cyclic" or np.argmax(rates) == peaks.get(name, 0), name
        assert min(rates) >= 0 and (rates[-1] < 0.05) == (name != "constant"), name
    cyclic = tuning.CyclicRate(0.1, 0.5, 10)
    np.testing.assert_allclose([float(cyclic(step)) for step in (0, 5, 10, 13)], [0.1, 0.5, 0.1, 0.34], rtol=1e-5)
    assert tuning.CyclicRate.from_config(cyclic.get_config()).period == 10


def test_the_learning_rate_is_in_the_history(stage1):
    trainer, batches = stage1
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([14], [0.1, 0.01])
    trainer.compile(keras.optimizers.SGD(schedule), trainer.loss)
    history = trainer.fit(batches, epochs=2, verbose=0, callbacks=[tuning.LogLearningRate()]).history
    np.testing.assert_allclose(history["learning_rate"], [0.1, 0.01], rtol=1e-5)


def test_early_stopping_counts(capsys):
    stopping = tuning.CountedEarlyStopping(monitor="val_loss", patience=2)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    stopping.set_model(model)
    stopping.on_train_begin()
    for epoch, loss in enumerate([3.0, 1.0, 2.0, 2.0]):
        stopping.on_epoch_end(epoch, {"val_loss": loss})
    lines = capsys.readouterr().out.splitlines()
    assert ["best" in line for line in lines] == [True, True, False, False]
    assert "1 of 2" in lines[2] and "2 of 2" in lines[3] and model.stop_training


@pytest.mark.parametrize("channels", [1, 3])
def test_each_augmentation_changes_images_in_training_only(channels):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 32, 32, channels)).astype(np.float32)
    targets = np.eye(10, dtype=np.float32)[np.arange(16) % 10]
    for name, layer in tuning.augmentations(32, channels).items():
        seen, target = tuning.augmented(layer, images, targets)
        assert seen.shape == images.shape and not np.allclose(seen, images), name
        assert np.min(seen) >= 0 and np.max(seen) <= 255.001, name
        np.testing.assert_allclose(np.sum(target, axis=1), 1, rtol=1e-5)
        assert np.array_equal(target, targets) == (name != "mixup"), name


def test_an_older_keras_has_fewer_augmentations(monkeypatch, capsys):
    for kind in ("RandomColorJitter", "RandomErasing", "RandomGaussianBlur", "MixUp"):  # as in Keras 3.4
        monkeypatch.delattr(keras.layers, kind)
    layers = tuning.augmentations(32)
    assert list(layers) == ["pad and crop", "flip", "shift 10 %", "rotation 10°"]
    assert "RandomErasing" in capsys.readouterr().out
    images, targets = np.zeros((2, 32, 32, 3), np.float32), np.eye(2, dtype=np.float32)
    assert tuning.augmented(layers["flip"], images, targets)[0].shape == images.shape


def test_blur_with_probability_one_half_touches_half_the_images_and_computes_no_more():
    images = np.random.default_rng(0).uniform(0, 255, (400, 16, 16, 3)).astype(np.float32)
    seen = []

    class Marking(keras.layers.Layer):
        def call(self, inputs, training=False):
            seen.append(len(inputs))
            return inputs + 1.0

    changed = tuning.Sometimes(Marking(), 0.5)(images, training=True) - images
    assert set(np.unique(np.round(changed, 3))) == {0.0, 1.0}
    assert 150 < seen[0] == int(np.sum(np.any(changed > 0.5, axis=(1, 2, 3)))) < 250
    np.testing.assert_array_equal(tuning.Sometimes(Marking(), 0.5)(images), images)


def test_all_pipelines_give_the_same_batches_and_the_cache_decodes_once():
    files = np.array([str(number).encode() for number in range(10)])
    decoded = []

    def decode(file):
        number = tf.numpy_function(lambda f: decoded.append(f) or np.float32(f), [file], tf.float32)
        return tf.ensure_shape(number, ())[None]

    pipelines = tuning.input_pipelines(files, np.arange(10), decode, 4, workers=2)
    for name, batches in pipelines.items():
        images, labels = zip(*batches.as_numpy_iterator(), strict=True)
        np.testing.assert_array_equal(np.concatenate(images)[:, 0], np.arange(10), err_msg=name)
        np.testing.assert_array_equal(np.concatenate(labels), np.arange(10), err_msg=name)
    before = len(decoded)
    for name in ("cache", "resident"):
        list(pipelines[name])
    assert len(decoded) == before


def test_the_device_report_names_what_matters():
    report = tuning.device_report()
    assert report.keys() >= {"device", "memory", "threads", "policy", "tensorflow", "keras"}
    assert all(isinstance(value, str) and value for value in report.values())


def test_an_ensemble_answers_by_mean_or_majority():
    first, second, third = [0.9, 0.1, 0.0], [0.0, 0.6, 0.4], [0.0, 0.6, 0.4]
    probability = np.array([[first], [second], [third]])
    answer, confidence = tuning.mean_softmax(probability)
    assert answer == [1] and confidence == pytest.approx(1.3 / 3)
    answer, confidence = tuning.majority_vote(np.array([[first], [first], [second]]))
    assert answer == [0] and confidence == pytest.approx(2 / 3)
    answer, _ = tuning.majority_vote(np.array([[first], [second]]))
    assert answer == [0], "a tie goes to the larger mean"


def test_without_optuna_the_study_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(mscnn.MSCNNError, match="tuning"):
        tuning.open_study(tmp_path / "study.db", "any")


def test_a_search_goes_on_where_it_was_interrupted(tmp_path):
    pytest.importorskip("optuna")
    path, called = tmp_path / "study.db", []

    def objective(trial):
        if len(called) == 3:
            raise KeyboardInterrupt
        called.append(trial.suggest_float("x", -1, 1))
        return called[-1] ** 2

    with pytest.raises(KeyboardInterrupt):
        tuning.run_trials(tuning.open_study(path, "a"), objective, 8)
    called.append(None)  # so that it is not interrupted again
    study = tuning.open_study(path, "a")
    assert tuning.run_trials(study, objective, 8) == 5 and tuning.run_trials(study, objective, 8) == 0
    drawn = [x for x in called if x is not None]
    assert len(set(drawn)) == len(drawn) == 8, "the same draws are not made again"
    assert study.best_value == pytest.approx(min(x * x for x in drawn))
    assert tuning.open_study(path, "of another objective").trials == []


def test_a_hopeless_trial_is_pruned(tmp_path):
    optuna = pytest.importorskip("optuna")
    study, epochs = tuning.open_study(tmp_path / "study.db", "any", warm_up=2), []

    def objective(trial):
        value = 10.0 if trial.number == 3 else 1.0
        callback = tuning.ReportToTrial(trial, lambda model: model.cost)
        callback.set_model(types.SimpleNamespace(cost=value))
        for epoch in range(4):
            callback.on_epoch_end(epoch)
            epochs.append(trial.number)
        return value

    tuning.run_trials(study, objective, 4)
    assert study.trials[3].state == optuna.trial.TrialState.PRUNED
    assert epochs.count(3) < 4 and epochs.count(2) == 4


def test_color_changes_little_and_cutout_a_sixteenth():
    images = np.full((200, 32, 32, 3), (150.0, 120.0, 100.0), np.float32)  # no step of the color leaves 0 to 255
    layers, targets = tuning.augmentations(32), np.zeros((200, 2), np.float32)
    seen = tuning.augmented(layers["color 0.2"], images, targets)[0].numpy()
    # Brightness moves red and blue alike, contrast leaves images of one color: only saturation moves their distance.
    distances = (seen[..., 0] - seen[..., 2])[:, 0, 0] / 50
    np.testing.assert_allclose([distances.min(), distances.max()], [0.8, 1.2], atol=0.01)
    erased = (tuning.augmented(layers["cutout"], images, targets)[0].numpy() == 128).all(axis=3).mean(axis=(1, 2))
    np.testing.assert_allclose(erased, 1 / 16, atol=0.02)
