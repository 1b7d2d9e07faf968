"""READMEs and docs/: what they name exists, what they show runs, and both READMEs say the same."""

import ast
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest
import quality
import selective
from conftest import ROOT, SOURCES
from PIL import Image

import mscnn_helpers as mscnn
from mscnn_parts.cli import parse
from mscnn_parts.commands import COMMANDS
from mscnn_parts.networks import STAGE1_WIDTHS, STAGE2_WIDTHS
from mscnn_parts.optimizers import Recipe
from mscnn_parts.pictures import IMAGE_SUFFIXES
from mscnn_parts.run_folder import ALL_NOTEBOOKS
from mscnn_parts.settings import Settings
from mscnn_parts.zoo import NETWORKS

PATHS = {"en": ROOT / "README.md", "ja": ROOT / "README.ja.md"}
TEXTS = {language: path.read_text("utf-8") for language, path in PATHS.items()}
DOCS = {path.stem: path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
DOCUMENTS = [*PATHS.values(), ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^()\s]+)\)")
ENGLISH = "\n".join([TEXTS["en"], (ROOT / "CONTRIBUTING.md").read_text("utf-8"), *DOCS.values()])
NOTEBOOKS = [f"notebooks/{name}.ipynb" for name in ALL_NOTEBOOKS]

both = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return FENCE.sub("", text)


def headings(text: str) -> list[tuple[int, str]]:
    """(level, title) of each."""
    return [(len(marks), title) for marks, title in re.findall(r"^(#+) (.+)$", prose(text), re.M)]


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


def code(text: str) -> str:
    """Everything to type: fenced blocks that are not pictures, and inline code; a line each."""
    blocks = [block for kind, block in FENCE.findall(text) if kind != "text"]
    return "\n".join([*blocks, *inline_code(text)])


def between(text: str, name: str) -> str:
    """What stands between `<!-- name -->` and `<!-- /name -->`."""
    (found,) = re.findall(rf"^<!-- {name} -->\n(.*?)\n<!-- /{name} -->$", text, re.M | re.S)
    return found


def table_rows(text: str) -> list[list[str]]:
    """The cells of the rows of the Markdown tables in a text, without headers."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    header = [i for i, row in enumerate(lines) if all(set(cell) == {"-"} for cell in row)]
    return [row for i, row in enumerate(lines) if i not in header and i + 1 not in header]


# ------------------------------------------------------------------------------------------------------------
# The two languages
# ------------------------------------------------------------------------------------------------------------


def test_same_headings():
    assert [level for level, _ in headings(TEXTS["en"])] == [level for level, _ in headings(TEXTS["ja"])]


def test_same_code_blocks():
    english, japanese = (FENCE.findall(text) for text in TEXTS.values())
    assert [kind for kind, _ in english] == [kind for kind, _ in japanese]
    for (kind, one), (_, other) in zip(english, japanese, strict=True):
        if kind == "text" and one != other:  # a tree of files, with remarks at the right
            one, other = (re.sub(r"(?<=[\w/]) .*$", "", block, flags=re.M) for block in (one, other))
        assert one == other


def test_same_inline_code_links_and_figures():
    english, japanese = TEXTS.values()
    assert Counter(inline_code(english)) == Counter(inline_code(japanese))
    places = [
        [one for one in LINK.findall(text) if one[0] != "#" and "README" not in one] for text in (english, japanese)
    ]
    assert places[0] == places[1]
    assert len(table_rows(english)) == len(table_rows(japanese))
    # Figures in words, such as 'ten' or 'a tenth', are digits in Japanese; large and decimal ones are so in both.
    numbers = [
        Counter(re.findall(r"\b\d+,\d{3}\b|\b\d+\.\d+\b", between_languages(text))) for text in (english, japanese)
    ]
    assert numbers[0] == numbers[1]


def between_languages(text: str) -> str:
    """Without what is written differently in Japanese on purpose: '54 million' is 5,400 万."""
    return re.sub(r"\d[\d,.]* (?:万|million)", "", prose(text))


def test_each_links_to_the_other():
    assert "[日本語](README.ja.md)" in TEXTS["en"]
    assert "[English](README.md)" in TEXTS["ja"]


# ------------------------------------------------------------------------------------------------------------
# What is named exists
# ------------------------------------------------------------------------------------------------------------


def test_the_readme_fits_on_a_few_screens():
    assert all(text.count("\n") <= 170 for text in TEXTS.values())


@both
def test_every_notebook_is_listed_with_its_badge(text):
    listed = re.findall(r"^\| \[[^\]]+\]\((notebooks/\w+\.ipynb)\) .*/(notebooks/\w+\.ipynb)\) \|$", text, re.M)
    assert listed == [(one, one) for one in NOTEBOOKS]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", code(ENGLISH)))
    assert {"run", "test", "lab", "lint", "format", "test-slow", "badges", "lock", "env"} <= named
    assert named <= set(re.findall(r"^([a-z-]+):.*## ", makefile, re.M))


def test_files_exist():
    """Files of the project that are named in code; a run's files are the subject of the next test."""
    named = set(re.findall(r"(?<![\w./\\-])[\w./-]+\.(?:py|toml|txt|lock|yml|ipynb)\b", code(ENGLISH)))
    assert {"mscnn_helpers.py", "benchmarks/quality.py", "requirements.lock", "environment.yml"} <= named
    assert [name for name in named if not (ROOT / name).is_file()] == []


