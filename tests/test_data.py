"""Finding, checking, downloading, loading and splitting data. No network but this machine's own."""

import contextlib
import dataclasses
import errno
import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import re
import ssl
import struct
import tarfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import requests
import tensorflow as tf
import urllib3
from conftest import TINY_NAMES, patch_rooms, tiny_images
from PIL import Image

import mscnn_helpers as mscnn
from mscnn_helpers import MSCNNError, Split, load_dataset
from mscnn_parts import sources
from mscnn_parts.data import RawData, split_data
from mscnn_parts.downloads import Archive, data_folder
from mscnn_parts.files import project_root
from mscnn_parts.pictures import as_uint8, free_memory
from mscnn_parts.settings import FALLBACK_NOTICE
from mscnn_parts.sources import (
    CIFAR10,
    CIFAR10_NAMES,
    FASHION_MD5,
    FASHION_NAMES,
    STL10_NAMES,
    _cifar10,
    _cifar100,
    _fashion_mnist,
    _mnist,
    _npz,
    _stl10,
    find_cifar10,
)

SPLITS = ("train", "calibration", "certification", "test")


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def with_hashes(archive: Archive, files: dict[str, bytes]) -> Archive:
    """The archive, with the MD5s of these files taken for the published ones."""
    return archive._replace(files={name: md5(content) for name, content in files.items()})


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def data_dir(tmp_path, monkeypatch) -> Path:
    """An empty folder for data sets, and no network unless a test puts one in."""
    folder = tmp_path / "datasets"
    folder.mkdir()
    monkeypatch.setenv("MSCNN_DATA_DIR", str(folder))

    def unreachable(*_, **__):
        raise requests.ConnectionError("no network in this test")

    monkeypatch.setattr(requests, "head", unreachable)
    return folder


# ------------------------------------------------------------------------------------------------------------
# CIFAR-10 on disk
# ------------------------------------------------------------------------------------------------------------

BATCHES = tuple(CIFAR10.files)


def small_batches(count: int = 40) -> tuple[np.ndarray, np.ndarray, dict[str, bytes]]:
    """CIFAR-10's six files with few images: all images (6, count, 32, 32, 3), labels (6, count), and the files."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (len(BATCHES), count, 32, 32, 3), np.uint8)
    labels = np.tile(np.arange(count) % 10, (len(BATCHES), 1))
    files = {}
    for name, some, their_labels in zip(BATCHES, images, labels, strict=True):
        # A row: 1,024 red values, row by row, then the green and the blue ones.
        rows = np.stack([np.concatenate([one[:, :, channel].ravel() for channel in range(3)]) for one in some])
        files[name] = pickle.dumps({b"data": rows, b"labels": their_labels.tolist(), b"batch_label": b""}, protocol=2)
    return images, labels, files


@pytest.fixture
def batches(data_dir, monkeypatch):
    """Small batches in the publishers' layout, with their MD5 taken for the published ones."""
    images, labels, files = small_batches()
    folder = data_dir / "cifar-10-batches-py"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    patch_rooms(monkeypatch, "CIFAR10", with_hashes(CIFAR10, files))
    return folder, images, labels


def test_the_publishers_layout_is_read_in_the_right_order(batches):
    folder, images, labels = batches
    raw = _cifar10()
    assert np.array_equal(raw.x_train, images[:5].reshape(-1, 32, 32, 3))
    assert np.array_equal(raw.y_train, labels[:5].ravel())
    assert np.array_equal(raw.x_test, images[5])
    assert np.array_equal(raw.y_test, labels[5])
    assert (raw.x_train.dtype, raw.source, tuple(raw.names)) == (np.uint8, str(folder), CIFAR10_NAMES)


def test_cifar10_on_disk_is_what_auto_takes(batches):
    auto, named = load_dataset("auto"), load_dataset("cifar10")
    assert auto.name == named.name == "cifar10"
    assert auto.category_names == CIFAR10_NAMES
    assert auto.flip
    assert not auto.fallback
    assert auto.fingerprint == named.fingerprint


@pytest.mark.parametrize("where", ["", "cifar-10-batches-py-target/cifar-10-batches-py"])
def test_other_places_where_the_batches_may_lie(batches, data_dir, where):
    folder, images, _ = batches
    (data_dir / where).parent.mkdir(exist_ok=True)
    for path in folder.iterdir():
        target = data_dir / where / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    folder.rmdir()
    assert np.array_equal(_cifar10().x_test, images[5])


class Bomb:
    """A pickle that writes a file when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("dataset", ["cifar10", "auto"])
def test_a_damaged_batch_is_named_and_not_opened(batches, tmp_path, dataset):
    folder, *_ = batches
    bomb = pickle.dumps(Bomb(tmp_path / "it went off"))
    with contextlib.suppress(Exception):
        pickle.loads(bomb)
    assert (tmp_path / "it went off").exists(), "this bomb would prove nothing"
    (tmp_path / "it went off").rmdir()

    (folder / "data_batch_3").write_bytes(bomb)
    with pytest.raises(MSCNNError) as error:
        load_dataset(dataset)
    for part in (str(folder / "data_batch_3"), md5(bomb), sources.CIFAR10.files["data_batch_3"]):
        assert part in str(error.value)
    assert not (tmp_path / "it went off").exists()


def test_a_truncated_batch_is_damaged(batches):
    folder, *_ = batches
    (folder / "test_batch").write_bytes((folder / "test_batch").read_bytes()[:-1])
    with pytest.raises(MSCNNError, match="test_batch is damaged"):
        load_dataset("cifar10")


def test_a_missing_batch_means_that_the_data_is_not_there(batches):
    folder, *_ = batches
    (folder / "data_batch_5").unlink()
    with pytest.raises(MSCNNError, match="MSCNN_DATA_DIR"):
        load_dataset("cifar10")


def test_a_folder_with_five_of_six_batches_is_called_incomplete(batches, data_dir, capsys):
    folder, *_ = batches
    (folder / "data_batch_5").unlink()
    (data_dir / "cifar-10-python.tar.gz").write_bytes(bytes(12_345))  # a download that was broken off
    told = (
        f"{folder} is incomplete: it lacks data_batch_5. {data_dir / 'cifar-10-python.tar.gz'} is incomplete or "
        "damaged (12,345 bytes) and cannot be downloaded now (no answer from www.cs.toronto.edu)."
    )
    with pytest.raises(MSCNNError, match=re.escape(told)):
        load_dataset("cifar10")
    assert load_dataset("auto").fallback
    assert told in capsys.readouterr().out
    (folder / "data_batch_5").write_bytes(b"half")
    with pytest.raises(MSCNNError, match=r"data_batch_5 is damaged or incomplete \(4 bytes\)"):
        load_dataset("cifar10")


def test_a_batch_that_may_not_be_read_is_named(batches, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(MSCNNError, match=r"data_batch_1 cannot be read: Permission denied"):
        load_dataset("cifar10")
    assert load_dataset("auto").fallback
    assert "Permission denied" in capsys.readouterr().out


def test_a_folder_that_may_not_be_read_is_named(data_dir, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    for dataset in ("cifar10", "mnist"):
        with pytest.raises(MSCNNError, match=re.escape(f"{data_dir} cannot be read: Permission denied")):
            load_dataset(dataset)


def test_the_real_cifar10():
    if find_cifar10() is None:
        pytest.skip("CIFAR-10 is not on disk; MSCNN_DATA_DIR says where it is")
    data = load_dataset("cifar10")
    assert [len(getattr(data, name)) for name in SPLITS] == [45_000, 2_500, 2_500, 10_000]
    assert all(getattr(data, name).images.dtype == np.uint8 for name in SPLITS)
    for name in SPLITS:
        assert (np.bincount(getattr(data, name).labels) == len(getattr(data, name)) // 10).all()
    assert data.test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]  # cat, ship, ship, airplane, frog, ...
    assert data.test.images[0, 0, 0].tolist() == [158, 112, 49]
    mean, std = data.channel_statistics()
    assert np.allclose(mean, [125.3, 123.0, 113.9], atol=0.5)  # the known ones are of all 50,000
    assert np.allclose(std, [63.0, 62.1, 66.7], atol=0.5)

    light = load_dataset("auto", light_mode=True)
    assert [len(getattr(light, name)) for name in SPLITS] == [4_500, 250, 250, 1_000]
    assert light.name == "cifar10"


# ------------------------------------------------------------------------------------------------------------
# Without network
# ------------------------------------------------------------------------------------------------------------


def test_auto_falls_back_with_a_notice(data_dir, capsys):
    data = load_dataset("auto")
    printed = capsys.readouterr().out
    assert FALLBACK_NOTICE in printed
    assert "!!!!!!!!" in printed
    assert str(data_dir) in printed
    assert (data.name, data.fallback, data.describe()["fallback"]) == ("digits", True, True)


def test_digits_that_are_asked_for_are_no_fallback(data_dir, digits, capsys):
    assert not digits.fallback
    assert not load_dataset("digits").fallback
    assert capsys.readouterr().out == ""
    assert (digits.category_names, digits.input_shape) == (tuple("0123456789"), (32, 32, 1))
    assert not digits.flip, "a mirrored digit is another one"
    assert not mscnn.load_dataset("digits", quarter_turns=True).quarter_turns


def test_what_training_may_do_with_the_images_is_asked_for(tiny_path):
    data = [mscnn.load_dataset(tiny_path, mirror=mirror, quarter_turns=mirror) for mirror in (True, False)]
    assert [(one.flip, one.quarter_turns) for one in data] == [(True, True), (False, False)]


@pytest.mark.parametrize("dataset", ["cifar10", "mnist", "fashion_mnist", "cifar100", "stl10"])
def test_a_named_data_set_never_falls_back(data_dir, dataset):
    with pytest.raises(MSCNNError, match=r"cannot be downloaded now.*set MSCNN_DATA_DIR") as error:
        load_dataset(dataset)
    assert str(data_dir) in str(error.value)
    assert files_in(data_dir) == []


@pytest.fixture
def silent_name_server(monkeypatch):
    """Looking up a name takes until the test is over, as it does behind some firewalls."""
    over = threading.Event()

    def wait(*_, **__):
        over.wait(60)
        raise OSError("the test is over")

    monkeypatch.setattr("socket.getaddrinfo", wait)
    yield
    over.set()


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
def test_a_silent_name_server_is_given_up(tmp_path, monkeypatch, silent_name_server, dataset):
    monkeypatch.setenv("MSCNN_DATA_DIR", str(tmp_path))
    patch_rooms(monkeypatch, "DOWNLOAD_TIMEOUT", 0.3)
    begun = time.monotonic()
    if dataset == "auto":
        assert load_dataset(dataset).fallback
    else:
        with pytest.raises(MSCNNError, match="cannot be downloaded now"):
            load_dataset(dataset)
    assert time.monotonic() - begun < 5


@pytest.mark.slow
def test_without_network_it_gives_up_within_15_seconds(tmp_path, monkeypatch, silent_name_server):
    monkeypatch.setenv("MSCNN_DATA_DIR", str(tmp_path))
    begun = time.monotonic()
    assert load_dataset("auto").fallback
    assert time.monotonic() - begun < 15


# ------------------------------------------------------------------------------------------------------------
# Downloads, from a server on this machine
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine for the files in the folder `served`; yields (address, folder)."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/", folder
        running.shutdown()


def offered(archive: Archive, files: dict[str, bytes], address: str, served: Path) -> Archive:
    """Puts an archive of these files into the folder of the server, between others; returns its description."""
    path = served / archive.url.rpartition("/")[2]
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {"readme": b"", **dict(reversed(files.items())), "unlabeled_X.bin": b""}.items():
            entry = tarfile.TarInfo(f"{archive.folder}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return with_hashes(archive, files)._replace(url=address + path.name, md5=md5(path.read_bytes()))


@pytest.fixture
def archive(server, tmp_path, monkeypatch):
    """The server offers a small CIFAR-10 archive in the publishers' place; yields (data folder, images, archive)."""
    address, served = server
    images, _, files = small_batches()
    patch_rooms(monkeypatch, "CIFAR10", offered(CIFAR10, files, address, served))
    monkeypatch.setenv("MSCNN_DATA_DIR", str(tmp_path / "new" / "datasets"))
    return tmp_path / "new" / "datasets", images, served / "cifar-10-python.tar.gz"


