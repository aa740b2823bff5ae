"""The scheduler's decisions run on traces and logs, in virtual time: `python -m fal_scheduler.sim VERB`."""
