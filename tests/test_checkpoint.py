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
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from cimjax.training.run.checkpoint import Checkpoints
from cimjax.training.run.files import RunFolderError, RunFolderWarning

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
    assert names(tmp_path) == ["000003_step_30_best", "000005_step_40", "000006_step_35"]
    assert checkpoints.restore({"a": jnp.zeros(2, int)}, which="best")[1] == {"step": 30}
    assert checkpoints.restore({"a": jnp.zeros(2, int)})[1] == {"step": 35}
    with pytest.raises(ValueError, match="`step` is -1"):
        checkpoints.save(-1, {"a": jnp.zeros(2)}, {})


def test_a_save_in_the_background_is_of_the_state_that_was_given(tmp_path):
    """Donated to a step, as training does, before it is written."""
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = {f"leaf{i}": jnp.zeros((400, 500)) for i in range(8)}
    checkpoints = Checkpoints(tmp_path)
    for number in range(4):
        checkpoints.save_in_background(number, state, {"step": number}, best=number == 1)
        assert checkpoints.latest_step() == number and checkpoints.has("best") == (number > 0)
        state = jax.block_until_ready(step(state))
    checkpoints.wait()
    assert names(tmp_path) == ["000002_step_1_best", "000003_step_2", "000004_step_3"]
    for which, number in (("last", 3), ("best", 1)):
        restored, extra = Checkpoints(tmp_path).restore(state, which=which)
        assert extra == {"step": number}
        assert all((leaf == number).all() for leaf in restored.values())


def test_as_many_as_wanted_are_kept(tmp_path):
    for keep, kept in ((1, ["000001_step_0_best", "000004_step_3"]), (3, ["000001_step_0_best"])):
        run = tmp_path / str(keep)
        checkpoints = Checkpoints(run, keep=keep)
        for step in range(4):
            checkpoints.save(step, {"a": jnp.full(2, step)}, {}, best=step == 0)
        assert names(run) == kept if keep == 1 else [*kept, *(f"00000{n + 1}_step_{n}" for n in (1, 2, 3))]


def test_a_failure_in_the_background_is_said_at_the_next_occasion(tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path)
    state = {"a": jax.random.normal(jax.random.key(0), (100, 100))}
    checkpoints.save(1, state, {"step": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for occasion in (checkpoints.wait, lambda: checkpoints.save_in_background(3, state, {"step": 3})):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        try:
            checkpoints.save_in_background(2, state, {"step": 2})
            refused(occasion, "cannot save", "step_2", "File too large", "stays")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        checkpoints.wait()  # said once
    assert names(tmp_path) == ["000001_step_1"]
    checkpoints.save(2, state, {"step": 2})
    assert checkpoints.restore(state)[1] == {"step": 2}
    assert capfd.readouterr() == ("", "")


def test_kill_at_random_moments(tmp_path):
    like = {f"leaf{i}": jax.ShapeDtypeStruct((40, 50), jnp.int32) for i in range(5)}
    moments = random.Random(0)
    step = 0
    for _ in range(3):
        process = start(_SAVE_FOR_EVER, tmp_path)
        assert process.stdout.readline() == "start\n"
        checkpoints, until = Checkpoints(tmp_path), time.monotonic() + 60
        # On a busy machine the first save takes its time.
        while (checkpoints.latest_step() or 0) <= step and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.7))
        os.kill(process.pid, signal.SIGKILL)
        assert process.communicate()[1] == ""
        assert checkpoints.latest_step() > step
        for which in ("last", "best") if checkpoints.latest_step() >= 3 else ("last",):
            state, extra = checkpoints.restore(like, which=which)
            assert {int(value) for leaf in state.values() for value in np.unique(leaf)} == {extra["step"]}
            assert extra["step"] == checkpoints.latest_step() or which == "best"
        step = checkpoints.latest_step()
    assert step >= 3
    Checkpoints(tmp_path).save(step + 1, state, {"step": step + 1})
    assert len(names(tmp_path)) in (2, 3)


