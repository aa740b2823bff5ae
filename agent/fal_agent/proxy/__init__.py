"""`fal-proxy`, the node's data path: a process of its own, so that requests outlive the agent.

- `slots` (pure): which requests are admitted, and what was served
- `routing` (pure): heads of requests, tickets, answers that the proxy gives itself
- `pump`: a gateway's connection; `exchange`: one admitted request and the worker's connection
- `datapath`: what all connections of the process share
- `worker_socket`: connecting to a socket that a hostile container owns
- `listener`: the TCP listener and who may use it; `tunnels`: connections that the proxy dials instead
- `messages`, `control_server`, `control`: how the agent steers it
- `state_file`: what a proxy that died knows when it comes back
- `handover`: how a successor takes listener and slots over
- `server`, `options`, `main`: the process
"""
