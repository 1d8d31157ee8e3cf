"""Stands for a package that one installs and can't edit."""
