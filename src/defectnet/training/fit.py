"""Training: one network on one split, reproducible to the bit and resumable after a kill.

A run directory holds ``checkpoint.pt`` (best validation weights and all that prediction needs), ``history.csv`` and
``split.json``; while training lasts, ``member-K.pt`` hold the states to continue from.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from defectnet import __version__
from defectnet.config import Spectra, Training
from defectnet.dataset.samples import Axis, Responses, Samples, load_responses, load_samples
from defectnet.dataset.schema import Dataset
from defectnet.dataset.splits import Split, host_groups, split, thinned, without_unseen
from defectnet.elements import width_of
from defectnet.errors import InputError, RecordError
from defectnet.files import write_atomically
from defectnet.models.defectnet import DefectNet
from defectnet.models.response import LEVELS, ResponseNet
from defectnet.seeds import generator
from defectnet.training.checkpoints import load, load_state, reason, reproducible, save
from defectnet.training.presets import FINETUNED, FINETUNING_RATE, NETWORKS, PRESETS, Preset
from defectnet.training.recipes import (
    Hosts,
    Interval,
    Prediction,
    PublishedRecipe,
    Recipe,
    ResponseRecipe,
    interval_of,
    predict,
)

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 7
SAVE_INTERVAL_s = 20.0
"""Least time between two saves of a state: a killed training loses no more than this and one epoch."""

COVERAGE = 0.9
"""Of the intervals in a checkpoint."""

USUAL = 0.95
"""Share of spectra that are explained as well as a checkpoint calls usual."""

PARTS = ("none", "train", "validation", "test")
"""What a checkpoint knows of each spectrum; an ``element`` split leaves some out."""

HISTORY_COLUMNS = (
    "preset",
    "split",
    "repeat",
    "member",
    "epoch",
    "train_rmse_at_percent",
    "validation_rmse_at_percent",
)


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and what is needed to use it.

    network   : key of :data:`~defectnet.training.presets.NETWORKS`
    models    : one or several of these, trained alike, in evaluation mode, on the CPU
    intervals : by level of knowledge, how many expected errors wide a 90 % interval is on either side
    unexplained : by level of knowledge, the share of what doping changes that stays unexplained in 95 % of the
                validation spectra at most
    axis, edges_meV, spectra : energy axis of its input; the dataset's grid and settings, used by the absolute axis
    vocabulary : symbols that the training data could contain
    parts : [n] of every doped spectrum of the dataset its part in :data:`PARTS`
    about : plain values: preset, split, repeat, seed, training settings, dataset digest, potentials, best epochs and
            version
    """

    network: str
    models: list[DefectNet | ResponseNet]
    intervals: dict[str, Interval]
    unexplained: dict[str, float]
    axis: Axis
    edges_meV: np.ndarray
    spectra: Spectra
    vocabulary: tuple[str, ...]
    parts: np.ndarray
    about: dict[str, Any]

    @property
    def levels(self) -> tuple[str, ...]:
        """Levels of knowledge between which the network's answers differ."""
        return LEVELS if self.network == "response" else ("none",)

    def predict(self, samples: Samples, responses: Responses, level: str) -> Prediction:
        """Of the candidates of ``samples``. A published network knows the concentrations only: the rest is NaN."""
        if self.network == "response":
            return predict(self.models, samples, Hosts(responses), level)
        concentration = np.mean([model.predict(samples) for model in self.models], axis=0)
        nothing = np.full(concentration.shape, np.nan)
        return Prediction(concentration, nothing, nothing, nothing[:, 0])