def test_cifar10_is_downloaded_once(archive, monkeypatch):
    folder, images, served = archive
    data = load_dataset("auto")
    assert (data.name, data.fallback) == ("cifar10", False)
    assert np.array_equal(_cifar10().x_test, images[5])
    expected = ["cifar-10-python.tar.gz", *(f"cifar-10-batches-py/{name}" for name in BATCHES)]
    assert files_in(folder) == sorted(expected)

    served.unlink()  # from now on there is nothing to download
    assert load_dataset("cifar10").fingerprint == data.fingerprint
    (folder / "cifar-10-batches-py" / "data_batch_1").unlink()  # the archive is still there
    assert load_dataset("cifar10").fingerprint == data.fingerprint


def test_a_wrong_archive_leaves_nothing(archive, capsys):
    folder, _, served = archive
    served.write_bytes(served.read_bytes()[:-100])
    with pytest.raises(MSCNNError, match=r"The download of cifar-10-python\.tar\.gz failed.*hash"):
        load_dataset("cifar10")
    assert files_in(folder) == []
    assert load_dataset("auto").fallback
    assert "failed" in capsys.readouterr().out


def test_a_download_that_breaks_off_leaves_nothing(archive, monkeypatch):
    folder, _, served = archive
    content = served.read_bytes()

    def half(self, source, outputfile):
        outputfile.write(content[: len(content) // 2])
        raise ConnectionResetError("broken off")

    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "copyfile", half)
    with pytest.raises(MSCNNError, match=r"The download of .* failed"):
        load_dataset("cifar10")
    assert files_in(folder) == []


def test_a_server_without_the_file(archive):
    folder, _, served = archive
    served.unlink()
    with pytest.raises(MSCNNError, match=r"no answer from 127\.0\.0\.1|cannot be downloaded"):
        load_dataset("cifar10")
    assert files_in(folder) == []


def answer(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code, response.reason = status, http.HTTPStatus(status).phrase
    return requests.HTTPError(response=response)


def wrapped(kind: type[Exception], cause: Exception) -> Exception:
    """As requests raises it: around urllib3's, around the true reason."""
    return kind(urllib3.exceptions.MaxRetryError(None, "/", urllib3.exceptions.ProxyError("Unable to connect", cause)))


SURROUNDINGS = [
    (answer(403), "www.cs.toronto.edu answers 403 Forbidden"),
    (answer(404), "www.cs.toronto.edu answers 404 Not Found"),
    (answer(429), "www.cs.toronto.edu answers 429 Too Many Requests; try again later"),
    (answer(407), "the proxy does not let it through: .*check HTTPS_PROXY and NO_PROXY"),
    (
        wrapped(requests.exceptions.ProxyError, OSError("Tunnel connection failed: 403 Forbidden")),
        "the proxy does not let it through: Tunnel connection failed: 403 Forbidden",
    ),
    (
        wrapped(requests.exceptions.SSLError, ssl.SSLCertVerificationError("certificate verify failed: self-signed")),
        "the certificate of www.cs.toronto.edu is not trusted: .*self-signed.*REQUESTS_CA_BUNDLE",
    ),
    (OSError("Could not find a suitable TLS CA certificate bundle"), "TLS CA certificate bundle"),
    (wrapped(requests.ConnectionError, OSError("Name or service not known")), "no answer from www.cs.toronto.edu"),
    (requests.exceptions.InvalidSchema("Missing dependencies for SOCKS support."), "Missing dependencies for SOCKS"),
]
DISK = [
    (OSError(errno.ENOSPC, "No space left on device"), "cannot write to DATA: No space left on device"),
    (PermissionError("pooch has its own text"), "cannot write to DATA: Permission denied; mend that, or set MSCNN_"),
    (OSError(errno.EROFS, "Read-only file system"), "cannot write to DATA: Read-only file system"),
]


@pytest.mark.parametrize("when", ["head", "get"])
@pytest.mark.parametrize(("error", "told"), SURROUNDINGS + DISK)
def test_why_a_download_fails_is_told(data_dir, monkeypatch, capsys, when, error, told):
    def fail(*_, **__):
        raise error

    if when == "get":
        patch_rooms(monkeypatch, "_ask", lambda url: None)
        monkeypatch.setattr("pooch.HTTPDownloader", lambda **_: fail)
    monkeypatch.setattr(requests, "head", fail)
    told = told.replace("DATA", re.escape(str(data_dir)))
    with pytest.raises(MSCNNError, match=f"cifar-10-python.tar.gz.*{told}"):
        load_dataset("cifar10")
    if (error, when) in ((SURROUNDINGS[0][0], "head"), (DISK[0][0], "get")):
        assert load_dataset("auto").fallback
        assert re.search(told, capsys.readouterr().out)
    assert files_in(data_dir) == []


def test_a_refusing_server_and_a_refusing_proxy(archive, monkeypatch):
    def refuse(self):
        self.send_error(403)

    for method in ("do_HEAD", "do_CONNECT"):
        monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, method, refuse, raising=False)
    with pytest.raises(MSCNNError, match=r"127\.0\.0\.1:\d+ answers 403 Forbidden"):
        load_dataset("cifar10")
    monkeypatch.setenv("HTTPS_PROXY", sources.CIFAR10.url.rpartition("/")[0])
    elsewhere = sources.CIFAR10._replace(url="https://example.org/cifar-10-python.tar.gz")
    patch_rooms(monkeypatch, "CIFAR10", elsewhere)
    with pytest.raises(MSCNNError, match=r"proxy does not let it through: Tunnel connection failed: 403 Forbidden"):
        load_dataset("cifar10")


def test_an_archive_that_cannot_be_unpacked(archive, monkeypatch, capsys):
    folder, *_ = archive

    def full(path, write):
        raise MSCNNError(f"Cannot write {path}: No space left on device. Choose another place.")

    patch_rooms(monkeypatch, "write_atomically", full)
    assert load_dataset("auto").fallback
    assert f"Cannot write {folder / 'cifar-10-batches-py' / 'test_batch'}: No space left" in capsys.readouterr().out


def write_mnist(path: Path) -> dict[str, np.ndarray]:
    """A small `mnist.npz` as Keras has it."""
    rng = np.random.default_rng(0)
    labels = (np.arange(300) % 10).astype(np.uint8)
    images = rng.integers(0, 256, (400, 28, 28), np.uint8)
    arrays = {"x_train": images[:300], "y_train": labels, "x_test": images[300:], "y_test": labels[:100]}
    np.savez(path, **arrays)
    return arrays


def test_mnist_as_keras_has_it(data_dir):
    arrays = write_mnist(data_dir / "mnist.npz")
    data = load_dataset("mnist")
    assert (data.name, data.input_shape, data.flip) == ("mnist", (32, 32, 1), False)
    assert data.category_names == tuple("0123456789")
    assert np.array_equal(data.test.labels, arrays["y_test"])
    assert sum(len(getattr(data, name)) for name in SPLITS) == 400


def test_the_real_mnist():
    path = data_folder() / "mnist.npz"
    if not path.is_file():
        pytest.skip("mnist.npz is not on disk; MSCNN_DATA_DIR says where it is")
    raw = _mnist()
    assert raw.x_train.shape == (60_000, 28, 28, 1)
    assert raw.y_train[:5].tolist() == [5, 0, 4, 1, 9]


def test_mnist_is_downloaded(data_dir, server, monkeypatch):
    address, served = server
    write_mnist(served / "mnist.npz")
    monkeypatch.undo()  # the network is back
    monkeypatch.setenv("MSCNN_DATA_DIR", str(data_dir))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    patch_rooms(monkeypatch, "KERAS_DATA_URL", address)
    patch_rooms(monkeypatch, "MNIST_SHA256", hashlib.sha256((served / "mnist.npz").read_bytes()).hexdigest())
    assert load_dataset("mnist").name == "mnist"
    assert files_in(data_dir) == ["mnist.npz"]

    (data_dir / "mnist.npz").unlink()
    patch_rooms(monkeypatch, "MNIST_SHA256", "0" * 64)
    with pytest.raises(MSCNNError, match=r"The download of mnist\.npz failed.*hash"):
        load_dataset("mnist")
    assert files_in(data_dir) == []


def test_a_damaged_mnist_on_disk_is_named_and_left(data_dir):
    write_mnist(data_dir / "mnist.npz")
    content = (data_dir / "mnist.npz").read_bytes()[:5000]
    (data_dir / "mnist.npz").write_bytes(content)
    with pytest.raises(MSCNNError, match=r"mnist\.npz cannot be read"):
        load_dataset("mnist")
    assert (data_dir / "mnist.npz").read_bytes() == content


def fashion_files() -> tuple[dict[str, bytes], np.ndarray, np.ndarray]:
    """The four files of Fashion-MNIST with few images: files, images (400, 28, 28), labels (400,)."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (400, 28, 28), np.uint8), (np.arange(400) % 10).astype(np.uint8)
    files = {}
    for name in FASHION_MD5:
        part = slice(0, 300) if name.startswith("train") else slice(300, 400)
        header, values = (16, images[part]) if "images" in name else (8, labels[part])
        files[name] = gzip.compress(bytes(header) + values.tobytes())
    return files, images, labels


@pytest.mark.parametrize("downloaded", [False, True])
def test_fashion_mnist(data_dir, server, monkeypatch, downloaded):
    address, served = server
    files, images, labels = fashion_files()
    folder = served if downloaded else data_dir / "fashion-mnist"
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if downloaded:
        monkeypatch.undo()
        monkeypatch.setenv("MSCNN_DATA_DIR", str(data_dir))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        patch_rooms(monkeypatch, "KERAS_DATA_URL", address)
    patch_rooms(monkeypatch, "FASHION_MD5", {name: md5(content) for name, content in files.items()})

    raw = _fashion_mnist()
    assert np.array_equal(raw.x_train[..., 0], images[:300])
    assert np.array_equal(raw.y_train, labels[:300])
    assert np.array_equal(raw.x_test[..., 0], images[300:])
    assert np.array_equal(raw.y_test, labels[300:])
    data = load_dataset("fashion_mnist")
    assert (data.name, data.flip, data.input_shape) == ("fashion_mnist", True, (32, 32, 1))
    assert data.category_names == FASHION_NAMES
    assert files_in(data_dir) == sorted(f"fashion-mnist/{name}" for name in files)


def cifar100_files() -> tuple[dict[str, bytes], np.ndarray, np.ndarray]:
    """The three files of CIFAR-100 with few images: files, images (1200, 32, 32, 3), fine labels (1200,)."""
    images, labels = np.random.default_rng(0).integers(0, 256, (1200, 32, 32, 3), np.uint8), np.arange(1200) % 100
    files = {}
    for name, part in (("train", slice(0, 1000)), ("test", slice(1000, 1200))):
        rows = images[part].transpose(0, 3, 1, 2).reshape(-1, 3072)
        batch = {b"data": rows, b"fine_labels": labels[part].tolist(), b"coarse_labels": (labels[part] // 5).tolist()}
        files[name] = pickle.dumps(batch, protocol=2)
    names = [b"fine %d" % label for label in range(100)]
    files["meta"] = pickle.dumps({b"fine_label_names": names, b"coarse_label_names": names[:20]}, protocol=2)
    return files, images, labels


def stl10_files() -> tuple[dict[str, bytes], np.ndarray, np.ndarray]:
    """The four files of STL-10 with few images: files, images (140, 96, 96, 3), labels (140,)."""
    images, labels = np.random.default_rng(0).integers(0, 256, (140, 96, 96, 3), np.uint8), np.arange(140) % 10
    files = {}
    for name, part in (("train", slice(0, 100)), ("test", slice(100, 140))):
        # Channel by channel, and each of them column by column.
        columns = [
            one[:, column, channel].tobytes() for one in images[part] for channel in range(3) for column in range(96)
        ]
        files |= {f"{name}_X.bin": b"".join(columns), f"{name}_y.bin": bytes((labels[part] + 1).tolist())}
    return files, images, labels


PUBLISHED = {"cifar100": (cifar100_files, _cifar100, 1000), "stl10": (stl10_files, _stl10, 100)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_archive_is_downloaded_and_read(name, server, tmp_path, monkeypatch):
    make, read, train = PUBLISHED[name]
    files, images, labels = make()
    monkeypatch.setenv("MSCNN_DATA_DIR", str(tmp_path / "new"))
    archive = offered(getattr(sources, name.upper()), files, *server)
    patch_rooms(monkeypatch, name.upper(), archive)
    raw = read()
    assert files_in(tmp_path / "new") == sorted(
        [archive.url.rpartition("/")[2], *(f"{archive.folder}/{f}" for f in files)]
    )
    assert np.array_equal(raw.x_train, images[:train])
    assert np.array_equal(raw.x_test, images[train:])
    assert raw.y_train.tolist() + raw.y_test.tolist() == labels.tolist()
    data = load_dataset(name, image_size=64)
    assert (data.name, data.flip, data.image_size) == (name, True, 64)
    assert data.input_shape == ((64, 64, 3) if name == "stl10" else (32, 32, 3))
    assert data.category_names == (STL10_NAMES if name == "stl10" else tuple(f"fine {label}" for label in range(100)))


@pytest.mark.parametrize(("name", "file"), [("cifar100", "meta"), ("cifar100", "train"), ("stl10", "test_y.bin")])
def test_a_damaged_published_file_is_named_and_not_opened(name, file, data_dir, tmp_path, monkeypatch):
    archive, files = getattr(sources, name.upper()), PUBLISHED[name][0]()[0]
    (data_dir / archive.folder).mkdir()
    for one, content in files.items():
        (data_dir / archive.folder / one).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")) if one == file else content)
    patch_rooms(monkeypatch, name.upper(), with_hashes(archive, files))
    with pytest.raises(MSCNNError, match=rf"{file} is damaged or incomplete.*MD5.*Delete it"):
        load_dataset(name)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------------
# .npz files
# ------------------------------------------------------------------------------------------------------------


def arrays(channels: int | None = 3, size: int = 32, count: int = 200) -> dict[str, np.ndarray]:
    """Random images of four categories: what a `.npz` holds."""
    rng = np.random.default_rng(1)
    shape = (size, size) if channels is None else (size, size, channels)
    made = {}
    for split, number in (("train", count), ("test", 40)):
        made[f"x_{split}"] = rng.integers(0, 256, (number, *shape), np.uint8)
        made[f"y_{split}"] = np.arange(number) % 4
    return made


@pytest.fixture
def npz(tmp_path):
    """Writes a `.npz` and returns its path as text."""

    def write(**content) -> str:
        np.savez(tmp_path / "mine.npz", **content)
        return str(tmp_path / "mine.npz")

    return write


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_npz_grey_and_rgb(npz, channels):
    content = arrays(channels)
    data = load_dataset(npz(**content))
    assert (data.name, data.input_shape) == ("mine", (32, 32, channels or 1))
    assert np.array_equal(data.test.images.reshape(content["x_test"].shape), content["x_test"])
    assert np.array_equal(data.test.labels, content["y_test"])
    assert data.category_names == ("0", "1", "2", "3"), "class_names are optional"
    assert data.flip


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_npz_of_floats_from_0_to_1(npz, kind):
    content = arrays()
    floats = {name: (one / 255).astype(kind) if name.startswith("x") else one for name, one in content.items()}
    assert np.array_equal(load_dataset(npz(**floats)).test.images, content["x_test"])


def test_floats_between_two_levels_are_rounded(npz):
    content = arrays()
    floats = {name: (one - 0.4).clip(0) / 255 if name.startswith("x") else one for name, one in content.items()}
    assert np.array_equal(load_dataset(npz(**floats)).test.images, content["x_test"])


def test_npz_of_floats_from_0_to_255(npz):
    content = arrays()
    floats = {name: one.astype(np.float32) for name, one in content.items() if name.startswith("x")}
    assert np.array_equal(load_dataset(npz(**{**content, **floats})).test.images, content["x_test"])


@pytest.mark.parametrize("size", [28, 64])
def test_npz_of_another_size_is_resized(npz, size):
    content = arrays(size=size)
    content["x_test"][:] = 77
    content["x_train"][:, : size // 2] = 0  # the upper half black, the lower white
    content["x_train"][:, size // 2 :] = 255
    data = load_dataset(npz(**content))
    assert data.input_shape == (32, 32, 3)
    assert data.train.images.dtype == np.uint8
    assert (data.test.images == 77).all()
    assert (data.train.images[:, :14] == 0).all()
    assert (data.train.images[:, 18:] == 255).all()


def test_npz_with_names(npz):
    data = load_dataset(npz(**arrays(), class_names=["ant", "bee", "cow", "doe"]))
    assert data.category_names == ("ant", "bee", "cow", "doe")


def test_npz_with_labels_in_a_column(npz):
    content = arrays()
    column = {name: one[:, None] for name, one in content.items() if name.startswith("y")}
    assert np.array_equal(load_dataset(npz(**{**content, **column})).test.labels, content["y_test"])


def changed(**changes):
    """The arrays of a good `.npz`, with some replaced or, by None, left out."""
    return {name: one for name, one in {**arrays(), **changes}.items() if one is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(y_test=None), "lacks y_test; it has x_test, x_train, y_train"),
        (changed(x_train=None, y_train=None), "lacks x_train, y_train"),
        (changed(x_train=np.zeros((200, 32, 32, 4), np.uint8)), r"x_train has shape \(200, 32, 32, 4\): use \(N, H, W"),
        (changed(x_test=np.zeros((40, 3072), np.uint8)), r"x_test has shape \(40, 3072\)"),
        (changed(x_test=np.zeros((0, 32, 32, 3), np.uint8)), r"x_test has shape \(0, 32, 32, 3\)"),
        (changed(x_train=np.full((200, 32, 32), -1)), "x_train goes from -1 to -1: use 0 to 255, or floats"),
        (changed(x_train=np.full((200, 32, 32), 256)), "x_train goes from 256 to 256"),
        (changed(x_train=np.full((200, 32, 32), np.nan)), "x_train goes from nan"),
        (changed(y_train=np.arange(199) % 4), "Labels have to be 200 integers from 0: got 199"),
        (changed(y_train=np.arange(200) % 4 / 2), "got 200 of float64"),
        (changed(y_train=np.arange(200) % 4 - 1), "integers from 0"),
        (changed(class_names=["a", "b", "c"]), "has labels up to 3 but 3 class_names"),
        (changed(class_names=["a", "b", "c", "d", "e"]), "no train images of category 'e'"),
        (changed(y_train=np.arange(200) % 2 * 3), "no train images of category '1': number the labels"),
        (changed(x_test=np.zeros((40, 32, 32), np.uint8)), "x_train has 3 channels, x_test has 1"),
    ],
)
def test_a_npz_that_does_not_fit(npz, content, message):
    with pytest.raises(MSCNNError, match=message):
        load_dataset(npz(**content))


FLOATS = arrays(size=8)["x_train"] / 255  # float64 (200, 8, 8, 3), from 0 to 1


@pytest.mark.parametrize(
    "images",
    [
        FLOATS * 1.0000001,
        FLOATS * 1.0009,
        FLOATS - 0.0005,
        FLOATS * 255.2,
        FLOATS * 255 - 0.1,
        FLOATS.astype("f2") * 255,
    ],
)
def test_floats_a_hair_outside_are_clipped(images):
    levels = as_uint8(images, "x_train")
    assert levels.dtype == np.uint8
    assert np.abs(levels.astype(int) - arrays(size=8)["x_train"]).max() <= 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (FLOATS * 1.2, r"goes from 0 to 1\.2: use 0 to 255, or floats from 0 to 1: x_train\.clip\(0, 1\)"),
        (FLOATS * 1.9, r"goes from 0 to 1\.9: use"),
        (FLOATS * 260, r"to 260: .*x_train\.clip\(0, 255\)"),
        (FLOATS * 2 - 1, r"from -1 to 1: .*: \(x_train \+ 1\) / 2"),
        (np.where(FLOATS > 0.99, np.nan, FLOATS), r"nan.*np\.isnan"),
        (np.where(FLOATS > 0.99, np.inf, FLOATS), "to inf"),
        ((FLOATS > 0.5).astype(np.uint8), r"from 0 to 1: .*x_train \* 255, as it is of dtype uint8"),
        ((FLOATS * 65535).astype(np.uint16), r"to 65535: .*x_train // 256"),
        (FLOATS.astype(complex), "is of dtype complex128"),
        (FLOATS[:, :2, :2].astype(str), "is of dtype <U"),
        (FLOATS.transpose(0, 3, 1, 2), r"transpose\(0, 2, 3, 1\) puts the channels last"),
        (FLOATS[..., [0, 1, 2, 0]], r"x_train\[\.\.\., :3\] leaves out the opacity"),
        (FLOATS.reshape(200, -1), "undoes the flattening"),
        (FLOATS.reshape(200, -1, 3), "undoes the flattening"),
        (FLOATS[:, :0], r"shape \(200, 0, 8, 3\)"),
    ],
)
def test_images_that_would_turn_black_or_fail_later(npz, images, message):
    with pytest.raises(MSCNNError, match=f"x_train .*{message}"):
        load_dataset(npz(**changed(x_train=images)))


LABELS = np.arange(200) % 4


@pytest.mark.parametrize("kind", [np.uint64, np.int8, np.float16, np.float64, ">i4"])
def test_labels_of_any_number_type(npz, kind):
    data = load_dataset(npz(**changed(y_train=LABELS.astype(kind), y_test=(LABELS[:40, None]).astype(kind))))
    assert data.category_names == ("0", "1", "2", "3")
    assert data.test.labels.dtype == np.int64 and data.test.labels.tolist() == LABELS[:40].tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(y_train=np.where(LABELS % 2, 1, -1)), "got 200 of int64 in y_train, among them -1"),
        (changed(y_test=LABELS[:40] - 1), "got 40 of int64 in y_test, among them -1"),
        (changed(y_train=LABELS.astype(np.uint64) - np.uint64(1)), "among them 18446744073709551615"),
        (changed(y_train=np.where(LABELS, LABELS, np.nan)), "in y_train, among them nan"),
        (changed(y_train=np.where(LABELS, LABELS, np.inf)), "in y_train, among them inf"),
        (changed(y_train=LABELS / 2), "among them 0.5"),
        (changed(y_train=LABELS[1:]), "got 199 in y_train, for 200 images in x_train"),
        (changed(y_train=np.eye(4)[LABELS]), r"y_train of shape \(200, 4\); .*y_train\.argmax\(axis=1\)"),
        (changed(y_train=np.array(list("abcd"))[LABELS]), r"<U1 in y_train; .*return_inverse=True"),
        (changed(y_test=np.array(list("abcd"), "S")[LABELS[:40]]), r"\|S1 in y_test"),
        (changed(y_train=LABELS * 10**8), "no train images of category '1'"),
        (changed(y_train=LABELS + 1), "no train images of category '0': number the labels without gaps, from 0"),
        (changed(y_test=np.arange(40) % 5), "no train images of category '4'"),
        (changed(class_names=np.array([b"a", b"b", b"c", b"\xe9"])), "class_names holds bytes that are not UTF-8"),
        (changed(class_names=np.array([["a", "b"], ["c", "d"]])), r"class_names has shape \(2, 2\)"),
        (changed(class_names=np.array(["a", "b", "c", "d"], object)), "class_names: Object arrays"),
        (changed(class_names=["a", "b", "c", "b"]), r"here 'b'\): use two or more different names"),
        (changed(class_names=["a", "b", "c", " "]), r"here ' '\)"),
    ],
)
def test_a_label_or_name_that_does_not_fit_is_shown(npz, content, message):
    with pytest.raises(MSCNNError, match=message):
        load_dataset(npz(**content))


@pytest.mark.parametrize(
    "names", [[["ant"], ["bée"], ["cow"], ["a,b"]], [s.encode() for s in ("ant", "bée", "cow", "a,b")]]
)
def test_names_as_a_column_or_as_bytes(npz, names):
    assert load_dataset(npz(**arrays(), class_names=names)).category_names == ("ant", "bée", "cow", "a,b")


def test_arrays_that_are_not_asked_for_and_capitals_in_the_suffix_do_no_harm(npz):
    path = Path(npz(**arrays(), extra=np.array([{}], object)))
    assert len(load_dataset(str(path.rename(path.with_suffix(".NPZ")))).test) == 40


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_changed_byte_is_refused_or_changes_nothing(tmp_path, save):
    path, content = tmp_path / "mine.npz", arrays(size=8, count=60)
    save(path, **content)
    good, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    places = [*range(0, 200, 5), *rng.integers(0, len(good), 20), *range(len(good) - 500, len(good), 12)]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 0xFF
        path.write_bytes(bad)
        try:
            raw = _npz(path)
            for name, one in content.items():
                assert np.array_equal(getattr(raw, name), one), place
        except MSCNNError:
            refused += 1
    assert refused > len(places) / 2


@pytest.mark.parametrize(("place", "value", "message"), [(8, 1, "is encrypted"), (10, 99, "compression method")])
def test_a_npz_that_cannot_be_unpacked(npz, place, value, message):
    path = Path(npz(**arrays()))
    content = bytearray(path.read_bytes())
    content[content.find(b"PK\x01\x02") + place] = content[place - 2] = value
    path.write_bytes(content)
    size = re.escape(f"({len(content):,} bytes)")
    with pytest.raises(MSCNNError, match=rf"x_train: .*{message}.*{size}"):
        load_dataset(str(path))


def test_a_npz_with_pickles_is_not_opened(npz, tmp_path):
    content = arrays()
    content["y_train"] = np.array([Bomb(tmp_path / "it went off")] * 200, object)
    with pytest.raises(MSCNNError, match=r"cannot be read as a \.npz file of plain arrays"):
        load_dataset(npz(**content))
    assert not (tmp_path / "it went off").exists()


@pytest.mark.parametrize("damage", ["text", "truncated", "empty"])
def test_a_damaged_npz_is_named(npz, damage):
    path = Path(npz(**arrays()))
    path.write_bytes({"text": b"hello", "truncated": path.read_bytes()[:5000], "empty": b""}[damage])
    with pytest.raises(MSCNNError, match=r"mine\.npz cannot be read as a \.npz"):
        load_dataset(str(path))


@pytest.mark.parametrize("name", ["cifar", ""])
def test_an_unknown_data_set_lists_the_known_ones(name):
    with pytest.raises(
        MSCNNError, match=r"cifar10, digits, mnist, fashion_mnist, cifar100, stl10, a \.npz file or an image folder"
    ):
        load_dataset(name)


# ------------------------------------------------------------------------------------------------------------
# Folders of images
# ------------------------------------------------------------------------------------------------------------


def write_images(folder: Path, count: int, seed: int = 0, names=("ant", "bee")) -> None:
    """Writes `count` pictures for each of the categories; bees are brighter."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 100, (32, 32, 3), np.uint8) + np.uint8(100 * label)
            Image.fromarray(pixels).save(folder / name / f"{i:03}.png")


def test_a_folder_with_train_and_test(tmp_path):
    write_images(tmp_path / "pets" / "train", 40, seed=1)
    write_images(tmp_path / "pets" / "test", 10, seed=2)
    data = load_dataset(str(tmp_path / "pets"))
    assert (data.name, data.category_names, data.input_shape) == ("pets", ("ant", "bee"), (32, 32, 3))
    assert np.bincount(data.test.labels).tolist() == [10, 10]
    assert sum(len(getattr(data, name)) for name in SPLITS[:3]) == 80
    first = np.asarray(Image.open(tmp_path / "pets" / "test" / "ant" / "000.png"))
    assert np.array_equal(data.test.images[0], first)
    for name in SPLITS:
        split = getattr(data, name)
        assert np.array_equal(split.images.mean(axis=(1, 2, 3)) > 100, split.labels == 1)


def test_a_folder_without_a_split_gets_a_seeded_one(tmp_path):
    write_images(tmp_path / "pets", 50)
    one, same, other = (load_dataset(str(tmp_path / "pets"), seed=seed) for seed in (0, 0, 1))
    assert np.bincount(one.test.labels).tolist() == [10, 10], "a fifth of each category"
    assert sum(len(getattr(one, name)) for name in SPLITS) == 100
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_other_files_and_hidden_folders_do_not_matter(tmp_path):
    write_images(tmp_path / "pets", 20)
    (tmp_path / "pets" / "ant" / "notes.txt").write_text("not a picture")
    (tmp_path / "pets" / "README").write_text("nor this")
    (tmp_path / "pets" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "pets" / "bee" / "019.png").rename(tmp_path / "pets" / "bee" / "019.PNG")
    data = load_dataset(str(tmp_path / "pets"))
    assert data.category_names == ("ant", "bee")
    assert sum(len(getattr(data, name)) for name in SPLITS) == 40


@pytest.mark.parametrize(
    ("here", "name"), [("pets", "."), ("", "./pets"), ("pets/ant", ".."), ("x", "../pets"), ("x", "~/pets")]
)
def test_the_user_s_own_folders(tmp_path, monkeypatch, here, name):
    write_images(tmp_path / "pets", 20)
    (tmp_path / "x").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path / here)
    data = load_dataset(name)
    assert (data.name, data.source) == ("pets", str(tmp_path / "pets"))


