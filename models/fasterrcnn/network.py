"""Faster R-CNN with a feature pyramid (Ren et al., 2015; Lin et al., FPN, 2017), torchvision's, on a choice of backbones;
its forward pass with fixed shapes, which is measured, exported and deployed alike."""
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, batched_nms, clip_boxes_to_image, nms, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from training import backbones, export
from training.card import check_difference
from training.detection import CONFIDENCE, MAX_DETECTIONS
from training.weights import LITE0_MEAN, LITE0_STD

BACKBONES = ("efficientnet_lite0", "mobilenet_v3_large", "resnet50_v2")
NMS_IOU = 0.5  # torchvision, FasterRCNN: box_nms_thresh
# Proposals a frame that reach the second stage. torchvision takes 1000; 300 is the paper's (Ren et al., table 8) and a third
# of the time.
PROPOSALS = 300
# Of these so many a frame are trained on: Fast R-CNN's 128 (Girshick, 2015, section 2.3), torchvision's 512 take twice as long.
SAMPLED = 128
MAX_CANDIDATES = 1000
OUTPUTS = ("boxes", "scores", "labels")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision, GeneralizedRCNN's defaults
POOLED, SAMPLES = 7, 2  # torchvision, FasterRCNN: MultiScaleRoIAlign(output_size=7, sampling_ratio=2)
CARD = {
    "name": "detections", "outputs": {"box": "boxes", "score": "scores", "label": "labels"},
    "confidence": CONFIDENCE, "iou": NMS_IOU, "nms": "per class, after clipping; that of the proposals is inside the graph",
    "max_candidates": MAX_CANDIDATES, "max_detections": MAX_DETECTIONS,
}


