"""Planted mistakes, each met by the tests that ought to notice it: ``PYTHONPATH=tests python -m mutants`` (``make mutants``)."""
