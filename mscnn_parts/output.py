"""What a program prints: no encoding and no closed pipe ends it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


def print_anyway(text: str, error: bool = False) -> None:
    """Prints what a run says of itself: what the output's encoding lacks as escapes, and to nobody if it is closed."""
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with closed_output_ignored():
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


@contextlib.contextmanager
def closed_output_ignored() -> Iterator[None]:
    """From the moment when nobody reads the output any more, all that is printed goes nowhere."""
    with contextlib.suppress(BrokenPipeError):
        yield
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def ipython_shell() -> Any:
    """The IPython that runs this; None outside it."""
    return sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None


def let_output_fail() -> None:
    """A run outlives whoever reads its output: no encoding and no closed pipe stops it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
