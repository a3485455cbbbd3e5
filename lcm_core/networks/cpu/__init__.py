"""Large networks made faster on a CPU."""