class Detector(nn.Module):
    """In training: forward(images (N, H, W, 3) uint8 RGB, targets as torchvision's) returns its four losses by name.

    Else forward(images) returns boxes (N, K, 4) xyxy in canvas pixels, scores (N, K) in 0..1 and labels (N, K) class ids
    from 0: the K best pairs of a proposal and a class, before the last NMS. K does not depend on the image.
    """

    backbone_prefix = "rcnn.backbone.body."

    def __init__(self, class_count: int, backbone: str = BACKBONES[0]):
        super().__init__()
        settings = {"num_classes": class_count + 1, "rpn_post_nms_top_n_test": PROPOSALS,
                    "box_batch_size_per_image": SAMPLED}
        if backbone == "efficientnet_lite0":
            mean, std = (LITE0_MEAN,) * 3, (LITE0_STD,) * 3
            self.rcnn = _lite0(**settings)
        else:
            mean, std = ([255 * one for one in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
            build = {"mobilenet_v3_large": detection.fasterrcnn_mobilenet_v3_large_fpn,
                     "resnet50_v2": detection.fasterrcnn_resnet50_fpn_v2}[backbone]
            self.rcnn = build(weights=None, weights_backbone=None, **settings)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("gain", 1 / torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor, targets: list[dict[str, torch.Tensor]] | None = None) -> Any:
        pixels = (images.permute(0, 3, 1, 2).float() - self.mean) * self.gain
        features = self.rcnn.backbone(pixels)
        if not self.training:
            one = [self._detect(pixels[i : i + 1], {name: level[i : i + 1] for name, level in features.items()})
                   for i in range(len(images))]
            return tuple(torch.stack(parts) for parts in zip(*one))
        sizes = [tuple(pixels.shape[-2:])] * len(pixels)
        proposals, of_proposals = self.rcnn.rpn(ImageList(pixels, sizes), features, targets)
        _, of_boxes = self.rcnn.roi_heads(features, proposals, sizes, targets)
        return {**of_proposals, **of_boxes}

    def _detect(self, pixels: torch.Tensor, features: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """One image: (K, 4), (K,), (K,). The same as torchvision's eval forward up to its last NMS, in fixed shapes: what
        it drops stays, with a score of 0."""
        size = tuple(pixels.shape[-2:])
        proposals, is_proposed = self._propose(pixels, features)
        heads = self.rcnn.roi_heads
        logits, offsets = heads.box_predictor(heads.box_head(self._pooled(features, proposals, size)))
        boxes = clip_boxes_to_image(heads.box_coder.decode(offsets, [proposals]), size)[:, 1:]
        # Smaller than this are no boxes (torchvision, roi_heads.py, postprocess_detections).
        is_box = ((boxes[..., 2:] - boxes[..., :2]) >= 1e-2).all(-1) & is_proposed[:, None]
        scores = torch.where(is_box, logits.softmax(-1)[:, 1:], 0.0)
        class_count = scores.shape[1]
        scores, best = scores.flatten().topk(min(MAX_CANDIDATES, scores.numel()))
        return boxes.reshape(-1, 4)[best], scores, (best % class_count).float()

    def _propose(self, pixels: torch.Tensor, features: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(P, 4) proposals and (P,) whether NMS kept them (torchvision, rpn.py, filter_proposals)."""
        rpn, size = self.rcnn.rpn, tuple(pixels.shape[-2:])
        levels = list(features.values())
        objectness, offsets = rpn.head(levels)
        counts = [one.shape[1] * one.shape[2] * one.shape[3] for one in objectness]
        anchors = rpn.anchor_generator(ImageList(pixels, [size]), levels)
        objectness, offsets = concat_box_prediction_layers(objectness, offsets)
        proposals = rpn.box_coder.decode(offsets, anchors).view(-1, 4)
        chosen, level_of, start = [], [], 0
        for number, count in enumerate(counts):
            at = objectness[start : start + count].flatten().topk(min(rpn.pre_nms_top_n(), count)).indices
            chosen.append(at + start)
            level_of.append(torch.full_like(at, number))
            start += count
        at = torch.cat(chosen)
        boxes, scores = clip_boxes_to_image(proposals[at], size), objectness.flatten()[at].sigmoid()
        scores = torch.where(((boxes[:, 2:] - boxes[:, :2]) >= rpn.min_size).all(1), scores, -1.0)
        # Shifted apart, so that boxes of different levels do not meet.
        apart = torch.cat(level_of)[:, None].to(boxes) * (max(size) + 1.0)
        kept = nms(boxes + apart, scores, rpn.nms_thresh)
        scores = torch.where(torch.zeros_like(scores).index_fill(0, kept, 1.0) > 0, scores, -1.0)
        scores, best = scores.topk(min(PROPOSALS, len(scores)))
        return boxes[best], scores >= max(0.0, rpn.score_thresh)

    def _pooled(self, features: Mapping[str, torch.Tensor], boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(P, channels, 7, 7): each box from the level of its size (torchvision, poolers.py; FPN, formula 1)."""
        names = [name for name in self.rcnn.roi_heads.box_roi_pool.featmap_names if name in features]
        strides = [2 ** round(np.log2(size[0] / features[name].shape[-2])) for name in names]
        sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
        wanted = torch.floor(4 + torch.log2(sides / 224) + 1e-6).clamp(np.log2(strides[0]), np.log2(strides[-1]))
        rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)
        pooled = None
        for name, stride in zip(names, strides):
            level = roi_align(features[name], rois, (POOLED, POOLED), 1 / stride, SAMPLES)
            is_here = (wanted == np.log2(stride)).view(-1, 1, 1, 1)
            pooled = level if pooled is None else torch.where(is_here, level, pooled)
        return pooled

    def freeze(self, stages: int) -> None:
        """Stops the first `stages` parts of the backbone from learning: Lite0's 7 stages, MobileNetV3's 17 blocks,
        ResNet's stem (its convolution and its norm count one each) and 4 layers."""
        body = self.rcnn.backbone.body
        parts = backbones.lite0_stages(body) if hasattr(body, "conv_stem") else [
            [part] for part in body.children() if any(True for _ in part.parameters())]
        backbones.freeze(parts, stages)

    @staticmethod
    def class_rows(labels: Sequence[str]) -> Mapping[str, Mapping[str, Sequence[int]]]:
        """Which rows of which tensors are a label's (training.weights.ClassRows); row 0 is the background."""
        ones = {label: [at] for at, label in enumerate(["", *labels])}
        fours = {label: range(4 * at, 4 * at + 4) for at, label in enumerate(["", *labels])}
        head = "rcnn.roi_heads.box_predictor"
        return {f"{head}.{layer}.{part}": rows for layer, rows in (("cls_score", ones), ("bbox_pred", fours))
                for part in ("weight", "bias")}


class _LiteFpn(nn.Module):
    """Lite0's strides 8, 16, 32 through a pyramid, and a stride of 64 for the proposals of large objects."""

    def __init__(self, channels: int):
        super().__init__()
        self.body, self.out_channels = backbones.lite0((2, 3, 4)), channels
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), channels, extra_blocks=LastLevelMaxPool(),
                                         norm_layer=nn.BatchNorm2d)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(self.body(pixels))))