@pytest.mark.parametrize("variable", ["MSCNN_DATA_DIR", "KERAS_HOME"])
def test_a_relative_data_folder_is_where_the_user_was(tmp_path, monkeypatch, variable):
    monkeypatch.setenv("MSCNN_DATA_DIR", "")
    monkeypatch.setenv(variable, "some/../data")
    for folder in ("shell/notebooks", "shell/data", "project/data"):
        (tmp_path / folder).mkdir(parents=True)
    patch_rooms(monkeypatch, "project_root", lambda: tmp_path / "project")
    end = "datasets" if variable == "KERAS_HOME" else ""
    for here, shell, expected in [
        ("shell", "shell", "shell"),
        ("shell/notebooks", "shell", "shell"),
        ("", "", "project"),
    ]:
        monkeypatch.chdir(tmp_path / here)
        monkeypatch.setenv("PWD", str(tmp_path / shell))
        assert data_folder() == tmp_path / expected / "data" / end
    monkeypatch.setenv(variable, "new")
    assert data_folder() == tmp_path / "new" / end, "what is not there yet begins here"


def test_a_home_that_cannot_be_written_is_used_for_what_lies_there(tmp_path, monkeypatch):
    monkeypatch.delenv("MSCNN_DATA_DIR", raising=False)
    monkeypatch.delenv("KERAS_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", str(tmp_path)))
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/temporary")
    assert data_folder() == Path("/temporary/.keras/datasets")
    (tmp_path / ".keras").mkdir()
    assert data_folder() == tmp_path / ".keras" / "datasets"


