"""Starts `worker` as the processes of one job over loopback."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Job:
    """Its processes, eight devices in all; `logs` holds what they print."""

    def __init__(self, folder, processes=1, *, devices=8, steps=40, options=()):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.processes = folder, []
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command = [sys.executable, "-m", "tests.sharding.worker", str(folder)]
        command += ["--steps", str(steps), *options]
        for i in range(processes):
            env = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
                "NPROC": "16",
            }
            if processes > 1:
                env |= {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(processes),
                    "JAX_PROCESS_ID": str(i),
                }
            log = (folder / f"log{i}.txt").open("ab")
            self.processes.append(
                subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        """Bring every process down, as a scheduler does when one has died."""
        for p in self.processes:
            p.kill()
        for p in self.processes:
            p.wait()

    def finish(self, timeout=120):
        """Wait for the end. Every process must have left with 0."""
        codes = [p.wait(timeout) for p in self.processes]
        assert codes == [0] * len(codes), self.logs()

    def wait_for(self, ready, timeout=120):
        """Until `ready()`; fails where a process ends before."""
        end = time.monotonic() + timeout
        while not ready():
            assert all(p.poll() is None for p in self.processes), self.logs()
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
