"""The public face: everything a user imports stands here, nothing else does."""

__version__ = "0.1.0"