def test_the_data_as_found_has_a_fingerprint_of_its_own(tmp_path, tiny_path, tiny_data):
    found = {load_dataset(str(tiny_path), light, seed).source_fingerprint for light in (False, True) for seed in (0, 1)}
    assert found == {tiny_data.source_fingerprint}
    assert len(tiny_data.source_fingerprint) == 64

    write_images(tmp_path / "pets", 20)
    prints = [load_dataset(str(tmp_path / "pets")).source_fingerprint]
    (tmp_path / "pets/ant/more.png").write_bytes((tmp_path / "pets/ant/000.png").read_bytes())
    prints.append(load_dataset(str(tmp_path / "pets")).source_fingerprint)
    (tmp_path / "pets/ant").rename(tmp_path / "pets/ape")
    prints.append(load_dataset(str(tmp_path / "pets")).source_fingerprint)
    assert len(set(prints)) == 3


def test_relative_paths_start_here(tmp_path, monkeypatch):
    write_images(tmp_path / "pets", 20)
    monkeypatch.chdir(tmp_path)
    assert load_dataset("pets").name == "pets"


def test_an_empty_category_is_named(tmp_path):
    write_images(tmp_path / "pets", 20)
    (tmp_path / "pets" / "cow").mkdir()
    with pytest.raises(MSCNNError, match=r"No images of category 'cow' in .*cow: add some, or take the category out"):
        load_dataset(str(tmp_path / "pets"))


