"""Fully sharded training of any pytree, by `jax.sharding`."""

from sharding.checkpoint import CheckpointError as CheckpointError
from sharding.checkpoint import Checkpoints as Checkpoints
from sharding.checkpoint import fingerprint as fingerprint
from sharding.cluster import initialise as initialise
from sharding.mesh import AXES as AXES
from sharding.mesh import batch_shards as batch_shards
from sharding.mesh import make_mesh as make_mesh
from sharding.preemption import stop_on_signals as stop_on_signals
from sharding.step import State as State
from sharding.step import Step as Step
from sharding.step import make_step as make_step
from sharding.zero import RULES as RULES
from sharding.zero import Axes as Axes
from sharding.zero import Zero as Zero
from sharding.zero import axes_by_pattern as axes_by_pattern
