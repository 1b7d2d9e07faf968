"""The checks of notebook 09, and which finished model it works on."""

import dataclasses

import numpy as np
import pytest
from conftest import SMALL

import mscnn_helpers as mscnn
from mscnn_parts import exercises
from mscnn_parts.exercises import Target
from mscnn_parts.run_folder import Run
from mscnn_parts.settings import Settings


@pytest.mark.parametrize(
    ("value", "least", "most", "reached"),
    [(0.99, 0.99, None, True), (0.989, 0.99, None, False), (3, None, 3, True), (4, None, 3, False), (2, 3, 3, False),
     (0.5, None, None, True), (np.nan, 0, None, False), (np.nan, None, None, False)],
)  # fmt: skip
def test_a_target_is_reached_from_its_least_to_its_most(value, least, most, reached):
    assert Target("it", value, least, most).reached is reached


def test_a_target_says_what_was_asked_for():
    assert str(Target("accuracy", 0.9923, 0.99)) == "accuracy 99.2% (at least 99.0%)"
    assert str(Target("networks", 2, 3, 3, "d")) == "networks 2 (exactly 3)"
    assert str(Target("seconds", 1.25, form=".1f")) == "seconds 1.2"


def never(work):
    raise AssertionError("there is nothing to measure")


def targets(obstacle: str = "", networks: int = 3):
    counted = Target("networks", networks, 3, form="d")
    return lambda work: [Target("accuracy", work, 0.5, obstacle=obstacle), counted]


MISSED = "\n  accuracy 40.0% (at least 50.0%)  <-- missed\n  networks"


@pytest.mark.parametrize(
    ("work", "measure", "printed"),
    [
        (None, never, "Exercise 4: not done yet.\n"),
        (0.6, targets("No weights."),
         "Exercise 4: reached.\n  accuracy 60.0% (at least 50.0%)\n  networks 3 (at least 3)\n"),
        (0.4, targets(), f"Exercise 4: not yet.{MISSED} 3 (at least 3)\n"),
        (0.4, targets("No weights."), f"Exercise 4: out of reach here. No weights.{MISSED} 3 (at least 3)\n"),
        (0.4, targets("No weights.", 2), f"Exercise 4: not yet.{MISSED} 2 (at least 3)  <-- missed\n"),
    ],
)  # fmt: skip
def test_a_check_says_one_of_four_things(capsys, work, measure, printed):
    exercises.check(4, work, measure)
    assert capsys.readouterr().out == printed


def test_work_of_another_form_is_told_in_a_line(capsys):
    exercises.check(9, "many", lambda work: [Target("thresholds", work.shape[0], 3)])
    printed = capsys.readouterr().out
    assert (
        printed.startswith("Exercise 9: not yet. What you made has not the form") and "no attribute 'shape'" in printed
    )


@pytest.mark.parametrize(
    ("work", "key", "missing"),
    [({"float32": 1}, "mixed_float16", "'mixed_float16'"), ([1], 1, "list index out of range")],
)
def test_work_that_lacks_an_entry_is_told_in_a_line(capsys, work, key, missing):
    exercises.check(5, work, lambda work: [Target("seconds", work[key])])
    assert capsys.readouterr().out == f"Exercise 5: not yet. What you made lacks what your cell names: {missing}\n"


def test_work_that_is_an_array_is_no_riddle(capsys):
    exercises.check(9, np.zeros(3), lambda work: [Target("thresholds", len(work), 3, form="d")])
    assert "reached" in capsys.readouterr().out


@pytest.fixture
def run(tiny_path, tmp_path) -> Run:
    return Run("09_exercises", Settings(dataset=str(tiny_path), run_dir=str(tmp_path / "run"), seed=3))


def test_without_a_model_the_run_s_own_settings_count(run):
    model, data = exercises.finished_model(run)
    assert model is None and (data.name, data.seed) == ("tiny", 3)


def test_the_run_folder_s_model_comes_with_its_own_splits(run, trained_model, tiny_data):
    run.folder.mkdir()
    trained_model.save(run.model_path)  # of seed 0
    model, data = exercises.finished_model(run)
    assert data.fingerprint == tiny_data.fingerprint and model.fingerprints() == trained_model.fingerprints()


def test_images_are_mirrored_and_turned_as_for_the_model(run, tiny_data):
    run.folder.mkdir()
    own = dataclasses.replace(tiny_data, flip=False, quarter_turns=True)
    mscnn.MultiStageCNN.for_dataset(own, **SMALL).save(run.model_path)
    data = exercises.finished_model(run)[1]
    assert not data.flip and data.quarter_turns


def test_a_damaged_model_is_told(run):
    run.folder.mkdir()
    run.model_path.write_bytes(b"PK")
    with pytest.raises(mscnn.MSCNNError, match="is damaged or not a model of this project"):
        exercises.finished_model(run)


def test_a_model_of_other_data_is_left_alone(run, trained_model):
    run.folder.mkdir()
    trained_model.save(run.model_path)
    run.settings = dataclasses.replace(run.settings, dataset="digits")
    model, data = exercises.finished_model(run)
    assert model is None and (data.name, data.seed) == ("digits", 3)


def test_the_pretrained_model_is_tried_with_the_splits_that_it_was_trained_with(run, tiny_data, monkeypatch):
    asked = []
    monkeypatch.setattr(exercises, "load_dataset", lambda *arguments: asked.append(arguments) or tiny_data)
    run.settings = dataclasses.replace(run.settings, dataset="cifar10")
    assert exercises.finished_model(run) == (None, tiny_data), "those are not its images"
    assert asked == [("cifar10", False, 0, 32), ("cifar10", False, 3, 0, True, False)]


def test_images_that_changed_since_are_other_data(run, trained_model, tmp_path, tiny_path):
    with np.load(tiny_path) as file:
        arrays = dict(file)
    np.savez(tmp_path / "tiny.npz", **{**arrays, "x_train": arrays["x_train"] // 2})
    run.folder.mkdir()
    trained_model.save(run.model_path)
    run.settings = dataclasses.replace(run.settings, dataset=str(tmp_path / "tiny.npz"))
    model, data = exercises.finished_model(run)
    assert model is None and isinstance(data, mscnn.Dataset)
