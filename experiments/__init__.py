"""One module a claim of the field, each run as `python -m experiments.NAME`."""
