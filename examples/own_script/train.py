"""Trains a small one-stage detector (FCOS with a single level) on COCO labels."""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional

WIDTH, HEIGHT, STRIDE = 160, 128, 8


class Detector(nn.Module):
    def __init__(self, classes):
        super().__init__()
        sides = (3, 16, 32, 64)
        self.body = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in zip(sides, sides[1:])))
        self.neck = nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU())
        self.heads = nn.ModuleList([nn.Conv2d(64, outputs, 1) for outputs in (classes, 4, 1)])
        nn.init.constant_(self.heads[0].bias, -2.0)

    def forward(self, images):
        """(N, 3, H, W) in 0..1 -> class logits (N, A, C), left/top/right/bottom in strides (N, A, 4), centre-ness."""
        features = self.neck(self.body(images))
        logits, sides, centre = (head(features).flatten(2).transpose(1, 2) for head in self.heads)
        return logits, functional.softplus(sides), centre


def load(annotations, frames):
    """Images (N, 3, H, W), and per cell its class (N, A; -1 for none), sides (N, A, 4) and centre-ness (N, A)."""
    coco = json.loads(Path(annotations).read_text())
    classes = [one["id"] for one in coco["categories"]]
    ys, xs = np.mgrid[:HEIGHT // STRIDE, :WIDTH // STRIDE]
    points = (np.stack([xs.ravel(), ys.ravel()], 1) + 0.5) * STRIDE
    images, targets = [], []
    for image in coco["images"]:
        pixels = cv2.cvtColor(cv2.imread(str(Path(frames) / image["file_name"])), cv2.COLOR_BGR2RGB)
        images.append(cv2.resize(pixels, (WIDTH, HEIGHT)).transpose(2, 0, 1) / 255)
        target = np.tile([-1.0, 1, 1, 1, 1, 0], (len(points), 1))
        scale = np.array([WIDTH / image["width"], HEIGHT / image["height"]])
        boxes = [one for one in coco["annotations"] if one["image_id"] == image["id"]]
        for one in sorted(boxes, key=lambda one: -one["bbox"][2] * one["bbox"][3]):  # small boxes win their cells
            low, size = np.array(one["bbox"][:2]) * scale, np.array(one["bbox"][2:]) * scale
            sides = np.concatenate([points - low, low + size - points], 1)
            inside = sides.min(1) > 0
            across, down = np.sort(sides[inside][:, ::2]), np.sort(sides[inside][:, 1::2])
            target[inside, 0] = classes.index(one["category_id"])
            target[inside, 1:5] = sides[inside] / STRIDE
            target[inside, 5] = np.sqrt(across[:, 0] / across[:, 1] * down[:, 0] / down[:, 1])
        targets.append(target)
    return [one["name"] for one in coco["categories"]], torch.tensor(np.array(images), dtype=torch.float32), \
        torch.tensor(np.array(targets), dtype=torch.float32)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    labels, images, targets = load(options.data / "train.json", options.data / "frames")
    model = Detector(len(labels)).train()
    optimizer = torch.optim.AdamW(model.parameters(), options.lr)
    for epoch in range(1, options.epochs + 1):
        total = 0.0
        for batch in torch.randperm(len(images)).split(8):
            logits, sides, centre = model(images[batch])
            wanted = targets[batch]
            on = wanted[..., 0] >= 0
            truth = functional.one_hot(wanted[..., 0].clamp(0).long(), len(labels)).float() * on[..., None]
            loss = functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / on.sum().clamp(1)
            loss = loss + functional.smooth_l1_loss(sides[on], wanted[on][:, 1:5], reduction="sum") / on.sum().clamp(1)
            loss = loss + functional.binary_cross_entropy_with_logits(
                centre[on][:, 0], wanted[on][:, 5], reduction="sum") / on.sum().clamp(1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(batch) / len(images)
        print(f"epoch {epoch}: loss {total:.4f}")
        with open(options.output / "history.jsonl", "a" if epoch > 1 else "w") as history:
            history.write(json.dumps({"epoch": epoch, "epochs": options.epochs, "train_loss": total}) + "\n")
    model.eval()
    torch.onnx.export(model, (torch.zeros(2, 3, HEIGHT, WIDTH),), options.output / "model.onnx", dynamo=True,
                      output_names=["cls_logits", "bbox_regression", "bbox_ctrness"], external_data=False,
                      input_names=["images"], dynamic_shapes=({0: torch.export.Dim("batch")},))
    (options.output / "card.json").write_text(json.dumps({
        "labels": labels, "licence": "Apache-2.0", "decoder": {"name": "fcos", "strides": [STRIDE]},
        "input": {"width": WIDTH, "height": HEIGHT, "layout": "NCHW", "dtype": "float32", "colour": "RGB",
                  "scale": 1 / 255, "padding": "stretch"}}))
    (options.output / "metrics.json").write_text(json.dumps({"train_loss": total}))


if __name__ == "__main__":
    main()
