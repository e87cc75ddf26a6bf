"""What moves in front of a camera's background, at low resolution: a running average with a running deviation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

WIDTH = 112  # cells across: a person of 2 % of the frame's width still covers two
# The background follows within TIME_S seconds (an hour's light, not a person's stop), five times slower where it moves.
TIME_S, SLOW = 20.0, 0.2
# A cell moves when it differs by more than noise (grey levels; a webcam's noise is 2..4 of 255, averaged over a cell
# less) and by more than three of its own usual deviations: leaves, water, a flickering tube.
LEAST_DIFFERENCE, DEVIATIONS = 12, 3.0
# So much of the frame changed that the camera may have moved (steadying pays), or shows another scene.
SHAKES, CUT = 0.05, 0.6
# Around each cell the background may lie one cell off: a mast in the wind, and what steadying leaves over at edges
# (as ViBe looks at neighbours, Barnich and Van Droogenbroeck, 2011).
NEIGHBOURS = np.ones((3, 3), np.uint8)
MAX_SHIFT, STEADIER = 0.1, 0.8  # of the width; of the share that moved before

Box = Sequence[float]


class Motion:
    """One camera's background: about 10 bytes a cell.

    is_cut    the last frame showed another scene than the background, which began anew with it
    shift_px  (x, y) in pixels by which the last frame was off the background: a mast in the wind
    """

    def __init__(self) -> None:
        self.is_cut, self.shift_px = False, (0.0, 0.0)
        self._background: np.ndarray | None = None
        self._frames, self._seconds, self._scale = 0, 0.0, (1.0, 1.0)
        self._moves, self._total = np.zeros((1, 1), np.uint8), None

    def update(self, image: np.ndarray, seconds: float) -> None:
        """Takes the next (H, W, 3) uint8 RGB frame of the camera; another size is another scene."""
        grey = _small(image)
        scale = (grey.shape[1] / image.shape[1], grey.shape[0] / image.shape[0])
        self.is_cut, self.shift_px, self._total = False, (0.0, 0.0), None
        if self._background is None or grey.shape != self._background.shape or scale != self._scale:
            self.is_cut = self._background is not None
            self._scale = scale
            self._begin(grey, seconds)
            return
        gap, self._seconds = min(max(0.0, seconds - self._seconds), TIME_S), seconds
        moves, difference, share = self._compare(grey)
        if share > SHAKES and (steadied := self._steady(grey)) is not None:
            found = self._compare(steadied[0])
            if found[2] < STEADIER * share:
                grey, (moves, difference, share) = steadied[0], found
                self.shift_px = (steadied[1][0] / scale[0], steadied[1][1] / scale[1])
        if share > CUT:
            self.is_cut = True
            self._begin(grey, seconds)
            return
        self._frames += 1
        # A true mean of the first frames, then an exponential one.
        rate = max(1 / self._frames, 1 - math.exp(-gap / TIME_S))
        if share:
            cv2.accumulateWeighted(grey, self._background, rate, mask=cv2.bitwise_not(moves))
            cv2.accumulateWeighted(grey, self._background, rate * SLOW, mask=moves)
        else:
            cv2.accumulateWeighted(grey, self._background, rate)
        cv2.accumulateWeighted(difference, self._deviation, rate)
        self._moves = moves

    def share(self, boxes: Sequence[Box], without: Sequence[Box] = ()) -> list[float]:
        """Share of each xyxy box, in pixels of the frame, that moved in the last frame.

        without  boxes whose motion is explained and does not count
        """
        if without:
            moves = self._moves.copy()
            for box in without:
                x1, y1, x2, y2 = self._cells(box)
                moves[y1:y2, x1:x2] = 0
            total = cv2.integral(moves)
        else:
            if self._total is None:
                self._total = cv2.integral(self._moves)
            total = self._total
        shares = []
        for box in boxes:
            x1, y1, x2, y2 = self._cells(box)
            counted = int(total[y2, x2]) - int(total[y1, x2]) - int(total[y2, x1]) + int(total[y1, x1])
            shares.append(counted / (255 * (x2 - x1) * (y2 - y1)))
        return shares

    def _cells(self, box: Box) -> tuple[int, int, int, int]:
        """The box as whole cells, at least one, inside the grid."""
        height, width = self._moves.shape
        (x, y), (across, down) = self.shift_px, self._scale
        x1 = min(max(math.floor((box[0] - x) * across), 0), width - 1)
        y1 = min(max(math.floor((box[1] - y) * down), 0), height - 1)
        x2 = min(max(math.ceil((box[2] - x) * across), x1 + 1), width)
        y2 = min(max(math.ceil((box[3] - y) * down), y1 + 1), height)
        return x1, y1, x2, y2

    def _begin(self, grey: np.ndarray, seconds: float) -> None:
        self._background = grey.astype(np.float32)
        self._deviation = np.full(grey.shape, LEAST_DIFFERENCE / DEVIATIONS / 2, np.float32)
        self._frames, self._seconds = 1, seconds
        self._moves = np.zeros(grey.shape, np.uint8)

    def _compare(self, grey: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """(255 where it moves, difference of each cell, share that moves)."""
        # A cloud or the camera's own exposure shifts the whole frame; a few hundred cells tell by how much.
        sample = (grey[::5, ::5] - self._background[::5, ::5]).ravel()
        middle = len(sample) // 2
        sample.partition(middle)
        background = np.rint(np.clip(self._background + sample[middle], 0, 255)).astype(np.uint8)
        above = cv2.subtract(grey, cv2.dilate(background, NEIGHBOURS))
        below = cv2.subtract(cv2.erode(background, NEIGHBOURS), grey)
        difference = cv2.max(above, below)
        least = np.maximum(cv2.convertScaleAbs(self._deviation, alpha=DEVIATIONS), np.uint8(LEAST_DIFFERENCE))
        moves = cv2.compare(difference, least, cv2.CMP_GT)
        return moves, difference, cv2.countNonZero(moves) / moves.size

    def _steady(self, grey: np.ndarray) -> tuple[np.ndarray, tuple[float, float]] | None:
        """The frame moved back onto the background by phase correlation (Kuglin and Hines, 1975), and the shift."""
        (x, y), _ = cv2.phaseCorrelate(self._background, grey.astype(np.float32))
        if not math.hypot(x, y) <= MAX_SHIFT * WIDTH:
            return None
        matrix = np.array([[1, 0, -x], [0, 1, -y]], np.float32)
        return cv2.warpAffine(grey, matrix, grey.shape[::-1], borderMode=cv2.BORDER_REPLICATE), (x, y)


def _small(image: np.ndarray) -> np.ndarray:
    """(h, WIDTH) uint8 of the green channel, which carries most of the light. A few pixels of each cell are enough to
    average the noise away."""
    height, width = image.shape[:2]
    # OpenCV takes arrays of one or four numbers for scalars, so a sliver of an image gets some cells more.
    across = max(8, min(WIDTH, width))
    down = max(8, round(height * across / width))
    thin = np.ascontiguousarray(image[::max(1, height // down), ::max(1, width // (2 * across)), 1])
    return cv2.resize(thin, (across, down), interpolation=cv2.INTER_AREA)
