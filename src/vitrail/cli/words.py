"""Verbs that take a word: `vitrail data check`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vitrail.errors import UsageError, unknown_name


class Word(NamedTuple):
    """What a word does."""

    run: Callable[[Sequence[str]], dict[str, Any]]
    usage: str
    """The word and what follows it."""
    about: str


def run_word(
    verb: str, words: Mapping[str, Word], args: Sequence[str], usual: str | None = None
) -> dict[str, Any]:
    """Do what the first of `args` says with the others, or else what the `usual` word does.

    Raises `UsageError` where no word is given, or another one.
    """
    asks = bool(args) and args[0] in ("-h", "--help")
    if asks or not (args or usual):
        wide = max(len(word.usage) for word in words.values())
        for i, word in enumerate(words.values()):
            start = "       " if i else "usage: "
            print(f"{start}vitrail {verb} {word.usage:<{wide}}  {word.about}")
    if asks:
        return {}
    if not args and usual:
        return words[usual].run(args)
    if not args:
        *most, last = words
        raise UsageError(f"vitrail {verb} needs a word: {', '.join(most)} or {last}")
    if args[0] not in words:
        raise unknown_name(f"word after vitrail {verb}:", args[0], words)
    return words[args[0]].run(args[1:])