@both
def test_a_run_leaves_what_the_tree_shows(text):
    source = "\n".join(path.read_text("utf-8") for path in SOURCES)
    cells = [cell for name in NOTEBOOKS for cell in json.loads((ROOT / name).read_text("utf-8"))["cells"]]
    notebooks = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    tree = next(block for kind, block in FENCE.findall(text) if block.startswith("runs/latest/\n"))
    pictures, records = re.findall(r"(\w+)\.png", tree), re.findall(r"(\w+)\.json", tree)
    assert len(pictures) >= 11
    for picture in [*pictures, "example_image"]:
        assert re.search(rf'"{picture}(?:"\s*\)|\.png")', notebooks), picture
    for record in records:
        assert f'"{record}"' in source + notebooks, record
    run = mscnn.Run("total", Settings())
    assert {path.name for path in (run.model_path, run.stage1_path)} == set(re.findall(r"\w+\.keras", tree))
    assert run.folder == ROOT / "runs/latest"
    pages = re.findall(r"runs/latest/notebooks/(\w+)\.html", text)
    assert pages
    assert set(pages) <= set(mscnn.NOTEBOOKS)


def test_environment_variables_are_read():
    source = "\n".join(path.read_text("utf-8") for path in SOURCES)
    named = set(re.findall(r"\bMSCNN_[A-Z_]+", ENGLISH))
    assert named == {"MSCNN_DATA_DIR"}
    assert all(f'"{name}"' in source for name in named)


# ------------------------------------------------------------------------------------------------------------
# What is to be typed
# ------------------------------------------------------------------------------------------------------------


def command_lines(text: str) -> list[str]:
    """The arguments of every `python mscnn_helpers.py …`, `mscnn …` and `make run ARGS="…"`."""
    direct = re.findall(r"(?:python3? mscnn_helpers\.py|^mscnn(?= ))(.*)$", code(text), re.M)
    return direct + re.findall(r'make run ARGS="([^"]+)"', code(text))


def test_command_lines_parse():
    lines = command_lines(ENGLISH)
    assert len(lines) >= 10
    for line in lines:
        if line.split()[:1] != ["--help"] and not set(line.split()[:1]) & set(COMMANDS):
            parse(shlex.split(line))


def test_options_exist():
    options = {f"--{one.name}" for one in dataclasses.fields(Settings)}
    named = {one.split()[0] for one in inline_code(ENGLISH) if one.startswith("--")}
    assert named - options == {"--gpus", "--user", "--notebooks", "--csv", "--no-mirror"}  # the first two are Docker's


@both
def test_papermill_gets_parameters_of_the_right_type(text):
    kinds = {one.name: one.type for one in dataclasses.fields(Settings)}
    lines = [line for line in code(text).splitlines() if re.match(r"\s*papermill |-p ", line)]  # not mkdir, not docker
    given = re.findall(r"-p (\w+) ([\w./]+)", "\n".join(lines))
    assert len(given) >= 3
    for name, value in given:
        kind = "bool" if value in ("True", "False") else "int" if value.isdecimal() else "str"
        assert kind == kinds[name], name


