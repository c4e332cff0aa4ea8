"""Trained SAM2-UNeXT checkpoints: their header, finding their encoders, restoring the network, writing them safely.

A checkpoint whose encoders came from files is small: it holds what was trained and records, for each encoder, its name,
a fingerprint of its weights and the path it had. A checkpoint with a random encoder is whole. Files are written under a
temporary name and renamed, so a file under its final name is always complete. On Hugging Face's hub a checkpoint is a
folder: config.json holds the header, model.safetensors the tensors, README.md is the model card.
"""

import json
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from torch import Tensor, nn

from unext import files, weights
from unext.files import shown

FORMAT = 3  # of the files `save_network` writes; format 2 recorded encoders by source alone, format 1 was always whole
NETWORK = {"sam2": str, "aux": str, "aux_size": int, "size": int}  # the arguments of SAM2UNeXT in a header
RECORDS = ({"name", "path", "fingerprint"}, {"source", "fingerprint"})  # of an encoder, in formats 3 and 2
LARGEST_SIDE = 2**14  # pixels that a header may ask for
ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "weights"  # where train.sh keeps the encoders' files
CONFIG, MODEL = "config.json", "model.safetensors"  # in the folder of a checkpoint on the hub
CARD = (ROOT / "docs/model_card.jinja").read_text("utf-8")  # the README.md of such a folder


class Trained(NamedTuple):
    """A checkpoint as `read_network` finds it."""

    network: dict[str, Any]  # the arguments that build its network
    state: dict[str, Tensor]  # all tensors or, in a small file, those that were trained
    encoders: dict[str, dict[str, str]]  # of a small file: path and fingerprint by option; of a whole one: empty


def encoder_files(network: dict[str, Any]) -> dict[str, str]:
    """The usual file names of a network's encoders by the option that names the file."""
    names = {"hiera_path": weights.TRUNK_FILES[network["sam2"]]}
    return names if network["aux"] == "none" else names | {"dinov2_path": f"{network['aux']}.safetensors"}


