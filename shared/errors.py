# SPDX-License-Identifier: Apache-2.0
"""The last line of a failed run says what was wrong."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

logger = logging.getLogger(__name__)

_FRAME = re.compile(r'^  File "(.*?)", line', re.MULTILINE)
_ERROR = re.compile(r"^([\w.]+): (.*)$", re.MULTILINE)
_PACKAGE = Path(__file__).resolve().parent


def show_cause_last() -> None:
    """Let uncaught errors end in the message of their root cause; every configuration calls it in ``initialize``.

    MONAI's parser wraps each error of a component into "Failed to evaluate ConfigExpression", once per level, and that
    becomes the last line. An error that this package raised on purpose (bad data, wrong weights, ...) then ends the
    process with its message alone, the traceback going to the log at level DEBUG; any other error keeps its traceback
    and gets the root cause as an additional last line. The exit code stays 1.
    """
    sys.excepthook = _report


def root_cause(error: BaseException) -> BaseException:
    """The error at the start of a chain of ``raise ... from``, unless this package raised a later one on purpose."""
    while error.__cause__ is not None and not _is_ours(error):
        error = error.__cause__
    return error


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    # A bar that is still open would share the line with the message and wipe the terminal's last line at exit.
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    cause = root_cause(error)
    full = "".join(traceback.format_exception(kind, error, trace))
    if _is_ours(cause):
        logger.debug("%s", full)
    else:
        print(full, file=sys.stderr)
    message = str(cause.args[0]) if isinstance(cause, KeyError) and cause.args else str(cause)
    if "DataLoader worker process" in message:
        print(_cause_in_worker(message), file=sys.stderr)
    else:
        print(message if _is_ours(cause) else f"{type(cause).__name__}: {message}", file=sys.stderr)


def _cause_in_worker(message: str) -> str:
    """The root cause in the text as which a data loader's worker hands over its error, tracebacks and all."""
    chain = []
    for part in message.split("Traceback (most recent call last):")[1:]:
        frames, error = _FRAME.findall(part), _ERROR.search(part)
        if frames and error:
            chain.append((_PACKAGE in Path(frames[-1]).parents, error))
    ours = next((error[2] for is_ours, error in chain if is_ours), None)
    return ours or (chain[0][1][0] if chain else message)


def _is_ours(error: BaseException) -> bool:
    """Whether the error was raised by a statement of this package rather than by a library it called."""
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return _PACKAGE in Path(trace.tb_frame.f_code.co_filename).resolve().parents
