"""Measurements of speed and memory, side by side in one process."""
