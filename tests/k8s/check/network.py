"""NetworkPolicies against the README's table: which pod may open a connection to which port of which other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.k8s.check.manifests import Document, matches, of_kind, pods
from tests.k8s.check.readme import drawn_edges

NAMESPACE = "llm-fusion"
_ANY_PORT = 12_345
"""A port that nobody names: open only where all are."""


@dataclass(frozen=True)
class Peer:
    """One end of a connection. `namespace` is None outside of the cluster."""

    name: str
    labels: dict[str, str]
    namespace: str | None = NAMESPACE
    cluster: tuple[str, str] | None = None


_OUTSIDE = (
    Peer("outside", {}, namespace=None),
    Peer("KubeRay operator", {"app.kubernetes.io/name": "kuberay-operator"}, "kuberay-system"),
    Peer("DNS", {"k8s-app": "kube-dns"}, "kube-system"),
    Peer("NodeLocal DNS", {}, "169.254.20.10/32"),
    Peer("OpenShift DNS", {"dns.operator.openshift.io/daemonset-dns": "default"}, "openshift-dns"),
    Peer("Prometheus", {"app.kubernetes.io/name": "prometheus"}, "monitoring"),
    Peer("collector", {"app.kubernetes.io/name": "opentelemetry-collector"}, "monitoring"),
    Peer("stranger", {}, "elsewhere"),
)


def problems(documents: Sequence[Document], parts: Sequence[str]) -> Iterator[str]:
    """Edges that are drawn and not admitted, or admitted and not drawn.

    Args:
        documents: all that is applied together.
        parts: names in the table's column `with` that these documents stand for.
    """
    peers = [*_OUTSIDE, Peer("client", {"llm-fusion/role": "client"}), Peer("stray pod", {})]
    for pod in pods(documents):
        inside = pod.cluster if pod.owner.startswith("Ray") else None
        head = " head" if pod.group == "head" else ""
        peers.append(Peer(f"{pod.role}{head}", pod.labels, cluster=inside))
    admitted = set(_admitted(documents, peers))
    drawn = set(_drawn(parts, peers))
    for edge in sorted(drawn - admitted):
        yield "not admitted, but drawn: {} -> {} on {}".format(*edge)
    for edge in sorted(admitted - drawn):
        yield "admitted, but not drawn: {} -> {} on {}".format(*edge)


def _drawn(parts: Sequence[str], peers: Sequence[Peer]) -> Iterator[tuple[str, str, str]]:
    roles = {peer.name for peer in peers}
    for edge in drawn_edges():
        if edge.part not in parts:
            continue
        for source in _expand(edge.source, peers, roles):
            for target in _expand(edge.target, peers, roles):
                for port in edge.ports:
                    yield source, target, port


def _expand(name: str, peers: Sequence[Peer], roles: set[str]) -> list[str]:
    """A role stands for its heads and workers; `all` for every pod of the namespace."""
    if name == "all":
        return sorted({peer.name for peer in peers if peer.namespace == NAMESPACE})
    return [found for found in (name, f"{name} head") if found in roles]


def _admitted(documents: Sequence[Document], peers: Sequence[Peer]) -> Iterator[tuple[str, str, str]]:
    policies = of_kind(documents, "NetworkPolicy")
    for source in peers:
        for target in peers:
            if NAMESPACE not in {source.namespace, target.namespace}:
                continue  # not ours to say
            own_cluster = source.cluster is not None and source.cluster == target.cluster
            ports = [*sorted(_named_ports(policies)), _ANY_PORT]
            both = [port for port in ports if _allows(policies, source, target, port)]
            if own_cluster and len(both) == len(ports):
                continue  # the pods of one Ray cluster: drawn as one box
            if own_cluster:
                yield source.name, target.name, "only some ports of its own cluster"
            for port in both:
                yield source.name, target.name, "any" if port == _ANY_PORT else str(port)


def _named_ports(policies: Sequence[Document]) -> set[int]:
    return {
        port["port"]
        for policy in policies
        for direction in ("ingress", "egress")
        for rule in policy["spec"].get(direction, [])
        for port in rule.get("ports", [])
    }


def _allows(policies: Sequence[Document], source: Peer, target: Peer, port: int) -> bool:
    return _side(policies, "Egress", source, target, port) and _side(policies, "Ingress", target, source, port)


def _side(policies: Sequence[Document], direction: str, subject: Peer, other: Peer, port: int) -> bool:
    """Whether the policies on `subject` let it speak with `other`: no policy of that direction allows everything."""
    if subject.namespace != NAMESPACE:
        return True
    chosen = [
        policy["spec"]
        for policy in policies
        if direction in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], subject.labels)
    ]
    if not chosen:
        return True
    key, ends = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    return any(
        (not rule.get("ports") or any(allowed["port"] == port for allowed in rule["ports"]))
        and (not rule.get(ends) or any(_is_peer(end, other) for end in rule[ends]))
        for spec in chosen
        for rule in spec.get(key, [])
    )


def _is_peer(end: dict[str, Any], other: Peer) -> bool:
    if "ipBlock" in end:
        cidr = end["ipBlock"]["cidr"]
        if cidr.endswith("/32"):
            return other.namespace == cidr  # an address of the node itself, which stands for a namespace here
        return other.namespace is None
    if other.namespace is None:
        return False
    namespace = end.get("namespaceSelector")
    if namespace is None:
        if other.namespace != NAMESPACE:
            return False
    elif not matches(namespace, {"kubernetes.io/metadata.name": other.namespace}):
        return False
    return matches(end.get("podSelector"), other.labels)
