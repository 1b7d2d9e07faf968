"""The command line: runs the notebooks by papermill, and says what came out."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from mscnn_parts.commands import COMMANDS, Parser
from mscnn_parts.decision import OUT_OF_DISTRIBUTION
from mscnn_parts.downloads import data_folder
from mscnn_parts.execution import Refused, run_notebook
from mscnn_parts.files import (
    alone_in,
    code_folder,
    current_folder,
    kept_if_refused,
    project_root,
    without_new_folders,
)
from mscnn_parts.output import closed_output_ignored, let_output_fail, print_anyway
from mscnn_parts.pages import link_pages
from mscnn_parts.run_folder import (
    ALL_NOTEBOOKS,
    INDEPENDENT_NOTEBOOKS,
    NOTEBOOKS,
    RESULTS,
    Run,
    check_folders,
    continued_settings,
    make_run_folders,
    now_text,
    settled,
)
from mscnn_parts.settings import FALLBACK_NOTICE, OTHER, VERSION, MSCNNError, Settings
from mscnn_parts.sources import find_cifar10
from mscnn_parts.thresholds import Certificate

EARLIER = "Results and figures are those of the earlier run again: begin anew with the same command."
KEPT = "What is finished lies in the run folder; a finished model is still whole."


@contextlib.contextmanager
def _surroundings():
    """What kernels inherit: whose notebooks they run, where data lies, and a home."""
    if current_folder() is None:  # papermill asks for it
        os.chdir(project_root())
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        wanted = {"MSCNN_PROJECT": str(code_folder())}  # read by the set-up cell
        with contextlib.suppress(MSCNNError):
            wanted["MSCNN_DATA_DIR"] = str(data_folder())
        if not os.path.isabs(os.path.expanduser("~")):  # no home is known, and Jupyter needs one
            wanted["HOME"] = folder
        earlier = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in earlier.items():
                del os.environ[name]
                if value is not None:
                    os.environ[name] = value


@contextlib.contextmanager
def _ending_written_down(run: Run):
    """Writes into `metrics.json` how a run that has begun ended, if not well."""
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        ending = {"status": "interrupted"} if interrupted else {"status": "failed", "reason": str(error) or repr(error)}
        with contextlib.suppress(MSCNNError):  # the reason is in `error`
            if run.read("metrics").get("status") == "running":
                run.write("metrics", ended=now_text(), **ending)
        raise


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which is to end a run as Ctrl-C does."""


def _terminate(*_) -> None:
    raise _Terminated


def run_all(settings: Settings, notebooks: Sequence[str] = NOTEBOOKS, given: Collection[str] = ()) -> float:
    """Runs the notebooks in order: they are the program. Returns the seconds that they took.

    Until the first has run, and 01 and 02 where they do, a refusal leaves an earlier run's results as they were; so
    does Ctrl-C, if that run was finished.

    Args:
        given: names of the parameters that the user has given.
    """
    started, run, settings = time.time(), Run("total", settings), settled(settings)
    checking = [name for name in notebooks if name in NOTEBOOKS[:2]] or notebooks[:1]
    undoes = checking[0] in NOTEBOOKS[:2] and _was_finished(run)  # later ones replace the model, too
    refusals = (Refused, KeyboardInterrupt) if undoes else (Refused,)

    def run_one(name: str) -> None:
        own = _of_run_folder(settings, given) if name in INDEPENDENT_NOTEBOOKS else settings
        try:
            run_notebook(name, own, pages, notebooks, given)
        except KeyboardInterrupt as error:
            left = _how_to_go_on(name, notebooks, settings, given)
            error.args = (EARLIER,) if undoes and name in checking else (KEPT, *filter(None, [left]))
            raise

    # A page is made while the next notebook runs.
    with _ending_written_down(run), _surroundings(), concurrent.futures.ThreadPoolExecutor(1) as pages:
        # Models are not among the results: each is replaced when a new one is whole.
        with without_new_folders(run.model_path.parent), kept_if_refused(run.folder, RESULTS, refusals, pages.shutdown):
            make_run_folders(run)
            for name in checking:
                run_one(name)
        for name in notebooks[len(checking) :]:
            run_one(name)
    with contextlib.suppress(OSError, UnicodeError):  # a page that is there stays as it is
        link_pages(run.folder / "notebooks")
    seconds = round(time.time() - started, 1)
    if not set(notebooks) <= set(INDEPENDENT_NOTEBOOKS):
        run.write("metrics", seconds={**run.read("metrics").get("seconds", {}), "total": seconds})
    return seconds


