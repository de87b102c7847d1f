"""``moorage lab``: a whole cluster inside this machine, to try things on."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from ipam.errors import InvalidInput
from ipam.records import FABRICS
from moorage.cli.output import Column, words
from moorage.cli.session import Session, pass_session
from moorage.lab import labs, names
from moorage.lab.errors import LabError
from moorage.lab.standing import MOST_MEMBERS, MOST_NODES, NETWORKS, Plan, StandingLab
from moorage.lab.survey import Row, survey, task_row
from moorage.lab.task import Task, Wanted

SHELL = "bash"
COMMAND_SHOWN = 50
"""Characters of a command in a table."""

BEHIND_SIGNAL = 128
"""A shell's exit code for a command that a signal ended, less the signal's number."""


class NeedsRoot(click.Command):
    """A command, not its --help, needs root; what a program of the machine refuses is one sentence."""

    def invoke(self, ctx: click.Context) -> Any:
        if os.geteuid() != 0:
            raise InvalidInput("a lab is made of network namespaces, which need root; use sudo")
        try:
            return super().invoke(ctx)
        except subprocess.CalledProcessError as error:
            said = (error.stderr or "").strip().splitlines()
            command = " ".join(map(str, error.cmd))
            raise LabError(
                f"`{command}` failed with {error.returncode}: {said[-1] if said else 'it said nothing'}"
            ) from error


class Lab(click.Group):
    """The group."""

    command_class = NeedsRoot


class WithCommand(NeedsRoot):
    """Takes a place and a command line. Options may stand on both sides of the place, and end where the command
    begins: what is behind that is the command's own.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options, rest = self._split(args)
        if rest and rest[0] != "--":
            more, command = self._split(rest[1:])
            options, rest = [*options, *more], [rest[0], *command]
        rest = [word for number, word in enumerate(rest) if (number, word) not in ((0, "--"), (1, "--"))]
        return super().parse_args(ctx, [*options, "--", *rest])

    def _split(self, args: list[str]) -> tuple[list[str], list[str]]:
        """Options with their values, and what begins with the first word that is neither."""
        valued = {
            name
            for parameter in self.params
            if isinstance(parameter, click.Option) and not parameter.is_flag
            for name in parameter.opts
        }
        end = 0
        while end < len(args) and args[end].startswith("-") and args[end] not in ("-", "--"):
            end += 2 if args[end] in valued else 1
        return args[:end], args[end:]


@click.group(cls=Lab, short_help="A cluster inside this machine, to try things on.")
def lab() -> None:
    """A whole cluster inside this machine, in network namespaces, to try things on.

    Nodes with real agents, members of etcd, and containers that join networks as Mesos would have them
    do it. It goes on until `moorage lab down`, which leaves nothing. The machine's own networking, and an
    agent that is installed on it, are never touched.

    \b
    Example:
      moorage lab up --nodes 3
      moorage lab run n1 --name web -- python3 -m http.server 8080
      moorage lab status
      moorage lab down
    """


def option_lab(command: Callable[..., None]) -> Callable[..., None]:
    """--lab, as every command but `up` has it."""
    return click.option("--lab", "name", metavar="NAME", help="Which lab.  [default: the only one]")(command)


@lab.command(short_help="Make a lab and start everything in it.")
@click.option("--nodes", metavar="N", type=click.IntRange(1, MOST_NODES), default=3, help="How many nodes.")
@click.option(
    "--etcd", metavar="M", type=click.IntRange(1, MOST_MEMBERS), default=1, help="How many members of etcd."
)
@click.option(
    "--fabric",
    type=click.Choice(FABRICS),
    default="vxlan",
    help="How nodes reach each other's containers.",
)
@click.option("--gateway", is_flag=True, help="Add a node `gw`, which reaches all containers and runs none.")
@click.option("--lab", "name", metavar="NAME", default="demo", help="What to call it.")
@pass_session
def up(session: Session, name: str, nodes: int, etcd: int, fabric: str, gateway: bool) -> None:
    """Make a lab: nodes n1, n2, ..., members etcd0, ..., and the networks blue and green.

    Several labs may be up at a time, each in a world of its own. If this fails nothing is left of it; if it
    is killed, `moorage lab down` removes what there is.

    \b
    Examples:
      moorage lab up --nodes 3
      moorage lab up --nodes 5 --etcd 3 --fabric hostgw --gateway --lab big
    """
    plan = Plan(name=name, nodes=nodes, etcd=etcd, fabric=fabric, gateway=gateway)
    with _unwound_by_signals(), _progress(labs.parts(plan)) as progress:
        made = labs.up(plan, progress)
    machines = list(made.machines)
    session.out.done(_welcome(made), {"lab": name, "machines": machines, "networks": list(NETWORKS)})


