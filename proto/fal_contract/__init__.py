"""What two falctl processes must agree on: messages, ids, errors, limits, clock, config, identity, telemetry.

Everything may import this package; it imports none of ours.
"""
