"""Training frames with the teacher's boxes beside the labels, in a form that the augmentations of boxes take along."""
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from distillation.teacher import Teacher
from training.coco import Data, Sample
from training.output import say


@dataclasses.dataclass(frozen=True)
class Lesson:
    """samples  with class ids below C for labels and C + n for the teacher's n-th box over all of them
    class_ids, confidences  (n,) of the teacher's boxes; facts: what to say of it in metrics.json
    """

    samples: list[Sample]
    class_ids: torch.Tensor
    confidences: torch.Tensor
    facts: dict[str, Any]

    def rows(self, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class ids and confidences of the teacher's boxes with these numbers, on their device."""
        where = at.cpu()
        return self.class_ids[where].to(at.device), self.confidences[where].to(at.device)


def taught(teacher: Teacher, data: Data, unlabelled: Sequence[Sample], accept: float) -> Lesson:
    """The training frames and, after them, the unlabelled ones, whose labels are the teacher's boxes from the confidence
    `accept` on."""
    samples, class_ids, confidences, count, accepted = [], [], [], 0, 0
    for number, sample in enumerate([*data.train, *unlabelled]):
        boxes, scores, ids = teacher.label(sample, data.labels)
        given = [(sample.boxes, sample.class_ids, sample.crowds)]
        if number >= len(data.train):
            is_label = scores >= accept
            accepted += int(is_label.sum())
            given = [(boxes[is_label], ids[is_label], np.zeros(is_label.sum(), bool))]
        given.append((boxes, len(data.labels) + count + np.arange(len(ids)), np.zeros(len(ids), bool)))
        parts = [np.concatenate(part) for part in zip(*given)]
        samples.append(dataclasses.replace(sample, boxes=parts[0].astype(np.float32), class_ids=parts[1].astype(np.int64),
                                           crowds=parts[2], records=()))
        class_ids.append(ids)
        confidences.append(scores)
        count += len(ids)
    unknown = [label for label in data.labels if label not in teacher.labels]
    say(f"the teacher sees {count} boxes on {len(samples)} frames; {len(unlabelled)} of them are unlabelled and get {accepted} "
        f"labels from it" + (f"; it does not know {', '.join(unknown)}" if unknown else ""))
    facts = {"frames": len(samples), "unlabelled_frames": len(unlabelled), "teacher_boxes": count,
             "accepted_boxes": accepted, "unknown_to_teacher": unknown}
    return Lesson(samples, torch.from_numpy(np.concatenate(class_ids)).long(),
                  torch.from_numpy(np.concatenate(confidences)).float(), facts)
