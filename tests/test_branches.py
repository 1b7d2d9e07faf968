"""Stage 2 CNNs that share blocks of their base network."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
from conftest import SMALL

import mscnn_helpers as mscnn
from mscnn_helpers import MSCNNError, MultiStageCNN
from mscnn_parts import transfer
from mscnn_parts.networks import unnamed_branch
from mscnn_parts.settings import Settings

RECIPE = mscnn.Recipe(epochs=2, batch_size=32, stage2_base_epochs=1, stage2_fraction=0.3, views=2)


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def branched_path(request, tiny_data, trained_model_path, tmp_path_factory):
    """The file of a model whose Stage 2 CNNs share so many blocks; all else is that of the trained model."""
    whole = mscnn.load_model(trained_model_path)
    model = MultiStageCNN.for_dataset(tiny_data, **SMALL | {"stage2_branch": request.param})
    model.stage1.set_weights(whole.stage1.get_weights())
    model.stage2_base.set_weights(whole.stage2_base.get_weights())
    mscnn.fit_ood(model, tiny_data)
    mscnn.train_stage2(model, tiny_data, RECIPE)
    model.calibrate(tiny_data.calibration)
    path = tmp_path_factory.mktemp("branched") / "m.keras"
    model.save(path)
    return path


@pytest.fixture
def branched(branched_path) -> MultiStageCNN:
    return mscnn.load_model(branched_path)


def test_a_branch_behind_the_trunk_is_a_whole_cnn(branched, tiny_data):
    images = tiny_data.test.images[:20]
    got = branched(images)["stage2"].numpy()
    for c in (0, 3):
        whole = branched.verifier(c)
        assert len(whole.weights) == len(branched.stage2_base.weights)
        views = [mscnn.log_odds(whole(view).numpy(), np.full(20, c)) for view in (images, images[:, :, ::-1])]
        np.testing.assert_allclose(got[:, c], views[0], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(branched.stage2_log_odds(images, c), np.mean(views, axis=0), rtol=1e-3, atol=1e-3)


def test_more_sharing_leaves_each_fewer_weights(branched):
    own = [w.shape for w in branched.stage2_cnn(0).weights]
    assert own == [w.shape for w in branched.stage2_base.weights[-len(own) :]]
    assert len(own) == {1: 10, 2: 2}[branched.stage2_branch]


def test_many_images_are_decided_slab_by_slab(branched, tiny_data, monkeypatch):
    images = tiny_data.test.images[:40]
    at_once = branched.scores(images, batch_size=8)
    odds, lengths, plain = branched.stage2_log_odds(images, 1), [], type(branched._networks)._scores
    monkeypatch.setattr(type(branched._networks), "SLAB", 1)
    monkeypatch.setattr(
        type(branched._networks),
        "_scores",
        lambda self, part, size: lengths.append(len(part)) or plain(self, part, size),
    )
    by_slab = branched.scores(images, batch_size=8)
    assert lengths == [8] * 5
    np.testing.assert_allclose(branched.stage2_log_odds(images, 1, batch_size=8), odds, rtol=1e-3, atol=1e-3)
    for one, other in zip(at_once, by_slab, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_retraining_moves_a_branch_and_nothing_else(branched, tiny_data):
    images = tiny_data.test.images
    before, parts = branched.decide(images), branched.fingerprints()
    branched.certify(tiny_data.certification, risk=0.9, delta=0.5)
    mscnn.retrain_stage2(branched, tiny_data, "cat", RECIPE, keep_worse=True)
    assert branched.certificate is None
    assert {name for name, value in branched.fingerprints().items() if value != parts[name]} == {
        "stage2/cat", "calibration/cat"
    }  # fmt: skip
    after, elsewhere = branched.decide(images), before.stage1_category != 1
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one[elsewhere], other[elsewhere])
    assert (before.confidence != after.confidence)[~elsewhere].any()


def test_a_saved_model_decides_as_before(branched, tiny_data, tmp_path):
    branched.save(tmp_path / "again.keras")
    again = mscnn.load_model(tmp_path / "again.keras")
    assert again.stage2_branch == branched.stage2_branch
    assert again.fingerprints() == branched.fingerprints()
    for one, other in zip(*(m.decide(tiny_data.test.images) for m in (branched, again)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_training_the_base_voids_what_rests_on_it(branched, tiny_data):
    """A frozen category would see other features: it has to be freed first."""
    branched.certify(tiny_data.certification, risk=0.9, delta=0.5)
    before = branched.fingerprints()
    branched.set_stage2_category_trainable("ship", False)
    with pytest.raises(MSCNNError, match="free them all first"):
        mscnn.train_stage2_base(branched, tiny_data, RECIPE)
    assert branched.fingerprints() == before and branched.certificate is not None
    branched.set_stage2_category_trainable()
    mscnn.train_stage2_base(branched, tiny_data, dataclasses.replace(RECIPE, epochs=1))
    assert np.isnan(branched.calibration_coefficients.numpy()).all() and branched.certificate is None
    after = branched.fingerprints()
    assert after["stage2_trunk"] != before["stage2_trunk"]
    assert after["stage2/dog"] == after["stage2/cat"] != before["stage2/dog"]


def test_branches_are_trained_on_all_views_of_the_train_images(branched, tiny_data):
    features, count = transfer.features_of(branched, tiny_data, RECIPE.views), len(tiny_data.train)
    first, second = np.asarray(features.train[:count]), np.asarray(features.train[count:])
    assert not np.allclose(first, second, atol=1e-2), "the views are not augmented"
    trainer = mscnn.Stage2Trainer(branched, tiny_data, RECIPE)
    order = trainer._order(1, np.random.default_rng(0))
    assert count <= order.max() < RECIPE.views * count and order.min() < count
    for wrong in (0, 2.5):
        with pytest.raises(MSCNNError, match="batch_size is"):
            branched.decide(tiny_data.test.images[:3], batch_size=wrong)
    assert branched.stage2_log_odds(tiny_data.test.images[:0], 1).shape == (0,)


def test_freezing_categories_never_frees_the_trunk(branched, tiny_data):
    branched.train_only("cat")
    branched.set_stage2_category_trainable("", True)
    assert not branched.stage2_base.trainable
    branched.stage2_base.trainable = True
    before = branched.fingerprints()["stage2_trunk"]
    branched(tiny_data.train.images[:32], training=True)
    assert branched.fingerprints()["stage2_trunk"] == before, "BatchNormalization of the trunk has moved"


def test_decisions_are_explained(branched, tiny_data):
    with pytest.raises(MSCNNError, match=r"category_0 sees features \(B, .*explain model.verifier\(category\)"):
        mscnn.grad_cam(branched.stage2_cnn(0), tiny_data.test.images[:1], lambda logits: logits[:, 0])
    one_block = MultiStageCNN.for_dataset(tiny_data, **SMALL | {"stage2_widths": (4,)})
    assert mscnn.grad_cam(one_block.verifier(0), tiny_data.test.images[:1], lambda logits: logits[:, 0]).shape[0] == 1
    trace = mscnn.trace_decisions(branched, tiny_data.test.images[:1])[0]
    assert trace.stage2_map.ndim == 2


def test_what_is_not_a_number_of_blocks_is_refused(tiny_data, branched):
    with pytest.raises(MSCNNError, match="stage2_branch is 3: the Stage 2 CNNs have 2 blocks"):
        MultiStageCNN.for_dataset(tiny_data, **SMALL | {"stage2_branch": 3})
    with pytest.raises(MSCNNError, match="stage2_branch is -2"):
        Settings(stage2_branch=-2)
    with pytest.raises(MSCNNError, match="stage2_branch cannot be changed"):
        branched.stage2_branch = 0


def test_all_blocks_but_the_last_are_shared_by_default(tiny_data):
    assert MultiStageCNN.for_dataset(tiny_data, **SMALL | {"stage2_branch": -1}).stage2_branch == 1
    assert MultiStageCNN.for_dataset(tiny_data, "float32").stage2_branch == 2
    assert MultiStageCNN.for_dataset(tiny_data, "float32", network="classic").stage2_branch == 1


def test_a_file_that_does_not_say_has_whole_cnns(trained_model):
    config = trained_model.get_config()
    del config["stage2_branch"]
    assert MultiStageCNN.from_config(config).trunk is None
    branches = {"classic": 0, "resnet50": -1}
    assert {network: unnamed_branch(network) for network in branches} == branches
    assert unnamed_branch({"class_name": "Own"}) == 0


def test_the_features_are_freed_after_the_training(branched, tiny_data):
    array = weakref.ref(transfer.features_of(branched, tiny_data, RECIPE.views).train.array)
    mscnn.retrain_stage2(branched, tiny_data, "cat", RECIPE)
    gc.collect()
    assert array() is None


def test_features_beyond_the_budget_are_kept_on_disk(branched_path, tiny_data, monkeypatch):
    fingerprints = []
    for budget in (1e9, 1e3):
        monkeypatch.setattr(transfer, "IN_MEMORY", budget)
        model = mscnn.load_model(branched_path)
        mscnn.retrain_stage2(model, tiny_data, "cat", RECIPE, keep_worse=True)
        features = transfer.features_of(model, tiny_data, RECIPE.views).train
        assert features.on_disk == (budget < 1e9)
        again = transfer.features_of(model, tiny_data, RECIPE.views).train
        assert again.array is features.array, "they are computed once"
        fingerprints.append(model.fingerprints())
    assert fingerprints[0] == fingerprints[1]
