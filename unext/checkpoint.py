"""Trained SAM2-UNeXT checkpoints: their headers, finding their encoders, loading, saving.

A checkpoint whose encoders came from files is small: it has the trained tensors and a record of each encoder: its name,
the path of its file, a fingerprint of its weights. A checkpoint with a random encoder is whole: it has all tensors. A
folder, as on Hugging Face's hub, is a checkpoint too: config.json is the header, model.safetensors has the tensors.
"""

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from unext import files, weights
from unext.download import PUBLISHED, TRUNK_FILES, fetch, fetch_published
from unext.errors import InputError, reason

if TYPE_CHECKING:
    from SAM2UNeXT import SAM2UNeXT

Paths = dict[str, str | Path | None]  # of encoders, by option

FORMAT = 1  # of the header
RECORD = ("name", "path", "fingerprint")  # of an encoder
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"  # where train.sh keeps the encoders' files
CONFIG, MODEL = "config.json", "model.safetensors"  # in a folder


class Checkpoint(NamedTuple):
    """The content of a trained checkpoint."""

    config: dict[str, Any]  # the arguments that build its model
    state: dict[str, Tensor]  # all tensors or, in a small checkpoint, the trained ones
    encoders: dict[str, dict[str, str]]  # in a small checkpoint the records by option, else empty


def encoder_files(config: dict[str, Any]) -> dict[str, str]:
    """The usual file names of a model's encoders, by the option for their paths."""
    names = {"hiera_path": TRUNK_FILES[config["sam2"]]}
    return names if config["aux"] == "none" else names | {"dinov2_path": f"{config['aux']}.safetensors"}


def is_small(model: "SAM2UNeXT") -> bool:
    """Whether a model's checkpoints can leave out its encoders, because all of them came from files."""
    return model.encoders.keys() == encoder_files(model.config).keys()


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict that training changes: adapters, glue, decoder with its BatchNorm statistics."""
    frozen = ("sam.", "dino.")
    return {k: v for k, v in model.state_dict().items() if ".prompt_learn." in k or not k.startswith(frozen)}


def trained_fingerprint(model: nn.Module) -> str:
    """Identifies the trained weights: a hash of all trained parameters."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def read(source: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, a file or a folder, unchecked."""
    if not Path(source).is_dir():
        return weights.read(source)
    path, header = fetch(Path(source, CONFIG)), None
    with suppress(ValueError):
        header = json.loads(path.read_text("utf-8"))
    if not isinstance(header, dict) or "format" not in header:
        raise InputError(f"{path}: is not the header of a SAM2-UNeXT checkpoint; download the file again")
    return header | {"state_dict": weights.read(Path(source, MODEL))}


def parse(content: dict[str, Any], source: str | Path) -> Checkpoint:
    """The checkpoint in the content of a file, `source`. Raises InputError if it is another kind of file."""
    state = weights.tensors(content)
    if weights.NETWORK not in state:
        kind = weights.describe(state)
        raise InputError(f"{source}: is {kind}; a trained checkpoint belongs here (SAM2-UNeXT-<epoch>.pth)")
    if "format" in content:
        config, encoders = parse_header(content, source)
        return Checkpoint(config, state, encoders)
    config = {"sam2": weights.trunk_size(state, "sam."), "aux": "none"}
    if any(key.startswith("dino.") for key in state):
        config["aux"] = weights.dinov2_name(state, "dino.model.")
        positions = state.get("dino.model.pos_embed")
        if config["aux"] and positions is not None:
            patches = positions.shape[1] - ("reg4" not in config["aux"])  # without the class token
            config["aux_size"] = round(patches**0.5) * weights.DINOV2_PATCH
    if None in config.values():
        raise InputError(f"{source}: is a SAM2-UNeXT checkpoint without a header, and with unknown encoders")
    return Checkpoint(config, state, {})


