"""The reference serving layer, thin: runs apps over slots leased from the scheduler.

    options.py   settings
    app.py       HTTP in front: /v1/run/TEAM/APP and below, /healthz
    main.py      the process: dispatch client, tunnel listener, metrics

No queue of its own beyond waiting for a slot, and no authentication in front yet: it listens on loopback unless told
otherwise. Any number of gateways may run; they share nothing.
"""
