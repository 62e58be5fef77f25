"""Starts `worker` as the processes of one job over loopback."""

import atexit
import json
import multiprocessing
import os
import re
import socket
import sys
import time

# A server that has imported all there is to import makes each process by a fork, which then starts
# JAX's backend: imports are most of what a short process does.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.sharding.worker"])


def run(options, env, log):
    """What a process does: `worker` in an environment of its own, which prints into a file."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(env)
    import jax

    from tests.sharding import worker

    jax.config.update("jax_platforms", "cpu")  # which is read when jax is imported
    code = worker.main(options)
    atexit._run_exitfuncs()  # left out after a fork; JAX's says goodbye to the others
    sys.exit(code)


def with_devices(count):
    """The tests' flags for the compiler, with so many virtual devices."""
    return re.sub(r"(device_count=)\d+", rf"\g<1>{count}", os.environ["XLA_FLAGS"])


class Job:
    """Its processes, eight devices in all; `logs` holds what they print."""

    def __init__(self, folder, processes=1, *, devices=8, steps=40, options=()):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.processes = folder, []
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        options = [str(folder), "--steps", str(steps), *options]
        for i in range(processes):
            env = {
                "XLA_FLAGS": with_devices(devices // processes),
                "NPROC": "16",
            }
            if processes > 1:
                env |= {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(processes),
                    "JAX_PROCESS_ID": str(i),
                }
            log = str(folder / f"log{i}.txt")
            self.processes.append(FORKS.Process(target=run, args=(options, env, log)))
            self.processes[-1].start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        """Bring every process down, as a scheduler does when one has died."""
        for p in self.processes:
            p.kill()
        for p in self.processes:
            p.join()

    def finish(self, timeout=120):
        """Wait for the end. Every process must have left with 0."""
        for p in self.processes:
            p.join(timeout)
        codes = [p.exitcode for p in self.processes]
        assert codes == [0] * len(codes), self.logs()

    def wait_for(self, ready, timeout=120):
        """Until `ready()`; fails where a process ends before."""
        end = time.monotonic() + timeout
        while not ready():
            assert all(p.exitcode is None for p in self.processes), self.logs()
            assert time.monotonic() < end, self.logs()
            time.sleep(0.01)

    def logs(self):
        return "\n".join(p.read_text()[-3000:] for p in sorted(self.folder.glob("log*.txt")))


def losses(folder):
    """The last loss written for each step: `{step: loss}`."""
    path = folder / "losses.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return {x["step"]: x["loss"] for x in whole}
