"""The folder for data sets, and downloads into it that are checked."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import sys
import tarfile
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

from mscnn_parts.files import current_folder, path_from, project_root, write_atomically
from mscnn_parts.settings import MSCNNError

DOWNLOAD_TIMEOUT = 10  # seconds to wait for a server's first answer


def data_folder() -> Path:
    """Where data sets are looked for and downloaded to: `MSCNN_DATA_DIR`, or Keras' own cache.

    Raises:
        MSCNNError: the variable begins with `~`, and no home directory is known.
    """
    return _folder_named_by("MSCNN_DATA_DIR") or (_folder_named_by("KERAS_HOME") or keras_home()) / "datasets"


def _folder_named_by(variable: str) -> Path | None:
    """The folder in an environment variable; None if it is not set.

    A relative path begins at the folder the user was in when it was set. That is the current folder, but for a kernel,
    which runs where its notebook lies; it inherits PWD from the shell.
    """
    given = os.environ.get(variable)
    if not given:
        return None
    starts = (current_folder(), Path(os.environ.get("PWD") or project_root()), project_root())
    places = [path_from(given, start) for start in starts if start]
    return next((place for place in places if place.is_dir()), places[0])


def keras_home() -> Path:
    """As Keras finds it: `~/.keras`, or one in the folder for temporary files where there is no home to write into."""
    home = Path(os.path.expanduser("~"))  # stays ~ where none is known
    usable = home.is_absolute() and (os.path.isdir(home / ".keras") or os.access(home, os.W_OK))
    return (home if usable else Path(tempfile.gettempdir())) / ".keras"


def download(url: str, known_hash: str, name: str) -> Path:
    """Downloads one file into the data folder by pooch, or finds it there; its hash is checked.

    Raises:
        FileNotFoundError: it cannot be had; the message has the reason. (Not MSCNNError: `auto` falls back.)
    """
    import pooch
    import requests

    folder = data_folder()
    path, host, (kind, value) = folder / name, url.split("/")[2], known_hash.split(":")
    state = f"{name} is not in {folder}" if may_read(folder) else f"{folder} cannot be read: Permission denied,"
    try:
        if os.path.isfile(path):  # not Path's, which fails in a folder that may not be read
            if pooch.file_hash(str(path), alg=kind) == value:
                return path
            state = f"{path} is incomplete or damaged ({path.stat().st_size:,} bytes)"
    except OSError as error:
        raise FileNotFoundError(
            f"{path} cannot be read: {error.strerror}. Mend that, or set MSCNN_DATA_DIR."
        ) from error
    problem = _ask(url)
    if problem:
        raise FileNotFoundError(
            f"{state} and cannot be downloaded now ({_download_problem(problem, host, folder)}). "
            "Put the data there, or set MSCNN_DATA_DIR to the folder that has it."
        )
    print(f"Fetching {name} from {url}", flush=True)
    try:
        fetch = pooch.HTTPDownloader(timeout=DOWNLOAD_TIMEOUT, progressbar=sys.stderr.isatty())
        return Path(pooch.retrieve(url, known_hash, fname=name, path=folder, downloader=fetch))  # pyright: ignore[reportArgumentType]
    except (requests.RequestException, OSError, ValueError) as error:  # ValueError: the hash is wrong
        reason = _download_problem(error, host, folder).rstrip(".")
        raise FileNotFoundError(f"The download of {name} failed: {reason}.") from error


def cache_folder() -> Path:
    """Where images and features are kept that do not fit in memory; hidden, for a data folder may hold images."""
    return data_folder() / ".mscnn_cache"


def may_read(folder: Path) -> bool:
    return not os.path.isdir(folder) or os.access(folder, os.R_OK | os.X_OK)


class Archive(NamedTuple):
    """A `.tar.gz` as its publishers offer it, and those of its files that are read."""

    url: str
    md5: str
    folder: str  # where the files lie in the archive, and below the data folder
    files: dict[str, str]  # name -> MD5, which is checked before a file is opened

    def _folders(self) -> dict[Path, list[str]]:
        """Where the files may lie, and which of them are not there."""
        base, name = data_folder(), self.url.rpartition("/")[2]
        # The second and third are where Keras itself unpacks an archive.
        places = [base, base / f"{self.folder}-target", base / name.removesuffix(".tar.gz")]
        folders = [place / self.folder for place in places] + [base]
        return {f: [file for file in self.files if not os.path.isfile(f / file)] for f in folders}

    def find(self) -> Path | None:
        """The folder that has all files; None if there is none."""
        return next((folder for folder, lacking in self._folders().items() if not lacking), None)

    def fetch(self) -> Path:
        """The folder of the files, which are downloaded and unpacked if they are not there.

        Raises:
            FileNotFoundError: they cannot be had; the message has the reason.
        """
        return self.find() or self._unpack()

    def _unpack(self) -> Path:
        target = data_folder() / self.folder
        try:
            with tarfile.open(download(self.url, f"md5:{self.md5}", self.url.rpartition("/")[2])) as tar:
                wanted = {f"{self.folder}/{name}": target / name for name in self.files}
                for member in tar:  # in their order: to go back is to unpack from the start
                    if member.name in wanted and (file := tar.extractfile(member)):
                        content = file.read()
                        write_atomically(wanted.pop(member.name), lambda path, c=content: path.write_bytes(c))
                    if not wanted:
                        break
            return target
        except (FileNotFoundError, MSCNNError) as error:
            folders = self._folders()
            problems = [f"{folder} cannot be read: Permission denied." for folder in folders if not may_read(folder)]
            problems += [
                f"{folder} is incomplete: it lacks {', '.join(lacking)}."
                for folder, lacking in folders.items()
                if len(lacking) < len(self.files)
            ]
            raise FileNotFoundError(" ".join([*problems, str(error)])) from error

    def read(self, folder: Path, name: str) -> bytes:
        """One of the files in the folder of `fetch`, after its hash was checked.

        Raises:
            FileNotFoundError: it cannot be read. MSCNNError: it is not the published one.
        """
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise FileNotFoundError(f"{folder / name} cannot be read: {error.strerror}. Mend that.") from error
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if digest != self.files[name]:
            raise MSCNNError(
                f"{folder / name} is damaged or incomplete ({len(content):,} bytes): its MD5 is {digest}, "
                f"published is {self.files[name]}. Delete it and start again."
            )
        return content


def _ask(url: str) -> Exception | None:
    """What keeps a server from offering a file: None, or the error."""
    import requests

    answers: list[Exception | None] = []

    def ask() -> None:
        try:
            requests.head(url, timeout=DOWNLOAD_TIMEOUT / 2, allow_redirects=True).raise_for_status()
            answers.append(None)
        except Exception as error:  # not all are requests' own: a missing file of certificates is an OSError
            answers.append(error)

    # In a thread, since a name server that is silent is not bound by a time limit of requests.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(DOWNLOAD_TIMEOUT)
    return answers[0] if answers else requests.Timeout()


def _download_problem(error: Exception, host: str, folder: Path) -> str:
    """The true reason of a download that failed and, where there is one, the remedy."""
    from requests import exceptions

    cause = error  # the innermost one: requests wraps errors of urllib3, which wraps Python's
    while inner := next((e for e in (*cause.args, getattr(cause, "reason", 0)) if isinstance(e, Exception)), None):
        cause = inner
    reason = re.sub("^<.*?>: ", "", str(cause)) or type(cause).__name__  # without the address of an object
    answer = getattr(error, "response", None)
    if isinstance(error, exceptions.ProxyError) or (answer is not None and answer.status_code == 407):
        return f"the proxy does not let it through: {reason}; check HTTPS_PROXY and NO_PROXY"
    if answer is not None:
        later = "; try again later" if answer.status_code in (429, 503) else ""
        return f"{host} answers {answer.status_code} {answer.reason}{later}"
    if isinstance(error, exceptions.SSLError):
        return f"the certificate of {host} is not trusted: {reason}; REQUESTS_CA_BUNDLE names the file of other ones"
    if isinstance(error, (exceptions.ConnectionError, exceptions.Timeout)):
        return f"no answer from {host}"
    if isinstance(error, PermissionError) or getattr(error, "errno", None):
        reason = getattr(error, "strerror", None) or os.strerror(errno.EACCES)  # pooch leaves it out
        return f"cannot write to {folder}: {reason}; mend that, or set MSCNN_DATA_DIR to another folder"
    return reason
