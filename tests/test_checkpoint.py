"""Checkpoints: exact, atomic under kill -9, independent of the number of devices, and clear when they do not fit."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cimjax.training.run import checkpoint
from cimjax.training.run.checkpoint import Checkpoints
from cimjax.training.run.folder import RunFolderError

# Saves for ever, from the step after the last one; every third state is marked as the best.
_SAVE_FOR_EVER = """
import sys, jax.numpy as jnp
from cimjax.training.run.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
step = checkpoints.latest_step() or 0
print("start", flush=True)
while True:
    step += 1
    checkpoints.save(step, {f"leaf{i}": jnp.full((40, 50), step) for i in range(5)}, {"step": step}, best=step % 3 == 0)
"""

# Restores one device's state onto four, holds it against the plain file beside it, and saves what is sharded.
_FOUR_DEVICES = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from cimjax.training.run.checkpoint import Checkpoints
mesh = Mesh(np.array(jax.devices()), ("data",))
shardings = {"w": NamedSharding(mesh, PartitionSpec("data")), "b": NamedSharding(mesh, PartitionSpec())}
abstract = {k: jax.ShapeDtypeStruct((8, 3), "float32", sharding=s) for k, s in shardings.items()}
state, extra = Checkpoints(sys.argv[1]).restore(abstract)
expected = np.load(sys.argv[1] + "/expected.npz")
assert extra == {"epoch": 1} and len(jax.devices()) == 4
for name, leaf in state.items():
    assert leaf.sharding == shardings[name] and np.asarray(leaf).tobytes() == expected[name].tobytes()
Checkpoints(sys.argv[2]).save(2, state, {"epoch": 2})
print("done")
"""


def start(script, *arguments, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def training_state(features=3):
    key = jax.random.key(0)
    params = {
        "stem": {"kernel": jax.random.normal(key, (3, 3, 2, features)), "log_step": jnp.zeros((1, features))},
        "head": {"kernel": jax.random.normal(key, (features, 5)).astype(jnp.bfloat16)},
    }
    optimizer = optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9), optax.scale_by_adam())
    return {
        "params": params,
        "batch_stats": {"mean": jnp.array([jnp.nan, -0.0, jnp.inf]), "empty": {}, "none": None},
        "optimizer": optimizer.init(params),
        "step": jnp.int32(7),
        "key_data": jax.random.key_data(key),
        "mask": jnp.array([True, False]),
        "host": np.arange(4, dtype=np.int8),
    }


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def refused(call, *parts):
    with pytest.raises(RunFolderError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_round_trip_is_exact_and_quiet(tmp_path, capfd):
    state = training_state()
    extra = {"epoch": 3, "best": 0.1, "history": [1, None, "a"], "nan": float("nan")}
    Checkpoints(tmp_path).save(7, state, extra)
    for like in (state, abstract(state)):
        restored, read = Checkpoints(tmp_path).restore(like)
        same_bits(restored, state)
        assert str(read) == str(extra)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    assert capfd.readouterr() == ("", "")


def test_the_last_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() is None
    # The fourth and fifth: the same step again, and an earlier one.
    for step, best in [(10, True), (20, False), (30, True), (40, False), (40, False), (35, False)]:
        checkpoints.save(step, {"a": jnp.full(2, step)}, {"step": step}, best=best)
        assert Checkpoints(tmp_path).latest_step() == step
    assert names(tmp_path) == ["000003_step_30_best", "000006_step_35"]
    assert checkpoints.restore({"a": jnp.zeros(2, int)}, which="best")[1] == {"step": 30}
    assert checkpoints.restore({"a": jnp.zeros(2, int)})[1] == {"step": 35}
    with pytest.raises(ValueError, match="`step` is -1"):
        checkpoints.save(-1, {"a": jnp.zeros(2)}, {})


def test_kill_at_random_moments(tmp_path):
    like = {f"leaf{i}": jax.ShapeDtypeStruct((40, 50), jnp.int32) for i in range(5)}
    moments = random.Random(0)
    step = 0
    for _ in range(3):
        process = start(_SAVE_FOR_EVER, tmp_path)
        assert process.stdout.readline() == "start\n"
        time.sleep(moments.uniform(0.2, 0.9))
        os.kill(process.pid, signal.SIGKILL)
        assert process.communicate()[1] == ""
        checkpoints = Checkpoints(tmp_path)
        if checkpoints.latest_step() is None:
            continue
        assert checkpoints.latest_step() >= step
        for which in ("last", "best") if checkpoints.latest_step() >= 3 else ("last",):
            state, extra = checkpoints.restore(like, which=which)
            assert {int(value) for leaf in state.values() for value in np.unique(leaf)} == {extra["step"]}
            assert extra["step"] == checkpoints.latest_step() or which == "best"
        step = checkpoints.latest_step()
    assert step >= 3
    Checkpoints(tmp_path).save(step + 1, state, {"step": step + 1})
    assert len(names(tmp_path)) == 2


def test_what_killed_processes_leave_is_passed_over_and_swept(tmp_path):
    like = {"a": jnp.zeros(2, int)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"a": jnp.full(2, 1)}, {"step": 1}, best=True)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "000001_step_1_best", folder / "000002_step_2_best.orbax-checkpoint-tmp")
    (folder / "000000_step_0_best").mkdir()  # a removal that was cut short
    (folder / "notes.txt").touch()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(like)[1] == checkpoints.restore(like, which="best")[1] == {"step": 1}
    assert len(names(tmp_path)) == 4  # reading removes nothing
    checkpoints.save(2, {"a": jnp.full(2, 2)}, {"step": 2})
    assert names(tmp_path) == ["000001_step_1_best", "000002_step_2", "notes.txt"]


