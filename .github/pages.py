"""Build the website in site/: the notebooks of a finished run, and the project's documents.

python .github/pages.py runs/NAME [FOLDER]

`make site` calls this. The pages need no script and no network. While `site` in pyproject.toml is empty, nothing is
published yet, and links to the repository or to Colab become plain text; links between the pages always work.
"""

import re
import shutil
import sys
from html import escape
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
from badges import COLAB, settings
from bs4 import BeautifulSoup, Tag
from links import anchor_of
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parent.parent
HOMES = {ROOT / "README.md": "index", ROOT / "README.ja.md": "index.ja"}
RECORDS = {ROOT / "benchmarks/RESULTS.md": "results", ROOT / "notebooks/pretrained/README.md": "pretrained"}
PAGE = """<!DOCTYPE html>
<html lang="{language}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="stylesheet" href="style.css">
</head>
<body>
<nav>
{navigation}
</nav>
<main>
{body}
</main>
</body>
</html>
"""


def sources(run: Path) -> dict[Path, str]:
    """The page of each file of the project that has one; of the notebooks, those that the run has executed."""
    notebooks = [ROOT / "notebooks" / path.name for path in sorted(run.glob("notebooks/*.ipynb"))]
    if not notebooks:
        sys.exit(f"{run} holds no executed notebooks: give the folder of a finished run.")
    names = {path: path.stem for path in [*notebooks, *sorted(ROOT.glob("docs/*.md"))]}
    return {path: f"{name}.html" for path, name in (HOMES | names | RECORDS).items()}


def content(path: Path, run: Path) -> nbformat.NotebookNode:
    """A notebook as the run has executed it; a document as a notebook of one cell, so that both look alike."""
    if path.suffix == ".ipynb":
        notebook = nbformat.read(run / "notebooks" / path.name, 4)
        for cell in notebook.cells:  # what is folded in JupyterLab is left out of the page
            cell.metadata.transient = {"remove_source": cell.metadata.get("jupyter", {}).get("source_hidden", False)}
        return notebook
    text = path.read_text("utf-8")
    text = notebooks_first(text) if path in HOMES else text
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])


def notebooks_first(text: str) -> str:
    """A README with its table of notebooks, less the column of badges, right behind the first screen."""
    head, *sections = re.split(r"^(?=## )", text, flags=re.M)
    sections.sort(key=lambda section: "| [01 " not in section)
    sections[0] = re.sub(r"^(\|.*\|)[^|\n]+\|$", r"\1", sections[0], flags=re.M)
    return "".join([head, *sections])


def anchor_headings(soup: BeautifulSoup) -> None:
    """Gives each heading the anchor that GitHub gives it."""
    for heading in soup.select("h1, h2, h3, h4"):
        heading["id"] = anchor_of(heading.get_text())


def own_address(address: str, source: Path) -> tuple[Path, str] | None:
    """(file or folder, fragment) that a link of a file leads to within the project, or None."""
    parts = urlsplit(address)
    if parts.scheme or not parts.path:
        return None
    path = (source.parent / parts.path).resolve()
    return (path / "README.md" if (path / "README.md").is_file() else path), parts.fragment


def direct(link: Tag, source: Path, pages: dict[Path, str]) -> None:
    """Leads a link to a page of the site; else to the repository or, while that is not published, nowhere."""
    repository, ref, site = settings()
    address = str(link["href"])
    own = own_address(address, source)
    if own and own[0] in pages:
        link["href"] = pages[own[0]] + (f"#{own[1]}" if own[1] else "")
    elif own and site:
        link["href"] = f"{repository}/blob/{ref}/{own[0].relative_to(ROOT)}"
    elif own or (not site and address.startswith((repository, f"{COLAB}/github/"))):
        remove_badge(link) if link.find("img") else link.unwrap()


def remove_badge(badge: Tag) -> None:
    """Removes a badge, and the dot between it and what follows."""
    if isinstance(badge.next_sibling, str):
        badge.next_sibling.replace_with(badge.next_sibling.removeprefix(" · "))
    badge.decompose()


def copy_image(image: Tag, source: Path, folder: Path) -> None:
    """Copies an image of the project; one from elsewhere, a badge, goes with its link: pages are read offline."""
    address = str(image["src"])
    own = own_address(address, source)
    if own:
        shutil.copyfile(own[0], folder / "images" / own[0].name)
        image["src"] = f"images/{own[0].name}"
    elif not address.startswith("data:"):
        remove_badge(image.find_parent("a") or image)


def navigation(titles: dict[Path, str], pages: dict[Path, str], current: Path) -> str:
    """The bar of links to all pages."""

    def entry(path: Path) -> str:
        here = ' aria-current="page"' if path == current else ""
        return f'<li><a href="{pages[path]}"{here}>{escape(titles[path])}</a></li>'

    def group(name: str, suffix: str) -> str:
        entries = [entry(path) for path in pages if path.suffix == suffix and path not in HOMES]
        return f"<p>{name}</p>\n<ul>\n" + "\n".join(entries) + "\n</ul>"

    home = '<a class="home" href="index.html">MSCNN</a>'
    return "\n".join([home, group("Notebooks", ".ipynb"), group("Documents", ".md")])


def style() -> str:
    """The style sheet, with the colors of code, light and dark."""
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
    own = (ROOT / ".github/pages.css").read_text("utf-8")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{own}"


def build(run: Path, folder: Path) -> None:
    """Writes the whole site into a folder."""
    pages = sources(run)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    exporter = HTMLExporter(
        template_name="basic", exclude_anchor_links=True, exclude_input_prompt=True, exclude_output_prompt=True
    )
    soups = {}
    for path in pages:
        soups[path] = soup = BeautifulSoup(exporter.from_notebook_node(content(path, run))[0], "html.parser")
        anchor_headings(soup)
        for link in soup.select("a[href]"):
            direct(link, path, pages)
        for image in soup.select("img[src]"):
            copy_image(image, path, folder)
    titles = {path: soup.h1.get_text() for path, soup in soups.items()}
    short = {path: title.split(":")[0] for path, title in titles.items()}
    for path, soup in soups.items():
        language = "ja" if path.name.endswith(".ja.md") else "en"
        bar = navigation(short, pages, path)
        page = PAGE.format(language=language, title=escape(titles[path]), navigation=bar, body=soup)
        (folder / pages[path]).write_text(page, "utf-8", newline="\n")
    (folder / "style.css").write_text(style(), "utf-8", newline="\n")
    print(f"{len(pages)} pages: open {folder / 'index.html'}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    build(Path(sys.argv[1]).resolve(), Path(*sys.argv[2:] or [ROOT / "site"]).resolve())
