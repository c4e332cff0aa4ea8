"""A trunk far smaller than SAM 2's smallest, for tests of everything around the network.

Importing this module adds it as a size: `--sam2 micro`. To build, train and save it takes a tenth of the time of the
tiny trunk. Golden figures and published key lists are tested on the real sizes.
"""

from hydra.core.config_store import ConfigStore

from sam2.build_sam import CONFIGS
from unext import download, weights

TRUNK = {
    "_target_": "sam2.modeling.backbones.hieradet.Hiera",
    "embed_dim": 16,
    "num_heads": 1,
    "stages": [1, 1, 2, 1],
    "window_spec": [8, 4, 6, 3],  # at 64 px, those of the last two stages need padding
    "global_att_blocks": [3],
    "window_pos_embed_bkg_spatial_size": [4, 4],
}

ConfigStore.instance().store(name="sam2_hiera_micro", node={"trunk": TRUNK})
CONFIGS["micro"] = "sam2_hiera_micro"
weights.TRUNK_SIZES[TRUNK["embed_dim"], sum(TRUNK["stages"])] = "micro"
download.TRUNK_FILES["micro"] = "sam2_hiera_micro.pt"
