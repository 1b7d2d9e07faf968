"""Write the repository's address and ref, from pyproject.toml, into every notebook and README.

python .github/badges.py            rewrite what differs
python .github/badges.py --check    change nothing; exit 1 and list what differs
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLAB = "https://colab.research.google.com"
LINK = re.compile(COLAB + r'/github/[^\s()"\\]+/notebooks/([\w.-]+\.ipynb)')
IMAGE = rf"(\[!\[Open In Colab\]\((?:{COLAB}/assets|images)/colab-badge\.svg\)\])"  # a notebook's is there offline, too
BADGE = re.compile(rf"{IMAGE}\({LINK.pattern}\)")
# In a notebook, which is JSON, the quotes have a backslash before them.
CLONE = re.compile(r"git clone https://\S+\ncd [\w.-]+")
SETUP = re.compile(r'REPOSITORY, REF = (\\?")[^"\\]*\\?", \\?"[^"\\]*\\?"')


def settings() -> tuple[str, str]:
    """(address, ref) of `[tool.mscnn]`. By pattern, because Python 3.10 has no TOML reader."""
    section = (ROOT / "pyproject.toml").read_text("utf-8").split("[tool.mscnn]\n")[1].split("\n[")[0]
    values = dict(re.findall(r'^(\w+) = "(.+)"$', section, re.M))
    return values["repository"], values["ref"]


def rewritten(text: str, notebook: str | None, repository: str, ref: str) -> str:
    """`text` with this address and ref; the badge of a notebook opens that notebook.

    Works on the raw text, so that a notebook's layout and cell ids stay as they are.
    """
    folder = f"{COLAB}/github/{repository.removeprefix('https://github.com/')}/blob/{ref}/notebooks"
    text = LINK.sub(lambda found: f"{folder}/{found[1]}", text)
    text = BADGE.sub(lambda found: f"{found[1]}({folder}/{notebook or found[2]})", text)
    clone = f"git clone {repository}.git\ncd {repository.split('/')[-1]}"
    text = CLONE.sub(lambda found: clone, text)
    setup = "REPOSITORY, REF = {0}{1}{0}, {0}{2}{0}"
    return SETUP.sub(lambda found: setup.format(found[1], repository, ref), text)


def problems(text: str, is_notebook: bool) -> list[str]:
    """What rewriting cannot mend: there has to be something to rewrite."""
    missing = [] if BADGE.search(text) else ["has no 'Open In Colab' badge"]
    if is_notebook and not SETUP.search(text):
        missing.append('has no line REPOSITORY, REF = "…", "…" in its set-up cell')
    return missing


def main(check: bool) -> int:
    """Rewrite, or only check; return the exit status."""
    repository, ref = settings()
    complaints = []
    for path in [*sorted(ROOT.glob("README*.md")), *sorted(ROOT.glob("notebooks/*.ipynb"))]:
        is_notebook = path.suffix == ".ipynb"
        old = path.read_text("utf-8")
        new = rewritten(old, path.name if is_notebook else None, repository, ref)
        complaints += [f"{path.relative_to(ROOT)} {problem}" for problem in problems(new, is_notebook)]
        if new == old:
            continue
        if check:
            complaints.append(f"{path.relative_to(ROOT)} differs from pyproject.toml: run make badges")
        else:
            path.write_text(new, "utf-8", newline="\n")
            print(f"{path.relative_to(ROOT)} rewritten")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return int(bool(complaints))


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    sys.exit(main(check="--check" in sys.argv))
