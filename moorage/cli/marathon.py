"""``moorage marathon``: what Marathon knows against what is assigned."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
import msgspec

from ipam import keys
from ipam.errors import NotFound
from ipam.store.base import Store, read_prefix
from moorage import config, log
from moorage.cli.output import Column, age, print_table, words
from moorage.cli.session import Session, pass_session
from moorage.notify import READY, STOPPING, notify

if TYPE_CHECKING:
    from marathon.client import Marathon
    from marathon.mesos import Master
    from marathon.reconcile import Timing

F = TypeVar("F", bound=Callable[..., Any])

GRACE, INTERVAL, GONE_AFTER = 30.0, 5.0, 60.0
"""Seconds, as marathon/reconcile.py has them; that is imported only when it is needed."""

ORDER = ("orphan", "stale", "gone", "unknown", "unreachable", "facts missing")
"""Verdicts as they are listed, the most pressing first."""


@click.group("marathon", short_help="Marathon's tasks against addresses.")
def marathon() -> None:
    """Marathon: find addresses whose tasks are over, and have them verified and released.

    \b
    Examples:
      moorage marathon listen --url http://192.0.2.10:8080 --mesos-master http://192.0.2.10:5050
      moorage marathon status
    """


@dataclass(frozen=True, slots=True)
class Asked:
    """Who is to be asked, and how."""

    url: Sequence[str]
    user: Path | None
    token_file: Path | None
    ca: Path | None
    mesos_master: Sequence[str]
    mesos_user: Path | None
    mesos_token_file: Path | None
    mesos_ca: Path | None
    grace: float
    interval: float
    gone_after: float
    keep_alive: float

    def clients(self) -> tuple[Marathon, Master | None, Timing]:
        """Raises InvalidInput naming a URL or file that cannot be used."""
        from marathon.client import Marathon
        from marathon.http import Access
        from marathon.mesos import Master
        from marathon.reconcile import Timing

        access = Access(self.user, self.token_file, self.ca)
        access.headers("Marathon")
        marathon = Marathon(self.url, access, keep_alive=self.keep_alive)
        master = None
        if self.mesos_master:
            access = Access(self.mesos_user, self.mesos_token_file, self.mesos_ca)
            access.headers("the Mesos master")
            master = Master(self.mesos_master, access)
        return marathon, master, Timing(self.grace, self.interval, self.gone_after)


def _file(name: str, text: str) -> Callable[[F], F]:
    return click.option(
        name, metavar="FILE", type=click.Path(path_type=Path, dir_okay=False, exists=True), help=text
    )


def asking(command: F) -> F:
    """The options that say whom to ask, gathered into one Asked."""

    @functools.wraps(command)
    def gathered(*args: Any, **kwargs: Any) -> Any:
        asked = Asked(**{name: kwargs.pop(name) for name in Asked.__dataclass_fields__})
        return command(*args, asked, **kwargs)

    wrapped: Any = gathered
    for option in reversed(
        (
            click.option("--url", metavar="URL", multiple=True, required=True, help="Marathon; repeatable."),
            _file("--user", "One line user:password for Marathon, mode 0600.  [default: none]"),
            _file("--token-file", "A token for Marathon, mode 0600.  [default: none]"),
            _file(
                "--ca", "PEM of the authority that signed Marathon's certificate.  [default: the system's]"
            ),
            click.option(
                "--mesos-master",
                metavar="URL",
                multiple=True,
                help="Asked which nodes are gone; repeatable.  [default: none is asked]",
            ),
            _file("--mesos-user", "One line user:password for the master, mode 0600.  [default: none]"),
            _file("--mesos-token-file", "A token for the master, mode 0600.  [default: none]"),
            _file("--mesos-ca", "PEM for the master's certificate.  [default: the system's]"),
            click.option(
                "--grace",
                metavar="SECONDS",
                type=click.FloatRange(0),
                default=GRACE,
                help="From the first suspicion to the question to the node's agent.",
            ),
            click.option(
                "--interval",
                metavar="SECONDS",
                type=click.FloatRange(1),
                default=INTERVAL,
                help="Between looks at everything; longer in clusters of more than 10,000 containers.",
            ),
            click.option(
                "--gone-after",
                metavar="SECONDS",
                type=click.FloatRange(0),
                default=GONE_AFTER,
                help="For which a node's agent has to be away until Mesos is believed that the node is gone.",
            ),
            click.option(
                "--keep-alive",
                metavar="SECONDS",
                type=click.FloatRange(0.1),
                default=10.0,
                help="Between blank lines on Marathon's silent event stream; after three missing ones it is dead.",
            ),
        )
    ):
        wrapped = option(wrapped)
    return cast("F", wrapped)


@marathon.command(short_help="Follow Marathon and have stale addresses released.")
@asking
@click.option("--log-level", metavar="LEVEL", help=f"{', '.join(config.LOG_LEVELS)}.  [default: info]")
@click.option("--log-format", metavar="FORMAT", help=f"{', '.join(config.LOG_FORMATS)}.  [default: console]")
@pass_session
def listen(session: Session, asked: Asked, log_level: str | None, log_format: str | None) -> None:
    """Follow Marathon and have stale addresses verified and released, until SIGTERM or SIGINT.

    Run two for each Marathon: one leads, the other takes over within 10 seconds.

    \b
    Examples:
      moorage marathon listen --url http://192.0.2.10:8080 --mesos-master http://192.0.2.10:5050
      moorage marathon listen --url https://m1:8443 --url https://m2:8443 --user /etc/moorage/marathon
    """
    debug = click.get_current_context().find_root().params.get("debug")
    log.configure("debug" if debug else log_level or "info", log_format or "console")
    marathon, master, timing = asked.clients()

    async def act(store: Store) -> None:
        from marathon.listener import Listener

        ending = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, ending.set)
        listening = asyncio.create_task(Listener(store, marathon, master, timing).run())
        ended = asyncio.create_task(ending.wait())
        notify(READY)
        await asyncio.wait({listening, ended}, return_when=asyncio.FIRST_COMPLETED)
        notify(STOPPING)
        ended.cancel()
        listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listening

    session.run(act)


@marathon.command(short_help="Look at everything once.")
@asking
@click.option("--dry-run", is_flag=True, help="Print what would be done and why; change nothing.")
@pass_session
def reconcile(session: Session, asked: Asked, dry_run: bool) -> None:
    """Look at everything once, wait for the grace, and have what is stale verified and released.

    Nodes that Mesos calls gone are waited for as well (--gone-after). Refused while a listener leads, but for
    --dry-run.

    \b
    Examples:
      moorage marathon reconcile --url http://192.0.2.10:8080 --dry-run
      moorage marathon reconcile --url http://192.0.2.10:8080 --grace 10
    """
    marathon, master, timing = asked.clients()

    async def act(store: Store) -> dict[str, Any]:
        from marathon import once

        return await (once.look if dry_run else once.reconcile)(store, marathon, master, timing)

    report = session.run(act)
    if session.out.as_json:
        session.out.record({"dry_run": dry_run, **report})
        return
    print_findings(report, ORDER)
    print_nodes(report)
    done = ", ".join(f"{count} {what}" for what, count in report["done"].items())
    click.echo(f"{counted(report['counts'])}" + (f"; done: {done}" if done else ""))
    if dry_run and report["counts"]["stale"]:
        click.echo(
            "stale ones would be verified by their nodes' agents after the grace, and released if unused"
        )


@marathon.command(short_help="Show how the listeners are.")
@pass_session
def status(session: Session) -> None:
    """Show how the listeners are: phase, lag, the last pass, addresses by verdict, orphans with evidence.

    Exit 1 if none leads.

    \b
    Example:
      moorage marathon status -o json
    """

    async def act(store: Store) -> list[dict[str, Any]]:
        leaders, _ = await read_prefix(store, keys.LEADERS)
        states = {kv.key: kv.value for kv in (await read_prefix(store, keys.LISTENERS))[0]}
        found = []
        for kv in leaders:
            framework = kv.key.removeprefix(keys.LEADERS)
            raw = states.get(keys.LISTENERS + framework)
            state = msgspec.json.decode(raw, type=dict[str, Any]) if raw is not None else {}
            leader = msgspec.json.decode(kv.value, type=dict[str, Any])
            found.append({"framework": framework, "phase": "connect", **leader, **state})
        return found

    found = session.run(act)
    if not found:
        raise NotFound("no listener leads; start one with `moorage marathon listen --url URL`")
    if session.out.as_json:
        session.out.rows(found, [], none="")
        return
    for state in found:
        print_state(state)


def print_state(state: Mapping[str, Any]) -> None:
    """One listener, for people."""
    stream = state.get("stream", {})
    last = state.get("last_pass", {})
    lines = {
        "framework": words(state["framework"]),
        "phase": words(state["phase"]),
        "listener": f"{words(state.get('where'))}, leads for {age(state.get('since'))}",
        "marathon": words(state.get("url")),
        "stream": (
            f"open, {stream.get('events', 0)} events, lag {stream.get('lag_seconds', 0)} s"
            if stream.get("open")
            else words(stream.get("problem"))
        ),
        "last pass": (
            f"{age(last['at'])} ago, {last['addresses']} addresses, {words(last['tasks'])} tasks, {last['seconds']} s"
            if last
            else "-"
        ),
        "addresses": counted(state.get("counts", {})),
        "done": words(state.get("done")),
    }
    width = max(len(name) for name in lines)
    for name, text in lines.items():
        click.echo(f"{name:<{width}}  {text}")
    for what, why in state.get("missing", {}).items():
        click.echo(f"missing: {words(what)}: {words(why)}")
    for why in state.get("refused_labels", {}).values():
        click.echo(f"labels: {words(why)}")
    print_nodes(state)
    print_findings(state, ("orphan", "stale", "gone", "unknown"))


def print_nodes(report: Mapping[str, Any]) -> None:
    """A line for each node that Mesos calls gone."""
    for node in report.get("gone", []):
        left = max(0, round(node.get("left", 0.0)))
        what = (
            f"is freed in {left} s"
            if node["state"] == "gone"
            else f"is kept until its agent has been away for another {left} s"
        )
        click.echo(f"node {words(node['name'])} {what}: {words(node['why'])}")


def print_findings(report: Mapping[str, Any], verdicts: Sequence[str]) -> None:
    """A table of the addresses with these verdicts, with the evidence."""
    columns = [
        Column("address"),
        Column("verdict"),
        Column("node"),
        Column("app"),
        Column("task"),
        Column("why"),
    ]
    rows = [row for row in report.get("findings", []) if row["verdict"] in verdicts]
    rows.sort(key=lambda row: verdicts.index(row["verdict"]))
    if rows:
        print_table([c.title for c in columns], ([c.text(row) for c in columns] for row in rows))


def counted(counts: Mapping[str, int]) -> str:
    """``12 live, 1 stale``."""
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) or "none"
