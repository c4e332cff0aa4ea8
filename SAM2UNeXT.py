"""SAM2-UNeXT: binary segmentation with two frozen encoders, a dense glue layer and a U-Net decoder.

Xiong et al., "SAM2-UNeXT", arXiv:2508.03566. Shapes: B batch, H W height and width of the input, C channels of a map,
A side of the auxiliary encoder's input, P its reduction (14 for DINOv2).
"""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import checkpoint
import files
import memory
from dataset import image_tensor
from sam2.build_sam import build_sam2_trunk
from sam2.modeling.backbones.utils import joined, portions_of, sums_as_published

WIDTH = 128  # channels of the decoder's maps
ADAPTER_WIDTH = 32
LET_GO_AFTER = 5 * 10**7  # values read from mapped files, 200 MB of them
TRIM_FROM = 2**20  # pixels of a batch; for fewer, getting memory anew takes a fifth of a small network's step


class Adapter(nn.Module):
    """A block of the trunk with a small trained bottleneck before it, added to the block's input."""

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
    """Twice 3x3 convolution, BatchNorm, ReLU; the map keeps its size."""

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
        if self.training or torch.is_grad_enabled():
            return self.double_conv(x)
        for weight, bias in self.folded():
            x = F.conv2d(x, weight, bias, padding=1).relu_()
        return x

    def folded(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of both convolutions with BatchNorm, which is linear in eval mode, taken into them."""
        layers = []
        for conv, norm in (self.double_conv[:2], self.double_conv[3:5]):
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            layers.append((conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale))
        return layers


class Up(nn.Module):
    """One step of the decoder: the deeper map, with the skip of its size behind it, twice as large and convolved."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = DoubleConv(in_channels, out_channels)

    def forward(self, deeper: Tensor, skip: Tensor | None = None, head: nn.Module | None = None) -> Tensor:
        """Maps (B, C, H, W) -> (B, C', 2H, 2W), passed through `head`, which must act on each pixel alone."""
        maps = [deeper] if skip is None else [deeper, skip]
        head = head or nn.Identity()
        height, enlarged = 2 * deeper.shape[2], 4 * sum(map_[0].numel() for map_ in maps)
        if self.training or portions_of(len(deeper) * enlarged, deeper.device) == 1:
            x = F.interpolate(torch.cat(maps, dim=1), scale_factor=2, mode="bilinear", align_corners=True)
            return head(self.conv(x))
        layers, step = self.conv.folded(), math.ceil(height / portions_of(enlarged, deeper.device))
        strips = (
            head(convolved_rows([map_[i : i + 1] for map_ in maps], layers, top, min(top + step, height)))
            for i in range(len(deeper))
            for top in range(0, height, step)
        )
        rows = joined((strip[0].permute(1, 2, 0) for strip in strips), len(deeper) * height)  # (B * 2H, 2W, C')
        return rows.unflatten(0, (-1, height)).permute(0, 3, 1, 2)


def convolved_rows(maps: list[Tensor], layers: list[tuple[Tensor, Tensor]], top: int, bottom: int) -> Tensor:
    """The rows from `top` to before `bottom` of what comes out of a step of the decoder.

    `layers` are weight and bias of its 3x3 convolutions, each with a ReLU behind it; they see the maps (B, C, H, W),
    one behind the other and bilinearly twice as large.
    """
    *before, (weight, bias) = layers
    above, below = max(top - 1, 0), min(bottom + 1, 2 * maps[0].shape[2])
    x = convolved_rows(maps, before, above, below) if before else upsampled_rows(maps, above, below, weight.dtype)
    if below - above < bottom - top + 2:  # a convolution sees zeros around the map
        x = F.pad(x, (0, 0, above - top + 1, bottom + 1 - below))
    return F.conv2d(x, weight, bias, padding=(0, 1)).relu_()


def upsampled_rows(maps: list[Tensor], top: int, bottom: int, dtype: torch.dtype) -> Tensor:
    """Those rows of torch.cat(maps, dim=1), (B, C, H, W), made twice as large bilinearly with aligned corners."""
    _, _, H, W = maps[0].shape
    position = torch.arange(top, bottom, device=maps[0].device) * ((H - 1) / (2 * H - 1))
    upper = position.long()
    lower = (upper + 1).clamp(max=H - 1)
    first, end = int(upper[0]), int(lower[-1]) + 1
    x = torch.cat([map_[:, :, first:end] for map_ in maps], dim=1).to(dtype).permute(0, 2, 3, 1)  # (B, rows, W, C)
    x = torch.lerp(x[:, upper - first], x[:, lower - first], (position - upper).to(dtype)[:, None, None])
    return F.interpolate(x.permute(0, 3, 1, 2), size=(bottom - top, 2 * W), mode="bilinear", align_corners=True)


class SAM2UNeXT(nn.Module):
    """Normalised images (B, 3, H, W), sides multiples of 32, to logits (B, 1, H, W) of the foreground.

    The encoders are frozen and stay in eval mode; adapters, glue and decoder train. The state dict has the keys of the
    original program's checkpoints.
    """

    def __init__(
        self,
        checkpoint_path: str | Path | None = None,  # SAM 2's weights: a file or URL; None: random
        dinov2_path: str | Path | None = None,  # the auxiliary encoder's weights, likewise
        *,
        sam2: str = "large",  # the trunk: tiny, small, base_plus, large
        aux: str = "vit_large_patch14_dinov2",  # a timm model with feature maps, or "none"
        aux_size: int = 448,  # side in pixels at which the auxiliary encoder sees the picture
        size: int = 1024,  # side to which `predict` resizes pictures; `forward` takes any
        allow_sam2_1: bool = False,  # take a SAM 2.1 trunk too
    ):
        """Raises ValueError for arguments that do not fit; what the functions of checkpoint.py raise for files."""
        super().__init__()
        if size < 32 or size % 32:
            raise ValueError(f"the size {size} is no multiple of 32")
        self.network = {"sam2": sam2, "aux": aux, "aux_size": aux_size, "size": size}  # builds the same network again
        self.size = size
        self.aux_size = aux_size

        # What a file fills is built on the meta device, without memory or random values.
        self.sam = build_sam2_trunk(sam2, device=None if checkpoint_path is None else "meta")
        if checkpoint_path is not None:
            checkpoint.load_sam2(self.sam, checkpoint_path, allow_sam2_1)
        self.sam.requires_grad_(False)
        self.sam.blocks = nn.ModuleList(Adapter(block) for block in self.sam.blocks)
        channels = self.sam.channel_list[::-1]  # of the maps at 1/4, 1/8, 1/16, 1/32

        self.dino = None
        if aux != "none":
            self.dino = build_aux(aux, aux_size, device=None if dinov2_path is None else "meta")
            if dinov2_path is not None:
                checkpoint.load_aux(self.dino.model, aux.split(".")[0], dinov2_path)
            self.dino.requires_grad_(False).eval()
            aux_channels = self.dino.feature_info.channels()[-1]
            self.align1, self.align2, self.align3, self.align4 = (nn.Conv2d(aux_channels, c, 1) for c in channels)
        widths = [c if self.dino is None else 2 * c for c in channels]
        self.reduce1, self.reduce2, self.reduce3, self.reduce4 = (nn.Conv2d(c, WIDTH, 1) for c in widths)

        self.up1, self.up2, self.up3 = (Up(2 * WIDTH, WIDTH) for _ in range(3))
        self.up4 = Up(WIDTH, WIDTH)
        self.head = nn.Conv2d(WIDTH, 1, 1)

        self.precision = torch.float32
        # Where the frozen weights lie, so that a checkpoint can do without them; empty where one encoder is random.
        self.encoders: dict[str, dict[str, str]] = {}
        sources = [checkpoint_path] if self.dino is None else [checkpoint_path, dinov2_path]
        if None not in sources:
            for (option, encoder), source in zip(self.frozen().items(), sources, strict=True):
                fingerprint = checkpoint.fingerprint(encoder)
                self.encoders[option] = {"source": checkpoint.location(source), "fingerprint": fingerprint}
                self.let_go()

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, hiera_path: str | Path | None = None, dinov2_path: str | Path | None = None
    ) -> "SAM2UNeXT":
        """The trained network of a `SAM2-UNeXT-<epoch>.pth`, of this program or the original, in eval mode.

        A small checkpoint takes its encoders from the files that it was trained with, or from those given here. A whole
        one needs none; where both are given, they must be its own. Raises OSError or ValueError, with the mend, where
        a file is missing, damaged or another one.
        """
        trained = checkpoint.read_network(path)
        sources = {"hiera_path": hiera_path, "dinov2_path": dinov2_path}
        for option, record in trained.encoders.items():
            sources[option] = sources[option] or record["source"]
        whole = not any(sources.values())
        try:
            with torch.device("meta") if whole else nullcontext():
                model = cls(*sources.values(), **trained.network, allow_sam2_1=True)  # the fingerprints decide
            if whole and not is_told_by_state(model):
                model = cls(**trained.network)
        except OSError as error:
            raise OSError(
                f"{error}; {files.shown(path)} holds what was trained and needs its encoders too: "
                "say with --hiera_path and --dinov2_path where they are"
            ) from error
        except ValueError as error:
            problem = "its encoders make" if any(sources.values()) else "its header describes"
            raise ValueError(f"{files.shown(path)}: {problem} no network that can be built: {error}") from error
        model.load_trained(path, trained)
        return model.eval()

    def load_trained(self, path: str | Path, trained: checkpoint.Trained) -> None:
        """Takes over the weights of a checkpoint, `trained`, that was read from `path`.

        Raises ValueError, with the mend, where it does not fit or was trained with other encoders than this network's.
        """
        small = bool(trained.encoders)
        checkpoint.check_state(self.trained_state() if small else self.state_dict(), trained.state, path)
        found = {option: record["fingerprint"] for option, record in self.encoders.items()}
        if small:
            found = found or self.fingerprints()
        checkpoint.fill(self, trained.state, strict=not small)
        # Random encoders give way to those of a whole file, encoders from files must be its own.
        if small:
            expected = {option: record["fingerprint"] for option, record in trained.encoders.items()}
        else:
            expected = self.fingerprints() if found else {}
        for option in found:
            if found[option] != expected.get(option):
                ours, theirs = (e[option]["source"] if option in e else None for e in (self.encoders, trained.encoders))
                mend = (
                    f"give {files.shown(theirs)}"
                    if theirs
                    else "it holds its encoders itself; give random for both, or no path"
                )
                ours = files.shown(ours or "random")
                raise ValueError(
                    f"{files.shown(path)}: was trained with another encoder than --{option} {ours}; {mend}"
                )

    def let_go(self) -> None:
        """Takes what is mapped from the encoders' files out of memory; it comes back when it is next looked at."""
        memory.let_go(*(record["source"] for record in self.encoders.values()))

    def frozen(self) -> dict[str, nn.Module]:
        """The encoders by the option that names the file of each."""
        return {"hiera_path": self.sam} | ({} if self.dino is None else {"dinov2_path": self.dino})

    def fingerprints(self) -> dict[str, str]:
        """What tells each encoder's weights from others, by the same option."""
        return {option: checkpoint.fingerprint(encoder) for option, encoder in self.frozen().items()}

    def trained_state(self) -> dict[str, Tensor]:
        """The part of the state dict that training changes: adapters, glue, decoder and its BatchNorm statistics."""
        frozen = ("sam.", "dino.")
        return {k: v for k, v in self.state_dict().items() if ".prompt_learn." in k or not k.startswith(frozen)}

    def set_precision(self, dtype: torch.dtype) -> "SAM2UNeXT":
        """Computes in `dtype` (float32, bfloat16, float16) from now on, by autocast; returns itself.

        The frozen matrices are stored in `dtype` once and for all, which changes nothing else: autocast would cast them
        anew at each use. What trains, norms, position embeddings and logits stay float32, as does the arithmetic of
        BatchNorm inside its kernels.
        """
        self.precision = dtype
        converted = 0  # values since mapped files were let go
        for encoder in self.frozen().values():
            for module in encoder.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.requires_grad:
                    converted += module.weight.numel() if module.weight.dtype != dtype else 0
                    module.to(dtype)
                    if converted > LET_GO_AFTER:
                        self.let_go()
                        converted = 0
        if converted:
            self.let_go()
        return self

    def compile(self, **options: Any) -> None:
        """Has torch compile the network: one graph for each shape of the input, `options` as torch.compile has them.

        Raises ValueError for bf16 and fp16 on CPUs, where what torch 2.15 makes of the trunk gives NaN.
        """
        if self.head.weight.device.type == "cpu" and self.precision != torch.float32:
            raise ValueError("--compile: torch does it wrongly in bf16 and fp16 on CPUs; give --precision fp32 as well")
        super().compile(fullgraph=True, dynamic=False, **options)

    def train(self, mode: bool = True) -> "SAM2UNeXT":
        """Sets the mode of what trains; the frozen encoders stay in eval mode."""
        super().train(mode)
        self.sam.eval()  # adapters act alike in both modes
        if self.dino is not None:
            self.dino.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.precision, enabled=self.precision != torch.float32):
            aux_map = self.encode_aux(x)  # (B, C, A/P, A/P) or None
            trim_for(x)
            x1, x2, x3, x4 = self.sam(x)  # (B, C, H/4, W/4) to (B, C, H/32, W/32)
            trim_for(x)
            x1 = self.glue(x1, aux_map, "1")  # (B, 128, H/4, W/4)
            x2 = self.glue(x2, aux_map, "2")
            x3 = self.glue(x3, aux_map, "3")
            x4 = self.glue(x4, aux_map, "4")  # (B, 128, H/32, W/32)

            x = self.up4(x4)  # (B, 128, H/16, W/16)
            x = self.up3(x, x3)
            x = self.up2(x, x2)
            logits = self.up1(x, x1, self.head)  # (B, 1, H/2, W/2)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)

    @torch.no_grad()
    def encode_aux(self, x: Tensor) -> Tensor | None:
        """The auxiliary encoder's last map of the images resized to its own size; None without such an encoder."""
        if self.dino is None:
            return None
        low = F.interpolate(x, size=(self.aux_size, self.aux_size), mode="bilinear", align_corners=False)
        return self.dino(low)[-1]

    def glue(self, sam_map: Tensor, aux_map: Tensor | None, level: str) -> Tensor:
        """The dense glue layer at one level: reduce(cat[sam map, resize(align(auxiliary map))]).

        1x1 convolutions commute with bilinear resizing, so that the auxiliary map may pass through reduce's right half
        times align at its own size: no wide map is made at the trunk's size.
        """
        reduce = getattr(self, "reduce" + level)
        if aux_map is None:
            return reduce(sam_map)
        align, size = getattr(self, "align" + level), sam_map.shape[-2:]
        if sums_as_published(sam_map):
            aligned = F.interpolate(align(aux_map), size=size, mode="bilinear", align_corners=False)
            return reduce(torch.cat([sam_map, aligned], dim=1))
        with torch.autocast(sam_map.device.type, enabled=False):
            for_sam, for_aux = reduce.weight.split([sam_map.shape[1], align.out_channels], dim=1)
            weight = for_aux.flatten(1) @ align.weight.flatten(1)  # (128, C), C channels of the auxiliary map
            bias = for_aux.flatten(1) @ align.bias
        aux = F.conv2d(aux_map, weight[..., None, None], bias)  # (B, 128, A/P, A/P)
        aux = F.interpolate(aux, size=size, mode="bilinear", align_corners=False)
        return F.conv2d(sam_map, for_sam, reduce.bias) + aux

    @torch.no_grad()
    def predict(self, picture: Image.Image | np.ndarray) -> np.ndarray:
        """The foreground probability of each pixel of one picture: (H, W) float32 in [0, 1].

        `picture` is a PIL picture, or uint8 RGB (H, W, 3), of any size; it is resized to `self.size` squared for the
        network. Call `eval()` first.
        """
        if not isinstance(picture, Image.Image):
            picture = Image.fromarray(picture)
        image = image_tensor(files.eight_bits(picture, "RGB"), self.size).to(self.head.weight.device)
        return probability_map(self(image[None])[0], (picture.height, picture.width)).cpu().numpy()


