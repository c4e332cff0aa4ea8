"""Every file of weights that the project reads or writes.

Reading never runs code from a file (torch's `weights_only`, safetensors), maps large files into memory instead of
copying them, and names a file of the wrong kind for what it is. Writing goes to a temporary file beside the place and
is renamed into it, so that a file under its final name is always whole.
"""

import hashlib
import http.client
import logging
import os
import pickle
import re
import shutil
import socket
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import safetensors
import safetensors.torch
import torch
from iopath.common.file_io import HTTPURLHandler, PathManager, file_lock, get_cache_dir
from torch import Tensor, nn

import files
import memory
from files import shown

FORMAT = 2  # version of the files that `save_network` writes; those of version 1 were always whole
NETWORK = {"sam2": str, "aux": str, "aux_size": int, "size": int}  # arguments of SAM2UNeXT in their headers
TRUNK = "image_encoder.trunk."  # where a SAM 2 checkpoint keeps the trunk
TRUNK_SIZES = {(96, 12): "tiny", (96, 16): "small", (112, 24): "base_plus", (144, 48): "large"}  # (width, blocks)
TRUNK_FILES = {size: f"sam2_hiera_{size}.pt" for size in TRUNK_SIZES.values()}
DINOV2_SIZES = {384: "small", 768: "base", 1024: "large", 1536: "giant"}  # by width
PUBLISHED = {  # where the encoders' weights come from
    name: f"https://dl.fbaipublicfiles.com/segment_anything_2/072824/{name}" for name in TRUNK_FILES.values()
} | {
    f"vit_{size}_patch14_dinov2.safetensors": (
        f"https://huggingface.co/timm/vit_{size}_patch14_dinov2.lvd142m/resolve/main/model.safetensors"
    )
    for size in DINOV2_SIZES.values()
}
SAM2_1_KEY = "no_obj_embed_spatial"  # stands in SAM 2.1 checkpoints only
DINOV2_PATCH = 14
DINOV2_PATCHES = (3, DINOV2_PATCH, DINOV2_PATCH)  # shape of what turns one into a vector
SAMPLED = 64  # values of each matrix that a fingerprint looks at, about
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # what weights may be stored in
LARGEST_SIDE = 2**14  # pixels that a header may ask for
SILENCE = 60  # seconds after which a server that sends nothing is given up


class Trained(NamedTuple):
    """A trained SAM2-UNeXT checkpoint as `read_network` finds it."""

    network: dict[str, Any]  # the arguments that build it
    state: dict[str, Tensor]  # its tensors: all of them or, in a small file, those that were trained
    encoders: dict[str, dict[str, str]]  # of a small file: source and fingerprint by option; of a whole one: empty


def fetch(source: str | Path) -> Path:
    """The local path of `source`, a path or a URL.

    A URL is downloaded once, with a progress bar, and cached by iopath (in the folder of its host below $FVCORE_CACHE,
    else ~/.torch/iopath_cache). A missing file with a name in PUBLISHED is downloaded to its place, if its folder is
    there or called weights. Raises OSError where there is no such file or the download fails; a broken download leaves
    nothing behind.
    """
    path = Path(source)
    if is_url(source):  # iopath itself tells them apart by their path alone
        path = download(str(source), Path(get_cache_dir(), urlparse(source).netloc.replace(":", "_")))
    elif not path.exists() and path.name in PUBLISHED and (path.parent.is_dir() or path.parent.name == "weights"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(path)):  # of several processes one downloads
            if not path.exists():
                print(f"{shown(path)} is missing; downloading {PUBLISHED[path.name]}")
                beside = path.with_name(f".{path.name}.download")
                try:
                    os.replace(download(PUBLISHED[path.name], beside), path)
                except OSError as error:
                    raise OSError(f"{error} and save it as {shown(path)}") from error
                finally:
                    shutil.rmtree(beside, ignore_errors=True)
    if not path.is_file():
        missing = "is a link to nothing" if path.is_symlink() else "there is no such file"
        raise FileNotFoundError(f"{shown(source)}: {'is not a file' if path.exists() else missing}")
    return path


def is_url(source: str | Path) -> bool:
    """Whether `source` is downloaded, not a path. Raises ValueError for URLs of other kinds and for broken ones."""
    if "://" not in str(source):
        return False
    with suppress(ValueError):
        if urlparse(source).scheme in ("http", "https", "ftp") and urlparse(source).netloc:
            return True
    raise ValueError(f"{shown(source)}: is no URL that can be downloaded, such as https://host/file")


