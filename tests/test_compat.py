"""Published weights: files as flax and PyLO write them, read back leaf by leaf."""

import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_adafac_nominal
import test_mlp_lopt
import test_nn_adam
import test_rnn_mlp
import test_velo
import trajectories
from safetensors.numpy import save_file

import learned_opt
from learned_opt import compat, discovery, msgpack
from learned_opt.celo2 import Celo2
from learned_opt.small_fc import SmallFC

CHECKPOINTS = trajectories.SHARED / "checkpoints"


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def small_fc_file(path, hidden=5):
    tree = {
        "nn": {
            "~": {
                "w0": numbers(0, 39, hidden), "b0": numbers(1, hidden),
                "w1": numbers(2, hidden, hidden), "b1": numbers(3, hidden),
                "w2": numbers(4, hidden, 2), "b2": numbers(5, 2),
            }
        },
        "momentum_decays": numbers(6, 3),
        "rms_decays": numbers(7, 1),
        "adafactor_decays": numbers(8, 3),
    }  # fmt: skip
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    return tree


def test_small_fc_of_any_width(tmp_path):
    tree = small_fc_file(tmp_path / "theta.state")
    rule, theta = compat.read_published([tmp_path / "theta.state"], SmallFC)
    assert rule == SmallFC(hidden=5, initial="random")
    mlp = {name: jnp.asarray(leaf) for name, leaf in tree["nn"]["~"].items()}
    want = {
        "mlp": mlp,
        "momentum_decays": tree["momentum_decays"],
        "rms_decays": tree["rms_decays"],
        "factored_decays": tree["adafactor_decays"],
    }
    jax.tree.map(np.testing.assert_array_equal, theta, want)
    rule.optimizer(theta)  # fits


def test_a_checkpoint_of_params_generation_and_step(tmp_path):
    tree = small_fc_file(tmp_path / "theta.state")
    wrapped = {"params": tree, "gen_id": "4", "step": 1000}
    (tmp_path / "wrapped").write_bytes(flax.serialization.msgpack_serialize(wrapped))
    both = [compat.read_published([tmp_path / n], SmallFC)[1] for n in ("theta.state", "wrapped")]
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_pylo_keeps_matrices_transposed_and_decays_elsewhere(tmp_path):
    file = tmp_path / "model.safetensors"
    names = {"input": (32, 39), "linear_0": (32, 32), "output": (2, 32)}
    arrays = {f"network.{n}.weight": numbers(i, *s) for i, (n, s) in enumerate(names.items())}
    arrays |= {f"network.{n}.bias": numbers(9 + i, s[0]) for i, (n, s) in enumerate(names.items())}
    save_file(arrays, file)
    rule, theta = compat.read_published([file], SmallFC)
    assert rule == SmallFC(hidden=32, initial="random")
    for i, name in enumerate(names):
        np.testing.assert_array_equal(theta["mlp"][f"w{i}"], arrays[f"network.{name}.weight"].T)
        np.testing.assert_array_equal(theta["mlp"][f"b{i}"], arrays[f"network.{name}.bias"])
    assert not np.any(theta["momentum_decays"])


def test_the_first_layer_in_groups_is_put_together_in_the_order_of_numbers(tmp_path):
    """As text, w0__10 comes before w0__2."""
    sizes = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
    groups = [np.full((n, 8), i, np.float32) for i, n in enumerate(sizes)]
    want = np.repeat(np.arange(14), sizes)
    rest = {"b0": (8,), "w1": (8, 8), "b1": (8,), "w2": (8, 3), "b2": (3,)}
    layers = {name: numbers(0, *shape) for name, shape in rest.items()}
    tree = {"ff_mod_stack": {"~": layers | {f"w0__{i}": g for i, g in enumerate(groups)}}}
    (tmp_path / "jax").write_bytes(flax.serialization.msgpack_serialize(tree))
    torch = {"b0": "b0", "w1": "dense_w.0", "b1": "dense_b.0", "w2": "dense_w.1", "b2": "dense_b.1"}
    arrays = {torch[name]: layer for name, layer in layers.items()}
    save_file(arrays | {f"w0.{i}": g for i, g in enumerate(groups)}, tmp_path / "torch")
    for file in ("jax", "torch"):
        rule, theta = compat.read_published([tmp_path / file], Celo2)
        assert rule == Celo2.published()
        np.testing.assert_array_equal(theta["mlp"]["w0"][:, 0], want)
        np.testing.assert_array_equal(theta["mlp"]["w2"], layers["w2"])


def test_every_wrong_leaf_is_named(tmp_path):
    file = tmp_path / "theta.state"
    tree = small_fc_file(file)
    tree["nn"]["~"]["w1"] = numbers(0, 4, 4)
    del tree["nn"]["~"]["b2"]
    tree["extra"] = numbers(0, 2)
    file.write_bytes(flax.serialization.msgpack_serialize(tree))
    with pytest.raises(ValueError, match="does not hold the weights of small_fc") as error:
        compat.read_published([file], SmallFC)
    for words in (
        "leaf nn/~/w1 has shape (4, 4), not (5, 5)",
        "missing leaf nn/~/b2",
        "unknown leaf extra",
    ):
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"leaf nn/~/w0 has shape \(39, 5\), not \(39, 7\)"):
        compat.read_published([file], SmallFC(hidden=7))


