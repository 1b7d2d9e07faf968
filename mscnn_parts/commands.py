"""Commands for a finished model: decide on pictures, and say what the model is."""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn

import numpy as np

from mscnn_parts.decision import ACCEPTED, LOW_CONFIDENCE
from mscnn_parts.files import path_from, write_atomically
from mscnn_parts.pictures import IMAGE_SUFFIXES, SYSTEM_ENTRIES, read_image
from mscnn_parts.settings import OTHER, MSCNNError, check_threshold, did_you_mean
from mscnn_parts.zoo import OWN, network_named

if TYPE_CHECKING:
    from mscnn_parts.model import MultiStageCNN

BATCH = 128  # pictures in memory at a time: with those of 160 pixels a process stays below 1 GB
NOT_MEASURED = "not known: no metrics.json of notebook 05 about this model lies beside its file"
IN_METRICS = ("accuracy", "coverage", "selective_accuracy")  # of the two stages
ON_CARD = ("accuracy of all answers", "coverage", "accuracy of the accepted")
COLUMNS = ("path", "decision", "reason", "confidence", "stage1", "ood_score", "error")


def pictures_in(places: Iterable[str]) -> tuple[list[Path], int]:
    """The picture files that are named, and how many files of the folders are no pictures by their names.

    A place is a file, a folder with all pictures in it and below it, or `-` for a list of places on stdin. What the
    system leaves in folders, such as `._a.png`, is nothing. A folder without a picture stands for itself.
    """
    pictures, others = [], 0
    for place in places:
        if place == "-":
            found, left_out = pictures_in(line.strip() for line in sys.stdin if line.strip())
        else:
            path = path_from(place, Path())
            files = [one for one in path.rglob("*") if one.is_file() and not _of_the_system(one.relative_to(path))]
            found = sorted(one for one in files if one.suffix.lower() in IMAGE_SUFFIXES)
            left_out, found = len(files) - len(found), found or [path]
        pictures, others = pictures + found, others + left_out
    return pictures, others


def _of_the_system(path: Path) -> bool:
    return path.name.startswith(".") or any(SYSTEM_ENTRIES.match(part) for part in path.parts[:-1])


def _empty(folder: Path) -> MSCNNError:
    return MSCNNError(f"There is no picture in {folder}: files end in {', '.join(sorted(IMAGE_SUFFIXES))}.")


def decide_on_files(model: MultiStageCNN, paths: Iterable[Path], threshold: float | None = None) -> Iterator[dict]:
    """A row of COLUMNS for each picture, in order; what cannot be read is a row with an error."""
    names, remaining = [*model.category_names, OTHER], iter(paths)
    while batch := list(itertools.islice(remaining, BATCH)):
        rows, images = [], []
        for path in batch:
            rows.append(dict.fromkeys(COLUMNS) | {"path": str(path)})
            try:
                if path.is_dir():
                    raise _empty(path)
                images.append(read_image(path, model.image_shape))
            except MSCNNError as error:
                rows[-1]["error"] = str(error)
        readable = [row for row in rows if row["error"] is None]
        if readable:
            decisions = model.decide(np.stack(images), threshold)
            reasons = decisions.reasons()
            for i, row in enumerate(readable):
                row |= {
                    "decision": names[decisions.category[i]],
                    "reason": str(reasons[i]),
                    "confidence": round(float(decisions.confidence[i]), 4),
                    "stage1": names[decisions.stage1_category[i]],
                    "ood_score": round(float(decisions.ood_score[i]), 4),
                }
        yield from rows


def _write_rows(rows: Iterable[dict], file: IO[str], suffix: str) -> None:
    """Writes rows as CSV, or as JSON lines if the suffix says so."""
    if suffix == ".jsonl":
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return
    table = csv.DictWriter(file, COLUMNS)
    table.writeheader()
    table.writerows(rows)