def trim_for(x: Tensor) -> None:
    """Gives memory back if `x` lies in the CPU's: malloc keeps up to 1.5 GB of what an encoder has let go."""
    if x.device.type == "cpu" and x[:, 0].numel() >= TRIM_FROM and not torch.compiler.is_compiling():
        memory.trim()


def build_aux(name: str, size: int, device: str | None = None) -> nn.Module:
    """timm's feature extractor of the model `name` with random weights, returning its last map alone, without norm.

    It lies on `device` (None: where torch makes tensors now); not on meta where a state dict lacks some of it.
    Raises ValueError where timm has no such model or `size` (pixels) is no multiple of its patches.
    """
    if not timm.is_model(name):
        raise ValueError(f"timm has no model called {name!r}; DINOv2 is vit_{{small,base,large,giant}}_patch14_dinov2")
    options: dict[str, Any] = {"features_only": True, "feature_cls": "getter", "out_indices": (-1,)}
    try:
        if timm.get_pretrained_cfg(name).fixed_input_size:  # transformers are built for one size, convolutions are not
            options["img_size"] = size
        with torch.device(device) if device else nullcontext():
            net = timm.create_model(name, pretrained=False, **options)
    except (RuntimeError, AttributeError, AssertionError) as error:
        raise ValueError(f"timm's {name} gives no feature maps at {size} px: {error}") from error
    patch = net.feature_info.reduction()[-1]
    if size % patch:
        raise ValueError(f"the auxiliary size {size} is no multiple of {name}'s patch, {patch} px")
    return net if device is None or is_told_by_state(net) else build_aux(name, size)


def is_told_by_state(module: nn.Module) -> bool:
    """Whether all tensors of a module stand in its state dict, so that one on the meta device can be filled."""
    return {name for name, _ in module.named_buffers()} <= module.state_dict().keys()


def probability_map(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (1, H, W) resized bilinearly to `size` (height, width), through a sigmoid: float32 in [0, 1], as large."""
    logits = F.interpolate(logits[None].float(), size=size, mode="bilinear", align_corners=False)
    return logits.sigmoid()[0, 0]


def stretch(probability: Tensor) -> Tensor:
    """A map in [0, 1] with its range stretched to all of 0 to 255: uint8, fractions cut off."""
    low, high = probability.aminmax()
    return ((probability - low) / (high - low + 1e-8) * 255).to(torch.uint8)
