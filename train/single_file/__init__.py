"""The one script that a record ships: what it does, what it is packed from, and what it counts."""