def _was_finished(run: Run) -> bool:
    with contextlib.suppress(MSCNNError):  # a damaged record begins anew
        return run.read("metrics").get("status") == "finished"
    return False


def _how_to_go_on(name: str, notebooks: Sequence[str], settings: Settings, given: Collection[str]) -> str:
    """The command that goes on with a notebook; notebook 01 leaves the parameters in the run folder for the others."""
    if name == NOTEBOOKS[0]:
        return ""
    options, repeated = [], set() if NOTEBOOKS[0] in notebooks else set(given)
    for parameter in sorted({*repeated, "run_dir"}):
        value = getattr(settings, parameter)
        flag = f"--{parameter}" if value else f"--no-{parameter}"
        options.append(flag if isinstance(value, bool) else f"--{parameter} {shlex.quote(str(value))}")
    left = ",".join(one.split("_")[0] for one in notebooks[notebooks.index(name) :])
    return f"Go on with: {' '.join([_program(), *options])} --notebooks {left}"


def _program() -> str:
    """What to type for this command line; where `python` is another one, as behind `make run`, the path of this one."""
    program = command_line().prog
    if program.startswith("python ") and shutil.which("python") != sys.executable:
        return program.replace("python", shlex.quote(os.path.relpath(sys.executable)), 1)
    return program


def _of_run_folder(settings: Settings, given: Collection[str]) -> Settings:
    """The settings of a notebook that needs no other: what is given, and the rest from the run folder."""
    return continued_settings({name: getattr(settings, name) for name in {*given, "run_dir"}}, independent=True)


def print_pages(run: Run, notebooks: Sequence[str], seconds: float) -> None:
    """The end of a run without notebook 05, which evaluates: how long it took, and its pages."""
    print(f"{seconds:.0f} s. Where to look:")
    for name in notebooks:
        print(f"  {run.folder / 'notebooks' / name}.html")


def print_result(run: Run) -> None:
    """The end of a run: the report of the 11 categories, the figures that matter, and where to look."""
    metrics = run.read("metrics")
    stage1, two_stage = metrics["stage1"], metrics["two_stage"]
    data = metrics["dataset"]
    print(f"\n{run.require('metrics', 'report', NOTEBOOKS[4])}")
    print(f"No image is {OTHER} in truth: here {OTHER} is a rejection, see the two readings in notebook 05. Its row of")
    print("zeros counts in the macro avg.\n")
    print(f"Data: {data['name']}{' (light mode)' if data['light_mode'] else ''}, {data['sizes']['test']} test images")
    if data["fallback"]:
        print(FALLBACK_NOTICE)
    print(f"Accuracy of Stage 1 {stage1['accuracy']:.1%}, of all answers {two_stage['accuracy']:.1%}. ", end="")
    print(f"At threshold {two_stage['threshold']:.4g}: ", end="")
    accuracy = two_stage["selective_accuracy"]
    accepted = "nothing is accepted" if accuracy is None else f"{accuracy:.1%} correct"
    print(f"{two_stage['coverage']:.1%} of the images accepted, of these {accepted}.")
    retrained = run.read("history").get("retraining", {}).get("results", {})
    if retrained:
        ends = [f"category {name} ({'kept' if end['kept'] else 'rolled back'})" for name, end in retrained.items()]
        print(f"Retrained: {', '.join(ends)}.")
    if metrics.get("certificate"):
        print(Certificate(**metrics["certificate"]).text())
    alone = f"of Stage 1 alone, on a single view and by its softmax, {stage1['aurc']:.4f}"
    print(f"Area under the risk-coverage curve: {two_stage['aurc']:.4f}; {alone}.")
    if metrics.get("unnoticed"):
        kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in metrics["unnoticed"].items())
        print(f"{OTHER} does not notice everything. Accepted, though they show no category (notebook 05b): {kinds}.")
    if two_stage.get("ood_rejection_rate"):
        rejected = f"{two_stage['ood_rejection_rate']:.1%} of the test images"
        print(f"Rejected as {OUT_OF_DISTRIBUTION}, though they show a category: {rejected}.")
    if data["sizes"]["calibration"] < 20 * len(data["category_names"]):
        print(f"Confidences are rough: only {data['sizes']['calibration']} images were there to calibrate them.")
    print(f"{metrics['seconds']['total']:.0f} s. Where to look: {run.folder}")
    print("  notebooks/05_evaluation_and_cam.html   the whole evaluation\n  figures/ · metrics.json · history.json")
    if os.path.isfile(run.model_path):
        print(f"New pictures: {_program()} decide {shlex.quote(str(run.model_path))} PICTURES...")