def is_small(model: nn.Module) -> bool:
    """Whether a network's checkpoints can leave its encoders out, because all of them came from files."""
    return model.encoders.keys() == encoder_files(model.network).keys()


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The part of the state dict that training changes: adapters, glue, decoder with its BatchNorm statistics."""
    frozen = ("sam.", "dino.")
    return {k: v for k, v in model.state_dict().items() if ".prompt_learn." in k or not k.startswith(frozen)}


def read_network(source: str | Path) -> Trained:
    """Reads a trained checkpoint of this program, by its header, or of the original, by the tensors' shapes.

    Raises OSError or ValueError that names the file and the remedy.
    """
    return as_trained(read(source), source)


def read(source: str | Path) -> dict[str, Any]:
    """The content of a checkpoint: a file or, as on the hub, a folder. Raises OSError or ValueError."""
    if not Path(source).is_dir():
        return weights.read(source)
    config = Path(source, CONFIG)
    try:
        header = json.loads(config.read_text("utf-8"))
    except OSError as error:
        raise OSError(
            f"{shown(config)}: cannot be read: {error.strerror}; a folder needs {CONFIG} and {MODEL}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{shown(config)}: is not JSON: {weights.reason(error)}") from error
    if not isinstance(header, dict) or "format" not in header:
        raise ValueError(f"{shown(config)}: is not the header of a SAM2-UNeXT checkpoint")
    return header | {"state_dict": weights.read(Path(source, MODEL))}


def as_trained(content: dict[str, Any], source: str | Path) -> Trained:
    """`read_network` of the content of a file, `source`, that was read already."""
    state = weights.tensors(content)
    if not weights.is_network(state):
        raise ValueError(
            f"{shown(source)}: is {weights.describe(state)}; a trained checkpoint belongs here (SAM2-UNeXT-<epoch>.pth)"
        )
    if "format" in content:
        network, encoders = parse_header(content, source)
        return Trained(network, state, encoders)
    network: dict[str, Any] = {"sam2": weights.trunk_size(state, "sam."), "aux": "none"}
    if any(key.startswith("dino.") for key in state):
        network["aux"] = weights.dinov2_name(state, "dino.model.")
        positions = state.get("dino.model.pos_embed")
        if network["aux"] and positions is not None and positions.ndim == 3:
            patches = positions.shape[1] - ("reg4" not in network["aux"])  # without the class token
            network["aux_size"] = round(max(0, patches) ** 0.5) * weights.DINOV2_PATCH
    if None in network.values():
        raise ValueError(f"{shown(source)}: a SAM2-UNeXT checkpoint without a header whose encoders are not known ones")
    return Trained(network, state, {})


def parse_header(content: dict[str, Any], source: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """The network's arguments and the encoders' records, by option, in a header. Raises ValueError for nonsense."""
    if content["format"] not in (1, 2, FORMAT):
        version = shown(content["format"])[:20]
        raise ValueError(f"{shown(source)}: has format {version}, but this program reads up to {FORMAT}; update it")
    network, records = content.get("network"), content.get("encoders", {})
    known = isinstance(network, dict) and {"sam2", "aux"} <= network.keys() <= NETWORK.keys()
    known = known and all(isinstance(value, NETWORK[key]) for key, value in network.items())
    known = known and network["sam2"] in weights.TRUNK_FILES and re.fullmatch(r"\w[\w.-]*", network["aux"])
    if not known or not all(0 < network.get(side, 1) <= LARGEST_SIDE for side in ("size", "aux_size")):
        raise ValueError(f"{shown(source)}: its header does not say which network it holds; the file is damaged")
    options = {"hiera_path"} if network["aux"] == "none" else {"hiera_path", "dinov2_path"}
    known = isinstance(records, dict) and (not records or records.keys() == options)
    if not known or not all(
        isinstance(record, dict) and record.keys() in RECORDS and all(isinstance(text, str) for text in record.values())
        for record in records.values()
    ):
        raise ValueError(f"{shown(source)}: its header does not say which encoders it needs; the file is damaged")
    return network, records


def restore(
    network: Callable[..., nn.Module], path: str | Path, hiera_path: str | Path | None = None,
    dinov2_path: str | Path | None = None, precision: torch.dtype = torch.float32, download: bool = False,
) -> nn.Module:  # fmt: skip
    """See SAM2UNeXT.from_checkpoint; `network` is the class to build."""
    trained = read_network(path)
    given = {"hiera_path": hiera_path, "dinov2_path": dinov2_path}
    choices = find_encoders(path, trained, given, download) if trained.encoders else [[one] for one in given.values()]
    failures = []
    for paths in product(*choices):  # nearly always the first fit
        try:
            model = build(network, path, trained, precision, *paths)
            load_trained(model, path, trained)
            return model.eval()
        except (OSError, ValueError) as error:
            failures.append(str(error))
    raise ValueError("; ".join(dict.fromkeys(failures)))


def find_encoders(
    path: str | Path, trained: Trained, given: dict[str, str | Path | None], download: bool
) -> list[list[str | Path]]:
    """The files that may hold each encoder of a small checkpoint: the given one or those that exist.

    They are in the order of `encoder_files`. Looked at are the recorded path, the folder weights/ beside this program
    and the checkpoint's folder, and there only a file with the encoder's usual name: a checkpoint from somebody else
    must not choose what is opened. Nothing but `download` asks a server. Raises OSError if an encoder is not found.
    """
    folder = Path(path).absolute()
    folder = folder if folder.is_dir() else folder.parent
    found: list[list[str | Path]] = []
    for option, name in encoder_files(trained.network).items():
        record = trained.encoders[option]
        recorded = Path(record.get("path") or record.get("source", ""))
        places = [WEIGHTS / name, folder / name]
        if recorded.name in (name, "model.safetensors"):  # the latter is what timm's files are called on the hub
            places.insert(0, recorded)
        usable = [given[option]] if given[option] else [place for place in places if place.is_file()]
        url = weights.PUBLISHED.get(name)
        if not usable and download and url:
            usable = [weights.fetch(WEIGHTS / name)]
        if not usable:
            remedy = f"--download fetches it from {url} to {shown(WEIGHTS)}, or" if url else "copy it there, or"
            looked = files.listing(dict.fromkeys(place.parent for place in places))
            raise FileNotFoundError(
                f"{shown(path)}: needs its encoder {name} (fingerprint {shown(record['fingerprint'])}), not found "
                f"in {looked}: {remedy} name it with --{option}"
            )
        found.append(usable)
    return found


def sources(path: str | Path, model: nn.Module) -> list[Path]:
    """What a network was restored from: the checkpoint, the files in it if it is a folder, and those of encoders."""
    path = Path(path)
    content = path.iterdir() if path.is_dir() else ()
    return [path, *content, *(Path(record["path"]) for record in model.encoders.values())]


def build(
    network: Callable[..., nn.Module], path: str | Path, trained: Trained, precision: torch.dtype,
    *sources: str | Path | None,
) -> nn.Module:  # fmt: skip
    """The network that a checkpoint describes with its encoders from `sources`. Raises OSError or ValueError."""
    whole, options = not any(sources), trained.network | {"precision": precision}
    try:
        with torch.device("meta") if whole else nullcontext():
            model = network(*sources, **options, allow_sam2_1=True)  # the fingerprints decide
        return model if not whole or weights.state_covers(model) else network(**options)
    except ValueError as error:
        problem = "its header describes" if whole else "its encoders make"
        raise ValueError(f"{shown(path)}: {problem} a network that cannot be built: {error}") from error


def load_trained(model: nn.Module, path: str | Path, trained: Trained) -> None:
    """Loads into `model` what was read from the checkpoint `path`.

    Random encoders are replaced by those of a whole file; encoders from files must be the ones it was trained with.
    Raises ValueError that names the remedy if they are not, or if the tensors do not fit.
    """
    small = bool(trained.encoders)
    weights.check_state(trained_state(model) if small else model.state_dict(), trained.state, path)
    for option, name in encoder_files(model.network).items() if small or is_small(model) else ():
        ours = model.encoders.get(option, {"path": "a random encoder", "fingerprint": ""})
        if small:
            right = trained.encoders[option]["fingerprint"]
            remedy = f"give {name} with the fingerprint {shown(right)} as --{option}"
        else:
            right = weights.fingerprint(encoder_state(model, trained.state, option))
            remedy = "it holds its encoders itself: give random for both, or no path"
        if ours["fingerprint"] != right:
            raise ValueError(f"{shown(path)}: was not trained with {shown(ours['path'])}; {remedy}")
    weights.fill(model, trained.state, strict=not small)


def encoder_state(model: nn.Module, state: dict[str, Tensor], option: str) -> dict[str, Tensor]:
    """The part of a whole state dict that one encoder holds, with its keys in its order."""
    prefix = {"hiera_path": "sam.", "dinov2_path": "dino."}[option]
    keys = (key for key in model.state_dict() if key.startswith(prefix) and ".prompt_learn." not in key)
    return {key.removeprefix(prefix): state[key] for key in keys}


def network_content(model: nn.Module, whole: bool) -> dict[str, Any]:
    """A SAM2UNeXT as files hold it: a header, and all tensors or only the trained ones with the encoders' records."""
    return {
        "format": FORMAT,
        "network": model.network,
        "encoders": {} if whole else model.encoders,
        "state_dict": model.state_dict() if whole else trained_state(model),
    }


