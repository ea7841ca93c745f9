"""Texts and language models against counts, closed forms and recursions in float64."""

import collections
import dataclasses
import math
import sys

import jax
import numpy as np
import pytest

from tasks import text
from tasks.data import SPLITS
from tasks.dynamic import Dynamic
from tasks.rnn_lm import RnnLM
from tasks.transformer_lm import TransformerLM


def hundred(length=4):
    """A hundred characters."""
    return text.split("hundred", "".join(text.ALPHABET[7 * i % 96] for i in range(100)), length)


def weights(tree):
    """Random params like `tree`, biases too, as jax has them and as float64."""
    random = np.random.default_rng(0)
    drawn = jax.tree.map(lambda p: 0.5 * random.standard_normal(p.shape).astype(np.float32), tree)
    return drawn, jax.tree.map(lambda p: p.astype(np.float64), drawn)


def cross_entropy(logits, targets):
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(logs, np.asarray(targets)[..., None], axis=-1).mean()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_windows_are_consecutive_characters_of_their_split_alone():
    data = hundred()
    assert data.splits == ((0, 70), (70, 85), (85, 100))
    draw = jax.jit(lambda data, key, split: data.rows(key, split, 2000), static_argnums=2)
    for split, (start, stop) in zip(SPLITS, data.splits, strict=True):
        rows = np.asarray(draw(data, jax.random.key(0), split))
        # all windows whose last target is in the split, and no other
        assert set(rows.tolist()) == set(range(start, stop - 4))
        batch = data.take(rows)
        for i in range(4):
            np.testing.assert_array_equal(batch.inputs[:, i], data.tokens[rows + i])
            np.testing.assert_array_equal(batch.targets[:, i], data.tokens[rows + i + 1])
    first = np.asarray(data.rows(jax.random.key(1), "train", 2000, 0.5))
    assert first.max() == 32  # the last of the first half of 66


def test_halves_share_no_character():
    whole, *halves = (
        text.load_text(f"markov{part}", 8) for part in ("", "/meta_train", "/held_out")
    )
    np.testing.assert_array_equal(np.concatenate([h.tokens for h in halves]), whole.tokens)
    assert len(halves[0].tokens) == len(halves[1].tokens) == 100_000
    assert text.load_text("markov", 8) is whole
    assert repr(halves[1]) == "'markov/held_out'"
    prints = {x.fingerprint for x in (whole, *halves, text.load_text("markov", 9))}
    assert len(prints) == 4


def test_all_characters_are_mapped_to_the_96():
    assert len(set(text.ALPHABET)) == len(text.ALPHABET) == 96
    assert text.decode(text.encode(text.ALPHABET)) == text.ALPHABET
    assert text.decode(text.encode("a\tb\ré\x7f")) == "a b???"


def test_untrained_is_the_entropy_of_single_characters():
    data = text.load_text("markov/held_out", 8)
    counts = collections.Counter(text.decode(data.tokens)[: data.splits[0][1]])
    total = sum(counts.values())
    expected = -sum(n / total * math.log(n / total) for n in counts.values())
    task = RnnLM(data=data, length=8)(jax.random.key(0))
    np.testing.assert_allclose(task.normalize(expected), 1, rtol=1e-6)


def test_the_entropy_rate_of_the_markov_chain_is_that_of_its_counts():
    assert pytest.approx(127 / 64 * math.log(2)) == text.MARKOV_ENTROPY_RATE
    tokens = text.load_text("markov", 8).tokens.astype(int)
    contexts = 96 * (tokens[:-2] % 4) + tokens[1:-1]
    counts = np.zeros((4 * 96, 96))
    np.add.at(counts, (contexts, tokens[2:]), 1)
    visited = counts[counts.sum(axis=1) > 0]
    chances = visited / visited.sum(axis=1, keepdims=True)
    logs = np.log(np.where(visited, chances, 1))
    counted = -(visited * logs).sum() / visited.sum()
    # Miller and Madow: a plug-in entropy is low by (outcomes - 1) / 2 counts in every context
    counted += ((visited > 0).sum() - len(visited)) / (2 * visited.sum())
    # the deviation of -log chance over the root of 200,000
    assert counted == pytest.approx(text.MARKOV_ENTROPY_RATE, abs=4 * 0.95 / math.sqrt(200_000))
    assert (visited > 0).sum(axis=1).max() == 8


def test_texts_of_this_installation():
    phrases = {
        "python_docs": 'The "assert" statement',
        "python_code": "class ArgumentParser(",
        "sklearn_docs": "Ordinary least squares Linear Regression.",
        "numpy_docs": "Return an array of zeros",
    }
    for name, phrase in phrases.items():
        data = text.load_text(name, 32)
        assert phrase in text.decode(data.tokens)
        assert 4e5 < len(data.tokens) < 2.5e6
        # English and code: 4.2 to 5 bits
        assert 2.9 < data.statistics.target < 3.5
        others = np.bincount(data.tokens, minlength=96)[text.ALPHABET.index("?")]
        assert others < 0.005 * len(data.tokens)
    assert set(text.TEXTS) == {*phrases, "markov"}