def test_a_category_whose_images_lie_deeper_is_named(tmp_path):
    write_images(tmp_path / "pets", 20)
    write_images(tmp_path / "pets" / "cow", 20)
    with pytest.raises(MSCNNError, match="No images of category 'cow'"):
        load_dataset(str(tmp_path / "pets"))


def test_a_category_without_test_images_is_named(tmp_path):
    write_images(tmp_path / "pets" / "train", 20, names=("ant", "bee", "cow"))
    write_images(tmp_path / "pets" / "test", 10)
    with pytest.raises(MSCNNError, match=r"No images of category 'cow'.*test"):
        load_dataset(str(tmp_path / "pets"))


@pytest.mark.parametrize("damage", ["text", "truncated", "empty"])
def test_an_unreadable_image_is_named(tmp_path, damage):
    write_images(tmp_path / "pets", 20)
    path = tmp_path / "pets" / "bee" / "007.png"
    path.write_bytes({"text": b"hello", "truncated": path.read_bytes()[:1500], "empty": b""}[damage])
    with pytest.raises(MSCNNError, match=r"bee.007\.png cannot be read as an image"):
        load_dataset(str(tmp_path / "pets"))


@pytest.mark.parametrize("names", [(), ("ant",)])
def test_a_folder_needs_two_categories(tmp_path, names):
    (tmp_path / "pets").mkdir()
    write_images(tmp_path / "pets", 20, names=names)
    with pytest.raises(MSCNNError, match=f"at least two categories; it has {len(names)}"):
        load_dataset(str(tmp_path / "pets"))


