"""Other quantizers: each in an environment of its own, behind one contract."""
