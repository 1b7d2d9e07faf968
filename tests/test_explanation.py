"""Class Activation Maps and decision traces."""

import numpy as np
import pytest

import mscnn_helpers as mscnn
from mscnn_helpers import MultiStageCNN, class_activation_map, grad_cam
from mscnn_parts.layers import log_odds_tensor

CATEGORY = 3


@pytest.fixture(scope="module")
def model(trained_model_path) -> MultiStageCNN:
    """The trained model, shared: only for tests that change nothing."""
    return mscnn.load_model(trained_model_path)


@pytest.fixture(scope="module")
def images(tiny_data) -> np.ndarray:
    return tiny_data.test.images[:6]


def logit(category: int):
    return lambda logits: logits[:, category]


def networks(model: MultiStageCNN):
    return model.stage1, model.stage2_cnn(CATEGORY)


def test_cam_adds_up_to_the_logit(model, images):
    """Its mean plus the dense layer's bias is the category's logit: nothing is left out."""
    for network in networks(model):
        for category in range(5):
            maps = class_activation_map(network, images, category)
            bias = network.get_layer("logits").bias.numpy()[category]
            expected = network(images, training=False).numpy()[:, category]
            np.testing.assert_allclose(maps.mean(axis=(1, 2)) + bias, expected, rtol=1e-3, atol=1e-3)


def test_grad_cam_of_the_last_block_is_the_rectified_cam(model, images):
    """Up to the scale: the gradient of a mean is one over the number of places."""
    for network in networks(model):
        signs = set()
        for category in range(5):
            cam = class_activation_map(network, images, category)
            got = grad_cam(network, images, logit(category), layer="block2")
            assert got.shape == cam.shape
            np.testing.assert_allclose(got * cam[0].size, np.maximum(cam, 0), rtol=1e-3, atol=1e-4)
            signs |= set(np.sign(cam).ravel())
        assert signs >= {-1, 1}  # or the rectifying was not tested


def test_grad_cam_of_an_earlier_block_by_finite_differences(model, images):
    """The weight of a feature map is the mean slope of the logit along it, worked out without gradients."""
    network, one = model.stage1, images[:1]
    features = network.get_layer("block1").output
    head = mscnn.keras.Model(features, network.outputs[0])
    maps = mscnn.keras.Model(network.inputs[0], features)(one, training=False).numpy()[0]  # (h, w, K)
    step = 1e-2
    moved = np.stack([maps + sign * step * np.eye(maps.shape[-1])[k] for sign in (1, -1) for k in range(8)])
    up, down = head(moved.astype(np.float32), training=False).numpy()[:, CATEGORY].reshape(2, 8)
    weights = (up - down) / (2 * step) / maps[..., 0].size  # (K,)
    got = grad_cam(network, one, logit(CATEGORY), layer="block1")[0]
    expected = np.maximum(maps @ weights, 0)
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.98  # the ReLUs between bend a little
    assert got.sum() == pytest.approx(expected.sum(), rel=0.2)


def test_each_image_has_its_own_map(model, images):
    """A map does not depend on the other images of the batch."""
    together = grad_cam(model.stage1, images, logit(CATEGORY))
    alone = np.concatenate([grad_cam(model.stage1, images[i : i + 1], logit(CATEGORY)) for i in range(len(images))])
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-5)
    assert len({one.tobytes() for one in alone}) == len(images)


def test_another_target_gives_another_map(model, images):
    one, two = (grad_cam(model.stage1, images, logit(c)) for c in (0, 1))
    assert np.abs(one - two).max() > 1e-3
    np.testing.assert_array_equal(grad_cam(model.stage1, images, lambda z: 0 * z[:, 0]), 0)


def test_random_weights_change_the_map(trained_model, images):
    """Adebayo et al. 2018: a map that survives this shows the picture and not the network."""
    network, rng = trained_model.stage1, np.random.default_rng(0)

    def maps() -> np.ndarray:
        """Of every image for every category, one a row; those that are empty are left out by the cosine."""
        return np.concatenate([grad_cam(network, images, logit(c)) for c in range(5)]).reshape(5 * len(images), -1)

    before = maps()
    for layer in network.layers:
        if isinstance(layer, mscnn.keras.layers.Conv2D) or layer.name == "logits":
            layer.set_weights([w.std() * rng.normal(size=w.shape) for w in layer.get_weights()])
    after = maps()
    both = before.any(axis=1) & after.any(axis=1)
    assert both.any()
    norms = np.linalg.norm(before[both], axis=1) * np.linalg.norm(after[both], axis=1)
    assert ((before * after)[both].sum(axis=1) / norms).mean() < 0.9  # 1: nothing has changed


def test_maps_have_at_least_seven_by_seven_places(model, images):
    for network in networks(model):
        maps = grad_cam(network, images, logit(CATEGORY))
        assert min(maps.shape[1:]) >= 7 and len(maps) == len(images)
        assert (maps >= 0).all() and maps.dtype == np.float32


def test_frozen_networks_are_explained_alike(trained_model, images):
    before = [grad_cam(network, images, logit(CATEGORY)) for network in networks(trained_model)]
    trained_model.set_stage1_trainable(False)
    trained_model.set_stage2_category_trainable("", False)
    for network, expected in zip(networks(trained_model), before, strict=True):
        assert expected.any()
        np.testing.assert_array_equal(grad_cam(network, images, logit(CATEGORY)), expected)


