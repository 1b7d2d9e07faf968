"""The notebooks: their files, their set-up cell, their exercises, and the whole chain on a small data set."""

import ast
import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import sys
import types

import nbformat
import numpy as np
import papermill
import pytest
from conftest import ROOT, TINY_NAMES, write_tiny_npz
from PIL import Image

import mscnn_helpers as mscnn
from mscnn_parts.files import jsonable
from mscnn_parts.run_folder import ALL_NOTEBOOKS, INDEPENDENT_NOTEBOOKS
from mscnn_parts.settings import Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = ROOT / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
CHAIN = [FOLDER / f"{name}.ipynb" for name in mscnn.NOTEBOOKS]
LINKED = [path for path in PATHS if path.stem not in INDEPENDENT_NOTEBOOKS]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mscnn"]
# Blank lines around the fence: without them the code is not set as code inside <details>.
FOLDED = r"<details><summary>{}</summary>\n\n(?:(?!</?details>).)+\n\n</details>"
SOLUTION, HINT = (re.compile(FOLDED.format(summary), re.S) for summary in ("Solution", r"Hint \d"))
PYTHON = re.compile(r"(?<=\n\n)```python\n(.+?)\n```(?=\n\n)", re.S)

TEN = FOLDER / "09_exercises.ipynb"  # the notebook that is exercises

each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def cells(path, kind: str | None = None):
    return [cell for cell in nbformat.read(path, 4).cells if kind in (None, cell.cell_type)]


def prose(path) -> str:
    """The text cells, without what stands in code fences."""
    return re.sub(r"^```.*?^```", "", "\n\n".join(c.source for c in cells(path, "markdown")), flags=re.M | re.S)


def solutions(path) -> list[str]:
    """The code of each solution."""
    text = "\n\n".join(cell.source for cell in cells(path, "markdown"))
    return ["\n".join(PYTHON.findall(solution)) for solution in SOLUTION.findall(text)]


# ------------------------------------------------------------------------------------------------------------
# The files
# ------------------------------------------------------------------------------------------------------------


def test_the_chain_is_there():
    assert [path.name for path in CHAIN if not path.is_file()] == []
    assert [path.stem for path in PATHS] == [*ALL_NOTEBOOKS]


@each_notebook
def test_the_file_is_a_valid_notebook_for_python3(path):
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.kernelspec.language == "python", "papermill needs it"
    raw = path.read_text("utf-8")
    assert raw == json.dumps(json.loads(raw), indent=1, ensure_ascii=False) + "\n", "one form, so that diffs are small"


@each_notebook
def test_cells_have_readable_unique_names(path):
    names = [cell.id for cell in cells(path)]
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name), name
        assert not re.fullmatch(r"[0-9a-f]{8}", name), f"{name} was made by a program and changes with the next one"


@each_notebook
def test_no_outputs_are_committed(path):
    for cell in cells(path, "code"):
        assert (cell.outputs, cell.execution_count) == ([], None), cell.id


@each_notebook
def test_one_title(path):
    assert len(re.findall(r"^# \S", prose(path), re.M)) == 1
    assert cells(path)[0].source.startswith("# ")


@each_notebook
def test_it_says_what_it_will_do_and_what_it_did(path):
    assert re.search(r"^.*In this notebook,? we will\b.*\n+- .+\n- .+\n- ", prose(path), re.M)
    assert re.search(r"^.*In this notebook,? we have\b.*\n+- .+\n- ", prose(path), re.M)
    for word in ("Time", "Needs", "Leaves"):
        assert f"**{word}**" in cells(path)[0].source


@pytest.mark.parametrize(("one", "next_one"), list(itertools.pairwise(PATHS)), ids=lambda path: path.stem)
def test_neighbours_link_to_each_other_at_both_ends(one, next_one):
    for source, target in ((one, next_one), (next_one, one)):
        texts = cells(source, "markdown")
        for text in (texts[0].source, texts[-1].source):
            assert f"]({target.name})" in text, f"{source.name} does not lead to {target.name}"


