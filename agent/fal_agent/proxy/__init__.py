"""`fal-proxy`, the node's data path: a process of its own, so that requests outlive the agent.

slots.py           pure: which requests are admitted, and what was served
routing.py         pure: heads of requests, tickets, answers that the proxy gives itself
pump.py            the connections: client on one side, worker on the other, bytes between them
datapath.py        what all connections of the process share
worker_socket.py   connecting to a socket that a hostile container owns
tunnels.py         connections that the proxy dials, to gateways that cannot dial it
messages.py, control_server.py, control.py   how the agent steers it
state_file.py      what a proxy that died knows when it comes back
handover.py        how a successor takes listeners and slots over
server.py, options.py, main.py   the process
"""
