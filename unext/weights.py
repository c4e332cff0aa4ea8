"""Files of weights: reading them safely, telling what they contain, loading modules from them.

Reading never runs code from a file (torch's `weights_only`, safetensors) and maps large files instead of copying them.
"""

import hashlib
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from unext.download import TRUNK_FILES, address, fetch, is_url
from unext.errors import InputError, is_out_of_memory, reason
from unext.files import listing

TRUNK = "image_encoder.trunk."  # prefix of the trunk's keys in a SAM 2 checkpoint
TRUNK_SIZES = {(96, 12): "tiny", (96, 16): "small", (112, 24): "base_plus", (144, 48): "large"}  # by (width, blocks)
DINOV2_SIZES = {384: "small", 768: "base", 1024: "large", 1536: "giant"}  # by width
PATCHES = "patch_embed.proj.weight"  # of each encoder
NETWORK = "sam.blocks.0.prompt_learn.0.weight"  # only SAM2-UNeXT has it
FOREIGN = {  # the kind of a file with this key
    "encoder.layer.0.layer_scale1.lambda1": "DINOv2 in the format of Hugging Face's transformers",
    "vision_encoder.backbone.patch_embed.projection.weight": "SAM 2 in the format of Hugging Face's transformers",
    "blocks.0.0.ls1.gamma": "a training checkpoint of Meta's DINOv2",  # whose blocks are in chunks
}
SAM2_1_KEY = "no_obj_embed_spatial"  # only SAM 2.1 checkpoints have it
DINOV2_PATCH = 14
SAMPLED = 64  # values of each matrix in a fingerprint, about
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # dtypes that are converted


def read(source: str | Path) -> dict[str, Any]:
    """The content of a file of weights. Raises OSError or InputError that names the file and what is wrong with it."""
    path = fetch(source)
    try:
        return parse(path)
    except pickle.UnpicklingError:
        problem = "is not a file of weights, or is a pickle with code, none of which was run"
    except Exception as error:  # the readers raise many types for damaged files
        if isinstance(error, PermissionError) or is_out_of_memory(error):
            raise
        problem = f"is truncated, damaged or not weights ({reason(error)}); download the file again"
    if is_url(source):
        path.unlink()  # a truncated download; the next start downloads it again
    raise InputError(f"{source}: {problem}")


def parse(path: Path) -> dict[str, Any]:
    """The content of safetensors or torch.save's file, recognised by its first bytes. Raises many types of errors."""
    with open(path, "rb") as file:
        start = file.read(512)
    if not start or start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError("it is a web page" if start else "it is empty")
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about files that are refused anyway
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=start.startswith(b"PK"))
    if not isinstance(content, dict):
        raise ValueError(f"it contains a {type(content).__name__}")
    return content


def tensors(content: dict[str, Any], *anchors: str) -> dict[str, Tensor]:
    """The tensors of a file's network by key, without the wrappers that other programs add.

    Looks in all nested dicts for a known key or one of `anchors`, after any prefix, which is removed. Of several such
    networks the largest is taken, of equal ones the first; without a known key, the largest dict.
    """
    states, containers = {}, [content]
    for container in containers:  # the loop appends the dicts that it finds, that of "model" first
        if isinstance(container, dict) and id(container) not in states:  # a pickle can contain itself
            states[id(container)] = {
                key.replace("_orig_mod.", ""): value  # torch.compile's prefix
                for key, value in container.items()
                if isinstance(key, str) and isinstance(value, Tensor)
            }
            containers += [container.get("model"), *container.values()]
    for anchor in (NETWORK, TRUNK + PATCHES, *FOREIGN, *anchors):
        ends = [(state, key) for state in states.values() for key in state if f".{key}".endswith(f".{anchor}")]
        if ends:
            return max((below(state, key.removesuffix(anchor)) for state, key in ends), key=len)
    return max(states.values(), key=len)


def below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a state dict whose keys start with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def trunk_size(state: dict[str, Tensor], prefix: str) -> str | None:
    """The size of the Hiera whose keys start with `prefix`: tiny, small, base_plus, large, or None."""
    patches = state.get(prefix + PATCHES)
    blocks = {key.removeprefix(prefix).split(".")[1] for key in state if key.startswith(prefix + "blocks.")}
    return TRUNK_SIZES.get((*patches.shape[:1], len(blocks))) if patches is not None else None


def dinov2_name(state: dict[str, Tensor], prefix: str = "") -> str | None:
    """timm's name of the DINOv2 whose keys start with `prefix`, or None for another network."""
    patches = state.get(prefix + PATCHES)
    if patches is None or prefix + "blocks.0.ls1.gamma" not in state or patches.shape[2:] != 2 * (DINOV2_PATCH,):
        return None
    size = DINOV2_SIZES.get(patches.shape[0])
    registers = "reg4_" if prefix + "reg_token" in state else ""
    return size and f"vit_{size}_patch14_{registers}dinov2"


def describe(state: dict[str, Tensor]) -> str:
    """What a file contains, for messages."""
    if NETWORK in state:
        return "a trained SAM2-UNeXT checkpoint, which goes to test.py --checkpoint"
    if TRUNK + PATCHES in state:
        version = "2.1" if SAM2_1_KEY in state else "2"
        return f"a SAM {version} checkpoint of size {trunk_size(state, TRUNK) or 'unknown'}"
    if name := dinov2_name(state):
        return f"the DINOv2 {name}"
    for key, kind in FOREIGN.items():
        if key in state:
            return kind
    return f"another network's (keys such as {next(iter(state))})" if state else "a file without named tensors"


