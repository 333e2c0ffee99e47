"""LIBERO's suites, in processes of a Python environment of their own."""
