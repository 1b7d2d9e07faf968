"""Choices of categories, parameters, the run folder."""

import dataclasses
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tensorflow as tf
import yaml
from conftest import patch_rooms
from papermill.cli import _resolve_type
from PIL import Image

import mscnn_helpers as mscnn
from mscnn_helpers import MSCNNError, Run, categories_from
from mscnn_parts.downloads import data_folder
from mscnn_parts.files import project_root, write_atomically
from mscnn_parts.run_folder import INDEPENDENT_NOTEBOOKS, open_run, settled
from mscnn_parts.runs import validate_run
from mscnn_parts.settings import FALLBACK_NOTICE, Settings
from mscnn_parts.sources import CIFAR10_NAMES, FASHION_NAMES

CIFAR10 = CIFAR10_NAMES
EVERYTHING = tuple(range(10))

# ------------------------------------------------------------------------------------------------------------
# categories_from
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("ship,truck", (8, 9)),
        ("8,9", (8, 9)),
        ("ship,9", (8, 9)),
        ("ship,2", (2, 8)),
        ("truck, ship", (8, 9)),
        ("SHIP", (8,)),
        ("ship,ship,8", (8,)),
        ("[8, 9]", (8, 9)),
        ("(8, 9)", (8, 9)),
        ("['ship', \"truck\"]", (8, 9)),
        ("ship,", (8,)),
        (8, (8,)),
        (np.int64(8), (8,)),
        (["ship", 9], (8, 9)),
        ((9, 8, 9), (8, 9)),
        (np.array([8, 9]), (8, 9)),
        ({"cat"}, (3,)),
        ("0", (0,)),
        (0, (0,)),
        ("", EVERYTHING),
        ("  ", EVERYTHING),
        ([], ()),
    ],
)
def test_choice_of_categories(chosen, expected):
    assert categories_from(chosen, CIFAR10) == expected


@pytest.mark.parametrize("nothing", [",", "[]", "''"])
def test_a_text_without_a_category_is_not_all(nothing):
    with pytest.raises(MSCNNError, match=r"No category in .*: name some of airplane, .* leave it empty for all"):
        categories_from(nothing, CIFAR10)


def test_a_name_that_is_a_number_wins_over_an_index():
    assert categories_from("7,3", ("3", "5", "7")) == (0, 2)


def test_a_misspelt_category_gets_a_proposal_and_the_list():
    with pytest.raises(MSCNNError, match=r"Unknown category 'shipp'\. Did you mean ship\?") as error:
        categories_from("cat,shipp", CIFAR10)
    assert ", ".join(CIFAR10) in str(error.value)


def test_a_proposal_keeps_the_capitals_of_the_name():
    with pytest.raises(MSCNNError, match=r"Did you mean T-shirt\?"):
        categories_from("t-shrt", FASHION_NAMES)


def test_no_proposal_where_nothing_is_alike():
    with pytest.raises(MSCNNError, match="Unknown category 'qqq'") as error:
        categories_from("qqq", CIFAR10)
    assert "mean" not in str(error.value)


@pytest.mark.parametrize("index", ["10", "-1", 10, -1, [8, 10], "ship,10"])
def test_an_index_out_of_range(index):
    with pytest.raises(MSCNNError, match=r"Category index (10|-1) is out of range: use 0 to 9\."):
        categories_from(index, CIFAR10)


@pytest.mark.parametrize("nonsense", ["--5", "²", "1.5", "8-9"])
def test_what_only_looks_like_an_index(nonsense):
    with pytest.raises(MSCNNError, match="Unknown category"):
        categories_from(nonsense, CIFAR10)


AWKWARD = (
    "a,b",
    "[x]",
    "'q'",
    '"d"',
    " a ",
    "a",
    "A",
    "b",
    "01",
    "1",
    "1.0",
    "None",
    "it's",
    "a\\b",
    "[1, 2]",
    "b]",
    "0x10",
)


@pytest.mark.parametrize("name", AWKWARD)
def test_every_name_can_be_chosen(name):
    own, two = AWKWARD.index(name), {AWKWARD.index(name), AWKWARD.index("b")}
    for given in (name, [name], np.array([name]), json.dumps([name]), json.dumps(name)):
        assert categories_from(given, AWKWARD) == (own,), given
        assert categories_from(Settings(stage2_categories=given).stage2_categories, AWKWARD) == (own,), given
    for given in ([name, "b"], json.dumps([name, "b"]), f"b, {json.dumps(name)}"):
        assert categories_from(given, AWKWARD) == tuple(sorted(two)), given


