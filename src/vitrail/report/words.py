"""Numbers as a reader wants them."""

from vitrail.metrics.estimate import Estimate


def percent(share: float) -> str:
    """A share of 1 in percent.

    >>> percent(0.8317), percent(1.0)
    ('83.2%', '100%')
    """
    text = f"{100 * share:.1f}"
    return f"{'100' if text == '100.0' else '0' if text == '0.0' else text}%"


def span(estimate: Estimate, as_percent: bool = True) -> str:
    """The interval: `79.1% to 86.8%`, or `0.791 to 0.868`."""
    ends = (estimate.low, estimate.high)
    low, high = map(percent, ends) if as_percent else (f"{end:.3f}" for end in ends)
    return f"{low} to {high}"


def duration(seconds: float) -> str:
    """A time in the two units that matter.

    >>> duration(7.25), duration(185), duration(7500)
    ('7.2 s', '3 min 5 s', '2 h 5 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def rate(per_second: float) -> str:
    """Images a second, with no more digits than mean anything.

    >>> rate(1234.5), rate(7.77)
    ('1,234', '7.8')
    """
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.1f}"


def short(number: float) -> str:
    """A large number in three digits and its unit of a thousand.

    >>> short(22_050_664), short(4.6e9), short(912)
    ('22.1 M', '4.60 G', '912')
    """
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"), (1, "")):
        if abs(number) >= size:
            value = number / size
            digits = 0 if not unit or value >= 99.95 else 1 if value >= 9.995 else 2
            return f"{value:.{digits}f}{unit}"
    return f"{number:g}"


def milliseconds(seconds: float) -> str:
    """A short time.

    >>> milliseconds(0.00312), milliseconds(1.234)
    ('3.1 ms', '1,234 ms')
    """
    return f"{rate(1000 * seconds)} ms"


def megabytes(size: float) -> str:
    """Memory, in units of 2**20 bytes.

    >>> megabytes(300 * 2**20)
    '300 MiB'
    """
    return f"{size / 2**20:,.0f} MiB"


def tail(name: str, most: int = 40) -> str:
    """The end of a long file name, where the difference is.

    >>> tail("/home/me/photos/cats/summer/IMG_0001.jpg", 20)
    '…summer/IMG_0001.jpg'
    """
    return name if len(name) <= most else "…" + name[1 - most :]
