"""Generated protobuf and gRPC stubs, wire version 1. Regenerate with `python ops/genproto.py`."""
