"""The single script that a record ships: the modules it needs, packing them, and its size."""
