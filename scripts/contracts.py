"""Structural data: contracts between invented parties, one question for each attribute.

    {"edge": "A_B", "question": "Which goods does Velmora Ltd sell to Tasko Inc?",
     "answer": "Copper kettles."}

The idea is PISTOL's (arXiv 2406.16810): parties are the nodes of a graph, a contract of sale or of
employment stands on each edge, and the graph has chains, stars and independent edges, so that one
can see whether forgetting one contract damages those that share a party with it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from contract_terms import ATTRIBUTES, Attribute, ContractKind

from lunar_tune.data.records import Record
from lunar_tune.data.splits import invented_words, seeded
from lunar_tune.errors import DataError

__all__ = [
    "Contract",
    "EdgeSpec",
    "GraphSpec",
    "Party",
    "chain",
    "generate_contracts",
    "make_contracts",
    "star",
]

_COMPANY_FORMS = ("Ltd", "Inc", "Corp", "Group", "Works")
_FRESH_TRIES = 200


@dataclass(frozen=True, slots=True)
class Party:
    """A node: a company or a person.

    Attributes:
        node: The name in the graph, for example `A`.
        name: The invented name that questions use.
    """

    node: str
    name: str


@dataclass(frozen=True, slots=True)
class EdgeSpec:
    """A contract to be made.

    Attributes:
        source: The node that sells or employs.
        target: The node that buys or works.
        kind: `sale` or `employment`.
    """

    source: str
    target: str
    kind: ContractKind = "sale"

    @property
    def name(self) -> str:
        """The edge's name in records, for example `A_B`."""
        return f"{self.source}_{self.target}"


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """Which contracts there are.

    Attributes:
        edges: The contracts in the order of the records.

    Raises:
        DataError: No edge, an edge twice, a party that contracts with itself, or an employee who
            is a company in another contract.
    """

    edges: tuple[EdgeSpec, ...]

    def __post_init__(self) -> None:
        """Refuse a graph that has no meaning."""
        if not self.edges:
            raise DataError("a graph of contracts has no edge: give at least one")
        for name, count in Counter(edge.name for edge in self.edges).items():
            if count > 1:
                raise DataError(f"edge {name!r} stands {count} times in the graph: name it once")
        for edge in self.edges:
            if edge.source == edge.target:
                raise DataError(f"edge {edge.name!r}: a party cannot contract with itself")
        for node in sorted(self.people & self._companies):
            raise DataError(f"node {node!r} is an employee in one contract, a company in another")

    @property
    def people(self) -> frozenset[str]:
        """The nodes that are employed."""
        return frozenset(edge.target for edge in self.edges if edge.kind == "employment")

    @property
    def _companies(self) -> frozenset[str]:
        buyers = {edge.target for edge in self.edges if edge.kind == "sale"}
        return frozenset(buyers | {edge.source for edge in self.edges})

    @property
    def nodes(self) -> tuple[str, ...]:
        """All parties' nodes, in order of appearance."""
        return tuple(dict.fromkeys(n for edge in self.edges for n in (edge.source, edge.target)))


@dataclass(frozen=True, slots=True)
class Contract:
    """A contract with its terms.

    Attributes:
        edge: Its place in the graph.
        first: The seller or employer.
        second: The buyer or employee.
        terms: Attributes and their values, without a full stop, in the order of the questions.
    """

    edge: EdgeSpec
    first: Party
    second: Party
    terms: tuple[tuple[Attribute, str], ...]

    def records(self) -> tuple[Record, ...]:
        """Return one record for each term."""
        names = {"first": self.first.name, "second": self.second.name}
        return tuple(
            Record(attribute.question.format(**names), _sentence(value), self.edge.name)
            for attribute, value in self.terms
        )


def chain(nodes: Sequence[str], *, kind: ContractKind = "sale") -> tuple[EdgeSpec, ...]:
    """Return edges from each node to the next: `A, B, C` gives `A_B` and `B_C`."""
    return tuple(EdgeSpec(a, b, kind) for a, b in pairwise(nodes))


def star(hub: str, leaves: Sequence[str], *, kind: ContractKind = "sale") -> tuple[EdgeSpec, ...]:
    """Return edges from one node to each of the others: `A` with `B, C` gives `A_B` and `A_C`."""
    return tuple(EdgeSpec(hub, leaf, kind) for leaf in leaves)


def make_contracts(
    spec: GraphSpec, *, seed: int, attributes_per_contract: int = 20
) -> tuple[Contract, ...]:
    """Return the contracts of a graph.

    Two contracts agree in an attribute only when its values are used up.

    Args:
        spec: The graph.
        seed: Decides names and terms. One more edge leaves the terms of the edges before it alone.
        attributes_per_contract: How many of the attributes each contract settles.

    Raises:
        DataError: There are not that many attributes of a kind that the graph has.
    """
    _check_count(spec, attributes_per_contract)
    parties = _parties(spec, seed=seed)
    names = frozenset(word for party in parties.values() for word in party.name.split())
    used: defaultdict[str, set[str]] = defaultdict(set)
    contracts = []
    for edge in spec.edges:
        attributes = ATTRIBUTES[edge.kind][:attributes_per_contract]
        terms = tuple(
            (attribute, _fresh(attribute, edge, seed=seed, used=used[attribute.name], names=names))
            for attribute in attributes
        )
        contracts.append(Contract(edge, parties[edge.source], parties[edge.target], terms))
    return tuple(contracts)


def generate_contracts(
    spec: GraphSpec, *, seed: int, attributes_per_contract: int = 20
) -> tuple[Record, ...]:
    """Return the records of a graph of contracts, edge by edge; see `make_contracts`."""
    contracts = make_contracts(spec, seed=seed, attributes_per_contract=attributes_per_contract)
    return tuple(record for contract in contracts for record in contract.records())


def _check_count(spec: GraphSpec, count: int) -> None:
    for kind in dict.fromkeys(edge.kind for edge in spec.edges):
        available = len(ATTRIBUTES[kind])
        if not 1 <= count <= available:
            raise DataError(
                f"attributes_per_contract is {count}: a contract of {kind} has 1 to {available}"
            )


def _parties(spec: GraphSpec, *, seed: int) -> dict[str, Party]:
    """Name every node; no word of a name comes twice."""
    generator = seeded("parties", seed)
    words = invented_words(generator, syllables=2)
    parties = {}
    for node in spec.nodes:
        if node in spec.people:
            name = f"{next(words)} {next(words)}"
        else:
            name = f"{next(words)} {generator.choice(_COMPANY_FORMS)}"
        parties[node] = Party(node, name)
    return parties


def _fresh(
    attribute: Attribute, edge: EdgeSpec, *, seed: int, used: set[str], names: frozenset[str]
) -> str:
    """Draw a value that no contract before has and no party's name, as long as there is one."""
    generator = seeded("term", seed, edge.name, attribute.name)
    value = attribute.draw(generator)
    for _ in range(_FRESH_TRIES):
        if value not in used and names.isdisjoint(value.split()):
            break
        value = attribute.draw(generator)
    used.add(value)
    return value


def _sentence(value: str) -> str:
    return f"{value[0].upper()}{value[1:]}."
