"""Gray-release links: a change goes live merchant by merchant along the whole chain of calls, and comes back at once."""
