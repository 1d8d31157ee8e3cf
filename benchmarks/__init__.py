"""Measurements that anyone can repeat: ``python -m benchmarks.hot_sku`` and its neighbours. Each prints one JSON object last.

They want Redis, RabbitMQ and PostgreSQL, use names of their own there, and remove what they made.
"""