def test_a_misspelt_data_set_gets_the_nearest():
    with pytest.raises(MSCNNError, match=r"Unknown dataset 'fashon_mnist'.* Did you mean fashion_mnist\?"):
        load_dataset("fashon_mnist")


@pytest.mark.parametrize("name", ["missing.npz", "missing/folder", "README.md", "my_photos"])
def test_a_path_that_leads_nowhere_says_where_it_was_looked_for(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MSCNNError) as error:
        load_dataset(name)
    if name == "my_photos":  # it may be meant as a name, too
        begins = f"Unknown dataset '{name}', and no such folder in {project_root()} or {tmp_path}: use auto, "
    else:
        begins = f"No image folder or .npz file '{name}': looked in {project_root()}"
    assert str(error.value).startswith(begins)
    assert str(tmp_path) in str(error.value)


def test_too_few_images_to_split(tmp_path):
    write_images(tmp_path / "pets", 3)
    with pytest.raises(MSCNNError, match=r"Too few images: .* smallest of these has 3"):
        load_dataset(str(tmp_path / "pets"))


def picture(tmp_path: Path, pixels: np.ndarray, mode: str | None = None, **saving) -> Path:
    image = Image.fromarray(pixels)
    image = image.convert(mode) if mode else image
    image.save(tmp_path / "picture.png", **saving)
    return tmp_path / "picture.png"


def test_a_picture_is_cut_to_its_middle_square(tmp_path):
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 200
    assert (mscnn.read_image(picture(tmp_path, pixels)) == 200).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA"])
@pytest.mark.parametrize("shape", [(32, 32, 3), (32, 32, 1), (16, 16, 3)])
def test_any_picture_fits_the_model(tmp_path, mode, shape):
    path = picture(tmp_path, np.full((50, 60, 3), 255, np.uint8), mode)
    image = mscnn.read_image(path, shape)
    assert (image.shape, image.dtype) == (shape, np.uint8)
    assert (image == 255).all()


def test_a_picture_is_turned_as_the_camera_says(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255  # the upper half is white
    orientation = Image.Exif()
    orientation[0x0112] = 3  # upside down
    turned = mscnn.read_image(picture(tmp_path, pixels, exif=orientation))
    assert (turned[:16] == 0).all()
    assert (turned[16:] == 255).all()


@pytest.mark.parametrize("turn", [1, 6])
def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path, turn):
    """A half, a quarter or an eighth of its pixels; the picture that a caller has opened stays as large as it is."""
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)).resize((4000, 3000))
    orientation = Image.Exif()
    orientation[0x0112] = turn
    smooth.save(tmp_path / "phone.jpg", quality=92, exif=orientation)
    read = mscnn.read_image(tmp_path / "phone.jpg", (160, 160, 3))
    with Image.open(tmp_path / "phone.jpg") as opened:
        whole = mscnn.read_image(opened, (160, 160, 3))
        assert opened.size == (4000, 3000)
    assert 0 < np.abs(read.astype(int) - whole).max() <= 6


def test_free_memory_is_what_linux_says():
    free = free_memory()
    assert free is None if not Path("/proc/meminfo").is_file() else free > 2**20


def test_a_picture_that_is_not_there(tmp_path):
    with pytest.raises(MSCNNError, match=r"There is no image at .*none\.png"):
        mscnn.read_image(tmp_path / "none.png")


# ------------------------------------------------------------------------------------------------------------
# Splits, light mode, statistics
# ------------------------------------------------------------------------------------------------------------


def numbered(count: int, test: int | None, weights=(4, 3, 2, 1)) -> RawData:
    """Images that are their own number, written in four bytes; categories of unequal size."""

    def some(first: int, number: int):
        images = np.arange(first, first + number, dtype="<u4").view(np.uint8).reshape(-1, 2, 2, 1)
        return images, np.resize(np.repeat(np.arange(len(weights)), weights), number)

    tests = (None, None) if test is None else some(count, test)
    return RawData("numbered", "here", ["a", "b", "c", "d"], *some(0, count), *tests)


def numbers(split: Split) -> np.ndarray:
    return np.ascontiguousarray(split.images).reshape(-1, 4).view("<u4").ravel()


@pytest.fixture
def split(monkeypatch):
    """`split_data`, with the images left as small as they are."""
    patch_rooms(monkeypatch, "_resized", lambda images, *_: images)
    return split_data


@pytest.mark.parametrize(
    ("images", "light", "sizes"),
    [
        ((50_000, 10_000), False, (45_000, 2_500, 2_500, 10_000)),
        ((50_000, 10_000), True, (4_500, 250, 250, 1_000)),
        ((60_000, 10_000), False, (54_000, 3_000, 3_000, 10_000)),
        ((600, 100), False, (420, 90, 90, 100)),
        ((600, 100), True, (420, 90, 90, 100)),  # too few to take a tenth
        ((4_000, 1_000), True, (1_050, 225, 225, 300)),
        ((1_502, 303), True, (1_052, 225, 225, 303)),  # what would be left over has not all categories
        ((1_000, None), False, (560, 120, 120, 200)),
    ],
)
def test_sizes_of_the_splits(split, images, light, sizes):
    data = split(numbered(*images), light, seed=0)
    assert tuple(len(getattr(data, name)) for name in SPLITS) == sizes
    assert data.describe()["sizes"] == dict(zip(SPLITS, sizes, strict=True))
    assert data.light_mode == light


@pytest.mark.parametrize("test", [10_000, None])
def test_splits_are_disjoint_complete_and_stratified(split, test):
    raw = numbered(50_000, test)
    data = split(raw, light_mode=False, seed=0)
    parts = [numbers(getattr(data, name)) for name in SPLITS]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(50_000 + (test or 0)))
    if test:
        assert np.array_equal(parts[3], np.arange(50_000, 60_000)), "test images stay test images, in order"
    for name, part in zip(SPLITS, parts, strict=True):
        own = getattr(data, name)
        assert np.allclose(np.bincount(own.labels) / len(own), [0.4, 0.3, 0.2, 0.1], atol=0.002), name
        pattern = np.repeat(np.arange(4), (4, 3, 2, 1))
        assert np.array_equal(own.labels, pattern[np.where(part < 50_000, part, part - 50_000) % 10]), name


def test_light_mode_is_a_stratified_part_of_the_same_images(split):
    light = split(numbered(50_000, 10_000), light_mode=True, seed=0)
    parts = [numbers(getattr(light, name)) for name in SPLITS]
    assert len(np.unique(np.concatenate(parts))) == 6_000
    assert np.concatenate(parts[:3]).max() < 50_000 <= parts[3].min()
    for name in SPLITS:
        own = getattr(light, name)
        assert np.allclose(np.bincount(own.labels) / len(own), [0.4, 0.3, 0.2, 0.1], atol=0.005), name


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize(
    ("train", "test"),
    [([500, 4], [5, 5]), ([16_000, 5], [40, 5]), ([16_000, 4], [4_000, 1]), ([500, 5], None), ([5] * 3, None),
     ([8] * 1000, [1] * 1000), ([100] * 400, [5] * 400)],
)  # fmt: skip
def test_every_category_is_in_every_split(split, train, test, light):
    labels = [None if sizes is None else np.repeat(np.arange(len(sizes)), sizes) for sizes in (train, test)]
    images = [None if one is None else np.zeros((len(one), 2, 2, 1), np.uint8) for one in labels]
    names = [str(category) for category in range(len(train))]
    data = split(RawData("rare", "here", names, images[0], labels[0], images[1], labels[1]), light, seed=0)
    for name, least in zip(SPLITS, (2, 1, 1, 1), strict=True):
        assert np.bincount(getattr(data, name).labels, minlength=len(names)).min() >= least, name
    assert light or sum(len(getattr(data, name)) for name in SPLITS) == sum(train) + sum(test or [])


