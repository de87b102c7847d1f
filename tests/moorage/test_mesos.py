"""What is made of a Mesos agent's answers: whom to suspect, when, and whom never."""

from __future__ import annotations

from ipam.boottime import boottime
from isolator.model import Asked, Endpoint, EndpointKey, EndpointState
from marathon.mesos import AgentFacts
from moorage.mesos import GRACE, Suspicion


def endpoint(
    container: str, *, engine: str = "mesos", state: EndpointState = EndpointState.ATTACHED
) -> Endpoint:
    return Endpoint(
        key=EndpointKey(container, "eth0"),
        state=state,
        request_id="r",
        asked=Asked("boot", boottime()),
        engine=engine,
        network="web",
        driver="routed",
        netns="/run/netns/x",
        ips=(),
        host_ifname="mrg0",
        mac="02:00:00:00:00:01",
        mtu=1500,
    )


def facts(*running: str, over: tuple[str, ...] = ()) -> AgentFacts:
    return AgentFacts("S1", "h", {}, frozenset(running), frozenset(over))


def due(suspicion: Suspicion, endpoints: list[Endpoint], answer: AgentFacts, now: float) -> list[str]:
    return [e.key.container_id for e in suspicion.note(endpoints, answer, now)]


def test_a_container_that_is_not_known_is_looked_at_when_the_grace_is_over() -> None:
    suspicion, both = Suspicion(), [endpoint("a"), endpoint("b")]
    assert due(suspicion, both, facts("a"), 100.0) == []
    assert due(suspicion, both, facts("a"), 99.9 + GRACE) == []
    assert due(suspicion, both, facts("a"), 100.0 + GRACE) == ["b"]


def test_a_container_that_was_seen_in_between_has_its_grace_anew() -> None:
    suspicion, both = Suspicion(), [endpoint("a"), endpoint("b")]
    due(suspicion, both, facts("a"), 100.0)
    due(suspicion, both, facts("a", "b"), 110.0)
    assert due(suspicion, both, facts("a"), 100.0 + GRACE) == []


def test_an_answer_that_knows_none_of_ours_is_none() -> None:
    suspicion, both = Suspicion(), [endpoint("a"), endpoint("b")]
    due(suspicion, both, facts("another"), 100.0)
    assert due(suspicion, both, facts(), 1000.0) == []


def test_that_a_container_is_over_is_an_answer_also_when_it_was_the_last() -> None:
    suspicion = Suspicion()
    due(suspicion, [endpoint("a")], facts(over=("a",)), 100.0)
    assert due(suspicion, [endpoint("a")], facts(over=("a",)), 100.0 + GRACE) == ["a"]


def test_other_engines_and_what_is_on_its_way_are_left_alone() -> None:
    suspicion = Suspicion()
    others = [
        endpoint("a"),
        endpoint("b", engine="cni"),
        endpoint("c", state=EndpointState.ATTACHING),
        endpoint("d", state=EndpointState.DETACHING),
    ]
    due(suspicion, others, facts("a"), 100.0)
    assert due(suspicion, others, facts("a"), 1000.0) == []
