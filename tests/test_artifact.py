"""Exported optimizers: what is written is read, and nothing else is."""

import dataclasses
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

import learned_opt
from learned_opt import artifact, base, discovery
from learned_opt.hyperparams import Hyperparams
from learned_opt.small_fc import SmallFC

RULE = SmallFC(hidden=3)
THETA = RULE.init(jax.random.key(0))
CARD = {"recipe": "quickstart", "licence": "Apache-2.0"}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "exported.safetensors"
    artifact.save(path, RULE, THETA, CARD)
    return path


def write(path, theta, **metadata):
    """A file that is right in all but what is given, its checksum included."""
    tensors = {name: np.asarray(leaf) for name, leaf in base.flatten(theta).items()}
    metadata = {"schema": "1", "rule": discovery.spec_of(RULE), "card": "{}"} | metadata
    metadata["sha256"] = artifact.digest(metadata, tensors)
    save_file(tensors, path, {k: v for k, v in metadata.items() if v is not None})


def refused(path, *words):
    """The message, which names the file and the `words`."""
    with pytest.raises(ValueError, match=path.name) as caught:
        artifact.read(path)
    for word in words:
        assert word in str(caught.value)


def test_metadata_is_plain_text(path):
    """Another program can tell what a file is: safetensors' header is JSON."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    assert metadata["schema"] == "1"
    assert metadata["rule"].startswith("small_fc(hidden=3, ")
    assert json.loads(metadata["card"]) == CARD


def test_a_file_written_elsewhere_is_read(path):
    write(path, THETA, card='{"by": "hand"}')
    rule, theta, card = artifact.read(path)
    assert (rule, card) == (RULE, {"by": "hand"})
    jax.tree.map(np.testing.assert_array_equal, theta, THETA)


def test_no_flipped_bit_goes_unnoticed(path):
    """Header, metadata and tensors, at places spread over the whole file."""
    data = path.read_bytes()
    for place in [*range(8, 64), *range(64, len(data), 37), len(data) - 1]:
        for bit in (0, 6):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match=path.name):
                artifact.read(path)


def test_truncated_files_are_refused(path):
    data = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        refused(path, "damaged")
    path.write_bytes(data + b"\0")
    refused(path, "damaged")


def test_header_that_claims_to_be_huge(path):
    data = bytearray(path.read_bytes())
    data[:8] = b"\xff" * 8
    path.write_bytes(data)
    refused(path, "damaged")


def test_pickles_are_refused_unread(path, tmp_path):
    trace = tmp_path / "unpickled"

    class Bomb:
        def __reduce__(self):
            return open, (str(trace), "w")

    path.write_bytes(pickle.dumps(Bomb()))
    refused(path, "damaged or not a safetensors file")
    np.save(path.with_suffix(".npy"), np.asarray([Bomb()], object), allow_pickle=True)
    refused(path.with_suffix(".npy"), "not a safetensors file")
    assert not trace.exists()


def test_other_safetensors_files_are_refused(path):
    save_file({"w": np.zeros(3, np.float32)}, path)
    refused(path, "is not an exported optimizer")
    save_file({"w": np.zeros(3, np.float32)}, path, {"format": "pt"})
    refused(path, "is not an exported optimizer")


def test_newer_schema_is_refused_before_anything_else(path):
    save_file({"w": np.zeros(3, np.float32)}, path, {"schema": "2", "rule": "?", "card": "?"})
    refused(path, "schema 2", "reads schema 1", "upgrade")


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("smal_fc(hidden=3)", ["unknown rule 'smal_fc'; did you mean 'small_fc'?", "hyperparams"]),
        ("mystery", ["unknown rule 'mystery'", "Known: ", "hyperparams", "small_fc"]),
        ("small_fc(hiden=3)", ["unknown field", "did you mean 'hidden'?"]),
        ("small_fc(hidden=-1)", ["`hidden` must be at least 1, got -1"]),
        ("small_fc(hidden='3')", ["small_fc"]),
        ("small_fc(hidden=3.5)", ["cannot be read"]),
        ("small_fc(hidden=", ["does not parse"]),
        ("-" * 100_000 + "1", ["nested too deeply"]),
        ("__import__('os').getcwd()", ["is not of the form"]),
    ],
)
def test_rules_that_cannot_be_built_are_refused(path, rule, words):
    write(path, THETA, rule=rule)
    refused(path, *words)


@pytest.mark.parametrize("card", ["{", "", "[" * 100_000])
def test_cards_that_are_no_json_are_refused(path, card):
    write(path, THETA, card=card)
    refused(path, "cannot be read")


def test_theta_of_another_width_is_refused(path):
    write(path, SmallFC(hidden=5).init(jax.random.key(0)))
    refused(path, "mlp.w0 is float32[39, 5], not float32[39, 3]", "hidden=3")
    with pytest.raises(ValueError, match=r"`theta`.*mlp\.b1 is float32\[5\], not float32\[3\]"):
        artifact.save(path, RULE, SmallFC(hidden=5).init(jax.random.key(0)), {})


def test_missing_unknown_and_retyped_leaves_are_refused(path):
    theta = {k: v for k, v in THETA.items() if k != "rms_decays"}
    theta |= {"extra": jnp.zeros(2), "momentum_decays": jnp.zeros(3, jnp.float16)}
    words = [
        "missing rms_decays",
        "unknown extra",
        "momentum_decays is float16[3], not float32[3]",
    ]
    write(path, theta)
    refused(path, *words)
    with pytest.raises(ValueError, match=r"missing rms_decays; .*unknown extra"):
        artifact.save(path, RULE, theta, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, np.float32(1), b"x"])
def test_cards_that_would_not_survive_are_not_written(path, value):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="`card` must be plain JSON"):
        artifact.save(path, RULE, THETA, {"score": [value]})
    assert path.read_bytes() == before


@pytest.mark.parametrize("step_size", [float("nan"), np.float32(0.1), jnp.ones(())])
def test_rules_that_would_not_survive_are_not_written(path, step_size):
    with pytest.raises(ValueError, match=r"`rule` .*(could not be built again|not survive)"):
        artifact.save(path, SmallFC(hidden=3, step_size=step_size), THETA, {})


@dataclasses.dataclass(frozen=True)
class Odd:
    """A rule with the kinds of leaves that no rule has yet."""

    theta: str

    def init(self, key):
        return {
            "scalar": {"scale": jnp.asarray(1.5), "half": jnp.asarray([1.5, 3.0], jnp.bfloat16)},
            "transposed": {"w": jnp.arange(6.0).reshape(2, 3)},
            "array": jnp.arange(3.0),
            "tuple": (jnp.arange(3.0), [jnp.zeros((0, 2))]),
            "twins": {"a.b": jnp.zeros(3), "a": {"b": jnp.ones(3)}},
        }[self.theta]

    def optimizer(self, theta, horizon=None):
        return optax.identity()


@pytest.mark.parametrize("kind", ["scalar", "transposed", "array", "tuple"])
def test_any_theta_round_trips(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(discovery, "members", lambda package: {"odd": Odd})
    rule = Odd(kind)
    theta = rule.init(None)
    if kind == "transposed":
        # in memory column by column
        theta = {"w": np.asfortranarray(theta["w"])}
    artifact.save(tmp_path / "odd", rule, theta, {})
    _, found, _ = artifact.read(tmp_path / "odd")
    assert jax.tree.structure(found) == jax.tree.structure(theta)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(theta), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        np.testing.assert_array_equal(got, want)


def test_leaves_of_equal_path_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(discovery, "members", lambda package: {"odd": Odd})
    rule = Odd("twins")
    with pytest.raises(ValueError, match=r"equal dotted path: a\.b"):
        artifact.save(tmp_path / "odd", rule, rule.init(None), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["serialize", "replace"])
def test_a_failing_save_changes_nothing(path, monkeypatch, stage):
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(*((artifact, stage) if stage == "serialize" else (os, stage)), fail)
    with pytest.raises(OSError, match="disk full"):
        artifact.save(path, RULE, jax.tree.map(jnp.zeros_like, THETA), {})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_save_replaces_and_makes_directories(path):
    other = Hyperparams(knots=3)
    artifact.save(path, other, other.init(None), {})
    assert artifact.read(path)[0] == other
    deep = path.parent / "a" / "b.safetensors"
    artifact.save(str(deep), RULE, THETA, {})
    assert artifact.read(str(deep))[0] == RULE
    assert sorted(file.name for file in path.parent.iterdir()) == ["a", path.name]


def test_pretrained_names(path, monkeypatch):
    monkeypatch.setattr(artifact, "PRETRAINED", path.parent)
    (path.parent / "notes.txt").write_text("")
    assert artifact.read("exported")[0] == RULE
    with pytest.raises(FileNotFoundError, match=r"'exportd'; did you mean 'exported'.*: exported$"):
        artifact.read("exportd")
    with pytest.raises(FileNotFoundError, match=r"'zzz'\. Give a .* one of: exported$"):
        learned_opt.load("zzz")


@pytest.mark.parametrize(
    ("learning_rate", "factors"),
    [
        (1.0, (1.0, 1.0, 1.0)),
        (0.25, (0.25, 0.25, 0.25)),
        (jnp.asarray(0.25), (0.25, 0.25, 0.25)),
        (optax.linear_schedule(1.0, 0.0, 2), (1.0, 0.5, 0.0)),
    ],
)
def test_learning_rate_scales_updates(path, learning_rate, factors):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)}
    grads = {"w": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)}
    bare, loaded = RULE.optimizer(THETA), learned_opt.load(path, learning_rate=learning_rate)
    states = [bare.init(params), loaded.init(params)]
    for factor in factors:
        want, states[0] = bare.update(grads, states[0], params)
        got, states[1] = loaded.update(grads, states[1], params, value=1.0, unheard_of=2)
        assert np.any(want["w"])
        np.testing.assert_allclose(got["w"], factor * want["w"], rtol=1e-6)


def test_load_passes_the_horizon(tmp_path):
    rule = Hyperparams(knots=2)
    artifact.save(tmp_path / "adam", rule, rule.init(None), {})
    with pytest.raises(ValueError, match="`horizon` is required by Hyperparams"):
        learned_opt.load(tmp_path / "adam")
    assert learned_opt.load(tmp_path / "adam", horizon=5).init(jnp.zeros(2))


def test_using_an_optimizer_imports_nothing_else(path):
    """In a fresh process, since this one may have imported anything."""
    code = (
        "import learned_opt, sys\n"
        f"learned_opt.load({str(path)!r}, horizon=3)\n"
        "print({'ray', 'flax', 'haiku', 'tensorflow_datasets', 'sklearn', 'tensorflow', 'tasks',"
        " 'meta_train', 'evaluation', 'cluster'} & set(sys.modules))"
    )
    root = Path(learned_opt.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "set()"
