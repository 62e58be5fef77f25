"""What commands set before JAX starts."""

import dataclasses
import os
import subprocess
import sys

from experiments.common.command import command

PROGRAM = """
from experiments.common import runtime
runtime.one_at_a_time()
import jax, jax.numpy as jnp
x = jnp.ones((1500, 1500))
product = jax.jit(lambda x: x @ x @ x)
product(x).block_until_ready()
print([product(x).is_ready() for _ in range(3)])
"""


def test_a_call_on_a_cpu_returns_when_it_is_done() -> None:
    environment = dict(os.environ) | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["[True,", "True,", "True]"]


@dataclasses.dataclass(frozen=True)
class Nothing:
    """No options."""


def test_a_cache_that_cannot_be_written_is_told_of_and_no_more(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JPEFT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(sys, "argv", ["nothing"])
    done = command("nothing", Nothing, lambda config, console: console.print("done"), None)
    said = capsys.readouterr()
    assert (done, said.out) == (0, "done\n")
    assert said.err.startswith("nothing: compiled programs are not kept for the next run: ")


def test_square_brackets_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nothing"])
    monkeypatch.setattr("experiments.common.runtime.cache_programs", lambda folder: None)
    command("nothing", Nothing, lambda config, console: console.print("jpeft[plot]"), None)
    assert capsys.readouterr().out == "jpeft[plot]\n"
