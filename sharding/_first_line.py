"""An error in one line, of those that have pages."""


def first_line(e: BaseException) -> str:
    """The first line of what an error says, 300 characters at most; its name where it is empty."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