@pytest.mark.parametrize(
    "names",
    [("01", "02", "03"), ("1", "01"), ("000", "001", "010", "008"), ("1.0", "2.0"), ("None", "True"), ("1_0", "x")],
)
def test_no_category_but_the_one_that_papermill_or_yaml_was_told(names):
    for category, name in enumerate(names):
        for turned in (_resolve_type(name), yaml.safe_load(name)):
            try:
                assert categories_from(Settings(stage2_categories=turned).stage2_categories, names) == (category,)
                assert categories_from(turned, names) == (category,)
            except MSCNNError as refusal:
                assert "quotes" in str(refusal)


@pytest.mark.parametrize("chosen", [1, "1", [1], "[1]", np.array(1)])
def test_a_number_that_could_be_an_index_or_a_name_is_refused(chosen):
    with pytest.raises(
        MSCNNError, match="Category 1 could be '01' or '02': give the name in quotes, as in '\\[\"01\"\\]'"
    ):
        categories_from(chosen, ("01", "02", "03"))
    assert categories_from(chosen, ("0", "1", "2")) == (1,)
    assert categories_from(chosen, ("2", "0", "1")) == (2,), "the name with these digits"
    assert categories_from(chosen, ("x", "01")) == (1,), "both are the same"


def test_capitals_decide_between_names_that_differ_in_nothing_else():
    assert categories_from("Cat", ("cat", "Cat")) == (1,)
    with pytest.raises(MSCNNError, match="Category CAT could be 'cat' or 'Cat'"):
        categories_from("CAT", ("cat", "Cat"))


@pytest.mark.parametrize(
    "chosen",
    [
        None,
        True,
        3.0,
        float("nan"),
        np.True_,
        b"cat",
        {"cat": 0},
        object(),
        [None],
        [[1]],
        np.ones(3, bool),
        tf.constant(3),
    ],
)
def test_what_is_no_name_and_no_index(chosen):
    for choose in (lambda: categories_from(chosen, CIFAR10), lambda: Settings(stage2_categories=chosen)):
        with pytest.raises(MSCNNError, match=r"is no category: give names or indices, such as ship,truck or 8,9\."):
            choose()


@pytest.mark.parametrize(
    "chosen", [np.array(3), (name for name in ["cat"]), range(3, 4), '"cat"', "cat'", "[cat", "{cat}"]
)
def test_more_ways_to_say_cat(chosen):
    assert categories_from(chosen, CIFAR10) == (3,)


@pytest.mark.parametrize("text", ["9" * 5000, "-", "0_1", "ship;truck", "[[ship], ²]"])
def test_a_text_that_names_nothing(text):
    with pytest.raises(MSCNNError, match="Unknown category"):
        categories_from(text, CIFAR10)


# ------------------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------------------


def test_documented_defaults():
    assert dataclasses.asdict(Settings()) == {
        "epochs": 50,
        "batch_size": 32,
        "stage2_only": False,
        "stage2_categories": "",
        "threshold": 0.7,
        "target_risk": 0.0,
        "target_coverage": 0.0,
        "light_mode": False,
        "load_model": "",
        "save_model": "multistage_cnn_model",
        "dataset": "auto",
        "stage1": "compact",
        "image_size": 0,
        "mirror": True,
        "quarter_turns": False,
        "stage2_branch": -1,
        "seed": 0,
        "run_dir": "runs/latest",
    }


@pytest.mark.parametrize("name", ["stage1", "stage1.keras"])
def test_the_finished_model_cannot_take_the_place_of_notebook_02s(name):
    with pytest.raises(MSCNNError, match="choose another name"):
        Settings(save_model=name)


def test_a_seed_too_large():
    assert Settings(seed=2**31 - 1).seed == 2**31 - 1
    with pytest.raises(MSCNNError, match="seed is 2147483648: it has to be below 2147483648"):
        Settings(seed=2**31)


