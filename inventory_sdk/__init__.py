"""The public face: everything a user imports stands here, nothing else does."""

from inventory_sdk.errors import (
    DeadlineExceeded,
    DurabilityNotReached,
    HotspotLimited,
    InsufficientStock,
    InvalidOperation,
    InventoryError,
    JournalFull,
    LaneFull,
    LaneNotServed,
    NotStarted,
    OperationConflict,
    OutcomeUnknown,
    Overloaded,
    QuantityMismatch,
    RecalculationCutOff,
    RecalculationFailed,
    ReservationClosed,
    ReservationExpired,
    ReservationNotFound,
    StockFrozen,
    UnknownStock,
)
from inventory_sdk.inventory import Inventory
from inventory_sdk.model import Detection, Lane, Line, Movement, OpeningBalance, Receipt, Reservation, StockLevel
from inventory_sdk.redistribute.coalesced import Recalculation
from inventory_sdk.redistribute.policy import RedistributionPolicy
from inventory_sdk.verify.changes import Change, record_change
from inventory_sdk.verify.tables import WatchedTables
from inventory_sdk.weave import injected
from inventory_sdk.web.middleware import InventoryMiddleware

__version__ = "0.1.0"

__all__ = [
    "Change",
    "DeadlineExceeded",
    "Detection",
    "DurabilityNotReached",
    "HotspotLimited",
    "InsufficientStock",
    "InvalidOperation",
    "Inventory",
    "InventoryError",
    "InventoryMiddleware",
    "JournalFull",
    "Lane",
    "LaneFull",
    "LaneNotServed",
    "Line",
    "Movement",
    "NotStarted",
    "OpeningBalance",
    "OperationConflict",
    "OutcomeUnknown",
    "Overloaded",
    "QuantityMismatch",
    "Recalculation",
    "RecalculationCutOff",
    "RecalculationFailed",
    "Receipt",
    "RedistributionPolicy",
    "Reservation",
    "ReservationClosed",
    "ReservationExpired",
    "ReservationNotFound",
    "StockFrozen",
    "StockLevel",
    "UnknownStock",
    "WatchedTables",
    "__version__",
    "injected",
    "record_change",
]
