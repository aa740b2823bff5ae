"""Networks of containers: a namespace of their own, what it may reach, and how the node reaches into it.

`policy` (pure) says what is allowed; `egress` makes and takes away a container's way out by CNI; `namespaces` and `cni`
are its tools; `reach` makes sockets inside a runner's namespace, for proxy and probes.
"""
