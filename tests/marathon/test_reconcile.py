"""What is judged live, stale, kept: by statements, and against a slow judge that is told the rules one by one."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from marathon.facts import CONDITIONS, Agents, Assigned, Condition, Facts, NodeFacts, Task, instance_of
from marathon.reconcile import (
    NODE,
    Judgement,
    Sighting,
    Sightings,
    Timing,
    Verdict,
    answered_kept,
    answers_for,
    called_gone,
    judge,
)

MINE = "framework-1"
WEB = "web.instance-00000000-0000-0000-0000-00000000000{}._app.1"
ALIVE = {"n1": NodeFacts("n1", "S1"), "n2": NodeFacts("n2", "S2")}
GRACE = 30.0
GONE_AFTER = 60.0
TIMING = Timing(GRACE, 5.0, GONE_AFTER)
LONG_AGO = -1000.0


def address(number: int = 1, **fields: Any) -> Assigned:
    task = fields.get("task", WEB.format(number))
    known: dict[str, Any] = {
        "state": "assigned",
        "node": "n1",
        "id": f"assignment-{number}",
        "engine": "mesos",
        "framework": MINE,
        "task": task,
        "ip": f"10.64.0.{number}",
        "revision": number,
        "instance": instance_of(task),
    }
    return Assigned(**{**known, **fields})


def tasks(*running: int, **others: str) -> dict[str, Task]:
    states = {WEB.format(number): "TASK_RUNNING" for number in running}
    states |= {WEB.format(name.removeprefix("t")): state for name, state in others.items()}
    return {instance_of(id_): Task(id_, "/web", state, "S1") for id_, state in states.items()}


def facts(listed: dict[str, Task] | None, **fields: Any) -> Facts:
    return Facts(MINE, listed, **{"nodes": ALIVE, **fields})


def judged(
    assigned: list[Assigned], known: Facts, sightings: Sightings | None = None, now: float = 100.0
) -> Judgement:
    return judge(
        assigned,
        known,
        sightings or {},
        now,
        TIMING,
        answered=answers_for(assigned, known),
        called_gone=called_gone(assigned, known),
    )


def test_an_address_whose_task_runs_is_live() -> None:
    found = judged([address(1)], facts(tasks(1)))
    assert found.counts == {Verdict.LIVE: 1}
    assert (found.findings, found.verify, found.sightings) == ([], [], {})


def test_an_address_whose_task_marathon_does_not_know_is_verified_when_the_grace_is_over() -> None:
    both, known = [address(1), address(2)], facts(tasks(1))
    first = judged(both, known, now=100.0)
    assert [f.address.ip for f in first.findings] == ["10.64.0.2"]
    assert (first.verify, first.next_due) == ([], 130.0)
    almost = judged(both, known, first.sightings, now=129.9)
    assert almost.verify == []
    due = judged(both, known, almost.sightings, now=130.0)
    assert [f.address.ip for f in due.verify] == ["10.64.0.2"]
    assert "Marathon does not know its task" in due.verify[0].why


def test_the_grace_begins_anew_when_the_task_was_seen_in_between() -> None:
    both = [address(1), address(2)]
    first = judged(both, facts(tasks(1)), now=100.0)
    seen = judged(both, facts(tasks(1, 2)), first.sightings, now=120.0)
    assert seen.sightings == {}
    assert judged(both, facts(tasks(1)), seen.sightings, now=135.0).verify == []


def test_the_grace_of_an_earlier_assignment_is_not_that_of_the_next_one() -> None:
    sightings = {("10.64.0.2", "an earlier one"): Sighting(0.0, 30.0)}
    assert judged([address(1), address(2)], facts(tasks(1)), sightings).verify == []


def test_a_list_that_names_none_of_our_tasks_is_no_list() -> None:
    found = judged([address(1), address(2)], facts({}))
    assert found.counts == {Verdict.MISSING: 2}
    assert found.sightings == {}


def test_what_the_event_stream_told_is_no_silence() -> None:
    over = {instance_of(WEB.format(1)): Condition.ENDED}
    found = judged([address(1), address(2)], facts({}, ended=over))
    assert found.counts == {Verdict.STALE: 1, Verdict.MISSING: 1}


def test_without_a_list_nothing_is_suspected() -> None:
    assert judged([address(1)], facts(None)).counts == {Verdict.MISSING: 1}


def test_silence_about_another_frameworks_task_says_nothing() -> None:
    assert (
        judged([address(1), address(2, framework="framework-2")], facts(tasks(1))).counts[Verdict.OTHER] == 1
    )
    assert judged([address(1), address(2, engine="cni")], facts(tasks(1))).counts[Verdict.OTHER] == 1


def test_an_address_that_nobody_told_about_is_kept() -> None:
    found = judged([address(1), address(2, framework="", task="", instance="")], facts(tasks(1)))
    assert found.counts == {Verdict.LIVE: 1, Verdict.MISSING: 1}


def test_an_unreachable_task_keeps_its_address() -> None:
    found = judged([address(1), address(2)], facts(tasks(1, t2="TASK_UNREACHABLE")))
    assert found.counts == {Verdict.LIVE: 1, Verdict.UNREACHABLE: 1}


def test_task_lost_may_mean_anything_and_keeps_its_address() -> None:
    for state in ("TASK_LOST", "TASK_UNKNOWN", "TASK_OF_THE_FUTURE"):
        assert judged([address(1), address(2)], facts(tasks(1, t2=state))).counts[Verdict.UNKNOWN] == 1


def test_a_node_whose_agent_does_not_run_is_not_asked_and_its_addresses_are_kept() -> None:
    known = facts(tasks(1), nodes={**ALIVE, "n2": NodeFacts("n2", "S2", LONG_AGO)})
    first = judged([address(1), address(2, node="n2")], known)
    late = judged([address(1), address(2, node="n2")], known, first.sightings, now=1000.0)
    assert (late.counts[Verdict.UNREACHABLE], late.verify, late.remove) == (1, [], [])
    back = judged([address(1), address(2, node="n2")], facts(tasks(1)), late.sightings, now=1001.0)
    assert [f.address.ip for f in back.verify] == ["10.64.0.2"]


def test_an_orphan_is_reported_with_what_its_agent_said_and_asked_about_again_later() -> None:
    both, known = [address(1), address(2)], facts(tasks(1))
    sighting = answered_kept(Sighting(0.0, 30.0), "process 7 lives on it", now=100.0, retry=60.0)
    found = judged(both, known, {both[1].key: sighting}, now=159.0)
    assert (found.counts[Verdict.ORPHAN], found.verify) == (1, [])
    assert "process 7 lives on it" in found.findings[0].why
    assert len(judged(both, known, found.sightings, now=160.0).verify) == 1


def gone(node: NodeFacts, **fields: Any) -> set[str]:
    known = facts({}, nodes={"n2": node}, **fields)
    return set(called_gone([address(1, node="n2")], known))


DEAD = NodeFacts("n2", "S2", LONG_AGO)


def test_a_node_is_gone_when_the_masters_registry_says_so() -> None:
    assert gone(DEAD, agents=Agents(gone=frozenset({"S2"}))) == {"n2"}


def test_a_node_is_gone_when_an_operator_said_so() -> None:
    assert gone(DEAD, expelled=frozenset({"S2"})) == {"n2"}


def test_one_task_that_is_gone_does_not_make_its_node_gone() -> None:
    said = frozenset({"S2"})
    assert gone(DEAD, reported_gone=said) == set()
    assert gone(DEAD, reported_gone=said, agents=Agents(present=said)) == set()
    assert gone(DEAD, reported_gone=said, agents=Agents(unreachable=said)) == set()
    assert gone(DEAD, reported_gone=said, agents=Agents(present=frozenset({"S9"}))) == {"n2"}


def test_an_agent_that_is_in_no_list_may_be_anything() -> None:
    assert gone(DEAD, agents=Agents(present=frozenset({"S1"}))) == set()


def test_a_node_whose_agent_of_ours_lives_is_never_gone() -> None:
    alive = NodeFacts("n2", "S2")
    assert gone(alive, agents=Agents(gone=frozenset({"S2"}))) == set()


def test_a_node_of_which_nobody_told_its_mesos_agent_is_never_gone() -> None:
    assert gone(NodeFacts("n2", "", LONG_AGO), agents=Agents(gone=frozenset({"", "S2"}))) == set()


def test_mesos_knows_nothing_of_a_node_that_has_another_engines_addresses() -> None:
    known = facts({}, nodes={"n2": DEAD}, agents=Agents(gone=frozenset({"S2"})))
    assert set(called_gone([address(1, node="n2"), address(2, node="n2", engine="cni")], known)) == set()


def test_a_gone_node_takes_containers_with_it_that_its_mesos_agent_had_by_another_protocol() -> None:
    known = facts({}, nodes={"n2": DEAD}, agents=Agents(gone=frozenset({"S2"})))
    mixed = [address(1, node="n2"), address(2, node="n2", engine="mesos-netmodules")]
    assert set(called_gone(mixed, known)) == {"n2"}


def test_a_gone_node_is_freed_when_the_grace_is_over() -> None:
    known = facts(tasks(1), nodes={**ALIVE, "n2": DEAD}, agents=Agents(gone=frozenset({"S2"})))
    both = [address(1), address(2, node="n2")]
    first = judged(both, known, now=100.0)
    assert (first.counts[Verdict.GONE], first.remove) == (1, [])
    due = judged(both, known, first.sightings, now=130.0)
    assert [node.name for node in due.remove] == ["n2"]
    assert "registry" in due.remove[0].why


def without_agent(since: float | None) -> Facts:
    """n2 is called gone, and its agent is away since then."""
    nodes = {**ALIVE, "n2": NodeFacts("n2", "S2", since, revision=7)}
    return facts(tasks(1, 2), nodes=nodes, agents=Agents(gone=frozenset({"S2"})))


def test_a_node_is_not_gone_before_its_agent_was_away_for_long_enough() -> None:
    both = [address(1), address(2, node="n2")]
    doubted = judged(both, without_agent(100.0), now=159.9)
    assert (doubted.counts[Verdict.LIVE], doubted.gone, doubted.next_due) == (2, [], 160.0)
    assert [(node.name, node.due, node.revision) for node in doubted.doubted] == [("n2", 160.0, 7)]
    gone = judged(both, without_agent(100.0), doubted.sightings, now=160.0)
    assert (gone.counts[Verdict.GONE], gone.doubted, gone.remove, gone.next_due) == (1, [], [], 190.0)
    assert len(judged(both, without_agent(100.0), gone.sightings, now=190.0).remove) == 1


def test_an_agent_that_was_back_for_a_moment_has_to_be_away_for_as_long_again() -> None:
    both = [address(1), address(2, node="n2")]
    gone = judged(both, without_agent(100.0), now=185.0)
    again = judged(both, without_agent(187.0), gone.sightings, now=190.0)
    assert (again.gone, again.remove, [node.due for node in again.doubted]) == ([], [], [247.0])
    # Nobody looked in between, and what was seen then is of another absence.
    anew = judged(both, without_agent(187.0), gone.sightings, now=250.0)
    assert (anew.counts[Verdict.GONE], anew.remove, anew.next_due) == (1, [], 280.0)


# -- against a slow judge

FRAMEWORKS = st.sampled_from([MINE, "framework-2", ""])
NOW = 110.0
NODES = st.builds(
    lambda away, agents: {
        f"n{i}": NodeFacts(f"n{i}", agent, since)
        for i, (since, agent) in enumerate(zip(away, agents, strict=True))
    },
    st.lists(st.sampled_from([None, None, 0.0, 10.0, 50.0, 50.1, 100.0]), min_size=3, max_size=3),
    st.lists(st.sampled_from(["S0", "S1", "S2", ""]), min_size=3, max_size=3),
)
AGENTS = st.one_of(
    st.none(),
    st.builds(
        Agents,
        *(st.frozensets(st.sampled_from(["S0", "S1", "S2"])) for _ in range(3)),
    ),
)
SUBJECTS = st.lists(
    st.builds(
        lambda number, node, framework, engine: address(
            number, node=node, framework=framework, engine=engine
        ),
        st.integers(1, 8),
        st.sampled_from(["n0", "n1", "n2", "n3"]),
        FRAMEWORKS,
        st.sampled_from(["mesos", "mesos", "mesos", "cni"]),
    ),
    unique_by=lambda a: a.ip,
    max_size=8,
)
LISTS = st.one_of(
    st.none(),
    st.dictionaries(st.integers(1, 8), st.sampled_from(sorted(CONDITIONS)), max_size=8).map(
        lambda states: tasks(**{f"t{number}": state for number, state in states.items()})
    ),
)
ENDED = st.dictionaries(
    st.integers(1, 8).map(lambda n: instance_of(WEB.format(n))),
    st.sampled_from([Condition.ENDED, Condition.GONE, Condition.EXPELLED]),
    max_size=3,
)
IDS = st.frozensets(st.sampled_from(["S0", "S1", "S2"]))
SIGHTED = st.dictionaries(st.integers(1, 8), st.sampled_from([0.0, 80.0, 100.0]))
NODES_SIGHTED = st.dictionaries(
    st.sampled_from(["n0", "n1", "n2"]), st.sampled_from([0.0, 60.0, 80.0, 100.0])
)


def is_gone(name: str, everything: list[Assigned], known: Facts) -> bool:
    """Whether all of what makes a node gone holds, asked one by one."""
    node = known.nodes.get(name)
    if node is None or node.away_since is None or node.mesos_agent == "":
        return False
    if NOW - node.away_since < GONE_AFTER:
        return False
    if any(a.node == name and a.engine != "mesos" for a in everything):
        return False
    agent, master = node.mesos_agent, known.agents
    return (
        agent in known.expelled
        or (master is not None and agent in master.gone)
        or (
            master is not None
            and agent in known.reported_gone
            and agent not in master.present
            and agent not in master.unreachable
        )
    )


def slow_verdict(subject: Assigned, everything: list[Assigned], known: Facts) -> Verdict:
    """The rules of docs/design.md, section 10, in the order in which a person would ask."""
    if is_gone(subject.node, everything, known):
        return Verdict.GONE
    if subject.engine != "mesos":
        return Verdict.OTHER
    if subject.framework == "":
        return Verdict.MISSING
    if subject.framework != MINE:
        return Verdict.OTHER
    over = subject.instance in known.ended
    if not over:
        listed = None if known.tasks is None else known.tasks.get(subject.instance)
        if listed is not None:
            by_state = {
                "TASK_STAGING": Verdict.LIVE,
                "TASK_STARTING": Verdict.LIVE,
                "TASK_RUNNING": Verdict.LIVE,
                "TASK_KILLING": Verdict.LIVE,
                "TASK_UNREACHABLE": Verdict.UNREACHABLE,
                "TASK_UNKNOWN": Verdict.UNKNOWN,
                "TASK_LOST": Verdict.UNKNOWN,
            }
            if listed.state in by_state:
                return by_state[listed.state]
        elif known.tasks is None or not any(
            a.framework == MINE and a.instance in known.tasks for a in everything
        ):
            return Verdict.MISSING
    node = known.nodes.get(subject.node)
    return Verdict.STALE if node is not None and node.alive else Verdict.UNREACHABLE


@settings(max_examples=500, deadline=None)
@given(SUBJECTS, LISTS, NODES, ENDED, IDS, IDS, AGENTS, SIGHTED, NODES_SIGHTED)
def test_verdicts_are_those_of_a_judge_that_is_told_the_rules(
    subjects: list[Assigned],
    listed: dict[str, Task] | None,
    nodes: dict[str, NodeFacts],
    ended: dict[str, Condition],
    reported: frozenset[str],
    expelled: frozenset[str],
    agents: Agents | None,
    sighted: dict[int, float],
    nodes_sighted: dict[str, float],
) -> None:
    known = Facts(MINE, listed, nodes, ended, reported, expelled, agents)
    sightings = {
        (f"10.64.0.{n}", f"assignment-{n}"): Sighting(first, first + GRACE) for n, first in sighted.items()
    }
    sightings |= {(NODE, name): Sighting(first, first + GRACE) for name, first in nodes_sighted.items()}
    found = judged(subjects, known, sightings, NOW)
    wanted = {a.ip: slow_verdict(a, subjects, known) for a in subjects}

    told = {f.address.ip: f.verdict for f in found.findings}
    assert told == {ip: v for ip, v in wanted.items() if v not in (Verdict.LIVE, Verdict.OTHER)}
    assert sum(found.counts.values()) == len(subjects)
    assert {f.address.ip for f in found.verify} == {
        a.ip
        for a in subjects
        if wanted[a.ip] is Verdict.STALE and a.key in sightings and NOW - sightings[a.key].first >= GRACE
    }
    assert {node.name for node in found.remove} == {
        name
        for name, first in nodes_sighted.items()
        if is_gone(name, subjects, known)
        and first - (nodes[name].away_since or 0.0) >= GONE_AFTER
        and NOW - first >= GRACE
    }
    assert {key[1] for key in found.sightings if key[0] == NODE} == {
        name for name in nodes if is_gone(name, subjects, known)
    }
    # Only what is suspected is remembered, and since when does not change.
    for a in subjects:
        if a.key in found.sightings and a.key in sightings:
            assert found.sightings[a.key] == sightings[a.key]


# -- a node over time

PASSES = st.lists(
    st.tuples(
        st.sampled_from([1.0, 7.0, 20.0, 45.0]), st.booleans(), st.sampled_from([True, True, True, False])
    ),
    max_size=25,
)
"""Of each pass: seconds since the one before, whether the node's agent ran in between, whether Mesos calls it gone."""


@settings(max_examples=500, deadline=None)
@given(PASSES)
def test_a_node_is_freed_only_after_an_absence_and_a_grace_without_a_break(
    passes: list[tuple[float, bool, bool]],
) -> None:
    now, away_since = 0.0, 0.0
    sightings: Sightings = {}
    gone_at: list[float] = []
    for pause, returned, called in passes:
        if returned:
            away_since, gone_at = now + pause / 2, []
        now += pause
        known = (
            without_agent(away_since) if called else facts(tasks(1, 2), nodes=without_agent(away_since).nodes)
        )
        found = judged([address(1), address(2, node="n2")], known, sightings, now)
        sightings = found.sightings
        # All moments since the absence began in which one could have known, back to the last in which one could not.
        gone_at = [*gone_at, now] if called and now - away_since >= GONE_AFTER else []
        assert bool(found.remove) == bool(gone_at and now - gone_at[0] >= GRACE)
