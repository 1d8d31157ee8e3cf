"""Heavy calculations that many events cause: named triggers, merged runs, and a CPU budget they keep to."""