def test_every_parameter_is_explained():
    assert all(one.metadata["help"] for one in dataclasses.fields(Settings))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", -1, "epochs is -1: it has to be 0 or more."),
        ("batch_size", -32, "batch_size is -32: it has to be 0 or more."),
        ("seed", -1, "seed is -1: it has to be 0 or more."),
        ("threshold", 1.5, "threshold is 1.5: it is a confidence, so use 0 to 1 (default 0.7)."),
        ("threshold", -0.1, "threshold is -0.1: it is a confidence, so use 0 to 1 (default 0.7)."),
        ("threshold", 70, "threshold is 70: it is a confidence, so use 0 to 1 (default 0.7)."),
        ("threshold", float("nan"), "threshold is nan"),
        ("target_risk", -0.01, "target_risk is -0.01: it is a share from 0 to below 1; 0 turns it off."),
        ("target_risk", 1, "target_risk is 1: it is a share from 0 to below 1; 0 turns it off."),
        ("target_coverage", 90, "target_coverage is 90: it is a share from 0 to below 1; 0 turns it off."),
        ("target_coverage", float("nan"), "target_coverage is nan"),
        ("target_risk", "0.01", "target_risk is '0.01': it has to be of type float."),
        ("save_model", " ", "save_model is empty"),
        ("epochs", 2.5, "epochs is 2.5: it has to be of type int."),
        ("epochs", "5", "epochs is '5': it has to be of type int."),
        ("epochs", True, "epochs is True: it has to be of type int."),
        ("light_mode", 1, "light_mode is 1: it has to be of type bool."),
        ("light_mode", "False", "light_mode is 'False': it has to be of type bool."),
        ("threshold", True, "threshold is True: it has to be of type float."),
        ("threshold", "0.7", "threshold is '0.7': it has to be of type float."),
        ("load_model", None, "load_model is None: it has to be of type str."),
    ],
)
def test_a_wrong_parameter_is_named(name, value, message):
    with pytest.raises(MSCNNError, match=re.escape(message)):
        Settings(**{name: value})


def test_a_size_that_a_network_cannot_work_at():
    with pytest.raises(MSCNNError, match=r"image_size is 31: densenet121 needs 32 pixels or more\."):
        Settings(stage1="densenet121", image_size=31)
    assert Settings(stage1="densenet121", image_size=32) and Settings(stage1="resnet50", image_size=16)


def test_two_targets_for_one_threshold():
    with pytest.raises(MSCNNError, match="target_risk and target_coverage would each set the threshold: give one"):
        Settings(target_risk=0.01, target_coverage=0.9)


def test_the_limits_themselves_are_allowed():
    for threshold in (0.0, 1.0, 0, 1):
        value = Settings(threshold=threshold, epochs=0, batch_size=0, seed=0).threshold
        assert (value, type(value)) == (threshold, float)


@pytest.mark.parametrize("given", [8, [8, 9], (8, 9), "[8, 9]"])
def test_categories_may_come_as_numbers_from_papermill(given):
    settings = Settings(stage2_categories=given)
    assert type(settings.stage2_categories) is str
    assert categories_from(settings.stage2_categories, CIFAR10) == categories_from(given, CIFAR10)


@pytest.mark.parametrize(
    ("stage2_only", "categories", "expected"),
    [
        (False, "", "both stages are trainable"),
        (False, "ship", "both stages are trainable"),
        (True, "", "Stage 1 frozen"),
        (True, "8,9", "Stage 1 frozen, categories ship, truck only"),
    ],
)
def test_a_run_says_its_mode(stage2_only, categories, expected):
    assert Settings(stage2_only=stage2_only, stage2_categories=categories).mode(CIFAR10) == expected


def test_mode_refuses_an_unknown_category_even_where_it_would_not_show():
    with pytest.raises(MSCNNError, match="Did you mean ship"):
        Settings(stage2_categories="shipp").mode(CIFAR10)


# ------------------------------------------------------------------------------------------------------------
# Files that are whole or not there
# ------------------------------------------------------------------------------------------------------------


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a bug"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def half(partial):
        partial.write_text("half")
        raise error

    with pytest.raises(MSCNNError if isinstance(error, OSError) else type(error)) as caught:
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["file"]
    if isinstance(error, OSError):
        assert str(caught.value) == f"Cannot write {path}: No space left on device. Choose another place."


def test_a_file_is_replaced_in_one_go(tmp_path):
    path = tmp_path / "new" / "file"
    write_atomically(path, lambda partial: partial.write_text("one"))

    def look_at_the_old_one(partial):
        partial.write_text("two")
        assert path.read_text() == "one"

    write_atomically(path, look_at_the_old_one)
    assert path.read_text() == "two"
    assert names_in(path.parent) == ["file"]


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(MSCNNError, match=r"Cannot write .*taken/model\.keras: .*Choose another place"):
        write_atomically(tmp_path / "taken" / "model.keras", lambda path: path.write_text("x"))


