"""The layers against plain references, and the builder of both stages' CNNs."""

from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import tiny_images

import mscnn_helpers as mscnn
from mscnn_helpers import MSCNNError, build_cnn
from mscnn_parts import networks
from mscnn_parts.fitting import validation_batch
from mscnn_parts.kernels import images_per_row, pack_rows
from mscnn_parts.layers import RANDOM_FLIP, BatchNormalization, FusedBatchNormalization, RandomFlipCrop, WhiteningConv
from mscnn_parts.networks import whitening_kernel

# ------------------------------------------------------------------------------------------------------------
# RandomFlipCrop
# ------------------------------------------------------------------------------------------------------------


def shifted(images: np.ndarray, down: int, right: int, mirrored: bool) -> np.ndarray:
    """The images moved by so many pixels, the border filled by reflection, then mirrored if asked for."""
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    moved = padded[:, 2 - down : 2 - down + height, 2 - right : 2 - right + width]
    return moved[:, :, ::-1] if mirrored else moved


VARIANTS = [(down, right, mirrored) for down in range(-2, 3) for right in range(-2, 3) for mirrored in (False, True)]


def variants_seen(layer: Callable, images: np.ndarray) -> list[tuple[int, int, bool]]:
    """Which shift and mirroring each image of one training batch got; fails where it is none of the allowed ones."""
    seen = layer(tf.constant(images), training=True).numpy()
    assert (seen.shape, seen.dtype) == (images.shape, np.float32)
    found = np.array([(seen == shifted(images, *one)).all(axis=(1, 2, 3)) for one in VARIANTS])  # (variants, B)
    assert (found.sum(axis=0) == 1).all(), "each is one of them, and they can be told apart"
    return [VARIANTS[one] for one in found.argmax(axis=0)]


def noise(count: int, height: int = 12, width: int = 9, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), np.uint8)