def test_what_killed_processes_leave_is_passed_over_and_swept(tmp_path):
    like = {"a": jnp.zeros(2, int)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"a": jnp.full(2, 1)}, {"step": 1}, best=True)
    folder = tmp_path / "checkpoints"
    for name in ("000002_step_2_best.orbax-checkpoint-tmp", "000002_step_2.orbax-checkpoint-tmp-17"):
        shutil.copytree(folder / "000001_step_1_best", folder / name)
    (folder / "000000_step_0_best").mkdir()  # a removal that was cut short
    others = ["000001_step_1_best of Monday", "000001_step_1.orbax-checkpoint-tmp.mine", "notes.txt"]
    for name in others:
        (folder / name).mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(like)[1] == checkpoints.restore(like, which="best")[1] == {"step": 1}
    assert len(names(tmp_path)) == 7  # reading removes nothing
    for step in (2, 3):
        checkpoints.save(step, {"a": jnp.full(2, step)}, {"step": step})
    assert names(tmp_path) == sorted(["000001_step_1_best", "000002_step_2", "000003_step_3", *others])


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
    read = Checkpoints._read

    def replaced_meanwhile(self, save, *arguments):
        if save.number == 1:
            for step in (2, 3):
                Checkpoints(tmp_path).save(step, state, {"step": step})
        return read(self, save, *arguments)

    monkeypatch.setattr(Checkpoints, "_read", replaced_meanwhile)
    assert Checkpoints(tmp_path).restore(state)[1] == {"step": 3}


# ---- damage


