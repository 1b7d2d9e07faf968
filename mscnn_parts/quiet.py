"""TensorFlow imported without its chatter."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def _silent_afterwards() -> Iterator[None]:
    """Lets TensorFlow's C++ side, which reads its log level once, say nothing after its import but what is fatal."""
    variable = "TF_CPP_MIN_LOG_LEVEL"
    if variable in os.environ:
        yield
        return
    os.environ[variable] = "3"
    try:
        yield
    finally:
        del os.environ[variable]


@contextlib.contextmanager
def _without_native_logs() -> Iterator[None]:
    """Holds back what it prints to stderr while it is imported, which no level changes, and shows it if that fails."""
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed: nothing is printed
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """For the import of TensorFlow: what its C++ side prints is held back, and shown if the import fails."""
    with _silent_afterwards(), _without_native_logs():
        yield
