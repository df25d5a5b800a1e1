"""What several benchmarks share, and the programs they start in a process of their own."""
