"""What the tests share: formulas from the papers, starters of processes, and comparisons of passes."""
