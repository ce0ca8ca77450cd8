"""Dopants for a host crystal: three recommenders, asked in turn until every place is filled.

1. *hautier*: probability that one ion replaces another, mined from the ICSD
   (Hautier et al., Inorg. Chem. 50, 656 (2011), doi:10.1021/ic102031h).
2. *shannon*: ions of the same coordination whose radius differs by at most 30 % and whose charge differs by one
   (Goldschmidt's rules, with the radii of Shannon, Acta Cryst. A 32, 751 (1976)).
3. *group*: elements with one or two valence electrons more or fewer, closest in size and electronegativity
   (Darken & Gurry, Physical Chemistry of Metals (1953)). It needs no oxidation states, so it also serves silicon.

The first two compare ions and are skipped for elements whose oxidation state is unknown, zero or fractional.
Vacancies are never recommended, only asked for.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import hypot
from typing import Any, Literal

import spglib
from ase.data import covalent_radii
from pymatgen.analysis.bond_valence import BVAnalyzer
from pymatgen.analysis.local_env import CrystalNN
from pymatgen.analysis.structure_prediction.substitution_probability import SubstitutionProbability
from pymatgen.core import Composition, Element, Species, Structure

from defectnet.config import Dopants
from defectnet.elements import VACANCY
from defectnet.errors import InputError

Kind = Literal["n", "p", "isovalent"]
Recommender = Literal["user", "hautier", "shannon", "group"]

KINDS: tuple[Kind, ...] = ("n", "p", "isovalent")
RECOMMENDERS: tuple[Recommender, ...] = ("user", "hautier", "shannon", "group")

RADIUS_MISMATCH_MAX = 0.30
"""Largest relative difference of Shannon radii; beyond it Goldschmidt's rules expect no substitution."""

_SYMPREC_A = 1e-3
_ROMAN = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII", "XIII", "XIV")


@dataclass(frozen=True)
class Candidate:
    """A dopant, or a vacancy, and the host element whose sites it takes.

    kind  : "n" brings electrons, "p" takes electrons, "isovalent" does neither, judged by the charges of the ions
            (hautier, shannon) or the number of valence electrons (group, user); a vacancy does what the charge of
            the missing ion asks for.
    score : larger is better, comparable within one recommender only. hautier: conditional probability;
            shannon: 1 - |Δr| / r; group: 1 / (1 + |Δ valence| + D² / (1 + D²)), D the Darken-Gurry distance; user: 1.
    """

    dopant: str
    replaces: str
    kind: Kind
    recommender: Recommender
    score: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Candidate:
        """Inverse of :meth:`to_dict`. Raises ``TypeError`` for missing or unknown keys."""
        return cls(**values)


def recommend(structure: Structure, host_id: str, settings: Dopants, vocabulary: Collection[str]) -> list[Candidate]:
    """Dopants for one host: up to ``settings.n_type`` donors and ``settings.p_type`` acceptors.

    Recommended dopants are foreign elements of ``vocabulary``, each at most once (on its best sublattice), so that a
    concentration per element is an unambiguous label. Where donors or acceptors run out, isovalent elements fill the
    list up to ``n_type + p_type``; a host may still get fewer when the vocabulary is small.
    Vacancies on the elements of ``settings.vacancies`` come on top. An entry for ``host_id`` in
    ``settings.overrides`` replaces all of that; only there may a dopant be an element of another sublattice of the
    host (an antisite) or take several sublattices.

    Order: n, p, isovalent; within a kind hautier, shannon, group; then falling score, then symbol; vacancies last, by
    the missing element. Overrides go by replaced element, then as listed.

    Raises :class:`InputError` for an override that does not fit the host or the vocabulary.
    """
    symbols = [species.symbol for species in structure.species]
    if host_id in settings.overrides:
        return _overridden(host_id, settings, structure, vocabulary)

    ions = list(zip(symbols, oxidation_states(structure), strict=True))
    foreign = frozenset(vocabulary) - set(symbols)
    recommenders = (
        lambda: _hautier(set(ions), foreign, settings.probability_min),
        lambda: _shannon(structure, ions, foreign),
        lambda: _group(set(symbols), foreign),
    )
    empty = settings.may_be_empty(symbols)
    return [*_filled(recommenders, settings), *(_vacancy(symbol, dict(ions)) for symbol in empty)]


def _vacancy(symbol: str, states: Mapping[str, int]) -> Candidate:
    """A missing ``symbol``, by the oxidation ``states`` of the host: a cation that is missing takes electrons."""
    return Candidate(VACANCY, symbol, _kind(-states[symbol]), "user", 1.0)