@pytest.mark.parametrize(("light", "few"), [(False, 3), (True, 3), (False, 1)])
def test_a_category_with_too_few_images_is_named(npz, light, few):
    labels = np.r_[np.arange(197) % 3, np.full(few, 3)]
    content = changed(x_train=arrays()["x_train"][: len(labels)], y_train=labels)
    refusal = rf"Too few images: .* 4 or more .* smallest of these has {few}: doe \({few}\)\. Add images, or"
    with pytest.raises(MSCNNError, match=refusal):
        load_dataset(npz(**content, class_names=["ant", "bee", "cow", "doe"]), light_mode=light)


@pytest.mark.parametrize("seed", [-1, 2**31, 1.5, "0", None, True])
def test_a_bad_seed_is_refused_as_a_seed(seed):
    with pytest.raises(MSCNNError, match=f"^seed is {seed!r}: it has to be"):
        load_dataset("digits", seed=seed)


@pytest.mark.parametrize("light", [False, True])
def test_the_seed_chooses_the_splits(split, light):
    one, same, other = (split(numbered(20_000, 4_000), light, seed) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert np.array_equal(one.train.images, same.train.images)


def test_what_a_named_light_data_set_says_of_itself():
    data = load_dataset("digits", light_mode=True)
    description = data.describe()
    assert description["name"] == "digits"
    assert description["light_mode"] is True
    assert description["fingerprint"] == data.fingerprint
    assert description["category_names"] == list("0123456789")
    assert description["sizes"]["test"] == 300


@pytest.mark.parametrize("name", SPLITS)
def test_the_fingerprint_sees_one_pixel_and_one_label(tiny_data, name):
    split, replace = getattr(tiny_data, name), dataclasses.replace
    images, labels = split.images.copy(), split.labels.copy()
    images[-1, -1, -1, -1] ^= 1
    labels[0] = (labels[0] + 1) % 5
    assert len(tiny_data.fingerprint) == 64
    assert replace(tiny_data, **{name: Split(split.images.copy(), split.labels)}).fingerprint == tiny_data.fingerprint
    assert replace(tiny_data, **{name: Split(images, split.labels)}).fingerprint != tiny_data.fingerprint
    assert replace(tiny_data, **{name: Split(split.images, labels)}).fingerprint != tiny_data.fingerprint


def test_the_fingerprint_sees_the_names(tiny_data):
    renamed = dataclasses.replace(tiny_data, category_names=tuple(reversed(TINY_NAMES)))
    assert renamed.fingerprint != tiny_data.fingerprint


def test_sixteen_bits_become_eight(tmp_path):
    gray = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(gray).save(tmp_path / "deep.png")
    read = mscnn.read_image(tmp_path / "deep.png", (32, 32, 1))[..., 0]
    assert np.abs(read.astype(int) - gray // 256).max() <= 1


def test_what_is_transparent_is_white(tmp_path):
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:16] = (200, 0, 0, 255)  # the upper half is red, the lower half is not there
    Image.fromarray(pixels).save(tmp_path / "half.png")
    read = mscnn.read_image(tmp_path / "half.png")
    assert (read[:16] == (200, 0, 0)).all() and (read[16:] == 255).all()


def test_npz_of_black_and_white(npz):
    content = arrays(channels=None)
    binary = {name: one > 127 if name.startswith("x") else one for name, one in content.items()}
    assert set(np.unique(load_dataset(npz(**binary)).test.images)) == {0, 255}


@pytest.mark.parametrize("names", [["cat"], ["cat", "cat"], ["cat", "OTHER"]])
def test_categories_that_cannot_be_told_apart(npz, names):
    content = arrays()
    content = {name: one % len(names) if name.startswith("y") else one for name, one in content.items()}
    with pytest.raises(MSCNNError, match="use two or more different names, none of them OTHER"):
        load_dataset(npz(**content, class_names=np.array(names)))


def test_channel_statistics_are_those_of_the_train_split(tiny_data):
    mean, std = tiny_data.channel_statistics()
    pixels = tiny_data.train.images.astype(np.float64)
    assert np.allclose(mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    assert np.allclose(std, pixels.std(axis=(0, 1, 2)), rtol=1e-9)
    assert mean.shape == std.shape == (3,)


def test_channel_statistics_of_one_color_can_be_divided_by(tiny_data):
    flat = Split(np.full((10, 32, 32, 3), 9, np.uint8), np.zeros(10, int))
    mean, std = dataclasses.replace(tiny_data, train=flat).channel_statistics()
    assert mean.tolist() == [9, 9, 9]
    assert (std > 0).all()


def test_a_split_has_the_length_of_its_images():
    split = Split(tiny_images(np.arange(5), seed=3), np.arange(5))
    assert len(split) == 5
    taken = split.take(np.array([4, 0]))
    assert taken.labels.tolist() == [4, 0]
    assert np.array_equal(taken.images, split.images[[4, 0]])


# ------------------------------------------------------------------------------------------------------------
# Batches for fit
# ------------------------------------------------------------------------------------------------------------


def counted(count: int) -> np.ndarray:
    """Labels of three values each, from which their index can be told."""
    return np.arange(count, dtype=np.float32)[:, None] * np.float32([1, 10, 100])


def numbers_in(dataset) -> list[int]:
    return [int(one) for index, _ in dataset for one in index]


def test_batches_hold_each_index_once_with_its_label():
    sizes = []
    for index, labels in mscnn.batches(counted(10), 4):
        sizes.append(len(index))
        assert index.dtype == tf.int64 and labels.dtype == tf.float32
        np.testing.assert_array_equal(labels, counted(10)[index])
    assert sizes == [4, 4, 2]
    assert numbers_in(mscnn.batches(counted(10), 4)) == list(range(10))


def test_batches_are_shuffled_anew_in_each_epoch_and_alike_for_a_seed():
    one, same, other = (mscnn.batches(counted(50), 8, shuffle_seed=seed) for seed in (3, 3, 4))
    epochs = [numbers_in(one) for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(50))] * 2
    assert epochs[0] != epochs[1]
    assert [numbers_in(same) for _ in range(2)] == epochs
    assert numbers_in(other) != epochs[0]


def test_batches_follow_a_given_order_with_repetitions():
    assert numbers_in(mscnn.batches(counted(5), 2, order=np.array([4, 0, 4, 1]))) == [4, 0, 4, 1]


def test_batches_are_not_autotuned():
    """The autotuner's thread made the end of an epoch wait for up to 16 s while the processor idled."""
    assert mscnn.batches(counted(5), 2).options().autotune.enabled is False


# ------------------------------------------------------------------------------------------------------------
# What people's folders and pictures hold besides
# ------------------------------------------------------------------------------------------------------------


def put(path: Path, content: bytes | None = None) -> Path:
    """A file with such content; None: a picture of a brightness that its name decides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        kind = {".jfif": "JPEG", ".avif": "AVIF"}.get(path.suffix.lower())
        Image.new("RGB", (32, 32), (len(path.stem) * 20 % 256,) * 3).save(path, kind)
    else:
        path.write_bytes(content)
    return path


def category_folders(folder: Path, count: int = 12) -> Path:
    for name in ("ant", "bee"):
        for i in range(count):
            put(folder / name / f"{i:03}.png")
    return folder


SYSTEM = ["ant/._000.png", "ant/Thumbs.db", "__MACOSX/ant/000.png", "@eaDir/000.png", ".DS_Store", "$RECYCLE.BIN/x.png"]


@pytest.mark.parametrize("name", SYSTEM)
def test_system_entries_are_passed_over_without_a_word(tmp_path, capsys, name):
    folder = category_folders(tmp_path / "mine")
    put(folder / name, b"\0\5")
    data = mscnn.load_dataset(str(folder))
    assert data.category_names == ("ant", "bee") and not capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".tif", ".TIFF", ".jfif", ".PNG"])
def test_what_pillow_reads_is_read(tmp_path, suffix):
    folder = category_folders(tmp_path / "mine")
    put(folder / "ant" / f"more{suffix}")
    sizes = mscnn.load_dataset(str(folder)).describe()["sizes"]
    assert sum(sizes.values()) == 25


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ant/notes.txt", "1 (1 .txt), such as notes.txt"), ("ant/deep/000.png", "1 (1 folder), such as deep"),
        ("loose.png", "1 (1 .png), such as loose.png"), ("ant/folder.png/x.png", "1 (1 folder), such as folder.png"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_told(tmp_path, capsys, name, told):
    folder = category_folders(tmp_path / "mine")
    put(folder / name) if name.endswith("png") else put(folder / name, b"text")
    mscnn.load_dataset(str(folder))
    assert told in capsys.readouterr().out


def test_a_dead_link_is_told(tmp_path, capsys):
    folder = category_folders(tmp_path / "mine")
    (folder / "ant" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    mscnn.load_dataset(str(folder))
    assert "1 (1 dead link), such as gone.png" in capsys.readouterr().out


@pytest.mark.parametrize(("train", "val", "test"), [("Train", "Valid", "TEST"), ("training", "validation", "Testing")])
def test_splits_are_found_in_any_case(tmp_path, capsys, train, val, test):
    folder = tmp_path / "mine"
    for name, count in ((train, 12), (val, 4), (test, 3)):
        category_folders(folder / name, count)
    put(folder / test / "wasp" / "000.png")
    data = mscnn.load_dataset(str(folder))
    assert data.describe()["sizes"] == {"train": 24, "calibration": 4, "certification": 4, "test": 6}
    assert "1 (1 folder), such as wasp" in capsys.readouterr().out


def photographs(folder: Path, split: str, counts: dict[str, int]) -> None:
    """Pictures whose first pixel says which split they are of and which of its images they are."""
    for name, count in counts.items():
        for i in range(count):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), ({"train": 0, "val": 100, "test": 200}[split], i, 0)).save(
                folder / split / name / f"{i:03}.png"
            )


@pytest.mark.parametrize("with_test", [True, False])
@pytest.mark.parametrize("light", [True, False])
def test_a_validation_split_is_halved_by_category_and_train_stays_whole(tmp_path, with_test, light):
    photographs(tmp_path, "train", {"ant": 20, "bee": 10})
    photographs(tmp_path, "val", {"ant": 9, "bee": 2})
    if with_test:
        photographs(tmp_path, "test", {"ant": 2, "bee": 2})
    data = mscnn.load_dataset(str(tmp_path), light)
    assert np.bincount(data.calibration.labels).tolist() in ([4, 1], [5, 1])
    assert np.bincount(data.calibration.labels).sum() + np.bincount(data.certification.labels).sum() == 11
    assert (data.certification.labels == 1).sum() == 1
    held = [tuple(image[0, 0]) for split in (data.calibration, data.certification) for image in split.images]
    assert {red for red, _, _ in held} == {100}
    assert (data.train.images[:, 0, 0, 0] == 0).all() and len(data.train) == (30 if with_test else 24)


def test_light_mode_takes_a_tenth_of_a_validation_split():
    labels = np.arange(10_000) % 2
    images = np.zeros((10_000, 2, 2, 1), np.uint8)
    raw = RawData("many", "", ["a", "b"], images, labels, images, labels, images[:7_000], labels[:7_000])
    sizes = split_data(raw, light_mode=True, seed=0).describe()["sizes"]
    assert sizes == {"train": 1500, "calibration": 350, "certification": 350, "test": 1000}


def test_a_validation_split_that_is_too_small_is_left_out_and_named(tmp_path, capsys):
    photographs(tmp_path, "train", {"ant": 20, "bee": 20})
    photographs(tmp_path, "val", {"ant": 9, "bee": 1})
    data = mscnn.load_dataset(str(tmp_path))
    assert not any((split.images[:, 0, 0, 0] == 100).any() for split in (data.train, data.calibration, data.test))
    told = capsys.readouterr().out
    assert (
        f"{tmp_path / 'val'} is left out: it takes two images or more of each category, and it has 1 of 'bee'" in told
    )
    assert "1 (1 folder), such as val" in told


def test_another_validation_split_is_other_data(tmp_path):
    prints = []
    for count in (4, 6):
        photographs(tmp_path, "train", {"ant": 20, "bee": 20})
        photographs(tmp_path, "val", {"ant": count, "bee": count})
        prints.append(mscnn.load_dataset(str(tmp_path)).source_fingerprint)
    assert prints[0] != prints[1]


def test_two_folders_for_one_split_are_refused(tmp_path):
    category_folders(tmp_path / "mine" / "train")
    category_folders(tmp_path / "mine" / "training")
    with pytest.raises(MSCNNError, match="has train and training: keep one of them"):
        mscnn.load_dataset(str(tmp_path / "mine"))


def test_all_bad_files_are_named_at_once(tmp_path):
    folder = category_folders(tmp_path / "mine")
    bad = [put(folder / "ant" / f"z{i}.jpg", b"<html>") for i in range(12)]
    with pytest.raises(MSCNNError) as refusal:
        mscnn.load_dataset(str(folder))
    assert all(str(path) in str(refusal.value) for path in bad[:2])
    assert "and 2 more" in str(refusal.value) and "12 bad in" in str(refusal.value)


def turned_jpeg(path: Path, entries: bytes) -> Path:
    """Upper half white, with these 12-byte entries of Exif and the orientation 6: a quarter turn."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32] = 255
    count = 1 + len(entries) // 12
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, count) + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + entries
    exif += struct.pack("<I", 0) + struct.pack("<ii", -1, 0)
    Image.fromarray(pixels).save(path, quality=95, exif=exif)
    return path


