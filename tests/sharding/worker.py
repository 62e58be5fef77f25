"""One process of a small training job, for tests that kill it.

`python -m tests.sharding.worker FOLDER --steps N`: trains a small MLP over all devices of the job,
saves now and then, writes `losses.jsonl` as it goes, and `final.npz` at the end.
"""

import argparse
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sharding import (
    Checkpoints,
    Zero,
    fingerprint,
    initialise,
    make_mesh,
    make_step,
    stop_on_signals,
)
from sharding.cluster import global_batch, is_main, process_rows

WIDTH, ROWS = 32, 16


def batch_of(step):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    return {"x": x, "y": np.tanh(x @ np.eye(WIDTH, dtype=np.float32)[::-1])}


def loss(trainable, frozen, batch, key):
    x = batch["x"] + 0.01 * jax.random.normal(key, batch["x"].shape)
    out = jnp.tanh(x @ trainable["up"] + frozen["bias"]) @ trainable["down"]
    return jnp.mean((out - batch["y"]) ** 2)


def main(options=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=20, help="steps between two saves")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--mesh", help="its shape; all devices on fsdp without")
    parser.add_argument("--shuffled", action="store_true", help="devices in no order of processes")
    parser.add_argument("--large", type=int, default=0, help="MiB of more state: saves take longer")
    parser.add_argument("--own-start", action="store_true", help="each process draws its own")
    args = parser.parse_args(options)
    jax.config.update("jax_compilation_cache_dir", str(args.folder.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    initialise()
    mesh = make_mesh(args.mesh)
    if args.shuffled:
        devices = np.random.default_rng(1).permutation(mesh.devices.ravel())
        mesh = jax.sharding.Mesh(devices.reshape(mesh.devices.shape), mesh.axis_names)
    zero = Zero(mesh, args.stage, smallest=1)
    where = zero.batch(batch_of(0))
    own = process_rows(ROWS, where["x"])
    rng = np.random.default_rng(jax.process_index() if args.own_start else 0)
    start = {n: rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) / 6 for n in ("up", "down")}
    if args.large:
        start["large"] = rng.normal(size=(args.large, 2**18)).astype(np.float32)
    frozen = {"bias": jnp.full(WIDTH, 0.1)}
    step = make_step(loss, optax.adam(1e-2), zero=zero)
    state = step.init(start)
    key = jax.random.key(7)
    saved = Checkpoints(args.folder / "checkpoints", keep=2, base=fingerprint(frozen))
    with saved, stop_on_signals() as stopping:
        done = 0
        if saved.latest() is not None:
            (state, key), about = saved.restore((state, key))
            done = about["step"]
        while done < args.steps:
            batch = {k: x[own] for k, x in batch_of(done).items()}
            batch = global_batch(batch, where, ROWS)
            state, metrics = step(state, frozen, batch, jax.random.fold_in(key, done))
            done += 1
            if is_main():
                with (args.folder / "losses.jsonl").open("a") as f:
                    f.write(json.dumps({"step": done, "loss": float(metrics["loss"])}) + "\n")
            stop = stopping()
            if stop or done % args.every == 0 or done == args.steps:
                saved.save(done, (state, key), {"step": done})
            if stop:
                print("stopped", flush=True)
                return 0
    whole = jax.jit(lambda x: x, out_shardings=zero.replicated)((state.trainable, state.optimiser))
    leaves = [np.asarray(x) for x in jax.tree.leaves(whole)]  # the others' parts are needed too
    if is_main():
        np.savez(args.folder / "final.npz", *leaves)
    return 0


if __name__ == "__main__":
    sys.exit(main())
