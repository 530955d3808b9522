"""Teaching a student: losses, taps, pairs of layers, adapters, and the objective that a training loop minimises."""
