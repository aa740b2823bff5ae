"""fsd's decisions, pure: no disk, no clock, no asyncio."""
