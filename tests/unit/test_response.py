"""The network that asks per candidate: symmetries, limits, and that it learns."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from defectnet.config import Training
from defectnet.dataset.samples import Responses, Samples
from defectnet.models.response import (
    LEVELS,
    PROPERTIES,
    Question,
    ResponseNet,
    candidate_properties,
    response_within,
    within,
)
from defectnet.training import recipes
from defectnet.training.recipes import (
    ERROR_FLOORS,
    Hosts,
    Prediction,
    ResponseRecipe,
    blurred,
    compared,
    disturbed,
    interval_of,
    predict,
    present_candidates,
    stretched,
)

HOSTS, CANDIDATES, BINS = 12, 5, 60
DOPANTS = np.array([4, 12, 30, 32, 50])  # B, Al, Ga, As, Sb: indices Z - 1
SILICON = 13


def bump(center, width):
    return np.exp(-0.5 * ((np.arange(BINS) - center) / width) ** 2)


@pytest.fixture(scope="module")
def world():
    """Hosts whose spectra are sums of responses up to a little saturation: (samples, responses)."""
    rng = np.random.default_rng(0)
    pristine = np.array([bump(20, 8) + bump(rng.uniform(35, 45), 4) for _ in range(HOSTS)])
    pristine *= BINS / pristine.sum(axis=1, keepdims=True)
    response = np.array(
        [[30 * (bump(10 + 9 * k + shift, 3) - bump(30, 12) / 4) for k in range(CANDIDATES)]
         for shift in rng.uniform(-3, 3, HOSTS)]
    )  # fmt: skip
    response -= response.mean(axis=2, keepdims=True)
    masses = response * rng.uniform(0.5, 1.2, (HOSTS, CANDIDATES, 1))
    known = np.ones((HOSTS, CANDIDATES), bool)
    silicon = np.zeros((HOSTS, 56), np.float32)
    silicon[:, SILICON] = 1
    responses = Responses(
        elements=np.tile(DOPANTS, (HOSTS, 1)),
        replaced=np.full((HOSTS, CANDIDATES), SILICON),
        composition=silicon,
        pristine=pristine.astype(np.float32),
        library=response.astype(np.float32),
        mass_only=masses.astype(np.float32),
        knows_library=known,
        knows_mass=known,
        finite=response[:, None].astype(np.float32),
        scatter=np.zeros((HOSTS, 1, 2, BINS), np.float32),
    )
    host = np.repeat(np.arange(HOSTS), 40)
    amounts = rng.exponential(0.03, (len(host), CANDIDATES)) * (rng.random((len(host), CANDIDATES)) < 0.5)
    doped = pristine[host] + np.einsum("nk,nkb->nb", amounts / (1 + amounts), response[host])
    targets = np.zeros((len(host), 56), np.float32)
    targets[:, DOPANTS] = amounts
    asked = np.zeros((len(host), 56), bool)
    asked[:, DOPANTS] = True
    samples = Samples(
        row=np.arange(len(host)), host=host, pristine=pristine[host].astype(np.float32),
        doped=doped.astype(np.float32), composition=silicon[host], candidates=asked, targets=targets,
        relaxed=np.zeros(len(host), bool), fold=np.zeros(len(host), int), noise=np.zeros(len(host), np.float32),
    )  # fmt: skip
    return samples, responses


def random_question(seed=0):
    torch.manual_seed(seed)
    return Question(
        host=torch.tensor([0, 1, 1]),
        pristine=torch.rand(3, BINS),
        doped=torch.rand(3, BINS),
        measured=torch.ones(3, BINS).bool(),
        noise=torch.tensor([0.0, 0.01, 0.02]),
        mask=torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0]]).bool(),
        host_pristine=torch.rand(2, BINS),
        response=torch.randn(2, 4, BINS),
        scatter=0.1 * torch.randn(2, 3, BINS),
        level=torch.tensor([[0, 1, 0, 2], [1, 1, 0, 0]]),
        properties=torch.randn(2, 4, PROPERTIES),
    )


def shaken(bins=BINS):
    """A network none of whose parameters is zero."""
    torch.manual_seed(1)
    model = ResponseNet(bins)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def test_the_order_of_candidates_does_not_matter():
    model, question = shaken(), random_question()
    order = torch.tensor([2, 0, 3, 1])
    turned = replace(
        question,
        mask=question.mask[:, order],
        response=question.response[:, order],
        level=question.level[:, order],
        properties=question.properties[:, order],
    )
    one, other = model(question), model(turned)
    for name in ("concentration", "presence", "log_error", "unmixed"):
        torch.testing.assert_close(getattr(one, name)[:, order], getattr(other, name), rtol=1e-4, atol=1e-5)


def test_what_is_not_asked_has_no_influence():
    model, question = shaken(), random_question()
    masked = ~question.mask[question.host == 1].any(dim=0)  # of host 1 nobody asks about candidate 1
    assert masked.tolist() == [False, True, False, False]
    response, properties = question.response.clone(), question.properties.clone()
    response[1, 1], properties[1, 1] = 7.0, -3.0
    one, other = model(question), model(replace(question, response=response, properties=properties))
    torch.testing.assert_close(one.concentration, other.concentration)
    torch.testing.assert_close(one.presence, other.presence)
    assert (one.concentration[~question.mask] == 0).all()
    assert (one.concentration >= 0).all()


def test_one_spectrum_does_not_see_another():
    model, question = shaken(), random_question()
    whole = model(question).concentration
    alone = replace(
        question, host=question.host[1:2], pristine=question.pristine[1:2], doped=question.doped[1:2],
        measured=question.measured[1:2], noise=question.noise[1:2], mask=question.mask[1:2],
    )  # fmt: skip
    torch.testing.assert_close(model(alone).concentration, whole[1:2], rtol=1e-4, atol=1e-5)


def test_a_new_network_is_non_negative_least_squares(world):
    """Exact concentrations where spectra are exactly linear in them."""
    samples, responses = world
    amounts = present_candidates(samples, responses)
    exact = samples.pristine + np.einsum("nk,nkb->nb", amounts, responses.library[samples.host])
    linear = replace(samples, doped=exact.astype(np.float32))
    model = ResponseNet(BINS).eval()
    with torch.no_grad():
        model.unmixing.log_ridge.fill_(-14.0)
    off = (predict([model], linear, Hosts(responses), "library").concentration - samples.targets)[samples.candidates]
    assert np.abs(off).max() < 0.01  # 0.02 softplus(-3) is added to start from
    assert np.sqrt(np.mean(off**2)) < 2e-3


def test_directions_of_scatter_and_faults_of_a_measurement_do_not_count(world):
    """Concentrations stay exact whatever is added along the scatter, or as background, or by shifted energies."""
    samples, responses = world
    rng = np.random.default_rng(5)
    scatter = rng.normal(size=(HOSTS, 1, 2, BINS)).astype(np.float32)
    scatter -= scatter.mean(axis=-1, keepdims=True)
    amounts = present_candidates(samples, responses)
    change = np.einsum("nk,nkb->nb", amounts, responses.library[samples.host])
    added = np.einsum("nr,nrb->nb", rng.normal(size=(len(samples), 2)), scatter[samples.host, 0])
    disturbed = replace(samples, doped=(samples.pristine + change + added).astype(np.float32))
    model = ResponseNet(BINS).eval()
    with torch.no_grad():
        model.unmixing.log_ridge.fill_(-14.0)
        model.unmixing.log_noise.fill_(-12.0)
    told = replace(responses, scatter=scatter)
    off = [
        (predict([model], disturbed, Hosts(known), "library").concentration - samples.targets)[samples.candidates]
        for known in (told, responses)
    ]
    assert np.abs(off[0]).max() < 0.01 < 0.03 < np.sqrt(np.mean(off[1] ** 2))
    # A background and a shift of everything by a third of a bin, of which a network knows by itself.
    slope = np.linspace(-0.05, 0.05, BINS) * rng.normal(size=(len(samples), 1))
    moved = 0.3 * np.gradient(change, axis=1)
    faulty = replace(samples, doped=(samples.pristine + change + moved + slope).astype(np.float32))
    told = replace(faulty, noise=np.full(len(faulty), 1e-3, np.float32))
    measured, computed = (
        (predict([model], some, Hosts(responses), "library").concentration - samples.targets)[samples.candidates]
        for some in (told, faulty)
    )
    assert np.abs(measured).max() < 0.01
    assert np.sqrt(np.mean(computed**2)) > 1.5 * np.sqrt(np.mean(measured**2))  # of those no fault is expected


def test_presence_is_less_certain_where_there_is_noise(world):
    samples, responses = world
    some, model = samples[np.arange(20)], ResponseNet(BINS).eval()
    presences = [
        predict([model], replace(some, noise=np.full(20, noise, np.float32)), Hosts(responses), "library").presence
        for noise in (0.0, 0.1, 0.3)
    ]
    for quiet, noisy in pairwise(presences):
        assert (quiet >= noisy)[some.targets > 0].all()  # alike only where both are certain
        assert (quiet > noisy)[some.targets > 0].mean() > 0.9


def test_properties_tell_candidates_apart():
    composition = np.eye(56, dtype=np.float32)[[SILICON]]
    found = candidate_properties(DOPANTS[None], np.full((1, 5), SILICON), composition)
    assert found.shape == (1, 5, PROPERTIES) and np.isfinite(found).all() and np.abs(found).max() < 5
    distances = np.linalg.norm(found[0][:, None] - found[0][None], axis=-1)
    assert distances[~np.eye(5, dtype=bool)].min() > 0.1
    # Mass ratio of boron in silicon.
    assert found[0, 0, 0] == pytest.approx(np.log(10.81 / 28.085), abs=1e-3)
    assert (candidate_properties(np.array([[-1]]), np.array([[-1]]), composition) == 0).all()


def test_blur_keeps_areas_and_adds_variances():
    curve = torch.from_numpy(bump(30, 3.0))[None]
    wide = blurred(curve, 4.0)
    assert float(wide.sum()) == pytest.approx(float(curve.sum()), rel=1e-3)
    x = torch.arange(BINS)
    variance = float((wide * (x - 30) ** 2).sum() / wide.sum())
    assert variance == pytest.approx(3.0**2 + 4.0**2, rel=0.05)


QUIET = {"resolution_bins": 0, "noise": 0, "background": 0, "axis_scale": 0, "cut_chance": 0}


def test_disturbances_follow_their_seed_and_settings():
    question = random_question()
    settings = Training(noise=0.1, resolution_bins=2, cut_chance=1)
    one, again, other = (disturbed(question, settings, 5.0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.doped, again.doped) and not torch.equal(one.doped, other.doped)
    assert torch.equal(one.measured, again.measured) and not torch.equal(one.measured, other.measured)
    quiet = disturbed(question, Training(**QUIET), 5.0, torch.Generator())
    for name in ("doped", "pristine", "response", "measured"):
        torch.testing.assert_close(getattr(quiet, name), getattr(question, name), atol=1e-5, rtol=1e-5)


def test_cut_spectra_keep_most_of_the_band():
    """Bins that are measured are next to each other; those of the host's band between 15 and 60 % always are."""
    question = replace(random_question(), host_pristine=torch.from_numpy(np.array([bump(25, 5), bump(35, 6)])).float())
    zero = 5.0
    for seed in range(50):
        stream = torch.Generator().manual_seed(seed)
        measured = disturbed(question, Training(**QUIET | {"cut_chance": 1}), zero, stream).measured
        for row, host in zip(measured, question.host, strict=True):
            kept = np.flatnonzero(row)
            assert (np.diff(kept) == 1).all() and len(kept) < BINS
            top = [25 + 3.1 * 5, 35 + 3.1 * 6][host] - zero
            assert kept[0] <= zero + 0.15 * top + 2 and kept[-1] >= min(zero + 0.6 * top - 2, BINS - 1)


