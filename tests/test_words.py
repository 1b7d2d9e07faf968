"""The project speaks the field's language: no retired name in the code, no retired phrase in what a reader reads."""

import ast
import json
import re

from conftest import ROOT, SOURCES

RETIRED = set(
    re.findall(
        r"\w+",
        """
    STRANGE UNSURE GIVEN threshold_reason Known learn_known known_features known_scale signs_of_novelty NOVEL_SHARE
    OWN_SHARE Opinions Views stage1_views one_view_logits made_up_images common_row fit_common_row fit_category_rows
    COMMON_PRIOR COMMON_STRENGTH ROW_STRENGTH combined_log_odds error_bound check_enough_to_certify error_at_coverage
    coverage_at_error stage_truth with_interval draw_stage2_images both_splits new_stage2 stage2_of void_calibration
    recipe_for stage2_share muon_for stage2_muon_for orthogonalised as_matrix Triangle EpochSeconds SmallCropsFirst
    KeepBestWeights steps_per_call ROUNDS start_data continue_data checked_data open_model in_notebook_of_a_person
    stage2_is_kept _write_whole _parted _flattened DOWNLOAD_PATIENCE LIGHT_FLOOR MAP_COLOURS side_by_side
    images_in_a_row Retraining companion train_companion companion_epochs like_nothing_known novelty familiar
    load_model_for sigmoid brier_score
    """,
    )
)
PHRASES = re.compile(r"two looks|second opinion|companion|like nothing I know|honest report", re.IGNORECASE)


def cells(kinds: set[str]) -> dict[str, str]:
    """The text of the notebooks' cells of these kinds, by the notebook's name."""
    notebooks = {path.name: json.loads(path.read_text("utf-8"))["cells"] for path in ROOT.glob("notebooks/*.ipynb")}
    return {
        name: "\n".join("".join(cell["source"]) for cell in found if cell["cell_type"] in kinds)
        for name, found in notebooks.items()
    }


def read(*paths) -> dict[str, str]:
    return {path.name: path.read_text("utf-8") for path in paths}


def names_in(source: str) -> set[str]:
    """The names that are defined, used as attribute or argument, or imported."""
    fields = ("id", "attr", "arg", "name", "asname")
    return {getattr(node, field, None) for node in ast.walk(ast.parse(source)) for field in fields} - {None}


def test_no_retired_name_is_in_the_code():
    modules = read(*SOURCES, *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/*.py"))
    found = {place: names_in(source) & RETIRED for place, source in {**modules, **cells({"code"})}.items()}
    assert not {place: names for place, names in found.items() if names}


def test_no_retired_phrase_is_in_what_a_reader_reads():
    texts = read(*SOURCES, ROOT / "README.md", *ROOT.glob("benchmarks/*.md"))
    found = {place: PHRASES.findall(text) for place, text in {**texts, **cells({"code", "markdown"})}.items()}
    assert not {place: phrases for place, phrases in found.items() if phrases}
