"""The SDK on the web: ASGI middleware and pages."""