def download(url: str, folder: Path) -> Path:
    """The file that `url` names, cached below `folder`. Raises OSError, also where nothing comes for a minute."""
    manager = PathManager()
    manager.register_handler(HTTPURLHandler())
    logging.getLogger("iopath").setLevel(logging.CRITICAL)  # its failures are raised as well; one line is enough
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)  # iopath has no option for it
    try:
        return Path(manager.get_local_path(url, cache_dir=str(folder)))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise OSError(f"{url}: cannot be downloaded: {reason(error)}; fetch it by other means") from error
    finally:
        socket.setdefaulttimeout(patience)


def read(source: str | Path) -> dict[str, Any]:
    """What a file of weights holds: safetensors, or what torch.save wrote, told apart by content.

    Raises OSError or ValueError that names the file where it is missing, empty, truncated, no weights at all, or a
    pickle with code in it (nothing of which is run). The cached copy of a URL is deleted then: servers that do not
    announce a length can break off unnoticed.
    """
    path = fetch(source)
    try:
        return parse(path)
    except ValueError as error:
        if not is_url(source):
            raise
        path.unlink(missing_ok=True)
        raise ValueError(
            f"{shown(source)}: {error}; it was deleted, so that the next start downloads it again"
        ) from error


def parse(path: Path) -> dict[str, Any]:
    """`read` of a file that is there."""
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{shown(path)}: is empty; delete it and fetch it again")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{shown(path)}: is a web page, not weights; delete it and download the file itself")
    try:
        if start[8:9] == b"{" or path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        zipped = start.startswith(b"PK")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about files that are refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{shown(path)}: is not a file of weights, or is a pickle that would run code; none of it was run"
        ) from error
    except Exception as error:  # damaged files make the readers fail in many ways
        raise ValueError(
            f"{shown(path)}: is truncated, damaged or not a file of weights ({reason(error)}); get it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{shown(path)}: holds a {type(content).__name__}, not weights")
    return content


def reason(error: Exception) -> str:
    """The first sentence of what an error says, or its kind where it says nothing.

    What torch adds is advice to load the file without protection.
    """
    return shown(re.split(r"(?<=[\w`'\"])\. |\n", str(error).strip())[0][:200]) or type(error).__name__