def test_explaining_changes_no_array(model, images):
    before = model.fingerprints()
    mscnn.trace_decisions(model, images[:2])
    assert model.fingerprints() == before


def test_cam_finds_what_makes_the_category(model):
    """A red square is a truck wherever it lies: the map is warmer there than elsewhere."""
    background = np.random.default_rng(1).normal(128, 30, (2, 32, 32, 3))
    background[0, 1:17, 1:17] += np.array([225, 60, 60]) - 128
    background[1, 15:31, 15:31] += np.array([225, 60, 60]) - 128
    squares = np.clip(background, 0, 255).astype(np.uint8)
    first, second = class_activation_map(model.stage1, squares, 3)  # (3, 3): top left and bottom right differ
    assert first[0, 0] > first[-1, -1] + 0.2 and second[-1, -1] > second[0, 0] + 0.2


def test_mixed_precision_gives_maps_too(tiny_data, images):
    mscnn.keras.utils.set_random_seed(0)
    small = {"stage1_widths": (8, 8), "stage2_widths": (8, 8)}
    network = MultiStageCNN.for_dataset(tiny_data, policy="mixed_bfloat16", **small).stage1
    cam, got = class_activation_map(network, images, 0), grad_cam(network, images, logit(0), layer="block2")
    assert cam.dtype == got.dtype == np.float32
    np.testing.assert_allclose(got * cam[0].size, np.maximum(cam, 0), rtol=0.05, atol=0.02)


# ------------------------------------------------------------------------------------------------------------
# Decision traces
# ------------------------------------------------------------------------------------------------------------


def test_traces_say_what_decide_says(model, tiny_data):
    images, labels = tiny_data.test.take(np.arange(6))
    threshold = 0.9
    decisions, names = model.decide(images, threshold), [*tiny_data.category_names, mscnn.OTHER]
    traces = mscnn.trace_decisions(model, images, labels, threshold)
    assert len(traces) == len(images)
    probability = mscnn.tf.nn.softmax(decisions.stage1_logits).numpy()
    for i, trace in enumerate(traces):
        np.testing.assert_array_equal(trace.image, images[i])
        assert trace.truth == names[labels[i]]
        assert (trace.verdict, trace.reason) == (names[decisions.category[i]], decisions.reasons()[i])
        assert trace.confidence == decisions.confidence[i]
        assert trace.stage2_confidence == decisions.stage2_confidence[i]
        assert [name for name, _ in trace.top3] == [names[c] for c in np.argsort(-probability[i])[:3]]
        assert trace.top3[0][0] == names[decisions.stage1_category[i]]
        assert [p for _, p in trace.top3] == pytest.approx(sorted(probability[i])[:-4:-1])


def test_the_maps_of_a_trace_explain_the_predicted_category(model, images):
    """Stage 1's logit of it, and Stage 2's log-odds of it, each in its own network."""
    decisions = model.decide(images)
    for i, trace in enumerate(mscnn.trace_decisions(model, images)):
        c, one = decisions.stage1_category[i], images[i : i + 1]
        np.testing.assert_allclose(trace.stage1_map, grad_cam(model.stage1, one, logit(c))[0], 1e-3, 1e-7)
        odds = grad_cam(model.stage2_cnn(c), one, lambda z, c=c: log_odds_tensor(z, c))[0]
        np.testing.assert_allclose(trace.stage2_map, odds, 1e-3, 1e-7)
        assert min(trace.stage1_map.shape + trace.stage2_map.shape) >= 7


def test_traces_without_truth_and_without_images(model, images):
    assert [trace.truth for trace in mscnn.trace_decisions(model, images[:2])] == ["", ""]
    assert {trace.verdict for trace in mscnn.trace_decisions(model, images, threshold=1)} == {mscnn.OTHER}
    assert mscnn.trace_decisions(model, images[:0]) == []


def test_what_cannot_be_explained_is_refused(model, tiny_data):
    network, images = model.stage1, tiny_data.test.images[:2]
    for incorrect, message in (
        (
            lambda: class_activation_map(network, images / 255, 1),
            r"Images are float64 .*stage1 takes uint8 \(B, 32, 32, 3\)",
        ),
        (lambda: grad_cam(network, images[0], lambda z: z[:, 1]), r"Images are uint8 \(32, 32, 3\)"),
        (lambda: grad_cam(network, images, lambda z: z[:, 1], "blok2"), r"no layer 'blok2'\. Did you mean block2\?"),
        (lambda: mscnn.trace_decisions(model, images, np.array([1])), r"decisions is \(2,\) and labels \(1,\)"),
    ):
        with pytest.raises(mscnn.MSCNNError, match=message):
            incorrect()


@pytest.mark.parametrize("category", [-1, 5, 1.0])
def test_a_map_of_no_category_is_refused(model, tiny_data, category):
    with pytest.raises(mscnn.MSCNNError, match=r"Categories are .*: use integers from 0 to 4"):
        mscnn.class_activation_map(model.stage1, tiny_data.test.images[:2], category)