@each_notebook
def test_the_badge_opens_this_notebook(path):
    repository = PROJECT["repository"].removeprefix("https://github.com/")
    address = f"https://colab.research.google.com/github/{repository}/blob/{PROJECT['ref']}/notebooks/{path.name}"
    assert f"images/colab-badge.svg)]({address})" in cells(path)[0].source


@each_notebook
def test_nothing_is_installed(path):
    for cell in cells(path, "code"):
        assert not re.search(r"^\s*[!%]|\bpip\b|conda ", cell.source, re.M), cell.id


@each_notebook
def test_a_text_follows_each_figure(path):
    every = cells(path)
    for cell, follower in itertools.pairwise(every):
        if cell.cell_type == "code" and "save_figure" in cell.source:
            assert follower.cell_type == "markdown", cell.id


def test_the_documented_figures_are_made():
    code = "\n".join(cell.source for path in PATHS for cell in cells(path, "code"))
    made = set(re.findall(r'save_figure\(.*?"(\w+)"\s*\)', code, re.S))
    assert made >= FIGURES


FIGURES = {
    "samples", "augmentation", "training_history", "confusion_matrix", "risk_coverage", "reliability",
    "gallery_errors", "gallery_other", "gallery_unknown", "decision_traces", "retraining", "thresholds",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Parameters
# ------------------------------------------------------------------------------------------------------------


@each_notebook
def test_parameters_are_those_of_the_command_line(path):
    tagged = [cell for cell in cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert [cell.cell_type for cell in tagged] == ["code"]
    found = papermill.inspect_notebook(path)
    expected = {one.name: (one.type, one.default) for one in dataclasses.fields(Settings)}
    # So that 'Run all' is a matter of minutes on a laptop.
    expected |= {"epochs": ("int", 5), "light_mode": ("bool", True)}
    declared = [name for name in expected if name in found]
    assert list(found) == declared and "run_dir" in declared, "the same names in the same order"
    assert path != PATHS[0] or declared == list(expected), "notebook 01 has them all"
    for name in declared:
        kind, default = expected[name]
        assert (found[name]["inferred_type_name"], ast.literal_eval(found[name]["default"])) == (kind, default), name
        assert found[name]["help"].strip(), name
    assert len(tagged[0].source.splitlines()) == len(declared), "one parameter a line and nothing else"


@each_notebook
def test_the_run_is_opened_and_finished(path):
    calls = [node for cell in cells(path, "code") for node in ast.walk(ast.parse(cell.source))]
    opened = [
        ast.unparse(call) for call in calls if isinstance(call, ast.Call) and "open_run" in ast.unparse(call.func)
    ]
    assert opened == [f"mscnn.open_run('{path.stem}', globals())"]
    assert cells(path, "code")[-1].source.rstrip().endswith("run.finish()")


@each_notebook
def test_the_pace(path):
    """Short texts, a few cells before the first that teaches, lines that need no scrolling, folded plumbing."""
    texts = [
        re.sub(r"<details>.*?</details>|^```.*?^```|\]\(.*?\)", "", c.source, flags=re.M | re.S) for c in cells(path)
    ]
    words = [len(text.split()) for text, cell in zip(texts, cells(path), strict=True) if cell.cell_type == "markdown"]
    assert np.median(words) <= 45 and max(words) <= 130
    kinds = [cell.id for cell in cells(path)[:3]]
    assert kinds == ["introduction", "parameters", "setup"]
    folded = cells(path)[2].metadata
    assert folded.cellView == "form" and folded.jupyter.source_hidden
    for cell in cells(path, "code"):
        assert cell.id == "setup" or max(map(len, cell.source.splitlines())) <= 100, cell.id


@each_notebook
def test_no_cell_depends_on_a_loop_that_has_ended(path):
    """A name that a loop of an earlier cell has set is not read by a later cell, unless that sets it itself."""
    leaked = {}
    for cell in cells(path, "code"):
        body = ast.parse(cell.source).body
        read = {n.id for n in ast.walk(ast.Module(body, [])) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        stored = {
            n.id for n in ast.walk(ast.Module(body, [])) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        arguments = {a.arg for n in ast.walk(ast.Module(body, [])) if isinstance(n, ast.arguments) for a in n.args}
        assert not (read & leaked.keys()) - stored - arguments, f"{cell.id}: {read & leaked.keys()}"
        leaked = {name: where for name, where in leaked.items() if name not in stored}
        for loop in (node for node in body if isinstance(node, ast.For)):
            names = {n.id for n in ast.walk(loop) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            leaked |= dict.fromkeys(
                names
                - {
                    n.id
                    for line in body
                    if not isinstance(line, ast.For)
                    for n in ast.walk(line)
                    if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
                },
                cell.id,
            )


@each_notebook
def test_a_figure_is_shown_once(path):
    """What a cell leaves open, Jupyter shows below it, beside the one that `save_figure` returns."""
    for cell in cells(path, "code"):
        assert cell.source.count("plt.subplots(") <= cell.source.count("plt.close("), cell.id


# ------------------------------------------------------------------------------------------------------------
# The set-up cell
# ------------------------------------------------------------------------------------------------------------


def setup_cell(path) -> str:
    code = cells(path, "code")
    assert "parameters" in code[0].metadata.tags
    return code[1].source


@each_notebook
def test_the_set_up_cell_is_the_same_everywhere(path):
    assert setup_cell(path) == setup_cell(PATHS[0])


def test_repository_and_ref_are_those_of_the_project():
    tree = ast.parse(setup_cell(PATHS[0]))
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    assert ast.literal_eval(assigned["(REPOSITORY, REF)"]) == (PROJECT["repository"], PROJECT["ref"])


class SetUp:
    """Runs the set-up cell as a kernel would that has just started."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.commands = monkeypatch, []
        monkeypatch.setattr(sys, "path", [one for one in sys.path if one not in ("", str(ROOT), str(FOLDER))])
        monkeypatch.delitem(sys.modules, "mscnn_helpers")
        monkeypatch.delitem(sys.modules, "google.colab", raising=False)
        monkeypatch.setattr(subprocess, "run", self.clone)

    def on_colab(self):
        self.monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))

    def clone(self, command, **options):
        """Stands in for git: makes a checkout whose module can be recognised."""
        self.commands.append((command, options))
        folder = type(ROOT)(command[-1])
        folder.mkdir()
        (folder / "mscnn_helpers.py").write_text("MADE_BY = 'the clone'\n")

    def run(self, folder) -> dict:
        self.monkeypatch.chdir(folder)
        namespace = {"__name__": "__main__"}
        exec(compile(setup_cell(PATHS[0]), "set-up cell", "exec"), namespace)
        return namespace


@pytest.fixture
def set_up(monkeypatch):
    return SetUp(monkeypatch)


@pytest.mark.parametrize("where", ["", "notebooks", "deeper/still"])
def test_the_module_is_found_by_walking_up(set_up, tmp_path, where):
    (tmp_path / "mscnn_helpers.py").write_text("MADE_BY = 'the test'\n")
    (tmp_path / where).mkdir(parents=True, exist_ok=True)
    found = set_up.run(tmp_path / where)
    assert found["mscnn"].MADE_BY == "the test"
    assert set_up.commands == []


def test_without_the_module_the_error_says_what_to_do(set_up, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mscnn_helpers\.py.*start Jupyter inside the project") as error:
        set_up.run(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert set_up.commands == [], "only Colab clones"


def test_colab_clones_the_repository_at_its_ref_once(set_up, tmp_path):
    set_up.on_colab()
    assert set_up.run(tmp_path)["mscnn"].MADE_BY == "the clone"
    ((command, options),) = set_up.commands
    assert command[:2] == ["git", "clone"]
    assert command[command.index("--branch") + 1] == PROJECT["ref"]
    assert command[-2:] == [PROJECT["repository"], "mscnn"]
    assert options["check"] is True

    assert set_up.run(tmp_path)["mscnn"].MADE_BY == "the clone"
    assert len(set_up.commands) == 1, "run again, the cell uses the checkout that is there"


@pytest.mark.parametrize("taken", ["empty", "half", "own", "file"])
def test_colab_leaves_another_folder_of_that_name_alone(set_up, tmp_path, taken):
    folder = tmp_path / "mscnn"
    folder.touch() if taken == "file" else folder.mkdir()
    if taken == "half":  # git has written the module, and was stopped
        (folder / ".git").mkdir()
        (folder / "mscnn_helpers.py").write_text("MADE_BY = 'half a clone'\n")
    if taken == "own":
        (folder / "notes.txt").touch()
    before = sorted(folder.rglob("*"))
    set_up.on_colab()
    for _ in range(2):
        assert set_up.run(tmp_path)["mscnn"].MADE_BY == "the clone"
    ((command, _),) = set_up.commands
    assert command[-1] == "mscnn-2"
    assert sorted(folder.rglob("*")) == before


def test_colab_clones_nothing_inside_the_clone(set_up, tmp_path):
    set_up.on_colab()
    set_up.run(tmp_path)
    set_up.run(tmp_path / "mscnn")
    assert len(set_up.commands) == 1


def test_colab_without_git_is_told(set_up, tmp_path, monkeypatch):
    def missing(command, **options):
        raise FileNotFoundError(2, "No such file or directory", "git")

    set_up.on_colab()
    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(FileNotFoundError, match="There is no git to clone the project with"):
        set_up.run(tmp_path)


def test_the_command_line_names_the_project(set_up, tmp_path, monkeypatch):
    for name in ("this", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mscnn_helpers.py").write_text(f"MADE_BY = {name!r}\n")
    monkeypatch.setenv("MSCNN_PROJECT", str(tmp_path / "this"))
    assert set_up.run(tmp_path / "other")["mscnn"].MADE_BY == "this"


def test_colab_without_network_shows_git_s_error(set_up, tmp_path, monkeypatch):
    def fail(command, **options):
        raise subprocess.CalledProcessError(128, command)

    set_up.on_colab()
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(subprocess.CalledProcessError):
        set_up.run(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Exercises
# ------------------------------------------------------------------------------------------------------------


@each_notebook
def test_exercises_each_with_a_collapsed_solution(path):
    text = "\n\n".join(cell.source for cell in cells(path, "markdown"))
    before, exercises = re.split(r"^## Exercises$", text, maxsplit=1, flags=re.M)
    assert "<details>" not in before
    questions = re.findall(r"^\*\*(?:Exercise )?(\d+)\. ?\S", exercises, re.M)
    assert questions == [str(i + 1) for i in range(len(questions))]
    assert len(questions) in ((10,) if path == TEN else (2, 3))
    for part in re.split(r"^\*\*(?:Exercise )?\d+\.", exercises, flags=re.M)[1:]:
        hints = HINT.findall(part)
        assert part.count("<details>") == part.count("</details>") == 1 + len(hints)
        assert len(SOLUTION.findall(part)) == 1 and bool(hints) == (path == TEN)
    for code in solutions(path):
        assert ast.parse(code).body, "a solution is worked: it has code"


def test_each_of_the_ten_has_its_difficulty_its_check_and_an_honest_solution():
    code = [cell.source for cell in cells(TEN, "code")]
    for number, solution in enumerate(solutions(TEN), start=1):
        assert re.search(rf"^\*\*{number}\. [^*]+\*\* \((easy|medium|hard)\) ", prose(TEN), re.M)
        (asked,) = [
            line for cell in code for line in cell.splitlines() if line.startswith(f"exercises.check({number}, ")
        ]
        work = asked.split(", ")[1]
        assert f"\n{work} = None  # " in "\n" + "\n".join(code), "the reader's own cell is empty"
        assert asked.rpartition(", ")[0] in solution, "the solution is put to the reader's check"
        assert re.search(rf"^(def )?{work}\b", solution, re.M), "and defines what the reader is asked for"


# ------------------------------------------------------------------------------------------------------------
# The chain, on a small data set
# ------------------------------------------------------------------------------------------------------------

EPOCHS = 6
CHANCE = 1 / len(TINY_NAMES)


def with_solutions(path, target):
    """A copy of the notebook with each solution as a cell at its end."""
    notebook = nbformat.read(path, 4)
    for number, code in enumerate(solutions(path), start=1):
        notebook.cells.append(nbformat.v4.new_code_cell(code, id=f"solution-{number}"))
    nbformat.write(notebook, target)
    return target


def execute(path, base, settings: Settings):
    """Runs a notebook with all its solutions by papermill; fails with the cell's error if a cell fails."""
    folder = base / "run/notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        with_solutions(path, base / path.name), folder / path.name, dataclasses.asdict(settings),
        kernel_name="python3", cwd=ROOT, progress_bar=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The run folder after the notebooks that need one another, run with the same parameters."""
    base = tmp_path_factory.mktemp("chain")
    settings = Settings(epochs=EPOCHS, dataset=str(write_tiny_npz(base / "tiny.npz")), run_dir=str(base / "run"))
    for path in LINKED:
        execute(path, base, settings)
    return base / "run"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The command line from the folder of the notebooks: (run folder, what it printed, its options)."""
    base = tmp_path_factory.mktemp("program")
    data, folder = write_tiny_npz(base / "tiny.npz"), base / "run"
    options = ["--epochs", str(EPOCHS), "--dataset", str(data), "--run_dir", str(folder)]
    return folder, run_program(*options), options


def run_program(*options: str) -> str:
    command = [sys.executable, ROOT / "mscnn_helpers.py", *options]
    result = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def read(folder, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text("utf-8"))


def check_metrics(folder) -> None:
    """`metrics.json` has the documented keys, and values that only a model that has learned can have."""
    metrics = read(folder, "metrics")
    assert metrics.keys() >= {"dataset", "stage1", "two_stage", "seconds", "versions", "parameters", "device"}
    assert metrics["dataset"].keys() >= {"name", "source", "fallback", "fingerprint", "light_mode"}
    assert metrics["dataset"]["name"] == "tiny"
    assert set(metrics["seconds"]) >= set(mscnn.NOTEBOOKS)
    assert all(0 < seconds < 900 for seconds in metrics["seconds"].values())
    assert metrics["parameters"]["epochs"] == EPOCHS
    assert {"python", "tensorflow", "keras", "numpy"} <= metrics["versions"].keys()

    one, two = metrics["stage1"], metrics["two_stage"]
    assert set(one) == {"accuracy", "aurc", "auroc_failure", "fpr95"}
    assert set(two) == {
        "threshold", "accuracy", "coverage", "selective_accuracy", "accuracy_other_wrong", "stage_report_accuracy",
        "aurc", "auroc_failure", "fpr95", "ood_rejection_rate",
    }  # fmt: skip
    assert one["accuracy"] > 3 * CHANCE
    assert 0.3 < two["coverage"] <= 1
    assert two["selective_accuracy"] >= max(two["threshold"], one["accuracy"] - 0.02)
    assert two["accuracy_other_wrong"] == pytest.approx(two["coverage"] * two["selective_accuracy"])
    assert two["stage_report_accuracy"] > max(one["accuracy"] - 0.1, 0.6)
    for stage in (one, two):
        assert 0 <= stage["fpr95"] <= 1
        assert stage["auroc_failure"] > 0.6, "the confidence tells correct from incorrect"
        assert stage["aurc"] < (1 - one["accuracy"]) * 0.8, "a confidence by chance has the error rate"
    assert re.search(r"^\s+OTHER\s", metrics["report"], re.M)
    for name in TINY_NAMES:
        assert name in metrics["report"]


@pytest.mark.chain
def test_the_chain_from_the_top_folder_learns(chain):
    check_metrics(chain)


@pytest.mark.chain
def test_the_chain_makes_the_documented_figures(chain):
    for name in FIGURES:
        with Image.open(chain / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 150, name
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10, f"{name} is empty"


@pytest.mark.chain
def test_the_chain_keeps_its_history(chain):
    history = read(chain, "history")
    assert history.keys() >= {"stage1", "stage2_base", "stage2", "retraining"}
    recipe = mscnn.default_recipe(read(chain, "metrics")["dataset"]["sizes"]["train"], EPOCHS)
    for stage, epochs in {"stage1": EPOCHS, "stage2_base": recipe.stage2_base_epochs}.items():
        assert set(history[stage]) >= {"loss", "accuracy", "val_loss", "val_accuracy"}
        assert all(len(values) == epochs for values in history[stage].values())
        assert history[stage]["loss"][-1] < history[stage]["loss"][0]
    assert set(history["stage2"]) == set(TINY_NAMES)
    assert all(np.isfinite(one["loss"]).all() for one in history["stage2"].values())


def check_executed(path) -> None:
    """All code of an executed notebook ran, its solutions with it, without error or warning."""
    done = cells(path, "code")
    for cell in done:
        for output in cell.outputs:
            assert output.output_type != "error", f"{path.stem} {cell.id}"
            if output.get("name") == "stderr":
                assert "Warning" not in output.text, f"{path.stem} {cell.id}: {output.text}"
    wanted = {f"solution-{i + 1}" for i in range(len(solutions(FOLDER / path.name)))}
    assert wanted <= {cell.id for cell in done if cell.execution_count}
    assert len(wanted) >= 2


@pytest.mark.chain
@pytest.mark.parametrize("name", [path.name for path in LINKED])
def test_the_chain_runs_with_solutions_and_without_warnings(chain, name):
    check_executed(chain / "notebooks" / name)


FRESH = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import mscnn_helpers as mscnn
data = mscnn.load_dataset(sys.argv[3])
decisions = mscnn.load_model(sys.argv[2]).decide(data.test.images)
np.savez(sys.argv[4], *decisions)
"""


@pytest.mark.chain
def test_a_fresh_process_decides_the_same(chain, tmp_path):
    settings = read(chain, "metrics")["parameters"]
    path = chain / "multistage_cnn_model.keras"
    command = [sys.executable, "-c", FRESH, str(ROOT), str(path), settings["dataset"], str(tmp_path / "decisions.npz")]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    data = mscnn.load_dataset(settings["dataset"])
    here = mscnn.load_model(path).decide(data.test.images)
    with np.load(tmp_path / "decisions.npz") as file:
        there = mscnn.Decisions(*(file[name] for name in file.files))
    for name, one, other in zip(here._fields, here, there, strict=True):
        assert np.array_equal(one, other), name

    # They are also what the last notebook has reported: no solution has changed the model.
    metrics = jsonable(mscnn.evaluate(there, data.test.labels, settings["threshold"]))
    assert metrics == {stage: read(chain, "metrics")[stage] for stage in metrics}


@pytest.mark.slow
def test_the_program_from_another_folder_learns_and_says_so(program):
    folder, printed, _ = program
    check_metrics(folder)
    metrics = read(folder, "metrics")
    assert metrics["report"].strip() in printed
    assert f"Accuracy of Stage 1 {metrics['stage1']['accuracy']:.1%}, of all answers" in printed
    assert f" s. Where to look: {folder}\n" in printed
    assert metrics["seconds"]["total"] >= sum(metrics["seconds"][name] for name in mscnn.NOTEBOOKS)


@pytest.mark.slow
def test_the_program_shows_its_progress(program):
    _, printed, _ = program
    for path in CHAIN:
        count = len(cells(path, "code")) + 1  # papermill puts the parameters into a cell of their own
        assert f"[{path.stem}] cell 1 of {count}\n" in printed
        assert f"[{path.stem}] cell {count} of {count}\n" in printed
    assert f"Epoch {EPOCHS}/{EPOCHS}" in printed
    assert "both stages are trainable" in printed
    assert f"Stage 2 {TINY_NAMES[0]}: " in printed


@pytest.mark.slow
def test_the_program_leaves_notebooks_and_pages(program):
    folder, *_ = program
    for name in mscnn.NOTEBOOKS:
        page = (folder / "notebooks" / f"{name}.html").read_text("utf-8")
        assert "data:image/png;base64" in page
        assert cells(FOLDER / f"{name}.ipynb")[0].source.splitlines()[0].removeprefix("# ") in page
    assert not list(folder.rglob("*partial*"))


@pytest.mark.slow
def test_two_runs_from_two_folders_see_the_same_data(chain, program):
    folder, *_ = program
    assert read(chain, "metrics")["dataset"]["fingerprint"] == read(folder, "metrics")["dataset"]["fingerprint"]


@pytest.mark.chain
def test_retraining_in_notebook_04_moved_the_chosen_categories_only(chain):
    page = chain / "notebooks/04_selective_retraining.ipynb"
    text = "".join(output.get("text", "") for cell in cells(page, "code") for output in cell.outputs)
    free = re.findall(r"✓ ([\w ]+): True", text)
    frozen = re.findall(r"✗ ([\w ]+): False", text)
    retraining = read(chain, "history")["retraining"]
    assert retraining
    assert set(free) & set(TINY_NAMES), "the summary is printed"
    assert "Stage 1" in frozen
    assert set(retraining["histories"]) <= set(free)
    before, after = (
        mscnn.load_model(chain / f"{name}.keras").fingerprints() for name in ("stage1", "multistage_cnn_model")
    )
    assert before["stage1"] == after["stage1"], "nothing since notebook 02 has moved it"


@pytest.mark.slow
@pytest.mark.parametrize("stage1", ["vgg", "efficientnet_lite0"])
def test_the_program_runs_with_another_network_and_size(stage1, tmp_path):
    data, folder = write_tiny_npz(tmp_path / "tiny.npz", 240, 60), tmp_path / "run"
    chosen = ("--stage1", stage1, "--image_size", "48", "--epochs", "1", "--stage2_branch", "-1")
    run_program("--dataset", str(data), "--run_dir", str(folder), *chosen)
    model = mscnn.load_model(folder / "multistage_cnn_model.keras")
    assert (model.network, model.image_size) == (stage1, 48) and model.is_calibrated
    assert 0 <= read(folder, "metrics")["two_stage"]["aurc"] < 1


@pytest.mark.slow
def test_stage2_only_keeps_stage1_and_the_other_categories(program, tmp_path):
    folder, _, options = program
    path = folder / "multistage_cnn_model.keras"
    shutil.copy(path, tmp_path / "before.keras")
    printed = run_program(*options, "--stage2_only", "--stage2_categories", "ship,4,ship")
    assert "Stage 1 frozen, categories ship, dog only" in printed
    before, after = (mscnn.load_model(one).fingerprints() for one in (tmp_path / "before.keras", path))
    moved = {part for part in before if before[part] != after[part]}
    assert moved <= {f"{part}/{name}" for part in ("stage2", "calibration") for name in ("ship", "dog")}
    check_metrics(folder)


@pytest.mark.slow
def test_a_run_continues_from_a_model_in_another_folder(chain, tmp_path):
    settings = read(chain, "metrics")["parameters"]
    model = chain / "multistage_cnn_model.keras"
    content = model.read_bytes()
    printed = run_program(
        "--epochs", "1", "--dataset", settings["dataset"], "--run_dir", str(tmp_path / "run"),
        "--load_model", str(model), "--save_model", "continued",
    )  # fmt: skip
    assert "both stages are trainable" in printed
    assert model.read_bytes() == content
    assert (tmp_path / "run" / "continued.keras").is_file()
    one, other = read(chain, "metrics"), read(tmp_path / "run", "metrics")
    assert other["stage1"]["accuracy"] > one["stage1"]["accuracy"] - 0.15, "one epoch from scratch would be far below"
