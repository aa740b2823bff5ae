"""The cache on this node's disk and in its memory: parts, finished files, pins, eviction, verification.

Invariant: a piece counts only after its digest was checked; `models/DIGEST` appears by one rename, after every byte of
it was checked and is durable.
"""
