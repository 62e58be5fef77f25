"""The two sides of a speed comparison, each in a process of its own.

`python -m experiments.common.peers SIDE JOB` reads commands from its standard input, one a line,
and answers each with one line of JSON; a failure is `{"error": "..."}`, and ends it:

- `start`: import, load and make one step; seconds of each, and the first loss;
- `steps N`, `evals N`: so many training steps, forward passes; seconds and the last loss;
- `generate`: seconds and new tokens;
- `memory`: MiB at the peak of a step;
- `rate M K N`: flops a second of a product of matrices of these sizes;
- `profile`: this library's side alone, where a step's time goes.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol, Self

from experiments.common.runtime import malloc_environment

Job = dict[str, Any]
OURS, EAGER, COMPILED = "jpeft", "peft", "peft_compiled"
# The eager peer again, with the allocator set up as this package's commands set it up.
TUNED = "peft_tuned"
RATE_ROUNDS = 20
# What a user can do something about: told without a traceback.
_TOLD = (ImportError, OSError, ValueError, RuntimeError)


class PeerError(ValueError):
    """A side that could not run."""


class DisagreementError(PeerError):
    """Sides that do not compute the same thing."""


class Side(Protocol):
    """What both sides can do; a step, an evaluation and a generation end when it is done."""

    def load(self) -> None:
        """Read the model and put the method on it."""
        ...

    def step(self) -> float:
        """Train once; the loss before."""
        ...

    def evaluate(self) -> float:
        """The loss, without gradients."""
        ...

    def generate(self) -> int:
        """Generate; how many tokens are new."""
        ...

    def memory(self, base: float) -> dict[str, float | None]:
        """The peak of a step, above `base` MiB."""
        ...

    def rate(self, m: int, k: int, n: int) -> float:
        """Flops a second of `(m, k)` by `(k, n)`, random and of the job's precision."""
        ...


class Worker:
    """One side, started and waiting; `ask` sends it a command and waits for the answer."""

    def __init__(self, side: str, job: Job) -> None:
        self.side = side
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, side, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(job["device"], job["threads"], tuned=side in (OURS, TUNED)),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def ask(self, command: str) -> dict[str, Any]:
        """The answer to `command`. **Raises:** `PeerError` for an error, or where it has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # told below, with the exit status
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise PeerError(f"the {self.side} side ended with status {status} at '{command}'")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"the {self.side} side at '{command}': {answer['error']}")
        return answer


def environment(device: str, threads: int, tuned: bool) -> dict[str, str]:
    """What a side's process is started with.

    **Arguments:** `device`, cpu or gpu; `threads`, 0 for all cores; `tuned`, whether the C
    library's allocator is set up as this package's commands set it up.
    """
    own = dict(os.environ) | (malloc_environment() if tuned else {})
    own |= {
        "OMP_NUM_THREADS": str(threads or os.cpu_count() or 1),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # The sides share a card.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    if threads:
        own["NPROC"] = str(threads)
    if device == "cpu":
        own |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return own


def rate_of(product: Callable[[], object], flops: float) -> float:
    """Flops a second of `product`, which ends when it is done: the median of `RATE_ROUNDS`, as a
    step's products meet the machine, not the best that it can do.
    """
    product()
    seconds: list[float] = []
    for _ in range(RATE_ROUNDS):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return flops / statistics.median(seconds)


def made(side: str, job: Job) -> Side:
    """A side, its libraries imported and its device there."""
    if side == OURS:
        from experiments.common.peer_ours import Ours

        return Ours(job)
    from experiments.common.peer_theirs import Theirs

    return Theirs(job | {"compiled": side == COMPILED})


class Served:
    """What answers commands."""

    def __init__(self, side: str, job: Job) -> None:
        self.name, self.job = side, job
        self.side: Any = None
        self.base = 0.0

    def answer(self, command: str) -> dict[str, Any]:
        """The answer to one command."""
        word, *numbers = command.split()
        if word == "start":
            return self._start()
        start = time.perf_counter()
        if word in ("steps", "evals"):
            run, loss = self.side.step if word == "steps" else self.side.evaluate, 0.0
            for _ in range(int(numbers[0])):
                loss = run()
            return {"seconds": time.perf_counter() - start, "loss": loss}
        if word == "generate":
            tokens = self.side.generate()
            return {"seconds": time.perf_counter() - start, "tokens": tokens}
        if word == "memory":
            return self.side.memory(self.base)
        if word == "profile":
            return {"ms": self.side.profile()}
        if word == "rate":
            m, k, n = map(int, numbers)
            return {"flops_per_second": self.side.rate(m, k, n)}
        raise ValueError(f"there is no command '{command}'")

    def _start(self) -> dict[str, Any]:
        from experiments.common.peer_memory import resident_mib

        times = [time.perf_counter()]
        self.side = made(self.name, self.job)
        times.append(time.perf_counter())
        self.base = resident_mib()
        self.side.load()
        times.append(time.perf_counter())
        loss = self.side.step()
        times.append(time.perf_counter())
        names = ("import", "load", "first_step")
        spent = {n: b - a for n, a, b in zip(names, times, times[1:], strict=False)}
        return {"loss": loss, "start": spent}


def serve(side: str, job: Job) -> None:
    """Answer commands until the input ends, or one fails."""
    # What libraries print, in Python or below it, must not be taken for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    served = Served(side, job)
    for line in sys.stdin:
        try:
            answer = served.answer(line.strip())
        except Exception as e:
            if not isinstance(e, _TOLD):
                traceback.print_exc()
            first = str(e).strip().splitlines() or [""]
            answer = {"error": f"{type(e).__name__}: {first[0]}"}
        print(json.dumps(answer), file=answers, flush=True)
        if "error" in answer:
            return


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
