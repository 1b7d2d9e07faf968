"""The model that comes with the project, and how it is made."""

import functools
import json
import zipfile

import h5py
import numpy as np
import pretrained
import pytest
from conftest import ROOT, gross_strangers

import mscnn_helpers as mscnn
from mscnn_parts.model_files import check_matches
from mscnn_parts.settings import PRETRAINED
from mscnn_parts.sources import find_cifar10

FILE = ROOT / "notebooks" / PRETRAINED
TINY = {"stage1_widths": (8, 8), "stage2_widths": (8, 8)}
made = pytest.mark.skipif(not FILE.is_file(), reason="no pretrained model has been made yet")


def kernels(path) -> dict[str, np.ndarray]:
    """All arrays of a model file by their name in it."""
    arrays = {}
    with zipfile.ZipFile(path) as file, file.open("model.weights.h5") as weights, h5py.File(weights) as opened:
        opened.visititems(lambda name, item: arrays.update({name: item[()]} if isinstance(item, h5py.Dataset) else {}))
    return arrays


def test_a_halved_model_is_smaller_and_decides_the_same(trained_model_path, tiny_data, tmp_path):
    pretrained.halve(trained_model_path, tmp_path / "half.keras")
    assert (tmp_path / "half.keras").stat().st_size < 0.7 * trained_model_path.stat().st_size
    before, after = (mscnn.load_model(path) for path in (trained_model_path, tmp_path / "half.keras"))
    was, now = (model.decide(tiny_data.test.images) for model in (before, after))
    np.testing.assert_array_equal(was.stage1_category, now.stage1_category)
    np.testing.assert_allclose(was.confidence, now.confidence, atol=0.02)
    assert [w.dtype for w in after.stage1.get_weights()] == [w.dtype for w in before.stage1.get_weights()]


def test_only_kernels_of_convolutions_are_halved(trained_model_path, tmp_path):
    pretrained.halve(trained_model_path, tmp_path / "half.keras")
    was, now = kernels(trained_model_path), kernels(tmp_path / "half.keras")
    assert was.keys() == now.keys()
    halved = {name for name in now if now[name].dtype == np.float16}
    assert halved == {name for name in was if was[name].ndim == 4 and "whitening" not in name} != set()
    for name in was:
        if name in halved:
            np.testing.assert_allclose(now[name].astype(np.float32), was[name], rtol=2**-8, atol=1e-7)
        else:
            np.testing.assert_array_equal(now[name], was[name])


def test_rounding_keeps_the_decisions_and_certifies_what_is_in_the_file(
    trained_model_path, tiny_data, tmp_path, monkeypatch
):
    monkeypatch.setattr(pretrained, "RISK", 0.5)
    changed = pretrained.rounded(trained_model_path, tiny_data, tmp_path / "small.keras")
    model = mscnn.load_model(tmp_path / "small.keras")
    assert 0 <= changed < 0.05 and model.threshold == 0.7
    kept = model.certificate
    assert kept is not None and kept == model.certify(tiny_data.certification, 0.5), "of the rounded kernels"


def test_a_run_that_was_not_measured_makes_no_pretrained_model(tmp_path):
    (tmp_path / "metrics.json").write_text('{"parameters": {"epochs": 0, "batch_size": 0, "seed": 0}}')
    with pytest.raises(SystemExit, match=r"let quality\.py make the run"):
        pretrained.finished_run(tmp_path)


@pytest.mark.slow
def test_a_new_stage2_keeps_stage1_and_the_base_network(trained_model_path, tiny_data, monkeypatch):
    old = mscnn.load_model(trained_model_path)
    monkeypatch.setattr(mscnn, "load_model", lambda _: old)
    monkeypatch.setattr(mscnn, "load_dataset", lambda *_, **__: tiny_data)
    monkeypatch.setattr(mscnn.MultiStageCNN, "for_dataset", functools.partial(mscnn.MultiStageCNN.for_dataset, **TINY))
    told = {"seed": 0, "run": "python mscnn_helpers.py --epochs 1 --batch_size 0", "trained_at": "abc"}
    monkeypatch.setattr(pretrained, "committed", lambda: told)
    made = pretrained.pretrained_with_new_stage2().model
    kept, now = old.fingerprints(), made.fingerprints()
    assert [now[name] for name in ("stage1", "stage2_base")] == [kept[name] for name in ("stage1", "stage2_base")]
    assert made.stage2_branch == 1 and made.is_calibrated and now["stage2/cat"] != now["stage2/dog"]


@pytest.fixture(scope="module")
def model() -> mscnn.MultiStageCNN:
    return mscnn.load_model("pretrained")


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads(FILE.with_suffix(".json").read_text(encoding="utf-8"))


@made
def test_the_pretrained_model_is_what_its_card_says(model, record):
    assert FILE.stat().st_size <= pretrained.ALLOWED_BYTES
    assert (model.fingerprints(), model.threshold) == (record["fingerprints"], record["threshold"])
    assert model.is_calibrated
    assert (FILE.parent / "README.md").read_text(encoding="utf-8") == pretrained.card(record)


@made
def test_the_pretrained_model_notices_gross_strangers(model):
    for kind, images in gross_strangers(model.image_shape).items():
        assert set(model.decide(images, threshold=0).reasons()) == {mscnn.OUT_OF_DISTRIBUTION}, kind


@made
def test_the_pretrained_model_does_on_a_slice_what_its_card_says(model, record):
    if find_cifar10() is None:
        pytest.skip("CIFAR-10 is not at hand")
    cifar10 = mscnn.load_dataset("cifar10")
    check_matches(model, cifar10)
    images, labels = cifar10.test.images[:500], cifar10.test.labels[:500]
    decisions = model.decide(images)
    assert (decisions.ood_score > 0).mean() <= 0.05
    measured = mscnn.evaluate(decisions, labels, model.threshold)
    for got, said in (
        (measured["stage1"]["accuracy"], record["figures"]["accuracy of Stage 1, a single view"]),
        (measured["two_stage"]["coverage"], record["figures"]["coverage"]),
        (measured["two_stage"]["selective_accuracy"], record["figures"]["accuracy of the accepted"]),
    ):
        assert got == pytest.approx(said, abs=4 * np.sqrt(said * (1 - said) / 500))