@pytest.mark.parametrize("training", [False, None])
def test_no_augmentation_outside_training(training):
    images = noise(20)
    layer = RandomFlipCrop()
    out = layer(tf.constant(images)) if training is None else layer(tf.constant(images), training=training)
    assert np.array_equal(out.numpy(), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_shifts_and_mirrors_exactly(channels):
    seen = variants_seen(RandomFlipCrop(), noise(1_500, channels=channels))
    assert set(seen) == set(VARIANTS), "every shift occurs, and each with and without mirroring"
    assert 0.45 < np.mean([mirrored for *_, mirrored in seen]) < 0.55
    for axis in (0, 1):
        counts = np.bincount([one[axis] + 2 for one in seen], minlength=5)
        assert counts.min() > 225, "all shifts are equally probable: 300 each are expected"


@pytest.mark.parametrize(("size", "most"), [(28, 2), (64, 4)])
def test_large_images_are_shifted_further(size, most):
    places = np.tile(np.arange(size, dtype=np.uint8)[:, None, None], (300, 1, size, 1))  # each pixel says its row
    seen = RandomFlipCrop(flip=False)(places, training=True).numpy()
    assert set(seen[:, 20, 20, 0] - 20) == set(range(-most, most + 1))


def test_what_must_not_be_mirrored_is_not():
    seen = variants_seen(RandomFlipCrop(flip=False), noise(1_000))
    assert not any(mirrored for *_, mirrored in seen)
    assert len(set(seen)) == 25


def test_in_epochs_each_image_is_mirrored_in_turn():
    layer, images, mirrored = RandomFlipCrop(), noise(1_000), []
    graph = tf.function(layer)
    for epoch in range(3):
        layer.epoch.assign(epoch)
        mirrored.append([one for *_, one in variants_seen(graph, images)])
    assert mirrored[0] == [not one for one in mirrored[1]] == mirrored[2], "both views in any two epochs"
    assert 0.45 < np.mean(mirrored[0]) < 0.55, "and half of the images begin with the mirrored one"


@pytest.mark.parametrize("side", [12, 224])
def test_a_bright_image_of_any_size_is_mirrored_in_turn(side):
    """Above 2^24 a float32 sum of pixels is always even: at 224 pixels that of a bright image."""
    layer, image, seen = RandomFlipCrop(shift=0), np.full((1, side, side, 3), 250, np.uint8), []
    image[:, :, 0] = 1  # dark on the left
    for epoch in range(4):
        layer.epoch.assign(epoch)
        seen.append(layer(image, training=True).numpy()[0, 0, 0, 0] == 1)
    assert seen in ([True, False, True, False], [False, True, False, True])


def test_in_epochs_what_must_not_be_mirrored_is_not():
    layer = RandomFlipCrop(flip=False)
    layer.epoch.assign(1)
    assert not any(mirrored for *_, mirrored in variants_seen(layer, noise(100)))


@pytest.mark.parametrize("flip", [False, True])
def test_images_are_turned_by_all_quarters(flip):
    """Without mirroring by four turns alone, with it each also mirrored; all about equally often."""
    images = noise(1_600, 6, 6)
    layer = RandomFlipCrop.from_config(RandomFlipCrop(flip, shift=0, quarter_turns=True).get_config())
    seen = tf.function(layer)(images, training=True).numpy()
    sides = (slice(None), slice(None, None, -1))[: 2 if flip else 1]
    allowed = [np.rot90(images[:, :, side], turns, (1, 2)) for side in sides for turns in range(4)]
    found = np.array([(seen == one).all(axis=(1, 2, 3)) for one in allowed])  # (variants, B)
    assert (found.sum(axis=0) == 1).all() and found.mean(axis=1).min() > 0.75 / len(allowed)


def test_only_square_images_can_be_turned():
    with pytest.raises(MSCNNError, match="square images; these have 12 x 9 pixels"):
        RandomFlipCrop(quarter_turns=True)(noise(2))


def test_a_small_crop_is_a_random_part_of_the_image():
    """Of 8 x 8 pixels a share of 0.75 is 6 x 6, which start anywhere from -2 to 4."""
    layer, images = RandomFlipCrop(flip=False), noise(1_000, 8, 8)
    layer.crop_fraction.assign(0.75)
    crops = tf.function(layer)(images, training=True).numpy()
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    starts = []
    for crop, image in zip(crops, padded, strict=True):
        found = [(y, x) for y in range(7) for x in range(7) if np.array_equal(image[y : y + 6, x : x + 6], crop)]
        assert len(found) == 1
        starts += found
    counts = np.bincount([7 * y + x for y, x in starts], minlength=49)
    assert counts.min() > 3, "all places are equally probable: 20 each are expected"


def test_augmentation_differs_from_batch_to_batch():
    layer, images = RandomFlipCrop(), noise(100)
    assert variants_seen(layer, images) != variants_seen(layer, images)


def test_augmentation_in_a_graph_heeds_a_new_seed():
    layer, images = RandomFlipCrop(), tf.constant(noise(50))
    graph = tf.function(lambda images: layer(images, training=True))
    drawn = []
    for seed in (1, 1, 2):
        layer.reseed(seed)
        drawn.append([graph(images).numpy(), graph(images).numpy()])
    assert not np.array_equal(*drawn[0]), "every batch is another one"
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


# ------------------------------------------------------------------------------------------------------------
# Trainer
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "batch_size", "expected"), [(16, 64, 500), (32, 512, 500), (64, 64, 125), (128, 64, 64)]
)
def test_large_images_are_validated_in_batches_of_the_training(size, batch_size, expected):
    assert validation_batch(cnn((size, size, 3), widths=(4,)), batch_size) == expected
    assert validation_batch(networks.build_head("head", 8, 5), batch_size) == 500


def test_a_trainer_is_its_network_on_indices_and_on_images():
    images, network = noise(10, 16, 16), cnn((16, 16, 3))
    trainer, index = mscnn.Trainer(network, images), np.array([7, 2, 7])
    expected = network(images[index])
    assert np.array_equal(trainer(index), expected)
    assert np.array_equal(trainer(images[index]), expected)
    np.testing.assert_allclose(trainer.predict(images[index], verbose=0), expected, rtol=1e-5, atol=1e-5)
    assert [id(one) for one in trainer.weights] == [id(one) for one in network.weights], "the images are no weights"


