"""The names of engines that are treated in a way of their own, as they stand in endpoints and address records."""

MESOS = "mesos"
"""A Mesos agent, through CNI."""

NET_MODULES = "mesos-netmodules"
"""A Mesos agent, through an isolator module of the net-modules project."""
