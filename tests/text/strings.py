"""Strings of many scripts, keyed by a number: what captions are, and what they should not be."""

import random
import unicodedata

SCRIPTS = (  # first and last code point, of Unicode 8 and before
    (0x20, 0x7E),
    (0xA0, 0x24F),  # Latin
    (0x300, 0x36F),  # combining marks
    (0x370, 0x3FF),
    (0x400, 0x52F),
    (0x531, 0x58F),  # Armenian
    (0x591, 0x5F4),  # Hebrew
    (0x600, 0x6FF),
    (0x900, 0x97F),  # Devanagari
    (0xB80, 0xBFA),  # Tamil
    (0xE01, 0xE5B),  # Thai
    (0x10A0, 0x10FF),  # Georgian
    (0x1200, 0x1399),  # Ethiopic
    (0x1E00, 0x1EFF),
    (0x2000, 0x206F),  # spaces, dashes, quotes, controls
    (0x2070, 0x218B),  # numbers and signs of letters
    (0x2200, 0x23FA),
    (0x2460, 0x27BF),
    (0x3000, 0x30FF),  # kana
    (0x3105, 0x318E),
    (0x3400, 0x3430),
    (0x4E00, 0x4F00),
    (0xAC00, 0xAD00),  # Hangul
    (0xFB00, 0xFB4F),  # ligatures
    (0xFE30, 0xFFEE),  # wide and narrow forms
    (0x1D400, 0x1D7FF),  # letters of mathematics
    (0x1F300, 0x1F5FF),
    (0x1F600, 0x1F64F),
    (0x20000, 0x20020),
)
WORDS = (
    *("a photo of a cat", "the dog's", "they're", "I'LL", "we've", "don't", "straße", "naïve"),
    *("ﬁne", "“quoted”", "it\u2019s", "&amp;", "&lt;b&gt;", "&eacute;", "&EACUTE;", "&#233;"),
    *("&nbsp", "x" * 120, "supercalifragilistic", "3.14", "2024-05-06", "http://a.b/c?d=e&f=g"),
    *("cafÃ©", "â€œno”", "\x1b[31mred", "\x85", "\x93old\x94", "İstanbul", "ΟΔΟΣ", "ǅ", "C3PO"),
    *("\u017fo", "'\u017f", "[SEP]", "[MASK]", "[sep]", "<start_of_text>", "<end_of_text>"),
    *("#tag", "##ing", "_a_b_", "👩‍👩‍👧", "🇨🇦", "한국어", "你好世界", "日本", "ไทย", "हिन्दी"),
    *("עברית", "العربية", "½", "Ⅷ", "①②"),
)
SPACES = (" ", "  ", "\n", "\t", "\r\n", "\u3000", "\xa0", "\u2028", "")
STRANGE = ("", " ", "\n\n", "\x00", "\ufffd", "\ufeff", "\u200b", "\ud800", "a\udfffb", "😀" * 200)


def strings(count: int, seed: int = 0) -> list[str]:
    """As many strings; the first are the strangest."""
    draw = random.Random(seed)
    scripts = [[chr(x) for x in range(first, last + 1)] for first, last in SCRIPTS]
    # Tables of Unicode of different age agree on what was a character early.
    scripts = [[x for x in script if _is_old(x)] for script in scripts]
    made = list(STRANGE)
    while len(made) < count:
        parts = []
        for _ in range(draw.randint(1, 8)):
            if draw.random() < 0.4:
                word = draw.choice(WORDS)
            else:
                word = "".join(draw.choices(draw.choice(scripts), k=draw.randint(1, 12)))
            parts += [draw.choice((str, str.upper, str.title))(word), draw.choice(SPACES)]
        made.append("".join(parts))
    return made[:count]


def _is_old(char: str) -> bool:
    """Whether `char` was assigned by Unicode 8; those of the ranges above that came later."""
    return unicodedata.category(char) != "Cn" and char not in "\u061d\u0560\u0588\u05ef"