def _welcome(made: StandingLab) -> str:
    which = "" if names.all_labs() == [made.name] else f" --lab {made.name}"
    last = made.cluster.nodes[-1].name
    hints = [
        (f"run n1{which} --name web -- python3 -m http.server 8080", "a container, and its address"),
        (f"run {last}{which} --wait -- ping -c 3 ADDRESS", "another one reaches it"),
        (f"exec n1{which} moorage ip list", "the operator's view, from a node"),
        (f"kill n1{which}", "containers go on without their agent"),
        (f"status{which}", "everything there is"),
        (f"down{which}", "and nothing is left"),
    ]
    width = max(len(command) for command, _ in hints)
    return "\n".join(
        [
            f"lab {made.name} is up: {', '.join(made.machines)}; "
            f"networks {' and '.join(NETWORKS)}, fabric {made.record.fabric}",
            "",
            "Try:",
            *(f"  moorage lab {command:<{width}}   {effect}" for command, effect in hints),
        ]
    )


@lab.command(short_help="Show nodes, members, containers and partitions.")
@option_lab
@pass_session
def status(session: Session, name: str | None) -> None:
    """Show a lab: its nodes and their agents, members of etcd, containers, and who is cut off from whom.

    \b
    Example:
      moorage lab status -o json
    """
    found = survey(labs.find(name, incomplete=True))
    session.out.record(found if session.out.as_json else _brief(found))


def _brief(found: Row) -> Row:
    """What fits on a screen of a survey."""
    containers = [
        {
            "container": row["container"],
            "id": row["id"][:8],
            "node": row["node"],
            "addresses": row["addresses"],
            "command": _shortened(shlex.join(row["command"])),
            "pid": row["pid"] or ("ended" if row["command"] else None),
        }
        for row in found["containers"]
    ]
    nodes = [
        {**row, "blocks": "unknown" if row["blocks"] is None else row["blocks"]} for row in found["nodes"]
    ]
    return {**found, "nodes": nodes, "containers": containers}


def _shortened(command: str) -> str:
    return command if len(command) <= COMMAND_SHOWN else f"{command[: COMMAND_SHOWN - 1]}…"


@lab.command("list", short_help="List the labs that there are.")
@pass_session
def list_(session: Session) -> None:
    """List the labs that there are on this machine.

    \b
    Example:
      moorage lab list
    """
    session.out.rows(
        [{"lab": name} for name in names.all_labs()],
        [Column("lab")],
        none="No lab is up; start one with `moorage lab up --nodes 3`.",
    )


@lab.command("exec", cls=WithCommand, short_help="Run a command on a node, or in a container.")
@option_lab
@click.argument("place", metavar="NODE|CONTAINER")
@click.argument("command", metavar="[CMD...]", nargs=-1, type=click.UNPROCESSED)
@pass_session
def exec_(session: Session, name: str | None, place: str, command: tuple[str, ...]) -> None:
    """Run a command in the network of a node, a member of etcd or a container; a shell without CMD.

    `moorage` on a node speaks to that node's agent and the lab's store, `etcdctl` on a member to that
    member. A container is named by its name or the beginning of its id.

    \b
    Examples:
      moorage lab exec n1 moorage endpoint list
      moorage lab exec n2 ip route
      moorage lab exec web ss -tln
      moorage lab exec n1
    """
    found = labs.find(name).place(place)
    if not found.namespace.exists:
        raise InvalidInput(f"{place} is switched off; switch it on with `moorage lab start {place}`")
    command = command or (os.environ.get("SHELL", SHELL),)
    ours = str(Path(sys.executable).parent)
    environment = {**found.environment, "PATH": f"{ours}:{os.environ.get('PATH', os.defpath)}"}
    _require_program(command, environment["PATH"])
    sys.stdout.flush()
    line = found.namespace.command(*command)
    os.execvpe(line[0], line, environment)


