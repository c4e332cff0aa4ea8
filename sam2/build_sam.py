"""Builds the image encoder trunk of SAM 2 from the configuration files in sam2_configs/."""

from contextlib import nullcontext
from pathlib import Path

import hydra
import torch

from sam2.modeling.backbones.hieradet import Hiera

CONFIG_DIR = Path(__file__).resolve().parent.parent / "sam2_configs"
CONFIGS = {"tiny": "sam2_hiera_t", "small": "sam2_hiera_s", "base_plus": "sam2_hiera_b+", "large": "sam2_hiera_l"}


def build_sam2_trunk(size: str, device: str | torch.device | None = None) -> Hiera:
    """The Hiera trunk of SAM 2 with random weights, in eval mode, on `device` (None: torch's default device).

    `size` is one of CONFIGS; another raises ValueError. Nothing else of SAM 2 (memory attention, mask decoder, the neck
    of the image encoder) is built. Parameter names are those of published checkpoints below `image_encoder.trunk.`.
    """
    if size not in CONFIGS:
        raise ValueError(f"no SAM 2 trunk is called {size!r}: choose one of {', '.join(CONFIGS)}")
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.2"):  # restores hydra's global state on leaving
        config = hydra.compose(config_name=CONFIGS[size])
    with torch.device(device) if device else nullcontext():
        trunk = hydra.utils.instantiate(config.trunk, _convert_="all")
    return trunk.eval()
