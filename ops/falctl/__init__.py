"""The operator's command. Talks to the scheduler's gRPC API only; never imports a daemon's package."""
