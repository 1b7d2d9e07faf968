"""`mscnn decide` and `mscnn info`."""

import csv
import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
from conftest import patch_rooms
from PIL import Image

import mscnn_helpers as mscnn
from mscnn_parts import commands
from mscnn_parts.files import notebooks_folder
from mscnn_parts.settings import PRETRAINED
from mscnn_parts.thresholds import threshold_text
from mscnn_parts.zoo import NETWORKS


@pytest.fixture
def pictures(tmp_path, tiny_data):
    """A folder with three pictures, one of them in a folder below, a text and a damaged picture."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.PNG", "below/c.png")):
        Image.fromarray(tiny_data.test.images[i]).save(folder / name, "PNG")
    (folder / "notes.txt").write_text("no picture")
    (folder / "below/damaged.jpg").write_text("no picture either")
    return folder


@pytest.mark.parametrize(
    ("reason", "decision", "expected"),
    [
        ("accepted", "ship", "a.png: ship (correct with probability 99.8%; OOD score 1.53)"),
        (
            "low confidence",
            "OTHER",
            "a.png: OTHER (low confidence: Stage 1 says ship, correct with probability 99.8%; OOD score 1.53)",
        ),
        (
            "out of distribution",
            "OTHER",
            "a.png: OTHER (out of distribution: unlike the train images; Stage 1 says ship; OOD score 1.53)",
        ),
    ],
)
def test_a_line_never_reads_as_certain_of_what_was_rejected(reason, decision, expected):
    row = {
        "path": "a.png",
        "decision": decision,
        "reason": reason,
        "confidence": 0.998,
        "stage1": "ship",
        "ood_score": 1.53,
    }
    assert commands._line({**row, "error": None}) == expected


def test_a_table_has_a_row_for_each_picture(trained_model_path, pictures, tmp_path, tiny_data, capsys):
    table = tmp_path / "table.csv"
    assert mscnn.main(["decide", str(trained_model_path), str(pictures), "--csv", str(table)]) == 1, "one is damaged"
    told = capsys.readouterr().err
    assert "Files left out, which are no pictures by their names: 1\n" in told
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert f"Not read, for example: {rows[3]['error']}\n" in told
    assert [row["path"].rpartition("/")[2] for row in rows] == ["a.png", "b.PNG", "c.png", "damaged.jpg"]
    assert "cannot be read" in rows[3]["error"] and not rows[3]["decision"]
    expected = mscnn.load_model(trained_model_path).decide(tiny_data.test.images[:3])
    assert [float(row["confidence"]) for row in rows[:3]] == expected.confidence.round(4).tolist()
    assert [row["reason"] for row in rows[:3]] == expected.reasons().tolist()


def test_json_lines_by_suffix_and_a_threshold(trained_model_path, pictures, tmp_path, capsys):
    table = tmp_path / "table.jsonl"
    good = [str(pictures / "a.png"), str(pictures / "b.PNG")]
    assert mscnn.main(["decide", str(trained_model_path), *good, "--csv", str(table), "--threshold", "1"]) == 0
    assert "Not read" not in capsys.readouterr().err
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert [row["decision"] for row in rows] == ["OTHER", "OTHER"]


def test_pictures_are_named_on_standard_input(trained_model_path, pictures, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{pictures / 'a.png'}\n\n{pictures / 'below/c.png'}\n"))
    assert mscnn.main(["decide", str(trained_model_path), "-"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [str(pictures / "a.png"), str(pictures / "below/c.png")]


@pytest.mark.skipif(sys.platform == "darwin", reason="names of files are UTF-8 there")
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_name_that_is_no_utf8_an_empty_folder_and_a_systems_entry_keep_the_rest(
    trained_model_path, pictures, tmp_path, monkeypatch, suffix
):
    (tmp_path / "empty").mkdir()
    (pictures / "below/damaged.jpg").rename(pictures / "._a.png")  # as macOS leaves them
    shutil.copy(pictures / "a.png", pictures / "@anna.png")
    strange = os.fsencode(tmp_path) + b"/caf\xe9.png"
    shutil.copy(pictures / "a.png", strange)
    names = io.BytesIO(b"\n".join([strange, os.fsencode(tmp_path / "empty"), os.fsencode(pictures)]))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(names, encoding="utf-8"))
    table = tmp_path / f"table{suffix}"
    assert mscnn.main(["decide", str(trained_model_path), "-", "--csv", str(table)]) == 1, "a folder is empty"
    lines = table.read_text("utf-8").splitlines()
    rows = list(csv.DictReader(lines)) if suffix == ".csv" else [json.loads(line) for line in lines]
    assert [bool(row["error"]) for row in rows] == [False, True, False, False, False, False]
    assert "There is no picture in" in rows[1]["error"]
    assert rows[0]["path"].encode("utf-8", "backslashreplace").endswith(rb"caf\udce9.png")


def test_pictures_are_read_a_batch_at_a_time(trained_model_path, pictures, monkeypatch):
    patch_rooms(monkeypatch, "BATCH", 2)
    model, seen = mscnn.load_model(trained_model_path), []
    decide = model.decide
    monkeypatch.setattr(
        type(model), "decide", lambda self, images, threshold: (seen.append(len(images)), decide(images))[1]
    )
    rows = list(commands.decide_on_files(model, [pictures / "a.png"] * 5))
    assert seen == [2, 2, 1] and len(rows) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("decide nowhere.keras PICTURES", "There is no model file at "),
        ("decide MODEL EMPTY", "There is no picture in "),
        ("decide MODEL PICTURES --csv table.xlsx", "--csv is table.xlsx: give a name that ends in .csv or .jsonl."),
        ("decide MODEL PICTURES --threshold 2", "threshold is 2: it is a confidence"),
        ("info nowhere.keras", "There is no model file at "),
    ],
)
def test_a_mistake_is_told_in_one_line(trained_model_path, pictures, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"MODEL": trained_model_path, "PICTURES": pictures, "EMPTY": tmp_path / "empty"}
    assert mscnn.main([str(places.get(one, one)) for one in arguments.split()]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {message}") and "\n" not in error


def test_an_option_is_not_guessed_from_its_beginning(capsys):
    with pytest.raises(SystemExit):
        mscnn.main(["decide", "pretrained", "a.png", "--thres", "0.5"])
    assert "unrecognized arguments: --thres 0.5. Did you mean --threshold?" in capsys.readouterr().err


def test_the_card_says_what_the_model_is(trained_model_path, capsys):
    assert mscnn.main(["info", str(trained_model_path)]) == 0
    told, model = capsys.readouterr().out, mscnn.load_model(trained_model_path)
    for fact in (model.dataset, *model.category_names, model.data_fingerprint[:16], threshold_text(model)):
        assert fact in told
    assert all(f"{name:24} {value[:16]}" in told for name, value in model.fingerprints().items())
    assert np.prod(model.stage1.get_weights()[-1].shape) == len(model.category_names)
    assert f"compact: {NETWORKS['compact'].text}\n" in told and "images      32 × 32 × 3\n" in told
    assert f"each of {len(model.category_names)} Stage 2 CNNs" in told
    assert "stage2      whole CNNs of 2 blocks (stage2_branch 0)\n" in told


MEASURED = {
    "stage1": {"accuracy": 0.5},
    "two_stage": {"accuracy": 0.625, "coverage": 0.25, "selective_accuracy": 0.75, "threshold": 0.8},
}


@pytest.mark.parametrize(
    ("of", "changed", "expected"),
    [
        ("this model", {}, "Stage 1 50.0% by a single view, all answers 62.5%; at threshold 0.8 25.0% accepted, of "),
        ("this model", {"threshold": [0.8, 0.9]}, "62.5%; at thresholds by category 25.0% accepted, of these 75.0% "),
        ("this model", {"coverage": 0.0, "selective_accuracy": None}, "at threshold 0.8 0.0% accepted\n"),
        ("another model", {}, "accuracy    not known: no metrics.json of notebook 05"),
    ],
)
def test_the_card_says_what_was_measured_of_this_model(trained_model_path, tmp_path, capsys, of, changed, expected):
    shutil.copy(trained_model_path, tmp_path / "m.keras")
    fingerprints = mscnn.load_model(trained_model_path).fingerprints()
    record = {**MEASURED, "two_stage": MEASURED["two_stage"] | changed}
    record["model"] = fingerprints if of == "this model" else fingerprints | {"stage1": "0" * 64}
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    assert mscnn.main(["info", str(tmp_path / "m.keras")]) == 0
    assert expected in capsys.readouterr().out


def test_the_pretrained_models_accuracy_is_that_of_its_card(capsys):
    assert mscnn.main(["info", "pretrained"]) == 0
    figures = json.loads((notebooks_folder() / PRETRAINED).with_suffix(".json").read_text())["figures"]
    assert f"all answers {figures['accuracy of all answers']:.1%}; at threshold 0.7 " in capsys.readouterr().out


@pytest.mark.parametrize(("raised", "code"), [(BrokenPipeError, 141), (KeyboardInterrupt, 130)])
def test_a_closed_pipe_or_ctrl_c_ends_a_command_without_a_traceback(monkeypatch, capsys, raised, code):
    def end(arguments):
        raise raised

    monkeypatch.setitem(commands.COMMANDS, "info", end)
    assert mscnn.main(["info", "pretrained"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_the_card_says_how_many_blocks_the_stage_2_cnns_share():
    model = mscnn.MultiStageCNN(["a", "b"], (32, 32, 3), [128] * 3, [64] * 3, stage2_branch=2)
    shared = "CNNs that share 2 of the 3 blocks of their base network (stage2_branch 2)"
    assert f"stage2      {shared}\n" in commands.card(model)


@pytest.mark.parametrize("own", [False, True])
def test_the_card_names_another_network_and_its_size(own):
    """Of heads on a network of the zoo, and of one's own network."""
    inputs = mscnn.keras.Input((48, 48, 3))
    pooled = mscnn.keras.layers.GlobalAveragePooling2D()(inputs)
    network = mscnn.keras.Model(inputs, mscnn.keras.layers.Dense(2)(pooled)) if own else "efficientnet_lite0"
    model = mscnn.MultiStageCNN(["a", "b"], (32, 32, 3), [128] * 3, [64] * 3, network=network, image_size=48)
    told = commands.card(model)
    assert "images      32 × 32 × 3, enlarged by Stage 1 to 48 × 48\n" in told
    assert f"each of 2 Stage 2 {'CNNs' if own else 'heads'} " in told
    assert f"stage2      {'CNNs that share' if own else 'heads on the features of Stage 1 (stage2_branch -1)'}" in told
    assert ("a network of one's own" if own else f"efficientnet_lite0: {NETWORKS['efficientnet_lite0'].text}") in told