def load_sam2(trunk: nn.Module, source: str | Path, allow_sam2_1: bool = False) -> dict[str, str]:
    """Loads a Hiera trunk from a SAM 2 checkpoint and returns its `record`. Raises OSError or InputError."""
    state = tensors(read(source))
    kind, size, needed = f"{source}: is {describe(state)}", trunk_size(state, TRUNK), trunk_size(trunk.state_dict(), "")
    file = TRUNK_FILES[needed]
    if TRUNK + PATCHES not in state:
        raise InputError(f"{kind}; SAM 2's {file} belongs here{address(file)}")
    if size != needed:
        raise InputError(f"{kind}, but --sam2 {needed} needs {file}" + (f"; or give --sam2 {size}" if size else ""))
    if SAM2_1_KEY in state and not allow_sam2_1:
        raise InputError(f"{kind}, which has other weights; give SAM 2's {file}, or --allow_sam2_1 to accept this file")
    return load(trunk, below(state, TRUNK), file, source, lambda key: re.sub(r"^(blocks[.]\d+[.])", r"\1block.", key))


def load_aux(net: nn.Module, name: str, source: str | Path) -> dict[str, str]:
    """Loads timm's feature extractor `name` from a file and returns its `record`. Raises OSError or InputError."""
    expected = net.state_dict()
    state = tensors(read(source), next(key for key in expected if key.endswith(".weight")))
    architecture, dinov2 = name.split(".")[0], dinov2_name(state)
    kind = f"{source}: is {describe(state)}"
    if dinov2 and dinov2 != architecture:
        raise InputError(f"{kind}; give --aux {dinov2} or {name}'s file")
    if {NETWORK, TRUNK + PATCHES, *FOREIGN} & state.keys():
        raise InputError(f"{kind}; the weights of timm's {name} belong here{address(f'{architecture}.safetensors')}")
    # timm's own filter renames keys and resamples the position embedding.
    if filter_fn := getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None):
        try:
            state = filter_fn(state, net)
        except Exception as error:  # it raises many types for other networks' tensors
            raise InputError(f"{kind}, not timm's {name}") from error
    modules = {key.split(".")[0] for key in expected}  # a published file may have more, such as a classifier
    state = {key: value for key, value in state.items() if key.split(".")[0] in modules}
    return load(net, state, name, source, "model.{}".format)


def load(
    encoder: nn.Module, state: dict[str, Tensor], name: str, source: str | Path, rename: Callable[[str], str]
) -> dict[str, str]:
    """Loads an encoder; returns what a checkpoint records of it. `rename` gives the keys that it has in SAM2UNeXT."""
    expected = encoder.state_dict()
    check_state(expected, state, source)
    fill(encoder, state)
    identity = fingerprint({rename(key): state[key] for key in expected})
    return {"name": name, "path": os.path.abspath(fetch(source)), "fingerprint": identity}


def fill(module: nn.Module, state: dict[str, Tensor], strict: bool = True) -> None:
    """Loads a state dict. A module on the meta device takes over the tensors, so a mapped file is not copied."""
    targets = module.state_dict()
    is_meta = any(tensor.is_meta for tensor in targets.values())
    if is_meta:
        # If any tensor is converted, all are copied, so that the file does not stay mapped for the others.
        convert = any(tensor.dtype != targets[key].dtype for key, tensor in state.items())
        state = {key: tensor.to(targets[key].dtype, copy=convert) for key, tensor in state.items()}
    module.load_state_dict(state, strict=strict, assign=is_meta)


def check_state(expected: dict[str, Tensor], state: dict[str, Tensor], source: str | Path) -> None:
    """Raises InputError unless `state` has the expected keys, shapes and dtypes, and finite values."""
    problems = [f"lacks {key}" for key in expected if key not in state]
    problems += [f"has an unknown {key}" for key in state if key not in expected]
    for key in (key for key in expected if key in state):
        tensor, target = state[key], expected[key]
        if tensor.layout != torch.strided or tensor.is_meta:
            problems.append(f"{key} is not a dense tensor")
        elif tensor.shape != target.shape:
            problems.append(f"{key} is {tuple(tensor.shape)} instead of {tuple(target.shape)}")
        elif tensor.dtype not in (FLOATS if target.is_floating_point() else (target.dtype,)):
            problems.append(f"{key} is {tensor.dtype} instead of {target.dtype}".replace("torch.", ""))
    if problems:
        raise InputError(f"{source}: does not fit the network: {listing(problems)}")
    if broken := [key for key, tensor in state.items() if not tensor.float().isfinite().all()]:
        raise InputError(f"{source}: has NaN or infinity in {listing(broken)}; train or download the file again")


def fingerprint(state: dict[str, Tensor]) -> str:
    """Identifies an encoder's weights: a hash of the shapes and some values of the tensors called `*.weight`.

    `state` has the keys of SAM2UNeXT.sam or .dino in its order. The position embedding, which is resampled, is omitted.
    """
    digest = hashlib.sha256()
    for key, weight in state.items():
        if key.endswith(".weight"):
            values = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED)]
            digest.update(f"{key} {tuple(weight.shape)} ".encode() + values.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