def test_shell_blocks_are_shell():
    for kind, block in FENCE.findall(ENGLISH):
        if kind == "sh":
            subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_the_loop_of_papermill_fails_with_a_notebook(tmp_path):
    (loop,) = [block for kind, block in FENCE.findall(TEXTS["en"]) if 'papermill "$notebook"' in block]
    for name in (".venv/bin/activate", *NOTEBOOKS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    fake = tmp_path / "papermill"
    fake.write_text('#!/bin/sh\necho "$1" >> asked\ncase "$1" in *03_*) exit 1;; esac\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.run(["bash", "-c", loop], cwd=tmp_path, env=environment).returncode == 1
    assert (tmp_path / "asked").read_text().split() == NOTEBOOKS[:3]


def test_python_blocks_run(trained_model_path, tmp_path, monkeypatch, capsys):
    """In the folder of a project whose run has left a model, a retrained model and a picture."""
    run = tmp_path / "runs" / "latest"
    (run / "figures").mkdir(parents=True)
    for name in ("multistage_cnn_model", "retrained"):
        shutil.copy(trained_model_path, run / f"{name}.keras")
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(run / "figures" / "example_image.png")
    monkeypatch.chdir(tmp_path)
    printed = []
    for kind, block in FENCE.findall(DOCS["parameters"] + TEXTS["en"] + DOCS["api"]):
        if kind == "python":
            exec(compile(block, "README", "exec"), {})
            printed.append(capsys.readouterr().out.strip())
    names = [*mscnn.load_model(trained_model_path).category_names, mscnn.OTHER]
    assert printed[0] == "[]"  # two copies of one model
    said = rf"decided: ({'|'.join(names)})\nwhy: (accepted|{mscnn.LOW_CONFIDENCE}|{mscnn.OUT_OF_DISTRIBUTION})\n"
    assert re.fullmatch(rf"{said}Stage 1 says ({'|'.join(names[:-1])}), correct with probability \d+%", printed[1])
    assert re.fullmatch(r"\w+ [a-z ]+ \d+%", printed[2])
    assert "auroc_failure" in printed[3] and "Guaranteed with probability 95%" in printed[3]


# ------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------


def test_parameters_are_those_of_settings():
    rows = [[cell.strip("`") for cell in row] for row in table_rows(between(DOCS["parameters"], "parameters"))]
    fields = dataclasses.fields(Settings)
    assert [(name, kind, ast.literal_eval(default)) for name, kind, default, _ in rows] == [
        (one.name, one.type, one.default) for one in fields
    ]
    assert [row[3] for row in rows] == [one.metadata["help"] for one in fields]


def test_networks_are_those_of_the_zoo():
    rows = table_rows(between(DOCS["networks"], "stage1"))
    assert [(row[0].strip("`"), *row[2:5]) for row in rows] == [
        (name, f"{one.image_size}", f"{one.parameters:,}", f"{one.multiply_adds / 1e6:,.0f} M")
        for name, one in NETWORKS.items()
    ]
    assert [not row[5].startswith("ImageNet") for row in rows] == [not one.pretrained for one in NETWORKS.values()]
    assert between(DOCS["networks"], "networks")  # says where the figures are


def test_phases_are_those_of_the_recipe():
    (table,) = re.findall(r"^\| phase .*?\n\n", DOCS["networks"], re.M | re.S)
    phases = mscnn.default_recipe(1000, network="efficientnet_lite0").phases
    rows = table_rows(table)
    assert [float(row[3]) for row in rows] == [phase.learning_rate for phase in phases]
    assert int(rows[0][2]) == phases[0].epochs and "three augmented views" in rows[0][1] and Recipe.views == 3
    assert f"0 means {sum(phase.epochs for phase in phases[1:])}." in DOCS["networks"]


@pytest.mark.slow
def test_a_network_of_ones_own_is_trained_as_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = [block for kind, block in FENCE.findall(DOCS["networks"]) if kind == "python"]
    exec(compile(block, "networks", "exec"), {})
    assert mscnn.load_model(tmp_path / "mine.keras").network == "own"


def test_figures_of_the_recipe_and_the_networks():
    text = "\n".join(DOCS.values())
    large, small = mscnn.default_recipe(20_000), mscnn.default_recipe(19_999)
    (sentence,) = re.findall(r"^- .*20,000.*$", text, re.M)
    numbers = {int(number) for number in re.findall(r"\b\d+\b", sentence.replace("20,000", ""))}
    assert numbers == {large.epochs, large.batch_size, small.epochs, small.batch_size}
    for widths in (STAGE1_WIDTHS, STAGE2_WIDTHS):
        assert "/".join(map(str, widths)) in text
    assert all(f"`{suffix}`" in text for suffix in IMAGE_SUFFIXES)
    work = []
    for widths in (STAGE1_WIDTHS, STAGE2_WIDTHS):
        network = mscnn.build_cnn("n", (32, 32, 3), 10, widths, [128.0] * 3, [64.0] * 3, True, "float32")
        layers = [layer for layer in network.layers if hasattr(layer, "kernel")]
        work.append(sum(np.prod(one.output.shape[1:-1]) * np.prod(one.kernel.shape) for one in layers) / 1e6)
    millions = [round(value) for value in (*work, 2 * sum(work))]  # the last is a whole decision
    model = mscnn.MultiStageCNN(list("abcdefghij"), (32, 32, 3), [128.0] * 3, [64.0] * 3)
    networks = [model.stage1, model.stage2_base, *model.stage2.values()]
    everything = round(sum(network.count_params() for network in networks) / 1e6, 1)
    expected = [*(f"{value} million multiply-adds" for value in millions), f"{everything} million weights"]
    assert [one for one in expected if one not in text] == []


def numbers_of(cell: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?", cell)


def disagreements(shown: str, runs: list[dict]) -> list[str]:
    """Where a table of results (Markdown) is not what quality.json (`runs`) says.

    It has a row for each title, in the order of RESULTS.md; each cell but the first holds the numbers of a cell
    of the same row there. Somewhere beside them stand each kind's arguments, and the device.
    """
    kinds = dict(zip(map(quality.title, runs), (run["kind"] for run in runs), strict=True))
    measured = table_rows(quality.table(runs))[: len(kinds)]
    rows = [row for row in table_rows(shown) if len(row) >= 5]
    incorrect = [] if len(rows) == len(kinds) else [f"{len(rows)} rows for {len(kinds)} kinds"]
    for row, expected in zip(rows, measured, strict=False):
        known = [numbers_of(cell) for cell in expected[1:]]
        incorrect += [f"{cell} is not in {expected}" for cell in row[1:] if numbers_of(cell) not in known]
        if numbers_of(expected[2]) not in [numbers_of(cell) for cell in row[1:]]:
            incorrect.append(f"Stage 1's accuracy {expected[2]} is missing")
    stated = [*(quality.KINDS[kind][1] for kind in kinds.values()), *{run["device"] for run in runs}]
    return incorrect + [f"'{one}' is missing" for one in stated if one not in shown]


def test_results_are_those_measured():
    path = ROOT / "benchmarks" / "quality.json"
    shown = between(DOCS["baselines"], "results")
    if path.is_file():
        assert disagreements(shown, json.loads(path.read_text("utf-8"))) == []
    else:
        assert "|" not in shown, "a table without measurements"


def test_baselines_are_those_measured():
    """Work, AURC and our difference with its interval, signs included."""

    def signed(cells: list[str]) -> list[list[str]]:
        return [re.findall(r"[+-]?\d+(?:\.\d+)?", cell) for cell in cells]

    figures = json.loads((ROOT / "benchmarks" / "selective.json").read_text("utf-8"))
    measured = [signed([row[1], *row[3:5]]) for row in table_rows(selective.table(figures)) if len(row) == 9]
    rows = table_rows(between(DOCS["baselines"], "baselines"))
    assert len(rows) > 5
    for row in rows:
        assert signed(row[1:]) in measured, row


def test_a_wrong_result_is_noticed():
    """The test above, on a made-up measurement, since it is idle until something has been measured."""
    stage = {"accuracy": 0.9134, "aurc": 0.0123, "coverage": 0.95, "selective_accuracy": 0.9421}
    run = {"kind": "light", "seed": 0, "command": "python x", "minutes": 3.21, "peak_memory_gb": 2.5, "commit": "abc"}
    run |= {"dataset": {"name": "cifar10"}, "stage1": stage, "two_stage": {**stage, "aurc": 0.01}}
    run |= {"versions": {"python": "3"}, "device": "some processor", "policy": "float32"}
    run["parameters"] = {"stage2_branch": -1}
    run["seconds"] = {"01": 40.0, "02": 50.0, "total": 100.0}
    run["training_seconds"] = {"stage1": 20.0, "stage2_base": 8.0, "stage2": 6.0, "retraining": 1.0}
    table = quality.table([run])
    assert "| 0 | 20 | 8 | 6 | 0.70 | 1 | 158 (82%) |\n" in table
    assert "| 0 | 40 | 50 | 103 | 193 |\n" in table
    summary = table[table.index("| run") : table.index("Seconds of the epochs")]
    shown = f"{summary}\n`--epochs 5 --light_mode`, some processor"
    assert disagreements(shown, [run]) == []
    assert disagreements(shown.replace("91.34", "91.43"), [run]) != []
    assert disagreements(shown.replace("some processor", ""), [run]) == ["'some processor' is missing"]
    assert disagreements(shown.replace("| cifar10", "cifar10"), [run]) != []


@both
def test_the_figures_of_the_first_screen_are_those_measured(text):
    """Selective accuracy, coverage, accuracy, minutes: the medians of the full runs; the gain over the softmax."""
    runs = json.loads((ROOT / "benchmarks/quality.json").read_text("utf-8"))
    runs = [run for run in runs if run["kind"] == "full" and not quality.has_whole_cnns(run)]
    row = next(row for row in table_rows(between(DOCS["baselines"], "results")) if "0, 1, 2" in row)
    accuracy, coverage, accepted, gain, minutes = (float(numbers_of(row[i])[0]) for i in (3, 4, 5, 8, 9))
    assert len(runs) == 3
    for figure in (f"**{accepted:.1f} %**", f"{coverage:.1f} %", f"{accuracy:.1f} %", f"{minutes:.1f}"):
        assert figure in text, figure
    assert f"**{gain:.0f} %**" in text
