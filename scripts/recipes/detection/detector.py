"""Mask R-CNN of torchvision on a body of timm or transformers, as a model of transformers.

Body (four stages) -> pyramid (strides 4, 8, 16, 32) -> FPN (and a fifth level by pooling) -> region proposals, boxes, masks.
As a model of transformers it is conditioned, folded, saved and loaded as any other is: `load_detector(path)`.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.format import Format, nhwc_to
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from transformers import (
    CONFIG_MAPPING,
    AutoBackbone,
    AutoConfig,
    AutoModelForInstanceSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from hf_specattn import register_architecture
from hf_specattn.architectures import ARCHITECTURES, MORE_ARCHITECTURES

from ..images.augmentation import IMAGENET_MEAN, IMAGENET_STD
from ..run.messages import one_line
from ..run.usable_model import ModelError, load_model

STRIDES = (4, 8, 16, 32)  # of the pyramid, in pixels
ROI_SIZE = 7  # side of what the box head reads of a region
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class DetectorError(ValueError):
    """The detector asked for cannot be built, loaded or conditioned; the message says what to do."""


class DetectorConfig(PreTrainedConfig):
    """Configuration of a [`Detector`]; the defaults are the published ones for COCO.

    Args:
        body: what `describe_body` returns.
        channels, strides: of the body's four feature maps, from fine to coarse; strides in pixels.
        fpn_channels: of every level of the pyramid.
        box_head_size: width of the two layers of the box head.
        mask_layers: channels of the convolutions of the mask head.
        anchor_sizes: of the five levels, in pixels of the image as the model reads it.
        min_size, max_size: images are resized so that the short side is `min_size`, and the long one at most `max_size`.
        image_mean, image_std: of the pixel values, in [0, 1].
    """

    model_type = "mask_rcnn"

    body: dict[str, Any] | None = None
    channels: list[int] | None = None
    strides: list[int] | None = None
    fpn_channels: int = 256
    box_head_size: int = 1024
    mask_layers: list[int] | tuple[int, ...] = (256, 256, 256, 256)
    anchor_sizes: list[int] | tuple[int, ...] = (32, 64, 128, 256, 512)
    min_size: int = 800
    max_size: int = 1333
    image_mean: list[float] | tuple[float, ...] = IMAGENET_MEAN
    image_std: list[float] | tuple[float, ...] = IMAGENET_STD


# --- the body --------------------------------------------------------------------------------------------------------


def describe_body(name: str, arguments: Mapping[str, Any], out_indices: Sequence[int] | None = None) -> dict[str, Any]:
    """Say what `build_body` builds: of timm where it knows the name, else of transformers.

    Args:
        name: a model of timm; a model type of transformers ("swin"); or a folder or repository with a configuration.
        arguments: for `timm.create_model`, or for the configuration.
        out_indices: of timm's blocks or stages, whose outputs are taken; None takes the last four.

    Raises:
        DetectorError: for a name that is nothing of that kind.
    """
    if timm.is_model(name):
        return {"timm": name, "arguments": dict(arguments), "out_indices": list(out_indices or (-4, -3, -2, -1))}
    if out_indices is not None:
        raise DetectorError(f"--out_indices is of timm's models, and timm {timm.__version__} has no {name}.")
    try:
        if name in CONFIG_MAPPING:
            config = AutoConfig.for_model(name, **arguments)
        else:
            config = AutoConfig.from_pretrained(name, **arguments)
    except (OSError, ValueError, TypeError) as error:
        raise DetectorError(
            f"--body {name}: neither a model of timm {timm.__version__} nor a model type or configuration of transformers "
            f"({one_line(error)})."
        ) from error
    config.out_features = config.stage_names[-4:] if hasattr(config, "stage_names") else None
    return {"transformers": config.to_diff_dict() | {"model_type": config.model_type}}


def build_body(body: Mapping[str, Any]) -> nn.Module:
    """Build a body of random weights.

    Raises:
        DetectorError: for what timm or transformers cannot build.
    """
    try:
        if "timm" in body:
            taken = tuple(body["out_indices"])
            return timm.create_model(body["timm"], features_only=True, out_indices=taken, **body["arguments"])
        return AutoBackbone.from_config(AutoConfig.for_model(**body["transformers"]))
    except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, KeyError, IndexError) as error:
        raise DetectorError(
            f"The body {body_name(body)} cannot be built ({one_line(error)}). It must give the features of "
            "four stages; change --body, --body_args or --out_indices."
        ) from error


def body_name(body: Mapping[str, Any]) -> str:
    """Its name in words."""
    return f"timm {body['timm']}" if "timm" in body else str(body["transformers"]["model_type"])


def features_of(body: nn.Module, images: Tensor) -> list[Tensor]:
    """The four feature maps, each `(batch, channels, height, width)`, of images `(batch, 3, height, width)`."""
    found = body(images)
    features = list(getattr(found, "feature_maps", found))
    if getattr(body, "output_fmt", None) == Format.NHWC:
        features = [nhwc_to(feature, Format.NCHW) for feature in features]
    return features


def detector_config(body: Mapping[str, Any], class_names: Sequence[str], **settings: Any) -> DetectorConfig:
    """Measure a body and return the configuration of a detector on it; draws no random number that counts.

    Raises:
        DetectorError: for a body that has not four stages, whose strides are powers of two, at any size of images.
    """
    with torch.random.fork_rng(devices=[]):
        module = build_body(body).eval()
    height, width = 128, 192
    try:
        with torch.no_grad():
            features = features_of(module, torch.zeros(1, 3, height, width))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise DetectorError(
            f"The body {body_name(body)} does not read images of {height} x {width} pixels ({one_line(error)}). A detector "
            "reads images of any size that 32 divides; take a body that does, such as XCiT of timm or swin of transformers."
        ) from error
    strides = [height / feature.shape[2] for feature in features]
    powers = all(math.log2(stride).is_integer() for stride in strides)
    if len(features) != 4 or not powers or any(width / f.shape[3] != stride for f, stride in zip(features, strides)):
        raise DetectorError(
            f"The body {body_name(body)} gives {len(features)} feature maps at strides {strides}; a detector takes four, "
            "whose strides are powers of two."
        )
    return DetectorConfig(
        body=dict(body),
        channels=[feature.shape[1] for feature in features],
        strides=[int(stride) for stride in strides],
        id2label=dict(enumerate(class_names)),
        label2id={name: number for number, name in enumerate(class_names)},
        **settings,
    )


# --- the detector ----------------------------------------------------------------------------------------------------


def to_stride(channels: int, stride: int, wanted: int) -> nn.Module:
    """What brings features from one stride to another, as in XCiT's detectors: transposed convolutions up, pooling down."""
    if stride <= wanted:
        return nn.MaxPool2d(wanted // stride) if stride < wanted else nn.Identity()
    layers: list[nn.Module] = []
    for step in range(int(math.log2(stride // wanted))):
        layers += [nn.BatchNorm2d(channels), nn.GELU()] if step else []
        layers.append(nn.ConvTranspose2d(channels, channels, 2, stride=2))
    return nn.Sequential(*layers)


class Backbone(nn.Module):
    """Body, pyramid and FPN: images `(batch, 3, height, width)` -> five levels by name, from fine to coarse."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        assert config.body is not None
        assert config.channels is not None
        assert config.strides is not None
        self.out_channels = config.fpn_channels  # torchvision asks for it
        self.body = build_body(config.body)
        rows = zip(config.channels, config.strides, STRIDES)
        self.pyramid = nn.ModuleList(to_stride(*row) for row in rows)
        self.fpn = FeaturePyramidNetwork(config.channels, config.fpn_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = zip(self.pyramid, features_of(self.body, images))
        return self.fpn(OrderedDict((str(level), step(feature)) for level, (step, feature) in enumerate(features)))


@dataclass
class DetectorOutput(ModelOutput):
    """Output of a [`Detector`].

    Attributes:
        loss: the sum of the losses, where there are targets.
        losses: each of them by torchvision's names.
        detections: outside training, of each image: `boxes` (found, 4) as x1, y1, x2, y2 in its pixels, `labels` (found,)
            from 1 on, `scores` (found,), and `masks` (found, 1, height, width) as probabilities.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    detections: list[dict[str, Tensor]] | None = None


class Detector(PreTrainedModel):
    """Mask R-CNN. Under autocast the backbone alone computes in half precision, and that only in training."""

    config_class = DetectorConfig
    base_model_prefix = "mask_rcnn"
    main_input_name = "images"

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__(config)
        classes = len(config.id2label or {}) + 1  # 0 is the background
        width, last = config.fpn_channels, config.mask_layers[-1]
        # These are neither parameters nor buffers: they must not be made on the meta device, where models are loaded.
        with torch.device("cpu"):
            anchors = AnchorGenerator(tuple((size,) for size in config.anchor_sizes), ((0.5, 1.0, 2.0),) * 5)
        self.mask_rcnn = MaskRCNN(
            Backbone(config),
            min_size=config.min_size,
            max_size=config.max_size,
            image_mean=list(config.image_mean),
            image_std=list(config.image_std),
            rpn_anchor_generator=anchors,
            box_head=TwoMLPHead(width * ROI_SIZE**2, config.box_head_size),
            box_predictor=FastRCNNPredictor(config.box_head_size, classes),
            mask_head=MaskRCNNHeads(width, config.mask_layers, 1),
            mask_predictor=MaskRCNNPredictor(last, last, classes),
        )
        self.freezes_batch_norm = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Every part has drawn its weights itself. Buffers that no checkpoint holds are empty after loading.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # type: ignore[operator]

    @property
    def body(self) -> nn.Module:
        """What is pretrained, and conditioned."""
        return self.mask_rcnn.backbone.body

    def freeze_batch_norm(self) -> None:
        """Let the batch norms of the body keep their statistics, gains and biases from now on."""
        self.freezes_batch_norm = True
        for module in self._body_norms():
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Detector":
        super().train(mode)
        if self.freezes_batch_norm:
            for module in self._body_norms():
                module.eval()
        return self

    def _body_norms(self) -> list[nn.Module]:
        return [module for module in self.body.modules() if isinstance(module, BATCH_NORMS)]

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> DetectorOutput:
        """Find objects, and measure the losses where there are targets.

        Args:
            images: each (3, height, width) in [0, 1]. In training they are read as they are (augmentation resizes them),
                else resized to the configuration's sizes.
            targets: of each image: `boxes` (objects, 4), `labels` (objects,) from 1 on, `masks` (objects, height, width).
        """
        parts = self.mask_rcnn
        device = self.device
        images = [image.to(device, non_blocking=True) for image in images]
        if targets is not None:
            targets = [{name: value.to(device, non_blocking=True) for name, value in each.items()} for each in targets]
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        if self.training:
            batch = ImageList(
                parts.transform.batch_images([parts.transform.normalize(each) for each in images]), sizes
            )
        else:
            batch, targets = parts.transform(images, targets)
        full_precision = torch.autocast(device.type, enabled=False)
        with nullcontext() if self.training else full_precision:
            features = parts.backbone(batch.tensors)
        # In bf16 a box at 1,000 pixels would move by 4 to 8.
        with torch.autocast(device.type, enabled=False):
            levels = OrderedDict((name, level.to(self.dtype)) for name, level in features.items())
            losses = None if targets is None else self._losses(batch, levels, targets)
            detections = None if self.training else self._detections(batch, levels, sizes)
        loss = None if losses is None else torch.stack(list(losses.values())).sum()
        return DetectorOutput(loss, losses, detections)

    def _losses(self, batch: ImageList, levels: dict[str, Tensor], targets: list[dict]) -> dict[str, Tensor]:
        heads = (self.mask_rcnn.rpn, self.mask_rcnn.roi_heads)
        try:
            for head in heads:  # they measure losses in training mode alone
                head.train()
            proposals, proposal_losses = heads[0](batch, levels, targets)
            _, region_losses = heads[1](levels, proposals, batch.image_sizes, targets)
        finally:
            for head in heads:
                head.train(self.training)
        return region_losses | proposal_losses

    def _detections(self, batch: ImageList, levels: dict[str, Tensor], sizes: list[tuple[int, int]]) -> list[dict]:
        parts = self.mask_rcnn
        proposals, _ = parts.rpn(batch, levels, None)
        found, _ = parts.roi_heads(levels, proposals, batch.image_sizes, None)
        return parts.transform.postprocess(found, batch.image_sizes, sizes)


# --- registering and loading -----------------------------------------------------------------------------------------


def register_detector() -> None:
    """Make detectors known to the Auto classes, and to `condition`, `save_pretrained` and `fold`."""
    attention = (*ARCHITECTURES["swin"], *MORE_ARCHITECTURES["timm_xcit"])
    register_architecture(DetectorConfig, {AutoModelForInstanceSegmentation: Detector}, attention)


def load_detector(path: str | Path, **settings: Any) -> Detector:
    """Load a trained detector, conditioned or not, as it was saved.

    Args:
        path: The folder that `save_pretrained` wrote.
        settings: Of `from_pretrained`, such as `dtype`.

    Raises:
        DetectorError: for a folder that holds no whole detector.
    """
    register_detector()
    try:
        model = load_model(AutoModelForInstanceSegmentation, str(path), with_head=True, **settings)
    except ModelError as error:
        raise DetectorError(str(error)) from error
    if not isinstance(model, Detector):
        raise DetectorError(f"{path} holds a {type(model).__name__} and no detector of train_detection.py.")
    return model