def propose(formula: str, settings: Dopants, vocabulary: Collection[str]) -> list[Candidate]:
    """Dopants for a host of which only the formula is known, like those of :func:`recommend`.

    Oxidation states are the charge-neutral assignment that is most frequent in the ICSD; radii are not compared,
    because coordination is unknown. Raises :class:`InputError` for what is no formula.
    """
    try:
        composition = Composition(formula, strict=True)  # not strict, Xx would be a dummy element
    except ValueError as error:
        raise InputError(f"formula {formula!r}: {error}") from None
    symbols = {element.symbol for element in composition.elements}
    guesses = composition.reduced_composition.oxi_state_guesses() if len(symbols) > 1 else ()
    ions = {(symbol, _integer(state)) for symbol, state in (guesses[0] if guesses else {}).items()}
    foreign = frozenset(vocabulary) - symbols
    recommenders = lambda: _hautier(ions, foreign, settings.probability_min), lambda: _group(symbols, foreign)
    return _filled(recommenders, settings)


def _filled(recommenders: Sequence[Callable[[], Iterable[Candidate]]], settings: Dopants) -> list[Candidate]:
    """The best of each recommender in turn until every place is filled; the last one also gives isovalent ones."""
    accepted: dict[str, Candidate] = {}

    def shortage() -> dict[Kind, int]:
        have = Counter(candidate.kind for candidate in accepted.values())
        return {"n": settings.n_type - have["n"], "p": settings.p_type - have["p"]}

    def accept(candidates: Iterable[Candidate], wanted: Mapping[Kind, int]) -> None:
        best: dict[str, Candidate] = {}
        for candidate in sorted(candidates, key=_rank):
            if wanted.get(candidate.kind, 0) > 0 and candidate.dopant not in accepted:
                best.setdefault(candidate.dopant, candidate)
        for kind, number in wanted.items():
            of_kind = [candidate for candidate in best.values() if candidate.kind == kind]
            accepted.update((candidate.dopant, candidate) for candidate in of_kind[: max(number, 0)])

    for candidates in recommenders:
        if any(shortage().values()):
            accept(candidates(), shortage())
    accept(recommenders[-1](), {"isovalent": sum(shortage().values())})
    return sorted(accepted.values(), key=lambda c: (KINDS.index(c.kind), RECOMMENDERS.index(c.recommender), _rank(c)))