def command_line() -> argparse.ArgumentParser:
    """The parser, made from `Settings`, so that names, types and defaults are the same everywhere."""
    name = "mscnn" if Path(sys.argv[0]).stem == "mscnn" else "python mscnn_helpers.py"  # installed by pip, or not
    parser = Parser(
        [*COMMANDS, "run"],
        prog=name,
        usage=f"{name} [options]\n       {name} decide MODEL PICTURES...\n       {name} info MODEL",
        description="Trains and evaluates a two-stage image classifier that says OTHER when it should,\n"
        "by running the notebooks 01 to 05 into a run folder. decide and info take a finished model; see their --help.",
        epilog="examples:\n"
        f"  a first look, minutes       {name} --epochs 5 --light_mode\n"
        f"  then retrain two of it      {name} --epochs 5 --light_mode --stage2_only --stage2_categories ship,truck\n"
        f"  all data, the best recipe   {name} --epochs 0 --batch_size 0\n"
        f"  your own images             {name} --dataset path/to/folder --epochs 0 --batch_size 0 --run_dir runs/mine",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--notebooks",
        default="main",
        metavar="STR",
        help="main: 01 to 05; all: the optional ones, too; 04,05: these (default: main)",
    )
    parser.add_argument("--version", action="version", version=f"MSCNN {VERSION}")
    for parameter in dataclasses.fields(Settings):
        says_nothing = parameter.default is False or parameter.default == ""  # but 0 does
        text = parameter.metadata["help"] + ("" if says_nothing else f" (default: {parameter.default})")
        if parameter.type == "bool":
            action = argparse.BooleanOptionalAction if parameter.default else "store_true"
            parser.add_argument(f"--{parameter.name}", action=action, default=argparse.SUPPRESS, help=text)
        else:
            kind = {"int": int, "float": float, "str": str}[str(parameter.type)]
            kinds = {"type": kind, "default": argparse.SUPPRESS, "metavar": str(parameter.type).upper()}
            parser.add_argument(f"--{parameter.name}", **kinds, help=text)
    return parser


def parse(arguments: Sequence[str]) -> tuple[Settings, Sequence[str], Collection[str]]:
    """The parameters and the notebooks that command line arguments ask for, and the names of parameters among them.

    Raises:
        MSCNNError: a value is wrong. SystemExit: an option is; argparse has printed how it is used.
    """
    values = vars(command_line().parse_args([*map(_with_underscores, arguments)]))
    notebooks = _chosen_notebooks(values.pop("notebooks"))
    return Settings(**values), notebooks, tuple(values)


def _chosen_notebooks(text: str) -> Sequence[str]:
    """The notebooks that `--notebooks` asks for, in their order."""
    if text in ("main", "all"):
        return NOTEBOOKS if text == "main" else ALL_NOTEBOOKS
    numbers = [number.strip() for number in text.split(",")]
    known = {name.partition("_")[0]: name for name in ALL_NOTEBOOKS}
    for number in numbers:
        if number not in known:
            raise MSCNNError(f"--notebooks is {text}: use main, all, or numbers among {', '.join(known)}.")
    return [name for number, name in known.items() if number in numbers]


def _with_underscores(argument: str) -> str:
    """`--light-mode` means `--light_mode`; only `--no-` begins with hyphens."""
    name = re.sub(r"^--[\w-]+", lambda option: "--" + option[0][2:].replace("-", "_"), argument)
    return re.sub("^--no_", "--no-", name)


