"""Working copies of the notebooks, so that running and changing them leaves the program as it is.

python -m mscnn_parts.lab            make the copies that are missing in runs/lab/notebooks
python -m mscnn_parts.lab --fresh    move the old copies aside first
"""

from __future__ import annotations

import datetime
import shutil
import sys
from pathlib import Path

from mscnn_parts.files import notebooks_folder, project_root


def make_working_copies(source: Path, target: Path, fresh: bool = False) -> list[str]:
    """Copies the notebooks and drawings that `target` lacks; what is there, and perhaps changed, stays as it is.

    Args:
        fresh: move the folder `target` aside first, to `target` and the time.

    Returns:
        Names of notebooks in `target` that differ from those in `source`: changed by the reader, or older.
    """
    if fresh and target.exists():
        target.rename(target.with_name(f"{target.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"))
    (target / "images").mkdir(parents=True, exist_ok=True)
    for path in source.glob("images/*.svg"):
        shutil.copyfile(path, target / "images" / path.name)
    notebooks = sorted(source.glob("*.ipynb"))
    for path in notebooks:
        if not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
    return [path.name for path in notebooks if (target / path.name).read_bytes() != path.read_bytes()]


if __name__ == "__main__":
    place = project_root() / "runs/lab/notebooks"
    differing = make_working_copies(notebooks_folder(), place, "--fresh" in sys.argv[1:])
    print(f"Working copies of the notebooks: {place}")
    if differing:
        print(
            f"Different from the project's, and kept: {', '.join(differing)}. make lab FRESH=1 starts with new copies."
        )
