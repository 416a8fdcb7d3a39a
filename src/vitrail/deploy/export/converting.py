"""Converters of others at work: what they say of themselves, and what they raise."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from vitrail.errors import UsageError


@contextmanager
def converting(tool: str, extra: str) -> Iterator[None]:
    """As long as a converter is imported and works: no warning, log or progress of its own, as far
    as these come from Python.

    Raises `UsageError` for whatever it raises: where it is not installed, with vitrail's extra that
    has it, and where it does not take the model.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        nowhere = io.StringIO()
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise UsageError(
            f"{tool} cannot be imported ({error}): python -m pip install 'vitrail[{extra}]'"
        ) from error
    except Exception as error:  # each pass of theirs has a class of its own
        said = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{tool} does not take this model ({type(error).__name__}: {said}): export it to "
            f"another runtime"
        ) from error
    finally:
        logging.disable(disabled)