@pytest.mark.parametrize("scale", [0.9, 1.0, 1.05])
def test_a_stretched_axis_moves_peaks_and_keeps_areas(scale):
    zero, curve = 10.0, torch.from_numpy(bump(34.5, 3.0))[None]  # bin k holds the energies from k to k + 1
    moved = stretched(curve, torch.tensor([[scale]]), zero)[0].numpy()
    assert moved.sum() == pytest.approx(float(curve.sum()), rel=1e-4)
    centers = np.arange(BINS) + 0.5
    mean = (moved * centers).sum() / moved.sum()
    assert mean == pytest.approx(zero + scale * (35 - zero), abs=0.02)
    width = np.sqrt((moved * (centers - mean) ** 2).sum() / moved.sum())
    assert width == pytest.approx(scale * 3.0, rel=0.02)


def test_what_was_not_measured_has_no_influence(world):
    samples, responses = world
    some, model = samples[np.arange(0, 400, 37)], shaken()
    cut = {name: getattr(some, name).copy() for name in ("pristine", "doped")}
    cut["doped"][:, 45:] = np.nan  # one of the two is enough
    one = predict([model], replace(some, **cut), Hosts(responses), "library").concentration
    cut["pristine"][:, 45:] = 17.0
    np.testing.assert_array_equal(
        one, predict([model], replace(some, **cut), Hosts(responses), "library").concentration
    )
    assert not np.allclose(one, predict([model], some, Hosts(responses), "library").concentration, atol=1e-4)