def train(
    dataset: Path, settings: Training, preset_name: str, split_kind: str, repeat: int, seed: int, output: Path
) -> Path:
    """Train the network of a preset on one split and write the run directory ``output``; returns its checkpoint.

    Preset ``finetuned`` trains the networks of ``settings.pretrained`` on; where that does not help in validation, they
    stay what they were.

    The same arguments give the same weights, whether or not the training was killed and started again in between
    (on one kind of device). Progress goes to the log, or to a bar on a terminal.

    Raises :class:`InputError` when there is no such preset, the pretrained network does not fit, the split is
    impossible or the training diverges, :class:`RecordError` for a damaged dataset or checkpoint.
    """
    base = _pretrained(settings) if preset_name == FINETUNED else None
    if base is not None:
        preset = Preset(base.network, base.axis, FINETUNING_RATE)
    elif preset_name in PRESETS:
        preset = PRESETS[preset_name]
    else:
        raise InputError(f"preset {preset_name!r} is none of {', '.join([*PRESETS, FINETUNED])}")
    settings = settings.model_copy(update={"learning_rate": settings.learning_rate or preset.learning_rate})
    with Dataset(dataset) as data:
        samples = load_samples(data, preset.axis)
        responses = load_responses(data, preset.axis) if preset.network == "response" else None
        groups = host_groups(data)[samples.host]
        parts = split(
            groups, split_kind, settings.validation_fraction, settings.test_fraction, seed, repeat,
            fidelity=np.array(data.spectra.fidelity)[samples.row], targets=samples.targets,
        )  # fmt: skip
        dealt = np.arange(len(samples)) if split_kind in ("row", "configuration") else groups
        parts = thinned(parts, dealt, settings.train_fraction, seed, repeat)
        about = {
            "preset": preset_name,
            "split": split_kind,
            "repeat": repeat,
            "seed": seed,
            "training": settings.of_preset(preset_name),
            "dataset_digest": data.digest,
            "potentials": sorted(set(data.spectra.potential)),
            "defectnet_version": __version__,
        }
        model_data = {
            "axis": asdict(preset.axis),
            "edges_meV": data.edges_meV.tolist(),
            "spectra": data.settings.model_dump(mode="json"),
            "vocabulary": list(data.vocabulary),
        }
        if base is not None:
            require_same_grid(base, data.edges_meV, str(dataset))
            if base.network == "published" and width_of(base.vocabulary) != width_of(data.vocabulary):
                raise InputError(
                    f"training.pretrained: only one of the network and {dataset} knows vacancies; train a published "
                    "network afresh, or fine-tune one of preset response"
                )
            about["pretrained"] = base.about
        zero = float(np.interp(0, data.edges_meV, np.arange(len(data.edges_meV))))
        split_text = _describe_split(data, samples, parts, about)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training, validation = samples[parts.train], samples[parts.validation]
    if split_kind == "element":
        training = without_unseen(training)
    log.info(
        "training on %d spectra, validating on %d, testing on %d (%s)",
        len(training), len(validation), len(parts.test), device,
    )  # fmt: skip
    sizes = {"bins": samples.doped.shape[1]}
    if preset.network == "published":
        sizes["elements"] = samples.targets.shape[1]
    members, history = [], []
    for member in range(settings.members):
        own = about | {"member": member}
        with reproducible(_seed(own, "initial weights")):
            model = NETWORKS[preset.network](**sizes).to(device)
            if base is not None:
                model.load_state_dict(base.models[member % len(base.models)].state_dict())
                _freeze(model, settings.frozen)
            if responses is None:
                recipe: Recipe = PublishedRecipe(model, training, validation, settings, device)
            else:
                recipe = ResponseRecipe(model, training, validation, responses, zero, settings, device)
            best = _optimise(recipe, settings, output / f"member-{member}.pt", own, trained=base is not None)
        members.append(best)
        history += [[member, *row] for row in best["history"]]

    content = {
        "format": CHECKPOINT_FORMAT,
        "network": preset.network,
        "state_dicts": [best["state_dict"] for best in members],
        "config": model.config,
        "intervals": {},
        "unexplained": {},
        "parts": torch.from_numpy(_part_of(parts, len(samples))),
        **model_data,
        "about": about
        | {
            "best_epochs": [best["epoch"] for best in members],
            "validation_rmse_at_percent": [best["rmse"] for best in members],
        },
    }
    if responses is not None:
        networks = _networks(content)
        for level in LEVELS:
            told = predict(networks, validation, Hosts(responses), level)
            content["intervals"][level] = asdict(interval_of(told, validation, COVERAGE))
            content["unexplained"][level] = float(np.quantile(told.unexplained, USUAL))
    write_atomically(output / "split.json", split_text.encode())
    write_atomically(output / "history.csv", _history_csv(history, about).encode())
    save(output / "checkpoint.pt", content)
    for member in range(settings.members):
        (output / f"member-{member}.pt").unlink(missing_ok=True)
    return output / "checkpoint.pt"


