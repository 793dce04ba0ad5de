"""Hydra config groups of clpeft; one folder per group, one file per choice."""
