"""From pixels to `Detections`: letterbox, backend, decode, nms, pipeline."""
