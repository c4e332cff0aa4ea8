"""SAM2-UNeXT: binary segmentation with two frozen encoders, a dense glue layer and a U-Net decoder.

Xiong et al., "SAM2-UNeXT", arXiv:2508.03566. Shapes: B batch, H W height and width of the input, C channels of a map,
A side of the auxiliary encoder's input, P its patch size (14 for DINOv2).
"""

import inspect
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dataset import image_tensor
from sam2.build_sam import build_sam2_trunk
from unext import checkpoint, weights
from unext.errors import InputError
from unext.hub import Hub
from unext.images import for_network, upright

WIDTH = 128  # channels of the decoder's maps
ADAPTER_WIDTH = 32
NOT_RECORDED = ("self", "__class__", "checkpoint_path", "dinov2_path", "precision", "allow_sam2_1")  # by a checkpoint
LAYOUT = torch.channels_last  # of weights and activations; checkpoints are saved contiguous


class Adapter(nn.Module):
    """A small trained bottleneck before a frozen block of the trunk: block(x + bottleneck(x))."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.prompt_learn = nn.Sequential(
            nn.Linear(block.dim, ADAPTER_WIDTH), nn.GELU(), nn.Linear(ADAPTER_WIDTH, block.dim), nn.GELU()
        )
        for layer in self.prompt_learn:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + self.prompt_learn(x))


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each followed by BatchNorm and ReLU; keeps the map's size."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        middle = in_channels // 2
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, middle, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Up(nn.Module):
    """A decoder step: concatenates the deeper map with the skip map of the same size, upsamples by two, convolves."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = DoubleConv(in_channels, out_channels)

    def forward(self, deeper: Tensor, skip: Tensor | None = None) -> Tensor:
        """Maps (B, C, H, W) -> (B, C', 2H, 2W)."""
        x = deeper if skip is None else torch.cat([deeper, skip], dim=1)
        return self.conv(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))


def glue(sam: Tensor, aux: Tensor | None, align: nn.Module | None, reduce: nn.Module) -> Tensor:
    """The dense glue layer at one scale: reduce(cat[sam, resize(align(aux))]), or reduce(sam) without an `aux`."""
    if aux is not None:
        aux = F.interpolate(align(aux), size=sam.shape[-2:], mode="bilinear", align_corners=False)
        sam = torch.cat([sam, aux], dim=1)
    return reduce(sam)


