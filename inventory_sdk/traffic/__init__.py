"""Lanes: classes of calls with their own concurrency, queue and time, so that a flood in one never slows another."""
