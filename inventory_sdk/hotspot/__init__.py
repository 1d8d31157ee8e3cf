"""Hotspots: what everybody wants at once is found across all processes, paced fairly, and moved to where it sells fastest."""
