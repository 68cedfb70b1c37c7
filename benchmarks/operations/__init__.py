"""The cases of benchmarks/ops.py, one file per family of operations."""