def _run_command(name: str, *arguments: str) -> int:
    code = 128 + 13  # what a shell reports of a program that writes into a pipe which is closed (SIGPIPE)
    try:
        with closed_output_ignored():
            code = COMMANDS[name](arguments)
    except MSCNNError as error:
        print_anyway(f"error: {error}", error=True)
        return 1
    except KeyboardInterrupt:
        print_anyway("\ninterrupted.", error=True)
        return 130
    return code


def _validate(settings: Settings, notebooks: Sequence[str], given: Collection[str]) -> None:
    """Refuses what a notebook would refuse, before one takes the place of an older one.

    Raises:
        MSCNNError: see `validate_run` and `validate_continued`.
    """
    import mscnn_helpers  # noqa: F401 - so that the class of the model is registered; it loads TensorFlow
    from mscnn_parts.runs import begins_here, validate_continued, validate_run

    run, begins = Run("total", settings), NOTEBOOKS[0] in notebooks
    alone = set(notebooks) <= set(INDEPENDENT_NOTEBOOKS)
    if not begins and not alone:
        run = Run("total", continued_settings({name: getattr(settings, name) for name in given}))
        begins = begins_here(run)
    if alone:
        check_folders(Run("total", _of_run_folder(settings, given)))
    elif not begins:
        validate_continued(run)
    elif settings.dataset != "auto" or os.path.isdir(run.folder) or find_cifar10():
        validate_run(run)
    else:  # there is no older one, and a download that fails would be tried twice
        run.starting_model()
        check_folders(run)


def _validate_apart(*arguments) -> None:
    """As `_validate`, in a process that gives back its memory, half a gigabyte with TensorFlow, before the training."""
    if "tensorflow" in sys.modules:
        _validate(*arguments)
        return
    sys.stdout.flush()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_refusal, args=(sender, *arguments))
    try:
        with _signals_held_back():  # one half-started would wait for ever; and Ctrl-C is for this process alone
            process.start()
        sender.close()  # so that a process that dies is noticed
        refusal = receiver.recv()
    except EOFError:
        refusal = MSCNNError("The process that checks the parameters died, most often because the memory is used up.")
    finally:
        if process.pid:
            process.kill()
            process.join()
    if refusal:
        raise refusal


@contextlib.contextmanager
def _signals_held_back():
    """Ctrl-C and SIGTERM arrive when the block is over; a process that it starts never gets them. Not on Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    usual = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, usual)


def _send_refusal(sender: multiprocessing.connection.Connection, *arguments) -> None:
    let_output_fail()
    refusal = None
    try:
        _validate(*arguments)
    except Exception as error:
        refusal = error
    sys.stdout.flush()
    sender.send(refusal)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 after an error that is printed, else as a shell has it (130)."""
    let_output_fail()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["run"]:
        del arguments[0]
    if arguments and arguments[0] in COMMANDS:
        return _run_command(*arguments)
    in_main_thread = threading.current_thread() is threading.main_thread()  # no other may set a signal's handler
    usual = signal.signal(signal.SIGTERM, _terminate) if in_main_thread else None
    try:
        settings, notebooks, given = parse(arguments)  # --help answers here, without TensorFlow
        run = Run("total", settings)
        with alone_in(run.folder):
            if not arguments:
                print_anyway(
                    f"{settings.epochs} epochs on all data take hours. A first look, minutes: --epochs 5 --light_mode."
                )
            _validate_apart(settings, notebooks, given)
            if settings.load_model and not settings.stage2_only and NOTEBOOKS[1] in notebooks:
                print_anyway(f"Both stages of {settings.load_model} are trained further; --stage2_only keeps Stage 1.")
            seconds = run_all(settings, notebooks, given)
        with closed_output_ignored():
            print_result(run) if NOTEBOOKS[-1] in notebooks else print_pages(run, notebooks, seconds)
    except MSCNNError as error:
        print_anyway(f"\nerror: {error}", error=True)
        return 1
    except KeyboardInterrupt as error:
        print_anyway("\n".join(["\ninterrupted.", *error.args]), error=True)
        return 143 if isinstance(error, _Terminated) else 130
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, usual)
    return 0
