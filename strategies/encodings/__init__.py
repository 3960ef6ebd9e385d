"""Encodings of what clients send: one stage a file; see :mod:`strategies.uplink`."""

from strategies.plugins import Family

ENCODINGS = Family("encoding", "strategies.encodings")
