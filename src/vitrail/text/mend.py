"""What ftfy does to a text besides mending encodings (Speer, ftfy 6; its order, its tables).

CLIP's texts were cleaned by ftfy before its tokenizer saw them: curly quotes made straight,
fullwidth letters narrow, ligatures taken apart, entities of HTML read. All of that is here. What
needs ftfy itself is to undo an encoding that was read as another ("cafÃ©").
"""

import html
import html.entities
import re
import unicodedata
from functools import cache

_LIGATURES = {
    **{"Ĳ": "IJ", "ĳ": "ij", "ŉ": "\u02bcn", "Ǆ": "DŽ", "ǅ": "Dž", "ǆ": "dž", "Ǉ": "LJ", "ǈ": "Lj"},
    **{"ǉ": "lj", "Ǌ": "NJ", "ǋ": "Nj", "ǌ": "nj", "Ǳ": "DZ", "ǲ": "Dz", "ǳ": "dz"},
    **{"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "\u017ft", "ﬆ": "st"},
}
_DROPPED = (  # controls that nobody types
    *(range(0x00, 0x09), range(0x0B, 0x0C), range(0x0E, 0x20), range(0x7F, 0x80)),
    *(range(0x206A, 0x2070), range(0xFEFF, 0xFF00), range(0xFFF9, 0xFFFD)),
)
_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
_LINE_BREAK = re.compile("\r\n|[\r\u2028\u2029\u0085]")
_ANSI = re.compile("\033\\[((?:\\d|;)*)([a-zA-Z])")
_WINDOWS = re.compile("[\x80-\x9f]")
_SINGLE, _DOUBLE = re.compile("[\u02bc\u2018-\u201b]"), re.compile("[\u201c-\u201f]")


def mended(text: str) -> str:
    """`text` as ftfy's `fix_text(text, fix_encoding=False)` gives it.

    >>> mended("“Café” ﬁnds &ntilde;")
    '"Café" finds ñ'

    Text of half characters has to be mended before (`tokenizer.checked`).
    """
    lines, entities = [], True
    for line in re.findall("[^\n]*\n|[^\n]+", text):
        # From what could be a tag on, a text is HTML by design, and keeps its entities.
        entities = entities and "<" not in line
        lines.append(_line(line, entities))
    return "".join(lines)


def _line(text: str, entities: bool) -> str:
    while True:
        before = text
        if entities:
            text = _ENTITY.sub(_read, text)
        text = _WINDOWS.sub(_of_windows, text).translate(_letters())
        text = _SINGLE.sub("'", _DOUBLE.sub('"', text))
        text = _ANSI.sub("", _LINE_BREAK.sub("\n", text)).translate(_controls())
        text = unicodedata.normalize("NFC", text)
        if text == before:
            return text


def _read(entity: re.Match[str]) -> str:
    """Of an entity's name, and of its number if all of it is read."""
    text = entity[0]
    if text.startswith("&#"):
        found = html.unescape(text)
        return text if ";" in found else found
    return _entities().get(text, text)


@cache
def _entities() -> dict[str, str]:
    """HTML5's, and those whose capitals stand for nothing else: P&EACUTE;REZ."""
    known = {f"&{name}": char for name, char in html.entities.html5.items() if name[-1] == ";"}
    for name, char in list(known.items()):
        if name == name.lower() and html.unescape(name.upper()) == name.upper():
            known[name.upper()] = char.upper()
    return known


@cache
def _letters() -> dict[int, str]:
    """Ligatures of Latin letters taken apart, fullwidth and halfwidth letters as usual ones."""
    wide = {code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFF01, 0xFFF0)}
    return {
        **{ord(char): letters for char, letters in _LIGATURES.items()},
        **{code: usual for code, usual in wide.items() if usual != chr(code)},
        0x3000: " ",
    }


@cache
def _controls() -> dict[int, None]:
    return {code: None for codes in _DROPPED for code in codes}


def _of_windows(control: re.Match[str]) -> str:
    """What Windows has where Latin-1 has controls, as browsers read them."""
    code = ord(control[0])
    return bytes([code]).decode("cp1252", "replace").replace("�", chr(code))
