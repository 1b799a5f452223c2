"""Random problems against the float64 reference: ``PYTHONPATH=tests python -m fuzz`` (``make fuzz N=100000``)."""