# ------------------------------------------------------------------------------------------------------------
# Run
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run" / "figures").mkdir(parents=True)
    return Run("02_stage1_training", Settings(run_dir=str(tmp_path / "run")))


def test_what_is_written_is_read_and_the_rest_is_kept(run):
    assert run.read("metrics") == {}
    run.write("metrics", a=1, b={"c": 2})
    run.write("metrics", b=3)
    assert run.read("metrics") == {"a": 1, "b": 3}
    assert Run("03", run.settings).read("metrics") == {"a": 1, "b": 3}
    assert names_in(run.folder) == ["figures", "metrics.json"]


def test_numbers_of_numpy_and_what_json_lacks(run):
    run.write(
        "metrics",
        nan=float("nan"),
        infinite=np.float64("-inf"),
        whole=np.int64(3),
        part=np.float32(0.5),
        flag=np.bool_(True),
        plain=True,
        array=np.array([[1.0, np.nan]]),
        nested={1: (np.float64(0.25), "text", None)},
    )

    def no_nan(text):
        raise AssertionError(f"{text} is not JSON")

    read = json.loads((run.folder / "metrics.json").read_text("utf-8"), parse_constant=no_nan)
    assert read == {
        "nan": None,
        "infinite": None,
        "whole": 3,
        "part": 0.5,
        "flag": True,
        "plain": True,
        "array": [[1.0, None]],
        "nested": {"1": [0.25, "text", None]},
    }


def test_names_are_written_readably(run):
    run.write("metrics", category="猫")
    assert "猫" in (run.folder / "metrics.json").read_text("utf-8")


def test_a_damaged_record_is_named(run):
    (run.folder / "metrics.json").write_text('{"a": ')
    with pytest.raises(MSCNNError, match=r"metrics\.json is damaged .*delete it and run from notebook 01"):
        run.read("metrics")


def test_require_names_the_notebook_that_is_missing(run):
    run.write("history", stage1={"loss": [1.0]})
    assert run.require("history", "stage1", "02_stage1_training") == {"loss": [1.0]}
    with pytest.raises(MSCNNError, match="holds no 'stage2' yet: run notebook 03_stage2_training first"):
        run.require("history", "stage2", "03_stage2_training")


@pytest.mark.parametrize("inside", ["", "inner/deeper"])
def test_a_run_folder_that_cannot_be_written(tmp_path, inside):
    (tmp_path / "file").write_text("not a folder")
    where = tmp_path / "file" / inside
    with pytest.raises(MSCNNError, match=r"Cannot write into the run folder .*file.*: .*Choose another run_dir"):
        validate_run(Run("01", Settings(dataset="digits", run_dir=str(where))))
    assert (tmp_path / "file").read_text() == "not a folder"


def test_relative_folders_start_at_the_module(monkeypatch, tmp_path):
    patch_rooms(monkeypatch, "project_root", lambda: tmp_path)
    assert Run("01", Settings()).folder == tmp_path / "runs" / "latest"


@pytest.mark.parametrize("name", ["mine", "mine.keras"])
def test_where_the_model_goes(run, tmp_path, name):
    settings = dataclasses.replace(run.settings, save_model=name)
    assert Run("03", settings).model_path == run.folder / "mine.keras"
    elsewhere = dataclasses.replace(run.settings, save_model=str(tmp_path / "v1.2" / name))
    assert Run("03", elsewhere).model_path == tmp_path / "v1.2" / "mine.keras"


def test_a_dot_in_the_name_of_a_model_is_no_suffix(run):
    settings = dataclasses.replace(run.settings, save_model="model_v1.2")
    assert Run("03", settings).model_path.name == "model_v1.2.keras"


def test_no_model_to_start_from(run):
    assert run.starting_model() is None


def test_stage2_only_starts_from_the_model_of_the_run_folder(run):
    again = Run("02", dataclasses.replace(run.settings, stage2_only=True))
    with pytest.raises(MSCNNError, match=r"no model at .*multistage_cnn_model\.keras: give load_model, or run once"):
        again.starting_model()
    again.model_path.write_bytes(b"model")
    assert again.starting_model() == again.model_path


@pytest.mark.parametrize("stage2_only", [False, True])
def test_load_model_goes_first(run, tmp_path, stage2_only):
    run.model_path.write_bytes(b"the run folder's")
    (tmp_path / "other.keras").write_bytes(b"another")
    for name in ("other", "other.keras"):
        settings = dataclasses.replace(run.settings, stage2_only=stage2_only, load_model=str(tmp_path / name))
        assert Run("02", settings).starting_model() == tmp_path / "other.keras"


