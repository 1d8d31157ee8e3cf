"""Where discrepancies are told: the ledger's register, Elasticsearch, a structured log."""
