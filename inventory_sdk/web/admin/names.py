"""Names that other people chose, made safe to look at. (HTML is escaped by the templates; this is about what an eye would misread.)"""

from __future__ import annotations

import unicodedata
from typing import Final

# Not as pictures (U+2400 and on): most systems have no font for them.
_CONTROLS: Final = tuple(
    "NUL SOH STX ETX EOT ENQ ACK BEL BS HT LF VT FF CR SO SI "  # noqa: SIM905 - a table of names, read as two lines
    "DLE DC1 DC2 DC3 DC4 NAK SYN ETB CAN EM SUB ESC FS GS RS US".split()
)
_HIDDEN: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})


def visible(text: str) -> str:
    """Control characters by their names (``⟨US⟩``: what stands between the parts of a name of ours), invisible ones and those that turn
    the direction of writing by their number (``⟨U+202E⟩``): two names that look the same here are the same."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(each) for each in text)


def _shown(each: str) -> str:
    code = ord(each)
    if code < len(_CONTROLS):
        return f"⟨{_CONTROLS[code]}⟩"
    if unicodedata.category(each) in _HIDDEN or (each != " " and unicodedata.category(each) == "Zs"):
        return f"⟨U+{code:04X}⟩"
    return each
