"""Trained SAM2-UNeXT checkpoints: their headers, finding their encoders, restoring the model, saving it.

A checkpoint whose encoders came from files is small: it holds what was trained and records, for each encoder, its name,
a fingerprint of its weights and the path it had. A checkpoint with a random encoder is whole. A folder, as on Hugging
Face's hub, is a checkpoint too: config.json holds the header, model.safetensors the tensors.
"""

import hashlib
import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from unext import files, weights
from unext.download import PUBLISHED, TRUNK_FILES, fetch_published
from unext.errors import InputError, reason

if TYPE_CHECKING:
    from SAM2UNeXT import SAM2UNeXT

FORMAT = 1  # of the files that `save_network` writes
CONFIG_TYPES = {"sam2": str, "aux": str, "aux_size": int, "size": int}  # of the arguments of SAM2UNeXT in a header
RECORD_TYPES = {"name": str, "path": str, "fingerprint": str}  # of an encoder in a header
MAX_SIDE = 2**14  # pixels that a header may ask for
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"  # where train.sh keeps the encoders' files
CONFIG, MODEL = "config.json", "model.safetensors"  # in a folder


class Checkpoint(NamedTuple):
    """The content of a trained checkpoint."""

    config: dict[str, Any]  # the arguments that build its model
    state: dict[str, Tensor]  # all tensors or, in a small file, those that were trained
    encoders: dict[str, dict[str, str]]  # of a small file: a record by option; of a whole one: empty


def encoder_files(config: dict[str, Any]) -> dict[str, str]:
    """The usual file names of a model's encoders by the option that names the file."""
    names = {"hiera_path": TRUNK_FILES[config["sam2"]]}
    return names if config["aux"] == "none" else names | {"dinov2_path": f"{config['aux']}.safetensors"}


def is_small(model: "SAM2UNeXT") -> bool:
    """Whether a model's checkpoints can leave its encoders out, because all of them came from files."""
    return model.encoders.keys() == encoder_files(model.config).keys()


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The part of the state dict that training changes: adapters, glue, decoder with its BatchNorm statistics."""
    frozen = ("sam.", "dino.")
    return {k: v for k, v in model.state_dict().items() if ".prompt_learn." in k or not k.startswith(frozen)}


def trained_fingerprint(model: nn.Module) -> str:
    """Identifies what was trained: a hash of all trained parameters."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load(source: str | Path) -> Checkpoint:
    """Reads a checkpoint of this program or the original. Raises OSError or InputError that names the remedy."""
    return parse(read(source), source)


