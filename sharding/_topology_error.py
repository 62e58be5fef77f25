"""What is raised for machines that cannot be compiled for."""


class TopologyError(ValueError):
    """A topology that is none, or a compiler that is not there or does not match."""


def first_line(e: Exception) -> str:
    """The first line of what an error says; its name where it says nothing."""
    return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
