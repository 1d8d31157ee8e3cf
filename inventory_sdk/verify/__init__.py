"""Operation quantity verification: a function that was asked to move lines moved exactly those, or does not return."""
