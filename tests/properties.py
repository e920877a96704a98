# SPDX-License-Identifier: Apache-2.0
"""How hypothesis runs here: the same examples every time, no database, no time limit for one example."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

# More examples than the tests ask for, to look for faults: HYPOTHESIS_SCALE=20 pytest tests/test_reports_properties.py
_SCALE = float(os.environ.get("HYPOTHESIS_SCALE", "1"))


def examples(count: int, **options: Any) -> settings:
    """Decorator: so many examples, the same in every run; with `HYPOTHESIS_SCALE` other and more ones."""
    return settings(
        max_examples=max(int(count * _SCALE), 1),
        derandomize=_SCALE == 1,
        database=None,
        deadline=None,
        # Files are made anew for every example; a slow machine is no fault.
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        **options,
    )


def error_of(call: Callable[[], Any], *kinds: type[Exception]) -> Exception | None:
    """What a call raises of some kinds (ValueError if none is given), None if nothing; other errors go through."""
    known = kinds or (ValueError,)
    try:
        call()
    except known as error:
        return error
    return None