def test_load_model_is_looked_for_here_and_in_the_run_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    again = Run("02", dataclasses.replace(run.settings, load_model="mine"))
    (again.folder / "mine.keras").write_bytes(b"in the run folder")
    assert again.starting_model() == again.folder / "mine.keras"
    (tmp_path / "mine.keras").write_bytes(b"in the working directory")
    assert again.starting_model() == tmp_path / "mine.keras"


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "mine.keras").touch()
    run = Run("02", Settings(run_dir="~/run", load_model="~/mine.keras", save_model="~/saved"))
    assert (run.folder, run.model_path) == (tmp_path / "run", tmp_path / "saved.keras")
    assert run.starting_model() == tmp_path / "mine.keras"


@pytest.fixture
def no_home(monkeypatch):
    """As in a container whose user has no entry and no HOME."""

    def unknown(uid):
        raise KeyError(f"uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.mark.parametrize(
    "parameter", ["dataset", "load_model", "run_dir", "save_model", "MSCNN_DATA_DIR", "KERAS_HOME"]
)
def test_without_a_home_only_what_names_it_is_refused(no_home, run, parameter, tiny_path, monkeypatch):
    monkeypatch.setenv("MSCNN_DATA_DIR", "")
    assert data_folder().is_absolute(), "the folder for temporary files stands in, as Keras has it"
    given = {"dataset": str(tiny_path), "run_dir": str(run.folder)}
    validate_run(Run("01", Settings(**given)))
    if parameter.isupper():
        monkeypatch.setenv(parameter, "~/x")
    with pytest.raises(MSCNNError, match="No home directory is known for '~/x': give the whole path"):
        data_folder() if parameter.isupper() else validate_run(Run("01", Settings(**{**given, parameter: "~/x"})))


@pytest.mark.parametrize(
    ("given", "place"),
    [(".", "here"), ("..", ""), ("./x", "here/x"), ("../x", "x"), (".x", "run/.x"), ("...", "run/...")],
)
def test_dots_are_the_folder_the_user_is_in(run, tmp_path, monkeypatch, given, place):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    patch_rooms(monkeypatch, "project_root", lambda: tmp_path / "run")
    assert Run("01", Settings(run_dir=given)).folder == tmp_path / place
    if given not in (".", "..", "..."):
        settings = dataclasses.replace(run.settings, save_model=given, load_model=given)
        model = tmp_path / f"{place}.keras"
        assert Run("01", settings).model_path == model
        model.parent.mkdir(exist_ok=True)
        model.touch()
        assert Run("01", settings).starting_model() == model