def flip(path, place):
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def damage(folder):
    """Flip a bit in the arrays of a save."""
    largest = max(
        (path for path in folder.glob("state/**/d/*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    flip(largest, largest.stat().st_size // 2)


def saved(run, *, best=2, last=3):
    """A run folder with a state after every step, of numbers that begin with the step's."""
    numbers = jax.random.uniform(jax.random.key(0), (30, 30))
    for step in range(1, last + 1):
        Checkpoints(run).save(step, {"a": step + numbers}, {"step": step}, best=step == best)
    return run / "checkpoints"


LIKE = {"a": jnp.zeros((30, 30))}


def test_a_damaged_state_is_replaced_by_the_one_before_it_with_a_warning(tmp_path):
    folder = saved(tmp_path, best=1, last=4)
    damage(folder / "000004_step_4")
    words = r"checkpoint .*000004_step_4 is damaged \(a is not what was saved\); 000003_step_3 takes its place"
    with pytest.warns(RunFolderWarning, match=words):
        state, extra = Checkpoints(tmp_path).restore(LIKE)
    assert extra == {"step": 3} and (state["a"] // 1 == 3).all()
    damage(folder / "000003_step_3")
    with pytest.warns(RunFolderWarning) as caught:
        state, extra = Checkpoints(tmp_path).restore(LIKE)
    assert len(caught) == 2 and extra == {"step": 1}
    damage(folder / "000001_step_1_best")
    refused(
        lambda: Checkpoints(tmp_path).restore(LIKE), "000004_step_4 is damaged", "); train anew in another --workdir"
    )


def test_nothing_takes_the_place_of_a_damaged_best_state(tmp_path):
    folder = saved(tmp_path)
    damage(folder / "000002_step_2_best")
    refused(
        lambda: Checkpoints(tmp_path).restore(LIKE, which="best"),
        "000002_step_2_best is damaged (a is not what was saved); take the last state instead",
    )
    assert Checkpoints(tmp_path).restore(LIKE)[1] == {"step": 3}
    shutil.rmtree(folder / "000002_step_2_best")
    assert Checkpoints(tmp_path).has("last") and not Checkpoints(tmp_path).has("best")
    refused(
        lambda: Checkpoints(tmp_path).restore(LIKE, which="best"), "no best checkpoint; take the last state instead"
    )
    # The best state is the last one: the state before it is there.
    other = saved(tmp_path / "other", best=3)
    damage(other / "000003_step_3_best")
    refused(lambda: Checkpoints(tmp_path / "other").restore(LIKE, which="best"), "take the last state instead")
    with pytest.warns(RunFolderWarning, match="000002_step_2 takes its place"):
        assert Checkpoints(tmp_path / "other").restore(LIKE)[1] == {"step": 2}


def test_every_bit_of_what_stands_beside_the_arrays_counts(tmp_path):
    folder = saved(tmp_path, last=2)
    about = folder / "000002_step_2_best" / "_CHECKPOINT_METADATA"
    whole = about.read_bytes()
    begin = whole.index(b'"custom_metadata"')
    outcomes = set()
    for place in range(begin + 2, len(whole) - 1, 29):
        flip(about, place)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, extra = Checkpoints(tmp_path).restore(LIKE)
        outcomes.add((extra["step"], len(caught)))
        about.write_bytes(whole)
    assert outcomes <= {(1, 1), (2, 0)}  # a space between words may change
    assert (1, 1) in outcomes


def test_what_is_missing_beside_a_state_is_named(tmp_path):
    state = {"a": jnp.ones(2)}
    checkpoints = Checkpoints(tmp_path)
    for step, extra in enumerate(({}, {"best": "0.5"}, {"best": None, "seen": {}})):
        checkpoints.save(step, state, extra)
        refused(
            lambda: Checkpoints(tmp_path).restore(state, holding={"best": float, "seen": dict}),
            "is damaged (it holds no `best` of type float)",
        )
    checkpoints.save(9, state, {"best": 0.5, "seen": {}})
    assert checkpoints.restore(state, holding={"best": float, "seen": dict})[1] == {"best": 0.5, "seen": {}}


def test_a_save_of_an_older_version_is_read_and_told_of(tmp_path):
    state = {"a": jnp.ones(2)}
    path = tmp_path / "checkpoints" / "000001_step_1"
    ocp.save(path, state, custom_metadata={"extra": {"best": 0.5}})
    with pytest.warns(RunFolderWarning, match="saved by an older version, without checksums"):
        restored, extra = Checkpoints(tmp_path).restore(state)
    same_bits(restored, state)
    assert extra == {"best": 0.5}


def test_a_renamed_save_is_not_of_another_step(tmp_path):
    folder = saved(tmp_path, best=0, last=1)
    (folder / "000001_step_1").rename(folder / "000001_step_2")
    refused(lambda: Checkpoints(tmp_path).restore(LIKE), "000001_step_2 is damaged (it was saved after step 1)")


def test_options_that_were_changed_in_the_folder_are_refused(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"spec": {"adc": {"bits": 3}}, "epochs": 4}')
    folder = saved(tmp_path, last=1)
    for text in (
        '{"spec": {"adc": {"bits": 3}}, "epochs": 6, "data_dir": "/elsewhere"}',
        '{"spec": {"adc": {"bits": 3, "added": 0}}, "epochs": 4, "added": 1}',
    ):
        config.write_text(text)
        Checkpoints(tmp_path).restore(LIKE)
    config.write_text('{"spec": {"adc": {"bits": 1}}, "epochs": 4}')
    refused(
        lambda: Checkpoints(tmp_path).restore(LIKE),
        f"{config} holds other options than {folder.name}"[:30],
        "(spec.adc.bits: 3 -> 1); put them back",
    )
    config.write_text('{"spfc": {"adc": {"bits": 3}}}')
    refused(lambda: Checkpoints(tmp_path).restore(LIKE), "-> absent")


def test_what_is_passed_over_may_have_been_saved_from_devices_that_are_not_here(tmp_path):
    state = {"params": {"w": jnp.arange(6.0)}, "opt_state": {"momentum": jnp.ones(6)}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    (file,) = tmp_path.glob("checkpoints/*/state/_sharding")
    there = file.read_text()
    assert "cpu:0" in there
    file.write_text(there.replace("cpu:0", "cuda:0"))
    wanted = {"params": {"w": jax.ShapeDtypeStruct((6,), "float32")}}
    found, _ = checkpoints.restore(wanted, passes_over=lambda name: name.startswith("opt_state/"))
    np.testing.assert_array_equal(found["params"]["w"], state["params"]["w"])
