"""Numbers with units, as people say them."""


def bytes_text(count: float) -> str:
    """A number of bytes: of two digits or more as many as people look at.

    >>> [bytes_text(count) for count in (1_234_567_890, 64 * 2**20, 1_234_567, 5)]
    ['1.1 GiB', '64 MiB', '1.2 MiB', '5 bytes']
    """
    if count >= 2**30:
        return f"{count / 2**30:,.1f} GiB"
    for power, unit in ((20, "MiB"), (10, "KiB")):
        if (size := count / 2**power) >= 1:
            return f"{size:.0f} {unit}" if size >= 9.95 else f"{size:.1f} {unit}"
    return f"{count:.0f} bytes"
