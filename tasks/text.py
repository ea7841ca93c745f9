"""Character text as a pytree: of the user's own installed packages, and drawn by a stated chain.

Nothing is downloaded or shipped, so a text depends on the versions that are installed; its
fingerprint says which it is.
"""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tasks.base import Key, Split
from tasks.data import PARTS, Batch, entropy, random_rows, sha256, unknown_name
from tasks.fields import positive_integers
from tasks.sources import BSD, OWN

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # of every text, so that no shape depends on it


def encode(text: str) -> np.ndarray:
    """uint8 [N], indices into ALPHABET; other characters become question marks, tabs spaces."""
    codes = np.frombuffer(text.replace("\t", " ").encode("ascii", "replace"), np.uint8)
    table = np.full(128, ALPHABET.index("?"), np.uint8)
    table[[ord(symbol) for symbol in ALPHABET]] = np.arange(len(ALPHABET))
    return table[codes]


def decode(tokens: np.ndarray | jax.Array) -> str:
    return "".join(ALPHABET[token] for token in np.asarray(tokens))


class TextStatistics(NamedTuple):
    target: float  # entropy of the single characters of the training split, in nats


# Compared by identity, as `tasks.data.Dataset`, whose interface it has.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Text:
    """A text cut into contiguous splits. Its rows are windows, numbered by where they start; none
    crosses the border of a split.

    Its `repr` is that of its name, which `load_text` turns back into the same text.
    """

    tokens: np.ndarray | jax.Array  # uint8 [N]
    name: str = dataclasses.field(metadata={"static": True})
    splits: tuple[tuple[int, int], ...] = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})
    statistics: TextStatistics = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        shortest = min(stop - start for start, stop in self.splits)
        if not isinstance(self.length, int) or not 0 < self.length < shortest:
            raise ValueError(
                f"`length` must be an integer from 1 to {shortest - 1}, since a split of "
                f"{self.name!r} has {shortest} characters, got {self.length!r}"
            )

    @property
    def classes(self) -> int:
        return len(ALPHABET)

    def example(self) -> jax.Array:
        """[1, length] int32 zeros."""
        return jnp.zeros((1, self.length), jnp.int32)

    def batch(self, key: Key, split: Split, size: int) -> Batch:
        """`size` windows of `split`, drawn with replacement."""
        return self.take(self.rows(key, split, size))

    def rows(self, key: Key, split: Split, size: int, subset: float | jax.Array = 1.0) -> jax.Array:
        """int32 [size] starts of windows in the first `subset` of `split`."""
        starts = tuple((start, stop - self.length) for start, stop in self.splits)
        return random_rows(key, starts, split, size, subset)

    def take(self, rows: jax.Array) -> Batch:
        """Inputs and targets [rows, length] int32: the characters from each start on, and the one
        after each of them.
        """
        places = rows[:, None] + jnp.arange(self.length + 1)[None]
        window = jnp.asarray(self.tokens).at[places].get(mode="promise_in_bounds")
        window = window.astype(jnp.int32)
        return Batch(window[:, :-1], window[:, 1:])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of characters, splits and length: a key for caches."""
        tokens = np.asarray(self.tokens)
        return sha256(tokens, tokens[:0], (self.splits, self.length))

    def __repr__(self) -> str:
        return repr(self.name)


def split(name: str, text: str, length: int, part: str = "") -> Text:
    """`text`, or one half of it, as train, valid and test: its first 70, next 15, last 15 %."""
    tokens = encode(text)
    half = len(tokens) // 2
    tokens = {"": tokens, "meta_train": tokens[:half], "held_out": tokens[half:]}[part]
    train, valid = int(0.7 * len(tokens)), int(0.85 * len(tokens))
    splits = ((0, train), (train, valid), (valid, len(tokens)))
    counts = np.bincount(tokens[:train], minlength=len(ALPHABET))
    return Text(tokens, name, splits, length, TextStatistics(entropy(counts)))


@functools.cache
def load_text(name: str, length: int) -> Text:
    """The text called `SOURCE[/PART]` in windows of `length` characters; the same arguments always
    give the same object.

    SOURCE is one of `TEXTS`. PART is meta_train or held_out, the first and the second half of it,
    each with its own train, valid and test split; without PART all of it is used.

    Raises:
      ValueError: no such text; the message lists what exists. Or it is too short.
      FileNotFoundError: what the text is made of is not in this installation.
    """
    source, _, part = name.partition("/")
    if source not in TEXTS:
        raise ValueError(unknown_name("name", source, TEXTS))
    if part not in PARTS and source != name:
        raise ValueError(unknown_name("name", name, [f"{source}/{known}" for known in PARTS]))
    return split(name, _read(source), length, part)


@functools.lru_cache(maxsize=4)
def _read(source: str) -> str:
    text = TEXTS[source].read()
    if not text:
        others = ", ".join(other for other in TEXTS if other != source)
        raise FileNotFoundError(
            f"`name` {source!r}: this installation has no source files of {TEXTS[source].about}; "
            f"install them in full, or use another text: {others}"
        )
    return text


def load_text_field(family: Any) -> None:
    """For a family's `__post_init__`: its field `data` becomes the text that is named in it, in
    windows of its field `length`, and its `batch_size` is checked.
    """
    data, length = family.data, family.length
    # jax rebuilds pytrees with placeholders for `data`
    if isinstance(data, str):
        object.__setattr__(family, "data", load_text(data, length))
    elif isinstance(data, Text) and data.length != length:
        object.__setattr__(family, "data", dataclasses.replace(data, length=length))
    positive_integers(family, "batch_size")


class Source(NamedTuple):
    read: Callable[[], str]  # "" where it is not installed
    about: str
    licence: str


def _topics() -> str:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return ""
    return "\n".join(topics[name] for name in sorted(topics))


# Of the standard library of every Python from 3.11 on, and written by hand.
MODULES = (
    *("argparse", "ast", "bdb", "calendar", "configparser", "contextlib", "copy", "dataclasses"),
    *("difflib", "dis", "doctest", "enum", "fractions", "functools", "gzip", "heapq", "inspect"),
    *("ipaddress", "mailbox", "optparse", "pdb", "pickle", "pickletools", "plistlib", "pprint"),
    *("random", "shutil", "socket", "statistics", "subprocess", "tempfile", "textwrap"),
    *("threading", "tokenize", "traceback", "typing", "uuid"),
)


def _modules() -> str:
    sources = []
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        source = getattr(spec.loader, "get_source", lambda _: None)(name) if spec else None
        sources.append(source or "")
    return "\n".join(sources) if all(sources) else ""


def _documentation(package: str, *parts: str) -> str:
    """The .rst files and docstrings in the folders `parts` of a package, which is not imported."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    texts = []
    for path in sorted(p for part in parts for p in Path((folders or [""])[0], part).rglob("*.*")):
        if path.suffix == ".rst":
            texts.append(path.read_text("utf-8"))
        elif path.suffix == ".py" and "tests" not in path.parts:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of their escape sequences
                texts += _docstrings(ast.parse(path.read_text("utf-8")))
    return "\n\n".join(texts)


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> list[str]:
    texts = [ast.get_docstring(node) or ""]
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            texts += _docstrings(child)
    return [text for text in texts if text]


