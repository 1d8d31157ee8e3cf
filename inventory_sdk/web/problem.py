"""Our errors as HTTP: a status, Retry-After where it helps, and problem details (RFC 9457).

| error | status |
|---|---|
| InvalidOperation, UnknownStock | 422 |
| InsufficientStock, OperationConflict, QuantityMismatch, ReservationClosed | 409 |
| ReservationNotFound | 404 |
| ReservationExpired | 410 |
| LaneNotServed | 421 |
| HotspotLimited | 429 |
| Overloaded and all below it, OutcomeUnknown, NotStarted | 503 |
| DeadlineExceeded, DurabilityNotReached, RecalculationCutOff | 504 |
| RecalculationFailed | 500 |

What a client can mend (4xx) is told in the error's own words; what is ours (5xx) in fixed ones, since those errors name servers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from inventory_sdk import errors
from inventory_sdk.errors import InventoryError

STATUSES: Final[Mapping[type[InventoryError], tuple[int, str]]] = {
    errors.InvalidOperation: (422, ""),
    errors.UnknownStock: (422, ""),
    errors.InsufficientStock: (409, ""),
    errors.OperationConflict: (409, ""),
    errors.QuantityMismatch: (409, ""),
    errors.ReservationClosed: (409, ""),
    errors.ReservationNotFound: (404, ""),
    errors.ReservationExpired: (410, ""),
    errors.LaneNotServed: (421, ""),
    errors.HotspotLimited: (429, ""),
    errors.Overloaded: (503, "Too busy; nothing was changed. Come back after Retry-After."),
    errors.OutcomeUnknown: (503, "Whether it was done is not known. Repeating it with the same operation id is safe."),
    errors.NotStarted: (503, "Not ready yet; nothing was changed."),
    errors.DeadlineExceeded: (504, "It took longer than it may. Repeating it with the same operation id is safe."),
    errors.RecalculationFailed: (500, "A calculation that this waited for failed."),
    errors.RecalculationCutOff: (504, "A calculation that this waited for took longer than it may."),
    errors.DurabilityNotReached: (504, "It was done, but not stored as safely as asked. Repeating it with the same operation id is safe."),
}
"""Status, and the words instead of the error's own."""
RETRY_AFTER: Final = {errors.OutcomeUnknown: 1.0, errors.NotStarted: 1.0, errors.DurabilityNotReached: 1.0}
TYPE: Final = "urn:inventory-sdk:problem:"


@dataclass(frozen=True, slots=True)
class Problem:
    """A response: ``headers`` as ASGI has them, ``body`` is JSON."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


def problem(error: InventoryError) -> Problem | None:
    """The response to an error; None for one that is nobody's but ours (a plain InventoryError): that is the framework's 500."""
    kind = next((each for each in type(error).__mro__ if each in STATUSES), None)
    if kind is None:
        return None
    status, words = STATUSES[kind]
    name = next(each.__name__ for each in type(error).__mro__ if each.__module__ == errors.__name__)
    facts: dict[str, Any] = {
        "type": TYPE + re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower(),
        "title": re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).capitalize(),
        "status": status,
        "detail": words or str(error),
    }
    headers = [(b"content-type", b"application/problem+json"), (b"cache-control", b"no-store")]
    for field in ("field", "operation_id", "reservation", "state", "sku", "merchant", "lane", "served", "pointer"):
        value = getattr(error, field, None)
        if isinstance(value, str | tuple):
            facts[field] = value
    if isinstance(error, errors.InsufficientStock):
        facts["shortages"] = [
            {"merchant": each.merchant, "sku": each.sku, "requested": each.requested, "available": each.available}
            for each in error.shortages
        ]
    retry_after = error.retry_after if isinstance(error, errors.Overloaded) else RETRY_AFTER.get(kind)
    if retry_after is not None:
        facts["retry_after"] = retry_after
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(retry_after))))
    body = json.dumps(facts).encode()
    headers.append((b"content-length", b"%d" % len(body)))
    return Problem(status, tuple(headers), body)