def _pretrained(settings: Training) -> Checkpoint:
    if settings.pretrained is None:
        raise InputError("training.pretrained: names no checkpoint, but preset finetuned starts from one")
    return load_checkpoint(Path(settings.pretrained))


def require_same_grid(base: Checkpoint, edges_meV: np.ndarray, source: str) -> None:
    """Raise :class:`InputError` where a network of the absolute axis knows other energies than ``source`` has."""

    def told(edges: np.ndarray) -> str:
        return f"{edges[0]:g} to {edges[-1]:g} meV in bins of {edges[1] - edges[0]:g} meV"

    if base.axis.kind == "absolute" and not np.array_equal(base.edges_meV, edges_meV):
        raise InputError(
            f"training.pretrained: the network knows {told(base.edges_meV)}, but {source} has {told(edges_meV)}; give "
            "the block spectra the network's energy_min_meV, energy_max_meV and bin_meV and make the dataset again"
        )


def _freeze(model: nn.Module, frozen: Sequence[str]) -> None:
    """Keep those parts of a network from being trained."""
    parts = dict(model.named_children())
    if unknown := sorted(set(frozen) - set(parts)):
        raise InputError(f"training.frozen: the network has no part {', '.join(unknown)}; it has {', '.join(parts)}")
    if set(frozen) >= set(parts):
        raise InputError("training.frozen: names every part, so nothing is left to train")
    for name in frozen:
        parts[name].requires_grad_(False)


def _part_of(parts: Split, count: int) -> np.ndarray:
    """Index in :data:`PARTS` of each of ``count`` samples."""
    part = np.zeros(count, np.uint8)
    for name, rows in vars(parts).items():
        part[rows] = PARTS.index(name)
    return part


def _networks(content: dict[str, Any]) -> list[DefectNet | ResponseNet]:
    """The networks in a checkpoint, in evaluation mode."""
    networks = []
    for weights in content["state_dicts"]:
        model = NETWORKS[content["network"]](**content["config"])
        model.load_state_dict(weights)
        networks.append(model.eval())
    return networks


def _optimise(
    recipe: Recipe, settings: Training, last: Path, about: dict[str, Any], *, trained: bool
) -> dict[str, Any]:
    """The loop over epochs. Returns the best weights, their epoch and validation error, and the history.

    A network that is ``trained`` already competes with what becomes of it, as epoch 0.
    ``last`` keeps the state to go on from, also that after the last epoch, until the caller deletes it.
    """
    model = recipe.model
    optimizer = recipe.optimizer()
    state: dict[str, Any] = {"epoch": 0, "rmse": float("inf"), "state_dict": {}, "history": []}
    done = 0
    if resumed := load_state(last, about):
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
        state, done = resumed["best"], resumed["done"]
        log.info("continuing after epoch %d of %d", done, settings.epochs)
    elif trained:
        state.update(rmse=_validated(recipe), state_dict=_weights(model))
        log.info("before training: RMSE %.2f at.%% in validation", state["rmse"])

    saved = time.monotonic()
    for epoch in _progress(done, settings.epochs, state):
        # Every epoch has its own generator, so that resuming needs no generator state.
        stream = torch.Generator().manual_seed(_seed(about, f"epoch {epoch}"))
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(epoch)
        squares, entries = 0.0, 0
        for loss, square, count in recipe.steps(stream):
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_max)
            optimizer.step()
            squares += square
            entries += count
        train_rmse = (squares / entries) ** 0.5
        validation_rmse = _validated(recipe)
        if not np.isfinite(validation_rmse):
            raise InputError(f"training diverged in epoch {epoch}; lower training.learning_rate")
        state["history"].append([epoch, train_rmse, validation_rmse])
        if validation_rmse < state["rmse"]:
            state.update(epoch=epoch, rmse=validation_rmse, state_dict=_weights(model))
        if epoch == settings.epochs or time.monotonic() - saved >= SAVE_INTERVAL_s:
            progress = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "best": state, "done": epoch}
            save(last, {"about": about, **progress})
            saved = time.monotonic()
    return state


