"""The command line: verbs, each a (function, summary), nothing else.

`vitrail --help` must answer at once, so a verb's function imports what it needs when it is called.
Exit codes: 0 done, 2 bad usage, 3 the data or a file is at fault, 130 or 143 interrupted and saved.
"""

import errno
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vitrail import __version__
from vitrail.errors import DataError, VitrailError, spell, unknown_name

Result = dict[str, Any]
"""What a verb has to say to a program: the one line of --json."""


class Verb(NamedTuple):
    """One word of the command line."""

    run: Callable[[Sequence[str]], Result]
    summary: str


def _train(args: Sequence[str]) -> Result:
    from vitrail.cli.train import train

    return train(args)


def _evaluate(args: Sequence[str]) -> Result:
    from vitrail.cli.measure import evaluate

    return evaluate(args)


def _predict(args: Sequence[str]) -> Result:
    from vitrail.cli.predict import predict

    return predict(args)


def _search(args: Sequence[str]) -> Result:
    from vitrail.cli.search import search

    return search(args)


def _export(args: Sequence[str]) -> Result:
    from vitrail.cli.export import export_run

    return export_run(args)


def _serve(args: Sequence[str]) -> Result:
    from vitrail.cli.serve import serve

    return serve(args)


def _models(args: Sequence[str]) -> Result:
    from vitrail.cli.models import models

    return models(args)


def _data(args: Sequence[str]) -> Result:
    from vitrail.cli.data import data

    return data(args)


def _bench(args: Sequence[str]) -> Result:
    from vitrail.cli.bench import bench

    return bench(args)


def _weights(args: Sequence[str]) -> Result:
    from vitrail.cli.weights import weights

    return weights(args)


def _doctor(args: Sequence[str]) -> Result:
    from vitrail.cli.doctor import doctor

    return doctor(args)


VERBS = {
    "train": Verb(_train, "train on a folder of images, measure, write a report"),
    "evaluate": Verb(_evaluate, "measure a run again, or on other images"),
    "predict": Verb(_predict, "label images with a run, or an exported model"),
    "search": Verb(_search, "find images by words, or by an image"),
    "export": Verb(_export, "write a run's model for another runtime, and prove it the same"),
    "serve": Verb(_serve, "answer about images over HTTP"),
    "bench": Verb(_bench, "compare models, measure speed and memory, count what they cost"),
    "models": Verb(_models, "list the models, or show one"),
    "weights": Verb(_weights, "list published weights, fetch, show or convert them"),
    "data": Verb(_data, "check a data set, write shards, fetch a sample set"),
    "doctor": Verb(_doctor, "look for what is wrong with the machine, the data or a run"),
}


def usage() -> str:
    """The text of `vitrail --help`."""
    verbs = "\n".join(f"  {name:<10}{verb.summary}" for name, verb in VERBS.items())
    return (
        "usage: vitrail VERB [...]\n\n"
        "Vision Transformers, from a folder of images to a model that is trained and measured.\n\n"
        f"{verbs}\n\n"
        "  vitrail VERB --help   what a verb takes\n"
        "  --json                end in one line of JSON, for programs\n"
        "  --debug               show the traceback of an error\n"
        "  --version\n\n"
        "for example\n"
        "  vitrail train my_photos/                 one folder a class\n"
        "  vitrail evaluate runs/my_photos-1\n"
        "  vitrail predict runs/my_photos-1 image.jpg\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit code."""
    _open_streams()
    args = list(sys.argv[1:] if argv is None else argv)
    wants_json, debug = "--json" in args, "--debug" in args
    args = [arg for arg in args if arg not in ("--json", "--debug")]
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if args else 2
    if args[0] in ("--version", "-V"):
        print(f"vitrail {__version__}")
        return 0
    _share_cores()
    if "RANK" in os.environ:  # one of several processes, of which the first talks
        # What torch's C++ part says of others that do not answer is said here, in words.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        if os.environ["RANK"] != "0":
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        if args[0] not in VERBS:
            raise unknown_name("verb", args[0], VERBS)
        result = VERBS[args[0]].run(args[1:])
        if wants_json:
            print(json.dumps(result))
        sys.stdout.flush()  # at the end of the process nobody could tell that it failed
    except VitrailError as error:
        if debug:
            raise
        print(f"vitrail: {error}", file=sys.stderr)
        if wants_json:
            print(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        return error.exit_code
    except SystemExit as stop:  # tyro has printed its help, or what is wrong
        code = int(stop.code or 0)
        if wants_json and code:
            print(json.dumps({"error": "bad usage; stderr says what", "exit_code": code}))
        return code
    except KeyboardInterrupt:
        if debug:
            raise
        print("vitrail: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe had enough
        _drop_stdout()
        return 0
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _drop_stdout()
        print(f"vitrail: cannot write: {error.strerror}. Make room, and try again", file=sys.stderr)
        return DataError.exit_code
    finally:
        spell()
    return int(result.get("exit_code", 0))


def _share_cores() -> None:
    """Let torch's threads, which wait for each other after every operation, wait asleep.

    libgomp lets them spin for milliseconds: where another program has one of the cores, they use up
    the time that the one they wait for would need, and training is twenty times slower
    (docs/decisions.md). It reads this when torch is imported, and the processes made here inherit
    it. Whoever has set something of the kind knows better.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _open_streams() -> None:
    """Let standard streams be open, and take any character: whatever terminal, log or cron gave.

    Where one was closed, the next file to be opened, a checkpoint perhaps, would get its number.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_stdout() -> None:
    """Nothing can be said any more: not at the end of the process, either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