@pytest.mark.parametrize("entry", [struct.pack("<HHII", 0x11A, 10, 1, 38), struct.pack("<HHII", 0x11A, 5, 1, 9999)])
def test_broken_metadata_does_not_keep_a_picture_from_being_turned(tmp_path, entry):
    read = mscnn.read_image(turned_jpeg(tmp_path / "turned.jpg", entry))
    assert (read[:, 24:] > 200).all() and (read[:, :8] < 50).all()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", ["text", "cut", "empty", "folder"])
def test_whatever_pillow_raises_names_the_file(tmp_path, kind):
    good = put(tmp_path / "good.png").read_bytes()
    text = good[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(70 * 2**20))) + good[33:]
    path = tmp_path / "odd.png"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes({"text": text, "cut": good[:60], "empty": b""}[kind])
    problem = "is a folder: give the path of a picture" if kind == "folder" else "cannot be read as an image: ."
    with pytest.raises(MSCNNError, match=rf"odd\.png {problem}"):
        mscnn.read_image(path)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.full((8, 8), 65535, np.uint16), 255), (np.full((8, 8), 200, np.uint16), 200),
        (np.full((8, 8), 70_000, np.int32), 255), (np.full((8, 8), 200, np.int32), 200),
        (np.full((8, 8), 0.5, np.float32), 128), (np.full((8, 8), 100, np.float32), 100),
    ],
)  # fmt: skip
def test_depth_never_wraps_round_or_turns_black(values, expected):
    assert (mscnn.read_image(Image.fromarray(values)) == expected).all()


@pytest.mark.parametrize("shape", [(40, 40), (40, 40, 1), (40, 40, 3)])
def test_an_array_is_read_as_a_picture_is(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = mscnn.read_image(Image.fromarray(pixels.squeeze()))
    np.testing.assert_array_equal(mscnn.read_image(pixels), expected)
    np.testing.assert_array_equal(mscnn.read_image(pixels / 255), expected)


def test_an_array_that_is_no_picture_is_refused():
    with pytest.raises(MSCNNError, match=r"The image has shape"):
        mscnn.read_image(np.zeros((2, 40, 40, 3), np.uint8))


def test_a_data_set_is_named_by_text_or_a_path(tiny_path, tiny_data):
    assert mscnn.load_dataset(tiny_path).fingerprint == tiny_data.fingerprint
    for incorrect in (None, 5):
        with pytest.raises(MSCNNError, match=f"dataset is {incorrect}: give its name, or the path"):
            mscnn.load_dataset(incorrect)
    with pytest.raises(MSCNNError, match="light_mode is 'no': it has to be True or False"):
        mscnn.load_dataset("digits", light_mode="no")


@pytest.mark.parametrize("picture", [None, b"abc", [[1, 2], [3, 4]], 5])
def test_what_is_no_picture_is_named(picture):
    with pytest.raises(MSCNNError, match=r"The image is a \w+: give a path, a Pillow image or an array"):
        mscnn.read_image(picture)


@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 4)])
def test_a_picture_has_three_sizes(shape):
    with pytest.raises(MSCNNError, match=r"input_shape is \(32, 32.*: use \(height, width, 1\) or"):
        mscnn.read_image(np.zeros((8, 8, 3), np.uint8), shape)


@pytest.mark.parametrize("size", [16, 48])
def test_images_are_brought_to_the_size_that_is_asked_for(tmp_path, size):
    for name in ("one", "two"):
        for i in range(8):
            put(tmp_path / "pictures" / name / f"{i}.png")
    data = mscnn.load_dataset(tmp_path / "pictures", image_size=size)
    assert data.input_shape == (size, size, 3)
    digits = mscnn.load_dataset("digits", light_mode=True, image_size=size)
    side = min(size, 32)  # small images stay small; Stage 1 enlarges them
    assert digits.test.images.shape[1:] == (side, side, 1) and digits.image_size == size
    assert mscnn.load_dataset("digits", light_mode=True).input_shape == (32, 32, 1)


@pytest.mark.parametrize("size", [-1, 15, 513, 32.0, True, "32"])
def test_another_size_is_refused(size):
    with pytest.raises(MSCNNError, match="use 16 to 512 pixels, or 0 for the network's own"):
        mscnn.load_dataset("digits", image_size=size)