def test_a_file_of_another_rule_is_refused(tmp_path):
    small_fc_file(tmp_path / "theta.state")
    with pytest.raises(
        ValueError, match=r"missing leaf ff_mod_stack/~/w0__0.*unknown leaf nn/~/w0"
    ):
        compat.read_published([tmp_path / "theta.state"], Celo2)
    from learned_opt.hyperparams import Hyperparams

    with pytest.raises(ValueError, match="unknown rule with published weights 'hyperparams'"):
        compat.read_published([tmp_path / "theta.state"], Hyperparams)


def test_a_pickle_is_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("harm").touch, ())

    for protocol in range(2, 6):
        (tmp_path / "theta").write_bytes(pickle.dumps({"w": Bomb()}, protocol=protocol))
        with pytest.raises(ValueError, match=r"is a pickle.*never loaded"):
            compat.read_published([tmp_path / "theta"], SmallFC)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"hello", b"\x81\xa1a\xc7", b"{}" * 30, b"\x90" * 9]
)
def test_what_is_no_file_of_arrays_is_refused(tmp_path, data):
    (tmp_path / "theta").write_bytes(data)
    with pytest.raises(ValueError, match=r"theta (is no msgpack|holds no arrays)"):
        compat.read_published([tmp_path / "theta"], SmallFC)
    with pytest.raises(ValueError, match="`files` is empty"):
        compat.read_published([], SmallFC)
    with pytest.raises(FileNotFoundError, match="no file"):
        compat.read_published([tmp_path / "nowhere"], SmallFC)


def test_msgpack_reads_what_flax_writes():
    tree = {
        "numbers": [0, 127, -1, -32, -33, 128, 2**16, 2**40, -(2**20), 2.5, None, True, False],
        "text": {"short": "x", "long": "x" * 40, "longer": "x" * 300},
        "arrays": {"f32": numbers(0, 2, 3), "empty": numbers(0, 0, 3), "scalar": np.float32(3.0)},
        "half": np.asarray(jnp.ones(300, jnp.bfloat16)),
        "big": numbers(0, 20_000),
        **{f"key{i}": i for i in range(20)},
    }
    data = flax.serialization.msgpack_serialize(tree)
    got = msgpack.unpack(data)
    assert got["numbers"] == tree["numbers"]
    assert got["text"] == tree["text"]
    jax.tree.map(np.testing.assert_array_equal, got, flax.serialization.msgpack_restore(data))


def test_damaged_msgpack_is_an_error_and_no_crash():
    data = flax.serialization.msgpack_serialize({"a": numbers(0, 4), "b": {"c": [1, 2], "d": "x"}})
    for end in range(len(data)):
        with pytest.raises(ValueError, match="not msgpack"):
            msgpack.unpack(data[:end])
    rng = np.random.default_rng(0)
    for _ in range(3000):
        broken = bytearray(data)
        broken[rng.integers(len(data))] = rng.integers(256)
        try:
            msgpack.unpack(bytes(broken))
        except ValueError:
            continue


def recorded(name):
    return trajectories.load(trajectories.GOLDEN / f"{name}.npz")


# rule -> a tag of its recorded trajectories, and the theta that follows them
RECORDED = {
    "mlp_lopt": ("mlp_perturbed", test_mlp_lopt.theta_of),
    "nn_adam": ("perturbed", test_nn_adam.theta_of),
    "adafac_nominal": ("perturbed", test_adafac_nominal.theta_of),
    "rnn_mlp": ("perturbed", test_rnn_mlp.theta_of),
    "velo": (
        "hyperv2_l16_p8_perturbed",
        lambda tag: test_velo.theta_of(recorded("velo"), tag),
    ),
}


@pytest.mark.parametrize("name", RECORDED)
def test_the_thetas_of_recorded_trajectories(name, tmp_path):
    """Written as flax would, under the names of the published implementations."""
    (tag, theta_of), tree = RECORDED[name], {}
    for path, leaf in trajectories.under(recorded(name), f"{tag}/theta|").items():
        *parents, last = path.split("|")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    (tmp_path / "theta").write_bytes(flax.serialization.msgpack_serialize(tree))
    rule, theta = compat.read_published([tmp_path / "theta"], discovery.members(learned_opt)[name])
    want = theta_of(tag)
    assert jax.tree.structure(theta) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, theta, want)
    rule.optimizer(theta, 100)  # fits


@pytest.mark.parametrize("name", ["celo", "celo_adam"])
def test_released_checkpoints(name):
    file = CHECKPOINTS / f"{name}.theta.state"
    if not file.is_file():
        pytest.skip("the released weights are not here")
    cls = discovery.members(learned_opt)[name]
    rule, theta = compat.read_published([file], cls)
    assert rule == cls.published()
    leaves = compat.read_leaves(file)
    np.testing.assert_array_equal(
        theta["scheduler"]["mix_all"]["w"], leaves["rnn_params/linear_1/w"]
    )
    np.testing.assert_array_equal(
        theta["scheduler"]["initial"]["cell"], leaves["lstm_init_state/cell"][0]
    )
