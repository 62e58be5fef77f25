"""Fully sharded training of any pytree, by `jax.sharding`."""
