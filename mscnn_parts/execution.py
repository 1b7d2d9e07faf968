"""Runs a notebook by papermill, and says how far it is."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from mscnn_parts.files import make_folder, notebooks_folder
from mscnn_parts.output import print_anyway
from mscnn_parts.pages import write_page
from mscnn_parts.run_folder import NOTEBOOKS, Run
from mscnn_parts.settings import MSCNNError, Settings


class _Progress(logging.Handler):
    """Turns papermill's log into one line per code cell, and passes on what the cells print.

    Args:
        title: the notebook's name.
        code_cells: numbers, from 1, of the code cells of the notebook that is executed.
    """

    def __init__(self, title: str, code_cells: list[int]):
        super().__init__()
        self.title, self.code_cells = title, code_cells

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("Executing Cell"):
            number = int(message.removeprefix("Executing Cell").strip(" -"))
            if number in self.code_cells:
                step = self.code_cells.index(number) + 1
                print_anyway(f"[{self.title}] cell {step} of {len(self.code_cells)}")
        elif not message.startswith(("Ending Cell", "Input Notebook", "Output Notebook", "Executing notebook", "<")):
            print_anyway("    " + message.rstrip().replace("\n", "\n    "))


def _code_cells(notebook: Path) -> list[int]:
    """Numbers of the code cells, counting the one that papermill puts behind the parameters."""
    import nbformat

    code = []
    for cell in nbformat.read(notebook, 4).cells:
        injected = "parameters" in cell.metadata.get("tags", [])
        code += [cell.cell_type == "code"] * (2 if injected else 1)
    return [number for number, is_code in enumerate(code, start=1) if is_code]


class Refused(MSCNNError):
    """What a notebook says of its parameters, data or surroundings, not a failure on the way."""


def run_notebook(
    name: str,
    settings: Settings,
    pages: concurrent.futures.Executor,
    notebooks: Sequence[str] = NOTEBOOKS,
    given: Collection[str] = (),
) -> Path:
    """Runs one notebook by papermill into the run folder; its HTML page is left to `pages`.

    Args:
        notebooks: all that will have a page, so that links lead to them.
        given: names of parameters that the user has given. Where notebook 01 does not run, each notebook gets them,
            even if it declares them not; all others come from the run folder.

    Raises:
        Refused: a cell raised MSCNNError, or there is no kernel.
        MSCNNError: a cell failed; the message holds its error and names the partial notebook.
    """
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import DeadKernelError

    source = notebooks_folder() / f"{name}.ipynb"
    target = Run(name, settings).folder / "notebooks" / f"{name}.ipynb"
    make_folder(target.parent, f"Cannot write the notebooks to {target.parent}", "run_dir")
    paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (source, target)]  # papermill formats them
    told = {*papermill.inspect_notebook(paths[0]), *(() if NOTEBOOKS[0] in notebooks else given)}
    logger, progress = logging.getLogger("papermill"), _Progress(name, _code_cells(source))
    logger.addHandler(progress)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        papermill.execute_notebook(
            input_path=paths[0],
            output_path=paths[1],
            parameters={name: value for name, value in dataclasses.asdict(settings).items() if name in told},
            kernel_name="python3",
            progress_bar=False,
            log_output=True,
            extra_arguments=["--log-level=CRITICAL"],  # the kernel's, of the notebook's own prints nothing is lost
        )
    except papermill.PapermillExecutionError as error:
        if error.ename == MSCNNError.__name__:
            raise Refused(f"{error.evalue}\n({name}, cell {error.exec_count})") from error
        where = f"({name}, cell {error.exec_count}; the notebook so far: {target})"
        raise MSCNNError(f"{error.ename}: {error.evalue}\n{where}") from error
    except NoSuchKernel as error:
        remedy = f"{sys.executable} -m pip install ipykernel"
        raise Refused(f"{name}: Jupyter knows no kernel named {error.name} here. Install it: {remedy}") from error
    except DeadKernelError as error:
        raise MSCNNError(
            f"{name}: its Python process died, most often because the memory is used up. "
            f"Close other programs, or use light_mode.\nThe notebook so far: {target}"
        ) from error
    finally:
        logger.removeHandler(progress)
        pages.submit(_write_page, target, notebooks)
    return target


def _write_page(notebook: Path, others: Sequence[str]) -> None:
    try:
        write_page(notebook, others)
    except Exception as error:  # nbconvert, Jinja and the file system each have their own; the run is worth more
        print_anyway(f"No page could be made of {notebook}: {error}", error=True)
