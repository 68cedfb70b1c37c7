"""The engine on a GPU beside the floors of its own steps: see `benchmarks.serve`."""
