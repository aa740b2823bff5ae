"""The bulk port: connections between caches. `net.PeerNet` implements `fal_fsd.ports.Peers`."""
