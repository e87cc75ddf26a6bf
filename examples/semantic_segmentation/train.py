"""Paints regions: a U-Net of two levels, trained on the polygons of a data set."""

import argparse
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional

SIDE = 96


class UNet(nn.Module):
    """(N, 96, 96, 3) uint8 RGB -> logits (N, 1 + labels, 48, 48); the first is the background's."""

    def __init__(self, labels):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
                                  nn.Conv2d(32, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Conv2d(32, 1 + labels, 3, 1, 1)

    def forward(self, images):
        near = self.down(images.permute(0, 3, 1, 2) / 255)
        far = functional.interpolate(self.deep(near), scale_factor=2.0)
        return self.head(torch.cat([near, far], 1))


def load(data, split):
    """Images (N, 96, 96, 3) uint8 and class ids (N, 48, 48), 0 for the background. Boxes and masks are left out."""
    coco = json.loads((data / f"{split}.json").read_text())
    images, targets = [], []
    for image in coco["images"]:
        pixels = cv2.cvtColor(cv2.imread(str(data / "frames" / image["file_name"])), cv2.COLOR_BGR2RGB)
        drawn = np.zeros((image["height"], image["width"]), np.uint16)
        for one in coco["annotations"]:
            if one["image_id"] == image["id"] and isinstance(one["segmentation"], list):
                for ring in one["segmentation"]:
                    corners = np.round(np.array(ring).reshape(-1, 2) - 0.5).astype(np.int32)
                    cv2.fillPoly(drawn, [corners], one["category_id"] + 1)
        images.append(cv2.resize(pixels, (SIDE, SIDE)))
        targets.append(cv2.resize(drawn, (SIDE // 2, SIDE // 2), interpolation=cv2.INTER_NEAREST))
    return torch.from_numpy(np.array(images)), torch.from_numpy(np.array(targets, np.int64))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    labels = json.loads((options.data / "dataset.json").read_text())["labels"]
    images, targets = load(options.data, "train")
    if not targets.any():
        sys.exit("train.json has no polygon, so there is nothing to learn. Draw polygons and publish another version.")
    model = UNet(len(labels)).train()
    optimizer = torch.optim.AdamW(model.parameters(), options.lr)
    rows = []
    for epoch in range(1, options.epochs + 1):
        total = 0.0
        for batch in torch.randperm(len(images)).split(8):
            loss = functional.cross_entropy(model(images[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(batch) / len(images)
        rows.append({"epoch": epoch, "epochs": options.epochs, "train_loss": total})
        (options.output / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.onnx.export(model.eval(), (torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8),), options.output / "model.onnx",
                      dynamo=True, external_data=False, input_names=["images"], output_names=["logits"],
                      dynamic_shapes=({0: torch.export.Dim("batch")},))
    (options.output / "card.json").write_text(json.dumps({
        "labels": labels, "licence": "Apache-2.0", "input": {"width": SIDE, "height": SIDE, "padding": "stretch"},
        "decoder": {"name": "semantic", "background": 0, "confidence": 0.5}}))
    (options.output / "metrics.json").write_text(json.dumps({"train_loss": total}))


if __name__ == "__main__":
    main()
