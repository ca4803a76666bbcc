"""Gemma on ordinary CPUs, from a terminal."""

__version__ = "0.1.0"
