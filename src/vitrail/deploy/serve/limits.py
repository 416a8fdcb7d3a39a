"""What a server lets its clients do: sizes, times and numbers, each with a reason."""

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Caps on what comes in, before any of it is looked at.

    Seconds are short where a client does nothing but hold a place, and long where it works.
    """

    body: int = 20 * MIB
    """Bytes of a request's body, as it is sent and as it is unpacked."""
    bodies: int = 512 * MIB
    """Bytes of all bodies that are there at once."""
    pixels: int = 40_000_000
    """Of an image, by its header, before anything is decoded."""
    images: int = 16
    """In one request."""
    marks: int = 20_000
    """Commas and brackets of a JSON body: what takes time to parse is many values, not long ones,
    and base64 has none of them."""
    head: int = 32 * 1024
    """Bytes of a request's line and headers."""
    headers: int = 100
    connections: int = 8192
    """That are open at once. Whoever comes next is told so."""
    head_seconds: float = 5.0
    """Until a request's headers are there."""
    body_seconds: float = 7.0
    """Until its body is there, and one more for each `body_rate` bytes of it that have come: a
    large photograph over a slow line is not an attack."""
    body_rate: int = 64 * 1024
    idle_seconds: float = 5.0
    """Between two requests of a connection."""
    write_seconds: float = 10.0
    """For a client to take what waits to be sent to it."""
    linger_seconds: float = 2.0
    """After a refusal what still comes is thrown away for so long: to close at once would reset the
    connection, and many a client would never read why."""
    answer_seconds: float = 30.0
    """From a request's body to its answer; a client may ask for less."""
    decode_seconds: float = 10.0
    """For one image, in a process that is killed then."""
    decode_bytes: int = 1536 * MIB
    """Of memory that such a process may take for an image, beyond its own. Of 40 megapixels a JPEG
    takes less than 0.4 GiB, a PNG of 16-bit greys, which takes the most, between 1.2 and 1.5."""
