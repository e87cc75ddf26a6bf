"""Trains a small detector (SSDLite) on labels and on what a large teacher sees, and writes an ONNX model with its card.

    python train.py --data DIR --output DIR --teacher model.onnx [--epochs 20 ...]       or  mlflow run . -P teacher=... -P data=...

See README.md. Killed at any moment, the same command continues from the last finished epoch.
"""
import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training import process  # noqa: E402  (before torch)


def parser() -> argparse.ArgumentParser:
    from ssdlite320_mobilenet_v3.train import parser as student_parser

    made = student_parser(__doc__)
    add = made.add_argument
    add("--teacher", type=Path, required=True, help="the teacher's model.onnx")
    add("--teacher_card", default="none", help="its card.json; none: the one beside it")
    add("--hard_share", type=float, default=0.5, help="share of the labels in the class loss, 0..1; the teacher has the rest")
    add("--accept", type=float, default=0.5,
        help="least confidence with which the teacher's boxes are labels of frames that have none")
    return made


def main(arguments: list[str] | None = None) -> int:
    return process.main(arguments, parser(), train, __file__)


def train(options: argparse.Namespace) -> dict:
    """The whole training; returns what it wrote to metrics.json. Raises TrainingError."""
    import torch

    from distillation.losses import soft_loss, soft_targets
    from distillation.report import beside, draw
    from distillation.teacher import open_teacher
    from distillation.teaching import taught
    from ssdlite320_mobilenet_v3.losses import match, multibox_loss
    from ssdlite320_mobilenet_v3.train import student
    from training import distributed, loop, results
    from training.coco import read_coco, read_data
    from training.errors import TrainingError
    from training.images import Augmentation, training_batch
    from training.output import file_record, say

    if not 0 <= options.hard_share <= 1 or not 0 < options.accept <= 1:
        raise TrainingError(f"hard_share {options.hard_share} must lie in 0..1 and accept {options.accept} above 0, up to 1.")
    data = read_data(options.data, options.holdout, options.seed)
    card = options.teacher.with_name("card.json") if options.teacher_card == "none" else Path(options.teacher_card)
    teacher = open_teacher(options.teacher, card, data.labels, torch.get_num_threads())
    unlabelled, _ = read_coco(options.data, "unlabelled")
    lesson = taught(teacher, data, unlabelled, options.accept)
    data = dataclasses.replace(data, train=lesson.samples)
    made, device = student(options, data), distributed.device()
    course = dataclasses.replace(made.course, files=(options.teacher, card, options.data / "unlabelled.json"), facts={
        "teacher_sha256": file_record(options.teacher)["sha256"], "unlabelled_frames": len(unlabelled)})
    augmentation, class_count = Augmentation.of(options), len(data.labels)
    known = torch.tensor([label in teacher.labels for label in data.labels], device=device)

    def losses(detector: torch.nn.Module, batch: loop.Batch) -> dict[str, torch.Tensor]:
        pixels, targets = training_batch(data.train, made.images, batch.indices, course.size,
                                         augmentation.gentle() if batch.is_gentle else augmentation, batch.seed)
        outputs = tuple(one.float() for one in detector(torch.from_numpy(pixels).to(device)))
        hard, soft, is_taught = [], [], []
        for boxes, ids in targets:
            boxes, ids = torch.from_numpy(boxes).to(device), torch.from_numpy(ids).to(device)
            is_label = ids < class_count
            hard.append((boxes[is_label], ids[is_label]))
            class_ids, confidences = lesson.rows(ids[~is_label] - class_count)
            soft.append(soft_targets(made.anchors, boxes[~is_label], class_ids, confidences, class_count))
            at = match(made.anchors, hard[-1][0])
            is_taught.append((at < 0) | known[hard[-1][1]][at] if len(hard[-1][0]) else at < 0)
        parts = multibox_loss(outputs, hard, made.anchors)
        learned = soft_loss(outputs[0], torch.stack(soft), torch.stack(is_taught))
        return {"cls": options.hard_share * parts["cls"], "soft": (1 - options.hard_share) * learned, "box": parts["box"]}

    def finish(model: torch.nn.Module, state) -> dict:
        say("the teacher is scored on the same frames")
        further = beside(teacher, made, data, model)
        metrics = results.write_results(
            model, state, options, course, data, made.images, decode=made.decode, further=further, **made.export)
        draw(options.output / "plots" / "teacher.png", metrics)
        return {**metrics, "teaching": lesson.facts}

    return loop.run(options, made.model, course, losses,
                    partial(results.figures, decode=made.decode, data=data, images=made.images), finish)


if __name__ == "__main__":
    sys.exit(main())
