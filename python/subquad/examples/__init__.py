"""Examples that run as they are: `python -m subquad.examples.distill_sea`."""