def oxidation_states(structure: Structure) -> list[int]:
    """Oxidation state of each of the N sites; 0 where it is unknown, zero or fractional.

    Sources, in this order: states that the structure carries; bond-valence analysis, which sees mixed valence
    (O'Keeffe & Brese, JACS 113, 3226 (1991)); the charge-neutral assignment of the composition that is most frequent
    in the ICSD. Elements, and compounds that none of them explains, get zeros.
    """
    if all(getattr(species, "oxi_state", None) is not None for species in structure.species):
        return [_integer(species.oxi_state) for species in structure.species]
    if len(structure.composition.elements) == 1:
        return [0] * len(structure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return [_integer(state) for state in BVAnalyzer().get_valences(structure)]
        except ValueError:  # an element without bond-valence parameters, or no neutral assignment
            guesses = structure.composition.reduced_composition.oxi_state_guesses()
    guess = guesses[0] if guesses else {}
    return [_integer(guess.get(species.symbol, 0.0)) for species in structure.species]


def _integer(state: float) -> int:
    """The oxidation state, or 0 if it is fractional: no table knows such ions."""
    return round(state) if abs(state - round(state)) < 1e-6 else 0


def _rank(candidate: Candidate) -> tuple[float, str, str, str]:
    return -candidate.score, candidate.dopant, candidate.replaces, candidate.kind


def _kind(change: int) -> Kind:
    """Kind of a dopant with ``change`` more valence electrons, or a charge higher by ``change``, than the host ion."""
    return "n" if change > 0 else "p" if change < 0 else "isovalent"


def _hautier(ions: Collection[tuple[str, int]], foreign: Collection[str], threshold: float) -> Iterator[Candidate]:
    """Ions of the same sign whose probability, given the host ion, reaches ``threshold``."""
    table = _substitution_probability()
    for symbol, state in ions:
        host = Species(symbol, state)
        if state == 0 or host not in table.species:
            continue
        for ion in table.species:
            if ion.symbol in foreign and ion.oxi_state * state > 0:
                probability = table.cond_prob(ion, host)
                if probability >= threshold:
                    yield Candidate(ion.symbol, symbol, _kind(ion.oxi_state - state), "hautier", float(probability))


@lru_cache(maxsize=1)
def _substitution_probability() -> SubstitutionProbability:
    """The published table of pair probabilities; reading it takes about a second."""
    return SubstitutionProbability()


def _shannon(structure: Structure, ions: Collection[tuple[str, int]], foreign: Collection[str]) -> Iterator[Candidate]:
    """Ions of the same coordination and sign, one charge unit and at most 30 % of the radius away."""
    environments = set()
    cell = (structure.lattice.matrix, structure.frac_coords, structure.atomic_numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        neighbours = CrystalNN()
        for site in set(spglib.get_symmetry_dataset(cell, symprec=_SYMPREC_A).equivalent_atoms.tolist()):
            if ions[site][1] != 0:
                environments.add((*ions[site], neighbours.get_cn(structure, site)))
    for symbol, state, coordination in environments:
        radii = _shannon_radii(coordination)
        host_radius = _shannon_radius(symbol, state, coordination)
        if host_radius is None:
            continue
        for (dopant, dopant_state), radius in radii.items():
            mismatch = abs(radius - host_radius) / host_radius
            allowed = abs(dopant_state - state) == 1 and dopant_state * state > 0 and mismatch <= RADIUS_MISMATCH_MAX
            if dopant in foreign and allowed:
                yield Candidate(dopant, symbol, _kind(dopant_state - state), "shannon", 1 - mismatch)


@lru_cache
def _shannon_radii(coordination: int) -> dict[tuple[str, int], float]:
    """Ionic radii in Å of all common ions that Shannon lists with this coordination number."""
    ions = ((element.symbol, state) for element in Element for state in element.common_oxidation_states)
    radii = {ion: _shannon_radius(*ion, coordination) for ion in ions}
    return {ion: radius for ion, radius in radii.items() if radius is not None}


def _shannon_radius(symbol: str, state: int, coordination: int) -> float | None:
    """Ionic radius in Å, or None where the table has none."""
    if not 1 <= coordination <= len(_ROMAN):
        return None
    with warnings.catch_warnings():  # pymatgen reports which spin state it took where there are several
        warnings.simplefilter("ignore")
        try:
            radius = Species(symbol, state).get_shannon_radius(_ROMAN[coordination - 1])
        except KeyError:
            return None
    return radius if radius > 0 else None  # H+ is listed with a negative radius


def _group(hosts: Collection[str], foreign: Collection[str]) -> Iterator[Candidate]:
    """Elements at most two valence electrons away from a host element, of every kind."""
    for host in hosts:
        for dopant in foreign:
            change = _valence_change(dopant, host)
            if change is not None and abs(change) <= 2:
                misfit = _darken_gurry(dopant, host) ** 2
                yield Candidate(dopant, host, _kind(change), "group", 1 / (1 + abs(change) + misfit / (1 + misfit)))


def _valence_change(dopant: str, host: str) -> int | None:
    """Valence electrons of the dopant minus those of the host; None where counting them means nothing.

    Among s and p elements, Cu, Zn and their groups count s and p electrons (Cu 1, Zn 2, Ga 3). Next to an element of
    groups 3-10 the d electrons count too (Ni 10, Cu 11), and s and p elements have no counterpart.
    """
    groups = [Element(symbol).group for symbol in (dopant, host)]
    if 18 in groups:
        return None
    if any(3 <= group <= 10 for group in groups):
        return groups[0] - groups[1] if all(3 <= group <= 12 for group in groups) else None
    electrons = [group if group <= 2 else group - 10 for group in groups]
    return electrons[0] - electrons[1]


def _darken_gurry(dopant: str, host: str) -> float:
    """Distance on the map of radius and electronegativity; 1 is the edge of the ellipse of extended solubility.

    The half-axes are 15 % of the radius and 0.4 Pauling units (Darken & Gurry); radii are covalent (Cordero et al.,
    Dalton Trans. 2008, 2832), in Å.
    """
    a, b = Element(dopant), Element(host)
    radius_a, radius_b = covalent_radii[a.Z], covalent_radii[b.Z]
    return hypot((radius_a - radius_b) / (0.15 * radius_b), (a.X - b.X) / 0.4)


def _overridden(host_id: str, settings: Dopants, structure: Structure, vocabulary: Collection[str]) -> list[Candidate]:
    """The user's own list for this host, by replaced element in alphabetical order."""
    symbols = [species.symbol for species in structure.species]
    candidates = []
    for replaced, dopants in sorted(settings.overrides[host_id].items()):
        path = f"dopants.overrides.{host_id}.{replaced}"
        if replaced not in symbols:
            raise InputError(f"{path}: {replaced} is not in the host; it contains {', '.join(sorted(set(symbols)))}")
        for dopant in dict.fromkeys(dopants):
            if dopant == VACANCY:
                states = dict(zip(symbols, oxidation_states(structure), strict=True))
                candidates.append(_vacancy(replaced, states))
                continue
            if dopant == replaced:
                raise InputError(f"{path}: {dopant} cannot replace itself; remove it from the list")
            if dopant not in vocabulary:
                raise InputError(f"{path}: {dopant} is outside the vocabulary; remove it or add it to hosts.vocabulary")
            candidates.append(Candidate(dopant, replaced, _user_kind(dopant, replaced), "user", 1.0))
    if not candidates:
        raise InputError(
            f"dopants.overrides.{host_id}: names no dopant; add one, or remove the entry to get recommendations"
        )
    return candidates


def _user_kind(dopant: str, replaced: str) -> Kind:
    """Kind by valence electrons; where they cannot be compared, by the dopant's common charge closest to the host's."""
    change = _valence_change(dopant, replaced)
    if change is None:
        charge = max(Element(replaced).common_oxidation_states, default=0)
        ion = min(Element(dopant).common_oxidation_states, key=lambda state: (abs(state - charge), state), default=0)
        change = ion - charge
    return _kind(change)