@lab.command(cls=WithCommand, short_help="Start a container on a node.")
@click.option(
    "--network", "networks", metavar="NAME", multiple=True, help="To join; repeatable.  [default: blue]"
)
@click.option("--label", "labels", metavar="KEY=VALUE", multiple=True, help="For every network; repeatable.")
@click.option("--name", "container", metavar="NAME", help="What to call it.  [default: c1, c2, ...]")
@click.option(
    "-w", "--wait", is_flag=True, help="Run CMD here, remove the container with it, exit as it does."
)
@option_lab
@click.argument("node", metavar="NODE")
@click.argument("command", metavar="[CMD...]", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
@pass_session
def run(
    session: Session,
    ctx: click.Context,
    name: str | None,
    node: str,
    networks: tuple[str, ...],
    labels: tuple[str, ...],
    container: str | None,
    wait: bool,
    command: tuple[str, ...],
) -> None:
    """Start a container on a node: a network namespace, the CNI plugin called as Mesos calls it, and CMD in it.

    CMD runs in the background, its output goes to the log that -o json names, and the container stays until
    `moorage lab rm`. Without CMD there is only the namespace. Only the network is the container's own: files
    and programs are the machine's.

    \b
    Examples:
      moorage lab run n1 --name web -- python3 -m http.server 8080
      moorage lab run n2 --network blue --network green --label moorage.netgroups=front
      moorage lab run n2 --wait -- ping -c 3 10.64.0.5
    """
    _require_program(command, os.environ.get("PATH", os.defpath))
    if wait and not command:
        raise InvalidInput("--wait needs a command to wait for; write it behind the node")
    made = labs.find(name)
    wanted = Wanted(
        networks=networks or tuple(NETWORKS)[:1],
        labels=_labels(labels),
        command=() if wait else command,
    )
    with _unwound_by_signals():
        with labs.locked(made.name, shared=True):
            task = made.run(node, wanted, container)
        if wait:
            ctx.exit(_run_here(made, task, command))
    where = "; ".join(f"{network} {words(ips)}" for network, ips in task.record.addresses.items())
    session.out.done(f"{task.name} runs on {node}: {where}", task_row(task))


def _run_here(made: StandingLab, task: Task, command: Sequence[str]) -> int:
    """The exit code of a command in the foreground; its container goes with it."""
    process = task.namespace.start(*command, env=task.environment)
    try:
        # An interrupt from the terminal is the command's; it decides whether that is its end.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            code = process.wait()
        finally:
            signal.signal(signal.SIGINT, before)
    finally:
        process.kill()
        process.wait()
        with labs.locked(made.name, shared=True):
            task.remove()
    return code if code >= 0 else BEHIND_SIGNAL - code


@lab.command("rm", short_help="End containers.")
@option_lab
@click.argument("containers", metavar="CONTAINER...", nargs=-1, required=True)
@pass_session
def remove(session: Session, name: str | None, containers: tuple[str, ...]) -> None:
    """End containers: what runs in them is killed, their nodes are called with DEL, their namespaces go.

    A container is named by its name or the beginning of its id. With its agent killed, the DEL is kept for
    the next agent.

    \b
    Example:
      moorage lab rm web c2
    """
    made = labs.find(name)
    with labs.locked(made.name, shared=True):
        found = [made.task(container) for container in containers]
        for task in found:
            task.remove()
    removed = [task.name for task in found]
    session.out.done(f"{', '.join(removed)} removed", {"removed": removed})


@lab.command(short_help="Kill an agent, a member of etcd, or a whole node.")
@click.option("--power", is_flag=True, help="The whole node dies, with its containers.")
@option_lab
@click.argument("node")
@pass_session
def kill(session: Session, name: str | None, node: str, power: bool) -> None:
    """kill -9 the agent of a node, or a member of etcd. With --power, a node dies as a machine does.

    Without its agent, a node's containers go on. With --power they are gone, and so is all that the kernel
    had of the node; its files are there again when it is started.

    \b
    Examples:
      moorage lab kill n2
      moorage lab kill n2 --power
      moorage lab kill etcd0
    """
    made = labs.find(name)
    with labs.locked(made.name):
        lost = made.kill(node, power=power)
    what = f"{node} is switched off" if power else f"{node} is killed"
    gone = f", and {', '.join(lost)} with it" if lost else ""
    session.out.done(
        f"{what}{gone}; start it again with `moorage lab start {node}`",
        {"killed": node, "power": power, "lost": lost},
    )


@lab.command(short_help="Start what was killed.")
@option_lab
@click.argument("node")
@pass_session
def start(session: Session, name: str | None, node: str) -> None:
    """Start the agent of a node again, or a member of etcd; a node that is switched off is switched on first.

    \b
    Example:
      moorage lab start n2
    """
    made = labs.find(name)
    with labs.locked(made.name):
        made.start(node)
    session.out.done(f"{node} is started", {"started": node})


@lab.command(short_help="Cut two nodes off from each other.")
@option_lab
@click.argument("one")
@click.argument("other")
@pass_session
def partition(session: Session, name: str | None, one: str, other: str) -> None:
    """Cut two nodes, or members of etcd, off from each other: packets vanish, and neither is told.

    \b
    Examples:
      moorage lab partition n1 n2
      moorage lab partition n1 etcd0
    """
    made = labs.find(name)
    with labs.locked(made.name):
        made.partition(one, other)
    session.out.done(
        f"{one} and {other} are cut off from each other; undo it with `moorage lab heal`",
        {"between": one, "and": other},
    )


@lab.command(short_help="Undo every partition.")
@option_lab
@pass_session
def heal(session: Session, name: str | None) -> None:
    """Undo every partition: all wires are whole again.

    \b
    Example:
      moorage lab heal
    """
    made = labs.find(name)
    with labs.locked(made.name):
        healed = made.partitions()
        made.cluster.heal()
    session.out.done(f"every wire of lab {made.name} is whole", {"healed": [list(pair) for pair in healed]})


@lab.command(short_help="End a lab and leave nothing of it.")
@option_lab
@pass_session
def down(session: Session, name: str | None) -> None:
    """End a lab and remove everything of it: processes, namespaces, files.

    Works on whatever is there: also after an `up` that was killed, after a restart of the machine, or when
    parts of it were removed by hand.

    \b
    Example:
      moorage lab down
    """
    ended = labs.down(name)
    session.out.done(f"lab {ended} is gone", {"lab": ended, "down": True})


def _labels(texts: Sequence[str]) -> dict[str, str]:
    labels = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise InvalidInput(f"--label {text!r} is no label; write for example moorage.netgroups=front")
        labels[key] = value
    return labels


def _require_program(command: Sequence[str], path: str) -> None:
    if command and shutil.which(command[0], path=path) is None:
        raise InvalidInput(
            f"there is no program {command[0]!r} on this machine, whose programs the lab uses; install it"
        )


@contextlib.contextmanager
def _unwound_by_signals() -> Iterator[None]:
    """What ends this command unwinds it like an error, so that it cleans up."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, lambda number, _: sys.exit(BEHIND_SIGNAL + number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress(parts: int) -> Iterator[Callable[[str], None]]:
    """A line that says what is being started; nothing where nobody watches."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as line:
        shown = line.add_task("", total=parts)
        begun = 0

        def progress(part: str) -> None:
            nonlocal begun
            line.update(shown, description=part, completed=begun)
            begun += 1

        yield progress
