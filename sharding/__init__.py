"""Fully sharded training of any pytree, by `jax.sharding`."""

from sharding.mesh import AXES as AXES
from sharding.mesh import batch_shards as batch_shards
from sharding.mesh import make_mesh as make_mesh
from sharding.step import State as State
from sharding.step import Step as Step
from sharding.step import make_step as make_step
from sharding.zero import RULES as RULES
from sharding.zero import Axes as Axes
from sharding.zero import Zero as Zero
from sharding.zero import axes_by_pattern as axes_by_pattern
