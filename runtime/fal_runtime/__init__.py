"""What runs containers (drivers) and what runs in them (worker)."""
