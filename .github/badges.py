"""Write the addresses of the repository and of its website, from pyproject.toml, into notebooks and READMEs.

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
WORKFLOW = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+(/actions/workflows/)")
CLONE = re.compile(r"git clone https://\S+\ncd [\w.-]+")
# What a README offers to read: a link in each row of its table of notebooks, and one behind `make site`.
ROW = re.compile(r"^(\| \[[^\]]+\]\(notebooks/(\w+)\.ipynb\) \|.*\| )(?:\[[^\]!]+\]\([^)]+\) · )?(?=\[!\[)", re.M)
SENTENCE = re.compile(r"^(`make site` .*?)(?: \[[^\]]+\]\([^)]+\))?$", re.M)
READ = {"README.md": ("read online", "Read it online."), "README.ja.md": ("読む", "オンラインで読む")}
SETUP = re.compile(r'REPOSITORY, REF = (\\?")[^"\\]*\\?", \\?"[^"\\]*\\?"')


def settings() -> tuple[str, str, str]:
    """(address, ref, the website's address or "") of `[tool.mscnn]`. By pattern: Python 3.10 has no TOML reader."""
    section = (ROOT / "pyproject.toml").read_text("utf-8").split("[tool.mscnn]\n")[1].split("\n[")[0]
    values = dict(re.findall(r'^(\w+) = "(.*)"$', section, re.M))
    return values["repository"], values["ref"], values.get("site", "").rstrip("/")


def rewritten(text: str, notebook: str | None, repository: str, ref: str) -> str:
    """`text` with this address and ref; the badge of a notebook opens that notebook.

    Works on the raw text, so that a notebook's layout and cell ids stay as they are.
    """
    folder = f"{COLAB}/github/{repository.removeprefix('https://github.com/')}/blob/{ref}/notebooks"
    text = LINK.sub(lambda found: f"{folder}/{found[1]}", text)
    text = BADGE.sub(lambda found: f"{found[1]}({folder}/{notebook or found[2]})", text)
    clone = f"git clone {repository}.git\ncd {repository.split('/')[-1]}"
    text = CLONE.sub(lambda found: clone, text)
    text = WORKFLOW.sub(lambda found: repository + found[1], text)
    setup = "REPOSITORY, REF = {0}{1}{0}, {0}{2}{0}"
    return SETUP.sub(lambda found: setup.format(found[1], repository, ref), text)


def with_website(text: str, site: str, row: str, sentence: str) -> str:
    """A README with links to the website, of these names, or without where `site` is empty."""
    text = ROW.sub(lambda found: found[1] + (f"[{row}]({site}/{found[2]}.html) · " if site else ""), text)
    return SENTENCE.sub(lambda found: found[1] + (f" [{sentence}]({site}/)" if site else ""), text)


def problems(text: str, is_notebook: bool) -> list[str]:
    """What rewriting cannot mend: there has to be something to rewrite."""
    missing = [] if BADGE.search(text) else ["has no 'Open In Colab' badge"]
    if is_notebook and not SETUP.search(text):
        missing.append('has no line REPOSITORY, REF = "…", "…" in its set-up cell')
    return missing


def main(check: bool) -> int:
    """Rewrite, or only check; return the exit status."""
    repository, ref, site = settings()
    complaints = []
    for path in [*sorted(ROOT.glob("README*.md")), *sorted(ROOT.glob("notebooks/*.ipynb"))]:
        is_notebook = path.suffix == ".ipynb"
        old = path.read_text("utf-8")
        new = rewritten(old, path.name if is_notebook else None, repository, ref)
        new = with_website(new, site, *READ[path.name]) if path.name in READ else new
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