def save_network(path: str | Path, model: nn.Module, epoch: int) -> None:
    """Writes a trained SAM2UNeXT: small if its encoders came from files, else whole. Raises OSError."""
    save(path, network_content(model, whole=not is_small(model)) | {"epoch": epoch})


def save(path: str | Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """torch.save to a file that gets its name only when it is complete; the one before it is renamed to `previous`.

    Once there was a complete file, one of the two is complete at every moment. Raises OSError that names the file.
    """
    path = Path(path)
    try:
        with files.replacing(path) as file:
            torch.save(content, file)
            if previous and path.exists():
                os.replace(path, previous)
    except RuntimeError as error:  # what torch's zip writer makes of an OSError, such as a full disk
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{shown(path)}: cannot be written: {weights.reason(cause)}") from error


class Hub(
    ModelHubMixin, paper_url="https://arxiv.org/abs/2508.03566", license="apache-2.0", model_card_template=CARD,
    pipeline_tag="image-segmentation", tags=["sam2", "dinov2"],
):  # fmt: skip
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of huggingface_hub for SAM2UNeXT.

    `save_pretrained(folder)` writes a folder that is a checkpoint for test.py too. `from_pretrained` takes such a
    folder or "user/model", and the options of `restore`. `model_card_kwargs` may have `dataset` and `results`.
    """

    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **options: Any) -> str:
        card = {"repo_id": repo_id} | (model_card_kwargs or {})
        return super().push_to_hub(repo_id, model_card_kwargs=card, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        content = network_content(self, whole=not is_small(self))
        state = {key: tensor.contiguous() for key, tensor in content.pop("state_dict").items()}
        # The paths on this machine are nobody else's business.
        encoders = {option: record | {"path": ""} for option, record in content["encoders"].items()}
        with files.replacing(save_directory / MODEL) as file:
            file.write(safetensors.torch.save(state))
        with files.replacing(save_directory / CONFIG) as file:
            file.write(json.dumps(content | {"encoders": encoders}, indent=1).encode() + b"\n")

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, revision: str | None, cache_dir: str | Path | None, force_download: bool,
        local_files_only: bool, token: str | bool | None, **options: Any,
    ) -> "Hub":  # fmt: skip
        folder = Path(model_id)
        if not folder.is_dir():
            fetch = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download, "token": token}
            for name in (CONFIG, MODEL):
                path = hf_hub_download(model_id, name, local_files_only=local_files_only, **fetch)
            folder = Path(path).parent
        return restore(cls, folder, **options)
