"""The worker: the process in the container that loads one model and serves it over HTTP on a unix socket.

`python -m fal_runtime.worker --model DIR --socket PATH`. Modules, from pure to edge: `request` (what a request
may say), `engine` (what a model can do), `diffusers_engine` (the only one that imports torch), `lane` (one
inference at a time), `server` (HTTP), `main` (process: phases, signals, exit codes). Importing this package
imports nothing of them.
"""
