"""TensorFlow Datasets by name, without TensorFlow: read once as array_record, kept as one .npz."""

import contextlib
import logging
import os
import re
import socket
import struct
import tempfile
import threading
import urllib.parse
import zipfile
import zlib
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from tasks.data import cache_directory, resized, sha256
from tasks.sources import SOURCES, Rows

LOOKUP_SECONDS = 3.0


def read(name: str, size: tuple[int, int] | None) -> Rows:
    """The 'train' split of the TFDS dataset `name` (also NAME/CONFIG, NAME:VERSION), mapped from a
    file: nothing is in memory before it is used.

    The official test split is never read: ours is cut from 'train'. Images keep TFDS's layout [N,
    H, W, C] (one channel stays one channel) and are stored as uint8, resized to `size` (height,
    width) where given. Labels are integers from 0 on, or one real number, for regression. The rows
    are cached under $LEARNED_OPT_CACHE (default ~/.cache/learned-opt), for which they are in memory
    once; delete the file to read the dataset anew. $TFDS_DATA_DIR is TFDS's own folder, where a
    dataset is looked for and prepared.

    Raises:
      ValueError: TFDS has no such dataset, or it is not one of labelled arrays of one shape, or
        needs TensorFlow.
      ConnectionError: it is not on disk and its host cannot be reached; said within 5 seconds.
    """
    data_dir = os.environ.get("TFDS_DATA_DIR")
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    label = f"tfds-{name}" + (f"@{size[0]}x{size[1]}" if size else "")
    # Two folders may hold different datasets of one name.
    place = f"-{zlib.crc32(data_dir.encode()):08x}" if data_dir else ""
    path = cache / f"{re.sub(r'[^A-Za-z0-9@._-]', '-', label)}{place}.npz"
    rows = _cached(path)
    if rows is None:
        with filelock.FileLock(f"{path}.lock"):
            rows = _cached(path)  # another process may have written it while we waited
            if rows is None:
                _store(path, _prepared(name, size, data_dir))
                rows = _cached(path)
    if rows is None:
        raise OSError(f"{path} does not hold what was just written to it")
    return rows


def _cached(path: Path) -> Rows | None:
    """The rows in `path`, or None when it is missing or does not hold what was written."""
    if not path.exists():
        return None
    try:
        # Opened here because numpy leaves a truncated file open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            rows = Rows(_mapped(raw, "inputs"), file["targets"], int(file["classes"]))
            if str(file["sha256"]) == sha256(*rows):
                return rows
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass
    logging.getLogger(__name__).warning("%s is damaged and is built anew", path)
    return None


def _mapped(file: Any, name: str) -> np.ndarray:
    """An array of an open .npz, which numpy itself can only read whole."""
    with zipfile.ZipFile(file) as archive:
        member = archive.getinfo(f"{name}.npy")
    # after the local header and its two fields of variable length stands the .npy
    file.seek(member.header_offset + 26)
    file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
    version = np.lib.format.read_magic(file)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if version != (1, 0) or member.compress_type != zipfile.ZIP_STORED or fortran:
        raise ValueError(f"{name} is not stored as numpy.savez does")
    return np.memmap(file.name, dtype, "r", file.tell(), shape)


def _store(path: Path, rows: Rows) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.savez(file, sha256=np.array(sha256(*rows)), **rows._asdict())
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _prepared(name: str, size: tuple[int, int] | None, data_dir: str | None) -> Rows:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"`name` 'tfds:{name}': TFDS cannot find it ({first}) Its names are listed by "
            f"tensorflow_datasets.list_builders(); embedded datasets: {', '.join(SOURCES)}."
        ) from None
    if not builder.is_prepared():
        _prepare(builder, name)
    if "train" not in builder.info.splits:
        raise ValueError(
            f"`name` 'tfds:{name}' has no 'train' split, only {list(builder.info.splits)}"
        )
    return _in_memory(builder, name, size)


def _prepare(builder: Any, name: str) -> None:
    import tensorflow_datasets as tfds

    # TFDS itself retries for more than 200 s. Builders without an address may need no network, so
    # they are not checked.
    urls = list(builder.info.as_proto.location.urls)
    host = urllib.parse.urlsplit(builder.info.homepage).hostname if urls else None
    proxied = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    if host and not proxied and not _resolves(host):
        raise ConnectionError(_offline(builder, name, f"{host} could not be looked up"))
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except ImportError as error:
        raise ValueError(
            f"`name` 'tfds:{name}' cannot be prepared without TensorFlow ({error}): "
            "pip install 'learned-opt[tf]', or prepare it elsewhere as array_record."
        ) from error
    except OSError as error:
        raise ConnectionError(_offline(builder, name, str(error).partition("\n")[0])) from error


def _offline(builder: Any, name: str, reason: str) -> str:
    return (
        f"`name` 'tfds:{name}' is not prepared in {builder.data_path}, and downloading it failed: "
        f"{reason}. Prepare it with file_format='array_record' on a machine with network and set "
        f"TFDS_DATA_DIR to that folder, or use an embedded dataset: {', '.join(SOURCES)}."
    )


def _resolves(host: str) -> bool:
    """Whether `host` has an address. The lookup has no timeout of its own, so it runs in a thread
    that may be left behind.
    """
    found: list[Any] = []

    def look_up() -> None:
        with contextlib.suppress(OSError):
            found.extend(socket.getaddrinfo(host, None))

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(LOOKUP_SECONDS)
    return bool(found)


def _in_memory(builder: Any, name: str, size: tuple[int, int] | None) -> Rows:
    keys = builder.info.supervised_keys
    if keys is None or len(keys) != 2 or not all(isinstance(key, str) for key in keys):
        raise ValueError(
            f"`name` 'tfds:{name}' is not an (input, label) dataset: its keys are {keys}"
        )
    label = builder.info.features[keys[1]]
    kind = np.dtype(label.np_dtype).kind if label.shape == () else "O"
    if kind not in "biuf":
        raise ValueError(
            f"`name` 'tfds:{name}' has the label {label}; it must be one integer (a class) or one "
            "real number (for regression) a row"
        )
    try:
        source = builder.as_data_source(split="train")
    except (NotImplementedError, ImportError, ValueError) as error:
        raise ValueError(
            f"`name` 'tfds:{name}' in {builder.data_path} cannot be read without TensorFlow; "
            f"prepare it anew with file_format='array_record' ({error})"
        ) from error
    rows = np.empty(0)
    targets = np.empty(len(source), np.float32 if kind == "f" else np.int64)
    for index in range(len(source)):
        example = source[index]
        row = np.asarray(example[keys[0]])
        row = row if size is None else resized(row[None], size)[0]
        if index == 0 and row.dtype.kind in "uif":
            dtype = row.dtype if row.dtype == np.uint8 and row.ndim > 1 else np.float32
            rows = np.empty((len(source), *row.shape), dtype)
        if row.shape != rows.shape[1:] or row.dtype.kind not in "uif":
            raise ValueError(
                f"`name` 'tfds:{name}' has inputs of dtype {row.dtype} and the shapes "
                f"{rows.shape[1:]} and {row.shape}; rows must be numbers of one shape: give images "
                "a size, as tfds:NAME@32x32"
            )
        rows[index], targets[index] = row, example[keys[1]]
    if kind == "f":
        return Rows(rows, targets, 0)
    if targets.min() < 0:
        raise ValueError(f"`name` 'tfds:{name}' has labels below 0, which are no classes")
    classes = getattr(label, "num_classes", None) or int(targets.max()) + 1
    return Rows(rows, targets.astype(np.int32), classes)
