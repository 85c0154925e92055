"""The parser's words for a value that cannot be used, in one plain line, whichever parser typer brings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from convsim_cli.errors import one_of

_EXPECTED = (  # what the parser says → what it expected
    (re.compile(r"valid integer"), "a whole number"),
    (re.compile(r"valid (?:number|float)"), "a number"),
    (re.compile(r"greater than or equal to (\S+)"), r"\1 or more"),
    (re.compile(r"less than or equal to (\S+)"), r"at most \1"),
)
_RANGE = re.compile(
    r"not in the range (?:(?P<least>[^<>=x]+)<=)?x(?:<=(?P<most>[^<>=]+?))?(?:>=(?P<above>[^<>=]+?))?\.?$"
)
_CHOICES = re.compile(r"is not one of (.+?)\.?$")


def explain_usage(error: Any, arguments: Sequence[str]) -> str:
    """Return a usage error of the parser as a line: the option, the value found, and what was expected."""
    message = " ".join(error.format_message().split())
    options = getattr(getattr(error, "param", None), "opts", [])
    given = _value_of(options, arguments)
    expected = _expected(message, given) if given is not None else None
    return f"{max(options, key=len)} {given}: expected {expected}" if expected else message


def _value_of(options: Sequence[str], arguments: Sequence[str]) -> str | None:
    """The last value that was given for an option."""
    found = None
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, separator, value = word.partition("=")
        if name in options:
            found = value if separator else following
    return found


def _expected(message: str, given: str) -> str | None:
    choices = _CHOICES.search(message)
    if choices:
        known = re.findall(r"'([^']*)'", choices[1])
        close = get_close_matches(given, known, n=1)
        return one_of(known) + (f"; did you mean {close[0]!r}?" if close else "")
    limits = _RANGE.search(message)
    if limits:
        least, most = limits["least"] or limits["above"], limits["most"]
        return f"at most {most}" if most and (not least or float(given) > float(most)) else f"{least} or more"
    for pattern, text in _EXPECTED:
        found = pattern.search(message)
        if found:
            return found.expand(text)
    return None