def test_a_trainer_gathers_from_a_variable():
    """On a GPU TensorFlow has a kernel for uint8 that gathers from variables, and none that gathers from tensors."""
    trainer = mscnn.Trainer(keras.Sequential([keras.layers.Identity()]), noise(10))
    graph = tf.function(trainer).get_concrete_function(tf.TensorSpec((None,), tf.int64)).graph
    kinds = {operation.type for operation in graph.get_operations()}
    assert "ResourceGather" in kinds and "GatherV2" not in kinds


def test_a_trainer_saves_its_network(tmp_path):
    network = cnn((16, 16, 3))
    trainer = mscnn.Trainer(network, noise(10, 16, 16))
    trainer.save(tmp_path / "whole.keras")
    trainer.save_weights(tmp_path / "only.weights.h5")
    loaded, other = keras.saving.load_model(tmp_path / "whole.keras"), cnn((16, 16, 3))
    other.load_weights(tmp_path / "only.weights.h5")
    for values in zip(network.get_weights(), loaded.get_weights(), other.get_weights(), strict=True):
        assert np.array_equal(values[0], values[1]) and np.array_equal(values[0], values[2])


def test_reset_ends_what_a_training_has_set():
    layer = RandomFlipCrop()
    layer.epoch.assign(3)
    layer.crop_fraction.assign(0.75)
    layer.reset()
    assert (int(layer.epoch), float(layer.crop_fraction)) == (RANDOM_FLIP, 1.0)


def test_augmentation_gathers_floats():
    graph = tf.function(RandomFlipCrop()).get_concrete_function(tf.TensorSpec((None, 8, 8, 3), tf.uint8), training=True)
    gathers = [one for one in graph.graph.get_operations() if one.type == "GatherV2"]
    assert [(one.get_attr("Tparams"), one.get_attr("Tindices")) for one in gathers] == [(tf.float32, tf.int64)] * 2


# ------------------------------------------------------------------------------------------------------------
# Whitening
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_whitening_decorrelates_neighbouring_pixels(channels):
    images = tiny_images(np.arange(200) % 5, seed=0)[..., :channels]
    mean, std = images.mean(axis=(0, 1, 2)), images.std(axis=(0, 1, 2))
    normal = ((images - mean) / std).astype(np.float32)
    layer = WhiteningConv()
    layer.build((None, 32, 32, channels))
    layer.kernel.assign(whitening_kernel(images, mean, std))
    out = layer(normal).numpy()
    assert out.shape == (200, 31, 31, 8 * channels)

    flat = out.reshape(-1, 8 * channels).astype(np.float64)
    half = flat[:, : 4 * channels]
    assert np.allclose(half.T @ half / len(half), np.eye(4 * channels), atol=0.02)
    assert np.allclose(flat[:, 4 * channels :], -half, atol=1e-4), "the other half are the negatives"
    neighbours = normal[:, :, :-1, 0].ravel(), normal[:, :, 1:, 0].ravel()
    assert np.corrcoef(*neighbours)[0, 1] > 0.3, "before they were correlated"


def test_whitening_stands_still_however_the_network_is_set():
    network = cnn()
    for flag in (False, True):
        network.trainable = flag
        layer = network.get_layer("whitening")
        assert not layer.trainable_weights
        assert [(one.name, one.shape) for one in layer.weights] == [("kernel", (2, 2, 3, 24))]


# ------------------------------------------------------------------------------------------------------------
# FusedBatchNormalization and BatchNormalization against Keras' own
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[FusedBatchNormalization, BatchNormalization])
def twins(request):
    """Our layer and Keras' own in the same state, and a batch."""
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (16, 6, 5, 4)).astype(np.float32)
    (gamma, beta, mean), variance = rng.normal(size=(3, 4)), rng.uniform(1, 2, 4)
    common, scaled = {"momentum": 0.8, "epsilon": 1e-2}, request.param is BatchNormalization
    ours, theirs = request.param(**common), keras.layers.BatchNormalization(**common, scale=scaled)
    for layer in (ours, theirs):
        layer.build(x.shape)
        layer.set_weights([*[gamma] * scaled, beta / offset_gain(layer), mean, variance])
    return ours, theirs, tf.constant(x)