# The chain of `markov`: a symbol's eight possible successors depend on it and on the one before it
# modulo 4; they have the chances 1/2, 1/4, ..., 1/128, 1/128, whatever those two are.
MARKOV_CHANCES = np.array([2.0**-i for i in (1, 2, 3, 4, 5, 6, 7, 7)])
MARKOV_ENTROPY_RATE = entropy(MARKOV_CHANCES)  # nats per character, 127/64 log 2


def markov_successors() -> np.ndarray:
    """[4, 96, 8]: likely symbols, the more so the lower their index, are more often successors."""
    random = np.random.default_rng(0)
    zipf = 1 / np.arange(1, len(ALPHABET) + 1)
    keys = np.log(zipf) + random.gumbel(size=(4, len(ALPHABET), len(ALPHABET)))
    return np.argsort(-keys, axis=-1)[..., :8]  # a sample without replacement, by Gumbel's trick


def _markov(size: int = 200_000) -> str:
    successors = markov_successors().tolist()
    draws = np.random.default_rng(1).choice(8, size, p=MARKOV_CHANCES).tolist()
    before, last, symbols = 0, 0, []
    for draw in draws:
        before, last = last, successors[before % 4][last][draw]
        symbols.append(last)
    return decode(np.array(symbols))


PSF = "PSF-2.0 (Python)"
TEXTS: dict[str, Source] = {
    "python_docs": Source(_topics, "Python's language reference (pydoc_data.topics)", PSF),
    "python_code": Source(_modules, "Python's standard library, a fixed list of modules", PSF),
    "sklearn_docs": Source(
        functools.partial(
            _documentation, "sklearn", "cluster", "datasets", "ensemble", "linear_model"
        ),
        "scikit-learn's docstrings and descriptions of datasets",
        BSD,
    ),
    "numpy_docs": Source(
        functools.partial(_documentation, "numpy", "_core", "fft", "lib", "linalg", "polynomial"),
        "NumPy's docstrings",
        "BSD-3-Clause (NumPy)",
    ),
    "markov": Source(_markov, "a Markov chain of order 2, 200,000 characters", OWN),
}