def read(source: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, a file or a folder, as it is. Raises OSError or InputError."""
    if not Path(source).is_dir():
        return weights.read(source)
    path = Path(source, CONFIG)
    try:
        header = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise OSError(f"{path}: cannot be read: {error.strerror}; a folder needs {CONFIG} and {MODEL}") from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON: {reason(error)}") from error
    if not isinstance(header, dict) or "format" not in header:
        raise InputError(f"{path}: is not the header of a SAM2-UNeXT checkpoint")
    return header | {"state_dict": weights.read(Path(source, MODEL))}


def parse(content: dict[str, Any], source: str | Path) -> Checkpoint:
    """The checkpoint in the content of a file, `source`. Raises InputError if it is another kind of file."""
    state = weights.tensors(content)
    if not weights.is_network(state):
        raise InputError(
            f"{source}: is {weights.describe(state)}; a trained checkpoint belongs here (SAM2-UNeXT-<epoch>.pth)"
        )
    if "format" in content:
        config, encoders = parse_header(content, source)
        return Checkpoint(config, state, encoders)
    config = {"sam2": weights.trunk_size(state, "sam."), "aux": "none"}
    if any(key.startswith("dino.") for key in state):
        config["aux"] = weights.dinov2_name(state, "dino.model.")
        positions = state.get("dino.model.pos_embed")
        if config["aux"] and positions is not None and positions.ndim == 3:
            patches = positions.shape[1] - ("reg4" not in config["aux"])  # without the class token
            config["aux_size"] = round(max(0, patches) ** 0.5) * weights.DINOV2_PATCH
    if None in config.values():
        raise InputError(f"{source}: a SAM2-UNeXT checkpoint without a header whose encoders are not known ones")
    return Checkpoint(config, state, {})


def parse_header(content: dict[str, Any], source: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """The model's config and the encoders' records, by option, in a header. Raises InputError for nonsense."""
    if content["format"] != FORMAT:
        version = str(content["format"])[:20]
        raise InputError(f"{source}: has format {version}, but this program reads {FORMAT}; update the program")
    config, records = content.get("config"), content.get("encoders")
    known = isinstance(config, dict) and {"sam2", "aux"} <= config.keys()
    if known and (newer := config.keys() - CONFIG_TYPES.keys()):
        raise InputError(f"{source}: has {files.listing(newer)}, which this program does not know; update the program")
    known = known and all(isinstance(value, CONFIG_TYPES[key]) for key, value in config.items())
    known = known and config["sam2"] in TRUNK_FILES and re.fullmatch(r"\w[\w.-]*", config["aux"])
    if not known or not all(0 < config.get(side, 1) <= MAX_SIDE for side in ("size", "aux_size")):
        raise InputError(f"{source}: its header does not say which network it holds; the file is damaged")
    known = isinstance(records, dict) and (not records or records.keys() == encoder_files(config).keys())
    texts = RECORD_TYPES.items()
    if not known or not all(isinstance(one, dict) and {k: type(v) for k, v in one.items()}.items() == texts
                            for one in records.values()):  # fmt: skip
        raise InputError(f"{source}: its header does not say which encoders it needs; the file is damaged")
    return config, records


def restore(
    model_class: type["SAM2UNeXT"], path: str | Path, hiera_path: str | Path | None = None,
    dinov2_path: str | Path | None = None, precision: torch.dtype = torch.float32, download: bool = False,
) -> "SAM2UNeXT":  # fmt: skip
    """See SAM2UNeXT.from_checkpoint; `model_class` is what to build."""
    checkpoint = load(path)
    paths: dict[str, str | Path | None] = {"hiera_path": hiera_path, "dinov2_path": dinov2_path}
    if checkpoint.encoders:
        paths |= find_encoders(path, checkpoint, paths, download)
    whole, options = not any(paths.values()), checkpoint.config | {"precision": precision}
    try:
        with torch.device("meta") if whole else nullcontext():
            model = model_class(*paths.values(), **options, allow_sam2_1=True)  # the fingerprints decide
        if whole and not weights.state_covers(model):
            model = model_class(**options)
    except InputError as error:
        problem = "its header describes" if whole else "its encoders make"
        raise InputError(f"{path}: {problem} a network that cannot be built: {error}") from error
    load_trained(model, path, checkpoint)
    return model.eval()


def find_encoders(
    path: str | Path, checkpoint: Checkpoint, given: dict[str, str | Path | None], download: bool
) -> dict[str, str | Path | None]:
    """The file of each encoder of a small checkpoint, by option.

    It is the given one, else the first that exists of the recorded path, weights/ beside this program, and the
    checkpoint's folder, if it has the encoder's usual name: a checkpoint from somebody else must not choose what is
    opened. Nothing but `download` asks a server. Raises OSError if an encoder is not found.
    """
    folder = Path(path).absolute()
    folder = folder if folder.is_dir() else folder.parent
    found: dict[str, str | Path | None] = {}
    for option, name in encoder_files(checkpoint.config).items():
        record = checkpoint.encoders[option]
        places = [WEIGHTS / name, folder / name]
        if Path(record["path"]).name in (name, MODEL):  # the latter is what timm's files are called on the hub
            places.insert(0, Path(record["path"]))
        found[option] = given[option] or next((place for place in places if place.is_file()), None)
        url = PUBLISHED.get(name)
        if download and url:
            found[option] = fetch_published(found[option] or WEIGHTS / name)
        if not found[option]:
            remedy = f"--download fetches it from {url} to {WEIGHTS}, or" if url else "copy it there, or"
            looked = files.listing(dict.fromkeys(place.parent for place in places))
            raise FileNotFoundError(
                f"{path}: needs its encoder {name} (fingerprint {record['fingerprint']}), not found in {looked}: "
                f"{remedy} name it with --{option}"
            )
    return found


def sources(path: str | Path, model: "SAM2UNeXT") -> list[Path]:
    """What a model was restored from: the checkpoint, the files in it if it is a folder, and those of encoders."""
    path = Path(path)
    content = path.iterdir() if path.is_dir() else ()
    return [path, *content, *(Path(record["path"]) for record in model.encoders.values())]


def load_trained(model: "SAM2UNeXT", path: str | Path, checkpoint: Checkpoint) -> None:
    """Loads into `model` what was read from `path`.

    Random encoders are replaced by those of a whole file; encoders from files must be the ones it was trained with.
    Raises InputError that names the remedy if they are not, or if the tensors do not fit.
    """
    small = bool(checkpoint.encoders)
    names = ("sam2", "aux") if small or model.dino is None else ("sam2", "aux", "aux_size")
    config = {name: checkpoint.config.get(name, model.config[name]) for name in names}
    if others := [f"--{name} {value}" for name, value in config.items() if value != model.config[name]]:
        raise InputError(f"{path}: was trained with {' '.join(others)}; give the same here")
    weights.check_state(trained_state(model) if small else model.state_dict(), checkpoint.state, path)
    for option, name in encoder_files(model.config).items() if small or is_small(model) else ():
        ours = model.encoders.get(option, {"path": "a random encoder", "fingerprint": ""})
        if small:
            right = checkpoint.encoders[option]["fingerprint"]
            remedy = f"give {name} with the fingerprint {right} as --{option}"
        else:
            right = weights.fingerprint(encoder_state(model, checkpoint.state, option))
            remedy = "it holds its encoders itself: give random for both, or no path"
        if ours["fingerprint"] != right:
            raise InputError(f"{path}: was not trained with {ours['path']}; {remedy}")
    weights.fill(model, checkpoint.state, strict=not small)


def encoder_state(model: nn.Module, state: dict[str, Tensor], option: str) -> dict[str, Tensor]:
    """The part of a whole state dict that one encoder holds, with its keys in its order."""
    prefix = {"hiera_path": "sam.", "dinov2_path": "dino."}[option]
    keys = (key for key in model.state_dict() if key.startswith(prefix) and ".prompt_learn." not in key)
    return {key.removeprefix(prefix): state[key] for key in keys}


def network_content(model: "SAM2UNeXT", whole: bool) -> dict[str, Any]:
    """A model as files hold it: a header, and all tensors or only the trained ones with the encoders' records."""
    return {
        "format": FORMAT,
        "config": model.config,
        "encoders": {} if whole else model.encoders,
        "state_dict": nchw(model.state_dict() if whole else trained_state(model)),
    }


def nchw(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict itself, its tensors in the order in which files hold them; the model computes channels-last."""
    for key, tensor in state.items():
        state[key] = tensor.to(memory_format=torch.contiguous_format)
    return state


def save_network(path: str | Path, model: "SAM2UNeXT", epoch: int) -> None:
    """Writes a trained model: small if its encoders came from files, else whole. Raises OSError."""
    save(path, network_content(model, whole=not is_small(model)) | {"epoch": epoch})


def save(path: str | Path, content: dict[str, Any]) -> None:
    """torch.save to a file that gets its name only when it is complete. Raises OSError that names the file."""
    try:
        with files.replacing(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # what torch's zip writer makes of an OSError, such as a full disk
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path}: cannot be written: {reason(cause)}") from error
