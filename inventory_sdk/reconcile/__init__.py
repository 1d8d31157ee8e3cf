"""Comparison of Redis, the ledger and the service's own tables, while sales go on; causes, records, corrections."""