def offset_gain(layer: keras.layers.Layer) -> float:
    """What the stored offset is multiplied by."""
    return getattr(layer, "OFFSET_GAIN", 1.0)


@pytest.mark.parametrize("training", [False, True])
def test_batch_normalization_equals_keras(twins, training):
    ours, theirs, x = twins
    assert np.allclose(ours(x, training=training), theirs(x, training=training), atol=2e-5)


def test_moving_statistics_equal_keras(twins):
    ours, theirs, x = twins
    count = 16 * 6 * 5
    before = theirs.moving_variance.numpy()
    for layer in (ours, theirs):
        layer(x, training=True)
    assert np.allclose(ours.moving_mean, theirs.moving_mean, atol=1e-5)
    # The fused operation divides by N - 1, Keras by N.
    of_batch = (theirs.moving_variance.numpy() - 0.8 * before) / 0.2
    assert np.allclose(ours.moving_variance, 0.8 * before + 0.2 * of_batch * count / (count - 1), rtol=1e-5)
    assert not np.allclose(ours.moving_variance, before, rtol=0.1), "they did move"


def test_inference_moves_no_statistics(twins):
    ours, _, x = twins
    before = [one.copy() for one in ours.get_weights()]
    ours(x, training=False)
    assert all(np.array_equal(*pair) for pair in zip(before, ours.get_weights(), strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_gradients_equal_keras(twins, training):
    ours, theirs, x = twins
    pull = tf.constant(np.random.default_rng(1).normal(size=x.shape).astype(np.float32))
    found = []
    for layer in (ours, theirs):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(pull * layer(x, training=training) ** 2)
        found.append(tape.gradient(loss, [x, *(weight.value for weight in layer.trainable_weights)]))
    (x_ours, *scale_ours, offset_ours), (x_theirs, *scale_theirs, offset_theirs) = found
    assert np.allclose(x_ours, x_theirs, atol=1e-3)
    assert np.allclose(scale_ours, scale_theirs, rtol=1e-3)
    # The offset is stored divided by the gain, so its gradient is multiplied by it.
    assert np.allclose(offset_ours, offset_theirs * offset_gain(ours), rtol=1e-3)


def test_a_frozen_layer_keeps_its_statistics_and_uses_them(twins):
    ours, _, x = twins
    before, outside_training = [one.copy() for one in ours.get_weights()], ours(x, training=False).numpy()
    ours.trainable = False
    assert np.array_equal(ours(x, training=True), outside_training)
    assert all(np.array_equal(*pair) for pair in zip(before, ours.get_weights(), strict=True))


@pytest.mark.parametrize("kind", [FusedBatchNormalization, BatchNormalization])
def test_statistics_stay_float32_where_the_rest_is_bfloat16(kind):
    layer = kind(dtype="mixed_bfloat16")
    out = layer(tf.random.normal((8, 4, 4, 3)), training=True)
    assert out.dtype == tf.bfloat16
    assert {one.dtype for one in layer.weights} == {"float32"}
    before = layer.moving_mean.numpy()
    layer(tf.ones((8, 4, 4, 3)) * 1e-3, training=True)  # a step too small for bfloat16
    assert not np.array_equal(layer.moving_mean, before)


# ------------------------------------------------------------------------------------------------------------
# Conv2D against Keras' own
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 3, 5, 7, 9])
@pytest.mark.parametrize("batch", [1, 8, 13])
def test_the_gradient_of_images_side_by_side_is_the_gradient(batch, width):
    random = np.random.default_rng(0)
    images = tf.constant(random.normal(size=(batch, 6, width, 3)), tf.float32)
    result = tf.constant(random.normal(size=(batch, 6, width, 4)), tf.float32)
    kernel = tf.zeros((3, 3, 3, 4))
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        out = tf.nn.conv2d(images, kernel, 1, "SAME")
    expected = tape.gradient(out, kernel, output_gradients=result)
    assert images_per_row(width) > 2
    np.testing.assert_allclose(mscnn.gradient_of_kernel(images, result), expected, rtol=1e-4, atol=1e-4)


