"""`falctl`: assembles the verbs and turns errors into exit codes (0 done, 1 refused or failed, 2 usage).

Verb modules are light: gRPC, protobuf and rich are imported inside the functions that need them, so that
`falctl --help` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fal_contract.errors import FalError
from falctl import (
    apps,
    caches,
    completion,
    cost,
    dev,
    events,
    explaining,
    gpus,
    images,
    nodes,
    nodes_out,  # noqa: F401  (adds its verbs to `node` and `pool`)
    operate,
    planning,
    pools,
    quotas,
    rollouts,  # noqa: F401  (adds its verbs to `app`)
    run,
    runner_exec,  # noqa: F401  (adds its verbs to `runner`)
    runners,
    schedulers,  # noqa: F401  (adds its verbs to `operator`)
    secrets,
    sim,
    weights,
    weights_push,  # noqa: F401  (adds its verb to `weights`)
    weights_stage,  # noqa: F401  (adds its verbs to `weights`)
    weights_where,  # noqa: F401
)
from falctl.context import GLOBALS
from falctl.output import print_error

app = typer.Typer(
    name="falctl",
    help="Runs generative models on fleets of GPUs, without Kubernetes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _globals(
    profile: Annotated[str, typer.Option(help="Profile: a name or a path; else FALCTL_PROFILE.")] = "",
    team: Annotated[str, typer.Option(help="Team; else the profile's.")] = "",
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds one call may take.", min=0.1)] = 30.0,
) -> None:
    if team:
        from fal_contract.ids import check_name

        check_name(team, field="--team")
    GLOBALS.profile, GLOBALS.team, GLOBALS.timeout_s = profile or None, team or None, timeout_s


app.command("init")(apps.init)
app.add_typer(apps.group, name="app")
app.command("run")(run.run)
app.add_typer(runners.group, name="runner")
app.add_typer(weights.group, name="weights")
app.add_typer(images.group, name="image")
app.add_typer(caches.group, name="cache")
app.add_typer(secrets.group, name="secret")
app.add_typer(nodes.group, name="node")
app.add_typer(gpus.group, name="gpu")
app.add_typer(pools.group, name="pool")
app.add_typer(quotas.group, name="quota")
app.command("status")(operate.status)
app.command("plan")(planning.plan)
app.command("explain")(explaining.explain)
app.command("events")(events.events)
app.command("cost")(cost.cost)
app.add_typer(dev.group, name="dev")
app.add_typer(operate.operator_group, name="operator")
app.add_typer(operate.server_group, name="server")
app.command("sim", context_settings=sim.SETTINGS)(sim.sim)
app.command("completion")(completion.completion)


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except FalError as error:
        print_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`falctl events | head`): not an error of ours.
        sys.stderr.close()
        sys.exit(0)


if __name__ == "__main__":
    main()
