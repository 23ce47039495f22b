"""Compare two packages: rows, dense parameters, inputs, outputs and scores."""
