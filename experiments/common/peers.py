"""The two sides of a speed comparison, each in a process of its own.

`python -m experiments.common.peers SIDE JOB` reads commands from its standard input, one a line
(`first`, `steps`, `memory`), and answers each with one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from experiments.common.runtime import malloc_environment

Job = dict[str, Any]
Step = Callable[[], float]


class PeerError(RuntimeError):
    """A side that could not run, or that does not compute what the other does."""


class Worker:
    """One side, started and waiting; `ask` sends it a command and waits for the answer."""

    def __init__(self, side: str, job: Job) -> None:
        threads = job["threads"] or os.cpu_count() or 1
        self.side = side
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, side, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **malloc_environment(),  # both sides gain by it
                "OMP_NUM_THREADS": str(threads),
                "HF_HUB_OFFLINE": "1",
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def ask(self, command: str) -> dict[str, float]:
        """The answer to `command`. **Raises:** `PeerError` when the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # told below, with the exit status
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise PeerError(
                f"the {self.side} side ended with status {self.process.wait()}; its own message is "
                "above (the peer needs the 'interop' extra: torch, transformers, peft)"
            )
        return json.loads(line)


def write_model(name: str, scratch: pathlib.Path) -> pathlib.Path:
    """A directory with a sequence classifier that both sides load, head included."""
    import jax
    from flax import nnx

    from experiments.common.models import fetch_model
    from jpeft.hf import load_sequence_classifier, save_sequence_classifier
    from jpeft.models.bert import BertConfig, BertForSequenceClassification

    out = scratch / "model"
    if name == "shape":
        config = BertConfig(
            vocab_size=30522,
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
        )
        model = BertForSequenceClassification(config, num_labels=2, rngs=nnx.Rngs(0))
    else:
        model, _ = load_sequence_classifier(fetch_model(name), num_labels=2, key=jax.random.key(0))
    save_sequence_classifier(model, out)
    return out


def batch(job: Job, vocabulary: int) -> dict[str, np.ndarray]:
    """The one batch that both sides train on: random tokens without padding, random labels."""
    rng = np.random.default_rng(0)
    shape = (job["batch"], job["length"])
    return {
        "input_ids": rng.integers(1000, vocabulary, shape).astype(np.int32),
        "attention_mask": np.ones(shape, np.int32),
        "token_type_ids": np.zeros(shape, np.int32),
        "labels": rng.integers(0, 2, job["batch"]).astype(np.int32),
    }


def ours(job: Job) -> Step:
    """A jitted step of this library on the job's batch; each call returns the loss."""
    import jax
    import jax.numpy as jnp
    import optax

    import jpeft
    from experiments.common.models import cpu_layout
    from experiments.common.training import compiler_options
    from jpeft.hf import load_sequence_classifier

    model, _ = load_sequence_classifier(
        pathlib.Path(job["directory"]), num_labels=2, key=jax.random.key(0), **cpu_layout()
    )
    apply, params = jpeft.functional(model)
    b = batch(job, model.config.vocab_size)
    inputs = [jnp.asarray(b[k]) for k in ("input_ids", "attention_mask", "token_type_ids")]
    labels = jnp.asarray(b["labels"])
    if job["method"] == "lora":
        transform = jpeft.chain(
            jpeft.LoRA(rank=job["rank"], alpha=16, targets=r"(query|value)/kernel$"),
            jpeft.Train(r"^classifier/"),
        )
    else:
        transform = jpeft.Train(r".*")
    uses = jpeft.uses(apply, params, *inputs)
    state = transform.init(jax.random.key(0), params, uses=uses)
    optimiser = optax.adamw(1e-4)
    forward = jpeft.lift(apply)

    def step(params: Any, state: Any, moments: Any, inputs: Any, labels: Any) -> Any:
        def loss(state: Any) -> Any:
            logits = forward(transform.rewrite(params, state), *inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(state)
        updates, moments = optimiser.update(grads, moments, state)
        return optax.apply_updates(state, updates), moments, value

    compiled = jax.jit(step, donate_argnums=(1, 2), compiler_options=compiler_options())
    held = [state, optimiser.init(state)]

    def run() -> float:
        held[0], held[1], value = compiled(params, *held, inputs, labels)
        return float(value)

    return run


def theirs(job: Job) -> Step:
    """The same step by torch, transformers and peft, eager."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        job["directory"],
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0,
    )
    vocabulary = model.config.vocab_size
    if job["method"] == "lora":
        model = get_peft_model(
            model,
            LoraConfig(
                task_type="SEQ_CLS",
                r=job["rank"],
                lora_alpha=16,
                lora_dropout=0.0,
                target_modules=["query", "value"],
            ),
        )
    model.train()
    inputs = {k: torch.tensor(v.astype(np.int64)) for k, v in batch(job, vocabulary).items()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> float:
        loss = model(**inputs).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return run


def serve(side: str, job: Job) -> None:
    """Answer commands until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries' own prints must not be answers
    run = {"jpeft": ours, "peft": theirs}[side](job)
    for line in sys.stdin:
        command, start = line.strip(), time.perf_counter()
        if command == "memory":
            answer = {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        else:
            for _ in range(1 if command == "first" else job["steps"]):
                loss = run()
            answer = {"seconds": time.perf_counter() - start, "loss": loss}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
