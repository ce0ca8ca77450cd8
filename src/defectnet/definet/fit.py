"""Training: reproducible, resumable after a kill, stopped early.

A run directory holds ``checkpoint.pt`` and ``history.csv``; while training lasts, ``last-K.pt`` holds the state of
network K to go on from.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defectnet import __version__
from defectnet.definet.corrections import Corrections
from defectnet.definet.graphs import batch, graph_of, without_forces
from defectnet.definet.pairs import Pair
from defectnet.definet.parts import deal
from defectnet.digests import digest
from defectnet.errors import InputError, RecordError
from defectnet.files import write_atomically
from defectnet.models.definet import Crystals, DefiNet, loss
from defectnet.progress import track
from defectnet.seeds import generator
from defectnet.training.checkpoints import load, load_state, reason, reproducible, save

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 3
GRADIENT_MAX = 1.0
NO_FOLD = -1
"""Of a pair that all networks see."""
HISTORY_COLUMNS = ("network", "epoch", "train_loss", "validation_coordinate_mae_A", "seconds")
"""Of history.csv; the error is the mean of answers that are told the forces on the unrelaxed cells and that are not."""


@dataclass(frozen=True)
class Settings:
    """How to train. Sizes are those of :class:`~defectnet.models.definet.DefiNet`.

    members       : networks whose answers are averaged; of three or more, each leaves out its share of the dopants of
                    every host, which says what networks miss of dopants that they have not seen
    batch_size    : cells per step
    farthest_A    : cells in which an atom moves farther are not learned from; they end in one of many minima
    averaging     : the weights that are kept are exponential means over about 1 / (1 - averaging) steps
    patience      : epochs without a better validation after which training ends
    """

    scalars: int = 64
    vectors: int = 32
    layers: int = 2
    radial: int = 12
    cutoff_A: float = 4.5
    members: int = 1
    epochs: int = 30
    batch_size: int = 8
    farthest_A: float = 0.5
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    averaging: float = 0.995
    patience: int = 20
    validation_fraction: float = 0.07
    test_fraction: float = 0.15
    seed: int = 0

    def network(self) -> DefiNet:
        """A network of this size with new weights."""
        return DefiNet(self.scalars, self.vectors, self.layers, self.radial, self.cutoff_A)


@dataclass(frozen=True)
class Trained:
    """Trained networks and what is needed to use them.

    models      : one or several of one size, whose answers are averaged
    calibration : factor of the expected errors, from the validation pairs
    corrections : what they miss in the hosts that they were trained on, not told (False) or told (True) forces
    parts       : ids of the pairs in each part
    about       : plain values: settings, digest of the data, best epochs, validation error, version
    """

    models: Sequence[DefiNet]
    calibration: float
    corrections: Mapping[bool, Corrections]
    parts: dict[str, list[str]]
    about: dict[str, Any]


def coordinate_mae(displacements: np.ndarray, pair: Pair, atoms: np.ndarray | None = None) -> float:
    """Mean |component| in Å of what predicted ``displacements`` [N, 3] miss, over all atoms of a pair or some [N]."""
    left = displacements - pair.displacements
    return float(np.abs(left[pair.atoms if atoms is None else atoms]).mean())


def _moved_A(pair: Pair) -> float:
    return float(np.linalg.norm(pair.displacements, axis=1).max())


def train(pairs: Sequence[Pair], settings: Settings, output: Path) -> Path:
    """Train on the division of ``pairs`` that the settings make; returns the checkpoint in the folder ``output``.

    The same arguments give the same weights, whether or not training was killed and started again in between (on one
    kind of device). Raises :class:`InputError` when training diverges or there is too little to divide.
    """
    parts = deal(pairs, settings.validation_fraction, settings.test_fraction, settings.seed)
    for name in ("train", "validation"):
        parts[name] = np.array([k for k in parts[name] if _moved_A(pairs[k]) <= settings.farthest_A])
    about = {
        "format": CHECKPOINT_FORMAT, "settings": asdict(settings), "data": _digest(pairs), "version": __version__,
    }  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    log.info("pairs: %s (%s)", ", ".join(f"{len(index)} {name}" for name, index in parts.items()), device)
    training, validation = (
        Samples.of([pairs[k] for k in parts[name]], settings.cutoff_A, device) for name in ("train", "validation")
    )
    folds = _folds(training.pairs, settings)
    states = [output / f"last-{member}.pt" for member in range(settings.members)]
    models, bests = [], []
    for member, state in enumerate(states):
        with reproducible(_seed(settings, f"network {member}")):
            model = settings.network().to(device)
            seen = training.some(np.flatnonzero(folds != member))
            best = _optimise(model, seen, validation, settings, state, about | {"member": member})
            model.load_state_dict(best["weights"])
        models.append(model.eval())
        bests.append(best)
    strangers = [models if fold == NO_FOLD else models[fold : fold + 1] for fold in folds]
    errors, ratios, corrections = {}, [], {}
    for told in (False, True):
        judged, known = validation.told(told), training.told(told)
        moves = [predict_moves(models, graph) for graph in judged.graphs]
        errors[told] = _mean_error([found for found, _ in moves], judged)
        ratios += [
            np.linalg.norm(found - pair.displacements, axis=1)[pair.atoms].mean() / error[pair.atoms].mean()
            for (found, error), pair in zip(moves, judged.pairs, strict=True)
        ]
        whom = [k for k, pair in enumerate(known.pairs) if pair.forces is not None or not told]
        answers = [predict_moves(strangers[k], known.graphs[k])[0] for k in whom]
        corrections[told] = Corrections.fit([known.pairs[k] for k in whom], answers)
    content = {
        "format": CHECKPOINT_FORMAT,
        "config": models[0].config,
        "weights": [best["weights"] for best in bests],
        "calibration": float(np.median(ratios)),
        "corrections": {told: one.state() for told, one in corrections.items()},
        "parts": {name: [pairs[k].id for k in index] for name, index in parts.items()},
        "about": about
        | {
            "epochs": [best["epoch"] for best in bests],
            "validation_coordinate_mae_A": errors[True],
            "validation_blind_mae_A": errors[False],
        },
    }
    rows = [[member, *row] for member, best in enumerate(bests) for row in best["history"]]
    write_atomically(output / "history.csv", _table(rows).encode())
    save(output / "checkpoint.pt", content)
    for state in states:
        state.unlink(missing_ok=True)
    return output / "checkpoint.pt"


@dataclass(frozen=True)
class Samples:
    """Pairs with their graphs, in single precision on a device."""

    pairs: list[Pair]
    graphs: list[Crystals]
    displacements: list[Tensor]

    @classmethod
    def of(cls, pairs: list[Pair], cutoff_A: float, device: torch.device) -> Samples:
        """Finds the neighbours of all pairs, which takes a few milliseconds each."""
        graphs = [graph_of(pair, cutoff_A, torch.float32).to(device) for pair in track(pairs, "neighbours")]
        displacements = [torch.tensor(pair.displacements, dtype=torch.float32, device=device) for pair in pairs]
        return cls(pairs, graphs, displacements)

    def told(self, forces: bool) -> Samples:
        """The same, told of the forces on the unrelaxed cells where these are known, or not told."""
        return self if forces else replace(self, graphs=[without_forces(graph) for graph in self.graphs])

    def some(self, index: np.ndarray) -> Samples:
        """Those of the given indices."""
        parts = (self.pairs, self.graphs, self.displacements)
        return Samples(*([part[k] for k in index] for part in parts))

    def batches(self, size: int, stream: torch.Generator) -> Iterator[tuple[Crystals, Tensor]]:
        """All pairs in random order, ``size`` at a time."""
        for rows in torch.randperm(len(self.pairs), generator=stream).split(size):
            chosen = rows.tolist()
            yield batch([self.graphs[k] for k in chosen]), torch.cat([self.displacements[k] for k in chosen])


@torch.no_grad()
def predict_moves(models: Sequence[DefiNet], graph: Crystals) -> tuple[np.ndarray, np.ndarray]:
    """Displacements [N, 3] and uncalibrated expected errors [N] of a batch, in Å, averaged over the networks."""
    moves = [model(graph) for model in models]
    displacements = torch.stack([one.displacements for one in moves]).double().mean(dim=0)
    error = torch.stack([one.log_error for one in moves]).double().exp().mean(dim=0)
    return displacements.cpu().numpy(), error.cpu().numpy()


def _mean_error(found: Sequence[np.ndarray], samples: Samples) -> float:
    """Mean over the pairs of :func:`coordinate_mae` in Å of the displacements found for each."""
    return float(np.mean([coordinate_mae(u, pair) for u, pair in zip(found, samples.pairs, strict=True)]))


def _optimise(
    model: DefiNet, training: Samples, validation: Samples, settings: Settings, last: Path, about: dict[str, Any]
) -> dict[str, Any]:
    """The loop over epochs of the network ``about["member"]``.

    Returns the best averaged weights, their epoch and validation error, and the history.
    """
    member = about["member"]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=settings.weight_decay)
    averaged = settings.network().to(next(model.parameters()).device)
    averaged.load_state_dict(model.state_dict())
    best: dict[str, Any] = {"epoch": 0, "error": float("inf"), "weights": {}, "history": []}
    done = step = 0
    if resumed := load_state(last, about):
        model.load_state_dict(resumed["model"])
        averaged.load_state_dict(resumed["averaged"])
        optimizer.load_state_dict(resumed["optimizer"])
        best, done, step = resumed["best"], resumed["done"], resumed["step"]
        log.info("continuing after epoch %d of %d", done, settings.epochs)
    for epoch in range(done + 1, settings.epochs + 1):
        if epoch - best["epoch"] > settings.patience:
            log.info("no better after epoch %d: stopped", best["epoch"])
            break
        began = time.monotonic()
        # Every epoch has its own generator, so that resuming needs no generator state.
        stream = torch.manual_seed(_seed(settings, f"network {member}, epoch {epoch}"))
        model.train()
        total, skipped = 0.0, 0
        steps = -(-len(training.pairs) // settings.batch_size)
        for crystals, displacements in training.batches(settings.batch_size, stream):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _rate((step + 0.5) / (steps * settings.epochs))
            value = loss(model(crystals), displacements, crystals.numbers > 0)
            optimizer.zero_grad()
            value.backward()
            length = torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_MAX)
            if length.isfinite():  # one cell beyond all bounds must not end a training
                optimizer.step()
                total += value.item()
            else:
                skipped += 1
            step += 1
            _average(averaged, model, min(settings.averaging, (1 + step) / (10 + step)))
        error = float(np.mean([
            _mean_error([predict_moves([averaged.eval()], graph)[0] for graph in judged.graphs], judged)
            for judged in (validation.told(False), validation.told(True))
        ]))  # fmt: skip
        if not np.isfinite(error):
            raise InputError(f"training diverged in epoch {epoch}; lower --learning-rate")
        seconds = time.monotonic() - began
        best["history"].append([epoch, total / steps, error, seconds])
        if skipped:
            log.warning(
                "network %d, epoch %d: %d of %d steps left out, no finite gradient", member, epoch, skipped, steps
            )
        if error < best["error"]:
            weights = {name: value.detach().cpu().clone() for name, value in averaged.state_dict().items()}
            best.update(epoch=epoch, error=error, weights=weights)
        log.info(
            "network %d, epoch %d of %d: loss %.4f, validation %.4f Å, best %.4f Å after epoch %d, %.0f s each",
            member, epoch, settings.epochs, total / steps, error, best["error"], best["epoch"], seconds,
        )  # fmt: skip
        state = {"model": model.state_dict(), "averaged": averaged.state_dict(), "optimizer": optimizer.state_dict()}
        save(last, {"about": about, "best": best, "done": epoch, "step": step, **state})
    return best


def _rate(done: float) -> float:
    """Share of the full step size when a share ``done`` of training is over: up for a twentieth, then half a cosine."""
    return min(done / 0.05, 0.5 * (1 + math.cos(math.pi * max(done - 0.05, 0) / 0.95)))


@torch.no_grad()
def _average(averaged: DefiNet, model: DefiNet, kept: float) -> None:
    for mean, value in zip(averaged.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - kept)


def _folds(pairs: Sequence[Pair], settings: Settings) -> np.ndarray:
    """[P] the network that does not see a training pair, or :data:`NO_FOLD`.

    With three networks or more, each leaves out its share of the dopants of every host, as what a network misses of
    those that it has seen says little about others. Only cells that hold nothing else are left out, and none of a host
    without force constants, where nothing is corrected.
    """
    if settings.members < 3:
        return np.full(len(pairs), NO_FOLD)
    species: dict[str, set[str]] = {}
    for pair in pairs:
        species.setdefault(pair.host, set()).update(pair.species)
    fold = {
        (host, dopant): number % settings.members
        for host, dopants in species.items()
        for number, dopant in enumerate(generator(settings.seed, "definet", "folds", host).permutation(sorted(dopants)))
    }
    left_out = [{fold[pair.host, dopant] for dopant in pair.species} if pair.lattice else set() for pair in pairs]
    folds = np.array([some.pop() if len(some) == 1 else NO_FOLD for some in left_out])
    if len(set(folds.tolist())) == 1 and folds[0] != NO_FOLD:
        raise InputError(f"{len(pairs)} pairs are too few for {settings.members} networks; lower --members")
    return folds


def _seed(settings: Settings, purpose: str) -> int:
    return int(generator(settings.seed, "definet", purpose).integers(2**62))


def _digest(pairs: Sequence[Pair]) -> str:
    data = [digest(moved=pair.displacements, forces=() if pair.forces is None else pair.forces) for pair in pairs]
    return digest(ids=[pair.id for pair in pairs], data=data)


def _table(history: list[list[float]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([HISTORY_COLUMNS, *history])
    return buffer.getvalue()


def load_trained(path: Path) -> Trained:
    """Read trained networks; no code in the file is run.

    Raises :class:`InputError` when there is none and :class:`RecordError` when it is damaged or of another format.
    """
    command = "defectnet definet train"
    content = load(path, command)
    try:
        if content["format"] != CHECKPOINT_FORMAT:
            raise KeyError(f"format {content['format']}")
        models = [DefiNet(**content["config"]).eval() for _ in content["weights"]]
        for model, weights in zip(models, content["weights"], strict=True):
            model.load_state_dict(weights)
        corrections = {told: Corrections.of(content["corrections"][told]) for told in (False, True)}
        return Trained(models, content["calibration"], corrections, content["parts"], content["about"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RecordError(f"{path}: not a checkpoint of this version ({reason(error)}); rerun `{command}`") from None