def _line(row: dict) -> str:
    """A row in words. What is out of distribution gets no confidence, which would mean little."""
    if row["error"]:
        return f"error: {row['error']}"  # which names the path
    correct, score = f"correct with probability {row['confidence']:.1%}", f"OOD score {row['ood_score']:.2f}"
    if row["reason"] == ACCEPTED:
        return f"{row['path']}: {row['decision']} ({correct}; {score})"
    answer = f"Stage 1 says {row['stage1']}"
    why = f"{answer}, {correct}" if row["reason"] == LOW_CONFIDENCE else f"unlike the train images; {answer}"
    return f"{row['path']}: {row['decision']} ({row['reason']}: {why}; {score})"


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated options, and suggests what a misspelled one may mean.

    Args:
        words: commands, which come before all options.
    """

    def __init__(self, words: Iterable[str] = (), **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)
        self.words = words

    def error(self, message: str) -> NoReturn:
        if message.startswith(start := "unrecognized arguments: "):
            misspelled = message.removeprefix(start).split()[0].partition("=")[0]
            hint = did_you_mean(misspelled, (*self.words, *self._option_string_actions))
            hint = f" Put {misspelled} first." if misspelled in self.words else hint
            message += f".{hint}" if hint else ""
        super().error(message)


def decide(arguments: Sequence[str]) -> int:
    """`mscnn decide MODEL PATHS... [--csv FILE] [--threshold T]`. Returns 1 if a picture could not be read."""
    parser = Parser(prog="mscnn decide", description="Decides on pictures with a finished model.")
    parser.add_argument("model", help="a .keras file of a finished run, or pretrained")
    parser.add_argument("paths", nargs="+", help="pictures, folders of pictures, or - for a list on standard input")
    parser.add_argument("--csv", help="write a table instead: .csv, or .jsonl for JSON lines")
    parser.add_argument("--threshold", type=float, help="in place of the model's own")
    given = parser.parse_args(arguments)
    if given.threshold is not None:
        check_threshold(given.threshold)
    suffix = Path(given.csv or "table.csv").suffix
    if suffix not in (".csv", ".jsonl"):
        raise MSCNNError(f"--csv is {given.csv}: give a name that ends in .csv or .jsonl.")
    from tqdm import tqdm

    import mscnn_helpers as mscnn

    model = mscnn.load_model(given.model)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    (pictures, others), errors = pictures_in(given.paths), []
    if pictures and all(path.is_dir() for path in pictures):
        raise _empty(pictures[0])
    if others:
        print(f"Files left out, which are no pictures by their names: {others}", file=sys.stderr)

    def rows() -> Iterator[dict]:
        found = decide_on_files(model, pictures, given.threshold)
        for row in tqdm(found, total=len(pictures), disable=None, unit="picture"):
            if row["error"] is not None:
                errors.append(row)
            yield row

    if not given.csv:
        for row in rows():
            tqdm.write(_line(row), file=sys.stdout)
        return int(bool(errors))

    def write(partial: Path) -> None:
        with open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            _write_rows(rows(), file, suffix)

    write_atomically(path_from(given.csv, Path()), write)
    print(f"Pictures decided: {len(pictures) - len(errors)}, not read: {len(errors)}. Table: {given.csv}")
    if errors:
        print(f"Not read, for example: {errors[0]['error']}", file=sys.stderr)
    return int(bool(errors))


def info(arguments: Sequence[str]) -> int:
    """`mscnn info MODEL`: the model's card."""
    parser = Parser(prog="mscnn info", description="Says what a finished model is.")
    parser.add_argument("model", help="a .keras file of a finished run, or pretrained")
    given = parser.parse_args(arguments)
    import mscnn_helpers as mscnn
    from mscnn_parts.model_files import model_path

    model = mscnn.load_model(given.model)
    print(card(model, model_path(given.model)))
    return 0


def card(model: MultiStageCNN, path: Path | None = None) -> str:
    """What a model is, printable: data, categories, networks, accuracy, threshold, guarantee, fingerprints.

    Args:
        path: of its file, beside which lies what was measured of it.
    """
    from mscnn_parts.thresholds import threshold_text

    config, names, fingerprints = model.get_config(), model.category_names, model.fingerprints()
    mode = "light mode, " if config["light_mode"] else ""
    weights, small = model.stage1.count_params(), model.stage2_cnn(0).count_params()
    shared = model.stage2_base.count_params() - small
    own = f"{small:,}" + (f" behind {shared:,} that they share" if shared else "")
    network = network_named(model.network)
    kind = "CNNs" if model.stage2_branch >= 0 else "heads"
    lines = {
        "data": f"{model.dataset} ({mode}seed {config['seed']}), fingerprint {model.data_fingerprint[:16]}",
        "categories": f"{len(names)}: {', '.join(names)}",
        "images": _images_text(model),
        "stage1": network.text if network is OWN else f"{model.network}: {network.text}",
        "networks": f"Stage 1 {weights:,} values, each of {len(names)} Stage 2 {kind} {own}; {model.policy}",
        "stage2": _stage2_text(model),
        "accuracy": _accuracy_text(path, fingerprints) if path else NOT_MEASURED,
        "threshold": threshold_text(model) if model.is_calibrated else "not calibrated yet: run notebook 03",
    }
    parts = [f"  {name:24} {value[:16]}" for name, value in fingerprints.items()]
    return "\n".join([*(f"{name:11} {text}" for name, text in lines.items()), "fingerprints", *parts])


def _images_text(model: MultiStageCNN) -> str:
    """Height, width and channels of the images, and the size that Stage 1 works at where it is another."""
    shape = " × ".join(map(str, model.image_shape))
    size = model.image_size
    return shape if size == model.image_shape[0] else f"{shape}, enlarged by Stage 1 to {size} × {size}"


def _accuracy_text(path: Path, fingerprints: dict[str, str]) -> str:
    """Accuracy on the test split, if what was measured of just this model lies beside its file.

    That is a run's metrics.json, or the card of the pretrained model.
    """
    metrics, record = (_read(one) for one in (path.with_name("metrics.json"), path.with_suffix(".json")))
    if metrics.get("model") == fingerprints and "two_stage" in metrics:
        single, figures, names = metrics["stage1"]["accuracy"], metrics["two_stage"], IN_METRICS
        threshold = figures["threshold"]
    elif record.get("fingerprints") == fingerprints:
        figures, names, threshold = record["figures"], ON_CARD, record["threshold"]
        single = figures["accuracy of Stage 1, a single view"]
    else:
        return NOT_MEASURED
    answers, coverage, accepted = (figures[name] for name in names)
    correct = "" if accepted is None else f", of these {accepted:.1%} correct"
    where = f"at threshold {threshold:.4g}" if np.ndim(threshold) == 0 else "at thresholds by category"
    return (
        f"on the test split: Stage 1 {single:.1%} by a single view, all answers {answers:.1%}; "
        f"{where} {coverage:.1%} accepted{correct}"
    )


def _read(path: Path) -> dict:
    """A record in JSON; {} if there is none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _stage2_text(model: MultiStageCNN) -> str:
    """What the Stage 2 networks share, by `stage2_branch`."""
    branch = model.stage2_branch
    blocks = sum(layer.name.startswith("block") for layer in model.stage2_base.layers)
    share = f"CNNs that share {branch} of the {blocks} blocks of their base network"
    if branch <= 0:
        share = "heads on the features of Stage 1" if branch else f"whole CNNs of {blocks} blocks"
    return f"{share} (stage2_branch {branch})"


COMMANDS = {"decide": decide, "info": info}