def test_without_a_current_folder_only_what_begins_there_is_refused(run, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert Run("01", Settings()).folder == project_root() / "runs/latest"
    assert mscnn.load_dataset("digits").name == "digits"
    with pytest.raises(MSCNNError, match="No model file 'missing'"):
        Run("01", dataclasses.replace(run.settings, load_model="missing")).starting_model()
    with pytest.raises(MSCNNError, match=r"where '\./x' begins, has been deleted: give the whole path"):
        Run("01", Settings(run_dir="./x"))


def test_settled_paths_mean_the_same_in_every_folder(run, tmp_path, tiny_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tiny_path.parent)
    (tmp_path / "mine.keras").touch()
    (run.folder / "first.keras").touch()
    settings = Settings(dataset=tiny_path.name, load_model="~/mine", save_model="./new", run_dir=str(run.folder))
    complete = settled(settings)
    assert complete.dataset == str(tiny_path)
    assert complete.load_model == str(tmp_path / "mine.keras")
    assert complete.save_model == str(tiny_path.parent / "new.keras")
    assert settled(complete) == complete
    same = dataclasses.replace(run.settings, load_model="first", save_model="new", dataset="digits")
    assert settled(same) == same, "what begins at the project or the run folder stays as it is"
    assert settled(Settings()) == Settings()


@pytest.mark.parametrize("name", ["folder/", "/", ".", "..", "~", "a/.", "a/.."])
def test_a_model_needs_the_name_of_a_file(name):
    with pytest.raises(MSCNNError, match=r"save_model is the folder .*: add the name of a file"):
        Settings(save_model=name)


def test_a_missing_model_says_where_it_was_looked_for(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    again = Run("02", dataclasses.replace(run.settings, load_model="missing"))
    with pytest.raises(MSCNNError, match="No model file 'missing'") as error:
        again.starting_model()
    for folder in (project_root(), tmp_path, run.folder):
        assert str(folder / "missing.keras") in str(error.value)


def red_share(path) -> float:
    """Share of the pixels that are red, as the notice is."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return ((pixels[..., 0] > 150) & (pixels[..., 1:].max(axis=-1) < 80)).mean()


def test_a_figure_is_saved_and_marked_on_the_fallback_data(run):
    def figure():
        made, axis = plt.subplots()
        axis.plot([0, 1], [0, 1], color="black")
        plt.close(made)
        return made

    plain = figure()
    assert run.save_figure(plain, "plain") is plain
    with Image.open(run.figures / "plain.png") as picture:
        assert picture.format == "PNG"
    assert names_in(run.figures) == ["plain.png"]
    assert red_share(run.figures / "plain.png") == 0

    run.write("metrics", dataset={"fallback": False})
    assert not run.save_figure(figure(), "chosen").texts

    run.write("metrics", dataset={"fallback": True})
    marked = run.save_figure(figure(), "marked")
    assert [text.get_text() for text in marked.texts] == [FALLBACK_NOTICE]
    assert red_share(run.figures / "marked.png") > 0.001


def test_figures_of_a_notebook_that_needs_no_other_are_marked_by_its_own_data(run, monkeypatch, tmp_path, capsys):
    """Whatever the run folder says of other data; and `auto` is looked for once."""
    monkeypatch.setenv("MSCNN_DATA_DIR", str(tmp_path / "empty"))
    patch_rooms(monkeypatch, "_ask", lambda url: OSError("no network"))
    values = {"run_dir": str(run.folder)}
    own = open_run(INDEPENDENT_NOTEBOOKS[0], values)
    assert (own.settings.dataset, own.fallback) == ("digits", True)
    assert capsys.readouterr().out.count(FALLBACK_NOTICE) == 1
    assert own.save_figure(plt.figure(), "own").texts
    run.write("metrics", dataset={"name": "digits", "fallback": True}, parameters={"dataset": "auto"})
    patch_rooms(monkeypatch, "_ask", lambda url: pytest.fail("it was found already"))
    assert open_run(INDEPENDENT_NOTEBOOKS[0], values).fallback
    named = open_run(INDEPENDENT_NOTEBOOKS[0], {**values, "dataset": "digits"})
    assert not named.save_figure(plt.figure(), "named").texts
    plt.close("all")


def test_a_notebook_that_leaves_figures_only_records_no_seconds(run, capsys):
    Run(INDEPENDENT_NOTEBOOKS[0], run.settings).finish()
    assert f"{INDEPENDENT_NOTEBOOKS[0]}: 0 s." in capsys.readouterr().out
    assert run.read("metrics") == {}


def test_finish_records_the_seconds_of_each_notebook(run, capsys):
    Run("01_data_and_light_mode", run.settings).finish()
    run.started -= 12
    run.finish()
    seconds = run.read("metrics")["seconds"]
    assert list(seconds) == ["01_data_and_light_mode", "02_stage1_training"]
    assert 12 <= seconds["02_stage1_training"] < 20
    assert str(run.folder) in capsys.readouterr().out


def test_pretrained_is_the_model_that_comes_with_the_project(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    again = Run("05", dataclasses.replace(run.settings, load_model="pretrained"))
    patch_rooms(monkeypatch, "project_root", lambda: tmp_path / "checkout")
    with pytest.raises(MSCNNError, match=r"No model file '.*notebooks/pretrained/cifar10\.keras'"):
        again.starting_model()
    (tmp_path / "checkout/notebooks/pretrained").mkdir(parents=True)
    (tmp_path / "checkout/notebooks/pretrained/cifar10.keras").write_bytes(b"model")
    (tmp_path / "pretrained.keras").write_bytes(b"not this one")
    assert again.starting_model() == tmp_path / "checkout/notebooks/pretrained/cifar10.keras"


def test_the_latest_model_is_the_finished_one_or_else_the_one_to_start_from(run, tmp_path):
    (tmp_path / "other.keras").write_bytes(b"another")
    assert run.latest_model() == run.model_path
    again = Run("05", dataclasses.replace(run.settings, load_model=str(tmp_path / "other.keras")))
    assert again.latest_model() == tmp_path / "other.keras"
    again.model_path.write_bytes(b"finished")
    assert again.latest_model() == again.model_path
