"""Names that other people chose, made safe to look at. (HTML is escaped by the templates; this is about what an eye would misread.)"""

from __future__ import annotations

import unicodedata
from typing import Final

_HIDDEN: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})


def visible(text: str) -> str:
    """Control characters as pictures (``␟``), invisible ones and those that turn the direction of writing by their number (``⟨U+202E⟩``):
    two names that look the same here are the same."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(each) for each in text)


def _shown(each: str) -> str:
    code = ord(each)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if unicodedata.category(each) in _HIDDEN or (each != " " and unicodedata.category(each) == "Zs"):
        return f"⟨U+{code:04X}⟩"
    return each