def test_images_side_by_side_have_a_column_of_zeros_after_each():
    images = tf.reshape(tf.range(1.0, 13.0), (3, 2, 2, 1))
    rows = pack_rows(images, 2)[..., 0].numpy()  # (2, 2, 6)
    assert rows.tolist() == [
        [[1, 2, 0, 5, 6, 0], [3, 4, 0, 7, 8, 0]],
        [[9, 10, 0, 0, 0, 0], [11, 12, 0, 0, 0, 0]],
    ]


def convolutions(dtype, width=7, **settings):
    """Ours and Keras', of the same kernel."""
    settings = {"filters": 16, "kernel_size": 3, "padding": "same", "use_bias": False, "dtype": dtype, **settings}
    pair = mscnn.Conv2D(**settings), keras.layers.Conv2D(**settings)
    for layer in pair:
        layer.build((None, width, width, 8))
    pair[1].set_weights(pair[0].get_weights())
    return pair


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_a_convolution_and_its_gradients_are_those_of_keras(dtype):
    images = tf.constant(np.random.default_rng(1).normal(size=(10, 7, 7, 8)), tf.float32)
    found = []
    for layer in convolutions(dtype):
        with tf.GradientTape() as tape:
            tape.watch(images)
            out = layer(images)
            loss = tf.reduce_sum(tf.cast(out, tf.float32) ** 2)
        found.append((out, *tape.gradient(loss, (images, layer.kernel.value))))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(np.float32(ours) / scale, np.float32(theirs) / scale, atol=0.02)


@pytest.mark.parametrize(
    ("changed", "short"),
    [
        ({}, True), ({"dtype": "float32"}, False), ({"width": 15}, False), ({"kernel_size": 5}, False),
        ({"strides": 2}, False), ({"padding": "valid"}, False), ({"dilation_rate": 2}, False),
    ],
)  # fmt: skip
def test_only_short_rows_in_bfloat16_are_laid_side_by_side(changed, short):
    ours, theirs = convolutions(**{"dtype": "mixed_bfloat16", **changed})
    assert ours.short_rows is short
    images = tf.ones((4, *(2 * [changed.get("width", 7)]), 8))
    assert ours(images).shape == theirs(images).shape


def test_images_of_any_size_may_come():
    layer = mscnn.Conv2D(4, 3, padding="same", dtype="mixed_bfloat16")
    assert layer(keras.Input((None, None, 3))).shape == (None, None, None, 4)


def test_on_a_gpu_they_are_not(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind])
    assert not convolutions("mixed_bfloat16")[0].short_rows


# ------------------------------------------------------------------------------------------------------------
# build_cnn
# ------------------------------------------------------------------------------------------------------------


def cnn(shape=(32, 32, 3), categories=5, widths=(8, 12, 16), policy="float32", flip=True, name="network"):
    channels = shape[-1]
    return build_cnn(name, shape, categories, widths, [120.0] * channels, [60.0] * channels, flip, policy)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("shape", [(32, 32, 3), (32, 32, 1)])
def test_from_uint8_images_to_float32_logits(shape, policy):
    network = cnn(shape, policy=policy)
    assert (network.inputs[0].shape, network.inputs[0].dtype) == ((None, *shape), "uint8")
    for training in (False, True):
        logits = network(np.zeros((4, *shape), np.uint8), training=training)
        assert (logits.shape, logits.dtype) == ((4, 5), tf.float32)
    assert network.get_layer("block1").compute_dtype == ("bfloat16" if policy == "mixed_bfloat16" else "float32")


def test_a_block_a_width_and_a_map_large_enough_for_grad_cam():
    network = cnn(widths=(8, 12, 16))
    maps = [network.get_layer(f"block{i}").output.shape[1:] for i in (1, 2, 3)]
    assert [one[-1] for one in maps] == [8, 12, 16]
    assert max(min(one[:2]) for one in maps[1:]) >= 7
    convolutions = [layer for layer in network.layers if isinstance(layer, keras.layers.Conv2D)]
    assert [layer.filters for layer in convolutions] == [8, 8, 12, 12, 16, 16]


