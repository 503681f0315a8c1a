"""One file for each claim about speed. Each compares what it measures with something, in one run."""
