"""What the machine has: GPUs through NVML or simulated, behind one protocol, and the host's CPU, memory and disk.

`model` holds the types and the rules that both providers share, `catalog` names GPU models, `spec` reads
`--sim-gpus`, `nvml` and `simulated` are the providers, `machine` shows a snapshot to the rest of the agent.
"""