def _validated(recipe: Recipe) -> float:
    recipe.model.eval()
    return recipe.validate()


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a network's weights on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _progress(done: int, epochs: int, state: dict[str, Any]) -> Iterator[int]:
    """Epoch numbers from ``done`` + 1 on, with a bar on a terminal and about twenty log lines elsewhere."""
    interactive = sys.stderr.isatty()
    bar = tqdm(total=epochs, initial=done, desc="epochs", disable=not interactive)
    interval = max(1, epochs // 20)
    for epoch in range(done + 1, epochs + 1):
        yield epoch
        _, train_rmse, validation_rmse = state["history"][-1]
        bar.set_postfix_str(f"validation {validation_rmse:.2f} at.%, best {state['rmse']:.2f}", refresh=False)
        bar.update()
        if not interactive and (epoch % interval == 0 or epoch == epochs):
            log.info(
                "epoch %d of %d: RMSE %.2f at.%% in training, %.2f in validation, best %.2f after epoch %d",
                epoch, epochs, train_rmse, validation_rmse, state["rmse"], state["epoch"],
            )  # fmt: skip
    bar.close()


def _seed(about: dict[str, Any], purpose: str) -> int:
    whose = about["preset"], about["split"], str(about["repeat"]), str(about["member"])
    return int(generator(about["seed"], "train", *whose, purpose).integers(2**62))


def _describe_split(data: Dataset, samples: Samples, parts: Split, about: dict[str, Any]) -> str:
    content: dict[str, Any] = {name: about[name] for name in ("preset", "split", "repeat", "seed", "dataset_digest")}
    for name, index in vars(parts).items():
        content[name] = {
            "hosts": [data.hosts.id[host] for host in np.unique(samples.host[index])],
            "spectra": [data.spectra.id[row] for row in samples.row[index]],
        }
    return json.dumps(content, indent=1) + "\n"


def _history_csv(history: list[list[float]], about: dict[str, Any]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(HISTORY_COLUMNS)
    writer.writerows([about["preset"], about["split"], about["repeat"], *row] for row in history)
    return buffer.getvalue()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a trained network. No code in the file is run (``weights_only``).

    Raises :class:`InputError` when there is none and :class:`RecordError` when it is damaged or of another format.
    """
    content = load(path)
    try:
        if content["format"] != CHECKPOINT_FORMAT:
            raise KeyError(f"format {content['format']}")
        return Checkpoint(
            network=content["network"],
            models=_networks(content),
            intervals={level: Interval(**one) for level, one in content["intervals"].items()},
            unexplained=content["unexplained"],
            axis=Axis(**content["axis"]),
            edges_meV=np.array(content["edges_meV"]),
            spectra=Spectra(**content["spectra"]),
            vocabulary=tuple(content["vocabulary"]),
            parts=content["parts"].numpy(),
            about=content["about"],
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RecordError(
            f"{path}: not a checkpoint of this version ({reason(error)}); rerun `defectnet train`"
        ) from None
