"""How a run ended, for those who wait in this process and in others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from inventory_sdk.errors import RecalculationCutOff, RecalculationFailed
from inventory_sdk.redistribute.coalesced import Coalesced


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: its result, or what it failed of. Each caller gets an error of its own."""

    result: Any
    failed: tuple[type[RecalculationFailed], str, str] | None = None
    cause: BaseException | None = None

    @property
    def called(self) -> str:
        """``done``, ``failed`` or ``cut_off``."""
        if self.failed is None:
            return "done"
        return "cut_off" if self.failed[0] is RecalculationCutOff else "failed"

    def text(self, function: Coalesced) -> str:
        """For other processes."""
        if self.failed is None:
            return json.dumps({"result": function.outcome(self.result)})
        kind, name, why = self.failed
        return json.dumps({"failed": kind.__name__, "kind": name, "why": why})

    @classmethod
    def read(cls, text: str, function: Coalesced, key: str) -> Outcome:
        """What another process wrote."""
        document = json.loads(text)
        if "failed" in document:
            kind = RecalculationCutOff if document["failed"] == "RecalculationCutOff" else RecalculationFailed
            return cls(None, (kind, document["kind"], document["why"]))
        try:
            return cls(function.result.validate_python(document["result"]))
        except ValueError as error:
            return cls(None, (RecalculationFailed, type(error).__name__, f"another process's result does not fit: {error}"), error)

    def answer(self, function: str, key: str) -> Any:
        """The result; raises what it failed of."""
        if self.failed is not None:
            kind, name, why = self.failed
            raise kind(function, key, name, why) from self.cause
        return self.result
