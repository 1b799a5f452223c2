"""A benchmark of all heads on real images of tens of thousands of identities; ``python -m examples.study --help``, and README.md here."""
