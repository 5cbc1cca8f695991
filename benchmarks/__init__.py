"""Measurements and checks of the kernels; nothing imports this package but the tests."""
