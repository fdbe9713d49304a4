"""Training runs that compare methods and precisions: data sets, networks, the demo, the comparison."""
