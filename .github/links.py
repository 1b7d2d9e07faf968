"""Check the links of all documents and notebooks.

python .github/links.py               relative links: the file and the heading are there
python .github/links.py --external    addresses: they answer (a scheduled workflow asks)
"""

import json
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(\s*([^()\s]+)\s*\)|(?:href|src)=\"([^\"]+)\"")
FENCED = re.compile(r"^```.*?^```|`[^`\n]*`", re.M | re.S)


def documents() -> list[Path]:
    folders = (ROOT, ROOT / "docs", ROOT / "benchmarks", ROOT / "notebooks", ROOT / "notebooks/pretrained")
    return [path for folder in folders for kind in ("*.md", "*.ipynb") for path in sorted(folder.glob(kind))]


def text_of(path: Path) -> str:
    """The Markdown of a document or of a notebook's text cells, without code."""
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return FENCED.sub("", text)


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives to a heading: lower case, hyphens for spaces, no other signs."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text_of(path), re.M)
    return {anchor_of(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)) for heading in headings}


def links(path: Path) -> list[str]:
    return [first or second for first, second in LINK.findall(text_of(path))]


def problem_of_relative(path: Path, link: str) -> str:
    target, _, anchor = link.partition("#")
    place = (path.parent / target).resolve() if target else path
    if not place.exists():
        return "no such file"
    known = anchor and place.suffix in (".md", ".ipynb")
    return "no such heading" if known and anchor not in anchors(place) else ""


def problem_of_address(address: str) -> str:
    request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0 (link check)"})
    try:
        with urllib.request.urlopen(request, timeout=30):
            return ""
    except urllib.error.HTTPError as error:
        return "" if error.code in (403, 429) else f"answers {error.code}"  # it is there, and lets no program in
    except OSError as error:
        return str(error)


def main(external: bool) -> int:
    found = [(path, link) for path in documents() for link in links(path)]
    complaints = []
    for path, link in found:
        is_address = re.match(r"https?:", link)
        if (external and is_address) or (not external and not re.match(r"[a-z]+:", link)):
            problem = problem_of_address(link) if is_address else problem_of_relative(path, link)
            complaints += [f"{path.relative_to(ROOT)}: {link}: {problem}"] * bool(problem)
    print("\n".join(sorted(set(complaints))), file=sys.stderr, end="\n" * bool(complaints))
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main(external="--external" in sys.argv[1:]))
