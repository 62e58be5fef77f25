"""What is raised for machines that cannot be compiled for."""


class TopologyError(ValueError):
    """A topology that is none, or a compiler that is not there or does not match."""