class SAM2UNeXT(nn.Module, Hub):
    """Maps normalised images (B, 3, H, W), sides multiples of 32, to logits (B, 1, H, W) of the foreground.

    The encoders are frozen and stay in eval mode; adapters, glue and decoder are trained. The keys of the state dict
    are those of the original program's checkpoints.
    """

    def __init__(
        self,
        checkpoint_path: str | Path | None = None,  # SAM 2's weights, a file or URL; None: random
        dinov2_path: str | Path | None = None,  # the auxiliary encoder's weights, likewise
        *,
        sam2: str = "large",  # size of the trunk: tiny, small, base_plus, large
        aux: str = "vit_large_patch14_dinov2",  # a timm model that provides feature maps, or "none"
        aux_size: int = 448,  # side in pixels of the auxiliary encoder's input
        size: int = 1024,  # side in pixels to which `predict` resizes images; `forward` accepts any
        precision: torch.dtype = torch.float32,  # see `set_precision`
        allow_sam2_1: bool = False,  # accept SAM 2.1's weights too
    ):
        """Raises InputError for unsuitable arguments and files, OSError for files that cannot be read."""
        arguments = locals()
        super().__init__()
        self.config = {name: value for name, value in arguments.items() if name not in NOT_RECORDED}
        if size < 32 or size % 32 or aux_size < 1:
            raise InputError(f"size {size} must be a multiple of 32, aux_size {aux_size} at least 1")
        self.size, self.aux_size = size, aux_size

        # Encoders from files are built on the meta device and cast before loading, so their weights are in memory once.
        self.sam = build_sam2_trunk(sam2, device="meta" if checkpoint_path else None).requires_grad_(False)
        self.dino = None
        if aux != "none":
            self.dino = build_aux(aux, aux_size, device="meta" if dinov2_path else None).requires_grad_(False).eval()
        self.set_precision(precision)
        self.encoders: dict[str, dict[str, str]] = {}  # records of their files, for small checkpoints
        if self.dino is not None and dinov2_path:
            self.encoders["dinov2_path"] = weights.load_aux(self.dino.model, aux, dinov2_path)
        if checkpoint_path:
            self.encoders["hiera_path"] = weights.load_sam2(self.sam, checkpoint_path, allow_sam2_1)

        self.sam.blocks = nn.ModuleList(Adapter(block) for block in self.sam.blocks)
        channels = self.sam.channel_list[::-1]  # at 1/4, 1/8, 1/16, 1/32
        self.align1 = self.align2 = self.align3 = self.align4 = None
        if self.dino is not None:
            aux_channels = self.dino.feature_info.channels()[-1]
            self.align1, self.align2, self.align3, self.align4 = (nn.Conv2d(aux_channels, c, 1) for c in channels)
            channels = [2 * c for c in channels]
        self.reduce1, self.reduce2, self.reduce3, self.reduce4 = (nn.Conv2d(c, WIDTH, 1) for c in channels)

        self.up1, self.up2, self.up3 = (Up(2 * WIDTH, WIDTH) for _ in range(3))
        self.up4 = Up(WIDTH, WIDTH)
        self.head = nn.Conv2d(WIDTH, 1, 1)
        self.to(memory_format=LAYOUT)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, hiera_path: str | Path | None = None, dinov2_path: str | Path | None = None,
        *, precision: torch.dtype = torch.float32, download: bool = False,
    ) -> "SAM2UNeXT":  # fmt: skip
        """The trained network of a `SAM2-UNeXT-<epoch>.pth`, of this program or the original, in eval mode.

        A small checkpoint needs its encoders' files: those given, else the first in the usual places, else, with
        `download`, the published ones. For a whole checkpoint, which contains them, paths must point to the same.
        """
        trained = checkpoint.parse(checkpoint.read(path), path)
        paths: checkpoint.Paths = {"hiera_path": hiera_path, "dinov2_path": dinov2_path}
        if trained.encoders:
            paths = checkpoint.find_encoders(path, trained, paths, download)
        options = {k: option for k, option in inspect.signature(cls).parameters.items() if k not in NOT_RECORDED}
        wrong = [k for k, v in trained.config.items() if k not in options or not isinstance(v, options[k].annotation)]
        if wrong:
            problem = f"unknown, or of another type: {', '.join(map(repr, wrong))}; update the program"
            raise InputError(f"{path}: its network cannot be built: {problem}")
        try:
            # Without encoders' files, the network is built on meta and takes over the checkpoint's tensors. SAM 2.1 is
            # allowed here, since fingerprints are compared later.
            with nullcontext() if any(paths.values()) else torch.device("meta"):
                model = cls(*paths.values(), **trained.config, precision=precision, allow_sam2_1=True)
        except InputError as error:
            raise InputError(f"{path}: its network cannot be built: {error}") from error
        checkpoint.load_trained(model, path, trained)
        return model.to(memory_format=LAYOUT).eval()

    def set_precision(self, dtype: torch.dtype) -> "SAM2UNeXT":
        """Makes the network compute in `dtype` (float32, bfloat16, float16) by autocast; returns itself.

        The frozen matrices are cast once, with the same results as casting them at each use; trained parameters, norms,
        position embeddings and logits stay float32. Raises InputError if they have been cast to another type before.
        """
        frozen = [m for m in self.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and not m.weight.requires_grad]
        if others := {layer.weight.dtype for layer in frozen} - {torch.float32, dtype}:
            raise InputError(f"the encoders are in {others.pop()} already: build the network with precision={dtype}")
        self.precision = dtype
        for layer in frozen:
            layer.to(dtype)
        return self

    def train(self, mode: bool = True) -> "SAM2UNeXT":
        """Sets the mode of the trained modules; the frozen encoders stay in eval mode."""
        super().train(mode)
        self.sam.eval()  # its adapters compute the same in each mode
        if self.dino is not None:
            self.dino.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.precision, enabled=self.precision != torch.float32):
            aux = self.encode_aux(x)  # (B, C, A/P, A/P) or None
            x1, x2, x3, x4 = self.sam(x)  # (B, C, H/4, W/4) to (B, C, H/32, W/32)
            x1 = glue(x1, aux, self.align1, self.reduce1)  # (B, 128, H/4, W/4)
            x2 = glue(x2, aux, self.align2, self.reduce2)
            x3 = glue(x3, aux, self.align3, self.reduce3)
            x4 = glue(x4, aux, self.align4, self.reduce4)  # (B, 128, H/32, W/32)

            x = self.up4(x4)  # (B, 128, H/16, W/16)
            x = self.up3(x, x3)
            x = self.up2(x, x2)
            x = self.up1(x, x1)  # (B, 128, H/2, W/2)
            logits = self.head(x)  # (B, 1, H/2, W/2)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)

    @torch.no_grad()
    def encode_aux(self, x: Tensor) -> Tensor | None:
        """The auxiliary encoder's last map (B, C, A/P, A/P) of the resized images; None without such an encoder."""
        if self.dino is None:
            return None
        x = F.interpolate(x, size=(self.aux_size, self.aux_size), mode="bilinear", align_corners=False)
        return self.dino(x)[-1]

    def predict(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """The foreground probability of each pixel of an image: float32 (H, W) in [0, 1], computed in eval mode.

        `image` is a PIL image, or a uint8 array (H, W, 3) in RGB or (H, W), of any size. It is first converted to what
        viewers show: upright, in sRGB, on white where it is transparent. The result has the orientation of the stored
        pixels. Raises InputError for other types.
        """
        photo, turn_back = upright(image)
        probability = self._probability(photo)
        return probability if turn_back is None else np.array(Image.fromarray(probability).transpose(turn_back))

    def cutout(self, image: Image.Image | np.ndarray) -> Image.Image:
        """The object of an image as test.py cuts it out: upright, RGBA, with its ICC profile. See `predict`."""
        from unext.cutout import make_cutout  # imports OpenCV

        photo, _ = upright(image)
        return make_cutout(photo, self._probability(photo))

    @torch.no_grad()
    def _probability(self, photo: Image.Image) -> np.ndarray:  # of an upright image
        training = self.training
        x = image_tensor(for_network(photo), self.size).to(next(self.parameters()))  # device and type
        try:
            logits = self.eval()(x[None])[0]
        finally:
            self.train(training)
        return probability_map(logits, (photo.height, photo.width)).cpu().numpy()


def build_aux(name: str, size: int, device: str | None = None) -> nn.Module:
    """timm's feature extractor `name` with random weights; it returns the last feature map, without the final norm.

    It is built on `device` (None: torch's default), but on the CPU instead of meta if it has non-persistent buffers,
    which no file can fill. Raises InputError if timm has no such model, or if `size` (pixels) is not a multiple of its
    patch size.
    """
    if not timm.is_model(name):
        raise InputError(f"timm has no model called {name!r}; DINOv2 is vit_{{small,base,large,giant}}_patch14_dinov2")
    try:
        sized = {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}  # transformers
        with torch.device(device) if device else nullcontext():
            net = timm.create_model(name, features_only=True, feature_cls="getter", out_indices=(-1,), **sized)
    except (RuntimeError, AttributeError, AssertionError) as error:
        raise InputError(f"timm's {name} provides no feature maps at {size} px: {error}") from error
    patch = net.feature_info.reduction()[-1]
    if size % patch:
        raise InputError(f"the auxiliary size {size} is not a multiple of {name}'s patch size, {patch} px")
    complete = {key for key, _ in net.named_buffers()} <= net.state_dict().keys()  # no file has the others
    return net if complete or not next(net.parameters()).is_meta else build_aux(name, size, "cpu")


def probability_map(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (1, H, W) resized bilinearly to `size` (height, width), then a sigmoid: float32 (height, width)."""
    logits = F.interpolate(logits[None].float(), size=size, mode="bilinear", align_corners=False)
    return logits.sigmoid_()[0, 0]  # in place, for images of hundreds of megapixels


def stretch(probability: Tensor) -> Tensor:
    """A map in [0, 1] stretched to the full range: uint8 0 to 255, or 254 if the range is small, rounded down."""
    low, high = probability.aminmax()
    return (probability - low).div_(high - low + 1e-8).mul_(255).to(torch.uint8)
