"""A site's own side: its settings and keys, what it allows, what it keeps, and how it answers."""
