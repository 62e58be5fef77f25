"""What commands set before JAX starts."""

import os
import subprocess
import sys

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
