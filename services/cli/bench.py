def bench() -> None:
    """x."""