def test_another_number_of_devices(tmp_path):
    one, four = tmp_path / "one", tmp_path / "four"
    state = {"w": jax.random.normal(jax.random.key(1), (8, 3)), "b": jnp.ones((8, 3))}
    Checkpoints(one).save(1, state, {"epoch": 1})
    np.savez(one / "expected.npz", **state)
    process = start(_FOUR_DEVICES, one, four, devices=4)
    assert process.communicate(timeout=60) == ("done\n", "")
    restored, extra = Checkpoints(four).restore(abstract(state))
    assert extra == {"epoch": 2}
    same_bits(restored, state)
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data"))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)
    restored, _ = Checkpoints(four).restore(like)
    same_bits(restored, state)
    assert restored["w"].sharding == sharding


def test_a_state_of_another_form_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, training_state(), {})
    other = abstract(training_state(features=4))
    refused(
        lambda: checkpoints.restore(other),
        "optimizer/1/0/trace/head/kernel is bfloat16 (3, 5) there and bfloat16 (4, 5)",
        "give the options of that run, or another --workdir",
    )
    same = abstract(training_state())
    without = {**same, "params": {"stem": same["params"]["stem"]}}
    refused(lambda: checkpoints.restore(without), "params/head/kernel is bfloat16 (3, 5) there and absent here")
    more = {**same, "zeta": jnp.zeros(2)}
    refused(lambda: checkpoints.restore(more), "zeta is absent there and float32 (2,) here")
    wider = {**same, "step": jnp.float32(7)}
    refused(lambda: checkpoints.restore(wider), "step is int32 () there and float32 () here")
    # Containers without arrays are no difference.
    assert checkpoints.restore({**same, "batch_stats": {"mean": same["batch_stats"]["mean"]}})[1] == {}


def test_missing_and_damaged(tmp_path):
    state = {"a": jnp.ones((50, 50))}
    refused(lambda: Checkpoints(tmp_path).restore(state), f"{tmp_path}/checkpoints has no last checkpoint", "--workdir")
    Checkpoints(tmp_path).save(1, state, {})
    refused(lambda: Checkpoints(tmp_path).restore(state, which="best"), "has no best checkpoint")
    whole = tmp_path / "checkpoints" / "000001_step_1"
    for pattern in ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "state/d/*", "state"):
        run = tmp_path / pattern.replace("/", "_")
        copy = run / "checkpoints" / whole.name
        shutil.copytree(whole, copy)
        for path in list(copy.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.write_bytes(path.read_bytes()[:10])
        refused(
            lambda copy=copy, run=run: Checkpoints(run).restore(state), f"checkpoint {copy} is damaged", "--workdir"
        )


def test_a_full_disk_keeps_what_was_there(tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path)
    state = {"a": jax.random.normal(jax.random.key(0), (100, 100))}
    checkpoints.save(1, state, {"step": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        refused(lambda: checkpoints.save(2, state, {"step": 2}), "cannot save", "File too large", "stays")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert names(tmp_path) == ["000001_step_1"]
    assert checkpoints.restore(state)[1] == {"step": 1}
    checkpoints.save(2, state, {"step": 2})
    assert checkpoints.restore(state)[1] == {"step": 2}
    assert capfd.readouterr() == ("", "")


def test_reading_while_the_run_goes_on(tmp_path, monkeypatch):
    state = {"a": jnp.ones(3)}
    Checkpoints(tmp_path).save(1, state, {"step": 1})
    read = checkpoint._read

    def replaced_meanwhile(path, like):
        if path.name == "000001_step_1":
            Checkpoints(tmp_path).save(2, state, {"step": 2})
        return read(path, like)

    monkeypatch.setattr(checkpoint, "_read", replaced_meanwhile)
    assert Checkpoints(tmp_path).restore(state)[1] == {"step": 2}
