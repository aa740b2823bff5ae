"""The operators' API: one module per noun, thin. Validate, submit to the engine, answer from the view.

    roles      which role may call which method, all services in one table
    service    the gRPC servicers; nothing but adapters
    views      messages from the engine's view
    pools, nodes, tokens, models, apps, runners, explain, events, status   the calls of each noun

Functions take the term's parts (`Leadership`), the request and who asked. They must not keep anything between calls.
"""