def _lite0(num_classes: int, channels: int = 128, hidden: int = 512, **settings: Any) -> nn.Module:
    # Two sizes a level, half an octave apart, beginning at two strides: objects from 16 px of the input.
    anchors = AnchorGenerator(tuple((2 * stride, 3 * stride) for stride in (8, 16, 32, 64)), ((0.5, 1.0, 2.0),) * 4)
    return detection.FasterRCNN(
        _LiteFpn(channels), rpn_anchor_generator=anchors, box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], POOLED, SAMPLES),
        box_head=TwoMLPHead(channels * POOLED**2, hidden), box_predictor=FastRCNNPredictor(hidden, num_classes), **settings)


def decode(outputs: tuple[torch.Tensor, ...], scale: float, image_size: tuple[int, int], confidence: float = CONFIDENCE,
           nms_iou: float = NMS_IOU) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One image's (K, 4), (K,), (K,) to boxes (n, 4) xyxy in original pixels, scores (n,), class_ids (n,).

    scale: canvas pixels per image pixel
    """
    boxes, scores, class_ids = (one[outputs[1] > confidence] for one in outputs)
    boxes = boxes / scale
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, image_size[0])
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, image_size[1])
    kept = batched_nms(boxes, scores, class_ids, nms_iou)[:MAX_DETECTIONS]
    return boxes[kept], scores[kept], class_ids[kept].long()


def export_onnx(model: Detector, size: tuple[int, int], file: Path) -> None:
    """One frame a run: `images` (1, H, W, 3)."""
    export.export_onnx(model, size, file, OUTPUTS, any_batch=False)


def compare(model: Detector, size: tuple[int, int], file: Path) -> float | None:
    """The difference of the file's best 20 candidates on noise from the network's: each network's candidate against the
    file's nearest of its class, |score| + |box| / 100 px; the third largest of the 20, for two proposals that overlap by
    just the NMS threshold may change places by a rounding. Raises TrainingError when it is too large."""
    try:
        import onnxruntime
    except ImportError:
        return None
    noise = np.random.default_rng(0).integers(0, 256, (1, size[1], size[0], 3), np.uint8)
    with torch.inference_mode():
        expected = [one[0].numpy() for one in model.cpu()(torch.from_numpy(noise))]
    found = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"images": noise})
    found = [one[0] for one in found]
    differences = []
    for box, score, class_id in list(zip(*expected))[:20]:
        apart = np.abs(found[0] - box).max(1) / 100 + np.abs(found[1] - score)
        differences.append(float(np.where(found[2] == class_id, apart, np.inf).min()))
    difference = sorted(differences)[-min(3, len(differences))]
    check_difference(difference, file)
    return difference