def tensors(content: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors by key, taken out of the usual wrappings: an entry "model" or "state_dict", a prefix `module.`."""
    for wrapping in ("model", "state_dict"):
        if isinstance(content.get(wrapping), dict):
            content = content[wrapping]
    state = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if state and all(key.startswith("module.") for key in state):  # saved from (Distributed)DataParallel
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def is_network(state: dict[str, Tensor]) -> bool:
    return "sam.blocks.0.prompt_learn.0.weight" in state


def is_sam2(state: dict[str, Tensor]) -> bool:
    return TRUNK + "patch_embed.proj.weight" in state


def trunk_size(state: dict[str, Tensor], prefix: str) -> str | None:
    """Which Hiera the keys below `prefix` make: tiny, small, base_plus, large, or None."""
    patches = state.get(prefix + "patch_embed.proj.weight")
    return TRUNK_SIZES.get((*patches.shape[:1], count_blocks(state, prefix))) if patches is not None else None


def dinov2_name(state: dict[str, Tensor], prefix: str = "") -> str | None:
    """timm's name of the DINOv2 that the keys below `prefix` make, or None for another network."""
    patches = state.get(prefix + "patch_embed.proj.weight")
    if patches is None or prefix + "blocks.0.ls1.gamma" not in state or patches.shape[1:] != DINOV2_PATCHES:
        return None
    size = DINOV2_SIZES.get(patches.shape[0])
    registers = "reg4_" if prefix + "reg_token" in state else ""
    return size and f"vit_{size}_patch14_{registers}dinov2"


def count_blocks(state: dict[str, Tensor], prefix: str) -> int:
    """How many transformer blocks stand below `prefix`."""
    prefix += "blocks."
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def describe(state: dict[str, Tensor]) -> str:
    """What a file holds, in words, for messages."""
    if is_network(state):
        return "a trained SAM2-UNeXT checkpoint"
    if is_sam2(state):
        version = "2.1" if SAM2_1_KEY in state else "2"
        return f"a SAM {version} checkpoint of size {trunk_size(state, TRUNK) or 'unknown'}"
    if name := dinov2_name(state):
        return f"the DINOv2 {name}"
    if not state:
        return "a file without tensors"
    return f"another network's (keys such as {shown(next(iter(state)))})"


def load_sam2(trunk: nn.Module, source: str | Path, allow_sam2_1: bool = False) -> None:
    """Fills a Hiera trunk from a SAM 2 checkpoint; all but the trunk's tensors is left in the file.

    SAM 2.1 holds a trunk of the same shape but other weights, hence is refused unless `allow_sam2_1`. Raises OSError
    or ValueError, with the mend, for any other file.
    """
    state = tensors(read(source))
    own = trunk.state_dict()
    wanted = trunk_size(own, "")
    if is_network(state):
        raise ValueError(
            f"{shown(source)}: is {describe(state)}, and here SAM 2's own weights belong ({TRUNK_FILES[wanted]}); "
            "a trained checkpoint goes to test.py --checkpoint"
        )
    if not is_sam2(state):
        raise ValueError(f"{shown(source)}: is {describe(state)}; SAM 2's {TRUNK_FILES[wanted]} belongs here")
    found = trunk_size(state, TRUNK)
    if found != wanted:
        mend = f"give --sam2 {found} or" if found else "give"
        raise ValueError(
            f"{shown(source)}: is {describe(state)}, but the network is built with --sam2 {wanted}; "
            f"{mend} the file {TRUNK_FILES[wanted]}"
        )
    if SAM2_1_KEY in state and not allow_sam2_1:
        raise ValueError(
            f"{shown(source)}: is {describe(state)}, whose trunk has the same shape as SAM 2's but other weights; the "
            f"published results start from SAM 2's {TRUNK_FILES[wanted]}; --allow_sam2_1 takes it all the same"
        )
    state = {key.removeprefix(TRUNK): value for key, value in state.items() if key.startswith(TRUNK)}
    check_state(own, state, source)
    fill(trunk, state)


def load_aux(net: nn.Module, name: str, source: str | Path) -> None:
    """Fills a timm feature extractor (`net`, the timm model `name`) from a file of that model's weights.

    timm's own filter renames keys of other publishers and resamples the position embedding to the size that `net` was
    built for. Raises OSError or ValueError, with the mend, where the file is another network's.
    """
    state = tensors(read(source))
    found = dinov2_name(state)
    if is_network(state) or is_sam2(state) or (found and found != name):
        mend = f"give --aux {found} or {name}'s file" if found else f"the weights of timm's {name} belong here"
        raise ValueError(f"{shown(source)}: is {describe(state)}; {mend}")
    filter_fn = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if filter_fn:
        try:
            state = filter_fn(state, net)
        except Exception as error:  # other networks' tensors and damaged ones make it fail in many ways
            raise ValueError(f"{shown(source)}: is {describe(state)}, not timm's {name}") from error
    own = net.state_dict()
    parts = {key.split(".")[0] for key in own}  # what else a file holds, such as a classifier, is not asked for
    state = {key: value for key, value in state.items() if key.split(".")[0] in parts}
    check_state(own, state, source)
    fill(net, state)


def fill(module: nn.Module, state: dict[str, Tensor], strict: bool = True) -> None:
    """Loads a state dict; into a module on the meta device without a copy, so that large files stay where they are."""
    own = module.state_dict()
    empty = any(tensor.is_meta for tensor in own.values())
    if empty:
        state = {key: tensor.to(own[key].dtype) for key, tensor in state.items()}
    module.load_state_dict(state, strict=strict, assign=empty)


def check_state(own: dict[str, Tensor], state: dict[str, Tensor], source: str | Path) -> None:
    """Raises ValueError unless both hold the same keys with the same shapes, and the values of `state` can be weights.

    Floating point of any width is converted by `fill`; integers, complex and packed numbers in its stead are refused,
    as are values that are not finite.
    """
    problems = [f"lacks {key}" for key in own if key not in state]
    problems += [f"has {shown(key)} too many" for key in state if key not in own]
    for key in (key for key in own if key in state):
        found, wanted = state[key], own[key]
        if found.layout != torch.strided or found.is_meta:
            problems.append(f"{key} holds no plain numbers")
        elif found.shape != wanted.shape:
            problems.append(f"{key} is {tuple(found.shape)} instead of {tuple(wanted.shape)}")
        elif found.dtype not in FLOATS if wanted.is_floating_point() else found.dtype != wanted.dtype:
            problems.append(f"{key} holds {found.dtype} instead of {wanted.dtype}".replace("torch.", ""))
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"{shown(source)}: does not fit the network: {', '.join(problems[:3])}{more}")
    broken = [key for key, tensor in state.items() if tensor.is_floating_point() and not is_finite(tensor)]
    memory.let_go(source)
    if broken:
        more = f" (and in {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise ValueError(f"{shown(source)}: holds NaN or infinity in {broken[0]}{more}; get an earlier or a sound file")


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite in float32. A sum tells at the speed of memory, but finite ones can overflow it."""
    return tensor.sum(dtype=torch.float32).isfinite().item() or tensor.float().isfinite().all().item()


def fingerprint(encoder: nn.Module) -> str:
    """Tells an encoder's weights from others: a hash of the shapes and of some values of its frozen matrices.

    Position embeddings, which are resampled to the input's size, are not among them, and neither the file's container
    nor what else it holds matters.
    """
    digest = hashlib.sha256()
    for name, weight in encoder.named_parameters():
        if name.endswith(".weight") and not weight.requires_grad:
            values = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED)]
            digest.update(f"{name} {tuple(weight.shape)} ".encode() + values.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def location(source: str | Path) -> str:
    """A path or URL as a checkpoint records it: good from any folder."""
    return str(source) if is_url(source) else os.path.abspath(source)


def read_network(source: str | Path) -> Trained:
    """A trained SAM2-UNeXT checkpoint: the arguments that build its network, its tensors, its encoders' files.

    The arguments come from the header that `save_network` writes or, in a file that the original program saved, from
    the shapes of the tensors. Raises OSError or ValueError, with the mend, for any other file.
    """
    return as_network(read(source), source)


def as_network(content: dict[str, Any], source: str | Path) -> Trained:
    """`read_network` of what was read from `source` already."""
    state = tensors(content)
    if not is_network(state):
        raise ValueError(
            f"{shown(source)}: is {describe(state)}; a trained checkpoint belongs here (SAM2-UNeXT-<epoch>.pth)"
        )
    if "format" in content:
        if content["format"] not in (1, FORMAT):
            raise ValueError(
                f"{shown(source)}: has format {shown(content['format'])[:20]}, this program reads {FORMAT}; update it"
            )
        network, encoders = content.get("network"), content.get("encoders", {})
        known = isinstance(network, dict) and network.keys() <= NETWORK.keys() and isinstance(encoders, dict)
        known = known and all(isinstance(value, NETWORK[key]) for key, value in network.items())
        if not known or not all(0 < network.get(side, 1) <= LARGEST_SIDE for side in ("size", "aux_size")):
            raise ValueError(f"{shown(source)}: its header does not say which network it holds; the file is damaged")
        records = [encoders[option] for option in encoders if option in ("hiera_path", "dinov2_path")]
        if len(records) < len(encoders) or not all(
            isinstance(record, dict) and record.keys() == {"source", "fingerprint"} for record in records
        ):
            raise ValueError(f"{shown(source)}: its header does not say which encoders it needs; the file is damaged")
        return Trained(network, state, encoders)
    network: dict[str, Any] = {"sam2": trunk_size(state, "sam."), "aux": "none"}
    if any(key.startswith("dino.") for key in state):
        network["aux"] = dinov2_name(state, "dino.model.")
        positions = state.get("dino.model.pos_embed")
        if network["aux"] and positions is not None and positions.ndim == 3:
            patches = positions.shape[1] - ("reg4" not in network["aux"])  # less the class token
            network["aux_size"] = round(max(0, patches) ** 0.5) * DINOV2_PATCH
    if None in network.values():
        raise ValueError(
            f"{shown(source)}: a SAM2-UNeXT checkpoint without a header, and its encoders are not known ones"
        )
    return Trained(network, state, {})


def network_content(model: nn.Module, whole: bool) -> dict[str, Any]:
    """A SAM2UNeXT as files hold it: a header, and all tensors or only the trained ones with the encoders' sources."""
    return {
        "format": FORMAT,
        "network": model.network,
        "encoders": {} if whole else model.encoders,
        "state_dict": model.state_dict() if whole else model.trained_state(),
    }


def save_network(path: str | Path, model: nn.Module, epoch: int) -> None:
    """Writes a trained SAM2UNeXT: small where its encoders came from files, else whole. Raises OSError."""
    save(path, network_content(model, whole=not model.encoders) | {"epoch": epoch})


def save(path: str | Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """torch.save into a file that is under its final name only when it is whole; the one before it goes to `previous`.

    At every moment at least one of both is whole, once there was one. Raises OSError that names the file.
    """
    path = Path(path)
    try:
        with files.replacing(path) as file:
            torch.save(content, file)
            if previous and path.exists():
                os.replace(path, previous)
    except RuntimeError as error:  # that torch's zip writer makes of what the file says, such as that the disk is full
        said = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{shown(path)}: cannot be written: {reason(said)}") from error
