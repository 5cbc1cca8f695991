"""The version of the package, read by the build without importing it."""

__version__ = "0.2.0"
