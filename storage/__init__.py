"""Versions, blobs, lineage and the ledger: what weft remembers.

An adapter version is a commit: its id is the hash of its tensors, its parents and the recipe that
made it. Tensors are files named by their hash (:mod:`storage.blobs`); everything else is rows in
SQLite or PostgreSQL (:mod:`storage.database`). :class:`storage.store.AdapterStore` holds versions,
:class:`storage.ledger.Ledger` holds runs, events, clients and privacy spends. The package knows no
learning: tensors are named arrays, a recipe and a spend's parameters are JSON.
"""
