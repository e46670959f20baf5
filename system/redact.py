"""Keeps secrets out of what a run writes: files of the run directory, log, messages.

A secret reaches a run in an address: as user and password, in the query of a signed URL, or as the
value of a variable `${NAME}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# The lengths are bounded, so that a long text without an address takes no longer than another one.
_URL = re.compile(r"""[A-Za-z][A-Za-z0-9+.-]{0,30}://[^\s"'<>]+""")
_USER = re.compile(
    r"""(?<=://)(?:
        [^/]*@                            # up to the last @ before the path
        | [^/:@]*:(?!\d+(?:/|$))[^@]{0,1024}@  # a key may have slashes; not a port
    )""",
    re.VERBOSE,
)
_SECRET_NAME = re.compile(
    r"sig|token|key|secret|pass|pwd|cred|auth|polic|expir|amz|goog|access|jwt|session|code|hash"
    r"|^(se|sp|sv|sr|st|ss|srt|spr|sip|ske|skt|sks|skv|h|k|p)$",
    re.IGNORECASE,
)
_LONG = 16
"""Shorter values of a query have no room for a signature or a token."""
_VARIABLES = re.compile(r"(\$\{\w+\}|\$\w+|:)*")
_SHORTEST_SECRET = 4
"""Shorter values of variables are not searched for: they occur everywhere by chance."""


def without_secrets(text: str, variables: Mapping[str, str] | None = None) -> str:
    """The text with `***` for user and password in URLs, and for queries that may be signed.

    Variables that are not expanded (`https://${USER}:${PASSWORD}@host`) stay.

    Args:
        text: any text, also one with several addresses.
        variables: name -> value; a value in the text becomes `${NAME}`.
    """
    named = sorted((variables or {}).items(), key=lambda item: -len(item[1]))
    for name, value in named:
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, f"${{{name}}}")
    return _URL.sub(lambda match: _without_query(_without_user(match.group())), text)


def _without_user(url: str) -> str:
    # Several addresses may be chained: simplecache::https://user:password@host.
    return _USER.sub(
        lambda match: match.group() if _VARIABLES.fullmatch(match.group()[:-1]) else "***@", url
    )


def _without_query(url: str) -> str:
    address, mark, query = re.split(r"([?#])", url, maxsplit=1) if re.search("[?#]", url) else (
        url, "", ""
    )  # fmt: skip
    is_secret = any(map(_may_be_secret, re.split("[&;#]", query)))
    return f"{address}{mark}***" if is_secret else url


def _may_be_secret(parameter: str) -> bool:
    name, has_value, value = parameter.partition("=")
    if not has_value:
        return len(name) >= 2 * _LONG and not _VARIABLES.fullmatch(name)
    if not value or _VARIABLES.fullmatch(value):
        return False
    return bool(_SECRET_NAME.search(name)) or len(value) >= _LONG