def test_the_unit_of_the_spectra_does_not_matter(world):
    samples, responses = world
    some, model = samples[np.arange(0, 400, 37)], shaken()
    scaled = replace(some, pristine=7 * some.pristine, doped=0.3 * some.doped)
    one, other = (predict([model], x, Hosts(responses), "library").concentration for x in (some, scaled))
    np.testing.assert_allclose(one, other, atol=3e-5)  # of spectra that differ by rounding only, rounding is all


def test_responses_are_derivatives_of_normalised_spectra():
    rng = np.random.default_rng(4)
    host, response = (torch.from_numpy(rng.random((2, *shape))) for shape in ((BINS,), (3, BINS)))
    measured = torch.ones(2, BINS, dtype=torch.float64)
    measured[:, 40:] = 0
    step = 1e-6
    moved = (within(measured, host + step * response[:, 1], host) - within(measured, host, host)) / step
    torch.testing.assert_close(response_within(measured, response, host)[:, 1], moved, rtol=1e-4, atol=1e-4)


def test_it_learns_and_knowledge_helps(world, monkeypatch):
    monkeypatch.setattr(recipes, "IMAGINED_WEIGHT", 1.0)  # few steps have to do
    samples, responses = world
    training, test = samples[samples.host < 9], samples[samples.host >= 9]
    settings = Training(epochs=30, batch_size=64, learning_rate=3e-3)
    torch.manual_seed(0)
    model = ResponseNet(BINS)
    recipe = ResponseRecipe(model, training, test, responses, 10.0, settings, "cpu")
    optimizer = recipe.optimizer()
    for epoch in range(1, settings.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(epoch)
        for value, _, _ in recipe.steps(torch.Generator().manual_seed(epoch)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    error = {}
    for level in LEVELS:
        told = predict([model.eval()], test, Hosts(responses), level)
        off = (told.concentration - test.targets)[test.candidates]
        error[level] = np.sqrt(np.mean(off**2))
        assert ((told.presence >= 0) & (told.presence <= 1)).all() and (told.error[test.candidates] > 0).all()
    spread = test.targets[test.candidates].std()
    assert error["library"] < 0.25 * spread
    assert error["library"] <= error["mass_only"] < 0.8 * spread
    # Responses of hosts that it has not seen, out of nothing: those of the others, shifted.
    first = test[np.unique(test.host, return_index=True)[1]]
    _, imagined = compared([model], first, Hosts(responses), "none")
    truth = responses.library[first.host]
    assert np.sum((imagined - truth) ** 2) < 0.4 * np.sum(truth**2)


def test_levels_are_capped_by_what_is_known(world):
    samples, responses = world
    nothing = replace(
        responses, knows_library=np.zeros_like(responses.knows_library), knows_mass=np.zeros_like(responses.knows_mass)
    )
    some, model = samples[np.arange(0, 40, 7)], shaken()
    for level in LEVELS:
        np.testing.assert_allclose(
            predict([model], some, Hosts(nothing), level).concentration,
            predict([model], some, Hosts(responses), "none").concentration,
            atol=1e-6,
        )


def test_networks_that_disagree_expect_larger_errors(world):
    samples, responses = world
    some, one, other = samples[np.arange(0, 40, 7)], shaken(), shaken()
    with torch.no_grad():
        other.head[-1].bias[1] += 3
    apart = [predict([model], some, Hosts(responses), "library") for model in (one, other)]
    both = predict([one, other], some, Hosts(responses), "library")
    asked = some.candidates
    np.testing.assert_allclose(both.concentration, (apart[0].concentration + apart[1].concentration) / 2, atol=1e-6)
    spread = np.abs(apart[0].concentration - apart[1].concentration) / 2
    mean = (apart[0].error + apart[1].error) / 2
    np.testing.assert_allclose(both.error[asked] ** 2, (mean**2 + spread**2)[asked], rtol=1e-3)


def test_what_stays_unexplained_makes_errors_larger(world):
    """Something that no response explains, half as large as all that doping changed."""
    samples, responses = world
    some = samples[np.flatnonzero(samples.targets.sum(axis=1) > 0)[:20]]
    rng = np.random.default_rng(3)
    change = some.doped - some.pristine
    other = rng.normal(size=change.shape)
    other *= 0.5 * np.linalg.norm(change, axis=1, keepdims=True) / np.linalg.norm(other, axis=1, keepdims=True)
    model = ResponseNet(BINS).eval()
    asked = (some, replace(some, doped=(some.doped + other).astype(np.float32)))
    known, disturbed = (predict([model], one, Hosts(responses), "library") for one in asked)
    assert np.all(disturbed.unexplained > known.unexplained)
    assert np.all((disturbed.error > known.error)[some.candidates])


@pytest.mark.parametrize("coverage", [0.5, 0.9])
def test_intervals_cover_hosts_that_were_not_used(coverage):
    """Hosts differ in how wrong they are; over many hosts the share of truths inside is what was asked for."""
    rng = np.random.default_rng(3)

    def world_of(hosts):
        host = np.repeat(np.arange(hosts), 30)
        wrong = rng.lognormal(0, 0.7, hosts)[host]
        truth = np.zeros((len(host), 56), np.float32)
        asked = np.zeros((len(host), 56), bool)
        asked[:, 5] = True
        truth[:, 5] = rng.uniform(0.01, 0.1, len(host))
        told = truth + asked * (0.01 * wrong * rng.normal(size=len(host)))[:, None]
        nothing = np.zeros((len(host), 1), np.float32)
        samples = Samples(
            np.arange(len(host)), host, nothing, nothing, nothing, asked, truth, asked[:, 5], 0 * host, host
        )
        return samples, Prediction(told, told, np.where(asked, 0.01, 0), *nothing.T)

    covered = []
    for _ in range(60):
        samples, prediction = world_of(20)
        interval = interval_of(prediction, samples, coverage)
        others, judged = world_of(20)
        off = np.abs(judged.concentration - others.targets)[:, 5]
        covered.append(np.mean(off <= interval.width(judged.error[:, 5])))
    assert np.mean(covered) == pytest.approx(coverage + 0.5 * coverage / 20, abs=0.035)
    assert np.mean(covered) >= coverage - 0.01


def test_intervals_are_those_of_relaxed_crystals_where_there_are_any():
    """Of two spectra of each host, the relaxed one is told three times as wrongly."""
    host = np.repeat(np.arange(30), 2)
    asked, nothing = np.zeros((60, 56), bool), np.zeros((60, 1), np.float32)
    asked[:, 5] = True
    relaxed = np.tile([True, False], 30)
    told = 0.01 * asked * np.where(relaxed, 3, 1)[:, None]
    prediction = Prediction(told, told, np.where(asked, 0.01, 0), *nothing.T)
    widths = []
    for known in (relaxed, ~relaxed, np.zeros(60, bool)):
        samples = Samples(np.arange(60), host, nothing, nothing, nothing, asked, 0 * told, known, 0 * host, host)
        widths.append(interval_of(prediction, samples, 0.4).width(0.01))
    assert widths == pytest.approx([0.03, 0.01, 0.01], rel=0.02)


def test_intervals_trust_expected_errors_as_far_as_these_are_worth_it():
    """Errors of very different size, which a network foretells or does not: then more is added, and all are wider."""
    rng = np.random.default_rng(1)
    host = np.repeat(np.arange(40), 25)
    asked, nothing = np.zeros((1000, 56), bool), np.zeros((1000, 1), np.float32)
    asked[:, 5] = True
    size = 10 ** rng.uniform(-4, -1.5, 1000)
    off = asked * (size * rng.normal(size=1000))[:, None]
    samples = Samples(np.arange(1000), host, nothing, nothing, nothing, asked, 0 * off, asked[:, 5], 0 * host, host)
    intervals, widths = [], []
    for expected in (size, size[::-1]):
        prediction = Prediction(off, off, asked * expected[:, None], *nothing.T)
        intervals.append(interval_of(prediction, samples, 0.9))
        widths.append(intervals[-1].width(expected))
        assert np.mean(np.abs(off[:, 5]) <= widths[-1]) == pytest.approx(0.92, abs=0.01)
    assert intervals[0].floor < intervals[1].floor == max(ERROR_FLOORS)
    assert widths[0].mean() < 0.7 * widths[1].mean()
