"""The agent's decisions, pure: no clock, no I/O, no asyncio. Time comes in as monotonic seconds."""
