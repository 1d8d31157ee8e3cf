"""The sink that keeps nothing."""

from __future__ import annotations

from inventory_sdk.metrics.events import Event


class NoMetrics:
    """Takes every event and forgets it."""

    def record(self, event: Event) -> None:
        """Forget it."""