def parse_header(content: dict[str, Any], source: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """The model's config and the records of its encoders, by option. Raises InputError for a header that is damaged."""
    if content["format"] != FORMAT:
        raise InputError(f"{source}: has format {content['format']!s:.20}, but this program reads {FORMAT}; update it")
    try:
        config, records = dict(content["config"]), dict(content["encoders"])
        if config["sam2"] not in TRUNK_FILES or not re.fullmatch(r"\w[\w.-]*", config["aux"]):  # aux names a file
            raise ValueError("unknown encoders")
        if records:
            records = {name: {key: str(records[name][key]) for key in RECORD} for name in encoder_files(config)}
    except (KeyError, TypeError, ValueError) as error:
        problem = "its header does not describe a network; download or copy the file again"
        raise InputError(f"{source}: {problem}") from error
    return config, records


def find_encoders(path: str | Path, checkpoint: Checkpoint, given: Paths, download: bool) -> Paths:
    """The file of each encoder of a small checkpoint, by option.

    It is the given path, else the first that exists of: 1. the recorded path, if its name is the usual one (the header
    must not choose which file is opened), 2. weights/ of this program, 3. the checkpoint's folder. Asks no server
    without `download`. Raises OSError for a missing encoder.
    """
    folder = Path(path).absolute()
    folder = folder if folder.is_dir() else folder.parent
    encoders: Paths = {}
    for option, name in encoder_files(checkpoint.config).items():
        record = checkpoint.encoders[option]
        candidates = [WEIGHTS / name, folder / name]
        if Path(record["path"]).name in (name, MODEL):  # MODEL is the name of timm's files on the hub
            candidates.insert(0, Path(record["path"]))
        encoder = given[option] or next((file for file in candidates if file.is_file()), None)
        url = PUBLISHED.get(name)
        if download and url:
            encoder = fetch_published(encoder or WEIGHTS / name)
        if not encoder:
            remedy = f"--download fetches it from {url} to {WEIGHTS}, or" if url else "copy it there, or"
            folders = files.listing(dict.fromkeys(file.parent for file in candidates))
            missing = f"needs its encoder {name} (fingerprint {record['fingerprint']}), not found in {folders}"
            raise FileNotFoundError(f"{path}: {missing}: {remedy} name it with --{option}")
        encoders[option] = encoder
    return encoders


def sources(path: Path, model: "SAM2UNeXT") -> list[Path]:
    """The files that a model was read from: the checkpoint, those in it if it is a folder, and those of encoders."""
    return [path, *path.glob("*"), *(Path(record["path"]) for record in model.encoders.values())]


def load_trained(model: "SAM2UNeXT", path: str | Path, checkpoint: Checkpoint) -> None:
    """Loads the checkpoint that was read from `path`. Encoders from files must be those it was trained with."""
    small = bool(checkpoint.encoders)
    free = {"size", "aux_size"} if small or model.dino is None else {"size"}  # may differ from training
    if changed := [f"--{k} {v}" for k, v in checkpoint.config.items() if k not in free and v != model.config.get(k)]:
        raise InputError(f"{path}: was trained with {' '.join(changed)}; give the same here")
    weights.check_state(trained_state(model) if small else model.state_dict(), checkpoint.state, path)
    for option, name in (encoder_files(model.config) if small or is_small(model) else {}).items():
        encoder = model.encoders.get(option, {"path": "a random encoder", "fingerprint": ""})
        if small:
            expected, others = checkpoint.encoders[option]["fingerprint"], ""
        else:
            prefix = {"hiera_path": "sam.", "dinov2_path": "dino."}[option]
            keys = [key for key in model.state_dict() if key.startswith(prefix) and ".prompt_learn." not in key]
            expected = weights.fingerprint({key.removeprefix(prefix): checkpoint.state[key] for key in keys})
            others = ", or no encoder: it contains them"
        if encoder["fingerprint"] != expected:
            remedy = f"give {name} with the fingerprint {expected} as --{option}{others}"
            raise InputError(f"{path}: was not trained with {encoder['path']}; {remedy}")
    weights.fill(model, checkpoint.state, strict=not small)


def network_content(model: "SAM2UNeXT", whole: bool = False) -> dict[str, Any]:
    """The content of a model's file: header and tensors; small if its encoders came from files, unless `whole`."""
    small = is_small(model) and not whole
    state = trained_state(model) if small else model.state_dict()
    return {
        "format": FORMAT,
        "config": model.config,
        "encoders": model.encoders if small else {},
        "state_dict": {key: tensor.to(memory_format=torch.contiguous_format) for key, tensor in state.items()},
    }


def save_network(path: str | Path, model: "SAM2UNeXT", epoch: int) -> None:
    """Writes a trained model."""
    save(path, network_content(model) | {"epoch": epoch})


def save(path: str | Path, content: dict[str, Any]) -> None:
    """torch.save, atomically. Raises OSError that names the file if it cannot be written."""
    try:
        with files.replacing(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's zip writer hides what ended it: a full disk, or a worker that was killed
        cause = error.__context__ or error
        if not isinstance(cause, OSError):
            raise cause from None
        raise OSError(f"{path}: cannot be written: {reason(cause)}") from error