def test_a_text_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    text._read.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"`name` 'python_docs'.*another text: python_code"):
        text.load_text("python_docs", 5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: text.load_text("markof", 8), "`name` 'markof'. Did you mean 'markov'"),
        (lambda: text.load_text("markov/heldout", 8), "Did you mean 'markov/held_out'"),
        (lambda: text.load_text("markov", 0), "`length` must be an integer from 1 to 29999"),
        (lambda: hundred(15), "`length`.*from 1 to 14, since a split of 'hundred' has 15 char"),
        (lambda: RnnLM(data="markov", cell="rnn"), "unknown `cell` 'rnn'.*lstm, gru"),
        (lambda: RnnLM(data="markov", hidden=0), "`hidden` must be a positive integer, got 0"),
        (
            lambda: RnnLM(data="markov", dynamic=Dynamic(activation=("relu",))),
            r"`dynamic`.*lstm are its own, got \('relu',\)",
        ),
        (lambda: TransformerLM(data="markov", heads=3), "`width` must be a multiple of `heads`"),
    ],
)
def test_errors_say_what_to_do(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_another_length_is_other_windows_of_the_same_text():
    family = TransformerLM(data=hundred(), length=6)
    assert family.data.length == 6
    assert dataclasses.replace(family, length=5).data.length == 5
    assert family.data.tokens is dataclasses.replace(family, length=5).data.tokens


def lstm(params, x, state):
    """Hochreiter and Schmidhuber's, the forget gate's bias raised by 1 as haiku does."""
    h, c = state
    gates = np.concatenate([x, h], axis=1) @ params["lstm/linear"]["w"]
    i, g, f, o = np.split(gates + params["lstm/linear"]["b"][None], 4, axis=1)
    c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
    h = sigmoid(o) * np.tanh(c)
    return h, (h, c)


def gru(params, x, state):
    """The first version of arXiv:1406.1078, where the reset gate comes before the product."""
    h, _ = state
    p = params["gru"]
    (xz, xr, xa), (wz, wr, wa), (bz, br, ba) = (
        np.split(v, 3, axis=-1) for v in (x @ p["w_i"], p["w_h"], p["b"])
    )
    z, r = sigmoid(xz + h @ wz + bz[None]), sigmoid(xr + h @ wr + br[None])
    h = (1 - z) * h + z * np.tanh(xa + (r * h) @ wa + ba[None])
    return h, (h, h)


@pytest.mark.parametrize("cell", [lstm, gru])
def test_recurrent_model_against_its_recursion(cell):
    family = RnnLM(data=hundred(), cell=cell.__name__, embed=3, hidden=4, length=5, batch_size=2)
    task = family(jax.random.key(0))
    params, exact = weights(jax.eval_shape(task.init, jax.random.key(1)))
    batch = task.batch(jax.random.key(2), "train")
    state, logits = (np.zeros((2, 4)),) * 2, []
    for t in range(5):
        x = exact["embed"]["w"][np.asarray(batch.inputs)[:, t]]
        output, state = cell(exact, x, state)
        logits.append(output @ exact["readout"]["w"] + exact["readout"]["b"][None])
    expected = cross_entropy(np.stack(logits, axis=1), batch.targets)
    np.testing.assert_allclose(task.loss(params, batch), expected, rtol=1e-5)


@pytest.fixture(scope="module")
def transformer():
    family = TransformerLM(data=hundred(), width=6, heads=2, length=5, batch_size=2)
    task = family(jax.random.key(0))
    params, exact = weights(jax.eval_shape(task.init, jax.random.key(1)))
    return task, params, exact


def test_transformer_by_hand(transformer):
    task, params, exact = transformer
    batch = task.batch(jax.random.key(2), "train")

    def norm(x, p):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
        return x * p["scale"][None, None] + p["bias"][None, None]

    x = exact["embed"]["kernel"][np.asarray(batch.inputs)] + exact["position_embedding"][None]
    block = exact["blocks"][0]
    inputs, mixed = norm(x, block["attention_norm"]), np.zeros((2, 5, 6))
    query, key, value = (
        inputs @ block["attention"][name]["kernel"] for name in ("query", "key", "value")
    )
    for example in range(2):
        for t in range(5):
            for head in (slice(0, 3), slice(3, 6)):
                scores = key[example, : t + 1, head] @ query[example, t, head] / math.sqrt(3)
                attention = np.exp(scores) / np.exp(scores).sum()
                mixed[example, t, head] = attention @ value[example, : t + 1, head]
    x = x + mixed @ block["attention"]["out"]["kernel"]
    up = norm(x, block["mlp_norm"]) @ block["up"]["kernel"] + block["up"]["bias"][None, None]
    gelu = up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))) / 2
    x = x + gelu @ block["down"]["kernel"] + block["down"]["bias"][None, None]
    logits = norm(x, exact["norm"]) @ exact["readout"]["kernel"]
    expected = cross_entropy(logits + exact["readout"]["bias"][None, None], batch.targets)
    np.testing.assert_allclose(task.loss(params, batch), expected, rtol=1e-5)


def test_no_position_of_the_transformer_sees_a_later_character(transformer):
    task, params, _ = transformer
    inputs = np.asarray(task.batch(jax.random.key(2), "train").inputs)
    before = task.network.apply(params, inputs)
    for t in range(5):
        changed = inputs.copy()
        changed[:, t] = (changed[:, t] + 1) % 96
        differs = np.any(np.asarray(task.network.apply(params, changed) != before), axis=2)
        np.testing.assert_array_equal(differs, np.broadcast_to(np.arange(5) >= t, (2, 5)))