def test_the_end_is_global_average_pooling_and_one_dense_layer():
    network = cnn()
    layers = keras.layers
    end = [layers.GlobalAveragePooling2D, layers.Rescaling, layers.Dense]  # a constant factor does no harm to a CAM
    assert [type(layer) for layer in network.layers[-3:]] == end
    assert [network.layers[-3].name, network.layers[-1].name] == ["pooled", "logits"]
    assert network.layers[-2].offset == 0
    assert sum(isinstance(layer, keras.layers.Dense) for layer in network.layers) == 1
    assert network.layers[-1].activation is keras.activations.linear


def test_images_are_normalized_inside():
    images = noise(6, 32, 32)
    network = cnn(flip=False)
    inside = keras.Model(network.inputs[0], network.get_layer("normalization").output)(images, training=False)
    assert np.allclose(inside, (images.astype(np.float32) - 120) / 60, atol=1e-5)


def test_only_training_is_random():
    network, images = cnn(), noise(8, 32, 32)
    assert np.array_equal(network(images, training=False), network(images, training=False))
    assert not np.array_equal(network(images, training=True), network(images, training=True))


@pytest.mark.parametrize("flip", [False, True])
def test_flip_reaches_the_augmentation(flip):
    layer = next(layer for layer in cnn(flip=flip).layers if isinstance(layer, RandomFlipCrop))
    assert layer.flip is flip


def test_a_plain_keras_model_of_these_layers_is_saved_and_loaded(tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((12, 9, 3), dtype="uint8")
    x = RandomFlipCrop(flip=False, shift=1)(inputs)
    x = keras.layers.Rescaling(1 / 255, dtype="float32")(x)
    x = WhiteningConv(name="whitening")(x)
    x = mscnn.Conv2D(4, 3)(x)
    x = FusedBatchNormalization(momentum=0.5, epsilon=0.1)(x)
    model = keras.Model(inputs, x)
    images = noise(8)
    model.get_layer("whitening").kernel.assign(np.random.default_rng(0).normal(size=(2, 2, 3, 24)))
    model(images, training=True)  # moves the statistics
    model.save(tmp_path / "plain.keras")

    loaded = keras.saving.load_model(tmp_path / "plain.keras")
    assert np.array_equal(loaded(images, training=False), model(images, training=False))
    augmentation, normalization = loaded.layers[1], loaded.layers[-1]
    assert (augmentation.flip, augmentation.shift) == (False, 1)
    assert (normalization.momentum, normalization.epsilon) == (0.5, 0.1)
    assert np.array_equal(normalization.moving_mean, model.layers[-1].moving_mean)
    assert (normalization.moving_mean.numpy() != 0).all()
    assert not any(mirrored for *_, mirrored in variants_seen(augmentation, images))


# ------------------------------------------------------------------------------------------------------------
# fastest_policy
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slow", "expected"), [("float32", "mixed_bfloat16"), ("bfloat16", "float32")])
def test_the_probe_chooses_the_faster_one(monkeypatch, slow, expected):
    now, convolve = [0.0], tf.nn.conv2d

    def timed(images, *arguments, **options):
        now[0] += 2.0 if images.dtype.name == slow else 1.0
        return convolve(images, *arguments, **options)

    monkeypatch.setattr(tf.nn, "conv2d", timed)
    monkeypatch.setattr(networks.time, "perf_counter", lambda: now[0])
    assert mscnn.fastest_policy(repeats=2) == expected


def test_no_bfloat16_without_a_clear_gain(monkeypatch):
    monkeypatch.setattr(networks.time, "perf_counter", iter(np.arange(100.0)).__next__)  # both take one tick
    assert mscnn.fastest_policy(repeats=2) == "float32"


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), "mixed_bfloat16"), ((7, 5), "float32")])
def test_of_a_gpu_the_capability_decides(monkeypatch, capability, expected):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind])
    details = {"compute_capability": capability}
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda device: details)
    assert mscnn.fastest_policy() == expected


def test_a_device_without_bfloat16_gets_float32(monkeypatch):
    convolve = tf.nn.conv2d

    def without_bfloat16(images, *arguments, **options):
        if images.dtype == tf.bfloat16:
            raise tf.errors.UnimplementedError(None, None, "no kernel")
        return convolve(images, *arguments, **options)

    monkeypatch.setattr(tf.nn, "conv2d", without_bfloat16)
    assert mscnn.fastest_policy(repeats=1) == "float32"
