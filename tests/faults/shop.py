"""The service under attack: what callers and workers import. Everything about it is in the environment."""

from __future__ import annotations

import os

from inventory_sdk import Inventory

inventory = Inventory.from_env(
    merchant=None,
    table_prefix=os.environ["INVENTORY_TEST_PREFIX"],
    metrics=(),
    redis_timeout=0.5,  # a reply that is lost is noticed soon; the fence of a late script is as long
)
