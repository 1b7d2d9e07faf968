"""The page of an executed notebook: HTML that needs no network."""

from __future__ import annotations

import base64
import html
import mimetypes
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from mscnn_parts.files import write_atomically
from mscnn_parts.run_folder import ALL_NOTEBOOKS

# Without MathJax, require.js and Mermaid, which browsers would fetch: no notebook has formulas, widgets or diagrams.
TEMPLATE = "{% extends 'index.html.j2' %}" + "".join(
    f"{{% block {name} %}}{{% endblock %}}"
    for name in ("html_head_js", "html_head_js_mathjax", "html_head_js_mermaidjs")
)
TEMPLATE += (  # its own style breaks long lines in the middle of words
    "{% block html_head_css %}{{ super() }}"
    "<style>.jp-OutputArea-output pre { word-break: normal; overflow-wrap: anywhere; }</style>{% endblock %}"
)
LINK = re.compile(rf'((?:Previous|Next|First): )?<a href="({"|".join(ALL_NOTEBOOKS)})\.ipynb(#[^"]*)?">(.*?)</a>')
NOT_RUN = re.compile(r"((?:Previous|Next|First): )([^<>]*) \(not run: --notebooks (\w+)\)")
ELSEWHERE = re.compile(r'<a href="(\.\./[^"#]+)(?:#[^"]*)?">(.*?)</a>')
IMAGE = re.compile(r'(?<=<img )([^>]*?src=")(?!\w+:)([^"]+)')
INTERRUPTED = "**This run was interrupted**, where a KeyboardInterrupt is shown below; what follows it has not run."


def write_page(notebook: Path, others: Sequence[str]) -> None:
    """Writes a notebook's page beside it, with links to the pages that are there or will be.

    Args:
        others: names of notebooks that will have a page.
    """
    import nbformat
    from nbconvert import HTMLExporter

    def link(found: re.Match) -> str:
        before, name, place, text = found.groups(default="")
        if name in others or notebook.with_name(f"{name}.html").is_file():
            return f'{before}<a href="{name}.html{place}">{text}</a>'
        return f"{before}{text} (not run: --notebooks {name.partition('_')[0]})" if before else text

    def elsewhere(found: re.Match) -> str:
        return found[0] if (notebook.parent / found[1]).exists() else found[2]

    def embedded(found: re.Match) -> str:
        """An image file as part of the page. (nbconvert's own way closes <details> before what is folded in it.)"""
        file = notebook.parent / unquote(html.unescape(found[2]))
        if not file.is_file():
            return found[0]
        kind, content = mimetypes.guess_type(file.name)[0], base64.b64encode(file.read_bytes()).decode()
        return f"{found[1]}data:{kind};base64,{content}"

    exporter = HTMLExporter(template_name="lab", raw_template=TEMPLATE)
    content = nbformat.read(notebook, 4)
    for cell in content.cells:  # what is folded in JupyterLab is left out of the page
        cell.metadata.transient = {"remove_source": cell.metadata.get("jupyter", {}).get("source_hidden", False)}
    if any(output.get("ename") == "KeyboardInterrupt" for cell in content.cells for output in cell.get("outputs", [])):
        content.cells.insert(0, nbformat.v4.new_markdown_cell(INTERRUPTED))
    place = {"metadata": {"path": str(notebook.parent), "name": notebook.stem}}
    page, _ = exporter.from_notebook_node(content, place)
    page = IMAGE.sub(embedded, ELSEWHERE.sub(elsewhere, LINK.sub(link, page)))
    write_atomically(notebook.with_suffix(".html"), lambda path: path.write_text(page, encoding="utf-8"))


def link_pages(folder: Path) -> None:
    """Turns what pages say of a notebook that had not run into a link, once its page is there."""
    there = [folder / f"{name}.html" for name in ALL_NOTEBOOKS if (folder / f"{name}.html").is_file()]
    pages = {path.name.partition("_")[0]: path for path in there}

    def link(found: re.Match) -> str:
        before, text, number = found.groups()
        return f'{before}<a href="{pages[number].name}">{text}</a>' if number in pages else found[0]

    for path in pages.values():
        page = path.read_text(encoding="utf-8")
        if (linked := NOT_RUN.sub(link, page)) != page:
            write_atomically(path, lambda partial, text=linked: partial.write_text(text, encoding="utf-8"))
